"""
Log-likelihoods as decoding sees them: every token's keys and values pass through a cache before later tokens
read them. Perplexity, retrieval and the harness ask here.

Texts run `chunk_size` tokens at a time. The tokens of a chunk, and so many before them as make `window`, are seen in
full precision; all that is older comes out of the cache, dequantised where the cache is int8 or int4. With
chunk_size=1 this is decoding, token by token; a larger chunk is faster and lets more be seen in full precision.
`dequantised` tells how much was not.

Legend: B requests of a batch, T tokens, C channels, V vocabulary.
"""

import math

import torch

from nanomla.inference.cache import Cache
from nanomla.inference.quantize import BITS

LOGITS = 2**25  # at a time: 128 MiB in fp32


class Scorer:
    """
    Scores continuations with `model`, an eval-mode model on its device. layout 'none' runs every text whole and
    without a cache; else `how` goes to cache.Cache: dtype, window, page_size. Ids from vocab_size on are padding
    and never the likeliest token.
    """

    def __init__(self, model, vocab_size, layout='dense', chunk_size=32, batch_size=8, **how):
        self.model, self.vocab_size, self.layout, self.how = model, vocab_size, layout, how
        self.chunk_size, self.batch_size, self.cache = chunk_size, batch_size, None
        self.block_size, self.device = model.config.block_size, model.lm_head.weight.device
        self.seen = self.seen_dequantised = 0  # pairs of a scored query and a token it attends to
        if layout != 'none':
            self.room(1, 1)  # raises what is wrong with `how` before any work

    def room(self, slots, size):
        """The cache, empty, with at least so much room."""
        if self.cache is None or self.cache.rows != slots or self.cache.size < size:
            self.cache = None  # the old one goes before the new one comes
            self.cache = Cache.of(self.model, slots, size, layout=self.layout, **self.how)
        for row in range(slots):
            self.cache.free(row)
        return self.cache

    def attended(self, queries, begin, end):
        """Counts what scored queries at these positions see, in a pass that brings a sequence from `begin` to `end` tokens."""
        self.seen += sum(queries) + len(queries)
        if self.cache is not None and self.cache.dtype in BITS:
            self.seen_dequantised += len(queries) * max(0, min(begin, end - self.cache.window))

    @property
    def dequantised(self):
        """The share of what the scored queries attended to that had been quantised, 0 to 1."""
        return self.seen_dequantised / max(1, self.seen)

    def footprint(self):
        """What the last cache held, measured on its buffers: bytes of a token's place, of a sequence's window, of all."""
        if self.cache is None:
            return {}
        places, window = (
            sum(b.nbytes for store in self.cache.stores for b in part(store))
            for part in (lambda s: s.data, lambda s: [] if s.recent is None else [s.recent])
        )
        return dict(
            bytes_per_token=places / self.cache.slots,
            window_bytes=window / self.cache.rows,
            nbytes=self.cache.nbytes,
            slots=self.cache.rows,
            size=self.cache.size,
        )

    @torch.no_grad()
    def score(self, requests, tell=None):
        """
        requests: (context, continuations), token ids: a list of at least one, and a list of lists. Returns for each
        request and continuation the natural log of each token's probability, given all before it, as a list, and
        whether each was the likeliest: [[(logp, greedy), ...], ...]. A context is run once for all its continuations.
        What exceeds block_size is cut from the context's beginning. tell(n): n more requests are done.
        """
        fitting = [self.fit(context, continuations) for context, continuations in requests]
        order = sorted(
            range(len(fitting)), key=lambda i: -self.length(fitting[i])
        )  # alike together, the largest first
        results = [None] * len(fitting)
        for at in range(0, len(order), self.batch_size):
            batch = order[at : at + self.batch_size]
            score = self.score_whole if self.layout == 'none' else self.score_in_cache
            for i, result in zip(batch, score([fitting[i] for i in batch])):
                results[i] = result
            if tell:
                tell(len(batch))
        return results

    def fit(self, context, continuations):
        longest = max(map(len, continuations))
        assert context and longest <= self.block_size, (
            'a context needs a token, and a continuation at most block_size'
        )
        return context[-(self.block_size + 1 - max(longest, 1)) :], continuations

    @staticmethod
    def length(request):
        return len(request[0]) + max(
            0, max(map(len, request[1])) - 1
        )  # tokens that are run: the last one is not

    def score_whole(self, requests):
        """`score` of one batch without a cache: every context again with each continuation."""
        flat = [(context, one) for context, continuations in requests for one in continuations]
        judged = []
        for at in range(0, len(flat), self.batch_size):
            part = flat[at : at + self.batch_size]
            texts = [context + one[:-1] for context, one in part]
            x = self.model.hidden(self.padded(texts))
            judged += self.judge(
                [
                    x[b, len(context) - 1 : len(context) - 1 + len(one)]
                    for b, (context, one) in enumerate(part)
                ],
                [one for _, one in part],
            )
            for context, one in part:
                self.attended(range(len(context) - 1, len(context) - 1 + len(one)), 0, 0)
        judged = iter(judged)
        return [[next(judged) for _ in continuations] for _, continuations in requests]

    def score_in_cache(self, requests):
        """`score` of one batch: each context in a slot, its continuations in copies of that, the last one behind the context itself."""
        B, rounds = len(requests), max(len(continuations) for _, continuations in requests)
        cache = self.room(B * (1 + (rounds > 1)), max(map(self.length, requests)))
        last = self.run(
            [context for context, _ in requests],
            range(B),
            [len(context) - 1 for context, _ in requests],
        )
        results = [[] for _ in requests]
        for j in range(rounds):
            among = [b for b in range(B) if j < len(requests[b][1])]
            rows = []
            for b in among:
                rows.append(b)
                if j + 1 < len(requests[b][1]):
                    cache.fork(b, B + b)
                    rows[-1] = B + b
            ones = [requests[b][1][j] for b in among]
            rest = self.run([one[:-1] for one in ones], rows, [0] * len(ones))
            states = [torch.cat([last[b], x])[: len(one)] for b, x, one in zip(among, rest, ones)]
            for b, result in zip(among, self.judge(states, ones)):
                results[b].append(result)
        return results

    def run(self, texts, rows, first):
        """Runs texts (lists of ids, also empty) in slots `rows`, chunk by chunk. Returns what stands behind each token from `first` on, each (n, C)."""
        kept, cache = [[] for _ in texts], self.cache
        for at in range(0, max(map(len, texts)), self.chunk_size or 2**60):
            parts = [
                (b, row, text[at : at + (self.chunk_size or len(text))])
                for b, (text, row) in enumerate(zip(texts, rows))
                if len(text) > at
            ]
            for b, row, part in parts:
                begin, end = cache.used[row], cache.used[row] + len(part)
                self.attended(range(begin + max(0, first[b] - at), end), begin, end)
            slots = [row for _, row, _ in parts]
            cache.plan(
                [len(part) for _, _, part in parts],
                None if slots == list(range(cache.rows)) else slots,
            )
            x = self.model.hidden(self.padded([part for _, _, part in parts]), cache)
            for i, (b, _, part) in enumerate(parts):
                if first[b] < at + len(part):
                    kept[b].append(x[i, max(0, first[b] - at) : len(part)])
        nothing = torch.empty(
            0, self.model.config.n_embd, dtype=self.model.stream, device=self.device
        )
        return [torch.cat([nothing, *states]) for states in kept]

    def padded(self, texts):
        longest = max(map(len, texts))
        return torch.tensor(
            [text + [0] * (longest - len(text)) for text in texts], device=self.device
        )

    def judge(self, states, targets):
        """states: (n, C) before each of `targets`, lists of n ids -> (log-probabilities, whether the likeliest) of each, as lists."""
        x, ids = (
            torch.cat(states),
            torch.tensor(sum(targets, []), dtype=torch.long, device=self.device),
        )
        logp, greedy = [], []
        for part, wanted in zip(
            x.split(step := max(1, LOGITS // self.model.config.vocab_size)), ids.split(step)
        ):
            logits = self.model.lm_head(part).float()
            logp.append(logits.log_softmax(-1).gather(-1, wanted[:, None])[:, 0])
            greedy.append(logits[:, : self.vocab_size].argmax(-1) == wanted)
        logp, greedy = torch.cat(logp).tolist(), torch.cat(greedy).tolist()
        ends = [sum(len(one) for one in targets[:i]) for i in range(len(targets) + 1)]
        return [(logp[a:b], greedy[a:b]) for a, b in zip(ends, ends[1:])]


def windows(n, context, stride):
    """
    A text of n tokens in windows (begin, end, scored): tokens begin to end - 1, of which the last `scored` count. Each
    token but the first counts once; behind the first window each has at least context - stride + 1 tokens before it.
    """
    end = min(context + 1, n)
    yield 0, end, end - 1
    while end < n:
        scored = min(stride, n - end)
        end += scored
        yield end - context - 1, end, scored


def perplexity(scorer, ids, context, stride, n_bytes, bar=None):
    """
    Perplexity of a text (array of ids; the first is never scored), in `windows`. n_bytes: UTF-8 bytes of all tokens but the
    first, for bits per byte = nats / (ln 2 · bytes).
    """
    ids, nats, count = ids.tolist() if len(ids) < 2**24 else ids, 0.0, 0
    cut = list(windows(len(ids), context, stride))
    for at in range(0, len(cut), scorer.batch_size):
        batch = [
            (list(map(int, ids[begin:end])), scored)
            for begin, end, scored in cut[at : at + scorer.batch_size]
        ]
        for ((logp, _),) in scorer.score(
            [(text[:-scored], [text[-scored:]]) for text, scored in batch]
        ):
            nats -= math.fsum(logp)
            count += len(logp)
        if bar:
            bar.update(sum(scored for _, scored in batch))
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
