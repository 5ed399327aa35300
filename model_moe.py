"""
DeepSeek's mixture of experts in the place of the MLP: what it adds to model_mla.py.

DeepSeekMoE (Dai et al. 2024), DeepSeek-V2 (2024), section 2.1.2, and V3 (2024), section 2.1.2:

    y = shared(x) + Σ g_e expert_e(x)      over the num_experts_per_tok experts of a token
    s = softmax(W x)                       V2: scores, and g_e = s_e
    s = sigmoid(W x)                       V3: those of s + b are taken, b balances the load

Experts stand in n_group groups, and only the best topk_group groups of a token count: by their best
expert (V2) or by the sum of their two best (V3). With norm_topk_prob the g of a token sum to 1;
all are multiplied by routed_scaling_factor. The first layers are dense.

For inference and for looking inside: nothing balances the load in training, and every expert is on
one device.

Legend: as in model_mla.py, and M tokens, E experts, k experts of a token, I their inner width.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn as nn
import torch.nn.functional as F

from model import MLP, Block
from model_mla import GPT_MLA, MLAConfig


@dataclass
class MoEConfig(MLAConfig):
    """The shape of a GPT with MLA and experts; names as in DeepSeek's config.json."""

    n_routed_experts: int = 64
    n_shared_experts: int = 2  # as one MLP of as many times moe_intermediate_size; 0 = none
    num_experts_per_tok: int = 6
    moe_intermediate_size: int = 1408
    first_k_dense_replace: int = 1  # layers at the beginning that have an MLP
    scoring_func: str = 'softmax'  # softmax (V2) | sigmoid (V3)
    n_group: int = 1
    topk_group: int = 1
    norm_topk_prob: bool = False
    routed_scaling_factor: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        if self.act != 'swiglu' or self.bias:
            raise ValueError(f'act={self.act}, bias={self.bias}: experts are SwiGLU without bias')
        if self.scoring_func not in ('softmax', 'sigmoid'):
            raise ValueError(f"scoring_func='{self.scoring_func}': use softmax or sigmoid")
        if self.n_routed_experts % self.n_group or self.topk_group > self.n_group:
            raise ValueError(
                f'n_routed_experts={self.n_routed_experts} must be a multiple of '
                f'n_group={self.n_group}, and topk_group={self.topk_group} at most that'
            )
        within_reach = self.n_routed_experts // self.n_group * self.topk_group
        if not 0 < self.num_experts_per_tok <= within_reach:
            raise ValueError(
                f'num_experts_per_tok={self.num_experts_per_tok} must be 1 to {within_reach}'
            )


class Router(nn.Module):
    """Which experts a token gets, and with which weights; in fp32."""

    def __init__(self, config: MoEConfig):
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.n_embd))
        nn.init.normal_(self.weight, std=0.02)
        self.balance = None  # b
        if config.scoring_func == 'sigmoid':
            zeros = torch.zeros(config.n_routed_experts, dtype=torch.float32)
            self.balance = nn.Parameter(zeros, requires_grad=False)

    def _apply(self, fn, recurse=True):
        """Go to another device with the model, but keep the dtype: rounded scores change places."""
        return super()._apply(lambda tensor: tensor.to(fn(tensor).device), recurse)

    def forward(self, x):
        """Return the weights (M, k) in fp32 and the numbers (M, k) of the experts of x (M, C)."""
        config = self.config
        logits = F.linear(x.float(), self.weight.float())
        if self.balance is None:
            scores = logits.softmax(-1)
            wanted = self.of_best_groups(scores, best=1)
        else:
            scores = logits.sigmoid()
            wanted = self.of_best_groups(scores + self.balance, best=2)
        experts = wanted.topk(config.num_experts_per_tok, dim=-1).indices
        weights = scores.gather(-1, experts)
        if config.norm_topk_prob:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return weights * config.routed_scaling_factor, experts

    def of_best_groups(self, scores, best: int):
        """
        Return the scores (M, E) with those outside of the best groups at -inf. A group is as good
        as the sum of its `best` experts.
        """
        config = self.config
        if config.n_group == 1:
            return scores
        groups = scores.unflatten(-1, (config.n_group, -1))
        quality = groups.topk(min(best, groups.size(-1)), dim=-1).values.sum(-1)
        chosen = quality.topk(config.topk_group, dim=-1).indices
        outside = torch.ones_like(quality, dtype=torch.bool).scatter(-1, chosen, False)
        return groups.masked_fill(outside[..., None], -torch.inf).flatten(-2)


class MoE(nn.Module):
    """Some experts of each token, beside a shared one that all tokens have."""

    def __init__(self, config: MoEConfig):
        super().__init__()
        E, C, width = config.n_routed_experts, config.n_embd, config.moe_intermediate_size
        self.router = Router(config)
        self.gate_up = nn.Parameter(torch.empty(E, 2 * width, C))  # gate | up, as in MLP
        self.down = nn.Parameter(torch.empty(E, C, width))
        for weight in (self.gate_up, self.down):
            nn.init.normal_(weight, std=0.02)
        self.shared = None
        if config.n_shared_experts:
            self.shared = MLP(replace(config, n_inner=config.n_shared_experts * width))

    def forward(self, x):
        y = self.routed(x.flatten(0, -2)).view_as(x)
        if self.shared is None:
            return y
        return y + self.shared(x)

    def routed(self, x):
        """
        Return the experts' part of x (M, C). Rows are sorted by expert, so that one grouped matrix
        product serves all experts; nothing here waits for the GPU, so a CUDA graph can hold it.
        """
        weights, experts = self.router(x)
        k, E = experts.size(-1), self.router.config.n_routed_experts
        each = experts.flatten()
        order = each.argsort()
        counts = each.new_zeros(E).scatter_add(0, each, torch.ones_like(each))
        ends = counts.cumsum(0).int()
        rows = x[order // k]
        gate, up = F.grouped_mm(rows, self.gate_up.to(x.dtype).mT, offs=ends).chunk(2, dim=-1)
        y = F.grouped_mm(F.silu(gate) * up, self.down.to(x.dtype).mT, offs=ends)
        y = y * weights.flatten()[order, None].to(x.dtype)
        unsorted = torch.empty_like(y).index_copy(0, order, y)
        return unsorted.view(-1, k, x.size(-1)).sum(1)


class GPT_MoE(GPT_MLA):
    Config = MoEConfig

    def make_block(self, config: MoEConfig, layer: int) -> Block:
        block = super().make_block(config, layer)
        if layer >= config.first_k_dense_replace:
            block.mlp = MoE(config)
        return block
