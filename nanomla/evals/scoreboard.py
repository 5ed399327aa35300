"""
What evaluate.py has measured: its file of results, its table as text and CSV, its picture.

A record is one cell: model, cache format and task, with `result` (what the task found), `cache_bytes` (measured on
the cache's buffers) and `dequantised` (share of the attended tokens that came out of codes). A row is a model and
cache format with all its tasks.
"""

import io
import json
from pathlib import Path

MARKS = dict(float32='s', bfloat16='o', float16='o', int8='D', int4='v')


def read(path):
    """key -> record of a results.jsonl, the later one where there are two; a line that a kill left unfinished is skipped."""
    found = {}
    if Path(path).exists():
        for line in Path(path).read_text(encoding='utf-8', errors='replace').splitlines():
            try:
                record = json.loads(line)
                found[record['key']] = record
            except (ValueError, KeyError, TypeError):
                continue
    return found


def add(path, record):
    """Appends a record, on a line of its own also behind what a kill left unfinished."""
    with open(path, 'a+b') as file:
        whole = not file.tell() or file.seek(-1, 2) >= 0 and file.read(1) == b'\n'
        file.write(b'\n' * (not whole) + json.dumps(record).encode() + b'\n')


def headline(record):
    """(name, value, whether more is better) of the number that stands for a record."""
    task, result = record['task'], record['result']
    if task == 'perplexity':
        return 'perplexity', result['perplexity'], False
    if 'cells' in result:
        return f'{task} pairwise', result['pairwise'], True
    metrics, name = result['metrics'], Path(task).stem
    for key in (f'{task} acc', 'acc_norm', 'acc', f'{task} score', 'score', 'exact_match'):
        if key in metrics:
            return f'{name} {key.split()[-1]}', metrics[key], True
    values = {key: value for key, value in metrics.items() if '_stderr' not in key}
    if (
        len({key.split()[0] for key in values}) > 1
        and len({key.split()[-1] for key in values}) == 1
    ):  # several tasks, one metric
        return (
            f'{name} {next(iter(values)).split()[-1]} (mean)',
            sum(values.values()) / len(values),
            True,
        )
    key = next(iter(values), 'no metric')
    return (
        f'{name} {key}',
        values.get(key, float('nan')),
        'perplexity' not in key and 'bits' not in key,
    )


def rows(records):
    """One dict for each model and cache format, in their order: what the table shows."""
    found, first = {}, {}
    for record in records:
        held = record['cache_bytes']
        row = found.setdefault(
            (record['model'], record['cache']),
            dict(
                model=record['label'],
                kind=record['kind'],
                params=record['params'],
                dtype=record['dtype'],
                cache=record['cache'],
                bytes_per_token=held.get('bytes_per_token'),
                window_bytes=held.get('window_bytes'),
            ),
        )
        if record['task'] == 'perplexity':
            base = first.setdefault(record['model'], record['result']['perplexity'])
            row |= {
                'perplexity': record['result']['perplexity'],
                'change': record['result']['perplexity'] / base - 1,
                'bits_per_byte': record['result']['bits_per_byte'],
                'quantised': record['dequantised'],
                'context': record['result']['context'],
            }
        elif 'cells' in record['result']:
            row |= {
                f'{record["task"]} {name}': record['result'][name]
                for name in ('exact', 'ranked', 'pairwise')
            }
        else:
            name, value, _ = headline(record)
            row[name] = value
    return list(found.values())


def shown(name, value):
    if value is None or value == '':
        return '-'
    if name == 'params':
        return f'{value / 1e6:,.2f}M'
    if name in ('bytes_per_token', 'window_bytes', 'context'):
        return f'{value:,.0f}' if value == int(value) else f'{value:,.1f}'
    if name == 'change':
        return f'{value:+.3%}'
    if name == 'quantised':
        return f'{value:.0%}'
    return f'{value:.4f}' if isinstance(value, float) else str(value)


def columns(rows):
    return list(dict.fromkeys(name for row in rows for name in row))


def table(rows):
    """Text with a line for each row; `change` is of the perplexity against the model's first format."""
    names = columns(rows)
    cells = [[name.replace('_', ' ') for name in names]] + [
        [shown(name, row.get(name)) for name in names] for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(*cells)]
    left = {i for i, name in enumerate(names) if name in ('model', 'kind', 'dtype', 'cache')}
    lines = [
        '  '.join(
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths))
        ).rstrip()
        for line in cells
    ]
    return '\n'.join(lines)


def csv(rows):
    import csv as writer

    text = io.StringIO()
    out = writer.DictWriter(text, columns(rows), lineterminator='\n')
    out.writeheader()
    out.writerows(rows)
    return text.getvalue()


def footer(records, seed):
    """The line under the pictures: where the numbers come from."""
    commits, devices, dates = (
        list(dict.fromkeys(record[name] for record in records))
        for name in ('commit', 'device', 'date')
    )
    return ' · '.join(
        [f'commit {", ".join(commits[:3])}', f'seed {seed}', ', '.join(devices[:2]), dates[-1]]
    )


