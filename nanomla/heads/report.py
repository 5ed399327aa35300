"""
The report on the heads of some models, as one dict of plain values: what find_induction_heads.py
prints, heads.html shows and heads.json, heads.jsonl and heads.csv hold.

    models: the entries that `examine` returns; checkpoints: those of study.through_training
    made: command, commit, date, device
"""

import json
import textwrap
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from model import GPT
from nanomla.core.configurator import UserError
from nanomla.core.files import csv_table, jsonl, read_jsonl, write_file
from nanomla.heads import circuits
from nanomla.heads.ablation import METHODS, Ablation
from nanomla.heads.page import build, names
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
COST_COLUMNS = {  # of names.GROUP_COSTS: heading and width
    'zero': ('zero', 8),
    'mean': ('mean', 8),
    'pattern': ('zero, patterns', 16),
    'frozen': ('mean, patterns, norms', 23),
    'zero_control': ('zero, no repeat', 17),
}
CONTINUES = 0.5  # a loss on repeats below this share of that on other tokens is no accident
LOGGED_ELSEWHERE = ('patterns_u8', 'mla_split', 'tokens_text', 'composition')  # in heads.json
LOGGED = {  # event -> what the figures read of every row
    'run': ('name', 'step', 'tokens', 'max_induction', 'repeat_loss', 'icl'),
    'checkpoints': ('name', 'step', 'tokens', 'max_induction', 'repeat_loss', 'icl'),
    'model': ('name', 'kind'),
    'latents': ('name', 'components_for_90_percent', 'likeness'),
}
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
    report['warnings'] = loss_warnings(report)
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


def loss_warnings(model: dict) -> list[str]:
    """
    Return a warning for each kind of text on which a model, a `models` entry, continues repeats
    without a head that is called induction.
    """
    labels_on = {'random tokens': [entry['label'] for entry in model['scores']]}
    losses_on = {'random tokens': (model['repeat_loss'], model['control_loss'])}
    if 'text_repeat_loss' in model:
        labels_on['held-out text'] = [entry['on_text']['label'] for entry in model['scores']]
        losses_on['held-out text'] = (model['text_repeat_loss'], model['text_control_loss'])
    warnings = []
    for text, (repeated, control) in losses_on.items():
        if repeated < CONTINUES * control and 'induction' not in labels_on[text]:
            warnings.append(
                f'the loss on repeated {text} says induction ({repeated:.3f} nats, {control:.3f} '
                'on other tokens), the scores do not: no head is called induction. Something else '
                'continues the repeats, or heads that lie beside the usual stripe'
            )
    return warnings


def findings(model: dict) -> list[str]:
    """Return the findings on a model, a `models` entry, as lines."""
    heads = model['scores']
    lines = [table_header()]
    best = sorted(heads, key=lambda entry: entry['induction']['gap'], reverse=True)
    lines += [table_row(entry) for entry in best[:5]]
    for entry in heads:
        if entry['shifted']['gap'] - entry['induction']['null_gap'] > model['repeats']['threshold']:
            lines.append(shifted_line(entry))
    lines.append(f'  labels: {label_counts(heads)}')
    lines.append(f'  {loss_line(model)}')
    if 'text_repeat_loss' in model:
        lines.append(
            f'  loss on repeated held-out text {model["text_repeat_loss"]:.3f} nats, on other text '
            f'{model["text_control_loss"]:.3f}'
        )
        lines += [f'  on text: {line}' for line in heads_on_text(heads)]
    lines += cost_lines(model['group_ablation'])
    for warning in model['warnings']:
        lines += textwrap.wrap(f'WARNING: {warning}', 116, initial_indent='  ')
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


def heads_on_text(heads: list[dict]) -> list[str]:
    """Return a line for each head that is labelled induction on held-out text."""
    ordered = sorted(heads, key=lambda entry: entry['on_text']['gap'], reverse=True)
    lines = []
    for entry in ordered:
        scores = entry['on_text']
        if scores['label'] == 'induction':
            lines.append(
                f'head {entry["layer"]}.{entry["head"]} induction {scores["score"]:.3f}, '
                f'control {scores["control"]:.3f}, gap {scores["gap"]:.3f}'
            )
    return lines or ['no induction head']


def cost_lines(costs: dict) -> list[str]:
    """Return the costs of groups and paths, a table for random tokens and one for held-out text."""
    lines = []
    for table in names.group_tables(costs):
        if table['groups']:
            columns = ''.join(f'{name:>{width}}' for name, width in COST_COLUMNS.values())
            heading = f'loss added on {table["text"]} (nats)'
            lines.append(f'  {heading:<36}{columns}')
        lines += [f'  {group_row(group)}' for group in table['groups']]
        if table['paths']:
            parts = [f'{names.READS[reads]} {cost:+.3f}' for reads, cost in table['paths'].items()]
            lines.append(
                "  previous-token heads missing only in the induction heads' " + ', '.join(parts)
            )
    return lines


