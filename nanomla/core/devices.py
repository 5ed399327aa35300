"""What a run runs on: device, dtype, peak rate, memory, and the commit of the code."""

import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed

from nanomla.core.configurator import UserError

DTYPES = dict(float32=torch.float32, bfloat16=torch.bfloat16, float16=torch.float16)

# Dense matrix rates by the vendors' datasheets in TFLOP/s: 16-bit, and TF32 (or plain fp32 where there is none).
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


def pick_device(device='auto'):
    """The torch.device to use. 'auto' takes a GPU, then Apple's, then the CPU; UserError for one that is not there."""
    if device == 'auto':
        device = (
            'cuda'
            if torch.cuda.is_available()
            else 'mps'
            if torch.backends.mps.is_available()
            else 'cpu'
        )
    try:
        device = torch.device(device)
    except RuntimeError:
        raise UserError(
            f'--device={device} is no device: use auto, cpu, cuda, cuda:1 or mps'
        ) from None
    if device.type == 'cuda' and not torch.cuda.is_available():
        raise UserError(
            f'--device={device}, but torch sees no CUDA GPU here: use --device=cpu (or auto), or check the driver'
        )
    if device.type == 'cuda' and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f'--device={device}, but there are only {torch.cuda.device_count()} GPUs here'
        )
    if device.type == 'mps' and not torch.backends.mps.is_available():
        raise UserError('--device=mps, but this is no Apple GPU: use --device=cpu (or auto)')
    if device.type not in ('cpu', 'cuda', 'mps'):
        raise UserError(f'--device={device} is not supported: use auto, cpu, cuda, cuda:1 or mps')
    return device


def join_processes(device, backend='auto'):
    """
    Under torchrun: joins the process group. Returns rank, world size, local rank and this process's
    device; alone: 0, 1, 0 and `device`.
    """
    rank, world, local_rank = (
        int(os.environ.get(name, default))
        for name, default in (('RANK', 0), ('WORLD_SIZE', 1), ('LOCAL_RANK', 0))
    )
    if backend not in ('auto', 'gloo', 'nccl') or backend == 'nccl' and device.type != 'cuda':
        raise UserError(
            f'--backend={backend} '
            + (
                'needs CUDA GPUs: use auto'
                if backend == 'nccl'
                else 'is not known: use auto, nccl or gloo'
            )
        )
    if world > 1:
        if device.type == 'cuda':
            device = pick_device(f'cuda:{local_rank}')
            torch.cuda.set_device(device)
        hook = sys.excepthook
        torch.distributed.init_process_group(
            backend if backend != 'auto' else 'nccl' if device.type == 'cuda' else 'gloo'
        )
        sys.excepthook = hook  # torch's own loses what a hook that ends the process has printed
    return rank, world, local_rank, device


def on_one_host():
    """True when torchrun started all processes on this host."""
    return os.environ.get('LOCAL_WORLD_SIZE', '1') == os.environ.get('WORLD_SIZE', '1')


def pick_dtype(dtype, device):
    """
    The dtype of the residual stream. 'auto': bfloat16 on a GPU that has it, float16 on one that has not,
    else float32. 'fast' is the same, but bfloat16 on a CPU that multiplies it in hardware, too.
    """
    if dtype == 'fast' and device.type == 'cpu' and torch.cpu._is_avx512_bf16_supported():
        return torch.bfloat16
    if dtype in ('auto', 'fast'):
        half = (
            'bfloat16'
            if device.type == 'cuda' and torch.cuda.is_bf16_supported(including_emulation=False)
            else 'float16'
        )
        return DTYPES[half if device.type == 'cuda' else 'float32']
    if dtype not in DTYPES:
        raise UserError(f'--dtype={dtype} is not known: use auto, fast, {", ".join(DTYPES)}')
    if dtype == 'float16' and device.type == 'cpu':
        raise UserError(
            '--dtype=float16 is too coarse to train without a gradient scaler, which the CPU has not: use float32 or bfloat16'
        )
    return DTYPES[dtype]


def describe(device):
    """The name of the device, for logs and the footers of figures."""
    if device.type == 'cuda':
        return torch.cuda.get_device_name(device)
    return f'CPU, {torch.get_num_threads()} threads' if device.type == 'cpu' else 'Apple GPU'


def peak_flops(device, dtype):
    """Peak FLOP/s of the device by its name, nan for one that the table lacks (and for every CPU)."""
    name = describe(device)
    for part, (half, single) in PEAKS.items():
        if part in name:
            return 1e12 * (single if dtype == torch.float32 else half)
    return math.nan


def commit():
    """
    Short hash of the code's commit, with + when files were changed since. NANOMLA_COMMIT goes before it: code that was
    copied to a cluster may lie in no git folder, or in one of another commit. 'unknown' without both.
    """
    if said := os.environ.get('NANOMLA_COMMIT'):
        return said

    def git(*words):
        return subprocess.run(
            ['git', *words], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git('rev-parse', '--short', 'HEAD') + (
            '+'
            if git('--no-optional-locks', 'status', '--porcelain', '--untracked-files=no')
            else ''
        )
    except (OSError, subprocess.CalledProcessError):
        return 'unknown'


class Signals:
    """
    The name of the SIGTERM, SIGUSR1 or SIGINT that has come, '' before: a cluster's way to say that time is up, and a person's
    Ctrl-C, of which a second one is Python's own again.
    """

    def __init__(self):
        self.name, self.old = '', signal.getsignal(signal.SIGINT)
        for name in ('SIGTERM', 'SIGUSR1', 'SIGINT'):
            if hasattr(signal, name) and (
                name != 'SIGINT' or self.old is signal.default_int_handler
            ):  # else it is in other hands, or ignored
                signal.signal(getattr(signal, name), self.remember)

    def remember(self, number, frame):
        self.name = signal.Signals(number).name
        if number == signal.SIGINT:
            signal.signal(number, self.old)
            os.write(2, b'\nCtrl-C: this step is finished and saved; a second one stops at once\n')

    def ignore(self):
        if self.old is signal.default_int_handler:
            signal.signal(signal.SIGINT, self.old)
        if hasattr(signal, 'SIGUSR1'):
            signal.signal(signal.SIGUSR1, signal.SIG_IGN)
