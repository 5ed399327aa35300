"""deepseek.py and hf_tokenizer.py: both ways against transformers, byte for byte, and each refusal by name."""

import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from model import GPT
from model_mla import GPT_MLA
from nanomla.checkpoints import export, load
from nanomla.checkpoints import hf as deepseek
from nanomla.checkpoints.tokenizer import PROBES
from nanomla.core.configurator import UserError
from nanomla.inference.generate import generate

LLAMA = dict(bias=False, pos='rope', norm='rmsnorm', act='swiglu', n_inner=44, norm_eps=1e-5)
ROOT = Path(__file__).resolve().parents[2]
TEXT = 'def f(x):\n    return x + 1\n\n\nclass A:\n\tpass\n' * 3 + 'naïve 漢字  words and words'


def hf_llama(folder, dtype=torch.float32, shard='5GB', **settings):
    """A LlamaForCausalLM with random weights and norms, saved to `folder` by transformers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = dict(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=44,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        rms_norm_eps=1e-6,
        initializer_range=0.2,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(LlamaConfig(**(shape | settings))).eval()
    for p in model.parameters():
        if p.ndim == 1:
            p.data.add_(torch.randn_like(p) * 0.2)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    return model


def edit(folder, **changes):
    path = folder / 'config.json'
    shape = {k: v for k, v in (json.loads(path.read_text()) | changes).items() if v != 'absent'}
    path.write_text(json.dumps(shape))


def refused(call, *args, match='.', **more):
    with pytest.raises(UserError, match=match) as error:
        call(*args, **more)
    assert '\n' not in str(error.value) and len(str(error.value)) > 20
    return str(error.value)


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a
    )


# ---------------------------------------------------------------------------------------------------
# in

LINEAR = dict(rope_type='linear', factor=4.0, rope_theta=1e5)  # as DeepSeek-Coder has it


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
    ours, tokenizer = deepseek.load(tmp_path)
    assert (
        type(ours) is GPT
        and tokenizer is None
        and ours.num_params() == theirs.num_parameters()
        and ours.config.norm_eps == 1e-6
    )
    torch.testing.assert_close(ours.eval()(idx), theirs(idx).logits, rtol=0, atol=1e-5)
    assert (ours.lm_head.weight is ours.transformer.wte.weight) == case.get(
        'tie_word_embeddings', False
    )
    assert (
        ours.transformer.h[0].attn.c_attn.weight.splits == ours.transformer.h[0].attn.widths
    )  # Muon's


@pytest.mark.parametrize('spelling', ['type', 'rope_type', 'both'])
def test_old_spellings_of_rope(spelling, tmp_path, tokens):
    theirs, idx = hf_llama(tmp_path, rope_parameters=LINEAR), tokens(60, 50)
    old = dict(type='linear', rope_type='linear', factor=4.0)
    edit(
        tmp_path,
        rope_parameters='absent',
        rope_theta=1e5,
        rope_scaling={
            k: v for k, v in old.items() if k in (spelling, 'factor') or spelling == 'both'
        },
    )
    torch.testing.assert_close(
        deepseek.load(tmp_path)[0].eval()(idx), theirs(idx).logits, rtol=0, atol=1e-5
    )
    edit(tmp_path, rope_scaling=None)
    assert (
        deepseek.load(tmp_path)[0].config.rope_theta == 1e5
        and deepseek.load(tmp_path)[0].config.rope_scaling == 1
    )


def test_dtypes_are_kept_or_converted(tmp_path, tokens):
    theirs, idx = hf_llama(tmp_path, torch.bfloat16), tokens(60, 50)
    kept, full = deepseek.load(tmp_path)[0], deepseek.load(tmp_path, dtype=torch.float32)[0].eval()
    assert {p.dtype for p in kept.parameters()} == {torch.bfloat16} and {
        p.dtype for p in full.parameters()
    } == {torch.float32}
    theirs = type(theirs).from_pretrained(
        tmp_path, dtype=torch.float32
    )  # its .float() would keep RoPE in bf16
    torch.testing.assert_close(full(idx), theirs(idx).logits, rtol=0, atol=1e-5)
    assert same(kept.float(), full)


def test_old_files(tmp_path, tokens):
    """pytorch_model.bin with RoPE's frequencies and a second copy of the tied head; then in two shards; then other names and no index."""
    from safetensors.torch import save_file

    theirs, idx = hf_llama(tmp_path, tie_word_embeddings=True), tokens(60, 50)
    (tmp_path / 'model.safetensors').unlink()
    state = theirs.state_dict() | {'model.layers.0.self_attn.rotary_emb.inv_freq': torch.ones(4)}
    assert 'lm_head.weight' in state
    torch.save(state, tmp_path / 'pytorch_model.bin')
    expected = theirs(idx).logits
    torch.testing.assert_close(deepseek.load(tmp_path)[0].eval()(idx), expected, rtol=0, atol=1e-5)
    keys = list(state)
    files = {'a.bin': keys[:7], 'b.bin': keys[7:]}
    (tmp_path / 'pytorch_model.bin').unlink()
    (tmp_path / 'pytorch_model.bin.index.json').write_text(
        json.dumps(dict(weight_map={k: f for f, ks in files.items() for k in ks}))
    )
    for file, ks in files.items():
        torch.save({k: state[k] for k in ks}, tmp_path / file)
        save_file({k: state[k].clone() for k in ks}, tmp_path / file.replace('bin', 'safetensors'))
    (tmp_path / 'b.safetensors').rename(tmp_path / 'elsewhere')
    refused(deepseek.load, tmp_path, match='lacks .* tensor')  # *.safetensors come first
    (tmp_path / 'a.safetensors').rename(tmp_path / 'a')
    torch.testing.assert_close(deepseek.load(tmp_path)[0].eval()(idx), expected, rtol=0, atol=1e-5)
    (
        (tmp_path / 'a').rename(tmp_path / 'a.safetensors'),
        (tmp_path / 'elsewhere').rename(tmp_path / 'b.safetensors'),
    )
    torch.testing.assert_close(deepseek.load(tmp_path)[0].eval()(idx), expected, rtol=0, atol=1e-5)
    save_file({keys[0]: state[keys[0]]}, tmp_path / 'c.safetensors')
    refused(deepseek.load, tmp_path, match='embed_tokens.* in two of its files')


