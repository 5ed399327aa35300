"""
Multi-head Latent Attention: what it changes in model.py, and nothing else.

DeepSeek-V2 (2024), section 2.1. Keys and values are read out of one small latent a token,
c_kv = W^DKV x, so only that latent (and one rotated key k_pe, shared by all heads) has to be cached:

    c_kv = norm(W^DKV x)         eq. 9     k_pe   = RoPE(W^KR x)           eq. 15
    k_nope = W^UK c_kv           eq. 10    q_pe   = RoPE(W^QR c_q)         eq. 14
    v = W^UV c_kv                eq. 11    q_nope = W^UQ c_q               eq. 13
    logits = (q_nope · k_nope + q_pe · k_pe) / sqrt(qk_nope_head_dim + qk_rope_head_dim)

c_q is norm(W^DQ x), or x itself with q_lora_rank = 0. In the matrices that hold two symbols their
rows stand one after the other, all heads of the first, then all heads of the second.

A model that conversion.py made of MHA or GQA keeps its source's scale and RoPE frequencies; k_pe may hold the
rotated pairs of several heads side by side, and W^QR is zero where a query has no business with them.

Legend: as in model.py, and R kv_lora_rank, N qk_nope_head_dim, P qk_rope_head_dim, D v_head_dim.
"""

from dataclasses import dataclass

import torch
import torch.nn as nn

from model import GPT, Attention, GPTConfig, Linear, Norm, rotate
from nanomla.core.configurator import UserError


@dataclass
class MLAConfig(GPTConfig):
    pos: str = 'rope'
    q_lora_rank: int = 0  # latent width of the query: 0 = no latent, full-rank W^Q
    kv_lora_rank: int = 512  # latent width of keys and values; with k_pe all that is cached
    qk_nope_head_dim: int = 0  # width of a head without position: 0 = head_dim - qk_rope_head_dim
    qk_rope_head_dim: int = (
        32  # width of a head with RoPE; 0 = none at all (then pos must not be 'rope')
    )
    v_head_dim: int = 0  # 0 = head_dim
    latent_norm: bool = True  # RMS norm of the latents
    latent_init: str = (
        'fan_in'  # 'fan_in' | 'gpt2' | 'orthogonal': how the down and up projections start
    )
    qk_norm_latent: bool = False  # with qk_norm: norm each whole query as it meets the cache, [W^UKᵀ q_nope | q_pe], and scale by 1 / sqrt(R + P)
    absorb: bool = (
        False  # compute in the latent space (for decoding), not with per-head keys and values
    )
    kv_lora_ranks: tuple = ()  # one for each layer, where they differ; kv_lora_rank is then the largest
    source_head_dim: int = 0  # of a converted model: the width of its source's heads, whose RoPE frequencies and softmax scale it keeps
    # The early nanoGPT-MLA block with its n_latent: kv_lora_rank=n_latent, qk_rope_head_dim=0,
    # latent_norm=False, latent_init='gpt2', pos='learned'.

    def __post_init__(self):
        super().__post_init__()
        if self.n_kv_head != self.n_head:
            raise UserError(
                f'n_kv_head={self.n_kv_head} does not go with MLA: every head reads the one latent'
            )
        self.qk_nope_head_dim = self.qk_nope_head_dim or self.head_dim - self.qk_rope_head_dim
        self.v_head_dim = self.v_head_dim or self.head_dim
        if (self.pos == 'rope') != (self.qk_rope_head_dim > 0):
            raise UserError(
                f"pos='{self.pos}' does not go with qk_rope_head_dim={self.qk_rope_head_dim}: "
                "set pos='rope' and a width, or another pos and 0"
            )
        if (
            min(self.kv_lora_rank, self.v_head_dim) < 1
            or min(self.qk_nope_head_dim, self.q_lora_rank, self.qk_rope_head_dim) < 0
        ):
            raise UserError(
                f'MLA widths must be positive: kv_lora_rank={self.kv_lora_rank}, qk_nope_head_dim={self.qk_nope_head_dim}, '
                f'qk_rope_head_dim={self.qk_rope_head_dim}, v_head_dim={self.v_head_dim}, q_lora_rank={self.q_lora_rank}'
            )
        self.kv_lora_ranks = tuple(self.kv_lora_ranks)
        if self.kv_lora_ranks and (
            len(self.kv_lora_ranks) != self.n_layer
            or min(self.kv_lora_ranks) < 1
            or max(self.kv_lora_ranks) != self.kv_lora_rank
        ):
            raise UserError(
                f'kv_lora_ranks={self.kv_lora_ranks} must be one for each of {self.n_layer} layers, the largest kv_lora_rank={self.kv_lora_rank}'
            )
        if self.qk_rope_head_dim % 2 or self.source_head_dim < 0:
            raise UserError(
                f'qk_rope_head_dim={self.qk_rope_head_dim} must be even and source_head_dim={self.source_head_dim} at least 0'
            )
        if self.qk_norm_latent and not (self.qk_norm and self.latent_norm):
            raise UserError(
                'qk_norm_latent=True needs qk_norm=True and latent_norm=True: it is QK-norm with a normed latent as the key'
            )
        if self.latent_init not in ('fan_in', 'gpt2', 'orthogonal'):
            raise UserError(
                f"latent_init='{self.latent_init}' is not known: use fan_in, gpt2 or orthogonal"
            )

    @classmethod
    def from_settings(cls, settings, given=()):
        """As GPTConfig's. Where no `pos` was given, it is what goes with qk_rope_head_dim."""
        if 'pos' not in given:
            rope_width = settings.get('qk_rope_head_dim', cls.qk_rope_head_dim)
            settings = dict(settings, pos='rope' if rope_width else 'learned')
        return super().from_settings(settings, given)

    @property
    def rope_dim(self):
        """Width of RoPE's tables: twice the frequencies there are to choose from."""
        return (
            self.source_head_dim
            if self.source_head_dim and self.qk_rope_head_dim
            else self.qk_rope_head_dim
        )

    def rank(self, layer):
        return self.kv_lora_ranks[layer] if self.kv_lora_ranks else self.kv_lora_rank


