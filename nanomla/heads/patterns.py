"""
What attention heads do: their patterns, and scores that tell induction from what looks like it.

A head's pattern is what the eager kernel really used: it passes through `attn_dropout`, and a hook
there reads it (and may replace it). No attention is computed here a second time.

Trials are random tokens, n sequences of each kind, with |S| = L and no token twice in S:

    repeated  BOS S S           the stripe on which a head that continues a repetition must lie
    control   BOS S S'          nothing to continue: what still lies on the stripe is position
    gap       BOS S filler S    1 to G other tokens in between: a fixed distance misses the stripe

Scores are means over the L rows of the second copy, row i at q = L + 1 + i (+ the gap): induction
is A[q, i + 2], the token after the one that q repeats (Olsson et al. 2022, "prefix matching");
duplicate is A[q, i + 1], that token itself; previous A[q, q - 1]; current A[q, q]; first A[q, 0]. A
head that attends evenly scores the null, mean 1 / (q + 1), not zero.

Legend: B sequences, T tokens, N layers, H heads of a layer, L length of S, G largest gap.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from model import GPT, Attention
from nanomla.core.configurator import UserError

# Scores of attention to one key, which `second_copy` names for each.
KINDS = ('induction', 'duplicate', 'previous', 'current', 'first')
# Of these, what a head may be called, which decides over ablation in groups and colours.
LABELS = ('induction', 'duplicate', 'previous', 'current', 'first')
TRIALS = ('repeated', 'control', 'gap')
NEEDS_REPETITION = ('induction', 'duplicate')
THRESHOLD = 0.2  # by how much a score must beat null and control before a head gets a label
RESAMPLES = 1000  # of the bootstrap behind the 95 % intervals
DIGITS = 6  # of the scores in a report


# -------------------------------------------------------------------------------------------------
# patterns


@contextmanager
def hooks(handles: Iterable) -> Iterator[None]:
    """Remove hooks at the end of the `with`."""
    handles = list(handles)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def watch_patterns(model: GPT, see: Callable) -> Iterator[None]:
    """
    Call see(layer, pattern) with the pattern (B, H, T, T) of every layer in each forward pass.

    A tensor that `see` returns takes the pattern's place. The model must run eagerly:
    kernel='eager', in eval mode.
    """
    attentions = [block.attn for block in model.transformer.h]
    assert all(a.kernel == 'eager' and not a.training for a in attentions), (
        "patterns can be seen only with kernel='eager', in eval mode"
    )

    def hook_of(layer: int) -> Callable:
        return lambda module, given, pattern: see(layer, pattern)

    with hooks(
        attention.attn_dropout.register_forward_hook(hook_of(layer))
        for layer, attention in enumerate(attentions)
    ):
        yield


@torch.no_grad()
def patterns_of(model: GPT, ids: torch.Tensor) -> torch.Tensor:
    """Return the pattern of every head for a text: ids (T,) -> (N, H, T, T)."""
    seen = {}

    def see(layer, pattern):
        seen[layer] = pattern[0].float()

    with watch_patterns(model, see):
        model.hidden(ids[None])
    return torch.stack([seen[layer] for layer in range(len(seen))])


@torch.no_grad()
def check_patterns(model: GPT, ids: torch.Tensor) -> tuple[float, float]:
    """
    Measure on ids (B, T) whether the patterns are what the model computes with.

    Returns the largest |row sum - 1|, and the largest difference between an attention's output by
    torch's own kernel and the one rebuilt from pattern and values, as a share of the output's
    largest entry. An attention without circuit weights may do more than sum values (a gate, say):
    its own eager output then stands for the rebuilt one. UserError where no pattern can be seen.
    """
    seen = {}
    sums, differences = [0.0], [0.0]

    def see(layer, pattern):
        seen[model.transformer.h[layer].attn] = pattern

    def compare(attention, given, out):
        if attention not in seen:
            name = type(attention).__name__
            raise UserError(f'{name} shows no pattern: its eager kernel goes past attn_dropout')
        x, rope = given[:2]
        pattern = seen.pop(attention)
        rebuilt = out
        if attention.circuit_weights is not None:
            rebuilt = rebuilt_output(attention, pattern, x, rope)
        attention.kernel = 'sdpa'
        try:
            other = attention.forward(x, rope)
        finally:
            attention.kernel = 'eager'
        difference = (rebuilt - other).abs().max() / other.abs().max().clamp(min=1e-9)
        differences.append(difference.item())
        sums.append((pattern.float().sum(-1) - 1).abs().max().item())

    compared = (block.attn.register_forward_hook(compare) for block in model.transformer.h)
    with hooks(compared), watch_patterns(model, see):
        model.hidden(ids)
    return max(sums), max(differences)


def rebuilt_output(attention: Attention, pattern, x, rope):
    """Return what an attention writes (B, T, C), out of its pattern and its values of x."""
    v = attention.qkv(x, rope)[2]
    v = v.repeat_interleave(pattern.size(1) // v.size(1), dim=1)
    return attention.c_proj((pattern.to(v.dtype) @ v).transpose(1, 2).flatten(2))


# -------------------------------------------------------------------------------------------------
# trials


@dataclass
class Trials:
    """
    The three trials as ids, and the length L of S.

    repeated and control (n, 1 + 2 L); gapped (n, 1 + 2 L + G), with gap (n,) tokens between copies
    """

    L: int
    gap: torch.Tensor
    repeated: torch.Tensor
    control: torch.Tensor
    gapped: torch.Tensor


def trial_lengths(block_size: int, usable: int, longest: int = 50) -> tuple[int, int]:
    """
    Return L and G that fit a block and a vocabulary of `usable` tokens, with L <= `longest`.

    BOS + 2 L + G tokens fit the block, and L + G are different ones. UserError for too little.
    """
    L = min(longest, (block_size - 1) * 2 // 5, usable * 2 // 3)
    G = min(L, block_size - 1 - 2 * L, usable - L - 1)
    if L < 4 or G < 1:
        raise UserError(
            f'a block of {block_size} tokens with {usable} different ones is too small to repeat '
            'anything in it'
        )
    return L, G


def build_trials(first, S, other, filler, gap) -> Trials:
    """
    Put the three trials together.

    first (n, 1): what begins each sequence; S and other (n, L); filler (n, G); gap (n,), 1 to G
    """
    L, G = S.size(1), filler.size(1)
    position = torch.arange(2 * L + G).expand(len(S), -1)
    # Index into the second copy: 0 to L - 1 inside it, with fillers before and after it.
    in_second = position - L - gap[:, None]
    outside = torch.where(in_second < L, in_second, L + position % G)
    column = torch.where(in_second < 0, position, outside)
    gapped = torch.cat([S, filler], 1).gather(1, column)
    return Trials(
        L=L,
        gap=gap,
        repeated=torch.cat([first, S, S], 1),
        control=torch.cat([first, S, other], 1),
        gapped=torch.cat([first, gapped], 1),
    )


def random_trials(
    usable: torch.Tensor, begin: int | None, n: int = 32, L: int = 50, G: int = 25, seed: int = 0
) -> Trials:
    """
    Make trials of random tokens out of the ids `usable` (V,).

    begin: the id that begins a text, which must not be in `usable`; None for a usual token
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(columns):  # different tokens in each row
        rows = [torch.randperm(len(usable), generator=generator)[:columns] for _ in range(n)]
        return usable[torch.stack(rows)]

    S = draw(L + G + 1)
    other = draw(L)
    gap = 1 + torch.randint(G, (n,), generator=generator)
    first = S[:, -1:] if begin is None else torch.full((n, 1), begin)
    return build_trials(first, S[:, :L], other, S[:, L : L + G], gap)


