"""What the tests share: two threads, no GPU tests without a GPU, and tiny models whose weights are all random."""

import os
import signal

import pytest
import torch
from hypothesis import settings

from nanomla.checkpoints.native import MODELS

torch.set_num_threads(2)
if (
    signal.getsignal(signal.SIGINT) is signal.SIG_IGN
):  # as in the background of a script: processes that tests interrupt would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)
settings.register_profile(
    'ci', derandomize=True
)  # the same examples each time: a failure there is the change's own
if os.environ.get('CI'):
    settings.load_profile('ci')


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if 'gpu' in item.keywords:
                item.add_marker(pytest.mark.skip(reason='needs a CUDA GPU'))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def signals():
    """A train.py that runs inside a test leaves its handlers; what is ignored here would be ignored by every child, too."""
    before = {
        number: signal.getsignal(number)
        for number in (signal.SIGTERM, signal.SIGINT, getattr(signal, 'SIGUSR1', signal.SIGTERM))
    }
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def tiny():
    """
    tiny(kind, **settings) -> a small model in eval mode. Every weight is random, norms and biases too
    (nothing can hide behind a one or a zero), and large enough that each part moves the logits.
    """

    def make(kind='mha', **settings):
        torch.manual_seed(0)
        model_class = MODELS[kind]
        shape = dict(block_size=24, vocab_size=40, n_layer=2, n_head=4, n_embd=32)
        shape |= dict(kv_lora_rank=12, qk_rope_head_dim=4) if kind == 'mla' else {}
        model = model_class(model_class.Config(**(shape | settings))).eval()
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.normal_(std=p.size(1) ** -0.5 if p.ndim == 2 else 0.2)
                if p.ndim == 1 and name.endswith('weight'):
                    p.add_(1)
        return model

    return make


@pytest.fixture
def tokens():
    """tokens(T, V=40, B=2) -> random ids (B, T)."""
    return lambda T, V=40, B=2: torch.randint(V, (B, T), generator=torch.Generator().manual_seed(T))
