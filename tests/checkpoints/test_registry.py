"""Any attention in attentions.MODELS works here, or is refused by name."""

from dataclasses import dataclass

import pytest
import torch
from refusals import refused

from model import GPT, GPTConfig, MultiHeadAttention
from nanomla.checkpoints import native
from nanomla.checkpoints.export import export
from nanomla.checkpoints.load import load_model


@dataclass
class GatedConfig(GPTConfig):
    gate: float = 0.5


class GatedAttention(MultiHeadAttention):
    """MHA with other mathematics: its output is scaled."""

    def __init__(self, config, layer=0):
        super().__init__(config, layer)
        self.gate = config.gate

    def forward(self, x, rope, context=None):
        return self.gate * super().forward(x, rope, context)


class GatedGPT(GPT):
    Config, Attention = GatedConfig, GatedAttention


@pytest.fixture
def gated(monkeypatch):
    monkeypatch.setitem(native.MODELS, 'gated', GatedGPT)


SETTINGS = dict(n_layer=1, n_head=2, n_embd=16, block_size=8, dropout=0.0, gate=2.0, lr=0.1)


def test_a_registered_attention_is_made_from_its_own_settings(gated):
    model = native.new_model('gated', SETTINGS, dict(gate='--gate=2'), vocab_size=300)
    assert type(model) is GatedGPT
    assert native.kind_of(model) == 'gated'
    assert model.config.gate == model.transformer.h[0].attn.gate == 2.0
    assert model.config.vocab_size == 320  # a large vocabulary, up to a multiple of 64


def test_it_is_saved_and_comes_back(gated, tiny, tokens, tmp_path):
    model = tiny('gated', gate=3.0)
    content = dict(
        kind='gated', model_args=native.model_args(model), model=model.state_dict(), step=1
    )
    native.save(tmp_path / 'ckpt.pt', content)
    back = load_model(tmp_path).model.eval()
    assert type(back) is GatedGPT
    assert torch.equal(back(tokens(13)), model(tokens(13)))
    assert native.kind_in(tmp_path) == 'gated'


def test_where_it_is_not_registered_its_checkpoint_is_refused_by_name(tiny, tmp_path):
    model = tiny('mha')
    content = dict(
        kind='unknown', model_args=native.model_args(model), model=model.state_dict(), step=1
    )
    native.save(tmp_path / 'ckpt.pt', content)
    refused(load_model, tmp_path, match="a model of kind 'unknown', known are mha, mla")


def test_an_unregistered_model_is_refused_by_name():
    refused(native.kind_of, GatedGPT(GatedConfig(**small())), match='GatedGPT is not registered')


def small():
    return dict(n_layer=1, n_head=2, n_embd=16, block_size=8, vocab_size=20)


@pytest.mark.parametrize(
    'kind, given, match',
    [
        ('mha', 'gate', "gate is a setting of GATED, but attention='mha'"),
        ('mha', 'kv_lora_rank', "kv_lora_rank is a setting of MLA.*, but attention='mha'"),
        ('gated', 'kv_lora_rank', "kv_lora_rank is a setting of MLA.*, but attention='gated'"),
        ('mla', 'gate', "gate is a setting of GATED, but attention='mla'"),
        ('mlp', 'n_head', "attention='mlp' is not known: use mha, mla, .*gated"),
    ],
)
def test_settings_of_other_attentions_are_refused(kind, given, match, gated):
    where = {given: f'--{given}=1'}
    refused(native.new_model, kind, SETTINGS, where, 300, match=match)


def test_settings_that_do_not_fit_one_another_end_in_one_line():
    settings = SETTINGS | dict(n_embd=15)
    refused(native.new_model, 'mha', settings, {}, 300, match='n_embd=15 is not a multiple')


def test_a_loaded_model_is_held_against_what_was_asked_for(gated, tiny):
    model = tiny('gated')

    def check(name, value, free=()):
        given = {name: f'--{name}={value}'}
        native.check_given(model, {name: value}, given, 'out', free)

    check('gate', 0.5)
    check('n_kv_head', 0)  # derived, whatever it is
    check('dropout', 0.3, free=['dropout'])
    refused(check, 'gate', 2.0, match='--gate=2.0: gate=2.0, but the model of out has 0.5')
    refused(check, 'attention', 'mha', match="the model of out has attention='gated'")
    refused(check, 'kv_lora_rank', 8, match='kv_lora_rank is a setting of MLA')


LLAMA = dict(bias=False, pos='rope', norm='rmsnorm', act='swiglu')


def test_other_mathematics_are_never_exported(gated, tiny, tmp_path):
    model = tiny('gated', **LLAMA)
    refused(export, model, tmp_path / 'out', match='GatedGPT cannot be exported: only GPT')
    model = tiny('mha', **LLAMA)
    model.transformer.h[1].attn = GatedAttention(GatedConfig(**vars(model.config)))
    match = 'GatedAttention cannot be exported: LlamaForCausalLM has MultiHeadAttention'
    refused(export, model, tmp_path / 'out', match=match)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('kind', ['mha', 'mla'])
def test_another_softmax_scale_is_never_exported(kind, tiny, tmp_path):
    match = r'the softmax scale of layer \d is 0.5 \(it has 1 / sqrt\(8\)\)'
    model = tiny(kind, **LLAMA, softmax_scale=0.5)
    refused(export, model, tmp_path / 'out', match=match)
    model = tiny(kind, **LLAMA)
    model.transformer.h[1].attn.scale = 0.5
    refused(export, model, tmp_path / 'out', match=match)
    assert not list(tmp_path.iterdir())
    model = tiny(kind, **LLAMA, softmax_scale=8**-0.5)  # what the stock class has anyway
    export(model, tmp_path / 'out')
