"""train.py from end to end: tiny models on the CPU, mostly in this process."""

import contextlib
import dataclasses
import io
import json
import math
import os
import pickle
import random
import re
import resource
import shlex
import shutil
import signal
import socket
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import forked
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import (
    PATIENCE,
    ROOT,
    TEXT,
    TINY,
    exit_code,
    fill_disk,
    hf_gpt2,
    log,
    run,
    series,
    wait_until,
    words,
)

from model import GPT
from model_mla import MLAConfig
from nanomla.checkpoints import load
from nanomla.checkpoints import native as checkpoint
from nanomla.core import configurator, figures
from nanomla.core import devices as machine
from nanomla.core import files as file_tools
from nanomla.core import token_files as dataset
from nanomla.core.configurator import UserError
from nanomla.training import batches
from nanomla.training.launch import STOPPED
from nanomla.training.stability import LogitRecord
from nanomla.training.trainer import Trainer, get_lr_share

CONFIGS = [
    path
    for path in sorted((ROOT / 'config').glob('*.py'))
    if not path.stem.startswith(('compare', 'screen', 'study'))
]  # those are compare.py's
draw_curve = figures.curve

MODELS = dict(mha={}, mla=dict(attention='mla', kv_lora_rank=8, qk_rope_head_dim=4))
every_kind = pytest.mark.parametrize('kind', MODELS)


def train(*arguments, **settings):
    """train.py with TINY settings, changed by `settings`. Return whether it was stopped early."""
    return went([*arguments, *words(TINY | settings)])


def went(arguments):
    """Run train.py to its end, or until it is stopped and says so by its code."""
    try:
        run('train.py', arguments)
    except SystemExit as end:
        assert end.code in (0, STOPPED)
        return end.code == STOPPED
    return False


def moved(out='out'):
    """The only earlier run in a folder."""
    (folder,) = Path(out, 'previous').iterdir()
    return folder


def losses(out='out'):
    return series(out, 'train', 'loss')


def val_losses(out='out'):
    return series(out, 'eval', 'val_loss')


def files(folder):
    """Everything in a folder but the lock of its last run: path -> bytes."""
    paths = [path for path in sorted(Path(folder).rglob('*')) if path.name != 'lock']
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in paths
    }


def same(one, other):
    """Whether two nests of dicts, lists and tensors are equal bit for bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


@torch.no_grad()
def loss_by_hand(model, ids, T):
    """
    Mean nats of every token of `ids` but the first, in blocks of T.

    The last block begins earlier, for a full context.
    """
    nats, model = [], model.eval()
    for start in range(0, len(ids) - 1, T):
        begin = min(start, len(ids) - 1 - T)
        window = torch.tensor(ids[begin : begin + T + 1].astype(np.int64))
        of_token = F.cross_entropy(model(window[None, :-1])[0], window[1:], reduction='none')
        nats += of_token[start - begin :].tolist()
    assert len(nats) == len(ids) - 1
    return sum(nats) / len(nats)


def val_tokens(folder='text'):
    return np.fromfile(Path(folder, 'val.bin'), np.uint16)


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    """
    Each test in a folder of its own that has the dataset `text`, without git.

    A picture is drawn only where a test asks for one.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(dataset, 'DATA', tmp_path / 'data')
    monkeypatch.setattr(machine, 'commit', lambda: 'abc1234')
    monkeypatch.setattr(figures, 'curve', lambda log, picture: None)
    for name in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK'):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv('OMP_NUM_THREADS', '1')
    dataset.write_text(tmp_path / 'text', TEXT, 'char', 'A tale of a cat')


@pytest.fixture
def start():
    """
    start(*launcher, **settings) -> a process of train.py in the current folder.

    Its output is in the files out_dir + '.out', or goes to `stdout`, and in '.err'. launcher:
    options of Python; without any the process is forked.
    """
    started = []

    def begin(*launcher, stdout=None, **settings):
        settings = TINY | settings
        with (
            open(f'{settings["out_dir"]}.out', 'wb') as out,
            open(f'{settings["out_dir"]}.err', 'wb') as err,
        ):
            started.append(
                forked.Popen(
                    [sys.executable, *launcher, str(ROOT / 'train.py'), *words(settings)],
                    stdout=stdout or out,
                    stderr=err,
                )
            )
        return started[-1]

    yield begin
    for process in started:
        process.terminate()  # a launcher tells its workers
    for process in started:
        process.wait(PATIENCE)


# -------------------------------------------------------------------------------------------------
# what a run does, and its outputs


@every_kind
def test_a_run_learns_and_leaves_its_files(kind, monkeypatch, capsys):
    monkeypatch.setattr(figures, 'curve', draw_curve)
    train(max_iters=60, eval_interval=20, sample_tokens=20, **MODELS[kind])
    out, err = capsys.readouterr()
    assert sorted(files('out')) == ['ckpt.pt', 'curve.png', 'last.pt', 'log.jsonl']
    settings, *lines = log()
    assert settings['event'] == 'settings'
    assert settings['kind'] == kind
    assert settings['config']['n_embd'] == 16
    assert settings['data']['source'] == 'A tale of a cat'
    assert settings['commit'] == 'abc1234'
    assert settings['world'] == 1
    assert lines[-1]['event'] == 'end'
    assert lines[-1]['why'] == 'max_iters reached'
    assert lines[-1]['best_val_loss'] == min(val_losses().values())
    assert list(losses()) == [*range(1, 61)]
    assert list(val_losses()) == [20, 40, 60]
    assert losses()[60] < 0.8 * losses()[1]
    assert val_losses()[60] < val_losses()[20] < math.log(len(set(TEXT)))
    assert Path('out/curve.png').read_bytes()[:8] == b'\x89PNG\r\n\x1a\n'
    content = checkpoint.load('out')
    assert content['kind'] == kind
    assert content['step'] == 60
    assert content['meta']['chars'] == ''.join(sorted(set(TEXT)))
    assert 'optimizers' not in content
    assert 'optimizers' in checkpoint.load('out/last.pt')
    assert err == ''
    assert kind.upper() in out
    assert 'A tale of a cat' in out
    assert len(re.search(r'--- a sample ---\n(.*?)\n---\n', out, re.S)[1]) <= 20


def test_a_second_run_moves_the_first_whole_to_a_folder_of_its_own(capsys):
    train(keep_checkpoints=2)
    Path('out/step-by-step-notes.pt').write_text('of a person')
    first = {name: content for name, content in files('out').items() if 'notes' not in name}
    run_id = log()[0]['run_id']
    train(seed=1, max_iters=4)
    assert files(f'out/previous/{run_id}') == first
    assert moved().name == run_id
    assert f'it is now in out/previous/{run_id}' in capsys.readouterr().out
    assert log()[0]['event'] == 'settings'
    assert log()[0]['config']['seed'] == 1
    assert max(losses()) == 4
    assert not list(Path('out').glob('step-0*'))
    train(seed=2)
    earlier = sorted(Path('out/previous').iterdir())
    assert len(earlier) == 2
    assert files(f'out/previous/{run_id}') == first
    assert {log(folder)[0]['config']['seed'] for folder in earlier} == {1337, 1}
    assert [line['config']['seed'] for line in log() if line['event'] == 'settings'] == [2]
    assert Path('out/step-by-step-notes.pt').read_text() == 'of a person'


def test_a_run_that_never_saved_leaves_the_earlier_ones_where_they_are(monkeypatch):
    train()
    first, run_id = files('out'), log()[0]['run_id']

    def fail(self, step):
        raise UserError('torch.compile cannot work here')

    with monkeypatch.context() as broken:
        broken.setattr(Trainer, 'update', fail)
        for _ in range(2):
            with pytest.raises(UserError):
                train(seed=1)
    train(seed=2)
    assert files(f'out/previous/{run_id}') == first
    assert [line['event'] for line in log()].count('settings') == 1
    assert log()[0]['config']['seed'] == 2


