"""
The Triton kernels of fused_step.py, which launches them and has the plain PyTorch beside them.

    linear_kernel   act(norm(x) weightᵀ + bias) + residual for one sequence
    norm_kernel     the norm of several rows
    four kernels    that draw a token from its logits, see below

Legend: C channels in, N channels out, H heads, V vocabulary. Logarithms are to base 2, because
the GPU's own exponential is 2^x.
"""

import triton
import triton.language as tl

# -------------------------------------------------------------------------------------------------
# norm and linear


@triton.jit
def norm_row(
    row,
    gain_ptr,
    shift_ptr,
    eps,
    c,
    C: tl.constexpr,
    NORM: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
):
    """Return the norm ('rmsnorm' or 'layernorm') of a row (C,) of channels c, in its dtype."""
    x = row.to(tl.float32)
    mean = tl.sum(x, 0) / C if NORM == 'layernorm' else 0.0
    centered = tl.where(c < C, x - mean, 0.0)
    scale = tl.rsqrt(tl.sum(centered * centered, 0) / C + eps)
    gain = tl.load(gain_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    y = centered * scale * gain
    if HAS_SHIFT:
        y += tl.load(shift_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    return y.to(row.dtype)


@triton.jit
def linear_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    gain_ptr,
    shift_ptr,
    residual_ptr,
    out_ptr,
    eps,
    x_head_stride,
    weight_head_stride,
    weight_out_stride,
    weight_in_stride,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    N: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NORM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    ACT: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
):
    """
    Multiply the row x (H, C) of one sequence by weight (H, N, C), each head's own: program (BLOCK_N
    outputs, head).

    swiglu's weight is gate | up, (2 N, C). All rows of the weight are asked for at once, before
    anything is computed.
    """
    head = tl.program_id(1)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    c = tl.arange(0, BLOCK_C)
    inside = (n[:, None] < N) & (c[None, :] < C)
    rows_ptr = weight_ptr + head * weight_head_stride
    rows_ptr = rows_ptr + n[:, None] * weight_out_stride + c[None, :] * weight_in_stride
    weight = tl.load(rows_ptr, mask=inside, other=0.0)
    if ACT == 'swiglu':
        up_weight = tl.load(rows_ptr + N * weight_out_stride, mask=inside, other=0.0)
    row = tl.load(x_ptr + head * x_head_stride + c, mask=c < C, other=0.0)
    if NORM != '':
        row = norm_row(row, gain_ptr, shift_ptr, eps, c, C, NORM, HAS_SHIFT)
    row = row.to(tl.float32)
    y = tl.sum(weight.to(tl.float32) * row[None, :], 1)
    if HAS_BIAS:
        y += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)
    if ACT == 'swiglu':
        up = tl.sum(up_weight.to(tl.float32) * row[None, :], 1)
        if HAS_BIAS:
            up += tl.load(bias_ptr + N + n, mask=n < N, other=0.0).to(tl.float32)
        y = y * tl.sigmoid(y) * up
    elif ACT == 'gelu':
        y = 0.5 * y * (1 + tl.erf(y * 0.7071067811865476))
    elif ACT == 'gelu_tanh':
        # 1 + tanh(z) = 2 sigmoid(2 z)
        y = y * tl.sigmoid(1.5957691216057308 * (y + 0.044715 * y * y * y))
    elif ACT == 'relu2':
        y = tl.maximum(y, 0.0) * tl.maximum(y, 0.0)
    if HAS_RESIDUAL:
        y += tl.load(residual_ptr + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(out_ptr + head * N + n, y.to(out_ptr.dtype.element_ty), mask=n < N)


@triton.jit
def norm_kernel(
    x_ptr,
    gain_ptr,
    shift_ptr,
    out_ptr,
    eps,
    row_stride,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    NORM: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
):
    """Write the norm of a row of x (B, C) to out (B, C): one program a row."""
    b = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK_C)
    row = tl.load(x_ptr + b * row_stride + c, mask=c < C, other=0.0)
    y = norm_row(row, gain_ptr, shift_ptr, eps, c, C, NORM, HAS_SHIFT)
    tl.store(out_ptr + b * C + c, y, mask=c < C)


# -------------------------------------------------------------------------------------------------
# drawing a token
#
# A logit of 16 bits is one of 65,536 numbers, so the k-th largest is found without sorting: counts
# of the high bytes say which high byte it has, counts of the low bytes among the logits with that
# one say the rest. A row is cut into parts of BLOCK_V logits, a program each. There are four
# kernels, since each needs what all programs before it found:
#
#     count_high_kernel   counts of high bytes (B, parts, 256), largest logits (B, parts)
#     count_low_kernel    counts of low bytes (B, parts, 256)
#     sum_kernel          sums of probabilities (B, parts), the k-th largest keys (B,)
#     draw_kernel         tokens (B,)


@triton.jit
def sort_key(x):
    """
    Return whole numbers from 0 to 65,535 in the order of x, floats of 16 bits: their bits, with
    those of the negative ones inverted.
    """
    bits = x.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    return tl.where(bits >= 0x8000, 0xFFFF - bits, bits + 0x8000)


@triton.jit
def load_part(logits_ptr, row_stride, V, BLOCK_V: tl.constexpr):
    """Load this program's part: logits in fp32, -inf after the last, and their sort keys."""
    i = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    row_ptr = logits_ptr + tl.program_id(1).to(tl.int64) * row_stride
    x = tl.load(row_ptr + i, mask=i < V, other=float('-inf'))
    return x.to(tl.float32), sort_key(x)


