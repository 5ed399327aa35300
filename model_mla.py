"""
Multi-head Latent Attention: what it changes in model.py, and nothing else.

DeepSeek-V2 (2024), section 2.1. Keys and values are read out of one small latent a token,
c_kv = W^DKV x, so only that latent (and one rotated key k_pe, shared by all heads) is cached:

    c_kv = norm(W^DKV x)         eq. 9     k_pe   = RoPE(W^KR x)           eq. 15
    k_nope = W^UK c_kv           eq. 10    q_pe   = RoPE(W^QR c_q)         eq. 14
    v = W^UV c_kv                eq. 11    q_nope = W^UQ c_q               eq. 13
    logits = (q_nope · k_nope + q_pe · k_pe) / sqrt(qk_nope_head_dim + qk_rope_head_dim)

The scale differs in a converted model (its source's), with qk_norm_latent, and where softmax_scale
is set: see MultiHeadLatentAttention.__init__.

c_q is norm(W^DQ x), or x itself with q_lora_rank = 0. Two symbols may share a matrix, as in W^UK |
W^UV: first the rows of all heads of the one, then those of the other.

A model that was converted from MHA or GQA (nanomla/conversion) keeps its source's scale and RoPE
frequencies. Its k_pe may be the rotated pairs of several key heads side by side; W^QR is then zero
for the pairs that a query head does not use.

Legend: as in model.py, and R kv_lora_rank, N qk_nope_head_dim, P qk_rope_head_dim, D v_head_dim.
"""

from dataclasses import dataclass

import torch
import torch.nn as nn

from model import GPT, Attention, Context, GPTConfig, Linear, Norm, rotate

LATENT_INITS = ('fan_in', 'gpt2', 'orthogonal')


