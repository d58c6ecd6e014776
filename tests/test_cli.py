"The command line end to end, as a user starts it, with every error path"
import json, os, signal, subprocess, sys, time
from pathlib import Path
import pytest
from paperbook.core import claims, cli
from paperbook.core.papers import papers

PLANNED = [p.slug for p in papers if p.state == 'planned'][0]
exe = str(Path(sys.executable).parent/'paperbook')

def sh(*argv, cwd=None, **env):
    r = subprocess.run([exe, *argv], capture_output=True, text=True, cwd=cwd, env={**os.environ, **env}, timeout=900)
    return r.returncode, r.stdout, r.stderr

def main(capsys, *argv):
    try: code = cli.main(list(argv))
    except SystemExit as e: code = e.code
    return code, *capsys.readouterr()

def test_help_shows_examples():
    for cmd in ((), ('list',), ('show',), ('verify',), ('lab',), ('bench',), ('new',)):
        code, out, _ = sh(*cmd, '--help')
        assert code == 0 and 'examples:' in out

def test_list_and_show(capsys):
    code, out, _ = main(capsys, 'list', '--json')
    rows = json.loads(out)
    assert code == 0 and len(rows) == 44 and {'slug', 'title', 'part', 'state', 'summary'} <= rows[0].keys()
    code, out, _ = main(capsys, 'show', 'lion', '--json')
    assert code == 0 and {f'lion.C{i}' for i in range(1, 13)} <= {c['claim'] for c in json.loads(out)['claims']}
    assert 'lion.C5' in main(capsys, 'show', 'lion')[1]
    assert main(capsys, 'show', PLANNED)[0] == 0      # planned papers are shown too

def test_verify_writes_report_and_results(tmp_path):
    code, out, err = sh('verify', 'lion', '--only', 'C4,C11', '--seeds', '20,21', '--json', '--no-figures', cwd=tmp_path)
    assert code == 0, err
    d = json.loads(out)
    assert [c['claim'] for c in d['papers'][0]['claims']] == ['lion.C4', 'lion.C11']
    assert all(c['verdict'] == 'verified' and c['seeds'] == [20, 21] for c in d['papers'][0]['claims'])
    page = Path(d['report']).read_text()
    assert 'lion.C11' in page and '<script' not in page and 'src="http' not in page
    assert claims.Ledger(tmp_path/'reports/lion.json').results()['lion.C4'].seeds == [20, 21]

def test_table_for_people(tmp_path):
    code, out, err = sh('verify', 'lion', '--only', 'C11', '--seeds', '1', '--no-figures', cwd=tmp_path)
    assert code == 0 and 'verified' in out and 'report: ' in out and 'measured' in err

def test_figures_are_in_the_report(tmp_path):
    code, out, err = sh('verify', 'lion', '--only', 'C11', '--seeds', '1', '--json', cwd=tmp_path)
    page = Path(json.loads(out)['report']).read_text()
    assert code == 0 and page.count('data:image/png;base64') >= 3 and 'failed' not in page

def test_processes_agree_with_one(tmp_path):
    one, two = (json.loads(sh('verify', 'lion', '--only', 'C4,C5', '--jobs', j, '--json', '--no-figures', '--out', str(tmp_path/j))[1]) for j in '12')
    assert [c['ours'] for c in one['papers'][0]['claims']] == [c['ours'] for c in two['papers'][0]['claims']]

def test_dask_cluster(tmp_path):
    code, out, err = sh('verify', 'lion', '--only', 'C11', '--jobs', '2', '--backend', 'dask', '--json', '--no-figures', cwd=tmp_path)
    assert code == 0, err
    assert json.loads(out)['papers'][0]['claims'][0]['verdict'] == 'verified'

@pytest.mark.parametrize('argv, why', [
    (('show', 'lyon'), 'lion'), (('verify', 'sofia'), 'sophia'), (('verify', PLANNED), 'planned'), (('verify', 'lion', '--seeds', 'many'), '--seeds many'),
    (('verify', 'lion', '--seeds', '0'), 'at least one seed'), (('verify', 'lion', '--seeds', '2,2'), 'different'), (('verify', 'lion', '--only', 'C99'), 'no claim lion.C99'),
    (('verify', 'lion', '--jobs', '0'), 'jobs'), (('verify', 'lion', '--scale', 'huge'), 'invalid choice'), (('verify', 'lion', '--backend', 'slurm'), 'invalid choice'),
    (('list', '--part', 'optics'), 'unknown part'), (('new', 'lyon'), 'lion'), (('bench', 'nothing'), 'nothing'), (('fly',), 'invalid choice'), ((), 'required')])