@triton.jit
def kth_byte(counts_ptr, parts, k, BLOCK_PARTS: tl.constexpr):
    """
    Return the byte of the k-th largest of a row, by counts (parts, 256) of each byte, and how many
    have a larger one.
    """
    s = tl.arange(0, BLOCK_PARTS)
    n = tl.arange(0, 256)
    counts = tl.load(counts_ptr + s[:, None] * 256 + n[None, :], mask=s[:, None] < parts, other=0)
    counts = tl.sum(counts, 0)
    at_least = tl.sum(counts, 0) - tl.cumsum(counts, 0) + counts  # with this byte or a larger one
    byte = tl.sum((at_least >= k).to(tl.int32), 0) - 1
    return byte, tl.sum(tl.where(n > byte, counts, 0), 0)


@triton.jit
def load_largest(largest_ptr, row, parts, BLOCK_PARTS: tl.constexpr):
    """Return the largest logit of a row."""
    s = tl.arange(0, BLOCK_PARTS)
    largest = tl.load(largest_ptr + row * parts + s, mask=s < parts, other=float('-inf'))
    return tl.max(largest, 0)


@triton.jit
def probability(x, key, largest, least_key, inverse_temperature):
    """
    Return the probability of logits x, but for a factor that is the row's own; 0 below the k-th
    largest. inverse_temperature is times log2(e).
    """
    return tl.where(key >= least_key, tl.exp2((x - largest) * inverse_temperature), 0.0)


@triton.jit
def count_high_kernel(
    logits_ptr, high_counts_ptr, largest_ptr, row_stride, V, BLOCK_V: tl.constexpr
):
    """Count each high byte of a part, and find its largest logit: program (part, row)."""
    x, key = load_part(logits_ptr, row_stride, V, BLOCK_V)
    part = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    counts = tl.histogram(key >> 8, 256)
    tl.store(high_counts_ptr + part * 256 + tl.arange(0, 256), counts)
    tl.store(largest_ptr + part, tl.max(x, 0))


@triton.jit
def count_low_kernel(
    logits_ptr,
    high_counts_ptr,
    low_counts_ptr,
    row_stride,
    V,
    k,
    BLOCK_V: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
):
    """Count each low byte of a part's logits that have the high byte of the k-th largest."""
    parts = tl.num_programs(0)
    row = tl.program_id(1)
    high, _ = kth_byte(high_counts_ptr + row * parts * 256, parts, k, BLOCK_PARTS)
    x, key = load_part(logits_ptr, row_stride, V, BLOCK_V)
    counts = tl.histogram(key & 255, 256, key >> 8 == high)
    part = row * parts + tl.program_id(0)
    tl.store(low_counts_ptr + part * 256 + tl.arange(0, 256), counts)


@triton.jit
def sum_kernel(
    logits_ptr,
    high_counts_ptr,
    low_counts_ptr,
    largest_ptr,
    least_keys_ptr,
    sums_ptr,
    row_stride,
    V,
    k,
    inverse_temperature,
    BLOCK_V: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
):
    """
    Sum the probabilities of a part; the first program of a row also writes the key of the k-th
    largest.
    """
    parts = tl.num_programs(0)
    row = tl.program_id(1)
    high, larger = kth_byte(high_counts_ptr + row * parts * 256, parts, k, BLOCK_PARTS)
    low, _ = kth_byte(low_counts_ptr + row * parts * 256, parts, k - larger, BLOCK_PARTS)
    least_key = high * 256 + low
    largest = load_largest(largest_ptr, row, parts, BLOCK_PARTS)
    x, key = load_part(logits_ptr, row_stride, V, BLOCK_V)
    p = probability(x, key, largest, least_key, inverse_temperature)
    tl.store(sums_ptr + row * parts + tl.program_id(0), tl.sum(p, 0))
    if tl.program_id(0) == 0:
        tl.store(least_keys_ptr + row, least_key)


@triton.jit
def draw_kernel(
    logits_ptr,
    largest_ptr,
    least_keys_ptr,
    sums_ptr,
    draws_ptr,
    tokens_ptr,
    row_stride,
    V,
    parts,
    inverse_temperature,
    BLOCK_V: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
):
    """
    Find the first token up to which the probability is more than was drawn, in the part where it
    must be: one program a row. Of zero probability no token is chosen, whatever rounding does.
    """
    row = tl.program_id(0)
    s = tl.arange(0, BLOCK_PARTS)
    sums = tl.load(sums_ptr + row * parts + s, mask=s < parts, other=0.0)
    target = tl.sum(sums, 0) * tl.load(draws_ptr + row)
    up_to = tl.cumsum(sums, 0)
    first_part = tl.min(tl.where((sums > 0) & (up_to > target), s, BLOCK_PARTS), 0)
    last_part = tl.max(tl.where(sums > 0, s, 0), 0)
    part = tl.minimum(first_part, last_part)

    largest = load_largest(largest_ptr, row, parts, BLOCK_PARTS)
    i = part * BLOCK_V + tl.arange(0, BLOCK_V)
    x = tl.load(logits_ptr + row.to(tl.int64) * row_stride + i, mask=i < V, other=float('-inf'))
    least_key = tl.load(least_keys_ptr + row)
    p = probability(x.to(tl.float32), sort_key(x), largest, least_key, inverse_temperature)
    before_part = tl.sum(tl.where(s == part, up_to - sums, 0.0), 0)
    inside = (p > 0) & (before_part + tl.cumsum(p, 0) > target)
    first_token = tl.min(tl.where(inside, i, 2147483647), 0)
    last_token = tl.max(tl.where(p > 0, i, 0), 0)
    tl.store(tokens_ptr + row, tl.minimum(first_token, last_token).to(tl.int64))
