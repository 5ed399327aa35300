"""
Results of the conversion study: its ways to convert, the file of its rows, the table, the picture.

A row has the kind and seed of its source, what was measured (`what`) and its perplexity; rows of a
conversion have the share of the cache that it saves and its `way`: settings of convert.py.
"""

import json
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch

from nanomla.core import figures
from nanomla.core.checks import TABLE, TEXT, check_entries, number, whole
from nanomla.core.configurator import UserError
from nanomla.core.devices import commit, describe
from nanomla.core.files import appending, read_appended, writing

MHA2MLA = dict(rope='2-norm', rope_heads='own', low_rank='joint')  # Ji et al. 2025
DEFAULT = dict(rope='turn', rope_heads='shared', low_rank='balanced')
FITTED = dict(low_rank='attention', by_layer=True)  # and layer_steps: convert_mla.py's defaults
LOW_RANKS = ('balanced', 'calibrated', 'joint', 'split')  # from the least error on text to most
TOLERANCE = 1.005  # of perplexities that are compared
BEGIN = b'{"kind": '  # of every row

# Percent above the source by seed, for each (what, name of the way, saving).
Above = dict[tuple[str, str, float], dict[int, float]]


# -------------------------------------------------------------------------------------------------
# ways to convert


def default_way(fold: int = 1, rope_pairs: int = -1, layer_steps: int = -1) -> dict:
    """
    Return the way that is healed beside MHA2MLA's.

    rope_pairs: -1 leaves them to the saving. layer_steps: as convert_mla.py converts, its layers
    fitted by so many steps; -1 = without that.
    """
    way = dict(DEFAULT)
    if fold > 1:
        way['fold'] = fold
    if rope_pairs >= 0:
        way['rope_pairs'] = rope_pairs
    if layer_steps >= 0:
        way |= FITTED | dict(layer_steps=layer_steps)
    return way


def closed_form(default: dict) -> dict:
    """Return the default way without what is fitted, DEFAULT but for its pairs."""
    way = {key: value for key, value in default.items() if key not in ('by_layer', 'layer_steps')}
    return way | dict(low_rank=DEFAULT['low_rank'])


def factorisations(default: dict) -> list[dict]:
    """Return the default way and MHA2MLA's, each with every low rank."""
    ways = [closed_form(default) | dict(low_rank=low_rank) for low_rank in LOW_RANKS]
    return ways + [MHA2MLA | dict(low_rank=low_rank) for low_rank in LOW_RANKS]


def all_ways(default: dict) -> list[dict]:
    """Return every way of the study in closed form, the factorisations first."""
    ways, default = factorisations(default), closed_form(default)
    for rope in ('high', 'low', 'uniform', 'turn'):
        ways.append(dict(rope=rope, rope_heads='own', low_rank='joint'))
    for rope in ('uniform', '2-norm'):
        ways.append(dict(rope=rope, rope_heads='shared', low_rank='balanced'))
    for change in (dict(fold=2), dict(real=True), dict(ranks='spectrum'), dict(rotate=True)):
        ways.append(default | change)
    return ways


def way_name(way: dict) -> str:
    """Return a way in words: 'turn, shared, balanced, fold=2'."""
    words = [str(way[key]) for key in DEFAULT]
    words += [f'{key}={value}' for key, value in way.items() if key not in DEFAULT]
    return ', '.join(words)


# -------------------------------------------------------------------------------------------------
# rows


def row_key(row: dict) -> str:
    """Return what says of a row what it measured."""
    names = ('kind', 'seed', 'saving', 'what', 'way')
    return json.dumps({name: row[name] for name in names if name in row}, sort_keys=True)


