"""
The conversion study: how much perplexity each way into MLA costs, and how much healing gives back.

    python -m nanomla.comparison.conversion_study --text=books.txt.xz --seeds=1,2,3
    python -m nanomla.comparison.conversion_study --text=books.txt.xz --kinds=mha

    # a share of it on another machine, and the picture of both
    python -m nanomla.comparison.conversion_study --seeds=2 --kinds=gqa --out=out-study-2
    python -m nanomla.comparison.conversion_study --draw_only=True \
        --results=out-study/results.jsonl,out-study-2/results.jsonl

It trains the sources (MHA and GQA with RoPE), converts each at every saving by every way, heals the
chosen ones for at most a twentieth of the source's steps, and reads them through an int4 cache. The
control is the source itself, trained on by as many steps in the same way, without a teacher: what
more training alone is worth. Each result is a line of a JSONL file. A study that was interrupted
goes on where it was.
"""

# what
out = 'out-study'  # sources, converted and healed models
results = ''  # a JSONL file, '' = out/results.jsonl; with draw_only several, with commas
picture = ''  # '' = out/study.png
text = ''  # a text file to make the dataset of when it is not there, byte by byte
dataset = ''  # a folder of tokens, '' = out/text
seeds = '1,2,3'
kinds = 'mha,gqa'  # of the sources
savings = '0.6875,0.8125,0.875,0.93'  # shares of the source's cache
heal_savings = '0.875'  # of these, which to heal
fold = 1  # FreqFold of the default way, which is the one that is healed
rope_pairs = -1  # of the default way; -1: a third of what is left is for k_pe
layer_steps = -1  # the default way is convert_mla.py's, fitted by so many steps; -1 = closed form
compare = True  # heal MHA2MLA's way as well, and train the source on, as a control
draw_only = False  # only print and draw what there is
# the source: 36M parameters (MHA), 33M (GQA)
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

if __name__ == '__main__':
    config = configure(globals())  # before the imports below, so that --help is quick

# -------------------------------------------------------------------------------------------------
import copy
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path

import torch

from model import GPT
from nanomla.checkpoints import native
from nanomla.checkpoints.load import load_model
from nanomla.comparison.conversion_results import (
    DEFAULT,
    MHA2MLA,
    StudyResults,
    all_ways,
    default_way,
    draw_results,
    factorisations,
    print_results,
)
from nanomla.comparison.runs import STOPPED, Run, RunQueue
from nanomla.conversion.calibration import (
    Moments,
    bytes_per_token,
    cached_loss,
    mean_loss,
    measure,
    perplexity,
    tokens_of,
    windows_of,
)
from nanomla.conversion.convert import convert
from nanomla.conversion.layerwise import LayerwiseSettings, fit_layers
from nanomla.conversion.settings import ConversionSettings, settings_for_saving
from nanomla.core.checks import check_choice, check_range, split_list, split_numbers
from nanomla.core.devices import pick_device
from nanomla.core.files import ROOT, run_script
from nanomla.training.launch import as_words

BYTES = 256  # the vocabulary
VAL_FRACTION = 0.02  # of the text


@dataclass
class Study:
    """
    What is asked for, and what there is.

    settings: the page of settings, by name. default: the way that is healed beside MHA2MLA's.
    data: the dataset; windows (M, T) are to calibrate on, held_out (M, T + 1) for perplexities.
    """

    settings: dict
    out: Path
    picture: Path
    kinds: list[str]
    seeds: list[int]
    savings: list[float]
    heal_savings: list[float]
    default: dict
    results: StudyResults
    device: torch.device
    data: Path
    windows: torch.Tensor | None = None
    held_out: torch.Tensor | None = None
    began: float = field(default_factory=time.perf_counter)


