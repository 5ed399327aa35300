"""
The pictures of what a comparison found: losses over steps, seconds and cache, paired differences, speeds, samples.

All numbers are comparison.py's: `found` are its rows, `paint` a colour for each contender's name. Losses are in nats a
token, caches in bytes a token (bf16), intervals those of Student's t (95 %).
"""

import math
import statistics
import textwrap

from nanomla.comparison.table import facts, front, reached, rows, share, speed, t_quantile
from nanomla.core import figures

MARKS = 'oDs^vPX*'  # of comparisons in one picture
LINES = (
    '-',
    (0, (5, 2)),
    (0, (1.5, 1.5)),
    (0, (5, 2, 1.5, 2)),
)  # in turn, where shades of one colour are many


def colors(contenders):
    """name -> colour: the attention's own, in shades from dark to light where several contenders have one kind."""
    from matplotlib.colors import to_hex, to_rgb

    found = {}
    for kind in {about['kind'] for about in contenders.values()}:
        names = [name for name, about in contenders.items() if about['kind'] == kind]
        base = to_rgb(figures.COLORS.get(kind, figures.COLORS['ink']))
        for i, name in enumerate(names):
            depth = (
                0.0 if len(names) == 1 else -0.45 + 0.85 * i / (len(names) - 1)
            )  # negative: towards black; positive: towards white
            found[name] = to_hex(
                [c * (1 + depth) if depth < 0 else c + (1 - c) * depth for c in base]
            )
    return found


def beyond(found):
    """Names of the rows above a gap of more than three times the range of all that is below it, at least four rows: named at the edge of a panel."""
    known = sorted((row['val_loss'], row['name']) for row in found if row['val_loss'] is not None)
    for i in range(4, len(known)):
        if known[i][0] - known[i - 1][0] > 3 * (known[i - 1][0] - known[0][0]) > 0:
            return {name for _, name in known[i:]}
    return set()


