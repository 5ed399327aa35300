"""
One training step, as fast as it goes while it can still be read: batch -> loss -> backward -> clip
-> optimizer. train.py drives it, bench.py times it.

What makes it fast: weights stay fp32 and are cast where they are used, the residual stream is bf16;
every block is the same code, so one is compiled and serves all; nothing in a step waits for the
device; small models on one GPU record the whole step as a CUDA graph.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from model import GPT
from nanomla.core import devices
from nanomla.core.checks import check_choice, check_range, split_list
from nanomla.core.configurator import UserError
from nanomla.core.cuda_graph import GraphedStep
from nanomla.training.batches import Dataset
from nanomla.training.loss import BatchLoss
from nanomla.training.optim import (
    MovingAverage,
    OptimizerSettings,
    load_moments,
    make_optimizers,
    set_rate,
)
from nanomla.training.stability import LogitRecord, check_qk_clip, clip_logits
from nanomla.training.teacher.cache import Predictions, TeacherCache
from nanomla.training.teacher.loss import CachedDistillationLoss, DistillationLoss

EAGER_STEPS = 3  # ordinary steps before one is recorded: everything is allocated then

AT_LEAST_1 = """batch_size block_size gradient_accumulation_steps eval_interval eval_iters
    log_interval max_iters"""
AT_LEAST_0 = """keep_checkpoints warmup_iters lr_decay_iters min_lr muon_lr muon_up weight_decay
    grad_clip qk_clip sample_tokens distill_hidden lora_rank max_minutes target_loss"""
SHARES_BELOW_1 = 'beta1 beta2 ema_decay'
SHARES = 'distill cooldown'


def check_ranges(settings: dict) -> None:
    """Raise a UserError for a number or word of train.py's settings that cannot be meant."""
    for name in AT_LEAST_1.split():
        check_range(name, settings[name], least=1)
    for name in AT_LEAST_0.split():
        check_range(name, settings[name], least=0)
    for name in SHARES_BELOW_1.split():
        check_range(name, settings[name], least=0, below=1)
    for name in SHARES.split():
        check_range(name, settings[name], least=0, most=1)
    check_range('learning_rate', settings['learning_rate'], above=0)
    check_range('seed', settings['seed'], least=0, below=2**32)
    if settings['decay_lr'] and settings['min_lr'] > settings['learning_rate']:
        rate = settings['learning_rate']
        raise UserError(
            f'min_lr={settings["min_lr"]} is above learning_rate={rate}, so the rate would climb: '
            f'use --min_lr={rate / 10:g} or --decay_lr=False'
        )
    if settings['muon_heads'] and not settings['muon_split']:
        raise UserError('muon_heads=True takes symbols apart further: use --muon_split=True')
    check_choice('optimizer', settings['optimizer'], ('adamw', 'muon'))
    check_choice('schedule', settings['schedule'], ('cosine', 'wsd'))


def check_teacher(settings: dict, model: GPT, teacher: GPT) -> None:
    """Raise a UserError unless the model can learn from this teacher's predictions."""
    name, block_size = settings['teacher'], settings['block_size']
    ours, theirs = model.config, teacher.config
    if theirs.vocab_size != ours.vocab_size:
        raise UserError(
            f'--teacher={name} knows {theirs.vocab_size} tokens, the model '
            f'{ours.vocab_size}: name the model it was converted from'
        )
    if theirs.block_size < block_size:
        raise UserError(
            f'--teacher={name} reads {theirs.block_size} tokens at a time: '
            f'use --block_size={theirs.block_size} or less'
        )
    same_shape = (theirs.n_layer, theirs.n_embd) == (ours.n_layer, ours.n_embd)
    if settings['distill_hidden'] and not same_shape:
        raise UserError(
            f'--teacher={name} has {theirs.n_layer} layers of width {theirs.n_embd}, '
            f'the model {ours.n_layer} of {ours.n_embd}: use --distill_hidden=0'
        )


def get_lr_share(settings: dict, step: int) -> float:
    """Return the learning rate at `step` (from 0), a share of its peak, by train.py's settings."""
    warmup, end = settings['warmup_iters'], settings['lr_decay_iters'] or settings['max_iters']
    floor = settings['min_lr'] / settings['learning_rate']
    if not settings['decay_lr']:
        return 1.0
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if step >= end:
        return floor
    if settings['schedule'] == 'wsd':
        return floor + (1 - floor) * min(1.0, (end - step) / max(1, settings['cooldown'] * end))
    decayed = (step - warmup) / (end - warmup)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * decayed))


