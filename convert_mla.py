"""
Turn a model with MHA, GQA or MQA into an MLA model: python convert_mla.py SOURCE --out=FOLDER [--key=value ...]

    python convert_mla.py out-shakespeare-char --out=out-mla --kv_lora_rank=128
    python convert_mla.py out-books --out=out-mla --saving=0.875
    python convert_mla.py deepseek-ai/deepseek-coder-1.3b-base --out=out-mla --saving=0.875 --calibration=code.txt --export=out-hf
    python convert_mla.py random:deepseek-coder-1.3b --out=out-mla --kv_lora_rank=448 --rope_pairs=32 --low_rank=joint --calibration=none

SOURCE is a run's folder or checkpoint, gpt2*, or a Llama of the Hugging Face layout. What comes out is an ordinary
checkpoint: train.py heals it (config/heal_mla.py), sample.py reads it, every cache holds it.
"""

# output
out = ''  # a new folder: ckpt.pt, conversion.png, and the tokenizer of a foreign source
export = ''  # a new folder for a copy that stock transformers loads as deepseek_v3
# what the cache holds
kv_lora_rank = 0  # numbers of a token's latent in a layer; 0 = as many as lose nothing
saving = 0.0  # instead of kv_lora_rank: the share of the source's cache to save, 0.875 for an eighth of it
ranks = 'equal'  # equal | spectrum: layers share kv_lora_rank · n_layer by what each needs
rope_pairs = -1  # pairs of dimensions that keep RoPE, of each kv head (own) or of all together (shared); -1 = all, but with saving a third of the cache
rope = 'turn'  # which: high | low | uniform (frequencies) | 2-norm (queries and keys are long there) | turn (and turn far in a block)
rope_heads = 'shared'  # own: each kv head keeps its pairs | shared: the heads' principal components of each frequency (as RoRoPE)
fold = 1  # shared: neighbouring frequencies that pass for one (FreqFold)
real = False  # shared: mix heads by real rotations only, as RoRoPE does; complex ones lose less
low_rank = 'balanced'  # split | joint (weights alone) | calibrated | balanced (the least error on text; keys as long as values)
q_lora_rank = 0  # a latent for the query, too; 0 = none
rotate = False  # turn the latent so that no channel stands out, before it is quantised
# text
calibration = ''  # a dataset or a text file; '' = the dataset that the source was trained on; none = weights alone
calibration_tokens = 65536  # of its training part, to see what matters
eval_tokens = 65536  # of its held-out part, for perplexities
block_size = 0  # tokens in a window; 0 = the source's, at most 1024
batch_size = 8
cache_dtype = ''  # tell the perplexity with such a cache, too: int8 | int4
# machine
seed = 1337  # of the rotation
device = 'auto'  # auto | cpu | cuda | cuda:1 | mps
dtype = 'float32'  # of the arithmetic on text: float32 | auto | bfloat16

import sys

from nanomla.core.configurator import UserError, configure
from nanomla.inference.generate import prefill

source = sys.argv.pop(1) if len(sys.argv) > 1 and not sys.argv[1].startswith('-') else ''
config = configure(globals())
if not source:
    raise UserError(
        'say what to convert: python convert_mla.py SOURCE --out=FOLDER [--key=value ...]'
    )

# ---------------------------------------------------------------------------------------------------
import os
import shutil
from pathlib import Path

import torch

from nanomla.checkpoints import load
from nanomla.checkpoints import native as checkpoint
from nanomla.conversion import calibration as text
from nanomla.conversion import convert as conversion
from nanomla.core import devices as machine
from nanomla.core import token_files as datasets
from nanomla.core.files import progress_bar
from nanomla.inference.cache import Cache
from nanomla.inference.quantize import BITS

if not out:
    raise UserError('say where to put it: --out=FOLDER')
for folder in filter(None, (out, export)):
    if os.path.exists(folder):
        raise UserError(f'{folder} is there already: name a new folder, or remove it')
for name, least in dict(calibration_tokens=1, eval_tokens=1, batch_size=1, block_size=0).items():
    if config[name] < least:
        raise UserError(f'{name}={config[name]} must be at least {least}')
if not 0 <= saving < 1 or saving and kv_lora_rank:
    raise UserError(
        f'saving={saving} must be at least 0 and less than 1'
        if not kv_lora_rank
        else 'give one of --saving and --kv_lora_rank'
    )
if cache_dtype not in ('', *BITS):
    raise UserError(f"cache_dtype='{cache_dtype}' is not known: use {' or '.join(BITS)}")