def test_a_checkpoint_without_a_log_is_moved_as_well():
    """nanoGPT's out folder, say."""
    train()
    os.remove('out/log.jsonl')
    held = files('out')
    train(seed=1)
    assert files(moved()) == held


@pytest.mark.parametrize('accumulation', [1, 3])
def test_gpt_and_mla_read_the_same_text(accumulation, monkeypatch):
    cut, read = batches.Dataset.cut, {}
    for kind, seed in (('mha', 5), ('mla', 5), ('mha', 6)):
        seen = read[kind, seed] = []

        def watch(self, split, starts, seen=seen):
            x, y = cut(self, split, starts)
            if split == 'train':
                seen.append((x.tolist(), y.tolist()))
            return x, y

        monkeypatch.setattr(batches.Dataset, 'cut', watch)
        train(
            out_dir=f'{kind}{seed}',
            seed=seed,
            max_iters=5,
            gradient_accumulation_steps=accumulation,
            **MODELS[kind],
        )
    assert len(read['mha', 5]) == 5 * accumulation
    assert read['mha', 5] == read['mla', 5] != read['mha', 6]
    assert len({str(batch) for batch in read['mha', 5]}) == 5 * accumulation


def test_the_loss_of_a_step_is_the_mean_of_its_micro_batches():
    data = batches.Dataset('text', 16, seed=1337)
    for accumulation in (1, 3):
        train(out_dir=f'out{accumulation}', gradient_accumulation_steps=accumulation, max_iters=1)
        torch.manual_seed(1337)
        model = GPT(
            GPT.Config(**checkpoint.load(f'out{accumulation}')['model_args'])
        )  # as it was before its first step
        by_hand = [model(*data.train_batch(0, micro, 4)).item() for micro in range(accumulation)]
        assert losses(f'out{accumulation}')[1] == pytest.approx(
            sum(by_hand) / accumulation, abs=1e-6
        )


def test_the_largest_logits_are_logged_where_the_loss_is(capsys):
    settings = dict(max_iters=6, log_interval=2, gradient_accumulation_steps=2)
    train(out_dir='plain', **settings)
    train(log_max_logits=True, **settings)
    assert losses() == losses('plain')
    logits = series('out', 'train', 'max_logits')
    assert list(logits) == [2, 4, 6]
    assert torch.tensor(logits[6]).shape == (2, 2)  # layers, heads
    largest = series('out', 'train', 'max_logit')
    assert largest == {step: max(map(max, heads)) for step, heads in logits.items()}
    model = checkpoint.build(checkpoint.load('out/last.pt'))
    x, _ = batches.Dataset('text', 16, 1337).train_batch(5, 0, 4)
    expected = LogitRecord(model, '').measured(x)
    torch.testing.assert_close(torch.tensor(logits[6]), expected, rtol=1e-4, atol=0)
    assert 'max_logits' not in log('plain')[-2]


def test_a_run_repeats_itself():
    for out in ('one', 'two'):
        train(out_dir=out, dropout=0.2)
    assert losses('one') == losses('two')
    assert val_losses('one') == val_losses('two')
    assert same(checkpoint.load('one/last.pt')['model'], checkpoint.load('two/last.pt')['model'])


def test_on_a_terminal_there_is_a_bar(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, 'isatty', lambda: True, raising=False)
    train()
    out, err = capsys.readouterr()
    assert '8/8' in err
    assert 'step      8 | val loss' in out
    assert 'max_iters reached' in out


def test_the_config_is_echoed_with_where_each_setting_comes_from(capsys):
    Path('small.py').write_text('n_layer = 1\nbatch_size = 2 * 3\n')
    run(
        'train.py',
        [
            'small.py',
            *words({key: value for key, value in TINY.items() if key != 'batch_size'}),
            '--n_layer=2',
            '--n_kv_head=1',
        ],
    )
    out = capsys.readouterr().out
    assert '\nMQA, 0.' in out
    assert 'batch_size = 6  (small.py:2)' in out
    assert 'n_layer = 2  (--n_layer=2)' in out
    assert log()[0]['config']['batch_size'] == 6
    assert checkpoint.load('out')['config']['n_layer'] == 2


# -------------------------------------------------------------------------------------------------
# stop and go on

RICH = dict(
    dropout=0.2,
    gradient_accumulation_steps=2,
    ema_decay=0.9,
    max_iters=12,
    lr_decay_iters=12,
    eval_interval=3,
)


def stop_at(steps, monkeypatch, number=signal.SIGTERM, times=1):
    """From now on a run gets SIGTERM while it is busy with any of these steps (from 1)."""
    update = Trainer.update

    def stopped(self, step):
        if step + 1 in steps:
            for _ in range(times):
                os.kill(os.getpid(), number)
        return update(self, step)

    monkeypatch.setattr(Trainer, 'update', stopped)


@pytest.mark.parametrize(
    'kind, optimizer, schedule, how',
    [
        ('mha', 'adamw', 'cosine', 'max_iters'),
        ('mha', 'muon', 'wsd', 'SIGTERM'),
        ('mla', 'muon', 'cosine', 'max_iters'),
        ('mla', 'adamw', 'wsd', 'SIGTERM'),
        ('mla', 'muonclip', 'wsd', 'max_iters'),
    ],
)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(
    kind, optimizer, schedule, how, monkeypatch
):
    settings = RICH | MODELS[kind] | dict(optimizer=optimizer, schedule=schedule)
    if optimizer == 'muonclip':
        settings |= dict(optimizer='muon', muon_heads=True, qk_clip=0.1, log_max_logits=True)
    train(out_dir='whole', **settings)
    stops = [2, 7]  # before the first evaluation and between two of them
    if how == 'SIGTERM':
        stop_at(stops, monkeypatch)
    begin = 'scratch'
    for stop in stops:
        train(
            **settings | dict(init_from=begin, **dict(max_iters=stop) if how == 'max_iters' else {})
        )
        begin = 'resume'
        assert max(losses()) == checkpoint.load('out/last.pt')['step'] == stop
        assert log()[-1]['why'] == (
            'stopped by SIGTERM' if how == 'SIGTERM' else 'max_iters reached'
        )
    train(**settings | dict(init_from='resume'))
    assert losses() == losses('whole')
    assert len(losses()) == 12
    whole, out = val_losses('whole'), val_losses()
    assert {step: out[step] for step in whole} == whole
    assert list(whole) == [3, 6, 9, 12]
    one, other = checkpoint.load('whole/last.pt'), checkpoint.load('out/last.pt')
    for key in (
        'model',
        'optimizers',
        'average',
        'step',
        'best_val_loss',
        'best_step',
        'model_args',
    ):
        assert same(one[key], other[key])
    assert [line['event'] for line in log()].count('resume') == 2
    assert log()[0]['event'] == 'settings'
    assert not Path('out/previous').exists()


def test_seconds_the_best_loss_and_the_log_go_on():
    train(max_iters=4)
    with open('out/log.jsonl', 'a') as file:
        file.write('{"event": "tra')  # what a crash may leave
    before = torch.load('out/last.pt')
    assert 0 < before['seconds'] < 600
    torch.save(before | dict(seconds=9000.0, best_val_loss=0.5, best_step=3), 'out/last.pt')
    held = files('out')['ckpt.pt']
    train(init_from='resume')
    after = checkpoint.load('out/last.pt')
    assert 9000 < after['seconds'] < 9600
    assert (after['best_val_loss'], after['best_step']) == (
        0.5,
        3,
    )
    assert files('out')['ckpt.pt'] == held  # the better one
    assert [line['event'] for line in log()][:8] == [
        'settings',
        *['train'] * 4,
        'eval',
        'end',
        'resume',
    ]


