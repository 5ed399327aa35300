"""
Write GPT and GPT_MLA to folders that stock transformers loads as LlamaForCausalLM and
DeepseekV3ForCausalLM, without any code of ours. What these cannot express is refused by name.

Legend: as in hf.py, and C the width of a matrix's input.
"""

import json
import math
from dataclasses import dataclass, fields
from importlib.util import find_spec
from pathlib import Path

import torch

from model import GPT, GPTConfig
from model_mla import GPT_MLA, MLAConfig
from nanomla.checkpoints.content import TENSORS_METADATA, seal_tensors
from nanomla.checkpoints.families.rope import frequency
from nanomla.checkpoints.hf import DEEPSEEK_V3, LLAMA, Family, architecture_of, layout
from nanomla.checkpoints.hub import model_folder, read_json
from nanomla.checkpoints.tokenizer import HFTokenizer, read_tokenizer
from nanomla.core.configurator import UserError
from nanomla.core.files import copy_file, replacing_folder, write_file

EPSILON = 1e-6  # of the stock norm of a latent
LARGEST_LATENT = 2.0**3  # what a channel without a norm is scaled to, whatever the text is
# Latents as small as that vanish beside the epsilon, and the norm only divides by its root.
SHRINK = 2.0**-30
# float16 has no such numbers. There a channel of this size, by a bias, decides what the norm
# divides by; latents of an ordinary size are about 2⁻¹³ of it.
LARGE = 2.0**13
SLOWEST = 1e-20  # a frequency in the place of 0, of pairs that do not turn
DTYPES = dict(float32=torch.float32, bfloat16=torch.bfloat16, float16=torch.float16)


@dataclass
class StockModel:
    """
    A model as a stock class computes it.

    params: by our names; what was rewritten is in float32
    dtype: of the weights in the files
    rope: the RoPE of config.json, None for the one that `config` describes
    """

    architecture: Family
    config: GPTConfig
    params: dict[str, torch.Tensor]
    dtype: torch.dtype
    rope: dict | None = None


@dataclass(frozen=True)
class LatentNorm:
    """
    The norm of a latent that a stock class has.

    epsilon: what it adds to the mean of squares
    half: for float16, with a constant channel
    exact_gain: its gain stays in float32, whatever the weights are written in
    """

    epsilon: float = EPSILON
    half: bool = False
    exact_gain: bool = False


def export(
    model: GPT,
    folder: str | Path,
    tokenizer: HFTokenizer | str | Path | None = None,
    max_shard_size: int = 5 * 10**9,
    dtype: torch.dtype | None = None,
) -> None:
    """
    Write `model` to a new `folder` as stock transformers reads it, all of it or nothing:
    config.json, generation_config.json, safetensors and the files of the tokenizer.

    tokenizer: an HFTokenizer, or the folder of a model that has one
    max_shard_size: bytes above which the weights come in several files
    dtype: of the weights; None for the model's own
    """
    folder = Path(folder)
    if folder.exists():
        raise UserError(f'{folder} is there already: name another folder, or remove it')
    check_packages()
    if tokenizer is not None and not isinstance(tokenizer, HFTokenizer):
        tokenizer = tokenizer_in(tokenizer)
    stock = stock_model(model, dtype)
    ends = begin_and_end(tokenizer)
    generation = {key: value for key, value in ends.items() if value is not None}
    with replacing_folder(folder) as aside:
        write_weights(stock, aside, max_shard_size)
        write_json(aside / 'config.json', config_json(stock, ends))
        write_json(aside / 'generation_config.json', dict(_from_model_config=True, **generation))
        if tokenizer is not None:
            for file in tokenizer.files:
                copy_file(file, aside / file.name)
        share(aside)


def check_export(source: GPT, config: MLAConfig) -> None:
    """
    Raise a UserError unless what `source` is converted to, with this config, can be exported.

    It is asked before the work of a conversion.
    """
    check_packages()
    check_config(DEEPSEEK_V3, stock_config_of_converted(config, config.qk_rope_head_dim))
    check_biases(source)


