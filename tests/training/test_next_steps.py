"""The commands that a script prints at its end can be typed as they stand."""

import re
import shlex
from pathlib import Path

import pytest
from helpers import ROOT, TEXT, TINY, run, words
from llamas import byte_tokenizer

from model import GPT, GPTConfig
from nanomla.core import configurator, figures, token_files
from nanomla.core.files import STARTED_BY_A_SCRIPT
from nanomla.training import next_steps


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    """Each test in a folder of its own; whoever started pytest is not to matter."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(STARTED_BY_A_SCRIPT, raising=False)


def commands(printed):
    """Return the words of each command below `next:`, without python."""
    found = re.search(r'^next:\n((?:  python .*\n)+)', printed, re.M)
    return [shlex.split(line)[1:] for line in found[1].splitlines()]


def check(command):
    """Read the arguments of a command as its script does."""
    script, *arguments = command
    also = 'train.py' if Path(script).name == 'compare.py' else None
    if not arguments[0].startswith(('--', str(ROOT))):
        arguments = arguments[1:]  # the SOURCE of convert_mla.py
    configurator.configure({'__file__': script}, arguments, also)


def prepare(name, *arguments):
    run(f'data/{name}/prepare.py', arguments)


def test_a_run_ends_with_commands_that_work(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(figures, 'curve', lambda log, picture: None)
    token_files.write_text(tmp_path / 'text', TEXT, 'char', 'A tale of a cat')
    run('train.py', words(TINY | dict(out_dir='my run', pos='rope')))
    printed = capsys.readouterr().out
    sample, evaluate, convert = commands(printed)
    names = [Path(command[0]).name for command in (sample, evaluate, convert)]
    assert names == ['sample.py', 'eval.py', 'convert_mla.py']
    assert max(len(line.replace(str(ROOT) + '/', '')) for line in printed.splitlines()) <= 120
    check(evaluate)
    run('sample.py', [*sample[1:], '--max_new_tokens=3', '--num_samples=1', '--device=cpu'])
    run('convert_mla.py', [*convert[1:], '--device=cpu', '--calibration_tokens=999'])
    assert Path('my run-mla/ckpt.pt').exists()
    heal, *others = commands(capsys.readouterr().out)
    assert Path(heal[0]).name == 'train.py'
    assert heal[1] == str(ROOT / 'config/heal_mla.py')
    for command in [heal, *others]:
        check(command)
    steps = ['--max_iters=2', '--eval_iters=1', '--device=cpu', '--warmup_iters=1']
    run('train.py', [*heal[1:], *steps])
    assert Path('out-healed/ckpt.pt').exists()


def test_tokens_of_a_model_are_for_its_conversion(capsys):
    pytest.importorskip('tokenizers', reason='needs pip install -e .[convert]')
    byte_tokenizer(Path('llama'))
    Path('llama/config.json').write_text('{"bos_token_id": 256}')
    Path('text.txt').write_text(TEXT)
    prepare('text', 'text.txt', '--tokenizer=llama', '--num_proc=1', '--out=tokens')
    convert, train = commands(capsys.readouterr().out)
    assert convert[1:] == ['llama', '--out=out-mla', '--saving=0.5', '--calibration=tokens']
    check(convert)
    assert train[-1] == '--dataset=tokens'


@pytest.mark.parametrize(
    'settings, last',
    [
        (dict(), 'convert_mla.py o --out=o-mla --saving=0.75'),
        (dict(qk_norm=True), 'find_induction_heads.py --out_dir=o'),
        (dict(keep_checkpoints=4), 'find_induction_heads.py --sweep=o'),
    ],
)
def test_the_last_command_fits_the_run(settings, last, capsys):
    shape = dict(block_size=8, vocab_size=8, n_layer=1, n_head=1, n_embd=8)
    model = GPT(GPTConfig(**shape, qk_norm=settings.get('qk_norm', False)))
    next_steps.print_after_training(dict(out_dir='o', keep_checkpoints=0) | settings, model)
    command = commands(capsys.readouterr().out)[-1]
    assert [Path(command[0]).name, *command[1:]] == last.split()


@pytest.mark.parametrize(
    'name, arguments',
    [
        ('repeats', ['--documents=50']),
        ('repeats_fixed', ['--documents=50']),
        ('text', ['book.txt']),
        ('openorca', ['--input=rules', '--train=4', '--val=2']),
    ],
)
def test_a_prepared_dataset_is_followed_by_commands_that_name_it(name, arguments, capsys):
    Path('book.txt').write_text(TEXT)
    prepare(name, *arguments, '--out=a folder')
    found = commands(capsys.readouterr().out)
    assert {'--dataset=a folder', '--data=a folder'} & set(found[0])
    for command in found:
        if Path(command[0]).name != 'bench_adapters.py':  # its arguments are of another form
            check(command)


@pytest.mark.parametrize('name', ['shakespeare', 'shakespeare_char'])
def test_shakespeare_is_followed_by_commands_with_its_configs(name):
    source = (ROOT / 'data' / name / 'prepare.py').read_text()
    configs = re.findall(r'config/\w+\.py', source)
    assert configs
    for config in configs:
        table = (ROOT / config).read_text()
        assert f"dataset = '{name}'" in table


def test_a_script_that_another_one_started_prints_no_commands(monkeypatch, capsys):
    monkeypatch.setenv(STARTED_BY_A_SCRIPT, '1')
    next_steps.print_next_steps(['train.py'])
    assert capsys.readouterr().out == ''


def test_in_the_repository_paths_are_short(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    next_steps.print_next_steps(['train.py', 'config/heal_mla.py', '--dataset=a b'])
    assert capsys.readouterr().out == (
        "next:\n  python train.py config/heal_mla.py '--dataset=a b'\n"
    )
