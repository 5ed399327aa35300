"""
What a comparison found: numbers from the lines of its results.jsonl, as a table.

The file is all that is needed. Its lines are the comparison (what was asked for), then each
contender, then each run with its losses. Everything here is computed from them, so a table or a
figure can be made again at any time, on a machine without torch. nanomla.comparison.figures draws.

Validation losses are in nats a token; the loss of a run is the best of its evaluations, the one
whose weights train.py keeps. Runs of one seed share batches and evaluation, so contenders are
compared seed by seed: the difference to the control is a mean over seeds with a 95 % confidence
interval by Student's t.
"""

import math
import os
import statistics
import textwrap
from dataclasses import dataclass

from nanomla.core.checks import (
    ANYTHING,
    FLAG,
    TABLE,
    TEXT,
    check_entries,
    list_of,
    number,
    shortened,
    table_of,
    whole,
)
from nanomla.core.configurator import UserError
from nanomla.core.files import read_jsonl, text_table

TEXT_WIDTH = 110  # letters in a line below the table

# What the lines of a results.jsonl may hold, and what each must.
HEAD = dict(
    control=TEXT,
    title=TEXT,
    source=TEXT,
    seeds=list_of(whole()),
    steps=whole(least=1),
    tokens_per_step=whole(least=1),
    tune_seed=whole(),
    commit=TEXT,
    device=TEXT,
    dtype=TEXT,
    torch=TEXT,
    date=TEXT,
)
HEAD_MAY_HAVE = dict(tune_steps=whole(least=0), remark=TEXT | None)
CONTENDER = dict(name=TEXT, label=TEXT, kind=TEXT)
CONTENDER_MAY_HAVE = dict(
    params=whole(least=0) | None,
    params_ratio=number() | None,
    cache_bytes=number(least=0) | None,
    error=TEXT | None,
    differs=TABLE | None,
    grid=table_of(list_of(ANYTHING)) | None,
    tuned=TABLE | None,
    at_edge=FLAG,
    decode=TABLE | None,
)
DECODE_MAY_HAVE = dict(tok_per_s=number() | None, sample=TEXT | None)
DECODE = dict(batch=whole(), tokens=whole(), repeats=whole(), device=TEXT, dtype=TEXT)
RUN = dict(contender=TEXT, role=TEXT, seed=whole(), tuned=TABLE, shared=FLAG)
RUN_MAY_HAVE = dict(error=TEXT, max_logit=number())
SCORED_RUN = dict(
    val_loss=number(),
    tok_per_s=number() | None,
    peak_memory=number() | None,
    eval_steps=list_of(whole(least=0)),
    eval_losses=list_of(number()),
)

# -------------------------------------------------------------------------------------------------
# numbers


def t_quantile(probability: float, freedom: int) -> float:
    """
    Return the quantile of Student's t distribution with a whole number of degrees of freedom.

    By bisection on its cumulative distribution, which is a finite sum (Abramowitz and Stegun,
    26.7.3 and 26.7.4).
    """

    def two_sided(t):  # P(|T| < t)
        angle = math.atan(t / math.sqrt(freedom))
        cos2, term, total = math.cos(angle) ** 2, 1.0, 0.0
        for k in range(freedom % 2 + 1, freedom, 2):  # 1, 3, ... or 2, 4, ...
            total += term
            term *= cos2 * k / (k + 1)
        if freedom % 2 == 0:
            return math.sin(angle) * total
        return 2 / math.pi * (angle + math.sin(angle) * math.cos(angle) * total)

    goal = 2 * probability - 1
    low, high = 0.0, 1.0
    while two_sided(high) < goal:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        if two_sided(middle) < goal:
            low = middle
        else:
            high = middle
    return high


def interval(differences: list[float]) -> tuple[float, float | None]:
    """
    Return the mean of paired differences and half the width of its 95 % confidence interval.

    The interval is Student's t; None with fewer than two differences.
    """
    mean, n = statistics.fmean(differences), len(differences)
    if n < 2:
        return mean, None
    return mean, t_quantile(0.975, n - 1) * statistics.stdev(differences) / math.sqrt(n)


