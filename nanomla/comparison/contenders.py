"""
The contenders of a comparison: settings, grid, parameters, cache, and the runs that each one needs.

compare.py makes a ComparisonSettings of its page and a Contender of each entry of `contenders`. A
contender is an attention that nanomla.checkpoints.native.MODELS knows, with settings of train.py.
"""

import itertools
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from model import GPT
from nanomla.checkpoints.native import MODELS, kind_of, new_model
from nanomla.comparison.runs import RUN_LOCK, Run, RunQueue, as_pairs
from nanomla.core import figures
from nanomla.core.checks import check_range
from nanomla.core.configurator import Settings, UserError
from nanomla.core.devices import describe
from nanomla.core.files import lock, progress_bar
from nanomla.training.launch import as_words
from nanomla.training.trainer import check_ranges

# The same for all contenders: batches, steps, evaluations.
SAME_FOR_ALL = (
    'batch_size',
    'block_size',
    'gradient_accumulation_steps',
    'dataset',
    'max_iters',
    'eval_interval',
    'eval_iters',
    'target_loss',
)
# compare.py sets these itself for each run.
SET_BY_COMPARE = (
    'out_dir',
    'seed',
    'init_from',
    'eval_only',
    'sample_tokens',
    'max_minutes',
    'wandb_run_name',
)
NOT_FOR_A_COMPARISON = ('seed', 'init_from', 'eval_only')
LEAST = dict(
    jobs=1, tune_iters=0, decode_tokens=0, decode_batch=1, decode_repeats=1, tolerance=0
)  # of settings of compare.py


@dataclass
class ComparisonSettings:
    """
    What compare.py was asked for.

    train: the settings of train.py for all contenders, with where each was given.
    own_names: settings of compare.py itself, which a contender cannot have.
    """

    train: Settings
    own_names: set[str]
    out: Path
    title: str
    remark: str
    control: str  # name of a contender
    seeds: list[int]
    tune: dict[str, list]  # a grid for contenders without one of their own
    tune_seed: int
    tune_iters: int  # 0: max_iters
    match: bool  # set n_inner so that the parameters are those of the control
    tolerance: float  # of the parameters

    def shared(self) -> dict:
        """Return what was given for all contenders."""
        skipped = {*self.own_names, *SET_BY_COMPARE}
        return {name: self.train[name] for name in self.train.given if name not in skipped}

    def tune_steps(self) -> int:
        return self.tune_iters or self.train['max_iters']

    def tokens_per_step(self) -> int:
        micro_batches = self.train['gradient_accumulation_steps']
        return micro_batches * self.train['batch_size'] * self.train['block_size']

    def check(self, contenders: dict) -> None:
        """Raise a UserError for what cannot be compared; `contenders` as in a config file."""
        if not contenders or 'dataset' not in self.train.given:
            raise UserError(
                'there is nothing to compare: name config files with contenders and a dataset, '
                'such as config/compare_shakespeare.py, and a study after it'
            )
        if self.control not in contenders:
            raise UserError(
                f"control='{self.control}' is no contender; there are {', '.join(contenders)}"
            )
        self.check_seeds()
        for name, least in LEAST.items():
            check_range(name, self.train[name], least=least)
        check_ranges(self.train)
        for name in NOT_FOR_A_COMPARISON:
            if name in self.train.given:
                raise UserError(
                    f'{self.train.given[name]}: {name} is not for a comparison, which trains from '
                    f'scratch with each of seeds={self.seeds}'
                )
        for name, values in self.tune.items():
            if not isinstance(values, list):
                raise UserError(
                    f'tune: {name} needs a list of values, like dict({name}=[1e-3, 2e-3])'
                )

    def check_seeds(self) -> None:
        all_seeds = [*self.seeds, self.tune_seed]
        whole = all(type(seed) is int and 0 <= seed < 2**32 for seed in all_seeds)
        different = len(set(self.seeds)) == len(self.seeds)
        if not self.seeds or not whole or not different:
            raise UserError(
                f'seeds={self.seeds}, tune_seed={self.tune_seed}: write different whole numbers of '
                'at least 0, like --seeds=[1,2,3]'
            )
        if self.tune_seed in self.seeds:
            raise UserError(
                f'tune_seed={self.tune_seed} is one of seeds={self.seeds}: learning rates are '
                'chosen on a seed that is not reported'
            )


def settings_of_others(attention: str) -> set[str]:
    """Return the names of model settings that other attentions have and this one has not."""
    if attention not in MODELS:
        return set()
    names = set()
    for model_class in MODELS.values():
        names.update(model_class.Config.keys())
    return names - set(MODELS[attention].Config.keys())


