"""convert: exact where nothing is left out, RoPE masked as asked, and a model like any other."""

import copy
import math

import pytest
import torch
from converting import LLAMA, SOURCES, assert_refused, assert_same_logits, converted

import model as model_py
from model import GPT, MultiHeadAttention
from nanomla.checkpoints import native
from nanomla.checkpoints.export import export
from nanomla.checkpoints.hf import load as load_hf
from nanomla.checkpoints.load import load_model
from nanomla.conversion import low_rank
from nanomla.conversion.calibration import measure
from nanomla.conversion.settings import CHOICES
from nanomla.inference.cache import Cache
from nanomla.inference.generate import generate

# -------------------------------------------------------------------------------------------------
# exact


@pytest.mark.parametrize('name', SOURCES)
@pytest.mark.parametrize('low_rank', CHOICES['low_rank'])
@pytest.mark.parametrize(
    'settings',
    [
        dict(),
        dict(rope_heads='shared', q_lora_rank=32),
        dict(rotate=True),
        dict(rope_heads='shared', real=True, ranks='spectrum'),
    ],
    ids=str,
)
def test_with_all_pairs_and_the_full_rank_nothing_changes(name, low_rank, settings, source, tokens):
    model, moments = source(name)
    settings = dict(rope_heads='own', low_rank=low_rank) | settings
    if model.config.pos != 'rope':
        settings = settings | dict(rope_heads='own', real=False)
    if low_rank in ('split', 'joint'):
        moments = None
    mla, layers = converted(model, moments, **settings)
    assert_same_logits(mla, model, tokens(24))
    assert all(layer['energy'] == pytest.approx(1, abs=1e-9) for layer in layers)
    for block in mla.transformer.h:
        block.attn.absorb = True
    assert_same_logits(mla, model, tokens(24))
    if low_rank == 'joint':
        C, K, D = model.config.n_embd, model.config.n_kv_head, model.config.head_dim
        assert mla.config.kv_lora_rank <= min(C, 2 * K * D)


def test_joint_rank_of_mha_is_lossless_at_d_model(source, tokens):
    model, _ = source('gpt2')
    mla, _ = converted(model, low_rank='joint', kv_lora_rank=32)
    assert mla.config.kv_lora_rank == model.config.n_embd == 32
    assert_same_logits(mla, model, tokens(24))
    why = 'kv_lora_rank=33 is above the full rank'
    assert_refused(why, converted, model, low_rank='joint', kv_lora_rank=33)


@pytest.mark.parametrize('settings', [dict(), dict(rope_heads='shared', q_lora_rank=32)], ids=str)
def test_in_float32_where_matrices_are_large(settings, source, tokens, monkeypatch):
    monkeypatch.setattr(low_rank, 'SMALL', 8)
    for name in ('mha', 'gqa'):
        model, _ = source(name)
        mla, _ = converted(model, rope='uniform', low_rank='joint', **settings)
        assert_same_logits(mla, model, tokens(24), atol=3e-5)


# -------------------------------------------------------------------------------------------------
# RoPE on some pairs

rotate = model_py.rotate


