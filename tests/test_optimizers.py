"""Every optimizer of the book, in everything that a training loop may be: a plain loop, groups, schedulers, accumulation, saved states,
half precision, gradient scaling, fastai, transformers, sharded parameters. A new optimizer is one line in OPTIMIZERS."""
import copy, io, os, pickle, subprocess, sys, warnings
from dataclasses import dataclass, field
from pathlib import Path
import pytest, torch
from torch import nn
from torch.nn import functional as F
from paperbook.optim.lion import Lion, LionK, Huber, GroupL2, Nuclear
from paperbook.optim.frugal import Frugal
from paperbook.optim.gradnormlorp import GradNormLoRPAdamW
from paperbook.optim.sophia import Sophia, SophiaCallback, gnb_diagonal, hutchinson_diagonal, sophia_trainer_callback

def nothing(opt, model, batches, t): pass

def gnb(opt, model, batches, t):
    "Sophia's refresh on all micro-batches, with the same labels drawn whenever step and batch are the same"
    if t % 2 == 0: opt.update_hessian(gnb_diagonal(model, [x for x, _ in batches], generator=torch.Generator().manual_seed(t)))

def hutchinson(opt, model, batches, t):
    if t % 2 == 0:
        x, y = (torch.cat(o) for o in zip(*batches))
        opt.update_hessian(hutchinson_diagonal(F.cross_entropy(model(x), y), model.parameters(), generator=torch.Generator().manual_seed(t)))

@dataclass
class Case:
    name: str
    cls: type
    kw: dict                   # options of the optimizer
    before_step: object = nothing # (optimizer, model, [(x, y), ...], step): what the method does between backward and step
    fastai: object = list      # () -> callbacks of a Learner
    trainer: object = list     # () -> callbacks of a Trainer
    def __call__(self, params, **kw): return self.cls(params, **{**self.kw, **kw})

OPTIMIZERS = [
    Case('Lion', Lion, dict(lr=3e-3, weight_decay=.1)),
    Case('LionK-Huber', LionK, dict(lr=3e-3, weight_decay=.1, kappa=Huber(1e-3))),
    Case('LionK-rows', LionK, dict(lr=3e-3, weight_decay=.1, kappa=GroupL2(rescale=True))),
    Case('LionK-spectral', LionK, dict(lr=3e-3, weight_decay=.1, kappa=Nuclear(rescale=True))),
    Case('Sophia-G', Sophia, dict(lr=5e-3, rho=1., bias_correction=True), gnb, lambda: [SophiaCallback(k=2)], lambda: [sophia_trainer_callback(k=2)]),
    Case('Sophia-H', Sophia, dict(lr=5e-3, rho=1., weight_decay=.1), hutchinson, lambda: [SophiaCallback('hutchinson', k=2)],
         lambda: [sophia_trainer_callback(k=2, estimator='hutchinson')]),
    Case('Sophia-sign', Sophia, dict(lr=3e-3)),   # never given an estimate
    Case('Frugal-block', Frugal, dict(lr=5e-3, density=.5, update_gap=3, weight_decay=.1)),
    Case('Frugal-columns', Frugal, dict(lr=5e-3, density=.5, update_gap=3, projection='columns')),
    Case('Frugal-svd', Frugal, dict(lr=5e-3, density=.5, update_gap=3, projection='svd')),
    Case('GradNormLoRP', GradNormLoRPAdamW, dict(lr=1e-2, weight_decay=.1, rank=6, scale=2., update_proj_gap=4)),
    Case('GradNormLoRP-two', GradNormLoRPAdamW, dict(lr=1e-2, rank=3, scale=25., side='two', update_proj_gap=2)),
    Case('GradNormLoRP-8bit', GradNormLoRPAdamW, dict(lr=1e-2, weight_decay=.1, rank=6, scale=2., update_proj_gap=4, state_bits=8)),
]
each = pytest.mark.parametrize('case', OPTIMIZERS, ids=lambda c: c.name)
pytestmark = pytest.mark.filterwarnings('ignore:Sophia has no curvature', 'ignore:rank . is above')

def net(dtype=torch.float32): torch.manual_seed(0); return nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 4)).to(dtype)

def data(n=32, dtype=torch.float32):
    x = torch.randn(n, 8, generator=torch.Generator().manual_seed(1)).to(dtype)
    return x, x[:, :4].argmax(1)

