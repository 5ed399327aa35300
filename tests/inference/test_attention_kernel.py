"""
decode_kernels.py against attention in float64 over what the cache says it holds, and against what cache.py writes itself.

As in test_kernels.py the kernels run here under Triton's interpreter, in a child process that one test starts; the tests
marked gpu hold the same promises on a GPU.
"""

import random

import pytest
import torch
from interpreter import ROOT, interpreted, needs_triton, python, run_interpreted

from nanomla.inference import attention_kernel as d
from nanomla.inference.cache import Cache
from nanomla.inference.generate import DecodeStep, Sampling, generate, prefill
from nanomla.inference.quantize import dequantise, group_of


@needs_triton
@pytest.mark.parametrize('which', ['not slow', pytest.param('slow', marks=pytest.mark.slow)])
def test_under_the_interpreter(which):
    run_interpreted(__file__, which)


def filled(dims, lengths, size, device='cpu', full=torch.float32, **how):
    """A cache of one layer whose sequences hold `lengths` random tokens, in shuffled pages; every place that holds none is nan."""
    cache = Cache([dims], len(lengths), size, full=full, device=device, kernel='torch', **how)
    for store in cache.stores:
        for buffer in store.buffers:
            if buffer.is_floating_point():
                buffer.fill_(torch.nan)
    if cache.pages:
        random.Random(0).shuffle(cache.pages.free)
    cache.plan(lengths)
    cache.begin(max(lengths))
    cache.layers[0].append(
        **{
            name: torch.randn(len(lengths), max(lengths), width, device=device, dtype=full)
            for name, width in dims.items()
        }
    )
    cache.end()
    return cache


