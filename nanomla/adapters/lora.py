"""
LoRA and QLoRA on our GPT: adapters by PEFT, 4-bit weights by bitsandbytes, and a forward pass that takes
both in few large products.

GPT keeps query, key and value in one matrix, and gate and up of SwiGLU in another. `split` shows each Linear
of the blocks as a Group of Linears under the names that transformers gives them (q_proj ... down_proj), so
that PEFT and bitsandbytes find what they know. A Group computes

    x W^T  +  s_i dropout(x) A_i^T B_i^T    for each member i that is adapted (LoRA: Hu et al. 2021, eq. 3)

with one product for all its members' weights, of which they are slices, and, where there is no dropout, one
for all A. Base weights are frozen: no gradient of theirs is ever computed. In 4 bits (NF4 with double
quantisation: Dettmers et al. 2023, section 3) they are dequantised inside the compiled block, forward and again backward.

Legend: x (..., in), W (out, in), A (r, in), B (out, r); s = alpha / r.
"""

import logging
from contextlib import contextmanager

import torch
import torch.nn as nn
import torch.nn.functional as F

from model import Linear
from nanomla.core.configurator import UserError

logging.getLogger('bitsandbytes.backends.cpu.ops').setLevel(
    logging.ERROR
)  # it takes our kernels.py for the hub's package of that name

ADAPTERS = ('full', 'lora', 'qlora')
NAMES = dict(
    c_attn=('q_proj', 'k_proj', 'v_proj')
)  # our Linear -> its members; others are one and the same
IN_MLA = dict(k_proj='kv_a_proj_with_mqa', v_proj='kv_b_proj')  # where MLA has what MHA calls so


class Group(nn.Module):
    """One Linear of a block as the Linears it consists of, `members`: views of one matrix, or in 4 bits."""

    def __init__(self, linear, names, widths):
        super().__init__()
        self.names, self.held = names, None
        self.splits = getattr(linear.weight, 'splits', widths)
        self.register_buffer('whole', linear.weight.detach(), persistent=False)
        biases = [None] * len(names) if linear.bias is None else linear.bias.detach().split(widths)
        for name, rows, bias in zip(names, self.whole.split(widths), biases):
            member = Linear(linear.in_features, len(rows), bias=bias is not None, device='meta')
            member.weight = nn.Parameter(rows, requires_grad=False)
            if bias is not None:
                member.bias = nn.Parameter(bias, requires_grad=False)
            setattr(self, name, member)

    @property
    def members(self):
        return [getattr(self, name) for name in self.names]

    @property
    def linears(self):
        """The members without their adapters."""
        return [getattr(member, 'base_layer', member) for member in self.members]

    @property
    def quantised(self):
        return self.whole is None

    @property
    def bias(self):
        biases = [linear.bias for linear in self.linears]
        return None if biases[0] is None else torch.cat([b.detach() for b in biases])

    def forward(self, x):
        if not self.quantised:
            bias = self.bias
            y = F.linear(x, self.whole.to(x.dtype), None if bias is None else bias.to(x.dtype))
        elif torch.compiler.is_compiling():
            bias = self.bias
            weights = [
                nf4(*parts, shape, x.dtype) for parts, shape in zip(self.parts(), self.shapes)
            ]
            y = F.linear(
                x,
                weights[0] if len(weights) == 1 else torch.cat(weights),
                None if bias is None else bias.to(x.dtype),
            )
        else:  # bitsandbytes' own, which keeps no dequantised weight for the backward pass
            y = (
                torch.cat([linear(x) for linear in self.linears], dim=-1)
                if len(self.names) > 1
                else self.linears[0](x)
            )
        return self.adapt(x, y)

    def adapt(self, x, y):
        """y plus what the adapters add. With dropout each member drops for itself, as in PEFT."""
        adapted = [member for member in self.members if hasattr(member, 'lora_A')]
        if not adapted:
            return y
        drops = self.training and any(
            isinstance(m.lora_dropout['default'], nn.Dropout) for m in adapted
        )
        if drops:
            low = [
                F.linear(m.lora_dropout['default'](x), m.lora_A['default'].weight.to(x.dtype))
                for m in adapted
            ]
        else:
            a = torch.cat([m.lora_A['default'].weight for m in adapted])
            low = F.linear(x, a.to(x.dtype)).split([m.r['default'] for m in adapted], dim=-1)
        low, added = iter(low), []
        for member, linear in zip(self.members, self.linears):
            if hasattr(member, 'lora_A'):
                b = member.lora_B['default'].weight * member.scaling['default']
                added.append(F.linear(next(low), b.to(x.dtype)))
            else:
                added.append(y.new_zeros(*y.shape[:-1], linear.out_features))
        return y + (added[0] if len(added) == 1 else torch.cat(added, dim=-1))

    def plain(self, x):
        """The same by PEFT's own layers: the reference of `forward`."""
        return torch.cat([member(x) for member in self.members], dim=-1)

    # -----------------------------------------------------------------------------------------------
    # weights

    @property
    def weight(self):
        """(out, in): the matrix that the group is, adapters and all, in full precision; MLA's absorbed decoding asks for it."""
        return self.merged() if self.held is None else self.held

    @torch.no_grad()
    def merged(self):
        rows = []
        for member, linear in zip(self.members, self.linears):
            w = dequantise(linear) if self.quantised else linear.weight
            if hasattr(member, 'lora_A'):
                w = (w.float() + member.get_delta_weight('default').float()).to(w.dtype)
            rows.append(w)
        return torch.cat(rows)

    def quantise(self, compute_dtype, double=True):
        for name, linear in zip(self.names, self.members):
            setattr(self, name, in_four_bits(linear, compute_dtype, double))
        self.whole = None
        self.shapes = [linear.weight.quant_state.shape for linear in self.linears]
        for i, linear in enumerate(self.linears):
            for n, part in enumerate(parts_of(linear)):
                self.register_buffer(
                    f'part_{i}_{n}', part, persistent=False
                )  # plain tensors: what torch.compile can read

    def parts(self):
        return [[getattr(self, f'part_{i}_{n}') for n in range(6)] for i in range(len(self.names))]