def test_random_models():
    with torch.device('meta'):
        model, tokenizer = deepseek.load('random:deepseek-coder-1.3b')
    assert model.num_params() == 1_346_471_936 and tokenizer is None
    c = model.config
    assert (c.n_layer, c.n_head, c.n_kv_head, c.head_dim, c.n_inner, c.block_size) == (
        24,
        16,
        16,
        128,
        5504,
        16384,
    )
    assert (c.rope_theta, c.rope_scaling, c.norm_eps, c.tie_weights, c.bias) == (
        1e5,
        4.0,
        1e-6,
        False,
        False,
    )
    model, _ = deepseek.load('random:tiny', dtype=torch.bfloat16, dropout=0.1)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16} and model.config.dropout == 0.1
    assert (
        torch.get_default_dtype() == torch.float32
        and load.load_model('random:tiny').model.config.rope_scaling == 4
    )
    refused(deepseek.load, 'random:huge', match='random:tiny')


@pytest.mark.skipif(sys.platform != 'linux', reason='reads /proc')
def test_memory_holds_the_model_once(tmp_path):
    """Its own pages (those of mapped files belong to the system) peak at little more than one model while it loads."""
    model = GPT(
        GPT.Config(
            block_size=8,
            vocab_size=256,
            n_layer=8,
            n_embd=512,
            n_head=4,
            **LLAMA | dict(n_inner=1404),
        )
    )
    size = sum(p.nbytes for p in model.parameters())
    export.export(model, tmp_path / 'x', max_shard_size=2 * 10**7)
    del model

    def own():
        return 1024 * int(re.search(r'RssAnon:\s+(\d+)', Path('/proc/self/status').read_text())[1])

    before, peak, done = own(), [], threading.Event()
    watch = threading.Thread(
        target=lambda: [peak.append(own()) for _ in iter(lambda: done.wait(0.001), True)]
    )
    watch.start()
    model, _ = deepseek.load(tmp_path / 'x')
    after = own()
    done.set()
    watch.join()
    assert size > 8e7 and len(peak) > 3
    assert max(*peak, after) - before < 1.3 * size


