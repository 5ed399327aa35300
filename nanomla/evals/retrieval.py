"""
Long-context retrieval on texts that a seed makes, by length and depth, and its heat map.

    needle     one sentence, "The secret word of <name> is <word>.", somewhere in other text, and at
               the end the same sentence again as far as "is" (after Kamradt 2023)
    key_value  lines "<key>: <word>", and at the end one of the keys again (Liu et al. 2023,
               section 3)

Names, keys and words are made up of six letters, so that only the context can answer. Each trial is
counted in three ways, from the strictest to the most sensitive, which shows what a small model
begins to learn:

    exact      greedy decoding would write the word
    ranked     of `candidates` words the right one is the most probable; by guessing 1 / candidates
    pairwise   the share of the wrong candidates that are less probable than the right one; by
               guessing 1/2

In key_value the wrong ones are the words of other lines, so that only the right line gives the
right answer.
"""

import math
import random
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nanomla.checkpoints.tokenizer import HFTokenizer
from nanomla.core import figures
from nanomla.core.tokenizers import Tokenizer
from nanomla.evals.scoring import Request, Score, Scorer

CONSONANTS, VOWELS = 'bdfghklmnprstvwz', 'aeiou'
SENTENCES = (
    'The {} of the {} was {} and the {} was not.',
    'A {} came to the {} with a {} and a {}.',
    'No {} is as {} as the {} in the {}.',
    'They saw the {} by the {}, and the {} was {}.',
)
METRICS = ('exact', 'ranked', 'pairwise')


@dataclass(frozen=True)
class Trials:
    """
    How the trials of a task are made. They depend on nothing else.

    task: a name in TASKS
    trials: for each length and depth
    candidates: words to choose among
    begin: ids in front of each text
    end: ids between a text and its question, from where a model in a conversation answers
    haystack: (N,) ids to cut pieces from for the needle; None: sentences about nothing
    """

    task: str
    tokenizer: Tokenizer | HFTokenizer
    trials: int = 8
    candidates: int = 8
    seed: int = 1337
    begin: Sequence[int] = ()
    end: Sequence[int] = ()
    haystack: np.ndarray | None = None

    def make(self, length: int, depth: float, rng: random.Random) -> Request | None:
        return TASKS[self.task](self, length, depth, rng)


# -------------------------------------------------------------------------------------------------
# texts


def word(rng: random.Random) -> str:
    """Return six letters that can be spoken, such as 'melodi'."""
    return ''.join(rng.choice(CONSONANTS) + rng.choice(VOWELS) for _ in range(3))


def new_word(rng: random.Random, used: Container[str]) -> str:
    while True:
        made = word(rng)
        if made not in used:
            return made


def words(rng: random.Random, n: int) -> list[str]:
    """Return n different words."""
    made = []
    for _ in range(n):
        made.append(new_word(rng, made))
    return made


def encode_inside(tokenizer: Tokenizer | HFTokenizer, text: str, before: str = '\n') -> list[int]:
    """
    Return the ids of `text` as it stands after `before`: some tokenizers put a blank at the
    beginning of every text, but not inside one.
    """
    begin, whole = tokenizer.encode(before), tokenizer.encode(before + text)
    if whole[: len(begin)] == begin:
        return whole[len(begin) :]
    return tokenizer.encode(text)


def filler(trials: Trials, n: int, rng: random.Random) -> list[int]:
    """Return n ids to hide something in: a piece of the haystack, or sentences about nothing."""
    if trials.haystack is not None and len(trials.haystack) >= n:
        start = rng.randrange(len(trials.haystack) - n + 1)
        return trials.haystack[start : start + n].tolist()
    ids = []
    while len(ids) < n:
        sentence = rng.choice(SENTENCES)
        nouns = [word(rng) for _ in range(4)]
        ids += encode_inside(trials.tokenizer, sentence.format(*nouns) + '\n')
    return ids[:n]


def needle(trials: Trials, length: int, depth: float, rng: random.Random) -> Request | None:
    """
    Return one trial: the context and the candidates for its continuation, the right one first; None
    where `length` tokens are too few. Context and right continuation have `length` tokens together.

    depth: where the answer stands, 0 at the beginning, 1 at the end
    """
    name, *options = words(rng, trials.candidates + 1)
    query = f'The secret word of {name.capitalize()} is'
    line = query if trials.end else '\n' + query
    question = encode_inside(trials.tokenizer, line)
    answers = [encode_inside(trials.tokenizer, f' {option}', before=query) for option in options]
    hidden = encode_inside(trials.tokenizer, f'\n{query} {options[0]}.\n')
    room = length - len(trials.begin) - len(trials.end) - len(question)
    room -= len(answers[0]) + len(hidden)
    if room < 0:
        return None
    around = filler(trials, room, rng)
    place = round(depth * room)
    text = [*around[:place], *hidden, *around[place:]]
    return [*trials.begin, *text, *trials.end, *question], answers


@dataclass
class Line:
    """A line of key_value, the question for its key, and the answer, as ids."""

    line: list[int]
    question: list[int]
    answer: list[int]

    @classmethod
    def of(cls, tokenizer: Tokenizer | HFTokenizer, key: str, value: str) -> 'Line':
        return cls(
            encode_inside(tokenizer, f'{key}: {value}\n'),
            encode_inside(tokenizer, f'{key}:'),
            encode_inside(tokenizer, f' {value}', before=f'{key}:'),
        )


