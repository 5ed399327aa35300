"""
Decode token by token: the choice of the next one, a prompt brought into a cache, one text or many
at a time.

Beyond the window. A model sees `window` = min(block_size, cache.size) tokens. Without a cache each
step runs the last block_size tokens again. With one, a sequence that has filled the window and goes
on is dropped from the cache, and its last window // 2 tokens (at least one) run as a new text whose
positions begin at 0; it then grows to the whole window again. So the text before any token is never
longer than the window, at least half of it, and exactly the no-cache text as long as all of it
fits. A prompt longer than the window begins with its last `window` tokens. Models with learned
positions do not roll with a cache: they end with a UserError, as GPT-2 ends at block_size.

Legend: B sequences, T tokens, C channels, V vocabulary.
"""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch

from model import GPT
from nanomla.core.configurator import UserError
from nanomla.core.cuda_graph import GraphedStep
from nanomla.inference import fused_step
from nanomla.inference.cache import Cache, OutOfPages

GREEDY = 1e-5  # a temperature below it takes the likeliest token


@dataclass(frozen=True)
class Sampling:
    """
    How a token is drawn: temperature 0 takes the likeliest; top_k > 0 keeps the k likeliest (and
    what is as likely as the last of them), top_p < 1 the fewest that hold that much probability
    (Holtzman et al. 2019); with both, top_p counts within the top_k. Ids from vocab_size on
    (padding) are never drawn; 0 = all may be.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    vocab_size: int = 0


AS_THE_MODEL_HAS_IT = Sampling()


def choose(logits, draw=None, sampling: Sampling = AS_THE_MODEL_HAS_IT):
    """
    Return one token id for each row of logits (B, V): (B,).

    draw (B,), uniform in [0, 1), decides: the token is the first whose probability, with that of
    all before it, is more than the draw; they stand in the order of their ids, with top_p the
    likeliest first.
    """
    if sampling.vocab_size:
        logits = logits[:, : sampling.vocab_size]
    if sampling.temperature < GREEDY:
        return logits.argmax(-1)
    top_k = min(sampling.top_k, logits.size(-1))
    ids = None
    if sampling.top_p < 1:
        if top_k:
            logits, ids = logits.topk(top_k)
        else:
            logits, ids = logits.sort(descending=True)
    elif top_k:
        least = logits.topk(top_k).values[:, -1:]
        logits = torch.where(logits < least, -torch.inf, logits)
    p = (logits / sampling.temperature).softmax(-1)
    if sampling.top_p < 1:  # drop tokens when the likelier ones hold enough
        p = torch.where(p.cumsum(-1) - p >= sampling.top_p, 0, p)
    up_to = p.cumsum(-1)
    index = (up_to <= draw[:, None] * up_to[:, -1:]).sum(-1, keepdim=True)
    numbers = torch.arange(p.size(-1), device=p.device)
    last = torch.where(p > 0, numbers, 0).amax(-1, keepdim=True)  # rounding must not lead beyond it
    index = torch.minimum(index, last)
    if ids is not None:
        index = ids.gather(-1, index)
    return index[:, 0]


def window_of(model: GPT, cache: Cache) -> int:
    return min(model.config.block_size, cache.size)


def rolled(model: GPT, cache: Cache, row: int, text: list[int]) -> list[int]:
    """Return `text`, or its end when the sequence in `row` has filled the window and is dropped."""
    window = window_of(model, cache)
    if cache.used[row] < window:
        return text
    if model.config.pos == 'learned':
        limit = f'the cache, which is too small: it holds {window} tokens of a sequence'
        if window == model.config.block_size:
            limit = (
                f'block_size={window} and this model has learned positions: decode without a cache'
            )
        raise UserError(f'the text outgrows {limit}, or ask for fewer tokens')
    cache.free(row)
    return text[-max(1, window // 2) :]


@lru_cache
def side_stream(device: int):
    """Where every step on this GPU runs its first time; cuBLAS keeps 32 MiB for each stream."""
    return torch.cuda.Stream(device)


class DecodeStep:
    """
    One token more in chosen rows of a cache: plan, model, choice. With a static cache on a GPU it
    is recorded as a CUDA graph. A cache keeps its last step, so that the next text goes on with the
    recording.

    token (rows,): the token to run in each row, afterwards the one that follows; draw (rows,): as
    in `choose`.
    """

    def __init__(self, model: GPT, cache: Cache, sampling: Sampling):
        self.model, self.cache, self.sampling = model, cache, sampling
        self.token = torch.zeros(cache.rows, dtype=torch.long, device=cache.device)
        self.draw = torch.zeros(cache.rows, device=cache.device)
        self.run = self.run_once
        if cache.static and cache.device.type == 'cuda':
            stream = side_stream(torch.cuda.current_device())
            self.run = GraphedStep(self.run_once, warmup=1, stream=stream)

    @classmethod
    def of(cls, model: GPT, cache: Cache, sampling: Sampling) -> 'DecodeStep':
        """Return the cache's last step where it fits, else a new one."""
        step = cache.decode_step
        if step is None or step.model is not model or step.sampling != sampling:
            step = cache.decode_step = cls(model, cache, sampling)
        return step

    def run_once(self) -> None:
        x = fused_step.hidden(self.model, self.token[:, None], self.cache)[:, -1]
        logits, sampling = self.model.lm_head(x), self.sampling
        if fused_step.can_choose(logits, sampling.temperature, sampling.top_p):
            if sampling.vocab_size:
                logits = logits[:, : sampling.vocab_size]
            fused_step.choose(logits, self.draw, sampling.temperature, sampling.top_k, self.token)
        else:
            if sampling.temperature >= GREEDY:
                logits = logits.float()
            self.token.copy_(choose(logits, self.draw, sampling))

    def __call__(self, rows: list[int]) -> None:
        """Run `token` in `rows`, and leave what follows in `token`."""
        counts = [0] * self.cache.rows
        for row in rows:
            counts[row] = 1
        self.cache.plan(counts)
        self.run()
        self.cache.next_plan = None  # a replayed recording has not taken it


