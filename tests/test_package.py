"The package as users get it: the wheel without the course extra, and the time of its import"
import importlib.metadata as md, json, os, subprocess, sys, time, zipfile
from pathlib import Path
import pytest

def test_import_is_quick():
    def best(code, n=7):
        t = []
        for _ in range(n):
            s = time.perf_counter(); subprocess.run([sys.executable, '-c', code], check=True); t.append(time.perf_counter()-s)
        return min(t)
    assert best('import paperbook') - best('pass') < .1

def base_closure():
    "Distributions that the base install brings, names normalised"
    from packaging.requirements import Requirement
    norm = lambda s: s.lower().replace('_', '-').replace('.', '-')
    have, todo = set(), ['paperbook']
    while todo:
        name = todo.pop()
        try: reqs = md.requires(name) or []
        except md.PackageNotFoundError: continue
        for r in map(Requirement, reqs):
            if (r.marker is None or r.marker.evaluate({'extra': ''})) and norm(r.name) not in have:
                have.add(norm(r.name)); todo.append(r.name)
    return have

BLOCK = '''
import importlib.machinery as m
names, real = set({names!r}), m.PathFinder.find_spec
m.PathFinder.find_spec = classmethod(lambda cls, name, path=None, target=None: None if name.split(".")[0] in names else real(name, path, target))
'''

@pytest.fixture(scope='module')
def wheel(root, tmp_path_factory):
    d = tmp_path_factory.mktemp('wheel')
    src = d/'src'
    files = subprocess.run(['git', 'ls-files', '-co', '--exclude-standard'], cwd=root, capture_output=True, text=True, check=True).stdout.split()
    for f in files:
        if f.startswith('nbs/') or not (root/f).is_file(): continue
        (src/f).parent.mkdir(parents=True, exist_ok=True); (src/f).write_bytes((root/f).read_bytes())
    subprocess.run([sys.executable, '-m', 'build', '--wheel', '--no-isolation', '--outdir', str(d), str(src)], check=True, capture_output=True)
    return next(d.glob('*.whl'))

@pytest.fixture(scope='module')
def empty_env(wheel, tmp_path_factory):
    "An environment with the wheel and nothing but what the base install brings: everything else can't be imported"
    d = tmp_path_factory.mktemp('env')
    subprocess.run([sys.executable, '-m', 'venv', '--without-pip', str(d)], check=True)
    py = d/'bin'/'python'
    site = Path(subprocess.run([py, '-c', 'import site; print(site.getsitepackages()[0])'], capture_output=True, text=True, check=True).stdout.strip())
    subprocess.run([sys.executable, '-m', 'pip', '--python', str(py), 'install', '-q', '--no-deps', '--no-index', str(wheel)], check=True)
    base = base_closure()
    norm = lambda s: s.lower().replace('_', '-').replace('.', '-')
    tops = {}
    for dist in md.distributions():   # packages_distributions() of Python 3.10 misses packages without a top_level.txt
        for f in dist.files or ():
            if f.suffix in ('.py', '.so') and not f.parts[0].endswith(('.dist-info', '.data')) and f.parts[0] != '..':
                tops.setdefault(f.parts[0].split('.')[0], set()).add(norm(dist.metadata['Name']))
    blocked = sorted(top for top, dists in tops.items() if not dists & base and top not in ('paperbook', 'pip'))
    (site/'sitecustomize.py').write_text(BLOCK.format(names=blocked))
    (site/'dev.pth').write_text(str(Path(md.distribution('torch').locate_file('')))+'\n')
    return py

def run(py, code):
    r = subprocess.run([py, '-c', code], capture_output=True, text=True, cwd='/', env={k: v for k, v in os.environ.items() if k != 'PYTHONPATH'})
    assert r.returncode == 0, r.stderr
    return r.stdout

def test_wheel_has_what_it_needs(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {'paperbook/__init__.py', 'paperbook/core/claims.py', 'paperbook/optim/lion.py', 'paperbook/ledger/lion.json'} <= set(names)
    assert not [n for n in names if n.startswith(('tests/', 'nbs/', 'tools/')) or n.endswith('.ipynb')]

def test_every_module_imports_without_the_course_extra(empty_env):
    out = run(empty_env, '''
import pkgutil, importlib, paperbook
for m in pkgutil.walk_packages(paperbook.__path__, 'paperbook.'): importlib.import_module(m.name)
print(paperbook.__file__)
try: import fastai
except ModuleNotFoundError: print('no fastai')
try: import sklearn
except ModuleNotFoundError: print('no sklearn')
''')
    assert 'site-packages' in out and 'no fastai' in out and 'no sklearn' in out

def test_lion_works_in_the_base_install(empty_env):
    run(empty_env, '''
import torch
from paperbook.optim.lion import Lion
p = torch.nn.Parameter(torch.ones(3)); o = Lion([p], lr=.1)
p.sum().backward(); o.step()
assert torch.allclose(p.data, torch.full((3,), .9))
''')

def test_the_trained_gpt_comes_with_the_package(empty_env):
    assert float(run(empty_env, '''
import torch
from paperbook.core.zoo import load_gpt, training_log
model = load_gpt()
x = torch.tensor([[0, *range(300, 310)]])
assert model(x).logits.shape == (1, 11, 1024)
print(training_log()['nats_per_token']['valid'])
''')) < 3.1

def test_missing_extra_is_named(empty_env):
    assert 'paperbook[course]' in run(empty_env, '''
from paperbook.core.data import load
try: load('breast_cancer')
except ImportError as e: print(e)
''')

def test_command_is_installed(empty_env):
    r = subprocess.run([empty_env.parent/'paperbook', 'show', 'lion'], capture_output=True, text=True, cwd='/')
    assert r.returncode == 0 and 'lion.C1' in r.stdout, r.stderr

def test_command_line_without_rich(empty_env):
    out = run(empty_env, "from paperbook.core.cli import main; print(main(['list'])); print(main(['show', 'lion']))")
    assert 'lion' in out and out.count('\n0\n') == 2

def test_settings_file_equals_the_built_in_values(root):
    from paperbook.core.settings import Settings, read_settings
    from paperbook.core.data import datasets
    got = read_settings(root/'settings.ini')
    assert {**vars(got), 'checksums': {}} == vars(Settings())
    assert got.checksums == {k: v.sha256 for k, v in datasets().items() if v.sha256}
