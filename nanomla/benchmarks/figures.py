"""
Two pictures of decode_meter's cells: the time of a step and the memory of a batch, over context, on log paper.
Colour is the attention, the line's kind is the cache: solid dense, dashed paged, dotted none.
"""

import math
import os

from nanomla.core import figures

LINES = {'dense': '-', 'paged': (0, (4, 2)), 'none': (0, (1, 1.6))}
BETWEEN = 0.052  # labels stand this share of an axis's height apart at least


def color_of(model):
    """The colour of 'mla:256+32' is MLA's; a checkpoint gets the ink."""
    return figures.COLORS.get(model.partition(':')[0], figures.COLORS['ink'])


def series(rows, value):
    """{(model, cache): [(context, value(row))]} of the rows that have one, contexts ascending."""
    found = {}
    for row in sorted(rows, key=lambda row: row['context']):
        if value(row):
            found.setdefault((row['model'], row['cache']), []).append((row['context'], value(row)))
    return found


def spaced(heights, apart, low=0.0, high=1.0):
    """
    Where labels stand: `apart` or more between neighbours, their order kept, all inside [low, high], and the sum of
    squared ways from `heights` the least there is (isotonic regression; if they cannot fit, they stand closer).
    """
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    apart = min(apart, (high - low) / max(1, len(heights) - 1))
    groups = []  # [sum, count] of heights less the room of those below, pooled until they ascend
    for n, i in enumerate(order):
        groups.append([heights[i] - n * apart, 1])
        while len(groups) > 1 and groups[-2][0] / groups[-2][1] > groups[-1][0] / groups[-1][1]:
            total, count = groups.pop()
            groups[-1] = [groups[-1][0] + total, groups[-1][1] + count]
    level = [total / count for total, count in groups for _ in range(count)]
    top, placed = high - (len(heights) - 1) * apart, [0.0] * len(heights)
    for n, i in enumerate(order):
        placed[i] = min(max(level[n], low), top) + n * apart
    return placed


def labels_of(ends, near):
    """
    One label for each line, dicts of model, caches and height, from {(model, cache): height of its end}; a dense and a
    paged line of one model that end `near` each other share theirs, and so do all lines without a cache (model '').
    """
    labels, plain = [], [height for (_, cache), height in ends.items() if cache == 'none']
    if len(plain) > 1 and max(plain) - min(plain) < near:
        labels.append(dict(model='', caches=['none'], height=sum(plain) / len(plain)))
        ends = {key: height for key, height in ends.items() if key[1] != 'none'}
    for (model, cache), height in sorted(
        ends.items(), key=lambda item: list(LINES).index(item[0][1])
    ):
        same = next(
            (
                label
                for label in labels
                if label['model'] == model
                and cache == 'paged'
                and abs(label['height'] - height) < near
            ),
            None,
        )
        if same:
            same['caches'].append(cache)
        else:
            labels.append(dict(model=model, caches=[cache], height=height))
    return labels


def context_name(tokens):
    return f'{tokens // 1024}k' if tokens % 1024 == 0 else f'{tokens:,}'


