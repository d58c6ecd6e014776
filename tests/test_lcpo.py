"LCPO: bad input, warnings, unseen annotators, half precision, several processes, and the trainers of TRL and fastai"
import copy, pickle, warnings
from functools import partial
import pytest, torch
from torch import nn
from paperbook.align.lcpo import *
from paperbook.align.preferences import *

close = torch.testing.assert_close

@pytest.fixture(autouse=True)
def _one_thread():
    n = torch.get_num_threads(); torch.set_num_threads(1); yield; torch.set_num_threads(n)

def four(b=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [(-20*torch.rand(b, generator=g)).requires_grad_(i < 2) for i in range(4)]

def named(x): return dict(zip(('policy_chosen_logps', 'policy_rejected_logps', 'ref_chosen_logps', 'ref_rejected_logps'), x))

# --- bad input (section 8 of the specification)

@pytest.mark.parametrize('kw, why', [(dict(init=0.), 'init'), (dict(init=1), 'init'), (dict(init=-.1), 'init'), (dict(init=float('nan')), 'init'), (dict(init='high'), 'init'), (dict(momentum=0.), 'momentum'), (dict(momentum=1.5), 'momentum'),
    (dict(momentum=float('nan')), 'momentum'), (dict(n_annotators=0), 'n_annotators'), (dict(n_annotators=2.), 'n_annotators'), (dict(n_annotators=True), 'n_annotators'), (dict(eps=.7), 'eps')])
def test_options(kw, why):
    with pytest.raises(ValueError, match=why): AnnotatorReliability(**kw)
def test_momentum_one_is_the_batch(): r = AnnotatorReliability(momentum=1); r.update(torch.tensor([.2, .4]), torch.zeros(2, dtype=torch.long)); close(r.eta, torch.tensor([.3]))

@pytest.mark.parametrize('k', [torch.tensor([3, 0]), torch.tensor([-2, 0]), torch.tensor([0., 1.]), torch.tensor([True, False]), [0, 1]])
def test_annotators(k):
    r = AnnotatorReliability(3)
    with pytest.raises(ValueError, match='annotators'): r(k)
    with pytest.raises(ValueError, match='annotators'): r.update(torch.tensor([.5, .5]), k)
    close(r.eta, torch.full((3,), .9)); assert r.count.sum() == 0

@pytest.mark.parametrize('w', [torch.tensor([.5]), torch.tensor([.5, float('nan')]), torch.tensor([.5, 1.2])])
def test_bad_posteriors_change_nothing(w):
    r = AnnotatorReliability(3)
    with pytest.raises(ValueError): r.update(w, torch.tensor([0, 1]))
    close(r.eta, torch.full((3,), .9)); assert r.count.sum() == 0

@pytest.mark.parametrize('bad', [float('nan'), float('inf'), -float('inf')])
def test_logits_that_are_not_finite(bad):
    s = torch.tensor([0., bad])
    with pytest.raises(ValueError, match='row 1'): label_posterior(s, .9)
    with pytest.raises(ValueError, match='row 1'): gibbs_logit(torch.zeros(2), s)
    x = four(2)
    with torch.no_grad(): x[1][1] = bad
    with pytest.raises(ValueError, match='row 1'): dpo_logit(*x)

def test_lengths_shapes_and_eta():
    x = four()
    n = torch.full((6,), 3)
    for f in (lambda: simpo_logit(*x[:2], n[:4], n), lambda: simpo_logit(*x[:2], n, n-3), lambda: ipo_logit(*x, .1, n), lambda: ipo_logit(*x, .1, n, n[:2]), lambda: dpo_logit(*x[:3], x[3][:2]), lambda: dpo_logit(*x, beta=0.),
              lambda: ipo_logit(*x, beta=-1.), lambda: cpo_logit(*x[:2], alpha=-1.), lambda: gibbs_logit(x[0], x[1][:3]), lambda: label_posterior(x[0], n/2.), lambda: label_posterior(x[0], 1.2),
              lambda: label_posterior(x[0], float('nan')), lambda: label_posterior(x[0], torch.full((2,), .5)), lambda: lcpo_loss(x[0], x[1][:3]), lambda: lcpo_loss(x[0], x[1], 'other'), lambda: lcpo_loss(x[0], x[1], 'weighted')):
        with pytest.raises((ValueError, TypeError)): f()
    close(label_posterior(torch.tensor([2.]), torch.tensor([1.])), torch.sigmoid(torch.tensor([2.])+torch.logit(torch.tensor([.999]))))   # clamped, not infinite

def test_warnings():
    with pytest.warns(UserWarning, match='most labels are wrong'): AnnotatorReliability(init=.4)
    r, k = AnnotatorReliability(2, momentum=1.), torch.tensor([0, 1])
    with pytest.warns(UserWarning, match='memorised') as seen:
        for _ in range(100): r.update(torch.ones(2), k)
    assert len(seen) == 1
    m = LCPO(lambda b, swapped: (.01 if swapped else 0.)*torch.ones(4))
    with pytest.warns(UserWarning, match='learnt nothing') as seen:
        for _ in range(110): m(None); m.update()
    assert len(seen) == 1
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        ok = LCPO(lambda b, swapped: (3. if swapped else 0.)*torch.tensor([1., -1.]), AnnotatorReliability(2))
        for _ in range(110): ok(None, k); ok.update()

# --- promises

def test_unseen_annotators_get_the_mean():
    r = AnnotatorReliability(4, momentum=1.)
    r.update(torch.tensor([.8, .6, .3]), torch.tensor([0, 1, -1]))
    close(r(torch.tensor([0, 1, 2, -1])), torch.tensor([.8, .6, .9, .7]))             # training: the start
    close(r.eval()(torch.tensor([[0, 1], [2, 3]])), torch.tensor([[.8, .6], [.7, .7]]))

def test_state_dtype_and_copies():
    m = LCPO(partial(dpo_loss, beta=.1), AnnotatorReliability(3))
    x, k = four(), torch.tensor([0, 1, 2, 0, 1, 2])
    m(named(x), k); m.update()
    other = LCPO(partial(dpo_loss, beta=.1), AnnotatorReliability(3)); other.load_state_dict(m.state_dict())
    close(other.reliability.eta, m.reliability.eta); close(other.reliability.count, m.reliability.count)
    m.half(); assert m.reliability.eta.dtype == torch.float32; close(m.reliability.eta, other.reliability.eta, rtol=0, atol=0)
    close(copy.deepcopy(m).reliability.eta, m.reliability.eta); close(pickle.loads(pickle.dumps(m)).reliability.eta, m.reliability.eta)
    loss, _ = m(named([v.bfloat16() for v in x]), k); assert loss.dtype == torch.float32

def test_accumulated_batches_move_as_one():
    a, b = (LCPO(partial(dpo_loss, beta=.1), AnnotatorReliability(2)) for _ in 'ab')
    x, k = four(), torch.tensor([0, 1, 1, 0, 1, 1])
    a(named(x), k); a.update()
    for s in (slice(0, 2), slice(2, 6)): b(named([v[s] for v in x]), k[s])
    close(b.reliability.eta, torch.full((2,), .9)); b.update(); close(a.reliability.eta, b.reliability.eta)
    before = b.reliability.eta.clone(); b.update(); close(b.reliability.eta, before)

def test_processes_share_their_sums(monkeypatch):
    one, two, k = AnnotatorReliability(2), AnnotatorReliability(2), torch.tensor([0, 1, 1])
    w = torch.tensor([.9, .5, .1])
    one.update(torch.cat([w, w]), torch.cat([k, k]))
    monkeypatch.setattr(torch.distributed, 'is_initialized', lambda: True); monkeypatch.setattr(torch.distributed, 'all_reduce', lambda t: t.mul_(2))
    two.update(w, k)
    close(one.eta, two.eta); close(one.count, two.count)

def test_the_users_own_loss_and_vmap_of_the_pieces():
    x = four()
    own = LCPO(lambda b, swapped: dpo_loss(*([b[1], b[0], b[3], b[2]] if swapped else b), beta=.2, reduction='none'))
    lib = LCPO(partial(dpo_loss, beta=.2))
    a, b = own(x)[0], lib(named(x))[0]
    close(a, b)
    for u, v in zip(torch.autograd.grad(a, x[:2]), torch.autograd.grad(b, x[:2])): close(u, v)
    s = torch.randn(3, 5)
    close(torch.vmap(lambda s: lcpo_loss(s, label_posterior(s, .8)))(s), lcpo_loss(s, label_posterior(s, .8)))
    for bad in (3, torch.add, lambda x: x):
        with pytest.raises((TypeError, ValueError)): LCPO(bad)
    with pytest.raises(ValueError, match='objective'): LCPO(dpo_loss, objective='both')

def test_em_fit_keeps_the_start_of_absent_annotators():
    eta, w = em_fit(torch.tensor([.9, .8, .2]), torch.tensor([0, 0, 2]), init=.7)
    assert len(eta) == 3 and eta[1] == torch.tensor(.7) and w.shape == (3,)

# --- fastai

def test_fastai_callback():
    pytest.importorskip('fastai')
    import fastai.callback.progress
    from fastai.data.core import DataLoaders
    from fastai.learner import Learner
    from fastai.optimizer import SGD
    from torch.utils.data import DataLoader, TensorDataset
    class Scores(nn.Module):
        def __init__(self): super().__init__(); self.f = nn.Linear(3, 1)
        def forward(self, a, b): return dict(policy_chosen_logps=self.f(a)[:, 0], policy_rejected_logps=self.f(b)[:, 0])
    torch.manual_seed(0)
    ds = TensorDataset(torch.randn(40, 3), torch.randn(40, 3), torch.randint(2, (40,)))
    lcpo = LCPO(cpo_loss, AnnotatorReliability(2)); cb = LCPOCallback(lcpo)
    learn = Learner(DataLoaders(*(DataLoader(ds, 10) for _ in 'tv')), Scores(), cb.loss, SGD, cbs=cb)
    learn.dls.train.n_inp = learn.dls.valid.n_inp = 2
    with learn.no_bar(), learn.no_logging(): learn.fit(2, 1e-2)
    assert len(cb.log) == 8 and lcpo.reliability.count.sum() == 80 and not lcpo._pending

# --- TRL

@pytest.fixture(scope='module')
def tiny():
    "A randomly initialised Llama, a tokenizer of words, and labelled pairs of three annotators"
    pytest.importorskip('trl')
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    words = ['<pad>', '<eos>', *(f'w{i}' for i in range(14))]
    t = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token='<pad>')); t.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tok = PreTrainedTokenizerFast(tokenizer_object=t, pad_token='<pad>', eos_token='<eos>')
    g = torch.Generator().manual_seed(0)
    say = lambda n: ' '.join(f'w{i}' for i in torch.randint(14, (n,), generator=g))
    data = Dataset.from_dict(dict(prompt=[say(3)+' ' for _ in range(24)], chosen=[say(2+i%3)+' ' for i in range(24)], rejected=[say(2+i%2)+' ' for i in range(24)], annotator=[i % 3 for i in range(24)]))
    def model(): torch.manual_seed(0); return LlamaForCausalLM(LlamaConfig(vocab_size=16, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, pad_token_id=0, eos_token_id=1, bos_token_id=1))
    return model, tok, data

