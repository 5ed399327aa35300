"""The largest attention logits and QK-Clip: against plain arithmetic in float64, head by head."""

import pytest
import torch
from helpers import TEXT, TINY

from attentions import MODELS
from model import GPT, Attention, GPTConfig, MultiHeadAttention
from nanomla.checkpoints.native import new_model
from nanomla.core.configurator import UserError, configure
from nanomla.core.token_files import write_text
from nanomla.training import stability
from nanomla.training.batches import Dataset
from nanomla.training.stability import LogitRecord, check_qk_clip, clip_logits
from nanomla.training.trainer import Trainer

KINDS = {
    'mha': ('mha', dict(pos='rope')),
    'gqa': ('mha', dict(pos='rope', n_kv_head=2)),
    'mla': ('mla', dict(qk_nope_head_dim=6, v_head_dim=7)),
    'mla_q_lora': ('mla', dict(q_lora_rank=10)),
    'mla_absorbed': ('mla', dict(absorb=True)),
} | {name: (name, {}) for name in MODELS if name not in ('mha', 'mla', 'moe')}  # moe has MLA's
CLIPPED = [name for name, (kind, _) in KINDS.items() if MODELS[kind].Attention.scale_logits]


@pytest.fixture
def one_layer(tiny):
    """one_layer(name) -> a model of one layer in float64, so that its input never changes."""

    def make(name):
        kind, settings = KINDS[name]
        model = tiny(kind, n_layer=1, **settings).double()
        model.stream = torch.float64
        return model

    return make


