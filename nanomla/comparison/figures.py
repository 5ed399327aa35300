"""
The pictures of what a comparison found: losses over steps, time and cache, differences, speeds.

All numbers are those of nanomla.comparison.table: `found` are its rows, `paint` a colour for each
contender's name. Losses are in nats a token, caches in bytes a token (bf16), intervals those of
Student's t (95 %).
"""

import math
import os
import statistics
import textwrap
from dataclasses import dataclass

from nanomla.comparison.table import (
    Results,
    decode_of,
    facts,
    front,
    rows,
    share,
    speed,
    t_quantile,
)
from nanomla.core import figures

MARKS = 'oDs^vPX*'  # of comparisons in one picture
LINES = ('-', (0, (5, 2)), (0, (1.5, 1.5)), (0, (5, 2, 1.5, 2)))  # where shades are many
SIDE_BY_SIDE = 4  # so many contenders share a row of panels; with more each panel has its own
NAMED_IN_LEGEND = 12  # with more contenders the ends of their curves are named instead
NAMED_POINTS = 6  # with more points they have numbers, and a list beside them
WIDE_PANEL, NARROW_PANEL = 7.4, 3.2  # inches of the axes of `pareto`, about
POINT_WIDTH = 0.11  # inches
# of attentions without a colour of their own
OTHER_KINDS = ('#7B4EA3', '#A6761D', '#C51B7D', '#4D4D4D', '#17A2B8', '#6B8E23', '#8C564B')
SAMPLE_LINES = 11
SAMPLE_COLUMNS = {1: 120, 2: 62, 3: 42}  # samples beside each other -> letters in a line


def colors(contenders: dict[str, dict]) -> dict[str, str]:
    """
    Return a colour for each contender: that of its attention.

    Attentions without a colour of their own take the next of OTHER_KINDS. Several contenders of one
    kind have shades, from dark to light.
    """
    figures.require_matplotlib()
    from matplotlib.colors import to_hex, to_rgb

    paint = {}
    kinds = list(dict.fromkeys(about['kind'] for about in contenders.values()))
    others = [kind for kind in kinds if kind not in figures.COLORS]
    own = {kind: OTHER_KINDS[number % len(OTHER_KINDS)] for number, kind in enumerate(others)}
    for kind in kinds:
        names = [name for name, about in contenders.items() if about['kind'] == kind]
        base = to_rgb({**figures.COLORS, **own}[kind])
        for number, name in enumerate(names):
            depth = 0.0  # negative: towards black; positive: towards white
            if len(names) > 1:
                depth = -0.45 + 0.85 * number / (len(names) - 1)
            if depth < 0:
                shade = [part * (1 + depth) for part in base]
            else:
                shade = [part + (1 - part) * depth for part in base]
            paint[name] = to_hex(shade)
    return paint


def outliers(found: list[dict]) -> set[str]:
    """
    Return the names of rows whose loss is too high to be drawn to scale; they are named instead.

    Those are the rows above a gap of more than 2.5 times the range of all that is below it, if
    that are at least four rows.
    """
    known = sorted((row['val_loss'], row['name']) for row in found if row['val_loss'] is not None)
    for number in range(4, len(known)):
        gap = known[number][0] - known[number - 1][0]
        below = known[number - 1][0] - known[0][0]
        if gap > 2.5 * below > 0:
            return {name for _, name in known[number:]}
    return set()


# -------------------------------------------------------------------------------------------------
# loss over cache


def pareto(ax, found: list[dict], paint: dict, compact: bool = False) -> None:
    """
    Draw the loss over cache bytes per token, and the Pareto front as steps.

    Bars are the intervals of the means over seeds. Points of about one cache stand side by side.
    compact: the panel has half the width of the sheet.
    """
    known = with_point(found)
    far = outliers(found)
    groups = groups_of(found, compact)
    bounds = []
    for row in known:
        if row['name'] in far:
            _name_outlier(ax, row, paint)
        else:
            bounds += _loss_bar(ax, row, groups.x[row['name']], paint)
    if len(set(bounds)) > 1:
        room = max(bounds) - min(bounds)
        above = 0.2 if far else 0.08  # for the names of outliers
        ax.set_ylim(min(bounds) - 0.08 * room, max(bounds) + above * room)
    best = front(found)
    on_front = sorted(
        (row['cache_bytes'], row['val_loss'], groups.x.get(row['name'], row['cache_bytes']))
        for row in known
        if row['name'] in best
    )
    if len(on_front) > 1:
        ax.step(
            [x for _, _, x in on_front],
            [loss for _, loss, _ in on_front],
            where='post',
            color=figures.COLORS['muted'],
            linewidth=1,
            linestyle=(0, (4, 3)),
            zorder=1,
            label='Pareto front',
        )
        # Above the panel, on the right: inside it would cover points or intervals.
        ax.legend(
            loc='lower right',
            bbox_to_anchor=(1, 1),
            borderaxespad=0.2,
            borderpad=0,
            handlelength=1.4,
            fontsize=9,
        )
    _cache_axis(ax, groups)
    ax.set_ylabel('val loss (nats per token)')