class Contender:
    """
    Settings of one contender, its grid, the numbers of its model, its runs.

    error: why there is no such model, '' where there is one. grid: setting -> values to choose
    from; points: every combination of them. `measure` sets params, ratio (of the parameters to the
    control's), cache_bytes (a token, bf16), kind and config. UserError for settings that cannot be
    meant.
    """

    def __init__(self, name: str, asked: dict, comparison: ComparisonSettings):
        self.where = f"contender '{name}'"
        if not re.fullmatch(r'[\w.+-]+', name) or not isinstance(asked, dict):
            raise UserError(
                f'{self.where}: write name=dict(setting=value, ...), the name in letters, digits, '
                'and any of _ . + -'
            )
        self.comparison = comparison
        self.name = name
        self.label = str(asked.get('label', name))
        self.asked = {key: value for key, value in asked.items() if key != 'label'}
        self.settings = {}
        self.grid = {}
        self.check_names()
        self.read_settings()
        self.points = [
            dict(zip(self.grid, values)) for values in itertools.product(*self.grid.values())
        ]
        self.check_tune_iters()

        self.error = ''
        self.vocab_size = 0
        self.params = self.ratio = self.cache_bytes = None
        self.kind = self.attention
        self.config = None
        self.tuning: list[Run] = []
        self.chosen = None

    @property
    def attention(self) -> str:
        return self.settings.get('attention', self.comparison.train['attention'])

    def check_names(self) -> None:
        forbidden = {*SAME_FOR_ALL, *SET_BY_COMPARE, *self.comparison.own_names}
        for key in [*self.asked, *self.comparison.tune]:
            if key in forbidden:
                raise UserError(
                    f'{self.where}: {key} is not for one contender alone: all of them see the same '
                    'batches'
                )

    def read_settings(self) -> None:
        """Divide what was asked for into settings and grid, and add what is given for all."""
        checked = self.comparison.train.checked
        for key, value in self.asked.items():
            if isinstance(value, list):
                self.grid[key] = [checked(key, one, self.where) for one in value]
            else:
                self.settings[key] = checked(key, value, self.where)
        if not self.grid:
            for key, values in self.comparison.tune.items():
                self.grid[key] = [checked(key, one, 'tune') for one in values]
        for values in self.grid.values():
            if not values or len(set(values)) < len(values):
                raise UserError(f'{self.where}: each grid needs values, all of them different')
        foreign = settings_of_others(self.attention)
        shared = self.comparison.shared()
        shared = {key: value for key, value in shared.items() if key not in foreign}
        self.settings = shared | self.settings

    def check_tune_iters(self) -> None:
        tune_iters = self.comparison.tune_iters
        if not tune_iters or len(self.points) == 1:
            return
        for point in self.points:
            settings = self.comparison.train | self.settings | point
            least = settings['lr_decay_iters']
            if settings['decay_lr']:
                least = max(least, settings['warmup_iters'] + 1)
            if not max(least, 1) <= tune_iters <= settings['max_iters']:
                raise UserError(
                    f'{self.where}: tune_iters={tune_iters} must be more than '
                    f'warmup_iters={settings["warmup_iters"]}, at least '
                    f'lr_decay_iters={settings["lr_decay_iters"]} and at most '
                    f'max_iters={settings["max_iters"]}'
                )

    # ---------------------------------------------------------------------------------------------
    # its model

    def model(self, **changes) -> GPT:
        """
        Return its model, without memory for the weights, at the first point of its grid.

        changes: settings that differ.
        """
        given = self.settings | self.points[0] | changes
        settings = self.comparison.train | given
        where = dict.fromkeys(given, self.where)
        with torch.device('meta'):
            return new_model(settings['attention'], settings, where, self.vocab_size)

    def measure(self, vocab_size: int, control: 'Contender | None' = None) -> None:
        """Match the parameters with those of the control, and count them and the cache."""
        self.vocab_size = vocab_size
        try:
            self.check_grid_keeps_size()
            own_width = 'n_inner' in self.asked
            if control and self.comparison.match and not own_width and not control.error:
                self.match_parameters(control.params)
            model = self.model()
        except UserError as error:
            self.error = str(error)
            return
        self.config = model.config
        self.params = model.num_params()
        self.cache_bytes = model.cache_bytes_per_token()
        self.kind = figures.kind_of(dict(kind=kind_of(model), config=vars(model.config)))
        control_params = (control or self).params
        if control_params:
            self.ratio = self.params / control_params

    def check_grid_keeps_size(self) -> None:
        if self.grid.keys().isdisjoint(self.model().Config.keys()):
            return
        sizes = set()
        for point in self.points:
            model = self.model(**point)
            sizes.add((model.num_params(), model.cache_bytes_per_token()))
        if len(sizes) > 1:
            raise UserError(
                f"its grid of {', '.join(self.grid)} changes the model's size: "
                'name a contender for each'
            )

    def match_parameters(self, target: int) -> None:
        """Set n_inner, with which the parameters grow linearly, so that they come to `target`."""
        model = self.model()
        width, params = model.config.n_inner, model.num_params()
        slope = (self.model(n_inner=width + 8).num_params() - params) / 8
        exact = width + (target - params) / slope
        # Widths that are a multiple of 8 are faster; any width where that is too coarse.
        for unit in (8, 1):
            n_inner = unit * round(exact / unit)
            reached = params + slope * (n_inner - width)
            if abs(reached - target) <= self.comparison.tolerance * target:
                break
        if n_inner < 1:
            raise UserError(
                f'there is no n_inner that gives it the {target:,} parameters of the control '
                f"'{self.comparison.control}'"
            )
        if n_inner != width:
            self.settings['n_inner'] = n_inner

    def differs(self, control: 'Contender') -> dict:
        """Return its settings that are not the control's, grids aside."""
        mine = self.comparison.train | self.settings
        theirs = self.comparison.train | control.settings
        names = self.settings | control.settings
        return {
            key: mine[key] for key in names if mine[key] != theirs[key] and key not in self.grid
        }

    # ---------------------------------------------------------------------------------------------
    # its runs

    def words(self, seed: int, tuned: dict) -> list[str]:
        """Return the arguments of train.py for a run with the settings `tuned` of the grid."""
        return as_words(self.settings | tuned | dict(seed=seed, sample_tokens=0))

    def plan(self) -> list[Run]:
        """
        Return its runs: those of the grid, unless it is one point, and then one with each seed.

        UserError where a folder holds a run with other settings.
        """
        folder = self.comparison.out / self.name
        if not self.error and len(self.points) > 1:
            self.tuning = [self.plan_tuning(point) for point in self.points]
        reported = []
        for seed in self.comparison.seeds:
            run = Run(self.name, 'seed', seed, folder / f'seed-{seed}', needs=self.tuning)
            if not self.error:
                run.check_settings(self.words(seed, self.points[0]), ignore=self.grid)
            reported.append(run)
        return self.tuning + reported

    def plan_tuning(self, point: dict) -> Run:
        changes = dict(point)
        if self.comparison.tune_iters:
            changes['max_iters'] = self.comparison.tune_iters
        seed = self.comparison.tune_seed
        folder = self.comparison.out / self.name / ('tune-' + ','.join(as_pairs(point)))
        words = self.words(seed, changes)
        run = Run(self.name, 'tune', seed, folder, words, tuned=point)
        run.check_settings()
        return run

    def choose(self) -> dict:
        """
        Return the point of the grid whose run had the least validation loss.

        UserError where there is no such model, or all of those runs failed.
        """
        if self.error:
            raise UserError(self.error)
        if self.chosen is not None:
            return self.chosen
        done = [run for run in self.tuning if run.state() == 'done']
        if done:
            best = min(done, key=lambda run: run.last_event()['best_val_loss'])
            self.chosen = best.tuned
        elif self.tuning:
            raise UserError(f'no point of its grid could be trained: {self.tuning[0].error()}')
        else:
            self.chosen = self.points[0]
        return self.chosen

    def at_edge(self) -> bool:
        """Return whether a chosen number is the least or the most of those to be trained."""
        if not self.chosen:
            return False
        done = [run.tuned for run in self.tuning if run.state() == 'done']
        for key in self.grid:
            tried = {tuned[key] for tuned in done}
            numbers = {value for value in tried if type(value) in (int, float)}
            if len(numbers) > 1 and self.chosen[key] in (min(numbers), max(numbers)):
                return True
        return False


