"""Scripts that write something, as they are killed in the midst of it and started again."""

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from faulty import KILLED, Ended, nothing_else_changes, run_forked
from helpers import TEXT, TINY, words
from inputs import names_of
from made_up_results import made_up

from nanomla.checkpoints import native
from nanomla.core import token_files
from nanomla.core.files import jsonl

TRAIN = TINY | dict(max_iters=6, eval_interval=2, keep_checkpoints=2)


def no_curve() -> None:
    """Leave the picture of a run out: it takes longer than all of the run."""
    from nanomla.core import figures

    figures.curve = lambda log, picture: None


@dataclass
class Scenario:
    """
    A command and what has to be there in the end.

    outputs: the entries of its folder that it may change. results: what must be equal however often
    it was killed. prepare: makes ready the folder. complete: says that nothing is left to do.
    """

    script: str
    arguments: list[str]
    outputs: tuple[str, ...]
    results: Callable[[Path], object]
    prepare: Callable[[Path], None] = lambda folder: None
    complete: Callable[[Path], bool] = lambda folder: False

    def run(self, folder: Path, kill_at: int = 0) -> Ended:
        with nothing_else_changes(folder, *self.outputs):
            return run_forked(self.script, self.arguments, folder, kill_at, no_curve).check()

    def finish(self, folder: Path) -> object:
        """Run the command again, unless it is complete, and return its results."""
        if not self.complete(folder):
            ended = self.run(folder)
            assert ended.code == 0, ended.output
            # A small file may stay beside its place; a model may not.
            assert not list(folder.rglob('*.pt.*.partial')) + list(folder.glob('*.partial'))
        return self.results(folder)


def make_place(folder: Path) -> Path:
    """Make what the commands read: a dataset, a text, a run, the results of a comparison."""
    token_files.write_text(folder / 'text', TEXT, 'char', 'A tale of a cat')
    (folder / 'tale.txt').write_text(TEXT)
    ended = run_forked('train.py', words(TRAIN | dict(out_dir='done')), folder, prepare=no_curve)
    assert ended.check().code == 0, ended.output
    results = made_up(dict(mha=[1.0, 1.1, 1.2], mla=[0.9, 1.0, 1.1]))
    contenders = [dict(event='contender') | about for about in results.contenders.values()]
    (folder / 'results.jsonl').write_text(jsonl([results.head, *contenders, *results.runs]))
    return folder


# -------------------------------------------------------------------------------------------------
# results


def weights(path: Path) -> list:
    return [value.tolist() for value in native.load(path)['model'].values()]


def of_training(folder: Path) -> object:
    """Return the weights of a run, bit for bit, and its validation losses by step."""
    lines = (folder / 'out' / 'log.jsonl').read_text().splitlines()
    events = [json.loads(line) for line in lines]
    losses = {event['step']: event['val_loss'] for event in events if event['event'] == 'eval'}
    best = native.load(folder / 'out' / 'ckpt.pt')
    return weights(folder / 'out' / 'last.pt'), losses, best['best_val_loss'], best['step']


def of_training_over(folder: Path) -> object:
    """As of_training, and whether the run that was there before is still there, whole."""
    earlier = native.load(folder / 'done' / 'last.pt')['run_id']
    kept = folder / 'out' / 'previous' / earlier
    same = []
    for name in ('ckpt.pt', 'last.pt', 'log.jsonl', 'step-000006.pt'):
        same.append((kept / name).read_bytes() == (folder / 'done' / name).read_bytes())
    assert all(same) and (folder / 'out' / 'notes.txt').read_text() == 'mine'
    return of_training(folder)


def of_evaluation(folder: Path) -> object:
    records = json.loads((folder / 'ev' / 'results.json').read_text())
    return [(record['cache'], record['result']) for record in records]


def of_conversion(folder: Path) -> object:
    return weights(folder / 'mla' / 'ckpt.pt')


def of_preparing(folder: Path) -> object:
    meta = token_files.read_meta(folder / 'new')
    return [token_files.read_split(folder / 'new', split, meta).tolist() for split in meta_splits()]


def meta_splits() -> tuple[str, ...]:
    return token_files.SPLITS


def of_table(folder: Path) -> object:
    return [(folder / 'pic' / name).read_bytes() for name in ('c.md', 'c.json', 'c.png')]


def put_earlier_run(folder: Path) -> None:
    shutil.copytree(folder / 'done', folder / 'out')
    (folder / 'out' / 'notes.txt').write_text('mine')


AUTO = dict(init_from='auto')
TRAINING = Scenario('train.py', words(TRAIN | AUTO), ('out',), of_training)
EVALUATION = Scenario(
    'eval.py',
    ['--models=done', '--cache=none,dense', '--out_dir=ev', '--device=cpu', '--context=16'],
    ('ev',),
    of_evaluation,
)
CONVERSION = Scenario(
    'convert_mla.py',
    ['done', '--out=mla', '--kv_lora_rank=8', '--calibration=text', '--device=cpu'],
    ('mla',),
    of_conversion,
    complete=lambda folder: (folder / 'mla').exists(),
)
PREPARING = Scenario(
    'data/text/prepare.py', ['tale.txt', '--out=new', '--tokenizer=bytes'], ('new',), of_preparing
)
TABLE = Scenario(
    'compare.py',
    ['--plot_only=True', '--results=results.jsonl', '--figure=pic/c.png'],
    ('pic',),
    of_table,
)
SCENARIOS = dict(
    training=TRAINING,
    evaluation=EVALUATION,
    conversion=CONVERSION,
    preparing=PREPARING,
    table=TABLE,
)


