"""Figures of heads: scores as maps, scores through training, what a latent holds."""

import math
from dataclasses import dataclass
from pathlib import Path

from nanomla.core import figures
from nanomla.core.configurator import UserError

MAPS = (  # the rows of `draw_maps`
    'induction',
    'without repetition',
    'with a gap',
    'on held-out text',
    'previous token',
    'copying',
)
BOXED = {'previous token': 'previous', 'copying': None}  # label of boxes; else induction
MOST_MODELS = 4  # on one sheet of maps
LONGEST_FOOTER = 150  # letters
SMALLEST_NUMBER = 6  # points, of the number on a head
DASHES = ('solid', (0, (5, 1.5)), (0, (1.2, 1.2)), (0, (6, 1.5, 1.2, 1.5)))  # variants of a kind
ALARM = '#B3261E'  # the title of an untrained model
ICL = ('in-context learning (nats)', 'icl')


def kind_color(kind: str) -> str:
    return figures.COLORS.get(kind.lower(), figures.COLORS['ink'])


# -------------------------------------------------------------------------------------------------
# maps


def grid_of(model: dict, row: str) -> list[list[float]]:
    """Return one row of MAPS of a `models` entry, layer by layer; NaN where it was not measured."""
    values = [value_of(entry, row) for entry in model['scores']]
    heads = model['heads']
    return [values[i : i + heads] for i in range(0, len(values), heads)]


def value_of(entry: dict, row: str) -> float:
    induction = entry['induction']
    values = {
        'induction': induction['score'],
        'without repetition': induction['control'],
        'with a gap': induction['gap'],
        'previous token': entry['previous']['score'],
        'copying': entry['effective_copying'],
    }
    if entry.get('on_text'):
        values['on held-out text'] = entry['on_text']['gap']
    value = values.get(row)
    return math.nan if value is None else value


def rows_of(models: list[dict]) -> list[str]:
    """Return the rows of MAPS that some model was measured for."""
    return [row for row in MAPS if any(is_measured(model, row) for model in models)]


def is_measured(model: dict, row: str) -> bool:
    return any(not math.isnan(value_of(entry, row)) for entry in model['scores'])


def facts(model: dict) -> list[str]:
    """Return how far a model was trained, and its loss."""
    parts = []
    if not model['trained']:
        parts.append('UNTRAINED')
    if model['step'] is not None:
        parts.append(f'step {model["step"]:,}')
    if model['tokens']:
        parts.append(f'{figures.count(model["tokens"]).strip()} tokens')
    if model['val_loss'] is not None:
        parts.append(f'val loss {model["val_loss"]:.3f}')
    return parts or ['pretrained']


def draw_maps(models: list[dict], path: Path, footer: str) -> Path:
    """
    Draw layer x head maps, the models side by side on one scale from 0 to 1 (effective copying:
    from -1, in red), with a strip of each layer's mean on the right.

    A box marks heads that are labelled induction (in the row of the previous token: previous), a
    number the largest score of a map.
    """
    if len(models) > MOST_MODELS:
        raise UserError(
            f'{len(models)} models do not fit on one figure of maps: '
            f'look at {MOST_MODELS} at a time'
        )
    rows = rows_of(models)
    row_height = min(2.4, 0.9 + 0.17 * max(model['layers'] for model in models))
    repeats = models[0]['repeats']
    note = (
        f'{repeats["texts"]} random texts of {repeats["L"]} tokens, repeated; number: '
        'largest; box: labelled induction (previous in its row); strip: layer mean; red: below 0'
    )
    size = (figures.WIDTH, 1.7 + row_height * len(rows))
    with figures.sheet(len(rows), len(models), size=size, title='What the heads do', note=note) as (
        fig,
        axes,
    ):
        by_row = axes.reshape(len(rows), len(models))
        images = []
        for row, row_axes in zip(rows, by_row):
            for model, ax in zip(models, row_axes):
                images.append(draw_map(ax, model, row))
                mark_largest(ax, model, row, row_height)
                mark_label(ax, model, row)
        label_maps(by_row, models, rows)
        bar = fig.colorbar(images[0], ax=list(axes.flat), shrink=0.35, pad=0.015, aspect=30)
        bar.outline.set_visible(False)
        figures.footer(fig, footer)
        figures.save(fig, path)
    return path


