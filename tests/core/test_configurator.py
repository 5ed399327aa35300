"""The settings of a script: its page, the command line, config files, help and errors."""

import copy
import json
import keyword
import os
import pickle
import re
import runpy
import subprocess
import sys
import textwrap
from collections import OrderedDict
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from nanomla.core import configurator
from nanomla.core.configurator import Settings, UserError, configure

SCRIPT = '''\
"""Trains a toy, for tests,
in two lines.

This second paragraph stays out of --help.
"""
import sys
from nanomla.core.configurator import UserError, configure

# --- data ---
dataset = 'shakespeare'  # a folder of data/
batch_size = 12  # sequences in a micro-batch
tokens = 5 * 8 * 1024  # 5 micro-steps * 8 GPUs * 1024 tokens

# optimizer
learning_rate = 6e-4  # at the peak of the schedule, which is after the warmup; then down to min_lr
max_iters = 600_000
lr_decay_iters = 600_000  # usually max_iters,
                          # as in Chinchilla
min_lr = -0.5
compile = True  # torch.compile
out_dir = (
    'out')  # where results go

# ---
_hidden = 1
pair = wide = 3
nothing = None
raw = b'x'
root = (-1) ** 0.5
table = {'a': len('b')}
typed: int = 3
computed = len('abc')
if True:
    nested = 1
config = configure(globals())
late = 3
'''
MAIN = """
if dataset == 'trouble':
    raise UserError('data/trouble: is missing;\\nrun prepare.py')
if dataset == 'ctrl-c':
    raise KeyboardInterrupt
if dataset == 'bug':
    1 / 0
if min_lr == 8:
    config.apply_on_cpu()
heavy = sorted({'torch', 'numpy'} & set(sys.modules))
print(batch_size, learning_rate, compile, dataset, heavy)
"""
DEFAULTS = dict(
    dataset='shakespeare',
    batch_size=12,
    tokens=40960,
    learning_rate=6e-4,
    max_iters=600000,
    lr_decay_iters=600000,
    min_lr=-0.5,
    compile=True,
    out_dir='out',
)


@pytest.fixture(autouse=True)
def lab(tmp_path, monkeypatch):
    """An empty folder to stand in, with the script in it; the excepthook is put back afterwards."""
    monkeypatch.setattr(sys, 'excepthook', sys.excepthook)
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'toy.py').write_text(SCRIPT + MAIN)
    (tmp_path / 'config').mkdir()
    return tmp_path


def read(*argv):
    """-> (Settings, the script's globals) after these arguments."""
    script = {'__file__': os.path.abspath('toy.py'), 'late': 'untouched'}
    return configure(script, list(argv)), script


def error(*argv):
    with pytest.raises(UserError) as caught:
        read(*argv)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message


def write(text, name='config/x.py'):
    with open(name, 'wb') as file:
        file.write(text if isinstance(text, bytes) else textwrap.dedent(text).encode())
    return name


def run(*argv):
    here = str(Path(configurator.__file__).resolve().parents[2])
    return subprocess.run(
        [sys.executable, 'toy.py', *argv],
        capture_output=True,
        text=True,
        env={**os.environ, 'PYTHONPATH': here},
    )


# ---- lists and tables ----


@pytest.fixture
def nested(lab):
    """nested(*argv) -> Settings of a script with settings that are a list and a table."""
    write(
        """\
        n = 3  # a number
        seeds = [1, 2]  # a list
        runners = {}  # a table
        config = configure(globals())
        """,
        'nested.py',
    )
    return lambda *argv: configure({'__file__': os.path.abspath('nested.py')}, list(argv))


def test_lists_and_tables_have_values_of_any_depth(nested):
    assert nested() == dict(n=3, seeds=[1, 2], runners={})
    write(
        """\
        n = 4
        seeds = [n, n ** 2, -1]
        runners = dict(a=dict(rate=[1e-3, 2 * n], on=True), b={})
        """
    )
    runners = dict(a=dict(rate=[1e-3, 8], on=True), b={})
    assert nested('config/x.py') == dict(n=4, seeds=[4, 16, -1], runners=runners)
    config = nested('--seeds=[3]', "--runners={'a': {'rate': [1, 2]}}")
    assert config['seeds'] == [3]
    assert config['runners'] == dict(a=dict(rate=[1, 2]))
    assert config.given['seeds'] == '--seeds=[3]'
    assert nested('--runners=dict(a=dict(b=(1, 2)))')['runners'] == dict(a=dict(b=[1, 2]))