@dataclass
class MLAConfig(GPTConfig):
    """
    The shape of a GPT with MLA. The early nanoGPT-MLA block with its n_latent is
    kv_lora_rank=n_latent, qk_rope_head_dim=0, latent_norm=False, latent_init='gpt2', pos='learned'.
    """

    pos: str = 'rope'
    q_lora_rank: int = 0  # latent width of the query: 0 = no latent, full-rank W^Q
    kv_lora_rank: int = 512  # latent width of keys and values; with k_pe all that is cached
    qk_nope_head_dim: int = 0  # width of a head without position: 0 = head_dim - qk_rope_head_dim
    qk_rope_head_dim: int = 32  # width of a head with RoPE; 0 = none (then pos must not be 'rope')
    v_head_dim: int = 0  # 0 = head_dim
    latent_norm: bool = True  # RMS norm of the latents
    latent_init: str = 'fan_in'  # of down and up projections: 'fan_in' | 'gpt2' | 'orthogonal'
    qk_norm_latent: bool = False  # with qk_norm: norm a whole query as it meets the cache
    absorb: bool = False  # compute in the latent space, not with keys and values of each head
    kv_lora_ranks: tuple = ()  # one for each layer, where they differ; kv_lora_rank is the largest
    source_head_dim: int = 0  # converted: width of the source's heads (RoPE frequencies, scale)

    shape_names = ()

    def __post_init__(self):
        super().__post_init__()
        if self.n_kv_head != self.n_head:
            raise ValueError(
                f'n_kv_head={self.n_kv_head} does not go with MLA: every head reads the one latent'
            )
        if self.qk_nope_head_dim == 0:
            self.qk_nope_head_dim = self.head_dim - self.qk_rope_head_dim
        if self.v_head_dim == 0:
            self.v_head_dim = self.head_dim
        if (self.pos == 'rope') != (self.qk_rope_head_dim > 0):
            raise ValueError(
                f"pos='{self.pos}' does not go with qk_rope_head_dim={self.qk_rope_head_dim}: "
                "set pos='rope' and a width, or another pos and 0"
            )
        for name, least in dict(
            kv_lora_rank=1, v_head_dim=1, qk_nope_head_dim=0, q_lora_rank=0, qk_rope_head_dim=0
        ).items():
            if getattr(self, name) < least:
                raise ValueError(
                    f'{name}={getattr(self, name)} is no width of MLA: it must be at least {least}'
                )
        self.check_ranks()
        if self.qk_rope_head_dim % 2 or self.source_head_dim < 0:
            raise ValueError(
                f'qk_rope_head_dim={self.qk_rope_head_dim} must be even and '
                f'source_head_dim={self.source_head_dim} at least 0'
            )
        if self.qk_norm_latent and not (self.qk_norm and self.latent_norm):
            raise ValueError(
                'qk_norm_latent=True needs qk_norm=True and latent_norm=True: '
                'it is QK-norm with a normed latent as the key'
            )
        if self.latent_init not in LATENT_INITS:
            known = ', '.join(LATENT_INITS)
            raise ValueError(f"latent_init='{self.latent_init}' is not known: use {known}")

    def check_ranks(self):
        """Raise a ValueError unless kv_lora_ranks is empty or has a rank for every layer."""
        ranks = self.kv_lora_ranks = tuple(self.kv_lora_ranks)
        if not ranks:
            return
        if len(ranks) != self.n_layer or min(ranks) < 1 or max(ranks) != self.kv_lora_rank:
            raise ValueError(
                f'kv_lora_ranks={ranks} must be one for each of {self.n_layer} layers, '
                f'the largest kv_lora_rank={self.kv_lora_rank}'
            )

    @classmethod
    def from_settings(cls, settings: dict, given: set | dict = (), **changes) -> 'MLAConfig':
        """As GPTConfig's; where nobody set `pos`, it follows from qk_rope_head_dim."""
        if 'pos' not in given:
            width = settings.get('qk_rope_head_dim', cls.qk_rope_head_dim)
            changes = dict(pos='rope' if width else 'learned') | changes
        return super().from_settings(settings, given, **changes)

    @property
    def rope_dim(self) -> int:
        """Width of RoPE's tables: twice the frequencies there are to choose from."""
        if self.qk_rope_head_dim and self.source_head_dim:
            return self.source_head_dim
        return self.qk_rope_head_dim

    @property
    def label(self) -> str:
        return 'MLA'

    @property
    def shape(self) -> str:
        return f'{self.n_head}:{self.kv_lora_rank}+{self.qk_rope_head_dim}'

    @classmethod
    def shape_settings(cls, name: str, widths: str, n_head: int) -> dict:
        """As GPTConfig's: mla:256+32 has a latent of 256 and a rotated key of 32."""
        settings = dict(n_kv_head=0)
        if widths:
            R, plus, P = widths.partition('+')
            if not (plus and R.isdecimal() and P.isdecimal()):
                raise ValueError('write mla:256+32 for a latent of 256 and a rotated key of 32')
            settings |= dict(kv_lora_rank=int(R), qk_rope_head_dim=int(P))
        return settings

    def rank(self, layer: int) -> int:
        return self.kv_lora_ranks[layer] if self.kv_lora_ranks else self.kv_lora_rank


