"""Loading Llama and DeepSeek-V3: the logits of transformers, and each refusal by name."""

import json
import re
import sys
import threading
from pathlib import Path

import pytest
import torch
from llamas import LINEAR, LLAMA, edit_config, hf_llama, same_weights
from refusals import refused

from model import GPT
from model_mla import GPT_MLA
from nanomla.checkpoints import hf
from nanomla.checkpoints.export import export
from nanomla.checkpoints.load import load_model


def check_logits(folder, idx, expected):
    model, _ = hf.load(folder)
    torch.testing.assert_close(model.eval()(idx), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    'case',
    [
        dict(rope_parameters=LINEAR),
        dict(num_key_value_heads=2),
        dict(num_key_value_heads=1, tie_word_embeddings=True),
        dict(rope_parameters=LINEAR, tie_word_embeddings=True, head_dim=12),
        dict(attention_bias=True, mlp_bias=True),
    ],
    ids=str,
)
@pytest.mark.parametrize('shard', ['5GB', '10KB'])
def test_llama_has_the_logits_of_transformers(case, shard, tmp_path, tokens):
    theirs, idx = hf_llama(tmp_path, shard=shard, **case), tokens(60, 50)
    assert (len(list(tmp_path.glob('*.safetensors'))) > 2) == (shard == '10KB')
    ours, tokenizer = hf.load(tmp_path)
    assert type(ours) is GPT
    assert tokenizer is None
    assert ours.num_params() == theirs.num_parameters()
    assert ours.config.norm_eps == 1e-6
    torch.testing.assert_close(ours.eval()(idx), theirs(idx).logits, rtol=0, atol=1e-5)
    tied = ours.lm_head.weight is ours.transformer.wte.weight
    assert tied == case.get('tie_word_embeddings', False)
    assert ours.transformer.h[0].attn.c_attn.weight.splits == ours.transformer.h[0].attn.widths


@pytest.mark.parametrize('spelling', [['type'], ['rope_type'], ['type', 'rope_type']])
def test_old_spellings_of_rope(spelling, tmp_path, tokens):
    theirs, idx = hf_llama(tmp_path, rope_parameters=LINEAR), tokens(60, 50)
    scaling = dict.fromkeys(spelling, 'linear') | dict(factor=4.0)
    edit_config(tmp_path, rope_parameters='absent', rope_theta=1e5, rope_scaling=scaling)
    check_logits(tmp_path, idx, theirs(idx).logits)
    edit_config(tmp_path, rope_scaling=None)
    config = hf.load(tmp_path)[0].config
    assert config.rope_theta == 1e5
    assert config.rope_scaling == 1


def test_dtypes_are_kept_or_converted(tmp_path, tokens):
    theirs, idx = hf_llama(tmp_path, torch.bfloat16), tokens(60, 50)
    kept, _ = hf.load(tmp_path)
    full, _ = hf.load(tmp_path, dtype=torch.float32)
    assert {p.dtype for p in kept.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in full.parameters()} == {torch.float32}
    # transformers' .float() would keep RoPE in bf16.
    theirs = type(theirs).from_pretrained(tmp_path, dtype=torch.float32)
    torch.testing.assert_close(full.eval()(idx), theirs(idx).logits, rtol=0, atol=1e-5)
    assert same_weights(kept.float(), full)


def test_pytorch_model_bin_with_a_tied_head_and_frequencies(tmp_path, tokens):
    theirs, idx = hf_llama(tmp_path, tie_word_embeddings=True), tokens(60, 50)
    (tmp_path / 'model.safetensors').unlink()
    state = theirs.state_dict() | {'model.layers.0.self_attn.rotary_emb.inv_freq': torch.ones(4)}
    assert 'lm_head.weight' in state
    torch.save(state, tmp_path / 'pytorch_model.bin')
    check_logits(tmp_path, idx, theirs(idx).logits)


