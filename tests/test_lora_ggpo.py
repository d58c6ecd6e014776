"GGPO and MGPO on real architectures: transformers with checkpointing and accumulation, PEFT's adapters, convolutions, half precision, callbacks"
import copy, math, pickle, warnings
import pytest, torch
from torch import nn
from torch.nn import functional as F
from paperbook.adapt.lora import add_lora, lora_layers, remove_lora, merge_lora, unmerge_lora
from paperbook.generalization import lora_ggpo as L
from paperbook.generalization.lora_ggpo import GGPO, MGPO, SAM, GGPOCallback, MGPOCallback, flat_lora, expected_sharpness, perturb_trainer_callback

gen = lambda s=0: torch.Generator().manual_seed(s)

def llama(**kw):
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=32, **kw))

def tilted(model):
    "Adapters that are no longer at their start"
    torch.manual_seed(1)
    for n, p in model.named_parameters():
        if p.requires_grad: nn.init.normal_(p, std=.1)
    return model

def peft_model(model, targets=('q_proj', 'v_proj'), **kw):
    peft = pytest.importorskip('peft')
    return tilted(peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, target_modules=list(targets), **kw)))

def batches(n=4):
    ids = torch.randint(32, (n, 3, 10), generator=gen())
    return [dict(input_ids=i, labels=i) for i in ids]

def grads(model): return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
def free(model): return [p for p in model.parameters() if p.requires_grad]

@pytest.mark.parametrize('make', [lambda: tilted(add_lora(llama(), r=4)), lambda: peft_model(llama())], ids=['own', 'peft'])
@pytest.mark.parametrize('noise', ['weight', 'batch', 'token'])
def test_checkpointing_and_accumulation(make, noise):
    "Two micro-batches a step, backward inside or after perturb(): the same gradients with and without checkpointing, of both kinds"
    out = {}
    for kind in (None, False, True):
        for inside in (True, False):
            model = make().train()
            if kind is not None:
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=dict(use_reentrant=kind))
                model.enable_input_require_grads()
            ggpo = GGPO(model, .2, generator=gen(1), noise=noise)
            frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
            for b in batches(2):
                with ggpo.perturb():
                    loss = model(**b).loss
                    if inside: loss.backward()
                if not inside: loss.backward()
            assert not ggpo._handles
            out[kind, inside] = grads(model)
            ggpo.update_norms()
            assert ggpo.steps == 1 and all(b.any() for b in ggpo.b2)
            for n, p in model.named_parameters(): assert p.requires_grad or torch.equal(p, frozen[n])
    want = out[None, True]
    for k, g in out.items(): torch.testing.assert_close(g, want, atol=1e-4*float(want.abs().max()), rtol=1e-3, msg=str(k))

def test_each_micro_batch_has_its_own_noise():
    model = tilted(add_lora(llama(), r=4)); ggpo = GGPO(model, .2, generator=gen())
    b, losses = batches(1)[0], []
    for _ in range(2):
        with ggpo.perturb(): losses += [model(**b).loss.item(), model(**b).loss.item()]
    assert losses[0] == losses[1] and losses[2] == losses[3] and losses[0] != losses[2]

def test_equals_peft():
    "The same adapters in PEFT and here: the same rows, the same noise, the same loss"
    peft = pytest.importorskip('peft')
    a = peft_model(llama())
    b = add_lora(llama(), r=4, alpha=8, target=['q_proj', 'v_proj'])
    ours = lora_layers(b)
    for n, m in a.base_model.model.named_modules():
        if n in ours: ours[n].lora.A.data.copy_(m.lora_A['default'].weight); ours[n].lora.B.data.copy_(m.lora_B['default'].weight)
    out = []
    for model in (a, b):
        ggpo = GGPO(model.train(), .3, beta=5., generator=gen(2))
        for batch in batches(2):
            with ggpo.perturb(): loss = model(**batch).loss
            loss.backward(); ggpo.update_norms()
        out.append((loss.item(), torch.cat([ggpo.row_std(i) for i in range(4)])))
    assert math.isclose(out[0][0], out[1][0], rel_tol=1e-5)
    torch.testing.assert_close(out[0][1], out[1][1], rtol=1e-4, atol=1e-7)

