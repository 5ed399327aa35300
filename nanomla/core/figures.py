"""
One look for every picture of the project: a colour for each attention kind, type, size, a footer.

    with figures.sheet(title="Decode speed") as (fig, ax):
        ax.plot(tokens, speed, color=figures.COLORS["mla"])
        figures.footer(fig, "commit abc1234 · seeds 1, 2, 3 · NVIDIA H200 · 2025-01-31")
        figures.save(fig, "assets/speed.png")

A sheet is 10 inches wide at 160 dpi: 1600 pixels, which a README shows at 800, so 1 pt of type
is about 1.1 pixels there. Nothing here touches pyplot, the backend or the caller's rcParams,
and matplotlib is imported only when something is drawn.
"""

import contextlib
import io
import json
import math
import os

from nanomla.core.configurator import UserError

# Okabe and Ito's palette, which stays apart under every common colour blindness: cool colours for
# the caches that keep K and V per head, the one warm colour for the latent.
COLORS = {
    'mha': '#0072B2',
    'gqa': '#56B4E9',
    'mqa': '#009E73',
    'mla': '#D55E00',
    'peer': '#CC79A7',  # somebody else's implementation
    'ink': '#1F2328',  # text: GitHub's own
    'muted': '#6A737D',  # text that may be overlooked: ticks, footers
    'grid': '#E4E7EB',
}

WIDTH = 10.0  # inches
DPI = 160

STYLE = {
    'font.family': ['DejaVu Sans'],  # comes with matplotlib: the same picture on every machine
    'mathtext.fontset': 'dejavusans',
    'font.size': 11,
    'text.color': COLORS['ink'],
    'figure.facecolor': 'white',
    'figure.dpi': DPI,
    'savefig.dpi': DPI,
    'savefig.facecolor': 'white',
    'savefig.bbox': None,  # a tight box would change the size in pixels
    'axes.facecolor': 'white',
    'axes.edgecolor': '#B8BEC6',
    'axes.labelcolor': COLORS['ink'],
    'axes.labelsize': 11,
    'axes.titlesize': 11.5,
    'axes.titlelocation': 'left',
    'axes.titlepad': 10,
    'axes.spines.top': False,
    'axes.spines.right': False,
    'axes.grid': True,
    'axes.axisbelow': True,
    'axes.prop_cycle': None,  # set in _look, where cycler is at hand
    'grid.color': COLORS['grid'],
    'grid.linewidth': 0.8,
    'xtick.color': '#B8BEC6',
    'ytick.color': '#B8BEC6',
    'xtick.labelcolor': COLORS['muted'],
    'ytick.labelcolor': COLORS['muted'],
    'xtick.labelsize': 10,
    'ytick.labelsize': 10,
    'lines.linewidth': 2.0,
    'lines.solid_capstyle': 'round',
    'legend.frameon': False,
    'legend.fontsize': 10.5,
}


def _look():
    """The rc_context every sheet is drawn and saved in; matplotlib's first and only way in."""
    try:
        import matplotlib
        from cycler import cycler
    except ImportError as error:
        raise UserError(
            'pictures need matplotlib, which is not installed: pip install matplotlib'
        ) from error
    kinds = [COLORS[kind] for kind in ('mha', 'mla', 'gqa', 'mqa', 'peer')]
    # rcdefaults first: a user's matplotlibrc must not leak into the project's pictures
    base = {
        k: v
        for k, v in matplotlib.rcParamsDefault.items()
        if k not in ('backend', 'backend_fallback')
    }
    return matplotlib.rc_context({**base, **STYLE, 'axes.prop_cycle': cycler(color=kinds)})


def plain(text):
    """`text` with its dollar signs kept: a data set's name is not a formula."""
    return str(text).replace('$', r'\$')


def halo():
    """A white rim that keeps text readable on lines."""
    from matplotlib.patheffects import withStroke

    return withStroke(linewidth=4, foreground='white')