def rotate_only(keeps):
    """Return model.rotate for a layer that turns only the pairs `keeps` (K, F) of its kv heads."""

    def rotate_masked(x, rope):
        cos, sin = rope
        mask = keeps.repeat_interleave(x.size(2) // len(keeps), dim=0)
        return rotate(x, (torch.where(mask, cos, 1.0), torch.where(mask, sin, 0.0)))

    return rotate_masked


def kept_pairs(config, moments, rope, p):
    """Return the pairs that keep RoPE in each kv head of a layer, written down from the papers."""
    F, K, H = config.head_dim // 2, config.n_kv_head, config.n_head
    fixed = dict(
        high=list(range(p)),
        low=list(range(F - p, F)),
        uniform=[i * F // p for i in range(p)],
    )
    if rope in fixed:
        return [fixed[rope]] * K
    heads = []
    for k in range(K):
        scores = []
        for j in range(F):
            theta = 10000 ** (-j / F) / config.rope_scaling
            lost = sum(1 - math.cos(t * theta) for t in range(config.block_size))
            if rope == '2-norm':
                lost = 1.0
            queries = sum(moments.q_norms[h, j] for h in range(H) if h * K // H == k)
            scores.append(lost * (moments.k_norms[k, j] * queries).item())
        strongest = sorted(range(F), key=lambda j: -scores[j])[:p]
        heads.append(sorted(strongest))
    return heads


@pytest.mark.parametrize('name', ['mha', 'gqa', 'mqa', 'biases'])
@pytest.mark.parametrize('rope', CHOICES['rope'])
@pytest.mark.parametrize('p', [1, 3])
def test_partial_rope_is_the_source_with_its_rope_masked(
    name, rope, p, source, tokens, monkeypatch
):
    model, moments = source(name)
    mla, _ = converted(model, moments, rope=rope, rope_pairs=p, rope_heads='own')
    F, K = model.config.head_dim // 2, model.config.n_kv_head
    masks = []
    for layer, block in zip(moments, mla.transformer.h):
        kept = kept_pairs(model.config, layer, rope, p)
        assert block.attn.rope_pairs.tolist() == sum(kept, [])
        mask = torch.zeros(K, F, dtype=torch.bool)
        masks.append(mask.scatter(1, torch.tensor(kept), True))
    assert mla.config.qk_rope_head_dim == 2 * p * K
    assert mla.transformer.h[0].attn.cache_dims()['k_pe'] == 2 * p * K

    idx = tokens(24)
    x, tables = model.embed(idx)
    for block, mask in zip(model.transformer.h, masks):
        monkeypatch.setattr(model_py, 'rotate', rotate_only(mask))
        x = block(x, tables)
    monkeypatch.undo()
    expected = model.lm_head(model.transformer.ln_f(x))
    torch.testing.assert_close(mla(idx), expected, rtol=0, atol=1e-5)
    assert (mla(idx) - model(idx)).abs().max() > 1e-3


# -------------------------------------------------------------------------------------------------
# rank


@pytest.mark.parametrize('low_rank', CHOICES['low_rank'])
def test_error_falls_with_rank(low_rank, source, tokens):
    model, moments = source('mha')
    errors, energies = [], []
    for rank in (4, 8, 16, 24, 32):
        mla, layers = converted(
            model, moments, kv_lora_rank=rank, rope_pairs=2, rope='high', low_rank=low_rank
        )
        errors.append((mla(tokens(24)) - model(tokens(24))).square().mean().item())
        energies.append(sum(layer['energy'] for layer in layers))
    assert energies == sorted(energies)
    assert energies[-1] > 1.5 * energies[0]
    assert errors[0] > errors[2]


def test_a_rotation_changes_nothing_but_int4(source, tokens):
    model, moments = source('mha')
    plain, rotated = (
        converted(model, moments, kv_lora_rank=16, rope_pairs=1, rotate=rotate)[0]
        for rotate in (False, True)
    )
    assert_same_logits(plain, rotated, tokens(24))
    ups = [mla.transformer.h[0].attn.kv_b_proj.weight for mla in (plain, rotated)]
    assert not torch.allclose(*ups, atol=1e-3)


@pytest.mark.parametrize(
    'settings',
    [
        dict(low_rank='joint'),
        dict(low_rank='split'),
        dict(rope_heads='own', rope='2-norm', low_rank='joint'),
    ],
    ids=str,
)
def test_signs_of_components_are_not_left_to_chance(settings, source):
    """
    With the channels of the residual stream in another order LAPACK, left alone, returns
    eigenvectors of other signs and phases, which int4 would see.
    """
    model, moments = source('gqa')
    settings = dict(kv_lora_rank=12, rope_pairs=3) | settings
    first, _ = converted(model, moments, **settings)

    order = torch.randperm(model.config.n_embd, generator=torch.Generator().manual_seed(3))
    with_bias = torch.cat([order, torch.tensor([len(order)])])
    with torch.no_grad():
        for block in model.transformer.h:
            block.attn.c_attn.weight.copy_(block.attn.c_attn.weight[:, order].clone())
    for layer in moments:
        layer.cov = layer.cov[with_bias][:, with_bias]
    second, _ = converted(model, moments, **settings)

    for a, b in zip(first.transformer.h, second.transformer.h):
        assert torch.allclose(a.attn.kv_b_proj.weight, b.attn.kv_b_proj.weight, atol=1e-5)
        down_a, down_b = (block.attn.kv_a_proj_with_mqa.weight for block in (a, b))
        assert torch.allclose(down_a[:, order], down_b, atol=1e-5)


def test_ranks_by_layer(source, tokens, tmp_path):
    model, _ = source('mha')
    with torch.no_grad():  # the first layer's keys and values need little
        w = model.transformer.h[0].attn.c_attn.weight
        w[32:] = w[32:, :3] @ torch.randn(3, 32)
    moments = measure(model, tokens(24, B=30))
    mla, layers = converted(
        model, moments, kv_lora_rank=16, ranks='spectrum', rope_pairs=0, low_rank='calibrated'
    )
    ranks = [block.attn.cache_dims()['c_kv'] for block in mla.transformer.h]
    assert ranks == [8, 24]
    assert [layer['rank'] for layer in layers] == ranks
    assert list(mla.config.kv_lora_ranks) == ranks
    assert mla.config.kv_lora_rank == 24
    assert layers[0]['energy'] == pytest.approx(1, abs=1e-6)

    content = dict(kind='mla', model_args=native.model_args(mla), model=mla.state_dict())
    native.save(tmp_path / 'ckpt.pt', content)
    assert_same_logits(load_model(tmp_path).model.eval(), mla, tokens(24), atol=0)


# -------------------------------------------------------------------------------------------------
# what comes out is a model like others


def greedy(model, prompt, **how):
    return torch.stack(list(generate(model, prompt, 12, temperature=0, **how)))


@pytest.mark.parametrize('name', ['gpt2', 'mha', 'gqa'])
@pytest.mark.parametrize('heads', CHOICES['rope_heads'])
def test_caches_hold_what_was_promised(name, heads, source, tokens):
    """A cache takes L · (k_pe + rank) · bytes a token, and gives the text of the naive form."""
    model, moments = source(name)
    settings, pe = dict(rope_pairs=0, rope_heads=heads), 0
    if model.config.pos == 'rope':
        settings['rope_pairs'] = 1
        pe = 2 * (model.config.n_kv_head if heads == 'own' else 1)
    prompt = tokens(24)[:, :5]

    mla, layers = converted(model, moments, kv_lora_rank=10, **settings)
    plain = greedy(mla, prompt)
    for layout in ('dense', 'paged'):
        cache = Cache.of(mla, 2, 24, layout=layout, page_size=16)
        assert torch.equal(greedy(mla, prompt, cache=cache), plain)
        assert cache.nbytes == 2 * (10 + pe) * 4 * cache.slots
    assert len(greedy(mla, prompt, cache=Cache.of(mla, 2, 24, dtype='int4'))) == 12

    mla, layers = converted(model, moments, kv_lora_rank=12, ranks='spectrum', **settings)
    cache = Cache.of(mla, 2, 24)
    assert torch.equal(greedy(mla, prompt, cache=cache), greedy(mla, prompt))
    assert cache.nbytes == sum(layer['rank'] + pe for layer in layers) * 4 * cache.slots


EXPORTS = dict(
    exact=dict(rope_heads='own'),
    uniform=dict(rope_heads='own', rope='uniform', rope_pairs=2, kv_lora_rank=8),
    query_latent=dict(
        rope_heads='own', rope='2-norm', rope_pairs=1, kv_lora_rank=8, q_lora_rank=11
    ),
    shared=dict(rope_heads='shared', rope_pairs=3, kv_lora_rank=7, ranks='spectrum'),
    shared_uniform=dict(
        rope_heads='shared', rope_pairs=4, rope='uniform', kv_lora_rank=7, rotate=True
    ),
)
# Those with an ordinary table of frequencies, which our own loader reads as well.
ORDINARY_ROPE = [
    ('mqa', 'exact'),
    ('mqa', 'uniform'),
    ('mha', 'shared_uniform'),
    ('gqa', 'shared_uniform'),
    ('mqa', 'shared_uniform'),
]


@pytest.mark.parametrize('name', ['mha', 'gqa', 'mqa'])
@pytest.mark.parametrize('way', EXPORTS)
def test_exports_load_in_stock_transformers(name, way, source, tokens, tmp_path):
    from transformers import AutoModelForCausalLM

    mla, _ = converted(*source(name, head_dim=8), **EXPORTS[way])
    export(mla, tmp_path / 'out')
    theirs, info = AutoModelForCausalLM.from_pretrained(tmp_path / 'out', output_loading_info=True)
    assert not any(info.values()), info
    assert type(theirs).__name__ == 'DeepseekV3ForCausalLM'
    idx = tokens(24)
    out = theirs.eval()(idx, use_cache=True)
    torch.testing.assert_close(out.logits, mla(idx), rtol=0, atol=1e-4)
    # transformers caches latent and k_pe, as wide as the widest layer's.
    layers = out.past_key_values.layers
    cached = sum(layer.keys.numel() + layer.values.numel() for layer in layers) / idx.numel()
    width = mla.config.kv_lora_rank + theirs.config.qk_rope_head_dim
    assert cached == mla.config.n_layer * width
    text = torch.stack(list(generate(mla, idx[:, :4], 15, temperature=0)), dim=1)
    their_text = theirs.generate(idx[:, :4], max_new_tokens=15, do_sample=False)[:, 4:]
    assert torch.equal(their_text, text)

    ordinary = theirs.config.rope_parameters['rope_type'] != 'longrope'
    assert ordinary == ((name, way) in ORDINARY_ROPE)
    assert_same_logits(load_hf(tmp_path / 'out')[0].eval(), mla, idx, atol=1e-4)
    if EXPORTS[way].get('rope') != '2-norm':  # whose layers may differ in their frequencies
        assert theirs.config.qk_rope_head_dim == mla.config.qk_rope_head_dim


def test_exports_that_have_no_place_there(source, tmp_path):
    for name, settings, word in (
        ('gpt2', {}, 'pos=learned'),
        ('biases', {}, 'the MLP of layer 0 has a bias'),
        ('mha', dict(rope_pairs=0), 'pos=none'),
    ):
        mla, _ = converted(*source(name), **settings)
        assert_refused(word, export, mla, tmp_path / 'out')
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('q_lora_rank', [0, 20])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize('name', ['gqa', 'biases'])
def test_exports_keep_biases_of_attentions_and_every_dtype(
    name, dtype, q_lora_rank, source, tokens, tmp_path
):
    """Queries, keys and values have biases, in a model as in Qwen2 whose MLPs have none."""
    from transformers import AutoModelForCausalLM

    model, moments = source(name)
    for key, parameter in model.named_parameters():
        if 'mlp' in key and key.endswith('bias'):
            parameter.data.zero_()
    mla, _ = converted(model, moments, rope_pairs=3, kv_lora_rank=14, q_lora_rank=q_lora_rank)
    mla = mla.to(dtype)
    export(mla, tmp_path / 'out')
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / 'out').eval()
    assert theirs.dtype == dtype
    idx = tokens(24)
    ours, theirs = mla.float()(idx), theirs(idx).logits.float()
    # Of two roundings of one model: 8 bits are about 1 %.
    tolerance = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}[dtype]
    assert (ours - theirs).square().mean().sqrt() < tolerance * ours.std()


def rescaled_latents(mla, factor):
    """Multiply what makes the latents, which what reads them undoes: the same function."""
    for block in mla.transformer.h:
        rank = mla.config.kv_lora_rank
        block.attn.kv_a_proj_with_mqa.weight.data[:rank] *= factor
        block.attn.kv_b_proj.weight.data /= factor
    return mla


@pytest.mark.parametrize('factor', [1, 2.0**14, 2.0**-14])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_exports_in_each_dtype_continue_as_here(dtype, factor, source, tokens, tmp_path):
    """Whatever the size of the latents, which no dtype but float32 and bfloat16 would hold."""
    from transformers import AutoModelForCausalLM

    mla, _ = converted(*source('gqa'), rope_pairs=3, kv_lora_rank=14)
    rounding = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
    prompt = tokens(8)
    expected = copy.deepcopy(mla).to(dtype)
    text = torch.stack(list(generate(expected, prompt, 12, temperature=0)), dim=1)
    whole = torch.cat([prompt, text], dim=1)

    export(rescaled_latents(mla, factor), tmp_path / 'out', dtype=dtype)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / 'out').eval()
    assert theirs.dtype == dtype
    logits, ours = theirs(whole).logits.float(), expected(whole).float()
    assert (logits - ours).square().mean().sqrt() < rounding * ours.std()
    # Greedy: none of their logits is above that of our next token by more than a rounding.
    logits = logits[:, prompt.size(1) - 1 : -1]
    behind = logits.amax(-1) - logits.gather(-1, text[..., None])[..., 0]
    assert behind.max() < 4 * rounding * ours.std()
    if dtype == torch.float16:  # whose files serve the other dtypes, too
        for other in (torch.float32, torch.bfloat16):
            theirs = AutoModelForCausalLM.from_pretrained(tmp_path / 'out', dtype=other).eval()
            error = theirs(whole).logits.float() - mla(whole)
            assert error.square().mean().sqrt() < (3e-2 if other == torch.bfloat16 else 4e-3)


