"""decode_libraries.py: every kernel says what the model says without a cache; libraries that are not here are stood in for by PyTorch."""

import re
import sys
from types import ModuleType

import pytest
import torch

from nanomla.core.configurator import UserError
from nanomla.inference import backends as decode_libraries
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
def off(model, cache, texts, steps):
    """The largest difference of logits, decoding `steps` tokens of texts (equally long or not) by the cache, from those without one."""
    if cache.pages:
        cache.pages.free = cache.pages.free[::2] + cache.pages.free[1::2]
    prefill(model, [text[:-steps] for text in texts], cache)
    worst = 0
    for step in range(steps):
        x = torch.tensor([[text[len(text) - steps + step]] for text in texts])
        got = model(x, context=cache)[:, -1]
        for row, text in enumerate(texts):
            worst = max(
                worst,
                (got[row] - model(torch.tensor([text[: len(text) - steps + step + 1]]))[0, -1])
                .abs()
                .max()
                .item(),
            )
    return worst


TEXTS = [
    [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8, 4],
    [7, 1, 2, 3, 4, 5],
    [2, 7, 1, 8, 2, 8, 1, 8, 2],
]


@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize(
    'kind',
    [
        kind if kind in ('gqa', 'mla') else pytest.param(kind, marks=pytest.mark.slow)
        for kind in MODELS
    ],
)
def test_flex_is_exact(kind, layout, tiny):
    model = tiny(MODELS[kind][0], n_layer=1, **MODELS[kind][1])
    cache = Cache.of(model, 3, 24, kernel='flex', static=True, **LAYOUTS[layout])
    before = cache.nbytes
    assert off(model, cache, TEXTS, 2) < 1e-4 and cache.kernel == 'flex'
    assert (
        before == cache.nbytes == Cache.of(model, 3, 24, kernel='torch', **LAYOUTS[layout]).nbytes
    )


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
    monkeypatch.setattr(decode_libraries, 'flex_kernel', lambda device: 1 / 0)
    cache = Cache.of(model, 1, 24, kernel='flex')
    with (
        torch.no_grad(),
        pytest.raises(
            UserError,
            match='^--decode_kernel=flex cannot run this model and cache: ZeroDivisionError: division by zero. Use',
        ),
    ):
        off(model, cache, [[1, 2, 3]], 1)


