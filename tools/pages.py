"Bring up to date what is made from catalogue, ledgers and source: python tools/pages.py [--check]"
import ast, json, os, re, subprocess, sys
from pathlib import Path

root = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(root))
os.environ.setdefault('MPLBACKEND', 'agg')
from paperbook.core.papers import write_sidebar
from paperbook.core.settings import atomic_write
from paperbook.core import site

def notebooks(): return [p for p in sorted((root/'nbs').rglob('*.ipynb')) if '.ipynb_checkpoints' not in p.parts]

def source(c): return ''.join(c['source'])

def remake(nb):
    "Make the tables of a page again: the outputs of cells that end in Markdown(...) or HTML(...). Returns whether one changed"
    ns, changed = dict(vars(site)), False
    for c in nb['cells']:
        src = source(c)
        if c['cell_type'] != 'code' or src.startswith(site._COLAB): continue
        if re.search(r'^#\| *hide *$', src, re.M): exec(src, ns); continue
        m = re.search(r'^(Markdown|HTML)\(', src, re.M)
        if not m: continue
        *first, last = ast.parse(src).body
        exec(compile(ast.Module(first, []), '<page>', 'exec'), ns)
        data = eval(compile(ast.Expression(last.value), '<page>', 'eval'), ns).data
        kind = {'Markdown': 'text/markdown', 'HTML': 'text/html'}[m[1]]
        if [''.join(o.get('data', {}).get(kind, '')) for o in c['outputs']] == [data]: continue
        c['outputs'], changed = [dict(data={kind: data.splitlines(True), 'text/plain': [f'<IPython.core.display.{m[1]} object>']},
                                      execution_count=None, metadata={}, output_type='execute_result')], True
    return changed

def main(check=False):
    stale = []
    for p in notebooks():
        nb = json.loads(p.read_text(encoding='utf-8'))
        made = p.name == '10_site.ipynb' or any('from paperbook.core.site import' in source(c) for c in nb['cells'])
        if site.colab_ready(nb, p.relative_to(root).as_posix()) | (made and remake(nb)):
            stale.append(p.relative_to(root).as_posix())
            if not check: atomic_write(p, json.dumps(nb, indent=1, ensure_ascii=False)+'\n')
    if check: return stale
    write_sidebar(root)
    subprocess.run([sys.executable, root/'tools/readme.py'], check=True)
    return stale

if __name__ == '__main__':
    check = '--check' in sys.argv
    stale = main(check)
    if check and stale: sys.exit(f"{', '.join(stale)}: out of date; run python tools/pages.py")
    print('\n'.join(stale) or 'nothing to do')
