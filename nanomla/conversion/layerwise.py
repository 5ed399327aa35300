"""
Layer-wise distillation: fit each converted attention to its source's, without a backward pass
through the model.

The layers are taken in order, each on the input that the converted layers before it give
(sequential calibration). With x the residual stream of the source and x̂ that of the conversion
before a layer, its attention Â is fitted to what leads back to the source:

    Â(norm(x̂)) ≈ A(norm(x)) + x - x̂

First W^O, in closed form; then all its weights, by a few hundred steps of Adam. An error counts as
a share of its token's residual stream, since the next norm divides by that, and tokens whose stream
has gone astray count for little: no attention brings those back.

The same error, of conversions in closed form, decides a search: how many pairs keep RoPE, and what
rank is left for the latent, at one size of the cache. One split serves all layers, since
model_mla.py has one width of k_pe.

Legend: M windows of T tokens, C channels, E = H D the width of the heads' outputs side by side.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from model import GPT, Attention, Block
from model_mla import GPT_MLA
from nanomla.conversion.calibration import Moments
from nanomla.conversion.convert import convert
from nanomla.conversion.settings import ConversionSettings, candidate_splits
from nanomla.core.cuda_graph import GraphedStep

SEARCH_TOKENS = 2048  # of the calibration text that a search reads
ASTRAY = 10.0  # how much faster than the stream itself its drift makes a token count less


@dataclass
class LayerwiseSettings:
    """How each layer is fitted."""

    steps: int = 300  # of Adam
    learning_rate: float = 1e-3  # at first; it falls linearly to zero
    batch_size: int = 16  # windows of a step
    ridge: float = 1e-3  # of W^O, a share of the mean power of what it reads
    seed: int = 0  # of the order of the windows


@dataclass
class LayerData:
    """
    What an attention is fitted to.

    inputs (M, T, C): after the norm; targets (M, T, C): its outputs; weights (M, T, 1): of the
    squared errors, with a mean squared target of 1 so that they are shares of it
    """

    inputs: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor

    def batch(self, windows: torch.Tensor) -> 'LayerData':
        return LayerData(self.inputs[windows], self.targets[windows], self.weights[windows])

    def copy_(self, other: 'LayerData') -> None:
        self.inputs.copy_(other.inputs)
        self.targets.copy_(other.targets)
        self.weights.copy_(other.weights)


def fit_layers(
    source: GPT,
    mla: GPT_MLA,
    windows: torch.Tensor,
    settings: LayerwiseSettings,
    tick: Callable[[], object] = lambda: None,
) -> list[float]:
    """
    Fit the attentions of `mla`, a conversion of `source`, on `windows` (M, T).

    The new attentions alone change. Returns for each layer the error that is left, as a share of
    the target; tick is called after each layer.
    """
    parts = windows.split(settings.batch_size)
    with torch.no_grad():
        theirs = [source.embed(part)[0] for part in parts]
        rope = source.embed(parts[0])[1]
    ours = list(theirs)
    errors = []
    for layer, (source_block, block) in enumerate(zip(source.transformer.h, mla.transformer.h)):
        data = layer_data(source_block, block, theirs, ours, rope)
        fit_output(block.attn, data, rope, settings)
        generator = torch.Generator().manual_seed(settings.seed + layer)
        fit_attention(block.attn, data, rope, settings, generator)
        errors.append(remaining_error(block.attn, data, rope, settings.batch_size))
        with torch.no_grad():
            theirs = [source_block(x, rope) for x in theirs]
            ours = [block(x, rope) for x in ours]
        tick()
    return errors


@torch.no_grad()
def layer_data(
    source_block: Block, block: Block, theirs: list[torch.Tensor], ours: list[torch.Tensor], rope
) -> LayerData:
    """Return what the attention of `block` is fitted to; theirs and ours are x and x̂ in batches."""
    inputs, targets, weights = [], [], []
    for x, x_hat in zip(theirs, ours):
        inputs.append(block.ln_1(x_hat))
        output = source_block.attn(source_block.ln_1(x), rope).float()
        drift = x.float() - x_hat.float()
        targets.append(output + drift)
        weights.append(robust_weights(x.float(), drift))
    inputs, targets, weights = torch.cat(inputs), torch.cat(targets), torch.cat(weights)
    weights /= (weights * targets.square()).mean()
    return LayerData(inputs, targets, weights)


def robust_weights(x: torch.Tensor, drift: torch.Tensor) -> torch.Tensor:
    """
    Return 1 / (|x|² + 10 |drift|²) for each token, (..., 1).

    A few tokens have streams a hundred times as long as the others' (attention sinks). Where a
    conversion makes or misses one, its squared error would outweigh that of all other tokens.
    """
    power = x.square().mean(-1, keepdim=True)
    return 1 / (power + ASTRAY * drift.square().mean(-1, keepdim=True))


# -------------------------------------------------------------------------------------------------
# closed form


@torch.no_grad()
def fit_output(attention: Attention, data: LayerData, rope, settings: LayerwiseSettings) -> None:
    """Set W^O to the weighted least squares of the targets on what the heads put out."""
    projection = attention.c_proj
    dtype = torch.float32 if data.inputs.device.type == 'mps' else torch.float64
    gram, moment = 0, 0
    for start in range(0, len(data.inputs), settings.batch_size):
        part = data.batch(slice(start, start + settings.batch_size))
        y = attention.attend(*attention.qkv(part.inputs, rope)).transpose(1, 2).flatten(2)
        targets = part.targets
        if projection.bias is not None:
            targets = targets - projection.bias.float()
        y, targets = y.flatten(0, 1).to(dtype), targets.flatten(0, 1).to(dtype)
        weighted = y * part.weights.flatten(0, 1).to(dtype)
        gram = gram + weighted.T @ y
        moment = moment + weighted.T @ targets
    new = ridge_regression(gram, moment, projection.weight.to(dtype), settings.ridge)
    projection.weight.copy_(new)


def ridge_regression(
    gram: torch.Tensor, moment: torch.Tensor, old: torch.Tensor, ridge: float
) -> torch.Tensor:
    """
    Return the W (C, E) of the least Σ |W y - t|² + ridge · tr(gram) / E · |W - old|².

    gram (E, E) = Σ y yᵀ, moment (E, C) = Σ y tᵀ.
    """
    eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    left = gram + ridge * gram.diagonal().mean() * eye
    return old + torch.linalg.solve(left, moment - gram @ old.T).T


# -------------------------------------------------------------------------------------------------
# Adam


def weighted_error(attention: Attention, data: LayerData, rope) -> torch.Tensor:
    """Return the mean squared error, as a share of the target's mean square."""
    error = attention(data.inputs, rope).float() - data.targets
    return (data.weights * error.square()).mean()


