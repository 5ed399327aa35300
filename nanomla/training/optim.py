"""
What moves the weights: Muon for the matrices of the blocks, AdamW for the rest, and a moving
average.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon): the momentum of each matrix is
replaced by the nearest semi-orthogonal matrix, so that every direction moves by the same amount.
Matrices of one shape are orthogonalised together, as one batch.
"""

import os
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from nanomla.core.configurator import UserError

# The quintic that Muon's authors tuned for speed of convergence.
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def orthogonalize(matrices: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """
    Return U Vᵀ of each of the matrices (N, rows, cols) with SVD U S Vᵀ, roughly: singular values
    end within about 0.7 to 1.2. Five steps of X <- a X + b (X Xᵀ) X + c (X Xᵀ)² X; bf16 on a GPU,
    fp32 on a CPU.
    """
    a, b, c = NEWTON_SCHULZ
    x = matrices.bfloat16() if matrices.is_cuda else matrices.float()
    tall = x.size(-2) > x.size(-1)
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """
    Nesterov momentum, orthogonalised, scaled by sqrt(max(1, rows / cols)); decoupled weight decay.

    A weight that stacks several matrices says so in `weight.splits` (rows of each), and in
    `weight.heads` (heads of each) where their rows are those of heads. split=True takes the
    matrices apart first, heads=True each of them by its heads as well ("Muon Split" of the GLM-5
    report, 2026). `lr` may be a 0-dim tensor on the device, so that a CUDA graph can read a new
    value.
    """

    def __init__(self, params, lr=0.02, momentum=0.95, weight_decay=0.0, split=True, heads=False):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay, steps=5))
        self.split = split
        self.heads = heads

    def rows_apart(self, weight: torch.Tensor) -> list[int]:
        """Return the rows of each matrix in `weight` that is orthogonalised by itself."""
        if not self.split:
            return [weight.size(0)]
        symbols = getattr(weight, 'splits', [weight.size(0)])
        if not self.heads:
            return symbols
        rows = []
        for width, heads in zip(symbols, getattr(weight, 'heads', [1] * len(symbols))):
            rows += [width // heads] * heads
        return rows

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            params = [p for p in group['params'] if p.grad is not None]
            if not params:
                continue
            for p in params:
                if 'momentum' not in self.state[p]:
                    self.state[p]['momentum'] = torch.zeros_like(p)
            grads = [p.grad for p in params]
            momenta = [self.state[p]['momentum'] for p in params]
            torch._foreach_lerp_(momenta, grads, 1 - group['momentum'])
            updates = torch._foreach_lerp(grads, momenta, group['momentum'])
            if group['weight_decay']:
                torch._foreach_mul_(params, 1 - group['lr'] * group['weight_decay'])
            alike = defaultdict(list)
            for p, update in zip(params, updates):
                rows = self.rows_apart(p)
                for weight, piece in zip(p.split(rows), update.split(rows)):
                    alike[weight.shape].append((weight, piece))
            for (rows, cols), pairs in alike.items():
                weights, pieces = zip(*pairs)
                moves = orthogonalize(torch.stack(pieces), group['steps']).to(weights[0].dtype)
                moves = moves * (group['lr'] * max(1.0, rows / cols) ** 0.5)
                torch._foreach_sub_(list(weights), list(moves.unbind()))


@dataclass
class OptimizerSettings:
    """
    What trains a model. graph: rates are tensors on the device, for a CUDA graph; split and heads:
    as in Muon; up: share of muon_lr for the matrices that read a latent of MLA (W^UQ, W^UK, W^UV).
    """

    kind: str  # adamw | muon
    learning_rate: float
    muon_lr: float
    weight_decay: float
    betas: tuple[float, float] = (0.9, 0.95)
    graph: bool = False
    split: bool = True
    heads: bool = False
    up: float = 1.0


def make_optimizers(model: torch.nn.Module, s: OptimizerSettings) -> list[torch.optim.Optimizer]:
    """
    Return the optimizers for `model`: AdamW for all, or Muon for the blocks' matrices and AdamW for
    embeddings, head, norms and biases. Only matrices decay. Every group keeps its peak rate as
    'base_lr' and the names of its parameters as 'param_names'.
    """
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    device = named[0][1].device
    hidden, reads_latent, others = [], [], []
    for name, p in named:
        if s.kind != 'muon' or p.ndim != 2 or '.h.' not in name:
            others.append((name, p))
        elif s.up != 1 and '_b_proj' in name:
            reads_latent.append((name, p))
        else:
            hidden.append((name, p))

    def group(named, lr, decay):
        rate = torch.tensor(lr, device=device) if s.graph else lr
        return dict(params=named, weight_decay=decay, base_lr=lr, lr=rate)

    adamw_groups = [
        group([(n, p) for n, p in others if p.ndim >= 2], s.learning_rate, s.weight_decay),
        group([(n, p) for n, p in others if p.ndim < 2], s.learning_rate, 0.0),
    ]
    muon_groups = [
        group(hidden, s.muon_lr, s.weight_decay),
        group(reads_latent, s.muon_lr * s.up, s.weight_decay),
    ]
    adamw_groups = [g for g in adamw_groups if g['params']]
    muon_groups = [g for g in muon_groups if g['params']]
    made = []
    if adamw_groups:  # none is left where only matrices of the blocks are trained
        fused = device.type in ('cpu', 'cuda')
        made.append(torch.optim.AdamW(adamw_groups, betas=s.betas, fused=fused, capturable=s.graph))
    if muon_groups:
        made.append(Muon(muon_groups, split=s.split, heads=s.heads))
    return made


def set_rate(made, share):
    """Set every group's learning rate to `share` of its peak."""
    for optimizer in made:
        for group in optimizer.param_groups:
            if torch.is_tensor(group['lr']):
                group['lr'].fill_(group['base_lr'] * share)
            else:
                group['lr'] = group['base_lr'] * share


# -------------------------------------------------------------------------------------------------
# resuming

# What an optimizer remembers of a parameter once it has moved it.
MEMORY = dict(AdamW={'step', 'exp_avg', 'exp_avg_sq'}, Muon={'momentum'})


def load_moments(
    made: list[torch.optim.Optimizer], saved: list[dict], path: str | os.PathLike
) -> None:
    """
    Give every parameter the moments that it had under its name; rates and decay stay as they are.

    saved: the optimizers' state dicts, from `path`. UserError where the two do not train the same
    parameters by the same optimizers.
    """
    remedy = (
        'resume with its own --optimizer and --train_only, or begin a new run from its weights '
        f'with --init_from={path}'
    )
    moments = moments_by_name(made, saved)
    trained = {name: p for optimizer in made for name, p in named_parameters(optimizer)}
    for name in [*trained, *moments]:
        if name not in moments or name not in trained:
            now = 'not trained now' if name in moments else 'was not trained there'
            raise UserError(f'{path} was trained on other parameters: {name} is {now}; {remedy}')
    for optimizer in made:
        needed = MEMORY[type(optimizer).__name__]
        state = {}
        for number, (name, p) in enumerate(named_parameters(optimizer)):
            old = moments[name]
            if old and not fits(old, p, needed):
                raise UserError(f'{path} was trained with another optimizer of {name}; {remedy}')
            if old:
                state[number] = {key: copied_to(value, p.device) for key, value in old.items()}
        own_groups = optimizer.state_dict()['param_groups']
        optimizer.load_state_dict(dict(state=state, param_groups=own_groups))


def moments_by_name(made: list[torch.optim.Optimizer], saved: list[dict]) -> dict[str, dict]:
    """
    Return parameter name -> its moments, {} for one that was never moved.

    State dicts of before parameters had names hold them in the order of `made`.
    """
    moments = {}
    for number, old in enumerate(saved):
        for group_number, group in enumerate(old['param_groups']):
            names = group.get('param_names')
            if names is None:
                names = names_by_order(made, number, group_number)
            if len(names) != len(group['params']):
                names = [f'parameter {n} of group {group_number}' for n in group['params']]
            for name, key in zip(names, group['params']):
                moments[name] = old['state'].get(key, {})
    return moments


def names_by_order(made: list[torch.optim.Optimizer], number: int, group_number: int) -> list[str]:
    if number < len(made) and group_number < len(made[number].param_groups):
        return made[number].param_groups[group_number]['param_names']
    return []


def named_parameters(optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, torch.Tensor]]:
    for group in optimizer.param_groups:
        yield from zip(group['param_names'], group['params'])


