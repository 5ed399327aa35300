"""
backends.py: every kernel gives the logits of the model without a cache. Libraries that are not
installed are replaced by PyTorch.
"""

import re
import sys
from types import ModuleType

import pytest
import torch

from nanomla.core.configurator import UserError
from nanomla.inference import backends
from nanomla.inference.cache import Cache
from nanomla.inference.generate import prefill

MODELS = dict(
    mha=('mha', dict(pos='rope')),
    gqa=('mha', dict(pos='learned', n_kv_head=2)),
    mqa=('mha', dict(pos='rope', n_kv_head=1)),
    mla=('mla', {}),
    mla_without_rope=('mla', dict(qk_rope_head_dim=0, pos='none')),
)
LAYOUTS = dict(dense={}, paged=dict(layout='paged', page_size=16))


@torch.no_grad()
def decode_error(model, cache, texts, steps):
    """
    Return the largest difference of logits, decoding `steps` tokens of texts (equally long or not)
    by the cache, from those without one.
    """
    if cache.pages:
        cache.pages.free = cache.pages.free[::2] + cache.pages.free[1::2]
    prefill(model, [text[:-steps] for text in texts], cache)
    worst = 0
    for left in range(steps, 0, -1):
        got = model(torch.tensor([[text[-left]] for text in texts]), context=cache)[:, -1]
        for row, text in enumerate(texts):
            so_far = text[: len(text) - left + 1]
            want = model(torch.tensor([so_far]))[0, -1]
            worst = max(worst, (got[row] - want).abs().max().item())
    return worst


TEXTS = [
    [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8, 4],
    [7, 1, 2, 3, 4, 5],
    [2, 7, 1, 8, 2, 8, 1, 8, 2],
]


def kind_params():
    """Return the names of the models; all but two are slow."""
    params = []
    for name in MODELS:
        marks = () if name in ('gqa', 'mla') else pytest.mark.slow
        params.append(pytest.param(name, marks=marks))
    return params


@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('kind', kind_params())
def test_flex_is_exact(kind, layout, tiny):
    model_kind, settings = MODELS[kind]
    model = tiny(model_kind, n_layer=1, **settings)
    cache = Cache.of(model, 3, 24, kernel='flex', static=True, **LAYOUTS[layout])
    nbytes = cache.nbytes
    assert decode_error(model, cache, TEXTS, 2) < 1e-4 and cache.kernel == 'flex'
    plain = Cache.of(model, 3, 24, kernel='torch', **LAYOUTS[layout])
    assert nbytes == cache.nbytes == plain.nbytes


def test_flex_shares_pages_and_leaves_empty_slots_alone(tiny):
    model = tiny('mla')
    cache = Cache.of(model, 3, 24, layout='paged', page_size=16, kernel='flex')
    with torch.no_grad():
        prefill(model, [TEXTS[0][:18]], cache, [1])
        cache.fork(1, 2)
        cache.plan([0, 1, 1])
        got = model(torch.tensor([[0], [5], [6]]), context=cache)
        want = model(torch.tensor([TEXTS[0][:18] + [5], TEXTS[0][:18] + [6]]))[:, -1]
    assert not cache.used[0] and not got.isnan().any()
    torch.testing.assert_close(got[1:, -1], want, rtol=0, atol=1e-4)


def test_what_a_kernel_refuses_is_one_line(tiny, monkeypatch):
    model = tiny('mla')
    monkeypatch.setattr(backends, 'flex_kernel', lambda device: 1 / 0)
    cache = Cache.of(model, 1, 24, kernel='flex')
    message = (
        '^--decode_kernel=flex cannot run this model and cache: '
        'ZeroDivisionError: division by zero. Use'
    )
    with torch.no_grad(), pytest.raises(UserError, match=message):
        decode_error(model, cache, [[1, 2, 3]], 1)


