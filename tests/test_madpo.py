"MADPO: weights against a plain reference, bad input, TRL's losses and trainer, transformers, fastai"
import math
from types import SimpleNamespace
from unittest.mock import MagicMock
import pytest, torch
from hypothesis import given, settings, strategies as st
from torch.nn import functional as F
from paperbook.align.madpo import (TAU, BetaDPO, MADPOCallback, RewardModel, bradley_terry_loss, effective_target_margin, kfold_margins, madpo_loss, madpo_trainer,
                                   madpo_weight, margin_coefficient, precompute_margins)
from paperbook.align.preferences import dpo_loss, response_logps

options = st.fixed_dictionaries(dict(c_max=st.floats(1.01, 8), c_min=st.one_of(st.none(), st.floats(0, .99)), lmbda=st.floats(.05, 5), tau=st.floats(.05, 12)))

def plain(m, c_max, c_min, lmbda, tau):
    "The official formulas, one number at a time"
    c_min = 1/c_max if c_min is None else c_min
    c = c_min+(c_max-c_min)/(1+(c_max-1)/(1-c_min)*math.exp(min(lmbda*(abs(m)-tau), 60)))
    sig = lambda x: 1/(1+math.exp(-x)) if x > 0 else math.exp(x)/(1+math.exp(x))
    return c, (sig(c*m)/sig(m) if m > -tau else 1.)

@settings(max_examples=100, deadline=None)
@given(m=st.floats(-60, 60), o=options)
def test_equals_the_formulas(m, o):
    t = torch.tensor([m], dtype=torch.float64)
    c, w = plain(m, **o)
    assert math.isclose(margin_coefficient(t, **o).item(), c, rel_tol=1e-9)
    assert math.isclose(madpo_weight(t, **o).item(), w, rel_tol=1e-9)
    assert math.isclose(madpo_weight(t, clip=1.5, **o).item(), min(madpo_weight(t.clamp_min(-60), clip=1e40, **o).item(), 1.5), rel_tol=1e-9)
    c_min = 1/o['c_max'] if o['c_min'] is None else o['c_min']
    assert c_min <= c <= o['c_max'] and 0 < w <= max(2., 1/(1+math.exp(-o['tau']))*100)

@settings(max_examples=50, deadline=None)
@given(m=st.floats(-30, 30), o=options, clip=st.sampled_from(['winner', None, 3.]))
def test_target_solves_the_population_problem(m, o, clip):
    t = torch.tensor([m], dtype=torch.float64)
    u = effective_target_margin(t, clip=clip, **o)
    a, b = (torch.sigmoid(s)*madpo_weight(s, clip=clip, **o) for s in (t, -t))
    assert math.isclose((a*torch.sigmoid(-u)).item(), (b*torch.sigmoid(u)).item(), rel_tol=1e-6)

@pytest.mark.parametrize('kw, word', [(dict(c_min=1.), 'c_min'), (dict(c_min=-.1), 'c_min'), (dict(c_max=1.), 'c_max'), (dict(c_max=0), 'c_max'), (dict(c_max=math.nan), 'c_max'), (dict(tau=0.), 'tau'), (dict(tau=-1), 'tau'), (dict(lmbda=0.), 'lmbda'), (dict(c_max='2'), 'c_max')])
def test_bad_options(kw, word):
    for f in (margin_coefficient, madpo_weight, effective_target_margin, lambda m, **kw: madpo_loss(*torch.zeros(4, 3), m, **kw), lambda m, **kw: MADPOCallback(**kw)):
        with pytest.raises(ValueError, match=word): f(torch.zeros(3), **kw)

@pytest.mark.parametrize('clip', ['loser', 0, -1., math.inf, True])
def test_bad_clip(clip):
    with pytest.raises(ValueError, match='clip'): madpo_weight(torch.zeros(3), clip=clip)