def config(path, **kw):
    from trl import DPOConfig
    return DPOConfig(**(dict(output_dir=str(path), per_device_train_batch_size=4, max_steps=3, beta=.5, learning_rate=1e-2, report_to=[], logging_steps=1, save_steps=2, use_cpu=True, bf16=False, gradient_checkpointing=False, disable_tqdm=True) | kw))

@pytest.mark.filterwarnings('ignore')
def test_trl_trainer(tiny, tmp_path):
    model, tok, data = tiny
    rel = AnnotatorReliability(3)
    t = LCPOTrainer(model(), args=config(tmp_path), train_dataset=data, eval_dataset=data.select(range(4)), processing_class=tok, reliability=rel)
    batch = next(iter(t.get_train_dataloader()))
    assert batch['annotator'].dtype == torch.int64
    with torch.no_grad():   # before a step h = 0: the loss is log 2, the posterior the prior
        close(t.compute_loss(t.model.train(), dict(batch)), torch.tensor(2.).log(), atol=1e-5, rtol=0); close(t._pending.pop()[0], torch.full((4,), .9), atol=1e-5, rtol=0)
    t.train()
    assert rel.count.sum() == 12 and (rel.eta != .9).any() and not t._pending
    assert {'lcpo/w', 'lcpo/eta', 'rewards/margins'} <= set(t.state.log_history[0])
    # after it: against the book's own functions
    ids, att, mask = batch['input_ids'], batch['attention_mask'], batch['completion_mask']
    with torch.no_grad():
        lp = response_logps(t.model.eval(), ids, mask, att).sum(1).chunk(2)
        x = dict(policy_chosen_logps=lp[0], policy_rejected_logps=lp[1], ref_chosen_logps=batch['ref_chosen_logps'], ref_rejected_logps=batch['ref_rejected_logps'])
        close(t.compute_loss(t.model, dict(batch)), LCPO(partial(dpo_loss, beta=.5), rel.eval())(x, batch['annotator'])[0], atol=1e-4, rtol=1e-4)
    assert not t._pending and 'eval_loss' in t.evaluate()
    # resume: the reliabilities come back
    new = AnnotatorReliability(3)
    u = LCPOTrainer(model(), args=config(tmp_path), train_dataset=data, processing_class=tok, reliability=new)
    u.train(resume_from_checkpoint=str(tmp_path/'checkpoint-2'))
    close(new.eta, rel.eta, atol=1e-5, rtol=0)

