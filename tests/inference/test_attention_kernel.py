"""
attention_kernel.py against attention in float64 over what the cache says it holds, and against
what cache.py writes itself.

The kernels run here under Triton's interpreter, in a child process, see interpreter.py; the tests
marked gpu hold the same promises on a GPU.
"""

import random
from dataclasses import dataclass

import pytest
import torch
from interpreter import ROOT, interpreted, needs_triton, python, run_interpreted

from nanomla.inference import attention_kernel
from nanomla.inference.attention_kernel import GpuLimits, Problem
from nanomla.inference.cache import Cache
from nanomla.inference.generate import DecodeStep, Sampling, generate, prefill
from nanomla.inference.quantize import dequantise, group_of


@needs_triton
@pytest.mark.early
@pytest.mark.parametrize('which', ['not slow', pytest.param('slow', marks=pytest.mark.slow)])
def test_under_the_interpreter(which, request):
    run_interpreted(request, which)


@dataclass
class Heads:
    """Attention heads: H queries, K keys and values of width C; P: width of MLA's k_pe, or None."""

    H: int
    K: int
    C: int
    P: int | None

    @property
    def latent(self) -> bool:
        return self.P is not None

    @property
    def cache_dims(self) -> dict[str, int]:
        if self.latent:
            return dict(c_kv=self.C, k_pe=self.P)
        return dict(k=self.K * self.C, v=self.K * self.C)


def filled_cache(dims, lengths, size, device='cpu', full=torch.float32, **options):
    """
    Return a cache of one layer whose sequences hold `lengths` random tokens, in shuffled pages.
    Every slot that holds none is nan.
    """
    cache = Cache([dims], len(lengths), size, full=full, device=device, kernel='torch', **options)
    for store in cache.stores:
        for buffer in store.buffers:
            if buffer.is_floating_point():
                buffer.fill_(torch.nan)
    if cache.pages:
        random.Random(0).shuffle(cache.pages.free)
    cache.plan(lengths)
    cache.begin(max(lengths))
    new = {}
    for name, width in dims.items():
        new[name] = torch.randn(len(lengths), max(lengths), width, device=device, dtype=full)
    cache.layers[0].append(**new)
    cache.end()
    return cache