def test_shards_with_and_without_an_index(tmp_path, tokens):
    from safetensors.torch import save_file

    theirs, idx = hf_llama(tmp_path), tokens(60, 50)
    expected = theirs(idx).logits
    (tmp_path / 'model.safetensors').unlink()
    state = {key: value.clone() for key, value in theirs.state_dict().items()}
    keys = list(state)
    shards = dict(a=keys[:7], b=keys[7:])
    weight_map = {}
    for name, part in shards.items():
        weight_map |= dict.fromkeys(part, f'{name}.bin')
        tensors = {key: state[key] for key in part}
        torch.save(tensors, tmp_path / f'{name}.bin')
        save_file(tensors, tmp_path / f'{name}.safetensors')
    index = tmp_path / 'pytorch_model.bin.index.json'
    index.write_text(json.dumps(dict(weight_map=weight_map)))
    check_logits(tmp_path, idx, expected)  # *.safetensors come first, and need no index
    (tmp_path / 'b.safetensors').rename(tmp_path / 'elsewhere')
    refused(hf.load, tmp_path, match='lacks .* tensor')
    (tmp_path / 'a.safetensors').rename(tmp_path / 'a')
    check_logits(tmp_path, idx, expected)  # by the index of the .bin files
    (tmp_path / 'a').rename(tmp_path / 'a.safetensors')
    (tmp_path / 'elsewhere').rename(tmp_path / 'b.safetensors')
    save_file({keys[0]: state[keys[0]]}, tmp_path / 'c.safetensors')
    refused(hf.load, tmp_path, match=f'{keys[0]} in two of its files')


def test_random_models():
    with torch.device('meta'):
        model, tokenizer = hf.load('random:deepseek-coder-1.3b')
    assert tokenizer is None
    assert model.num_params() == 1_346_471_936
    c = model.config
    assert (c.n_layer, c.n_head, c.n_kv_head, c.head_dim) == (24, 16, 16, 128)
    assert (c.n_inner, c.block_size) == (5504, 16384)
    assert (c.rope_theta, c.rope_scaling, c.norm_eps) == (1e5, 4.0, 1e-6)
    assert not c.tie_weights
    assert not c.bias
    model, _ = hf.load('random:tiny', dtype=torch.bfloat16, dropout=0.1)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.config.dropout == 0.1
    assert torch.get_default_dtype() == torch.float32
    assert load_model('random:tiny').model.config.rope_scaling == 4
    refused(hf.load, 'random:huge', match='random:tiny')


def own_memory():
    """Return the bytes of this process's own pages; those of mapped files are the system's."""
    status = Path('/proc/self/status').read_text()
    return 1024 * int(re.search(r'RssAnon:\s+(\d+)', status)[1])


@pytest.mark.skipif(sys.platform != 'linux', reason='reads /proc')
def test_memory_holds_the_model_once(tmp_path):
    shape = LLAMA | dict(n_inner=1404)
    config = GPT.Config(block_size=8, vocab_size=256, n_layer=8, n_embd=512, n_head=4, **shape)
    model = GPT(config)
    size = sum(p.nbytes for p in model.parameters())
    export(model, tmp_path / 'x', max_shard_size=2 * 10**7)
    del model
    before, seen, done = own_memory(), [], threading.Event()

    def watch():
        while not done.wait(0.001):
            seen.append(own_memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    model, _ = hf.load(tmp_path / 'x')
    seen.append(own_memory())
    done.set()
    watcher.join()
    assert size > 8e7
    assert len(seen) > 4
    assert max(seen) - before < 1.3 * size


@pytest.mark.parametrize('interleave', [True, False])
def test_deepseek_v3_has_the_logits_of_transformers(interleave, tokens, tmp_path):
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    config = DeepseekV3Config(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=44,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        kv_lora_rank=12,
        q_lora_rank=9,
        qk_rope_head_dim=8,
        qk_nope_head_dim=6,
        v_head_dim=5,
        first_k_dense_replace=2,
        n_routed_experts=1,
        num_nextn_predict_layers=0,
        max_position_embeddings=64,
        rope_interleave=interleave,
        initializer_range=0.2,
    )
    theirs = DeepseekV3ForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path)
    ours, idx = hf.load(tmp_path)[0].eval(), tokens(60, 50)
    assert type(ours) is GPT_MLA
    torch.testing.assert_close(ours(idx), theirs(idx).logits, rtol=0, atol=1e-5)


# -------------------------------------------------------------------------------------------------
# refusals

PARTIAL = dict(rope_type='default', partial_rotary_factor=0.5)
MSCALE = dict(rope_type='linear', factor=2.0, mscale_all_dim=1.0)


