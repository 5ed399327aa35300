"""Log-likelihoods through caches against the plain model, and what retrieval builds on them."""

import json
import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanomla.core import token_files as dataset
from nanomla.core import tokenizers
from nanomla.evals import retrieval
from nanomla.evals.scoring import Scorer, perplexity, windows
from nanomla.inference.cache import Cache
from nanomla.inference.generate import generate, prefill
from nanomla.training import batches

MODELS = dict(
    mha=dict(kind='mha', pos='rope'),
    learned=dict(kind='mha'),
    gqa=dict(kind='mha', pos='rope', n_kv_head=2),
    mla=dict(kind='mla'),
)
LETTERS = '\n abcdefghijklmnopqrstuvwxyzTN,.:swaiASKBDFGHLMPRVWZ'


@pytest.fixture(autouse=True, scope='module')
def one_thread():
    """Many tiny models: a second thread only waits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def by_hand(model, context, continuation, vocab_size=40):
    """(log-probabilities, whether greedy) of a continuation: one plain forward pass over everything."""
    with torch.no_grad():
        logits = model(torch.tensor([context + continuation[:-1]]))[0, len(context) - 1 :]
    logp = [logits[t].log_softmax(-1)[token].item() for t, token in enumerate(continuation)]
    return logp, [
        logits[t, :vocab_size].argmax().item() == token for t, token in enumerate(continuation)
    ]


def alike(scores, wanted, atol=1e-4):
    for (logp, greedy), (right_logp, right_greedy) in zip(scores, wanted, strict=True):
        assert logp == pytest.approx(right_logp, abs=atol) and greedy == right_greedy


def random_requests(seed, n=5, V=40, longest=10):
    rng = random.Random(seed)

    def text(n):
        return [rng.randrange(V) for _ in range(n)]

    return [
        (
            text(rng.randint(1, longest)),
            [text(rng.randint(0, longest)) for _ in range(rng.randint(1, 4))],
        )
        for _ in range(n)
    ]


# ---------------------------------------------------------------------------------------------------
# scores


@pytest.mark.parametrize('layout', ['none', 'dense', 'paged'])
@pytest.mark.parametrize('name', MODELS)
def test_scores_are_those_of_the_plain_model(name, layout, tiny):
    model = tiny(**MODELS[name])
    how = dict(layout=layout) | (dict(page_size=16) if layout == 'paged' else {})

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
        scores = scorer.score(requests, done.append)
        assert sum(done) == len(requests) and scorer.dequantised == 0
        for (context, continuations), got in zip(requests, scores, strict=True):
            alike(got, [by_hand(model, context, one) if one else ([], []) for one in continuations])

    check()


def test_a_scorer_can_be_used_again(tiny):
    """Slots are emptied between batches of other sizes, lengths and numbers of continuations."""
    model = tiny('mla')
    scorer = Scorer(model, 40, layout='paged', page_size=16, chunk_size=4, batch_size=2)
    for seed in range(4):
        requests = random_requests(seed, n=seed + 1, longest=12 - 3 * (seed % 2))
        for (context, continuations), got in zip(requests, scorer.score(requests)):
            alike(got, [by_hand(model, context, one) if one else ([], []) for one in continuations])


def test_a_context_that_is_too_long_loses_its_beginning(tiny):
    model = tiny(block_size=16, pos='rope')
    context, one = [i % 40 for i in range(50)], [3, 1, 4, 1, 5]
    ((got,),) = Scorer(model, 40).score([(context, [one])])
    alike([got], [by_hand(model, context[-12:], one)])  # 12 and 4 of the 5 are run
    with pytest.raises(AssertionError):
        Scorer(model, 40).score([(context, [list(range(17))])])


def test_padding_ids_are_never_the_likeliest(tiny):
    model = tiny(tie_weights=False)
    with torch.no_grad():
        model.lm_head.weight[39] = (
            30 * model.lm_head.weight[5]
        )  # where 5 would be likely, or most unlikely, 39 is more so
    requests = [([i, 1, 2], [[j] for j in range(40)]) for i in range(20)]
    scores = Scorer(model, 39).score(requests)
    assert all(
        sum(greedy[0] for _, greedy in judged[:39]) == 1 and not judged[39][1][0]
        for judged in scores
    )
    assert any(
        max(judged, key=lambda one: one[0])[0] == judged[39][0] for judged in scores
    )  # though it is sometimes
    total = [sum(math.exp(logp[0]) for logp, _ in judged) for judged in scores]
    assert total == pytest.approx([1.0] * 20, abs=1e-4)


@pytest.mark.parametrize('kind', ['mha', 'mla'])
def test_greedy_text_is_greedy(kind, tiny):
    model = tiny(kind, pos='rope')
    context = [1, 2, 3]
    said = [token.item() for token in generate(model, torch.tensor([context]), 8, temperature=0)]
    other = said[:4] + [(said[4] + 1) % 40] + said[5:]
    right, wrong = Scorer(model, 40, chunk_size=1).score([(context, [said, other])])[0]
    assert all(right[1]) and wrong[1][:4] == [True] * 4 and not wrong[1][4]


# ---------------------------------------------------------------------------------------------------
# quantised caches


@pytest.mark.parametrize('bits', ['int8', 'int4'])
@pytest.mark.parametrize('kind', ['mha', 'mla'])
@pytest.mark.parametrize('chunk', [1, 5])
def test_a_quantised_cache_is_read_as_decoding_reads_it(chunk, kind, bits, tiny):
    """Against a cache fed by hand in the same pieces; full precision gives something else."""
    model = tiny(kind, pos='rope')
    ids, window = [random.Random(1).randrange(40) for _ in range(21)], 3
    scorer = Scorer(model, 40, dtype=bits, window=window, chunk_size=chunk)
    ((got,),) = scorer.score([(ids[:1], [ids[1:]])])
    cache = Cache.of(model, 1, 20, dtype=bits, window=window)
    pieces = [ids[:1]] + [ids[1:-1][at : at + chunk] for at in range(0, 19, chunk)]
    states = []
    with torch.no_grad():
        for piece in pieces:
            states.append(model.hidden(torch.tensor([piece]), cache)[0])
        logits = model.lm_head(torch.cat(states))
    logp = logits.log_softmax(-1).gather(-1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()
    assert got[0] == pytest.approx(logp, abs=1e-4)
    plain = by_hand(model, ids[:1], ids[1:])[0]
    assert max(abs(a - b) for a, b in zip(got[0], plain)) > (1e-4 if bits == 'int8' else 1e-2)

    begins = [
        sum(map(len, pieces[:i])) for i in range(len(pieces))
    ]  # in the cache before each piece
    seen = sum(range(1, 21))
    old = sum(
        len(piece) * max(0, min(begin, begin + len(piece) - window))
        for piece, begin in zip(pieces, begins)
    )
    assert scorer.dequantised == pytest.approx(old / seen) and old


def test_forks_keep_the_window(tiny):
    """Continuations of a shared context see what each would see alone."""
    model = tiny('mla')
    context, ones = (
        [random.Random(2).randrange(40) for _ in range(12)],
        [[1, 2, 3, 4], [9], [30, 31, 32]],
    )
    for layout in ('dense', 'paged'):
        how = dict(layout=layout, dtype='int4', window=4, page_size=16, chunk_size=2)
        together = Scorer(model, 40, **how).score([(context, ones)])[0]
        for one, got in zip(ones, together):
            alike([got], Scorer(model, 40, **how).score([(context, [one])])[0])


def test_nothing_dequantised_when_all_lies_in_the_window(tiny):
    model = tiny('mha', pos='rope')
    for how in (dict(window=24, chunk_size=1), dict(window=0, chunk_size=0)):
        scorer = Scorer(model, 40, dtype='int4', **how)
        ((got,),) = scorer.score([([1], [list(range(2, 20))])])
        assert (scorer.dequantised == 0) == ('window' in how and how['window'] == 24)
        if how['window']:
            alike([got], [by_hand(model, [1], list(range(2, 20)))], atol=1e-3)


@pytest.mark.parametrize('stored', ['float32', 'bfloat16', 'int8', 'int4'])
@pytest.mark.parametrize('kind', ['mha', 'mla'])
def test_bytes_are_those_of_the_buffers(kind, stored, tiny):
    """By the README's formula, and in sum what the cache says of itself."""
    model = tiny(kind, pos='rope')
    scorer = Scorer(model, 40, dtype=stored, window=8, batch_size=3)
    scorer.score(random_requests(0, n=3))
    held, dims = scorer.footprint(), model.transformer.h[0].attn.cache_dims()
    place = window = 0
    for name, width in dims.items():
        if stored.startswith('int') and name != 'k_pe':
            place += -(-width * int(stored[3:]) // 8) + 4 * width // width  # one group of up to 64
            window += 8 * width * 4
        else:
            place += width * (2 if stored == 'bfloat16' else 4)
    assert held['bytes_per_token'] == 2 * place and held['window_bytes'] == 2 * window  # 2 layers
    assert (
        held['nbytes']
        == scorer.cache.nbytes
        == held['slots'] * (held['size'] * held['bytes_per_token'] + held['window_bytes'])
    )
    assert Scorer(model, 40, layout='none').footprint() == {}


# ---------------------------------------------------------------------------------------------------
# perplexity


@given(n=st.integers(2, 200), context=st.integers(1, 60), data=st.data())
def test_windows_score_each_token_once(n, context, data):
    stride = data.draw(st.integers(1, context))
    counted = np.zeros(n, int)
    for number, (begin, end, scored) in enumerate(windows(n, context, stride)):
        assert 0 <= begin < end <= n and end - begin <= context + 1 and scored >= 1
        counted[end - scored : end] += 1
        before = np.arange(end - scored, end) - begin
        assert before.min() >= (1 if number == 0 else context - stride + 1)
        assert end - begin == min(n, context + 1)  # every window is whole
    assert counted[0] == 0 and (counted[1:] == 1).all()


@pytest.mark.parametrize('layout', ['none', 'dense', 'paged'])
def test_perplexity_by_hand(layout, tiny):
    model = tiny('mla')
    ids = np.array([random.Random(3).randrange(40) for _ in range(70)])
    got = perplexity(Scorer(model, 40, layout, chunk_size=5, batch_size=3), ids, 20, 8, n_bytes=123)
    nats = [
        -by_hand(model, ids[max(0, begin) : t].tolist(), [int(ids[t])])[0][0]
        for t in range(1, 70)
        for begin in [0 if t <= 20 else min(20 + 8 * -(-(t - 20) // 8), 69) - 20]
    ]
    assert got['tokens'] == 69 and got['loss'] == pytest.approx(sum(nats) / 69, abs=1e-5)
    assert got['perplexity'] == pytest.approx(math.exp(sum(nats) / 69), rel=1e-5)
    assert got['bits_per_byte'] == pytest.approx(sum(nats) / math.log(2) / 123, rel=1e-5)


def test_disjoint_windows_give_the_loss_of_training(tiny, tmp_path):
    """stride = context = block_size: what train.py calls the validation loss."""
    text = ''.join(random.Random(4).choices('abcdefgh \n', k=3000))
    dataset.write_text(tmp_path, text, 'char', 'a test')
    model = tiny('mha', vocab_size=10, pos='rope')
    data = batches.Dataset(tmp_path, 24)
    total = count = 0
    with torch.no_grad():
        for x, y in data.val_batches(4):
            n = (y >= 0).sum().item()
            total, count = total + model(x, y).item() * n, count + n
    ids = data.tokens['val']
    got = perplexity(Scorer(model, 10), ids, 24, 24, n_bytes=299)
    assert got['tokens'] == count == 299 and got['loss'] == pytest.approx(total / count, abs=1e-5)


# ---------------------------------------------------------------------------------------------------
# retrieval


class Reader:
    """Scores as a perfect reader would: what follows the last place where the context's ending stood before is certain."""

    def __init__(self, memory=6, right=True):
        self.memory, self.right = memory, right

    def score(self, requests, tell=None):
        if tell:
            tell(len(requests))
        return [
            [self.judge(context, one) for one in continuations]
            for context, continuations in requests
        ]

    def judge(self, context, one):
        ending = context[-self.memory :]
        at = max(
            i for i in range(len(context) - self.memory) if context[i : i + self.memory] == ending
        )
        known = context[at + self.memory : at + self.memory + len(one)] == one
        return [-0.1 if known == self.right else -9.0] * len(one), [known == self.right] * len(one)


CODECS = dict(
    char=dict(tokenizer='char', chars=''.join(sorted(set(LETTERS)))), bytes=dict(tokenizer='bytes')
)


@pytest.mark.parametrize('tokenizer', CODECS)
@pytest.mark.parametrize('task', retrieval.TASKS)
def test_a_perfect_reader_retrieves_and_a_bad_one_does_not(task, tokenizer):
    codec, told = tokenizers.Tokenizer(CODECS[tokenizer]), []

    class Bar:
        update = told.append

    good, bad = (
        retrieval.evaluate(
            Reader(right=right), task, codec, [160, 240], [0, 0.5, 1], 3, 5, 7, bar=Bar
        )
        for right in (True, False)
    )
    assert sum(told) == 2 * 2 * 3 * 3
    assert all(good[name] == 1 for name in retrieval.COUNTED) and all(
        bad[name] == 0 for name in retrieval.COUNTED
    )
    assert len(good['cells']) == 6 and good['chance'] == pytest.approx(0.2)


@pytest.mark.parametrize('tokenizer', CODECS)
@given(length=st.integers(150, 400), depth=st.floats(0, 1), seed=st.integers(0, 10**6))
@settings(max_examples=20, deadline=None)
def test_the_needle_lies_where_it_should(tokenizer, length, depth, seed):
    codec = tokenizers.Tokenizer(CODECS[tokenizer])
    hay = np.array(codec.encode('hay ' * 200))
    context, answers = retrieval.needle(codec, length, depth, 4, random.Random(seed), hay=hay)
    text, words = codec.decode(context), [codec.decode(one) for one in answers]
    assert len(context) + len(answers[0]) == length and len(set(words)) == 4
    question = text[text.rindex('The') :]
    assert (
        question.startswith('The secret word of ') and text.count(f'{question}{words[0]}.') == 1
    )  # the answer to this very question
    assert all(other not in text for other in words[1:])
    room = length - len(question) * 2 - len(words[0]) * 2 - 4
    assert text.index(question) - 1 == round(depth * room)
    assert set(text.replace(f'\n{question}{words[0]}.\n', '')[:room]) <= set('hay ')


@pytest.mark.parametrize('tokenizer', CODECS)
@given(length=st.integers(80, 400), depth=st.floats(0, 1), seed=st.integers(0, 10**6))
@settings(max_examples=20, deadline=None)
def test_keys_and_values_stand_in_lines(tokenizer, length, depth, seed):
    codec = tokenizers.Tokenizer(CODECS[tokenizer])
    context, answers = retrieval.key_value(codec, length, depth, 4, random.Random(seed))
    *lines, question = codec.decode(context).split('\n')
    pairs = dict(line.split(':') for line in lines)
    assert len(pairs) == len(lines) >= 2 and len({*pairs, *pairs.values()}) == 2 * len(pairs)
    assert (
        length - 23 < len(context) + len(answers[0]) <= length
    )  # not one more line would fit (15 characters, and 14 to ask)
    asked = question.removesuffix(':')
    assert list(pairs).index(asked) == round(depth * (len(pairs) - 1))
    words = [codec.decode(one) for one in answers]
    assert (
        words[0] == pairs[asked]
        and len(set(words)) == min(4, len(pairs))
        and set(words) <= set(pairs.values())
    )


def test_trials_depend_on_the_seed_alone():
    codec, made = tokenizers.Tokenizer(CODECS['bytes']), []

    class Recorder(Reader):
        def score(self, requests, tell=None):
            made[-1] += [json.dumps(request) for request in requests]
            return super().score(requests, tell)

    for seed in (1, 1, 2):
        made.append([])
        retrieval.evaluate(Recorder(), 'needle', codec, [200], [0.5], 4, 3, seed)
    assert made[0] == made[1] and not set(made[0]) & set(made[2]) and len(set(made[0])) == 4


def test_lengths_that_are_too_short():
    codec = tokenizers.Tokenizer(CODECS['bytes'])
    for task in retrieval.TASKS:
        make = getattr(retrieval, task)
        assert make(codec, 20, 0.5, 4, random.Random(0)) is None
        least = retrieval.least_length(task, codec, 4, 0)
        assert make(codec, least, 0.5, 4, random.Random(5)) is not None
        assert 40 < least < 120


def test_pieces_inside_a_text():
    """A tokenizer that puts a blank before each text does not do so in the middle of one."""

    class Blank:
        def encode(self, text):
            return list((' ' + text).encode())

    assert retrieval.inside(Blank(), 'abc') == list(b'abc') and retrieval.inside(
        Blank(), ' x', before='a is'
    ) == list(b' x')


def test_retrieval_is_what_a_real_model_does_with_it(tiny):
    """Exact means that prefill and greedy steps write the word."""
    codec = tokenizers.Tokenizer(CODECS['char'])
    model = tiny('mha', vocab_size=codec.vocab_size, block_size=200, pos='rope')
    context, answers = retrieval.needle(codec, 150, 0.3, 3, random.Random(1))
    said = [
        token.item()
        for token in generate(model, torch.tensor([context]), len(answers[0]), temperature=0)
    ]
    judged = Scorer(model, codec.vocab_size).score([(context, [*answers, said])])[0]
    assert all(judged[-1][1]) and [all(greedy) for _, greedy in judged[:-1]] == [
        one == said for one in answers
    ]
    with torch.no_grad():
        cache = Cache.of(model, 1, 200)
        first = model.lm_head(prefill(model, [context], cache)).argmax().item()
    assert first == said[0]


@pytest.mark.gpu
@pytest.mark.parametrize('stored', ['auto', 'int8', 'int4'])
@pytest.mark.parametrize('layout', ['dense', 'paged'])
@pytest.mark.parametrize('name', MODELS)
@pytest.mark.parametrize('chunk', [1, 5])
def test_scores_on_a_gpu(chunk, name, layout, stored, tiny):
    """In bf16, with whatever kernel decodes there: near the same cache on the CPU in fp32."""
    model, requests = tiny(**MODELS[name]), random_requests(11, n=3)
    how = dict(layout=layout, dtype=stored, window=4, chunk_size=chunk, page_size=16)
    right = Scorer(model, 40, **how).score(requests)
    model.to('cuda', torch.bfloat16).stream = torch.bfloat16
    for one, other in zip(right, Scorer(model, 40, **how).score(requests), strict=True):
        for (a, _), (b, _) in zip(one, other, strict=True):
            assert b == pytest.approx(a, abs=0.35)
    assert (
        np.mean(
            [
                abs(x - y)
                for one, other in zip(right, Scorer(model, 40, **how).score(requests))
                for (a, _), (b, _) in zip(one, other)
                for x, y in zip(a, b)
            ]
        )
        < 0.05
    )
