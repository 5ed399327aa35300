"""
One step of fine-tuning within a memory budget: head and loss chunk by chunk, a chosen part of each block
recomputed in the backward pass, accumulation that weighs tokens and not batches, AdamW.

What a block keeps for its backward pass, per token and in units of n_embd values, for Llama's shape (x itself
is 1, q, k, v are 3, attention's output 1, the sum after it 1, gate and up 5.4 ...) decides the peak:

    recompute        kept                                                    units
    'full'           x                                                       1
    'selective'      x, attention's output, products up to save_width wide   3.1 (save_width 1), 6.1 (3), 11.5 (6)
    'none'           what torch.compile thinks best                          14 to 17

A product of C inputs costs the same time per value that it gives, so the narrow ones are no better bargain
than the wide ones, but attention is: it is slow for its size.

Legend: N tokens, C channels (n_embd), V vocabulary.
"""

import math
from collections import defaultdict
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from model import MLP, Block, Linear
from nanomla.core.configurator import UserError


class NotHere(Exception):
    """A cell of the benchmark cannot run here, for the reason it gives: a row n/a."""


RECOMPUTE = ('none', 'selective', 'full')


# ---------------------------------------------------------------------------------------------------
# head and loss


class HeadLoss(torch.autograd.Function):
    """
    Cross-entropy of x (N, C) through the head's weight (V, C), summed over targets >= 0 and divided by `count`,
    a tensor. The gradients are made with the loss, chunk by chunk, so that (N, V) never exists; a frozen head costs no
    gradient of its own, and that of the weight is summed in fp32, or, of a single chunk, made in its dtype at once.
    As in kernels.py the chunk's logits are overwritten by softmax - onehot.
    """

    @staticmethod
    def forward(ctx, x, weight, targets, count, chunk, gradient=True):
        wants_x, wants_weight = (gradient and needed for needed in ctx.needs_input_grad[:2])
        w, total = weight.to(x.dtype), x.new_zeros((), dtype=torch.float32)
        dx = torch.empty_like(x) if wants_x else None
        dw = None
        for part, target, at in zip(x.split(chunk), targets.split(chunk), range(0, len(x), chunk)):
            logits = part @ w.T
            total += softmax_minus_onehot(logits, target, wants_x or wants_weight)
            if wants_x:
                torch.mm(logits, w, out=dx[at : at + chunk])
            if wants_weight and len(x) <= chunk and weight.dtype == x.dtype:
                dw = logits.T @ part
            elif wants_weight:
                fp32 = (
                    dict(out_dtype=torch.float32) if x.is_cuda and x.dtype != torch.float32 else {}
                )
                more = torch.mm(logits.T, part, **fp32).float()
                dw = more if dw is None else dw.add_(more)
                del more
        ctx.save_for_backward(dx, dw, count)
        ctx.dtype = weight.dtype
        return total / count

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        dx, dw, count = ctx.saved_tensors
        scale = g / count
        return (
            dx * scale.to(dx.dtype) if dx is not None else None,
            dw.mul_(scale).to(ctx.dtype) if dw is not None else None,
            None,
            None,
            None,
            None,
        )


def softmax_minus_onehot(logits, targets, gradient):
    """Cross-entropy summed over targets >= 0, in fp32; with `gradient` the logits (N, V) become softmax - onehot, 0 where the target is -1."""
    if logits.is_cuda:
        from nanomla.core.devices import RUNS_ON
        from nanomla.training.kernels import softmax_rows

        if 'cuda' in RUNS_ON:
            return softmax_rows(logits, targets.contiguous(), gradient)[0].sum()
    x, counts, at = logits.float(), targets >= 0, targets.clamp(min=0)[:, None]
    lse = x.logsumexp(-1, keepdim=True)
    loss = ((lse - x.gather(1, at))[:, 0] * counts).sum()
    if gradient:
        p = (x - lse).exp_()
        logits.copy_(p.scatter_add_(1, at, torch.full_like(lse, -1.0)) * counts[:, None])
    return loss


def loss_of(model, batch, count, chunk=2048):
    """The batch's summed cross-entropy / count, in nats: over all micro-batches of a step these add up to the mean over its targets."""
    x = model.hidden(batch.idx, batch.documents).flatten(0, 1)
    return HeadLoss.apply(
        x, model.lm_head.weight, batch.targets.flatten(), count, chunk, torch.is_grad_enabled()
    )


