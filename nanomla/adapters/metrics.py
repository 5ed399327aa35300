"""
How near an answer comes to its reference.

Exact match and token F1 as SQuAD defines them (Rajpurkar et al. 2016, section 6.1; here articles
are words like any other), ROUGE-1/2/L (Lin 2004) by the rouge-score package.

A prediction of the next token stands one position before the token that it predicts. `predicted`
shifts it there: without the shift a model that only repeats its input would score 1.
"""

import re
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

from nanomla.adapters.lora import INSTALL, UnavailableError

METRICS = ('exact_match', 'token_f1', 'rouge1', 'rouge2', 'rougeL')


def words(text: str) -> list[str]:
    """Return the words and signs of a text in lower case."""
    return re.findall(r'\w+|[^\w\s]', text.lower())


def exact_match(answer: str, reference: str) -> float:
    """Return 1.0 when both are the same words and signs, else 0.0."""
    return float(words(answer) == words(reference))


def token_f1(answer: str, reference: str) -> float:
    """
    Return the harmonic mean of precision and recall over words and signs.

    Each counts as often as it stands there; 1 for two empty texts.
    """
    a, b = Counter(words(answer)), Counter(words(reference))
    if not a or not b:
        return float(a == b)
    common = (a & b).total()
    return 2 * common / (a.total() + b.total())


@lru_cache
def rouge_scorer():
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise UnavailableError(f'ROUGE needs rouge-score: {INSTALL}') from None

    class Words:
        tokenize = staticmethod(words)  # its own tokenizer drops all that is not ASCII

    return RougeScorer(['rouge1', 'rouge2', 'rougeL'], tokenizer=Words())


def rouge(answer: str, reference: str) -> dict[str, float]:
    """
    Return the F-measures of ROUGE-1, ROUGE-2 and ROUGE-L.

    1 for two texts that are the same words, even when they are too short for a pair.
    """
    if words(answer) == words(reference):
        return dict(rouge1=1.0, rouge2=1.0, rougeL=1.0)
    scores = rouge_scorer().score(reference, answer)
    return {name: score.fmeasure for name, score in scores.items()}


def scores(answers: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Return the mean of every metric over pairs of texts, in [0, 1]."""
    assert len(answers) == len(references) > 0, 'nothing to score'
    total = dict.fromkeys(METRICS, 0.0)
    for answer, reference in zip(answers, references):
        found = rouge(answer, reference)
        found['exact_match'] = exact_match(answer, reference)
        found['token_f1'] = token_f1(answer, reference)
        for name in METRICS:
            total[name] += found[name]
    return {name: total[name] / len(answers) for name in METRICS}


def predicted(likeliest: Sequence[int], targets: Sequence[int]) -> tuple[list[int], list[int]]:
    """
    Return predicted ids and true ids of one document of `likeliest` and `targets`, both (T,).

    The model's choice at position t is for the token at t + 1, which is targets[t]. Positions with
    target -1 do not count.
    """
    predicted_ids, true_ids = [], []
    for choice, target in zip(likeliest, targets):
        if target >= 0:
            predicted_ids.append(int(choice))
            true_ids.append(int(target))
    return predicted_ids, true_ids