@pytest.mark.parametrize('width', [dict(kernel_size=3, padding=1), dict(kernel_size=(1, 3), stride=2, padding='valid', padding_mode='zeros')])
def test_convolutions_of_peft(width):
    peft = pytest.importorskip('peft')
    torch.manual_seed(0)
    net = tilted(peft.get_peft_model(nn.Sequential(nn.Conv2d(2, 5, **width), nn.Flatten()), peft.LoraConfig(r=3, lora_alpha=6, target_modules=['0'])))
    x, ggpo = torch.randn(2, 2, 6, 6, requires_grad=True), GGPO(net.train(), .5, generator=gen(3))
    layer = net.base_model.model[0]
    W = (layer.get_base_layer().weight+layer.get_delta_weight('default')).detach()
    torch.testing.assert_close(ggpo.row_std(0)[:, 0], .5*W.flatten(1).norm(dim=1)/W[0].numel()**.5)
    seed = torch.randint(2**62, (1,), generator=gen(3)).tolist()[0]
    with ggpo.perturb(): y = net(x)
    eps = L._weight_noise(ggpo.layers[0], ggpo.row_std(0), seed).view_as(W)
    base = layer.get_base_layer()
    want = F.conv2d(x, W+eps, base.bias, base.stride, base.padding).flatten(1)
    torch.testing.assert_close(y, want, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(torch.autograd.grad(y.square().sum(), x)[0], torch.autograd.grad(want.square().sum(), x)[0], atol=1e-3, rtol=1e-3)
    opt = torch.optim.AdamW(free(net)); mgpo = MGPO(opt, net, space='weight')
    for _ in range(2):
        opt.zero_grad()
        with mgpo.perturb(): net(x).square().mean().backward()
        mgpo.update_norms(); opt.step()

def test_conv1d_of_gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel
    model = tilted(add_lora(GPT2LMHeadModel(GPT2Config(vocab_size=32, n_positions=16, n_embd=16, n_layer=1, n_head=2)), r=2)).train()
    ggpo = GGPO(model, .3)
    l = next(l for l in ggpo.layers if l.name.endswith('c_attn'))
    assert (l.m, l.n) == (48, 16)
    with ggpo.perturb(): loss = model(**batches(1)[0]).loss
    loss.backward(); ggpo.update_norms()

def test_what_is_not_w_plus_sba_is_refused():
    peft = pytest.importorskip('peft')
    with pytest.raises(ValueError, match='W \\+ sBA'): GGPO(peft_model(llama(), use_dora=True))
    with pytest.raises(ValueError, match='no LoRA layers'): GGPO(llama())
    merged = peft_model(llama()); merged.merge_adapter()
    with pytest.raises(ValueError, match='merged'): GGPO(merged)
    later = peft_model(llama()).train(); ggpo = GGPO(later); later.merge_adapter()
    with pytest.raises(RuntimeError, match='merged or removed'), ggpo.perturb(): pass
    with pytest.warns(UserWarning, match='embeddings'): GGPO(peft_model(llama(), ('q_proj', 'embed_tokens')))
    groups = peft.get_peft_model(nn.Sequential(nn.Conv2d(4, 4, 3, groups=2)), peft.LoraConfig(r=2, target_modules=['0']))
    with pytest.raises(TypeError, match='groups'): GGPO(groups)

def test_two_adapters_at_once_and_disabled_ones():
    peft = pytest.importorskip('peft')
    model = peft_model(llama())
    model.add_adapter('second', peft.LoraConfig(r=2, lora_alpha=6, target_modules=['q_proj', 'v_proj']))
    model.base_model.set_adapter(['default', 'second']); tilted(model).train()
    ggpo, layer = GGPO(model, .5), None
    layer = ggpo.layers[0]
    W = (layer.base.weight+sum(layer.module.get_delta_weight(k) for k in ('default', 'second'))).detach()
    torch.testing.assert_close(ggpo.row_std(0)[:, 0], .5*W.norm(dim=1)/W.shape[1]**.5)
    b = batches(1)[0]
    with model.disable_adapter():
        clean = model(**b).loss
        with ggpo.perturb(): assert torch.equal(model(**b).loss, clean)

def test_model_is_as_before():
    "A copy, a pickle and the state dict know nothing of GGPO"
    model = tilted(add_lora(llama(), r=4)).train(); keys = list(model.state_dict()); ggpo = GGPO(model, .2)
    hooks = [len(m._forward_hooks) for m in model.modules()]
    with ggpo.perturb(): model(**batches(1)[0])
    assert hooks == [len(m._forward_hooks) for m in model.modules()] and list(model.state_dict()) == keys
    twin = copy.deepcopy(model)
    with ggpo.perturb(): torch.testing.assert_close(twin(**batches(1)[0]).loss, model.eval()(**batches(1)[0]).loss)

def test_sigma_zero_and_a_crash_with_dropout():
    def run(sigma):
        torch.manual_seed(3)
        model = tilted(add_lora(llama(attention_dropout=.3), r=4, dropout=.2)).train()
        opt, ggpo = torch.optim.AdamW(free(model), 1e-2), None if sigma is None else GGPO(model, sigma)
        torch.manual_seed(4)
        for b in batches(3):
            opt.zero_grad()
            if ggpo:
                with ggpo.perturb(): model(**b).loss.backward()
                ggpo.update_norms()
            else: model(**b).loss.backward()
            opt.step()
        return torch.cat([p.detach().flatten() for p in free(model)])
    assert torch.equal(run(None), run(0.)) and not torch.equal(run(None), run(.1))

def test_first_step_is_lora_and_backward_crash_leaves_nothing():
    model = tilted(add_lora(llama(), r=4)).train(); ggpo = GGPO(model, .2); b = batches(1)[0]
    clean = model(**b).loss
    class Boom(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x): return x.clone()
        @staticmethod
        def backward(ctx, g): raise KeyError('boom')
    with ggpo.perturb(): loss = Boom.apply(model(**b).loss)
    with pytest.raises(KeyError): loss.backward()
    h = model.model.embed_tokens.register_full_backward_hook(lambda *a: None); h.remove()
    assert torch.equal(model(**b).loss, clean)
    model.gradient_checkpointing_enable(); model.enable_input_require_grads()
    q = model.model.layers[0].self_attn.q_proj.lora
    hook = q.A.register_hook(lambda g: (_ for _ in ()).throw(KeyError('late')))
    with ggpo.perturb(): loss = model(**b).loss
    with pytest.raises(KeyError): loss.backward()
    hook.remove()
    torch.testing.assert_close(model(**b).loss, clean)                     # hooks may be left, noise is not
    with ggpo.perturb(): model(**b).loss.backward()
    assert not ggpo._handles

@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision_and_autocast(dtype):
    b = batches(1)[0]
    model = tilted(add_lora(llama().to(dtype), r=4)).train(); ggpo = GGPO(model, .1)
    with ggpo.perturb(): loss = model(**b).loss
    loss.backward(); ggpo.update_norms()
    assert ggpo.row_std(0).dtype == torch.float32 and ggpo.row_std(0).isfinite().all() and loss.isfinite()
    if dtype == torch.bfloat16:
        model = tilted(add_lora(llama(), r=4)).train()
        opt = torch.optim.AdamW(free(model)); methods = GGPO(model, .1), MGPO(opt, model, space='weight')
        for m in methods:
            for _ in range(2):
                opt.zero_grad()
                with torch.autocast('cpu', dtype):
                    with m.perturb(): model(**b).loss.backward()
                    m.update_norms()
                opt.step()
        want = methods[0].row_std(0); methods[0].steps += 1                # forget what was kept
        with torch.autocast('cpu', dtype): torch.testing.assert_close(methods[0].row_std(0), want, rtol=0, atol=0)

def test_the_noise_follows_a_fused_or_hand_written_step():
    "Weights that were changed without torch noticing are seen at the next step"
    model = tilted(add_lora(llama(), r=4)); ggpo = GGPO(model, .2)
    p = ggpo.layers[0].params()[1]; before = ggpo.row_std(0)
    p.data.mul_(3); ggpo.update_norms()
    assert not torch.equal(ggpo.row_std(0), before)

def trainer(tmp_path, model, opt, callbacks, acc=2):
    transformers = pytest.importorskip('transformers')
    class Data(torch.utils.data.Dataset):
        def __len__(self): return 24
        def __getitem__(self, i): ids = (torch.arange(10)+i) % 32; return dict(input_ids=ids, labels=ids)
    args = transformers.TrainingArguments(str(tmp_path), per_device_train_batch_size=2, gradient_accumulation_steps=acc, max_steps=6, save_strategy='no', report_to=[], use_cpu=True, gradient_checkpointing=True,
                                          gradient_checkpointing_kwargs=dict(use_reentrant=False), disable_tqdm=True, logging_steps=100)
    return transformers.Trainer(model, args, train_dataset=Data(), optimizers=(opt, None), callbacks=callbacks)

@pytest.mark.parametrize('kind', ['ggpo', 'mgpo', 'mgpo-weight'])
def test_trainer(tmp_path, kind):
    pytest.importorskip('accelerate')
    model = tilted(add_lora(llama(), r=4)); opt = torch.optim.AdamW(free(model), 1e-3)
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    m = GGPO(model, .2) if kind == 'ggpo' else MGPO(opt, model, .1, space='weight' if 'weight' in kind else 'factors')
    drawn, perturb = [], type(m).perturb
    m.perturb = lambda *a: drawn.append(1) or perturb(m, *a)
    trainer(tmp_path, model, opt, [perturb_trainer_callback(m)]).train()
    assert len(drawn) == 12 and m._draw is None and not m._handles        # 6 steps of two micro-batches
    if kind == 'ggpo': assert m.steps == 6
    else: assert m.norms[0] > 0
    for n, p in model.named_parameters(): assert p.requires_grad or torch.equal(p, frozen[n])
    with pytest.raises(TypeError, match='GGPO or MGPO'): perturb_trainer_callback(SAM(model))

def test_fastai_with_accumulation():
    pytest.importorskip('fastai')
    from fastai.callback.training import GradientAccumulation
    from paperbook.core.data import load
    from paperbook.core.models import MLP
    from paperbook.core.training import learner
    for cb in (GGPOCallback(sigma=.2), MGPOCallback(rho=.05)):
        torch.manual_seed(0)
        net = add_lora(MLP([64, 16, 10]), r=2, target=r'layers\.\d')
        frozen = {n: p.clone() for n, p in net.named_parameters() if not p.requires_grad}
        learn = learner(load('digits'), net, torch.optim.AdamW, lr=1e-2, cbs=[cb, GradientAccumulation(128)])
        steps = []
        with learn.no_bar(), learn.no_logging():
            learn.fit(1)
            assert not cb.method._handles and cb.method._draw is None
            learn.fit(1)
        if isinstance(cb, GGPOCallback): assert 0 < cb.method.steps <= len(learn.dls.train)//2+1
        for n, p in net.named_parameters(): assert p.requires_grad or torch.equal(p, frozen[n])
        again = pickle.loads(pickle.dumps(cb)); assert again.options == cb.options and copy.deepcopy(cb).options == cb.options
    from fastai.callback.core import Callback
    class Crash(Callback):
        order = 99
        def after_pred(self): raise ZeroDivisionError('mine')
    cb = MGPOCallback(); learn = learner(load('digits'), add_lora(MLP([64, 16, 10]), r=2, target=r'layers\.\d'), torch.optim.AdamW, cbs=[cb, Crash()])
    with learn.no_bar(), pytest.raises(ZeroDivisionError): learn.fit(1)
    cb.close(); assert cb.method._draw is None

def test_momentum_is_found_in_wrappers_and_named_where_it_is_not():
    model = tilted(add_lora(llama(), r=4))
    with pytest.raises(RuntimeError, match="momentum_buffer"): MGPO(torch.optim.SGD(free(model), .1), model)
    with pytest.raises(ValueError, match='has not the factors'): MGPO(torch.optim.SGD(nn.Linear(2, 2).parameters(), .1, momentum=.9), model)
    from fastai.optimizer import OptimWrapper
    opt = OptimWrapper(free(model), torch.optim.AdamW, lr=1e-3)
    mgpo = MGPO(opt, model); assert L._inner(opt) is opt.opt
    with mgpo.perturb(): model(**batches(1)[0]).loss.backward()
    mgpo.update_norms(); opt.step(); opt.zero_grad()
    clean = model(**batches(1)[0]).loss
    with mgpo.perturb(): assert not torch.equal(model(**batches(1)[0]).loss, clean)
    assert torch.equal(model(**batches(1)[0]).loss, clean)

def test_flat_lora_and_the_ramp():
    model = tilted(add_lora(llama(), r=4)); flat = flat_lora(model, .1, steps=10)
    assert flat.row_std(0).max() == 0
    flat.steps = 10; end = flat.row_std(0)
    flat.steps = 5; torch.testing.assert_close(flat.row_std(0), end/2)
    assert flat.beta == 0 and flat_lora(model).row_std(0).min() > 0
    with pytest.raises(ValueError, match='steps'): flat_lora(model, steps=0)

def test_sharpness_leaves_the_model_alone():
    model = tilted(add_lora(llama(), r=4)).train(); model.model.layers[0].eval(); b = batches(1)[0]
    loss = lambda m, b: m(**b).loss
    assert math.isfinite(expected_sharpness(model, loss, b, .2, n=4))
    assert model.training and not model.model.layers[0].training
    def fails(m, b): raise KeyError('mine')
    with pytest.raises(KeyError): expected_sharpness(model, fails, b)
    assert model.training and not model.model.layers[0].training
    assert expected_sharpness(model, loss, b, 0., n=1) == 0

def test_training_on_after_a_reload():
    def run(stop):
        model = tilted(add_lora(llama(), r=4)).train(); opt, ggpo = torch.optim.AdamW(free(model), 1e-2), GGPO(model, .2, generator=gen(5))
        for t, b in enumerate(batches(4)):
            if t == stop:
                state = copy.deepcopy((model.state_dict(), opt.state_dict(), ggpo.state_dict()))
                model = add_lora(llama(), r=4).train(); model.load_state_dict(state[0])
                opt, ggpo = torch.optim.AdamW(free(model), 1e-2), GGPO(model, .2)
                opt.load_state_dict(state[1]); ggpo.load_state_dict(state[2])
            opt.zero_grad()
            with ggpo.perturb(): model(**b).loss.backward()
            ggpo.update_norms(); opt.step()
        return torch.cat([p.detach().flatten() for p in free(model)])
    torch.testing.assert_close(run(None), run(2), atol=1e-6, rtol=1e-5)