def test_usage_errors(capsys, tmp_path, monkeypatch, argv, why):
    monkeypatch.chdir(tmp_path)
    code, out, err = main(capsys, *argv)
    assert code == 2 and out == '' and why in err and 'Traceback' not in err
    assert list(tmp_path.iterdir()) == []

def test_lab_needs_a_gpu_or_a_yes(capsys):
    import torch
    if torch.cuda.is_available(): pytest.skip('there is a GPU')
    code, _, err = main(capsys, 'lab', 'lion')
    assert code == 2 and '--cpu' in err

def test_new_needs_a_checkout_and_overwrites_nothing(capsys, tmp_path, root):
    assert main(capsys, 'new', PLANNED, '--root', str(tmp_path))[0] == 2
    code, _, err = main(capsys, 'new', 'lion', '--root', str(root))
    assert code == 2 and 'not overwritten' in err

def test_a_worse_verdict_is_exit_1(capsys, tmp_path, monkeypatch):
    "A fresh run whose identity fails, where the record says that it held"
    c = claims.registry.get('lion.C11') or (claims.claims_of('lion'), claims.registry['lion.C11'])[1]
    good = claims.Result(c.id, c.kind, c.paper, c.number, c.scope, measurements=[claims.Measurement(c.id, 0, {'': claims.exact(1, 1)}, 0.)])
    monkeypatch.setitem(claims.registry, c.id, claims.Claim(c.id, c.kind, c.paper, _breaks, c.number, c.scope, False, 'book', ''))
    monkeypatch.setattr(claims, 'recorded', lambda slug, scale='book': {c.id: good})
    code, out, _ = main(capsys, 'verify', 'lion', '--only', 'C11', '--no-figures', '--out', str(tmp_path))
    assert code == 1 and 'worse than recorded' in out and 'contradicted' in out

def _breaks(seed):
    "Measures 2 where 1 is right."
    return claims.exact(2, 1)

def test_damaged_ledger_is_left_alone(capsys, tmp_path, monkeypatch):
    f = tmp_path/'lion.json'
    f.write_text('{"version": 1, "scales": {')
    monkeypatch.setattr(claims, 'ledger_path', lambda slug: f)
    code, _, err = main(capsys, 'verify', 'lion', '--only', 'C11', '--record', '--no-figures', '--out', str(tmp_path/'r'))
    assert code == 2 and 'damaged' in err and f.read_text() == '{"version": 1, "scales": {'

def test_unwritable_output_is_said(capsys, tmp_path):
    (tmp_path/'file').write_text('')
    code, _, err = main(capsys, 'verify', 'lion', '--only', 'C11', '--no-figures', '--out', str(tmp_path/'file'))
    assert code == 2 and err.strip()

def test_recording_goes_on_after_an_interrupt(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(claims, 'ledger_path', lambda slug: tmp_path/f'{slug}.json')
    run = lambda *a: main(capsys, 'verify', 'lion', '--only', 'C11', '--record', '--no-figures', '--out', str(tmp_path/'r'), *a)
    assert run('--seeds', '1,2')[0] == 0
    calls = []
    real = claims.measure
    monkeypatch.setattr(claims, 'measure', lambda c, s, scale='book': (calls.append(s), real(c, s, scale))[1])
    assert run('--seeds', '1,2,3')[0] == 0
    assert calls == [[3]] or calls == [[1, 2, 3]]     # only what was missing; a batched check repeats itself
    assert claims.Ledger(tmp_path/'lion.json').results()['lion.C11'].seeds == [1, 2, 3]

def test_ctrl_c_keeps_what_was_finished(tmp_path):
    p = subprocess.Popen([exe, 'verify', 'lion', '--seeds', '30', '--no-figures', '--json'], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    f = tmp_path/'reports'/'lion.json'
    end = time.time()+120
    while time.time() < end and not f.exists(): time.sleep(.2)
    p.send_signal(signal.SIGINT)
    out, err = p.communicate(timeout=120)
    assert p.returncode == 130, err
    assert claims.Ledger(f).results() and json.loads(out)['papers'][0]['interrupted']

def test_lab_record_is_shown_beside_a_book_run(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, 'ledger_path', lambda slug: tmp_path/f'{slug}.json')
    monkeypatch.setattr(claims, 'claims_of', lambda slug: [claims.Claim('demo.L1', 'comparison', 'p', check, '–', 'small', False, 'lab', 'a GPU')])
    assert claims.verify('demo', 5, 'lab', record=True)['L1'].seeds == [0, 1, 2, 3, 4]
    v = claims.verify('demo', [3])
    assert v.counts() == {'not run': 1} and 'needs a GPU; recorded: scaled' in v.rows()[0][4] and 'scaled' in v._repr_html_()
    assert claims.recorded('demo').keys() == claims.recorded('demo', 'lab').keys() == {'demo.L1'}

def check(seed): return claims.compare(2+seed/100, 1, better='higher')
