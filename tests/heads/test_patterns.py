"""Patterns and scores of heads, against weights by hand, brute force and the model itself."""

from dataclasses import dataclass

import pytest
import torch
from handmade import by_hand, entry_of, trial_of
from hypothesis import given, settings
from hypothesis import strategies as st
from kinds import every_kind, shape_of

from model import GPT
from nanomla.checkpoints import native
from nanomla.core.configurator import UserError
from nanomla.heads import patterns


@dataclass
class Scored:
    """A model by hand, a trial of it and what it scored."""

    model: GPT
    trial: patterns.Trials
    heads: list[dict]
    repeated: torch.Tensor
    control: torch.Tensor


@pytest.fixture(scope='module', params=['mha', 'mla'])
def scored(request):
    model = by_hand(request.param)
    trial = trial_of(model)
    return Scored(model, trial, *patterns.score_heads(model, trial))


# -------------------------------------------------------------------------------------------------
# scores


def test_heads_by_hand_are_labelled_by_what_they_do(scored):
    labels = {(entry['layer'], entry['head']): entry['label'] for entry in scored.heads}
    working = {(0, 0): 'previous', (0, 2): 'duplicate', (1, 0): 'induction'}
    idle = dict.fromkeys([(0, 1), (1, 1), (1, 2)], '')
    assert labels == working | idle


def test_heads_by_hand_score_1_for_what_they_do_and_0_for_the_rest(scored):
    heads = scored.heads
    working = dict(previous=(0, 0), duplicate=(0, 2), induction=(1, 0))
    for kind, position in working.items():
        score = entry_of(heads, *position)[kind]
        assert score['score'] == pytest.approx(1, abs=5e-4), kind
        assert score['gap'] == pytest.approx(1, abs=5e-4), kind
    for position, kind in (
        (working['induction'], 'duplicate'),
        (working['previous'], 'duplicate'),
        (working['previous'], 'induction'),
        (working['duplicate'], 'induction'),
    ):
        score = entry_of(heads, *position)[kind]['score']
        assert score == pytest.approx(0, abs=5e-4), (position, kind)
    # Without a repetition there is nothing to continue, and still a previous token.
    assert entry_of(heads, *working['induction'])['induction']['control'] < 0.2
    previous = entry_of(heads, *working['previous'])['previous']
    assert previous['control'] == pytest.approx(1, abs=5e-4)


def test_idle_heads_score_their_null(scored):
    for position in ((0, 1), (1, 1), (1, 2)):
        for kind in patterns.KINDS:
            score = entry_of(scored.heads, *position)[kind]
            assert score['score'] == pytest.approx(score['null'], abs=1e-5)
            assert score['gap'] == pytest.approx(score['null_gap'], abs=1e-5)


def test_no_head_by_hand_has_its_stripe_elsewhere(scored):
    assert max(entry['shifted']['gap'] for entry in scored.heads) < 0.2


def test_heads_by_hand_continue_what_repeats_and_nothing_else(scored):
    assert patterns.repeat_loss(scored.repeated, scored.trial.L) < 0.01
    assert patterns.repeat_loss(scored.control, scored.trial.L) > 2


@pytest.mark.parametrize('offset', [2, 5])
def test_a_circuit_that_carries_tokens_further_has_its_stripe_elsewhere(offset):
    model = by_hand('mha', offset)
    heads, *_ = patterns.score_heads(model, trial_of(model))
    late = entry_of(heads, 1, 0)
    assert late['induction']['score'] < 0.2
    assert late['label'] != 'induction'
    assert late['shifted']['offset'] == offset
    assert late['shifted']['score'] > 0.85
    assert late['shifted']['gap'] > 0.85
    assert late['shifted']['control'] < 0.2


def test_a_head_that_counts_positions_is_called_positional(scored):
    """The trap: on texts of one length it lies on the stripe of induction heads; a gap shows it."""
    trial = scored.trial
    model = by_hand(native.kind_of(scored.model), offset=trial.L - 1)
    heads, *_ = patterns.score_heads(model, trial)
    trapped = entry_of(heads, 0, 0)
    assert trapped['induction']['score'] == pytest.approx(1, abs=5e-4)
    assert trapped['induction']['control'] == pytest.approx(1, abs=5e-4)
    assert trapped['induction']['gap'] < 0.1
    assert trapped['label'] == 'positional'
    assert trapped['positional']['distance'] == trial.L - 1


