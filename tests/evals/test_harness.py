"""The adapter for the lm-evaluation-harness: what it answers against the plain model, and local tasks without a network."""

import json
import math
import random
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from nanomla.checkpoints.load import TextCodec
from nanomla.core import tokenizers
from nanomla.core.configurator import UserError
from nanomla.evals import harness
from nanomla.evals.scoring import Scorer
from nanomla.inference.generate import generate

ROOT = Path(__file__).resolve().parents[2]
CHARS = '\n abcdefghijklmnopqrstuvwxyz.?'
CODEC = tokenizers.Tokenizer(dict(tokenizer='char', chars=CHARS))
CACHES = [
    dict(layout='none'),
    dict(layout='dense', chunk_size=3, batch_size=2),
    dict(layout='paged', page_size=16, chunk_size=0, batch_size=5),
]


@pytest.fixture(scope='module', autouse=True)
def installed():
    pytest.importorskip('lm_eval', reason='needs pip install -e .[eval]')
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield harness.load()
    torch.set_num_threads(threads)


@pytest.fixture
def model(tiny):
    return tiny('mla', vocab_size=len(CHARS), block_size=48)


def adapter(model, begin=None, ends=(), **how):
    scorer = Scorer(model, CODEC.vocab_size, **how)
    return harness.adapter(scorer, TextCodec(CODEC, begin, set(ends)))


def ask(*pairs):
    return [SimpleNamespace(args=pair) for pair in pairs]


def logp_of(model, context, continuation):
    """Sum of log-probabilities and whether greedy, a forward pass for each token."""
    total, greedy, ids = 0.0, True, list(context)
    for token in continuation:
        with torch.no_grad():
            logits = model(torch.tensor([ids[-model.config.block_size :]]))[0, -1]
        total, greedy = (
            total + logits.log_softmax(-1)[token].item(),
            greedy and logits.argmax().item() == token,
        )
        ids.append(token)
    return total, greedy


# ---------------------------------------------------------------------------------------------------
# requests


@pytest.mark.parametrize('how', CACHES, ids=lambda how: how['layout'])
def test_log_likelihoods(how, model):
    pairs = [
        ('who is it?', ' the king'),
        ('who is it?', ' no'),
        ('', 'alone'),
        ('who is it? ', 'a blank before'),
        ('x', ' y'),
        ('who is it?', ' the queen'),
    ]
    greedy = ''.join(
        CHARS[t.item()]
        for t in generate(model, torch.tensor([CODEC.encode('so')]), 5, temperature=0)
    )
    pairs.append(('so', greedy))
    got = adapter(model, **how).loglikelihood(ask(*pairs))
    assert got[-1][1]
    for (context, continuation), (logp, is_greedy) in zip(pairs, got, strict=True):
        whole = CODEC.encode(context or '\n') + CODEC.encode(continuation)
        right = logp_of(model, whole[: len(context) or 1], whole[len(context) or 1 :])
        if context.endswith(' '):  # the harness counts that blank to what follows
            right = logp_of(model, whole[: len(context) - 1], whole[len(context) - 1 :])
        assert (logp, is_greedy) == (pytest.approx(right[0], abs=1e-3), right[1])


@pytest.mark.parametrize('how', CACHES, ids=lambda how: how['layout'])
def test_long_contexts_and_long_continuations(how, model):
    rng = random.Random(0)
    long = ''.join(rng.choices(CHARS, k=130))
    lm = adapter(model, **how)
    got = lm.loglikelihood(ask((long, 'end'), (long, 'the end'), ('a', long)))
    for n, continuation in enumerate(('end', 'the end')):
        kept = CODEC.encode(long)[-(49 - len(continuation)) :]
        ids = CODEC.encode(continuation)
        with torch.no_grad():
            logits = model(torch.tensor([kept + ids[:-1]]))[0, -len(ids) :].log_softmax(-1)
        assert got[n][0] == pytest.approx(
            logits.gather(-1, torch.tensor(ids)[:, None]).sum().item(), abs=1e-3
        )
    rolling = lm.loglikelihood_rolling(ask((long,), ('',), ('b',)))
    assert rolling[1] == 0.0 and rolling[2] == pytest.approx(
        logp_of(model, [0], CODEC.encode('b'))[0], abs=1e-3
    )
    for first, value in (('a', got[2][0]), ('\n', rolling[0])):
        assert value == pytest.approx(in_blocks(model, CODEC.encode(first + long)), abs=2e-3)


