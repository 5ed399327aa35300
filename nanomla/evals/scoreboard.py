"""
What eval.py has measured: its file of results, its table as text and CSV, its picture.

A record is one cell: model, cache format and task, with `result` (what the task found),
`cache_bytes` (measured on the cache's buffers) and `dequantised` (share of the attended tokens that
came out of codes). A row of the table is a model and cache format with all its tasks.
"""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

from nanomla.core import figures
from nanomla.core.checks import (
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
from nanomla.core.files import appending, csv_table, parse_row, text_table, write_file
from nanomla.evals import retrieval

# The metrics that stand for a task of the harness, the first that it has. {task}: of several tasks,
# the one that sums them up.
PREFERRED = ('{task} acc', 'acc_norm', 'acc', '{task} score', 'score', 'exact_match')

MARKERS = dict(float32='s', bfloat16='o', float16='o', int8='D', int4='v')
DASHES = ('-', '--', ':', '-.')
LEFT = ('model', 'kind', 'dtype', 'cache')  # columns of words
WHOLE = ('bytes_per_token', 'window_bytes', 'context')  # columns of whole numbers
MOST_PANELS = 6

RECORD = dict(  # what a record must have
    key=TEXT,
    model=TEXT,
    kind=TEXT,
    params=whole(least=0),
    dtype=TEXT,
    cache=TEXT,
    cache_bytes=table_of(number() | None),
    dequantised=number() | None,
    task=TEXT,
    result=TABLE,
    commit=TEXT,
    device=TEXT,
)
RETRIEVAL = dict(cells=list_of(TABLE), pairwise=number())
CELL = dict.fromkeys(('length', 'depth', *retrieval.METRICS), number())


# -------------------------------------------------------------------------------------------------
# the file of results


def read(path: str | Path) -> dict[str, dict]:
    """
    Return the records of a results.jsonl by their key, the later one where there are two. A line
    that a kill left unfinished is skipped. UserError for the results of another script.
    """
    records = {}
    if not Path(path).exists():
        return records
    for line in Path(path).read_bytes().split(b'\n'):
        record = parse_row(line)
        if record is None:
            continue
        if 'key' not in record:
            raise UserError(f'{path} holds results of another script: name another --out_dir')
        try:
            check_record(record)
        except ValueError:
            continue
        records[record['key']] = record
    return records


def check_record(record: object) -> None:
    """Raise a ValueError unless `record` has what the table and the pictures read."""
    check_entries(record, RECORD, needed=RECORD)
    cache = record['cache'].split()
    if len(cache) < 2 and cache != ['none']:
        raise ValueError(f'cache is {shortened(record["cache"])}')
    result = record['result']
    if record['task'] == 'perplexity':
        check_entries(result, dict(perplexity=number()), needed=['perplexity'])
    elif 'cells' in result:
        check_entries(result, RETRIEVAL, needed=RETRIEVAL)
        for cell in result['cells']:
            check_entries(cell, CELL, needed=CELL)
    else:
        check_entries(result, dict(metrics=table_of(number())), needed=['metrics'])


def add(path: str | Path, record: dict) -> None:
    """Append a record; an unfinished line that a kill has left is removed."""
    with appending(path) as file:
        file.write(json.dumps(record) + '\n')


def nothing_quantised(record: dict) -> bool:
    """Return whether a quantised cache was measured, but never read back from its codes."""
    stored = record['cache'].split()[1:2]
    return record['dequantised'] == 0 and stored in (['int8'], ['int4'])


def write_results(records: list[dict], folder: Path) -> None:
    """Write the records as JSON, and their table as CSV."""
    write_file(folder / 'results.json', json.dumps(records, indent=1))
    write_file(folder / 'results.csv', csv_table(rows(records)))


def draw_results(records: list[dict], folder: Path, seed: int) -> None:
    """Draw the records, and the maps of those that retrieve."""
    line = footer(records, seed)
    draw(records, folder / 'results.png', line)
    for task in retrieval.TASKS:
        results = []
        for record in records:
            if record['task'] == task:
                results.append((f'{record["label"]}, {record["cache"]}', record['result']))
        if results:
            retrieval.heat_map(results, task, folder / f'{task}.png', line)


# -------------------------------------------------------------------------------------------------
# the table


class Headline(NamedTuple):
    """The number that stands for a record."""

    name: str
    value: float
    more_is_better: bool


def headline(record: dict) -> Headline:
    task, result = record['task'], record['result']
    if task == 'perplexity':
        return Headline('perplexity', result['perplexity'], False)
    if 'cells' in result:
        return Headline(f'{task} pairwise', result['pairwise'], True)
    return headline_of_harness(task, result['metrics'])


def headline_of_harness(task: str, metrics: dict[str, float]) -> Headline:
    name = Path(task).stem
    for key in PREFERRED:
        key = key.format(task=task)
        if key in metrics:
            return Headline(f'{name} {key.split()[-1]}', metrics[key], True)
    values = {key: value for key, value in metrics.items() if '_stderr' not in key}
    tasks = {key.split()[0] for key in values}
    names = {key.split()[-1] for key in values}
    if len(tasks) > 1 and len(names) == 1:  # several tasks, one metric
        mean = sum(values.values()) / len(values)
        return Headline(f'{name} {names.pop()} (mean)', mean, True)
    key = next(iter(values), 'no metric')
    more_is_better = 'perplexity' not in key and 'bits' not in key
    return Headline(f'{name} {key}', values.get(key, float('nan')), more_is_better)


def rows(records: list[dict]) -> list[dict]:
    """Return one row for each model and cache format, in their order."""
    found, first_perplexity = {}, {}
    for record in records:
        cell = record['model'], record['cache']
        if cell not in found:
            found[cell] = row_of(record)
        row, task, result = found[cell], record['task'], record['result']
        if task == 'perplexity':
            base = first_perplexity.setdefault(record['model'], result['perplexity'])
            row['perplexity'] = result['perplexity']
            row['change'] = result['perplexity'] / base - 1
            row['bits_per_byte'] = result['bits_per_byte']
            row['quantised'] = record['dequantised']
            row['context'] = result['context']
        elif 'cells' in result:
            for metric in ('exact', 'ranked', 'pairwise'):
                row[f'{task} {metric}'] = result[metric]
        else:
            name, value, _ = headline(record)
            row[name] = value
    return list(found.values())


def row_of(record: dict) -> dict:
    """Return a row without its tasks."""
    return dict(
        model=record['label'],
        kind=record['kind'],
        params=record['params'],
        dtype=record['dtype'],
        cache=record['cache'],
        bytes_per_token=record['cache_bytes'].get('bytes_per_token'),
        window_bytes=record['cache_bytes'].get('window_bytes'),
    )


def shown(name: str, value) -> str:
    """Return the text of a cell of the table."""
    if value is None or value == '':
        return '-'
    if name == 'params':
        return f'{value / 1e6:,.2f}M'
    if name in WHOLE:
        return f'{value:,.0f}' if value == int(value) else f'{value:,.1f}'
    if name == 'change':
        return f'{value:+.3%}'
    if name == 'quantised':
        return f'{value:.0%}'
    return f'{value:.4f}' if isinstance(value, float) else str(value)


def table(rows: list[dict]) -> str:
    """
    Return the rows as text, a line for each. `change` is of the perplexity against the model's
    first format.
    """
    names = {}
    for row in rows:
        names |= dict.fromkeys(row)
    cells = [{name.replace('_', ' '): shown(name, row.get(name)) for name in names} for row in rows]
    return text_table(cells, names=['model', 'cache'], left=LEFT)


def footer(records: list[dict], seed: int) -> str:
    """Return the line under the pictures: where the numbers come from."""
    commits = unique(record['commit'] for record in records)
    devices = unique(record['device'] for record in records)
    commit = ', '.join(commits[:3])
    device = ', '.join(devices[:2])
    return f'commit {commit} · seed {seed} · {device} · {records[-1]["date"]}'


def unique(items) -> list:
    return list(dict.fromkeys(items))


# -------------------------------------------------------------------------------------------------
# the picture


class Point(NamedTuple):
    """A cache format in a panel: the bytes of one token (None without a cache) and the result."""

    bytes: float | None
    value: float
    cache: str


def draw(records: list[dict], path: Path, footer: str) -> None:
    """
    Draw each task's headline over the bytes of a token, a line for each model through the best of
    its cache formats; of a perplexity also what a format costs against the model's first. A model
    without a cache is a dashed line.
    """
    models = unique(record['label'] for record in records)
    panels = []  # task, and whether relative to the model's first format
    for task in unique(record['task'] for record in records):
        panels.append((task, False))
        if task == 'perplexity' and len(rows(records)) > len(models):
            panels.append((task, True))
    panels = panels[:MOST_PANELS]
    columns = min(2, len(panels))
    height = -(-len(panels) // columns)
    look = dict(
        size=(figures.WIDTH, 1.6 + 3.5 * height),
        title='Models and their caches',
        note='over the bytes that one token takes in the cache, measured on its buffers; '
        'w: window of full precision',
    )
    with figures.sheet(height, columns, **look) as (fig, axes):
        axes = list(np.ravel(axes))
        for ax, (task, relative) in zip(axes, panels):
            of_task = [record for record in records if record['task'] == task]
            draw_panel(ax, of_task, models, relative)
        for ax in axes[len(panels) :]:
            ax.set_axis_off()
        axes[0].legend(fontsize=9)
        figures.footer(fig, footer)
        figures.save(fig, path)


def draw_panel(ax, records: list[dict], models: list[str], relative: bool) -> None:
    """Draw the records of one task."""
    from matplotlib.ticker import LogLocator

    name, _, more_is_better = headline(records[0])
    ax.set_xscale('log')
    points = []
    for label in models:
        own = points_of([record for record in records if record['label'] == label], relative)
        draw_model(
            ax, label, own, more_is_better and not relative, style_of(records, models, label)
        )
        points += own
    ax.margins(x=0.14, y=0.3)
    if 'pairwise' in name:  # a share: its whole range, with what guessing gets
        ax.set_ylim(0, 1.08)
        ax.axhline(0.5, linewidth=1, color=figures.COLORS['muted'])
    name_points(ax, [point for point in points if point.bytes])
    title = f'{name}, % above the first format' if relative else name
    ax.set_title(figures.plain(title))
    ax.set_xlabel('bytes per token')
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.xaxis.set_major_formatter(lambda x, _: figures.count(x))
    ax.xaxis.set_minor_formatter(lambda x, _: '')


def points_of(records: list[dict], relative: bool) -> list[Point]:
    """Return the points of one model, `relative` in per cent above its first."""
    points = []
    for record in records:
        value = headline(record).value
        if relative:
            value = 100 * (value / headline(records[0]).value - 1)
        points.append(Point(record['cache_bytes'].get('bytes_per_token'), value, record['cache']))
    return points


def draw_model(ax, label: str, points: list[Point], more_is_better: bool, style: dict) -> None:
    """Draw a model's formats as marks, with a line through the best at each number of bytes."""
    better = max if more_is_better else min
    best = {}
    for point in points:
        if point.bytes is None:
            no_cache = figures.plain(f'{label}, no cache')
            dashed = dict(linewidth=1, color=style['color'], linestyle=(0, (2, 2)))
            ax.axhline(point.value, label=no_cache, **dashed)
            continue
        best[point.bytes] = better(point.value, best.get(point.bytes, point.value))
        marker = MARKERS.get(point.cache.split()[1], 'o')
        ax.plot([point.bytes], [point.value], marker=marker, markersize=6, color=style['color'])
    if best:
        x = sorted(best)
        y = [best[size] for size in x]
        ax.plot(x, y, label=figures.plain(label), linewidth=1.4, **style)


def name_points(ax, points: list[Point]) -> None:
    """Write the formats beside their marks; those that lie on each other share a text."""
    low, high = ax.get_ylim()
    near = 0.06 * (high - low)
    groups = []
    for point in sorted(points):
        if groups:
            first = groups[-1][0]
            if first.bytes == point.bytes and point.value - first.value < near:
                groups[-1].append(point)
                continue
        groups.append([point])
    look = dict(xytext=(2, 5), textcoords='offset points', ha='left', va='bottom', fontsize=7.5)
    for group in groups:
        place = group[0].bytes, group[0].value
        text = format_names([point.cache for point in group])
        ax.annotate(text, place, rotation=35, rotation_mode='anchor', **look)


def format_names(caches: list[str]) -> str:
    """Return what several formats have in common: 'int8, int4 w 64 to 128'."""
    # A cache's name is 'dense int8 window 128', with the window only where it is quantised.
    text = ', '.join(unique(' '.join(cache.split()[1:2]) for cache in caches))
    windows = sorted({int(cache.split()[3]) for cache in caches if 'window' in cache})
    if windows:
        text += f' w {windows[0]}'
    if len(windows) > 1:
        text += f' to {windows[-1]}'
    return text


def style_of(records: list[dict], models: list[str], label: str) -> dict:
    """Return the colour of the model's kind, and another dash for each further one of the kind."""
    kinds = {record['label']: record['kind'] for record in records}
    before = models[: models.index(label)]
    same = [other for other in before if kinds.get(other) == kinds[label]]
    color = figures.COLORS.get(kinds[label], figures.COLORS['ink'])
    return dict(color=color, linestyle=DASHES[len(same) % len(DASHES)])
