"""
The rows of the adapter benchmark as JSON, CSV, a Markdown table and a picture.

A row is a dict of cell.measure_or_reason with the cell's name and settings.
"""

import json
import textwrap
from collections.abc import Sequence
from pathlib import Path

from nanomla.core import figures
from nanomla.core.checks import FLAG, TABLE, TEXT, check_entries, number, one_of, whole
from nanomla.core.files import TABLE_WIDTH, csv_table, text_table, write_file

COLUMNS = (  # heading, key of a row, format
    ('train tok/s', 'train_tok_per_s', ',.0f'),
    ('× peer', 'speedup', '.2f'),
    ('% of limit', 'percent_of_limit', '.0f'),
    ('step ms', 'step_ms', '.1f'),
    ('peak MiB', 'train_allocated_mib', ',.0f'),
    ('reserved', 'train_reserved_mib', ',.0f'),
    ('eval tok/s', 'eval_tok_per_s', ',.0f'),
    ('generate tok/s', 'generate_tok_per_s', ',.0f'),
    ('val loss', 'val_loss', '.4f'),
    ('perplexity', 'perplexity', '.2f'),
    ('ROUGE-L', 'rougeL', '.3f'),
    ('exact', 'exact_match', '.2f'),
    ('F1', 'token_f1', '.3f'),
    ('trainable', 'trainable_parameters', ',.0f'),
)
ADAPTERS = ('full', 'lora', 'qlora')
OTHER_ATTENTIONS = ('mla', 'latent')  # kernels that stand for another model than the peer's
ROW = dict(cell=TEXT, adapter=one_of(*ADAPTERS), kernel=TEXT, peer=FLAG, model=TEXT, status=TEXT)
REASON = dict(reason=TEXT)  # of a row without measurements
MEASURED = dict.fromkeys(  # of one with them
    (
        'train_tok_per_s',
        'train_tok_per_s_least',
        'train_tok_per_s_most',
        'train_allocated_mib',
        'trainable_parameters',
        'seeds',
    ),
    number(least=0),
)
MEASURED |= dict(commit=TEXT, torch=TEXT, device=TEXT, dtype=TEXT, settings=TABLE)


def is_row(row: object) -> bool:
    """Return whether `row` is what a cell writes, so that it can stand in the table."""
    try:
        check_entries(row, ROW, needed=ROW)
        entries = MEASURED if row['status'] == 'ok' else REASON
        check_entries(row, entries, needed=entries)
        check_entries(row.get('settings', {}), dict(seed=whole()))
        shown = {key: number() | None for _, key, _ in COLUMNS}
        check_entries(row, shown)
    except ValueError:
        return False
    return True


def write_results(rows: Sequence[dict], folder: Path, about: dict, draw: bool = True) -> list[dict]:
    """
    Write results.json, results.csv, results.md and results.png in `folder`.

    about: facts of the whole table; draw: the picture, too, where there is something to draw.
    Returns the rows with their speedups.
    """
    rows = with_speedups(rows)
    text = json.dumps(about | dict(rows=rows), indent=1)
    write_file(folder / 'results.json', text + '\n')
    write_file(folder / 'results.csv', csv_table([without_nested(row) for row in rows]))
    write_file(folder / 'results.md', markdown_table(rows))
    measured = [row for row in rows if row['status'] == 'ok']
    if draw and measured:
        with figures.if_possible():
            draw_results(measured, folder / 'results.png')
    return rows


def without_nested(row: dict) -> dict:
    return {key: value for key, value in row.items() if not isinstance(value, (dict, list))}


def with_speedups(rows: Sequence[dict]) -> list[dict]:
    """
    Return the rows with their training speed over that of the peer's sdpa row, where there is one.

    Only like is compared with like: the peer must train as many parameters as one of our rows of
    unconverted attention.
    """
    peers, ours = {}, {}
    for row in rows:
        if row['status'] != 'ok':
            continue
        if not row['peer'] and row['kernel'] not in OTHER_ATTENTIONS:
            ours.setdefault(row['adapter'], set()).add(row['trainable_parameters'])
        elif row['kernel'] == 'sdpa':
            peers[row['adapter']] = row
    result = []
    for row in rows:
        peer = peers.get(row['adapter'])
        if row['status'] == 'ok' and peer is not None:
            if row['peer'] or peer['trainable_parameters'] in ours.get(row['adapter'], ()):
                row = row | dict(speedup=row['train_tok_per_s'] / peer['train_tok_per_s'])
        result.append(row)
    return result


# -------------------------------------------------------------------------------------------------
# the table


HEADINGS = ['adapter', 'kernel', 'ran', *(heading for heading, _, _ in COLUMNS)]


def terminal_table(rows: Sequence[dict]) -> str:
    """Return the table for a terminal, and below it why cells could not run."""
    lines, reasons = [], []
    for row in rows:
        cells = [row['adapter'], label(row), *table_cells(row)]
        if row['status'] != 'ok':
            reasons += textwrap.wrap(f'{" ".join(cells[:2])}: {cells[2]}', TABLE_WIDTH)
            cells[2] = row['status']
        lines.append(dict(zip(HEADINGS, cells)))
    table = text_table(lines, names=HEADINGS[:2], left=HEADINGS[2:3])
    return '\n'.join([table, *reasons])


