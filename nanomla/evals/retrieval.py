"""
Long-context retrieval on texts that a seed makes, by length and depth; and the heat map of it.

    needle     one sentence, "The secret word of <name> is <word>.", somewhere in other text, and at the end the same
               sentence again as far as "is" (after Kamradt 2023)
    key_value  lines "<key>: <word>", and at the end one of the keys again (Liu et al. 2023, section 3)

Names, keys and words are made up of six letters, so that nothing but the context can tell them. Each trial counts in
three ways, from the strictest to the most sensitive, which sees what a small model begins to know:

    exact      greedy decoding would write the word
    ranked     of `candidates` words the right one is the most probable; by guessing 1 / candidates
    pairwise   the share of the wrong candidates that are less probable than the right one; by guessing 1/2

In key_value the wrong ones are the words of other lines, so that only the right line gives the right answer.
"""

import random

CONSONANTS, VOWELS = 'bdfghklmnprstvwz', 'aeiou'
SENTENCES = (
    'The {} of the {} was {} and the {} was not.',
    'A {} came to the {} with a {} and a {}.',
    'No {} is as {} as the {} in the {}.',
    'They saw the {} by the {}, and the {} was {}.',
)
TASKS, COUNTED = ('needle', 'key_value'), ('exact', 'ranked', 'pairwise')


def word(rng):
    """Six letters that can be spoken, such as 'melodi'."""
    return ''.join(rng.choice(CONSONANTS) + rng.choice(VOWELS) for _ in range(3))


def words(rng, n):
    """n different ones."""
    made = {}
    while len(made) < n:
        made[word(rng)] = None
    return list(made)


def inside(codec, text, before='\n'):
    """The ids of `text` where it stands behind `before`, whatever a tokenizer puts at the beginning of a text."""
    begin, whole = codec.encode(before), codec.encode(before + text)
    return whole[len(begin) :] if whole[: len(begin)] == begin else codec.encode(text)


def filler(codec, n, rng, hay=None):
    """n ids to hide something in: a piece of `hay` (an array of ids) that is long enough, else sentences about nothing."""
    if hay is not None and len(hay) >= n:
        at = rng.randrange(len(hay) - n + 1)
        return list(map(int, hay[at : at + n]))
    ids = []
    while len(ids) < n:
        ids += inside(codec, rng.choice(SENTENCES).format(*(word(rng) for _ in range(4))) + '\n')
    return ids[:n]


def needle(codec, length, depth, candidates, rng, begin=(), hay=None):
    """
    One trial: (context ids, candidate continuations as ids, the right one first), or None where `length` tokens are too few.
    Context and the right continuation together have `length` tokens; depth 0 hides at the beginning, 1 at the end.
    """
    name, *options = words(rng, candidates + 1)
    query = f'The secret word of {name.capitalize()} is'
    question = inside(codec, '\n' + query)
    answers = [inside(codec, ' ' + option, before=query) for option in options]
    hidden = inside(codec, f'\n{query} {options[0]}.\n')
    room = length - len(begin) - len(question) - len(answers[0]) - len(hidden)
    if room < 0:
        return None
    around = filler(codec, room, rng, hay)
    at = round(depth * room)
    return [*begin, *around[:at], *hidden, *around[at:], *question], answers


def key_value(codec, length, depth, candidates, rng, begin=(), hay=None):
    """As `needle`; as many lines as fit into `length` tokens, and the one at `depth` is asked for."""
    lines, left, made = [], length - len(begin), {}
    longest = 0  # tokens of question and answer
    while True:
        key, value = (
            next(w for w in iter(lambda: word(rng), None) if w not in made) for _ in range(2)
        )
        line = inside(codec, f'{key}: {value}\n')
        question, answer = inside(codec, f'{key}:'), inside(codec, ' ' + value, before=f'{key}:')
        if key == value or len(line) + max(longest, len(question) + len(answer)) > left:
            if key != value:
                break
            continue
        left -= len(line)
        longest = max(longest, len(question) + len(answer))
        made |= {key: None, value: None}
        lines.append((line, question, answer))
    if len(lines) < 2:
        return None
    asked = round(depth * (len(lines) - 1))
    others = [answer for i, (_, _, answer) in enumerate(lines) if i != asked]
    answers = [lines[asked][2], *rng.sample(others, min(candidates - 1, len(others)))]
    return [*begin, *(i for line, _, _ in lines for i in line), *lines[asked][1]], answers


