"""
Time training steps: one model beside nanoGPT in this process, and the same step on more GPUs.

A step is forward, backward, clip and optimizer, on random tokens, as train.py's Trainer runs it.
"""

import contextlib
import gc
import re
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from model import GPT
from nanomla.benchmarks import figures, peers
from nanomla.checkpoints.native import new_model
from nanomla.core import devices
from nanomla.core.checks import settings_errors, split_numbers
from nanomla.core.configurator import Settings
from nanomla.core.figures import if_possible
from nanomla.core.files import appending, jsonl, read_appended, writing
from nanomla.core.timing import (
    matmul_rate,
    median_and_range,
    peak_memory,
    repeated_seconds,
    reset_peak_memory,
    seconds,
    synchronize,
)
from nanomla.core.token_files import TokenWriter
from nanomla.training.batches import Dataset
from nanomla.training.trainer import Trainer

TRAIN_TOKENS, VAL_TOKENS = 2**20, 2**16  # of the random dataset
MATMUL_SIZE_ON_CPU = 2048
PROFILED_STEPS = 3
KERNELS_SHOWN = 25
# Settings that say nothing about the step of a row.
NOT_IN_ROWS = ('peer', 'results', 'out_dir')

OTHER = 'norms, activations, other'
# Parts of a step, each with a pattern of its kernels' names; the first that fits counts.
PARTS = {
    'all-reduce': 'nccl|allreduce|all_reduce',
    'attention': 'sdpa|flash|fmha|attention|dot_do_o|convert_dq',
    'optimizer': 'multi_tensor_apply|adam|lerp|foreach',
    'matmul': 'gemm|nvjet|cutlass|splitk|aten::mm|addmm|bmm|matmul',
    'loss': 'softmax_rows|fp8_tiles|cross_entropy|log_softmax|nll_loss|loss',
    'copies': 'memcpy|memset|copy_kernel',
}


