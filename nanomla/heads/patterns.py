"""
What attention heads do: their patterns, and scores that tell induction from what only looks like it.

A head's pattern is what the eager kernel really used: it passes through `attn_dropout`, and a hook there sees
it (and may replace it). No attention is computed here a second time.

Trials are random tokens, n sequences of each kind, [BOS, S, S] with |S| = L and no token twice in S:

    repeated  BOS S S           the stripe on which a head that continues a repetition must lie
    control   BOS S S'          nothing to continue: what still lies on the stripe is position, not content
    gap       BOS S filler S    1 to G other tokens in between: a stripe counted off by position is missed

Scores are means over the L rows of the second copy, row i at q = L + 1 + i (+ the gap): induction is
A[q, i + 2], the token after the one that q repeats (Olsson et al. 2022, "prefix matching"); duplicate is
A[q, i + 1], that token itself; previous A[q, q - 1]; current A[q, q]; first A[q, 0]. A head that attends
evenly scores the null, mean 1 / (q + 1), not zero.

Legend: B sequences, T tokens, N layers, H heads of a layer, L length of S, G largest gap.
"""

from contextlib import contextmanager
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from nanomla.core.configurator import UserError

KINDS = ('induction', 'duplicate', 'previous', 'current', 'first')
TRIALS = ('repeated', 'control', 'gap')
THRESHOLD = 0.2  # by how much a score must beat null and control before a head is called something
RESAMPLES = 1000  # of the bootstrap behind the 95 % intervals


