"GradNormLoRP: adapters beside peft's and under FSDP, hooks on inputs, projectors against a plain SVD, quantisation against bitsandbytes, states in the middle of a period"
import copy, io, math, os, pickle, subprocess, sys, warnings
import pytest, torch
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.nn import functional as F
from paperbook.adapt.lora import add_lora, disabled, lora_layers, lora_state_dict, load_lora, merge_lora, merged, remove_lora, save_lora, unmerge_lora
from paperbook.optim import gradnormlorp as G
from paperbook.optim.gradnormlorp import *

gen = lambda s=0: torch.Generator().manual_seed(s)
def net(seed=0): torch.manual_seed(seed); return nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 6), nn.Tanh(), nn.Linear(6, 4))
def filled(m, seed=1):
    g = gen(seed)
    for l in lora_layers(m).values():
        with torch.no_grad(): l.lora.B.normal_(generator=g); l.lora.M += .3*torch.randn(l.lora.M.shape, generator=g)
    return m

def test_column_norms_are_not_doras_rows():
    m = filled(add_gradnorm_lora(net(), r=2))
    W = m[0].lora.weight(m[0])
    torch.testing.assert_close(W.norm(dim=0), m[0].lora.M.abs())
    assert m[0].lora.M.shape == (8,) and add_lora(net(), dora=True)[0].lora.m.shape == (12,)

def test_the_machinery_of_lora_works_with_it(tmp_path):
    m, x = filled(add_gradnorm_lora(net(), r=2)), torch.randn(5, 8)
    y, base = m(x), net()(x)
    with merged(m): torch.testing.assert_close(m(x), y, rtol=1e-4, atol=1e-6)
    assert torch.equal(m(x), y)
    with disabled(m): assert torch.equal(m(x), base)
    k = pickle.loads(pickle.dumps(copy.deepcopy(m))); assert torch.equal(k(x), y)
    assert torch.equal(load_lora(add_gradnorm_lora(net(), r=2), lora_state_dict(m))(x), y)
    with pytest.raises(ValueError, match='WeightNormLoRA'): save_lora(m, tmp_path/'a')
    remove_lora(m); assert torch.equal(m(x), base) and not m[0]._forward_pre_hooks and not m[0]._forward_hooks
    k = merge_all(k); torch.testing.assert_close(k(x), y, rtol=1e-4, atol=1e-6)
    assert not k[0]._forward_pre_hooks and k[0].weight.requires_grad
    with pytest.raises(RuntimeError, match='nothing to merge'): merge_all(k)
    merge_lora(m := filled(add_gradnorm_lora(net(), r=2))); merge_all(m); torch.testing.assert_close(m(x), y, rtol=1e-4, atol=1e-6)

def test_input_by_keyword_and_fast_path_of_the_encoder():
    m = filled(add_gradnorm_lora(net(), r=2)); x = torch.randn(3, 8)
    assert torch.equal(m[0](input=x), m[0](x))
    torch.manual_seed(0)
    enc = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval(); s = torch.randn(2, 5, 16)
    a = filled(add_gradnorm_lora(copy.deepcopy(enc), r=2))
    out = a(s); assert (out-enc(s)).abs().max() > .01
    torch.testing.assert_close(merge_all(a)(s), out, rtol=1e-3, atol=1e-4)

def test_gpt2_layers_keep_their_weight_the_other_way_round():
    from transformers import GPT2Config, GPT2LMHeadModel
    torch.manual_seed(0)
    m = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2, n_positions=8)).eval()
    ids = torch.arange(8)[None]
    filled(add_gradnorm_lora(m, r=2)); y = m(ids).logits
    with merged(m): torch.testing.assert_close(m(ids).logits, y, rtol=1e-3, atol=1e-4)
    with pytest.raises(TypeError, match='Conv1D'): apply_weight_norm(remove_lora(m))

def test_dropout_zero_columns_half_precision_compile():
    m = add_gradnorm_lora(net(), r=2, dropout=.5); x = torch.randn(64, 8)
    filled(m).train(); assert not torch.equal(m(x), m(x)); m.eval(); assert torch.equal(m(x), m(x))
    s = WeightNormLoRALinear(nn.Linear(8, 4), r=2, dropout=.5); nn.init.normal_(s.adapter.B); assert not torch.equal(s(x), s(x))
    for put in (lambda m: add_gradnorm_lora(m, r=2), apply_weight_norm):
        m = net(); m[0].weight.data[:, 3] = 0; m = put(m)
        opt = torch.optim.SGD([p for p in m.parameters() if p.requires_grad], .1)
        for _ in range(3): opt.zero_grad(); m(x).square().sum().backward(); opt.step()
        assert all(p.isfinite().all() for p in m.parameters())
        h = put(net().bfloat16()); h(x.bfloat16()).sum().backward(); assert all(p.grad.isfinite().all() for p in h.parameters() if p.requires_grad)
        h = net(); h[0].weight.data[:, 3] = 0; assert put(h.half())(x.half()).isfinite().all()
        with torch.autocast('cpu', dtype=torch.bfloat16): assert m(x).isfinite().all()
    torch.compiler.reset()
    m = filled(add_gradnorm_lora(net(), r=2)); c = torch.compile(m, backend='eager', fullgraph=True); assert torch.equal(c(x), m(x))

