"""
Train a GPT-2, Llama-like or MLA model from scratch, or go on training one.

    python train.py config/train_shakespeare_mla.py
    python train.py config/train_gpt2.py --batch_size=32 --compile=False
    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2_mla.py

A run leaves out_dir/ckpt.pt (its best weights), last.pt (to resume from), log.jsonl and curve.png.
"""

# output
out_dir = 'out'
init_from = 'scratch'  # scratch | resume (last.pt) | gpt2 to gpt2-xl | a checkpoint or folder
eval_interval = 2000  # steps between evaluations; each one also writes the checkpoints
eval_iters = 200  # batches of an evaluation; a validation split that is smaller is scored whole
eval_only = False  # evaluate once and stop
log_interval = 10  # steps between lines of the log
always_save_checkpoint = False  # ckpt.pt follows the newest evaluation, not the best one
keep_checkpoints = 0  # keep so many as step-NNNNNN.pt, spread evenly over log(step)
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
qk_rope_head_dim = 32  # width of a head with RoPE; 0 = none
v_head_dim = 0  # 0 = head_dim
latent_norm = True
qk_norm_latent = False  # with qk_norm: norm a whole query as it meets the cache
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
train_only = ''  # words with commas: train only parameters with one in their name; '' = all
teacher = ''  # a checkpoint whose predictions to learn; '' = none
distill = 0.5  # share of the loss that is KL(teacher, model), not cross-entropy
distill_hidden = 0.0  # weight of how far each block's output is from the teacher's
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
dtype = 'auto'  # auto | float32 | bfloat16 | float16 | fast (auto, but bfloat16 on CPUs with it)
compile = True  # torch.compile one block, which serves all
fused_loss = True  # head and loss by one kernel on a GPU
fp8_head = False  # the head's products in 8 bits (Hopper and newer): faster, a little less exact
cuda_graph = False  # record a whole step and replay it: for small models on one GPU
backend = 'auto'  # torch.distributed: auto | nccl | gloo

from nanomla.core.configurator import UserError, configure

config = configure(globals(), classes='attentions')  # before the imports: --help is quick

# -------------------------------------------------------------------------------------------------
import json
import math
import os
import shlex
import shutil
import sys
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from nanomla.checkpoints import native
from nanomla.checkpoints.load import load_model
from nanomla.core import devices, token_files
from nanomla.core.checks import settings_errors
from nanomla.core.files import print_line
from nanomla.core.timing import peak_memory
from nanomla.core.tokenizers import Tokenizer
from nanomla.inference.cache import Cache
from nanomla.inference.generate import generate
from nanomla.training.batches import Dataset
from nanomla.training.launch import lock_run_folder
from nanomla.training.next_steps import print_after_training
from nanomla.training.trainer import Trainer, check_ranges, get_lr_share

WARMUP_STEPS = 5  # they compile, record and allocate: speed is measured after them
SECONDS_BETWEEN_LINES = 10  # at most, where steps are slow and there is no progress bar
WIDTH = 100  # columns of a line
RESUMABLE = {'optimizers', 'scaler', 'average', 'best_val_loss', 'best_step', 'seconds'}

started = time.perf_counter()
device = devices.pick_device(device)
on_cpu = config.apply_on_cpu() if device.type == 'cpu' else {}
rank, world, _, device = devices.join_processes(device, backend)
main = rank == 0
torch.set_float32_matmul_precision('high')  # TF32 where fp32 matrices are multiplied on a GPU
bar = None


def log_line(message):
    """A line for people: from rank 0 only, above the progress bar."""
    if main and bar:
        bar.write(message)
    elif main:
        print_line(message)


log_line(config.echo())
if on_cpu:
    changes = ', '.join(f'{key}={value}' for key, value in on_cpu.items())
    log_line(textwrap.fill(f'on the CPU: {changes}', WIDTH, subsequent_indent='  '))

# -------------------------------------------------------------------------------------------------
# settings, checked before anything is written
check_ranges(config)
out = Path(out_dir)
if init_from == 'scratch':
    kind_there = native.kind_in(out)
    if kind_there not in (None, attention):
        raise UserError(
            f"--out_dir={out_dir} holds a model of kind '{kind_there}', not '{attention}': "
            'name another folder, or remove it'
        )

# -------------------------------------------------------------------------------------------------
# data and model


@dataclass
class RunState:
    step: int = 0
    best: float = math.inf  # validation loss
    best_step: int = 0
    seconds: float = 0.0  # of earlier processes


if main:
    token_files.prepare_if_missing(dataset)
if world > 1:
    dist.barrier()
