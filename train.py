"""
Train a GPT-2, Llama-like or MLA model from scratch, or go on training one.

    python train.py config/train_shakespeare_mla.py
    python train.py config/train_gpt2.py --batch_size=32 --compile=False
    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2_mla.py

A run leaves out_dir/ckpt.pt (its best weights), last.pt (to resume from), log.jsonl and curve.png.
"""

# output
out_dir = 'out'
init_from = 'scratch'  # scratch | resume (out_dir/last.pt) | gpt2, gpt2-medium, gpt2-large, gpt2-xl | a checkpoint file or folder, also of Llama or DeepSeek-V3
eval_interval = 2000  # steps between evaluations; each one also writes the checkpoints
eval_iters = 200  # batches of an evaluation; a validation split that is smaller is scored whole
eval_only = False  # evaluate once and stop
log_interval = 10  # steps between lines of the log
always_save_checkpoint = False  # ckpt.pt follows the newest evaluation, not the best one
keep_checkpoints = (
    0  # keep as many, spread evenly over log(step), as step-NNNNNN.pt: how the run got there
)
sample_tokens = 300  # length of the text written at the end; 0 = none
wandb_log = False  # mirror the log to Weights & Biases
wandb_project = 'nanomla'
wandb_run_name = ''  # '' = the name of out_dir
# data
dataset = 'openwebtext'  # a folder in data/, or a path
gradient_accumulation_steps = 40  # micro-batches of a step, over all processes together
batch_size = 12  # sequences in a micro-batch
block_size = 1024  # tokens in a sequence
seed = 1337  # decides weights, batches and dropout
# model
attention = 'mha'  # mha (also GQA and MQA, by n_kv_head) | mla
n_layer = 12
n_head = 12
n_embd = 768
n_kv_head = 0  # key/value heads: 0 = n_head (MHA), 1 = MQA, between = GQA
head_dim = 0  # 0 = n_embd / n_head
n_inner = 0  # width of the MLP: 0 = 4 n_embd (SwiGLU: 8/3 n_embd)
mlp = True  # False: attention only
dropout = 0.0
dropout_in = 'all'  # all (embedding, attention, residual branches: GPT-2's) | residual
bias = False  # in Linear and LayerNorm
pos = 'learned'  # learned | rope | none; MLA: rope unless qk_rope_head_dim = 0
rope_theta = 10000.0
rope_scaling = 1.0  # linear: position p counts as p / rope_scaling
norm = 'layernorm'  # layernorm | rmsnorm
norm_eps = 1e-5
act = 'gelu'  # gelu | gelu_tanh | swiglu | relu2
qk_norm = False  # RMS norm of queries and keys
softmax_scale = 0.0  # of the logits; 0 = 1 / sqrt(width of a query)
tie_weights = True  # one matrix for embedding and head
init = 'gpt2'  # gpt2: normal(0, 0.02) | fan_in
zero_init = False  # projections into the residual stream start at zero
kernel = 'sdpa'  # attention: eager | sdpa | flash | cudnn | flex
# MLA only
q_lora_rank = 0  # latent width of the query; 0 = no latent
kv_lora_rank = 512  # latent width of keys and values
qk_nope_head_dim = 0  # width of a head without position; 0 = head_dim - qk_rope_head_dim
qk_rope_head_dim = 32  # width of a head with RoPE; the early n_latent block: 0, latent_norm=False, latent_init=gpt2
v_head_dim = 0  # 0 = head_dim
latent_norm = True
qk_norm_latent = (
    False  # with qk_norm: norm a query as it meets the cache, content and RoPE together
)
latent_init = 'fan_in'  # fan_in | gpt2 | orthogonal (each head's up projections)
# optimizer
optimizer = 'adamw'  # adamw | muon (for the blocks' matrices; AdamW for the rest)
learning_rate = 6e-4  # peak, of AdamW
muon_lr = 0.02  # peak, of Muon
muon_up = 1.0  # share of that rate for W^UQ, W^UK, W^UV, which read a latent
muon_split = True  # Muon takes stacked matrices (W^Q | W^K | W^V, W^DKV | W^KR, ...) apart
weight_decay = 0.1
beta1 = 0.9
beta2 = 0.95
grad_clip = 1.0  # largest norm of the gradient; 0 = do not clip
ema_decay = 0.0  # evaluate and keep a moving average of the weights; 0 = none
train_only = ''  # words, separated by commas: train only parameters that have one of them in their name; '' = all
teacher = ''  # a checkpoint whose predictions to learn, such as the model before its conversion; '' = none
distill = 0.5  # share of the loss that is KL(teacher, model), not cross-entropy
distill_hidden = 0.0  # beside it: weight of how far each block's output is from the teacher's, for a teacher of the same depth and width
# schedule
max_iters = 600000  # steps
decay_lr = True
schedule = 'cosine'  # cosine | wsd (warmup, stable, then linear decay)
warmup_iters = 2000
lr_decay_iters = 0  # step at which min_lr is reached; 0 = max_iters
min_lr = 6e-5
cooldown = 0.4  # wsd: share of lr_decay_iters that decays
max_minutes = 0.0  # stop (resumably) after that long; 0 = no limit
target_loss = 0.0  # stop when the validation loss is this low; 0 = no target
# machine
device = 'auto'  # auto | cpu | cuda | cuda:1 | mps
dtype = 'auto'  # of the residual stream: auto | float32 | bfloat16 | float16 | fast (auto, but bfloat16 on CPUs made for it)
compile = True  # torch.compile one block, which serves all
fused_loss = True  # head and loss by one kernel on a GPU
fp8_head = False  # the head's products in 8 bits (Hopper and newer): faster, a little less exact
cuda_graph = False  # record a whole step and replay it: for small models on one GPU
backend = 'auto'  # torch.distributed: auto | nccl | gloo

