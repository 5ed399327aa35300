"""
Triton's interpreter for the tests of kernels.

It must be chosen before Triton is imported. So the tests called `interpreted` run in a child
process. All files of a run share one, whose outcome a test of each file gives.
"""

import functools
import os
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
from helpers import ROOT

CHILD = os.environ.get('TRITON_INTERPRET') == '1'
interpreted = pytest.mark.skipif(
    not CHILD, reason='runs in the child process of test_under_the_interpreter'
)
needs_triton = pytest.mark.skipif(
    CHILD or find_spec('triton') is None, reason='needs Triton, and not its interpreter'
)


def replace_language_once() -> None:
    """
    Let Triton replace the functions of its language by the interpreter's once, for good.

    It does so at every launch and at every call within one, which took a third of the child's time.
    """
    from triton import language
    from triton.runtime import interpreter

    both = SimpleNamespace(__globals__=dict(tl=language, core=language.core))
    scope = interpreter._patch_lang(both)
    interpreter._patch_lang = lambda _: type(scope)()  # nothing to put back


def skip_overflow_checks() -> None:
    """
    Let the interpreter compute sums and products of integers once, not twice.

    The second is for an assertion that only its option `debug` makes, and took another third.
    """
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    assert not builder.options.debug
    builder.options = replace(builder.options, sanitize_overflow=False)


if CHILD:
    replace_language_once()
    skip_overflow_checks()


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """Run Python in the repository, with these variables in its environment."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )


@functools.cache
def run_child(which: str, files: tuple[str, ...]) -> subprocess.CompletedProcess:
    options = ['-q', '-p', 'no:cacheprovider', '-m', which, '-k', 'interpreted', '-rpfE']
    environment = dict(TRITON_INTERPRET='1', CUDA_VISIBLE_DEVICES='')
    return python('-m', 'pytest', *options, *files, **environment)


def run_interpreted(request: pytest.FixtureRequest, which: str) -> None:
    """
    Run the interpreted tests of all files that are tested in one child process, once.

    Asserts that those of the calling test's file have passed. which: their -m expression.
    """
    name = request.node.originalname
    paths = {item.path for item in request.session.items if item.originalname == name}
    files = tuple(sorted(str(path.relative_to(ROOT)) for path in paths))
    child = run_child(which, files)
    found = {}  # word in front -> lines of the summary about this file
    for line in child.stdout.splitlines():
        word, _, test = line.partition(' ')
        if test.startswith(str(request.path.relative_to(ROOT))):
            found.setdefault(word, []).append(line)
    bad = {'FAILED', 'ERROR'} & found.keys()
    assert 'PASSED' in found and not bad, child.stdout[-6000:] + child.stderr[-2000:]
