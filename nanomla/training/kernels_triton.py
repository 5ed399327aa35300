"""
The Triton kernels of kernels.py, which launches them and has the plain PyTorch beside them.

    softmax_rows_kernel   cross-entropy and its gradient
    fp8_tiles_kernel      a matrix in fp8, and its transpose
    swiglu_kernel         the gradient of SwiGLU
    adamw_kernel          an update of AdamW for many tensors

Legend: N rows (batch x tokens), V columns (vocabulary). Logarithms are to base 2, because the GPU's
own exponential is 2^x. Products of N and V pass 2^31, so offsets of rows have 64 bits.
"""

import triton
import triton.language as tl


@triton.jit
def softmax_rows_kernel(
    logits_ptr,
    targets_ptr,
    loss_ptr,
    lse_ptr,
    V: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    LOG2E: tl.constexpr,
    GRADIENT: tl.constexpr,
):
    """
    Compute a row's cross-entropy and the log of its softmax's denominator; with GRADIENT overwrite
    its logits by their gradient. One row of logits (N, V) a program.

    Each lane has its own running maximum and sum over vectors of 16 bytes, so the row's threads
    meet once, at its end. The row's ragged rest comes first and, in the second pass, which runs
    backwards to find what is still cached, last: only there a mask is needed.
    """
    BLOCK: tl.constexpr = LANES * VECTOR
    FULL: tl.constexpr = V // BLOCK * BLOCK
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * V
    target = tl.load(targets_ptr + row)
    counts = target >= 0
    in_vocabulary = counts & (target < V)
    # Loaded before it is overwritten.
    target_logit = tl.load(logits_ptr + target, mask=in_vocabulary, other=float('nan'))
    target_logit = target_logit.to(tl.float32)
    cols = tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    in_rest = cols < V - FULL

    # maximum: of x log2(e), rounded up, because whole numbers subtract exactly; finite where a
    # lane has nothing. total: the sum of 2^(x log2(e) - maximum).
    x = tl.load(
        logits_ptr + FULL + cols, mask=in_rest, other=float('-inf'), eviction_policy='evict_last'
    ).to(tl.float32)
    maximum = tl.maximum(tl.ceil(tl.max(x, 1) * LOG2E), -1e38)
    total = tl.sum(tl.exp2(x * LOG2E - maximum[:, None]), 1)
    for start in tl.range(0, FULL, BLOCK, num_stages=NUM_STAGES):
        x = tl.load(logits_ptr + start + cols, eviction_policy='evict_last').to(tl.float32)
        higher = tl.maximum(maximum, tl.ceil(tl.max(x, 1) * LOG2E))
        of_tile = tl.sum(tl.exp2(x * LOG2E - higher[:, None]), 1)
        total = total * tl.exp2(maximum - higher) + of_tile
        maximum = higher
    row_maximum = tl.max(maximum, 0)
    log_total = tl.log2(tl.sum(total * tl.exp2(maximum - row_maximum), 0))
    loss = (row_maximum - target_logit * LOG2E + log_total) / LOG2E
    tl.store(loss_ptr + row, tl.where(counts, loss, 0.0))
    # Where the target does not count, inf: a softmax of zeros.
    lse = tl.where(counts, row_maximum + log_total, float('inf'))
    tl.store(lse_ptr + row, lse)

    if GRADIENT:
        dtype: tl.constexpr = logits_ptr.dtype.element_ty
        for done in tl.range(0, FULL, BLOCK, num_stages=NUM_STAGES):
            tile_ptr = logits_ptr + (FULL - BLOCK - done) + cols
            x = tl.load(tile_ptr, eviction_policy='evict_first').to(tl.float32)
            p = tl.exp2(x * LOG2E - lse).to(dtype)
            tl.store(tile_ptr, p, eviction_policy='evict_first')
        tile_ptr = logits_ptr + FULL + cols
        x = tl.load(tile_ptr, mask=in_rest, other=float('-inf'), eviction_policy='evict_first').to(
            tl.float32
        )
        p = tl.exp2(x * LOG2E - lse).to(dtype)
        tl.store(tile_ptr, p, mask=in_rest, eviction_policy='evict_first')
        # The target's element is written a second time, after all threads have written.
        tl.debug_barrier()
        of_target = tl.exp2(target_logit * LOG2E - lse) - 1
        tl.store(logits_ptr + target, of_target.to(dtype), mask=in_vocabulary)


