"""
Token by token: the next one chosen, a prompt brought into a cache, one text or many at a time, and
token ids told as text. `generate` and `prefill` are methods of GPT; a cache is always handed in.

Beyond the window. A model sees `window` = min(block_size, cache.size) tokens. Without a cache each step
runs the last block_size tokens again. With one, a sequence that has filled the window and goes on is
forgotten, and its last window // 2 tokens (at least one) run as a new text whose positions begin at 0;
it then grows to the whole window again. So the text behind any token is never older than the window, at
least half of it, and exactly the no-cache text as long as all of it fits. A prompt longer than the window
begins with its last `window` tokens. Models with learned positions do not roll with a cache: they end with
a UserError, as their users know them to end at block_size.

Legend: B sequences, T tokens, C channels, V vocabulary.
"""

from collections import deque
from functools import lru_cache

import torch

from nanomla.core.configurator import UserError
from nanomla.inference import fused_step as step_kernels

DRAWS = dict(
    temperature=1.0, top_k=0, top_p=1.0, vocab_size=0
)  # how a token is drawn unless asked otherwise


def choose(logits, temperature=1.0, top_k=0, top_p=1.0, vocab_size=0, draw=None):
    """
    One token id for each row of logits (B, V) -> (B,); see `generate`. draw (B,), uniform in [0, 1), decides: the token
    is the first whose probability, with that of all before it, is more than the draw; they stand in the order of their ids,
    with top_p the likeliest first.
    """
    if vocab_size:
        logits = logits[:, :vocab_size]
    if temperature < 1e-5:
        return logits.argmax(-1)
    ids = None
    if top_p < 1:
        logits, ids = (
            logits.topk(min(top_k, logits.size(-1))) if top_k else logits.sort(descending=True)
        )
    elif top_k:
        least = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
        logits = torch.where(logits < least, -torch.inf, logits)
    p = (logits / temperature).softmax(-1)
    if top_p < 1:
        p = torch.where(
            p.cumsum(-1) - p >= top_p, 0, p
        )  # as much stands before it, among likelier tokens
    upto = p.cumsum(-1)
    at = (upto <= draw[:, None] * upto[:, -1:]).sum(-1, keepdim=True)
    last = torch.where(p > 0, torch.arange(p.size(-1), device=p.device), 0).amax(
        -1, keepdim=True
    )  # rounding must not lead behind it
    at = torch.minimum(at, last)
    return (at if ids is None else ids.gather(-1, at))[:, 0]


def window_of(model, cache):
    return min(model.config.block_size, cache.size)