@every_kind
def test_random_models_score_their_null_and_are_called_nothing(kind):
    """Weights as they are before training, not those of `tiny`, which are large on purpose."""
    kind, changes = shape_of(kind)
    model_class = native.MODELS[kind]
    args = dict(block_size=128, vocab_size=80, n_layer=3, n_head=8, n_embd=128, kernel='eager')
    if kind == 'mla':
        args |= dict(kv_lora_rank=32, qk_rope_head_dim=8)
    model = model_class(model_class.Config(**(args | changes))).eval()
    heads, *_ = patterns.score_heads(model, trial_of(model))
    assert {entry['label'] for entry in heads} == {''}
    for name in ('induction', 'duplicate', 'previous'):
        beyond_null = [entry[name]['score'] - entry[name]['null'] for entry in heads]
        assert sum(beyond_null) / len(heads) == pytest.approx(0, abs=0.002), name


def test_the_null_is_what_even_attention_scores():
    gap = torch.tensor([0, 3, 5])
    q, keys = patterns.second_copy(6, gap)
    even = torch.ones(30, 30).tril() / torch.arange(1, 31)[:, None]
    for kind, k in keys.items():
        null = patterns.null_score(6, gap)
        assert even[q, k].mean().item() == pytest.approx(null, abs=1e-7), kind


def test_the_interval_covers_the_mean():
    generator = torch.Generator().manual_seed(0)
    hits = 0
    for seed in range(100):
        low, high = patterns.bootstrap_interval(torch.rand(32, generator=generator), seed)
        hits += int(low <= 0.5 <= high)
    assert 85 <= hits <= 100


# -------------------------------------------------------------------------------------------------
# patterns


@every_kind
def test_patterns_are_what_the_model_used(kind, tiny, tokens):
    kind, changes = shape_of(kind)
    model = tiny(kind, kernel='eager', **changes)
    ids = tokens(20)
    sums, rebuilt = patterns.check_patterns(model, ids)
    assert sums < 1e-6
    assert rebuilt < 1e-5
    found = patterns.patterns_of(model, ids[0])
    assert found.shape == (2, 4, 20, 20)
    assert found.triu(1).abs().max() == 0


