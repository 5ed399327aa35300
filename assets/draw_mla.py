"""
Draw assets/mla.png, the README's diagram: what MHA, GQA, MQA and MLA cache.

    python assets/draw_mla.py

Read from the top: a token's hidden state x is projected, what lies in the tinted band stays for
every later token (one small bar is one vector of head_dim values; all widths in the band are to
scale), and each query head reads the bars that its line leads to. In MLA the up-projections W^UK
and W^UV move off the cache into the query and the output (DeepSeek-V2, arXiv 2405.04434, section
2.1), so a decode step never rebuilds K and V. With q_lora_rank > 0, W^UQ and W^QR are fed by
W^DQ x; it is left out here.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository

from nanomla.core import figures
from nanomla.core.figures import COLORS

# the example in the picture: a GPT-2 sized layer
n_embd = 768
n_head = 12
head_dim = n_embd // n_head  # 64
n_kv_head = 4  # of GQA
kv_lora_rank = 384  # R
qk_rope_head_dim = 32  # D_rope
out = Path(__file__).resolve().parent / 'mla.png'

WIDTH, HEIGHT = 10.0, 6.20  # inches, and the drawing's unit
LEFT = [1.12, 3.17, 5.22, 7.27]  # where each panel begins
PANEL = [1.95, 1.95, 1.95, 2.63]
BAR, PITCH = 0.118, 0.142  # one vector of head_dim values, and its distance to the next
TALL = 0.30  # a bar's height
INK, MUTED, LINE = COLORS['ink'], COLORS['muted'], '#9AA2AC'
TYPE = {**COLORS, 'gqa': '#2F86BD'}  # sky blue is too light for letters
ROPE = '#8A3C00'  # MLA's position part, a darker shade of its colour

# baselines, from the top
Y_NAME, Y_CAPTION, Y_WRITE = 5.92, 5.64, 5.16
BAND = (3.64, 4.78)
Y_K, Y_V = 4.30, 3.82  # lower edges of the rows of bars
Y_Q = 2.80
Y_QUERY, Y_OUTPUT = 2.14, 1.40
STRIP = (0.36, 0.92)


def tint(color, share):
    """`color` on white paper, `share` of it."""
    parts = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
    return '#' + ''.join(f'{round(255 - share * (255 - part)):02X}' for part in parts)


def box(ax, corner, size, face, edge='none', radius=0.03, **more):
    """A box with round corners; `corner` is its lower left one."""
    from matplotlib.patches import FancyBboxPatch

    style = f'round,pad=0,rounding_size={radius}'
    ax.add_patch(FancyBboxPatch(corner, *size, style, facecolor=face, edgecolor=edge, **more))


def write(ax, x, y, text, size=11, color=INK, **more):
    """Text around (x, y), unless `more` has another ha or va."""
    more = dict(ha='center', va='center') | more
    ax.text(x, y, text, fontsize=size, color=color, **more)


def arrow(ax, start, end, color=LINE):
    head = '-|>,head_length=0.32,head_width=0.16'
    style = dict(arrowstyle=head, color=color, linewidth=1.1, shrinkA=0, shrinkB=0)
    ax.annotate('', end, start, arrowprops=style)


def half_width(symbol):
    """Half the width of the chip of a weight matrix."""
    return 0.185 + 0.042 * len(symbol)


def chip(ax, x, y, symbol, color=None):
    """A weight matrix around (x, y); in colour and dashed when it was absorbed."""
    half = half_width(symbol)
    if color:
        face, edge = tint(color, 0.14), color
        line = dict(linewidth=1.3, linestyle=(0, (2.6, 1.6)))
    else:
        face, edge = 'white', LINE
        line = dict(linewidth=1.0, linestyle='-')
    box(ax, (x - half, y - 0.15), (2 * half, 0.30), face, edge, 0.06, **line)
    write(ax, x, y - 0.012, f'$W^{{{symbol}}}$', 11, color or INK)


def chain(ax, x, y, items, color, start=None):
    """
    Words and matrices from left to right, arrows between them, centred on x or from `start` on.

    An item is (word, half width), or a matrix's symbol; one that begins with * is absorbed.
    Returns where it starts.
    """
    gap = 0.20
    halves = []
    for item in items:
        is_word = isinstance(item, tuple)
        halves.append(item[1] if is_word else half_width(item.lstrip('*')))
    if start is None:
        start = x - sum(halves) - gap * (len(items) - 1) / 2
    x = start
    for i, (item, half) in enumerate(zip(items, halves)):
        x += half
        if isinstance(item, tuple):
            write(ax, x, y, item[0], 11.5)
        else:
            chip(ax, x, y, item.lstrip('*'), color if item.startswith('*') else None)
        x += half
        if i + 1 < len(items):
            arrow(ax, (x + 0.02, y), (x + gap - 0.02, y))
        x += gap
    return start


def bars(ax, xs, y, color, filled=True, tall=TALL):
    face = color if filled else 'white'
    for x in xs:
        box(ax, (x - BAR / 2, y), (BAR, tall), face, color, 0.025, linewidth=1.1)


def fan(ax, start, end, color):
    """A line from a query to the bar that it reads, behind the bars."""
    (x0, y0), (x1, y1) = start, end
    ax.plot([x0, x1], [y0, y1], color=tint(color, 0.55), linewidth=1.0, zorder=0.9)


def frame(ax, left, width, kind, caption):
    """What every panel has: its name, its share of the two tinted strips."""
    middle = left + width / 2
    write(ax, middle, Y_NAME, kind.upper(), 16, TYPE[kind], fontweight='bold')
    write(ax, middle, Y_CAPTION, caption, 10, MUTED)
    for low, high in (BAND, STRIP):
        face = tint(COLORS[kind], 0.10)
        box(ax, (left, low), (width, high - low), face, radius=0.07, zorder=0.5)


def total(ax, x, kind, formula, values):
    write(ax, x - 0.02, sum(STRIP) / 2, f'{formula}  =', 12, INK, ha='right')
    bold = dict(ha='left', fontweight='bold')
    write(ax, x + 0.06, sum(STRIP) / 2 - 0.005, f'{values:,}', 17, TYPE[kind], **bold)


def per_head(ax, panel, kind, caption, kv_heads, formula):
    """MHA, GQA and MQA differ in one number: how many heads of K and V there are."""
    left, width = LEFT[panel], PANEL[panel]
    color = COLORS[kind]
    middle = left + width / 2 + 0.07  # room for the rows' letters
    frame(ax, left, width, kind, caption)
    write(ax, middle - 0.82, Y_WRITE, '$x$', 11.5)
    arrow(ax, (middle - 0.73, Y_WRITE), (middle - 0.51, Y_WRITE))
    chip(ax, middle - 0.25, Y_WRITE, 'K')
    chip(ax, middle + 0.25, Y_WRITE, 'V')
    arrow(ax, (middle, Y_WRITE - 0.17), (middle, BAND[1]))
    queries = [middle + (i - (n_head - 1) / 2) * PITCH for i in range(n_head)]
    group = n_head // kv_heads
    heads = [sum(queries[i : i + group]) / group for i in range(0, n_head, group)]
    for i, x in enumerate(queries):
        fan(ax, (x, Y_Q + TALL), (heads[i // group], Y_V), color)
    for letter, y, filled, xs in (
        ('K', Y_K, True, heads),
        ('V', Y_V, True, heads),
        ('q', Y_Q, False, queries),
    ):
        bars(ax, xs, y, color, filled)
        write(ax, left + 0.12, y + TALL / 2, f'${letter}$', 11)
    total(ax, left + width * 0.52, kind, formula, 2 * kv_heads * head_dim)
    chain(ax, left + width / 2, Y_QUERY, [('$x$', 0.07), 'Q', ('$q$', 0.07)], color)
    chain(ax, left + width / 2, Y_OUTPUT, [(r'$\Sigma\,a\,v$', 0.20), 'O', ('$y$', 0.07)], color)


def latent(ax, panel):
    """MLA: one latent for all heads, and a small key that carries the position."""
    left, width = LEFT[panel], PANEL[panel]
    color = COLORS['mla']
    frame(ax, left, width, 'mla', 'all heads read one latent')
    middle = left + width / 2 - 0.08
    queries = [middle + (i - (n_head - 1) / 2) * PITCH for i in range(n_head)]
    # the bars' scale: BAR is head_dim values wide
    wide, narrow = BAR * kv_lora_rank / head_dim, BAR * qk_rope_head_dim / head_dim
    y, x_pe = (Y_K + Y_V) / 2, middle + 1.04

    for x, symbol in ((middle, 'DKV'), (x_pe, 'KR')):
        half = half_width(symbol)
        chip(ax, x, Y_WRITE, symbol)
        write(ax, x - half - 0.31, Y_WRITE, '$x$', 11.5)
        arrow(ax, (x - half - 0.22, Y_WRITE), (x - half - 0.02, Y_WRITE))
        arrow(ax, (x, Y_WRITE - 0.17), (x, y + TALL + 0.04))
    for x in queries:
        reads = middle + (x - middle) * wide / (PITCH * n_head)
        fan(ax, (x, Y_Q + TALL), (reads, y), color)
    box(ax, (middle - wide / 2, y), (wide, TALL), color, color, 0.025, linewidth=1.1)
    box(ax, (x_pe - narrow / 2, y), (narrow, TALL), ROPE, ROPE, 0.01, linewidth=1.1)
    write(ax, middle, y + TALL / 2 - 0.01, '$c_{kv}$', 12, 'white')
    write(ax, x_pe - 0.10, y + TALL / 2 - 0.01, '$k_{pe}$', 12, ROPE, ha='right')

    bars(ax, queries, Y_Q, color, filled=False)
    write(ax, queries[0] - 0.22, Y_Q + TALL / 2, '$q$', 11)
    # every head's q_pe reads the one k_pe: a single line for all, lest twelve cross the fan
    low = Y_Q - 0.13
    bars(ax, queries, low, ROPE, filled=False, tall=0.09)
    write(ax, queries[0] - 0.24, low + 0.02, '$q_{pe}$', 11, ROPE)
    xs, ys = [queries[-1] + BAR / 2, x_pe, x_pe], [low + 0.045, low + 0.045, y]
    ax.plot(xs, ys, color=tint(ROPE, 0.65), linewidth=1.0, zorder=0.9)

    total(ax, left + width * 0.56, 'mla', r'$R + D_{rope}$', kv_lora_rank + qk_rope_head_dim)
    middle = left + width / 2
    start = chain(ax, middle, Y_QUERY + 0.19, [('$x$', 0.07), 'UQ', '*UK', ('$q$', 0.07)], color)
    chain(ax, middle, Y_QUERY - 0.19, [('$x$', 0.07), 'QR', ('$q_{pe}$', 0.14)], color, start)
    chain(ax, middle, Y_OUTPUT, [(r'$\Sigma\,a\,c_{kv}$', 0.28), '*UV', 'O', ('$y$', 0.07)], color)
    write(ax, middle, Y_OUTPUT - 0.29, 'absorbed: K, V are never rebuilt', 9.5, color)


def main():
    with figures.sheet(size=(WIDTH, HEIGHT)) as (fig, ax):
        fig.set_layout_engine('none')
        ax.set_position([0, 0, 1, 1])
        ax.set(xlim=(0, WIDTH), ylim=(0, HEIGHT))
        ax.axis('off')
        for y, text in (
            (Y_WRITE, 'a token\nwrites'),
            (sum(BAND) / 2, 'the cache\nkeeps'),
            (Y_Q + TALL / 2, f'{n_head} query\nheads read'),
            (Y_QUERY, 'query'),
            (Y_OUTPUT, 'output'),
            (sum(STRIP) / 2, 'values per\ntoken, layer'),
        ):
            write(ax, 0.12, y, text, 10, MUTED, ha='left', linespacing=1.25)
        share = n_head // n_kv_head
        per_head(ax, 0, 'mha', 'every head its own K, V', n_head, r'$2 \cdot H \cdot D$')
        per_head(ax, 1, 'gqa', f'{share} heads share K, V', n_kv_head, r'$2 \cdot K \cdot D$')
        per_head(ax, 2, 'mqa', 'all heads share K, V', 1, r'$2 \cdot D$')
        latent(ax, 3)
        figures.footer(
            fig,
            f'Example: width {n_embd}, H = {n_head} heads of D = {head_dim}; GQA with K = '
            f'{n_kv_head}; MLA with R = {kv_lora_rank}, D_rope = {qk_rope_head_dim}. '
            'The bars in the cache are to scale.',
        )
        figures.save(fig, out, palette=True)


if __name__ == '__main__':
    main()
