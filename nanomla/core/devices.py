"""What a run runs on: device, dtype, processes, peak rates, signals, and the commit of the code."""

import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.distributed

from nanomla.core.configurator import UserError, machine_failure

DTYPES = dict(float32=torch.float32, bfloat16=torch.bfloat16, float16=torch.float16)

# Dense matrix rates by the vendors' datasheets in TFLOP/s: 16-bit, and TF32 (or else fp32).
PEAKS = {
    'B200': (2250, 1100),
    'GH200': (989, 494),
    'H200': (989, 494),
    'H100 PCIe': (756, 378),
    'H100': (989, 494),
    'A100': (312, 156),
    'L40S': (362, 183),
    'L40': (181, 90),
    'L4': (121, 60),
    'A10G': (70, 35),
    'A10': (125, 62),
    'A6000': (155, 77),
    '6000 Ada': (364, 182),
    'RTX 4090': (165, 83),
    'RTX 3090': (71, 36),
    'V100': (125, 16),
    'T4': (65, 8),
    'MI300X': (1307, 654),
    'MI250X': (383, 96),
}


def triton_devices() -> tuple[str, ...]:
    """Return the types of devices that Triton's kernels run on; its interpreter needs no GPU."""
    if find_spec('triton') is None:
        return ()
    if os.environ.get('TRITON_INTERPRET') == '1':
        return 'cuda', 'cpu'
    return ('cuda',)


RUNS_ON = triton_devices()


# -------------------------------------------------------------------------------------------------
# device and dtype


def pick_device(device: str = 'auto') -> torch.device:
    """
    Return the torch.device of that name.

    'auto' is a CUDA GPU if there is one, else Apple's GPU, else the CPU. UserError for a device
    that is not there.
    """
    if device == 'auto':
        device = best_device()
    try:
        picked = torch.device(device)
    except RuntimeError:
        picked = None
    if picked is None:
        raise UserError(f'--device={device} is no device: use auto, cpu, cuda, cuda:1 or mps')
    if picked.type == 'cuda':
        check_cuda(picked)
    elif picked.type == 'mps':
        if not torch.backends.mps.is_available():
            raise UserError('--device=mps, but this is no Apple GPU: use --device=cpu (or auto)')
    elif picked.type != 'cpu':
        raise UserError(f'--device={device} is not supported: use auto, cpu, cuda, cuda:1 or mps')
    return picked


def best_device() -> str:
    if torch.cuda.is_available():
        return 'cuda'
    if torch.backends.mps.is_available():
        return 'mps'
    return 'cpu'


def check_cuda(device: torch.device) -> None:
    """Raise a UserError unless torch sees this CUDA GPU."""
    if not torch.cuda.is_available():
        raise UserError(
            f'--device={device}, but torch sees no CUDA GPU here: use --device=cpu (or auto), '
            'or check the driver'
        )
    count = torch.cuda.device_count()
    if (device.index or 0) >= count:
        raise UserError(f'--device={device}, but there are only {count} GPUs here')


def pick_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """
    Return the dtype of the residual stream.

    'auto': bfloat16 on a GPU that has it, float16 on one that has not, float32 on a CPU.
    'fast': as 'auto', but bfloat16 on a CPU that multiplies it in hardware.
    """
    if dtype == 'fast' and device.type == 'cpu' and torch.cpu._is_avx512_bf16_supported():
        return torch.bfloat16
    if dtype in ('auto', 'fast'):
        if device.type != 'cuda':
            return torch.float32
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16
        return torch.float16
    if dtype not in DTYPES:
        raise UserError(f'--dtype={dtype} is not known: use auto, fast, {", ".join(DTYPES)}')
    if dtype == 'float16' and device.type == 'cpu':
        raise UserError(
            '--dtype=float16 is too coarse to train without a gradient scaler, which the CPU has '
            'not: use float32 or bfloat16'
        )
    return DTYPES[dtype]


