"""Pictures of heads, in the house's look: scores as maps, scores through training, what a latent keeps."""

import math

from nanomla.core import figures
from nanomla.core.configurator import UserError

SHOWN = (
    'induction',
    'without repetition',
    'with a gap',
    'on held-out text',
    'previous token',
    'copying',
)  # rows of `maps`
LINES = ('solid', (0, (5, 1.5)), (0, (1.2, 1.2)), (0, (6, 1.5, 1.2, 1.5)))  # for models of one kind


def kind_color(kind):
    return figures.COLORS.get(kind.lower(), figures.COLORS['ink'])


def grid_of(model, row):
    """One row of `maps` of a `models` entry as a list of lists, layer by layer; NaN where it was not measured."""

    def value(entry):
        induction = entry['induction']
        if row == 'on held-out text':
            return entry['on_text']['gap'] if entry.get('on_text') else math.nan
        return {
            'induction': induction['score'],
            'without repetition': induction['control'],
            'with a gap': induction['gap'],
            'previous token': entry['previous']['score'],
            'copying': entry['effective_copying'],
        }[row]

    flat, H = [value(entry) for entry in model['scores']], model['heads']
    return [flat[i : i + H] for i in range(0, len(flat), H)]


def facts(model):
    """What every picture says of a model: how far it was trained, and its loss."""
    parts = [
        '' if model['trained'] else 'UNTRAINED',
        f'step {model["step"]:,}' if model['step'] is not None else '',
        f'{figures.count(model["tokens"]).strip()} tokens' if model['tokens'] else '',
        f'val loss {model["val_loss"]:.3f}' if model['val_loss'] is not None else '',
    ]
    return ' · '.join(filter(None, parts)) or 'pretrained'


def maps(report, path, footer):
    """
    Layer x head maps, the models side by side on one scale from 0 to 1 (effective copying: from -1, in red), a strip of each layer's mean on the right. A box marks
    heads that are called induction (and, in the row of the previous token, previous), a number the largest score of a map.
    """
    models = report['models']
    if len(models) > 4:
        raise UserError(
            f'{len(models)} models do not fit on one picture of maps: look at 4 at a time'
        )
    layers = max(m['layers'] for m in models)
    row_height = min(2.4, 0.9 + 0.17 * layers)
    rows = [
        row
        for row in SHOWN
        if row != 'on held-out text'
        or any(entry.get('on_text') for m in models for entry in m['scores'])
    ]
    repeats = models[0]['repeats']
    note = (
        f'{repeats["texts"]} random texts of {repeats["L"]} tokens said twice; number: largest; box: called induction (previous in its row); '
        'strip: layer mean; red: below 0'
    )
    scale = None
    with figures.sheet(
        len(rows),
        len(models),
        size=(figures.WIDTH, 1.7 + row_height * len(rows)),
        title='What the heads do',
        note=note,
    ) as (fig, axes):
        from matplotlib.patches import Rectangle
        from mpl_toolkits.axes_grid1 import make_axes_locatable

        for i, row in enumerate(rows):
            for j, model in enumerate(models):
                ax, grid = (axes[i][j] if len(models) > 1 else axes[i]), grid_of(model, row)
                below = row == 'copying'  # from -1 on: red is the opposite of copying
                look = dict(
                    vmin=-1 if below else 0,
                    vmax=1,
                    cmap='RdBu' if below else 'Blues',
                    aspect='auto',
                    interpolation='nearest',
                    origin='lower',
                )
                image = ax.imshow(grid, **look)
                scale = scale or image
                strip = make_axes_locatable(ax).append_axes('right', size='3%', pad=0.06)
                strip.imshow([[sum(line) / len(line)] for line in grid], **look)
                for a in (ax, strip):
                    a.grid(False)
                    a.tick_params(length=0)
                strip.set(xticks=[], yticks=[])
                wanted = {'previous token': 'previous', 'copying': None}.get(row, 'induction')
                top, layer, head = max(
                    (value, layer, head)
                    for layer, line in enumerate(grid)
                    for head, value in enumerate(line)
                )
                if not below and top == top:
                    ax.text(
                        head,
                        layer,
                        f'{top:.2f}',
                        ha='center',
                        va='center',
                        fontsize=min(9, 50 * row_height / model['layers']),
                        color='white' if top > 0.55 else figures.COLORS['ink'],
                        zorder=4,
                    )
                for entry in model['scores']:
                    if (
                        entry.get('on_text') or dict(label='')
                        if row == 'on held-out text'
                        else entry
                    )['label'] == wanted:
                        ax.add_patch(
                            Rectangle(
                                (entry['head'] - 0.5, entry['layer'] - 0.5),
                                1,
                                1,
                                fill=False,
                                linewidth=1.6,
                                edgecolor=figures.COLORS['mla'],
                                clip_on=False,
                                zorder=3,
                            )
                        )
                ticks = range(0, model['heads'], max(1, math.ceil(model['heads'] / 12)))
                ax.set_xticks(list(ticks), [str(t) for t in ticks] if i == len(rows) - 1 else [])
                ticks = range(0, model['layers'], max(1, math.ceil(model['layers'] / 6)))
                ax.set_yticks(
                    list(ticks),
                    [str(t) for t in ticks]
                    if j == 0 or model['layers'] != models[0]['layers']
                    else [],
                )
                if j == 0:
                    ax.set_ylabel(f'{row}\nlayer', fontsize=10)
                if i == 0:
                    ax.set_title(
                        f'{model["name"]} ({model["kind"]})\n{facts(model) if len(models) < 3 else facts(model).replace(" · ", chr(10))}',
                        fontsize=10.5,
                        color=kind_color(model['kind']) if model['trained'] else '#B3261E',
                    )
                if i == len(rows) - 1:
                    ax.set_xlabel('head')
        bar = fig.colorbar(scale, ax=list(axes.flat), shrink=0.35, pad=0.015, aspect=30)
        bar.outline.set_visible(False)
        figures.footer(fig, footer)
        figures.save(fig, path)
    return path


