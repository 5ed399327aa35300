"""What is printed never ends a run, and what the machine lacks is one line."""

import errno
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from helpers import ROOT

from nanomla.checkpoints import native
from nanomla.core import devices
from nanomla.core.configurator import UserError, machine_failure

needs_a_full_disk = pytest.mark.skipif(not os.path.exists('/dev/full'), reason='needs /dev/full')
SCRIPT = """
    # a script without torch
    size = 1
    import sys
    from nanomla.core.configurator import configure
    from nanomla.core.files import print_line
    configure(globals())
"""


def start(tmp_path, body, *arguments, **options):
    """Start a script whose settings are those of SCRIPT, with `body` after them."""
    path = tmp_path / 'script.py'
    path.write_text(textwrap.dedent(SCRIPT) + textwrap.dedent(body))
    environment = os.environ | dict(PYTHONPATH=str(ROOT)) | options.pop('env', {})
    command = [sys.executable, str(path), *arguments]
    options |= dict(env=environment, text=True, errors='replace')
    return subprocess.run(command, stderr=subprocess.PIPE, **options)


@needs_a_full_disk
@pytest.mark.parametrize(
    'body', ["print('x')", "print('x' * 10**6)", "print('x', flush=True)"], ids=str
)
def test_a_full_disk_behind_the_output_is_one_line(body, tmp_path):
    with open('/dev/full', 'w') as full:
        ended = start(tmp_path, body, stdout=full)
    assert ended.returncode == 1
    assert ended.stderr == 'error: cannot write the output: No space left on device\n'


@needs_a_full_disk
def test_a_run_goes_on_without_its_output(tmp_path):
    body = """
        print_line('a')
        print_line('b')
        open(sys.argv[0] + '.done', 'w').close()
    """
    with open('/dev/full', 'w') as full:
        ended = start(tmp_path, body, stdout=full)
    assert ended.returncode == 0
    assert ended.stderr == 'nothing more is printed: No space left on device\n'
    assert (tmp_path / 'script.py.done').exists()


def test_a_run_goes_on_without_its_reader(tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    ended = start(tmp_path, "print_line('a')\nprint_line('b')\n", stdout=writer)
    os.close(writer)
    assert ended.returncode == 0
    assert ended.stderr == 'nothing more is printed: Broken pipe\n'


def test_a_reader_that_has_seen_enough_is_no_error(tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    ended = start(tmp_path, "print('a' * 10**6)\n", stdout=writer)
    os.close(writer)
    assert (ended.returncode, ended.stderr) == (0, '')


@pytest.mark.parametrize('encoding', ['cp1252', 'ascii', 'latin-1'])
def test_any_text_is_printed_whatever_the_encoding(encoding, tmp_path):
    body = "print('道 Дао é')\nprint('道', file=sys.stderr)\nprint('\\udcff')\n"
    ended = start(tmp_path, body, stdout=subprocess.PIPE, env=dict(PYTHONIOENCODING=encoding))
    assert ended.returncode == 0, ended.stderr
    assert '\\u9053' in ended.stdout and '\\udcff' in ended.stdout
    assert '\\u9053' in ended.stderr


def test_an_output_that_is_closed_is_no_error(tmp_path):
    ended = start(tmp_path, "print('x')\n", stdout=None, preexec_fn=lambda: os.close(1))
    assert (ended.returncode, ended.stderr) == (0, '')


def test_no_setting_holds_a_null_character(tmp_path):
    (tmp_path / 'x.py').write_text("name = 'a\\0b'\n")
    path = tmp_path / 'script.py'
    path.write_text(
        "name = 'x'\nfrom nanomla.core.configurator import configure\nconfigure(globals())\n"
    )
    ended = subprocess.run(
        [sys.executable, str(path), str(tmp_path / 'x.py')],
        env=os.environ | dict(PYTHONPATH=str(ROOT)),
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 2 and 'null character' in ended.stderr


# -------------------------------------------------------------------------------------------------
# memory and compilers


class FromTheCompiler(Exception):
    __module__ = 'torch._inductor.exc'


@pytest.mark.parametrize(
    'error, words',
    [
        (MemoryError(), 'out of memory'),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 'out of memory'),
        (OSError(errno.ENOSPC, 'No space left on device'), 'cannot write the output'),
        (OSError(errno.ENOSPC, 'No space left on device', 'x/y'), 'cannot write x/y'),
        (FromTheCompiler('no C++ compiler'), 'use --compile=False'),
        (RuntimeError('a mistake'), ''),
        (FileNotFoundError(errno.ENOENT, 'No such file', 'x'), ''),
        (KeyError('x'), ''),
    ],
    ids=str,
)
def test_what_the_machine_lacks_is_told_from_mistakes(error, words):
    found = machine_failure(error)
    assert words in found and bool(words) == bool(found)
    assert '\n' not in found


def test_a_real_allocation_that_fails_is_recognised():
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**60)
    assert 'out of memory' in machine_failure(error.value)


SIZES = dict(block_size=16, n_layer=2, n_head=2, n_embd=16, n_kv_head=0)


@pytest.mark.parametrize('change', [dict(n_layer=10**9), dict(n_embd=10**8)], ids=str)
def test_a_model_beyond_the_memory_is_refused_at_once(change):
    with pytest.raises(UserError, match='parameters needs at least .* GiB of memory'):
        native.new_model('mha', SIZES | change, {}, 30)


def test_memory_is_asked_for_before_it_is_used(monkeypatch):
    monkeypatch.setattr(devices, 'host_memory', lambda: 2**30)
    devices.check_host_memory(2**30, 'x', 'use less')
    with pytest.raises(UserError, match='x needs at least 2 GiB of memory, and there are 1 GiB'):
        devices.check_host_memory(2**31, 'x', 'use less')


def test_the_bars_of_libraries_do_not_fill_a_log(tmp_path):
    body = """
        from tqdm import tqdm
        for _ in tqdm(range(100)):
            pass
    """
    done = start(tmp_path, body)
    assert done.returncode == 0 and done.stderr == ''
