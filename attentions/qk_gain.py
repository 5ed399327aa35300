"""
QK-norm with learned gains, as Qwen3 and OLMo 2 have it: what it changes in model.py.

    q = RoPE(g_q ⊙ rms(W^Q x))     k = RoPE(g_k ⊙ rms(W^K x))

rms divides by the root of the mean square of a head (Qwen3 2025, section 2), or of all heads of
the projection (OLMo 2 2025, section 3.2). OLMo 2 also norms what a branch adds to the residual
stream, and not what it reads: x + norm(attn(x)).

Legend: as in model.py.
"""

from dataclasses import dataclass

import torch.nn as nn

from model import GPT, Block, Context, GPTConfig, MultiHeadAttention, Norm


@dataclass
class QKGainConfig(GPTConfig):
    pos: str = 'rope'
    qk_gain: str = 'head'  # the norm is over: head | layer (all heads of a projection)
    post_norm: bool = False  # norm the output of attention and MLP, not their input

    shape_names = ()

    def __post_init__(self):
        super().__post_init__()
        if self.qk_gain not in ('head', 'layer'):
            raise ValueError(f"qk_gain='{self.qk_gain}' is not known: use head or layer")
        if self.qk_norm:
            raise ValueError('qk_norm=True does not go with learned gains, which are one already')
        if self.post_norm and not self.mlp:
            raise ValueError('post_norm=True needs mlp=True')

    @property
    def label(self) -> str:
        return f'{super().label} with QK gains'


class QKGainAttention(MultiHeadAttention):
    def __init__(self, config: QKGainConfig, layer: int = 0):
        super().__init__(config, layer)
        self.whole = config.qk_gain == 'layer'
        q_width = k_width = config.head_dim
        if self.whole:
            q_width, k_width, _ = self.widths
        self.q_norm = Norm(q_width, config, kind='rmsnorm')
        self.k_norm = Norm(k_width, config, kind='rmsnorm')

    def normed(self, q, k):
        """Norm q (B, T, H, D) and k (B, T, K, D)."""
        if not self.whole:
            return self.q_norm(q), self.k_norm(k)
        q_all, k_all = self.q_norm(q.flatten(-2)), self.k_norm(k.flatten(-2))
        return q_all.view_as(q), k_all.view_as(k)


class PostNormBlock(Block):
    """A block whose branches read the residual stream as it is, and are normed at their end."""

    def __init__(self, config: QKGainConfig, attention: QKGainAttention):
        super().__init__(config, attention)
        self.post_1, self.post_2 = self.ln_1, self.ln_2
        self.ln_1, self.ln_2 = nn.Identity(), nn.Identity()

    def forward(self, x, rope, context: Context | None = None):
        x = x + self.post_1(self.attn(x, rope, context))
        return x + self.post_2(self.mlp(x))


class GPT_QKGain(GPT):
    Config, Attention = QKGainConfig, QKGainAttention

    def make_block(self, config: QKGainConfig, layer: int) -> Block:
        block = PostNormBlock if config.post_norm else Block
        return block(config, self.Attention(config, layer))
