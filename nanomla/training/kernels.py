"""
The few places where a fused kernel pays: the head's cross-entropy, SwiGLU's gradient, AdamW in
bf16.

This module launches the kernels of kernels_triton.py, which imports Triton when a kernel is first
wanted. Beside each launch stands its plain PyTorch reference, and the tests hold them together
under Triton's interpreter on a CPU. Without Triton, or without a GPU, `linear_cross_entropy` is
F.cross_entropy.

Legend: N rows (batch x tokens), C channels, V vocabulary. Logarithms inside the kernels are to base
2, because the GPU's own exponential is 2^x.
"""

import math
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from nanomla.core.devices import RUNS_ON

LOG2E = 1.4426950408889634

# Sizes for an H200 and V = 50304, where a row of bf16 logits is 100 kB: two rows a multiprocessor
# stay in L2.
SOFTMAX_LANES = 1024  # vectors of 16 bytes a step
SOFTMAX_WARPS = 32  # a row
SOFTMAX_STAGES = 1  # steps through shared memory
FP8_BLOCK_N, FP8_BLOCK_V, FP8_WARPS = 64, 128, 8  # what one program converts
ADAMW_BLOCK = 2048
SWIGLU_BLOCK = 1024

E4M3_MAX = 448.0
# Gradients in [-1, 1] are stored times 2^15, in the middle of what e5m2 holds: 2^-16 to 57344.
E5M2_SHIFT = 15


@lru_cache
def triton_kernels():
    """Import the kernels, and with them Triton, when they are first launched."""
    from nanomla.training import kernels_triton

    return kernels_triton


# -------------------------------------------------------------------------------------------------
# softmax cross-entropy and its gradient, row by row


