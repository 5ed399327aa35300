"""
A GPT in one file. With its defaults it is GPT-2 as nanoGPT trains it; through a few settings it is
Llama or DeepSeek-Coder (RoPE, RMSNorm, SwiGLU, grouped heads). What MLA changes is in model_mla.py.

Weights are kept as they are trained (fp32 as a rule) and cast to the dtype of the residual stream
where they are used: `model.stream = torch.bfloat16` is all of mixed precision there is.

This file needs torch alone. Settings that do not fit raise a ValueError with one line.

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
    """The shape of a GPT; 0 means derived, as the comment says. ValueError if parts do not fit."""

    block_size: int = 1024
    vocab_size: int = 50304  # GPT-2's 50257 rounded up to a multiple of 64
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    dropout_in: str = 'all'  # all (embedding, attention, residual branches: GPT-2's) | residual
    bias: bool = True  # in Linear and LayerNorm
    n_kv_head: int = 0  # key/value heads: 0 = n_head (MHA), 1 = MQA, between = GQA
    head_dim: int = 0  # 0 = n_embd // n_head
    n_inner: int = 0  # width of the MLP: 0 = 4 n_embd (SwiGLU: 8/3 n_embd, a multiple of 64)
    mlp: bool = True  # False: attention only, the models in which circuits are studied
    pos: str = 'learned'
    rope_theta: float = 10000.0
    rope_scaling: float = 1.0  # linear: position p counts as p / rope_scaling
    rope_frequencies: tuple = ()  # of each pair, in the place of those by rope_theta
    nope_layers: tuple = ()  # layers without RoPE in a model with it
    norm: str = 'layernorm'
    norm_eps: float = 1e-5
    act: str = 'gelu'  # 'gelu' is erf, as in nanoGPT; OpenAI's GPT-2 is 'gelu_tanh'
    qk_norm: bool = False  # RMS norm of each query and key, before RoPE
    softmax_scale: float = 0.0  # of q · k: 0 = 1 / sqrt(width of a query)
    tie_weights: bool = True  # one matrix for token embedding and head
    init: str = 'gpt2'  # 'gpt2': normal(0, 0.02); 'fan_in': normal(0, 1/sqrt(fan_in)) in the blocks
    zero_init: bool = False  # projections into the residual stream start at zero
    kernel: str = 'sdpa'  # attention kernel; results agree, speed and hooks differ

    shape_names = ('gqa', 'mqa')  # for --models=gqa:4 beside the attention's own name

    def __post_init__(self):
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                known = ', '.join(choices)
                raise ValueError(f"{name}='{getattr(self, name)}' is not known: use {known}")
        for name in ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd'):
            if getattr(self, name) < 1:
                raise ValueError(f'{name}={getattr(self, name)} must be at least 1')
        for name in ('n_kv_head', 'head_dim', 'n_inner', 'softmax_scale'):
            if getattr(self, name) < 0:
                raise ValueError(f'{name}={getattr(self, name)} must be 0 (derived) or more')
        for name in ('rope_theta', 'rope_scaling', 'norm_eps'):
            if not getattr(self, name) > 0:
                raise ValueError(f'{name}={getattr(self, name)} must be more than 0')
        if not 0 <= self.dropout < 1:
            raise ValueError(f'dropout={self.dropout} must be at least 0 and less than 1')
        if self.n_kv_head == 0:
            self.n_kv_head = self.n_head
        if self.n_head % self.n_kv_head:
            raise ValueError(
                f'n_head={self.n_head} is not a multiple of n_kv_head={self.n_kv_head}'
            )
        if self.head_dim == 0:
            if self.n_embd % self.n_head:
                raise ValueError(
                    f'n_embd={self.n_embd} is not a multiple of n_head={self.n_head}: '
                    'change one or set head_dim'
                )
            self.head_dim = self.n_embd // self.n_head
        if self.n_inner == 0:
            if self.act == 'swiglu':
                self.n_inner = math.ceil(8 * self.n_embd / (3 * 64)) * 64
            else:
                self.n_inner = 4 * self.n_embd
        if self.rope_dim % 2:
            raise ValueError(f'RoPE rotates pairs: its width must be even, not {self.rope_dim}')
        if len(self.rope_frequencies) not in (0, self.rope_dim // 2):
            raise ValueError(f'rope_frequencies must be {self.rope_dim // 2}, one for each pair')

    @property
    def inner_dropout(self) -> float:
        return self.dropout if self.dropout_in == 'all' else 0.0

    @property
    def rope_dim(self) -> int:
        return self.head_dim if self.pos == 'rope' else 0

    @property
    def label(self) -> str:
        """The name of the attention for people."""
        if self.n_kv_head == self.n_head:
            return 'MHA'
        return 'MQA' if self.n_kv_head == 1 else 'GQA'

    @property
    def shape(self) -> str:
        """The shape of the attention, heads:key/value heads:width, for tables."""
        return f'{self.n_head}:{self.n_kv_head}:{self.head_dim}'

    @classmethod
    def shape_settings(cls, name: str, widths: str, n_head: int) -> dict:
        """
        Return the settings that a short name stands for: mha, mqa, gqa (about a third of n_head
        key/value heads) or, with widths after a colon, gqa:4. ValueError for others.
        """
        if widths and (name != 'gqa' or not widths.isdecimal()):
            raise ValueError('write gqa:4 for 4 key/value heads')
        if name == 'mqa':
            return dict(n_kv_head=1)
        if name != 'gqa':
            return dict(n_kv_head=0)
        between = [n for n in range(2, n_head) if n_head % n == 0]
        n_kv_head = min(between, key=lambda n: abs(n - n_head / 3), default=0)
        if widths:
            n_kv_head = int(widths)
        if n_kv_head not in between:
            raise ValueError(
                f'GQA has more than one key/value head and fewer than n_head={n_head}, and divides '
                'them'
            )
        return dict(n_kv_head=n_kv_head)

    @classmethod
    def keys(cls) -> list[str]:
        return [f.name for f in fields(cls)]

    @classmethod
    def from_settings(cls, settings: dict, given: set | dict = (), **changes) -> 'GPTConfig':
        """
        Take this class's fields out of a script's settings. `given` names those a person set, for
        subclasses with a default that depends on it.
        """
        return cls(**{key: settings[key] for key in cls.keys() if key in settings} | changes)


class Linear(nn.Linear):
    """A Linear whose weight follows the dtype of its input: master weights stay in fp32."""

    def forward(self, x):
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)

    @torch.no_grad()
    def scale_rows(self, factors):
        """Multiply row i of the weight, and entry i of the bias, by factors[i], in place."""
        self.weight.mul_(factors[:, None])
        if self.bias is not None:
            self.bias.mul_(factors)


class Norm(nn.Module):
    """LayerNorm (with bias or not) or RMSNorm over the last dimension."""

    def __init__(self, width: int, config: GPTConfig, kind: str = '', eps: float = 0.0):
        super().__init__()
        self.rms = (kind or config.norm) == 'rmsnorm'
        self.eps = eps or config.norm_eps
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if config.bias and not self.rms else None

    def forward(self, x):
        weight = self.weight.to(x.dtype)
        if self.rms:
            return F.rms_norm(x, weight.shape, weight, self.eps)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.layer_norm(x, weight.shape, weight, bias, self.eps)


# Copied once and kept: while a CUDA graph is recorded nothing may be copied to the GPU.
@lru_cache(maxsize=16)
def on_device(numbers: tuple, device) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.float32, device=device)


def rope_tables(config: GPTConfig, positions: torch.Tensor):
    """
    Return cos and sin of RoPE (Su et al. 2021, eq. 15), each (T, 1, rope_dim / 2) in fp32, for
    `positions` (T,); (B, T) gives (B, T, 1, ...). None for a model without RoPE.

    Pair k is (k, k + rope_dim / 2), as in Llama.
    """
    if config.pos != 'rope' or not config.rope_dim:
        return None
    pair = torch.arange(0, config.rope_dim, 2, device=positions.device).float()
    frequency = config.rope_theta ** (-pair / config.rope_dim)
    if config.rope_frequencies:
        frequency = on_device(tuple(config.rope_frequencies), positions.device)
    angle = (positions.float() / config.rope_scaling)[..., None] * frequency
    return angle.cos()[..., None, :], angle.sin()[..., None, :]


def rotate(x, rope):
    """Apply RoPE to x (B, T, H, D) by `rope` from rope_tables; in fp32, returned in x's dtype."""
    if rope is None:
        return x
    cos, sin = rope
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1).to(x.dtype)