def key_value(trials: Trials, length: int, depth: float, rng: random.Random) -> Request | None:
    """As `needle`: as many lines as fit into `length` tokens; the one at `depth` is asked for."""
    lines, used = [], set()
    left = length - len(trials.begin) - len(trials.end)
    longest = 0  # tokens of a question and its answer
    while True:
        key, value = new_word(rng, used), new_word(rng, used)
        if key == value:
            continue
        line = Line.of(trials.tokenizer, key, value)
        question_and_answer = len(line.question) + len(line.answer)
        if len(line.line) + max(longest, question_and_answer) > left:
            break
        left -= len(line.line)
        longest = max(longest, question_and_answer)
        used |= {key, value}
        lines.append(line)
    if len(lines) < 2:
        return None
    asked = lines[round(depth * (len(lines) - 1))]
    others = [line.answer for line in lines if line is not asked]
    wrong = rng.sample(others, min(trials.candidates - 1, len(others)))
    context = list(trials.begin)
    for line in lines:
        context += line.line
    return [*context, *trials.end, *asked.question], [asked.answer, *wrong]


TASKS = dict(needle=needle, key_value=key_value)


# -------------------------------------------------------------------------------------------------
# results


def evaluate(
    scorer: Scorer,
    trials: Trials,
    lengths: Sequence[int],
    depths: Sequence[float],
    progress: Callable[[int], object] | None = None,
) -> dict:
    """
    Run the trials at each length (tokens) and depth (0 to 1), which are the same for every model
    with the same tokenizer. Return exact, ranked and pairwise over all, `cells` with those of each
    length and depth, and `chance`, what ranked is by guessing.
    """
    cells, chances = [], []
    for length in lengths:
        for depth in depths:
            requests = []
            for n in range(trials.trials):
                rng = random.Random(f'{trials.seed} {trials.task} {length} {depth} {n}')
                requests.append(trials.make(length, depth, rng))
            counts = dict.fromkeys(METRICS, 0)
            for (_, answers), scores in zip(requests, scorer.score(requests, progress)):
                for name, value in judge(scores).items():
                    counts[name] += value
                chances.append(1 / len(answers))
            shares = {name: count / trials.trials for name, count in counts.items()}
            cells.append(dict(length=length, depth=depth) | shares)
    means = {name: sum(cell[name] for cell in cells) / len(cells) for name in METRICS}
    chance = sum(chances) / len(chances)
    return means | dict(chance=chance, trials=trials.trials, cells=cells)


def judge(scores: list[Score]) -> dict[str, float]:
    """Return one trial's part of each metric; the first of its scores is that of the right word."""
    right, *wrong = (sum(score.logp) for score in scores)
    beaten = sum(right > other for other in wrong)
    return dict(
        exact=all(scores[0].greedy),
        ranked=beaten == len(wrong),
        pairwise=beaten / len(wrong),
    )


def least_length(trials: Trials) -> int:
    """Return the fewest tokens in which any trial of these fits, up to a multiple of 8."""
    length = 8
    while not all_fit(trials, length):
        length += 8
    return length


def all_fit(trials: Trials, length: int) -> bool:
    for n in range(20):
        if trials.make(length, 0.5, random.Random(f'{trials.seed} {n}')) is None:
            return False
    return True


# -------------------------------------------------------------------------------------------------
# the heat map

TITLES = dict(needle='Needle in a haystack', key_value='Key–value retrieval')
MAPS = dict(exact='greedy decoding writes it', pairwise='more probable than a wrong word')


def heat_map(results: list[tuple[str, dict]], task: str, path: Path, footer: str) -> None:
    """
    Draw two maps for each model and cache format: length to the right, depth downwards, exact and
    pairwise as colour.

    results: labels and what `evaluate` returned
    """
    cells = []
    for _, result in results:
        cells += result['cells']
    depths = {cell['depth'] for cell in cells}
    height = 1.0 + len(results) * (1.0 + 0.3 * max(3, len(depths)))
    note = (
        f'share of {results[0][1]["trials"]} trials in each cell; '
        'guessing is right in 0.5 of the pairs on the right'
    )
    look = dict(size=(figures.WIDTH, height), title=TITLES[task], note=note)
    with figures.sheet(len(results), 2, **look) as (fig, axes):
        axes = np.reshape(axes, (len(results), 2))
        for (label, result), row in zip(results, axes):
            for ax, (metric, meaning) in zip(row, MAPS.items()):
                draw_map(ax, result['cells'], cells, metric)
                ax.set_xlabel(f'tokens; {meaning}: {result[metric]:.2f}', fontsize=10)
            row[0].set_title(figures.plain(label), fontsize=10.5)
            row[0].set_ylabel('depth')
        figures.footer(fig, footer)
        figures.save(fig, path)


def draw_map(ax, cells: list[dict], all_cells: list[dict], metric: str) -> None:
    """Draw one map; `all_cells` are those of all maps, which share their lengths and depths."""
    lengths = sorted({cell['length'] for cell in all_cells})
    depths = sorted({cell['depth'] for cell in all_cells})
    grid = np.full((len(depths), len(lengths)), math.nan)
    for cell in cells:
        grid[depths.index(cell['depth']), lengths.index(cell['length'])] = cell[metric]
    ax.imshow(grid, cmap='viridis', vmin=0, vmax=1, aspect='auto')
    for (i, j), value in np.ndenumerate(grid):
        if not math.isnan(value):
            color = 'white' if value < 0.6 else 'black'
            text = dict(ha='center', va='center', fontsize=9, color=color)
            ax.text(j, i, f'{value:.2f}', **text)
    ax.set_xticks(range(len(lengths)), [f'{length:,}' for length in lengths])
    ax.set_yticks(range(len(depths)), [f'{depth:.0%}' for depth in depths])
    ax.grid(False)
