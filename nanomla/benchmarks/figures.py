"""
Pictures of bench.py's rows.

`draw_latency` and `draw_memory` show the decode steps over context, on log paper: colour is the
attention, the line's kind is the cache (solid dense, dashed paged, dotted none). `draw_scaling`
shows how tokens a second grow with GPUs, and what a step takes.
"""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from nanomla.core import figures

LINES = {'dense': '-', 'paged': (0, (4, 2)), 'none': (0, (1, 1.6))}
LABELS_APART = 0.052  # labels stand this share of an axis's height apart at least
SAME_END = 0.04  # lines whose ends are closer share a label
MOST_PANELS = 3
LONGEST_NAME = 16  # letters of a checkpoint's name, its last ones

Points = list[tuple[int, float]]  # (context, value), contexts ascending
Series = dict[tuple[str, str], Points]  # (model, cache) -> its points


# -------------------------------------------------------------------------------------------------
# where labels stand


def spaced(heights: list[float], apart: float, low: float = 0.0, high: float = 1.0) -> list[float]:
    """
    Return where labels stand: `apart` or more between neighbours, in their order, inside [low,
    high], with the least sum of squared ways from `heights` (isotonic regression).

    Labels that cannot fit stand closer.
    """
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    apart = min(apart, (high - low) / max(1, len(heights) - 1))
    # [sum, count] of heights less the room of the labels below, pooled until the means ascend
    groups = []
    for n, i in enumerate(order):
        groups.append([heights[i] - n * apart, 1])
        while len(groups) > 1 and mean(groups[-2]) > mean(groups[-1]):
            total, count = groups.pop()
            groups[-1][0] += total
            groups[-1][1] += count
    levels = []
    for group in groups:
        levels += [mean(group)] * group[1]
    top = high - (len(heights) - 1) * apart
    placed = [0.0] * len(heights)
    for n, i in enumerate(order):
        placed[i] = min(max(levels[n], low), top) + n * apart
    return placed


def mean(group: list) -> float:
    total, count = group
    return total / count


@dataclass
class Label:
    """A label of one or more lines. model: '' = all of them; height: where its lines end"""

    model: str
    caches: list[str]
    height: float

    @property
    def text(self) -> str:
        caches = ', '.join(self.caches).replace('none', 'no cache')
        if not self.model:
            return f'all, {caches}'
        if self.model.partition(':')[0] in figures.COLORS:
            return f'{self.model.upper()} {caches}'
        return f'{os.path.basename(self.model.rstrip("/"))[-LONGEST_NAME:]} {caches}'


def labels_of(ends: dict[tuple[str, str], float], near: float) -> list[Label]:
    """
    Return the labels of lines, from {(model, cache): height of its end}.

    A dense and a paged line of one model that end `near` each other share theirs, and so do all
    lines without a cache.
    """
    labels = []
    uncached = [height for (_, cache), height in ends.items() if cache == 'none']
    if len(uncached) > 1 and max(uncached) - min(uncached) < near:
        labels.append(Label('', ['none'], sum(uncached) / len(uncached)))
        ends = {line: height for line, height in ends.items() if line[1] != 'none'}
    by_cache = sorted(ends.items(), key=lambda end: list(LINES).index(end[0][1]))
    for (model, cache), height in by_cache:
        shared = None
        if cache == 'paged':
            shared = label_near(labels, model, height, near)
        if shared:
            shared.caches.append(cache)
        else:
            labels.append(Label(model, [cache], height))
    return labels


def label_near(labels: list[Label], model: str, height: float, near: float) -> Label | None:
    """Return the label of `model` at about this height, or None."""
    for label in labels:
        if label.model == model and abs(label.height - height) < near:
            return label
    return None


# -------------------------------------------------------------------------------------------------
# decode steps


