"""
LoRA and QLoRA on our GPT: adapters by PEFT, 4-bit weights by bitsandbytes, few large products.

GPT holds query, key and value in one matrix, and gate and up of SwiGLU in another. `split` turns
each Linear of the blocks into a LinearGroup: Linears under the names that transformers gives them
(q_proj ... down_proj), so that PEFT and bitsandbytes find what they know. A group computes

    x W^T  +  s_i dropout(x) A_i^T B_i^T    for each member i with an adapter

(LoRA: Hu et al. 2021, eq. 3) with one product for the weights of all members, which are slices of
one matrix, and, where there is no dropout, one for all A. Base weights are frozen: they never get a
gradient. In 4 bits (NF4 with double quantisation: Dettmers et al. 2023, section 3) they are
dequantised inside the compiled block, in the forward pass and again in the backward pass.

Legend: x (..., in), W (out, in), A (r, in), B (out, r); s = alpha / r.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from model import GPT, MLP, Linear
from nanomla.core.checks import check_choice, check_range, split_list
from nanomla.core.configurator import UserError

ADAPTERS = ('full', 'lora', 'qlora')
NAMES_IN_MLA = dict(k_proj='kv_a_proj_with_mqa', v_proj='kv_b_proj')  # MLA's nearest to MHA's
# MLA multiplies by parts of this matrix itself: in its absorbed form, and in QK-norm of the latent.
READ_BY_ATTENTION = 'kv_b_proj'
INSTALL = 'pip install -e .[adapters]'

# bitsandbytes warns at its import of an optional package for CPUs that nothing here needs.
logging.getLogger('bitsandbytes.backends.cpu.ops').setLevel(logging.ERROR)


class UnavailableError(UserError):
    """A package, a kernel or a conversion that cannot be had here, for the reason it gives."""


@dataclass(frozen=True)
class LoraSettings:
    """
    What adapters to add.

    r, alpha: width, and scale s = alpha / r
    targets:  as in `target_names`; '' adds no adapters
    double:   quantise the scales of 4-bit weights, too
    """

    r: int = 32
    alpha: float = 16
    dropout: float = 0.0
    targets: str = 'all'
    double: bool = True


class LinearGroup(nn.Module):
    """
    A Linear of a block as the Linears it consists of.

    names: of the members, each an attribute; widths: their rows. In full precision their weights
    are views of `whole` (out, in); in 4 bits each has its own and `whole` is None.
    """

    def __init__(self, linear: nn.Linear, names: Sequence[str], widths: Sequence[int]):
        super().__init__()
        self.names = names
        self.cached_weight = None
        self.splits = getattr(linear.weight, 'splits', widths)
        self.register_buffer('whole', linear.weight.detach(), persistent=False)
        biases = [None] * len(names)
        if linear.bias is not None:
            biases = linear.bias.detach().split(widths)
        for name, rows, bias in zip(names, self.whole.split(widths), biases):
            setattr(self, name, linear_of(rows, bias))

    @property
    def members(self) -> list[nn.Module]:
        return [getattr(self, name) for name in self.names]

    @property
    def linears(self) -> list[nn.Module]:
        """The members without their adapters."""
        return [getattr(member, 'base_layer', member) for member in self.members]

    @property
    def in_four_bits(self) -> bool:
        return self.whole is None

    @property
    def bias(self) -> torch.Tensor | None:
        biases = [linear.bias for linear in self.linears]
        if biases[0] is None:
            return None
        return torch.cat([bias.detach() for bias in biases])

    def forward(self, x):
        return self.add_adapters(x, self.base(x))

    def base(self, x):
        """Return x W^T + bias without the adapters, (..., out)."""
        if not self.in_four_bits:
            weight = self.whole.to(x.dtype)
        elif torch.compiler.is_compiling():
            weight = join([self.dequantised(i, x.dtype) for i in range(len(self.names))], dim=0)
        else:
            # bitsandbytes' own product stores no dequantised weight for the backward pass.
            return join([linear(x) for linear in self.linears], dim=-1)
        bias = self.bias
        if bias is not None:
            bias = bias.to(x.dtype)
        return F.linear(x, weight, bias)

    def add_adapters(self, x, y):
        """Return y plus the adapters' part. With dropout each member drops by itself (PEFT)."""
        adapted = [member for member in self.members if has_adapter(member)]
        if not adapted:
            return y
        low_ranks = iter(self.low_ranks(x, adapted))  # x A^T of each adapted member
        added = []
        for member, linear in zip(self.members, self.linears):
            if has_adapter(member):
                b = member.lora_B['default'].weight * member.scaling['default']
                added.append(F.linear(next(low_ranks), b.to(x.dtype)))
            else:
                added.append(y.new_zeros(*y.shape[:-1], linear.out_features))
        return y + join(added, dim=-1)

    def low_ranks(self, x, adapted):
        """Return x A^T of each adapted member, (..., r)."""
        dropouts = [member.lora_dropout['default'] for member in adapted]
        if self.training and any(isinstance(dropout, nn.Dropout) for dropout in dropouts):
            low_ranks = []
            for member, dropout in zip(adapted, dropouts):
                a = member.lora_A['default'].weight
                low_ranks.append(F.linear(dropout(x), a.to(x.dtype)))
            return low_ranks
        a = torch.cat([member.lora_A['default'].weight for member in adapted])
        return F.linear(x, a.to(x.dtype)).split([m.r['default'] for m in adapted], dim=-1)

    def reference(self, x):
        """Return `forward`'s result by PEFT's own layers."""
        return torch.cat([member(x) for member in self.members], dim=-1)

    # ---------------------------------------------------------------------------------------------
    # weights

    @property
    def weight(self) -> torch.Tensor:
        """
        The matrix (out, in) that the group stands for, with its adapters, in full precision.

        For modules that read a Linear's weight. It is a function of lora_A and lora_B, so gradients
        reach them through it; dropout, which belongs to an input, has no part in it.
        """
        if self.cached_weight is not None and not torch.is_grad_enabled():
            return self.cached_weight
        return self.merged()

    def merged(self) -> torch.Tensor:
        """Compute `weight` anew."""
        rows = []
        for i, member in enumerate(self.members):
            w = self.base_weight(i)
            if has_adapter(member):
                a, b = member.lora_A['default'].weight, member.lora_B['default'].weight
                delta = (b @ a) * member.scaling['default']
                wide = torch.promote_types(w.dtype, torch.float32)
                w = (w.to(wide) + delta.to(wide)).to(w.dtype)
            rows.append(w)
        return torch.cat(rows)

    def base_weight(self, i: int) -> torch.Tensor:
        """Return the weight of member i without its adapter, in the dtype that it was given in."""
        linear = self.linears[i]
        if not self.in_four_bits:
            return linear.weight
        if torch.compiler.is_compiling():
            return self.dequantised(i, linear.weight.quant_state.dtype)
        return dequantise(linear)

    def quantise(self, compute_dtype: torch.dtype, double: bool = True) -> None:
        """Turn the members into 4-bit Linears, in place."""
        for name, linear in zip(self.names, self.members):
            setattr(self, name, in_four_bits(linear, compute_dtype, double))
        self.whole = None
        self.shapes = [linear.weight.quant_state.shape for linear in self.linears]
        # Plain tensors, which torch.compile can read.
        for i, linear in enumerate(self.linears):
            for name, part in nf4_parts(linear)._asdict().items():
                self.register_buffer(f'{name}_{i}', part, persistent=False)

    def parts(self, i: int) -> 'NF4Parts':
        """Return the 4-bit weight of member i."""
        return NF4Parts(*[getattr(self, f'{name}_{i}') for name in NF4Parts._fields])

    def dequantised(self, i: int, dtype: torch.dtype) -> torch.Tensor:
        return nf4(self.parts(i), self.shapes[i], dtype)


