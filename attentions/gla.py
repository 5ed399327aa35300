"""
Grouped Latent Attention: several smaller latents, each read by its share of the heads.

Zadouri, Strauss & Dao, "Hardware-Efficient Attention for Fast Decoding" (2025), section 3.3. The
latent of MLA is cut into G parts, c_kv = [c_1 | ... | c_G], and head h of the group g(h) reads

    k_nope = W^UK_h c_g(h)        v = W^UV_h c_g(h)

with one rotated key k_pe for all heads, as in MLA. The cache is MLA's, the up projections have a
G-th of its parameters, and G devices can hold a part each. G = 1 is MLA.

Absorbed, a head's W^UK and W^UV are MLA's with zeros outside of its group's part, so every engine
that decodes MLA decodes this.

Legend: as in model_mla.py, and G latent_groups, r = R / G.
"""

from dataclasses import dataclass

import torch

from model import Linear
from model_mla import GPT_MLA, MLAConfig, MultiHeadLatentAttention


@dataclass
class GLAConfig(MLAConfig):
    latent_groups: int = 2  # latents of kv_lora_rank / latent_groups; each serves as many heads

    def __post_init__(self):
        super().__post_init__()
        ranks = self.kv_lora_ranks or (self.kv_lora_rank,)
        if self.latent_groups < 1 or any(n % self.latent_groups for n in (self.n_head, *ranks)):
            raise ValueError(
                f'latent_groups={self.latent_groups} must divide n_head={self.n_head} and '
                f'kv_lora_rank={self.kv_lora_rank}'
            )

    @property
    def label(self) -> str:
        return 'GLA'

    @property
    def shape(self) -> str:
        G = self.latent_groups
        return f'{self.n_head}:{G}x{self.kv_lora_rank // G}+{self.qk_rope_head_dim}'


class GroupedLatentAttention(MultiHeadLatentAttention):
    can_absorb = True
    fused_step = MultiHeadLatentAttention.fused_step
    circuit_weights = MultiHeadLatentAttention.circuit_weights
    scale_logits = MultiHeadLatentAttention.scale_logits

    def __init__(self, config: GLAConfig, layer: int = 0):
        super().__init__(config, layer)
        self.groups = config.latent_groups
        self.kv_b_proj = Linear(self.a_widths[0] // self.groups, sum(self.b_widths), bias=False)
        self.kv_b_proj.weight.splits = self.b_widths
        self.kv_b_proj.weight.heads = [self.n_head] * 2

    def group_projections(self, dtype):
        """Return W^UK (G, H / G, N, r) and W^UV (G, H / G, D, r)."""
        parts = self.kv_b_proj.weight.to(dtype).split(self.b_widths)
        return [w.unflatten(0, (self.groups, self.n_head // self.groups, -1)) for w in parts]

    def content(self, c_kv):
        latents = c_kv.unflatten(-1, (self.groups, -1))  # (B, T, G, r)
        w_uk, w_uv = self.group_projections(c_kv.dtype)
        k_nope = torch.einsum('btgr,ghnr->btghn', latents, w_uk).flatten(2, 3)
        v = torch.einsum('btgr,ghdr->btghd', latents, w_uv).flatten(2, 3)
        return k_nope, v

    def up_projections(self, dtype):
        """Return W^UK (H, N, R) and W^UV (H, D, R), zero outside of the group's latent."""
        same_group = torch.eye(self.groups, dtype=dtype, device=self.kv_b_proj.weight.device)
        wide = []
        for w in self.group_projections(dtype):
            blocks = torch.einsum('ghnr,gk->ghnkr', w, same_group)  # k: the group of a column
            wide.append(blocks.flatten(3).flatten(0, 1))
        return wide


class GPT_GLA(GPT_MLA):
    Config, Attention = GLAConfig, GroupedLatentAttention
