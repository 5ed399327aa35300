"""Exports load in stock transformers with the same logits and come back, or are refused."""

import errno
import json
import os
import sys

import pytest
import torch
from llamas import LLAMA, same_weights
from refusals import refused

from nanomla.checkpoints import hf
from nanomla.checkpoints.export import export
from nanomla.inference.generate import generate

SMALL_SHARD = 9000
OUT = {
    'gpt': ('mha', {}),
    'gpt_tied_gqa': ('mha', dict(n_kv_head=2, tie_weights=True, rope_theta=300.0)),
    'gpt_untied_mqa_linear': (
        'mha',
        dict(n_kv_head=1, tie_weights=False, rope_scaling=4.0, head_dim=12),
    ),
    'gpt_bias': ('mha', dict(bias=True, tie_weights=False)),
    'mla': ('mla', dict(tie_weights=False)),
    'mla_tied': ('mla', dict(tie_weights=True, qk_rope_head_dim=8, head_dim=14)),
    'mla_q_lora': (
        'mla',
        dict(q_lora_rank=9, tie_weights=False, rope_scaling=4.0, rope_theta=300.0),
    ),
    'mla_unequal': (
        'mla',
        dict(q_lora_rank=9, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=7),
    ),
    'mla_narrow_v': (
        'mla',
        dict(n_head=3, n_embd=30, head_dim=10, qk_nope_head_dim=10, qk_rope_head_dim=6)
        | dict(v_head_dim=5),
    ),
    'mla_only_rope': ('mla', dict(qk_rope_head_dim=8, head_dim=8)),
}
IN_SHARDS = ('gpt_tied_gqa', 'mla_q_lora')
CLASSES = dict(mha='LlamaForCausalLM', mla='DeepseekV3ForCausalLM')


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize('variant', OUT)
def test_exports_load_in_stock_transformers_and_come_back(variant, tiny, tokens, tmp_path):
    from transformers import AutoModelForCausalLM

    kind, settings = OUT[variant]
    ours, folder, idx = tiny(kind, **LLAMA | settings), tmp_path / 'out', tokens(24)
    shard_size = SMALL_SHARD if variant in IN_SHARDS else 10**9
    export(ours, folder, max_shard_size=shard_size)
    assert [path.name for path in tmp_path.iterdir()] == ['out']
    assert (len(list(folder.glob('*.safetensors'))) > 1) == (variant in IN_SHARDS)
    # Whoever may read one file may read all.
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1

    theirs, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    assert type(theirs).__name__ == CLASSES[kind]
    assert theirs.num_parameters() == ours.num_params()
    torch.testing.assert_close(ours(idx), theirs.eval()(idx).logits, rtol=0, atol=1e-5)
    prompt = idx[:, :4]
    text = torch.stack(list(generate(ours, prompt, 20, temperature=0)), dim=1)
    assert torch.equal(theirs.generate(prompt, max_new_tokens=20, do_sample=False)[:, 4:], text)

    back, _ = hf.load(folder)
    assert type(back) is type(ours)
    assert same_weights(back, ours)
    assert torch.equal(back.eval()(idx), ours(idx))
    export(back, tmp_path / 'again', max_shard_size=shard_size)
    assert contents(folder) == contents(tmp_path / 'again')


def test_shards_are_no_larger_than_asked_for_and_hold_every_tensor_once(tiny, tmp_path):
    from safetensors.torch import load_file

    export(tiny('mla', **LLAMA), tmp_path / 'out', max_shard_size=SMALL_SHARD)
    index = json.loads((tmp_path / 'out' / 'model.safetensors.index.json').read_text())
    total, found = 0, {}
    for path in sorted((tmp_path / 'out').glob('*.safetensors')):
        tensors = load_file(path)
        size = sum(tensor.nbytes for tensor in tensors.values())
        assert size <= SMALL_SHARD or len(tensors) == 1
        total += size
        assert not found.keys() & tensors.keys()
        found |= dict.fromkeys(tensors, path.name)
    assert index['metadata']['total_size'] == total
    assert index['weight_map'] == found


