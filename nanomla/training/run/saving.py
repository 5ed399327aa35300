"""
Write checkpoints in the background: training waits for a copy in memory, not for the disk.

    saver = BackgroundSaver(native.save)
    saver.reserve(checkpoint)      # takes the memory of its copy in the background
    saver.save({path: checkpoint, other_path: other_checkpoint})   # returns when both are copied
    saver.check()                                                  # RunError where writing failed
    saver.close()                                                  # waits; before the process ends

The copies are made one tensor after the other on the device's own stream, so they hold the state
at the call of `save`, whatever is trained while they are written. Their memory is kept for the
next save: the host needs as much as one save holds, beside the model.
"""

import ctypes
from collections import defaultdict
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

from nanomla.core.configurator import RunError, UserError


class HostCopies:
    """
    Copy tensors to the host, again and again, to the same memory.

    A tensor that appears twice (tied weights, weights that stand in two files) is copied once. On a
    machine with a CUDA GPU the memory is page-locked, which the GPU writes to at full speed.
    """

    def __init__(self):
        self.buffers = defaultdict(list)  # (shape, dtype, page-locked) -> tensors on the host

    def copy(self, content: object) -> object:
        """Return `content`, a nest of dicts, lists and tuples, with copies of its tensors."""
        copied = self.with_buffers(content, read=True)
        for device in self.devices:
            torch.cuda.current_stream(device).synchronize()
        return copied

    def reserve(self, content: object) -> None:
        """Take the memory of a copy of `content`, and touch it, so that the system gives it."""
        self.with_buffers(content, read=False)

    def with_buffers(self, content: object, read: bool) -> object:
        """Return `content` with buffers for its tensors, which hold their values if `read`."""
        self.read = read
        self.used = defaultdict(int)  # buffers of a kind that this copy holds
        self.copies = {}  # what was copied -> its copy
        self.devices = set()
        copied = self.copied(content)
        self.copies = {}
        return copied

    def copied(self, content: object) -> object:
        if isinstance(content, torch.Tensor):
            return self.copied_tensor(content.detach())
        if isinstance(content, dict):
            return {key: self.copied(value) for key, value in content.items()}
        if isinstance(content, (list, tuple)):
            return type(content)(self.copied(item) for item in content)
        return content

    def copied_tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        same = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
        if same not in self.copies or not tensor.numel():
            on_gpu = tensor.device.type == 'cuda'
            buffer = self.copies[same] = self.buffer(tensor, on_gpu)
            if self.read:
                buffer.copy_(tensor, non_blocking=on_gpu)
            else:
                touch(buffer)
            if on_gpu:
                self.devices.add(tensor.device)
        return self.copies[same]

    def buffer(self, tensor: torch.Tensor, pinned: bool) -> torch.Tensor:
        """Return memory of the host for a tensor, which this copy does not hold yet."""
        kind = (tensor.shape, tensor.dtype, pinned)
        number = self.used[kind]
        self.used[kind] += 1
        if number == len(self.buffers[kind]):
            made = torch.empty(tensor.shape, dtype=tensor.dtype, device='cpu', pin_memory=pinned)
            self.buffers[kind].append(made)
        return self.buffers[kind][number]


def touch(buffer: torch.Tensor) -> None:
    """
    Write zeros over a tensor on the host, so that the system gives its memory.

    By the C library: an operation of torch would start OpenMP threads of its own for the thread
    that calls it. With more threads than cores, OpenMP lets its threads sleep between operations,
    those of the training too, and a small model trained on a CPU at half its speed.
    """
    ctypes.memset(buffer.data_ptr(), 0, buffer.nbytes)


class BackgroundSaver:
    """
    Write checkpoints by a thread, one save at a time and its files in their order.

    write: writes one checkpoint, (path, content). What fails in the thread is raised as a RunError
    by the next call.
    """

    def __init__(self, write: Callable[[Path, dict], None]):
        self.write = write
        self.host_copies = HostCopies()
        self.thread = ThreadPoolExecutor(1, 'saver')  # Python waits for it when the process ends
        self.writing: Future | None = None

    def reserve(self, content: object) -> None:
        """Take the memory for a copy of such content in the background."""
        self.wait()
        self.writing = self.thread.submit(self.reserve_all, content)

    def reserve_all(self, content: object) -> None:
        try:
            self.host_copies.reserve(content)
        except (MemoryError, RuntimeError) as error:
            raise RunError(f'no memory to copy a checkpoint to: {error}') from error

    def save(self, checkpoints: Mapping[Path, dict]) -> None:
        """Copy the checkpoints and begin to write them. Waits until the save before is written."""
        self.wait()
        copies = self.host_copies.copy(dict(checkpoints))
        self.writing = self.thread.submit(self.write_all, copies)

    def write_all(self, copies: dict[Path, dict]) -> None:
        for path, checkpoint in copies.items():
            try:
                self.write(path, checkpoint)
            except UserError as error:
                raise RunError(error) from None
            except Exception as error:
                raise RunError(f'cannot write {path}: {type(error).__name__}: {error}') from error

    def check(self) -> None:
        """Raise the error of a save that has failed; does not wait for one under way."""
        if self.writing is not None and self.writing.done():
            self.wait()

    def wait(self) -> None:
        """Wait until everything is written."""
        if self.writing is not None:
            writing, self.writing = self.writing, None
            writing.result()

    def close(self) -> None:
        """Wait until everything is written, and end the thread."""
        try:
            self.wait()
        finally:
            self.thread.shutdown()
