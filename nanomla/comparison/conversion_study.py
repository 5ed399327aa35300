"""
The conversion study: how much perplexity each way into MLA costs, and how much of it healing gives back.

    python study_conversion.py --text=books.txt.xz --seeds=1,2,3
    python study_conversion.py --text=books.txt.xz --kinds=mha                  # minutes on one large GPU
    python study_conversion.py --seeds=2 --kinds=gqa --out=out-study-2          # its share on another machine
    python study_conversion.py --results=out-study/results.jsonl,out-study-2/results.jsonl --draw_only=True

Trains the sources (MHA and GQA with RoPE), converts each at every saving by every strategy, heals the chosen ones for at
most a twentieth of the source's steps, and reads them through an int4 cache. The control is the source itself, trained on
by as many steps in the same way, without a teacher: what more training alone is worth. Each figure is a line of a JSONL
file; a study that was interrupted goes on where it was.
"""

# what
out = 'out-study'  # sources, converted and healed models
results = ''  # the figures; '' = out/results.jsonl; with draw_only several files, with commas between them
picture = ''  # '' = out/study.png
text = ''  # a text file to make the dataset of when it is not there, byte by byte
dataset = ''  # a folder of tokens, '' = out/text
seeds = '1,2,3'
kinds = 'mha,gqa'  # sources
savings = '0.6875,0.8125,0.875,0.93'  # shares of the source's cache
heal_savings = '0.875'  # of these, which to heal
fold = 1  # FreqFold of the default way, which is the one that is healed
rope_pairs = -1  # of the default way; -1: a third of what is left is for k_pe
compare = True  # heal MHA2MLA's way as well, and train the source on, as a control
draw_only = False  # only the table and the picture of what is there
# the source: 35M parameters (MHA), 32M (GQA)
n_layer = 11
n_head = 8
n_kv_head = 4  # of the GQA source
n_embd = 512
block_size = 512
batch_size = 64
source_steps = 3400
heal_steps = 170  # at most a twentieth of source_steps
heal_optimizer = 'muon'  # adamw | muon
heal_lr = 7e-4
heal_muon_lr = 0.0035
heal_distill = 0.9  # share of the loss that is KL(source, model)
heal_distill_hidden = 0.0  # train.py's distill_hidden
heal_cooldown = 0.5
# measuring
calibration_tokens = 131072
eval_tokens = 262144
device = 'auto'  # auto | cpu | cuda
seconds = 0.0  # stop (resumably) the training that is under way then; 0 = no limit

from nanomla.core.configurator import UserError, configure

config = configure(globals())

# ---------------------------------------------------------------------------------------------------
import copy
import json
import os
import subprocess
import sys
import time
from collections import defaultdict
from functools import partial
from pathlib import Path

import torch

from nanomla.checkpoints import load
from nanomla.checkpoints import native as checkpoint
from nanomla.comparison import runs
from nanomla.conversion import calibration
from nanomla.conversion import convert as conversion
from nanomla.core import devices as machine
from nanomla.inference.cache import Cache

HERE, out, began = Path(__file__).resolve().parents[2], Path(out), time.perf_counter()
files, picture = (
    [Path(name) for name in (results or str(out / 'results.jsonl')).split(',')],
    Path(picture or out / 'study.png'),
)
results = files[0]
if len(files) > 1 and not draw_only:
    raise UserError('several --results can only be drawn: add --draw_only=True')
folder = Path(dataset or out / 'text')
if heal_steps * 20 > source_steps:
    raise UserError(
        f'heal_steps={heal_steps} is more than a twentieth of source_steps={source_steps}'
    )
try:
    seeds, savings, heal_savings = (
        [int(s) for s in seeds.split(',')],
        [float(s) for s in savings.split(',')],
        [float(s) for s in heal_savings.split(',') if s],
    )
except ValueError:
    raise UserError('seeds, savings and heal_savings are numbers, separated by commas') from None
kinds = kinds.split(',')
if (
    not set(kinds) <= {'mha', 'gqa'}
    or not set(heal_savings) <= set(savings)
    or not all(0 < s < 1 for s in savings)
):
    raise UserError(
        'kinds are mha and gqa; savings lie between 0 and 1, and heal_savings are some of them'
    )

