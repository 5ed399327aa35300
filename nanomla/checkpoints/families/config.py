"""
What a config.json describes, family by family: fields of our configs, and what stands in the way.

FAMILIES has a function for each model_type. What our models compute otherwise is refused by name;
so is an entry that is not known here and is switched on, since nobody can say what it changes.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial

from attentions.moe import GPT_MoE
from attentions.qk_gain import GPT_QKGain, QKGainAttention
from model import GPT, GPTConfig, MultiHeadAttention
from model_mla import GPT_MLA, MultiHeadLatentAttention
from nanomla.checkpoints.families import tensors
from nanomla.checkpoints.families.rope import rope_of, yarn_mscale
from nanomla.checkpoints.families.tensors import Rows, Table
from nanomla.core.configurator import UserError

# Entries of any family that this page reads.
READ = set(
    'architectures model_type vocab_size hidden_size intermediate_size num_hidden_layers '
    'num_attention_heads num_key_value_heads head_dim max_position_embeddings rms_norm_eps '
    'tie_word_embeddings hidden_act attention_bias mlp_bias rope_theta rope_scaling '
    'rope_parameters original_max_position_embeddings'.split()
)
# Entries that leave alone what a model computes of its tokens, or what training alone needs.
HARMLESS = set(
    'transformers_version torch_dtype dtype auto_map use_cache initializer_range pretraining_tp '
    'bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id attention_dropout '
    'resid_pdrop embd_pdrop hidden_dropout output_attentions output_hidden_states return_dict '
    'use_return_dict chunk_size_feed_forward id2label label2id problem_type task_specific_params '
    'tokenizer_class prefix finetuning_task gradient_checkpointing temperature top_k top_p '
    'typical_p repetition_penalty length_penalty no_repeat_ngram_size max_length min_length '
    'num_beams num_beam_groups num_return_sequences diversity_penalty do_sample early_stopping '
    'aux_loss_alpha seq_aux ep_size router_aux_loss_coef output_router_logits attn_implementation '
    'keys_to_ignore_at_inference'.split()
)
HARMLESS_BEGINNINGS = ('_', 'unsloth', 'transformers')
# Factors that a 1 switches off, beside None, False and 0.
FACTORS = (
    'partial_rotary_factor',
    'attention_multiplier',
    'embedding_multiplier',
    'residual_multiplier',
    'logits_scaling',
    'logit_scale',
)


@dataclass
class Description:
    """
    What a config.json says of a model.

    settings: fields of our config; block_size is the longest that is exact
    table: names and rows of a block's tensors, where they are not the family's
    biased: modules of a block, by their last names, that have a bias; ours are zero elsewhere
    scales: (our parameter's last names, rows, factor) that are folded into the weights
    ignored: beginnings of the names of tensors that are left alone
    limit: why block_size is less than max_position_embeddings; '' where it is not
    """

    settings: dict
    table: Callable[[GPTConfig, int], Table] | None = None
    biased: tuple[str, ...] = ()
    scales: list[tuple[str, Rows, float]] = field(default_factory=list)
    unsupported: list[str] = field(default_factory=list)
    ignored: tuple[str, ...] = ()
    limit: str = ''

    def shorten(self, length: int, why: str) -> None:
        """Make the model no longer than `length`, beyond which it would be another one."""
        if length < self.settings['block_size']:
            self.settings['block_size'] = length
            self.limit = why


@dataclass(frozen=True)
class Family:
    """
    A model class of transformers and the one of ours that computes the same.

    describe: config.json -> Description
    table: names and rows of a block's tensors
    keys: entries of config.json that `describe` reads, beside READ
    requires: the values that config fields must have for a model to be exported as this class
    """

    model_type: str
    class_name: str
    describe: Callable[[dict], Description] = field(hash=False)
    model_class: type[GPT] = GPT
    attention_class: type = MultiHeadAttention
    table: Callable[[GPTConfig, int], Table] = tensors.llama_rows
    keys: frozenset[str] = frozenset()
    requires: dict = field(default_factory=dict, hash=False)


def describe(shape: dict) -> tuple[Family, Description]:
    """
    Return the family and the description of a config.json.

    UserError names all that cannot be expressed; KeyError, TypeError or ValueError where an entry
    is missing or is not what it should be.
    """
    model_type = shape.get('model_type')
    if has_experts(shape):
        model_type = f'{model_type} with experts'
    if model_type in REFUSED:
        raise UserError(f"model_type '{model_type}' has no place here: {REFUSED[model_type]}")
    if model_type not in FAMILIES:
        known = ', '.join(FAMILIES)
        raise UserError(f"model_type '{model_type}' is not known (known are {known})")
    family = FAMILIES[model_type]
    unsupported = unsupported_settings(shape, family)
    try:
        description = family.describe(shape)
        unsupported += description.unsupported
    except UserError as error:
        unsupported.append(str(error))
    if unsupported:
        raise UserError(f'what it needs has no place here: {"; ".join(unsupported)}')
    return family, description


def has_experts(shape: dict) -> bool:
    """Return whether a config.json of DeepSeek-V3's kind has layers with experts."""
    if shape.get('model_type') not in ('deepseek_v3', 'kimi_k2'):
        return False
    return shape['first_k_dense_replace'] < shape['num_hidden_layers']


def unsupported_settings(shape: dict, family: Family) -> list[str]:
    """Return what a config.json asks for that our model does not have."""
    unsupported = []
    classes = shape.get('architectures') or [family.class_name]
    if classes != [family.class_name]:
        names = ', '.join(str(name) for name in classes)
        unsupported.append(f'{names} (only {family.class_name} is known)')
    activation = shape.get('hidden_act', 'silu')
    if activation not in ('silu', 'swish'):
        unsupported.append(f"hidden_act '{activation}' (only silu, in SwiGLU)")
    known = READ | HARMLESS | family.keys
    for key, value in shape.items():
        if key in known or key.startswith(HARMLESS_BEGINNINGS) or is_off(key, value):
            continue
        unsupported.append(f'{key}={str(value)[:60]}')
    return unsupported


def is_off(key: str, value: object) -> bool:
    if key in FACTORS and value == 1:
        return True
    return value in (None, False, 0, '', [], {})


# -------------------------------------------------------------------------------------------------
# what families share


def decoder(shape: dict, head_dim: int = 0) -> Description:
    """
    Return what all families say in the same words, RoPE apart.

    head_dim: where the family has one by default
    """
    n_head, n_embd = int(shape['num_attention_heads']), int(shape['hidden_size'])
    return Description(
        dict(
            vocab_size=int(shape['vocab_size']),
            block_size=int(shape.get('max_position_embeddings', 2048)),
            n_layer=int(shape['num_hidden_layers']),
            n_head=n_head,
            n_kv_head=int(shape.get('num_key_value_heads') or 0),
            n_embd=n_embd,
            head_dim=int(shape.get('head_dim') or head_dim or n_embd // n_head),
            n_inner=int(shape['intermediate_size']),
            pos='rope',
            norm='rmsnorm',
            act='swiglu',
            norm_eps=float(shape.get('rms_norm_eps', 1e-6)),
            bias=False,
            tie_weights=bool(shape.get('tie_word_embeddings', False)),
        )
    )


def dense(
    shape: dict, head_dim: int = 0, turning: float = 1.0, nope_layers: tuple[int, ...] = ()
) -> Description:
    """
    Return `decoder` with the RoPE of a family without MLA.

    turning: the share of a head that RoPE turns
    """
    description = decoder(shape, head_dim)
    settings = description.settings
    settings['nope_layers'] = nope_layers
    D = settings['head_dim']
    factor = add_rope(description, shape, int(D * turning), D)
    if turning == 1 and not nope_layers:
        if factor != 1:
            settings['softmax_scale'] = factor**2 * D**-0.5
        return description
    # What does not turn is not multiplied. The queries take up the factor of the keys, too.
    rows = tensors.turning_rows(settings['n_head'], D, int(D * turning) // 2)
    for layer in set(range(settings['n_layer'])) - set(nope_layers):
        for parameter in ('weight', 'bias'):
            scale_rows(description, f'.{layer}.attn.c_attn.{parameter}', factor**2, rows)
    return description


def add_rope(description: Description, shape: dict, turning: int, width: int) -> float:
    """
    Set the fields of RoPE for a width of which `turning` channels turn. Return what queries and
    keys are to be multiplied by.
    """
    rope = rope_of(shape, turning)
    frequencies = rope.frequencies
    if turning < width:
        frequencies = rope.all_frequencies(turning) + (0.0,) * ((width - turning) // 2)
    description.settings |= dict(
        rope_theta=rope.theta, rope_scaling=rope.scaling, rope_frequencies=frequencies
    )
    if rope.longest:
        description.shorten(rope.longest, f'its RoPE changes beyond {rope.longest} tokens')
    return rope.factor


def add_biases(description: Description, modules: Iterable[str]) -> Description:
    description.biased = tuple(modules)
    description.settings['bias'] = bool(description.biased)
    return description


def biased_linears(shape: dict) -> tuple[str, ...]:
    """Return the modules with a bias, where attention_bias and mlp_bias say which."""
    modules = ()
    if shape.get('attention_bias'):
        modules += tensors.ATTENTION_LINEARS
    if shape.get('mlp_bias'):
        modules += tensors.MLP_LINEARS
    return modules


def add_window(description: Description, shape: dict, uses_window: bool) -> None:
    """Make the model no longer than its sliding window, where any layer has one."""
    window = shape.get('sliding_window')
    layers = shape.get('layer_types')
    if layers:
        strange = sorted(set(layers) - {'full_attention', 'sliding_attention'})
        if strange:
            description.unsupported.append(f'layer_types with {strange[0]}')
        uses_window = 'sliding_attention' in layers
    if uses_window and window:
        description.shorten(int(window), f'its sliding window of {window} tokens begins to matter')


def scale_rows(description: Description, name: str, factor: float, rows: Rows = ...) -> None:
    if factor != 1:
        description.scales.append((name, rows, factor))


# -------------------------------------------------------------------------------------------------
# the families


def llama(shape: dict) -> Description:
    return add_biases(dense(shape), biased_linears(shape))


def mistral(shape: dict) -> Description:
    description = dense(shape)
    add_window(description, shape, uses_window=True)
    return description


def qwen2(shape: dict) -> Description:
    """Queries, keys and values have biases, whatever config.json says."""
    description = dense(shape)
    add_qwen_window(description, shape)
    return add_biases(description, ('q_proj', 'k_proj', 'v_proj'))


def add_qwen_window(description: Description, shape: dict) -> None:
    first = int(shape.get('max_window_layers', 28))
    some = bool(shape.get('use_sliding_window')) and first < description.settings['n_layer']
    add_window(description, shape, some)


def qwen3(shape: dict) -> Description:
    description = dense(shape, head_dim=128)
    description.settings['qk_gain'] = 'head'
    add_qwen_window(description, shape)
    return add_biases(description, biased_linears(shape | dict(mlp_bias=False)))


def olmo2(shape: dict) -> Description:
    description = dense(shape)
    description.settings.update(
        qk_gain='layer', post_norm=True, norm_eps=float(shape.get('rms_norm_eps', 1e-5))
    )
    return add_biases(description, biased_linears(shape | dict(mlp_bias=False)))


def smollm3(shape: dict) -> Description:
    """Some layers have no RoPE: every fourth one, or those with a 0 in no_rope_layers."""
    n_layer = int(shape['num_hidden_layers'])
    has_rope = shape.get('no_rope_layers')
    if has_rope is None:
        interval = int(shape.get('no_rope_layer_interval', 4))
        has_rope = [(layer + 1) % interval for layer in range(n_layer)]
    if len(has_rope) != n_layer:
        raise ValueError(f'no_rope_layers has {len(has_rope)} entries for {n_layer} layers')
    nope = tuple(layer for layer in range(n_layer) if not has_rope[layer])
    shape = dict(rope_theta=2e6, tie_word_embeddings=True) | shape
    description = dense(shape, nope_layers=nope)
    add_window(description, shape, uses_window=bool(shape.get('use_sliding_window') and nope))
    return add_biases(description, biased_linears(shape))


def phi3(shape: dict) -> Description:
    """Its matrices are fused as ours are; Phi-4-mini turns three quarters of a head."""
    rope = dict(shape.get('rope_parameters') or {})
    turning = rope.pop('partial_rotary_factor', None) or shape.get('partial_rotary_factor') or 1
    description = dense(shape | dict(rope_parameters=rope), turning=float(turning))
    description.settings['norm_eps'] = float(shape.get('rms_norm_eps', 1e-5))
    add_window(description, shape, uses_window=True)
    return description


def granite(shape: dict) -> Description:
    """
    A Llama with four factors. They go into the weights: that of the embedding into it, that of the
    residual stream into what writes to it, that of the logits into the last norm's gain; the last
    one is the softmax scale.
    """
    description = add_biases(dense(shape), biased_linears(shape))
    settings = description.settings
    given = {key: float(shape.get(key, 1.0)) for key in GRANITE_FACTORS}
    embedding, logits = given['embedding_multiplier'], 1 / given['logits_scaling']
    if settings['tie_weights']:
        logits /= embedding  # the head is the embedding, which grows
    scale_rows(description, 'transformer.wte.weight', embedding)
    scale_rows(description, 'transformer.ln_f.weight', logits)
    for branch in ('attn', 'mlp'):
        for parameter in ('weight', 'bias'):
            name = f'{branch}.c_proj.{parameter}'
            scale_rows(description, name, given['residual_multiplier'])
    by_rope = settings.get('softmax_scale', settings['head_dim'] ** -0.5)
    scale = given['attention_multiplier'] * by_rope * settings['head_dim'] ** 0.5
    settings['softmax_scale'] = scale
    return description


def deepseek_v2(shape: dict) -> Description:
    """Experts by softmax: of all groups (greedy), or of the best ones (group_limited_greedy)."""
    description = deepseek(dict(max_position_embeddings=2048) | shape, tensors.moe_rows)
    if shape.get('norm_topk_prob'):
        description.unsupported.append('norm_topk_prob=True in DeepSeek-V2')
    method = shape.get('topk_method', 'greedy')
    if method not in ('greedy', 'group_limited_greedy'):
        description.unsupported.append(f'topk_method={method}')
    experts = expert_settings(shape, int(shape.get('first_k_dense_replace', 0)))
    if method == 'greedy':
        experts |= dict(n_group=1, topk_group=1)
    check_scoring(description, shape, 'softmax')
    description.settings |= experts | dict(
        scoring_func='softmax',
        norm_topk_prob=False,
        routed_scaling_factor=float(shape.get('routed_scaling_factor', 1.0)),
    )
    return description


def deepseek_v3(shape: dict) -> Description:
    """
    Experts by sigmoid with a bias. Further layers, which predict further tokens
    (num_nextn_predict_layers), are left alone: the next token does not need them, and often their
    weights are not there.
    """
    description = deepseek(dict(max_position_embeddings=4096) | shape, tensors.moe_rows)
    add_ignored_layers(description, shape)
    check_scoring(description, shape, 'sigmoid')
    description.settings |= expert_settings(shape, int(shape['first_k_dense_replace'])) | dict(
        scoring_func='sigmoid',
        norm_topk_prob=bool(shape.get('norm_topk_prob', True)),
        routed_scaling_factor=float(shape.get('routed_scaling_factor', 2.5)),
    )
    return description


def check_scoring(description: Description, shape: dict, scoring: str) -> None:
    asked = shape.get('scoring_func') or scoring
    if asked != scoring:
        description.unsupported.append(f'scoring_func={asked} (it has {scoring})')


def expert_settings(shape: dict, dense: int) -> dict:
    """Return the fields of the experts of a model whose first `dense` layers have none."""
    return dict(
        n_routed_experts=int(shape['n_routed_experts']),
        n_shared_experts=int(shape.get('n_shared_experts') or 0),
        num_experts_per_tok=int(shape['num_experts_per_tok']),
        moe_intermediate_size=int(shape['moe_intermediate_size']),
        first_k_dense_replace=dense,
        n_group=int(shape.get('n_group') or 1),
        topk_group=int(shape.get('topk_group') or 1),
    )


def dense_deepseek_v3(shape: dict) -> Description:
    """A DeepSeek-V3 without experts, as an export of ours is: first_k_dense_replace says so."""
    description = deepseek(dict(max_position_embeddings=4096) | shape, tensors.deepseek_rows)
    add_ignored_layers(description, shape)
    return description


def add_ignored_layers(description: Description, shape: dict) -> None:
    names = ('num_nextn_predict_layers', 'num_mtp_layers')
    further = max(int(shape.get(name) or 0) for name in names)
    n_layer = description.settings['n_layer']
    layers = range(n_layer, n_layer + further)
    description.ignored = tuple(f'model.layers.{layer}.' for layer in layers)


def deepseek(shape: dict, table: Callable[..., Table]) -> Description:
    """Return what DeepSeek-V2 and V3 have in common: MLA, and a YaRN that scales the softmax."""
    names = ('q_lora_rank', 'kv_lora_rank', 'qk_nope_head_dim', 'qk_rope_head_dim', 'v_head_dim')
    widths = {name: int(shape[name] or 0) for name in names}
    N, P, R = (widths[name] for name in ('qk_nope_head_dim', 'qk_rope_head_dim', 'kv_lora_rank'))
    if not P:
        raise ValueError('qk_rope_head_dim=0 does not go with RoPE')
    description = decoder(shape | dict(head_dim=N + P))
    settings = description.settings
    settings |= widths
    factor = add_rope(description, shape, P, P)
    rope = shape.get('rope_scaling') or shape.get('rope_parameters') or {}
    if rope.get('mscale_all_dim') and settings['rope_frequencies']:
        mscale = yarn_mscale(float(rope['factor']), float(rope['mscale_all_dim']))
        settings['softmax_scale'] = mscale**2 * (N + P) ** -0.5
    query = 'attn.q_b_proj.weight' if widths['q_lora_rank'] else 'attn.q_proj.weight'
    scale_rows(description, query, factor, slice(settings['n_head'] * N, None))
    scale_rows(description, 'attn.kv_a_proj_with_mqa.weight', factor, slice(R, None))
    if not shape.get('rope_interleave', True):
        description.table = partial(table, interleave=False)
    if shape.get('mlp_bias'):
        description.unsupported.append('mlp_bias=True')
    if shape.get('moe_layer_freq', 1) != 1:
        description.unsupported.append(f'moe_layer_freq={shape["moe_layer_freq"]}')
    biased = ()
    if shape.get('attention_bias'):
        biased = ('q_a_proj', 'kv_a_proj_with_mqa', 'o_proj')
    return add_biases(description, biased)


WINDOW = frozenset({'sliding_window', 'layer_types'})
QWEN = WINDOW | {'use_sliding_window', 'max_window_layers'}
PHI3 = WINDOW | {'partial_rotary_factor'}
SMOLLM3 = WINDOW | {'use_sliding_window', 'no_rope_layers', 'no_rope_layer_interval'}
GRANITE_FACTORS = frozenset(
    {'embedding_multiplier', 'logits_scaling', 'residual_multiplier', 'attention_multiplier'}
)
DEEPSEEK = frozenset(
    'q_lora_rank kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim rope_interleave '
    'first_k_dense_replace moe_layer_freq n_routed_experts n_shared_experts num_experts_per_tok '
    'n_group topk_group moe_intermediate_size num_nextn_predict_layers num_mtp_layers '
    'num_local_experts qk_head_dim routed_scaling_factor norm_topk_prob scoring_func '
    'topk_method'.split()
)
QK_GAIN = dict(model_class=GPT_QKGain, attention_class=QKGainAttention)

STOCK = dict(mlp=True, pos='rope', norm='rmsnorm', act='swiglu', qk_norm=False, nope_layers=())
STOCK_MLA = STOCK | dict(bias=False, latent_norm=True)

MOE = dict(
    model_class=GPT_MoE,
    attention_class=MultiHeadLatentAttention,
    table=tensors.moe_rows,
    keys=DEEPSEEK,
)

LLAMA = Family('llama', 'LlamaForCausalLM', llama, requires=STOCK)
DEEPSEEK_V3 = Family(
    'deepseek_v3',
    'DeepseekV3ForCausalLM',
    dense_deepseek_v3,
    GPT_MLA,
    MultiHeadLatentAttention,
    tensors.deepseek_rows,
    DEEPSEEK,
    STOCK_MLA,
)
ALL = (
    LLAMA,
    Family('mistral', 'MistralForCausalLM', mistral, keys=WINDOW),
    Family('qwen2', 'Qwen2ForCausalLM', qwen2, keys=QWEN),
    Family('qwen3', 'Qwen3ForCausalLM', qwen3, **QK_GAIN, table=tensors.qwen3_rows, keys=QWEN),
    Family('olmo2', 'Olmo2ForCausalLM', olmo2, **QK_GAIN, table=tensors.olmo2_rows),
    Family('smollm3', 'SmolLM3ForCausalLM', smollm3, keys=SMOLLM3),
    Family('phi3', 'Phi3ForCausalLM', phi3, table=tensors.phi3_rows, keys=PHI3),
    Family('granite', 'GraniteForCausalLM', granite, keys=GRANITE_FACTORS),
    DEEPSEEK_V3,
    Family('deepseek_v2', 'DeepseekV2ForCausalLM', deepseek_v2, **MOE),
    Family('deepseek_v3 with experts', 'DeepseekV3ForCausalLM', deepseek_v3, **MOE),
    Family('kimi_k2 with experts', 'DeepseekV3ForCausalLM', deepseek_v3, **MOE),
)
FAMILIES = {family.model_type: family for family in ALL}
# Known, and why they have no place here.
REFUSED = dict(
    gemma2='its logits are capped by tanh, in the attention and at the end',
    gemma3_text='it has two RoPEs, four norms in a block and GeGLU',
    gemma3='it reads images, too',
    gemma='it has GeGLU in its MLPs',
    qwen2_moe='a mixture of experts without MLA',
    qwen3_moe='a mixture of experts without MLA',
    mixtral='a mixture of experts without MLA',
    llama4='it reads images, too, and has a mixture of experts without MLA',
)