def pareto(ax, found, paint, compact=False):
    """Val loss over cache bytes per token, with 95 % intervals of the mean over seeds, and the front as steps. Those of one cache stand side by side."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    known, far, bounds = (
        [row for row in found if row['val_loss'] is not None and row['cache_bytes']],
        beyond(found),
        [],
    )
    for row in known:
        beside = [
            other['name']
            for other in known
            if other['cache_bytes'] == row['cache_bytes'] and other['name'] not in far
        ]
        if row['name'] in far:
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
            continue
        spread = (
            t_quantile(0.975, row['seeds'] - 1) * row['sd'] / math.sqrt(row['seeds'])
            if row['sd'] is not None
            else None
        )
        room = (
            spread if spread is not None and row['seeds'] > 2 else 0
        )  # the interval of two seeds, 9 sd to each side, may leave the panel
        bounds += [row['val_loss'] - room, row['val_loss'] + room]
        ax.errorbar(
            row['cache_bytes']
            * min(1.025, 1.25 ** (1 / len(beside)))
            ** (beside.index(row['name']) - (len(beside) - 1) / 2),
            row['val_loss'],
            yerr=spread,
            color=paint[row['name']],
            marker='s' if row['control'] else 'o',
            markersize=7,
            capsize=3,
            linewidth=1.4,
            markeredgecolor='white',
            zorder=3,
        )
    if len(set(bounds)) > 1:
        margin = 0.08 * (max(bounds) - min(bounds))
        ax.set_ylim(min(bounds) - margin, max(bounds) + margin)
    on = sorted(
        (row['cache_bytes'], row['val_loss']) for row in known if row['name'] in front(found)
    )
    if len(on) > 1:
        ax.step(
            *zip(*on),
            where='post',
            color=figures.COLORS['muted'],
            linewidth=1,
            linestyle=(0, (4, 3)),
            zorder=1,
            label='Pareto front',
        )
        ax.legend(loc='best', fontsize=9)
    ax.set_xscale('log', base=2)
    sizes = sorted({row['cache_bytes'] for row in known})
    if sizes:
        ax.set_xlim(sizes[0] / 1.35, sizes[-1] * 1.35)
        apart = [size for i, size in enumerate(sizes) if i == 0 or size / sizes[i - 1] > 1.25]
        ax.set_xticks(apart if len(apart) <= (4 if compact else 8) else apart[::2])
    ax.xaxis.set_major_formatter(FuncFormatter(lambda size, _: f'{size:,.0f}'))
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.minorticks_off()
    ax.set_xlabel('cache, bytes per token (bf16)')
    ax.set_ylabel('val loss (nats per token)')


def name_points(ax, found, paint, inches):
    """
    The labels beside the points of pareto(): those of about the same cache above each other and above the points that they would cover, on the left where
    it ends; of more than 16 points those of the front and of the control alone. The axes are `inches` high.
    """
    far, best = beyond(found), front(found)
    points = sorted(
        (row['cache_bytes'], row['val_loss'])
        for row in found
        if row['val_loss'] is not None and row['cache_bytes'] and row['name'] not in far
    )
    known = [
        row
        for row in found
        if row['val_loss'] is not None
        and row['cache_bytes']
        and row['name'] not in far
        and (len(points) <= 16 or row['control'] or row['name'] in best)
    ]
    low, high = ax.get_ylim()
    apart, placed = 0.17 / inches * (high - low), []
    octaves = math.log2(points[-1][0] / points[0][0]) + 2 * math.log2(1.35) if points else 1
    for row in sorted(known, key=lambda row: row['val_loss']):
        left = row['cache_bytes'] == points[-1][0] and points[0][0] < points[-1][0]
        y, reach = (
            row['val_loss'],
            2 ** (octaves * (0.02 + 0.0095 * len(row['label']))),
        )  # a letter of 9 points is about 1/105 of the width
        below = (
            []
            if left
            else [
                other
                for size, other in points
                if row['cache_bytes'] * 1.1 < size < row['cache_bytes'] * reach
                and abs(other - y) < apart
            ]
        )
        for other, size in sorted(
            [*placed, *((other, row['cache_bytes']) for other in below)]
        ):  # upwards, past what is there
            if (
                max(size / row['cache_bytes'], row['cache_bytes'] / size) < 1.5
                and abs(y - other) < apart
            ):
                y = other + apart
        placed.append((y, row['cache_bytes']))
        ax.annotate(
            row['label'],
            (row['cache_bytes'], y),
            xytext=(-11 if left else 11, 7),
            textcoords='offset points',
            ha='right' if left else 'left',
            va='center',
            fontsize=9,
            color=paint[row['name']],
            path_effects=[figures.halo()],
            zorder=4,
        )


def mean_curve(runs, key):
    """(steps, mean over runs, least, most) of an evaluation's number, at the steps that all runs have."""
    runs = [run for run in runs if run.get(key)]
    steps = sorted(set.intersection(*(set(run['eval_steps']) for run in runs))) if runs else []
    values = [[run[key][run['eval_steps'].index(step)] for run in runs] for step in steps]
    return (
        steps,
        [statistics.fmean(v) for v in values],
        [min(v) for v in values],
        [max(v) for v in values],
    )


def curves(ax, comparison, contenders, runs, paint, over):
    """Validation losses, mean over seeds with their range, over steps or over seconds of training."""
    every, far = [], beyond(rows(comparison, contenders, runs))
    for name in contenders:
        mine = [
            run
            for run in runs
            if run['contender'] == name and run['role'] == 'seed' and 'val_loss' in run
        ]
        steps, mean, low, high = mean_curve(mine, 'eval_losses')
        x = steps
        if over == 'seconds':
            speeds = [run['tok_per_s'] for run in mine if not run['shared'] and run['tok_per_s']]
            x = (
                [step * comparison['tokens_per_step'] / statistics.median(speeds) for step in steps]
                if speeds
                else []
            )
        if x:
            same = [
                other
                for other in contenders
                if contenders[other]['kind'] == contenders[name]['kind']
            ]
            if name in far:  # to the legend alone
                ax.plot(
                    [],
                    [],
                    color=paint[name],
                    linewidth=1.8,
                    label=f'{contenders[name]["label"]}: above, {mean[-1]:.3f} at the end',
                )
                continue
            ax.plot(
                x,
                mean,
                color=paint[name],
                linewidth=1.8,
                marker='.' if len(x) < 30 else None,
                label=contenders[name]['label'],
                linestyle=LINES[same.index(name) % len(LINES)] if len(same) > 3 else '-',
            )
            ax.fill_between(
                x,
                low,
                high,
                color=paint[name],
                alpha=0.18 if len(contenders) < 5 else 0.07,
                linewidth=0,
            )
            every += [
                value for step, value in zip(steps, high) if step >= 0.25 * comparison['steps']
            ] + low
    if every:
        room = max(every) - min(every) or 0.01  # where there is one number only
        ax.set_ylim(min(every) - 0.06 * room, max(every) + 0.06 * room)
    else:
        ax.text(
            0.5,
            0.5,
            'no losses yet',
            transform=ax.transAxes,
            ha='center',
            color=figures.COLORS['muted'],
        )
        ax.set_yticks([])
    ax.set_ylabel('val loss (nats per token)')
    ax.set_xlabel('seconds of training' if over == 'seconds' else 'step')
    ax.xaxis.set_major_formatter(lambda value, _: f'{value:,.6g}')