class Trainer:
    """
    A model, its optimizers and its data, and perhaps a teacher, another model, or its predictions.

    settings: train.py's. The model is on its device, its `stream` is set. Rank and world come from
    `data`; `group` are the processes that train it, None for all. UserError for settings that do
    not go with model, data or device.
    """

    def __init__(
        self,
        settings: dict,
        model: GPT,
        data: Dataset,
        teacher: GPT | None = None,
        predictions: TeacherCache | None = None,
        group=None,
    ):
        self.settings = settings
        self.model, self.data, self.group = model, data, group
        self.device, self.world = data.device, data.world
        check_ranges(settings)
        self.check_device()
        self.check_memory()
        if teacher is not None:
            check_teacher(settings, model, teacher)
        self.choose_parameters()
        self.teacher = None if teacher is None else teacher.to(self.device)
        self.predictions = predictions
        self.accumulation = settings['gradient_accumulation_steps'] // self.world
        self.params = [p for p in model.parameters() if p.requires_grad]
        self.optimizers = make_optimizers(
            model,
            OptimizerSettings(
                kind=settings['optimizer'],
                learning_rate=settings['learning_rate'],
                muon_lr=settings['muon_lr'],
                weight_decay=settings['weight_decay'],
                betas=(settings['beta1'], settings['beta2']),
                graph=settings['cuda_graph'],
                split=settings['muon_split'],
                heads=settings['muon_heads'],
                up=settings['muon_up'],
            ),
        )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=model.stream == torch.float16)
        self.average = None
        if settings['ema_decay']:
            self.average = MovingAverage(model, settings['ema_decay'])
        self.logits = self.make_record()
        self.batch_loss = self.make_loss()
        self.forward = self.make_forward()
        self.graphed_step = None
        if settings['cuda_graph']:
            shape = (self.accumulation, settings['batch_size'])
            self.starts = torch.zeros(shape, dtype=torch.int64, device=self.device)
            self.graphed_step = GraphedStep(
                lambda: self.step_and_clip(self.starts), warmup=EAGER_STEPS
            )

    # ---------------------------------------------------------------------------------------------
    # what fits together

    def check_device(self) -> None:
        settings, on_gpu = self.settings, self.device.type == 'cuda'
        steps = settings['gradient_accumulation_steps']
        if steps % self.world:
            raise UserError(
                f'gradient_accumulation_steps={steps} is not a multiple of the {self.world} '
                'processes'
            )
        can_record = on_gpu and self.world == 1 and self.model.stream != torch.float16
        if settings['cuda_graph'] and not (can_record and 'train' in self.data.resident):
            raise UserError(
                '--cuda_graph=True needs one CUDA GPU, bfloat16 or float32, and a dataset that '
                'fits on it: use --cuda_graph=False'
            )
        if settings['fp8_head'] and not (on_gpu and settings['fused_loss']):
            raise UserError(
                '--fp8_head=True needs a CUDA GPU and --fused_loss=True: use --fp8_head=False'
            )

    def smaller_batch(self) -> str:
        """Return what to do where memory runs out, for the end of a message."""
        return (
            f'on {self.device} with batch_size={self.settings["batch_size"]}: use a smaller one '
            '(and more gradient_accumulation_steps)'
        )

    def check_memory(self) -> None:
        """Raise a UserError where a CPU has no room for the weights, or for one batch."""
        if self.device.type != 'cpu':
            return
        settings, c = self.settings, self.model.config
        # Weights, gradients and two moments in fp32.
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        devices.check_host_memory(
            16 * trained, f'training {trained:,} parameters', 'use a smaller model'
        )
        # x and y, what each block and its MLP keep for the backward pass, and the logits.
        width = c.n_layer * (2 * c.n_embd + c.n_inner) + c.vocab_size
        tokens = settings['batch_size'] * settings['block_size']
        batch = tokens * (16 + width * self.model.stream.itemsize)
        advice = 'use a smaller one (and more gradient_accumulation_steps)'
        devices.check_host_memory(batch, f'batch_size={settings["batch_size"]}', advice)

    def choose_parameters(self) -> None:
        """Train only the parameters that --train_only names."""
        words = split_list(self.settings['train_only'])
        if words:
            for name, p in self.model.named_parameters():
                p.requires_grad_(any(word in name for word in words))
        if not any(p.requires_grad for p in self.model.parameters()):
            raise UserError(
                f'--train_only={self.settings["train_only"]}: no parameter has such a name; '
                "'attn' or 'kv_a_proj,kv_b_proj,q_proj' are words of MLA's"
            )

    def make_record(self) -> LogitRecord | None:
        """Return what tells the attention logits, where a setting needs them."""
        settings = self.settings
        if settings['qk_clip']:
            setting = f'--qk_clip={settings["qk_clip"]:g}'
            check_qk_clip(self.model, setting)
            if settings['train_only']:
                raise UserError(
                    f'{setting} moves weights that --train_only={settings["train_only"]} may not'
                )
        elif settings['log_max_logits']:
            setting = '--log_max_logits=True'
        else:
            return None
        return LogitRecord(self.model, setting, self.world, self.group)

    # ---------------------------------------------------------------------------------------------
    # the modules of a step

    def make_loss(self) -> BatchLoss:
        """Return the loss of a batch of text, its parts compiled."""
        model, fused = self.model, self.settings['fused_loss'] and self.device.type == 'cuda'
        loss = BatchLoss(model, fused=fused, fp8=self.settings['fp8_head'])
        if self.settings['compile']:
            loss.compile_parts()
            # ranks may differ from layer to layer, and each is compiled by itself
            limit = max(8, 2 * len(model.transformer.h))
            torch._dynamo.config.recompile_limit = limit
        return loss

    def make_forward(self) -> torch.nn.Module:
        """Return what is trained: that loss, with the teacher's part, on all processes."""
        settings, forward = self.settings, self.batch_loss
        if self.teacher is not None:
            self.teacher.stream = self.model.stream
            theirs = BatchLoss(self.teacher)
            shares = settings['distill'], settings['distill_hidden']
            forward = DistillationLoss(self.batch_loss, theirs, *shares)
            if settings['compile']:
                theirs.compile_parts(embedding=False)
                forward.compile_parts()
        if self.predictions is not None:
            forward = CachedDistillationLoss(self.batch_loss, settings['distill'])
            if settings['compile']:
                forward.compile_parts()
        if self.world == 1:
            return forward
        # On one host all gradients travel at once, after the backward pass: it runs faster alone
        # than beside the all-reduce.
        return DistributedDataParallel(
            forward,
            device_ids=[self.device.index] if self.device.type == 'cuda' else None,
            process_group=self.group,
            gradient_as_bucket_view=True,
            bucket_cap_mb=2**20 if devices.on_one_host() else None,
        )

    # ---------------------------------------------------------------------------------------------
    # steps

    def update(self, step: int) -> torch.Tensor:
        """
        Train on the batch of `step` (from 0): one update. Returns its mean loss, on the device and
        not waited for.
        """
        settings = self.settings
        set_rate(self.optimizers, get_lr_share(settings, step))
        # dropout, too, depends on (seed, step, rank) only
        torch.manual_seed((settings['seed'] * 1_000_003 + step) * 4099 + self.data.rank)
        micro_steps, predictions = range(self.accumulation), None
        if self.predictions is None:
            starts = [self.data.starts(step, n, settings['batch_size']) for n in micro_steps]
        else:
            batches = [self.predictions.batch(step, n) for n in micro_steps]
            starts, predictions = zip(*batches)
        starts = torch.stack(starts)
        with devices.machine_errors(self.smaller_batch()):
            if self.graphed_step:
                self.starts.copy_(starts, non_blocking=True)
                loss = self.graphed_step()
            else:
                loss = self.step_and_clip(starts, predictions)
        if self.average:
            self.average.update(step)
        return loss

    def step_and_clip(
        self, starts: torch.Tensor, predictions: Sequence[Predictions] | None = None
    ) -> torch.Tensor:
        """`one_step`, then QK-Clip by the logits of its batches, where that is asked for."""
        if not self.settings['qk_clip']:
            return self.one_step(starts, predictions)
        with self.logits.recording():
            loss = self.one_step(starts, predictions)
        clip_logits(self.model, self.logits.largest(), self.settings['qk_clip'])
        return loss

    def one_step(
        self, starts: torch.Tensor, predictions: Sequence[Predictions] | None = None
    ) -> torch.Tensor:
        """
        Forward and backward over the windows at `starts` (accumulation, B), then the update.

        predictions: the teacher's, for each micro-batch, where they are cached
        """
        total = 0
        for micro in range(self.accumulation):
            inputs = self.data.cut('train', starts[micro])
            if predictions:
                inputs = (*inputs, *predictions[micro])
            last = micro == self.accumulation - 1
            # gradients travel once a step
            together = nullcontext() if self.world == 1 or last else self.forward.no_sync()
            with together:
                loss = self.forward(*inputs) / self.accumulation
                self.scaler.scale(loss).backward()
            total = total + loss.detach()
        if self.settings['grad_clip']:
            for optimizer in self.optimizers:
                self.scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(self.params, self.settings['grad_clip'])
        for optimizer in self.optimizers:
            self.scaler.step(optimizer)
            optimizer.zero_grad(set_to_none=True)
        self.scaler.update()
        return total

    def largest_logits(self, step: int) -> torch.Tensor:
        """
        Return the largest attention logit of every layer and head, (L, H), after `update(step)`.

        With QK-Clip they are those that it saw in the step; without it, those of one micro-batch of
        text, with the weights after the step.
        """
        if self.settings['qk_clip']:
            return self.logits.largest()
        x, _ = self.data.train_batch(step, 0, self.settings['batch_size'])
        with devices.machine_errors(self.smaller_batch()):
            return self.logits.measured(x)

    @torch.no_grad()
    def evaluate(self, stopping: Callable[[int], bool] | None = None) -> float | None:
        """
        Return the mean loss in nats over the validation split: the same windows each time, shared
        by all ranks.

        stopping: asked before each batch, by its number; all ranks get the same answer. Where it is
        yes, the evaluation ends there and returns None.
        """
        self.model.eval()
        on = 'cpu' if self.device.type == 'mps' else self.device
        total = torch.zeros(2, dtype=torch.float64, device=on)
        # a quick run compiles nothing twice
        stance = 'force_eager' if self.settings['cuda_graph'] else 'default'
        batch_size, batches = self.settings['batch_size'], self.settings['eval_iters']
        failures = devices.machine_errors(self.smaller_batch())
        with failures, self.averaged(), torch.compiler.set_stance(stance):
            windows = self.data.val_batches(batch_size, most=batches * batch_size)
            for number, (x, y) in enumerate(windows):
                if stopping is not None and stopping(number):
                    self.model.train()
                    return None
                counted = (y >= 0).sum()
                loss = torch.where(counted > 0, self.batch_loss(x, y) * counted, 0)
                total += torch.stack([loss, counted]).to(total)
        if self.world > 1:
            dist.all_reduce(total, group=self.group)
        self.model.train()
        return (total[0] / total[1]).item()

    def weights(self) -> dict[str, torch.Tensor]:
        """Return the state dict to use: with the moving average of the weights, if there is one."""
        if self.average is None:
            return self.model.state_dict()
        averages = dict(zip(map(id, self.average.params), self.average.average))
        state = self.model.state_dict(keep_vars=True)  # tied weights are one parameter
        return {name: averages.get(id(t), t.detach()) for name, t in state.items()}

    def averaged(self):
        """A context in which the model holds the moving average of its weights, if it has one."""
        return self.average.swapped_in() if self.average else nullcontext()

    # ---------------------------------------------------------------------------------------------
    # resuming

    def state(self) -> dict:
        """Return what a resumed run needs beside the weights."""
        return dict(
            optimizers=[optimizer.state_dict() for optimizer in self.optimizers],
            scaler=self.scaler.state_dict(),
            average=self.average.average if self.average else None,
        )

    def load_state(self, state: dict) -> None:
        """Take over the moments of the old run; rates and decay are those of this one."""
        if len(state['optimizers']) != len(self.optimizers):
            raise UserError(
                f'{state["path"]} was trained with another optimizer than --optimizer='
                f'{self.settings["optimizer"]}: resume with its own, or begin a new run from its '
                f'weights with --init_from={state["path"]}'
            )
        # Without names, parameters of one shape could be taken for others.
        trained_only = state.get('config', {}).get('train_only', self.settings['train_only'])
        if trained_only != self.settings['train_only']:
            raise UserError(
                f'{state["path"]} was trained on other parameters, with --train_only='
                f'{trained_only}: resume with its own, or begin a new run from its weights with '
                f'--init_from={state["path"]}'
            )
        load_moments(self.optimizers, state['optimizers'], state['path'])
        if state['scaler']:  # empty after a run without float16
            self.scaler.load_state_dict(state['scaler'])
        if self.average and state['average']:
            shapes = [t.shape for t in state['average']]
            if shapes != [p.shape for p in self.model.parameters()]:
                raise UserError(
                    f'{state["path"]}: its moving average is that of another model; '
                    f'begin a new run from its weights with --init_from={state["path"]}'
                )
            self.average.average = [t.to(self.device, copy=True) for t in state['average']]