def join(tensors: list[torch.Tensor], dim: int) -> torch.Tensor:
    """Concatenate; a single tensor is not copied."""
    if len(tensors) == 1:
        return tensors[0]
    return torch.cat(tensors, dim=dim)


def has_adapter(member: nn.Module) -> bool:
    """Return whether PEFT has put its layer in the place of this Linear."""
    return hasattr(member, 'lora_A')


def linear_of(weight: torch.Tensor, bias: torch.Tensor | None) -> Linear:
    """Return a frozen Linear that holds these tensors themselves."""
    rows, columns = weight.shape
    linear = Linear(columns, rows, bias=bias is not None, device='meta')
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear


# -------------------------------------------------------------------------------------------------
# a model with adapters


def split(model: GPT) -> list[LinearGroup]:
    """
    Turn every Linear of the blocks into a LinearGroup and return the groups.

    The model must be on its device already: moving it afterwards would copy the views.
    """
    for block in model.transformer.h:
        for name, linear in linears_of(block.attn):
            setattr(block.attn, name, LinearGroup(linear, *attention_members(block, name, linear)))
        for name, linear in linears_of(block.mlp):
            setattr(block.mlp, name, LinearGroup(linear, *mlp_members(block.mlp, name, linear)))
    return groups(model)


def linears_of(part: nn.Module | None) -> list[tuple[str, nn.Linear]]:
    if part is None:  # a block without MLP
        return []
    return [(name, m) for name, m in part.named_children() if isinstance(m, nn.Linear)]


