"""The sample that a comparison writes with each run."""

from nanomla.comparison.results import write_sample
from nanomla.core.tokenizers import Tokenizer


def test_a_sample_of_a_vocabulary_without_a_newline(tiny):
    model = tiny('mla', vocab_size=3, block_size=16)
    text = write_sample(model, Tokenizer(dict(tokenizer='char', chars='abc')), 8, seed=1)
    assert len(text) == 8 and set(text) <= set('abc')
