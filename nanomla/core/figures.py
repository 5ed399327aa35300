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
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from nanomla.core.checks import TABLE, TEXT, check_entries, whole
from nanomla.core.configurator import UserError
from nanomla.core.files import parse_json, write_file

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
    'axes.prop_cycle': None,  # set in _style, where cycler is at hand
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


def require_matplotlib() -> None:
    """Raise a UserError where matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UserError(
            'pictures need matplotlib, which is not installed: pip install matplotlib'
        ) from error


@contextlib.contextmanager
def if_possible(log: Callable[[str], object] = print) -> Iterator[None]:
    """Draw inside the `with`. Where that does not go, say why, and let what was measured go on."""
    try:
        yield
    except UserError as error:
        log(f'no picture: {error}')


def _style():
    """Return the rc_context that every sheet is drawn and saved in; matplotlib is loaded here."""
    require_matplotlib()
    import matplotlib
    from cycler import cycler

    # The defaults first: a user's matplotlibrc must not leak into the project's pictures.
    settings = dict(matplotlib.rcParamsDefault)
    del settings['backend']  # it would choose one
    settings.pop('backend_fallback', None)
    kinds = [COLORS[kind] for kind in ('mha', 'mla', 'gqa', 'mqa', 'peer')]
    return matplotlib.rc_context({**settings, **STYLE, 'axes.prop_cycle': cycler(color=kinds)})


def plain(text) -> str:
    """Return `text` with its dollar signs kept: a data set's name is not a formula."""
    return str(text).replace('$', r'\$')


def text_name(source: str) -> str:
    """Return the source of a dataset for readers to whom the text is not their own."""
    return source.replace(' (your own text)', '')


def halo():
    """Return a white rim that keeps text readable on lines."""
    from matplotlib.patheffects import withStroke

    return withStroke(linewidth=4, foreground='white')


def count(number: float) -> str:
    """Return 10_650_000 as '10.7 M': three digits and a unit."""
    for size, unit in ((1e9, ' B'), (1e6, ' M'), (1e3, ' k')):
        if abs(number) >= size:
            return f'{number / size:.3g}{unit}'
    return f'{number:g}'


@contextlib.contextmanager
def sheet(
    rows: int = 1,
    cols: int = 1,
    size: tuple[float, float] | None = None,
    title: str | None = None,
    note: str | None = None,
) -> Iterator[tuple]:
    """
    Open a figure in the project's style: `with sheet(...) as (fig, axes)`; draw and save inside.

    axes: one Axes for a 1 x 1 sheet, a row of them for one row or column, else (rows, cols)
    size: (width, height) in inches
    note: a grey line under the title

    UserError when matplotlib is not installed.
    """
    with _style():
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        fig = Figure(figsize=size or (WIDTH, 1.4 + 3.6 * rows), layout='constrained')
        FigureCanvasAgg(fig)
        fig.get_layout_engine().set(w_pad=0.12, h_pad=0.10, wspace=0.03, hspace=0.05)
        axes = fig.subplots(rows, cols)
        # Title and note stand at the left edge, where reading begins; the axes get what is left.
        top = 0.0
        if title:
            bold = dict(fontsize=14, fontweight='bold', color=COLORS['ink'])
            top = _line_at_the_top(fig, title, top, 0.40, bold)
        if note:
            grey = dict(fontsize=10.5, fontweight='normal', color=COLORS['muted'])
            top = _line_at_the_top(fig, note, top, 0.24, grey)
        _reserve(fig, top=top)
        yield fig, axes


def _line_at_the_top(fig, text: str, top: float, height: float, font: dict) -> float:
    """Write a line of `height` inches that begins `top` inches below the edge; return its end."""
    middle = top + height / 2 + 0.04
    y = 1 - middle / fig.get_figheight()
    fig.text(0.012, y, plain(text), ha='left', va='center', **font)
    return top + height


def _reserve(fig, top: float | None = None, bottom: float | None = None) -> None:
    """Keep the axes out of the top or bottom inches of the sheet."""
    engine = fig.get_layout_engine()
    if 'rect' not in engine.get():  # a drawing that places its axes itself
        return
    low, high = _ends(engine)
    if bottom is not None:
        low = bottom / fig.get_figheight()
    if top is not None:
        high = 1 - top / fig.get_figheight()
    engine.set(rect=(0, low, 1, high - low))


def _ends(engine) -> tuple[float, float]:
    """Return the lower and the upper end of what is left for the axes, as shares of the height."""
    rect = engine.get()['rect']
    return rect[1], rect[1] + rect[3]


