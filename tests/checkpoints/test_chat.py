"""Conversations in a model's chat template, as transformers writes them, and templates that err."""

import json

import pytest
from llamas import byte_tokenizer

from nanomla.checkpoints.tokenizer import HFTokenizer
from nanomla.checkpoints.tokens.chat import ChatTemplate, chat_template_of
from nanomla.core.configurator import UserError

TEMPLATE = """{% for message in messages %}
{%- if loop.first and message['role'] != 'system' %}{{ bos_token }}<sys>{% endif %}
    {%- if message['role'] == 'tool' %}{{ raise_exception('no tools') }}{% endif %}
<{{ message['role'] }}>{{ message['content'] | trim }}{{ message | tojson }}
{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"""
MESSAGES = [
    dict(role='user', content=' Wo ist "é"? '),
    dict(role='assistant', content='There.'),
    dict(role='user', content='Thanks'),
]


@pytest.fixture
def folder(tmp_path):
    """A folder with a byte-level tokenizer.json and a chat template."""
    byte_tokenizer(tmp_path)
    (tmp_path / 'chat_template.jinja').write_text(TEMPLATE)
    return tmp_path


def tokenizer_of(folder):
    names = ('tokenizer.json', 'tokenizer_config.json', 'chat_template.jinja')
    return HFTokenizer([folder / name for name in names if (folder / name).exists()], {})


@pytest.mark.parametrize('answer_follows', [True, False])
@pytest.mark.parametrize('place', ['chat_template.jinja', 'tokenizer_config.json'])
def test_a_conversation_is_written_as_transformers_writes_it(place, answer_follows, folder):
    from transformers import PreTrainedTokenizerFast

    if place == 'tokenizer_config.json':
        path = folder / place
        (folder / 'chat_template.jinja').unlink()
        path.write_text(json.dumps(json.loads(path.read_text()) | dict(chat_template=TEMPLATE)))
    theirs = PreTrainedTokenizerFast.from_pretrained(folder).apply_chat_template(
        MESSAGES, tokenize=False, add_generation_prompt=answer_follows
    )
    template = ChatTemplate.of(tokenizer_of(folder))
    assert template.render(MESSAGES, answer_follows) == theirs
    assert '<bos>' in theirs


TRIMMED = TEMPLATE.replace('{{ message | tojson }}', '<end>')
AS_IT_IS = TRIMMED.replace(' | trim', '')


@pytest.mark.parametrize('beginning', ['So ', 'So'])
@pytest.mark.parametrize('template', [TRIMMED, AS_IT_IS])
def test_an_answer_that_has_begun_is_not_ended(template, beginning, folder):
    from transformers import PreTrainedTokenizerFast

    (folder / 'chat_template.jinja').write_text(template)
    messages = [*MESSAGES, dict(role='assistant', content=beginning)]
    theirs = PreTrainedTokenizerFast.from_pretrained(folder).apply_chat_template(
        messages, tokenize=False, continue_final_message=True
    )
    assert ChatTemplate.of(tokenizer_of(folder)).render_unfinished(messages) == theirs


def test_what_stands_around_a_question(folder):
    (folder / 'chat_template.jinja').write_text(AS_IT_IS)
    template = ChatTemplate.of(tokenizer_of(folder))
    before, after = template.around_question()
    asked = template.render([dict(role='user', content='Who?')])
    assert before + 'Who?' + after == asked


@pytest.mark.parametrize(
    'template, match',
    [
        ("{{ raise_exception('roles must alternate') }}", 'roles must alternate'),
        ("{{ ''.__class__.__mro__ }}", 'unsafe'),
        ("{{ messages.append('x') }}", 'unsafe|safe'),
        ('{% for %}', 'is no chat template that can be used'),
        ('{{ messages[0].nothing.more }}', 'does not take this conversation'),
    ],
)
def test_a_template_that_errs_or_reaches_out_is_one_line(template, match, folder):
    (folder / 'chat_template.jinja').write_text(template)
    with pytest.raises(UserError, match=match) as error:
        ChatTemplate.of(tokenizer_of(folder)).render(MESSAGES)
    assert '\n' not in str(error.value)


def test_a_model_without_a_template_is_named(folder):
    (folder / 'chat_template.jinja').unlink()
    with pytest.raises(UserError, match='m has no chat template'):
        chat_template_of(tokenizer_of(folder), 'm')