def with_point(found: list[dict]) -> list[dict]:
    """Return the rows that have a loss and a cache."""
    return [row for row in found if row['val_loss'] is not None and row['cache_bytes']]


def groups_of(found: list[dict], compact: bool = False) -> 'CacheGroups':
    known, far = with_point(found), outliers(found)
    if compact:
        return CacheGroups(known, far, NARROW_PANEL)
    inches = WIDE_PANEL
    labels = [row['label'] for row in known if row['name'] not in far]
    if len(labels) > NAMED_POINTS:
        inches *= 1 - list_share(labels)
    return CacheGroups(known, far, inches)


class CacheGroups:
    """
    Where the points of `pareto` stand on an axis of so many inches.

    Caches of about one size are a group. Its points stand side by side, by cache and by loss, as
    far apart as they are wide where the next group leaves room for it.

    sizes: of each group. x: of each name that is drawn to scale, in bytes. step: between points of
    a group, in octaves
    """

    def __init__(self, known: list[dict], far: set[str], inches: float):
        self.inches = inches
        self.sizes: list[list[int]] = []
        for size in sorted({row['cache_bytes'] for row in known}):
            if self.sizes and size <= 1.25 * self.sizes[-1][0]:
                self.sizes[-1].append(size)
            else:
                self.sizes.append([size])
        self.x: dict[str, float] = {}
        self.step = step = POINT_WIDTH * self.octaves / inches
        centers = [math.log2(self.center(group)) for group in range(len(self.sizes))]
        for group, sizes in enumerate(self.sizes):
            beside = [row for row in known if row['cache_bytes'] in sizes]
            beside = [row for row in beside if row['name'] not in far]
            beside.sort(key=lambda row: (row['cache_bytes'], row['val_loss']))
            gaps = [abs(center - centers[group]) for center in centers]
            room = min([gap for gap in gaps if gap > 0], default=1.0)
            apart = min(step, 0.8 * room / max(len(beside), 1))
            for number, row in enumerate(beside):
                octaves = apart * (number - (len(beside) - 1) / 2)
                self.x[row['name']] = self.center(group) * 2**octaves

    @property
    def octaves(self) -> float:
        """The width of the axis, with half an octave or so at each end."""
        if not self.sizes:
            return 1.0
        return math.log2(self.sizes[-1][-1] / self.sizes[0][0]) + 2 * math.log2(1.35)

    def ends(self) -> tuple[float, float]:
        """Return the ends of the axis, which has room for the outer points of the groups."""
        x = list(self.x.values()) or [self.center(0)]
        edge = 2 ** (2 * self.step)
        first = min(self.sizes[0][0] / 1.35, min(x) / edge)
        return first, max(self.sizes[-1][-1] * 1.35, max(x) * edge)

    def center(self, group: int) -> float:
        return math.sqrt(self.sizes[group][0] * self.sizes[group][-1])

    def label(self, group: int) -> str:
        """Return the tick of a group: its cache, or the least and the largest."""
        sizes = self.sizes[group]
        if len(sizes) == 1:
            return f'{sizes[0]:,}'
        return f'{sizes[0]:,}–{sizes[-1]:,}'


def _name_outlier(ax, row: dict, paint: dict) -> None:
    ax.text(
        row['cache_bytes'],
        0.97,
        f'{row["label"]}: {row["val_loss"]:.3f} ↑',
        transform=ax.get_xaxis_transform(),
        va='top',
        ha='center',
        fontsize=9,
        color=paint[row['name']],
    )


def _half_interval(row: dict) -> float | None:
    """Return half the interval of the mean loss of a row, None with one seed."""
    if row['sd'] is None:
        return None
    return t_quantile(0.975, row['seeds'] - 1) * row['sd'] / math.sqrt(row['seeds'])


