"""
step_kernels.py against PyTorch: thin products, the choice of a token, whole blocks. As in test_decode_kernels.py the kernels run
under Triton's interpreter in a child process that one test starts; the tests marked gpu hold the same promises on a GPU.
"""

import pytest
import torch
from interpreter import interpreted, needs_triton, run_interpreted

from model import GPTConfig, Norm
from nanomla.inference import fused_step as s
from nanomla.inference import generate as decoding
from nanomla.inference.cache import Cache


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
            s.choose(logits[:, :650], draw, temperature, top_k, PART=PART),
            decoding.choose(logits.float(), temperature, top_k, vocab_size=650, draw=draw),
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
    return torch.cat(
        [model(ids[:, t : t + 1], context=cache) for t in range(ids.size(1) - 2, ids.size(1))],
        dim=1,
    ), cache


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
        calls, block = [], s.block
        monkeypatch.setattr(s, 'block', lambda *args: calls.append(1) or block(*args))
        (got, cache), (want, plain) = (
            decoded(model, tokens(8, B=B), fuse, **HOW[variant]) for fuse in (True, False)
        )
        monkeypatch.setattr(s, 'block', block)
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


@torch.no_grad()
def test_what_a_fused_block_does_not_stand_for(tiny):
    class Layer:
        fresh, cache = False, Cache([dict(k=32, v=32)], 2, 8, kernel='torch')
        extend = None

    model, x = tiny(), torch.zeros(2, 1, 32)
    block, Layer.cache.kernel = model.transformer.h[0], 'triton'
    assert s.serves(block, x, Layer)
    assert not s.serves(block, torch.zeros(2, 2, 32), Layer) and not s.serves(
        block, x.bfloat16(), Layer
    )
    with torch.enable_grad():
        assert not s.serves(block, x, Layer)
    hook = block.mlp.c_fc.register_forward_hook(lambda *args: None)
    assert not s.serves(block, x, Layer)
    hook.remove()
    for owner, name, value in (
        (Layer, 'fresh', True),
        (Layer.cache, 'fuse', False),
        (Layer.cache, 'kernel', 'flex'),
        (block.attn, 'kernel', 'eager'),
        (block, 'training', True),
    ):
        before = getattr(owner, name)
        setattr(owner, name, value)
        assert not s.serves(block, x, Layer)
        setattr(owner, name, before)
    block.attn.c_proj = torch.nn.Linear(32, 32)  # such as an adapter's
    assert not s.serves(block, x, Layer)
    assert not s.chooses(torch.zeros(1, 9), 1.0, 1.0)  # 32 bits, which the kernel does not order


def test_what_is_as_likely_as_the_last_of_top_k_is_kept():
    logits, draw = torch.tensor([[1.0, 3, 2, 2, 2]] * 100), torch.linspace(0, 0.999, 100)
    assert set(decoding.choose(logits, top_k=2, draw=draw).tolist()) == {1, 2, 3, 4}
    assert set(decoding.choose(logits, top_k=1, draw=draw).tolist()) == {1}


# -------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize(
    'case',
    CASES
    + [
        (1, 768, 2304, 'layernorm', '', False, False),
        (64, 3072, 768, None, '', False, True),
        (64, 768, 3072, 'layernorm', 'gelu', True, False),
        (8, 768, 50304, 'layernorm', '', False, False),
        (1, 2048, 11008, 'rmsnorm', 'swiglu', False, False),
        (1, 8192, 64, None, '', False, True),
    ],
    ids=str,
)
def test_gpu_thin(case):
    assert off(*case, device='cuda', dtype=torch.bfloat16) < 1.5e-2


@pytest.mark.gpu
def test_gpu_choice():
    for got, want in chosen('cuda', 512):
        assert torch.equal(got, want)
    logits, draw = (
        3 * torch.randn(64, 50304, device='cuda').bfloat16(),
        torch.rand(64, device='cuda'),
    )
    got, want = (
        s.choose(logits[:, :50257], draw, 0.8, 200),
        decoding.choose(logits.float(), 0.8, 200, vocab_size=50257, draw=draw),
    )
    assert (got == want).float().mean() > 0.95  # sums of 50257 numbers round a little differently


