"""Log-likelihoods through caches against the plain model."""

import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanomla.core import token_files
from nanomla.evals.scoring import Scorer, perplexity, windows
from nanomla.inference.cache import Cache
from nanomla.inference.generate import generate
from nanomla.training import batches

MODELS = dict(
    mha=dict(kind='mha', pos='rope'),
    learned=dict(kind='mha'),
    gqa=dict(kind='mha', pos='rope', n_kv_head=2),
    mla=dict(kind='mla'),
)


@pytest.fixture(autouse=True, scope='module')
def one_thread():
    """Many tiny models: a second thread only waits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def by_hand(model, context, continuation, vocab_size=40):
    """Return log-probabilities and whether greedy, from one plain forward pass over everything."""
    if not continuation:
        return [], []
    with torch.no_grad():
        logits = model(torch.tensor([context + continuation[:-1]]))[0, len(context) - 1 :]
    logp = [logits[t].log_softmax(-1)[token].item() for t, token in enumerate(continuation)]
    likeliest = logits[:, :vocab_size].argmax(-1).tolist()
    return logp, [a == b for a, b in zip(likeliest, continuation)]


def check_scores(scores, expected, atol=1e-4):
    for (logp, greedy), (right_logp, right_greedy) in zip(scores, expected, strict=True):
        assert logp == pytest.approx(right_logp, abs=atol)
        assert greedy == right_greedy


def random_text(rng, n, V=40):
    return [rng.randrange(V) for _ in range(n)]


def random_requests(seed, n=5, longest=10):
    rng = random.Random(seed)
    requests = []
    for _ in range(n):
        context = random_text(rng, rng.randint(1, longest))
        count = rng.randint(1, 4)
        continuations = [random_text(rng, rng.randint(0, longest)) for _ in range(count)]
        requests.append((context, continuations))
    return requests


def check_against_model(model, requests, results):
    for (context, continuations), scores in zip(requests, results, strict=True):
        check_scores(scores, [by_hand(model, context, one) for one in continuations])


# -------------------------------------------------------------------------------------------------
# scores


@pytest.mark.parametrize('layout', ['none', 'dense', 'paged'])
@pytest.mark.parametrize('name', MODELS)
def test_scores_are_those_of_the_plain_model(name, layout, tiny):
    model = tiny(**MODELS[name])
    how = dict(layout=layout)
    if layout == 'paged':
        how['page_size'] = 16

    @settings(max_examples=5, deadline=None, database=None)
    @given(
        seed=st.integers(0, 10**6),
        chunk=st.sampled_from([0, 1, 3, 8]),
        batch=st.sampled_from([1, 2, 3, 8]),
    )
    def check(seed, chunk, batch):
        requests = random_requests(seed)
        done = []
        scorer = Scorer(model, 40, chunk_size=chunk, batch_size=batch, **how)
        results = scorer.score(requests, done.append)
        assert sum(done) == len(requests)
        assert scorer.dequantised == 0
        check_against_model(model, requests, results)

    check()


def test_a_scorer_can_be_used_again(tiny):
    """Slots are emptied between batches of other sizes, lengths and numbers of continuations."""
    model = tiny('mla')
    scorer = Scorer(model, 40, layout='paged', page_size=16, chunk_size=4, batch_size=2)
    for seed in range(4):
        requests = random_requests(seed, n=seed + 1, longest=12 - 3 * (seed % 2))
        check_against_model(model, requests, scorer.score(requests))


def test_a_context_that_is_too_long_loses_its_beginning(tiny):
    model = tiny(block_size=16, pos='rope')
    context, one = [i % 40 for i in range(50)], [3, 1, 4, 1, 5]
    ((score,),) = Scorer(model, 40).score([(context, [one])])
    check_scores([score], [by_hand(model, context[-12:], one)])  # 12 and 4 of the 5 are run
    with pytest.raises(AssertionError):
        Scorer(model, 40).score([(context, [list(range(17))])])


def test_padding_ids_are_never_the_likeliest(tiny):
    model = tiny(tie_weights=False)
    with torch.no_grad():
        # Where 5 would be likely, or most unlikely, 39 is more so.
        model.lm_head.weight[39] = 30 * model.lm_head.weight[5]
    requests = [([i, 1, 2], [[j] for j in range(40)]) for i in range(20)]
    results = Scorer(model, 39).score(requests)
    sometimes = False
    for scores in results:
        assert sum(score.greedy[0] for score in scores[:39]) == 1
        assert not scores[39].greedy[0]
        logp = [score.logp[0] for score in scores]
        assert sum(math.exp(x) for x in logp) == pytest.approx(1.0, abs=1e-4)
        sometimes = sometimes or max(logp) == logp[39]
    assert sometimes  # it would have been the likeliest


@pytest.mark.parametrize('kind', ['mha', 'mla'])
def test_greedy_text_is_greedy(kind, tiny):
    model = tiny(kind, pos='rope')
    context = [1, 2, 3]
    text = [t.item() for t in generate(model, torch.tensor([context]), 8, temperature=0)]
    other = text[:4] + [(text[4] + 1) % 40] + text[5:]
    right, wrong = Scorer(model, 40, chunk_size=1).score([(context, [text, other])])[0]
    assert all(right.greedy)
    assert wrong.greedy[:4] == [True] * 4
    assert not wrong.greedy[4]


# -------------------------------------------------------------------------------------------------
# quantised caches


@pytest.mark.parametrize('bits', ['int8', 'int4'])
@pytest.mark.parametrize('kind', ['mha', 'mla'])
@pytest.mark.parametrize('chunk', [1, 5])
def test_a_quantised_cache_is_read_as_decoding_reads_it(chunk, kind, bits, tiny):
    """Against a cache fed by hand in the same pieces; full precision gives something else."""
    model = tiny(kind, pos='rope')
    ids, window = random_text(random.Random(1), 21), 3
    scorer = Scorer(model, 40, dtype=bits, window=window, chunk_size=chunk)
    ((score,),) = scorer.score([(ids[:1], [ids[1:]])])
    cache = Cache.of(model, 1, 20, dtype=bits, window=window)
    pieces = [ids[:1]] + [ids[1:-1][at : at + chunk] for at in range(0, 19, chunk)]
    states = []
    with torch.no_grad():
        for piece in pieces:
            states.append(model.hidden(torch.tensor([piece]), cache)[0])
        logits = model.lm_head(torch.cat(states))
    logp = logits.log_softmax(-1).gather(-1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()
    assert score.logp == pytest.approx(logp, abs=1e-4)
    plain, _ = by_hand(model, ids[:1], ids[1:])
    difference = max(abs(a - b) for a, b in zip(score.logp, plain))
    assert difference > (1e-4 if bits == 'int8' else 1e-2)

    attended, quantised, begin = sum(range(1, 21)), 0, 0
    for piece in pieces:
        in_codes = max(0, min(begin, begin + len(piece) - window))
        quantised += len(piece) * in_codes
        begin += len(piece)
    assert quantised
    assert scorer.dequantised == pytest.approx(quantised / attended)


@pytest.mark.parametrize('layout', ['dense', 'paged'])
def test_continuations_of_one_context_see_what_each_would_see_alone(layout, tiny):
    model = tiny('mla')
    context = random_text(random.Random(2), 12)
    continuations = [[1, 2, 3, 4], [9], [30, 31, 32]]
    how = dict(layout=layout, dtype='int4', window=4, page_size=16, chunk_size=2)
    together = Scorer(model, 40, **how).score([(context, continuations)])[0]
    for one, score in zip(continuations, together, strict=True):
        check_scores([score], Scorer(model, 40, **how).score([(context, [one])])[0])


def test_nothing_is_dequantised_when_all_lies_in_the_window(tiny):
    model, text = tiny('mha', pos='rope'), list(range(2, 20))
    scorer = Scorer(model, 40, dtype='int4', window=24, chunk_size=1)
    ((score,),) = scorer.score([([1], [text])])
    assert scorer.dequantised == 0
    check_scores([score], [by_hand(model, [1], text)], atol=1e-3)
    scorer = Scorer(model, 40, dtype='int4', window=0, chunk_size=0)
    scorer.score([([1], [text])])
    assert scorer.dequantised > 0


@pytest.mark.parametrize('stored', ['float32', 'bfloat16', 'int8', 'int4'])
@pytest.mark.parametrize('kind', ['mha', 'mla'])
def test_bytes_are_those_of_the_buffers(kind, stored, tiny):
    """By the documented formula, and in sum what the cache says of itself."""
    model = tiny(kind, pos='rope')
    scorer = Scorer(model, 40, dtype=stored, window=8, batch_size=3)
    scorer.score(random_requests(0, n=3))
    found = scorer.footprint()
    token = window = 0
    for name, width in model.transformer.h[0].attn.cache_dims().items():
        if stored.startswith('int') and name != 'k_pe':
            bits = int(stored.removeprefix('int'))
            token += -(-width * bits // 8) + 4  # scale and zero of one group of up to 64
            window += 8 * width * 4
        else:
            token += width * (2 if stored == 'bfloat16' else 4)
    layers = 2
    assert found['bytes_per_token'] == layers * token
    assert found['window_bytes'] == layers * window
    per_slot = found['size'] * found['bytes_per_token'] + found['window_bytes']
    assert found['nbytes'] == scorer.cache.nbytes == found['slots'] * per_slot
    assert Scorer(model, 40, layout='none').footprint() == {}


# -------------------------------------------------------------------------------------------------
# perplexity


@given(n=st.integers(2, 200), context=st.integers(1, 60), data=st.data())
def test_windows_score_each_token_once(n, context, data):
    stride = data.draw(st.integers(1, context))
    counted = np.zeros(n, int)
    for number, (begin, end, scored) in enumerate(windows(n, context, stride)):
        assert 0 <= begin < end <= n
        assert scored >= 1
        counted[end - scored : end] += 1
        fewest_before = end - scored - begin
        assert fewest_before >= (1 if number == 0 else context - stride + 1)
        assert end - begin == min(n, context + 1)  # every window is whole
    assert counted[0] == 0
    assert (counted[1:] == 1).all()


@pytest.mark.parametrize('layout', ['none', 'dense', 'paged'])
def test_perplexity_by_hand(layout, tiny):
    model = tiny('mla')
    ids = np.array(random_text(random.Random(3), 70))
    scorer = Scorer(model, 40, layout, chunk_size=5, batch_size=3)
    found = perplexity(scorer, ids, context=20, stride=8, n_bytes=123)
    nats = []
    for t in range(1, 70):
        begin = 0
        if t > 20:
            begin = min(20 + 8 * -(-(t - 20) // 8), 69) - 20
        logp, _ = by_hand(model, ids[begin:t].tolist(), [int(ids[t])])
        nats.append(-logp[0])
    assert found['tokens'] == 69
    assert found['loss'] == pytest.approx(sum(nats) / 69, abs=1e-5)
    assert found['perplexity'] == pytest.approx(math.exp(sum(nats) / 69), rel=1e-5)
    assert found['bits_per_byte'] == pytest.approx(sum(nats) / math.log(2) / 123, rel=1e-5)


def test_disjoint_windows_give_the_loss_of_training(tiny, tmp_path):
    """stride = context = block_size: what train.py calls the validation loss."""
    text = ''.join(random.Random(4).choices('abcdefgh \n', k=3000))
    token_files.write_text(tmp_path, text, 'char', 'a test')
    model = tiny('mha', vocab_size=10, pos='rope')
    data = batches.Dataset(tmp_path, 24)
    total = count = 0
    with torch.no_grad():
        for x, y in data.val_batches(4):
            n = (y >= 0).sum().item()
            total += model(x, y).item() * n
            count += n
    ids = data.tokens['val']
    found = perplexity(Scorer(model, 10), ids, 24, 24, n_bytes=299)
    assert found['tokens'] == count == 299
    assert found['loss'] == pytest.approx(total / count, abs=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize('stored', ['auto', 'int8', 'int4'])
@pytest.mark.parametrize('layout', ['dense', 'paged'])
@pytest.mark.parametrize('name', MODELS)
@pytest.mark.parametrize('chunk', [1, 5])
def test_scores_on_a_gpu(chunk, name, layout, stored, tiny):
    """In bf16, with whatever kernel decodes there: near the same cache on the CPU in fp32."""
    model, requests = tiny(**MODELS[name]), random_requests(11, n=3)
    how = dict(layout=layout, dtype=stored, window=4, chunk_size=chunk, page_size=16)
    expected = Scorer(model, 40, **how).score(requests)
    model.to('cuda', torch.bfloat16).stream = torch.bfloat16
    found = Scorer(model, 40, **how).score(requests)
    differences = []
    for right, scores in zip(expected, found, strict=True):
        for a, b in zip(right, scores, strict=True):
            assert b.logp == pytest.approx(a.logp, abs=0.35)
            differences += [abs(x - y) for x, y in zip(a.logp, b.logp)]
    assert np.mean(differences) < 0.05