@dataclass
class Quantity:
    """
    What the pictures of decode steps show.

    value: a row -> number, or None where it has none. uncached: what a step without a cache is.
    """

    title: str
    remark: str
    value: Callable[[dict], float | None]
    unit: Callable[[float], str]  # a number of the upright axis -> its text
    base: int  # of the upright axis's logarithm
    uncached: str = 'no cache'

    def note(self, rows: list[dict]) -> str:
        """Return the line below the title, which explains the lines that are drawn of `rows`."""
        meaning = dict(dense='solid: dense cache', paged='dashed: paged cache')
        meaning['none'] = f'dotted: {self.uncached}'
        drawn = {row['cache'] for row in rows if self.value(row)}
        parts = [text for cache, text in meaning.items() if cache in drawn]
        if self.remark:
            parts.append(self.remark)
        return ' · '.join(parts)


def draw_latency(rows: list[dict], path: str | Path) -> None:
    """Draw the µs of a decode step over context. Nothing is drawn without decode steps."""
    quantity = Quantity(
        title='Time of one decode step',
        remark='',
        uncached='no cache, the whole text runs again',
        value=lambda row: row['step_us'],
        unit=time_text,
        base=10,
    )
    draw_steps(rows, path, quantity)


def draw_memory(rows: list[dict], path: str | Path) -> None:
    """
    Draw the bytes that a batch takes over context: on a GPU the peak of the timed steps beyond the
    weights, on a CPU the cache's own.
    """
    quantity = Quantity(
        title='Memory of a batch while it decodes',
        remark='bytes of the cache',
        value=lambda row: row.get('cache_bytes'),
        unit=memory_text,
        base=2,
    )
    if any(row.get('step_peak_allocated') for row in rows):
        quantity.remark = 'most that a step takes beyond the weights'
        quantity.value = lambda row: max(1, row['step_peak_allocated'] - row['allocated_before'])
    draw_steps(rows, path, quantity)


def draw_steps(rows: list[dict], path: str | Path, quantity: Quantity) -> None:
    """Draw a panel for each batch size."""
    rows = [row for row in rows if row['what'] == 'cell' and not row['reason']]
    if not rows:
        return
    rows, dtype = comparable(rows)
    batches = sorted({row['batch'] for row in rows})[:MOST_PANELS]
    rows = [row for row in rows if row['batch'] in batches]
    with figures.sheet(
        cols=len(batches),
        size=(figures.WIDTH, 5.6),
        title=quantity.title,
        note=quantity.note(rows),
    ) as (fig, axes):
        if len(batches) == 1:
            axes = [axes]
        for batch, ax in zip(batches, axes):
            of_batch = [row for row in rows if row['batch'] == batch]
            ax.set_title(f'batch {batch}')
            draw_panel(ax, series_of(of_batch, quantity.value), quantity)
            ax.set_xlabel('context (tokens a sequence)')
        figures.footer(fig, footer_text(rows[-1], dtype))
        figures.save(fig, path, palette=True)


def comparable(rows: list[dict]) -> tuple[list[dict], str]:
    """
    Return the rows without a cache and those with the dtype and the kernel of the first cached row,
    and that dtype: 'none' where there is no cached row.
    """
    kinds = [(row['cache_dtype'], row.get('decode_kernel')) for row in rows if is_cached(row)]
    if not kinds:
        return rows, 'none'
    chosen = []
    for row in rows:
        if not is_cached(row) or (row['cache_dtype'], row.get('decode_kernel')) == kinds[0]:
            chosen.append(row)
    return chosen, kinds[0][0]


def is_cached(row: dict) -> bool:
    return row['cache'] != 'none'


def footer_text(row: dict, cache_dtype: str) -> str:
    """Return where the numbers come from, by the last of the rows."""
    models = f'{row["dtype"]} models'
    if cache_dtype != 'none':
        stored = row['dtype'] if cache_dtype == 'auto' else cache_dtype
        models += f', {stored} caches'
    parts = [row['device'], models, f'torch {row["torch"]}', f'commit {row["commit"]}', row['date']]
    return ' · '.join(parts)


