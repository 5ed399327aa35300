"""
Tensor Product Attention: keys, values and queries of all heads are sums of few outer products.

Zhang et al., "Tensor Product Attention Is All You Need" (2025), section 3.1. For a token x,

    K = 1/R Σ_r a^K_r ⊗ b^K_r        a^K_r = A^K_r x (H numbers)      b^K_r = RoPE(B^K_r x) (D)
    V = 1/R Σ_r a^V_r ⊗ b^V_r        Q = 1/R_q Σ_r a^Q_r ⊗ b^Q_r

each an (H, D) matrix, a row a head. RoPE acts on D alone, so the factors are cached as they are
used: 2 R (H + D) numbers. With R = H and the a's unit vectors it is MHA.

Legend: as in model.py, and R tpa_rank, R_q tpa_q_rank.
"""

from dataclasses import dataclass

import torch

from model import GPT, CompressedAttention, GPTConfig, Linear, rotate


@dataclass
class TPAConfig(GPTConfig):
    pos: str = 'rope'
    tpa_rank: int = 2  # outer products of keys, and as many of values
    tpa_q_rank: int = 6  # outer products of queries

    shape_names = ()

    def __post_init__(self):
        super().__post_init__()
        if self.tpa_rank < 1 or self.tpa_q_rank < 1:
            raise ValueError(
                f'tpa_rank={self.tpa_rank} and tpa_q_rank={self.tpa_q_rank} must be at least 1'
            )
        if self.n_kv_head != self.n_head:
            raise ValueError(f'n_kv_head={self.n_kv_head} does not go with TPA: it has no groups')

    @property
    def label(self) -> str:
        return 'TPA'

    @property
    def shape(self) -> str:
        return f'{self.n_head}:{self.tpa_rank}x({self.n_head}+{self.head_dim})'


class TensorProductAttention(CompressedAttention):
    def __init__(self, config: TPAConfig, layer: int = 0):
        H, D = config.n_head, config.head_dim
        super().__init__(config, D, D)
        self.rank = config.tpa_rank
        self.q_widths = [config.tpa_q_rank * H, config.tpa_q_rank * D]
        self.kv_widths = [self.rank * H, self.rank * D] * 2
        self.q_proj = Linear(config.n_embd, sum(self.q_widths), bias=config.bias)  # A^Q | B^Q
        self.kv_proj = Linear(config.n_embd, sum(self.kv_widths), bias=config.bias)
        self.q_proj.weight.splits = self.q_widths
        self.kv_proj.weight.splits = self.kv_widths  # A^K | B^K | A^V | B^V

    def product(self, a, b):
        """Return 1/R Σ_r a_r ⊗ b_r (B, H, T, D) of a (B, T, R H) and b (B, T, R D)."""
        R = a.size(-1) // self.n_head
        a, b = a.unflatten(-1, (R, self.n_head)), b.unflatten(-1, (R, self.v_dim))
        return torch.einsum('btrh,btrd->bhtd', a, b) / R

    def rotated(self, b, rope):
        """Apply RoPE to factors (B, T, R D)."""
        return rotate(b.unflatten(-1, (-1, self.v_dim)), rope).flatten(2)

    def query(self, x, rope):
        a, b = self.q_proj(x).split(self.q_widths, dim=-1)
        (q,) = self.normed(self.product(a, self.rotated(b, rope)))
        return q

    def compress(self, x, rope):
        """Return the factors of keys, rotated, and of values."""
        a_k, b_k, a_v, b_v = self.kv_proj(x).split(self.kv_widths, dim=-1)
        return dict(a_k=a_k, b_k=self.rotated(b_k, rope), a_v=a_v, b_v=b_v)

    def expand(self, a_k, b_k, a_v, b_v):
        (k,) = self.normed(self.product(a_k, b_k))
        return k, self.product(a_v, b_v)

    def scale_logits(self, factors):
        """As MultiHeadAttention's: a head's rows of A^Q and of A^K by the root each."""
        for linear, widths in [(self.q_proj, self.q_widths), (self.kv_proj, self.kv_widths)]:
            by_row = factors.sqrt().repeat(widths[0] // self.n_head)
            linear.scale_rows(torch.cat([by_row, by_row.new_ones(sum(widths[1:]))]))

    def cache_dims(self):
        return dict(zip(['a_k', 'b_k', 'a_v', 'b_v'], self.kv_widths))


class GPT_TPA(GPT):
    Config, Attention = TPAConfig, TensorProductAttention
