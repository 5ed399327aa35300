"""
Attention of one new token over a cache by other people's kernels, each chosen by name (`--decode_kernel=`): FlexAttention of
PyTorch, whose block mask is the page table, and FlashInfer and FlashMLA where they are installed. They read full precision only.

    flex         dense or paged, every attention. Masked places are multiplied by zero, so they must hold numbers.
    flashinfer   paged, 16 bits, a GPU; MLA with 512 + 64. It plans every step on the host, so that nothing is recorded.
    flashmla     paged by 64, 16 bits, a GPU of the Hopper kind; MLA with 512 + 64

Legend: B sequences (all slots of the cache), H heads, K key/value heads, N places of a sequence.
"""

import warnings
from functools import lru_cache
from importlib.util import find_spec
from itertools import accumulate

import torch

from nanomla.core.configurator import UserError

PACKAGES = dict(
    flex=('torch', ''),
    flashinfer=('flashinfer', 'pip install flashinfer-python'),
    flashmla=('flash_mla', 'see github.com/deepseek-ai/FlashMLA'),
)
WORKSPACE = 128 * 2**20  # bytes that FlashInfer asks for
BLOCK = 128  # places of a block where there are no pages


def reason_not_to_run(name, cache):
    """Why the kernel `name` cannot read `cache`, as text; '' when it can as far as is known before it is tried."""
    package, how = PACKAGES[name]
    if find_spec(package) is None:
        return f'{package} is not installed ({how})'
    if any(store.bits for store in cache.stores):
        return f'it reads caches of full precision, not {cache.dtype}'
    if name == 'flex':
        return ''
    if not cache.pages:
        return 'it reads pages (--cache=paged)'
    if cache.device.type != 'cuda' or cache.stores[0].places[0].dtype.itemsize != 2:
        return 'it needs a CUDA GPU and 16-bit numbers'
    latent = 'c_kv' in cache.layers[0].stores
    if (latent or name == 'flashmla') and any(
        [store.width for store in layer.stores.values()] != [512, 64] or not latent
        for layer in cache.layers
    ):
        return (
            'it is made for MLA with a latent of 512 and a rotated key of 64'
            + ', and for MHA, GQA and MQA' * (name == 'flashinfer')
        )
    return (
        'its pages have 64 tokens (--page_size=64)'
        if name == 'flashmla' and cache.page_size != 64
        else ''
    )


def attend(name, layer, q, scale, q_pe):
    """As Layer.attend (cache.py). UserError with the library's reason where it refuses."""
    try:
        return dict(flex=flex, flashinfer=flashinfer, flashmla=flashmla)[name](
            layer, q, scale, q_pe
        )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # compilers and kernels have errors of their own
        told = ' '.join(f'{type(error).__name__}: {error}'.split())[:200]
        raise UserError(
            f'--decode_kernel={name} cannot run this model and cache: {told}. Use --decode_kernel=auto'
        ) from error


# ---------------------------------------------------------------------------------------------------


