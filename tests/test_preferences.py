"The shared pieces of preference learning agree with TRL, are stable, take any padding, and refuse what they can't do; the bench is exact"
import itertools, math
from types import SimpleNamespace
from unittest.mock import MagicMock
import pytest, torch
import torch.nn.functional as F
from torch import nn
from hypothesis import given, settings, strategies as st
from paperbook.align.preferences import *
from paperbook.align.bench import *

close = torch.testing.assert_close

@pytest.fixture(autouse=True)
def _one_thread():
    n = torch.get_num_threads(); torch.set_num_threads(1); yield; torch.set_num_threads(n)

def four(b=7, seed=0, scale=30., dtype=torch.float32):
    "Log-probabilities of the policy (with gradients) and of the reference"
    g = torch.Generator().manual_seed(seed)
    return [(-scale*torch.rand(b, generator=g)-1).to(dtype).requires_grad_(i < 2) for i in range(4)]

# --- agreement with TRL: its trainers' own methods, on a model that says these log-probabilities

def trl_dpo(loss_type, pc, pr, rc, rr, lens, beta, smoothing=0.):
    trainer = pytest.importorskip('trl.trainer.dpo_trainer').DPOTrainer
    n, B = torch.cat(lens), len(pc)
    T = int(n.max())+1
    mask = (torch.arange(T) >= 1) & (torch.arange(T) <= n[:, None])
    def model(c, r): return MagicMock(side_effect=lambda **kw: SimpleNamespace(log_probs=F.pad(torch.cat([c, r])[:, None], (0, T-2)), entropy=torch.zeros(2*B, T-1), mean_logits=torch.zeros(2*B, T-1), is_top1=torch.zeros(2*B, T-1, dtype=torch.bool)))
    same = lambda x: x
    me = MagicMock(accelerator=MagicMock(device='cpu', gather=same, gather_for_metrics=same), ref_model=model(rc, rr), aux_loss_enabled=False, ld_alpha=None, precompute_ref_logps=False, f_divergence_type='reverse_kl',
                   loss_types=[loss_type], loss_weights=[1.], beta=beta, label_smoothing=smoothing, use_weighting=False, _total_train_tokens=0, _tp_size=1)
    return trainer._compute_loss(me, model(pc, pr), dict(input_ids=torch.zeros(2*B, T, dtype=torch.long), attention_mask=mask.long(), completion_mask=mask.long()), False)

def trl_cpo(loss_type, pc, pr, beta, gamma=0., smoothing=0.):
    import warnings
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        trainer = pytest.importorskip('trl.experimental.cpo.cpo_trainer').CPOTrainer
    return trainer.cpo_loss(SimpleNamespace(alpha=0., loss_type=loss_type, beta=beta, simpo_gamma=gamma, label_smoothing=smoothing, accelerator=SimpleNamespace(device='cpu')), pc, pr)[0]

def same(ours, theirs, ps, rtol=2e-6):
    close(ours, theirs, rtol=rtol, atol=1e-7)
    for a, b in zip(torch.autograd.grad(ours, ps), torch.autograd.grad(theirs, ps)): close(a, b, rtol=rtol, atol=1e-8)

@pytest.mark.parametrize('beta', [.01, .1, 2.])
def test_dpo_family_is_trls(beta):
    x = four(); ps = x[:2]
    lens = [torch.tensor([3, 1, 5, 9, 2, 4, 6]), torch.tensor([2, 2, 1, 7, 3, 8, 5])]
    same(dpo_loss(*x, beta=beta), trl_dpo('sigmoid', *x, lens, beta), ps)
    same(ipo_loss(*x, beta=beta, chosen_lengths=lens[0], rejected_lengths=lens[1]), trl_dpo('ipo', *x, lens, beta), ps)
    same(rdpo_loss(*x, flip_rate=.3, beta=beta), trl_dpo('robust', *x, lens, beta, .3), ps)
    # cDPO: TRL keeps it in CPO's trainer, whose margin is given here
    with_ref = lambda: (x[0]-x[2], x[1]-x[3])
    same(dpo_loss(*x, beta=beta, label_smoothing=.2), trl_cpo('sigmoid', *with_ref(), beta, smoothing=.2).mean(), ps)

@pytest.mark.parametrize('beta', [.1, 2.])
def test_cpo_and_simpo_are_trls(beta):
    x = four()[:2]
    lens = torch.tensor([3, 1, 5, 9, 2, 4, 6]), torch.tensor([2, 2, 1, 7, 3, 8, 5])
    same(simpo_loss(*x, *lens, beta=beta, gamma=.5), trl_cpo('simpo', x[0]/lens[0], x[1]/lens[1], beta, gamma=.5).mean(), x)
    same(cpo_loss(*x, beta=beta, alpha=0.), trl_cpo('sigmoid', *x, beta).mean(), x)
    nll = -x[0].sum()/lens[0].sum()                     # TRL's: cross entropy over all tokens of the chosen responses
    same(cpo_loss(*x, beta=beta, alpha=.7, chosen_lengths=lens[0]), trl_cpo('sigmoid', *x, beta).mean()+.7*nll, x)
    same(cpo_loss(*x, beta=beta, alpha=1.), trl_cpo('sigmoid', *x, beta).mean()-x[0].mean(), x)