# -------------------------------------------------------------------------------------------------
# attention


class Context:
    """
    What the tokens of a forward pass attend to, where that is not simply all tokens before them in
    their row: cached sequences (nanomla/inference/cache.py) or packed documents
    (nanomla/adapters/packing.py). GPT.hidden asks it for positions and for each layer's context.
    """

    # True for a layer of a cache, which also has fresh, write, append, reads_in_place,
    # attend_in_place and rope_and_append (CacheLayer in nanomla/inference/cache.py).
    is_cache = False

    def begin(self, T: int) -> torch.Tensor:
        """Start a pass of T tokens a row and return their positions (B, T)."""
        raise NotImplementedError

    def layer(self, n: int) -> 'Context':
        """Return what layer n attends to."""
        return self

    def end(self) -> None:
        """Finish the pass, after the last layer."""

    def attend(self, attention: 'Attention', q, k, v):
        """
        Return causal attention of q (B, H, T, Dq) over what this context allows of the pass's own
        k (B, K, T, Dq) and v (B, K, T, Dv), and of what it has cached: (B, H, T, Dv).
        """
        raise NotImplementedError


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
    `cache_dims` (what one token caches in a layer: name -> width).

    With kernel='eager' the pattern (B, H, T, T) passes through `attn_dropout`: hook it to see it.

    scale_width: the softmax scale is 1 / sqrt(scale_width) where the config does not set it.
    """

    # What only some attentions have. None means no: the caller then takes the plain path.
    fused_step = None  # (x, norm, rope, cache, ops): a token by nanomla/inference/fused_step.py
    circuit_weights = None  # (): matrices of each head for nanomla/heads/circuits.py
    can_absorb = False  # decodes in the latent space by `absorb_query` and `read_values`
    latent = None  # (x, rope): c_kv and k_pe, what MLA caches
    scale_logits = None  # (factors): multiply the logits of each head by weights of its own

    # Where it is set, `attend` calls it with the q, k and mask that the softmax is about to see.
    watch = None

    def __init_subclass__(cls, **kwargs):
        """
        A subclass may compute something else, so what its base class says of itself does not hold
        for it: what it does not define anew is "no" again. `latent` is inherited: `qkv` calls it,
        so it is right for the subclass, too.
        """
        super().__init_subclass__(**kwargs)
        for name in ('fused_step', 'circuit_weights', 'can_absorb', 'scale_logits'):
            if name not in cls.__dict__:
                setattr(cls, name, getattr(Attention, name))

    def __init__(self, config: GPTConfig, qk_dim: int, v_dim: int, scale_width: int = 0):
        super().__init__()
        self.n_head = config.n_head
        self.qk_dim = qk_dim
        self.v_dim = v_dim
        self.kernel = config.kernel
        self.qk_norm = config.qk_norm
        self.dropout = config.inner_dropout
        self.scale = config.softmax_scale  # of the logits
        if self.scale == 0:
            self.scale = (scale_width or qk_dim) ** -0.5
        self.c_proj = Linear(config.n_head * v_dim, config.n_embd, bias=config.bias)  # W^O
        self.attn_dropout = nn.Dropout(config.inner_dropout)
        self.resid_dropout = nn.Dropout(config.dropout)

    def qkv(self, x, rope):
        """Return q (B, H, T, Dq), k (B, K, T, Dq) and v (B, K, T, Dv) of x (B, T, C)."""
        raise NotImplementedError

    def cache_dims(self) -> dict[str, int]:
        """Return what one token caches in a layer: name -> width."""
        raise NotImplementedError

    def forward(self, x, rope, context: Context | None = None):
        """x (B, T, C) -> (B, T, C), by RoPE's tables and what `context` lets tokens attend to."""
        return self.output(self.head_outputs(x, rope, context))

    def head_outputs(self, x, rope, context: Context | None = None):
        """Return what `output` merges, (B, H, T, Dv); the arguments are those of `forward`."""
        q, k, v = self.qkv(x, rope)
        if context is None:
            return self.attend(q, k, v)
        return context.attend(self, q, k, v)

    def output(self, y):
        """Merge the heads y (B, H, T, Dv) and project them into the residual stream: (B, T, C)."""
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).flatten(2)))

    def attend(self, q, k, v, mask=None):
        """
        softmax(scale q kᵀ + causal mask) v: q (B, H, T, Dq), k (B, K, T, Dq), v (B, K, T, Dv)
        -> (B, H, T, Dv). With a cache k and v have N slots, and mask (B, 1, T, N) is True where a
        query may attend.
        """
        if self.kernel == 'sdpa' and q.device.type == 'cpu' and v.size(-1) < k.size(-1):
            # torch's fused kernel for CPUs takes keys and values of one width only
            padded = F.pad(v, (0, k.size(-1) - v.size(-1)))
            return self.attend(q, k, padded, mask)[..., : v.size(-1)]
        if self.watch is not None:
            self.watch(q, k, mask)
        if self.kernel == 'eager':
            return self.attend_eagerly(q, k, v, mask)
        grouped = q.size(1) != k.size(1)
        if mask is not None:  # only the backend that torch picks takes any mask
            return F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, scale=self.scale, enable_gqa=grouped
            )
        if self.kernel == 'flex':
            blocks = causal_blocks(q.size(2), q.device)
            return compiled_flex()(q, k, v, block_mask=blocks, scale=self.scale, enable_gqa=grouped)
        options = dict(
            is_causal=True,
            scale=self.scale,
            enable_gqa=grouped,
            dropout_p=self.dropout if self.training else 0.0,
        )
        if self.kernel == 'sdpa':  # torch picks the backend
            return F.scaled_dot_product_attention(q, k, v, **options)
        backends = dict(flash=SDPBackend.FLASH_ATTENTION, cudnn=SDPBackend.CUDNN_ATTENTION)
        with sdpa_kernel(backends[self.kernel]):
            return F.scaled_dot_product_attention(q, k, v, **options)

    def attend_eagerly(self, q, k, v, mask=None):
        """`attend` in plain operations; the pattern (B, H, T, N) passes through attn_dropout."""
        groups = q.size(1) // k.size(1)
        if groups > 1:
            k = k.repeat_interleave(groups, dim=1)
            v = v.repeat_interleave(groups, dim=1)
        if mask is None:
            T = q.size(2)
            future = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1)
        else:
            future = ~mask
        logits = (q @ k.mT * self.scale).masked_fill(future, -torch.inf)
        pattern = logits.softmax(-1, dtype=torch.float32).to(v.dtype)
        return self.attn_dropout(pattern) @ v

    def normed(self, *tensors):
        """Return the tensors, with qk_norm each with the RMS of its last dimension set to 1."""
        if not self.qk_norm:
            return tensors
        return [F.rms_norm(t, t.shape[-1:]) for t in tensors]

    def sizes(self) -> list[tuple[int, int]]:
        """Return heads and width of q, k and v as `attend` gets them."""
        return [(self.n_head, self.qk_dim), (self.n_head, self.qk_dim), (self.n_head, self.v_dim)]

    def reason_not_to_run(self, device, dtype) -> str:
        """
        Say why this kernel cannot run on `device` in `dtype`, with its gradients and in the present
        mode; '' when it can. It is tried out on 128 tokens.
        """
        device = torch.device(device)
        if self.kernel == 'flex' and self.dropout:
            return 'FlexAttention has no dropout'
        if self.kernel == 'flex' and device.type == 'cpu':
            return 'FlexAttention does not train on the CPU'
        if self.kernel == 'cudnn' and device.type != 'cuda':
            return 'cuDNN needs a CUDA GPU'
        q, k, v = (
            torch.zeros(1, heads, 128, width, device=device, dtype=dtype, requires_grad=True)
            for heads, width in self.sizes()
        )
        with warnings.catch_warnings(record=True) as caught, torch.enable_grad():
            warnings.simplefilter('always')
            try:
                self.attend(q, k, v).sum().backward()
                return ''
            except (RuntimeError, NotImplementedError, AssertionError) as error:
                reasons = [str(w.message).split(' (Triggered')[0] for w in caught]
                reasons.append(str(error).splitlines()[0])
        # torch warns about every backend that it passes over: "Flash attention requires ...",
        # "Both fused kernels require ...". The one about this kernel says more than the error.
        about = ['']  # '' is in every text: any warning will do
        if self.kernel in ('flash', 'cudnn'):
            about = [self.kernel, 'both fused']
        for reason in reasons:
            if 'not used' not in reason and any(name in reason.lower() for name in about):
                return reason.rstrip('.')
        return reasons[-1].rstrip('.')


