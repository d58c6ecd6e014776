"""The site. Without Quarto: the processed notebooks that `nbdev-docs` gives to it, the pages that are made from catalogue and ledgers, and the
tools of the checks below. With Quarto on the PATH: every page rendered and every link followed; with Chromium too, every page opened"""
import ast, functools, http.server, json, os, re, shutil, subprocess, sys, threading
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit
import pytest
from paperbook.core.papers import papers, parts, sidebar
from paperbook.core.site import claims_in, results
from test_book import NBS, ROOT, slug

SITE = 'https://paperbook.github.io/paperbook/'
QUARTO_OPTIONS = set('label fig-cap fig-alt fig-width fig-height fig-align fig-subcap tbl-cap echo eval output warning error include code-fold '
                     'code-summary code-overflow layout layout-ncol layout-nrow column classes'.split())
NAMES = [p.relative_to(ROOT).as_posix() for p in NBS]

def text(x): return ''.join(x or '')
def copy_of_the_repository(to):
    files = subprocess.run(['git', 'ls-files', '-co', '--exclude-standard'], cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    for f in files:
        if (ROOT/f).is_file(): (to/f).parent.mkdir(parents=True, exist_ok=True); shutil.copy(ROOT/f, to/f)
    return to
def run_in(folder, *cmd): return subprocess.run(cmd, cwd=folder, capture_output=True, text=True, env={**os.environ, 'PYTHONPATH': str(folder)})

# Processed notebooks

@pytest.fixture(scope='session')
def processed(tmp_path_factory):
    "Path in the repository -> notebook as Quarto gets it"
    pytest.importorskip('nbdev')
    d = copy_of_the_repository(tmp_path_factory.mktemp('processed'))
    r = run_in(d, sys.executable, '-c', "if __name__ == '__main__':\n    from nbdev.serve import proc_nbs\n    proc_nbs(n_workers=2)")
    assert r.returncode == 0, r.stderr[-3000:]
    return {n: json.loads((d/'_proc'/n).read_text(encoding='utf-8')) for n in NAMES}

every = pytest.mark.parametrize('name', NAMES)
def front(nb): return text(nb['cells'][0]['source'])
def page_of(name): return re.sub(r'/\d+[a-z]?_(?=[^/]*$)', '/', name).removesuffix('.ipynb')+'.html'

FENCE = re.compile(r'^(`{3,})([^`\n]*)\n(.*?)^\1 *$', re.M | re.S)
def markdown(nb):
    "Cells and outputs that are Markdown"
    return '\n\n'.join([text(c['source']) for c in nb['cells'] if c['cell_type'] == 'markdown'] +
                       [text(o.get('data', {}).get('text/markdown')) for c in nb['cells'] for o in c.get('outputs', [])])
def prose(nb): return FENCE.sub('', markdown(nb))
def raw_html(nb): return [m[3] for m in FENCE.finditer(markdown(nb)) if m[2] == '{=html}']

def anchors(nb):
    "Every id on the page, as often as it occurs"
    md, found = prose(nb), []
    for h in re.findall(r'^#{1,6} +(.+?) *$', md, re.M):
        m = re.search(r'\{#([^ }]+)[^}]*\}$', h)
        found.append(m[1] if m else slug(h))
    found += re.findall(r'''\bid=["']([^"']+)["']''', '\n'.join(raw_html(nb)))
    return Counter(found + re.findall(r'^#\| label: *(\S+)', '\n'.join(text(c['source']) for c in nb['cells']), re.M) + re.findall(r'\[[^\]]*\]\{#([\w-]+)\}', md))

def links(nb):
    md = re.sub(r'`[^`\n]*`(?!\])', '', prose(nb))
    return re.findall(r'(?<!!)\[(?:[^\[\]]|\[[^\]]*\])*\]\(([^)\s]+)[^)]*\)', md) + re.findall(r'''<a href=["']([^"']+)["']''', '\n'.join(raw_html(nb)))

@every
def test_the_page_has_a_title_and_its_address(processed, name):
    fm = front(processed[name])
    assert re.search(r'^title: \S', fm, re.M) and re.search(r'^description: \S', fm, re.M)
    assert f'output-file: {Path(page_of(name)).name}\n' in fm

@every
def test_the_page_can_be_run_and_seen(processed, name):
    top = text(processed[name]['cells'][1]['source'])
    assert f'colab.research.google.com/github/paperbook/paperbook/blob/main/{name}"' in top
    assert f'https://github.com/paperbook/paperbook/blob/main/{name}"' in top

@every
def test_nothing_that_is_written_is_lost(processed, name):
    "All prose and all code but hidden cells reaches the page"
    squeeze = lambda s: re.sub(r'\W', '', re.sub(r'\]\(\S+\)', '', s))
    page = squeeze('\n'.join(text(c['source']) for c in processed[name]['cells']))
    for c in json.loads((ROOT/name).read_text())['cells']:
        s = text(c['source'])
        if c['cell_type'] == 'markdown':
            for p in re.split(r'\n\s*\n', re.sub(r'^#+ .*$|^> .*$|^- [\w-]+: .*$', '', s, flags=re.M)):
                assert squeeze(p) in page, f'lost: {p[:200]}'
        elif not re.search(r'^#\| *(hide|default_exp)\b', s, re.M):
            assert squeeze(re.sub(r'^#\|.*$', '', s, flags=re.M)) in page, f'lost: {s[:200]}'

@every
def test_only_options_that_quarto_knows_are_left(processed, name):
    for c in processed[name]['cells']:
        if c['cell_type'] == 'code':
            assert text(c['source']).strip(), 'an empty cell'
            assert set(re.findall(r'^#\| *([\w-]+)', text(c['source']), re.M)) <= QUARTO_OPTIONS, text(c['source'])[:300]

@every
def test_no_output_makes_quarto_fetch_scripts(processed, name):
    "A page with an output of type text/html or JavaScript gets require.js and jQuery from the network"
    kinds = {k for c in processed[name]['cells'] for o in c.get('outputs', []) for k in o.get('data', {})}
    assert not kinds & {'text/html', 'application/javascript', 'application/vnd.jupyter.widget-view+json'}

@every
def test_every_exported_name_is_documented(processed, name):
    nb = processed[name]
    exp = re.search(r'^#\| *default_exp +(\S+)', '\n'.join(text(c['source']) for c in json.loads((ROOT/name).read_text())['cells']), re.M)
    if not exp: return
    tree = ast.parse((ROOT/'paperbook'/(exp[1].replace('.', '/')+'.py')).read_text())
    public = next((ast.literal_eval(o.value) for o in tree.body if isinstance(o, ast.Assign) and ast.unparse(o.targets[0]) == '__all__'), [])
    defined = {o.name for o in tree.body if isinstance(o, (ast.FunctionDef, ast.ClassDef))}
    heads = re.findall(r'^#### (\S+) \[source\]\(https://github.com/paperbook/paperbook/blob/main/paperbook/\S+\.py#L\d+\).*\{#', prose(nb), re.M)
    assert not set(public) & defined - {h.replace('\\_', '_') for h in heads}
    assert prose(nb).count('<summary>reference</summary>') == len(heads)

@every
def test_anchors_are_unique(processed, name):
    twice = [a for a, n in anchors(processed[name]).items() if n > 1 and not re.fullmatch(r'solution(-\d+)?', a)]   # Quarto numbers equal headings
    heads = Counter(slug(h) for h in re.findall(r'^#{1,6} +(.+?) *$', prose(processed[name]), re.M) if '{#' not in h)
    assert not [a for a in twice if heads[a] < 2], twice

@every
def test_links_lead_somewhere(processed, name):
    pages = {page_of(n): n for n in NAMES}
    for link in links(processed[name]):
        if link.startswith(SITE): target = pages.get(urlsplit(link).path.removeprefix('/paperbook/')); assert target, f'{link}: no such page'
        elif re.match(r'https?:|mailto:', link): continue
        else:
            file = link.partition('#')[0]
            target = os.path.normpath(os.path.join(os.path.dirname(name), file)) if file else name
            assert target in processed or (ROOT/target).exists(), f'{link} leads nowhere'
        anchor = unquote(urlsplit(link).fragment)
        if anchor and target in processed: assert anchor in anchors(processed[target]), f'{link}: no such anchor on {target}'

@every
def test_no_link_in_a_link(processed, name):
    assert not re.findall(r'\[\[`[^`]*`\]\([^)]*\)[^\]]*\]\(', prose(processed[name]))

@every
def test_the_page_is_light(processed, name): assert len(json.dumps(processed[name], ensure_ascii=False).encode()) < 2_000_000

def test_every_claim_has_its_place_on_its_page_and_in_the_ledger(processed):
    ledger = anchors(processed['nbs/ledger.ipynb'])
    for p in papers:
        for id, r in results(p.slug).items():
            a = id.replace('.', '-')
            assert ledger[a] == 1 and anchors(processed[p.notebook])[a] == 1, id
            cells = processed[p.notebook]['cells']
            at = next(i for i, c in enumerate(cells) if f'id="{a}"' in text(c['source']))
            nearby = next(c for c in cells[at:] if c['cell_type'] == 'code')
            assert id in claims_in(text(nearby['source'])) or f"verify('{p.slug}')" in text(nearby['source']), f'{id}: the cell after its verdict does not check it'

# Pages made from the catalogue, the ledgers and the source

def test_made_pages_are_up_to_date():
    r = subprocess.run([sys.executable, 'tools/pages.py', '--check'], cwd=ROOT, capture_output=True, text=True)
    assert r.returncode == 0, r.stderr

def test_links_of_the_readme_and_of_how_to_contribute_are_pages():
    for f in ('README.md', 'CONTRIBUTING.md'):
        for link in re.findall(re.escape(SITE)+r'(nbs/[^)#\s]*)', (ROOT/f).read_text()): assert link in {page_of(n) for n in NAMES}, f'{f}: {link}'

def test_each_part_has_a_page_and_the_sidebar_leads_to_it():
    side = sidebar(ROOT)
    for i, q in enumerate(parts, 1):
        entry = next(e for e in side if isinstance(e, dict) and e.get('href') == f'nbs/{q.name}/index.ipynb')
        assert entry.get('section', entry.get('text')) == f'{i}. {q.title}'
        first = text(json.loads((ROOT/entry['href']).read_text())['cells'][0]['source'])
        assert first == f'# {i}. {q.title}\n\n> {q.question}'

def test_home_page_comes_first_and_the_navigation_exists():
    cfg = (ROOT/'_quarto.yml').read_text()
    assert re.search(r'render: \["nbs/index.ipynb"', cfg)
    for f in re.findall(r'nbs/[\w/]+\.ipynb', cfg): assert (ROOT/f).exists(), f
    for f in re.findall(r'assets/[\w.]+\.(?:css|scss)', cfg): assert (ROOT/f).exists(), f

def test_workflows():
    for f in (ROOT/'.github/workflows').glob('*.yml'):
        y = f.read_text()
        assert re.search(r'^permissions:\n  contents: read\n', y, re.M), f'{f.name}: least permissions at the top'
        for use in re.findall(r'uses: (\S+)', y): assert re.search(r'@[0-9a-f]{40}$', use), f'{f.name}: {use} is not pinned to a commit'
        assert y.count('timeout-minutes') == y.count('runs-on') and not re.search(r'pull_request_target|secrets\.', y)
        for job in re.split(r'^  (?=\w[\w-]*:$)', y.partition('\njobs:\n')[2], flags=re.M)[1:]:
            if 'write' in job: assert 'actions/checkout' not in job, f'{f.name}: a job with write permissions runs no code of the repository'
    assert '"3.10", "3.13"' in (ROOT/'.github/workflows/test.yml').read_text()

# What follows links and looks for formulas in rendered pages

class Html(HTMLParser):
    "Ids, links, pictures, text outside of code, and what is fetched from elsewhere"
    VOID = set('area base br col embed hr img input link meta source track wbr'.split())
    def __init__(self, source):
        super().__init__()
        self.ids, self.links, self.no_alt, self.words, self.fetched, self.broken_math, self._stack = Counter(), [], [], [], [], [], []
        self.feed(source)
    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        if 'id' in a: self.ids[a['id']] += 1
        if tag == 'a' and a.get('href'): self.links.append(a['href'])
        if tag == 'img' and not (a.get('alt') or '').strip() and a.get('role') != 'presentation': self.no_alt.append((a.get('src') or '')[:80])
        if tag in ('script', 'img', 'iframe', 'source') and re.match(r'(https?:)?//', a.get('src') or ''): self.fetched.append(a['src'])
        if tag == 'link' and 'stylesheet' in (a.get('rel') or '') and re.match(r'(https?:)?//', a.get('href') or ''): self.fetched.append(a['href'])
        if tag == 'math' or tag == 'merror':
            if tag == 'merror': self.broken_math.append('merror')
        if tag not in self.VOID: self._stack.append((tag, a.get('class') or ''))
    def handle_endtag(self, tag):
        while self._stack and self._stack.pop()[0] != tag: pass
    def handle_data(self, data):
        tags = {t for t, _ in self._stack}
        if tags & {'script', 'style', 'annotation'}: return
        if any('math' in c.split() for _, c in self._stack) and 'math' not in tags and data.strip(): self.broken_math.append(data.strip()[:80])
        if not tags & {'pre', 'code', 'math', 'svg'}: self.words.append(data)

def unrendered(page):
    "Formulas that a reader would see as TeX"
    return page.broken_math + re.findall(r'\$\$.{0,60}|\\\(.{0,60}|\\\[.{0,60}|\\(?:frac|sum|lambda|mathbb|operatorname|mathcal|nabla|le|ge)\b.{0,40}', ''.join(page.words))

def dead_links(pages):
    "(page, link) that lead nowhere, among pages given as address -> Html; other files are given as address -> None"
    out = []
    for at, page in pages.items():
        for link in page.links if page else []:
            if re.match(r'[a-z]+:|//', link): continue
            url = urlsplit(urljoin('/'+at, link))
            to = unquote(url.path).lstrip('/')
            to = to+'index.html' if to.endswith('/') or not to else to
            if to not in pages: out.append((at, link))
            elif url.fragment and pages[to] and unquote(url.fragment) not in pages[to].ids: out.append((at, link))
    return out

def test_link_follower():
    pages = {'index.html': Html('<a href="a/b.html#x">1</a><a href="a/b.html#y">2</a><a href="a/">3</a><a href="https://e.org/z">4</a><a href="pic.png">5</a>'),
             'a/b.html': Html('<h2 id="x">X</h2><a href="../index.html">h</a><a href="#x">here</a><a href="#z">no</a><a href="../gone.html">gone</a>'), 'pic.png': None}
    assert dead_links(pages) == [('index.html', 'a/b.html#y'), ('index.html', 'a/'), ('a/b.html', '#z'), ('a/b.html', '../gone.html')]

def test_formula_finder():
    good = Html('<p>costs $5 <math><mi>x</mi></math> and <code>$$ \\frac12 $$</code></p><pre>\\(x\\)</pre><script>"\\\\[ $$"</script><span class="math inline"><math><mi>y</mi></math></span>')
    assert not unrendered(good)
    for bad in ('<p>$$\\frac12$$</p>', '<p>as \\(x\\)</p>', '<span class="math inline">\\|x\\|</span>', '<p>\\lambda is</p>', '<math><merror><mtext>no</mtext></merror></math>'):
        assert unrendered(Html(bad)), bad

def test_parser_sees_pictures_and_what_is_fetched():
    page = Html('<img src="a.png"><img src="b.png" alt="a curve"><script src="https://cdn.org/x.js"></script><link rel="stylesheet" href="//f.org/c.css"><link rel="canonical" href="https://x.org">')
    assert page.no_alt == ['a.png'] and page.fetched == ['https://cdn.org/x.js', '//f.org/c.css']

CHROMIUM = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
FLAGS = ('--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync '
         '--enable-logging=stderr --v=0 --virtual-time-budget=4000 --dump-dom').split()

def opened(url, profile, size='1200,900'):
    "(DOM after scripts, messages of errors on the console) of a page"
    r = subprocess.run([CHROMIUM, *FLAGS, f'--window-size={size}', f'--user-data-dir={profile}', url], capture_output=True, text=True, timeout=120)
    said = re.findall(r'CONSOLE[:(]\d+\)?\] "(.*?)", source:', r.stderr, re.S)
    return r.stdout, [m for m in said if re.search(r'error|uncaught|failed|refused', m, re.I)]

@pytest.fixture
def served():
    "Serve a folder on this machine"
    running = []
    def start(folder):
        class Quiet(http.server.SimpleHTTPRequestHandler):
            def log_message(self, *a): pass
        s = http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Quiet, directory=str(folder)))
        running.append(s)
        threading.Thread(target=s.serve_forever, daemon=True).start()
        return f'http://127.0.0.1:{s.server_address[1]}/'
    yield start
    for s in running: s.shutdown(); s.server_close()

