"""
The report on the heads of some models, as one dict of plain values: what find_induction_heads.py
prints, heads.html shows and heads.json and heads.csv hold.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from model import GPT
from nanomla.core.configurator import UserError
from nanomla.core.files import csv_table, write_file
from nanomla.heads import circuits
from nanomla.heads.ablation import METHODS, Ablation
from nanomla.heads.page import build
from nanomla.heads.patterns import (
    THRESHOLD,
    Trials,
    check_patterns,
    heads_with_label,
    in_context_score,
    patterns_of,
    random_trials,
    repeat_loss,
    score_heads,
    text_trials,
    trial_lengths,
)
from nanomla.heads.subject import Subject

LARGEST_ERROR = 1e-3  # of patterns that rebuild their attention's output
ABLATED_LABELS = ('induction', 'duplicate', 'previous', 'positional')  # one by one in large models
GROUPS = ('induction', 'previous', 'positional')  # labels whose heads are ablated together
SMALL = 64  # heads of a model of which all are ablated one by one
ABLATION_TEXTS = 16  # sequences of a trial in each ablation
MOST_SENDERS = 12  # previous-token heads whose paths are patched one by one
MOST_SPLITS = 12  # heads whose logits are split into content and RoPE
DRAWN_PAIRS = 300  # strongest pairs in the page's composition graph
DIGITS = 5
Message = Callable[[str], None]  # prints a line of progress


def no_message(text: str) -> None:
    pass


@dataclass
class TrialSettings:
    """
    length: the longest |S|; texts: sequences of a trial; seed: of the random texts; threshold: by
    how much a score must beat null, control and gap before a head gets a label
    """

    length: int = 50
    texts: int = 32
    seed: int = 0
    threshold: float = THRESHOLD


@dataclass
class ReportSettings(TrialSettings):
    """
    ablations: 'auto' (all heads of a small model, the labelled ones of a large one), 'all', 'none'
    prompt: the text on the page; '' for the first of the repeated random texts
    shown: the most tokens of it
    """

    ablations: str = 'auto'
    prompt: str = ''
    shown: int = 128


# -------------------------------------------------------------------------------------------------
# trials of a subject


def trials_for(subject: Subject, settings: TrialSettings) -> Trials:
    """Return trials of random tokens that fit a subject."""
    vocabulary = subject.vocabulary
    usable = vocabulary.usable
    L, G = trial_lengths(subject.model.config.block_size, len(usable), settings.length)
    return random_trials(usable, vocabulary.begin, settings.texts, L, G, settings.seed)


def held_out_trials_for(subject: Subject, settings: TrialSettings) -> Trials | None:
    """Return trials of held-out text; None where there is none, or too little."""
    vocabulary = subject.vocabulary
    text = vocabulary.held_out
    if text is None:
        return None
    usable = len(vocabulary.usable)
    L, G = trial_lengths(subject.model.config.block_size, usable, settings.length)
    return text_trials(text, vocabulary.begin, settings.texts, L, G, settings.seed)


def texts_for_latents(subject: Subject, texts: int, seed: int) -> torch.Tensor:
    """Return held-out text (texts, T) to read latents from, or random texts where none is here."""
    T = min(subject.model.config.block_size, 256)
    text = subject.vocabulary.held_out
    if text is None or len(text) <= T:
        return trials_for(subject, TrialSettings(length=T, texts=texts, seed=seed)).repeated
    starts = torch.linspace(0, len(text) - T, texts).long()
    return text[starts[:, None] + torch.arange(T)]


def in_context_score_of(subject: Subject) -> tuple[float | None, list[int] | None]:
    """Return the in-context score and its two positions; None where no text is here."""
    if subject.vocabulary.held_out is None:
        return None, None
    found = in_context_score(subject.model, subject.vocabulary.held_out)
    if found is None:
        return None, None
    score, positions = found
    return round(score, DIGITS), list(positions)


# -------------------------------------------------------------------------------------------------
# one model


def examine(
    subject: Subject, settings: ReportSettings | None = None, message: Message = no_message
) -> dict:
    """
    Return a `models` entry of the report (nanomla/heads/page/build.py lists its keys).

    UserError when the model's patterns are not what it computes with.
    """
    settings = settings or ReportSettings()
    model = subject.model
    device = next(model.parameters()).device
    trial = trials_for(subject, settings)
    sums, rebuilt = trusted_patterns(subject, trial.repeated[:2].to(device))
    message(
        f'{subject.name}: scores of {model.config.n_layer} × {model.config.n_head} heads, '
        f'{settings.texts} texts of {trial.L} tokens, each repeated, out of '
        f'{len(subject.vocabulary.usable):,} different ones'
    )
    begun = time.perf_counter()
    heads, repeated, control = score_heads(model, trial, settings.threshold)
    seconds = time.perf_counter() - begun
    message(f'scored in {seconds:.1f} s')
    add_copying(model, heads, trial.control.to(device), message)
    costs, paths = {}, []
    for entry in heads:
        entry |= {f'{method}_ablation': None for method in METHODS}
    if settings.ablations != 'none':
        costs, paths = ablate(model, trial, heads, settings.ablations, message)
    text_losses, text_costs = examine_on_text(subject, heads, settings, message)
    icl_score, icl_positions = in_context_score_of(subject)
    shown = trial.repeated[0]
    if settings.prompt:
        shown = subject.encode(settings.prompt)
    shown = shown[: settings.shown].to(device)
    patterns = patterns_of(model, shown)
    report = dict(
        name=subject.name,
        kind=subject.kind,
        params=model.num_params(),
        step=subject.step,
        tokens=subject.tokens,
        val_loss=subject.val_loss,
        source=subject.source,
        trained=subject.trained,
        layers=model.config.n_layer,
        heads=model.config.n_head,
        tokens_text=subject.vocabulary.text_of(shown),
        patterns_u8=build.pack_patterns(patterns.flatten(0, 1).cpu()),
        scores=heads,
        prompt=settings.prompt or None,
        repeats=dict(
            L=trial.L,
            longest_gap=int(trial.gap.max()),
            texts=settings.texts,
            ids=len(subject.vocabulary.usable),
            seed=settings.seed,
            threshold=settings.threshold,
            row_sums=sums,
            rebuilt=rebuilt,
            seconds=round(seconds, 3),
        ),
        loss_by_position=dict(
            x=list(range(1, repeated.size(1) + 1)),
            repeated=rounded(repeated.mean(0)),
            control=rounded(control.mean(0)),
        ),
        repeat_loss=repeat_loss(repeated, trial.L),
        control_loss=repeat_loss(control, trial.L),
        **text_losses,
        icl_score=icl_score,
        icl_positions=icl_positions,
        group_ablation=costs | text_costs,
        paths=paths,
        composition=composition_of(model),
    )
    split = split_of(model, shown, heads)
    if split is not None:
        report['mla_split'] = split
    return report


def rounded(values: torch.Tensor) -> list[float]:
    return [round(value, DIGITS) for value in values.tolist()]


def trusted_patterns(subject: Subject, ids: torch.Tensor) -> tuple[float, float]:
    """Return the errors of the patterns; UserError where they are too large to trust them."""
    sums, rebuilt = check_patterns(subject.model, ids)
    if sums > LARGEST_ERROR or rebuilt > LARGEST_ERROR:
        raise UserError(
            f'{subject.source}: rows of its patterns sum to 1 ± {sums:.1g}, outputs rebuilt from '
            f'them are {rebuilt:.1g} off: they cannot be trusted'
        )
    return sums, rebuilt


def add_copying(model: GPT, heads: list[dict], ids: torch.Tensor, message: Message) -> None:
    """Add how much each head copies to its entry; None where its attention has no circuits."""
    if not circuits.has_circuits(model):
        message('no circuits for this attention: copying, composition and paths are left out')
        for entry in heads:
            entry |= dict(copying=None, effective_copying=None)
        return
    by_weights = circuits.copying(model).flatten().tolist()
    as_read = circuits.effective_copying(model, ids).flatten().tolist()
    for entry, copying, effective in zip(heads, by_weights, as_read):
        entry['copying'] = round(copying, DIGITS)
        entry['effective_copying'] = round(effective, DIGITS)


def composition_of(model: GPT) -> list[dict]:
    """Return the composition of all pairs; none where the attention has no circuits."""
    if not circuits.has_circuits(model):
        return []
    return circuits.composition(model)


def examine_on_text(
    subject: Subject, heads: list[dict], settings: ReportSettings, message: Message
) -> tuple[dict, dict]:
    """
    Score and ablate the heads on repeated held-out text, as on_text in their entries.

    Returns losses and the costs of groups, both with keys that begin with text_, {} without text.
    """
    trial = held_out_trials_for(subject, settings)
    if trial is None:
        return {}, {}
    on_text, repeated, control = score_heads(subject.model, trial, settings.threshold)
    costs = {}
    if settings.ablations != 'none':

        def message_on_text(text):
            message(f'on held-out text, {text}')

        costs, _ = ablate(subject.model, trial, on_text, settings.ablations, message_on_text)
    for entry, found in zip(heads, on_text):
        ablations = {key: found[key] for key in found if key.endswith('_ablation')}
        facts = dict(label=found['label'], previous=found['previous']['score'])
        entry['on_text'] = found['induction'] | facts | ablations
    losses = dict(
        text_repeat_loss=repeat_loss(repeated, trial.L),
        text_control_loss=repeat_loss(control, trial.L),
    )
    return losses, {f'text_{name}': cost for name, cost in costs.items()}


def split_of(model: GPT, ids: torch.Tensor, heads: list[dict]) -> dict | None:
    """Return the logits of the best heads, split into content and RoPE; None for other than MLA."""

    def best_score(entry):
        scores = [entry[key]['score'] for key in ('induction', 'on_text') if key in entry]
        return max(scores)

    ordered = sorted(heads, key=best_score, reverse=True)
    best = [(entry['layer'], entry['head']) for entry in ordered[:MOST_SPLITS]]
    parts = circuits.split_logits(model, ids, best)
    if parts is None:
        return None
    content, by_rope = parts
    return dict(
        heads=[list(head) for head in best],
        content_f16=build.pack_logits(content.cpu()),
        rope_f16=build.pack_logits(by_rope.cpu()),
    )


# -------------------------------------------------------------------------------------------------
# ablations


def ablate(
    model: GPT, trial: Trials, heads: list[dict], which: str, message: Message
) -> tuple[dict, list[dict]]:
    """
    Ablate heads one by one, in their entries, and in groups by label.

    Returns the costs of groups (zero_control where nothing repeats) and of the paths between two of
    them, and the paths of single previous-token heads to all induction heads.
    """
    control = Ablation(model, trial.control[:ABLATION_TEXTS], trial.L)
    ablation = Ablation(model, trial.repeated[:ABLATION_TEXTS], trial.L)
    chosen = heads
    if which != 'all' and len(heads) > SMALL:
        chosen = [entry for entry in heads if entry['label'] in ABLATED_LABELS]
    message(f'ablations: {len(chosen)} heads, one by one and in groups')
    for entry in chosen:
        head = (entry['layer'], entry['head'])
        for method in METHODS:
            entry[f'{method}_ablation'] = round(ablation.cost([head], method), DIGITS)
    costs = dict(loss=round(ablation.loss, DIGITS))
    for label in GROUPS:
        group = heads_with_label(heads, label)
        if group:
            costs[f'{label}_heads'] = len(group)
            for method in METHODS:
                costs[f'{label}_{method}'] = round(ablation.cost(group, method), DIGITS)
            costs[f'{label}_zero_control'] = round(control.cost(group), DIGITS)
    induction = heads_with_label(heads, 'induction')
    previous = heads_with_label(heads, 'previous')
    if not (induction and previous and circuits.has_circuits(model)):
        return costs, []
    for reads in 'QKV':
        cost = ablation.path(previous, induction, reads)
        costs[f'previous_to_induction_{reads}'] = round(cost, DIGITS)
    paths = []
    for head in previous[:MOST_SENDERS]:
        for reads in 'QKV':
            cost = ablation.path([head], induction, reads)
            paths.append({'from': list(head), 'kind': reads, 'cost': round(cost, DIGITS)})
    return costs, paths


# -------------------------------------------------------------------------------------------------
# the findings in a few lines


def findings(model: dict) -> list[str]:
    """Return the findings on a model, a `models` entry, as lines."""
    heads = model['scores']
    lines = [table_header()]
    best = sorted(heads, key=lambda entry: entry['induction']['gap'], reverse=True)
    lines += [table_row(entry) for entry in best[:5]]
    for entry in heads:
        if entry['shifted']['gap'] - entry['induction']['null_gap'] > model['repeats']['threshold']:
            lines.append(shifted_line(entry))
    lines.append(f'  labels: {label_counts(heads)}; {loss_line(model)}')
    lines += cost_lines(model['group_ablation'])
    if 'text_repeat_loss' in model:
        lines.append(
            f'  repeated held-out text: {model["text_repeat_loss"]:.3f} nats, other text '
            f'{model["text_control_loss"]:.3f}; {heads_on_text(heads)}'
        )
        lines += cost_lines(model['group_ablation'], on_text=True)
    return lines


def table_header() -> str:
    return (
        f'  {"head":>8}  {"induction":>9} {"(95 %)":>13} {"null":>6} {"control":>7} {"gap":>6} '
        f'{"copying":>9}  label'
    )


def table_row(entry: dict) -> str:
    scores = entry['induction']
    copying = '-'
    if entry['effective_copying'] is not None:
        copying = f'{entry["effective_copying"]:.2f}'
    return (
        f'  {entry["layer"]:>4}.{entry["head"]:<3}  {scores["score"]:>9.3f} '
        f'{scores["low"]:>6.3f}-{scores["high"]:.3f} {scores["null"]:>6.3f} '
        f'{scores["control"]:>7.3f} {scores["gap"]:>6.3f} {copying:>9}  {entry["label"] or "-"}'
    )


def shifted_line(entry: dict) -> str:
    shifted = entry['shifted']
    return (
        f'  head {entry["layer"]}.{entry["head"]} attends {shifted["offset"]} positions after the '
        f'repeated token, not 1: {shifted["score"]:.3f}, control {shifted["control"]:.3f}, '
        f'gap {shifted["gap"]:.3f}'
    )


def label_counts(heads: list[dict]) -> str:
    labels = sorted({entry['label'] for entry in heads if entry['label']})
    counts = [f'{len(heads_with_label(heads, label))} {label}' for label in labels]
    return ', '.join(counts) or 'none'


def loss_line(model: dict) -> str:
    line = (
        f'loss on the repetition {model["repeat_loss"]:.3f} nats, on the control '
        f'{model["control_loss"]:.3f}'
    )
    if model['icl_score'] is not None:
        early, late = model['icl_positions']
        line += f', in-context learning {model["icl_score"]:+.3f} (token {late} less {early})'
    return line


def heads_on_text(heads: list[dict]) -> str:
    ordered = sorted(heads, key=lambda entry: entry['on_text']['gap'], reverse=True)
    parts = []
    for entry in ordered:
        scores = entry['on_text']
        if scores['label'] == 'induction':
            parts.append(
                f'head {entry["layer"]}.{entry["head"]} {scores["score"]:.3f}, '
                f'control {scores["control"]:.3f}, gap {scores["gap"]:.3f}'
            )
    return ', '.join(parts) or 'no induction head on it'


def cost_lines(all_costs: dict, on_text: bool = False) -> list[str]:
    """Return the costs of groups and paths, of random tokens or of held-out text, as lines."""
    prefix, where = '', ''
    if on_text:
        prefix, where = 'text_', ' on text'
    costs = {}
    for key, cost in all_costs.items():
        if key.startswith(prefix):
            costs[key.removeprefix(prefix)] = cost
    lines = []
    for label in GROUPS:
        if f'{label}_heads' in costs:
            lines.append(
                f'  without the {costs[f"{label}_heads"]} {label} heads{where}: '
                f'{costs[f"{label}_zero"]:+.3f} nats (zero), {costs[f"{label}_mean"]:+.3f} (mean), '
                f'{costs[f"{label}_pattern"]:+.3f} (zero, patterns kept), '
                f'{costs[f"{label}_frozen"]:+.3f} (mean, patterns and norms kept); '
                f'{costs[f"{label}_zero_control"]:+.3f} (zero) where nothing repeats'
            )
    if 'previous_to_induction_K' in costs:
        parts = []
        for reads, name in dict(Q='queries', K='keys', V='values').items():
            parts.append(f'{name} {costs[f"previous_to_induction_{reads}"]:+.3f}')
        lines.append(
            f"  previous-token heads cut off from the induction heads'{where} "
            f'{", ".join(parts)} nats'
        )
    return lines


# -------------------------------------------------------------------------------------------------
# files


def write_report(folder: Path, report: dict) -> list[Path]:
    """
    Write heads.html, heads.json (all of the report), heads.csv (a row a head), composition.csv (a
    row a pair) and, for runs with checkpoints, checkpoints.csv. Returns their paths.
    """
    models, runs = report['models'], report['checkpoints']
    text = json.dumps(report, allow_nan=False, ensure_ascii=False) + '\n'
    contents = {
        'heads.html': build.page(report | dict(models=[for_page(model) for model in models])),
        'heads.json': text,
        'heads.csv': csv_table(head_rows(models)),
        'composition.csv': csv_table(composition_rows(models)) or 'no pairs\n',
    }
    if runs:
        contents['checkpoints.csv'] = csv_table(checkpoint_rows(runs))
    for name, content in contents.items():
        write_file(folder / name, content)
    return [folder / name for name in contents]


def for_page(model: dict) -> dict:
    """Return a `models` entry with the strongest pairs only, which keeps the page small."""
    pairs = sorted(model['composition'], key=lambda pair: pair['value'], reverse=True)
    return model | dict(composition=pairs[:DRAWN_PAIRS])


def head_rows(models: list[dict]) -> list[dict]:
    rows = []
    for model in models:
        rows += [dict(model=model['name']) | entry for entry in model['scores']]
    return rows


def composition_rows(models: list[dict]) -> list[dict]:
    rows = []
    for model in models:
        for pair in model['composition']:
            from_layer, from_head = pair['from']
            to_layer, to_head = pair['to']
            rows.append(
                dict(
                    model=model['name'],
                    from_layer=from_layer,
                    from_head=from_head,
                    to_layer=to_layer,
                    to_head=to_head,
                    kind=pair['kind'],
                    value=pair['value'],
                )
            )
    return rows


def checkpoint_rows(runs: list[dict]) -> list[dict]:
    """Return a row a checkpoint, without the scores of all its heads."""
    rows = []
    for run in runs:
        series = {key: run[key] for key in run if isinstance(run[key], list)}
        for name in ('scores', 'gaps'):
            series.pop(name, None)
        for i in range(len(run['step'])):
            rows.append(dict(model=run['name']) | {key: series[key][i] for key in series})
    return rows