def train(case, model, opt, steps=12, start=0, parts=1, each_step=None):
    "Losses of a plain loop in which every step accumulates `parts` micro-batches"
    x, y = data(dtype=next(model.parameters()).dtype)
    batches, losses = list(zip(x.chunk(parts), y.chunk(parts))), []
    for t in range(start, start+steps):
        opt.zero_grad()
        loss = sum(F.cross_entropy(model(a), b)/parts for a, b in batches)
        loss.backward()
        case.before_step(opt, model, batches, t)
        opt.step()
        if each_step: each_step(t)
        losses.append(loss.item())
    return losses

def equal(a, b, **tol):
    for p, q in zip(a.parameters(), b.parameters()): torch.testing.assert_close(p.detach(), q.detach(), **(tol or dict(rtol=0, atol=0)))

def two_groups(m):
    matrices, rest = ([p for p in m.parameters() if (p.ndim > 1) == k] for k in (True, False))
    return dict(params=matrices, lr=4e-3, weight_decay=.5), dict(params=rest, weight_decay=0.)

@each
def test_plain_loop_learns(case):
    m = net()
    losses = train(case, m, case(m.parameters()), 30)
    assert losses[-1] < losses[0]-.1

@each
def test_groups_are_optimizers_of_their_own(case):
    m, n = net(), net()
    train(case, m, case(two_groups(m)))
    class Both:
        opts = [case([g]) for g in two_groups(n)]
        def __getattr__(self, k): return lambda *a: [getattr(o, k)(*a) for o in self.opts]
    train(case, n, Both())
    equal(m, n)

@each
def test_a_group_added_later(case):
    m = net()
    opt = case(m[2].parameters())
    train(case, m, opt, 2)
    before = m[0].weight.detach().clone()
    opt.add_param_group(dict(params=list(m[0].parameters()), lr=1e-3))
    train(case, m, opt, 2)
    assert not torch.equal(before, m[0].weight)

@each
def test_schedulers(case):
    "A schedule is the same as setting the learning rate by hand; a learning rate of 0 moves nothing"
    m, n = net(), net()
    a, b = case(m.parameters()), case(n.parameters())
    base = a.param_groups[0]['lr']
    sched = torch.optim.lr_scheduler.LambdaLR(a, lambda t: min(t, 4)/4)
    start = [p.detach().clone() for p in m.parameters()]
    b.param_groups[0]['lr'] = 0.
    def by_hand(t): b.param_groups[0]['lr'] = base*min(t+1, 4)/4
    def by_sched(t):
        if t == 0: assert all(torch.equal(p, q) for p, q in zip(start, m.parameters()))
        sched.step()
    train(case, m, a, 8, each_step=by_sched); train(case, n, b, 8, each_step=by_hand)
    equal(m, n)
    m = net(); opt = case(m.parameters())
    one = torch.optim.lr_scheduler.OneCycleLR(opt, max_lr=3e-3, total_steps=8, cycle_momentum=True)   # moves β₁ too
    train(case, m, opt, 8, each_step=lambda t: one.step() if t < 7 else None)
    assert all(p.isfinite().all() for p in m.parameters())

@each
def test_gradient_accumulation(case):
    m, n = net(torch.float64), net(torch.float64)
    train(case, m, case(m.parameters()), parts=1); train(case, n, case(n.parameters()), parts=4)
    equal(m, n, rtol=1e-8, atol=1e-10)

@each
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_state_dict_goes_on_exactly(case, dtype):
    m = net(dtype); a = case(two_groups(m))
    train(case, m, a, 5)
    f = io.BytesIO(); torch.save(dict(model=m.state_dict(), opt=a.state_dict()), f); f.seek(0)
    saved = torch.load(f, weights_only=True)
    n = net(dtype); n.load_state_dict(saved['model'])
    b = case(two_groups(n)); b.load_state_dict(saved['opt'])
    train(case, m, a, 5, start=5); train(case, n, b, 5, start=5)
    equal(m, n)
    assert all(p.dtype == dtype for p in n.parameters())

@each
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision_parameters_learn(case, dtype):
    m = net(dtype)
    losses = train(case, m, case(m.parameters()), 30)
    assert losses[-1] < losses[0]-.05 and all(p.dtype == dtype and p.isfinite().all() for p in m.parameters())

