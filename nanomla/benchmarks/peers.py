"""
Other people's GPT-2, measured in the same process: a checkout of nanoGPT and transformers' GPT2LMHeadModel.
Both get the shape of ours and random weights, and each the arithmetic that its own users get.
"""

import contextlib
import importlib.util
import sys
from pathlib import Path

import torch

from nanomla.core.configurator import UserError

# How each one's own sampling goes, so that ours can do the same: sample.py of nanoGPT, greedy search of transformers.
SAMPLING = {'nanoGPT': dict(temperature=0.8, top_k=200), 'transformers': dict(temperature=0.0)}


def nanogpt(folder, config, vocab_size, device):
    """The GPT of a nanoGPT checkout, in the shape that `config` (train.py's settings) describes."""
    spec = importlib.util.spec_from_file_location('peer_model', Path(folder) / 'model.py')
    theirs = importlib.util.module_from_spec(spec)
    sys.modules['peer_model'] = theirs  # its dataclass looks itself up there
    with contextlib.redirect_stdout(None):
        spec.loader.exec_module(theirs)
        shape = {
            key: config[key]
            for key in ('block_size', 'n_layer', 'n_head', 'n_embd', 'dropout', 'bias')
        }
        return theirs.GPT(theirs.GPTConfig(vocab_size=vocab_size, **shape)).to(device)


def transformers_gpt2(config, vocab_size, device, dtype):
    """transformers' GPT-2 in that shape, in `dtype`. UserError when transformers is not installed."""
    try:
        from transformers import GPT2Config, GPT2LMHeadModel
    except ImportError:
        raise UserError(
            '--peer=transformers needs transformers, which is not installed: pip install transformers'
        ) from None
    shape = GPT2Config(
        vocab_size=vocab_size,
        n_positions=config['block_size'],
        n_layer=config['n_layer'],
        n_head=config['n_head'],
        n_embd=config['n_embd'],
        bos_token_id=None,
        eos_token_id=None,
    )  # nothing ends a text early
    model = GPT2LMHeadModel(shape).to(device, dtype)
    model.generation_config.pad_token_id = 0
    return model


def check(names, *known):
    """UserError for one of --peer that is neither among `known` nor a folder with nanoGPT's model.py."""
    for name in names:
        if name not in known and not Path(name, 'model.py').exists():
            raise UserError(f'--peer={name} is no checkout of nanoGPT: it has no model.py')


def generator(name, config, vocab_size, device, dtype):
    """
    (who, generate) of one --peer: generate(idx, n) continues idx (B, T) by exactly n tokens and returns (B, T + n).

    nanoGPT keeps fp32 weights and runs under autocast on a GPU, with the temperature and top_k of its sample.py;
    transformers runs in `dtype` with its cache and greedily.
    """
    if name == 'transformers':
        model = transformers_gpt2(config, vocab_size, device, dtype).eval()

        def generate(idx, n):
            with torch.no_grad():
                return model.generate(
                    idx,
                    attention_mask=torch.ones_like(idx),
                    max_new_tokens=n,
                    do_sample=False,
                    use_cache=True,
                )

        return 'transformers', generate
    model = nanogpt(name, config, vocab_size, device).eval()

    def generate(idx, n):
        half = (
            torch.amp.autocast(device.type, dtype)
            if device.type == 'cuda'
            else contextlib.nullcontext()
        )
        with torch.no_grad(), half:
            return model.generate(idx, n, **SAMPLING['nanoGPT'])

    return 'nanoGPT', generate
