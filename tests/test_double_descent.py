"Double descent against loops in torch, NumPy and scikit-learn; in fastai and transformers; its statistics on made-up tables; bad input"
import math, random, warnings
import numpy as np, pandas as pd, pytest, torch
from hypothesis import given, settings, strategies as st
from torch import nn
from paperbook.generalization.double_descent import *
from paperbook.generalization.double_descent import _sgd_gram, _svd

warnings.filterwarnings('ignore', category=FutureWarning)
inf = math.inf
size = st.integers(1, 12)

def problem(N, P, K, seed, spread=0.):
    "Features whose columns shrink by `spread` decades, and targets"
    g = torch.Generator().manual_seed(seed)
    r = lambda *s: torch.randn(*s, generator=g, dtype=torch.float64)
    return r(N, P)*torch.logspace(0, -spread, P, dtype=torch.float64), r(N, K), r(P, K)

def descend(Z, Y, steps, lr, momentum, W):
    W, v = W.clone().requires_grad_(), torch.zeros_like(W)
    opt = torch.optim.SGD([W], lr=lr, momentum=momentum)
    for _ in range(steps): opt.zero_grad(); ((Z@W-Y)**2).sum().div(2*len(Z)).backward(); opt.step()
    return W.detach()

@settings(max_examples=40, deadline=None)
@given(N=size, P=size, K=st.integers(1, 3), seed=st.integers(0, 999), rate=st.floats(.01, 1.95), momentum=st.sampled_from([0., .5, .95]), start=st.booleans(), steps=st.integers(0, 40))
def test_the_path_equals_torch_optim(N, P, K, seed, rate, momentum, start, steps):
    Z, Y, W0 = problem(N, P, K, seed)
    lr = rate*N/float(torch.linalg.matrix_norm(Z, 2))**2
    want = descend(Z, Y, steps, lr, momentum, W0 if start else torch.zeros_like(W0))
    torch.testing.assert_close(gd_path(Z, Y, [steps], lr, momentum, W0 if start else None)[0], want, atol=1e-8, rtol=1e-7)
    ls = LeastSquares(Z, Y, W0 if start else None)
    assert ls.loss(steps, lr, momentum) == pytest.approx(float((Z@want-Y).square().sum()/(2*N)), rel=1e-6, abs=1e-9)

@settings(max_examples=60, deadline=None)
@given(N=size, P=size, K=st.integers(1, 3), seed=st.integers(0, 999), copies=st.integers(0, 2), flat=st.booleans())
def test_min_norm_equals_pinv(N, P, K, seed, copies, flat):
    "Also with columns that are twins, or zero"
    Z, Y, _ = problem(N, P, K, seed)
    Z = torch.cat([Z]+[Z]*copies+[Z[:, :1]*0], 1)
    Y = Y[:, 0] if flat else Y
    want = np.linalg.pinv(Z.numpy(), rcond=1e-12)@Y.numpy()
    W = min_norm(Z, Y, rcond=1e-12)
    assert W.shape == want.shape
    np.testing.assert_allclose(W.numpy(), want, atol=1e-6*(1+np.abs(want).max()))

@pytest.mark.parametrize('P', [20, 60, 200])
def test_min_norm_equals_scikit_learn(P):
    from sklearn.linear_model import LinearRegression, Ridge
    Z, Y, _ = problem(60, P, 4, 3)
    W = min_norm(Z, Y).numpy()
    np.testing.assert_allclose(W, LinearRegression(fit_intercept=False).fit(Z.numpy(), Y.numpy()).coef_.T, atol=1e-6*np.abs(W).max())
    if P != 60: np.testing.assert_allclose(W, Ridge(1e-10, solver='svd', fit_intercept=False).fit(Z.numpy(), Y.numpy()).coef_.T, atol=1e-6)

@settings(max_examples=60, deadline=None)
@given(N=size, P=size, seed=st.integers(0, 999), spread=st.floats(0, 8))
def test_svd_route_never_loses_small_modes(N, P, seed, spread):
    Z = problem(N, P, 1, seed, spread)[0]
    U, s, Vh = _svd(Z)
    torch.testing.assert_close(s, torch.linalg.svdvals(Z), rtol=1e-7, atol=1e-13)
    torch.testing.assert_close(U*s@Vh, Z, rtol=0, atol=1e-12)
    torch.testing.assert_close(Vh@Vh.T, torch.eye(len(s), dtype=torch.float64), rtol=0, atol=1e-8)

