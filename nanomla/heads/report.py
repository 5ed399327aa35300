"""
All that is found out about the heads of some models, as one dict of plain values: what find_induction_heads.py prints,
head_page.py shows and heads.json and heads.csv keep.
"""

import json
import time

import torch

from nanomla.core.configurator import UserError
from nanomla.core.files import csv_table, write_file
from nanomla.heads import ablation, circuits, patterns

EXACT = 1e-3  # a pattern that does not rebuild its attention's output this well is not what the model used
CAUSED = (
    'induction',
    'duplicate',
    'previous',
    'positional',
)  # labels of which the causes are worth their time in a large model
DRAWN = 300  # strongest pairs in the page's composition graph
FEW = 64  # heads of which all are ablated


def trials_for(subject, length, texts, seed):
    L, G = patterns.lengths(subject.model.config.block_size, len(subject.usable), length)
    return patterns.trials(subject.usable, subject.begin, texts, L, G, seed)


def texts_for(subject, texts, seed):
    """What latents are read from, (texts, T): held-out text, or the repeated trial where none is here."""
    T = min(subject.model.config.block_size, 256)
    if subject.held is None or len(subject.held) <= T:
        return trials_for(subject, T, texts, seed).repeated
    starts = torch.linspace(0, len(subject.held) - T, texts).long()
    return subject.held[starts[:, None] + torch.arange(T)]


def held_out_for(subject, length, texts, seed):
    """Trials of held-out text instead of random tokens; None where there is none, or too little."""
    if subject.held is None:
        return None
    return patterns.text_trials(
        subject.held,
        subject.begin,
        texts,
        *patterns.lengths(subject.model.config.block_size, len(subject.usable), length),
        seed,
    )


def examine(
    subject,
    length=50,
    texts=32,
    seed=0,
    threshold=patterns.THRESHOLD,
    causes='auto',
    prompt='',
    shown=128,
    tell=lambda text: None,
):
    """
    A `models` entry of the report. length is |S|, texts the sequences of a trial, causes 'auto' (all heads of a small model, the
    labelled ones of a large one), 'all' or 'none', shown the most tokens of the sequence that is kept for the page.
    UserError when the model's patterns are not what it computes with.
    """
    model = subject.model
    trial = trials_for(subject, length, texts, seed)
    device = next(model.parameters()).device
    sums, rebuilt = patterns.check(model, trial.repeated[:2].to(device))
    if sums > EXACT or rebuilt > EXACT:
        raise UserError(
            f'{subject.source}: rows of its patterns sum to 1 ± {sums:.1g}, outputs rebuilt from them are {rebuilt:.1g} off: they cannot be trusted'
        )
    tell(
        f'{subject.name}: scores of {model.config.n_layer} × {model.config.n_head} heads, {texts} texts of {trial.L} tokens said twice, out of {len(subject.usable):,} different ones'
    )
    begun = time.perf_counter()
    heads, repeated, control = patterns.score(model, trial, threshold)
    seconds = time.perf_counter() - begun
    tell(f'scored in {seconds:.1f} s')
    by_weights, as_read = (
        circuits.copying(model),
        circuits.effective_copying(model, trial.control.to(device)),
    )
    for entry, copies, copies_read in zip(
        heads, by_weights.flatten().tolist(), as_read.flatten().tolist()
    ):
        entry |= dict(copying=round(copies, 5), effective_copying=round(copies_read, 5)) | {
            f'{way}_ablation': None for way in ablation.WAYS
        }
    icl = patterns.in_context(model, subject.held) if subject.held is not None else None
    groups = {} if causes == 'none' else causes_of(model, trial, heads, causes, tell)
    said, spoken = {}, held_out_for(subject, length, texts, seed)
    if spoken:
        on_text, text_repeated, text_control = patterns.score(model, spoken, threshold)
        said = dict(
            text_repeat_loss=patterns.repeat_loss(text_repeated, trial.L),
            text_control_loss=patterns.repeat_loss(text_control, trial.L),
        )
        costs = (
            {}
            if causes == 'none'
            else causes_of(
                model, spoken, on_text, causes, lambda text: tell(f'on held-out text, {text}')
            )['costs']
        )
        groups = groups | dict(
            costs=groups.get('costs', {}) | {f'text_{name}': cost for name, cost in costs.items()}
        )
        for entry, other in zip(heads, on_text):
            entry['on_text'] = (
                other['induction']
                | dict(label=other['label'], previous=other['previous']['score'])
                | {key: other[key] for key in other if key.endswith('_ablation')}
            )

    ids = (subject.encode(prompt) if prompt else trial.repeated[0])[:shown].to(device)
    found = patterns.of(model, ids)
    from nanomla.heads.page import build as head_page  # late: it brings the page

    report = dict(
        name=subject.name,
        kind=subject.kind,
        params=model.num_params(),
        step=subject.step,
        tokens=subject.tokens,
        val_loss=subject.val_loss,
        source=subject.source,
        trained=subject.trained,
        layers=model.config.n_layer,
        heads=model.config.n_head,
        tokens_text=subject.text_of(ids),
        patterns_u8=head_page.pack_patterns(found.flatten(0, 1).cpu()),
        scores=heads,
        prompt=prompt or None,
        repeats=dict(
            L=trial.L,
            longest_gap=int(trial.gap.max()),
            texts=texts,
            ids=len(subject.usable),
            seed=seed,
            threshold=threshold,
            row_sums=sums,
            rebuilt=rebuilt,
            seconds=round(seconds, 3),
        ),
        loss_by_position=dict(
            x=list(range(1, repeated.size(1) + 1)),
            repeated=[round(x, 5) for x in repeated.mean(0).tolist()],
            control=[round(x, 5) for x in control.mean(0).tolist()],
        ),
        repeat_loss=patterns.repeat_loss(repeated, trial.L),
        control_loss=patterns.repeat_loss(control, trial.L),
        **said,
        icl_score=icl and round(icl[0], 5),
        icl_positions=icl and list(icl[1]),
        group_ablation=groups.pop('costs', {}),
        paths=groups.pop('paths', []),
        composition=circuits.composition(model),
    )
    best = sorted(
        heads,
        key=lambda entry: (
            -max(entry[on]['score'] for on in ('induction', 'on_text') if on in entry)
        ),
    )[:12]
    best = [(entry['layer'], entry['head']) for entry in best]
    if subject.kind == 'MLA' and (parts := circuits.split_logits(model, ids, best)):
        report['mla_split'] = dict(
            heads=[list(head) for head in best],
            content_f16=head_page.pack_logits(parts[0].cpu()),
            rope_f16=head_page.pack_logits(parts[1].cpu()),
        )
    return report