def flex_blocks(cache, lengths):
    """
    What each sequence sees of the whole buffers, as FlexAttention's block mask: the pages that its table lists, or, dense, the
    blocks of its own row. Only the last one is masked inside.
    """
    from torch.nn.attention.flex_attention import BlockMask

    page, device = cache.page_size if cache.pages else BLOCK, cache.device
    count = -(-cache.size // page)
    nth = torch.arange(count, dtype=torch.int32, device=device).expand(cache.slots, -1)
    if cache.pages:
        table, places = cache.table, cache.places
        held = torch.where(
            nth * page < lengths[:, None], table, places // page
        )  # a column behind the last page takes what is not held
        order = torch.full(
            (cache.slots, places // page + 1), cache.size, dtype=torch.int32, device=device
        )  # which page of the sequence each is
        order.scatter_(1, held.long(), nth)

        def seen(b, h, i, j):
            return order[b, j // page] * page + j % page < lengths[b]
    else:
        table, places = nth, cache.size

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
        seq_lengths=(1, places),
        compute_q_blocks=False,
        mask_mod=seen,
    )


@lru_cache
def flex_kernel(device):
    from torch.nn.attention.flex_attention import flex_attention

    if device == 'cpu':
        warnings.filterwarnings(
            'ignore', 'flex_attention called without'
        )  # here that is meant: nothing is compiled for a CPU
        return flex_attention
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


def flex(layer, q, scale, q_pe):
    cache, stores = layer.cache, list(layer.stores.values())
    if getattr(cache.now, 'blocks', None) is None:
        cache.now.blocks = flex_blocks(cache, cache.now.lengths)

    def heads(buffer, D):  # (1, K, places, D), or dense (B, K, N, D)
        return (
            buffer.unflatten(0, (1 if cache.pages else cache.slots, -1))
            .unflatten(-1, (-1, D))
            .transpose(1, 2)
        )

    if layer.joint is None:
        k, v = (heads(store.places[0], q.size(-1)) for store in stores)
    else:
        q = q if q_pe is None else torch.cat([q, q_pe], dim=-1)
        k, v = heads(layer.joint, q.size(-1)), heads(stores[0].places[0], stores[0].width)
        v = v if q.is_cuda else v.clone()  # a CPU refuses keys and values that share storage
    y = flex_kernel(q.device.type)(
        q,
        k.to(q.dtype),
        v.to(q.dtype),
        block_mask=cache.now.blocks,
        scale=scale,
        enable_gqa=q.size(1) != k.size(1),
    )
    return torch.where(cache.now.lengths[:, None, None, None] > 0, y, 0)


def flashinfer(layer, q, scale, q_pe):
    import flashinfer as library

    cache, (first, second) = layer.cache, layer.stores.values()
    B, H, _, D = q.shape
    if not hasattr(cache, 'planner'):
        workspace = torch.empty(WORKSPACE, dtype=torch.uint8, device=q.device)
        cache.planner = (
            library.BatchDecodeWithPagedKVCacheWrapper(workspace, 'NHD')
            if q_pe is None
            else library.mla.BatchMLAPagedAttentionWrapper(workspace)
        )
    k, v = (
        store.places[0].unflatten(0, (-1, cache.page_size)) for store in (first, second)
    )  # (pages, page_size, width)
    if not getattr(cache.now, 'is_planned', False):  # once a step, for all layers
        cache.now.is_planned = True
        pages = [
            held or [0] for held in cache.held_by
        ]  # an empty slot reads a token of any page, and nobody reads what it gets
        lengths = [max(1, used) for used in cache.used]
        starts = torch.tensor([0, *accumulate(map(len, pages))], dtype=torch.int32)
        indices = torch.tensor(sum(pages, []), dtype=torch.int32, device=q.device)
        if q_pe is None:
            of_last = torch.tensor(
                [(length - 1) % cache.page_size + 1 for length in lengths], dtype=torch.int32
            )
            cache.planner.plan(
                starts,
                indices,
                of_last,
                H,
                first.width // D,
                D,
                cache.page_size,
                q_data_type=q.dtype,
                kv_data_type=k.dtype,
                sm_scale=scale,
            )
        else:
            cache.planner.plan(
                torch.arange(B + 1, dtype=torch.int32),
                starts,
                indices,
                torch.tensor(lengths, dtype=torch.int32),
                H,
                D,
                q_pe.size(-1),
                cache.page_size,
                False,
                scale,
                q.dtype,
                k.dtype,
            )
    if q_pe is None:
        y = cache.planner.run(
            q[:, :, 0].contiguous(), tuple(t.unflatten(-1, (-1, D)) for t in (k, v))
        )
    else:
        y = cache.planner.run(q[:, :, 0].contiguous(), q_pe[:, :, 0].contiguous(), k, v)
    return y[:, :, None]


def flashmla(layer, q, scale, q_pe):
    from flash_mla import flash_mla_with_kvcache, get_mla_metadata

    cache, H = layer.cache, q.size(1)
    lengths = cache.now.lengths.clamp(min=1).int()
    if getattr(cache.now, 'schedule', None) is None:
        cache.now.schedule = get_mla_metadata(lengths, H, 1)
    y, _ = flash_mla_with_kvcache(
        torch.cat([q, q_pe], dim=-1).transpose(1, 2).contiguous(),
        layer.joint.unflatten(0, (-1, 64))[:, :, None],
        cache.table,
        lengths,
        512,
        *cache.now.schedule,
        softmax_scale=scale,
    )
    return y.transpose(1, 2)