def series_of(rows: list[dict], value: Callable[[dict], float | None]) -> Series:
    """Return the points of each line, of the rows that have a value."""
    series = {}
    for row in sorted(rows, key=lambda row: row['context']):
        if value(row):
            line = (row['model'], row['cache'])
            series.setdefault(line, []).append((row['context'], value(row)))
    return series


def color_of(model: str) -> str:
    """Return the colour of a model: that of 'mla:256+32' is MLA's, a checkpoint has the ink."""
    return figures.COLORS.get(model.partition(':')[0], figures.COLORS['ink'])


def draw_panel(ax, series: Series, quantity: Quantity) -> None:
    """Draw the lines of one batch size, and their names at their ends."""
    if not series:
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
    ax.set_yscale('log', base=quantity.base)
    for (model, cache), points in series.items():
        ax.plot(
            *zip(*points),
            color=color_of(model),
            linestyle=LINES[cache],
            marker='o',
            markersize=3.5,
            linewidth=1.8,
        )
    set_ticks(ax, series, quantity)
    to_axes = ax.transData + ax.transAxes.inverted()
    ends = {line: to_axes.transform(points[-1])[1] for line, points in series.items()}
    labels = labels_of(ends, SAME_END)
    heights = spaced([label.height for label in labels], LABELS_APART)
    for label, height in zip(labels, heights):
        draw_label(ax, label, height, end_of(ax, label, series))


def set_ticks(ax, series: Series, quantity: Quantity) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

    contexts, values = set(), []
    for points in series.values():
        contexts.update(context for context, _ in points)
        values += [value for _, value in points]
    contexts = sorted(contexts)
    ax.set_xticks(contexts, [context_text(context) for context in contexts])
    ax.xaxis.set_minor_locator(NullLocator())
    low, high = min(values) / 1.3, max(values) * 1.3
    ax.set_ylim(low, high)
    if quantity.base == 2:
        ax.yaxis.set_major_locator(FixedLocator(powers_of_two(low, high)))
    else:
        subs = (1,) if high / low > 300 else (1, 2, 5)
        ax.yaxis.set_major_locator(LogLocator(10, subs=subs, numticks=12))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: quantity.unit(value)))


def powers_of_two(low: float, high: float) -> list[float]:
    """Return at most eight powers of two between low and high, 2, 4, 8 or 16 apart."""
    exponents = range(math.ceil(math.log2(low)), math.floor(math.log2(high)) + 1)
    every = math.ceil(len(exponents) / 8)
    return [2.0**exponent for exponent in exponents if exponent % every == 0]


def end_of(ax, label: Label, series: Series) -> float:
    """Return where the longest of a label's lines ends, as a share of the axis's width."""
    last = 0
    for (model, cache), points in series.items():
        if cache in label.caches and label.model in ('', model):
            last = max(last, points[-1][0])
    to_axes = ax.transData + ax.transAxes.inverted()
    return to_axes.transform((last, ax.get_ylim()[0]))[0]


def draw_label(ax, label: Label, height: float, end: float) -> None:
    """Write a label right of the axes, with a thin line to where its lines end."""
    color = color_of(label.model)
    ax.annotate(
        label.text,
        (end, label.height),
        xytext=(1.035, height),
        xycoords='axes fraction',
        textcoords='axes fraction',
        color=color,
        fontsize=9,
        va='center',
        ha='left',
        annotation_clip=False,
        arrowprops=dict(
            arrowstyle='-',
            color=color,
            linewidth=0.6,
            alpha=0.6,
            shrinkA=1,
            shrinkB=3,
            relpos=(0, 0.5),
        ),
    )


def context_text(tokens: int) -> str:
    if tokens % 1024 == 0:
        return f'{tokens // 1024}k'
    return f'{tokens:,}'


def time_text(us: float) -> str:
    if us >= 1e6:
        return f'{us / 1e6:g} s'
    if us >= 1e3:
        return f'{us / 1e3:g} ms'
    return f'{us:g} µs'


