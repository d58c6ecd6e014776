"Sophia against pytorch-optimizer and a reference in NumPy; estimates in transformers, under autocast and accumulation; callbacks"
import copy, math, warnings
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.nn import functional as F
from paperbook.optim import sophia as S
from paperbook.optim.sophia import Sophia, SophiaCallback, Estimates, gnb_diagonal, gnb_regression, hutchinson_diagonal, maybe_update_hessian, sophia_trainer_callback

pytestmark = pytest.mark.filterwarnings('ignore:Sophia has no curvature')
PATHS = [dict(foreach=False, fused=False), dict(foreach=True), dict(fused=True)]
gen = lambda s=0: torch.Generator().manual_seed(s)

def reference(xs, grads, ests, k, lr, betas, rho, wd, eps=1e-12):
    "Algorithm 3 of the paper in NumPy"
    xs, (b1, b2) = [np.array(x.tolist()).reshape(x.shape) for x in xs], betas
    ms, hs = ([np.zeros_like(x) for x in xs] for _ in 'mh')
    for t, gs in enumerate(grads):
        for i, g in enumerate(map(np.asarray, gs)):
            ms[i] = b1*ms[i]+(1-b1)*g
            if t % k == 0: hs[i] = b2*hs[i]+(1-b2)*np.asarray(ests[t//k][i])
            xs[i] = xs[i]*(1-lr*wd)-lr*np.clip(ms[i]/np.maximum(rho*hs[i], eps), -1, 1)
    return xs

shape = st.lists(st.integers(0, 5), max_size=4).map(tuple)

@settings(max_examples=60, deadline=None)
@given(shapes=st.lists(shape, min_size=1, max_size=4), seed=st.integers(0, 999), lr=st.floats(0, .1), wd=st.floats(0, 5), rho=st.floats(1e-3, 10), k=st.integers(1, 4),
       betas=st.tuples(st.floats(0, .99), st.floats(0, .99)), path=st.sampled_from(PATHS))
def test_equals_the_reference(shapes, seed, lr, wd, rho, k, betas, path):
    g = gen(seed)
    draw = lambda n: [[torch.randn(s, generator=g, dtype=torch.float64) for s in shapes] for _ in range(n)]
    (xs,), grads, ests = draw(1), draw(5), draw(5)
    ps = [nn.Parameter(x.clone()) for x in xs]
    opt = Sophia(ps, lr, betas, rho, wd, **path)
    for t, gs in enumerate(grads):
        for p, d in zip(ps, gs): p.grad = d.clone()
        if t % k == 0: opt.update_hessian(ests[t//k])
        opt.step()
    for a, b in zip(ps, reference(xs, grads, ests, k, lr, betas, rho, wd)): np.testing.assert_allclose(a.detach().numpy(), b, atol=1e-10)

@pytest.mark.parametrize('path', PATHS)
def test_equals_pytorch_optimizer(path):
    "The peer clips m/max(h, eps) at p: that is Sophia with γ = p, and its learning rate times p"
    SophiaH = pytest.importorskip('pytorch_optimizer').SophiaH
    xs = [torch.randn(7, 5, generator=gen(1)), torch.randn(3, generator=gen(2))]
    a, b = ([nn.Parameter(x.clone()) for x in xs] for _ in 'ab')
    ours, theirs = Sophia(a, lr=.01, betas=(.96, .99), rho=.02, weight_decay=.3, **path), SophiaH(b, lr=.5, betas=(.96, .99), p=.02, weight_decay=.3*.02, update_period=3)
    g = gen(3)
    for t in range(9):
        for p, q in zip(a, b): p.grad = torch.randn(p.shape, generator=g); q.grad = p.grad.clone()
        e = [torch.randn(x.shape, generator=g).abs() for x in xs] if t % 3 == 0 else None
        if e: ours.update_hessian(e)
        ours.step(); theirs.step(hessian=e)
    for p, q in zip(a, b): torch.testing.assert_close(p, q, atol=1e-6, rtol=1e-5)

def test_state_is_two_tensors_of_the_parameters_size():
    ps = [nn.Parameter(torch.ones(s)) for s in ((30, 20), (7,))]
    opt = Sophia(ps)
    for p in ps: p.grad = torch.ones_like(p)
    opt.step()
    assert sum(t.nbytes for s in opt.state.values() for t in s.values() if torch.is_tensor(t)) == 2*sum(p.nbytes for p in ps)

def test_without_a_compiler_the_numbers_are_the_same(monkeypatch):
    def run():
        p = nn.Parameter(torch.randn(40, 30, generator=gen())); opt = Sophia([p], lr=.01)
        opt.update_hessian([torch.randn(40, 30, generator=gen(1))])
        for t in range(3): p.grad = torch.randn(40, 30, generator=gen(t)); opt.step()
        return p.detach()
    want = run(); monkeypatch.setenv('CC', 'no-such-compiler')
    torch.testing.assert_close(run(), want, atol=1e-6, rtol=0)

def test_bad_gradients_change_nothing():
    p, e = nn.Parameter(torch.ones(2)), nn.Embedding(3, 2, sparse=True)
    opt = Sophia([dict(params=[p]), dict(params=e.parameters())], lr=.1)
    p.grad = torch.ones(2); e(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match='dense'): opt.step()
    assert torch.equal(p.detach(), torch.ones(2)) and not opt.state

def tiny_llama(**kw):
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, **kw))

def test_labels_of_a_causal_model_are_shifted_and_padding_does_not_count(monkeypatch):
    "Logits at position t predict label t+1: with labels only on the first 5 tokens, 4 positions count"
    model, ids = tiny_llama(), torch.randint(16, (2, 8), generator=gen())
    labels = ids.clone(); labels[:, 5:] = -100
    monkeypatch.setattr(S, '_sample', lambda p, generator=None: p.argmax(1))
    a = gnb_diagonal(model, dict(input_ids=ids, labels=labels))
    b = gnb_diagonal(model, dict(input_ids=ids[:, :4]))
    for p, q in zip(a, b): torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-9)
    with pytest.raises(ValueError, match='masked'): gnb_diagonal(model, dict(input_ids=ids, labels=torch.full_like(ids, -100)))

def tiny(name, **kw):
    import transformers as tf
    torch.manual_seed(0)
    size = dict(vocab_size=16, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    cls, config = dict(gpt2=(tf.GPT2LMHeadModel, dict(n_embd=16, n_layer=1, n_head=2, n_positions=16, vocab_size=16, bos_token_id=0, eos_token_id=0)), llama=(tf.LlamaForCausalLM, size),
                       t5=(tf.T5ForConditionalGeneration, dict(vocab_size=16, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0)),
                       bart=(tf.BartForConditionalGeneration, dict(vocab_size=16, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
                             encoder_ffn_dim=16, decoder_ffn_dim=16, pad_token_id=1, bos_token_id=0, eos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=None)),
                       bert=(tf.BertForTokenClassification, dict(size, num_labels=3)))[name]
    return cls(cls.config_class(**config, **kw)).eval()

@pytest.mark.parametrize('name, shifts', [('gpt2', True), ('llama', True), ('t5', False), ('bart', False), ('bert', False)])
def test_the_mask_is_where_the_loss_has_it(name, shifts):
    "A label counts at the position whose loss it changes: position 4 carries label 5 in a causal model, and label 4 elsewhere"
    model, ids = tiny(name), torch.randint(3, 16, (1, 8), generator=gen())
    labels = torch.full_like(ids, -100); labels[0, 5] = 1
    batch, seen = dict(input_ids=ids, labels=labels), []
    at = S._targets(model, batch, -100)[0]
    assert (at != -100).nonzero().flatten().tolist() == [4 if shifts else 5]
    out = model(**batch)
    want = F.cross_entropy(out.logits[0], at)
    torch.testing.assert_close(out.loss, want)                         # the model's own loss has the same mask
    assert all(e.isfinite().all() for e in gnb_diagonal(model, batch))

def test_wrappers_do_not_hide_what_a_model_predicts():
    model = tiny('gpt2')
    assert S._is_causal(torch.compile(model)) and S._is_causal(nn.DataParallel(model)) and S._is_causal(nn.Sequential(model))

def test_an_encoder_decoder_sees_its_labels():
    "Its decoder's inputs come from them"
    model, ids = tiny('t5'), torch.randint(3, 16, (2, 8), generator=gen())
    assert torch.equal(S._call(model, dict(input_ids=ids, labels=ids)), model(input_ids=ids, labels=ids).logits)

def test_a_frozen_layer_keeps_its_average_and_starts_clean_when_thawed():
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)), torch.randn(8, 4)
    opt = Sophia(net.parameters())
    net[0].requires_grad_(False); opt.update_hessian(gnb_diagonal(net, x))
    assert net[0].weight not in opt.state and opt.state[net[2].weight]['refreshes'] == 1
    net[0].requires_grad_(True); opt.update_hessian(gnb_diagonal(net, x))
    assert opt.state[net[0].weight]['refreshes'] == 1 and opt.state[net[0].weight]['hessian'].any()

