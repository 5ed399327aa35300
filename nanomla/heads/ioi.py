"""
Heads that move a name, measured on indirect-object identification (Wang et al. 2022).

    When Mary and John went to the store, John gave a drink to  ->  Mary

Each template is used in both orders (ABB, BAB) with pairs of names. `moved` is what the head itself
writes in favour of the indirect object (IO) against the subject (S) at the last token: its output
through the last norm, frozen, and the unembedding, as logit(IO) - logit(S). `copying` is the share
of prompts whose name a head, reading the residual stream at the name, writes among the five
likeliest tokens (of the head's output alone). It is the last token that writes: a gate that it
computes is in both. `attention` is how much the last token attends to the name.

Legend: B prompts, T tokens, N layers, H heads, C channels, V vocabulary.
"""

from dataclasses import dataclass

import torch

from model import GPT, Norm, rope_tables
from nanomla.core.configurator import UserError
from nanomla.heads.ablation import edit_outputs
from nanomla.heads.patterns import hooks, watch_patterns

NAMES = (
    'Mary',
    'John',
    'Tom',
    'James',
    'Dan',
    'Martin',
    'Amy',
    'Sarah',
    'Paul',
    'Alice',
    'Anna',
    'Robert',
    'Mark',
    'Laura',
    'Peter',
    'Simon',
)
TEMPLATES = (
    'When {a} and {b} went to the store, {s} gave a drink to',
    'Then, {a} and {b} had a long talk. Afterwards {s} said goodbye to',
    'After {a} and {b} came to the river, {s} handed the rope to',
    'While {a} and {b} were working in the garden, {s} threw a ball to',
    'Yesterday {a} and {b} met at the school. In the end {s} sent a letter to',
    'Since {a} and {b} lived by the sea, {s} sold a boat to',
)
TOP = 5  # likeliest tokens among which a copied name must be
MEASURES = ('moved', 'attention', 'copying')


@dataclass
class Prompt:
    """ids of a text, the position of the indirect object in it, and the ids of IO and S."""

    ids: list[int]
    position: int
    io: int
    s: int


def single_token_names(codec) -> dict[str, int]:
    """Return the names that are one token after a blank, with their ids."""
    names = {}
    if codec is None:
        return names
    for name in NAMES:
        try:
            ids = codec.encode(f' {name}')
        except UserError:  # a small vocabulary lacks a character
            return {}
        if len(ids) == 1:
            names[name] = ids[0]
    return names


def make_prompts(codec, begin: int | None, pairs: int = 8, seed: int = 0) -> list[Prompt]:
    """
    Return prompts of every template, in both orders, with random pairs of names.

    begin: the id that begins a text, or None. UserError when fewer than four names are single
    tokens of the model.
    """
    ids_of = single_token_names(codec)
    names = list(ids_of)
    if len(names) < 4:
        raise UserError(
            '--copying asks about names, which must be single tokens: '
            "use a model with GPT-2's or another large vocabulary"
        )
    start = [] if begin is None else [begin]
    generator = torch.Generator().manual_seed(seed)
    prompts = []
    for template in TEMPLATES:
        for _ in range(pairs):
            first, second = torch.randperm(len(names), generator=generator)[:2].tolist()
            a, b = names[first], names[second]
            for subject, other in ((a, b), (b, a)):
                ids = start + codec.encode(template.format(a=a, b=b, s=subject))
                io = ids_of[other]
                if ids.count(io) == 1:  # else the text spells the name in another way, too
                    prompts.append(Prompt(ids, ids.index(io), io, ids_of[subject]))
    return prompts


@dataclass
class Recording:
    """
    What a model computed for prompts of one length.

    logits (B, V) and last (B, C) of the last token, logits after and last before the last norm; by
    layer: inputs (B, T, C) of the attention, outputs (B, H, D) of the last token before W^O and
    written (B, C) after it, and the last token's attention to the name (B, H)
    """

    logits: torch.Tensor
    last: torch.Tensor
    inputs: dict
    outputs: dict
    written: dict
    attention: dict


def record(model: GPT, ids: torch.Tensor, position: torch.Tensor) -> Recording:
    """Run the model on ids (B, T) and record what concerns the name at position (B,)."""
    inputs, outputs, written, attention, last = {}, {}, {}, {}, {}
    layers = {block.attn: layer for layer, block in enumerate(model.transformer.h)}
    b = torch.arange(len(ids), device=ids.device)

    def see_pattern(layer, pattern):
        attention[layer] = pattern[b, :, -1, position]

    def see_output(layer, y):
        outputs[layer] = y[:, -1]

    def see_attention(attention, given, out):
        layer = layers[attention]
        inputs[layer], written[layer] = given[0], out[:, -1]

    def see_stream(norm, given):
        last['x'] = given[0][:, -1]

    with (
        watch_patterns(model, see_pattern),
        edit_outputs(model, see_output),
        hooks(attention.register_forward_hook(see_attention) for attention in layers),
        hooks([model.transformer.ln_f.register_forward_pre_hook(see_stream)]),
    ):
        logits = model.lm_head(model.hidden(ids)[:, -1])
    return Recording(logits, last['x'], inputs, outputs, written, attention)


