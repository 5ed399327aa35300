"""
Fine-tune under every attention kernel and compare:
python bench_adapters.py MODEL CONFIG.json OUT [--key=value ...]

    python bench_adapters.py deepseek-ai/deepseek-coder-1.3b-base config/adapters.json runs/bench
    python bench_adapters.py random:deepseek-coder-1.3b config/adapters_speed.json runs/speed

MODEL is a name on the Hugging Face hub, a folder, or random:NAME. A cell is one adapter under one
kernel, measured in a process of its own. Its row is written to OUT/cells, and a second run with the
same settings does only what is missing. Cells that cannot run are
reported with the reason.
"""

# the grid
adapters = 'full,lora,qlora'
kernels = 'eager,sdpa,flash,cudnn,flex,paged,mla'  # and latent, an exhibit that sees the future
peer = True  # the cells of transformers + PEFT beside ours
peer_kernels = 'sdpa'  # eager, sdpa, flash, flex
peer_checkpointing = True
cell = ''  # one cell in this process, by its name (lora/sdpa, lora/sdpa/peer) or number
show_grid = False  # print the cells and their numbers
report = False  # only put the table together
# the model
block_size = 2048  # tokens of a row; less for a model that has fewer positions
dtype = 'auto'  # of the residual stream: auto, bfloat16, float32
master_weights = True  # full fine-tuning in fp32 weights and AdamW states; False: all in dtype
lora_r = 32
lora_alpha = 16
lora_dropout = 0.0
targets = 'all'  # or some of q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj
double_quant = True  # NF4's scales are quantised, too
mla_rank = 512  # 0: full, and with mla_rope_pairs=-1 exact
mla_rope_pairs = 32  # pairs with RoPE, shared by all heads
latents = 64  # of the exhibit
# the data
data = 'openorca'  # data/<name>, a folder with train.jsonl and val.jsonl, or 'random' tokens
n_train = 100
n_val = 20
template = 'marked'  # or 'joined': prompt and response one after the other, and no end
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
save_width = 1.0  # selective: products up to so many n_embd wide are stored
spared_layers = 0  # selective: the last so many layers store all products
loss_chunk = 2048  # tokens whose logits exist at a time
max_new_tokens = 64
# output
profile = True
wandb_log = False  # offline, unless WANDB_MODE says otherwise
wandb_project = 'nanomla-adapters'

import hashlib
import importlib
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from nanomla.core.checks import check_choice, check_range, split_list
from nanomla.core.configurator import Settings, UserError, configure
from nanomla.core.files import (
    appending,
    progress_bar,
    read_json,
    run_script,
    write_file,
    writing,
)


def main(argv: list[str] | None = None) -> None:
    command = Command.parse(sys.argv[1:] if argv is None else argv)
    settings = command.settings()
    if settings['show_grid']:
        for number, name in enumerate(cell_names(settings)):
            print(number, name)
        return
    check_settings(settings)
    grid = Grid(command, settings)
    if settings['cell']:
        run_one_cell(grid, settings['cell'])
        return
    missing = [name for name in grid.names if not grid.is_done(name)]
    total = len(grid.names)
    if len(missing) < total:
        print(f'{total - len(missing)} of {total} cells are there already', file=sys.stderr)
    else:
        print(f'{total} cells, each in a process of its own', file=sys.stderr)
    if not settings['report']:
        run_cells(grid, missing)
    print_results(grid)