@pytest.mark.parametrize('f', [lambda m, x: gnb_diagonal(m, x), lambda m, x: gnb_regression(m, x), lambda m, x: hutchinson_diagonal((m(x)*x.requires_grad_()[:, :1]).sum(), m.parameters()),
                               lambda m, x: maybe_update_hessian(Sophia(m.parameters()), m, x, 0)])
def test_an_all_frozen_model_is_said(f):
    with pytest.raises(ValueError, match='frozen'): f(nn.Linear(4, 3).requires_grad_(False), torch.randn(5, 4))

@pytest.mark.parametrize('train', [True, False])
def test_an_estimate_between_forward_and_backward(train):
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).train(train), torch.randn(8, 4)
    before = net[1].running_mean.clone()
    loss = net(x).square().mean(); after = net[1].running_mean.clone()
    gnb_diagonal(net, x); loss.backward()
    assert torch.equal(net[1].running_mean, after) and torch.equal(before, after) != train

def test_a_compiled_model_is_explained():
    torch.manual_seed(0)
    net = torch.compile(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)), backend='aot_eager'); x = torch.randn(8, 4)
    assert gnb_diagonal(net, x)[0].any()
    with pytest.raises(RuntimeError, match='without it'): hutchinson_diagonal(net(x).square().mean(), net.parameters())

