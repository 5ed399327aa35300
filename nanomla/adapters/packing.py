"""
Documents of different lengths as batches of one shape: packed one after the other, or one a row.

Packed documents do not attend to one another. `Documents` is the context that a model's forward
pass is given: positions begin again at each document, and attention works document by document with
the kernel of the model, so packed documents have exactly the logits that they have alone.

Legend: B rows, T tokens of a row, H heads, D head dim; N documents of a batch, L tokens of the
longest.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from model import Attention, Context, compiled_flex

NO_TARGET = -1  # a token whose successor is not learned

Document = tuple[Sequence[int], Sequence[int]]  # token ids, and the target of each


class Documents(Context):
    """
    Where the documents of a batch begin and end. One serves all layers.

    lengths: for each row the tokens of its documents, T in all (padding counts as one more)
    flex:    make the mask of FlexAttention, too
    """

    def __init__(self, lengths: Sequence[Sequence[int]], device='cpu', flex: bool = False):
        self.rows, self.T = len(lengths), sum(lengths[0])
        for row in lengths:
            assert sum(row) == self.T and min(row) > 0, 'documents must fill their rows'
        flat = np.concatenate(lengths)  # (N,)
        longest = flat.max()
        begin = np.cumsum(flat) - flat  # (N,): the first token of each document
        number = np.repeat(np.arange(len(flat)), flat)  # (B T,): the document of each token
        position = np.arange(self.rows * self.T) - begin[number]  # (B T,): of each token in it
        at = np.arange(longest)
        inside = at < flat[:, None]  # (N, L): False behind a document's end

        def send(array):
            return torch.from_numpy(np.ascontiguousarray(array)).to(device, non_blocking=True)

        self.positions = send(position.reshape(self.rows, self.T))
        self.number = send(number.reshape(self.rows, self.T))
        self.inside = send(inside)
        self.token_at = send(np.where(inside, begin[:, None] + at, 0))  # (N, L): of the B T tokens
        self.slot_of = send(number * longest + position)  # (B T,): of the N L slots
        self.block_mask = self.make_block_mask() if flex else None

    def begin(self, T: int) -> torch.Tensor:
        assert T == self.T, f'the documents fill rows of {self.T} tokens, not {T}'
        return self.positions

    def attend(self, attention: Attention, q, k, v):
        """
        Return causal attention inside of each document.

        q (B, H, T, Dq), k (B, K, T, Dq), v (B, K, T, Dv) -> (B, H, T, Dv).
        """
        if attention.kernel != 'flex':
            return self.attend_separately(attention, q, k, v)
        assert self.block_mask is not None, 'Documents for FlexAttention are made with flex=True'
        grouped = q.size(1) != k.size(1)
        how = dict(scale=attention.scale, enable_gqa=grouped)
        return compiled_flex()(q, k, v, block_mask=self.block_mask, **how)

    @torch.compiler.disable  # its shapes change with every batch
    def attend_separately(self, attention: Attention, q, k, v):
        """
        Attend in a batch of N documents, where shorter ones are filled up.

        A causal query does not see what stands behind the end of its document.
        """
        q, k, v = (Unpack.apply(t.transpose(1, 2), self).transpose(1, 2) for t in (q, k, v))
        y = attention.attend(q, k, v)
        return Repack.apply(y.transpose(1, 2), self).transpose(1, 2)

    def make_block_mask(self):
        from torch.nn.attention.flex_attention import create_block_mask

        number, T = self.number, self.T

        def same_document(b, h, i, j):
            return (i >= j) & (number[b, i] == number[b, j])

        return create_block_mask(same_document, self.rows, None, T, T, device=number.device)


class Unpack(torch.autograd.Function):
    """(B, T, H, D) -> (N, L, H, D). Both ways are gathers, as no token stands in two slots."""

    @staticmethod
    def forward(ctx, x, documents):
        ctx.documents = documents
        return x.flatten(0, 1)[documents.token_at]

    @staticmethod
    def backward(ctx, g):
        d = ctx.documents
        return g.flatten(0, 1)[d.slot_of].unflatten(0, (d.rows, d.T)), None


class Repack(torch.autograd.Function):
    """(N, L, H, D) -> (B, T, H, D), the inverse of Unpack; what fills up documents is dropped."""

    @staticmethod
    def forward(ctx, y, documents):
        ctx.documents = documents
        return y.flatten(0, 1)[documents.slot_of].unflatten(0, (documents.rows, documents.T))

    @staticmethod
    def backward(ctx, g):
        d = ctx.documents
        return g.flatten(0, 1)[d.token_at] * d.inside[..., None, None], None


# -------------------------------------------------------------------------------------------------
# rows and batches


def pack(lengths: Sequence[int], T: int) -> list[list[int]]:
    """
    Distribute documents over rows of T tokens, each to the first row that has room (first fit).

    Returns the numbers of the documents in each row.
    """
    rows, room = [], []
    for i, length in enumerate(lengths):
        assert 0 < length <= T
        fitting = (row for row, left in enumerate(room) if left >= length)
        row = next(fitting, len(rows))
        if row == len(rows):
            rows.append([])
            room.append(T)
        rows[row].append(i)
        room[row] -= length
    return rows


class Batch:
    """
    Rows on a device.

    idx, targets: (B, T)
    lengths:      tokens of the documents in each row; padding is one more
    documents:    the context of the forward pass, None where a row has no more than one document
    tokens, samples, counted: tokens without padding, documents, targets
    """

    def __init__(
        self,
        idx: np.ndarray,
        targets: np.ndarray,
        lengths: list[list[int]],
        device: torch.device | str = 'cpu',
    ):
        self.tokens = sum(sum(row) for row in lengths)
        self.samples = sum(len(row) for row in lengths)
        self.counted = int((targets >= 0).sum())
        self.idx = torch.from_numpy(idx).to(device, non_blocking=True)
        self.targets = torch.from_numpy(targets).to(device, non_blocking=True)
        self.lengths = []
        for row in lengths:
            padding = idx.shape[1] - sum(row)
            self.lengths.append([*row, padding] if padding else row)
        self.documents = None

    def separate_documents(self, flex: bool = False) -> None:
        """Let documents of one row not attend to one another."""
        self.documents = Documents(self.lengths, self.idx.device, flex)


class DocumentRows:
    """
    A set of documents as rows of T tokens. Longer documents lose their end.

    packed:   several documents in a row, else one
    isolated: packed documents do not attend to one another
    flex:     batches carry FlexAttention's mask, made outside of what is compiled
    """

    def __init__(
        self,
        documents: Sequence[Document],
        T: int,
        packed: bool = True,
        isolated: bool = True,
        flex: bool = False,
    ):
        self.T, self.isolated, self.flex = T, packed and isolated, flex
        self.documents = [(ids[:T], targets[:T]) for ids, targets in documents]
        self.cut = sum(len(ids) > T for ids, _ in documents)
        if packed:
            self.rows = pack([len(ids) for ids, _ in self.documents], T)
        else:
            self.rows = [[i] for i in range(len(documents))]

    def batch(self, rows: Sequence[int], device: torch.device | str) -> Batch:
        """Return the rows of these numbers as a Batch on `device`."""
        idx = np.zeros((len(rows), self.T), np.int64)
        targets = np.full((len(rows), self.T), NO_TARGET, np.int64)
        lengths = []
        for b, row in enumerate(rows):
            lengths.append([])
            begin = 0
            for i in self.rows[row]:
                document_ids, document_targets = self.documents[i]
                end = begin + len(document_ids)
                idx[b, begin:end] = document_ids
                targets[b, begin:end] = document_targets
                lengths[-1].append(end - begin)
                begin = end
        batch = Batch(idx, targets, lengths, device)
        if self.isolated:
            batch.separate_documents(self.flex)
        return batch

    def train_batches(self, seed: int, B: int) -> Iterator[list[int]]:
        """
        Yield the row numbers of batch after batch, without end.

        Every epoch has all rows in an order of its own; its last batch runs into the next epoch.
        """
        waiting, rng = [], np.random.default_rng(seed)
        while True:
            while len(waiting) < B:
                waiting += rng.permutation(len(self.rows)).tolist()
            yield waiting[:B]
            waiting = waiting[B:]

    def all_batches(self, B: int) -> list[list[int]]:
        """Return the row numbers of every row once, B at a time."""
        numbers = list(range(len(self.rows)))
        return [numbers[begin : begin + B] for begin in range(0, len(numbers), B)]
