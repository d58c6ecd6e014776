"Adapters do what their definition says, agree with PEFT on real architectures, read and write its folders, and work where models are used"
import copy, json, math, os, pickle, subprocess, sys
import pytest, torch
import torch.nn.functional as F
from torch import nn
from hypothesis import given, settings, strategies as st
from paperbook.adapt.lora import *

WIDE = {torch.float32: 2e-5, torch.float64: 1e-12}

def filled(model, seed=1):
    "Adapters that are no longer at their start"
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for l in lora_layers(model).values():
            l.lora.B.copy_(torch.randn(l.lora.B.shape, generator=g, dtype=torch.float64)*.1)
            if isinstance(l.lora, DoRA): l.lora.m.mul_(1+.2*torch.rand(l.lora.m.shape, generator=g).to(l.lora.m))
    return model

def net(seed=0): torch.manual_seed(seed); return nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 5, bias=False), nn.Tanh(), nn.Linear(5, 3))
def conv1d(i, o):
    from transformers.pytorch_utils import Conv1D
    return Conv1D(o, i)
def bits(model): return {k: v.clone() for k, v in model.state_dict().items()}
def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)

@settings(max_examples=40, deadline=None)
@given(st.integers(1, 7), st.integers(1, 7), st.integers(1, 9), st.sampled_from([LoRA, DoRA]), st.booleans(), st.booleans(), st.booleans(), st.booleans(),
       st.sampled_from([(), (3,), (2, 3), (0, 2)]), st.sampled_from([torch.float32, torch.float64]), st.integers(0, 99))
def test_equals_the_definition(i, o, r, kind, transposed, bias, rslora, detach, batch, dtype, seed):
    if transposed and not batch: batch = (1,)     # Conv1D itself needs a batch
    torch.manual_seed(seed)
    layer = conv1d(i, o) if transposed else nn.Linear(i, o, bias=bias)
    m = nn.Sequential(layer).to(dtype)
    kw = dict(detach_norm=detach) if kind is DoRA else {}
    x = torch.randn(*batch, i, dtype=dtype)
    y0, before = m(x), bits(m)
    add_lora(m, r=r, alpha=3, target='0', adapter=kind, rslora=rslora, **kw)
    assert torch.equal(m(x), y0)                  # the start changes nothing, to the bit
    a = filled(m, seed)[0].lora
    assert a.scale == (3/math.sqrt(r) if rslora else 3/r)
    W = (layer.weight.T if transposed else layer.weight).detach()
    ref = {k: p.detach().clone().requires_grad_() for k, p in a.named_parameters()}
    xs = [x.clone().requires_grad_() for _ in range(2)]
    W1 = lora_weight(W, ref['A'], ref['B'], a.scale) if kind is LoRA else dora_weight(W, ref['A'], ref['B'], ref['m'], a.scale, detach)
    want, got = F.linear(xs[0], W1, layer.bias), m(xs[1])
    d = torch.randn_like(got)
    (want*d).sum().backward(); (got*d).sum().backward()
    close = lambda u, v: torch.testing.assert_close(u, v, rtol=50*WIDE[dtype], atol=50*WIDE[dtype])
    close(got, want); close(xs[1].grad, xs[0].grad)
    for k, p in a.named_parameters(): close(p.grad, ref[k].grad)
    y = m(x)
    with merged(m):
        close(m(x), y)
        assert m.state_dict().keys() == before.keys() and not any(p.requires_grad for p in m.parameters())
    assert torch.equal(m(x), y)
    with disabled(m): assert torch.equal(m(x), y0)
    sd = lora_state_dict(m)
    k = load_lora(add_lora(copy.deepcopy(remove_lora(copy.deepcopy(m))), r=r, alpha=3, target='0', adapter=kind, rslora=rslora, **kw), sd)
    assert torch.equal(k(x), y)
    assert same(bits(remove_lora(m)), before) and all(p.requires_grad for p in m.parameters()) and torch.equal(m(x), y0)

