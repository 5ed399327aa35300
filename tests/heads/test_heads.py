"""What find_induction_heads.py measures, against weights by hand, brute force and the model."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model import Norm
from nanomla.checkpoints import native as checkpoint
from nanomla.core.configurator import UserError
from nanomla.heads import ablation, circuits, ioi, latents, patterns

V, P = 24, 40  # tokens (0 begins a text), positions
SLOTS = dict(
    token=slice(0, V),
    place=slice(V, V + P),
    before=slice(V + P, 2 * V + P),
    said=slice(2 * V + P, 3 * V + P),
)
C, D, SHARP = 3 * V + P, V + P, 60.0  # channels, head dim
KINDS = {
    'mha': dict(),
    'gqa': dict(n_kv_head=2),
    'mqa': dict(n_kv_head=1),
    'mla': {},
    'mla with q latent': dict(q_lora_rank=16),
    'mla without rope': dict(pos='none', qk_rope_head_dim=0),
    'rope': dict(pos='rope'),
    'attention only': dict(mlp=False),
}
every_kind = pytest.mark.parametrize('kind', KINDS)


def shape_of(kind):
    return 'mla' if kind.startswith('mla') else 'mha', KINDS[kind]


def block_matrix(*pieces):
    """(D, C) with identities: each piece is (rows from, slot, factor)."""
    w = torch.zeros(D, C)
    for row, slot, factor in pieces:
        n = SLOTS[slot].stop - SLOTS[slot].start
        w[row : row + n, SLOTS[slot]] = factor * torch.eye(n)
    return w


def by_hand(kind, offset=1, turned=False):
    """
    Return a model of two layers of three heads whose weights are known.

    0.0 attends `offset` positions back (1: the previous token) and writes that token into the slot
    `before`; 0.2 finds the same token earlier; 1.0 finds where its own token came `before` and
    writes the token that stands there; the others are idle. Norms are constant: every token has the
    same length. turned: 0.1 attends to its own token and writes minus twice its vector, so that 1.0
    reads, and turns back, the opposite of the embedding.
    """
    args = dict(
        block_size=P,
        vocab_size=V,
        n_layer=2,
        n_head=3,
        n_embd=C,
        head_dim=D,
        bias=False,
        norm='rmsnorm',
        mlp=False,
        tie_weights=False,
        kernel='eager',
        pos='learned',
    )
    args |= (
        dict(kv_lora_rank=2 * V + P, qk_rope_head_dim=0, qk_nope_head_dim=D, latent_norm=False)
        if kind == 'mla'
        else {}
    )
    model_class = checkpoint.MODELS[kind]
    model = model_class(model_class.Config(**args)).eval().requires_grad_(False)
    for p in model.parameters():
        p.zero_()
    t = model.transformer
    t.wte.weight[:, SLOTS['token']] = torch.eye(V)
    t.wpe.weight[:, SLOTS['place']] = torch.eye(P)
    for norm in (t.h[0].ln_1, t.h[1].ln_1, t.ln_f):
        norm.weight.fill_(1.0)
    back = block_matrix((0, 'place', SHARP))
    back[:, SLOTS['place']] = back[:, SLOTS['place']].roll(
        offset, 1
    )  # a query at p asks for p - offset
    zero, token = torch.zeros(D, C), block_matrix((0, 'token', 1.0))
    sign = -1.0 if turned else 1.0
    heads = {
        (0, 0): (back, block_matrix((0, 'place', 1.0)), token, 'before'),
        **(
            {
                (0, 1): (
                    block_matrix((0, 'place', SHARP)),
                    block_matrix((0, 'place', 1.0)),
                    -2 * token,
                    'token',
                )
            }
            if turned
            else {}
        ),
        (0, 2): (
            block_matrix((0, 'token', SHARP), (V, 'place', -SHARP)),
            block_matrix((0, 'token', 1.0), (V, 'place', 1.0)),
            zero,
            'said',
        ),
        (1, 0): (
            block_matrix((0, 'token', sign * SHARP)),
            block_matrix((0, 'before', 1.0)),
            sign * token,
            'said',
        ),
    }
    for layer, block in enumerate(t.h):
        wanted = [heads.get((layer, head), (zero, zero, zero, 'said')) for head in range(3)]
        q, k, v = (torch.stack([w[i] for w in wanted]) for i in range(3))
        if kind == 'mla':
            block.attn.q_proj.weight.copy_(q.flatten(0, 1))
            R = 2 * V + P
            block.attn.kv_a_proj_with_mqa.weight.copy_(
                torch.eye(R, C)
            )  # the latent holds token, place and before
            block.attn.kv_b_proj.weight.copy_(torch.cat([k, v])[..., :R].flatten(0, 1))
        else:
            block.attn.c_attn.weight.copy_(torch.cat([q, k, v]).flatten(0, 1))
        for head, (*_, slot) in enumerate(wanted):
            block.attn.c_proj.weight[SLOTS[slot], head * D : head * D + V] = torch.eye(V)
    model.lm_head.weight[:, SLOTS['said']] = 30 * torch.eye(V)
    return model


def trial_of(model, n=32, first=1):
    usable = torch.arange(first, model.config.vocab_size)
    return patterns.random_trials(
        usable, 0, n, *patterns.trial_lengths(model.config.block_size, len(usable))
    )


@pytest.fixture(params=['mha', 'mla'])
def crafted(request):
    return by_hand(request.param)


def entry(heads, layer, head):
    return next(e for e in heads if (e['layer'], e['head']) == (layer, head))


# -------------------------------------------------------------------------------------------------
# scores


def test_heads_written_by_hand_score_what_they_do(crafted):
    trial = trial_of(crafted)
    heads, repeated, control = patterns.score_heads(crafted, trial)
    previous, duplicate, induction = entry(heads, 0, 0), entry(heads, 0, 2), entry(heads, 1, 0)
    assert [e['label'] for e in (previous, duplicate, induction)] == [
        'previous',
        'duplicate',
        'induction',
    ]
    for score in (previous['previous'], duplicate['duplicate'], induction['induction']):
        assert score['score'] == score['gap'] == pytest.approx(1, abs=5e-4)
    for score in (
        induction['duplicate'],
        previous['duplicate'],
        previous['induction'],
        duplicate['induction'],
    ):
        assert score['score'] == pytest.approx(0, abs=5e-4)
    assert induction['induction']['control'] < 0.2 and previous['previous'][
        'control'
    ] == pytest.approx(1, abs=5e-4)
    for layer, head in ((0, 1), (1, 1), (1, 2)):  # idle ones
        idle = entry(heads, layer, head)
        assert idle['label'] == ''
        for kind in patterns.KINDS:
            assert idle[kind]['score'] == pytest.approx(idle[kind]['null'], abs=1e-5) and idle[
                kind
            ]['gap'] == pytest.approx(idle[kind]['null_gap'], abs=1e-5)
    assert (
        patterns.repeat_loss(repeated, trial.L) < 0.01
        and patterns.repeat_loss(control, trial.L) > 2
    )
    assert max(e['shifted']['gap'] for e in heads) < 0.2


@pytest.mark.parametrize('offset', [2, 5])
def test_a_circuit_that_carries_tokens_further_has_its_stripe_elsewhere(offset):
    model = by_hand('mha', offset)
    heads, *_ = patterns.score_heads(model, trial_of(model))
    late = entry(heads, 1, 0)
    assert late['induction']['score'] < 0.2 and late['label'] != 'induction'
    assert (
        late['shifted']['offset'] == offset
        and late['shifted']['score'] > 0.85
        and late['shifted']['gap'] > 0.85
        and late['shifted']['control'] < 0.2
    )


def test_copying_by_hand(crafted):
    copies = circuits.copying(crafted)
    assert copies[1, 0] == pytest.approx(1, abs=1e-5) and copies[0, 0] == 0
    with torch.no_grad():
        crafted.transformer.h[1].attn.c_proj.weight.neg_()
    assert circuits.copying(crafted)[1, 0] == pytest.approx(-1, abs=1e-5)


@pytest.mark.parametrize('turned', [False, True])
@pytest.mark.parametrize('kind', ['mha', 'mla'])
def test_copying_of_what_a_head_really_reads(kind, turned):
    model = by_hand(kind, turned=turned)
    trial = trial_of(model)
    heads, repeated, _ = patterns.score_heads(model, trial)
    assert (
        entry(heads, 1, 0)['label'] == 'induction'
        and patterns.repeat_loss(repeated, trial.L) < 0.01
    )
    assert circuits.copying(model)[1, 0] == pytest.approx(-1 if turned else 1, abs=1e-5)
    assert circuits.effective_copying(model, trial.control)[1].tolist() == [
        pytest.approx(1, abs=1e-5),
        0,
        0,
    ]


@every_kind
def test_effective_copying_is_that_of_values_as_they_are(kind, tiny):
    kind, changes = shape_of(kind)
    model = tiny(kind, kernel='eager', bias=True, **changes).eval()
    ids = patterns.random_trials(torch.arange(1, 12), 0, 9, 4, 3).control
    t, values = model.transformer, {}
    hook = t.h[1].register_forward_pre_hook(
        lambda block, given: values.update(v=block.attn.qkv(block.ln_1(given[0]), given[1])[2])
    )
    model.hidden(ids)
    hook.remove()
    attention, scores = t.h[1].attn, circuits.effective_copying(model, ids)
    model.double()
    v = values['v'].double().repeat_interleave(4 // values['v'].size(1), dim=1)
    present = ids[:, 1:].unique()
    for head in range(4):
        read = torch.stack(
            [v[:, head, 1:][ids[:, 1:] == token].mean(0) for token in present]
        )  # (V, D)
        written = (read - read.mean(0)) @ attention.c_proj.weight[:, head * attention.v_dim :][
            :, : attention.v_dim
        ].T
        logits = (
            (written - (0 if t.ln_f.rms else written.mean(-1, keepdim=True)))
            * t.ln_f.weight
            @ model.lm_head.weight[present].T
        )
        found = torch.linalg.eigvals(logits - logits.mean(-1, keepdim=True))
        assert scores[1, head].item() == pytest.approx(
            (found.real.sum() / found.abs().sum()).item(), abs=1e-3
        )


def test_a_head_that_counts_places_is_called_positional(crafted):
    """The trap: on texts of one length it lies on the stripe of induction heads; a gap shows it."""
    kind = checkpoint.kind_of(crafted)
    trial = trial_of(crafted)
    model = by_hand(kind, offset=trial.L - 1)
    trapped = entry(patterns.score_heads(model, trial)[0], 0, 0)
    assert (
        trapped['induction']['score']
        == pytest.approx(1, abs=5e-4)
        == trapped['induction']['control']
    )
    assert (
        trapped['induction']['gap'] < 0.1
        and trapped['label'] == 'positional'
        and trapped['positional']['distance'] == trial.L - 1
    )


def test_a_latent_cut_short_loses_the_heads():
    model = by_hand('mla')
    trial = trial_of(model)
    scores = {}
    for rank in (2 * V + P, 2 * V, 8):
        cut = latents.cut_latents(copy.deepcopy(model), rank)
        scores[rank] = entry(patterns.score_heads(cut, trial)[0], 1, 0)['induction']['score']
    assert scores[2 * V + P] > 0.999 and scores[8] < 0.4 and scores[8] < scores[2 * V] + 1e-6
    with pytest.raises(UserError, match='only MLA'):
        latents.cut_latents(by_hand('mha'), 8)


@every_kind
def test_random_models_score_their_null_and_are_called_nothing(kind):
    """Weights as they are before training, not those of `tiny`, which are large on purpose."""
    kind, changes = shape_of(kind)
    model_class = checkpoint.MODELS[kind]
    args = dict(block_size=128, vocab_size=80, n_layer=3, n_head=8, n_embd=128, kernel='eager') | (
        dict(kv_lora_rank=32, qk_rope_head_dim=8) if kind == 'mla' else {}
    )
    model = model_class(model_class.Config(**(args | changes))).eval()
    heads, *_ = patterns.score_heads(model, trial_of(model))
    assert {e['label'] for e in heads} == {''}
    for name in ('induction', 'duplicate', 'previous'):
        assert sum(e[name]['score'] - e[name]['null'] for e in heads) / len(heads) == pytest.approx(
            0, abs=0.002
        )


@every_kind
def test_patterns_are_what_the_model_used(kind, tiny, tokens):
    kind, changes = shape_of(kind)
    model = tiny(kind, kernel='eager', **changes)
    ids = tokens(20)
    sums, rebuilt = patterns.check_patterns(model, ids)
    assert sums < 1e-6 and rebuilt < 1e-5
    expected = model.hidden(ids)
    found = patterns.patterns_of(model, ids[0])
    assert found.shape == (2, 4, 20, 20) and found.triu(1).abs().max() == 0
    for kernel in ('sdpa', 'absorbed') if kind == 'mla' else ('sdpa',):
        for block in model.transformer.h:
            block.attn.kernel, block.attn.absorb = (
                'sdpa' if kernel == 'sdpa' else 'eager',
                kernel == 'absorbed',
            )
        torch.testing.assert_close(model.hidden(ids), expected, atol=1e-5, rtol=1e-4)
    with (
        patterns.watch_patterns(model, lambda layer, pattern: found[layer][None])
        if kind == 'mla'
        else pytest.raises(AssertionError)
    ):
        if kind == 'mla':  # absorbed patterns are the same, and what is handed in is what is used
            torch.testing.assert_close(model.hidden(ids[:1]), expected[:1], atol=1e-5, rtol=1e-4)
        else:
            with patterns.watch_patterns(model, print):
                pass  # not the eager kernel


def test_a_pattern_that_is_not_the_models_is_noticed(tiny, tokens):
    model = tiny(kernel='eager')
    with patterns.watch_patterns(model, lambda layer, pattern: pattern.flip(1) if layer else None):
        assert (
            patterns.check_patterns(model, tokens(20))[1] > 1e-3
            or patterns.check_patterns(model, tokens(20))[0] > 1e-3
        )


# -------------------------------------------------------------------------------------------------
# trials


@settings(max_examples=40, deadline=None)
@given(
    block=st.integers(12, 300),
    usable=st.integers(8, 200),
    asked=st.integers(4, 60),
    seed=st.integers(0, 9),
    bare=st.booleans(),
)
def test_trials_repeat_what_they_should(block, usable, asked, seed, bare):
    try:
        L, G = patterns.trial_lengths(block, usable, asked)
    except UserError:
        assert block < 16 or usable < 10
        return
    ids = 10 + torch.arange(usable) * 3
    trial = patterns.random_trials(ids, None if bare else 2, 8, L, G, seed)
    assert (
        4 <= L <= asked
        and 1 + 2 * L + G <= block
        and (trial.gap >= 1).all()
        and (trial.gap <= G).all()
    )
    for name, gap in (
        ('repeated', 0 * trial.gap),
        ('control', 0 * trial.gap),
        ('gapped', trial.gap),
    ):
        text = getattr(trial, name)
        assert (
            text.size(1) <= block
            and torch.isin(text[:, 1:], ids).all()
            and (bare or (text[:, 0] == 2).all())
        )
        assert all(len(set(row.tolist())) == L for row in text[:, 1 : L + 1])
        if name != 'control':
            q, keys = patterns.second_copy(L, gap)
            said, again = text.gather(1, keys['duplicate']), text.gather(1, q)
            assert torch.equal(said, again) and (keys['induction'] <= q).all()
            assert torch.equal(
                text.gather(1, keys['induction'])[:, :-1],
                text.gather(1, q + 1 * (q < text.size(1) - 1))[:, :-1],
            )
            if name == 'gapped':
                filler = [
                    row[1 + L : 1 + L + g].tolist() for row, g in zip(text, trial.gap.tolist())
                ]
                assert all(
                    not set(f) & set(row[1 : L + 1].tolist()) for f, row in zip(filler, text)
                )


@settings(max_examples=30, deadline=None)
@given(L=st.integers(4, 30), G=st.integers(1, 30), seed=st.integers(0, 9), bare=st.booleans())
def test_trials_of_text_are_windows_of_it(L, G, seed, bare):
    tokens = 10 + torch.arange(400)  # each place has a token of its own
    assert patterns.text_trials(tokens[: 4 * (L + G) + 1], None, 8, L, G) is None
    trial = patterns.text_trials(tokens, None if bare else 2, 8, L, G, seed)
    S = trial.repeated[:, 1 : L + 1]
    assert (
        (S.diff() == 1).all()
        and torch.equal(trial.repeated[:, L + 1 :], S)
        and (bare or (trial.repeated[:, 0] == 2).all())
    )
    assert (
        torch.equal(trial.control[:, : L + 1], trial.repeated[:, : L + 1])
        and (trial.control[:, L + 1 :].diff() == 1).all()
    )
    assert (
        (trial.gap >= 1).all() and (trial.gap <= G).all() and trial.gapped.size(1) == 2 * L + G + 1
    )
    q, keys = patterns.second_copy(L, trial.gap)
    assert torch.equal(trial.gapped.gather(1, q), S) and torch.equal(
        trial.gapped.gather(1, keys['duplicate']), S
    )


def test_the_null_is_what_even_attention_scores():
    gap = torch.tensor([0, 3, 5])
    q, keys = patterns.second_copy(6, gap)
    even = torch.ones(30, 30).tril() / torch.arange(1, 31)[:, None]
    for k in keys.values():
        assert even[q, k].mean().item() == pytest.approx(patterns.null_score(6, gap), abs=1e-7)


def test_the_interval_covers_the_mean():
    generator, hits = torch.Generator().manual_seed(0), 0
    for seed in range(100):
        low, high = patterns.bootstrap_interval(torch.rand(32, generator=generator), seed)
        hits += low <= 0.5 <= high
    assert 85 <= hits <= 100


def test_losses_in_pieces_are_the_models(tiny, tokens):
    model, ids = tiny(), tokens(20, B=4)
    whole = model(ids[:, :-1], ids[:, 1:])
    assert patterns.token_losses(
        model, model.hidden(ids[:, :-1]), ids[:, 1:], chunk=400
    ).mean().item() == pytest.approx(whole.item(), abs=1e-5)


# -------------------------------------------------------------------------------------------------
# circuits


@pytest.mark.parametrize('norm', ['layernorm', 'rmsnorm'])
@every_kind
def test_circuits_are_the_models_own(kind, norm, tiny):
    """For inputs (and latents) of length sqrt(C) the folded weights give what attention does."""
    kind, changes = shape_of(kind)
    model = tiny(
        kind,
        bias=False,
        norm=norm,
        norm_eps=1e-12,
        **(dict(latent_norm=False) if kind == 'mla' and not changes.get('q_lora_rank') else {}),
        **changes,
    )
    block = model.transformer.h[1]
    x = torch.randn(1, 5, 32)
    x = x - x.mean(-1, keepdim=True) if norm == 'layernorm' else x
    x = x / x.square().mean(-1, keepdim=True).sqrt()
    lift = torch.randn(1, 5, 1) if norm == 'layernorm' else 0  # which centring takes away
    rope = (
        tuple(t(torch.zeros(5, 1, model.config.rope_dim // 2)) for t in (torch.cos, torch.sin))
        if model.config.rope_dim
        else None
    )
    q, k, v = block.attn.qkv(block.ln_1(x + lift), rope)
    k, v = (w.repeat_interleave(4 // w.size(1), dim=1) for w in (k, v))
    c, x = circuits.circuits_of(block), (x + lift)[0]
    logits = (x @ c.q) @ (x @ c.k).mT + (
        (x @ c.q_pe) @ (x @ c.k_pe).mT if c.q_pe is not None else 0
    )
    values = x @ c.v
    if kind == 'mla' and changes.get(
        'q_lora_rank'
    ):  # latents have a norm: their lengths stay out of the circuits
        a, y = block.attn, block.ln_1(x[None])
        length = [
            w.square().mean(-1).add(1e-6).sqrt()[0]
            for w in (a.q_a_proj(y), a.kv_a_proj_with_mqa(y)[..., : a.a_widths[0]])
        ]
        content, pe = (x @ c.q) @ (x @ c.k).mT, (x @ c.q_pe) @ (x @ c.k_pe).mT
        logits = (content / length[1] + pe) / length[0][:, None]
        values = values / length[1][:, None]
    torch.testing.assert_close(logits, (q @ k.mT)[0], atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(values, v[0], atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(
        (values @ c.o).sum(0),
        block.attn.c_proj(v.transpose(1, 2).flatten(2))[0],
        atol=1e-3,
        rtol=1e-3,
    )


@every_kind
def test_copying_is_that_of_the_whole_circuit(kind, tiny):
    kind, changes = shape_of(kind)
    model = tiny(kind, tie_weights=False, **changes)
    t, c = model.transformer, circuits.circuits_of(model.transformer.h[0])
    w_u = model.lm_head.weight * t.ln_f.weight
    w_u = w_u - w_u.mean(-1, keepdim=True)
    for head in range(4):
        values = torch.linalg.eigvals((t.wte.weight @ c.v[head] @ c.o[head] @ w_u.T).double())
        assert circuits.copying(model)[0, head].item() == pytest.approx(
            (values.real.sum() / values.abs().sum()).item(), abs=1e-3
        )


@pytest.mark.parametrize('kind', ['mha', 'gqa', 'mla'])
def test_composition_is_that_of_the_whole_matrices(kind, tiny):
    kind, changes = shape_of(kind)
    model = tiny(kind, **changes)
    early, late = (circuits.circuits_of(block) for block in model.transformer.h)
    found = {(c['kind'], *c['from'], *c['to']): c['value'] for c in circuits.composition(model)}
    assert len(found) == 3 * 16
    differences = {kind: set() for kind in 'QKV'}
    for i in range(4):
        for j in range(4):
            ov, qk, ov_late = (
                early.v[i] @ early.o[i],
                late.q[j] @ late.k[j].T,
                late.v[j] @ late.o[j],
            )
            for name, product, own in (
                ('Q', ov @ qk, qk),
                ('K', ov @ qk.T, qk),
                ('V', ov @ ov_late, ov_late),
            ):
                differences[name].add(
                    round(
                        (product.norm() / ov.norm() / own.norm()).item() - found[name, 0, i, 1, j],
                        3,
                    )
                )
    assert all(
        max(d) - min(d) < 0.003 and 0 < min(d) < 0.6 for d in differences.values()
    )  # one constant a kind: what chance has


def test_by_hand_the_previous_token_head_composes_by_keys(crafted):
    found = {(c['kind'], *c['from'], *c['to']): c['value'] for c in circuits.composition(crafted)}
    assert (
        found['K', 0, 0, 1, 0]
        > 0.1
        > max(value for key, value in found.items() if key != ('K', 0, 0, 1, 0))
    )


def test_the_two_parts_of_a_logit_make_the_pattern(tiny, tokens):
    model, ids = tiny('mla', kernel='eager', qk_norm=True), tokens(16)[0]
    content, rope = circuits.split_logits(model, ids, [(0, 1), (1, 3)])
    logits = (content + rope).masked_fill(torch.ones(16, 16).triu(1).bool(), -math.inf)
    found = patterns.patterns_of(model, ids)
    torch.testing.assert_close(
        logits.softmax(-1), torch.stack([found[0, 1], found[1, 3]]), atol=1e-5, rtol=1e-4
    )
    assert circuits.split_logits(tiny(kernel='eager'), ids, [(0, 0)]) is None
    assert circuits.split_logits(tiny('mla', pos='none', qk_rope_head_dim=0), ids, [(0, 0)]) is None


# -------------------------------------------------------------------------------------------------
# causes


def test_causes_by_hand(crafted):
    trial = trial_of(crafted, 16)
    ablated = ablation.Ablation(crafted, trial.repeated, trial.L)
    assert ablated.loss < 0.01
    for way in ('zero', 'mean'):
        assert ablated.cost([(1, 0)], way) > 2 and ablated.cost([(0, 0)], way) > 2
    assert ablated.cost([(0, 1), (0, 2), (1, 1)]) == pytest.approx(0, abs=1e-4)
    assert ablated.cost([(0, 0)], 'pattern') < 0.1 * ablated.cost(
        [(0, 0)]
    )  # it matters for where others look
    assert ablated.cost([(0, 0)], 'frozen') < 0.1 * ablated.cost([(0, 0)])
    assert ablated.cost([(1, 0)], 'pattern') == pytest.approx(ablated.cost([(1, 0)]), abs=1e-5)
    assert ablated.path([(0, 0)], [(1, 0)], 'K') > 2
    assert (
        ablated.path([(0, 0)], [(1, 0)], 'Q')
        == pytest.approx(0, abs=1e-3)
        == ablated.path([(0, 0)], [(1, 0)], 'V')
    )
    assert ablated.path([(0, 0)], [(1, 1)], 'K') == pytest.approx(0, abs=1e-4)
    assert (
        ablated.path([(1, 0)], [(0, 0)], 'K') == 0 == ablated.cost([])
    )  # nothing comes before its sender


@pytest.mark.parametrize('norm', ['layernorm', 'rmsnorm'])
@pytest.mark.parametrize('kind', ['mha', 'mla', 'mla with q latent'])
def test_with_patterns_and_scales_kept_nothing_but_sums_is_left(kind, norm, tiny, tokens):
    """Attention alone is then affine in what a head writes: half way to its mean is half way."""
    kind, changes = shape_of(kind)
    model, ids = (
        tiny(kind, kernel='eager', mlp=False, bias=True, norm=norm, **changes).eval(),
        tokens(17, B=4),
    )
    for module in model.modules():
        if isinstance(module, Norm):
            torch.nn.init.normal_(module.weight)
    ablated = ablation.Ablation(model, ids, 8)
    ends = []

    def towards_mean(share):
        weight = torch.tensor([1 - share, 0, 0, 0])[:, None]  # of head 0 alone

        def edit(layer, y):
            return y.lerp(y.mean(0, keepdim=True), weight) if layer == 0 else None

        return edit

    for share in (0.0, 0.5, 1.0):
        with (
            torch.no_grad(),
            ablation.edit_outputs(model, towards_mean(share)),
            patterns.watch_patterns(model, lambda layer, a: ablated.patterns[layer]),
            ablation.edit_norms(model, lambda norm, x: x * ablated.scales[norm]),
        ):
            ends.append(model.hidden(ids))
    torch.testing.assert_close(ends[1], (ends[0] + ends[2]) / 2, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(ends[2], model.hidden(ids), atol=1e-5, rtol=1e-4)
    assert (ends[0] - ends[2]).abs().max() > 1e-3
    assert ablated.cost([(0, 0)], 'frozen') == pytest.approx(
        ablated.loss_of(ends[0]) - ablated.loss, abs=1e-5
    )


def test_a_constant_that_later_layers_count_on(tiny, tokens):
    """A head with a constant output costs something to zero, and nothing when its mean stays."""
    model, ids = tiny(kernel='eager', bias=True).eval(), tokens(21, B=6)
    with torch.no_grad():
        model.transformer.h[0].attn.c_attn.weight[-8:] = 0  # W^V of head 3: its bias alone is left
    ablated = ablation.Ablation(model, ids, 10)
    assert min(abs(ablated.cost([(0, 3)], way)) for way in ('zero', 'pattern')) > 1e-3
    for way in ('mean', 'frozen'):
        assert ablated.cost([(0, 3)], way) == pytest.approx(0, abs=1e-5)
    assert (
        abs(ablated.cost([(0, 2)], 'frozen'))
        > 1e-3
        < abs(ablated.cost([(0, 2)], 'frozen') - ablated.cost([(0, 2)], 'mean'))
    )


@every_kind
def test_zero_ablation_is_the_model_without_the_head(kind, tiny):
    kind, changes = shape_of(kind)
    model = tiny(kind, kernel='eager', **changes)
    trial = trial_of(model, 8)
    ablated = ablation.Ablation(model, trial.repeated, trial.L)
    ids = trial.repeated

    def loss(model):
        return (
            patterns.token_losses(
                model,
                model.hidden(ids)[:, trial.L + 1 : 2 * trial.L],
                ids[:, trial.L + 2 : 2 * trial.L + 1],
            )
            .mean()
            .item()
        )

    assert ablated.loss == pytest.approx(loss(model), abs=1e-5)
    without = copy.deepcopy(model)
    with torch.no_grad():
        for layer, head in ((0, 2), (1, 1)):
            without.transformer.h[layer].attn.c_proj.weight.unflatten(1, (4, -1))[:, head] = 0
    assert ablated.cost([(0, 2), (1, 1)]) == pytest.approx(loss(without) - ablated.loss, abs=1e-4)
    last = [(1, head) for head in range(4)]
    assert ablated.cost(last, 'pattern') == pytest.approx(ablated.cost(last), abs=1e-5)
    everything = sum(
        abs(ablated.path([(0, head) for head in range(4)], last, reads)) for reads in 'QKV'
    )
    assert everything > 1e-4


# -------------------------------------------------------------------------------------------------
# latents and names


def test_latents(tiny, tokens):
    model = tiny('mla')
    found = latents.read_latents(model, tokens(20, B=12), batch=5)
    assert found.shape == (2, 240, 12)
    x = model.transformer.h[0].ln_1(model.embed(tokens(20, B=12))[0])
    expected = model.transformer.h[0].attn.latent(
        x, None if model.config.pos != 'rope' else model.embed(tokens(20))[1]
    )[0]
    torch.testing.assert_close(found[0], expected.flatten(0, 1))
    shares = latents.variance_shares(found)
    assert (shares.diff(dim=1) >= -1e-9).all() and shares[:, -1].tolist() == pytest.approx([1, 1])
    alike = latents.likeness(found)
    assert (
        alike.diagonal().tolist() == pytest.approx([1, 1])
        and alike[0, 1].item() == pytest.approx(alike[1, 0].item())
        and 0 < alike[0, 1] < 1
    )
    turned = torch.stack([found[0], 3 * found[0] @ torch.linalg.qr(torch.randn(12, 12)).Q + 5])
    assert latents.likeness(turned)[0, 1].item() == pytest.approx(1, abs=1e-5)
    plane = latents.principal_plane(found)
    assert plane.var(1).sum(-1)[0].item() == pytest.approx(
        (shares[0, 1] * found[0].var(0).sum()).item(), rel=1e-3
    )
    with pytest.raises(UserError, match='only MLA'):
        latents.read_latents(tiny(), tokens(20))


def last_stream(model, ids):
    """Return the residual stream (C,) of the last token before the last norm."""
    seen = []
    hook = model.transformer.ln_f.register_forward_pre_hook(
        lambda module, given: seen.append(given[0][0, -1])
    )
    model.hidden(ids)
    hook.remove()
    return seen[0]


class Words:
    """A tokenizer with a token a word, blank included."""

    def __init__(self):
        self.ids = {}

    def encode(self, text):
        return [
            self.ids.setdefault(word, len(self.ids) + 1)
            for word in text.replace(',', ' ,').replace('.', ' .').split()
        ]


@pytest.mark.parametrize('kind', ['mha', 'gqa', 'mla', 'rope'])
def test_what_heads_move_adds_up_to_the_answer(kind, tiny):
    codec = Words()
    asked = ioi.make_prompts(codec, 0, pairs=2)
    kind, changes = shape_of(kind)
    model = tiny(
        kind,
        kernel='eager',
        mlp=False,
        bias=False,
        tie_weights=False,
        vocab_size=len(codec.ids) + 1,
        **changes,
    )
    answers, heads = ioi.measure(model, asked)
    moved, direct = sum(head['moved'] for head in heads), 0.0
    for one in asked:
        ids, place, io, s = one.ids, one.position, one.io, one.s
        assert ids[place] == io and ids.count(s) == 2 and ids.count(io) == 1
        ids = torch.tensor([ids])
        x = model.embed(ids)[0][0, -1]
        full = last_stream(model, ids)
        w = (model.lm_head.weight[io] - model.lm_head.weight[s]) * model.transformer.ln_f.weight
        direct += (
            (x - x.mean()) @ w / (full - full.mean()).square().mean().add(1e-5).sqrt()
        ).item() / len(asked)
    assert moved + direct == pytest.approx(answers['logit_difference'], abs=2e-3)
    assert 0 <= answers['accuracy'] <= 1 and all(
        0 <= head['copying'] <= 1 and 0 <= head['attention'] <= 1 for head in heads
    )
    with pytest.raises(UserError, match='single tokens'):
        ioi.make_prompts(SimpleNamespace(encode=lambda text: [1, 2]), 0)
