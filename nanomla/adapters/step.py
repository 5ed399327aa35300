"""
A step of fine-tuning within a memory budget.

Head and loss work chunk by chunk; a chosen part of each block is computed again in the backward
pass; micro-batches count by their targets; the optimizer is AdamW.

What a block stores for its backward pass decides the peak of memory. Per token, in units of n_embd
values, for Llama's shape (x itself is 1, q, k, v are 3, attention's output 1, the sum after it 1,
gate and up 5.4 ...):

    recompute        stored                                                   units
    'full'           x                                                        1
    'selective'      x, attention's output, products up to save_width wide    3.1 (save_width 1),
                                                                              6.1 (3), 11.5 (6)
    'none'           what torch.compile thinks best                           14 to 17

A product of C inputs takes the same time per value that it gives, so storing the narrow products
saves no more time per byte than storing the wide ones; storing attention does, which is slow for
its size.

Legend: B rows, T tokens of a row, N = B T, C channels (n_embd), I width of the MLP, V vocabulary.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from model import GPT, MLP, Block, Linear
from nanomla.adapters import lora
from nanomla.adapters.packing import Batch, Documents
from nanomla.core.checks import check_choice
from nanomla.core.devices import RUNS_ON

RECOMPUTE = ('none', 'selective', 'full')


# -------------------------------------------------------------------------------------------------
# head and loss


class HeadLoss(torch.autograd.Function):
    """
    Cross-entropy of x (N, C) through the head's weight (V, C), a scalar in nats.

    It is the sum over targets >= 0 divided by `count`, a tensor. The gradients are computed with
    the loss, chunk by chunk, so that (N, V) never exists; a chunk's logits are overwritten by
    softmax - onehot. A frozen head costs no gradient of its own. The weight's gradient is summed in
    fp32, or, where all of x is one chunk, computed in its dtype at once.
    """

    @staticmethod
    def forward(ctx, x, weight, targets, count, chunk, gradient=True):
        wants_x = gradient and ctx.needs_input_grad[0]
        wants_weight = gradient and ctx.needs_input_grad[1]
        w = weight.to(x.dtype)
        total = x.new_zeros((), dtype=torch.float32)
        dx = torch.empty_like(x) if wants_x else None
        dw = None
        for start in range(0, len(x), chunk):
            part = x[start : start + chunk]
            logits = part @ w.T
            target = targets[start : start + chunk]
            total += softmax_minus_onehot(logits, target, wants_x or wants_weight)
            if wants_x:
                torch.mm(logits, w, out=dx[start : start + chunk])
            if wants_weight and len(x) <= chunk and weight.dtype == x.dtype:
                dw = logits.T @ part
            elif wants_weight:
                more = product_in_fp32(logits.T, part)
                dw = more if dw is None else dw.add_(more)
                del more  # before the next chunk's logits are allocated
        ctx.save_for_backward(dx, dw, count)
        ctx.dtype = weight.dtype
        return total / count

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        dx, dw, count = ctx.saved_tensors
        scale = g / count
        if dx is not None:
            dx = dx * scale.to(dx.dtype)
        if dw is not None:
            dw = dw.mul_(scale).to(ctx.dtype)
        return dx, dw, None, None, None, None


def product_in_fp32(a, b):
    """Return a b in fp32; half-precision factors are not rounded in between on a GPU."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a, b).float()


def softmax_minus_onehot(logits, targets, gradient):
    """
    Return the cross-entropy summed over targets >= 0, in fp32.

    With `gradient` the logits (N, V) become softmax - onehot, and 0 where the target is -1.
    """
    if logits.is_cuda and 'cuda' in RUNS_ON:
        from nanomla.training.kernels import softmax_rows

        losses = softmax_rows(logits, targets.contiguous(), gradient)[0]
        return losses.sum()
    x = logits.float()
    counts = targets >= 0
    at = targets.clamp(min=0)[:, None]
    lse = x.logsumexp(-1, keepdim=True)
    loss = ((lse - x.gather(1, at))[:, 0] * counts).sum()
    if gradient:
        p = (x - lse).exp_()
        p.scatter_add_(1, at, torch.full_like(lse, -1.0))
        logits.copy_(p * counts[:, None])
    return loss


