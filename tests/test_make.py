"The set-up says what is missing instead of failing with a stack trace"
import os, stat, subprocess
import pytest

def env_sh(root, tmp_path, python, **env):
    r = subprocess.run(['sh', str(root/'tools/env.sh'), 'course', str(tmp_path/'venv')], capture_output=True, text=True, cwd=root, env={**os.environ, 'PYTHON': str(python), **env})
    return r.returncode, r.stderr

def fake(tmp_path, body):
    f = tmp_path/'python'
    f.write_text('#!/bin/sh\n'+body); f.chmod(f.stat().st_mode | stat.S_IEXEC)
    return f

def test_no_python(root, tmp_path):
    code, err = env_sh(root, tmp_path, 'python-that-is-not-there')
    assert code == 2 and 'was not found' in err

def test_too_old_a_python(root, tmp_path):
    code, err = env_sh(root, tmp_path, fake(tmp_path, 'case "$1" in --version) echo "Python 3.8.18";; *) exit 1;; esac\n'))
    assert code == 2 and 'Python 3.8.18 is too old' in err and 'make PYTHON=' in err

def test_no_venv_module(root, tmp_path):
    code, err = env_sh(root, tmp_path, fake(tmp_path, 'case "$2" in *version_info*) exit 0;; *) exit 1;; esac\n'))
    assert code == 2 and 'apt install python3-venv' in err

def test_no_network(root, tmp_path):
    import sys
    code, err = env_sh(root, tmp_path, sys.executable, PIP_INDEX_URL='http://127.0.0.1:9/simple', PIP_EXTRA_INDEX_URL='', PIP_NO_INDEX='0', PIP_RETRIES='0', PIP_FIND_LINKS='', PIP_CONFIG_FILE=os.devnull, PIP_NO_CACHE_DIR='1')
    assert code == 2 and 'needs a network' in err and not (tmp_path/'venv/.course').exists()

@pytest.mark.parametrize('target', ['verify', 'test', 'docs', 'lab', 'bench'])
def test_targets_exist(root, target):
    assert subprocess.run(['make', '-n', target], cwd=root, capture_output=True).returncode == 0
