"""Folders as transformers writes them, and tokenizers to put into them."""

import json

import torch

# Settings of `tiny` that LlamaForCausalLM and DeepseekV3ForCausalLM can express.
LLAMA = dict(bias=False, pos='rope', norm='rmsnorm', act='swiglu', n_inner=44, norm_eps=1e-5)
# RoPE as DeepSeek-Coder has it.
LINEAR = dict(rope_type='linear', factor=4.0, rope_theta=1e5)


def hf_llama(folder, dtype=torch.float32, shard='5GB', **settings):
    """Save a LlamaForCausalLM with random weights and norms to `folder`, and return it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = dict(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=44,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        rms_norm_eps=1e-6,
        initializer_range=0.2,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(LlamaConfig(**(shape | settings))).eval()
    for p in model.parameters():
        if p.ndim == 1:
            p.data.add_(torch.randn_like(p) * 0.2)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    return model


def edit_config(folder, **changes):
    """Change entries of a folder's config.json; 'absent' removes one."""
    path = folder / 'config.json'
    shape = json.loads(path.read_text()) | changes
    shape = {key: value for key, value in shape.items() if value != 'absent'}
    path.write_text(json.dumps(shape))


def add_tokenizer(folder, file, **settings):
    (folder / 'tokenizer.json').write_bytes(file.read_bytes())
    settings = dict(bos_token='<bos>', eos_token='<eos>') | settings
    (folder / 'tokenizer_config.json').write_text(json.dumps(settings))


def byte_tokenizer(folder, **settings):
    """Put a tokenizer of bytes, <bos> and <eos> into a folder, and return how many ids it has."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ['<bos>', '<eos>']
    vocabulary = {token: i for i, token in enumerate([*alphabet, *special])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    settings = dict(tokenizer_class='PreTrainedTokenizerFast') | settings
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / 'tokenizer.json'))
    add_tokenizer(folder, folder / 'tokenizer.json', **settings)
    return len(vocabulary)


def same_weights(a, b):
    a, b = a.state_dict(), b.state_dict()
    if a.keys() != b.keys():
        return False
    return all(a[key].dtype == b[key].dtype and torch.equal(a[key], b[key]) for key in a)