meta = token_files.read_meta(token_files.find(dataset))
torch.manual_seed(seed)
run = RunState()
source = {}  # the checkpoint that the run begins with
source_path = init_from
tokenizer = None  # of a model that has its own
free_settings = {'dropout', 'dropout_in', 'kernel'}  # they leave a checkpoint's weights alone
changes = dict(dropout=dropout, dropout_in=dropout_in, kernel=kernel)
if init_from == 'scratch':
    model = native.new_model(attention, config, config.given, meta['vocab_size'])
elif init_from == 'resume':
    last = out / 'last.pt'
    if not os.path.exists(last):
        raise UserError(
            f'there is nothing to resume: {last} is missing; train with --init_from=scratch first'
        )
    source = native.load(last)
    source_path = last
    if not source.keys() >= RESUMABLE:
        raise UserError(
            f'{last} holds no state to resume, only weights: '
            f'go on from them with --init_from={last}'
        )
    model = native.build(source, **changes)
    run = RunState(source['step'], source['best_val_loss'], source['best_step'], source['seconds'])
else:
    loaded = load_model(init_from, **changes)
    model, source, tokenizer = loaded.model, loaded.checkpoint, loaded.tokenizer
    source_path = loaded.path
    free_settings.add('block_size')
    if tokenizer:
        log_line(
            f'{init_from} has its own tokenizer.json, {dataset} holds tokens of '
            f"'{meta['tokenizer']}': unless they are the same, it starts from nonsense"
        )
if init_from != 'scratch':
    known = source.get('meta', meta)
    if any(known.get(key) != meta.get(key) for key in ('tokenizer', 'chars')):
        raise UserError(
            f'{source_path} was trained on other tokens than {dataset} has: '
            'train on a dataset with its characters'
        )
    native.check_given(model, config, config.given, source_path, free=free_settings)
    if 'block_size' not in config.given:
        config['block_size'] = block_size = model.config.block_size
if block_size != model.config.block_size:
    with settings_errors():
        model.crop_block_size(block_size)
if meta['vocab_size'] > model.config.vocab_size:
    raise UserError(
        f'{dataset} has {meta["vocab_size"]} different tokens, '
        f'the model knows {model.config.vocab_size}'
    )
model.float().to(device).train()  # master weights in fp32, whatever the file held
model.stream = devices.pick_dtype(dtype, device)
with settings_errors():
    model.check_kernel(device)
data = Dataset(token_files.find(dataset), block_size, seed, device, rank, world)
teacher_model = None
if teacher:
    teacher_model = load_model(teacher, dropout=0.0, kernel=kernel).model
trainer = Trainer(config, model, data, teacher_model)
if init_from == 'resume':
    trainer.load_state(source)
conversion = source.get('conversion')  # how a converted model was made
source = None  # its moments and weights are in use now

kind, commit = native.kind_of(model), devices.commit()
tokens_per_step = gradient_accumulation_steps * batch_size * block_size
peak_flops = devices.peak_flops(device, model.stream) * world
stream_dtype = str(model.stream).removeprefix('torch.')
log_line(
    f'{kind.upper()}, {model.num_params() / 1e6:.2f}M parameters, cache '
    f'{model.cache_bytes_per_token():,} bytes a token (bf16), {devices.describe(device)}, '
    f'{stream_dtype}\ntext: {meta["source"]}; {tokens_per_step:,} tokens a step'
)
if compile:
    log_line('compiling in the first step: about a minute, once (--compile=False leaves it out)')
if eval_only:
    log_line(f'val loss {trainer.evaluate():.4f} nats')
    if world > 1:
        dist.destroy_process_group()
    sys.exit()

# -------------------------------------------------------------------------------------------------
# outputs of the run


def seconds():
    """Seconds of this run so far, those of earlier processes too."""
    return round(run.seconds + time.perf_counter() - started, 3)


def log_event(event, **numbers):
    """Write one line of log.jsonl, flushed; the same numbers go to wandb."""
    if not main:
        return
    try:
        log_file.write(json.dumps(dict(event=event, **numbers)) + '\n')
        log_file.flush()
    except OSError as error:
        raise UserError(f'cannot write {out}/log.jsonl: {error.strerror}') from None
    if wandb_log:
        scalars = {key: value for key, value in numbers.items() if isinstance(value, (int, float))}
        wandb.log({f'{event}/{key}': value for key, value in scalars.items()}, step=run.step)


def step_line(loss):
    """Return the line of a step, with the speed once that is measured."""
    line = f'step {run.step:6d}/{max_iters} | loss {loss:.4f}'
    if speed:
        left = (max_iters - run.step) * tokens_per_step / speed / 60
        line += f' | {speed / 1e3:,.1f}k tok/s | {left:.1f} min left'
    return line


