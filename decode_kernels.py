"""
Attention of one new token a sequence over a cache, read where it lies: one Triton kernel for MLA in its
absorbed form and for MHA, GQA and MQA; dense or paged; 16-bit floats, int8 or int4.

A sequence is cut into `splits` parts, so that a few long ones fill the card (flash-decoding, Dao et al.
2023); each program brings tiles of BLOCK tokens into shared memory once and uses them for logits and
values. All is transposed: tokens are the rows of the tensor cores' 64-row products and heads the columns,
so that 16 heads waste nothing. A second kernel joins the parts. `reference` is the same in plain PyTorch.

Legend: B sequences, H heads, K key/value heads, G = H / K heads that share one, S splits, C width of a key
and of a value (MLA: of the latent, which is both), P width of k_pe, W window.
"""
from __future__ import annotations  # `tl.constexpr` below is read by Triton, not by Python

from functools import lru_cache
from types import SimpleNamespace

import torch

from kernels import LOG2E, RUNS_ON

triton = tl = None  # set by kernels()
SHARED = 216 * 1024  # bytes of shared memory that one program may take
BLOCK, MOST_STAGES, WARPS = 64, 6, 4
MULTIPROCESSORS = 132


@lru_cache
def kernels():
    """Loads Triton and hands the functions below to it; it compiles each at its first call."""
    global triton, tl, tile, block
    import triton
    import triton.language as tl
    tile, block = triton.jit(tile), triton.jit(block)
    return SimpleNamespace(decode=triton.jit(decode_kernel), join=triton.jit(join_kernel))


