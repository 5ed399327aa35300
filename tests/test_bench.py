"""bench.py: it measures, prints and writes down what it measured; on a CPU, with models too small to tell anything."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import exit_code, words

from nanomla.core import devices as machine

TINY = dict(
    device='cpu',
    compile=False,
    n_layer=1,
    n_head=2,
    n_embd=16,
    block_size=16,
    batch_size=2,
    vocabulary=100,
    warmup_steps=1,
    timed_steps=2,
    repeats=1,
    results='r.jsonl',
)
PEER = """
from dataclasses import dataclass
import torch

@dataclass
class GPTConfig:
    block_size: int
    vocab_size: int
    n_layer: int
    n_head: int
    n_embd: int
    dropout: float
    bias: bool

class GPT(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        print('number of parameters: few')
        self.wte = torch.nn.Embedding(config.vocab_size, config.n_embd)

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        return torch.optim.AdamW(self.parameters(), learning_rate, betas, weight_decay=weight_decay)

    def forward(self, x, y):
        logits = self.wte(x) @ self.wte.weight.T
        return logits, torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())
"""


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(machine, 'commit', lambda: 'abc1234')
    monkeypatch.setenv('OMP_NUM_THREADS', '1')
    monkeypatch.setitem(sys.modules, 'peer_model', None)
    for name in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK'):
        monkeypatch.delenv(name, raising=False)


def bench(*arguments, **settings):
    return exit_code('bench.py', [*arguments, *words(TINY | settings)])


def results():
    return [json.loads(line) for line in Path('r.jsonl').read_text().splitlines()]


@pytest.mark.parametrize(
    'kind', [dict(), dict(attention='mla', kv_lora_rank=8, qk_rope_head_dim=4)], ids=['mha', 'mla']
)
def test_train_prints_tokens_a_second_and_writes_them_down(kind, capsys):
    assert bench('train', **kind) == 0 and bench('train', profile=True, **kind) == 0
    out, err = capsys.readouterr()
    assert err == '' and out.count('k tok/s') == 2 and 'matmul' in out
    plain, profiled = results()
    assert (
        plain['tok_per_s'] == pytest.approx(2 * 16 / (plain['ms'] / 1e3))
        and plain['ms_least'] <= plain['ms'] <= plain['ms_most']
    )
    assert (
        plain['config']['n_embd'] == 16
        and plain['commit'] == 'abc1234'
        and plain['torch'] == torch.__version__
        and plain['world'] == 1
    )
    assert (
        plain['mfu_of_matmul'] > 0 and plain['profile'] == {} and profiled['profile']['matmul'] > 0
    )


def test_a_peer_is_measured_beside(capsys):
    Path('peer').mkdir()
    Path('peer/model.py').write_text(PEER)
    assert bench('train', peer='peer', peer_batch_size=3) == 0
    out = capsys.readouterr().out
    assert 'nanoGPT   batch 3:' in out and ' x nanoGPT' in out and 'number of parameters' not in out
    theirs, ours = results()
    assert theirs['what'] == 'nanoGPT' and ours['ratio_to_peer'] == pytest.approx(
        ours['tok_per_s'] / theirs['tok_per_s']
    )


def test_a_run_that_fails_is_told_by_its_exit_code(capfd, monkeypatch):
    monkeypatch.setattr(subprocess, 'run', lambda command: SimpleNamespace(returncode=1))
    assert (
        bench('scale') == 1
        and capfd.readouterr().err
        == 'error: the run of 2 processes failed (its message is above)\n'
    )


def test_scale_compares_one_process_with_two(capfd):
    assert bench('scale', gpus='1,2') == 0
    out = capfd.readouterr().out
    assert '1 processes: ' in out and '2 processes: ' in out and out.count('efficiency') == 2
    one, two = results()
    assert (one['processes'], one['world'], one['speedup']) == (1, 1, 1) and (
        two['processes'],
        two['world'],
    ) == (2, 2)
    assert two['config']['gradient_accumulation_steps'] == 2 and two['speedup'] == pytest.approx(
        two['tok_per_s'] / one['tok_per_s']
    )
    assert (
        len(one['ranks']) == 1
        and len(two['ranks']) == 2
        and all(rank['ms'] > 0 and rank['peak_memory'] > 0 for rank in two['ranks'])
    )
    assert (Path('out-bench/scale.png')).read_bytes().startswith(b'\x89PNG')
    before = (Path('out-bench/scale.png')).read_bytes()
    assert (
        bench('scale', gpus='1', attention='mla', kv_lora_rank=8, qk_rope_head_dim=4) == 0
        and before != (Path('out-bench/scale.png')).read_bytes()
    )


@pytest.mark.parametrize(
    'arguments, settings, message',
    [
        ([], {}, 'say what to measure: python bench.py train | scale | race'),
        (['fly'], {}, 'fly: no such config file'),
        (
            ['train'],
            dict(peer='nowhere'),
            '--peer=nowhere is no checkout of nanoGPT: it has no model.py',
        ),
        (['race'], dict(peer='nowhere'), '--peer=nowhere is no checkout of nanoGPT'),
        (['race'], {}, 'a race needs somebody to race against: --peer=FOLDER'),
        (['train'], dict(n_head=3), 'n_embd=16 is not a multiple of n_head=3'),
        (['train'], dict(results='no/folder/r.jsonl'), '--results=no/folder/r.jsonl'),
        (['scale'], dict(gpus='1,two'), '--gpus=1,two'),
        (['train'], dict(repeats=0), 'repeats=0 must be at least 1'),
    ],
    ids=lambda value: ' '.join(map(str, value)) if isinstance(value, (list, dict)) else '',
)
def test_what_is_wrong_is_told_in_one_line(arguments, settings, message, capsys):
    assert bench(*arguments, **settings) == 2
    err = capsys.readouterr().err
    assert err.startswith('error: ') and message in err and err.count('\n') == 1, err[-2000:]
    assert not Path('r.jsonl').exists()
