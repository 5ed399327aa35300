"""
The same seeds give the same numbers as at commit e498ffd: losses bit for bit on a CPU, texts too.

All goes through the command lines of the scripts and the files that they leave, so the code behind
them may move. same_results.json holds what they gave at e498ffd; files as they were written then,
made here by hand, must still load. Only where a result is meant to change, record again:

    python tests/test_same_results.py --record

The scripts run on one thread, with the kernels that every processor has. Where torch or its
arithmetic is another one all the same, a warning says so, and numbers are compared to 1e-4.
"""

import csv
import hashlib
import json
import math
import os
import platform
import re
import sys
import tempfile
import threading
import warnings
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import count, product
from pathlib import Path
from queue import SimpleQueue
from subprocess import PIPE, Popen
from unittest.mock import ANY

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
RECORD = Path(__file__).with_name('same_results.json')
EVAL = 'eval.py' if (ROOT / 'eval.py').exists() else 'evaluate.py'
ENVIRONMENT = {
    name: value
    for name, value in os.environ.items()
    if name not in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'LOCAL_WORLD_SIZE')
} | dict(
    OMP_NUM_THREADS='1',
    MKL_NUM_THREADS='1',
    ATEN_CPU_CAPABILITY='default',
    MKL_CBWR='COMPATIBLE',
    ONEDNN_MAX_CPU_ISA='SSE41',
    CUDA_VISIBLE_DEVICES='',
    PYTHONUTF8='1',
)

TRAIN = dict(
    device='cpu',
    dtype='float32',
    compile=False,
    batch_size=8,
    gradient_accumulation_steps=1,
    eval_iters=8,
    warmup_iters=4,
    learning_rate=2e-2,
    min_lr=1e-3,
    sample_tokens=24,
)
FROM_SCRATCH = TRAIN | dict(
    n_layer=2, n_head=2, n_embd=16, block_size=32, max_iters=40, eval_interval=10, log_interval=2
)
MODELS = dict(
    gpt2=dict(bias=True),
    modern=dict(
        pos='rope',
        norm='rmsnorm',
        qk_norm=True,
        act='relu2',
        zero_init=True,
        optimizer='muon',
        ema_decay=0.9,
        schedule='wsd',
    ),
    mla=dict(
        attention='mla',
        kv_lora_rank=8,
        q_lora_rank=8,
        qk_rope_head_dim=4,
        optimizer='muon',
        muon_up=0.5,
        dropout=0.1,
        gradient_accumulation_steps=2,
    ),
)

# Operations that the scripts use, without a line of theirs: what this prints names the arithmetic.
ARITHMETIC = """
import hashlib, torch
import torch.nn.functional as F
torch.manual_seed(0)
torch.set_float32_matmul_precision('high')
digest = hashlib.sha256()

def add(*tensors):
    for t in tensors:
        digest.update(t.detach().contiguous().numpy().tobytes())

for width in (8, 16, 40, 64):
    x = torch.randn(4, 32, width, requires_grad=True)
    w = torch.randn(3 * width, width, requires_grad=True)
    q, k, v = F.linear(F.dropout(F.layer_norm(x, [width]), 0.1), w).chunk(3, dim=-1)
    heads = [t.unflatten(2, (2, -1)).transpose(1, 2) for t in (q, k, v)]
    y = F.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2).flatten(2)
    y = y + F.gelu(v) + F.silu(v) + (q @ k.mT).softmax(-1) @ v + y.sin() + y.cos()
    z = F.rms_norm(y, [width]).flatten(0, 1)
    loss = F.cross_entropy(z, torch.randint(width, z.shape[:1]))
    loss.backward()
    add(y, z, loss, x.grad, w.grad, w.grad.norm())
    torch.optim.AdamW([x, w], fused=True).step()
    add(x, w, torch.multinomial(z.softmax(-1), 1), y.exp(), y.tanh(), (y.abs() + 1).log())
    for square in (w[:width].detach(), w[:width].detach().double()):
        gram = square @ square.mT
        add(gram, *torch.linalg.eigh(gram), *torch.linalg.svd(square), *torch.linalg.qr(square))
        add(torch.linalg.inv(square))
    left, right = torch.randn(5, 1, width, 8), torch.randn(1, 5, 8, 32)
    grams = (left.mT @ left) @ (left.mT @ left @ right)
    add(grams, grams * grams.roll(1, -1), grams.square().sum((-2, -1)).sqrt())
print(digest.hexdigest())
"""

