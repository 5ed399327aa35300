"""Checkpoints written in the background: what is saved, in which order, and what may go wrong."""

import subprocess
import sys
import threading

import pytest
import torch

from nanomla.checkpoints import native
from nanomla.core.configurator import RunError, UserError
from nanomla.training.run.saving import BackgroundSaver, HostCopies


def content(**tensors):
    return dict(kind='mha', model_args={}, model=tensors, step=3, meta={}, config={})


@pytest.fixture
def slow_disk():
    """A saver whose `write` waits for saver.go.set(); saver.written lists what was written."""

    def write(path, checkpoint):
        assert saver.go.wait(60)
        saver.written.append((path, checkpoint['step'], checkpoint['model']['w'].tolist()))

    saver = BackgroundSaver(write)
    saver.go, saver.written = threading.Event(), []
    yield saver
    saver.go.set()
    saver.close()


def test_a_save_returns_before_it_is_written_and_holds_that_moment(slow_disk):
    w = torch.zeros(3)
    slow_disk.save({'ckpt.pt': content(w=w), 'last.pt': content(w=w)})
    w += 1  # training goes on
    assert slow_disk.written == []
    slow_disk.check()  # does not wait
    slow_disk.go.set()
    slow_disk.wait()
    assert slow_disk.written == [('ckpt.pt', 3, [0.0] * 3), ('last.pt', 3, [0.0] * 3)]


def test_one_save_is_under_way_at_a_time(slow_disk):
    w = torch.zeros(1)
    slow_disk.save({'a': content(w=w)})
    second = threading.Thread(target=slow_disk.save, args=[{'b': content(w=w + 1)}])
    second.start()
    second.join(0.05)
    assert second.is_alive()  # it waits for the first
    slow_disk.go.set()
    second.join(60)
    slow_disk.close()
    assert [path for path, *_ in slow_disk.written] == ['a', 'b']


def test_the_files_are_those_that_a_plain_save_writes(tmp_path, tiny):
    model = tiny(tie_weights=True)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.zeros(1, 3, dtype=torch.long), torch.zeros(1, 3, dtype=torch.long)).backward()
    optimizer.step()
    checkpoint = content(**model.state_dict()) | dict(
        model_args=native.model_args(model),
        optimizers=[optimizer.state_dict()],
        average=[p.detach() for p in model.parameters()],
    )
    saver = BackgroundSaver(native.save)
    saver.save({tmp_path / 'background.pt': checkpoint})
    saver.close()
    native.save(tmp_path / 'plain.pt', checkpoint)
    one, other = (native.load(tmp_path / name) for name in ('background.pt', 'plain.pt'))
    assert str(one.pop('path')) != str(other.pop('path'))
    assert str(one) == str(other)
    # tied weights are in the file once, as in the model
    sizes = [(tmp_path / name).stat().st_size for name in ('background.pt', 'plain.pt')]
    assert sizes[0] <= sizes[1]
    head, embedding = (one['model'][f'{n}.weight'] for n in ('lm_head', 'transformer.wte'))
    assert head.untyped_storage().data_ptr() == embedding.untyped_storage().data_ptr()


def test_memory_is_used_again_and_never_shared_by_two_tensors():
    copies = HostCopies()
    one, two = torch.zeros(4), torch.ones(4)
    first = copies.copy(dict(a=one, b=[two, (one, 'text')], n=torch.tensor(7.0)))
    assert first['a'].tolist() == [0.0] * 4
    assert first['b'][0].tolist() == [1.0] * 4
    assert first['b'][1] == (first['a'], 'text')
    assert first['b'][1][0] is first['a']
    places = {t.data_ptr() for t in (first['a'], first['b'][0])}
    assert len(places) == 2
    assert places.isdisjoint({one.data_ptr(), two.data_ptr()})
    again = copies.copy(dict(b=two, a=one))
    assert {again['a'].data_ptr(), again['b'].data_ptr()} == places
    assert again['a'].tolist() == [0.0] * 4
    assert again['b'].tolist() == [1.0] * 4


def test_reserved_memory_is_that_of_the_first_copy():
    copies = HostCopies()
    content = dict(a=torch.ones(4), b=[torch.ones(2, 3), torch.ones(4)])
    copies.reserve(content)
    reserved = {t.data_ptr() for buffers in copies.buffers.values() for t in buffers}
    first = copies.copy(content)
    assert {t.data_ptr() for t in (first['a'], *first['b'])} == reserved
    assert str(first) == str(content)


def test_reserving_starts_no_threads_that_slow_the_training():
    program = """
import os, torch
from nanomla.training.run.saving import BackgroundSaver

torch.set_num_threads(2)
a = torch.ones(1 << 20)
a.mul(2)  # starts the training's own thread
before = len(os.listdir('/proc/self/task'))
saver = BackgroundSaver(print)
saver.reserve({'x': dict(a=a, b=a.to(torch.bfloat16))})
saver.wait()
print(len(os.listdir('/proc/self/task')) - before)
"""
    assert subprocess.check_output([sys.executable, '-c', program], text=True) == '1\n'


def test_memory_that_is_not_there_is_one_line(monkeypatch):
    def fail(self, content):
        raise MemoryError('too much')

    monkeypatch.setattr(HostCopies, 'reserve', fail)
    saver = BackgroundSaver(native.save)
    saver.reserve({})
    with pytest.raises(RunError, match='no memory to copy a checkpoint to: too much'):
        saver.close()


@pytest.mark.parametrize(
    'error, message',
    [
        (UserError('cannot write x: no space left on the device'), 'cannot write x: no space'),
        (RuntimeError('of torch\nin two lines'), 'cannot write x: RuntimeError: of torch in two'),
        (MemoryError(), 'cannot write x: MemoryError'),
    ],
    ids=['user', 'torch', 'memory'],
)
def test_what_fails_in_the_thread_ends_the_run_with_one_line(error, message):
    def fail(path, checkpoint):
        raise error

    saver = BackgroundSaver(fail)
    saver.save({'x': {}, 'y': {}})
    with pytest.raises(RunError) as raised:
        saver.wait()
    assert str(raised.value).startswith(message)
    assert '\n' not in str(raised.value)
    assert raised.value.exit_code == 1
    saver.check()  # it is reported once
    saver.save({'x': {}})
    with pytest.raises(RunError):
        saver.close()


@pytest.mark.gpu
def test_a_gpu_goes_on_while_its_state_is_written(slow_disk):
    w = torch.zeros(1 << 24, device='cuda')
    slow_disk.write = lambda path, checkpoint: slow_disk.written.append(checkpoint['model']['w'])
    slow_disk.save({'x': content(w=w)})
    w += 1
    torch.cuda.synchronize()
    slow_disk.wait()
    (copy,) = slow_disk.written
    assert copy.is_pinned()
    assert not copy.any()