def check_loss(value):
    """A run whose loss is no number has failed: it ends here, before it saves anything."""
    if not math.isfinite(value):
        saved = ''
        if (out / 'last.pt').exists():
            saved = f'; {out}/last.pt holds an earlier state'
        sys.exit(f'error: the loss is {value} at step {run.step}: lower the learning rates{saved}')


def checkpoint_facts():
    facts = dict(
        kind=kind,
        model_args=native.model_args(model),
        step=run.step,
        best_val_loss=run.best,
        best_step=run.best_step,
        meta=meta,
        config=dict(config),
        commit=commit,
        seconds=seconds(),
    )
    if conversion is not None:
        facts['conversion'] = conversion
    return facts


def save_weights(name):
    """Write the weights to use, averaged if they are, to out_dir/name."""
    with trainer.averaged():
        native.save(out / name, checkpoint_facts() | dict(model=model.state_dict()))


def save_state():
    """Write all that a resumed run needs to out_dir/last.pt."""
    state = dict(model=model.state_dict()) | trainer.state()
    native.save(out / 'last.pt', checkpoint_facts() | state)


def start_wandb():
    try:
        import wandb
    except ImportError:
        raise UserError('--wandb_log=True needs wandb: pip install wandb') from None
    try:
        wandb.init(project=wandb_project, name=wandb_run_name or out.name, config=dict(config))
    except wandb.Error as error:
        raise UserError(
            f'wandb does not start ({error}): run `wandb login`, set WANDB_MODE=offline, '
            'or leave --wandb_log out'
        ) from None
    return wandb


def open_log():
    """Make out_dir ready, an earlier run moved aside, and return its log.jsonl to write to."""
    log_path = out / 'log.jsonl'
    if tokenizer:
        for file in tokenizer.files:
            if not (out / file.name).exists():
                shutil.copyfile(file, out / file.name)
    if init_from != 'resume':
        if native.set_aside(out):
            log_line(f'{out_dir} held an earlier run: it is now in {out_dir}/previous')
        return open(log_path, 'w')
    if log_path.exists():  # a crash may have cut its last line short
        os.truncate(log_path, log_path.read_bytes().rfind(b'\n') + 1)
    return open(log_path, 'a')


if main:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f'cannot write to --out_dir={out_dir}: {error.strerror}') from None
    run_lock = lock_run_folder(out)
    if wandb_log:
        wandb = start_wandb()
    try:
        log_file = open_log()
    except OSError as error:
        raise UserError(f'cannot write to --out_dir={out_dir}: {error.strerror}') from None
    if sys.stderr.isatty():
        from tqdm import tqdm

        bar = tqdm(
            total=max_iters, initial=run.step, unit='step', dynamic_ncols=True, smoothing=0.1
        )
if init_from == 'resume':
    log_event('resume', step=run.step)
else:
    log_event(
        'settings',
        config=dict(config),
        kind=kind,
        params=model.num_params(),
        commit=commit,
        world=world,
        data=dict(name=dataset, source=meta['source'], tokenizer=meta['tokenizer']),
        device=devices.describe(device),
        dtype=stream_dtype,
        torch=torch.__version__,
        cache_bytes_per_token=model.cache_bytes_per_token(),
    )
steps_to_keep = native.steps_to_keep(keep_checkpoints, max_iters)
if main and run.step == 0 and 0 in steps_to_keep:
    save_weights(native.step_name(0))

signals = devices.Signals()  # SIGTERM, SIGUSR1 and Ctrl-C end the run after its step, resumably

