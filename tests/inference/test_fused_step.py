"""
step_kernels.py against PyTorch: thin products, the choice of a token, whole blocks. As in test_decode_kernels.py the kernels run
under Triton's interpreter in a child process that one test starts; the tests marked gpu hold the same promises on a GPU.
"""

import pytest
import torch
from interpreter import interpreted, needs_triton, run_interpreted

from model import GPT, MLP, GPTConfig, Linear, MultiHeadAttention, Norm
from model_mla import GPT_MLA, MultiHeadLatentAttention
from nanomla.inference import fused_step as s
from nanomla.inference.cache import Cache
from nanomla.inference.generate import Sampling, choose


@needs_triton
@pytest.mark.parametrize('which', ['not slow', pytest.param('slow', marks=pytest.mark.slow)])
def test_under_the_interpreter(which):
    run_interpreted(__file__, which)


def off(B, C, N, kind, act, bias, add, device='cpu', dtype=torch.float32):
    """The largest error of `thin` against its reference in float64, as a share of the largest result."""

    def random(*shape):
        return torch.randn(*shape, device=device, dtype=dtype)

    norm = Norm(C, GPTConfig(bias=bias), kind=kind).to(device, dtype) if kind else None
    with torch.no_grad():
        for p in norm.parameters() if norm else ():
            p.normal_()
        rows = N * (2 if act == 'swiglu' else 1)
        x, weight, bias, add = (
            random(B, C) + 0.5,
            random(rows, C) * C**-0.5,
            random(rows) if bias else None,
            random(B, N) if add else None,
        )
        got = s.fused_linear(x, weight, bias, norm, act, add if add is None else add.clone())
        x, weight, bias, add = (None if t is None else t.double() for t in (x, weight, bias, add))
        want = s.fused_linear_reference(x, weight, bias, norm.double() if norm else None, act, add)
    return ((got.double() - want).abs().max() / want.abs().max()).item()


CASES = [
    (1, 40, 24, 'layernorm', '', True, False),
    (1, 33, 10, None, 'gelu', False, True),
    (1, 64, 12, 'rmsnorm', 'swiglu', True, False),
    (1, 64, 9, None, 'relu2', True, True),
    (3, 40, 24, 'layernorm', 'gelu_tanh', True, False),
    (5, 130, 33, 'rmsnorm', 'swiglu', True, True),
    (17, 64, 20, None, 'gelu', True, True),
    (2, 64, 9, 'layernorm', 'relu2', False, False),
]


@interpreted
@pytest.mark.parametrize('case', CASES, ids=str)
def test_interpreted_thin(case):
    assert off(*case) < 1e-5


@interpreted
@pytest.mark.parametrize('B', [1, 3])
def test_interpreted_thin_of_every_head(B):
    wide, weight = torch.randn(B, 3, 50), torch.randn(3, 24, 40)
    x = wide[..., 5:45]
    torch.testing.assert_close(
        s.fused_linear(x, weight), torch.einsum('bhc,hnc->bhn', x, weight), rtol=1e-4, atol=1e-4
    )
    torch.testing.assert_close(
        s.fused_linear(x[..., :24], weight.mT),
        torch.einsum('bhc,hcn->bhn', x[..., :24], weight),
        rtol=1e-4,
        atol=1e-4,
    )


def chosen(device, PART):
    """The kernel's choices and those of decoding.choose."""
    logits = torch.randn(4, 700, device=device).bfloat16()  # many are equal
    logits[3] = 0
    logits[2, 5:] = -torch.inf
    draw = torch.tensor([0, 0.3, 0.6, 0.999], device=device)
    for top_k, temperature in ((0, 1.3), (1, 0.7), (20, 0.7), (999, 1)):
        yield (
            s.choose(logits[:, :650], draw, temperature, top_k, block=PART),
            choose(logits.float(), draw, Sampling(temperature, top_k, vocab_size=650)),
        )


@interpreted
def test_interpreted_choice():
    assert all(torch.equal(*pair) for pair in chosen('cpu', 256))


VARIANTS = {
    'gpt2': ('mha', {}),
    'llama': ('mha', dict(pos='rope', norm='rmsnorm', act='swiglu', bias=False, rope_scaling=2.0)),
    'gqa': ('mha', dict(pos='rope', n_kv_head=2, qk_norm=True, act='relu2')),
    'attention_only': ('mha', dict(pos='none', n_kv_head=1, mlp=False)),
    'mla': ('mla', {}),
    'mla_q_latent': ('mla', dict(q_lora_rank=9, qk_norm=True, v_head_dim=6, act='gelu_tanh')),
    'mla_qk_latent': ('mla', dict(qk_norm=True, qk_norm_latent=True)),
    'mla_early': (
        'mla',
        dict(qk_rope_head_dim=0, latent_norm=False, latent_init='gpt2', pos='learned'),
    ),
    'mla_converted': (
        'mla',
        dict(
            source_head_dim=16,
            qk_rope_head_dim=8,
            qk_nope_head_dim=6,
            kv_lora_ranks=(8, 12),
            n_layer=2,
        ),
    ),
}
HOW = {
    'gpt2': {},
    'llama': dict(layout='paged', page_size=16),
    'gqa': {},
    'attention_only': {},
    'mla': dict(layout='paged', page_size=16),
    'mla_q_latent': {},
    'mla_qk_latent': {},
    'mla_early': dict(layout='paged', page_size=16),
    'mla_converted': {},
}


