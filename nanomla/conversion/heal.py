"""
Heal a converted model: train.py with config/heal_mla.py in a process of its own, the source as its
teacher. The same call resumes a run that was interrupted.
"""

from dataclasses import dataclass, field
from pathlib import Path

from nanomla.checkpoints import native
from nanomla.core import token_files
from nanomla.core.configurator import UserError
from nanomla.core.files import ROOT, run_script

STEP_SIZE = 16  # windows of a step
PRETRAINED_RATE = 5e-4  # of AdamW for weights that others trained: docs/conversion.md
EVALUATIONS = 4  # over the run, each of which writes checkpoints to go on from
# AdamW's first steps are as large as its rate, however small the gradient. A run that is shorter
# than this stays below the peak.
WARMUP_STEPS = 10
LEAST_EVALUATED = 16  # windows of an evaluation
MOST_BATCHES = 200  # of an evaluation


@dataclass
class Healing:
    """
    What to heal and for how long.

    start: the folder of the converted model; source: its teacher; dataset: in the source's tokens
    options: further settings of train.py
    """

    start: str
    source: str
    dataset: str
    tokens: int
    block_size: int
    batch_size: int = STEP_SIZE  # windows at a time, which memory limits
    options: dict[str, object] = field(default_factory=dict)

    @property
    def out(self) -> str:
        return healed_folder(self.start)

    @property
    def micro_batches(self) -> int:
        return max(1, STEP_SIZE // self.batch_size)

    @property
    def steps(self) -> int:
        windows = self.batch_size * self.micro_batches
        return max(1, self.tokens // (windows * self.block_size))

    @property
    def eval_batches(self) -> int:
        """Return the batches of an evaluation: a short run would spend most of its time there."""
        trained_on = self.steps * self.batch_size * self.micro_batches
        windows = max(trained_on // (2 * EVALUATIONS), LEAST_EVALUATED)
        return min(max(1, windows // self.batch_size), MOST_BATCHES)

    def words(self) -> list[str]:
        """Return train.py's command line, which resumes a run that was interrupted."""
        interrupted = (Path(self.out) / 'last.pt').exists()
        settings = dict(
            init_from='resume' if interrupted else self.start,
            out_dir=self.out,
            teacher=self.source,
            dataset=self.dataset,
            max_iters=self.steps,
            warmup_iters=WARMUP_STEPS,
            eval_interval=max(1, self.steps // EVALUATIONS),
            eval_iters=self.eval_batches,
            batch_size=self.batch_size,
            gradient_accumulation_steps=self.micro_batches,
            block_size=self.block_size,
        )
        settings |= self.options
        words = [f'--{name}={value}' for name, value in settings.items()]
        return [str(ROOT / 'config/heal_mla.py'), *words]


def healed_folder(start: str) -> str:
    return start.rstrip('/') + '-healed'


def check_dataset(name: str, source: str) -> None:
    """Raise a UserError unless `name` is a dataset to train on."""
    if name and (token_files.find(name) / 'train.bin').exists():
        return
    prepare = f'python data/text/prepare.py FILE --tokenizer={source} --out=FOLDER'
    raise UserError(
        f'--heal trains on a dataset, and --calibration={name} is none: make one ({prepare}) and '
        'calibrate on it'
    )


def check_is_the_same(start: str, source: str, settings: dict) -> None:
    """Raise a UserError unless the folder `start` holds this conversion of `source`."""
    history = native.load(start).get('conversion') or {}
    if history.get('source') == source and history.get('settings') == settings:
        return
    raise UserError(
        f'{start} holds another conversion than the one that is asked for: name a new folder'
    )


def heal(healing: Healing) -> None:
    """Run train.py, whose output is shown. A SystemExit with its code where it fails."""
    run_script(ROOT / 'train.py', healing.words())