@pytest.mark.parametrize(
    'text, value',
    [
        ('a', ['a']),
        ('mha,mla_2', ['mha', 'mla_2']),
        ('[mha, mla]', ['mha', 'mla']),
        ("['mha','mla']", ['mha', 'mla']),
        ('1,2', [1, 2]),
    ],
)
def test_a_list_on_the_command_line_may_be_words_without_quotes(nested, text, value):
    assert nested(f'--seeds={text}')['seeds'] == value
    for wrong in ('a+b', 'a,,b', '3', 'True', 'print()', 'a.b', '[a'):
        with pytest.raises(UserError, match='seeds takes a list'):
            nested(f'--seeds={wrong}')


def test_a_machine_without_a_gpu_has_its_own_lists_and_tables(nested):
    write('seeds = [1, 2, 3]\non_cpu = dict(seeds=[7], runners=dict(a=dict(b=1)))')
    config = nested('config/x.py')
    assert config['seeds'] == [1, 2, 3]
    assert config.apply_on_cpu() == dict(seeds=[7], runners=dict(a=dict(b=1))) and config[
        'seeds'
    ] == [7]


@pytest.mark.parametrize(
    'line, message',
    [
        ('seeds = 3', 'seeds takes a list, [...], not 3 (int)'),
        ('seeds = dict(a=1)', 'seeds takes a list'),
        ('runners = [1]', 'runners takes a table, dict(name=value, ...), not [1] (list)'),
        ('n = [1]', 'a value is a literal'),
        ('seeds = [print()]', 'a value is a literal'),
        ('seeds = [x for x in (1, 2)]', 'a value is a literal'),
        ('runners = dict(a=open("x"))', 'a value is a literal'),
        ('runners = {1: 2}', 'a table has texts as keys'),
        ('runners = {"a": 1, "a": 2}', 'a table has texts as keys, each once'),
        ('runners = dict(**{})', 'a table has texts as keys'),
        ('runners = dict([("a", 1)])', 'a value is a literal'),
        ('runners = dict(a=nn)', 'nn is not a setting; did you mean n?'),
    ],
)
def test_what_is_no_list_or_table_is_reported(nested, line, message):
    write(line)
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        nested('config/x.py')
    assert str(caught.value).startswith('config/x.py:1: ')


