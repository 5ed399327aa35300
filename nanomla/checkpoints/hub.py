"""The files of a Hugging Face model, in a folder here or on the hub."""

import os
import re
import zipfile
from collections.abc import Callable, Iterable
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch

from nanomla.checkpoints import tokenizer
from nanomla.checkpoints.content import check_tensors
from nanomla.core import files
from nanomla.core.checks import FLAG, TABLE, TEXT, check_entries, list_of, number, table_of, whole
from nanomla.core.configurator import UserError
from nanomla.core.token_files import TOKEN_IDS

# Entries of a model's JSON files that are read, with what they may be; others may be anything.
SIZE = whole(least=0, most=2**31) | None
ENTRIES = dict.fromkeys(
    (
        'vocab_size',
        'hidden_size',
        'intermediate_size',
        'num_hidden_layers',
        'num_attention_heads',
        'num_key_value_heads',
        'head_dim',
        'max_position_embeddings',
        'q_lora_rank',
        'kv_lora_rank',
        'qk_nope_head_dim',
        'qk_rope_head_dim',
        'v_head_dim',
        'first_k_dense_replace',
        'n_positions',
        'n_layer',
        'n_head',
        'n_embd',
        'n_inner',
    ),
    SIZE,
)
ENTRIES |= dict.fromkeys(('rms_norm_eps', 'layer_norm_epsilon', 'rope_theta'), number() | None)
ENTRIES |= dict.fromkeys(('bos_token_id', 'eos_token_id', 'pad_token_id'), TOKEN_IDS)
ENTRIES |= dict.fromkeys(('rope_scaling', 'rope_parameters'), TABLE | None)
ENTRIES |= dict.fromkeys(('attention_bias', 'mlp_bias', 'tie_word_embeddings'), FLAG | None)
ENTRIES |= dict.fromkeys(('model_type', 'hidden_act', 'activation_function'), TEXT | None)
ENTRIES |= dict(
    architectures=list_of(TEXT) | None,
    rope_interleave=FLAG,
    weight_map=table_of(TEXT),
    bos_token=TEXT | TABLE | None,
    add_bos_token=FLAG | None,
)

# The two kinds of weight files by their main file, with the patterns of all their files.
WEIGHTS = {
    'model.safetensors': ('*.safetensors', 'model.safetensors.index.json'),
    'pytorch_model.bin': ('pytorch_model*.bin', 'pytorch_model.bin.index.json'),
}
# Weights in subfolders are for other programs, and consolidated*.safetensors are a second copy.
NOT_OURS = ('*/*', 'consolidated*')


def model_folder(name: str | Path) -> Path:
    """Return the folder with config.json and the tokenizer of a model: a folder, or of the hub."""
    if os.path.isdir(name):  # not Path.is_dir, which raises where the name is too long
        return Path(name)
    if not re.fullmatch(r'[\w.-]+(/[\w.-]+)?', str(name)):
        raise UserError(
            f'{name} is neither a folder nor the name of a model on the Hugging Face hub'
        )
    return download(str(name), ['config.json', 'generation_config.json', *tokenizer.FILES])


def weight_files(name: str | Path) -> list[Path]:
    """Return the files that hold a model's weights: one, the shards of an index, or several."""
    kinds = list(WEIGHTS)
    if find_spec('safetensors') is None:
        kinds.reverse()  # what torch alone can read comes first
    for kind in kinds:
        folder = Path(name)
        if not os.path.isdir(folder):
            folder = download(str(name), WEIGHTS[kind])
        files = files_of_kind(name, folder, kind)
        if files:
            return files
    raise UserError(f'{name} has no weights: neither *.safetensors nor pytorch_model.bin')


def files_of_kind(name: str | Path, folder: Path, kind: str) -> list[Path]:
    """Return the weight files of one kind in a folder; [] where there are none."""
    whole, index = folder / kind, folder / f'{kind}.index.json'
    if whole.exists():
        return [whole]
    if index.exists():
        return shards_of(name, folder, index)
    if kind == 'model.safetensors':
        return sorted(folder.glob('*.safetensors'))
    return []


def shards_of(name: str | Path, folder: Path, index: Path) -> list[Path]:
    """Return the files that an index names. Only their last name counts: none is elsewhere."""
    try:
        shards = sorted({Path(shard).name for shard in read_json(index)['weight_map'].values()})
    except (KeyError, TypeError, AttributeError):
        raise UserError(f'{index} cannot be used: it names no shards') from None
    for shard in shards:
        if not (folder / shard).exists():
            raise UserError(
                f'{name} lacks {shard}, one of the {len(shards)} shards that its index names'
            )
    return [folder / shard for shard in shards]


def download(name: str, patterns: Iterable[str]) -> Path:
    """Return the folder with these files of a model on the hub, as far as the model has them."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise UserError(
            f"'{name}' is no folder, and models of the Hugging Face hub need "
            'pip install huggingface_hub'
        ) from None
    try:
        folder = snapshot_download(
            name, allow_patterns=list(patterns), ignore_patterns=list(NOT_OURS)
        )
    except Exception as error:  # the hub's errors come in many classes
        raise UserError(
            f"'{name}' is no folder here, and cannot be had from the Hugging Face hub "
            f'({type(error).__name__}): check the name, connect to the network, '
            'or name a local folder'
        ) from None
    return Path(folder)


def read_config(folder: Path) -> dict:
    """Return a model's config.json."""
    if not (folder / 'config.json').is_file():
        raise UserError(
            f'{folder} has no config.json: it is not a model of the Hugging Face layout'
        )
    return read_json(folder / 'config.json')


def read_json(path: Path) -> dict:
    """Return the object that a JSON file of a model holds, its entries of the types they have."""
    try:
        content = files.read_json(path)
    except (OSError, ValueError):
        raise UserError(f'{path} cannot be read: it is damaged or no JSON') from None
    try:
        check_entries(content, ENTRIES)
    except ValueError as error:
        raise UserError(f'{path} cannot be used: {error}') from None
    return content


def read_tensors(name: str | Path) -> dict[str, Callable[[], torch.Tensor]]:
    """Return a function for every tensor of a model that reads it; none is read before."""
    tensors = {}
    for path in weight_files(name):
        new = tensors_in(path)
        for key in new:
            if key in tensors:
                raise UserError(f'{name} has {key} in two of its files')
        tensors |= new
    return tensors


def tensors_in(path: Path) -> dict[str, Callable[[], torch.Tensor]]:
    try:
        if path.suffix == '.safetensors':
            from safetensors import safe_open

            check_tensors(path)
            file = safe_open(path, framework='pt')
            read = file.get_tensor
        else:
            mapped = zipfile.is_zipfile(path)
            file = torch.load(path, map_location='cpu', mmap=mapped, weights_only=True)
            read = file.get
        keys = list(file.keys())
    except UserError:
        raise
    except ImportError:
        raise UserError(f'{path} needs safetensors: pip install -e .[convert]') from None
    except Exception:  # damaged, foreign and malicious files fail in many ways
        raise UserError(
            f'{path} cannot be read: it is damaged, or holds code, which is never run'
        ) from None
    if not all(isinstance(key, str) for key in keys):
        raise UserError(f'{path} holds no weights: its keys are not the names of tensors')
    return {key: partial(read, key) for key in keys}
