"Grokking: other seeds than the notebook's, brute force and torch's own parts as peers, a Learner, real transformers layers, bad input"
import copy, math, pickle
import numpy as np, pytest, torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn
from paperbook.generalization import grokking as gr
from paperbook.generalization.grokking import *

@pytest.fixture(autouse=True)
def one_thread():
    n = torch.get_num_threads(); torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)

PRIMES = st.sampled_from([3, 5, 7, 11, 13, 31])

@settings(max_examples=40, deadline=None)
@given(p=PRIMES, op=st.sampled_from(['add', 'mul']), a=st.floats(.2, .8), xi=st.floats(0, 1), seed=st.integers(0, 99), distinct=st.booleans())
def test_data(p, op, a, xi, seed, distinct):
    d = modular_dataset(p, op, a, xi, seed, distinct)
    want = torch.tensor([(m+n if op == 'add' else m*n) % p for m in range(p) for n in range(p)])
    assert torch.equal(d.y_true, want) and int(d.train.sum()) == int(a*p*p) and int(d.corrupted.sum()) == int(xi*int(a*p*p))
    assert torch.equal(d.train, d.clean | d.corrupted) and not (d.test & d.train).any() and torch.equal(d.y_train[~d.corrupted], want[~d.corrupted])
    if distinct: assert (d.y_train != want)[d.corrupted].all()
    again = modular_dataset(p, op, a, xi, seed, distinct)
    assert torch.equal(again.y_train, d.y_train) and torch.equal(again.train, d.train)

def test_random_labels_are_uniform():
    y = torch.zeros(60_000, dtype=torch.long)
    for distinct, low in ((False, 0), (True, 1)):
        new, mask = corrupt_labels(y, .5, 6, torch.Generator().manual_seed(3), distinct)
        n = torch.bincount(new[mask], minlength=6)[low:].double()
        assert mask.sum() == 30_000 and ((n-n.mean()).abs() < 5*n.mean().sqrt()).all() and (low == 0 or not (new[mask] == 0).any())

@pytest.mark.parametrize('op', ['add', 'mul'])
@pytest.mark.parametrize('p', [5, 7, 19, 53])
@pytest.mark.parametrize('seed', [7, 8])
def test_closed_form_answers_every_pair(p, op, seed):
    net = QuadraticMLP(p, 16*p); net.load_state_dict(analytic_modular_weights(p, 16*p, op, seed))
    with torch.no_grad(): assert (net(modular_dataset(p, op).x).argmax(1) == modular_dataset(p, op).y_true).all()

