"""Circuits of heads, against weights by hand and the whole matrices."""

import math

import pytest
import torch
from handmade import by_hand, entry_of, trial_of
from kinds import every_kind, shape_of

from nanomla.heads import circuits, patterns


@pytest.fixture(params=['mha', 'mla'])
def crafted(request):
    return by_hand(request.param)


def eigenvalue_score(matrix):
    """Return the copying score of a whole matrix: sum of its eigenvalues over their sizes."""
    values = torch.linalg.eigvals(matrix.double())
    return (values.real.sum() / values.abs().sum()).item()


# -------------------------------------------------------------------------------------------------
# copying


def test_copying_by_hand(crafted):
    copies = circuits.copying(crafted)
    assert copies[1, 0] == pytest.approx(1, abs=1e-5)
    assert copies[0, 0] == 0
    with torch.no_grad():
        crafted.transformer.h[1].attn.c_proj.weight.neg_()
    assert circuits.copying(crafted)[1, 0] == pytest.approx(-1, abs=1e-5)


@pytest.mark.parametrize('turned', [False, True])
@pytest.mark.parametrize('kind', ['mha', 'mla'])
def test_copying_of_what_a_head_really_reads(kind, turned):
    model = by_hand(kind, turned=turned)
    trial = trial_of(model)
    heads, repeated, _ = patterns.score_heads(model, trial)
    assert entry_of(heads, 1, 0)['label'] == 'induction'
    assert patterns.repeat_loss(repeated, trial.L) < 0.01
    by_weights = circuits.copying(model)[1, 0]
    assert by_weights == pytest.approx(-1 if turned else 1, abs=1e-5)
    as_read = circuits.effective_copying(model, trial.control)[1]
    assert as_read.tolist() == pytest.approx([1, 0, 0], abs=1e-5)


@every_kind
def test_effective_copying_is_that_of_values_as_they_are(kind, tiny):
    kind, changes = shape_of(kind)
    model = tiny(kind, kernel='eager', bias=True, **changes).eval()
    ids = patterns.random_trials(torch.arange(1, 12), 0, 9, 4, 3).control
    values = values_of_second_layer(model, ids)
    scores = circuits.effective_copying(model, ids)
    model.double()
    present = ids[:, 1:].unique()
    for head in range(4):
        of_token = [values[:, head, 1:][ids[:, 1:] == token].mean(0) for token in present]
        logits = logits_of(model, head, torch.stack(of_token), present)
        assert scores[1, head].item() == pytest.approx(eigenvalue_score(logits), abs=1e-3)


