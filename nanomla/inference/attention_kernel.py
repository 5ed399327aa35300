"""
Attention of one new token a sequence over a cache, read where it lies: one Triton kernel for MLA in its
absorbed form and for MHA, GQA and MQA; dense or paged; 16-bit floats, int8 or int4.

A sequence is cut into `splits` parts, so that a few long ones fill the card (flash-decoding, Dao et al.
2023); each program brings tiles of N tokens into shared memory once and uses them for logits and
values. All is transposed: tokens are the rows of the tensor cores' 64-row products and heads the columns,
so that 16 heads waste nothing. A second kernel joins the parts. `reference` is the same in plain PyTorch.

Legend: B sequences, H heads, K key/value heads, G heads of a program that share one, N tokens of a tile, C width of a key
and of a value (MLA: of the latent, which is both), P width of k_pe, W window.
"""

from __future__ import annotations  # `tl.constexpr` below is read by Triton, not by Python

import json
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace

import torch

from nanomla.core.devices import RUNS_ON

triton = tl = None  # set by kernels()
LOG2E = 1.4426950408889634
AT_ONCE = 8192  # numbers that a program of four warps joins: 64 registers a thread
SHORT = 1024  # places of a sequence up to which tiles are chosen for the time that a program takes to begin and to end
COMPILED = 'cpu' not in RUNS_ON  # the interpreter knows no instructions of the GPU


@lru_cache
def kernels():
    """Loads Triton and hands the functions below to it; it compiles each at its first call."""
    global triton, tl, tile, spread, unpack, weigh, fetch, part, turned, keep_one
    import triton
    import triton.language as tl

    tile, spread, unpack, weigh, fetch, part, turned, keep_one = map(
        triton.jit, (tile, spread, unpack, weigh, fetch, part, turned, keep_one)
    )
    return SimpleNamespace(
        decode=triton.jit(decode_kernel), join=triton.jit(join_kernel), keep=triton.jit(keep_kernel)
    )