@dataclass
class Results:
    """
    The lines of a results.jsonl.

    head: what was asked for. contenders: name -> its line. runs: a line each.
    """

    head: dict
    contenders: dict[str, dict]
    runs: list[dict]

    @property
    def control(self) -> str:
        return self.head['control']

    @property
    def seeds(self) -> list[int]:
        return self.head['seeds']

    def runs_of(self, name: str) -> list[dict]:
        """Return the runs of a contender whose losses count, failed ones among them."""
        return [run for run in self.runs if run['contender'] == name and run['role'] == 'seed']

    def scored_runs(self, name: str) -> list[dict]:
        """Return those of them that have a loss."""
        return [run for run in self.runs_of(name) if 'val_loss' in run]

    def reached(self) -> 'Results':
        """Return the results without contenders that a stop has kept waiting. The control stays."""
        kept = {}
        for row in rows(self):
            if row['val_loss'] is not None or row['error'] or row['control']:
                kept[row['name']] = self.contenders[row['name']]
        return Results(self.head, kept, self.runs)

    def any_shared(self) -> bool:
        """Return whether runs shared a device."""
        return any(run['shared'] for run in self.runs)


def read(path: str | os.PathLike) -> Results:
    """Read a results.jsonl. UserError when it is none."""
    try:
        lines = read_jsonl(path)
    except OSError as error:
        raise UserError(
            f'{path} cannot be read ({error.strerror}): run the comparison first, '
            'or name its --results'
        ) from None
    except ValueError:
        raise UserError(
            f'{path} is damaged or no results.jsonl: run compare.py again, '
            'which writes it from the runs'
        ) from None
    if not lines or lines[0].get('event') != 'comparison':
        raise UserError(f'{path} holds no comparison: name the results.jsonl that compare.py wrote')
    try:
        check_lines(lines)
    except ValueError as error:
        raise UserError(
            f'{path} is damaged or no results.jsonl ({error}): run compare.py again, '
            'which writes it from the runs'
        ) from None
    contenders = {line['name']: line for line in lines if line.get('event') == 'contender'}
    runs = [line for line in lines if line.get('event') == 'run']
    return Results(lines[0], contenders, runs)


def check_lines(lines: list[dict]) -> None:
    """Raise a ValueError unless the lines of a results.jsonl hold what is read from them."""
    head = lines[0]
    check_entries(head, HEAD | HEAD_MAY_HAVE, needed=HEAD)
    names = set()
    for line in lines[1:]:
        if line.get('event') == 'contender':
            check_entries(line, CONTENDER | CONTENDER_MAY_HAVE, needed=CONTENDER)
            names.add(line['name'])
            decode = line.get('decode') or {}
            needed = DECODE if decode.get('tok_per_s') else ()
            check_entries(decode, DECODE | DECODE_MAY_HAVE, needed)
        elif line.get('event') == 'run':
            check_entries(line, RUN | RUN_MAY_HAVE, needed=RUN)
            if 'val_loss' in line:
                check_entries(line, SCORED_RUN, needed=SCORED_RUN)
                if len(line['eval_steps']) != len(line['eval_losses']):
                    raise ValueError('eval_steps and eval_losses differ in length')
    if head['control'] not in names:
        raise ValueError(f'it has no line of the control, {shortened(head["control"])}')


def rows(results: Results) -> list[dict]:
    """
    Return a dict for each contender, in their order: the columns of the table.

    None where something is not known.
    """
    return [_row(results, name) for name in results.contenders]


def _row(results: Results, name: str) -> dict:
    about = results.contenders[name]
    is_control = name == results.control
    control = results.contenders.get(results.control, {})
    runs = results.scored_runs(name)
    losses = [run['val_loss'] for run in runs]
    errors = [about.get('error')] + [run.get('error') for run in results.runs_of(name)]
    unshared = [run for run in runs if not run['shared']]
    speeds = [run['tok_per_s'] for run in unshared if run['tok_per_s']]
    memory = [run['peak_memory'] for run in unshared if run['peak_memory']]
    logits = [run['max_logit'] for run in runs if run.get('max_logit') is not None]
    row = dict(
        name=name,
        label=about['label'],
        kind=about['kind'],
        control=is_control,
        seeds=len(losses),
        wanted=len(results.seeds),
        params=about.get('params'),
        params_ratio=about.get('params_ratio'),
        cache_bytes=about.get('cache_bytes'),
        cache_ratio=None,
        val_loss=statistics.fmean(losses) if losses else None,
        sd=statistics.stdev(losses) if len(losses) > 1 else None,
        difference=None,
        half=None,
        percent=None,
        percent_half=None,
        tuned=about.get('tuned') or {},
        at_edge=about.get('at_edge', False),
        tok_per_s=statistics.median(speeds) if speeds else None,
        decode_tok_per_s=decode_of(about).get('tok_per_s'),
        peak_memory=max(memory) if memory else None,
        max_logit=max(logits) if logits else None,
        error=next((error for error in errors if error), None),
    )
    if row['cache_bytes'] and control.get('cache_bytes'):
        row['cache_ratio'] = row['cache_bytes'] / control['cache_bytes']
    if not is_control:
        row |= paired_difference(results, name)
    return row