# Runs `python script --key=value` for each line of stdin: in a process of its own, but one where
# torch and files of the repository are imported already, which takes longer than most scripts do.
# So does its end, where Python takes apart all modules; a script that has done its work is spared
# that.
RUNNER = """
import functools, gc, json, os, runpy, signal, sys
import matplotlib.backends.backend_agg, torch._dynamo  # with the optimizers torch imports it
import nanomla.checkpoints.load, nanomla.core.figures, nanomla.training.trainer
from matplotlib.figure import Figure

Figure.savefig = functools.partialmethod(Figure.savefig, dpi=40)  # no test looks at the pixels

gc.freeze()
for line in sys.stdin:
    words, out, err = json.loads(line)
    child = os.fork()
    if not child:
        signal.alarm(300)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(os.open(out, os.O_WRONLY | os.O_CREAT), 1)
        os.dup2(os.open(err, os.O_WRONLY | os.O_CREAT), 2)
        sys.argv = words
        runpy.run_path(words[0], run_name='__main__')
        sys.stdout.flush()
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def is_png(path):
    return path.read_bytes()[:8] == b'\x89PNG\r\n\x1a\n'


# --------------------------------------------------------------------------------------------------
# files of the time of e498ffd, and of nanoGPT

CHARS = '\n ,acdehimnorstu'
META = dict(
    tokenizer='char',
    source='A tale of a cat',
    chars=CHARS,
    vocab_size=16,
    dtype='uint16',
    train_tokens=5400,
    val_tokens=600,
)
SETTINGS = dict(  # train.py's, all of them; the dataset is filled in
    out_dir='out-old',
    init_from='scratch',
    eval_interval=5,
    eval_iters=8,
    eval_only=False,
    log_interval=1,
    always_save_checkpoint=False,
    keep_checkpoints=0,
    sample_tokens=0,
    wandb_log=False,
    wandb_project='nanomla',
    wandb_run_name='',
    dataset='',
    gradient_accumulation_steps=1,
    batch_size=4,
    block_size=32,
    seed=1337,
    attention='mha',
    n_layer=2,
    n_head=4,
    n_embd=16,
    n_kv_head=2,
    head_dim=8,
    n_inner=40,
    mlp=True,
    dropout=0.0,
    dropout_in='all',
    bias=False,
    pos='rope',
    rope_theta=10000.0,
    rope_scaling=1.0,
    norm='rmsnorm',
    norm_eps=1e-5,
    act='swiglu',
    qk_norm=False,
    softmax_scale=0.0,
    tie_weights=True,
    init='gpt2',
    zero_init=False,
    kernel='sdpa',
    q_lora_rank=0,
    kv_lora_rank=512,
    qk_nope_head_dim=0,
    qk_rope_head_dim=32,
    v_head_dim=0,
    latent_norm=True,
    qk_norm_latent=False,
    latent_init='fan_in',
    optimizer='adamw',
    learning_rate=0.01,
    muon_lr=0.02,
    muon_up=1.0,
    muon_split=True,
    weight_decay=0.1,
    beta1=0.9,
    beta2=0.95,
    grad_clip=1.0,
    ema_decay=0.0,
    train_only='',
    teacher='',
    distill=0.5,
    distill_hidden=0.0,
    max_iters=10,
    decay_lr=True,
    schedule='cosine',
    warmup_iters=2,
    lr_decay_iters=0,
    min_lr=0.001,
    cooldown=0.4,
    max_minutes=0.0,
    target_loss=0.0,
    device='cpu',
    dtype='float32',
    compile=False,
    fused_loss=True,
    fp8_head=False,
    cuda_graph=False,
    backend='auto',
)
MODEL_ARGS = (
    'block_size vocab_size n_layer n_head n_embd dropout dropout_in bias n_kv_head head_dim '
    'n_inner mlp pos rope_theta rope_scaling norm norm_eps act qk_norm softmax_scale tie_weights '
    'init zero_init kernel'
).split()
MLA_ARGS = (
    'q_lora_rank kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim latent_norm '
    'latent_init qk_norm_latent absorb kv_lora_ranks source_head_dim'
).split()
OLD = dict(  # what differs from SETTINGS in the run, and then in its model
    llama=({}, {}),
    mla=(
        dict(
            attention='mla',
            n_head=2,
            n_kv_head=0,
            head_dim=0,
            n_inner=0,
            pos='learned',
            norm='layernorm',
            act='gelu',
            q_lora_rank=8,
            kv_lora_rank=8,
            qk_rope_head_dim=4,
            optimizer='muon',
            muon_up=0.25,
            ema_decay=0.9,
        ),
        dict(
            n_kv_head=2,
            head_dim=8,
            n_inner=64,
            pos='rope',
            qk_nope_head_dim=4,
            v_head_dim=8,
            absorb=False,
            kv_lora_ranks=(),
            source_head_dim=0,
        ),
    ),
)
SHAPES = dict(  # of a block's weights, in the order of the state dict
    llama={
        'ln_1': (16,),
        'attn.c_proj': (16, 32),
        'attn.c_attn': (64, 16),
        'ln_2': (16,),
        'mlp.c_fc': (80, 16),
        'mlp.c_proj': (16, 40),
    },
    mla={
        'ln_1': (16,),
        'attn.c_proj': (16, 16),
        'attn.q_a_proj': (8, 16),
        'attn.q_a_layernorm': (8,),
        'attn.q_b_proj': (16, 8),
        'attn.kv_a_proj_with_mqa': (12, 16),
        'attn.kv_a_layernorm': (8,),
        'attn.kv_b_proj': (24, 8),
        'ln_2': (16,),
        'mlp.c_fc': (64, 16),
        'mlp.c_proj': (16, 64),
    },
    nanogpt={
        'ln_1': (16,),
        'attn.c_attn': (48, 16),
        'attn.c_proj': (16, 16),
        'ln_2': (16,),
        'mlp.c_fc': (64, 16),
        'mlp.c_proj': (16, 64),
    },
)


class Numbers:
    """Random tensors that are the same everywhere: numpy never changes what RandomState gives."""

    def __init__(self, seed):
        self.random = np.random.RandomState(seed)

    def between(self, low, high, shape):
        numbers = low + (high - low) * self.random.random_sample(shape)
        return torch.from_numpy(numbers.astype(np.float32))

    def weight(self, shape):
        low, high = (0.8, 1.2) if len(shape) == 1 else (-0.6, 0.6)
        return self.between(low, high, shape)


def write_dataset(folder):
    words = 'the cat sat on a mat, and then she ran to his red hat in the sun\n'.split(' ')
    picked = np.random.RandomState(0).randint(len(words), size=1800)
    text = ' '.join(words[i] for i in picked)
    ids = np.array([CHARS.index(c) for c in text[:6000]], np.uint16)
    assert len(ids) == 6000
    folder.mkdir()
    ids[:5400].tofile(folder / 'train.bin')
    ids[5400:].tofile(folder / 'val.bin')
    (folder / 'meta.json').write_text(json.dumps(META))


def weights(shapes, numbers, positions=False):
    """A state dict of two blocks; embedding and head are one tensor, as in every file."""
    state = OrderedDict({'transformer.wte.weight': numbers.weight((16, 16))})
    if positions:
        state['transformer.wpe.weight'] = numbers.weight((32, 16))
    for n in range(2):
        for name, shape in shapes.items():
            state[f'transformer.h.{n}.{name}.weight'] = numbers.weight(shape)
    state['transformer.ln_f.weight'] = numbers.weight((16,))
    state['lm_head.weight'] = state['transformer.wte.weight']
    return state


def adamw(matrices, vectors, numbers, own=None):
    """AdamW's state after 10 steps, with decay for matrices; `own` are further keys of a group."""
    moments = [
        dict(
            step=torch.tensor(10.0),
            exp_avg=numbers.between(-1e-2, 1e-2, p.shape),
            exp_avg_sq=numbers.between(1e-4, 1e-3, p.shape),
        )
        for p in matrices + vectors
    ]
    index = list(range(len(moments)))
    rest = dict(
        lr=0.00134,
        betas=(0.9, 0.95),
        eps=1e-8,
        amsgrad=False,
        maximize=False,
        foreach=None,
        capturable=False,
        differentiable=False,
        fused=True,
    ) | (own or {})
    groups = [
        dict(weight_decay=0.1, **rest, params=index[: len(matrices)]),
        dict(weight_decay=0.0, **rest, params=index[len(matrices) :]),
    ]
    return dict(state=dict(enumerate(moments)), param_groups=groups)


