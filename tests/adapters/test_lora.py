"""LoRA and QLoRA on GPT: fused products, merged weights and 4 bits, each against its reference."""

import pytest
import torch
import torch.nn as nn
from adapter_models import KINDS, LLAMA, make_adapted, move_adapters
from helpers import needs

from model import GPT, GPTConfig
from nanomla.adapters import lora
from nanomla.adapters.lora import LinearGroup, LoraSettings
from nanomla.core.configurator import UserError
from nanomla.inference.cache import Cache

needs('peft', 'bitsandbytes')
every_kind = pytest.mark.parametrize('name', KINDS)
both_adapters = pytest.mark.parametrize('adapter', ['lora', 'qlora'])


@pytest.fixture
def adapted(tiny):
    """adapted(adapter, name, ...) -> a model by make_adapted."""

    def make(adapter, name='mha', **how):
        return make_adapted(tiny, adapter, name, **how)

    return make


def names_with_adapters(model):
    paths = [path for path, _ in model.named_modules() if path.endswith('lora_A')]
    return {path.split('.')[-2] for path in paths}


@both_adapters
@every_kind
def test_a_model_with_new_adapters_is_the_base_model(tiny, tokens, adapted, adapter, name):
    model = adapted(adapter, name, moved=False)
    idx = tokens(24)
    if adapter == 'qlora':  # what was quantised, dequantised by bitsandbytes
        base, tolerance = lora.merge(adapted(adapter, name, moved=False)), 1e-5
    else:
        kind, settings = KINDS[name]
        base, tolerance = tiny(kind, **settings), 0
    with torch.no_grad():
        logits = model(idx)
        assert (logits - base(idx)).abs().max() <= tolerance * logits.abs().max()


@both_adapters
@every_kind
def test_only_adapters_learn_and_all_of_them(tokens, adapted, adapter, name):
    model = adapted(adapter, name).train()
    model(tokens(24), tokens(24)).backward()
    for path, p in model.named_parameters():
        assert p.requires_grad == ('lora_' in path), path
        assert (p.grad is not None) == p.requires_grad, path
        assert p.grad is None or p.grad.abs().max() > 0, path
    for group in lora.groups(model):
        assert all(lora.has_adapter(member) for member in group.members)
    assert set(lora.member_names(model)) >= {'q_proj', 'o_proj', 'down_proj', 'up_proj'}


@both_adapters
@pytest.mark.parametrize('dropout', [0.0, 0.3])
@every_kind
def test_the_fused_product_is_what_peft_computes(adapted, adapter, dropout, name):
    model = adapted(adapter, name, dropout=dropout).train()
    for group in lora.groups(model):
        x = torch.randn(5, group.linears[0].in_features)
        torch.manual_seed(1)
        fused = group(x)
        torch.manual_seed(1)  # the same values drop
        assert (fused - group.reference(x)).abs().max() < 1e-5


@both_adapters
@every_kind
def test_a_merged_model_agrees(tokens, adapted, adapter, name):
    model, idx = adapted(adapter, name).eval(), tokens(24)
    with torch.no_grad():
        before = model(idx)
        merged = lora.merge(model)
        assert (merged(idx) - before).abs().max() < 1e-4
    assert not lora.groups(merged)
    assert sum(p.numel() for p in merged.parameters()) == merged.num_params()
    assert all(p.requires_grad for p in merged.transformer.h[0].attn.c_proj.parameters())


@both_adapters
def test_absorbed_decoding_sees_the_adapters(tokens, adapted, adapter):
    model, idx = adapted(adapter, 'mla').eval(), tokens(20)
    with torch.no_grad(), lora.cached_weights(model):
        cached = model(idx, context=Cache.of(model, 2, 20))
        assert (cached - model(idx)).abs().max() < 1e-4
    assert all(group.cached_weight is None for group in lora.groups(model))


def test_some_targets(adapted):
    model = adapted('lora', targets='q_proj,v_proj')
    assert names_with_adapters(model) == {'q_proj', 'v_proj'}
    for group in lora.groups(model):
        x = torch.randn(3, group.linears[0].in_features)
        assert (group(x) - group.reference(x)).abs().max() < 1e-5


def test_names_of_mha_mean_their_relatives_in_mla(adapted):
    model = adapted('lora', 'mla', targets='q_proj,k_proj,v_proj,o_proj')
    assert names_with_adapters(model) == {'q_proj', 'kv_a_proj_with_mqa', 'kv_b_proj', 'o_proj'}


def test_no_targets_add_no_adapters(tokens, tiny, adapted):
    model = adapted('lora', targets='')
    assert names_with_adapters(model) == set()
    kind, settings = KINDS['mha']
    with torch.no_grad():
        assert torch.equal(model(tokens(24)), tiny(kind, **settings)(tokens(24)))


def test_parameters_are_counted_as_what_they_stand_for(tiny, adapted):
    kind, settings = KINDS['mha']
    whole = tiny(kind, **settings).num_params()
    for adapter in ('lora', 'qlora'):
        trainable, total = lora.count(adapted(adapter))
        assert trainable > 0 and total == whole + trainable
    assert lora.count(lora.adapt(tiny(kind, **settings), 'full')) == (whole, whole)


@pytest.mark.parametrize(
    'kind, how, words',
    [
        ('dora', {}, "adapter='dora' is not known: use full, lora, qlora"),
        ('lora', dict(targets='q_proj,w_proj'), "target 'w_proj' is none of this model's Linears"),
        ('lora', dict(r=0), 'lora_r=0'),
        ('lora', dict(dropout=1.0), 'lora_dropout=1.0'),
    ],
)
def test_what_cannot_be_adapted_is_one_line(tiny, kind, how, words):
    with pytest.raises(UserError, match=words):
        lora.adapt(tiny('mha', **LLAMA), kind, LoraSettings(**how))


