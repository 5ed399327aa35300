"""
One new token a sequence, with few kernels: beside attention (decode_kernels.py) a step is products of thin matrices, and
what stands between them would cost as much again only by being launched. For one sequence a norm in front of a product, and an
activation or the residual stream behind it, are part of its kernel; for more the library multiplies. A token is drawn by four.

Each kernel stands beside its PyTorch reference. `run_block` is Block.forward put together from them.

Legend: B sequences, C channels in, N channels out, H heads, V vocabulary.
"""

from __future__ import annotations  # `tl.constexpr` below is read by Triton, not by Python

from functools import lru_cache
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from model import GPT, MLP, Block, Linear, Norm
from nanomla.core.devices import RUNS_ON
from nanomla.inference.cache import Cache, CacheLayer

triton = tl = None  # set by kernels()
LOG2E = 1.4426950408889634


@lru_cache
def kernels():
    """Loads Triton and hands the functions below to it; it compiles each at its first call."""
    global triton, tl, normed, order, ordered, reach, weigh
    import triton
    import triton.language as tl

    normed, order, ordered, reach, weigh = map(triton.jit, (normed, order, ordered, reach, weigh))
    return SimpleNamespace(
        one=triton.jit(one_kernel),
        norm=triton.jit(norm_kernel),
        high=triton.jit(high_kernel),
        low=triton.jit(low_kernel),
        sum=triton.jit(sum_kernel),
        draw=triton.jit(draw_kernel),
    )


def normed(row, gain, shift, eps, c, C: tl.constexpr, NORM: tl.constexpr, SHIFT: tl.constexpr):
    """The norm of a row (C,) of channels c, in its dtype."""
    x = row.to(tl.float32)
    mean = tl.sum(x, 0) / C if NORM == 'layernorm' else 0.0
    apart = tl.where(c < C, x - mean, 0.0)
    y = (
        apart
        * tl.rsqrt(tl.sum(apart * apart, 0) / C + eps)
        * tl.load(gain + c, mask=c < C, other=0.0).to(tl.float32)
    )
    if SHIFT:
        y += tl.load(shift + c, mask=c < C, other=0.0).to(tl.float32)
    return y.to(row.dtype)


