"""
Measure training and decoding: python bench.py train | scale | race | decode [CONFIG] [--key=value]

    python bench.py train config/train_gpt2.py --batch_size=32 --peer=../nanoGPT --profile=True
    python bench.py scale config/train_gpt2.py --batch_size=32 --gpus=1,2
    python bench.py race config/train_shakespeare_mla.py --peer=../nanoGPT --goal=1.886
    python bench.py decode --models=mha,gqa,mqa,mla --caches=none,dense,paged --batch_sizes=1,64
    python bench.py decode --peer=../nanoGPT,transformers
    python bench.py decode --attention_only=True --cache_dtypes=auto,int8,int4

train times whole steps (forward, backward, clip, optimizer) on random tokens, beside a matrix
product and, with --peer, nanoGPT's own model and recipe, all in this process. scale times the same
step on 1, 2, ... GPUs of this host. race runs nanoGPT's train.py and then ours, each as a person
would, until val loss --goal. decode times prefill and decode steps with and without a cache, with
--peer whole texts beside nanoGPT's and transformers' generate, with --attention_only one layer's
attention. The code is in nanomla/benchmarks.
"""

# the measurement; the settings of train.py follow
peer = ''  # a checkout of nanoGPT to measure in the same run; decode: also transformers, or both
peer_batch_size = 32  # sequences in the peer's batch (train)
peer_args = ''  # the peer's own command line (race); '' = its README's recipe for this device
warmup_steps = 8  # steps before the clock starts
timed_steps = 12  # steps (decode: tokens) between two looks at the clock
repeats = 5  # how often; the median counts
profile = False  # add a table of where the time of a step goes (decode: with a cache)
vocabulary = 50257  # different tokens (train)
gpus = '1,2'  # scale: numbers of processes
micro_batches = '1'  # scale: batches of each process in a step, one number or several like 1,4
goal = 1.886  # race: the validation loss to reach
results = ''  # append the figures to this JSONL file
# decode: steps, or with --peer whole texts
models = 'mha,gqa,mqa,mla'  # random weights (gqa:4, mla:256+32 name widths), or checkpoints
caches = 'none,dense,paged'
cache_dtypes = 'auto'  # auto = the model's | float32 | bfloat16 | float16 | int8 | int4
page_size = 64  # tokens in a page of a paged cache: 16 | 64 | 128
batch_sizes = ''  # '' = 1,64 (CPU: 1,4; attention_only: 64, CPU: 4)
contexts = ''  # tokens of a sequence in the end; '' = 128 to 8192 (CPU: 512; attention_only: 8192)
decode_kernel = 'auto'  # of a new token: auto | triton | torch | flex | flashinfer | flashmla
prefill_chunk = 0  # tokens of each prompt in a pass; 0 = 32768 of all together
new_tokens = 496  # of whole texts, with --peer
prompt_tokens = 16  # they begin with
peer_new_tokens = 0  # of the peers' texts, to save time; 0 = new_tokens
peer_repeats = 3
keep = False  # measure only the rows that out_dir does not hold yet
plot_only = False  # draw the rows in out_dir (scale: those in --results) again, measure nothing
out_dir = 'out-bench'  # tables (csv, jsonl) and pictures
# one layer's attention; a shape is heads:key/value heads:width, for MLA heads:latent+k_pe
attention_only = False  # measure it by several kernels, in % of the copy bandwidth
attention_shapes = '12:12:64,12:4:64,12:1:64,16:128+32,16:256+32,16:512+64'
candidates = ''  # kernels whose names hold one of these words, like triton,sdpa; '' = all
tune = False  # try variants of our Triton kernel first and keep the fastest in tiles.json
ragged = False  # lengths between half of the context and all of it
# of train.py, with other defaults
gradient_accumulation_steps = 1

import difflib
import os
import sys

from nanomla.core.configurator import UserError, configure


def split_mode(arguments: list[str]) -> tuple[str, list[str]]:
    """Return the first argument where it is a word, '' where it is not, and the others."""
    if arguments and arguments[0].isidentifier():
        return arguments[0], arguments[1:]
    return '', arguments


if __name__ == '__main__':
    mode, arguments = split_mode(sys.argv[1:])
    config = configure(
        globals(),
        arguments,
        also='train.py',
        classes='attentions',
        takes='train | scale | race | decode [config/x.py ...]',
    )

# -------------------------------------------------------------------------------------------------
import subprocess
from pathlib import Path

import torch

from nanomla.benchmarks import peers
from nanomla.benchmarks.attention import choose_candidates, measure_attention, read_shapes
from nanomla.benchmarks.decode import facts, measure_fragmentation, measure_steps, summary
from nanomla.benchmarks.figures import draw_latency, draw_memory, draw_scaling
from nanomla.benchmarks.plan import make_plan
from nanomla.benchmarks.race import race
from nanomla.benchmarks.text import measure_texts
from nanomla.benchmarks.training import (
    Benchmark,
    measure_scaling,
    measure_training,
    scaling_rows,
)
from nanomla.core.checks import (
    check_range,
    content_errors,
    split_list,
    split_numbers,
)
from nanomla.core.configurator import Settings
from nanomla.core.devices import join_processes, pick_device, pick_dtype
from nanomla.core.figures import if_possible
from nanomla.core.files import ResultsTable

MODES = ('train', 'scale', 'race', 'decode')