def test_bad_values():
    x, m = torch.zeros(4, 3), torch.tensor([0., math.nan, 1.])
    with pytest.raises(ValueError, match='row 1'): madpo_loss(*x, m)
    with pytest.raises(ValueError, match='shape'): madpo_loss(*x, torch.zeros(3, 1))
    with pytest.raises(ValueError, match='shape'): madpo_loss(*x, torch.zeros(1))
    with pytest.raises(ValueError, match='beta'): madpo_loss(*x, torch.zeros(3), beta=0.)
    with pytest.raises(ValueError, match='beta'): madpo_loss(*x, torch.zeros(3), beta=-.1)
    with pytest.raises(ValueError, match='policy_chosen_logps is not finite in row 0'): madpo_loss(torch.full((3,), math.nan), *x[1:], torch.zeros(3))
    with pytest.raises(TypeError, match='floating'): madpo_weight(torch.tensor([1, 2]))
    with pytest.raises(TypeError, match='tensor'): madpo_weight([1., 2.])
    with pytest.raises(ValueError, match='row 1'): madpo_weight(torch.tensor([0., -math.inf]), clip=None)
    with pytest.raises(ValueError, match='row 0'): madpo_weight(torch.tensor([-300.]), clip=None)
    for kw in (dict(beta=0), dict(keep=0.), dict(keep=1.5), dict(momentum=1.)):
        with pytest.raises(ValueError, match=next(iter(kw))): BetaDPO(**kw)

def test_infinite_margins_and_limits():
    m = torch.tensor([math.inf, -math.inf])
    assert madpo_weight(m).tolist() == [1, 1] and madpo_weight(m, clip=5.).tolist() == [1, 5] and madpo_weight(m, c_min=0).tolist() == [1, 1]
    assert effective_target_margin(m).tolist() == [math.inf, -math.inf]
    assert madpo_loss(*torch.zeros(4, 2), m).isfinite()
    assert madpo_weight(torch.tensor([-90., -200.]), tau=300.).isfinite().all()

@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize('B', [1, 4])
def test_dtypes_and_gradients(dtype, B):
    torch.manual_seed(0)
    a, m = torch.randn(4, B, dtype=dtype, requires_grad=True), torch.randn(B, dtype=dtype, requires_grad=True)
    loss = madpo_loss(*a, m, beta=.3)
    loss.backward()
    assert loss.ndim == 0 and loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) and m.grad is None and a.grad.isfinite().all()
    w = madpo_weight(m)
    h = (a[0]-a[2]-a[1]+a[3]).double()
    torch.testing.assert_close(loss.double(), -(w.double()*F.logsigmoid(.3*h)).mean(), rtol=2e-2 if dtype in (torch.bfloat16, torch.float16) else 1e-6, atol=0)

def test_stacks():
    a, m = torch.randn(4, 5, 8), torch.randn(5, 8)
    torch.testing.assert_close(madpo_loss(*a, m), torch.stack([madpo_loss(*a[:, i], m[i]) for i in range(5)]))
    one, many = [BetaDPO(generator=torch.Generator().manual_seed(i)) for i in range(5)], BetaDPO(generator=[torch.Generator().manual_seed(i) for i in range(5)])
    for _ in range(3): torch.testing.assert_close(many(*a), torch.stack([f(*a[:, i]) for i, f in enumerate(one)]))

def test_beta_dpo_keeps_what_it_says():
    g = torch.Generator().manual_seed(0)
    f, h, n = BetaDPO(1., keep=.5, momentum=0., generator=g), torch.tensor([-2., -.5, .5, 2.]), torch.zeros(4)
    p = torch.exp(-h.square()/2); p = p/p.sum()
    want = p+sum(p[j]*p/(1-p[j]) for j in range(4))-torch.stack([p[i]*p[i]/(1-p[i]) for i in range(4)])   # two draws without replacement
    for _ in range(4000):
        f.centre, f.scale = 0., 1.
        f(h, *torch.zeros(3, 4)); n[f.kept] += 1
    assert (n/4000-want).abs().max() < .03
    assert BetaDPO()(*torch.zeros(4, 1)).isfinite()

class Tiny(torch.nn.Module):
    "A reward model that is not causal about padding: the mean of real tokens"
    def __init__(self): super().__init__(); self.e = torch.nn.Embedding(9, 1)
    def forward(self, input_ids, attention_mask=None): return self.e(input_ids)[..., 0].mul(attention_mask).sum(1)