def split(model):
    """Every Linear of the blocks becomes a Group. The model is where it will stay: moving it would tear the views apart."""
    for block in model.transformer.h:
        for part in (block.attn, block.mlp):
            for name, linear in list(part.named_children()):
                if not isinstance(linear, nn.Linear):
                    continue
                names, widths = NAMES.get(name, (name,)), [linear.out_features]
                if name == 'c_attn':
                    widths = part.widths
                elif name == 'c_fc' and part.act == 'swiglu':
                    names, widths = ('gate_proj', 'up_proj'), [linear.out_features // 2] * 2
                elif name == 'c_proj':
                    names = ('o_proj',) if part is block.attn else ('down_proj',)
                elif name == 'c_fc':
                    names = ('up_proj',)
                setattr(part, name, Group(linear, names, widths))
    return groups(model)


def groups(model):
    return [module for module in model.modules() if isinstance(module, Group)]


def targets_of(model, wanted):
    """The members that `wanted` means ('all' or transformers' names with commas) in this model. UserError names what it has not."""
    known = list(dict.fromkeys(name for group in groups(model) for name in group.names))
    if wanted == 'all':
        return known
    names = [name.strip() for name in wanted.split(',')]
    names = list(
        dict.fromkeys(
            IN_MLA[name] if name not in known and IN_MLA.get(name) in known else name
            for name in names
        )
    )
    if unknown := [name for name in names if name not in known]:
        raise UserError(
            f"target '{unknown[0]}' is none of this model's Linears: use all, or some of {', '.join(known)}"
        )
    return names


def adapt(model, kind, r=32, alpha=16, dropout=0.0, targets='all', double=True):
    """
    Makes `model` (on its device, its stream set) trainable as `kind` says: 'full' all of it, 'lora' low-rank
    adapters alone, 'qlora' these over 4-bit weights. Adapters are fp32 whatever the base is; targets '': none. Returns the model.
    """
    if kind not in ADAPTERS:
        raise UserError(f"adapter '{kind}' is not known: use {', '.join(ADAPTERS)}")
    if kind == 'full':
        return model.requires_grad_(True)
    if r < 1 or not 0 <= dropout < 1:
        raise UserError(
            f'lora_r={r} must be at least 1 and lora_dropout={dropout} at least 0 and less than 1'
        )
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise UserError('LoRA needs peft: pip install -e .[adapters]') from None
    for group in split(model.requires_grad_(False)):
        if kind == 'qlora':
            group.quantise(model.stream, double)
    model.is_loaded_in_4bit = kind == 'qlora'  # what PEFT asks before it takes its 4-bit layer
    if not targets:
        return model
    members = rf'.*\.(attn|mlp)\.\w+\.({"|".join(targets_of(model, targets))})'  # of a group, not a group that has its member's name
    inject_adapter_in_model(
        LoraConfig(
            r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules=members, bias='none'
        ),
        model,
    )
    for p in model.parameters():
        if p.requires_grad:
            p.data = p.data.float()
    return model


def merge(model):
    """Groups become Linears again, adapters added to their weights (dequantised ones, too), in place."""
    for part in [part for block in model.transformer.h for part in (block.attn, block.mlp)]:
        for name, group in list(part.named_children()):
            if isinstance(group, Group):
                weight, bias = group.merged(), group.bias
                linear = Linear(
                    weight.size(1), weight.size(0), bias=bias is not None, device='meta'
                )
                linear.weight = nn.Parameter(weight)
                linear.weight.splits = group.splits
                if bias is not None:
                    linear.bias = nn.Parameter(bias)
                setattr(part, name, linear)
    return model


@contextmanager
def held_weights(model):
    """For decoding: matrices that attention asks for as such (MLA's kv_b_proj) are put together once, not once a token."""
    asked = [group for group in groups(model) if group.names == ('kv_b_proj',)]
    for group in asked:
        group.held = group.merged()
    try:
        yield
    finally:
        for group in asked:
            group.held = None


# ---------------------------------------------------------------------------------------------------
# 4 bits


def bitsandbytes():
    try:
        import bitsandbytes as bnb

        return bnb
    except ImportError:
        raise UserError(
            '4-bit weights need bitsandbytes: pip install -e .[adapters]'
        ) from None


def in_four_bits(linear, compute_dtype, double=True):
    """A Linear4bit by bitsandbytes with the weights of `linear` in NF4, its scales quantised, too, if `double`."""
    bnb, device = bitsandbytes(), linear.weight.device
    new = bnb.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None,
        compute_dtype=compute_dtype,
        compress_statistics=double,
        quant_type='nf4',
        device='meta',
    )
    new.weight = bnb.nn.Params4bit(
        linear.weight.detach().clone(),
        requires_grad=False,
        compress_statistics=double,
        quant_type='nf4',
        module=new,
    )
    new.bias = linear.bias
    new = new.to(device)
    new.support_avx512bf16_for_cpu = False  # else an evaluation repacks the weights there, and the next backward pass cuts the input's gradient
    return new


