"Lion against lion-pytorch and a reference in NumPy; in transformers, fastai, schedulers, and mixed precision"
import copy, io, math
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from paperbook.optim.lion import Lion, LionK, L1, Huber, LogCosh, Nuclear, GroupL2, Power

PATHS = [dict(foreach=False, fused=False), dict(foreach=True), dict(fused=True)]

def reference(xs, grads, lr, betas, wd, decay='explicit'):
    "Lion in NumPy, float64, with the momentum of the negative gradient as the paper has it"
    xs, (b1, b2) = [np.array(x.tolist(), dtype=np.float64).reshape(x.shape) for x in xs], betas
    ms = [np.zeros_like(x) for x in xs]
    for gs in grads:
        for i, g in enumerate(map(np.asarray, gs)):
            v = np.sign(b1*ms[i] - (1-b1)*g)
            ms[i] = b2*ms[i] - (1-b2)*g
            xs[i] = xs[i] + lr*(v - wd*xs[i]) if decay == 'explicit' else (xs[i] + lr*v)/(1+lr*wd)
    return xs

shape = st.lists(st.integers(0, 5), max_size=4).map(tuple)
cases = given(shapes=st.lists(shape, min_size=1, max_size=4), seed=st.integers(0, 999), lr=st.floats(1e-4, .1), wd=st.floats(0, 5),
              betas=st.tuples(st.floats(0, .99), st.floats(0, .99)), path=st.sampled_from(PATHS), decay=st.sampled_from(['explicit', 'implicit']))

def trial(shapes, seed, steps=4, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=g).to(dtype) for s in shapes], [[torch.randn(s, generator=g).to(dtype) for s in shapes] for _ in range(steps)]

def train(make, xs, grads):
    ps = [torch.nn.Parameter(x.clone()) for x in xs]
    opt = make(ps)
    for gs in grads:
        for p, g in zip(ps, gs): p.grad = g.clone()
        opt.step()
    return [p.detach() for p in ps]

@settings(max_examples=60, deadline=None)
@cases
def test_equals_the_reference(shapes, seed, lr, wd, betas, path, decay):
    xs, grads = trial(shapes, seed)
    got = train(lambda ps: Lion(ps, lr=lr, betas=betas, weight_decay=wd, decay=decay, **path), xs, grads)
    for a, b in zip(got, reference(xs, grads, lr, betas, wd, decay)): np.testing.assert_allclose(a.numpy(), b, atol=1e-12)

@settings(max_examples=30, deadline=None)
@given(shapes=st.lists(shape, min_size=1, max_size=4), seed=st.integers(0, 999), path=st.sampled_from(PATHS))
def test_equals_lion_pytorch(shapes, seed, path):
    peer = pytest.importorskip('lion_pytorch').Lion
    xs, grads = trial(shapes, seed)
    kw = dict(lr=.01, betas=(.9, .99), weight_decay=.3)
    for a, b in zip(train(lambda ps: Lion(ps, **kw, **path), xs, grads), train(lambda ps: peer(ps, **kw), xs, grads)): torch.testing.assert_close(a, b, atol=1e-12, rtol=0)

@pytest.mark.parametrize('path', PATHS)
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(path, dtype):
    "Gradients away from the sign's jump, so that rounding can't flip a step; four steps round at most twice each, by half an eps"
    xs, grads = trial([(7, 5), (3,)], 0, dtype=dtype)
    grads = [[g.abs()+1 for g in grads[0]]]*4
    got = train(lambda ps: Lion(ps, lr=.01, weight_decay=1., **path), xs, grads)
    for a, b in zip(got, reference(xs, [[g.double().numpy() for g in gs] for gs in grads], .01, (.9, .99), 1.)):
        assert a.dtype == dtype and np.abs(a.double().numpy()-b).max() <= 4*torch.finfo(dtype).eps*np.abs(b).max()+1e-6

@pytest.mark.parametrize('path', PATHS)
def test_groups_missing_gradients_and_scalars(path):
    a, b, c, d = (torch.nn.Parameter(torch.ones(s)) for s in ((3,), (2, 2), (), (0,)))
    opt = Lion([dict(params=[a, c, d], lr=.1), dict(params=[b], weight_decay=2., betas=(.5, .5))], lr=.2, **path)
    a.grad, c.grad, d.grad = torch.ones(3), torch.tensor(-1.), torch.zeros(0)
    opt.step()
    assert torch.allclose(a, torch.full((3,), .9)) and torch.allclose(c, torch.tensor(1.1)) and torch.equal(b, torch.ones(2, 2))
    assert opt.radius == [math.inf, .5]

@pytest.mark.parametrize('path', PATHS)
def test_state_dict_round_trip_goes_on_exactly(path):
    xs, grads = trial([(4, 3), (2,)], 1, steps=6, dtype=torch.float32)
    kappas = (Huber(.1), LogCosh(.2)) if path.get('fused') else (Huber(.1), GroupL2())
    def groups(ps): return [dict(params=[ps[0]], kappa=kappas[0], weight_decay=1.), dict(params=[ps[1]], kappa=kappas[1])]
    make = lambda ps: LionK(groups(ps), lr=.01, **path)
    want = train(make, xs, grads)
    ps = [torch.nn.Parameter(x.clone()) for x in xs]
    opt = make(ps)
    for i, gs in enumerate(grads):
        if i == 3:
            f = io.BytesIO(); torch.save(opt.state_dict(), f); f.seek(0)
            opt = make(ps); opt.load_state_dict(torch.load(f, weights_only=True))
        for p, g in zip(ps, gs): p.grad = g.clone()
        opt.step()
    for a, b in zip(ps, want): assert torch.equal(a.detach(), b)