# -------------------------------------------------------------------------------------------------
# SwiGLU and the product after it: their own backward pass


@torch.library.custom_op('nanomla::swiglu_down_backward', mutates_args=())
def swiglu_down_backward(
    x: torch.Tensor, weight: torch.Tensor, g: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients of x and weight from that of SwigluDown's result."""
    from nanomla.training.kernels import swiglu_gradient

    g = g.flatten(0, -2)
    h = g @ weight
    dx = swiglu_gradient(x.flatten(0, -2).contiguous(), h)
    return dx.view(x.shape), g.T @ h  # h has become silu(gate) up


@swiglu_down_backward.register_fake
def _(x, weight, g):
    return torch.empty_like(x), torch.empty_like(weight)


class SwigluDown(torch.autograd.Function):
    """
    silu(gate) up weight^T of x = gate | up (..., 2 I), weight (C, I) in x's dtype.

    It stores x and nothing as wide beside it.
    """

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        gate, up = x.chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, weight)

    @staticmethod
    def backward(ctx, g):
        x, weight = ctx.saved_tensors
        return torch.ops.nanomla.swiglu_down_backward(x, weight, g)


class SwigluBlock(nn.Module):
    """A Block of model.py whose SwiGLU has SwigluDown's gradient. It shares the block's parts."""

    def __init__(self, block: Block):
        super().__init__()
        self.ln_1, self.attn = block.ln_1, block.attn
        self.ln_2, self.mlp = block.ln_2, block.mlp

    def forward(self, x, rope, context=None):
        x = x + self.attn(self.ln_1(x), rope, context)
        mlp, y = self.mlp, self.ln_2(x)
        if not torch.is_grad_enabled():
            return x + mlp(y)
        down = mlp.c_proj.weight.to(x.dtype)
        return x + mlp.dropout(SwigluDown.apply(mlp.c_fc(y), down))


def gains_by_swiglu_down(block: nn.Module) -> bool:
    """Return whether SwigluDown can stand in `block`, and pays: the weights of its MLP learn."""
    mlp = block.mlp if type(block) is Block else None
    if type(mlp) is not MLP or mlp.act != 'swiglu':
        return False
    down = mlp.c_proj
    if type(down) is not Linear or down.bias is not None:
        return False
    return down.weight.requires_grad and down.weight.device.type in RUNS_ON


# -------------------------------------------------------------------------------------------------
# what is stored and what is computed again


@lru_cache
def contexts_that_store(width: float) -> Callable:
    """
    Return contexts for selective checkpointing.

    They store attention's output and each product that is at most `width` wide and no cheap
    low-rank one. The same ones for the same width, so that what torch.compile made for one model
    serves the next.
    """
    products = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default}

    def policy(ctx, op, *args, **options):
        if 'scaled_dot_product' in str(op) or 'flex_attention' in str(op):
            return CheckpointPolicy.MUST_SAVE
        if op in products:
            inner, outer = args[-1].shape
            if outer <= width and 8 * inner > outer:
                return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE

    return partial(create_selective_checkpoint_contexts, policy)


class SelectiveBlock(nn.Module):
    """
    A block that computes all again in the backward pass but attention and products up to `width`.

    random: it drops something, and must drop the same when it computes again.
    torch.compile sees through it, and distinguishes blocks by their width.
    """

    def __init__(self, block: nn.Module, width: float, random: bool):
        super().__init__()
        self.block, self.width, self.random = block, width, random

    def forward(self, x, rope, context=None):
        if not torch.is_grad_enabled():
            return self.block(x, rope, context)
        return checkpoint(
            self.block,
            x,
            rope,
            context,
            use_reentrant=False,
            preserve_rng_state=self.random,
            context_fn=contexts_that_store(self.width),
        )


