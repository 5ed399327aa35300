"""
Checkpoints: models on disk. A checkpoint is one dict of tensors and plain values:

    kind            name of the attention in attentions.MODELS, such as 'mha' or 'mla'
    model_args      the fields of the model's config
    model           its state dict
    step            training steps taken
    best_val_loss   in nats
    meta            the dataset's meta.json, so that sampling needs no dataset
    config          the settings of the run
    pretrained      whether its weights were trained before the run, which counts its own steps

and, in last.pt only, what a resumed run needs: optimizers, average, seconds. Files are written
aside, synced and renamed. They are read with weights_only=True, which runs no code from them, after
content.py has found each byte as it was written. nanoGPT's ckpt.pt loads as it is.
"""

import os
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path

import torch

from attentions import BROKEN, MODELS
from model import GPT, GPTConfig
from nanomla.checkpoints.content import (
    check_bytes,
    check_model_args,
    checked_content,
    is_archive,
    seal,
    way_out,
)
from nanomla.core.checks import settings_errors, shortened
from nanomla.core.configurator import UserError
from nanomla.core.devices import check_host_memory
from nanomla.core.files import remove_leftovers, replacing

# Settings of which 0 means that the model derives the value from others.
DERIVED = ('n_kv_head', 'head_dim', 'n_inner', 'qk_nope_head_dim', 'v_head_dim')


# -------------------------------------------------------------------------------------------------
# the registry


def kind_of(model: GPT) -> str:
    """Return the name in MODELS of a model, by its exact type: a subclass is another model."""
    for kind, model_class in MODELS.items():
        if type(model) is model_class:
            return kind
    name = type(model).__name__
    raise UserError(f'{name} is not registered: write it into a file of its own in attentions/')


def check_kind(kind: str) -> None:
    if kind in BROKEN:
        raise UserError(f"attention='{kind}' cannot be loaded: {BROKEN[kind]}")
    if kind not in MODELS:
        raise UserError(f"attention='{kind}' is not known: use {', '.join(MODELS)}")


def model_args(model: GPT) -> dict:
    """Return the fields of a model's config, as checkpoints hold them."""
    return {key: getattr(model.config, key) for key in model.Config.keys()}


