"""
MHA, GQA or MQA with an output gate.

Qiu et al., "Gated Attention for Large Language Models" (2025), eq. 5, elementwise and by head: the
output of a head is multiplied by a gate that the query's own token computes,

    o_h = sigmoid(W^G_h x) ⊙ softmax(q_h K^T / sqrt(D)) V

so that a head can write nothing. Without a gate it needs a token whose value is small to attend to
instead (an attention sink). The cache is that of MHA.

Legend: as in model.py.
"""

from dataclasses import dataclass

from model import GPT, Context, GPTConfig, Linear, MultiHeadAttention


class OutputGate:
    """A mixin that gates the heads of any attention: class Gated(OutputGate, AnAttention)."""

    def __init__(self, config: GPTConfig, layer: int = 0):
        super().__init__(config, layer)
        self.gate = Linear(config.n_embd, config.n_head * self.v_dim, bias=config.bias)  # W^G
        self.gate.weight.heads = [config.n_head]

    def head_outputs(self, x, rope, context: Context | None = None):
        y = super().head_outputs(x, rope, context)  # (B, H, T, D)
        gate = self.gate(x).sigmoid().unflatten(-1, (self.n_head, self.v_dim))
        return y * gate.transpose(1, 2)

    def fused_step(self, x, norm, rope, cache, ops):
        if len(x) > 1:  # several sequences: norm once for all products
            x, norm = ops.norm_rows(x, norm), None
        y = super().fused_step(x, norm, rope, cache, ops)  # (B, H, D)
        gate = ops.fused_linear(x, self.gate.weight, self.gate.bias, norm)
        return y * gate.sigmoid().view_as(y)


@dataclass
class GatedConfig(GPTConfig):
    @property
    def label(self) -> str:
        return f'Gated {super().label}'


class GatedAttention(OutputGate, MultiHeadAttention):
    fused_step = OutputGate.fused_step
    scale_logits = MultiHeadAttention.scale_logits


class GPT_Gated(GPT):
    Config, Attention = GatedConfig, GatedAttention