def muon(matrices, behind_latents, numbers):
    """Muon's state; matrices that read a latent have a group of their own."""
    params = matrices + behind_latents
    index = list(range(len(params)))
    rest = dict(weight_decay=0.1, momentum=0.95, steps=5)
    groups = [
        dict(base_lr=0.02, lr=0.00268, **rest, params=index[: len(matrices)]),
        dict(base_lr=0.005, lr=0.00067, **rest, params=index[len(matrices) :]),
    ]
    moments = [dict(momentum=numbers.between(-1e-2, 1e-2, p.shape)) for p in params]
    return dict(state=dict(enumerate(moments)), param_groups=groups)


def old_optimizers(state, kind, numbers):
    """The optimizers of a run, and the moving average of its weights or None, as in last.pt."""
    params = {name: p for name, p in state.items() if name != 'lm_head.weight'}
    matrices = {name: p for name, p in params.items() if p.ndim == 2}
    vectors = [p for p in params.values() if p.ndim == 1]
    own = dict(base_lr=0.01, decoupled_weight_decay=True)
    if kind == 'llama':
        return [adamw([*matrices.values()], vectors, numbers, own)], None
    embedding = matrices.pop('transformer.wte.weight')
    behind = [matrices.pop(name) for name in list(matrices) if '_b_proj' in name]
    optimizers = [
        adamw([embedding], vectors, numbers, own),
        muon([*matrices.values()], behind, numbers),
    ]
    return optimizers, [numbers.weight(p.shape) for p in params.values()]


