"""What all tests share: globals that are put back, tiny models, and a count of what was skipped."""

import gc
import os
import random
import re
import signal
import subprocess
import sys
from collections import Counter

import forked
import numpy as np
import pytest
import torch
from helpers import Globals
from hypothesis import HealthCheck, settings

from model_mla import MLAConfig
from nanomla.checkpoints.native import MODELS
from nanomla.core import figures

# With several pytest processes on a machine (-n 2) each takes its share of the cores.
WORKERS = int(os.environ.get('PYTEST_XDIST_WORKER_COUNT', 1))
torch.set_num_threads(2 if WORKERS == 1 else 1)

# In the background of a script SIGINT is ignored, and every process that a test starts and wants to
# interrupt would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# No test fails because the machine is busy. In CI the examples are the same each time, so that a
# failure there is the fault of the change.
settings.register_profile(
    'nanomla',
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    derandomize=bool(os.environ.get('CI')),
)
settings.load_profile('nanomla')


# -------------------------------------------------------------------------------------------------
# the whole suite runs in one process a core


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """Let pytest-xdist share out the tests when all are run: `python -m pytest` without more."""
    option = config.option
    is_whole = config.args_source == pytest.Config.ArgsSource.TESTPATHS and not option.keyword
    wants_one_process = option.usepdb or option.capture == 'no' or 'gpu' in option.markexpr
    is_worker = hasattr(config, 'workerinput')
    if not config.pluginmanager.hasplugin('xdist') or is_worker:
        return
    if is_whole and not wants_one_process and option.numprocesses is None:
        option.numprocesses = min(os.cpu_count(), 8)
        option.dist = 'worksteal'  # a process that is done takes tests from one that is behind


def pytest_collection_finish():
    # What is imported stays: the collector need not go through it again, and no fork copies it.
    gc.freeze()


# -------------------------------------------------------------------------------------------------
# no test depends on what another left behind

AT_START = Globals()


def seed_torch(number: int) -> None:
    """Do what torch.manual_seed does for CPU and CUDA, which formats three tracebacks besides."""
    torch.default_generator.manual_seed(number)
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(number)


@pytest.fixture(autouse=True)
def globals_as_before():
    """Begin with the numerics and seeds of a fresh process, and put back what the test changes."""
    AT_START.restore_numerics()  # also after a fixture of a module, which lives longer than a test
    seed_torch(0)
    random.seed(0)
    np.random.seed(0)
    before = Globals()
    yield
    before.restore()


# A picture has a sixteenth of its pixels: they take longer than what they show.
figures.STYLE['savefig.dpi'] = forked.FEW_DOTS


@pytest.fixture(autouse=True)
def pictures_of_full_size(request, monkeypatch):
    """Draw the pictures of tests marked full_size as everywhere else."""
    if 'full_size' in request.keywords:
        monkeypatch.setitem(figures.STYLE, 'savefig.dpi', figures.DPI)


@pytest.fixture
def blank_pictures(request, monkeypatch):
    """
    Save pictures with nothing in them, here and in forks: a layout takes longer than most tests.

    Tests marked draws or full_size draw theirs all the same.
    """
    if {'draws', 'full_size'} & set(request.keywords):
        return
    save = figures.save

    def save_blank(fig, path, palette=False):
        from matplotlib.figure import Figure

        save(Figure(figsize=fig.get_size_inches()), path, palette)

    monkeypatch.setattr(figures, 'save', save_blank)
    monkeypatch.setenv(forked.BLANK_PICTURES, '1')


# -------------------------------------------------------------------------------------------------
# Python programs without the start of Python and torch


@pytest.fixture
def forked_python(monkeypatch):
    """Fork what is started as [sys.executable, script, ...], see forked.py."""
    monkeypatch.setattr(subprocess, 'Popen', forked.Popen)


def pytest_unconfigure():
    forked.SERVER.close()


# -------------------------------------------------------------------------------------------------
# what is skipped, and why

