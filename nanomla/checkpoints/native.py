"""
Models on disk. A checkpoint is one dict of tensors and plain values:

    kind 'mha' | 'mla', model_args (the config's fields), model (state dict), step, best_val_loss,
    meta (the dataset's, so that sampling needs no dataset), config (the run's settings)

and, in last.pt only, what a resumed run needs: optimizers, average, seconds. Files are written under
a temporary name, synced and renamed, and read with weights_only=True, which runs no code from them.
nanoGPT's ckpt.pt loads as it is.
"""
import errno
import json
import os
import re
from contextlib import suppress
from pathlib import Path

import torch

from nanomla.core.configurator import UserError
from model import GPT
from model_mla import GPT_MLA

MODELS = dict(mha=GPT, mla=GPT_MLA)
HUB = ('gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl')
DERIVED = ('n_kv_head', 'head_dim', 'n_inner', 'qk_nope_head_dim', 'v_head_dim')  # settings of which 0 leaves the value to the model


def save(path, content):
    """Write `content` to `path`, all of it or nothing: a kill at any moment leaves the old file or the new one."""
    path = Path(path)
    partial = path.with_name(f'{path.name}.partial')
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, 'wb') as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
    except (OSError, RuntimeError) as error:  # torch.save hides the OSError of a full disk in a RuntimeError
        cause = error if isinstance(error, OSError) else error.__context__
        with suppress(OSError):
            partial.unlink()
        if not isinstance(cause, OSError):
            raise
        what = 'no space left on the device' if cause.errno == errno.ENOSPC else cause.strerror
        raise UserError(f'cannot write {path}: {what}; what was there before is untouched') from None


def set_aside(out):
    """Moves the run in folder `out` to out/previous, in the place of an older one; nothing else is lost. Whether there was one."""
    previous, found = out / 'previous', any((out / name).exists() for name in ('ckpt.pt', 'last.pt'))
    for path in kept_in(previous if found else out):  # of the run that makes room; of one that never saved more
        path.unlink()
    if not found:
        return False
    previous.mkdir(exist_ok=True)
    for path in [*(out / name for name in ('ckpt.pt', 'last.pt', 'log.jsonl', 'curve.png')), *kept_in(out)]:
        if path.exists():
            os.replace(path, previous / path.name)
    return True


def steps_to_keep(count, last):
    """`count` steps of a run of `last`: 0, then evenly in log(step) from last / 100 on; fewer where they would coincide."""
    if count < 2:
        return {last} if count else set()
    return {0, last} | {max(1, round(last * 100 ** (i / (count - 2) - 1))) for i in range(count - 2)}


def name_of(step):
    return f'step-{step:06d}.pt'


def kept_in(folder):
    """The checkpoints that train.py --keep_checkpoints left in `folder`, by step."""
    return sorted(Path(folder).glob('step-*.pt'), key=lambda path: int(path.stem[5:]) if path.stem[5:].isdigit() else -1)


def load(path):
    """The checkpoint in a file, or in a folder's ckpt.pt. UserError for anything that is none."""
    path = Path(path)
    path = path / 'ckpt.pt' if os.path.isdir(path) else path
    if not os.path.exists(path):  # not Path.exists, which fails where it may not look
        raise UserError(f'there is no checkpoint {path}: train one first, or name another file or folder')
    try:
        content = torch.load(path, map_location='cpu', weights_only=True)
    except Exception as error:  # truncated, foreign and malicious files fail in many ways
        why = 'it holds code, which is never run' if 'GLOBAL' in str(error) else 'it is damaged or something else'
        raise UserError(f'{path} is no checkpoint that can be loaded: {why}') from None
    if not isinstance(content, dict) or not all(isinstance(content.get(k), dict) for k in ('model', 'model_args')):
        raise UserError(f"{path} is no nanoMLA or nanoGPT checkpoint: it has no 'model' and 'model_args'")
    content.setdefault('kind', 'mha')
    content.setdefault('step', content.get('iter_num', 0))
    if content['kind'] not in list(MODELS):  # a list, for kinds that have no hash
        raise UserError(f"{path} holds a model of kind '{content['kind']}', known are {', '.join(MODELS)}")
    content['path'] = str(path)
    return content


def build(content, **changes):
    """The model of a loaded checkpoint; `changes` are config fields that leave the weights alone (dropout, kernel)."""
    model_class = MODELS[content['kind']]
    args = content['model_args'] | changes
    if unknown := set(args) - set(model_class.Config.keys()):
        raise UserError(f"{content['path']} has model settings that are not known here: {', '.join(sorted(map(str, unknown)))}")
    state = {str(k).removeprefix('_orig_mod.'): v for k, v in content['model'].items()}  # torch.compile's prefix
    state = {k: v for k, v in state.items() if not k.endswith('.attn.bias')}        # nanoGPT's causal masks
    try:
        model = model_class(model_class.Config(**args))
        model.load_state_dict(state)
    except (RuntimeError, TypeError) as error:
        raise UserError(f"{content['path']}: the weights do not fit the model it describes: {' '.join(str(error).split())[:160]}") from None
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