@pytest.mark.parametrize(
    'change, word',
    [
        (dict(model_type='gpt_neox'), "model_type 'gpt_neox'"),
        (dict(model_type='qwen3'), 'only Qwen3ForCausalLM is known'),
        (dict(model_type='absent'), "model_type 'None'"),
        (dict(architectures=['LlamaModel']), 'LlamaModel'),
        (dict(attention_bias=True), r'lacks .*self_attn.*\.bias'),
        (dict(mlp_bias=True), r'lacks .*mlp.*\.bias'),
        (dict(qk_norm=True), 'qk_norm=True'),
        (dict(num_local_experts=8), 'num_local_experts=8'),
        (dict(n_routed_experts=8), 'n_routed_experts=8'),
        (dict(sliding_window=4096), 'sliding_window=4096'),
        (dict(rope_scaling=dict(type='proportional', factor=2.0)), "RoPE of type 'proportional'"),
        (dict(rope_scaling=dict(rope_type='yarn', beta=2.0, factor=2.0)), 'beta=2.0 in RoPE'),
        (dict(rope_parameters=dict(rope_type='llama3', factor=8.0)), "lacks 'low_freq_factor'"),
        (dict(attention_sinks=4), 'attention_sinks=4'),
        (dict(partial_rotary_factor=0.5), 'partial_rotary_factor=0.5'),
        (dict(rope_parameters=PARTIAL), 'partial_rotary_factor=0.5 in RoPE'),
        (dict(rope_parameters=MSCALE), 'mscale_all_dim'),
        (dict(rope_parameters=dict(rope_type='linear')), "lacks 'factor'"),
        (dict(hidden_act='gelu'), "hidden_act 'gelu'"),
        (dict(quantization_config=dict(bits=4)), 'quantization_config'),
        (dict(logits_scaling=8), 'logits_scaling=8'),
        (dict(final_logit_softcapping=30.0), 'final_logit_softcapping'),
        (dict(hidden_size='absent'), "lacks 'hidden_size'"),
        (dict(hidden_size='wide'), 'cannot be used'),
        (dict(num_key_value_heads=3), 'n_kv_head=3'),
        (dict(num_hidden_layers=3), r'lacks model.layers.2.* and 8 more'),
        (dict(num_hidden_layers=1), 'unknown here, model.layers.1'),
        (dict(intermediate_size=40), r'\(44, 32\), but by config.json it is \(40, 32\)'),
        (dict(vocab_size=51), 'embed_tokens'),
        (dict(tie_word_embeddings=True), 'ties the head .*, but lm_head.weight is another'),
    ],
    ids=lambda value: str(value)[:60] if isinstance(value, dict) else '',
)
def test_llamas_that_have_no_place_here_are_refused(change, word, tmp_path):
    hf_llama(tmp_path)
    edit_config(tmp_path, **change)
    assert str(tmp_path) in refused(hf.load, tmp_path, match=word)