@pytest.mark.parametrize('kind', ['sigmoid', 'ipo'])
def test_a_real_trainers_batch_gives_its_loss(kind, tmp_path):
    trl, datasets = pytest.importorskip('trl'), pytest.importorskip('datasets')
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from paperbook.core.zoo import model_path
    lm, ref = (AutoModelForCausalLM.from_pretrained(model_path()) for _ in range(2))
    with torch.no_grad():
        for p in lm.parameters(): p.add_(.01*torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    ds = datasets.Dataset.from_list([dict(prompt='And God said,', chosen=' Let there be light: and there was light.', rejected=' I am the LORD.'), dict(prompt='Blessed are', chosen=' the meek', rejected=' they that hear the words of this book, and keep it.')])
    tr = trl.DPOTrainer(lm, ref, args=trl.DPOConfig(output_dir=str(tmp_path), loss_type=[kind], per_device_train_batch_size=2, report_to=[], use_cpu=True, bf16=False, beta=.1), train_dataset=ds, processing_class=AutoTokenizer.from_pretrained(model_path()))
    b = next(iter(tr.get_train_dataloader()))
    batch, n = (b['input_ids'], b['completion_mask'], b['attention_mask']), b['completion_mask'].sum(1).chunk(2)
    theirs = tr.compute_loss(tr.model, b)
    with torch.no_grad(): base = response_logps(ref, *batch).sum(1).chunk(2)
    for fused in (False, True):
        pol = response_logps(tr.model, *batch, fused=fused).sum(1).chunk(2)
        close(dpo_loss(*pol, *base, beta=.1) if kind == 'sigmoid' else ipo_loss(*pol, *base, beta=.1, chosen_lengths=n[0], rejected_lengths=n[1]), theirs, rtol=1e-5, atol=1e-6)

def test_token_logps_are_trls():
    utils = pytest.importorskip('trl.trainer.utils')
    g = torch.Generator().manual_seed(0)
    lg = (3*torch.randn(4, 9, 50, generator=g)).requires_grad_()
    t = torch.randint(50, (4, 9), generator=g)
    got, want = token_logps(lg, t, chunk=5), utils.selective_log_softmax(lg, t)
    close(got, want); d = torch.randn(4, 9, generator=g)
    close(*(torch.autograd.grad((o*d).sum(), lg)[0] for o in (got, want)))

def test_grpo_and_rloo_are_trls():
    trl = pytest.importorskip('trl.trainer.grpo_trainer')
    g = torch.Generator().manual_seed(0)
    B, T = 6, 5
    lp, old, ref = [(-torch.rand(B, T, generator=g)).requires_grad_(i == 0) for i in range(3)]
    mask, adv = torch.arange(T) < torch.tensor([5, 1, 3, 4, 2, 5])[:, None], torch.randn(B, generator=g)
    for kind, agg in (('grpo', 'sequence'), ('bnpo', 'token')):
        me = MagicMock(top_entropy_quantile=1., off_policy_mask_threshold=None, importance_sampling_level='token', beta=.1, loss_type=kind, epsilon_low=.2, epsilon_high=.28, use_vllm=False, aux_loss_enabled=False,
                       args=MagicMock(delta=None, use_bias_correction_kl=False), _entropy_bonus_enabled=False, current_gradient_accumulation_steps=1., accelerator=MagicMock(gather=lambda x: x), _get_per_token_logps_and_entropies=lambda *a, **k: (lp, torch.zeros(B, T), None))
        me.model.training = True
        theirs = trl.GRPOTrainer._compute_loss(me, None, dict(prompt_ids=torch.zeros(B, 1, dtype=torch.long), prompt_mask=torch.ones(B, 1), completion_ids=torch.zeros(B, T, dtype=torch.long), completion_mask=mask.long(), advantages=adv, old_per_token_logps=old, ref_per_token_logps=ref, num_items_in_batch=mask.sum()))
        same(grpo_loss(lp, old, mask, adv, .2, .28, ref, .1, agg=agg)[0], theirs, [lp])
        # a row without tokens, as a response that was cut off, adds nothing but counts as a row
        cut = mask & (torch.arange(B) != 3)[:, None]
        theirs = trl.GRPOTrainer._compute_loss(me, None, dict(prompt_ids=torch.zeros(B, 1, dtype=torch.long), prompt_mask=torch.ones(B, 1), completion_ids=torch.zeros(B, T, dtype=torch.long), completion_mask=cut.long(), advantages=adv, old_per_token_logps=old, ref_per_token_logps=ref, num_items_in_batch=cut.sum()))
        same(grpo_loss(lp, old, cut, adv, .2, .28, ref, .1, agg=agg)[0], theirs, [lp])
    r = torch.rand(3, 4, generator=g)
    close(rloo_advantages(r), r-(r.sum(1, keepdim=True)-r)/3)
    close(group_advantages(r), (r-r.mean(1, keepdim=True))/(r.std(1, keepdim=True)+1e-4))

# --- log-probabilities

@settings(max_examples=40, deadline=None)
@given(st.sampled_from([(3,), (2, 4), (2, 1, 3), (0, 2)]), st.integers(1, 9), st.integers(1, 7), st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]), st.booleans(), st.integers(0, 99))
def test_logps_equal_log_softmax(shape, V, chunk, dtype, overwrite, seed):
    g = torch.Generator().manual_seed(seed)
    base = (5*torch.randn(*shape, V, generator=g)).to(dtype)
    t = torch.where(torch.rand(shape, generator=g) < .3, -100, torch.randint(V, shape, generator=g))
    a, b = (base.clone().requires_grad_() for _ in range(2))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    want = torch.where(t != -100, b.to(wide).log_softmax(-1).gather(-1, t.clamp_min(0)[..., None])[..., 0], 0.)
    got = token_logps(a*1, t, chunk=chunk, overwrite=overwrite)
    assert got.dtype == wide
    close(got, want, rtol=1e-5, atol=1e-5)
    d = torch.randn(shape, generator=g).to(wide)
    if d.numel(): (got*d).sum().backward(); (want*d).sum().backward(); close(a.grad, b.grad, rtol=1e-2 if dtype.itemsize == 2 else 1e-5, atol=1e-2 if dtype.itemsize == 2 else 1e-5)

@settings(max_examples=20, deadline=None)
@given(st.sampled_from([(5,), (2, 4)]), st.integers(1, 9), st.sampled_from([None, 1, 3]), st.booleans(), st.sampled_from([torch.float32, torch.float64, torch.bfloat16]), st.integers(0, 99))
def test_logps_from_hidden_equal_those_from_logits(shape, V, chunk, bias, dtype, seed):
    g = torch.Generator().manual_seed(seed)
    h, W, b = (torch.randn(*s, generator=g).to(dtype) for s in ((*shape, 6), (V, 6), (V,)))
    t = torch.where(torch.rand(shape, generator=g) < .3, -100, torch.randint(V, shape, generator=g))
    t.view(-1)[0] = 0
    xs = [[v.clone().requires_grad_() for v in (h, W, b)] for _ in range(2)]
    got = token_logps_from_hidden(xs[0][0], xs[0][1], t, xs[0][2] if bias else None, chunk)
    want = token_logps(F.linear(xs[1][0], xs[1][1], xs[1][2] if bias else None), t)
    close(got, want, rtol=1e-5, atol=1e-5)
    d = torch.randn(shape, generator=g)
    (got*d).sum().backward(); (want*d).sum().backward()
    for u, v in list(zip(*xs))[:3 if bias else 2]: close(u.grad, v.grad, **(dict(rtol=.05, atol=.05) if dtype == torch.bfloat16 else dict(rtol=1e-4, atol=1e-5)))

def test_overwriting_is_caught_where_it_would_hurt():
    x = torch.randn(3, 5, requires_grad=True)
    y = x*1
    l = token_logps(y, torch.tensor([0, 1, 2]), overwrite=True).sum()
    z = y.square().sum()
    l.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match='modified by an inplace'): z.backward()

