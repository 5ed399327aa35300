"""
Measure training and decoding: python bench.py train | scale | race | decode [config/x.py ...] [--key=value ...]

    python bench.py train config/train_gpt2.py --batch_size=32 --peer=../nanoGPT --profile=True
    python bench.py scale config/train_gpt2.py --batch_size=32 --gpus=1,2
    python bench.py race config/train_shakespeare_mla.py --peer=../nanoGPT --goal=1.886
    python bench.py decode --models=mha,gqa,mqa,mla --caches=none,dense,paged --batch_sizes=1,64
    python bench.py decode --peer=../nanoGPT,transformers
    python bench.py decode --attention_only=True --cache_dtypes=auto,int8,int4

train times whole steps (forward, backward, clip, optimizer) on random tokens, beside a matrix product
and, with --peer, nanoGPT's own model and recipe, all in this process. scale times the same step on 1, 2, ...
GPUs of this host. race runs nanoGPT's train.py and then ours, each as a person would, until val loss --goal.
decode times prefill and decode steps with and without a cache (decode_meter.py), with --peer whole texts beside
nanoGPT's and transformers' generate, with --attention_only one layer's attention (attention_meter.py).
"""

# the measurement; the settings of train.py follow
peer = ''  # a checkout of nanoGPT to measure in the same run; decode: also transformers, or both with a comma
peer_batch_size = 32  # sequences in the peer's batch (train)
peer_args = (
    ''  # the peer's own command line (race); '' = its recipe for this device from its README
)
warmup_steps = 8  # steps before the clock starts
timed_steps = 12  # steps (decode: tokens) between two looks at the clock
repeats = 5  # how often; the median counts
profile = False  # add a table of where the time of a step goes
vocabulary = 50257  # different tokens (train)
gpus = '1,2'  # scale: numbers of processes
micro_batches = '1'  # scale: batches of each process in a step, one number or several like 1,4
goal = 1.886  # race: the validation loss to reach
results = ''  # append the figures to this JSONL file
# decode
models = 'mha,gqa,mqa,mla'  # the shape of the settings with random weights (gqa:4, mla:256+32 name widths), or checkpoints; with --peer: mha
caches = 'none,dense,paged'
cache_dtypes = 'auto'  # auto = the model's | float32 | bfloat16 | float16 | int8 | int4
page_size = 64  # tokens in a page of a paged cache: 16 | 64 | 128
batch_sizes = ''  # '' = 1,64 (CPU: 1,4; attention_only: 64, CPU: 4)
contexts = ''  # tokens a sequence holds in the end; '' = 128 to 8192 (CPU: 128 to 512; attention_only: 8192, CPU: 256)
decode_kernel = 'auto'  # attention of a new token over a cache, as in sample.py: auto | triton | torch | flex | flashinfer | flashmla
prefill_chunk = 0  # tokens of each prompt in a pass; 0 = 32768 of all together
new_tokens = 496  # of whole texts, with --peer
prompt_tokens = 16  # they begin with
peer_new_tokens = 0  # of the peers' texts, to save time; 0 = new_tokens
peer_repeats = 3
attention_only = (
    False  # the decode attention of one layer alone, by several kernels, in % of the copy bandwidth
)
attention_shapes = '12:12:64,12:4:64,12:1:64,16:128+32,16:256+32,16:512+64'  # heads:key/value heads:width; MLA heads:latent+k_pe
candidates = (
    ''  # attention_only: those whose names hold one of these words, like triton,sdpa; '' = all
)
tune = False  # attention_only: try variants of our kernel first and keep the fastest in decode_tiles.json
ragged = False  # attention_only: lengths between half of the context and all of it
keep = False  # measure only the rows that out_dir does not hold yet
out_dir = 'out-bench'  # scale.png; decode.csv, decode.jsonl, latency.png, memory.png; texts.* with --peer, attention.* with --attention_only
# of train.py, with other defaults
gradient_accumulation_steps = 1

import sys

from nanomla.core.configurator import UserError, configure

mode = (
    sys.argv.pop(1)
    if len(sys.argv) > 1 and sys.argv[1] in ('train', 'scale', 'race', 'decode')
    else ''
)
config = configure(globals(), also='train.py')
if not mode:
    raise UserError(
        'say what to measure: python bench.py train | scale | race | decode [config/x.py ...] [--key=value ...]'
    )

# ---------------------------------------------------------------------------------------------------
import contextlib
import gc
import json
import os
import re
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from nanomla.benchmarks import peers, scale_figure
from nanomla.checkpoints import native as checkpoint
from nanomla.core import devices as machine
from nanomla.core import timing
from nanomla.core import token_files as datasets
from nanomla.training.batches import Dataset
from nanomla.training.trainer import Trainer

