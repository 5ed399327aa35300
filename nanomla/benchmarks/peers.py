"""
Other people's GPT-2, measured in the same process: a checkout of nanoGPT, and transformers'
GPT2LMHeadModel. Both get the shape of ours and random weights, and each the arithmetic that its own
users get.
"""

import contextlib
import importlib.util
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from nanomla.core.configurator import UserError

# The sampling of each one's own users, so that ours can do the same: nanoGPT's sample.py, and the
# greedy search of transformers.
SAMPLING = {'nanoGPT': dict(temperature=0.8, top_k=200), 'transformers': dict(temperature=0.0)}

NANOGPT_SHAPE = ('block_size', 'n_layer', 'n_head', 'n_embd', 'dropout', 'bias')


def check(name: str) -> None:
    """Raise a UserError unless there is a nanoGPT checkout in the folder `name`."""
    if not Path(name, 'model.py').exists():
        raise UserError(f'--peer={name} is no checkout of nanoGPT: it has no model.py')


def nanogpt(folder: str, settings: Mapping, vocab_size: int, device: torch.device):
    """Return the GPT of a nanoGPT checkout in the shape that train.py's settings describe."""
    spec = importlib.util.spec_from_file_location('peer_model', Path(folder) / 'model.py')
    module = importlib.util.module_from_spec(spec)
    sys.modules['peer_model'] = module  # its dataclass looks itself up there
    shape = {key: settings[key] for key in NANOGPT_SHAPE}
    with contextlib.redirect_stdout(None):  # it prints while it is made
        spec.loader.exec_module(module)
        model = module.GPT(module.GPTConfig(vocab_size=vocab_size, **shape))
    return model.to(device)


def transformers_gpt2(settings: Mapping, vocab_size: int, device: torch.device, dtype: torch.dtype):
    """Return transformers' GPT-2 in that shape. UserError when transformers is not installed."""
    try:
        from transformers import GPT2Config, GPT2LMHeadModel
    except ImportError:
        raise UserError(
            '--peer=transformers needs transformers, which is not installed: '
            'pip install transformers'
        ) from None
    shape = GPT2Config(
        vocab_size=vocab_size,
        n_positions=settings['block_size'],
        n_layer=settings['n_layer'],
        n_head=settings['n_head'],
        n_embd=settings['n_embd'],
        bos_token_id=None,
        eos_token_id=None,  # nothing ends a text early
    )
    model = GPT2LMHeadModel(shape).to(device, dtype)
    model.generation_config.pad_token_id = 0
    return model


def autocast(device: torch.device, dtype: torch.dtype):
    """Return the context that nanoGPT's scripts run a model in: autocast on a GPU, else nothing."""
    if device.type == 'cuda':
        return torch.amp.autocast(device.type, dtype)
    return contextlib.nullcontext()


def generator(
    name: str, settings: Mapping, vocab_size: int, device: torch.device, dtype: torch.dtype
) -> tuple[str, Callable]:
    """
    Return the name of one of --peer and its generate(idx, n), which continues idx (B, T) by exactly
    n tokens and returns (B, T + n).

    nanoGPT keeps fp32 weights and runs under autocast on a GPU, with the temperature and top_k of
    its sample.py; transformers runs in `dtype` with its cache and greedily.
    """
    if name == 'transformers':
        model = transformers_gpt2(settings, vocab_size, device, dtype).eval()

        @torch.no_grad()
        def generate(idx, n):
            return model.generate(
                idx,
                attention_mask=torch.ones_like(idx),
                max_new_tokens=n,
                do_sample=False,
                use_cache=True,
            )

        return 'transformers', generate

    model = nanogpt(name, settings, vocab_size, device).eval()

    @torch.no_grad()
    def generate(idx, n):
        with autocast(device, dtype):
            return model.generate(idx, n, **SAMPLING['nanoGPT'])

    return 'nanoGPT', generate