@dataclass
class Source:
    """A source of the study, with its model once it is trained."""

    kind: str
    seed: int
    home: Path  # of everything that comes from it
    model: GPT | None = None
    on_cpu: GPT | None = None
    moments: list[Moments] | None = None

    @property
    def folder(self) -> Path:
        return self.home / 'source'

    def row(self, what: str) -> dict:
        """Begin a row of the results about this source."""
        return dict(kind=self.kind, seed=self.seed, what=what)

    def conversion_row(self, what: str, saving: float, way: dict) -> dict:
        """Begin a row of the results about a conversion of this source."""
        return dict(kind=self.kind, seed=self.seed, saving=saving, what=what, way=way)


@dataclass
class Job:
    """A run of train.py, and what to do when it is done: a function that returns more jobs."""

    kind: str
    folder: Path
    words: list[str]
    follow_up: Callable[[], list['Job']]


# -------------------------------------------------------------------------------------------------
# what is asked for


def read_settings(settings: dict) -> Study:
    """Check the settings and read the results that there are. UserError for what does not fit."""
    out = Path(settings['out'])
    files = [Path(name) for name in split_list(settings['results'])] or [out / 'results.jsonl']
    if len(files) > 1 and not settings['draw_only']:
        raise UserError('several --results can only be drawn: add --draw_only=True')
    heal_steps, source_steps = settings['heal_steps'], settings['source_steps']
    if heal_steps * 20 > source_steps:
        raise UserError(
            f'heal_steps={heal_steps} is more than a twentieth of source_steps={source_steps}'
        )
    kinds, seeds = split_list(settings['kinds']), split_numbers('seeds', settings['seeds'])
    for kind in kinds:
        check_choice('kinds', kind, ('mha', 'gqa'))
    savings = split_numbers('savings', settings['savings'], float)
    for saving in savings:
        check_range('savings', saving, above=0, below=1)
    heal_savings = split_numbers('heal_savings', settings['heal_savings'], float)
    for saving in heal_savings:
        check_choice('heal_savings', saving, savings)
    for name, values in dict(kinds=kinds, seeds=seeds, savings=savings).items():
        if not values:
            raise UserError(f'--{name} is empty: name at least one')
    return Study(
        settings=settings,
        out=out,
        picture=Path(settings['picture'] or out / 'study.png'),
        kinds=kinds,
        seeds=seeds,
        savings=savings,
        heal_savings=heal_savings,
        default=default_way(*(settings[name] for name in ('fold', 'rope_pairs', 'layer_steps'))),
        results=StudyResults(files, must_exist=settings['draw_only']),
        device=pick_device(settings['device']),
        data=Path(settings['dataset'] or out / 'text').resolve(),
    )


def check_rows(study: Study) -> None:
    """Raise a UserError where the results are of other sources, or were healed otherwise."""
    healing, asked = healing_settings(study), source_settings(study)
    for row in study.results.rows.values():
        if row.get('healing', healing) != healing:
            raise UserError(
                f'{study.results.files[0]} holds models that were healed with other settings: '
                'name another file for --results'
            )
        theirs = row.get('settings', {})
        if row['what'] == 'source':
            theirs = dict(source_steps=row.get('steps', asked['source_steps'])) | theirs
        for name, value in theirs.items():
            if value != asked.get(name):
                raise UserError(
                    f'{study.results.files[0]} is of sources with {name}={value}, not '
                    f'{asked.get(name)}: name another file for --results'
                )


def source_settings(study: Study) -> dict:
    """Return the settings by which sources can be compared, which their rows hold."""
    names = ('n_layer', 'n_head', 'n_kv_head', 'n_embd', 'block_size', 'batch_size', 'source_steps')
    return {name: study.settings[name] for name in names}


def read_text(study: Study) -> None:
    """Make the dataset where it is missing, and cut it into windows on the device."""
    s = study.settings
    if not (study.data / 'train.bin').exists():
        prepare_text(s['text'], study.data)
    train, val, _ = tokens_of(str(study.data), BYTES, option='--dataset')
    T, least = s['block_size'], s['n_embd'] + 1
    windows = windows_of(train, s['calibration_tokens'], T, least)
    held_out = windows_of(val, s['eval_tokens'], T + 1, what='the held-out part')
    study.windows, study.held_out = windows.to(study.device), held_out.to(study.device)


