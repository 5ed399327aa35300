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
import torch.nn as nn

from nanomla.core.configurator import UserError
from model import GPT
from model_mla import GPT_MLA, MLAConfig, MultiHeadLatentAttention

ROPES, HEADS = ('high', 'low', 'uniform', '2-norm', 'turn'), ('own', 'shared')
LOW_RANKS, RANKS = ('split', 'joint', 'calibrated', 'balanced'), ('equal', 'spectrum')
SMALL = 1024  # matrices up to this width are decomposed wholly and in float64 on a CPU


# ---------------------------------------------------------------------------------------------------
# which pairs keep RoPE

def some_of(n, p, rope):
    """p of n frequencies in order, 0 being the fastest (MHA2MLA, section 3.1)."""
    return dict(high=range(p), low=range(n - p, n), uniform=[i * n // p for i in range(p)])[rope]


def turning(c, rope):
    """
    How much each of the F frequencies counts beside the power of its pairs. 2-norm: all the same. turn: by what becomes of a
    pair that turns no more, the mean of 1 - cos(θ t) over a block; the slow ones hardly turn, and lose nothing without RoPE.
    """
    if rope == '2-norm':
        return torch.ones(c.head_dim // 2, dtype=torch.float64)
    theta = c.rope_theta ** (-torch.arange(0, c.head_dim, 2, dtype=torch.float64) / c.head_dim) / c.rope_scaling
    return (1 - (torch.arange(c.block_size)[:, None] * theta).cos()).mean(0)


def own_pairs(c, moments, p, rope):
    """For each layer the p pairs of each kv head that keep RoPE, (K, p) in order. 2-norm: those of the largest mean |q| · mean |k|."""
    if rope in ('high', 'low', 'uniform') or p == c.head_dim // 2:
        return [torch.tensor([list(some_of(c.head_dim // 2, p, 'high' if rope not in ('low', 'uniform') else rope))] * c.n_kv_head, dtype=torch.long)] * c.n_layer
    return [(m.k_norms * m.q_norms.unflatten(0, (c.n_kv_head, -1)).sum(1) * turning(c, rope).to(m.k_norms)).topk(p).indices.sort().values for m in moments]


def with_own_pairs(q, k, pairs):
    """
    q (H, D, C̃), k (K, D, C̃), pairs (K, p) -> q_nope (H, N, C̃), q_pe (H, P, C̃), k_nope (K, N, C̃), k_pe (P, C̃) and
    the frequency of each of the P / 2 = K p pairs of k_pe. A query is zero in the slots of other heads.
    """
    K, p = pairs.shape
    group = torch.arange(len(q), device=q.device) // (len(q) // K)
    kept = torch.zeros(K, q.size(1) // 2, dtype=torch.bool, device=q.device).scatter(1, pairs, True)
    rest = (~kept).nonzero()[:, 1].view(K, -1)
    q, k = paired(q), paired(k)
    heads = torch.arange(len(q), device=q.device)[:, None]
    q_pe = q.new_zeros(len(q), K, p, q.size(-1))
    q_pe[heads[:, 0], group] = q[heads, pairs[group]]
    own = torch.arange(K, device=q.device)[:, None]
    return (unpaired(q[heads, rest[group]]), unpaired(q_pe.flatten(1, 2)), unpaired(k[own, rest]),
            unpaired(k[own, pairs].flatten(0, 1)), pairs.flatten())


def paired(w):
    """(..., 2n, C̃) -> (..., n, C̃) complex."""
    return torch.complex(*w.chunk(2, dim=-2))


def unpaired(z):
    return torch.cat([z.real, z.imag], dim=-2)


def upright(vectors):
    """
    Eigenvectors (n, r), each turned so that its largest entry is real and positive. Any sign or phase would do, and each device has
    its own, but the channels of a latent share groups of a quantised cache, whose rounding depends on them.
    """
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return vectors * (largest.conj() / largest.abs())


def principal_components(q, k, cov, fold, real):
    """
    The kv heads' pairs of one frequency (or of `fold` neighbouring ones, taken for one: FreqFold) as principal components of
    the keys, each pair weighed by the power of the queries that it meets. RoRoPE (TransMLA, section 4.2) turns heads by
    real rotations; complex ones find all that commutes with RoPE. Yields for each run of frequencies
    js (f,), power (K f,) falling, there (m, K f) and back (K f, m): component = there · pairs, pairs = back · components.
    """
    zq, zk, seen_q, seen_k = (paired(w) for w in (q, k, *((q, k) if cov is None else (q @ cov, k @ cov))))
    for js in torch.arange(zk.size(1), device=k.device).split(fold):
        cov_z = seen_k[:, js].flatten(0, 1) @ zk[:, js].flatten(0, 1).mH
        power = (seen_q[:, js] * zq[:, js].conj()).sum(-1).real
        weight = power.unflatten(0, (len(k), -1)).sum(1).flatten()
        weight = (weight + 1e-6 * weight.mean() + 1e-30).sqrt()
        values, vectors = torch.linalg.eigh(
            weight[:, None] * (cov_z.real if real else cov_z) * weight)
        values, vectors = values.flip(0), upright(vectors.flip(1)).to(cov_z.dtype)
        yield js, values.clamp(min=0), vectors.mH * weight, vectors / weight[:, None]


def shared_components(c, layers, covs, p, rope, fold, real):
    """
    The p components that keep RoPE, the same of all layers (so that one table of frequencies serves them): a list of
    (run, m). 2-norm and turn: by their power, as a share of the layer's; otherwise the first ones of some runs, then the second ones ...
    """
    runs = [list(principal_components(q, k, cov, fold, real)) for (q, k, _), cov in zip(layers, covs)]
    if rope in ('2-norm', 'turn'):
        counts = turning(c, rope).split(fold)
        share = sum(torch.nn.utils.rnn.pad_sequence([values.cpu() * count.mean() for (_, values, *_), count in zip(run, counts)], batch_first=True)
                    / sum(values.sum().item() for _, values, *_ in run) for run in runs)
        chosen = [divmod(i, share.size(1)) for i in share.flatten().topk(p).indices.tolist()]
    else:
        chosen, m = [], 0
        while len(chosen) < p:
            with_m = [r for r, (_, values, *_) in enumerate(runs[0]) if len(values) > m]
            chosen += [(with_m[i], m) for i in some_of(len(with_m), min(p - len(chosen), len(with_m)), rope)]
            m += 1
    return runs, sorted(chosen, key=lambda run_m: (run_m[1], run_m[0]))


def with_shared_components(q, k, runs, chosen):
    """As with_own_pairs, but k_pe holds the chosen components, and N = D: k_nope is what they leave of the keys, q_nope the query as it was."""
    zq, zk = paired(q), paired(k)
    left, group = zk.clone(), len(q) // len(k)
    q_pe, k_pe, frequencies = [], [], []
    for r, m in chosen:
        js, values, there, back = runs[r]
        y = there[m] @ zk[:, js].flatten(0, 1)
        back = back[:, m].view(len(k), len(js))
        left[:, js] -= back[..., None] * y
        q_pe.append(torch.einsum('hf,hfc->hc', back.conj().repeat_interleave(group, dim=0), zq[:, js]))
        k_pe.append(y)
        frequencies.append(js[values.new_tensor([(back[:, f].abs() ** 2).sum() for f in range(len(js))]).argmax()])
    everything = len(chosen) == zk.size(0) * zk.size(1)
    nope = 0 if everything else q.size(1)
    return (q[:, :nope], unpaired(torch.stack(q_pe, dim=1)), unpaired(left)[:, :nope], unpaired(torch.stack(k_pe)), torch.stack(frequencies))


# ---------------------------------------------------------------------------------------------------
# low rank

def top_eigen(a, r):
    """The r largest eigenvalues, falling, and eigenvectors (n, r) of a symmetric positive matrix; large ones on a CPU by subspace iteration."""
    n = len(a)
    if n <= SMALL or a.is_cuda or r > 0.7 * n:
        values, vectors = torch.linalg.eigh(a)
        return values.flip(0)[:r].clamp(min=0), upright(vectors.flip(1)[:, :r])
    basis = torch.randn(n, min(n, r + 64), dtype=a.dtype, generator=torch.Generator().manual_seed(0)).to(a.device)
    for _ in range(4):
        basis = torch.linalg.qr(a @ (a @ basis)).Q
    values, vectors = torch.linalg.eigh(basis.T @ a @ basis)
    return values.flip(0)[:r].clamp(min=0), upright((basis @ vectors.flip(1))[:, :r])


def factor(m, r, root=None):
    """
    m (rows, C) ≈ up (rows, r) · down (r, C) with the least E |(m - up down) x|², where E[x xᵀ] = root rootᵀ (the identity if
    None), and the singular values s (r,) of m root. Both carry √s, so latents, like weights, are evenly scaled.
    """
    seen = m if root is None else m @ root
    if r >= min(m.shape) and max(m.shape) > SMALL and not m.is_cuda:  # nothing is left out
        rows, C = m.shape
        s = seen.norm(dim=0 if C <= rows else 1)
        return (m, torch.eye(C, dtype=m.dtype), s) if C <= rows else (torch.eye(rows, dtype=m.dtype), m, s)
    values, y = top_eigen(seen.T @ seen, min(r, *m.shape))
    s = values.sqrt()
    half = s.clamp(min=1e-6 * s.max().item() + 1e-30).sqrt()
    down = y.T if root is None else torch.linalg.solve_triangular(root, y.T, upper=False, left=False)  # yᵀ root⁻¹
    return seen @ y / half, down * half[:, None], s


def root_of(cov):
    """Lower triangular: root rootᵀ = cov, which is made a little larger, so that it has one."""
    eye = torch.eye(len(cov), dtype=cov.dtype, device=cov.device)
    for jitter in (1e-6, 1e-4, 1e-2):  # the first one, unless rounding has left no more
        root, failed = torch.linalg.cholesky_ex(cov + (jitter * cov.diagonal().mean() + 1e-30) * eye)
        if not failed:
            break
    return root


def latent_factors(k, v, cov, r, low_rank):
    """
    k_nope ≈ up_k down, v ≈ up_v down for the weights k (K, N, C) and v (K, D, C): down (r, C), up_k (K, N, r), up_v (K, D, r)
    and the singular values (r,). cov (C, C) of the input, or None.

    split: k and v by themselves, half the rank each. joint: [k; v] at once (MHA2MLA, section 3.2). calibrated: the least error on
    inputs of this covariance. balanced: the same, of keys made as long as values, which else count for less (TransMLA, section 4.3).
    """
    (K, N, C), D = k.shape, v.size(1)
    k, v = k.flatten(0, 1), v.flatten(0, 1)
    root = None if low_rank in ('split', 'joint') else root_of(cov)
    if low_rank == 'split':
        most_k, most_v = (min(w.shape) for w in (k, v))
        r_k = min(most_k, max(r // 2, r - most_v))
        pieces = [factor(w, rank) for w, rank in ((k, r_k), (v, r - r_k)) if rank]
        up, down, s = torch.block_diag(*(up for up, _, _ in pieces)), torch.cat([down for _, down, _ in pieces]), torch.cat([s for *_, s in pieces])
        up = up if r_k else torch.cat([k.new_zeros(len(k), r), up])
    else:
        longer = ((v @ cov * v).sum() / (k @ cov * k).sum().clamp(min=1e-30)).sqrt() if low_rank == 'balanced' else 1.0
        up, down, s = factor(torch.cat([longer * k, v]), r, root)
        up = torch.cat([up[:K * N] / longer, up[K * N:]])
    return down, up[:K * N].reshape(K, N, len(down)), up[K * N:].reshape(K, D, len(down)), s


def share_out(spectra, total, step=8):
    """
    Ranks of all layers, `total` in sum: blocks of `step` singular values go to the layer where they carry the largest share
    of its energy. Every layer gets a block.
    """
    shares = [(s.double().cpu() ** 2 / (s.double().cpu() ** 2).sum()).split(step) for s in spectra]
    ranks = [len(blocks[0]) for blocks in shares]
    for gain, n, size in sorted(((block.mean().item(), n, len(block)) for n, blocks in enumerate(shares) for block in blocks[1:]), reverse=True):
        if sum(ranks) + size <= total:
            ranks[n] += size
    return ranks


# ---------------------------------------------------------------------------------------------------
# the whole model

def layer_weights(attn, dtype):
    """W̃ of queries (H, D, C̃), keys and values (K, D, C̃)."""
    w = attn.c_attn.weight.detach().to(dtype)
    bias = w.new_zeros(len(w)) if attn.c_attn.bias is None else attn.c_attn.bias.detach().to(dtype)
    return [t.unflatten(0, (-1, attn.v_dim)) for t in torch.cat([w, bias[:, None]], dim=1).split(attn.widths)]


def full_rank(config, rope_pairs, rope_heads, low_rank='joint'):
    """The smallest kv_lora_rank that loses nothing."""
    K, D, C = config.n_kv_head, config.head_dim, config.n_embd
    k_rows = K * D - 2 * rope_pairs * (K if rope_heads == 'own' else 1) if config.pos == 'rope' else K * D
    return min(C, k_rows) + min(C, K * D) if low_rank == 'split' else min(C, k_rows + K * D)


def for_saving(config, saving, rope_heads, low_rank, rope_pairs=-1):
    """
    (rope_pairs, kv_lora_rank) that leave 1 - saving of the cache of `config`. rope_pairs=-1: a third of what is left is for
    k_pe. Larger ranks are multiples of 8, so that a quantised cache has groups of them. A rank below 1 says that nothing fits.
    """
    K, D, rope = config.n_kv_head, config.head_dim, config.pos == 'rope'
    left, width = int((1 - saving) * 2 * K * D + 1e-9), 2 * (K if rope_heads == 'own' else 1)
    pairs = rope_pairs if rope_pairs >= 0 else max(1, min(D // 2, left // (3 * width))) if rope else 0
    rank = min(left - width * pairs, full_rank(config, pairs, rope_heads, low_rank))
    spare = rank % 8 if rank > 16 else 0
    return pairs + (spare // width if rope and rope_pairs < 0 and pairs < D // 2 - 4 else 0), rank - spare


def check(config, moments, kv_lora_rank, rope_pairs, rope, rope_heads, fold, low_rank, ranks, q_lora_rank):
    """UserError for what cannot be converted, or not so. Returns rope_pairs and kv_lora_rank with their defaults filled in."""
    for name, value, choices in (('rope', rope, ROPES), ('rope_heads', rope_heads, HEADS), ('low_rank', low_rank, LOW_RANKS), ('ranks', ranks, RANKS)):
        if value not in choices:
            raise UserError(f"{name}='{value}' is not known: use {', '.join(choices)}")
    if isinstance(config, MLAConfig):
        raise UserError('the source is an MLA model already: convert one with MHA, GQA or MQA')
    if config.qk_norm:
        raise UserError('the source has QK-norm (qk_norm=True), which cannot pass through a latent: its keys would have to be normed behind W^UK')
    most = 0 if config.pos != 'rope' else config.head_dim // 2 * (config.n_kv_head if rope_heads == 'shared' else 1)
    if rope_pairs > most or rope_pairs < -1:
        what = f'pos={config.pos}, which has no RoPE' if not most else f'{most} pairs {"in all kv heads together" if rope_heads == "shared" else "in a head"}'
        raise UserError(f'rope_pairs={rope_pairs}: the source has {what}; use 0 to {most}, or -1 for all')
    rope_pairs = most if rope_pairs == -1 else rope_pairs
    if fold < 1 or fold > 1 and rope_heads != 'shared':
        raise UserError(f'fold={fold} must be at least 1, and more than 1 only with rope_heads=shared')
    full = full_rank(config, rope_pairs, rope_heads, low_rank)
    if kv_lora_rank < 0 or kv_lora_rank > full:
        raise UserError(f'kv_lora_rank={kv_lora_rank} is above the full rank of keys and values, {full}: use 1 to {full}, or 0 for all of it')
    if q_lora_rank < 0 or q_lora_rank > config.n_embd:
        raise UserError(f'q_lora_rank={q_lora_rank} is above the full rank of the query, {config.n_embd}: use 1 to {config.n_embd}, or 0 for no latent')
    if moments is None and (low_rank not in ('split', 'joint') or rope in ('2-norm', 'turn') and rope_heads == 'own' and 0 < rope_pairs < most):
        raise UserError(f'rope={rope} with low_rank={low_rank} needs calibration text: name some, or use rope=uniform and low_rank=joint')
    return rope_pairs, kv_lora_rank or full


@torch.no_grad()
def convert(model, moments=None, kv_lora_rank=0, rope_pairs=-1, rope='turn', rope_heads='shared', fold=1, real=False, low_rank='balanced',
            ranks='equal', q_lora_rank=0, rotate=False, seed=0, tick=lambda: None):
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
    rope_pairs, R = check(c, moments, kv_lora_rank, rope_pairs, rope, rope_heads, fold, low_rank, ranks, q_lora_rank)
    weight = model.lm_head.weight
    dtype = torch.float64 if weight.device.type != 'mps' and (c.n_embd <= SMALL or weight.is_cuda or moments) else torch.float32
    attentions = [block.attn for block in model.transformer.h]
    covs = [None if moments is None else m.cov.to(weight.device, dtype) for m in moments or attentions]
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
            q_nope, q_pe, k_nope, k_pe, frequencies = q, q[:, :0], k, q.new_zeros(0, q.size(-1)), torch.zeros(0, dtype=torch.long)
        most = min(full_rank(c, rope_pairs, rope_heads, low_rank), 2 * R) if ranks == 'spectrum' else R
        found = latent_factors(k_nope[..., :-1], v[..., :-1], None if covs[n] is None else covs[n][:-1, :-1], most, low_rank)
        whole = torch.cat([k_nope[..., :-1].flatten(0, 1), v[..., :-1].flatten(0, 1)])
        parts.append((torch.cat([q_nope.flatten(0, 1), q_pe.flatten(0, 1)]).to(weight.dtype), k_pe.to(weight.dtype), frequencies,
                      v[..., -1], found, whole.to(weight.dtype)))
        tick()
    each = share_out([found[3] for *_, found, _ in parts], R * c.n_layer) if ranks == 'spectrum' else [R] * c.n_layer

    config = MLAConfig(**{key: getattr(c, key) for key in GPT.Config.keys()} | dict(
        n_kv_head=0, head_dim=nope + 2 * pe, kv_lora_rank=max(each), kv_lora_ranks=tuple(each) if len(set(each)) > 1 else (), q_lora_rank=q_lora_rank,
        qk_nope_head_dim=nope, qk_rope_head_dim=2 * pe, v_head_dim=D, latent_norm=False, source_head_dim=D, pos='none' if c.pos == 'rope' and not pe else c.pos))
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
            turn = torch.linalg.qr(torch.randn(len(down), len(down), dtype=torch.float64, generator=generator)).Q.to(down)
            down, up_k, up_v = turn @ down, up_k @ turn.T, up_v @ turn.T
        up_k, up_v = (t.repeat_interleave(c.n_head // c.n_kv_head, dim=0).flatten(0, 1) for t in (up_k, up_v))
        block.ln_1, block.ln_2, block.mlp = old.ln_1, old.ln_2, old.mlp
        block.attn = attn = MultiHeadLatentAttention(config, n).to(weight.device, weight.dtype)
        new = {'kv_a_proj_with_mqa.weight': torch.cat([down.to(k_pe.dtype), k_pe[:, :-1]]), 'kv_b_proj.weight': torch.cat([up_k, up_v]), 'c_proj.weight': old.attn.c_proj.weight,
               'rope_pairs': frequencies}
        if q_lora_rank:
            root = None if covs[n] is None else root_of(covs[n][:-1, :-1])
            new['q_b_proj.weight'], new['q_a_proj.weight'], _ = factor(q[:, :-1].to(dtype), min(q_lora_rank, len(q)), root)
        else:
            new['q_proj.weight'] = q[:, :-1]
        if c.bias:
            through = torch.einsum('che,he->c', old.attn.c_proj.weight.to(dtype).unflatten(1, (c.n_head, D)), v_bias.repeat_interleave(c.n_head // c.n_kv_head, dim=0))
            new |= {f'q_{"b_" if q_lora_rank else ""}proj.bias': q[:, -1], 'kv_a_proj_with_mqa.bias': torch.cat([k_pe.new_zeros(len(down)), k_pe[:, -1]]),
                    'c_proj.bias': old.attn.c_proj.bias + through.to(weight.dtype)}
            new |= {'q_a_proj.bias': q.new_zeros(q_lora_rank)} if q_lora_rank else {}
        attn.load_state_dict(new)
        tick()
    return mla.train(model.training), told


def kept_energy(whole, up_k, up_v, down, cov):
    """The share of E |[k_nope; v]|² that the latent carries, by the calibration text where there is one, else by the weights: 1 is all."""
    left = whole.to(down) - torch.cat([up_k.flatten(0, 1), up_v.flatten(0, 1)]) @ down
    power = [(w.to(down) @ cov[:-1, :-1] * w if cov is not None else w ** 2).sum().item() for w in (left, whole)]
    return 1 - power[0] / max(power[1], 1e-30)
