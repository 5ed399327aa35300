"""
MLA with an output gate.

The gate is that of gated.py (Qiu et al. 2025, eq. 5), the attention that of model_mla.py:

    o_h = sigmoid(W^G_h x) ⊙ softmax(scale (q_nope · k_nope + q_pe · k_pe)) V_h

The gate reads the head's own token, which needs no cache, and stands after W^UV, so the cache is
MLA's and absorbed decoding stays as it is. It can silence a head at one token; W^O W^UV, the same
matrix at every token, cannot.

Legend: as in model_mla.py.
"""

from dataclasses import dataclass

from attentions.gated import OutputGate
from model_mla import GPT_MLA, MLAConfig, MultiHeadLatentAttention


@dataclass
class GatedMLAConfig(MLAConfig):
    @property
    def label(self) -> str:
        return f'Gated {super().label}'


class GatedLatentAttention(OutputGate, MultiHeadLatentAttention):
    can_absorb = True
    fused_step = OutputGate.fused_step
    scale_logits = MultiHeadLatentAttention.scale_logits


class GPT_GatedMLA(GPT_MLA):
    Config, Attention = GatedMLAConfig, GatedLatentAttention