# ---------------------------------------------------------------------------------------------------
# SwiGLU and the product behind it, backward in one go


@torch.library.custom_op('nanomla::swiglu_down_backward', mutates_args=())
def swiglu_down_backward(
    x: torch.Tensor, weight: torch.Tensor, g: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of x and weight from that of SwigluDown's result."""
    from nanomla.training.kernels import swiglu_gradient

    g = g.flatten(0, -2)
    h = g @ weight
    dx = swiglu_gradient(x.flatten(0, -2).contiguous(), h)
    return dx.view(x.shape), g.T @ h  # h has become silu(gate) up


@swiglu_down_backward.register_fake
def _(x, weight, g):
    return torch.empty_like(x), torch.empty_like(weight)


class SwigluDown(torch.autograd.Function):
    """silu(gate) up weight^T of x = gate | up (..., 2 I), weight (C, I) in x's dtype. It keeps x and nothing as wide beside it."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        gate, up = x.chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, weight)

    @staticmethod
    def backward(ctx, g):
        x, weight = ctx.saved_tensors
        return torch.ops.nanomla.swiglu_down_backward(x, weight, g)


class SwigluMLP(MLP):
    """An MLP with SwiGLU whose weights learn: the same, with SwigluDown's gradient."""

    def forward(self, x):
        if not torch.is_grad_enabled():
            return super().forward(x)
        return self.dropout(SwigluDown.apply(self.c_fc(x), self.c_proj.weight.to(x.dtype)))


def fuse_swiglu(mlp):
    """Makes `mlp` a SwigluMLP where it can be one and it pays."""
    from nanomla.core.devices import RUNS_ON

    down = getattr(mlp, 'c_proj', None)
    if (
        type(mlp) is MLP
        and mlp.act == 'swiglu'
        and type(down) is Linear
        and down.weight.requires_grad
        and down.bias is None
        and down.weight.device.type in RUNS_ON
    ):
        mlp.__class__ = SwigluMLP


# ---------------------------------------------------------------------------------------------------
# what is kept and what is computed again


@lru_cache
def keeps(width):
    """
    Contexts for selective checkpointing: keep attention and each product that is at most `width` wide and not a cheap low-rank one.
    The same ones for the same width, so that what torch.compile made for one model serves the next.
    """
    products = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default}

    def policy(ctx, op, *args, **options):
        if 'scaled_dot_product' in str(op) or 'flex_attention' in str(op):
            return CheckpointPolicy.MUST_SAVE
        if (
            op in products
            and args[-1].shape[-1] <= width
            and 8 * args[-1].shape[0] > args[-1].shape[-1]
        ):
            return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE

    return partial(create_selective_checkpoint_contexts, policy)


class KeepingBlock(Block):
    """A Block that computes again all but attention and products up to `width`; torch.compile sees through it, and tells blocks apart by their width."""

    def forward(self, x, rope, cache=None):
        if not torch.is_grad_enabled():
            return super().forward(x, rope, cache)
        return checkpoint(
            super().forward,
            x,
            rope,
            cache,
            use_reentrant=False,
            preserve_rng_state=self.random,
            context_fn=keeps(self.width),
        )


def set_up(
    model,
    recompute='none',
    save_width=1.0,
    spared_layers=0,
    compile=False,
    documents=False,
    dropout=False,
    backend='inductor',
):
    """
    Lets each block of `model` recompute and compile as asked. `spared_layers`, the last ones, keep every product: what
    memory is left for. Returns in words what was really set up: where documents break the compiled graph, and in 4 bits,
    not every choice is there.
    """
    if recompute not in RECOMPUTE:
        raise UserError(f"recompute='{recompute}' is not known: use {', '.join(RECOMPUTE)}")
    if recompute == 'selective' and compile and documents:
        recompute = 'full'
    if (
        recompute == 'none'
        and compile
        and getattr(model, 'is_loaded_in_4bit', False)
        and not documents
    ):
        recompute, save_width = 'selective', math.inf  # by itself it would keep dequantised weights
    how = dict(dynamic=False, backend=backend)
    layers = list(model.transformer.h)
    for n, block in enumerate(layers):
        if recompute == 'selective':
            block.__class__, block.random = KeepingBlock, dropout
            block.width = (
                math.inf if n >= len(layers) - spared_layers else save_width * model.config.n_embd
            )
        if compile:
            fuse_swiglu(block.mlp)
        if compile and recompute != 'full':
            block.compile(**how)
        elif recompute == 'full':
            forward = torch.compile(block.forward, **how) if compile else block.forward
            block.forward = partial(
                checkpoint, forward, use_reentrant=False, preserve_rng_state=dropout
            )
    if compile:
        model.embed = torch.compile(model.embed, **how)
    said = dict(none='nothing recomputed', full='blocks recomputed')
    said['selective'] = (
        'elementwise work recomputed'
        if save_width == math.inf
        else f'recomputed but for attention and products up to {save_width:g} n_embd'
    )
    return said[recompute] + (
        f', {spared_layers} layers spared'
        if spared_layers and recompute == 'selective' and save_width < math.inf
        else ''
    )