def _shown_half(row: dict) -> float:
    """Return as much of half the interval as the panel must show."""
    # The interval of two seeds, 9 sd to each side, may leave the panel.
    if row['seeds'] < 3:
        return 0.0
    return _half_interval(row) or 0.0


def _loss_bar(ax, row: dict, x: float, paint: dict) -> list[float]:
    """Draw the mean and the interval of a row at x. Returns the losses that must be seen."""
    half = _half_interval(row)
    ax.errorbar(
        x,
        row['val_loss'],
        yerr=half,
        color=paint[row['name']],
        marker='s' if row['control'] else 'o',
        markersize=7,
        capsize=3,
        linewidth=1.4,
        markeredgecolor='white',
        zorder=3,
    )
    shown = _shown_half(row)
    return [row['val_loss'] - shown, row['val_loss'] + shown]


def _cache_axis(ax, groups: CacheGroups) -> None:
    """Write a tick for each group; where two would touch, the second one is a line lower."""
    ax.set_xscale('log', base=2)
    ends = [-math.inf, -math.inf]  # of the labels in the two lines, inches
    ticks, labels = [], []
    for group in range(len(groups.sizes)):
        center, label = groups.center(group), groups.label(group)
        middle = math.log2(center) * groups.inches / groups.octaves
        half = 0.043 * len(label)  # a digit of 10 points is 0.086 inches wide
        for line in (0, 1):
            if middle - half > ends[line] + 0.08:
                ends[line] = middle + half
                ticks.append(center)
                labels.append(line * '\n' + label)
                break
    if ticks:
        ax.set_xlim(*groups.ends())
        ax.set_xticks(ticks, labels)
    ax.minorticks_off()
    ax.set_xlabel('cache, bytes per token (bf16)')


def name_points(ax, found: list[dict], paint: dict, inches: float) -> None:
    """
    Name the points of `pareto`. The axes are `inches` high.

    Labels of about the same cache stand above each other and above the points they would cover, on
    the left where the axis ends. Too many points for that have numbers, and a list beside them.
    """
    far = outliers(found)
    known = [row for row in with_point(found) if row['name'] not in far]
    groups = groups_of(found)
    if len(known) > NAMED_POINTS:
        _number_points(ax, known, groups, paint, inches)
        return
    points = sorted((row['cache_bytes'], row['val_loss']) for row in known)
    low, high = ax.get_ylim()
    apart = 0.17 / inches * (high - low)  # between two labels
    octaves = 1.0  # width of the axis
    if points:
        octaves = math.log2(points[-1][0] / points[0][0]) + 2 * math.log2(1.35)
    placed = []  # (height, cache) of labels
    for row in sorted(known, key=lambda row: row['val_loss']):
        cache = row['cache_bytes']
        left = cache == points[-1][0] and points[0][0] < points[-1][0]
        y = row['val_loss']
        below = []
        if not left:
            # A letter of 9 points is about 1/105 of the width.
            reach = cache * 2 ** (octaves * (0.02 + 0.0095 * len(row['label'])))
            for size, height in points:
                if cache * 1.1 < size < reach and abs(height - y) < apart:
                    below.append((height, cache))
        for height, size in sorted(placed + below):  # upwards, past what is there
            near = max(size / cache, cache / size) < 1.5
            if near and abs(y - height) < apart:
                y = height + apart
        placed.append((y, cache))
        ax.annotate(
            row['label'],
            (groups.x[row['name']], y),
            xytext=(-11 if left else 11, 7),
            textcoords='offset points',
            ha='right' if left else 'left',
            va='center',
            fontsize=9,
            color=paint[row['name']],
            path_effects=[figures.halo()],
            zorder=4,
        )


def _number_points(ax, known: list[dict], groups: CacheGroups, paint: dict, inches: float) -> None:
    """Number the points by their losses, the best first, and list the names on the right."""
    known = sorted(known, key=lambda row: row['val_loss'])
    sides = number_sides(known, groups, ax.get_ylim(), inches)
    handles = []
    for number, row in enumerate(known, 1):
        color = paint[row['name']]
        side = sides[row['name']]
        ax.annotate(
            f'{number}',
            (groups.x[row['name']], row['val_loss'] + side * _shown_half(row)),
            xytext=(0, 8 * side),
            textcoords='offset points',
            ha='center',
            va='center',
            fontsize=8,
            color=color,
            path_effects=[figures.halo()],
            zorder=4,
        )
        mark = 's' if row['control'] else 'o'
        handles.append(_legend_entry(ax, mark, color, f'{number}  {row["label"]}'))
    # The list stands inside the axes, right of all points.
    share = list_share([row['label'] for row in known])
    left, right = ax.get_xlim()
    ax.set_xlim(left, left * (right / left) ** (1 / (1 - share)))
    front_legend = ax.get_legend()
    ax.legend(handles=handles, loc='center right', fontsize=8.5, handlelength=1, labelspacing=0.25)
    if front_legend is not None:
        ax.add_artist(front_legend)