@contextlib.contextmanager
def sheet(rows=1, cols=1, size=None, title=None, note=None):
    """
    A figure in house style: `with sheet(...) as (fig, axes)`; draw and `save` inside the block.

    axes is one Axes for a 1 x 1 sheet, a row of them for one row or column, else an array (rows, cols).
    size is (width, height) in inches; note is a grey line under the title. UserError when matplotlib
    is not installed.
    """
    with _look():
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        fig = Figure(figsize=size or (WIDTH, 1.4 + 3.6 * rows), layout='constrained')
        FigureCanvasAgg(fig)
        fig.get_layout_engine().set(w_pad=0.12, h_pad=0.10, wspace=0.03, hspace=0.05)
        axes = fig.subplots(rows, cols)
        # title and note stand at the left edge, where reading begins; the axes get what is left
        height, top = fig.get_figheight(), 0.0
        for text, size, weight, color, line in (
            (title, 14, 'bold', COLORS['ink'], 0.40),
            (note, 10.5, 'normal', COLORS['muted'], 0.24),
        ):
            if text:
                fig.text(
                    0.012,
                    1 - (top + line / 2 + 0.04) / height,
                    plain(text),
                    fontsize=size,
                    fontweight=weight,
                    color=color,
                    ha='left',
                    va='center',
                )
                top += line
        _frame(fig, top=top)
        yield fig, axes


def _frame(fig, top=None, bottom=None):
    """Keep the axes out of the top or bottom inches of the sheet."""
    engine = fig.get_layout_engine()
    if 'rect' not in engine.get():  # a drawing that places its axes itself
        return
    height = fig.get_figheight()
    _, y, _, h = engine.get()['rect']
    low = y if bottom is None else bottom / height
    high = y + h if top is None else 1 - top / height
    engine.set(rect=(0, low, 1, high - low))


def footer(fig, text):
    """The small grey line at the bottom: commit, seeds, GPU, date, as given."""
    _frame(fig, bottom=0.26)
    fig.text(
        0.012,
        0.15 / fig.get_figheight(),
        plain(text),
        fontsize=8.5,
        color=COLORS['muted'],
        ha='left',
        va='center',
    )


def save(fig, path, palette=False):
    """
    Write the figure, whole or not at all: under a temporary name, then renamed.

    The ending names the format (png, svg, pdf). palette=True keeps 256 colours of a png: a third of the
    bytes, and no loss to lines and type; leave it off for heat maps. UserError when the path cannot be
    written.
    """
    path = os.fspath(path)
    kind = os.path.splitext(path)[1].lstrip('.').lower()
    if kind not in ('png', 'svg', 'pdf'):
        raise UserError(f"{path}: a picture's name ends in .png, .svg or .pdf")
    temporary = f'{path}.{os.getpid()}.tmp'
    try:
        with _look():
            # no version stamp: the same figure gives the same bytes
            picture = io.BytesIO()
            fig.savefig(
                picture, format=kind, metadata={'Software': None} if kind == 'png' else None
            )
        if palette and kind == 'png':
            from PIL import Image  # matplotlib brings it

            image = Image.open(picture).convert('RGB').quantize(256, dither=Image.Dither.NONE)
            picture = io.BytesIO()
            image.save(picture, 'png', optimize=True)
        with open(temporary, 'wb') as file:
            file.write(picture.getvalue())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f'{path}: cannot write the picture ({error.strerror or error})') from error
    finally:
        with contextlib.suppress(OSError):
            os.remove(temporary)


# ---------------------------------------------------------------------------------------------
# the log of a run, and its curve


def _event(line):
    """One line of a log as a dict, or None where a kill left only a piece."""
    # a resumed run may have written its first event right behind such a piece
    for start in (0, line.rfind('{"event"')):
        try:
            event = json.loads(line[max(start, 0) :])
        except ValueError:
            continue
        if isinstance(event, dict) and 'event' in event:
            return event
    return None


def read_log(path):
    """
    (settings, events) of a log.jsonl, as the run that counts left them.

    settings is the settings line ({} if there is none; the last one if a resume wrote another),
    events all the others in order. Pieces of lines that a kill left are skipped. A resume at step k
    drops what came before it with a step above k, and the end of the run it takes up again.
    UserError when the file cannot be read or holds no log.
    """
    try:
        with open(path, encoding='utf-8', errors='replace') as file:
            lines = [line for line in file if line.strip()]
    except OSError as error:
        raise UserError(f'{path}: cannot read the log ({error.strerror or error})') from error
    parsed = [event for event in map(_event, lines) if event is not None]
    if len(lines) > 1 and not parsed:
        raise UserError(f'{path}: not a log.jsonl (no line of it is an event)')

    settings, events = {}, []
    for event in parsed:
        if event['event'] == 'settings':
            settings = event
            continue
        if event['event'] == 'resume' and 'step' in event:
            events = [
                e for e in events if e['event'] != 'end' and e.get('step', 0) <= event['step']
            ]
        events.append(event)
    return settings, events


def _number(event, key):
    """event[key] as a float; NaN where it is missing or no number."""
    value = event.get(key)
    return float(value) if isinstance(value, (int, float)) else math.nan


