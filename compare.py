"""
Train contenders on the same batches with the same seeds, and say what each costs and what it buys.

    python compare.py config/compare_shakespeare.py
    python compare.py --plot_only=True --results=assets/logs/compare_shakespeare.jsonl --figure=compare.png
    sbatch --array=0-7 slurm/compare.sbatch config/compare_124m.py

Every run is an ordinary train.py run in out_dir/CONTENDER/; started again, a comparison goes on where it was.
It leaves out_dir/results.jsonl, which holds all that is shown, compare.md, compare.json, compare.png and
compare_front.png. The settings of train.py are those of all contenders; a config file may hold them, too.
"""

# the comparison; the settings of train.py follow
out_dir = 'out-compare'
title = ''  # of table and figure; '' = the name of out_dir
remark = ''  # a sentence for both
contenders = {}  # name -> settings of train.py, and 'label'; where a setting has a list, its values are a grid to choose from
only = []  # names of contenders: train and show these alone; [] = all
control = ''  # the contender that the others are compared with; '' = the first
seeds = [1, 2, 3]  # a run of each contender with each; differences are paired by them
tune = {}  # a grid for each contender that has none of its own, as dict(muon_lr=[0.01, 0.02, 0.04]); {} = no tuning
tune_seed = 1000  # the seed of the grid's runs, none of `seeds`
tune_iters = 0  # steps of a grid's run, for long comparisons: the schedule in short; 0 = max_iters
match = True  # set n_inner so that each contender has the parameters of the control, unless it says n_inner itself
tolerance = 0.01  # of the parameters: a contender that is further away is pointed out
retry = False  # try runs again that have failed
# speed
jobs = 1  # runs at a time on each GPU, or on the CPU; with more than 1 speeds and memory are not reported
in_process = False  # one process trains run after run: no start-up and no compiling in between
decode_tokens = 200  # tokens decoded to measure the speed, at most a block; 0 = do not measure it
decode_batch = 1  # sequences at a time
decode_repeats = 5  # the median counts, after one to warm up
# what is left
plot_only = False  # train nothing: table and figures from --results
results = ''  # the file to draw; '' = out_dir/results.jsonl; several with commas between them give one picture of all, against their controls
figure = ''  # where to draw; '' = out_dir/compare.png. The table stands beside it, as .md and .json

from nanomla.core.configurator import UserError, configure
from nanomla.inference.generate import generate

own = set(globals())
config = configure(globals(), also='train.py')

# ---------------------------------------------------------------------------------------------------
import itertools
import json
import os
import re
import shlex
import statistics
import sys
import time
from contextlib import closing
from pathlib import Path

from nanomla.comparison import figures as comparison_figures
from nanomla.comparison import table as comparison
from nanomla.comparison.runs import STOPPED, Run, lock, slots, train
from nanomla.core import figures
from nanomla.core.files import write_file

out, picture = Path(out_dir), Path(figure or f'{out_dir}/compare.png')
if picture.suffix != '.png':
    raise UserError(f'--figure={picture}: name a .png')
FIXED = (
    'batch_size',
    'block_size',
    'gradient_accumulation_steps',
    'dataset',
    'max_iters',
    'eval_interval',
    'eval_iters',
    'target_loss',
)
OF_THE_RUN = (
    'out_dir',
    'seed',
    'init_from',
    'eval_only',
    'sample_tokens',
    'max_minutes',
    'wandb_run_name',
)  # compare.py's to set


def show(found):
    """Table and pictures of what results.jsonl files hold, printed and written."""
    if len(found) == 1:
        write_file(picture.with_suffix('.md'), text := comparison.table(*found[0]))
        write_file(
            picture.with_suffix('.json'), json.dumps(comparison.rows(*found[0]), indent=1) + '\n'
        )
        comparison_figures.draw(*found[0], picture)
        print('\n' + text)
    second = picture.with_name(picture.stem + '_front.png') if len(found) == 1 else picture
    comparison_figures.draw_front(found, second)
    print(f'{picture}' + (f', {second}' if second != picture else ''))


