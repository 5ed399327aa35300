"""ResultsTable of the adapter benchmark as JSON, CSV, a Markdown table and a picture. A row is a dict: see cells.measure."""

import csv
import json
import os

from nanomla.core import figures
from nanomla.core.files import write_file, writing

COLUMNS = (  # heading, of a row, format
    ('train tok/s', 'train_tok_per_s', ',.0f'),
    ('× peer', 'speedup', '.2f'),
    ('% of limit', 'percent_of_limit', '.0f'),
    ('step ms', 'step_ms', '.1f'),
    ('peak MiB', 'train_allocated_mib', ',.0f'),
    ('reserved', 'train_reserved_mib', ',.0f'),
    ('eval tok/s', 'eval_tok_per_s', ',.0f'),
    ('generate tok/s', 'generate_tok_per_s', ',.0f'),
    ('val loss', 'val_loss', '.4f'),
    ('perplexity', 'perplexity', '.2f'),
    ('ROUGE-L', 'rougeL', '.3f'),
    ('exact', 'exact_match', '.2f'),
    ('F1', 'token_f1', '.3f'),
    ('trainable', 'trainable_parameters', ',.0f'),
)


def write(rows, folder, about, draw=True):
    """results.json, results.csv, results.md and, with `draw` and something to be drawn, results.png in `folder`, each whole or not at all."""
    peers = {
        row['adapter']: row['train_tok_per_s']
        for row in rows
        if row['peer'] and row['kernel'] == 'sdpa' and row['status'] == 'ok'
    }
    for row in rows:
        if row['status'] == 'ok' and row['adapter'] in peers:
            row['speedup'] = row['train_tok_per_s'] / peers[row['adapter']]
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    write_file(
        folder / 'results.json', (json.dumps(about | dict(rows=rows), indent=1) + '\n').encode()
    )
    flat = [
        {key: value for key, value in row.items() if not isinstance(value, (dict, list))}
        for row in rows
    ]
    with writing(folder):
        with open(folder / 'results.csv.partial', 'w', newline='', encoding='utf-8') as file:
            writer = csv.DictWriter(file, dict.fromkeys(key for row in flat for key in row))
            writer.writeheader()
            writer.writerows(flat)
        os.replace(folder / 'results.csv.partial', folder / 'results.csv')
    write_file(folder / 'results.md', table(rows).encode())
    if draw and any(row['status'] == 'ok' for row in rows):
        picture([row for row in rows if row['status'] == 'ok'], folder / 'results.png')


def label(row):
    return f'{row["kernel"]}{" (transformers + PEFT)" if row["peer"] else ""}{" (sees the future)" if row.get("causal") is False else ""}'


def seeds_of(rows):
    most = max(row['seeds'] for row in rows)
    return f'{most} seed{"s" * (most > 1)}'


def spread_of(rows):
    return (
        '1 seed'
        if seeds_of(rows) == '1 seed'
        else f'median of {seeds_of(rows)}, thin lines from least to most'
    )


def color_of(row):
    return (
        'peer'
        if row['peer']
        else 'muted'
        if row.get('causal') is False
        else 'mla'
        if row['kernel'] == 'mla'
        else 'mha'
    )


def table(rows):
    lines = [
        '| adapter | kernel | ran | ' + ' | '.join(heading for heading, _, _ in COLUMNS) + ' |',
        '|---|---|---|' + '---|' * len(COLUMNS),
    ]
    for row in rows:
        if row['status'] == 'ok':
            ran = row.get('kernel_ran', 'not profiled') + (
                '' if row.get('kernel_proved', True) else ' (not what was asked for)'
            )
            cells = [ran] + [
                format(row[key], form) if row.get(key) is not None else ''
                for _, key, form in COLUMNS
            ]
        else:
            cells = [f'{row["status"]}: {row["reason"]}'.replace('|', '/')] + [''] * len(COLUMNS)
        lines.append(f'| {row["adapter"]} | {label(row)} | ' + ' | '.join(cells) + ' |')
    return '\n'.join(lines) + '\n'


def picture(rows, path):
    """Speed and peak memory of training, a column for each adapter."""
    kinds = [
        kind for kind in ('full', 'lora', 'qlora') if any(row['adapter'] == kind for row in rows)
    ]
    tallest = max(sum(row['adapter'] == kind for row in rows) for kind in kinds)
    fewer = {row['cell'] for row in rows if row['seeds'] < max(other['seeds'] for other in rows)}
    with figures.sheet(
        2,
        len(kinds),
        size=(figures.WIDTH, 2.2 + 0.56 * tallest),
        title=f'Fine-tuning {rows[0]["model"]}',
        note=f'{rows[0]["device"]}, {rows[0]["dtype"]}: {spread_of(rows)}{"; peer: transformers + PEFT" * any(row["peer"] for row in rows)}',
    ) as (fig, axes):
        for column, kind in enumerate(kinds):
            some = [row for row in rows if row['adapter'] == kind][::-1]
            colors = [figures.COLORS[color_of(row)] for row in some]
            for line, (key, scale, unit) in enumerate(
                (
                    ('train_tok_per_s', 1, 'training, tokens/s'),
                    ('train_allocated_mib', 1024, 'training, peak GiB'),
                )
            ):
                ax = axes[line] if len(kinds) == 1 else axes[line][column]
                ax.barh(
                    range(len(some)), [row[key] / scale for row in some], color=colors, height=0.7
                )
                if not line:
                    spread = [
                        [row[key] - row[f'{key}_least'] for row in some],
                        [row[f'{key}_most'] - row[key] for row in some],
                    ]
                    ax.errorbar(
                        [row[key] for row in some],
                        range(len(some)),
                        xerr=spread,
                        fmt='none',
                        ecolor=figures.COLORS['ink'],
                        linewidth=1,
                    )
                    ax.set_title(kind)
                ax.set_yticks(
                    range(len(some)),
                    [
                        'peer ' * row['peer']
                        + row['kernel']
                        + ' (not causal)' * (row.get('causal') is False)
                        + f' ({seeds_of([row])})' * (row['cell'] in fewer)
                        for row in some
                    ],
                )
                ax.set_xlim(
                    0, 1.04 * max(row[f'{key}_most' if not line else key] for row in rows) / scale
                )
                ax.grid(axis='y', visible=False)
                ax.xaxis.get_major_locator().set_params(nbins=4)
                ax.xaxis.set_major_formatter(lambda x, _: figures.count(x))
                ax.set_xlabel(unit)
        commits = ', '.join(
            dict.fromkeys(row['commit'] for row in rows)
        )  # a second run may have filled the gaps of a first
        figures.footer(
            fig,
            f'commit {commits} · {seeds_of(rows)} from {rows[0]["settings"]["seed"]} on · torch {rows[0]["torch"]}',
        )
        figures.save(fig, path, palette=True)