# -------------------------------------------------------------------------------------------------
# the loop
first_step, speed_from = run.step + 1, run.step + WARMUP_STEPS
train_seconds, timed_steps = 0.0, 0  # without evaluations and checkpoints
speed = 0.0  # tokens a second
mark = None  # (time, step) after the last pause
last_line = 0.0  # the time of the last step's line
stop = 'max_iters reached' if run.step >= max_iters else ''
while not stop:
    loss = trainer.update(run.step)
    run.step += 1
    ending = run.step >= max_iters
    logging = run.step % log_interval == 0 or ending
    evaluating = run.step % eval_interval == 0 or ending
    keeping = run.step in steps_to_keep
    stopped_alone = world == 1 and signals.name
    starting = run.step in (first_step, speed_from)
    if not (logging or evaluating or keeping or starting or stopped_alone):
        if bar:
            bar.update(1)
        continue

    # Here, and only here, the processes wait for the device and agree on whether to go on.
    late = max_minutes > 0 and time.perf_counter() - started > 60 * max_minutes
    wants_stop = loss.new_tensor(float(bool(signals.name) or late))
    total = torch.stack([loss.float(), wants_stop])
    if world > 1:
        dist.all_reduce(total)
    lossf, stop_votes = total[0].item() / world, total[1].item()
    check_loss(lossf)
    if mark:
        train_seconds += time.perf_counter() - mark[0]
        timed_steps += run.step - mark[1]
        speed = timed_steps * tokens_per_step / train_seconds
    if logging:
        log_event(
            'train',
            step=run.step,
            tokens=run.step * tokens_per_step,
            seconds=seconds(),
            train_seconds=round(train_seconds, 3),
            loss=lossf,
            lr=learning_rate * get_lr_share(trainer.s, run.step - 1),
            tok_per_s=round(speed),
            mfu=model.estimate_mfu(speed, peak_flops) if math.isfinite(peak_flops) else None,
        )
        if bar:
            bar.set_postfix_str(
                f'loss {lossf:.4f}, best val {run.best:.4f}, {speed / 1e3:,.1f}k tok/s',
                refresh=False,
            )
    line_due = run.step == first_step or run.step % (10 * log_interval) == 0
    if logging and time.perf_counter() - last_line > SECONDS_BETWEEN_LINES:
        line_due = True
    if line_due and not bar:
        log_line(step_line(lossf))
        last_line = time.perf_counter()
    if ending:
        stop = 'max_iters reached'
    elif stop_votes:
        limit = 'max_minutes' if max_minutes else 'a signal'
        stop = f'stopped by {signals.name or limit}'
    if evaluating:
        val_loss = trainer.evaluate()
        check_loss(val_loss)
        improved = val_loss < run.best
        if improved:
            run.best, run.best_step = val_loss, run.step
        log_event(
            'eval',
            step=run.step,
            tokens=run.step * tokens_per_step,
            seconds=seconds(),
            train_seconds=round(train_seconds, 3),
            val_loss=val_loss,
            train_loss=lossf,
        )
        remark = ' (best so far)' if improved else ''
        log_line(f'step {run.step:6d} | val loss {val_loss:.4f}{remark} | {seconds():.1f} s')
        if main and (improved or always_save_checkpoint):
            save_weights('ckpt.pt')
        if target_loss and val_loss <= target_loss:
            stop = f'target_loss reached: {val_loss:.4f}'
    if main and keeping:
        save_weights(native.step_name(run.step))
    if main and (run.step % eval_interval == 0 or stop):
        save_state()
    if run.step >= speed_from:
        mark = (time.perf_counter(), run.step)
    if bar:
        bar.update(1)

# -------------------------------------------------------------------------------------------------
# the end


def write_sample():
    """Print a text of the trained model."""
    codec = Tokenizer(meta)
    learned = model.config.pos == 'learned'
    memory = Cache.of(model.eval(), 1, block_size, static=device.type == 'cuda', kernel='torch')
    length = min(sample_tokens, block_size) if learned else sample_tokens
    with torch.compiler.set_stance('force_eager'), trainer.averaged():
        tokens = generate(
            model,
            [codec.encode('\n')],
            length,
            cache=memory,
            temperature=0.8,
            top_k=200,
            vocab_size=codec.vocab_size,
        )
        text = codec.decode([token.item() for token in tokens]).strip()
    log_line(f'--- a sample ---\n{text}\n---')


def draw_curve():
    from nanomla.core.figures import curve

    curve(out / 'log.jsonl', out / 'curve.png')


signals.ignore()  # a late one must not kill what has ended well
if bar:
    bar.close()
    bar = None
if main:
    memory_used = peak_memory(device)
    halted = stop.startswith('stopped')
    log_event(
        'end',
        step=run.step,
        why=stop,
        best_val_loss=run.best if run.best_step else None,
        best_step=run.best_step,
        seconds=seconds(),
        train_seconds=round(train_seconds, 3),
        tok_per_s=round(speed),
        peak_memory=memory_used,
    )
    if sample_tokens and not halted:
        try:
            write_sample()
        except UserError as error:
            log_line(f'no sample: {error}')
    try:
        draw_curve()
    except UserError as error:
        log_line(f'no picture: {error}')
    log_line(
        f'{stop} | best val loss {run.best:.4f} at step {run.best_step} | {seconds():.0f} s | '
        f'{speed:,.0f} tok/s | peak memory {memory_used / 2**30:.2f} GiB\npicture: {out}/curve.png'
    )
    if halted:
        words = [word for word in sys.argv[1:] if not word.startswith('--init_from')]
        log_line(f'go on with: python train.py {shlex.join(words)} --init_from=resume')
    else:
        print_after_training(config, model)
    run_lock.release()
if world > 1:
    dist.destroy_process_group()
