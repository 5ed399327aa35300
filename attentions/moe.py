"""
MLA with DeepSeek's mixture of experts in the place of the MLP (DeepSeek-V2 and V3, 2024, 2.1.2):

    y = shared(x) + Σ g_e expert_e(x)      over the num_experts_per_tok experts of a token
    V2: g = softmax(W x), the largest      V3: g = sigmoid(W x), those with the largest g + b

Experts stand in n_group groups. A token has those of the topk_group best: by their best expert (V2)
or their two best (V3). For inference and analysis: no loss balances the experts in training.

Legend: as in model_mla.py, and M tokens, E experts, k of a token.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn as nn
import torch.nn.functional as F

from model import MLP, Block
from model_mla import GPT_MLA, MLAConfig


@dataclass
class MoEConfig(MLAConfig):
    n_routed_experts: int = 8  # of which each token has num_experts_per_tok
    n_shared_experts: int = 1  # that every token has, as one MLP
    num_experts_per_tok: int = 2  # of n_routed_experts
    moe_intermediate_size: int = 0  # width of an expert: 0 = a token's together have n_inner
    first_k_dense_replace: int = 1  # layers at the beginning that have an MLP
    scoring_func: str = 'softmax'  # of the router: softmax (V2) | sigmoid (V3)
    n_group: int = 1  # groups of experts
    topk_group: int = 1  # groups that a token may have experts of
    norm_topk_prob: bool = False  # the weights of a token's experts sum to 1
    routed_scaling_factor: float = 1.0  # of the weights

    def __post_init__(self):
        super().__post_init__()
        if self.moe_intermediate_size == 0:
            share = self.n_inner // (self.num_experts_per_tok + self.n_shared_experts)
            self.moe_intermediate_size = max(8, share // 8 * 8)
        if self.scoring_func not in ('softmax', 'sigmoid'):
            raise ValueError(f"scoring_func='{self.scoring_func}': use softmax or sigmoid")
        if self.n_shared_experts < 1 or self.n_group < 1:
            raise ValueError(
                f'n_shared_experts={self.n_shared_experts} and n_group={self.n_group} '
                'must be at least 1'
            )
        of_group, left = divmod(self.n_routed_experts, self.n_group)
        most = of_group * min(self.topk_group, self.n_group)
        if left or not 1 <= self.num_experts_per_tok <= most:
            raise ValueError(
                f'num_experts_per_tok={self.num_experts_per_tok} must be 1 to {most}, and '
                f'n_routed_experts={self.n_routed_experts} a multiple of n_group={self.n_group}'
            )

    @property
    def label(self) -> str:
        return 'MLA with experts'


class Router(nn.Module):
    def __init__(self, config: MoEConfig):
        super().__init__()
        self.config, E = config, config.n_routed_experts
        self.weight = nn.Parameter(0.02 * torch.randn(E, config.n_embd))
        self.balance = None  # b
        if config.scoring_func == 'sigmoid':
            self.balance = nn.Parameter(torch.zeros(E, dtype=torch.float32), requires_grad=False)

    def _apply(self, fn, recurse=True):
        """Follow the model to another device, not to another dtype: rounding changes the order."""
        return super()._apply(lambda tensor: tensor.to(fn(tensor).device), recurse)

    def forward(self, x):
        """Return the weights (M, k) in fp32 and the numbers (M, k) of the experts of x (M, C)."""
        config = self.config
        logits = F.linear(x.float(), self.weight.float())
        if self.balance is None:
            scores = logits.softmax(-1)
            wanted, best = scores, 1
        else:
            scores = logits.sigmoid()
            wanted, best = scores + self.balance, 2
        if config.topk_group < config.n_group:
            groups = wanted.unflatten(-1, (config.n_group, -1))
            quality = groups.topk(min(best, groups.size(-1))).values.sum(-1)
            chosen = quality.topk(config.topk_group).indices
            others = torch.ones_like(quality, dtype=torch.bool).scatter(-1, chosen, False)
            wanted = groups.masked_fill(others[..., None], -torch.inf).flatten(-2)
        experts = wanted.topk(config.num_experts_per_tok).indices
        weights = scores.gather(-1, experts)
        if config.norm_topk_prob:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return weights * config.routed_scaling_factor, experts


def is_recorded(x) -> bool:
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


class MoE(nn.Module):
    activate = MLP.activate

    def __init__(self, config: MoEConfig):
        super().__init__()
        C, E, width = config.n_embd, config.n_routed_experts, config.moe_intermediate_size
        self.act, gates = config.act, 2 if config.act == 'swiglu' else 1
        self.router = Router(config)
        self.gate_up = nn.Parameter(0.02 * torch.randn(E, gates * width, C))
        self.down = nn.Parameter(0.02 * torch.randn(E, C, width))
        self.shared = MLP(replace(config, n_inner=config.n_shared_experts * width))

    def forward(self, x):
        return self.routed(x.flatten(0, -2)).view_as(x) + self.shared(x)

    def routed(self, x):
        """
        Return the experts' part of x (M, C). With rows sorted by expert one grouped product serves
        all, and nothing waits for the GPU: a CUDA graph can hold it.
        """
        weights, experts = self.router(x)
        each, k = experts.flatten(), experts.size(-1)
        order = each.argsort()
        counts = each.new_zeros(len(self.down)).scatter_add(0, each, torch.ones_like(each))
        ends = counts.cumsum(0).int()
        hidden = self.activate(self.product(x[order // k], self.gate_up, each[order], ends))
        y = self.product(hidden, self.down, each[order], ends)
        y = torch.empty_like(y).index_copy(0, order, y).unflatten(0, (-1, k))
        return (y * weights[..., None].to(x.dtype)).sum(1)

    def product(self, rows, weight, experts, ends):
        """Return weight[e] @ row for each of `rows` and its expert; `ends` of those of each one."""
        weight = weight.to(rows.dtype)
        if rows.dtype != torch.bfloat16 and is_recorded(rows):
            # grouped_mm is one kernel in bf16 alone, and else waits for the GPU
            return torch.einsum('mi,moi->mo', rows, weight[experts])
        return F.grouped_mm(rows, weight.mT, offs=ends)


class GPT_MoE(GPT_MLA):
    Config = MoEConfig

    def make_block(self, config: MoEConfig, layer: int) -> Block:
        block = super().make_block(config, layer)
        if config.mlp and layer >= config.first_k_dense_replace:
            block.mlp = MoE(config)
        return block