def training(runs, path, footer, title='Through training'):
    """
    Curves of each run of `checkpoints` over tokens seen: the best gap score, loss of what repeats, in-context-learning score; where held-out text was
    said twice as well (and not of a study's many runs), what the repetition saves, on random tokens and on text, and the scores of both, ringed where
    a head is called induction.
    """
    styles, used = {}, {}
    for run in runs:  # seeds of one variant share a line style
        variant = run.get('variant', run['name'])
        if variant not in styles:
            kind = run['kind'].lower()
            styles[variant] = kind_color(kind), LINES[used.setdefault(kind, 0) % len(LINES)]
            used[kind] += 1
    over = 'tokens' if all(value is not None for run in runs for value in run['tokens']) else 'step'
    spoken = all(
        value is not None for run in runs for value in run.get('max_text') or [None]
    ) and not any('variant' in run for run in runs)
    icl = [('in-context learning (nats)', 'icl')] * any(
        value is not None for run in runs for value in run['icl']
    )
    panels = [
        ('gap score of the best head', 'max_induction'),
        ('loss of what repeats (nats)', 'repeat_loss'),
        *icl,
    ]
    if spoken:
        runs = [
            run
            | {
                f'{on}saved': [
                    b - a for a, b in zip(run[f'{on}repeat_loss'], run[f'{on}control_loss'])
                ]
                for on in ('', 'text_')
            }
            for run in runs
        ]
        panels = [
            ('induction, random tokens', 'max_induction'),
            ('induction, held-out text', 'max_text'),
            ('previous token, best head', 'max_previous'),
            ('nats saved, random tokens', 'saved'),
            ('nats saved, held-out text', 'text_saved'),
            *icl,
        ]
    note = 'gap score: attention to what followed the same token before, with other tokens between the two copies'
    if spoken:
        note = 'induction: the best head with a gap (a ring: called induction); nats saved a token by the repetition'
    with figures.sheet(
        1 + spoken,
        3 if spoken else len(panels),
        size=(figures.WIDTH, 4.6 + 2.9 * spoken),
        title=title,
        note=note,
    ) as (fig, axes):
        from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

        for ax, (label, key) in zip(axes.flat, panels):
            drawn = set()
            for run in runs:
                variant = run.get('variant', run['name'])
                points = [(x, y) for x, y in zip(run[over], run[key]) if x and y is not None]
                color, line = styles[variant]
                ax.plot(
                    *zip(*points),
                    color=color,
                    linestyle=line,
                    linewidth=1.6,
                    alpha=0.85,
                    marker='.',
                    markersize=5,
                    label=None if variant in drawn else variant,
                )
                drawn.add(variant)
                called = (
                    zip(
                        run[over],
                        run[key],
                        run[{'max_induction': 'induction_heads', 'max_text': 'text_heads'}[key]],
                    )
                    if spoken and key in ('max_induction', 'max_text')
                    else ()
                )
                ringed = [(x, y) for x, y, count in called if x and count]
                if ringed:
                    ax.plot(
                        *zip(*ringed),
                        color=color,
                        linestyle='none',
                        marker='o',
                        markersize=8,
                        markerfacecolor='none',
                    )
            ax.set_xscale('log')
            low, high = ax.get_xlim()
            ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
            ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: figures.count(x)))
            ax.xaxis.set_minor_formatter(NullFormatter())
            ax.set_xlabel('tokens seen' if over == 'tokens' else 'step')
            ax.set_ylabel(label)
            if key.startswith('max_'):
                ax.set_ylim(-0.02, 1.02)
        for key in ('saved', 'text_saved') * spoken:  # one scale for both
            ax = axes.flat[[key for _, key in panels].index(key)]
            ax.set_ylim(
                min(min(run[on]) for run in runs for on in ('saved', 'text_saved')) - 0.1,
                max(max(run[on]) for run in runs for on in ('saved', 'text_saved')) + 0.1,
            )
        for ax in axes.flat[len(panels) :]:
            ax.set_visible(False)
        axes.flat[0].legend(loc='upper left', fontsize=9, handlelength=3.6)
        figures.footer(fig, footer)
        figures.save(fig, path, palette=True)
    return path


