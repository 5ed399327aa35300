"""Device, dtype and processes of a run, its signals, and timing."""

import math
import os
import signal
from types import SimpleNamespace

import pytest
import torch

from nanomla.core import devices, timing
from nanomla.core.configurator import UserError

CPU = torch.device('cpu')


@pytest.mark.parametrize(
    'name, message',
    [
        ('gpu', '--device=gpu is no device: use auto, cpu'),
        ('meta', '--device=meta is not supported'),
        ('cuda', 'torch sees no CUDA GPU here: use --device=cpu'),
        ('mps', 'this is no Apple GPU'),
    ],
)
def test_a_device_that_is_not_there_is_refused(name, message, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    monkeypatch.setattr(torch.backends.mps, 'is_available', lambda: False)
    with pytest.raises(UserError, match=message):
        devices.pick_device(name)
    assert devices.pick_device() == CPU


def test_a_gpu_is_taken_where_there_is_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    assert devices.pick_device().type == 'cuda'
    assert devices.pick_device('cuda:1').index == 1
    with pytest.raises(UserError, match='--device=cuda:2, but there are only 2 GPUs here'):
        devices.pick_device('cuda:2')


@pytest.mark.parametrize('has_bf16, half', [(True, torch.bfloat16), (False, torch.float16)])
def test_the_dtype_is_what_the_device_multiplies_in(has_bf16, half, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda including_emulation: has_bf16)
    monkeypatch.setattr(torch.cpu, '_is_avx512_bf16_supported', lambda: has_bf16)
    for dtype in ('auto', 'fast'):
        assert devices.pick_dtype(dtype, torch.device('cuda')) == half
        assert devices.pick_dtype(dtype, torch.device('mps')) == torch.float32
    assert devices.pick_dtype('auto', CPU) == torch.float32
    assert devices.pick_dtype('fast', CPU) == (torch.bfloat16 if has_bf16 else torch.float32)
    with pytest.raises(UserError, match='float16 is too coarse'):
        devices.pick_dtype('float16', CPU)
    with pytest.raises(UserError, match='--dtype=int8 is not known'):
        devices.pick_dtype('int8', CPU)


@pytest.mark.parametrize(
    'name, dtype, teraflops',
    [
        ('NVIDIA H100 PCIe', torch.bfloat16, 756),
        ('NVIDIA H100 80GB HBM3', torch.bfloat16, 989),
        ('NVIDIA L40S', torch.float16, 362),
        ('NVIDIA L4', torch.float32, 60),
        ('Voodoo 2', torch.float32, math.nan),
    ],
)
def test_peak_rates_go_by_the_longest_name(name, dtype, teraflops, monkeypatch):
    monkeypatch.setattr(devices, 'describe', lambda device: name)
    rate = devices.peak_flops(torch.device('cuda'), dtype)
    assert rate == 1e12 * teraflops or math.isnan(rate) and math.isnan(teraflops)


def test_one_process_is_rank_0_of_1(monkeypatch):
    for name in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'LOCAL_WORLD_SIZE'):
        monkeypatch.delenv(name, raising=False)
    assert devices.join_processes(CPU) == (0, 1, 0, CPU) and devices.on_one_host()
    with pytest.raises(UserError, match='--backend=nccl needs CUDA GPUs'):
        devices.join_processes(CPU, 'nccl')
    with pytest.raises(UserError, match='--backend=mpi is not known'):
        devices.join_processes(CPU, 'mpi')


