"""What a run runs on: device, dtype, processes, peak rates, signals, and the commit of the code."""

import math
import os
import signal
import subprocess
import sys
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


def join_processes(
    device: torch.device, backend: str = 'auto'
) -> tuple[int, int, int, torch.device]:
    """
    Join the process group that torchrun made.

    Returns rank, world size, local rank and the device of this process: 0, 1, 0 and `device` where
    there is only one process. backend: 'auto', 'nccl' or 'gloo'.
    """
    rank = int(os.environ.get('RANK', 0))
    world = int(os.environ.get('WORLD_SIZE', 1))
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
        torch.distributed.init_process_group(backend)
        # torch wraps the hook in its own, which prints nothing when ours ends the process.
        sys.excepthook = hook
    return rank, world, local_rank, device


def on_one_host() -> bool:
    """Return whether torchrun started all processes on this host."""
    return os.environ.get('LOCAL_WORLD_SIZE', '1') == os.environ.get('WORLD_SIZE', '1')


class Signals:
    """
    Remember that a cluster's SIGTERM or SIGUSR1, or a person's Ctrl-C (SIGINT) has come.

    name: the signal's name, '' before one comes. A second Ctrl-C is Python's own again: it stops
    the process at once. SIGINT is left alone where it is ignored or in other hands.
    """

    def __init__(self):
        self.name = ''
        self.interrupt_handler = signal.getsignal(signal.SIGINT)
        for name in ('SIGTERM', 'SIGUSR1'):
            if hasattr(signal, name):  # Windows has no SIGUSR1
                signal.signal(getattr(signal, name), self.remember)
        if self.handles_interrupt():
            signal.signal(signal.SIGINT, self.remember)

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