def values_of_second_layer(model, ids):
    """Return v (B, H, T, D) of every head of the second layer, in float64."""
    seen = {}

    def read(block, given):
        x, rope = given
        seen['v'] = block.attn.qkv(block.ln_1(x), rope)[2]

    hook = model.transformer.h[1].register_forward_pre_hook(read)
    model.hidden(ids)
    hook.remove()
    return seen['v'].double().repeat_interleave(4 // seen['v'].size(1), dim=1)


def logits_of(model, head, values, present):
    """Return what values (V, D) of a head of the second layer add to logits of tokens, (V, V)."""
    t = model.transformer
    attention = t.h[1].attn
    w_o = attention.c_proj.weight.unflatten(1, (4, attention.v_dim))[:, head]
    written = (values - values.mean(0)) @ w_o.T
    if not t.ln_f.rms:
        written = written - written.mean(-1, keepdim=True)
    logits = written * t.ln_f.weight @ model.lm_head.weight[present].T
    return logits - logits.mean(-1, keepdim=True)


@every_kind
def test_copying_is_that_of_the_whole_circuit(kind, tiny):
    kind, changes = shape_of(kind)
    model = tiny(kind, tie_weights=False, **changes)
    t = model.transformer
    c = circuits.circuits_of(t.h[0])
    w_u = model.lm_head.weight * t.ln_f.weight
    w_u = w_u - w_u.mean(-1, keepdim=True)
    found = circuits.copying(model)
    for head in range(4):
        whole = t.wte.weight @ c.v[head] @ c.o[head] @ w_u.T
        assert found[0, head].item() == pytest.approx(eigenvalue_score(whole), abs=1e-3)


# -------------------------------------------------------------------------------------------------
# the folded weights


def unit_length(x):
    return x / x.square().mean(-1, keepdim=True).sqrt()


@pytest.mark.parametrize('norm', ['layernorm', 'rmsnorm'])
@every_kind
def test_circuits_are_the_models_own(kind, norm, tiny):
    """For inputs (and latents) of length sqrt(C) the folded weights give what attention does."""
    kind, changes = shape_of(kind)
    has_q_latent = 'q_lora_rank' in changes
    if kind == 'mla' and not has_q_latent:
        changes = changes | dict(latent_norm=False)
    model = tiny(kind, bias=False, norm=norm, norm_eps=1e-12, **changes)
    block = model.transformer.h[1]
    x = torch.randn(1, 5, 32)
    lift = 0
    if norm == 'layernorm':
        x = x - x.mean(-1, keepdim=True)
        lift = torch.randn(1, 5, 1)  # which centring takes away
    x = unit_length(x)
    q, k, v = block.attn.qkv(block.ln_1(x + lift), unturned_rope(model))
    k, v = (w.repeat_interleave(4 // w.size(1), dim=1) for w in (k, v))
    c, x = circuits.circuits_of(block), (x + lift)[0]
    content, values = (x @ c.q) @ (x @ c.k).mT, x @ c.v
    logits = content
    if c.q_pe is not None:
        by_rope = (x @ c.q_pe) @ (x @ c.k_pe).mT
        logits = content + by_rope
    if has_q_latent:
        # The latents have norms: their lengths stay out of the circuits.
        q_length, kv_length = latent_lengths(block, x)
        logits = (content / kv_length + by_rope) / q_length[:, None]
        values = values / kv_length[:, None]
    torch.testing.assert_close(logits, (q @ k.mT)[0], atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(values, v[0], atol=1e-4, rtol=1e-3)
    written = block.attn.c_proj(v.transpose(1, 2).flatten(2))[0]
    torch.testing.assert_close((values @ c.o).sum(0), written, atol=1e-3, rtol=1e-3)


def unturned_rope(model):
    """Return RoPE's tables for five tokens that all stand at position 0."""
    if not model.config.rope_dim:
        return None
    angles = torch.zeros(5, 1, model.config.rope_dim // 2)
    return torch.cos(angles), torch.sin(angles)


def latent_lengths(block, x):
    """Return by what the norms of both latents divide, (T,) each."""
    attention, y = block.attn, block.ln_1(x[None])
    c_q = attention.q_a_proj(y)
    c_kv = attention.kv_a_proj_with_mqa(y)[..., : attention.a_widths[0]]
    return [c.square().mean(-1).add(1e-6).sqrt()[0] for c in (c_q, c_kv)]


# -------------------------------------------------------------------------------------------------
# composition, parts of logits


@pytest.mark.parametrize('kind', ['mha', 'gqa', 'mla'])
def test_composition_is_that_of_the_whole_matrices(kind, tiny):
    """Up to one constant a kind: what chance has is taken away."""
    kind, changes = shape_of(kind)
    model = tiny(kind, **changes)
    early, late = (circuits.circuits_of(block) for block in model.transformer.h)
    found = {(c['kind'], *c['from'], *c['to']): c['value'] for c in circuits.composition(model)}
    assert len(found) == 3 * 16
    differences = {kind: [] for kind in 'QKV'}
    for i in range(4):
        for j in range(4):
            ov = early.v[i] @ early.o[i]
            qk = late.q[j] @ late.k[j].T
            late_ov = late.v[j] @ late.o[j]
            products = dict(Q=(ov @ qk, qk), K=(ov @ qk.T, qk), V=(ov @ late_ov, late_ov))
            for name, (product, own) in products.items():
                whole = (product.norm() / ov.norm() / own.norm()).item()
                differences[name].append(whole - found[name, 0, i, 1, j])
    for name, values in differences.items():
        assert max(values) - min(values) < 0.003 + 1e-3, name
        assert 0 < min(values) < 0.6, name


def test_by_hand_the_previous_token_head_composes_by_keys(crafted):
    found = {(c['kind'], *c['from'], *c['to']): c['value'] for c in circuits.composition(crafted)}
    by_keys = found.pop(('K', 0, 0, 1, 0))
    assert by_keys > 0.1
    assert max(found.values()) < 0.1


def test_the_two_parts_of_a_logit_make_the_pattern(tiny, tokens):
    model, ids = tiny('mla', kernel='eager', qk_norm=True), tokens(16)[0]
    content, rope = circuits.split_logits(model, ids, [(0, 1), (1, 3)])
    above_diagonal = torch.ones(16, 16).triu(1).bool()
    logits = (content + rope).masked_fill(above_diagonal, -math.inf)
    found = patterns.patterns_of(model, ids)
    expected = torch.stack([found[0, 1], found[1, 3]])
    torch.testing.assert_close(logits.softmax(-1), expected, atol=1e-5, rtol=1e-4)


def test_only_mla_with_rope_has_two_parts(tiny, tokens):
    ids = tokens(16)[0]
    without_rope = tiny('mla', pos='none', qk_rope_head_dim=0)
    for model in (tiny(kernel='eager'), without_rope):
        assert circuits.split_logits(model, ids, [(0, 0)]) is None
