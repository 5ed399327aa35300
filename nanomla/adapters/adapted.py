"""
The models of the adapter benchmark: what a cell asks for, and GPT as it asks for it.

A cell is an adapter, an attention kernel, and ours or the peer: lora/sdpa, lora/sdpa/peer.

Legend: B rows of a batch, T tokens of a row, C channels, H heads, D head dim.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import torch
import torch.nn as nn
import torch.nn.functional as F

from model import GPT, GPTConfig
from nanomla.adapters import lora
from nanomla.adapters.lora import LoraSettings, UnavailableError
from nanomla.adapters.packing import Batch
from nanomla.adapters.step import ForwardSettings, TrainingForward, flops_per_token, loss_of
from nanomla.checkpoints import hf
from nanomla.conversion import calibration
from nanomla.conversion.convert import convert
from nanomla.conversion.settings import ConversionSettings
from nanomla.core.checks import split_list
from nanomla.core.configurator import UserError
from nanomla.inference.cache import Cache
from nanomla.inference.generate import generate

KERNELS = {  # what a cell may ask for -> the kernel of the attention modules
    'eager': 'eager',
    'sdpa': 'sdpa',
    'flash': 'flash',
    'cudnn': 'cudnn',
    'flex': 'flex',
    'paged': 'sdpa',  # generation from a paged cache
    'mla': 'sdpa',  # attention converted to MLA
    'latent': 'sdpa',  # PerceiverAttention, an exhibit that is not causal
}
ATTENTION_TARGETS = ('q_proj', 'k_proj', 'v_proj', 'o_proj')

Prompts = Sequence[Sequence[int]]  # token ids of several prompts, of any lengths


@dataclass(frozen=True)
class CellName:
    """A cell of the grid."""

    adapter: str
    kernel: str
    peer: bool = False

    @classmethod
    def parse(cls, name: str) -> 'CellName':
        """Return the cell that a name means: lora/sdpa or lora/sdpa/peer."""
        adapter, kernel, *peer = name.split('/')
        return cls(adapter, kernel, bool(peer))

    def __str__(self) -> str:
        name = f'{self.adapter}/{self.kernel}'
        return f'{name}/peer' if self.peer else name


@dataclass(frozen=True)
class CellSettings:
    """The settings of a cell: those of bench_adapters.py, explained there, without the grid's."""

    model: str
    block_size: int
    dtype: str
    master_weights: bool
    lora_r: int
    lora_alpha: int
    lora_dropout: float
    targets: str
    double_quant: bool
    mla_rank: int
    mla_rope_pairs: int
    latents: int
    data: str
    n_train: int
    n_val: int
    template: str
    completion_only: bool
    packing: bool
    batch_size: int
    accumulation: int
    epochs: float
    steps: int
    warmup_steps: int
    learning_rate: float
    weight_decay: float
    grad_clip: float
    seed: int
    seeds: int
    device: str
    compile: bool
    recompute: str
    save_width: float
    spared_layers: int
    loss_chunk: int
    max_new_tokens: int
    profile: bool
    peer_checkpointing: bool

    @classmethod
    def of(cls, settings: dict) -> 'CellSettings':
        """Return the cell's part of all settings."""
        return cls(**{field.name: settings[field.name] for field in fields(cls)})

    @property
    def has_random_weights(self) -> bool:
        return self.model.startswith('random:')

    def weights_dtype(self, kind: str, stream: torch.dtype) -> torch.dtype:
        """Return the dtype of the weights, where `stream` is that of the residual stream."""
        if kind == 'full' and self.master_weights:
            return torch.float32
        return stream


class AdaptedModel:
    """
    A model to be fine-tuned, as the measurement needs it: OurModel, or the peer.

    model, tokenizer: the tokenizer is None for random weights
    causal:     whether no token sees a later one
    parameters: (trainable, all)
    flops:      FLOPs of one trained token
    bytes_per_parameter: of the blocks' weights; None where nobody counts them
    setting:    recomputation, in words
    cache:      kind of the cache that `answers` uses, for the results
    """

    model: nn.Module
    tokenizer = None
    causal = True
    parameters: tuple[int, int]
    flops: float
    bytes_per_parameter: float | None = None
    setting = ''
    cache = 'none'

    def set_up(self, documents: bool) -> None:
        """Prepare for training; documents: batches have packed documents."""

    def loss(self, batch: Batch, count: torch.Tensor) -> torch.Tensor:
        """Return the batch's summed cross-entropy divided by `count`, in nats."""
        raise NotImplementedError

    def likeliest(self, batch: Batch) -> torch.Tensor:
        """Return the likeliest next token after every token, (B, T)."""
        raise NotImplementedError

    def answers(self, asked: Sequence[tuple[Prompts, int]]) -> Iterator[torch.Tensor]:
        """For each (prompts, n), one after the other, yield n greedy tokens a prompt, (B, n)."""
        raise NotImplementedError