def test_margins():
    torch.manual_seed(0)
    net = Tiny()
    batch = lambda: dict(input_ids=torch.randint(9, (3, 4)), attention_mask=torch.ones(3, 4, dtype=torch.int64))
    a, b = batch(), batch()
    m = precompute_margins(net, [(a, b), (b, a)])
    assert m.shape == (6,) and not m.requires_grad and torch.equal(m[:3], -m[3:]) and net.training
    with pytest.raises(ValueError, match='no batches'): precompute_margins(net, [])
    with pytest.raises(ValueError, match='one number a row'): precompute_margins(Wide(), [(a, b)])
    net.e.weight.data[:] = math.nan
    with pytest.raises(ValueError, match='not finite in row 0'): precompute_margins(net, [(a, b)])
    for k in (1, 12):
        with pytest.raises(ValueError, match='k must'): kfold_margins(lambda r, f: f.float(), 11, k)
    with pytest.raises(ValueError, match='one margin'): kfold_margins(lambda r, f: torch.zeros(1), 11, 2)

class Wide(torch.nn.Module):
    def forward(self, input_ids, attention_mask=None): return torch.zeros(len(input_ids), 2)

def test_sequence_classifier():
    from transformers import LlamaConfig, LlamaForSequenceClassification
    net = LlamaForSequenceClassification(LlamaConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, num_labels=1, pad_token_id=0))
    a, b = (dict(input_ids=torch.randint(1, 9, (3, 4)), attention_mask=torch.ones(3, 4, dtype=torch.int64)) for _ in 'ab')
    torch.testing.assert_close(precompute_margins(net, [(a, b)]), (net.eval()(**a).logits-net(**b).logits)[:, 0].detach())

def llama():
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=16, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=32, pad_token_id=0, bos_token_id=1, eos_token_id=2))

def words():
    "A tokenizer of sixteen words"
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    t = Tokenizer(models.WordLevel({w: i for i, w in enumerate(['<pad>', '<s>', '</s>', '<unk>', *'abcdefghijkl'])}, unk_token='<unk>'))
    t.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=t, pad_token='<pad>', bos_token='<s>', eos_token='</s>', unk_token='<unk>')

@pytest.fixture
def prefs():
    datasets = pytest.importorskip('datasets')
    rows = [dict(prompt='a b', chosen=f' {c} d', rejected=' e', margin=float(i)-2) for i, c in enumerate('cfghij')]
    return datasets.Dataset.from_list(rows)

def config(tmp_path, **kw):
    from trl import DPOConfig
    return DPOConfig(output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=2, report_to=[], logging_steps=1, use_cpu=True, bf16=False, disable_tqdm=True, save_strategy='no', gradient_checkpointing=False, learning_rate=1e-2, **kw)

@pytest.mark.parametrize('cached', [False, True])
def test_trl(prefs, tmp_path, cached):
    "A few steps, and the loss of a batch against ours"
    pytest.importorskip('trl')
    tr = madpo_trainer(llama(), ref_model=None if cached else llama(), args=config(tmp_path, precompute_ref_log_probs=cached), train_dataset=prefs, eval_dataset=prefs, processing_class=words(), tau=2.)
    tr.train()
    assert any('madpo/weight' in r for r in tr.state.log_history) and all(math.isfinite(r['loss']) for r in tr.state.log_history if 'loss' in r)
    b = next(iter(tr.get_eval_dataloader()))
    tr.model.eval()
    with torch.no_grad():
        got = tr.compute_loss(tr.model, b)
        lp = response_logps(tr.model, b['input_ids'], b['completion_mask'], b['attention_mask']).sum(1).chunk(2)
        ref = (b['ref_chosen_logps'], b['ref_rejected_logps']) if cached else response_logps(tr.ref_model, b['input_ids'], b['completion_mask'], b['attention_mask']).sum(1).chunk(2)
        torch.testing.assert_close(got, madpo_loss(*lp, *ref, b['margin'], .1, tau=2.), rtol=1e-4, atol=1e-6)
        assert (got-dpo_loss(*lp, *ref, .1)).abs() > 1e-3
    assert math.isfinite(tr.evaluate()['eval_loss'])