def _series(events, kind, key):
    """(steps, values) of one quantity, finite or not, in order."""
    rows = [
        (e['step'], _number(e, key))
        for e in events
        if e['event'] == kind and 'step' in e and key in e
    ]
    return [step for step, _ in rows], [value for _, value in rows]


def _smooth(values, half):
    """Centred mean over 2 * half + 1 points, NaN left out; narrower at the start, where losses fall fast."""
    out = []
    for i, value in enumerate(values):
        reach = min(i, half)
        near = [v for v in values[i - reach : i + reach + 1] if math.isfinite(v)]
        out.append(sum(near) / len(near) if near and math.isfinite(value) else math.nan)
    return out


def _limits(series, first, last):
    """
    (low, high) of a loss axis on which the end of the run is readable: the losses of the first 2 % of
    the steps may leave at the top, unless there is little else. series holds (steps, values) pairs.
    """
    begin = first + 0.02 * (last - first)
    points = [(s, v) for steps, values in series for s, v in zip(steps, values) if math.isfinite(v)]
    late = [v for s, v in points if s >= begin and s > first]
    values = late if len(late) >= 20 else [v for _, v in points]
    if not values:
        return 0.0, 1.0
    low, high = min(values), max(values)
    room = max(high - low, 0.05 * abs(high), 1e-6)
    return low - 0.06 * room, high + 0.10 * room


def _clock(events):
    """
    What the axis on top counts, as (unit, [(step, amount)]): hours, minutes or seconds of training,
    else tokens, else nothing. A clock that a resume has set back is carried on.
    """
    clock, tokens, start, resumed = [], [], 0.0, False
    for e in events:
        resumed |= e['event'] == 'resume'
        if e['event'] not in ('train', 'eval') or 'step' not in e:
            continue
        seconds = _number(e, 'seconds')
        if math.isfinite(seconds):
            if resumed and clock and seconds < clock[-1][1]:
                start = clock[-1][1]
            resumed = False
            clock.append((e['step'], start + seconds))
        if math.isfinite(_number(e, 'tokens')):
            tokens.append((e['step'], e['tokens'] / 1e6))
    if len(clock) > 1:
        total = max(seconds for _, seconds in clock)
        size, unit = (
            (3600, 'h') if total >= 3 * 3600 else (60, 'min') if total >= 3 * 60 else (1, 's')
        )
        return unit, sorted((step, seconds / size) for step, seconds in clock)
    return ('M tokens', sorted(tokens)) if len(tokens) > 1 else (None, [])


def _when(points, amount):
    """The step at which a clock's (step, amount) points pass `amount`, between its neighbours; or None."""
    for (s0, a0), (s1, a1) in zip(points, points[1:]):
        if a0 <= amount <= a1 and a1 > a0:
            return s0 + (s1 - s0) * (amount - a0) / (a1 - a0)
    return None


def count(number):
    """10_650_000 -> '10.7 M': three digits and a unit."""
    for size, unit in ((1e9, ' B'), (1e6, ' M'), (1e3, ' k')):
        if abs(number) >= size:
            return f'{number / size:.3g}{unit}'
    return f'{number:g}'


def kind_of(settings):
    """'mla', 'mha', 'gqa' or 'mqa': which colour a run has."""
    config = settings.get('config') or {}
    heads, kv_heads = config.get('n_head'), config.get('n_kv_head')
    if settings.get('kind') == 'mha' and heads and kv_heads and kv_heads < heads:
        return 'mqa' if kv_heads == 1 else 'gqa'
    return settings.get('kind', 'mha')


def _title(settings):
    """'MLA · 10.6 M parameters · shakespeare_char', as far as the settings know."""
    data = settings.get('data') or {}
    parts = [kind_of(settings).upper() if 'kind' in settings else 'training run']
    if 'params' in settings:
        parts.append(f'{count(settings["params"])} parameters')
    if data.get('name'):
        parts.append(str(data['name']))
    return ' · '.join(parts)


def _facts(settings, events):
    """The curve's footer: where the numbers come from."""
    config = settings.get('config') or {}
    end = next((e for e in reversed(events) if e['event'] == 'end'), {})
    parts = []
    if settings.get('commit'):
        parts.append(f'commit {settings["commit"]}')
    if 'seed' in config:
        parts.append(f'seed {config["seed"]}')
    parts += [str(settings[key]) for key in ('device', 'dtype', 'date') if settings.get(key)]
    if math.isfinite(_number(end, 'tok_per_s')):
        parts.append(f'{count(end["tok_per_s"])} tokens/s')
    if math.isfinite(_number(end, 'peak_memory')) and end['peak_memory'] > 0:
        parts.append(f'peak memory {end["peak_memory"] / 2**30:.1f} GiB')
    return ' · '.join(parts)