def tiny(kind, seed=0):
    from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Gemma2Config
    torch.manual_seed(seed)
    cfg = dict(gpt2=lambda: GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=40, n_positions=32, attn_pdrop=0, embd_pdrop=0, resid_pdrop=0),
               llama=lambda: LlamaConfig(num_hidden_layers=2, hidden_size=16, intermediate_size=32, num_attention_heads=2, num_key_value_heads=1, vocab_size=40, tie_word_embeddings=True),
               gemma2=lambda: Gemma2Config(num_hidden_layers=1, hidden_size=16, intermediate_size=32, num_attention_heads=2, num_key_value_heads=1, head_dim=8, vocab_size=40))[kind]()
    return AutoModelForCausalLM.from_config(cfg).float()

class GRU(nn.Module):
    "A module that knows nothing of masks and returns a tensor"
    def __init__(self): super().__init__(); self.e, self.r, self.o = nn.Embedding(40, 8), nn.GRU(8, 8, batch_first=True), nn.Linear(8, 40)
    def forward(self, x): return self.o(self.r(self.e(x))[0])

def padded(rows, side):
    T = max(map(len, rows))+2
    pads = [dict(left=T-len(r), right=0, both=1)[side] for r in rows]
    ids = torch.tensor([[7]*p+r+[7]*(T-p-len(r)) for p, r in zip(pads, rows)])
    return ids, torch.tensor([[0]*p+[1]*len(r)+[0]*(T-p-len(r)) for p, r in zip(pads, rows)])

@pytest.mark.parametrize('kind', ['gpt2', 'llama', 'gru'])
def test_padding_on_any_side_changes_nothing(kind):
    torch.manual_seed(0)
    model = GRU() if kind == 'gru' else tiny(kind)
    rows, plen = [[1, 2, 3, 4, 5], [9, 8, 7], [5, 6]], torch.tensor([3, 1, 1])
    alone = [response_logps(model, torch.tensor([r]), torch.arange(len(r))[None] >= n).sum(1) for r, n in zip(rows, plen)]
    for side in ('left', 'right', 'both'):
        ids, mask = padded(rows, side)
        resp = response_mask(mask, plen)
        got = response_logps(model, ids, resp, mask)
        close(got.sum(1), torch.cat(alone), rtol=1e-5, atol=1e-5)
        assert (got[~resp] == 0).all() and (got[resp] < 0).all() and resp.sum(1).tolist() == [2, 2, 1]
        if kind != 'gru':
            fused = response_logps(model, ids, resp, mask, fused=True)
            close(fused, got, rtol=1e-5, atol=1e-5)
            grads = [torch.autograd.grad(o.sum(), list(model.parameters()), allow_unused=True) for o in (got, fused)]
            for a, b in zip(*grads): assert (a is None) == (b is None); a is None or close(a, b, rtol=1e-4, atol=1e-5)

def test_models_that_change_their_logits_are_refused_when_fused():
    ids = torch.tensor([[1, 2, 3]]); resp = torch.tensor([[0, 1, 1]])
    m = tiny('gemma2')
    assert response_logps(m, ids, resp).shape == (1, 3)
    with pytest.raises(ValueError, match='final_logit_softcapping'): response_logps(m, ids, resp, fused=True)
    with pytest.raises(ValueError, match='fused=False'): response_logps(GRU(), ids, resp, fused=True)
    from transformers import AutoModelForCausalLM, BertConfig, ModernBertDecoderConfig, RecurrentGemmaConfig
    size = dict(vocab_size=40, hidden_size=16, intermediate_size=32, num_attention_heads=2, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    for cfg, words in ((BertConfig(num_hidden_layers=1, is_decoder=True, **size), 'more than its body'), (ModernBertDecoderConfig(num_hidden_layers=1, cls_token_id=1, sep_token_id=2, **size), 'more than its body'),
                       (RecurrentGemmaConfig(num_hidden_layers=3, num_key_value_heads=1, lru_width=16, **size), 'logits_soft_cap')):
        m = AutoModelForCausalLM.from_config(cfg)
        modes = [x.training for x in m.modules()]
        with pytest.raises(ValueError, match=words): response_logps(m, ids, resp, fused=True)
        assert modes == [x.training for x in m.modules()]

def test_adapters_are_read_or_refused():
    peft = pytest.importorskip('peft')
    ids, resp = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]]), torch.tensor([[0, 0, 1, 1], [0, 1, 1, 1]])
    lora = lambda **kw: peft.LoraConfig(task_type='CAUSAL_LM', r=2, init_lora_weights=False, **kw)
    base = response_logps(tiny('llama'), ids, resp)
    for cfg in (lora(target_modules=['q_proj']), lora(target_modules=['q_proj', 'lm_head']), lora(target_modules=['q_proj'], modules_to_save=['lm_head'])):
        m = peft.get_peft_model(tiny('llama'), cfg)
        got = response_logps(m, ids, resp)
        close(got, F.pad(m(ids).logits.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])[..., 0], (1, 0))*resp)
        with m.disable_adapter(): close(response_logps(m, ids, resp), base)
        if type(m.get_output_embeddings()) is nn.Linear:
            fused = response_logps(m, ids, resp, fused=True)
            close(fused, got)
            ps = [p for p in m.parameters() if p.requires_grad]
            for a, b in zip(*(torch.autograd.grad(o.sum(), ps) for o in (got, fused))): close(a, b, rtol=1e-4, atol=1e-5)
        else:
            for n in (m, m.get_base_model()):
                with pytest.raises(ValueError, match='output layer'): response_logps(n, ids, resp, fused=True)
    m = peft.get_peft_model(tiny('llama'), peft.PromptTuningConfig(task_type='CAUSAL_LM', num_virtual_tokens=2))
    for fused, words in ((True, 'before the prompt'), (False, 'one target a position')):
        with pytest.raises(ValueError, match=words): response_logps(m, ids, resp, fused=fused)

def test_the_books_gpt_is_read_like_any_other():
    from paperbook.core.zoo import load_gpt, load_tokens
    gpt, rows = load_gpt(), [r.tolist() for r in load_tokens()['test'][:60].split([30, 20, 10])]
    (a, am), (b, bm) = padded(rows, 'left'), padded(rows, 'right')
    want = response_logps(gpt, b, response_mask(bm, 4), bm).sum(1)
    close(want[0], -F.cross_entropy(gpt(torch.tensor(rows[:1])).logits[0, 3:-1], torch.tensor(rows[0][4:]), reduction='sum'), rtol=1e-5, atol=1e-5)
    for fused in (False, True): close(response_logps(gpt, a, response_mask(am, 4), am, fused=fused).sum(1), want, rtol=1e-5, atol=1e-4)
    close(RewardModel(gpt.model, 128)(a, am).shape, torch.Size([3]))