class MultiHeadLatentAttention(Attention):
    """MLA in its naive form (keys and values of every head) and, with absorb, in the latent space."""

    def __init__(self, config, layer=0):
        super().__init__(
            config, config.qk_nope_head_dim + config.qk_rope_head_dim, config.v_head_dim
        )
        H, R = config.n_head, config.rank(layer)
        self.nope, self.pe, self.absorb = (
            config.qk_nope_head_dim,
            config.qk_rope_head_dim,
            config.absorb,
        )
        self.q_widths = [H * self.nope, H * self.pe]
        self.a_widths = [R, self.pe]
        self.b_widths = [H * self.nope, H * self.v_dim]

        def linear(n_in, widths, bias=config.bias):
            layer = Linear(n_in, sum(widths), bias=bias)
            layer.weight.splits = widths  # Muon orthogonalises each symbol's rows by themselves
            return layer

        if config.q_lora_rank:
            self.q_a_proj = linear(config.n_embd, [config.q_lora_rank])  # W^DQ
            self.q_a_layernorm = self.latent_norm(config.q_lora_rank, config)
            self.q_b_proj = linear(config.q_lora_rank, self.q_widths)  # W^UQ | W^QR
        else:
            self.q_proj = linear(config.n_embd, self.q_widths)  # W^UQ | W^QR
        self.kv_a_proj_with_mqa = linear(config.n_embd, self.a_widths)  # W^DKV | W^KR
        self.kv_a_layernorm = self.latent_norm(R, config)
        self.kv_b_proj = linear(R, self.b_widths, bias=False)  # W^UK | W^UV
        self.qk_norm_latent = config.qk_norm_latent
        self.scale = (
            config.softmax_scale
            or (config.source_head_dim or (R + self.pe if self.qk_norm_latent else self.qk_dim))
            ** -0.5
        )
        self.register_buffer(
            'rope_pairs',
            torch.arange(self.pe // 2) % (config.source_head_dim // 2)
            if config.source_head_dim
            else None,
        )

    @staticmethod
    def latent_norm(width, config):
        return (
            Norm(width, config, kind='rmsnorm', eps=1e-6) if config.latent_norm else nn.Identity()
        )

    def query(self, x, rope):
        """q_nope (B, T, H, N) and q_pe (B, T, H, P), rotated."""
        q = (
            self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
            if hasattr(self, 'q_a_proj')
            else self.q_proj(x)
        )
        q_nope, q_pe = self.heads(q, self.q_widths)
        q_nope, q_pe = self.normed_query(q_nope, q_pe)
        return q_nope, self.rotated(q_pe, rope)

    def normed_query(self, q_nope, q_pe):
        """
        QK-norm of q_nope (..., H, N) and q_pe (..., H, P): each by itself, or with qk_norm_latent both by the RMS of [W^UKᵀ q_nope | q_pe].
        What is cached, [c_kv | k_pe], has an RMS of 1 (times the latent norm's gain), so |logit| <= sqrt(R + P), all of it for positions
        or for content as a head likes; without it W^UK, which has no norm behind it, may grow.
        """
        if not self.qk_norm_latent:
            return self.normed(q_nope, q_pe)
        w_uk = (
            self.kv_b_proj.weight[: self.b_widths[0]]
            .unflatten(0, (self.n_head, -1))
            .to(q_nope.dtype)
        )
        whole = torch.cat([torch.einsum('...hn,hnr->...hr', q_nope, w_uk), q_pe], dim=-1)
        norm = torch.linalg.vector_norm(
            whole, dim=-1, keepdim=True, dtype=torch.promote_types(whole.dtype, torch.float32)
        )
        by = (whole.size(-1) ** 0.5 / norm.clamp(min=1e-6)).to(q_nope.dtype)
        return q_nope * by, q_pe * by

    def latent(self, x, rope):
        """c_kv (B, T, R) and k_pe (B, T, P), rotated: what a cache holds."""
        c_kv, k_pe = self.kv_a_proj_with_mqa(x).split(self.a_widths, dim=-1)
        (k_pe,) = self.normed(
            k_pe
        )  # k_nope is left alone: a norm behind W^UK could not be absorbed
        return self.kv_a_layernorm(c_kv), self.rotated(k_pe[:, :, None], rope)[:, :, 0]

    def rotated(self, x, rope):
        """RoPE; pair k of a converted model turns as pair rope_pairs[k] of its source does, and several may turn alike."""
        return rotate(
            x,
            rope
            if self.rope_pairs is None or rope is None
            else [t[..., self.rope_pairs] for t in rope],
        )

    def heads(self, x, widths):
        """(B, T, sum of widths) -> for each symbol (B, T, H, its width in a head)."""
        return [
            t.unflatten(-1, (self.n_head, t.size(-1) // self.n_head))
            for t in x.split(widths, dim=-1)
        ]

    def qkv(self, x, rope):
        """q, k (B, H, T, N + P) and v (B, H, T, D): every head's own keys and values, read out of the latent."""
        return self.read_out(*self.query(x, rope), *self.latent(x, rope))

    def read_out(self, q_nope, q_pe, c_kv, k_pe):
        """The naive form's q, k, v out of what `query` gives and what `latent` gave, then or before."""
        k_nope, v = self.heads(self.kv_b_proj(c_kv), self.b_widths)
        k_pe = k_pe[:, :, None].expand(-1, -1, self.n_head, -1)
        q, k = torch.cat([q_nope, q_pe], dim=-1), torch.cat([k_nope, k_pe], dim=-1)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def forward(self, x, rope, cache=None):
        """
        Naive, or absorbed: q_nope · (W^UK c_kv) = (W^UKᵀ q_nope) · c_kv, and the heads' sums of c_kv go through W^UV
        once. Then all heads share one key [c_kv | k_pe] and one value c_kv, as in MQA. With a cache a prompt is naive,
        and so are more tokens at a time than reading out every held key and value costs.
        """
        if not self.absorb and not hasattr(cache, 'extend'):  # no cache, or packed documents
            return super().forward(x, rope, cache)
        q_nope, q_pe = self.query(x, rope)
        (c_kv, k_pe), seen, T = self.latent(x, rope), None, x.size(1)
        if cache is not None and cache.fresh:
            cache.keep(c_kv=c_kv, k_pe=k_pe)
            y = self.attend(*self.read_out(q_nope, q_pe, c_kv, k_pe)).transpose(1, 2)
            return self.resid_dropout(self.c_proj(y.flatten(2)))
        fused = cache is not None and cache.serves(T) and self.kernel != 'eager'
        if fused:
            cache.keep(c_kv=c_kv, k_pe=k_pe)
        elif cache is not None:
            (c_kv, k_pe), seen = cache.extend(c_kv=c_kv, k_pe=k_pe)
            R, a_key = self.a_widths[0], self.nope + self.v_dim
            if (
                T * (2 * R - a_key) > R * a_key
            ):  # FLOPs of a place and head: T (2 R + P) against T (N + P + D) and R (N + D)
                y = self.attend(*self.read_out(q_nope, q_pe, c_kv, k_pe), seen).transpose(1, 2)
                return self.resid_dropout(self.c_proj(y.flatten(2)))
        w_uk, w_uv = (
            w.unflatten(0, (self.n_head, -1)).to(x.dtype)
            for w in self.kv_b_proj.weight.split(self.b_widths)
        )
        q, q_pe = torch.einsum('bthn,hnr->bhtr', q_nope, w_uk), q_pe.transpose(1, 2)
        if fused:
            y = cache.attend(q, self.scale, q_pe if self.pe else None)
        else:
            c_kv, k_pe = c_kv[:, None], k_pe[:, None]
            y = self.attend(
                torch.cat([q, q_pe], dim=-1), torch.cat([c_kv, k_pe], dim=-1), c_kv, seen
            )
        y = torch.einsum('bhtr,hdr->bthd', y, w_uv)
        return self.resid_dropout(self.c_proj(y.flatten(2)))

    def sizes(self):
        if not self.absorb:
            return super().sizes()
        R, P = self.a_widths
        return (self.n_head, R + P), (1, R + P), (1, R)

    def cache_dims(self):
        return dict(c_kv=self.a_widths[0], k_pe=self.pe)


class GPT_MLA(GPT):
    Config, Attention = MLAConfig, MultiHeadLatentAttention

    def init_weights(self):
        """
        GPT's, but two stacked 0.02 matrices would leave hardly any signal: latents start by fan-in. Or 'orthogonal': each head's
        part of an up projection has orthogonal rows (columns, where the latent is narrower than a head) of one length, so that it reads all
        of the latent alike, times what gives a value MHA's size, 0.02 sqrt(C).
        """
        super().init_weights()
        if self.config.latent_init == 'orthogonal':
            for attention in [
                module for module in self.modules() if isinstance(module, MultiHeadLatentAttention)
            ]:
                for name, widths in (
                    ('q_b_proj', attention.q_widths),
                    ('kv_b_proj', attention.b_widths),
                ):
                    for symbol in (
                        getattr(attention, name).weight.data.split(widths)
                        if hasattr(attention, name)
                        else ()
                    ):
                        for head in symbol.chunk(attention.n_head) if symbol.numel() else ():
                            size = (
                                0.02 * self.config.n_embd**0.5 if self.config.latent_norm else 1.0
                            )
                            nn.init.orthogonal_(
                                head, size * max(1.0, head.size(0) / head.size(1)) ** 0.5
                            )  # a head wider than its latent, too
        if self.config.latent_init == 'fan_in':
            for name, module in self.named_modules():
                if name.endswith(('_a_proj', '_b_proj', 'kv_a_proj_with_mqa')):
                    nn.init.normal_(module.weight, std=module.in_features**-0.5)
