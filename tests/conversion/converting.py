"""What the tests of a conversion share: tiny sources, and converting them in one call."""

import pytest
import torch

from nanomla.conversion.convert import convert
from nanomla.conversion.settings import ConversionSettings
from nanomla.core.configurator import UserError

LLAMA = dict(bias=False, pos='rope', norm='rmsnorm', act='swiglu', n_inner=44, norm_eps=1e-5)
SOURCES = dict(
    gpt2=dict(act='gelu_tanh'),
    nanogpt=dict(bias=False),
    mha=LLAMA,
    gqa=LLAMA | dict(n_kv_head=2, rope_scaling=4.0),
    mqa=LLAMA | dict(n_kv_head=1, head_dim=12),
    biases=LLAMA | dict(bias=True, n_kv_head=2, tie_weights=False),
    nope=LLAMA | dict(pos='none', bias=True),
)


def converted(model, moments=None, **settings):
    """Convert `model` with the settings by name; return the MLA model and the report by layer."""
    return convert(model, ConversionSettings(**settings), moments)


def assert_same_logits(a, b, idx, atol=1e-5):
    torch.testing.assert_close(a(idx), b(idx), rtol=0, atol=atol)


def assert_refused(match, call, *args, **more):
    """Assert that call(...) raises a UserError of one line."""
    with pytest.raises(UserError, match=match) as error:
        call(*args, **more)
    assert '\n' not in str(error.value)