@torch.no_grad()
def prefill(
    model: GPT, texts: list[list[int]], cache: Cache, rows: list[int] | None = None, chunk: int = 0
) -> torch.Tensor:
    """
    Run what `cache` does not hold yet of each text, at least one token of each, `chunk` tokens at a
    time (0: all at once). texts: lists of token ids of any lengths; rows: the row of each, the
    first ones if None.

    Returns the final hidden state of each text's last token (B, C); `lm_head` makes its logits of
    it.
    """
    rows = list(range(len(texts))) if rows is None else list(rows)
    new = [text[cache.used[row] :] for text, row in zip(texts, rows)]
    assert all(new), 'nothing new to run in one of the texts'
    longest = max(map(len, new))
    chunk = chunk or longest
    last = [None] * len(texts)
    all_rows = rows == list(range(cache.rows))
    for begin in range(0, longest, chunk):
        parts = [text[begin : begin + chunk] for text in new]
        counts = [len(part) for part in parts]
        padded = [part + [0] * (max(counts) - len(part)) for part in parts]
        cache.plan(counts, None if all_rows else rows)
        x = model.hidden(torch.tensor(padded, device=cache.device), cache)
        for b, count in enumerate(counts):
            if count and begin + count == len(new[b]):
                last[b] = x[b, count - 1]
    return torch.stack(last)


@torch.no_grad()
def generate(
    model: GPT,
    idx: torch.Tensor | list[list[int]],
    max_new_tokens: int,
    cache: Cache | None = None,
    rows: list[int] | None = None,
    prefill_chunk: int = 0,
    generator: torch.Generator | None = None,
    **sampling,
) -> Iterator[torch.Tensor]:
    """
    Yield the next token ids (B,), max_new_tokens times, after the prompts idx: (B, T), or with a
    cache also a list of B lists of any lengths. More options are the fields of Sampling.

    cache: the prompts go to its `rows` (the first B if None), where it may hold their beginning
    already (`cache.free` a row that holds another text); each step then runs one token. See above
    for the end of the window; UserError when a text with learned positions gets there.
    """
    sampling = Sampling(**sampling)
    device = model.lm_head.weight.device
    draws = torch.rand(max_new_tokens, len(idx), generator=generator, device=device)
    if cache is None:
        yield from generate_uncached(model, idx, draws, sampling)
        return
    window = window_of(model, cache)
    if torch.is_tensor(idx):
        idx = idx.tolist()
    texts = [list(text)[-window:] for text in idx]
    rows = list(range(len(texts))) if rows is None else list(rows)
    chosen = slice(None)
    if rows != list(range(cache.rows)):
        chosen = torch.tensor(rows, device=cache.device)
    step = DecodeStep.of(model, cache, sampling)
    new = []  # tokens that are not in `texts` yet, since reading them waits for the device
    for i, draw in enumerate(draws):
        full = i > 0 and any(cache.used[row] >= window for row in rows)
        if full:
            for tokens in new:
                for text, token in zip(texts, tokens.tolist()):
                    text.append(token)
            new.clear()
            texts = [rolled(model, cache, row, text) for row, text in zip(rows, texts)]
        if i == 0 or full:
            x = prefill(model, texts, cache, rows, prefill_chunk)
            token = choose(model.lm_head(x).float(), draw, sampling)
            step.token[chosen] = token
        else:
            step.draw[chosen] = draw
            step(rows)
            token = step.token[chosen].clone()
        new.append(token)
        yield token


def generate_uncached(model: GPT, idx, draws, sampling: Sampling) -> Iterator[torch.Tensor]:
    """`generate` without a cache: every step runs the last block_size tokens."""
    for draw in draws:
        x = model.hidden(idx[:, -model.config.block_size :])
        token = choose(model.lm_head(x[:, -1]).float(), draw, sampling)
        idx = torch.cat([idx, token[:, None]], dim=1)
        yield token


