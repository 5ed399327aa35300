"""The report of a conversion: bytes of a token and perplexity of each step, printed and drawn."""

import textwrap
from dataclasses import asdict, dataclass, field
from pathlib import Path

from model import GPT
from nanomla.conversion.calibration import bytes_per_token, perplexity
from nanomla.conversion.layerwise import Split
from nanomla.conversion.settings import ConversionSettings
from nanomla.core import figures
from nanomla.core.files import TABLE_WIDTH


@dataclass
class Row:
    """
    A model of the report.

    bytes: of one token in the caches of all layers
    nats, perplexity: on held-out text; None where there is none
    saved: the share of the source's cache
    """

    name: str
    bytes: float
    nats: float | None
    perplexity: float | None
    saved: float = 0.0
    color: str = ''  # in figures.COLORS; '' for a model that was not kept and is not drawn

    def as_dict(self) -> dict:
        """Return what a checkpoint keeps of it."""
        row = asdict(self)
        del row['color']
        return row


@dataclass
class Report:
    """
    The source, the steps of its conversion, and what each layer keeps.

    source: its name; text: where the perplexities are from, '' without any; cache_dtype: of a last
    row, '' without one; effort: how much text was read and how long each layer was fitted; layers:
    as `convert` returns them, and the error of each layer's output where they were fitted; splits:
    of the cache between rank and k_pe that were tried, the best one first
    """

    source: str
    settings: ConversionSettings
    text: str = ''
    cache_dtype: str = ''
    effort: dict = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    layers: list[dict] = field(default_factory=list)
    splits: list[Split] = field(default_factory=list)

    @property
    def history_settings(self) -> dict:
        """What a checkpoint keeps of the way it was made."""
        return asdict(self.settings) | self.effort | dict(calibration=self.text)

    @property
    def result(self) -> Row:
        """The model that is written, in bf16."""
        return self.rows[-2] if self.cache_dtype else self.rows[-1]

    def add(
        self, name: str, model: GPT, color: str, nats: float | None, cache_dtype: str = 'bfloat16'
    ) -> None:
        """Add a row of `model`; the first one is the source."""
        row = Row(name, bytes_per_token(model, cache_dtype), nats, None, color=color)
        if nats is not None:
            row.perplexity = perplexity(nats)
        self.rows.append(row)
        row.saved = 1 - row.bytes / self.rows[0].bytes


def source_color(model: GPT) -> str:
    """Return the colour of a source in the pictures, by its number of kv heads."""
    return model.config.label.lower()


def print_report(report: Report) -> None:
    """Print a row for each model, and the energy that the layers keep."""
    width = max(len(row.name) for row in report.rows) + 2
    header = f'{"":{width}}bytes a token     saved'
    if report.text:
        header += '   perplexity'
    print(header)
    for row in report.rows:
        line = f'{row.name:{width}}{row.bytes:13,.0f}{100 * row.saved:9.2f} %'
        if report.text:
            line += f'{row.perplexity:13.4f}'
        print(line)
    if report.splits:
        tried = [f'{split.name}: {split.error:.4f}' for split in report.splits]
        print_layers('error of the attentions by rank + k_pe', tried)
    print_layers('energy of keys and values that is kept', layer_energies(report))
    if 'error' in report.layers[0]:
        errors = [f'{layer["error"]:.4f}' for layer in report.layers]
        print_layers('error of the output of each fitted attention', errors)


def print_layers(what: str, values: list[str]) -> None:
    text = f'{what}: {", ".join(values)}'
    print(textwrap.fill(text, TABLE_WIDTH, subsequent_indent='  '))


def layer_energies(report: Report) -> list[str]:
    """Return the energy of each layer in words, with its rank where the ranks differ."""
    energies = [f'{layer["energy"]:.4f}' for layer in report.layers]
    if len({layer['rank'] for layer in report.layers}) == 1:
        return energies
    ranks = [layer['rank'] for layer in report.layers]
    return [f'{energy} (rank {rank})' for energy, rank in zip(energies, ranks)]


def draw_report(report: Report, path: str | Path, facts: str) -> None:
    """
    Draw the bytes of a token of each model, and the energy that each layer keeps.

    facts: where the numbers are from, the footer. UserError without matplotlib.
    """
    title = f'{Path(report.source).name} as MLA: {100 * report.rows[-1].saved:.1f} % '
    title += 'of the cache saved'
    if report.cache_dtype:
        title += f', in {report.cache_dtype}'
    settings = report.settings
    note = f'{settings.low_rank} low rank, RoPE {settings.rope} ({settings.rope_heads})'
    if report.text:
        note += f' · perplexity on {Path(report.text).name}'
    size = (figures.WIDTH, 4.6)
    with figures.sheet(cols=2, size=size, title=title, note=note) as (fig, (left, right)):
        draw_bytes(report, left)
        draw_energies(report, right)
        figures.footer(fig, facts)
        figures.save(fig, path)


def draw_bytes(report: Report, ax) -> None:
    """Draw a bar for each model that was kept, with its numbers behind it."""
    rows = [row for row in report.rows if row.color]
    for number, row in enumerate(rows):
        ax.barh(number, row.bytes, color=figures.COLORS[row.color], height=0.6)
        label = f' {row.bytes:,.0f} B'
        if row.perplexity is not None:
            label += f'\n perplexity {row.perplexity:.3f}'
        ax.text(row.bytes, number, label, va='center', fontsize=10)
    widest = max(row.bytes for row in rows)
    ax.set_xlim(0, 1.6 * widest)  # with room for the numbers of the widest bar
    names = [row.name.replace(' (', '\n(', 1) for row in rows]
    ax.set_yticks(range(len(names)), names)
    ax.invert_yaxis()
    ax.set_xlabel('bytes of a token in the cache, all layers')
    ax.xaxis.set_major_formatter('{x:,.0f}')
    ax.grid(axis='y', visible=False)


def draw_energies(report: Report, ax) -> None:
    """Draw the share of energy that each layer keeps."""
    from matplotlib.ticker import MaxNLocator

    layers = range(len(report.layers))
    energies = [100 * layer['energy'] for layer in report.layers]
    ax.plot(layers, energies, color=figures.COLORS['mla'], marker='o')
    ax.set_xlabel('layer')
    ax.set_ylabel('energy of keys and values kept (%)')
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