def servers_of(model: GPT, dtype: torch.dtype | None = None) -> str:
    """Return what loads such an export beside transformers, or why nothing else does."""
    stock = stock_model(model, dtype)
    if stock.architecture is LLAMA:
        return 'transformers, vLLM and SGLang load it'
    reasons = []
    if stock.rope is not None:
        reasons.append('RoPE is longrope, as no other kind has its frequencies')
    converted = bool(model.config.source_head_dim)
    in_half = stock.dtype == torch.float16
    if model.config.bias:
        reasons.append('it has biases')
    elif stock.config.bias:
        reasons.append('its latents have a constant channel, by a bias, for float16')
    if stock.config.norm_eps != EPSILON and converted and not in_half:
        reasons.append(f'rms_norm_eps is {stock.config.norm_eps:g}, which they use in latents, too')
    sentence = 'transformers loads it; vLLM and SGLang have all that it needs'
    if reasons:
        sentence = f'only transformers loads it as it is: {"; ".join(reasons)}'
    if converted and not in_half:
        sentence += '; load it in float32 or bfloat16: float16 takes --export_dtype=float16'
    return sentence


def check_packages() -> None:
    for package in ('safetensors', 'huggingface_hub'):
        if find_spec(package) is None:
            raise UserError(f'writing this layout needs {package}: pip install -e .[convert]')


def tokenizer_in(name: str | Path) -> HFTokenizer:
    folder = model_folder(name)
    config = {}
    if (folder / 'config.json').exists():
        config = read_json(folder / 'config.json')
    tokenizer = read_tokenizer(folder, config)
    if tokenizer is None:
        raise UserError(f'{name} has no tokenizer.json')
    return tokenizer


def begin_and_end(tokenizer: HFTokenizer | None) -> dict:
    """Return the entries of config.json that say with which ids a text begins and ends."""
    ends = dict(bos_token_id=None, eos_token_id=None, pad_token_id=None)
    if tokenizer is not None:
        ends['bos_token_id'] = tokenizer.bos
        eos = sorted(tokenizer.eos)
        if len(eos) == 1:
            ends['eos_token_id'] = eos[0]
        elif eos:
            ends['eos_token_id'] = eos
    return ends


# -------------------------------------------------------------------------------------------------
# what a stock class can express


def stock_model(model: GPT, dtype: torch.dtype | None = None) -> StockModel:
    """
    Return `model` as a stock class computes it, with weights of a dtype, or of the model's own.

    UserError names all that no stock class can express.
    """
    architecture = architecture_of(model)
    if dtype is None:
        dtype = max((p.dtype for p in model.parameters()), key=lambda dtype: dtype.itemsize)
    if architecture is DEEPSEEK_V3 and model.config.source_head_dim:
        return stock_form_of_converted(model, dtype)
    check_config(architecture, model.config)
    check_scale(model, model.transformer.h[0].attn.qk_dim)
    params = dict(model.named_parameters(remove_duplicate=False))
    rope = rope_of_frequencies(model.config)
    return StockModel(architecture, model.config, params, dtype, rope)


def rope_of_frequencies(config: GPTConfig) -> dict | None:
    """Return the RoPE with the frequencies of `config`; None for one without any of its own."""
    if not config.rope_frequencies:
        return None
    pairs = len(config.rope_frequencies)
    factors = []  # of the ordinary wavelengths
    for k, own in enumerate(config.rope_frequencies):
        ordinary = frequency(config.rope_theta, k, 2 * pairs)
        # A pair that does not turn has an angle there that fp32 cannot tell from zero.
        factors.append(config.rope_scaling * ordinary / max(own, 1e-12))
    return dict(
        rope_type='longrope',
        short_factor=factors,
        long_factor=factors,
        factor=1.0,
        attention_factor=1.0,
        original_max_position_embeddings=config.block_size,
    )


def check_config(architecture: Family, config: GPTConfig) -> None:
    unsupported = []
    for key, value in architecture.requires.items():
        if getattr(config, key) != value:
            unsupported.append(f'{key}={getattr(config, key)} (it has {value})')
    if architecture is LLAMA and config.n_embd % config.n_head:
        unsupported.append(
            f'n_embd={config.n_embd} with n_head={config.n_head} (it wants a multiple)'
        )
    if unsupported:
        raise UserError(
            f'{architecture.class_name} cannot express this model: {"; ".join(unsupported)}'
        )


def check_scale(model: GPT, width: int) -> None:
    """Refuse a model whose softmax scale is not 1 / sqrt(width), which stock classes have."""
    for n, block in enumerate(model.transformer.h):
        if not math.isclose(block.attn.scale, width**-0.5, rel_tol=1e-6):
            raise UserError(
                f'{architecture_of(model).class_name} cannot express this model: the softmax scale '
                f'of layer {n} is {block.attn.scale:g} (it has 1 / sqrt({width}))'
            )


