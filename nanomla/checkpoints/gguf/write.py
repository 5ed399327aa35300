"""
Write GPT_MLA as one GGUF file, which llama.cpp loads as its architecture deepseek2, every layer
dense. It absorbs W^UK and W^UV, so what it caches of a token is the latent and k_pe.

Its deepseek2 differs from the stock class that export.py writes for:

- W^UK and W^UV are two tensors, of each head by itself.
- All norms have one epsilon. A converted model has no norm of its latent: there the gain, which is
  always in float32, undoes a norm of tiny latents.
- RoPE has frequencies base^(-2k/P) and no others.
- Nothing has a bias.

Legend: H heads; N, P, D, R as in model_mla.py; C the width of the model. Weights are (out, in).
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import torch

from model import GPT
from model_mla import MLAConfig
from nanomla.checkpoints.export import (
    EPSILON,
    LatentNorm,
    check_scale,
    in_dtype,
    rewrite_converted,
)
from nanomla.checkpoints.families.rope import frequency
from nanomla.checkpoints.gguf.vocabulary import Vocabulary, vocabulary_of
from nanomla.checkpoints.hf import DEEPSEEK_V3, architecture_of, layout
from nanomla.checkpoints.tokenizer import HFTokenizer
from nanomla.core.configurator import UserError
from nanomla.core.files import replacing

ENDING = '.gguf'
# llama.cpp takes models of so many layers for DeepSeek-V2-Lite, whose queries have no latent.
LAYERS_OF_LITE = (26, 27)
NEEDS_FLOAT32 = ('attn.kv_a_proj_with_mqa.weight', 'attn.q_a_proj.weight')  # where float16 is short


@dataclass
class Deepseek2:
    """
    A model as llama.cpp computes it.

    params: by our names
    rope_base: its RoPE has the frequencies rope_base^(-2k/P)
    dtypes: in the file, of the model's own parameters by their names
    """

    config: MLAConfig
    params: dict[str, torch.Tensor]
    rope_base: float
    dtypes: dict[str, torch.dtype]


def export_gguf(
    model: GPT,
    path: str | Path,
    tokenizer: HFTokenizer | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """
    Write `model` to a new file `path` with its vocabulary, all of it or nothing.

    Without a tokenizer llama.cpp takes and gives token ids alone. dtype: of the weights, but for
    those that llama.cpp or float16 want in float32; None for the model's own
    """
    path = Path(path)
    if path.exists():
        raise UserError(f'{path} is there already: name another file, or remove it')
    gguf = import_gguf()
    stock = deepseek2_form(model, dtype)
    vocabulary = None
    if tokenizer is not None:
        vocabulary = vocabulary_of(tokenizer, stock.config.vocab_size)
    with replacing(path, 'wb') as file:
        # The writer opens what it writes by its name.
        writer = gguf.GGUFWriter(file.name, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.DEEPSEEK2])
        writer.add_name(path.stem)
        add_settings(writer, stock)
        add_vocabulary(writer, vocabulary)
        write_weights(writer, stock)
        writer.close()


def check_gguf(
    source: GPT,
    config: MLAConfig,
    pairs: Sequence[int] | None,
    tokenizer: HFTokenizer | None,
) -> None:
    """
    Raise a UserError unless what `source` is converted to, with this config, can be written.

    It is asked before the work of a conversion. pairs: those of the source that k_pe has; None
    where the text decides
    """
    import_gguf()
    frequencies = None
    if pairs is not None:
        frequencies = frequencies_of(config, pairs)
    check_expressible(config, frequencies)
    if tokenizer is not None:
        vocabulary_of(tokenizer, source.config.vocab_size)


def import_gguf() -> ModuleType:
    try:
        import gguf
    except ImportError:
        raise UserError('writing a GGUF file needs gguf: pip install -e .[gguf]') from None
    return gguf


# -------------------------------------------------------------------------------------------------
# what deepseek2 can express


def deepseek2_form(model: GPT, dtype: torch.dtype | None = None) -> Deepseek2:
    """Return `model` as llama.cpp computes it. UserError names all that it cannot."""
    if architecture_of(model) is not DEEPSEEK_V3:
        raise UserError(
            f'{type(model).__name__} is no MLA model: write a folder, and convert that with '
            "llama.cpp's own script"
        )
    config = model.config
    params = {name: p.detach() for name, p in model.named_parameters(remove_duplicate=False)}
    dtypes = {name: dtype or p.dtype for name, p in params.items()}
    if not config.source_head_dim:
        frequencies = frequencies_of(config, range(config.qk_rope_head_dim // 2))
        check_expressible(config, frequencies)
        check_scale(model, model.transformer.h[0].attn.qk_dim)
        return Deepseek2(config, params, rope_base(frequencies), dtypes)
    norm = LatentNorm(epsilon=config.norm_eps, exact_gain=True)
    stock_config, table = rewrite_converted(model, params, norm)
    frequencies = frequencies_of(config, table)
    check_expressible(config, frequencies)
    return Deepseek2(stock_config, params, rope_base(frequencies), dtypes)


def frequencies_of(config: MLAConfig, pairs: Sequence[int]) -> list[float]:
    """Return the angles by which the pairs turn from one token to the next."""
    own, width = config.rope_frequencies, config.rope_dim
    ordinary = [frequency(config.rope_theta, pair, width) for pair in range(width // 2)]
    return [(own or ordinary)[pair] / config.rope_scaling for pair in pairs]


def rope_base(frequencies: Sequence[float]) -> float | None:
    """Return the base of an ordinary RoPE with these frequencies; None where none has them."""
    count = len(frequencies)
    if count == 0 or not math.isclose(frequencies[0], 1, rel_tol=1e-6):
        return None
    if count == 1:
        return 1e4  # of one pair the base makes no difference
    base = frequencies[1] ** -count if frequencies[1] > 0 else 1
    for k, own in enumerate(frequencies):
        if not math.isclose(own, frequency(base, k, 2 * count), rel_tol=1e-5):
            return None
    return base


def check_expressible(config: MLAConfig, frequencies: Sequence[float] | None) -> None:
    """Raise a UserError that names all of a config which deepseek2 cannot express."""
    converted = config.source_head_dim > 0
    unsupported = []
    for key, value in DEEPSEEK_V3.requires.items():
        if key == 'latent_norm' and converted:
            continue  # the gain of a norm undoes it
        if getattr(config, key) != value:
            unsupported.append(f'{key}={getattr(config, key)} (it has {value})')
    if not converted and config.norm_eps != EPSILON:
        unsupported.append(
            f'norm_eps={config.norm_eps:g} (latents have that there, too, and {EPSILON:g} here)'
        )
    if config.q_lora_rank and config.n_layer in LAYERS_OF_LITE:
        unsupported.append(f'q_lora_rank={config.q_lora_rank} with {config.n_layer} layers')
    if config.qk_nope_head_dim < 1:
        unsupported.append('RoPE on all of a key (it wants a part without, as a saving leaves one)')
    elif config.pos == 'rope' and (frequencies is None or rope_base(frequencies) is None):
        unsupported.append(
            'the frequencies of RoPE (it has base^(-2k/P), as rope=uniform and high may keep them)'
        )
    if unsupported:
        raise UserError(f"llama.cpp's deepseek2 cannot express this: {'; '.join(unsupported)}")


# -------------------------------------------------------------------------------------------------
# writing; `writer` is a gguf.GGUFWriter


def add_settings(writer, stock: Deepseek2) -> None:
    gguf = import_gguf()
    config = stock.config
    R, P = config.kv_lora_rank, config.qk_rope_head_dim
    writer.add_context_length(config.block_size)
    writer.add_vocab_size(config.vocab_size)
    writer.add_block_count(config.n_layer)
    writer.add_embedding_length(config.n_embd)
    writer.add_feed_forward_length(config.n_inner)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    # Absorbed, all heads read one key [c_kv | k_pe] and one value c_kv.
    writer.add_head_count(config.n_head)
    writer.add_head_count_kv(1)
    writer.add_key_length(R + P)
    writer.add_value_length(R)
    writer.add_key_length_mla(config.qk_nope_head_dim + P)
    writer.add_value_length_mla(config.v_head_dim)
    writer.add_kv_lora_rank(R)
    writer.add_q_lora_rank(config.q_lora_rank)
    writer.add_rope_dimension_count(P)
    writer.add_rope_freq_base(stock.rope_base)
    writer.add_rope_scaling_type(gguf.RopeScalingType.NONE)
    # No layer has experts, but llama.cpp asks how wide they are.
    writer.add_leading_dense_block_count(config.n_layer)
    writer.add_expert_count(0)
    writer.add_expert_used_count(0)
    writer.add_expert_shared_count(0)
    writer.add_expert_feed_forward_length(config.n_inner)


def add_vocabulary(writer, vocabulary: Vocabulary | None) -> None:
    if vocabulary is None:
        writer.add_tokenizer_model('no_vocab')
        return
    writer.add_tokenizer_model('gpt2')  # byte-level BPE
    writer.add_tokenizer_pre(vocabulary.pre_tokenizer)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    writer.add_token_merges(vocabulary.merges)
    writer.add_add_space_prefix(False)
    writer.add_add_bos_token(vocabulary.bos is not None)
    if vocabulary.bos is not None:
        writer.add_bos_token_id(vocabulary.bos)
    adders = (writer.add_eos_token_id, writer.add_eot_token_id, writer.add_eom_token_id)
    for add, token in zip(adders, vocabulary.ends):
        add(token)
    if vocabulary.chat_template is not None:
        writer.add_chat_template(vocabulary.chat_template)


def write_weights(writer, stock: Deepseek2) -> None:
    """Write what was added and then the tensors, one by one."""
    gguf = import_gguf()
    model_dtype = stock.dtypes['transformer.wte.weight']
    file_types = {
        torch.float16: gguf.LlamaFileType.MOSTLY_F16,
        torch.bfloat16: gguf.LlamaFileType.MOSTLY_BF16,
    }
    writer.add_file_type(file_types.get(model_dtype, gguf.LlamaFileType.ALL_F32))
    kinds = {
        torch.float32: gguf.GGMLQuantizationType.F32,
        torch.float16: gguf.GGMLQuantizationType.F16,
        torch.bfloat16: gguf.GGMLQuantizationType.BF16,
    }
    for name, tensor in tensors_of(stock):
        array = as_array(tensor)
        kind = kinds[tensor.dtype]
        writer.add_tensor_info(name, array.shape, array.dtype, array.nbytes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, tensor in tensors_of(stock):
        writer.write_tensor_data(as_array(tensor))


def as_array(tensor: torch.Tensor) -> np.ndarray:
    """Return a tensor for numpy, which has no bfloat16: its bits as whole numbers."""
    if tensor.dtype == torch.bfloat16:
        tensor = tensor.view(torch.int16)
    return tensor.numpy()


def tensors_of(stock: Deepseek2) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every tensor by its name in the file, on the CPU, in the dtype of the file."""
    gguf = import_gguf()
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.DEEPSEEK2, stock.config.n_layer)
    for theirs, (ours, rows) in layout(DEEPSEEK_V3, stock.config).items():
        tensor = stock.params[ours][rows].cpu()
        dtype = dtype_in_file(ours, tensor, stock.dtypes)
        for name, part in parts_of(theirs, tensor, stock.config):
            written = names.get_name(name, ('.weight',))
            yield written, in_dtype(written, part, dtype).contiguous()


def dtype_in_file(name: str, tensor: torch.Tensor, dtypes: dict[str, torch.dtype]) -> torch.dtype:
    """Return the dtype of one of our parameters; llama.cpp wants that of a norm to be float32."""
    dtype = dtypes.get(name, torch.float32)
    if tensor.ndim == 1 or dtype not in (torch.float16, torch.bfloat16):
        return torch.float32
    if dtype == torch.float16 and name.endswith(NEEDS_FLOAT32):
        return torch.float32
    return dtype


def parts_of(
    theirs: str, tensor: torch.Tensor, config: MLAConfig
) -> list[tuple[str, torch.Tensor]]:
    """Return W^UK (H, R, N), transposed, and W^UV (H, D, R) of kv_b_proj; else the tensor alone."""
    if 'kv_b_proj' not in theirs:
        return [(theirs, tensor)]
    by_head = tensor.unflatten(0, (config.n_head, -1))
    w_uk, w_uv = by_head.split([config.qk_nope_head_dim, config.v_head_dim], dim=1)
    return [
        (theirs.replace('kv_b_proj', 'k_b_proj'), w_uk.mT),
        (theirs.replace('kv_b_proj', 'v_b_proj'), w_uv),
    ]