device = machine.pick_device(device)
loaded = load.load_model(source)
model, content = loaded.model, loaded.checkpoint
c = model.config
if saving and isinstance(model, checkpoint.MODELS['mha']):
    rope_pairs, kv_lora_rank = conversion.for_saving(c, saving, rope_heads, low_rank, rope_pairs)
    if kv_lora_rank < 1:
        raise UserError(
            f'saving={saving} leaves no room for a latent beside {rope_pairs} pairs of k_pe: use fewer rope_pairs, or rope_heads=shared'
        )
how = {
    key: globals()[key]
    for key in (
        'kv_lora_rank',
        'rope_pairs',
        'rope',
        'rope_heads',
        'fold',
        'real',
        'low_rank',
        'ranks',
        'q_lora_rank',
        'rotate',
        'seed',
    )
}
settings = {
    key: how[key]
    for key in (
        'kv_lora_rank',
        'rope_pairs',
        'rope',
        'rope_heads',
        'fold',
        'low_rank',
        'ranks',
        'q_lora_rank',
    )
}
named = calibration or (content.get('config') or {}).get('dataset', '')
if not calibration and not (named and (datasets.find(named) / 'train.bin').exists()):
    named = ''
if calibration == 'none':
    named = ''
conversion.check(c, named or None, **settings)  # before anything takes long

# ---------------------------------------------------------------------------------------------------
windows = held_out = None
if named:
    T = min(c.block_size, block_size or 1024)  # tokens in a window
    train, val, text_source = text.tokens_of(named, c.vocab_size, loaded.meta, loaded.tokenizer)
    windows = text.windows_of(
        train, calibration_tokens, T, c.n_embd + 1, f'calibration={named}'
    ).to(device)
    held_out = text.windows_of(val, eval_tokens, T + 1, what=f'the held-out part of {named}').to(
        device
    )