# ---------------------------------------------------------------------------------------------------
# out

OUT = {
    'gpt': ('mha', LLAMA),
    'gpt_tied_gqa': ('mha', LLAMA | dict(n_kv_head=2, tie_weights=True, rope_theta=300.0)),
    'gpt_untied_mqa_linear': (
        'mha',
        LLAMA | dict(n_kv_head=1, tie_weights=False, rope_scaling=4.0, head_dim=12),
    ),
    'gpt_bias': ('mha', LLAMA | dict(bias=True, tie_weights=False)),
    'mla': ('mla', LLAMA | dict(tie_weights=False)),
    'mla_tied': ('mla', LLAMA | dict(tie_weights=True, qk_rope_head_dim=8, head_dim=14)),
    'mla_q_lora': (
        'mla',
        LLAMA | dict(q_lora_rank=9, tie_weights=False, rope_scaling=4.0, rope_theta=300.0),
    ),
    'mla_unequal': (
        'mla',
        LLAMA
        | dict(
            q_lora_rank=9, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=7, tie_weights=False
        ),
    ),
    'mla_narrow_v': (
        'mla',
        LLAMA
        | dict(
            n_head=3, n_embd=30, head_dim=10, qk_nope_head_dim=10, qk_rope_head_dim=6, v_head_dim=5
        ),
    ),
    'mla_only_rope': ('mla', LLAMA | dict(qk_rope_head_dim=8, head_dim=8)),
}


@pytest.mark.parametrize(
    'variant, shard',
    [(variant, 9000 if variant in ('gpt_tied_gqa', 'mla_q_lora') else 10**9) for variant in OUT],
)
def test_exports_load_in_stock_transformers_and_come_back(variant, shard, tiny, tokens, tmp_path):
    from transformers import AutoModelForCausalLM

    kind, settings = OUT[variant]
    ours, folder, idx = tiny(kind, **settings), tmp_path / 'out', tokens(24)
    export.export(ours, folder, max_shard_size=shard)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['out'] and (
        len(list(folder.glob('*.safetensors'))) > 1
    ) == (shard == 9000)
    assert (
        len({p.stat().st_mode for p in folder.iterdir()}) == 1
    )  # whoever may read one file may read all
    theirs, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    assert (
        type(theirs).__name__ == ('DeepseekV3ForCausalLM' if kind == 'mla' else 'LlamaForCausalLM')
        and theirs.num_parameters() == ours.num_params()
    )
    torch.testing.assert_close(ours(idx), theirs.eval()(idx).logits, rtol=0, atol=1e-5)
    text = torch.stack(list(generate(ours, idx[:, :4], 20, temperature=0)), dim=1)
    assert torch.equal(theirs.generate(idx[:, :4], max_new_tokens=20, do_sample=False)[:, 4:], text)

    back, _ = deepseek.load(folder)
    assert (
        type(back) is type(ours) and same(back, ours) and torch.equal(back.eval()(idx), ours(idx))
    )
    export.export(back, tmp_path / 'again', max_shard_size=shard)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == {
        p.name: p.read_bytes() for p in (tmp_path / 'again').iterdir()
    }