def test_a_script_checks_values_inside_of_its_tables(nested):
    config = nested()
    assert config.checked('n', 5, 'here') == 5
    for name, value, message in (
        ('m', 5, "here: unknown setting 'm'"),
        ('n', 'five', 'here: n takes a whole number'),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            config.checked(name, value, 'here')


# ---- what a setting is ----


def test_settings_are_the_plain_literals_before_the_call():
    config, script = read()
    assert dict(config) == DEFAULTS
    assert {name: type(value) for name, value in config.items()} == {
        n: type(v) for n, v in DEFAULTS.items()
    }
    assert list(config) == list(DEFAULTS)
    assert config.given == {} and config.files == []


def test_a_docstring_that_looks_like_comments_above_a_setting():
    write("'''Doc.\n# not a comment'''\nx = 1\nconfig = configure(globals())\n", 'toy.py')
    assert read()[0] == {'x': 1}


def test_a_comment_that_does_not_fit_stands_below_its_value(capsys):
    write(
        """\
        x = (  # a first line,
            1  # a second one
        )
        y = 2  # beside it,
               # indented
        config = configure(globals())
        """,
        'toy.py',
    )
    text = printed_help(capsys, '--help')
    assert '--x=1  a first line, a second one' in text
    assert '--y=2  beside it, indented' in text


def test_the_page_ends_at_the_first_function_and_may_be_read_in_main():
    write(
        """\
        x = 1  # a setting
        def helper():
            pass
        NAMES = ['no', 'setting']
        def main():
            config = configure(globals())
        """,
        'toy.py',
    )
    config, script = read('--x=2')
    assert config == {'x': 2} and script['x'] == 2


def test_values_are_written_back_and_nothing_else():
    config, script = read('--batch_size=32')
    assert script.pop('late') == 'untouched' and script.pop('__file__')
    assert script == config == {**DEFAULTS, 'batch_size': 32}


def test_argv_is_the_command_line_when_not_given(monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['toy.py', '--batch_size=7'])
    assert configure({'__file__': 'toy.py'})['batch_size'] == 7


def test_globals_without_a_file_are_a_programmers_mistake():
    with pytest.raises(AssertionError):
        configure({})


# ---- command line ----


def test_left_to_right_and_later_wins():
    write('batch_size = 20')
    write('batch_size = 30', 'y')
    assert read('--batch_size=1', 'config/x.py')[0]['batch_size'] == 20
    assert read('config/x.py', '--batch_size=1')[0]['batch_size'] == 1
    assert read('config/x.py', 'y')[0]['batch_size'] == 30
    assert read('y', 'config/x.py', '--batch_size=1', '--batch_size=2')[0]['batch_size'] == 2


@pytest.mark.parametrize(
    'arg, value',
    [
        ('--batch_size=32', 32),
        ('--batch_size=1_000', 1000),
        ('--batch_size=4*8', 32),
        ('--batch_size=-3', -3),
        ('--batch_size= (7 // 2) % 2 + 2**3 ', 9),
        ('--learning_rate=1e-3', 1e-3),
        ('--learning_rate=1', 1.0),
        ('--learning_rate=3/4', 0.75),
        ('--compile=True', True),
        ('--compile=False', False),
        ('--compile=true', True),
        ('--compile=false', False),
        ('--dataset=a=b c', 'a=b c'),
        ('--dataset=', ''),
        ('--dataset=3', '3'),
        ('--dataset="q"', '"q"'),
        ('--dataset=batch_size', 'batch_size'),
    ],
)
def test_values_on_the_command_line(arg, value):
    name = arg[2:].partition('=')[0]
    config, _ = read(arg)
    assert config[name] == value and type(config[name]) is type(value)
    assert config.given == {name: arg}


@pytest.mark.parametrize(
    'arg',
    [
        '--batch_size=abc',
        '--batch_size=1.0',
        '--batch_size=8/2',
        '--batch_size=True',
        '--batch_size=1e3',
        '--batch_size=',
        '--batch_size="3"',
        '--batch_size=max_iters',
        '--batch_size=len("a")',
        '--batch_size=1/0',
        '--batch_size=[3]',
        '--batch_size=None',
        '--batch_size=1 << 3',
        '--batch_size=True + 1',
        '--batch_size=\n',
        '--learning_rate=True',
        '--learning_rate=fast',
        '--learning_rate=1j',
        '--learning_rate=(-1)**0.5',
        '--learning_rate=10.0**999',
        '--learning_rate=1e999',
        '--learning_rate=' + '9' * 400,
        '--learning_rate=nan',
        '--compile=1',
        '--compile=yes',
        '--compile=TRUE',
        '--compile=',
        '--batch_size=' + '-' * 9000 + '1',
        '--batch_size=' + '(' * 9000,
        '--batch_size=\0',
        '--batch_size=' + '9' * 9000,
        '--batch_size=\ud800',
    ],
)
def test_wrong_type_on_the_command_line(arg):
    message = error(arg)
    name, _, text = arg[2:].partition('=')
    takes = {
        'batch_size': 'whole number (int)',
        'learning_rate': 'number (float)',
        'compile': 'True or False',
    }
    assert f'{name} takes' in message and takes[name] in message
    assert message.startswith(f'--{name}=') and len(message) < 300


def test_wrong_type_is_reported_with_what_it_should_be():
    assert (
        error('--batch_size=1e3')
        == '--batch_size=1e3: batch_size takes a whole number (int), not 1000.0 (float)'
    )


def test_huge_powers_end_at_once():
    assert 'takes a whole number' in error('--batch_size=9**9**9**9')
    for value in (2**63, -(2**63) - 1):
        assert error(f'--batch_size={value}') == (
            f'--batch_size={value}: batch_size takes a whole number of 64 bits at most'
        )
    assert 'too large' in error(write('batch_size = 9 ** 9 ** 9 ** 9'))


def test_unknown_key_on_the_command_line():
    message = error('--batch_sise=3')
    assert message.startswith('--batch_sise=3:') and 'did you mean --batch_size?' in message
    assert 'did you mean --batch_size?' in error('--batch-size=3')
    assert 'did you mean --batch_size?' in error('--BATCH_SIZE=3')
    for arg in ('--zzz=1', '--=1', '--', '--late=1', '--_hidden=2', '--nested=1', '--on_cpu=1'):
        assert 'unknown setting' in error(arg)
    assert 'did you mean' not in error('--zzz=1') and '--help' in error('--zzz=1')


def test_a_missing_equals_sign():
    assert 'write --batch_size=32' in error('--batch_size', '32')
    assert 'write --batch_size=12' in error('--batch_size')
    assert 'write --batch_size=12' in error('--batch_size', '--compile=False')
    assert 'write --compile=True' in error('--compile')
    assert 'write --compile=True' in error('--compile', 'config/x.py')
    assert 'write --compile=False' in error('--compile', 'False')
    assert 'did you mean --batch_size' in error('--batch-size', '32')


# ---- config files ----


def test_a_config_file():
    name = write('''\
        """A docstring,

        of two paragraphs."""
        # a comment
        batch_size = 2 * 6 + -1  # arithmetic
        learning_rate = 1
        max_iters = 5_000
        lr_decay_iters = max_iters // 2
        tokens = (batch_size *
                  lr_decay_iters)
        dataset = 'text'
        out_dir = dataset
        compile = False
        ''')
    config, _ = read(name)
    assert config == dict(
        batch_size=11,
        learning_rate=1.0,
        max_iters=5000,
        lr_decay_iters=2500,
        tokens=27500,
        dataset='text',
        out_dir='text',
        compile=False,
        min_lr=-0.5,
    )
    assert type(config['learning_rate']) is float
    assert config.files == [name]
    assert (
        config.given['lr_decay_iters'] == 'config/x.py:8'
        and config.given['tokens'] == 'config/x.py:9'
    )


def test_names_not_set_in_the_file_have_their_current_value():
    write('lr_decay_iters = max_iters')
    assert read('config/x.py')[0]['lr_decay_iters'] == 600000
    assert read('--max_iters=70', 'config/x.py')[0]['lr_decay_iters'] == 70


def test_windows_line_ends_and_byte_order_mark():
    config, _ = read(write(b'\xef\xbb\xbfbatch_size = 3\r\n# c\r\nmax_iters = 4\r\n'))
    assert config['batch_size'] == 3 and config.given['max_iters'] == 'config/x.py:3'


@pytest.mark.parametrize(
    'line, words',
    [
        ('batch_sise = 3', "unknown setting 'batch_sise'; did you mean batch_size?"),
        ('zzz = 3', "unknown setting 'zzz'; --help"),
        ('late = 3', 'unknown setting'),
        ("batch_size = '32'", "batch_size takes a whole number (int), not '32' (str)"),
        ('batch_size = 1.5', 'not 1.5 (float)'),
        ('batch_size = True', 'not True (bool)'),
        ('dataset = 3', 'dataset takes quoted text (str), not 3 (int)'),
        ('compile = 1', 'compile takes True or False (bool), not 1 (int)'),
        ('learning_rate = False', 'learning_rate takes a number (float), not False (bool)'),
        ('batch_size = learning_rate', 'not 0.0006 (float)'),
        (
            'batch_size = max_itres',
            '`max_itres`: max_itres is not a setting; did you mean max_iters?',
        ),
        ('batch_size = None', 'a value is a literal or arithmetic on literals'),
        ('batch_size = [1]', 'a value is a literal'),
        ('batch_size = 1 / 0', 'division by zero'),
        ('batch_size = "a" * 3', 'arithmetic takes numbers'),
        ('dataset = f"{batch_size}"', 'a value is a literal'),
        ('batch_size = len("abc")', '`len("abc")`: a value is a literal'),
        ('import os', '`import os` cannot stand in a config file'),
        ('print(1)', '`print(1)` cannot stand'),
        ('if compile:\n    batch_size = 3', 'cannot stand'),
        ('def f():\n    pass', 'cannot stand'),
        ('batch_size += 1', 'cannot stand'),
        ('batch_size: int = 1', 'cannot stand'),
        ('batch_size = max_iters = 1', 'cannot stand'),
        ('batch_size, max_iters = 1, 2', 'cannot stand'),
        ('"a second docstring"', 'cannot stand'),
        ('batch_size = ', 'syntax error'),
        ('batch_size = "', 'syntax error'),
        ('on_cpu = 3', 'write on_cpu = dict('),
        ('on_cpu = dict(3)', 'write on_cpu = dict('),
        ('on_cpu = dict(**{})', 'write on_cpu = dict('),
        ('on_cpu = {3: 4}', 'write on_cpu = dict('),
        ('on_cpu = {batch_size: 4}', 'write on_cpu = dict('),
        ('on_cpu = {**{}}', 'write on_cpu = dict('),
        ('on_cpu = dict(batch_sise=3)', 'did you mean batch_size?'),
        ('on_cpu = {"batch_size": 3.5}', 'batch_size takes a whole number (int), not 3.5 (float)'),
        ('on_cpu = dict(compile=print())', 'a value is a literal'),
    ],
)
def test_wrong_lines_in_a_config_file(line, words):
    write(f'"""Doc."""\n\n{line}\n')
    message = error('config/x.py')
    assert message.startswith('config/x.py:3: ') and words in message


def test_a_long_on_cpu_names_the_line_inside_it():
    write('on_cpu = dict(\n    batch_size=3,\n    dataset=4,\n)\n')
    assert error('config/x.py').startswith('config/x.py:3: dataset takes quoted text')


def test_odd_files():
    assert error(write(b'# \xc3\xa9\nbatch_size = 1\n# \xe9\n')).startswith(
        'config/x.py:3: not UTF-8'
    )
    assert error(write(b'batch_size = 1\0')).startswith('config/x.py:1: ')
    assert error(write('batch_size = ' + '-' * 20000 + '1')).startswith('config/x.py:1: ')
    assert error(write('batch_size = ' + '1+' * 2000 + '1')).startswith('config/x.py:1: ')
    assert 'is a directory' in error('config')
    assert 'cannot be read' in error('a\0b')
    assert 'cannot be read' in error('x' * 5000)


def test_a_missing_config_file(lab, monkeypatch):
    assert error('config/other.py') == 'config/other.py: no such config file; check the path'
    for name in ('train_gpt2', 'train_shakespeare_char', 'zebra'):
        write('', f'config/{name}.py')
    assert 'did you mean config/train_gpt2.py?' in error('config/train_gtp2.py')
    assert 'did you mean config/train_gpt2.py' in error('train_gpt2')
    assert 'did you mean config/train_shakespeare_char.py?' in error('shakespeare')
    assert 'did you mean config/train_gpt2.py?' in error('gpt2')
    assert 'did you mean' not in error('config/qqqq.py') and 'did you mean' not in error('')
    assert 'no such config file' in error('toy.py/x.py')
    os.mkdir('elsewhere')
    monkeypatch.chdir('elsewhere')  # then the config/ beside the script
    with pytest.raises(UserError, match='did you mean .*/config/train_gpt2.py'):
        configure({'__file__': str(lab / 'toy.py')}, ['config/train_gpt.py'])


def test_a_setting_without_its_dashes():
    assert 'write --batch_size=32' in error('batch_size=32')
    assert 'write --batch_size=32' in error('-batch-size=32')


def test_a_malicious_config_is_refused_and_not_executed():
    evil = "__import__('os').system('touch pwned')"
    open_it = "open('pwned', 'w')"
    for text in (
        evil,
        f'batch_size = {evil}',
        f'on_cpu = dict(batch_size={evil})',
        f'on_cpu = {{{evil}: 1}}',
        f'batch_size = 3 + {open_it}',
        f'dataset = f"{{{open_it}}}"',
        f'batch_size = (lambda: {open_it})()',
        f'batch_size = [{open_it} for _ in "a"][0]',
        f'[{open_it}]',
        f'class A({open_it}): pass',
    ):
        assert 'config/x.py:1: ' in error(write(text))
    assert 'takes a whole number' in error(f'--batch_size={evil}')
    assert read(f'--dataset={evil}')[0]['dataset'] == evil
    assert not os.path.exists('pwned')


# ---- on_cpu ----


def test_on_cpu_waits_for_the_cpu():
    write('on_cpu = dict(batch_size=3, learning_rate=1)\nbatch_size = 64\n')
    config, script = read('config/x.py')
    assert config['batch_size'] == script['batch_size'] == 64 and 'on_cpu' not in config
    assert config.apply_on_cpu() == {'batch_size': 3, 'learning_rate': 1.0}
    assert config['batch_size'] == script['batch_size'] == 3
    assert type(script['learning_rate']) is float
    assert config.given == {'batch_size': 'config/x.py:1', 'learning_rate': 'config/x.py:1'}
    assert read()[0].apply_on_cpu() == {}


def test_on_cpu_as_a_literal_dict():
    write("max_iters = 10\non_cpu = {\n    'batch_size': 3,\n    'max_iters': max_iters // 2,\n}")
    config, _ = read('config/x.py')
    assert config.apply_on_cpu() == {'batch_size': 3, 'max_iters': 5}
    assert config.given['max_iters'] == 'config/x.py:4'


def test_on_cpu_precedence():
    write('batch_size = 10\non_cpu = dict(batch_size=11, max_iters=12)', 'a')
    write('batch_size = 20', 'b')
    write('on_cpu = dict(batch_size=31)', 'c')

    def on_cpu(*argv):
        config, _ = read(*argv)
        config.apply_on_cpu()
        return config['batch_size'], config['max_iters']

    assert on_cpu('a') == (11, 12)
    assert on_cpu('b', 'a') == (11, 12)  # beats earlier files
    assert on_cpu('a', 'b') == (20, 12)  # loses to later ones, key by key
    assert on_cpu('a', 'c') == (31, 12) and on_cpu('c', 'a') == (11, 12)
    assert on_cpu('a', '--batch_size=1') == (1, 12)
    assert on_cpu('--max_iters=1', 'a') == (11, 1)  # to the command line, wherever it stands


# ---- what comes back ----


def test_echo():
    assert 'default' in read()[0].echo()
    write('\nlearning_rate = 1e-3\ndataset = "shakespeare"\n')
    config, _ = read('config/x.py', '--batch_size=8', '--out_dir=a\nb')
    assert config.echo() == (
        'batch_size = 8  (--batch_size=8)\n'
        'learning_rate = 0.001  (config/x.py:2)\n'
        "out_dir = 'a\\nb'  (--out_dir=a b)"
    )
    assert config.given['dataset'] == 'config/x.py:3'


def test_settings_of_an_earlier_run_fill_in_what_is_not_set():
    write('\nlearning_rate = 1e-3\n')
    config, script = read('config/x.py', '--batch_size=8')
    before = dict(learning_rate=0.5, batch_size=64, dataset='mine', out_dir='old', gone=1)
    config.adopt(before, 'a/last.pt', but=('out_dir',))
    assert (config['dataset'], script['dataset']) == ('mine', 'mine')
    assert (config['learning_rate'], config['batch_size']) == (1e-3, 8)
    assert config['out_dir'] != 'old' and 'gone' not in config and 'dataset' not in config.given
    assert "dataset = 'mine'  (a/last.pt)" in config.echo()
    changes = config.differences(before, but=('out_dir',)).split(', ')
    assert sorted(changes) == ['batch_size=8 (was 64)', 'learning_rate=0.001 (was 0.5)']
    assert config.differences(dict(config)) == ''
    with pytest.raises(UserError, match='a/last.pt: max_iters takes a whole number'):
        config.adopt(dict(max_iters='many'), 'a/last.pt')


def test_settings_travel_as_a_plain_dict():
    config, _ = read('--batch_size=8')
    assert isinstance(config, Settings) and isinstance(config, dict)
    for plain in (
        pickle.loads(pickle.dumps(config)),
        copy.deepcopy(config),
        json.loads(json.dumps(config)),
    ):
        assert plain == config and type(plain) in (dict, OrderedDict)
    assert b'configurator' not in pickle.dumps(
        config
    )  # torch.load(weights_only=True) would refuse it


def test_a_user_error_is_one_line():
    assert issubclass(UserError, ValueError)
    assert str(UserError('what\n  where\r\n\nwhat to do\n')) == 'what where what to do'


# ---- help ----


def printed_help(capsys, *argv):
    with pytest.raises(SystemExit) as caught:
        read(*argv)
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 100
    return text


def test_help_of_a_module_names_the_command_that_starts_it(capsys, monkeypatch):
    """A module that is started by python -m knows its name; its file would not run by itself."""
    monkeypatch.syspath_prepend('.')
    monkeypatch.setattr(sys, 'argv', ['toy', '--help'])
    with pytest.raises(SystemExit):
        runpy.run_module('toy', run_name='__main__')
    assert 'usage: python -m toy [config/x.py ...]' in capsys.readouterr().out


def test_help_names_a_script_by_its_path_from_here(capsys, monkeypatch):
    here = os.getcwd()
    monkeypatch.chdir('..')
    with pytest.raises(SystemExit):
        configure({'__file__': os.path.join(here, 'toy.py')}, ['--help'])
    path = os.path.join(os.path.basename(here), 'toy.py')
    assert f'usage: python {path} [config/x.py ...]' in capsys.readouterr().out


def test_help(capsys):
    text = printed_help(capsys, '--help')
    assert text == printed_help(capsys, '-h') == printed_help(capsys, '--batch_size=12', '-h')
    assert 'usage: python toy.py [config/x.py ...] [--key=value ...]' in text
    assert '\nTrains a toy, for tests, in two lines.\n' in text and 'second paragraph' not in text
    assert [line.strip() for line in text.splitlines() if line and line[0] not in ' uT'] == [
        'data',
        'optimizer',
    ]
    lines = {
        line.split('=')[0].strip(): line for line in text.splitlines() if line.startswith('  --')
    }
    assert list(lines) == [f'--{name}' for name in DEFAULTS]
    assert lines['--dataset'].split() == ["--dataset='shakespeare'", 'a', 'folder', 'of', 'data/']
    assert lines['--max_iters'] == '  --max_iters=600000'
    assert lines['--out_dir'].endswith('where results go')
    assert 'usually max_iters, as in Chinchilla' in lines['--lr_decay_iters']
    column = lines['--batch_size'].index('sequences')
    assert (
        lines['--compile'].index('torch.compile')
        == lines['--learning_rate'].index('at the peak')
        == column
    )
    assert '\n' + ' ' * column + 'min_lr\n' in text  # the end of a wrapped comment
    assert (
        text.index('\ndata')
        < text.index('--batch_size')
        < text.index('\noptimizer')
        < text.index('--min_lr')
    )


def test_help_shows_the_value_that_files_and_arguments_give(capsys):
    write('batch_size = 64\nmax_iters = 600000\n')
    text = printed_help(capsys, 'config/x.py', '--compile=false', '--help')
    assert '--batch_size=12' in text and 'now 64  (config/x.py:1)' in text
    assert 'now False  (--compile=false)' in text and text.count('now ') == 2


def test_help_comes_even_with_a_mistake(capsys):
    text = printed_help(capsys, '--batch_sise=3', '--help')
    assert '--min_lr' in text and 'error: --batch_sise=3: unknown setting' in text


def test_help_stays_readable_with_long_defaults(capsys):
    write(
        f'# a\n# b\nlong = {"word " * 60!r}  # its comment\nx = 1\nconfig = configure(globals())\n',
        'toy.py',
    )
    text = printed_help(capsys, '-h', '--long=' + 'z' * 300)
    assert '\na\nb\n' in text and 'its comment' in text


# ---- how a script ends ----


def test_a_run():
    write('batch_size = 64\non_cpu = dict(learning_rate=0.25)')
    done = run('config/x.py', '--compile=False', '--min_lr=8')
    assert (done.returncode, done.stdout, done.stderr) == (0, '64 0.25 False shakespeare []\n', '')


def test_help_in_a_run_exits_with_0_and_imports_nothing_heavy():
    done = run('--help')
    assert done.returncode == 0 and done.stdout.startswith('usage: ') and done.stderr == ''


def test_a_reader_that_has_seen_enough_is_no_error():
    here = str(Path(configurator.__file__).resolve().parents[2])
    done = subprocess.Popen(
        [sys.executable, '-u', 'toy.py', '--help'],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, 'PYTHONPATH': here},
    )
    done.stdout.close()  # before anything is written
    assert done.stderr.read() == b'' and done.wait() == 0