@pytest.mark.parametrize(
    'change, word',
    [
        (dict(first_k_dense_replace=1), 'lacks .*mlp.experts'),
        (dict(first_k_dense_replace='absent'), "lacks 'first_k_dense_replace'"),
        (dict(attention_bias=True), r'lacks .*self_attn.*\.bias'),
        (dict(mlp_bias=True), 'mlp_bias=True'),
        (dict(q_lora_rank='absent'), "lacks 'q_lora_rank'"),
        (dict(q_lora_rank=9), 'lacks .*q_a'),
        (dict(num_key_value_heads=2), 'n_kv_head=2'),
        (dict(qk_rope_head_dim=0), 'qk_rope_head_dim=0'),
        (dict(quantization_config=dict(quant_method='fp8')), 'quantization_config'),
        (dict(kv_lora_rank=11), 'kv_a_layernorm|kv_b_proj|kv_a_proj'),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else '',
)
def test_deepseeks_that_have_no_place_here_are_refused(change, word, tiny, tmp_path):
    folder = tmp_path / 'folder'
    export(tiny('mla', **LLAMA, tie_weights=False), folder)
    edit_config(folder, **change)
    assert str(folder) in refused(hf.load, folder, match=word)


def test_damaged_shards_are_named(tmp_path):
    from safetensors.torch import load_file, save_file

    hf_llama(tmp_path, shard='10KB')
    shard = sorted(tmp_path.glob('*.safetensors'))[1]
    raw = shard.read_bytes()
    shard.unlink()
    refused(hf.load, tmp_path, match=rf'lacks {shard.name}, one of the \d+ shards')
    shard.write_bytes(raw[:100])
    refused(hf.load, tmp_path, match=f'{shard.name} cannot be read')
    shard.write_bytes(raw)
    state = load_file(shard)
    save_file({key: value.to(torch.int8) for key, value in state.items()}, shard)
    refused(hf.load, tmp_path, match='is int8, not a float')
    unknown = 'model.layers.0.self_attn.q_norm.weight'
    save_file(state | {unknown: torch.ones(8)}, shard)
    refused(hf.load, tmp_path, match=f'unknown here, {unknown}')


def test_damaged_indexes_are_named_and_lead_nowhere_else(tmp_path):
    folder = tmp_path / 'folder'
    hf_llama(folder, shard='10KB')
    index = folder / 'model.safetensors.index.json'
    for wrong in ('[]', '{}', '{"weight_map": {"a": 5}}', '{"weight_map": 5}'):
        index.write_text(wrong)
        refused(hf.load, folder, match='index.json cannot be')
    (tmp_path / 'a.safetensors').write_bytes(b'of another')
    index.write_text('{"weight_map": {"a": "../a.safetensors"}}')
    refused(hf.load, folder, match='lacks a.safetensors, one of the 1 shards')


def test_folders_without_weights_or_config_are_named(tmp_path):
    hf_llama(tmp_path)
    (tmp_path / 'model.safetensors').unlink()
    refused(hf.load, tmp_path, match='has no weights')
    torch.save([1], tmp_path / 'pytorch_model.bin')
    refused(hf.load, tmp_path, match='pytorch_model.bin cannot be read')
    (tmp_path / 'config.json').write_text('{"model_type"')
    refused(hf.load, tmp_path, match='damaged or no JSON')
    refused(load_model, tmp_path)
    (tmp_path / 'config.json').unlink()
    refused(hf.load, tmp_path, match='has no config.json')
    refused(hf.load, 'no/such/place', match='neither a folder nor')


# -------------------------------------------------------------------------------------------------
# the hub


def test_a_model_of_the_hub(tmp_path, monkeypatch, tokens):
    import huggingface_hub

    theirs, idx = hf_llama(tmp_path), tokens(60, 50)
    asked = []

    def download(name, allow_patterns, ignore_patterns):
        if name != 'someone/a-model':
            raise ConnectionError('no network')
        asked.extend(allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, 'snapshot_download', download)
    loaded = load_model('someone/a-model', kernel='eager', dropout=0.2)
    logits = loaded.model.eval()(idx)
    torch.testing.assert_close(logits, theirs(idx).logits, rtol=0, atol=1e-5)
    assert loaded.checkpoint == {}
    assert loaded.model.config.kernel == 'eager'
    assert loaded.model.config.dropout == 0.2
    assert '*.safetensors' in asked
    assert 'pytorch_model*.bin' not in asked  # only what is needed
    refused(hf.load, 'someone/other', match='ConnectionError.*connect to the network')


def test_what_is_refused_by_its_config_is_not_downloaded(tmp_path, monkeypatch):
    import huggingface_hub

    hf_llama(tmp_path)
    edit_config(tmp_path, model_type='gemma2')
    asked = []

    def download(name, allow_patterns, ignore_patterns):
        asked.extend(allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, 'snapshot_download', download)
    refused(hf.load, 'someone/a-model', match="model_type 'gemma2'.*capped by tanh")
    assert 'config.json' in asked
    assert not any('safetensors' in pattern or '.bin' in pattern for pattern in asked)


def test_packages_that_are_missing_are_named(tmp_path, monkeypatch):
    hf_llama(tmp_path, vocab_size=300)
    (tmp_path / 'tokenizer.json').write_text('{}')
    refused(hf.load, tmp_path, match='is no tokenizer that can be loaded')
    with monkeypatch.context() as without:
        without.setitem(sys.modules, 'tokenizers', None)
        refused(hf.load, tmp_path, match='needs tokenizers: pip install')
    (tmp_path / 'tokenizer.json').unlink()
    with monkeypatch.context() as without:
        without.setitem(sys.modules, 'safetensors', None)
        refused(hf.load, tmp_path, match='needs safetensors: pip install')
    monkeypatch.setitem(sys.modules, 'huggingface_hub', None)
    for load in (hf.load, load_model):
        refused(load, 'someone/a-model', match='pip install huggingface_hub')


def test_a_typo_in_a_path_asks_no_network(monkeypatch):
    monkeypatch.setitem(sys.modules, 'huggingface_hub', None)
    refused(load_model, 'tests/a-model', match='there is no checkpoint')
