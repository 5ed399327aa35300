"""
What a head is good for: the loss without it.

An Ablation runs a model once on repeated text and records what it computes; each measurement then
runs again from the first layer it touches, and its cost is the rise of the loss over the second
copy, in nats:

    zero     the heads' outputs are zero
    mean     they are their mean over the sequences at each position: only what depends on the
             tokens is lost
    pattern  zero, but all later heads keep the patterns of the intact run (Olsson et al. 2022):
             what is left of the cost is not about where others attend
    frozen   mean, and all later heads keep their patterns and all later norms the lengths that they
             divided by. What a head writes is in part a constant, on which later layers rely as on
             a bias, and part of each norm's length; both are left alone here. What remains is what
             the tokens pass on through this head by values and sums
    path     path patching (Wang et al. 2022): the heads are zero only for the queries, keys or
             values of chosen later heads, by the direct path through the residual stream, and
             intact for everyone else

Legend: B sequences, T tokens, C channels, H heads, D width of a head's output.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch

from model import GPT, Norm, rope_tables
from nanomla.heads.patterns import hooks, token_losses, watch_patterns

METHODS = ('zero', 'mean', 'pattern', 'frozen')
Heads = list[tuple[int, int]]  # (layer, head)


@contextmanager
def edit_outputs(model: GPT, edit: Callable) -> Iterator[None]:
    """
    Show edit(layer, y) what each layer's heads write, y (B, T, H, D) before W^O, in each forward
    pass. What it returns, unless that is None, takes the place of y.
    """

    def hook_of(layer, attention):
        def hook(c_proj, given):
            y = given[0].unflatten(-1, (attention.n_head, attention.v_dim))
            edited = edit(layer, y)
            return None if edited is None else (edited.flatten(2),)

        return hook

    with hooks(
        block.attn.c_proj.register_forward_pre_hook(hook_of(layer, block.attn))
        for layer, block in enumerate(model.transformer.h)
    ):
        yield


@contextmanager
def edit_norms(model: GPT, edit: Callable) -> Iterator[None]:
    """
    Show edit(norm, x) what each norm is about to divide, already centred where it centres. What it
    returns, unless that is None, takes the place of the quotient.
    """

    def hook(norm, given, out):
        x = given[0]
        if not norm.rms:
            x = x - x.mean(-1, keepdim=True)
        divided = edit(norm, x)
        if divided is None:
            return None
        bias = 0 if norm.bias is None else norm.bias
        return divided * norm.weight + bias

    norms = [module for module in model.modules() if isinstance(module, Norm)]
    with hooks(norm.register_forward_hook(hook) for norm in norms):
        yield


@contextmanager
def record_inputs(model: GPT) -> Iterator[dict]:
    """Give a dict that holds the input (B, T, C) of every layer after a forward pass."""
    inputs = {}

    def hook_of(layer):
        def hook(block, given):
            inputs[layer] = given[0]

        return hook

    with hooks(
        block.register_forward_pre_hook(hook_of(layer))
        for layer, block in enumerate(model.transformer.h)
    ):
        yield inputs


class Ablation:
    """
    A model on repeated text, and its loss without some of its heads.

    ids (B, T) are a `repeated` trial with |S| = L; the model runs eagerly, in eval mode. `loss` is
    that of the intact model in nats, over the tokens of the second copy that the first predicts.
    Memory grows with layers · B · heads · T².
    """

    @torch.no_grad()
    def __init__(self, model: GPT, ids: torch.Tensor, L: int):
        self.model = model
        self.L = L
        self.ids = ids.to(next(model.parameters()).device)
        self.rope = rope_tables(model.config, torch.arange(ids.size(1), device=self.ids.device))
        self.outputs = {}  # layer -> (B, T, H, D)
        self.patterns = {}  # layer -> (B, H, T, T)
        self.scales = {}  # norm -> what it multiplies by (B, T, 1)

        def record_output(layer, y):
            self.outputs[layer] = y

        def record_pattern(layer, pattern):
            self.patterns[layer] = pattern

        def record_scale(norm, x):
            self.scales[norm] = (x.square().mean(-1, keepdim=True) + norm.eps).rsqrt()

        with (
            record_inputs(model) as self.inputs,
            watch_patterns(model, record_pattern),
            edit_outputs(model, record_output),
            edit_norms(model, record_scale),
        ):
            x = model.hidden(self.ids)
        self.loss = self.loss_of(x)

    def loss_of(self, x) -> float:
        """Return the loss of the last norm's output x (B, T, C)."""
        x = x[:, self.L + 1 : 2 * self.L]
        targets = self.ids[:, self.L + 2 : 2 * self.L + 1]
        return token_losses(self.model, x, targets).mean().item()

    def loss_from(self, layer: int) -> float:
        """Return the loss when the model runs on from the intact input of `layer`."""
        x = self.inputs[layer]
        for block in self.model.transformer.h[layer:]:
            x = block(x, self.rope)
        return self.loss_of(self.model.transformer.ln_f(x))

    @torch.no_grad()
    def cost(self, heads: Heads, method: str = 'zero') -> float:
        """Return how much the loss rises without `heads`, by one of METHODS."""
        assert method in METHODS, method
        if not heads:
            return 0.0

        def remove(layer, y):
            removed = [head for of_layer, head in heads if of_layer == layer]
            if not removed:
                return None
            rest = 0
            if method in ('mean', 'frozen'):
                rest = y.mean(0, keepdim=True)[:, :, removed]
            y = y.clone()
            y[:, :, removed] = rest
            return y

        with ExitStack() as stack:
            stack.enter_context(edit_outputs(self.model, remove))
            if method in ('pattern', 'frozen'):
                stack.enter_context(self.keep_patterns())
            if method == 'frozen':
                stack.enter_context(self.keep_norms())
            return self.loss_from(min(layer for layer, _ in heads)) - self.loss

    def keep_patterns(self):
        """Let all heads attend as in the intact run, inside the `with`."""
        return watch_patterns(self.model, lambda layer, pattern: self.patterns[layer])

    def keep_norms(self):
        """Let all norms divide by the lengths of the intact run, inside the `with`."""
        return edit_norms(self.model, lambda norm, x: x * self.scales[norm])

    @torch.no_grad()
    def path(self, senders: Heads, receivers: Heads, reads: str) -> float:
        """
        Return how much the loss rises when the queries, keys or values (`reads`: 'Q', 'K' or 'V')
        of `receivers` alone read the residual stream without what `senders` wrote into it.

        Only senders in earlier layers count.
        """
        # What a head writes is linear in its values there, by one matrix for all tokens.
        assert all(block.attn.circuit_weights is not None for block in self.model.transformer.h)
        if not receivers:
            return 0.0
        changed = {}
        for layer in {layer for layer, _ in receivers}:
            changed[layer] = self.outputs_reading(layer, self.input_without(layer, senders), reads)

        def replace_outputs(layer, y):
            if layer not in changed:
                return None
            replaced = [head for of_layer, head in receivers if of_layer == layer]
            y = y.clone()
            y[:, :, replaced] = changed[layer][:, :, replaced].to(y.dtype)
            return y

        with edit_outputs(self.model, replace_outputs):
            return self.loss_from(min(changed)) - self.loss

    def input_without(self, layer: int, senders: Heads):
        """Return a layer's input (B, T, C) without what the senders in earlier layers wrote."""
        x = self.inputs[layer]
        for of_layer, head in senders:
            if of_layer < layer:
                attention = self.model.transformer.h[of_layer].attn
                w_o = attention.c_proj.weight.unflatten(1, (attention.n_head, -1))  # (C, H, D)
                x = x - self.outputs[of_layer][:, :, head] @ w_o[:, head].T.to(x.dtype)
        return x

    def outputs_reading(self, layer: int, x, reads: str):
        """
        Return what a layer's heads write (B, T, H, D) when their queries, keys or values read x
        (B, T, C), and the two others the intact input.
        """
        block = self.model.transformer.h[layer]
        qkv = dict(zip('QKV', block.attn.qkv(block.ln_1(self.inputs[layer]), self.rope)))
        other = dict(zip('QKV', block.attn.qkv(block.ln_1(x), self.rope)))
        qkv[reads] = other[reads]
        return block.attn.attend(*qkv.values()).transpose(1, 2)