def outputs_of_the_name(model: GPT, layer: int, run: Recording, position: torch.Tensor):
    """Return run.outputs (B, H, D) of a layer as if the last token attended to the name alone."""
    b = torch.arange(len(position), device=position.device)

    def attend_to_name(_, pattern):
        pattern = torch.zeros_like(pattern)
        pattern[b, :, -1, position] = 1
        return pattern

    x = run.inputs[layer]
    rope = rope_tables(model.config, torch.arange(x.size(1), device=x.device))
    with watch_patterns(model, attend_to_name):
        return model.transformer.h[layer].attn.head_outputs(x, rope)[:, :, -1]


def before_norm(norm: Norm | None, directions: torch.Tensor) -> torch.Tensor:
    """Return the directions (..., C) with the gain and centring of a norm before them folded in."""
    if norm is None:
        return directions
    directions = directions * norm.weight
    if norm.rms:
        return directions
    return directions - directions.mean(-1, keepdim=True)


def frozen_scale(norm: Norm | None, x: torch.Tensor) -> torch.Tensor | float:
    """Return what a norm multiplies x (B, C) by, (B, 1)."""
    if norm is None:
        return 1.0
    if not norm.rms:
        x = x - x.mean(-1, keepdim=True)
    return x.square().mean(-1, keepdim=True).add(norm.eps).rsqrt()


def measure_group(model: GPT, group: list[Prompt]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """
    Measure prompts of one length: for each of MEASURES (B, N, H), and logit(IO) - logit(S) (B,).
    """
    device = next(model.parameters()).device
    ids = torch.tensor([prompt.ids for prompt in group], device=device)
    position = torch.tensor([prompt.position for prompt in group], device=device)
    io = torch.tensor([prompt.io for prompt in group], device=device)
    s = torch.tensor([prompt.s for prompt in group], device=device)
    b = torch.arange(len(group), device=device)
    run = record(model, ids, position)
    last_norm = model.transformer.ln_f
    w_u = before_norm(last_norm, model.lm_head.weight)  # (V, C)
    direction = (w_u[io] - w_u[s]) * frozen_scale(last_norm, run.last)  # (B, C)
    moved, attention, copies = [], [], []
    for layer, block in enumerate(model.transformer.h):
        w_o = block.attn.c_proj.weight.unflatten(1, (block.attn.n_head, -1))  # (C, H, D)
        norm = block.post_1
        read = before_norm(norm, direction) * frozen_scale(norm, run.written[layer])  # (B, C)
        moved.append(torch.einsum('bhd,chd,bc->bh', run.outputs[layer], w_o, read))
        attention.append(run.attention[layer])
        of_name = outputs_of_the_name(model, layer, run, position)
        logits = torch.einsum('bhd,chd->bhc', of_name, w_o) @ before_norm(norm, w_u).T  # (B, H, V)
        copies.append((logits.topk(TOP).indices == io[:, None, None]).any(-1).float())
    measures = dict(
        moved=torch.stack(moved, 1),
        attention=torch.stack(attention, 1),
        copying=torch.stack(copies, 1),
    )
    return measures, run.logits[b, io] - run.logits[b, s]


@torch.no_grad()
def measure(model: GPT, prompts: list[Prompt]) -> tuple[dict, list[dict]]:
    """
    Return the model's answers and every head's part in them.

    The answers have accuracy (IO above S), logit_difference and the number of prompts; a head has
    layer, head and MEASURES. Prompts of one length run together.
    """
    totals = dict.fromkeys(MEASURES, 0.0)
    right, difference = 0, 0.0
    for length in sorted({len(prompt.ids) for prompt in prompts}):
        group = [prompt for prompt in prompts if len(prompt.ids) == length]
        measures, differences = measure_group(model, group)
        for name in MEASURES:
            totals[name] = totals[name] + measures[name].sum(0)
        right += (differences > 0).sum().item()
        difference += differences.sum().item()
    n = len(prompts)
    means = {name: (totals[name] / n).tolist() for name in MEASURES}
    heads = []
    for layer, row in enumerate(means['moved']):
        for head in range(len(row)):
            measured = {name: round(means[name][layer][head], 5) for name in MEASURES}
            heads.append(dict(layer=layer, head=head) | measured)
    answers = dict(
        accuracy=round(right / n, 4), logit_difference=round(difference / n, 4), prompts=n
    )
    return answers, heads