def legend(fig, ax) -> None:
    """Write the legend of `ax` in rows of its own above all axes, where it hides no data."""
    handles, labels = ax.get_legend_handles_labels()
    longest = max(len(label) for label in labels)
    entry_width = 0.8 + 0.085 * longest  # inches: the piece of line, and its text
    columns = max(1, min(len(labels), int((fig.get_figwidth() - 0.2) / entry_width)))
    rows = math.ceil(len(labels) / columns)
    _, above = _ends(fig.get_layout_engine())
    place = dict(loc='upper left', bbox_to_anchor=(0.005, above), borderaxespad=0.1)
    fig.legend(handles, labels, ncols=columns, handlelength=3.6, **place)
    _reserve(fig, top=(1 - above) * fig.get_figheight() + 0.08 + 0.24 * rows)


def footer(fig, text: str) -> None:
    """Write the small grey line at the bottom: commit, seeds, GPU, date, as given."""
    _reserve(fig, bottom=0.26)
    y = 0.15 / fig.get_figheight()
    font = dict(fontsize=8.5, color=COLORS['muted'])
    fig.text(0.012, y, plain(text), ha='left', va='center', **font)


def save(fig, path: str | os.PathLike, palette: bool = False) -> None:
    """
    Write the figure, whole or not at all. The ending names the format: png, svg or pdf.

    palette: keep 256 colours of a png: a third of the bytes, and no loss to lines and type. Leave
    it off for heat maps. UserError when the path cannot be written.
    """
    kind = Path(path).suffix.lstrip('.').lower()
    if kind not in ('png', 'svg', 'pdf'):
        raise UserError(f"{path}: a picture's name ends in .png, .svg or .pdf")
    # Without a version stamp the same figure gives the same bytes.
    metadata = {'Software': None} if kind == 'png' else None
    picture = io.BytesIO()
    with _style(), warnings.catch_warnings():
        # A name in letters that the font has not is drawn as boxes; that is no news for the log.
        warnings.filterwarnings('ignore', 'Glyph .* missing from', UserWarning)
        fig.savefig(picture, format=kind, metadata=metadata)
    if palette and kind == 'png':
        picture = _with_palette(picture)
    write_file(path, picture.getvalue())


def _with_palette(png: io.BytesIO) -> io.BytesIO:
    from PIL import Image  # matplotlib brings it

    image = Image.open(png).convert('RGB').quantize(256, dither=Image.Dither.NONE)
    small = io.BytesIO()
    image.save(small, 'png', optimize=True)
    return small


# -------------------------------------------------------------------------------------------------
# the log of a run


EVENT = dict(event=TEXT, step=whole(least=0), config=TABLE)  # of a line of log.jsonl


def read_log(path: str | os.PathLike) -> tuple[dict, list[dict]]:
    """
    Return the settings and the events of a log.jsonl, as the run that counts left them.

    settings: the settings line ({} if there is none; the last one if a resume wrote another)
    events:   all others in order

    Pieces of lines that a kill left are skipped. A resume at step k drops what came before it with
    a step above k, and the end of the run that it continues. UserError when the file cannot be read
    or holds no log.
    """
    try:
        text = Path(path).read_text(encoding='utf-8', errors='replace')
    except OSError as error:
        raise UserError(f'{path}: cannot read the log ({error.strerror or error})') from error
    lines = [line for line in text.split('\n') if line.strip()]
    parsed = [event for event in map(_parse_event, lines) if event is not None]
    if len(lines) > 1 and not parsed:
        raise UserError(f'{path}: not a log.jsonl (no line of it is an event)')

    settings, events = {}, []
    for event in parsed:
        if event['event'] == 'settings':
            settings = event
            continue
        if event['event'] == 'resume' and 'step' in event:
            events = [earlier for earlier in events if _stays(earlier, event['step'])]
        events.append(event)
    return settings, events


def _parse_event(line: str) -> dict | None:
    """Return one line of a log as a dict, None where a kill left only a piece."""
    # A resumed run may have written its first event right behind such a piece.
    for start in (0, line.rfind('{"event"')):
        try:
            event = parse_json(line[max(start, 0) :])
            check_entries(event, EVENT, needed=['event'])
        except ValueError:
            continue
        return event
    return None


def _stays(event: dict, resumed_at: int) -> bool:
    return event['event'] != 'end' and event.get('step', 0) <= resumed_at


def kind_of(settings: dict) -> str:
    """Return 'mla', 'mha', 'gqa' or 'mqa': the name of a run's colour."""
    config = settings.get('config') or {}
    heads, kv_heads = config.get('n_head'), config.get('n_kv_head')
    if settings.get('kind') == 'mha' and heads and kv_heads and kv_heads < heads:
        return 'mqa' if kv_heads == 1 else 'gqa'
    return settings.get('kind', 'mha')