@pytest.mark.filterwarnings('ignore')
def test_trl_options(tiny, tmp_path):
    model, tok, data = tiny
    make = lambda data=data, rel=None, **kw: LCPOTrainer(model(), None, config(tmp_path, **kw), train_dataset=data, processing_class=tok, reliability=rel)
    for kw, why in ((dict(loss_type='hinge'), 'loss_type'), (dict(label_smoothing=.1), 'label_smoothing'), (dict(use_weighting=True), 'use_weighting')):
        with pytest.raises(ValueError, match=why): make(**kw)
    plain = data.remove_columns('annotator')
    with pytest.raises(ValueError, match="column 'annotator'"): make(plain, AnnotatorReliability(3)).train()
    t = make(plain, loss_type='ipo', max_steps=2, gradient_accumulation_steps=2)
    t.train(); assert t.reliability.count.item() == 16 and t.reliability.steps == 2

def test_on_the_books_gpt():
    transformers = pytest.importorskip('transformers')
    from paperbook.core.zoo import model_path
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_pretrained(model_path())
    ids, k = torch.randint(2, 1024, (8, 10)), torch.arange(4) % 2
    mask = torch.ones_like(ids); mask[:, :3] = 0
    logps = lambda: response_logps(model, ids, mask).sum(1).chunk(2)
    with torch.no_grad(): ref = logps()
    lcpo, opt, losses = LCPO(partial(dpo_loss, beta=.1), AnnotatorReliability(2)), torch.optim.AdamW(model.parameters(), lr=1e-4), []
    for _ in range(4):
        loss, _ = lcpo(named((*logps(), *ref)), k)
        opt.zero_grad(); loss.backward(); opt.step(); lcpo.update(); losses.append(loss.item())
    assert losses[-1] < losses[0] and (lcpo.reliability.eta != .9).all() and lcpo.reliability.count.tolist() == [8, 8]

@pytest.mark.filterwarnings('ignore')
def test_trl_on_the_books_gpt_with_an_adapter(tiny, tmp_path):
    peft, transformers = pytest.importorskip('peft'), pytest.importorskip('transformers')
    from paperbook.core.zoo import model_path
    _, _, data = tiny
    tok, rel = transformers.AutoTokenizer.from_pretrained(model_path()), AnnotatorReliability(3)
    t = LCPOTrainer(transformers.AutoModelForCausalLM.from_pretrained(model_path()), args=config(tmp_path, save_strategy='no', gradient_accumulation_steps=2), train_dataset=data, eval_dataset=data.select(range(4)), processing_class=tok, reliability=rel,
                    peft_config=peft.LoraConfig(target_modules=['q_proj', 'v_proj'], task_type='CAUSAL_LM'))
    t.train()
    close(torch.tensor(t.state.log_history[0]['lcpo/w']), torch.tensor(.9), atol=1e-3, rtol=0)      # the reference is the model without its adapter
    assert rel.count.sum() == 24 and rel.steps == 3 and not t._pending and 'eval_loss' in t.evaluate() and rel.count.sum() == 24