class Beginning:
    """A run that begins from nothing in a folder where an earlier one lies, with notes."""

    scratch = Scenario('train.py', words(TRAIN), ('out',), of_training_over)
    auto = Scenario('train.py', words(TRAIN | AUTO), ('out',), of_training_over)

    def start(self, folder: Path, kill_at: int = 0) -> int:
        """Put the earlier run there and begin; return the number of calls."""
        put_earlier_run(folder)
        ended = self.scratch.run(folder, kill_at)
        assert ended.code == (KILLED if kill_at else 0), ended.output
        return ended.calls

    def kill_and_finish(self, place: Path, folder: Path, kill_at: int) -> object:
        if folder.exists():
            shutil.rmtree(folder)
        shutil.copytree(place, folder)
        self.start(folder, kill_at)
        # Once the earlier run is in previous/, the same command would move the new one there, too.
        moved = list((folder / 'out' / 'previous').glob('*-*[0-9a-f]'))
        ended = (self.auto if moved else self.scratch).run(folder)
        assert ended.code == 0, ended.output
        return of_training_over(folder)


BEGINNING = Beginning()


def kill_and_finish(scenario: Scenario, place: Path, folder: Path, kill_at: int) -> object:
    """Kill a command at a call, finish it in the same folder, and return its results."""
    if folder.exists():
        shutil.rmtree(folder)
    shutil.copytree(place, folder)
    scenario.prepare(folder)
    ended = scenario.run(folder, kill_at)
    assert ended.code in (0, KILLED), ended.output
    return scenario.finish(folder)


# -------------------------------------------------------------------------------------------------
# odd settings

# What may rightly take long, or much memory, when it is large.
LONG = set(
    'max_iters sample_tokens max_new_tokens num_samples trials texts length lr_decay_iters'.split()
)
COMMANDS = {  # script -> arguments with which it runs in a second
    'train.py': words(TINY | dict(out_dir='new', max_iters=2)),
    'sample.py': ['--out_dir=done', '--max_new_tokens=5', '--num_samples=1', '--device=cpu'],
    'eval.py': ['--models=done', '--out_dir=new', '--device=cpu', '--max_tokens=40'],
    'convert_mla.py': ['done', '--out=new', '--kv_lora_rank=8', '--device=cpu', '--eval_tokens=99'],
    'find_induction_heads.py': ['--init_from=done', '--out=new', '--device=cpu'],
    'compare.py': ['--plot_only=True', '--results=results.jsonl', '--figure=new/c.png'],
    'data/text/prepare.py': ['tale.txt', '--out=new'],
}
ODD = (
    *('-1', '0', '1', '2', '3', '7', '0.5', '-0.5', 'nan', 'inf', '1e300'),
    *('1000000000000', str(2**63), 'True', 'False', '', 'none', 'no/such', 'done', 'text'),
    *('tale.txt', '/dev/null', 'x' * 300, '\u4e2d\u6587', '=1+1', '[1]', 'a,b', ',', '..'),
)


def script_cases(number: int, rng: random.Random) -> list[tuple[str, list[str]]]:
    """Return scripts with their arguments, of which one or two settings are odd."""
    cases = []
    for _ in range(number):
        script = rng.choice(list(COMMANDS))
        odd = []
        for name in rng.sample(names_of(script), rng.choice([1, 1, 2])):
            if name not in LONG and not name.startswith('wandb'):
                odd.append(f'--{name}={rng.choice(ODD)}')
        cases.append((script, [*COMMANDS[script], *odd]))
    return cases


def check_script(case: tuple[str, list[str]], place: Path, folder: Path) -> int:
    """Run a script in a copy of `place`: it works, or ends in one line. Return its exit code."""
    if folder.exists():
        shutil.rmtree(folder)
    shutil.copytree(place, folder)
    script, arguments = case
    outputs = {'new', 'done'} | {word.partition('=')[2].split('/')[0] for word in arguments}
    with nothing_else_changes(folder, *(outputs - {'text', 'tale.txt', 'results.jsonl'})):
        return run_forked(script, arguments, folder, prepare=no_curve).check().code


def warm_up() -> None:
    """Load what the scripts import, so that each fork has it already."""
    import matplotlib.pyplot  # noqa: F401
    import torch._dynamo  # noqa: F401
    import torch._inductor  # noqa: F401

    import nanomla.comparison.figures  # noqa: F401
    import nanomla.conversion.convert  # noqa: F401
    import nanomla.evals.run  # noqa: F401
    import nanomla.heads.report  # noqa: F401
    import nanomla.training.trainer  # noqa: F401
