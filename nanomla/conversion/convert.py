"""
MHA, GQA and MQA turned into MLA, without training: `convert` takes a GPT and gives a GPT_MLA.

Two things stand in the way of a small cache. Position: a rotated key cannot pass through a latent, so only some pairs
of each head keep RoPE and become k_pe (MHA2MLA, Ji et al. 2025), and several heads may share what is kept (TransMLA,
Meng et al. 2025). Rank: what remains of the keys, and the values, are read out of one latent of R numbers a token.

    pairs that keep RoPE    high | low | uniform | 2-norm | turn, `own` ones of each kv head, or components `shared` by all
    low rank                split | joint | calibrated | balanced: which error the latent makes least

Exact where nothing is left out: with every pair and the full rank the logits are the source's. A key's bias that no
RoPE touches is the same for all tokens, which a softmax does not see; a value's goes through W^O into its bias.

Legend: H query heads, K kv heads, G = H / K, D the source's head dim, F = D / 2 its pairs and frequencies, pair j being
(j, j + F); N, P, R as in model_mla.py. C̃ = C + 1: x̃ = [x, 1] and W̃ = [W | b], as in calibration.py. A pair is one
complex number: RoPE multiplies it by exp(i θ_j t), which commutes with every complex mixture of pairs of frequency j.
"""

import torch

from model import GPT
from model_mla import GPT_MLA, MLAConfig, MultiHeadLatentAttention
from nanomla.conversion.low_rank import (
    SMALL,
    factor,
    kept_energy,
    latent_factors,
    root_of,
    share_out,
)
from nanomla.conversion.rope_pairs import (
    own_pairs,
    shared_components,
    with_own_pairs,
    with_shared_components,
)
from nanomla.core.configurator import UserError

ROPES, HEADS = ('high', 'low', 'uniform', '2-norm', 'turn'), ('own', 'shared')
LOW_RANKS, RANKS = ('split', 'joint', 'calibrated', 'balanced'), ('equal', 'spectrum')


# ---------------------------------------------------------------------------------------------------
# which pairs keep RoPE


# ---------------------------------------------------------------------------------------------------
# low rank


# ---------------------------------------------------------------------------------------------------
# the whole model


def layer_weights(attn, dtype):
    """W̃ of queries (H, D, C̃), keys and values (K, D, C̃)."""
    w = attn.c_attn.weight.detach().to(dtype)
    bias = w.new_zeros(len(w)) if attn.c_attn.bias is None else attn.c_attn.bias.detach().to(dtype)
    return [
        t.unflatten(0, (-1, attn.v_dim))
        for t in torch.cat([w, bias[:, None]], dim=1).split(attn.widths)
    ]


def full_rank(config, rope_pairs, rope_heads, low_rank='joint'):
    """The smallest kv_lora_rank that loses nothing."""
    K, D, C = config.n_kv_head, config.head_dim, config.n_embd
    k_rows = (
        K * D - 2 * rope_pairs * (K if rope_heads == 'own' else 1)
        if config.pos == 'rope'
        else K * D
    )
    return min(C, k_rows) + min(C, K * D) if low_rank == 'split' else min(C, k_rows + K * D)