def markdown_table(rows: Sequence[dict]) -> str:
    lines = [table_line(HEADINGS), '|' + '---|' * len(HEADINGS)]
    for row in rows:
        lines.append(table_line([row['adapter'], label(row), *table_cells(row)]))
    return '\n'.join(lines) + '\n'


def table_line(cells: list[str]) -> str:
    return '| ' + ' | '.join(cells) + ' |'


def table_cells(row: dict) -> list[str]:
    """Return the cells of a row after its name: what ran, and the columns."""
    if row['status'] != 'ok':
        reason = f'{row["status"]}: {row["reason"]}'
        return [reason.replace('|', '/'), *[''] * len(COLUMNS)]
    ran = row.get('kernel_ran', 'not profiled')
    if not row.get('kernel_proved', True):
        ran += ' (not what was asked for)'
    cells = [ran]
    for _, key, form in COLUMNS:
        value = row.get(key)
        cells.append('' if value is None else format(value, form))
    return cells


def sees_the_future(row: dict) -> bool:
    return row.get('causal') is False


def label(row: dict) -> str:
    text = row['kernel']
    if row['peer']:
        text += ' (transformers + PEFT)'
    if sees_the_future(row):
        text += ' (sees the future)'
    return text


# -------------------------------------------------------------------------------------------------
# the picture


def draw_results(rows: Sequence[dict], path: Path) -> None:
    """Draw speed and peak memory of training, a column for each adapter."""
    kinds = [kind for kind in ADAPTERS if any(row['adapter'] == kind for row in rows)]
    columns = [[row for row in rows if row['adapter'] == kind][::-1] for kind in kinds]
    size = (figures.WIDTH, 2.2 + 0.56 * max(map(len, columns)))
    first = rows[0]
    note = f'{first["device"]}, {first["dtype"]}: {spread_note(rows)}'
    if any(row['peer'] for row in rows):
        note += '; peer: transformers + PEFT'
    title = f'Fine-tuning {first["model"]}'
    with figures.sheet(2, len(kinds), size=size, title=title, note=note) as (fig, axes):
        for column, kind in enumerate(kinds):
            speed, memory = (line if len(kinds) == 1 else line[column] for line in axes)
            draw_speed(speed, columns[column], rows)
            speed.set_title(kind)
            draw_memory(memory, columns[column], rows)
        # A second run may have filled the gaps of a first.
        commits = ', '.join(dict.fromkeys(row['commit'] for row in rows))
        seeds = f'{seeds_of(rows)} from {first["settings"]["seed"]} on'
        figures.footer(fig, f'commit {commits} · {seeds} · torch {first["torch"]}')
        figures.save(fig, path, palette=True)


def draw_speed(ax, column: Sequence[dict], rows: Sequence[dict]) -> None:
    key = 'train_tok_per_s'
    speeds = [row[key] for row in column]
    draw_bars(ax, speeds, column, rows)
    below = [row[key] - row[f'{key}_least'] for row in column]
    above = [row[f'{key}_most'] - row[key] for row in column]
    ax.errorbar(
        speeds,
        range(len(column)),
        xerr=[below, above],
        fmt='none',
        ecolor=figures.COLORS['ink'],
        linewidth=1,
    )
    ax.set_xlim(0, 1.04 * max(row[f'{key}_most'] for row in rows))
    ax.set_xlabel('training, tokens/s')


def draw_memory(ax, column: Sequence[dict], rows: Sequence[dict]) -> None:
    key = 'train_allocated_mib'
    draw_bars(ax, [row[key] / 1024 for row in column], column, rows)
    ax.set_xlim(0, 1.04 * max(row[key] for row in rows) / 1024)
    ax.set_xlabel('training, peak GiB')


def draw_bars(ax, values: list[float], column: Sequence[dict], rows: Sequence[dict]) -> None:
    """Draw a bar for each row of a column; `rows` are all that are in the picture."""
    positions = range(len(column))
    most_seeds = max(row['seeds'] for row in rows)
    ax.barh(positions, values, color=[color_of(row) for row in column], height=0.7)
    ax.set_yticks(positions, [tick_label(row, most_seeds) for row in column])
    ax.grid(axis='y', visible=False)
    ax.xaxis.get_major_locator().set_params(nbins=4)
    ax.xaxis.set_major_formatter(lambda x, _: figures.count(x))


def tick_label(row: dict, most_seeds: int) -> str:
    text = row['kernel']
    if row['peer']:
        text = f'peer {text}'
    if sees_the_future(row):
        text += ' (not causal)'
    if row['seeds'] < most_seeds:
        text += f' ({seeds_of([row])})'
    return text


def color_of(row: dict) -> str:
    if row['peer']:
        return figures.COLORS['peer']
    if sees_the_future(row):
        return figures.COLORS['muted']
    if row['kernel'] == 'mla':
        return figures.COLORS['mla']
    return figures.COLORS['mha']


def seeds_of(rows: Sequence[dict]) -> str:
    most = max(row['seeds'] for row in rows)
    return '1 seed' if most == 1 else f'{most} seeds'


def spread_note(rows: Sequence[dict]) -> str:
    seeds = seeds_of(rows)
    if seeds == '1 seed':
        return seeds
    return f'median of {seeds}, thin lines from least to most'