def cached(cache, name):
    """Return a store's contents, (B, size, C) in fp32, by its addresses, codes and window."""
    store = cache.layers[0].stores[name]
    row = torch.arange(cache.rows, device=cache.device)[:, None]
    position = torch.arange(cache.size, device=cache.device)[None]
    if cache.pages:
        page = cache.block_table[row, position // cache.page_size].long()
        slot = page * cache.page_size + position % cache.page_size
    else:
        slot = row * cache.size + position
    parts = [buffer[slot] for buffer in store.data]
    if not store.bits:
        return parts[0].float()
    x = dequantise(*parts, store.width, store.bits)
    if store.recent is None:
        return x
    in_window = position < cache.lengths[:, None]
    in_window &= position >= cache.lengths[:, None] - cache.window
    recent = store.recent[row * cache.window + position % cache.window]
    return torch.where(in_window[..., None], recent.float(), x)


def decode(cache, q, q_pe, lengths, rows=None):
    """Run the kernel on a cache of one layer."""
    first, second = cache.stores
    return attention_kernel.decode_attention(
        q,
        first.kernel_buffers,
        v=None if cache.holds_latents else second.kernel_buffers,
        q_pe=q_pe,
        k_pe=second.data[0] if q_pe is not None else None,
        lengths=lengths,
        scale=0.2,
        size=cache.size,
        block_table=cache.block_table,
        page_size=cache.page_size,
        rows=rows,
        bits=first.bits,
        group=first.group,
        window=cache.window,
    )


def decode_error(heads, lengths, size, **options):
    """Return the largest difference between the kernel's result and the reference in float64."""
    cache = filled_cache(heads.cache_dims, lengths, size, **options)
    B, full = len(lengths), cache.full
    q = torch.randn(B, heads.H, heads.C, device=cache.device, dtype=full)
    q_pe = None
    if heads.P:
        q_pe = torch.randn(B, heads.H, heads.P, device=cache.device, dtype=full)
    got = decode(cache, q, q_pe, cache.lengths)

    first, second = (cached(cache, name).double() for name in heads.cache_dims)
    k = first.unflatten(-1, (heads.K, -1))
    v = k if heads.latent else second.unflatten(-1, (heads.K, -1))
    query = q.double()
    if q_pe is not None:
        k = torch.cat([k, second[:, :, None]], dim=-1)
        query = torch.cat([query, q_pe.double()], dim=-1)
    want = attention_kernel.decode_reference(query, k, v, cache.lengths, 0.2)
    return (got.double() - want).abs().max().item()


SHAPES = dict(
    mla=Heads(4, 1, 32, 8),
    mla_many_heads=Heads(20, 1, 64, 4),
    mla_without_rope=Heads(4, 1, 64, 0),
    mha=Heads(2, 2, 64, None),
    gqa=Heads(6, 2, 64, None),
    mqa=Heads(3, 1, 32, None),
)
LAYOUTS = dict(
    dense=dict(),
    pages=dict(layout='paged', page_size=64),
    small_pages=dict(layout='paged', page_size=16),
)


def decode_cases():
    """Return every shape with every layout and dtype; a third of them is not slow."""
    found = []
    for s, shape in enumerate(SHAPES):
        for n, layout in enumerate(LAYOUTS):
            for d, dtype in enumerate(['auto', 'int8', 'int4']):
                marks = pytest.mark.slow if (s + n + d) % 3 else ()
                found.append(pytest.param(shape, layout, dtype, marks=marks))
    return found


@interpreted
@pytest.mark.parametrize('shape, layout, dtype', decode_cases())
def test_interpreted_decode(shape, layout, dtype):
    options = dict(dtype=dtype, window=24) | LAYOUTS[layout]
    assert decode_error(SHAPES[shape], [129, 1, 64], 160, **options) < 2e-6


@interpreted
@pytest.mark.parametrize(
    'variant, layout',
    [
        ([64, 2, 0, 1], 'dense'),
        ([128, 3, 0, 1], 'pages'),
        pytest.param([64, 2, 0, 1], 'small_pages', marks=pytest.mark.slow),
        pytest.param([128, 3, 0, 1], 'small_pages', marks=pytest.mark.slow),
    ],
)
def test_interpreted_other_tiles_and_splits(variant, layout, monkeypatch):
    keys = [attention_kernel.shape_key(4, 32, 8, True, bits, 704) for bits in (0, 4)]
    tiles = dict.fromkeys(keys, variant)
    monkeypatch.setattr(attention_kernel, 'tiles_of_shapes', lambda: tiles)
    for dtype in ('auto', 'int4'):
        options = dict(dtype=dtype, window=0) | LAYOUTS[layout]
        assert decode_error(Heads(4, 1, 32, 8), [700, 300, 513], 704, **options) < 2e-6


@interpreted
def test_interpreted_widths_that_are_no_power_of_two_and_empty_sequences():
    assert decode_error(Heads(5, 1, 48, 6), [70, 3], 80) < 2e-6
    q, k = torch.randn(2, 4, 32), torch.full((20, 32), torch.nan)
    lengths = torch.tensor([0, 0])
    y = attention_kernel.decode_attention(q, (k, None, None), lengths=lengths, scale=1.0, size=10)
    assert y.eq(0).all()


@interpreted
def test_interpreted_parts_are_joined_some_channels_at_a_time(monkeypatch):
    # 11 parts, padded to 16: 8 channels fit a program, and 16 are the least.
    monkeypatch.setattr(attention_kernel, 'NUMBERS_TO_JOIN', 128)
    assert decode_error(Heads(5, 1, 48, 6), [700, 3], 704) < 2e-6


@interpreted
@pytest.mark.parametrize('dtype', ['auto', 'int4'])
@pytest.mark.parametrize('layout', LAYOUTS)
def test_interpreted_some_rows_only(layout, dtype):
    dims, rows = dict(c_kv=64, k_pe=8), torch.tensor([2, 0])
    cache = filled_cache(dims, [30, 70, 50], 96, dtype=dtype, window=24, **LAYOUTS[layout])
    new = {name: torch.randn(2, 1, width) for name, width in dims.items()}
    cache.plan(1, rows.tolist())
    cache.begin(1)
    layer = cache.layers[0]
    attention_kernel.append_tokens(layer.kernel_inputs(new), **layer.kernel_options())
    q, q_pe = torch.randn(2, 4, 64), torch.randn(2, 4, 8)
    got = decode(cache, q, q_pe, cache.current.lengths, rows)
    cache.end()
    for b, row in enumerate(rows.tolist()):
        c_kv, k_pe = (cached(cache, name)[row, : cache.used[row]].double() for name in dims)
        assert torch.equal(c_kv[-1].float(), new['c_kv'][b, 0])
        assert torch.equal(k_pe[-1].float(), new['k_pe'][b, 0])
        logits = q[b].double() @ c_kv.T + q_pe[b].double() @ k_pe.T
        want = (0.2 * logits).softmax(-1) @ c_kv
        torch.testing.assert_close(got[b].double(), want, rtol=0, atol=2e-6)


# -------------------------------------------------------------------------------------------------
# appending


def appended_twice(device, full, dims, dtype, layout):
    """
    Append the same tokens to two caches, by cache.py and by the kernel; return the two stores of
    each name.
    """
    options = dict(dtype=dtype, window=4, full=full, device=device) | LAYOUTS[layout]
    caches = [Cache([dims], 3, 40, kernel='torch', static=True, **options) for _ in range(2)]
    by_torch, by_kernel = caches
    for step in range(9):  # twice around the window
        new = {}
        for name, width in dims.items():
            new[name] = torch.randn(3, 1, width, device=device, dtype=full)
        for cache in caches:
            cache.plan([1, int(step % 3 != 0), int(step < 5)])
            cache.begin(1)
        for name, x in new.items():
            by_torch.layers[0].stores[name].write(x)
        layer = by_kernel.layers[0]
        attention_kernel.append_tokens(layer.kernel_inputs(new), **layer.kernel_options())
        for cache in caches:
            cache.end()
    return list(zip(by_torch.stores, by_kernel.stores))


DIMS = [dict(c_kv=64, k_pe=8), dict(k=128, v=128), dict(c_kv=192, k_pe=16), dict(c_kv=64, k_pe=0)]


@interpreted
@pytest.mark.parametrize('dims', DIMS, ids=str)
@pytest.mark.parametrize('dtype', ['auto', 'int8', 'int4'])
@pytest.mark.parametrize('layout', ['dense', 'small_pages'])
def test_interpreted_append_writes_what_the_cache_writes(layout, dtype, dims):
    for want, got in appended_twice('cpu', torch.float32, dims, dtype, layout):
        assert all(map(torch.equal, want.buffers, got.buffers))


# -------------------------------------------------------------------------------------------------
# the plan

WIDE = [
    Heads(16, 1, 512, 64),
    Heads(128, 1, 512, 64),
    Heads(16, 1, 256, 32),
    Heads(16, 1, 128, 32),
    Heads(12, 12, 64, None),
    Heads(8, 2, 128, None),
    Heads(16, 8, 256, None),
    Heads(12, 1, 64, None),
]
KB = 1024
GPUS = dict(
    h200=GpuLimits(132, 228 * KB, 227 * KB),
    a100=GpuLimits(108, 164 * KB, 163 * KB),
    l40=GpuLimits(142, 100 * KB, 99 * KB),
    t4=GpuLimits(40, 64 * KB, 64 * KB),
)


def problem_of(heads, B, bits, size):
    queries_of_head = heads.H // heads.K
    P = heads.P or 0
    return Problem(B, heads.K, queries_of_head, heads.C, P, heads.latent, bits, size)


@pytest.mark.parametrize('bits', [0, 8, 4])
@pytest.mark.parametrize('heads', WIDE, ids=str)
def test_tiles_fit_the_gpu_and_programs_fill_it(heads, bits, monkeypatch):
    for gpu in GPUS.values():
        monkeypatch.setattr(attention_kernel, 'gpu_limits', lambda _, gpu=gpu: gpu)
        for B, size in ((1, 64), (1, 100_000), (64, 8192)):
            problem = problem_of(heads, B, bits, size)
            plan = attention_kernel.plan(problem, torch.device('cuda'))
            tile = plan.tile
            needed = attention_kernel.shared_bytes(problem, tile)
            assert needed <= gpu.shared_memory_of_program
            assert tile.num_stages > 1 and tile.BLOCK_N >= 16 and tile.BLOCK_G >= 16
            assert plan.splits == 1 or plan.splits <= size // tile.BLOCK_N
            programs = B * heads.K * -(-problem.heads // tile.BLOCK_G) * plan.splits
            assert programs >= 0.8 * gpu.multiprocessors or size == 64


# Compiles decode_kernel for a GPU that need not be there, and prints the shared memory it takes.
COMPILE = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from nanomla.inference import attention_kernel as k

arch, H, K, C, P, latent, bits, window, page, G, N, stages, warps = map(int, sys.argv[1:])
problem = k.Problem(64, K, H // K, C, P, bool(latent), bits, 8192)
plan = k.TilePlan(k.Tile(G, N, stages), 0, True, 1, warps, None)
layout = k.Layout(min(C, 64), page, window, False, 'tf32')
shape, window_shape = k.decode_shapes(problem, plan, layout)

types = dict(queries_ptr='*bf16', k_codes_ptr='*u16' if bits else '*bf16')
types['v_codes_ptr'] = types['k_codes_ptr']
if P:
    types |= dict(queries_pe_ptr='*bf16', k_pe_ptr='*bf16')
if bits:
    types |= dict(k_scales_ptr='*i32', v_scales_ptr='*i32')
if window:
    types |= dict(k_recent_ptr='*bf16', v_recent_ptr='*bf16')
if page:
    types |= dict(block_table_ptr='*i32')
types |= dict(lengths_ptr='*i64', out_ptr='*fp32', lse_ptr='*fp32')
types |= dict(factor='fp32', splits='i32', size='i32', pages='i32')

kernel = k.triton_kernels().decode_kernel
constants = dict(shape=shape, window_shape=window_shape)
signature, values, hints = {}, {}, {}
for i, name in enumerate(kernel.arg_names):
    signature[name] = types.get(name, 'constexpr')
    if name not in types:
        values[i,] = constants.get(name)
    elif types[name].startswith('*'):
        hints[i,] = [['tt.divisibility', 16]]
source = ASTSource(kernel, signature, values, hints)
compiled = triton.compile(
    source, target=GPUTarget('cuda', arch, 32), options=dict(num_warps=warps)
)
print(compiled.metadata.shared)
"""


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize('gpu, arch', [('h200', 90), ('l40', 89)])
@pytest.mark.parametrize('bits', [0, 8, 4])
@pytest.mark.parametrize('heads', WIDE, ids=str)
def test_what_a_program_takes_is_what_the_plan_expects(heads, bits, gpu, arch, monkeypatch):
    """Triton compiles without a GPU, too."""
    monkeypatch.setattr(attention_kernel, 'gpu_limits', lambda _: GPUS[gpu])
    problem = problem_of(heads, 64, bits, 8192)
    plan = attention_kernel.plan(problem, torch.device('cuda'))
    tile = plan.tile
    for window, page in ((128 if bits else 0, 16), (0, 0)):
        numbers = [arch, heads.H, heads.K, heads.C, problem.P, int(heads.latent), bits]
        numbers += [window, page, tile.BLOCK_G, tile.BLOCK_N, tile.num_stages, plan.num_warps]
        child = python('-c', COMPILE, *map(str, numbers), PYTHONPATH=str(ROOT))
        assert child.returncode == 0, child.stderr[-2000:]
        assert int(child.stdout) <= attention_kernel.shared_bytes(problem, tile)


def test_what_it_refuses():
    gpu, bf16 = torch.device('cuda'), torch.bfloat16
    reason = attention_kernel.reason_not_to_run
    assert reason(torch.device('mps'), bf16, 64, 0, 64, False)
    assert reason(gpu, torch.float32, 64, 0, 64, False)
    assert reason(gpu, bf16, 1024, 0, 64, True)
    assert reason(gpu, bf16, 16, 4, 32, False)
    assert reason(gpu, bf16, 96, 8, 48, False)
    if attention_kernel.RUNS_ON:
        assert not reason(gpu, torch.float16, 512, 8, 64, True)


# -------------------------------------------------------------------------------------------------
# on a GPU

REAL = SHAPES | dict(
    mla=Heads(16, 1, 512, 64),
    mla_small=Heads(6, 1, 256, 32),
    mla_odd=Heads(12, 1, 384, 32),
    mla_128=Heads(16, 1, 128, 32),
    mha=Heads(12, 12, 64, None),
    gqa=Heads(12, 4, 64, None),
    mqa=Heads(12, 1, 64, None),
    llama=Heads(8, 2, 128, None),
)


@pytest.mark.gpu
@pytest.mark.parametrize('dtype', ['auto', 'int8', 'int4'])
@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('shape', REAL)
def test_gpu_decode(shape, layout, dtype):
    heads = REAL[shape]
    bits = dict(auto=0, int8=8, int4=4)[dtype]
    group = group_of(heads.K * heads.C)
    gpu = torch.device('cuda')
    reason = attention_kernel.reason_not_to_run(
        gpu, torch.bfloat16, heads.C, bits, group, heads.latent
    )
    if reason:
        pytest.skip(f'the kernel refuses: {reason}')
    # The zero of 4 bits is rounded once more on its way (`dequantize`).
    most = 3e-2 if dtype == 'int4' else 2e-2
    options = dict(dtype=dtype, device='cuda', full=torch.bfloat16) | LAYOUTS[layout]
    assert decode_error(heads, [1500, 1, 64, 1029], 1536, **options) < most


@pytest.mark.gpu
@pytest.mark.parametrize('dtype', ['auto', 'int8', 'int4'])
@pytest.mark.parametrize('layout', ['dense', 'small_pages'])
@pytest.mark.parametrize('dims', DIMS, ids=str)
def test_gpu_append_writes_what_the_cache_writes(dims, layout, dtype):
    for want, got in appended_twice('cuda', torch.bfloat16, dims, dtype, layout):
        if not want.bits:
            assert all(map(torch.equal, want.buffers, got.buffers))
            continue
        assert torch.equal(want.recent, got.recent)
        # The GPU divides a little differently, so what lies between two codes may become either.
        a, b = (dequantise(*store.data, store.width, store.bits) for store in (want, got))
        step = want.data[1][:, ::2].float().repeat_interleave(group_of(want.width), dim=-1)
        assert ((a - b).abs() <= 1.02 * step + 1e-6).all()
        assert ((a - b).abs() > 0.5 * step).float().mean() < 0.02


# -------------------------------------------------------------------------------------------------
# recorded steps


def small_model(tiny, kind):
    shape = dict(block_size=256, n_embd=128, n_head=2, pos='rope', vocab_size=50)
    if kind == 'mla':
        shape |= dict(kv_lora_rank=64, qk_rope_head_dim=16)
    return tiny(kind, **shape)


@torch.no_grad()
def forced_steps(model, texts, size, **options):
    """
    Decode each of `texts` (lists of ids), token by token after the first 3, whatever the model
    would choose. Returns the tokens that it would, (steps, B), and how clearly: the distance of
    its two best logits.
    """
    cache = Cache.of(model, len(texts), size, **options)
    step = DecodeStep.of(model, cache, Sampling(temperature=0))
    prefill(model, [text[:3] for text in texts], cache)
    rows = list(range(len(texts)))
    chosen, margins = [], []
    for t in range(3, min(map(len, texts))):
        step.token.copy_(torch.tensor([text[t] for text in texts]))
        step(rows)
        chosen.append(step.token.clone())
        so_far = torch.tensor([text[: t + 1] for text in texts], device=cache.device)
        best = model(so_far)[:, -1].float().topk(2).values
        margins.append(best[:, 0] - best[:, 1])
    return torch.stack(chosen), torch.stack(margins)


@pytest.mark.parametrize('device', ['cpu', pytest.param('cuda', marks=pytest.mark.gpu)])
@pytest.mark.parametrize('kind', ['mha', 'mla'])
@pytest.mark.parametrize('layout', LAYOUTS)
def test_recorded_steps_choose_what_the_model_chooses(device, kind, layout, tiny):
    model = small_model(tiny, kind).to(device)
    kernel, length, clear_margin = 'torch', 12, 1e-3
    if device == 'cuda':
        model.bfloat16().stream = torch.bfloat16
        # In bf16 the best two may lie too close to tell.
        kernel, length, clear_margin = 'triton', 90, 0.1
    texts = torch.randint(50, (3, length), generator=torch.Generator().manual_seed(1)).tolist()
    options = dict(static=True, kernel=kernel) | LAYOUTS[layout]
    chosen, margins = forced_steps(model, texts, 200, **options)
    want = []
    for t in range(3, length):
        so_far = torch.tensor([text[: t + 1] for text in texts], device=device)
        want.append(model(so_far)[:, -1].argmax(-1))
    clear = margins > clear_margin
    assert clear.float().mean() > 0.5
    assert torch.equal(chosen[clear], torch.stack(want)[clear])


@pytest.mark.gpu
@pytest.mark.parametrize(
    'sampling', [dict(temperature=0), dict(temperature=0.8, top_k=20), dict(top_p=0.9)], ids=str
)
@pytest.mark.parametrize('kind', ['mha', 'mla'])
@pytest.mark.parametrize('layout', LAYOUTS)
def test_gpu_steps_never_wait_and_compile_nothing(kind, layout, sampling, tiny, monkeypatch):
    model = small_model(tiny, kind).cuda().bfloat16()
    model.stream = torch.bfloat16
    cache = Cache.of(model, 3, 200, static=True, **LAYOUTS[layout])
    steps = generate(model, [[1, 2, 3], list(range(40)), [7] * 9], 80, cache=cache, **sampling)
    for _ in range(6):  # compiles, records
        next(steps)
    recorded = cache.decode_step.run
    assert recorded.graph is not None
    # From here on no Python runs the model, so nothing can be compiled.
    monkeypatch.setattr(recorded, 'run', lambda: 1 / 0)
    torch.cuda.set_sync_debug_mode('error')
    try:
        for _ in range(64):
            next(steps)
    finally:
        torch.cuda.set_sync_debug_mode('default')