@pytest.mark.parametrize('interleave', [True, False])
def test_deepseek_v3_of_transformers_comes_in(interleave, tokens, tmp_path):
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    theirs = DeepseekV3ForCausalLM(
        DeepseekV3Config(
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
    ).eval()
    theirs.save_pretrained(tmp_path)
    ours, idx = deepseek.load(tmp_path)[0].eval(), tokens(60, 50)
    assert type(ours) is GPT_MLA
    torch.testing.assert_close(ours(idx), theirs(idx).logits, rtol=0, atol=1e-5)


def test_bf16_goes_out_as_bf16(tiny, tmp_path):
    ours = tiny('mla', **OUT['mla'][1]).to(torch.bfloat16)
    export.export(ours, tmp_path / 'out')
    assert json.loads((tmp_path / 'out' / 'config.json').read_text())[
        'dtype'
    ] == 'bfloat16' and same(deepseek.load(tmp_path / 'out')[0], ours)


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
    refused(
        export.export,
        tiny(kind, **LLAMA | change),
        tmp_path / 'out',
        match=f'ForCausalLM cannot express this model: .*{word}',
    )
    assert not list(tmp_path.iterdir())


def test_nothing_half_written(tiny, tmp_path, monkeypatch):
    import safetensors.torch

    model, folder = tiny(**LLAMA), tmp_path / 'out'
    monkeypatch.setattr(
        os, 'fsync', lambda file: (_ for _ in ()).throw(OSError(28, 'No space left on device'))
    )
    refused(export.export, model, folder, match='cannot write .*: No space left')
    monkeypatch.undo()
    monkeypatch.setattr(
        safetensors.torch,
        'save_file',
        lambda *args, **more: (_ for _ in ()).throw(KeyboardInterrupt()),
    )
    with pytest.raises(KeyboardInterrupt):
        export.export(model, folder)
    assert not list(tmp_path.iterdir())
    folder.mkdir()
    refused(export.export, model, folder, match='out is there already')
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, 'safetensors', None)
    refused(export.export, model, tmp_path / 'new', match='pip install')


# ---------------------------------------------------------------------------------------------------
# refusals on the way in


@pytest.mark.parametrize(
    'change, word',
    [
        (dict(model_type='qwen3'), "model_type 'qwen3'"),
        (dict(model_type='absent'), "model_type 'None'"),
        (dict(architectures=['LlamaModel']), 'LlamaModel'),
        (dict(attention_bias=True), 'attention_bias=True, mlp_bias=False'),
        (dict(mlp_bias=True), 'mlp_bias=True'),
        (dict(qk_norm=True), 'qk_norm=True'),
        (dict(num_local_experts=8), 'num_local_experts=8'),
        (dict(n_routed_experts=8), 'n_routed_experts=8'),
        (dict(sliding_window=4096), 'sliding_window=4096'),
        (dict(rope_scaling=dict(type='dynamic', factor=2.0)), "RoPE of type 'dynamic'"),
        (dict(rope_scaling=dict(rope_type='yarn', factor=2.0)), "type 'yarn'"),
        (dict(rope_parameters=dict(rope_type='llama3', factor=8.0)), "type 'llama3'"),
        (dict(partial_rotary_factor=0.5), 'partial_rotary_factor=0.5'),
        (
            dict(rope_parameters=dict(rope_type='default', partial_rotary_factor=0.5)),
            'partial_rotary_factor=0.5 in RoPE',
        ),
        (
            dict(rope_parameters=dict(rope_type='linear', factor=2.0, mscale_all_dim=1.0)),
            'mscale_all_dim',
        ),
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
        (
            dict(intermediate_size=40),
            r'gate_proj.weight has the shape \(44, 32\), but by config.json it is \(40, 32\)',
        ),
        (dict(vocab_size=51), 'embed_tokens'),
        (
            dict(tie_word_embeddings=True),
            'ties the head to the embedding, but lm_head.weight is another',
        ),
    ],
    ids=lambda value: str(value)[:60] if isinstance(value, dict) else '',
)
def test_llamas_that_have_no_place_here_are_refused(change, word, tmp_path):
    hf_llama(tmp_path)
    edit(tmp_path, **change)
    assert str(tmp_path) in refused(deepseek.load, tmp_path, match=word)