def number_sides(
    known: list[dict], groups: CacheGroups, ends: tuple[float, float], inches: float
) -> dict[str, int]:
    """
    Return at which end of its interval each point has its number: 1 the upper, -1 the lower one.

    That is the end where it covers least of other intervals and numbers. ends: of the axis of
    losses, which is `inches` high.
    """
    nats = (ends[1] - ends[0]) / inches  # of an inch
    taken = {}  # of each point: inches from the left, and its heights in nats
    for row in known:
        x = math.log2(groups.x[row['name']]) / groups.octaves * groups.inches
        half = max(_shown_half(row), 0.05 * nats)
        taken[row['name']] = [(x, row['val_loss'] - half, row['val_loss'] + half)]
    sides = {}
    for row in known:
        x, lower, upper = taken[row['name']][0]
        others = [box for name, boxes in taken.items() if name != row['name'] for box in boxes]
        labels = {
            1: (x, upper + 0.05 * nats, upper + 0.18 * nats),
            -1: (x, lower - 0.18 * nats, lower - 0.05 * nats),
        }
        covered = {}
        for side, (_, low, high) in labels.items():
            near = [box for box in others if abs(box[0] - x) < 0.16]
            covered[side] = sum(low < box[2] and box[1] < high for box in near)
        side = min(labels, key=covered.get)
        sides[row['name']] = side
        taken[row['name']].append(labels[side])
    return sides


def list_share(labels: list[str]) -> float:
    """Return the share of a wide panel's width that a list of these labels takes."""
    longest = max([len(label) for label in labels], default=0)
    # The names of the bars below take their width from all panels.
    return min(0.6, (0.6 + 0.07 * longest) / max(WIDE_PANEL + 1.6 - 0.08 * longest, 4))


# -------------------------------------------------------------------------------------------------
# loss over steps and seconds


@dataclass
class MeanCurve:
    """Mean, least and most of the losses of all runs, at the steps that all were evaluated at."""

    steps: list[int]
    mean: list[float]
    low: list[float]
    high: list[float]


def mean_curve(runs: list[dict]) -> MeanCurve:
    runs = [run for run in runs if run.get('eval_losses')]
    steps = set(runs[0]['eval_steps']) if runs else set()
    for run in runs[1:]:
        steps &= set(run['eval_steps'])
    curve = MeanCurve(sorted(steps), [], [], [])
    for step in curve.steps:
        losses = [run['eval_losses'][run['eval_steps'].index(step)] for run in runs]
        curve.mean.append(statistics.fmean(losses))
        curve.low.append(min(losses))
        curve.high.append(max(losses))
    return curve


def loss_curves(ax, results: Results, paint: dict, over: str) -> None:
    """Draw the mean losses over the seeds with their range, over 'steps' or over 'seconds'."""
    far = outliers(rows(results))
    shown = []  # losses that the panel must show
    for name, about in results.contenders.items():
        runs = results.scored_runs(name)
        curve = mean_curve(runs)
        x = curve.steps
        if over == 'seconds':
            x = _seconds_of(curve.steps, runs, results.head['tokens_per_step'])
        if not x:
            continue
        if name in far:  # to the legend alone
            label = f'{about["label"]}: above, {curve.mean[-1]:.3f} at the end'
            ax.plot([], [], color=paint[name], linewidth=1.8, label=label)
            continue
        ax.plot(
            x,
            curve.mean,
            color=paint[name],
            linewidth=1.8,
            marker='.' if len(x) < 30 else None,
            label=about['label'],
            linestyle=_line_style(results, name),
        )
        alpha = 0.18 if len(results.contenders) < 5 else 0.07
        ax.fill_between(x, curve.low, curve.high, color=paint[name], alpha=alpha, linewidth=0)
        # The begin of a run, where losses fall fast, may leave at the top.
        late = 0.25 * results.head['steps']
        shown += [loss for step, loss in zip(curve.steps, curve.high) if step >= late]
        shown += curve.low
    if shown:
        room = max(shown) - min(shown) or 0.01  # where there is one number only
        ax.set_ylim(min(shown) - 0.06 * room, max(shown) + 0.06 * room)
    else:
        muted = figures.COLORS['muted']
        ax.text(0.5, 0.5, 'no losses yet', transform=ax.transAxes, ha='center', color=muted)
        ax.set_yticks([])
    ax.set_ylabel('val loss (nats per token)')
    ax.set_xlabel('seconds of training' if over == 'seconds' else 'step')
    ax.xaxis.set_major_formatter(lambda value, _: f'{value:,.6g}')