# -------------------------------------------------------------------------------------------------
# weights that others read

WEIGHT_READERS = dict(  # MLA that multiplies by parts of kv_b_proj.weight itself
    absorbed=dict(absorb=True),
    normed=dict(qk_norm=True, qk_norm_latent=True),
    normed_absorbed=dict(qk_norm=True, qk_norm_latent=True, absorb=True),
    normed_q_latent=dict(qk_norm=True, qk_norm_latent=True, q_lora_rank=10),
)


def model_in_float64(tiny, targets, **settings):
    model = tiny('mla', **LLAMA, kv_lora_rank=24, **settings)
    lora.adapt(model, 'lora', LoraSettings(r=3, alpha=6, targets=targets))
    model.double().stream = torch.float64
    move_adapters(model, std=0.3)
    return model


@pytest.mark.parametrize('targets', ['kv_b_proj', 'all'])
@pytest.mark.parametrize('reader', WEIGHT_READERS)
def test_gradients_through_a_weight_that_attention_reads(tiny, tokens, reader, targets):
    """The gradient along a random direction is the finite difference, for A and B alike."""
    model = model_in_float64(tiny, targets, **WEIGHT_READERS[reader])
    idx = tokens(16)
    projection = torch.randn(2, 16, 32, dtype=torch.float64)

    def loss():
        return (model.hidden(idx) * projection).sum()

    loss().backward()
    for part in ('lora_A', 'lora_B'):
        params = [p for path, p in model.named_parameters() if part in path]
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in params)
        directions = [torch.randn_like(p) for p in params]
        slope = sum((p.grad * d).sum() for p, d in zip(params, directions))
        step = 1e-6
        values = []
        with torch.no_grad():
            for move in (step, -2 * step):
                for p, d in zip(params, directions):
                    p += move * d
                values.append(loss())
            for p, d in zip(params, directions):
                p += step * d
        difference = (values[0] - values[1]) / (2 * step)
        assert abs(difference - slope) <= 1e-6 * abs(slope)


def test_the_absorbed_form_has_the_gradients_of_the_naive_one(tiny, tokens):
    found = []
    for absorb in (False, True):
        model = model_in_float64(tiny, 'all', absorb=absorb)
        torch.manual_seed(2)
        move_adapters(model, std=0.3)
        model.hidden(tokens(16)).square().sum().backward()
        found.append([p.grad for p in model.parameters() if p.requires_grad])
    for naive, absorbed in zip(*found, strict=True):
        assert (naive - absorbed).abs().max() <= 1e-9 * naive.abs().max()


@both_adapters
@every_kind
def test_the_weight_of_a_group_is_differentiable(adapted, adapter, name):
    """Whoever reads `weight` gets the gradients of the group's own product, without dropout."""
    model = adapted(adapter, name)
    for group in lora.groups(model):
        x = torch.randn(5, group.linears[0].in_features)
        params = [p for p in group.parameters() if p.requires_grad]
        y = x @ group.weight.T
        if group.bias is not None:
            y = y + group.bias
        assert (y - group(x)).abs().max() < 1e-4
        expected = torch.autograd.grad(group(x).square().sum(), params)
        for a, b in zip(torch.autograd.grad(y.square().sum(), params), expected):
            assert (a - b).abs().max() <= 1e-4 * b.abs().max()


def test_a_cached_weight_is_for_decoding_alone(adapted):
    model = adapted('lora', 'mla')
    group = model.transformer.h[0].attn.kv_b_proj
    with lora.cached_weights(model):
        assert group.weight.requires_grad
        with torch.no_grad():
            assert group.weight is group.weight


# -------------------------------------------------------------------------------------------------
# 4 bits


@pytest.mark.parametrize('double', [True, False])
@pytest.mark.parametrize('shape', [(64, 64), (192, 128), (70, 64)])
def test_nf4_is_what_bitsandbytes_dequantises(double, shape):
    rows, columns = shape
    group = LinearGroup(nn.Linear(columns, rows, bias=False), ('one',), [rows])
    group.quantise(torch.float32, double)
    ours = group.dequantised(0, torch.float32)
    assert torch.equal(ours, lora.dequantise(group.linears[0]))


def test_nf4_takes_half_a_byte_a_parameter():
    model = GPT(GPTConfig(block_size=8, vocab_size=40, n_layer=1, n_head=8, n_embd=1024, **LLAMA))
    lora.adapt(model, 'qlora', LoraSettings(r=2))
    assert abs(lora.bytes_per_parameter(model) - 0.516) <= 0.002


def test_an_evaluation_before_training_changes_nothing(tokens, adapted):
    """
    On CPUs with AVX512-BF16 bitsandbytes would repack its weights in an evaluation and then pass no
    gradient on.
    """

    def gradients(evaluated):
        model = adapted('qlora')
        if evaluated:
            model.eval()
            with torch.no_grad():
                model(tokens(24))
        loss = model.train()(tokens(24), tokens(24))
        loss.backward()
        for group in lora.groups(model):
            assert not any(linear.support_avx512bf16_for_cpu for linear in group.linears)
        return [loss.detach()] + [p.grad for p in model.parameters() if p.requires_grad]

    assert all(torch.equal(a, b) for a, b in zip(gradients(False), gradients(True)))