@dataclass
class Benchmark:
    """
    bench.py's settings, train.py's among them, and the process that measures them.

    dtype: of the residual stream
    """

    settings: Settings
    device: torch.device
    dtype: torch.dtype
    rank: int = 0
    world: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def padded_vocabulary(self) -> int:
        return -(-self.settings['vocabulary'] // 64) * 64

    def matmul_rate(self) -> float:
        """Return the FLOP/s of one large matrix product: what the device can do today."""
        size = 0
        if self.device.type == 'cpu':
            size = MATMUL_SIZE_ON_CPU
        repeats, warmup = self.settings['repeats'], self.settings['warmup_steps']
        return matmul_rate(self.device, self.dtype, size, repeats, warmup)

    def times(self, step: Callable[[int], object], steps: int) -> list[float]:
        """Return `repeats` times the seconds of step(i), over so many steps, after a warm-up."""
        warmup = min(self.settings['warmup_steps'], steps)
        return repeated_seconds(self.device, step, steps, self.settings['repeats'], warmup)


def write_row(bench: Benchmark, row: dict) -> dict:
    """Append the figures of one measurement to --results, and return them with their origin."""
    row = row | dict(
        commit=devices.commit(), torch=torch.__version__, device=devices.describe(bench.device)
    )
    path = bench.settings['results']
    if path:
        with writing(path), appending(path) as file:
            file.write(jsonl([row]))
    return row


def random_tokens(bench: Benchmark, world: int) -> Dataset:
    """Return a dataset of random tokens, this process's share of `world`."""
    vocabulary = bench.settings['vocabulary']
    with tempfile.TemporaryDirectory() as folder:
        with TokenWriter(folder, vocabulary) as files:
            random = np.random.default_rng(0)
            files.add('train', random.integers(0, vocabulary, TRAIN_TOKENS))
            files.add('val', random.integers(0, vocabulary, VAL_TOKENS))
            files.publish(dict(tokenizer='gpt2', source='random tokens'))
        return Dataset(
            folder,
            bench.settings['block_size'],
            device=bench.device,
            rank=bench.rank,
            world=world,
        )


def random_model(bench: Benchmark) -> GPT:
    """Return the model that the settings describe, with random weights."""
    settings = bench.settings
    torch.manual_seed(0)
    model = new_model(settings['attention'], settings, settings.given, settings['vocabulary'])
    model.to(bench.device).train()
    model.stream = bench.dtype
    with settings_errors():
        model.check_kernel(bench.device)
    return model


# -------------------------------------------------------------------------------------------------
# one step, ours and nanoGPT's


def measure_training(bench: Benchmark) -> None:
    """Time our step, with --peer after nanoGPT's in the same process: print and write both."""
    settings = bench.settings
    rate = bench.matmul_rate()
    if bench.is_main:
        dtype = str(bench.dtype).removeprefix('torch.')
        print(
            f'{devices.describe(bench.device)}, {dtype}: '
            f'a matrix product runs at {rate / 1e12:.1f} TFLOP/s'
        )
        if settings['compile']:
            print('compiling before the first step: about a minute', flush=True)
    peer_speed = None
    if settings['peer']:
        row = time_nanogpt(bench)
        peer_speed = row['tok_per_s']
        print(
            f'nanoGPT   batch {row["batch_size"]}: {times_text(row)}, '
            f'{row["peak_memory"] / 2**30:.1f} GiB'
        )
        write_row(bench, row)
        reset_peak_memory(bench.device)
        torch._dynamo.reset()
    batches = Batches(settings['gradient_accumulation_steps'], bench.world)
    row = time_step(bench, random_model(bench), rate, batches, peer_speed)
    if bench.is_main:
        write_row(bench, row)


def time_nanogpt(bench: Benchmark) -> dict:
    """
    Return the row of nanoGPT's step on this device: its model.py and its optimizer, with the
    autocast, compile and clipping of its train.py.
    """
    settings, device = bench.settings, bench.device
    batch_size = settings['peer_batch_size']
    data = random_tokens(bench, bench.world)
    model = peers.nanogpt(settings['peer'], settings, bench.padded_vocabulary, device)
    with contextlib.redirect_stdout(None):
        optimizer = model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), device.type)
    forward = model
    if settings['compile']:
        forward = torch.compile(model)

    def step(i):
        x, y = data.train_batch(i, 0, batch_size)
        with peers.autocast(device, bench.dtype):
            _, loss = forward(x.contiguous(), y.contiguous())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    times = bench.times(step, settings['timed_steps'])
    speed = batch_size * settings['block_size'] / statistics.median(times)
    return dict(
        what='nanoGPT',
        batch_size=batch_size,
        tok_per_s=speed,
        **median_and_range('ms', times, 1e3),
        peak_memory=peak_memory(device),
    )


@dataclass
class Batches:
    """The batches of one step: `count` in all, shared by `world` processes, those of `group`."""

    count: int
    world: int = 1
    group: dist.ProcessGroup | None = None  # None = all processes


def time_step(
    bench: Benchmark,
    model: GPT,
    rate: float,
    batches: Batches,
    peer_speed: float | None = None,
    steps: int = 0,
) -> dict:
    """
    Time the step of `model`; the first process prints it. Return its row.

    rate: FLOP/s of a matrix product; peer_speed: nanoGPT's tokens a second; steps: 0 = timed_steps
    """
    settings = {**bench.settings, 'gradient_accumulation_steps': batches.count}
    trainer = Trainer(settings, model, random_tokens(bench, batches.world), group=batches.group)
    first = seconds(bench.device, lambda: trainer.update(0))
    times = bench.times(trainer.update, steps or settings['timed_steps'])
    median = statistics.median(times)
    memory = peak_memory(bench.device)
    profile = StepProfile()
    if settings['profile']:
        profile = profile_step(bench, trainer.update, median)
    ranks = [dict(ms=1e3 * median, peak_memory=memory)] * batches.world
    if batches.world > 1:
        dist.all_gather_object(ranks, ranks[0], group=batches.group)

    speed = batches.count * settings['batch_size'] * settings['block_size'] / median
    flops = model.flops_per_token(settings['block_size']) * speed / batches.world  # of a process
    mfu = flops / devices.peak_flops(bench.device, bench.dtype)
    row = dict(
        what=f'{model.config.label} {model.num_params() / 1e6:.1f}M',
        world=batches.world,
        ranks=ranks,
        config={key: value for key, value in settings.items() if key not in NOT_IN_ROWS},
        tok_per_s=speed,
        **median_and_range('ms', times, 1e3),
        peak_memory=memory,
        mfu=None if np.isnan(mfu) else mfu,
        matmul_tflops=rate / 1e12,
        mfu_of_matmul=flops / rate,
        first_step_s=first,
        ratio_to_peer=speed / peer_speed if peer_speed else None,
        profile=profile.parts,
    )
    if bench.is_main:
        print(step_text(row), flush=True)
        for line in profile.lines(1e3 * median):
            print(line, flush=True)
    return row