@pytest.mark.parametrize('dora', [False, True])
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision_base(dora, dtype):
    m = filled(add_lora(net().to(dtype), dora=dora))
    x, before = torch.randn(4, 8, dtype=dtype), bits(m)
    y = m(x)
    assert y.dtype == dtype and all(p.dtype == torch.float32 for p in m.parameters() if p.requires_grad)
    y.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in m.parameters() if p.requires_grad)
    with merged(m): torch.testing.assert_close(m(x), y, rtol=.03, atol=.03)
    assert same(bits(m), before)

def test_zero_rows_stay_finite():
    m = net().double()
    m[0].weight.data[2] = 0
    add_lora(m, dora=True, detach_norm=False)
    opt = torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=.1)
    for _ in range(3): opt.zero_grad(); m(torch.randn(4, 8).double()).square().mean().backward(); opt.step()
    assert all(p.isfinite().all() for p in m.parameters())

@pytest.mark.parametrize('dora', [False, True])
def test_copies_pickles_compile_autocast_checkpoints(dora):
    m, x = filled(add_lora(net(), dora=dora, dropout=.0)), torch.randn(4, 8)
    y = m(x)
    for f in (copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))):
        k = f(m)
        assert torch.equal(k(x), y)
        remove_lora(k, merge=True)
        assert type(k[0]) is nn.Linear and not k[0]._forward_hooks and torch.equal(m(x), y)
        merge_lora(m); k = f(m); unmerge_lora(m); unmerge_lora(k)
        assert torch.equal(k(x), y) and torch.equal(m(x), y)
    with torch.autocast('cpu', torch.bfloat16):
        z = m(x); z.float().sum().backward()
    assert z.dtype == torch.bfloat16 and (z-y).abs().max() < .2
    from torch.utils.checkpoint import checkpoint
    m.zero_grad(); m(x).square().sum().backward()
    want = {n: p.grad.clone() for n, p in m.named_parameters() if p.requires_grad}
    m.zero_grad(); checkpoint(m, x, use_reentrant=False).square().sum().backward()
    assert all(torch.equal(p.grad, want[n]) for n, p in m.named_parameters() if p.requires_grad)
    torch.compiler.reset()
    with torch.no_grad():
        base = net()
        c = torch.compile(base, backend='eager')
        for change in (lambda: filled(add_lora(base, dora=dora)), lambda: merge_lora(base), lambda: unmerge_lora(base), lambda: remove_lora(base, merge=True)):
            c(x); change()
            assert torch.equal(c(x), base(x))     # what was compiled before does not go on without, or with, the adapters

def test_encoder_fast_path_sees_the_adapters():
    "In evaluation nn.TransformerEncoderLayer reads the weights of its layers and does not call them"
    torch.manual_seed(0)
    enc = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.), 1).eval()
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        base = enc(x)
        add_lora(enc, r=4)
        assert list(lora_layers(enc)) == ['layers.0.linear1', 'layers.0.linear2']
        y = filled(enc)(x)
        assert (y-base).abs().max() > .01
        with merged(enc): torch.testing.assert_close(enc(x), y, rtol=1e-4, atol=1e-5)
    with pytest.raises(TypeError, match='MultiheadAttention'): add_lora(remove_lora(enc), target=['out_proj'])

def bert(): from transformers import BertConfig, BertForSequenceClassification as M; return M(BertConfig(vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, hidden_dropout_prob=0., attention_probs_dropout_prob=0.))
def gpt2(): from transformers import GPT2Config, GPT2LMHeadModel as M; return M(GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=16, resid_pdrop=0., embd_pdrop=0., attn_pdrop=0.))
def llama(): from transformers import LlamaConfig, LlamaForCausalLM as M; return M(LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1))
FAMILIES = dict(bert=(bert, ['query', 'value', 'dense']), gpt2=(gpt2, ['c_attn', 'c_proj', 'c_fc']), llama=(llama, 'all-linear'))
IDS = torch.randint(50, (3, 7), generator=torch.Generator().manual_seed(0))
LABELS = dict(bert=torch.tensor([0, 1, 1]), gpt2=IDS, llama=IDS)

