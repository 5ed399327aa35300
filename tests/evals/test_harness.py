"""The adapter for the lm-evaluation-harness: its answers against the plain model; local tasks."""

import json
import math
import random
import sys
from types import SimpleNamespace

import pytest
import torch
from llamas import byte_tokenizer, hf_llama

from nanomla.checkpoints.load import TextCodec
from nanomla.checkpoints.tokens.chat import ChatTemplate, chat_template_of
from nanomla.core.configurator import UserError
from nanomla.core.tokenizers import Tokenizer
from nanomla.evals import harness
from nanomla.evals.measure import EvalSettings, EvaluatedModel
from nanomla.evals.scoring import Scorer
from nanomla.inference.generate import generate

CHARS = '\n abcdefghijklmnopqrstuvwxyz.?'
CODEC = Tokenizer(dict(tokenizer='char', chars=CHARS))
BLOCK = 48
CACHES = [
    dict(layout='none'),
    dict(layout='dense', chunk_size=3, batch_size=2),
    dict(layout='paged', page_size=16, chunk_size=0, batch_size=5),
]
every_cache = pytest.mark.parametrize('how', CACHES, ids=lambda how: how['layout'])


@pytest.fixture(scope='module', autouse=True)
def installed():
    pytest.importorskip('lm_eval', reason='needs pip install -e .[eval]')
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield harness.load()
    torch.set_num_threads(threads)


@pytest.fixture
def model(tiny):
    return tiny('mla', vocab_size=len(CHARS), block_size=BLOCK)


def adapter(model, begin=None, ends=(), **how):
    scorer = Scorer(model, CODEC.vocab_size, **how)
    return harness.adapter(scorer, TextCodec(CODEC, begin, set(ends)))


def requests_of(*pairs):
    return [SimpleNamespace(args=pair) for pair in pairs]


def score_by_hand(model, context, continuation):
    """Return the log-probability and whether greedy, from a forward pass for each token."""
    total, greedy, ids = 0.0, True, list(context)
    for token in continuation:
        with torch.no_grad():
            logits = model(torch.tensor([ids[-BLOCK:]]))[0, -1]
        total += logits.log_softmax(-1)[token].item()
        greedy = greedy and logits.argmax().item() == token
        ids.append(token)
    return total, greedy


def write_by_hand(model, context, n):
    """Return the n characters that greedy decoding writes, with room for them in the block."""
    prompt = CODEC.encode(context)[-(BLOCK + 1 - n) :]
    tokens = generate(model, torch.tensor([prompt]), n, temperature=0)
    return ''.join(CHARS[token.item()] for token in tokens)


# -------------------------------------------------------------------------------------------------
# requests


@every_cache
def test_log_likelihoods(how, model):
    pairs = [
        ('who is it?', ' the king'),
        ('who is it?', ' no'),
        ('', 'alone'),
        ('who is it? ', 'a blank before'),
        ('x', ' y'),
        ('who is it?', ' the queen'),
        ('so', write_by_hand(model, 'so', 5)),
    ]
    found = adapter(model, **how).loglikelihood(requests_of(*pairs))
    assert found[-1][1]  # greedy
    for (context, continuation), (logp, greedy) in zip(pairs, found, strict=True):
        before = context or '\n'
        if context.endswith(' '):  # the harness counts that blank to what follows
            before, continuation = context[:-1], ' ' + continuation
        right = score_by_hand(model, CODEC.encode(before), CODEC.encode(continuation))
        assert (logp, greedy) == (pytest.approx(right[0], abs=1e-3), right[1])


@every_cache
def test_long_contexts_lose_their_beginning(how, model):
    context = ''.join(random.Random(0).choices(CHARS, k=130))
    endings = ('end', 'the end')
    found = adapter(model, **how).loglikelihood(
        requests_of(*[(context, ending) for ending in endings])
    )
    for ending, (logp, _) in zip(endings, found, strict=True):
        kept = CODEC.encode(context)[-(BLOCK + 1 - len(ending)) :]
        right, _ = score_by_hand(model, kept, CODEC.encode(ending))
        assert logp == pytest.approx(right, abs=1e-3)


