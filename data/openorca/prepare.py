"""
Instructions and answers of OpenOrca, as train.jsonl and val.jsonl.

A line is {"system": ..., "question": ..., "response": ...}. They come from huggingface.co
(Open-Orca/OpenOrca, streamed: only as many rows as are wanted), or from a local JSONL or parquet
file with --input. Without either, or with --input=rules, a small set of instructions with one right
answer each is made by rule (sums, spelling, sorting, small Python functions), and meta.json says
so.

With --tokenizer=FOLDER the same examples are a dataset for train.py, too: train.bin and val.bin in
the tokens of that model, each example by its chat template, or under headings where it has none.
"""

import json
import random
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = map(str, HERE.parents[:2])  # data/ and the repository

import hugging_face

from nanomla.adapters.instructions import KEYS, check_example, prompt_of, read_examples
from nanomla.core.configurator import UserError, configure
from nanomla.core.files import write_file
from nanomla.core.token_files import summary
from nanomla.training.next_steps import print_next_steps

dataset = 'Open-Orca/OpenOrca'  # its name on huggingface.co
input = ''  # instead: a local .jsonl or .parquet file, or 'rules' for the set made by rule
train = 100  # examples to train on
val = 20  # examples to evaluate on
seed = 0  # draws them among the first `pool`
pool = 2000  # so many rows are read before the draw
tokenizer = ''  # a model: its folder, or its name on the hub; '' = no tokens
num_proc = 0  # processes that tokenise (0 = one a core)
out = ''  # the folder ('' = data/openorca)


# -------------------------------------------------------------------------------------------------
# from a file or from the hub


def with_our_names(row):
    """Return a row with our names for the columns that other datasets have."""
    names = {
        'system_prompt': 'system',
        'instruction': 'question',
        'prompt': 'question',
        'output': 'response',
        'answer': 'response',
        'completion': 'response',
    }
    if not isinstance(row, dict):
        return row  # the check says what it should be
    return {names.get(key, key): value for key, value in row.items()}


def from_file(path: str, most: int) -> list[dict]:
    """Return the first `most` examples of a JSONL or parquet file."""
    if not Path(path).is_file():
        raise UserError(f'--input={path}: there is no such file')
    suffix = Path(path).suffix
    if suffix == '.parquet':
        rows = from_parquet(path)
    elif suffix in ('.jsonl', '.json'):
        rows = from_jsonl(path)
    else:
        raise UserError(f'--input={path}: give a .jsonl or a .parquet file')
    return [check_example(with_our_names(row), where) for where, row in islice(rows, most)]


def from_parquet(path: str) -> Iterator[tuple[str, dict]]:
    """Yield where each row is, and the row."""
    for number, row in enumerate(load_rows('parquet', data_files=path), 1):
        yield f'{path}, row {number}', row


def from_jsonl(path: str) -> Iterator[tuple[str, object]]:
    """Yield where each line is, and its JSON."""
    with open(path, encoding='utf-8') as file:
        for number, line in enumerate(file, 1):
            where = f'{path}:{number}'
            try:
                row = json.loads(line)
            except ValueError:
                raise UserError(
                    f'{where}: not JSON; a line is {{"question": ..., "response": ...}}'
                ) from None
            yield where, row


def load_rows(path: str, **files):
    """Return rows as Hugging Face's `datasets` streams them."""
    datasets = hugging_face.import_datasets()
    try:
        return datasets.load_dataset(path, split='train', streaming=True, **files)
    except Exception as error:
        raise UserError(f'{files or path} cannot be read ({type(error).__name__})') from None


def from_hub(most: int) -> list[dict] | None:
    """Return the first `most` examples of the dataset on the hub, None when it does not answer."""
    hugging_face.use_cache_without_network()
    rows = []
    try:
        for row in load_rows(dataset):
            row = with_our_names(row)
            if row.get('question') and row.get('response'):  # a few of OpenOrca's are empty
                rows.append(check_example(row, dataset))
            if len(rows) == most:
                break
    except Exception as error:  # its network errors come in many classes
        why = ' '.join(str(error).split())[:100]
        print(
            f'{dataset} cannot be loaded ({why}): making instructions by rule instead '
            '(or give --input=FILE)',
            file=sys.stderr,
        )
        return None
    return rows


# -------------------------------------------------------------------------------------------------
# by rule