def test_going_backward_twice():
    m, ids, resp = tiny('gpt2').eval(), torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.tensor([[0, 1, 1], [0, 1, 1]])
    ps = list(m.parameters())
    both = lambda l: [torch.autograd.grad(l[i], ps, retain_graph=i == 0) for i in range(2)]
    got = both(response_logps(m, ids, resp, overwrite=False).sum(1))
    for i in range(2):
        for a, b in zip(got[i], torch.autograd.grad(response_logps(m, ids[i:i+1], resp[i:i+1]).sum(), ps)): close(a, b, rtol=1e-4, atol=1e-6)
    with pytest.raises(RuntimeError, match='overwrite=False'): both(response_logps(m, ids, resp).sum(1))

def test_the_weights_of_a_table_are_not_written_over():
    t = nn.Parameter(torch.zeros(1, 5, 40))
    response_logps(lambda x: t[:, :x.shape[1]], torch.tensor([[1, 2, 3]]), torch.tensor([[0, 1, 1]])).sum().backward()
    assert (t == 0).all() and t.grad.abs().sum() > 0

def test_data_parallel_wrappers_and_tuples():
    class Wrapped(nn.DataParallel):
        def forward(self, *a, **kw): return self.module(*a, **kw)
    g, ids, resp = GRU(), torch.tensor([[1, 2, 3]]), torch.tensor([[0, 1, 1]])
    want = response_logps(g, ids, resp)
    close(response_logps(Wrapped(g), ids, resp), want); close(response_logps(lambda x: (g(x), None), ids, resp), want)

def test_a_model_that_returns_log_probabilities_keeps_them():
    g = GRU(); f = lambda x: g(x).log_softmax(-1)
    response_logps(f, torch.tensor([[1, 2, 3]]), torch.tensor([[0, 1, 1]])).sum().backward()
    assert g.o.weight.grad.abs().sum() > 0

# --- stability

@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
def test_extreme_margins_are_finite(dtype):
    big = torch.tensor([0., 6e4, -6e4, 1., -1.]).to(dtype)
    z = torch.zeros_like(big)
    one = torch.ones(5)
    for f in (lambda x: dpo_loss(x, z, z, z, beta=1.), lambda x: ipo_loss(x, z, z, z), lambda x: rdpo_loss(x, z, z, z, .2), lambda x: simpo_loss(x, z, one, one), lambda x: cpo_loss(x, z), lambda x: bradley_terry_loss(x, z)):
        x = big.clone().requires_grad_()
        l = f(x); l.backward()
        assert l.dtype == torch.float32 and torch.isfinite(l) and torch.isfinite(x.grad).all()

def test_long_sequences_and_half_precision_logits():
    torch.manual_seed(0)
    lg, t = 4*torch.randn(2, 3000, 64), torch.randint(64, (2, 3000))
    exact = token_logps(lg.double(), t).sum(1)
    close(token_logps(lg, t).sum(1).double(), exact, rtol=1e-6, atol=0)
    b = lg.bfloat16()
    close(token_logps(b, t).sum(1).double(), token_logps(b.double(), t).sum(1), rtol=1e-6, atol=0)     # only the logits were rounded

def test_k3_never_overflows_and_keeps_its_direction():
    x = torch.tensor([500., 30., 1., -1., -30., -500.], requires_grad=True)
    k = approx_kl(x, torch.zeros(6)); k.sum().backward()
    assert torch.isfinite(k).all() and (k >= 0).all() and (x.grad.sign() == x.detach().sign()).all()

def test_equal_values_give_no_advantage():
    for v in (.1, .3, .7, 1000.1):
        for n in (3, 7, 10, 1000):
            x = torch.full((2, n), v)
            assert (group_advantages(x) == 0).all() and (whiten(x) == 0).all() and (whiten(x, torch.rand(2, n) < .7) == 0).all()
    x, m = torch.randn(3, 4, 5), torch.rand(3, 4, 5) < .6
    w = whiten(x, m)
    for i in range(3): close(w[i][m[i]], whiten(x[i][m[i]])); close(w[i][m[i]].std(correction=0), torch.tensor(1.))
    assert (w[~m] == 0).all() and whiten(torch.tensor([1, 2, 3])).dtype == torch.float32

def test_masked_tokens_may_be_anything():
    a, ret = gae(torch.tensor([[0., 1., math.nan]]), torch.tensor([[0., 0., math.inf]]), torch.tensor([[1, 1, 0]]), 1., 1.)
    close(a, torch.tensor([[1., 1., 0.]])); close(ret, a)
    assert torch.isfinite(grpo_loss(-torch.ones(2, 2), None, torch.tensor([[1, 1], [0, 0]]), torch.tensor([1., math.nan]))[0])
    lp = torch.tensor([[-1., -math.inf], [-2., math.nan]], requires_grad=True)
    m = torch.tensor([[1, 0], [1, 0]])
    l, _ = grpo_loss(lp, torch.full((2, 2), -1.5), m, torch.tensor([1., -1.]), logp_ref=torch.full((2, 2), -1.), beta=.1)
    l.backward()
    assert torch.isfinite(l) and torch.isfinite(lp.grad).all() and (lp.grad[:, 1] == 0).all()

# --- what is shared by runs: a leading dimension

def test_runs_are_kept_apart():
    x = [v.detach().view(1, 7).repeat(3, 1)+torch.arange(3)[:, None] for v in four()]
    beta = torch.tensor([[.1], [.2], [.3]])
    each = torch.stack([dpo_loss(*(v[i] for v in x), beta=float(b)) for i, b in enumerate(beta)])
    close(dpo_loss(*x, beta=beta), each)
    lp, m, a = -torch.rand(3, 4, 5), torch.rand(3, 4, 5) < .8, torch.randn(3, 4)
    m[..., 0] = True
    for agg in ('token', 'sequence', 'sum'): close(grpo_loss(lp, None, m, a, agg=agg)[0], torch.stack([grpo_loss(lp[i], None, m[i], a[i], agg=agg)[0] for i in range(3)]))

