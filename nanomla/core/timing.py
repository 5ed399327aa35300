"""Seconds and bytes: timing on a CPU and on a GPU, peak memory, rates of matrix products."""

import gc
import os
import statistics
import time
from contextlib import contextmanager
from pathlib import Path

import torch

from nanomla.core.configurator import UserError


def peak_memory(device):
    """Most bytes in use so far: allocated by torch on a GPU, resident in the process on a CPU."""
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if os.uname().sysname == 'Darwin' else most * 1024


def synchronize(device):
    if device.type != 'cpu':
        getattr(torch, device.type).synchronize()


def seconds(device, run):
    """Seconds that run() takes: between two events on a CUDA GPU's own clock, by this process's clock elsewhere."""
    if device.type == 'cuda':
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3
    synchronize(device)
    begin = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - begin


def spread(name, times, scale=1.0):
    """{name, name_least, name_most}: the median, least and most of `times`, times `scale`."""
    return {
        name: statistics.median(times) * scale,
        f'{name}_least': min(times) * scale,
        f'{name}_most': max(times) * scale,
    }


def attempt(run, device):
    """run() with reason='', or only the reason why it cannot be: no memory, or a UserError."""
    try:
        return run() | dict(reason='')
    except UserError as error:
        reason = str(error)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and 'memory' not in str(
            error
        ):
            raise
        reason = 'out of memory: ' + (
            ' '.join(str(error).split('. GPU')[0].rpartition('DefaultCPUAllocator: ')[2].split())[
                :120
            ]
            or 'MemoryError'
        )
    release(device)  # not while the error still holds its frames, and these their tensors
    return dict(reason=reason)


def release(device):
    """Memory that nobody holds goes back to the card."""
    if device.type == 'cuda':
        gc.collect()
        torch.cuda.empty_cache()


def watch_memory(device):
    """From here on peaks are counted anew. Returns the bytes in use now (0 on a CPU)."""
    release(device)
    if device.type == 'cuda':
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    try:
        Path('/proc/self/clear_refs').write_text('5')  # Linux: the peak of resident memory
    except OSError:
        pass
    return 0


def peaks(device):
    """Most bytes since watch_memory: in tensors (on a CPU: resident in the process), and taken from the card (None on a CPU)."""
    reserved = torch.cuda.max_memory_reserved(device) if device.type == 'cuda' else None
    return dict(peak_allocated=peak_memory(device), peak_reserved=reserved)


class Clock:
    """Seconds of each step, by CUDA events on a GPU: `tick` between two steps, nothing waits until `seconds`."""

    def __init__(self, device):
        self.cuda, self.ticks = device.type == 'cuda', []
        self.tick()

    def tick(self):
        if self.cuda:
            self.ticks.append(torch.cuda.Event(enable_timing=True))
            self.ticks[-1].record()
        else:
            self.ticks.append(time.perf_counter())

    def seconds(self):
        if not self.cuda:
            return [b - a for a, b in zip(self.ticks, self.ticks[1:])]
        torch.cuda.synchronize()
        return [a.elapsed_time(b) / 1e3 for a, b in zip(self.ticks, self.ticks[1:])]


def tidy(device):
    """
    Nothing of an earlier phase is left on the GPU, and of cuBLAS not its workspaces (32 MiB for every stream it ever met, those of recorded
    decoding among them), which a recording that still lives would miss. Not between two timed steps: allocating anew takes time.
    """
    if device.type == 'cuda':
        gc.collect()
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()


@contextmanager
def phase(name, memory, device, clean=True):
    """Notes in `memory` the most bytes allocated and reserved meanwhile (on a CPU: resident in the process so far)."""
    if clean:
        tidy(device)
    if device.type == 'cuda':
        torch.cuda.reset_peak_memory_stats(device)
    yield
    synchronize(device)
    peak = (
        [torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)]
        if device.type == 'cuda'
        else [peak_memory(device)] * 2
    )
    memory[name] = [max(a, b) for a, b in zip(peak, memory.get(name, (0, 0)))]


def matmul_rate(device, dtype):
    """FLOP/s of a large matrix product of random numbers."""
    n, times = (8192, 20) if device.type == 'cuda' else (512, 3)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    a @ b
    clock = Clock(device)
    for _ in range(times):
        a @ b
    clock.tick()
    return 2 * n**3 * times / sum(clock.seconds())