@pytest.mark.parametrize(
    'arg, code, stderr',
    [
        (
            '--batch_sise=3',
            2,
            "error: --batch_sise=3: unknown setting 'batch_sise'; did you mean --batch_size?\n",
        ),
        ('--dataset=trouble', 2, 'error: data/trouble: is missing; run prepare.py\n'),
        ('--dataset=ctrl-c', 130, 'interrupted\n'),
    ],
)
def test_exit_codes(arg, code, stderr):
    done = run(arg)
    assert (done.returncode, done.stderr, done.stdout) == (code, stderr, '')


def test_any_other_error_keeps_its_traceback():
    done = run('--dataset=bug')
    assert done.returncode == 1
    assert done.stderr.startswith('Traceback') and done.stderr.endswith(
        'ZeroDivisionError: division by zero\n'
    )


def test_only_the_standard_library_is_imported():
    with open(configurator.__file__) as file:
        names = {
            line.split()[1].partition('.')[0]
            for line in file
            if line.startswith(('import ', 'from '))
        }
    assert names <= sys.stdlib_module_names


# ---- properties ----

NAMES = st.from_regex(r'[a-z][a-z0-9_]{0,9}', fullmatch=True).filter(
    lambda name: not keyword.iskeyword(name) and name != 'on_cpu'
)
KINDS = {
    int: st.integers(-(2**63), 2**63 - 1),
    float: st.floats(allow_nan=False, allow_infinity=False),
    bool: st.booleans(),
    str: st.text(st.characters(exclude_categories=['Cs'], exclude_characters='\0')),
}


