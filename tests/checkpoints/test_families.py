"""Every family that is read: the logits and the greedy text of transformers, and refusals."""

import pytest
import torch
from families import FAMILIES, LONGROPE, assert_same_greedy_text, hf_family
from llamas import edit_config
from refusals import refused

from nanomla.checkpoints import hf, native
from nanomla.checkpoints.export import export
from nanomla.inference.cache import Cache


@pytest.fixture(scope='module')
def family(tmp_path_factory):
    """family(name) -> a folder, the model that transformers wrote to it, and ours."""
    made = {}

    def make(name):
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            theirs = hf_family(folder, name)
            made[name] = folder, theirs, hf.load(folder)[0].eval()
        return made[name]

    return make


@pytest.mark.parametrize('name', FAMILIES)
@torch.no_grad()
def test_logits_and_greedy_text_are_those_of_transformers(name, family, tokens):
    _, theirs, ours = family(name)
    idx = tokens(60, 50)
    torch.testing.assert_close(ours(idx), theirs(idx).logits, rtol=0, atol=1e-5)
    assert_same_greedy_text(ours, theirs, tokens(5, 50), 15)


@pytest.mark.parametrize('name', FAMILIES)
@torch.no_grad()
def test_with_a_cache_the_logits_are_the_same(name, family, tokens):
    _, _, ours = family(name)
    idx = tokens(60, 50)
    cache = Cache.of(ours, len(idx), 64)
    pieces = [ours(piece, context=cache) for piece in idx.split([20, 1, 15, 1, 23], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), ours(idx), rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_checkpoint_keeps_frequencies_and_layers_without_rope(family, tokens, tmp_path):
    _, _, ours = family('smollm3')
    assert ours.config.nope_layers == (3,) and len(ours.config.rope_frequencies) == 4
    args = native.model_args(ours)
    native.save(tmp_path / 'ckpt.pt', dict(kind='mha', model_args=args, model=ours.state_dict()))
    again = native.build(native.load(tmp_path / 'ckpt.pt')).eval()
    assert torch.equal(again(tokens(60, 50)), ours(tokens(60, 50)))


# -------------------------------------------------------------------------------------------------
# lengths


@pytest.mark.parametrize('name', ['mistral', 'qwen2', 'phi3', 'smollm3', 'qwen3'])
def test_a_sliding_window_shortens_the_model_to_where_it_does_not_matter(name, tmp_path, tokens):
    window = dict(sliding_window=16)
    if name in ('qwen2', 'qwen3', 'smollm3'):
        window |= dict(use_sliding_window=True)
    if name in ('qwen2', 'qwen3'):
        window |= dict(max_window_layers=1)
    theirs = hf_family(tmp_path, name, **window)
    ours, _ = hf.load(tmp_path)
    assert ours.config.block_size == 16
    idx = tokens(16, 50)
    torch.testing.assert_close(ours.eval()(idx), theirs(idx).logits, rtol=0, atol=1e-5)
    longer = tokens(20, 50)
    assert (theirs(longer).logits[:, :16] - theirs(idx).logits).abs().max() > 0.01
    refused(hf.load, tmp_path, match='sliding window of 16 .*use at most 16', block_size=20)


@pytest.mark.parametrize('name', ['mistral', 'qwen2', 'phi3', 'smollm3'])
def test_a_window_that_no_layer_uses_does_not_shorten_the_model(name, tmp_path):
    window = dict(sliding_window=None)
    if name in ('qwen2', 'smollm3'):
        window = dict(sliding_window=16, use_sliding_window=False)
    hf_family(tmp_path, name, **window)
    assert hf.load(tmp_path)[0].config.block_size == 64
    edit_config(tmp_path, sliding_window=200)
    assert hf.load(tmp_path, block_size=48)[0].config.block_size == 48


def test_a_rope_that_changes_with_the_length_shortens_the_model(tmp_path):
    hf_family(tmp_path, 'phi3_long')
    assert hf.load(tmp_path)[0].config.block_size == 64  # of 128
    refused(hf.load, tmp_path, match='RoPE changes beyond 64', block_size=65)
    same = LONGROPE | dict(long_factor=LONGROPE['short_factor'])
    edit_config(tmp_path, rope_parameters=same)
    assert hf.load(tmp_path)[0].config.block_size == 128


# -------------------------------------------------------------------------------------------------
# what else is reported


def test_parameters_that_only_our_model_has_are_zero(family):
    _, theirs, ours = family('qwen2')
    added = [p for name, p in ours.named_parameters() if name.endswith('c_proj.bias')]
    added += [p for name, p in ours.named_parameters() if name.endswith('c_fc.bias')]
    assert ours.num_params() == theirs.num_parameters() + sum(p.numel() for p in added)
    assert not any(p.any() for p in added)


@pytest.mark.parametrize('kind', ['gemma', 'gemma2', 'gemma3_text', 'mixtral', 'qwen3_moe'])
def test_families_that_have_no_place_here_are_refused_with_the_reason(kind, tmp_path):
    hf_family(tmp_path, 'mistral')
    edit_config(tmp_path, model_type=kind)
    refused(hf.load, tmp_path, match=f"model_type '{kind}' has no place here: .{{10}}")


@pytest.mark.parametrize(
    'name, change, word',
    [
        ('smollm3', dict(no_rope_layers=[1]), 'no_rope_layers has 1 entries for 4 layers'),
        ('mistral', dict(layer_types=['chunked_attention'] * 2), 'chunked_attention'),
        ('phi3_long', dict(rope_parameters=LONGROPE | dict(short_factor=[1.0])), '1 numbers for 4'),
        ('granite', dict(num_local_experts=4), 'num_local_experts=4'),
        ('qwen2', dict(attention_chunk_size=8), 'attention_chunk_size=8'),
    ],
)
def test_entries_that_do_not_fit_are_named(name, change, word, tmp_path):
    hf_family(tmp_path, name)
    edit_config(tmp_path, **change)
    refused(hf.load, tmp_path, match=word)


# -------------------------------------------------------------------------------------------------
# out again

# Why these cannot be exported; the others load as LlamaForCausalLM.
NOT_EXPORTED = dict(
    yarn='softmax scale',
    yarn_mscale='softmax scale',
    phi3_long='softmax scale',
    granite='softmax scale',
    granite_untied='softmax scale',
    smollm3='nope_layers',
    smollm3_first='nope_layers',
    qwen3='GPT_QKGain cannot be exported',
    olmo2='GPT_QKGain cannot be exported',
)


@pytest.mark.parametrize('name', [name for name in FAMILIES if name not in NOT_EXPORTED])
@torch.no_grad()
def test_what_a_stock_llama_can_express_is_exported_as_one(name, family, tokens, tmp_path):
    from transformers import LlamaForCausalLM

    _, _, ours = family(name)
    export(ours, tmp_path / 'out')
    theirs = LlamaForCausalLM.from_pretrained(tmp_path / 'out').eval()
    idx = tokens(60, 50)
    torch.testing.assert_close(theirs(idx).logits, ours(idx), rtol=0, atol=1e-5)
    back = hf.load(tmp_path / 'out')[0].eval()
    torch.testing.assert_close(back(idx), ours(idx), rtol=0, atol=1e-5)


@pytest.mark.parametrize('name, why', NOT_EXPORTED.items())
def test_what_it_cannot_express_is_refused_before_anything_is_written(name, why, family, tmp_path):
    _, _, ours = family(name)
    refused(export, ours, tmp_path / 'out', match=why)
    assert not list(tmp_path.iterdir())