def paired_difference(results: Results, name: str) -> dict:
    """
    Return by how much the losses of a contender exceed the control's, over the seeds both have.

    difference: the mean, in nats; half: half the width of its interval; percent and percent_half:
    both as a share of the control's mean loss. {} without such a seed.
    """
    mine = {run['seed']: run['val_loss'] for run in results.scored_runs(name)}
    control = {run['seed']: run['val_loss'] for run in results.scored_runs(results.control)}
    differences = [
        mine[seed] - control[seed] for seed in results.seeds if seed in mine and seed in control
    ]
    if not differences:
        return {}
    difference, half = interval(differences)
    share = 100 / statistics.fmean(control[seed] for seed in mine if seed in control)
    return dict(
        difference=difference,
        half=half,
        percent=share * difference,
        percent_half=None if half is None else share * half,
    )


def decode_of(contender: dict) -> dict:
    """Return what was measured of a contender's decoding, {} where nothing was."""
    return contender.get('decode') or {}


def front(found: list[dict]) -> list[str]:
    """
    Return the names of the rows on the Pareto front.

    No other one has a smaller cache and at most the loss, or the same cache and less loss.
    """
    known = [row for row in found if row['val_loss'] is not None and row['cache_bytes']]
    names = []
    for row in known:
        if not any(_beats(other, row) for other in known):
            names.append(row['name'])
    return names


def _beats(row: dict, other: dict) -> bool:
    mine = row['cache_bytes'], row['val_loss']
    theirs = other['cache_bytes'], other['val_loss']
    return mine[0] <= theirs[0] and mine[1] <= theirs[1] and mine != theirs


# -------------------------------------------------------------------------------------------------
# the table

LOSS = 'val loss, mean ± sd'
COLUMNS = (
    '',
    'parameters',
    'KV bytes a token',
    LOSS,
    'against the control [95 % interval]',
    'tuned',  # the names of the settings stand here
    'training tok/s',
    'decoding tok/s',
    'peak memory',
    'largest logit',
)
ALWAYS_SHOWN = 5  # columns; the others are left out where they have no numbers


def table(results: Results) -> str:
    """Return the results in Markdown: the table, what its numbers mean, where they come from."""
    header, *cells = _table_cells(rows(results.reached()))
    lines = ['| ' + ' | '.join(line) + ' |' for line in [header, *cells]]
    lines.insert(1, '|---' * len(header) + '|')
    return '\n'.join(lines + _notes(results)) + '\n'


def report(results: Results) -> str:
    """Return what `table` does for a terminal: aligned columns, and a failure below them."""
    header, *cells = _table_cells(rows(results.reached()))
    header[0] = 'contender'
    failures = []
    for line in cells:
        loss = header.index(LOSS)
        if line[loss].startswith('failed: '):
            failures += ['', *_wrapped(f'{line[0]} {line[loss]}')]
            line[loss] = 'failed'
    aligned = text_table([dict(zip(header, line)) for line in cells], names=['contender'])
    return '\n'.join([aligned, *failures, *_notes(results)]) + '\n'


def _table_cells(found: list[dict]) -> list[list[str]]:
    """Return the header and a line of cells for each row, without columns that are empty."""
    tuned_names = _tuned_names(found)
    cells = [list(COLUMNS)]
    cells[0][COLUMNS.index('tuned')] = ', '.join(tuned_names)
    for row in found:
        cells.append(_cells(row, tuned_names))
    shown = []
    for column in range(len(COLUMNS)):
        if column < ALWAYS_SHOWN or any(line[column] for line in cells[1:]):
            shown.append(column)
    return [[line[column] for column in shown] for line in cells]


