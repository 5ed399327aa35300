"""
Attention of one new token a sequence over a cache, read where it lies: one Triton kernel for MLA
in its absorbed form and for MHA, GQA and MQA; dense or paged; 16-bit floats, int8 or int4.

A sequence is cut into `splits` parts, so that a few long ones fill the GPU (flash-decoding, Dao et
al. 2023). Each program brings tiles of tokens into shared memory once and uses them for logits and
values. Everything is transposed: tokens are the rows of the tensor cores' 64-row products and
heads the columns, so that 16 heads waste nothing. A second kernel joins the parts. A third one
appends a new token's keys and values to the cache.

This module plans and launches; the kernels are in attention_kernel_triton.py, which imports
Triton. `decode_reference` is decode_attention in plain PyTorch; Store.write of cache.py does what
`append_tokens` does.

Legend: B sequences, H heads, K key/value heads, C width of a key and of a value (MLA: of the
latent, which is both), P width of k_pe, G heads of a program that share one key/value head, N
tokens of a tile.
"""

import json
import math
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch

from nanomla.core.devices import RUNS_ON

LOG2E = 1.4426950408889634
# Numbers that a program of four warps joins: 64 registers a thread.
NUMBERS_TO_JOIN = 8192
# Up to this length tiles are chosen for the time that a program takes to begin and to end.
SHORT_SEQUENCE = 1024
# The interpreter knows no instructions of the GPU.
COMPILED = 'cpu' not in RUNS_ON


@lru_cache
def triton_kernels():
    """Import the kernels, and with them Triton, when they are first launched."""
    from nanomla.inference import attention_kernel_triton

    return attention_kernel_triton


def reason_not_to_run(
    device: torch.device, dtype: torch.dtype, C: int, bits: int, group: int, latent: bool
) -> str:
    """Say why the kernel cannot serve heads (or a latent) of width C; '' when it can."""
    if device.type not in RUNS_ON:
        return 'Triton and a CUDA GPU are needed'
    if device.type == 'cuda' and dtype not in (torch.bfloat16, torch.float16):
        name = str(dtype).removeprefix('torch.')
        return f'it multiplies in 16 bits, and this cache holds {name}'
    if C > 512 or C % 2:
        return f'heads of width {C} are not served'
    if bits and (group & group - 1 or C % group or group < 16):
        return f'groups of {group} channels do not fit heads of width {C}'
    return ''


# -------------------------------------------------------------------------------------------------
# the plan: tiles, splits, warps


@dataclass(frozen=True)
class Problem:
    """A call of decode_attention, as far as its plan depends on it."""

    B: int
    K: int
    heads: int  # that share a key/value head
    C: int
    P: int
    latent: bool
    bits: int
    size: int  # slots of a sequence


@dataclass(frozen=True)
class Tile:
    """What a program holds at a time: heads, tokens, and the loads that are on their way."""

    BLOCK_G: int
    BLOCK_N: int
    num_stages: int


@dataclass(frozen=True)
class TilePlan:
    """How decode_attention launches its kernel."""

    tile: Tile
    prefetch: int  # tiles ahead that are fetched into L2, 0: none
    stagger: bool  # programs begin at different tiles
    splits: int  # parts of a sequence
    num_warps: int
    max_registers: int | None  # of a thread, None: the compiler's choice


@dataclass(frozen=True)
class GpuLimits:
    """What a GPU has for programs; shared memory in bytes."""

    multiprocessors: int
    shared_memory: int  # of a multiprocessor
    shared_memory_of_program: int


@lru_cache
def gpu_limits(device: torch.device) -> GpuLimits:
    """Return the limits of a GPU; those of an H200 where there is none."""
    if device.type != 'cuda':
        return GpuLimits(132, 228 * 1024, 227 * 1024)
    gpu = torch.cuda.get_device_properties(device)
    return GpuLimits(
        gpu.multi_processor_count,
        gpu.shared_memory_per_multiprocessor,
        gpu.shared_memory_per_block_optin,
    )


def power_of_2(n: int, least: int = 16) -> int:
    """Return the smallest power of 2 that is at least n and at least `least`."""
    return max(least, 1 << (n - 1).bit_length())