@settings(max_examples=30, deadline=None)
@given(N=st.integers(2, 12), P=size, B=st.integers(1, 12), seed=st.integers(0, 999), momentum=st.sampled_from([0., .8]), epochs=st.integers(0, 6))
def test_gram_sgd_equals_torch_optim(N, P, B, seed, momentum, epochs):
    Z, Y, W0 = problem(N, P, 2, seed)
    B, lr = min(B, N), .05
    A = _sgd_gram((Z@Z.T)[None], Y[None], epochs, torch.tensor([lr], dtype=torch.float64), B, momentum, [seed])[0]
    W, g = torch.zeros_like(W0).requires_grad_(), torch.Generator().manual_seed(seed)
    opt = torch.optim.SGD([W], lr=lr, momentum=momentum)
    for _ in range(epochs):
        order = torch.randperm(N, generator=g) if B < N else torch.arange(N)
        for i in order.split(B): opt.zero_grad(); ((Z[i]@W-Y[i])**2).sum().div(2*len(i)).backward(); opt.step()
    torch.testing.assert_close(Z.T@A, W.detach(), atol=1e-8, rtol=1e-7)
    torch.testing.assert_close(train_linear(Z[None], Y[None], epochs, lr, 'sgd', B, momentum, seeds=[seed])[0, 0], W.detach(), atol=1e-8, rtol=1e-7)

@settings(max_examples=15, deadline=None)
@given(N=st.integers(2, 9), P=st.integers(1, 25), L=st.integers(1, 3), seed=st.integers(0, 999), B=st.sampled_from([None, 2]))
def test_adam_equals_torch_optim_on_both_sides_of_2N(N, P, L, seed, B):
    Z, Y, W0 = problem(N, P, 2, seed)
    rates = [.01*(k+1) for k in range(L)]
    many = train_linear(Z[None], Y[None], 5, rates, 'adam', B, seeds=[seed])[0]
    for lr, got in zip(rates, many):
        W, g = torch.zeros_like(W0).requires_grad_(), torch.Generator().manual_seed(seed)
        opt = torch.optim.Adam([W], lr=lr)
        for _ in range(5):
            order = torch.randperm(N, generator=g) if B and B < N else torch.arange(N)
            for i in order.split(B or N): opt.zero_grad(); ((Z[i]@W-Y[i])**2).sum().div(2*len(i)).backward(); opt.step()
        torch.testing.assert_close(got, W.detach(), atol=1e-7, rtol=1e-5)

@settings(max_examples=40, deadline=None)
@given(N=size, P=size, seed=st.integers(0, 999), rate=st.floats(.01, 1.95), t=st.integers(1, 10**6))
def test_bounds(N, P, seed, rate, t):
    Z, Y, W = problem(N, P, 2, seed, 2.)
    ls = LeastSquares(Z, Y)
    lr = rate/ls.lam_max
    assert gd_path(Z, Y, t, lr).norm() <= gd_norm_bound(Y, N, lr, t, ls.lam_max)*(1+1e-9)
    for V in (W, gd_path(Z, Y, t, lr)[0], min_norm(Z, Y)):
        low, actual = interpolation_lower_bound(Z, Y, V)
        assert low <= actual*(1+1e-6)+1e-9
    assert forced_loss(Z, Y, 1.) == pytest.approx(ls.floor) and forced_loss(Z, Y, .1) >= forced_loss(Z, Y, .9)

# ---- numerics and bad input
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_low_precision_warns_where_it_matters_and_computes_in_float64(dtype):
    Z = torch.diag(torch.tensor([1., 2.**-21])).to(dtype)
    with pytest.warns(UserWarning, match='float64'): ls = LeastSquares(Z, torch.ones(2))
    assert ls.weights().dtype == torch.float64 and ls.kappa == 2.**21
    with pytest.warns(UserWarning, match='float64'): condition_number(Z)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        LeastSquares(torch.eye(3, dtype=dtype), torch.ones(3)); condition_number(torch.eye(3, dtype=dtype)); LeastSquares(Z.double(), torch.ones(2))

