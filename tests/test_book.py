"What can be checked of the site without Quarto: front matter, sidebar, links, alt text, outputs, weight"
import json, re
from pathlib import Path
import pytest
from paperbook.core.papers import papers, parts, sidebar

ROOT = Path(__file__).resolve().parent.parent
NBS = sorted(p for p in (ROOT/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)
every_notebook = pytest.mark.parametrize('path', NBS, ids=lambda p: p.relative_to(ROOT/'nbs').with_suffix('').as_posix())

def cells(path, kind): return [c for c in json.loads(path.read_text())['cells'] if c['cell_type'] == kind]
def source(c): return ''.join(c['source'])
def outputs(path): return [(c, o) for c in cells(path, 'code') for o in c['outputs']]

def slug(heading):
    "The anchor that Quarto gives a heading"
    s = re.sub(r'\[([^\]]*)\]\([^)]*\)', r'\1', heading)
    s = re.sub(r'[^\w\s.-]', '', s.replace('\\_', '_').replace('$', '')).strip().lower()
    return re.sub(r'^[^a-z]+', '', re.sub(r'\s+', '-', s)) or 'section'

@every_notebook
def test_front_matter(path):
    first = cells(path, 'markdown')[0]
    assert re.match(r'# \S.*\n\n> \S', source(first)), 'the first cell is a title and a one-line description'

@every_notebook
def test_outputs_are_clean(path):
    text = path.read_text()
    assert not [o for _, o in outputs(path) if o['output_type'] == 'error']
    for c, o in outputs(path):
        shown = json.dumps({k: v for k, v in o.items() if k != 'data'}) + json.dumps({k: v for k, v in o.get('data', {}).items() if not k.startswith('image/png')})
        assert not re.search(r'(?<![\w.])/(home|root|work|tmp|usr|opt|Users)/', shown), f'a machine path in the output of:\n{source(c)[:200]}'
    assert len(text) < 2_000_000, 'the page weighs more than 2 MB'

@every_notebook
def test_was_executed(path):
    for c in cells(path, 'code'):
        if 'verify(' in source(c) and 'eval: false' not in source(c) and source(c).lstrip().startswith('verify('): assert c['outputs'], source(c)

@every_notebook
def test_figures_have_alt_text(path):
    for c, o in outputs(path):
        if any(k.startswith('image/') for k in o.get('data', {})): assert re.search(r'#\| *fig-alt: *\S', source(c)), f'no fig-alt:\n{source(c)[:200]}'

@every_notebook
def test_internal_links(path):
    for c in cells(path, 'markdown'):
        for link in re.findall(r'(?<!!)\[[^\]]*\]\(([^)\s]+)\)', source(c)):
            if re.match(r'https?:|mailto:', link): continue
            file, _, anchor = link.partition('#')
            target = (path.parent/file).resolve() if file else path
            assert target.exists(), f'{link} leads nowhere'
            if anchor and target.suffix == '.ipynb':
                heads = {slug(h) for c in cells(target, 'markdown') for h in re.findall(r'^#+ (.*?)\s*$', source(c), re.M)}
                assert anchor in heads, f'{link}: no such heading, there are {sorted(heads)}'

def flat(entries):
    for e in entries:
        if isinstance(e, dict): yield from [*([e['href']] if 'href' in e else []), *flat(e.get('contents', []))]
        else: yield e

def test_every_notebook_is_in_the_sidebar_and_nothing_else():
    want = {str(p.relative_to(ROOT)) for p in NBS}
    text = (ROOT/'_quarto.yml').read_text()
    shown = text[text.index('# sidebar: begin'):text.index('# sidebar: end')]
    assert set(re.findall(r'nbs/[\w/]+\.ipynb', shown)) == want
    assert set(flat(sidebar(ROOT))) == want

def test_catalogue_and_notebooks_agree():
    assert len(list(papers)) == 44
    for p in papers: assert (ROOT/p.notebook).exists() == (p.state == 'ready'), p.slug
    assert {p.part for p in papers} == {p.name for p in parts}

SECTIONS = 'the problem', 'the idea', 'derivation', 'implementation', 'verification', 'on your own model', 'at full scale', 'exercises', 'references'

@pytest.mark.parametrize('p', [p for p in papers if (ROOT/p.notebook).exists()], ids=lambda p: p.slug)
def test_papers_keep_the_house_order(p):
    heads = [h.lower() for c in cells(ROOT/p.notebook, 'markdown') for h in re.findall(r'^## (.*?)\s*$', source(c), re.M)]
    place = [next((i for i, h in enumerate(heads) if h.startswith(s)), None) for s in SECTIONS]
    assert None not in place, dict(zip(SECTIONS, place))
    assert place == sorted(place)

@pytest.mark.parametrize('p', [p for p in papers if (ROOT/p.notebook).exists()], ids=lambda p: p.slug)
def test_every_claim_is_recorded_with_the_seeds_it_needs(p):
    from paperbook.core.claims import claims_of, recorded, fingerprint, Ledger, ledger_path
    rec, led = recorded(p.slug), Ledger(ledger_path(p.slug))
    for c in claims_of(p.slug):
        if c.at == 'lab': continue
        assert c.id in rec and not rec[c.id].error, f'{c.id} is not recorded: paperbook verify {p.slug} --record'
        assert len(led.done(c)) >= (10 if c.kind in ('comparison', 'ablation') else 3), f'{c.id} was recorded by other code or with too few seeds: paperbook verify {p.slug} --record'

def test_readme_is_the_home_page():
    import subprocess, sys
    r = subprocess.run([sys.executable, 'tools/readme.py', '--check'], cwd=ROOT, capture_output=True, text=True)
    assert r.returncode == 0, r.stderr