def test_losses_work_inside_vmap_and_compile():
    x = [v.detach() for v in four()]
    rows = [torch.stack([v, v-1, 2*v]) for v in x]
    for f in (dpo_loss, lambda *a: ipo_loss(*a), lambda *a: rdpo_loss(*a, flip_rate=.1), lambda a, b, c, d: cpo_loss(a, b), lambda a, b, c, d: simpo_loss(a, b, torch.ones(7), torch.ones(7))):
        close(torch.vmap(f)(*rows), torch.stack([f(*(r[i] for r in rows)) for i in range(3)]))
        close(torch.compile(f, fullgraph=True, backend='eager')(*x), f(*x))
    m = torch.ones(2, 3)
    close(torch.vmap(lambda lp: grpo_loss(lp, None, m, torch.ones(2))[0])(-torch.rand(4, 2, 3)), -torch.ones(4))

def test_autocast_reaches_the_backward_pass_of_the_fused_head():
    torch.manual_seed(0)
    h, W, t = torch.randn(40, 16), torch.randn(50, 16), torch.randint(50, (40,))
    grads = []
    for f in (lambda a, b: token_logps_from_hidden(a, b, t, chunk=7), lambda a, b: token_logps(F.linear(a, b), t)):
        a, b = h.clone().requires_grad_(), W.clone().requires_grad_()
        with torch.autocast('cpu', dtype=torch.bfloat16): l = f(a, b)
        l.sum().backward(); grads.append((l.detach(), a.grad, b.grad))
    for u, v in zip(*grads): close(u, v, rtol=.02, atol=.02)
    assert grads[0][0].dtype == torch.float32

# --- bad input

@pytest.mark.parametrize('call, words', [
    (lambda x: dpo_loss(*x, beta=0), 'beta must be a positive'), (lambda x: dpo_loss(*x, beta=torch.tensor([.1, -1.])), 'beta'), (lambda x: dpo_loss(*x, beta=math.nan), 'beta'),
    (lambda x: dpo_loss(*x, label_smoothing=.5), 'label_smoothing'), (lambda x: rdpo_loss(*x, flip_rate=.5), 'flip_rate'), (lambda x: dpo_loss(*x, reduction='avg'), "reduction must be"),
    (lambda x: dpo_loss(x[0], x[1][:3], x[2], x[3]), r'policy_rejected_logps must have the shape .* \(7,\), got \(3,\)'), (lambda x: dpo_loss(*(v[:0] for v in x)), 'at least one pair'),
    (lambda x: dpo_loss(x[0], x[1], torch.tensor([0., 0., math.nan, 0., 0., -math.inf, 0.]), x[3]), 'ref_chosen_logps is not finite in row 2, 5'),
    (lambda x: ipo_loss(*x, chosen_lengths=torch.ones(7)), 'of both responses'), (lambda x: simpo_loss(x[0], x[1], torch.tensor([1, 1, 0, 1, 1, 1, 1]), torch.ones(7)), 'chosen_lengths must be at least 1: not so in row 2'),
    (lambda x: cpo_loss(x[0], x[1], alpha=-1), 'alpha'), (lambda x: bradley_terry_loss(x[0], x[1][:2]), 'shape'),
    (lambda x: group_advantages(torch.ones(3, 1)), 'at least two'), (lambda x: rloo_advantages(torch.tensor([[1., math.nan], [0., 0.]])), r'row \(0, 1\)'),
    (lambda x: grpo_loss(-torch.ones(2, 3), None, torch.ones(2, 3), torch.ones(2), beta=-1), 'beta'), (lambda x: grpo_loss(-torch.ones(2, 3), None, torch.ones(2, 3), torch.ones(2), beta=.1), 'logp_ref'),
    (lambda x: grpo_loss(-torch.ones(2, 3), None, torch.zeros(2, 3), torch.ones(2)), 'mask is all zero'), (lambda x: grpo_loss(-torch.ones(2, 3), None, torch.zeros(2, 3), torch.ones(2), agg='sequence'), 'mask is all zero'),
    (lambda x: grpo_loss(-torch.ones(2, 3), None, torch.ones(2, 3), torch.tensor([1., math.nan])), 'advantages is not finite in row 1'),
    (lambda x: grpo_loss(torch.tensor([[-1., math.nan]]), None, torch.ones(1, 2), torch.ones(1)), 'logp is not finite in row 0'), (lambda x: grpo_loss(-torch.ones(2, 3), None, torch.ones(2, 3), torch.ones(3)), 'advantages'),
    (lambda x: grpo_loss(-torch.ones(2, 3), None, torch.ones(2, 3), torch.ones(2), agg='mean'), 'agg must be'), (lambda x: approx_kl(x[0], x[1], 'k4'), 'kind'), (lambda x: gae(torch.ones(3), torch.ones(3), torch.ones(3), 1.2), 'gamma'),
    (lambda x: ppo_loss(-torch.ones(2, 3), None, torch.ones(2, 3), torch.ones(2), values=torch.ones(2, 3)), 'go together'),
    (lambda x: token_logps(torch.zeros(2, 3), torch.tensor([0, 3])), 'row 1'), (lambda x: token_logps(torch.zeros(2, 3), torch.tensor([0])), 'one target a position'), (lambda x: token_logps(torch.zeros(2, 3), torch.tensor([0, 1]), chunk=0), 'chunk'),
    (lambda x: simpo_loss(x[0], x[1], torch.ones(7), torch.ones(7), gamma=math.nan), 'gamma'), (lambda x: gae(torch.ones(2, 3), torch.ones(2, 3), torch.ones(2, 4)), 'the mask must have'), (lambda x: ppo_loss(-torch.ones(2, 3), None, torch.ones(2, 3), torch.ones(2), value_clip=-1), 'value_clip'),
    (lambda x: token_logps_from_hidden(torch.zeros(2, 3), torch.zeros(5, 4), torch.tensor([0, 1])), 'width 3'),
    (lambda x: bradley_terry_labels(torch.ones(2), torch.ones(3)), 'one shape'), (lambda x: bradley_terry_labels(torch.ones(2), torch.ones(2), reliability=1.2), 'reliability'), (lambda x: bradley_terry_labels(torch.ones(2), torch.ones(2), reliability=math.nan), 'reliability'), (lambda x: bradley_terry_labels(torch.tensor([0., math.nan]), torch.ones(2)), 'not finite in row 1'), (lambda x: bradley_terry_labels(torch.ones(2), torch.ones(2), scale=0), 'scale'),
    (lambda x: bradley_terry_labels(torch.ones(2), torch.ones(2), reliability=[.9, .8], annotator=torch.tensor([0, 2])), '0..1'),
])
def test_bad_values_raise(call, words):
    with pytest.raises(ValueError, match=words): call(four())