def draw_map(ax, model: dict, row: str):
    """Draw one map and its strip of layer means; return the image of the map."""
    from mpl_toolkits.axes_grid1 import make_axes_locatable

    grid = grid_of(model, row)
    look = dict(vmin=0, vmax=1, cmap='Blues')
    if row == 'copying':  # from -1 on: red is the opposite of copying
        look = dict(vmin=-1, vmax=1, cmap='RdBu')
    look |= dict(aspect='auto', interpolation='nearest', origin='lower')
    image = ax.imshow(grid, **look)
    strip = make_axes_locatable(ax).append_axes('right', size='3%', pad=0.06)
    strip.imshow([[sum(line) / len(line)] for line in grid], **look)
    for part in (ax, strip):
        part.grid(False)
        part.tick_params(length=0)
    strip.set(xticks=[], yticks=[])
    return image


def mark_largest(ax, model: dict, row: str, row_height: float) -> None:
    """Write the largest score of a map on its head, or above the map where heads are small."""
    if row == 'copying' or not is_measured(model, row):
        return
    best, at = -math.inf, (0, 0)
    for layer, line in enumerate(grid_of(model, row)):
        for head, value in enumerate(line):
            if value >= best:
                best, at = value, (head, layer)
    fontsize = min(9, 50 * row_height / model['layers'])
    if fontsize < SMALLEST_NUMBER:  # a head is too thin for it: beside its map
        where = dict(xycoords='axes fraction', ha='right', va='bottom', annotation_clip=False)
        ax.annotate(f'{best:.2f}', (1, 1.01), fontsize=9, **where)
        return
    color = 'white' if best > 0.55 else figures.COLORS['ink']
    middle = dict(ha='center', va='center')
    ax.text(*at, f'{best:.2f}', fontsize=fontsize, color=color, zorder=4, **middle)


def mark_label(ax, model: dict, row: str) -> None:
    """Draw a box around the heads with the label that a row is about."""
    from matplotlib.patches import Rectangle

    wanted = BOXED.get(row, 'induction')
    look = dict(fill=False, linewidth=1.6, edgecolor=figures.COLORS['mla'], clip_on=False, zorder=3)
    for entry in model['scores']:
        label = entry['label']
        if row == 'on held-out text':
            label = (entry.get('on_text') or {}).get('label', '')
        if label == wanted:
            ax.add_patch(Rectangle((entry['head'] - 0.5, entry['layer'] - 0.5), 1, 1, **look))


def label_maps(by_row, models: list[dict], rows: list[str]) -> None:
    """Write the titles over the maps, the rows' names beside them, and the ticks."""
    for row, row_axes in zip(rows, by_row):
        for j, (model, ax) in enumerate(zip(models, row_axes)):
            heads = ticks_of(model['heads'], 12)
            is_last = row == rows[-1]
            ax.set_xticks(heads, [str(tick) for tick in heads] if is_last else [])
            layers = ticks_of(model['layers'], 6)
            named = j == 0 or model['layers'] != models[0]['layers']
            ax.set_yticks(layers, [str(tick) for tick in layers] if named else [])
    for row, row_axes in zip(rows, by_row):
        row_axes[0].set_ylabel(f'{row}\nlayer', fontsize=10)
    for ax in by_row[-1]:
        ax.set_xlabel('head')
    between = ' · ' if len(models) < 3 else '\n'
    for model, ax in zip(models, by_row[0]):
        title = f'{model["name"]} ({model["kind"]})\n{between.join(facts(model))}'
        color = kind_color(model['kind']) if model['trained'] else ALARM
        ax.set_title(title, fontsize=10.5, color=color)


def ticks_of(count: int, most: int) -> list[int]:
    """Return about `most` ticks on `count` heads or layers."""
    return list(range(0, count, max(1, math.ceil(count / most))))


# -------------------------------------------------------------------------------------------------
# curves


@dataclass
class Look:
    color: str
    linestyle: object


def variant_name(run: dict) -> str:
    """Return what a run is called in a legend: seeds of one variant share a name and a look."""
    return run.get('variant', run['name'])


def looks_of(runs: list[dict]) -> dict[str, Look]:
    """Return a colour of the kind and a dash for every variant."""
    looks = {}
    used = {}
    for run in runs:
        variant, kind = variant_name(run), run['kind'].lower()
        if variant not in looks:
            number = used.get(kind, 0)
            looks[variant] = Look(kind_color(kind), DASHES[number % len(DASHES)])
            used[kind] = number + 1
    return looks


def has_text(runs: list[dict]) -> bool:
    """Return whether all runs were measured on held-out text, and are not those of a study."""
    for run in runs:
        if 'variant' in run or not run.get('max_text'):
            return False
        if any(value is None for value in run['max_text']):
            return False
    return True


