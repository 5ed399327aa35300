"""
What a comparison found: numbers from the lines of its results.jsonl, as a table; comparison_figures.py draws them.

The file is all that is needed. Its lines are the comparison (what was asked for), then each contender,
then each run with its losses. Everything here is computed from them, so a table or a figure can be made
again at any time, on a machine without torch.

Validation losses are in nats a token; the loss of a run is the best of its evaluations, the one whose
weights train.py keeps. Runs of one seed share batches and evaluation, so contenders are compared seed by
seed: the difference to the control is a mean over seeds with a 95 % confidence interval by Student's t.
"""

import json
import math
import statistics
import textwrap

from nanomla.core.configurator import UserError

# ---------------------------------------------------------------------------------------------------
# numbers


def t_quantile(probability, freedom):
    """
    The quantile of Student's t distribution with a whole number of degrees of freedom, by bisection on its
    cumulative distribution, which is a finite sum (Abramowitz and Stegun, 26.7.3 and 26.7.4).
    """

    def two_sided(t):  # P(|T| < t)
        angle = math.atan(t / math.sqrt(freedom))
        cos2, term, total = math.cos(angle) ** 2, 1.0, 0.0
        for k in range(freedom % 2 + 1, freedom, 2):  # 1, 3, ... or 2, 4, ...
            total += term
            term *= cos2 * k / (k + 1)
        if freedom % 2 == 0:
            return math.sin(angle) * total
        return 2 / math.pi * (angle + math.sin(angle) * math.cos(angle) * total)

    low, high = 0.0, 1.0
    while two_sided(high) < 2 * probability - 1:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if two_sided(middle) < 2 * probability - 1 else (low, middle)
    return high


def interval(differences):
    """Mean of paired differences and the half width of its 95 % confidence interval by Student's t; None with fewer than two."""
    mean, n = statistics.fmean(differences), len(differences)
    return mean, t_quantile(0.975, n - 1) * statistics.stdev(differences) / math.sqrt(
        n
    ) if n > 1 else None


def read(path):
    """(comparison, contenders, runs) of a results.jsonl: a dict, a dict by name, a list of dicts. UserError when it is none."""
    try:
        with open(path, encoding='utf-8') as file:
            lines = [json.loads(line) for line in file if line.strip()]
    except OSError as error:
        raise UserError(
            f'{path} cannot be read ({error.strerror}): run the comparison first, or name its --results'
        ) from None
    except ValueError:
        raise UserError(
            f'{path} is damaged or no results.jsonl: run compare.py again, which writes it from the runs'
        ) from None
    if not lines or not isinstance(lines[0], dict) or lines[0].get('event') != 'comparison':
        raise UserError(f'{path} holds no comparison: name the results.jsonl that compare.py wrote')
    contenders = {line['name']: line for line in lines if line.get('event') == 'contender'}
    return lines[0], contenders, [line for line in lines if line.get('event') == 'run']


def rows(comparison, contenders, runs):
    """One dict a contender, in their order: the columns of the table, None where something is not known."""
    scored = {
        name: {
            run['seed']: run
            for run in runs
            if run['contender'] == name and run['role'] == 'seed' and 'val_loss' in run
        }
        for name in contenders
    }
    control = scored.get(comparison['control'], {})
    found = []
    for name, about in contenders.items():
        mine = scored[name]
        losses = [run['val_loss'] for run in mine.values()]
        pairs = [
            mine[seed]['val_loss'] - control[seed]['val_loss']
            for seed in comparison['seeds']
            if seed in mine and seed in control
        ]
        errors = [about.get('error')] + [
            run.get('error') for run in runs if run['contender'] == name and run['role'] == 'seed'
        ]
        difference, half = (
            interval(pairs) if pairs and name != comparison['control'] else (None, None)
        )
        share_of = (
            100 / statistics.fmean(control[seed]['val_loss'] for seed in mine if seed in control)
            if pairs
            else None
        )
        speeds = [
            run['tok_per_s'] for run in mine.values() if not run['shared'] and run['tok_per_s']
        ]
        memory = [
            run['peak_memory'] for run in mine.values() if not run['shared'] and run['peak_memory']
        ]
        found.append(
            dict(
                name=name,
                label=about['label'],
                kind=about['kind'],
                control=name == comparison['control'],
                seeds=len(losses),
                wanted=len(comparison['seeds']),
                params=about.get('params'),
                params_ratio=about.get('params_ratio'),
                cache_bytes=about.get('cache_bytes'),
                cache_ratio=about['cache_bytes'] / contenders[comparison['control']]['cache_bytes']
                if about.get('cache_bytes')
                and contenders.get(comparison['control'], {}).get('cache_bytes')
                else None,
                val_loss=statistics.fmean(losses) if losses else None,
                sd=statistics.stdev(losses) if len(losses) > 1 else None,
                difference=difference,
                half=half,
                percent=None if difference is None else share_of * difference,
                percent_half=None if half is None else share_of * half,
                tuned=about.get('tuned') or {},
                at_edge=about.get('at_edge', False),
                tok_per_s=statistics.median(speeds) if speeds else None,
                decode_tok_per_s=(about.get('decode') or {}).get('tok_per_s'),
                peak_memory=max(memory) if memory else None,
                error=next((error for error in errors if error), None),
            )
        )
    return found


