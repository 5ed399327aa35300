"""
The export of a healed model, by convert_mla.py's one command: stock transformers and llama.cpp
continue as the healed model does here, from a cache that is smaller by the share that is reported.
"""

import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from helpers import run, words
from llamacpp import LlamaCpp
from test_gguf import TEXT, V, make_tokenizer

from nanomla.checkpoints.export import export
from nanomla.checkpoints.gguf.write import export_gguf
from nanomla.checkpoints.load import load_model
from nanomla.core import files
from nanomla.inference.generate import generate

LLAMA = dict(bias=False, pos='rope', norm='rmsnorm', act='swiglu', n_inner=44, n_kv_head=2)
SETTINGS = dict(
    out='mla',
    saving=0.5,
    calibration='tokens',
    calibration_tokens=240,
    eval_tokens=100,
    batch_size=4,
    heal=3 * 16 * 24,  # three steps
    learning_rate=1e-2,
    export='hf',
    device='cpu',
)
LENGTH = 12  # of a continuation


def train_here(command, env):
    """Run train.py in this process, as the start of another one takes seconds."""
    run('train.py', [*command[2:], '--compile=False'])
    return SimpleNamespace(returncode=0)


def cached_bytes(model, idx):
    """Return the bytes of a token in the cache of a model of transformers."""
    layers = model(idx, use_cache=True).past_key_values.layers
    tensors = [tensor for layer in layers for tensor in (layer.keys, layer.values)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors) / idx.numel()


def test_others_continue_as_the_healed_model_does(tiny, tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(files, 'subprocess', SimpleNamespace(run=train_here))
    monkeypatch.setitem(sys.modules, 'matplotlib', None)  # the pictures take longer than the rest
    Path('bpe').mkdir()
    tokenizer = make_tokenizer(Path('bpe'), 'gpt-2')
    export(tiny('mha', **LLAMA | dict(vocab_size=V, head_dim=16)), 'llama', tokenizer)
    Path('book.txt').write_text(TEXT * 20)
    run('data/text/prepare.py', ['book.txt', '--tokenizer=llama', '--out=tokens'])
    run('convert_mla.py', ['llama', *words(SETTINGS)])

    loaded = load_model('mla-healed')
    ours, codec = loaded.model.eval(), loaded.tokenizer
    idx = torch.tensor([codec.encode('def f(x):\n')])[:, :8]
    before = load_model('mla').model.eval()(idx)
    assert (ours(idx) - before).abs().max() > 1e-3
    text = torch.cat(list(generate(ours, idx, LENGTH, temperature=0))).tolist()
    ends = [i for i, token in enumerate(text, 1) if token in codec.eos]
    until_an_end = text[: min(ends, default=LENGTH)]

    theirs = AutoModelForCausalLM.from_pretrained('hf').eval()
    whole = torch.cat([idx, torch.tensor([text])], dim=1)
    torch.testing.assert_close(theirs(whole).logits, ours(whole), rtol=0, atol=1e-4)
    continued = theirs.generate(idx, max_new_tokens=LENGTH, do_sample=False)[0, idx.size(1) :]
    assert continued.tolist() == until_an_end
    source = AutoModelForCausalLM.from_pretrained('llama').eval()
    saved = 1 - cached_bytes(theirs, idx) / cached_bytes(source, idx)
    assert saved == loaded.checkpoint['conversion']['table'][-1]['saved'] == 0.5

    export_gguf(ours, tmp_path / 'model.gguf', codec)
    peer = LlamaCpp(tmp_path / 'model.gguf')
    ids = peer.complete(idx[0].tolist(), LENGTH)['tokens']
    assert ids == until_an_end[: len(ids)]
    assert len(ids) >= len(until_an_end) - 1  # an end itself is not among them