# -------------------------------------------------------------------------------------------------
# all of them


def control_of(field: dict[str, Contender]) -> Contender:
    """Return the contender that the others are compared with."""
    anyone = next(iter(field.values()))
    return field[anyone.comparison.control]


def measure_all(field: dict[str, Contender], vocab_size: int) -> None:
    """Measure all contenders, the control first."""
    control = control_of(field)
    control.measure(vocab_size)
    for contender in field.values():
        if contender is not control:
            contender.measure(vocab_size, control)


def print_plan(
    field: dict[str, Contender], source: str, at_a_time: int, device: torch.device
) -> None:
    """
    Print what is compared, with the parameters and the cache of each contender.

    source: of the text. at_a_time: runs.
    """
    control = control_of(field)
    comparison = control.comparison
    seeds = 'one seed'
    if len(comparison.seeds) > 1:
        seeds = f'{len(comparison.seeds)} seeds'
    text = (
        f'{comparison.train["max_iters"]:,} steps of {comparison.tokens_per_step():,} tokens, '
        f'{seeds}, {source}, {describe(device)}'
    )
    if at_a_time > 1:
        text += f', {at_a_time} runs at a time'
    print(f'{comparison.title}\n  {text}', flush=True)
    for contender in field.values():
        print(f'  {in_one_line(contender, control)}', flush=True)
    if control.error or control.config.label != 'MHA' or control.config.pos != 'rope':
        print(
            f"  note: the control '{control.name}' is not MHA with RoPE, so differences\n"
            '  may be those of positions and not of the cache',
            flush=True,
        )