BAD = [(dict(r=0), ValueError, 'r must'), (dict(r=5), ValueError, 'r must'), (dict(r=2.), ValueError, 'r must'), (dict(alpha=-1), ValueError, 'alpha'), (dict(dropout=1.), ValueError, 'dropout'), (dict(target_modules='q'), ValueError, 'fits none'),
       (dict(target_modules=['1']), TypeError, 'Tanh'), (dict(target_modules=3), TypeError, 'target')]
@pytest.mark.parametrize('kw,error,message', BAD)
def test_bad_options_change_nothing(kw, error, message):
    m = net(); before = copy.deepcopy(m.state_dict())
    with pytest.raises(error, match=message): add_gradnorm_lora(m, **{'r': 2, **kw})
    if 'target_modules' in kw:
        with pytest.raises(error, match=message): apply_weight_norm(m, kw['target_modules'])
    assert all(torch.equal(v, before[k]) for k, v in m.state_dict().items()) and not lora_layers(m) and all(p.requires_grad for p in m.parameters())

def test_bad_order():
    m = add_gradnorm_lora(net(), r=2)
    with pytest.raises(ValueError, match='adapter'): add_gradnorm_lora(m, r=2)
    with pytest.raises(ValueError, match='adapter'): apply_weight_norm(m)
    with pytest.raises(TypeError, match='Module'): merge_all('model')
    w = apply_weight_norm(net())
    with pytest.raises(ValueError, match='no nn.Linear'): add_gradnorm_lora(w)
    w[0].magnitude.data[0] = math.nan
    with pytest.raises(ValueError, match='of 0 is not finite'): merge_all(w)
    assert isinstance(w[0], WeightNormLinear)

@settings(max_examples=40, deadline=None)
@given(m=st.integers(1, 9), n=st.integers(1, 9), batch=st.integers(0, 3), q=st.integers(1, 9), two=st.booleans(), seed=st.integers(0, 99))
def test_projector_catches_the_best_part(m, n, batch, q, two, seed):
    D = torch.randn(*([batch] if batch else []), m, n, generator=gen(seed), dtype=torch.float64)
    P = LowRankProjector(min(q, m, n), 'two' if two else 'one'); P.refresh(D)
    s = torch.linalg.svdvals(D)
    torch.testing.assert_close((D-P.up(P.down(D))).square().sum((-1, -2)), s[..., P.rank:].square().sum(-1), atol=1e-9, rtol=1e-7)

def test_codes_are_those_of_bitsandbytes():
    bnb = pytest.importorskip('bitsandbytes.functional')
    for signed in (True, False): torch.testing.assert_close(G._code(signed, torch.device('cpu'))[0], bnb.create_dynamic_map(signed=signed).sort().values, atol=1e-7, rtol=1e-5)

@settings(max_examples=30, deadline=None)
@given(shape=st.lists(st.integers(1, 40), min_size=0, max_size=3).map(tuple), size=st.integers(1, 300), signed=st.booleans(), scale=st.floats(1e-20, 1e20))
def test_quantisation_is_to_the_nearest_level(shape, size, signed, scale):
    x = torch.randn(shape, generator=gen(len(shape)))*scale
    x = x if signed else x.abs()
    c, top = quantize_blockwise(x, signed, size); y = dequantize_blockwise(c, top, signed, size)
    assert y.shape == x.shape and c.dtype == torch.uint8 and ((y-x).abs() <= .0071*x.abs()+.04*G._blocks(x, size).abs().max()).all()
    assert ((y > 0) | (x <= 0)).all() or signed