def rolled(model, cache, row, text):
    """`text`, or what stays of it when the sequence in `row` has filled the window; then the cache forgets the row."""
    window = window_of(model, cache)
    if cache.used[row] < window:
        return text
    if model.config.pos == 'learned':
        what = (
            f'block_size={window} and this model has learned positions: decode without a cache'
            if window == model.config.block_size
            else f'the cache, which is too small: it holds {window} tokens of a sequence'
        )
        raise UserError(f'the text outgrows {what}, or ask for fewer tokens')
    cache.free(row)
    return text[-max(1, window // 2) :]


@lru_cache
def side_stream(device):
    """Where every step on this GPU runs its first time. One for all caches, as cuBLAS keeps 32 MiB for each stream that it has met."""
    return torch.cuda.Stream(device)


class Step:
    """
    One token more in each slot of a cache: plan, model, choice. With a static cache on a GPU it is recorded as a CUDA
    graph at its second time (the first compiles and allocates), and replayed from then on: no Python in between, and
    nothing waits for the device. A cache keeps its last step, so that the next text goes on with the recording.
    """

    def __init__(self, model, cache, how):
        self.model, self.cache, self.how, self.graph, self.times = (
            model,
            cache,
            DRAWS | how,
            None,
            0,
        )
        self.records = cache.static and cache.device.type == 'cuda'
        self.token = torch.zeros(cache.slots, dtype=torch.long, device=cache.device)
        self.draw = torch.zeros(cache.slots, device=cache.device)
        if self.records:
            self.side = side_stream(torch.cuda.current_device())

    @classmethod
    def of(cls, model, cache, **how):
        step = getattr(cache, 'step', None)
        if step is None or step.model is not model or step.how != DRAWS | how:
            step = cache.step = cls(model, cache, how)
        return step

    def run(self):
        x = self.model.hidden(self.token[:, None], self.cache)[:, -1]
        logits, how = self.model.lm_head(x), self.how
        if step_kernels.chooses(logits, how['temperature'], how['top_p']):
            step_kernels.choose(
                logits[:, : how['vocab_size'] or None],
                self.draw,
                how['temperature'],
                how['top_k'],
                self.token,
            )
        else:
            self.token.copy_(
                choose(
                    logits if how['temperature'] < 1e-5 else logits.float(), draw=self.draw, **how
                )
            )

    def __call__(self, rows):
        """Runs `self.token` in `rows`, a sorted list of slots; leaves what follows in `self.token`."""
        here = set(rows)
        self.cache.plan([int(row in here) for row in range(self.cache.slots)])
        self.times += 1
        if not self.records:
            self.run()
        elif self.times == 1:
            self.side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.side):
                self.run()
            torch.cuda.current_stream().wait_stream(self.side)
        else:
            if self.graph is None:
                self.graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(self.graph):
                    self.run()
            self.cache.planned = None
            self.graph.replay()


@torch.no_grad()
def prefill(model, texts, cache, rows=None, chunk=0):
    """
    Runs what `cache` does not hold yet of each text, at least one token of each, `chunk` tokens at a time
    (0: all at once). texts: lists of token ids of any lengths; rows: the slot of each, the first ones if None.
    Returns what stands behind each text's last token (B, C); `lm_head` makes its logits of it.
    """
    rows = list(range(len(texts))) if rows is None else list(rows)
    left = [text[cache.used[row] :] for text, row in zip(texts, rows)]
    assert all(left), 'nothing new to run in one of the texts'
    most = max(map(len, left))
    chunk = chunk or most
    last = [None] * len(texts)
    everyone = rows == list(range(cache.slots))
    for at in range(0, most, chunk):
        parts = [text[at : at + chunk] for text in left]
        counts = [len(part) for part in parts]
        idx = torch.tensor(
            [part + [0] * (max(counts) - len(part)) for part in parts], device=cache.device
        )
        cache.plan(counts, None if everyone else rows)
        x = model.hidden(idx, cache)
        for b, part in enumerate(parts):
            if part and at + len(part) == len(left[b]):
                last[b] = x[b, len(part) - 1]
    return torch.stack(last)


@torch.no_grad()
def generate(
    model,
    idx,
    max_new_tokens,
    temperature=1.0,
    top_k=0,
    top_p=1.0,
    vocab_size=0,
    generator=None,
    cache=None,
    rows=None,
    prefill_chunk=0,
):
    """
    Yields the next token ids (B,), max_new_tokens times, after the prompts idx: (B, T), or with a cache
    also a list of B lists of any lengths.

    temperature 0 takes the likeliest token; top_k > 0 keeps the k likeliest (and what is as likely as the last of them), top_p < 1 the fewest that hold
    that much probability (Holtzman et al. 2019); with both, top_p counts within the top_k. Ids from vocab_size on (padding) are never drawn.

    cache: the prompts go to its slots `rows` (the first B if None), where it may hold their beginning
    already (`cache.free` a slot that holds another text); each step then runs one token. See above for what happens at the end of the window; UserError
    when a text with learned positions gets there.
    """
    how = dict(temperature=temperature, top_k=top_k, top_p=top_p, vocab_size=vocab_size)
    draws = torch.rand(
        max_new_tokens, len(idx), generator=generator, device=model.lm_head.weight.device
    )
    if cache is None:
        for draw in draws:
            x = model.hidden(idx[:, -model.config.block_size :])
            token = choose(model.lm_head(x[:, -1]).float(), draw=draw, **how)
            idx = torch.cat([idx, token[:, None]], dim=1)
            yield token
        return
    window = window_of(model, cache)
    texts = [list(text)[-window:] for text in (idx.tolist() if torch.is_tensor(idx) else idx)]
    rows = list(range(len(texts))) if rows is None else list(rows)
    everyone, new = (
        rows == list(range(cache.slots)),
        [],
    )  # new: tokens that are not in `texts` yet, as they wait for the device
    step = Step.of(model, cache, **how)
    if not everyone:
        places = torch.tensor(rows, device=cache.device)
    for i, draw in enumerate(draws):
        full = i > 0 and any(cache.used[row] >= window for row in rows)
        if full:
            for text, *more in zip(texts, *(token.tolist() for token in new)):
                text.extend(more)
            new.clear()
            texts = [rolled(model, cache, row, text) for row, text in zip(rows, texts)]
        if i == 0 or full:
            x = prefill(model, texts, cache, rows, prefill_chunk)
            token = choose(model.lm_head(x).float(), draw=draw, **how)
            step.token[slice(None) if everyone else places] = token
        else:
            step.draw[slice(None) if everyone else places] = draw
            step(rows)
            token = step.token.clone() if everyone else step.token[places]
        new.append(token)
        yield token


@torch.no_grad()
def serve(
    model,
    prompts,
    cache,
    max_new_tokens,
    tell,
    temperature=1.0,
    top_k=0,
    top_p=1.0,
    vocab_size=0,
    seeds=None,
    prefill_chunk=0,
):
    """
    Continuous batching: every prompt (a list of token ids, at least one) is continued in one of the cache's
    slots, and when it ends the next one takes its place. Yields the number of each prompt as it ends.

    tell(i, token) gets each token of prompt i and says whether it was the last. Prompt i draws by a generator
    of its own from seeds[i], so its text does not depend on its neighbours.
    """
    window = window_of(model, cache)
    how = dict(temperature=temperature, top_k=top_k, top_p=top_p, vocab_size=vocab_size)
    waiting, idle, busy = (
        deque(range(len(prompts))),
        deque(range(cache.slots)),
        {},
    )  # busy: slot -> prompt, text, tokens told, its draws
    step, ended = Step.of(model, cache, **how), []
    for row in idle:
        cache.free(row)

    def draws(rows):
        return torch.tensor([busy[row][3][busy[row][2]] for row in rows], device=cache.device)

    def told(rows, tokens):
        for row, token in zip(
            rows, tokens.tolist()
        ):  # here, once a step, the host waits for the device
            i, text, count, _ = busy[row]
            text.append(token)
            busy[row][2] = count + 1
            if tell(i, token) or count + 1 == max_new_tokens:
                cache.free(row)
                idle.append(row)
                del busy[row]
                ended.append(i)

    while waiting or busy:
        ended, longer = [], []
        for row in busy:
            before = busy[row][1]
            busy[row][1] = rolled(model, cache, row, before)
            if busy[row][1] is not before:
                longer.append(row)
        if one_token := sorted(busy.keys() - set(longer)):
            places = torch.tensor(one_token, device=cache.device)
            step.draw[places] = draws(one_token)
            step(one_token)
            told(one_token, step.token[places])
        while waiting and idle:
            i, row = waiting.popleft(), idle.popleft()
            generator = torch.Generator(cache.device).manual_seed(seeds[i] if seeds else i)
            busy[row] = [
                i,
                list(prompts[i])[-window:],
                0,
                torch.rand(max_new_tokens, 1, generator=generator, device=cache.device)
                .flatten()
                .tolist(),
            ]
            longer.append(row)
        if longer:
            x = prefill(model, [busy[row][1] for row in longer], cache, longer, prefill_chunk)
            tokens = choose(model.lm_head(x).float(), draw=draws(longer), **how)
            step.token[torch.tensor(longer, device=cache.device)] = tokens
            told(longer, tokens)
        yield from ended