class StudyResults:
    """
    The rows of one or several JSONL files, by their key. New ones are appended to the first file.

    must_exist: a file that is missing is an error; without it the study begins there. UserError for
    a file that cannot be read.
    """

    def __init__(self, files: list[Path], must_exist: bool):
        self.files = files
        self.began = time.perf_counter()
        self.rows: dict[str, dict] = {}
        for file in files:
            if file.exists() or must_exist:
                self.rows |= {row_key(row): row for row in read_rows(file)}

    def __contains__(self, row: dict) -> bool:
        return row_key(row) in self.rows

    def add(self, row: dict, device: torch.device) -> None:
        """Append a row to the file, with the facts of its measurement, and print it."""
        row = row | dict(
            at=round(time.perf_counter() - self.began, 1),
            commit=commit(),
            device=describe(device),
            torch=torch.__version__,
        )
        file = self.files[0]
        with writing(file), appending(file) as opened:
            opened.write(json.dumps(row) + '\n')
        self.rows[row_key(row)] = row
        print(row_line(row), flush=True)

    def of(self, what: str, kind: str | None = None) -> dict[tuple[str, int], dict]:
        """Return the rows of sources or controls by kind and seed, of one kind or of all."""
        found = {}
        for row in self.rows.values():
            if row['what'] == what and kind in (None, row['kind']):
                found[row['kind'], row['seed']] = row
        return found

    def kinds(self) -> list[str]:
        """Return the kinds that have conversions and their source, MHA first."""
        sources = self.of('source')
        kinds = set()
        for row in self.rows.values():
            if 'saving' in row and (row['kind'], row['seed']) in sources:
                kinds.add(row['kind'])
        return sorted(kinds, reverse=True)

    def above_source(self, kind: str) -> Above:
        """Return by how many percent the conversions of a kind are above their source."""
        sources = self.of('source', kind)
        above = defaultdict(dict)
        for row in self.rows.values():
            source = sources.get((row['kind'], row['seed']))
            if 'saving' in row and source is not None:
                key = row['what'], way_name(row['way']), row['saving']
                above[key][row['seed']] = percent_above(row, source)
        return dict(above)

    def control(self, kind: str) -> list[float]:
        """Return by how many percent more training alone puts each source above itself."""
        sources = self.of('source', kind)
        controls = self.of('control', kind)
        return [percent_above(row, sources[key]) for key, row in controls.items() if key in sources]


# What a row must have, and what it may.
ROW = dict(kind=TEXT, seed=whole(), what=TEXT, perplexity=number(), commit=TEXT, device=TEXT)
ROW_MAY_HAVE = dict(
    saving=number(),
    way=TABLE,
    steps=whole(least=0),
    bytes=number(),
    nats=number(),
    settings=TABLE,
)


def read_rows(file: Path) -> list[dict]:
    try:
        rows = read_appended(file, BEGIN)
        for line, row in enumerate(rows, 1):
            check_row(row, f'{file}:{line}')
        return rows
    except OSError as error:
        raise UserError(f'cannot read {file}: {error.strerror or error}') from None
    except ValueError as error:
        raise UserError(f'{error}: remove that line, or name another file') from None


def check_row(row: dict, where: str) -> None:
    """Raise a ValueError unless a row has what the table and the picture read."""
    try:
        check_entries(row, ROW | ROW_MAY_HAVE, needed=ROW)
        needed = ['way'] if 'saving' in row else []
        check_entries(row, {}, needed)
    except ValueError as error:
        raise ValueError(f'{where}: {error}') from None


def percent_above(row: dict, source: dict) -> float:
    return 100 * (row['perplexity'] / source['perplexity'] - 1)


def row_line(row: dict) -> str:
    """Return a row in words."""
    line = f'{row["kind"]} seed {row["seed"]}'
    if 'saving' in row:
        line += f' −{100 * row["saving"]:g} %'
    line += f' {row["what"]}: perplexity {row["perplexity"]:.4f}'
    if 'way' in row:
        line += f' ({way_name(row["way"])})'
    return line


# -------------------------------------------------------------------------------------------------
# the table


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def savings_of(above: Above) -> list[float]:
    return sorted({saving for _, _, saving in above})


def savings_of_kinds(results: StudyResults) -> list[float]:
    """Return the savings of all kinds, the columns of every table and panel."""
    savings = set()
    for kind in results.kinds():
        savings.update(savings_of(results.above_source(kind)))
    return sorted(savings)


def print_results(results: StudyResults, default: dict) -> None:
    """Print for each kind its table and what holds of it."""
    savings = savings_of_kinds(results)
    for kind in results.kinds():
        print_table(results, kind, savings)
        print_findings(results.above_source(kind), default)