def check_settings(mode: str, config: Settings) -> None:
    """Raise a UserError for what can be seen to be wrong before anything runs."""
    if mode not in MODES:
        raise UserError(mode_hint(mode))
    for name in ('peer_batch_size', 'timed_steps', 'repeats', 'vocabulary'):
        check_range(name, config[name], least=1)
    for name in ('batch_size', 'block_size', 'gradient_accumulation_steps'):
        check_range(name, config[name], least=1)
    for name in ('gpus', 'micro_batches'):
        numbers = split_numbers(f'--{name}', config[name])
        check_range(f'--{name}', min(numbers, default=0), least=1)
    whole_texts = mode == 'decode' and (config['peer'] or config['attention_only'])
    if config['profile'] and (mode == 'race' or whole_texts):
        raise UserError(
            '--profile=True goes with train, scale and the steps of decode: leave out --peer and '
            '--attention_only'
        )
    if mode == 'race' and not config['peer']:
        raise UserError('a race needs a peer: --peer=FOLDER, a checkout of nanoGPT')
    if mode == 'decode':
        checkouts = [name for name in split_list(config['peer']) if name != 'transformers']
    else:
        checkouts = [config['peer']] if config['peer'] else []
    for folder in checkouts:
        peers.check(folder)
    folder = Path(config['results']).absolute().parent
    if not folder.is_dir():
        raise UserError(f'--results={config["results"]}: there is no folder {folder}')


def mode_hint(mode: str) -> str:
    """Return what to say of a first argument that names nothing to measure."""
    command = f'python bench.py {" | ".join(MODES)} [config/x.py ...] [--key=value ...]'
    if not mode:
        return f'say what to measure: {command}'
    near = difflib.get_close_matches(mode, MODES, 1)
    if near:
        return f"'{mode}' is nothing to measure: did you mean {near[0]}?"
    return f"'{mode}' is nothing to measure: {command}"


def measure_decoding(config: Settings, device: torch.device) -> None:
    """Measure decode steps, whole texts or one layer's attention; write tables and pictures."""
    plan = make_plan(config, device)
    shapes = read_shapes(config['attention_shapes'])
    chosen = choose_candidates(config['candidates'])
    if config['attention_only']:
        name = 'attention'
    elif config['peer']:
        name = 'texts'
    else:
        name = 'decode'
    about = facts(device, plan.dtype)
    rows = ResultsTable(config['out_dir'], name, about, config['keep'])
    if config['attention_only']:
        measure_attention(plan, shapes, chosen, rows)
    elif config['peer']:
        measure_texts(plan, rows)
    else:
        measure_steps(plan, rows)
        measure_fragmentation(plan, rows)
        for line in summary(rows):
            print(line)
        with if_possible():
            draw_decoding(rows)
    print(f'rows: {rows.folder}/{rows.name}.csv and .jsonl')


def draw_again(mode: str, config: Settings) -> None:
    """Draw the pictures of rows that were measured before."""
    out = Path(config['out_dir'])
    if mode == 'scale' and config['results']:
        if not Path(config['results']).exists():
            raise UserError(f'--results={config["results"]}: there is no such file')
        with content_errors(config['results'], 'measure again with bench.py scale'):
            draw_scaling(scaling_rows(config['results']), out / 'scale.png')
        print(f'picture: {out}/scale.png')
    elif mode == 'decode' and (out / 'decode.jsonl').exists():
        with content_errors(out / 'decode.jsonl', 'measure again with bench.py decode'):
            draw_decoding(ResultsTable(out, 'decode', {}, keep=True))
    else:
        raise UserError(
            '--plot_only=True draws out_dir/decode.jsonl (decode) or the rows in --results (scale)'
        )


def draw_decoding(rows: ResultsTable) -> None:
    draw_latency(rows, rows.folder / 'latency.png')
    draw_memory(rows, rows.folder / 'memory.png')
    print(f'pictures: {rows.folder}/latency.png and memory.png')


def start_processes(count: int, arguments: list[str]) -> None:
    """Run `bench.py scale` in so many processes of this host, by torchrun."""
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone']
    command += [f'--nproc_per_node={count}', str(Path(__file__).resolve()), 'scale', *arguments]
    if subprocess.run(command).returncode:
        sys.exit(f'error: the run of {count} processes failed (its message is above)')


def main(mode: str, arguments: list[str], config: Settings) -> None:
    check_settings(mode, config)
    if config['plot_only']:
        draw_again(mode, config)
        return
    device = pick_device(config['device'])
    if device.type == 'cpu':
        config.apply_on_cpu()
    if mode == 'scale' and 'RANK' not in os.environ:
        start_processes(max(split_numbers('--gpus', config['gpus'])), arguments)
        return
    torch.set_float32_matmul_precision('high')
    rank, world = 0, 1
    if mode in ('train', 'scale'):
        rank, world, _, device = join_processes(device, config['backend'])
    dtype = pick_dtype(config['dtype'], device)
    bench = Benchmark(config, device, dtype, rank, world)
    if mode == 'train':
        measure_training(bench)
    elif mode == 'scale':
        measure_scaling(bench)
    elif mode == 'race':
        race(bench, arguments)
    else:
        measure_decoding(config, device)
    if world > 1:
        torch.distributed.destroy_process_group()


if __name__ == '__main__':
    main(mode, arguments, config)
