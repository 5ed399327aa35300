"""
fused_step.py against PyTorch: linear layers, the drawing of a token, whole blocks.

The kernels run here under Triton's interpreter, in a child process, see interpreter.py; the tests
marked gpu hold the same promises on a GPU.
"""

import copy
from dataclasses import dataclass

import pytest
import torch
from interpreter import interpreted, needs_triton, run_interpreted

from model import GPT, MLP, GPTConfig, Linear, MultiHeadAttention, Norm
from model_mla import GPT_MLA, MultiHeadLatentAttention
from nanomla.inference import fused_step
from nanomla.inference.cache import Cache
from nanomla.inference.generate import Sampling, choose


@needs_triton
@pytest.mark.early
@pytest.mark.parametrize('which', ['not slow', pytest.param('slow', marks=pytest.mark.slow)])
def test_under_the_interpreter(which, request):
    run_interpreted(request, which)


@dataclass
class LinearCase:
    """A call of fused_linear: B rows of C channels, N outputs."""

    B: int
    C: int
    N: int
    norm: str | None
    act: str
    bias: bool
    residual: bool


LINEAR_CASES = [
    LinearCase(1, 40, 24, 'layernorm', '', True, False),
    LinearCase(1, 33, 10, None, 'gelu', False, True),
    LinearCase(1, 64, 12, 'rmsnorm', 'swiglu', True, False),
    LinearCase(1, 64, 9, None, 'relu2', True, True),
    LinearCase(3, 40, 24, 'layernorm', 'gelu_tanh', True, False),
    LinearCase(5, 130, 33, 'rmsnorm', 'swiglu', True, True),
    LinearCase(17, 64, 20, None, 'gelu', True, True),
    LinearCase(2, 64, 9, 'layernorm', 'relu2', False, False),
]


def double(x):
    return None if x is None else x.double()


@interpreted
@pytest.mark.parametrize('case', LINEAR_CASES, ids=str)
@torch.no_grad()
def test_interpreted_linear(case):
    rows = 2 * case.N if case.act == 'swiglu' else case.N
    x = torch.randn(case.B, case.C) + 0.5
    weight = torch.randn(rows, case.C) * case.C**-0.5
    norm = bias = residual = None
    if case.norm:
        norm = Norm(case.C, GPTConfig(bias=case.bias), kind=case.norm)
        for p in norm.parameters():
            p.normal_()
    if case.bias:
        bias = torch.randn(rows)
    if case.residual:
        residual = torch.randn(case.B, case.N)
    want = fused_step.fused_linear_reference(
        x.double(),
        weight.double(),
        double(bias),
        copy.deepcopy(norm).double() if norm else None,
        case.act,
        double(residual),
    )
    got = fused_step.fused_linear(x, weight, bias, norm, case.act, residual)
    assert (got.double() - want).abs().max() < 1e-5 * want.abs().max()


@interpreted
@pytest.mark.parametrize('B', [1, 3])
def test_interpreted_linear_of_every_head(B):
    wide, weight = torch.randn(B, 3, 50), torch.randn(3, 24, 40)
    x = wide[..., 5:45]
    want = torch.einsum('bhc,hnc->bhn', x, weight)
    torch.testing.assert_close(fused_step.fused_linear(x, weight), want, rtol=1e-4, atol=1e-4)
    x = x[..., :24]
    want = torch.einsum('bhc,hcn->bhn', x, weight)
    torch.testing.assert_close(fused_step.fused_linear(x, weight.mT), want, rtol=1e-4, atol=1e-4)


@interpreted
@pytest.mark.parametrize('top_k, temperature', [(0, 1.3), (1, 0.7), (20, 0.7), (999, 1)])
def test_interpreted_draws_are_those_of_generate(top_k, temperature):
    logits = torch.randn(4, 700).bfloat16()  # many are equal
    logits[3] = 0
    logits[2, 5:] = -torch.inf
    logits = logits[:, :650]
    draw = torch.tensor([0, 0.3, 0.6, 0.999])
    got = fused_step.choose(logits, draw, temperature, top_k, block=256)
    want = choose(logits.float(), draw, Sampling(temperature, top_k, vocab_size=650))
    assert torch.equal(got, want)


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
    'gated': ('gated', dict(pos='rope', norm='rmsnorm', n_kv_head=1, bias=False)),
    'gated_mla': ('gated_mla', dict(qk_norm=True, softmax_scale=0.25, v_head_dim=6)),
}
CACHE_OPTIONS = {
    'gpt2': {},
    'llama': dict(layout='paged', page_size=16),
    'gqa': {},
    'attention_only': {},
    'mla': dict(layout='paged', page_size=16),
    'mla_q_latent': {},
    'mla_qk_latent': {},
    'mla_early': dict(layout='paged', page_size=16),
    'mla_converted': {},
    'gated': {},
    'gated_mla': dict(layout='paged', page_size=16),
}