@pytest.mark.parametrize('call, words', [
    (lambda x: dpo_loss([1.], *x[1:]), 'policy_chosen_logps must be a tensor'), (lambda x: dpo_loss(torch.ones(7, dtype=torch.long), *x[1:]), 'floating point'), (lambda x: simpo_loss(x[0], x[1], 3, torch.ones(7)), 'chosen_lengths'),
    (lambda x: token_logps(torch.zeros(2, 3), torch.zeros(2)), 'whole numbers'), (lambda x: response_logps(GRU(), torch.zeros(1, 3), torch.ones(1, 3)), 'whole numbers'), (lambda x: group_advantages(torch.ones(2, 2, dtype=torch.long)), 'floating'),
])
def test_bad_types_raise(call, words):
    with pytest.raises(TypeError, match=words): call(four())

def test_bad_batches_name_the_row():
    g, ids = GRU(), torch.tensor([[1, 2, 3], [4, 5, 6]])
    for resp, mask, words in (([[0, 1, 1], [0, 0, 0]], None, 'row 1 has no response token'), ([[0, 1, 1], [1, 1, 1]], None, 'row 1 begins with its first token'), ([[0, 1, 1], [0, 1, 1]], [[1, 1, 1], [0, 0, 0]], 'row 1 is padding only'),
                              ([[0, 1, 1], [0, 1, 1]], [[1, 1, 1], [1, 1, 0]], 'scores padding in row 1'), ([[0, 1, 2], [0, 1, 1]], None, '0 and 1'), ([[0, 1], [0, 1]], None, 'shape of the ids')):
        with pytest.raises(ValueError, match=words): response_logps(g, ids, torch.tensor(resp), None if mask is None else torch.tensor(mask))
    with pytest.raises(ValueError, match='row 1 has no token after its prompt'): response_mask(torch.ones(2, 3), torch.tensor([1, 3]))
    for mask, n in ((torch.ones(3, 4), torch.tensor([1, 2])), (torch.ones(4), 1), (torch.ones(1, 4), 1.5)):
        with pytest.raises(ValueError, match='a whole number a row'): response_mask(mask, n)

# --- reward models

def test_reward_model_reads_the_last_real_token():
    from transformers import AutoModel, GPT2Config
    torch.manual_seed(0)
    body = AutoModel.from_config(GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=40, n_positions=32)).eval()
    rows = [[1, 2, 3, 4, 5], [9, 8, 7], [5]]
    for r in (RewardModel(body, 16), RewardModel(lambda x: F.one_hot(x, 40).float().cumsum(1)[..., :16], 16)):
        alone = torch.cat([r(torch.tensor([q])) for q in rows])
        for side in ('left', 'right', 'both'):
            ids, mask = padded(rows, side)
            close(r(ids, mask), alone, rtol=1e-5, atol=1e-5)
    w, l = r(*padded(rows, 'left')), torch.zeros(3)
    close(bradley_terry_loss(w, l), -F.logsigmoid(w).mean())
    with pytest.raises(ValueError, match='hidden_size'): RewardModel(body, 8)(torch.tensor([[1]]))
    with pytest.raises(ValueError, match='hidden_size'): RewardModel(body, 0)
    with pytest.raises(TypeError, match='hidden states'): RewardModel(lambda x: dict(), 8)(torch.tensor([[1]]))

def test_labels_have_the_law_they_are_drawn_from():
    g = torch.Generator().manual_seed(0)
    a, b = torch.full((40_000,), 1.), torch.zeros(40_000)
    L = bradley_terry_labels(a, b, 2., [.9, .6], generator=g)
    p = torch.sigmoid(torch.tensor(2.)).item()
    for k, eta in enumerate((.9, .6)):
        on = L.annotator == k
        se = .5/math.sqrt(int(on.sum()))
        assert abs(L.flipped[on].float().mean()-(1-eta)) < 4*se and abs(L.first[on].float().mean()-(eta*p+(1-eta)*(1-p))) < 4*se
    assert (bradley_terry_labels(a, b, math.inf).first).all()

# --- policy gradients against enumeration

