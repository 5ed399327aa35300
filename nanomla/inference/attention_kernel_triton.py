"""
The Triton kernels of attention_kernel.py, which plans and launches them; it also describes what
they compute.

    decode_kernel   one new query over the cached tokens, a part of a sequence a program
    join_kernel     the parts of a sequence put together
    append_kernel   a new token's keys and values written into the cache, with RoPE and norm

Memory layout. A store is a matrix of slots: a slot is one token, K heads of C channels (MLA: one
head, the latent). It holds 16-bit floats, or codes with scales: then codes are read as words of 16
bits, PACK channels each, and each group of channels has one word of 32 bits, the scale (fp16) in
its low half and the zero in its high half. Sequence b owns `size` slots from slots[b] * size on,
or the pages that its row of the block table lists.

Legend: B sequences, H heads, K key/value heads, C channels of a head or of the latent, P of k_pe,
G heads of a program that share one key/value head, N tokens of a tile. Logarithms are to base 2,
because the GPU's own exponential is 2^x.
"""

from dataclasses import dataclass
from typing import NamedTuple

import triton
import triton.language as tl

# -------------------------------------------------------------------------------------------------
# What the kernels are compiled for (frozen dataclasses of constants, passed as one constexpr), and
# what their helpers get together (named tuples of pointers and numbers).


@dataclass(frozen=True)
class DecodeShape:
    """What decode_kernel is compiled for."""

    H: int
    K: int
    C: int
    P: int  # 0: no k_pe
    BLOCK_C: int  # C and P as powers of 2
    BLOCK_P: int
    BLOCK_G: int
    BLOCK_N: int
    BLOCK_WORDS: int  # words of a token that are read at a time
    LATENT: bool  # values are the keys
    BITS: int  # 8, 4, or 0 for floats
    PACK: int  # channels of a word
    GROUP: int  # channels that share a scale
    PAGE: int  # slots of a page, 0: no pages
    WINDOW: int  # newest tokens that are read in full precision, 0: none
    RING: int  # slots of a ring buffer to read, 0: it is no ring
    HAS_ROWS: bool  # only some rows of the cache are read
    NUM_STAGES: int
    PREFETCH: int  # tiles ahead that are fetched into L2, 0: none
    STAGGER: bool  # programs begin at different tiles
    PRECISION: str  # of fp32 products, as tl.dot's input_precision
    USE_ASM: bool  # instructions of the GPU, which the interpreter does not know


@dataclass(frozen=True)
class StoreShape:
    """What append_kernel is compiled for: a store that gets new tokens, or the query."""

    WIDTH: int  # channels of a token, all heads together
    BLOCK_WIDTH: int  # WIDTH as a power of 2
    BITS: int
    GROUP: int
    ROPE_DIM: int  # channels of a head that RoPE turns, 0: no RoPE


class Inputs(NamedTuple):
    queries_ptr: object  # (B, H, C)
    queries_pe_ptr: object  # (B, H, P)
    k_codes_ptr: object
    k_scales_ptr: object
    v_codes_ptr: object
    v_scales_ptr: object
    k_pe_ptr: object


class Sequence(NamedTuple):
    b: object  # its row of the queries
    slot: object  # its row of the cache
    block_table_ptr: object
    size: object
    pages: object  # columns of the block table


class Span(NamedTuple):
    start: object
    limit: object
    first_tile: object


class Part(NamedTuple):
    out_ptr: object  # (B, H, parts, C)
    lse_ptr: object  # (B, H, parts)
    index: object
    count: object


class Rope(NamedTuple):
    cos_ptr: object
    sin_ptr: object


class NormWeight(NamedTuple):
    gain_ptr: object
    eps: object


# -------------------------------------------------------------------------------------------------
# decode: reading a tile


