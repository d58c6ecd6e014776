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

def test_preferences_have_the_targets_and_half_of_the_memory():
    pytest.importorskip('trl')
    b = benchmarks.bench_preferences(quick=True)
    assert {(t.ours, t.theirs, t.at_most) for t in b.targets} == {(f'from {k}', f'TRL from {p}', 1.) for k, p in (('logits', 'logits'), ('logits, overwriting', 'logits'), ('hidden states', 'hidden states'))}
    assert b.peak['from logits'] <= .6*b.peak['TRL from logits'] and b.peak['from logits, overwriting'] < .2*b.logits
    assert any('at most 0.60' in n for n in b.notes)

def test_frugal_has_the_targets():
    d = benchmarks.run(['frugal'], quick=True)['frugal']
    assert {(t['ours'], t['theirs'], t['at_most']) for t in d['targets']} == {(f'FRUGAL, {k}', p, m) for k in ('block', 'columns') for p, m in (('galore-torch', .7), ('AdamW (foreach)', 1.5))}
    assert any('Bytes of state' in n for n in d['notes']) and any('change of the subspace' in n for n in d['notes'])
def test_ggpo_has_the_targets():
    d = benchmarks.run(['lora_ggpo'], quick=True)['lora_ggpo']
    assert {(t['ours'], t['theirs'], t['at_most']) for t in d['targets']} >= {('GGPO', 'SAM', 1.), ('MGPO', 'LoRA', 1.18)}
    assert {'LoRA', 'GGPO', 'MGPO', 'SAM'} <= d['times'].keys()

def test_missing_peers_are_named(monkeypatch, capsys):
    monkeypatch.setattr(benchmarks, '_peer', lambda module, name: None)
    assert 'lion-pytorch' not in benchmarks.run(['lion'], quick=True)['lion']['times']
    assert 'paperbook[dev]' in capsys.readouterr().out
    assert not any('TRL' in k for k in benchmarks.run(['preferences'], quick=True)['preferences']['times'])

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

def test_gradnormlorp_has_the_targets():
    d = benchmarks.run(['gradnormlorp'], quick=True)['gradnormlorp']
    assert {(t['ours'], t['theirs'], t['at_most']) for t in d['targets']} == {('adapter', 'PEFT DoRA', 1.3), ('optimizer, one-sided', 'AdamW', 1.)}
    assert 'optimizer, all projections due' in d['times'] and all(min(v) > 0 for v in d['times'].values())
