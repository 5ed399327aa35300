"""
How near an answer comes to its reference: exact match and token F1 as SQuAD defines them (Rajpurkar et al. 2016,
section 6.1; here articles are words like any other), ROUGE-1/2/L (Lin 2004) by the rouge-score package.

A prediction of the next token stands one place before the token that it predicts. `predicted` shifts it there: without
the shift a model that only repeats its input would score 1.
"""

import re
from collections import Counter
from functools import lru_cache

from nanomla.core.configurator import UserError

METRICS = ('exact_match', 'token_f1', 'rouge1', 'rouge2', 'rougeL')


def words(text):
    return re.findall(r'\w+|[^\w\s]', text.lower())


def exact_match(answer, reference):
    """1.0 when both are the same words and signs, whatever the case and the white space; else 0.0."""
    return float(words(answer) == words(reference))


def token_f1(answer, reference):
    """Harmonic mean of precision and recall over words and signs, each counted as often as it stands there; 1 for two empty texts."""
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
        raise UserError(
            'ROUGE needs rouge-score: pip install -e .[adapters]'
        ) from None

    class Words:
        tokenize = staticmethod(words)  # its own tokenizer drops all that is not ASCII

    return RougeScorer(['rouge1', 'rouge2', 'rougeL'], tokenizer=Words())


def rouge(answer, reference):
    """F-measures of ROUGE-1, ROUGE-2 and ROUGE-L; 1 for two texts that are the same words, even when they are too short for a pair."""
    if words(answer) == words(reference):
        return dict(rouge1=1.0, rouge2=1.0, rougeL=1.0)
    return {name: score.fmeasure for name, score in rouge_scorer().score(reference, answer).items()}


def scores(answers, references):
    """The mean of every metric over pairs of texts, in [0, 1]."""
    assert len(answers) == len(references) > 0
    rows = [
        dict(exact_match=exact_match(a, r), token_f1=token_f1(a, r)) | rouge(a, r)
        for a, r in zip(answers, references)
    ]
    return {name: sum(row[name] for row in rows) / len(rows) for name in METRICS}


def predicted(likeliest, targets):
    """
    (predicted ids, true ids) of one document from `likeliest` and `targets`, both (T,): the model's choice at place t is
    for the token at t + 1, which is targets[t]; places with target -1 do not count.
    """
    pairs = [(int(a), int(t)) for a, t in zip(likeliest, targets) if t >= 0]
    return [a for a, _ in pairs], [t for _, t in pairs]