@settings(max_examples=30, deadline=None)
@given(p=st.integers(3, 40), seed=st.integers(0, 99), r=st.floats(1.1, 4))
def test_ipr_against_the_definition(p, seed, r):
    x = np.random.default_rng(seed).normal(size=p)
    P = np.array([abs(sum(x[t]*np.exp(-2j*np.pi*k*t/p) for t in range(p)))**2 for k in range(p//2+1)])
    got = inverse_participation_ratio(torch.tensor(x), r=r).item()
    assert got == pytest.approx(((P/P.sum())**r).sum(), rel=1e-6) and 0 < got <= 1+1e-9
    assert dc_share(torch.tensor(x)).item() == pytest.approx(P[0]/P.sum(), rel=1e-6)

def test_ipr_in_low_precision():
    x = torch.cos(2*math.pi*3*torch.arange(31)/31)
    for t in (torch.float16, torch.bfloat16): assert inverse_participation_ratio(x.to(t)).item() == pytest.approx(1, abs=.01)

def test_full_batch_is_the_plain_loop():
    d = modular_dataset(13, 'mul', .6, .3, 21); torch.manual_seed(5); a = QuadraticMLP(13, 20).double(); b = copy.deepcopy(a)
    opt, x, y = torch.optim.AdamW(a.parameters(), 1e-2, betas=(.9, .98), weight_decay=7.), d.x[d.train], d.y_train[d.train]
    for _ in range(40): opt.zero_grad(); mse_onehot(a(x), y).backward(); opt.step()
    seen = []
    fit_full_batch(b, d, 40, 7., watch=lambda t, m: seen.append(t))
    assert seen == list(range(1, 41)) and all(torch.allclose(u, v, atol=1e-9) for u, v in zip(a.parameters(), b.parameters()))

def test_dropout_masks():
    "Deterministic in the seed, and with the right rate and scale"
    d, nets = modular_dataset(13, 'add', .6), [gr._seeded(lambda: QuadraticMLP(13, 20, dropout=.3), 0) for _ in range(3)]
    for m, s in zip(nets, (1, 1, 2)): fit_full_batch(m, d, 5, seed=s)
    assert torch.equal(nets[0].W.weight, nets[1].W.weight) and not torch.equal(nets[0].W.weight, nets[2].W.weight)

@pytest.mark.parametrize('seed', [11, 12])
def test_memory_and_rule_then_unlearning(seed):
    "G2, G5, N1 in small: p = 31"
    d = modular_dataset(31, 'add', .85, .2, seed)
    plain, decay = (fit_full_batch(gr._seeded(lambda: QuadraticMLP(31, 160), seed), d, 300, lam) for lam in (0., 8.))
    a, b = modular_scores(plain, d), modular_scores(decay, d)
    assert a['corrupted'] > .85 and a['test'] > .85 and b['test'] > .97 and b['corrupted'] < .3
    ipr = neuron_ipr(plain)
    low, high, rand = (modular_pruning_curve(plain, o, d, [80])['test'][0] for o in pruning_orders(ipr, seed).values())
    assert low > rand+.2 and low > high+.5 and (ipr < .2).float().mean() > .2 and (ipr > .6).float().mean() > .15
    o, good = fit_cosines(decay), neuron_ipr(decay) > .6
    assert (o.residual[good].abs() < .3).float().mean() > .9 and o.r2[good].median() > .75

def test_two_stages_in_order():
    d, c = modular_dataset(53, 'add', .6, .3, 13), []
    fit_full_batch(gr._seeded(lambda: QuadraticMLP(53, 256), 13), d, 200, 10., watch=lambda t, m: c.append((t, modular_scores(m, d))) if t % 10 == 0 else None)
    fits, groks = (next(t for t, s in c if ok(s)) for ok in (lambda s: s['train'] > .98, lambda s: s['test'] > .95))
    assert fits < groks and c[-1][1]['corrupted'] < .6

def test_too_much_decay_kills_the_network():
    d = modular_dataset(11, 'add', .7, .2, 3)
    m = fit_full_batch(gr._seeded(lambda: QuadraticMLP(11, 24), 3), d, 1500, 25.)
    s = modular_scores(m, d)
    assert s['train_loss'] == pytest.approx(1/11, rel=1e-3) and classify_phase(s['train'], s['test'], .2, 11) == 'forgetting'
    for l in (m.U, m.V, m.W): l.weight.data.zero_()
    o = fit_cosines(m)
    assert neuron_ipr(m).eq(0).all() and o.r2.eq(0).all() and not o.residual.isnan().any()

def test_batchnorm_keeps_low_gain_for_memory():
    d = [modular_dataset(53, 'add', .65, .2, s) for s in (14, 15)]
    for m, dd in zip(fit_quadratic_batches(d, 53, 128, 'batch', 1000, 64, [14, 15], lr=.005), d):
        s = modular_scores(m, dd)
        assert s['train'] < .84 and s['test'] > .98 and np.corrcoef(m.norm.weight.detach().abs(), neuron_ipr(m))[0, 1] > .6

def test_transformer_learns():
    d = modular_dataset(7, 'add', .9, 0., 1)
    m, = fit_batches(lambda: ModularTransformer(7, 16, 2), [d], 150, 44, loss=F.cross_entropy)
    assert modular_scores(m, d)['train'] > .95

def learner(track, noisy_share=.4):
    from fastai.learner import Learner
    import fastai.callback.progress
    from fastai.data.core import DataLoaders
    from torch.utils.data import TensorDataset
    g = torch.Generator().manual_seed(0)
    x = torch.randn(120, 6, generator=g); y = (x @ torch.randn(6, 3, generator=g)).argmax(1)
    noisy, mask = corrupt_labels(y[:80], noisy_share, 3, g)
    dls = DataLoaders.from_dsets(TensorDataset(x[:80], noisy), TensorDataset(x[80:], y[80:]), bs=16, num_workers=0, device=torch.device('cpu'))
    torch.manual_seed(0); import random; random.seed(0); np.random.seed(0)
    cb = MemorizationTracker(mask, y[:80], ipr=lambda m: layer_ipr(m[0], m[3]), every=2) if track else None
    return Learner(dls, nn.Sequential(nn.Linear(6, 64), nn.ReLU(), nn.Dropout(.1), nn.Linear(64, 3)), loss_func=F.cross_entropy, cbs=cb), (x, y, noisy, mask)

def test_tracker_in_a_learner():
    learn, (x, y, noisy, mask) = learner(True)
    with learn.no_bar(), learn.no_logging(): learn.fit(7, 1e-2)
    log = learn.memorization_tracker.log
    assert [o['epoch'] for o in log] == [0, 2, 4, 6]
    with torch.no_grad(): p = learn.model.eval()(x).argmax(1)
    last, acc = log[-1], lambda a, b: (a == b).double().mean().item()
    assert last['noisy'] == acc(p[:80][mask], noisy[mask]) and last['clean'] == acc(p[:80][~mask], noisy[~mask]) and last['rule'] == acc(p[:80][mask], y[:80][mask])
    assert last['test'] == acc(p[80:], y[80:]) and 0 < last['ipr'] < 1
    assert len(learn.memorization_tracker.plot().axes[0].lines) == 5
    again = pickle.loads(pickle.dumps(MemorizationTracker([True, False])))
    assert isinstance(again, MemorizationTracker) and again.noisy.tolist() == [True, False]

def test_tracker_changes_nothing():
    nets = []
    for track in (True, False):
        learn, _ = learner(track)
        with learn.no_bar(), learn.no_logging(): learn.fit(4, 1e-2)
        nets.append(learn.model)
    for a, b in zip(*(m.parameters() for m in nets)): assert torch.equal(a, b)

def test_tracker_bad_input():
    learn, _ = learner(False)
    learn.add_cb(MemorizationTracker(torch.ones(3, dtype=torch.bool)))
    before = copy.deepcopy(learn.model.state_dict())
    with learn.no_bar(), learn.no_logging(), pytest.raises(ValueError, match='3 items'): learn.fit(1)
    for k, v in learn.model.state_dict().items(): assert torch.equal(v, before[k])

def test_prune_transformers_layers():
    "A BERT (Linear) and a GPT-2 (Conv1D): pruning is the same as zeroing the activations"
    from transformers import BertConfig, BertModel, GPT2Config, GPT2Model
    torch.manual_seed(0)
    ids, cut = torch.randint(50, (2, 7)), [0, 3, 17]
    bert = BertModel(BertConfig(vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)).eval()
    gpt = GPT2Model(GPT2Config(vocab_size=50, n_embd=16, n_inner=32, n_layer=2, n_head=2, n_positions=16)).eval()
    for model, into, out in ((bert, 'encoder.layer.1.intermediate.dense', 'encoder.layer.1.output.dense'), (gpt, 'h.0.mlp.c_fc', 'h.0.mlp.c_proj')):
        for q in model.parameters(): q.data.add_(.05*torch.randn_like(q))
        before = copy.deepcopy(model.state_dict())
        assert layer_ipr(model.get_submodule(into), model.get_submodule(out)).shape == (32,)
        pruned = prune_neurons(model, cut, into, out)
        def zero(mod, args): h = args[0].clone(); h[..., cut] = 0; return (h,)
        with torch.no_grad():
            got = pruned(ids).last_hidden_state
            handle = model.get_submodule(out).register_forward_pre_hook(zero); want = model(ids).last_hidden_state; handle.remove()
            assert torch.allclose(got, want, atol=1e-6) and not torch.allclose(got, model(ids).last_hidden_state, atol=1e-4)
        for k, v in model.state_dict().items(): assert torch.equal(v, before[k])
        curve = pruning_curve(model, torch.arange(32), lambda m: dict(size=float(m(ids).last_hidden_state.detach().norm())), [0, 32], into, out)
        assert curve['size'].shape == (2,)

BAD = [(lambda: modular_dataset(4, 'mul'), ValueError), (lambda: modular_dataset(5, train_frac=.01), ValueError), (lambda: modular_dataset(5, corrupt_frac=1.1), ValueError), (lambda: modular_dataset(True), ValueError),
       (lambda: corrupt_labels(torch.tensor([0, 7]), .5, 3), ValueError), (lambda: corrupt_labels(torch.tensor([0.]), .5, 3), TypeError), (lambda: analytic_modular_weights(10), ValueError),
       (lambda: QuadraticMLP(7, 4, dropout=1), ValueError), (lambda: QuadraticMLP(7, 4)(torch.zeros(2, 2)), TypeError), (lambda: inverse_participation_ratio(torch.ones(3, dtype=torch.cfloat)), TypeError),
       (lambda: layer_ipr(torch.ones(3, 4), torch.ones(2, 5)), ValueError), (lambda: prune_neurons(QuadraticMLP(7, 4), [-1]), ValueError), (lambda: prune_neurons(QuadraticMLP(7, 4), [4]), ValueError),
       (lambda: prune_neurons(nn.Linear(2, 2), [0]), ValueError), (lambda: classify_phase(float('nan'), .5, .1, 7), ValueError), (lambda: ModularTransformer(7, 10, 4), ValueError)]

@pytest.mark.parametrize('call, error', BAD)
def test_bad_input(call, error):
    with pytest.raises(error): call()

def test_nothing_heavy_at_import():
    import subprocess, sys
    code = "import sys, paperbook.generalization.grokking; print([m for m in ('fastai', 'transformers', 'sklearn', 'matplotlib') if m in sys.modules])"
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip() == '[]'