def test_exports_of_a_scaled_softmax(source, tokens, tmp_path):
    """As of Granite, whose scale is not one over the root of a head's width."""
    from transformers import AutoModelForCausalLM

    model, moments = source('gqa', softmax_scale=0.21)
    mla, _ = converted(model, moments, rope_pairs=3, kv_lora_rank=14)
    export(mla, tmp_path / 'out')
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / 'out').eval()
    torch.testing.assert_close(theirs(tokens(24)).logits, mla(tokens(24)), rtol=0, atol=1e-4)


def test_bf16_exports_stay_close(source, tokens, tmp_path):
    from transformers import AutoModelForCausalLM

    mla, _ = converted(*source('gqa'), rope_pairs=2, kv_lora_rank=12)
    mla.to(torch.bfloat16)
    export(mla, tmp_path / 'out')
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / 'out', dtype=torch.float32).eval()
    ours, theirs = mla.float()(tokens(24)), theirs(tokens(24)).logits
    assert (ours - theirs).square().mean().sqrt() < 0.02 * ours.std()


# -------------------------------------------------------------------------------------------------
# refusals


class GatedAttention(MultiHeadAttention):
    """The matrices of MHA, and a gate on its output that they say nothing of."""

    def forward(self, x, *args):
        return super().forward(x, *args) * x.sigmoid()