def runs_here(params):
    """Whether all of `params` are in half precision, where Triton runs."""
    from nanomla.core.devices import RUNS_ON

    return all(
        p.dtype in (torch.bfloat16, torch.float16)
        and p.is_contiguous()
        and p.device.type in RUNS_ON
        for p in params
    )


class HalfAdamW(torch.optim.Optimizer):
    """torch.optim.AdamW for weights in half precision, all in one pass over their memory: kernels.adamw."""

    @torch.no_grad()
    def step(self):
        from nanomla.training.kernels import adamw

        for group in self.param_groups:
            alike = defaultdict(list)  # (dtype, step) -> its tensors
            for p in group['params']:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state |= dict(
                        step=0, exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p)
                    )
                state['step'] += 1
                alike[p.dtype, state['step']].append(
                    (p, p.grad, state['exp_avg'], state['exp_avg_sq'])
                )
            for (_, step), tensors in alike.items():
                adamw(
                    *zip(*tensors), step, group['lr'], group['betas'], decay=group['weight_decay']
                )


class Finetuner:
    """
    The parameters that learn, and AdamW. States have the parameters' dtype, as everywhere in PyTorch: with bf16 weights
    the whole of full fine-tuning is bf16, small updates round to nothing, and only a comparison of speed should want that.
    """

    def __init__(self, model, loss_of, learning_rate, weight_decay=0.0, grad_clip=0.0):
        self.loss_of, self.model, self.grad_clip = loss_of, model, grad_clip
        self.params = [p for p in model.parameters() if p.requires_grad]
        how = dict(lr=learning_rate, betas=(0.9, 0.999), weight_decay=weight_decay)
        if runs_here(self.params):
            self.optimizer = HalfAdamW(self.params, how)
        else:
            self.optimizer = torch.optim.AdamW(
                self.params, **how, fused=self.params[0].is_cuda or None
            )

    def step(self, batches):
        """One update on the micro-batches. Returns the mean loss over their targets, on the device, not waited for."""
        count = torch.tensor(float(max(1, sum(batch.counted for batch in batches)))).to(
            batches[0].idx.device, non_blocking=True
        )
        total = 0
        for batch in batches:
            loss = self.loss_of(self.model, batch, count)
            loss.backward()
            total = total + loss.detach()
        if self.grad_clip:
            torch.nn.utils.clip_grad_norm_(self.params, self.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return total


@torch.no_grad()
def evaluate(model, loss_of, batches):
    """Mean loss in nats over all targets of the batches."""
    total, counted = 0.0, 0
    model.eval()
    for batch in batches:
        one = torch.ones((), device=batch.idx.device)
        total += loss_of(model, batch, one).item()
        counted += batch.counted
    model.train()
    return total / max(1, counted)


# ---------------------------------------------------------------------------------------------------
# physics


def flops_per_token(model, T, kind):
    """
    FLOPs that one token of a sequence of T needs, without recomputation: 2 a weight forward, 2 for the input's gradient,
    2 more for the weight's own where it learns; attention over the past half only, and 5/2 of that backward. Adapters are left out.
    """
    from nanomla.adapters.lora import size

    blocks = sum(
        size(p)
        for name, p in model.transformer.h.named_parameters()
        if p.ndim > 1 and 'lora_' not in name
    )
    weights = blocks + model.lm_head.weight.numel()
    attention = sum(
        T * block.attn.n_head * (block.attn.qk_dim + block.attn.v_dim)
        for block in model.transformer.h
    )
    return (6 if kind == 'full' else 4) * weights + 3.5 * attention
