"""
One training step, as fast as it goes while it can still be read: batch -> loss -> backward -> clip ->
optimizer. train.py drives it, bench.py times it.

What makes it fast: weights stay fp32 and are cast where they are used, the residual stream is bf16;
every block is the same code, so one is compiled and serves all; nothing in a step waits for the
device; small models on one GPU record the whole step as a CUDA graph.
"""

import math
from contextlib import nullcontext
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from nanomla.core import devices as machine
from nanomla.core.configurator import UserError
from nanomla.training.distill import Distilled
from nanomla.training.optim import MovingAverage, optimizers, set_rate

CHOICES = dict(optimizer=('adamw', 'muon'), schedule=('cosine', 'wsd'))
EAGER_STEPS = (
    3  # a CUDA graph can be recorded once everything is allocated: after as many ordinary steps
)


RANGES = (
    (
        'at least 1',
        lambda x: x >= 1,
        'batch_size block_size gradient_accumulation_steps eval_interval eval_iters log_interval max_iters',
    ),
    (
        'at least 0',
        lambda x: x >= 0,
        'keep_checkpoints warmup_iters lr_decay_iters min_lr muon_lr muon_up weight_decay grad_clip sample_tokens distill_hidden max_minutes target_loss',
    ),
    ('at least 0 and less than 1', lambda x: 0 <= x < 1, 'beta1 beta2 ema_decay'),
    ('at least 0 and at most 1', lambda x: 0 <= x <= 1, 'distill cooldown'),
    ('more than 0', lambda x: x > 0, 'learning_rate'),
    ('at least 0 and less than 2**32', lambda x: 0 <= x < 2**32, 'seed'),
)


def check_ranges(settings):
    """UserError for a number among train.py's settings that cannot be meant."""
    for rule, fits, names in RANGES:
        for name in names.split():
            if not fits(settings[name]):
                raise UserError(f'{name}={settings[name]} must be {rule}')


def rate(s, step):
    """Learning rate at `step` (from 0) as a share of its peak, by the settings `s`."""
    end, floor = s.lr_decay_iters or s.max_iters, s.min_lr / s.learning_rate
    if not s.decay_lr:
        return 1.0
    if step < s.warmup_iters:
        return (step + 1) / (s.warmup_iters + 1)
    if step >= end:
        return floor
    if s.schedule == 'wsd':
        return floor + (1 - floor) * min(1.0, (end - step) / max(1, s.cooldown * end))
    return floor + (1 - floor) * 0.5 * (
        1 + math.cos(math.pi * (step - s.warmup_iters) / (end - s.warmup_iters))
    )


