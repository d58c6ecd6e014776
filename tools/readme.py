"Write README.md from nbs/index.ipynb: python tools/readme.py [--check]"
import json, os, re, sys, base64
from pathlib import Path

root = Path(__file__).resolve().parent.parent
site = 'https://paperbook.github.io/paperbook/nbs/'

def page(path):
    "The site's address of a notebook that the home page links to"
    folder, _, name = path.rpartition('/')
    name = re.sub(r"^\d+[a-z]?_", "", name)
    return f"{site}{folder+'/' if folder else ''}{name}.html"

def site_links(md):
    "Markdown with the links to notebooks as links to the site's pages"
    return re.sub(r'\]\(([\w/]+)\.ipynb(#[\w-]+)?\)', lambda m: f']({page(m[1])}{m[2] or ""})', md)

def build():
    "README text and its pictures (name -> bytes)"
    md, pics = [], {}
    for c in json.loads((root/'nbs/index.ipynb').read_text())['cells']:
        src = ''.join(c['source'])
        if c['cell_type'] == 'markdown': md.append(site_links(src)); continue
        flags = re.findall(r'^#\| *(.*)$', src, re.M)
        if 'hide' in flags: continue
        if 'echo: false' not in flags: md.append(f'```python\n{src}\n```')
        alt = next((f.split(':', 1)[1].strip().strip('"') for f in flags if f.startswith('fig-alt')), '')
        for o in c['outputs']:
            d = {k: ''.join(v) for k, v in o.get('data', {}).items()}
            if 'image/png' in d:
                name = f'assets/home-{len(pics)}.png'
                pics[name] = base64.b64decode(d['image/png'])
                md.append(f'![{alt}]({name})')
            elif 'text/markdown' in d: md.append(site_links(d['text/markdown']))
            elif 'text/plain' in d: md.append(f"```\n{d['text/plain']}\n```")
    return '\n\n'.join(md)+'\n', pics

if __name__ == '__main__':
    text, pics = build()
    files = {root/'README.md': text.encode(), **{root/k: v for k, v in pics.items()}}
    stale = [str(f.relative_to(root)) for f, data in files.items() if not f.exists() or f.read_bytes() != data]
    if '--check' in sys.argv: sys.exit(f"{', '.join(stale)}: not as nbs/index.ipynb says; run python tools/readme.py" if stale else 0)
    for f, data in files.items():
        f.parent.mkdir(exist_ok=True)
        tmp = f.with_name(f.name+'.tmp')
        tmp.write_bytes(data); os.replace(tmp, f)