def latents(found, path, footer):
    """found: a list of (name, shares (N, R), likeness (N, N), plane (N, T, 2)) of MLA models: three panels a model."""
    with figures.sheet(
        len(found), 3, size=(figures.WIDTH, 0.9 + 3.5 * len(found)), title='What the latent keeps'
    ) as (fig, axes):
        from matplotlib import colormaps

        for i, (name, shares, likeness, plane) in enumerate(found):
            shares, likeness, plane = (t.numpy() for t in (shares, likeness, plane))
            rank, alike, cloud = axes[i] if len(found) > 1 else axes
            N, R = shares.shape
            colors = [colormaps['viridis'](0.9 * layer / max(1, N - 1)) for layer in range(N)]
            for layer, color in enumerate(colors):
                rank.plot(
                    range(1, R + 1),
                    shares[layer],
                    color=color,
                    linewidth=1.5,
                    label=f'layer {layer}' if layer in (0, N - 1) else None,
                )
            rank.set(
                xscale='log',
                xlabel='principal components',
                ylabel='share of the variance of c_kv',
                ylim=(0, 1.02),
                title=name,
            )
            rank.legend(loc='lower right')
            image = alike.imshow(
                likeness, vmin=0, vmax=1, cmap='Blues', origin='lower', interpolation='nearest'
            )
            alike.grid(False)
            alike.set(xlabel='layer', ylabel='layer', title='likeness of latents (CKA)')
            ticks = list(range(0, N, max(1, math.ceil(N / 6))))
            alike.set_xticks(ticks)
            alike.set_yticks(ticks)
            fig.colorbar(image, ax=alike, shrink=0.8).outline.set_visible(False)
            for layer, color in enumerate(colors):
                if layer in {0, N // 2, N - 1}:
                    points = plane[layer] / plane[layer].std()
                    cloud.scatter(
                        points[:, 0],
                        points[:, 1],
                        s=5,
                        color=color,
                        alpha=0.6,
                        linewidths=0,
                        label=f'layer {layer}',
                    )
            cloud.set(xlabel='first component', ylabel='second', title='tokens on two components')
            cloud.legend(
                loc='upper right', markerscale=3, frameon=True, framealpha=0.85, edgecolor='none'
            )
        figures.footer(fig, footer)
        figures.save(fig, path)
    return path