def pair(family, kind, dtype=torch.float64, dropout=0.):
    "The same model with PEFT's adapters and with ours, with the same numbers"
    peft = pytest.importorskip('peft')
    make, target = FAMILIES[family]
    torch.manual_seed(0)
    base = make().to(dtype).train()
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=4, lora_alpha=6, target_modules=target, use_dora=kind == 'dora', use_rslora=kind == 'rslora', lora_dropout=dropout, init_lora_weights=False, fan_in_fan_out=family == 'gpt2'))
    with torch.no_grad():
        for n, p in theirs.named_parameters():
            if 'magnitude' in n: p.mul_(1+.2*torch.rand_like(p))
    ours = add_lora(base, r=4, alpha=6, target=target, dora=kind == 'dora', rslora=kind == 'rslora', dropout=dropout)
    return theirs, load_lora(ours, peft.get_peft_model_state_dict(theirs))

@pytest.mark.parametrize('dropout', [0., .3])
@pytest.mark.parametrize('kind', ['lora', 'rslora', 'dora'])
@pytest.mark.parametrize('family', FAMILIES)
def test_agrees_with_peft(family, kind, dropout):
    for dtype, tol in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
        theirs, ours = pair(family, kind, dtype, dropout)
        out = []
        for m in (theirs, ours):
            torch.manual_seed(3)                  # the same dropout
            o = m(input_ids=IDS, labels=LABELS[family])
            o.loss.backward()
            out.append(o.logits.detach())
        torch.testing.assert_close(out[1], out[0], rtol=tol, atol=tol)
        grads = {n.removeprefix('base_model.model.').replace('_A.default.weight', '.A').replace('_B.default.weight', '.B').replace('_magnitude_vector.default.weight', '.m'): p.grad for n, p in theirs.named_parameters() if p.requires_grad}
        mine = {n: p.grad for n, p in ours.named_parameters() if p.requires_grad}
        assert mine.keys() == grads.keys() and len(mine) > 8
        for n in mine: torch.testing.assert_close(mine[n], grads[n], rtol=10*tol, atol=tol)

@pytest.mark.parametrize('kind', ['lora', 'rslora', 'dora'])
@pytest.mark.parametrize('family', FAMILIES)
def test_folders_both_ways(family, kind, tmp_path):
    peft = pytest.importorskip('peft')
    theirs, ours = pair(family, kind)
    make = FAMILIES[family][0]
    base = {k: v for k, v in remove_lora(copy.deepcopy(ours)).state_dict().items()}
    def fresh(): m = make().double(); m.load_state_dict(base); return m.eval()
    y = ours.eval()(input_ids=IDS).logits
    save_lora(ours, tmp_path/'ours'); theirs.save_pretrained(tmp_path/'theirs')
    assert sorted(p.name for p in (tmp_path/'ours').iterdir()) == ['adapter_config.json', 'adapter_model.safetensors']
    loaded = peft.PeftModel.from_pretrained(fresh(), tmp_path/'ours').eval()
    torch.testing.assert_close(loaded(input_ids=IDS).logits, y, rtol=1e-6, atol=1e-6)
    k = load_lora(fresh(), tmp_path/'theirs')
    torch.testing.assert_close(k(input_ids=IDS).logits, y, rtol=1e-12, atol=1e-12)
    assert same(lora_state_dict(k), lora_state_dict(ours)) and same(lora_state_dict(load_lora(fresh(), tmp_path/'ours')), lora_state_dict(ours))
    config = json.loads((tmp_path/'theirs'/'adapter_config.json').read_text())
    for change, what in ((dict(lora_alpha=7), 'scale'), (dict(peft_type='IA3'), 'IA3'), (dict(bias='all'), 'biases'), (dict(init_lora_weights='pissa'), 'pissa'), (dict(use_qalora=True), 'use_qalora')):
        (tmp_path/'theirs'/'adapter_config.json').write_text(json.dumps({**config, **change}))
        before = bits(k)
        with pytest.raises(ValueError, match=what): load_lora(k, tmp_path/'theirs')
        assert same(bits(k), before)

