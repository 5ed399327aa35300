"""
MHA, GQA or MQA with an output gate.

Qiu et al., "Gated Attention for Large Language Models" (2025), eq. 5, elementwise and by head: what
a head has gathered is scaled by what its own token says,

    o_h = sigmoid(W^G_h x) ⊙ softmax(q_h K^T / sqrt(D)) V

so that a head can also write nothing, for which softmax alone has to look at some token. The cache
is that of MHA.

Legend: as in model.py.
"""

from dataclasses import dataclass

import torch

from model import GPT, Context, GPTConfig, Linear, MultiHeadAttention


@dataclass
class GatedConfig(GPTConfig):
    @property
    def label(self) -> str:
        return f'Gated {super().label}'


class GatedAttention(MultiHeadAttention):
    scale_logits = MultiHeadAttention.scale_logits

    def __init__(self, config: GatedConfig, layer: int = 0):
        super().__init__(config, layer)
        self.gate = Linear(config.n_embd, config.n_head * self.v_dim, bias=config.bias)  # W^G
        self.gate.weight.heads = [config.n_head]

    def forward(self, x, rope, context: Context | None = None):
        q, k, v = self.qkv(x, rope)
        if context is None:
            y = self.attend(q, k, v)
        else:
            y = context.attend(self, q, k, v)
        gate = torch.sigmoid(self.gate(x)).unflatten(-1, (self.n_head, self.v_dim))
        return self.output(y * gate.transpose(1, 2))


class GPT_Gated(GPT):
    Config, Attention = GatedConfig, GatedAttention