def _number(event: dict, key: str) -> float:
    """Return event[key] as a float, NaN where it is missing or no number."""
    value = event.get(key)
    return float(value) if isinstance(value, (int, float)) else math.nan


def _series(events: Sequence[dict], kind: str, key: str) -> tuple[list[int], list[float]]:
    """Return the steps and the values of one quantity, finite or not, in order."""
    rows = [e for e in events if e['event'] == kind and 'step' in e and key in e]
    return [row['step'] for row in rows], [_number(row, key) for row in rows]


def _smooth(values: Sequence[float], half: int) -> list[float]:
    """
    Return the centred mean over 2 * half + 1 points, NaN left out.

    The window is narrower at the start, where losses fall fast.
    """
    smooth = []
    for i, value in enumerate(values):
        reach = min(i, half)
        near = [v for v in values[i - reach : i + reach + 1] if math.isfinite(v)]
        if near and math.isfinite(value):
            smooth.append(sum(near) / len(near))
        else:
            smooth.append(math.nan)
    return smooth


# -------------------------------------------------------------------------------------------------
# the curve of a run


def curve(log_path: str | os.PathLike, out_path: str | os.PathLike) -> None:
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
    half = len(train) // 60  # a window of about 3 % of the run
    smooth = _smooth(train, half)

    with sheet(size=(WIDTH, 5.2), title=_title(settings), note=_note(settings)) as (fig, ax):
        if half:
            ax.plot(train_steps, train, color=COLORS['muted'], alpha=0.30, linewidth=0.7)
        if train:
            marker = '.' if len(train) < 20 else None
            line = dict(color=COLORS['muted'], linewidth=1.6, marker=marker)
            ax.plot(train_steps, smooth, label='train', **line)
        if val:
            size = 4.5 if len(val) < 40 else 0
            line = dict(color=color, marker='o', markersize=size, zorder=3)
            ax.plot(val_steps, val, label='validation', **line)
        _set_axes(ax, [(train_steps, smooth), (val_steps, val)], first, last)

        finite = [(value, step) for step, value in zip(val_steps, val) if math.isfinite(value)]
        if finite:
            value, step = min(finite)
            _mark_best(ax, step, value, color, on_the_left=step > (first + last) / 2)
        broken = [step for step, value in zip(steps, train + val) if not math.isfinite(value)]
        if broken:
            _mark_nan(ax, min(broken))
        if steps:
            ax.legend(loc='upper right')
        else:
            _say_nothing_is_logged(ax)
        _add_clock(ax, events)
        footer(fig, _facts(settings, events))
        save(fig, out_path, palette=True)


def _title(settings: dict) -> str:
    """Return 'MLA · 10.6 M parameters · shakespeare_char', as far as the settings know."""
    data = settings.get('data') or {}
    parts = [kind_of(settings).upper() if 'kind' in settings else 'training run']
    if 'params' in settings:
        parts.append(f'{count(settings["params"])} parameters')
    if data.get('name'):
        parts.append(str(data['name']))
    return ' · '.join(parts)


def _note(settings: dict) -> str:
    """Return the line below the title: which text, and how large a cache."""
    parts = []
    source = (settings.get('data') or {}).get('source')
    if source:
        parts.append(f'text: {text_name(str(source))}')
    if 'cache_bytes_per_token' in settings:
        parts.append(f'cache: {settings["cache_bytes_per_token"]:,} bytes per token')
    return '  ·  '.join(parts)


def _facts(settings: dict, events: Sequence[dict]) -> str:
    """Return the footer: where the numbers come from."""
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
        gib = end['peak_memory'] / 2**30
        parts.append(f'peak memory {gib:.1f} GiB')
    return ' · '.join(parts)


def _set_axes(ax, series: Sequence[tuple], first: int, last: int) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    room = 0.02 * (last - first) or 1
    left = first - room if first == last else first
    ax.set_xlim(left, last + room)
    ax.set_ylim(*_limits(series, first, last))
    ax.set_xlabel('step')
    ax.set_ylabel('loss (nats per token)')
    ax.xaxis.set_major_locator(MaxNLocator(8, integer=True, steps=[1, 2, 2.5, 5, 10]))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f'{step:,.0f}'))


