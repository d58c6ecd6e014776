"The benchmarks run, compare what they say they compare, and do without a compiler and without the peers"
import json, os, subprocess, sys
import pytest, torch
from paperbook import benchmarks

def test_quick_run_has_the_targets():
    d = benchmarks.run(['lion'], quick=True)['lion']
    assert {t['at_most'] for t in d['targets']} == {.45, .85}
    assert all(len(v) == 3 and min(v) > 0 for v in d['times'].values())
    assert {'Lion (fused)', 'Lion (foreach)', 'lion-pytorch', 'AdamW (fused)', 'AdamW (foreach)'} <= d['times'].keys()

def test_sophia_has_the_targets_and_two_tensors_of_state():
    d = benchmarks.run(['sophia'], quick=True)['sophia']
    assert {(t['ours'], t['theirs'], t['at_most']) for t in d['targets']} == {('Sophia (fused)', 'pytorch-optimizer SophiaH', .7), ('Sophia (fused)', 'AdamW (foreach)', 1.5)}
    assert any('Sophia (fused) 8, Sophia (foreach) 8' in n for n in d['notes'])

def test_ggpo_has_the_targets():
    d = benchmarks.run(['lora_ggpo'], quick=True)['lora_ggpo']
    assert {(t['ours'], t['theirs'], t['at_most']) for t in d['targets']} >= {('GGPO', 'SAM', 1.), ('MGPO', 'LoRA', 1.18)}
    assert {'LoRA', 'GGPO', 'MGPO', 'SAM'} <= d['times'].keys()

def test_missing_peers_are_named(monkeypatch, capsys):
    monkeypatch.setattr(benchmarks, '_peer', lambda module, name: None)
    assert 'lion-pytorch' not in benchmarks.run(['lion'], quick=True)['lion']['times']
    assert 'paperbook[dev]' in capsys.readouterr().out

def test_shapes_are_those_of_the_page():
    n = sum(torch.Size(s).numel() for s in benchmarks.LION_SHAPES)
    assert len(benchmarks.LION_SHAPES) == 150 and 50e6 <= n < 52e6

def test_kernel_cache_is_shared_by_processes_and_survives_a_broken_file(tmp_path):
    code = 'import torch; from paperbook.optim.lion import Lion; p = torch.nn.Parameter(torch.ones(9)); p.grad = torch.ones(9); Lion([p], lr=.1, fused=True).step(); print(round(float(p[0]), 4))'
    run = lambda: subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env={**os.environ, 'XDG_CACHE_HOME': str(tmp_path)})
    procs = [subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, text=True, env={**os.environ, 'XDG_CACHE_HOME': str(tmp_path)}) for _ in range(2)]
    assert [p.communicate()[0].strip() for p in procs] == ['0.9', '0.9']
    libs = list(tmp_path.rglob('*.so'))
    if libs:
        libs[0].write_bytes(b'not a library')
        assert run().stdout.strip() == '0.9'       # falls back

def test_command_line(tmp_path):
    from paperbook.core import cli
    assert cli.main(['bench', 'lion', '--quick']) == 0