def by_rule(rng: random.Random) -> dict:
    """Return an instruction whose answer follows from it."""
    words = (
        'apple river stone cloud table green seven window garden silver music paper forest winter '
        'bridge candle pocket island mirror ladder copper rabbit thunder velvet'
    ).split()
    functions = dict(  # name -> what it returns, arguments, the value
        add=('the sum of two numbers', 'a, b', 'a + b'),
        square=('the square of a number', 'x', 'x * x'),
        is_even=('whether a number is even', 'n', 'n % 2 == 0'),
        last=('the last element of a list', 'items', 'items[-1]'),
        longest=('the longest of some words', 'words', 'max(words, key=len)'),
        middle=('the middle of two numbers', 'a, b', '(a + b) / 2'),
        shout=('a text in capitals', 'text', 'text.upper()'),
    )
    systems = ('', '', 'You are a careful assistant. Answer briefly.', 'Answer the question.')

    some = rng.sample(words, rng.randint(3, 6))
    first, second = some[:2]
    listed, spaced = ', '.join(some), ' '.join(some)
    in_order, backwards = ', '.join(sorted(some)), ' '.join(reversed(some))
    shortest = min(some, key=len)
    a = rng.randint(2, 99)
    b = rng.randint(2, 99)
    name = rng.choice(list(functions))
    what, arguments, value = functions[name]
    question, response = rng.choice(
        (
            (f'What is {a} plus {b}?', f'{a} plus {b} is {a + b}.'),
            (f'What is {a} times {b}?', f'{a} times {b} is {a * b}.'),
            (f'Sort these words by the alphabet: {listed}.', in_order),
            (
                f'Which of these words is the shortest: {listed}?',
                f'The shortest word is "{shortest}".',
            ),
            (f'Spell the word "{first}" letter by letter.', '-'.join(first)),
            (f'Write these words backwards, the last one first: {spaced}.', backwards),
            (f'Count the letters of "{second}".', f'"{second}" has {len(second)} letters.'),
            (
                f'Write a Python function {name} that returns {what}.',
                f'def {name}({arguments}):\n    return {value}',
            ),
        )
    )
    return dict(system=rng.choice(systems), question=question, response=response)


def made_by_rule(number: int, seed: int) -> list[dict]:
    """Return as many different instructions."""
    if number > 5000:
        raise UserError(f'rules make at most 5000 different instructions, not {number}')
    rng = random.Random(seed)
    rows = {}
    while len(rows) < number:
        row = by_rule(rng)
        rows.setdefault(row['question'], row)
    return list(rows.values())


def read_rows(number: int) -> tuple[list[dict], str]:
    """Return at least `number` examples, from the first `pool` if there are more; their source."""
    most = max(pool, number)
    if input and input != 'rules':
        return from_file(input, most), f'{Path(input).name} (your own file)'
    rows = None if input == 'rules' else from_hub(most)
    if rows is None:
        return made_by_rule(number, seed), 'instructions made by rule (no OpenOrca)'
    return rows, dataset


def write_lines(folder: Path, splits: dict[str, list[dict]]) -> None:
    """Write train.jsonl and val.jsonl."""
    for split, rows in splits.items():
        lines = []
        for row in rows:
            wanted = {key: row[key] for key in KEYS}
            lines.append(json.dumps(wanted, ensure_ascii=False) + '\n')
        write_file(folder / f'{split}.jsonl', ''.join(lines))
        read_examples(folder / f'{split}.jsonl')  # raises where it could not be read again


def write_tokens(folder: Path, codec, splits: dict[str, list[dict]], meta: dict) -> None:
    """Write train.bin, val.bin and meta.json in the tokens of `codec`, a DocumentCodec."""
    from nanomla.checkpoints.tokens.chat import ChatTemplate
    from nanomla.checkpoints.tokens.prepare import DocumentCodec, write_documents

    template = ChatTemplate.of(codec.tokenizer)
    if template is not None:  # which writes what begins and ends a text
        codec = DocumentCodec(codec.tokenizer, begin=[], end=[])
    texts = {}
    for split, rows in splits.items():
        texts[split] = [text_of(row, template) for row in rows]
    meta = write_documents(folder, codec, texts, meta, num_proc)
    print(summary(folder, meta))


def text_of(example: dict, template) -> str:
    """Return an example as one text, by a chat template or None."""
    if template is None:
        return prompt_of(example, 'marked') + example['response']
    messages = [
        dict(role='user', content=example['question']),
        dict(role='assistant', content=example['response']),
    ]
    if example['system']:
        messages.insert(0, dict(role='system', content=example['system']))
    return template.render(messages, answer_follows=False)


def main():
    configure(globals())
    if min(train, val) < 1:
        raise UserError(f'train={train} and val={val} must be at least 1')
    if tokenizer:
        from nanomla.checkpoints.tokens.prepare import DocumentCodec, open_model_tokenizer

        codec = DocumentCodec.of(open_model_tokenizer(tokenizer))
    rows, source = read_rows(train + val)
    if len(rows) < train + val:
        raise UserError(
            f'{source} has {len(rows)} examples, too few for --train={train} and --val={val}'
        )
    rows = random.Random(seed).sample(rows, train + val)
    folder = Path(out) if out else HERE
    splits = dict(train=rows[:train], val=rows[train:])
    meta = dict(source=source, train=train, val=val, seed=seed)
    write_lines(folder, splits)
    if tokenizer:
        write_tokens(folder, codec, splits, meta)
    else:
        for split in splits:  # of other examples than those that are there now
            (folder / f'{split}.bin').unlink(missing_ok=True)
        write_file(folder / 'meta.json', json.dumps(meta, indent=1) + '\n')
    print(f'{folder}: {train} examples to train on, {val} to evaluate on, of {source}')
    benchmark = ['bench_adapters.py', 'random:tiny', 'config/adapters.json', 'out-adapters']
    if out:
        benchmark.append(f'--data={out}')
    commands = [benchmark]
    if tokenizer:
        finetune = ['train.py', 'config/finetune_shakespeare.py', f'--init_from={tokenizer}']
        commands.append([*finetune, f'--dataset={folder}', '--out_dir=out-openorca'])
    print_next_steps(*commands)


if __name__ == '__main__':
    main()
