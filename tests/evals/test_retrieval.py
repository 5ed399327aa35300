"""Retrieval: the texts hold what they should where they should, and answers are counted rightly."""

import json
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanomla.core.tokenizers import Tokenizer
from nanomla.evals import retrieval
from nanomla.evals.retrieval import METRICS, TASKS, Trials
from nanomla.evals.scoring import Score, Scorer
from nanomla.inference.cache import Cache
from nanomla.inference.generate import generate, prefill

LETTERS = '\n abcdefghijklmnopqrstuvwxyzTN,.:swaiASKBDFGHLMPRVWZ'
META = dict(
    char=dict(tokenizer='char', chars=''.join(sorted(set(LETTERS)))),
    bytes=dict(tokenizer='bytes'),
)


class Reader:
    """
    Score as a perfect reader would (or one that is always wrong): certain is what follows the last
    place where the context's ending stood before.
    """

    def __init__(self, memory=6, right=True):
        self.memory, self.right = memory, right

    def score(self, requests, progress=None):
        if progress:
            progress(len(requests))
        results = []
        for context, continuations in requests:
            results.append([self.judge(context, one) for one in continuations])
        return results

    def judge(self, context, one):
        n = self.memory
        ending = context[-n:]
        places = [i for i in range(len(context) - n) if context[i : i + n] == ending]
        begin = places[-1] + n
        known = context[begin : begin + len(one)] == one
        logp = -0.1 if known == self.right else -9.0
        return Score([logp] * len(one), [known == self.right] * len(one))


@pytest.mark.parametrize('tokenizer', META)
@pytest.mark.parametrize('task', TASKS)
def test_a_perfect_reader_retrieves_and_a_bad_one_does_not(task, tokenizer):
    trials = Trials(task, Tokenizer(META[tokenizer]), trials=3, candidates=5, seed=7)
    grid = [160, 240], [0, 0.5, 1]
    done = []
    good = retrieval.evaluate(Reader(), trials, *grid, done.append)
    bad = retrieval.evaluate(Reader(right=False), trials, *grid)
    assert sum(done) == 2 * 3 * 3
    assert [good[name] for name in METRICS] == [1, 1, 1]
    assert [bad[name] for name in METRICS] == [0, 0, 0]
    assert len(good['cells']) == 6
    assert good['chance'] == pytest.approx(0.2)


@pytest.mark.parametrize('tokenizer', META)
@given(length=st.integers(150, 400), depth=st.floats(0, 1), seed=st.integers(0, 10**6))
@settings(max_examples=20, deadline=None)
def test_the_needle_lies_where_it_should(tokenizer, length, depth, seed):
    codec = Tokenizer(META[tokenizer])
    hay = np.array(codec.encode('hay ' * 200))
    trials = Trials('needle', codec, candidates=4, haystack=hay)
    context, answers = trials.make(length, depth, random.Random(seed))
    text, words = codec.decode(context), [codec.decode(one) for one in answers]
    assert len(context) + len(answers[0]) == length
    assert len(set(words)) == 4
    question = text[text.rindex('The') :]
    assert question.startswith('The secret word of ')
    assert text.count(f'{question}{words[0]}.') == 1  # the answer to this very question
    assert all(other not in text for other in words[1:])
    room = length - len(question) * 2 - len(words[0]) * 2 - 4
    assert text.index(question) - 1 == round(depth * room)
    assert set(text.replace(f'\n{question}{words[0]}.\n', '')[:room]) <= set('hay ')


@pytest.mark.parametrize('tokenizer', META)
@given(length=st.integers(80, 400), depth=st.floats(0, 1), seed=st.integers(0, 10**6))
@settings(max_examples=20, deadline=None)
def test_keys_and_values_stand_in_lines(tokenizer, length, depth, seed):
    codec = Tokenizer(META[tokenizer])
    trials = Trials('key_value', codec, candidates=4)
    context, answers = trials.make(length, depth, random.Random(seed))
    *lines, question = codec.decode(context).split('\n')
    pairs = dict(line.split(':') for line in lines)
    assert len(pairs) == len(lines) >= 2
    assert len({*pairs, *pairs.values()}) == 2 * len(pairs)
    # Not one more line would fit: 15 characters, and 14 to ask.
    assert length - 23 < len(context) + len(answers[0]) <= length
    asked = question.removesuffix(':')
    assert list(pairs).index(asked) == round(depth * (len(pairs) - 1))
    words = [codec.decode(one) for one in answers]
    assert words[0] == pairs[asked]
    assert len(set(words)) == min(4, len(pairs))
    assert set(words) <= set(pairs.values())


