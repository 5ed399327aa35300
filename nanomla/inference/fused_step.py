"""
A decode step of one new token a sequence, with few kernels.

Beside attention (attention_kernel.py) a step is products of matrices with few rows, and what stands
between them would cost as much again only by being launched. For one sequence a norm in front of a
product, and an activation or the residual stream after it, are part of its kernel; for more the
library multiplies. A token is drawn by four kernels. `run_block` is Block.forward put together from
them.

This module launches the kernels of fused_step_triton.py, which imports Triton. Beside each launch
stands its reference in PyTorch; that of `choose` is `choose` of generate.py.

Legend: B sequences, C channels in, N channels out, H heads, V vocabulary.
"""

import math
from functools import lru_cache

import torch
import torch.nn.functional as F

from model import GPT, MLP, Block, Linear, Norm
from nanomla.core.devices import RUNS_ON
from nanomla.inference.cache import Cache, CacheLayer

LOG2E = 1.4426950408889634


@lru_cache
def triton_kernels():
    """Import the kernels, and with them Triton, when they are first launched."""
    from nanomla.inference import fused_step_triton

    return fused_step_triton


def power_of_2(n: int) -> int:
    """Return the smallest power of 2 that is at least n."""
    return 1 << (n - 1).bit_length()


# -------------------------------------------------------------------------------------------------
# norm and linear


def norm_kind(norm: Norm | None) -> str:
    if norm is None:
        return ''
    return 'rmsnorm' if norm.rms else 'layernorm'


def norm_rows(x: torch.Tensor, norm: Norm) -> torch.Tensor:
    """Return norm(x) for x (B, C), in one kernel."""
    B, C = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    triton_kernels().norm_kernel[(B,)](
        x_ptr=x,
        gain_ptr=norm.weight,
        shift_ptr=norm.bias,
        out_ptr=out,
        eps=norm.eps,
        row_stride=x.stride(0),
        C=C,
        BLOCK_C=power_of_2(C),
        NORM=norm_kind(norm),
        HAS_SHIFT=norm.bias is not None,
        num_warps=4,
    )
    return out


def fused_linear(x, weight, bias=None, norm=None, act='', residual=None) -> torch.Tensor:
    """
    Return act(norm(x) weightᵀ + bias) + residual: x (B, C) and weight (N, C) -> (B, N); with x
    (B, H, C) and weight (H, N, C), each head's own -> (B, H, N).

    norm: a Norm of model.py or None; act: '' or a GPTConfig.act, where swiglu's weight is gate | up
    (2 N, C); residual (B, N), which may become the result. One sequence is one kernel. For more the
    library multiplies, into `residual` where there is one.
    """
    if x.size(0) > 1:
        if norm is not None:
            x = norm_rows(x, norm)
        return library_linear(x, weight, bias, act, residual)
    assert x.stride(-1) == 1
    C, N = x.size(-1), weight.size(-2)
    if act == 'swiglu':
        N //= 2
    heads, x_head_stride, weight_head_stride = 1, 0, 0
    if x.ndim == 3:
        heads, x_head_stride = x.size(1), x.stride(1)
    if weight.ndim == 3:
        weight_head_stride = weight.stride(0)
    shift = None if norm is None else norm.bias
    out = x.new_empty(*x.shape[:-1], N)
    BLOCK_N, num_warps = linear_tile(C)
    triton_kernels().linear_kernel[(math.ceil(N / BLOCK_N), heads)](
        x_ptr=x,
        weight_ptr=weight,
        bias_ptr=bias,
        gain_ptr=None if norm is None else norm.weight,
        shift_ptr=shift,
        residual_ptr=residual,
        out_ptr=out,
        eps=0.0 if norm is None else norm.eps,
        x_head_stride=x_head_stride,
        weight_head_stride=weight_head_stride,
        weight_out_stride=weight.stride(-2),
        weight_in_stride=weight.stride(-1),
        C=C,
        BLOCK_C=power_of_2(C),
        N=N,
        BLOCK_N=BLOCK_N,
        NORM=norm_kind(norm),
        HAS_BIAS=bias is not None,
        HAS_SHIFT=shift is not None,
        ACT=act,
        HAS_RESIDUAL=residual is not None,
        num_warps=num_warps,
    )
    return out