# -------------------------------------------------------------------------------------------------
# FlashInfer and FlashMLA as their documentations describe them, in PyTorch


def attention(q, k, v, scale):
    """Return the attention of q (H, D) over k (N, K, D) and v (N, K, Dv)."""
    k, v = (t.repeat_interleave(len(q) // t.size(1), dim=1) for t in (k, v))
    weights = (torch.einsum('hd,nhd->hn', q, k) * scale).softmax(-1)
    return torch.einsum('hn,nhd->hd', weights, v)


def tokens_of(buffer, pages, length):
    """Return the first `length` tokens of the pages of a buffer (pages, page_size, ...)."""
    return buffer[pages.long()].flatten(0, 1)[:length]


class FlashInferDecode:
    """BatchDecodeWithPagedKVCacheWrapper."""

    def __init__(self, workspace, kv_layout):
        assert workspace.dtype == torch.uint8 and kv_layout == 'NHD'

    def plan(
        self,
        indptr,
        indices,
        last_page_len,
        num_qo_heads,
        num_kv_heads,
        head_dim,
        page_size,
        q_data_type=None,
        kv_data_type=None,
        sm_scale=None,
    ):
        assert indptr.dtype == indices.dtype == last_page_len.dtype == torch.int32
        assert last_page_len.min() >= 1 and last_page_len.max() <= page_size
        assert len(indices) == indptr[-1] and indptr.diff().min() >= 1
        self.starts, self.pages = indptr, indices
        self.lengths = (indptr.diff() - 1) * page_size + last_page_len
        self.scale = sm_scale
        self.query_shape = (num_qo_heads, head_dim)
        self.page_shape = (page_size, num_kv_heads, head_dim)

    def run(self, q, paged_kv_cache):
        assert q.shape[1:] == self.query_shape and q.is_contiguous()
        results = []
        for b, query in enumerate(q):
            pages = self.pages[self.starts[b] : self.starts[b + 1]]
            for buffer in paged_kv_cache:
                assert buffer.shape[1:] == self.page_shape
            k, v = (tokens_of(buffer, pages, self.lengths[b]) for buffer in paged_kv_cache)
            results.append(attention(query, k, v, self.scale))
        return torch.stack(results)


class FlashInferMLA:
    """BatchMLAPagedAttentionWrapper."""

    def __init__(self, float_workspace_buffer):
        pass

    def plan(
        self,
        qo_indptr,
        kv_indptr,
        kv_indices,
        kv_len_arr,
        num_heads,
        head_dim_ckv,
        head_dim_kpe,
        page_size,
        causal,
        sm_scale,
        q_data_type,
        kv_data_type,
    ):
        assert qo_indptr.tolist() == list(range(len(kv_len_arr) + 1)) and not causal
        self.starts, self.pages, self.lengths = kv_indptr, kv_indices, kv_len_arr
        self.scale = sm_scale
        self.heads, self.page_size = num_heads, page_size
        self.widths = (head_dim_ckv, head_dim_kpe)

    def run(self, q_nope, q_pe, ckv_cache, kpe_cache):
        R, P = self.widths
        assert q_nope.shape[1:] == (self.heads, R) and q_pe.shape[1:] == (self.heads, P)
        assert ckv_cache.shape[1:] == (self.page_size, R)
        assert kpe_cache.shape[1:] == (self.page_size, P)
        results = []
        for b, query in enumerate(torch.cat([q_nope, q_pe], dim=-1)):
            pages = self.pages[self.starts[b] : self.starts[b + 1]]
            c_kv = tokens_of(ckv_cache, pages, self.lengths[b])[:, None]
            k_pe = tokens_of(kpe_cache, pages, self.lengths[b])[:, None]
            keys = torch.cat([c_kv, k_pe], dim=-1)
            results.append(attention(query, keys, c_kv, self.scale))
        return torch.stack(results)


def get_mla_metadata(cache_seqlens, heads, kv_heads):
    return 'schedule', None


def flash_mla_with_kvcache(
    q,
    k_cache,
    block_table,
    cache_seqlens,
    head_dim_v,
    tile_scheduler_metadata,
    num_splits=None,
    softmax_scale=None,
    causal=False,
):
    assert tile_scheduler_metadata == 'schedule' and num_splits is None
    assert block_table.dtype == cache_seqlens.dtype == torch.int32
    assert q.is_contiguous() and q.size(1) == 1
    assert k_cache.shape[1:] == (64, 1, q.size(-1))
    results = []
    for query, pages, length in zip(q[:, 0], block_table, cache_seqlens):
        k = tokens_of(k_cache, pages, length)
        results.append(attention(query, k, k[..., :head_dim_v], softmax_scale)[None])
    return torch.stack(results), None


@pytest.fixture
def installed(monkeypatch):
    """Both libraries can be imported."""
    flashinfer = ModuleType('flashinfer')
    flashinfer.mla = ModuleType('flashinfer.mla')
    flashinfer.BatchDecodeWithPagedKVCacheWrapper = FlashInferDecode
    flashinfer.mla.BatchMLAPagedAttentionWrapper = FlashInferMLA
    flash_mla = ModuleType('flash_mla')
    flash_mla.flash_mla_with_kvcache = flash_mla_with_kvcache
    flash_mla.get_mla_metadata = get_mla_metadata
    for module in (flashinfer, flashinfer.mla, flash_mla):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(backends, 'find_spec', lambda name: True)
    monkeypatch.setattr(backends, 'FLASHINFER_WORKSPACE', 16)


@pytest.mark.parametrize(
    'name, kind',
    [('flashinfer', 'mha'), ('flashinfer', 'gqa'), ('flashinfer', 'mla'), ('flashmla', 'mla')],
)
def test_libraries_are_called_as_their_documentations_say(name, kind, tiny, installed, monkeypatch):
    # They ask for a GPU, which their stand-ins do not need.
    monkeypatch.setattr(backends, 'reason_not_to_run', lambda name, cache: '')
    model_kind, settings = MODELS[kind]
    page_size = 16
    if name == 'flashmla':
        page_size = 64
        settings = settings | dict(kv_lora_rank=512, qk_rope_head_dim=64, head_dim=72, n_layer=1)
    model = tiny(model_kind, **settings)
    options = dict(layout='paged', page_size=page_size, static=True)
    cache = Cache.of(model, 3, 24, kernel=name, **options)
    assert decode_error(model, cache, TEXTS, 3) < 1e-4
    assert cache.static == (name == 'flashmla')


@pytest.mark.parametrize(
    'name, dims, options, message',
    [
        ('flashinfer', dict(k=64, v=64), {}, r'it reads pages \(--cache=paged\)'),
        (
            'flashinfer',
            dict(k=64, v=64),
            dict(layout='paged'),
            'it needs a CUDA GPU and 16-bit numbers',
        ),
        (
            'flashinfer',
            dict(c_kv=256, k_pe=32),
            dict(layout='paged', device='meta', full=torch.bfloat16),
            'its MLA kernel is made for a latent of 512',
        ),
        (
            'flashmla',
            dict(k=64, v=64),
            dict(layout='paged', device='meta', full=torch.bfloat16),
            'it is made for MLA with a latent of 512 and a rotated key of 64$',
        ),
        (
            'flashmla',
            dict(c_kv=512, k_pe=64),
            dict(layout='paged', page_size=16, device='meta', full=torch.bfloat16),
            'its pages have 64 tokens',
        ),
    ],
)
def test_what_libraries_do_not_serve(name, dims, options, message, installed):
    cache = Cache([dims], 1, 64, kernel='torch', **options)
    if cache.device.type == 'meta':  # as if it were a GPU
        cache.device = torch.device('cuda')
    assert re.search(message, backends.reason_not_to_run(name, cache))
