"""
Triton's interpreter for the tests of kernels.

It must be chosen before Triton is imported. So the tests called `interpreted` run in a child
process, which one test of each file starts.
"""

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
from helpers import ROOT

CHILD = os.environ.get('TRITON_INTERPRET') == '1'
interpreted = pytest.mark.skipif(
    not CHILD, reason='runs in the child process of test_under_the_interpreter'
)
needs_triton = pytest.mark.skipif(
    CHILD or find_spec('triton') is None, reason='needs Triton, and not its interpreter'
)


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """Run Python in the repository, with these variables in its environment."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )


def run_interpreted(file: str, which: str) -> None:
    """Run the interpreted tests of `file` in a child process; `which` is their -m expression."""
    options = ['-q', '-p', 'no:cacheprovider', '-m', which, '-k', 'interpreted']
    environment = dict(TRITON_INTERPRET='1', CUDA_VISIBLE_DEVICES='')
    child = python('-m', 'pytest', *options, file, **environment)
    assert child.returncode == 0, child.stdout[-6000:] + child.stderr[-2000:]
    assert ' passed' in child.stdout