@dataclass
class Sequence:
    """A prompt that is being continued in a row of the cache."""

    number: int  # of the prompt
    text: list[int]  # what its row holds, and the newest token
    draws: list[float]  # one for each of its tokens
    count: int = 0  # tokens so far


class PageBudget:
    """Pages of a cache that are spoken for by the sequences in its rows; a dense one has enough."""

    def __init__(self, cache: Cache):
        self.cache = cache
        self.reserved = [0] * cache.rows

    def needed(self, tokens: int) -> int:
        return -(-tokens // self.cache.page_size)

    def check(self, tokens: int) -> None:
        """Raise OutOfPages where all pages are too few for a sequence of so many tokens."""
        if self.cache.pages and self.needed(tokens) > self.cache.pages.count:
            raise OutOfPages(self.needed(tokens), self.cache.pages.count)

    def reserve(self, row: int, tokens: int) -> bool:
        """Reserve pages for so many tokens in a row; return False where they are not left."""
        if self.cache.pages is None:
            return True
        needed = self.needed(tokens)
        if sum(self.reserved) + needed > self.cache.pages.count:
            return False
        self.reserved[row] = needed
        return True

    def give_back(self, row: int) -> None:
        self.reserved[row] = 0


@torch.no_grad()
def serve(
    model: GPT,
    prompts: list[list[int]],
    cache: Cache,
    max_new_tokens: int,
    on_token: Callable[[int, int], bool],
    seeds: list[int] | None = None,
    prefill_chunk: int = 0,
    **sampling,
) -> Iterator[int]:
    """
    Continuous batching: every prompt (a list of token ids, at least one) is continued in one of the
    cache's rows, and when it ends the next one takes its place. Yields the number of each prompt as
    it ends.

    In a paged cache a prompt also waits for the pages that its longest continuation may take, in
    the order of the prompts, so that none runs out of pages later. OutOfPages for one that needs
    more than there are.

    on_token(i, token) gets each token of prompt i and returns whether it was the last. Prompt i
    draws by a generator of its own from seeds[i], so its text does not depend on its neighbours.
    More options are the fields of Sampling.
    """
    if max_new_tokens == 0:
        yield from range(len(prompts))
        return
    sampling = Sampling(**sampling)
    window = window_of(model, cache)
    waiting, idle = deque(range(len(prompts))), deque(range(cache.rows))
    # The last token is not run.
    longest = [min(window, len(prompt) + max_new_tokens - 1) for prompt in prompts]
    pages = PageBudget(cache)
    pages.check(max(longest, default=0))
    busy: dict[int, Sequence] = {}  # row -> its sequence
    step = DecodeStep.of(model, cache, sampling)
    for row in idle:
        cache.free(row)

    def start(number: int) -> Sequence:
        seed = seeds[number] if seeds else number
        generator = torch.Generator(cache.device).manual_seed(seed)
        draws = torch.rand(max_new_tokens, 1, generator=generator, device=cache.device)
        return Sequence(number, list(prompts[number])[-window:], draws.flatten().tolist())

    def next_draws(rows):
        draws = [busy[row].draws[busy[row].count] for row in rows]
        return torch.tensor(draws, device=cache.device)

    def take(rows, tokens):
        """Hand each row's new token on; return the prompts that end with it."""
        ended = []
        for row, token in zip(rows, tokens.tolist()):  # the host waits for the device here
            sequence = busy[row]
            sequence.text.append(token)
            sequence.count += 1
            if on_token(sequence.number, token) or sequence.count == max_new_tokens:
                cache.free(row)
                pages.give_back(row)
                idle.append(row)
                del busy[row]
                ended.append(sequence.number)
        return ended

    while waiting or busy:
        ended, to_prefill = [], []
        for row, sequence in busy.items():
            text = rolled(model, cache, row, sequence.text)
            if text is not sequence.text:
                sequence.text = text
                to_prefill.append(row)
        one_token = sorted(busy.keys() - set(to_prefill))
        if one_token:
            chosen = torch.tensor(one_token, device=cache.device)
            step.draw[chosen] = next_draws(one_token)
            step(one_token)
            ended += take(one_token, step.token[chosen])
        while waiting and idle:
            if not pages.reserve(idle[0], longest[waiting[0]]):
                break
            row = idle.popleft()
            busy[row] = start(waiting.popleft())
            to_prefill.append(row)
        if to_prefill:
            texts = [busy[row].text for row in to_prefill]
            x = prefill(model, texts, cache, to_prefill, prefill_chunk)
            tokens = choose(model.lm_head(x).float(), next_draws(to_prefill), sampling)
            step.token[torch.tensor(to_prefill, device=cache.device)] = tokens
            ended += take(to_prefill, tokens)
        yield from ended
