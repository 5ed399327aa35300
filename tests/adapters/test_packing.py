"""Packed documents do not attend to one another; packing and batches lose nothing."""

import numpy as np
import pytest
import torch
from adapter_models import LENGTHS
from hypothesis import given, settings
from hypothesis import strategies as st

from nanomla.adapters.packing import DocumentRows, Documents, pack

LEARNED = dict(pos='learned', act='gelu', bias=True)
MODELS = dict(
    mha=('mha', {}),
    gqa=('mha', dict(n_kv_head=2)),
    gpt2=('mha', LEARNED),
    mla=('mla', {}),
    mla_absorbed=('mla', dict(absorb=True)),
    mla_normed=('mla', dict(qk_norm=True, qk_norm_latent=True)),
    mla_normed_absorbed=('mla', dict(qk_norm=True, qk_norm_latent=True, absorb=True)),
)
CASES = []  # name, kernel
for name in MODELS:
    CASES += [(name, 'eager'), (name, 'sdpa')]
    if not name.endswith('absorbed'):  # flash takes no keys that are wider than the values
        CASES.append((name, 'flash'))


def gradients(model):
    found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return found


@pytest.mark.parametrize('name, kernel', CASES)
def test_packed_documents_are_as_if_alone(tiny, tokens, name, kernel):
    kind, changes = MODELS[name]
    model, idx = tiny(kind, kernel=kernel, **changes).train(), tokens(24)
    projection = torch.randn(2, 24, 32)
    packed = model.hidden(idx, Documents(LENGTHS))
    (packed * projection).sum().backward()
    together = gradients(model)
    total = 0
    for row, lengths in enumerate(LENGTHS):
        for n, begin in zip(lengths, np.cumsum([0, *lengths])):
            here = slice(begin, begin + n)
            alone = model.hidden(idx[row : row + 1, here])[0]
            assert (alone - packed[row, here]).abs().max() < 1e-5
            total = total + (alone * projection[row, here]).sum()
    total.backward()
    for a, b in zip(together, gradients(model), strict=True):
        assert (a - b).abs().max() <= 1e-5 * max(1, b.abs().max())


@pytest.mark.parametrize('kernel', ['eager', 'sdpa'])
@pytest.mark.parametrize('changes', [{}, dict(qk_norm=True, qk_norm_latent=True)])
def test_absorbed_mla_packs_as_the_naive_form_does(tiny, tokens, kernel, changes):
    """In the latent space all heads share one key and one value."""
    found = []
    for absorb in (False, True):
        model = tiny('mla', absorb=absorb, kernel=kernel, **changes)
        found.append(model(tokens(24), context=Documents(LENGTHS)))
    naive, absorbed = found
    assert (naive - absorbed).abs().max() <= 1e-5 * naive.abs().max()


def test_documents_refuse_rows_of_another_length(tiny, tokens):
    with pytest.raises(AssertionError, match='rows of 24 tokens, not 20'):
        tiny().hidden(tokens(20), Documents(LENGTHS))
    with pytest.raises(AssertionError, match='must fill their rows'):
        Documents([[5, 12, 7], [20, 3]])


@settings(deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=40))
def test_packing_loses_nothing(lengths):
    rows = pack(lengths, 30)
    assert sorted(sum(rows, [])) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= 30 for row in rows)


def numbered_documents(lengths):
    """Return documents whose tokens tell them apart."""
    documents = []
    for n, length in enumerate(lengths):
        ids = [100 * n + t for t in range(length)]
        documents.append((ids, [t - 1 for t in range(length)]))
    return documents


def documents_of(batch):
    """Return ids and targets of all documents of a batch, its padding among them."""
    found = []
    for idx, targets, lengths in zip(batch.idx, batch.targets, batch.lengths):
        for ids, learned in zip(idx.split(lengths), targets.split(lengths)):
            found.append((ids.tolist(), learned.tolist()))
    return found


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=9), st.booleans(), st.integers(1, 4))
def test_batches_hold_every_document(lengths, packed, B):
    documents = numbered_documents(lengths)
    rows, found = DocumentRows(documents, 10, packed), []
    assert rows.cut == sum(n > 10 for n in lengths)
    for numbers in rows.all_batches(B):
        batch = rows.batch(numbers, 'cpu')
        assert batch.counted == (batch.targets >= 0).sum()
        assert (batch.documents is not None) == packed
        found += documents_of(batch)
    cut = [(ids[:10], targets[:10]) for ids, targets in documents]
    assert all(document in found for document in cut)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.integers(1, 4))
def test_an_epoch_has_every_row_once(n, B):
    rows = DocumentRows(numbered_documents([10] * n), 10)
    order, drawn = rows.train_batches(3, B), []
    for _ in range(n):
        drawn += next(order)
    for begin in range(0, len(drawn) - n + 1, n):
        assert sorted(drawn[begin : begin + n]) == list(range(n))