def logits_of(attention, q, k):
    """The logits (B, H, T, T) that q (B, H, T, D) and k (B, K, T, D) give, -inf in the future."""
    k = k.repeat_interleave(q.size(1) // k.size(1), dim=1)
    logits = torch.einsum('bhtd,bhsd->bhts', q, k) * attention.scale
    future = torch.ones(q.size(2), q.size(2)).triu(1).bool()
    return logits.masked_fill(future, -torch.inf)


def attention_input(model, idx):
    x, rope = model.embed(idx)
    return model.transformer.h[0].ln_1(x), rope


# -------------------------------------------------------------------------------------------------
# the largest logits


@pytest.mark.parametrize('name', KINDS)
@torch.no_grad()
def test_the_largest_logit_of_every_head_is_found(name, one_layer, tokens, monkeypatch):
    monkeypatch.setattr(stability, 'CHUNK', 7)
    model, idx = one_layer(name), tokens(20)
    largest = LogitRecord(model, '--log_max_logits=True').measured(idx)
    attention = model.transformer.h[0].attn
    q, k, _ = attention.qkv(*attention_input(model, idx))
    expected = logits_of(attention, q, k).amax(dim=(0, 2, 3))
    torch.testing.assert_close(largest[0].double(), expected, rtol=1e-6, atol=0)


@torch.no_grad()
def test_what_a_query_does_not_see_does_not_count(monkeypatch):
    monkeypatch.setattr(stability, 'CHUNK', 4)
    torch.manual_seed(0)
    q, k = torch.randn(2, 4, 6, 8), torch.randn(2, 2, 9, 8)
    mask = torch.rand(2, 1, 6, 9) < 0.4
    logits = torch.einsum('bhtd,bhsd->bhts', q, k.repeat_interleave(2, dim=1))
    expected = logits.masked_fill(~mask, -torch.inf).amax(dim=(0, 2, 3))
    torch.testing.assert_close(stability.largest_logits(q, k, mask), expected)


def test_a_record_begins_anew_and_ends(tiny, tokens):
    model = tiny('mha')
    record = LogitRecord(model, '--x')
    with record.recording():
        model(tokens(20) * 0)
        few = record.largest()
        model(tokens(20))
        model(tokens(20) * 0)
        more = record.largest()
    assert (more > few).any() and (more >= few).all()
    model(tokens(20) * 0)  # no longer recorded
    assert torch.equal(record.largest(), more)
    with record.recording():
        model(tokens(20) * 0)
    assert torch.equal(record.largest(), few)


def test_an_attention_that_cannot_tell_is_refused_by_name(tiny):
    class LinearAttention(MultiHeadAttention):
        def attend(self, q, k, v, mask=None):
            return v

    class LinearGPT(GPT):
        Attention = LinearAttention

    class TwoMaps(Attention):
        """Two maps of attention a head."""

        def __init__(self, config, layer=0):
            super().__init__(config, 8, 8)

        def qkv(self, x, rope):
            q = torch.zeros(len(x), 2 * self.n_head, x.size(1), 8)
            return q, q, q

        def output(self, y):
            return super().output(y[:, : self.n_head])

    class TwoMapsGPT(GPT):
        Attention = TwoMaps

    for model_class, name in [(LinearGPT, 'LinearAttention'), (TwoMapsGPT, 'TwoMaps')]:
        model = model_class(GPTConfig(n_layer=2, n_head=2, n_embd=16, vocab_size=8))
        with pytest.raises(UserError, match=f'^--log_max_logits=True needs .*{name} does not'):
            LogitRecord(model, '--log_max_logits=True')


# -------------------------------------------------------------------------------------------------
# QK-Clip


def clipped(model, idx):
    """Clip at the second smallest logit; return which heads were, the logits before and after."""
    record = LogitRecord(model, '--qk_clip')
    before = record.measured(idx)
    tau = before[0].sort().values[1].item()
    clip_logits(model, before, tau)
    over = before[0] > tau
    assert over.sum() == 2
    return over, before[0], record.measured(idx)[0], tau


@pytest.mark.parametrize('name', CLIPPED)
@torch.no_grad()
def test_clipped_heads_end_at_tau_and_the_others_where_they_were(name, one_layer, tokens):
    model, idx = one_layer(name), tokens(20)
    attention = model.transformer.h[0].attn
    x, rope = attention_input(model, idx)
    q, k, v = attention.qkv(x, rope)
    over, before, after, tau = clipped(model, idx)
    new_q, new_k, new_v = attention.qkv(x, rope)
    assert (after[over] / tau - 1).abs().max() < 1e-6
    assert torch.equal(after[~over], before[~over])
    # every logit of a clipped head is scaled, not the largest alone
    factors = torch.where(over, tau / before.double(), 1.0)[:, None, None]
    expected = logits_of(attention, q, k) * factors
    torch.testing.assert_close(logits_of(attention, new_q, new_k), expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(new_q[:, ~over], q[:, ~over])
    assert torch.equal(new_v, v)


# attention -> the parts of its weights, with how a clipped head's rows of each are scaled: by the
# factor to this power. heads: how many share the rows of a part.
RULES = {
    'mha': {'c_attn': [('q', 8, 0.5), ('k', 8, 0.5), ('v', 8, 0)]},
    'gqa': {'c_attn': [('q', 8, 1), ('k', 4, 0), ('v', 4, 0)]},
    'mla': {
        'q_proj': [('W^UQ', 6, 0.5), ('W^QR', 4, 1)],
        'kv_a_proj_with_mqa': [('W^DKV', 3, 0), ('W^KR', 1, 0)],
        'kv_b_proj': [('W^UK', 6, 0.5), ('W^UV', 7, 0)],
    },
    'mla_q_lora': {
        'q_b_proj': [('W^UQ', 4, 0.5), ('W^QR', 4, 1)],
        'kv_a_proj_with_mqa': [('W^DKV', 3, 0), ('W^KR', 1, 0)],
        'kv_b_proj': [('W^UK', 4, 0.5), ('W^UV', 8, 0)],
    },
}


@pytest.mark.parametrize('name', RULES)
@torch.no_grad()
def test_weights_are_scaled_as_the_report_says(name, one_layer, tokens):
    """Rows stand symbol by symbol, and in a symbol head by head (a quarter of them is a head)."""
    model, idx = one_layer(name), tokens(20)
    old = {key: p.clone() for key, p in model.named_parameters()}
    over, before, _, tau = clipped(model, idx)
    expected = dict(old)
    for layer, symbols in RULES[name].items():
        for end in ('weight', 'bias'):
            key = f'transformer.h.0.attn.{layer}.{end}'
            if key not in old:
                continue
            scaled, row = old[key].clone(), 0
            for _, width, power in symbols:
                for h in range(4):
                    if over[h]:
                        scaled[row : row + width] *= (tau / before[h].double()) ** power
                    row += width
            assert row == len(scaled)
            expected[key] = scaled
    for key, p in model.named_parameters():
        torch.testing.assert_close(p.data, expected[key], rtol=1e-6, atol=0, msg=key)


@torch.no_grad()
def test_logits_that_are_no_numbers_clip_nothing(tiny):
    model = tiny('mha', n_layer=1)
    before = [p.clone() for p in model.parameters()]
    clip_logits(model, torch.tensor([[torch.inf, torch.nan, -torch.inf, 0.0]]), 1.0)
    for p, old in zip(model.parameters(), before):
        assert torch.equal(p, old)


def test_where_it_cannot_be_it_is_refused_by_name(tiny):
    for kind, settings, message in [
        ('mla', dict(qk_norm=True), 'does not go with qk_norm=True'),
        ('qk_gain', {}, 'QKGainAttention .* has no scale_logits'),
    ]:
        with pytest.raises(UserError, match=f'^--qk_clip=100 .*{message}'):
            check_qk_clip(tiny(kind, **settings), '--qk_clip=100')


# -------------------------------------------------------------------------------------------------
# in a trainer


@pytest.fixture
def trainer(tmp_path):
    """trainer(**settings) -> a Trainer of a tiny model on a tiny text; the same each time."""
    write_text(tmp_path / 'text', TEXT, 'char', 'A tale of a cat')
    tiny = TINY | dict(pos='rope', gradient_accumulation_steps=3, dropout=0.1, warmup_iters=0)

    def make(**settings):
        words = [f'--{key}={value}' for key, value in (tiny | settings).items()]
        config = configure(dict(__file__='train.py'), words)
        torch.manual_seed(0)
        data = Dataset(tmp_path / 'text', config['block_size'], 1)
        model = new_model(config['attention'], config, config.given, data.meta['vocab_size'])
        return Trainer(config, model.train(), data)

    return make


@pytest.mark.parametrize('optimizer', ['adamw', 'muon'])
def test_a_step_is_the_plain_one_and_then_the_clip(optimizer, trainer):
    """Of the logits of all its micro-batches, by the weights that they were computed with."""
    shape = dict(optimizer=optimizer, n_layer=1, dropout=0.0)
    plain, clipping = trainer(**shape), trainer(qk_clip=1e-3, **shape)
    record = LogitRecord(plain.model, '--x')
    batches = [plain.data.train_batch(0, micro, 4)[0] for micro in range(3)]
    largest = torch.stack([record.measured(idx) for idx in batches]).amax(0)
    assert (largest > 1e-3).all()
    plain.update(0)
    clip_logits(plain.model, largest, 1e-3)
    clipping.update(0)
    torch.testing.assert_close(clipping.largest_logits(0), largest)
    for one, other in zip(plain.model.parameters(), clipping.model.parameters()):
        torch.testing.assert_close(one, other)


def test_looking_changes_no_bit_nor_does_a_threshold_that_nothing_reaches(trainer):
    plain, watched, clipping = trainer(), trainer(log_max_logits=True), trainer(qk_clip=1e9)
    for step in range(2):
        loss = plain.update(step)
        for other in (watched, clipping):
            assert torch.equal(other.update(step), loss)
            assert other.largest_logits(step).shape == (2, 2)
            assert other.model.training
    for other in (watched, clipping):
        for one, two in zip(plain.model.parameters(), other.model.parameters()):
            assert torch.equal(one, two)


@pytest.mark.slow
def test_one_compiled_block_tells_the_logits_of_all(trainer):
    settings = dict(qk_clip=0.01, optimizer='muon', dropout=0.0)
    settings |= dict(attention='mla', kv_lora_rank=8, qk_rope_head_dim=4)
    plain, compiled = trainer(**settings), trainer(compile=True, **settings)
    torch._dynamo.utils.counters.clear()
    for step in range(3):
        assert abs(plain.update(step) - compiled.update(step)) < 1e-4
        torch.testing.assert_close(
            plain.largest_logits(step), compiled.largest_logits(step), rtol=1e-3, atol=1e-4
        )
    # embedding, a block, the loss
    assert torch._dynamo.utils.counters['stats']['unique_graphs'] == 3