def check_biases(model: GPT) -> None:
    """Refuse MLPs with biases: a stock class with MLA has none there."""
    for n, block in enumerate(model.transformer.h):
        for name, parameter in block.mlp.named_parameters():
            if name.endswith('bias') and parameter.any():
                raise UserError(
                    f'{DEEPSEEK_V3.class_name} cannot express this model: the MLP of layer {n} has '
                    f'a bias ({name})'
                )


def stock_form_of_converted(model: GPT_MLA, dtype: torch.dtype) -> StockModel:
    """
    Return the stock form of a GPT_MLA that was converted from a model of its source_head_dim: the
    same function by other weights, which a dtype can hold.

    - The norms of the latents cannot be left out there: see LatentPath.
    - One table of frequencies serves all layers. It has each frequency as often as the layer that
      needs it most; elsewhere the rows of those not needed are zero.
    - The softmax scale is that of the width of query and key. The query takes up the difference.
    - Queries have no bias there, but their latent has one: they get a latent, with a channel that
      is constant.
    """
    check_config(
        DEEPSEEK_V3, stock_config_of_converted(model.config, model.config.qk_rope_head_dim)
    )
    check_biases(model)
    params = {name: p.detach() for name, p in model.named_parameters(remove_duplicate=False)}
    half = dtype == torch.float16
    config, table = rewrite_converted(model, params, LatentNorm(half=half))
    config.bias = half or model.config.bias
    config.kv_lora_rank += half
    if config.q_lora_rank or model.config.bias:
        width = config.q_lora_rank or config.n_embd
        config.q_lora_rank = width + (half or model.config.bias)
    return StockModel(DEEPSEEK_V3, config, params, dtype, longrope(model.config, table))


def rewrite_converted(
    model: GPT_MLA, params: dict[str, torch.Tensor], norm: LatentNorm
) -> tuple[MLAConfig, list[int]]:
    """
    Replace the weights of the attentions in `params` by those of a class with such a norm.

    Return the config of such a class and the source's pairs that its RoPE has.
    """
    layers = [block.attn.rope_pairs.tolist() for block in model.transformer.h]
    table = shared_frequencies(layers)
    for n, block in enumerate(model.transformer.h):
        layer = LayerRewriter(params, model.config, n, norm)
        layer.rewrite_keys_and_values(layers[n], table)
        layer.rewrite_queries(layers[n], table, block.attn.scale)
    return stock_config_of_converted(model.config, rope_width=2 * len(table)), table


def shared_frequencies(layers: list[list[int]]) -> list[int]:
    """
    Return the pairs of the source's RoPE that one table for all layers has to hold.

    layers: for each layer the source's pair by which each of its own pairs turns
    """
    table = []
    for pair in sorted(set().union(*layers)):
        most = max(pairs.count(pair) for pairs in layers)
        table += [pair] * most
    return table


def stock_config_of_converted(config: MLAConfig, rope_width: int) -> MLAConfig:
    settings = {field.name: getattr(config, field.name) for field in fields(config)}
    settings |= dict(
        head_dim=config.qk_nope_head_dim + rope_width,
        qk_rope_head_dim=rope_width,
        kv_lora_ranks=(),
        source_head_dim=0,
        softmax_scale=0.0,
        rope_frequencies=(),
        latent_norm=True,
        bias=False,
    )
    return MLAConfig(**settings)