if plot_only:
    show([comparison.read(path) for path in (results or str(out / 'results.jsonl')).split(',')])
    sys.exit()

# ---------------------------------------------------------------------------------------------------
# what was asked for, checked before anything is trained
import torch

from nanomla.checkpoints import load
from nanomla.checkpoints import native as checkpoint
from nanomla.core import devices as machine
from nanomla.core import files, timing, tokenizers
from nanomla.core import token_files as datasets
from nanomla.inference.cache import Cache
from nanomla.training.trainer import check_ranges

device = machine.pick_device(config['device'])
if device.type == 'cpu':
    config.apply_on_cpu()
if unknown := next((name for name in only if name not in contenders), ''):
    raise UserError(f"only={only}: '{unknown}' is no contender; there are {', '.join(contenders)}")
contenders = {name: asked for name, asked in contenders.items() if not only or name in only}
results, control = Path(results or out / 'results.jsonl'), control or next(iter(contenders), '')
if not contenders or 'dataset' not in config.given:
    raise UserError(
        'there is nothing to compare: name config files with contenders and a dataset, such as config/compare_shakespeare.py, and a study after it'
    )
if control not in contenders:
    raise UserError(f"control='{control}' is no contender; there are {', '.join(contenders)}")
if (
    not seeds
    or len(set(seeds)) < len(seeds)
    or not all(type(seed) is int and 0 <= seed < 2**32 for seed in [*seeds, tune_seed])
):
    raise UserError(
        f'seeds={seeds}, tune_seed={tune_seed}: write different whole numbers of at least 0, like --seeds=[1,2,3]'
    )
if tune_seed in seeds:
    raise UserError(
        f'tune_seed={tune_seed} is one of seeds={seeds}: learning rates are chosen on a seed that is not reported'
    )
least = dict(jobs=1, tune_iters=0, decode_tokens=0, decode_batch=1, decode_repeats=1, tolerance=0)
if low := next((name for name in least if config[name] < least[name]), ''):
    raise UserError(f'{low}={config[low]} must be at least {least[low]}')
check_ranges(config)
if name := next((name for name in ('seed', 'init_from', 'eval_only') if name in config.given), ''):
    raise UserError(
        f'{config.given[name]}: {name} is not for a comparison, which trains from scratch with each of seeds={seeds}'
    )
mla_only = set(checkpoint.MODELS['mla'].Config.keys()) - set(checkpoint.MODELS['mha'].Config.keys())
shared = {name: config[name] for name in config.given if name not in own and name not in OF_THE_RUN}