from nanomla.core.configurator import UserError, configure
from nanomla.inference.generate import generate

config = configure(globals())

# -------------------------------------------------------------------------------------------------
import json
import math
import os
import shlex
import shutil
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist

from nanomla.checkpoints import load
from nanomla.checkpoints import native as checkpoint
from nanomla.core import devices as machine
from nanomla.core import timing, tokenizers
from nanomla.core import token_files as datasets
from nanomla.inference.cache import Cache
from nanomla.training import batches
from nanomla.training.trainer import Trainer, check_ranges, rate

started, bar = time.perf_counter(), None
device = machine.pick_device(device)
on_cpu = config.apply_on_cpu() if device.type == 'cpu' else {}
rank, world, _, device = machine.join_processes(device, backend)
main = rank == 0
torch.set_float32_matmul_precision('high')  # TF32 where fp32 matrices are multiplied on a GPU


def say(*words):
    """A line for people: from rank 0 only, above the progress bar."""
    if main:
        bar.write(' '.join(map(str, words))) if bar else print(*words, flush=True)


say(config.echo())
if on_cpu:
    say('on the CPU:', ', '.join(f'{key}={value}' for key, value in on_cpu.items()))

# -------------------------------------------------------------------------------------------------
# what was asked for, checked before anything is written
check_ranges(config)
out = Path(out_dir)
if init_from == 'scratch' and (kind := checkpoint.kind_in(out)) not in (None, attention):
    raise UserError(
        f"--out_dir={out_dir} holds a model of kind '{kind}', not '{attention}': name another folder, or remove it"
    )

# -------------------------------------------------------------------------------------------------
# data and model
if main:
    datasets.prepare_if_missing(dataset)
if world > 1:
    dist.barrier()
meta = datasets.read_meta(datasets.find(dataset))
torch.manual_seed(seed)
old, source, run = {}, {}, SimpleNamespace(step=0, best=math.inf, best_step=0, seconds=0.0)
if init_from == 'scratch':
    model = checkpoint.new_model(attention, config, config.given, meta['vocab_size'])