needs_chromium = pytest.mark.skipif(not CHROMIUM, reason='Chromium is not on the PATH')

@needs_chromium
def test_console_errors_are_seen(served, tmp_path):
    (tmp_path/'good.html').write_text('<!doctype html><link rel=icon href=data:,><p id=p>x</p><script>console.log("fine"); document.getElementById("p").textContent = "made"</script>')
    (tmp_path/'bad.html').write_text('<!doctype html><link rel=icon href=data:,><script>nothing.here()</script>')
    at = served(tmp_path)
    dom, errors = opened(at+'good.html', tmp_path/'profile')
    assert 'made' in dom and not errors
    assert opened(at+'bad.html', tmp_path/'profile')[1]

LEDGER_PROBE = '''<script>addEventListener('load', () => { const f = document.getElementById('ledger-filter'), out = [], seen = () => document.querySelectorAll('#ledger tr.claim:not([hidden])').length;
  const set = (k, v) => { f.elements[k].value = v; f.dispatchEvent(new Event('input', {bubbles: true})); out.push(seen()); };
  out.push(f.hidden, seen()); set('verdict', 'contradicted'); set('text', 'no such words'); f.reset();
  setTimeout(() => { out.push(seen(), document.documentElement.scrollWidth <= innerWidth); document.title = 'probe ' + JSON.stringify(out); }, 100); });</script>'''

