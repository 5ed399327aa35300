"""
Heads that move a name: the indirect-object task of Wang et al. (2022), and two measures of every head on it.

    When Mary and John went to the store, John gave a drink to  ->  Mary

Each template is said in both orders (ABB, BAB) with pairs of names. `moved` is what the head itself writes in favour of the
indirect object at the last token: its output through the last norm, frozen, and the unembedding, as logit(IO) - logit(S).
`copying` is the share of names that a head, given the residual stream at the name's place, writes among the five likeliest
tokens (of the head's output alone). `attention` is how much the last token looks at the indirect object.

Legend: B prompts, T tokens, H heads, C channels, V vocabulary.
"""

import contextlib

import torch

from model import rope_tables
from nanomla.core.configurator import UserError
from nanomla.heads import patterns
from nanomla.heads.ablation import outputs_of

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
TOP = 5


def prompts(codec, begin, pairs=8, seed=0):
    """
    [(ids, place of IO, id of IO, id of S)] of every template, order and pair of names. UserError when fewer than four names are
    single tokens of the model.
    """
    known = []
    with contextlib.suppress(UserError):  # characters that a small vocabulary lacks
        known = [
            (name, ids[0]) for name in NAMES if codec and len(ids := codec.encode(f' {name}')) == 1
        ]
    if len(known) < 4:
        raise UserError(
            "--copying asks about names, which must be single tokens: use a model with GPT-2's or another large vocabulary"
        )
    generator, found = torch.Generator().manual_seed(seed), []
    for template in TEMPLATES:
        for _ in range(pairs):
            (a, a_id), (b, b_id) = (
                known[i] for i in torch.randperm(len(known), generator=generator)[:2].tolist()
            )
            for subject in (a, b):
                io_id, s_id = (b_id, a_id) if subject == a else (a_id, b_id)
                ids = ([] if begin is None else [begin]) + codec.encode(
                    template.format(a=a, b=b, s=subject)
                )
                if (
                    ids.count(io_id) == 1
                ):  # a name is one token behind a blank; the texts begin with another word
                    found.append((ids, ids.index(io_id), io_id, s_id))
    return found


@torch.no_grad()
def measure(model, asked):
    """
    (answers, heads): answers has accuracy (IO above S) and logit_difference; heads is a list of layer, head, moved, attention,
    copying. asked: as of `prompts`; those of one length run together.
    """
    t, device = model.transformer, next(model.parameters()).device
    sums = {name: 0.0 for name in ('moved', 'attention', 'copying', 'right', 'difference')}
    for length in sorted({len(ids) for ids, *_ in asked}):
        group = [entry for entry in asked if len(entry[0]) == length]
        ids, place, io, s = (torch.tensor(column, device=device) for column in zip(*group))
        rope = rope_tables(model.config, torch.arange(length, device=device))
        b, inputs, outputs, looked, last = torch.arange(len(group), device=device), {}, {}, {}, {}

        hooks = [
            block.register_forward_pre_hook(
                lambda module, given, layer=layer: inputs.update({layer: given[0]})
            )
            for layer, block in enumerate(t.h)
        ]
        hooks.append(
            t.ln_f.register_forward_pre_hook(lambda module, given: last.update(x=given[0][:, -1]))
        )
        try:
            with (
                patterns.watched(
                    model, lambda layer, a: looked.update({layer: a[b, :, -1, place]})
                ),
                outputs_of(model, lambda layer, y: outputs.update({layer: y})),
            ):
                logits = model.lm_head(model.hidden(ids)[:, -1])
        finally:
            for hook in hooks:
                hook.remove()
        x = last['x']
        scale = (
            (x - (0 if t.ln_f.rms else x.mean(-1, keepdim=True)))
            .square()
            .mean(-1, keepdim=True)
            .add(t.ln_f.eps)
            .rsqrt()
        )  # frozen
        unembed = model.lm_head.weight * t.ln_f.weight
        unembed = unembed if t.ln_f.rms else unembed - unembed.mean(-1, keepdim=True)
        direction = (unembed[io] - unembed[s]) * scale  # (B, C)
        moved, copies = [], []
        for layer, block in enumerate(t.h):
            attention = block.attn
            w_o = attention.c_proj.weight.unflatten(1, (attention.n_head, -1))  # (C, H, D)
            moved.append(torch.einsum('bhd,chd,bc->bh', outputs[layer][:, -1], w_o, direction))
            v = attention.qkv(block.ln_1(inputs[layer]), rope)[2]
            v = v.repeat_interleave(attention.n_head // v.size(1), dim=1)[
                b, :, place
            ]  # (B, H, D): at the name
            written = torch.einsum('bhd,chd->bhc', v, w_o) @ unembed.T  # (B, H, V)
            copies.append((written.topk(TOP).indices == io[:, None, None]).any(-1).float())
        for name, value in dict(
            moved=torch.stack(moved, 1),
            attention=torch.stack([looked[l] for l in range(len(t.h))], 1),
            copying=torch.stack(copies, 1),
        ).items():
            sums[name] = sums[name] + value.sum(0)
        difference = logits[b, io] - logits[b, s]
        sums['right'] += (difference > 0).sum().item()
        sums['difference'] += difference.sum().item()
    n = len(asked)
    mean = {name: (sums[name] / n).tolist() for name in ('moved', 'attention', 'copying')}
    heads = [
        dict(layer=l, head=h, **{name: round(mean[name][l][h], 5) for name in mean})
        for l in range(len(mean['moved']))
        for h in range(len(mean['moved'][0]))
    ]
    return dict(
        accuracy=round(sums['right'] / n, 4),
        logit_difference=round(sums['difference'] / n, 4),
        prompts=n,
    ), heads