class RenamedAttention(MultiHeadAttention):
    """Changes nothing, but nothing says so."""


@pytest.mark.parametrize('attention', [GatedAttention, RenamedAttention])
def test_an_attention_of_another_class_is_refused_by_its_name(attention, tokens):
    class Other(GPT):
        Attention = attention

    config = GPT.Config(block_size=24, vocab_size=40, n_layer=1, n_head=4, n_embd=32)
    model = Other(config)
    assert_refused(attention.__name__, converted, model, low_rank='joint')
    assert_refused(attention.__name__, measure, model, tokens(24))


def test_mla_with_a_gate_is_refused_by_its_name(tiny, tmp_path):
    gated = tiny('gated_mla', source_head_dim=8, latent_norm=False)  # as conversions leave MLA
    assert_refused('GatedLatentAttention', converted, gated, low_rank='joint', kv_lora_rank=8)
    assert_refused('GPT_GatedMLA cannot be exported', export, gated, tmp_path / 'out')


def test_a_model_of_another_class_is_refused_by_its_name():
    class Doubled(GPT):
        def hidden(self, idx, context=None):
            return 2 * super().hidden(idx, context)

    config = GPT.Config(block_size=24, vocab_size=40, n_layer=1, n_head=4, n_embd=32)
    assert_refused('Doubled', converted, Doubled(config), low_rank='joint')


def test_sources_that_cannot_be_converted_are_refused(tiny):
    normed = tiny('mha', **LLAMA | dict(qk_norm=True))
    assert_refused('QK-norm', converted, normed, low_rank='joint')
    assert_refused('is an MLA model already', converted, tiny('mla'), low_rank='joint')
