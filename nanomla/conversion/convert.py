"""
MHA, GQA and MQA turned into MLA without training: `convert` takes a GPT and returns a GPT_MLA.

Two things stand in the way of a small cache. Position: a rotated key cannot pass through a latent,
so only some pairs of each head keep RoPE and become k_pe (MHA2MLA, Ji et al. 2025), and several
heads may share them (TransMLA, Meng et al. 2025); rope_pairs.py chooses them. Rank: the other keys,
and the values, are read out of one latent of R numbers a token; low_rank.py finds it.

    c_kv   = W^DKV x         down of the factors        k_pe = RoPE(W^KR x)    pairs with RoPE
    k_nope = W^UK c_kv       up_k                        v    = W^UV c_kv      up_v

Exact where nothing is left out: with every pair and the full rank the logits are the source's. The
bias of a key without RoPE is the same for all tokens, which a softmax does not see; that of a value
goes through W^O into its bias.

A converted model is a source, too: its pairs with RoPE stay, and its latent gets a smaller rank.

Legend: H query heads, K kv heads, D the source's head dim; N, P, R as in model_mla.py; C̃ = C + 1,
as matrices have their bias as a last column (source.py).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from model import GPT, Attention, GPTConfig
from model_mla import GPT_MLA, MLAConfig, MultiHeadLatentAttention
from nanomla.conversion.calibration import Moments, output_metric
from nanomla.conversion.low_rank import (
    SMALL,
    AttentionMetrics,
    LatentFactors,
    attention_factors,
    factor,
    kept_energy,
    latent_factors,
    root_of,
    share_out,
    share_out_by_residual,
)
from nanomla.conversion.rope_pairs import (
    RopeSplit,
    choose_components,
    own_pairs,
    principal_components,
    split_of_latent,
    split_own_pairs,
    split_shared_components,
    split_without_rope,
)
from nanomla.conversion.settings import ConversionSettings, full_rank, nope_width, pe_width
from nanomla.conversion.source import check_source, has_latent, layer_weights


@dataclass
class LayerParts:
    """
    One layer of the source, taken apart.

    q (H (N + P), C̃): W^UQ | W^QR with their bias; k_pe (P, C̃): W^KR with its bias
    frequencies (P / 2,): which of the source's frequencies each pair of k_pe has
    v_bias (K, D); keys_values (K (N + D), C): what the latent has to carry, k_nope and v
    factors: the latent; cov (C, C): E[x xᵀ] of the layer's input, or None
    """

    q: torch.Tensor
    k_pe: torch.Tensor
    frequencies: torch.Tensor
    v_bias: torch.Tensor
    keys_values: torch.Tensor
    factors: LatentFactors
    cov: torch.Tensor | None


@torch.no_grad()
def convert(
    model: GPT,
    settings: ConversionSettings,
    moments: list[Moments] | None = None,
    tick: Callable[[], object] = lambda: None,
) -> tuple[GPT_MLA, list[dict]]:
    """
    Convert `model`, with which the result shares all modules but the attentions.

    moments: calibration.measure(model, ...); None for settings that look at weights alone.
    tick: called twice a layer. Returns the new model and for each layer a dict of its rank and the
    energy of its keys and values that is kept, 1 for all of it. UserError for a source that cannot
    be converted, or not with these settings.
    """
    check_source(model)
    config = model.config
    settings = settings.for_source(config, calibrated=moments is not None)

    parts = []
    for layer in split_layers(model, settings, moments):
        parts.append(layer)
        tick()
    ranks = equal_ranks(config, settings)
    if settings.ranks_differ:
        spectra = [layer.factors.singular_values for layer in parts]
        share = share_out_by_residual if settings.ranks == 'residual' else share_out
        ranks = share(spectra, settings.kv_lora_rank * config.n_layer)

    mla = without_blocks(model, mla_config(config, settings, ranks))
    reference = model.lm_head.weight  # its device and dtype are the model's
    generator = torch.Generator().manual_seed(settings.seed)
    report = []
    for n, (block, old) in enumerate(zip(mla.transformer.h, model.transformer.h)):
        layer = parts[n]
        parts[n] = None  # the memory of large models is tight
        factors = layer.factors.cut(ranks[n])
        energy = kept_energy(layer.keys_values, factors, layer.cov)
        report.append(dict(rank=ranks[n], energy=energy))
        if settings.rotate:
            factors = factors.rotated(generator)
        block.ln_1, block.ln_2, block.mlp = old.ln_1, old.ln_2, old.mlp
        block.attn = MultiHeadLatentAttention(mla.config, n).to(reference.device, reference.dtype)
        weights = key_value_weights(layer, factors, config)
        weights |= query_weights(layer, settings, config)
        weights |= output_weights(layer, old.attn, config)
        block.attn.load_state_dict(weights)
        tick()
    return mla.train(model.training), report


# -------------------------------------------------------------------------------------------------
# the source, taken apart


def split_layers(
    model: GPT, settings: ConversionSettings, moments: list[Moments] | None
) -> Iterator[LayerParts]:
    """Yield the parts of each layer, for settings that `for_source` has filled in."""
    dtype = arithmetic_dtype(model, calibrated=moments is not None)
    covs = [None] * model.config.n_layer
    if moments is not None:
        device = model.lm_head.weight.device
        covs = [layer.cov.to(device, dtype) for layer in moments]
    split = splitter(model, settings, moments, covs)
    for n, block in enumerate(model.transformer.h):
        parts, v = split(n, block.attn)
        metrics = None
        if settings.low_rank == 'attention':
            metrics = attention_metrics(block.attn, parts, moments[n].to(covs[n].device))
        yield layer_parts(model, settings, parts, v, covs[n], metrics)


def arithmetic_dtype(model: GPT, calibrated: bool) -> torch.dtype:
    """Return float64, or float32 where a device lacks float64 or would take too long in it."""
    weight = model.lm_head.weight
    if weight.device.type == 'mps':
        return torch.float32
    if model.config.n_embd <= SMALL or weight.is_cuda or calibrated:
        return torch.float64
    return torch.float32


def splitter(
    model: GPT,
    settings: ConversionSettings,
    moments: list[Moments] | None,
    covs: list[torch.Tensor | None],
) -> Callable[[int, Attention], tuple[RopeSplit, torch.Tensor]]:
    """
    Return a function that splits a layer by what keeps RoPE.

    It takes the layer's number and its attention, and returns the split and the values.
    """
    dtype = arithmetic_dtype(model, calibrated=moments is not None)
    if has_latent(model.config):
        return lambda n, attention: split_of_latent(attention, dtype)
    split = rope_splitter(model, settings, moments, covs)

    def split_and_values(n, attention):
        q, k, v = layer_weights(attention, dtype)
        return split(n, q, k), v

    return split_and_values


def rope_splitter(
    model: GPT,
    settings: ConversionSettings,
    moments: list[Moments] | None,
    covs: list[torch.Tensor | None],
) -> Callable[[int, torch.Tensor, torch.Tensor], RopeSplit]:
    """
    Return a function that splits queries and keys of a layer by what keeps RoPE.

    It takes the layer's number, its queries (H, D, C̃) and its keys (K, D, C̃).
    """
    if settings.rope_pairs == 0:
        return lambda n, q, k: split_without_rope(q, k)
    if not settings.shared:
        device = model.lm_head.weight.device
        pairs = [layer.to(device) for layer in own_pairs(model.config, settings, moments)]
        return lambda n, q, k: split_own_pairs(q, k, pairs[n])
    dtype = arithmetic_dtype(model, calibrated=moments is not None)
    layers = []
    for block, cov in zip(model.transformer.h, covs):
        q, k, _ = layer_weights(block.attn, dtype)
        layers.append(list(principal_components(q, k, cov, settings)))
    window = moments[0].window if moments else model.config.block_size
    if settings.by_layer:
        chosen = [choose_components(model.config, settings, [runs], window) for runs in layers]
    else:
        chosen = [choose_components(model.config, settings, layers, window)] * len(layers)
    return lambda n, q, k: split_shared_components(q, k, layers[n], chosen[n])


def layer_parts(
    model: GPT,
    settings: ConversionSettings,
    split: RopeSplit,
    v: torch.Tensor,
    cov: torch.Tensor | None,
    metrics: AttentionMetrics | None,
) -> LayerParts:
    """Return the parts of a layer from its split queries and keys and its values v (K, D, C̃)."""
    stored_dtype = model.lm_head.weight.dtype
    rank = settings.kv_lora_rank
    if settings.ranks_differ:  # a layer may get more than the mean
        rank = min(full_rank(model.config, settings), 2 * rank)
    if cov is not None:
        cov = cov[:-1, :-1]
    k_nope, values = split.k_nope[..., :-1], v[..., :-1]
    q = torch.cat([split.q_nope.flatten(0, 1), split.q_pe.flatten(0, 1)])
    keys_values = torch.cat([k_nope.flatten(0, 1), values.flatten(0, 1)])
    if metrics is None:
        factors = latent_factors(k_nope, values, cov, rank, settings.low_rank)
    else:
        factors = attention_factors(k_nope, values, metrics, rank)
    return LayerParts(
        q=q.to(stored_dtype),
        k_pe=split.k_pe.to(stored_dtype),
        frequencies=split.frequencies,
        v_bias=v[..., -1],
        keys_values=keys_values.to(stored_dtype),
        factors=factors,
        cov=cov,
    )


def attention_metrics(attention: Attention, split: RopeSplit, moments: Moments) -> AttentionMetrics:
    """Return the metrics of one layer from its Moments and its split queries."""
    q, cov = split.q_nope, moments.cov
    K = len(split.k_nope)
    of_queries = q @ cov.to(q) @ q.mT * attention.scale**2
    key = of_queries * moments.value_spread.to(q)[:, None, None]
    half_attended = (cov + moments.attended)[:-1, :-1] / 2
    return AttentionMetrics(
        key=key.unflatten(0, (K, -1)).sum(1),
        value=output_metric(attention).to(q).unflatten(0, (K, -1)).sum(1),
        cov=half_attended.to(q),
    )


# -------------------------------------------------------------------------------------------------
# the new model


def equal_ranks(config: GPTConfig, settings: ConversionSettings) -> list[int]:
    """Return the rank of each layer, for settings that `for_source` has filled in."""
    ranks = [settings.kv_lora_rank] * config.n_layer
    if has_latent(config):  # whose layers may have less
        ranks = [min(rank, config.rank(n)) for n, rank in enumerate(ranks)]
    return ranks


def mla_config(config: GPTConfig, settings: ConversionSettings, ranks: list[int]) -> MLAConfig:
    """Return the config of the converted model, whose layers have latents of `ranks`."""
    of_latent = dict(
        kv_lora_rank=max(ranks),
        kv_lora_ranks=tuple(ranks) if len(set(ranks)) > 1 else (),
        q_lora_rank=settings.q_lora_rank,
    )
    if has_latent(config):
        return replace(config, **of_latent)
    nope, pe = nope_width(config, settings), pe_width(config, settings)
    pos = config.pos
    if pos == 'rope' and pe == 0:
        pos = 'none'
    fields = {key: getattr(config, key) for key in GPT.Config.keys()}
    fields |= dict(
        n_kv_head=0,
        head_dim=nope + pe,
        qk_nope_head_dim=nope,
        qk_rope_head_dim=pe,
        v_head_dim=config.head_dim,
        latent_norm=False,
        source_head_dim=config.head_dim,
        pos=pos,
    )
    return MLAConfig(**fields, **of_latent)


def without_blocks(model: GPT, config: MLAConfig) -> GPT_MLA:
    """Return a GPT_MLA that shares all modules of `model` but the blocks, which have no weights."""
    with torch.device('meta'):
        mla = GPT_MLA(config)
    for name in mla.transformer:
        if name != 'h':
            mla.transformer[name] = model.transformer[name]
    mla.lm_head, mla.stream = model.lm_head, model.stream
    return mla


def key_value_weights(
    layer: LayerParts, factors: LatentFactors, config: GPTConfig
) -> dict[str, torch.Tensor]:
    """Return the state of W^DKV | W^KR and W^UK | W^UV (model_mla.py, equations 9 to 11 and 15)."""
    group = config.n_head // config.n_kv_head
    up_k = factors.up_k.repeat_interleave(group, dim=0).flatten(0, 1)
    up_v = factors.up_v.repeat_interleave(group, dim=0).flatten(0, 1)
    k_pe, k_pe_bias = layer.k_pe[:, :-1], layer.k_pe[:, -1]
    weights = {
        'kv_a_proj_with_mqa.weight': torch.cat([factors.down.to(k_pe.dtype), k_pe]),
        'kv_b_proj.weight': torch.cat([up_k, up_v]),
        'rope_pairs': layer.frequencies,
    }
    if config.bias:
        no_bias = k_pe.new_zeros(len(factors.down))
        weights['kv_a_proj_with_mqa.bias'] = torch.cat([no_bias, k_pe_bias])
    return weights


def query_weights(
    layer: LayerParts, settings: ConversionSettings, config: GPTConfig
) -> dict[str, torch.Tensor]:
    """Return the state of W^UQ | W^QR, with q_lora_rank also of W^DQ (equations 12 to 14)."""
    q, bias = layer.q[:, :-1], layer.q[:, -1]
    if not settings.q_lora_rank:
        weights = {'q_proj.weight': q}
        if config.bias:
            weights['q_proj.bias'] = bias
        return weights
    root = None
    if layer.cov is not None:
        root = root_of(layer.cov)
    rank = min(settings.q_lora_rank, len(q))
    up, down, _ = factor(q.to(layer.factors.down.dtype), rank, root)
    weights = {'q_a_proj.weight': down, 'q_b_proj.weight': up}
    if config.bias:
        weights['q_a_proj.bias'] = q.new_zeros(settings.q_lora_rank)
        weights['q_b_proj.bias'] = bias
    return weights


def output_weights(
    layer: LayerParts, source: Attention, config: GPTConfig
) -> dict[str, torch.Tensor]:
    """Return the state of W^O: the source's, whose bias takes up the bias of the values."""
    projection = source.c_proj
    weights = {'c_proj.weight': projection.weight}
    if config.bias:
        dtype = layer.v_bias.dtype
        of_heads = projection.weight.to(dtype).unflatten(1, (config.n_head, source.v_dim))
        v_bias = layer.v_bias.repeat_interleave(config.n_head // config.n_kv_head, dim=0)
        through = torch.einsum('che,he->c', of_heads, v_bias)
        weights['c_proj.bias'] = projection.bias + through.to(projection.weight.dtype)
    return weights