@torch.no_grad()
def decoded(model, ids, fuse, **options):
    """
    Return the logits of the last 2 of ids (B, T), decoded one by one after prompts of different
    lengths, and the cache.
    """
    cache = Cache.of(model, len(ids), 32, fuse=fuse, **options)
    for store in cache.stores:
        for buffer in store.buffers:
            buffer.fill_(torch.nan if buffer.is_floating_point() else 0)
    cache.plan([ids.size(1) - 2 - b for b in range(len(ids))])
    prompt = torch.stack([row.roll(b) for b, row in enumerate(ids)])[:, : ids.size(1) - 2]
    model(prompt, context=cache)
    last_two = range(ids.size(1) - 2, ids.size(1))
    steps = [fused_step.hidden(model, ids[:, t : t + 1], cache) for t in last_two]
    return model.lm_head(torch.cat(steps, dim=1)), cache


def variant_params():
    """Return the names of the variants; all but four are slow."""
    params = []
    for name in VARIANTS:
        marks = () if name in ('gpt2', 'llama', 'mla', 'gated_mla') else pytest.mark.slow
        params.append(pytest.param(name, marks=marks))
    return params


@interpreted
@pytest.mark.parametrize('variant', variant_params())
def test_interpreted_blocks(variant, tiny, tokens, monkeypatch):
    kind, settings = VARIANTS[variant]
    model = tiny(kind, **(dict(n_layer=1) | settings))
    blocks_run, run_block = [], fused_step.run_block

    def counted(block, *args):
        blocks_run.append(block)
        return run_block(block, *args)

    monkeypatch.setattr(fused_step, 'run_block', counted)
    for B in (1, 2) if variant in ('gpt2', 'mla', 'gated_mla') else (2,):
        blocks_run.clear()
        want, plain = decoded(model, tokens(8, B=B), False, **CACHE_OPTIONS[variant])
        assert not blocks_run
        got, cache = decoded(model, tokens(8, B=B), True, **CACHE_OPTIONS[variant])
        assert len(blocks_run) == 2 * model.config.n_layer and cache.kernel == 'triton'
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
    got, cache = decoded(model, tokens(8), True, dtype='int8', window=4)
    want, _ = decoded(model, tokens(8), False, dtype='int8', window=4)
    assert cache.kernel == 'triton'
    torch.testing.assert_close(got, want, rtol=0, atol=1e-3)


class OtherMLP(MLP):
    pass


class OtherNorm(Norm):
    pass


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
    assert fused_step.can_fuse(*fusable)


@torch.no_grad()
def test_prompts_gradients_and_other_dtypes_are_not_fused(fusable):
    block, x, layer = fusable
    assert not fused_step.can_fuse(block, torch.zeros(2, 2, 32), layer)
    assert not fused_step.can_fuse(block, x.bfloat16(), layer)
    with torch.enable_grad():
        assert not fused_step.can_fuse(block, x, layer)


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
        lambda block, layer: setattr(block, 'mlp', OtherMLP(GPTConfig(n_head=4, n_embd=32)).eval()),
        lambda block, layer: setattr(block, 'ln_2', OtherNorm(32, GPTConfig())),
    ],
)
def test_what_a_fused_block_does_not_compute_is_not_fused(change, fusable):
    block, x, layer = fusable
    change(block, layer)
    assert not fused_step.can_fuse(block, x, layer)


def test_32_bit_logits_are_not_ordered_by_the_kernel():
    assert not fused_step.can_choose(torch.zeros(1, 9), 1.0, 1.0)


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
    """MLA with two latents, each read by half of the heads: blocks of W^UK and W^UV are zero."""

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
    idx = torch.randint(40, (2, 10), device=device)
    cache = Cache.of(model, 2, 32, kernel=kernel)
    assert cache.kernel == kernel
    with torch.no_grad():
        model(idx[:, :8], context=cache)
        for t in range(8, 10):
            got = model.lm_head(fused_step.hidden(model, idx[:, t : t + 1], cache))[:, -1]
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