def test_an_attempt_of_torchrun_reads_nothing_that_another_one_left(monkeypatch):
    assert devices.store_of_attempt() is None
    server = torch.distributed.TCPStore('127.0.0.1', 0, is_master=True)
    variables = dict(MASTER_ADDR='127.0.0.1', MASTER_PORT=server.port)
    variables |= dict(TORCHELASTIC_USE_AGENT_STORE=True, WORLD_SIZE=2, LOCAL_WORLD_SIZE=2)
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))
    stores = []
    for attempt in ('0', '1', '1'):
        monkeypatch.setenv('TORCHELASTIC_RESTART_COUNT', attempt)
        stores.append(devices.store_of_attempt())
    first, second, other = stores
    first.set('address', 'of a process that was killed')
    assert not second.check(['address'])
    second.set('address', 'new')
    assert other.get('address') == b'new'
    monkeypatch.setenv('WORLD_SIZE', '4')  # two hosts
    assert devices.store_of_attempt() is None


def test_the_commit_may_be_given(monkeypatch, tmp_path):
    monkeypatch.setenv('NANOMLA_COMMIT', 'abc1234')
    assert devices.commit() == 'abc1234'
    monkeypatch.delenv('NANOMLA_COMMIT')
    monkeypatch.setattr(devices, '__file__', str(tmp_path / 'devices.py'))
    monkeypatch.setenv('GIT_CEILING_DIRECTORIES', str(tmp_path.parent))
    assert devices.commit() == 'unknown'


# -------------------------------------------------------------------------------------------------
# signals


def test_a_signal_is_remembered_and_a_second_interrupt_stops(capfd):
    signals = devices.Signals()
    assert signals.name == ''
    os.kill(os.getpid(), signal.SIGTERM)
    assert signals.name == 'SIGTERM'
    os.kill(os.getpid(), signal.SIGINT)
    assert signals.name == 'SIGINT' and 'a second one stops at once' in capfd.readouterr().err
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        signal.pause()


def test_an_interrupt_that_is_ignored_stays_ignored():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    devices.Signals().ignore()
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    assert signal.getsignal(signal.SIGUSR1) is signal.SIG_IGN


def test_the_end_of_a_terminal_stops_a_run_unless_it_is_ignored():
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signals = devices.Signals()
    os.kill(os.getpid(), signal.SIGHUP)
    assert signals.name == 'SIGHUP'
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as under nohup
    signals = devices.Signals()
    os.kill(os.getpid(), signal.SIGHUP)
    assert signals.name == ''


class Ranks:
    """Two processes of a run in this one: their clock, their signals and their votes."""

    def __init__(self, monkeypatch, step_seconds):
        self.now, self.step_seconds = 100.0, step_seconds
        monkeypatch.setattr(devices.time, 'monotonic', lambda: self.now)
        monkeypatch.setattr(devices.torch.distributed, 'get_backend', lambda: 'gloo')
        monkeypatch.setattr(devices.torch.distributed, 'all_reduce', self.all_reduce)
        self.signals = [SimpleNamespace(name=''), SimpleNamespace(name='')]
        self.votes = [devices.StopVote(signals, world=2) for signals in self.signals]

    def all_reduce(self, both):
        """Add the vote of the other, whose steps take as long."""
        both *= 2
        both[0] = sum(signals.name != '' for signals in self.signals)

    def run_until_stopped(self, signal_at):
        """Return when both stopped, after the signal to one that comes at `signal_at`."""
        step = 0
        while True:
            step += 1
            self.now += self.step_seconds(self.now)
            if self.now >= signal_at:
                self.signals[1].name = 'SIGTERM'
            due = [vote.due(step) for vote in self.votes]
            assert due[0] == due[1]  # one alone would wait for the other
            if due[0]:
                stopping = [vote.take(step) for vote in self.votes]
                assert stopping[0] == stopping[1]
                if stopping[0]:
                    return self.now


@pytest.mark.parametrize('seconds', [1e-4, 0.03, 0.7, 4.0, 9.0])
def test_all_processes_stop_within_seconds_of_a_signal_to_one(seconds, monkeypatch):
    for signal_at in (100.0, 131.7, 222.2):
        ranks = Ranks(monkeypatch, lambda now: seconds)
        assert ranks.run_until_stopped(signal_at) - signal_at <= 10
        assert [vote.reason for vote in ranks.votes] == ['a signal', 'SIGTERM']


