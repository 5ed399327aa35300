"""What several test files use: running scripts, waiting for processes, tiny settings and models."""

import functools
import importlib.util
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
import types
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from forked import PATIENCE, end_of

from nanomla.core import files

ROOT = Path(__file__).resolve().parents[1]

WORDS = 'the cat sat on a mat, and then she ran to his red hat in the sun\n'.split(' ')
TEXT = ' '.join(random.Random(0).choices(WORDS, k=1200))
TINY = dict(  # settings of train.py for a run of a second
    dataset='text',
    out_dir='out',
    device='cpu',
    compile=False,
    n_layer=2,
    n_head=2,
    n_embd=16,
    block_size=16,
    batch_size=4,
    gradient_accumulation_steps=1,
    max_iters=8,
    eval_interval=4,
    eval_iters=1000,
    log_interval=1,
    warmup_iters=2,
    learning_rate=1e-2,
    min_lr=1e-3,
    sample_tokens=0,
)

EARLY = dict(
    kv_lora_rank=12, qk_rope_head_dim=0, latent_norm=False, latent_init='gpt2', pos='learned'
)
VARIANTS = {  # name -> kind and settings of a model that the fixture `tiny` makes
    'gpt2': ('mha', {}),
    'gpt2_tanh_nobias': ('mha', dict(act='gelu_tanh', bias=False)),
    'nopos_relu2': ('mha', dict(pos='none', act='relu2', tie_weights=False)),
    'llama': ('mha', dict(pos='rope', norm='rmsnorm', act='swiglu', bias=False, tie_weights=False)),
    'modern': ('mha', dict(pos='rope', norm='rmsnorm', act='relu2', qk_norm=True, zero_init=True)),
    'wide_heads': ('mha', dict(pos='rope', n_head=3, head_dim=14)),
    'gqa': ('mha', dict(pos='rope', n_kv_head=2)),
    'gqa_qk_norm': ('mha', dict(pos='learned', n_kv_head=2, qk_norm=True)),
    'mqa': ('mha', dict(pos='rope', n_kv_head=1, rope_scaling=4.0)),
    'mla': ('mla', {}),
    'mla_absorbed': ('mla', dict(absorb=True)),
    'mla_q_lora': ('mla', dict(q_lora_rank=10, bias=False)),
    'mla_q_lora_absorbed': ('mla', dict(q_lora_rank=10, bias=False, absorb=True)),
    'mla_qk_norm': ('mla', dict(qk_norm=True, norm='rmsnorm')),
    'mla_qk_norm_absorbed': ('mla', dict(qk_norm=True, norm='rmsnorm', absorb=True)),
    'mla_early': ('mla', EARLY),
    'mla_early_absorbed': ('mla', EARLY | dict(absorb=True)),
    'mla_nopos': ('mla', dict(qk_rope_head_dim=0, pos='none')),
    'mla_nopos_absorbed': ('mla', dict(qk_rope_head_dim=0, pos='none', absorb=True)),
    'mla_unequal': ('mla', dict(qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=7)),
    'mla_only_rope': ('mla', dict(qk_rope_head_dim=8, head_dim=8)),
}


def needs(*packages: str) -> None:
    """
    Skip a file of tests where a package is missing.

    Unlike pytest.importorskip this imports nothing: every process of the suite collects every file.
    """
    for name in packages:
        if importlib.util.find_spec(name) is None:
            pytest.skip(f'could not import {name!r}', allow_module_level=True)


END_OF_TEXT = 50256  # of GPT-2


def tiny_bpe(*_):
    """
    GPT-2's pattern and its <|endoftext|>, with bytes and a handful of merges.

    They are chosen so that what a chunk could get wrong shows.
    """
    import tiktoken
    from tiktoken_ext.openai_public import r50k_pat_str

    words = b'th he|the| t| the|in|ing| a|an|..|...|12|\xc3\xa9|\xe6\x97|\xe6\x97\xa5'
    blanks = b'  |    |\n\n|\n\n\n| \n|\t\t'
    merges = words.split(b'|') + blanks.split(b'|')
    pieces = [bytes([i]) for i in range(256)] + merges
    return tiktoken.Encoding(
        'gpt2',
        pat_str=r50k_pat_str,
        mergeable_ranks={piece: i for i, piece in enumerate(pieces)},
        special_tokens={'<|endoftext|>': END_OF_TEXT},
    )


# -------------------------------------------------------------------------------------------------
# scripts in this process


def words(settings: dict) -> list[str]:
    """Return settings as arguments of a script."""
    return [f'--{key}={value}' for key, value in settings.items()]