def in_blocks(model, ids):
    """Log-probability of ids[1:] in blocks of 48, the last one moved back to be whole, by the harness's own rule."""
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    total = 0.0
    for context, continuation in map(
        make_disjoint_window, get_rolling_token_windows(ids[1:], ids[0], 48, 1)
    ):
        with torch.no_grad():
            logits = model(torch.tensor([context + continuation[:-1]]))[
                0, len(context) - 1 :
            ].log_softmax(-1)
        total += logits.gather(-1, torch.tensor(continuation)[:, None]).sum().item()
    return total


@pytest.mark.parametrize('how', CACHES, ids=lambda how: how['layout'])
def test_written_texts(how, model):
    """Each as it would be alone, up to its stop, whatever the batch."""
    contexts = ['to be or', 'my lord', 'a', 'to be or not to be that is the question for all of us']
    plain = [
        ''.join(
            CHARS[t.item()]
            for t in generate(
                model, torch.tensor([CODEC.encode(c)[-(49 - 20) :]]), 20, temperature=0
            )
        )
        for c in contexts
    ]
    stop = plain[1][3:5]
    requests = ask(
        *[(c, dict(until=[stop], max_gen_toks=20)) for c in contexts],
        *[(c, dict(until='', max_gen_toks=7, do_sample=False, temperature=1)) for c in contexts],
    )
    got = adapter(model, **how).generate_until(requests)
    assert got[:4] == [text.split(stop)[0] for text in plain] and got[1] != plain[1]
    short = [
        ''.join(
            CHARS[t.item()]
            for t in generate(model, torch.tensor([CODEC.encode(c)[-(49 - 7) :]]), 7, temperature=0)
        )
        for c in contexts
    ]
    assert got[4:] == short
    end = CODEC.encode(plain[0][2])[0]
    assert (
        adapter(model, ends=[end], **how).generate_until(requests[:1])[0]
        == plain[0][: plain[0].index(plain[0][2])].split(stop)[0]
    )


def test_a_text_that_begins_with_a_token(model):
    lm = adapter(model, begin=5, ends=[7])
    assert lm.tok_encode('ab') == [5, 2, 3] and lm.tok_encode('ab', add_special_tokens=False) == [
        2,
        3,
    ]
    assert lm.eot_token_id == 7 and lm.prefix_token_id == 5
    got = lm.loglikelihood(ask(('ab', 'c'), ('', 'c')))
    assert got[0][0] == pytest.approx(logp_of(model, [5, 2, 3], [4])[0], abs=1e-4) and got[1][
        0
    ] == pytest.approx(logp_of(model, [5], [4])[0], abs=1e-4)


def test_a_quantised_cache_is_used(model):
    pairs = [('who is it and why is he here today', one) for one in (' the king', ' no one at all')]
    plain, coarse = (
        adapter(model, chunk_size=1, batch_size=2, **how)
        for how in (dict(), dict(dtype='int4', window=2))
    )
    a, b = plain.loglikelihood(ask(*pairs)), coarse.loglikelihood(ask(*pairs))
    assert all(1e-3 < abs(x[0] - y[0]) < 3 for x, y in zip(a, b))


def test_unknown_characters(model):
    with pytest.raises(UserError, match="never seen: 'Z'"):
        adapter(model).loglikelihood(ask(('a', 'Z')))


# ---------------------------------------------------------------------------------------------------
# tasks

DOCS = [
    dict(question='what is', choices=['the king', 'a horse and', 'no'], answer=0),
    dict(question='my lord i', choices=['will go', 'shall not be', 'am'], answer=1),
    dict(question='to be or', choices=['not to be', 'naught', 'the'], answer=2),
]
CHOICE = dict(
    task='local_choice',
    output_type='multiple_choice',
    doc_to_text='{{question}}',
    doc_to_choice='choices',
    doc_to_target='answer',
    metric_list=[dict(metric='acc'), dict(metric='acc_norm')],
)
WRITE = dict(
    task='local_write',
    output_type='generate_until',
    doc_to_text='{{question}}',
    doc_to_target='{{choices[0]}}',
    generation_kwargs=dict(until=['\n'], max_gen_toks=12),
    metric_list=[dict(metric='exact_match')],
)
ROLL = dict(
    task='local_roll',
    output_type='loglikelihood_rolling',
    doc_to_text='',
    doc_to_target='{{question}}',
    metric_list=[dict(metric='byte_perplexity')],
)