class CompressedAttention(Attention):
    """
    An attention that caches something smaller than keys and values, and computes keys and values
    from it at every step.

    A subclass defines `query(x, rope)`: q (B, H, T, Dq); `compress(x, rope)`: a dict of what
    `cache_dims` names, each (B, T, width), in that order; and `expand(*compressed)`, which takes
    these and returns k (B, K, T, Dq) and v (B, K, T, Dv).
    """

    def qkv(self, x, rope):
        return self.query(x, rope), *self.expand(*self.compress(x, rope).values())

    def head_outputs(self, x, rope, context: Context | None = None):
        if context is None or not context.is_cache:
            return super().head_outputs(x, rope, context)
        compressed = self.compress(x, rope)
        mask = None
        if context.fresh:
            context.write(**compressed)
            cached = compressed.values()
        else:
            cached, mask = context.append(**compressed)
        return self.attend(self.query(x, rope), *self.expand(*cached), mask)


class MultiHeadAttention(Attention):
    """MHA; GQA and MQA when there are fewer key/value heads than query heads."""

    def __init__(self, config: GPTConfig, layer: int = 0):
        super().__init__(config, config.head_dim, config.head_dim)
        heads = (config.n_head, config.n_kv_head, config.n_kv_head)
        self.widths = [n * config.head_dim for n in heads]
        self.c_attn = Linear(config.n_embd, sum(self.widths), bias=config.bias)  # W^Q | W^K | W^V
        self.c_attn.weight.splits = self.widths  # Muon orthogonalises each by itself
        self.c_attn.weight.heads = heads  # or each head of each
        self.rotates = layer not in config.nope_layers

    def qkv(self, x, rope):
        parts = self.c_attn(x).split(self.widths, dim=-1)
        q, k, v = (t.unflatten(-1, (-1, self.v_dim)) for t in parts)  # (B, T, heads, D)
        q, k = self.normed(q, k)
        rope = rope if self.rotates else None
        return rotate(q, rope).transpose(1, 2), rotate(k, rope).transpose(1, 2), v.transpose(1, 2)

    def sizes(self):
        return [(width // self.v_dim, self.v_dim) for width in self.widths]

    def cache_dims(self):
        return dict(k=self.widths[1], v=self.widths[2])

    def fused_step(self, x, norm, rope, cache, ops):
        """
        Return the heads' outputs (B, H, D) for one new token of each sequence.

        x (B, C): the residual stream; norm: the norm before this attention, None where x is normed
        already; ops: the module nanomla/inference/fused_step.
        """
        D = self.v_dim
        qkv = ops.fused_linear(x, self.c_attn.weight, self.c_attn.bias, norm)
        q, k, v = qkv.split(self.widths, dim=-1)
        if self.qk_norm:
            q, k = (F.rms_norm(t.unflatten(-1, (-1, D)), (D,)).flatten(1) for t in (q, k))
        rope = rope if self.rotates else None
        # RoPE rotates the whole of each query and key head, and no value.
        q = cache.rope_and_append(q, rope, rope_widths=(D, D, 0), k=k, v=v)
        y = cache.attend_in_place(q.unflatten(-1, (-1, D))[:, :, None], self.scale)
        return y[:, :, 0]

    def scale_logits(self, factors):
        """
        Multiply the logits of head h by factors[h]: its query and its key by the square root each.
        With GQA and MQA other heads read the key, too, so the query takes the whole factor.
        """
        D, (_, k_width, v_width) = self.v_dim, self.widths
        of_q = factors.repeat_interleave(D)  # (H * D,)
        of_k_and_v = of_q.new_ones(k_width + v_width)
        if k_width == len(of_q):  # a key for every head
            of_q = of_q.sqrt()
            of_k_and_v[:k_width] = of_q
        self.c_attn.scale_rows(torch.cat([of_q, of_k_and_v]))

    def circuit_weights(self):
        """
        The matrices of every head, in fp32: q, k (H, C, D) and v (H, C, D) read the normed residual
        stream, o (H, D, C) writes into it. Key/value heads are repeated for their query heads.
        """
        H = self.n_head
        parts = self.c_attn.weight.float().split(self.widths)
        q, k, v = (w.unflatten(0, (-1, self.v_dim)).mT for w in parts)
        k, v = (w.repeat_interleave(H // w.size(0), dim=0) for w in (k, v))
        return dict(q=q, k=k, v=v, o=self.c_proj.weight.float().T.unflatten(0, (H, -1)))


# -------------------------------------------------------------------------------------------------
# the rest of the block

LOG2E = math.log2(math.e)

# log2 of the normal distribution's upper tail, erfc(a / sqrt 2) / 2 for a >= 0, as a polynomial in
# a, constant last. Fitted by reweighted least squares on [0, 6] for the least error of erf: 1.5e-8,
# and 2e-7 in fp32 arithmetic. It falls for all a. Against Abramowitz & Stegun 7.1.26: no division,
# and half the instructions.
LOG2_TAIL = (
    -2.7720496e-06,
    3.8620750e-05,
    -1.8254761e-04,
    -1.4582987e-04,
    7.0754718e-03,
    -5.2505028e-02,
    -0.45920491,
    -1.1511058,
    -1.0,
)


def normal_cdf(x):
    """Φ(x) = (1 + erf(x / sqrt 2)) / 2 within 1e-7 for fp32 x: eight multiply-adds and one 2^x."""
    a = x.abs()
    power = LOG2_TAIL[0]
    for coefficient in LOG2_TAIL[1:]:
        power = power * a + coefficient
    tail = torch.exp2(power)
    return torch.where(x < 0, tail, 1 - tail)


class Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return (x.float() * normal_cdf(x.float())).to(x.dtype)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        y = x.float()
        # exp(-x²/2) / sqrt(2 pi) as a power of 2: 1.3257... = log2(sqrt(2 pi))
        density = torch.exp2(y * y * (-0.5 * LOG2E) - 1.3257480647361593)
        return (g.float() * (normal_cdf(y) + y * density)).to(x.dtype)


def gelu(x):
    """
    x Φ(x), the GELU with erf (Hendrycks & Gimpel 2016), in fp32 inside and in x's dtype outside;
    its error is that of F.gelu in fp32 or less. Plain operations for torch.compile to fuse: 13
    instructions an element and 18 backward on sm_90, where libdevice's erf takes 34 and 44 and
    keeps the GPU from its memory bandwidth. Uncompiled, F.gelu is faster.
    """
    return Gelu.apply(x)


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.act = config.act
        gates = 2 if config.act == 'swiglu' else 1
        self.c_fc = Linear(config.n_embd, gates * config.n_inner, bias=config.bias)  # gate | up
        self.c_fc.weight.splits = [config.n_inner] * gates
        self.c_proj = Linear(config.n_inner, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        return self.dropout(self.c_proj(self.activate(self.c_fc(x))))

    def activate(self, x):
        if self.act == 'swiglu':
            gate, up = x.chunk(2, dim=-1)
            return F.silu(gate) * up
        if self.act == 'relu2':
            return F.relu(x).square()
        if self.act == 'gelu_tanh':
            return F.gelu(x, approximate='tanh')
        if x.is_cuda and x.dtype != torch.float32 and torch.compiler.is_compiling():
            return gelu(x)  # F.gelu's erf is slow there
        return F.gelu(x)


class Block(nn.Module):
    def __init__(self, config: GPTConfig, attention: Attention):
        super().__init__()
        self.ln_1 = Norm(config.n_embd, config)
        self.attn = attention
        self.post_1 = None  # a norm of what the attention writes, which a subclass may have
        self.ln_2 = Norm(config.n_embd, config) if config.mlp else None
        self.mlp = MLP(config) if config.mlp else None

    def forward(self, x, rope, context: Context | None = None):
        x = x + self.attn(self.ln_1(x), rope, context)
        if self.mlp is None:
            return x
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    Config, Attention = GPTConfig, MultiHeadAttention

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.stream = torch.float32  # dtype of the residual stream, and so of all arithmetic on it
        parts = dict(wte=nn.Embedding(config.vocab_size, config.n_embd))
        if config.pos == 'learned':
            parts['wpe'] = nn.Embedding(config.block_size, config.n_embd)
        parts['drop'] = nn.Dropout(config.inner_dropout)
        parts['h'] = nn.ModuleList(
            self.make_block(config, layer) for layer in range(config.n_layer)
        )
        parts['ln_f'] = Norm(config.n_embd, config)
        self.transformer = nn.ModuleDict(parts)
        self.lm_head = Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_weights:
            self.transformer.wte.weight = self.lm_head.weight
        # Weights without memory have no values, and torch takes long to draw none.
        if not self.lm_head.weight.is_meta:
            self.init_weights()

    def make_block(self, config: GPTConfig, layer: int) -> Block:
        return Block(config, self.Attention(config, layer))

    def init_weights(self) -> None:
        """
        GPT-2: normal(0, 0.02), projections into the residual stream smaller by sqrt(2 n_layer),
        biases zero (Radford et al. 2019, section 2.3). 'fan_in' and 'zero_init' change the blocks.
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

    def forward(self, idx, targets=None, context: Context | None = None):
        """
        idx (B, T) -> logits (B, T, V); with targets (B, T) -> mean cross-entropy in nats, fp32.
        Targets of -1 do not count. context: as in `hidden`.
        """
        x = self.hidden(idx, context)
        if targets is None:
            return self.lm_head(x)
        return self.loss(x, targets)

    def hidden(self, idx, context: Context | None = None):
        """
        Return the last block's output after the final norm, (B, T, C). With a cache as `context`
        row b of idx continues sequence b of the cache and is appended to it.
        """
        if context is None:
            x, rope = self.embed(idx)
            for block in self.transformer.h:
                x = block(x, rope)
        else:
            x, rope = self.embed(idx, context.begin(idx.size(1)))
            for n, block in enumerate(self.transformer.h):
                x = block(x, rope, context.layer(n))
            context.end()
        return self.transformer.ln_f(x)

    def embed(self, idx, positions=None):
        """
        Return the residual stream before the first block (B, T, C), and RoPE's tables (or None)
        for `positions` (B, T); without them for 0 to T - 1.
        """
        T = idx.size(1)
        block_size = self.config.block_size
        assert T <= block_size, f'{T} tokens do not fit a block of {block_size}'
        if positions is None:
            positions = torch.arange(T, device=idx.device)
        x = self.transformer.wte(idx)
        if self.config.pos == 'learned':
            x = x + self.transformer.wpe(positions)
        return self.transformer.drop(x.to(self.stream)), rope_tables(self.config, positions)

    def loss(self, x, targets):
        """Return the mean cross-entropy in nats of x (B, T, C) of `hidden`, as `forward` does."""
        logits = self.lm_head(x).float()
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)

    # ---------------------------------------------------------------------------------------------
    # facts about a model

    def num_params(self) -> int:
        """Count the parameters, a tied matrix once."""
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self, T: int) -> int:
        """
        Count forward and backward FLOPs of one token in a sequence of T as PaLM does (Chowdhery
        et al. 2022, appendix B): 6 per weight of a matrix product, plus attention over all T
        positions. q/k and v may differ in width.
        """
        matrices = sum(m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear))
        attentions = [m for m in self.modules() if isinstance(m, Attention)]
        attention = sum(6 * T * a.n_head * (a.qk_dim + a.v_dim) for a in attentions)
        return 6 * matrices + attention

    def estimate_mfu(self, tokens_per_second: float, peak: float) -> float:
        """Return the share of `peak` FLOP/s that training at this speed on full blocks uses."""
        return self.flops_per_token(self.config.block_size) * tokens_per_second / peak

    def cache_bytes_per_token(self, bytes_per_element: int = 2) -> int:
        """Return the bytes that one token takes in the caches of all layers (bf16 by default)."""
        return bytes_per_element * sum(
            sum(b.attn.cache_dims().values()) for b in self.transformer.h
        )

    def check_kernel(self, device) -> None:
        """Raise a ValueError when the kernel cannot run on `device` in the stream's dtype."""
        attention = self.transformer.h[0].attn
        reason = attention.reason_not_to_run(device, self.stream)
        if reason:
            dtype = str(self.stream).removeprefix('torch.')
            raise ValueError(
                f'--kernel={attention.kernel} cannot run on {device} in {dtype}: {reason}. '
                'Use --kernel=sdpa'
            )

    def crop_block_size(self, block_size: int) -> None:
        """Use a model on shorter blocks than it was made for."""
        if block_size > self.config.block_size:
            raise ValueError(
                f'block_size={block_size} is more than the model was made for: '
                f'{self.config.block_size}'
            )
        self.config.block_size = block_size
        if self.config.pos == 'learned':
            wpe = self.transformer.wpe
            wpe.weight = nn.Parameter(wpe.weight[:block_size].detach())
            wpe.num_embeddings = block_size