def write_old_run(folder, kind, dataset):
    """ckpt.pt, last.pt and log.jsonl of 10 steps, laid out as train.py left them at e498ffd."""
    numbers, (of_run, of_model) = Numbers(len(kind)), OLD[kind]
    settings = SETTINGS | dict(dataset=str(dataset)) | of_run
    values = settings | dict(vocab_size=16) | of_model
    names = MODEL_ARGS + MLA_ARGS * (kind == 'mla')
    content = dict(
        kind=settings['attention'],
        model_args={name: values[name] for name in names},
        step=10,
        best_val_loss=4.5,
        best_step=10,
        meta=META,
        config=settings,
        commit='e498ffd',
        seconds=1.349,
        model=weights(SHAPES[kind], numbers),
    )
    optimizers, average = old_optimizers(content['model'], kind, numbers)
    folder.mkdir()
    torch.save(content, folder / 'ckpt.pt')
    content |= dict(optimizers=optimizers, scaler={}, average=average)
    torch.save(content, folder / 'last.pt')

    clock = dict(seconds=1.3, train_seconds=0.05)
    lines = [
        dict(
            event='settings',
            config=settings,
            kind=settings['attention'],
            params=7248,
            commit='e498ffd',
            world=1,
            device='CPU, 1 threads',
            dtype='float32',
            torch='2.13.0+cpu',
            data=dict(name=str(dataset), source=META['source'], tokenizer='char'),
            cache_bytes_per_token=128,
        )
    ]
    lines += [
        dict(
            event='train',
            step=step,
            tokens=128 * step,
            **clock,
            loss=5 - 0.05 * step,
            lr=0.01,
            tok_per_s=23032,
            mfu=None,
        )
        for step in range(1, 11)
    ]
    lines += [
        dict(event='eval', step=10, tokens=1280, **clock, val_loss=4.5, train_loss=4.5),
        dict(
            event='end',
            step=10,
            why='max_iters reached',
            best_val_loss=4.5,
            best_step=10,
            **clock,
            tok_per_s=22862,
            peak_memory=413257728,
        ),
    ]
    (folder / 'log.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))


def write_nanogpt(folder, dataset, compiled):
    """nanoGPT's ckpt.pt; compiled: with a prefix before each name, and with causal masks, too."""
    numbers = Numbers(5)
    state = weights(SHAPES['nanogpt'], numbers, positions=True)
    params = [p for name, p in state.items() if name != 'lm_head.weight']
    matrices, vectors = ([p for p in params if p.ndim == ndim] for ndim in (2, 1))
    optimizer = adamw(matrices, vectors, numbers)
    if compiled:
        mask = torch.ones(1, 1, 32, 32).tril()
        state |= {f'transformer.h.{n}.attn.bias': mask for n in range(2)}
        state = OrderedDict((f'_orig_mod.{name}', value) for name, value in state.items())
    shape = dict(n_layer=2, n_head=2, n_embd=16, block_size=32, bias=False, dropout=0.0)
    content = dict(
        model=state,
        optimizer=optimizer,
        model_args=shape | dict(vocab_size=16),
        iter_num=10,
        best_val_loss=torch.tensor(2.5),
        config=shape | dict(out_dir='out', dataset=str(dataset), device='cpu', compile=compiled),
    )
    folder.mkdir()
    torch.save(content, folder / 'ckpt.pt')


def write_files(folder):
    """All that the scripts are given: a dataset of characters and the old files."""
    dataset = folder / 'text'
    write_dataset(dataset)
    for kind in OLD:
        write_old_run(folder / f'old-{kind}', kind, dataset)
        write_old_run(folder / f'resumed-{kind}', kind, dataset)
    write_nanogpt(folder / 'nanogpt', dataset, compiled=False)
    write_nanogpt(folder / 'nanogpt-compiled', dataset, compiled=True)


# --------------------------------------------------------------------------------------------------
# what the scripts are asked for: each function runs one of them and returns plain values


def losses(lines):
    """[[step, loss], ...] of training and of validation, from the lines of a log.jsonl."""
    events = [json.loads(line) for line in lines]
    return {
        key: [[event['step'], event[key]] for event in events if event['event'] == name]
        for name, key in (('train', 'loss'), ('eval', 'val_loss'))
    }


def weights_of(checkpoint):
    """A digest of every bit of the weights in a file, and their norm, for where bits may differ."""
    state = torch.load(checkpoint, map_location='cpu', weights_only=True)['model']
    digest = hashlib.sha256()
    for name, t in sorted(state.items()):
        digest.update(f'{name} {tuple(t.shape)} {t.dtype}'.encode())
        digest.update(t.contiguous().numpy().tobytes())
    squares = (x * x for t in state.values() for x in t.double().flatten().tolist())
    return dict(sha256=digest.hexdigest(), norm=math.sqrt(math.fsum(squares)))


def train(results, name):
    out = results.folder / name
    settings = FROM_SCRATCH | MODELS[name]
    printed = results.run('train.py', dataset=results.folder / 'text', out_dir=out, **settings)
    assert is_png(out / 'curve.png')
    found = losses((out / 'log.jsonl').read_text().splitlines())
    found['sample'] = re.search('--- a sample ---\n(.*?)\n---\n', printed, re.DOTALL)[1]
    return found | weights_of(out / 'ckpt.pt')


def resume(results, kind):
    """Goes on from an old last.pt, and draws the curve of an old log.jsonl and what is added."""
    out = results.folder / f'resumed-{kind}'
    log = out / 'log.jsonl'
    before = log.read_text()
    settings = TRAIN | dict(max_iters=16, eval_interval=3, log_interval=1)
    if kind == 'mla':
        settings |= dict(optimizer='muon', muon_up=0.25, ema_decay=0.9)
    results.run(
        'train.py', dataset=results.folder / 'text', out_dir=out, init_from='resume', **settings
    )
    after = log.read_text()
    assert after.startswith(before) and is_png(out / 'curve.png')
    return losses(after.removeprefix(before).splitlines()) | weights_of(out / 'ckpt.pt')


def sample(results, name, **settings):
    if name in MODELS:
        results.wait(f'train {name}')
    length = 40 if name in ('modern', 'mla') else 24  # without RoPE, a text ends with the block
    return results.run(
        'sample.py',
        out_dir=results.folder / name,
        device='cpu',
        dtype='float32',
        start='the cat ',
        num_samples=2,
        max_new_tokens=length,
        **settings,
    )


def answer(results):
    """Samples of several prompts at a time, from a quantised cache."""
    prompts = results.folder / 'prompts.txt'
    prompts.write_text('the cat\nshe ran to\nhis red hat in\nsun\n')
    return results.run(
        'sample.py',
        init_from=results.folder / 'old-mla' / 'last.pt',
        device='cpu',
        dtype='float32',
        prompts=prompts,
        cache='paged',
        cache_dtype='int8',
        batch_size=2,
        jsonl=True,
        max_new_tokens=20,
        top_k=8,
        top_p=0.9,
        temperature=1.0,
        stop=', ',
    )


def convert(results):
    """An old Llama as MLA: the table that the file holds, the numbers in print, and the weights."""
    out = results.folder / 'converted'
    printed = results.run(
        'convert_mla.py',
        results.folder / 'old-llama',
        out=out,
        saving=0.5,
        q_lora_rank=8,
        low_rank='balanced',
        by_layer=False,
        layerwise=False,
        rotate=True,
        cache_dtype='int8',
        calibration_tokens=2000,
        eval_tokens=500,
        device='cpu',
    )
    assert is_png(out / 'conversion.png')
    history = torch.load(out / 'ckpt.pt', map_location='cpu', weights_only=True)['conversion']
    keys = 'bytes', 'saved', 'nats', 'perplexity'
    table = [[row[key] for key in keys] for row in history['table']]
    rows = re.findall(r' (\d+) +([-\d.]+) % +([\d.]+)$', printed, re.MULTILINE)
    assert len(rows) == len(table)
    return dict(
        table=table,
        printed=[[*map(float, row)] for row in rows],
        layers=[[layer['rank'], layer['energy']] for layer in history['layers']],
    ) | weights_of(out / 'ckpt.pt')


def find_heads(results):
    """Columns of heads.csv, with all heads of two models, and what heads.json has on the models."""
    out = results.folder / 'heads'
    folders = f'{results.folder}/nanogpt,{results.folder}/old-mla'
    results.run(
        'find_induction_heads.py',
        out_dir=folders,
        out=out,
        texts=8,
        threshold=0.001,
        causes='all',
        latents=True,
        device='cpu',
    )
    assert is_png(out / 'heads.png') and is_png(out / 'latents.png')
    with open(out / 'heads.csv', encoding='utf-8', newline='') as file:
        heads = list(csv.DictReader(file))
    endings = '_score', '_ablation', 'copying', 'induction_low', 'induction_gap', 'on_text_gap'
    found = {key: [float(head[key]) for head in heads] for key in heads[0] if key.endswith(endings)}
    found['label'] = [head['label'] for head in heads]
    models = json.loads((out / 'heads.json').read_text(encoding='utf-8'))['models']
    for key in ('repeat_loss', 'control_loss', 'text_repeat_loss', 'group_ablation', 'paths'):
        found[key] = [model[key] for model in models]
    found['composition'] = [pair['value'] for model in models for pair in model['composition']]
    found['latents'] = models[1]['latents']['variance']
    return found


def evaluate(results):
    """Losses through several caches, from results.json."""
    out = results.folder / 'evaluated'
    results.run(
        EVAL,
        models=results.folder / 'old-mla',
        cache='dense,paged,none',
        cache_dtype='auto,int8',
        window=8,
        chunk_size=8,
        out_dir=out,
        device='cpu',
        dtype='float32',
    )
    return [
        [
            record['cache'],
            record['cache_bytes'].get('bytes_per_token'),
            record['result']['loss'],
            record['result']['bits_per_byte'],
        ]
        for record in json.loads((out / 'results.json').read_text())
    ]


def compare(results):
    """The table of a comparison that was logged long ago; its two pictures are drawn."""
    picture = results.folder / 'compare.png'
    log = 'assets/logs/compare_shakespeare_cpu.jsonl'
    results.run('compare.py', plot_only=True, results=log, figure=picture)
    assert is_png(picture) and is_png(results.folder / 'compare_front.png')
    keys = 'label', 'params', 'cache_bytes', 'val_loss', 'sd', 'difference', 'half'
    rows = json.loads(picture.with_suffix('.json').read_text())
    return [[row[key] for key in keys] for row in rows]


def arithmetic(results):
    script = results.folder / 'arithmetic.py'
    script.write_text(ARITHMETIC)
    return results.run(script).strip()


SAMPLES = [  # of which checkpoint, through which cache, at which temperature
    *product(MODELS, ('dense', 'paged', 'none'), (0.0, 0.8)),
    ('old-llama', 'paged', 0.8),
    ('old-mla', 'dense', 0.8),
    ('nanogpt', 'none', 0.8),
    ('nanogpt-compiled', 'none', 0.8),
]
JOBS = {f'train {name}': partial(train, name=name) for name in MODELS}
JOBS |= {f'resume {kind}': partial(resume, kind=kind) for kind in OLD}
JOBS |= dict(
    arithmetic=arithmetic,
    heads=find_heads,
    convert=convert,
    evaluate=evaluate,
    compare=compare,
    answer=answer,
)
JOBS |= {
    f'sample {name} {cache} {heat}': partial(sample, name=name, cache=cache, temperature=heat)
    for name, cache, heat in SAMPLES
}


class Results:
    """
    What the scripts gave, by the name of a job. Each runs once, when it is first asked for, or all
    are begun at the start; trainings come first, as others wait for them.
    """

    def __init__(self, folder, at_a_time=2):
        self.folder, self.lock, self.futures = folder, threading.Lock(), {}
        self.pool, self.free, self.number = ThreadPoolExecutor(2), SimpleQueue(), count()
        self.runners = [
            Popen(
                [sys.executable, '-c', RUNNER],
                cwd=ROOT,
                env=ENVIRONMENT,
                stdin=PIPE,
                stdout=PIPE,
                encoding='utf-8',
            )
            for _ in range(at_a_time)
        ]
        for runner in self.runners:
            self.free.put(runner)
        write_files(folder)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.pool.shutdown(cancel_futures=True)
        for runner in self.runners:
            runner.kill()
            runner.communicate()

    def run(self, script, *words, **settings):
        """Runs `python script words --key=value` from the repository; what it writes to stdout."""
        words = [*words, *(f'--{key}={value}' for key, value in settings.items())]
        words = [str(ROOT / script), *map(str, words)]
        out, err = (self.folder / f'{next(self.number)}.{end}' for end in ('out', 'err'))
        runner = self.free.get()
        runner.stdin.write(json.dumps([words, str(out), str(err)]) + '\n')
        runner.stdin.flush()
        code = runner.stdout.readline().strip()
        self.free.put(runner)
        assert code == '0', f'{words} ended with {code}:\n{out.read_text()}\n{err.read_text()}'
        return out.read_text(encoding='utf-8')

    def begin(self, name):
        with self.lock:
            if name not in self.futures:
                self.futures[name] = self.pool.submit(JOBS[name], self)
            return self.futures[name]

    def begin_all(self):
        for name in JOBS:
            self.begin(name)

    def wait(self, name):
        return self.begin(name).result()


def surroundings(results):
    """What numbers depend on besides the code."""
    return dict(
        torch=torch.__version__.partition('+')[0],
        machine=platform.machine(),
        arithmetic=results.wait('arithmetic'),
    )


def record():
    with tempfile.TemporaryDirectory() as folder, Results(Path(folder)) as results:
        results.begin_all()
        found = dict(surroundings=surroundings(results))
        found |= {name: results.wait(name) for name in JOBS if name != 'arithmetic'}
    lines = [f'{json.dumps(name)}: {json.dumps(value)}' for name, value in found.items()]
    RECORD.write_text('{\n' + ',\n'.join(lines) + '\n}\n')


# --------------------------------------------------------------------------------------------------
# the promises


@pytest.fixture(scope='module')
def results(tmp_path_factory):
    # Each of xdist's processes has few of the tests, and as many of them as there are cores.
    alone = 'PYTEST_XDIST_WORKER' not in os.environ
    with Results(tmp_path_factory.mktemp('same'), at_a_time=2 if alone else 1) as results:
        if alone:
            results.begin_all()
        yield results


@pytest.fixture(scope='module')
def recorded():
    return json.loads(RECORD.read_text())


@pytest.fixture(scope='module')
def exact(results, recorded):
    """Whether every bit counts: this is torch and the arithmetic that were recorded."""
    then, now = recorded['surroundings'], surroundings(results)
    if now != then:
        warnings.warn(
            f'compared to 1e-4, not bit by bit: recorded with {then}, this is {now}', stacklevel=1
        )
    return now == then


@pytest.fixture
def is_same(results, recorded, exact):
    """is_same(job) asserts that a job gives what was recorded."""

    def check(job):
        found = results.wait(job)
        assert found == (recorded[job] if exact else close_to(recorded[job]))

    return check


def close_to(value):
    """What equals `value` to 1e-4: any number as near, any digest of bits, all else as it is."""
    if isinstance(value, dict):
        return {key: ANY if key == 'sha256' else close_to(x) for key, x in value.items()}
    if isinstance(value, list):
        return [close_to(x) for x in value]
    return pytest.approx(value, rel=1e-4, abs=2e-5) if isinstance(value, float) else value


def jobs(kind):
    return pytest.mark.parametrize('job', [name for name in JOBS if name.startswith(kind)])


@jobs('train')
def test_training_gives_the_same_losses_weights_and_sample(job, is_same):
    is_same(job)


@jobs('sample')
def test_a_checkpoint_old_or_new_writes_the_same_text(job, is_same):
    is_same(job)


def test_prompts_get_the_same_answers(is_same):
    is_same('answer')


def test_nanogpts_checkpoint_writes_one_text_compiled_or_not(results):
    texts = {results.wait(f'sample {name} none 0.8') for name in ('nanogpt', 'nanogpt-compiled')}
    assert len(texts) == 1


def test_a_conversion_to_mla_has_the_same_perplexities_and_weights(is_same):
    is_same('convert')


def test_heads_get_the_same_scores(is_same):
    is_same('heads')


def test_an_evaluation_gives_the_same_losses(is_same):
    is_same('evaluate')


@jobs('resume')
def test_an_old_run_goes_on_with_the_same_losses_and_draws_its_curve(job, is_same):
    is_same(job)


def test_an_old_comparison_is_drawn_with_the_same_numbers(is_same):
    is_same('compare')


if __name__ == '__main__':
    if sys.argv[1:] != ['--record']:
        sys.exit('to record what the scripts give now: python tests/test_same_results.py --record')
    record()
