"""
Train a GPT-2, Llama-like or MLA model from scratch, or go on training one.

    python train.py config/train_shakespeare_mla.py
    python train.py config/train_gpt2.py --batch_size=32 --compile=False
    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2_mla.py

A run writes out_dir/ckpt.pt (its best weights), last.pt (to resume from), log.jsonl and curve.png.
--init_from=auto resumes where there is a last.pt. What an earlier run has left in out_dir moves to
out_dir/previous when a new one begins.
"""

# output
out_dir = 'out'
init_from = 'scratch'  # scratch | resume | auto (resume, else scratch) | gpt2* | a checkpoint
eval_interval = 2000  # steps between evaluations; each one also writes the checkpoints
eval_iters = 200  # batches of an evaluation; a validation split that is smaller is scored whole
eval_only = False  # evaluate once and stop
log_interval = 10  # steps between lines of the log
log_max_logits = False  # log the largest attention logit of each head as well
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
muon_heads = False  # and each head's rows of W^Q, W^UK, ... (GLM-5)
qk_clip = 0.0  # largest attention logit of a head (Kimi K2: 100), bounded by QK-Clip; 0 = do not
weight_decay = 0.1
beta1 = 0.9
beta2 = 0.95
grad_clip = 1.0  # largest norm of the gradient; 0 = do not clip
ema_decay = 0.0  # evaluate and keep a moving average of the weights; 0 = none
train_only = ''  # words with commas: train only parameters with one in their name; '' = all
lora_rank = 0  # train adapters of that rank alone, merged in what is saved; 0 = none
lora_targets = 'attention'  # attention | all (MLP, too) | names of matrices as in transformers
teacher = ''  # a checkpoint whose predictions to learn; '' = none
distill = 0.5  # share of the loss that is KL(teacher, model), not cross-entropy
distill_hidden = 0.0  # weight of how far each block's output is from the teacher's
teacher_cache = ''  # a folder for the teacher's predictions, which later runs read; '' = none
teacher_top_k = 32  # so many most probable tokens it holds of each prediction
# schedule
max_iters = 600000  # steps
decay_lr = True
schedule = 'cosine'  # cosine | wsd (warmup, stable, linear decay): get_lr_share in trainer.py
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

# Before the imports, so that --help is quick. Fields of configs in attentions/ are settings, too.
config = configure(globals(), classes='attentions')

# -------------------------------------------------------------------------------------------------
import json
import math
import os
import sys
import textwrap
import time
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist

from nanomla.adapters import lora
from nanomla.checkpoints import native
from nanomla.checkpoints.load import check_tokens, dataset_tokenizer, load_model
from nanomla.checkpoints.tokenizer import FILES as TOKENIZER_FILES
from nanomla.core import devices, figures, files, token_files
from nanomla.core.checks import settings_errors
from nanomla.core.files import print_line
from nanomla.core.timing import peak_memory
from nanomla.core.tokenizers import Tokenizer, opening
from nanomla.inference.cache import Cache
from nanomla.inference.generate import generate
from nanomla.training import launch
from nanomla.training.batches import Dataset
from nanomla.training.next_steps import print_after_training
from nanomla.training.run import folder as run_folder
from nanomla.training.run.folder import RunState
from nanomla.training.run.saving import BackgroundSaver
from nanomla.training.teacher.cache import TeacherCache
from nanomla.training.trainer import Trainer, check_ranges, check_teacher, get_lr_share

WARMUP_STEPS = 5  # they compile, record and allocate: speed is measured after them
SECONDS_BETWEEN_LINES = 10  # at most, where steps are slow and there is no progress bar
WIDTH = 100  # columns of a line

started = time.monotonic()
rank, world = devices.rank_and_world()
main = rank == 0
bar = None


def log_line(message):
    """A line for people: from rank 0 only, above the progress bar."""
    if main and bar:
        bar.write(message)
    elif main:
        print_line(message)


def add_adapters():
    """Freeze the model and add adapters, which alone are trained."""
    if from_scratch:
        raise UserError('--lora_rank adapts a trained model: name one by --init_from')
    needed = dict(train_only='', ema_decay=0.0, optimizer='adamw', qk_clip=0.0)
    for name, value in needed.items():
        if config[name] != value:
            raise UserError(f'--lora_rank does not go with --{name}={config[name]}')
    settings = lora.LoraSettings(lora_rank, alpha=lora_rank, targets=lora_targets)
    lora.adapt(model, 'lora', settings)
    trained, total = (count / 1e6 for count in lora.count(model))
    log_line(f'LoRA of rank {lora_rank} trains {trained:.2f}M of {total:.2f}M parameters')


