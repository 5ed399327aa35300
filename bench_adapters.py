"""
Fine-tune under every attention kernel and compare: python bench_adapters.py MODEL CONFIG.json OUT [--key=value ...]

    python bench_adapters.py deepseek-ai/deepseek-coder-1.3b-base config/adapters.json runs/bench
    python bench_adapters.py random:deepseek-coder-1.3b config/adapters_speed.json runs/speed

MODEL is a name on the Hugging Face hub, a folder, or random:NAME. A cell is one adapter under one kernel, a process of its
own; its row is kept in OUT/cells, and a second run with the same settings does only what is missing.
"""

# the grid
adapters = 'full,lora,qlora'
kernels = 'eager,sdpa,flash,cudnn,flex,paged,mla'  # and latent, an exhibit that sees the future
peer = True  # the cells of transformers + PEFT beside ours
peer_kernels = 'sdpa'  # eager, sdpa, flash, flex
peer_checkpointing = True
cell = ''  # one cell in this process, by its name (lora/sdpa, lora/sdpa/peer) or number
show_grid = False  # print the cells and their numbers
report = False  # only gather what is there
# the model
block_size = 2048  # tokens of a row
dtype = 'auto'  # of the residual stream: auto, bfloat16, float32
master_weights = True  # full fine-tuning keeps fp32 weights and AdamW states; False: all in dtype
lora_r = 32
lora_alpha = 16
lora_dropout = 0.0
targets = 'all'  # Linears with adapters: all, or some of q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj
double_quant = True  # NF4's scales are quantised, too
mla_rank = 512  # 0: full, and with mla_rope_pairs=-1 exact
mla_rope_pairs = 32  # pairs with RoPE, shared by all heads
latents = 64  # of the exhibit
# the data
data = 'openorca'  # data/<name>, a folder with train.jsonl and val.jsonl, or 'random' tokens
n_train = 100
n_val = 20
template = 'marked'  # or 'joined': prompt and response one behind the other, and no end
completion_only = True  # only the response is learned
packing = True  # several documents in a row, each attending to itself
# training
batch_size = 4  # rows
accumulation = 1  # batches of an update
epochs = 3.0
steps = 0  # instead of epochs
warmup_steps = 3  # not timed
learning_rate = 0.0  # 0: 2e-5 full, 2e-4 with adapters
weight_decay = 0.0
grad_clip = 1.0
seed = 1337
seeds = 3  # runs of a cell
# speed
device = 'auto'
compile = False
recompute = 'none'  # none, selective, full
save_width = 1.0  # selective: products up to so many n_embd wide are kept
spared_layers = 0  # selective: the last so many layers keep all products
loss_chunk = 2048  # tokens whose logits exist at a time
max_new_tokens = 64
# what is told
profile = True
wandb_log = False  # offline, unless WANDB_MODE says otherwise
wandb_project = 'nanomla-adapters'

import json
import sys

from nanomla.core.configurator import UserError, configure

words = [word for word in sys.argv[1:] if not word.startswith('-')]
options = [word for word in sys.argv[1:] if word.startswith('-')]


def as_options(settings, path):
    """What a JSON object says, as --key=value."""
    if not isinstance(settings, dict) or any(
        isinstance(value, dict) or value is None for value in settings.values()
    ):
        raise UserError(
            f'{path}: settings are one object of key: value, and "per_adapter" an object of such objects'
        )
    return [
        f'--{key}={",".join(map(str, value)) if isinstance(value, list) else value}'
        for key, value in settings.items()
    ]


def configured(more=()):
    """The settings by the JSON file, `more` and the command line, in this order."""
    try:
        configure({'__file__': __file__}, [*given, *more])
    except UserError as error:
        raise UserError(f'{words[1]}: {str(error).removeprefix("--")}') from None
    return configure({'__file__': __file__}, [*given, *more, *options])


given, per_adapter = [], {}
configure({'__file__': __file__}, options)  # --help, and what is wrong there
if len(words) == 3:
    try:
        with open(words[1], encoding='utf-8') as file:
            said = json.load(file)
        per_adapter = said.pop('per_adapter', {}) if isinstance(said, dict) else {}
    except OSError as error:
        raise UserError(f'{words[1]}: cannot be read: {error.strerror}') from None
    except ValueError as error:
        raise UserError(f'{words[1]}: not JSON: {error}') from None
    given = as_options(said, words[1])
elif words:
    raise UserError(
        f'give MODEL CONFIG.json OUT, not {" ".join(words)}: python bench_adapters.py random:tiny config/adapters.json runs/bench'
    )
else:
    raise UserError(
        'give MODEL CONFIG.json OUT: python bench_adapters.py random:deepseek-coder-1.3b config/adapters.json runs/bench'
    )