def name_ends(ax, top, scale):
    """Labels at the ends of those curves that stand apart, and one for all others, where a legend would hide them. top: the axis of tokens, `scale` of which are a step."""
    from matplotlib.ticker import MaxNLocator

    low, high = ax.get_ylim()
    begin, end = ax.get_xlim()
    for axis, first, final in ((ax, begin, end), (top, scale * begin, scale * end)):
        axis.set_xticks(
            [
                tick
                for tick in MaxNLocator(6, steps=[1, 2, 5, 10]).tick_values(first, final)
                if first <= tick <= final
            ]
        )
    ax.set_xlim(begin, begin + 1.42 * (end - begin))
    last = {
        line: (line.get_xdata()[-1], line.get_ydata()[-1])
        for line in ax.lines
        if len(line.get_ydata())
    }
    crowd = []
    for line, (x, y) in last.items():
        if all(
            other is line or abs(y - height) > 0.045 * (high - low)
            for other, (_, height) in last.items()
        ):
            ax.annotate(
                line.get_label(),
                (x, y),
                xytext=(7, 0),
                textcoords='offset points',
                va='center',
                fontsize=9,
                color=line.get_color(),
            )
        else:
            crowd.append((x, y))
    if crowd:
        ax.annotate(
            f'the other {len(crowd)}, colours as below',
            (crowd[0][0], statistics.fmean(y for _, y in crowd)),
            xytext=(7, 0),
            textcoords='offset points',
            va='center',
            fontsize=9,
            color=figures.COLORS['muted'],
        )


def difference_bars(ax, found, paint):
    """Paired differences to the control with their intervals, a row each, best on top."""
    shown = sorted(
        (row for row in found if row['difference'] is not None), key=lambda row: row['difference']
    )
    far = beyond(found)
    for y, row in enumerate(reversed(shown)):
        if row['name'] in far:
            ax.text(
                0.99,
                y,
                f'{row["difference"]:+.4f}'
                + ('' if row['half'] is None else f' ± {row["half"]:.4f}')
                + ' →',
                transform=ax.get_yaxis_transform(),
                ha='right',
                va='center',
                fontsize=9,
                color=paint[row['name']],
            )
            continue
        ax.errorbar(
            row['difference'],
            y,
            xerr=row['half'],
            color=paint[row['name']],
            marker='o',
            markersize=6,
            capsize=3,
            linewidth=1.6,
        )
    ax.axvline(0, color=figures.COLORS['ink'], linewidth=1)
    ax.set_yticks(
        range(len(shown)),
        [
            row['label']
            + f' ({row["seeds"]} seed{"s" * (row["seeds"] != 1)})' * (row['seeds'] < row['wanted'])
            for row in reversed(shown)
        ],
    )
    ax.set_ylim(-0.7, max(len(shown), 1) - 0.3)
    ax.grid(False, axis='y')
    control = next((row['label'] for row in found if row['control']), '')
    ax.set_xlabel(f'val loss above {control}, nats per token')


def speed_bars(ax, found, paint, key, title):
    from matplotlib.ticker import MaxNLocator

    shown = [row for row in found if row['val_loss'] is not None]
    values = [row[key] or 0 for row in reversed(shown)]
    most = max(values + [1])
    ax.barh(
        range(len(shown)),
        values,
        color=[paint[row['name']] for row in reversed(shown)],
        height=0.62,
    )
    for y, value in enumerate(values):
        ax.text(
            value + 0.02 * most,
            y,
            speed(value) if value else 'not measured',
            va='center',
            fontsize=9,
            color=figures.COLORS['muted'],
        )
    ax.set_yticks(range(len(shown)), [row['label'] for row in reversed(shown)])
    ax.set_xlim(0, 1.22 * most)
    ax.xaxis.set_major_locator(MaxNLocator(4))
    ax.xaxis.set_major_formatter(
        lambda value, _: f'{value / 1e3:g}k' if most >= 5e3 else f'{value:g}'
    )
    ax.grid(False, axis='y')
    ax.set_xlabel(title)