@each
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_autocast_and_gradient_scaling(case, dtype):
    m = net(); opt, scaler = case(m.parameters()), torch.amp.GradScaler('cpu', init_scale=2.**10)
    (x, y), losses = data(), []
    for t in range(20):
        opt.zero_grad()
        with torch.autocast('cpu', dtype=dtype):
            loss = F.cross_entropy(m(x), y)
            case.before_step(opt, m, [(x, y)], t)
        scaler.scale(loss).backward(); scaler.step(opt); scaler.update(); losses.append(loss.item())
    assert losses[-1] < losses[0]-.05
    before = [p.detach().clone() for p in m.parameters()]
    for p in m.parameters(): p.grad = torch.full_like(p, torch.inf)
    scaler.step(opt); scaler.update()                                     # an overflow is skipped
    assert all(torch.equal(p, q) for p, q in zip(before, m.parameters()))

@each
def test_closure_copies_and_missing_gradients(case):
    m = net(); opt = case(m.parameters())
    train(case, m, opt, 3)
    m2, opt2 = copy.deepcopy((m, opt))
    train(case, m, opt, 3, start=3); train(case, m2, opt2, 3, start=3); equal(m, m2)
    assert len(pickle.loads(pickle.dumps(opt)).param_groups) == 1
    opt.zero_grad(); before = [p.detach().clone() for p in m.parameters()]
    opt.step(); assert all(torch.equal(p, q) for p, q in zip(before, m.parameters()))        # no gradient, no step
    x, y = data()
    def closure(): opt.zero_grad(); loss = F.cross_entropy(m(x), y); loss.backward(); return loss
    assert opt.step(closure).item() > 0 and not torch.equal(before[0], m[0].weight)

@each
def test_all_paths_agree(case):
    runs = []
    for kw in (dict(foreach=False, fused=False), dict(foreach=True), {}):
        m = net(torch.float64); train(case, m, case(m.parameters(), **kw)); runs.append(m)
    for m in runs[1:]: equal(runs[0], m, rtol=1e-9, atol=1e-11)

@each
def test_maximize_is_minimising_the_negative(case):
    p, q = (nn.Parameter(torch.linspace(-1, 1, 12, dtype=torch.float64).view(3, 4)) for _ in 'pq')
    a, b = case([p], maximize=True), case([q])
    for t in range(4):
        p.grad, q.grad = p.detach()-.3, .3-q.detach()
        a.step(); b.step()
    torch.testing.assert_close(p.detach(), q.detach())

@each
def test_fastai(case):
    from fastai.callback.training import GradientAccumulation
    import fastai.callback.schedule
    from paperbook.core.data import load
    from paperbook.core.training import learner
    torch.manual_seed(0)
    learn = learner(load('digits'), nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10)), case.cls, cbs=[*case.fastai(), GradientAccumulation(128)],
                    **{k: v for k, v in case.kw.items() if k != 'lr'})
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(3, 2e-2, wd=.01)
    values = learn.recorder.values
    assert values[-1][1] < 1.5 and isinstance(learn.opt.opt, case.cls) and learn.opt.opt.param_groups[0]['weight_decay'] == .01

@each
def test_fastai_finds_a_learning_rate(case):
    import fastai.callback.schedule
    from paperbook.core.data import load
    from paperbook.core.training import learner
    torch.manual_seed(0)
    learn = learner(load('digits'), nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), case.cls, cbs=case.fastai(), **{k: v for k, v in case.kw.items() if k != 'lr'})
    before = learn.model[1].weight.detach().clone()
    with learn.no_bar(), learn.no_logging(): learn.lr_find(end_lr=5, num_it=15, show_plot=False)
    assert torch.equal(before, learn.model[1].weight)
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(1, 1e-2)
    assert learn.recorder.values[-1][1] < 2

@each
def test_transformers(case, tmp_path):
    pytest.importorskip('accelerate')
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, attn_implementation='eager'))
    ids = torch.arange(12).repeat(32, 1)+torch.randint(20, (32, 1), generator=torch.Generator().manual_seed(0))      # counting
    args = TrainingArguments(str(tmp_path), max_steps=10, per_device_train_batch_size=4, gradient_accumulation_steps=2, report_to=[], use_cpu=True, disable_tqdm=True,
                             logging_steps=1, save_steps=5)
    opt = case(model.parameters(), lr=1e-2)
    trainer = Trainer(model, args, train_dataset=[dict(input_ids=i, labels=i) for i in ids], optimizers=(opt, None), callbacks=case.trainer())
    trainer.train()
    losses = [o['loss'] for o in trainer.state.log_history if 'loss' in o]
    assert losses[-1] < losses[0]-.2
    if case.trainer(): assert all(s['refreshes'] == 5 for s in opt.state.values())
    saved = torch.load(tmp_path/'checkpoint-10'/'optimizer.pt', weights_only=True)       # what a resumed run reads
    case(model.parameters()).load_state_dict(saved)