@dataclass
class LatentPath:
    """
    y = up · (down · x + down_bias) + bias, through a latent that the stock class norms.

    down (R, C), down_bias (R,), up (D, R), bias (D,) or None
    """

    down: torch.Tensor
    down_bias: torch.Tensor
    up: torch.Tensor
    bias: torch.Tensor | None = None

    def with_norm(self, norm: LatentNorm, input_gain: torch.Tensor) -> 'NormedPath':
        """
        Return the same function with a norm of the latent.

        input_gain (C,): of the norm that x comes from
        """
        # Latents of an ordinary size: no dtype loses those of a source, however large they are.
        scale = self.ordinary_scale(input_gain)
        down, down_bias, up = scale[:, None] * self.down, scale * self.down_bias, self.up / scale
        scaled = LatentPath(down, down_bias, up, self.bias)
        if norm.half:
            return scaled.beside_a_constant(norm)
        return scaled.beside_the_epsilon(norm)

    def ordinary_scale(self, input_gain: torch.Tensor) -> torch.Tensor:
        """Return powers of two (R,) by which no channel of the latent is above LARGEST_LATENT."""
        # An input of RMS 1 has the length sqrt(C).
        length = self.down.size(1) ** 0.5
        bound = length * torch.linalg.vector_norm(self.down * input_gain, dim=1)
        ratio = LARGEST_LATENT / (bound + self.down_bias.abs())
        ratio = torch.where(ratio.isfinite(), ratio, 1)  # of a channel that is zero
        return ratio / (2 * ratio.frexp().mantissa)

    def beside_the_epsilon(self, norm: LatentNorm) -> 'NormedPath':
        """
        Let latents shrink by 2⁻³⁰: the norm then divides by √ε, which `up` or an exact gain undoes.
        """
        down, down_bias, up = SHRINK * self.down, SHRINK * self.down_bias, self.up
        if self.bias is not None:
            down, down_bias, up = with_channel(down, down_bias, up, SHRINK, self.bias)
        gain = up.new_ones(up.size(1))
        undo = norm.epsilon**0.5 / SHRINK
        if norm.exact_gain:
            return NormedPath(down, down_bias, gain * undo, up)
        return NormedPath(down, down_bias, gain, up * undo)

    def beside_a_constant(self, norm: LatentNorm) -> 'NormedPath':
        """Let a large constant channel decide what the norm divides by; `up` undoes that."""
        bias = self.up.new_zeros(len(self.up)) if self.bias is None else self.bias
        rms = (LARGE**2 / (self.up.size(1) + 1) + norm.epsilon) ** 0.5
        # What the norm leaves of a latent is small. A power of two enlarges it exactly.
        enlarged = 2.0 ** round(math.log2(rms))
        up, column = self.up * (rms / enlarged), bias * (rms / LARGE)
        down, down_bias, up = with_channel(self.down, self.down_bias, up, LARGE, column)
        gain = up.new_full((up.size(1),), enlarged)
        gain[-1] = 1
        return NormedPath(down, down_bias, gain, up)