@pytest.mark.parametrize('task', TASKS)
def test_in_a_conversation_the_question_begins_the_answer(task):
    codec = Tokenizer(META['bytes'])
    begin, end = codec.encode('<user>'), codec.encode('<end><answer>')
    trials = Trials(task, codec, candidates=4, begin=begin, end=end)
    context, answers = trials.make(200, 0.5, random.Random(3))
    assert 200 - 23 < len(context) + len(answers[0]) <= 200
    text, question = codec.decode(context).removeprefix('<user>').split('<end><answer>')
    assert question.endswith((':', ' is')) and '\n' not in question
    assert f'{question}{codec.decode(answers[0])}' in text


def test_trials_depend_on_the_seed_alone():
    made = []

    class Recorder(Reader):
        def score(self, requests, progress=None):
            made.append([json.dumps(request) for request in requests])
            return super().score(requests, progress)

    for seed in (1, 1, 2):
        trials = Trials('needle', Tokenizer(META['bytes']), trials=4, candidates=3, seed=seed)
        retrieval.evaluate(Recorder(), trials, [200], [0.5])
    assert made[0] == made[1]
    assert not set(made[0]) & set(made[2])
    assert len(set(made[0])) == 4


TEXTS = dict(
    key_value=(
        'retafu: gidula\nfovama: vagedu\ntamahi: vegupu\nfovama:',
        ' vagedu',
        ' vegupu',
        ' gidula',
    ),
    needle=(
        'They saw the deduhi by the vegupu, and\nThe secret word of Retafu is gidula.\n'
        ' the kaligu was fudulo.\nThey saw the r\nThe secret word of Retafu is',
        ' gidula',
        ' fovama',
        ' vagedu',
    ),
)


@pytest.mark.parametrize('task, length', [('key_value', 60), ('needle', 150)])
def test_a_seed_makes_the_texts_that_it_has_always_made(task, length):
    """Results that were measured before stay comparable."""
    trials = Trials(task, Tokenizer(META['bytes']), candidates=3)
    context, answers = trials.make(length, 0.5, random.Random(7))
    assert [bytes(ids).decode() for ids in (context, *answers)] == list(TEXTS[task])


@pytest.mark.parametrize('task', TASKS)
def test_lengths_that_are_too_short(task):
    trials = Trials(task, Tokenizer(META['bytes']), candidates=4, seed=0)
    assert trials.make(20, 0.5, random.Random(0)) is None
    least = retrieval.least_length(trials)
    assert trials.make(least, 0.5, random.Random(5)) is not None
    assert 40 < least < 120


def test_a_blank_before_each_text_is_not_put_inside_one():
    class WithBlank:
        def encode(self, text):
            return list((' ' + text).encode())

    assert retrieval.encode_inside(WithBlank(), 'abc') == list(b'abc')
    assert retrieval.encode_inside(WithBlank(), ' x', before='a is') == list(b' x')


def test_exact_means_that_greedy_decoding_writes_the_word(tiny):
    codec = Tokenizer(META['char'])
    model = tiny('mha', vocab_size=codec.vocab_size, block_size=200, pos='rope')
    trials = Trials('needle', codec, candidates=3)
    context, answers = trials.make(150, 0.3, random.Random(1))
    steps = generate(model, torch.tensor([context]), len(answers[0]), temperature=0)
    written = [token.item() for token in steps]
    scores = Scorer(model, codec.vocab_size).score([(context, [*answers, written])])[0]
    assert all(scores[-1].greedy)
    assert [all(score.greedy) for score in scores[:-1]] == [one == written for one in answers]
    with torch.no_grad():
        cache = Cache.of(model, 1, 200)
        first = model.lm_head(prefill(model, [context], cache)).argmax().item()
    assert first == written[0]
