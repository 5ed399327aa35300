"""
Break everything many times and count: kills, changed bytes, and inputs that are made up.

    python tests/faults/campaign.py --kills=100 --corruptions=500 --inputs=20000

Prints a table of what was tried and how it ended. Exit code 1 where something ended in a
traceback, a hang, a lost result or an unnoticed change; each kind is shown once. Ctrl-C and SIGTERM
end it with the table so far.
"""

kills = 100  # of scripts at a random call that changes files, each started again
corruptions = 500  # changed or missing bytes of checkpoints, tokens and models
inputs = 20000  # command lines, config files, datasets, checkpoints; 1 % are whole scripts
seed = 0
folder = ''  # where to work; '' = a new one in the system's folder for such

import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / 'tests'), str(ROOT / 'tests' / 'faults')]

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import seed as hypothesis_seed

from nanomla.core.configurator import configure


class Campaign:
    """What was tried, by name, and what failed."""

    def __init__(self, work: Path):
        self.work = work
        self.tried, self.failed, self.shown = Counter(), Counter(), set()
        self.seconds = Counter()

    def attempt(self, name: str, call: Callable[[], object], what: str = '') -> None:
        """Count a call, and show the first failure of each kind and place."""
        began = time.monotonic()
        self.tried[name] += 1
        try:
            call()
        except Exception as error:
            self.failed[name] += 1
            where = traceback.extract_tb(error.__traceback__)[-1]
            kind = (name, type(error).__name__, where.filename, where.lineno)
            if kind not in self.shown:
                self.shown.add(kind)
                text = str(error)[-1500:]
                print(f'FAILED {name} {what}: {kind[1]} at {kind[2]}:{kind[3]}\n{text}', flush=True)
        self.seconds[name] += time.monotonic() - began

    def report(self) -> None:
        print(f'\n{"what":52}{"tried":>8}{"failed":>8}{"seconds":>9}')
        for name, number in self.tried.items():
            print(f'{name:52}{number:8,}{self.failed[name]:8,}{self.seconds[name]:9.0f}')
        total, failed = sum(self.tried.values()), sum(self.failed.values())
        print(f'{"all":52}{total:8,}{failed:8,}{sum(self.seconds.values()):9.0f}', flush=True)


# -------------------------------------------------------------------------------------------------
# kills


def run_kills(campaign: Campaign, place: Path, number: int, rng: random.Random) -> None:
    from scenarios import BEGINNING, SCENARIOS, of_training_over

    work = campaign.work / 'killed'
    for name, scenario in SCENARIOS.items():
        calls, expected = scenario.run_whole(place, campaign.work / f'whole-{name}')
        attempt_kills(
            campaign,
            f'kills: {scenario.script} ({name})',
            partial(scenario.kill_and_finish, place, work),
            [rng.randint(1, calls) for _ in range(round(number * scenario.share))],
            expected,
        )
    whole = campaign.work / 'whole-over'
    shutil.copytree(place, whole)
    calls = BEGINNING.start(whole)
    attempt_kills(
        campaign,
        'kills: train.py over an earlier run',
        partial(BEGINNING.kill_and_finish, place, work),
        [rng.randint(1, calls // 2) for _ in range(number - campaign.tried.total())],
        expected=of_training_over(whole),
    )


def attempt_kills(
    campaign: Campaign, name: str, kill: Callable, calls: list[int], expected: object
) -> None:
    def check(kill_at):
        assert kill(kill_at) == expected, 'other results than of what was never killed'

    for kill_at in calls:
        campaign.attempt(name, partial(check, kill_at), f'at call {kill_at}')


# -------------------------------------------------------------------------------------------------
# changed bytes and inputs


def run_corruptions(campaign: Campaign, number: int, rng: random.Random) -> None:
    from inputs import CORRUPTIBLE

    for name, (share, make, check) in CORRUPTIBLE.items():
        where = campaign.work / f'corrupt-{name.replace(" ", "-")}'
        where.mkdir()
        files = make(where)
        for _ in range(round(number * share)):
            path = rng.choice(files)
            campaign.attempt(f'changed bytes: {name}', partial(check, path, rng), path.name)


def run_inputs(campaign: Campaign, place: Path, number: int, rng: random.Random) -> None:
    import inputs as made_up
    from scenarios import check_script, script_cases

    where = campaign.work / 'inputs'
    where.mkdir()
    kinds = {
        'command lines': (0.4, made_up.COMMAND_LINES, lambda x: made_up.check_command_line(*x)),
        'config files': (0.25, made_up.CONFIG_FILES, lambda x: made_up.check_config_file(x, where)),
        'datasets': (0.18, made_up.DATASETS, lambda x: made_up.check_dataset(*x, where)),
        'checkpoints': (0.16, made_up.CHANGES, lambda x: made_up.check_checkpoint(x, where)),
    }
    for name, (share, strategy, check) in kinds.items():
        attempt_examples(campaign, name, strategy, check, wanted=round(number * share))
    for script, arguments in script_cases(number // 100, rng):
        campaign.attempt(
            'scripts with odd settings',
            partial(check_script, (script, arguments), place, campaign.work / 'script'),
            f'{script} {" ".join(arguments)[-300:]}',
        )


def attempt_examples(campaign: Campaign, name: str, strategy, check: Callable, wanted: int) -> None:
    """Check so many examples. hypothesis ends early where it has seen all: then it begins anew."""

    def each(value):
        if campaign.tried[name] < wanted:
            campaign.attempt(name, partial(check, value), repr(value)[:300])

    rules = dict(deadline=None, database=None, suppress_health_check=list(HealthCheck))
    for attempt in range(100):
        left = wanted - campaign.tried[name]
        if left <= 0:
            return
        run = settings(max_examples=left, **rules)(given(strategy)(each))
        hypothesis_seed(seed + attempt)(run)()


# -------------------------------------------------------------------------------------------------
# all of it


def main() -> int:
    configure(globals())
    from inputs import read_scripts_once
    from scenarios import make_place, warm_up

    torch.set_num_threads(1)
    warm_up()
    rng = random.Random(seed)
    work = Path(folder or tempfile.mkdtemp(prefix='faults-'))
    campaign = Campaign(work)
    (work / 'place').mkdir(parents=True)
    place = make_place(work / 'place')
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        if kills:
            run_kills(campaign, place, kills, rng)
        run_corruptions(campaign, corruptions, rng)
        with pytest.MonkeyPatch.context() as patch:
            read_scripts_once(patch)
            patch.chdir(work)
            patch.setattr(sys, 'stdout', Quiet(sys.stdout))
            run_inputs(campaign, place, inputs, rng)
    except KeyboardInterrupt:
        print('stopped: these were tried')
    campaign.report()
    if not folder:
        shutil.rmtree(work)
    return 1 if campaign.failed else 0


class Quiet:
    """Standard output without what --help prints."""

    def __init__(self, stream):
        self.stream = stream

    def write(self, text: str) -> None:
        caller = sys._getframe(1).f_globals['__name__']
        if caller == '__main__':
            self.stream.write(text)

    def flush(self) -> None:
        self.stream.flush()


if __name__ == '__main__':
    sys.exit(main())
