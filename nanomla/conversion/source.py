"""The source of a conversion: a GPT whose attentions have plain query, key and value matrices."""

import torch

from attentions.qk_gain import QKGainConfig
from model import GPT, MultiHeadAttention
from model_mla import MLAConfig
from nanomla.core.configurator import UserError


def check_source(model: GPT) -> None:
    """
    Raise a UserError unless `model` can be converted: MHA, GQA or MQA without QK-norm.

    Its class and that of its attentions have to be model.py's own. A subclass may do more with
    these matrices than they say (a gate on the output, for instance), and its conversion would be
    another model.
    """
    if isinstance(model.config, MLAConfig):
        raise UserError('the source is an MLA model already: convert one with MHA, GQA or MQA')
    if model.config.qk_norm or isinstance(model.config, QKGainConfig):
        raise UserError(
            'the source has QK-norm, which cannot pass through a latent: its keys would have to be '
            'normed after W^UK, by a factor that each key/value head would have to cache beside it'
        )
    for block in model.transformer.h:
        if type(block.attn) is not MultiHeadAttention:
            raise UserError(
                f'the source has the attention {type(block.attn).__name__}, which cannot be '
                'converted: only MHA, GQA and MQA as in model.py are made of plain query, key and '
                'value matrices'
            )
    if type(model) is not GPT:
        raise UserError(
            f'the source is a {type(model).__name__}, which may compute something of its own: only '
            'a GPT as in model.py can be converted'
        )


def layer_weights(attention: MultiHeadAttention, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """
    Return the matrices W̃ = [W | b] of one layer in `dtype`.

    Queries (H, D, C + 1), keys and values (K, D, C + 1); b is zero where there are no biases.
    """
    weight = attention.c_attn.weight.detach().to(dtype)
    if attention.c_attn.bias is None:
        bias = weight.new_zeros(len(weight))
    else:
        bias = attention.c_attn.bias.detach().to(dtype)
    parts = torch.cat([weight, bias[:, None]], dim=1).split(attention.widths)
    return tuple(part.unflatten(0, (-1, attention.v_dim)) for part in parts)
