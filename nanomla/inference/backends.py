"""
Attention of one new token over a cache by kernels of other libraries (`--decode_kernel=`):
FlexAttention of PyTorch, whose block mask is the block table, and FlashInfer and FlashMLA where
they are installed. They read full precision only.

    flex         dense or paged, every attention; masked slots are multiplied by zero, so they must
                 hold numbers
    flashinfer   paged, 16 bits, a GPU; MLA with 512 + 64; it plans every step on the host, so
                 nothing is recorded
    flashmla     paged by 64, 16 bits, a Hopper GPU; MLA with 512 + 64

Legend: B sequences (all rows of the cache), H heads, K key/value heads, N slots of a sequence.
"""

import math
import warnings
from functools import lru_cache
from importlib.util import find_spec
from itertools import accumulate, chain

import torch

from nanomla.core.configurator import UserError

PACKAGES = dict(
    flex=('torch', ''),
    flashinfer=('flashinfer', 'pip install flashinfer-python'),
    flashmla=('flash_mla', 'see github.com/deepseek-ai/FlashMLA'),
)
FLASHINFER_WORKSPACE = 128 * 2**20  # bytes
DENSE_BLOCK = 128  # slots of a FlexAttention block where there are no pages


def reason_not_to_run(name: str, cache) -> str:
    """Say why the kernel `name` cannot read `cache`, as far as is known untried; '' if it can."""
    package, hint = PACKAGES[name]
    if find_spec(package) is None:
        return f'{package} is not installed ({hint})'
    if any(store.bits for store in cache.stores):
        return f'it reads caches of full precision, not {cache.dtype}'
    if name == 'flex':
        return ''
    if not cache.pages:
        return 'it reads pages (--cache=paged)'
    if cache.device.type != 'cuda' or cache.stores[0].data[0].dtype.itemsize != 2:
        return 'it needs a CUDA GPU and 16-bit numbers'
    widths = [[store.width for store in layer.stores.values()] for layer in cache.layers]
    fits_mla = cache.holds_latents and all(pair == [512, 64] for pair in widths)
    if name == 'flashmla' and not fits_mla:
        return 'it is made for MLA with a latent of 512 and a rotated key of 64'
    if cache.holds_latents and not fits_mla:
        return 'its MLA kernel is made for a latent of 512 and a rotated key of 64'
    if name == 'flashmla' and cache.page_size != 64:
        return 'its pages have 64 tokens (--page_size=64)'
    return ''


def attend(name: str, layer, q, scale: float, q_pe=None):
    """As CacheLayer.attend_in_place. UserError with the library's reason where it refuses."""
    try:
        return BACKENDS[name](layer, q, scale, q_pe)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # compilers and kernels have errors of their own
        reason = ' '.join(f'{type(error).__name__}: {error}'.split())[:200]
        raise UserError(
            f'--decode_kernel={name} cannot run this model and cache: {reason}. '
            'Use --decode_kernel=auto'
        ) from error


# -------------------------------------------------------------------------------------------------
# FlexAttention