def _seconds_of(steps: list[int], runs: list[dict], tokens_per_step: int) -> list[float]:
    """Return the seconds of training until each step, [] where no speed is known."""
    speeds = [run['tok_per_s'] for run in runs if not run['shared'] and run['tok_per_s']]
    if not speeds:
        return []
    return [step * tokens_per_step / statistics.median(speeds) for step in steps]


def _line_style(results: Results, name: str):
    kind = results.contenders[name]['kind']
    same = [other for other, about in results.contenders.items() if about['kind'] == kind]
    return LINES[same.index(name) % len(LINES)] if len(same) > 3 else '-'


def name_ends(ax, top, tokens_per_step: float) -> None:
    """
    Label the ends of the curves, on the right, instead of a legend.

    top: the axis of tokens above, in the unit of tokens_per_step.
    """
    from matplotlib.ticker import MaxNLocator

    low, high = ax.get_ylim()
    begin, end = ax.get_xlim()
    for axis, scale in ((ax, 1), (top, tokens_per_step)):
        ticks = MaxNLocator(6, steps=[1, 2, 5, 10]).tick_values(scale * begin, scale * end)
        axis.set_xticks([tick for tick in ticks if scale * begin <= tick <= scale * end])
    labels = [line.get_label() for line in ax.lines]
    width = (end - begin) / (1 - list_share(labels))
    ax.set_xlim(begin, begin + width)
    ends = []  # (height, line), upwards
    for line in ax.lines:
        heights = line.get_ydata()
        ends.append((heights[-1] if len(heights) else high, line))  # outliers are above
    ends.sort(key=lambda end: end[0])
    places = spread([height for height, _ in ends], low, high)
    for (height, line), y in zip(ends, places):
        color = line.get_color()
        if len(line.get_xdata()):
            x = line.get_xdata()[-1]
            reach = [x + 0.008 * width, x + 0.035 * width]
            ax.plot(reach, [height, y], color=color, linewidth=0.7, clip_on=False)
        label = dict(va='center', fontsize=9, color=color, path_effects=[figures.halo()])
        ax.text(end - 0.05 * (end - begin) + 0.042 * width, y, line.get_label(), **label)


def spread(heights: list[float], low: float, high: float) -> list[float]:
    """
    Return heights of labels from `low` to `high`, as near to those given as they have room.

    heights: upwards. Labels that would touch stand around the mean of theirs.
    """
    gap = (high - low) / max(19, len(heights) + 1)
    touching = []  # (labels, place of the lowest)
    for height in heights:
        number, lowest = 1, height
        while touching and touching[-1][1] + touching[-1][0] * gap > lowest:
            below, place = touching.pop()
            lowest = (below * place + number * (lowest - below * gap)) / (below + number)
            number += below
        touching.append((number, lowest))
    places = []
    for number, lowest in touching:
        places += [lowest + gap * i for i in range(number)]
    count = len(places)
    for number in range(count):
        places[number] = max(places[number], low + gap * (number + 0.5))
    for number in range(count):
        places[number] = min(places[number], high - gap * (count - number - 0.5))
    return places


# -------------------------------------------------------------------------------------------------
# bars