def for_saving(config, saving, rope_heads, low_rank, rope_pairs=-1):
    """
    (rope_pairs, kv_lora_rank) that leave 1 - saving of the cache of `config`. rope_pairs=-1: a third of what is left is for
    k_pe. Larger ranks are multiples of 8, so that a quantised cache has groups of them. A rank below 1 says that nothing fits.
    """
    K, D, rope = config.n_kv_head, config.head_dim, config.pos == 'rope'
    left, width = int((1 - saving) * 2 * K * D + 1e-9), 2 * (K if rope_heads == 'own' else 1)
    pairs = (
        rope_pairs if rope_pairs >= 0 else max(1, min(D // 2, left // (3 * width))) if rope else 0
    )
    rank = min(left - width * pairs, full_rank(config, pairs, rope_heads, low_rank))
    spare = rank % 8 if rank > 16 else 0
    return pairs + (
        spare // width if rope and rope_pairs < 0 and pairs < D // 2 - 4 else 0
    ), rank - spare


def check(
    config, moments, kv_lora_rank, rope_pairs, rope, rope_heads, fold, low_rank, ranks, q_lora_rank
):
    """UserError for what cannot be converted, or not so. Returns rope_pairs and kv_lora_rank with their defaults filled in."""
    for name, value, choices in (
        ('rope', rope, ROPES),
        ('rope_heads', rope_heads, HEADS),
        ('low_rank', low_rank, LOW_RANKS),
        ('ranks', ranks, RANKS),
    ):
        if value not in choices:
            raise UserError(f"{name}='{value}' is not known: use {', '.join(choices)}")
    if isinstance(config, MLAConfig):
        raise UserError('the source is an MLA model already: convert one with MHA, GQA or MQA')
    if config.qk_norm:
        raise UserError(
            'the source has QK-norm (qk_norm=True), which cannot pass through a latent: its keys would have to be normed behind W^UK'
        )
    most = (
        0
        if config.pos != 'rope'
        else config.head_dim // 2 * (config.n_kv_head if rope_heads == 'shared' else 1)
    )
    if rope_pairs > most or rope_pairs < -1:
        what = (
            f'pos={config.pos}, which has no RoPE'
            if not most
            else f'{most} pairs {"in all kv heads together" if rope_heads == "shared" else "in a head"}'
        )
        raise UserError(
            f'rope_pairs={rope_pairs}: the source has {what}; use 0 to {most}, or -1 for all'
        )
    rope_pairs = most if rope_pairs == -1 else rope_pairs
    if fold < 1 or fold > 1 and rope_heads != 'shared':
        raise UserError(
            f'fold={fold} must be at least 1, and more than 1 only with rope_heads=shared'
        )
    full = full_rank(config, rope_pairs, rope_heads, low_rank)
    if kv_lora_rank < 0 or kv_lora_rank > full:
        raise UserError(
            f'kv_lora_rank={kv_lora_rank} is above the full rank of keys and values, {full}: use 1 to {full}, or 0 for all of it'
        )
    if q_lora_rank < 0 or q_lora_rank > config.n_embd:
        raise UserError(
            f'q_lora_rank={q_lora_rank} is above the full rank of the query, {config.n_embd}: use 1 to {config.n_embd}, or 0 for no latent'
        )
    if moments is None and (
        low_rank not in ('split', 'joint')
        or rope in ('2-norm', 'turn')
        and rope_heads == 'own'
        and 0 < rope_pairs < most
    ):
        raise UserError(
            f'rope={rope} with low_rank={low_rank} needs calibration text: name some, or use rope=uniform and low_rank=joint'
        )
    return rope_pairs, kv_lora_rank or full


@torch.no_grad()
def convert(
    model,
    moments=None,
    kv_lora_rank=0,
    rope_pairs=-1,
    rope='turn',
    rope_heads='shared',
    fold=1,
    real=False,
    low_rank='balanced',
    ranks='equal',
    q_lora_rank=0,
    rotate=False,
    seed=0,
    tick=lambda: None,
):
    """
    A GPT_MLA out of `model`, a GPT, with which it shares all modules but the attentions; and for each layer a dict of its rank
    and the share of its keys' and values' energy that is kept.

    moments       calibration.measure(model, ...); None: only what looks at weights alone
    kv_lora_rank  R, 0 = full; with ranks='spectrum' the mean of all layers, shared out by their spectra
    rope          which pairs: see `some_of`, `turning`
    rope_pairs    pairs that keep RoPE, -1 = all: of each kv head (P = 2 K pairs), or with rope_heads='shared' of all together (P = 2 pairs)
    fold          neighbouring frequencies that pass for one (shared); real: components by real rotations only
    q_lora_rank   a latent for the query, too; 0 = none
    rotate        turn the latent by a random rotation: the same function, and no channel stands out when it is quantised
    """
    c = model.config
    rope_pairs, R = check(
        c, moments, kv_lora_rank, rope_pairs, rope, rope_heads, fold, low_rank, ranks, q_lora_rank
    )
    weight = model.lm_head.weight
    dtype = (
        torch.float64
        if weight.device.type != 'mps' and (c.n_embd <= SMALL or weight.is_cuda or moments)
        else torch.float32
    )
    attentions = [block.attn for block in model.transformer.h]
    covs = [
        None if moments is None else m.cov.to(weight.device, dtype) for m in moments or attentions
    ]
    layers = (layer_weights(attn, dtype) for attn in attentions)
    shared = rope_heads == 'shared' and rope_pairs > 0
    D, pe = c.head_dim, rope_pairs * (1 if rope_heads == 'shared' else c.n_kv_head)
    if shared:
        layers = list(layers)
        runs, chosen = shared_components(c, layers, covs, rope_pairs, rope, fold, real)
    elif rope_pairs:
        pairs = [p.to(weight.device) for p in own_pairs(c, moments, rope_pairs, rope)]
    nope = D if not pe else 0 if pe == c.n_kv_head * D // 2 else D if shared else D - 2 * rope_pairs

    parts = []  # of each layer: queries, k_pe, frequencies, biases and the two factors
    for n, (q, k, v) in enumerate(layers):
        if shared:
            q_nope, q_pe, k_nope, k_pe, frequencies = with_shared_components(q, k, runs[n], chosen)
        elif rope_pairs:
            q_nope, q_pe, k_nope, k_pe, frequencies = with_own_pairs(q, k, pairs[n])
        else:
            q_nope, q_pe, k_nope, k_pe, frequencies = (
                q,
                q[:, :0],
                k,
                q.new_zeros(0, q.size(-1)),
                torch.zeros(0, dtype=torch.long),
            )
        most = (
            min(full_rank(c, rope_pairs, rope_heads, low_rank), 2 * R) if ranks == 'spectrum' else R
        )
        found = latent_factors(
            k_nope[..., :-1],
            v[..., :-1],
            None if covs[n] is None else covs[n][:-1, :-1],
            most,
            low_rank,
        )
        whole = torch.cat([k_nope[..., :-1].flatten(0, 1), v[..., :-1].flatten(0, 1)])
        parts.append(
            (
                torch.cat([q_nope.flatten(0, 1), q_pe.flatten(0, 1)]).to(weight.dtype),
                k_pe.to(weight.dtype),
                frequencies,
                v[..., -1],
                found,
                whole.to(weight.dtype),
            )
        )
        tick()
    each = (
        share_out([found[3] for *_, found, _ in parts], R * c.n_layer)
        if ranks == 'spectrum'
        else [R] * c.n_layer
    )

    config = MLAConfig(
        **{key: getattr(c, key) for key in GPT.Config.keys()}
        | dict(
            n_kv_head=0,
            head_dim=nope + 2 * pe,
            kv_lora_rank=max(each),
            kv_lora_ranks=tuple(each) if len(set(each)) > 1 else (),
            q_lora_rank=q_lora_rank,
            qk_nope_head_dim=nope,
            qk_rope_head_dim=2 * pe,
            v_head_dim=D,
            latent_norm=False,
            source_head_dim=D,
            pos='none' if c.pos == 'rope' and not pe else c.pos,
        )
    )
    with torch.device('meta'):
        mla = GPT_MLA(config)
    for name in mla.transformer:
        if name != 'h':
            mla.transformer[name] = model.transformer[name]
    mla.lm_head, mla.stream = model.lm_head, model.stream
    told, generator = [], torch.Generator().manual_seed(seed)
    for n, (block, old) in enumerate(zip(mla.transformer.h, model.transformer.h)):
        q, k_pe, frequencies, v_bias, (down, up_k, up_v, s), whole = parts[n]
        parts[n] = None
        r = each[n]
        down, up_k, up_v = down[:r], up_k[..., :r], up_v[..., :r]
        told.append(dict(rank=r, energy=kept_energy(whole, up_k, up_v, down, covs[n])))
        if rotate:
            turn = torch.linalg.qr(
                torch.randn(len(down), len(down), dtype=torch.float64, generator=generator)
            ).Q.to(down)
            down, up_k, up_v = turn @ down, up_k @ turn.T, up_v @ turn.T
        up_k, up_v = (
            t.repeat_interleave(c.n_head // c.n_kv_head, dim=0).flatten(0, 1) for t in (up_k, up_v)
        )
        block.ln_1, block.ln_2, block.mlp = old.ln_1, old.ln_2, old.mlp
        block.attn = attn = MultiHeadLatentAttention(config, n).to(weight.device, weight.dtype)
        new = {
            'kv_a_proj_with_mqa.weight': torch.cat([down.to(k_pe.dtype), k_pe[:, :-1]]),
            'kv_b_proj.weight': torch.cat([up_k, up_v]),
            'c_proj.weight': old.attn.c_proj.weight,
            'rope_pairs': frequencies,
        }
        if q_lora_rank:
            root = None if covs[n] is None else root_of(covs[n][:-1, :-1])
            new['q_b_proj.weight'], new['q_a_proj.weight'], _ = factor(
                q[:, :-1].to(dtype), min(q_lora_rank, len(q)), root
            )
        else:
            new['q_proj.weight'] = q[:, :-1]
        if c.bias:
            through = torch.einsum(
                'che,he->c',
                old.attn.c_proj.weight.to(dtype).unflatten(1, (c.n_head, D)),
                v_bias.repeat_interleave(c.n_head // c.n_kv_head, dim=0),
            )
            new |= {
                f'q_{"b_" if q_lora_rank else ""}proj.bias': q[:, -1],
                'kv_a_proj_with_mqa.bias': torch.cat([k_pe.new_zeros(len(down)), k_pe[:, -1]]),
                'c_proj.bias': old.attn.c_proj.bias + through.to(weight.dtype),
            }
            new |= {'q_a_proj.bias': q.new_zeros(q_lora_rank)} if q_lora_rank else {}
        attn.load_state_dict(new)
        tick()
    return mla.train(model.training), told