def test_trl_on_the_books_gpt_with_an_adapter(prefs, tmp_path):
    peft, transformers = pytest.importorskip('peft'), pytest.importorskip('transformers')
    from paperbook.core.zoo import model_path
    tok = transformers.AutoTokenizer.from_pretrained(model_path())
    tr = madpo_trainer(transformers.AutoModelForCausalLM.from_pretrained(model_path()), args=config(tmp_path, gradient_accumulation_steps=2), train_dataset=prefs, eval_dataset=prefs, processing_class=tok,
                       peft_config=peft.LoraConfig(target_modules=['q_proj', 'v_proj'], task_type='CAUSAL_LM'))
    tr.train()
    first = tr.state.log_history[0]                                              # before a step h = 0: the loss is log 2 a pair, times its weight
    assert math.isclose(first['loss'], math.log(2)*first['madpo/weight'], rel_tol=1e-3) and math.isfinite(tr.evaluate()['eval_loss'])

def test_trl_bad_input(prefs, tmp_path):
    pytest.importorskip('trl')
    kw = dict(model=llama(), train_dataset=prefs, processing_class=words())
    with pytest.raises(ValueError, match='loss_type'): madpo_trainer(args=config(tmp_path, loss_type='ipo'), **kw)
    with pytest.raises(ValueError, match="column 'margin'"): madpo_trainer(args=config(tmp_path), **kw | dict(train_dataset=prefs.remove_columns('margin')))
    with pytest.raises(ValueError, match='NaN in row 0'): madpo_trainer(args=config(tmp_path), **kw | dict(train_dataset=prefs.map(lambda r: dict(margin=math.nan))))
    with pytest.raises(ValueError, match='tau'): madpo_trainer(args=config(tmp_path), tau=0., **kw)

def test_losses_are_trls_on_equal_tensors():
    "RewardTrainer's own method on given rewards; with the margin τ every weight is 1 and the loss is DPO's, which test_preferences compares with TRL's"
    trainer, same = pytest.importorskip('trl.trainer.reward_trainer').RewardTrainer, lambda x: x
    w, l = torch.randn(2, 7)
    me = MagicMock(accelerator=MagicMock(gather=same, gather_for_metrics=same), args=SimpleNamespace(center_rewards_coefficient=None), _total_train_tokens=0, _tp_size=1)
    got = trainer.compute_loss(me, lambda **kw: SimpleNamespace(logits=torch.cat([w, l])[:, None]), dict(attention_mask=torch.ones(14, 3)))
    torch.testing.assert_close(bradley_terry_loss(w, l), got)
    a = torch.randn(4, 7)
    torch.testing.assert_close(madpo_loss(*a, torch.full((7,), TAU)), dpo_loss(*a), rtol=1e-6, atol=0)

def test_fastai():
    import fastai.callback.progress
    from fastai.data.core import DataLoaders
    from fastai.data.load import DataLoader
    from fastai.learner import Learner
    torch.manual_seed(0)
    ids, m = torch.randint(3, 16, (12, 2, 6)), torch.randn(12)
    att, resp = torch.ones(12, 2, 6, dtype=torch.int64), torch.arange(6).expand(12, 2, 6) >= 2
    lm = llama()
    with torch.no_grad(): ref = response_logps(lm, ids.flatten(0, 1), resp.flatten(0, 1)).sum(1).view(-1, 2)
    dl = DataLoader(list(zip(ids, att, resp, ref, m)), bs=4)
    learn = Learner(DataLoaders(dl, dl), lm, loss_func=lambda *a: None, cbs=MADPOCallback(.5), lr=1e-2)
    with learn.no_bar(), learn.no_logging(): learn.fit(3)
    assert learn.model is lm
    want = madpo_loss(*torch.zeros(4, 12), m, .5).item()
    assert learn.recorder.values[-1][1] < want