class Contender:
    """Settings of one contender, its grid, its model's numbers; `error` says why there is no such model."""

    def __init__(self, name, asked):
        where = f"contender '{name}'"
        if not re.fullmatch(r'[\w.+-]+', name) or not isinstance(asked, dict):
            raise UserError(
                f'{where}: write name=dict(setting=value, ...), the name in letters, digits, and any of _ . + -'
            )
        self.name, self.label, self.error, self.settings, self.grid = (
            name,
            str(asked.get('label', name)),
            '',
            {},
            {},
        )
        if wrong := next(
            (
                key
                for key in [*asked, *tune]
                if key in FIXED or key in OF_THE_RUN or key in own and key != 'label'
            ),
            '',
        ):
            raise UserError(
                f'{where}: {wrong} is not for one contender alone: all of them see the same batches'
            )
        for key, value in asked.items():
            if key != 'label' and isinstance(value, list):
                self.grid[key] = [config.checked(key, one, where) for one in value]
            elif key != 'label':
                self.settings[key] = config.checked(key, value, where)
        self.grid = self.grid or {
            key: [config.checked(key, one, 'tune') for one in values]
            for key, values in tune.items()
        }
        if any(not values or len(set(values)) < len(values) for values in self.grid.values()):
            raise UserError(f'{where}: each grid needs values, all of them different')
        attention = self.settings.get('attention', config['attention'])
        self.settings = {
            key: value
            for key, value in (shared | self.settings).items()
            if key in self.settings or attention == 'mla' or key not in mla_only
        }
        self.points = [
            dict(zip(self.grid, values)) for values in itertools.product(*self.grid.values())
        ]
        for s in [
            config | self.settings | point
            for point in self.points
            if tune_iters and len(self.points) > 1
        ]:
            if (
                not max(s['lr_decay_iters'], s['warmup_iters'] + 1 if s['decay_lr'] else 1)
                <= tune_iters
                <= s['max_iters']
            ):
                raise UserError(
                    f'{where}: tune_iters={tune_iters} must be more than warmup_iters={s["warmup_iters"]}, at least lr_decay_iters={s["lr_decay_iters"]} and at most max_iters={s["max_iters"]}'
                )
        self.tuning = self.chosen = None

    def model(self, **changes):
        """The model with `changes` in its settings, which are those of its grid's first point, without memory for its weights."""
        given = self.settings | self.points[0] | changes
        settings = config | given
        with torch.device('meta'):
            return checkpoint.new_model(
                settings['attention'],
                settings,
                {key: f"contender '{self.name}'" for key in given},
                meta['vocab_size'],
            )

    def match(self, target):
        """Set n_inner so that the parameters, which grow linearly with it, come to `target`: a multiple of 8, or any where that is too coarse."""
        model = self.model()
        begin, here = model.config.n_inner, model.num_params()
        slope = (self.model(n_inner=begin + 8).num_params() - here) / 8
        sizes = [unit * round((begin + (target - here) / slope) / unit) for unit in (8, 1)]
        size = next(
            (
                size
                for size in sizes
                if abs(here + slope * (size - begin) - target) <= tolerance * target
            ),
            sizes[1],
        )
        if size < 1:
            raise UserError(
                f"there is no n_inner that gives it the {target:,} parameters of the control '{control}'"
            )
        if size != begin:
            self.settings['n_inner'] = size

    def measure(self, base=None):
        """Parameters and cache, after matching them with those of the control `base`."""
        try:
            if (
                len(
                    {
                        (model.num_params(), model.cache_bytes_per_token())
                        for model in (self.model(**point) for point in self.points)
                    }
                )
                > 1
            ):
                raise UserError(
                    f"its grid of {', '.join(self.grid)} changes the model's size: name a contender for each"
                )
            if base and match and 'n_inner' not in contenders[self.name] and not base.error:
                self.match(base.params)
            model = self.model()
            kind = figures.kind_of(dict(kind=checkpoint.kind_of(model), config=vars(model.config)))
            self.params, self.cache_bytes, self.kind, self.shape = (
                model.num_params(),
                model.cache_bytes_per_token(),
                kind,
                model.config,
            )
        except UserError as error:
            self.error, self.params, self.cache_bytes, self.kind = (
                str(error),
                None,
                None,
                self.settings.get('attention', config['attention']),
            )
        against = (base or self).params
        self.ratio = self.params / against if self.params and against else None

    def words(self, seed, tuned):
        return [
            f'--{key}={value}'
            for key, value in (self.settings | tuned | dict(seed=seed, sample_tokens=0)).items()
        ]

    def differs(self, base):
        """Its settings that are not the control's, grids aside."""
        mine, theirs = config | self.settings, config | base.settings
        return {
            key: mine[key]
            for key in self.settings | base.settings
            if mine[key] != theirs[key] and key not in self.grid
        }

    def runs(self):
        """What has to be trained: the grid, unless it is a point, and then a run with each seed. UserError when there are runs with other settings."""

        def folder(values):
            return (
                out
                / self.name
                / ('tune-' + ','.join(f'{key}={value}' for key, value in values.items()))
            )

        self.tuning = [
            Run(
                self.name,
                'tune',
                tune_seed,
                folder(point),
                self.words(tune_seed, point | (dict(max_iters=tune_iters) if tune_iters else {})),
                tuned=point,
            ).checked()
            for point in self.points
            if len(self.points) > 1 and not self.error
        ]
        reported = [
            Run(self.name, 'seed', seed, out / self.name / f'seed-{seed}', needs=self.tuning)
            for seed in seeds
        ]
        return self.tuning, [
            run if self.error else run.checked(self.words(run.seed, self.points[0]), but=self.grid)
            for run in reported
        ]

    def choose(self):
        """The point of the grid whose run had the least validation loss. UserError when all of them failed."""
        if self.error:
            raise UserError(self.error)
        if self.chosen is None:
            scored = [
                (run.last_event()['best_val_loss'], i, run.tuned)
                for i, run in enumerate(self.tuning)
                if run.state() == 'done'
            ]
            if self.tuning and not scored:
                raise UserError(f'no point of its grid could be trained: {self.tuning[0].error()}')
            self.chosen = min(scored)[2] if scored else self.points[0]
        return self.chosen

    def at_edge(self):
        tried = {
            key: {
                run.tuned[key]
                for run in self.tuning
                if run.state() == 'done' and type(run.tuned[key]) in (int, float)
            }
            for key in self.grid
        }
        return bool(self.chosen) and any(
            len(values) > 1 and self.chosen[key] in (min(values), max(values))
            for key, values in tried.items()
        )