def attention_members(block, name: str, linear: nn.Linear) -> tuple[tuple[str, ...], list[int]]:
    """Return names and widths of the Linears in a Linear of the attention."""
    if name == 'c_attn':
        return ('q_proj', 'k_proj', 'v_proj'), block.attn.widths
    if name == 'c_proj':
        name = 'o_proj'
    return (name,), [linear.out_features]


def mlp_members(mlp: MLP, name: str, linear: nn.Linear) -> tuple[tuple[str, ...], list[int]]:
    """Return names and widths of the Linears in a Linear of the MLP."""
    if name == 'c_fc' and mlp.act == 'swiglu':
        return ('gate_proj', 'up_proj'), [linear.out_features // 2] * 2
    name = dict(c_fc='up_proj', c_proj='down_proj').get(name, name)
    return (name,), [linear.out_features]


def groups(model: nn.Module) -> list[LinearGroup]:
    return [module for module in model.modules() if isinstance(module, LinearGroup)]


def member_names(model: nn.Module) -> list[str]:
    """Return the names of all members, each once."""
    names = {}
    for group in groups(model):
        names |= dict.fromkeys(group.names)
    return list(names)


def is_in_four_bits(model: nn.Module) -> bool:
    return any(group.in_four_bits for group in groups(model))


def target_names(model: GPT, wanted: str) -> list[str]:
    """
    Return the names of the members that get adapters.

    wanted: 'all', 'attention', or names as in transformers with commas; k_proj and v_proj mean
    their nearest relatives in an MLA model. UserError names what the model does not have.
    """
    known = member_names(model)
    if wanted == 'all':
        return known
    if wanted == 'attention':
        return member_names(model.transformer.h[0].attn)
    names = []
    for name in split_list(wanted):
        if name not in known and NAMES_IN_MLA.get(name) in known:
            name = NAMES_IN_MLA[name]
        if name not in known:
            raise UserError(
                f"target '{name}' is none of this model's Linears: use all, or some of "
                f'{", ".join(known)}'
            )
        names.append(name)
    return list(dict.fromkeys(names))


def adapt(model: GPT, kind: str, lora: LoraSettings | None = None) -> GPT:
    """
    Make `model` trainable in place and return it.

    model: on its device, its stream set
    kind:  'full': all of it; 'lora': adapters alone; 'qlora': adapters over 4-bit weights

    Adapters are fp32 whatever the base is. UserError for what cannot be adapted so.
    """
    check_choice('adapter', kind, ADAPTERS)
    if kind == 'full':
        return model.requires_grad_(True)
    lora = lora or LoraSettings()
    check_range('lora_r', lora.r, least=1)
    check_range('lora_dropout', lora.dropout, least=0, below=1)
    model.requires_grad_(False)
    for group in split(model):
        if kind == 'qlora':
            group.quantise(model.stream, lora.double)
    if lora.targets:
        add_adapters(model, lora)
    return model


def check_peft() -> None:
    """Raise an UnavailableError where PEFT is missing, before the work that its adapters follow."""
    if find_spec('peft') is None:
        raise UnavailableError(f'LoRA needs peft: {INSTALL}')


def add_adapters(model: GPT, lora: LoraSettings) -> None:
    """Let PEFT add fp32 adapters to the members of the groups."""
    check_peft()
    from peft import LoraConfig, inject_adapter_in_model

    names = '|'.join(target_names(model, lora.targets))
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        # The members of groups, not a group that has the name of its member.
        target_modules=rf'.*\.(attn|mlp)\.\w+\.({names})',
        bias='none',
    )
    # PEFT asks a model for this attribute before it takes its own 4-bit layer.
    model.is_loaded_in_4bit = is_in_four_bits(model)
    inject_adapter_in_model(config, model)
    del model.is_loaded_in_4bit
    for p in model.parameters():
        if p.requires_grad:
            p.data = p.data.float()