EXPECTED_SKIPS = [
    'needs a CUDA GPU',
    'needs Hopper or Ada',
    'needs network namespaces',
    'made for a GPU',
    'runs in the child process of test_under_the_interpreter',
    'needs llama.cpp: pip install xllamacpp',
    'needs a browser: neither chromium nor google-chrome is on the PATH',
]
if torch.cuda.is_available():  # formats and shapes that it does not support
    EXPECTED_SKIPS += ['the kernel refuses: .*']
if os.environ.get('TRITON_INTERPRET') == '1':
    EXPECTED_SKIPS += ['the child has Triton on the CPU', 'needs Triton.*']
if sys.platform != 'linux':
    EXPECTED_SKIPS += ['needs bash.*', 'needs /dev/full', 'needs Triton.*', 'reads /proc']

skips = Counter()  # reason -> tests and whole files
skipped_files = Counter()  # of these, files that importorskip ends


def pytest_addoption(parser):
    parser.addoption(
        '--expect-skip',
        action='append',
        default=[],
        metavar='REGEX',
        help='a reason for skipping tests that does not fail the run; may be given several times',
    )


def pytest_configure(config):
    EXPECTED_SKIPS.extend(config.getoption('--expect-skip'))


def pytest_collection_modifyitems(items):
    # What takes long in one piece begins first, so that no process has it left at the end.
    items.sort(key=lambda item: 'early' not in item.keywords)
    if torch.cuda.is_available():
        return
    for item in items:
        if 'gpu' in item.keywords:
            item.add_marker(pytest.mark.skip(reason='needs a CUDA GPU'))


def pytest_runtest_logreport(report):
    if report.skipped and not hasattr(report, 'wasxfail'):
        skips[reason_of(report)] += 1


def pytest_collectreport(report):
    if report.skipped:
        skips[reason_of(report)] += 1
        skipped_files[reason_of(report)] += 1


def reason_of(report) -> str:
    _, _, reason = report.longrepr
    return reason.removeprefix('Skipped: ')


def unexpected_skips() -> list[str]:
    return [reason for reason in skips if not any(re.fullmatch(e, reason) for e in EXPECTED_SKIPS)]


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session, exitstatus):
    """Fail a run that has left out what it should not, as if a test had failed."""
    worker = getattr(session.config, 'workeroutput', None)
    if worker is not None:
        # A report of a skipped file does not reach the process that counts.
        worker['skipped_files'] = dict(skipped_files)
    elif exitstatus == pytest.ExitCode.OK and unexpected_skips():
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    for reason, number in getattr(node, 'workeroutput', {}).get('skipped_files', {}).items():
        skips[reason] = max(skips[reason], number)


def pytest_terminal_summary(terminalreporter):
    if not skips:
        return
    unexpected = unexpected_skips()
    terminalreporter.section('skipped tests by reason')
    for reason, number in skips.most_common():
        note = '  <- unexpected: the run fails' if reason in unexpected else ''
        terminalreporter.write_line(f'{number:6d}  {reason}{note}')


# -------------------------------------------------------------------------------------------------
# models and tokens


@pytest.fixture
def tiny():
    """
    tiny(kind, **settings) -> a small model in eval mode.

    Every weight is random, norms and biases too, so that nothing hides behind a one or a zero, and
    large enough that each part moves the logits.
    """

    def make(kind='mha', **settings):
        seed_torch(0)
        shape = dict(block_size=24, vocab_size=40, n_layer=2, n_head=4, n_embd=32)
        model_class = MODELS[kind]
        if issubclass(model_class.Config, MLAConfig):
            shape |= dict(kv_lora_rank=12, qk_rope_head_dim=4)
        model = model_class(model_class.Config(**(shape | settings))).eval()
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.normal_(std=p.size(1) ** -0.5 if p.ndim == 2 else 0.2)
                if p.ndim == 1 and name.endswith('weight'):
                    p.add_(1)
        return model

    return make


@pytest.fixture
def tokens():
    """tokens(T, V=40, B=2) -> random ids (B, T), the same for the same T."""

    def make(T, V=40, B=2):
        return torch.randint(V, (B, T), generator=torch.Generator().manual_seed(T))

    return make
