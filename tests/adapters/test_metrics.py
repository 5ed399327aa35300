"""Instructions as tokens to learn, and how answers are judged."""

import json

import pytest
import torch
from helpers import exit_code, needs
from hypothesis import given, settings
from hypothesis import strategies as st

from nanomla.adapters import instructions
from nanomla.adapters import metrics as answers
from nanomla.adapters.instructions import Encoder
from nanomla.core.configurator import UserError

needs('rouge_score')
ROW = dict(system='Be brief.', question='2 + 2?', response='It is 4.')
texts = st.text(st.characters(codec='utf-8'), max_size=30)


@settings(deadline=None, max_examples=50)
@given(texts)
def test_a_perfect_answer_scores_one(text):
    assert set(answers.scores([text], [text]).values()) == {1.0}


@settings(deadline=None, max_examples=50)
@given(texts, texts)
def test_scores_are_shares_and_f1_is_symmetric(a, b):
    assert all(0 <= score <= 1 for score in answers.scores([a], [b]).values())
    assert answers.token_f1(a, b) == answers.token_f1(b, a)


def test_scores_by_hand():
    found = answers.scores(['the cat sat on the mat'], ['the cat lay on a mat'])
    assert found['exact_match'] == 0 and found['token_f1'] == pytest.approx(
        4 / 6
    )  # the, cat, on, mat
    assert (
        found['rouge1'] == pytest.approx(4 / 6)
        and found['rouge2'] == pytest.approx(1 / 5)
        and found['rougeL'] == pytest.approx(4 / 6)
    )
    assert (
        answers.exact_match('It is  4.', 'it is 4 .') == 1
        and answers.exact_match('It is 4', 'It is 4.') == 0
    )
    assert answers.scores(['', 'x'], ['x', ''])['token_f1'] == 0


def test_a_copier_scores_chance_and_a_prophet_one():
    """The choice after token t is compared with token t + 1: who repeats token t knows nothing."""
    V, n, encoder = 200, 60, Encoder(None, 256, completion_only=False)
    generator = torch.Generator().manual_seed(0)
    found = {'copier': [], 'prophet': []}
    for _ in range(20):
        ids = torch.randint(33, V // 2 + 27, (n,), generator=generator)
        targets = torch.cat([ids[1:], torch.tensor([-1])])
        for who, likeliest in (('copier', ids), ('prophet', targets)):
            guess, truth = answers.predicted(likeliest, targets)
            assert len(guess) == len(truth) == n - 1 and truth == ids[1:].tolist()
            found[who].append(sum(a == b for a, b in zip(guess, truth)) / len(truth))
            if who == 'prophet':
                assert set(
                    answers.scores([encoder.decode(guess)], [encoder.decode(truth)]).values()
                ) == {1.0}
    assert set(found['prophet']) == {1.0} and sum(found['copier']) / 20 < 3 / (V // 2 - 6)


@pytest.mark.parametrize('template', ['marked', 'joined'])
@pytest.mark.parametrize('completion_only', [True, False])
def test_targets_are_the_next_tokens_of_what_is_learned(template, completion_only):
    encoder = Encoder(None, 256, template, completion_only)
    ids, targets = encoder.document(ROW)
    prompt, response = encoder.encode(ROW)
    assert ids == prompt + response and targets[-1] == -1 and len(ids) == len(targets)
    assert all(target in (-1, following) for target, following in zip(targets, ids[1:]))
    learned = [target for target in targets if target >= 0]
    assert learned == (response if completion_only else ids[1:])
    assert bytes(response).decode() == ROW['response'] + '\0' * (template == 'marked')
    assert encoder.decode(response + [65]) == ROW['response'] + (
        'A' if template == 'joined' else ''
    )
    assert ('### Response:' in bytes(prompt).decode()) == (
        template == 'marked'
    ) and b'Be brief.' in bytes(prompt)


@pytest.mark.parametrize(
    'line, words',
    [
        ('{"question": "x"', 'not JSON'),
        ('[1]', 'no object'),
        ('{"question": "x"}', "'response' is missing or empty"),
        ('{"question": "", "response": "y"}', "'question' is missing or empty"),
        ('{"question": "x", "response": 3}', "'response' is no text"),
        ('{"question": "x", "response": "y", "system": 1}', "'system' is no text"),
    ],
)
def test_a_malformed_line_is_named_by_its_number(tmp_path, line, words):
    path = tmp_path / 'train.jsonl'
    path.write_text(json.dumps(ROW) + '\n\n' + line + '\n')
    with pytest.raises(UserError, match=f'train.jsonl:3: {words}'):
        instructions.read_examples(path)
    assert instructions.read_examples(path, 1) == [ROW]


def test_files_that_are_none(tmp_path):
    (tmp_path / 'empty.jsonl').write_text('\n')
    (tmp_path / 'latin.jsonl').write_bytes(b'\xe9')
    for name, words in (
        ('empty', 'has no examples'),
        ('latin', 'not UTF-8'),
        ('missing', 'cannot read .* make it with'),
    ):
        with pytest.raises(UserError, match=words):
            instructions.read_examples(tmp_path / f'{name}.jsonl')
    with pytest.raises(UserError, match='no room for bytes'):
        Encoder(None, 100)
    with pytest.raises(UserError, match="template='chat' is not known"):
        Encoder(None, 256, 'chat')


@pytest.fixture
def prepare(capsys):
    """prepare(arguments) -> exit code, stdout, stderr of data/openorca/prepare.py."""

    def run(*arguments):
        code = exit_code('data/openorca/prepare.py', arguments)
        return code, *capsys.readouterr()

    return run


def test_instructions_by_rule(tmp_path, prepare):
    for folder in ('a', 'b'):
        code, out, err = prepare(
            '--input=rules', f'--out={tmp_path / folder}', '--train=30', '--val=5'
        )
        assert code == 0 and 'made by rule' in out, err
    assert (tmp_path / 'a/train.jsonl').read_bytes() == (tmp_path / 'b/train.jsonl').read_bytes()
    train, val = (
        instructions.read_examples(tmp_path / 'a' / f'{split}.jsonl') for split in ('train', 'val')
    )
    assert (len(train), len(val)) == (30, 5) and not {row['question'] for row in train} & {
        row['question'] for row in val
    }
    assert 'made by rule' in json.loads((tmp_path / 'a/meta.json').read_text())['source']
    for row in train + val:  # each has its one right answer
        if row['question'].startswith('What is'):
            a, word, b = row['question'].removeprefix('What is ').rstrip('?').split()
            assert row['response'].endswith(
                f' is {int(a) + int(b) if word == "plus" else int(a) * int(b)}.'
            )


def test_a_file_of_ones_own(tmp_path, prepare):
    path = tmp_path / 'own.jsonl'
    path.write_text(
        ''.join(json.dumps(dict(instruction=f'q{i}', output=f'a{i}')) + '\n' for i in range(8))
    )
    code, out, err = prepare(f'--input={path}', f'--out={tmp_path}', '--train=5', '--val=3')
    assert code == 0 and 'your own file' in out, err
    assert {
        row['question'][1:] for row in instructions.read_examples(tmp_path / 'train.jsonl')
    } <= set('01234567')
    path.write_text(path.read_text() + 'oops\n')
    code, out, err = prepare(f'--input={path}', f'--out={tmp_path}', '--train=5', '--val=3')
    assert code == 2 and f'{path}:9: not JSON' in err and err.count('\n') == 1
    code, out, err = prepare(f'--input={tmp_path / "none.jsonl"}')
    assert code == 2 and 'there is no such file' in err