def evaluate(
    scorer, task, codec, lengths, depths, trials, candidates, seed, begin=(), hay=None, bar=None
):
    """
    `trials` trials at each length (tokens) and depth (0 to 1), the same for every model with the same tokenizer. Returns
    exact, ranked and pairwise over all, `cells` with those of each length and depth, and chance, what ranked is by guessing.
    """
    make, cells, chances = dict(needle=needle, key_value=key_value)[task], [], []
    for length in lengths:
        for depth in depths:
            made = [
                make(
                    codec,
                    length,
                    depth,
                    candidates,
                    random.Random(f'{seed} {task} {length} {depth} {n}'),
                    begin,
                    hay,
                )
                for n in range(trials)
            ]
            exact = ranked = pairwise = 0
            for answers, judged in zip(
                (answers for _, answers in made), scorer.score(made, bar and bar.update)
            ):
                exact += all(judged[0][1])
                total = [sum(logp) for logp, _ in judged]
                beaten = sum(total[0] > other for other in total[1:])
                ranked += beaten == len(total) - 1
                pairwise += beaten / (len(total) - 1)
                chances.append(1 / len(answers))
            cells.append(
                dict(length=length, depth=depth)
                | {name: value / trials for name, value in zip(COUNTED, (exact, ranked, pairwise))}
            )
    mean = {name: sum(cell[name] for cell in cells) / len(cells) for name in COUNTED}
    return mean | dict(chance=sum(chances) / len(chances), trials=trials, cells=cells)


def least_length(task, codec, candidates, seed, begin=(), hay=None):
    """The fewest tokens in which any trial of these fits, for lengths that are too short."""
    make, length = dict(needle=needle, key_value=key_value)[task], 8
    while any(
        make(codec, length, 0.5, candidates, random.Random(f'{seed} {n}'), begin, hay) is None
        for n in range(20)
    ):
        length += 8
    return length


def heat_map(figures, results, task, path, footer):
    """results: [(label, what `evaluate` returned)], two maps each: length to the right, depth downwards, exact and pairwise as colour."""
    titles = dict(needle='Needle in a haystack', key_value='Key–value retrieval')
    lengths, depths = (
        sorted({cell[name] for _, result in results for cell in result['cells']})
        for name in ('length', 'depth')
    )
    rows, note = (
        len(results),
        f'share of {results[0][1]["trials"]} trials in each cell; guessing is right in 0.5 of the pairs on the right',
    )
    size = (figures.WIDTH, 1.0 + rows * (1.0 + 0.3 * max(3, len(depths))))
    with figures.sheet(rows, 2, size=size, title=titles[task], note=note) as (fig, axes):
        for row, (label, result) in enumerate(results):
            for column, (name, what) in enumerate(
                (
                    ('exact', 'greedy decoding writes it'),
                    ('pairwise', 'more probable than a wrong word'),
                )
            ):
                ax = axes[row, column] if rows > 1 else axes[column]
                share = {(cell['depth'], cell['length']): cell[name] for cell in result['cells']}
                grid = [
                    [share.get((depth, length), float('nan')) for length in lengths]
                    for depth in depths
                ]
                ax.imshow(grid, cmap='viridis', vmin=0, vmax=1, aspect='auto')
                for i, values in enumerate(grid):
                    for j, value in enumerate(values):
                        if value == value:
                            ax.text(
                                j,
                                i,
                                f'{value:.2f}',
                                ha='center',
                                va='center',
                                fontsize=9,
                                color='white' if value < 0.6 else 'black',
                            )
                ax.set_xticks(range(len(lengths)), [f'{length:,}' for length in lengths])
                ax.set_yticks(range(len(depths)), [f'{depth:.0%}' for depth in depths])
                ax.grid(False)
                ax.set_title(figures.plain(label) if column == 0 else '', fontsize=10.5)
                ax.set_xlabel(f'tokens; {what}: {result[name]:.2f}', fontsize=10)
                ax.set_ylabel('depth' if column == 0 else '')
        figures.footer(fig, footer)
        figures.save(fig, path)
