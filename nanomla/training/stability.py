"""
How large the attention logits of a model in training are, and QK-Clip, which bounds them.

QK-Clip (Kimi K2 report, 2025, section 2.1) acts after the optimizer. With S_h the largest logit of
head h over the batch of the step, a head with S_h > tau has its logits multiplied by tau / S_h,
through its own rows of the query's and key's weights; the others stay as they are.

Legend: as in model.py, and L layers, N keys.
"""

from contextlib import contextmanager

import torch
import torch.distributed as dist

from model import GPT, Attention
from nanomla.core.configurator import UserError

CHUNK = 128  # queries whose logits, (B, H, CHUNK, N), are in memory at once


def largest_logits(q, k, mask=None):
    """
    Return the largest q · k of each head, (H,) in fp32, over the batch and what its queries may
    see: q (B, H, T, D), k (B, K, N, D), mask (B, 1, T, N), or None for all tokens before.
    """
    B, H, T, D = q.shape
    K = k.size(1)
    largest = []
    for start in range(0, T, CHUNK):
        rows = q[:, :, start : start + CHUNK]
        n = rows.size(2)
        if mask is None:
            keys = k[:, :, : start + n]
            hidden = torch.ones(n, start + n, dtype=torch.bool, device=q.device).triu(start + 1)
        else:
            keys = k
            hidden = ~mask[:, :, start : start + n]
        # heads that share a key meet it in one product
        logits = rows.reshape(B, K, H // K * n, D) @ keys.mT
        logits = logits.view(B, H, n, -1).masked_fill(hidden, -torch.inf)
        largest.append(logits.amax(dim=(0, 2, 3)).float())
    return torch.stack(largest).amax(0)


class LogitWatcher:
    """What `Attention.watch` calls in one layer; `largest` (H,) is what it has seen."""

    def __init__(self, attention: Attention):
        self.scale = attention.scale
        device = attention.c_proj.weight.device
        self.largest = torch.full((attention.n_head,), -torch.inf, device=device)

    def __call__(self, q, k, mask):
        if q.size(1) != len(self.largest):  # its logits are not those of the heads
            return
        with torch.no_grad():
            seen = largest_logits(q.detach() * self.scale, k.detach(), mask)
            self.largest.copy_(torch.maximum(self.largest, seen))


class LogitRecord:
    """
    The largest attention logit of every head of a model, over all that runs inside `recording`.

    group: the processes that train it, None for all; world: how many they are. UserError, in the
    name of `setting`, for an attention that cannot tell its logits.
    """

    def __init__(self, model: GPT, setting: str, world: int = 1, group=None):
        self.model, self.world, self.group = model, world, group
        self.attentions = [block.attn for block in model.transformer.h]
        self.watchers = [LogitWatcher(attention) for attention in self.attentions]
        # tried out on as many tokens as the kernel was: not all take a single one
        few = torch.zeros(1, min(128, model.config.block_size), dtype=torch.int64)
        if not self.measured(few).isfinite().all():
            name = type(self.attentions[0]).__name__
            raise UserError(
                f'{setting} needs the logits of {model.config.label}, but {name} does not compute '
                f'them by Attention.attend, a head each: leave {setting} out'
            )

    @contextmanager
    def recording(self):
        """Inside the `with`, every pass is recorded; what was recorded before is forgotten."""
        for attention, watcher in zip(self.attentions, self.watchers):
            watcher.largest.fill_(-torch.inf)
            attention.watch = watcher
        try:
            yield
        finally:
            for attention in self.attentions:
                attention.watch = None

    def largest(self) -> torch.Tensor:
        """Return the largest logits (L, H) in fp32, over all processes; not waited for."""
        largest = torch.stack([watcher.largest for watcher in self.watchers])
        if self.world > 1:
            dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self.group)
        return largest

    @torch.no_grad()
    def measured(self, idx) -> torch.Tensor:
        """Return the largest logits (L, H) on the tokens idx (B, T), by a pass of its own."""
        training = self.model.training
        self.model.eval()
        # it is rare, and not worth compiling every block once more
        with self.recording(), torch.compiler.set_stance('force_eager'):
            self.model.hidden(idx.to(self.watchers[0].largest.device))
        self.model.train(training)
        return self.largest()


def check_qk_clip(model: GPT, setting: str) -> None:
    """Raise a UserError, in the name of `setting`, where QK-Clip does not go with a model."""
    attention = model.transformer.h[0].attn
    if attention.qk_norm:
        raise UserError(
            f'{setting} does not go with qk_norm=True, which undoes it: leave one of them out'
        )
    if attention.scale_logits is None:
        raise UserError(
            f'{setting} needs the weights that are behind the logits of one head, but '
            f'{type(attention).__name__} of {model.config.label} has no scale_logits: '
            f'leave {setting} out'
        )


def clip_logits(model: GPT, largest: torch.Tensor, tau: float) -> None:
    """Apply QK-Clip to the weights, in place: largest (L, H) are the logits of the step."""
    for block, logits in zip(model.transformer.h, largest):
        over = (logits > tau) & logits.isfinite()
        block.attn.scale_logits(torch.where(over, tau / logits, 1.0))