if key := next((key for key, values in tune.items() if not isinstance(values, list)), ''):
    raise UserError(f'tune: {key} needs a list of values, like dict({key}=[1e-3, 2e-3])')
field = {name: Contender(name, asked) for name, asked in contenders.items()}
with closing(lock(out, wait=True)):
    datasets.prepare_if_missing(config['dataset'])
meta = datasets.read_meta(datasets.find(config['dataset']))
base, steps = field[control], dict(tune=tune_iters or config['max_iters'], seed=config['max_iters'])
for contender in [base] + [contender for contender in field.values() if contender is not base]:
    contender.measure(None if contender is base else base)
environments = slots(device, jobs)
tokens_per_step = (
    config['gradient_accumulation_steps'] * config['batch_size'] * config['block_size']
)
print(
    f'{title or out.name}: {config["max_iters"]:,} steps of {tokens_per_step:,} tokens, {len(seeds)} seeds, {meta["source"]}, {machine.describe(device)}'
    + (f', {len(environments)} runs at a time' if len(environments) > 1 else ''),
    flush=True,
)
for contender in field.values():
    away = contender.ratio and abs(contender.ratio - 1) > tolerance
    print(
        f'  {contender.label:<24} '
        + (
            f'cannot be built: {contender.error}'
            if contender.error
            else f'{contender.params:>12,} parameters {"(control)" if contender is base else f"({100 * contender.ratio - 100:+.2f} %)" if contender.ratio else ""}, '
            f'cache {contender.cache_bytes:,} bytes a token'
            + (f' -- NOT EQUAL: more than {100 * tolerance:g} % from the control' if away else '')
        ),
        flush=True,
    )
if base.error or base.shape.pos != 'rope' or base.kind != 'mha':
    print(
        f"  note: the control '{control}' is not MHA with RoPE, so differences may be those of positions and not of the cache",
        flush=True,
    )

# ---------------------------------------------------------------------------------------------------
# training
plan = [contender.runs() for contender in field.values()]
every = [
    run for tuning, reported in plan for run in tuning + reported
]  # in the order of the contenders: what is stopped has the first ones complete
of_seed = {name: reported for name, (_, reported) in zip(field, plan)}
for path in out.glob('*/*/error.txt') if retry else ():
    if path.parent.parent.name in field and (held := lock(path.parent)):
        with held:
            path.unlink(missing_ok=True)
