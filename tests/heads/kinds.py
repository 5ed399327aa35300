"""The kinds of attention that tests of heads run over."""

import pytest

KINDS = {
    'mha': dict(),
    'gqa': dict(n_kv_head=2),
    'mqa': dict(n_kv_head=1),
    'mla': dict(),
    'mla with q latent': dict(q_lora_rank=16),
    'mla without rope': dict(pos='none', qk_rope_head_dim=0),
    'rope': dict(pos='rope'),
    'attention only': dict(mlp=False),
}
every_kind = pytest.mark.parametrize('kind', KINDS)


def shape_of(kind):
    """Return the attention of a kind of KINDS and its settings."""
    attention = 'mla' if kind.startswith('mla') else 'mha'
    return attention, KINDS[kind]
