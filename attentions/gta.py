"""
Grouped-Tied Attention: one state a group that is value and half of the key.

Zadouri, Strauss & Dao, "Hardware-Efficient Attention for Fast Decoding" (2025), section 3.2. Of the
K groups each has a state s_g = W^S_g x of D numbers; one rotated half key serves all groups:

    v_g = s_g        k_g = [s_g[: D/2] | k_pe]        k_pe = RoPE(W^KR x), D/2 numbers

The first half of a query has no position, its second half is rotated. Cached are the states and
k_pe: K D + D/2 numbers, about half of GQA's 2 K D.

Legend: as in model.py, and P = D / 2.
"""

from dataclasses import dataclass

import torch

from model import GPT, CompressedAttention, GPTConfig, Linear, rotate


@dataclass
class GTAConfig(GPTConfig):
    pos: str = 'rope'

    shape_names = ()

    def __post_init__(self):
        super().__post_init__()
        if self.pos != 'rope' or self.head_dim % 4:
            raise ValueError(
                f"pos='{self.pos}', head_dim={self.head_dim}: GTA needs pos='rope' and a head_dim "
                'that is a multiple of 4, as half of it is rotated in pairs'
            )

    @classmethod
    def from_settings(cls, settings, given=(), **changes) -> 'GTAConfig':
        if 'pos' not in given:
            changes = dict(pos='rope') | changes
        return super().from_settings(settings, given, **changes)

    @property
    def rope_dim(self) -> int:
        return self.head_dim // 2

    @property
    def label(self) -> str:
        return 'GTA'


class GroupedTiedAttention(CompressedAttention):
    def __init__(self, config: GTAConfig, layer: int = 0):
        D = config.head_dim
        super().__init__(config, D, D)
        self.half = D // 2
        self.widths = [config.n_kv_head * D, self.half]
        self.q_proj = Linear(config.n_embd, config.n_head * D, bias=config.bias)  # W^Q
        self.kv_proj = Linear(config.n_embd, sum(self.widths), bias=config.bias)  # W^S | W^KR
        self.kv_proj.weight.splits = self.widths
        self.q_proj.weight.heads, self.kv_proj.weight.heads = [config.n_head], [config.n_kv_head, 1]

    def query(self, x, rope):
        q = self.q_proj(x).unflatten(-1, (self.n_head, -1))
        (q,) = self.normed(q)
        q_nope, q_pe = q.chunk(2, dim=-1)
        return torch.cat([q_nope, rotate(q_pe, rope)], dim=-1).transpose(1, 2)

    def compress(self, x, rope):
        """Return the states of the groups and the rotated half key."""
        states, k_pe = self.kv_proj(x).split(self.widths, dim=-1)
        (k_pe,) = self.normed(k_pe)  # a norm of the states would also be one of the values
        return dict(states=states, k_pe=rotate(k_pe[:, :, None], rope)[:, :, 0])

    def expand(self, states, k_pe):
        v = states.unflatten(-1, (-1, self.v_dim)).transpose(1, 2)  # (B, K, T, D)
        k_pe = k_pe[:, None].expand(-1, v.size(1), -1, -1)
        return torch.cat([v[..., : self.half], k_pe], dim=-1), v

    def scale_logits(self, factors):
        # the other half of the key is the value
        self.q_proj.scale_rows(factors.repeat_interleave(self.qk_dim))

    def cache_dims(self):
        return dict(states=self.widths[0], k_pe=self.half)

    def sizes(self):
        groups = self.widths[0] // self.v_dim
        return [(self.n_head, self.qk_dim), (groups, self.qk_dim), (groups, self.v_dim)]


class GPT_GTA(GPT):
    Config, Attention = GTAConfig, GroupedTiedAttention