def test_resuming_what_is_complete_changes_no_checkpoint(capsys):
    train()
    before = files('out')
    train(init_from='resume')
    after = files('out')
    assert {name: after[name] for name in ('ckpt.pt', 'last.pt')} == {
        name: before[name] for name in ('ckpt.pt', 'last.pt')
    }
    assert 'max_iters reached' in capsys.readouterr().out


def test_a_resumed_run_may_have_other_rates_and_dropout():
    train(max_iters=4)
    train(
        init_from='resume',
        learning_rate=1e-3,
        weight_decay=0.0,
        dropout=0.1,
        max_iters=6,
        decay_lr=False,
    )
    last = checkpoint.load('out/last.pt')
    assert [group['lr'] for group in last['optimizers'][0]['param_groups']] == [1e-3, 1e-3]
    for group in last['optimizers'][0]['param_groups']:
        assert group['weight_decay'] == 0
    assert last['model_args']['dropout'] == 0.1
    assert last['step'] == 6


def test_resume_alone_goes_on_with_the_settings_of_the_run(monkeypatch, capsys):
    settings = RICH | dict(optimizer='muon', schedule='wsd', keep_checkpoints=3)
    train(out_dir='whole', **settings)
    stop_at([7], monkeypatch)
    assert train(**settings)
    monkeypatch.setattr(dataset, 'prepare_if_missing', lambda name: prepared.append(name))
    prepared = []
    went(['--out_dir=out', '--init_from=resume'])
    assert prepared == [] and losses() == losses('whole')  # its dataset is only read
    assert val_losses() == val_losses('whole')
    one, other = checkpoint.load('whole/last.pt'), checkpoint.load('out/last.pt')
    assert same(one['model'], other['model']) and same(one['optimizers'], other['optimizers'])
    asked = ('out_dir', 'init_from')
    assert all(one['config'][key] == other['config'][key] for key in one['config'].keys() - asked)
    out = capsys.readouterr().out
    assert 'resumed at step 7 of 12 from out/last.pt' in out and 'settings that differ' not in out


def test_what_the_command_line_changes_is_said(capsys):
    train(max_iters=4)
    capsys.readouterr()
    went(['--out_dir=out', '--init_from=resume', '--max_iters=6', '--learning_rate=0.02'])
    out = capsys.readouterr().out
    changes = 'learning_rate=0.02 (was 0.01), max_iters=6 (was 4)'
    assert f'settings that differ from it: {changes}\n' in out
    assert checkpoint.load('out/last.pt')['config']['learning_rate'] == 0.02


def test_auto_resumes_where_there_is_something_to_resume():
    train(init_from='auto', max_iters=3)
    train(init_from='auto', max_iters=6)
    assert list(losses()) == [*range(1, 7)] and not Path('out/previous').exists()
    assert [line['event'] for line in log()].count('settings') == 1
    os.remove('out/last.pt')  # killed between its first ckpt.pt and its first last.pt
    held = files('out')
    train(init_from='auto', max_iters=3)
    assert files(moved()) == held and max(losses()) == 3