@dataclass
class ForwardSettings:
    """
    How the blocks run in training.

    recompute:     one of RECOMPUTE
    save_width:    'selective' stores products up to so many n_embd wide
    spared_layers: 'selective' lets so many of the last layers store every product
    compile:       by torch.compile with this `backend`
    documents:     batches have packed documents, which break the compiled graph
    dropout:       blocks drop something
    """

    recompute: str = 'none'
    save_width: float = 1.0
    spared_layers: int = 0
    compile: bool = False
    documents: bool = False
    dropout: bool = False
    backend: str = 'inductor'

    def __post_init__(self):
        check_choice('recompute', self.recompute, RECOMPUTE)


class TrainingForward:
    """
    The forward pass of a model in training: `hidden` as the model's own, recomputed and compiled.

    The model itself stays as it is, and decodes as it does. setting: what was set up, in words;
    not every choice can be had with documents and in 4 bits.
    """

    def __init__(self, model: GPT, settings: ForwardSettings):
        self.model, self.lm_head, self.settings = model, model.lm_head, settings
        self.recompute, self.save_width = settings.recompute, settings.save_width
        if settings.compile:
            self.choose_for_compiler()
        layers = list(model.transformer.h)
        first_spared = len(layers) - settings.spared_layers
        self.blocks = []
        for n, block in enumerate(layers):
            width = math.inf if n >= first_spared else self.save_width * model.config.n_embd
            self.blocks.append(self.prepared(block, width))
        self.embed = self.compiled(model.embed)
        self.setting = self.describe()

    def choose_for_compiler(self) -> None:
        if self.recompute == 'selective' and self.settings.documents:
            self.recompute = 'full'
        elif self.recompute == 'none' and not self.settings.documents:
            if lora.is_in_four_bits(self.model):
                # By itself the compiler would store dequantised weights.
                self.recompute, self.save_width = 'selective', math.inf

    def prepared(self, block: nn.Module, width: float) -> Callable:
        """Return what computes `block`: (x, rope, context) -> x."""
        if self.settings.compile and gains_by_swiglu_down(block):
            block = SwigluBlock(block)
        random = self.settings.dropout
        if self.recompute == 'selective':
            block = SelectiveBlock(block, width, random)
        forward = self.compiled(block.forward)
        if self.recompute == 'full':
            return partial(checkpoint, forward, use_reentrant=False, preserve_rng_state=random)
        return forward

    def compiled(self, function: Callable) -> Callable:
        if not self.settings.compile:
            return function
        return torch.compile(function, dynamic=False, backend=self.settings.backend)

    def describe(self) -> str:
        if self.recompute == 'none':
            return 'nothing recomputed'
        if self.recompute == 'full':
            return 'blocks recomputed'
        if self.save_width == math.inf:
            return 'elementwise work recomputed'
        text = f'recomputed but for attention and products up to {self.save_width:g} n_embd'
        if self.settings.spared_layers:
            text += f', {self.settings.spared_layers} layers spared'
        return text

    def hidden(self, idx: torch.Tensor, documents: Documents | None = None) -> torch.Tensor:
        """Return what GPT.hidden returns for idx (B, T): (B, T, C)."""
        positions = None if documents is None else documents.begin(idx.size(1))
        x, rope = self.embed(idx, positions)
        for block in self.blocks:
            x = block(x, rope, documents)
        return self.model.transformer.ln_f(x)


def loss_of(
    forward: GPT | TrainingForward, batch: Batch, count: torch.Tensor, chunk: int = 2048
) -> torch.Tensor:
    """
    Return the batch's summed cross-entropy divided by `count`, in nats.

    With the targets of a whole step as count, the losses of its micro-batches add up to the mean
    over its targets. chunk: tokens whose logits exist at a time.
    """
    x = forward.hidden(batch.idx, batch.documents).flatten(0, 1)
    weight, targets = forward.lm_head.weight, batch.targets.flatten()
    return HeadLoss.apply(x, weight, targets, count, chunk, torch.is_grad_enabled())


# -------------------------------------------------------------------------------------------------
# the optimizer and its step