elif init_from == 'resume':
    if not os.path.exists(out / 'last.pt'):
        raise UserError(
            f'there is nothing to resume: {out}/last.pt is missing; train with --init_from=scratch first'
        )
    old = source = checkpoint.load(out / 'last.pt')
    if not old.keys() >= {
        'optimizers',
        'scaler',
        'average',
        'best_val_loss',
        'best_step',
        'seconds',
    }:
        raise UserError(
            f'{out}/last.pt holds no state to resume, only weights: go on from them with --init_from={out}/last.pt'
        )
    model = checkpoint.build(old, dropout=dropout, dropout_in=dropout_in, kernel=kernel)
    run = SimpleNamespace(
        step=old['step'],
        best=old['best_val_loss'],
        best_step=old['best_step'],
        seconds=old['seconds'],
    )
else:
    loaded = load.load_model(init_from, dropout=dropout, dropout_in=dropout_in, kernel=kernel)
    model, source, tokenizer = loaded.model, loaded.checkpoint, loaded.tokenizer
    if tokenizer:
        say(
            f"{init_from} has its own tokenizer.json, {dataset} holds tokens of '{meta['tokenizer']}': unless they are the same, it starts from nonsense"
        )
if init_from != 'scratch':
    path = source.get('path', init_from)
    if any(source.get('meta', meta).get(key) != meta.get(key) for key in ('tokenizer', 'chars')):
        raise UserError(
            f'{path} was trained on other tokens than {dataset} has: train on a dataset with its characters'
        )
    checkpoint.check_given(
        model,
        config,
        config.given,
        path,
        free={'dropout', 'dropout_in', 'kernel', *([] if old else ['block_size'])},
    )
    if 'block_size' not in config.given:
        config['block_size'] = block_size = model.config.block_size
if block_size != model.config.block_size:
    model.crop_block_size(block_size)
if meta['vocab_size'] > model.config.vocab_size:
    raise UserError(
        f'{dataset} has {meta["vocab_size"]} different tokens, the model knows {model.config.vocab_size}'
    )
model.float().to(device).train()  # master weights in fp32, whatever the file held
model.stream = machine.pick_dtype(dtype, device)
model.check_kernel(device)
data = batches.Dataset(datasets.find(dataset), block_size, seed, device, rank, world)
trainer = Trainer(
    config,
    model,
    data,
    load.load_model(teacher, dropout=0.0, kernel=kernel).model if teacher else None,
)
if old:
    trainer.load_state(old)
    old = None
kind, commit = checkpoint.kind_of(model), machine.commit()
tokens_per_step = gradient_accumulation_steps * batch_size * block_size
peak = machine.peak_flops(device, model.stream) * world
say(
    f'{kind.upper()}, {model.num_params() / 1e6:.2f}M parameters, cache {model.cache_bytes_per_token():,} bytes a token (bf16), '
    f'{machine.describe(device)}, {str(model.stream)[6:]}\ntext: {meta["source"]}; {tokens_per_step:,} tokens a step'
)
if eval_only:
    say(f'val loss {trainer.evaluate():.4f} nats')
    dist.destroy_process_group() if world > 1 else None
    sys.exit()

# -------------------------------------------------------------------------------------------------
# what a run leaves behind


def seconds():
    return round(run.seconds + time.perf_counter() - started, 3)


def note(event, **numbers):
    """One line of log.jsonl, flushed; the same numbers go to wandb."""
    if main:
        try:
            log.write(json.dumps(dict(event=event, **numbers)) + '\n')
            log.flush()
        except OSError as error:
            raise UserError(f'cannot write {out}/log.jsonl: {error.strerror}') from None
        if wandb_log:
            wandb.log(
                {f'{event}/{k}': v for k, v in numbers.items() if isinstance(v, (int, float))},
                step=run.step,
            )


def check(value):
    """A run whose loss is no number has failed: it ends here, before it saves anything."""
    if not math.isfinite(value):
        saved = f'; {out}/last.pt holds an earlier state' if (out / 'last.pt').exists() else ''
        sys.exit(f'error: the loss is {value} at step {run.step}: lower the learning rates{saved}')