def flex_blocks(cache, lengths):
    """
    Return FlexAttention's block mask of what each sequence sees of the whole buffers: the pages
    that its block table lists, or, dense, the blocks of its own row. Only the last one is masked
    inside.
    """
    from torch.nn.attention.flex_attention import BlockMask

    page = cache.page_size if cache.pages else DENSE_BLOCK
    count = math.ceil(cache.size / page)
    nth = torch.arange(count, dtype=torch.int32, device=cache.device).expand(cache.rows, -1)
    if cache.pages:
        table, slots = cache.block_table, cache.slots
        # order[b, page]: which page of the sequence it is; one column more for unused pages
        listed = torch.where(nth * page < lengths[:, None], table, slots // page)
        order = torch.full_like(table[:, :1], cache.size).repeat(1, slots // page + 1)
        order.scatter_(1, listed.long(), nth)

        def seen(b, h, i, j):
            return order[b, j // page] * page + j % page < lengths[b]
    else:
        table, slots = nth, cache.size

        def seen(b, h, i, j):
            return j < lengths[b]

    whole = lengths // page
    last = table.gather(1, whole.clamp(max=count - 1)[:, None])
    return BlockMask.from_kv_blocks(
        (lengths % page > 0).int()[:, None, None],
        last.expand(-1, count)[:, None, None].contiguous(),
        whole.int()[:, None, None],
        table[:, None, None].contiguous(),
        BLOCK_SIZE=(128, page),
        seq_lengths=(1, slots),
        compute_q_blocks=False,
        mask_mod=seen,
    )


@lru_cache
def flex_kernel(device: str):
    from torch.nn.attention.flex_attention import flex_attention

    if device == 'cpu':  # nothing is compiled for a CPU, and that is meant
        warnings.filterwarnings('ignore', 'flex_attention called without')
        return flex_attention
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


def flex(layer, q, scale, q_pe):
    cache, current = layer.cache, layer.cache.current
    first, second = layer.stores.values()
    if 'blocks' not in current.backend_state:
        current.backend_state['blocks'] = flex_blocks(cache, current.lengths)

    def heads(buffer, D):  # (1, K, slots, D), or dense (B, K, N, D)
        by_row = buffer.unflatten(0, (1 if cache.pages else cache.rows, -1))
        return by_row.unflatten(-1, (-1, D)).transpose(1, 2)

    if layer.joint is None:
        k, v = heads(first.data[0], q.size(-1)), heads(second.data[0], q.size(-1))
    else:
        if q_pe is not None:
            q = torch.cat([q, q_pe], dim=-1)
        k, v = heads(layer.joint, q.size(-1)), heads(first.data[0], first.width)
        if not q.is_cuda:  # a CPU refuses keys and values that share storage
            v = v.clone()
    y = flex_kernel(q.device.type)(
        q,
        k.to(q.dtype),
        v.to(q.dtype),
        block_mask=current.backend_state['blocks'],
        scale=scale,
        enable_gqa=q.size(1) != k.size(1),
    )
    return torch.where(current.lengths[:, None, None, None] > 0, y, 0)


# -------------------------------------------------------------------------------------------------
# FlashInfer


def flashinfer(layer, q, scale, q_pe):
    cache, current = layer.cache, layer.cache.current
    first, second = layer.stores.values()
    k = first.data[0].unflatten(0, (-1, cache.page_size))  # (pages, page_size, width)
    v = second.data[0].unflatten(0, (-1, cache.page_size))
    wrapper = flashinfer_wrapper(cache, q.device)
    if 'planned' not in current.backend_state:  # once a step, for all layers
        current.backend_state['planned'] = True
        if cache.holds_latents:
            plan_flashinfer_mla(wrapper, cache, q, q_pe, scale)
        else:
            plan_flashinfer(wrapper, cache, q, first.width, scale)
    q = q[:, :, 0].contiguous()
    if cache.holds_latents:
        y = wrapper.run(q, q_pe[:, :, 0].contiguous(), k, v)
    else:
        D = q.size(-1)
        y = wrapper.run(q, (k.unflatten(-1, (-1, D)), v.unflatten(-1, (-1, D))))
    return y[:, :, None]


def flashinfer_wrapper(cache, device):
    """Return the library's object for this cache, which owns its workspace."""
    import flashinfer as library

    if 'flashinfer' not in cache.backend_state:
        workspace = torch.empty(FLASHINFER_WORKSPACE, dtype=torch.uint8, device=device)
        if cache.holds_latents:
            wrapper = library.mla.BatchMLAPagedAttentionWrapper(workspace)
        else:
            wrapper = library.BatchDecodeWithPagedKVCacheWrapper(workspace, 'NHD')
        cache.backend_state['flashinfer'] = wrapper
    return cache.backend_state['flashinfer']


def flashinfer_pages(cache, device):
    """
    Return lengths, where each sequence's pages begin, and the pages. An empty row reads a token of
    any page, and nobody reads what it gets.
    """
    pages = [own or [0] for own in cache.pages_of_row]
    lengths = [max(1, used) for used in cache.used]
    starts = torch.tensor([0, *accumulate(map(len, pages))], dtype=torch.int32)
    flat = list(chain.from_iterable(pages))
    return lengths, starts, torch.tensor(flat, dtype=torch.int32, device=device)


def plan_flashinfer(wrapper, cache, q, width, scale):
    H, D = q.size(1), q.size(-1)
    lengths, starts, pages = flashinfer_pages(cache, q.device)
    of_last = [(length - 1) % cache.page_size + 1 for length in lengths]
    wrapper.plan(
        starts,
        pages,
        torch.tensor(of_last, dtype=torch.int32),
        H,
        width // D,
        D,
        cache.page_size,
        q_data_type=q.dtype,
        kv_data_type=cache.stores[0].data[0].dtype,
        sm_scale=scale,
    )


def plan_flashinfer_mla(wrapper, cache, q, q_pe, scale):
    B, H, _, R = q.shape
    lengths, starts, pages = flashinfer_pages(cache, q.device)
    wrapper.plan(
        torch.arange(B + 1, dtype=torch.int32),
        starts,
        pages,
        torch.tensor(lengths, dtype=torch.int32),
        H,
        R,
        q_pe.size(-1),
        cache.page_size,
        False,
        scale,
        q.dtype,
        cache.stores[0].data[0].dtype,
    )


# -------------------------------------------------------------------------------------------------
# FlashMLA


def flashmla(layer, q, scale, q_pe):
    from flash_mla import flash_mla_with_kvcache, get_mla_metadata

    cache, current, H = layer.cache, layer.cache.current, q.size(1)
    lengths = current.lengths.clamp(min=1).int()
    if 'schedule' not in current.backend_state:
        current.backend_state['schedule'] = get_mla_metadata(lengths, H, 1)
    y, _ = flash_mla_with_kvcache(
        torch.cat([q, q_pe], dim=-1).transpose(1, 2).contiguous(),
        layer.joint.unflatten(0, (-1, 64))[:, :, None],
        cache.block_table,
        lengths,
        512,
        *current.backend_state['schedule'],
        softmax_scale=scale,
    )
    return y.transpose(1, 2)


BACKENDS = dict(flex=flex, flashinfer=flashinfer, flashmla=flashmla)