BASELINE = dict(rope='2-norm', rope_heads='own', low_rank='joint')  # what MHA2MLA does
BEST = (
    dict(rope='turn', rope_heads='shared', low_rank='balanced')
    | (dict(fold=fold) if fold > 1 else {})
    | (dict(rope_pairs=rope_pairs) if rope_pairs >= 0 else {})
)
WAYS = [
    way | dict(low_rank=low_rank)
    for way in (BEST, BASELINE)
    for low_rank in ('balanced', 'calibrated', 'joint', 'split')
]
WAYS += [
    dict(rope=rope, rope_heads='own', low_rank='joint')
    for rope in ('high', 'low', 'uniform', 'turn')
]
WAYS += [
    dict(rope=rope, rope_heads='shared', low_rank='balanced') for rope in ('uniform', '2-norm')
]
WAYS += [
    BEST | dict(fold=2),
    BEST | dict(real=True),
    BEST | dict(ranks='spectrum'),
    BEST | dict(rotate=True),
]


def name_of(way):
    return ', '.join(str(v) if k in BASELINE else f'{k}={v}' for k, v in way.items())


def key_of(row):
    return json.dumps(
        {k: row[k] for k in ('kind', 'seed', 'saving', 'what', 'way') if k in row}, sort_keys=True
    )


def read_rows():
    rows = []
    for file in files:
        try:
            rows += (
                [json.loads(line) for line in file.read_text().splitlines()]
                if file.exists() or draw_only
                else []
            )
        except OSError as error:
            raise UserError(f'cannot read {file}: {error.strerror}') from None
        except ValueError:
            raise UserError(f'{file} is damaged: a line of it is no JSON') from None
    return rows


def tell(**row):
    row |= dict(
        at=round(time.perf_counter() - began, 1),
        commit=machine.commit(),
        device=machine.describe(device),
        torch=torch.__version__,
    )
    with open(results, 'a') as file:
        file.write(json.dumps(row) + '\n')
    done[key_of(row)] = row
    print(
        f'{row["kind"]} seed {row["seed"]}'
        + (f' −{100 * row["saving"]:g} %' if 'saving' in row else '')
        + f' {row["what"]}: '
        f'perplexity {row["perplexity"]:.4f}'
        + (f' ({name_of(row["way"])})' if 'way' in row else ''),
        flush=True,
    )
    return row


def train(sources):
    """
    Runs of train.py, {folder: (its words, what to do then: a function that may return more of them)}: the `sources` one after the other, and beside
    the next one, where there is a GPU, what the one before has led to, so that little of the time goes to starts and compilation.
    """
    gpu = device.type == 'cuda'
    same = [
        f'--dataset={data}',
        '--gradient_accumulation_steps=1',
        f'--batch_size={batch_size}',
        '--sample_tokens=0',
        '--schedule=wsd',
        '--min_lr=0',
        '--eval_iters=4',
        f'--device={device.type}',
        f'--compile={gpu}',
        f'--cuda_graph={gpu}',
        *([] if gpu else ['--dtype=fast', '--kernel=eager']),
    ]
    every, then = [], {}

    def add(jobs, chained=False):
        for path, (words, after) in jobs.items():
            every.append(
                runs.Run(
                    path.relative_to(out).parts[0].split('-')[0],
                    'seed',
                    0,
                    path,
                    [*words, *same],
                    every[-1:] if chained else [],
                )
            )
            then[path] = after

    def look(running=()):
        """Called when whatever can run is running: what follows from the runs that have ended."""
        for run in [run for run in every if run.outcome and run.folder in then]:
            if run.outcome == 'failed':
                raise UserError(f'training {run.folder} has failed: {run.error()}')
            print(f'{run.folder}: done', flush=True)
            add(then.pop(run.folder)() or {})

    class StudyQueue(runs.RunQueue):
        def progress(self, running):
            look(running)

    add(sources, chained=True)
    while then:
        left = (seconds - time.perf_counter() + began) / 60 if seconds else 0
        stopped = (
            'seconds'
            if left < 0
            else StudyQueue(every, [{}] * (1 + gpu), in_process=True).train(left)
        )
        if stopped:
            draw()
            print(f'stopped by {stopped}: the same command goes on')
            sys.exit(runs.STOPPED)
        look()


