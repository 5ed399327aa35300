"""What the tests of nanomla/benchmarks share: a tiny `bench.py decode` in a folder of its own."""

import json
import sys
from pathlib import Path

import pytest
import torch
from helpers import exit_code, words

from nanomla.benchmarks.plan import make_plan
from nanomla.core import devices
from nanomla.core.configurator import Settings

TINY = dict(
    device='cpu',
    n_layer=2,
    n_head=4,
    n_embd=32,
    kv_lora_rank=16,
    qk_rope_head_dim=4,
    vocabulary=100,
    warmup_steps=1,
    timed_steps=2,
    repeats=2,
    bias=False,
    contexts='16,32',
    batch_sizes='1,2',
)
PLAN = dict(  # what make_plan reads, as bench.py has it
    profile=False,
    dtype='auto',
    peer='',
    models='mha',
    caches='none,dense,paged',
    cache_dtypes='auto',
    page_size=64,
    prefill_chunk=0,
    new_tokens=496,
    prompt_tokens=16,
    peer_new_tokens=0,
    peer_repeats=3,
    attention_only=False,
    ragged=False,
    decode_kernel='auto',
    block_size=1024,
)


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(devices, 'commit', lambda: 'abc1234')
    monkeypatch.setitem(sys.modules, 'peer_model', None)


@pytest.fixture
def bench():
    """Return a function that runs `bench.py decode` with tiny settings: its exit code."""

    def run(**settings):
        return exit_code('bench.py', ['decode', *words(TINY | settings)])

    return run


@pytest.fixture
def rows_of():
    """Return a function that reads the rows of a table."""

    def read(name='decode'):
        lines = Path(f'out-bench/{name}.jsonl').read_text().splitlines()
        return [json.loads(line) for line in lines]

    return read


@pytest.fixture
def tiny_plan():
    """Return a function that makes a plan on the CPU from tiny settings."""

    def make(**settings):
        settings = Settings(PLAN | TINY | settings, {})
        return make_plan(settings, torch.device('cpu'))

    return make
