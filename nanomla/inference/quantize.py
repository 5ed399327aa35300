"""Numbers in 8 or 4 bits, in groups of channels with a scale and a zero each."""

import torch

FULL = dict(float32=torch.float32, bfloat16=torch.bfloat16, float16=torch.float16)
BITS = dict(int8=8, int4=4)
NEVER_QUANTISED = {'k_pe'}  # names of a cache's stores


def group_of(width: int) -> int:
    """Return how many channels share a scale: the largest divisor of `width` up to 64."""
    return next(size for size in range(min(width, 64), 0, -1) if width % size == 0)


def quantise(x: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Return x (..., C) as codes, uint8 (..., ceil(C bits / 8)), and scales, fp16 (..., 2 C / group):
    scale and zero of each group in turn. x ≈ codes · scale + zero.

    Zero is rounded down and the scale up, so that every x within fp16's range has a code at most
    half a step (scale / 2) away. With 4 bits an even channel is in the low half of a byte.
    """
    x = x.float().unflatten(-1, (-1, group_of(x.size(-1))))
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    top = 2**bits - 1
    zero = (low - low.abs() * 2**-10 - 2**-24).half()
    scale = (high - zero.float()) / top * (1 + 2**-10)
    scale = scale.clamp(min=2**-14).half()  # fp16's least normal number
    codes = ((x - zero.float()) / scale.float()).round().clamp(0, top).to(torch.uint8).flatten(-2)
    if bits == 4:
        codes = torch.nn.functional.pad(codes, (0, codes.size(-1) % 2))
        codes = codes[..., ::2] | codes[..., 1::2] << 4
    return codes, torch.cat([scale, zero], dim=-1).flatten(-2)


def dequantise(codes: torch.Tensor, scales: torch.Tensor, width: int, bits: int) -> torch.Tensor:
    """Return what `quantise` made codes and scales of, (..., width) in fp32."""
    if bits == 4:
        codes = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(-2)[..., :width]
    x = codes.unflatten(-1, (-1, group_of(width))).float()
    scale, zero = scales.float().unflatten(-1, (-1, 1, 2)).unbind(-1)
    return (x * scale + zero).flatten(-2)
