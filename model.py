"""
A GPT in one file. With its defaults it is GPT-2 as nanoGPT trains it; through a few settings it is
Llama or DeepSeek-Coder (RoPE, RMSNorm, SwiGLU, grouped heads). What MLA changes is in model_mla.py.

Weights are kept as they are trained (fp32 as a rule) and cast to the dtype of the residual stream
where they are used: `model.stream = torch.bfloat16` is all of mixed precision there is.

Legend: B batch, T tokens, C channels (n_embd), H query heads, K key/value heads, D head dim,
V vocabulary. Weights are (out, in), as torch keeps them.
"""

import math
import warnings
from dataclasses import dataclass, fields
from functools import lru_cache

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from nanomla.core.configurator import UserError
from nanomla.inference import fused_step as step_kernels
from nanomla.training.kernels import gelu

CHOICES = dict(
    pos=('learned', 'rope', 'none'),
    norm=('layernorm', 'rmsnorm'),
    act=('gelu', 'gelu_tanh', 'swiglu', 'relu2'),
    init=('gpt2', 'fan_in'),
    dropout_in=('all', 'residual'),
    kernel=('eager', 'sdpa', 'flash', 'cudnn', 'flex'),
)


@dataclass
class GPTConfig:
    """The shape of a GPT. 0 means: derived as the comment says. UserError where the parts do not fit."""

    block_size: int = 1024
    vocab_size: int = 50304  # GPT-2's 50257 rounded up to a multiple of 64
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    dropout_in: str = 'all'  # 'all': embedding, attention pattern and residual branches, as GPT-2; or only the last
    bias: bool = True  # in Linear and LayerNorm
    n_kv_head: int = 0  # key/value heads: 0 = n_head (MHA), 1 = MQA, between = GQA
    head_dim: int = 0  # 0 = n_embd // n_head
    n_inner: int = 0  # width of the MLP: 0 = 4 n_embd (SwiGLU: 8/3 n_embd, up to a multiple of 64)
    mlp: bool = True  # False: attention only, the models in which circuits are studied
    pos: str = 'learned'
    rope_theta: float = 10000.0
    rope_scaling: float = 1.0  # linear: position p counts as p / rope_scaling
    norm: str = 'layernorm'
    norm_eps: float = 1e-5
    act: str = 'gelu'  # 'gelu' is erf, as in nanoGPT; OpenAI's GPT-2 is 'gelu_tanh'
    qk_norm: bool = False  # RMS norm of each query and key, before RoPE
    softmax_scale: float = 0.0  # of q · k: 0 = 1 / sqrt(width of a query); QK-norm bounds the logits of w normed dims by w times this
    tie_weights: bool = True  # one matrix for token embedding and head
    init: str = 'gpt2'  # 'gpt2': normal(0, 0.02); 'fan_in': normal(0, 1/sqrt(fan_in)) in the blocks
    zero_init: bool = False  # projections into the residual stream start at zero
    kernel: str = 'sdpa'  # attention kernel; results agree, speed and hooks differ

    def __post_init__(self):
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise UserError(
                    f"{name}='{getattr(self, name)}' is not known: use {', '.join(choices)}"
                )
        for name in ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd'):
            if getattr(self, name) < 1:
                raise UserError(f'{name}={getattr(self, name)} must be at least 1')
        for name in ('n_kv_head', 'head_dim', 'n_inner', 'softmax_scale'):
            if getattr(self, name) < 0:
                raise UserError(f'{name}={getattr(self, name)} must be 0 (derived) or more')
        for name in ('rope_theta', 'rope_scaling', 'norm_eps'):
            if not getattr(self, name) > 0:
                raise UserError(f'{name}={getattr(self, name)} must be more than 0')
        if not 0 <= self.dropout < 1:
            raise UserError(f'dropout={self.dropout} must be at least 0 and less than 1')
        self.n_kv_head = self.n_kv_head or self.n_head
        if self.n_head % self.n_kv_head:
            raise UserError(f'n_head={self.n_head} is not a multiple of n_kv_head={self.n_kv_head}')
        if not self.head_dim and self.n_embd % self.n_head:
            raise UserError(
                f'n_embd={self.n_embd} is not a multiple of n_head={self.n_head}: change one or set head_dim'
            )
        self.head_dim = self.head_dim or self.n_embd // self.n_head
        gated = -(-8 * self.n_embd // (3 * 64)) * 64
        self.n_inner = self.n_inner or (gated if self.act == 'swiglu' else 4 * self.n_embd)
        if self.rope_dim % 2:
            raise UserError(f'RoPE turns pairs, so its width must be even, not {self.rope_dim}')

    @property
    def inner_dropout(self):
        return self.dropout if self.dropout_in == 'all' else 0.0

    @property
    def rope_dim(self):
        return self.head_dim if self.pos == 'rope' else 0

    @classmethod
    def keys(cls):
        return [f.name for f in fields(cls)]

    @classmethod
    def from_settings(cls, settings, given=()):
        """
        Return the config that a script's settings (a dict) describe; those that are no fields do not
        count. given: names of the settings that a person set, in contrast to defaults.
        """
        return cls(**{key: settings[key] for key in cls.keys() if key in settings})


class Linear(nn.Linear):
    """A Linear whose weight follows the dtype of its input: master weights stay in fp32."""

    def forward(self, x):
        return F.linear(
            x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype)
        )


