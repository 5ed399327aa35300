"""
Other people's models. `load` reads Llama-family checkpoints of the Hugging Face layout (DeepSeek-Coder,
Llama, TinyLlama ...) into GPT, and dense DeepSeek-V3 ones into GPT_MLA; `export` writes GPT and GPT_MLA
to folders that stock transformers loads as LlamaForCausalLM and DeepseekV3ForCausalLM, without any code
of ours. Both ways go through one table (`layout`), and what the other side cannot express is refused by
name. safetensors and tokenizers are needed, transformers is not.

Legend: H heads; N, P, R as in model_mla.py. Weights are (out, in).
"""

from contextlib import ExitStack

import torch

from model import GPT
from model_mla import GPT_MLA, MLAConfig
from nanomla.checkpoints.hub import finder, read_json, tensors_in, weight_files
from nanomla.checkpoints.tokenizer import FILES, HFTokenizer
from nanomla.core.configurator import UserError

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
SHAPES = {
    'deepseek-coder-1.3b': CODER,  # config.json of what `random:NAME` makes
    'tiny': CODER
    | dict(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=176,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=128,
    ),
}
CLASSES = dict(llama='LlamaForCausalLM', deepseek_v3='DeepseekV3ForCausalLM')
DTYPES = {torch.float64, torch.float32, torch.bfloat16, torch.float16}