@triton.jit
def fp8_tiles_kernel(
    source_ptr,
    factor_ptr,
    targets_ptr,
    out_ptr,
    out_t_ptr,
    N,
    V: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    LOG2E: tl.constexpr,
    SHIFT: tl.constexpr,
    SOFTMAX: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    """
    Write a tile of `source` (N, V) times the number at `factor` to out (N, V); with TRANSPOSED also
    to out_t (V, N). With SOFTMAX: of the gradient of logits, whose lse is `factor` (N,), times
    2^SHIFT.
    """
    rows = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    offsets = rows.to(tl.int64)[:, None] * V + cols[None, :]
    inside = (rows[:, None] < N) & (cols[None, :] < V)
    x = tl.load(source_ptr + offsets, mask=inside, other=0.0, eviction_policy='evict_first')
    # Split in halves and joined again: this changes nothing, but without it Triton 3.6 would
    # transpose whole bf16 tiles and do everything below twice.
    even, odd = tl.split(tl.reshape(x, [BLOCK_N, BLOCK_V // 2, 2]))
    y = tl.interleave(even.to(tl.float32), odd.to(tl.float32))
    if SOFTMAX:
        lse = tl.load(factor_ptr + rows, mask=rows < N, other=0.0) - SHIFT
        target = tl.load(targets_ptr + rows, mask=rows < N, other=-1).to(tl.int32)
        y = tl.exp2(y * LOG2E - lse[:, None])
        y = tl.where(cols[None, :] == target[:, None], y - 2.0**SHIFT, y)
    else:
        y = y * tl.load(factor_ptr)
    y = y.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + offsets, y, mask=inside)
    if TRANSPOSED:
        offsets_t = cols.to(tl.int64)[:, None] * N + rows[None, :]
        inside_t = (cols[:, None] < V) & (rows[None, :] < N)
        tl.store(out_t_ptr + offsets_t, tl.trans(y), mask=inside_t)


@triton.jit
def swiglu_kernel(
    source_ptr, gradient_ptr, out_ptr, numel, INNER: tl.constexpr, BLOCK: tl.constexpr
):
    """
    Write the gradient of gate | up (N, 2 INNER) to out, and overwrite the gradient (N, INNER) of
    silu(gate) up by silu(gate) up: BLOCK of its `numel` elements a program.
    """
    # A program's own offsets fit 32 bits when they are counted from its first row.
    start = tl.program_id(0).to(tl.int64) * BLOCK
    row = start // INNER
    offset = (start - row * INNER).to(tl.int32) + tl.arange(0, BLOCK)
    inside = offset < numel - row * INNER
    gate_offset = offset + offset // INNER * INNER  # a row of source is gate | up
    source_ptr += row * (2 * INNER)
    out_ptr += row * (2 * INNER)
    gradient_ptr += row * INNER
    gate = tl.load(source_ptr + gate_offset, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(source_ptr + gate_offset + INNER, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(gradient_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    sigmoid = 1 / (1 + tl.exp(-gate))
    silu = gate * sigmoid
    d_gate = g * up * (sigmoid + silu * (1 - sigmoid))
    tl.store(out_ptr + gate_offset, d_gate.to(out_ptr.dtype.element_ty), mask=inside)
    d_up = g * silu
    tl.store(out_ptr + gate_offset + INNER, d_up.to(out_ptr.dtype.element_ty), mask=inside)
    act = silu * up
    tl.store(gradient_ptr + offset, act.to(gradient_ptr.dtype.element_ty), mask=inside)


@triton.jit
def adamw_kernel(
    addresses_ptr,
    owners_ptr,
    first_programs_ptr,
    sizes_ptr,
    tensors,
    learning_rate,
    decay,
    mean_correction,
    root_correction,
    epsilon,
    BETA1: tl.constexpr,
    BETA2: tl.constexpr,
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """
    Update one block of one tensor: program p works for tensor owners[p].

    addresses (4, tensors): of weights, gradients, means of gradients, means of their squares;
    first_programs and sizes (tensors,): the number of a tensor's first program, and its elements.
    decay: 1 - rate * weight decay; the corrections of Adam's bias are factors of the mean and of
    the root. ALIGNED: all are whole blocks at multiples of 16 bytes.
    """
    tensor = tl.load(owners_ptr + tl.program_id(0))
    block = (tl.program_id(0) - tl.load(first_programs_ptr + tensor)).to(tl.int64)
    i = block * BLOCK + tl.arange(0, BLOCK)
    if ALIGNED:
        inside = tl.full([BLOCK], True, tl.int1)
    else:
        inside = i < tl.load(sizes_ptr + tensor)
    addresses_ptr += tensor
    weights_ptr = tl.load(addresses_ptr).to(tl.pointer_type(DTYPE))
    gradients_ptr = tl.load(addresses_ptr + tensors).to(tl.pointer_type(DTYPE))
    means_ptr = tl.load(addresses_ptr + 2 * tensors).to(tl.pointer_type(DTYPE))
    squares_ptr = tl.load(addresses_ptr + 3 * tensors).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        weights_ptr = tl.multiple_of(weights_ptr, 16)
        gradients_ptr = tl.multiple_of(gradients_ptr, 16)
        means_ptr = tl.multiple_of(means_ptr, 16)
        squares_ptr = tl.multiple_of(squares_ptr, 16)
    g = tl.load(gradients_ptr + i, mask=inside, eviction_policy='evict_first').to(tl.float32)
    m = tl.load(means_ptr + i, mask=inside, eviction_policy='evict_first').to(tl.float32)
    v = tl.load(squares_ptr + i, mask=inside, eviction_policy='evict_first').to(tl.float32)
    w = tl.load(weights_ptr + i, mask=inside, eviction_policy='evict_first').to(tl.float32)
    m += (g - m) * (1 - BETA1)
    v += (g * g - v) * (1 - BETA2)
    root = tl.sqrt(v) * root_correction + epsilon
    w = w * decay - learning_rate * mean_correction * m / root
    tl.store(means_ptr + i, m.to(DTYPE), mask=inside, eviction_policy='evict_first')
    tl.store(squares_ptr + i, v.to(DTYPE), mask=inside, eviction_policy='evict_first')
    tl.store(weights_ptr + i, w.to(DTYPE), mask=inside, eviction_policy='evict_first')