def test_state_in_the_middle_of_a_period_is_exact():
    "Projectors, codes and ages come back to the bit, also through torch's weights-only load and in bfloat16"
    for dtype in (torch.float32, torch.bfloat16):
        for kw in (dict(), dict(side='two'), dict(state_bits=8, block_size=64), dict(side='two', state_bits=8, reset_states=True)):
            def fresh(): torch.manual_seed(0); m = apply_weight_norm(nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 20))).to(dtype); return m, GradNormLoRPAdamW(trainable_parameters(m, rank=4, update_proj_gap=4, **kw), lr=1e-2)
            x = torch.randn(16, 20, generator=gen()).to(dtype)
            def run(m, o, n):
                for _ in range(n): o.zero_grad(); (m(x)-1).square().mean().backward(); o.step()
            m, o = fresh(); run(m, o, 6)
            f = io.BytesIO(); torch.save((m.state_dict(), o.state_dict()), f); f.seek(0); a, b = torch.load(f, weights_only=True)
            k, p = fresh(); k.load_state_dict(a); p.load_state_dict(b)
            for s, t in zip(o.state.values(), p.state.values()):
                assert s.keys() == t.keys() and all(torch.equal(s[n], t[n]) and s[n].dtype == t[n].dtype for n in s if torch.is_tensor(s[n])) and s['step'] == t['step'] == 6
            run(m, o, 6); run(k, p, 6)
            assert all(torch.equal(u, v) for u, v in zip(m.parameters(), k.parameters()))

def test_full_rank_with_fixed_bases_is_adam_in_rotated_coordinates():
    W, D = torch.randn(9, 5, generator=gen(), dtype=torch.float64), [torch.randn(9, 5, generator=gen(i), dtype=torch.float64) for i in range(6)]
    Q = LowRankProjector(5); Q.refresh(D[0])
    p, r = nn.Parameter(W.clone()), nn.Parameter(W@Q.right)
    a, b = GradNormLoRPAdamW([p], lr=.1, rank=5, update_proj_gap=100, eps=1e-30), torch.optim.AdamW([r], lr=.1, weight_decay=0., eps=1e-30)
    for d in D: p.grad, r.grad = d.clone(), d@Q.right; a.step(); b.step()
    torch.testing.assert_close(p.detach(), r.detach()@Q.right.T)

def test_blocks_run_along_directions():
    "A small direction beside a large one keeps its 8-bit averages"
    p, q = (nn.Parameter(torch.zeros(512, 4)) for _ in 'pq')
    D = torch.randn(512, 4, generator=gen())*torch.tensor([1., 1e-3, 1e-4, 1e-5])
    a, b = (GradNormLoRPAdamW([x], lr=.1, rank=4, eps=1e-12, state_bits=k) for x, k in ((p, 8), (q, 32)))
    for _ in range(3): p.grad, q.grad = D.clone(), D.clone(); a.step(); b.step()
    assert ((p-q).norm(dim=0)/q.norm(dim=0)).max() < .05 and a.state[p]['exp_avg'].shape == (4, 512)

def test_an_error_changes_nothing_and_layerwise_hooks_work():
    m = net(); o = GradNormLoRPAdamW(m.parameters(), rank=2, state_bits=8)
    m(torch.randn(4, 8)).sum().backward(); m[4].weight.grad[0, 0] = math.nan
    before = [p.detach().clone() for p in m.parameters()]
    with pytest.raises(ValueError, match='Nothing was changed'): o.step()
    assert all(torch.equal(p, q) for p, q in zip(before, m.parameters())) and not o.state
    opts = {p: GradNormLoRPAdamW([p], rank=2, lr=1e-2) for p in m.parameters()}
    def update(p): opts[p].step(); p.grad = None
    m.zero_grad()
    for p in m.parameters(): p.register_post_accumulate_grad_hook(update)
    m(torch.randn(4, 8)).square().sum().backward()
    assert all(p.grad is None and not torch.equal(p, q) for p, q in zip(m.parameters(), before))

WORKER = '''
import copy, sys, torch, torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from paperbook.optim.gradnormlorp import *
rank, store = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
dist.init_process_group('gloo', init_method=f'file://{store}', rank=rank, world_size=2)
mesh = init_device_mesh('cpu', (2,))
for put in (lambda m: add_gradnorm_lora(m, r=3), apply_weight_norm):
    for kw in (dict(), dict(side='two', state_bits=8)):
        torch.manual_seed(0)
        one = put(nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3)).double())
        two = copy.deepcopy(one)
        for l in two: fully_shard(l, mesh=mesh)
        fully_shard(two, mesh=mesh)
        a, b = (GradNormLoRPAdamW(trainable_parameters(m, rank=2, update_proj_gap=2, **kw), lr=1e-2) for m in (one, two))
        x = torch.randn(4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        for _ in range(4):
            for m, o in ((one, a), (two, b)): o.zero_grad(); (m(x)-1).square().mean().backward(); o.step()
        for p, q in zip(one.parameters(), two.parameters()): assert (q.full_tensor()-p).abs().max() < 1e-9, kw
        b.load_state_dict(b.state_dict())
        try: merge_all(two); raise SystemExit('no error')
        except ValueError as e: assert 'sharded' in str(e)
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