def test_ranks_that_differ_and_a_head_that_was_trained_along(tmp_path):
    peft = pytest.importorskip('peft')
    torch.manual_seed(0)
    base = bert().eval()
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=2, lora_alpha=4, task_type='SEQ_CLS', target_modules=['query', 'value'], rank_pattern={'layer.0.attention.self.query': 3}, alpha_pattern={'value': 9}, modules_to_save=['classifier'], init_lora_weights=False)).eval()
    with torch.no_grad(): theirs.base_model.model.classifier.modules_to_save['default'].weight.mul_(2)
    theirs.save_pretrained(tmp_path/'a')
    assert 'score' in json.loads((tmp_path/'a'/'adapter_config.json').read_text())['modules_to_save']     # which BERT does not have
    ours = load_lora(copy.deepcopy(base), tmp_path/'a')
    y = theirs(input_ids=IDS).logits
    torch.testing.assert_close(ours(input_ids=IDS).logits, y, rtol=1e-5, atol=1e-6)
    assert {l.lora.r for l in lora_layers(ours).values()} == {2, 3} and {l.lora.alpha for l in lora_layers(ours).values()} == {4, 9}
    assert [n for n, p in ours.named_parameters() if p.requires_grad and 'lora' not in n] == ['classifier.weight', 'classifier.bias']
    save_lora(ours, tmp_path/'b')
    torch.testing.assert_close(peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path/'b').eval()(input_ids=IDS).logits, y, rtol=1e-5, atol=1e-6)

@pytest.mark.parametrize('family,task', [('bert', 'SEQ_CLS'), ('gpt2', 'CAUSAL_LM'), ('llama', 'CAUSAL_LM')])
def test_all_linear_is_pefts(family, task):
    peft = pytest.importorskip('peft')
    theirs = peft.get_peft_model(FAMILIES[family][0](), peft.LoraConfig(target_modules='all-linear', task_type=task, fan_in_fan_out=family == 'gpt2'))
    names = {n.removeprefix('base_model.model.') for n, m in theirs.named_modules() if hasattr(m, 'lora_A')}
    assert set(lora_layers(add_lora(FAMILIES[family][0]()))) == names

def test_tied_weights_stay_tied():
    m = gpt2().eval()
    assert m.lm_head.weight is m.transformer.wte.weight
    filled(add_lora(m))
    y = m(input_ids=IDS).logits
    with merged(m): assert m.lm_head.weight is m.transformer.wte.weight; torch.testing.assert_close(m(input_ids=IDS).logits, y, rtol=1e-4, atol=1e-5)
    remove_lora(m)
    assert m.lm_head.weight is m.transformer.wte.weight
    with pytest.raises(ValueError, match='lm_head and|and lm_head'): add_lora(m, target=['lm_head'])

def test_flags_come_back_as_they_were():
    m = net()
    m[0].requires_grad_(False); m[4].bias.requires_grad_(False)
    was = [p.requires_grad for p in m.parameters()]
    add_lora(m, target=['0', '2'], train=['4'])
    assert [n for n, p in m.named_parameters() if p.requires_grad and 'lora' not in n] == ['4.weight', '4.bias']
    assert [p.requires_grad for p in remove_lora(m).parameters()] == was
    for part, name in ((m[:1], '0'), (m[2:], '2')): add_lora(part, target=[name])
    assert [p.requires_grad for p in remove_lora(m, merge=True).parameters()] == was

def test_saved_inside_merged_is_an_ordinary_model(tmp_path):
    from transformers import LlamaForCausalLM
    m = filled(add_lora(llama().eval(), dora=True))
    with merged(m): m.save_pretrained(tmp_path); y = m(input_ids=IDS).logits
    torch.testing.assert_close(LlamaForCausalLM.from_pretrained(tmp_path).eval()(input_ids=IDS).logits, y)