def in_one_line(contender: Contender, control: Contender) -> str:
    """Return the label, the parameters and the cache of a contender."""
    label = f'{contender.label:<24}'
    if contender.error:
        return f'{label} cannot be built: {contender.error}'
    compared = ''
    if contender is control:
        compared = ' (control)'
    elif contender.ratio:
        compared = f' ({100 * contender.ratio - 100:+.2f} %)'
    text = (
        f'{label} {contender.params:>12,} parameters{compared}, '
        f'cache {contender.cache_bytes:,} bytes a token'
    )
    tolerance = contender.comparison.tolerance
    if contender.ratio and abs(contender.ratio - 1) > tolerance:
        text += f' -- NOT EQUAL: more than {100 * tolerance:g} % from the control'
    return text


def forget_failures(field: dict[str, Contender]) -> None:
    """Remove the error.txt of failed runs, unless somebody trains them."""
    out = control_of(field).comparison.out
    for path in out.glob('*/*/error.txt'):
        if path.parent.parent.name not in field:
            continue
        held = lock(path.parent, RUN_LOCK)
        if held:
            with held:
                path.unlink(missing_ok=True)


class ComparisonQueue(RunQueue):
    """
    Train the runs of all contenders, in their order: after a stop the first ones are complete.

    A progress bar counts steps where standard error is a terminal.
    """

    def __init__(
        self,
        field: dict[str, Contender],
        environments: list[dict],
        in_process: bool,
        shared: bool,
    ):
        """shared: several runs share a device, so that speeds do not count."""
        runs = []
        for contender in field.values():
            runs += contender.plan()
        super().__init__(runs, environments, in_process, facts=dict(shared=shared))
        self.field = field
        comparison = control_of(field).comparison
        self.steps = dict(tune=comparison.tune_steps(), seed=comparison.train['max_iters'])
        self.bar = None
        if sys.stderr.isatty():
            self.bar = progress_bar(sum(self.steps[run.role] for run in runs), 'step')

    def reported_runs(self, contender: Contender) -> list[Run]:
        """Return the runs of a contender whose losses count, a run each seed."""
        return [run for run in self.runs if run.contender == contender.name and run.role == 'seed']

    def prepare(self, run: Run) -> None:
        contender = self.field[run.contender]
        if run.words is None:
            chosen = contender.choose()
            run.set_command(contender.words(run.seed, chosen), chosen)

    def begins(self, run: Run) -> None:
        if self.bar:  # it names the runs that are under way
            return
        verb = 'goes on' if run.state() == 'part' else 'begins'
        print(f'{self.counter()} {run.name} {verb}', flush=True)

    def counter(self) -> str:
        """Return how many runs have ended, of how many."""
        ended = sum(bool(run.outcome) for run in self.runs)
        return f'[{ended}/{len(self.runs)}]'

    def report(self, run: Run) -> None:
        if run.outcome == 'failed':
            outcome = f'failed: {run.error()}'
        elif run.outcome:
            outcome = f'val loss {run.last_event()["best_val_loss"]:.4f}'
        else:
            outcome = (
                'its process or its device broke down (see output.txt), it goes on in a new one'
            )
        text = f'{self.counter()} {run.name}: {outcome}'
        if self.bar:
            self.bar.write(text)
        else:
            print(text, flush=True)

    def progress(self, running: list[Run]) -> None:
        if not self.bar:
            return
        steps = sum(self.steps[run.role] for run in self.runs if run.outcome)
        for run in running:
            steps += min(run.last_event().get('step', 0), self.steps[run.role])
        text = ', '.join(run.name for run in running[:2])
        if len(running) > 2:
            text += f' and {len(running) - 2} more'
        self.bar.set_postfix_str(text, refresh=False)
        self.bar.update(steps - self.bar.n)

    def close(self) -> None:
        super().close()
        if self.bar:
            self.bar.close()
