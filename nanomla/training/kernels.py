"""
The few places where a fused kernel pays: the head's cross-entropy, the exact GELU, SwiGLU's
gradient, AdamW in bf16.

Beside each Triton kernel stands its plain PyTorch reference, and the tests hold them together under
Triton's interpreter on a CPU. Triton is loaded when a kernel is first wanted; without it, or
without a GPU, `linear_cross_entropy` is F.cross_entropy.

Legend: N rows (batch x tokens), C channels, V vocabulary. Logarithms inside the kernels are to base
2, because the GPU's own exponential is 2^x.
"""

from __future__ import annotations  # `tl.constexpr` below is read by Triton, not by Python

from functools import lru_cache
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from nanomla.core.devices import RUNS_ON

triton = tl = None  # set by kernels()
LOG2E = 1.4426950408889634

# Sizes for an H200 and V = 50304, where a row of bf16 logits is 100 kB: two rows a multiprocessor
# stay in L2.
LANES, WARPS, STAGES = (
    1024,
    32,
    1,
)  # softmax: vectors of 16 bytes a step, warps a row, steps through shared memory
TILE_ROWS, TILE_COLS, TILE_WARPS = 64, 128, 8  # fp8: what one program turns
E4M3_MAX = 448.0
E5M2_SHIFT = 15  # gradients in [-1, 1] are stored times 2^15, in the middle of what e5m2 holds: 2^-16 to 57344


@lru_cache
def kernels():
    """Loads Triton and hands the functions below to it; it compiles each at its first call."""
    global triton, tl
    import triton
    import triton.language as tl

    return SimpleNamespace(
        softmax_rows=triton.jit(softmax_rows_kernel),
        fp8_tiles=triton.jit(fp8_tiles_kernel),
        adamw=triton.jit(adamw_kernel),
        swiglu=triton.jit(swiglu_kernel),
    )


# -------------------------------------------------------------------------------------------------
# softmax cross-entropy and its gradient, row by row


def softmax_rows_kernel(
    logits,
    targets,
    loss,
    lse,
    V: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
    STAGES: tl.constexpr,
    LOG2E: tl.constexpr,
    GRADIENT: tl.constexpr,
):
    """
    One row a program. Each lane keeps its own running maximum and sum over vectors of 16 bytes, so
    the row's threads meet once, at its end. The row's ragged rest comes first and, in the second
    pass, which runs backwards to find what is still cached, last: only there a mask is needed.
    """
    BLOCK: tl.constexpr = LANES * VECTOR
    FULL: tl.constexpr = V // BLOCK * BLOCK
    row = tl.program_id(0).to(tl.int64)  # N x V passes 2^31
    logits += row * V
    target = tl.load(targets + row)
    counts = target >= 0
    hit = tl.load(logits + target, mask=counts & (target < V), other=float('nan')).to(
        tl.float32
    )  # before it is overwritten
    cols = tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    rest = cols < V - FULL

    # top: the maximum in bits, rounded up, because whole numbers subtract exactly; total: sum of
    # 2^(x log2(e) - top)
    x = tl.load(
        logits + FULL + cols, mask=rest, other=float('-inf'), eviction_policy='evict_last'
    ).to(tl.float32)
    top = tl.maximum(tl.ceil(tl.max(x, 1) * LOG2E), -1e38)  # finite where a lane has nothing
    total = tl.sum(tl.exp2(x * LOG2E - top[:, None]), 1)
    for start in tl.range(0, FULL, BLOCK, num_stages=STAGES):
        x = tl.load(logits + start + cols, eviction_policy='evict_last').to(tl.float32)
        higher = tl.maximum(top, tl.ceil(tl.max(x, 1) * LOG2E))
        total = total * tl.exp2(top - higher) + tl.sum(tl.exp2(x * LOG2E - higher[:, None]), 1)
        top = higher
    peak = tl.max(top, 0)
    bits = tl.log2(tl.sum(total * tl.exp2(top - peak), 0))
    tl.store(loss + row, tl.where(counts, (peak - hit * LOG2E + bits) / LOG2E, 0.0))
    bits = tl.where(counts, peak + bits, float('inf'))  # inf: a softmax of zeros
    tl.store(lse + row, bits)

    if GRADIENT:
        for done in tl.range(0, FULL, BLOCK, num_stages=STAGES):
            here = logits + (FULL - BLOCK - done) + cols
            x = tl.load(here, eviction_policy='evict_first').to(tl.float32)
            tl.store(
                here,
                tl.exp2(x * LOG2E - bits).to(logits.dtype.element_ty),
                eviction_policy='evict_first',
            )
        x = tl.load(
            logits + FULL + cols, mask=rest, other=float('-inf'), eviction_policy='evict_first'
        ).to(tl.float32)
        tl.store(
            logits + FULL + cols,
            tl.exp2(x * LOG2E - bits).to(logits.dtype.element_ty),
            mask=rest,
            eviction_policy='evict_first',
        )
        tl.debug_barrier()  # the target's element a second time, after all threads
        tl.store(
            logits + target,
            (tl.exp2(hit * LOG2E - bits) - 1).to(logits.dtype.element_ty),
            mask=counts & (target < V),
        )