def test_scheduler_and_closure():
    p = torch.nn.Parameter(torch.tensor([4.]))
    opt = Lion([p], lr=.1); sched = torch.optim.lr_scheduler.CosineAnnealingLR(opt, 50)
    def closure(): opt.zero_grad(); loss = (p**2).sum(); loss.backward(); return loss
    first = opt.step(closure)
    for _ in range(49): sched.step(); last = opt.step(closure)
    assert first == 16. and last < first

@pytest.mark.parametrize('kw, why', [(dict(lr=0.), 'lr'), (dict(lr=-1.), 'lr'), (dict(betas=(1., .9)), 'betas'), (dict(betas=(.9, -.1)), 'betas'), (dict(weight_decay=-1.), 'weight_decay'),
                                     (dict(decay='both'), 'decay'), (dict(lr=.5, weight_decay=3.), 'overshoot')])
def test_bad_options(kw, why):
    with pytest.raises(ValueError, match=why): Lion([torch.nn.Parameter(torch.ones(1))], **kw)

def test_bad_gradients_change_nothing():
    p, e = torch.nn.Parameter(torch.ones(2)), torch.nn.Embedding(3, 2, sparse=True)
    opt = Lion([p, *e.parameters()], lr=.1)
    p.grad = torch.ones(2); e(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match='dense'): opt.step()
    assert torch.equal(p.detach(), torch.ones(2))

def test_without_a_compiler_the_numbers_are_the_same(monkeypatch):
    xs, grads = trial([(40, 30)], 3, dtype=torch.float32)
    make = lambda ps: Lion(ps, lr=.01, weight_decay=1., fused=True)
    want = train(make, xs, grads)
    monkeypatch.setenv('CC', 'no-such-compiler')
    torch.testing.assert_close(train(make, xs, grads), want, atol=1e-6, rtol=0)

def tiny_llama():
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4))

@pytest.mark.parametrize('kappa', [L1(), Huber(.01), Nuclear(rescale=True)])
def test_a_transformers_model_learns(kappa):
    model, ids = tiny_llama(), torch.randint(0, 64, (4, 16), generator=torch.Generator().manual_seed(0))
    opt = LionK(model.parameters(), lr=3e-3, betas=(.95, .98), weight_decay=.1, kappa=kappa)
    losses = []
    for _ in range(15):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward(); opt.step(); opt.zero_grad(); losses.append(loss.item())
    assert losses[-1] < losses[0]-.2

def test_transformers_trainer(tmp_path):
    pytest.importorskip('accelerate')
    from transformers import Trainer, TrainingArguments
    model, ids = tiny_llama(), torch.randint(0, 64, (8, 16))
    args = TrainingArguments(str(tmp_path), max_steps=3, per_device_train_batch_size=4, report_to=[], use_cpu=True, disable_tqdm=True)
    opt = Lion(model.parameters(), lr=1e-3)
    before = model.lm_head.weight.detach().clone()
    Trainer(model, args, train_dataset=[dict(input_ids=i, labels=i) for i in ids], optimizers=(opt, torch.optim.lr_scheduler.ConstantLR(opt))).train()
    assert not torch.equal(before, model.lm_head.weight)

def test_fastai_learner_with_the_monitor():
    from fastai.callback.progress import ProgressCallback
    from paperbook.core.data import load
    from paperbook.core.models import MLP
    from paperbook.core.training import learner
    from paperbook.optim.lion import ConstraintMonitor
    torch.manual_seed(0)
    mon = ConstraintMonitor()
    model = MLP([64, 32, 10])
    top = lambda: max(p.abs().max().item() for p in model.parameters())
    learn, start = learner(load('digits'), model, Lion, lr=3e-3, weight_decay=10., cbs=mon), top()
    with learn.no_bar(), learn.no_logging(): learn.fit(12)
    steps = 12*len(learn.dls.train)
    assert top()-.1 <= (start-.1)*(1-.03)**steps+1e-6 and len(mon.log) == -(-steps//10)   # the violation dies at least as fast as the theorem says
    assert copy.deepcopy(learn.opt.opt).radius == [pytest.approx(.1)]

def test_lr_find_of_fastai():
    "It tries rates up to 10: explicit decay refuses those that overshoot, a smaller end or implicit decay goes through"
    from functools import partial
    from fastai.learner import Learner
    from fastai.optimizer import OptimWrapper
    import fastai.callback.schedule
    from paperbook.core.data import load
    from paperbook.core.models import MLP
    def find(end, **kw):
        learn = Learner(load('digits').dls(), MLP([64, 32, 10]), loss_func=torch.nn.functional.cross_entropy, opt_func=partial(OptimWrapper, opt=Lion, weight_decay=1., **kw))
        with learn.no_bar(), learn.no_logging(): learn.lr_find(end_lr=end, num_it=20, show_plot=False)
    with pytest.raises(ValueError, match='overshoot'): find(10)
    find(.5); find(10, decay='implicit')