def memory_text(size: float) -> str:
    for power, name in ((30, 'GiB'), (20, 'MiB'), (10, 'KiB')):
        if size >= 2**power * 0.999:
            return f'{size / 2**power:.3g} {name}'
    return f'{size:g} B'


# -------------------------------------------------------------------------------------------------
# data parallelism

SCALING_LINES = ('-', (0, (4, 2)), (0, (1, 1.5)))
SCALING_MARKERS = 'os^D'

ScalingLine = tuple[str, int, int]  # model, batch size, micro-batches


def draw_scaling(rows: list[dict], path: str | Path) -> None:
    """
    Draw rows of `bench.py scale`: model, processes, micro_batches, speedup, ms, ms_least, ms_most,
    config, device, commit, torch. Of two with the same line and processes the later one counts.
    """
    lines = scaling_lines(rows)
    rows = sum(lines.values(), [])
    processes = sorted({row['processes'] for row in rows})
    with figures.sheet(
        cols=2,
        title='Data parallelism: the same batch on each GPU',
        note='Left: tokens a second of n GPUs as a share of n times one GPU. '
        'Right: median, least and most of a step.',
    ) as (fig, (left, right)):
        left.axhline(100, color=figures.COLORS['muted'], lw=1)
        least = 100
        for number, (line, points) in enumerate(sorted(lines.items())):
            style = scaling_style(number, line, lines, points)
            x = [row['processes'] for row in points]
            efficiency = [100 * row['speedup'] / row['processes'] for row in points]
            least = min(least, *efficiency)
            left.plot(x, efficiency, label=scaling_label(line, points[-1]), **style)
            ms = [row['ms'] for row in points]
            below = [row['ms'] - row['ms_least'] for row in points]
            above = [row['ms_most'] - row['ms'] for row in points]
            right.errorbar(x, ms, [below, above], capsize=3, **style)
        for ax, label in ((left, 'efficiency, %'), (right, 'ms a step')):
            limits = (0.8, processes[-1] + 0.2)
            ax.set(xlabel='GPUs', ylabel=label, xticks=processes, xlim=limits)
        right.set_ylim(0, 1.12 * max(row['ms_most'] for row in rows))
        left.set_ylim(least - 2.5 - 0.8 * len(lines), 101)  # room for the legend
        left.legend(loc='lower left')
        figures.footer(fig, ' · '.join(origins(rows)))
        figures.save(fig, path)


def scaling_lines(rows: list[dict]) -> dict[ScalingLine, list[dict]]:
    """Return the rows of each line by their number of processes."""
    latest = {}
    for row in rows:
        line = (row['model'], row['config']['batch_size'], row['micro_batches'])
        latest[line, row['processes']] = row
    lines = {}
    for (line, _), row in sorted(latest.items(), key=lambda item: item[0][1]):
        lines.setdefault(line, []).append(row)
    return lines


def scaling_style(
    number: int, line: ScalingLine, lines: dict[ScalingLine, list[dict]], points: list[dict]
) -> dict:
    """Return the style of a line: a colour for its attention, a pattern for its batches."""
    model, *batches = line
    of_model = [other[1:] for other in sorted(lines) if other[0] == model]
    pattern = of_model.index(tuple(batches))
    return dict(
        color=color_of(points[0]['config']['attention']),
        marker=SCALING_MARKERS[number % len(SCALING_MARKERS)],
        ls=SCALING_LINES[pattern % len(SCALING_LINES)],
    )


def scaling_label(line: ScalingLine, last: dict) -> str:
    model, batch, micro_batches = line
    if micro_batches > 1:
        batch = f'{micro_batches} x {batch}'
    return f'{model}, batch {batch}: {last["speedup"]:.2f} x on {last["processes"]}'


def origins(rows: list[dict]) -> list[str]:
    """Return the devices, versions and commits of the rows, each once."""
    found = [f'{row["device"]} · torch {row["torch"]} · commit {row["commit"]}' for row in rows]
    return list(dict.fromkeys(found))