class OurModel(AdaptedModel):
    """
    GPT, adapted as `kind` says, with the attention that `kernel` names.

    calibration_rows (M, T): text for a conversion to MLA. UnavailableError where the kernel cannot
    run here or the model cannot be converted so.
    """

    def __init__(
        self,
        s: CellSettings,
        kind: str,
        kernel: str,
        device: torch.device,
        stream: torch.dtype,
        calibration_rows: torch.Tensor | None = None,
    ):
        self.s, self.kernel, self.device = s, kernel, device
        dtype = s.weights_dtype(kind, stream)
        model = self.load(dtype)
        model.stream = stream
        if kernel == 'mla':
            if stream != torch.float32:
                model.float()
            model = to_mla(model, calibration_rows, s.mla_rank, s.mla_rope_pairs).to(dtype)
        elif kernel == 'latent':
            replace_attention(model, s.latents, device, dtype)
        for block in model.transformer.h:
            block.attn.kernel = KERNELS[kernel]
        if kernel != 'latent':
            reason = model.transformer.h[0].attn.reason_not_to_run(device, stream)
            if reason:
                raise UnavailableError(reason)
        self.causal = is_causal(model, device)
        self.model = lora.adapt(model, kind, self.lora_settings()).train()
        if kernel == 'latent':  # new weights have to learn, whatever the adapter
            for block in model.transformer.h:
                block.attn.requires_grad_(True)
        self.flops = flops_per_token(model, s.block_size, kind)
        self.parameters = lora.count(model)
        self.bytes_per_parameter = lora.bytes_per_parameter(model)

    def load(self, dtype: torch.dtype) -> GPT:
        if self.s.has_random_weights:
            with torch.device(self.device):  # made there, which is faster
                model, self.tokenizer = hf.load(self.s.model, dtype=dtype)
        else:
            model, self.tokenizer = hf.load(self.s.model, dtype=dtype)
        if self.s.block_size > model.config.block_size:
            raise UserError(
                f'block_size={self.s.block_size} is more than {self.s.model} was made for: '
                f'{model.config.block_size}'
            )
        return model.to(self.device)

    def lora_settings(self) -> LoraSettings:
        s, targets = self.s, self.s.targets
        if self.kernel == 'latent' and targets != 'all':
            # Its attention has none of these projections; its own learn themselves.
            names = [name for name in split_list(targets) if name not in ATTENTION_TARGETS]
            targets = ','.join(names)
        return LoraSettings(s.lora_r, s.lora_alpha, s.lora_dropout, targets, s.double_quant)

    def set_up(self, documents):
        s = self.s
        recompute = s.recompute
        if recompute == 'selective' and self.kernel == 'flex':
            recompute = 'full'
        settings = ForwardSettings(
            recompute=recompute,
            save_width=s.save_width,
            spared_layers=s.spared_layers,
            compile=s.compile,
            documents=documents,
            dropout=s.lora_dropout > 0,
        )
        self.forward = TrainingForward(self.model, settings)
        self.setting = self.forward.setting

    def loss(self, batch, count):
        return loss_of(self.forward, batch, count, self.s.loss_chunk)

    def likeliest(self, batch):
        x = self.forward.hidden(batch.idx, batch.documents)
        return torch.stack([self.model.lm_head(row).argmax(-1) for row in x])

    def answers(self, asked):
        """
        As the base class's. The cache is dense, or paged as the cell asks; one serves all prompts,
        and on a GPU so does one recording of a decode step.
        """
        cache = self.make_cache(asked)
        if cache is not None:
            self.cache = cache.layout
        attentions = [block.attn for block in self.model.transformer.h]
        if self.kernel == 'flex':  # it is compiled for one length, and prompts have many
            for attention in attentions:
                attention.kernel = 'sdpa'
        try:
            with lora.cached_weights(self.model):
                for prompts, n in asked:
                    yield self.answer(prompts, n, cache)
        finally:
            for attention in attentions:
                attention.kernel = KERNELS[self.kernel]

    def make_cache(self, asked) -> Cache | None:
        """Return a cache with room for all that is asked; None for the exhibit, which has none."""
        if self.kernel == 'latent':
            return None
        rows = max(len(prompts) for prompts, _ in asked)
        size = 0
        for prompts, n in asked:
            size = max(size, max(map(len, prompts)) + n)
        layout = 'paged' if self.kernel == 'paged' else 'dense'
        static = self.device.type == 'cuda'
        return Cache.of(self.model, rows, size, layout=layout, static=static)

    def answer(self, prompts: Prompts, n: int, cache: Cache | None) -> torch.Tensor:
        """Return n greedy tokens after each prompt, (B, n)."""
        rows = None
        if cache is None:
            shortest = min(map(len, prompts))
            ends = [prompt[-shortest:] for prompt in prompts]
            prompts = torch.tensor(ends, device=self.device)
        else:
            rows = range(len(prompts))
            for row in range(cache.rows):
                cache.free(row)
        tokens = generate(self.model, prompts, n, temperature=0, cache=cache, rows=rows)
        return torch.stack(list(tokens), dim=1)