def test_weights_of_others_have_no_checksum_and_load(tiny, tmp_path):
    from safetensors.torch import load_file, save_file

    export(tiny(**LLAMA), tmp_path / 'out')
    path = tmp_path / 'out' / 'model.safetensors'
    tensors = load_file(path)
    next(iter(tensors.values())).flatten()[0] += 1
    save_file(tensors, path, metadata=dict(format='pt'))
    assert not same_weights(hf.load(tmp_path / 'out')[0], tiny(**LLAMA))


def test_bf16_goes_out_as_bf16(tiny, tmp_path):
    ours = tiny('mla', **LLAMA).to(torch.bfloat16)
    export(ours, tmp_path / 'out')
    assert json.loads((tmp_path / 'out' / 'config.json').read_text())['dtype'] == 'bfloat16'
    assert same_weights(hf.load(tmp_path / 'out')[0], ours)


@pytest.mark.parametrize('kind', ['mha', 'mla'])
def test_weights_go_out_in_the_dtype_that_is_asked_for(kind, tiny, tmp_path):
    ours = tiny(kind, **LLAMA)
    export(ours, tmp_path / 'out', dtype=torch.float16)
    assert json.loads((tmp_path / 'out' / 'config.json').read_text())['dtype'] == 'float16'
    assert same_weights(hf.load(tmp_path / 'out')[0], ours.half())


def test_a_weight_that_float16_cannot_hold_is_named(tiny, tmp_path):
    ours = tiny(**LLAMA)
    ours.transformer.h[1].mlp.c_proj.weight.data[3, 2] = -7e4
    why = 'float16 cannot hold model.layers.1.mlp.down_proj.weight, which reaches 70000: export it'
    refused(export, ours, tmp_path / 'out', None, 10**9, torch.float16, match=why)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    'kind, change, word',
    [
        ('mha', dict(pos='learned'), 'pos=learned'),
        ('mha', dict(pos='none'), 'pos=none'),
        ('mha', dict(norm='layernorm'), 'norm=layernorm'),
        ('mha', dict(act='gelu'), 'act=gelu'),
        ('mha', dict(act='relu2'), 'act=relu2'),
        ('mha', dict(qk_norm=True), 'qk_norm=True'),
        ('mha', dict(n_head=3, head_dim=8), 'n_embd=32 with n_head=3'),
        ('mla', dict(bias=True), 'bias=True'),
        ('mla', dict(latent_norm=False), 'latent_norm=False'),
        ('mla', dict(pos='none', qk_rope_head_dim=0), 'pos=none'),
        ('mla', dict(qk_norm=True, act='relu2'), 'act=relu2 .*; qk_norm=True'),
    ],
    ids=str,
)
def test_what_the_target_cannot_express_is_refused(kind, change, word, tiny, tmp_path):
    match = f'{CLASSES[kind]} cannot express this model: .*{word}'
    refused(export, tiny(kind, **LLAMA | change), tmp_path / 'out', match=match)
    assert not list(tmp_path.iterdir())


def test_nothing_half_written(tiny, tmp_path, monkeypatch):
    import safetensors.torch

    def full_disk(file):
        raise OSError(errno.ENOSPC, 'No space left on device')

    def interrupt(*args, **more):
        raise KeyboardInterrupt

    model, folder = tiny(**LLAMA), tmp_path / 'out'
    with monkeypatch.context() as patched:
        patched.setattr(os, 'fsync', full_disk)
        refused(export, model, folder, match='cannot write .*: no space left')
    with monkeypatch.context() as patched:
        patched.setattr(safetensors.torch, 'save_file', interrupt)
        with pytest.raises(KeyboardInterrupt):
            export(model, folder)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_there_is_left_alone(tiny, tmp_path):
    refused(export, tiny(**LLAMA), tmp_path, match='is there already')
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('package', ['safetensors', 'huggingface_hub'])
def test_a_package_that_is_missing_is_named(package, tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    refused(export, tiny(**LLAMA), tmp_path / 'out', match=f'needs {package}: pip install')