@st.composite
def pages(draw):
    """-> [(name, default, new value)]: a page of settings and what a person makes of it."""
    names = draw(st.lists(NAMES, unique=True, max_size=5))
    kinds = [draw(st.sampled_from(sorted(KINDS, key=str))) for _ in names]
    return [(name, draw(KINDS[kind]), draw(KINDS[kind])) for name, kind in zip(names, kinds)]


@hypothesis_settings(max_examples=100, deadline=None)
@given(pages())
def test_file_and_command_line_give_the_same(page):
    write(
        ''.join(f'{name} = {old!r}  # c\n' for name, old, _ in page)
        + 'config = configure(globals())\n',
        'toy.py',
    )
    write(''.join(f'{name} = {new!r}\n' for name, _, new in page))
    assert read()[0] == {name: old for name, old, _ in page}
    from_file, globals_file = read('config/x.py')
    from_line, globals_line = read(*(f'--{name}={new}' for name, _, new in page))
    assert from_file == from_line == {name: new for name, _, new in page}
    assert globals_file == globals_line
    for name, old, _ in page:
        assert type(from_file[name]) is type(from_line[name]) is type(old)


WILD = st.text(
    st.characters(exclude_categories=())
)  # lone surrogates too, as os.fsdecode makes them
SUMS = st.text('0123456789+-*/%()._e \'"\n#,jTrue', max_size=30)
ARGUMENTS = st.one_of(
    WILD,
    WILD.map('--{}'.format),
    st.sampled_from(['-h', '--help', 'config', 'config/x.py']),
    st.builds('--{}={}'.format, st.sampled_from(sorted(DEFAULTS)), st.one_of(SUMS, WILD)),
    st.builds('{}={}'.format, WILD, WILD),
)
FILES = st.one_of(
    st.binary(),
    WILD.map(lambda text: text.encode(errors='replace')),
    st.lists(
        st.builds(
            '{} = {}'.format,
            st.sampled_from([*DEFAULTS, 'on_cpu', 'x']),
            st.one_of(SUMS, st.builds('dict(batch_size={})'.format, SUMS)),
        )
    ).map(lambda lines: '\n'.join(lines).encode()),
)


@hypothesis_settings(max_examples=250, deadline=None)
@given(st.lists(ARGUMENTS, max_size=4), FILES)
@example(['--tokens=0x' + 'f' * 10000], b'')
@example(['--min_lr=2**1000*2**1000'], b'min_lr = 1e308 * 10')
def test_no_text_gives_anything_but_success_or_a_user_error(argv, file):
    write(file)
    try:
        config, script = read(*argv)
    except UserError as error:
        assert len(str(error).splitlines()) == 1
    except SystemExit as end:
        assert end.code == 0 and ('-h' in argv or '--help' in argv)
    else:
        config.apply_on_cpu()
        assert {name: type(value) for name, value in config.items()} == {
            n: type(v) for n, v in DEFAULTS.items()
        }
        assert all(script[name] == value for name, value in config.items())
        assert config.echo()