@every_cache
def test_long_continuations_are_scored_in_blocks(how, model):
    text = ''.join(random.Random(0).choices(CHARS, k=130))
    lm = adapter(model, **how)
    ((logp, _),) = lm.loglikelihood(requests_of(('a', text)))
    assert logp == pytest.approx(in_blocks(model, CODEC.encode('a' + text)), abs=2e-3)
    rolling = lm.loglikelihood_rolling(requests_of((text,), ('',), ('b',)))
    assert rolling[0] == pytest.approx(in_blocks(model, CODEC.encode('\n' + text)), abs=2e-3)
    assert rolling[1] == 0.0
    right, _ = score_by_hand(model, [0], CODEC.encode('b'))
    assert rolling[2] == pytest.approx(right, abs=1e-3)


def in_blocks(model, ids):
    """Return the log-probability of ids[1:] in blocks, by the harness's own rule."""
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    total = 0.0
    for window in get_rolling_token_windows(ids[1:], ids[0], BLOCK, 1):
        context, continuation = make_disjoint_window(window)
        with torch.no_grad():
            logits = model(torch.tensor([context + continuation[:-1]]))[0, len(context) - 1 :]
        wanted = torch.tensor(continuation)[:, None]
        total += logits.log_softmax(-1).gather(-1, wanted).sum().item()
    return total


CONTEXTS = ['to be or', 'my lord', 'a', 'to be or not to be that is the question for all of us']


@every_cache
def test_texts_are_written_up_to_their_stop(how, model):
    """Each as it would be alone, whatever the batch."""
    plain = [write_by_hand(model, context, 20) for context in CONTEXTS]
    stop = plain[1][3:5]
    settings = dict(until=[stop], max_gen_toks=20)
    requests = requests_of(*[(context, settings) for context in CONTEXTS])
    found = adapter(model, **how).generate_until(requests)
    assert found == [text.split(stop)[0] for text in plain]
    assert found[1] != plain[1]


@every_cache
def test_texts_without_a_stop_have_the_length_asked_for(how, model):
    settings = dict(until='', max_gen_toks=7, do_sample=False, temperature=1)
    stops = dict(until=['?'], max_gen_toks=3)
    requests = requests_of(*[(c, settings) for c in CONTEXTS], (CONTEXTS[0], stops))
    found = adapter(model, **how).generate_until(requests)
    assert found[:4] == [write_by_hand(model, context, 7) for context in CONTEXTS]
    assert found[4] == write_by_hand(model, CONTEXTS[0], 3).split('?')[0]


@every_cache
def test_a_text_ends_at_an_end_token(how, model):
    plain = write_by_hand(model, CONTEXTS[0], 20)
    (end,) = CODEC.encode(plain[2])
    requests = requests_of((CONTEXTS[0], dict(until=[], max_gen_toks=20)))
    (found,) = adapter(model, ends=[end], **how).generate_until(requests)
    assert found == plain.split(plain[2])[0]


def test_a_text_that_begins_with_a_token(model):
    lm = adapter(model, begin=5, ends=[7])
    assert lm.tok_encode('ab') == [5, 2, 3]
    assert lm.tok_encode('ab', add_special_tokens=False) == [2, 3]
    assert lm.eot_token_id == 7
    assert lm.prefix_token_id == 5
    found = lm.loglikelihood(requests_of(('ab', 'c'), ('', 'c')))
    for ids, (logp, _) in zip(([5, 2, 3], [5]), found, strict=True):
        assert logp == pytest.approx(score_by_hand(model, ids, [4])[0], abs=1e-4)


def test_a_vocabulary_without_a_newline(tiny):
    model = tiny('mla', vocab_size=3, block_size=BLOCK)
    codec = TextCodec(Tokenizer(dict(tokenizer='char', chars='abc')))
    lm = harness.adapter(Scorer(model, 3), codec)
    (logp,) = lm.loglikelihood_rolling(requests_of(('ba',)))
    assert logp == pytest.approx(score_by_hand(model, [0], [1, 0])[0], abs=1e-4)


