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
import codecs
from collections import deque

import torch

from configurator import UserError


def choose(logits, temperature=1.0, top_k=0, top_p=1.0, vocab_size=0, generator=None):
    """One token id for each row of logits (B, V) -> (B,); see `generate`."""
    if vocab_size:
        logits = logits[:, :vocab_size]
    if temperature < 1e-5:
        return logits.argmax(-1)
    logits = logits / temperature
    if top_k:
        kept = logits.topk(min(top_k, logits.size(-1))).values
        logits = logits.masked_fill(logits < kept[:, -1:], -torch.inf)
    if top_p < 1:
        ordered, order = logits.sort(descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)  # probability of all likelier tokens
        logits = torch.full_like(logits, -torch.inf).scatter(-1, order, ordered.masked_fill(before >= top_p, -torch.inf))
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


def window_of(model, cache):
    return min(model.config.block_size, cache.size)


def rolled(model, cache, row, text):
    """`text`, or what stays of it when the sequence in `row` has filled the window; then the cache forgets the row."""
    window = window_of(model, cache)
    if cache.used[row] < window:
        return text
    if model.config.pos == 'learned':
        what = (f'block_size={window} and this model has learned positions: decode without a cache' if window == model.config.block_size
                else f'the cache, which is too small: it holds {window} tokens of a sequence')
        raise UserError(f'the text outgrows {what}, or ask for fewer tokens')
    cache.free(row)
    return text[-max(1, window // 2):]


@torch.no_grad()
def prefill(model, texts, cache, rows=None, chunk=0):
    """
    Runs what `cache` does not hold yet of each text, at least one token of each, `chunk` tokens at a time
    (0: all at once). texts: lists of token ids of any lengths; rows: the slot of each, the first ones if None.
    Returns what stands behind each text's last token (B, C); `lm_head` makes its logits of it.
    """
    rows = list(range(len(texts))) if rows is None else list(rows)
    left = [text[cache.used[row]:] for text, row in zip(texts, rows)]
    assert all(left), 'nothing new to run in one of the texts'
    most = max(map(len, left))
    chunk = chunk or most
    last = [None] * len(texts)
    everyone = rows == list(range(cache.slots))
    for at in range(0, most, chunk):
        parts = [text[at:at + chunk] for text in left]
        counts = [len(part) for part in parts]
        idx = torch.tensor([part + [0] * (max(counts) - len(part)) for part in parts], device=cache.device)
        cache.plan(counts, None if everyone else rows)
        x = model.hidden(idx, cache)
        for b, part in enumerate(parts):
            if part and at + len(part) == len(left[b]):
                last[b] = x[b, len(part) - 1]
    return torch.stack(last)


@torch.no_grad()
def generate(model, idx, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, vocab_size=0, generator=None,
             cache=None, rows=None, prefill_chunk=0):
    """
    Yields the next token ids (B,), max_new_tokens times, after the prompts idx: (B, T), or with a cache
    also a list of B lists of any lengths.

    temperature 0 takes the likeliest token; top_k > 0 keeps the k likeliest, top_p < 1 the fewest that hold
    that much probability (Holtzman et al. 2019). Ids from vocab_size on (padding) are never drawn.

    cache: the prompts go to its slots `rows` (the first B if None), where it may hold their beginning
    already (`cache.free` a slot that holds another text); each step then runs one token. See above for what happens at the end of the window; UserError
    when a text with learned positions gets there.
    """
    if cache is None:
        for _ in range(max_new_tokens):
            x = model.hidden(idx[:, -model.config.block_size:])
            token = choose(model.lm_head(x[:, -1]).float(), temperature, top_k, top_p, vocab_size, generator)
            idx = torch.cat([idx, token[:, None]], dim=1)
            yield token
        return
    window = window_of(model, cache)
    texts = [list(text)[-window:] for text in (idx.tolist() if torch.is_tensor(idx) else idx)]
    rows = list(range(len(texts))) if rows is None else list(rows)
    everyone, new = rows == list(range(cache.slots)), []  # new: tokens that are not in `texts` yet, as they wait for the device
    for i in range(max_new_tokens):
        if i == 0:
            x = prefill(model, texts, cache, rows, prefill_chunk)
        elif any(cache.used[row] >= window for row in rows):
            for text, *more in zip(texts, *(token.tolist() for token in new)):
                text.extend(more)
            new.clear()
            texts = [rolled(model, cache, row, text) for row, text in zip(rows, texts)]
            x = prefill(model, texts, cache, rows, prefill_chunk)
        else:
            cache.plan(1, None if everyone else rows)
            x = model.hidden(token[:, None], cache)[:, -1]
        token = choose(model.lm_head(x).float(), temperature, top_k, top_p, vocab_size, generator)
        new.append(token)
        yield token


@torch.no_grad()
def serve(model, prompts, cache, max_new_tokens, tell, temperature=1.0, top_k=0, top_p=1.0, vocab_size=0, seeds=None, prefill_chunk=0):
    """
    Continuous batching: every prompt (a list of token ids, at least one) is continued in one of the cache's
    slots, and when it ends the next one takes its place. Yields the number of each prompt as it ends.

    tell(i, token) gets each token of prompt i and says whether it was the last. Prompt i draws by a generator
    of its own from seeds[i], so its text does not depend on its neighbours.
    """
    window = window_of(model, cache)
    waiting, idle, busy = deque(range(len(prompts))), deque(range(cache.slots)), {}  # busy: slot -> prompt, text, tokens told, generator
    for row in idle:
        cache.free(row)

    def step(rows):
        x = prefill(model, [busy[row][1] for row in rows], cache, rows, prefill_chunk)
        for row, logits in zip(rows, model.lm_head(x).float()):
            i, text, told, generator = busy[row]
            token = choose(logits[None], temperature, top_k, top_p, vocab_size, generator).item()
            text.append(token)
            busy[row][2] = told + 1
            if tell(i, token) or told + 1 == max_new_tokens:
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
            step(one_token)
        while waiting and idle:
            i, row = waiting.popleft(), idle.popleft()
            generator = torch.Generator(cache.device)
            generator.manual_seed(seeds[i] if seeds else i)
            busy[row] = [i, list(prompts[i])[-window:], 0, generator]
            longer.append(row)
        if longer:
            step(longer)
        yield from ended


class Teller:
    """
    Token ids as text while they come: a character of several tokens is told once it is whole, and nothing
    from the first of the `stops` on; what may be the beginning of a stop waits until it is known.
    decode: a list of ids -> UTF-8 bytes; ends: ids that end a text, untold.
    """

    def __init__(self, decode, stops=(), ends=()):
        self.decode, self.stops, self.ends = decode, stops, ends
        self.characters = codecs.getincrementaldecoder('utf-8')(errors='replace')
        self.waiting, self.ended = '', False

    def tell(self, token):
        """The text that this token makes certain, '' from the end on; `ended` says whether there is any more."""
        if self.ended or token in self.ends:
            text, self.ended = '' if self.ended else self.rest(), True
            return text
        return self.after(self.characters.decode(self.decode([token])))

    def after(self, text):
        text = self.waiting + text
        found = [at for at in map(text.find, self.stops) if at >= 0]
        if found:
            self.ended, self.waiting = True, ''
            return text[:min(found)]
        hold = max((n for stop in self.stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
        self.waiting = text[len(text) - hold:]
        return text[:len(text) - hold]

    def rest(self):
        """What still waits when no more tokens come."""
        if self.ended:
            return ''
        text = self.after(self.characters.decode(b'', final=True))
        text, self.waiting = text + self.waiting, ''
        return text
