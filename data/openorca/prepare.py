"""
Instructions and answers of OpenOrca, as train.jsonl and val.jsonl: {"system", "question", "response"} a line.

They come from huggingface.co (Open-Orca/OpenOrca, streamed: only as many rows as are wanted), or from a local JSONL or
parquet file with --input. Without either, or with --input=rules, a small set of instructions with one right
answer each is made by rule (sums, spelling, sorting, small Python functions), and meta.json says so.
"""

import json
import os
import random
import ssl
import sys
import urllib.error
import urllib.request
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))  # the repository

from nanomla.adapters.instructions import KEYS, checked, examples
from nanomla.core.configurator import UserError, configure
from nanomla.core.files import write_file

dataset = 'Open-Orca/OpenOrca'  # its name on huggingface.co
input = ''  # instead: a local .jsonl or .parquet file, or 'rules' for the set made by rule
train = 100  # examples to train on
val = 20  # examples to evaluate on
seed = 0  # draws them among the first `pool`
pool = 2000  # so many rows are read before the draw
out = ''  # the folder ('' = data/openorca)

SPELLING = {
    'system_prompt': 'system',
    'instruction': 'question',
    'prompt': 'question',
    'output': 'response',
    'answer': 'response',
    'completion': 'response',
}


def from_file(path):
    if not Path(path).is_file():
        raise UserError(f'--input={path}: there is no such file')
    if Path(path).suffix == '.parquet':
        return [
            checked(named(row), f'{path}, row {n}')
            for n, row in zip(range(1, pool + 1), hugging_face('parquet', data_files=path))
        ]
    if Path(path).suffix not in ('.jsonl', '.json'):
        raise UserError(f'--input={path}: give a .jsonl or a .parquet file')
    rows = []
    with open(path, encoding='utf-8') as file:
        for number, line in zip(range(1, pool + 1), file):
            try:
                rows.append(checked(named(json.loads(line)), f'{path}:{number}'))
            except ValueError:
                raise UserError(
                    f'{path}:{number}: not JSON; a line is {{"question": ..., "response": ...}}'
                ) from None
    return rows


def named(row):
    return (
        {SPELLING.get(key, key): value for key, value in row.items()}
        if isinstance(row, dict)
        else row
    )


def hugging_face(path, **files):
    try:
        import datasets
    except ImportError:
        raise UserError('this needs Hugging Face datasets: pip install datasets') from None
    try:
        return datasets.load_dataset(path, split='train', streaming=True, **files)
    except Exception as error:
        raise UserError(f'{files or path} cannot be read ({type(error).__name__})') from None


def from_hub():
    """ResultsTable of the hub, or None when it cannot be reached."""
    try:
        urllib.request.urlopen(
            os.environ.get('HF_ENDPOINT', 'https://huggingface.co'), timeout=10
        ).close()
    except urllib.error.HTTPError:
        pass  # an answer
    except OSError as error:
        if not isinstance(
            getattr(error, 'reason', None), ssl.SSLError
        ):  # which may be Hugging Face's own client's business
            os.environ['HF_HUB_OFFLINE'] = (
                '1'  # from its cache or not at all, instead of half a minute of trying
            )
    try:
        rows = []
        for row in hugging_face(dataset):
            row = named(row)
            if row.get('question') and row.get('response'):  # a few of OpenOrca's answers are empty
                rows.append(checked(row, dataset))
            if len(rows) == pool:
                break
        return rows
    except Exception as error:  # its network errors come in many classes
        print(
            f'{dataset} cannot be had ({" ".join(str(error).split())[:100]}): making instructions by rule instead (or give --input=FILE)',
            file=sys.stderr,
        )
        return None


# -------------------------------------------------------------------------------------------------
# by rule

WORDS = (
    'apple river stone cloud table green seven window garden silver music paper forest winter bridge candle '
    'pocket island mirror ladder copper rabbit thunder velvet'
).split()
FUNCTIONS = dict(
    add=('the sum of two numbers', 'a, b', 'a + b'),
    square=('the square of a number', 'x', 'x * x'),
    is_even=('whether a number is even', 'n', 'n % 2 == 0'),
    last=('the last element of a list', 'items', 'items[-1]'),
    longest=('the longest of some words', 'words', 'max(words, key=len)'),
    middle=('the middle of two numbers', 'a, b', '(a + b) / 2'),
    shout=('a text in capitals', 'text', 'text.upper()'),
)


def by_rule(rng):
    """One instruction whose answer follows from it."""
    some = rng.sample(WORDS, rng.randint(3, 6))
    a, b = rng.randint(2, 99), rng.randint(2, 99)
    name = rng.choice(list(FUNCTIONS))
    what, arguments, value = FUNCTIONS[name]
    question, response = rng.choice(
        (
            (f'What is {a} plus {b}?', f'{a} plus {b} is {a + b}.'),
            (f'What is {a} times {b}?', f'{a} times {b} is {a * b}.'),
            (f'Sort these words by the alphabet: {", ".join(some)}.', ', '.join(sorted(some))),
            (
                f'Which of these words is the shortest: {", ".join(some)}?',
                f'The shortest word is "{min(some, key=len)}".',
            ),
            (f'Spell the word "{some[0]}" letter by letter.', '-'.join(some[0])),
            (
                f'Write these words backwards, the last one first: {" ".join(some)}.',
                ' '.join(some[::-1]),
            ),
            (f'Count the letters of "{some[1]}".', f'"{some[1]}" has {len(some[1])} letters.'),
            (
                f'Write a Python function {name} that returns {what}.',
                f'def {name}({arguments}):\n    return {value}',
            ),
        )
    )
    return dict(
        system=rng.choice(
            ('', '', 'You are a careful assistant. Answer briefly.', 'Answer the question.')
        ),
        question=question,
        response=response,
    )


def made_by_rule(n):
    rng, rows = random.Random(seed), {}
    while len(rows) < n:
        row = by_rule(rng)
        rows.setdefault(row['question'], row)
    return list(rows.values())


if __name__ == '__main__':
    configure(globals())
    if min(train, val) < 1:
        raise UserError(f'train={train} and val={val} must be at least 1')
    pool = max(pool, train + val)
    rows, source = (
        (from_file(input), f'{Path(input).name} (your own file)')
        if input and input != 'rules'
        else (None if input else from_hub(), dataset)
    )
    if rows is None:
        if train + val > 5000:
            raise UserError(f'rules make at most 5000 different instructions, not {train + val}')
        rows, source = made_by_rule(train + val), 'instructions made by rule (no OpenOrca)'
    if len(rows) < train + val:
        raise UserError(
            f'{source} has {len(rows)} examples, too few for --train={train} and --val={val}'
        )
    rows = random.Random(seed).sample(rows, train + val)
    folder = Path(out) if out else HERE
    folder.mkdir(parents=True, exist_ok=True)
    for split, part in (('train', rows[:train]), ('val', rows[train:])):
        write_file(
            folder / f'{split}.jsonl',
            ''.join(
                json.dumps({key: row[key] for key in KEYS}, ensure_ascii=False) + '\n'
                for row in part
            ).encode(),
        )
        examples(folder / f'{split}.jsonl')
    write_file(
        folder / 'meta.json',
        (
            json.dumps(dict(source=source, train=train, val=val, seed=seed), indent=1) + '\n'
        ).encode(),
    )
    print(f'{folder}: {train} examples to train on, {val} to evaluate on, of {source}')