def save(name, resumable):
    """Write out_dir/name: the weights to use (averaged, if they are), or all that a resumed run needs."""
    content = dict(
        kind=kind,
        model_args=checkpoint.model_args(model),
        step=run.step,
        best_val_loss=run.best,
        best_step=run.best_step,
        meta=meta,
        config=dict(config),
        commit=commit,
        seconds=seconds(),
    ) | {key: source[key] for key in ('conversion',) if key in source}
    if resumable:
        checkpoint.save(out / name, content | dict(model=model.state_dict()) | trainer.state())
    else:
        with trainer.averaged():
            checkpoint.save(out / name, content | dict(model=model.state_dict()))


if main:
    if wandb_log:
        try:
            import wandb

            wandb.init(project=wandb_project, name=wandb_run_name or out.name, config=dict(config))
        except ImportError:
            raise UserError('--wandb_log=True needs wandb: pip install wandb') from None
        except wandb.Error as error:
            raise UserError(
                f'wandb does not start ({error}): run `wandb login`, set WANDB_MODE=offline, or leave --wandb_log out'
            ) from None
    try:
        out.mkdir(parents=True, exist_ok=True)
        if init_from != 'resume' and checkpoint.set_aside(out):
            say(f'{out_dir} held an earlier run: it is now in {out_dir}/previous')
        if (
            init_from == 'resume' and (out / 'log.jsonl').exists()
        ):  # a crash may have cut its last line short
            os.truncate(out / 'log.jsonl', (out / 'log.jsonl').read_bytes().rfind(b'\n') + 1)
        for file in tokenizer.files if tokenizer else ():
            shutil.copyfile(file, out / file.name) if not (out / file.name).exists() else None
        log = open(out / 'log.jsonl', 'a' if init_from == 'resume' else 'w')
    except OSError as error:
        raise UserError(f'cannot write to --out_dir={out_dir}: {error.strerror}') from None
    if sys.stderr.isatty():
        from tqdm import tqdm

        bar = tqdm(
            total=max_iters, initial=run.step, unit='step', dynamic_ncols=True, smoothing=0.1
        )
if init_from == 'resume':
    note('resume', step=run.step)
else:
    note(
        'settings',
        config=dict(config),
        kind=kind,
        params=model.num_params(),
        commit=commit,
        world=world,
        data=dict(name=dataset, source=meta['source'], tokenizer=meta['tokenizer']),
        device=machine.describe(device),
        dtype=str(model.stream)[6:],
        torch=torch.__version__,
        cache_bytes_per_token=model.cache_bytes_per_token(),
    )
kept = checkpoint.steps_to_keep(keep_checkpoints, max_iters)
if main and run.step == 0 in kept:
    save(checkpoint.step_name(0), resumable=False)

signals = (
    machine.Signals()
)  # SIGTERM, SIGUSR1 and Ctrl-C end the run after its step, with a checkpoint to resume from