class MultiHeadLatentAttention(Attention):
    """MLA in its naive form (keys and values of every head) and absorbed (in the latent space)."""

    can_absorb = True

    def __init__(self, config: MLAConfig, layer: int = 0):
        H, R = config.n_head, config.rank(layer)
        N, P, D = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
        if config.source_head_dim:
            scale_width = config.source_head_dim
        elif config.qk_norm_latent:
            scale_width = R + P
        else:
            scale_width = N + P
        super().__init__(config, qk_dim=N + P, v_dim=D, scale_width=scale_width)
        self.nope = N
        self.rotates = layer not in config.nope_layers
        self.pe = P
        self.absorb = config.absorb
        self.q_lora_rank = config.q_lora_rank
        self.qk_norm_latent = config.qk_norm_latent
        self.q_widths = [H * N, H * P]
        self.a_widths = [R, P]
        self.b_widths = [H * N, H * D]

        def linear(n_in, widths, bias=config.bias, heads=1):
            module = Linear(n_in, sum(widths), bias=bias)
            module.weight.splits = widths  # Muon orthogonalises each symbol's rows by themselves
            module.weight.heads = [heads] * len(widths)  # or each head's of each symbol
            return module

        if config.q_lora_rank:
            self.q_a_proj = linear(config.n_embd, [config.q_lora_rank])  # W^DQ
            self.q_a_layernorm = latent_norm(config.q_lora_rank, config)
            self.q_b_proj = linear(config.q_lora_rank, self.q_widths, heads=H)  # W^UQ | W^QR
        else:
            self.q_proj = linear(config.n_embd, self.q_widths, heads=H)  # W^UQ | W^QR
        self.kv_a_proj_with_mqa = linear(config.n_embd, self.a_widths)  # W^DKV | W^KR
        self.kv_a_layernorm = latent_norm(R, config)
        self.kv_b_proj = linear(R, self.b_widths, bias=False, heads=H)  # W^UK | W^UV
        rope_pairs = None  # (P / 2,): the source's pair whose frequency each pair of k_pe has
        if config.source_head_dim:  # a conversion writes its own choice over these
            rope_pairs = torch.arange(P // 2) % (config.source_head_dim // 2)
        self.register_buffer('rope_pairs', rope_pairs)

    # ---------------------------------------------------------------------------------------------
    # the symbols of the paper

    def query(self, x, rope):
        """Return q_nope (B, T, H, N) and q_pe (B, T, H, P), rotated."""
        if self.q_lora_rank:
            q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        else:
            q = self.q_proj(x)
        q_nope, q_pe = self.heads(q, self.q_widths)
        q_nope, q_pe = self.normed_query(q_nope, q_pe)
        return q_nope, self.rotated(q_pe, rope)

    def normed_query(self, q_nope, q_pe):
        """
        QK-norm of q_nope (..., H, N) and q_pe (..., H, P): each by itself, or with qk_norm_latent
        both by the RMS of [W^UKᵀ q_nope | q_pe], the absorbed query.

        The absorbed key, [c_kv | k_pe], has an RMS of 1 (times the latent norm's gain). With both
        normed |logit| <= sqrt(R + P), which a head can spend on content or on positions. Norming
        q_nope and q_pe each by itself sets no such bound: nothing norms what W^UK gives.
        """
        if not self.qk_norm_latent:
            return self.normed(q_nope, q_pe)
        w_uk, _ = self.up_projections(q_nope.dtype)
        whole = torch.cat([torch.einsum('...hn,hnr->...hr', q_nope, w_uk), q_pe], dim=-1)
        at_least_fp32 = torch.promote_types(whole.dtype, torch.float32)
        norm = torch.linalg.vector_norm(whole, dim=-1, keepdim=True, dtype=at_least_fp32)
        factor = (whole.size(-1) ** 0.5 / norm.clamp(min=1e-6)).to(q_nope.dtype)
        return q_nope * factor, q_pe * factor

    def latent(self, x, rope):
        """Return c_kv (B, T, R) and k_pe (B, T, P), rotated: what a cache holds."""
        c_kv, k_pe = self.kv_a_proj_with_mqa(x).split(self.a_widths, dim=-1)
        (k_pe,) = self.normed(k_pe)  # not k_nope: a norm after W^UK could not be absorbed
        return self.kv_a_layernorm(c_kv), self.rotated(k_pe[:, :, None], rope)[:, :, 0]

    def rotated(self, x, rope):
        """
        Apply RoPE to x (B, T, heads, P). In a converted model pair k has the frequency of its
        source's pair rope_pairs[k]; several may have the same.
        """
        return rotate(x, self.own_tables(rope))

    def own_tables(self, rope):
        """Return the tables of this layer's pairs; None in a layer without RoPE."""
        if rope is None or not self.rotates:
            return None
        if self.rope_pairs is None:
            return rope
        return [table[..., self.rope_pairs] for table in rope]

    def heads(self, x, widths):
        """(B, T, sum of widths) -> for each symbol (B, T, H, its width in a head)."""
        parts = x.split(widths, dim=-1)
        return [t.unflatten(-1, (self.n_head, t.size(-1) // self.n_head)) for t in parts]

    def up_projections(self, dtype):
        """Return W^UK (H, N, R) and W^UV (H, D, R)."""
        parts = self.kv_b_proj.weight.split(self.b_widths)
        return [w.unflatten(0, (self.n_head, -1)).to(dtype) for w in parts]

    # ---------------------------------------------------------------------------------------------
    # naive: every head's own keys and values

    def qkv(self, x, rope):
        """Return q, k (B, H, T, N + P) and v (B, H, T, D), read out of the latent."""
        return self.read_out(*self.query(x, rope), *self.latent(x, rope))

    def read_out(self, q_nope, q_pe, c_kv, k_pe):
        """As `qkv`, of what `query` and `latent` return; c_kv and k_pe may come from a cache."""
        k_nope, v = self.content(c_kv)
        k_pe = k_pe[:, :, None].expand(-1, -1, self.n_head, -1)
        q = torch.cat([q_nope, q_pe], dim=-1)
        k = torch.cat([k_nope, k_pe], dim=-1)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def content(self, c_kv):
        """Return k_nope = W^UK c_kv (B, T, H, N) and v = W^UV c_kv (B, T, H, D)."""
        return self.heads(self.kv_b_proj(c_kv), self.b_widths)

    # ---------------------------------------------------------------------------------------------
    # absorbed: q_nope · (W^UK c_kv) = (W^UKᵀ q_nope) · c_kv, and the heads' sums of c_kv go through
    # W^UV once. All heads share one key [c_kv | k_pe] and one value c_kv, as in MQA.

    def absorb_query(self, q_nope):
        """Return W^UKᵀ q_nope (B, H, T, R) of q_nope (B, T, H, N)."""
        w_uk, _ = self.up_projections(q_nope.dtype)
        return torch.einsum('bthn,hnr->bhtr', q_nope, w_uk)

    def read_values(self, y):
        """Return the heads' values (B, H, T, D) of their sums of c_kv, y (B, H, T, R)."""
        _, w_uv = self.up_projections(y.dtype)
        return torch.einsum('bhtr,hdr->bhtd', y, w_uv)

    def absorbed_qkv(self, q_nope, q_pe, c_kv, k_pe):
        """Return q (B, H, T, R + P), k (B, 1, T, R + P) and v (B, 1, T, R)."""
        q = torch.cat([self.absorb_query(q_nope), q_pe.transpose(1, 2)], dim=-1)
        c_kv = c_kv[:, None]
        return q, torch.cat([c_kv, k_pe[:, None]], dim=-1), c_kv

    def head_outputs(self, x, rope, context: Context | None = None):
        if context is not None and context.is_cache:
            return self.attend_cached(x, rope, context)
        if not (self.absorb and self.can_absorb):
            return super().head_outputs(x, rope, context)
        q, k, v = self.absorbed_qkv(*self.query(x, rope), *self.latent(x, rope))
        if context is None:
            y = self.attend(q, k, v)
        else:
            y = context.attend(self, q, k, v)
        return self.read_values(y)

    def attend_cached(self, x, rope, cache: Context):
        """
        Append the latents of x (B, T, C) to a cache's layer and attend to all of it: (B, H, T, D).

        A prompt into an empty cache is naive. So is a chunk long enough that expanding every cached
        latent into keys and values once costs fewer FLOPs than attending to latents; the rest is
        absorbed.
        """
        q_nope, q_pe = self.query(x, rope)
        c_kv, k_pe = self.latent(x, rope)
        T = x.size(1)
        if cache.fresh:
            cache.write(c_kv=c_kv, k_pe=k_pe)
            return self.attend(*self.read_out(q_nope, q_pe, c_kv, k_pe))
        if self.can_absorb and cache.reads_in_place(T) and self.kernel != 'eager':
            cache.write(c_kv=c_kv, k_pe=k_pe)
            q_pe = q_pe.transpose(1, 2) if self.pe else None
            return self.read_values(
                cache.attend_in_place(self.absorb_query(q_nope), self.scale, q_pe)
            )
        (c_kv, k_pe), mask = cache.append(c_kv=c_kv, k_pe=k_pe)
        # Multiply-adds a cached token and head: T (2 R + P) absorbed; naive T (N + P + D) to attend
        # and R (N + D) to expand.
        R, read = self.a_widths[0], self.nope + self.v_dim
        if not self.can_absorb or T * (2 * R - read) > R * read:
            return self.attend(*self.read_out(q_nope, q_pe, c_kv, k_pe), mask)
        q, k, v = self.absorbed_qkv(q_nope, q_pe, c_kv, k_pe)
        return self.read_values(self.attend(q, k, v, mask))

    # ---------------------------------------------------------------------------------------------
    # what caches, kernels and analyses ask

    def sizes(self):
        if not (self.absorb and self.can_absorb):
            return super().sizes()
        R, P = self.a_widths
        return [(self.n_head, R + P), (1, R + P), (1, R)]

    def cache_dims(self):
        return dict(c_kv=self.a_widths[0], k_pe=self.pe)

    def fused_step(self, x, norm, rope, cache, ops):
        """As MultiHeadAttention's, absorbed: one new token of each sequence, (B, H, D)."""
        H, P = self.n_head, self.pe
        if norm is not None and len(x) > 1:  # several sequences: norm once for both products
            x, norm = ops.norm_rows(x, norm), None
        if self.q_lora_rank:
            norm_q = self.q_a_layernorm if isinstance(self.q_a_layernorm, Norm) else None
            c_q = ops.fused_linear(x, self.q_a_proj.weight, self.q_a_proj.bias, norm)
            q = ops.fused_linear(c_q, self.q_b_proj.weight, self.q_b_proj.bias, norm_q)
        else:
            q = ops.fused_linear(x, self.q_proj.weight, self.q_proj.bias, norm)
        down = self.kv_a_proj_with_mqa
        c_kv, k_pe = ops.fused_linear(x, down.weight, down.bias, norm).split(self.a_widths, dim=-1)
        q_nope, q_pe = q.split(self.q_widths, dim=-1)
        if self.qk_norm:
            by_head = (t.unflatten(-1, (H, -1)) for t in (q_nope, q_pe))
            q_nope, q_pe = (t.flatten(1) for t in self.normed_query(*by_head))
            k_pe = nn.functional.rms_norm(k_pe, (P,))
        norm_kv = self.kv_a_layernorm if isinstance(self.kv_a_layernorm, Norm) else None
        q_pe = cache.rope_and_append(
            q_pe,
            self.own_tables(rope),
            rope_widths=(P, 0, P),
            norm=norm_kv,
            c_kv=c_kv,
            k_pe=k_pe,
        )
        w_uk, w_uv = self.up_projections(x.dtype)
        q = ops.fused_linear(q_nope.unflatten(-1, (H, -1)), w_uk.transpose(1, 2))
        q_pe = q_pe.unflatten(-1, (H, P))[:, :, None] if P else None
        y = cache.attend_in_place(q[:, :, None], self.scale, q_pe)[:, :, 0]
        return ops.fused_linear(y, w_uv)

    def scale_logits(self, factors):
        """
        As MultiHeadAttention's: q_nope and k_nope by the square root each. All heads share k_pe, so
        q_pe takes the whole factor.
        """
        N, P, D = self.nope, self.pe, self.v_dim
        roots = factors.sqrt().repeat_interleave(N)
        ones = torch.ones_like(factors).repeat_interleave(D)
        q = self.q_b_proj if self.q_lora_rank else self.q_proj
        q.scale_rows(torch.cat([roots, factors.repeat_interleave(P)]))
        self.kv_b_proj.scale_rows(torch.cat([roots, ones]))

    def circuit_weights(self):
        """
        As MultiHeadAttention's, with the latents' norms folded in (g is the gain before a matrix):
        W_V = W^DKV diag(g) W^UV, W_K = W^DKV diag(g) W^UK, W_Q = W^UQ or W^DQ diag(g) W^UQ. The
        RoPE term stays apart: q_pe and k_pe (H, C, P), where there is one.
        """
        H = self.n_head

        def by_head(weight):  # (H * D, C) -> (H, C, D)
            return weight.float().view(H, weight.size(0) // H, weight.size(1)).mT

        def folded(weight, norm):  # W^D diag(g), (C, R)
            gain = norm.weight.float() if isinstance(norm, Norm) else 1.0
            return weight.float().T * gain

        w_dkv, w_kr = self.kv_a_proj_with_mqa.weight.split(self.a_widths)
        w_uk, w_uv = self.up_projections(torch.float32)
        down = folded(w_dkv, self.kv_a_layernorm)
        if self.q_lora_rank:
            w_uq, w_qr = self.q_b_proj.weight.split(self.q_widths)
            down_q = folded(self.q_a_proj.weight, self.q_a_layernorm)
            q, q_pe = down_q @ by_head(w_uq), down_q @ by_head(w_qr)
        else:
            q, q_pe = (by_head(w) for w in self.q_proj.weight.split(self.q_widths))
        weights = dict(q=q, k=down @ w_uk.mT, v=down @ w_uv.mT)
        if self.pe:
            weights |= dict(q_pe=q_pe, k_pe=w_kr.float().T.expand(H, -1, -1))
        return weights | dict(o=self.c_proj.weight.float().T.unflatten(0, (H, -1)))


def latent_norm(width, config):
    if config.latent_norm:
        return Norm(width, config, kind='rmsnorm', eps=1e-6)
    return nn.Identity()


class GPT_MLA(GPT):
    Config, Attention = MLAConfig, MultiHeadLatentAttention

    def init_weights(self) -> None:
        """
        As GPT's. But down and up projections, two matrices in a row, would leave hardly any signal
        at a std of 0.02: 'fan_in' gives them 1 / sqrt(fan_in), 'orthogonal' `orthogonal_latents`.
        """
        super().init_weights()
        if self.config.latent_init == 'orthogonal':
            self.orthogonal_latents()
        if self.config.latent_init == 'fan_in':
            for name, module in self.named_modules():
                if name.endswith(('_a_proj', '_b_proj', 'kv_a_proj_with_mqa')):
                    nn.init.normal_(module.weight, std=module.in_features**-0.5)

    def orthogonal_latents(self) -> None:
        """
        Give each head's part of an up projection orthogonal rows of one length (columns, where the
        latent is narrower than a head), so that no direction of the latent is preferred.

        Their length gives values the size that they have in MHA at the start, 0.02 sqrt(C).
        """
        size = 0.02 * self.config.n_embd**0.5 if self.config.latent_norm else 1.0
        for block in self.transformer.h:
            attention = block.attn
            symbols = []
            if attention.q_lora_rank:
                symbols += attention.q_b_proj.weight.data.split(attention.q_widths)
            symbols += attention.kv_b_proj.weight.data.split(attention.b_widths)
            for symbol in symbols:
                if symbol.numel() == 0:
                    continue
                for head in symbol.chunk(attention.n_head):
                    wider = max(1.0, head.size(0) / head.size(1))  # a head wider than its latent
                    nn.init.orthogonal_(head, size * wider**0.5)