def describe(device: torch.device) -> str:
    """Return the name of the device, for logs and the footers of figures."""
    if device.type == 'cuda':
        return torch.cuda.get_device_name(device)
    if device.type == 'cpu':
        return f'CPU, {torch.get_num_threads()} threads'
    return 'Apple GPU'


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Return the peak FLOP/s of the device by its name, nan for a CPU and where PEAKS lacks it."""
    name = describe(device)
    for part, (half, single) in PEAKS.items():
        if part in name:
            teraflops = single if dtype == torch.float32 else half
            return 1e12 * teraflops
    return math.nan


# -------------------------------------------------------------------------------------------------
# memory


def host_memory() -> float:
    """Return the bytes of memory that this process may use, inf where the system does not say."""
    limits = [math.inf]
    with suppress(AttributeError, OSError, ValueError):  # Windows has no sysconf
        limits.append(os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE'))
    with suppress(OSError, ValueError):  # of a container; 'max' is no limit
        limits.append(int(Path('/sys/fs/cgroup/memory.max').read_text()))
    return min(limits)


def check_host_memory(needed: float, what: str, advice: str) -> None:
    """
    Raise a UserError where `what` needs more bytes than there are.

    Linux promises memory that it does not have and then kills the process that uses it, so that
    this has to be asked before.
    """
    available = host_memory()
    if needed > available:
        raise UserError(
            f'{what} needs at least {needed / 2**30:,.0f} GiB of memory, and there are '
            f'{available / 2**30:,.0f} GiB: {advice}'
        )


@contextmanager
def machine_errors(advice: str) -> Iterator[None]:
    """Turn an error of the machine (memory, compiler) into a UserError with this advice."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise UserError(f'out of memory {advice}') from None
        if reason := machine_failure(error):
            raise UserError(reason) from None
        raise


# -------------------------------------------------------------------------------------------------
# processes


def rank_and_world() -> tuple[int, int]:
    """Return the rank of this process and how many there are, as torchrun has set them: 0 and 1."""
    return int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))


def join_processes(
    device: torch.device, backend: str = 'auto'
) -> tuple[int, int, int, torch.device]:
    """
    Join the process group that torchrun made.

    Returns rank, world size, local rank and the device of this process: 0, 1, 0 and `device` where
    there is only one process. backend: 'auto', 'nccl' or 'gloo'.
    """
    rank, world = rank_and_world()
    local_rank = int(os.environ.get('LOCAL_RANK', 0))
    if backend not in ('auto', 'gloo', 'nccl'):
        raise UserError(f'--backend={backend} is not known: use auto, nccl or gloo')
    if backend == 'nccl' and device.type != 'cuda':
        raise UserError('--backend=nccl needs CUDA GPUs: use auto')
    if world > 1:
        if device.type == 'cuda':
            device = pick_device(f'cuda:{local_rank}')
            torch.cuda.set_device(device)
        if backend == 'auto':
            backend = 'nccl' if device.type == 'cuda' else 'gloo'
        hook = sys.excepthook
        store = store_of_attempt()
        torch.distributed.init_process_group(backend, store=store, rank=rank, world_size=world)
        # torch wraps the hook in its own, which prints nothing when ours ends the process.
        sys.excepthook = hook
    return rank, world, local_rank, device


def store_of_attempt() -> 'torch.distributed.Store | None':
    """
    Return the store in which the processes that torchrun has started find one another's addresses.

    torchrun keeps one store over all restarts. In it a process that is quick would find the address
    of one that was killed (PyTorch's issue 135712), so each attempt has names of its own. None
    where torch's way will do: without torchrun's store, and on several hosts, which count apart.
    """
    if os.environ.get('TORCHELASTIC_USE_AGENT_STORE') != 'True' or not on_one_host():
        return None
    address, port = os.environ['MASTER_ADDR'], int(os.environ['MASTER_PORT'])
    store = torch.distributed.TCPStore(address, port, is_master=False)
    attempt = os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')
    return torch.distributed.PrefixStore(f'attempt-{attempt}', store)


def all_agree(value: object, world: int) -> bool:
    """Return whether all processes of the group call this with the same value."""
    if world == 1:
        return True
    values = [None] * world
    torch.distributed.all_gather_object(values, value)
    return all(other == value for other in values)


def on_one_host() -> bool:
    """Return whether torchrun started all processes on this host."""
    return os.environ.get('LOCAL_WORLD_SIZE', '1') == os.environ.get('WORLD_SIZE', '1')


# -------------------------------------------------------------------------------------------------
# signals


