"""
What a head is good for: the loss without it.

A Surgery runs a model once on repeated text and keeps what it saw; each operation then runs again from the first
layer it touches, and its cost is how much the loss over the second copy rises, in nats:

    zero     the heads' outputs are zero
    mean     they are their mean over the sequences at each position: what is lost is only what depends on the tokens
    pattern  zero, but all later heads keep the patterns of the unharmed run (Olsson et al. 2022): the part of the cost
             that is left is not about where others look
    frozen   mean, and all later heads keep their patterns and all later norms the lengths that they divided by: what a head
             writes is in part a constant, on which later layers count as on a bias, and part of each norm's length; both are
             left alone here. What remains is what the tokens say through this head by values and sums
    path     path patching (Wang et al. 2022): the heads are zero only for the queries, keys or values of chosen
             later heads, by the direct path through the residual stream, and intact for everyone else

Legend: B sequences, T tokens, C channels, H heads, D width of a head's output.
"""

import contextlib

import torch

from model import Norm, rope_tables
from nanomla.heads import patterns

WAYS = ('zero', 'mean', 'pattern', 'frozen')


@contextlib.contextmanager
def outputs_of(model, edit):
    """Inside, edit(layer, y) sees what each layer's heads put out, y (B, T, H, D) before W^O, and may return another."""

    def hook(layer, attention, given):
        y = given[0].unflatten(-1, (attention.n_head, attention.v_dim))
        edited = edit(layer, y)
        return None if edited is None else (edited.flatten(2),)

    hooks = [
        block.attn.c_proj.register_forward_pre_hook(
            lambda module, given, layer=layer, a=block.attn: hook(layer, a, given)
        )
        for layer, block in enumerate(model.transformer.h)
    ]
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()


@contextlib.contextmanager
def norms_of(model, edit):
    """Inside, edit(norm, x) sees what each norm is about to divide, already centred where it centres, and may return the result of the division."""

    def hook(norm, given, out):
        x = given[0] if norm.rms else given[0] - given[0].mean(-1, keepdim=True)
        divided = edit(norm, x)
        return (
            None
            if divided is None
            else divided * norm.weight + (0 if norm.bias is None else norm.bias)
        )

    hooks = [
        module.register_forward_hook(hook) for module in model.modules() if isinstance(module, Norm)
    ]
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()


class Surgery:
    """
    ids (B, T) are a `repeated` trial with |S| = L, the model runs eagerly in eval mode. `loss` is that of the unharmed model in
    nats, over the tokens of the second copy that the first foretells. Memory grows with layers · B · heads · T².
    """

    @torch.no_grad()
    def __init__(self, model, ids, L):
        self.model, self.L, self.ids = model, L, ids.to(next(model.parameters()).device)
        self.rope = rope_tables(model.config, torch.arange(ids.size(1), device=self.ids.device))
        self.inputs, self.outputs, self.seen, self.scales = {}, {}, {}, {}
        hooks = [
            block.register_forward_pre_hook(
                lambda module, given, layer=layer: self.inputs.update({layer: given[0]})
            )
            for layer, block in enumerate(model.transformer.h)
        ]
        try:
            with (
                patterns.watched(model, lambda layer, a: self.seen.update({layer: a})),
                outputs_of(model, lambda layer, y: self.outputs.update({layer: y})),
                norms_of(
                    model,
                    lambda norm, x: self.scales.update(
                        {norm: (x.square().mean(-1, keepdim=True) + norm.eps).rsqrt()}
                    ),
                ),
            ):
                x = model.hidden(self.ids)
        finally:
            for hook in hooks:
                hook.remove()
        self.loss = self.loss_of(x)

    def loss_of(self, x):
        """Of the last norm's output x (B, T, C)."""
        x, targets = x[:, self.L + 1 : 2 * self.L], self.ids[:, self.L + 2 : 2 * self.L + 1]
        return patterns.token_losses(self.model, x, targets).mean().item()

    def loss_from(self, layer):
        """The loss when the model runs on from the unharmed input of `layer`."""
        x = self.inputs[layer]
        for block in self.model.transformer.h[layer:]:
            x = block(x, self.rope)
        return self.loss_of(self.model.transformer.ln_f(x))

    @torch.no_grad()
    def cost(self, heads, way='zero'):
        """How much the loss rises without `heads` [(layer, head), ...], by one of WAYS."""
        assert way in WAYS, way
        if not heads:
            return 0.0
        start = min(layer for layer, _ in heads)

        def edit(layer, y):
            mine = [head for l, head in heads if l == layer]
            if not mine:
                return None
            y = y.clone()
            y[:, :, mine] = y.mean(0, keepdim=True)[:, :, mine] if way in ('mean', 'frozen') else 0
            return y

        nothing = contextlib.nullcontext()
        kept = (
            patterns.watched(self.model, lambda layer, a: self.seen[layer])
            if way in ('pattern', 'frozen')
            else nothing
        )
        sizes = (
            norms_of(self.model, lambda norm, x: x * self.scales[norm])
            if way == 'frozen'
            else nothing
        )
        with outputs_of(self.model, edit), kept, sizes:
            return self.loss_from(start) - self.loss

    @torch.no_grad()
    def path(self, senders, receivers, reads):
        """
        How much the loss rises when `receivers` alone read the residual stream without what `senders` wrote into it: by `reads`
        'Q', 'K' or 'V' of theirs. Only senders in earlier layers count. Heads are [(layer, head), ...].
        """
        changed = {}
        for layer in {layer for layer, _ in receivers}:
            mine = [head for l, head in receivers if l == layer]
            without = self.inputs[layer]
            for l, head in senders:
                if l < layer:
                    sender = self.model.transformer.h[l].attn
                    columns = sender.c_proj.weight.unflatten(1, (sender.n_head, -1))[
                        :, head
                    ]  # (C, D)
                    without = without - self.outputs[l][:, :, head] @ columns.T.to(without.dtype)
            block = self.model.transformer.h[layer]
            qkv, other = (
                block.attn.qkv(block.ln_1(x), self.rope) for x in (self.inputs[layer], without)
            )
            mixed = [b if name == reads else a for name, a, b in zip('QKV', qkv, other)]
            changed[layer] = mine, block.attn.attend(*mixed).transpose(1, 2)

        def edit(layer, y):
            if layer in changed:
                mine, new = changed[layer]
                y = y.clone()
                y[:, :, mine] = new[:, :, mine].to(y.dtype)
                return y

        with outputs_of(self.model, edit):
            return self.loss_from(min(changed)) - self.loss if changed else 0.0