@pytest.fixture
def installed(monkeypatch):
    """FlashInfer and FlashMLA as their documentations describe them, in PyTorch, and no question asked about the GPU."""

    def attention(q, k, v, scale):  # (H, D), (N, K, D), (N, K, Dv)
        k, v = (t.repeat_interleave(len(q) // t.size(1), dim=1) for t in (k, v))
        return torch.einsum('hn,nhd->hd', (torch.einsum('hd,nhd->hn', q, k) * scale).softmax(-1), v)

    def rows(buffer, pages, length):
        return buffer[pages.long()].flatten(0, 1)[:length]

    class Decode:
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
            assert (
                indptr.dtype == indices.dtype == last_page_len.dtype == torch.int32
                and last_page_len.min() >= 1
                and last_page_len.max() <= page_size
            )
            assert len(indices) == indptr[-1] and indptr.diff().min() >= 1
            self.planned, self.scale, self.shape = (
                (indptr, indices, (indptr.diff() - 1) * page_size + last_page_len),
                sm_scale,
                (num_qo_heads, num_kv_heads, head_dim, page_size),
            )

        def run(self, q, paged_kv_cache):
            H, K, D, page = self.shape
            assert (
                q.shape[1:] == (H, D)
                and all(t.shape[1:] == (page, K, D) for t in paged_kv_cache)
                and q.is_contiguous()
            )
            starts, indices, lengths = self.planned
            return torch.stack(
                [
                    attention(
                        x,
                        *(
                            rows(t, indices[starts[b] : starts[b + 1]], lengths[b])
                            for t in paged_kv_cache
                        ),
                        self.scale,
                    )
                    for b, x in enumerate(q)
                ]
            )

    class MLA:
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
            self.planned, self.scale, self.shape = (
                (kv_indptr, kv_indices, kv_len_arr),
                sm_scale,
                (num_heads, head_dim_ckv, head_dim_kpe, page_size),
            )

        def run(self, q_nope, q_pe, ckv_cache, kpe_cache):
            H, R, P, page = self.shape
            assert (
                q_nope.shape[1:] == (H, R)
                and q_pe.shape[1:] == (H, P)
                and ckv_cache.shape[1:] == (page, R)
                and kpe_cache.shape[1:] == (page, P)
            )
            starts, indices, lengths = self.planned
            seen = [
                [
                    rows(t, indices[starts[b] : starts[b + 1]], lengths[b])[:, None]
                    for t in (ckv_cache, kpe_cache)
                ]
                for b in range(len(q_nope))
            ]
            return torch.stack(
                [
                    attention(torch.cat([a, b], -1), torch.cat(kv, -1), kv[0], self.scale)
                    for a, b, kv in zip(q_nope, q_pe, seen)
                ]
            )

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
        assert (
            tile_scheduler_metadata == 'schedule'
            and num_splits is None
            and block_table.dtype == cache_seqlens.dtype == torch.int32
            and q.is_contiguous()
        )
        assert k_cache.shape[1:] == (64, 1, q.size(-1)) and q.size(1) == 1
        seen = [rows(k_cache, table, length) for table, length in zip(block_table, cache_seqlens)]
        return torch.stack(
            [attention(x[0], k, k[..., :head_dim_v], softmax_scale)[None] for x, k in zip(q, seen)]
        ), None

    flashinfer, mla, flash_mla = (
        ModuleType('flashinfer'),
        ModuleType('flashinfer.mla'),
        ModuleType('flash_mla'),
    )
    (
        flashinfer.BatchDecodeWithPagedKVCacheWrapper,
        flashinfer.mla,
        mla.BatchMLAPagedAttentionWrapper,
    ) = Decode, mla, MLA
    flash_mla.flash_mla_with_kvcache, flash_mla.get_mla_metadata = (
        flash_mla_with_kvcache,
        get_mla_metadata,
    )
    for module in (flashinfer, mla, flash_mla):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(decode_libraries, 'find_spec', lambda name: True)
    monkeypatch.setattr(decode_libraries, 'FLASHINFER_WORKSPACE', 16)
    return lambda: monkeypatch.setattr(
        decode_libraries, 'reason_not_to_run', lambda name, cache: ''
    )


@pytest.mark.parametrize(
    'name, kind',
    [('flashinfer', 'mha'), ('flashinfer', 'gqa'), ('flashinfer', 'mla'), ('flashmla', 'mla')],
)
def test_libraries_are_called_as_their_documentations_say(name, kind, tiny, installed):
    installed()
    settings = dict(
        MODELS[kind][1],
        **(
            dict(kv_lora_rank=512, qk_rope_head_dim=64, head_dim=72, n_layer=1)
            if name == 'flashmla'
            else {}
        ),
    )
    model = tiny(MODELS[kind][0], **settings)
    cache = Cache.of(
        model,
        3,
        24,
        kernel=name,
        layout='paged',
        page_size=64 if name == 'flashmla' else 16,
        static=True,
    )
    assert off(model, cache, TEXTS, 3) < 1e-4 and cache.static == (name == 'flashmla')


@pytest.mark.parametrize(
    'name, dims, how, message',
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
def test_what_libraries_do_not_serve(name, dims, how, message, installed):
    cache = Cache([dims], 1, 64, kernel='torch', **how)
    if cache.device.type == 'meta':  # as if it were a GPU
        cache.device = torch.device('cuda')
    assert re.search(message, decode_libraries.reason_not_to_run(name, cache))