@torch.no_grad()
def merge(model: GPT) -> GPT:
    """Turn groups into Linears again, in place: adapters added, 4-bit weights dequantised."""
    for block in model.transformer.h:
        for part in filter(None, (block.attn, block.mlp)):
            for name, group in list(part.named_children()):
                if isinstance(group, LinearGroup):
                    linear = linear_of(group.merged(), group.bias).requires_grad_(True)
                    linear.weight.splits = group.splits
                    setattr(part, name, linear)
    return model


# -------------------------------------------------------------------------------------------------
# checkpoints of a model that learns by adapters


@torch.no_grad()
def merged_state(model: GPT) -> dict[str, torch.Tensor]:
    """Return the state dict that the model has after `merge`, and leave the model as it is."""
    named = {name: m for name, m in model.named_modules() if isinstance(m, LinearGroup)}
    in_groups = tuple(f'{name}.' for name in named)
    state = {}
    for key, value in model.state_dict().items():
        if not key.startswith(in_groups):
            state[key] = value
    for name, group in named.items():
        adapted = any(has_adapter(member) for member in group.members)
        state[f'{name}.weight'] = group.merged() if adapted else group.whole
        if group.bias is not None:
            state[f'{name}.bias'] = group.bias
    return state


def adapter_state(model: GPT) -> dict[str, torch.Tensor]:
    """Return the adapters and the weights that they are added to: what resuming needs."""
    state = model.state_dict()
    return {key: state[key] for key in state if 'lora_' in key or '.base_layer.' in key}


@torch.no_grad()
def load_adapter_state(model: GPT, state: dict[str, torch.Tensor], path: Path) -> None:
    """Take over the adapter_state of the checkpoint `path`. UserError where it is of others."""
    own = adapter_state(model)
    shapes = {key: value.shape for key, value in own.items()}
    if shapes != {key: getattr(value, 'shape', None) for key, value in state.items()}:
        raise UserError(
            f'{path} was trained with other adapters: resume with its own --lora_rank and '
            f'--lora_targets, or begin a new run from its weights with --init_from={path}'
        )
    for key, value in own.items():
        value.copy_(state[key])


@contextmanager
def cached_weights(model: GPT) -> Iterator[None]:
    """Merge the matrices that attention reads once, not at every token: for decoding."""
    read = [group for group in groups(model) if READ_BY_ATTENTION in group.names]
    with torch.no_grad():
        for group in read:
            group.cached_weight = group.merged()
    try:
        yield
    finally:
        for group in read:
            group.cached_weight = None


# -------------------------------------------------------------------------------------------------
# 4 bits


def import_bitsandbytes():
    try:
        import bitsandbytes
    except ImportError:
        raise UnavailableError(f'4-bit weights need bitsandbytes: {INSTALL}') from None
    return bitsandbytes