def new_model(kind: str, settings: Mapping, given: Mapping, vocab_size: int) -> GPT:
    """
    Make the model of `kind` that a script's `settings` describe.

    given: setting -> where a person set it; defaults are not in it
    vocab_size: the tokenizer's; one above 256 is rounded up to a multiple of 64
    """
    check_kind(kind)
    refuse_settings_of_others(kind, given)
    if vocab_size > 256:
        vocab_size = -(-vocab_size // 64) * 64
    model_class = MODELS[kind]
    with settings_errors():
        config = model_class.Config.from_settings(settings, given, vocab_size=vocab_size)
        check_size(model_class, config)
        return model_class(config)


def check_size(model_class: type[GPT], config: GPTConfig) -> None:
    """Raise a UserError where memory cannot hold the fp32 weights of a model of this config."""
    sizes = []
    for n_layer in (1, 2):
        few = replace(config, n_layer=n_layer)
        with torch.device('meta'):
            sizes.append(sum(p.numel() for p in model_class(few).parameters()))
    number = sizes[0] + (config.n_layer - 1) * (sizes[1] - sizes[0])
    check_host_memory(
        4 * number, f'a model of {number:,} parameters', 'use a smaller n_layer or n_embd'
    )


def refuse_settings_of_others(kind: str, given: Mapping) -> None:
    """Raise a UserError where a given setting belongs to other attentions than `kind`."""
    for name, where in given.items():
        owners = [owner for owner, model in MODELS.items() if name in model.Config.keys()]
        if owners and kind not in owners:
            raise UserError(
                f'{where}: {name} is a setting of {", ".join(owners).upper()}, '
                f"but attention='{kind}'"
            )


def check_given(
    model: GPT, settings: Mapping, given: Mapping, path: str | Path, free: Collection[str]
) -> None:
    """
    Raise a UserError where a given setting asks for another model than the one loaded from `path`.

    free: settings that may differ, as they leave the weights alone
    """
    kind = kind_of(model)
    if 'attention' in given and settings['attention'] != kind:
        raise UserError(f"{given['attention']}: the model of {path} has attention='{kind}'")
    refuse_settings_of_others(kind, given)
    for key in given:
        if key not in model.Config.keys() or key in free:
            continue
        asked, has = settings[key], getattr(model.config, key)
        if asked == 0 and key in DERIVED:
            continue
        if asked != has:
            raise UserError(f'{given[key]}: {key}={asked}, but the model of {path} has {has}')


# -------------------------------------------------------------------------------------------------
# one file


def save(path: str | Path, checkpoint: dict) -> None:
    """Write a checkpoint, all of it or nothing: a kill leaves the old file or the new one."""
    path = Path(path)
    try:
        remove_leftovers(path)
        with replacing(path, 'w+b') as file:
            try:
                torch.save(checkpoint, file)
                seal(file)
            except RuntimeError as error:
                # torch.save hides the OSError of a full disk in a RuntimeError of its own.
                if isinstance(error.__context__, OSError):
                    raise error.__context__ from None
                raise
    except UserError as error:
        raise UserError(f'{error}; what was there before is untouched') from None


def load(path: str | Path) -> dict:
    """
    Return the checkpoint in a file, or in a folder's ckpt.pt. UserError for anything else.

    Its tensors lie in the file until they are used, so that the processes of a host that load the
    same one share its memory.
    """
    path = find(path)
    check_bytes(path)
    return read(path)


def peek(path: str | Path) -> dict:
    """Return what `load` does, its bytes not verified: for what a checkpoint says of itself."""
    return read(find(path))


def find(path: str | Path) -> Path:
    # os.path and not Path.exists, which raises where a folder may not be looked into.
    if os.path.isdir(path):
        path = Path(path, 'ckpt.pt')
    if not os.path.exists(path):
        raise UserError(
            f'there is no checkpoint {shortened(str(path), 200)}: '
            'train one first, or name another file or folder'
        )
    return Path(path)


def read(path: Path) -> dict:
    try:
        # Windows cannot replace a file that is mapped.
        mapped = os.name == 'posix' and is_archive(path)
        checkpoint = torch.load(path, map_location='cpu', weights_only=True, mmap=mapped)
    except Exception as error:  # foreign and malicious files fail in many ways
        why = f'it is damaged or something else{way_out(path)}'
        if 'GLOBAL' in str(error):
            why = 'it holds code, which is never run'
        raise UserError(f'{path} is no checkpoint that can be loaded: {why}') from None
    checkpoint = checked_content(checkpoint, path)
    kind = checkpoint['kind']
    if kind in BROKEN:
        raise UserError(f"{path} holds a model of kind '{kind}': {BROKEN[kind]}")
    if kind not in MODELS:
        raise UserError(f"{path} holds a model of kind '{kind}', known are {', '.join(MODELS)}")
    checkpoint['path'] = str(path)
    return checkpoint


def build(checkpoint: dict, **changes) -> GPT:
    """
    Make the model of a loaded checkpoint.

    changes: config fields that leave the weights alone, such as dropout and kernel
    """
    path = checkpoint['path']
    model_class = MODELS[checkpoint['kind']]
    args = checkpoint['model_args'] | changes
    check_model_args(args, model_class.Config, path)
    weights = weights_of(checkpoint)
    try:
        config = model_class.Config(**args)
        check_shapes(model_class, config, weights)
        model = model_class(config)
        model.load_state_dict(weights)
    except ValueError as error:  # the config's own checks
        raise UserError(f'{path}: {error}') from None
    except (RuntimeError, TypeError) as error:
        why = ' '.join(str(error).split())[:160]
        raise UserError(f'{path}: the weights do not fit the model it describes: {why}') from None
    return model


def check_shapes(model_class: type[GPT], config: GPTConfig, weights: dict) -> None:
    """
    Raise a RuntimeError where a model of this config has other parameters than `weights`.

    No memory is taken and no time, whatever numbers the config holds.
    """
    if config.n_layer > len(weights):
        raise RuntimeError(f'n_layer={config.n_layer}, but there are {len(weights)} tensors')
    with torch.device('meta'):
        model_class(config).load_state_dict(weights, assign=True)


def weights_of(checkpoint: dict) -> dict:
    """Return the state dict without torch.compile's prefix and without nanoGPT's causal masks."""
    state = {}
    for key, value in checkpoint['model'].items():
        key = str(key).removeprefix('_orig_mod.')
        if not key.endswith('.attn.bias'):
            state[key] = value
    return state


def kind_in(folder: str | Path) -> str | None:
    """Return the kind of the model whose checkpoint is in `folder`; None where none can be read."""
    for name in ('last.pt', 'ckpt.pt'):
        path = Path(folder, name)
        if os.path.exists(path):
            try:
                return peek(path)['kind']
            except UserError:
                continue
    return None


def launch_of(path: str | Path) -> str:
    """Return the launch_id() of the run that saved a checkpoint, '' where none can be read."""
    try:
        return peek(path).get('launch', '')
    except UserError:
        return ''


# -------------------------------------------------------------------------------------------------
# the checkpoints of a run


def steps_to_keep(count: int, last: int) -> set[int]:
    """
    Return the `count` steps of a run of `last` whose checkpoints stay: 0 and `last`, and between
    them evenly in log(step) from last / 100 on. There are fewer where they would coincide.
    """
    if count == 0:
        return set()
    if count == 1:
        return {last}
    steps = {0, last}
    for i in range(count - 2):
        exponent = i / (count - 2) - 1  # from -1, which is last / 100, to 0
        steps.add(max(1, round(last * 100**exponent)))
    return steps


def step_name(step: int) -> str:
    return f'step-{step:06d}.pt'


def step_files(folder: str | Path) -> list[Path]:
    """Return the checkpoints that train.py --keep_checkpoints left in `folder`, by step."""

    def step_of(path):
        number = path.stem.removeprefix('step-')
        return int(number) if number.isdigit() else -1

    return sorted(Path(folder).glob('step-*.pt'), key=step_of)