@contextmanager
def watched(model, see):
    """
    Inside, each forward pass calls see(layer, pattern) with the pattern (B, H, T, T) of every layer in turn; a
    tensor that it returns takes the pattern's place. The model must run eagerly: kernel='eager', eval mode.
    """
    attentions = [block.attn for block in model.transformer.h]
    assert all(a.kernel == 'eager' and not a.training for a in attentions), (
        "patterns pass by only with kernel='eager', in eval mode"
    )
    hooks = [
        a.attn_dropout.register_forward_hook(
            lambda module, given, pattern, layer=layer: see(layer, pattern)
        )
        for layer, a in enumerate(attentions)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def of(model, ids):
    """The patterns of a text: ids (T,) -> (N, H, T, T)."""
    seen = {}
    with watched(model, lambda layer, pattern: seen.update({layer: pattern[0].float()})):
        model.hidden(ids[None])
    return torch.stack([seen[layer] for layer in range(len(seen))])


@torch.no_grad()
def check(model, ids):
    """
    Whether the patterns are what they say, on ids (B, T): the largest |row sum - 1|, and the largest difference between
    an attention's output by torch's own kernel and the one rebuilt from pattern and values, as a share of the output's largest entry.
    """
    seen, worst = {}, [0.0, 0.0]

    def compare(attention, given, out):
        pattern, (x, rope, *_) = seen.pop(attention), given
        v = attention.qkv(x, rope)[2]
        v = v.repeat_interleave(pattern.size(1) // v.size(1), dim=1)
        rebuilt = attention.c_proj((pattern.to(v.dtype) @ v).transpose(1, 2).flatten(2))
        attention.kernel = 'sdpa'
        try:
            other = attention.forward(x, rope)
        finally:
            attention.kernel = 'eager'
        worst[0] = max(worst[0], (pattern.float().sum(-1) - 1).abs().max().item())
        worst[1] = max(
            worst[1], ((rebuilt - other).abs().max() / other.abs().max().clamp(min=1e-9)).item()
        )

    blocks = model.transformer.h
    hooks = [block.attn.register_forward_hook(compare) for block in blocks]
    try:
        with watched(model, lambda layer, pattern: seen.update({blocks[layer].attn: pattern})):
            model.hidden(ids)
    finally:
        for hook in hooks:
            hook.remove()
    return tuple(worst)


# ---------------------------------------------------------------------------------------------------
# trials


def lengths(block_size, usable, asked=50):
    """L and G that fit a block and a vocabulary: at most `asked`, BOS + 2 L + G in the block, L + G different tokens. UserError for too little."""
    L = min(asked, (block_size - 1) * 2 // 5, usable * 2 // 3)
    G = min(L, block_size - 1 - 2 * L, usable - L - 1)
    if L < 4 or G < 1:
        raise UserError(
            f'a block of {block_size} tokens with {usable} different ones is too small to repeat anything in it'
        )
    return L, G


def copies(first, S, other, filler, gap):
    """The three trials of what begins each text (n, 1), S (n, L), S' (n, L), fillers (n, G) and gaps (n,), 1 to G."""
    L, G = S.size(1), filler.size(1)
    place = torch.arange(2 * L + G).expand(len(S), -1)
    again = place - L - gap[:, None]  # 0 to L - 1 in the second copy; fillers before and behind it
    column = torch.where(again < 0, place, torch.where(again < L, again, L + place % G))
    gapped = torch.cat([S, filler], 1).gather(1, column)
    return SimpleNamespace(
        L=L,
        gap=gap,
        **{
            name: torch.cat([first, *parts], 1)
            for name, parts in dict(repeated=(S, S), control=(S, other), gapped=(gapped,)).items()
        },
    )


def trials(usable, begin, n=32, L=50, G=25, seed=0):
    """
    The three trials as ids, each (n, T), from the token ids `usable` (V,), which must not hold the id `begin`: one that begins a text,
    or None for a usual token. With them `gap` (n,): how much lies between the copies of the third.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(columns):  # different tokens in each row
        return usable[
            torch.stack(
                [torch.randperm(len(usable), generator=generator)[:columns] for _ in range(n)]
            )
        ]

    S, other = draw(L + G + 1), draw(L)
    first = S[:, -1:] if begin is None else torch.full((n, 1), begin)
    return copies(
        first, S[:, :L], other, S[:, L : L + G], 1 + torch.randint(G, (n,), generator=generator)
    )


def text_trials(tokens, begin, n=32, L=50, G=25, seed=0):
    """
    The three trials of held-out text instead of random tokens, as `trials`: S, S' and the fillers are windows of `tokens`, in which a token may
    come more than once. None where the text is too short.
    """
    if len(tokens) < 4 * (L + G) + 2:
        return None
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(tokens) - L - G - 1, (3, n, 1), generator=generator)
    S, other, filler = tokens[starts + torch.arange(L + G)]
    first = S[:, L : L + 1] if begin is None else torch.full((n, 1), begin)
    return copies(
        first,
        S[:, :L],
        other[:, :L],
        filler[:, :G],
        1 + torch.randint(G, (n,), generator=generator),
    )


def rows(L, gap):
    """Of every trial sequence: the rows of the second copy (B, L), and for each kind of head the keys (B, L) that it would look at."""
    i = torch.arange(L).expand(len(gap), -1)
    q = 1 + L + gap[:, None] + i
    return q, dict(
        induction=i + 2, duplicate=i + 1, previous=q - 1, current=q, first=torch.zeros_like(q)
    )


def nulls(L, gap):
    """What a head that attends evenly scores: mean 1 / (q + 1)."""
    return (1 / (rows(L, gap)[0] + 1).double()).mean().item()


# ---------------------------------------------------------------------------------------------------
# scores


def token_losses(model, x, targets, chunk=2**25):
    """Cross-entropy in nats of every token, (B, T): x (B, T, C) from model.hidden. The logits are made few at a time."""
    x, flat = x.flatten(0, 1), targets.flatten()
    n = max(1, chunk // model.config.vocab_size)
    parts = [
        F.cross_entropy(model.lm_head(a).float(), b, reduction='none')
        for a, b in zip(x.split(n), flat.split(n))
    ]
    return torch.cat(parts).view(targets.shape)


@torch.no_grad()
def run(model, ids, L, gap, batch=8):
    """
    The model over one trial, `batch` sequences at a time -> scores {kind: (N, H, B)}, the mean pattern on the rows of the second copy
    (2, N, H, 1 + L), by distance before the row and by distance behind the token that it repeats, and losses (B, T - 1). All on the CPU.
    """
    device = next(model.parameters()).device
    scores, offsets, losses = [], [], []
    for part, g in zip(ids.split(batch), gap.split(batch)):
        q, keys = rows(L, g)
        b, found, by_distance = torch.arange(len(part))[:, None], {}, {}
        far = torch.arange(L + 1)

        def see(layer, pattern):
            found[layer] = {
                kind: pattern[b, :, q, k].float().mean(1) for kind, k in keys.items()
            }  # (B, L, H) -> (B, H)
            by_distance[layer] = torch.stack(
                [
                    pattern[b[..., None], :, q[..., None], start[..., None] + step * far]
                    .float()
                    .mean((0, 1))
                    .T  # (B, L, far, H) -> (H, far)
                    for start, step in ((q, -1), (keys['duplicate'], 1))
                ]
            )

        with watched(model, see):
            x = model.hidden(part.to(device))
        losses.append(token_losses(model, x[:, :-1], part[:, 1:].to(device)).cpu())
        layers = range(len(found))
        scores.append(
            {kind: torch.stack([found[l][kind].T for l in layers]).cpu() for kind in KINDS}
        )  # (N, H, B)
        offsets.append(
            torch.stack([by_distance[l] for l in layers], 1).cpu() * len(part) / len(ids)
        )
    return (
        {kind: torch.cat([s[kind] for s in scores], -1) for kind in KINDS},
        sum(offsets),
        torch.cat(losses),
    )


def interval(values, seed=0):
    """The 95 % bootstrap interval of the mean of values (..., B) over its sequences: low and high, each (...)."""
    B = values.size(-1)
    draws = torch.randint(B, (RESAMPLES, B), generator=torch.Generator().manual_seed(seed))
    weights = F.one_hot(draws, B).double().mean(1)  # (RESAMPLES, B)
    means = values.double() @ weights.T
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.double), dim=-1)
    return low, high


def score(model, trial, threshold=THRESHOLD, batch=8):
    """
    Every head's scores over the `trials`. Returns heads (N x H dicts, layer by layer: label, and for each kind score, low, high,
    null, control, gap; positional: score and distance; shifted: the content-bound stripe 2 or more places behind the token
    that is repeated, where heads look that are fed by one that carries tokens further than a place) and the losses of the repeated and control trial, each (B, T - 1).

    A head is called induction (or duplicate) when the low end of its score beats the null, of score - control zero, and of the
    gap score its null, each by `threshold`; previous, current, first when it beats the null with and without a gap; positional
    when it attends at one fixed distance of 2 or more whether or not anything repeats. '' is none of these.
    """
    none = torch.zeros_like(trial.gap)
    tests = dict(
        repeated=(trial.repeated, none),
        control=(trial.control, none),
        gap=(trial.gapped, trial.gap),
    )
    found = {name: run(model, ids, trial.L, gap, batch) for name, (ids, gap) in tests.items()}
    null, null_gap = nulls(trial.L, none), nulls(trial.L, trial.gap)
    of_kind, passes = {}, {}
    for kind in KINDS:
        values, control, gap = (found[name][0][kind] for name in TRIALS)
        low, high = interval(values)
        of_kind[kind] = dict(
            score=values.mean(-1), low=low, high=high, control=control.mean(-1), gap=gap.mean(-1)
        )
        passes[kind] = (low - null > threshold) & (interval(gap)[0] - null_gap > threshold)
        if kind in ('induction', 'duplicate'):
            passes[kind] &= interval(values - control)[0] > threshold
    fixed, distance = found['control'][1][0, ..., 2:].max(-1)
    stripes = {name: found[name][1][1, ..., 2:] for name in TRIALS}  # that of induction is 1
    shifted, offset = torch.minimum(stripes['repeated'] - stripes['control'], stripes['gap']).max(
        -1, keepdim=True
    )
    stripes = {name: stripe.gather(-1, offset)[..., 0] for name, stripe in stripes.items()}
    passes['positional'] = fixed - null > threshold
    heads = []
    for l, h in torch.cartesian_prod(*map(torch.arange, fixed.shape)).tolist():
        entry = {
            kind: {key: round(value[l, h].item(), 6) for key, value in of_kind[kind].items()}
            | dict(null=round(null, 6), null_gap=round(null_gap, 6))
            for kind in KINDS
        }
        entry['positional'] = dict(
            score=round(fixed[l, h].item(), 6), distance=distance[l, h].item() + 2
        )
        entry['shifted'] = dict(
            score=round(stripes['repeated'][l, h].item(), 6),
            control=round(stripes['control'][l, h].item(), 6),
            gap=round(stripes['gap'][l, h].item(), 6),
            offset=offset[l, h, 0].item() + 2,
        )
        fits = {kind: entry[kind]['score'] for kind in passes if passes[kind][l, h]}
        matched = [kind for kind in ('induction', 'duplicate') if kind in fits]
        entry['label'] = max(matched or fits, key=fits.get, default='')
        heads.append(dict(layer=l, head=h) | entry)
    return heads, found['repeated'][2], found['control'][2]


def repeat_loss(losses, L):
    """Mean loss in nats over the second copy, of those tokens that the first one foretells: losses (B, 2 L) as of `run`."""
    return losses[:, L + 1 : 2 * L].mean().item()


@torch.no_grad()
def in_context(model, tokens, n=64, batch=8, seed=0):
    """
    The in-context-learning score (Olsson et al. 2022): loss around token 500 minus loss around token 50 of held-out text, in nats;
    negative is good. In shorter blocks their last and their tenth part. Returns (score, (early, late)), or None for too short a text.
    """
    T = min(model.config.block_size, 512)
    early, late, width = (50, 500, 5) if T == 512 else (T // 10, T - 1 - T // 20, T // 20)
    if len(tokens) <= T + n or T < 40:
        return None
    starts = torch.linspace(0, len(tokens) - T - 1, n).long()
    windows = tokens[starts[:, None] + torch.arange(T + 1)].to(next(model.parameters()).device)
    losses = torch.cat(
        [token_losses(model, model.hidden(w[:, :-1]), w[:, 1:]) for w in windows.split(batch)]
    ).mean(0)
    return (
        losses[late - width : late + width + 1].mean()
        - losses[early - width : early + width + 1].mean()
    ).item(), (early, late)