def fit_attention(
    attention: Attention,
    data: LayerData,
    rope,
    settings: LayerwiseSettings,
    generator: torch.Generator,
) -> None:
    """Fit all weights of `attention` by Adam, whose rate falls linearly to zero."""
    M = len(data.inputs)
    if settings.steps == 0:
        return
    device = data.inputs.device
    on_gpu = device.type == 'cuda'
    if on_gpu:  # twice as fast; W^O and the errors in the end are of fp32
        data = LayerData(data.inputs.bfloat16(), data.targets, data.weights)
    size = min(settings.batch_size, M)
    batch = data.batch(torch.arange(size, device=device))
    rate = torch.tensor(0.0, device=device)
    parameters = list(attention.parameters())
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.Adam(parameters, lr=rate, betas=(0.9, 0.95), capturable=on_gpu)

    def run():
        optimizer.zero_grad(set_to_none=False)
        loss = weighted_error(attention, batch, rope)
        loss.backward()
        optimizer.step()
        return loss.detach()

    step = GraphedStep(run, warmup=2) if on_gpu else run
    with torch.enable_grad():
        for number in range(settings.steps):
            rate.fill_(settings.learning_rate * (1 - number / settings.steps))
            windows = torch.randint(M, (size,), generator=generator).to(device)
            batch.copy_(data.batch(windows))
            step()


@torch.no_grad()
def remaining_error(attention: Attention, data: LayerData, rope, batch_size: int) -> float:
    """Return `weighted_error` over all windows."""
    total = 0.0
    for start in range(0, len(data.inputs), batch_size):
        part = data.batch(slice(start, start + batch_size))
        total += len(part.inputs) * weighted_error(attention, part, rope).item()
    return total / len(data.inputs)


# -------------------------------------------------------------------------------------------------
# the split of a cache between pairs with RoPE and rank


@dataclass
class Split:
    """A candidate, and the error of its attentions' outputs: a share, the mean over the layers."""

    settings: ConversionSettings
    error: float
    name: str  # rank + width of k_pe


def search_split(
    model: GPT,
    saving: float,
    settings: ConversionSettings,
    moments: list[Moments],
    windows: torch.Tensor,
    tick: Callable[[], object] = lambda: None,
) -> list[Split]:
    """
    Return the splits that leave 1 - `saving` of the cache of `model`, the best one first.

    windows (M, T) of the calibration text, of which about SEARCH_TOKENS are read; tick is called
    twice a layer of each split. UserError as `candidate_splits` has it.
    """
    few = windows[: max(1, SEARCH_TOKENS // windows.size(1))]
    streams, rope = streams_of(model, few)
    splits = []
    for candidate in candidate_splits(model.config, saving, settings):
        mla, _ = convert(model, candidate, moments, tick)
        name = f'{mla.config.kv_lora_rank} + {mla.config.qk_rope_head_dim}'
        splits.append(Split(candidate, mean_error(model, mla, streams, rope), name))
    return sorted(splits, key=lambda split: split.error)


@torch.no_grad()
def streams_of(model: GPT, windows: torch.Tensor) -> tuple[list[torch.Tensor], object]:
    """Return the residual stream before each block, (M, T, C), and the tables of RoPE."""
    x, rope = model.embed(windows)
    streams = []
    for block in model.transformer.h:
        streams.append(x)
        x = block(x, rope)
    return streams, rope


def mean_error(source: GPT, mla: GPT_MLA, streams: list[torch.Tensor], rope) -> float:
    """Return the mean over the layers of `remaining_error`, each on its source's own input."""
    total = 0.0
    for old, new, x in zip(source.transformer.h, mla.transformer.h, streams):
        data = layer_data(old, new, [x], [x], rope)
        total += remaining_error(new.attn, data, rope, batch_size=len(x))
    return total / len(streams)