def dequantise(linear):
    """The weight of a Linear4bit, by bitsandbytes, in the dtype it was quantised from."""
    return bitsandbytes().functional.dequantize_4bit(linear.weight.data, linear.weight.quant_state)


def parts_of(linear):
    """What `nf4` wants of a Linear4bit, as plain tensors that share its memory: packed, codes, scales, codes and scales of the scales, offset."""
    state = linear.weight.quant_state
    packed = linear.weight.detach().as_subclass(torch.Tensor).flatten()
    if not state.nested:
        none = state.absmax.new_zeros(0)
        return packed, state.code, state.absmax, none, none, none
    return packed, state.code, state.absmax, state.state2.code, state.state2.absmax, state.offset


def nf4(packed, code, scales, code2, scales2, offset, shape, dtype):
    """
    Weights (out, in) of `dtype` from NF4: one of 16 levels for each, two a byte, the first in its upper half, times the
    scale of its block of 64. Double quantisation keeps scales as one of 256 levels times a scale of every 256, plus an
    offset. Plain operations: torch.compile makes one kernel of them, and runs it again backward instead of keeping weights.
    """
    if len(code2):
        block = len(scales) if not len(scales2) else 256
        scales = code2[scales.int()] * scales2.repeat_interleave(block)[: len(scales)] + offset
    level = torch.stack([packed >> 4, packed & 15], dim=-1).view(len(scales), -1)
    return (code[level.int()] * scales[:, None]).to(dtype).view(shape)


# ---------------------------------------------------------------------------------------------------
# what there is


def size(p):
    """Parameters as the model means them: a 4-bit tensor holds two in a byte."""
    state = getattr(p, 'quant_state', None)
    return state.shape.numel() if state is not None else p.numel()


def count(model):
    """(trainable, all) parameters, quantised ones counted as what they stand for."""
    params = list(model.parameters())
    return sum(p.numel() for p in params if p.requires_grad), sum(map(size, params))


def storage(model):
    """Bytes a parameter of the blocks' Linears, without adapters: weights, scales and their tables."""
    weights = [linear.weight for group in groups(model) for linear in group.linears] or [
        m.weight for m in model.transformer.h.modules() if isinstance(m, nn.Linear)
    ]

    def nbytes(w):
        state = getattr(w, 'quant_state', None)
        if state is None:
            return w.nbytes
        second = [state.state2.absmax, state.state2.code, state.offset] if state.nested else []
        return sum(t.nbytes for t in (w.data, state.absmax, state.code, *second))

    return sum(map(nbytes, weights)) / sum(map(size, weights))