def figures_of(model, cache=''):
    how = (
        dict(
            cache=lambda slots, size: Cache.of(
                model, slots, size, dtype=cache, window=min(128, block_size // 8)
            ),
            chunk=max(1, block_size // 16),
        )
        if cache
        else {}
    )
    nats = calibration.mean_loss(model, held_out, 512 if device.type == 'cuda' else 32, **how)
    held = Cache(
        [block.attn.cache_dims() for block in model.transformer.h],
        1,
        256,
        dtype=cache or 'bfloat16',
        full=torch.bfloat16,
        window=0,
        device=device,
        kernel='torch',
    )
    return dict(nats=nats, perplexity=calibration.perplexity(nats), bytes=held.bytes_per_token)


def load(path):
    return load.load_model(path).model.to(device).eval()


def study(kind, seed):
    """What to train for it first, and a generator that makes a row of the table at a time, once that is over."""
    home, source, on_cpu, moments = out / f'{kind}-{seed}', None, None, None
    healing = dict(
        max_iters=heal_steps,
        warmup_iters=max(1, heal_steps // 20),
        optimizer=heal_optimizer,
        learning_rate=heal_lr,
        muon_lr=heal_muon_lr,
        cooldown=heal_cooldown,
        distill=heal_distill,
    )
    healing |= dict(distill_hidden=heal_distill_hidden) if heal_distill_hidden else {}
    how = [
        str(HERE / 'config' / 'heal_mla.py'),
        *(f'--{name}={value}' for name, value in healing.items()),
        f'--eval_interval={heal_steps}',
        f'--seed={seed + 1000}',
    ]
    setting = '-'.join(map(str, healing.values()))
    if any(row.get('healing', healing) != healing for row in done.values()):
        raise UserError(
            f'{results} holds models that were healed with other settings: name another file for --results'
        )

    def convert(saving, way, keep=False):
        """The rows of this conversion; with keep its checkpoint as well."""
        nonlocal moments
        row, place = (
            dict(kind=kind, seed=seed, saving=saving, what='converted', way=way),
            place_of(saving, way),
        )
        if key_of(row) in done and (not keep or (place / 'ckpt.pt').exists()):
            return
        moments = moments or [
            calibration.Moments(*(x.cpu() for x in vars(m).values()))
            for m in calibration.measure(source, windows, 32)
        ]
        pairs, rank = conversion.for_saving(
            source.config, saving, way['rope_heads'], way['low_rank'], way.get('rope_pairs', -1)
        )
        if rank < 1:
            raise UserError(
                f'saving {saving} leaves no room for a latent beside the k_pe of {name_of(way)}: use a larger model, or save less'
            )
        mla, layers = conversion.convert(
            on_cpu, moments, rank, **way | dict(rope_pairs=pairs)
        )  # small matrices: no slower there, and the device is left to others
        mla = copy.deepcopy(mla).to(device)  # its modules are the source's
        if keep:
            checkpoint.save(
                place / 'ckpt.pt',
                dict(
                    kind='mla',
                    model_args=checkpoint.model_args(mla),
                    model=mla.state_dict(),
                    step=0,
                    config={},
                ),
            )
        if way == BEST and key_of(row | dict(what='converted, int4')) not in done:
            tell(**row | dict(what='converted, int4'), **figures_of(mla, 'int4'))
        if key_of(row) not in done:
            tell(
                **row,
                **figures_of(mla),
                rank=mla.config.kv_lora_rank,
                rope=mla.config.qk_rope_head_dim,
                energy=sum(x['energy'] for x in layers) / len(layers),
            )

    def place_of(saving, way):
        return home / '-'.join(
            map(
                str,
                [
                    way['rope'],
                    way['low_rank'],
                    *(f'{k}{v}' for k, v in way.items() if k not in BASELINE),
                    saving,
                ],
            )
        )

    def after_source():
        nonlocal source, on_cpu
        source, jobs = load(home / 'source'), {}
        on_cpu = copy.deepcopy(source).cpu()
        if key_of(dict(kind=kind, seed=seed, what='source')) not in done:
            tell(
                kind=kind,
                seed=seed,
                what='source',
                params=source.num_params(),
                steps=source_steps,
                **figures_of(source),
            )
        for way in (BEST, BASELINE):
            for saving in heal_savings:
                convert(saving, way, keep=True)
                row, place = (
                    dict(kind=kind, seed=seed, saving=saving, way=way),
                    place_of(saving, way),
                )
                if (compare or way == BEST) and not all(
                    key_of(row | dict(what=what)) in done for what in ('healed', 'healed, int4')
                ):
                    jobs[place / f'healed-{setting}'] = (
                        [*how, f'--init_from={place}', f'--teacher={home / "source"}'],
                        partial(after_healing, row),
                    )
            if (
                compare
                and heal_savings
                and way == BEST
                and key_of(dict(kind=kind, seed=seed, what='control')) not in done
            ):
                jobs[home / f'control-{setting}'] = (
                    [*how, f'--init_from={home / "source"}'],
                    after_control,
                )
        return jobs

    def after_healing(row):
        mla = load(place_of(row['saving'], row['way']) / f'healed-{setting}')
        for what, cache in (('healed', ''), ('healed, int4', 'int4')):
            if key_of(row | dict(what=what)) not in done:
                tell(
                    **row | dict(what=what),
                    steps=heal_steps,
                    healing=healing,
                    **figures_of(mla, cache),
                )

    def after_control():
        tell(
            kind=kind,
            seed=seed,
            what='control',
            steps=heal_steps,
            healing=healing,
            **figures_of(load(home / f'control-{setting}')),
        )

    def table():
        first = [
            (saving, way) for way in WAYS[:8] for saving in heal_savings
        ]  # the factorisations, where it is healed
        for saving, way in first + [
            (saving, way) for way in WAYS for saving in savings if (saving, way) not in first
        ]:
            convert(saving, way)
            yield

    return {
        home / 'source': (
            [
                f'--n_layer={n_layer}',
                f'--n_head={n_head}',
                f'--n_embd={n_embd}',
                f'--n_kv_head={n_kv_head if kind == "gqa" else 0}',
                f'--block_size={block_size}',
                '--pos=rope',
                '--norm=rmsnorm',
                '--act=swiglu',
                '--tie_weights=False',
                '--init=fan_in',
                '--zero_init=True',
                '--optimizer=muon',
                '--muon_lr=0.02',
                '--learning_rate=3e-3',
                '--warmup_iters=20',
                '--cooldown=0.6',
                f'--max_iters={source_steps}',
                f'--eval_interval={max(1, source_steps // 2)}',
                f'--seed={seed}',
            ],
            after_source,
        )
    }, table()


# ---------------------------------------------------------------------------------------------------
# table and picture


def verdict(above):
    """What must hold of conversions, by `above`: (what, way as JSON, saving) -> percent above the source, by seed."""

    def pairs(a, b):
        """Of the seeds that both have: the perplexities over the source's."""
        a, b = (above.get(key, {}) for key in (a, b))
        return [(1 + a[seed] / 100, 1 + b[seed] / 100) for seed in a if seed in b]

    def told(found):
        """How many are in order, within half a percent."""
        return f'{sum(x <= 1.005 * y for x, y in found)} of {len(found)}'

    at = sorted({saving for *_, saving in above})
    print(
        'perplexity falls with rank: '
        + told(
            [
                pair
                for key in {key[:2] for key in above}
                for s, t in zip(at, at[1:])
                for pair in pairs((*key, s), (*key, t))
            ]
        )
    )
    for way in (BEST, BASELINE):
        order = [
            json.dumps(way | dict(low_rank=low_rank))
            for low_rank in ('balanced', 'calibrated', 'joint', 'split')
        ]
        for a, b in zip(order, order[1:]):
            print(
                f'{name_of(json.loads(a))} at most {json.loads(b)["low_rank"]}: '
                + told(
                    [pair for s in at for pair in pairs(('converted', a, s), ('converted', b, s))]
                )
            )
    best, baseline = json.dumps(BEST), json.dumps(BASELINE)
    for s in at:
        gap = [
            100 * (x - 1) / (y - 1)
            for x, y in pairs(('converted', best, s), ('converted', baseline, s))
        ]
        int4 = [100 * (y / x - 1) for x, y in pairs(('healed', best, s), ('healed, int4', best, s))]
        print(
            f'−{100 * s:g} %, worst seed: '
            + '; '.join(
                f'{name} {max(x):.2f} %'
                for name, x in (
                    ("gap before healing, of MHA2MLA's:", gap),
                    ('healed, above the source:', above.get(('healed', best, s), {}).values()),
                    ('int4, above healed:', int4),
                )
                if x
            )
        )


def draw():
    """The perplexity of each row as a multiple of its source's, over the seeds: mean (least to most)."""
    from nanomla.core import figures

    base, more = (
        {(row['kind'], row['seed']): row for row in done.values() if row['what'] == what}
        for what in ('source', 'control')
    )
    groups = defaultdict(list)
    for row in done.values():
        if 'saving' in row and (row['kind'], row['seed']) in base:
            groups[row['kind'], row['what'], json.dumps(row['way']), row['saving']].append(
                row['perplexity'] / base[row['kind'], row['seed']]['perplexity'] - 1
            )
    shown = sorted({kind for kind, *_ in groups}, reverse=True)  # MHA first
    if not shown:
        return
    columns = sorted({saving for *_, saving in groups})
    for kind in shown:
        own = [row['perplexity'] for (k, _), row in base.items() if k == kind]
        print(
            f'\n{kind.upper()}: source perplexity {sum(own) / len(own):.4f} ({len(own)} seeds); percent above it\n{"":52}'
            + ''.join(f'{"−" + format(100 * s, "g") + " %":>26}' for s in columns)
        )
        for what, way in sorted({(what, way) for k, what, way, _ in groups if k == kind}):
            cells = [groups.get((kind, what, way, s)) for s in columns]
            told = [
                f'{100 * sum(x) / len(x):.2f}'
                + f' ({100 * min(x):.2f}–{100 * max(x):.2f})' * (len(x) > 1)
                if x
                else ''
                for x in cells
            ]
            print(
                f'{what + ": " + name_of(json.loads(way)):52}'
                + ''.join(f'{cell:>26}' for cell in told)
            )
        if gains := [
            100 * (row['perplexity'] / base[key]['perplexity'] - 1)
            for key, row in more.items()
            if key in base and key[0] == kind
        ]:
            print(
                f'control: the source, trained on by as many steps: {sum(gains) / len(gains):.2f} ({min(gains):.2f} to {max(gains):.2f})'
            )
        found = defaultdict(dict)
        for row in done.values():
            if row['kind'] == kind and 'saving' in row and (kind, row['seed']) in base:
                found[row['what'], json.dumps(row['way']), row['saving']][row['seed']] = 100 * (
                    row['perplexity'] / base[kind, row['seed']]['perplexity'] - 1
                )
        verdict(found)
    lines = [
        ('MHA2MLA: own, 2-norm, joint', 'converted', BASELINE, figures.COLORS['mha'], 'o--'),
        (
            'shared, turn, joint',
            'converted',
            BEST | dict(low_rank='joint'),
            figures.COLORS['gqa'],
            'o--',
        ),
        ('shared, turn, balanced', 'converted', BEST, figures.COLORS['mla'], 'o--'),
        ('MHA2MLA, healed', 'healed', BASELINE, figures.COLORS['mha'], 'D-'),
        ('shared, turn, balanced, healed', 'healed', BEST, figures.COLORS['mla'], 'D-'),
        ('the same in int4', 'healed, int4', BEST, figures.COLORS['peer'], 'x:'),
    ]
    steps = [
        sorted({row['steps'] for row in done.values() if row['what'] == what and 'steps' in row})
        for what in ('source', 'healed')
    ]
    healing = (
        'healing: '
        + ' steps after '.join(', '.join(map(str, x)) for x in reversed(steps))
        + ' of training; '
        if all(steps)
        else ''
    )
    with figures.sheet(
        cols=len(shown),
        size=(figures.WIDTH + 2.5, 5.0),
        title='Perplexity that a conversion to MLA costs',
        note=healing
        + (
            'mean of the seeds, bars from least to most'
            if len({seed for _, seed in base}) > 1
            else 'one seed'
        ),
    ) as (fig, axes):
        for ax, kind in zip([axes] if len(shown) == 1 else axes, shown):
            for label, what, way, color, style in lines:
                points = [
                    (100 * s, [100 * x for x in groups[kind, what, json.dumps(way), s]])
                    for s in columns
                    if (kind, what, json.dumps(way), s) in groups
                ]
                if points:
                    means = [sum(x) / len(x) for _, x in points]
                    ax.errorbar(
                        [s for s, _ in points],
                        means,
                        [
                            [max(m - min(x), 0) for m, (_, x) in zip(means, points)],
                            [max(max(x) - m, 0) for m, (_, x) in zip(means, points)],
                        ],
                        color=color,
                        linestyle=style[1:],
                        marker=style[0],
                        markersize=dict(o=4, D=6, x=8)[style[0]],
                        capsize=2,
                        label=label,
                    )
            ax.set_yscale('symlog', linthresh=1)  # healed models may end below their source
            if gains := [
                100 * (row['perplexity'] / base[key]['perplexity'] - 1)
                for key, row in more.items()
                if key in base and key[0] == kind
            ]:
                ax.axhline(
                    sum(gains) / len(gains),
                    color=figures.COLORS['muted'],
                    linestyle=':',
                    label='the source, as many steps more',
                )
            ax.yaxis.set_major_formatter(lambda y, _: f'{y:g}')
            ax.yaxis.set_minor_formatter(lambda y, _: '')
            ax.set_xticks([100 * s for s in columns], [f'{100 * s:g}' for s in columns])
            ax.set_xlim(100 * columns[0] - 2, 100 * columns[-1] + 2)
            ax.set_title(kind.upper())
            ax.set_xlabel('share of the cache saved (%)')
            ax.set_ylabel('perplexity above the source (%)')
        seen = {label: handle for handle, label in zip(*ax.get_legend_handles_labels())}
        fig.legend(seen.values(), seen.keys(), loc='outside right center', fontsize=9)
        figures.footer(
            fig,
            f'commit {", ".join(sorted({row["commit"] for row in base.values()}))} · seed{"s" * (len({seed for _, seed in base}) > 1)} {", ".join(map(str, sorted({seed for _, seed in base})))} · {next(iter(base.values()))["device"]}',
        )
        figures.save(fig, picture)
    print(f'\n{", ".join(map(str, files))}; {picture}')


device = machine.pick_device(device)
torch.set_float32_matmul_precision('high')
if results.exists() and not draw_only:  # a kill may have cut its last line short
    os.truncate(results, results.read_bytes().rfind(b'\n') + 1)
done = {key_of(row): row for row in read_rows()}
if draw_only:
    draw()
    sys.exit()
if not (folder / 'train.bin').exists():
    if not text:
        raise UserError(f'{folder} holds no tokens: name a --text to make them of, or a --dataset')
    if subprocess.run(
        [
            sys.executable,
            str(HERE / 'data' / 'text' / 'prepare.py'),
            text,
            '--tokenizer=bytes',
            f'--out={folder}',
            '--val_fraction=0.02',
        ]
    ).returncode:
        raise UserError(f'--text={text} could not be prepared (the message is above)')
data = folder.resolve()
results.parent.mkdir(parents=True, exist_ok=True)
known, val, _ = calibration.tokens_of(str(folder), 256)
windows = calibration.windows_of(known, calibration_tokens, block_size, n_embd + 1).to(device)
held_out = calibration.windows_of(val, eval_tokens, block_size + 1, what='the held-out part').to(
    device
)
every = [study(kind, seed) for kind in kinds for seed in seeds]
train({path: job for sources, _ in every for path, job in sources.items()})
tables = [table for _, table in every]
while tables:  # a row of each, then the next
    tables = [table for table in tables if next(table, 'over') is None]
draw()