def test_a_quantised_cache_is_used(model):
    context = 'who is it and why is he here today'
    requests = requests_of((context, ' the king'), (context, ' no one at all'))
    how = dict(chunk_size=1, batch_size=2)
    plain = adapter(model, **how).loglikelihood(requests)
    coarse = adapter(model, **how, dtype='int4', window=2).loglikelihood(requests)
    for (a, _), (b, _) in zip(plain, coarse, strict=True):
        assert 1e-3 < abs(a - b) < 3


def test_unknown_characters(model):
    with pytest.raises(UserError, match="never seen: 'Z'"):
        adapter(model).loglikelihood(requests_of(('a', 'Z')))


# -------------------------------------------------------------------------------------------------
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


def write_task(folder, task, data):
    """Write a task file whose documents are in the file `data`."""
    source = dict(dataset_path='json', dataset_kwargs=dict(data_files=dict(test=str(data))))
    task = task | source | dict(test_split='test')
    (folder / f'{task["task"]}.yaml').write_text(json.dumps(task))


@pytest.fixture
def docs(tmp_path, monkeypatch):
    monkeypatch.setenv('HF_DATASETS_CACHE', str(tmp_path / 'cache'))
    data = tmp_path / 'docs.jsonl'
    data.write_text(''.join(json.dumps(doc) + '\n' for doc in DOCS))
    return data


@pytest.fixture
def local(tmp_path, docs):
    """A folder of tasks whose data lie beside it."""
    folder = tmp_path / 'tasks'
    folder.mkdir()
    for task in (CHOICE, WRITE, ROLL):
        write_task(folder, task, docs)
    return folder


def test_local_tasks_from_their_files_to_their_metrics(local, model):
    lm = adapter(model, dtype='float32', batch_size=2, chunk_size=4)
    write = str(local / 'local_write.yaml')
    tasks = harness.Tasks(['local_choice', write, 'local_roll'], str(local))
    right, right_by_length, nats = [], [], 0.0
    for doc in DOCS:
        question = CODEC.encode(doc['question'])
        scores = []
        for choice in doc['choices']:
            scores.append(score_by_hand(model, question, CODEC.encode(' ' + choice))[0])
        normed = [score / len(choice) for score, choice in zip(scores, doc['choices'])]
        right.append(scores.index(max(scores)) == doc['answer'])
        right_by_length.append(normed.index(max(normed)) == doc['answer'])
        nats -= score_by_hand(model, [0], question)[0]
    found = tasks.run('local_choice', lm)
    assert found['acc'] == pytest.approx(sum(right) / 3)
    assert found['acc_norm'] == pytest.approx(sum(right_by_length) / 3)
    assert tasks.run('local_choice', lm, limit=1)['acc'] == right[0]
    assert tasks.run(write, lm)['exact_match'] == 0
    n_bytes = sum(len(doc['question']) for doc in DOCS)
    perplexity = tasks.run('local_roll', lm)['byte_perplexity']
    assert perplexity == pytest.approx(math.exp(nats / n_bytes), rel=1e-4)


def test_files_and_folders_that_are_not_there_are_named(tmp_path):
    with pytest.raises(UserError, match='no task file x.yaml'):
        harness.Tasks(['x.yaml'])
    with pytest.raises(UserError, match='is no folder'):
        harness.Tasks(['local_choice'], str(tmp_path / 'nowhere'))


def test_a_task_without_its_data_is_named(local, model):
    write_task(local, CHOICE | dict(task='gone'), 'gone.jsonl')
    match = 'gone: its task or data cannot be loaded .FileNotFoundError'
    with pytest.raises(UserError, match=match):
        harness.Tasks(['gone'], str(local)).run('gone', adapter(model))


def test_a_task_that_the_model_cannot_read_is_named(local, docs, model):
    write_task(local, CHOICE | dict(task='unread', doc_to_text='{{question}} Z'), docs)
    match = 'unread: the text has characters this model has never seen'
    with pytest.raises(UserError, match=match):
        harness.Tasks(['unread'], str(local)).run('unread', adapter(model))