def from_pretrained(name, **changes):
    """
    GPT with OpenAI's weights: 'gpt2', 'gpt2-medium', 'gpt2-large' or 'gpt2-xl' from the Hugging Face
    hub, or a local folder in that layout (config.json and model.safetensors or pytorch_model.bin).
    """
    shape, state = read_gpt2(name)
    try:
        config = GPT.Config(block_size=shape['n_positions'], vocab_size=shape['vocab_size'], n_layer=shape['n_layer'],
                            n_head=shape['n_head'], n_embd=shape['n_embd'], n_inner=shape.get('n_inner') or 0,
                            norm_eps=shape['layer_norm_epsilon'], act='gelu_tanh', bias=True, **changes)
        model = GPT(config)
        state = {k if k.startswith(('transformer.', 'lm_head.')) else f'transformer.{k}': v for k, v in state.items()}
        state = {k: v for k, v in state.items() if not k.endswith(('.attn.bias', '.attn.masked_bias'))}  # causal masks
        for key in state:
            if key.endswith(('c_attn.weight', 'c_proj.weight', 'c_fc.weight')):
                state[key] = state[key].t()  # GPT-2 keeps (in, out)
        state['lm_head.weight'] = state['transformer.wte.weight']
        model.load_state_dict(state)
    except (KeyError, RuntimeError, AttributeError) as error:
        raise UserError(f'{name} is not a GPT-2 checkpoint: {" ".join(str(error).split())[:160]}') from None
    return model


def read_gpt2(name):
    """config.json as a dict and the weights as a dict of tensors, from the hub or from a folder."""
    def find(file):
        if Path(name).is_dir():
            return Path(name, file) if Path(name, file).exists() else None
        try:
            from huggingface_hub import hf_hub_download
            return hf_hub_download(f'openai-community/{name}', file)
        except ImportError:
            raise UserError(f"'{name}' comes from the Hugging Face hub: pip install huggingface_hub") from None
        except Exception as error:  # the hub's errors come in many classes
            raise UserError(f"cannot get {file} of '{name}' from the Hugging Face hub ({type(error).__name__}): "
                            'connect to the network, or name a local folder that has it') from None

    config = find('config.json')
    if config is None:
        raise UserError(f'{name} has no config.json: it is not a GPT-2 folder of the Hugging Face layout')
    try:
        shape = dict(json.loads(Path(config).read_text()))
    except (OSError, ValueError, TypeError):
        raise UserError(f'{config} cannot be read: it is damaged or no JSON') from None
    if shape.get('model_type') != 'gpt2' or shape.get('activation_function', 'gelu_new') != 'gelu_new':
        raise UserError(f"{name} is a model of type '{shape.get('model_type')}' with activation "
                        f"'{shape.get('activation_function')}', not a GPT-2")
    try:
        from safetensors.torch import load_file
        weights = find('model.safetensors')
    except ImportError:
        weights = None
    if weights is None:
        weights, load_file = find('pytorch_model.bin'), lambda path: torch.load(path, map_location='cpu', weights_only=True)
    if weights is None:
        raise UserError(f'{name} has no weights that can be read: pytorch_model.bin, or model.safetensors with `pip install safetensors`')
    try:
        return shape, dict(load_file(weights))
    except Exception:  # damaged, foreign and malicious files fail in many ways
        raise UserError(f'{weights} cannot be read: it is damaged, or holds code, which is never run') from None


def is_gpt2(folder):
    """Whether a folder's config.json names GPT-2 (or nothing that can be read, for from_pretrained to tell)."""
    try:
        return json.loads((folder / 'config.json').read_text()).get('model_type') == 'gpt2'
    except (OSError, ValueError, AttributeError):
        return (folder / 'config.json').exists()


def load_model(init_from, **changes):
    """
    A model and its checkpoint dict, from a file or a folder with ckpt.pt, 'gpt2*', a folder of the Hugging Face
    layout (GPT-2, Llama, dense DeepSeek-V3), a name on its hub (organisation/model) or 'random:NAME'.
    Of a foreign model the dict holds its tokenizer as 'codec', where it has one, and nothing else. A tokenizer.json beside a
    ckpt.pt is its codec.
    """
    init_from, path = str(init_from), Path(init_from)
    if init_from in HUB or is_gpt2(path):
        return from_pretrained(init_from, **changes), {}
    if (path / 'config.json').exists() or init_from.startswith('random:') or (
            re.fullmatch(r'[\w-]+/[\w.-]+', init_from) and path.suffix != '.pt' and not path.exists() and not path.parent.exists()):
        from nanomla.checkpoints import hf as deepseek  # late: few models need it
        model, codec = deepseek.load(init_from, **changes)
        return model, dict(codec=codec) if codec else {}
    content = load(init_from)
    folder = Path(content['path']).parent
    if (folder / 'tokenizer.json').exists():  # of a foreign model, which was converted or trained on
        from nanomla.checkpoints import hf as deepseek
        content['codec'] = deepseek.tokenizer_of(deepseek.finder(str(folder)), content.get('meta') or {})
    return build(content, **changes), content