def test_fastai_with_another_optimizer_and_with_frozen_layers():
    import fastai.callback.progress
    from fastai.optimizer import Adam
    from fastai.learner import Learner
    from paperbook.core.data import load
    from paperbook.core.training import learner
    dls, net = load('digits').dls(64), lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 10))
    learn = Learner(dls, net(), loss_func=F.cross_entropy, opt_func=Adam, cbs=SophiaCallback())
    with learn.no_bar(), learn.no_logging(), pytest.raises(ValueError, match='only of a Sophia'): learn.fit(1)
    learn = learner(load('digits'), net(), Sophia, cbs=SophiaCallback(k=4)); learn.model[1].requires_grad_(False)
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    assert learn.model[1].weight not in learn.opt.opt.state

def test_tied_embeddings_and_frozen_layers():
    model = tiny_llama(tie_word_embeddings=True, attn_implementation='eager')
    model.model.layers[0].requires_grad_(False)
    ids = torch.randint(16, (2, 8), generator=gen())
    opt = Sophia([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for e in (gnb_diagonal(model, dict(input_ids=ids, labels=ids)), hutchinson_diagonal(model(input_ids=ids, labels=ids).loss, model.parameters())):
        opt.update_hessian(e)
        assert len(e) == len(list(model.parameters())) and all(not v.any() for v, p in zip(e, e.params) if not p.requires_grad)
    assert model.lm_head.weight is model.model.embed_tokens.weight and opt.state[model.lm_head.weight]['refreshes'] == 2

def test_fused_attention_is_explained_and_the_advice_works():
    from torch.nn.attention import sdpa_kernel, SDPBackend
    model, ids = tiny_llama(attn_implementation='sdpa'), torch.randint(16, (2, 8), generator=gen())
    loss = lambda: model(input_ids=ids, labels=ids).loss
    with pytest.raises(RuntimeError, match='MATH'): hutchinson_diagonal(loss(), model.parameters())
    with sdpa_kernel(SDPBackend.MATH): assert sum(e.abs().sum() for e in hutchinson_diagonal(loss(), model.parameters())) > 0

def test_half_precision_keeps_small_curvature():
    "A curvature of 1e-9 vanishes in float16, and the average must not lose it"
    torch.manual_seed(0)
    net = nn.Linear(4, 3).half(); x = torch.full((64, 4), 1e-4).half()
    e = gnb_diagonal(net, x)
    assert all(v.dtype == torch.float32 for v in e) and e[0].max() > 0 and e[0].max() < 1e-6
    opt = Sophia(net.parameters()); opt.update_hessian(e)
    assert opt.state[net.weight]['hessian'].max() > 0

def test_estimates_follow_their_parameters_through_groups_in_another_order():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    opt = Sophia([dict(params=[net[2].weight]), dict(params=[net[0].weight])], betas=(.9, 0.))
    e = gnb_diagonal(net, torch.randn(8, 4))
    opt.update_hessian(e)
    assert torch.equal(opt.state[net[0].weight]['hessian'], e[0]) and torch.equal(opt.state[net[2].weight]['hessian'], e[2])

def test_micro_batches_average_as_the_gradient_does(monkeypatch):
    monkeypatch.setattr(S, '_sample', lambda p, generator=None: p.argmax(1))
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double(), torch.randn(12, 4, dtype=torch.float64)
    for p, q in zip(gnb_diagonal(net, [x[:3], x[3:]]), gnb_diagonal(net, x)): torch.testing.assert_close(p, q)
    z = lambda: gen(5)
    for p, q in zip(gnb_regression(net, x, generator=z()), gnb_regression(net, (x,), generator=z())): torch.testing.assert_close(p, q)

def test_the_callback_counts_steps_and_starts_again_with_a_new_optimizer():
    from fastai.callback.training import GradientAccumulation
    from paperbook.core.data import load
    from paperbook.core.training import learner
    torch.manual_seed(0)
    learn = learner(load('digits'), nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), Sophia, cbs=[SophiaCallback(k=4), GradientAccumulation(128)])
    with learn.no_bar(), learn.no_logging():
        learn.fit(1)
        assert learn.sophia.steps == len(learn.dls.train)//2
        learn.create_opt(); learn.fit(1)
    assert all(s['refreshes'] >= 1 for s in learn.opt.opt.state.values())
    learn.export if False else copy.deepcopy(learn.opt.opt)

def test_ddp_is_unwrapped_and_a_model_in_eval_mode_stays_there():
    net = nn.Sequential(nn.Linear(4, 3), nn.Dropout(.5)).eval()
    gnb_diagonal(net, torch.randn(5, 4))
    assert not net.training and all(p.grad is None for p in net.parameters())

@pytest.mark.parametrize('f', [lambda: maybe_update_hessian(Sophia([nn.Parameter(torch.ones(1))]), nn.Linear(1, 2), torch.ones(1, 1), 0, k=0),
                               lambda: SophiaCallback(estimator='newton'), lambda: sophia_trainer_callback(k=-1), lambda: SophiaCallback(batch_fraction=0)])
def test_bad_settings(f):
    with pytest.raises(ValueError): f()