def curve(log_path, out_path):
    """
    Draw one training run from its log.jsonl: train loss, validation loss and its best, over steps.

    The log may be cut, resumed, without a single event, or full of NaN. UserError when it cannot be
    read or the picture cannot be written.
    """
    settings, events = read_log(log_path)
    train_steps, train = _series(events, 'train', 'loss')
    val_steps, val = _series(events, 'eval', 'val_loss')
    color = COLORS.get(kind_of(settings), COLORS['ink'])
    steps = train_steps + val_steps
    first, last = (min(steps), max(steps)) if steps else (0, 1)

    about = []
    if (settings.get('data') or {}).get('source'):
        about.append(f'text: {settings["data"]["source"]}')
    if 'cache_bytes_per_token' in settings:
        about.append(f'cache: {settings["cache_bytes_per_token"]:,} bytes per token')

    with sheet(size=(WIDTH, 5.2), title=_title(settings), note='  ·  '.join(about)) as (fig, ax):
        from matplotlib.ticker import FuncFormatter, MaxNLocator

        half = len(train) // 60  # a window of about 3 % of the run
        smooth = _smooth(train, half)
        if half:
            ax.plot(train_steps, train, color=COLORS['muted'], alpha=0.30, linewidth=0.7)
        if train:
            ax.plot(
                train_steps,
                smooth,
                color=COLORS['muted'],
                linewidth=1.6,
                label='train',
                marker='.' if len(train) < 20 else None,
            )
        if val:
            ax.plot(
                val_steps,
                val,
                color=color,
                marker='o',
                markersize=4.5 if len(val) < 40 else 0,
                label='validation',
                zorder=3,
            )

        low, high = _limits([(train_steps, smooth), (val_steps, val)], first, last)
        room = 0.02 * (last - first) or 1
        ax.set_xlim(first - (room if first == last else 0), last + room)
        ax.set_ylim(low, high)
        ax.set_xlabel('step')
        ax.set_ylabel('loss (nats per token)')
        ax.xaxis.set_major_locator(MaxNLocator(8, integer=True, steps=[1, 2, 2.5, 5, 10]))
        ax.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f'{step:,.0f}'))

        finite = [(value, step) for step, value in zip(val_steps, val) if math.isfinite(value)]
        if finite:
            value, step = min(finite)
            late = step > (first + last) / 2
            ax.plot(
                [step],
                [value],
                marker='o',
                markersize=10,
                markerfacecolor='white',
                markeredgecolor=color,
                markeredgewidth=2.2,
                linestyle='none',
                zorder=4,
            )
            ax.annotate(
                f'best {value:.4f} at step {step:,}',
                (step, value),
                xytext=(0, 30),
                textcoords='offset points',
                ha='right' if late else 'left',
                va='bottom',
                color=color,
                fontsize=11.5,
                fontweight='bold',
                zorder=5,
                path_effects=[halo()],
                arrowprops={
                    'arrowstyle': '-',
                    'color': color,
                    'linewidth': 1,
                    'shrinkB': 7,
                    'relpos': (1, 0) if late else (0, 0),
                },
            )
        broken = sorted(s for s, v in zip(steps, train + val) if not math.isfinite(v))
        if broken:
            ax.axvline(broken[0], color=COLORS['ink'], linewidth=1, linestyle=(0, (4, 3)))
            ax.annotate(
                f'not a number at step {broken[0]:,}',
                (broken[0], 0.5),
                xytext=(5, 0),
                rotation=90,
                xycoords=('data', 'axes fraction'),
                textcoords='offset points',
                ha='left',
                va='center',
            )
        if steps:
            ax.legend(loc='upper right')
        else:
            ax.set_xticks([])
            ax.set_yticks([])
            ax.text(
                0.5,
                0.5,
                'no losses logged yet',
                transform=ax.transAxes,
                ha='center',
                color=COLORS['muted'],
            )

        unit, points = _clock(events)
        if unit:
            amounts = MaxNLocator(7, steps=[1, 2, 5, 10]).tick_values(points[0][1], points[-1][1])
            ticks = [(_when(points, amount), f'{amount:,g} {unit}') for amount in amounts]
            ticks = [(step, label) for step, label in ticks if step is not None]
            top = ax.secondary_xaxis('top')
            top.set_xticks([step for step, _ in ticks], [label for _, label in ticks])
            top.spines['top'].set_visible(False)

        footer(fig, _facts(settings, events))
        save(fig, out_path, palette=True)
