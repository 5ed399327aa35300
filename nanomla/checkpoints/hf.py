"""
Other people's models. `load` reads Llama-family checkpoints of the Hugging Face layout (DeepSeek-Coder,
Llama, TinyLlama ...) into GPT, and dense DeepSeek-V3 ones into GPT_MLA; `export` writes GPT and GPT_MLA
to folders that stock transformers loads as LlamaForCausalLM and DeepseekV3ForCausalLM, without any code
of ours. Both ways go through one table (`layout`), and what the other side cannot express is refused by
name. safetensors and tokenizers are needed, transformers is not.

Legend: H heads; N, P, R as in model_mla.py. Weights are (out, in).
"""
import json
import os
import re
import shutil
import zipfile
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import torch

from nanomla.core.configurator import UserError
from nanomla.checkpoints.tokenizer import FILES, HFTokenizer
from model import GPT
from model_mla import GPT_MLA, MLAConfig

CODER = dict(model_type='llama', vocab_size=32256, hidden_size=2048, intermediate_size=5504, num_hidden_layers=24, num_attention_heads=16,
             num_key_value_heads=16, max_position_embeddings=16384, rms_norm_eps=1e-6, rope_theta=1e5, rope_scaling=dict(type='linear', factor=4.0))
SHAPES = {'deepseek-coder-1.3b': CODER,  # config.json of what `random:NAME` makes
          'tiny': CODER | dict(vocab_size=256, hidden_size=64, intermediate_size=176, num_hidden_layers=2, num_attention_heads=4,
                               num_key_value_heads=4, max_position_embeddings=128)}
CLASSES = dict(llama='LlamaForCausalLM', deepseek_v3='DeepseekV3ForCausalLM')
DTYPES = {torch.float64, torch.float32, torch.bfloat16, torch.float16}

# Settings of config.json that change what a model computes, and that ours has no word for, unless they are off:
OFF = dict.fromkeys((
    'qk_norm', 'use_qk_norm', 'qk_layernorm', 'sliding_window', 'quantization_config', 'num_experts', 'num_local_experts', 'n_shared_experts', 'n_routed_experts',
    'attn_logit_softcapping', 'final_logit_softcapping', 'logit_softcapping', 'num_nextn_predict_layers', 'num_mtp_layers'), (None, False, 0))
