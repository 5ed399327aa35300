"""
MLA with a random W^DKV that is never trained.

    c_kv = norm(W^DKV x),  W^DKV with orthonormal rows, as it was drawn

The control between a sliced latent (attentions/sliced.py), where the model must put what is to be
remembered into certain channels, and MLA, where it learns where to look.

Legend: as in model_mla.py.
"""

from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from model import Linear
from model_mla import GPT_MLA, MLAConfig, MultiHeadLatentAttention


@dataclass
class FrozenConfig(MLAConfig):
    @property
    def label(self) -> str:
        return 'MLA, frozen latent'


class FrozenLatentAttention(MultiHeadLatentAttention):
    can_absorb = True
    scale_logits = MultiHeadLatentAttention.scale_logits

    def __init__(self, config: FrozenConfig, layer: int = 0):
        super().__init__(config, layer)
        del self.kv_a_proj_with_mqa
        w_dkv = torch.empty(self.a_widths[0], config.n_embd)
        self.register_buffer('w_dkv', nn.init.orthogonal_(w_dkv))
        if self.pe:
            self.k_pe_proj = Linear(config.n_embd, self.pe, bias=config.bias)  # W^KR

    def latent(self, x, rope):
        c_kv = self.kv_a_layernorm(F.linear(x, self.w_dkv.to(x.dtype)))
        if not self.pe:
            return c_kv, x[..., :0]
        (k_pe,) = self.normed(self.k_pe_proj(x))
        return c_kv, self.rotated(k_pe[:, :, None], rope)[:, :, 0]


class GPT_Frozen(GPT_MLA):
    Config, Attention = FrozenConfig, FrozenLatentAttention
