"""OpenAI's GPT-2 weights from the Hugging Face hub or a folder."""

import json
from pathlib import Path

import torch

from model import GPT
from nanomla.core.configurator import UserError

HUB = ('gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl')


def from_pretrained(name, **changes):
    """
    GPT with OpenAI's weights: 'gpt2', 'gpt2-medium', 'gpt2-large' or 'gpt2-xl' from the Hugging Face
    hub, or a local folder in that layout (config.json and model.safetensors or pytorch_model.bin).
    """
    shape, state = read_gpt2(name)
    try:
        config = GPT.Config(
            block_size=shape['n_positions'],
            vocab_size=shape['vocab_size'],
            n_layer=shape['n_layer'],
            n_head=shape['n_head'],
            n_embd=shape['n_embd'],
            n_inner=shape.get('n_inner') or 0,
            norm_eps=shape['layer_norm_epsilon'],
            act='gelu_tanh',
            bias=True,
            **changes,
        )
        model = GPT(config)
        state = {
            k if k.startswith(('transformer.', 'lm_head.')) else f'transformer.{k}': v
            for k, v in state.items()
        }
        state = {
            k: v for k, v in state.items() if not k.endswith(('.attn.bias', '.attn.masked_bias'))
        }  # causal masks
        for key in state:
            if key.endswith(('c_attn.weight', 'c_proj.weight', 'c_fc.weight')):
                state[key] = state[key].t()  # GPT-2 keeps (in, out)
        state['lm_head.weight'] = state['transformer.wte.weight']
        model.load_state_dict(state)
    except (KeyError, RuntimeError, AttributeError) as error:
        raise UserError(
            f'{name} is not a GPT-2 checkpoint: {" ".join(str(error).split())[:160]}'
        ) from None
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
            raise UserError(
                f"'{name}' comes from the Hugging Face hub: pip install huggingface_hub"
            ) from None
        except Exception as error:  # the hub's errors come in many classes
            raise UserError(
                f"cannot get {file} of '{name}' from the Hugging Face hub ({type(error).__name__}): "
                'connect to the network, or name a local folder that has it'
            ) from None

    config = find('config.json')
    if config is None:
        raise UserError(
            f'{name} has no config.json: it is not a GPT-2 folder of the Hugging Face layout'
        )
    try:
        shape = dict(json.loads(Path(config).read_text()))
    except (OSError, ValueError, TypeError):
        raise UserError(f'{config} cannot be read: it is damaged or no JSON') from None
    if (
        shape.get('model_type') != 'gpt2'
        or shape.get('activation_function', 'gelu_new') != 'gelu_new'
    ):
        raise UserError(
            f"{name} is a model of type '{shape.get('model_type')}' with activation "
            f"'{shape.get('activation_function')}', not a GPT-2"
        )
    try:
        from safetensors.torch import load_file

        weights = find('model.safetensors')
    except ImportError:
        weights = None
    if weights is None:
        weights, load_file = (
            find('pytorch_model.bin'),
            lambda path: torch.load(path, map_location='cpu', weights_only=True),
        )
    if weights is None:
        raise UserError(
            f'{name} has no weights that can be read: pytorch_model.bin, or model.safetensors with `pip install safetensors`'
        )
    try:
        return shape, dict(load_file(weights))
    except Exception:  # damaged, foreign and malicious files fail in many ways
        raise UserError(
            f'{weights} cannot be read: it is damaged, or holds code, which is never run'
        ) from None


def is_gpt2(folder):
    """Whether a folder's config.json names GPT-2 (or nothing that can be read, for from_pretrained to tell)."""
    try:
        return json.loads((folder / 'config.json').read_text()).get('model_type') == 'gpt2'
    except (OSError, ValueError, AttributeError):
        return (folder / 'config.json').exists()