def _limits(series: Sequence[tuple], first: int, last: int) -> tuple[float, float]:
    """
    Return the ends of a loss axis on which the end of the run is readable.

    The losses of the first 2 % of the steps may leave at the top, unless there is little else.
    series: (steps, values) pairs
    """
    begin = first + 0.02 * (last - first)
    values, late = [], []
    for steps, losses in series:
        for step, loss in zip(steps, losses):
            if math.isfinite(loss):
                values.append(loss)
                if step >= begin and step > first:
                    late.append(loss)
    if len(late) >= 20:
        values = late
    if not values:
        return 0.0, 1.0
    low, high = min(values), max(values)
    room = max(high - low, 0.05 * abs(high), 1e-6)
    return low - 0.06 * room, high + 0.10 * room


def _mark_best(ax, step: int, value: float, color: str, on_the_left: bool) -> None:
    """Draw a ring around the best validation loss, with its value on the side that has room."""
    ring = dict(marker='o', markersize=10, markerfacecolor='white', markeredgewidth=2.2)
    ax.plot([step], [value], markeredgecolor=color, linestyle='none', zorder=4, **ring)
    arrow = dict(arrowstyle='-', color=color, linewidth=1, shrinkB=7)
    arrow['relpos'] = (1, 0) if on_the_left else (0, 0)
    ax.annotate(
        f'best {value:.4f} at step {step:,}',
        (step, value),
        xytext=(0, 30),
        textcoords='offset points',
        ha='right' if on_the_left else 'left',
        va='bottom',
        color=color,
        fontsize=11.5,
        fontweight='bold',
        zorder=5,
        path_effects=[halo()],
        arrowprops=arrow,
    )


def _mark_nan(ax, step: int) -> None:
    ax.axvline(step, color=COLORS['ink'], linewidth=1, linestyle=(0, (4, 3)))
    ax.annotate(
        f'not a number at step {step:,}',
        (step, 0.5),
        xytext=(5, 0),
        rotation=90,
        xycoords=('data', 'axes fraction'),
        textcoords='offset points',
        ha='left',
        va='center',
    )


def _say_nothing_is_logged(ax) -> None:
    ax.set_xticks([])
    ax.set_yticks([])
    place = dict(transform=ax.transAxes, ha='center', color=COLORS['muted'])
    ax.text(0.5, 0.5, 'no losses logged yet', **place)


def _add_clock(ax, events: Sequence[dict]) -> None:
    """Add an axis on top that counts hours, minutes, seconds or tokens, if they are logged."""
    from matplotlib.ticker import MaxNLocator

    unit, points = _clock(events)
    if unit is None:
        return
    places, labels = [], []
    amounts = MaxNLocator(7, steps=[1, 2, 5, 10]).tick_values(points[0][1], points[-1][1])
    for amount in amounts:
        step = _step_at(points, amount)
        if step is not None:
            places.append(step)
            labels.append(f'{amount:,g} {unit}')
    top = ax.secondary_xaxis('top')
    top.set_xticks(places, labels)
    top.spines['top'].set_visible(False)


def _clock(events: Sequence[dict]) -> tuple[str | None, list[tuple[int, float]]]:
    """
    Return what the axis on top counts: its unit, and (step, amount) points.

    That is hours, minutes or seconds of training, else tokens, else (None, []). A clock that a
    resume has set back is carried on.
    """
    clock, tokens = [], []
    start, resumed = 0.0, False
    for event in events:
        if event['event'] == 'resume':
            resumed = True
        if event['event'] not in ('train', 'eval') or 'step' not in event:
            continue
        seconds = _number(event, 'seconds')
        if math.isfinite(seconds):
            if resumed and clock and seconds < clock[-1][1]:
                start = clock[-1][1]
            resumed = False
            clock.append((event['step'], start + seconds))
        if math.isfinite(_number(event, 'tokens')):
            tokens.append((event['step'], event['tokens'] / 1e6))
    if len(clock) > 1:
        size, unit = _unit_of(max(seconds for _, seconds in clock))
        return unit, sorted((step, seconds / size) for step, seconds in clock)
    if len(tokens) > 1:
        return 'M tokens', sorted(tokens)
    return None, []


def _unit_of(seconds: float) -> tuple[int, str]:
    """Return the unit in which at least three are counted: its seconds and its name."""
    if seconds >= 3 * 3600:
        return 3600, 'h'
    if seconds >= 3 * 60:
        return 60, 'min'
    return 1, 's'


def _step_at(points: Sequence[tuple[int, float]], amount: float) -> float | None:
    """Return the step at which a clock passes `amount`, between two of its points, or None."""
    for (step, before), (next_step, after) in zip(points, points[1:]):
        if before <= amount <= after and after > before:
            return step + (next_step - step) * (amount - before) / (after - before)
    return None