# Settings of config.json that change what a model computes, and that ours has no word for, unless they are off:
OFF = dict.fromkeys(
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
OFF |= dict.fromkeys(
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


# ---------------------------------------------------------------------------------------------------
# config.json


def settings_of(shape):
    """The model class and the config fields that a config.json describes. UserError names all that they cannot express."""
    kind, lacks = shape.get('model_type'), []
    if kind not in CLASSES:
        raise UserError(f"model_type '{kind}' is neither llama nor deepseek_v3")
    mla = kind == 'deepseek_v3'
    if (classes := shape.get('architectures') or [CLASSES[kind]]) != [CLASSES[kind]]:
        lacks.append(f'{", ".join(map(str, classes))} (only {CLASSES[kind]} is known)')
    if shape.get('hidden_act', 'silu') not in ('silu', 'swish'):
        lacks.append(f"hidden_act '{shape['hidden_act']}' (only silu, in SwiGLU)")
    lacks += [
        f'{key}={shape[key]}'
        for key, off in OFF.items()
        if shape.get(key) not in off
        and not (mla and key in ('n_shared_experts', 'n_routed_experts'))
    ]
    biases = {key: bool(shape.get(key)) for key in ('attention_bias', 'mlp_bias')}
    if biases['attention_bias'] != biases['mlp_bias'] or mla and any(biases.values()):
        lacks.append(
            f'biases in some places ({", ".join(f"{k}={v}" for k, v in biases.items())}); here {"MLA has other ones" if mla else "they are everywhere or nowhere"}'
        )
    rope = dict(
        shape.get('rope_scaling') or shape.get('rope_parameters') or {}
    )  # old spelling, new spelling
    rope_type, factor = rope.get('rope_type', rope.get('type', 'default')), 1.0
    if rope_type not in ('default', 'linear'):
        lacks.append(f"RoPE of type '{rope_type}' (only default and linear)")
    else:
        factor = float(rope['factor']) if rope_type == 'linear' else 1.0
        usual = dict.fromkeys(
            ('rope_type', 'type', 'rope_theta', 'factor', 'original_max_position_embeddings')
        )
        lacks += [
            f'{key}={value} in RoPE'
            for key, value in rope.items()
            if key not in usual and value not in OFF.get(key, ())
        ]

    settings = dict(
        block_size=int(shape.get('max_position_embeddings', 4096 if mla else 2048)),
        vocab_size=int(shape['vocab_size']),
        n_layer=int(shape['num_hidden_layers']),
        n_head=int(shape['num_attention_heads']),
        n_kv_head=int(shape.get('num_key_value_heads') or 0),
        head_dim=int(shape.get('head_dim') or 0),
        n_embd=int(shape['hidden_size']),
        n_inner=int(shape['intermediate_size']),
        pos='rope',
        norm='rmsnorm',
        act='swiglu',
        norm_eps=float(shape.get('rms_norm_eps', 1e-6)),
        bias=biases['attention_bias'],
        tie_weights=bool(shape.get('tie_word_embeddings', False)),
        rope_theta=float(rope.get('rope_theta') or shape.get('rope_theta') or 10000.0),
        rope_scaling=factor,
    )
    if mla:
        if (dense := shape['first_k_dense_replace']) < settings['n_layer']:
            lacks.append(
                f'mixture of experts (first_k_dense_replace={dense} of {settings["n_layer"]} layers)'
            )
        widths = {
            key: int(shape[key] or 0)
            for key in (
                'q_lora_rank',
                'kv_lora_rank',
                'qk_nope_head_dim',
                'qk_rope_head_dim',
                'v_head_dim',
            )
        }
        settings |= widths | dict(head_dim=widths['qk_nope_head_dim'] + widths['qk_rope_head_dim'])
    if lacks:
        raise UserError(f'what it needs has no place here: {"; ".join(lacks)}')
    return (GPT_MLA if mla else GPT), settings


def shape_of(c, dtype, ends, rope=None):
    """
    The config.json of a model with config `c`, the inverse of settings_of; `rope` in the place of its RoPE.
    UserError names all that Llama or DeepSeek-V3 cannot express.
    """
    mla = isinstance(c, MLAConfig)
    target = CLASSES['deepseek_v3' if mla else 'llama']
    needs = dict(
        mlp=True, pos='rope', norm='rmsnorm', act='swiglu', qk_norm=False, softmax_scale=0.0
    ) | (dict(bias=False, latent_norm=True) if mla else {})
    lacks = [
        f'{key}={getattr(c, key)} (it has {value})'
        for key, value in needs.items()
        if getattr(c, key) != value
    ]
    if not mla and c.n_embd % c.n_head:
        lacks.append(f'n_embd={c.n_embd} with n_head={c.n_head} (it wants a multiple)')
    if lacks:
        raise UserError(f'{target} cannot express this model: {"; ".join(lacks)}')

    plain = rope is None and c.rope_scaling == 1
    rope = rope or (
        dict(rope_type='default')
        if plain
        else dict(rope_type='linear', type='linear', factor=float(c.rope_scaling))
    )
    shape = dict(
        architectures=[target],
        model_type='deepseek_v3' if mla else 'llama',
        vocab_size=c.vocab_size,
        hidden_size=c.n_embd,
        intermediate_size=c.n_inner,
        num_hidden_layers=c.n_layer,
        num_attention_heads=c.n_head,
        num_key_value_heads=c.n_kv_head,
        max_position_embeddings=c.block_size,
        rms_norm_eps=float(c.norm_eps),
        hidden_act='silu',
        tie_word_embeddings=c.tie_weights,
        attention_bias=c.bias,
        attention_dropout=0.0,
        rope_theta=float(c.rope_theta),
        rope_parameters=rope | dict(rope_theta=float(c.rope_theta)),
        rope_scaling=None if plain else rope,
        initializer_range=0.02,
        use_cache=True,
        dtype=dtype,
        torch_dtype=dtype,
        **ends,
    )
    if not mla:
        return shape | dict(head_dim=c.head_dim, mlp_bias=c.bias)
    return shape | dict(  # every layer dense, no prediction of further tokens
        q_lora_rank=c.q_lora_rank or None,
        kv_lora_rank=c.kv_lora_rank,
        qk_nope_head_dim=c.qk_nope_head_dim,
        qk_rope_head_dim=c.qk_rope_head_dim,
        v_head_dim=c.v_head_dim,
        rope_interleave=True,
        first_k_dense_replace=c.n_layer,
        moe_layer_freq=1,
        n_routed_experts=1,
        n_shared_experts=1,
        num_experts_per_tok=1,
        n_group=1,
        topk_group=1,
        moe_intermediate_size=c.n_inner,
        num_nextn_predict_layers=0,
    )


# ---------------------------------------------------------------------------------------------------
# whose row is whose


def by_head(heads, first, second, order):
    """Ours, all heads' `first` rows and then all heads' `second`, in DeepSeek's order: head by head, the second rows by `order`."""
    a = torch.arange(heads * first).view(heads, first)
    b = heads * first + torch.arange(heads * second).view(heads, second)[:, order]
    return torch.cat([a, b], dim=1).flatten()


def layout(c, interleave=True):
    """
    Their tensor -> (our parameter, rows): row i of theirs is row rows[i] of ours, `...` means all as they are.
    DeepSeek turns neighbours (2k, 2k + 1) where we turn (k, k + P/2), unless its rope_interleave is off.
    """
    block = {
        'input_layernorm': ('ln_1', ...),
        'post_attention_layernorm': ('ln_2', ...),
        'self_attn.o_proj': ('attn.c_proj', ...),
        'mlp.gate_proj': ('mlp.c_fc', slice(0, c.n_inner)),
        'mlp.up_proj': ('mlp.c_fc', slice(c.n_inner, 2 * c.n_inner)),
        'mlp.down_proj': ('mlp.c_proj', ...),
    }
    if isinstance(c, MLAConfig):
        H, N, P, R = c.n_head, c.qk_nope_head_dim, c.qk_rope_head_dim, c.kv_lora_rank
        pairs = torch.arange(P).view(2, P // 2).T.flatten() if interleave else torch.arange(P)
        attn = {
            'q_b_proj' if c.q_lora_rank else 'q_proj': by_head(H, N, P, pairs),
            'kv_a_layernorm': ...,
            'kv_a_proj_with_mqa': torch.cat([torch.arange(R), R + pairs]),
            'kv_b_proj': by_head(H, N, c.v_head_dim, torch.arange(c.v_head_dim)),
        }
        attn |= dict(q_a_proj=..., q_a_layernorm=...) if c.q_lora_rank else {}
        block |= {f'self_attn.{name}': (f'attn.{name}', rows) for name, rows in attn.items()}
    else:
        q, k = c.n_head * c.head_dim, c.n_kv_head * c.head_dim
        rows = dict(q=slice(0, q), k=slice(q, q + k), v=slice(q + k, q + 2 * k))
        block |= {f'self_attn.{name}_proj': ('attn.c_attn', part) for name, part in rows.items()}
    table = {
        'model.embed_tokens.weight': ('transformer.wte.weight', ...),
        'model.norm.weight': ('transformer.ln_f.weight', ...),
    }
    table |= {} if c.tie_weights else {'lm_head.weight': ('lm_head.weight', ...)}
    for n in range(c.n_layer):
        for theirs, (ours, rows) in block.items():
            for part in (
                ('weight', 'bias') if c.bias and not theirs.endswith('norm') else ('weight',)
            ):
                table[f'model.layers.{n}.{theirs}.{part}'] = (
                    f'transformer.h.{n}.{ours}.{part}',
                    rows,
                )
    return table


# ---------------------------------------------------------------------------------------------------
# reading


def load(name, dtype=None, **changes):
    """
    A model and its tokenizer (or None) from a folder, by a name on the Hugging Face hub, or `random:NAME` with the shape
    of NAME in SHAPES. Weights keep the dtype of the file unless `dtype` names another; they come tensor by tensor, so
    memory holds the model once. `changes` are config fields that leave the weights alone (dropout, kernel, absorb).
    """
    name, shape = str(name), SHAPES.get(str(name).removeprefix('random:'))
    if name.startswith('random:') and shape is None:
        raise UserError(
            f'{name} is not known: use {", ".join(f"random:{known}" for known in SHAPES)}'
        )
    if not name.startswith('random:'):
        find = finder(name)
        shape = read_json(find('config.json') or name)
    try:
        model_class, settings = settings_of(shape)
        config = model_class.Config(**settings | changes)
    except UserError as error:
        raise UserError(f'{name}: {error}') from None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        what = f'it lacks {error}' if isinstance(error, KeyError) else error
        raise UserError(f'{name}: its config.json cannot be used: {what}') from None
    if name.startswith('random:'):
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype or before)
        try:
            return model_class(config), None
        finally:
            torch.set_default_dtype(before)
    with torch.device('meta'):
        model = model_class(config)
    with ExitStack() as files:
        tensors = {}
        for path in weight_files(name, find):
            new = files.enter_context(tensors_in(path))
            if twice := tensors.keys() & new.keys():
                raise UserError(f'{name} has {min(twice)} in two of its files')
            tensors |= new
        fill(model, layout(config, shape.get('rope_interleave', True)), tensors, dtype, name)
    tokenizer = tokenizer_of(find, shape)
    if tokenizer and tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f'{name}: its tokenizer has {tokenizer.vocab_size} tokens, the model only {config.vocab_size}'
        )
    return model, tokenizer


def tokenizer_of(find, shape):
    files = [path for file in FILES if (path := find(file))]
    return HFTokenizer(files, shape) if files and files[0].name == 'tokenizer.json' else None


def fill(model, table, tensors, dtype, name):
    """Gives `model`, built on the meta device, its weights. UserError for a tensor too few, too many or of another shape."""
    idle = (
        ('rotary_emb.inv_freq', 'lm_head.weight')
        if model.config.tie_weights
        else 'rotary_emb.inv_freq'
    )  # a tied head is compared below
    rest = {key for key in tensors if not key.endswith(idle)} - table.keys()
    for what, keys in (
        ('lacks', table.keys() - tensors.keys()),
        ('has what is unknown here,', rest),
    ):
        if keys:
            raise UserError(
                f'{name} {what} {min(keys)}{f" and {len(keys) - 1} more tensors" if len(keys) > 1 else ""}: '
                'its weights and its config.json do not fit each other'
            )
    params, real = dict(model.named_parameters(remove_duplicate=False)), {}
    for theirs, (ours, rows) in table.items():
        tensor = tensors[theirs]()
        if not isinstance(tensor, torch.Tensor) or tensor.dtype not in DTYPES:
            raise UserError(
                f'{name}: {theirs} is {str(getattr(tensor, "dtype", "no tensor")).removeprefix("torch.")}, not a float of 16 bits or more'
            )
        kept = dtype or torch.promote_types(
            tensor.dtype, real[ours].dtype if ours in real else tensor.dtype
        )
        real[ours] = (
            real[ours].to(kept) if ours in real else torch.empty(params[ours].shape, dtype=kept)
        )
        if tensor.shape != (shape := real[ours][rows].shape):
            raise UserError(
                f'{name}: {theirs} has the shape {tuple(tensor.shape)}, but by config.json it is {tuple(shape)}'
            )
        real[ours][rows] = tensor.to(kept)
    if model.config.tie_weights and 'lm_head.weight' in tensors:
        if not torch.equal(
            tensors['lm_head.weight']().to(real['transformer.wte.weight'].dtype),
            real['transformer.wte.weight'],
        ):
            raise UserError(
                f'{name}: its config.json ties the head to the embedding, but lm_head.weight is another matrix'
            )
    made = {}
    for prefix, module in model.named_modules():
        for key, p in module._parameters.items():
            if p is not None:
                if p not in made:  # a tied matrix stays one
                    made[p] = torch.nn.Parameter(real[f'{prefix}.{key}'])
                    vars(made[p]).update(vars(p))  # Muon's splits
                module._parameters[key] = made[p]


# ---------------------------------------------------------------------------------------------------
# writing