OFF |= dict.fromkeys(('partial_rotary_factor', 'attention_multiplier', 'embedding_multiplier', 'residual_multiplier', 'logits_scaling', 'logit_scale'), (None, 1))


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
    lacks += [f'{key}={shape[key]}' for key, off in OFF.items() if shape.get(key) not in off and not (mla and key in ('n_shared_experts', 'n_routed_experts'))]
    biases = {key: bool(shape.get(key)) for key in ('attention_bias', 'mlp_bias')}
    if biases['attention_bias'] != biases['mlp_bias'] or mla and any(biases.values()):
        lacks.append(f"biases in some places ({', '.join(f'{k}={v}' for k, v in biases.items())}); here {'MLA has other ones' if mla else 'they are everywhere or nowhere'}")
    rope = dict(shape.get('rope_scaling') or shape.get('rope_parameters') or {})  # old spelling, new spelling
    rope_type, factor = rope.get('rope_type', rope.get('type', 'default')), 1.0
    if rope_type not in ('default', 'linear'):
        lacks.append(f"RoPE of type '{rope_type}' (only default and linear)")
    else:
        factor = float(rope['factor']) if rope_type == 'linear' else 1.0
        usual = dict.fromkeys(('rope_type', 'type', 'rope_theta', 'factor', 'original_max_position_embeddings'))
        lacks += [f'{key}={value} in RoPE' for key, value in rope.items() if key not in usual and value not in OFF.get(key, ())]

    settings = dict(
        block_size=int(shape.get('max_position_embeddings', 4096 if mla else 2048)), vocab_size=int(shape['vocab_size']),
        n_layer=int(shape['num_hidden_layers']), n_head=int(shape['num_attention_heads']), n_kv_head=int(shape.get('num_key_value_heads') or 0), head_dim=int(shape.get('head_dim') or 0),
        n_embd=int(shape['hidden_size']), n_inner=int(shape['intermediate_size']), pos='rope', norm='rmsnorm', act='swiglu',
        norm_eps=float(shape.get('rms_norm_eps', 1e-6)), bias=biases['attention_bias'], tie_weights=bool(shape.get('tie_word_embeddings', False)),
        rope_theta=float(rope.get('rope_theta') or shape.get('rope_theta') or 10000.0), rope_scaling=factor)
    if mla:
        if (dense := shape['first_k_dense_replace']) < settings['n_layer']:
            lacks.append(f'mixture of experts (first_k_dense_replace={dense} of {settings["n_layer"]} layers)')
        widths = {key: int(shape[key] or 0) for key in ('q_lora_rank', 'kv_lora_rank', 'qk_nope_head_dim', 'qk_rope_head_dim', 'v_head_dim')}
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
    needs = dict(mlp=True, pos='rope', norm='rmsnorm', act='swiglu', qk_norm=False, softmax_scale=0.0) | (dict(bias=False, latent_norm=True) if mla else {})
    lacks = [f'{key}={getattr(c, key)} (it has {value})' for key, value in needs.items() if getattr(c, key) != value]
    if not mla and c.n_embd % c.n_head:
        lacks.append(f'n_embd={c.n_embd} with n_head={c.n_head} (it wants a multiple)')
    if lacks:
        raise UserError(f'{target} cannot express this model: {"; ".join(lacks)}')

    plain = rope is None and c.rope_scaling == 1
    rope = rope or (dict(rope_type='default') if plain else dict(rope_type='linear', type='linear', factor=float(c.rope_scaling)))
    shape = dict(
        architectures=[target], model_type='deepseek_v3' if mla else 'llama', vocab_size=c.vocab_size, hidden_size=c.n_embd,
        intermediate_size=c.n_inner, num_hidden_layers=c.n_layer, num_attention_heads=c.n_head, num_key_value_heads=c.n_kv_head,
        max_position_embeddings=c.block_size, rms_norm_eps=float(c.norm_eps), hidden_act='silu', tie_word_embeddings=c.tie_weights,
        attention_bias=c.bias, attention_dropout=0.0, rope_theta=float(c.rope_theta), rope_parameters=rope | dict(rope_theta=float(c.rope_theta)),
        rope_scaling=None if plain else rope, initializer_range=0.02, use_cache=True, dtype=dtype, torch_dtype=dtype, **ends)
    if not mla:
        return shape | dict(head_dim=c.head_dim, mlp_bias=c.bias)
    return shape | dict(  # every layer dense, no prediction of further tokens
        q_lora_rank=c.q_lora_rank or None, kv_lora_rank=c.kv_lora_rank, qk_nope_head_dim=c.qk_nope_head_dim, qk_rope_head_dim=c.qk_rope_head_dim,
        v_head_dim=c.v_head_dim, rope_interleave=True, first_k_dense_replace=c.n_layer, moe_layer_freq=1, n_routed_experts=1, n_shared_experts=1,
        num_experts_per_tok=1, n_group=1, topk_group=1, moe_intermediate_size=c.n_inner, num_nextn_predict_layers=0)


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
    block = {'input_layernorm': ('ln_1', ...), 'post_attention_layernorm': ('ln_2', ...), 'self_attn.o_proj': ('attn.c_proj', ...),
             'mlp.gate_proj': ('mlp.c_fc', slice(0, c.n_inner)), 'mlp.up_proj': ('mlp.c_fc', slice(c.n_inner, 2 * c.n_inner)),
             'mlp.down_proj': ('mlp.c_proj', ...)}
    if isinstance(c, MLAConfig):
        H, N, P, R = c.n_head, c.qk_nope_head_dim, c.qk_rope_head_dim, c.kv_lora_rank
        pairs = torch.arange(P).view(2, P // 2).T.flatten() if interleave else torch.arange(P)
        attn = {'q_b_proj' if c.q_lora_rank else 'q_proj': by_head(H, N, P, pairs), 'kv_a_layernorm': ...,
                'kv_a_proj_with_mqa': torch.cat([torch.arange(R), R + pairs]), 'kv_b_proj': by_head(H, N, c.v_head_dim, torch.arange(c.v_head_dim))}
        attn |= dict(q_a_proj=..., q_a_layernorm=...) if c.q_lora_rank else {}
        block |= {f'self_attn.{name}': (f'attn.{name}', rows) for name, rows in attn.items()}
    else:
        q, k = c.n_head * c.head_dim, c.n_kv_head * c.head_dim
        rows = dict(q=slice(0, q), k=slice(q, q + k), v=slice(q + k, q + 2 * k))
        block |= {f'self_attn.{name}_proj': ('attn.c_attn', part) for name, part in rows.items()}
    table = {'model.embed_tokens.weight': ('transformer.wte.weight', ...), 'model.norm.weight': ('transformer.ln_f.weight', ...)}
    table |= {} if c.tie_weights else {'lm_head.weight': ('lm_head.weight', ...)}
    for n in range(c.n_layer):
        for theirs, (ours, rows) in block.items():
            for part in ('weight', 'bias') if c.bias and not theirs.endswith('norm') else ('weight',):
                table[f'model.layers.{n}.{theirs}.{part}'] = (f'transformer.h.{n}.{ours}.{part}', rows)
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
        raise UserError(f'{name} is not known: use {", ".join(f"random:{known}" for known in SHAPES)}')
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
        raise UserError(f'{name}: its tokenizer has {tokenizer.vocab_size} tokens, the model only {config.vocab_size}')
    return model, tokenizer


def tokenizer_of(find, shape):
    files = [path for file in FILES if (path := find(file))]
    return HFTokenizer(files, shape) if files and files[0].name == 'tokenizer.json' else None


def finder(name):
    """find(file) -> its path in the folder, or in the hub's model, or None."""
    if Path(name).is_dir():
        return lambda file: Path(name, file) if Path(name, file).exists() else None
    if not re.fullmatch(r'[\w.-]+(/[\w.-]+)?', name):
        raise UserError(f'{name} is neither a folder nor the name of a model on the Hugging Face hub')

    def find(file):
        try:
            from huggingface_hub import hf_hub_download
            from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
        except ImportError:
            raise UserError(f"'{name}' is no folder, and models of the Hugging Face hub need pip install huggingface_hub") from None
        try:
            return Path(hf_hub_download(name, file))
        except Exception as error:  # the hub's errors come in many classes
            if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
                return None
            raise UserError(f"'{name}' is no folder here, and {file} cannot be had from the Hugging Face hub ({type(error).__name__}): "
                            'check the name, connect to the network, or name a local folder') from None
    return find


def read_json(path):
    if not Path(path).is_file():
        raise UserError(f'{path} has no config.json: it is not a model of the Hugging Face layout')
    try:
        return dict(json.loads(Path(path).read_text(encoding='utf-8')))
    except (OSError, ValueError, TypeError):
        raise UserError(f'{path} cannot be read: it is damaged or no JSON') from None


def weight_files(name, find):
    """The files that hold the weights: one, the shards of an index, or all *.safetensors of a folder."""
    for one in ('model.safetensors', 'pytorch_model.bin'):
        if path := find(one):
            return [path]
        if path := find(f'{one}.index.json'):
            try:
                shards = sorted({Path(shard).name for shard in read_json(path)['weight_map'].values()})
            except (KeyError, TypeError, AttributeError):
                raise UserError(f'{path} cannot be used: it names no shards') from None
            paths = [find(shard) for shard in shards]
            if None in paths:
                raise UserError(f'{name} lacks {shards[paths.index(None)]}, one of the {len(shards)} shards that its index names')
            return paths
        if one == 'model.safetensors' and (paths := sorted(Path(name).glob('*.safetensors'))):
            return paths
    raise UserError(f'{name} has no weights: neither *.safetensors nor pytorch_model.bin')


@contextmanager
def tensors_in(path):
    """name -> a function that reads this tensor of the file; none is read before."""
    try:
        if path.suffix == '.safetensors':
            from safetensors import safe_open
            file = safe_open(path, framework='pt')
        else:
            file = torch.load(path, map_location='cpu', mmap=zipfile.is_zipfile(path), weights_only=True)
        keys = list(file.keys())
    except ImportError:
        raise UserError(f'{path} needs safetensors: pip install -r requirements-convert.txt') from None
    except Exception:  # damaged, foreign and malicious files fail in many ways
        raise UserError(f'{path} cannot be read: it is damaged, or holds code, which is never run') from None
    yield {key: partial(file.get_tensor if path.suffix == '.safetensors' else file.get, key) for key in keys}


def fill(model, table, tensors, dtype, name):
    """Gives `model`, built on the meta device, its weights. UserError for a tensor too few, too many or of another shape."""
    idle = ('rotary_emb.inv_freq', 'lm_head.weight') if model.config.tie_weights else 'rotary_emb.inv_freq'  # a tied head is compared below
    rest = {key for key in tensors if not key.endswith(idle)} - table.keys()
    for what, keys in (('lacks', table.keys() - tensors.keys()), ('has what is unknown here,', rest)):
        if keys:
            raise UserError(f'{name} {what} {min(keys)}{f" and {len(keys) - 1} more tensors" if len(keys) > 1 else ""}: '
                            'its weights and its config.json do not fit each other')
    params, real = dict(model.named_parameters(remove_duplicate=False)), {}
    for theirs, (ours, rows) in table.items():
        tensor = tensors[theirs]()
        if not isinstance(tensor, torch.Tensor) or tensor.dtype not in DTYPES:
            raise UserError(f'{name}: {theirs} is {str(getattr(tensor, "dtype", "no tensor")).removeprefix("torch.")}, not a float of 16 bits or more')
        kept = dtype or torch.promote_types(tensor.dtype, real[ours].dtype if ours in real else tensor.dtype)
        real[ours] = real[ours].to(kept) if ours in real else torch.empty(params[ours].shape, dtype=kept)
        if tensor.shape != (shape := real[ours][rows].shape):
            raise UserError(f'{name}: {theirs} has the shape {tuple(tensor.shape)}, but by config.json it is {tuple(shape)}')
        real[ours][rows] = tensor.to(kept)
    if model.config.tie_weights and 'lm_head.weight' in tensors:
        if not torch.equal(tensors['lm_head.weight']().to(real['transformer.wte.weight'].dtype), real['transformer.wte.weight']):
            raise UserError(f'{name}: its config.json ties the head to the embedding, but lm_head.weight is another matrix')
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

SHRUNK = 2.0 ** -30  # latents as small as that vanish beside the epsilon of the stock norm, which then only divides by its root


def stock(model):
    """
    A converted GPT_MLA as the stock class computes it: its config, its parameters by our names, and its RoPE for config.json
    (None: the ordinary one). The same function by other weights:

    - the norm of the latent cannot be left out there: W^DKV · 2⁻³⁰ makes it a division by √ε, which W^UK | W^UV undo
    - one table of frequencies serves all layers: it has each as often as the layer that needs it most, where others are zero
    - the softmax scale is that of the width of query and key: the query takes up the difference
    """
    c, params = model.config, {name: p.detach() for name, p in model.named_parameters(remove_duplicate=False)}
    layers = [block.attn.rope_pairs.tolist() for block in model.transformer.h]
    slots = sorted(j for j in set().union(*layers) for _ in range(max(pairs.count(j) for pairs in layers)))
    P, R, H, D = 2 * len(slots), c.kv_lora_rank, c.n_head, c.source_head_dim
    stock_config = MLAConfig(**{key: getattr(c, key) for key in MLAConfig.keys()} | dict(
        head_dim=c.qk_nope_head_dim + P, qk_rope_head_dim=P, kv_lora_ranks=(), source_head_dim=0, latent_norm=True))
    shape_of(stock_config, '', {})  # refuses what has no place
    if max(p.dtype.itemsize for p in params.values()) == 2 and any(p.dtype == torch.float16 for p in params.values()):
        raise UserError('a converted model does not fit float16, whose numbers are not small enough: export it in bfloat16 or float32')

    def spread(rows, to):
        """(..., P of this model, C) -> (..., P of the stock one, C): pair k to slot to[k]."""
        a, b = rows.unflatten(-2, (2, -1)).unbind(-3)
        wide = rows.new_zeros(*rows.shape[:-2], 2, len(slots), rows.size(-1))
        wide[..., 0, to, :], wide[..., 1, to, :] = a, b
        return wide.flatten(-3, -2)

    grow = 1e-6 ** 0.5 / SHRUNK
    for n, pairs in enumerate(layers):
        a, r = f'transformer.h.{n}.attn.', c.rank(n)
        to = [slots.index(j) + pairs[:k].count(j) for k, j in enumerate(pairs)]
        q = f'{a}q_b_proj.weight' if c.q_lora_rank else f'{a}q_proj.weight'
        nope, pe = params[q].split([H * c.qk_nope_head_dim, H * c.qk_rope_head_dim])
        scale = ((c.qk_nope_head_dim + P) / D) ** 0.5 * (grow if c.q_lora_rank else 1.0)
        params[q] = scale * torch.cat([nope, spread(pe.unflatten(0, (H, -1)), to).flatten(0, 1)])
        down, k_pe = params[f'{a}kv_a_proj_with_mqa.weight'].split([r, c.qk_rope_head_dim])
        params[f'{a}kv_a_proj_with_mqa.weight'] = torch.cat([SHRUNK * down, down.new_zeros(R - r, down.size(1)), spread(k_pe, to)])
        up = params[f'{a}kv_b_proj.weight']
        params[f'{a}kv_b_proj.weight'] = torch.cat([grow * up, up.new_zeros(len(up), R - r)], dim=1)
        params[f'{a}kv_a_layernorm.weight'] = up.new_ones(R)
        if c.q_lora_rank:
            params[f'{a}q_a_proj.weight'] = SHRUNK * params[f'{a}q_a_proj.weight']
            params[f'{a}q_a_layernorm.weight'] = up.new_ones(c.q_lora_rank)
    if all(j * P == k * D for k, j in enumerate(slots)):
        return stock_config, params, None
    factors = [c.rope_scaling * c.rope_theta ** (2 * j / D - 2 * k / P) for k, j in enumerate(slots)]  # of the ordinary wavelengths
    return stock_config, params, dict(rope_type='longrope', short_factor=factors, long_factor=factors, factor=1.0, attention_factor=1.0,
                                      original_max_position_embeddings=c.block_size)


def export(model, folder, tokenizer=None, max_shard_size=5 * 10 ** 9):
    """
    Writes `model` to a new `folder` as stock transformers reads it: config.json, generation_config.json, safetensors
    (several files above max_shard_size bytes) and the files of `tokenizer`, an HFTokenizer or a folder. All or nothing.
    """
    folder = Path(folder)
    if folder.exists():
        raise UserError(f'{folder} is there already: name another folder, or remove it')
    try:
        from safetensors.torch import save_file
    except ImportError:
        raise UserError('writing this layout needs safetensors: pip install -r requirements-convert.txt') from None
    if tokenizer is not None and not isinstance(tokenizer, HFTokenizer):
        find, name = finder(str(tokenizer)), tokenizer
        if not (tokenizer := tokenizer_of(find, read_json(find('config.json')) if find('config.json') else {})):
            raise UserError(f'{name} has no tokenizer.json')
    eos = sorted(tokenizer.eos) if tokenizer else []
    ends = dict(bos_token_id=tokenizer.bos if tokenizer else None, eos_token_id=eos[0] if len(eos) == 1 else eos or None, pad_token_id=None)
    c, params, rope = stock(model) if getattr(model.config, 'source_head_dim', 0) else (model.config, dict(model.named_parameters(remove_duplicate=False)), None)
    shape = shape_of(c, str(max((p.dtype for p in params.values()), key=lambda d: d.itemsize))[6:], ends, rope)
    table, shards, sizes = layout(c), [[]], [0]
    for theirs, (ours, rows) in table.items():
        size = params[ours].detach()[rows].nbytes
        if shards[-1] and sizes[-1] + size > max_shard_size:
            shards, sizes = shards + [[]], sizes + [0]
        shards[-1].append(theirs)
        sizes[-1] += size
    names = [f'model-{i:05d}-of-{len(shards):05d}.safetensors' for i in range(1, len(shards) + 1)] if len(shards) > 1 else ['model.safetensors']
    partial_folder = folder.with_name(f'{folder.name}.{os.getpid()}.partial')
    texts = {'config.json': shape, 'generation_config.json': dict(_from_model_config=True, **{k: v for k, v in ends.items() if v is not None})}
    if len(shards) > 1:
        texts['model.safetensors.index.json'] = dict(metadata=dict(total_size=sum(sizes)), weight_map={k: n for n, keys in zip(names, shards) for k in keys})
    try:
        partial_folder.mkdir(parents=True)
        for file, keys in zip(names, shards):
            tensors = {theirs: params[table[theirs][0]].detach()[table[theirs][1]].cpu().contiguous() for theirs in keys}
            save_file(tensors, partial_folder / file, metadata=dict(format='pt'))
        for file, content in texts.items():
            (partial_folder / file).write_text(json.dumps(content, indent=2) + '\n')
        for file in tokenizer.files if tokenizer else ():
            shutil.copyfile(file, partial_folder / file.name)
        for file in partial_folder.iterdir():
            file.chmod(0o666 & (partial_folder.stat().st_mode | 0o600))  # safetensors writes for the owner alone
            with open(file, 'rb') as opened:
                os.fsync(opened.fileno())
        os.rename(partial_folder, folder)
    except BaseException as error:
        shutil.rmtree(partial_folder, ignore_errors=True)
        if isinstance(error, OSError) or type(error).__name__ == 'SafetensorError':
            raise UserError(f'cannot write {folder}: {getattr(error, "strerror", None) or error}; nothing is left of it') from None
        raise