def are_half_in_triton(params: Iterable[torch.Tensor]) -> bool:
    """Return whether all of `params` are contiguous in half precision, where Triton runs."""
    halves = (torch.bfloat16, torch.float16)
    return all(p.dtype in halves and p.is_contiguous() and p.device.type in RUNS_ON for p in params)


class HalfAdamW(torch.optim.Optimizer):
    """torch.optim.AdamW for weights in half precision, in one pass over the memory of all."""

    @torch.no_grad()
    def step(self):
        from nanomla.training.kernels import adamw

        for group in self.param_groups:
            alike = defaultdict(list)  # (dtype, step) -> (weight, gradient, two moments) of each
            for p in group['params']:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state['step'] = 0
                    state['exp_avg'] = torch.zeros_like(p)
                    state['exp_avg_sq'] = torch.zeros_like(p)
                state['step'] += 1
                moments = state['exp_avg'], state['exp_avg_sq']
                alike[p.dtype, state['step']].append((p, p.grad, *moments))
            how = group['lr'], group['betas']
            for (_, step), tensors in alike.items():
                adamw(*zip(*tensors), step, *how, decay=group['weight_decay'])


class Finetuner:
    """
    AdamW over the parameters that learn.

    loss: (batch, count) -> a batch's loss, as `loss_of`. The optimizer's states have the
    parameters' dtype, as everywhere in PyTorch: with bf16 weights all of full fine-tuning is bf16,
    small updates round to nothing, and only a comparison of speed should want that.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[Batch, torch.Tensor], torch.Tensor],
        learning_rate: float,
        weight_decay: float = 0.0,
        grad_clip: float = 0.0,
    ):
        self.loss, self.grad_clip = loss, grad_clip
        self.params = [p for p in model.parameters() if p.requires_grad]
        how = dict(lr=learning_rate, betas=(0.9, 0.999), weight_decay=weight_decay)
        if are_half_in_triton(self.params):
            self.optimizer = HalfAdamW(self.params, how)
        else:
            fused = self.params[0].is_cuda or None
            self.optimizer = torch.optim.AdamW(self.params, fused=fused, **how)

    def step(self, batches: Sequence[Batch]) -> torch.Tensor:
        """
        Update once on the micro-batches.

        Returns the mean loss over their targets, on the device, which nothing waits for.
        """
        targets = max(1, sum(batch.counted for batch in batches))
        device = batches[0].idx.device
        count = torch.tensor(float(targets)).to(device, non_blocking=True)
        total = 0
        for batch in batches:
            loss = self.loss(batch, count)
            loss.backward()
            total = total + loss.detach()
        if self.grad_clip:
            torch.nn.utils.clip_grad_norm_(self.params, self.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return total


@torch.no_grad()
def evaluate(model: nn.Module, loss: Callable, batches: Iterable[Batch]) -> float:
    """Return the mean loss in nats over all targets of the batches; `loss` as in Finetuner."""
    total, counted = 0.0, 0
    model.eval()
    for batch in batches:
        one = torch.ones((), device=batch.idx.device)
        total += loss(batch, one).item()
        counted += batch.counted
    model.train()
    return total / max(1, counted)


# -------------------------------------------------------------------------------------------------
# work


def flops_per_token(model: GPT, T: int, kind: str) -> float:
    """
    Return the FLOPs that one token of a sequence of T needs, without recomputation.

    2 a weight in the forward pass, 2 for the input's gradient, 2 more for the weight's own where it
    learns; attention over the past half only, and 5/2 of that in the backward pass. Adapters are
    left out.
    """
    weights = model.lm_head.weight.numel()
    for name, p in model.transformer.h.named_parameters():
        if p.ndim > 1 and 'lora_' not in name:
            weights += lora.size(p)
    attention = 0
    for block in model.transformer.h:
        attention += T * block.attn.n_head * (block.attn.qk_dim + block.attn.v_dim)
    per_weight = 6 if kind == 'full' else 4
    return per_weight * weights + 3.5 * attention
