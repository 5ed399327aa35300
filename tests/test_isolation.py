"""No test changes what another one finds, and nothing is left out without a word."""

import os
import signal
import subprocess
import sys

import pytest
import torch
from helpers import ROOT, Globals, a_process

LEAK = """
import os, pytest, signal, sys, torch

def test_one_changes_everything():
    torch.set_float32_matmul_precision('high')
    torch.set_default_dtype(torch.float64)
    torch.set_grad_enabled(False)
    torch.set_num_threads(1)
    torch.rand(3)
    sys.excepthook = print
    sys.argv = ['other']
    os.environ['LEFT_BEHIND'] = '1'
    os.chdir('/')
    signal.signal(signal.SIGTERM, signal.SIG_IGN)

def test_another_finds_nothing_of_it():
    assert torch.get_float32_matmul_precision() == 'highest'
    assert torch.get_default_dtype() == torch.float32
    assert torch.is_grad_enabled() and torch.get_num_threads() == 2
    assert torch.rand(1) == torch.rand(1, generator=torch.Generator().manual_seed(0))
    assert sys.excepthook is not print and sys.argv != ['other']
    assert 'LEFT_BEHIND' not in os.environ and os.getcwd() != '/'
    assert signal.getsignal(signal.SIGTERM) is not signal.SIG_IGN
"""
SKIPS = """
def test_without_a_gpu():
    pytest.skip('needs a CUDA GPU')

@pytest.mark.parametrize('i', range(3))
def test_without_a_package(i):
    pytest.importorskip('no_such_package')
"""
WHOLE_FILE = """
import pytest
pytest.importorskip('no_such_package')

def test_nothing():
    pass
"""


@pytest.fixture
def pytest_run(tmp_path, forked_python):
    """pytest_run(source, *options) -> pytest over `source`, with the hooks of tests/conftest.py."""

    def run(source, *options):
        (tmp_path / 'test_temporary.py').write_text(source)
        command = [sys.executable, '-m', 'pytest', '-q', '-p', 'conftest']
        settings = ['-c', str(ROOT / 'pyproject.toml'), '--rootdir', str(tmp_path)]
        environment = {k: v for k, v in os.environ.items() if not k.startswith('PYTEST')}
        return subprocess.run(
            [*command, *settings, *options, str(tmp_path)],
            cwd=tmp_path,
            env=environment | dict(PYTHONPATH=f'{ROOT}{os.pathsep}{ROOT / "tests"}'),
            capture_output=True,
            text=True,
        )

    return run


def test_a_test_finds_nothing_of_another_and_an_unexpected_skip_fails_the_run(pytest_run):
    done = pytest_run(LEAK + SKIPS)
    assert '2 passed, 4 skipped' in done.stdout, done.stdout
    assert done.returncode == pytest.ExitCode.TESTS_FAILED
    summary = done.stdout[done.stdout.index('skipped tests by reason') :]
    assert '1  needs a CUDA GPU\n' in summary
    assert "3  could not import 'no_such_package'" in summary
    assert summary.count('<- unexpected') == 1


@pytest.mark.slow
def test_skips_that_are_allowed_on_the_command_line_pass(pytest_run):
    done = pytest_run('import pytest\n' + SKIPS, '--expect-skip=could not import .*')
    assert done.returncode == 0 and '<- unexpected' not in done.stdout, done.stdout


@pytest.mark.slow
@pytest.mark.parametrize('source', ['import pytest\n' + SKIPS, WHOLE_FILE])
def test_skips_are_counted_by_several_processes(source, pytest_run):
    for processes in (0, 2):
        done = pytest_run(source, f'-n{processes}')
        assert done.returncode != 0
        assert "could not import 'no_such_package'" in done.stdout, done.stdout
        assert done.stdout.count('<- unexpected') == 1


def test_a_script_in_this_process_leaves_no_tf32():
    with a_process('script.py', ['--x=1']):
        assert sys.argv == ['script.py', '--x=1']
        torch.set_float32_matmul_precision('high')
        sys.excepthook = print
    assert torch.get_float32_matmul_precision() == 'highest'
    assert sys.excepthook is not print


def test_handlers_of_signals_come_back():
    before = Globals()
    handler = signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    before.restore()
    assert signal.getsignal(signal.SIGTERM) is handler