def draw(figures, records, path, footer):
    """
    Each task's headline over the bytes of a token, a line for each model through the best of its cache formats; of a
    perplexity also what a format costs against the model's first. No cache is a dashed line. At most six panels.
    """
    tasks = list(dict.fromkeys(record['task'] for record in records))
    models = list(dict.fromkeys(record['label'] for record in records))
    panels = [(task, False) for task in tasks]
    if 'perplexity' in tasks and len(rows(records)) > len(models):
        panels.insert(tasks.index('perplexity') + 1, ('perplexity', True))
    panels, cols = panels[:6], min(2, len(panels))
    height = -(-len(panels) // cols)
    with figures.sheet(
        height,
        cols,
        size=(figures.WIDTH, 1.6 + 3.5 * height),
        title='Models and their caches',
        note='over the bytes that one token takes in the cache, measured on its buffers; w: window of full precision',
    ) as (fig, axes):
        from matplotlib.ticker import LogLocator

        axes = [axes] if len(panels) == 1 else list(axes.flat)
        for ax in axes[len(panels) :]:
            ax.set_axis_off()
        for ax, (task, relative) in zip(axes, panels):
            drawn = []
            for label in models:
                mine = [
                    record
                    for record in records
                    if (record['task'], record['label']) == (task, label)
                ]
                values = [headline(record)[1] for record in mine]
                if relative:
                    values = [100 * (value / values[0] - 1) for value in values]
                drawn.append(
                    (
                        label,
                        [
                            (record['cache_bytes'].get('bytes_per_token'), value, record['cache'])
                            for record, value in zip(mine, values)
                        ],
                    )
                )
            name, _, more = headline(next(record for record in records if record['task'] == task))
            ax.set_xscale('log')
            for label, points in drawn:
                line(
                    ax,
                    figures,
                    label,
                    points,
                    more and not relative,
                    style_of(records, models, label, figures),
                )
            ax.margins(x=0.14, y=0.3)
            if 'pairwise' in name:  # a share: its whole range, with what guessing gets
                ax.set_ylim(0, 1.08)
                ax.axhline(0.5, linewidth=1, color=figures.COLORS['muted'])
            name_points(ax, [point for _, points in drawn for point in points if point[0]])
            ax.set_title(figures.plain(f'{name}, % above the first format' if relative else name))
            ax.set_xlabel('bytes per token')
            ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            ax.xaxis.set_major_formatter(lambda x, _: figures.count(x))
            ax.xaxis.set_minor_formatter(lambda x, _: '')
        axes[0].legend(fontsize=9)
        figures.footer(fig, footer)
        figures.save(fig, path)


def line(ax, figures, label, points, more, style):
    """One model: its formats as marks, a line through the best at each number of bytes."""
    best = {}
    for x, y, held in points:
        if x is None:
            ax.axhline(
                y,
                linewidth=1,
                color=style['color'],
                linestyle=(0, (2, 2)),
                label=figures.plain(f'{label}, no cache'),
            )
            continue
        best[x] = y if x not in best else (max if more else min)(best[x], y)
        ax.plot(
            [x], [y], marker=MARKS.get(held.split()[1], 'o'), markersize=6, color=style['color']
        )
    if best:
        ax.plot(
            sorted(best),
            [best[x] for x in sorted(best)],
            label=figures.plain(label),
            linewidth=1.4,
            **style,
        )


def name_points(ax, points):
    """The formats beside their marks; those that lie on each other share a line."""
    low, high = ax.get_ylim()
    groups = []
    for x, y, held in sorted(points, key=lambda point: point[:2]):
        if groups and groups[-1][0] == x and y - groups[-1][1] < 0.06 * (high - low):
            groups[-1][2].append(held)
        else:
            groups.append((x, y, [held]))
    for x, y, held in groups:
        stored = list(dict.fromkeys(' '.join(one.split()[1:2]) for one in held))
        kept = sorted({int(one.split()[3]) for one in held if 'window' in one})
        text = (
            ', '.join(stored)
            + (f' w {kept[0]}' if kept else '')
            + (f' to {kept[-1]}' if kept[1:] else '')
        )
        ax.annotate(
            text,
            (x, y),
            xytext=(2, 5),
            textcoords='offset points',
            ha='left',
            va='bottom',
            rotation=35,
            rotation_mode='anchor',
            fontsize=7.5,
        )


def style_of(records, models, label, figures):
    """The colour of the model's kind, and another dash for each further model of that kind."""
    kinds = {record['label']: record['kind'] for record in records}
    same = sum(kinds[other] == kinds[label] for other in models[: models.index(label)])
    return dict(
        color=figures.COLORS.get(kinds[label], figures.COLORS['ink']),
        linestyle=['-', '--', ':', '-.'][same % 4],
    )
