"""
Multi-matrix Factorization Attention: many wide query heads out of a small shared space, one key.

Hu et al., "Multi-matrix Factorization Attention" (2024), section 3.2. As in MQA all heads share one
key and one value; the queries' capacity comes from heads that are more and wider than a cache of
MHA could pay for, and is paid for by a factor that they share:

    q_h = W^UQ_h norm(W^DQ x)        k = W^K x        v = W^V x

The norm between the two factors is as MLA has it. The cache has 2 D numbers, D the head's width.

Legend: as in model.py, and R_q mfa_q_rank.
"""

from dataclasses import dataclass

from model import GPT, Attention, GPTConfig, Linear, Norm, rotate


@dataclass
class MFAConfig(GPTConfig):
    pos: str = 'rope'
    mfa_q_rank: int = 0  # width of the space that all queries are read out of; 0 = n_embd / 2

    shape_names = ()

    def __post_init__(self):
        super().__post_init__()
        if self.mfa_q_rank < 0:
            raise ValueError(f'mfa_q_rank={self.mfa_q_rank} must be 0 (derived) or more')
        if self.mfa_q_rank == 0:
            self.mfa_q_rank = max(1, self.n_embd // 2)

    @property
    def label(self) -> str:
        return 'MFA'

    @property
    def shape(self) -> str:
        return f'{self.n_head}:1:{self.head_dim}'


class MultiMatrixFactorizationAttention(Attention):
    def __init__(self, config: MFAConfig, layer: int = 0):
        H, D = config.n_head, config.head_dim
        super().__init__(config, D, D)
        self.widths = [config.mfa_q_rank, D, D]
        self.down = Linear(config.n_embd, sum(self.widths), bias=config.bias)  # W^DQ | W^K | W^V
        self.down.weight.splits = self.widths
        self.q_norm = Norm(config.mfa_q_rank, config, kind='rmsnorm')
        self.q_up = Linear(config.mfa_q_rank, H * D, bias=config.bias)  # W^UQ
        self.q_up.weight.heads = [H]

    def qkv(self, x, rope):
        c_q, k, v = self.down(x).split(self.widths, dim=-1)
        q = self.q_up(self.q_norm(c_q)).unflatten(-1, (self.n_head, -1))
        q, k = self.normed(q, k[:, :, None])  # (B, T, H, D) and (B, T, 1, D)
        q, k = rotate(q, rope), rotate(k, rope)
        return q.transpose(1, 2), k.transpose(1, 2), v[:, None]

    def scale_logits(self, factors):
        self.q_up.scale_rows(factors.repeat_interleave(self.qk_dim))

    def cache_dims(self):
        return dict(k=self.qk_dim, v=self.v_dim)

    def sizes(self):
        return [(self.n_head, self.qk_dim), (1, self.qk_dim), (1, self.v_dim)]


class GPT_MFA(GPT):
    Config, Attention = MFAConfig, MultiMatrixFactorizationAttention
