"""Write a model as a Hugging Face folder that stock transformers loads."""

import json
import os
import shutil
from pathlib import Path

import torch

from model_mla import MLAConfig
from nanomla.checkpoints.hf import layout, shape_of, tokenizer_of
from nanomla.checkpoints.hub import finder, read_json
from nanomla.checkpoints.tokenizer import HFTokenizer
from nanomla.core.configurator import UserError

SHRUNK = (
    2.0**-30
)  # latents as small as that vanish beside the epsilon of the stock norm, which then only divides by its root


def stock(model):
    """
    A converted GPT_MLA as the stock class computes it: its config, its parameters by our names, and its RoPE for config.json
    (None: the ordinary one). The same function by other weights:

    - the norm of the latent cannot be left out there: W^DKV · 2⁻³⁰ makes it a division by √ε, which W^UK | W^UV undo
    - one table of frequencies serves all layers: it has each as often as the layer that needs it most, where others are zero
    - the softmax scale is that of the width of query and key: the query takes up the difference
    """
    c, params = (
        model.config,
        {name: p.detach() for name, p in model.named_parameters(remove_duplicate=False)},
    )
    layers = [block.attn.rope_pairs.tolist() for block in model.transformer.h]
    slots = sorted(
        j for j in set().union(*layers) for _ in range(max(pairs.count(j) for pairs in layers))
    )
    P, R, H, D = 2 * len(slots), c.kv_lora_rank, c.n_head, c.source_head_dim
    stock_config = MLAConfig(
        **{key: getattr(c, key) for key in MLAConfig.keys()}
        | dict(
            head_dim=c.qk_nope_head_dim + P,
            qk_rope_head_dim=P,
            kv_lora_ranks=(),
            source_head_dim=0,
            latent_norm=True,
        )
    )
    shape_of(stock_config, '', {})  # refuses what has no place
    if max(p.dtype.itemsize for p in params.values()) == 2 and any(
        p.dtype == torch.float16 for p in params.values()
    ):
        raise UserError(
            'a converted model does not fit float16, whose numbers are not small enough: export it in bfloat16 or float32'
        )

    def spread(rows, to):
        """(..., P of this model, C) -> (..., P of the stock one, C): pair k to slot to[k]."""
        a, b = rows.unflatten(-2, (2, -1)).unbind(-3)
        wide = rows.new_zeros(*rows.shape[:-2], 2, len(slots), rows.size(-1))
        wide[..., 0, to, :], wide[..., 1, to, :] = a, b
        return wide.flatten(-3, -2)

    grow = 1e-6**0.5 / SHRUNK
    for n, pairs in enumerate(layers):
        a, r = f'transformer.h.{n}.attn.', c.rank(n)
        to = [slots.index(j) + pairs[:k].count(j) for k, j in enumerate(pairs)]
        q = f'{a}q_b_proj.weight' if c.q_lora_rank else f'{a}q_proj.weight'
        nope, pe = params[q].split([H * c.qk_nope_head_dim, H * c.qk_rope_head_dim])
        scale = ((c.qk_nope_head_dim + P) / D) ** 0.5 * (grow if c.q_lora_rank else 1.0)
        params[q] = scale * torch.cat([nope, spread(pe.unflatten(0, (H, -1)), to).flatten(0, 1)])
        down, k_pe = params[f'{a}kv_a_proj_with_mqa.weight'].split([r, c.qk_rope_head_dim])
        params[f'{a}kv_a_proj_with_mqa.weight'] = torch.cat(
            [SHRUNK * down, down.new_zeros(R - r, down.size(1)), spread(k_pe, to)]
        )
        up = params[f'{a}kv_b_proj.weight']
        params[f'{a}kv_b_proj.weight'] = torch.cat([grow * up, up.new_zeros(len(up), R - r)], dim=1)
        params[f'{a}kv_a_layernorm.weight'] = up.new_ones(R)
        if c.q_lora_rank:
            params[f'{a}q_a_proj.weight'] = SHRUNK * params[f'{a}q_a_proj.weight']
            params[f'{a}q_a_layernorm.weight'] = up.new_ones(c.q_lora_rank)
    if all(j * P == k * D for k, j in enumerate(slots)):
        return stock_config, params, None
    factors = [
        c.rope_scaling * c.rope_theta ** (2 * j / D - 2 * k / P) for k, j in enumerate(slots)
    ]  # of the ordinary wavelengths
    return (
        stock_config,
        params,
        dict(
            rope_type='longrope',
            short_factor=factors,
            long_factor=factors,
            factor=1.0,
            attention_factor=1.0,
            original_max_position_embeddings=c.block_size,
        ),
    )


