"""Which heads move a name, against the logits of the model."""

from types import SimpleNamespace

import pytest
import torch
from kinds import shape_of

from nanomla.core.configurator import UserError
from nanomla.heads import ioi


class Words:
    """A tokenizer with a token a word, blank included."""

    def __init__(self):
        self.ids = {}

    def encode(self, text):
        words = text.replace(',', ' ,').replace('.', ' .').split()
        return [self.ids.setdefault(word, len(self.ids) + 1) for word in words]


def last_stream(model, ids):
    """Return the residual stream (C,) of the last token before the last norm."""
    seen = []

    def read(module, given):
        seen.append(given[0][0, -1])

    hook = model.transformer.ln_f.register_forward_pre_hook(read)
    model.hidden(ids)
    hook.remove()
    return seen[0]


@pytest.fixture
def prompts_and_model(tiny):
    """prompts_and_model(kind) -> prompts, and a model of attention alone that knows their words."""

    def make(kind):
        codec = Words()
        prompts = ioi.make_prompts(codec, 0, pairs=2)
        attention, changes = shape_of(kind)
        changes = changes | dict(mlp=False, bias=False, tie_weights=False)
        vocab_size = len(codec.ids) + 1
        return prompts, tiny(attention, kernel='eager', vocab_size=vocab_size, **changes)

    return make


def test_a_prompt_names_the_subject_twice(prompts_and_model):
    prompts, _ = prompts_and_model('mha')
    for prompt in prompts:
        assert prompt.ids[prompt.position] == prompt.io
        assert prompt.ids.count(prompt.io) == 1
        assert prompt.ids.count(prompt.s) == 2


@pytest.mark.parametrize('kind', ['mha', 'gqa', 'mla', 'rope'])
def test_what_heads_move_adds_up_to_the_answer(kind, prompts_and_model):
    prompts, model = prompts_and_model(kind)
    answers, heads = ioi.measure(model, prompts)
    moved = sum(head['moved'] for head in heads)
    direct = sum(embedding_part(model, prompt) for prompt in prompts) / len(prompts)
    assert moved + direct == pytest.approx(answers['logit_difference'], abs=2e-3)


def embedding_part(model, prompt):
    """Return how far the last token's own embedding lifts the name above the subject."""
    ids = torch.tensor([prompt.ids])
    x = model.embed(ids)[0][0, -1]
    full = last_stream(model, ids)
    length = (full - full.mean()).square().mean().add(1e-5).sqrt()
    w_u = model.lm_head.weight[prompt.io] - model.lm_head.weight[prompt.s]
    return ((x - x.mean()) @ (w_u * model.transformer.ln_f.weight) / length).item()


def test_shares_lie_between_0_and_1(prompts_and_model):
    prompts, model = prompts_and_model('mha')
    answers, heads = ioi.measure(model, prompts)
    assert 0 <= answers['accuracy'] <= 1
    for head in heads:
        assert 0 <= head['copying'] <= 1
        assert 0 <= head['attention'] <= 1


def test_names_of_several_tokens_are_refused():
    codec = SimpleNamespace(encode=lambda text: [1, 2])
    with pytest.raises(UserError, match='single tokens'):
        ioi.make_prompts(codec, 0)
