"""Seconds and bytes: timing on a CPU and on a GPU, peak memory, rates of matrix products."""

import gc
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from nanomla.core.configurator import UserError

# -------------------------------------------------------------------------------------------------
# seconds


def synchronize(device: torch.device) -> None:
    """Wait until the device has done everything that was given to it."""
    if device.type != 'cpu':
        getattr(torch, device.type).synchronize()


def seconds(device: torch.device, run: Callable) -> float:
    """Return the seconds that run() takes, by a CUDA GPU's own clock where there is one."""
    if device.type == 'cuda':
        begin = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
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


class Clock:
    """
    Measure the seconds of each step: call `tick` between two steps.

    On a CUDA GPU the ticks are events, so that nothing waits for the GPU before `seconds`.
    """

    def __init__(self, device: torch.device):
        self.cuda = device.type == 'cuda'
        self.ticks = []
        self.tick()

    def tick(self) -> None:
        if self.cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.ticks.append(event)
        else:
            self.ticks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Return the seconds between every two ticks."""
        steps = zip(self.ticks, self.ticks[1:])
        if not self.cuda:
            return [end - begin for begin, end in steps]
        torch.cuda.synchronize()
        return [begin.elapsed_time(end) / 1e3 for begin, end in steps]


def median_and_range(name: str, times: Sequence[float], scale: float = 1.0) -> dict:
    """Return {name, name_least, name_most}: median, least and most of `times`, times `scale`."""
    return {
        name: statistics.median(times) * scale,
        f'{name}_least': min(times) * scale,
        f'{name}_most': max(times) * scale,
    }


def repeated_seconds(
    device: torch.device, step: Callable[[int], object], steps: int, repeats: int, warmup: int = 0
) -> list[float]:
    """
    Return `repeats` times the seconds of one step(i), each over the steps i = 0 to steps - 1.

    warmup: steps before the clock starts
    """

    def run():
        for i in range(steps):
            step(i)

    for i in range(warmup):
        step(i)
    return [seconds(device, run) / steps for _ in range(repeats)]


def matmul_rate(
    device: torch.device, dtype: torch.dtype, size: int = 0, repeats: int = 1, warmup: int = 1
) -> float:
    """
    Return the FLOP/s of a large matrix product of random numbers, the median of `repeats` looks.

    size: rows and columns of the matrices; 0 = 8192 on a GPU, 512 on a CPU
    """
    if device.type == 'cuda':
        size, steps = size or 8192, 20
    else:
        size, steps = size or 512, 3
    a = torch.randn(size, size, device=device, dtype=dtype)
    b = torch.randn(size, size, device=device, dtype=dtype)
    times = repeated_seconds(device, lambda i: a @ b, steps, repeats, warmup)
    return 2 * size**3 / statistics.median(times)


def copy_bandwidth(device: torch.device, repeats: int = 1, warmup: int = 3) -> float:
    """Return the bytes a second that a large copy reads and writes, both counted."""
    if device.type == 'cuda':
        size, copies = 2**30, 10
    else:
        size, copies = 2**26, 1
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = repeated_seconds(
        device, lambda i: target.copy_(source), copies, repeats, warmup=warmup * copies
    )
    return 2 * source.nbytes / statistics.median(times)


# -------------------------------------------------------------------------------------------------
# memory


def peak_memory(device: torch.device) -> int:
    """Return the most bytes in use so far: in torch's tensors on a GPU, in the process on a CPU."""
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if os.uname().sysname == 'Darwin':
        return most  # counted in bytes there, in KiB elsewhere
    return most * 1024


def reset_peak_memory(device: torch.device) -> int:
    """Count peaks anew from here on. Return the bytes in use now (0 on a CPU)."""
    free_memory(device)
    if device.type == 'cuda':
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    with suppress(OSError):  # Linux alone has it: the peak of resident memory
        Path('/proc/self/clear_refs').write_text('5')
    return 0


def peaks(device: torch.device) -> dict:
    """
    Return the most bytes since `reset_peak_memory` as columns of a table.

    peak_allocated: in tensors (on a CPU: resident in the process)
    peak_reserved:  taken from the GPU by torch (None on a CPU)
    """
    reserved = torch.cuda.max_memory_reserved(device) if device.type == 'cuda' else None
    return dict(peak_allocated=peak_memory(device), peak_reserved=reserved)


def free_memory(device: torch.device, workspaces: bool = False) -> None:
    """
    Give memory that holds no tensor back to the GPU.

    workspaces: those of cuBLAS, too: 32 MiB for every stream that it ever met. A CUDA graph that is
    still in use would miss its workspace. Not between two timed steps: allocating anew takes time.
    """
    if device.type != 'cuda':
        return
    gc.collect()
    if workspaces:
        torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()


@contextmanager
def record_peak_memory(
    name: str, memory: dict, device: torch.device, clean: bool = True
) -> Iterator[None]:
    """
    Set memory[name] to the most bytes allocated and reserved inside the `with`.

    A name that is used again keeps its largest numbers. On a CPU both are the most bytes that were
    resident in the process so far. clean: begin with free memory.
    """
    if clean:
        free_memory(device, workspaces=True)
    if device.type == 'cuda':
        torch.cuda.reset_peak_memory_stats(device)
    yield
    synchronize(device)
    allocated = reserved = peak_memory(device)
    if device.type == 'cuda':
        reserved = torch.cuda.max_memory_reserved(device)
    before = memory.get(name, (0, 0))
    memory[name] = [max(allocated, before[0]), max(reserved, before[1])]


def attempt(run: Callable[[], dict], device: torch.device) -> dict:
    """Return run() with reason='', or only the reason why it fails: no memory, or a UserError."""
    try:
        return run() | dict(reason='')
    except UserError as error:
        reason = str(error)
    except MemoryError as error:
        reason = f'out of memory: {first_sentence(str(error)) or "MemoryError"}'
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and 'memory' not in str(error):
            raise
        reason = f'out of memory: {first_sentence(str(error))}'
    # Not inside of the except: the error holds the frames, and these hold their tensors.
    free_memory(device)
    return dict(reason=reason)


def first_sentence(message: str) -> str:
    """Return torch's words of what could not be allocated, in one short line."""
    message = message.split('. GPU')[0].rpartition('DefaultCPUAllocator: ')[2]
    return ' '.join(message.split())[:120]
