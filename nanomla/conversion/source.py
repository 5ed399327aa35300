"""
The source of a conversion: a GPT whose attentions have plain query, key and value matrices, or an
MLA model without norms of its latents, as a conversion makes them, whose rank is to be reduced.
"""

import torch
import torch.nn as nn

from attentions.qk_gain import QKGainConfig
from model import GPT, GPTConfig, MultiHeadAttention
from model_mla import GPT_MLA, MLAConfig, MultiHeadLatentAttention
from nanomla.core.configurator import UserError


def check_source(model: GPT) -> None:
    """
    Raise a UserError unless `model` can be converted: MHA, GQA, MQA, or MLA that was converted from
    them, without QK-norm.

    Its class and that of its attentions have to be model.py's own. A subclass may do more with
    these matrices than they say (a gate on the output, for instance), and its conversion would be
    another model.
    """
    if model.config.qk_norm or isinstance(model.config, QKGainConfig):
        raise UserError(
            'the source has QK-norm, which cannot pass through a latent: its keys would have to be '
            'normed after W^UK, by a factor that each key/value head would have to cache beside it'
        )
    if has_latent(model.config) and not is_converted(model.config):
        raise UserError(
            'the source is an MLA model already, and no converted one, whose rank could be '
            'reduced: convert one with MHA, GQA or MQA'
        )
    attention, whole = MultiHeadAttention, GPT
    if has_latent(model.config):
        attention, whole = MultiHeadLatentAttention, GPT_MLA
    for block in model.transformer.h:
        if type(block.attn) is not attention:
            raise UserError(
                f'the source has the attention {type(block.attn).__name__}, which cannot be '
                'converted: only MHA, GQA and MQA as in model.py are made of plain query, key and '
                'value matrices'
            )
    if type(model) is not whole:
        raise UserError(
            f'the source is a {type(model).__name__}, which may compute something of its own: only '
            'a GPT as in model.py can be converted'
        )


def has_latent(config: GPTConfig) -> bool:
    """Return whether a source is MLA, of which a conversion cuts the latent alone."""
    return isinstance(config, MLAConfig)


def is_converted(config: MLAConfig) -> bool:
    """Return whether keys and values are linear in what goes in, as a conversion leaves them."""
    return config.source_head_dim > 0 and not config.latent_norm


def layer_weights(attention: MultiHeadAttention, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """
    Return the matrices W̃ = [W | b] of one layer in `dtype`.

    Queries (H, D, C + 1), keys and values (K, D, C + 1); b is zero where there are no biases.
    """
    parts = with_bias(attention.c_attn, dtype).split(attention.widths)
    return tuple(part.unflatten(0, (-1, attention.v_dim)) for part in parts)


def with_bias(linear: nn.Linear, dtype: torch.dtype) -> torch.Tensor:
    """Return [W | b] of a Linear, (out, in + 1); b is zero where it has none."""
    weight = linear.weight.detach().to(dtype)
    bias = weight.new_zeros(len(weight))
    if linear.bias is not None:
        bias = linear.bias.detach().to(dtype)
    return torch.cat([weight, bias[:, None]], dim=1)