HERE = Path(__file__).resolve().parent
GROUPS = (
    ('all-reduce', 'nccl|allreduce|all_reduce'),
    ('attention', 'sdpa|flash|fmha|attention|dot_do_o|convert_dq'),
    ('optimizer', 'multi_tensor_apply|adam|lerp|foreach'),
    ('matmul', 'gemm|nvjet|cutlass|splitk|aten::mm|addmm|bmm|matmul'),
    ('loss', 'softmax_rows|fp8_tiles|cross_entropy|log_softmax|nll_loss|loss'),
    ('copies', 'memcpy|memset|copy_kernel'),
)


def report(**numbers):
    """Print the figures of one measurement and append them to --results."""
    numbers |= dict(
        commit=machine.commit(), torch=torch.__version__, device=machine.describe(device)
    )
    if results:
        with open(results, 'a') as file:
            file.write(json.dumps(numbers) + '\n')
    return numbers


def matmul_rate():
    """FLOP/s of one large matrix product of random numbers in the dtype of the stream: what the device can do today."""
    n = 8192 if device.type == 'cuda' else 2048
    a, b = (torch.randn(n, n, device=device, dtype=stream) for _ in range(2))
    return 2 * n**3 / median_seconds(lambda i: a @ b, 20 if device.type == 'cuda' else 3)[0]


def median_seconds(step, steps):
    """Median, least and most seconds of one step(i), over `repeats` runs of `steps` after a warm-up."""
    for i in range(min(warmup_steps, steps)):
        step(i)
    times = []
    for _ in range(repeats):
        timing.synchronize(device)
        begin = time.perf_counter()
        for i in range(steps):
            step(i)
        timing.synchronize(device)
        times.append((time.perf_counter() - begin) / steps)
    return statistics.median(times), min(times), max(times)


def time_peer(folder, data):
    """nanoGPT's step on this device: its model.py and its optimizer, with the autocast, compile and clipping of its train.py."""
    model = peers.nanogpt(folder, config, padded, device)
    with contextlib.redirect_stdout(None):
        optimizer = model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), device.type)
    forward = torch.compile(model) if config['compile'] else model
    half = (
        torch.amp.autocast(device.type, stream)
        if device.type == 'cuda'
        else contextlib.nullcontext()
    )

    def step(i):
        x, y = data.train_batch(i, 0, peer_batch_size)
        with half:
            _, loss = forward(x.contiguous(), y.contiguous())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    seconds = median_seconds(step, config['timed_steps'])
    memory = timing.peak_memory(device)
    return peer_batch_size * config['block_size'] / seconds[0], seconds, memory