def softmax_rows(
    logits: torch.Tensor, targets: torch.Tensor, gradient: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Return the cross-entropy (N,) in nats and log2 of the softmax's denominator (N,), both fp32, of
    logits (N, V) of any float dtype and targets (N,).

    With `gradient` the logits are overwritten by softmax - onehot. Where the target is -1, loss and
    gradient are 0 and the denominator inf; a target of V or more gives nan.
    """
    N, V = logits.shape
    vector = 16 // logits.element_size()
    vectors = math.ceil(V / vector)
    lanes = min(SOFTMAX_LANES, 1 << (vectors - 1).bit_length())
    loss, lse = logits.new_empty(2, N, dtype=torch.float32)
    triton_kernels().softmax_rows_kernel[(N,)](
        logits_ptr=logits,
        targets_ptr=targets,
        loss_ptr=loss,
        lse_ptr=lse,
        V=V,
        LANES=lanes,
        VECTOR=vector,
        NUM_STAGES=SOFTMAX_STAGES,
        LOG2E=LOG2E,
        GRADIENT=gradient,
        num_warps=min(SOFTMAX_WARPS, max(1, lanes // 32)),
    )
    return loss, lse


def softmax_rows_reference(logits, targets, gradient):
    """Do what softmax_rows does, in float64."""
    x = logits.double()
    counts = targets >= 0
    class_ids = targets.clamp(min=0).long()
    lse = x.logsumexp(-1)
    loss = torch.where(counts, lse - x.gather(1, class_ids[:, None])[:, 0], 0.0)
    if gradient:
        onehot = F.one_hot(class_ids, x.size(1))
        logits.copy_((x.softmax(-1) - onehot) * counts[:, None])
    return loss.float(), torch.where(counts, lse * LOG2E, torch.inf).float()


# -------------------------------------------------------------------------------------------------
# a matrix in fp8 and its transpose, because an fp8 product reads both factors along the summed
# dimension


def fp8_tiles(source, factor, targets, dtype, transposed=True):
    """
    Return source (N, V) times `factor` (0-dim, fp32) in `dtype`, and its transpose (V, N) or None.

    With targets (N,): of logits, (softmax - onehot) 2^15, where `factor` (N,) is their lse from
    softmax_rows.
    """
    N, V = source.shape
    out = source.new_empty(N, V, dtype=dtype)
    out_t = source.new_empty(V, N, dtype=dtype) if transposed else None
    grid = (math.ceil(V / FP8_BLOCK_V), math.ceil(N / FP8_BLOCK_N))
    triton_kernels().fp8_tiles_kernel[grid](
        source_ptr=source.contiguous(),
        factor_ptr=factor,
        targets_ptr=targets,
        out_ptr=out,
        out_t_ptr=out_t,
        N=N,
        V=V,
        BLOCK_N=FP8_BLOCK_N,
        BLOCK_V=FP8_BLOCK_V,
        LOG2E=LOG2E,
        SHIFT=E5M2_SHIFT,
        SOFTMAX=targets is not None,
        TRANSPOSED=transposed,
        num_warps=FP8_WARPS,
    )
    return out, out_t


def fp8_tiles_reference(source, factor, targets, dtype, transposed=True):
    """Do what fp8_tiles does."""
    y = source.float()
    if targets is None:
        y = y * factor
    else:
        onehot = F.one_hot(targets.clamp(min=0), source.size(1)) * (targets >= 0)[:, None]
        y = (torch.exp2(y * LOG2E - factor[:, None]) - onehot) * 2**E5M2_SHIFT
    y = y.to(dtype)
    return y, y.T.contiguous() if transposed else None


class Quantized(NamedTuple):
    """A matrix in e4m3: codes, their transpose or None, and the number that scales them back."""

    codes: torch.Tensor
    codes_t: torch.Tensor | None
    scale: torch.Tensor  # 0-dim, fp32


def quantize(x: torch.Tensor, transposed: bool) -> Quantized:
    """Return x (N, C) in e4m3; nothing waits for the GPU."""
    scale = torch.linalg.vector_norm(x, torch.inf).float().clamp(min=1e-12) / E4M3_MAX
    codes, _ = fp8_tiles(x, 1 / scale, None, torch.float8_e4m3fn, transposed=False)
    # Transposed by PyTorch, because Triton 3.6 transposes e4m3 tiles wrongly.
    codes_t = codes.T.contiguous() if transposed else None
    return Quantized(codes, codes_t, scale)


# -------------------------------------------------------------------------------------------------
# the head


def linear_cross_entropy(x, weight, targets, fp8=False):
    """
    Return the mean cross-entropy in nats (fp32, 0-dim) of the logits x weightᵀ: x (..., C), weight
    (V, C), targets (...) of ids below V. Targets of -1 do not count; the mean over none is nan,
    with zero gradients.

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
    """linear_cross_entropy with the gradient of the logits made in the forward pass."""

    @staticmethod
    def forward(ctx, x, weight, targets, fp8, gradient):
        ctx.fp8 = fp8
        ctx.shape = x.shape
        ctx.dtypes = (x.dtype, weight.dtype)
        x, targets = x.flatten(0, -2), targets.flatten().contiguous()
        if fp8:
            loss, saved = fp8_forward(x, weight, targets, gradient)
        else:
            weight = weight.to(x.dtype)
            logits = x @ weight.T
            loss, _ = softmax_rows(logits, targets, gradient)
            saved = (logits, x, weight) if gradient else ()
        count = (targets >= 0).sum()
        ctx.save_for_backward(count, *saved)
        return loss.sum() / count

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        count, *saved = ctx.saved_tensors
        scale = g / count.clamp(min=1)
        dx = dweight = None
        if ctx.fp8:
            d, d_t, x_t, weight_t, x_scale, weight_scale = saved
            scale = scale * 2.0**-E5M2_SHIFT
            if ctx.needs_input_grad[0]:
                dx = torch._scaled_mm(d, weight_t.T, scale, weight_scale, out_dtype=ctx.dtypes[0])
            if ctx.needs_input_grad[1]:
                dweight = torch._scaled_mm(d_t, x_t.T, scale, x_scale, out_dtype=ctx.dtypes[1])
        else:
            d, x, weight = saved
            if ctx.needs_input_grad[0]:
                dx = scaled_product(d, weight, scale, ctx.dtypes[0])
            if ctx.needs_input_grad[1]:
                dweight = scaled_product(d.T, x, scale, ctx.dtypes[1])
        if dx is not None:
            dx = dx.view(ctx.shape)
        return dx, dweight, None, None, None


def fp8_forward(x, weight, targets, gradient):
    """Return the loss of each row, and the tensors that fp8's backward pass wants."""
    check_fp8(x, weight)
    dtype = x.dtype
    x, x_t, x_scale = quantize(x, gradient)
    weight, weight_t, weight_scale = quantize(weight, gradient)
    logits = torch._scaled_mm(
        x, weight.T, x_scale, weight_scale, out_dtype=dtype, use_fast_accum=True
    )
    loss, lse = softmax_rows(logits, targets, gradient=False)
    if not gradient:
        return loss, ()
    d, d_t = fp8_tiles(logits, lse, targets, torch.float8_e5m2)
    return loss, (d, d_t, x_t, weight_t, x_scale, weight_scale)


def check_fp8(x: torch.Tensor, weight: torch.Tensor) -> None:
    """Assert that these shapes and this GPU have products in fp8."""
    N, C, V = *x.shape, len(weight)
    fits = N % 16 == 0 and C % 16 == 0 and V % 16 == 0
    assert fits, f'fp8 needs multiples of 16, not {N} rows, {C} channels, {V} tokens'
    if x.is_cuda:
        assert torch.cuda.get_device_capability(x.device) >= (8, 9), 'fp8 needs Hopper or Ada'


def scaled_product(a, b, scale, dtype: torch.dtype) -> torch.Tensor:
    """
    Return a b scale, summed and scaled in fp32 and rounded once, to `dtype`; `scale` is a 0-dim
    tensor.
    """
    if a.is_cuda and a.dtype != torch.float32:
        product = torch.mm(a, b, out_dtype=torch.float32)
    else:
        product = a.float() @ b.float()
    out = product
    if dtype != torch.float32:
        out = torch.empty_like(product, dtype=dtype)
    return torch.mul(product, scale, out=out)


# -------------------------------------------------------------------------------------------------
# SwiGLU's gradient


def swiglu_gradient(x: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    """
    Return the gradient of x = gate | up (N, 2 C) from that of silu(gate) up, g (N, C), in fp32
    inside; g is overwritten by silu(gate) up, which the gradient of the next weight wants.

    Each number is moved once: torch.compile reads most twice, in two kernels. Both tensors are
    contiguous.
    """
    if x.device.type not in RUNS_ON:
        return swiglu_gradient_reference(x, g)
    assert x.is_contiguous() and g.is_contiguous() and x.size(-1) == 2 * g.size(-1)
    out = torch.empty_like(x)
    triton_kernels().swiglu_kernel[(math.ceil(g.numel() / SWIGLU_BLOCK),)](
        source_ptr=x,
        gradient_ptr=g,
        out_ptr=out,
        numel=g.numel(),
        INNER=g.size(-1),
        BLOCK=SWIGLU_BLOCK,
        num_warps=4,
    )
    return out


def swiglu_gradient_reference(x, g):
    """Do what swiglu_gradient does."""
    gate, up = x.float().chunk(2, dim=-1)
    sigmoid = gate.sigmoid()
    silu = gate * sigmoid
    d_gate = g.float() * up * (sigmoid + silu * (1 - sigmoid))
    d_up = g.float() * silu
    g.copy_(silu * up)
    return torch.cat([d_gate, d_up], dim=-1).to(x.dtype)


# -------------------------------------------------------------------------------------------------
# AdamW


class Programs(NamedTuple):
    """Which program of adamw_kernel works for which tensor."""

    owners: torch.Tensor  # (count,): the tensor of each program
    first_programs: torch.Tensor  # (tensors,)
    sizes: torch.Tensor  # (tensors,)
    count: int


@lru_cache(8)
def programs_of(sizes: tuple[int, ...], device: torch.device) -> Programs:
    """Return one program for each block of each of the tensors of these sizes."""
    blocks = torch.tensor([math.ceil(size / ADAMW_BLOCK) for size in sizes])
    owners = torch.repeat_interleave(torch.arange(len(sizes), dtype=torch.int32), blocks)
    first_programs = (blocks.cumsum(0) - blocks).int()
    return Programs(
        owners.to(device),
        first_programs.to(device),
        torch.tensor(sizes).to(device),
        len(owners),
    )


def adamw(
    weights, gradients, means, squares, step, rate, betas=(0.9, 0.999), epsilon=1e-8, decay=0.0
) -> None:
    """
    Apply the update number `step` (from 1 on) of AdamW (Loshchilov & Hutter 2019, algorithm 2) to
    the tensors `weights`, in place: what torch.optim.AdamW(fused=True) does, in fp32 inside and in
    the tensors' one dtype outside.

    In bf16 it moves them at the memory's speed, which torch 2.11 does at half of it, and all in one
    launch: a GPU waits for each of many. The four lists are of the same sizes, every tensor
    contiguous.
    """
    gradients = [g.contiguous() for g in gradients]
    for t in (*weights, *gradients, *means, *squares):
        assert t.is_contiguous() and t.dtype == weights[0].dtype
    constants = dict(
        learning_rate=rate,
        decay=1 - rate * decay,
        mean_correction=1 / (1 - betas[0] ** step),
        root_correction=(1 - betas[1] ** step) ** -0.5,
        epsilon=epsilon,
        BETA1=betas[0],
        BETA2=betas[1],
    )
    aligned, others = [], []
    for quartet in zip(weights, gradients, means, squares):
        if is_aligned(quartet):
            aligned.append(quartet)
        else:
            others.append(quartet)
    launch_adamw(aligned, constants, aligned=True)
    launch_adamw(others, constants, aligned=False)


def is_aligned(tensors) -> bool:
    """Whether tensors of one size are whole blocks that begin at multiples of 16 bytes."""
    if tensors[0].numel() % ADAMW_BLOCK:
        return False
    return not any(t.data_ptr() % 16 for t in tensors)


def launch_adamw(quartets: list[tuple], constants: dict, aligned: bool) -> None:
    """Update quartets of a weight, its gradient, mean and square, all in one launch."""
    quartets = [quartet for quartet in quartets if quartet[0].numel()]
    if not quartets:
        return
    weight = quartets[0][0]
    kernels = triton_kernels()
    programs = programs_of(tuple(quartet[0].numel() for quartet in quartets), weight.device)
    rows = zip(*quartets)  # all weights, all gradients, ...
    addresses = torch.tensor([[t.data_ptr() for t in row] for row in rows])
    kernels.adamw_kernel[(programs.count,)](
        addresses_ptr=addresses.to(weight.device, non_blocking=True),
        owners_ptr=programs.owners,
        first_programs_ptr=programs.first_programs,
        sizes_ptr=programs.sizes,
        tensors=len(quartets),
        **constants,
        DTYPE=getattr(kernels.tl, str(weight.dtype).removeprefix('torch.')),
        ALIGNED=aligned,
        BLOCK=ADAMW_BLOCK,
        num_warps=4,
    )