@lru_cache
def tiles_of_shapes() -> dict[str, list[int]]:
    """
    Return what `bench.py decode --attention_only=True --tune=True` found best: the key of a shape
    -> [tokens of a tile, stages, tiles to prefetch, whether programs begin at different tiles].
    """
    file = Path(__file__).with_name('tiles.json')
    if not file.exists():
        return {}
    return json.loads(file.read_text())


def shape_key(heads: int, C: int, P: int, latent: bool, bits: int, size: int) -> str:
    """Return the key of a shape in tiles.json; `heads` share a key/value head."""
    kind = 'latent' if latent else 'kv'
    key = f'{kind} {C}+{P}, {min(64, power_of_2(heads))} heads, {bits or 16} bits'
    if size <= SHORT_SEQUENCE:
        key += f', up to {SHORT_SEQUENCE}'
    return key


def variants(C: int, latent: bool, bits: int, size: int) -> list[list[int]]:
    """Return what is worth trying for a shape, as in tiles_of_shapes."""
    if bits:
        return [[64, 2, 0, 0], [64, 2, 0, 1], [64, 3, 0, 1], [32, 3, 0, 1]]
    if latent:
        tried = [
            [64, 2, 1, 0],
            [64, 2, 1, 1],
            [64, 2, 0, 1],
            [64, 3, 1, 1],
            [64, 4, 0, 1],
            [64, 4, 1, 0],
        ]
        return [variant for variant in tried if variant[1] * C < 1400]
    tried = [[64, 3, 0, 0], [64, 4, 0, 1], [128, 3, 0, 1]]
    if size <= SHORT_SEQUENCE:
        tried += [[64, 2, 0, 0], [32, 3, 0, 0], [32, 4, 0, 0]]
    return tried