def reached(comparison, contenders, runs):
    """The control, and the contenders of which a seed was trained or failed; those that a stop has kept waiting are left out."""
    return {
        row['name']: contenders[row['name']]
        for row in rows(comparison, contenders, runs)
        if row['val_loss'] is not None or row['error'] or row['control']
    }


def front(found):
    """Names of the rows on the Pareto front: no other one has a smaller cache and at most the loss, or the same cache and less loss."""
    known = [row for row in found if row['val_loss'] is not None and row['cache_bytes']]
    return [
        row['name']
        for row in known
        if not any(
            other['cache_bytes'] <= row['cache_bytes']
            and other['val_loss'] <= row['val_loss']
            and (other['cache_bytes'] < row['cache_bytes'] or other['val_loss'] < row['val_loss'])
            for other in known
        )
    ]


# ---------------------------------------------------------------------------------------------------
# words


def memory(size):
    return f'{size / 2**30:.2f} GiB' if size >= 2**30 else f'{size / 2**20:.0f} MiB'


def written(value):
    """A setting's value in short: 0.01, residual, True."""
    return f'{value:g}' if type(value) in (int, float) else str(value)


def facts(comparison):
    """Where the numbers come from, for the end of a table and the footer of a figure."""
    return ' · '.join(
        filter(
            None,
            (
                f'commit {comparison["commit"]}',
                f'seeds {", ".join(map(str, comparison["seeds"]))}',
                comparison['device'],
                comparison['dtype'],
                f'torch {comparison["torch"]}',
                comparison['date'],
            ),
        )
    )