def difference_bars(ax, found: list[dict], paint: dict) -> None:
    """Draw the paired differences to the control with their intervals, the best on top."""
    shown = [row for row in found if row['difference'] is not None]
    shown.sort(key=lambda row: row['difference'])
    shown.reverse()  # drawn upwards
    far = outliers(found)
    labels = []
    for y, row in enumerate(shown):
        color = paint[row['name']]
        label = row['label']
        if row['seeds'] < row['wanted']:
            plural = '' if row['seeds'] == 1 else 's'
            label += f' ({row["seeds"]} seed{plural})'
        labels.append(label)
        if row['name'] in far:
            text = f'{row["difference"]:+.4f}'
            if row['half'] is not None:
                text += f' ± {row["half"]:.4f}'
            ax.text(
                0.99,
                y,
                text + ' →',
                transform=ax.get_yaxis_transform(),
                ha='right',
                va='center',
                fontsize=9,
                color=color,
            )
            continue
        ax.errorbar(
            row['difference'],
            y,
            xerr=row['half'],
            color=color,
            marker='o',
            markersize=6,
            capsize=3,
            linewidth=1.6,
        )
        if row['half'] is None:  # one seed: a point without an interval is read better as a number
            ax.annotate(
                f'{row["difference"]:+.4f} ({row["percent"]:+.2f} %)',
                (row['difference'], y),
                xytext=(0, 10),
                textcoords='offset points',
                ha='right' if row['difference'] > 0 else 'left',
                fontsize=10,
                color=color,
                path_effects=[figures.halo()],
            )
    ax.axvline(0, color=figures.COLORS['ink'], linewidth=1)
    ax.set_yticks(range(len(shown)), labels)
    ax.set_ylim(-0.7, max(len(shown), 1) - 0.3)
    ax.grid(False, axis='y')
    control = next((row['label'] for row in found if row['control']), '')
    ax.set_xlabel(f'val loss above {control}, nats per token')


def speed_bars(ax, found: list[dict], paint: dict, key: str, title: str) -> None:
    """Draw row[key], tokens a second, of all rows with a loss."""
    from matplotlib.ticker import MaxNLocator

    shown = [row for row in found if row['val_loss'] is not None]
    shown.reverse()  # drawn upwards
    values = [row[key] or 0 for row in shown]
    most = max(values + [1])
    ax.barh(range(len(shown)), values, color=[paint[row['name']] for row in shown], height=0.62)
    for y, value in enumerate(values):
        ax.text(
            value + 0.02 * most,
            y,
            speed(value) if value else 'not measured',
            va='center',
            fontsize=9,
            color=figures.COLORS['muted'],
        )
    ax.set_yticks(range(len(shown)), [row['label'] for row in shown])
    ax.set_xlim(0, 1.22 * most)
    ax.xaxis.set_major_locator(MaxNLocator(4))
    ax.xaxis.set_major_formatter(
        lambda value, _: f'{value / 1e3:g}k' if most >= 5e3 else f'{value:g}'
    )
    ax.grid(False, axis='y')
    ax.set_xlabel(title)


# -------------------------------------------------------------------------------------------------
# the whole picture of one comparison