def of_label(heads, label):
    return [(entry['layer'], entry['head']) for entry in heads if entry['label'] == label]


def causes_of(model, trial, heads, causes, tell, texts=16):
    """
    Fills in the ablations of single heads; returns costs (of groups, `zero_control` where nothing repeats, and of the paths between two) and paths
    (of single previous-token heads to all induction heads).
    """
    unrepeated = ablation.Surgery(model, trial.control[:texts], trial.L)
    surgery = ablation.Surgery(model, trial.repeated[:texts], trial.L)
    chosen = [
        entry for entry in heads if causes == 'all' or len(heads) <= FEW or entry['label'] in CAUSED
    ]
    tell(f'causes: {len(chosen)} heads, one by one and in groups')
    for entry in chosen:
        head = (entry['layer'], entry['head'])
        entry |= {f'{way}_ablation': round(surgery.cost([head], way), 5) for way in ablation.WAYS}
    costs, paths = dict(loss=round(surgery.loss, 5)), []
    induction, previous = of_label(heads, 'induction'), of_label(heads, 'previous')
    for label, group in dict(
        induction=induction, previous=previous, positional=of_label(heads, 'positional')
    ).items():
        if group:
            costs |= {f'{label}_heads': len(group)} | {
                f'{label}_{way}': round(surgery.cost(group, way), 5) for way in ablation.WAYS
            }
            costs[f'{label}_zero_control'] = round(unrepeated.cost(group), 5)
    if induction and previous:
        costs |= {
            f'previous_to_induction_{reads}': round(surgery.path(previous, induction, reads), 5)
            for reads in 'QKV'
        }
        paths = [
            {
                'from': list(head),
                'kind': reads,
                'cost': round(surgery.path([head], induction, reads), 5),
            }
            for head in previous[:12]
            for reads in 'QKV'
        ]
    return dict(costs=costs, paths=paths)