def table(comparison, contenders, runs):
    """The results in Markdown: the table, and below it what its numbers mean and where they come from."""
    waiting, contenders = contenders, reached(comparison, contenders, runs)
    waiting, found = (
        [about['label'] for name, about in waiting.items() if name not in contenders],
        rows(comparison, contenders, runs),
    )

    def named(key):
        return 'learning rate' if key in ('learning_rate', 'muon_lr') else key

    tried = list(dict.fromkeys(named(key) for row in found for key in row['tuned'])) or [
        'learning rate'
    ]
    cells_of = [
        [
            '',
            'parameters',
            'KV bytes a token',
            'val loss, mean ± sd',
            'against the control [95 % interval]',
            ', '.join(tried),
            'training tok/s',
            'decoding tok/s',
            'peak memory',
        ]
    ]
    for row in found:
        cells = [f'{row["label"]} (control)' if row['control'] else row['label']]
        cells.append(
            ''
            if row['params'] is None
            else f'{row["params"]:,}'
            + (
                ''
                if row['control'] or row['params_ratio'] is None
                else f' ({100 * row["params_ratio"] - 100:+.2f} %)'
            )
        )
        cells.append(
            ''
            if not row['cache_bytes']
            else f'{row["cache_bytes"]:,}'
            + (
                ''
                if row['control'] or not row['cache_ratio']
                else f' ({share(row["cache_ratio"])})'
            )
        )
        if row['error'] and row['val_loss'] is None:
            cells += [f'failed: {row["error"]}'.replace('|', '\\|')] + [''] * 5
        else:
            cells.append(
                ''
                if row['val_loss'] is None
                else f'{row["val_loss"]:.4f}'
                + ('' if row['sd'] is None else f' ± {row["sd"]:.4f}')
                + (
                    ''
                    if row['seeds'] == row['wanted']
                    else f' ({row["seeds"]} of {row["wanted"]} seeds)'
                )
            )
            cells.append(
                ''
                if row['difference'] is None
                else f'{row["difference"]:+.4f}'
                + (
                    ''
                    if row['half'] is None
                    else f' [{row["difference"] - row["half"]:+.4f}, {row["difference"] + row["half"]:+.4f}]'
                )
                + f', {row["percent"]:+.2f} %'
            )
            cells.append(
                ', '.join(
                    written(row['tuned'][key])
                    for key in sorted(row['tuned'], key=lambda key: tried.index(named(key)))
                )
                + ('*' if row['at_edge'] else '')
            )
            cells.append(speed(row['tok_per_s']))
            cells.append(speed(row['decode_tok_per_s']))
            cells.append('' if row['peak_memory'] is None else memory(row['peak_memory']))
        cells_of.append(cells)
    shown = [
        i for i in range(len(cells_of[0])) if i < 5 or any(cells[i] for cells in cells_of[1:])
    ]  # a column without numbers is left out
    lines = ['| ' + ' | '.join(cells[i] for i in shown) + ' |' for cells in cells_of]
    lines.insert(1, '|---' * len(shown) + '|')
    decode = next(
        (
            about['decode']
            for about in contenders.values()
            if (about.get('decode') or {}).get('tok_per_s')
        ),
        None,
    )
    lines += [
        '',
        textwrap.fill(
            ' '.join(
                filter(
                    None,
                    (
                        f'{comparison["title"]}. Text: {comparison["source"]}; {comparison["steps"]:,} steps of {comparison["tokens_per_step"]:,} tokens, the same ones for each contender.',
                        f'The loss of a run is its best validation loss. The difference is the mean over {len(comparison["seeds"])} seeds of what a contender has more than '
                        f"'{contenders[comparison['control']]['label']}' with the same seed and batches, with Student's t interval (95 %; with {len(comparison['seeds'])} seeds {len(comparison['seeds']) - 1} degrees of freedom)."
                        if len(comparison['seeds']) > 1
                        else '',
                        grid_words(comparison, contenders, found),
                        'Caches are counted in bf16, all layers.',
                        f'Decoding: {decode["batch"]} sequence{"s" * (decode["batch"] > 1)}, {decode["tokens"]} tokens, dense cache, {decode["dtype"]}, on {decode["device"]}, median of {decode["repeats"]}.'
                        if decode
                        else '',
                        comparison.get('remark', ''),
                        f'Not trained yet: {", ".join(waiting)}.' if waiting else '',
                        'Runs shared a device, so speeds and memory are not reported.'
                        if any(run['shared'] for run in runs)
                        else '',
                        'Memory on a CPU is that of the whole process.'
                        if comparison['device'].startswith('CPU')
                        and not any(run['shared'] for run in runs)
                        else '',
                    ),
                )
            ),
            140,
        ),
        '',
        facts(comparison),
    ]
    changes = [
        f'- {about["label"]}: '
        + ', '.join(f'{key}={value}' for key, value in about['differs'].items())
        for about in contenders.values()
        if about.get('differs')
    ]
    if changes:
        lines += ['', 'What differs from the control, by settings of train.py:', '', *changes]
    failed = [
        f'- {run["contender"]}, {run["role"]} {run["seed"]} {run["tuned"] or ""}: {run["error"]}'
        for run in runs
        if run.get('error')
    ]
    if failed:
        lines += ['', 'Runs that failed:', '', *failed]
    samples = [
        (about['label'], about['decode']['sample'])
        for about in contenders.values()
        if (about.get('decode') or {}).get('sample')
    ]
    for label, text in samples:
        lines += ['', f'A sample of {label}:', '', *('    ' + line for line in text.splitlines())]
    return '\n'.join(lines) + '\n'


def speed(value):
    return '' if value is None else f'{value / 1e3:,.0f}k' if value >= 1e4 else f'{value:,.0f}'


def share(ratio):
    """0.2083 -> '1/4.8'"""
    return f'1/{1 / ratio:.3g}' if ratio < 1 else f'{ratio:.3g} ×' if ratio > 1 else 'equal'


def grid_words(comparison, contenders, found):
    grids = {}
    for name, about in contenders.items():
        if about.get('grid'):
            grids.setdefault(
                '; '.join(
                    f'{key} of {", ".join(map(written, values))}'
                    for key, values in about['grid'].items()
                ),
                [],
            ).append(about['label'])
    if not grids:
        return 'The learning rate was not tuned.'
    text = ' '.join(
        f'{words}' + (f' for {", ".join(labels)}' if len(grids) > 1 else '') + '.'
        for words, labels in grids.items()
    )
    short = comparison.get('tune_steps', comparison['steps'])
    return (
        f'Tuned on seed {comparison["tune_seed"]}'
        + (f' in {short:,} steps' if short < comparison['steps'] else '')
        + f': {text}'
        + (
            ' * the best value stands at the end of its grid.'
            if any(row['at_edge'] for row in found)
            else ''
        )
    )