def shared_bytes(problem: Problem, tile: Tile) -> int:
    """
    Return the bytes of shared memory that a program takes at most, as Triton 3.6 compiles it:
    queries, weights, and the tiles that are on their way.
    """
    C = power_of_2(problem.C)
    P = power_of_2(problem.P) if problem.P else 0
    N, stages = tile.BLOCK_N, tile.num_stages
    queries_and_weights = 2 * (C + P + N) * tile.BLOCK_G
    if not problem.bits:
        stores = 1 if problem.latent else 2
        return queries_and_weights + stages * N * 2 * (C * stores + P)
    of_window = shared_bytes(replace(problem, bits=0), window_tile(tile))
    codes = (stages - 1) * (C * problem.bits // 4 + 8 * (C // 64 + 1))
    return max(of_window, queries_and_weights + N * (codes + stages * 2 * P))


def window_tile(tile: Tile) -> Tile:
    """Return the tile that reads a quantised cache's window of full precision."""
    return replace(tile, BLOCK_N=min(tile.BLOCK_N, 32), num_stages=2)


def plan(problem: Problem, device: torch.device) -> TilePlan:
    """Choose tiles, splits, warps and registers for a call on a GPU."""
    key = shape_key(problem.heads, problem.C, problem.P, problem.latent, problem.bits, problem.size)
    variant = tiles_of_shapes().get(key, ())
    return plan_variant(problem, tuple(variant), gpu_limits(device))


@lru_cache(1024)
def plan_variant(problem: Problem, variant: tuple[int, ...], gpu: GpuLimits) -> TilePlan:
    """Choose the plan with a variant, as in tiles_of_shapes, or without one, ()."""
    num_warps, registers = warps_and_registers(problem)
    # Programs that a multiprocessor has registers for.
    at_once = min(16 // num_warps, 65536 // (32 * num_warps * registers))
    BLOCK_N, num_stages, prefetch, stagger = variant or default_variant(problem, gpu, at_once)
    heads = min(64, power_of_2(problem.heads))
    tile = fitting_tile(problem, Tile(heads, BLOCK_N, num_stages), gpu)
    if not COMPILED or problem.size < tile.BLOCK_N:
        prefetch = 0

    by_memory = gpu.shared_memory // reserved_bytes(problem, tile)
    resident = gpu.multiprocessors * max(1, min(at_once, by_memory))
    return TilePlan(
        tile,
        prefetch,
        bool(stagger),
        best_splits(problem, tile, gpu, resident),
        num_warps,
        registers if problem.bits and registers < 255 else None,
    )


def warps_and_registers(problem: Problem) -> tuple[int, int]:
    """Return the warps of a program and the registers that each thread takes at most."""
    if not problem.bits:
        return 4, 128
    # The second product has a row for each word of a token, and a warp takes 16 of them: more
    # warps would unpack the same words.
    num_warps = max(1, min(4, power_of_2(problem.C) * problem.bits // 256))
    return num_warps, 168 if problem.C <= 256 else 255


def reserved_bytes(problem: Problem, tile: Tile) -> int:
    """Return the shared memory of a program with what the system takes of each."""
    return shared_bytes(problem, tile) + 1024


def default_variant(problem: Problem, gpu: GpuLimits, at_once: int) -> list[int]:
    """Return a variant, as in tiles_of_shapes, for a shape that was never measured."""
    tile = Tile(min(64, power_of_2(problem.heads)), 64, 3)
    needed = reserved_bytes(problem, tile)
    if problem.bits:
        needed *= at_once
    num_stages = 3 if needed <= gpu.shared_memory else 2
    prefetch = int(problem.latent and not problem.bits)
    return [64, num_stages, prefetch, int(problem.bits > 0)]


def fitting_tile(problem: Problem, tile: Tile, gpu: GpuLimits) -> Tile:
    """Return the tile, or a smaller one if the GPU's shared memory does not hold it."""
    N = tile.BLOCK_N
    smallest = tile
    for heads in (tile.BLOCK_G, 32, 16):
        for tokens, stages in ((N, tile.num_stages), (N, 2), (32, 2), (16, 2)):
            if heads > tile.BLOCK_G or tokens > N:
                continue
            smallest = Tile(heads, tokens, stages)
            if shared_bytes(problem, smallest) <= gpu.shared_memory_of_program:
                return smallest
    return smallest


def best_splits(problem: Problem, tile: Tile, gpu: GpuLimits, resident: int) -> int:
    """
    Return how many parts a sequence is cut into: so many that programs fill the GPU, `resident`
    at a time, in waves that are nearly full.
    """
    programs = problem.B * problem.K * math.ceil(problem.heads / tile.BLOCK_G)
    most = max(1, problem.size // tile.BLOCK_N)
    # To join parts takes as long as a short sequence.
    if problem.size <= SHORT_SEQUENCE and programs >= 4 * gpu.multiprocessors:
        most = 1

    def filled(splits: int) -> float:
        waves = math.ceil(programs * splits / resident)
        return round(programs * splits / (waves * resident), 1)

    return max(range(1, most + 1), key=filled)  # the smallest of the best


# -------------------------------------------------------------------------------------------------
# decode


def decode_attention(
    q,
    k,
    *,
    lengths,
    scale,
    size,
    v=None,
    q_pe=None,
    k_pe=None,
    block_table=None,
    page_size=0,
    rows=None,
    bits=0,
    group=1,
    window=0,
    splits=0,
):
    """
    Return softmax(scale (q · k + q_pe · k_pe)) v over the first lengths[b] tokens of every
    sequence, (B, H, C) in q's dtype.

    q (B, H, C), q_pe (B, H, P); k and v: what a store holds, (codes, scales, recent), as cache.py
    lays it out, scales and recent None without bits; v None: k is the latent of MLA, and the
    values too. k_pe (slots, P). A sequence is `size` slots from rows[b] · size on (rows None: b),
    or the pages of block_table[rows[b]]. Where a length is 0 the result is 0.
    """
    B, H, C = q.shape
    latent = v is None
    k_codes, k_scales, k_recent = k
    v_codes, v_scales, v_recent = k if latent else v
    width = k_codes.size(1) * (2 if bits == 4 else 1)  # two codes of 4 bits are a byte
    K, P = width // C, 0 if q_pe is None else q_pe.size(-1)
    problem = Problem(B, K, H // K, C, P, latent, bits, size)
    tile_plan = plan(problem, q.device)
    splits = splits or tile_plan.splits
    if k_recent is None:
        window = 0
    parts = splits + (window > 0)
    out = q.new_empty(B, H, C)
    y = out if parts == 1 else q.new_empty(B, H, parts, C, dtype=torch.float32)
    lse = q.new_empty(B, H, parts, dtype=torch.float32)
    if bits:
        # Two or four codes are one word, and so is a scale with its zero.
        k_codes, v_codes = k_codes.view(torch.uint16), v_codes.view(torch.uint16)
        k_scales, v_scales = k_scales.view(torch.int32), v_scales.view(torch.int32)
    layout = Layout(
        group=group,
        page_size=0 if block_table is None else page_size,
        window=window,
        has_rows=rows is not None,
        precision='ieee' if q.dtype == torch.float32 else 'tf32',
    )
    shape, window_shape = decode_shapes(problem, tile_plan, layout)
    head_tiles = math.ceil(problem.heads / shape.BLOCK_G)
    triton_kernels().decode_kernel[(splits, problem.K * head_tiles, B)](
        queries_ptr=q,
        queries_pe_ptr=q_pe,
        k_codes_ptr=k_codes,
        k_scales_ptr=k_scales,
        k_recent_ptr=k_recent,
        v_codes_ptr=v_codes,
        v_scales_ptr=v_scales,
        v_recent_ptr=v_recent,
        k_pe_ptr=k_pe,
        block_table_ptr=block_table,
        lengths_ptr=lengths,
        rows_ptr=rows,
        out_ptr=y,
        lse_ptr=lse,
        factor=scale * LOG2E,
        splits=splits,
        size=size,
        pages=0 if block_table is None else block_table.size(1),
        shape=shape,
        window_shape=window_shape,
        num_warps=tile_plan.num_warps,
        maxnreg=tile_plan.max_registers,
    )
    if parts > 1:
        join_parts(y, lse, out)
    return out


@dataclass(frozen=True)
class Layout:
    """The rest of what decode_kernel is compiled for: the cache's layout, and its precision."""

    group: int
    page_size: int  # 0: no pages
    window: int
    has_rows: bool
    precision: str


@lru_cache
def decode_shapes(problem: Problem, tile_plan: TilePlan, layout: Layout):
    """Return the DecodeShape of the kernel, and of its window or None."""
    bits, tile = problem.bits, tile_plan.tile
    BLOCK_C = power_of_2(problem.C)
    pack = 16 // bits if bits else 1
    shape = triton_kernels().DecodeShape(
        H=problem.K * problem.heads,
        K=problem.K,
        C=problem.C,
        P=problem.P,
        BLOCK_C=BLOCK_C,
        BLOCK_P=power_of_2(problem.P) if problem.P else 16,
        BLOCK_G=tile.BLOCK_G,
        BLOCK_N=tile.BLOCK_N,
        # The 64 rows of a product; more at a time would take more registers.
        BLOCK_WORDS=min(64, BLOCK_C // pack) if bits else BLOCK_C,
        LATENT=problem.latent,
        BITS=bits,
        PACK=pack,
        GROUP=layout.group if bits else 1,
        PAGE=layout.page_size,
        WINDOW=layout.window,
        RING=0,
        HAS_ROWS=layout.has_rows,
        NUM_STAGES=tile.num_stages,
        PREFETCH=tile_plan.prefetch,
        STAGGER=tile_plan.stagger,
        PRECISION=layout.precision,
        USE_ASM=COMPILED,
    )
    if not layout.window:
        return shape, None
    smaller = window_tile(tile)
    window_shape = replace(
        shape,
        BITS=0,
        PACK=1,
        BLOCK_WORDS=BLOCK_C,
        RING=layout.window,
        BLOCK_N=smaller.BLOCK_N,
        NUM_STAGES=smaller.num_stages,
        PREFETCH=0,
    )
    return shape, window_shape


def join_parts(parts: torch.Tensor, lse: torch.Tensor, out: torch.Tensor) -> None:
    """Average parts (B, H, parts, C), weighted by 2^lse (B, H, parts), into out (B, H, C)."""
    B, H, count, C = parts.shape
    BLOCK_PARTS = power_of_2(count, 1)
    BLOCK_C = max(16, min(power_of_2(C), NUMBERS_TO_JOIN // BLOCK_PARTS))
    triton_kernels().join_kernel[(B * H, math.ceil(C / BLOCK_C))](
        parts_ptr=parts,
        lse_ptr=lse,
        out_ptr=out,
        parts=count,
        C=C,
        BLOCK_C=BLOCK_C,
        BLOCK_PARTS=BLOCK_PARTS,
        num_warps=4,
    )


def decode_reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: torch.Tensor, scale: float
) -> torch.Tensor:
    """
    Return what decode_attention computes, from keys k and values v (B, N, K, C) in full: q
    (B, H, C) -> (B, H, C). MLA's keys are [c_kv | k_pe], its queries [q | q_pe].
    """
    groups = q.size(1) // k.size(2)
    k, v = (x.repeat_interleave(groups, dim=2) for x in (k, v))
    logits = torch.einsum('bhc,bnhc->bhn', q, k) * scale
    hidden = torch.arange(k.size(1), device=k.device) >= lengths[:, None]
    weights = logits.masked_fill(hidden[:, None], -torch.inf).softmax(-1)
    # Not a number where a length is 0; nor may slots that hold nothing count, whatever they hold.
    weights = weights.nan_to_num()
    v = v.masked_fill(hidden[:, :, None, None], 0)
    return torch.einsum('bhn,bnhc->bhc', weights, v)


# -------------------------------------------------------------------------------------------------
# append


def append_tokens(
    new,
    *,
    lengths,
    counts,
    size,
    block_table=None,
    page_size=0,
    rows=None,
    window=0,
    q=None,
    rope=None,
    rope_widths=(0, 0, 0),
    norm=None,
):
    """
    Write one new token a sequence: new is [(x (B, 1, width) or (B, width), buffers, bits, group)]
    of one store or two, `buffers` as in decode_attention; lengths count the new token where counts
    is 1; where it is 0 nothing is written.

    On the way: rope (cos, sin), B rows each, in heads of `rope_widths` channels (of q, of the first
    and the second store; 0: not at all), norm (a Norm of model.py) sets the RMS of what goes to the
    first store. Returns q (B, width), with RoPE and contiguous.
    """
    B = new[0][0].size(0)
    for x, _, _, _ in new:
        assert x.stride(-1) == 1
    if rope is None:
        cos = sin = None
        rope_widths = (0, 0, 0)
    else:
        cos, sin = (table.contiguous() for table in rope)
    query_rope, first_rope, second_rope = rope_widths
    # Where there is only one store, the kernel gets it as both.
    x, (codes, scales, recent), bits, group = new[0]
    x2, (codes2, scales2, recent2), bits2, group2 = new[-1]
    query = out = None
    if q is not None:
        query = store_shape(q.size(-1), 0, 1, query_rope)
        out = q.new_empty(B, q.size(-1))
    triton_kernels().append_kernel[(B, len(new) if q is None else 3)](
        first_ptr=x,
        first_codes_ptr=codes,
        first_scales_ptr=scales,
        first_recent_ptr=recent,
        first_stride=x.stride(0),
        second_ptr=x2,
        second_codes_ptr=codes2,
        second_scales_ptr=scales2,
        second_recent_ptr=recent2,
        second_stride=x2.stride(0),
        query_ptr=q,
        query_stride=0 if q is None else q.stride(0),
        query_out_ptr=out,
        cos_ptr=cos,
        sin_ptr=sin,
        gain_ptr=None if norm is None else norm.weight,
        eps=0.0 if norm is None else norm.eps,
        block_table_ptr=block_table,
        lengths_ptr=lengths,
        counts_ptr=counts,
        rows_ptr=rows,
        size=size,
        pages=0 if block_table is None else block_table.size(1),
        FIRST=store_shape(x.size(-1), bits, group, first_rope),
        SECOND=store_shape(x2.size(-1), bits2, group2, second_rope),
        QUERY=query,
        ROPE_HALF=0 if cos is None else cos.size(-1),
        NORM=norm is not None,
        WINDOW=window,
        PAGE=0 if block_table is None else page_size,
        HAS_ROWS=rows is not None,
        num_warps=4,
    )
    return out


@lru_cache
def store_shape(width: int, bits: int, group: int, rope_dim: int):
    """Return the StoreShape of a store, or of the query."""
    return triton_kernels().StoreShape(
        WIDTH=width,
        BLOCK_WIDTH=power_of_2(width),
        BITS=bits,
        GROUP=group if bits else 1,
        ROPE_DIM=rope_dim,
    )
