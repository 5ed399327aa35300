"""
Two pictures of decode_meter's cells: the time of a step and the memory of a batch, over context, on log paper.
Colour is the attention, the line's kind is the cache: solid dense, dashed paged, dotted none.
"""
import figures

LINES = {"dense": "-", "paged": (0, (4, 2)), "none": (0, (1, 1.6))}
BETWEEN = 0.052  # labels stand this share of an axis's height apart at least


def color_of(model):
    """The colour of 'mla:256+32' is MLA's; a checkpoint gets the ink."""
    return figures.COLORS.get(model.partition(":")[0], figures.COLORS["ink"])


def series(rows, value):
    """{(model, cache): [(context, value(row))]} of the rows that have one, contexts ascending."""
    found = {}
    for row in sorted(rows, key=lambda row: row["context"]):
        if value(row):
            found.setdefault((row["model"], row["cache"]), []).append((row["context"], value(row)))
    return found


def spaced(heights, apart, low=0.0, high=1.0):
    """
    The heights that labels stand at: as near to theirs as goes with `apart` between neighbours, inside
    [low, high] where they fit. The order is kept.
    """
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    apart = min(apart, (high - low) / max(1, len(heights) - 1))
    groups = []  # neighbours that touch: [sum of wished starts, count], placed at the mean of what they wish
    for i in order:
        groups.append([heights[i], 1])
        while len(groups) > 1:
            (a, n), (b, m) = groups[-2:]
            if b / m - a / n >= apart * n - 1e-12:
                break
            groups[-2:] = [[a + b - m * n * apart, n + m]]
    placed, at = [0.0] * len(heights), 0
    for wished, n in groups:
        start = min(max(wished / n, low), high - (n - 1) * apart)
        for j in range(n):
            placed[order[at + j]] = start + j * apart
        at += n
    for a, b in zip(order, order[1:]):  # what the edges have pushed together
        placed[b] = max(placed[b], placed[a] + apart)
    excess = max(placed, default=0) - high
    for b, a in zip(order[::-1], order[::-1][1:]):
        if excess > 1e-12:
            placed[b] = min(placed[b], high) if b == order[-1] else placed[b]
            placed[a] = min(placed[a], placed[b] - apart)
    return placed


def names(found, flat):
    """
    [(label, key of the line it is for)]: lines that end within `flat` of each other (a share of the axis) and have the same model share
    one label, so that dense and paged on top of each other are told once.
    """
    labels = []
    for (model, cache), height in sorted(found.items(), key=lambda item: item[1]):
        same = next((label for label in labels if label["model"] == model and abs(label["height"] - height) < flat), None)
        if same:
            same["caches"].append(cache)
        else:
            labels.append(dict(model=model, caches=[cache], height=height))
    order = list(LINES)
    for label in labels:
        caches = sorted(label["caches"], key=order.index)
        label["text"] = f"{label['model'].upper() if len(label['model']) < 14 else label['model'][-14:]} " + (", ".join(caches).replace("none", "no cache"))
    return labels


def panel(ax, found, title, unit):
    """One batch: its lines, and their names at their ends."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

    contexts = sorted({context for points in found.values() for context, _ in points})
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set_title(title)
    for (model, cache), points in found.items():
        ax.plot(*zip(*points), color=color_of(model), linestyle=LINES[cache], marker="o", markersize=3.5, linewidth=1.8 if cache != "none" else 1.6)
    if not contexts:
        return
    ax.set_xticks(contexts, [f"{context:,}" if len(contexts) < 9 else figures.count(context) for context in contexts], rotation=0)
    ax.xaxis.set_minor_locator(NullLocator())
    values = [value for points in found.values() for _, value in points]
    low, high = min(values) / 1.25, max(values) * 1.25
    ax.set_ylim(low, high)
    ax.yaxis.set_major_locator(LogLocator(10, subs=(1,) if high / low > 300 else (1, 2, 5), numticks=12))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: unit(value)))
    ax.yaxis.set_minor_formatter(NullFormatter())
    height = ax.get_position().height * ax.figure.get_figheight()
    to_axes = ax.transData + ax.transAxes.inverted()
    ends = {}
    for key, points in found.items():
        ends[key] = to_axes.transform(points[-1])[1]
    labels = names(ends, 0.03)
    for label, at in zip(labels, spaced([label["height"] for label in labels], min(BETWEEN, 0.21 / height) if height else BETWEEN)):
        right = max(context for cache in label["caches"] for context, _ in found[label["model"], cache])
        x = to_axes.transform((right, low))[0]
        ax.annotate(label["text"], (x, label["height"]), xytext=(1.035, at), xycoords="axes fraction", textcoords="axes fraction", color=color_of(label["model"]),
                    fontsize=9, va="center", ha="left", annotation_clip=False,
                    arrowprops=dict(arrowstyle="-", color=color_of(label["model"]), linewidth=0.6, alpha=0.6, shrinkA=1, shrinkB=3, relpos=(0, 0.5)))


def time_unit(us):
    return f"{us / 1e6:g} s" if us >= 1e6 else f"{us / 1e3:g} ms" if us >= 1e3 else f"{us:g} µs"


def memory_unit(size):
    for power, name in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if size >= 2 ** power * 0.999:
            return f"{size / 2 ** power:.3g} {name}"
    return f"{size:g} B"


def draw(rows, out_path, value, unit, title, note):
    """One sheet: a panel for each batch, for the first cache dtype among the rows. None where there is nothing to draw."""
    cells = [row for row in rows if row["what"] == "cell" and not row["reason"]]
    if not cells:
        return None
    dtype = next((row["cache_dtype"] for row in cells if row["cache"] != "none"), "none")
    cells = [row for row in cells if row["cache_dtype"] in (dtype, "none")]
    batches = sorted({row["batch"] for row in cells})[:3]
    with figures.sheet(cols=len(batches), size=(figures.WIDTH, 5.6), title=title, note=note) as (fig, axes):
        for batch, ax in zip(batches, [axes] if len(batches) == 1 else axes):
            panel(ax, series([row for row in cells if row["batch"] == batch], value), f"batch {batch}", unit)
            ax.set_xlabel("context (tokens a sequence)")
        last = cells[-1]
        figures.footer(fig, f"{last['device']} · {last['dtype']}, cache {dtype} · torch {last['torch']} · commit {last['commit']} · {last['date']}")
        figures.save(fig, out_path, palette=True)
    return out_path


def latency(rows, out_path):
    """µs of a decode step over context. The picture is written whole or not at all; UserError when it cannot be."""
    return draw(rows, out_path, lambda row: row["step_us"], time_unit, "Time of one decode step",
                "solid: dense cache · dashed: paged · dotted: no cache, the whole text runs again")


def memory(rows, out_path):
    """What a batch takes over context: the cache's own bytes (measured), and without a cache what a step's forward pass needs beyond the weights."""
    def bytes_of(row):
        return row.get("cache_bytes") if row["cache"] != "none" else max(0, row["peak_allocated"] - row["allocated_before"]) if row["peak_reserved"] is not None else None
    return draw(rows, out_path, bytes_of, memory_unit, "Memory of a batch",
                "solid: dense cache · dashed: paged · dotted: no cache, what a pass over the whole text needs beyond the weights (GPU only)")