WORKER = '''
import sys, warnings, torch, torch.distributed as dist
warnings.simplefilter('ignore')
sys.path.insert(0, sys.argv[3])
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_tensor, Shard, Replicate
from torch.distributed.fsdp import fully_shard
import test_optimizers as T
from paperbook.optim import sophia
rank, store = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
dist.init_process_group('gloo', init_method=f'file://{store}', rank=rank, world_size=2)
mesh = init_device_mesh('cpu', (2,))
sophia._sample = lambda p, generator=None: p.argmax(1)       # the same labels in one process and in two
for case in T.OPTIMIZERS:
    for place in ([Shard(0)], [Replicate()]):
        g = torch.Generator().manual_seed(0)
        rand = lambda x: torch.randn(x.shape, generator=g, dtype=torch.float64)
        xs = [torch.randn(s, generator=g, dtype=torch.float64) for s in ((6, 4), (5,), (3, 2), (1, 4))]   # 5 and 3 don't divide by 2; of 1 the second process has nothing
        one = [torch.nn.Parameter(x.clone()) for x in xs]
        two = [torch.nn.Parameter(distribute_tensor(x.clone(), mesh, place)) for x in xs]
        a, b = case(one), case(two)
        for t in range(3):
            grads, ests = [rand(x) for x in xs], [rand(x) for x in xs]
            if hasattr(a, 'update_hessian'): a.update_hessian(ests); b.update_hessian([distribute_tensor(e.clone(), mesh, place) for e in ests])
            for p, q, d in zip(one, two, grads): p.grad, q.grad = d.clone(), distribute_tensor(d.clone(), mesh, place)
            a.step(); b.step()
        for p, q in zip(one, two):
            assert q.placements == tuple(place)
            assert (q.full_tensor()-p).abs().max() < 1e-10, (case.name, place)
        if hasattr(a, 'update_hessian'): b.update_hessian(ests); a.update_hessian(ests)                 # whole estimates are sharded
        if hasattr(a, 'win_rate'): assert a.win_rate() == b.win_rate(), case.name
    one, two = T.net(torch.float64), fully_shard(T.net(torch.float64), mesh=mesh)
    a, b = case(one.parameters()), case(two.parameters())
    x, y = T.data(dtype=torch.float64)
    mine = x.chunk(2)[rank], y.chunk(2)[rank]
    hook = T.nothing if case.before_step is T.hutchinson else case.before_step          # FSDP has no second derivative
    for t in range(4):
        for m, o, batch in ((one, a, (x, y)), (two, b, mine)):
            o.zero_grad(); torch.nn.functional.cross_entropy(m(batch[0]), batch[1]).backward(); hook(o, m, [batch], t); o.step()
    for p, q in zip(one.parameters(), two.parameters()): assert (q.full_tensor()-p).abs().max() < 1e-9, case.name
    saved = b.state_dict(); b.load_state_dict(saved)
    for p, q in zip(one.parameters(), two.parameters()):
        if 'exp_avg' in a.state.get(p, {}): assert (b.state[q]['exp_avg'].full_tensor()-a.state[p]['exp_avg']).abs().max() < 1e-9, case.name
dist.destroy_process_group()
print('equal')
'''

@pytest.mark.skipif(not torch.distributed.is_available() or sys.platform == 'win32', reason='needs torch.distributed with gloo')
def test_two_processes_equal_one(tmp_path):
    (tmp_path/'worker.py').write_text(WORKER)
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'GLOO_SOCKET_IFNAME': 'lo'}
    ps = [subprocess.Popen([sys.executable, str(tmp_path/'worker.py'), str(r), str(tmp_path/'store'), str(Path(__file__).parent)],
                           stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env) for r in range(2)]
    for p in ps:
        try: out, err = p.communicate(timeout=180)
        finally: p.kill() if p.poll() is None else None
        assert p.returncode == 0 and 'equal' in out, err[-3000:]