@triton.jit
def load_words(
    codes_ptr, scales_ptr, rows, part: tl.constexpr, TRANSPOSED: tl.constexpr, shape: tl.constexpr
):
    """
    Load the words number `part` * BLOCK_WORDS and following of `rows` (N,), (N, BLOCK_WORDS), and
    the scale-zero words of their groups (N, groups).

    TRANSPOSED: both the other way round, as the second product wants codes. To transpose them as
    numbers would take them through shared memory once more.
    """
    WORDS: tl.constexpr = shape.BLOCK_WORDS
    GROUPS: tl.constexpr = WORDS * shape.PACK // shape.GROUP
    WIDTH: tl.constexpr = shape.K * shape.C
    FULL: tl.constexpr = (part + 1) * WORDS * shape.PACK <= shape.C
    word = part * WORDS + tl.arange(0, WORDS)
    group = part * GROUPS + tl.arange(0, GROUPS)
    if TRANSPOSED:
        rows = rows[None, :]
        word = word[:, None]
        group = group[:, None]
    else:
        rows = rows[:, None]
        word = word[None, :]
        group = group[None, :]
    words_ptr = codes_ptr + rows * (WIDTH // shape.PACK) + word
    if FULL:
        words = tl.load(words_ptr)
    else:
        words = tl.load(words_ptr, mask=word < shape.C // shape.PACK, other=0)
    scale_words = words
    if shape.BITS:
        scale_words_ptr = scales_ptr + rows * (WIDTH // shape.GROUP) + group
        if FULL:
            scale_words = tl.load(scale_words_ptr)
        else:
            scale_words = tl.load(scale_words_ptr, mask=group < shape.C // shape.GROUP, other=0)
    return words, scale_words


@triton.jit
def expand_groups(x, EACH: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Repeat each group's number for its EACH words, (N, groups) -> (N, words), or TRANSPOSED."""
    A: tl.constexpr = x.shape[0]
    B: tl.constexpr = x.shape[1]
    if TRANSPOSED:
        x = tl.reshape(tl.broadcast_to(x[:, None, :], [A, EACH, B]), [A * EACH, B])
    else:
        x = tl.reshape(tl.broadcast_to(x[:, :, None], [A, B, EACH]), [A, B * EACH])
    return x


@triton.jit
def half_of(word, dtype: tl.constexpr):
    """Return the fp16 number in the low half of a word."""
    return word.to(tl.uint16).to(tl.float16, bitcast=True).to(dtype)


@triton.jit
def dequantize(
    words, scale_words, TRANSPOSED: tl.constexpr, dtype: tl.constexpr, shape: tl.constexpr
):
    """
    Return words as a tuple of PACK tensors: codes * scale + zero of each word's first channel, of
    each word's second, ...

    The GPU's own conversion takes several instructions a number. Here two numbers, in the halves
    of a register, take three: in fp16 0x6400 | code is 1024 + code, and 0x4c00 | code << 6 is
    16 + code. That 16 goes into the zero. At most 2^-11 of 32 scales is rounded away by it, and a
    zero and 16 scales together must stay within fp16's 65,504.
    """
    EACH: tl.constexpr = shape.GROUP * shape.BITS // 16
    if shape.BITS == 0:
        x = (words,)
    else:
        scale = half_of(scale_words, dtype)
        zero = half_of(scale_words >> 16, dtype)
        if shape.USE_ASM and shape.BITS == 4:
            zero = zero - scale * 16
        scale = expand_groups(scale, EACH, TRANSPOSED)
        zero = expand_groups(zero, EACH, TRANSPOSED)
        if shape.USE_ASM and shape.BITS == 4:
            x = tl.inline_asm_elementwise(
                """{
                .reg .b32 a, b, c, d;
                shl.b32 a, $4, 6; shl.b32 b, $4, 2; shr.u32 c, $4, 2; shr.u32 d, $4, 6;
                lop3.b32 a, a, 0x03c003c0, 0x4c004c00, 0xea;
                lop3.b32 b, b, 0x03c003c0, 0x4c004c00, 0xea;
                lop3.b32 c, c, 0x03c003c0, 0x4c004c00, 0xea;
                lop3.b32 d, d, 0x03c003c0, 0x4c004c00, 0xea;
                fma.rn.f16x2 $0, a, $5, $6; fma.rn.f16x2 $1, b, $5, $6;
                fma.rn.f16x2 $2, c, $5, $6; fma.rn.f16x2 $3, d, $5, $6; }""",
                '=r,=r,=r,=r,r,r,r',
                [words, scale, zero],
                dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
                is_pure=True,
                pack=2,
            )
        elif shape.USE_ASM:
            x = tl.inline_asm_elementwise(
                """{
                .reg .b32 a, b, m;
                mov.b32 m, 0xe400e400;
                prmt.b32 a, $2, 0x64646464, 0x4240; prmt.b32 b, $2, 0x64646464, 0x4341;
                add.rn.f16x2 a, a, m; add.rn.f16x2 b, b, m;
                fma.rn.f16x2 $0, a, $3, $4; fma.rn.f16x2 $1, b, $3, $4; }""",
                '=r,=r,r,r,r',
                [words, scale, zero],
                dtype=(tl.float16, tl.float16),
                is_pure=True,
                pack=2,
            )
        elif shape.BITS == 4:
            x = (
                (words & 15).to(dtype) * scale + zero,
                ((words >> 4) & 15).to(dtype) * scale + zero,
                ((words >> 8) & 15).to(dtype) * scale + zero,
                (words >> 12).to(dtype) * scale + zero,
            )
        else:
            x = (
                (words & 255).to(dtype) * scale + zero,
                (words >> 8).to(dtype) * scale + zero,
            )
    return x


@triton.jit
def prefetch(start_ptr, COUNT: tl.constexpr):
    """Ask for COUNT elements from `start_ptr` on to come into L2, a line of 128 bytes a lane."""
    PER_LINE: tl.constexpr = 128 * 8 // start_ptr.dtype.element_ty.primitive_bitwidth
    lines = start_ptr + tl.arange(0, COUNT // PER_LINE) * PER_LINE
    tl.inline_asm_elementwise(
        'prefetch.global.L2 [$1]; mov.u32 $0, 0;',
        '=r,l',
        [lines.to(tl.int64)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def load_page(sequence, position, shape: tl.constexpr):
    """Load from the block table the page of a position of the sequence."""
    row_ptr = sequence.block_table_ptr + sequence.slot * sequence.pages
    return tl.load(row_ptr + position // shape.PAGE)


@triton.jit
def prefetch_tile(inputs, sequence, position, k_codes_ptr, shape: tl.constexpr):
    """Prefetch the latents and k_pe of the tile at `position`."""
    if shape.PAGE:
        page = load_page(sequence, position, shape).to(tl.int64)
        slot = page * shape.PAGE + position % shape.PAGE
    else:
        within = tl.minimum(position, sequence.size - shape.BLOCK_N)
        slot = sequence.slot * sequence.size + within
    WORDS_OF_SLOT: tl.constexpr = shape.K * shape.C // shape.PACK
    prefetch(k_codes_ptr + slot * WORDS_OF_SLOT, shape.BLOCK_N * WORDS_OF_SLOT)
    if shape.P:
        prefetch(inputs.k_pe_ptr + slot * shape.P, shape.BLOCK_N * shape.P)


@triton.jit
def softmax_tile(logits, inside, maximum, total, factor):
    """
    Add a tile's logits (N, G) to a running softmax: its maximum (G,), and total (N, G), whose rows
    are summed at the end, because a sum over rows makes the warps wait for each other.

    Returns the new maximum and total, the tile's weights (N, G), and rescale (G,), by which the
    sums of earlier tiles have to be multiplied.
    """
    # A finite number, so that the difference of two of them is not nan.
    logits = tl.where(inside[:, None], logits * factor, -1e30)
    higher = tl.maximum(maximum, tl.max(logits, 0))
    weights = tl.exp2(logits - higher[None, :])
    rescale = tl.exp2(maximum - higher)
    return higher, total * rescale[None, :] + weights, weights, rescale


# -------------------------------------------------------------------------------------------------
# decode: a part of a sequence


@triton.jit
def attend_span(inputs, sequence, span, part, factor, shape: tl.constexpr):
    """
    Attend to the tokens of `span`; write their mean y (G, C), weighted by their softmax, and log2
    of the softmax's sum (G,) to `part`.

    Everything is transposed: tokens are the rows of the tensor cores' products, and heads their
    columns. Slots after the last token are never read: the last tile has its last token again.
    """
    H: tl.constexpr = shape.H
    C: tl.constexpr = shape.C
    P: tl.constexpr = shape.P
    N: tl.constexpr = shape.BLOCK_N
    G: tl.constexpr = shape.BLOCK_G
    PACK: tl.constexpr = shape.PACK
    WORDS: tl.constexpr = shape.BLOCK_WORDS
    PAGE: tl.constexpr = shape.PAGE
    RING: tl.constexpr = shape.RING
    PRECISION: tl.constexpr = shape.PRECISION

    # A tile is multiplied in SLICES of channels. Of each there are PACK tensors: the channels that
    # come first in their words, those that come second, ...
    SLICES: tl.constexpr = shape.BLOCK_C // PACK // WORDS
    WORDS_OF_SLOT: tl.constexpr = shape.K * C // PACK
    GROUPS_OF_SLOT: tl.constexpr = shape.K * C // shape.GROUP if shape.BITS else 0
    # Codes, scales and zeros are exact in fp16, and take half the registers of fp32.
    full: tl.constexpr = inputs.queries_ptr.dtype.element_ty
    dtype: tl.constexpr = tl.float16 if shape.BITS and full != tl.float32 else full

    # The program's key/value head, and its G of the heads that share it.
    HEADS: tl.constexpr = H // shape.K
    HEAD_TILES: tl.constexpr = (HEADS + G - 1) // G
    kv_head = tl.program_id(1) // HEAD_TILES
    head = tl.program_id(1) % HEAD_TILES * G + tl.arange(0, G)
    query_row = sequence.b.to(tl.int64) * H + kv_head * HEADS + head  # of (B, H)
    is_head = head < HEADS

    c = tl.arange(0, WORDS) * PACK
    p = tl.arange(0, shape.BLOCK_P)
    n = tl.arange(0, N)
    q = ()
    y = ()
    for j in tl.static_range(SLICES * PACK):
        channel = j // PACK * WORDS * PACK + j % PACK + c[:, None]
        channels = tl.load(
            inputs.queries_ptr + query_row[None, :] * C + channel,
            mask=is_head[None, :] & (channel < C),
            other=0.0,
        )
        q = q + (channels.to(dtype),)  # (WORDS, G)
        y = y + (tl.zeros([WORDS, G], tl.float32),)
    if P:
        q_pe = tl.load(
            inputs.queries_pe_ptr + query_row[None, :] * P + p[:, None],
            mask=is_head[None, :] & (p[:, None] < P),
            other=0.0,
        )
    k_codes_ptr = inputs.k_codes_ptr + kv_head * (C // PACK)
    v_codes_ptr = inputs.v_codes_ptr + kv_head * (C // PACK)
    k_scales_ptr = inputs.k_scales_ptr
    v_scales_ptr = inputs.v_scales_ptr
    if shape.BITS:
        k_scales_ptr += kv_head * (C // shape.GROUP)
        v_scales_ptr += kv_head * (C // shape.GROUP)

    maximum = tl.full([G], -1e30, tl.float32)
    total = tl.zeros([N, G], tl.float32)
    count = tl.cdiv(span.limit - span.start, N) * N
    first = span.start + span.first_tile * N
    end = span.start + count
    last = tl.maximum(span.limit - 1, 0)

    # Where a tile lies in one page, only the address of its first slot needs 64 bits. The pages of
    # a tile are loaded while the tile before it is read: an address that has to wait for its own
    # load could not be fetched ahead.
    ONE_PAGE: tl.constexpr = PAGE % N == 0 and not RING
    if PAGE:
        if ONE_PAGE:
            next_page = load_page(sequence, tl.minimum(first, last), shape)
        else:
            next_page = load_page(sequence, tl.minimum(first + n, last), shape)
    for i in tl.range(first, first + count, N, num_stages=shape.NUM_STAGES):
        # Tiles from `first` to the end, then those before it. Slots are base + offset (N,).
        at = tl.where(i < end, i, i - count)
        next_at = tl.where(i + N < end, i + N, i + N - count)
        inside = at + n < span.limit
        offset = tl.minimum(n, last - at)
        base = sequence.slot * sequence.size + at
        if PAGE:
            if ONE_PAGE:
                base = next_page.to(tl.int64) * PAGE + at % PAGE
                next_page = load_page(sequence, tl.minimum(next_at, last), shape)
            else:
                offset = next_page.to(tl.int64) * PAGE + (at + offset) % PAGE
                base = 0
                next_page = load_page(sequence, tl.minimum(next_at + n, last), shape)
        if P:
            k_pe_ptr = inputs.k_pe_ptr + base * P + offset[:, None] * P + p[None, :]
            if P == shape.BLOCK_P:
                k_pe = tl.load(k_pe_ptr)
            else:
                k_pe = tl.load(k_pe_ptr, mask=p[None, :] < P, other=0.0)
        if RING:
            offset = tl.minimum(at + n, last) % RING
            base = sequence.slot * RING
        # Shared memory has no room yet for a tile that comes later, but L2 has.
        if shape.PREFETCH and shape.LATENT and C == shape.BLOCK_C and PAGE % N == 0:
            later = i + shape.PREFETCH * N
            later = tl.where(later < end, later, tl.maximum(later - count, span.start))
            prefetch_tile(inputs, sequence, later, k_codes_ptr, shape)

        if P:
            logits = tl.dot(k_pe, q_pe, input_precision=PRECISION)
        else:
            logits = tl.zeros([N, G], tl.float32)
        k_tile_ptr = k_codes_ptr + base * WORDS_OF_SLOT
        k_tile_scales_ptr = k_scales_ptr
        if shape.BITS:
            k_tile_scales_ptr += base * GROUPS_OF_SLOT
        for s in tl.static_range(SLICES):
            words, scales = load_words(k_tile_ptr, k_tile_scales_ptr, offset, s, False, shape)
            k = dequantize(words, scales, False, dtype, shape)
            for j in tl.static_range(PACK):
                logits = tl.dot(k[j], q[s * PACK + j], logits, input_precision=PRECISION)

        maximum, total, weights, rescale = softmax_tile(logits, inside, maximum, total, factor)
        weights = weights.to(dtype)
        v_tile_ptr = v_codes_ptr + base * WORDS_OF_SLOT
        v_tile_scales_ptr = v_scales_ptr
        if shape.BITS:
            v_tile_scales_ptr += base * GROUPS_OF_SLOT
        sums = ()
        for s in tl.static_range(SLICES):
            # Codes of a latent are read twice, as rows and transposed. The second time they are
            # still in L2. A latent of floats is read once.
            v = k
            if shape.BITS:
                words, scales = load_words(v_tile_ptr, v_tile_scales_ptr, offset, s, True, shape)
                v = dequantize(words, scales, True, dtype, shape)
            elif not shape.LATENT:
                words, scales = load_words(v_tile_ptr, v_tile_scales_ptr, offset, s, False, shape)
                v = (words,)
            for j in tl.static_range(PACK):
                v_t = v[j] if shape.BITS else tl.trans(v[j])
                before = y[s * PACK + j] * rescale[None, :]
                sums = sums + (tl.dot(v_t, weights, before, input_precision=PRECISION),)
        y = sums

    # Not 0, so that y is 0 where there was no token.
    total = tl.maximum(tl.sum(total, 0), 1e-30)
    out_row = query_row * part.count + part.index
    for j in tl.static_range(SLICES * PACK):
        channel = j // PACK * WORDS * PACK + j % PACK + c[:, None]
        mean = y[j] * (1 / total)[None, :]
        tl.store(
            part.out_ptr + out_row[None, :] * C + channel,
            mean.to(part.out_ptr.dtype.element_ty),
            mask=is_head[None, :] & (channel < C),
        )
    tl.store(part.lse_ptr + out_row, maximum + tl.log2(total), mask=is_head)


@triton.jit
def decode_kernel(
    queries_ptr,
    queries_pe_ptr,
    k_codes_ptr,
    k_scales_ptr,
    k_recent_ptr,
    v_codes_ptr,
    v_scales_ptr,
    v_recent_ptr,
    k_pe_ptr,
    block_table_ptr,
    lengths_ptr,
    rows_ptr,
    out_ptr,
    lse_ptr,
    factor,
    splits,
    size,
    pages,
    shape: tl.constexpr,
    window_shape: tl.constexpr,
):
    """
    Attend to one of `splits` parts of a sequence: program (split, tile of heads, sequence).

    factor: softmax scale times log2(e). The program of the last split also attends to the window
    of full precision, compiled for `window_shape`; the window is a part of its own.
    """
    split = tl.program_id(0)
    b = tl.program_id(2)
    N: tl.constexpr = shape.BLOCK_N
    WINDOW: tl.constexpr = shape.WINDOW
    slot = (tl.load(rows_ptr + b) if shape.HAS_ROWS else b).to(tl.int64)
    length = tl.load(lengths_ptr + b).to(tl.int32)
    share = tl.cdiv(tl.cdiv(length, splits), N) * N
    start = split * share
    end = tl.minimum(split * share + share, length)
    end = tl.maximum(tl.minimum(end, length - WINDOW), start)
    # Programs that begin at the same slot of their sequences would all ask the same part of the
    # memory.
    first_tile = 0
    if shape.STAGGER:
        first_tile = (b * 7 + split * 3) % tl.maximum(tl.cdiv(end - start, N), 1)
    parts = splits
    if WINDOW:
        parts = splits + 1

    sequence = Sequence(b, slot, block_table_ptr, size, pages)
    inputs = Inputs(
        queries_ptr, queries_pe_ptr, k_codes_ptr, k_scales_ptr, v_codes_ptr, v_scales_ptr, k_pe_ptr
    )
    span = Span(start, end, first_tile)
    attend_span(inputs, sequence, span, Part(out_ptr, lse_ptr, split, parts), factor, shape)
    if WINDOW:
        if split == splits - 1:
            recent = Inputs(
                queries_ptr,
                queries_pe_ptr,
                k_recent_ptr,
                k_scales_ptr,
                v_recent_ptr,
                v_scales_ptr,
                k_pe_ptr,
            )
            span = Span(tl.maximum(length - WINDOW, 0), length, 0)
            part = Part(out_ptr, lse_ptr, splits, parts)
            attend_span(recent, sequence, span, part, factor, window_shape)


@triton.jit
def join_kernel(
    parts_ptr,
    lse_ptr,
    out_ptr,
    parts,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
):
    """
    Average the parts (B, H, parts, C), weighted by their softmax's sums, into out (B, H, C):
    program (head of a sequence, BLOCK_C of its channels).
    """
    row = tl.program_id(0).to(tl.int64)
    s = tl.arange(0, BLOCK_PARTS)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    lse = tl.load(lse_ptr + row * parts + s, mask=s < parts, other=-1e30)
    weight = tl.exp2(lse - tl.max(lse, 0))
    weight = weight / tl.sum(weight, 0)
    y = tl.load(
        parts_ptr + (row * parts + s[:, None]) * C + c[None, :],
        mask=(s[:, None] < parts) & (c[None, :] < C),
        other=0.0,
    )
    mean = tl.sum(y * weight[:, None], 0)
    tl.store(out_ptr + row * C + c, mean.to(out_ptr.dtype.element_ty), mask=c < C)


# -------------------------------------------------------------------------------------------------
# append: a new token's keys and values, on their way into the cache


@triton.jit
def load_with_rope_or_norm(x_ptr, rope, norm, NORM: tl.constexpr, shape: tl.constexpr):
    """
    Load the channels of a token (WIDTH,): with their RMS set to 1 and times a gain (NORM), or with
    RoPE in heads of ROPE_DIM channels, or as they are.
    """
    WIDTH: tl.constexpr = shape.WIDTH
    ROPE_DIM: tl.constexpr = shape.ROPE_DIM
    c = tl.arange(0, shape.BLOCK_WIDTH)
    y = tl.load(x_ptr + c, mask=c < WIDTH, other=0.0)
    dtype: tl.constexpr = y.dtype
    if NORM:
        y = y.to(tl.float32)
        rms_inverse = tl.rsqrt(tl.sum(y * y, 0) / WIDTH + norm.eps)
        gain = tl.load(norm.gain_ptr + c, mask=c < WIDTH, other=0.0).to(tl.float32)
        y = (y * rms_inverse * gain).to(dtype)
    if ROPE_DIM:
        # Channel i of a head's first half turns with channel i of its second half.
        HALF: tl.constexpr = ROPE_DIM // 2
        in_first = c % ROPE_DIM < HALF
        pair = c % HALF
        partner = tl.where(in_first, c + HALF, c - HALF)
        other = tl.load(x_ptr + partner, mask=c < WIDTH, other=0.0).to(tl.float32)
        cos = tl.load(rope.cos_ptr + pair)
        sin = tl.load(rope.sin_ptr + pair)
        y = (y.to(tl.float32) * cos + tl.where(in_first, -other, other) * sin).to(dtype)
    return y


@triton.jit
def store_token(x, codes_ptr, scales_ptr, slot, BITS: tl.constexpr, shape: tl.constexpr):
    """Store a token's channels x (WIDTH,) at a slot: as they are, or as quantise does it."""
    WIDTH: tl.constexpr = shape.WIDTH
    BLOCK: tl.constexpr = shape.BLOCK_WIDTH
    GROUP: tl.constexpr = shape.GROUP
    GROUPS: tl.constexpr = WIDTH // GROUP
    BLOCK_GROUPS: tl.constexpr = BLOCK // GROUP
    c = tl.arange(0, BLOCK)
    if BITS == 0:
        x = x.to(codes_ptr.dtype.element_ty)
        tl.store(codes_ptr + slot * WIDTH + c, x, mask=c < WIDTH)
    else:
        g = tl.arange(0, BLOCK_GROUPS)
        top: tl.constexpr = 2**BITS - 1
        x = tl.reshape(x.to(tl.float32), [BLOCK_GROUPS, GROUP])
        low = tl.min(x, 1)
        high = tl.max(x, 1)
        zero = (low - tl.abs(low) * 2**-10 - 2**-24).to(tl.float16)
        scale = (high - zero.to(tl.float32)) / top * (1 + 2**-10)
        scale = tl.maximum(scale, 2**-14).to(tl.float16)
        # Scale and zero of each group in turn.
        tl.store(scales_ptr + slot * (2 * GROUPS) + 2 * g, scale, mask=g < GROUPS)
        tl.store(scales_ptr + slot * (2 * GROUPS) + 2 * g + 1, zero, mask=g < GROUPS)
        x = (x - zero.to(tl.float32)[:, None]) / scale.to(tl.float32)[:, None]
        codes = tl.minimum(tl.maximum(tl.floor(x + 0.5), 0.0), top).to(tl.int32)
        if BITS == 4:
            # An even channel is in the low half of a byte.
            even, odd = tl.split(tl.reshape(codes, [BLOCK_GROUPS, GROUP // 2, 2]))
            codes = tl.reshape(even | (odd << 4), [BLOCK // 2]).to(tl.uint8)
            c = tl.arange(0, BLOCK // 2)
            tl.store(codes_ptr + slot * (WIDTH // 2) + c, codes, mask=c < WIDTH // 2)
        else:
            codes = tl.reshape(codes, [BLOCK]).to(tl.uint8)
            tl.store(codes_ptr + slot * WIDTH + c, codes, mask=c < WIDTH)


@triton.jit
def append_kernel(
    first_ptr,
    first_codes_ptr,
    first_scales_ptr,
    first_recent_ptr,
    first_stride,
    second_ptr,
    second_codes_ptr,
    second_scales_ptr,
    second_recent_ptr,
    second_stride,
    query_ptr,
    query_stride,
    query_out_ptr,
    cos_ptr,
    sin_ptr,
    gain_ptr,
    eps,
    block_table_ptr,
    lengths_ptr,
    counts_ptr,
    rows_ptr,
    size,
    pages,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    QUERY: tl.constexpr,
    ROPE_HALF: tl.constexpr,
    NORM: tl.constexpr,
    WINDOW: tl.constexpr,
    PAGE: tl.constexpr,
    HAS_ROWS: tl.constexpr,
):
    """
    Write a sequence's new token, if it has one (counts (B,)), after those that were there:
    program (sequence, store).

    The first program of a sequence writes to the first store (with NORM: normed), the second to
    the second, the third applies RoPE to the query. FIRST, SECOND and QUERY are StoreShapes, QUERY
    may be None. Tables of RoPE are (B, ROPE_HALF). lengths (B,) count the new tokens. A store with
    codes also writes its token into its window, a ring buffer of WINDOW slots a sequence.
    """
    b = tl.program_id(0)
    if ROPE_HALF:
        cos_ptr += b * ROPE_HALF
        sin_ptr += b * ROPE_HALF
    rope = Rope(cos_ptr, sin_ptr)
    norm = NormWeight(gain_ptr, eps)
    if QUERY is not None:
        if tl.program_id(1) == 2:
            c = tl.arange(0, QUERY.BLOCK_WIDTH)
            query = load_with_rope_or_norm(query_ptr + b * query_stride, rope, norm, False, QUERY)
            tl.store(query_out_ptr + b * QUERY.WIDTH + c, query, mask=c < QUERY.WIDTH)
    row = (tl.load(rows_ptr + b) if HAS_ROWS else b).to(tl.int64)
    if tl.load(counts_ptr + b) > 0:
        position = tl.load(lengths_ptr + b).to(tl.int64) - tl.load(counts_ptr + b).to(tl.int64)
        if PAGE:
            page = tl.load(block_table_ptr + row * pages + position // PAGE).to(tl.int64)
            slot = page * PAGE + position % PAGE
        else:
            slot = row * size + position
        ring_slot = slot
        if WINDOW:
            ring_slot = row * WINDOW + position % WINDOW
        if tl.program_id(1) == 0:
            x = load_with_rope_or_norm(first_ptr + b * first_stride, rope, norm, NORM, FIRST)
            if WINDOW and FIRST.BITS:
                store_token(x, first_recent_ptr, first_scales_ptr, ring_slot, 0, FIRST)
            store_token(x, first_codes_ptr, first_scales_ptr, slot, FIRST.BITS, FIRST)
        elif tl.program_id(1) == 1:
            x = load_with_rope_or_norm(second_ptr + b * second_stride, rope, norm, False, SECOND)
            if WINDOW and SECOND.BITS:
                store_token(x, second_recent_ptr, second_scales_ptr, ring_slot, 0, SECOND)
            store_token(x, second_codes_ptr, second_scales_ptr, slot, SECOND.BITS, SECOND)