def times_text(row: dict) -> str:
    return (
        f'{row["ms"]:8.2f} ms a step ({row["ms_least"]:.2f} to {row["ms_most"]:.2f}), '
        f'{row["tok_per_s"] / 1e3:8.1f}k tok/s'
    )


def step_text(row: dict) -> str:
    """Return the line that reports our step."""
    text = (
        f'{row["what"]} batch {row["config"]["batch_size"]}: {times_text(row)}, '
        f'{row["peak_memory"] / 2**30:.1f} GiB\n  '
        f'{100 * row["mfu_of_matmul"]:.1f} % of the matrix product, '
        f'first step {row["first_step_s"]:.1f} s'
    )
    if row['ratio_to_peer']:
        text += f', {row["ratio_to_peer"]:.3f} x nanoGPT'
    return text


# -------------------------------------------------------------------------------------------------
# where the time of a step goes


@dataclass
class StepProfile:
    """
    Milliseconds of one step.

    parts: part -> ms; with gaps, in which no kernel runs, they make the whole step
    kernels: (ms, name), the longest first
    """

    parts: dict[str, float] = field(default_factory=dict)
    kernels: list[tuple[float, str]] = field(default_factory=list)

    def lines(self, step_ms: float) -> list[str]:
        """Return the profile as lines of text, parts first."""
        parts = sorted(self.parts.items(), key=lambda part: -part[1])
        lines = []
        for name, ms in parts:
            lines.append(f'  {ms:8.2f} ms  {100 * ms / step_ms:5.1f} %  {name}')
        for ms, kernel in self.kernels:
            lines.append(f'      {ms:8.3f} ms  {kernel[:100]}')
        return lines


def profile_step(
    bench: Benchmark, step: Callable[[int], object], step_seconds: float
) -> StepProfile:
    """Return the profile of step(i), which takes `step_seconds`, from torch's profiler."""
    from torch.profiler import ProfilerActivity, profile, schedule

    on_gpu = bench.device.type == 'cuda'
    activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
    # The first step does not count: in its all-reduce the processes wait for the profiler that
    # starts last.
    once = schedule(wait=0, warmup=1, active=PROFILED_STEPS, repeat=1)
    with profile(activities=[activity], schedule=once) as profiler:
        for i in range(1 + PROFILED_STEPS):
            step(i)
            synchronize(bench.device)
            profiler.step()
    parts = dict.fromkeys([*PARTS, OTHER], 0.0)
    kernels = []
    for kernel in profiler.key_averages():
        if kernel.key.startswith('ProfilerStep'):
            continue
        microseconds = kernel.self_device_time_total if on_gpu else kernel.self_cpu_time_total
        ms = microseconds / (1e3 * PROFILED_STEPS)
        parts[part_of(kernel.key)] += ms
        kernels.append((ms, kernel.key))
    head_ms = 0.0
    if on_gpu:
        head_ms = 1e3 * head_seconds(bench)
    parts['head matmul (timed alone)'] = head_ms
    parts['matmul'] -= head_ms
    parts['gaps'] = 1e3 * step_seconds - sum(parts.values())
    return StepProfile(parts, sorted(kernels, reverse=True)[:KERNELS_SHOWN])