def test_long_horizons_neither_overflow_nor_stall():
    Z = torch.diag(torch.logspace(0, -7, 8, dtype=torch.float64))
    ls = LeastSquares(Z, torch.ones(8))
    losses = [ls.loss(10**k) for k in range(0, 19, 2)]+[ls.loss()]
    assert all(a >= b for a, b in zip(losses, losses[1:])) and losses[-1] < 1e-25 and losses[-2] < 1e-6
    assert ls.loss(10**6, 1.9/ls.lam_max) < ls.loss(10**6)
    assert ls.weights(10**9, momentum=.9).isfinite().all()

def test_arrays_lists_and_single_numbers():
    assert torch.equal(min_norm(np.eye(2), [1., 2.]), torch.tensor([1., 2.], dtype=torch.float64))
    assert min_norm(torch.ones(1, 1), torch.tensor([3])).tolist() == [3.] and gd_path([[2.]], [[4.]], inf).tolist() == [[[2.]]]
    assert float(condition_number(np.diag([3, 1]))) == 3.

one, eye = torch.ones(3), torch.eye(3)
@pytest.mark.parametrize('call, why', [
    (lambda: min_norm(torch.ones(3, 0), one), 'not empty'), (lambda: min_norm(torch.ones(0, 3), torch.ones(0)), 'not empty'), (lambda: min_norm(one, one), '2-D'),
    (lambda: min_norm(eye*math.nan, one), 'NaN'), (lambda: min_norm(eye, one*inf), 'infinite'), (lambda: min_norm(eye, torch.ones(2)), 'rows'),
    (lambda: gd_path(eye, one, [5], lr=100.), 'diverges'), (lambda: gd_path(eye, one, [5], lr=0.), 'positive'), (lambda: gd_path(eye, one, [5], lr=math.nan), 'positive'),
    (lambda: gd_path(eye, one, [5], momentum=1.), 'momentum'), (lambda: gd_path(eye, one, [5], momentum=-.1), 'momentum'), (lambda: gd_path(eye, one, [-1]), 'whole'),
    (lambda: gd_path(eye, one, []), 'at least one'), (lambda: gd_path(eye, one, [1], W0=torch.ones(2)), 'W0'), (lambda: RandomFeatures(0, 3), 'at least 1'),
    (lambda: RandomFeatures(3, 3, scale=0), 'positive'), (lambda: RandomFeatures(3, 3, scale=math.nan), 'positive'), (lambda: RandomFeatures(3, 3)(one), '2-D'),
    (lambda: RandomFeatures(3, 3)(torch.ones(0, 3)), 'not empty'), (lambda: condition_number(torch.ones(2, 0)), 'not empty'), (lambda: BatchedMLP(3, [2.5, 0], 1), 'at least 1'),
    (lambda: train_linear(eye, eye, 1, .1), '3-D'), (lambda: train_linear(eye[None], eye[None], 1, [[.1], [.1]]), 'lr'), (lambda: train_linear(eye[None], eye[None], -1, .1), 'epochs'),
    (lambda: sweep_random_features(dict(a=Solver()), [0], []), 'sizes'), (lambda: sweep_random_features(dict(a=Solver()), [0], [3, -1]), 'sizes'),
    (lambda: sweep_random_features(dict(a=Solver()), [], [3]), 'seed'), (lambda: noisy_digits(0, noise=math.nan), 'noise')])
def test_bad_input(call, why):
    with pytest.raises(ValueError, match=why): call()

def test_bad_options_are_refused_before_training():
    net = BatchedMLP(4, [3], 2)
    before = [p.detach().clone() for p in net.parameters()]
    for kw in (dict(optimizer='lion'), dict(batch_size=0), dict(momentum=1.), dict(lr=-1.), dict(epochs=1.5)):
        with pytest.raises(ValueError): train_mlps(net, torch.ones(5, 4), torch.ones(5, 2), **{**dict(epochs=3, lr=.1), **kw})
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters()))

# ---- features, sweeps, statistics
def test_features_nest_move_and_reload():
    x = noisy_digits(11).x
    for norm in (None, 'center', 'standard', 'features'):
        rf = RandomFeatures(64, 40, 'relu', normalize=norm, seed=4).fit(x)
        small = rf.truncate(7)
        torch.testing.assert_close(small(x)*7**.5, rf(x)[:, :7]*40**.5)
        again = RandomFeatures(64, 40, 'relu', normalize=norm, seed=5)
        again.load_state_dict(rf.state_dict())
        assert torch.equal(again(x), rf(x)) and rf.to(torch.float32)(x).dtype == torch.float32
    const = torch.ones(6, 64)
    assert RandomFeatures(64, 5, normalize='standard').fit(const)(const).abs().max() == 0      # constant columns: no division by zero