def group_row(group: dict) -> str:
    """Return a row of the table of costs."""
    row = f'  without the {group["name"]}'
    row = f'{row:<36}'
    for key, (_, width) in COST_COLUMNS.items():
        cost = group['costs'][key]
        row += f'{"-":>{width}}' if cost is None else f'{cost:>+{width}.3f}'
    return row


# -------------------------------------------------------------------------------------------------
# files


def write_report(folder: Path, report: dict) -> list[Path]:
    """
    Write heads.html, heads.json (all of the report), heads.jsonl (all that its figures show),
    heads.csv (a row a head), composition.csv (a row a pair) and, for runs with checkpoints,
    checkpoints.csv. Returns their paths.
    """
    models, runs = report['models'], report['checkpoints']
    text = json.dumps(report, allow_nan=False, ensure_ascii=False) + '\n'
    contents = {
        'heads.html': build.page(report | dict(models=[for_page(model) for model in models])),
        'heads.json': text,
        'heads.jsonl': jsonl(log_rows(report)),
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


def origin(entry: dict) -> dict:
    """Return what tells the rows of a model or a run from those of others."""
    return dict(model=entry['name'], kind=entry['kind'], source=entry['source'])


def head_rows(models: list[dict]) -> list[dict]:
    rows = []
    for model in models:
        rows += [origin(model) | entry for entry in model['scores']]
    return rows


def composition_rows(models: list[dict]) -> list[dict]:
    rows = []
    for model in models:
        for pair in model['composition']:
            from_layer, from_head = pair['from']
            to_layer, to_head = pair['to']
            rows.append(
                origin(model)
                | dict(
                    from_layer=from_layer,
                    from_head=from_head,
                    to_layer=to_layer,
                    to_head=to_head,
                    reads=pair['kind'],
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
            rows.append(origin(run) | {key: series[key][i] for key in series})
    return rows


# -------------------------------------------------------------------------------------------------
# the log


def log_rows(report: dict) -> list[dict]:
    """Return a report as rows of a log: where it comes from, its runs and its models."""
    rows = [dict(event='settings', made=report['made'])]
    rows += [dict(event='run') | run for run in report['checkpoints']]
    for model in report['models']:
        kept = {key: value for key, value in model.items() if key not in LOGGED_ELSEWHERE}
        rows.append(dict(event='model') | kept)
    return rows


def read_report(path: str, call: int = 1) -> dict:
    """
    Read a report back from a log, as far as it is there: a log of several calls of
    find_induction_heads.py holds one after the other, and `call` says which, from 1.

    UserError for a file that cannot be read, or that holds no such call.
    """
    try:
        rows = read_jsonl(path)
    except OSError as error:
        raise UserError(f'{path}: cannot read the log ({error.strerror})') from error
    except ValueError as error:
        raise UserError(str(error)) from None
    reports = []
    for row in rows:
        if row.get('event') == 'settings' and isinstance(row.get('made'), dict):
            device = {key: row[key] for key in ('device',) if key in row}
            reports.append(dict(models=[], checkpoints=[], made=row['made'] | device))
        elif reports:
            check_row(row, path)
            add_row(reports[-1], row)
    if not 1 <= call <= len(reports):
        raise UserError(
            f'{path} holds {len(reports)} calls of find_induction_heads.py, and --call={call} is '
            'none of them'
        )
    report = reports[call - 1]
    add_kinds(report, path)
    return report


def check_row(row: dict, path: str) -> None:
    """Raise a UserError where a row lacks what the figures read of it."""
    event = row.get('event', row.get('part'))
    for key in LOGGED.get(event, ()):
        if key not in row:
            raise UserError(f'{path}: a row of the event {event} has no {key}')


def add_row(report: dict, row: dict) -> None:
    """Add a row of a log to the report that it belongs to; rows of other events are skipped."""
    event = row.get('event', row.get('part'))
    if event in ('run', 'checkpoints'):
        report['checkpoints'].append(row)
    elif event == 'model':
        report['models'].append(row)
    elif event == 'latents':
        # Older logs have what latents hold in rows of their own.
        for model in report['models']:
            if model['name'] == row['name']:
                model['latents'] = row


def add_kinds(report: dict, path: str) -> None:
    """Give each run of a report the kind of its model, where an older log has only that."""
    kinds = {model['name']: model['kind'] for model in report['models']}
    for run in report['checkpoints']:
        if 'kind' not in run and run['name'] not in kinds:
            raise UserError(f'{path} does not say which attention the run {run["name"]} has')
        run.setdefault('kind', kinds.get(run['name']))


def missing_scores(report: dict) -> list[str]:
    """Return a line for each model of a report whose scores are not all in its log."""
    lines = []
    for model in report['models']:
        if 'scores' not in model:
            heads = model.get('heads', [])
            lines.append(
                f'no map of {model["name"]}: the log holds {len(heads)} of its heads, not all'
            )
    return lines