def prepare_text(text: str, folder: Path) -> None:
    """Make a dataset of bytes out of a text file."""
    if not text:
        raise UserError(f'{folder} holds no tokens: name a --text to make them of, or a --dataset')
    script = ROOT / 'data' / 'text' / 'prepare.py'
    words = ['--tokenizer=bytes', f'--out={folder}', f'--val_fraction={VAL_FRACTION}']
    run_script(script, [text, *words])


# -------------------------------------------------------------------------------------------------
# runs of train.py


def common_words(study: Study) -> list[str]:
    """Return the arguments that all runs share."""
    gpu = study.device.type == 'cuda'
    settings = dict(
        dataset=study.data,
        gradient_accumulation_steps=1,
        batch_size=study.settings['batch_size'],
        sample_tokens=0,
        schedule='wsd',
        min_lr=0,
        eval_iters=4,
        device=study.device.type,
        compile=gpu,
        cuda_graph=gpu,
    )
    if not gpu:
        settings |= dict(dtype='fast', kernel='eager')
    return as_words(settings)


def source_words(study: Study, source: Source) -> list[str]:
    """Return the arguments that train a source."""
    s = study.settings
    settings = {name: s[name] for name in ('n_layer', 'n_head', 'n_embd')}
    key_value_heads = dict(mha=0, gqa=s['n_kv_head'])
    settings |= dict(
        n_kv_head=key_value_heads[source.kind],
        block_size=s['block_size'],
        pos='rope',
        norm='rmsnorm',
        act='swiglu',
        tie_weights=False,
        init='fan_in',
        zero_init=True,
        optimizer='muon',
        muon_lr=0.02,
        learning_rate='3e-3',
        warmup_iters=20,
        cooldown=0.6,
        max_iters=s['source_steps'],
        eval_interval=max(1, s['source_steps'] // 2),
        seed=source.seed,
    )
    return as_words(settings)


def healing_settings(study: Study) -> dict:
    """Return the settings of train.py that heal a model, as the results record them."""
    s = study.settings
    healing = dict(
        max_iters=s['heal_steps'],
        warmup_iters=max(1, s['heal_steps'] // 20),
        optimizer=s['heal_optimizer'],
        learning_rate=s['heal_lr'],
        muon_lr=s['heal_muon_lr'],
        cooldown=s['heal_cooldown'],
        distill=s['heal_distill'],
    )
    if s['heal_distill_hidden']:
        healing['distill_hidden'] = s['heal_distill_hidden']
    return healing


def healing_words(study: Study, source: Source, init_from: Path) -> list[str]:
    """Return the arguments that train a model of `init_from` on."""
    return [
        str(ROOT / 'config' / 'heal_mla.py'),
        *as_words(healing_settings(study)),
        f'--eval_interval={study.settings["heal_steps"]}',
        f'--seed={source.seed + 1000}',
        f'--init_from={init_from}',
    ]


def healing_name(study: Study) -> str:
    """Return what tells folders of differently healed models apart."""
    return '-'.join(map(str, healing_settings(study).values()))


class StudyQueue(RunQueue):
    """
    Runs of train.py that lead to others.

    The first ones, the sources, are trained one after the other. On a GPU what a source has led to
    is trained beside the next one, so that little time goes to starts and compilation.
    """

    def __init__(self, study: Study, sources: list[Job]):
        at_a_time = 2 if study.device.type == 'cuda' else 1
        super().__init__([], environments=[{}] * at_a_time, in_process=True)
        self.study = study
        self.unfinished: list[tuple[Run, Job]] = []
        for job in sources:
            self.add(job, needs=self.runs[-1:])

    def add(self, job: Job, needs: list[Run]) -> None:
        words = [*job.words, *common_words(self.study)]
        run = Run(job.kind, role='seed', seed=0, folder=job.folder, words=words, needs=needs)
        self.runs.append(run)
        self.unfinished.append((run, job))

    def progress(self, running: list[Run]) -> None:
        self.follow_up()

    def nothing_left(self, wait: bool) -> bool:
        self.follow_up()
        return super().nothing_left(wait)

    def follow_up(self) -> None:
        """Do what follows from the runs that have ended since. UserError where one has failed."""
        for run, job in list(self.unfinished):
            if run.outcome == 'failed':
                raise UserError(f'training {run.folder} has failed: {run.error()}')
            if run.outcome == 'done':
                self.unfinished.remove((run, job))
                print(f'{run.folder}: done', flush=True)
                for following in job.follow_up():
                    self.add(following, needs=[])


def train_all(study: Study, sources: list[Source]) -> str:
    """Train the sources and what follows from them; return why it was stopped, '' at the end."""
    jobs = []
    for source in sources:
        words = source_words(study, source)
        follow_up = partial(convert_and_heal, study, source)
        jobs.append(Job(source.kind, source.folder, words, follow_up))
    queue = StudyQueue(study, jobs)
    seconds = study.settings['seconds']
    if not seconds:
        return queue.train()
    left = seconds - (time.perf_counter() - study.began)
    if left <= 0:
        return 'seconds'
    return queue.train(max_minutes=left / 60)


# -------------------------------------------------------------------------------------------------
# converting and measuring


def load(study: Study, folder: Path) -> GPT:
    return load_model(folder).model.to(study.device).eval()


def figures_of(study: Study, model: GPT, cache_dtype: str = '') -> dict:
    """Return perplexity and bytes of a token of a model, through a cache of that dtype or none."""
    batch_size = 512 if study.device.type == 'cuda' else 32
    if cache_dtype:
        nats = cached_loss(model, study.held_out, cache_dtype, batch_size)
    else:
        nats = mean_loss(model, study.held_out, batch_size)
    size = bytes_per_token(model, cache_dtype or 'bfloat16')
    return dict(nats=nats, perplexity=perplexity(nats), bytes=size)


def add_row(study: Study, row: dict) -> None:
    study.results.add(row, study.device)


def convert_and_heal(study: Study, source: Source) -> list[Job]:
    """Measure a source that is trained, convert what is to be healed, and return its healings."""
    source.model = load(study, source.folder)
    source.on_cpu = copy.deepcopy(source.model).cpu()
    if source.row('source') not in study.results:
        facts = dict(params=source.model.num_params(), steps=study.settings['source_steps'])
        facts |= dict(settings=source_settings(study))
        add_row(study, source.row('source') | facts | figures_of(study, source.model))
    compare = study.settings['compare']
    jobs = []
    for way in (study.default, MHA2MLA):
        for saving in study.heal_savings:
            measure_conversion(study, source, saving, way, keep=True)
            if compare or way == study.default:
                jobs += healing_of(study, source, saving, way)
        if compare and study.heal_savings and way == study.default:
            jobs += control_of(study, source)
    return jobs


def conversion_folder(source: Source, saving: float, way: dict) -> Path:
    others = [f'{name}{value}' for name, value in way.items() if name not in DEFAULT]
    return source.home / '-'.join([way['rope'], way['low_rank'], *others, str(saving)])


def measure_conversion(
    study: Study, source: Source, saving: float, way: dict, keep: bool = False
) -> None:
    """Add the rows of a conversion that are missing. keep: write its checkpoint as well."""
    row = source.conversion_row('converted', saving, way)
    int4_row = row | dict(what='converted, int4')
    file = conversion_folder(source, saving, way) / 'ckpt.pt'
    if row in study.results and (not keep or file.exists()):
        return
    mla, layers = converted(study, source, saving, way)
    if keep:
        args, weights = native.model_args(mla), mla.state_dict()
        kind = native.kind_of(mla)
        native.save(file, dict(kind=kind, model_args=args, model=weights, step=0, config={}))
    if way == study.default and int4_row not in study.results:
        add_row(study, int4_row | figures_of(study, mla, 'int4'))
    if row not in study.results:
        widths = dict(
            rank=mla.config.kv_lora_rank,
            rope=mla.config.qk_rope_head_dim,
            energy=sum(layer['energy'] for layer in layers) / len(layers),
        )
        add_row(study, row | figures_of(study, mla) | widths)


def converted(study: Study, source: Source, saving: float, way: dict) -> tuple[GPT, list[dict]]:
    """Convert a source, and return the MLA model on the device and the report by layer."""
    if source.moments is None:
        moments = measure(source.model, study.windows, 32)
        source.moments = [layer.to('cpu') for layer in moments]
    how = {key: value for key, value in way.items() if key != 'layer_steps'}
    settings = settings_for_saving(source.model.config, saving, ConversionSettings(**how))
    # Its matrices are small: the CPU is no slower, and leaves the device to others.
    mla, layers = convert(source.on_cpu, settings, source.moments)
    # The modules of the result are the source's, which stays on the CPU.
    mla = copy.deepcopy(mla).to(study.device)
    if 'layer_steps' in way:
        fitting = LayerwiseSettings(steps=way['layer_steps'], seed=source.seed)
        fit_layers(source.model, mla, study.windows, fitting)
    return mla, layers


def healing_of(study: Study, source: Source, saving: float, way: dict) -> list[Job]:
    """Return the job that heals a conversion, none where its rows are there."""
    row = source.conversion_row('healed', saving, way)
    if row in study.results and row | dict(what='healed, int4') in study.results:
        return []
    start = conversion_folder(source, saving, way)
    folder = start / f'healed-{healing_name(study)}'
    words = [*healing_words(study, source, start), f'--teacher={source.folder}']
    return [Job(source.kind, folder, words, partial(measure_healed, study, row, folder))]


def measure_healed(study: Study, row: dict, folder: Path) -> list[Job]:
    """Add the rows of a healed model, without a cache and through one in int4."""
    mla = load(study, folder)
    facts = dict(steps=study.settings['heal_steps'], healing=healing_settings(study))
    for what, cache_dtype in (('healed', ''), ('healed, int4', 'int4')):
        if row | dict(what=what) not in study.results:
            add_row(study, row | dict(what=what) | facts | figures_of(study, mla, cache_dtype))
    return []


def control_of(study: Study, source: Source) -> list[Job]:
    """Return the job that trains the source on as long as others are healed, without a teacher."""
    row = source.row('control')
    if row in study.results:
        return []
    folder = source.home / f'control-{healing_name(study)}'
    words = healing_words(study, source, source.folder)
    return [Job(source.kind, folder, words, partial(measure_control, study, row, folder))]


def measure_control(study: Study, row: dict, folder: Path) -> list[Job]:
    facts = dict(steps=study.settings['heal_steps'], healing=healing_settings(study))
    add_row(study, row | facts | figures_of(study, load(study, folder)))
    return []


def measure_all_conversions(study: Study, sources: list[Source]) -> None:
    """Add the rows of every way and saving, first the factorisations at the healed savings."""
    conversions = list(product(factorisations(study.default), study.heal_savings))
    for conversion in product(all_ways(study.default), study.savings):
        if conversion not in conversions:
            conversions.append(conversion)
    for way, saving in conversions:
        for source in sources:
            measure_conversion(study, source, saving, way)


# -------------------------------------------------------------------------------------------------


def show(study: Study) -> None:
    """Print the table of what there is, and draw it."""
    if not study.results.kinds():
        print('there are no conversions to show')
        return
    print_results(study.results, study.default)
    draw_results(study.results, study.default, study.picture)
    print(f'\n{", ".join(map(str, study.results.files))}; {study.picture}')


def main(settings: dict) -> None:
    torch.set_float32_matmul_precision('high')
    study = read_settings(settings)
    if settings['draw_only']:
        show(study)
        return
    check_rows(study)
    read_text(study)
    sources = []
    for kind, seed in product(study.kinds, study.seeds):
        sources.append(Source(kind, seed, study.out / f'{kind}-{seed}'))
    stopped = train_all(study, sources)
    if stopped:
        show(study)
        print(f'stopped by {stopped}: the same command goes on')
        sys.exit(STOPPED)
    measure_all_conversions(study, sources)
    show(study)


if __name__ == '__main__':
    main(config)