class Signals:
    """
    Remember that a cluster's SIGTERM or SIGUSR1, a person's Ctrl-C (SIGINT) or the end of a
    terminal (SIGHUP) has come.

    name: the signal's name, '' before one comes. A second Ctrl-C is Python's own again: it stops
    the process at once. SIGINT and SIGHUP are left alone where they are ignored (as by nohup) or in
    other hands.
    """

    def __init__(self):
        self.name = ''
        self.interrupt_handler = signal.getsignal(signal.SIGINT)
        for name in ('SIGTERM', 'SIGUSR1'):
            if hasattr(signal, name):  # Windows has no SIGUSR1
                signal.signal(getattr(signal, name), self.remember)
        if self.handles_interrupt():
            signal.signal(signal.SIGINT, self.remember)
        if hasattr(signal, 'SIGHUP') and signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:
            signal.signal(signal.SIGHUP, self.remember)

    def handles_interrupt(self) -> bool:
        return self.interrupt_handler is signal.default_int_handler

    def remember(self, number, frame) -> None:
        self.name = signal.Signals(number).name
        if number == signal.SIGINT:
            signal.signal(number, self.interrupt_handler)
            # Not print, which may be at work when the signal comes.
            os.write(2, b'\nCtrl-C: this step is finished and saved; a second one stops at once\n')

    def ignore(self) -> None:
        """Let later signals pass, for a run that is over anyway."""
        if self.handles_interrupt():
            signal.signal(signal.SIGINT, self.interrupt_handler)
        if hasattr(signal, 'SIGUSR1'):
            signal.signal(signal.SIGUSR1, signal.SIG_IGN)


class StopVote:
    """
    Let all processes of a run agree, every few seconds, on whether to stop.

    They have to agree: one that stopped alone would leave the others waiting for it. How many steps
    lie between two votes comes from the time of a step, so a vote takes place at the same steps in
    all processes, and a signal to one is known to all within seconds, whatever is logged when.

        if vote.due(step) and vote.take(step):   # called after each step, by all processes
            ...                                  # vote.reason says why

    deadline: of time.monotonic(), at which a process wants to stop by itself.
    """

    SECONDS = 5.0  # between votes, as long as steps take what they took

    def __init__(self, signals: Signals, world: int, deadline: float = math.inf):
        self.signals, self.world, self.deadline = signals, world, deadline
        self.reason = ''
        self.restart(0)

    def restart(self, step: int) -> None:
        """Begin to count at `step`: the next vote is after one step more, which is timed."""
        self.first, self.began = step, time.monotonic()
        self.next = step + 1

    def due(self, step: int) -> bool:
        """Return whether the processes vote at this step. One process alone votes when it wants."""
        if self.world == 1:
            return self.wish() != ''
        return step >= self.next

    def take(self, step: int) -> bool:
        """Vote, and return whether a process wants to stop."""
        on_gpu = self.world > 1 and torch.distributed.get_backend() == 'nccl'
        if on_gpu:
            torch.cuda.synchronize()  # the host may be many steps ahead
        wish, now = self.wish(), time.monotonic()
        votes, seconds = float(wish != ''), (now - self.began) / max(1, step - self.first)
        self.first, self.began = step, now
        if self.world > 1:
            both = torch.tensor([votes, seconds], device='cuda' if on_gpu else 'cpu')
            torch.distributed.all_reduce(both)
            votes, seconds = both[0].item(), both[1].item() / self.world
        self.next = step + max(1, int(self.SECONDS / max(seconds, 1e-6)))
        if votes:
            self.reason = wish or 'a signal'
        return votes > 0

    def wish(self) -> str:
        """Return why this process wants to stop, '' where it does not."""
        if self.signals.name:
            return self.signals.name
        return 'max_minutes' if time.monotonic() > self.deadline else ''


# -------------------------------------------------------------------------------------------------
# the code


def commit() -> str:
    """
    Return the short hash of the code's commit, with a + when tracked files were changed since.

    The environment's NANOMLA_COMMIT is used before it, for code that was copied to a cluster
    without its git folder. 'unknown' without both.
    """
    if given := os.environ.get('NANOMLA_COMMIT'):
        return given
    try:
        commit = git('rev-parse', '--short', 'HEAD')
        changed = git('--no-optional-locks', 'status', '--porcelain', '--untracked-files=no')
    except (OSError, subprocess.CalledProcessError):
        return 'unknown'
    return commit + '+' if changed else commit


def git(*words: str) -> str:
    folder = Path(__file__).parent
    done = subprocess.run(['git', *words], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()