bar, counted = (
    files.progress_bar(sum(steps[run.role] for run in every), 'step')
    if sys.stderr.isatty()
    else None,
    0,
)


def prepare(run):
    contender = field[run.contender]
    if run.words is None:
        run.choose(contender.words(run.seed, contender.choose()), contender.chosen)


def tell(run):
    last = run.last_event()
    said = (
        f'failed: {run.error()}'
        if run.over == 'failed'
        else f'val loss {last["best_val_loss"]:.4f}'
        if run.over
        else 'its process or its device broke down (see output.txt), it goes on in a new one'
    )
    text = f'[{sum(bool(run.over) for run in every)}/{len(every)}] {run.name}: {said}'
    bar.write(text) if bar else print(text, flush=True)


def look(running):
    global counted
    if bar:
        at = [min(run.last_event().get('step', 0), steps[run.role]) for run in running]
        now = sum(steps[run.role] for run in every if run.over) + sum(at)
        bar.set_postfix_str(
            ', '.join(run.name for run in running[:2])
            + (f' and {len(running) - 2} more' if len(running) > 2 else ''),
            refresh=False,
        )
        bar.update(now - counted)
        counted = now


stopped = train(
    every,
    prepare,
    environments,
    in_process,
    dict(shared=jobs > 1),
    tell,
    look,
    config['max_minutes'],
    'SLURM_ARRAY_TASK_ID' not in os.environ,
)  # a task of an array leaves when others train all that is left
bar.close() if bar else None

# ---------------------------------------------------------------------------------------------------
# what there is to say


def decode(contender):
    """Speed of decoding and a sample, by the checkpoint of the first seed that has one; kept in its folder."""
    asked = dict(
        tokens=min(decode_tokens, config['block_size']), batch=decode_batch, repeats=decode_repeats
    )
    done = [run for run in of_seed[contender.name] if run.state() == 'done']
    for kept in (run.folder / 'decode.json' for run in done):
        if kept.exists() and asked.items() <= (old := json.loads(kept.read_text())).items():
            return old
    if not (
        run := next((run for run in done if (run.folder / 'ckpt.pt').exists()), None)
    ):  # a log without weights is a complete run all the same
        return None
    kept, loaded = (
        run.folder / 'decode.json',
        load.load_model(run.folder, dropout=0.0, kernel='sdpa'),
    )
    model = loaded.model
    model.stream = machine.pick_dtype(config['dtype'], device)
    model.to(device, model.stream).eval()
    prompt, times = torch.zeros(decode_batch, 1, dtype=torch.long, device=device), []
    memory = Cache.of(model, decode_batch, max(asked['tokens'], 1), static=device.type == 'cuda')
    for _ in range(1 + decode_repeats if asked['tokens'] > 1 else 0):
        for row in range(decode_batch):
            memory.free(row)
        for i, _ in enumerate(
            generate(model, prompt, asked['tokens'], temperature=0, cache=memory)
        ):
            if i == 0:  # the prompt is in the cache
                timing.synchronize(device)
                begin = time.perf_counter()
        timing.synchronize(device)
        times.append((time.perf_counter() - begin) / (asked['tokens'] - 1))
    codec, long = tokenizers.Tokenizer(loaded.meta), config['sample_tokens']
    fits = contender.shape.pos != 'learned' or long < contender.shape.block_size
    tokens = generate(
        model,
        torch.tensor([codec.encode('\n')], device=device),
        long,
        temperature=0.8,
        top_k=200,
        vocab_size=codec.vocab_size,
        generator=torch.Generator(device).manual_seed(seeds[0]),
        cache=Cache.of(model, 1, contender.shape.block_size) if fits else None,
    )
    found = asked | dict(
        tok_per_s=decode_batch / statistics.median(times[1:]) if times else None,
        device=machine.describe(device),
        dtype=str(model.stream)[6:],
        cache_bytes=memory.nbytes,
        sample=codec.decode([token.item() for token in tokens]).strip(),
    )
    write_file(kept, json.dumps(found))
    return found