def test_sweeps_do_not_depend_on_order_company_or_repeats():
    data = lambda s: noisy_digits(s, 30, 20, 80)
    runs = dict(exact=Solver(inf), sgd=Solver(10, .2, batch_size=7, momentum=.5), adam=Solver(10, .05, 'adam'), mini=Solver(10, .05, 'adam', batch_size=7))
    many = sweep_random_features(runs, (12, 11), (40, 10, 30, 10), data)
    assert many['size'].tolist() == [10, 30, 40]*8
    for r in sweep_random_features(dict(list(runs.items())[1:]), [11], [10, 40], data).itertuples():
        w = many[(many.solver == r.solver) & (many.seed == 11) & (many['size'] == r.size)]
        assert w.test_loss.item() == pytest.approx(r.test_loss, rel=1e-7) and w.train_loss.item() == pytest.approx(r.train_loss, rel=1e-7)
    nets = dict(epochs=6, lr=.01, optimizer='adam', batch_size=9, data=data)
    both, alone = sweep_mlp(seeds=(12, 11), widths=(9, 4, 4), **nets), sweep_mlp(seeds=[11], widths=[4], **nets)
    assert both['size'].tolist() == [4, 9, 4, 9]
    assert both[(both.seed == 11) & (both['size'] == 4)].test_loss.item() == pytest.approx(alone.test_loss.item(), rel=1e-5)

def test_peak_height_against_its_definition():
    rng = np.random.default_rng(5)
    df = pd.DataFrame([dict(seed=s, size=n, test_loss=float(np.exp(rng.normal()))) for s in range(6) for n in (400, 10, 90, 100, 120, 50)])
    p = peak_height(df.sample(frac=1, random_state=0), 100)
    t = df.pivot(index='seed', columns='size', values='test_loss')
    R, rise = np.log(t[[90, 100, 120]].max(axis=1)/t[400]), np.log(t[[90, 100, 120]].max(axis=1)/t[[10, 50]].min(axis=1))
    assert (p.height, p.rise) == (pytest.approx(np.exp(R.mean())), pytest.approx(np.exp(rise.mean()))) and p.low < p.height < p.high
    from scipy.stats import t as student
    assert p.high == pytest.approx(np.exp(R.mean()+student.ppf(.975, 5)*R.std(ddof=1)/6**.5))
    q = peak_height(df[df.seed == 0], 100)
    assert q.low == 0 and q.high == inf and not q.there          # one seed tells nothing

def cells(n_seeds, noise, factors=6, levels=5, seed=0):
    "Cells on one curve R(loss), with noise in log R; a peak where R > 1.5"
    rng = np.random.default_rng(seed)
    rows = []
    for f in range(factors):
        for l, loss in enumerate(np.logspace(-4, 0, levels)*10**rng.uniform(-.3, .3)):
            for s in range(n_seeds):
                R = max(1.01, .05/loss)*math.exp(noise*rng.normal())
                rows.append(dict(factor=str(f), level=l, seed=s, train_loss=loss, kappa=10.+f, R=R, rise=R/1.5))
    return pd.DataFrame(rows)

def test_joint_statistics_tell_a_curve_from_a_cloud():
    curve = cells(5, .01)
    loss = curve.groupby(['factor', 'level']).train_loss.first()
    mixed = dict(zip(loss.index, np.random.default_rng(1).permutation(loss)))
    cloud = curve.assign(train_loss=[mixed[k] for k in zip(curve.factor, curve.level)])          # each cell with the loss of another
    for s in range(5):
        a, b = (joint_statistics(c[c.seed == s]) for c in (curve, cloud))
        assert a['spearman'] < -.9 and a['auc'] == 1 and a['if_low'] > .9 and a['only_if'] > .9
        assert abs(b['spearman']) < .6 and b['auc'] < .85 and min(b['if_low'], b['only_if']) < .9
    v, lo, hi = bootstrap_joint(curve, 100)['spearman']
    assert lo <= v <= hi < -.9 and bootstrap_joint(cloud, 100)['spearman'][2] > -.9