config = configured()
globals().update(config)
ALL = dict(
    adapters=('full', 'lora', 'qlora'),
    kernels=('eager', 'sdpa', 'flash', 'cudnn', 'flex', 'paged', 'mla', 'latent'),
    peer_kernels=('eager', 'sdpa', 'flash', 'flex'),
)


def chosen(name):
    values = [value.strip() for value in config[name].split(',') if value.strip()]
    for value in values:
        if value not in ALL[name]:
            raise UserError(f"{name}: '{value}' is not known: use {', '.join(ALL[name])}")
    return values


def grid():
    """The names of all cells: ours, and the peer's behind the same adapter's."""
    theirs = chosen('peer_kernels') if peer else []
    return [
        name
        for kind in chosen('adapters')
        for name in [f'{kind}/{k}' for k in chosen('kernels')]
        + [f'{kind}/{k}/peer' for k in theirs]
    ]


names = grid()
if show_grid:
    print('\n'.join(f'{number} {name}' for number, name in enumerate(names)))
    sys.exit()

# ---------------------------------------------------------------------------------------------------
import hashlib
import importlib
import os
import subprocess
import time
import traceback
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace

from nanomla.adapters import report as adapter_table
from nanomla.core.files import progress_bar, write_file

MODEL, OUT = words[0], Path(words[2])
NOT_OF_A_CELL = (
    'adapters',
    'kernels',
    'peer',
    'peer_kernels',
    'cell',
    'show_grid',
    'report',
    'wandb_log',
    'wandb_project',
)
DONE = ('ok', 'n/a', 'out of memory')


def settings_of(name):
    kind = name.split('/')[0]
    return dict(configured(as_options(per_adapter.get(kind, {}), words[1])), model=MODEL)


def data_folder():
    """Where the examples are; OpenOrca is prepared when it has not been yet."""
    from nanomla.adapters.instructions import folder_of

    folder = folder_of(data)
    if not (folder / 'train.jsonl').exists():
        if not (folder / 'prepare.py').exists():
            raise UserError(f'--data={data}: there is no train.jsonl in {folder}')
        if subprocess.run([sys.executable, str(folder / 'prepare.py')]).returncode:
            raise UserError(
                f'{folder}/prepare.py could not prepare the data (its message is above)'
            )
    return folder


def place(name):
    """The file of this cell's row: its name tells the settings and the data, so a row is never taken for another's."""
    s = {key: value for key, value in settings_of(name).items() if key not in NOT_OF_A_CELL}
    files = (
        []
        if folder is None
        else [(folder / f'{split}.jsonl').read_bytes() for split in ('train', 'val')]
    )
    told = hashlib.sha256(
        json.dumps([name, s], sort_keys=True).encode() + b''.join(files)
    ).hexdigest()[:10]
    return OUT / 'cells' / f'{name.replace("/", "-")}-{told}.json'


def row_of(name):
    """The row that is there, or None; a damaged one counts as missing."""
    try:
        return json.loads(place(name).read_text())
    except (OSError, ValueError):
        return None


def keep(name, **row):
    kind, kernel, *theirs = name.split('/')
    path = place(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    row = dict(cell=name, adapter=kind, kernel=kernel, peer=bool(theirs), model=MODEL) | row
    write_file(path, (json.dumps(row, indent=1) + '\n').encode())
    return row


def gather(draw=True):
    """All rows that are there, as files: see adapter_table.py."""
    rows = [row for row in map(row_of, names) if row]
    adapter_table.write(
        rows, OUT, dict(model=MODEL, settings=dict(config), per_adapter=per_adapter), draw
    )
    return rows


def run_here(name):
    """One cell in this process."""
    import torch

    from nanomla.adapters import cell as cells
    from nanomla.adapters import step as finetuning
    from nanomla.core import devices as machine

    torch.set_float32_matmul_precision('high')
    kind, kernel, *theirs = name.split('/')
    s = SimpleNamespace(**settings_of(name))
    begin = time.time()
    trace = OUT / 'traces' / place(name).with_suffix('.trace.json.gz').name
    try:
        row = dict(status='ok') | cells.measure(
            s,
            kind,
            kernel,
            bool(theirs),
            folder,
            trace,
            lambda text: print(f'{name}: {text}', file=sys.stderr, flush=True),
        )
    except (torch.OutOfMemoryError, MemoryError):
        row = dict(
            status='out of memory',
            reason=f'more than {machine.describe(machine.pick_device(s.device))} has',
        )
    except finetuning.NotHere as error:
        row = dict(status='n/a', reason=str(error))
    except UserError as error:
        if 'pip install' not in str(error):
            raise
        row = dict(status='n/a', reason=str(error))
    row = keep(name, **row, seconds=time.time() - begin, commit=machine.commit(), settings=vars(s))
    if wandb_log and row['status'] == 'ok':
        os.environ.setdefault('WANDB_MODE', 'offline')
        import wandb

        with wandb.init(project=wandb_project, name=name, config=vars(s), dir=str(OUT)) as run:
            run.log({key: value for key, value in row.items() if isinstance(value, (int, float))})
    return row


def run_apart(name):
    """One cell in a process of its own. UserError is what its settings, its model or its data made it say."""
    log = OUT / 'logs' / place(name).with_suffix('.log').name
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, 'w') as file:
        if forks():
            code = in_fork(lambda: run_here(name), file)
        else:
            code = subprocess.run(
                [sys.executable, __file__, *words, *options, f'--cell={name}'],
                stdout=file,
                stderr=file,
            ).returncode
    said = (log.read_text().strip().splitlines() or [''])[-1]
    if code == 2:
        raise UserError(f'{name}: {said.removeprefix("error: ")}')
    if code == -9:
        return keep(
            name,
            status='out of memory',
            reason='the process was killed, as systems do that run out of memory',
        )
    if code or row_of(name) is None:
        return keep(name, status='failed', reason=f'exit code {code}: {said[:200]} (see {log})')
    return row_of(name)