@torch.no_grad()
def is_causal(model: GPT, device: torch.device) -> bool:
    """Return whether a change of the last token leaves all earlier logits as they are."""
    c = model.config
    idx = torch.arange(min(128, c.block_size), device=device)[None] % c.vocab_size
    other = idx.clone()
    other[0, -1] = (other[0, -1] + 1) % c.vocab_size
    a, b = (model.lm_head(model.hidden(x))[0, :-1].float() for x in (idx, other))
    return bool((a - b).abs().max() <= 1e-5 * a.abs().max())


# -------------------------------------------------------------------------------------------------
# other attentions


def to_mla(model: GPT, rows: torch.Tensor | None, rank: int, rope_pairs: int) -> GPT:
    """
    Return the model with its attention converted to MLA.

    Exact at rank 0 (full) with rope_pairs -1 (all, kept by each head); else all heads share
    `rope_pairs` pairs and a latent of `rank`. With rows (M, T) of text it is calibrated on them.
    UnavailableError for a model that cannot be converted so.
    """
    if model.transformer.h[0].attn.latent is not None:
        raise UnavailableError("the model's attention is MLA already")
    moments = None
    if rows is not None and rank:
        moments = calibration.measure(model, rows, batch_size=2)
    how = dict(low_rank='balanced' if moments else 'joint')
    if rope_pairs < 0:
        how |= dict(rope_heads='own', rope='high')
    else:
        how |= dict(rope_heads='shared', rope='turn' if moments else 'uniform')
    try:
        settings = ConversionSettings(kv_lora_rank=rank, rope_pairs=rope_pairs, **how)
        converted, _ = convert(model, settings, moments)
    except UserError as error:
        raise UnavailableError(
            f'mla_rank={rank} and mla_rope_pairs={rope_pairs} do not go with this model: {error}'
        ) from None
    return converted


class PerceiverAttention(nn.Module):
    """
    The block that the first study put in the place of attention and called MLA; an exhibit.

    `n` learned latents attend to the whole sequence, then every token attends to the latents. No
    mask and no RoPE, weights at random: each token sees all that follow it, so the training loss is
    no language model's.
    """

    def __init__(self, config: GPTConfig, n: int = 64):
        super().__init__()
        C = config.n_embd
        self.kernel, self.n_head = 'sdpa', config.n_head
        self.qk_dim = self.v_dim = config.head_dim
        self.latents = nn.Parameter(torch.randn(n, C) * C**-0.5)
        # W^Q, W^K, W^V of both attentions
        self.read = nn.ParameterList([torch.randn(C, C) * C**-0.5 for _ in range(3)])
        self.write = nn.ParameterList([torch.randn(C, C) * C**-0.5 for _ in range(3)])

    def forward(self, x, rope, context=None):
        latents = self.latents.to(x.dtype).expand(len(x), -1, -1)
        latents = self.attend(self.read, latents, x)
        return self.attend(self.write, x, latents)

    def attend(self, weights, a, b):
        """Let the tokens of a (B, T, C) attend to all of b: (B, T, C)."""
        heads = []
        for w, tokens in zip(weights, (a, b, b)):
            projected = F.linear(tokens, w.to(tokens.dtype))
            heads.append(projected.unflatten(-1, (self.n_head, -1)).transpose(1, 2))
        y = F.scaled_dot_product_attention(*heads)
        return y.transpose(1, 2).flatten(2)


def replace_attention(model: GPT, n: int, device: torch.device, dtype: torch.dtype) -> None:
    """Give every block a PerceiverAttention with n latents."""
    for block in model.transformer.h:
        with torch.device(device):
            block.attn = PerceiverAttention(model.config, n).to(dtype)
