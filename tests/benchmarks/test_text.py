"""Whole texts beside the generate of other libraries: ratios, sampling, missing libraries."""

import sys
from pathlib import Path

import pytest
import torch

from nanomla.benchmarks import peers, text
from nanomla.core import timing

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

    def generate(self, idx, n, temperature, top_k):
        assert (temperature, top_k) == (0.8, 200)
        assert not torch.is_grad_enabled() and not self.training
        return torch.cat([idx, idx[:, :1].expand(-1, n)], dim=1)
"""


def test_ratios_are_those_of_the_times():
    expected = dict(ratio=11, ratio_least=5, ratio_most=24)
    assert text.ratios([10, 12, 11], [1, 0.5, 2]) == expected


def test_whole_texts_beside_nanogpt(bench, rows_of, monkeypatch, capsys):
    Path('peer').mkdir()
    Path('peer/model.py').write_text(PEER)
    # Three texts of the peer, then the warm-up and three texts of ours.
    clock = iter([30.0, 40.0, 20.0, 9.0, 2.0, 1.0, 4.0])

    def seconds(device, run):
        run()
        return next(clock)

    monkeypatch.setattr(timing, 'seconds', seconds)
    lengths = dict(new_tokens=10, prompt_tokens=3, peer_new_tokens=5)
    counts = dict(peer_repeats=3, repeats=3, batch_sizes='2')
    assert bench(peer='peer', caches='dense', **lengths, **counts) == 0
    theirs, ours = rows_of('texts')
    assert theirs['model'] == 'nanoGPT'
    assert theirs['new_tokens'] == 5
    assert theirs['step_us'] == 6e6
    assert theirs['tok_per_s'] == pytest.approx(2 / 6)
    assert (ours['model'], ours['against'], ours['new_tokens']) == ('mha', 'nanoGPT', 10)
    assert (ours['step_us'], ours['step_us_most']) == (2e5, 4e5)
    assert ours['ratio'] == pytest.approx(6 / 0.2)
    assert ours['ratio_least'] == pytest.approx(4 / 0.4)
    assert ours['ratio_most'] == pytest.approx(8 / 0.1)
    assert ours['sampling'] == dict(temperature=0.8, top_k=200)
    out = capsys.readouterr().out
    assert '30.0 x nanoGPT (10.0 to 80.0)' in out
    assert 'number of parameters' not in out


@pytest.mark.slow
def test_transformers_writes_exactly_what_was_asked():
    pytest.importorskip('transformers')
    shape = dict(block_size=32, n_layer=1, n_head=2, n_embd=16)
    cpu = torch.device('cpu')
    name, generate = peers.generator('transformers', shape, 64, cpu, torch.float32)
    idx = torch.randint(64, (3, 4))
    longer = generate(idx, 20)
    assert name == 'transformers'
    assert longer.shape == (3, 24)
    assert longer[:, :4].equal(idx)


def test_transformers_that_is_missing_is_reported(bench, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, 'transformers', None)
    assert bench(peer='transformers') == 2
    assert 'transformers, which is not installed: pip install' in capsys.readouterr().err