@torch.no_grad()
def decoded(model, ids, fuse, **how):
    """Logits of the last 2 of ids (B, T), decoded one by one behind prompts of different lengths, and the cache."""
    cache = Cache.of(model, len(ids), 32, fuse=fuse, **how)
    for store in cache.stores:
        for buffer in store.buffers:
            buffer.fill_(torch.nan if buffer.is_floating_point() else 0)
    cache.plan([ids.size(1) - 2 - b for b in range(len(ids))])
    prompt = torch.stack([row.roll(b) for b, row in enumerate(ids)])[:, : ids.size(1) - 2]
    model(prompt, context=cache)
    last_two = range(ids.size(1) - 2, ids.size(1))
    steps = [s.hidden(model, ids[:, t : t + 1], cache) for t in last_two]
    return model.lm_head(torch.cat(steps, dim=1)), cache


@interpreted
@pytest.mark.parametrize(
    'variant',
    [
        v if v in ('gpt2', 'llama', 'mla') else pytest.param(v, marks=pytest.mark.slow)
        for v in VARIANTS
    ],
)
def test_interpreted_blocks(variant, tiny, tokens, monkeypatch):
    model = tiny(VARIANTS[variant][0], **dict(n_layer=1) | VARIANTS[variant][1])
    for B in (1, 2) if variant in ('gpt2', 'mla') else (2,):
        calls, run_block = [], s.run_block
        monkeypatch.setattr(s, 'run_block', lambda *args: calls.append(1) or run_block(*args))
        (got, cache), (want, plain) = (
            decoded(model, tokens(8, B=B), fuse, **HOW[variant]) for fuse in (True, False)
        )
        monkeypatch.setattr(s, 'run_block', run_block)
        assert len(calls) == 2 * model.config.n_layer and cache.kernel == 'triton'
        torch.testing.assert_close(got, want, rtol=0, atol=1e-4)
        for a, b in zip(cache.stores, plain.stores):
            torch.testing.assert_close(a.data[0], b.data[0], rtol=0, atol=1e-4, equal_nan=True)


@interpreted
@pytest.mark.parametrize(
    'kind, settings',
    [
        ('mla', dict(n_head=2, kv_lora_rank=64)),
        pytest.param('mha', dict(pos='rope', n_embd=64, n_head=1), marks=pytest.mark.slow),
    ],
)
def test_interpreted_quantised_blocks(kind, settings, tiny, tokens):
    model = tiny(kind, n_layer=1, **settings)
    (got, cache), (want, _) = (
        decoded(model, tokens(8), fuse, dtype='int8', window=4) for fuse in (True, False)
    )
    assert cache.kernel == 'triton'
    torch.testing.assert_close(got, want, rtol=0, atol=1e-3)


@pytest.fixture
def fusable(tiny):
    """A block, one token for it, and a layer of a cache that says Triton reads it."""
    cache = Cache([dict(k=32, v=32)], 2, 8, kernel='torch')
    cache.plan(1)
    cache.begin(1)
    cache.end()
    cache.plan(1)
    cache.begin(1)
    cache.kernel = 'triton'
    return tiny().transformer.h[0], torch.zeros(2, 1, 32), cache.layers[0]


@torch.no_grad()
def test_a_plain_block_can_be_fused(fusable):
    assert s.can_fuse(*fusable)


@torch.no_grad()
def test_prompts_gradients_and_other_dtypes_are_not_fused(fusable):
    block, x, layer = fusable
    assert not s.can_fuse(block, torch.zeros(2, 2, 32), layer)
    assert not s.can_fuse(block, x.bfloat16(), layer)
    with torch.enable_grad():
        assert not s.can_fuse(block, x, layer)


