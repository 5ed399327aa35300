"""
Which tensor of a Hugging Face model is which of our parameters: a table for each way of naming.

A table maps the name of a module in a block (`self_attn.q_proj`) to ours and to rows: row i of
their tensor is row rows[i] of our parameter. Names in BARE are parameters, without a `.weight`.

Legend: H heads, K key/value heads, D head dim; N, P, R as in model_mla.py. Weights are (out, in).
"""

from types import EllipsisType

import torch

from attentions.moe import MoEConfig
from model import GPTConfig
from model_mla import MLAConfig

# `...` means all rows as they are; of several experts a number, or a number and rows.
Rows = torch.Tensor | slice | EllipsisType | int | tuple[int, slice]
Table = dict[str, tuple[str, Rows]]

# Linears by their names in transformers, for the families that give some of them biases.
ATTENTION_LINEARS = ('q_proj', 'k_proj', 'v_proj', 'o_proj')
MLP_LINEARS = ('gate_proj', 'up_proj', 'down_proj')
LATENT_LINEARS = ('q_a_proj', 'kv_a_proj_with_mqa', 'o_proj')  # of DeepSeek
BARE = ('e_score_correction_bias', 'mlp.router.balance', 'mlp.gate_up', 'mlp.down')


def llama_rows(config: GPTConfig, layer: int) -> Table:
    """Return the table of a block as Llama names it."""
    return pre_norm_rows() | split_qkv_rows(config) | mlp_rows(config.n_inner)


def pre_norm_rows() -> Table:
    return {'input_layernorm': ('ln_1', ...), 'post_attention_layernorm': ('ln_2', ...)}


def split_qkv_rows(config: GPTConfig) -> Table:
    q, k = config.n_head * config.head_dim, config.n_kv_head * config.head_dim
    return {
        'self_attn.q_proj': ('attn.c_attn', slice(0, q)),
        'self_attn.k_proj': ('attn.c_attn', slice(q, q + k)),
        'self_attn.v_proj': ('attn.c_attn', slice(q + k, q + 2 * k)),
        'self_attn.o_proj': ('attn.c_proj', ...),
    }


def mlp_rows(n_inner: int, theirs: str = 'mlp', ours: str = 'mlp') -> Table:
    """Return the table of a SwiGLU."""
    return {
        f'{theirs}.gate_proj': (f'{ours}.c_fc', slice(0, n_inner)),
        f'{theirs}.up_proj': (f'{ours}.c_fc', slice(n_inner, 2 * n_inner)),
        f'{theirs}.down_proj': (f'{ours}.c_proj', ...),
    }


def qwen3_rows(config: GPTConfig, layer: int) -> Table:
    return llama_rows(config, layer) | gain_rows()


def gain_rows() -> Table:
    names = ('q_norm', 'k_norm')
    return {f'self_attn.{name}': (f'attn.{name}', ...) for name in names}


def olmo2_rows(config: GPTConfig, layer: int) -> Table:
    """Return the table of a block that norms what its branches add."""
    norms = {
        'post_attention_layernorm': ('post_1', ...),
        'post_feedforward_layernorm': ('post_2', ...),
    }
    return norms | split_qkv_rows(config) | gain_rows() | mlp_rows(config.n_inner)


def phi3_rows(config: GPTConfig, layer: int) -> Table:
    """Return the table of a block whose matrices are fused as ours are."""
    rows = ...
    turned = sum(frequency != 0 for frequency in config.rope_frequencies)
    if config.rope_frequencies and turned < config.head_dim // 2:
        rows = partly_rotated_rows(config, turned)
    return pre_norm_rows() | {
        'self_attn.qkv_proj': ('attn.c_attn', rows),
        'self_attn.o_proj': ('attn.c_proj', ...),
        'mlp.gate_up_proj': ('mlp.c_fc', ...),
        'mlp.down_proj': ('mlp.c_proj', ...),
    }


