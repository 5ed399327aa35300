"""Which heads move a name, against the logits of the model."""

from types import SimpleNamespace

import pytest
import torch
from kinds import shape_of

from nanomla.core.configurator import UserError
from nanomla.heads import ioi
from nanomla.heads.ablation import edit_outputs
from nanomla.heads.patterns import watch_patterns


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
        attention, changes = OTHERS.get(kind) or shape_of(kind)
        changes = dict(mlp=False, bias=False, tie_weights=False) | changes
        vocab_size = len(codec.ids) + 1
        model = tiny(attention, kernel='eager', vocab_size=vocab_size, **changes)
        if model.config.mlp:
            for block in model.transformer.h:
                block.post_2.weight.data.zero_()  # the MLP writes nothing
        return prompts, model

    return make


def test_a_prompt_names_the_subject_twice(prompts_and_model):
    prompts, _ = prompts_and_model('mha')
    for prompt in prompts:
        assert prompt.ids[prompt.position] == prompt.io
        assert prompt.ids.count(prompt.io) == 1
        assert prompt.ids.count(prompt.s) == 2


# Attentions whose heads do more than sum values, or whose outputs are normed.
OTHERS = {
    'gated': ('gated', {}),
    'gated_mla': ('gated_mla', {}),
    'post_norm': ('qk_gain', dict(post_norm=True, mlp=True)),
    'post_layernorm': ('qk_gain', dict(post_norm=True, mlp=True, norm='layernorm')),
}


@pytest.mark.parametrize('kind', ['mha', 'gqa', 'mla', 'rope', *OTHERS])
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
    full, norm = last_stream(model, ids), model.transformer.ln_f
    centre = 0 if norm.rms else 1
    length = (full - centre * full.mean()).square().mean().add(1e-5).sqrt()
    w_u = model.lm_head.weight[prompt.io] - model.lm_head.weight[prompt.s]
    return ((x - centre * x.mean()) @ (w_u * norm.weight) / length).item()


@pytest.mark.parametrize('kind', ['mha', 'gqa', 'mla', *OTHERS])
def test_a_head_copies_what_it_writes_when_it_attends_to_the_name_alone(
    kind, prompts_and_model, monkeypatch
):
    """By its own layer, run with that pattern and with no other head."""
    monkeypatch.setattr(ioi, 'TOP', 15)  # of about sixty words, so that some heads copy
    prompts, model = prompts_and_model(kind)
    prompts = [prompt for prompt in prompts if len(prompt.ids) == len(prompts[0].ids)]
    _, heads = ioi.measure(model, prompts)
    layer = len(model.transformer.h) - 1
    block = model.transformer.h[layer]
    inputs, expected = [], []
    hook = block.register_forward_pre_hook(lambda module, given: inputs.append(given))
    model.hidden(torch.tensor([prompt.ids for prompt in prompts]))
    hook.remove()
    x, rope = inputs[0][:2]
    for head in range(block.attn.n_head):

        def see(_, pattern):
            pattern = torch.zeros_like(pattern)
            for row, prompt in zip(pattern, prompts):
                row[:, -1, prompt.position] = 1
            return pattern

        def this_head(_, y, head=head):
            alone = torch.zeros_like(y)
            alone[:, :, head] = y[:, :, head]
            return alone

        with watch_patterns(model, see), edit_outputs(model, this_head):
            written = (block(x, rope) - x)[:, -1]
        logits = model.lm_head(model.transformer.ln_f(written))
        likeliest = logits.topk(ioi.TOP).indices.tolist()
        hits = [prompt.io in top for prompt, top in zip(prompts, likeliest)]
        expected.append(sum(hits) / len(hits))
    measured = [head['copying'] for head in heads if head['layer'] == layer]
    assert measured == pytest.approx(expected, abs=1e-4)
    assert any(expected)


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