def one_kernel(
    x,
    weight,
    bias,
    gain,
    shift,
    add,
    out,
    eps,
    x_head,
    w_head,
    w_out,
    w_in,
    C: tl.constexpr,
    CP: tl.constexpr,
    N: tl.constexpr,
    TILE: tl.constexpr,
    NORM: tl.constexpr,
    BIAS: tl.constexpr,
    SHIFT: tl.constexpr,
    ACT: tl.constexpr,
    ADD: tl.constexpr,
):
    """Program (TILE outputs, head), one sequence: all that it needs is asked for at once."""
    head = tl.program_id(1)
    n, c = tl.program_id(0) * TILE + tl.arange(0, TILE), tl.arange(0, CP)
    inside = (n[:, None] < N) & (c[None, :] < C)
    here = weight + head * w_head + n[:, None] * w_out + c[None, :] * w_in
    w = tl.load(here, mask=inside, other=0.0)
    v = tl.load(here + N * w_out, mask=inside, other=0.0) if ACT == 'swiglu' else w
    row = tl.load(x + head * x_head + c, mask=c < C, other=0.0)
    if NORM != '':
        row = normed(row, gain, shift, eps, c, C, NORM, SHIFT)
    row = row.to(tl.float32)
    y = tl.sum(w.to(tl.float32) * row[None, :], 1)
    if BIAS:
        y += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)
    if ACT == 'swiglu':
        up = tl.sum(v.to(tl.float32) * row[None, :], 1)
        y = (
            y
            * tl.sigmoid(y)
            * (up + (tl.load(bias + N + n, mask=n < N, other=0.0).to(tl.float32) if BIAS else 0.0))
        )
    elif ACT == 'gelu':
        y = 0.5 * y * (1 + tl.erf(y * 0.7071067811865476))
    elif ACT == 'gelu_tanh':  # 1 + tanh(z) = 2 sigmoid(2 z)
        y = y * tl.sigmoid(1.5957691216057308 * (y + 0.044715 * y * y * y))
    elif ACT == 'relu2':
        y = tl.maximum(y, 0.0) * tl.maximum(y, 0.0)
    if ADD:
        y += tl.load(add + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(out + head * N + n, y.to(out.dtype.element_ty), mask=n < N)


def norm_kernel(
    x,
    gain,
    shift,
    out,
    eps,
    stride,
    C: tl.constexpr,
    CP: tl.constexpr,
    NORM: tl.constexpr,
    SHIFT: tl.constexpr,
):
    """One program a row of x (B, C)."""
    b, c = tl.program_id(0).to(tl.int64), tl.arange(0, CP)
    row = tl.load(x + b * stride + c, mask=c < C, other=0.0)
    tl.store(out + b * C + c, normed(row, gain, shift, eps, c, C, NORM, SHIFT), mask=c < C)


def sizes_of_one(C):
    """Outputs of a program and its warps: 32 numbers of the weight a thread."""
    CP = 1 << (C - 1).bit_length()
    TILE = max(2, min(32, 4096 // CP))
    return TILE, max(4, min(16, TILE * CP // 1024))


def kind_of(norm):
    return '' if norm is None else 'rmsnorm' if norm.rms else 'layernorm'


def norm_rows(x, norm):
    """norm(x), a Norm of model.py, for x (B, C)."""
    (B, C), out = x.shape, torch.empty(x.shape, dtype=x.dtype, device=x.device)
    kernels().norm[(B,)](
        x,
        norm.weight,
        norm.bias,
        out,
        norm.eps,
        x.stride(0),
        C,
        1 << (C - 1).bit_length(),
        kind_of(norm),
        norm.bias is not None,
        num_warps=4,
    )
    return out


def fused_linear(x, weight, bias=None, norm=None, act='', residual=None, sizes=None):
    """
    act(norm(x) weightᵀ + bias) + residual: x (B, C) and weight (N, C) -> (B, N); with x (B, H, C) and weight (H, N, C), each head's own -> (B, H, N).

    norm: a Norm of model.py or None; act: '' or a GPTConfig.act, where swiglu's weight is gate | up (2 N, C); residual (B, N), which
    may become the result. One sequence is one kernel. For more the library multiplies, into `residual` where there is one.
    """
    if x.size(0) > 1:
        return library_linear(
            x if norm is None else norm_rows(x, norm), weight, bias, act, residual
        )
    heads, C = x.size(1) if x.ndim == 3 else 1, x.size(-1)
    N = weight.size(-2) // (2 if act == 'swiglu' else 1)
    out = x.new_empty(*x.shape[:-1], N)
    assert x.stride(-1) == 1
    strides = (
        x.stride(1) if x.ndim == 3 else 0,
        weight.stride(0) if weight.ndim == 3 else 0,
        *weight.stride()[-2:],
    )
    gain, shift, eps = (None, None, 0.0) if norm is None else (norm.weight, norm.bias, norm.eps)
    TILE, warps = sizes or sizes_of_one(C)
    kernels().one[(-(-N // TILE), heads)](
        x,
        weight,
        bias,
        gain,
        shift,
        residual,
        out,
        eps,
        *strides,
        C,
        1 << (C - 1).bit_length(),
        N,
        TILE,
        kind_of(norm),
        bias is not None,
        shift is not None,
        act,
        residual is not None,
        num_warps=warps,
    )
    return out


def library_linear(x, weight, bias, act, residual):
    """The same for several sequences, and x behind its norm."""
    if x.ndim == 3:
        out = x.new_empty(*x.shape[:-1], weight.size(1))
        torch.bmm(x.transpose(0, 1), weight.mT, out=out.transpose(0, 1))
        return out
    if residual is not None and not act:  # the product's own sum: no kernel for the residual stream
        residual.addmm_(x, weight.T)
        return residual if bias is None else residual.add_(bias)
    y = activate(F.linear(x, weight, bias), act)
    return y if residual is None else residual.add_(y)


def activate(y, act):
    if act == 'swiglu':
        gate, up = y.chunk(2, dim=-1)
        return F.silu(gate) * up
    if act == 'relu2':
        return F.relu(y).square()
    return F.gelu(y, approximate='tanh' if act == 'gelu_tanh' else 'none') if act else y


def fused_linear_reference(x, weight, bias=None, norm=None, act='', residual=None):
    x = x if norm is None else norm(x)
    y = torch.einsum('b...c,...nc->b...n', x, weight) + (0 if bias is None else bias)
    y = activate(y, act)
    return y if residual is None else y + residual


# -------------------------------------------------------------------------------------------------
# the token

# A logit of 16 bits is one of 65,536 numbers, so the k-th largest is found without sorting: counts of the high bytes say which it has,
# counts of the low bytes among those the rest. A row is cut into parts, a program each; four kernels, since each needs what all programs
# before it found.


def order(x):
    """Whole numbers from 0 to 65,535 in the order of x, 16-bit floats: their bits, with the negative ones turned over."""
    bits = x.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    return tl.where(bits >= 0x8000, 0xFFFF - bits, bits + 0x8000)


def ordered(logits, stride, V, PART: tl.constexpr):
    """This program's part: logits, -inf behind the last, and their order."""
    i = tl.program_id(0) * PART + tl.arange(0, PART)
    x = tl.load(
        logits + tl.program_id(1).to(tl.int64) * stride + i, mask=i < V, other=float('-inf')
    )
    return x.to(tl.float32), order(x)


def reach(counts, parts, k, SP: tl.constexpr):
    """The last of 256 bytes that k logits of a row reach or pass, and how many pass it."""
    s, n = tl.arange(0, SP), tl.arange(0, 256)
    each = tl.sum(
        tl.load(counts + s[:, None] * 256 + n[None, :], mask=s[:, None] < parts, other=0), 0
    )
    byte = tl.sum((tl.sum(each, 0) - tl.cumsum(each, 0) + each >= k).to(tl.int32), 0) - 1
    return byte, tl.sum(tl.where(n > byte, each, 0), 0)


def weigh(x, key, most, least, inverse):
    return tl.where(key >= least, tl.exp2((x - most) * inverse), 0.0)


def high_kernel(logits, high, largest, stride, V, PART: tl.constexpr):
    """Program (part, row), as the next two: how often it has each high byte, and its largest logit."""
    x, key = ordered(logits, stride, V, PART)
    here = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    tl.store(high + here * 256 + tl.arange(0, 256), tl.histogram(key >> 8, 256))
    tl.store(largest + here, tl.max(x, 0))


def low_kernel(logits, high, low, stride, V, k, PART: tl.constexpr, SP: tl.constexpr):
    """How often it has each low byte behind the high byte of the k-th largest."""
    parts, row = tl.num_programs(0), tl.program_id(1)
    byte, _ = reach(high + row * parts * 256, parts, k, SP)
    x, key = ordered(logits, stride, V, PART)
    tl.store(
        low + (row * parts + tl.program_id(0)) * 256 + tl.arange(0, 256),
        tl.histogram(key & 255, 256, key >> 8 == byte),
    )


def sum_kernel(
    logits,
    high,
    low,
    largest,
    leasts,
    sums,
    stride,
    V,
    k,
    inverse,
    PART: tl.constexpr,
    SP: tl.constexpr,
):
    """The sum of its probabilities, times a factor that is the row's own; the first program notes the k-th largest."""
    parts, row, s = tl.num_programs(0), tl.program_id(1), tl.arange(0, SP)
    byte, passed = reach(high + row * parts * 256, parts, k, SP)
    rest, _ = reach(low + row * parts * 256, parts, k - passed, SP)
    most = tl.max(tl.load(largest + row * parts + s, mask=s < parts, other=float('-inf')), 0)
    x, key = ordered(logits, stride, V, PART)
    tl.store(
        sums + row * parts + tl.program_id(0),
        tl.sum(weigh(x, key, most, byte * 256 + rest, inverse), 0),
    )
    if tl.program_id(0) == 0:
        tl.store(leasts + row, byte * 256 + rest)


def draw_kernel(
    logits,
    largest,
    leasts,
    sums,
    draws,
    tokens,
    stride,
    V,
    parts,
    inverse,
    PART: tl.constexpr,
    SP: tl.constexpr,
):
    """One program a row: the first id that has more probability up to it than was drawn, in the part that it must be in."""
    row, s = tl.program_id(0), tl.arange(0, SP)
    each = tl.load(sums + row * parts + s, mask=s < parts, other=0.0)
    target = tl.sum(each, 0) * tl.load(draws + row)
    upto = tl.cumsum(each, 0)
    part = tl.minimum(
        tl.min(tl.where((each > 0) & (upto > target), s, SP), 0),
        tl.max(tl.where(each > 0, s, 0), 0),
    )
    most = tl.max(tl.load(largest + row * parts + s, mask=s < parts, other=float('-inf')), 0)
    i = part * PART + tl.arange(0, PART)
    x = tl.load(logits + row.to(tl.int64) * stride + i, mask=i < V, other=float('-inf'))
    p = weigh(x.to(tl.float32), order(x), most, tl.load(leasts + row), inverse)
    inside = (p > 0) & (tl.sum(tl.where(s == part, upto - each, 0.0), 0) + tl.cumsum(p, 0) > target)
    token = tl.minimum(tl.min(tl.where(inside, i, 2147483647), 0), tl.max(tl.where(p > 0, i, 0), 0))
    tl.store(tokens + row, token.to(tl.int64))


def can_choose(logits, temperature, top_p):
    """Whether `choose` can stand for decoding.choose."""
    return (
        logits.device.type in RUNS_ON
        and logits.dtype.itemsize == 2
        and temperature >= 1e-5
        and top_p == 1
    )


def choose(logits, draw, temperature, top_k, out=None, PART=2048):
    """decoding.choose for logits (B, V) of 16 bits, a temperature and perhaps top_k -> (B,)."""
    B, V = logits.shape
    tokens = torch.empty(B, dtype=torch.long, device=logits.device) if out is None else out
    parts, k, inverse = -(-V // PART), min(top_k or V, V), LOG2E / temperature
    high, low = torch.empty(2, B, parts, 256, dtype=torch.int32, device=logits.device)
    largest, sums = torch.empty(2, B, parts, device=logits.device)
    leasts = torch.empty(B, dtype=torch.int32, device=logits.device)
    run, stride, SP, how = (
        kernels(),
        logits.stride(0),
        max(2, 1 << (parts - 1).bit_length()),
        dict(num_warps=8 if B < 8 else 4),
    )
    run.high[(parts, B)](logits, high, largest, stride, V, PART, **how)
    run.low[(parts, B)](logits, high, low, stride, V, k, PART, SP, **how)
    run.sum[(parts, B)](
        logits, high, low, largest, leasts, sums, stride, V, k, inverse, PART, SP, **how
    )
    run.draw[(B,)](
        logits, largest, leasts, sums, draw, tokens, stride, V, parts, inverse, PART, SP, **how
    )
    return tokens


# -------------------------------------------------------------------------------------------------
# a block


class Ops:
    """The kernels of this file, as `fused_step` of an attention gets them."""

    fused_linear = staticmethod(fused_linear)
    norm_rows = staticmethod(norm_rows)


def hidden(model: GPT, idx: torch.Tensor, cache: Cache) -> torch.Tensor:
    """
    GPT.hidden with a cache: idx (B, T) -> (B, T, C). Blocks that `can_fuse` allows run with few
    kernels, all others, and models with a pass of their own, as they are.
    """
    if type(model).hidden is not GPT.hidden:
        return model.hidden(idx, cache)
    x, rope = model.embed(idx, cache.begin(idx.size(1)))
    for n, block in enumerate(model.transformer.h):
        layer = cache.layer(n)
        if can_fuse(block, x, layer):
            x = run_block(block, x, rope, layer)
        else:
            x = block(x, rope, layer)
    cache.end()
    return model.transformer.ln_f(x)


def can_fuse(block: Block, x: torch.Tensor, layer: CacheLayer) -> bool:
    """
    Whether `run_block` computes what the block does: one new token of each sequence, a cache that
    Triton reads, an attention that says how, no gradients, no hooks, and in all other places the
    modules of model.py, with plain weights in x's dtype.
    """
    cache = layer.cache
    if cache.kernel != 'triton' or not cache.fuse or layer.fresh or x.size(1) > 1:
        return False
    if block.training or torch.is_grad_enabled() or block.attn.kernel == 'eager':
        return False
    if block.attn.fused_step is None or type(block) is not Block:
        return False
    if block.mlp is not None and type(block.mlp) is not MLP:
        return False
    for part in block.modules():
        if part._forward_hooks or part._forward_pre_hooks or 'forward' in vars(part):
            return False
        if isinstance(part, torch.nn.Linear):
            if type(part) is not Linear or part.weight.dtype != x.dtype:
                return False
    return all(type(norm) is Norm for norm in (block.ln_1, block.ln_2) if norm is not None)


def run_block(block: Block, x: torch.Tensor, rope, layer: CacheLayer) -> torch.Tensor:
    """Block.forward for x (B, 1, C), which may change -> (B, 1, C)."""
    attention, mlp, x = block.attn, block.mlp, x[:, 0]
    y = attention.fused_step(x, block.ln_1, rope, layer, Ops).flatten(1)
    x = fused_linear(y, attention.c_proj.weight, attention.c_proj.bias, residual=x)
    if mlp is not None:
        y = fused_linear(x, mlp.c_fc.weight, mlp.c_fc.bias, block.ln_2, mlp.act)
        x = fused_linear(y, mlp.c_proj.weight, mlp.c_proj.bias, residual=x)
    return x[:, None]