def open_predictions(teacher_model):
    """Return the teacher's predictions in teacher_cache; those that are missing are made first."""
    if teacher_model:
        check_teacher(config, model, teacher_model)
        teacher_model.stream = model.stream
    top_k_is_given = 'teacher_top_k' in config.given
    cache = TeacherCache(config, data, teacher_model, model.config.vocab_size, top_k_is_given)
    if not cache.is_complete:
        cache.complete(device, compile)
    log_line(cache.description)
    return cache


# -------------------------------------------------------------------------------------------------
# where the run begins: from nothing, from another model, or with the state in out_dir/last.pt
out = Path(out_dir)
last = out / 'last.pt'
run_lock = None
if main and not eval_only and os.path.isdir(out):
    run_lock = run_folder.lock_run_folder(out)
    run_folder.finish_move(out)
# `auto` also resumes where an earlier attempt of this launch (torchrun, SLURM) left a last.pt.
resuming = run_folder.resumes(init_from, config.given, last, native.launch_of(last))
from_scratch = init_from in ('scratch', 'auto') and not resuming
saved = {}
if resuming:
    saved = native.peek(last)
    # The settings of the run, into `config` and into the names of this script.
    config.adopt(saved.get('config', {}), last, but=run_folder.NOT_OF_A_RUN)

# -------------------------------------------------------------------------------------------------
# settings, checked before anything is written
device = devices.pick_device(device)
on_cpu = config.apply_on_cpu() if device.type == 'cpu' else {}
check_ranges(config)
log_line(config.echo())
if on_cpu:
    changes = ', '.join(f'{key}={value}' for key, value in on_cpu.items())
    log_line(textwrap.fill(f'on the CPU: {changes}', WIDTH, subsequent_indent='  '))
asked = (batch_size, gradient_accumulation_steps)
batch_size, gradient_accumulation_steps = launch.share_batch(*asked, world)
config |= dict(batch_size=batch_size, gradient_accumulation_steps=gradient_accumulation_steps)
if (batch_size, gradient_accumulation_steps) != asked:
    log_line(
        f'{world} processes share the {math.prod(asked)} sequences of a step: batch_size='
        f'{batch_size}, gradient_accumulation_steps={gradient_accumulation_steps}'
    )
if from_scratch:
    kind_there = native.kind_in(out)
    if kind_there not in (None, attention):
        raise UserError(
            f"--out_dir={out_dir} holds a model of kind '{kind_there}', not '{attention}': "
            'name another folder, or remove it'
        )

# -------------------------------------------------------------------------------------------------
# data and model

if config.adopted('dataset'):
    # A checkpoint must not start a prepare.py: a dataset that last.pt names has to be there.
    token_files.require(dataset, str(last), '--dataset')
else:
    token_files.prepare_if_missing(dataset)  # may take longer than processes wait for one another
rank, world, _, device = devices.join_processes(device, backend)
torch.set_float32_matmul_precision('high')  # TF32 where fp32 matrices are multiplied on a GPU
if not devices.all_agree((resuming, saved.get('step'), saved.get('run_id')), world):
    raise UserError(f'not all processes see the same {last}: keep out_dir where all hosts see it')
meta = token_files.read_meta(token_files.find(dataset))
tokens_per_step = gradient_accumulation_steps * batch_size * block_size
torch.manual_seed(seed)
run = RunState(run_folder.new_run_id())
source = {}  # the checkpoint that the run begins with
source_path = init_from
pretrained = False  # whether others trained the weights that the run begins with
tokenizer = dataset_tokenizer(token_files.find(dataset), meta)  # a tokenizer.json, or None
free_settings = {'dropout', 'dropout_in', 'kernel'}  # they leave a checkpoint's weights alone
changes = dict(dropout=dropout, dropout_in=dropout_in, kernel=kernel)
if resuming:
    source = native.load(last)
    source_path = last
    run = RunState.of(source, tokens_per_step)
    run_folder.check_one_run(out, run.run_id)
    if not token_files.same_tokens(source.get('meta', meta), meta):
        raise UserError(f'{last} was trained on other tokens than {dataset} has')
    model = native.build(source, **changes)
    pretrained = source.get('pretrained', False)
elif from_scratch:
    model = native.new_model(attention, config, config.given, meta['vocab_size'])