@torch.no_grad()
@pytest.mark.parametrize(
    'change',
    [
        lambda block, layer: setattr(layer.cache, 'fuse', False),
        lambda block, layer: setattr(layer.cache, 'kernel', 'flex'),
        lambda block, layer: setattr(layer.cache.current, 'fresh', True),
        lambda block, layer: setattr(block.attn, 'kernel', 'eager'),
        lambda block, layer: block.train(),
        lambda block, layer: block.mlp.c_fc.register_forward_hook(lambda *args: None),
        lambda block, layer: block.attn.register_forward_pre_hook(lambda *args: None),
        lambda block, layer: setattr(block.attn, 'c_proj', torch.nn.Linear(32, 32)),  # an adapter's
        lambda block, layer: setattr(block.attn, 'forward', block.attn.forward),
        lambda block, layer: setattr(
            block, 'mlp', type('Wider', (MLP,), {})(GPTConfig(n_head=4, n_embd=32)).eval()
        ),
        lambda block, layer: setattr(block, 'ln_2', type('Other', (Norm,), {})(32, GPTConfig())),
    ],
)
def test_what_a_fused_block_does_not_compute_is_not_fused(change, fusable):
    block, x, layer = fusable
    change(block, layer)
    assert not s.can_fuse(block, x, layer)


def test_32_bit_logits_are_not_ordered_by_the_kernel():
    assert not s.can_choose(torch.zeros(1, 9), 1.0, 1.0)


# -------------------------------------------------------------------------------------------------
# attentions that the fused step does not know


class GatedAttention(MultiHeadAttention):
    """MHA with a gate on its output."""

    def __init__(self, config, layer=0):
        super().__init__(config, layer)
        self.gate = Linear(config.n_embd, config.n_embd)

    def forward(self, x, rope, context=None):
        return self.gate(x).sigmoid() * super().forward(x, rope, context)


class GatedGPT(GPT):
    Attention = GatedAttention


class GroupedLatentAttention(MultiHeadLatentAttention):
    """MLA with two latents, each read by half of the heads: two blocks of W^UK and W^UV are zero."""

    def read_out(self, q_nope, q_pe, c_kv, k_pe):
        first, second = (c_kv * mask for mask in self.masks(c_kv))
        q, k, v = super().read_out(q_nope, q_pe, first, k_pe)
        _, k_second, v_second = super().read_out(q_nope, q_pe, second, k_pe)
        half = self.n_head // 2
        k = torch.cat([k[:, :half], k_second[:, half:]], dim=1)
        return q, k, torch.cat([v[:, :half], v_second[:, half:]], dim=1)

    def masks(self, c_kv):
        in_first = torch.arange(c_kv.size(-1), device=c_kv.device) < c_kv.size(-1) // 2
        return in_first, ~in_first


class GroupedGPT(GPT_MLA):
    Attention = GroupedLatentAttention


class ShiftedGPT(GPT):
    """A model with a pass of its own."""

    def hidden(self, idx, context=None):
        return super().hidden(idx, context) + 1


OTHER_MODELS = dict(gate=GatedGPT, latent_groups=GroupedGPT, own_pass=ShiftedGPT)


def check_plain_path(model_class, device, kernel, dtype=torch.float32, atol=1e-5):
    """Decoding from a cache gives the logits of the model without one."""
    torch.manual_seed(0)
    config = dict(block_size=32, vocab_size=40, n_layer=2, n_head=4, n_embd=128)
    if issubclass(model_class, GPT_MLA):
        config |= dict(kv_lora_rank=64, qk_rope_head_dim=16)
    model = model_class(model_class.Config(**config)).eval()
    with torch.no_grad():
        for p in model.parameters():  # large enough that each part moves the logits
            if p.ndim == 2:
                p.normal_(std=p.size(1) ** -0.5)
    model.to(device, dtype).stream = dtype
    idx = torch.randint(40, (2, 12), device=device)
    cache = Cache.of(model, 2, 32, kernel=kernel)
    assert cache.kernel == kernel
    with torch.no_grad():
        model(idx[:, :8], context=cache)
        for t in range(8, 12):
            got = model.lm_head(s.hidden(model, idx[:, t : t + 1], cache))[:, -1]
            want = model(idx[:, : t + 1])[:, -1]
            torch.testing.assert_close(got, want, rtol=0, atol=atol)


@interpreted
@pytest.mark.parametrize('name', OTHER_MODELS)
def test_interpreted_other_attentions_take_the_plain_path(name):
    check_plain_path(OTHER_MODELS[name], 'cpu', 'triton')


@pytest.mark.parametrize('name', OTHER_MODELS)
def test_other_attentions_decode_with_the_torch_kernel(name):
    check_plain_path(OTHER_MODELS[name], 'cpu', 'torch')


@pytest.mark.gpu
@pytest.mark.parametrize('name', OTHER_MODELS)
def test_gpu_other_attentions_take_the_plain_path(name):
    check_plain_path(OTHER_MODELS[name], 'cuda', 'triton', torch.bfloat16, atol=0.1)


def test_a_subclass_makes_no_claim_that_its_base_class_makes():
    for attention in (GatedAttention, GroupedLatentAttention):
        assert attention.fused_step is None
        assert attention.circuit_weights is None
        assert not attention.can_absorb