def test_transformers_trainer_stops_and_resumes(tmp_path):
    pytest.importorskip('accelerate')
    from transformers import Trainer, TrainingArguments
    data = [dict(input_ids=i, labels=torch.tensor(int(i.sum()) % 2)) for i in torch.randint(50, (16, 7), generator=torch.Generator().manual_seed(1))]
    def train(steps, folder, **kw):
        torch.manual_seed(0)
        m = add_lora(bert(), r=4, dora=True, train='classifier')
        before = {n: p.detach().clone() for n, p in m.named_parameters()}
        args = TrainingArguments(tmp_path/folder, per_device_train_batch_size=8, max_steps=steps, learning_rate=1e-2, lr_scheduler_type='constant', report_to=[], use_cpu=True, save_steps=2, disable_tqdm=True, gradient_checkpointing=True)
        Trainer(model=m, args=args, train_dataset=data).train(**kw)
        moved = {n for n, p in m.named_parameters() if not torch.equal(p, before[n])}
        assert moved == {n for n, p in m.named_parameters() if p.requires_grad} and all('lora.' in n or n.startswith('classifier.') for n in moved)
        return m
    whole = train(4, 'a')
    train(2, 'b')
    assert same(bits(train(4, 'b', resume_from_checkpoint=True)), bits(whole))

def test_fastai_learner(tmp_path):
    pytest.importorskip('fastai.callback.schedule')
    import fastai.callback.progress
    from paperbook.core.data import load
    from paperbook.core.models import MLP
    from paperbook.core.training import learner
    torch.manual_seed(0)
    m = add_lora(MLP([64, 32, 10]))
    before = {n: p.detach().clone() for n, p in m.named_parameters()}
    learn = learner(load('digits'), m, torch.optim.AdamW, lr=1e-2)
    learn.path = tmp_path
    with learn.no_bar(), learn.no_logging():
        learn.fit(1); sd = lora_state_dict(m)
        learn.save('a'); learn.fine_tune(1); moved = lora_state_dict(m)     # which freezes and unfreezes
        assert {n for n, p in m.named_parameters() if not torch.equal(p, before[n])} == {f'layers.{i}.lora.{k}' for i in (0, 1) for k in 'AB'}
        assert learn.validate()[0] < 2
        learn.load('a')
    assert same(lora_state_dict(m), sd) and not same(moved, sd)

class Gated(LoRA):
    "As an adapter of another paper is written"
    def __init__(self, layer, *args, gate=.5, **kw): super().__init__(layer, *args, **kw); self.gate = nn.Parameter(torch.tensor(gate))
    def weight(self, layer): W = weight_matrix(layer); return W + self.gate*self.scale*(self.B@self.A)
    def forward(self, layer, x, out): return out + self.gate*(super().forward(layer, x, out)-out)

def test_an_adapter_of_ones_own(tmp_path):
    m = nn.Sequential(conv1d(5, 4), nn.Tanh(), nn.Linear(4, 3))
    k, x, before = copy.deepcopy(m), torch.randn(2, 5), bits(m)
    y = filled(add_lora(m, adapter=Gated, gate=.3))(x)
    y.sum().backward()
    assert all(l.lora.gate.grad != 0 for l in lora_layers(m).values())
    with merged(m): torch.testing.assert_close(m(x), y)
    assert torch.equal(load_lora(add_lora(k, adapter=Gated), lora_state_dict(m))(x), y)
    with pytest.raises(ValueError, match='Gated'): save_lora(m, tmp_path/'a')
    assert not (tmp_path/'a').exists() and same(bits(remove_lora(m)), before)

@pytest.mark.parametrize('dora', [False, True])
def test_compiled_as_one_graph(dora):
    torch.compiler.reset()
    m, x = filled(add_lora(net(), dora=dora)), torch.randn(4, 8)
    c = torch.compile(m, backend='eager', fullgraph=True)
    for _ in range(2):
        assert torch.equal(c(x), m(x))
        with disabled(c): assert torch.equal(c(x), m(x)) and torch.equal(c(x), net()(x))