def test_steps_that_become_slower_are_followed(monkeypatch):
    ranks = Ranks(monkeypatch, lambda now: 0.01 * 1.0005 ** (now - 100) * (1.9 if now > 130 else 1))
    assert ranks.run_until_stopped(131.0) - 131.0 <= 10


def test_a_time_limit_is_a_vote_too(monkeypatch):
    ranks = Ranks(monkeypatch, lambda now: 0.5)
    ranks.votes[0].deadline = 110.0
    monkeypatch.setattr(devices.torch.distributed, 'all_reduce', lambda both: both.mul_(2))
    ranks.now = 111.0
    assert ranks.votes[0].take(1) and ranks.votes[0].reason == 'max_minutes'


def test_one_process_alone_stops_after_the_step():
    signals = SimpleNamespace(name='')
    vote = devices.StopVote(signals, world=1)
    assert not any(vote.due(step) for step in range(100))
    signals.name = 'SIGUSR1'
    assert vote.due(100) and vote.take(100) and vote.reason == 'SIGUSR1'
    late = devices.StopVote(SimpleNamespace(name=''), world=1, deadline=0.0)
    assert late.due(1) and late.take(1) and late.reason == 'max_minutes'


def test_one_process_agrees_with_itself():
    assert devices.all_agree(('resume', 7), world=1)


# -------------------------------------------------------------------------------------------------
# timing


def test_a_clock_has_the_seconds_between_its_ticks(monkeypatch):
    times = iter([1.0, 1.5, 3.5])
    monkeypatch.setattr(timing.time, 'perf_counter', lambda: next(times))
    clock = timing.Clock(CPU)
    clock.tick()
    clock.tick()
    assert clock.seconds() == [0.5, 2.0]


def test_median_and_range_are_columns():
    columns = timing.median_and_range('step_ms', [0.003, 0.001, 0.002], 1e3)
    assert columns == dict(step_ms=2.0, step_ms_least=1.0, step_ms_most=3.0)


def test_what_does_not_run_is_a_reason():
    assert timing.attempt(lambda: dict(x=1), CPU) == dict(x=1, reason='')

    def raising(error):
        def run():
            raise error

        return timing.attempt(run, CPU)

    assert raising(UserError('no such kernel')) == dict(reason='no such kernel')
    assert raising(MemoryError()) == dict(reason='out of memory: MemoryError')
    long = "[enforce fail] DefaultCPUAllocator: can't allocate\n  memory: you tried. GPU 0 has"
    assert raising(RuntimeError(long)) == dict(
        reason="out of memory: can't allocate memory: you tried"
    )
    with pytest.raises(RuntimeError, match='a bug'):
        raising(RuntimeError('a bug'))


def test_the_peak_of_a_phase_is_its_largest():
    memory = dict(load=[1, 2**60])
    with timing.record_peak_memory('load', memory, CPU):
        pass
    assert memory['load'][0] > 2**20 and memory['load'][1] == 2**60


def test_a_matrix_product_has_a_rate():
    assert 1e6 < timing.matmul_rate(CPU, torch.float32) < 1e16


def test_repeated_seconds_are_means_over_steps_after_a_warm_up(monkeypatch):
    steps = []
    clock = iter([6.0, 12.0])

    def seconds(device, run):
        run()
        return next(clock)

    monkeypatch.setattr(timing, 'seconds', seconds)
    times = timing.repeated_seconds(CPU, steps.append, steps=3, repeats=2, warmup=2)
    assert times == [2.0, 4.0]
    assert steps == [0, 1] + [0, 1, 2] * 2


def test_a_copy_counts_read_and_written_bytes(monkeypatch):
    monkeypatch.setattr(timing, 'seconds', lambda device, run: 0.5)
    assert timing.copy_bandwidth(CPU) == 2 * 2**26 / 0.5