def print_table(results: StudyResults, kind: str, savings: list[float]) -> None:
    """Print percent above the source, a column for each saving: mean (least–most) of the seeds."""
    sources = [row['perplexity'] for row in results.of('source', kind).values()]
    print(
        f'\n{kind.upper()}: source perplexity {mean(sources):.4f} ({len(sources)} seeds); '
        'percent above it'
    )
    header = [f'−{100 * saving:g} %' for saving in savings]
    above = results.above_source(kind)
    names = {(what, way): f'{what}: {way}' for what, way, _ in sorted(above)}
    width = max(52, *map(len, names.values()))
    print(' ' * width + ''.join(f'{column:>26}' for column in header))
    for (what, way), name in names.items():
        cells = [cell_of(above.get((what, way, saving))) for saving in savings]
        print(f'{name:{width}}' + ''.join(f'{cell:>26}' for cell in cells))
    if control := results.control(kind):
        print(
            f'control: the source, trained on by as many steps: {mean(control):.2f} '
            f'({min(control):.2f} to {max(control):.2f})'
        )


def cell_of(by_seed: dict[int, float] | None) -> str:
    if by_seed is None:
        return ''
    values = list(by_seed.values())
    cell = f'{mean(values):.2f}'
    if len(values) > 1:
        cell += f' ({min(values):.2f}–{max(values):.2f})'
    return cell


# -------------------------------------------------------------------------------------------------
# what holds


def print_findings(above: Above, default: dict) -> None:
    """Print how often what is expected of conversions holds, and the worst seed of each saving."""
    print('perplexity falls with rank: ' + count_in_order(pairs_by_rank(above)))
    for way in (closed_form(default), MHA2MLA):
        ways = [way | dict(low_rank=low_rank) for low_rank in LOW_RANKS]
        for better, worse in zip(ways, ways[1:]):
            pairs = pairs_of_ways(above, way_name(better), way_name(worse))
            print(f'{way_name(better)} at most {worse["low_rank"]}: {count_in_order(pairs)}')
    for saving in savings_of(above):
        findings = [f'{name} {worst:.2f} %' for name, worst in worst_seeds(above, default, saving)]
        print(f'−{100 * saving:g} %, worst seed: ' + '; '.join(findings))


def pairs(above: Above, first: tuple, second: tuple) -> list[tuple[float, float]]:
    """Return the perplexities over the source's of two conversions, for the seeds of both."""
    a, b = above.get(first, {}), above.get(second, {})
    return [(1 + a[seed] / 100, 1 + b[seed] / 100) for seed in a if seed in b]


def pairs_by_rank(above: Above) -> list[tuple[float, float]]:
    """Return the pairs of neighbouring savings, all else equal."""
    savings = savings_of(above)
    found = []
    for what, way in {(what, way) for what, way, _ in above}:
        for less, more in zip(savings, savings[1:]):
            found += pairs(above, (what, way, less), (what, way, more))
    return found


def pairs_of_ways(above: Above, first: str, second: str) -> list[tuple[float, float]]:
    found = []
    for saving in savings_of(above):
        found += pairs(above, ('converted', first, saving), ('converted', second, saving))
    return found


def count_in_order(found: list[tuple[float, float]]) -> str:
    """Return how many pairs rise, within half a percent, in words."""
    in_order = sum(first <= TOLERANCE * second for first, second in found)
    return f'{in_order} of {len(found)}'


def worst_seeds(above: Above, default: dict, saving: float) -> list[tuple[str, float]]:
    """Return the largest value over the seeds, with its name, of what a saving is judged by."""
    best, theirs = way_name(default), way_name(MHA2MLA)
    before = pairs(above, ('converted', best, saving), ('converted', theirs, saving))
    quantised = pairs(above, ('healed', best, saving), ('healed, int4', best, saving))
    values = {
        "gap before healing, of MHA2MLA's:": [100 * (x - 1) / (y - 1) for x, y in before],
        'healed, above the source:': above.get(('healed', best, saving), {}).values(),
        'int4, above healed:': [100 * (y / x - 1) for x, y in quantised],
    }
    return [(name, max(found)) for name, found in values.items() if found]


# -------------------------------------------------------------------------------------------------
# the picture


@dataclass
class Curve:
    """One curve of the picture: what was measured, of which way, and its look."""

    label: str
    what: str
    way: dict
    color: str
    marker: str = 'o'
    size: int = 4
    line: str = '--'