def test_joint_statistics_catch_each_direction_by_itself():
    c = cells(1, 0.)
    flat = c.assign(R=np.where((c.factor == '0'), 1.01, c.R), rise=np.where(c.factor == '0', .7, c.rise))         # low loss, no peak
    high = c.assign(R=np.where((c.factor == '0') & (c.train_loss > .1), 9., c.R), rise=np.where((c.factor == '0') & (c.train_loss > .1), 6., c.rise))   # a peak, high loss
    a, b, ok = map(joint_statistics, (flat, high, c))
    assert ok['if_low'] == ok['only_if'] == 1
    assert a['if_low'] < .9 and a['only_if'] > .9 and b['only_if'] < .95 and b['if_low'] > .9

def test_seeds_that_the_notebook_does_not_use():
    df = sweep_random_features(dict(exact=Solver(inf), early=Solver(100)), (31, 32, 33), (50, 160, 200, 250, 1000))
    exact, early = (peak_height(df[df.solver == n], 200) for n in ('exact', 'early'))
    assert exact.there and exact.low > 5 and exact.at == 200 and not early.there and early.high < 1.6
    kappa = df[df.solver == 'exact'].groupby('size').kappa.mean()
    assert kappa.idxmax() == 200

# ---- other people's models
def test_callback_watches_and_does_not_touch():
    import fastai.callback.progress
    from fastai.callback.core import Callback
    from paperbook.core.data import load
    from paperbook.core.training import learner
    def run(watch):
        random.seed(0); torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout(.1), nn.Linear(16, 10))
        net[1].eval()
        modes = []
        class Modes(Callback):
            order = 95
            def after_epoch(self): modes.append([m.training for m in self.model.modules()])
        cb = ConditionNumberCallback(net[6]) if watch else None
        learn = learner(load('digits'), net, torch.optim.SGD, lr=.05, cbs=[Modes()]+([cb] if cb else []))
        torch.manual_seed(1)
        with learn.no_bar(), learn.no_logging(): learn.fit(2)
        return [p.detach().clone() for p in net.parameters()], modes, cb
    (a, ma, _), (b, mb, cb) = run(False), run(True)
    assert all(torch.equal(x, y) for x, y in zip(a, b)) and ma == mb
    assert len(cb.kappas) == len(cb.losses) == 2 and all(1 < k < inf for k in cb.kappas)
    cb.learn = None

def test_callback_says_when_the_layer_is_not_used():
    import fastai.callback.progress
    from paperbook.core.data import load
    from paperbook.core.training import learner
    learn = learner(load('digits'), nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), torch.optim.SGD, cbs=ConditionNumberCallback(nn.Linear(2, 2)))
    with learn.no_bar(), learn.no_logging(), pytest.raises(ValueError, match="doesn't use this layer"): learn.fit(1)

def one_row_at_a_time(model, ids):
    "The Jacobian by ordinary backpropagation, an output after the other"
    ps, out = [p for p in model.parameters() if p.requires_grad], model(input_ids=ids).logits.flatten()
    return torch.stack([torch.cat([g.flatten() for g in torch.autograd.grad(o, ps, retain_graph=True)]) for o in out])

@pytest.mark.parametrize('name', ['bert', 'llama'])
def test_jacobian_of_a_transformers_model(name):
    from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM
    torch.manual_seed(0)
    small = dict(vocab_size=12, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    model = BertForSequenceClassification(BertConfig(**small, max_position_embeddings=8)) if name == 'bert' else LlamaForCausalLM(LlamaConfig(**small, tie_word_embeddings=True))
    ids = torch.randint(12, (2, 4))
    model.train()
    s = jacobian_spectrum(model, ids)
    assert model.training and s.dtype == torch.float64 and s.isfinite().all() and len(s) == (4 if name == 'bert' else 2*4*12)
    torch.testing.assert_close(jacobian_spectrum(model, dict(input_ids=ids, attention_mask=torch.ones_like(ids))), s, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(s, torch.linalg.svdvals(one_row_at_a_time(model.double().eval(), ids)), rtol=1e-4, atol=1e-5*float(s[0]))

def test_jacobian_of_a_fastai_model():
    from fastai.vision.all import xresnet18
    torch.manual_seed(0)
    model = xresnet18(n_out=2, c_in=1)
    for p in model.parameters(): p.requires_grad = False
    for p in model[-1].parameters(): p.requires_grad = True
    s = jacobian_spectrum(model, torch.randn(3, 1, 32, 32))
    assert len(s) == 6 and float(spectrum_condition(s)) > 1 and model.training