def _notes(everyone: Results) -> list[str]:
    """Return the lines below the table: what it means, where it comes from, samples."""
    results = everyone.reached()
    waiting = [
        about['label']
        for name, about in everyone.contenders.items()
        if name not in results.contenders
    ]
    lines = ['', *_wrapped(_explanation(results, rows(results), waiting))]
    lines += ['', *_wrapped(facts(results.head))]
    lines += _list('What differs from the control, by settings of train.py:', _changes(results))
    lines += _list('Runs that failed:', _failures(results))
    for about in results.contenders.values():
        sample = decode_of(about).get('sample')
        if sample:
            lines += ['', f'A sample of {about["label"]}:', '']
            for line in sample.splitlines():
                lines += _wrapped(line, '    ', '    ') or ['']
    return lines


def _wrapped(text: str, first: str = '', later: str = '') -> list[str]:
    """Return a text in lines that fit a terminal, each after its margin."""
    return textwrap.wrap(text, TEXT_WIDTH, initial_indent=first, subsequent_indent=later)


def _tuned_names(found: list[dict]) -> list[str]:
    """Return the settings that were tuned; both learning rates go by one name."""
    names = dict.fromkeys(_tuned_name(key) for row in found for key in row['tuned'])
    return list(names) or ['learning rate']


def _tuned_name(key: str) -> str:
    return 'learning rate' if key in ('learning_rate', 'muon_lr') else key


def _cells(row: dict, tuned_names: list[str]) -> list[str]:
    """Return the cells of a contender, '' where something is not known."""
    label = row['label']
    if row['control']:
        label += ' (control)'
    cells = [label, _params_cell(row), _cache_cell(row)]
    if row['error'] and row['val_loss'] is None:
        message = f'failed: {row["error"]}'.replace('|', '\\|')
        return cells + [message] + [''] * (len(COLUMNS) - len(cells) - 1)
    memory_cell = '' if row['peak_memory'] is None else memory(row['peak_memory'])
    logit_cell = '' if row['max_logit'] is None else f'{row["max_logit"]:.0f}'
    return cells + [
        _loss_cell(row),
        _difference_cell(row),
        _tuned_cell(row, tuned_names),
        speed(row['tok_per_s']),
        speed(row['decode_tok_per_s']),
        memory_cell,
        logit_cell,
    ]


def _params_cell(row: dict) -> str:
    if row['params'] is None:
        return ''
    text = f'{row["params"]:,}'
    if not row['control'] and row['params_ratio'] is not None:
        text += f' ({100 * row["params_ratio"] - 100:+.2f} %)'
    return text


def _cache_cell(row: dict) -> str:
    if not row['cache_bytes']:
        return ''
    text = f'{row["cache_bytes"]:,}'
    if not row['control'] and row['cache_ratio']:
        text += f' ({share(row["cache_ratio"])})'
    return text


def _loss_cell(row: dict) -> str:
    if row['val_loss'] is None:
        return ''
    text = f'{row["val_loss"]:.4f}'
    if row['sd'] is not None:
        text += f' ± {row["sd"]:.4f}'
    if row['seeds'] != row['wanted']:
        text += f' ({row["seeds"]} of {row["wanted"]} seeds)'
    return text


def _difference_cell(row: dict) -> str:
    if row['difference'] is None:
        return ''
    text = f'{row["difference"]:+.4f}'
    if row['half'] is not None:
        low, high = row['difference'] - row['half'], row['difference'] + row['half']
        text += f' [{low:+.4f}, {high:+.4f}]'
    return text + f', {row["percent"]:+.2f} %'


def _tuned_cell(row: dict, tuned_names: list[str]) -> str:
    keys = sorted(row['tuned'], key=lambda key: tuned_names.index(_tuned_name(key)))
    text = ', '.join(short(row['tuned'][key]) for key in keys)
    return text + '*' if row['at_edge'] else text


def _list(heading: str, entries: list[str]) -> list[str]:
    """Return the lines of a list below a heading; none without entries."""
    if not entries:
        return []
    lines = ['', heading, '']
    for entry in entries:
        lines += _wrapped(entry, later='  ')
    return lines


def _changes(results: Results) -> list[str]:
    entries = []
    for about in results.contenders.values():
        if about.get('differs'):
            pairs = ', '.join(f'{key}={value}' for key, value in about['differs'].items())
            entries.append(f'- {about["label"]}: {pairs}')
    return entries


def _failures(results: Results) -> list[str]:
    entries = []
    for run in results.runs:
        if run.get('error'):
            tuned = run['tuned'] or ''
            entries.append(
                f'- {run["contender"]}, {run["role"]} {run["seed"]} {tuned}: {run["error"]}'
            )
    return entries