# -------------------------------------------------------------------------------------------------
# the loop. Speed is measured from the sixth step on: the first ones compile, record and warm up.
first, train_seconds, timed_steps, marked, speed = run.step, 0.0, 0, None, 0.0
stop = 'max_iters reached' if run.step >= max_iters else ''
while not stop:
    loss = trainer.update(run.step)
    run.step += 1
    logging, ending, evaluating = (
        run.step % log_interval == 0,
        run.step >= max_iters,
        run.step % eval_interval == 0,
    )
    if (
        logging
        or ending
        or evaluating
        or run.step in kept
        or run.step == first + 5
        or (world == 1 and signals.name)
    ):
        # here, and only here, the processes wait for the device and agree on whether to go on
        late = max_minutes > 0 and time.perf_counter() - started > 60 * max_minutes
        agreed = torch.stack([loss.float(), loss.new_tensor(float(bool(signals.name) or late))])
        if world > 1:
            dist.all_reduce(agreed)
        lossf, wish = agreed[0].item() / world, agreed[1].item()
        check(lossf)
        if marked:
            train_seconds, timed_steps = (
                train_seconds + time.perf_counter() - marked[0],
                timed_steps + run.step - marked[1],
            )
            speed = timed_steps * tokens_per_step / train_seconds
        if logging or ending:
            note(
                'train',
                step=run.step,
                tokens=run.step * tokens_per_step,
                seconds=seconds(),
                train_seconds=round(train_seconds, 3),
                loss=lossf,
                lr=learning_rate * rate(trainer.s, run.step - 1),
                tok_per_s=round(speed),
                mfu=model.estimate_mfu(speed, peak) if math.isfinite(peak) else None,
            )
            if bar:
                bar.set_postfix_str(
                    f'loss {lossf:.4f}, best val {run.best:.4f}, {speed / 1e3:,.1f}k tok/s',
                    refresh=False,
                )
            elif run.step % (10 * log_interval) == 0:
                left = (max_iters - run.step) * tokens_per_step / max(speed, 1) / 60
                say(
                    f'step {run.step:6d}/{max_iters} | loss {lossf:.4f} | {speed / 1e3:,.1f}k tok/s'
                    + (f' | {left:.1f} min left' if speed else '')
                )
        if ending:
            stop = 'max_iters reached'
        elif wish:
            stop = f'stopped by {signals.name or ("max_minutes" if max_minutes else "a signal")}'
        if evaluating or ending:
            val = trainer.evaluate()
            check(val)
            improved = val < run.best
            if improved:
                run.best, run.best_step = val, run.step
            note(
                'eval',
                step=run.step,
                tokens=run.step * tokens_per_step,
                seconds=seconds(),
                train_seconds=round(train_seconds, 3),
                val_loss=val,
                train_loss=lossf,
            )
            say(
                f'step {run.step:6d} | val loss {val:.4f}{" (best so far)" if improved else ""} | {seconds():.1f} s'
            )
            if main and (improved or always_save_checkpoint):
                save('ckpt.pt', resumable=False)
            if target_loss and val <= target_loss:
                stop = f'target_loss reached: {val:.4f}'
        if main and run.step in kept:
            save(checkpoint.step_name(run.step), resumable=False)
        if main and (evaluating or stop):
            save('last.pt', resumable=True)
        marked = (time.perf_counter(), run.step)
    bar.update(1) if bar else None

# -------------------------------------------------------------------------------------------------
signals.ignore()  # a late one must not kill what has ended well
bar = bar and bar.close()
if main:
    memory, halted = timing.peak_memory(device), stop.startswith('stopped')
    note(
        'end',
        step=run.step,
        why=stop,
        best_val_loss=run.best if run.best_step else None,
        best_step=run.best_step,
        seconds=seconds(),
        train_seconds=round(train_seconds, 3),
        tok_per_s=round(speed),
        peak_memory=memory,
    )
    if sample_tokens and not halted:
        try:
            codec = tokenizers.Tokenizer(meta)
            room, learned = (
                Cache.of(model.eval(), 1, block_size, static=device.type == 'cuda', kernel='torch'),
                model.config.pos == 'learned',
            )
            with torch.compiler.set_stance('force_eager'), trainer.averaged():
                most = min(sample_tokens, block_size) if learned else sample_tokens
                tokens = generate(
                    model,
                    [codec.encode('\n')],
                    most,
                    temperature=0.8,
                    top_k=200,
                    vocab_size=codec.vocab_size,
                    cache=room,
                )
                say(
                    f'--- a sample ---\n{codec.decode([token.item() for token in tokens]).strip()}\n---'
                )
        except UserError as error:
            say(f'no sample: {error}')
    try:
        from nanomla.core.figures import curve

        curve(out / 'log.jsonl', out / 'curve.png')
    except UserError as error:
        say(f'no picture: {error}')
    say(
        f'{stop} | best val loss {run.best:.4f} at step {run.best_step} | {seconds():.0f} s | {speed:,.0f} tok/s | '
        f'peak memory {memory / 2**30:.2f} GiB | {out}/curve.png'
    )
    if halted:
        given = [word for word in sys.argv[1:] if not word.startswith('--init_from')]
        say(f'go on with: python train.py {shlex.join(given)} --init_from=resume')
dist.destroy_process_group() if world > 1 else None