@needs_chromium
@pytest.mark.parametrize('size', ['1200,900', '500,900'])
def test_ledger_filters(served, tmp_path, size):
    nb = json.loads((ROOT/'nbs/ledger.ipynb').read_text())
    table = next(text(o['data']['text/html']) for c in nb['cells'] for o in c.get('outputs', []) if 'text/html' in o.get('data', {}))
    (tmp_path/'ledger.html').write_text(f'<!doctype html><meta charset=utf-8><meta name=viewport content="width=device-width"><link rel=icon href=data:,><body>{table}{LEDGER_PROBE}')
    dom, errors = opened(served(tmp_path)+'ledger.html', tmp_path/'profile', size)
    rows = re.findall("data-verdict='([\\w ]+)'", table)
    assert not errors
    assert json.loads(re.search(r'<title>probe (.*?)</title>', dom)[1]) == [False, len(rows), rows.count('contradicted'), 0, len(rows), True]

# Rendered by Quarto

needs_quarto = pytest.mark.skipif(not shutil.which('quarto'), reason='Quarto is not on the PATH: the site is not rendered here (the workflow site.yml renders it)')

@pytest.fixture(scope='session')
def rendered(tmp_path_factory):
    "The rendered site: the folder that PAPERBOOK_SITE names, else a copy of the repository rendered here"
    if os.environ.get('PAPERBOOK_SITE'): return (ROOT/os.environ['PAPERBOOK_SITE']).resolve()
    d = copy_of_the_repository(tmp_path_factory.mktemp('rendered'))
    r = run_in(d, str(Path(sys.executable).parent/'nbdev-docs'), '--n-workers', '2')
    assert r.returncode == 0, (r.stdout+r.stderr)[-3000:]
    return d/'_docs'

