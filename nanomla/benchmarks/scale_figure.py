"""The picture of `bench.py scale`: how tokens a second grow with GPUs, and what a step takes."""

from pathlib import Path

from nanomla.core import figures


def draw(rows, path):
    """
    rows: dicts of bench.py scale (model, processes, micro_batches, speedup, ms, ms_least, ms_most, config, device, commit, torch); of two
    with the same model, batch and processes the later counts. Writes the picture to `path`.
    """

    def line_of(row):
        return row['model'], row['config']['batch_size'], row['micro_batches']

    rows, lines = {(line_of(row), row['processes']): row for row in rows}.values(), {}
    for row in sorted(rows, key=lambda row: row['processes']):
        lines.setdefault(line_of(row), []).append(row)
    least, every = 100, sorted({row['processes'] for row in rows})
    with figures.sheet(
        cols=2,
        title='Data parallelism: the same batch on each GPU',
        note='Left: tokens a second of n GPUs as a share of n times one GPU. Right: median, least and most of a step.',
    ) as (fig, (left, right)):
        left.axhline(100, color=figures.COLORS['muted'], lw=1)
        for n, ((model, batch, times), some) in enumerate(sorted(lines.items())):
            kind = [line[1:] for line in sorted(lines) if line[0] == model].index((batch, times))
            style = dict(
                color=figures.COLORS[some[0]['config']['attention']],
                marker='os^D'[n % 4],
                ls=('-', (0, (4, 2)), (0, (1, 1.5)))[kind % 3],
            )
            x = [row['processes'] for row in some]
            share = [100 * row['speedup'] / row['processes'] for row in some]
            left.plot(
                x,
                share,
                label=f'{model}, batch {f"{times} x " if times > 1 else ""}{batch}: {some[-1]["speedup"]:.2f} x on {x[-1]}',
                **style,
            )
            least = min([least, *share])
            right.errorbar(
                x,
                [row['ms'] for row in some],
                [
                    [row['ms'] - row['ms_least'] for row in some],
                    [row['ms_most'] - row['ms'] for row in some],
                ],
                capsize=3,
                **style,
            )
        for ax, label in ((left, 'efficiency, %'), (right, 'ms a step')):
            ax.set(xlabel='GPUs', ylabel=label, xticks=every, xlim=(0.8, every[-1] + 0.2))
        right.set_ylim(0, 1.12 * max(row['ms_most'] for row in rows))
        left.set_ylim(least - 2.5 - 0.8 * len(lines), 101)  # room for the legend
        left.legend(loc='lower left')
        figures.footer(
            fig,
            ' · '.join(
                dict.fromkeys(
                    f'{row["device"]} · torch {row["torch"]} · commit {row["commit"]}'
                    for row in rows
                )
            ),
        )
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figures.save(fig, path)