class Norm(nn.Module):
    """LayerNorm (with bias or not) or RMSNorm over the last dimension."""

    def __init__(self, width, config, kind=None, eps=None):
        super().__init__()
        self.rms, self.eps = (kind or config.norm) == 'rmsnorm', eps or config.norm_eps
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if config.bias and not self.rms else None

    def forward(self, x):
        weight = self.weight.to(x.dtype)
        if self.rms:
            return F.rms_norm(x, weight.shape, weight, self.eps)
        return F.layer_norm(
            x, weight.shape, weight, None if self.bias is None else self.bias.to(x.dtype), self.eps
        )


def rope_tables(config, positions):
    """
    cos and sin of RoPE (Su et al. 2021, eq. 15), each (T, 1, rope_dim / 2) in fp32, for `positions` (T,); (B, T) gives (B, T, 1, ...).
    Pair k is (k, k + rope_dim / 2), as in Llama; None for a model without RoPE.
    """
    if config.pos != 'rope' or not config.rope_dim:
        return None
    pair = torch.arange(0, config.rope_dim, 2, device=positions.device).float()
    angle = (positions.float() / config.rope_scaling)[..., None] * config.rope_theta ** (
        -pair / config.rope_dim
    )
    return angle.cos()[..., None, :], angle.sin()[..., None, :]


def rotate(x, rope):
    """RoPE on x (B, T, H, D) by `rope` from rope_tables; computed in fp32, returned in x's dtype."""
    if rope is None:
        return x
    cos, sin = rope
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1).to(x.dtype)


# ---------------------------------------------------------------------------------------------------
# attention


def see_past(b, h, i, j):
    return i >= j


@lru_cache(maxsize=16)
def causal_blocks(T, device):
    from torch.nn.attention.flex_attention import create_block_mask

    return create_block_mask(see_past, None, None, T, T, device=device)


@lru_cache(maxsize=1)
def compiled_flex():
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