@pytest.fixture
def local(tmp_path, monkeypatch):
    """A folder of tasks whose data lie beside them."""
    monkeypatch.setenv('HF_DATASETS_CACHE', str(tmp_path / 'cache'))
    (tmp_path / 'tasks').mkdir()
    data = tmp_path / 'docs.jsonl'
    data.write_text(''.join(json.dumps(doc) + '\n' for doc in DOCS))
    for spec in (CHOICE, WRITE, ROLL):
        spec = spec | dict(
            dataset_path='json',
            dataset_kwargs=dict(data_files=dict(test=str(data))),
            test_split='test',
        )
        (tmp_path / 'tasks' / f'{spec["task"]}.yaml').write_text(json.dumps(spec))
    return tmp_path / 'tasks'


def test_local_tasks_from_their_files_to_their_metrics(local, model):
    lm = adapter(model, dtype='float32', batch_size=2, chunk_size=4)
    tasks = harness.Tasks(
        ['local_choice', str(local / 'local_write.yaml'), 'local_roll'], str(local)
    )
    got = tasks.run('local_choice', lm)
    scores = [
        [
            logp_of(model, CODEC.encode(doc['question']), CODEC.encode(' ' + choice))[0]
            for choice in doc['choices']
        ]
        for doc in DOCS
    ]
    right = [max(range(3), key=s.__getitem__) == doc['answer'] for s, doc in zip(scores, DOCS)]
    normed = [
        max(range(3), key=lambda i: s[i] / len(doc['choices'][i])) == doc['answer']
        for s, doc in zip(scores, DOCS)
    ]
    assert got['acc'] == pytest.approx(sum(right) / 3) and got['acc_norm'] == pytest.approx(
        sum(normed) / 3
    )
    assert tasks.run('local_choice', lm, limit=1)['acc'] == right[0]
    assert tasks.run(str(local / 'local_write.yaml'), lm)['exact_match'] == 0
    nats = -sum(logp_of(model, [0], CODEC.encode(doc['question']))[0] for doc in DOCS)
    assert tasks.run('local_roll', lm)['byte_perplexity'] == pytest.approx(
        math.exp(nats / sum(len(doc['question']) for doc in DOCS)), rel=1e-4
    )


def test_what_cannot_be_run_is_told(local, model, tmp_path):
    for names, path, why in (
        (['x.yaml'], '', 'no task file x.yaml'),
        (['local_choice'], str(tmp_path / 'nowhere'), 'is no folder'),
    ):
        with pytest.raises(UserError, match=why):
            harness.Tasks(names, path)
    spec = json.loads((local / 'local_choice.yaml').read_text()) | dict(
        dataset_kwargs=dict(data_files=dict(test='gone.jsonl'))
    )
    (local / 'gone.yaml').write_text(json.dumps(spec | dict(task='gone')))
    with pytest.raises(
        UserError, match='gone: its task or data cannot be loaded .FileNotFoundError'
    ):
        harness.Tasks(['gone'], str(local)).run('gone', adapter(model))
    (local / 'unread.yaml').write_text(
        json.dumps(
            spec
            | dict(
                task='unread',
                doc_to_text='{{question}} Z',
                dataset_kwargs=json.loads((local / 'local_roll.yaml').read_text())[
                    'dataset_kwargs'
                ],
            )
        )
    )
    with pytest.raises(
        UserError, match='unread: the text has characters this model has never seen'
    ):
        harness.Tasks(['unread'], str(local)).run('unread', adapter(model))


@pytest.mark.slow
def test_an_unknown_task_tells_the_nearest_and_the_papers_set_is_known():
    with pytest.raises(UserError, match="'helaswag' is not a task; did you mean hellaswag"):
        harness.Tasks(['helaswag'], others=['needle'])
    with pytest.raises(UserError, match="'nedle' is not a task; did you mean needle"):
        harness.Tasks(['nedle'], others=['needle'])
    harness.Tasks([*harness.GROUPS['commonsense'].split(','), 'longbench'])


def test_a_missing_harness_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, 'lm_eval', None)
    with pytest.raises(UserError, match=r'pip install -e .\[eval\]'):
        harness.load()