def tile(codes, scales, zeros, rows, inside, head, C: tl.constexpr, CP: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr,
         GROUP: tl.constexpr, dtype: tl.constexpr):
    """The channels of one head at `rows` of a store, (N, CP) twice: all of them (and again), or with 4 bits the even and the odd ones."""
    N: tl.constexpr = inside.shape[0]
    PACK: tl.constexpr = 2 if BITS == 4 else 1
    channels = tl.arange(0, CP // PACK)
    here = inside[:, None] if C == CP else inside[:, None] & (channels[None, :] < C // PACK)
    x = tl.load(codes + rows[:, None] * (WIDTH // PACK) + head * (C // PACK) + channels[None, :], mask=here, other=0)
    if BITS == 0:
        low, high = x, x
    else:
        GROUPS: tl.constexpr = CP // GROUP
        groups = tl.arange(0, GROUPS)
        there = inside[:, None] if C == CP else inside[:, None] & (groups[None, :] < C // GROUP)
        at = rows[:, None] * (WIDTH // GROUP) + head * (C // GROUP) + groups[None, :]
        scale = tl.load(scales + at, mask=there, other=0.0).to(tl.float32)[:, :, None]
        zero = tl.load(zeros + at, mask=there, other=0.0).to(tl.float32)[:, :, None]
        x = tl.reshape(x, [N, GROUPS, GROUP // PACK])
        low = tl.reshape((x & 15 if BITS == 4 else x).to(tl.float32) * scale + zero, [N, CP // PACK]).to(dtype)
        high = tl.reshape((x >> 4).to(tl.float32) * scale + zero, [N, CP // PACK]).to(dtype) if BITS == 4 else low
    return low, high


def block(k, k_high, v, v_high, pe, inside, q, q_high, q_pe, best, total, y, y_high, factor, BITS: tl.constexpr, P: tl.constexpr,
          IEEE: tl.constexpr):
    """One tile of tokens joins the running softmax: best and total (G,), y (C, G)."""
    s = tl.dot(k, q, input_precision=IEEE)  # (N, G)
    if BITS == 4:
        s = tl.dot(k_high, q_high, s, input_precision=IEEE)
    if P:
        s = tl.dot(pe, q_pe, s, input_precision=IEEE)
    s = tl.where(inside[:, None], s * factor, -1e30)  # finite, so that nothing less nothing is no nan
    higher = tl.maximum(best, tl.max(s, 0))
    p = tl.exp2(s - higher[None, :])
    fade = tl.exp2(best - higher)
    total = total * fade + tl.sum(p, 0)
    p = p.to(v.dtype)
    y = tl.dot(tl.trans(v), p, y * fade[None, :], input_precision=IEEE)
    if BITS == 4:
        y_high = tl.dot(tl.trans(v_high), p, y_high * fade[None, :], input_precision=IEEE)
    return higher, total, y, y_high


def decode_kernel(queries, queries_pe, k_codes, k_scales, k_zeros, k_recent, v_codes, v_scales, v_zeros, v_recent, pes, table, lengths, rows,
                  out, lse, factor, splits, size, pages, H: tl.constexpr, K: tl.constexpr, G: tl.constexpr, C: tl.constexpr, CP: tl.constexpr,
                  P: tl.constexpr, PP: tl.constexpr, LATENT: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, W: tl.constexpr, PAGE: tl.constexpr,
                  ROWS: tl.constexpr, N: tl.constexpr, STAGES: tl.constexpr, IEEE: tl.constexpr):
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
    g, c, p, n = tl.arange(0, G), tl.arange(0, CP // PACK), tl.arange(0, PP), tl.arange(0, N)
    mine = first + g < H // K
    each = b.to(tl.int64) * H + head * (H // K) + first + g  # the program's rows of (B, H)
    there = mine[None, :] & (c[:, None] < C // PACK)
    q = tl.load(queries + each[None, :] * C + c[:, None] * PACK, mask=there, other=0.0)  # (C, G)
    q_high = tl.load(queries + each[None, :] * C + c[:, None] * PACK + 1, mask=there, other=0.0) if BITS == 4 else q
    q_pe = tl.load(queries_pe + each[None, :] * P + p[:, None], mask=mine[None, :] & (p[:, None] < P), other=0.0) if P else q
    dtype: tl.constexpr = queries.dtype.element_ty

    best, total = tl.full([G], -1e30, tl.float32), tl.zeros([G], tl.float32)
    y, y_high = tl.zeros([CP // PACK, G], tl.float32), tl.zeros([CP // PACK, G], tl.float32)
    early = tl.minimum(end, length - W) if W else end  # what lies before the window
    if PAGE:
        following = tl.load(table + slot * pages + tl.minimum((start + n) // PAGE, pages - 1))
    for at in tl.range(start, early, N, num_stages=STAGES):
        inside = at + n < early
        if PAGE:  # the next tile's pages are asked for now: an address that waits for a load could not be fetched ahead
            place = following.to(tl.int64) * PAGE + (at + n) % PAGE
            following = tl.load(table + slot * pages + tl.minimum((at + N + n) // PAGE, pages - 1))
        else:
            place = slot * size + at + n
        k, k_high = tile(k_codes, k_scales, k_zeros, place, inside, head, C, CP, WIDTH, BITS, GROUP, dtype)
        if LATENT:
            v, v_high = k, k_high
        else:
            v, v_high = tile(v_codes, v_scales, v_zeros, place, inside, head, C, CP, WIDTH, BITS, GROUP, dtype)
        pe = tl.load(pes + place[:, None] * P + p[None, :], mask=inside[:, None] & (p[None, :] < P), other=0.0) if P else k
        best, total, y, y_high = block(k, k_high, v, v_high, pe, inside, q, q_high, q_pe, best, total, y, y_high, factor, BITS, P, IEEE)
    if W:  # the last W tokens, in full precision, in a ring of their own
        for at in tl.range(tl.maximum(start, tl.maximum(early, 0)), end, N, num_stages=1):
            inside = at + n < end
            ring = (slot * W + (at + n) % W)[:, None] * WIDTH + head * C + c[None, :] * PACK
            here = inside[:, None] & (c[None, :] < C // PACK)
            k = tl.load(k_recent + ring, mask=here, other=0.0)
            k_high = tl.load(k_recent + ring + 1, mask=here, other=0.0) if BITS == 4 else k
            if LATENT:
                v, v_high = k, k_high
            else:
                v = tl.load(v_recent + ring, mask=here, other=0.0)
                v_high = tl.load(v_recent + ring + 1, mask=here, other=0.0) if BITS == 4 else v
            if P:
                place = (tl.load(table + slot * pages + (at + n) // PAGE, mask=inside, other=0).to(tl.int64) * PAGE + (at + n) % PAGE) if PAGE else slot * size + at + n
                pe = tl.load(pes + place[:, None] * P + p[None, :], mask=inside[:, None] & (p[None, :] < P), other=0.0)
            else:
                pe = k
            best, total, y, y_high = block(k, k_high, v, v_high, pe, inside, q, q_high, q_pe, best, total, y, y_high, factor, BITS, P, IEEE)

    share_of = 1 / tl.maximum(total, 1e-30)  # 0 times that where there was no token
    part = each * splits + split
    to = part[None, :] * C + c[:, None] * PACK
    tl.store(out + to, (y * share_of[None, :]).to(out.dtype.element_ty), mask=there)
    if BITS == 4:
        tl.store(out + to + 1, (y_high * share_of[None, :]).to(out.dtype.element_ty), mask=there)
    tl.store(lse + part, best + tl.log2(tl.maximum(total, 1e-30)), mask=mine)


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
# the call

def reason_not_to_run(device, dtype, C, bits, group):
    """Why the kernel cannot serve heads of width C from such a store, as text; '' when it can."""
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


def plan(B, K, heads, C, P, latent, bits, size):
    """Heads of a program, stages of its loop, and parts of a sequence: enough programs to fill the card, in waves that are full."""
    G = min(64, power_of_2(heads))
    a_token = (C * (bits or 16) // 8 + 4 * (C // 64) * bool(bits)) * (1 if latent else 2) + 2 * P
    stages = max(2, min(MOST_STAGES, SHARED // (BLOCK * a_token + 1) - bool(bits)))
    resident = MULTIPROCESSORS * max(1, min(4, SHARED // (stages * BLOCK * a_token + 2 * C * G)))
    programs = B * K * -(-heads // G)
    best = max(range(1, max(1, size // (2 * BLOCK)) + 1),
               key=lambda s: (round(programs * s / (-(-programs * s // resident) * resident), 1), -s))
    return G, stages, best


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
    G, stages, best = plan(B, K, H // K, C, 0 if q_pe is None else q_pe.size(-1), latent, bits, size)
    splits = splits or best
    P = 0 if q_pe is None else q_pe.size(-1)
    out = q.new_empty(B, H, C)
    parts = out if splits == 1 else q.new_empty(B, H, splits, C, dtype=torch.float32)
    lse = q.new_empty(B, H, splits, dtype=torch.float32)
    (kc, ks, kz, kr), (vc, vs, vz, vr) = k, k if latent else v
    kernels().decode[(splits, K * -(-(H // K) // G), B)](
        q, q_pe, kc, ks, kz, kr, vc, vs, vz, vr, pe, table, lengths, rows, parts, lse, scale * LOG2E, splits, size, 0 if table is None else table.size(1),
        H, K, G, C, power_of_2(C), P, power_of_2(P) if P else 16, latent, bits, group, window if kr is not None else 0, page_size if table is not None else 0,
        rows is not None, BLOCK, stages, 'ieee' if q.dtype == torch.float32 else 'tf32', num_warps=WARPS)
    if splits > 1:
        kernels().join[(B * H,)](parts, lse, out, splits, C, power_of_2(C), power_of_2(splits, 1), num_warps=4)
    return out
