"""
Log-likelihoods as decoding computes them: the keys and values of every token pass through a cache
before later tokens read them. Perplexity, retrieval and the harness are built on this.

Texts run `chunk_size` tokens at a time. The tokens of a chunk, and as many before them as make
`window`, are read in full precision; all that is older comes out of the cache, dequantised where
the cache is int8 or int4. With chunk_size=1 this is decoding, token by token. A larger chunk is
faster and lets more be read in full precision; `dequantised` is the share that was not.

Legend: B requests of a batch, T tokens, C channels, V vocabulary.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from model import GPT
from nanomla.inference.cache import Cache
from nanomla.inference.quantize import BITS

LOGITS = 2**25  # computed at a time: 128 MiB in fp32

# A context of at least one token and its possible continuations, as token ids.
Request = tuple[list[int], list[list[int]]]


class Score(NamedTuple):
    """
    How likely a continuation is by a model.

    logp: the natural log of each token's probability, given all before it
    greedy: whether each token was the likeliest
    """

    logp: list[float]
    greedy: list[bool]


class Scorer:
    """
    Score continuations with `model`, which is in eval mode on its device.

    vocab_size: ids from here on are padding and never the likeliest token
    layout: of the cache; 'none' runs every text whole and without a cache
    chunk_size: tokens that run at a time, 0 for all at once
    cache_settings: dtype, window and page_size of Cache.of
    """

    def __init__(
        self,
        model: GPT,
        vocab_size: int,
        layout: str = 'dense',
        chunk_size: int = 32,
        batch_size: int = 8,
        **cache_settings,
    ):
        self.model, self.vocab_size = model, vocab_size
        self.layout, self.cache_settings = layout, cache_settings
        self.chunk_size, self.batch_size = chunk_size, batch_size
        self.block_size, self.device = model.config.block_size, model.lm_head.weight.device
        self.cache = None
        self.attended = self.attended_quantised = 0  # pairs of a scored query and a token
        if layout != 'none':
            self.empty_cache(1, 1)  # raises what is wrong with cache_settings before any work

    def empty_cache(self, rows: int, size: int) -> Cache:
        """Return the cache, with no sequence in it and at least this much room."""
        if self.cache is None or self.cache.rows != rows or self.cache.size < size:
            self.cache = None  # frees the old one before the new one is made
            self.cache = Cache.of(self.model, rows, size, layout=self.layout, **self.cache_settings)
        for row in range(rows):
            self.cache.free(row)
        return self.cache

    def count_attention(self, queries: range, begin: int, end: int) -> None:
        """
        Count the tokens that scored queries attend to.

        queries: their positions in the sequence
        begin, end: tokens of the sequence in the cache before and after the pass
        """
        self.attended += sum(queries) + len(queries)
        if self.cache is not None and self.cache.dtype in BITS:
            quantised = max(0, min(begin, end - self.cache.window))
            self.attended_quantised += len(queries) * quantised

    @property
    def dequantised(self) -> float:
        """The share of what the scored queries attended to that had been quantised, 0 to 1."""
        return self.attended_quantised / max(1, self.attended)

    def footprint(self) -> dict:
        """Return the bytes of the last cache, measured on its buffers; {} without a cache."""
        cache = self.cache
        if cache is None:
            return {}
        token_bytes = window_bytes = 0
        for store in cache.stores:
            token_bytes += sum(buffer.nbytes for buffer in store.data)
            if store.recent is not None:
                window_bytes += store.recent.nbytes
        return dict(
            bytes_per_token=token_bytes / cache.slots,
            window_bytes=window_bytes / cache.rows,
            nbytes=cache.nbytes,
            slots=cache.rows,
            size=cache.size,
        )

    @torch.no_grad()
    def score(
        self, requests: Sequence[Request], progress: Callable[[int], object] | None = None
    ) -> list[list[Score]]:
        """
        Return a Score for every continuation of every request. A context runs once for all its
        continuations. What exceeds block_size is cut from the context's beginning.

        progress(n): n more requests are done
        """
        fitting = [self.fit(context, continuations) for context, continuations in requests]
        lengths = [length_of(request) for request in fitting]
        # Texts of one length run together, the longest first: they need the most memory.
        order = sorted(range(len(fitting)), key=lambda i: -lengths[i])
        score_batch = self.score_whole if self.layout == 'none' else self.score_in_cache
        results = [None] * len(fitting)
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            for i, scores in zip(batch, score_batch([fitting[i] for i in batch])):
                results[i] = scores
            if progress:
                progress(len(batch))
        return results

    def fit(self, context: list[int], continuations: list[list[int]]) -> Request:
        """Return the request with its context cut to what block_size allows."""
        longest = max(len(continuation) for continuation in continuations)
        assert context, 'a context needs a token'
        assert longest <= self.block_size, 'a continuation has at most block_size tokens'
        # The last token of a continuation is predicted, but does not run.
        room = self.block_size + 1 - max(longest, 1)
        return context[-room:], continuations

    def score_whole(self, requests: list[Request]) -> list[list[Score]]:
        """Score one batch without a cache: every context again with each continuation."""
        pairs = []
        for context, continuations in requests:
            pairs += [(context, continuation) for continuation in continuations]
        scores = []
        for start in range(0, len(pairs), self.batch_size):
            part = pairs[start : start + self.batch_size]
            x = self.model.hidden(
                self.padded([context + continuation[:-1] for context, continuation in part])
            )
            states = []
            for row, (context, continuation) in enumerate(part):
                scored = range(len(context) - 1, len(context) - 1 + len(continuation))
                states.append(x[row, scored.start : scored.stop])
                self.count_attention(scored, 0, 0)
            scores += self.scores_of(states, [continuation for _, continuation in part])
        scores = iter(scores)
        return [[next(scores) for _ in continuations] for _, continuations in requests]

    def score_in_cache(self, requests: list[Request]) -> list[list[Score]]:
        """
        Score one batch: request b has its context in row b of the cache and its continuations, one
        after the other, in copies of that in row B + b. The last one goes to row b itself.
        """
        B = len(requests)
        rounds = max(len(continuations) for _, continuations in requests)
        room = max(length_of(request) for request in requests)
        cache = self.empty_cache(2 * B if rounds > 1 else B, room)
        contexts = [context for context, _ in requests]
        last_states = self.run(contexts, range(B), [len(context) - 1 for context in contexts])
        results = [[] for _ in requests]
        for n in range(rounds):
            asked = [b for b in range(B) if n < len(requests[b][1])]
            continuations = [requests[b][1][n] for b in asked]
            rows = []
            for b in asked:
                if n + 1 < len(requests[b][1]):
                    cache.fork(b, B + b)
                    rows.append(B + b)
                else:
                    rows.append(b)
            texts = [continuation[:-1] for continuation in continuations]
            later_states = self.run(texts, rows, [0] * len(texts))
            states = []
            for b, continuation, later in zip(asked, continuations, later_states):
                # The context's last state predicts the first token; an empty text has none.
                states.append(torch.cat([last_states[b], later])[: len(continuation)])
            for b, score in zip(asked, self.scores_of(states, continuations)):
                results[b].append(score)
        return results

    def run(
        self, texts: list[list[int]], rows: Sequence[int], first: Sequence[int]
    ) -> list[torch.Tensor]:
        """
        Run texts, some of them may be empty, in `rows` of the cache, chunk by chunk. Return the
        last states of text i from its token first[i] on, (n, C) each.
        """
        cache = self.cache
        longest = max(len(text) for text in texts)
        chunk_size = self.chunk_size or max(1, longest)
        states = [[] for _ in texts]
        for start in range(0, longest, chunk_size):
            running = [i for i, text in enumerate(texts) if len(text) > start]
            parts = [texts[i][start : start + chunk_size] for i in running]
            for i, part in zip(running, parts):
                begin = cache.used[rows[i]]
                end = begin + len(part)
                self.count_attention(range(begin + max(0, first[i] - start), end), begin, end)
            running_rows = [rows[i] for i in running]
            if running_rows == list(range(cache.rows)):
                running_rows = None  # all of them, which needs no look-up
            cache.plan([len(part) for part in parts], running_rows)
            x = self.model.hidden(self.padded(parts), cache)
            for b, (i, part) in enumerate(zip(running, parts)):
                if first[i] < start + len(part):
                    states[i].append(x[b, max(0, first[i] - start) : len(part)])
        width, dtype = self.model.config.n_embd, self.model.stream
        empty = torch.empty(0, width, dtype=dtype, device=self.device)
        return [torch.cat([empty, *pieces]) for pieces in states]

    def padded(self, texts: list[list[int]]) -> torch.Tensor:
        """Return texts as ids (B, T), filled up with zeros to the longest."""
        longest = max(len(text) for text in texts)
        rows = [text + [0] * (longest - len(text)) for text in texts]
        return torch.tensor(rows, device=self.device)

    def scores_of(self, states: list[torch.Tensor], targets: list[list[int]]) -> list[Score]:
        """Return the Score of each of `targets`; states: (n, C) before each of its n tokens."""
        flat = list(itertools.chain.from_iterable(targets))
        ids = torch.tensor(flat, dtype=torch.long, device=self.device)
        rows = max(1, LOGITS // self.model.config.vocab_size)
        logp, greedy = [], []
        for x, expected in zip(torch.cat(states).split(rows), ids.split(rows)):
            logits = self.model.lm_head(x).float()
            logp.append(logits.log_softmax(-1).gather(-1, expected[:, None])[:, 0])
            greedy.append(logits[:, : self.vocab_size].argmax(-1) == expected)
        logp, greedy = torch.cat(logp).tolist(), torch.cat(greedy).tolist()
        scores, begin = [], 0
        for target in targets:
            end = begin + len(target)
            scores.append(Score(logp[begin:end], greedy[begin:end]))
            begin = end
        return scores


def length_of(request: Request) -> int:
    """Return how many tokens of a request run at most: the last one of a continuation does not."""
    context, continuations = request
    longest = max(len(continuation) for continuation in continuations)
    return len(context) + max(0, longest - 1)


def windows(n: int, context: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """
    Yield windows (begin, end, scored) of a text of n tokens: tokens begin to end - 1, of which the
    last `scored` count. Each token but the first counts once; after the first window each has at
    least context - stride + 1 tokens before it.
    """
    end = min(context + 1, n)
    yield 0, end, end - 1
    while end < n:
        scored = min(stride, n - end)
        end += scored
        yield end - context - 1, end, scored


def perplexity(
    scorer: Scorer,
    ids: np.ndarray,
    context: int,
    stride: int,
    n_bytes: int,
    progress: Callable[[int], object] | None = None,
) -> dict:
    """
    Return the perplexity of a text in `windows`, its loss in nats and its bits per byte, which are
    nats / (ln 2 · bytes).

    ids: (N,); the first one is never scored
    n_bytes: UTF-8 bytes of all but the first
    progress(n): n more tokens are scored
    """
    nats, count = 0.0, 0
    cut = list(windows(len(ids), context, stride))
    for start in range(0, len(cut), scorer.batch_size):
        requests = []
        for begin, end, scored in cut[start : start + scorer.batch_size]:
            text = ids[begin:end].tolist()
            requests.append((text[:-scored], [text[-scored:]]))
        for (score,) in scorer.score(requests):
            nats -= math.fsum(score.logp)
            count += len(score.logp)
            if progress:
                progress(len(score.logp))
    loss = nats / count
    return dict(
        loss=loss,
        perplexity=math.exp(min(loss, 700)),
        bits_per_byte=nats / math.log(2) / n_bytes,
        tokens=count,
        bytes=n_bytes,
        context=context,
        stride=stride,
    )
