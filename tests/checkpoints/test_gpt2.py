"""OpenAI's GPT-2: folders load, with changes, and those that cannot are refused in one line."""

import json
import sys

import pytest
import torch
from helpers import hf_gpt2
from refusals import refused

from nanomla.checkpoints import gpt2, native
from nanomla.checkpoints.load import load_model


@pytest.fixture
def folder(tmp_path):
    hf_gpt2().save_pretrained(tmp_path)
    return tmp_path


def test_a_folder_takes_changes(folder):
    loaded = load_model(folder, dropout=0.25, kernel='eager')
    assert loaded.model.config.dropout == 0.25
    assert loaded.model.transformer.h[0].attn.kernel == 'eager'
    assert loaded.model.config.act == 'gelu_tanh'
    assert loaded.checkpoint == {}
    assert native.kind_of(loaded.model) == 'mha'


def change_config(folder, **changes):
    path = folder / 'config.json'
    shape = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in shape.items() if value is not None}))


def break_weights(folder, content):
    (folder / 'model.safetensors').unlink()
    if isinstance(content, bytes):
        (folder / 'pytorch_model.bin').write_bytes(content)
    else:
        torch.save(content, folder / 'pytorch_model.bin')


def truncate(path):
    path.write_bytes(path.read_bytes()[:500])


DAMAGES = {
    'no config': lambda folder: (folder / 'config.json').unlink(),
    'broken config': lambda folder: (folder / 'config.json').write_text('{"model_type": "gp'),
    'config is a list': lambda folder: (folder / 'config.json').write_text('[]'),
    'config lacks a key': lambda folder: change_config(folder, n_embd=None),
    'another model': lambda folder: change_config(folder, model_type='llama'),
    'another activation': lambda folder: change_config(folder, activation_function='relu'),
    'odd widths': lambda folder: change_config(folder, n_head=5),
    'no weights': lambda folder: (folder / 'model.safetensors').unlink(),
    'broken safetensors': lambda folder: truncate(folder / 'model.safetensors'),
    'other weights': lambda folder: change_config(folder, n_layer=3),
    'broken bin': lambda folder: break_weights(folder, b'no torch file'),
    'list in bin': lambda folder: break_weights(folder, [1]),
    'numbers as keys in bin': lambda folder: break_weights(folder, {0: torch.zeros(1)}),
}


@pytest.mark.parametrize('damage', DAMAGES)
def test_folders_that_cannot_be_read_are_named(damage, folder):
    DAMAGES[damage](folder)
    assert str(folder) in refused(gpt2.from_pretrained, str(folder))


def test_a_folder_loads_without_safetensors(folder, monkeypatch):
    torch.save(hf_gpt2().state_dict(), folder / 'pytorch_model.bin')
    monkeypatch.setitem(sys.modules, 'safetensors', None)  # as if it were not installed
    assert gpt2.from_pretrained(folder).num_params() > 0
    (folder / 'pytorch_model.bin').unlink()
    refused(gpt2.from_pretrained, folder, match='needs safetensors: pip install')


def test_names_come_from_the_hub(folder, monkeypatch):
    import huggingface_hub

    asked = []

    def download(name, allow_patterns, ignore_patterns):
        asked.append(name)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, 'snapshot_download', download)
    assert load_model('gpt2-medium').path == 'gpt2-medium'
    assert set(asked) == {'openai-community/gpt2-medium'}
