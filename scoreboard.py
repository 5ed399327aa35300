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


def headline(record):
    """(name, value, whether more is better) of the number that stands for a record."""
    task, result = record['task'], record['result']
    if task == 'perplexity':
        return 'perplexity', result['perplexity'], False
    if 'cells' in result:
        return f'{task} ranked', result['ranked'], True
    metrics, name = result['metrics'], Path(task).stem
    for key in (f'{task} acc', 'acc_norm', 'acc', f'{task} score', 'score', 'exact_match'):
        if key in metrics:
            return f'{name} {key.split()[-1]}', metrics[key], True
    values = {key: value for key, value in metrics.items() if '_stderr' not in key}
    if len({key.split()[0] for key in values}) > 1 and len({key.split()[-1] for key in values}) == 1:  # several tasks, one metric
        return f'{name} {next(iter(values)).split()[-1]} (mean)', sum(values.values()) / len(values), True
    key = next(iter(values), 'no metric')
    return f'{name} {key}', values.get(key, float('nan')), 'perplexity' not in key and 'bits' not in key


def rows(records):
    """One dict for each model and cache format, in their order: what the table shows."""
    found, first = {}, {}
    for record in records:
        held = record['cache_bytes']
        row = found.setdefault((record['model'], record['cache']), dict(
            model=record['label'], kind=record['kind'], params=record['params'], dtype=record['dtype'], cache=record['cache'],
            bytes_per_token=held.get('bytes_per_token'), window_bytes=held.get('window_bytes')))
        if record['task'] == 'perplexity':
            base = first.setdefault(record['model'], record['result']['perplexity'])
            row |= {'perplexity': record['result']['perplexity'], 'change': record['result']['perplexity'] / base - 1,
                    'bits_per_byte': record['result']['bits_per_byte'], 'quantised': record['dequantised'], 'context': record['result']['context']}
        elif 'cells' in record['result']:
            row |= {f"{record['task']} {name}": record['result'][name] for name in ('exact', 'ranked')}
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
    cells = [[name.replace('_', ' ') for name in names]] + [[shown(name, row.get(name)) for name in names] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells)]
    left = {i for i, name in enumerate(names) if name in ('model', 'kind', 'dtype', 'cache')}
    lines = ['  '.join(cell.ljust(width) if i in left else cell.rjust(width) for i, (cell, width) in enumerate(zip(line, widths))).rstrip() for line in cells]
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
    parts = dict.fromkeys(f'commit {record["commit"]}' for record in records)
    parts |= dict.fromkeys([f'seed {seed}', *(record['device'] for record in records), *(record['date'] for record in records)])
    return ' · '.join(list(parts)[:6])


def draw(figures, records, path, footer):
    """
    Each task's headline over the bytes of a token, a line for each model through its cache formats. A model without
    a cache is a dashed line. At most six tasks.
    """
    panels = list(dict.fromkeys(record['task'] for record in records))[:6]
    cols = min(2, len(panels))
    rows = -(-len(panels) // cols)
    models = list(dict.fromkeys(record['label'] for record in records))
    note = 'over the bytes of one token in the cache, measured' + ('' if len(models) > 6 else '')
    with figures.sheet(rows, cols, size=(figures.WIDTH, 1.5 + 3.4 * rows), title='Models and their caches', note=note) as (fig, axes):
        axes = [axes] if len(panels) == 1 else list(axes.flat)
        for ax in axes[len(panels):]:
            ax.set_axis_off()
        for ax, task in zip(axes, panels):
            for n, label in enumerate(models):
                mine = [record for record in records if (record['task'], record['label']) == (task, label)]
                if not mine:
                    continue
                same = sum(1 for other in models[:n] if kind(records, other) == mine[0]['kind'])
                style = dict(color=figures.COLORS.get(mine[0]['kind'], figures.COLORS['ink']), linestyle=['-', '--', ':', '-.'][same % 4])
                points = sorted((record['cache_bytes']['bytes_per_token'], headline(record)[1], record['cache']) for record in mine if record['cache_bytes'])
                if points:
                    ax.plot([x for x, _, _ in points], [y for _, y, _ in points], label=figures.plain(label), linewidth=1.4, **style)
                for x, y, held in points:
                    ax.plot([x], [y], marker=MARKS.get(held.split()[1], 'o'), markersize=6.5, color=style['color'])
                for record in mine:
                    if not record['cache_bytes']:
                        ax.axhline(headline(record)[1], linewidth=1, color=style['color'], linestyle=(0, (2, 2)), label=figures.plain(f'{label}, no cache'))
            ax.set_title(figures.plain(headline(next(record for record in records if record['task'] == task))[0]))
            ax.set_xlabel('bytes per token')
            ax.set_xscale('log')
            ax.xaxis.set_major_formatter(lambda x, _: figures.count(x))
            ax.xaxis.set_minor_formatter(lambda x, _: '')
        axes[0].legend()
        figures.footer(fig, footer)
        figures.save(fig, path)


def kind(records, label):
    return next(record['kind'] for record in records if record['label'] == label)
