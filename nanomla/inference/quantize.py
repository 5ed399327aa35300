"""Numbers in 8 or 4 bits, in groups of channels with a scale and a zero each."""

from dataclasses import dataclass

import torch

FULL = dict(float32=torch.float32, bfloat16=torch.bfloat16, float16=torch.float16)
BITS = dict(int8=8, int4=4)
NEVER_QUANTISED = {'k_pe'}  # names of a cache's stores
UNEVEN = 8.0  # a group this much wider than most of its channels loses them
FEWEST_TOKENS = 8  # of which the ranges of channels are taken
MOST_TOKENS = 0.95  # the share of them that count
LEAST_WIDTH = 1e-2  # of a channel, as a share of the median of its group


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


@dataclass
class ChannelRanges:
    """
    Where each channel of the keys, values or latents lies: middle (C,) and width (C,).

    Some channels of trained models hold numbers many times those of others (KIVI, Liu et al. 2024,
    section 3). In a group with one of them, all others fall onto few codes. (x - middle) / width
    has channels of one size. A query takes up the widths of the keys, whose middle is the same for
    all of them, which a softmax does not see; a sum of values gets theirs back afterwards.
    """

    middle: torch.Tensor
    width: torch.Tensor

    @classmethod
    def of(cls, x: torch.Tensor) -> 'ChannelRanges | None':
        """
        Return the ranges of x (N, C); None where its channels are even, or N is small.

        A few tokens may be far from all others, such as a first one that most attend to: the middle
        is a median, and the width, twice the root mean square around it, leaves out the farthest.
        """
        if len(x) < FEWEST_TOKENS:
            return None
        x = x.float()
        middle = x.median(0).values
        near = (x - middle).abs().sort(0).values[: int(MOST_TOKENS * len(x))]
        width = 2 * near.square().mean(0).sqrt()
        group = (-1, group_of(x.size(1)))
        low, high = (middle - width).view(group), (middle + width).view(group)
        of_group = (high.amax(1) - low.amin(1)) / 2
        of_most = width.view(group).median(1, keepdim=True).values
        if not (of_group > UNEVEN * of_most[:, 0]).any():
            return None
        width = torch.maximum(width.view(group), LEAST_WIDTH * of_most).flatten()
        return cls(middle, width.clamp(min=1e-30))

    def even(self, x: torch.Tensor) -> torch.Tensor:
        """Return x (..., C) with channels of one size."""
        return ((x - self.middle) / self.width).to(x.dtype)

    def undo(self, x: torch.Tensor) -> torch.Tensor:
        return (x * self.width + self.middle).to(x.dtype)

    def of_query(self, q: torch.Tensor) -> torch.Tensor:
        """Return q (B, H, T, D) as it meets even keys, but for a constant of all keys."""
        return (q * self.by_head(self.width, q)).to(q.dtype)

    def of_sum(self, y: torch.Tensor) -> torch.Tensor:
        """Return the averages of values that y (B, H, T, D) are of even values."""
        return (y * self.by_head(self.width, y) + self.by_head(self.middle, y)).to(y.dtype)

    def by_head(self, channels: torch.Tensor, of_heads: torch.Tensor) -> torch.Tensor:
        """Return channels (K D,) of key/value heads as the query heads (B, H, T, D) meet them."""
        by_head = channels.view(-1, of_heads.size(-1))
        return by_head.repeat_interleave(of_heads.size(1) // len(by_head), dim=0)[:, None]