def where_time_goes(step, seconds):
    """Milliseconds of a step by kind of kernel, from torch's profiler; what no kernel fills is a gap."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as watch
    from torch.profiler import schedule as plan

    on_gpu = device.type == 'cuda'
    with watch(
        activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU],
        schedule=plan(wait=0, warmup=1, active=3, repeat=1),
    ) as seen:
        for i in range(
            4
        ):  # the first does not count: in its all-reduce the processes wait for the profiler that starts last
            step(i)
            timing.synchronize(device)
            seen.step()
    table, kernels = (
        dict.fromkeys([name for name, _ in GROUPS] + ['norms, activations, other'], 0.0),
        [],
    )
    for kernel in (one for one in seen.key_averages() if not one.key.startswith('ProfilerStep')):
        ms = (kernel.self_device_time_total if on_gpu else kernel.self_cpu_time_total) / 3e3
        table[
            next(
                (name for name, words in GROUPS if re.search(words, kernel.key, re.I)),
                'norms, activations, other',
            )
        ] += ms
        kernels.append((ms, kernel.key))
    head = (
        [median_seconds(lambda i: product(), 5)[0] * 1e3 for product in head_products()]
        if on_gpu
        else []
    )
    table['head matmul (timed alone)'] = sum(head)
    table['matmul'] -= sum(head)
    table['gaps'] = 1e3 * seconds - sum(table.values())
    return table, sorted(kernels, reverse=True)[:25]


def head_products():
    """The three matrix products of the head: logits, and the gradients of its input and its weight."""
    n = config['batch_size'] * config['block_size']
    x, w, d = (
        torch.randn(*shape, device=device, dtype=stream)
        for shape in ((n, config['n_embd']), (padded, config['n_embd']), (n, padded))
    )
    return lambda: x @ w.T, lambda: d @ w, lambda: d.T @ x


def random_tokens(world):
    with tempfile.TemporaryDirectory() as folder:
        with datasets.TokenWriter(folder, config['vocabulary']) as files:
            random = np.random.default_rng(0)
            files.add('train', random.integers(0, config['vocabulary'], 2**20))
            files.add('val', random.integers(0, config['vocabulary'], 2**16))
            files.publish(dict(tokenizer='gpt2', source='random tokens'))
        return Dataset(folder, config['block_size'], device=device, rank=rank, world=world)


def new_model():
    torch.manual_seed(0)
    model = (
        checkpoint.new_model(config['attention'], config, config.given, config['vocabulary'])
        .to(device)
        .train()
    )
    model.stream = stream
    model.check_kernel(device)
    return model


def time_step(model, rate, world, batches, group=None, theirs=None):
    """The step of `model`, each process of `group` with its share of `batches`: printed by the first of them, and its row."""
    settings = {**config, 'gradient_accumulation_steps': batches}
    model.__dict__.pop('embed', None)  # what an earlier Trainer compiled
    trainer = Trainer(settings, model, random_tokens(world), group=group)
    first = timing.seconds(device, lambda: trainer.update(0))
    seconds, least, most = median_seconds(
        trainer.update, -(-timed_steps * world // batches) if mode == 'scale' else timed_steps
    )
    speed, memory = (
        batches * config['batch_size'] * config['block_size'] / seconds,
        timing.peak_memory(device),
    )
    flops, name = (
        model.flops_per_token(config['block_size']),
        f'{config["attention"].upper()} {model.num_params() / 1e6:.1f}M',
    )
    table, kernels = where_time_goes(trainer.update, seconds) if profile else ({}, [])
    ranks = [dict(ms=1e3 * seconds, peak_memory=memory)] * world
    if world > 1:
        torch.distributed.all_gather_object(ranks, ranks[0], group=group)
    if main:
        print(
            f'{name} batch {config["batch_size"]}: {1e3 * seconds:8.2f} ms a step ({1e3 * least:.2f} to {1e3 * most:.2f}), {speed / 1e3:8.1f}k tok/s, '
            f'{memory / 2**30:.1f} GiB, {100 * flops * speed / (rate * world):.1f} % of the matrix product, first step {first:.1f} s'
            + (f', {speed / theirs:.3f} x nanoGPT' if theirs else ''),
            flush=True,
        )
        print(
            *(
                f'  {ms:8.2f} ms  {ms / (10 * seconds):5.1f} %  {part}\n'
                for part, ms in sorted(table.items(), key=lambda row: -row[1])
            ),
            *(f'      {ms:8.3f} ms  {kernel[:110]}\n' for ms, kernel in kernels),
            sep='',
            end='',
            flush=True,
        )
    mfu = flops * speed / (machine.peak_flops(device, stream) * world)
    return dict(
        what=name,
        world=world,
        ranks=ranks,
        config={
            key: value
            for key, value in settings.items()
            if key not in ('peer', 'results', 'out_dir')
        },
        tok_per_s=speed,
        ms=1e3 * seconds,
        ms_least=1e3 * least,
        ms_most=1e3 * most,
        peak_memory=memory,
        mfu=None if np.isnan(mfu) else mfu,
        matmul_tflops=rate / 1e12,
        mfu_of_matmul=flops * speed / (rate * world),
        first_step_s=first,
        ratio_to_peer=speed / theirs if theirs else None,
        profile=table,
    )


def train():
    rate, theirs = matmul_rate(), None
    if main:
        print(
            f'{machine.describe(device)}, {str(stream)[6:]}: a matrix product runs at {rate / 1e12:.1f} TFLOP/s'
        )
    if peer:
        theirs, (seconds, least, most), memory = time_peer(peer, random_tokens(world))
        print(
            f'nanoGPT   batch {peer_batch_size}: {1e3 * seconds:8.2f} ms a step ({1e3 * least:.2f} to {1e3 * most:.2f}), {theirs / 1e3:8.1f}k tok/s, {memory / 2**30:.1f} GiB'
        )
        report(
            what='nanoGPT',
            batch_size=peer_batch_size,
            tok_per_s=theirs,
            ms=1e3 * seconds,
            ms_least=1e3 * least,
            ms_most=1e3 * most,
            peak_memory=memory,
        )
        gc.collect()
        if device.type == 'cuda':
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        torch._dynamo.reset()
    row = time_step(new_model(), rate, world, config['gradient_accumulation_steps'], theirs=theirs)
    if main:
        report(**row)


def scale():
    """The same step on 1, 2, ... GPUs (or CPU processes) of this host, one after the other, `micro_batches` of batch_size on each."""
    counts = [int(n) for n in gpus.split(',')]
    if 'RANK' not in os.environ:
        command = [
            sys.executable,
            '-m',
            'torch.distributed.run',
            '--standalone',
            f'--nproc_per_node={max(counts)}',
            str(HERE / 'bench.py'),
            'scale',
            *sys.argv[1:],
        ]
        if subprocess.run(command).returncode:
            sys.exit(f'error: the run of {max(counts)} processes failed (its message is above)')
        return
    rate, model, rows = matmul_rate(), new_model(), []
    Trainer({**config, 'gradient_accumulation_steps': 1}, model, random_tokens(1)).update(
        0
    )  # all compile at once
    some = {n: torch.distributed.new_group(list(range(n))) for n in counts} if world > 1 else {}
    everybody = (
        torch.distributed.new_group(backend='gloo') if world > 1 else None
    )  # who waits here leaves its GPU alone
    for micro, n in ((int(micro), n) for micro in micro_batches.split(',') for n in counts):
        if rank < n:
            row = time_step(model, rate, n, n * micro, some.get(n) if n > 1 else None)
            gc.collect()
        if main:
            base = next(
                (
                    one['tok_per_s'] / one['processes']
                    for one in rows
                    if one['micro_batches'] == micro
                ),
                row['tok_per_s'] / n,
            )
            rows.append(
                report(
                    **row
                    | dict(
                        model=row['what'],
                        what='scale',
                        processes=n,
                        micro_batches=micro,
                        speedup=row['tok_per_s'] / base,
                    )
                )
            )
            print(
                f'{n} processes: {row["tok_per_s"] / 1e3:.1f}k tok/s, {row["tok_per_s"] / base:.3f} x one, efficiency {100 * row["tok_per_s"] / base / n:.1f} %, '
                f'peak memory a process {max(one["peak_memory"] for one in row["ranks"]) / 2**30:.1f} GiB\n',
                flush=True,
            )
        if world > 1:
            torch.distributed.barrier(group=everybody)
    if main:
        if results:  # with earlier models
            rows = [
                row
                for row in map(json.loads, Path(results).read_text().splitlines())
                if row['what'] == 'scale' and 'micro_batches' in row
            ]
        scale_figure.draw(rows, f'{out_dir}/scale.png')
        print(f'picture: {out_dir}/scale.png')


def race():
    """Seconds until val loss `goal`: nanoGPT's train.py, then ours, as processes of their own, one after the other."""
    text = datasets.DATA / 'shakespeare_char' / 'input.txt'
    datasets.prepare_if_missing('shakespeare_char')
    if not text.exists():
        raise UserError(f'a race needs tiny Shakespeare: {text} is missing')
    import pickle

    theirs = Path(peer, 'data', 'shakespeare_char')
    meta = datasets.read_meta(text.parent)
    for split in ('train', 'val'):
        (theirs / f'{split}.bin').write_bytes((text.parent / f'{split}.bin').read_bytes())
    (theirs / 'meta.pkl').write_bytes(
        pickle.dumps(
            dict(
                vocab_size=meta['vocab_size'],
                stoi={c: i for i, c in enumerate(meta['chars'])},
                itos=dict(enumerate(meta['chars'])),
            )
        )
    )
    recipe = peer_args or (
        '--max_iters=2000'
        if device.type == 'cuda'
        # it overfits from 1 750 on
        else '--device=cpu --compile=False --eval_iters=20 --log_interval=1 --block_size=64 --batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 '
        '--max_iters=2000 --lr_decay_iters=2000 --dropout=0.0'
    )
    begin = time.perf_counter()
    told = subprocess.run(
        [sys.executable, 'train.py', 'config/train_shakespeare_char.py', *recipe.split()],
        cwd=peer,
        capture_output=True,
        text=True,
    )
    if told.returncode:
        raise UserError(f"the peer's train.py failed: {told.stderr.strip().splitlines()[-1]}")
    whole = time.perf_counter() - begin
    step_ms = statistics.median(
        float(ms) for ms in re.findall(r'^iter \d+: loss .*?, time ([\d.]+)ms', told.stdout, re.M)
    )  # without evaluations
    evals = [
        (int(step), float(val))
        for step, val in re.findall(
            r'^step (\d+): train loss [\d.]+, val loss ([\d.]+)', told.stdout, re.M
        )
    ]
    best_step, best = min(evals, key=lambda row: row[1])
    reached = next((step for step, val in evals if val <= goal), None)
    step, val = (best_step, best) if reached is None else (reached, dict(evals)[reached])
    print(
        f'nanoGPT: val {val:.4f} at step {step} after {step * step_ms / 1e3:.1f} s of training ({step_ms:.2f} ms a step); '
        f'best val {best:.4f} at step {best_step}; the whole process took {whole:.1f} s',
        flush=True,
    )
    report(
        what='race, nanoGPT',
        args=recipe,
        goal=goal,
        reached_step=reached,
        best=best,
        best_step=best_step,
        train_seconds=step * step_ms / 1e3,
        process_seconds=whole,
    )
    words = [
        word for word in sys.argv[1:] if not word.startswith(('--peer', '--goal', '--results'))
    ]
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        if subprocess.run(
            [
                sys.executable,
                str(HERE / 'train.py'),
                *words,
                f'--out_dir={folder}/run',
                '--init_from=scratch',
            ]
        ).returncode:
            sys.exit('error: train.py failed (its message is above)')
        whole = time.perf_counter() - begin
        lines = [
            json.loads(line) for line in Path(folder, 'run', 'log.jsonl').read_text().splitlines()
        ]
    evals = [line for line in lines if line['event'] == 'eval']
    reached = next((line for line in evals if line['val_loss'] <= goal), None)
    best = min(evals, key=lambda line: line['val_loss'])
    line = reached or best
    speed = [
        event for event in lines if event['event'] == 'train' and event['step'] <= line['step']
    ][-1]['tok_per_s']
    seconds = line['tokens'] / speed  # as for the peer: all steps, without start-up and evaluations
    print(
        f'nanoMLA: val {line["val_loss"]:.4f} at step {line["step"]} after {seconds:.1f} s of training, {line["seconds"]:.1f} s since its start; '
        f'best val {best["val_loss"]:.4f}; the whole process took {whole:.1f} s'
    )
    report(
        what='race, nanoMLA',
        args=' '.join(words),
        goal=goal,
        reached_step=line['step'] if reached else None,
        best=best['val_loss'],
        best_step=best['step'],
        train_seconds=seconds,
        seconds=line['seconds'],
        process_seconds=whole,
    )