def turning_rows(heads: int, D: int, pairs: int) -> torch.Tensor:
    """Return the rows of the first `pairs` pairs (k, k + D / 2) of each head."""
    first = torch.arange(pairs)
    of_head = torch.cat([first, D // 2 + first])
    return (torch.arange(heads)[:, None] * D + of_head).flatten()


def partly_rotated_rows(config: GPTConfig, pairs: int) -> torch.Tensor:
    """
    Return the rows of W^Q | W^K | W^V where RoPE turns the first 2 `pairs` channels of a head, as
    pairs (k, k + pairs). Ours are (k, k + D / 2), and those that do not turn have a frequency of 0.
    """
    D = config.head_dim
    F = D // 2
    first = torch.arange(F)
    order = torch.cat([first[:pairs], F + first[:pairs], first[pairs:], F + first[pairs:]])
    heads = torch.arange(config.n_head + config.n_kv_head)
    rotated = (heads[:, None] * D + order).flatten()
    values = len(heads) * D + torch.arange(config.n_kv_head * D)
    return torch.cat([rotated, values])


def deepseek_rows(config: MLAConfig, layer: int, interleave: bool = True) -> Table:
    """
    Return the table of a dense block as DeepSeek names it. Ours are all heads' rows of one symbol,
    then all heads' of the other; DeepSeek's go head by head.

    interleave: their RoPE turns neighbours (2k, 2k + 1), where we turn (k, k + P/2)
    """
    attention = {
        f'self_attn.{name}': (f'attn.{name}', rows)
        for name, rows in latent_rows(config, interleave).items()
    }
    attention['self_attn.o_proj'] = ('attn.c_proj', ...)
    return pre_norm_rows() | attention | mlp_rows(config.n_inner)


def moe_rows(config: MoEConfig, layer: int, interleave: bool = True) -> Table:
    """As deepseek_rows, with experts; those of a layer are one tensor of ours."""
    rows = deepseek_rows(config, layer, interleave)
    if layer < config.first_k_dense_replace:
        return rows
    rows = {theirs: ours for theirs, ours in rows.items() if not theirs.startswith('mlp.')}
    width = config.moe_intermediate_size
    rows['mlp.gate'] = ('mlp.router', ...)
    if config.scoring_func == 'sigmoid':
        rows['mlp.gate.e_score_correction_bias'] = ('mlp.router.balance', ...)
    shared_width = config.n_shared_experts * width
    rows |= mlp_rows(shared_width, 'mlp.shared_experts', 'mlp.shared')
    for e in range(config.n_routed_experts):
        theirs = f'mlp.experts.{e}'
        rows[f'{theirs}.gate_proj'] = ('mlp.gate_up', (e, slice(0, width)))
        rows[f'{theirs}.up_proj'] = ('mlp.gate_up', (e, slice(width, 2 * width)))
        rows[f'{theirs}.down_proj'] = ('mlp.down', e)
    return rows


def latent_rows(config: MLAConfig, interleave: bool) -> dict[str, Rows]:
    H, R = config.n_head, config.kv_lora_rank
    N, P = config.qk_nope_head_dim, config.qk_rope_head_dim
    pairs = torch.arange(P)
    if interleave:
        pairs = pairs.view(2, P // 2).T.flatten()
    query_rows = head_by_head(H, N, P, pairs)
    rows = dict(
        kv_a_proj_with_mqa=torch.cat([torch.arange(R), R + pairs]),
        kv_a_layernorm=...,
        kv_b_proj=head_by_head(H, N, config.v_head_dim, torch.arange(config.v_head_dim)),
    )
    if config.q_lora_rank:
        return rows | dict(q_a_proj=..., q_a_layernorm=..., q_b_proj=query_rows)
    return rows | dict(q_proj=query_rows)


def head_by_head(heads: int, first: int, second: int, order: torch.Tensor) -> torch.Tensor:
    """
    Return the rows that go head by head: `first` rows of a head, then its `second` rows by `order`,
    out of a matrix with all heads' first rows above all heads' second rows.
    """
    a = torch.arange(heads * first).view(heads, first)
    b = heads * first + torch.arange(heads * second).view(heads, second)[:, order]
    return torch.cat([a, b], dim=1).flatten()