def softmax_rows_reference(logits, targets, gradient):
    """What softmax_rows does, in float64."""
    x, counts, class_ids = logits.double(), targets >= 0, targets.clamp(min=0).long()
    lse = x.logsumexp(-1)
    loss = torch.where(counts, lse - x.gather(1, class_ids[:, None])[:, 0], 0.0)
    if gradient:
        logits.copy_((x.softmax(-1) - F.one_hot(class_ids, x.size(1))) * counts[:, None])
    return loss.float(), torch.where(counts, lse * LOG2E, torch.inf).float()


def softmax_rows(logits, targets, gradient):
    """
    logits (N, V) of any float dtype, targets (N,) -> cross-entropy (N,) in nats and log2 of the
    softmax's denominator (N,), fp32. With `gradient` the logits are overwritten by softmax -
    onehot. Where the target is -1, loss and gradient are 0 and the denominator inf; a target of V
    or more gives nan.
    """
    N, V = logits.shape
    vector = 16 // logits.element_size()
    lanes = min(LANES, 1 << (-(-V // vector) - 1).bit_length())
    loss, lse = logits.new_empty(2, N, dtype=torch.float32)
    kernels().softmax_rows[(N,)](
        logits,
        targets,
        loss,
        lse,
        V,
        lanes,
        vector,
        STAGES,
        LOG2E,
        gradient,
        num_warps=min(WARPS, max(1, lanes // 32)),
    )
    return loss, lse


# -------------------------------------------------------------------------------------------------
# a matrix in fp8 and its transpose, because an fp8 product reads both factors along the summed
# dimension


def fp8_tiles_kernel(
    source,
    factor,
    targets,
    out,
    out_t,
    N,
    V: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    LOG2E: tl.constexpr,
    SHIFT: tl.constexpr,
    SOFTMAX: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    """One tile a program: `source` times the number `factor`, or the gradient of logits whose lse is `factor` (N,)."""
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    cols = tl.program_id(0) * COLS + tl.arange(0, COLS)
    here = rows.to(tl.int64)[:, None] * V + cols[None, :]
    inside = (rows[:, None] < N) & (cols[None, :] < V)
    x = tl.load(source + here, mask=inside, other=0.0, eviction_policy='evict_first')
    # In halves and together again: no change, but Triton 3.6 would turn whole bf16 tiles and do all
    # below twice.
    even, odd = tl.split(tl.reshape(x, [ROWS, COLS // 2, 2]))
    y = tl.interleave(even.to(tl.float32), odd.to(tl.float32))
    if SOFTMAX:
        lse = tl.load(factor + rows, mask=rows < N, other=0.0) - SHIFT
        target = tl.load(targets + rows, mask=rows < N, other=-1).to(tl.int32)
        y = tl.exp2(y * LOG2E - lse[:, None])
        y = tl.where(cols[None, :] == target[:, None], y - 2.0**SHIFT, y)
    else:
        y = y * tl.load(factor)
    y = y.to(out.dtype.element_ty)
    tl.store(out + here, y, mask=inside)
    if TRANSPOSED:
        tl.store(
            out_t + cols.to(tl.int64)[:, None] * N + rows[None, :],
            tl.trans(y),
            mask=(cols[:, None] < V) & (rows[None, :] < N),
        )


def fp8_tiles_reference(source, factor, targets, dtype, transposed=True):
    """What fp8_tiles does."""
    y = source.float()
    if targets is None:
        y = y * factor
    else:
        onehot = F.one_hot(targets.clamp(min=0), source.size(1)) * (targets >= 0)[:, None]
        y = (torch.exp2(y * LOG2E - factor[:, None]) - onehot) * 2**E5M2_SHIFT
    y = y.to(dtype)
    return y, y.T.contiguous() if transposed else None


def fp8_tiles(source, factor, targets, dtype, transposed=True):
    """
    source (N, V) times `factor` (0-dim, fp32) in `dtype`, and its transpose (V, N) or None. With
    targets (N,): of logits, (softmax - onehot) 2^15, where `factor` (N,) is their lse from
    softmax_rows.
    """
    N, V = source.shape
    out = source.new_empty(N, V, dtype=dtype)
    out_t = source.new_empty(V, N, dtype=dtype) if transposed else None
    grid = (-(-V // TILE_COLS), -(-N // TILE_ROWS))
    kernels().fp8_tiles[grid](
        source.contiguous(),
        factor,
        targets,
        out,
        out_t,
        N,
        V,
        TILE_ROWS,
        TILE_COLS,
        LOG2E,
        E5M2_SHIFT,
        targets is not None,
        transposed,
        num_warps=TILE_WARPS,
    )
    return out, out_t


def quantize(x, transposed):
    """x (N, C) in e4m3, its transpose or None, and the fp32 number on x's device that scales them back."""
    scale = torch.linalg.vector_norm(x, torch.inf).float().clamp(min=1e-12) / E4M3_MAX
    out, _ = fp8_tiles(x, 1 / scale, None, torch.float8_e4m3fn, transposed=False)
    return (
        out,
        out.T.contiguous() if transposed else None,
        scale,
    )  # Triton 3.6 turns e4m3 tiles wrongly


# -------------------------------------------------------------------------------------------------
# the head


def linear_cross_entropy(x, weight, targets, fp8=False):
    """
    Mean cross-entropy in nats (fp32, 0-dim) of the logits x weightᵀ: x (..., C), weight (V, C),
    targets (...) of ids below V. Targets of -1 do not count; the mean over none is nan, with zero
    gradients.

    The weight is used in x's dtype, and its gradient comes in its own. Logits are made in x's
    dtype, read once and overwritten by their gradient in the same kernel, already in the forward
    pass; 1/count and the upstream gradient scale only the two products of the backward pass.
    Nothing waits for the GPU.

    `fp8` (Hopper, Ada; N, C and V multiples of 16) is an approximation: x and weight are rounded to
    e4m3 (3 bits of mantissa, one scale a matrix, so small elements vanish), and softmax - onehot to
    e5m2 (2 bits; below 2^-32 it is zero). Logits and sums are not: they are in x's dtype and in
    fp32, but the forward product sums in the tensor core's shorter fast accumulator. Where Triton
    does not run, fp8 does nothing.
    """
    if x.device.type not in RUNS_ON:
        return linear_cross_entropy_reference(x, weight, targets)
    gradient = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    apply = LinearCrossEntropy.apply
    if torch.compiler.is_compiling():
        apply = torch.compiler.disable(apply)  # a graph break
    return apply(x, weight, targets, fp8, gradient)


def linear_cross_entropy_reference(x, weight, targets):
    logits = F.linear(x, weight.to(x.dtype)).float()
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten(), ignore_index=-1)


class LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, targets, fp8, gradient):
        ctx.fp8, ctx.shape, ctx.dtypes = fp8, x.shape, (x.dtype, weight.dtype)
        x, targets = x.flatten(0, -2), targets.flatten().contiguous()
        if fp8:
            N, C, V = *x.shape, len(weight)
            assert not (N % 16 or C % 16 or V % 16), (
                f'fp8 needs multiples of 16, not {N} rows, {C} channels, {V} tokens'
            )
            assert not x.is_cuda or torch.cuda.get_device_capability(x.device) >= (8, 9), (
                'fp8 needs Hopper or Ada'
            )
            x, x_t, x_scale = quantize(x, gradient)
            weight, weight_t, weight_scale = quantize(weight, gradient)
            logits = torch._scaled_mm(
                x, weight.T, x_scale, weight_scale, out_dtype=ctx.dtypes[0], use_fast_accum=True
            )
            loss, lse = softmax_rows(logits, targets, gradient=False)
            kept = (
                (
                    *fp8_tiles(logits, lse, targets, torch.float8_e5m2),
                    x_t,
                    weight_t,
                    x_scale,
                    weight_scale,
                )
                if gradient
                else ()
            )
        else:
            weight = weight.to(x.dtype)
            logits = x @ weight.T
            loss, _ = softmax_rows(logits, targets, gradient)
            kept = (logits, x, weight) if gradient else ()
        count = (targets >= 0).sum()
        ctx.save_for_backward(count, *kept)
        return loss.sum() / count

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        count, *kept = ctx.saved_tensors
        scale = g / count.clamp(min=1)
        dx = dweight = None
        if ctx.fp8:
            d, d_t, x_t, weight_t, x_scale, weight_scale = kept
            scale = scale * 2.0**-E5M2_SHIFT
            if ctx.needs_input_grad[0]:
                dx = torch._scaled_mm(d, weight_t.T, scale, weight_scale, out_dtype=ctx.dtypes[0])
            if ctx.needs_input_grad[1]:
                dweight = torch._scaled_mm(d_t, x_t.T, scale, x_scale, out_dtype=ctx.dtypes[1])
        else:
            d, x, weight = kept
            if ctx.needs_input_grad[0]:
                dx = scaled_product(d, weight, scale, ctx.dtypes[0])
            if ctx.needs_input_grad[1]:
                dweight = scaled_product(d.T, x, scale, ctx.dtypes[1])
        return None if dx is None else dx.view(ctx.shape), dweight, None, None, None


def scaled_product(a, b, scale, dtype):
    """a b scale, summed and scaled in fp32 and rounded once, to `dtype`; `scale` is a 0-dim tensor."""
    if a.is_cuda and a.dtype != torch.float32:
        product = torch.mm(a, b, out_dtype=torch.float32)
    else:
        product = a.float() @ b.float()
    return torch.mul(
        product,
        scale,
        out=product if dtype == torch.float32 else torch.empty_like(product, dtype=dtype),
    )


# -------------------------------------------------------------------------------------------------
# SwiGLU's gradient


def swiglu_kernel(source, gradient, out, n, INNER: tl.constexpr, BLOCK: tl.constexpr):
    start = (
        tl.program_id(0).to(tl.int64) * BLOCK
    )  # N x 2 INNER may pass 2^31, a program's own part does not
    row = start // INNER
    at = (start - row * INNER).to(tl.int32) + tl.arange(0, BLOCK)
    inside = at < n - row * INNER
    gates = at + at // INNER * INNER  # a row of source is gate | up
    source += row * (2 * INNER)
    out += row * (2 * INNER)
    gradient += row * INNER
    gate = tl.load(source + gates, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(source + gates + INNER, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(gradient + at, mask=inside, other=0.0).to(tl.float32)
    share = 1 / (1 + tl.exp(-gate))
    act = gate * share
    tl.store(
        out + gates, (g * up * (share + act * (1 - share))).to(out.dtype.element_ty), mask=inside
    )
    tl.store(out + gates + INNER, (g * act).to(out.dtype.element_ty), mask=inside)
    tl.store(gradient + at, (act * up).to(gradient.dtype.element_ty), mask=inside)


def swiglu_gradient_reference(x, g):
    """What swiglu_gradient does."""
    gate, up = x.float().chunk(2, dim=-1)
    share = gate.sigmoid()
    act = gate * share
    out = torch.cat([g.float() * up * (share + act * (1 - share)), g.float() * act], dim=-1).to(
        x.dtype
    )
    g.copy_(act * up)
    return out


def swiglu_gradient(x, g):
    """
    The gradient of x = gate | up (N, 2 C) from that of silu(gate) up, g (N, C), in fp32 inside; g
    is overwritten by silu(gate) up, which the gradient of the next weight wants. Each number is
    moved once: torch.compile reads most twice, in two kernels. Both lie in one piece.
    """
    if x.device.type not in RUNS_ON:
        return swiglu_gradient_reference(x, g)
    assert x.is_contiguous() and g.is_contiguous() and x.size(-1) == 2 * g.size(-1)
    out, block = torch.empty_like(x), 1024
    kernels().swiglu[(-(-g.numel() // block),)](
        x, g, out, g.numel(), g.size(-1), block, num_warps=4
    )
    return out


# -------------------------------------------------------------------------------------------------
# AdamW


def adamw_kernel(
    addresses,
    owners,
    firsts,
    sizes,
    tensors,
    rate,
    decay,
    correction,
    root,
    epsilon,
    B1: tl.constexpr,
    B2: tl.constexpr,
    TYPE: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """
    One block of one tensor a program: owners (programs,) says of which; addresses (4, tensors) are
    weights', gradients', means' and squares', firsts and sizes (tensors,) the number of its first
    program and of its values. EVEN: whole blocks at multiples of 16 bytes.
    """
    tensor = tl.load(owners + tl.program_id(0))
    at = (tl.program_id(0) - tl.load(firsts + tensor)).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = tl.full([BLOCK], True, tl.int1) if EVEN else at < tl.load(sizes + tensor)
    weights = tl.load(addresses + tensor).to(tl.pointer_type(TYPE))
    gradients = tl.load(addresses + tensors + tensor).to(tl.pointer_type(TYPE))
    means = tl.load(addresses + 2 * tensors + tensor).to(tl.pointer_type(TYPE))
    squares = tl.load(addresses + 3 * tensors + tensor).to(tl.pointer_type(TYPE))
    if EVEN:
        weights, gradients, means, squares = (
            tl.multiple_of(weights, 16),
            tl.multiple_of(gradients, 16),
            tl.multiple_of(means, 16),
            tl.multiple_of(squares, 16),
        )
    g = tl.load(gradients + at, mask=inside, eviction_policy='evict_first').to(tl.float32)
    m = tl.load(means + at, mask=inside, eviction_policy='evict_first').to(tl.float32)
    v = tl.load(squares + at, mask=inside, eviction_policy='evict_first').to(tl.float32)
    w = tl.load(weights + at, mask=inside, eviction_policy='evict_first').to(tl.float32)
    m += (g - m) * (1 - B1)
    v += (g * g - v) * (1 - B2)
    w = w * decay - rate * correction * m / (tl.sqrt(v) * root + epsilon)
    tl.store(means + at, m.to(TYPE), mask=inside, eviction_policy='evict_first')
    tl.store(squares + at, v.to(TYPE), mask=inside, eviction_policy='evict_first')
    tl.store(weights + at, w.to(TYPE), mask=inside, eviction_policy='evict_first')


@lru_cache(8)
def programs(sizes, block, device):
    """For one program a block of each of the tensors of `sizes`: the owners, firsts and sizes that adamw_kernel wants, and how many programs."""
    counts = torch.tensor([-(-size // block) for size in sizes])
    owners = torch.repeat_interleave(torch.arange(len(sizes), dtype=torch.int32), counts)
    return (
        owners.to(device),
        (counts.cumsum(0) - counts).int().to(device),
        torch.tensor(sizes).to(device),
        len(owners),
    )


def adamw(
    weights, gradients, means, squares, step, rate, betas=(0.9, 0.999), epsilon=1e-8, decay=0.0
):
    """
    The update number `step` (from 1 on) of AdamW (Loshchilov & Hutter 2019, algorithm 2) to the
    tensors `weights`, in place: what torch.optim.AdamW(fused=True) does, in fp32 inside and in the
    tensors' one dtype outside. In bf16 it moves them at the memory's speed, which torch 2.11 does
    at half of it, and all in one launch: a GPU waits for each of many. The four lists are of the
    same sizes, every tensor in one piece.
    """
    kernel, gradients = kernels().adamw, [g.contiguous() for g in gradients]
    assert all(
        t.is_contiguous() and t.dtype == weights[0].dtype
        for t in (*weights, *gradients, *means, *squares)
    )
    quartets, block, device = list(zip(weights, gradients, means, squares)), 2048, weights[0].device
    evens = [
        quartet[0].numel() % block == 0 and not any(t.data_ptr() % 16 for t in quartet)
        for quartet in quartets
    ]
    for even in (True, False):
        some = [
            quartet
            for quartet, is_even in zip(quartets, evens)
            if is_even == even and quartet[0].numel()
        ]
        if not some:
            continue
        addresses = torch.tensor([[t.data_ptr() for t in row] for row in zip(*some)]).to(
            device, non_blocking=True
        )
        *tables, n = programs(tuple(quartet[0].numel() for quartet in some), block, device)
        kernel[(n,)](
            addresses,
            *tables,
            len(some),
            rate,
            1 - rate * decay,
            1 / (1 - betas[0] ** step),
            (1 - betas[1] ** step) ** -0.5,
            epsilon,
            *betas,
            getattr(tl, str(weights[0].dtype).removeprefix('torch.')),
            even,
            block,
            num_warps=4,
        )
