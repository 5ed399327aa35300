"""
Models on disk. A checkpoint is one dict of tensors and plain values:

    kind 'mha' | 'mla', model_args (the config's fields), model (state dict), step, best_val_loss,
    meta (the dataset's, so that sampling needs no dataset), config (the run's settings)

and, in last.pt only, what a resumed run needs: optimizers, average, seconds. Files are written under
a temporary name, synced and renamed, and read with weights_only=True, which runs no code from them.
nanoGPT's ckpt.pt loads as it is.
"""

import os
from pathlib import Path

import torch

from model import GPT
from model_mla import GPT_MLA
from nanomla.core.configurator import UserError
from nanomla.core.files import replacing

MODELS = dict(mha=GPT, mla=GPT_MLA)
DERIVED = (
    'n_kv_head',
    'head_dim',
    'n_inner',
    'qk_nope_head_dim',
    'v_head_dim',
)  # settings of which 0 leaves the value to the model


def save(path, content):
    """Write `content` to `path`, all of it or nothing: a kill at any moment leaves the old file or the new one."""
    try:
        with replacing(path, 'wb') as file:
            try:
                torch.save(content, file)
            except RuntimeError as error:  # torch.save hides the OSError of a full disk in it
                if isinstance(error.__context__, OSError):
                    raise error.__context__ from None
                raise
    except UserError as error:
        raise UserError(f'{error}; what was there before is untouched') from None


def set_aside(out):
    """Moves the run in folder `out` to out/previous, in the place of an older one; nothing else is lost. Whether there was one."""
    previous, found = (
        out / 'previous',
        any((out / name).exists() for name in ('ckpt.pt', 'last.pt')),
    )
    for path in kept_in(
        previous if found else out
    ):  # of the run that makes room; of one that never saved more
        path.unlink()
    if not found:
        return False
    previous.mkdir(exist_ok=True)
    for path in [
        *(out / name for name in ('ckpt.pt', 'last.pt', 'log.jsonl', 'curve.png')),
        *kept_in(out),
    ]:
        if path.exists():
            os.replace(path, previous / path.name)
    return True


def steps_to_keep(count, last):
    """`count` steps of a run of `last`: 0, then evenly in log(step) from last / 100 on; fewer where they would coincide."""
    if count < 2:
        return {last} if count else set()
    return {0, last} | {
        max(1, round(last * 100 ** (i / (count - 2) - 1))) for i in range(count - 2)
    }


def name_of(step):
    return f'step-{step:06d}.pt'


def kept_in(folder):
    """The checkpoints that train.py --keep_checkpoints left in `folder`, by step."""
    return sorted(
        Path(folder).glob('step-*.pt'),
        key=lambda path: int(path.stem[5:]) if path.stem[5:].isdigit() else -1,
    )


def load(path):
    """The checkpoint in a file, or in a folder's ckpt.pt. UserError for anything that is none."""
    path = Path(path)
    path = path / 'ckpt.pt' if os.path.isdir(path) else path
    if not os.path.exists(path):  # not Path.exists, which fails where it may not look
        raise UserError(
            f'there is no checkpoint {path}: train one first, or name another file or folder'
        )
    try:
        content = torch.load(path, map_location='cpu', weights_only=True)
    except Exception as error:  # truncated, foreign and malicious files fail in many ways
        why = (
            'it holds code, which is never run'
            if 'GLOBAL' in str(error)
            else 'it is damaged or something else'
        )
        raise UserError(f'{path} is no checkpoint that can be loaded: {why}') from None
    if not isinstance(content, dict) or not all(
        isinstance(content.get(k), dict) for k in ('model', 'model_args')
    ):
        raise UserError(
            f"{path} is no nanoMLA or nanoGPT checkpoint: it has no 'model' and 'model_args'"
        )
    content.setdefault('kind', 'mha')
    content.setdefault('step', content.get('iter_num', 0))
    if content['kind'] not in list(MODELS):  # a list, for kinds that have no hash
        raise UserError(
            f"{path} holds a model of kind '{content['kind']}', known are {', '.join(MODELS)}"
        )
    content['path'] = str(path)
    return content


def build(content, **changes):
    """The model of a loaded checkpoint; `changes` are config fields that leave the weights alone (dropout, kernel)."""
    model_class = MODELS[content['kind']]
    args = content['model_args'] | changes
    if unknown := set(args) - set(model_class.Config.keys()):
        raise UserError(
            f'{content["path"]} has model settings that are not known here: {", ".join(sorted(map(str, unknown)))}'
        )
    state = {
        str(k).removeprefix('_orig_mod.'): v for k, v in content['model'].items()
    }  # torch.compile's prefix
    state = {
        k: v for k, v in state.items() if not k.endswith('.attn.bias')
    }  # nanoGPT's causal masks
    try:
        model = model_class(model_class.Config(**args))
        model.load_state_dict(state)
    except (RuntimeError, TypeError) as error:
        raise UserError(
            f'{content["path"]}: the weights do not fit the model it describes: {" ".join(str(error).split())[:160]}'
        ) from None
    return model


def model_args(model):
    return {key: getattr(model.config, key) for key in model.Config.keys()}


def new_model(kind, settings, given, vocab_size):
    """
    A model of `kind` as train.py's `settings` describe it. `given` says where each one was set; the
    vocabulary is rounded up to a multiple of 64 unless it is a small one.
    """
    if kind not in MODELS:
        raise UserError(f"attention='{kind}' is not known: use {', '.join(MODELS)}")
    refuse_mla_keys(kind, given)
    args = {key: settings[key] for key in MODELS[kind].Config.keys() if key in settings}
    if kind == 'mla' and 'pos' not in given:
        args['pos'] = 'rope' if settings['qk_rope_head_dim'] else 'learned'
    args['vocab_size'] = vocab_size if vocab_size <= 256 else -(-vocab_size // 64) * 64
    return MODELS[kind](MODELS[kind].Config(**args))


def refuse_mla_keys(kind, given):
    for key in given:
        if key in MODELS['mla'].Config.keys() and key not in MODELS[kind].Config.keys():
            raise UserError(f"{given[key]}: {key} is a setting of MLA, but attention='{kind}'")


def check_given(model, settings, given, path, free):
    """UserError where a given setting asks for another model than the one of `path`; those in `free` may differ."""
    kind = kind_of(model)
    if 'attention' in given and settings['attention'] != kind:
        raise UserError(f"{given['attention']}: the model of {path} has attention='{kind}'")
    refuse_mla_keys(kind, given)
    for key in given:
        if key in model.Config.keys() and key not in free:
            asked, has = settings[key], getattr(model.config, key)
            if asked != has and not (asked == 0 and key in DERIVED):
                raise UserError(f'{given[key]}: {key}={asked}, but the model of {path} has {has}')


def kind_of(model):
    return next(kind for kind, model_class in MODELS.items() if type(model) is model_class)


def kind_in(folder):
    """The kind of model whose checkpoint is in `folder`, or None where there is none that can be read."""
    for name in ('last.pt', 'ckpt.pt'):
        if os.path.exists(Path(folder, name)):
            try:
                return load(Path(folder, name))['kind']
            except UserError:
                continue
    return None


# ---------------------------------------------------------------------------------------------------
# OpenAI's GPT-2