def test_stacked_models():
    "Many adapted models at once, as the papers train them"
    from paperbook.core.training import train_many, Stack
    from paperbook.core.models import MLP
    make = lambda: filled(add_lora(MLP([8, 6, 3]), r=2, dora=True))
    x, y = torch.randn(32, 8), torch.randint(3, (32,))
    t = train_many(make, x, y, torch.optim.SGD, [0, 1], steps=4, bs=None, lr=.1, schedule='constant')
    torch.manual_seed(1)
    one = make()
    opt = torch.optim.SGD([p for p in one.parameters() if p.requires_grad], lr=.1)
    for _ in range(4): opt.zero_grad(); F.cross_entropy(one(x), y).backward(); opt.step()
    torch.testing.assert_close(t.predict(x)[1], one(x).detach(), rtol=1e-4, atol=1e-5)

def test_account_is_what_the_tensors_take():
    for make in (lambda: net(), lambda: add_lora(net(), dora=True), lambda: add_lora(net().bfloat16()), lambda: gpt2()):
        m = make()
        opt = torch.optim.AdamW([p for p in m.parameters() if p.requires_grad])
        for p in m.parameters(): p.grad = torch.zeros_like(p) if p.requires_grad else None
        opt.step()
        a = account(m)
        assert a.adam == sum(t.nbytes for s in opt.state.values() for t in s.values())
        assert a.gradients == sum(p.grad.nbytes for p in m.parameters() if p.requires_grad) and a.weights == sum(p.nbytes for p in m.parameters())
    m = add_lora(net(), r=2, dora=True)
    assert account(m).trainable == sum(2*(l.in_features+l.out_features)+l.out_features for l in lora_layers(m).values())

BAD = [(dict(r=0), ValueError, 'r must'), (dict(r=True), ValueError, 'r must'), (dict(r=2.), ValueError, 'r must'), (dict(alpha=True), ValueError, 'alpha'), (dict(alpha=0), ValueError, 'alpha'), (dict(alpha=math.nan), ValueError, 'alpha'), (dict(alpha='16'), ValueError, 'alpha'),
       (dict(dropout=1.), ValueError, 'dropout'), (dict(dropout=-.1), ValueError, 'dropout'), (dict(init='zeros'), ValueError, 'kaiming, gaussian'), (dict(init=[]), ValueError, 'init'), (dict(target='q_proj'), ValueError, 'fits none of: 0, 2, 4'), (dict(target=['0', 'q']), ValueError, "'q'"),
       (dict(target='('), ValueError, 'regular'), (dict(target=[]), TypeError, 'target'), (dict(target=3), TypeError, 'target'), (dict(target=[0]), TypeError, 'target'), (dict(target=lambda n, l: False), ValueError, 'function'), (dict(target='1'), TypeError, '1 is Tanh'),
       (dict(train='head'), ValueError, 'train'), (dict(target=['4'], train='4'), ValueError, 'target'), (dict(detach_norm=False), TypeError, 'detach_norm'), (dict(adapter=nn.Linear), TypeError, 'adapter'), (dict(dora=True, adapter=LoRA), ValueError, 'dora')]
@pytest.mark.parametrize('kw,error,message', BAD)
def test_bad_options_change_nothing(kw, error, message):
    m = net()
    before, names = bits(m), [n for n, _ in m.named_modules()]
    with pytest.raises(error, match=message): add_lora(m, **kw)
    assert same(bits(m), before) and names == [n for n, _ in m.named_modules()] and all(p.requires_grad for p in m.parameters()) and not lora_layers(m)

def test_changes_while_merged():
    m = filled(add_lora(net(), dora=True))
    x = torch.randn(3, 8)
    y = m(x)
    merge_lora(m); m.double().eval(); unmerge_lora(m)
    assert not m[0].lora.training and {p.dtype for p in m.parameters()} == {torch.float64}
    torch.testing.assert_close(m(x.double()).float(), y)
    with disabled(m), pytest.raises(ValueError, match='disabled'): merge_lora(m)
    assert m.to('meta')(x.to('meta').double()).shape == y.shape