@pytest.mark.gpu
@pytest.mark.parametrize('B', [1, 5])
@pytest.mark.parametrize('variant', VARIANTS)
def test_gpu_blocks(variant, B, tiny, tokens):
    kind, settings = VARIANTS[variant]
    settings = settings | (
        dict(n_embd=128)
        if kind == 'mha'
        else dict(n_embd=128, kv_lora_rank=64)
        if 'kv_lora_ranks' not in settings
        else {}
    )
    model = tiny(kind, **settings).to('cuda').bfloat16()
    model.stream = torch.bfloat16
    (got, cache), (want, _) = (
        decoded(model, tokens(8, B=B).cuda(), fuse, **HOW[variant]) for fuse in (True, False)
    )
    assert cache.kernel == 'triton'
    exact = (
        decoded(model.float(), tokens(8, B=B).cuda(), False, **HOW[variant], kernel='torch')[0]
        if setattr(model, 'stream', torch.float32) is None
        else None
    )
    assert (got.float() - exact).abs().max() < 2 * (want.float() - exact).abs().max() + 0.02


def compiled(kernel, constants, **types):
    """Assembly of a kernel for an H200, without one: arguments are pointers and numbers by `types`, or constants; x_head and the like are multiples of 16."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = [parameter.name for parameter in kernel.params]
    types |= {name: 'constexpr' for name in constants}
    whole = {
        (i,): [['tt.divisibility', 16]]
        for i, name in enumerate(names)
        if types[name][0] == '*' or name in ('x_head', 'w_out', 'w_head')
    }
    source = ASTSource(
        kernel,
        {name: types[name] for name in names},
        {(names.index(name),): value for name, value in constants.items()},
        whole,
    )
    return triton.compile(source, target=GPUTarget('cuda', 90, 32), options=dict(num_warps=4)).asm[
        'ptx'
    ]


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize(
    'NORM, ACT, BIAS, ADD',
    [
        ('layernorm', 'gelu', True, False),
        ('', 'swiglu', True, False),
        ('rmsnorm', 'gelu_tanh', False, False),
        ('', 'relu2', False, True),
    ],
)
def test_kernels_compile_for_an_h200(NORM, ACT, BIAS, ADD):
    """The interpreter takes more for Python than Triton's compiler does."""
    kernels, SHIFT = s.kernels(), NORM == 'layernorm'
    constants = dict(C=768, N=3072, NORM=NORM, ACT=ACT, BIAS=BIAS, SHIFT=SHIFT, ADD=ADD, w_in=1)
    there = dict(bias=BIAS, gain=bool(NORM), shift=SHIFT, add=ADD)
    types = dict.fromkeys(
        ['x', 'weight', 'out'] + [name for name in there if there[name]], '*bf16'
    ) | dict.fromkeys(('x_head', 'w_head', 'w_out'), 'i32')
    constants |= {name: None for name in there if not there[name]}
    assert '.entry' in compiled(kernels.one, constants | dict(CP=1024, TILE=4), eps='fp32', **types)
    if NORM:
        types = dict.fromkeys(['x', 'gain', 'out'] + ['shift'] * SHIFT, '*bf16') | dict(
            eps='fp32', stride='i32'
        )
        assert '.entry' in compiled(
            kernels.norm,
            dict(C=768, CP=1024, NORM=NORM, SHIFT=SHIFT) | ({} if SHIFT else dict(shift=None)),
            **types,
        )
    if ADD:
        types = (
            dict.fromkeys(('high', 'low', 'leasts'), '*i32')
            | dict.fromkeys(('largest', 'sums', 'draws'), '*fp32')
            | dict(
                logits='*bf16',
                tokens='*i64',
                stride='i32',
                V='i32',
                k='i32',
                parts='i32',
                inverse='fp32',
            )
        )
        for kernel in (kernels.high, kernels.low, kernels.sum, kernels.draw):
            names = [parameter.name for parameter in kernel.params]
            assert '.entry' in compiled(
                kernel,
                {name: value for name, value in dict(PART=2048, SP=32).items() if name in names},
                **{name: kind for name, kind in types.items() if name in names},
            )