def in_four_bits(linear: nn.Linear, compute_dtype: torch.dtype, double: bool = True) -> nn.Module:
    """
    Return bitsandbytes' Linear4bit with the weights of `linear` in NF4.

    double: its scales are quantised, too.
    """
    bnb = import_bitsandbytes()
    how = dict(compress_statistics=double, quant_type='nf4')
    new = bnb.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None,
        compute_dtype=compute_dtype,
        device='meta',
        **how,
    )
    weight = linear.weight.detach().clone()
    new.weight = bnb.nn.Params4bit(weight, requires_grad=False, module=new, **how)
    new.bias = linear.bias
    new = new.to(linear.weight.device)
    # Else an evaluation on such a CPU repacks the weights, and the next backward pass gives the
    # input no gradient.
    new.support_avx512bf16_for_cpu = False
    return new


def dequantise(linear: nn.Module) -> torch.Tensor:
    """Return the weight of a Linear4bit, by bitsandbytes, in the dtype it was quantised from."""
    functional = import_bitsandbytes().functional
    return functional.dequantize_4bit(linear.weight.data, linear.weight.quant_state)


class NF4Parts(NamedTuple):
    """
    A weight in NF4.

    packed: levels, two a byte, the first in its upper half; code: the 16 numbers they stand for
    scales: one for every block of 64 weights; with double quantisation one of 256 levels each,
    whose numbers are scale_code, times one of scale_scales for every 256, plus offset. These three
    are empty without it.
    """

    packed: torch.Tensor
    code: torch.Tensor
    scales: torch.Tensor
    scale_code: torch.Tensor
    scale_scales: torch.Tensor
    offset: torch.Tensor


def nf4_parts(linear: nn.Module) -> NF4Parts:
    """Return the parts of a Linear4bit's weight: plain tensors that share its memory."""
    state = linear.weight.quant_state
    packed = linear.weight.detach().as_subclass(torch.Tensor).flatten()
    if not state.nested:
        empty = state.absmax.new_zeros(0)
        return NF4Parts(packed, state.code, state.absmax, empty, empty, empty)
    second = state.state2
    return NF4Parts(packed, state.code, state.absmax, second.code, second.absmax, state.offset)


def nf4(parts: NF4Parts, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    """
    Return the weight (out, in) that `parts` stand for.

    Plain operations: torch.compile makes one kernel of them, and runs it again in the backward pass
    instead of storing weights.
    """
    scales = parts.scales
    if len(parts.scale_code):
        block = 256 if len(parts.scale_scales) else len(scales)
        factors = parts.scale_scales.repeat_interleave(block)[: len(scales)]
        scales = parts.scale_code[scales.int()] * factors + parts.offset
    levels = torch.stack([parts.packed >> 4, parts.packed & 15], dim=-1).view(len(scales), -1)
    return (parts.code[levels.int()] * scales[:, None]).to(dtype).view(shape)


# -------------------------------------------------------------------------------------------------
# sizes


def size(p: torch.Tensor) -> int:
    """Return the number of weights in a parameter: a 4-bit tensor holds two in a byte."""
    state = getattr(p, 'quant_state', None)
    if state is None:
        return p.numel()
    return state.shape.numel()


def count(model: nn.Module) -> tuple[int, int]:
    """Return the numbers of trainable and of all parameters, 4-bit ones by their `size`."""
    params = list(model.parameters())
    trainable = sum(p.numel() for p in params if p.requires_grad)
    return trainable, sum(size(p) for p in params)


def bytes_per_parameter(model: GPT) -> float:
    """Return the bytes a weight of the blocks' Linears takes, with its scales, without adapters."""
    weights = []
    for group in groups(model):
        weights += [linear.weight for linear in group.linears]
    if not weights:
        modules = model.transformer.h.modules()
        weights = [module.weight for module in modules if isinstance(module, nn.Linear)]
    return sum(stored_bytes(w) for w in weights) / sum(size(w) for w in weights)


def stored_bytes(weight: torch.Tensor) -> int:
    """Return the bytes of a weight, in 4 bits with its scales and tables."""
    state = getattr(weight, 'quant_state', None)
    if state is None:
        return weight.nbytes
    tensors = [weight.data, state.absmax, state.code]
    if state.nested:
        tensors += [state.state2.absmax, state.state2.code, state.offset]
    return sum(tensor.nbytes for tensor in tensors)