class Picture:
    """The panels of one comparison and where each of them goes on the sheet."""

    def __init__(self, results: Results):
        self.results = results
        self.found = rows(results)
        self.paint = colors(results.contenders)
        self.samples = self.choose_samples()
        self.timed = any(row['tok_per_s'] for row in self.found)
        self.decoded = any(row['decode_tok_per_s'] for row in self.found)
        # With many contenders loss and difference have a row of the sheet each.
        self.many = len(results.contenders) > SIDE_BY_SIDE
        sizes = {row['cache_bytes'] for row in self.found}
        self.over_cache = not self.many or len(sizes) > 2

    def choose_samples(self) -> list[tuple[str, str]]:
        """Return (name, text) of three contenders at most: the first and the last two."""
        samples = []
        for name, about in self.results.contenders.items():
            sample = decode_of(about).get('sample')
            if sample:
                samples.append((name, sample))
        return samples if len(samples) <= 3 else samples[:1] + samples[-2:]

    def heights(self) -> list[float]:
        """Return the inches of each row of panels."""
        bars = 0.9 + 0.30 * max(2, len(self.results.contenders))
        heights = [3.5]
        if len(self.results.contenders) > NAMED_IN_LEGEND:
            heights = [max(3.5, 1.1 + 0.19 * len(self.results.contenders))]
        if self.many and self.over_cache:
            heights.append(4.2)
        heights.append(bars if self.many else 3.5)
        if self.timed or self.decoded:
            heights.append(bars)
        if self.samples:
            heights.append(2.1)
        return heights

    def note(self) -> str:
        head = self.results.head
        plural = 's' if len(head['seeds']) > 1 else ''
        parts = [
            figures.text_name(head['source']),
            f'{head["steps"]:,} steps of {head["tokens_per_step"]:,} tokens',
            f'{len(head["seeds"])} seed{plural}',
            head.get('remark'),
        ]
        return ' · '.join(part for part in parts if part)

    def draw(self, path: str | os.PathLike) -> None:
        heights = self.heights()
        size = (figures.WIDTH, sum(heights) + 1.3)
        title = self.results.head['title']
        with figures.sheet(size=size, title=title, note=self.note()) as (fig, ax):
            ax.remove()
            grid = fig.add_gridspec(len(heights), 2, height_ratios=heights)
            self.draw_curves(fig, grid)
            self.draw_losses(fig, grid)
            self.draw_speeds(fig, grid)
            if self.samples:
                self.draw_samples(fig, fig.add_subplot(grid[-1, :]))
            figures.footer(fig, facts(self.results.head))
            figures.save(fig, path, palette=True)

    def draw_curves(self, fig, grid) -> None:
        """Draw the losses over steps and, where speeds are known, over seconds beside them."""
        over_steps = fig.add_subplot(grid[0, 0] if self.timed else grid[0, :])
        loss_curves(over_steps, self.results, self.paint, 'steps')
        legend_on = over_steps
        if self.timed:
            legend_on = fig.add_subplot(grid[0, 1])
            loss_curves(legend_on, self.results, self.paint, 'seconds')
            legend_on.set_ylabel('')
        millions = self.results.head['tokens_per_step'] / 1e6
        top = over_steps.secondary_xaxis(
            'top',
            functions=(lambda steps: steps * millions, lambda tokens: tokens / millions),
        )
        top.set_xlabel('M tokens', fontsize=9.5, color=figures.COLORS['muted'])
        top.spines['top'].set_visible(False)
        if len(self.results.contenders) > NAMED_IN_LEGEND:
            name_ends(over_steps, top, millions)
        elif over_steps.lines:
            legend_on.legend(
                *over_steps.get_legend_handles_labels(),
                loc='upper right',
                fontsize=9 if self.many else 10,
                ncols=2 if self.many and not self.timed else 1,
            )

    def draw_losses(self, fig, grid) -> None:
        """Draw the losses over the cache, and the differences to the control."""
        intervals = ''
        if any(row['half'] is not None for row in self.found):
            intervals = ', 95 % intervals'
        pad = None
        if self.over_cache:
            ax = fig.add_subplot(grid[1, :] if self.many else grid[1, 0])
            pareto(ax, self.found, self.paint, compact=not self.many)
            if not self.many and ax.get_legend():
                pad = 22  # the legend stands below the title, not beside it
            ax.set_title('loss over cache' + intervals, pad=pad)
            if self.many:
                name_points(ax, self.found, self.paint, 3.1)
        row = self.difference_row()
        ax = fig.add_subplot(grid[row, :] if self.many else grid[row, 1])
        difference_bars(ax, self.found, self.paint)
        ax.set_title('paired difference' + intervals, pad=pad)

    def difference_row(self) -> int:
        return 2 if self.many and self.over_cache else 1

    def draw_speeds(self, fig, grid) -> None:
        panels = []
        if self.timed:
            panels.append(('tok_per_s', 'training, tokens/s'))
        if self.decoded:
            panels.append(('decode_tok_per_s', 'decoding, tokens/s'))
        row = self.difference_row() + 1
        for column, (key, title) in enumerate(panels):
            ax = fig.add_subplot(grid[row, column] if len(panels) == 2 else grid[row, :])
            speed_bars(ax, self.found, self.paint, key, title)

    def draw_samples(self, fig, ax) -> None:
        from matplotlib.transforms import blended_transform_factory

        ax.set_axis_off()
        across = blended_transform_factory(fig.transFigure, ax.transAxes)
        columns = SAMPLE_COLUMNS[len(self.samples)]
        for number, (name, text) in enumerate(self.samples):
            left = 0.015 + 0.985 * number / len(self.samples)
            lines = []
            for line in text.splitlines():
                lines += textwrap.wrap(line, columns) or ['']
            ax.text(
                left,
                1,
                f'a sample of {self.results.contenders[name]["label"]}',
                transform=across,
                va='top',
                fontsize=10.5,
                color=self.paint[name],
            )
            ax.text(
                left,
                0.87,
                figures.plain('\n'.join(lines[:SAMPLE_LINES])),
                transform=across,
                va='top',
                fontsize=7.8,
                family='DejaVu Sans Mono',
                linespacing=1.35,
            )


def draw(results: Results, path: str | os.PathLike) -> None:
    """Draw the whole picture of a comparison. UserError when it cannot be written."""
    Picture(results.reached()).draw(path)


# -------------------------------------------------------------------------------------------------
# loss over cache alone, of one comparison or of several