@every_kind
def test_the_eager_kernel_computes_what_sdpa_does(kind, tiny, tokens):
    kind, changes = shape_of(kind)
    model, ids = tiny(kind, kernel='eager', **changes), tokens(20)
    expected = model.hidden(ids)
    for block in model.transformer.h:
        block.attn.kernel = 'sdpa'
    torch.testing.assert_close(model.hidden(ids), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize('kind', ['mla', 'mla with q latent', 'mla without rope'])
def test_absorbed_patterns_are_the_same_and_what_is_handed_in_is_used(kind, tiny, tokens):
    kind, changes = shape_of(kind)
    model, ids = tiny(kind, kernel='eager', **changes), tokens(20)
    expected, found = model.hidden(ids), patterns.patterns_of(model, ids[0])
    for block in model.transformer.h:
        block.attn.absorb = True
    torch.testing.assert_close(model.hidden(ids), expected, atol=1e-5, rtol=1e-4)
    with patterns.watch_patterns(model, lambda layer, pattern: found[layer][None]):
        torch.testing.assert_close(model.hidden(ids[:1]), expected[:1], atol=1e-5, rtol=1e-4)


def test_patterns_of_another_kernel_are_a_programmers_error(tiny):
    with pytest.raises(AssertionError, match='eager'):
        with patterns.watch_patterns(tiny(kernel='sdpa'), print):
            pass


def test_a_pattern_that_is_not_the_models_is_noticed(tiny, tokens):
    def flip_second_layer(layer, pattern):
        return pattern.flip(1) if layer == 1 else None

    model = tiny(kernel='eager')
    with patterns.watch_patterns(model, flip_second_layer):
        sums, rebuilt = patterns.check_patterns(model, tokens(20))
    assert max(sums, rebuilt) > 1e-3


# -------------------------------------------------------------------------------------------------
# trials

anything = dict(seed=st.integers(0, 9), bare=st.booleans())


def make_trials(block, usable, longest, seed, bare):
    """Return ids and the trials made of them; None where they are too few."""
    try:
        L, G = patterns.trial_lengths(block, usable, longest)
    except UserError:
        assert block < 16 or usable < 10
        return None
    ids = 10 + torch.arange(usable) * 3
    return ids, G, patterns.random_trials(ids, None if bare else 2, 8, L, G, seed)


sizes = dict(block=st.integers(12, 300), usable=st.integers(8, 200), longest=st.integers(4, 60))


@settings(max_examples=40, deadline=None)
@given(**sizes, **anything)
def test_trials_fit_their_block_and_use_the_ids_they_are_given(block, usable, longest, seed, bare):
    made = make_trials(block, usable, longest, seed, bare)
    if made is None:
        return
    ids, G, trial = made
    assert 4 <= trial.L <= longest
    assert 1 + 2 * trial.L + G <= block
    assert 1 <= trial.gap.min()
    assert trial.gap.max() <= G
    for name in ('repeated', 'control', 'gapped'):
        text = getattr(trial, name)
        assert text.size(1) <= block, name
        assert torch.isin(text[:, 1:], ids).all(), name
        if not bare:
            assert (text[:, 0] == 2).all(), name
        for row in text[:, 1 : trial.L + 1].tolist():
            assert len(set(row)) == trial.L, name


@settings(max_examples=40, deadline=None)
@given(**sizes, **anything)
def test_trials_repeat_what_they_should(block, usable, longest, seed, bare):
    made = make_trials(block, usable, longest, seed, bare)
    if made is None:
        return
    trial = made[-1]
    for text, gap in ((trial.repeated, 0 * trial.gap), (trial.gapped, trial.gap)):
        q, keys = patterns.second_copy(trial.L, gap)
        assert torch.equal(text.gather(1, keys['duplicate']), text.gather(1, q))
        assert (keys['induction'] <= q).all()
        # But for the last one, the token after the first copy's is the one that comes next.
        predicted = text.gather(1, keys['induction'])[:, :-1]
        assert torch.equal(predicted, text.gather(1, q[:, :-1] + 1))


@settings(max_examples=40, deadline=None)
@given(**sizes, **anything)
def test_fillers_are_tokens_that_do_not_repeat(block, usable, longest, seed, bare):
    made = make_trials(block, usable, longest, seed, bare)
    if made is None:
        return
    trial = made[-1]
    for row, gap in zip(trial.gapped.tolist(), trial.gap.tolist()):
        first_copy, filler = row[1 : trial.L + 1], row[1 + trial.L : 1 + trial.L + gap]
        assert not set(filler) & set(first_copy)


@settings(max_examples=30, deadline=None)
@given(L=st.integers(4, 30), G=st.integers(1, 30), **anything)
def test_trials_of_text_are_windows_of_it(L, G, seed, bare):
    tokens = 10 + torch.arange(400)  # each position has a token of its own
    trial = patterns.text_trials(tokens, None if bare else 2, 8, L, G, seed)
    S = trial.repeated[:, 1 : L + 1]
    assert (S.diff() == 1).all()
    assert torch.equal(trial.repeated[:, L + 1 :], S)
    if not bare:
        assert (trial.repeated[:, 0] == 2).all()
    assert torch.equal(trial.control[:, : L + 1], trial.repeated[:, : L + 1])
    assert (trial.control[:, L + 1 :].diff() == 1).all()
    assert 1 <= trial.gap.min()
    assert trial.gap.max() <= G
    assert trial.gapped.size(1) == 2 * L + G + 1
    q, keys = patterns.second_copy(L, trial.gap)
    assert torch.equal(trial.gapped.gather(1, q), S)
    assert torch.equal(trial.gapped.gather(1, keys['duplicate']), S)


def test_too_short_a_text_makes_no_trials():
    L, G = 6, 3
    assert patterns.text_trials(torch.arange(4 * (L + G) + 1), None, 8, L, G) is None
    assert patterns.text_trials(torch.arange(4 * (L + G) + 2), None, 8, L, G) is not None


def test_losses_in_pieces_are_the_models(tiny, tokens):
    model, ids = tiny(), tokens(20, B=4)
    whole = model(ids[:, :-1], ids[:, 1:])
    x = model.hidden(ids[:, :-1])
    losses = patterns.token_losses(model, x, ids[:, 1:], chunk=400)
    assert losses.mean().item() == pytest.approx(whole.item(), abs=1e-5)