def part_of(kernel: str) -> str:
    """Return the part of a step that a kernel of this name belongs to."""
    for part, pattern in PARTS.items():
        if re.search(pattern, kernel, re.IGNORECASE):
            return part
    return OTHER


def head_seconds(bench: Benchmark) -> float:
    """
    Return the seconds of the head's three matrix products: logits, and the gradients of its input
    and its weight.
    """
    settings, V = bench.settings, bench.padded_vocabulary
    tokens, C = settings['batch_size'] * settings['block_size'], settings['n_embd']

    def random(rows, columns):
        return torch.randn(rows, columns, device=bench.device, dtype=bench.dtype)

    x, w, gradient = random(tokens, C), random(V, C), random(tokens, V)
    products = (lambda i: x @ w.T, lambda i: gradient @ w, lambda i: gradient.T @ x)
    return sum(statistics.median(bench.times(product, 5)) for product in products)


# -------------------------------------------------------------------------------------------------
# data parallelism


def measure_scaling(bench: Benchmark) -> None:
    """
    Time the same step on 1, 2, ... of the processes of this run, one number after the other, with
    `micro_batches` batches of each process in a step. The first process writes rows and a picture.
    """
    settings = bench.settings
    counts = split_numbers('gpus', settings['gpus'])
    rate, model = bench.matmul_rate(), random_model(bench)
    # All processes compile at once.
    alone = {**settings, 'gradient_accumulation_steps': 1}
    Trainer(alone, model, random_tokens(bench, 1)).update(0)
    groups, everybody = {}, None
    if bench.world > 1:
        groups = {n: dist.new_group(list(range(n))) for n in counts}
        everybody = dist.new_group(backend='gloo')  # who waits here leaves its GPU alone
    rows = []
    for micro_batches in split_numbers('micro_batches', settings['micro_batches']):
        for n in counts:
            if bench.rank < n:
                group = groups[n] if n > 1 else None
                batches = Batches(n * micro_batches, n, group)
                steps = -(-settings['timed_steps'] // micro_batches)
                row = time_step(bench, model, rate, batches, steps=steps)
                gc.collect()
            if bench.is_main:
                rows.append(write_row(bench, scaling_row(row, rows, n, micro_batches)))
                print(scaling_text(rows[-1]), flush=True)
            if bench.world > 1:
                dist.barrier(group=everybody)
    if bench.is_main:
        if settings['results']:  # with earlier models
            rows = scaling_rows(settings['results'])
        path = Path(settings['out_dir'], 'scale.png')
        with if_possible():
            figures.draw_scaling(rows, path)
            print(f'picture: {path}')


def scaling_row(row: dict, earlier: list[dict], processes: int, micro_batches: int) -> dict:
    """Return the row of time_step with its speed against that of one process."""
    base = row['tok_per_s'] / processes
    for one in earlier:
        if one['micro_batches'] == micro_batches:
            base = one['tok_per_s'] / one['processes']
            break
    return row | dict(
        model=row['what'],
        what='scale',
        processes=processes,
        micro_batches=micro_batches,
        speedup=row['tok_per_s'] / base,
    )


def scaling_text(row: dict) -> str:
    n, speedup = row['processes'], row['speedup']
    memory = max(rank['peak_memory'] for rank in row['ranks'])
    return (
        f'{n} processes: {row["tok_per_s"] / 1e3:.1f}k tok/s, {speedup:.3f} x one, '
        f'efficiency {100 * speedup / n:.1f} %, peak memory a process {memory / 2**30:.1f} GiB\n'
    )


def scaling_rows(path: str | Path) -> list[dict]:
    """Return the rows of `measure_scaling` in a results file."""
    rows = read_appended(path)
    return [row for row in rows if row.get('what') == 'scale' and 'micro_batches' in row]
