"""
Load Hugging Face models: Llama-family checkpoints (DeepSeek-Coder, Llama, TinyLlama ...) into GPT,
dense DeepSeek-V3 ones into GPT_MLA. export.py writes them. Both ways go through one table,
`layout`, and what the other side cannot express is refused by name. safetensors and tokenizers are
needed, transformers is not.

Legend: H heads; N, P, R as in model_mla.py. Weights are (out, in).
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from types import EllipsisType

import torch

from model import GPT, GPTConfig, MultiHeadAttention
from model_mla import GPT_MLA, MLAConfig, MultiHeadLatentAttention
from nanomla.checkpoints.hub import model_folder, read_config, read_tensors
from nanomla.checkpoints.tokenizer import HFTokenizer, read_tokenizer
from nanomla.core.checks import settings_errors
from nanomla.core.configurator import UserError

# The config.json of what `random:NAME` makes.
CODER = dict(
    model_type='llama',
    vocab_size=32256,
    hidden_size=2048,
    intermediate_size=5504,
    num_hidden_layers=24,
    num_attention_heads=16,
    num_key_value_heads=16,
    max_position_embeddings=16384,
    rms_norm_eps=1e-6,
    rope_theta=1e5,
    rope_scaling=dict(type='linear', factor=4.0),
)
TINY = CODER | dict(
    vocab_size=256,
    hidden_size=64,
    intermediate_size=176,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=4,
    max_position_embeddings=128,
)
SHAPES = {'deepseek-coder-1.3b': CODER, 'tiny': TINY}
DTYPES = {torch.float64, torch.float32, torch.bfloat16, torch.float16}

# Settings of config.json that change what a model computes, and that our models do not have, with
# the values that switch them off.
MUST_BE_OFF = dict.fromkeys(
    (
        'qk_norm',
        'use_qk_norm',
        'qk_layernorm',
        'sliding_window',
        'quantization_config',
        'num_experts',
        'num_local_experts',
        'n_shared_experts',
        'n_routed_experts',
        'attn_logit_softcapping',
        'final_logit_softcapping',
        'logit_softcapping',
        'num_nextn_predict_layers',
        'num_mtp_layers',
    ),
    (None, False, 0),
)
MUST_BE_OFF |= dict.fromkeys(
    (
        'partial_rotary_factor',
        'attention_multiplier',
        'embedding_multiplier',
        'residual_multiplier',
        'logits_scaling',
        'logit_scale',
    ),
    (None, 1),
)
ROPE_KEYS = ('rope_type', 'type', 'rope_theta', 'factor', 'original_max_position_embeddings')

# Row i of their tensor is row rows[i] of our parameter; `...` means all rows as they are.
Rows = torch.Tensor | slice | EllipsisType


# -------------------------------------------------------------------------------------------------
# whose row is whose


def llama_attention_rows(config: GPTConfig, interleave: bool) -> dict[str, tuple[str, Rows]]:
    """Return their tensor in self_attn -> (our parameter in attn, rows)."""
    q, k = config.n_head * config.head_dim, config.n_kv_head * config.head_dim
    return dict(
        q_proj=('c_attn', slice(0, q)),
        k_proj=('c_attn', slice(q, q + k)),
        v_proj=('c_attn', slice(q + k, q + 2 * k)),
        o_proj=('c_proj', ...),
    )


def mla_attention_rows(config: MLAConfig, interleave: bool) -> dict[str, tuple[str, Rows]]:
    """
    As llama_attention_rows. Ours are all heads' rows of one symbol, then all heads' of the other;
    DeepSeek's go head by head.

    interleave: their RoPE turns neighbours (2k, 2k + 1), where we turn (k, k + P/2)
    """
    H, R = config.n_head, config.kv_lora_rank
    N, P = config.qk_nope_head_dim, config.qk_rope_head_dim
    pairs = torch.arange(P)
    if interleave:
        pairs = pairs.view(2, P // 2).T.flatten()
    query_rows = head_by_head(H, N, P, pairs)
    rows = dict(
        kv_a_proj_with_mqa=torch.cat([torch.arange(R), R + pairs]),
        kv_a_layernorm=...,
        kv_b_proj=head_by_head(H, N, config.v_head_dim, torch.arange(config.v_head_dim)),
    )
    if config.q_lora_rank:
        rows |= dict(q_a_proj=..., q_a_layernorm=..., q_b_proj=query_rows)
    else:
        rows |= dict(q_proj=query_rows)
    table = {name: (name, part) for name, part in rows.items()}
    return table | dict(o_proj=('c_proj', ...))


def head_by_head(heads: int, first: int, second: int, order: torch.Tensor) -> torch.Tensor:
    """
    Return the rows that go head by head: `first` rows of a head, then its `second` rows by `order`,
    out of a matrix with all heads' first rows above all heads' second rows.
    """
    a = torch.arange(heads * first).view(heads, first)
    b = heads * first + torch.arange(heads * second).view(heads, second)[:, order]
    return torch.cat([a, b], dim=1).flatten()


@dataclass(frozen=True)
class Architecture:
    """
    A model class of transformers and the one of ours that computes the same.

    attention_rows: the attention's part of `layout`
    requires: the values that config fields must have to be expressed there
    """

    model_type: str
    class_name: str
    model_class: type[GPT]
    attention_class: type
    attention_rows: Callable[[GPTConfig, bool], dict]
    requires: dict = field(hash=False)


COMMON = dict(mlp=True, pos='rope', norm='rmsnorm', act='swiglu', qk_norm=False)
LLAMA = Architecture(
    'llama', 'LlamaForCausalLM', GPT, MultiHeadAttention, llama_attention_rows, COMMON
)
DEEPSEEK_V3 = Architecture(
    'deepseek_v3',
    'DeepseekV3ForCausalLM',
    GPT_MLA,
    MultiHeadLatentAttention,
    mla_attention_rows,
    COMMON | dict(bias=False, latent_norm=True),
)
ARCHITECTURES = {one.model_type: one for one in (LLAMA, DEEPSEEK_V3)}


def architecture_of(model: GPT) -> Architecture:
    """
    Return the architecture that computes what `model` does. Only the exact classes of model and
    attention count: what a subclass computes is not known. UserError names those that are not.
    """
    for architecture in ARCHITECTURES.values():
        if type(model) is not architecture.model_class:
            continue
        for block in model.transformer.h:
            if type(block.attn) is not architecture.attention_class:
                raise UserError(
                    f'{type(block.attn).__name__} cannot be exported: {architecture.class_name} '
                    f'has {architecture.attention_class.__name__}'
                )
        return architecture
    known = ' and '.join(one.model_class.__name__ for one in ARCHITECTURES.values())
    raise UserError(f'{type(model).__name__} cannot be exported: only {known} can')


def layout(
    architecture: Architecture, config: GPTConfig, interleave: bool = True
) -> dict[str, tuple[str, Rows]]:
    """Return their tensor -> (our parameter, rows) of a whole model."""
    block = {
        'input_layernorm': ('ln_1', ...),
        'post_attention_layernorm': ('ln_2', ...),
        'mlp.gate_proj': ('mlp.c_fc', slice(0, config.n_inner)),
        'mlp.up_proj': ('mlp.c_fc', slice(config.n_inner, 2 * config.n_inner)),
        'mlp.down_proj': ('mlp.c_proj', ...),
    }
    for theirs, (ours, rows) in architecture.attention_rows(config, interleave).items():
        block[f'self_attn.{theirs}'] = (f'attn.{ours}', rows)
    table = {
        'model.embed_tokens.weight': ('transformer.wte.weight', ...),
        'model.norm.weight': ('transformer.ln_f.weight', ...),
    }
    if not config.tie_weights:
        table['lm_head.weight'] = ('lm_head.weight', ...)
    for n in range(config.n_layer):
        for theirs, (ours, rows) in block.items():
            theirs, ours = f'model.layers.{n}.{theirs}', f'transformer.h.{n}.{ours}'
            table[f'{theirs}.weight'] = (f'{ours}.weight', rows)
            if config.bias and not theirs.endswith('norm'):
                table[f'{theirs}.bias'] = (f'{ours}.bias', rows)
    return table


# -------------------------------------------------------------------------------------------------
# config.json


def settings_of(shape: dict) -> tuple[Architecture, dict]:
    """
    Return the architecture and the config fields that a config.json describes.

    UserError names all that cannot be expressed; KeyError, TypeError or ValueError where an entry
    is missing or is not what it should be.
    """
    model_type = shape.get('model_type')
    if model_type not in ARCHITECTURES:
        raise UserError(f"model_type '{model_type}' is neither llama nor deepseek_v3")
    architecture = ARCHITECTURES[model_type]
    rope, unsupported_rope = rope_settings(shape)
    unsupported = unsupported_settings(shape, architecture) + unsupported_rope
    settings = dict(
        vocab_size=int(shape['vocab_size']),
        n_layer=int(shape['num_hidden_layers']),
        n_head=int(shape['num_attention_heads']),
        n_kv_head=int(shape.get('num_key_value_heads') or 0),
        n_embd=int(shape['hidden_size']),
        n_inner=int(shape['intermediate_size']),
        pos='rope',
        norm='rmsnorm',
        act='swiglu',
        norm_eps=float(shape.get('rms_norm_eps', 1e-6)),
        bias=bool(shape.get('attention_bias')),
        tie_weights=bool(shape.get('tie_word_embeddings', False)),
        **rope,
    )
    if architecture is DEEPSEEK_V3:
        settings |= deepseek_settings(shape)
        dense = shape['first_k_dense_replace']
        if dense < settings['n_layer']:
            unsupported.append(
                f'mixture of experts (first_k_dense_replace={dense} '
                f'of {settings["n_layer"]} layers)'
            )
    else:
        settings |= llama_settings(shape)
    if unsupported:
        raise UserError(f'what it needs has no place here: {"; ".join(unsupported)}')
    return architecture, settings


def llama_settings(shape: dict) -> dict:
    return dict(
        block_size=int(shape.get('max_position_embeddings', 2048)),
        head_dim=int(shape.get('head_dim') or 0),
    )


def deepseek_settings(shape: dict) -> dict:
    names = ('q_lora_rank', 'kv_lora_rank', 'qk_nope_head_dim', 'qk_rope_head_dim', 'v_head_dim')
    widths = {name: int(shape[name] or 0) for name in names}
    return widths | dict(
        block_size=int(shape.get('max_position_embeddings', 4096)),
        head_dim=widths['qk_nope_head_dim'] + widths['qk_rope_head_dim'],
    )


def unsupported_settings(shape: dict, architecture: Architecture) -> list[str]:
    """Return what a config.json asks for, besides RoPE, that our models do not have."""
    unsupported = []
    classes = shape.get('architectures') or [architecture.class_name]
    if classes != [architecture.class_name]:
        names = ', '.join(str(name) for name in classes)
        unsupported.append(f'{names} (only {architecture.class_name} is known)')
    activation = shape.get('hidden_act', 'silu')
    if activation not in ('silu', 'swish'):
        unsupported.append(f"hidden_act '{activation}' (only silu, in SwiGLU)")
    for key, off in MUST_BE_OFF.items():
        # DeepSeek-V3 always names its experts; first_k_dense_replace says whether there are any.
        if architecture is DEEPSEEK_V3 and key in ('n_shared_experts', 'n_routed_experts'):
            continue
        if shape.get(key) not in off:
            unsupported.append(f'{key}={shape[key]}')
    attention_bias, mlp_bias = bool(shape.get('attention_bias')), bool(shape.get('mlp_bias'))
    biases = f'attention_bias={attention_bias}, mlp_bias={mlp_bias}'
    if architecture is DEEPSEEK_V3:
        if attention_bias or mlp_bias:
            unsupported.append(f'biases in some places ({biases}); here MLA has other ones')
    elif attention_bias != mlp_bias:
        unsupported.append(f'biases in some places ({biases}); here they are everywhere or nowhere')
    return unsupported


def rope_settings(shape: dict) -> tuple[dict, list[str]]:
    """Return the config fields of RoPE, and what is asked of it that our models do not have."""
    rope = shape.get('rope_scaling') or shape.get('rope_parameters') or {}  # old and new spelling
    rope = dict(rope)
    rope_type = rope.get('rope_type', rope.get('type', 'default'))
    theta = float(rope.get('rope_theta') or shape.get('rope_theta') or 10000.0)
    settings = dict(rope_theta=theta, rope_scaling=1.0)
    if rope_type not in ('default', 'linear'):
        return settings, [f"RoPE of type '{rope_type}' (only default and linear)"]
    if rope_type == 'linear':
        settings['rope_scaling'] = float(rope['factor'])
    unsupported = []
    for key, value in rope.items():
        if key not in ROPE_KEYS and value not in MUST_BE_OFF.get(key, ()):
            unsupported.append(f'{key}={value} in RoPE')
    return settings, unsupported


def make_config(name: str, shape: dict, changes: dict) -> tuple[Architecture, GPTConfig]:
    """Return architecture and config of the model `name`, whose config.json is `shape`."""
    try:
        architecture, settings = settings_of(shape)
        with settings_errors():
            return architecture, architecture.model_class.Config(**settings | changes)
    except UserError as error:
        raise UserError(f'{name}: {error}') from None
    except KeyError as error:
        raise UserError(f'{name}: its config.json cannot be used: it lacks {error}') from None
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(f'{name}: its config.json cannot be used: {error}') from None


# -------------------------------------------------------------------------------------------------
# reading


def load(name: str, dtype: torch.dtype | None = None, **changes) -> tuple[GPT, HFTokenizer | None]:
    """
    Load a model and its tokenizer (None where it has no tokenizer.json).

    Weights are read tensor by tensor, so memory holds the model once.

    name: a folder, a name on the Hugging Face hub, or `random:NAME`, a shape of SHAPES
    dtype: of the weights; None keeps that of the file
    changes: config fields that leave the weights alone, such as dropout, kernel and absorb
    """
    name = str(name)
    shape = read_shape(name)
    architecture, config = make_config(name, shape, changes)
    if name.startswith('random:'):
        return make_in_dtype(architecture, config, dtype), None
    tokenizer = tokenizer_of(name, shape)
    if tokenizer and tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f'{name}: its tokenizer has {tokenizer.vocab_size} tokens, '
            f'the model only {config.vocab_size}'
        )
    with torch.device('meta'):
        model = architecture.model_class(config)
    table = layout(architecture, config, shape.get('rope_interleave', True))
    fill(model, table, read_tensors(name), dtype, name)
    return model, tokenizer


def read_shape(name: str) -> dict:
    """Return the config.json of a model that `load` would take."""
    if not name.startswith('random:'):
        return read_config(model_folder(name))
    shape = SHAPES.get(name.removeprefix('random:'))
    if shape is None:
        known = ', '.join(f'random:{known}' for known in SHAPES)
        raise UserError(f'{name} is not known: use {known}')
    return shape


def tokenizer_of(name: str, shape: dict) -> HFTokenizer | None:
    """Return the tokenizer of the model `name` with the config.json `shape`, where it has one."""
    if name.startswith('random:'):
        return None
    return read_tokenizer(model_folder(name), shape)


def make_in_dtype(architecture: Architecture, config: GPTConfig, dtype: torch.dtype | None) -> GPT:
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype or default)
    try:
        with settings_errors():
            return architecture.model_class(config)
    finally:
        torch.set_default_dtype(default)


def fill(
    model: GPT,
    table: dict[str, tuple[str, Rows]],
    tensors: dict[str, Callable[[], torch.Tensor]],
    dtype: torch.dtype | None,
    name: str,
) -> None:
    """
    Give a model that was built on the meta device its weights.

    UserError for a tensor too few, too many or of another shape.
    """
    tied = model.config.tie_weights
    check_tensor_names(table, tensors, tied, name)
    weights = read_weights(model, table, tensors, dtype, name)
    if tied and 'lm_head.weight' in tensors:
        embedding = weights['transformer.wte.weight']
        if not torch.equal(tensors['lm_head.weight']().to(embedding.dtype), embedding):
            raise UserError(
                f'{name}: its config.json ties the head to the embedding, '
                'but lm_head.weight is another matrix'
            )
    replace_parameters(model, weights)


def check_tensor_names(table: dict, tensors: dict, tied: bool, name: str) -> None:
    unused = ('rotary_emb.inv_freq',)
    if tied:
        unused += ('lm_head.weight',)  # it is compared with the embedding later
    present = {key for key in tensors if not key.endswith(unused)}
    missing, unknown = table.keys() - tensors.keys(), present - table.keys()
    for what, keys in (('lacks', missing), ('has what is unknown here,', unknown)):
        if not keys:
            continue
        more = f' and {len(keys) - 1} more tensors' if len(keys) > 1 else ''
        raise UserError(
            f'{name} {what} {min(keys)}{more}: '
            'its weights and its config.json do not fit each other'
        )


def read_weights(
    model: GPT, table: dict, tensors: dict, dtype: torch.dtype | None, name: str
) -> dict[str, torch.Tensor]:
    """Return our parameters by name, put together from their tensors."""
    params = dict(model.named_parameters(remove_duplicate=False))
    weights = {}
    for theirs, (ours, rows) in table.items():
        tensor = tensors[theirs]()
        if not isinstance(tensor, torch.Tensor) or tensor.dtype not in DTYPES:
            kind = str(getattr(tensor, 'dtype', 'no tensor')).removeprefix('torch.')
            raise UserError(f'{name}: {theirs} is {kind}, not a float of 16 bits or more')
        weight = weights.get(ours)
        if weight is None:
            weight = torch.empty(params[ours].shape, dtype=dtype or tensor.dtype)
        elif dtype is None:
            # The parts of one matrix may come in several dtypes: the widest holds them all.
            weight = weight.to(torch.promote_types(tensor.dtype, weight.dtype))
        expected = weight[rows].shape
        if tensor.shape != expected:
            raise UserError(
                f'{name}: {theirs} has the shape {tuple(tensor.shape)}, '
                f'but by config.json it is {tuple(expected)}'
            )
        weight[rows] = tensor.to(weight.dtype)
        weights[ours] = weight
    return weights


def replace_parameters(model: GPT, weights: dict[str, torch.Tensor]) -> None:
    """Put weights in the place of parameters on the meta device; a tied matrix stays one."""
    made = {}
    for prefix, module in model.named_modules():
        for key, old in module._parameters.items():
            if old is None:
                continue
            if old not in made:
                made[old] = torch.nn.Parameter(weights[f'{prefix}.{key}'])
                vars(made[old]).update(vars(old))  # `splits`, by which Muon takes it apart
            module._parameters[key] = made[old]