def panel(ax, found, title, unit, base):
    """One batch: its lines, and their names at their ends. `base` is that of the numbers on the upright axis."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

    contexts = sorted({context for points in found.values() for context, _ in points})
    values = [value for points in found.values() for _, value in points]
    ax.set_title(title)
    if not contexts:
        ax.set_xticks([])
        ax.set_yticks([])
        ax.text(
            0.5,
            0.5,
            'not measured on this machine',
            transform=ax.transAxes,
            ha='center',
            color=figures.COLORS['muted'],
        )
        return
    ax.set_xscale('log', base=2)
    ax.set_yscale('log', base=base)
    for (model, cache), points in found.items():
        ax.plot(
            *zip(*points),
            color=color_of(model),
            linestyle=LINES[cache],
            marker='o',
            markersize=3.5,
            linewidth=1.8,
        )
    ax.set_xticks(contexts, [context_name(context) for context in contexts])
    ax.xaxis.set_minor_locator(NullLocator())
    low, high = min(values) / 1.3, max(values) * 1.3
    ax.set_ylim(low, high)
    if base == 2:  # powers of 2, 4, 8 or 16 apart
        exponents = range(math.ceil(math.log2(low)), math.floor(math.log2(high)) + 1)
        ax.yaxis.set_major_locator(
            FixedLocator([2.0**e for e in exponents if e % -(-len(exponents) // 8) == 0])
        )
    else:
        ax.yaxis.set_major_locator(
            LogLocator(10, subs=(1,) if high / low > 300 else (1, 2, 5), numticks=12)
        )
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: unit(value)))
    to_axes = ax.transData + ax.transAxes.inverted()
    ends = {key: to_axes.transform(points[-1])[1] for key, points in found.items()}
    labels = labels_of(ends, 0.04)
    for label, at in zip(labels, spaced([label['height'] for label in labels], BETWEEN)):
        own = [
            points[-1][0]
            for (model, cache), points in found.items()
            if cache in label['caches'] and label['model'] in ('', model)
        ]
        x, name = to_axes.transform((max(own), low))[0], label['model'] or 'all,'
        if name != 'all,':
            name = (
                name.upper()
                if name.partition(':')[0] in figures.COLORS
                else os.path.basename(name.rstrip('/'))[-16:]
            )
        ax.annotate(
            f'{name} ' + ', '.join(label['caches']).replace('none', 'no cache'),
            (x, label['height']),
            xytext=(1.035, at),
            xycoords='axes fraction',
            textcoords='axes fraction',
            color=color_of(label['model']),
            fontsize=9,
            va='center',
            ha='left',
            annotation_clip=False,
            arrowprops=dict(
                arrowstyle='-',
                color=color_of(label['model']),
                linewidth=0.6,
                alpha=0.6,
                shrinkA=1,
                shrinkB=3,
                relpos=(0, 0.5),
            ),
        )


def time_unit(us):
    return f'{us / 1e6:g} s' if us >= 1e6 else f'{us / 1e3:g} ms' if us >= 1e3 else f'{us:g} µs'


def memory_unit(size):
    for power, name in ((30, 'GiB'), (20, 'MiB'), (10, 'KiB')):
        if size >= 2**power * 0.999:
            return f'{size / 2**power:.3g} {name}'
    return f'{size:g} B'


def draw(rows, out_path, value, unit, base, title, note):
    """One sheet: a panel for each batch, for the first cache dtype among the rows. None where there is nothing to draw."""
    cells = [row for row in rows if row['what'] == 'cell' and not row['reason']]
    if not cells:
        return None
    dtype = next((row['cache_dtype'] for row in cells if row['cache'] != 'none'), 'none')
    cells = [row for row in cells if row['cache_dtype'] in (dtype, 'none')]
    batches = sorted({row['batch'] for row in cells})[:3]
    with figures.sheet(cols=len(batches), size=(figures.WIDTH, 5.6), title=title, note=note) as (
        fig,
        axes,
    ):
        for batch, ax in zip(batches, [axes] if len(batches) == 1 else axes):
            panel(
                ax,
                series([row for row in cells if row['batch'] == batch], value),
                f'batch {batch}',
                unit,
                base,
            )
            ax.set_xlabel('context (tokens a sequence)')
        last = cells[-1]
        stored = (
            ''
            if dtype == 'none'
            else f', {dtype} caches'
            if dtype != 'auto'
            else f', {last["dtype"]} caches'
        )
        figures.footer(
            fig,
            f'{last["device"]} · {last["dtype"]} models{stored} · torch {last["torch"]} · commit {last["commit"]} · {last["date"]}',
        )
        figures.save(fig, out_path, palette=True)
    return out_path


def latency(rows, out_path):
    """µs of a decode step over context. The picture is written whole or not at all; UserError when it cannot be."""
    return draw(
        rows,
        out_path,
        lambda row: row['step_us'],
        time_unit,
        10,
        'Time of one decode step',
        'solid: dense cache · dashed: paged · dotted: no cache, the whole text runs again',
    )


def memory(rows, out_path):
    """Bytes that a batch takes over context: on a GPU the peak of the timed steps beyond the weights, on a CPU the cache's own."""
    on_gpu = any(row.get('step_peak_allocated') for row in rows)

    def bytes_of(row):
        return (
            max(1, row['step_peak_allocated'] - row['allocated_before'])
            if on_gpu
            else row.get('cache_bytes')
        )

    return draw(
        rows,
        out_path,
        bytes_of,
        memory_unit,
        2,
        'Memory of a batch while it decodes',
        'solid: dense cache · dashed: paged · '
        + (
            'dotted: no cache; most that a step takes beyond the weights'
            if on_gpu
            else 'bytes of the cache'
        ),
    )