def test_numbers_of_numpy(tmp_path):
    import numpy as np
    m = filled(add_lora(net(), r=np.int64(3), alpha=np.float32(6)))
    save_lora(m, tmp_path)
    assert m[0].lora.scale == 2 and same(lora_state_dict(load_lora(net(), tmp_path)), lora_state_dict(m))

def test_writing_into_merged_weights_is_not_lost_in_silence():
    import warnings
    m, x = filled(add_lora(net())), torch.randn(2, 8)
    y = m(x)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        with merged(m): m(x); m.double(); m.float()
        k = copy.deepcopy(merge_lora(m)); unmerge_lora(pickle.loads(pickle.dumps(k))); unmerge_lora(k); unmerge_lora(m)
    merge_lora(m).load_state_dict(net(5).state_dict())
    with pytest.warns(UserWarning, match='of 0, 2, 4 were'): unmerge_lora(m)
    biases = {n: p for n, p in net(5).named_parameters() if 'bias' in n}
    m.load_state_dict(biases | {n: net().state_dict()[n] for n in biases}, strict=False)
    assert torch.equal(m(x), y)

def test_wrapped_models(tmp_path):
    m = filled(add_lora(net()))
    w = nn.DataParallel(m)
    assert list(lora_layers(w)) == list(lora_layers(m)) and same(lora_state_dict(w), lora_state_dict(m))
    save_lora(w, tmp_path)
    assert same(lora_state_dict(load_lora(net(), tmp_path)), lora_state_dict(m))
    with pytest.raises(TypeError, match='fully_shard'): lora_layers(nn.ModuleDict({'_fsdp_wrapped_module': m}))
    accelerate = pytest.importorskip('accelerate')
    with pytest.raises(ValueError, match='offloaded'): add_lora(accelerate.cpu_offload(net(), execution_device='cpu'))

def test_a_layer_that_changed_can_be_removed():
    m = add_lora(net(), target=['0'])
    nn.utils.parametrizations.weight_norm(m[4])
    assert not lora_layers(remove_lora(m)) and m[0].weight.requires_grad

def test_a_folder_written_halfway_is_refused(tmp_path, monkeypatch):
    a, b, c = (filled(add_lora(net(), alpha=k), k) for k in (4, 4, 64))
    move = os.replace
    def stop(src, dst):
        if dst.name == 'adapter_config.json': raise KeyboardInterrupt
        move(src, dst)
    save_lora(a, tmp_path)
    monkeypatch.setattr(os, 'replace', stop)
    with pytest.raises(KeyboardInterrupt): save_lora(b, tmp_path)       # the same options: whole all the same
    assert same(lora_state_dict(load_lora(net(), tmp_path)), lora_state_dict(b))
    with pytest.raises(KeyboardInterrupt): save_lora(c, tmp_path)
    with pytest.raises(ValueError, match='no adapter_config'): load_lora(net(), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ['adapter_model.safetensors']
    monkeypatch.undo()
    save_lora(c, tmp_path)
    assert load_lora(net(), tmp_path)[0].lora.alpha == 64

def test_bad_order():
    m = net()
    for f in (merge_lora, unmerge_lora, remove_lora, lora_state_dict, lambda m: save_lora(m, 'x'), lambda m: merged(m).__enter__(), lambda m: disabled(m).__enter__()):
        with pytest.raises(ValueError): f(m)
    with pytest.raises(ValueError, match='add_lora'): load_lora(m, {})
    with pytest.raises(TypeError, match='Module'): add_lora('model')
    with pytest.raises(TypeError, match='Sequential'): add_lora(nn.Linear(2, 2))
    with pytest.raises(ValueError, match='no nn.Linear'): add_lora(nn.Sequential(nn.Tanh()))
    with pytest.raises(ValueError, match='batch'): add_lora(nn.Sequential(nn.LazyLinear(3)))
    add_lora(m)
    with pytest.raises(ValueError, match='already'): add_lora(m)
    merge_lora(m)
    for f in (merge_lora, add_lora, lora_state_dict, lambda m: load_lora(m, {}), lambda m: disabled(m).__enter__()):
        with pytest.raises(ValueError): f(m)
    assert list(lora_layers(unmerge_lora(m))) == ['0', '2', '4']
    p = nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))
    with pytest.raises(TypeError, match='parametrization'): add_lora(nn.Sequential(p))