else:
    loaded = load_model(init_from, **changes)
    model, source = loaded.model, loaded.checkpoint
    tokenizer = loaded.tokenizer or tokenizer
    source_path = loaded.path
    free_settings.add('block_size')
    check_tokens(loaded, meta, dataset)
    pretrained = loaded.trained
if not from_scratch:
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
params = model.num_params()  # adapters are merged in what is saved
if lora_rank:
    add_adapters()
data = Dataset(token_files.find(dataset), block_size, seed, device, rank, world)
teacher_model = None
if teacher:
    loaded_teacher = load_model(teacher, dropout=0.0, kernel=kernel)
    check_tokens(loaded_teacher, meta, dataset)
    teacher_model = loaded_teacher.model
predictions = None
if teacher_cache:
    predictions = open_predictions(teacher_model)
    teacher_model = loaded_teacher = None
trainer = Trainer(config, model, data, teacher_model, predictions)
if resuming:
    if lora_rank:
        lora.load_adapter_state(model, source.get('adapters', {}), last)
    trainer.load_state(source)
    log_line(f'resumed at step {run.step} of {max_iters} from {last}')
    if changes := config.differences(saved.get('config', {}), but=run_folder.NOT_OF_A_RUN):
        log_line(f'settings that differ from it: {changes}')
conversion = source.get('conversion')  # how a converted model was made
source = saved = None  # free their memory: weights and moments were copied

