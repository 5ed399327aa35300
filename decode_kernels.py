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

from kernels import LOG2E, RUNS_ON

triton = tl = None  # set by kernels()
SHARED = 224 * 1024  # bytes of shared memory of an H200's multiprocessor, for all its programs
MULTIPROCESSORS = 132
COMPILED = 'cpu' not in RUNS_ON  # the interpreter knows no instructions of the GPU


@lru_cache
def kernels():
    """Loads Triton and hands the functions below to it; it compiles each at its first call."""
    global triton, tl, tile, number, unpack, block, fetch, tiles, turned, keep_one
    import triton
    import triton.language as tl
    tile, number, unpack, block, fetch, tiles, turned, keep_one = map(triton.jit, (tile, number, unpack, block, fetch, tiles, turned, keep_one))
    return SimpleNamespace(decode=triton.jit(decode_kernel), join=triton.jit(join_kernel), keep=triton.jit(keep_kernel))


def tile(codes, scales, zeros, rows, inside, C: tl.constexpr, CP: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
         WHOLE: tl.constexpr):
    """The channels of one head at `rows` of a store as they lie there: codes (N, CP, or half of it), scales and zeros (N, groups)."""
    PACK: tl.constexpr = 2 if BITS == 4 else 1
    channels = tl.arange(0, CP // PACK)
    here = codes + rows[:, None] * (WIDTH // PACK) + channels[None, :]
    if WHOLE and C == CP:
        x = tl.load(here)
    else:
        x = tl.load(here, mask=inside[:, None] & (channels[None, :] < C // PACK), other=0)
    scale, zero = x, x
    if BITS:
        groups = tl.arange(0, CP // GROUP)
        at = rows[:, None] * (WIDTH // GROUP) + groups[None, :]
        if WHOLE and C == CP:
            scale, zero = tl.load(scales + at), tl.load(zeros + at)
        else:
            there = inside[:, None] & (groups[None, :] < C // GROUP)
            scale, zero = tl.load(scales + at, mask=there, other=0.0), tl.load(zeros + at, mask=there, other=0.0)
    return x, scale, zero


def number(codes, dtype: tl.constexpr):
    """Small whole numbers in a float type. In fp16 1024 + n is 0x6400 | n, which is faster than the GPU's conversion."""
    if dtype == tl.float16:
        x = (codes.to(tl.uint16) | 0x6400).to(tl.float16, bitcast=True) - 1024.0
    else:
        x = codes.to(dtype)
    return x


def unpack(x, scale, zero, BITS: tl.constexpr, dtype: tl.constexpr):
    """A tile as numbers, (N, CP) twice: all channels (and again), or of 4 bits the even and the odd ones."""
    if BITS == 0:
        low, high = x, x
    else:
        N: tl.constexpr = x.shape[0]
        scale, zero = scale.to(dtype)[:, :, None], zero.to(dtype)[:, :, None]
        CODES: tl.constexpr = x.shape[1]
        x = tl.reshape(x, [N, scale.shape[1], CODES // scale.shape[1]])
        low = tl.reshape(number(x & 15 if BITS == 4 else x, dtype) * scale + zero, [N, CODES])
        high = tl.reshape(number(x >> 4, dtype) * scale + zero, [N, CODES]) if BITS == 4 else low
    return low, high


def block(k, k_high, v, v_high, x, scale, zero, pe, inside, q, q_high, q_pe, best, total, y, y_high, factor, BITS: tl.constexpr, P: tl.constexpr,
          WHOLE: tl.constexpr, IEEE: tl.constexpr, AGAIN: tl.constexpr):
    """
    One tile of tokens joins the running softmax: its maximum `best` (G,), y (C, G), and `total` (N, G), whose rows are summed
    at the end: a sum over rows makes the warps wait for each other. AGAIN: the values are unpacked from x a second time,
    which costs less than the registers that would keep them.
    """
    s = tl.dot(k, q, input_precision=IEEE)  # (N, G)
    if BITS == 4:
        s = tl.dot(k_high, q_high, s, input_precision=IEEE)
    if P:
        s = tl.dot(pe, q_pe, s, input_precision=IEEE)
    s = s * factor
    if not WHOLE:
        s = tl.where(inside[:, None], s, -1e30)  # finite: nothing less nothing is not nan
    higher = tl.maximum(best, tl.max(s, 0))
    p = tl.exp2(s - higher[None, :])
    fade = tl.exp2(best - higher)
    total = total * fade[None, :] + p
    if AGAIN:  # an instruction that does nothing, so that the compiler does not see that it is the same again
        x = tl.inline_asm_elementwise('mov.b32 $0, $1;', '=r,r', [x], dtype=tl.uint8, is_pure=False, pack=4)
        v, v_high = unpack(x, scale, zero, BITS, v.dtype)
    p = p.to(v.dtype)
    y = tl.dot(tl.trans(v), p, y * fade[None, :], input_precision=IEEE)
    if BITS == 4:
        y_high = tl.dot(tl.trans(v_high), p, y_high * fade[None, :], input_precision=IEEE)
    return higher, total, y, y_high


def fetch(start, COUNT: tl.constexpr):
    """Asks for COUNT elements from `start` on to come into the L2 cache, a line of 128 bytes a lane."""
    A_LINE: tl.constexpr = 128 * 8 // start.dtype.element_ty.primitive_bitwidth
    lines = start + tl.arange(0, COUNT // A_LINE) * A_LINE
    tl.inline_asm_elementwise('prefetch.global.L2 [$1]; mov.u32 $0, 0;', '=r,l', [lines.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1)


def tiles(start, end, shift, limit, k_codes, k_scales, k_zeros, v_codes, v_scales, v_zeros, pes, table, slot, size, pages, following, q, q_high, q_pe,
          best, total, y, y_high, factor, C: tl.constexpr, CP: tl.constexpr, WIDTH: tl.constexpr, P: tl.constexpr, PP: tl.constexpr, LATENT: tl.constexpr,
          BITS: tl.constexpr, GROUP: tl.constexpr, PAGE: tl.constexpr, WHOLE: tl.constexpr, N: tl.constexpr, STAGES: tl.constexpr, dtype: tl.constexpr,
          IEEE: tl.constexpr, AHEAD: tl.constexpr, AGAIN: tl.constexpr):
    """The tiles from `start` to `end`, all of them whole or not, the one at `shift` first; of none the tokens from `limit` on."""
    CS: tl.constexpr = WIDTH // 2 if BITS == 4 else WIDTH  # what a place takes in a store's codes,
    GS: tl.constexpr = WIDTH // GROUP if BITS else 0  # and in its scales and zeros
    n, p = tl.arange(0, N), tl.arange(0, PP)
    count = end - start
    first = start + shift * N
    for i in tl.range(first, first + count, N, num_stages=STAGES):
        at = tl.where(i < end, i, i - count)  # from tile `shift` on, and what is before it at the end
        ahead = tl.where(i + N < end, i + N, i + N - count)
        inside = at + n < limit
        if PAGE:
            if PAGE % N == 0:  # a tile lies in one page: only its beginning needs 64 bits
                place, base = n, following.to(tl.int64) * PAGE + at % PAGE
                following = tl.load(table + slot * pages + tl.minimum(ahead // PAGE, pages - 1))
            else:
                place, base = following.to(tl.int64) * PAGE + (at + n) % PAGE, 0
                following = tl.load(table + slot * pages + tl.minimum((ahead + n) // PAGE, pages - 1))
        else:
            place, base = n, slot * size + at
        if AHEAD and WHOLE and LATENT and C == CP and PAGE % N == 0:  # ask the L2 cache for a later tile: shared memory has no room for it yet
            later = tl.where(i + AHEAD * N < end, i + AHEAD * N, i + AHEAD * N - count)  # not behind the end: there may be no memory
            later = tl.minimum(tl.maximum(later, start), end - N)
            there = tl.load(table + slot * pages + later // PAGE).to(tl.int64) * PAGE + later % PAGE if PAGE else slot * size + later
            fetch(k_codes + there * CS, N * CS)
            if P:
                fetch(pes + there * P, N * P)
        x, scale, zero = tile(k_codes + base * CS, k_scales + base * GS if BITS else k_scales, k_zeros + base * GS if BITS else k_zeros, place, inside,
                              C, CP, WIDTH, BITS, GROUP, WHOLE)
        k, k_high = unpack(x, scale, zero, BITS, dtype)
        if LATENT:
            v, v_high = k, k_high
        else:
            v, v_scale, v_zero = tile(v_codes + base * CS, v_scales + base * GS if BITS else v_scales, v_zeros + base * GS if BITS else v_zeros, place,
                                      inside, C, CP, WIDTH, BITS, GROUP, WHOLE)
            v, v_high = unpack(v, v_scale, v_zero, BITS, dtype)
        if P:
            pe = pes + base * P + place[:, None] * P + p[None, :]
            pe = tl.load(pe) if WHOLE and P == PP else tl.load(pe, mask=inside[:, None] & (p[None, :] < P), other=0.0)
        else:
            pe = k
        best, total, y, y_high = block(k, k_high, v, v_high, x, scale, zero, pe, inside, q, q_high, q_pe, best, total, y, y_high, factor, BITS, P, WHOLE,
                                              IEEE, AGAIN and LATENT and BITS > 0 and CP > 256)
    return best, total, y, y_high, following


def decode_kernel(queries, queries_pe, k_codes, k_scales, k_zeros, k_recent, v_codes, v_scales, v_zeros, v_recent, pes, table, lengths, rows,
                  out, lse, factor, splits, size, pages, H: tl.constexpr, K: tl.constexpr, G: tl.constexpr, C: tl.constexpr, CP: tl.constexpr,
                  P: tl.constexpr, PP: tl.constexpr, LATENT: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, W: tl.constexpr, PAGE: tl.constexpr,
                  ROWS: tl.constexpr, N: tl.constexpr, STAGES: tl.constexpr, AHEAD: tl.constexpr, TURN: tl.constexpr, IEEE: tl.constexpr, AGAIN: tl.constexpr):
    """Program (split, kv head and tile of its heads, sequence): y (C, G) of its part of the sequence, and log2 of its softmax's sum."""
    split, b = tl.program_id(0), tl.program_id(2)
    TILES: tl.constexpr = (H // K + G - 1) // G
    head, first = tl.program_id(1) // TILES, tl.program_id(1) % TILES * G
    slot = (tl.load(rows + b) if ROWS else b).to(tl.int64)
    length = tl.load(lengths + b).to(tl.int32)
    share = tl.cdiv(tl.cdiv(length, splits), N) * N
    start, end = split * share, tl.minimum(split * share + share, length)

    PACK: tl.constexpr = 2 if BITS == 4 else 1
    WIDTH: tl.constexpr = K * C
    full: tl.constexpr = queries.dtype.element_ty
    # Codes, scales and zeros are whole in fp16, and half the registers of fp32
    dtype: tl.constexpr = tl.float16 if BITS and full != tl.float32 else full
    g, c, p, n = tl.arange(0, G), tl.arange(0, CP // PACK), tl.arange(0, PP), tl.arange(0, N)
    mine = first + g < H // K
    each = b.to(tl.int64) * H + head * (H // K) + first + g  # the program's rows of (B, H)
    there = mine[None, :] & (c[:, None] < C // PACK)
    q = tl.load(queries + each[None, :] * C + c[:, None] * PACK, mask=there, other=0.0)  # (C, G)
    q_high = tl.load(queries + each[None, :] * C + c[:, None] * PACK + 1, mask=there, other=0.0) if BITS == 4 else q
    q, q_high = q.to(dtype), q_high.to(dtype)
    q_pe = tl.load(queries_pe + each[None, :] * P + p[:, None], mask=mine[None, :] & (p[:, None] < P), other=0.0) if P else q
    k_codes, v_codes = k_codes + head * (C // PACK), v_codes + head * (C // PACK)
    if BITS:
        k_scales, k_zeros = k_scales + head * (C // GROUP), k_zeros + head * (C // GROUP)
        v_scales, v_zeros = v_scales + head * (C // GROUP), v_zeros + head * (C // GROUP)

    best, total = tl.full([G], -1e30, tl.float32), tl.zeros([N, G], tl.float32)
    y, y_high = tl.zeros([CP // PACK, G], tl.float32), tl.zeros([CP // PACK, G], tl.float32)
    early = tl.minimum(end, length - W) if W else end  # what lies before the window
    early = tl.maximum(early, start)
    whole = start + (early - start) // N * N
    # A tile's pages are asked for while the tile before is read: an address that waits for a load could not be fetched ahead.
    # Programs that begin at the same place of their sequences would all ask the same part of the memory: with TURN they do not.
    shift = (b * 7 + split * 3) % tl.maximum((whole - start) // N, 1) if TURN else 0
    if PAGE:
        begin = start + shift * N
        following = tl.load(table + slot * pages + tl.minimum((begin + n if PAGE % N else begin) // PAGE, pages - 1))
    else:
        following = 0
    best, total, y, y_high, following = tiles(start, whole, shift, early, k_codes, k_scales, k_zeros, v_codes, v_scales, v_zeros, pes, table, slot, size, pages, following,
                                              q, q_high, q_pe, best, total, y, y_high, factor, C, CP, WIDTH, P, PP, LATENT, BITS, GROUP, PAGE, True, N, STAGES, dtype, IEEE, AHEAD, AGAIN)
    if PAGE:
        following = tl.load(table + slot * pages + tl.minimum((whole + n if PAGE % N else whole) // PAGE, pages - 1))
    best, total, y, y_high, following = tiles(whole, early, 0, early, k_codes, k_scales, k_zeros, v_codes, v_scales, v_zeros, pes, table, slot, size, pages, following,
                                              q, q_high, q_pe, best, total, y, y_high, factor, C, CP, WIDTH, P, PP, LATENT, BITS, GROUP, PAGE, False, N, 2, dtype, IEEE, 0, AGAIN)
    if W:  # the last W tokens, in full precision, in a ring of their own
        for at in tl.range(tl.maximum(early, length - W), end, N, num_stages=2):
            inside = at + n < end
            ring = (slot * W + (at + n) % W)[:, None] * WIDTH + head * C + c[None, :] * PACK
            here = inside[:, None] & (c[None, :] < C // PACK)
            k = tl.load(k_recent + ring, mask=here, other=0.0).to(dtype)
            k_high = tl.load(k_recent + ring + 1, mask=here, other=0.0).to(dtype) if BITS == 4 else k
            if LATENT:
                v, v_high = k, k_high
            else:
                v = tl.load(v_recent + ring, mask=here, other=0.0).to(dtype)
                v_high = tl.load(v_recent + ring + 1, mask=here, other=0.0).to(dtype) if BITS == 4 else v
            if P:
                place = (tl.load(table + slot * pages + (at + n) // PAGE, mask=inside, other=0).to(tl.int64) * PAGE + (at + n) % PAGE) if PAGE else slot * size + at + n
                pe = tl.load(pes + place[:, None] * P + p[None, :], mask=inside[:, None] & (p[None, :] < P), other=0.0)
            else:
                pe = k
            best, total, y, y_high = block(k, k_high, v, v_high, k, k, k, pe, inside, q, q_high, q_pe, best, total, y, y_high, factor, BITS, P, False, IEEE, False)

    sums = tl.maximum(tl.sum(total, 0), 1e-30)  # 0 times its inverse is 0 where there was no token
    to = (each * splits + split)[None, :] * C + c[:, None] * PACK
    tl.store(out + to, (y * (1 / sums)[None, :]).to(out.dtype.element_ty), mask=there)
    if BITS == 4:
        tl.store(out + to + 1, (y_high * (1 / sums)[None, :]).to(out.dtype.element_ty), mask=there)
    tl.store(lse + each * splits + split, best + tl.log2(sums), mask=mine)


def join_kernel(parts, lse, out, splits, C: tl.constexpr, CP: tl.constexpr, SP: tl.constexpr):
    """One program a head of a sequence: the parts' mean, weighted by their softmax's sums."""
    row = tl.program_id(0).to(tl.int64)
    s, c = tl.arange(0, SP), tl.arange(0, CP)
    bits = tl.load(lse + row * splits + s, mask=s < splits, other=-1e30)
    weight = tl.exp2(bits - tl.max(bits, 0))
    weight = weight / tl.sum(weight, 0)
    x = tl.load(parts + (row * splits + s[:, None]) * C + c[None, :], mask=(s[:, None] < splits) & (c[None, :] < C), other=0.0)
    tl.store(out + row * C + c, tl.sum(x * weight[:, None], 0).to(out.dtype.element_ty), mask=c < C)


# ---------------------------------------------------------------------------------------------------
# the new token's own keys and values, on their way into the cache

def turned(x, cos, sin, gain, eps, WIDTH: tl.constexpr, WP: tl.constexpr, TURN: tl.constexpr, NORM: tl.constexpr):
    """WIDTH channels: their RMS set to 1 (NORM), or heads of TURN channels turned by RoPE; as they are with neither."""
    c = tl.arange(0, WP)
    y = tl.load(x + c, mask=c < WIDTH, other=0.0)
    dtype: tl.constexpr = y.dtype
    if NORM:
        y = y.to(tl.float32)
        y = (y * tl.rsqrt(tl.sum(y * y, 0) / WIDTH + eps) * tl.load(gain + c, mask=c < WIDTH, other=0.0).to(tl.float32)).to(dtype)
    if TURN:
        HALF: tl.constexpr = TURN // 2
        low, pair = c % TURN < HALF, c % HALF
        other = tl.load(x + tl.where(low, c + HALF, c - HALF), mask=c < WIDTH, other=0.0).to(tl.float32)
        y = (y.to(tl.float32) * tl.load(cos + pair) + tl.where(low, -other, other) * tl.load(sin + pair)).to(dtype)
    return y


def keep_one(x, codes, scales, zeros, recent, place, in_ring, WIDTH: tl.constexpr, WP: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, W: tl.constexpr):
    c = tl.arange(0, WP)
    if W:
        tl.store(recent + in_ring * WIDTH + c, x.to(recent.dtype.element_ty), mask=c < WIDTH)
    if BITS == 0:
        tl.store(codes + place * WIDTH + c, x.to(codes.dtype.element_ty), mask=c < WIDTH)
    else:  # as cache.quantise does it
        g = tl.arange(0, WP // GROUP)
        x = tl.reshape(x.to(tl.float32), [WP // GROUP, GROUP])
        low, high, top = tl.min(x, 1), tl.max(x, 1), 2 ** BITS - 1
        zero = (low - tl.abs(low) * 2 ** -10 - 2 ** -24).to(tl.float16)
        scale = tl.maximum((high - zero.to(tl.float32)) / top * (1 + 2 ** -10), 2 ** -14).to(tl.float16)
        tl.store(scales + place * (WIDTH // GROUP) + g, scale, mask=g < WIDTH // GROUP)
        tl.store(zeros + place * (WIDTH // GROUP) + g, zero, mask=g < WIDTH // GROUP)
        x = (x - zero.to(tl.float32)[:, None]) / scale.to(tl.float32)[:, None]
        x = tl.minimum(tl.maximum(tl.floor(x + 0.5), 0.0), top).to(tl.int32)
        if BITS == 4:
            even, odd = tl.split(tl.reshape(x, [WP // GROUP, GROUP // 2, 2]))
            x = tl.reshape(even | (odd << 4), [WP // 2])
            c = tl.arange(0, WP // 2)
            tl.store(codes + place * (WIDTH // 2) + c, x.to(tl.uint8), mask=c < WIDTH // 2)
        else:
            tl.store(codes + place * WIDTH + c, tl.reshape(x, [WP]).to(tl.uint8), mask=c < WIDTH)


def keep_kernel(x, codes, scales, zeros, recent, stride, x2, codes2, scales2, zeros2, recent2, stride2, query, query_stride, out, cos, sin, gain, eps,
                table, lengths, counts, rows, size, pages, WIDTH: tl.constexpr, WP: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, WIDTH2: tl.constexpr,
                WP2: tl.constexpr, BITS2: tl.constexpr, GROUP2: tl.constexpr, QUERY: tl.constexpr, QP: tl.constexpr, TURNS: tl.constexpr, TURN: tl.constexpr,
                TURN2: tl.constexpr, HALF: tl.constexpr, NORM: tl.constexpr, W: tl.constexpr, PAGE: tl.constexpr, ROWS: tl.constexpr):
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
            tl.store(out + b * QUERY + c, turned(query + b * query_stride, cos, sin, gain, eps, QUERY, QP, TURNS, False), mask=c < QUERY)
    slot = (tl.load(rows + b) if ROWS else b).to(tl.int64)
    if tl.load(counts + b) > 0:
        at = tl.load(lengths + b).to(tl.int64) - tl.load(counts + b).to(tl.int64)
        place = tl.load(table + slot * pages + at // PAGE).to(tl.int64) * PAGE + at % PAGE if PAGE else slot * size + at
        in_ring = slot * W + at % W if W else place
        if tl.program_id(1) == 0:
            keep_one(turned(x + b * stride, cos, sin, gain, eps, WIDTH, WP, TURN, NORM), codes, scales, zeros, recent, place, in_ring, WIDTH, WP, BITS, GROUP, W if BITS else 0)
        elif tl.program_id(1) == 1:
            keep_one(turned(x2 + b * stride2, cos, sin, gain, eps, WIDTH2, WP2, TURN2, False), codes2, scales2, zeros2, recent2, place, in_ring, WIDTH2, WP2, BITS2, GROUP2, W if BITS2 else 0)


# ---------------------------------------------------------------------------------------------------
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
    if device.type == 'cuda' and bits == 4 and C == 128 and not latent:
        return '4-bit heads of width 128 come out wrong with Triton 3.6'  # on a GPU; under the interpreter they are right
    return ''


def power_of_2(n, least=16):
    return max(least, 1 << (n - 1).bit_length())


@lru_cache
def tiles_of_shapes():
    """What `bench.py decode --attention_only=True --tune=True` found best: shape_key -> [tokens of a tile, stages, ahead, turn]."""
    file = Path(__file__).with_name('decode_tiles.json')
    return json.loads(file.read_text()) if file.exists() else {}


def shape_key(heads, C, P, latent, bits):
    return f"{'latent' if latent else 'kv'} {C}+{P}, {min(64, power_of_2(heads))} heads, {bits or 16} bits"


def variants(C, latent, bits):
    """What is worth trying for a shape, as in tiles_of_shapes."""
    if latent and not bits:
        return [[64, stages, ahead, turn] for stages, ahead, turn in ((2, 1, 0), (2, 1, 1), (2, 0, 1), (3, 1, 1), (4, 0, 1), (4, 1, 0)) if stages * C < 1400]
    return [[64, 2, 0, 0], [64, 2, 0, 1], [64, 3, 0, 1]] if bits else [[64, 3, 0, 0], [64, 4, 0, 1], [128, 3, 0, 1]]


def plan(B, K, heads, C, P, latent, bits, size):
    """
    Heads of a program, tokens of a tile, stages of its loop, tiles that L2 is asked for ahead, whether programs begin at
    different tiles, and parts of a sequence, so many that programs fill the card in waves that are nearly full.
    """
    known = tiles_of_shapes().get(shape_key(heads, C, P, latent, bits))
    G = min(64, power_of_2(heads))
    C, P = power_of_2(C), power_of_2(P) if P else 0  # as they lie in shared memory
    values = 1 if latent else 2
    a_token = (C * (bits or 16) // 8 + 4 * (C // 64) * bool(bits)) * values + 2 * P
    fixed = 2 * (C + P) * G + 64 * (2 * G + 2 * C * values * bool(bits))  # queries, softmax, a tile that has been unpacked
    N, stages, ahead, turn = known or (64, max(2, min(3, (SHARED - fixed) // (64 * a_token))), int(latent and not bits), 0)
    resident = MULTIPROCESSORS * max(1, min(4, SHARED // (fixed + stages * N * a_token)))
    programs = B * K * -(-heads // G)
    splits = max(range(1, max(1, size // N) + 1),
                 key=lambda s: (round(programs * s / (-(-programs * s // resident) * resident), 1), -s))
    return G, N, stages, ahead * COMPILED, turn, splits


def decode(q, k, v, lengths, scale, size, q_pe=None, pe=None, table=None, page_size=0, rows=None, bits=0, group=1, window=0, splits=0):
    """
    softmax(scale (q · k + q_pe · pe)) v over the first lengths[b] tokens of every sequence -> (B, H, C) in q's dtype.

    q (B, H, C), q_pe (B, H, P); k and v: what a store holds, (codes, scales, zeros, recent), as cache.py lays
    it out, scales, zeros and recent None without bits; v None: k is the latent of MLA, and the values too. pe (places, P).
    A sequence is `size` places from rows[b] · size on (rows None: b), or the pages of table[rows[b]].
    Where a length is 0 the result is 0.
    """
    B, H, C = q.shape
    width = k[0].size(1) * (2 if bits == 4 else 1)
    K, latent = width // C, v is None
    G, N, stages, ahead, turn, best = plan(B, K, H // K, C, 0 if q_pe is None else q_pe.size(-1), latent, bits, size)
    splits = splits or best
    P = 0 if q_pe is None else q_pe.size(-1)
    out = q.new_empty(B, H, C)
    parts = out if splits == 1 else q.new_empty(B, H, splits, C, dtype=torch.float32)
    lse = q.new_empty(B, H, splits, dtype=torch.float32)
    (kc, ks, kz, kr), (vc, vs, vz, vr) = k, k if latent else v  # a latent is read once
    kernels().decode[(splits, K * -(-(H // K) // G), B)](
        q, q_pe, kc, ks, kz, kr, vc, vs, vz, vr, pe, table, lengths, rows, parts, lse, scale * LOG2E, splits, size, 0 if table is None else table.size(1),
        H, K, G, C, power_of_2(C), P, power_of_2(P) if P else 16, latent, bits, group, window if kr is not None else 0, page_size if table is not None else 0,
        rows is not None, N, stages, ahead, turn, 'ieee' if q.dtype == torch.float32 else 'tf32', COMPILED, num_warps=4)
    if splits > 1:
        kernels().join[(B * H,)](parts, lse, out, splits, C, power_of_2(C), power_of_2(splits, 1), num_warps=4)
    return out


def keep(new, lengths, counts, size, table=None, page_size=0, rows=None, window=0, q=None, rope=None, turns=(0, 0, 0), norm=None):
    """
    Writes one new token a sequence: new is [(x (B, 1, width) or (B, width), held, bits, group)] of one store or two, `held` as in
    `decode`; lengths count the new token where counts is 1; where it is 0 nothing is written.

    On the way: rope (cos, sin), B rows each, turns heads of `turns` channels (of q, of the first and the second store; 0: not at all),
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
    turns = turns if rope else (0, 0, 0)
    kernels().keep[(B, len(new) if q is None else 3)](
        *parts, q, 0 if q is None else q.stride(0), out, cos, sin, None if norm is None else norm.weight, 0.0 if norm is None else norm.eps,
        table, lengths, counts, rows, size, 0 if table is None else table.size(1), *shapes, 0 if q is None else q.size(-1), 0 if q is None else power_of_2(q.size(-1)),
        *turns, cos.size(-1) if rope else 0, norm is not None, window, page_size if table is not None else 0, rows is not None, num_warps=4)
    return out