def with_savings(run: dict) -> dict:
    """Return a run with what the repetition saves, in nats a token."""
    savings = {}
    for prefix in ('', 'text_'):
        pairs = zip(run[f'{prefix}repeat_loss'], run[f'{prefix}control_loss'])
        savings[f'{prefix}saved'] = [control - repeated for repeated, control in pairs]
    return run | savings


def draw_training(
    runs: list[dict], path: Path, footer: str, title: str = 'Through training'
) -> Path:
    """
    Draw curves of each run of `checkpoints` over the tokens seen: the best gap score, the loss on
    the repetition, the in-context-learning score.

    Where held-out text was repeated as well (and not of a study's many runs): what the repetition
    saves, on random tokens and on text, and the scores of both, with a ring where a head is
    labelled induction.
    """
    on_text = has_text(runs)
    panels = [
        ('gap score of the best head', 'max_induction'),
        ('loss on the repetition (nats)', 'repeat_loss'),
    ]
    note = (
        'gap score: attention to what followed the same token before, with other tokens between '
        'the two copies'
    )
    if on_text:
        runs = [with_savings(run) for run in runs]
        panels = [
            ('induction, random tokens', 'max_induction'),
            ('induction, held-out text', 'max_text'),
            ('previous token, best head', 'max_previous'),
            ('nats saved, random tokens', 'saved'),
            ('nats saved, held-out text', 'text_saved'),
        ]
        note = (
            'induction: the best head with a gap (a ring: labelled induction); nats saved a token '
            'by the repetition'
        )
    if any(set(run['icl']) != {None} for run in runs):
        panels.append(ICL)
    rows, cols, height = 1, len(panels), 4.8
    if on_text:
        rows, cols, height = 2, 3, 7.7
    size = (figures.WIDTH, height)
    with figures.sheet(rows, cols, size=size, title=title, note=note) as (fig, axes):
        for ax, (label, key) in zip(axes.flat, panels):
            draw_curves(ax, runs, key, ringed=on_text)
            ax.set_ylabel(label)
        if on_text:
            share_range(axes.flat[3:5], runs)
        for ax in axes.flat[len(panels) :]:
            ax.set_visible(False)
        figures.legend(fig, axes.flat[0])
        figures.footer(fig, footer)
        figures.save(fig, path, palette=True)
    return path


def x_of(runs: list[dict]) -> str:
    """Return what curves are drawn over: tokens where all runs know them, else steps."""
    for run in runs:
        if any(tokens is None for tokens in run['tokens']):
            return 'step'
    return 'tokens'


def draw_curves(ax, runs: list[dict], key: str, ringed: bool) -> None:
    """Draw one number of every run on a logarithmic axis; `ringed`: mark labelled heads."""
    over = x_of(runs)
    looks = looks_of(runs)
    named = set()
    for run in runs:
        variant = variant_name(run)
        look = looks[variant]
        points = [(x, y) for x, y in zip(run[over], run[key]) if x and y is not None]
        ax.plot(
            *zip(*points),
            color=look.color,
            linestyle=look.linestyle,
            linewidth=1.6,
            alpha=0.85,
            marker='.',
            markersize=5,
            label=None if variant in named else variant,
        )
        named.add(variant)
        if ringed:
            draw_rings(ax, run, key, run[over], look.color)
    set_log_axis(ax)
    ax.set_xlabel('tokens seen' if over == 'tokens' else 'step')
    if key.startswith('max_'):
        ax.set_ylim(-0.02, 1.02)


def draw_rings(ax, run: dict, key: str, xs: list, color: str) -> None:
    """Draw a ring around the checkpoints at which a head is labelled induction."""
    counts = dict(max_induction='induction_heads', max_text='text_heads')
    if key not in counts:
        return
    points = []
    for x, y, count in zip(xs, run[key], run.get(counts[key], [])):
        if x and count:
            points.append((x, y))
    if points:
        ring = dict(linestyle='none', marker='o', markersize=8, markerfacecolor='none')
        ax.plot(*zip(*points), color=color, **ring)


def set_log_axis(ax) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    ax.set_xscale('log')
    low, high = ax.get_xlim()
    steps = (1, 2, 5) if high < 100 * low else (1,)
    ax.xaxis.set_major_locator(LogLocator(subs=steps))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: figures.count(x)))
    ax.xaxis.set_minor_formatter(NullFormatter())