def draw(comparison, contenders, runs, path):
    """The whole picture of a comparison at `path`. UserError when it cannot be written."""
    from matplotlib.transforms import blended_transform_factory

    contenders = reached(comparison, contenders, runs)
    found = rows(comparison, contenders, runs)
    samples = [
        (about['label'], name, about['decode']['sample'])
        for name, about in contenders.items()
        if (about.get('decode') or {}).get('sample')
    ]
    samples = (
        samples[:1] + samples[1:][-2:] if len(samples) > 3 else samples
    )  # the first, and the last two
    timed, decoded = (any(row[key] for row in found) for key in ('tok_per_s', 'decode_tok_per_s'))
    intervals = ', 95 % intervals' if any(row['half'] is not None for row in found) else ''
    bars = 0.9 + 0.30 * max(2, len(contenders))
    many = len(contenders) > 4  # then everything takes the whole width
    over_cache = not many or len({row['cache_bytes'] for row in found}) > 2
    heights = (
        [3.5]
        + [4.2] * (many and over_cache)
        + [bars if many else 3.5]
        + [bars] * (timed or decoded)
        + [2.1] * bool(samples)
    )
    size = (figures.WIDTH, sum(heights) + 1.3)
    note = ' · '.join(
        filter(
            None,
            (
                comparison['source'],
                f'{comparison["steps"]:,} steps of {comparison["tokens_per_step"]:,} tokens',
                f'{len(comparison["seeds"])} seed{"s" * (len(comparison["seeds"]) > 1)}',
                comparison.get('remark'),
            ),
        )
    )
    with figures.sheet(size=size, title=comparison['title'], note=note) as (fig, ax):
        paint = colors(contenders)
        ax.remove()
        grid = fig.add_gridspec(len(heights), 2, height_ratios=heights)
        over_steps = fig.add_subplot(grid[0, 0] if timed else grid[0, :])
        curves(over_steps, comparison, contenders, runs, paint, 'steps')
        if timed:
            curves(
                over_seconds := fig.add_subplot(grid[0, 1]),
                comparison,
                contenders,
                runs,
                paint,
                'seconds',
            )
            over_seconds.set_ylabel('')
        top = over_steps.secondary_xaxis(
            'top',
            functions=(
                lambda s: s * comparison['tokens_per_step'] / 1e6,
                lambda m: m * 1e6 / comparison['tokens_per_step'],
            ),
        )
        top.set_xlabel('M tokens', fontsize=9.5, color=figures.COLORS['muted'])
        top.spines['top'].set_visible(False)
        if len(contenders) > 12:
            name_ends(over_steps, top, comparison['tokens_per_step'] / 1e6)
        elif over_steps.lines:
            (over_seconds if timed else over_steps).legend(
                *over_steps.get_legend_handles_labels(),
                loc='upper right',
                fontsize=9 if many else 10,
                ncols=2 if many and not timed else 1,
            )
        if over_cache:
            pareto(
                ax := fig.add_subplot(grid[1, :] if many else grid[1, 0]),
                found,
                paint,
                compact=not many,
            )
            ax.set_title('loss over cache' + intervals)
        if over_cache and many:
            name_points(ax, found, paint, 3.1)
        at = 1 + (many and over_cache)
        difference_bars(ax := fig.add_subplot(grid[at, :] if many else grid[at, 1]), found, paint)
        ax.set_title('paired difference' + intervals)
        if timed:
            speed_bars(
                fig.add_subplot(grid[at + 1, 0] if decoded else grid[at + 1, :]),
                found,
                paint,
                'tok_per_s',
                'training, tokens/s',
            )
        if decoded:
            speed_bars(
                fig.add_subplot(grid[at + 1, 1] if timed else grid[at + 1, :]),
                found,
                paint,
                'decode_tok_per_s',
                'decoding, tokens/s',
            )
        if samples:
            ax = fig.add_subplot(grid[-1, :])
            ax.set_axis_off()
            across = blended_transform_factory(fig.transFigure, ax.transAxes)
        for i, (label, name, text) in enumerate(samples):
            columns = {1: 120, 2: 62, 3: 42}[len(samples)]
            lines = [
                piece
                for line in text.splitlines()
                for piece in textwrap.wrap(line, columns) or ['']
            ][:11]
            ax.text(
                0.015 + 0.985 * i / len(samples),
                1,
                f'a sample of {label}',
                transform=across,
                va='top',
                fontsize=10.5,
                color=paint[name],
            )
            ax.text(
                0.015 + 0.985 * i / len(samples),
                0.87,
                figures.plain('\n'.join(lines)),
                transform=across,
                va='top',
                fontsize=7.8,
                family='DejaVu Sans Mono',
                linespacing=1.35,
            )
        figures.footer(fig, facts(comparison))
        figures.save(fig, path, palette=True)