def decode():
    from nanomla.benchmarks import attention as attention_meter
    from nanomla.benchmarks import decode as decode_meter
    from nanomla.benchmarks import figures as decode_figures
    from nanomla.benchmarks import text as text_meter
    from nanomla.core.files import ResultsTable

    plan, chosen = decode_meter.Plan(config, device), attention_meter.named(candidates)
    rows = ResultsTable(
        out_dir,
        'attention' if attention_only else 'texts' if peer else 'decode',
        decode_meter.facts(device, stream),
        keep,
    )
    if attention_only:
        attention_meter.measure(plan, chosen, rows)
    elif peer:
        text_meter.texts(plan, rows)
    else:
        decode_meter.cells(plan, rows)
        decode_meter.fragmentations(plan, rows)
        print(*decode_meter.answers(rows), sep='\n')
        decode_figures.latency(rows, f'{out_dir}/latency.png')
        decode_figures.memory(rows, f'{out_dir}/memory.png')
    print(
        f'rows: {out_dir}/{rows.name}.csv and .jsonl'
        + (', pictures: latency.png and memory.png' if rows.name == 'decode' else '')
    )


for name in (
    'peer_batch_size',
    'timed_steps',
    'repeats',
    'vocabulary',
    'batch_size',
    'block_size',
    'gradient_accumulation_steps',
):
    if config[name] < 1:
        raise UserError(f'{name}={config[name]} must be at least 1')
if mode == 'race' and not peer:
    raise UserError('a race needs somebody to race against: --peer=FOLDER, a checkout of nanoGPT')
if peer:
    peers.check(
        peer.split(',') if mode == 'decode' else [peer], *['transformers'] * (mode == 'decode')
    )
for name in ('gpus', 'micro_batches'):
    if not re.fullmatch(r'[1-9]\d*(,[1-9]\d*)*', str(config[name])):
        raise UserError(
            f'--{name}={config[name]}: write numbers with commas between them, like 1,2,4'
        )
if not Path(results).absolute().parent.is_dir():
    raise UserError(f'--results={results}: there is no folder {Path(results).parent}')
device = machine.pick_device(config['device'])
if device.type == 'cpu':
    config.apply_on_cpu()
rank, world, main = 0, 1, True
padded = -(-config['vocabulary'] // 64) * 64
torch.set_float32_matmul_precision('high')
if mode == 'train' or mode == 'scale' and 'RANK' in os.environ:
    rank, world, _, device = machine.join_processes(device, config['backend'])
    main = rank == 0
stream = machine.pick_dtype(config['dtype'], device)
dict(train=train, scale=scale, race=race, decode=decode)[mode]()
if world > 1:
    torch.distributed.destroy_process_group()