def draw_front(compared: list[Results], path: str | os.PathLike) -> None:
    """Draw the loss over the cache: of one comparison with its front, or of several together."""
    title = compared[0].head['title'] if len(compared) == 1 else ''
    size = (figures.WIDTH, 6.2)
    with figures.sheet(size=size, title='Loss over cache', note=title) as (fig, ax):
        if len(compared) == 1:
            results = compared[0].reached()
            found, paint = rows(results), colors(results.contenders)
            pareto(ax, found, paint)
            name_points(ax, found, paint, 4.8)
            about = facts(results.head)
        else:
            relative_losses(ax, compared)
            commits, devices, dtypes, versions = (
                _union(compared, key) for key in ('commit', 'device', 'dtype', 'torch')
            )
            about = f'commits {commits} · {devices} · {dtypes} · torch {versions}'
        figures.footer(fig, about)
        figures.save(fig, path, palette=True)


def _union(compared: list[Results], key: str) -> str:
    """Return the different entries of lists with commas, in their order."""
    entries = {}
    for results in compared:
        entries |= dict.fromkeys(results.head[key].split(', '))
    return ', '.join(entries)


def relative_losses(ax, compared: list[Results]) -> None:
    """
    Draw several comparisons: per cent of loss above each one's control over the share of its cache.

    Losses of different texts do not compare, shares do.
    """
    ink = figures.COLORS['ink']
    shown, far = [], []
    for number, results in enumerate(compared):
        found = [row for row in rows(results) if row['percent'] is not None and row['cache_ratio']]
        above = outliers(found)
        for row in found:
            if row['name'] in above:
                far.append(f'{row["label"]} {row["percent"]:+.1f} %')
            else:
                shown.append(row | dict(mark=MARKS[number % len(MARKS)]))
    for row in shown:
        _relative_bar(ax, row, shown)

    titles = []
    for number, results in enumerate(compared):
        label = results.head['title'].partition(':')[0]
        titles.append(_legend_entry(ax, MARKS[number % len(MARKS)], ink, label))
    kinds = []
    for kind in dict.fromkeys(row['kind'] for row in shown):
        kinds.append(_legend_entry(ax, 's', figures.COLORS.get(kind, ink), kind.upper()))
    ax.add_artist(ax.legend(handles=titles, loc='lower right', fontsize=9))
    ax.legend(handles=kinds, loc='upper right', ncols=len(kinds) or 1, fontsize=9)

    ax.axhline(0, color=ink, linewidth=1)
    ax.set_xscale('log', base=2)
    shares = [row['cache_ratio'] for row in shown] or [1]
    ticks = []
    for divisor in (16, 12, 8, 6, 4, 3, 2, 1):
        if 0.9 * min(shares) <= 1 / divisor <= 1.1 * max(shares):
            ticks.append(1 / divisor)
    ax.set_xticks(ticks, [share(tick) for tick in ticks])
    ax.minorticks_off()
    controls = {results.contenders[results.control]['label'] for results in compared}
    control = controls.pop() if len(controls) == 1 else 'the control'
    ax.set_xlabel(f'cache, as a share of that of {control}')
    ax.set_ylabel(f'val loss above {control}, %')
    title = '95 % intervals of paired differences; hollow: fewer than three seeds'
    if far:
        title += f'; above: {", ".join(far)}'
    ax.set_title(title, fontsize=9.5, color=figures.COLORS['muted'])


def _relative_bar(ax, row: dict, shown: list[dict]) -> None:
    """Draw one point and its interval; points of about one share stand side by side."""
    beside = [
        other for other in shown if abs(math.log2(other['cache_ratio'] / row['cache_ratio'])) < 0.1
    ]
    place = next(number for number, other in enumerate(beside) if other is row)
    offset = place - (len(beside) - 1) / 2
    sure = row['seeds'] > 2
    color = figures.COLORS.get(row['kind'], figures.COLORS['ink'])
    ax.errorbar(
        row['cache_ratio'] * 1.03**offset,
        row['percent'],
        yerr=row['percent_half'] if sure else None,
        color=color,
        marker=row['mark'],
        markersize=7,
        markerfacecolor=color if sure else 'white',
        markeredgecolor='white' if sure else color,
        capsize=3,
        linewidth=1.2,
    )


def _legend_entry(ax, marker: str, color: str, label: str):
    (handle,) = ax.plot([], [], linestyle='none', marker=marker, color=color, label=label)
    return handle
