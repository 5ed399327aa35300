"""Small models with adapters, and batches for them: what the tests of this folder share."""

import numpy as np
import torch
import torch.nn as nn

from model import GPT, GPTConfig
from nanomla.adapters import lora
from nanomla.adapters.lora import LoraSettings
from nanomla.adapters.packing import Batch

LLAMA = dict(pos='rope', act='swiglu', norm='rmsnorm', bias=False, tie_weights=False)
LENGTHS = [[5, 12, 7], [20, 4]]  # of documents in two rows of 24 tokens
KINDS = dict(  # name -> kind and settings
    mha=('mha', LLAMA | dict(n_embd=64)),
    gqa=('mha', LLAMA | dict(n_embd=64, n_kv_head=2)),
    mla=('mla', LLAMA | dict(n_embd=64, kv_lora_rank=24)),
    gpt2=('mha', dict(n_embd=64)),
)


def make_adapted(tiny, adapter, name='mha', moved=True, **how):
    """
    Return a small model of KINDS with adapters.

    moved: lora_B is no longer zero; how: fields of LoraSettings
    """
    kind, settings = KINDS[name]
    model = tiny(kind, **settings)
    lora.adapt(model, adapter, LoraSettings(**(dict(r=4, alpha=8) | how)))
    if moved:
        move_adapters(model, std=0.1)
    return model


def move_adapters(model, std):
    """Make every lora_B random, which is zero at the start."""
    for name, p in model.named_parameters():
        if 'lora_B' in name:
            nn.init.normal_(p, std=std)


def random_batch(lengths, T=24, V=40, isolated=False, seed=0, device='cpu', flex=False):
    """Return a Batch of random tokens with documents of these lengths."""
    rng = np.random.default_rng(seed)
    shape = (len(lengths), T)
    batch = Batch(rng.integers(0, V, shape), rng.integers(-1, V, shape), lengths, device)
    if isolated:
        batch.separate_documents(flex)
    return batch


def targets_of(batch):
    """Return the number of the batch's targets as a tensor on its device."""
    return torch.tensor(float(batch.counted), device=batch.idx.device)


def llama_on_gpu(adapter, stream, **config):
    """Return a model of three layers in training mode, with adapters that are not zero."""
    torch.manual_seed(0)
    shape = dict(block_size=256, vocab_size=512, n_layer=3, n_head=4, n_embd=512)
    with torch.device('cuda'):
        model = GPT(GPTConfig(**shape, **LLAMA, **config))
    model.stream = stream
    if stream != torch.float32:
        model.to(stream)
    lora.adapt(model, adapter, LoraSettings(r=8))
    move_adapters(model, std=0.05)
    return model.train()


def batch_on_gpu(lengths, **how):
    return random_batch(lengths, T=256, V=512, device='cuda', **how)