def draw_front(results, path):
    """Loss over cache, of one comparison with its Pareto front. `results`: (comparison, contenders, runs), or several such."""
    with figures.sheet(
        size=(figures.WIDTH, 6.2),
        title='Loss over cache',
        note=results[0][0]['title'] if len(results) == 1 else '',
    ) as (fig, ax):
        if len(results) == 1:
            ((comparison, contenders, runs),) = results
            contenders = reached(comparison, contenders, runs)
            found, paint = rows(comparison, contenders, runs), colors(contenders)
            pareto(ax, found, paint)
            name_points(ax, found, paint, 4.8)
            about = facts(comparison)
        else:
            beside_controls(ax, results)
            commits, devices, dtypes, versions = (
                ', '.join(
                    dict.fromkeys(
                        one for comparison, _, _ in results for one in comparison[key].split(', ')
                    )
                )
                for key in ('commit', 'device', 'dtype', 'torch')
            )
            about = f'commits {commits} · {devices} · {dtypes} · torch {versions}'
        figures.footer(fig, about)
        figures.save(fig, path, palette=True)


def beside_controls(ax, results):
    """Several comparisons: per cent of loss above each one's control over the share of its cache, because losses of different texts do not compare."""
    ink, shown, far = figures.COLORS['ink'], [], []
    for i, (comparison, contenders, runs) in enumerate(results):
        found = [
            row
            for row in rows(comparison, contenders, runs)
            if row['percent'] is not None and row['cache_ratio']
        ]
        above = beyond(found)
        far += [f'{row["label"]} {row["percent"]:+.1f} %' for row in found if row['name'] in above]
        shown += [
            row | dict(mark=MARKS[i % len(MARKS)]) for row in found if row['name'] not in above
        ]
    for row in shown:  # those of about one share stand side by side
        beside = [
            other
            for other in shown
            if abs(math.log2(other['cache_ratio'] / row['cache_ratio'])) < 0.1
        ]
        place = next(i for i, other in enumerate(beside) if other is row) - (len(beside) - 1) / 2
        sure, color = row['seeds'] > 2, figures.COLORS.get(row['kind'], ink)
        ax.errorbar(
            row['cache_ratio'] * 1.03**place,
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
    titles = [
        ax.plot(
            [],
            [],
            linestyle='none',
            marker=MARKS[i % len(MARKS)],
            color=ink,
            label=comparison['title'].partition(':')[0],
        )[0]
        for i, (comparison, _, _) in enumerate(results)
    ]
    kinds = [
        ax.plot(
            [],
            [],
            linestyle='none',
            marker='s',
            color=figures.COLORS.get(kind, ink),
            label=kind.upper(),
        )[0]
        for kind in dict.fromkeys(row['kind'] for row in shown)
    ]
    ax.add_artist(ax.legend(handles=titles, loc='lower right', fontsize=9))
    ax.legend(handles=kinds, loc='upper right', ncols=len(kinds) or 1, fontsize=9)
    ax.axhline(0, color=ink, linewidth=1)
    ax.set_xscale('log', base=2)
    shares = [row['cache_ratio'] for row in shown] or [1]
    ticks = [
        1 / n for n in (16, 12, 8, 6, 4, 3, 2, 1) if 0.9 * min(shares) <= 1 / n <= 1.1 * max(shares)
    ]
    ax.set_xticks(ticks, [share(tick) for tick in ticks])
    ax.minorticks_off()
    control = {contenders[comparison['control']]['label'] for comparison, contenders, _ in results}
    control = control.pop() if len(control) == 1 else 'the control'
    ax.set_xlabel(f'cache, as a share of that of {control}')
    ax.set_ylabel(f'val loss above {control}, %')
    ax.set_title(
        '95 % intervals of paired differences; hollow: fewer than three seeds'
        + (f'; above: {", ".join(far)}' if far else ''),
        fontsize=9.5,
        color=figures.COLORS['muted'],
    )