@pytest.mark.parametrize(
    'change, word',
    [
        (dict(first_k_dense_replace=1), 'mixture of experts'),
        (dict(first_k_dense_replace='absent'), "lacks 'first_k_dense_replace'"),
        (dict(attention_bias=True), 'attention_bias=True'),
        (dict(num_nextn_predict_layers=1), 'num_nextn_predict_layers=1'),
        (dict(q_lora_rank='absent'), "lacks 'q_lora_rank'"),
        (dict(q_lora_rank=9), 'lacks .*q_a'),
        (dict(num_key_value_heads=2), 'n_kv_head=2'),
        (dict(qk_rope_head_dim=0), 'qk_rope_head_dim=0'),
        (dict(rope_scaling=dict(type='yarn', factor=40)), "type 'yarn'"),
        (dict(quantization_config=dict(quant_method='fp8')), 'quantization_config'),
        (dict(kv_lora_rank=11), 'kv_a_layernorm|kv_b_proj|kv_a_proj'),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else '',
)
def test_deepseeks_that_have_no_place_here_are_refused(change, word, tiny, tmp_path):
    export.export(tiny('mla', **OUT['mla'][1]), tmp_path / 'x')
    edit(tmp_path / 'x', **change)
    assert 'x' in refused(deepseek.load, tmp_path / 'x', match=word)


def test_damaged_folders_are_told(tmp_path, monkeypatch):
    from safetensors.torch import load_file, save_file

    hf_llama(tmp_path, shard='10KB')
    shard = sorted(tmp_path.glob('*.safetensors'))[1]
    raw = shard.read_bytes()
    shard.unlink()
    refused(deepseek.load, tmp_path, match=rf'lacks {shard.name}, one of the \d+ shards')
    shard.write_bytes(raw[:100])
    refused(deepseek.load, tmp_path, match=f'{shard.name} cannot be read')
    shard.write_bytes(raw)
    state = load_file(shard)
    save_file({k: v.to(torch.int8) for k, v in state.items()}, shard)
    refused(deepseek.load, tmp_path, match='is int8, not a float')
    save_file(state | {'model.layers.0.self_attn.q_norm.weight': torch.ones(8)}, shard)
    refused(deepseek.load, tmp_path, match='unknown here, model.layers.0.self_attn.q_norm.weight')
    index = tmp_path / 'model.safetensors.index.json'
    for wrong in ('[]', '{}', '{"weight_map": {"a": 5}}', '{"weight_map": 5}'):
        index.write_text(wrong)
        refused(deepseek.load, tmp_path, match='index.json cannot be')
    (tmp_path.parent / 'a.safetensors').write_bytes(raw)
    index.write_text('{"weight_map": {"a": "../a.safetensors"}}')
    refused(
        deepseek.load, tmp_path, match='lacks a.safetensors, one of the 1 shards'
    )  # never outside the folder
    for path in (index, *tmp_path.glob('*.safetensors')):
        path.unlink()
    refused(deepseek.load, tmp_path, match='has no weights')
    torch.save([1], tmp_path / 'pytorch_model.bin')
    refused(deepseek.load, tmp_path, match='pytorch_model.bin cannot be read')
    (tmp_path / 'config.json').write_text('{"model_type"')
    refused(deepseek.load, tmp_path, match='damaged or no JSON')
    refused(load.load_model, tmp_path)
    (tmp_path / 'config.json').unlink()
    refused(deepseek.load, tmp_path, match='has no config.json')
    refused(deepseek.load, 'no/such/place', match='neither a folder nor')
    monkeypatch.setitem(sys.modules, 'huggingface_hub', None)
    refused(deepseek.load, 'someone/a-model', match='pip install huggingface_hub')
    refused(load.load_model, 'someone/a-model', match='pip install huggingface_hub')
    refused(
        load.load_model, 'tests/a-model', match='there is no checkpoint'
    )  # a typo in a path asks no network


def test_the_hub(tmp_path, monkeypatch, tokens):
    import huggingface_hub

    theirs, idx = hf_llama(tmp_path), tokens(60, 50)

    asked = []

    def download(name, allow_patterns, ignore_patterns):
        if name != 'someone/a-model':
            raise ConnectionError('no network')
        asked.extend(allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, 'snapshot_download', download)
    source = load.load_model('someone/a-model', kernel='eager', dropout=0.2)
    model, content = source.model, source.checkpoint
    torch.testing.assert_close(model.eval()(idx), theirs(idx).logits, rtol=0, atol=1e-5)
    assert content == {} and model.config.kernel == 'eager' and model.config.dropout == 0.2
    assert '*.safetensors' in asked and 'pytorch_model*.bin' not in asked  # only what is needed
    refused(deepseek.load, 'someone/other', match='ConnectionError.*connect to the network')


def test_packages_that_are_missing_are_named(tmp_path, monkeypatch):
    hf_llama(tmp_path, vocab_size=300)
    (tmp_path / 'tokenizer.json').write_text('{}')
    refused(deepseek.load, tmp_path, match='is no tokenizer that can be loaded')
    with monkeypatch.context() as without:
        without.setitem(sys.modules, 'tokenizers', None)
        refused(deepseek.load, tmp_path, match='needs tokenizers: pip install')
    (tmp_path / 'tokenizer.json').unlink()
    monkeypatch.setitem(sys.modules, 'safetensors', None)
    refused(deepseek.load, tmp_path, match='needs safetensors: pip install')


# ---------------------------------------------------------------------------------------------------
# tokenizers


@pytest.fixture(scope='module')
def bpes(tmp_path_factory):
    """Tokenizers trained on TEXT: name -> tokenizer.json."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    folder, files = tmp_path_factory.mktemp('bpe'), {}
    for name in ('byte_level', 'pieces', 'split', 'lower'):
        tok = Tokenizer(
            models.BPE(
                byte_fallback=name == 'pieces',
                unk_token='<unk>' if name == 'pieces' else None,
                fuse_unk=name == 'pieces',
            )
        )
        special = ['<bos>', '<eos>']
        if name == 'pieces':  # as Llama 2 has it
            special += ['<unk>'] + [f'<0x{b:02X}>' for b in range(256)]
            tok.normalizer = normalizers.Sequence(
                [normalizers.Prepend('▁'), normalizers.Replace(' ', '▁')]
            )
            tok.decoder = decoders.Sequence(
                [
                    decoders.Replace('▁', ' '),
                    decoders.ByteFallback(),
                    decoders.Fuse(),
                    decoders.Strip(' ', 1, 0),
                ]
            )
        elif name == 'split':  # drops white space, as a damaged one does
            tok.pre_tokenizer = pre_tokenizers.Sequence(
                [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
            )
            tok.decoder = decoders.ByteLevel()
        else:
            tok.normalizer = normalizers.Lowercase() if name == 'lower' else None
            tok.pre_tokenizer, tok.decoder = (
                pre_tokenizers.ByteLevel(add_prefix_space=False),
                decoders.ByteLevel(),
            )
        alphabet = [] if name == 'pieces' else pre_tokenizers.ByteLevel.alphabet()
        tok.train_from_iterator(
            [TEXT],
            trainers.BpeTrainer(
                vocab_size=len(special) + 290,
                special_tokens=special,
                initial_alphabet=alphabet,
                show_progress=False,
            ),
        )
        if name == 'pieces':  # only the bytes' names as plain tokens
            spec = json.loads(tok.to_str())
            spec['added_tokens'] = spec['added_tokens'][:3]
            tok = Tokenizer.from_str(json.dumps(spec))
        files[name] = folder / f'{name}.json'
        tok.save(str(files[name]))
    return files


def with_tokenizer(folder, file, **config):
    (folder / 'tokenizer.json').write_bytes(file.read_bytes())
    (folder / 'tokenizer_config.json').write_text(
        json.dumps(dict(bos_token='<bos>', eos_token='<eos>') | config)
    )


@pytest.mark.parametrize('name', ['byte_level', 'pieces'])
def test_texts_come_back(name, bpes, tmp_path):
    from transformers import PreTrainedTokenizerFast

    hf_llama(tmp_path, vocab_size=600, bos_token_id=0, eos_token_id=1)
    with_tokenizer(tmp_path, bpes[name], add_bos_token=name == 'pieces')
    model, codec = deepseek.load(tmp_path)
    fast = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / 'tokenizer.json'))
    assert (
        codec.vocab_size == len(fast) <= 600
        and codec.bos == (0 if name == 'pieces' else None)
        and codec.eos == {1}
    )
    for text in (TEXT, *PROBES):
        ids = codec.encode(text)
        assert ids == fast.encode(text, add_special_tokens=False) and codec.decode(ids) == text
        assert codec.decode_bytes(ids).decode() == ' ' * codec.leading_blank + text
        assert b''.join(codec.decode_bytes([i]) for i in ids) == codec.decode_bytes(ids)
    assert (
        codec.decode_bytes([0, *codec.encode('x')]).endswith(b'x')
        and codec.decode_bytes([599]) == b''
    )


@pytest.mark.parametrize('name', ['split', 'lower'])
def test_a_tokenizer_that_changes_texts_is_refused(name, bpes, tmp_path):
    hf_llama(tmp_path, vocab_size=600)
    with_tokenizer(tmp_path, bpes[name])
    refused(
        deepseek.load,
        tmp_path,
        match='turns .* into .*: a tokenizer that changes texts'
        if name == 'split'
        else "turns '.*The end.' into 'the end.'",
    )


def test_a_tokenizer_larger_than_the_model_is_refused(bpes, tmp_path):
    hf_llama(tmp_path)
    with_tokenizer(tmp_path, bpes['byte_level'])
    refused(deepseek.load, tmp_path, match=r'its tokenizer has \d+ tokens, the model only 50')


def test_the_scripts_take_such_folders(bpes, tmp_path):
    """Sample from a foreign Llama, export it as another folder with its tokenizer, sample the same; train on from it."""
    hf_llama(tmp_path / 'llama', torch.bfloat16, vocab_size=600, bos_token_id=0, eos_token_id=1)
    with_tokenizer(tmp_path / 'llama', bpes['byte_level'], add_bos_token=True)
    model, codec = deepseek.load(tmp_path / 'llama')
    export.export(model, tmp_path / 'copy', codec)
    export.export(model, tmp_path / 'third', tmp_path / 'llama')
    assert all((tmp_path / name / 'tokenizer_config.json').exists() for name in ('copy', 'third'))
    shape = json.loads((tmp_path / 'third' / 'config.json').read_text())
    assert (shape['bos_token_id'], shape['eos_token_id']) == (0, 1)

    def run(script, *words):
        done = subprocess.run(
            [sys.executable, str(ROOT / script), '--device=cpu', *words],
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout, done.stderr

    texts = {
        folder: run(
            'sample.py',
            f'--init_from={folder}',
            '--start=  def f(x):',
            '--num_samples=1',
            '--max_new_tokens=8',
            '--dtype=float32',
        )
        for folder in ('llama', 'copy')
    }
    assert (
        texts['llama'][0].startswith('  def f(x):')
        and texts['llama'][0] == texts['copy'][0]
        and 'MHA, 0.06M parameters, llama' in texts['llama'][1]
    )
    (tmp_path / 'text').mkdir()
    for split in ('train', 'val'):
        (tmp_path / 'text' / f'{split}.bin').write_bytes(
            torch.randint(500, (400,)).to(torch.int16).numpy().tobytes()
        )
    (tmp_path / 'text' / 'meta.json').write_text(
        json.dumps(dict(tokenizer='hf', source='a test', dtype='uint16', vocab_size=500))
    )
    out, _ = run(
        'train.py',
        '--init_from=llama',
        '--dataset=text',
        '--max_iters=2',
        '--batch_size=2',
        '--gradient_accumulation_steps=1',
        '--compile=False',
        '--eval_iters=1',
    )
    assert 'llama has its own tokenizer.json' in out
    model = load.load_model(tmp_path / 'out').model
    assert (
        {p.dtype for p in model.parameters()} == {torch.float32}
        and model.config.act == 'swiglu'
        and re.search('step +2', out)
    )