class Attention(nn.Module):
    """
    What MHA, GQA, MQA and MLA share: causal softmax attention by a chosen kernel and the output
    projection. A kind of attention brings `qkv` (per-head q, k, v as the softmax sees them) and
    `cache_dims` (what one token leaves behind in a layer: name -> width).

    With kernel='eager' the pattern passes through `attn_dropout` (B, H, T, T): hook it to look inside.
    """

    def __init__(self, config, qk_dim, v_dim):
        super().__init__()
        self.n_head, self.qk_dim, self.v_dim = config.n_head, qk_dim, v_dim
        self.kernel, self.qk_norm, self.dropout = (
            config.kernel,
            config.qk_norm,
            config.inner_dropout,
        )
        self.scale = config.softmax_scale or qk_dim**-0.5
        self.c_proj = Linear(config.n_head * v_dim, config.n_embd, bias=config.bias)  # W^O
        self.attn_dropout = nn.Dropout(config.inner_dropout)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x, rope, cache=None):
        """x (B, T, C) -> (B, T, C). cache: this layer's (cache.py), which the T tokens join and attend to all of; or packed documents (packing.py)."""
        q, k, v = self.qkv(x, rope)
        if not hasattr(cache, 'extend'):
            y = self.attend(q, k, v) if cache is None else cache.isolate(self, q, k, v)
        else:
            new = dict(k=k.transpose(1, 2).flatten(2), v=v.transpose(1, 2).flatten(2))
            if cache.fresh:  # a prompt: its tokens see each other and nothing else
                cache.keep(**new)
                y = self.attend(q, k, v)
            elif cache.serves(q.size(2)) and self.kernel != 'eager':
                cache.keep(**new)
                y = cache.attend(q, self.scale)
            else:
                held, seen = cache.extend(**new)
                y = self.attend(
                    q, *(t.unflatten(-1, (k.size(1), -1)).transpose(1, 2) for t in held), seen
                )
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).flatten(2)))

    def attend(self, q, k, v, seen=None):
        """
        softmax(scale q kᵀ + causal mask) v: q (B, H, T, Dq), k (B, K, T, Dq), v (B, K, T, Dv) -> (B, H, T, Dv).
        With a cache k and v have N places, and seen (B, 1, T, N) is the mask: True where a query may look.
        """
        grouped = q.size(1) != k.size(1)
        if self.kernel == 'eager':
            if grouped:
                k, v = (t.repeat_interleave(q.size(1) // k.size(1), dim=1) for t in (k, v))
            future = (
                torch.ones(q.size(2), q.size(2), dtype=torch.bool, device=q.device).triu(1)
                if seen is None
                else ~seen
            )
            logits = (q @ k.mT * self.scale).masked_fill(future, -torch.inf)
            return self.attn_dropout(logits.softmax(-1, dtype=torch.float32).to(v.dtype)) @ v
        if seen is not None:  # only torch's choice takes any mask
            return F.scaled_dot_product_attention(
                q, k, v, attn_mask=seen, scale=self.scale, enable_gqa=grouped
            )
        if self.kernel == 'flex':
            return compiled_flex()(
                q,
                k,
                v,
                block_mask=causal_blocks(q.size(2), q.device),
                scale=self.scale,
                enable_gqa=grouped,
            )
        call = dict(
            is_causal=True,
            scale=self.scale,
            enable_gqa=grouped,
            dropout_p=self.dropout if self.training else 0.0,
        )
        if self.kernel == 'sdpa':  # torch picks the backend
            return F.scaled_dot_product_attention(q, k, v, **call)
        backend = (
            SDPBackend.FLASH_ATTENTION if self.kernel == 'flash' else SDPBackend.CUDNN_ATTENTION
        )
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, **call)

    def normed(self, *tensors):
        """Each tensor with the RMS of its last dimension set to 1, when qk_norm asks for it."""
        return [F.rms_norm(t, t.shape[-1:]) for t in tensors] if self.qk_norm else tensors

    def sizes(self):
        """Heads and width of q, k and v as `attend` gets them."""
        return (self.n_head, self.qk_dim), (self.n_head, self.qk_dim), (self.n_head, self.v_dim)

    def reason_not_to_run(self, device, dtype):
        """Why this kernel cannot run on `device` in `dtype`, with its gradients and in the present mode, as text; '' when it can. It is tried out."""
        if self.kernel == 'flex' and (self.dropout or torch.device(device).type == 'cpu'):
            return (
                'FlexAttention has no dropout'
                if self.dropout
                else 'FlexAttention does not train on the CPU'
            )
        if self.kernel == 'cudnn' and torch.device(device).type != 'cuda':
            return 'cuDNN needs a CUDA GPU'
        q, k, v = (
            torch.zeros(1, heads, 128, d, device=device, dtype=dtype, requires_grad=True)
            for heads, d in self.sizes()
        )
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter('always')
            try:
                self.attend(q, k, v).sum().backward()
                return ''
            except (RuntimeError, NotImplementedError, AssertionError) as error:
                reasons = [str(w.message).split(' (Triggered')[0] for w in said] + [
                    str(error).splitlines()[0]
                ]
                named = (self.kernel, 'both fused') if self.kernel in ('flash', 'cudnn') else ('',)
                return next(
                    (
                        r
                        for r in reasons
                        if any(n in r.lower() for n in named) and 'not used' not in r
                    ),
                    reasons[-1],
                ).rstrip('.')


class MultiHeadAttention(Attention):
    """MHA; GQA and MQA when there are fewer key/value heads than query heads."""

    def __init__(self, config, layer=0):
        super().__init__(config, config.head_dim, config.head_dim)
        self.widths = [
            heads * config.head_dim for heads in (config.n_head, config.n_kv_head, config.n_kv_head)
        ]
        self.c_attn = Linear(config.n_embd, sum(self.widths), bias=config.bias)  # W^Q | W^K | W^V
        self.c_attn.weight.splits = self.widths  # Muon orthogonalises each by itself

    def qkv(self, x, rope):
        q, k, v = (
            t.unflatten(-1, (-1, self.v_dim)) for t in self.c_attn(x).split(self.widths, dim=-1)
        )  # (B, T, heads, D)
        q, k = self.normed(q, k)
        return rotate(q, rope).transpose(1, 2), rotate(k, rope).transpose(1, 2), v.transpose(1, 2)

    def sizes(self):
        return [(width // self.v_dim, self.v_dim) for width in self.widths]

    def cache_dims(self):
        return dict(k=self.widths[1], v=self.widths[2])


# ---------------------------------------------------------------------------------------------------
# the rest of the block


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.act = config.act
        gates = 2 if config.act == 'swiglu' else 1
        self.c_fc = Linear(
            config.n_embd, gates * config.n_inner, bias=config.bias
        )  # SwiGLU: gate | up
        self.c_fc.weight.splits = [config.n_inner] * gates
        self.c_proj = Linear(config.n_inner, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        x = self.c_fc(x)
        if self.act == 'swiglu':
            gate, up = x.chunk(2, dim=-1)
            x = F.silu(gate) * up
        elif self.act == 'relu2':
            x = F.relu(x).square()
        else:
            fused = (
                self.act == 'gelu'
                and x.is_cuda
                and x.dtype != torch.float32
                and torch.compiler.is_compiling()
            )  # F.gelu's erf is slow there
            x = (
                gelu(x)
                if fused
                else F.gelu(x, approximate='tanh' if self.act == 'gelu_tanh' else 'none')
            )
        return self.dropout(self.c_proj(x))


class Block(nn.Module):
    def __init__(self, config, attention):
        super().__init__()
        self.ln_1 = Norm(config.n_embd, config)
        self.attn = attention
        self.ln_2, self.mlp = (
            (Norm(config.n_embd, config), MLP(config)) if config.mlp else (None, None)
        )

    def forward(self, x, rope, cache=None):
        if cache is not None and step_kernels.serves(self, x, cache):
            return step_kernels.block(self, x, rope, cache)
        x = x + self.attn(self.ln_1(x), rope, cache)
        return x if self.mlp is None else x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    Config, Attention = GPTConfig, MultiHeadAttention

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.stream = torch.float32  # dtype of the residual stream, and so of all arithmetic on it
        parts = dict(wte=nn.Embedding(config.vocab_size, config.n_embd))
        if config.pos == 'learned':
            parts['wpe'] = nn.Embedding(config.block_size, config.n_embd)
        parts |= dict(
            drop=nn.Dropout(config.inner_dropout),
            h=nn.ModuleList(
                Block(config, self.Attention(config, n)) for n in range(config.n_layer)
            ),
            ln_f=Norm(config.n_embd, config),
        )
        self.transformer = nn.ModuleDict(parts)
        self.lm_head = Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_weights:
            self.transformer.wte.weight = self.lm_head.weight
        self.init_weights()

    def init_weights(self):
        """
        GPT-2: normal(0, 0.02), projections into the residual stream smaller by sqrt(2 n_layer), biases
        zero (Radford et al. 2019, section 2.3). 'fan_in' and 'zero_init' change the blocks only.
        """
        config = self.config
        for name, module in self.named_modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                std = 0.02
                if isinstance(module, nn.Linear) and config.init == 'fan_in' and name != 'lm_head':
                    std = module.in_features**-0.5
                if name.endswith('c_proj'):
                    std = 0.0 if config.zero_init else std / math.sqrt(2 * config.n_layer)
                nn.init.normal_(module.weight, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, idx, targets=None, cache=None):
        """
        idx (B, T) -> logits (B, T, V); with targets (B, T) -> their mean cross-entropy in nats, fp32.
        Targets of -1 do not count. cache: as in `hidden`.
        """
        x = self.hidden(idx, cache)
        return self.lm_head(x) if targets is None else self.loss(x, targets)

    def hidden(self, idx, cache=None):
        """
        The last block's output after the final norm, (B, T, C). With a cache (cache.py) the tokens go on
        where each of its sequences stands, see what it holds and are held from then on.
        """
        if cache is None:
            x, rope = self.embed(idx)
            for block in self.transformer.h:
                x = block(x, rope)
        else:
            x, rope = self.embed(idx, cache.begin(idx.size(1)))
            for block, layer in zip(self.transformer.h, cache.layers):
                x = block(x, rope, layer)
            cache.end()
        return self.transformer.ln_f(x)

    def embed(self, idx, positions=None):
        """The residual stream before the first block (B, T, C), and RoPE's tables (or None) for `positions` (B, T), or 0 to T - 1."""
        T = idx.size(1)
        assert T <= self.config.block_size, (
            f'{T} tokens do not fit a block of {self.config.block_size}'
        )
        positions = torch.arange(T, device=idx.device) if positions is None else positions
        x = self.transformer.wte(idx)
        if self.config.pos == 'learned':
            x = x + self.transformer.wpe(positions)
        return self.transformer.drop(x.to(self.stream)), rope_tables(self.config, positions)

    def loss(self, x, targets):
        logits = self.lm_head(x).float()
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)

    # -----------------------------------------------------------------------------------------------
    # what a model can say of itself

    def num_params(self):
        """Parameters, a tied matrix once."""
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self, T):
        """
        Forward and backward FLOPs of one token in a sequence of T, as PaLM counts them (Chowdhery et al. 2022,
        appendix B): 6 per weight of a matrix product, plus attention over all T positions. q/k and v may differ in width.
        """
        matrices = sum(m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear))
        attention = sum(
            6 * T * a.n_head * (a.qk_dim + a.v_dim)
            for a in self.modules()
            if isinstance(a, Attention)
        )
        return 6 * matrices + attention

    def estimate_mfu(self, tokens_per_second, peak):
        """Share of `peak` (FLOP/s, machine.peak_flops) that training at this speed on full blocks uses."""
        return self.flops_per_token(self.config.block_size) * tokens_per_second / peak

    def cache_bytes_per_token(self, bytes_per_element=2):
        """What one token leaves in the caches of all layers, in bytes (bf16 by default)."""
        return bytes_per_element * sum(
            sum(b.attn.cache_dims().values()) for b in self.transformer.h
        )

    def check_kernel(self, device):
        """UserError when the chosen attention kernel cannot run on `device` in the stream's dtype."""
        attention = self.transformer.h[0].attn
        if reason := attention.reason_not_to_run(device, self.stream):
            raise UserError(
                f'--kernel={attention.kernel} cannot run on {device} in {str(self.stream)[6:]}: {reason}. Use --kernel=sdpa'
            )

    def crop_block_size(self, block_size):
        """Use a model on shorter blocks than it was made for."""
        if block_size > self.config.block_size:
            raise UserError(
                f'block_size={block_size} is more than the model was made for: {self.config.block_size}'
            )
        self.config.block_size = block_size
        if self.config.pos == 'learned':
            wpe = self.transformer.wpe
            wpe.weight, wpe.num_embeddings = (
                nn.Parameter(wpe.weight[:block_size].detach()),
                block_size,
            )