def test_broken_adapters_and_files(tmp_path):
    m = filled(add_lora(net(), r=2))
    sd, before = lora_state_dict(m), bits(m)
    drop = {k: v for k, v in sd.items() if k != '2.lora.B'}
    for bad, what in ((drop, 'missing: 2.lora.B'), ({**sd, '9.lora.A': sd['0.lora.A']}, 'unexpected: 9'), ({**sd, '0.lora.A': sd['0.lora.A'][:1]}, '0.lora.A is')):
        with pytest.raises(ValueError, match=what): load_lora(m, bad)
    save_lora(m, tmp_path/'a')
    with pytest.raises(ValueError, match='another model'): load_lora(nn.Sequential(nn.Linear(8, 6)), tmp_path/'a')
    with pytest.raises(ValueError, match='no adapter_config'): load_lora(m, tmp_path)
    m[4].lora.B.data[0, 0] = math.nan
    with pytest.raises(ValueError, match='of 4 is not finite'): merge_lora(m)
    assert not m[0].__dict__.get('_unmerged') and list(lora_layers(m)) == ['0', '2', '4']
    with pytest.raises(ValueError, match='not finite'): remove_lora(m, merge=True)
    load_lora(m, sd)
    assert same(bits(m), before)

def test_contexts_restore_after_an_error():
    m = filled(add_lora(net()))
    x, before = torch.randn(2, 8), bits(m)
    y = m(x)
    for c in (merged, disabled):
        with pytest.raises(KeyError):
            with c(m): raise KeyError
        assert torch.equal(m(x), y) and same(bits(m), before)

WORKER = '''
import copy, sys, torch, torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from paperbook.adapt.lora import *
rank, store = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
dist.init_process_group('gloo', init_method=f'file://{store}', rank=rank, world_size=2)
mesh = init_device_mesh('cpu', (2,))
for dora, each in ((False, False), (True, True)):       # sharded as a whole, and layer by layer
    torch.manual_seed(0)
    one = add_lora(nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3)).double(), r=3, dora=dora)
    two = copy.deepcopy(one)
    if each:
        for l in lora_layers(two).values(): fully_shard(l, mesh=mesh)
    fully_shard(two, mesh=mesh)
    x = torch.randn(4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for _ in range(3):
        for m in (one, two):
            m.zero_grad(); m(x).square().mean().backward()
            with torch.no_grad():
                for p in m.parameters():
                    if p.requires_grad: p -= .3*p.grad         # torch.optim takes a second to import, in each process
    a, b = lora_state_dict(one), lora_state_dict(two)
    assert a.keys() == b.keys() and len(a) == 4+2*dora
    for k in a: assert (a[k]-b[k]).abs().max() < 1e-10, (k, dora, each)
    start = lora_state_dict(two)
    load_lora(two, {k: 0*v for k, v in b.items()}); load_lora(two, start)
    assert all(torch.equal(v, start[k]) for k, v in lora_state_dict(two).items())
    for bad in (lambda: merge_lora(two), lambda: add_lora(fully_shard(nn.Sequential(nn.Linear(4, 4)), mesh=mesh))):
        try: bad(); raise SystemExit('no error')
        except ValueError as e: assert 'sharded' in str(e)
half = fully_shard(add_lora(nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 3)).bfloat16(), dora=True), mesh=mesh)      # two precisions
half(torch.ones(2, 8, dtype=torch.bfloat16)).sum().backward()
assert all((p.grad is not None) == p.requires_grad for p in half.parameters())
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