# -------------------------------------------------------------------------------------------------
# conversations

# As Gemma's: the system has no say.
TEMPLATE = """{{ bos_token }}{% for message in messages %}
{%- if message['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}
<{{ message['role'] }}>{{ message['content'] | trim }}<eos>
{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"""


def test_a_template_that_refuses_the_system_gets_the_others(model):
    template = ChatTemplate(TEMPLATE, dict(bos_token='<bos>'), 'template')
    lm = harness.adapter(Scorer(model, len(CHARS)), TextCodec(CODEC), template)
    asked = [dict(role='system', content='Be good.'), dict(role='user', content=' who? ')]
    assert lm.apply_chat_template(asked) == '<bos><user>who?<eos>\n<assistant>'
    assert lm.chat_template(True) == TEMPLATE
    with pytest.raises(UserError, match='does not take this conversation'):
        template.render(asked)


@pytest.fixture
def chat_model(tmp_path):
    """A folder of a small Llama with a tokenizer and a chat template."""
    folder = tmp_path / 'llama'
    size = byte_tokenizer(folder)
    hf_llama(folder, vocab_size=size, max_position_embeddings=512, eos_token_id=size - 1)
    (folder / 'chat_template.jinja').write_text(TEMPLATE)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize('chat', [True, False])
def test_requests_and_answers_are_those_of_the_harness_own_model(chat, chat_model, local, docs):
    from lm_eval.models.huggingface import HFLM

    # One example in front, what the system says, and with `begun` the beginning of the answer.
    asked = CHOICE | dict(task='asked', num_fewshot=1, fewshot_split='test', description='Well!')
    write_task(local, asked, docs)
    write_task(local, asked | dict(task='begun', gen_prefix='So:'), docs)
    names = ['asked', 'begun', 'local_write', 'local_roll']
    settings = EvalSettings(device='cpu', dtype='float32')
    evaluated = EvaluatedModel(str(chat_model), settings)
    template = chat_template_of(evaluated.codec.tokenizer, 'm') if chat else None
    scorer = Scorer(evaluated.model, evaluated.codec.tokenizer.vocab_size)
    tasks = harness.Tasks(names, str(local))

    def answers_of(lm):
        done = tasks.lm_eval.simple_evaluate(
            lm,
            tasks=names,
            task_manager=tasks.manager,
            apply_chat_template=chat,
            fewshot_as_multiturn=chat,
            bootstrap_iters=0,
        )
        requests, numbers, texts = [], [], []
        for name in names:
            for sample in done['samples'][name]:
                requests.append(sample['arguments'])
                answers = sample['resps']
                (texts if name == 'local_write' else numbers).append(answers)
        return requests, torch.tensor(list(flat(numbers))), texts

    ours = answers_of(harness.adapter(scorer, evaluated.codec, template))
    theirs = answers_of(HFLM(str(chat_model), device='cpu', dtype='float32', batch_size=1))
    assert ours[0] == theirs[0] and ours[2] == theirs[2]
    assert torch.allclose(ours[1], theirs[1], atol=1e-4)


def flat(numbers):
    for number in numbers:
        if isinstance(number, (list, tuple)):
            yield from flat(number)
        else:
            yield float(number)


@pytest.mark.slow
def test_an_unknown_task_gives_the_nearest_and_the_papers_set_is_known():
    with pytest.raises(UserError, match="'helaswag' is not a task; did you mean hellaswag"):
        harness.Tasks(['helaswag'], others=['needle'])
    with pytest.raises(UserError, match="'nedle' is not a task; did you mean needle"):
        harness.Tasks(['nedle'], others=['needle'])
    harness.Tasks([*harness.GROUPS['commonsense'].split(','), 'longbench'])


def test_a_missing_harness_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, 'lm_eval', None)
    with pytest.raises(UserError, match=r'pip install -e .\[eval\]'):
        harness.load()
