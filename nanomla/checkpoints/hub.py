"""Find and read the files of a Hugging Face model, in a folder or on the hub."""

import json
import re
import zipfile
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch

from nanomla.core.configurator import UserError


def finder(name):
    """find(file) -> its path in the folder, or in the hub's model, or None."""
    if Path(name).is_dir():
        return lambda file: Path(name, file) if Path(name, file).exists() else None
    if not re.fullmatch(r'[\w.-]+(/[\w.-]+)?', name):
        raise UserError(
            f'{name} is neither a folder nor the name of a model on the Hugging Face hub'
        )

    def find(file):
        try:
            from huggingface_hub import hf_hub_download
            from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
        except ImportError:
            raise UserError(
                f"'{name}' is no folder, and models of the Hugging Face hub need pip install huggingface_hub"
            ) from None
        try:
            return Path(hf_hub_download(name, file))
        except Exception as error:  # the hub's errors come in many classes
            if isinstance(error, EntryNotFoundError) and not isinstance(
                error, LocalEntryNotFoundError
            ):
                return None
            raise UserError(
                f"'{name}' is no folder here, and {file} cannot be had from the Hugging Face hub ({type(error).__name__}): "
                'check the name, connect to the network, or name a local folder'
            ) from None

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
                shards = sorted(
                    {Path(shard).name for shard in read_json(path)['weight_map'].values()}
                )
            except (KeyError, TypeError, AttributeError):
                raise UserError(f'{path} cannot be used: it names no shards') from None
            paths = [find(shard) for shard in shards]
            if None in paths:
                raise UserError(
                    f'{name} lacks {shards[paths.index(None)]}, one of the {len(shards)} shards that its index names'
                )
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
            file = torch.load(
                path, map_location='cpu', mmap=zipfile.is_zipfile(path), weights_only=True
            )
        keys = list(file.keys())
    except ImportError:
        raise UserError(
            f'{path} needs safetensors: pip install -r requirements-convert.txt'
        ) from None
    except Exception:  # damaged, foreign and malicious files fail in many ways
        raise UserError(
            f'{path} cannot be read: it is damaged, or holds code, which is never run'
        ) from None
    yield {
        key: partial(file.get_tensor if path.suffix == '.safetensors' else file.get, key)
        for key in keys
    }