@pytest.fixture(scope='session')
def pages(rendered):
    files = {f.relative_to(rendered).as_posix(): f for f in rendered.rglob('*') if f.is_file()}
    return {k: Html(f.read_text(encoding='utf-8')) if f.suffix == '.html' else None for k, f in files.items()}

@needs_quarto
def test_every_notebook_is_a_page_and_the_root_leads_home(pages, rendered):
    assert not {page_of(n) for n in NAMES} - set(pages)
    assert 'nbs/index.html' in (rendered/'index.html').read_text()

@needs_quarto
def test_every_rendered_link_leads_somewhere(pages): assert not dead_links({k: p for k, p in pages.items() if not k.startswith('site_libs/')} | {k: None for k in pages if k.startswith('site_libs/')})

@needs_quarto
def test_rendered_pages_are_whole(pages, rendered):
    for k, p in pages.items():
        if p is None or k.startswith('site_libs/') or k == 'index.html': continue
        assert not unrendered(p), k
        assert not p.no_alt, k
        assert not p.fetched, k
        assert (rendered/k).stat().st_size < 2_000_000, k

@needs_quarto
@needs_chromium
def test_rendered_pages_open_without_errors(pages, rendered, served, tmp_path):
    at = served(rendered)
    for k in sorted(page_of(n) for n in NAMES):
        for size in ('1200,900', '390,800'):
            dom, errors = opened(at+k, tmp_path/'profile', size)
            assert not errors, (k, errors)
            assert not unrendered(Html(dom)), k