def share_range(axes, runs: list[dict]) -> None:
    """Give the two panels of nats saved one scale."""
    values = []
    for run in runs:
        values += run['saved'] + run['text_saved']
    for ax in axes:
        ax.set_ylim(min(values) - 0.1, max(values) + 0.1)


# -------------------------------------------------------------------------------------------------
# latents


def draw_latents(models: list[dict], path: Path, footer: str) -> Path:
    """
    Draw what the latents of MLA models hold, a row a model: the share of their variance by number
    of components (where the models' entries have it), how many components hold 90 %, and how alike
    the layers are.
    """
    has_shares = all('variance' in model['latents'] for model in models)
    columns = 3 if has_shares else 2
    size = (figures.WIDTH, 0.9 + 3.5 * len(models))
    with figures.sheet(len(models), columns, size=size, title='What the latent holds') as (
        fig,
        axes,
    ):
        for model, row in zip(models, axes.reshape(len(models), columns)):
            latents = model['latents']
            if has_shares:
                draw_shares(fig, row[0], latents['variance'])
            draw_components(row[-2], latents['components_for_90_percent'])
            draw_likeness(fig, row[-1], latents['likeness'])
            row[0].set_title(model['name'])
        figures.footer(fig, footer)
        figures.save(fig, path)
    return path


def draw_shares(fig, ax, shares: list[list[float]]) -> None:
    """Draw the share of the variance over the number of components, a curve a layer."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    colors = colormaps['viridis'].resampled(256)
    norm = Normalize(0, max(1, len(shares) - 1) / 0.9)  # without the palest yellow
    for layer, values in enumerate(shares):
        ax.plot(range(1, len(values) + 1), values, color=colors(norm(layer)), linewidth=1.5)
    ax.set(
        xscale='log',
        xlabel='principal components',
        ylabel='share of the variance of c_kv',
        ylim=(0, 1.02),
    )
    bar = fig.colorbar(ScalarMappable(norm, colors), ax=ax, shrink=0.8, label='layer')
    bar.ax.set_ylim(0, max(1, len(shares) - 1))
    bar.set_ticks(ticks_of(len(shares), 6))
    bar.outline.set_visible(False)


def draw_components(ax, components: list[int]) -> None:
    """Draw how many components hold 90 % of the variance in each layer."""
    ax.bar(range(len(components)), components, color=figures.COLORS['mla'])
    ax.set(xlabel='layer', ylabel='components for 90 % of the variance')
    ax.set_xticks(ticks_of(len(components), 12))
    ax.grid(False, axis='x')


def draw_likeness(fig, ax, likeness: list[list[float]]) -> None:
    """Draw the likeness of every two layers' latents."""
    look = dict(vmin=0, vmax=1, cmap='Blues', origin='lower', interpolation='nearest')
    image = ax.imshow(likeness, **look)
    ax.grid(False)
    ax.set(xlabel='layer', ylabel='layer', title='likeness of layers (CKA)')
    ticks = ticks_of(len(likeness), 6)
    ax.set_xticks(ticks)
    ax.set_yticks(ticks)
    fig.colorbar(image, ax=ax, shrink=0.8).outline.set_visible(False)


# -------------------------------------------------------------------------------------------------
# all figures of a report


def footer_of(made: dict) -> str:
    """Return the line below a report's figures: where its numbers come from."""
    commit = f'commit {made["commit"]}' if 'commit' in made else ''
    parts = [made.get('device'), commit, made.get('date'), made.get('command')]
    line = ' · '.join(part for part in parts if part)
    if len(line) >= LONGEST_FOOTER:
        line = line[: LONGEST_FOOTER - 3] + '...'
    return line


def draw_report(folder: Path, report: dict) -> list[Path]:
    """
    Draw the figures of a report, and return their paths: curves of its checkpoints (study.png for
    seeds of a study, else training.png), maps of its models' heads, and what their latents hold.
    """
    footer = footer_of(report['made'])
    written = []
    runs = report['checkpoints']
    if runs:
        path = folder / ('study.png' if 'variant' in runs[0] else 'training.png')
        written.append(draw_training(runs, path, footer, 'Induction through training'))
    models = [model for model in report['models'] if 'scores' in model]
    for first in range(0, len(models), MOST_MODELS):
        number = '' if len(models) <= MOST_MODELS else first // MOST_MODELS + 1
        path = folder / f'heads{number}.png'
        written.append(draw_maps(models[first : first + MOST_MODELS], path, footer))
    with_latents = [model for model in report['models'] if 'latents' in model]
    if with_latents:
        written.append(draw_latents(with_latents, folder / 'latents.png', footer))
    return written
