"""
Triton's interpreter for the tests of kernels. It must be chosen before Triton is imported, so the tests called
`interpreted` run in a child process, which one test of each file starts.
"""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CHILD = os.environ.get('TRITON_INTERPRET') == '1'
interpreted = pytest.mark.skipif(
    not CHILD, reason='runs in the child process of test_under_the_interpreter'
)
needs_triton = pytest.mark.skipif(
    CHILD or find_spec('triton') is None,
    reason='needs Triton (requirements-dev has it for Linux), and not its interpreter',
)


def python(*args, **env):
    return subprocess.run(
        [sys.executable, *args], cwd=ROOT, env=os.environ | env, capture_output=True, text=True
    )


def run_interpreted(file, which):
    """The interpreted tests of `file`, `which` is their -m expression, in a child process: all of them must pass."""
    child = python(
        '-m',
        'pytest',
        '-q',
        '-p',
        'no:cacheprovider',
        '-m',
        which,
        '-k',
        'interpreted',
        file,
        TRITON_INTERPRET='1',
        CUDA_VISIBLE_DEVICES='',
    )
    assert child.returncode == 0, child.stdout[-6000:] + child.stderr[-2000:]
    assert ' passed' in child.stdout