def with_channel(
    down: torch.Tensor, down_bias: torch.Tensor, up: torch.Tensor, size: float, column: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return down, down_bias and up with one more channel, which is always `size`."""
    down = torch.cat([down, down.new_zeros(1, down.size(1))])
    down_bias = torch.cat([down_bias, down_bias.new_tensor([size])])
    return down, down_bias, torch.cat([up, column[:, None]], dim=1)


@dataclass
class NormedPath:
    """down (R, C), down_bias (R,), the norm's gain (R,), up (D, R)."""

    down: torch.Tensor
    down_bias: torch.Tensor
    gain: torch.Tensor
    up: torch.Tensor


class LayerRewriter:
    """Replace the attention's weights of one layer, in `params`, by those of its stock form."""

    def __init__(self, params: dict, config: MLAConfig, layer: int, norm: LatentNorm):
        self.params, self.config, self.layer, self.norm = params, config, layer, norm
        self.prefix = f'transformer.h.{layer}.attn.'

        self.input_gain = params[f'transformer.h.{layer}.ln_1.weight'].float()

    def get(self, name: str) -> torch.Tensor:
        # In float32 each weight is rounded once, when it is written.
        return self.params[f'{self.prefix}{name}'].float()

    def bias_of(self, name: str, width: int) -> torch.Tensor:
        """Return the bias of a matrix, zeros where it has none."""
        if f'{self.prefix}{name}.bias' not in self.params:
            return self.get(f'{name}.weight').new_zeros(width)
        return self.get(f'{name}.bias')

    def set(self, weights: dict[str, torch.Tensor]) -> None:
        for name, weight in weights.items():
            self.params[f'{self.prefix}{name}'] = weight

    def rewrite_keys_and_values(self, pairs: list[int], table: list[int]) -> None:
        config, rank = self.config, self.config.rank(self.layer)
        widths = [rank, config.qk_rope_head_dim]
        down, k_pe = self.get('kv_a_proj_with_mqa.weight').split(widths)
        down_bias, pe_bias = self.bias_of('kv_a_proj_with_mqa', sum(widths)).split(widths)
        up = self.get('kv_b_proj.weight')
        # Every layer has a latent of the widest one's size there; the rows beyond its own are zero.
        missing = config.kv_lora_rank - rank
        path = LatentPath(
            torch.cat([down, down.new_zeros(missing, down.size(1))]),
            torch.cat([down_bias, down_bias.new_zeros(missing)]),
            torch.cat([up, up.new_zeros(len(up), missing)], dim=1),
        ).with_norm(self.norm, self.input_gain)
        places = places_of(pairs, table)
        k_pe = pairs_in_places(k_pe, places, len(table))
        pe_bias = pairs_in_places(pe_bias[:, None], places, len(table))[:, 0]
        self.set(
            {
                'kv_a_proj_with_mqa.weight': torch.cat([path.down, k_pe]),
                'kv_a_proj_with_mqa.bias': torch.cat([path.down_bias, pe_bias]),
                'kv_a_layernorm.weight': path.gain,
                'kv_b_proj.weight': path.up,
                'c_proj.bias': self.bias_of('c_proj', len(self.get('c_proj.weight'))),
            }
        )

    def rewrite_queries(self, pairs: list[int], table: list[int], scale: float) -> None:
        config = self.config
        name = 'q_b_proj' if config.q_lora_rank else 'q_proj'
        qk_dim = config.qk_nope_head_dim + 2 * len(table)
        scale *= qk_dim**0.5
        weight = scale * self.spread_query(self.get(f'{name}.weight'), pairs, table)
        if not (config.q_lora_rank or config.bias):
            self.set({'q_proj.weight': weight})
            return
        bias = None
        if config.bias:
            bias = self.get(f'{name}.bias')[:, None]
            bias = scale * self.spread_query(bias, pairs, table)[:, 0]
        if config.q_lora_rank:
            down = self.get('q_a_proj.weight')
            down_bias = self.bias_of('q_a_proj', len(down))
        else:
            down = torch.eye(config.n_embd, dtype=weight.dtype, device=weight.device)
            down_bias = down.new_zeros(config.n_embd)
        path = LatentPath(down, down_bias, weight, bias).with_norm(self.norm, self.input_gain)
        self.set(
            {
                'q_a_proj.weight': path.down,
                'q_a_proj.bias': path.down_bias,
                'q_a_layernorm.weight': path.gain,
                'q_b_proj.weight': path.up,
            }
        )

    def spread_query(self, q: torch.Tensor, pairs: list[int], table: list[int]) -> torch.Tensor:
        """Return the rows of all heads' queries with their pairs where the table has them."""
        H, config = self.config.n_head, self.config
        nope, pe = q.split([H * config.qk_nope_head_dim, H * config.qk_rope_head_dim])
        pe = pairs_in_places(pe.unflatten(0, (H, -1)), places_of(pairs, table), len(table))
        return torch.cat([nope, pe.flatten(0, 1)])


def places_of(pairs: list[int], table: list[int]) -> list[int]:
    """
    Return where in the shared table each of a layer's pairs goes.

    Equal frequencies stand side by side there.
    """
    return [table.index(pair) + pairs[:k].count(pair) for k, pair in enumerate(pairs)]


def pairs_in_places(rows: torch.Tensor, places: list[int], count: int) -> torch.Tensor:
    """Move pair k of `rows` (..., P, C) to pair places[k] of (..., 2 count, C), else zero."""
    a, b = rows.unflatten(-2, (2, -1)).unbind(-3)
    wide = rows.new_zeros(*rows.shape[:-2], 2, count, rows.size(-1))
    wide[..., 0, places, :] = a
    wide[..., 1, places, :] = b
    return wide.flatten(-3, -2)


def longrope(config: MLAConfig, table: list[int]) -> dict | None:
    """Return the RoPE with the frequencies of `table`; None where the ordinary one has the same."""
    width, source_width = 2 * len(table), config.source_head_dim
    own = config.rope_frequencies
    if not own and all(pair * width == k * source_width for k, pair in enumerate(table)):
        return None
    factors = []  # of the ordinary wavelengths
    for k, pair in enumerate(table):
        kept = frequency(config.rope_theta, pair, source_width)
        if own:
            kept = max(own[pair], SLOWEST)
        ordinary = frequency(config.rope_theta, k, width)
        factors.append(config.rope_scaling * ordinary / kept)
    return dict(
        rope_type='longrope',
        short_factor=factors,
        long_factor=factors,
        factor=1.0,
        attention_factor=1.0,
        original_max_position_embeddings=config.block_size,
    )


# -------------------------------------------------------------------------------------------------
# config.json


def config_json(stock: StockModel, ends: dict) -> dict:
    """Return the config.json of a model, the inverse of hf.settings_of."""
    config, rope = stock.config, stock.rope
    plain = rope is None and config.rope_scaling == 1
    if plain:
        rope = dict(rope_type='default')
    elif rope is None:
        rope = dict(rope_type='linear', type='linear', factor=float(config.rope_scaling))
    dtype = dtype_name(stock.dtype)
    shape = dict(
        architectures=[stock.architecture.class_name],
        model_type=stock.architecture.model_type,
        vocab_size=config.vocab_size,
        hidden_size=config.n_embd,
        intermediate_size=config.n_inner,
        num_hidden_layers=config.n_layer,
        num_attention_heads=config.n_head,
        num_key_value_heads=config.n_kv_head,
        max_position_embeddings=config.block_size,
        rms_norm_eps=float(config.norm_eps),
        hidden_act='silu',
        tie_word_embeddings=config.tie_weights,
        attention_bias=config.bias,
        attention_dropout=0.0,
        rope_theta=float(config.rope_theta),
        rope_parameters=rope | dict(rope_theta=float(config.rope_theta)),
        rope_scaling=None if plain else rope,
        initializer_range=0.02,
        use_cache=True,
        dtype=dtype,
        torch_dtype=dtype,
        **ends,
    )
    if stock.architecture is LLAMA:
        return shape | dict(head_dim=config.head_dim, mlp_bias=config.bias)
    return shape | deepseek_entries(config)


def deepseek_entries(config: MLAConfig) -> dict:
    """Return what only DeepSeek-V3 has: every layer is dense, no further tokens are predicted."""
    return dict(
        q_lora_rank=config.q_lora_rank or None,
        kv_lora_rank=config.kv_lora_rank,
        qk_nope_head_dim=config.qk_nope_head_dim,
        qk_rope_head_dim=config.qk_rope_head_dim,
        v_head_dim=config.v_head_dim,
        rope_interleave=True,
        first_k_dense_replace=config.n_layer,
        moe_layer_freq=1,
        n_routed_experts=1,
        n_shared_experts=1,
        num_experts_per_tok=1,
        n_group=1,
        topk_group=1,
        moe_intermediate_size=config.n_inner,
        num_nextn_predict_layers=0,
    )


# -------------------------------------------------------------------------------------------------
# writing


def share(folder: Path) -> None:
    """Let whoever may enter a folder read its files: safetensors writes for the owner alone."""
    mode = 0o666 & (folder.stat().st_mode | 0o600)
    for file in folder.iterdir():
        file.chmod(mode)


def write_json(path: Path, content: dict) -> None:
    write_file(path, json.dumps(content, indent=2) + '\n')


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix('torch.')


def in_dtype(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return a tensor in the dtype of a file. UserError where a number in it becomes infinite."""
    rounded = tensor.to(dtype)
    if rounded.isinf().any() and not tensor.isinf().any():
        raise UserError(
            f'{dtype_name(dtype)} cannot hold {name}, which reaches {tensor.abs().max():g}: '
            'export it in float32 or bfloat16'
        )
    return rounded


def write_weights(stock: StockModel, folder: Path, max_shard_size: int) -> None:
    """Write the weights as safetensors, file by file: only one of them is in memory twice."""
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    table = layout(stock.architecture, stock.config)

    # Copies on the meta device have the tensors' sizes, but take no memory. Without a copy, parts
    # of one matrix would count as all of it, and would have to be in one file.
    on_meta = {name: param.detach().to('meta') for name, param in stock.params.items()}
    sizes = {}
    for theirs, (ours, rows) in table.items():
        sizes[theirs] = on_meta[ours][rows].to(stock.dtype, copy=True)
    split = split_torch_state_dict_into_shards(sizes, max_shard_size=max_shard_size)
    for file, names in split.filename_to_tensors.items():
        tensors = {}
        for name in names:
            ours, rows = table[name]
            tensor = stock.params[ours].detach()[rows].cpu()
            tensors[name] = in_dtype(name, tensor, stock.dtype).contiguous()
        try:
            save_file(tensors, folder / file, metadata=TENSORS_METADATA)
        except SafetensorError as error:
            raise UserError(f'cannot write {folder / file}: {error}') from None
        seal_tensors(folder / file)
    if split.is_sharded:
        index = dict(metadata=split.metadata, weight_map=split.tensor_to_filename)
        write_json(folder / 'model.safetensors.index.json', index)
