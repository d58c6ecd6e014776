"Sharded parameters in two processes give the numbers of one process"
import os, sys, subprocess
import pytest, torch

WORKER = '''
import sys, torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_tensor, Shard, Replicate
from paperbook.optim.lion import LionK, L1, Huber, LpNorm, GroupL2, Nuclear, TopK, LInf, constraint_report
rank, store = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
dist.init_process_group('gloo', init_method=f'file://{store}', rank=rank, world_size=2)
mesh = init_device_mesh('cpu', (2,))
for kappa in (L1(), Huber(.1), LpNorm(1.5), LpNorm(2, rescale=True), LInf(), GroupL2(), GroupL2(dim=0), GroupL2(dim=None), TopK(3), Nuclear()):
    for place in ([Shard(0)], [Shard(1)], [Replicate()]):
        g = torch.Generator().manual_seed(0)
        xs = [torch.randn(s, generator=g, dtype=torch.float64) for s in ((6, 4), (3, 2), (1, 4), (4, 1), *[(5,), (1,)]*(place != [Shard(1)]))]   # 5 and 3 don't divide by 2; of 1 the second process has nothing
        grads = [[torch.randn(x.shape, generator=g, dtype=torch.float64) for x in xs] for _ in range(3)]
        one = [torch.nn.Parameter(x.clone()) for x in xs]
        two = [torch.nn.Parameter(distribute_tensor(x.clone(), mesh, place)) for x in xs]
        a, b = (LionK(ps, lr=.05, weight_decay=1., kappa=kappa) for ps in (one, two))
        for gs in grads:
            for p, q, d in zip(one, two, gs): p.grad, q.grad = d.clone(), distribute_tensor(d.clone(), mesh, place)
            ra, rb = constraint_report(a), constraint_report(b)
            assert all(abs(u-v) < 1e-9*max(1, abs(u)) for u, v in zip(ra, rb)), (kappa, place, ra, rb)
            a.step(); b.step()
        for p, q in zip(one, two):
            assert q.placements == tuple(place)
            err = (q.full_tensor()-p).abs().max()
            assert err < 1e-10, (kappa, place, err)

from torch.distributed.fsdp import fully_shard
torch.manual_seed(0)
def net(): torch.manual_seed(0); return torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.Tanh(), torch.nn.Linear(6, 3)).double()
one, two = net(), fully_shard(net(), mesh=mesh)
a, b = (LionK(m.parameters(), lr=.01, weight_decay=1.) for m in (one, two))
x = torch.randn(4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
for _ in range(3):
    for m, o in ((one, a), (two, b)): o.zero_grad(); m(x).square().mean().backward(); o.step()
for p, q in zip(one.parameters(), two.parameters()): assert (q.full_tensor()-p).abs().max() < 1e-10
sd = b.state_dict(); b.load_state_dict(sd)
dist.destroy_process_group()
print('equal')
'''

@pytest.mark.skipif(not torch.distributed.is_available() or sys.platform == 'win32', reason='needs torch.distributed with gloo')
def test_two_processes_equal_one(tmp_path):
    (tmp_path/'worker.py').write_text(WORKER)
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'GLOO_SOCKET_IFNAME': 'lo'}
    ps = [subprocess.Popen([sys.executable, str(tmp_path/'worker.py'), str(r), str(tmp_path/'store')], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env) for r in range(2)]
    for p in ps:
        try: out, err = p.communicate(timeout=180)
        finally: p.kill() if p.poll() is None else None
        assert p.returncode == 0 and 'equal' in out, err[-3000:]