def exact_setting(seed=0):
    s = PrefSpace(2, 2, 1)                       # 7 responses, 2 prompts
    m = TinyLM(s, 8, 1, seeds=[seed]).double()
    r = torch.randn(2, 7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return s, m, r, flat_grad(expected(tree_logp(m), r), m)

@pytest.mark.parametrize('algo', ['reinforce', 'rloo', 'dr_grpo', 'ppo'])
def test_estimators_have_the_exact_policy_gradient_as_their_mean(algo):
    s, m, r, exact = exact_setting()
    p, total = tree_logp(m).detach()[0].exp(), 0.
    v = torch.randn(1, 1, 1, dtype=torch.float64)                # any value of the state is a valid baseline when λ = 1
    for q in range(2):
        for y in itertools.product(range(7), repeat=2):
            pr, ys = p[q, list(y)].prod(), torch.tensor([list(y)])
            now = read(m, torch.full((1, 2), q), ys)
            rew = r[q][ys]
            if algo == 'ppo':
                last = s.lengths[ys].clamp_max(s.max_len-1)
                val = v*(1+torch.arange(2.).double())*now.mask
                a, _ = gae(torch.zeros_like(now.logp).detach().scatter(-1, last[..., None], rew[..., None]), val, now.mask, 1., 1.)
            else: a = dict(reinforce=lambda x: x, rloo=rloo_advantages, dr_grpo=lambda x: 2*group_advantages(x, scale=False))[algo](rew)   # Dr. GRPO: (G-1)/G of it
            total = total - pr*flat_grad(grpo_loss(now.logp, None, now.mask, a, agg='sum')[0], m)/2
    close(total, exact, rtol=1e-6, atol=1e-9)

def test_gae_against_its_definition():
    g = torch.Generator().manual_seed(0)
    r, v = torch.randn(2, 3, 6, generator=g), torch.randn(2, 3, 6, generator=g)
    n = torch.tensor([6, 1, 4]); mask = torch.arange(6) < n[:, None]
    a, ret = gae(r, v, mask, .9, .7)
    for i, j in itertools.product(range(2), range(3)):
        T = int(n[j]); val = torch.cat([v[i, j, :T], torch.zeros(1)])
        d = [r[i, j, t]+.9*val[t+1]-val[t] for t in range(T)]
        for t in range(6): close(a[i, j, t], sum(((.9*.7)**(k-t)*d[k] for k in range(t, T)), torch.tensor(0.)) if t < T else torch.tensor(0.))
    close(ret, torch.where(mask, a+v, 0.))

def test_ppo_clips_policy_and_values():
    lp = torch.log(torch.tensor([[1.5, .5]])); old = torch.zeros(1, 2); m = torch.ones(1, 2)
    for adv, want in ((1., -(1.2+.5)/2), (-1., (1.5+.8)/2)):
        l, st = ppo_loss(lp, old, m, torch.full((1, 2), adv))
        close(l, torch.tensor(want)); assert st['clipped'] == 1
    l, st = ppo_loss(old, old, m, torch.zeros(1, 2), values=torch.ones(1, 2), returns=torch.zeros(1, 2), values_old=torch.full((1, 2), .5), value_clip=.2, value_coef=1.)
    close(l, torch.tensor(.5))
    l, _ = ppo_loss(old, old, m, torch.zeros(1, 2), values=torch.zeros(1, 2), returns=torch.zeros(1, 2), values_old=torch.full((1, 2), .5), value_clip=.2, value_coef=1.)
    close(l, torch.tensor(.5*.3**2))

# --- the bench

def test_reading_walking_and_the_plain_way_agree():
    s = PrefSpace(3, 4, 2)
    m = TinyLM(s, 12, 2, seeds=[0, 1])
    lp = tree_logp(m)
    close(lp.exp().sum(-1), torch.ones(2, 9))
    p, y = (torch.stack([torch.randint(n, (60,), generator=torch.Generator().manual_seed(k)) for k in range(2)]) for n in (9, len(s)))
    r = read(m, p, y, full=True, states=True)
    close(r.sum(), lp[torch.arange(2)[:, None], p, y], rtol=1e-5, atol=1e-5)
    close(r.full.exp().sum(-1)[r.mask], torch.ones(int(r.mask.sum())))
    one = TinyLM(s, 12, 2)
    with torch.no_grad():
        for k, v in one.named_parameters(): v.copy_(dict(m.named_parameters())[k][1])
    ids, att, resp = s.ids(p[1], y[1])
    close(response_logps(one, ids, resp, att).sum(1), r.sum()[1], rtol=1e-5, atol=1e-5)
    close(read(one, p[1], y[1]).logp, r.logp[1], rtol=1e-5, atol=1e-5)
    short = read(m, p[:, :3], torch.zeros(2, 3, dtype=torch.long))                      # empty responses only
    close(short.sum(), lp[torch.arange(2)[:, None], p[:, :3], 0])

@settings(max_examples=20, deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 2))
def test_spaces_number_their_responses(K, L, P):
    s = PrefSpace(K, L, P)
    assert len(s) == sum(K**l for l in range(L+1)) == len({tuple(r) for r in s.responses.tolist()})
    assert torch.equal(s.index(s.responses), torch.arange(len(s)))
    close(grammar_logp(s).exp().sum(-1), torch.ones(K**P))

def test_scores_against_plain_sums():
    s = PrefSpace(2, 3, 1); g = torch.Generator().manual_seed(0)
    lp, ref = (torch.randn(3, 2, len(s), generator=g, dtype=torch.float64).log_softmax(-1) for _ in range(2))
    r = torch.randint(3, (2, len(s)), generator=g).double()
    e = scores(s, lp, ref, r)
    p, q = lp.exp(), ref.exp()
    close(e.J, (p*r).sum(-1).mean(-1)); close(e.kl, (p*(lp-ref)).sum(-1).mean(-1)); close(e.kl_ref, (q*(ref-lp)).sum(-1).mean(-1)); close(e.entropy, -(p*lp).sum(-1).mean(-1))
    beats = (r[:, :, None] > r[:, None]).double()+.5*(r[:, :, None] == r[:, None]).double()
    close(e.win, torch.einsum('rpi,rpj,pij->rp', p, q, beats).mean(-1))
    close(scores(s, ref, ref, r).win, torch.full((3,), .5).double())

def test_no_policy_beats_the_frontier():
    s = PrefSpace(2, 3, 1); g = torch.Generator().manual_seed(0)
    ref = torch.randn(1, 2, len(s), generator=g, dtype=torch.float64).log_softmax(-1)
    r = torch.randn(2, len(s), generator=g, dtype=torch.float64)
    for beta in (.1, 1., 5.):
        top = scores(s, tilt(ref, r, beta), ref, r)
        for _ in range(50):
            e = scores(s, (tilt(ref, r, beta)+.3*torch.randn(ref.shape, generator=g, dtype=torch.float64)).log_softmax(-1), ref, r)
            assert e.J-beta*e.kl <= top.J-beta*top.kl+1e-12

def test_dpo_finds_the_optimum_it_promises():
    s = PrefSpace(2, 2, 1)
    ref = reference(s, [0], width=16, steps=50, bs=64)
    lr, r = tree_logp(ref), taste(s)
    pairs = make_pairs(s, lr, r, 20_000, [0])
    m = copies(ref)
    train_pairs(m, pairs, lambda pc, pr, b: dpo_loss(pc, pr, b.ref_chosen, b.ref_rejected, beta=1., reduction='none'), steps=300, bs=512, lr=1e-2, schedule='cosine')
    best = scores(s, tilt(lr, r, 1.), lr, r); e = evaluate(m, lr, r)
    assert abs(e.J-best.J) < .03 and abs(e.kl-best.kl) < .03

def test_runs_of_a_stack_do_not_touch_each_other():
    s = PrefSpace(3, 3, 1); ref = reference(s, [0, 1], width=8, steps=20, bs=32); lr = tree_logp(ref)
    loss = lambda pc, pr, b: dpo_loss(pc, pr, b.ref_chosen, b.ref_rejected, reduction='none')
    pairs = make_pairs(s, lr, gold(s), 200, [0, 1])
    both = copies(ref, 2); train_pairs(both, pairs.repeat(2), loss, steps=10, bs=16, lr=torch.tensor([1e-2, 1e-2, 1e-3, 1e-3]))
    for i, (sd, l) in enumerate([(0, 1e-2), (1, 1e-2), (0, 1e-3), (1, 1e-3)]):
        one = copies(reference(s, [sd], width=8, steps=20, bs=32)); train_pairs(one, pairs.run(sd), loss, steps=10, bs=16, lr=l)
        close(tree_logp(one)[0], tree_logp(both)[i], rtol=1e-4, atol=1e-4)