def held(cache, name):
    """What a name of the cache means, (B, size, C) in fp32, by its addresses, its codes and its window."""
    store = cache.layers[0].stores[name]
    row, place = (
        torch.arange(cache.rows, device=cache.device)[:, None],
        torch.arange(cache.size, device=cache.device)[None],
    )
    at = (
        cache.block_table[row, place // cache.page_size].long() * cache.page_size
        + place % cache.page_size
        if cache.pages
        else row * cache.size + place
    )
    parts = [buffer[at] for buffer in store.data]
    if not store.bits:
        return parts[0].float()
    x = dequantise(*parts, store.width, store.bits)
    if store.recent is None:
        return x
    recent = (place < cache.lengths[:, None]) & (place >= cache.lengths[:, None] - cache.window)
    return torch.where(
        recent[..., None], store.recent[row * cache.window + place % cache.window].float(), x
    )


def error(H, K, C, P, lengths, size, **how):
    """The largest difference between the kernel's result and float64's."""
    latent = P is not None
    cache = filled(dict(c_kv=C, k_pe=P) if latent else dict(k=K * C, v=K * C), lengths, size, **how)
    first, second = cache.stores
    B, full = len(lengths), cache.full
    q = torch.randn(B, H, C, device=cache.device, dtype=full)
    q_pe = torch.randn(B, H, P, device=cache.device, dtype=full) if latent and P else None
    got = d.decode_attention(
        q,
        first.kernel_buffers,
        v=None if latent else second.kernel_buffers,
        q_pe=q_pe,
        k_pe=second.data[0] if q_pe is not None else None,
        lengths=cache.lengths,
        scale=0.2,
        size=cache.size,
        block_table=cache.block_table,
        page_size=cache.page_size,
        bits=first.bits,
        group=first.group,
        window=cache.window,
    )
    k, v = (
        held(cache, name).double().unflatten(-1, (K, -1))
        for name in (('c_kv', 'c_kv') if latent else ('k', 'v'))
    )
    worst = 0
    for b, length in enumerate(lengths):
        keys, values = (t[b, :length].repeat_interleave(H // K, dim=1) for t in (k, v))
        logits = torch.einsum('hc,nhc->hn', q[b].double(), keys)
        if q_pe is not None:
            logits += q_pe[b].double() @ held(cache, 'k_pe')[b, :length].double().T
        want = torch.einsum('hn,nhc->hc', (0.2 * logits).softmax(-1), values)
        worst = max(worst, (got[b].double() - want).abs().max().item())
    return worst


SHAPES = dict(
    mla=(4, 1, 32, 8),
    mla_many_heads=(20, 1, 64, 4),
    mla_without_rope=(4, 1, 64, 0),
    mha=(2, 2, 64, None),
    gqa=(6, 2, 64, None),
    mqa=(3, 1, 32, None),
)
LAYOUTS = dict(
    dense=dict(),
    pages=dict(layout='paged', page_size=64),
    small_pages=dict(layout='paged', page_size=16),
)


DECODED = [
    pytest.param(shape, layout, dtype, marks=pytest.mark.slow if (s + l + d) % 3 else ())
    for s, shape in enumerate(SHAPES)
    for l, layout in enumerate(LAYOUTS)
    for d, dtype in enumerate(['auto', 'int8', 'int4'])
]


@interpreted
@pytest.mark.parametrize('shape, layout, dtype', DECODED)
def test_interpreted_decode(shape, layout, dtype):
    assert (
        error(*SHAPES[shape], [150, 1, 64, 129], 160, dtype=dtype, window=24, **LAYOUTS[layout])
        < 2e-6
    )


@interpreted
@pytest.mark.parametrize(
    'tiles, layout',
    [
        ([64, 2, 0, 1], 'dense'),
        ([128, 3, 0, 1], 'pages'),
        pytest.param([64, 2, 0, 1], 'small_pages', marks=pytest.mark.slow),
        pytest.param([128, 3, 0, 1], 'small_pages', marks=pytest.mark.slow),
    ],
)
def test_interpreted_other_tiles_and_splits(tiles, layout, monkeypatch):
    monkeypatch.setattr(
        d,
        'tiles_of_shapes',
        lambda: {d.shape_key(4, 32, 8, True, bits, 704): tiles for bits in (0, 4)},
    )
    for dtype in ('auto', 'int4'):
        assert (
            error(4, 1, 32, 8, [700, 300, 513], 704, dtype=dtype, window=0, **LAYOUTS[layout])
            < 2e-6
        )


@interpreted
def test_interpreted_widths_that_are_no_power_of_two_and_empty_sequences():
    assert error(5, 1, 48, 6, [70, 3], 80) < 2e-6
    q, k = torch.randn(2, 4, 32), torch.full((20, 32), torch.nan)
    y = d.decode_attention(q, (k, None, None), lengths=torch.tensor([0, 0]), scale=1.0, size=10)
    assert y.eq(0).all()


@interpreted
def test_interpreted_parts_are_joined_some_channels_at_a_time(monkeypatch):
    monkeypatch.setattr(d, 'AT_ONCE', 128)  # 11 parts, held as 16: 16 channels a program
    assert error(5, 1, 48, 6, [700, 3], 704) < 2e-6


@interpreted
@pytest.mark.parametrize('dtype', ['auto', 'int4'])
@pytest.mark.parametrize('layout', LAYOUTS)
def test_interpreted_some_rows_only(layout, dtype):
    dims, rows, full = dict(c_kv=64, k_pe=8), torch.tensor([2, 0]), torch.float32
    cache = filled(dims, [30, 70, 50], 96, dtype=dtype, window=24, **LAYOUTS[layout])
    new = {name: torch.randn(2, 1, width) for name, width in dims.items()}
    cache.plan(1, rows.tolist())
    cache.begin(1)
    first, second = cache.stores
    layer = cache.layers[0]
    d.append_tokens(layer.kernel_inputs(new), **layer.kernel_options())
    q, q_pe = torch.randn(2, 4, 64), torch.randn(2, 4, 8)
    got = d.decode_attention(
        q,
        first.kernel_buffers,
        q_pe=q_pe,
        k_pe=second.data[0],
        lengths=cache.current.lengths,
        scale=0.2,
        size=cache.size,
        block_table=cache.block_table,
        page_size=cache.page_size,
        rows=rows,
        bits=first.bits,
        group=first.group,
        window=cache.window,
    )
    cache.end()
    for b, row in enumerate(rows.tolist()):
        c_kv, k_pe = (held(cache, name)[row, : cache.used[row]].double() for name in dims)
        assert torch.equal(c_kv[-1].float(), new['c_kv'][b, 0]) and torch.equal(
            k_pe[-1].float(), new['k_pe'][b, 0]
        )
        p = (0.2 * (q[b].double() @ c_kv.T + q_pe[b].double() @ k_pe.T)).softmax(-1)
        torch.testing.assert_close(got[b].double(), p @ c_kv, rtol=0, atol=2e-6)


def kept(device, full, dims, dtype, layout):
    """Twice the same tokens into a cache, by cache.py and by the kernel; the (store, store) of each name."""
    caches = [
        Cache(
            [dims],
            3,
            40,
            dtype=dtype,
            window=8,
            full=full,
            device=device,
            kernel='torch',
            static=True,
            **LAYOUTS[layout],
        )
        for _ in range(2)
    ]
    for step in range(14):
        new = {
            name: torch.randn(3, 1, width, device=device, dtype=full)
            for name, width in dims.items()
        }
        for by_kernel, cache in enumerate(caches):
            cache.plan([1, int(step % 3 != 0), int(step < 5)])
            cache.begin(1)
            layer = cache.layers[0]
            if by_kernel:
                d.append_tokens(layer.kernel_inputs(new), **layer.kernel_options())
            else:
                for name, x in new.items():
                    layer.stores[name].write(x)
            cache.end()
    return list(zip(*(cache.stores for cache in caches)))


DIMS = [dict(c_kv=64, k_pe=8), dict(k=128, v=128), dict(c_kv=192, k_pe=16), dict(c_kv=64, k_pe=0)]


@interpreted
@pytest.mark.parametrize('dims', DIMS, ids=str)
@pytest.mark.parametrize('dtype', ['auto', 'int8', 'int4'])
@pytest.mark.parametrize('layout', ['dense', 'small_pages'])
def test_interpreted_keep_writes_what_the_cache_writes(layout, dtype, dims):
    for want, got in kept('cpu', torch.float32, dims, dtype, layout):
        assert all(map(torch.equal, want.buffers, got.buffers))


WIDE = [
    (1, 16, 512, 64, True),
    (1, 128, 512, 64, True),
    (1, 16, 256, 32, True),
    (1, 16, 128, 32, True),
    (12, 1, 64, 0, False),
    (2, 4, 128, 0, False),
    (8, 2, 256, 0, False),
    (1, 12, 64, 0, False),
]
GPUS = dict(
    h200=(132, 228, 227), a100=(108, 164, 163), l40=(142, 100, 99), t4=(40, 64, 64)
)  # multiprocessors, KB of shared memory of one, and of a program


@pytest.mark.parametrize('bits', [0, 8, 4])
@pytest.mark.parametrize('shape', WIDE, ids=str)
def test_tiles_fit_the_gpu_and_programs_fill_it(shape, bits, monkeypatch):
    K, heads, C, P, latent = shape
    for count, shared, most in GPUS.values():
        monkeypatch.setattr(d, 'card', lambda _: (count, shared * 1024, most * 1024))
        for B, size in ((1, 64), (1, 100_000), (64, 8192)):
            G, N, stages, ahead, turn, splits, warps, registers = d.plan(
                B, K, heads, C, P, latent, bits, size, torch.device('cuda')
            )
            assert (
                d.shared_bytes(G, N, stages, C, P, latent, bits) <= most * 1024
                and stages > 1
                and N >= 16
                and G >= 16
            )
            assert splits == 1 or splits <= size // N
            assert B * K * -(-heads // G) * splits >= 0.8 * count or size == 64


COMPILE = """
import sys, torch, triton, decode_kernels as d
from triton.compiler import ASTSource
from triton.backends.compiler import GPUTarget
f = d.kernels().decode
arch, H, K, C, P, latent, bits, W, page, G, N, stages, warps = map(int, sys.argv[1:])
held = '*bf16' if not bits else '*u16'
types = dict(queries='*bf16', queries_pe='*bf16' if P else None, k_codes=held, v_codes=held, k_scales='*i32' if bits else None, v_scales='*i32' if bits else None,
             k_recent='*bf16' if W else None, v_recent='*bf16' if W else None, pes='*bf16' if P else None, table='*i32' if page else None, lengths='*i64',
             rows=None, out='*fp32', lse='*fp32', factor='fp32', splits='i32', size='i32', pages='i32')
values = dict(H=H, K=K, G=G, C=C, CP=d.power_of_2(C), P=P, PP=d.power_of_2(P) if P else 16, LATENT=latent, BITS=bits, GROUP=min(C, 64) if bits else 1, W=W,
              PAGE=page, ROWS=False, N=N, STAGES=stages, AHEAD=0, TURN=1, IEEE='tf32', ASM=True)
names = f.arg_names
values |= {name: None for name in names if types.get(name) is None and name not in values}
source = ASTSource(f, {name: types.get(name) or 'constexpr' for name in names}, {(names.index(name),): value for name, value in values.items()},
                   {(i,): [['tt.divisibility', 16]] for i, name in enumerate(names) if (types.get(name) or '').startswith('*')})
print(triton.compile(source, target=GPUTarget('cuda', arch, 32), options=dict(num_warps=warps)).metadata.shared)
"""


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize('gpu, arch', [('h200', 90), ('l40', 89)])
@pytest.mark.parametrize('bits', [0, 8, 4])
@pytest.mark.parametrize('shape', WIDE, ids=str)
def test_what_a_program_takes_is_what_the_plan_expects(shape, bits, gpu, arch, monkeypatch):
    """Triton compiles without a GPU, too."""
    K, heads, C, P, latent = shape
    count, shared, most = GPUS[gpu]
    monkeypatch.setattr(d, 'card', lambda _: (count, shared * 1024, most * 1024))
    G, N, stages, _, _, _, warps, _ = d.plan(
        64, K, heads, C, P, latent, bits, 8192, torch.device('cuda')
    )
    for window, page in ((128 * bool(bits), 16), (0, 0)):
        shape = (arch, K * heads, K, C, P, int(latent), bits, window, page, G, N, stages, warps)
        child = python('-c', COMPILE, *map(str, shape), PYTHONPATH=str(ROOT))
        assert child.returncode == 0, child.stderr[-2000:]
        assert int(child.stdout) <= d.shared_bytes(G, N, stages, C, P, latent, bits)


def test_what_it_refuses():
    gpu = torch.device('cuda')
    said = [
        d.reason_not_to_run(torch.device('mps'), torch.bfloat16, 64, 0, 64, False),
        d.reason_not_to_run(gpu, torch.float32, 64, 0, 64, False),
        d.reason_not_to_run(gpu, torch.bfloat16, 1024, 0, 64, True),
        d.reason_not_to_run(gpu, torch.bfloat16, 16, 4, 32, False),
        d.reason_not_to_run(gpu, torch.bfloat16, 96, 8, 48, False),
    ]
    assert all(said) and (
        d.RUNS_ON == () or not d.reason_not_to_run(gpu, torch.float16, 512, 8, 64, True)
    )


# -------------------------------------------------------------------------------------------------

REAL = dict(
    SHAPES,
    mla=(16, 1, 512, 64),
    mla_small=(6, 1, 256, 32),
    mla_odd=(12, 1, 384, 32),
    mla_128=(16, 1, 128, 32),
    mha=(12, 12, 64, None),
    gqa=(12, 4, 64, None),
    mqa=(12, 1, 64, None),
    llama=(8, 2, 128, None),
)


@pytest.mark.gpu
@pytest.mark.parametrize('dtype', ['auto', 'int8', 'int4'])
@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('shape', REAL)
def test_gpu_decode(shape, layout, dtype):
    H, K, C, P = REAL[shape]
    if reason := d.reason_not_to_run(
        torch.device('cuda'),
        torch.bfloat16,
        C,
        8 * (dtype == 'int8') + 4 * (dtype == 'int4'),
        group_of(K * C),
        P is not None,
    ):
        pytest.skip(f'the kernel refuses: {reason}')
    most = (
        3e-2 if dtype == 'int4' else 2e-2
    )  # the zero of 4 bits is rounded once more on its way (`unpack`)
    assert (
        error(
            H,
            K,
            C,
            P,
            [1500, 1, 64, 1029],
            1536,
            dtype=dtype,
            device='cuda',
            full=torch.bfloat16,
            **LAYOUTS[layout],
        )
        < most
    )


@pytest.mark.gpu
@pytest.mark.parametrize('dtype', ['auto', 'int8', 'int4'])
@pytest.mark.parametrize('layout', ['dense', 'small_pages'])
def test_gpu_keep_writes_what_the_cache_writes(layout, dtype):
    for dims in DIMS:
        for want, got in kept('cuda', torch.bfloat16, dims, dtype, layout):
            if not want.bits:
                assert all(map(torch.equal, want.buffers, got.buffers))
            else:  # the GPU divides a little differently, so what lies between two codes may become either
                a, b = (dequantise(*store.data, store.width, store.bits) for store in (want, got))
                step = want.data[1][:, ::2].float().repeat_interleave(group_of(want.width), dim=-1)
                assert (
                    torch.equal(want.recent, got.recent)
                    and ((a - b).abs() <= 1.02 * step + 1e-6).all()
                )
                assert ((a - b).abs() > 0.5 * step).float().mean() < 0.02


@torch.no_grad()
def told_what_to_say(model, texts, size, **how):
    """
    The cache gets each of `texts` (lists of ids of any lengths), token by token behind the first 3, whatever the model would
    say: the tokens that it would, (steps, B), and how clearly, as the distance of its two best logits.
    """
    cache, said, margins = Cache.of(model, len(texts), size, **how), [], []
    step = DecodeStep.of(model, cache, Sampling(temperature=0))
    prefill(model, [text[:3] for text in texts], cache)
    rows = list(range(len(texts)))
    for t in range(3, min(map(len, texts))):
        step.token.copy_(torch.tensor([text[t] for text in texts]))
        step(rows)
        said.append(step.token.clone())
        best = (
            model(torch.tensor([text[: t + 1] for text in texts], device=cache.device))[:, -1]
            .float()
            .topk(2)
            .values
        )
        margins.append(best[:, 0] - best[:, 1])
    return torch.stack(said), torch.stack(margins)


@pytest.mark.parametrize('device', ['cpu', pytest.param('cuda', marks=pytest.mark.gpu)])
@pytest.mark.parametrize('kind', ['mha', 'mla'])
@pytest.mark.parametrize('layout', LAYOUTS)
def test_recorded_steps_say_what_the_model_says(device, kind, layout, tiny):
    shape = dict(block_size=256, n_embd=128, n_head=2, pos='rope', vocab_size=50) | (
        dict(kv_lora_rank=64, qk_rope_head_dim=16) if kind == 'mla' else {}
    )
    model = tiny(kind, **shape).to(device)
    if device == 'cuda':
        model.bfloat16().stream = torch.bfloat16
    texts = torch.randint(
        50, (3, 90 if device == 'cuda' else 12), generator=torch.Generator().manual_seed(1)
    ).tolist()
    said, margins = told_what_to_say(
        model,
        texts,
        200,
        static=True,
        kernel='triton' if device == 'cuda' else 'torch',
        **LAYOUTS[layout],
    )
    want = torch.stack(
        [
            model(torch.tensor([text[: t + 1] for text in texts], device=device))[:, -1].argmax(-1)
            for t in range(3, len(texts[0]))
        ]
    )
    clear = margins > (
        0.1 if device == 'cuda' else 1e-3
    )  # in bf16 the best two may lie too close to tell
    assert clear.float().mean() > 0.5 and torch.equal(said[clear], want[clear])


@pytest.mark.gpu
@pytest.mark.parametrize(
    'sampling', [dict(temperature=0), dict(temperature=0.8, top_k=20), dict(top_p=0.9)], ids=str
)
@pytest.mark.parametrize('kind', ['mha', 'mla'])
@pytest.mark.parametrize('layout', LAYOUTS)
def test_gpu_steps_never_wait_and_compile_nothing(kind, layout, sampling, tiny, monkeypatch):
    shape = dict(block_size=256, n_embd=128, n_head=2, pos='rope', vocab_size=50) | (
        dict(kv_lora_rank=64, qk_rope_head_dim=16) if kind == 'mla' else {}
    )
    model = tiny(kind, **shape).cuda().bfloat16()
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