class Globals:
    """What a test may change of the process and must not leave to the next one."""

    SIGNALS = ('SIGTERM', 'SIGINT', 'SIGUSR1')

    def __init__(self):
        self.argv = sys.argv
        self.path = list(sys.path)
        self.folder = os.getcwd()
        self.environment = dict(os.environ)
        self.excepthook = sys.excepthook
        self.handlers = {}
        for name in self.SIGNALS:
            if number := getattr(signal, name, None):  # Windows has no SIGUSR1
                self.handlers[number] = signal.getsignal(number)
        self.threads = torch.get_num_threads()
        self.gradients = torch.is_grad_enabled()
        self.dtype = torch.get_default_dtype()
        self.precision = torch.get_float32_matmul_precision()
        self.deterministic = torch.are_deterministic_algorithms_enabled()
        self.benchmark = torch.backends.cudnn.benchmark
        self.recompile_limit = recompile_limit()

    def restore(self) -> None:
        sys.argv, sys.excepthook = self.argv, self.excepthook
        sys.path[:] = self.path
        os.chdir(self.folder)
        if os.environ != self.environment:
            os.environ.clear()
            os.environ.update(self.environment)
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        self.restore_numerics()
        torch.set_num_threads(self.threads)

    def restore_numerics(self) -> None:
        """Put back what changes the results of operators."""
        torch.set_grad_enabled(self.gradients)
        torch.set_default_dtype(self.dtype)
        torch.set_float32_matmul_precision(self.precision)  # 'high' is TF32 on a GPU
        if torch.are_deterministic_algorithms_enabled() != self.deterministic:
            # Not otherwise: it loads the compiler, which takes seconds.
            torch.use_deterministic_algorithms(self.deterministic)
        torch.backends.cudnn.benchmark = self.benchmark
        if recompile_limit() is not None and self.recompile_limit is not None:
            torch._dynamo.config.recompile_limit = self.recompile_limit


def recompile_limit() -> int | None:
    """Return torch.compile's limit, None as long as nothing has loaded it: that takes seconds."""
    if 'torch._dynamo.config' not in sys.modules:
        return None
    return torch._dynamo.config.recompile_limit


@contextmanager
def a_process(script, arguments):
    """Give a script in this process what it has to itself in its own, and one thread."""
    before = Globals()
    sys.argv = [script, *map(str, arguments)]
    torch.set_num_threads(1)
    try:
        yield
    finally:
        before.restore()


@functools.cache
def code_of(script: Path) -> types.CodeType:
    return compile(script.read_bytes(), str(script), 'exec')


def run_main(script: Path) -> dict:
    """Do what runpy.run_path does for a script as __main__, but compile it once."""
    before, main = sys.modules['__main__'], types.ModuleType('__main__')
    main.__file__ = sys.argv[0] = str(script)
    sys.modules['__main__'] = main
    try:
        exec(code_of(script), main.__dict__)
    finally:
        sys.modules['__main__'] = before
    return main.__dict__


def run(script, arguments) -> dict:
    """Run `python script arguments` in this process and return the script's names."""
    with a_process(script, arguments):
        return run_main(ROOT / script)


def exit_code(script, arguments) -> int:
    """Run a script as `run` does, let its excepthook end an error, and return the exit code."""
    with a_process(script, arguments):
        return end_of(lambda: run_main(ROOT / script))


def not_json(word):
    raise AssertionError(f'{word} is no JSON')


def log(out='out') -> list[dict]:
    """Return the lines of a run's log.jsonl."""
    lines = Path(out, 'log.jsonl').read_text().splitlines()
    return [json.loads(line, parse_constant=not_json) for line in lines]


def series(out, event, key) -> dict:
    """Return step -> value; of a step that is in the log twice, the later one."""
    return {line['step']: line[key] for line in log(out) if line['event'] == event}


# -------------------------------------------------------------------------------------------------
# full disks


def fill_disk(monkeypatch, name: str) -> None:
    """Let every write to the file that is to become `name` fail as on a full disk."""

    def opened(path, mode='r', **options):
        is_path = not isinstance(path, int)  # a descriptor is of a file that is open
        if is_path and re.fullmatch(re.escape(name) + r'\.\d+\.partial', Path(path).name):
            path, mode = '/dev/full', mode.replace('x', 'w')
        return open(path, mode, **options)

    monkeypatch.setattr(files, 'open', opened, raising=False)


# -------------------------------------------------------------------------------------------------
# other processes


def wait_until(condition: Callable, process: subprocess.Popen | None = None) -> None:
    """Wait until condition() is true; fail when `process` ends before or PATIENCE does."""
    end = time.monotonic() + PATIENCE
    while not condition():
        if process is not None and process.poll() is not None and not condition():
            output = process.communicate()[0] if process.stdout else ''
            raise AssertionError(f'the process ended with code {process.returncode}: {output}')
        assert time.monotonic() < end, f'nothing happened in {PATIENCE} seconds'
        time.sleep(0.01)


def wait_for_files(folder: Path, pattern: str, number: int) -> None:
    """Wait until `number` files of `folder` have a name like `pattern`."""
    wait_until(lambda: len(list(folder.glob(pattern))) >= number)


def wait_for_end(process: subprocess.Popen) -> tuple[int, str, str]:
    """Return the exit code of a process and what it wrote to stdout and stderr."""
    out, err = process.communicate(timeout=PATIENCE)
    return process.returncode, out, err


# -------------------------------------------------------------------------------------------------
# models


def hf_gpt2():
    """Return a tiny GPT2LMHeadModel of transformers, with random norms and biases."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=50, n_positions=20, n_embd=24, n_layer=2, n_head=3, initializer_range=0.2
    )
    model = GPT2LMHeadModel(config).eval()
    for p in model.parameters():
        if p.ndim == 1:
            p.data.add_(torch.randn_like(p) * 0.2)
    return model