@lru_cache
def forks():
    """
    Whether a cell's process is a fork of this one, which has then loaded the large packages for all. CUDA does not outlive a
    fork, so with a GPU this process must not have woken it: a first fork tries whether the GPU answers.
    """
    if not hasattr(os, 'fork'):
        return False
    os.environ.setdefault(
        'PYTORCH_NVML_BASED_CUDA_CHECK', '1'
    )  # to ask whether there is a GPU does not wake it
    from nanomla.core import devices as machine

    kind = machine.pick_device(device).type
    import torch

    from nanomla.adapters import cell as cells  # noqa: F401

    packages = ['torch._dynamo', 'torch._inductor.compile_fx', 'rouge_score.rouge_scorer']
    packages += (
        ['peft', 'bitsandbytes'] if kind == 'cpu' else ['transformers.models.llama.modeling_llama']
    )  # bitsandbytes, which peft loads, wakes a GPU
    for package in packages:
        with suppress(ImportError):  # the cells that need it will say so
            importlib.import_module(package)
    return (
        kind == 'cpu'
        or kind == 'cuda'
        and in_fork(
            lambda: torch.ones(1, device=device.replace('auto', 'cuda')).item(), subprocess.DEVNULL
        )
        == 0
    )


def in_fork(run, file):
    """The exit code of run(), in a fork that writes to `file`."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    code = 1
    try:
        target = os.open(os.devnull, os.O_WRONLY) if file == subprocess.DEVNULL else file.fileno()
        os.dup2(target, 1)
        os.dup2(target, 2)
        run()
        code = 0
    except UserError as error:
        print(f'error: {error}', file=sys.stderr)
        code = 2
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


# ---------------------------------------------------------------------------------------------------

for name, least in dict(
    block_size=2,
    n_train=1,
    n_val=1,
    batch_size=1,
    accumulation=1,
    seeds=1,
    warmup_steps=0,
    max_new_tokens=1,
    loss_chunk=1,
).items():
    if config[name] < least:
        raise UserError(f'{name}={config[name]} must be at least {least}')
if steps and steps <= warmup_steps:
    raise UserError(
        f'steps={steps} must be more than warmup_steps={warmup_steps}, which are not timed'
    )
if unknown := [kind for kind in per_adapter if kind not in ALL['adapters']]:
    raise UserError(f'{words[1]}: per_adapter knows {", ".join(ALL["adapters"])}, not {unknown[0]}')
folder = None if data == 'random' else data_folder()
if cell:
    name = names[int(cell)] if cell.isdigit() and int(cell) < len(names) else cell
    if name not in names:
        raise UserError(
            f'--cell={cell} is none of this grid: --show_grid=True shows its {len(names)} cells'
        )
    row = row_of(name)
    if row is None or row['status'] not in DONE:
        row = run_here(name)
    print(
        f'{name}: {row["status"]}'
        + (
            f', {row["train_tok_per_s"]:,.0f} tok/s'
            if row['status'] == 'ok'
            else f': {row["reason"]}'
        )
    )
    sys.exit()
missing = (
    [] if report else [name for name in names if (row_of(name) or {}).get('status') not in DONE]
)
there = len(names) - len(missing)
print(
    f'{there} of {len(names)} cells are there already'
    if there
    else f'{len(names)} cells, each in a process of its own',
    file=sys.stderr,
)
with progress_bar(len(names), 'cell', done=there) as bar:
    for name in missing:
        bar.set_postfix_str(name)
        run_apart(name)
        gather(draw=False)
        bar.update()
rows = gather()
print(adapter_table.table(rows) + f'\n{OUT}/results.json, results.csv, results.md and results.png')
if failed := [row for row in rows if row['status'] == 'failed']:
    sys.exit(
        f'error: {len(failed)} of {len(names)} cells failed, the first: {failed[0]["cell"]}: {failed[0]["reason"]}'
    )
