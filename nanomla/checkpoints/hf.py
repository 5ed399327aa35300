"""
Load Hugging Face models into GPT, GPT_QKGain and GPT_MLA. families/ says of each kind what its
config.json and its tensors mean; export.py writes some of them. safetensors and tokenizers are
needed, transformers is not.
"""

import sys
from collections.abc import Callable

import torch

from model import GPT, GPTConfig
from nanomla.checkpoints.families.config import (
    DEEPSEEK_V3,
    LLAMA,
    Description,
    Family,
    describe,
)
from nanomla.checkpoints.families.tensors import (
    ATTENTION_LINEARS,
    BARE,
    LATENT_LINEARS,
    MLP_LINEARS,
    Rows,
)
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
V2_LITE = dict(
    model_type='deepseek_v2',
    vocab_size=102400,
    hidden_size=2048,
    intermediate_size=10944,
    moe_intermediate_size=1408,
    num_hidden_layers=27,
    num_attention_heads=16,
    num_key_value_heads=16,
    q_lora_rank=None,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    n_routed_experts=64,
    n_shared_experts=2,
    num_experts_per_tok=6,
    first_k_dense_replace=1,
    topk_method='greedy',
    max_position_embeddings=163840,
    rms_norm_eps=1e-6,
    rope_theta=1e4,
    rope_scaling=dict(
        type='yarn',
        factor=40,
        mscale=0.707,
        mscale_all_dim=0.707,
        original_max_position_embeddings=4096,
        beta_fast=32,
        beta_slow=1,
    ),
    torch_dtype='bfloat16',
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
SHAPES = {'deepseek-coder-1.3b': CODER, 'deepseek-v2-lite': V2_LITE, 'tiny': TINY}
DTYPES = {torch.float64, torch.float32, torch.bfloat16, torch.float16}


# -------------------------------------------------------------------------------------------------
# what is exported


EXPORTED = (LLAMA, DEEPSEEK_V3)


def architecture_of(model: GPT) -> Family:
    """
    Return the family that computes what `model` does. Only the exact classes of model and
    attention count: what a subclass computes is not known. UserError names those that are not.
    """
    for family in EXPORTED:
        if type(model) is not family.model_class:
            continue
        for block in model.transformer.h:
            if type(block.attn) is not family.attention_class:
                raise UserError(
                    f'{type(block.attn).__name__} cannot be exported: {family.class_name} '
                    f'has {family.attention_class.__name__}'
                )
        return family
    known = ' and '.join(one.model_class.__name__ for one in EXPORTED)
    raise UserError(f'{type(model).__name__} cannot be exported: only {known} can')


def layout(
    family: Family, config: GPTConfig, description: Description | None = None
) -> dict[str, tuple[str, Rows]]:
    """
    Return their tensor -> (our parameter, rows) of a whole model.

    description: of a model that is read; None for one that is written, with a bias everywhere or
        nowhere
    """
    make_table, biased = family.table, ()
    if config.bias and family is DEEPSEEK_V3:
        biased = LATENT_LINEARS
    elif config.bias:
        biased = ATTENTION_LINEARS + MLP_LINEARS
    if description is not None:
        make_table, biased = description.table or make_table, description.biased
    table = {
        'model.embed_tokens.weight': ('transformer.wte.weight', ...),
        'model.norm.weight': ('transformer.ln_f.weight', ...),
    }
    if not config.tie_weights:
        table['lm_head.weight'] = ('lm_head.weight', ...)
    for n in range(config.n_layer):
        for theirs, (ours, rows) in make_table(config, n).items():
            theirs, ours = f'model.layers.{n}.{theirs}', f'transformer.h.{n}.{ours}'
            table[parameter(theirs)] = (parameter(ours), rows)
            if theirs.endswith(biased):
                table[f'{theirs}.bias'] = (f'{ours}.bias', rows)
    return table


def parameter(module: str) -> str:
    """Return the name of a module's weight."""
    return module if module.endswith(BARE) else f'{module}.weight'


# -------------------------------------------------------------------------------------------------
# config.json


def make_config(name: str, shape: dict, changes: dict) -> tuple[Family, GPTConfig]:
    """Return family and config of the model `name`, whose config.json is `shape`."""
    family, _, config = describe_model(name, shape, changes)
    return family, config


def describe_model(name: str, shape: dict, changes: dict) -> tuple[Family, Description, GPTConfig]:
    """Return family, description and config, with `changes`, of the model `name`."""
    try:
        family, description = describe(shape)
        longest = description.settings['block_size']
        if description.limit and changes.get('block_size', 0) > longest:
            raise UserError(
                f'block_size={changes["block_size"]} is too long: {description.limit}; '
                f'use at most {longest}'
            )
        with settings_errors():
            config = family.model_class.Config(**description.settings | changes)
    except UserError as error:
        raise UserError(f'{name}: {error}') from None
    except KeyError as error:
        raise UserError(f'{name}: its config.json cannot be used: it lacks {error}') from None
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(f'{name}: its config.json cannot be used: {error}') from None
    return family, description, config


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
    family, description, config = describe_model(name, shape, changes)
    if name.startswith('random:'):
        if dtype is None and 'torch_dtype' in shape:
            dtype = getattr(torch, shape['torch_dtype'])
        return make_in_dtype(family, config, dtype), None
    tokenizer = tokenizer_of(name, shape)
    if tokenizer and tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f'{name}: its tokenizer has {tokenizer.vocab_size} tokens, '
            f'the model only {config.vocab_size}'
        )
    with torch.device('meta'):
        model = family.model_class(config)
    table = layout(family, config, description)
    tensors = read_tensors(name)
    for key in [key for key in tensors if key.startswith(description.ignored)]:
        del tensors[key]
    fill(model, table, tensors, dtype, name)
    scale(model, description)
    if description.limit and 'block_size' not in changes:
        print(f'{name}: block_size={config.block_size}, as {description.limit}', file=sys.stderr)
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


def make_in_dtype(family: Family, config: GPTConfig, dtype: torch.dtype | None) -> GPT:
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype or default)
    try:
        with settings_errors():
            return family.model_class(config)
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
    add_missing_biases(weights, params)
    return weights


def add_missing_biases(weights: dict[str, torch.Tensor], params: dict) -> None:
    """Give zeros to the biases that only our model has: those of a family may be in some places."""
    for name, param in params.items():
        if name.endswith('.bias') and name not in weights:
            of_weight = weights[f'{name.removesuffix("bias")}weight']
            weights[name] = torch.zeros(param.shape, dtype=of_weight.dtype)


@torch.no_grad()
def scale(model: GPT, description: Description) -> None:
    """Fold the factors of a description into the weights."""
    for name, param in model.named_parameters():
        for ending, rows, factor in description.scales:
            if name.endswith(ending):
                param[rows] *= factor


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