def test_a_damaged_state_is_not_begun_anew(capsys):
    """Even where to resume was nobody's wish."""
    train(max_iters=4)
    state = bytearray(Path('out/last.pt').read_bytes())
    state[len(state) // 2] ^= 1
    Path('out/last.pt').write_bytes(state)
    held = files('out')
    assert exit_code('train.py', words(TINY | dict(init_from='auto'))) == 2
    assert one_error(capsys, 'out/last.pt is damaged') and files('out') == held


def test_a_later_attempt_of_torchrun_goes_on(monkeypatch):
    """The first moves an earlier run aside, as it was asked to begin from another model."""
    train(out_dir='source', max_iters=2)
    train(max_iters=3)
    monkeypatch.setenv('TORCHELASTIC_RUN_ID', 'abc')
    monkeypatch.setenv('TORCHELASTIC_MAX_RESTARTS', '2')
    monkeypatch.setenv('TORCHELASTIC_RESTART_COUNT', '0')
    stop_at([5], monkeypatch)
    # stopped and saved, it ends with 0: torchrun would start it again after any other code
    assert not train(init_from='source', max_iters=8)
    assert max(losses()) == 5 and len(list(Path('out/previous').iterdir())) == 1
    monkeypatch.setenv('TORCHELASTIC_RESTART_COUNT', '1')
    train(init_from='source', max_iters=8)
    assert list(losses()) == [*range(1, 9)] and len(list(Path('out/previous').iterdir())) == 1


def test_data_is_prepared_before_the_processes_join(monkeypatch):
    """However long it takes: they wait for one another only so long."""
    calls, join = [], machine.join_processes

    def join_processes(*arguments):
        calls.append('joined')
        return join(*arguments)

    monkeypatch.setattr(dataset, 'prepare_if_missing', lambda name: calls.append(name))
    monkeypatch.setattr(machine, 'join_processes', join_processes)
    train(max_iters=1)
    assert calls == ['text', 'joined']


def test_a_terminal_that_lacks_the_letters_ends_no_run(monkeypatch):
    text = '道可道，非常道。名可名，非常名。' * 40
    dataset.write_text('data/道', text, 'char', 'Дао дэ цзин')
    output = io.BytesIO()
    monkeypatch.setattr(sys, 'stdout', io.TextIOWrapper(output, encoding='cp1252'))
    train(dataset='道', max_iters=2, sample_tokens=20, block_size=8)
    sys.stdout.flush()
    assert rb'\u0414\u0430\u043e' in output.getvalue() and rb'\u9053' in output.getvalue()
    assert log()[-1]['event'] == 'end' and Path('out/ckpt.pt').exists()


def test_counts_of_tokens_and_seconds_go_on():
    train(max_iters=6)
    before = log()[-1]
    assert before['train_seconds'] > 0 and before['event'] == 'end'
    run_id = checkpoint.load('out/last.pt')['run_id']
    train(init_from='resume', max_iters=12, batch_size=8)  # twice the tokens a step
    tokens = series('out', 'train', 'tokens')
    assert (
        tokens[6] == 6 * 64
        and tokens[12] == 6 * 64 + 6 * 128 == series('out', 'eval', 'tokens')[12]
    )
    assert log()[-1]['train_seconds'] > before['train_seconds']
    assert log()[-1]['seconds'] > before['seconds']
    assert checkpoint.load('out/last.pt')['run_id'] == checkpoint.load('out')['run_id'] == run_id
    assert {line['run_id'] for line in log() if 'run_id' in line} == {run_id}


def test_a_resumed_run_goes_on_in_wandb(monkeypatch):
    begun = []
    wandb = SimpleNamespace(
        init=lambda **about: begun.append(about), log=lambda *_, **__: None, Error=OSError
    )
    monkeypatch.setitem(sys.modules, 'wandb', wandb)
    train(max_iters=2, wandb_log=True)
    train(max_iters=4, init_from='resume')
    train(max_iters=2, wandb_log=True)
    ids = [about['id'] for about in begun]
    assert ids[0] == ids[1] == moved().name != ids[2]
    assert {about['resume'] for about in begun} == {'allow'}


def test_a_signal_ends_an_evaluation_which_is_made_up_for(monkeypatch):
    settings = RICH | dict(eval_interval=4)
    train(out_dir='whole', **settings)
    batches_of, cut = batches.Dataset.val_batches, iter([True, True])

    def interrupted(self, batch_size, most=0):
        step = next(cut, None)
        for number, batch in enumerate(batches_of(self, batch_size, most)):
            if step and number == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    monkeypatch.setattr(batches.Dataset, 'val_batches', interrupted)
    assert train(**settings)  # in the evaluation of step 4
    assert checkpoint.load('out/last.pt')['step'] == 4 and val_losses() == {}
    assert train(init_from='resume', **settings)  # and again, at once
    assert checkpoint.load('out/last.pt')['step'] == 4 and val_losses() == {}
    assert not train(init_from='resume', **settings)
    assert losses() == losses('whole') and val_losses() == val_losses('whole')
    one, other = checkpoint.load('whole'), checkpoint.load('out')
    assert one['step'] == other['step'] and same(one['model'], other['model'])


def test_a_reader_that_goes_away_does_not_stop_a_run(start):
    reader, writer = os.pipe()
    process = start(max_iters=60, eval_interval=60, stdout=writer)
    os.close(writer)
    os.read(reader, 100)
    os.close(reader)
    assert process.wait(PATIENCE) == 0
    assert checkpoint.load('out/last.pt')['step'] == 60 == log()[-1]['step']


def has_trained(log_path, word='"train"'):
    return log_path.exists() and word in log_path.read_text()


def test_signals_stop_a_process_that_can_be_resumed(start):
    running = {
        name: start(out_dir=f'my {name}', max_iters=10**6, eval_interval=10**6, log_interval=5)
        for name in ('SIGTERM', 'SIGUSR1')
    }
    for name, process in running.items():
        wait_until(partial(has_trained, Path(f'my {name}', 'log.jsonl')), process)
        process.send_signal(getattr(signal, name))
    for name, process in running.items():
        assert process.wait(PATIENCE) == STOPPED
        assert Path(f'my {name}.err').read_text() == ''
        assert log(f'my {name}')[-1]['why'] == f'stopped by {name}'
        line = Path(f'my {name}.out').read_text().splitlines()[-1]
        assert line.startswith('go on with: python train.py ')
        assert line.endswith(' --init_from=resume')
        step = checkpoint.load(f'my {name}/last.pt')['step']
        assert step == log(f'my {name}')[-1]['step'] > 0
        went(shlex.split(line.partition('train.py ')[2]) + [f'--max_iters={step + 2}'])
        assert (
            checkpoint.load(f'my {name}/last.pt')['step']
            == step + 2
            == max(val_losses(f'my {name}'))
        )


def test_a_signal_is_obeyed_after_the_step(monkeypatch):
    stop_at([3], monkeypatch)
    train(log_interval=1000, eval_interval=1000, max_iters=1000)
    assert checkpoint.load('out/last.pt')['step'] == log()[-1]['step'] == 3


def test_ctrl_c_saves_and_a_second_one_stops_at_once(monkeypatch, capfd):
    signal.signal(signal.SIGINT, signal.default_int_handler)
    stop_at([3], monkeypatch, signal.SIGINT)
    train(log_interval=1000, eval_interval=1000, max_iters=1000)
    assert checkpoint.load('out/last.pt')['step'] == log()[-1]['step'] == 3
    assert log()[-1]['why'] == 'stopped by SIGINT'
    out, err = capfd.readouterr()
    assert 'go on with: python train.py' in out
    assert 'Ctrl-C: this step is finished and saved' in err
    stop_at([5], monkeypatch, signal.SIGINT, times=2)
    with pytest.raises(KeyboardInterrupt):
        train(log_interval=1000, eval_interval=1000, max_iters=1000, init_from='resume')
    assert checkpoint.load('out/last.pt')['step'] == 3


def test_a_kill_at_any_moment_leaves_a_run_that_resumes(start):
    chance = random.Random(0)
    endless = dict(
        eval_interval=1,
        eval_iters=1,
        max_iters=10**6,
        optimizer='muon',
        ema_decay=0.9,
        always_save_checkpoint=True,
    )
    running = {f'out{i}': start(out_dir=f'out{i}', **endless) for i in range(4)}
    for out, process in running.items():
        wait_until(Path(out, 'last.pt').exists, process)
    for process in running.values():
        time.sleep(0.05 + 0.15 * chance.random())
        process.kill()
        process.wait()
    for out in running:
        best, last = checkpoint.load(f'{out}/ckpt.pt'), checkpoint.load(f'{out}/last.pt')
        assert best['step'] - last['step'] in (0, 1)  # the one is written before the other
        checkpoint.build(best), checkpoint.build(last)
        train(**endless | dict(out_dir=out, init_from='resume', max_iters=last['step'] + 2))
        assert checkpoint.load(f'{out}/last.pt')['step'] == last['step'] + 2
        assert log(out)[0]['event'] == 'settings'
        assert not list(Path(out).glob('*.partial'))


@pytest.mark.parametrize(
    'limit, why',
    [
        (dict(max_minutes=1e-6), 'stopped by max_minutes'),
        (dict(target_loss=99.0), 'target_loss reached: '),
    ],
)
def test_a_limit_ends_a_run_early(limit, why, capsys):
    train(**limit, max_iters=1000, lr_decay_iters=1000)
    assert log()[-1]['why'].startswith(why)
    assert why in capsys.readouterr().out
    stopped = checkpoint.load('out/last.pt')['step']
    assert stopped == max(losses()) <= 4
    train(init_from='resume', max_iters=stopped + 1)
    assert max(losses()) == stopped + 1


# -------------------------------------------------------------------------------------------------
# several processes


def by_torchrun(start, **settings):
    """Run train.py in two processes of torchrun; return exit code, stdout and stderr of each."""
    options = ['--standalone', '--nproc_per_node=2', '--log-dir=logs', '--redirects=3']
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv(forked.FORK_ITS_PROGRAMS, '1')
        launcher = start('-m', 'torch.distributed.run', *options, **settings)
    code, ended = launcher.wait(PATIENCE), []
    for rank in '01':
        texts = []
        for stream in ('stdout', 'stderr'):
            (path,) = Path('logs').rglob(f'{rank}/{stream}.log')
            texts.append(path.read_text())
        ended.append((code, *texts))
    return ended


def by_hand(start, **settings):
    """Run train.py in two processes with torchrun's variables; return what by_torchrun does."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    shared = dict(MASTER_ADDR='127.0.0.1', MASTER_PORT=port, WORLD_SIZE=2, LOCAL_WORLD_SIZE=2)
    processes = []
    with pytest.MonkeyPatch.context() as environment:
        for rank in (0, 1):
            for name, value in (shared | dict(RANK=rank, LOCAL_RANK=rank)).items():
                environment.setenv(name, str(value))
            processes.append(start(**settings))
            for end in ('out', 'err'):
                os.rename(f'{settings["out_dir"]}.{end}', f'{rank}.{end}')
    codes = [process.wait(PATIENCE) for process in processes]
    return [
        (code, Path(f'{rank}.out').read_text(), Path(f'{rank}.err').read_text())
        for rank, code in enumerate(codes)
    ]


@pytest.mark.parametrize(
    'launch, settings',
    [
        (by_torchrun, MODELS['mha']),
        (
            by_hand,
            MODELS['mla']
            | dict(optimizer='muon', ema_decay=0.9, schedule='wsd', qk_clip=0.1)
            | dict(log_max_logits=True),
        ),
    ],
)
def test_two_processes_are_one_with_more_accumulation(launch, settings, start):
    settings = settings | dict(gradient_accumulation_steps=4, max_iters=6, eval_interval=3)
    first, second = launch(start, out_dir='two', **settings)
    assert first[0] == second[0] == 0, (first, second)
    assert first[1].count('max_iters reached') == 1
    assert second[1] == ''
    train(out_dir='one', **settings)
    assert log('two')[0]['world'] == 2
    for event, key in (('train', 'loss'), ('eval', 'val_loss')):
        one, two = series('one', event, key), series('two', event, key)
        assert one.keys() == two.keys()
        assert max(abs(one[step] - two[step]) for step in one) < 1e-5
    if settings.get('qk_clip'):  # of the batches of both processes
        one, two = (series(out, 'train', 'max_logits') for out in ('one', 'two'))
        torch.testing.assert_close(torch.tensor(one[6]), torch.tensor(two[6]), rtol=1e-3, atol=1e-4)
    one, two = (checkpoint.load(out)['model'] for out in ('one', 'two'))
    for name in one:
        assert torch.allclose(one[name], two[name], atol=1e-4)


def test_steps_that_two_processes_cannot_share_are_refused(start):
    ended = by_hand(start, out_dir='odd', batch_size=3, gradient_accumulation_steps=3)
    line = (
        'error: 2 processes cannot share a step of 9 sequences '
        '(batch_size=3 x gradient_accumulation_steps=3): make it a multiple\n'
    )
    assert not Path('odd').exists()
    for code, _, err in ended:
        assert code == 2
        # without torch's warnings of a host that has no name
        assert re.sub(r'(?m)^\[W\d.*\n', '', err) == line


def launched(start, name, *options, **settings):
    """train.py by torchrun with two processes, whose step takes no time and whose log is silent."""
    silent = dict(max_iters=10**6, log_interval=10**6, eval_interval=10**6)
    torchrun = ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', *options]
    settings = dict(gradient_accumulation_steps=2) | silent | settings
    return start(*torchrun, out_dir=name, **settings)


@pytest.mark.slow
def test_processes_of_torchrun_stop_together_whatever_is_logged_when(start):
    process = launched(start, 'out')
    wait_until(partial(has_trained, Path('out/log.jsonl'), '"settings"'), process)
    time.sleep(2)
    asked = time.monotonic()
    process.terminate()
    assert process.wait(PATIENCE) != 0
    assert time.monotonic() - asked < 30  # after which torchrun kills
    assert checkpoint.load('out/last.pt')['step'] == log()[-1]['step'] > 0
    assert log()[-1]['why'].startswith('stopped by ')
    line = Path('out.out').read_text().splitlines()[-1]
    assert line == (
        'go on with: torchrun --standalone --nproc_per_node=2 '
        'train.py --out_dir=out --init_from=resume'
    )


def workers_of(process):
    """The process ids of torchrun's workers by rank."""
    found = {}
    for path in Path('/proc').glob('[0-9]*/environ'):
        with contextlib.suppress(OSError):
            environment = path.read_bytes().split(b'\0')
            parent = (path.parent / 'stat').read_text().rpartition(')')[2].split()[1]
            rank = [word[5:] for word in environment if word.startswith(b'RANK=')]
            if rank and int(parent) == process.pid:
                found[int(rank[0])] = int(path.parent.name)
    return found


@pytest.mark.slow
def test_a_worker_that_is_killed_costs_the_steps_since_the_last_save(start):
    def killed_at(last):
        wait_until(last.exists, process)
        os.kill(workers_of(process)[1], signal.SIGKILL)
        return checkpoint.load(last)['step']

    process = launched(start, 'out', '--max_restarts=2', eval_interval=20, max_iters=10**5)
    saved = killed_at(Path('out/last.pt'))
    wait_until(partial(has_trained, Path('out/log.jsonl'), '"resume"'), process)
    process.terminate()
    process.wait(PATIENCE)
    resumed = [line['step'] for line in log() if line['event'] == 'resume']
    assert len(resumed) == 1 and resumed[0] >= saved and not Path('out/previous').exists()


# -------------------------------------------------------------------------------------------------
# from other models


def nanogpt(path, compiled=False):
    """A checkpoint as nanoGPT's train.py writes it, causal masks and all."""
    args = dict(
        n_layer=2, n_head=2, n_embd=16, block_size=20, bias=True, vocab_size=64, dropout=0.1
    )
    model = GPT(GPT.Config(**args))
    for p in model.parameters():
        p.data.add_(torch.randn_like(p) * 0.1)
    state = model.state_dict() | {
        f'transformer.h.{i}.attn.bias': torch.ones(1, 1, 20, 20).tril() for i in range(2)
    }
    state = {('_orig_mod.' if compiled else '') + key: value for key, value in state.items()}
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    torch.save(
        dict(
            model=state,
            optimizer={},
            model_args=args,
            iter_num=5,
            best_val_loss=torch.tensor(2.5),
            config=dict(dataset='x'),
        ),
        path,
    )


@pytest.mark.parametrize('source', ['nanogpt file', 'nanogpt folder', 'gpt2 folder', 'mla run'])
def test_other_models_are_evaluated_and_go_on_where_they_are(source, monkeypatch, capsys):
    init_from, kind = 'source', 'mha'
    if source == 'nanogpt file':
        init_from = 'any/name.pt'
        nanogpt(init_from, compiled=True)
    elif source == 'nanogpt folder':
        nanogpt('source/ckpt.pt')
    elif source == 'gpt2 folder':
        hf_gpt2().save_pretrained('source')
    else:
        kind = 'mla'
        train(out_dir='source', **MODELS['mla'])
    capsys.readouterr()
    settings = {
        key: value
        for key, value in TINY.items()
        if key not in ('n_layer', 'n_head', 'n_embd', 'block_size')
    } | dict(init_from=init_from)
    model = load.load_model(init_from).model
    T = model.config.block_size
    evaluate, found = Trainer.evaluate, []
    monkeypatch.setattr(
        Trainer, 'evaluate', lambda self, stopping=None: found.append(evaluate(self)) or found[-1]
    )
    with pytest.raises(SystemExit) as end:
        run('train.py', words(settings | dict(eval_only=True)))
    by_hand = loss_by_hand(model, val_tokens(), T)
    assert not end.value.code
    assert found == [pytest.approx(by_hand, abs=2e-5)]
    assert not Path('out').exists()
    assert f'val loss {found[0]:.4f} nats' in capsys.readouterr().out
    run('train.py', words(settings | dict(max_iters=3)))
    x, y = batches.Dataset('text', T, seed=1337).train_batch(0, 0, 4)
    assert losses()[1] == pytest.approx(
        model.eval()(x, y).item(), abs=2e-5
    )  # dropout is this run's, 0.0
    assert log()[0]['kind'] == kind
    assert log()[0]['config']['block_size'] == T
    assert checkpoint.load('out')['model_args']['block_size'] == T


def test_a_model_may_go_on_with_shorter_blocks():
    nanogpt('long.pt')
    train(init_from='long.pt', block_size=12, bias=True)
    content = checkpoint.load('out')
    assert content['model_args']['block_size'] == 12
    assert content['model']['transformer.wpe.weight'].shape == (12, 16)


# -------------------------------------------------------------------------------------------------
# evaluation and what is kept


@every_kind
def test_an_evaluation_scores_the_whole_split_once(kind):
    train(eval_iters=10**6, max_iters=4, **MODELS[kind])
    model = load.load_model('out').model
    assert val_losses()[4] == pytest.approx(loss_by_hand(model, val_tokens(), 16), abs=1e-6)


def test_the_averaged_weights_are_evaluated_and_kept(monkeypatch):
    averages, init, update = [], Trainer.__init__, Trainer.update

    def begin(self, *arguments):
        init(self, *arguments)
        averages.append([p.detach().clone() for p in self.params])

    def follow(self, step):
        loss = update(self, step)
        decay = min(0.9, (1 + step) / (10 + step))
        averages.append(
            [old * decay + p.detach() * (1 - decay) for old, p in zip(averages[-1], self.params)]
        )
        return loss

    monkeypatch.setattr(Trainer, '__init__', begin)
    monkeypatch.setattr(Trainer, 'update', follow)
    train(ema_decay=0.9, always_save_checkpoint=True)
    content, last = checkpoint.load('out'), checkpoint.load('out/last.pt')
    model = checkpoint.build(content)
    assert content['step'] == last['step'] == 8
    for a, p in zip(averages[-1], model.parameters(), strict=True):
        assert torch.allclose(a, p, atol=1e-6)
    for a, p in zip(last['average'], model.parameters(), strict=True):
        assert torch.equal(a, p)
    assert not same(content['model'], last['model'])  # to go on, the weights themselves
    assert val_losses()[8] == pytest.approx(loss_by_hand(model, val_tokens(), 16), abs=1e-6)


@pytest.mark.parametrize('always, kept', [(False, 8), (True, 16)])
def test_ckpt_is_the_best_or_the_newest(always, kept, monkeypatch):
    losses = iter([3.0, 2.0, 2.5, 2.25])
    monkeypatch.setattr(Trainer, 'evaluate', lambda self, stopping: next(losses))
    train(max_iters=16, always_save_checkpoint=always)
    content = checkpoint.load('out')
    assert content['step'] == kept
    assert content['best_val_loss'] == 2.0
    assert content['best_step'] == 8
    assert checkpoint.load('out/last.pt')['step'] == 16
    assert log()[-1]['best_val_loss'] == 2.0


# -------------------------------------------------------------------------------------------------
# schedules


def settings_of(**changes):
    settings = dict(
        learning_rate=1.0,
        min_lr=0.1,
        decay_lr=True,
        schedule='cosine',
        warmup_iters=10,
        lr_decay_iters=110,
        max_iters=200,
        cooldown=0.4,
    )
    return settings | changes


def test_warmup_is_linear_and_reaches_the_peak():
    for schedule in ('cosine', 'wsd'):
        s = settings_of(schedule=schedule)
        assert [get_lr_share(s, step) for step in range(10)] == [
            pytest.approx((step + 1) / 11) for step in range(10)
        ]
        assert get_lr_share(s, 10) == pytest.approx(1)


def test_cosine_is_a_half_wave_down_to_min_lr():
    s = settings_of()
    for step in range(10, 111):
        assert get_lr_share(s, step) == pytest.approx(
            0.1 + 0.9 * math.cos((step - 10) / 100 * math.pi / 2) ** 2
        )
    assert get_lr_share(s, 60) == pytest.approx(0.55)
    assert {get_lr_share(s, step) for step in range(110, 300)} == {0.1}


def test_wsd_is_constant_and_then_linear():
    s = settings_of(schedule='wsd')
    for step in range(10, 67):
        assert get_lr_share(s, step) == 1
    assert [get_lr_share(s, step) for step in (66, 88)] == [1, pytest.approx(0.55)]
    assert {get_lr_share(s, step) for step in range(110, 300)} == {0.1}
    falls = [get_lr_share(s, step) - get_lr_share(s, step + 1) for step in range(66, 110)]
    assert falls == [pytest.approx(0.9 / 44)] * 44
    assert get_lr_share(settings_of(schedule='wsd', cooldown=0.0), 109) == 1


def test_without_decay_the_rate_is_constant():
    assert {get_lr_share(settings_of(decay_lr=False), step) for step in range(300)} == {1.0}


def test_the_decay_ends_with_the_run_unless_told_otherwise():
    assert get_lr_share(settings_of(lr_decay_iters=0), 105) == pytest.approx(0.55)
    assert get_lr_share(settings_of(lr_decay_iters=0, max_iters=60), 60) == 0.1


@pytest.mark.parametrize('schedule', ['cosine', 'wsd'])
def test_a_run_follows_its_schedule(schedule):
    train(schedule=schedule, optimizer='muon', muon_lr=0.05, max_iters=6)
    s = settings_of(
        learning_rate=1e-2,
        min_lr=1e-3,
        warmup_iters=2,
        lr_decay_iters=0,
        max_iters=6,
        schedule=schedule,
    )
    assert series('out', 'train', 'lr') == {
        step + 1: pytest.approx(1e-2 * get_lr_share(s, step)) for step in range(6)
    }
    adamw, muon = checkpoint.load('out/last.pt')['optimizers']
    assert [group['lr'] for group in adamw['param_groups']] == [
        pytest.approx(1e-2 * get_lr_share(s, 5))
    ] * 2
    assert muon['param_groups'][0]['lr'] == pytest.approx(0.05 * get_lr_share(s, 5))


# -------------------------------------------------------------------------------------------------
# config files and defaults


def read_config(path):
    """Read a config file with the ones that its docstring's command names before it."""
    command = re.search(r'python train\.py ((?:config/\w+\.py ?)+)', path.read_text())
    files = [ROOT / name for name in command[1].split()] if command else []
    files = files[: files.index(path)] if path in files else []
    return configurator.configure(
        {'__file__': str(ROOT / 'train.py')}, [*map(str, files), str(path)]
    )


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_every_config_parses_and_names_a_dataset_that_exists(path):
    config = read_config(path)
    assert (ROOT / 'data' / config['dataset'] / 'prepare.py').is_file()
    assert 'dataset' in config.given
    assert config['eval_only'] or 'out_dir' in config.given


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_every_config_leaves_compiling_and_graphs_out_on_a_cpu(path):
    config = read_config(path)
    config.apply_on_cpu()
    assert not config['compile']
    assert not config['cuda_graph']


SMALL_ON_A_CPU = [
    'books_modern',
    'train_gpt2_mla',
    'train_shakespeare_char',
    'train_shakespeare_mla',
]


@pytest.mark.parametrize('name', SMALL_ON_A_CPU)
def test_on_the_cpu_a_config_shrinks_and_a_key_beats_it(name, tmp_path, capsys):
    path = ROOT / 'config' / f'{name}.py'
    config = read_config(path)
    dataset.write_text(tmp_path / 'data' / config['dataset'], TEXT, 'char', 'A tale of a cat')
    small = {name: value for name, (value, _) in config._on_cpu.items()}
    asked = dict(n_layer=1, max_iters=2, eval_iters=1)
    run(
        'train.py',
        [
            str(path),
            *words(asked),
            '--device=cpu',
            '--out_dir=out',
            '--sample_tokens=0',
        ],
    )
    printed = re.search(r'^on the CPU: (.*(?:\n  .*)*)$', capsys.readouterr().out, re.M)[1]
    used = {name: value for name, value in small.items() if name not in asked}
    assert re.split(r',\s+', printed) == [f'{name}={value}' for name, value in used.items()]
    assert {name: log()[0]['config'][name] for name in small} == {
        name: asked.get(name, value) for name, value in small.items()
    }
    model_args = checkpoint.load('out/last.pt')['model_args']
    assert model_args['n_layer'] == 1
    assert model_args['n_embd'] == small.get('n_embd', config['n_embd'])
    assert max(losses()) == 2


def test_model_settings_have_the_defaults_of_the_models():
    page, _ = configurator._read_page(str(ROOT / 'train.py'))
    fields = {field.name: field.default for field in dataclasses.fields(MLAConfig)}
    assert fields.keys() - page.keys() == {
        'vocab_size',
        'absorb',
        'kv_lora_ranks',
        'source_head_dim',
        'rope_frequencies',
        'nope_layers',
    }  # the data's, decoding's, conversion's, and those of loaded models
    wanted = fields | dict(
        bias=False, pos='learned'
    )  # MLA without a word about positions takes rope
    assert {name: page[name].default for name in fields.keys() & page.keys()} == {
        name: wanted[name] for name in fields.keys() & page.keys()
    }
    assert {field.name: field.default for field in dataclasses.fields(GPT.Config)}.items() - {
        ('bias', True)
    } <= wanted.items()


# -------------------------------------------------------------------------------------------------
# what a person can get wrong


def forget_counts(path):
    """Leave out of a meta.json what says of the bins how many tokens they have, as nanoGPT does."""
    meta = json.loads(path.read_text())
    kept = {key: value for key, value in meta.items() if not key.startswith(('train_', 'val_'))}
    path.write_text(json.dumps(kept))


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    """A folder with good and bad datasets and checkpoints, which no bad command may change."""
    place = tmp_path_factory.mktemp('place')
    good = place / 'text'
    dataset.write_text(good, TEXT, 'char', 'A tale of a cat')
    dataset.write_text(
        place / 'others', TEXT.replace('c', 'q').replace('z', 'x'), 'char', 'A tale of a qat'
    )
    dataset.write_text(place / 'short', TEXT[:60], 'char', 'A short tale')
    for name in ('empty', 'odd', 'beyond', 'no train', 'no val', 'bad meta', 'pickled meta'):
        shutil.copytree(good, place / name)
    (place / 'empty' / 'train.bin').write_bytes(b'')
    (place / 'odd' / 'train.bin').write_bytes((good / 'train.bin').read_bytes()[:-1])
    (place / 'beyond' / 'val.bin').write_bytes((good / 'val.bin').read_bytes() + b'\xff\xff')
    forget_counts(place / 'beyond' / 'meta.json')
    (place / 'no train' / 'train.bin').unlink()
    (place / 'no val' / 'val.bin').unlink()
    (place / 'bad meta' / 'meta.json').write_text('{"tokenizer": "char"')
    (place / 'pickled meta' / 'meta.json').unlink()
    (place / 'pickled meta' / 'meta.pkl').write_bytes(pickle.dumps({}))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setattr(figures, 'curve', lambda log, picture: None)
        train(max_iters=2)
        train(max_iters=2, out_dir='mla', **MODELS['mla'])
        train(max_iters=2, out_dir='muon', optimizer='muon')
    (place / 'file').write_text('in the way')
    (place / 'truncated').mkdir()
    (place / 'truncated' / 'last.pt').write_bytes((place / 'out' / 'last.pt').read_bytes()[:5000])
    (place / 'copied').mkdir()
    shutil.copy(place / 'out' / 'ckpt.pt', place / 'copied' / 'last.pt')
    (place / 'evil').mkdir()

    class Evil:
        def __reduce__(self):
            return os.system, (f'touch {place}/evil/was_run',)

    torch.save(dict(model={}, model_args={}, kind='mha', x=Evil()), place / 'evil' / 'last.pt')
    nanogpt(place / 'nanogpt' / 'ckpt.pt')
    return place


@pytest.mark.parametrize(
    'settings, message',
    [
        # settings
        (dict(n_layers=2), "unknown setting 'n_layers'; did you mean --n_layer?"),
        (dict(batch_size='many'), 'batch_size takes a whole number'),
        (dict(compile='perhaps'), 'compile takes True or False'),
        (dict(batch_size=0), 'batch_size=0 must be at least 1'),
        (dict(gradient_accumulation_steps=0), 'gradient_accumulation_steps=0 must be at least 1'),
        (dict(eval_interval=-1), 'eval_interval=-1 must be at least 1'),
        (dict(max_iters=0), 'max_iters=0 must be at least 1'),
        (dict(block_size=0), 'block_size=0 must be at least 1'),
        (dict(optimizer='sgd'), "optimizer='sgd' is not known: use adamw, muon"),
        (dict(schedule='linear'), "schedule='linear' is not known: use cosine, wsd"),
        (dict(kernel='fast'), "kernel='fast' is not known"),
        (dict(kernel='cudnn'), '--kernel=cudnn cannot run on cpu'),
        (dict(kernel='flex'), '--kernel=flex cannot run on cpu'),
        (dict(attention='gqa', out_dir='new'), "attention='gqa' is not known"),
        (dict(n_head=3), 'n_embd=16 is not a multiple of n_head=3'),
        (dict(kv_lora_rank=8), '--kv_lora_rank=8: kv_lora_rank is a setting of MLA'),
        (dict(dropout=1.0), 'dropout=1.0'),
        (dict(learning_rate=0), 'learning_rate=0'),
        (dict(learning_rate=-1e-3), 'learning_rate=-0.001'),
        (dict(learning_rate=1e-5), 'min_lr=0.001 is above learning_rate=1e-05'),
        (dict(optimizer='muon', muon_lr=-1), 'muon_lr=-1'),
        (dict(optimizer='muon', muon_up=-1), 'muon_up=-1'),
        (dict(muon_heads=True, muon_split=False), 'muon_heads=True takes symbols apart'),
        (dict(qk_clip=-1), 'qk_clip=-1.0 must be at least 0'),
        (dict(qk_clip=100, qk_norm=True), '--qk_clip=100 does not go with qk_norm=True'),
        (dict(qk_clip=100, train_only='mlp'), '--qk_clip=100 moves weights that --train_only=mlp'),
        (dict(min_lr=-1), 'min_lr=-1'),
        (dict(beta1=1.0), 'beta1=1.0'),
        (dict(beta2=-0.1), 'beta2=-0.1'),
        (dict(ema_decay=1.0), 'ema_decay=1.0'),
        (dict(weight_decay=-0.1), 'weight_decay=-0.1'),
        (dict(grad_clip=-1), 'grad_clip=-1'),
        (dict(warmup_iters=-1), 'warmup_iters=-1'),
        (dict(cooldown=1.5), 'cooldown=1.5 must be at least 0 and at most 1'),
        (dict(max_minutes=-1), 'max_minutes=-1.0 must be at least 0'),
        (dict(target_loss=-1), 'target_loss=-1.0 must be at least 0'),
        (dict(norm_eps=0), 'norm_eps=0.0 must be more than 0'),
        (dict(seed=-1), 'seed=-1'),
        (dict(seed=10**18), 'seed=1000000000000000000'),
        # machine
        (dict(device='cuda'), '--device=cuda, but torch sees no CUDA GPU here'),
        (dict(device='tpu'), '--device=tpu is no device'),
        (dict(dtype='float8'), '--dtype=float8 is not known'),
        (dict(dtype='float16'), '--dtype=float16 is too coarse'),
        (dict(cuda_graph=True), '--cuda_graph=True needs one CUDA GPU'),
        (dict(fp8_head=True), '--fp8_head=True needs a CUDA GPU'),  # and is never silently left out
        (dict(backend='smoke'), '--backend=smoke is not known'),
        (dict(backend='nccl'), '--backend=nccl'),
        (dict(n_embd=10**8, out_dir='new'), 'parameters needs at least'),
        (dict(batch_size=10**10, out_dir='new'), 'batch_size=10000000000 needs at least'),
        # data
        (dict(dataset='moby_dick'), "there is no dataset 'moby_dick'"),
        (dict(dataset='x' * 400), "there is no dataset 'xxx"),
        (dict(dataset='no train'), "there is no dataset 'no train'"),
        (dict(dataset='no val'), "there is no dataset 'no val'"),
        (dict(dataset='empty'), 'empty/train.bin is empty'),
        (dict(dataset='odd'), 'odd/train.bin has '),
        (dict(dataset='beyond'), 'beyond/val.bin holds token 65535'),
        (dict(dataset='short'), 'too few for one block of 16'),
        (dict(block_size=10**5), 'too few for one block of 100000'),
        (dict(dataset='bad meta'), 'bad meta/meta.json cannot be used'),
        (dict(dataset='pickled meta'), 'meta.pkl is nanoGPT'),
        # where to
        (dict(attention='mla'), "--out_dir=out holds a model of kind 'mha', not 'mla'"),
        (dict(out_dir='mla'), "--out_dir=mla holds a model of kind 'mla', not 'mha'"),
        (dict(out_dir='file'), 'cannot write to --out_dir=file'),
        (dict(out_dir='file/deeper'), 'cannot write to --out_dir=file/deeper'),
        (dict(out_dir='/proc/nowhere/out'), 'cannot write to --out_dir=/proc/nowhere/out'),
        (dict(out_dir='long' * 100), 'cannot write to --out_dir=long'),
        # from where
        (dict(init_from='nowhere'), "there is no checkpoint 'nowhere'"),
        (dict(init_from='x' * 400), "there is no checkpoint 'xxx"),
        (dict(teacher='x' * 400), "there is no checkpoint 'xxx"),
        (dict(init_from='text/train.bin'), 'text/train.bin is no checkpoint that can be loaded'),
        (
            dict(init_from='out', dataset='others'),
            'out/ckpt.pt was trained on other tokens than others has',
        ),
        (dict(init_from='out', block_size=32), 'block_size=32'),
        (
            dict(init_from='nanogpt', n_embd=32, block_size=20),
            '--n_embd=32: n_embd=32, but the model of nanogpt/ckpt.pt has 16',
        ),
        (
            dict(init_from='nanogpt', block_size=20, bias=False),
            '--bias=False: bias=False, but the model of nanogpt/ckpt.pt has True',
        ),
        (
            dict(init_from='nanogpt', block_size=20, kv_lora_rank=8),
            '--kv_lora_rank=8: kv_lora_rank is a setting of MLA',
        ),
        (
            dict(init_from='nanogpt', block_size=20, attention='mla', out_dir='new'),
            '--attention=mla',
        ),
        (dict(init_from='nanogpt', block_size=20, kernel='fast'), "kernel='fast' is not known"),
        (
            dict(init_from='resume', out_dir='new'),
            'there is nothing to resume: new/last.pt is missing',
        ),
        (
            dict(init_from='resume', out_dir='truncated'),
            'truncated/last.pt is no checkpoint that can be loaded: it is damaged',
        ),
        (
            dict(init_from='resume', out_dir='evil'),
            'evil/last.pt is no checkpoint that can be loaded: it holds code',
        ),
        (dict(init_from='resume', out_dir='copied'), 'copied/last.pt'),
        (dict(init_from='resume', n_layer=3), '--n_layer=3: n_layer=3, but the model of'),
        (dict(init_from='resume', block_size=32), 'block_size=32'),
        (dict(init_from='resume', block_size=8), 'block_size=8'),
        (dict(init_from='resume', attention='mla'), '--attention=mla'),
        (dict(init_from='resume', pos='rope'), '--pos=rope'),
        (dict(init_from='resume', kv_lora_rank=8), '--kv_lora_rank=8'),
        (dict(init_from='resume', dataset='others'), 'other tokens than others has'),
        (dict(init_from='resume', optimizer='muon'), 'another optimizer than --optimizer=muon'),
        (
            dict(init_from='resume', out_dir='muon', optimizer='adamw'),
            'another optimizer than --optimizer=adamw',
        ),
        (
            dict(init_from='resume', train_only='attn'),
            'out/last.pt was trained on other parameters, with --train_only=: resume with its own, '
            'or begin a new run from its weights with --init_from=out/last.pt',
        ),
    ],
    ids=lambda value: (
        ' '.join(f'{k}={v}'[:30] for k, v in value.items()) if isinstance(value, dict) else ''
    ),
)
def test_what_is_wrong_is_told_in_one_line_and_nothing_is_touched(
    settings, message, place, monkeypatch, capsys
):
    monkeypatch.chdir(place)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    before = files(place)
    code = exit_code('train.py', words(TINY | settings))
    err = capsys.readouterr().err
    assert code == 2, err[-2000:]
    assert err.startswith('error: '), err[-2000:]
    assert message in err, err[-2000:]
    assert err.count('\n') == 1, err[-2000:]
    assert files(place) == before


def test_without_a_compiler_one_line_and_the_earlier_run_is_kept(monkeypatch, capsys):
    from torch._inductor import config

    train()
    held = files('out')
    monkeypatch.setattr(config.cpp, 'cxx', ('/nonexistent',))  # what torch makes of CXX
    monkeypatch.setenv('TORCHINDUCTOR_CACHE_DIR', str(Path('cache').absolute()))
    capsys.readouterr()
    for asked in (dict(eval_only=True), {}):
        assert exit_code('train.py', words(TINY | dict(compile=True) | asked)) == 2
        err = capsys.readouterr().err
        assert err.startswith('error: torch.compile cannot work here (')
        assert err.endswith('): use --compile=False\n')
        assert err.count('\n') == 1
    assert files(moved()) == held


def test_a_loss_that_runs_away_ends_in_one_line_with_code_1(capsys):
    train(max_iters=4)
    held = files('out')['last.pt']
    code = exit_code(
        'train.py',
        words(
            TINY
            | dict(
                init_from='resume',
                learning_rate=1e30,
                decay_lr=False,
                grad_clip=0.0,
                eval_interval=1,
            )
        ),
    )
    err = capsys.readouterr().err
    assert code == 1
    assert err.startswith('error: the loss is ')
    assert 'out/last.pt' in err
    assert err.count('\n') == 1
    assert files('out')['last.pt'] == held
    for value in checkpoint.load('out/last.pt')['model']['lm_head.weight'].flatten():
        assert math.isfinite(value)
    assert log()


# -------------------------------------------------------------------------------------------------
# no space left

needs_a_full_disk = pytest.mark.skipif(not os.path.exists('/dev/full'), reason='needs /dev/full')


def one_error(capsys, begins):
    err = capsys.readouterr().err
    return err.startswith(f'error: {begins}') and err.count('\n') == 1


def test_no_prepare_script_runs_because_a_checkpoint_names_its_folder(capsys):
    """A resumed run has its dataset from last.pt, which may be anybody's."""
    train(max_iters=4)
    Path('text/train.bin').unlink()
    Path('text/prepare.py').write_text("open('ran', 'w').close()")
    assert exit_code('train.py', ['--out_dir=out', '--init_from=resume']) == 2
    assert one_error(capsys, "out/last.pt says that it was trained on 'text'")
    assert not Path('ran').exists()


@needs_a_full_disk
@pytest.mark.parametrize('name', ['ckpt.pt', 'last.pt'])
def test_a_full_disk_leaves_the_last_checkpoint(name, capsys, monkeypatch):
    train(max_iters=4)
    before = files('out')
    again = words(TINY | dict(init_from='resume', always_save_checkpoint=True))
    with monkeypatch.context() as patch:
        fill_disk(patch, name)
        assert exit_code('train.py', again) == 1
    assert one_error(capsys, f'cannot write out/{name}: no space left on the device')
    after = files('out')
    assert after[name] == before[name]
    assert sorted(after) == sorted(before)
    train(init_from='resume')  # with room again
    assert max(val_losses()) == 8


@needs_a_full_disk
def test_wandb_that_refuses_is_told_and_the_earlier_run_is_kept(monkeypatch, capsys):
    class Refusal(Exception):
        pass

    def init(**about):
        raise Refusal('No API key configured.\nUse `wandb login` to log in.')

    train()
    held = files('out')
    monkeypatch.setitem(sys.modules, 'wandb', SimpleNamespace(init=init, Error=Refusal))
    assert exit_code('train.py', words(TINY | dict(wandb_log=True))) == 2
    assert one_error(
        capsys, 'wandb does not start (No API key configured. Use `wandb login` to log in.): '
    )
    assert files('out') == held


def test_a_log_on_a_full_disk_is_told(capsys, monkeypatch):
    monkeypatch.setattr(file_tools, 'appending', lambda path: open('/dev/full', 'a'))
    assert exit_code('train.py', words(TINY)) == 2
    assert one_error(capsys, 'cannot write out/log.jsonl: ')


def test_a_disk_that_fills_up_while_training(capsys):
    train(max_iters=4)
    before = files('out')
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before['last.pt']) // 2, hard))
    try:
        code = exit_code('train.py', words(TINY | dict(init_from='resume')))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert code == 1
    assert one_error(capsys, 'cannot write out/')
    after = files('out')
    assert after['last.pt'] == before['last.pt']
    assert sorted(after) == sorted(before)
    checkpoint.load('out')  # old or new, as small as it is