def line(run):
    """All that is kept of one run."""
    about = dict(
        event='run',
        contender=run.contender,
        role=run.role,
        seed=run.seed,
        tuned=run.tuned,
        shared=False,
    )
    if run.over == 'failed':
        return about | dict(error=run.error())
    about['shared'] = json.loads((run.folder / 'run.json').read_text())['shared']
    settings, events = figures.read_log(run.folder / 'log.jsonl')
    evals = {event['step']: event['val_loss'] for event in events if event['event'] == 'eval'}
    losses = {event['step']: event['loss'] for event in events if event['event'] == 'train'}
    thin = -(-len(losses) // 50)
    end = events[-1]
    return about | dict(
        val_loss=end['best_val_loss'],
        best_step=end['best_step'],
        last_val_loss=evals[max(evals)],
        eval_steps=[*evals],
        eval_losses=[round(x, 5) for x in evals.values()],
        train_steps=[*losses][::-thin][::-1],
        train_losses=[round(x, 4) for x in losses.values()][::-thin][::-1],
        tok_per_s=end['tok_per_s'],
        peak_memory=end['peak_memory'],
        params=settings['params'],
        cache_bytes=settings['cache_bytes_per_token'],
        commit=settings['commit'],
        device=settings['device'],
        dtype=settings['dtype'],
        torch=settings['torch'],
        command=shlex.join(['python', 'train.py', *run.words]),
        date=time.strftime('%Y-%m-%d', time.gmtime((run.folder / 'log.jsonl').stat().st_mtime)),
    )


def conclude():
    lines = [line(run) for run in every if run.over]
    done = [one for one in lines if 'val_loss' in one]
    for one in done:
        if (one['params'], one['cache_bytes']) != (
            field[one['contender']].params,
            field[one['contender']].cache_bytes,
        ):
            raise UserError(
                f'{out}/{one["contender"]} holds another model than this comparison asks for: name another --out_dir'
            )

    def said(key):
        return (
            ', '.join(sorted({one[key] for one in done}))
            if key != 'date'
            else max((one[key] for one in done), default='')
        )

    head = dict(
        event='comparison',
        title=title or out.name,
        control=control,
        seeds=seeds,
        tune_seed=tune_seed,
        tune_steps=steps['tune'],
        steps=config['max_iters'],
        tokens_per_step=tokens_per_step,
        remark=remark,
        source=meta['source'],
        settings=shared,
        tolerance=tolerance,
        **{key: said(key) for key in ('commit', 'device', 'dtype', 'torch', 'date')},
    )
    about = [
        dict(
            event='contender',
            name=one.name,
            label=one.label,
            kind=one.kind,
            params=one.params,
            params_ratio=one.ratio,
            cache_bytes=one.cache_bytes,
            error=one.error or None,
            settings=one.settings,
            differs=one.differs(base),
            grid=one.grid,
            tuned=one.chosen,
            at_edge=one.at_edge(),
            decode=None if stopped else decode(one),
        )
        for one in field.values()
    ]
    write_file(results, ''.join(json.dumps(one) + '\n' for one in [head, *about, *lines]))
    return [one for one in lines if 'error' in one and one['role'] == 'seed']


left = sum(not run.over for run in every)
if not stopped and left:
    sys.exit(
        print(
            f'{left} runs are still being trained by other processes: the last of them writes the results'
        )
    )
with closing(lock(out, wait=True)):
    failed = conclude()
    if stopped:
        sys.exit(
            print(
                f'stopped by {stopped} with {left} of {len(every)} runs to go: what is under way is saved, go on with the same command'
            )
            or STOPPED
        )
    show([comparison.read(results)])
if failed:
    sys.exit(
        print(
            f'{len(failed)} runs failed, the first one because: {failed[0]["error"]}. Their output.txt tells more; --retry=True tries them again'
        )
        or 1
    )
