"Everything that `make test` runs: library and notebooks in step, notebooks executed, tests."
import hashlib, os, subprocess, sys, tempfile, time
from pathlib import Path

root = Path(__file__).resolve().parent.parent
bin = Path(sys.executable).parent
os.environ.update(PATH=f'{bin}{os.pathsep}{os.environ["PATH"]}', MPLBACKEND='agg', HF_HUB_OFFLINE='1', TOKENIZERS_PARALLELISM='false')
os.chdir(root)

def files(*patterns):
    return {p: hashlib.sha256(p.read_bytes()).hexdigest() for pat in patterns for p in sorted(Path('.').glob(pat))}

def step(title, *cmd, **env):
    "Run a command; stop everything where it fails"
    print(f'\n== {title}', flush=True)
    start = time.time()
    if code := subprocess.run(cmd, env={**os.environ, **env}).returncode: sys.exit(f'{title}: failed')
    print(f'   {time.time()-start:.0f} s', flush=True)

def unchanged(title, patterns, cmd, mend):
    "Run a command that must not change the files"
    before = files(*patterns)
    step(title, *cmd)
    after = files(*patterns)
    if changed := sorted(str(p) for p in before.keys() | after.keys() if before.get(p) != after.get(p)):
        sys.exit(f"{title}: out of step: {', '.join(changed)}\nThey are mended now; look at them and commit. ({mend})")

def notebooks(workers=2):
    "Execute the notebooks side by side, each in a process with one thread; print how long each took"
    print('\n== every notebook', flush=True)
    todo = [p for p in sorted(Path('nbs').rglob('*.ipynb')) if '.ipynb_checkpoints' not in p.parts]
    running, times, failed, start = {}, {}, [], time.time()
    while todo or running:
        while todo and len(running) < workers:
            p = todo.pop(0)
            log = tempfile.TemporaryFile('w+')
            running[p] = subprocess.Popen(['nbdev-test', str(p), '--n-workers', '0'], stdout=log, stderr=log,
                                          env={**os.environ, 'OMP_NUM_THREADS': '1', 'PAPERBOOK_QUICK': '1'}), log, time.time()
        for p, (proc, log, t0) in list(running.items()):
            if proc.poll() is None: continue
            times[p] = time.time()-t0
            print(f'   {times[p]:5.1f} s  {p}{"  FAILED" if proc.returncode else ""}', flush=True)
            if proc.returncode: failed.append(p); log.seek(0); print(log.read(), flush=True)
            del running[p]
        time.sleep(.1)
    print(f'   {time.time()-start:.0f} s for {len(times)} notebooks, the slowest {max(times.values()):.0f} s', flush=True)
    if failed: sys.exit(f"{len(failed)} notebooks failed: {', '.join(map(str, failed))}")

unchanged('library in step with the notebooks', ['paperbook/**/*.py', 'nbs/**/*.ipynb'], ['nbdev-export'], 'nbdev-export')
unchanged('notebooks clean', ['nbs/**/*.ipynb'], ['nbdev-clean'], 'nbdev-clean')
notebooks()
step('tests', sys.executable, '-m', 'pytest', 'tests', '--durations=10')