class Trainer:
    """
    A model, its optimizers and its data, and perhaps a teacher, another model. `settings` are train.py's; the model is
    on its device, its `stream` is set. Rank and world come from `data`; `group` are the processes that train it, None for all.
    """

    def __init__(self, settings, model, data, teacher=None, group=None):
        self.s = s = SimpleNamespace(**settings)
        self.model, self.data, self.device, self.world, self.group = (
            model,
            data,
            data.device,
            data.world,
            group,
        )
        for name, choices in CHOICES.items():
            if settings[name] not in choices:
                raise UserError(
                    f"{name}='{settings[name]}' is not known: use {' or '.join(choices)}"
                )
        if s.gradient_accumulation_steps % self.world:
            raise UserError(
                f'gradient_accumulation_steps={s.gradient_accumulation_steps} is not a multiple of the {self.world} processes'
            )
        if s.cuda_graph and (
            self.device.type != 'cuda'
            or self.world > 1
            or model.stream == torch.float16
            or 'train' not in data.resident
        ):
            raise UserError(
                '--cuda_graph=True needs one CUDA GPU, bfloat16 or float32, and a dataset that fits on it: use --cuda_graph=False'
            )
        if s.fp8_head and (self.device.type != 'cuda' or not s.fused_loss):
            raise UserError(
                '--fp8_head=True needs a CUDA GPU and --fused_loss=True: use --fp8_head=False'
            )
        if teacher is not None and teacher.config.vocab_size != model.config.vocab_size:
            raise UserError(
                f'--teacher={s.teacher} knows {teacher.config.vocab_size} tokens, the model {model.config.vocab_size}: name the model it was converted from'
            )
        if teacher is not None and teacher.config.block_size < s.block_size:
            raise UserError(
                f'--teacher={s.teacher} reads {teacher.config.block_size} tokens at a time: use --block_size={teacher.config.block_size} or less'
            )
        if (
            teacher is not None
            and s.distill_hidden
            and (teacher.config.n_layer, teacher.config.n_embd)
            != (model.config.n_layer, model.config.n_embd)
        ):
            raise UserError(
                f'--teacher={s.teacher} has {teacher.config.n_layer} layers of width {teacher.config.n_embd}, the model {model.config.n_layer} of '
                f'{model.config.n_embd}: use --distill_hidden=0'
            )
        words = [word.strip() for word in s.train_only.split(',') if word.strip()]
        for name, p in model.named_parameters() if words else ():
            p.requires_grad_(any(word in name for word in words))
        if not any(p.requires_grad for p in model.parameters()):
            raise UserError(
                f"--train_only={s.train_only}: no parameter has such a name; 'attn' or 'kv_a_proj,kv_b_proj,q_proj' are words of MLA's"
            )
        self.teacher = None if teacher is None else teacher.to(self.device)
        self.accumulation = s.gradient_accumulation_steps // self.world
        self.params = [p for p in model.parameters() if p.requires_grad]
        self.optimizers = optimizers(
            model,
            s.optimizer,
            s.learning_rate,
            s.muon_lr,
            s.weight_decay,
            (s.beta1, s.beta2),
            graph=s.cuda_graph,
            split=s.muon_split,
            up=s.muon_up,
        )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=model.stream == torch.float16)
        self.average = MovingAverage(model, s.ema_decay) if s.ema_decay else None
        self.graph, self.eager_steps = None, 0
        if s.cuda_graph:
            self.side = torch.cuda.Stream()
            self.starts = torch.zeros(
                self.accumulation, s.batch_size, dtype=torch.int64, device=self.device
            )
        self.prepare_model()

    def prepare_model(self):
        s, model = self.s, self.model
        if self.device.type == 'cuda' and s.fused_loss:
            from nanomla.training.kernels import linear_cross_entropy

            model.loss = lambda x, targets: linear_cross_entropy(
                x.flatten(0, 1), model.lm_head.weight, targets.flatten(), fp8=s.fp8_head
            )
        if s.compile:
            if self.device.type != 'cuda' or not s.fused_loss:
                model.loss = torch.compile(model.loss, dynamic=False)
            model.embed = torch.compile(model.embed, dynamic=False)
            for block in [
                *model.transformer.h,
                *(self.teacher.transformer.h if self.teacher else ()),
            ]:
                block.compile(dynamic=False)
            torch._dynamo.config.recompile_limit = max(
                8, 2 * len(model.transformer.h)
            )  # ranks may differ from layer to layer
        self.forward = model
        if self.teacher:
            self.teacher.stream = model.stream
            self.forward = Distilled(model, self.teacher, s.distill, s.distill_hidden)
            if s.compile:
                self.forward.divergence = torch.compile(self.forward.divergence, dynamic=False)
                self.forward.distance = torch.compile(self.forward.distance, dynamic=False)
        if self.world > 1:
            # On one host all gradients travel at once, after the backward pass: it runs faster alone than beside the all-reduce
            self.forward = DistributedDataParallel(
                self.forward,
                device_ids=[self.device.index] if self.device.type == 'cuda' else None,
                process_group=self.group,
                gradient_as_bucket_view=True,
                bucket_cap_mb=2**20 if machine.on_one_host() else None,
            )

    def update(self, step):
        """Train on the batch of `step` (from 0): one update. Returns its mean loss, on the device, not waited for."""
        s = self.s
        set_rate(self.optimizers, rate(s, step))
        torch.manual_seed(
            (s.seed * 1_000_003 + step) * 4099 + self.data.rank
        )  # dropout, too, depends on (seed, step, rank) only
        starts = torch.stack(
            [self.data.starts(step, micro, s.batch_size) for micro in range(self.accumulation)]
        )
        try:
            loss = self.replay(starts) if s.cuda_graph else self.one_step(starts)
        except torch.OutOfMemoryError:
            raise UserError(
                f'out of memory on {self.device} with batch_size={s.batch_size}: use a smaller one '
                '(and more gradient_accumulation_steps)'
            ) from None
        except Exception as error:
            if s.compile and type(error).__module__.startswith(
                ('torch._dynamo', 'torch._inductor')
            ):
                raise UserError(
                    f'torch.compile cannot work here ({" ".join(str(error).split())[:150]}): use --compile=False'
                ) from None
            raise
        if self.average:
            self.average.update(step)
        return loss

    def one_step(self, starts):
        """Forward and backward over the windows that begin at `starts` (accumulation, B), clip, update."""
        total = 0
        for micro in range(self.accumulation):
            x, y = self.data.cut('train', starts[micro])
            last = micro == self.accumulation - 1
            with (
                nullcontext() if self.world == 1 or last else self.forward.no_sync()
            ):  # gradients travel once a step
                loss = self.forward(x, y) / self.accumulation
                self.scaler.scale(loss).backward()
            total = total + loss.detach()
        if self.s.grad_clip:
            for optimizer in self.optimizers:
                self.scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(self.params, self.s.grad_clip)
        for optimizer in self.optimizers:
            self.scaler.step(optimizer)
            optimizer.zero_grad(set_to_none=True)
        self.scaler.update()
        return total

    def replay(self, starts):
        """one_step as a CUDA graph: the same kernels without Python between them. The first steps are ordinary ones."""
        self.starts.copy_(starts, non_blocking=True)
        if self.eager_steps < EAGER_STEPS:
            self.eager_steps += 1
            self.side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.side):
                loss = self.one_step(self.starts)
            torch.cuda.current_stream().wait_stream(self.side)
            return loss
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.loss = self.one_step(self.starts)
        self.graph.replay()
        return self.loss

    @torch.no_grad()
    def evaluate(self):
        """Mean loss in nats over the validation split: the same windows each time, shared by all ranks."""
        model, s = self.model.eval(), self.s
        total = torch.zeros(
            2, dtype=torch.float64, device='cpu' if self.device.type == 'mps' else self.device
        )
        with (
            self.averaged(),
            torch.compiler.set_stance('force_eager' if s.cuda_graph else 'default'),
        ):  # a quick run compiles nothing twice
            for x, y in self.data.val_batches(s.batch_size, most=s.eval_iters * s.batch_size):
                counted = (y >= 0).sum()
                loss = torch.where(counted > 0, model(x, y) * counted, 0)
                total += torch.stack([loss, counted]).to(total)
        if self.world > 1:
            dist.all_reduce(total, group=self.group)
        model.train()
        return (total[0] / total[1]).item()

    def averaged(self):
        """A context in which the model holds the moving average of its weights, where there is one."""
        return self.average.swapped_in() if self.average else nullcontext()

    def state(self):
        """What a resumed run needs beside the weights."""
        return dict(
            optimizers=[o.state_dict() for o in self.optimizers],
            scaler=self.scaler.state_dict(),
            average=self.average.average if self.average else None,
        )

    def load_state(self, state):
        """Moments of the old run, rates and decay of this one."""
        if len(state['optimizers']) != len(self.optimizers):
            raise UserError(
                f'the checkpoint was trained with another optimizer than --optimizer={self.s.optimizer}'
            )
        for optimizer, old in zip(self.optimizers, state['optimizers']):
            own = [
                {k: v for k, v in group.items() if k != 'params'}
                for group in optimizer.param_groups
            ]
            if [len(group['params']) for group in old['param_groups']] != [
                len(group['params']) for group in optimizer.param_groups
            ]:
                raise UserError(
                    f'the checkpoint was trained with its parameters in other groups: resume with its own --muon_up (now {self.s.muon_up:g}; '
                    'it may change, but not from or to 1) and --train_only'
                )
            optimizer.load_state_dict(old)
            for group, asked in zip(optimizer.param_groups, own):
                group.update(asked)
        if state['scaler']:  # empty after a run without float16
            self.scaler.load_state_dict(state['scaler'])
        if self.average and state['average']:
            self.average.average = [t.to(self.device) for t in state['average']]