def curves(default: dict) -> list[Curve]:
    joint = closed_form(default) | dict(low_rank='joint')
    name = 'shared, turn, balanced'
    if 'layer_steps' in default:
        name = 'shared, turn, layer by layer'
    return [
        Curve('MHA2MLA: own, 2-norm, joint', 'converted', MHA2MLA, 'mha'),
        Curve('shared, turn, joint', 'converted', joint, 'gqa'),
        Curve(name, 'converted', default, 'mla'),
        Curve('MHA2MLA, healed', 'healed', MHA2MLA, 'mha', 'D', 6, '-'),
        Curve(f'{name}, healed', 'healed', default, 'mla', 'D', 6, '-'),
        Curve('the same in int4', 'healed, int4', default, 'peer', 'x', 8, ':'),
    ]


def draw_results(results: StudyResults, default: dict, path: Path) -> None:
    """Draw percent above the source by the share of the cache that is saved, a panel a kind."""
    kinds = results.kinds()
    with figures.sheet(
        cols=len(kinds),
        size=(figures.WIDTH + 2.5, 5.0),
        title='Perplexity that a conversion to MLA costs',
        note=picture_note(results),
    ) as (fig, axes):
        if len(kinds) == 1:
            axes = [axes]
        for ax, kind in zip(axes, kinds):
            draw_kind(results, kind, default, ax)
        handles, labels = axes[-1].get_legend_handles_labels()
        fig.legend(handles, labels, loc='outside right center', fontsize=9)
        figures.footer(fig, picture_facts(results))
        figures.save(fig, path)


def draw_kind(results: StudyResults, kind: str, default: dict, ax) -> None:
    savings = savings_of_kinds(results)
    above = results.above_source(kind)
    for curve in curves(default):
        draw_curve(curve, above, savings, ax)
    ax.set_yscale('symlog', linthresh=1)  # healed models may end below their source
    if control := results.control(kind):
        label = 'the source, as many steps more'
        ax.axhline(mean(control), color=figures.COLORS['muted'], linestyle=':', label=label)
    ax.yaxis.set_major_formatter(lambda y, _: f'{y:g}')
    ax.yaxis.set_minor_formatter(lambda y, _: '')
    percents = [100 * saving for saving in savings]
    ax.set_xticks(percents, [f'{percent:g}' for percent in percents])
    ax.set_xlim(percents[0] - 2, percents[-1] + 2)
    ax.set_title(kind.upper())
    ax.set_xlabel('share of the cache saved (%)')
    ax.set_ylabel('perplexity above the source (%)')


def draw_curve(curve: Curve, above: Above, savings: list[float], ax) -> None:
    """Draw the means of the seeds, with bars from the least to the most."""
    x, y, below, beyond = [], [], [], []
    for saving in savings:
        by_seed = above.get((curve.what, way_name(curve.way), saving))
        if by_seed is None:
            continue
        values = list(by_seed.values())
        x.append(100 * saving)
        y.append(mean(values))
        below.append(max(y[-1] - min(values), 0))
        beyond.append(max(max(values) - y[-1], 0))
    if not x:
        return
    ax.errorbar(
        x,
        y,
        [below, beyond],
        color=figures.COLORS[curve.color],
        linestyle=curve.line,
        marker=curve.marker,
        markersize=curve.size,
        capsize=2,
        label=curve.label,
    )


def picture_note(results: StudyResults) -> str:
    """Return how long was trained and healed, and what the bars are."""
    seeds = {seed for _, seed in results.of('source')}
    note = 'one seed'
    if len(seeds) > 1:
        note = 'mean of the seeds, bars from least to most'
    trained, healed = (steps_in_words(results, what) for what in ('source', 'healed'))
    if trained and healed:
        note = f'healing: {healed} steps after {trained} of training; {note}'
    return note


def steps_in_words(results: StudyResults, what: str) -> str:
    rows = results.rows.values()
    steps = {row['steps'] for row in rows if row['what'] == what and 'steps' in row}
    return ', '.join(map(str, sorted(steps)))


def picture_facts(results: StudyResults) -> str:
    """Return commits, seeds and device of the sources, for the footer."""
    sources = results.of('source')
    commits = sorted({row['commit'] for row in sources.values()})
    seeds = sorted({seed for _, seed in sources})
    word = 'seeds' if len(seeds) > 1 else 'seed'
    device = next(iter(sources.values()))['device']
    numbers = ', '.join(map(str, seeds))
    return f'commit {", ".join(commits)} · {word} {numbers} · {device}'
