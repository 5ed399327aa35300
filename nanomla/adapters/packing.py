"""
Documents of different lengths as batches of one shape: packed one behind the other, or padded, one a row.

Packed documents stay strangers. `Documents` goes to `model.hidden` in the place of a cache: positions begin
again at each document and attention works document by document, with the kernel that the model was given,
so packed documents have exactly the logits that they have alone.

Legend: B rows, T tokens of a row, H heads, D head dim; N documents of a batch, L tokens of the longest.
"""

from functools import cached_property

import numpy as np
import torch

from model import Context, compiled_flex


class Documents(Context):
    """
    Where the documents of a batch begin and end: `lengths` holds for each row how many tokens its documents
    have, T in all (a padded rest counts as one more). It is made once a batch and serves every layer.
    """

    def __init__(self, lengths, device='cpu'):
        self.rows, self.T = len(lengths), sum(lengths[0])
        assert all(sum(row) == self.T and min(row) > 0 for row in lengths), (
            'documents must fill their rows'
        )
        flat = np.array([n for row in lengths for n in row])
        begin = np.concatenate([[0], np.cumsum(flat)[:-1]])
        number = np.repeat(np.arange(len(flat)), flat)  # (B T,): the document of each token
        position = np.arange(self.rows * self.T) - begin[number]
        place = np.arange(flat.max())
        inside = place < flat[:, None]  # (N, L)

        def send(array):
            return torch.from_numpy(np.ascontiguousarray(array)).to(device, non_blocking=True)

        self.positions = send(position.reshape(self.rows, self.T))
        self.number = send(number.reshape(self.rows, self.T))
        self.into = send(
            np.where(inside, begin[:, None] + place, 0)
        )  # (N, L): which token stands here
        self.back = send(number * flat.max() + position)  # (B T,): where each token stands
        self.inside = send(inside)

    def begin(self, T):
        assert T == self.T
        return self.positions

    def attend(self, attention, q, k, v):
        """Causal attention inside of each document: q (B, H, T, Dq), k (B, K, T, Dq), v (B, K, T, Dv) -> (B, H, T, Dv)."""
        if attention.kernel == 'flex':
            return compiled_flex()(
                q,
                k,
                v,
                block_mask=self.blocks,
                scale=attention.scale,
                enable_gqa=q.size(1) != k.size(1),
            )
        return self.one_by_one(attention, q, k, v)

    @torch.compiler.disable  # its shapes change with every batch
    def one_by_one(self, attention, q, k, v):
        """As a batch of N documents, shorter ones filled up: behind a document's end there is nothing that a causal query sees."""
        q, k, v = (Apart.apply(t.transpose(1, 2), self).transpose(1, 2) for t in (q, k, v))
        return Together.apply(attention.attend(q, k, v).transpose(1, 2), self).transpose(1, 2)

    @cached_property
    def blocks(self):
        from torch.nn.attention.flex_attention import create_block_mask

        number = self.number

        def same_document(b, h, i, j):
            return (i >= j) & (number[b, i] == number[b, j])

        return create_block_mask(
            same_document, self.rows, None, self.T, self.T, device=number.device
        )


class Apart(torch.autograd.Function):
    """(B, T, H, D) -> (N, L, H, D). Its backward pass is a gather, too: no token stands in two places."""

    @staticmethod
    def forward(ctx, x, documents):
        ctx.documents = documents
        return x.flatten(0, 1)[documents.into]

    @staticmethod
    def backward(ctx, g):
        d = ctx.documents
        return g.flatten(0, 1)[d.back].unflatten(0, (d.rows, d.T)), None


class Together(torch.autograd.Function):
    """(N, L, H, D) -> (B, T, H, D), the inverse; what fills up a document is left behind."""

    @staticmethod
    def forward(ctx, y, documents):
        ctx.documents = documents
        return y.flatten(0, 1)[documents.back].unflatten(0, (documents.rows, documents.T))

    @staticmethod
    def backward(ctx, g):
        d = ctx.documents
        return g.flatten(0, 1)[d.into] * d.inside[..., None, None], None


# ---------------------------------------------------------------------------------------------------
# rows and batches


def pack(lengths, T):
    """Which documents share a row of T tokens: lists of their numbers, each document in the first row that has room (first fit)."""
    rows, room = [], []
    for i, n in enumerate(lengths):
        assert 0 < n <= T
        at = next((r for r, left in enumerate(room) if left >= n), None)
        if at is None:
            rows, room, at = rows + [[]], room + [T], len(rows)
        rows[at].append(i)
        room[at] -= n
    return rows


class Batch:
    """idx and targets (B, T), `documents` where a row has several, and what the host knows: tokens without padding, documents, targets."""

    def __init__(self, idx, targets, lengths, isolated, device):
        self.idx, self.targets = (
            torch.from_numpy(a).to(device, non_blocking=True) for a in (idx, targets)
        )
        self.tokens, self.samples, self.counted = (
            sum(map(sum, lengths)),
            sum(map(len, lengths)),
            int((targets >= 0).sum()),
        )
        rest = [idx.shape[1] - sum(row) for row in lengths]
        self.lengths = [row + [n] * (n > 0) for row, n in zip(lengths, rest)]
        self.documents = Documents(self.lengths, device) if isolated else None


class Rows:
    """
    A set of documents, each (ids, targets) of one length with -1 for what is not learned, as rows of T tokens:
    `packed`, or one a row. Longer documents lose their end. blocks: FlexAttention's mask is made with each batch.
    """

    def __init__(self, documents, T, packed=True, isolated=True, blocks=False):
        self.blocks = blocks
        self.documents, self.T, self.isolated = (
            [(ids[:T], targets[:T]) for ids, targets in documents],
            T,
            packed and isolated,
        )
        self.cut = sum(len(ids) > T for ids, _ in documents)
        self.rows = (
            pack([len(ids) for ids, _ in self.documents], T)
            if packed
            else [[i] for i in range(len(documents))]
        )

    def batch(self, rows, device):
        """The rows of these numbers as a Batch on `device`."""
        idx, targets = (
            np.zeros((len(rows), self.T), np.int64),
            np.full((len(rows), self.T), -1, np.int64),
        )
        lengths = [[len(self.documents[i][0]) for i in self.rows[row]] for row in rows]
        for at, row in enumerate(rows):
            for array, which in ((idx, 0), (targets, 1)):
                flat = [token for i in self.rows[row] for token in self.documents[i][which]]
                array[at, : len(flat)] = flat
        batch = Batch(idx, targets, lengths, self.isolated, device)
        if self.blocks and batch.documents:
            batch.documents.blocks  # outside of what is compiled
        return batch

    def train_batches(self, seed, B):
        """Row numbers of batch after batch, without end: every epoch all rows in an order of its own; the last batch runs into the next epoch."""
        waiting, rng = [], np.random.default_rng(seed)
        while True:
            while len(waiting) < B:
                waiting += rng.permutation(len(self.rows)).tolist()
            yield waiting[:B]
            waiting = waiting[B:]

    def all_batches(self, B):
        """Row numbers of every row once."""
        return [list(range(at, min(at + B, len(self.rows)))) for at in range(0, len(self.rows), B)]