def through_training(load, files, length, texts, seed, threshold, tell=lambda text: None):
    """
    A `checkpoints` entry: what changed over the checkpoints `files` of one run, each opened by load(file). scores are induction
    scores and gaps those of the gap trial, [checkpoint][layer][head]; max_induction is the largest gap score, max_text that on held-out text
    said twice, text_heads what is called induction there, text_repeat_loss and text_control_loss nats a token; None without such a text.
    """
    run = dict(
        tokens=[],
        step=[],
        max_induction=[],
        max_previous=[],
        induction_heads=[],
        scores=[],
        gaps=[],
        icl=[],
        repeat_loss=[],
        control_loss=[],
        max_text=[],
        text_heads=[],
        text_repeat_loss=[],
        text_control_loss=[],
    )
    for file in files:
        subject = load(file)
        trial = trials_for(subject, length, texts, seed)
        heads, repeated, control = patterns.score(subject.model, trial, threshold)
        grid = {
            name: torch.tensor([entry['induction'][name] for entry in heads]).unflatten(
                0, (subject.model.config.n_layer, -1)
            )
            for name in ('score', 'gap')
        }
        icl = patterns.in_context(subject.model, subject.held) if subject.held is not None else None
        spoken = held_out_for(subject, length, texts, seed)
        on_text, text_repeated, text_control = (
            patterns.score(subject.model, spoken, threshold) if spoken else (None,) * 3
        )
        for key, value in dict(
            tokens=subject.tokens,
            step=subject.step,
            max_induction=round(grid['gap'].max().item(), 5),
            max_previous=max(entry['previous']['score'] for entry in heads),
            induction_heads=len(of_label(heads, 'induction')),
            scores=[[round(x, 4) for x in row] for row in grid['score'].tolist()],
            gaps=[[round(x, 4) for x in row] for row in grid['gap'].tolist()],
            icl=icl and round(icl[0], 5),
            repeat_loss=round(patterns.repeat_loss(repeated, trial.L), 5),
            control_loss=round(patterns.repeat_loss(control, trial.L), 5),
            max_text=spoken and max(entry['induction']['gap'] for entry in on_text),
            text_heads=spoken and len(of_label(on_text, 'induction')),
            text_repeat_loss=spoken and round(patterns.repeat_loss(text_repeated, trial.L), 5),
            text_control_loss=spoken and round(patterns.repeat_loss(text_control, trial.L), 5),
        ).items():
            run[key].append(value)
        tell(
            f'{file}: best gap score {run["max_induction"][-1]:.3f}, loss of what repeats {run["repeat_loss"][-1]:.3f}'
        )
    return run | dict(kind=subject.kind, params=subject.model.num_params())


def summary(runs, enough=0.5):
    """A line a variant of a study's runs (its seeds): the best head's last gap score, and after how many tokens it passed `enough`."""
    lines = []
    for variant in dict.fromkeys(run['variant'] for run in runs):
        mine = [run for run in runs if run['variant'] == variant]
        ends = [run['max_induction'][-1] for run in mine]
        passed = [
            next(tokens for tokens, gap in zip(run['tokens'], run['max_induction']) if gap > enough)
            for run in mine
            if max(run['max_induction']) > enough
        ]
        lines.append(
            dict(
                variant=variant,
                kind=mine[0]['kind'],
                params=mine[0]['params'],
                seeds=len(mine),
                mean=round(sum(ends) / len(ends), 4),
                least=min(ends),
                most=max(ends),
                formed=len(passed),
                first=min(passed, default=None),
                last=max(passed, default=None),
                repeat_loss=[run['repeat_loss'][-1] for run in mine],
            )
        )
    return lines


# ---------------------------------------------------------------------------------------------------
# files


def write(folder, report):
    """heads.html, heads.json (all of the report), heads.csv (a row a head), composition.csv (a row a pair) and, of a sweep, checkpoints.csv; returns their paths."""
    from nanomla.heads.page import build as head_page  # late: it brings the page

    brief = [
        m | dict(composition=sorted(m['composition'], key=lambda c: -c['value'])[:DRAWN])
        for m in report['models']
    ]
    head_page.write(folder / 'heads.html', report | dict(models=brief))
    write_file(
        folder / 'heads.json', json.dumps(report, allow_nan=False, ensure_ascii=False) + '\n'
    )
    models, runs, written = (
        report['models'],
        report['checkpoints'],
        ['heads.html', 'heads.json', 'heads.csv', 'composition.csv'],
    )
    write_file(
        folder / 'heads.csv',
        csv_table([dict(model=m['name']) | entry for m in models for entry in m['scores']]),
    )
    write_file(
        folder / 'composition.csv',
        csv_table(
            [
                dict(
                    model=m['name'],
                    from_layer=a,
                    from_head=i,
                    to_layer=b,
                    to_head=j,
                    kind=c['kind'],
                    value=c['value'],
                )
                for m in models
                for c in m['composition']
                for (a, i), (b, j) in [(c['from'], c['to'])]
            ]
        )
        or 'no pairs\n',
    )
    if runs:
        write_file(
            folder / 'checkpoints.csv',
            csv_table(
                [
                    dict(model=run['name'])
                    | {
                        key: run[key][i]
                        for key in run
                        if isinstance(run[key], list) and key not in ('scores', 'gaps')
                    }
                    for run in runs
                    for i in range(len(run['step']))
                ]
            ),
        )
        written.append('checkpoints.csv')
    return [folder / name for name in written]