def linear_tile(C: int) -> tuple[int, int]:
    """Return outputs of a program, and its warps: 32 numbers of the weight a thread."""
    BLOCK_C = power_of_2(C)
    BLOCK_N = max(2, min(32, 4096 // BLOCK_C))
    return BLOCK_N, max(4, min(16, BLOCK_N * BLOCK_C // 1024))


def library_linear(x, weight, bias, act, residual) -> torch.Tensor:
    """Return fused_linear of several sequences, of x after its norm."""
    if x.ndim == 3:
        out = x.new_empty(*x.shape[:-1], weight.size(1))
        torch.bmm(x.transpose(0, 1), weight.mT, out=out.transpose(0, 1))
        return out
    if residual is not None and not act:
        # The product adds the residual itself, which saves a kernel.
        residual.addmm_(x, weight.T)
        return residual if bias is None else residual.add_(bias)
    y = activate(F.linear(x, weight, bias), act)
    return y if residual is None else residual.add_(y)


def activate(y: torch.Tensor, act: str) -> torch.Tensor:
    """Apply a GPTConfig.act, or none where it is ''."""
    if act == '':
        return y
    if act == 'swiglu':
        gate, up = y.chunk(2, dim=-1)
        return F.silu(gate) * up
    if act == 'relu2':
        return F.relu(y).square()
    return F.gelu(y, approximate='tanh' if act == 'gelu_tanh' else 'none')


def fused_linear_reference(x, weight, bias=None, norm=None, act='', residual=None) -> torch.Tensor:
    """Return what fused_linear computes."""
    if norm is not None:
        x = norm(x)
    y = torch.einsum('b...c,...nc->b...n', x, weight)
    if bias is not None:
        y = y + bias
    y = activate(y, act)
    return y if residual is None else y + residual


# -------------------------------------------------------------------------------------------------
# drawing a token


def can_choose(logits: torch.Tensor, temperature: float, top_p: float) -> bool:
    """Whether `choose` can replace that of generate.py."""
    if logits.device.type not in RUNS_ON or logits.dtype.itemsize != 2:
        return False
    return temperature >= 1e-5 and top_p == 1


def choose(logits, draw, temperature, top_k, out=None, block=2048) -> torch.Tensor:
    """
    Draw a token of each sequence, as `choose` of generate.py: logits (B, V) of 16 bits -> (B,).

    draw (B,): numbers in [0, 1); top_k: 0 for all; out (B,): where to write the tokens; block:
    logits of a program.
    """
    B, V = logits.shape
    device = logits.device
    tokens = out
    if tokens is None:
        tokens = torch.empty(B, dtype=torch.long, device=device)
    parts = math.ceil(V / block)
    high_counts, low_counts = torch.empty(2, B, parts, 256, dtype=torch.int32, device=device)
    largest, sums = torch.empty(2, B, parts, device=device)
    least_keys = torch.empty(B, dtype=torch.int32, device=device)
    logits_of_row = dict(logits_ptr=logits, row_stride=logits.stride(0), V=V, BLOCK_V=block)
    kth = dict(k=min(top_k or V, V), BLOCK_PARTS=max(2, power_of_2(parts)))
    num_warps = 8 if B < 8 else 4
    kernels = triton_kernels()
    kernels.count_high_kernel[(parts, B)](
        **logits_of_row, high_counts_ptr=high_counts, largest_ptr=largest, num_warps=num_warps
    )
    kernels.count_low_kernel[(parts, B)](
        **logits_of_row,
        **kth,
        high_counts_ptr=high_counts,
        low_counts_ptr=low_counts,
        num_warps=num_warps,
    )
    kernels.sum_kernel[(parts, B)](
        **logits_of_row,
        **kth,
        high_counts_ptr=high_counts,
        low_counts_ptr=low_counts,
        largest_ptr=largest,
        least_keys_ptr=least_keys,
        sums_ptr=sums,
        inverse_temperature=LOG2E / temperature,
        num_warps=num_warps,
    )
    kernels.draw_kernel[(B,)](
        **logits_of_row,
        largest_ptr=largest,
        least_keys_ptr=least_keys,
        sums_ptr=sums,
        draws_ptr=draw,
        tokens_ptr=tokens,
        parts=parts,
        inverse_temperature=LOG2E / temperature,
        BLOCK_PARTS=kth['BLOCK_PARTS'],
        num_warps=num_warps,
    )
    return tokens


# -------------------------------------------------------------------------------------------------
# a block


class Ops:
    """The operations of this file that `fused_step` of an attention is handed."""

    fused_linear = staticmethod(fused_linear)
    norm_rows = staticmethod(norm_rows)


def hidden(model: GPT, idx: torch.Tensor, cache: Cache) -> torch.Tensor:
    """
    Return GPT.hidden with a cache: idx (B, T) -> (B, T, C).

    Blocks that `can_fuse` allows run with few kernels; all others, and models with a pass of their
    own, run as they are.
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
    if layer.ranges:  # channels are brought to one size after RoPE, which is inside of the kernel
        return False
    if cache.kernel != 'triton' or not cache.fuse or layer.fresh or x.size(1) > 1:
        return False
    if block.training or torch.is_grad_enabled() or block.attn.kernel == 'eager':
        return False
    if block.attn.fused_step is None or type(block) is not Block:
        return False
    if block.mlp is not None and type(block.mlp) is not MLP:
        return False
    for module in block.modules():
        if module._forward_hooks or module._forward_pre_hooks or 'forward' in vars(module):
            return False
        if isinstance(module, torch.nn.Linear):
            if type(module) is not Linear or module.weight.dtype != x.dtype:
                return False
    return all(type(norm) is Norm for norm in (block.ln_1, block.ln_2) if norm is not None)


def run_block(block: Block, x: torch.Tensor, rope, layer: CacheLayer) -> torch.Tensor:
    """Return Block.forward for x (B, 1, C), which may change -> (B, 1, C)."""
    attention, mlp = block.attn, block.mlp
    x = x[:, 0]
    y = attention.fused_step(x, block.ln_1, rope, layer, Ops).flatten(1)
    x = fused_linear(y, attention.c_proj.weight, attention.c_proj.bias, residual=x)
    if mlp is not None:
        y = fused_linear(x, mlp.c_fc.weight, mlp.c_fc.bias, block.ln_2, mlp.act)
        x = fused_linear(y, mlp.c_proj.weight, mlp.c_proj.bias, residual=x)
    return x[:, None]