def text_trials(
    tokens: torch.Tensor, begin: int | None, n: int = 32, L: int = 50, G: int = 25, seed: int = 0
) -> Trials | None:
    """
    Make trials of held-out text instead of random tokens.

    S, S' and the fillers are windows of `tokens`, in which a token may come more than once. None
    where the text is too short.
    """
    if len(tokens) < 4 * (L + G) + 2:
        return None
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(tokens) - L - G - 1, (3, n, 1), generator=generator)
    S, other, filler = tokens[starts + torch.arange(L + G)]
    gap = 1 + torch.randint(G, (n,), generator=generator)
    first = S[:, L : L + 1] if begin is None else torch.full((n, 1), begin)
    return build_trials(first, S[:, :L], other[:, :L], filler[:, :G], gap)


def second_copy(L: int, gap: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """
    Return where the second copy of each sequence stands, as rows (B, L), and for each kind of head
    the keys (B, L) that it would attend to from there.
    """
    i = torch.arange(L).expand(len(gap), -1)
    q = 1 + L + gap[:, None] + i
    keys = dict(
        induction=i + 2, duplicate=i + 1, previous=q - 1, current=q, first=torch.zeros_like(q)
    )
    return q, keys


def null_score(L: int, gap: torch.Tensor) -> float:
    """Return what a head that attends evenly scores: mean 1 / (q + 1)."""
    q, _ = second_copy(L, gap)
    return (1 / (q + 1).double()).mean().item()


# -------------------------------------------------------------------------------------------------
# running the trials


@dataclass
class TrialResult:
    """
    A model's behaviour in one trial, on the CPU.

    scores: kind -> (N, H, B)
    offsets (2, N, H, 1 + L): the mean pattern on the rows of the second copy, by distance before
        the row, and by distance after the token that the row repeats
    losses (B, T - 1): in nats
    """

    scores: dict[str, torch.Tensor]
    offsets: torch.Tensor
    losses: torch.Tensor


def token_losses(model: GPT, x, targets, chunk: int = 2**25) -> torch.Tensor:
    """
    Return the cross-entropy of every token in nats, (B, T), of x (B, T, C) from model.hidden.

    At most about `chunk` logits are made at a time.
    """
    x, flat = x.flatten(0, 1), targets.flatten()
    n = max(1, chunk // model.config.vocab_size)
    losses = []
    for part, wanted in zip(x.split(n), flat.split(n)):
        logits = model.lm_head(part).float()
        losses.append(F.cross_entropy(logits, wanted, reduction='none'))
    return torch.cat(losses).view(targets.shape)


def weights_by_distance(pattern, q, start, step: int) -> torch.Tensor:
    """
    Return the mean attention (H, 1 + L) of rows q (B, L) of a pattern (B, H, T, T) to the keys
    start (B, L), start + step, start + 2 step and so on.
    """
    b = torch.arange(len(q))[:, None, None]
    keys = start[..., None] + step * torch.arange(q.size(1) + 1)
    weights = pattern[b, :, q[..., None], keys]  # (B, L, 1 + L, H)
    return weights.float().mean((0, 1)).T


@torch.no_grad()
def run_trial(model: GPT, ids, L: int, gap, batch: int = 8) -> TrialResult:
    """Run the model over one trial, `batch` sequences of ids (n, T) at a time."""
    device = next(model.parameters()).device
    results = []
    for part, part_gap in zip(ids.split(batch), gap.split(batch)):
        result = run_batch(model, part.to(device), L, part_gap)
        result.offsets = result.offsets * len(part) / len(ids)
        results.append(result)
    return TrialResult(
        scores={kind: torch.cat([r.scores[kind] for r in results], -1) for kind in KINDS},
        offsets=sum(r.offsets for r in results),
        losses=torch.cat([r.losses for r in results]),
    )


def run_batch(model: GPT, ids, L: int, gap) -> TrialResult:
    """Run the model over some sequences (B, T) of a trial at once."""
    q, keys = second_copy(L, gap)
    b = torch.arange(len(ids))[:, None]
    scores = {kind: [] for kind in KINDS}
    offsets = []

    def see(layer, pattern):
        for kind, k in keys.items():
            by_head = pattern[b, :, q, k].float().mean(1)  # (B, L, H) -> (B, H)
            scores[kind].append(by_head.T)
        before = weights_by_distance(pattern, q, q, step=-1)
        after = weights_by_distance(pattern, q, keys['duplicate'], step=1)
        offsets.append(torch.stack([before, after]))

    with watch_patterns(model, see):
        x = model.hidden(ids)
    return TrialResult(
        scores={kind: torch.stack(layers).cpu() for kind, layers in scores.items()},
        offsets=torch.stack(offsets, 1).cpu(),
        losses=token_losses(model, x[:, :-1], ids[:, 1:]).cpu(),
    )


def bootstrap_interval(values, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Return low and high, each (...), of the 95 % interval of the mean of values (..., B) over its
    sequences.
    """
    B = values.size(-1)
    draws = torch.randint(B, (RESAMPLES, B), generator=torch.Generator().manual_seed(seed))
    weights = F.one_hot(draws, B).double().mean(1)  # (RESAMPLES, B)
    means = values.double() @ weights.T
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.double), dim=-1)
    return low, high


# -------------------------------------------------------------------------------------------------
# scores and labels


def score_heads(
    model: GPT, trial: Trials, threshold: float = THRESHOLD, batch: int = 8
) -> tuple[list[dict], torch.Tensor, torch.Tensor]:
    """
    Score every head on the three trials.

    Returns N * H dicts, layer by layer, and the losses of the repeated and of the control trial,
    each (B, T - 1). A dict has the head's label, and

        induction, duplicate, ...  score, low, high, null, control, gap, null_gap of each kind
        positional                 score and distance, of the best distance of 2 or more
        shifted                    score, control, gap and offset of the best stripe 2 or more
                                   tokens after the one that is repeated: heads lie there that read
                                   from a head which carries tokens further than one position

    A head is labelled induction (or duplicate) when the low end of its score beats the null, that
    of score - control beats zero, and that of the gap score its null, each by `threshold`;
    previous, current and first when it beats the null with and without a gap; positional when it
    attends at one fixed distance of 2 or more whether or not anything repeats. '' is none of these.
    """
    no_gap = torch.zeros_like(trial.gap)
    found = dict(
        repeated=run_trial(model, trial.repeated, trial.L, no_gap, batch),
        control=run_trial(model, trial.control, trial.L, no_gap, batch),
        gap=run_trial(model, trial.gapped, trial.L, trial.gap, batch),
    )
    nulls = null_score(trial.L, no_gap), null_score(trial.L, trial.gap)
    grids = {kind: scores_of_kind(found, kind) for kind in KINDS}
    passes = {kind: passes_tests(found, kind, nulls, threshold) for kind in LABELS}
    grids['positional'] = positional_scores(found['control'])
    grids['shifted'] = shifted_scores(found)
    passes['positional'] = grids['positional']['score'] - nulls[0] > threshold

    heads = []
    layers, heads_of_layer = passes['positional'].shape
    for layer in range(layers):
        for head in range(heads_of_layer):
            entry = dict(layer=layer, head=head)
            for kind, grid in grids.items():
                entry[kind] = {key: plain_number(grid[key][layer, head]) for key in grid}
                if kind in KINDS:
                    entry[kind] |= dict(null=round(nulls[0], DIGITS))
                    entry[kind] |= dict(null_gap=round(nulls[1], DIGITS))
            passed = [kind for kind in passes if passes[kind][layer, head]]
            entry['label'] = best_label(entry, passed)
            heads.append(entry)
    return heads, found['repeated'].losses, found['control'].losses


def plain_number(value: torch.Tensor) -> int | float:
    """Return a number of a tensor for a report."""
    number = value.item()
    return number if isinstance(number, int) else round(number, DIGITS)


def scores_of_kind(found: dict[str, TrialResult], kind: str) -> dict[str, torch.Tensor]:
    """Return the scores of one kind over all heads, name -> (N, H)."""
    values, control, gap = (found[name].scores[kind] for name in TRIALS)
    low, high = bootstrap_interval(values)
    return dict(
        score=values.mean(-1), low=low, high=high, control=control.mean(-1), gap=gap.mean(-1)
    )


def passes_tests(
    found: dict[str, TrialResult], kind: str, nulls: tuple[float, float], threshold: float
) -> torch.Tensor:
    """Return for every head (N, H) whether it beats the null (and the control) of a kind."""
    values, control, gap = (found[name].scores[kind] for name in TRIALS)
    null, null_gap = nulls
    passed = bootstrap_interval(values)[0] - null > threshold
    passed &= bootstrap_interval(gap)[0] - null_gap > threshold
    if kind in NEEDS_REPETITION:
        passed &= bootstrap_interval(values - control)[0] > threshold
    return passed


def positional_scores(control: TrialResult) -> dict[str, torch.Tensor]:
    """Return each head's largest attention at a fixed distance of 2 or more, and the distance."""
    score, distance = control.offsets[0, ..., 2:].max(-1)
    return dict(score=score, distance=distance + 2)


def shifted_scores(found: dict[str, TrialResult]) -> dict[str, torch.Tensor]:
    """Return the stripe of each head 2 or more tokens after the repeated one; induction's is 1."""
    stripes = {name: found[name].offsets[1, ..., 2:] for name in TRIALS}
    evidence = torch.minimum(stripes['repeated'] - stripes['control'], stripes['gap'])
    offset = evidence.max(-1, keepdim=True).indices
    best = {name: stripe.gather(-1, offset)[..., 0] for name, stripe in stripes.items()}
    return dict(
        score=best['repeated'],
        control=best['control'],
        gap=best['gap'],
        offset=offset[..., 0] + 2,
    )


def best_label(entry: dict, passed: list[str]) -> str:
    """Return the kind with the largest score of those that passed; those by content go first."""
    by_content = [kind for kind in passed if kind in NEEDS_REPETITION]
    return max(by_content or passed, key=lambda kind: entry[kind]['score'], default='')


def heads_with_label(heads: list[dict], label: str) -> list[tuple[int, int]]:
    """Return (layer, head) of the heads with a label."""
    return [(entry['layer'], entry['head']) for entry in heads if entry['label'] == label]


# -------------------------------------------------------------------------------------------------
# losses


def repeat_loss(losses: torch.Tensor, L: int) -> float:
    """
    Return the mean loss in nats over the tokens of the second copy that the first one predicts:
    losses (B, 2 L) of a trial without a gap.
    """
    return losses[:, L + 1 : 2 * L].mean().item()


@torch.no_grad()
def in_context_score(
    model: GPT, tokens: torch.Tensor, n: int = 64, batch: int = 8
) -> tuple[float, tuple[int, int]] | None:
    """
    Return the in-context-learning score (Olsson et al. 2022): the loss around token 500 minus the
    loss around token 50 of held-out text, in nats; negative is good. In shorter blocks their last
    and their tenth part. With it the two positions; None for too short a text.
    """
    T = min(model.config.block_size, 512)
    if len(tokens) <= T + n or T < 40:
        return None
    early, late, width = T // 10, T - 1 - T // 20, T // 20
    if T == 512:
        early, late, width = 50, 500, 5
    starts = torch.linspace(0, len(tokens) - T - 1, n).long()
    windows = tokens[starts[:, None] + torch.arange(T + 1)].to(next(model.parameters()).device)
    losses = []
    for part in windows.split(batch):
        losses.append(token_losses(model, model.hidden(part[:, :-1]), part[:, 1:]))
    by_position = torch.cat(losses).mean(0)
    late_loss = by_position[late - width : late + width + 1].mean()
    early_loss = by_position[early - width : early + width + 1].mean()
    return (late_loss - early_loss).item(), (early, late)