@pytest.mark.parametrize('algo', ['grpo', 'ppo'])
def test_a_seed_does_not_depend_on_the_others(algo):
    s = PrefSpace(3, 3, 1)
    def run(seeds):
        ref = reference(s, seeds, width=8, steps=20, bs=32); m = copies(ref)
        train_policy(m, gold(s), seeds, algo, steps=6, n_prompts=3, group=4, ref=ref, beta=.1, lr=3e-3, clip=1., epochs=2)
        return tree_logp(m).detach()
    close(run([0, 1])[1], run([1])[0], rtol=1e-3, atol=1e-3)

@pytest.mark.parametrize('algo', ['reinforce', 'rloo', 'grpo', 'dr_grpo', 'ppo'])
def test_policy_gradients_raise_the_reward(algo):
    s = PrefSpace(3, 3, 1); ref = reference(s, [0, 1], width=16, steps=60, bs=64); lr, r = tree_logp(ref), gold(s)
    m = copies(ref)
    curve, seen = train_policy(m, r, [0, 1], algo, steps=40, n_prompts=3, group=16, lr=5e-3, every=20, look=lambda t: evaluate(m, lr, r))
    J = stacked(seen).J
    assert curve.shape == (2, 40) and J.shape == (2, 3) and (J[:, -1] > J[:, 0]+.5).all()

def test_rewards_are_learnt_and_read_alike():
    s = PrefSpace(3, 3, 1); ref = reference(s, [0, 1], width=16, steps=60, bs=64); lr, r = tree_logp(ref), gold(s)
    rm = train_reward(s, make_pairs(s, lr, r, 2000, [0, 1], scale=3.), steps=150, width=16, lr=1e-2)
    t = reward_table(rm)
    p, y = torch.randint(3, (2, 30)), torch.randint(len(s), (2, 30))
    close(read_rewards(rm, p, y), t[torch.arange(2)[:, None], p, y], rtol=1e-4, atol=1e-4)
    close(reward_table(rm, [2, 0]), t[:, [2, 0]])
    for i in range(2): assert torch.corrcoef(torch.stack([t[i].flatten(), r.flatten()]))[0, 1] > .8

def test_off_policy_pairs_have_larger_margins_and_flags_follow_annotators():
    s = PrefSpace(3, 3, 1); lr = grammar_logp(s)[None].repeat(2, 1, 1); r = gold(s)
    a, b = (make_pairs(s, lr, r, 2000, [0, 1], off_policy=o, reliability=[.9, .6], prompts=[0, 2]) for o in (0., 1.))
    gap = lambda q: (q.reward_chosen-q.reward_rejected).abs().mean()
    assert gap(b) > 1.3*gap(a) and set(a.prompt.unique().tolist()) == {0, 2}
    for k, eta in enumerate((.9, .6)): assert abs(a.flipped[a.annotator == k].float().mean()-(1-eta)) < .05
    close(a.ref_chosen, lr[torch.arange(2)[:, None], a.prompt, a.chosen]); close(a.reward_rejected, r[a.prompt, a.rejected])
    assert torch.equal(make_pairs(s, lr[1:], r, 2000, [1], reliability=[.9, .6], prompts=[0, 2]).chosen[0], a.chosen[1])

def test_traces_marginalise():
    ts = TraceSpace(3, 2, 1); m = trace_reference(ts, [0, 1], width=8, steps=5, bs=16)
    j, e = trace_tree(m), trace_tree(m, empty=True)
    close(j.exp().sum((-1, -2)), torch.ones(2, 9)); close(e.exp().sum(-1), torch.ones(2, 9)); close(trace_tree(m, prompts=[4])[:, 0], j[:, 4])
    p, t, a = ts.draw(50, torch.Generator().manual_seed(0))
    on = t >= 0
    close(read_traces(m, *(v[on].expand(2, -1) for v in (p, t, a))).sum(-1), j[:, p[on], t[on], a[on]], rtol=1e-4, atol=1e-4)
    close(read_traces(m, p[~on].expand(2, -1), None, a[~on].expand(2, -1)).sum(-1), e[:, p[~on], a[~on]], rtol=1e-4, atol=1e-4)

def test_words_train_and_are_read_by_the_shared_functions():
    m = train_words(torch.arange(400) % 7, 7, steps=60, bs=8, length=8, width=16)
    y = m.sample(torch.tensor([[3, 4]]), 5, torch.Generator().manual_seed(0))
    assert y.shape == (1, 7) and response_logps(m, y, torch.arange(7)[None] >= 2).sum() > 5*math.log(1/7)+3

def test_bench_refuses():
    s = PrefSpace(2, 2, 1)
    for call, words in ((lambda: PrefSpace(0), 'n_tokens'), (lambda: PrefSpace(9, 9), 'too many'), (lambda: s.index(torch.tensor([2, 0])), 'then the end'), (lambda: s.split(2), 'both sides'), (lambda: TinyLM(s, 0), 'width'), (lambda: TinyLM(s, seeds=[]), 'empty'),
                        (lambda: read(TinyLM(s), torch.zeros(3, dtype=torch.long), torch.zeros(2, dtype=torch.long)), 'one shape'), (lambda: tilt(torch.zeros(1, 7), torch.zeros(1, 7), 0), 'beta'), (lambda: proxy_reward(gold(s), gold(s)*2+1, .5, grammar_logp(s)), 'multiple'),
                        (lambda: proxy_reward(gold(s), taste(s), 1.5, grammar_logp(s)), 'rho'), (lambda: make_pairs(s, grammar_logp(s), gold(s), 5, [0]), 'ref_logp'), (lambda: train_policy(TinyLM(s, seeds=[0]), gold(s), [0], 'trpo'), 'algo'),
                        (lambda: train_policy(TinyLM(s), gold(s), [0]), 'stack'), (lambda: train_policy(TinyLM(s, seeds=[0]), gold(s), [0], beta=.1), 'needs ref'), (lambda: TraceSpace(9, 9), 'too many'), (lambda: copies(TinyLM(s), 2), 'seeds'), (lambda: generate(TinyLM(s, seeds=[0, 1]), torch.zeros(3, dtype=torch.long), torch.Generator()), 'list of as many'), (lambda: at_matched_kl(torch.zeros(3), torch.zeros(2), 1.), 'one shape')):
        with pytest.raises(ValueError, match=words): call()

def test_matched_kl_reads_between_the_points():
    kl, J = torch.tensor([[0., 1., 3.], [0., .2, .4]]), torch.tensor([[0., 10., 20.], [0., 1., 2.]])
    got = at_matched_kl(kl, J, 2.)
    assert got[0] == 15. and got[1].isnan()
    m, lo, hi = paired_interval([1., 2., 3.], [0., 1., 2.5])
    assert lo < m < hi and abs(m-2.5/3) < 1e-12