kind, commit = native.kind_of(model), devices.commit()
peak_flops = devices.peak_flops(device, model.stream) * world
stream_dtype = str(model.stream).removeprefix('torch.')
log_line(
    f'{model.config.label}, {params / 1e6:.2f}M parameters, cache '
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
    return round(run.seconds + time.monotonic() - started, 3)


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


def logit_numbers():
    """Return the largest attention logit of all, and of every head of every layer."""
    logits = trainer.largest_logits(run.step - 1)
    layers = [[float(f'{logit:.5g}') for logit in heads] for heads in logits.tolist()]
    return dict(max_logit=max(map(max, layers)), max_logits=layers)


def step_line(loss, max_logit=None):
    """Return the line of a step, with the speed once that is measured."""
    line = f'step {run.step:6d}/{max_iters} | loss {loss:.4f}'
    if max_logit is not None:
        line += f' | max logit {max_logit:.1f}'
    if speed:
        left = (max_iters - run.step) * tokens_per_step / speed / 60
        line += f' | {speed / 1e3:,.1f}k tok/s | {left:.1f} min left'
    return line


def check_loss(value):
    """End the run with an error where the loss is NaN or infinite, before anything is saved."""
    if not math.isfinite(value):
        saved = ''
        if (out / 'last.pt').exists():
            saved = f'; {out}/last.pt holds an earlier state'
        sys.exit(f'error: the loss is {value} at step {run.step}: lower the learning rates{saved}')


def checkpoint(**tensors):
    """Return the content of a checkpoint: these tensors, and the facts of the run."""
    facts = dict(
        kind=kind,
        model_args=native.model_args(model),
        meta=meta,
        config=dict(config),
        commit=commit,
        launch=run_folder.launch_id(),
    )
    if conversion is not None:
        facts['conversion'] = conversion
    if pretrained:
        facts['pretrained'] = True
    return facts | asdict(run) | dict(seconds=seconds()) | tensors


def weights():
    """Return the state dict to use: with adapters merged, or averaged, where the run has those."""
    if lora_rank:
        return lora.merged_state(model)
    return trainer.weights()


def resumable():
    """Return the content of last.pt."""
    if lora_rank:
        adapters = lora.adapter_state(model)
        return checkpoint(model=weights(), adapters=adapters, **trainer.state())
    return checkpoint(model=model.state_dict(), **trainer.state())


def start_wandb():
    try:
        import wandb
    except ImportError:
        raise UserError('--wandb_log=True needs wandb: pip install wandb') from None
    try:
        wandb.init(
            project=wandb_project,
            name=wandb_run_name or out.name,
            config=dict(config),
            id=run.run_id,
            resume='allow',  # a resumed run continues its curves
        )
    except wandb.Error as error:
        raise UserError(
            f'wandb does not start ({error}): run `wandb login`, set WANDB_MODE=offline, '
            'or leave --wandb_log out'
        ) from None
    return wandb


def copy_tokenizer():
    """Copy the model's own tokenizer to out_dir. Return the names of the copied files."""
    missing = [file for file in tokenizer.files if not (out / file.name).exists()]
    for file in missing:
        files.copy_file(file, out / file.name)
    return [file.name for file in missing]


copied = []
if main:
    with files.writing(f'to --out_dir={out_dir}'):
        out.mkdir(parents=True, exist_ok=True)
    run_lock = run_lock or run_folder.lock_run_folder(out)
    if wandb_log:
        wandb = start_wandb()
    if not resuming:
        with files.writing(f'to --out_dir={out_dir}'):
            earlier = run_folder.set_aside(out, also=TOKENIZER_FILES)
        if earlier:
            log_line(f'{out_dir} held an earlier run: it is now in {earlier}')
    if tokenizer:
        copied = copy_tokenizer()
    log_file = files.appending(out / 'log.jsonl')
    if sys.stderr.isatty():
        from tqdm import tqdm

        bar = tqdm(
            total=max_iters, initial=run.step, unit='step', dynamic_ncols=True, smoothing=0.1
        )
if resuming:
    log_event('resume', step=run.step, run_id=run.run_id)
else:
    log_event(
        'settings',
        run_id=run.run_id,
        copied=copied,
        config=dict(config),
        kind=kind,
        params=params,
        commit=commit,
        world=world,
        data=dict(name=dataset, source=meta['source'], tokenizer=meta['tokenizer']),
        device=devices.describe(device),
        dtype=stream_dtype,
        torch=torch.__version__,
        cache_bytes_per_token=model.cache_bytes_per_token(),
    )
signals = devices.Signals()  # SIGTERM, SIGUSR1 and Ctrl-C end the run after its step, resumably
deadline = started + 60 * max_minutes if max_minutes else math.inf
vote = devices.StopVote(signals, world, deadline)
vote_in_evaluation = devices.StopVote(signals, world, deadline)
saver = BackgroundSaver(native.save)
to_save = {}  # path -> checkpoint, copied and written at the end of a step


def stop_in_evaluation(batch):
    return vote_in_evaluation.due(batch) and vote_in_evaluation.take(batch)


def evaluate(train_loss=None):
    """
    Score the validation split, log it and save the best weights.

    Returns why the run is to stop, '' where it is not. An evaluation that a signal cuts short is
    repeated when the run is resumed.
    """
    vote_in_evaluation.restart(0)
    val_loss = trainer.evaluate(stop_in_evaluation)
    if val_loss is None:
        return f'stopped by {vote_in_evaluation.reason}'
    check_loss(val_loss)
    run.evaluated_step = run.step
    improved = val_loss < run.best_val_loss
    if improved:
        run.best_val_loss, run.best_step = val_loss, run.step
    log_event(
        'eval',
        step=run.step,
        tokens=run.tokens,
        seconds=seconds(),
        train_seconds=round(run.train_seconds, 3),
        val_loss=val_loss,
        train_loss=train_loss,
    )
    remark = ' (best so far)' if improved else ''
    log_line(f'step {run.step:6d} | val loss {val_loss:.4f}{remark} | {seconds():.1f} s')
    if improved or always_save_checkpoint:
        to_save[out / 'ckpt.pt'] = checkpoint(model=weights())
    if target_loss and val_loss <= target_loss:
        return f'target_loss reached: {val_loss:.4f}'
    return ''


def save():
    """Copy what is to be saved. A background thread writes it, in the order of the calls."""
    if main and to_save:
        saver.save(to_save)
    to_save.clear()


# -------------------------------------------------------------------------------------------------
# the loop
steps_to_keep = native.steps_to_keep(keep_checkpoints, max_iters)
if run.step == 0 and 0 in steps_to_keep:
    to_save[out / native.step_name(0)] = checkpoint(model=weights())
    save()
first_step, speed_from = run.step + 1, run.step + WARMUP_STEPS
timed_seconds, timed_steps = 0.0, 0  # without evaluations
speed = 0.0  # tokens a second
mark = None  # (time, step) since which training is timed; set from step speed_from on
last_line = 0.0  # when a step was last printed
stop = ''
# A signal may have ended the evaluation of this very step.
if resuming and run.evaluated_step < run.step and run.step % eval_interval == 0:
    stop = evaluate()
    to_save[last] = resumable()
    save()
if run.step >= max_iters:
    stop = stop or 'max_iters reached'
vote.restart(run.step)
while not stop:
    loss = trainer.update(run.step)
    run.step += 1
    run.tokens += tokens_per_step
    if bar:
        bar.update(1)
    ending = run.step >= max_iters
    logging = run.step % log_interval == 0 or ending
    evaluating = run.step % eval_interval == 0 or ending
    keeping = run.step in steps_to_keep
    reporting = logging or evaluating or keeping or run.step in (first_step, speed_from)
    if not (reporting or vote.due(run.step)):
        continue

    # Here, and only here, the processes wait for the device and agree on whether to go on.
    loss = loss.float()
    if world > 1:
        dist.all_reduce(loss)
    lossf = loss.item() / world
    check_loss(lossf)
    saver.check()
    if main and run.step == first_step:  # the optimizers have their moments now
        saver.reserve(resumable())
    if vote.take(run.step):
        stop = f'stopped by {vote.reason}'
    if not (reporting or stop):
        continue
    if mark:
        passed = time.monotonic() - mark[0]
        run.train_seconds += passed
        timed_seconds += passed
        timed_steps += run.step - mark[1]
        speed = timed_steps * tokens_per_step / timed_seconds
    logits = {}
    if logging and log_max_logits:
        logits = logit_numbers()
    if logging:
        log_event(
            'train',
            step=run.step,
            tokens=run.tokens,
            seconds=seconds(),
            train_seconds=round(run.train_seconds, 3),
            loss=lossf,
            lr=learning_rate * get_lr_share(config, run.step - 1),
            tok_per_s=round(speed),
            mfu=model.estimate_mfu(speed, peak_flops) if math.isfinite(peak_flops) else None,
            **logits,
        )
        if bar:
            bar.set_postfix_str(
                f'loss {lossf:.4f}, best val {run.best_val_loss:.4f}, {speed / 1e3:,.1f}k tok/s',
                refresh=False,
            )
    line_due = run.step == first_step or run.step % (10 * log_interval) == 0
    if logging and time.monotonic() - last_line > SECONDS_BETWEEN_LINES:
        line_due = True
    if line_due and not bar:
        log_line(step_line(lossf, logits.get('max_logit')))
        last_line = time.monotonic()
    if ending:
        stop = 'max_iters reached'
    if evaluating:
        stop = evaluate(lossf) or stop
    if keeping:
        to_save[out / native.step_name(run.step)] = checkpoint(model=weights())
    if run.step % eval_interval == 0 or stop:
        to_save[last] = resumable()
    save()
    if run.step >= speed_from:
        mark = (time.monotonic(), run.step)
    vote.restart(run.step)
if main:
    saver.close()

# -------------------------------------------------------------------------------------------------
# the end


def write_sample():
    """Print a text of the trained model."""
    codec = tokenizer or Tokenizer(meta)
    learned = model.config.pos == 'learned'
    cache = Cache.of(model.eval(), 1, block_size, static=device.type == 'cuda', kernel='torch')
    length = min(sample_tokens, block_size) if learned else sample_tokens
    with torch.compiler.set_stance('force_eager'), trainer.averaged():
        tokens = generate(
            model,
            [opening(codec)],
            length,
            cache=cache,
            temperature=0.8,
            top_k=200,
            vocab_size=codec.vocab_size,
        )
        text = codec.decode([token.item() for token in tokens]).strip()
    log_line(f'--- a sample ---\n{text}\n---')


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
        best_val_loss=run.best_val_loss if run.best_step else None,
        best_step=run.best_step,
        seconds=seconds(),
        train_seconds=round(run.train_seconds, 3),
        tok_per_s=round(speed),
        peak_memory=memory_used,
    )
    if sample_tokens and not halted:
        if lora_rank:
            lora.merge(model)
        try:
            write_sample()
        except UserError as error:
            log_line(f'no sample: {error}')
    rate = ''
    if speed:  # a run of a few steps has none
        rate = f'{speed:,.0f} tok/s | '
    log_line(
        f'{stop} | best val loss {run.best_val_loss:.4f} at step {run.best_step} | '
        f'{seconds():.0f} s | {rate}peak memory {memory_used / 2**30:.2f} GiB'
    )
    with figures.if_possible(log_line):
        figures.curve(out / 'log.jsonl', out / 'curve.png')
        log_line(f'picture: {out}/curve.png')
    if halted:
        log_line(f'go on with: {launch.resume_command(out_dir)}')
    else:
        print_after_training(config, model)
    run_lock.release()
if world > 1:
    dist.barrier()  # where one process ends with a code, torchrun stops the others
    dist.destroy_process_group()
if stop.startswith('stopped'):
    sys.exit(launch.stopped_code())