def tile(
    codes,
    scales,
    rows,
    slice: tl.constexpr,
    WORDS: tl.constexpr,
    C: tl.constexpr,
    WIDTH: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    TURNED: tl.constexpr,
):
    """
    A slice of the channels of one head at `rows` of a store as they lie there: words (N, WORDS), and pairs of scale and zero (N, groups).
    TURNED: all the other way round, which is how the second product wants codes: turned as numbers they would go through shared memory once more.
    """
    PACK: tl.constexpr = 16 // BITS if BITS else 1
    c, g = (
        slice * WORDS + tl.arange(0, WORDS),
        slice * (WORDS * PACK // GROUP) + tl.arange(0, WORDS * PACK // GROUP),
    )
    if TURNED:
        rows, c, g = rows[None, :], c[:, None], g[:, None]
    else:
        rows, c, g = rows[:, None], c[None, :], g[None, :]
    ALL: tl.constexpr = (slice + 1) * WORDS * PACK <= C
    here = codes + rows * (WIDTH // PACK) + c
    x = tl.load(here) if ALL else tl.load(here, mask=c < C // PACK, other=0)
    pair = x
    if BITS:
        here = scales + rows * (WIDTH // GROUP) + g
        pair = tl.load(here) if ALL else tl.load(here, mask=g < C // GROUP, other=0)
    return x, pair


def spread(x, EACH: tl.constexpr, TURNED: tl.constexpr):
    """Every group's number for each of its EACH words, (N, groups) -> (N, words), or TURNED."""
    A: tl.constexpr = x.shape[0]
    B: tl.constexpr = x.shape[1]
    if TURNED:
        x = tl.reshape(tl.broadcast_to(x[:, None, :], [A, EACH, B]), [A * EACH, B])
    else:
        x = tl.reshape(tl.broadcast_to(x[:, :, None], [A, B, EACH]), [A, B * EACH])
    return x


def unpack(
    held,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    TURNED: tl.constexpr,
    ASM: tl.constexpr,
    dtype: tl.constexpr,
):
    """
    A tile as PACK tensors of numbers: with the first channel of each word, with the second, ...

    The GPU's own conversion takes several instructions a number. Here two numbers, in the halves of a register, take three: in fp16
    0x6400 | code is 1024 + code, and 0x4c00 | code << 6 is 16 + code, whose 16 goes into the zero (2^-11 of 32 scales is all that
    this may round away, and zeros and 16 scales together must stay within fp16's 65,504).
    """
    x, pair = held
    if BITS == 0:
        x = (x,)
    else:
        scale = pair.to(tl.uint16).to(tl.float16, bitcast=True).to(dtype)
        zero = (pair >> 16).to(tl.uint16).to(tl.float16, bitcast=True).to(dtype)
        if ASM and BITS == 4:
            zero = zero - scale * 16
        scale, zero = (
            spread(scale, GROUP * BITS // 16, TURNED),
            spread(zero, GROUP * BITS // 16, TURNED),
        )
        if ASM and BITS == 4:
            x = tl.inline_asm_elementwise(
                """{
                .reg .b32 a, b, c, d;
                shl.b32 a, $4, 6; shl.b32 b, $4, 2; shr.u32 c, $4, 2; shr.u32 d, $4, 6;
                lop3.b32 a, a, 0x03c003c0, 0x4c004c00, 0xea; lop3.b32 b, b, 0x03c003c0, 0x4c004c00, 0xea;
                lop3.b32 c, c, 0x03c003c0, 0x4c004c00, 0xea; lop3.b32 d, d, 0x03c003c0, 0x4c004c00, 0xea;
                fma.rn.f16x2 $0, a, $5, $6; fma.rn.f16x2 $1, b, $5, $6; fma.rn.f16x2 $2, c, $5, $6; fma.rn.f16x2 $3, d, $5, $6; }""",
                '=r,=r,=r,=r,r,r,r',
                [x, scale, zero],
                dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
                is_pure=True,
                pack=2,
            )
        elif ASM:
            x = tl.inline_asm_elementwise(
                """{
                .reg .b32 a, b, m;
                mov.b32 m, 0xe400e400;
                prmt.b32 a, $2, 0x64646464, 0x4240; prmt.b32 b, $2, 0x64646464, 0x4341;
                add.rn.f16x2 a, a, m; add.rn.f16x2 b, b, m;
                fma.rn.f16x2 $0, a, $3, $4; fma.rn.f16x2 $1, b, $3, $4; }""",
                '=r,=r,r,r,r',
                [x, scale, zero],
                dtype=(tl.float16, tl.float16),
                is_pure=True,
                pack=2,
            )
        elif BITS == 4:
            x = (
                (x & 15).to(dtype) * scale + zero,
                ((x >> 4) & 15).to(dtype) * scale + zero,
                ((x >> 8) & 15).to(dtype) * scale + zero,
                (x >> 12).to(dtype) * scale + zero,
            )
        else:
            x = ((x & 255).to(dtype) * scale + zero, (x >> 8).to(dtype) * scale + zero)
    return x


def weigh(s, inside, best, total, factor):
    """
    A tile's weights p (N, G) by its logits s in the running softmax: its maximum `best` (G,), and `total` (N, G), whose rows are summed
    at the end: a sum over rows makes the warps wait for each other. `fade` (G,) is what earlier weights lose.
    """
    s = tl.where(inside[:, None], s * factor, -1e30)  # finite: nothing less nothing is not nan
    higher = tl.maximum(best, tl.max(s, 0))
    p = tl.exp2(s - higher[None, :])
    fade = tl.exp2(best - higher)
    return higher, total * fade[None, :] + p, p, fade


def fetch(start, COUNT: tl.constexpr):
    """Asks for COUNT elements from `start` on to come into the L2 cache, a line of 128 bytes a lane."""
    A_LINE: tl.constexpr = 128 * 8 // start.dtype.element_ty.primitive_bitwidth
    lines = start + tl.arange(0, COUNT // A_LINE) * A_LINE
    tl.inline_asm_elementwise(
        'prefetch.global.L2 [$1]; mov.u32 $0, 0;',
        '=r,l',
        [lines.to(tl.int64)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


def part(
    index,
    parts,
    start,
    limit,
    shift,
    queries,
    queries_pe,
    k_codes,
    k_scales,
    v_codes,
    v_scales,
    pes,
    table,
    out,
    lse,
    factor,
    b,
    slot,
    size,
    pages,
    H: tl.constexpr,
    K: tl.constexpr,
    G: tl.constexpr,
    C: tl.constexpr,
    CP: tl.constexpr,
    P: tl.constexpr,
    PP: tl.constexpr,
    LATENT: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    RING: tl.constexpr,
    PAGE: tl.constexpr,
    N: tl.constexpr,
    STAGES: tl.constexpr,
    AHEAD: tl.constexpr,
    IEEE: tl.constexpr,
    ASM: tl.constexpr,
):
    """
    Part `index` of `parts`: y (C, G) of the tokens from `start` to `limit`, the tile `shift` first, and log2 of their softmax's sum. The last
    tile has its last token again instead of what is behind it. RING: codes are a window, a ring of so many places.
    """
    TILES: tl.constexpr = (H // K + G - 1) // G
    head, mine = tl.program_id(1) // TILES, tl.program_id(1) % TILES * G + tl.arange(0, G)
    each = b.to(tl.int64) * H + head * (H // K) + mine  # the program's rows of (B, H)
    mine = mine < H // K
    PACK: tl.constexpr = (
        16 // BITS if BITS else 1
    )  # codes come as words of 16 bits: a slice is PACK tensors, of a word's first channel, its second, ...
    WORDS: tl.constexpr = (
        min(64, CP // PACK) if BITS else CP
    )  # of a slice: the 64 rows of a product; more at a time would take more registers
    SLICES: tl.constexpr = CP // PACK // WORDS
    CS: tl.constexpr = K * C // PACK  # what a place takes in a store's codes,
    GS: tl.constexpr = K * C // GROUP if BITS else 0  # and in its scales
    full: tl.constexpr = queries.dtype.element_ty
    dtype: tl.constexpr = (
        tl.float16 if BITS and full != tl.float32 else full
    )  # codes, scales and zeros are whole in fp16, and half the registers of fp32
    c, p, n = tl.arange(0, WORDS) * PACK, tl.arange(0, PP), tl.arange(0, N)
    q, y = (), ()
    for j in tl.static_range(SLICES * PACK):
        channel = (
            j // PACK * WORDS * PACK + j % PACK + c[:, None]
        )  # channels of a slice's j-th tensor
        q = q + (
            tl.load(
                queries + each[None, :] * C + channel, mask=mine[None, :] & (channel < C), other=0.0
            ).to(dtype),
        )  # (C, G)
        y = y + (tl.zeros([WORDS, G], tl.float32),)
    q_pe = (
        tl.load(
            queries_pe + each[None, :] * P + p[:, None],
            mask=mine[None, :] & (p[:, None] < P),
            other=0.0,
        )
        if P
        else q[0]
    )
    k_codes, v_codes = k_codes + head * (C // PACK), v_codes + head * (C // PACK)
    if BITS:
        k_scales, v_scales = k_scales + head * (C // GROUP), v_scales + head * (C // GROUP)

    best, total = tl.full([G], -1e30, tl.float32), tl.zeros([N, G], tl.float32)
    count = tl.cdiv(limit - start, N) * N
    first, end, last = start + shift * N, start + count, tl.maximum(limit - 1, 0)
    IN_ONE: tl.constexpr = (
        PAGE % N == 0 and not RING
    )  # a tile lies in one page: only its beginning needs 64 bits
    if PAGE:  # a tile's pages are asked for while the tile before is read: an address that waits for a load could not be fetched ahead
        following = tl.load(
            table + slot * pages + tl.minimum(first if IN_ONE else first + n, last) // PAGE
        )
    for i in tl.range(first, first + count, N, num_stages=STAGES):
        at = tl.where(
            i < end, i, i - count
        )  # from tile `shift` on, and what is before it at the end
        ahead = tl.where(i + N < end, i + N, i + N - count)
        inside = at + n < limit
        place, base = tl.minimum(n, last - at), slot * size + at
        if PAGE:
            if IN_ONE:
                base = following.to(tl.int64) * PAGE + at % PAGE
                following = tl.load(table + slot * pages + tl.minimum(ahead, last) // PAGE)
            else:
                place, base = following.to(tl.int64) * PAGE + (at + place) % PAGE, 0
                following = tl.load(table + slot * pages + tl.minimum(ahead + n, last) // PAGE)
        if P:
            pe = pes + base * P + place[:, None] * P + p[None, :]
            pe = tl.load(pe) if P == PP else tl.load(pe, mask=p[None, :] < P, other=0.0)
        if RING:
            place, base = tl.minimum(at + n, last) % RING, slot * RING
        if (
            AHEAD and LATENT and C == CP and PAGE % N == 0
        ):  # ask the L2 cache for a later tile: shared memory has no room for it yet
            later = i + AHEAD * N
            later = tl.where(later < end, later, tl.maximum(later - count, start))
            far = (
                tl.load(table + slot * pages + later // PAGE).to(tl.int64) * PAGE + later % PAGE
                if PAGE
                else slot * size + tl.minimum(later, size - N)
            )
            fetch(k_codes + far * CS, N * CS)
            if P:
                fetch(pes + far * P, N * P)
        s = tl.dot(pe, q_pe, input_precision=IEEE) if P else tl.zeros([N, G], tl.float32)
        for slice in tl.static_range(SLICES):
            k = unpack(
                tile(
                    k_codes + base * CS,
                    k_scales + base * GS if BITS else k_scales,
                    place,
                    slice,
                    WORDS,
                    C,
                    K * C,
                    BITS,
                    GROUP,
                    False,
                ),
                BITS,
                GROUP,
                False,
                ASM,
                dtype,
            )
            for j in tl.static_range(PACK):
                s = tl.dot(k[j], q[slice * PACK + j], s, input_precision=IEEE)
        best, total, weight, fade = weigh(s, inside, best, total, factor)
        weight, sums = weight.to(dtype), ()
        for slice in tl.static_range(SLICES):
            v = k
            if (
                BITS or not LATENT
            ):  # codes of a latent too are read twice, as rows and turned, and then found in the L2 cache
                v = unpack(
                    tile(
                        v_codes + base * CS,
                        v_scales + base * GS if BITS else v_scales,
                        place,
                        slice,
                        WORDS,
                        C,
                        K * C,
                        BITS,
                        GROUP,
                        BITS > 0,
                    ),
                    BITS,
                    GROUP,
                    True,
                    ASM,
                    dtype,
                )
            for j in tl.static_range(PACK):
                sums = sums + (
                    tl.dot(
                        v[j] if BITS else tl.trans(v[j]),
                        weight,
                        y[slice * PACK + j] * fade[None, :],
                        input_precision=IEEE,
                    ),
                )
        y = sums

    total = tl.maximum(tl.sum(total, 0), 1e-30)  # 0 times its inverse is 0 where there was no token
    for j in tl.static_range(SLICES * PACK):
        channel = j // PACK * WORDS * PACK + j % PACK + c[:, None]
        to = out + (each * parts + index)[None, :] * C + channel
        tl.store(
            to,
            (y[j] * (1 / total)[None, :]).to(out.dtype.element_ty),
            mask=mine[None, :] & (channel < C),
        )
    tl.store(lse + each * parts + index, best + tl.log2(total), mask=mine)


def decode_kernel(
    queries,
    queries_pe,
    k_codes,
    k_scales,
    k_recent,
    v_codes,
    v_scales,
    v_recent,
    pes,
    table,
    lengths,
    rows,
    out,
    lse,
    factor,
    splits,
    size,
    pages,
    H: tl.constexpr,
    K: tl.constexpr,
    G: tl.constexpr,
    C: tl.constexpr,
    CP: tl.constexpr,
    P: tl.constexpr,
    PP: tl.constexpr,
    LATENT: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    W: tl.constexpr,
    PAGE: tl.constexpr,
    ROWS: tl.constexpr,
    N: tl.constexpr,
    STAGES: tl.constexpr,
    AHEAD: tl.constexpr,
    TURN: tl.constexpr,
    IEEE: tl.constexpr,
    ASM: tl.constexpr,
):
    """Program (split, kv head and tile of its heads, sequence): its part of a sequence; the last split also the window, which is a part of its own."""
    split, b = tl.program_id(0), tl.program_id(2)
    slot = (tl.load(rows + b) if ROWS else b).to(tl.int64)
    length = tl.load(lengths + b).to(tl.int32)
    share = tl.cdiv(tl.cdiv(length, splits), N) * N
    start, end = split * share, tl.minimum(split * share + share, length)
    end = tl.maximum(tl.minimum(end, length - W), start)
    # Programs that begin at the same place of their sequences would all ask the same part of the memory: with TURN they do not
    shift = (b * 7 + split * 3) % tl.maximum(tl.cdiv(end - start, N), 1) if TURN else 0
    parts = splits + 1 if W else splits
    part(
        split,
        parts,
        start,
        end,
        shift,
        queries,
        queries_pe,
        k_codes,
        k_scales,
        v_codes,
        v_scales,
        pes,
        table,
        out,
        lse,
        factor,
        b,
        slot,
        size,
        pages,
        H,
        K,
        G,
        C,
        CP,
        P,
        PP,
        LATENT,
        BITS,
        GROUP,
        0,
        PAGE,
        N,
        STAGES,
        AHEAD,
        IEEE,
        ASM,
    )
    if W:
        if split == splits - 1:  # in full precision
            part(
                splits,
                parts,
                tl.maximum(length - W, 0),
                length,
                0,
                queries,
                queries_pe,
                k_recent,
                k_scales,
                v_recent,
                v_scales,
                pes,
                table,
                out,
                lse,
                factor,
                b,
                slot,
                size,
                pages,
                H,
                K,
                G,
                C,
                CP,
                P,
                PP,
                LATENT,
                0,
                GROUP,
                W,
                PAGE,
                min(N, 32),
                2,
                0,
                IEEE,
                ASM,
            )


def join_kernel(parts, lse, out, splits, C: tl.constexpr, CC: tl.constexpr, SP: tl.constexpr):
    """Program (head of a sequence, CC of its channels): the parts' mean, weighted by their softmax's sums."""
    row = tl.program_id(0).to(tl.int64)
    s, c = tl.arange(0, SP), tl.program_id(1) * CC + tl.arange(0, CC)
    bits = tl.load(lse + row * splits + s, mask=s < splits, other=-1e30)
    weight = tl.exp2(bits - tl.max(bits, 0))
    weight = weight / tl.sum(weight, 0)
    x = tl.load(
        parts + (row * splits + s[:, None]) * C + c[None, :],
        mask=(s[:, None] < splits) & (c[None, :] < C),
        other=0.0,
    )
    tl.store(out + row * C + c, tl.sum(x * weight[:, None], 0).to(out.dtype.element_ty), mask=c < C)


# -------------------------------------------------------------------------------------------------
# the new token's own keys and values, on their way into the cache


def turned(
    x,
    cos,
    sin,
    gain,
    eps,
    WIDTH: tl.constexpr,
    WP: tl.constexpr,
    TURN: tl.constexpr,
    NORM: tl.constexpr,
):
    """WIDTH channels: their RMS set to 1 (NORM), or heads of TURN channels turned by RoPE; as they are with neither."""
    c = tl.arange(0, WP)
    y = tl.load(x + c, mask=c < WIDTH, other=0.0)
    dtype: tl.constexpr = y.dtype
    if NORM:
        y = y.to(tl.float32)
        y = (
            y
            * tl.rsqrt(tl.sum(y * y, 0) / WIDTH + eps)
            * tl.load(gain + c, mask=c < WIDTH, other=0.0).to(tl.float32)
        ).to(dtype)
    if TURN:
        HALF: tl.constexpr = TURN // 2
        low, pair = c % TURN < HALF, c % HALF
        other = tl.load(x + tl.where(low, c + HALF, c - HALF), mask=c < WIDTH, other=0.0).to(
            tl.float32
        )
        y = (
            y.to(tl.float32) * tl.load(cos + pair)
            + tl.where(low, -other, other) * tl.load(sin + pair)
        ).to(dtype)
    return y


def keep_one(
    x,
    codes,
    scales,
    recent,
    place,
    in_ring,
    WIDTH: tl.constexpr,
    WP: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    W: tl.constexpr,
):
    c = tl.arange(0, WP)
    if W:
        tl.store(recent + in_ring * WIDTH + c, x.to(recent.dtype.element_ty), mask=c < WIDTH)
    if BITS == 0:
        tl.store(codes + place * WIDTH + c, x.to(codes.dtype.element_ty), mask=c < WIDTH)
    else:  # as cache.quantise does it
        g = tl.arange(0, WP // GROUP)
        x = tl.reshape(x.to(tl.float32), [WP // GROUP, GROUP])
        low, high, top = tl.min(x, 1), tl.max(x, 1), 2**BITS - 1
        zero = (low - tl.abs(low) * 2**-10 - 2**-24).to(tl.float16)
        scale = tl.maximum((high - zero.to(tl.float32)) / top * (1 + 2**-10), 2**-14).to(tl.float16)
        tl.store(scales + place * (2 * WIDTH // GROUP) + 2 * g, scale, mask=g < WIDTH // GROUP)
        tl.store(scales + place * (2 * WIDTH // GROUP) + 2 * g + 1, zero, mask=g < WIDTH // GROUP)
        x = (x - zero.to(tl.float32)[:, None]) / scale.to(tl.float32)[:, None]
        x = tl.minimum(tl.maximum(tl.floor(x + 0.5), 0.0), top).to(tl.int32)
        if BITS == 4:
            even, odd = tl.split(tl.reshape(x, [WP // GROUP, GROUP // 2, 2]))
            x = tl.reshape(even | (odd << 4), [WP // 2])
            c = tl.arange(0, WP // 2)
            tl.store(codes + place * (WIDTH // 2) + c, x.to(tl.uint8), mask=c < WIDTH // 2)
        else:
            tl.store(codes + place * WIDTH + c, tl.reshape(x, [WP]).to(tl.uint8), mask=c < WIDTH)


def keep_kernel(
    x,
    codes,
    scales,
    recent,
    stride,
    x2,
    codes2,
    scales2,
    recent2,
    stride2,
    query,
    query_stride,
    out,
    cos,
    sin,
    gain,
    eps,
    table,
    lengths,
    counts,
    rows,
    size,
    pages,
    WIDTH: tl.constexpr,
    WP: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH2: tl.constexpr,
    WP2: tl.constexpr,
    BITS2: tl.constexpr,
    GROUP2: tl.constexpr,
    QUERY: tl.constexpr,
    QP: tl.constexpr,
    TURNS: tl.constexpr,
    TURN: tl.constexpr,
    TURN2: tl.constexpr,
    HALF: tl.constexpr,
    NORM: tl.constexpr,
    W: tl.constexpr,
    PAGE: tl.constexpr,
    ROWS: tl.constexpr,
):
    """
    Program (sequence, store): one new token of a sequence that has one takes its place behind the `lengths` that were there,
    turned by RoPE or normed on its way. The third of a sequence's programs turns the query.
    """
    b = tl.program_id(0)
    if HALF:
        cos += b * HALF
        sin += b * HALF
    if QUERY:
        if tl.program_id(1) == 2:
            c = tl.arange(0, QP)
            tl.store(
                out + b * QUERY + c,
                turned(query + b * query_stride, cos, sin, gain, eps, QUERY, QP, TURNS, False),
                mask=c < QUERY,
            )
    slot = (tl.load(rows + b) if ROWS else b).to(tl.int64)
    if tl.load(counts + b) > 0:
        at = tl.load(lengths + b).to(tl.int64) - tl.load(counts + b).to(tl.int64)
        place = (
            tl.load(table + slot * pages + at // PAGE).to(tl.int64) * PAGE + at % PAGE
            if PAGE
            else slot * size + at
        )
        in_ring = slot * W + at % W if W else place
        if tl.program_id(1) == 0:
            keep_one(
                turned(x + b * stride, cos, sin, gain, eps, WIDTH, WP, TURN, NORM),
                codes,
                scales,
                recent,
                place,
                in_ring,
                WIDTH,
                WP,
                BITS,
                GROUP,
                W if BITS else 0,
            )
        elif tl.program_id(1) == 1:
            keep_one(
                turned(x2 + b * stride2, cos, sin, gain, eps, WIDTH2, WP2, TURN2, False),
                codes2,
                scales2,
                recent2,
                place,
                in_ring,
                WIDTH2,
                WP2,
                BITS2,
                GROUP2,
                W if BITS2 else 0,
            )


# -------------------------------------------------------------------------------------------------
# the call


def reason_not_to_run(device, dtype, C, bits, group, latent):
    """Why the kernel cannot serve heads (or a latent) of width C from such a store, as text; '' when it can."""
    if device.type not in RUNS_ON:
        return 'Triton and a CUDA GPU are needed'
    if device.type == 'cuda' and dtype not in (torch.bfloat16, torch.float16):
        return f'it multiplies in 16 bits, and this cache holds {str(dtype)[6:]}'
    if C > 512 or C % 2:
        return f'heads of width {C} are not served'
    if bits and (group & group - 1 or C % group or group < 16):
        return f'groups of {group} channels do not fit heads of width {C}'
    return ''


def power_of_2(n, least=16):
    return max(least, 1 << (n - 1).bit_length())


@lru_cache
def tiles_of_shapes():
    """What `bench.py decode --attention_only=True --tune=True` found best: shape_key -> [tokens of a tile, stages, ahead, turn]."""
    file = Path(__file__).with_name('tiles.json')
    return json.loads(file.read_text()) if file.exists() else {}


def shape_key(heads, C, P, latent, bits, size):
    return (
        f'{"latent" if latent else "kv"} {C}+{P}, {min(64, power_of_2(heads))} heads, {bits or 16} bits'
        + (f', up to {SHORT}' if size <= SHORT else '')
    )


def variants(C, latent, bits, size):
    """What is worth trying for a shape, as in tiles_of_shapes."""
    if latent and not bits:
        return [
            [64, stages, ahead, turn]
            for stages, ahead, turn in (
                (2, 1, 0),
                (2, 1, 1),
                (2, 0, 1),
                (3, 1, 1),
                (4, 0, 1),
                (4, 1, 0),
            )
            if stages * C < 1400
        ]
    if bits:
        return [[64, 2, 0, 0], [64, 2, 0, 1], [64, 3, 0, 1], [32, 3, 0, 1]]
    return [[64, 3, 0, 0], [64, 4, 0, 1], [128, 3, 0, 1]] + (
        [[64, 2, 0, 0], [32, 3, 0, 0], [32, 4, 0, 0]] if size <= SHORT else []
    )


@lru_cache
def card(device):
    """What a GPU has for programs: multiprocessors, and bytes of shared memory of one of them and of one program. Without a GPU: an H200."""
    if device.type != 'cuda':
        return 132, 228 * 1024, 227 * 1024
    gpu = torch.cuda.get_device_properties(device)
    return (
        gpu.multi_processor_count,
        gpu.shared_memory_per_multiprocessor,
        gpu.shared_memory_per_block_optin,
    )


def shared_bytes(G, N, stages, C, P, latent, bits):
    """Bytes of shared memory that a program takes at most, as Triton 3.6 compiles it: queries, weights, and the tiles that are on their way."""
    C, P = power_of_2(C), power_of_2(P) if P else 0  # as they lie there
    if not bits:
        return 2 * (C + P + N) * G + stages * N * 2 * (C * (1 if latent else 2) + P)
    window = shared_bytes(G, min(N, 32), 2, C, P, latent, 0)
    return max(
        window,
        2 * (C + P + N) * G
        + N * ((stages - 1) * (C * bits // 4 + 8 * (C // 64 + 1)) + stages * 2 * P),
    )


def plan(B, K, heads, C, P, latent, bits, size, device):
    """
    Heads of a program, tokens of a tile, stages of its loop, tiles that L2 is asked for ahead, whether programs begin at
    different tiles, parts of a sequence, so many that programs fill the card in waves that are nearly full, and warps and most registers of a program.
    """
    multiprocessors, shared, most = card(device)
    # The second product has a row for each word of a token, and a warp takes 16 of them: more warps would unpack the same words
    warps = max(1, min(4, power_of_2(C) * bits // 256)) if bits else 4
    registers = 128 if not bits else 168 if C <= 256 else 255
    at_once = min(16 // warps, 65536 // (32 * warps * registers))  # programs of a multiprocessor
    G = min(64, power_of_2(heads))

    def needs(G, N, stages):
        return (
            shared_bytes(G, N, stages, C, P, latent, bits) + 1024
        )  # what the system takes of each program

    N, stages, ahead, turn = tiles_of_shapes().get(shape_key(heads, C, P, latent, bits, size)) or (
        64,
        3 if needs(G, 64, 3) * (at_once if bits else 1) <= shared else 2,
        int(latent and not bits),
        int(bits > 0),
    )
    tried = [
        (g, *tile)
        for g in (G, 32, 16)
        if g <= G
        for tile in ((N, stages), (N, 2), (32, 2), (16, 2))
        if tile[0] <= N
    ]
    G, N, stages = next(
        (way for way in tried if needs(*way) - 1024 <= most), tried[-1]
    )  # a GPU with less shared memory takes smaller tiles
    resident = multiprocessors * max(1, min(at_once, shared // needs(G, N, stages)))
    programs = B * K * -(-heads // G)
    most_splits = (
        1 if size <= SHORT and programs >= 4 * multiprocessors else max(1, size // N)
    )  # to join parts takes as long as a short sequence
    splits = max(
        range(1, most_splits + 1),
        key=lambda s: (round(programs * s / (-(-programs * s // resident) * resident), 1), -s),
    )
    return (
        G,
        N,
        stages,
        ahead * COMPILED * (size >= N),
        turn,
        splits,
        warps,
        registers if bits and registers < 255 else None,
    )


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
    softmax(scale (q · k + q_pe · k_pe)) v over the first lengths[b] tokens of every sequence -> (B, H, C) in q's dtype.

    q (B, H, C), q_pe (B, H, P); k and v: what a store holds, (codes, scales, recent), as cache.py lays
    it out, scales and recent None without bits; v None: k is the latent of MLA, and the values too. k_pe (slots, P).
    A sequence is `size` places from rows[b] · size on (rows None: b), or the pages of block_table[rows[b]].
    Where a length is 0 the result is 0.
    """
    B, H, C = q.shape
    width = k[0].size(1) * (2 if bits == 4 else 1)
    K, latent = width // C, v is None
    P = 0 if q_pe is None else q_pe.size(-1)
    G, N, stages, ahead, turn, best, warps, registers = plan(
        B, K, H // K, C, P, latent, bits, size, q.device
    )
    splits = splits or best
    out = q.new_empty(B, H, C)
    (kc, ks, kr), (vc, vs, vr) = k, k if latent else v
    window = window if kr is not None else 0
    count = splits + (window > 0)
    parts = out if count == 1 else q.new_empty(B, H, count, C, dtype=torch.float32)
    lse = q.new_empty(B, H, count, dtype=torch.float32)
    if bits:  # two or four codes, and a scale with its zero, are one word
        kc, vc, ks, vs = (
            kc.view(torch.uint16),
            vc.view(torch.uint16),
            ks.view(torch.int32),
            vs.view(torch.int32),
        )
    kernels().decode[(splits, K * -(-(H // K) // G), B)](
        q,
        q_pe,
        kc,
        ks,
        kr,
        vc,
        vs,
        vr,
        k_pe,
        block_table,
        lengths,
        rows,
        parts,
        lse,
        scale * LOG2E,
        splits,
        size,
        0 if block_table is None else block_table.size(1),
        H,
        K,
        G,
        C,
        power_of_2(C),
        P,
        power_of_2(P) if P else 16,
        latent,
        bits,
        group if bits else 1,
        window,
        page_size if block_table is not None else 0,
        rows is not None,
        N,
        stages,
        ahead,
        turn,
        'ieee' if q.dtype == torch.float32 else 'tf32',
        COMPILED,
        num_warps=warps,
        maxnreg=registers,
    )
    if count > 1:
        parts_held = power_of_2(count, 1)
        channels = max(16, min(power_of_2(C), AT_ONCE // parts_held))
        kernels().join[(B * H, -(-C // channels))](
            parts, lse, out, count, C, channels, parts_held, num_warps=4
        )
    return out


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
    Writes one new token a sequence: new is [(x (B, 1, width) or (B, width), held, bits, group)] of one store or two, `held` as in
    `decode`; lengths count the new token where counts is 1; where it is 0 nothing is written.

    On the way: rope (cos, sin), B rows each, in heads of `rope_widths` channels (of q, of the first and the second store; 0: not at all),
    norm (a Norm of model.py) sets the RMS of what goes to the first store. Returns q (B, width), turned and contiguous.
    """
    parts, shapes = [], []
    for x, held, bits, group in (new * 2)[:2]:
        assert x.stride(-1) == 1
        width = x.size(-1)
        parts += [x, *held, x.stride(0)]
        shapes += [width, power_of_2(width), bits, group if bits else 1]
    B = new[0][0].size(0)
    cos, sin = (t.contiguous() for t in rope) if rope else (None, None)
    out = None if q is None else q.new_empty(B, q.size(-1))
    rope_widths = rope_widths if rope else (0, 0, 0)
    kernels().keep[(B, len(new) if q is None else 3)](
        *parts,
        q,
        0 if q is None else q.stride(0),
        out,
        cos,
        sin,
        None if norm is None else norm.weight,
        0.0 if norm is None else norm.eps,
        block_table,
        lengths,
        counts,
        rows,
        size,
        0 if block_table is None else block_table.size(1),
        *shapes,
        0 if q is None else q.size(-1),
        0 if q is None else power_of_2(q.size(-1)),
        *rope_widths,
        cos.size(-1) if rope else 0,
        norm is not None,
        window,
        page_size if block_table is not None else 0,
        rows is not None,
        num_warps=4,
    )
    return out