model.to(device).eval()
model.stream = machine.pick_dtype(dtype, device)
passes = (
    0
    if windows is None
    else -(-len(windows) // batch_size) + (3 + bool(cache_dtype)) * -(-len(held_out) // batch_size)
)
bar = progress_bar((2 + 2 * (windows is not None)) * c.n_layer + passes, 'step')
rows, moments = [], None


def tell(name, model, storage='bfloat16'):
    """A row of the table: bytes of a token in a real cache of bf16 or `storage`, and the perplexity."""
    held = Cache(
        [block.attn.cache_dims() for block in model.transformer.h],
        1,
        2048,
        dtype=storage,
        window=0,
        full=torch.bfloat16,
        device=device,
        kernel='torch',
    )
    prefill(model, [[0] * 8], held)
    how = {}
    if (
        storage != 'bfloat16'
    ):  # most of what a token reads must be in this dtype: a short window, and few tokens at a time
        how = dict(
            cache=lambda slots, size: Cache.of(
                model, slots, size, dtype=storage, window=min(128, T // 8)
            ),
            chunk=max(1, T // 16),
        )
    nats = (
        None
        if held_out is None
        else text.mean_loss(model, held_out, batch_size, tick=bar.update, **how)
    )
    rows.append(
        dict(
            name=name,
            bytes=held.bytes_per_token,
            nats=nats,
            perplexity=None if nats is None else text.perplexity(nats),
        )
    )


tell(f'{checkpoint.kind_of(model).upper()} (the source)', model)
if windows is not None:
    moments = text.measure(model, windows, batch_size, bar.update)
    partial, _ = conversion.convert(
        model,
        moments,
        **how
        | dict(kv_lora_rank=0, low_rank='calibrated', ranks='equal', q_lora_rank=0, rotate=False),
        tick=bar.update,
    )
    tell(
        'RoPE on '
        + ('all pairs' if rope_pairs < 0 else f'{rope_pairs} pairs ({rope}, {rope_heads})')
        + ', full rank',
        partial,
    )
    del partial
mla, layers = conversion.convert(model, moments, **how, tick=bar.update)
r, pe = mla.config.kv_lora_rank, mla.config.qk_rope_head_dim
tell(f'MLA, rank {"up to " if mla.config.kv_lora_ranks else ""}{r} + {pe} ({low_rank})', mla)
if cache_dtype:
    tell(f'the same in {cache_dtype}', mla, cache_dtype)
bar.close()

# ---------------------------------------------------------------------------------------------------
# what came of it
width = max(len(row['name']) for row in rows) + 2
print(f'{"":{width}}bytes a token     saved' + ('   perplexity' if named else ''))
for row in rows:
    row['saved'] = 1 - row['bytes'] / rows[0]['bytes']
    print(
        f'{row["name"]:{width}}{row["bytes"]:13,.0f}{100 * row["saved"]:9.2f} %'
        + (f'{row["perplexity"]:13.4f}' if named else '')
    )
print(
    'energy of keys and values that is kept: '
    + ', '.join(
        f'{layer["energy"]:.4f}' + f' (rank {layer["rank"]})' * bool(mla.config.kv_lora_ranks)
        for layer in layers
    )
)

codec, run = loaded.tokenizer, loaded.settings
history = dict(
    source=str(source),
    settings=how
    | dict(calibration=named, calibration_tokens=calibration_tokens, eval_tokens=eval_tokens),
    table=rows,
    layers=layers,
    before=content.get('conversion'),
)
meta = content.get('meta') or {}
if codec:
    meta = meta | dict(
        tokenizer='hf', bos_token_id=codec.bos, eos_token_id=sorted(codec.eos), source=source
    )
saved = dict(
    kind='mla',
    model_args=checkpoint.model_args(mla),
    model=mla.state_dict(),
    step=content.get('step', 0),
    config=dict(run),
    conversion=history,
    commit=machine.commit(),
    best_val_loss=rows[2]['nats'] if named else float('nan'),
) | (dict(meta=meta) if meta else {})


def draw(path):
    from nanomla.core import figures

    with figures.sheet(
        cols=2,
        size=(figures.WIDTH, 4.6),
        title=f'{Path(source).name} as MLA: {100 * rows[-1]["saved"]:.1f} % of the cache saved'
        + f', in {cache_dtype}' * bool(cache_dtype),
        note=f'{low_rank} low rank, RoPE {rope} ({rope_heads})'
        + (f' · perplexity on {Path(named).name}' if named else ''),
    ) as (fig, (left, right)):
        colors = [
            figures.COLORS[figures.kind_of(dict(kind='mha', config=checkpoint.model_args(model)))],
            figures.COLORS['muted'],
        ] + [figures.COLORS['mla']] * 2
        shown = [row for row in rows if 'full rank' not in row['name']] if not named else rows
        for at, (row, color) in enumerate(
            zip(shown, colors if named else [colors[0], *colors[2:]])
        ):
            left.barh(at, row['bytes'], color=color, height=0.6)
            told = f' {row["bytes"]:,.0f} B' + (
                f', perplexity {row["perplexity"]:.3f}' if named else ''
            )
            left.text(
                row['bytes'] if row['bytes'] < 0.5 * max(r['bytes'] for r in shown) else 0,
                at,
                told,
                va='center',
                color='white'
                if row['bytes'] >= 0.5 * max(r['bytes'] for r in shown)
                else figures.COLORS['ink'],
                fontsize=10,
            )
        left.set_yticks(range(len(shown)), [row['name'].replace(' (', '\n(', 1) for row in shown])
        left.invert_yaxis()
        left.set_xlabel('bytes of a token in the cache, all layers')
        left.grid(axis='y', visible=False)
        right.plot(
            range(1, len(layers) + 1),
            [100 * layer['energy'] for layer in layers],
            color=figures.COLORS['mla'],
            marker='o',
        )
        right.set_xlabel('layer')
        right.set_ylabel('energy of keys and values kept (%)')
        from matplotlib.ticker import MaxNLocator

        right.xaxis.set_major_locator(MaxNLocator(integer=True))
        figures.footer(fig, f'commit {saved["commit"]} · {machine.describe(device)}')
        figures.save(fig, path)


partial_folder = Path(f'{out}.{os.getpid()}.partial')
try:
    partial_folder.mkdir(parents=True)
    checkpoint.save(partial_folder / 'ckpt.pt', saved)
    for file in codec.files if codec else ():
        shutil.copyfile(file, partial_folder / file.name)
    try:
        draw(partial_folder / 'conversion.png')
    except UserError as error:
        print(f'no picture: {error}')
    if export:
        from nanomla.checkpoints.export import export as write_export

        write_export(mla, export, codec)
    os.rename(partial_folder, out)
except OSError as error:
    raise UserError(
        f'cannot write {out}: {error.strerror or error}; nothing is left of it'
    ) from None
finally:
    shutil.rmtree(partial_folder, ignore_errors=True)
print(
    f'written: {out}/ckpt.pt'
    + (f' and {export}' if export else '')
    + f'; heal it with: python train.py config/heal_mla.py --init_from={out} --teacher={source}'
    + (f' --dataset={run["dataset"]}' if 'dataset' in run else '')
)