def export(model, folder, tokenizer=None, max_shard_size=5 * 10**9):
    """
    Writes `model` to a new `folder` as stock transformers reads it: config.json, generation_config.json, safetensors
    (several files above max_shard_size bytes) and the files of `tokenizer`, an HFTokenizer or a folder. All or nothing.
    """
    folder = Path(folder)
    if folder.exists():
        raise UserError(f'{folder} is there already: name another folder, or remove it')
    try:
        from safetensors.torch import save_file
    except ImportError:
        raise UserError(
            'writing this layout needs safetensors: pip install -r requirements-convert.txt'
        ) from None
    if tokenizer is not None and not isinstance(tokenizer, HFTokenizer):
        find, name = finder(str(tokenizer)), tokenizer
        if not (
            tokenizer := tokenizer_of(
                find, read_json(find('config.json')) if find('config.json') else {}
            )
        ):
            raise UserError(f'{name} has no tokenizer.json')
    eos = sorted(tokenizer.eos) if tokenizer else []
    ends = dict(
        bos_token_id=tokenizer.bos if tokenizer else None,
        eos_token_id=eos[0] if len(eos) == 1 else eos or None,
        pad_token_id=None,
    )
    c, params, rope = (
        stock(model)
        if getattr(model.config, 'source_head_dim', 0)
        else (model.config, dict(model.named_parameters(remove_duplicate=False)), None)
    )
    shape = shape_of(
        c, str(max((p.dtype for p in params.values()), key=lambda d: d.itemsize))[6:], ends, rope
    )
    table, shards, sizes = layout(c), [[]], [0]
    for theirs, (ours, rows) in table.items():
        size = params[ours].detach()[rows].nbytes
        if shards[-1] and sizes[-1] + size > max_shard_size:
            shards, sizes = shards + [[]], sizes + [0]
        shards[-1].append(theirs)
        sizes[-1] += size
    names = (
        [f'model-{i:05d}-of-{len(shards):05d}.safetensors' for i in range(1, len(shards) + 1)]
        if len(shards) > 1
        else ['model.safetensors']
    )
    partial_folder = folder.with_name(f'{folder.name}.{os.getpid()}.partial')
    texts = {
        'config.json': shape,
        'generation_config.json': dict(
            _from_model_config=True, **{k: v for k, v in ends.items() if v is not None}
        ),
    }
    if len(shards) > 1:
        texts['model.safetensors.index.json'] = dict(
            metadata=dict(total_size=sum(sizes)),
            weight_map={k: n for n, keys in zip(names, shards) for k in keys},
        )
    try:
        partial_folder.mkdir(parents=True)
        for file, keys in zip(names, shards):
            tensors = {
                theirs: params[table[theirs][0]].detach()[table[theirs][1]].cpu().contiguous()
                for theirs in keys
            }
            save_file(tensors, partial_folder / file, metadata=dict(format='pt'))
        for file, content in texts.items():
            (partial_folder / file).write_text(json.dumps(content, indent=2) + '\n')
        for file in tokenizer.files if tokenizer else ():
            shutil.copyfile(file, partial_folder / file.name)
        for file in partial_folder.iterdir():
            file.chmod(
                0o666 & (partial_folder.stat().st_mode | 0o600)
            )  # safetensors writes for the owner alone
            with open(file, 'rb') as opened:
                os.fsync(opened.fileno())
        os.rename(partial_folder, folder)
    except BaseException as error:
        shutil.rmtree(partial_folder, ignore_errors=True)
        if isinstance(error, OSError) or type(error).__name__ == 'SafetensorError':
            raise UserError(
                f'cannot write {folder}: {getattr(error, "strerror", None) or error}; nothing is left of it'
            ) from None
        raise