def fits(memory: dict, p: torch.Tensor, needed: set[str]) -> bool:
    """Return whether this is what an optimizer remembers of `p`."""
    if memory.keys() != needed:
        return False
    moments = [value for name, value in memory.items() if name != 'step']
    counters = [value for name, value in memory.items() if name == 'step']
    if not all(torch.is_tensor(value) and value.numel() == 1 for value in counters):
        return False
    return all(is_moment(value, p) for value in moments)


def is_moment(value: object, p: torch.Tensor) -> bool:
    return torch.is_tensor(value) and value.shape == p.shape and value.is_floating_point()


def copied_to(value: object, device: torch.device) -> object:
    """Return a copy: the tensors of a checkpoint may lie in its file. Counters stay on the CPU."""
    if not torch.is_tensor(value):
        return value
    return value.to(device if value.ndim else value.device, copy=True)


class MovingAverage:
    """Exponential moving average of a model's weights; its first steps count fully."""

    def __init__(self, model, decay):
        self.params, self.decay = list(model.parameters()), decay
        self.average = [p.detach().clone() for p in self.params]

    @torch.no_grad()
    def update(self, step):
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.average, self.params, 1 - decay)

    @contextmanager
    def swapped_in(self):
        """Inside the `with`, the model holds the averaged weights."""
        own = [p.detach().clone() for p in self.params]
        with torch.no_grad():
            torch._foreach_copy_(self.params, self.average)
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(self.params, own)