EXAMPLE = 'python bench_adapters.py random:tiny config/adapters.json runs/bench'
CHOICES = dict(
    adapters=('full', 'lora', 'qlora'),
    kernels=('eager', 'sdpa', 'flash', 'cudnn', 'flex', 'paged', 'mla', 'latent'),
    peer_kernels=('eager', 'sdpa', 'flash', 'flex'),
)
LEAST = dict(
    block_size=2,
    n_train=1,
    n_val=1,
    batch_size=1,
    accumulation=1,
    seeds=1,
    warmup_steps=0,
    max_new_tokens=1,
    loss_chunk=1,
)
NOT_OF_A_CELL = (  # settings that do not change a cell's row
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
DONE = ('ok', 'n/a', 'out of memory')  # a cell with another status is run again


# -------------------------------------------------------------------------------------------------
# the command line


@dataclass
class Command:
    """
    What was asked for: MODEL, CONFIG.json and OUT, the file's settings, and --key=value.

    file_options: the file's settings as options; per_adapter: adapter -> settings of it alone
    """

    model: str
    config_file: str
    out: Path
    options: list[str]
    file_options: list[str] = field(default_factory=list)
    per_adapter: dict = field(default_factory=dict)

    @classmethod
    def parse(cls, argv: list[str]) -> 'Command':
        words = [word for word in argv if not word.startswith('-')]
        options = [word for word in argv if word.startswith('-')]
        # --help, and what is wrong there
        configure({'__file__': __file__}, options, takes='MODEL CONFIG.json OUT')
        if len(words) != 3:
            given = f', not {" ".join(words)}' if words else ''
            raise UserError(f'give MODEL CONFIG.json OUT{given}: {EXAMPLE}')
        command = cls(words[0], words[1], Path(words[2]), options)
        command.read_file()
        return command

    def read_file(self) -> None:
        path = self.config_file
        try:
            with open(path, encoding='utf-8') as file:
                content = json.load(file)
        except OSError as error:
            raise UserError(f'{path}: cannot be read: {error.strerror}') from None
        except ValueError as error:
            raise UserError(f'{path}: not JSON: {error}') from None
        if isinstance(content, dict):
            self.per_adapter = content.pop('per_adapter', {})
        self.file_options = self.as_options(content)
        if not isinstance(self.per_adapter, dict):
            self.as_options(self.per_adapter)  # says what it should be
        for kind in self.per_adapter:
            if kind not in CHOICES['adapters']:
                known = ', '.join(CHOICES['adapters'])
                raise UserError(f'{path}: per_adapter knows {known}, not {kind}')

    def as_options(self, settings: object) -> list[str]:
        """Return the settings of a JSON object as --key=value."""
        values = settings.values() if isinstance(settings, dict) else [None]
        if any(value is None or isinstance(value, dict) for value in values):
            raise UserError(
                f'{self.config_file}: settings are one object of key: value, and "per_adapter" '
                'an object of such objects'
            )
        options = []
        for key, value in settings.items():
            if isinstance(value, list):
                value = ','.join(map(str, value))
            options.append(f'--{key}={value}')
        return options

    def settings(self, kind: str = '') -> Settings:
        """Return the settings by the file, its part for the adapter `kind`, and the options."""
        given = [*self.file_options, *self.as_options(self.per_adapter.get(kind, {}))]
        try:
            configure({'__file__': __file__}, given)
        except UserError as error:
            raise UserError(f'{self.config_file}: {str(error).removeprefix("--")}') from None
        return configure({'__file__': __file__}, [*given, *self.options])


def cell_names(settings: dict) -> list[str]:
    """Return the names of all cells: ours, then the peer's with the same adapter."""
    chosen = {}
    for name, choices in CHOICES.items():
        chosen[name] = split_list(settings[name])
        for value in chosen[name]:
            check_choice(name, value, choices)
    names = []
    for kind in chosen['adapters']:
        names += [f'{kind}/{kernel}' for kernel in chosen['kernels']]
        if settings['peer']:
            names += [f'{kind}/{kernel}/peer' for kernel in chosen['peer_kernels']]
    return names


def check_settings(settings: dict) -> None:
    for name, least in LEAST.items():
        check_range(name, settings[name], least=least)
    steps, warmup_steps = settings['steps'], settings['warmup_steps']
    if steps and steps <= warmup_steps:
        raise UserError(
            f'steps={steps} must be more than warmup_steps={warmup_steps}, which are not timed'
        )


def data_folder(name: str) -> Path | None:
    """Return the folder of the examples, which are prepared if missing; None: random tokens."""
    if name == 'random':
        return None
    from nanomla.adapters.instructions import folder_of

    folder = folder_of(name)
    if not (folder / 'train.jsonl').exists():
        script = folder / 'prepare.py'
        if not script.exists():
            raise UserError(f'--data={name}: there is no train.jsonl in {folder}')
        run_script(script)
    return folder


def positions_of(model: str) -> int:
    """Return the most tokens of a row of this model. UserError where it cannot be loaded."""
    from nanomla.checkpoints import hf, hub

    _, config = hf.make_config(model, hf.read_shape(model), {})
    if not model.startswith('random:'):
        hub.weight_files(model)
    return config.block_size


# -------------------------------------------------------------------------------------------------
# cells and their rows


class Grid:
    """The cells of a command, and the files of their rows."""

    def __init__(self, command: Command, settings: Settings):
        self.command, self.settings, self.out = command, settings, command.out
        self.names = cell_names(settings)
        self.data = data_folder(settings['data'])
        try:
            self.positions = positions_of(command.model)
        except UserError:
            if not settings['report']:
                raise
            self.positions = settings['block_size']  # the table needs no model
        if settings['block_size'] > self.positions:
            print(
                f'block_size={self.positions}: {command.model} has no more positions '
                f'({settings["block_size"]} were asked for)',
                file=sys.stderr,
            )

    def settings_of(self, name: str) -> dict:
        """Return the settings of a cell, `model` among them."""
        kind = name.split('/')[0]
        settings = dict(self.command.settings(kind), model=self.command.model)
        settings['block_size'] = min(settings['block_size'], self.positions)
        return settings

    def row_file(self, name: str) -> Path:
        """
        Return the file of a cell's row.

        Its name is a hash of settings and data, so a row is never taken for another's.
        """
        settings = self.settings_of(name)
        for key in NOT_OF_A_CELL:
            del settings[key]
        content = json.dumps([name, settings], sort_keys=True).encode()
        if self.data is not None:
            for split in ('train', 'val'):
                content += (self.data / f'{split}.jsonl').read_bytes()
        digest = hashlib.sha256(content).hexdigest()[:10]
        return self.out / 'cells' / f'{name.replace("/", "-")}-{digest}.json'

    def row_of(self, name: str) -> dict | None:
        """Return the row that is there, or None; a damaged one counts as missing."""
        from nanomla.adapters.report import is_row

        try:
            row = read_json(self.row_file(name))
        except (OSError, ValueError):
            return None
        return row if is_row(row) else None

    def is_done(self, name: str) -> bool:
        row = self.row_of(name)
        return row is not None and row['status'] in DONE

    def write_row(self, name: str, row: dict) -> dict:
        kind, kernel, *peer = name.split('/')
        model = self.command.model
        row = dict(cell=name, adapter=kind, kernel=kernel, peer=bool(peer), model=model) | row
        write_file(self.row_file(name), json.dumps(row, indent=1) + '\n')
        return row

    def write_results(self, draw: bool = True) -> list[dict]:
        """Put the table together from all rows that are there; see report.py."""
        from nanomla.adapters.report import write_results

        rows = [row for row in map(self.row_of, self.names) if row is not None]
        about = dict(
            model=self.command.model,
            settings=dict(self.settings),
            per_adapter=self.command.per_adapter,
        )
        return write_results(rows, self.out, about, draw)

    # ---------------------------------------------------------------------------------------------
    # running

    def run_here(self, name: str) -> dict:
        """Measure one cell in this process."""
        import torch

        from nanomla.adapters.adapted import CellName, CellSettings
        from nanomla.adapters.cell import measure_or_reason
        from nanomla.core.devices import commit

        torch.set_float32_matmul_precision('high')
        settings = self.settings_of(name)
        trace = self.out / 'traces' / self.row_file(name).with_suffix('.trace.json.gz').name

        def log(text):
            print(f'{name}: {text}', file=sys.stderr, flush=True)

        begin = time.time()
        row = measure_or_reason(
            CellSettings.of(settings), CellName.parse(name), self.data, trace, log
        )
        facts = dict(seconds=time.time() - begin, commit=commit(), settings=settings)
        row = self.write_row(name, row | facts)
        if settings['wandb_log'] and row['status'] == 'ok':
            self.log_to_wandb(row)
        return row

    def log_to_wandb(self, row: dict) -> None:
        os.environ.setdefault('WANDB_MODE', 'offline')
        import wandb

        settings = row['settings']
        how = dict(project=settings['wandb_project'], name=row['cell'], dir=str(self.out))
        numbers = {key: value for key, value in row.items() if isinstance(value, (int, float))}
        with wandb.init(config=settings, **how) as run:
            run.log(numbers)

    def run_apart(self, name: str) -> dict:
        """Measure one cell in a process of its own."""
        log = self.out / 'logs' / self.row_file(name).with_suffix('.log').name
        with writing(log):
            log.unlink(missing_ok=True)  # of an attempt before
        with appending(log) as file:
            if can_fork(self.settings['device']):
                code = run_in_fork(lambda: self.run_here(name), file)
            else:
                command = self.command
                words = [command.model, command.config_file, str(command.out), *command.options]
                arguments = [sys.executable, __file__, *words, f'--cell={name}']
                code = subprocess.run(arguments, stdout=file, stderr=file).returncode
        row = self.row_of(name)
        if code == 0 and row is not None:
            return row
        return self.write_row(name, self.failure(name, code, log))

    def failure(self, name: str, code: int, log: Path) -> dict:
        """Return status and reason of a cell whose process ended with this exit code."""
        if code == -9:
            reason = 'the process was killed, as systems do that run out of memory'
            return dict(status='out of memory', reason=reason)
        lines = log.read_text(errors='replace').strip().splitlines()
        last = lines[-1][:200] if lines else ''
        if code == 2:  # a UserError
            return dict(status='failed', reason=last.removeprefix('error: '))
        return dict(status='failed', reason=f'exit code {code}: {last} (see {log})')


@lru_cache
def can_fork(device: str) -> bool:
    """
    Return whether a cell's process is a fork of this one, with the large packages loaded.

    CUDA does not outlive a fork, so with a GPU this process must not have woken it: a first fork
    tries whether the GPU answers.
    """
    if not hasattr(os, 'fork'):
        return False
    # To ask whether there is a GPU does not wake it then.
    os.environ.setdefault('PYTORCH_NVML_BASED_CUDA_CHECK', '1')
    import torch

    import nanomla.adapters.cell  # noqa: F401
    from nanomla.core.devices import pick_device

    kind = pick_device(device).type
    packages = ['torch._dynamo', 'torch._inductor.compile_fx', 'rouge_score.rouge_scorer']
    if kind == 'cpu':
        packages += ['peft', 'bitsandbytes']
    else:  # bitsandbytes, which peft loads, wakes a GPU
        packages.append('transformers.models.llama.modeling_llama')
    for package in packages:
        with suppress(ImportError):  # the cells that need it give the reason
            importlib.import_module(package)
    if kind == 'cpu':
        return True
    if kind != 'cuda':
        return False
    gpu = device.replace('auto', 'cuda')
    with open(os.devnull, 'w') as nowhere:
        return run_in_fork(lambda: torch.ones(1, device=gpu).item(), nowhere) == 0


def run_in_fork(run: Callable, file) -> int:
    """Return the exit code of run() in a fork that writes to `file`; 2 for a UserError."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        _, status = os.waitpid(pid, 0)
        return os.waitstatus_to_exitcode(status)
    code = 1
    try:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
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


# -------------------------------------------------------------------------------------------------
# what to do


def run_one_cell(grid: Grid, wanted: str) -> None:
    """Run a cell, given by name or number, in this process, if its row is not there yet."""
    name = wanted
    if wanted.isdigit() and int(wanted) < len(grid.names):
        name = grid.names[int(wanted)]
    if name not in grid.names:
        raise UserError(
            f'--cell={wanted} is none of this grid: --show_grid=True shows its '
            f'{len(grid.names)} cells'
        )
    row = grid.row_of(name) if grid.is_done(name) else grid.run_here(name)
    if row['status'] == 'ok':
        print(f'{name}: ok, {row["train_tok_per_s"]:,.0f} tok/s')
    else:
        print(f'{name}: {row["status"]}: {row["reason"]}')


def run_cells(grid: Grid, missing: list[str]) -> None:
    total = len(grid.names)
    with progress_bar(total, 'cell', done=total - len(missing)) as bar:
        for name in missing:
            bar.set_postfix_str(name, refresh=sys.stderr.isatty())
            grid.run_apart(name)
            grid.write_results(draw=False)
            bar.update()


def print_results(grid: Grid) -> None:
    """Write and print the table. Exit code 1 when a cell failed."""
    from nanomla.adapters.report import terminal_table

    rows = grid.write_results()
    print(terminal_table(rows))
    print(f'{grid.out}/results.json, results.csv, results.md and results.png')
    failed = [row for row in rows if row['status'] == 'failed']
    if failed:
        first = failed[0]
        sys.exit(
            f'error: {len(failed)} of {len(grid.names)} cells failed, the first: '
            f'{first["cell"]}: {first["reason"]}'
        )


if __name__ == '__main__':
    main()
