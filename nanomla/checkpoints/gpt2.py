"""OpenAI's GPT-2 weights from the Hugging Face hub or a folder."""

import os
from pathlib import Path

import torch

from model import GPT
from nanomla.checkpoints import hub
from nanomla.core.configurator import UserError

HUB = ('gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl')
TRANSPOSED = ('c_attn.weight', 'c_proj.weight', 'c_fc.weight')  # GPT-2 keeps them (in, out)
MASKS = ('.attn.bias', '.attn.masked_bias')  # buffers that are no weights


def from_pretrained(name: str | Path, **changes) -> GPT:
    """
    Load GPT with OpenAI's weights.

    name: 'gpt2', 'gpt2-medium', 'gpt2-large' or 'gpt2-xl' of the Hugging Face hub, or a folder in
        that layout (config.json and model.safetensors or pytorch_model.bin)
    changes: config fields that leave the weights alone, such as dropout and kernel
    """
    source = f'openai-community/{name}' if name in HUB else name
    shape = hub.read_config(hub.model_folder(source))
    model_type = shape.get('model_type')
    activation = shape.get('activation_function', 'gelu_new')
    if model_type != 'gpt2' or activation != 'gelu_new':
        raise UserError(
            f"{name} is a model of type '{model_type}' with activation '{activation}', not a GPT-2"
        )
    tensors = hub.read_tensors(source)
    try:
        model = GPT(config_of(shape, changes))
        model.load_state_dict(state_of(tensors))
    except (KeyError, RuntimeError, TypeError, ValueError, AttributeError) as error:
        why = ' '.join(str(error).split())[:160]
        raise UserError(f'{name} is not a GPT-2 checkpoint: {why}') from None
    return model


def config_of(shape: dict, changes: dict) -> GPT.Config:
    return GPT.Config(
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


def state_of(tensors: dict) -> dict[str, torch.Tensor]:
    """Return our state dict; the head is tied to the embedding."""
    state = {}
    for key, read in tensors.items():
        if key.endswith(MASKS):
            continue
        tensor = read()
        if key.endswith(TRANSPOSED):
            tensor = tensor.t()
        if not key.startswith(('transformer.', 'lm_head.')):
            key = f'transformer.{key}'
        state[key] = tensor
    state['lm_head.weight'] = state['transformer.wte.weight']
    return state


def is_gpt2(folder: Path) -> bool:
    """
    Return whether a folder's config.json names GPT-2. One that cannot be read counts, too: then
    from_pretrained says what is wrong with it.
    """
    path = folder / 'config.json'
    if not os.path.exists(path):
        return False
    try:
        return hub.read_json(path).get('model_type') == 'gpt2'
    except UserError:
        return True