# -------------------------------------------------------------------------------------------------
# what the numbers mean


def _explanation(results: Results, found: list[dict], waiting: list[str]) -> str:
    """Return the paragraph below the table. waiting: labels of those that are not trained yet."""
    head = results.head
    sentences = [
        f'{head["title"]}. Text: {head["source"]}; {head["steps"]:,} steps of '
        f'{head["tokens_per_step"]:,} tokens, the same ones for each contender.'
    ]
    number = len(head['seeds'])
    if number > 1:
        label = results.contenders[results.control]['label']
        sentences.append(
            'The loss of a run is its best validation loss. The difference is the mean over '
            f"{number} seeds of what a contender has more than '{label}' with the same seed and "
            f"batches, with Student's t interval (95 %; with {number} seeds {number - 1} degrees "
            'of freedom).'
        )
    sentences.append(_about_grids(results, found))
    sentences.append('Caches are counted in bf16, all layers.')
    sentences += _about_decoding(results)
    if any(row['max_logit'] is not None for row in found):
        sentences.append(
            'The largest attention logit is that of all seeds, heads and logged steps.'
        )
    if head.get('remark'):
        sentences.append(head['remark'])
    if waiting:
        sentences.append(f'Not trained yet: {", ".join(waiting)}.')
    if results.any_shared():
        sentences.append('Runs shared a device, so speeds and memory are not reported.')
    elif head['device'].startswith('CPU'):
        sentences.append('Memory on a CPU is that of the whole process.')
    return ' '.join(sentences)


def _about_decoding(results: Results) -> list[str]:
    for about in results.contenders.values():
        decode = decode_of(about)
        if decode.get('tok_per_s'):
            plural = 's' if decode['batch'] > 1 else ''
            return [
                f'Decoding: {decode["batch"]} sequence{plural}, {decode["tokens"]} tokens, dense '
                f'cache, {decode["dtype"]}, on {decode["device"]}, median of {decode["repeats"]}.'
            ]
    return []


def _about_grids(results: Results, found: list[dict]) -> str:
    head = results.head
    labels_of = {}  # a grid in words -> the labels of those that have it
    for about in results.contenders.values():
        if about.get('grid'):
            grid = '; '.join(
                f'{key} of {", ".join(map(short, values))}' for key, values in about['grid'].items()
            )
            labels_of.setdefault(grid, []).append(about['label'])
    if not labels_of:
        return 'The learning rate was not tuned.'
    text = f'Tuned on seed {head["tune_seed"]}'
    tune_steps = head.get('tune_steps', head['steps'])
    if tune_steps < head['steps']:
        text += f' in {tune_steps:,} steps'
    sentences = []
    for grid, labels in labels_of.items():
        owners = f' for {", ".join(labels)}' if len(labels_of) > 1 else ''
        sentences.append(f'{grid}{owners}.')
    text += ': ' + ' '.join(sentences)
    if any(row['at_edge'] for row in found):
        text += ' * the best value stands at the end of its grid.'
    return text


def facts(head: dict) -> str:
    """Return where the numbers come from, for the end of a table and the footer of a figure."""
    parts = [
        f'commit {head["commit"]}',
        f'seeds {", ".join(map(str, head["seeds"]))}',
        head['device'],
        head['dtype'],
        f'torch {head["torch"]}',
        head['date'],
    ]
    return ' · '.join(part for part in parts if part)


# -------------------------------------------------------------------------------------------------
# numbers in short


def memory(size: float) -> str:
    """Return a number of bytes in MiB or GiB."""
    if size >= 2**30:
        return f'{size / 2**30:.2f} GiB'
    return f'{size / 2**20:.0f} MiB'


def short(value: object) -> str:
    """Return the value of a setting: 0.01, residual, True."""
    return f'{value:g}' if type(value) in (int, float) else str(value)


def speed(value: float | None) -> str:
    """Return tokens a second: 812, 9,500, 12k; '' for None."""
    if value is None:
        return ''
    if value >= 1e4:
        return f'{value / 1e3:,.0f}k'
    return f'{value:,.0f}'


def share(ratio: float) -> str:
    """Return a ratio as a fraction or a multiple: 0.2083 -> '1/4.8'."""
    if ratio < 1:
        return f'1/{1 / ratio:.3g}'
    if ratio > 1:
        return f'{ratio:.3g} ×'
    return 'equal'
