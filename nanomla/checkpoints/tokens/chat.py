"""
Conversations as the text that a model was trained on: its chat template, which lies beside its
tokenizer.json as chat_template.jinja or in tokenizer_config.json.

Templates come out of files that others wrote: they run in Jinja's sandbox, where they can change
nothing and reach nothing but the messages.
"""

import datetime
import json
from pathlib import Path

from nanomla.checkpoints.tokenizer import HFTokenizer, read_tokenizer_config, token_text
from nanomla.core.configurator import UserError

Messages = list[dict[str, str]]  # [{'role': 'user', 'content': 'Hello'}, ...]
PLACE = '\ue000'  # stands where a message ends, or is, while a template runs: no text has it


class ChatTemplate:
    """
    A conversation as one text.

    source: the template; where: its file
    special: names of special tokens -> their text, which templates may ask for
    """

    def __init__(self, source: str, special: dict[str, str], where: str):
        self.source, self.special, self.where = source, special, where
        try:
            from jinja2 import TemplateError
            from jinja2.ext import loopcontrols
            from jinja2.sandbox import ImmutableSandboxedEnvironment
        except ImportError:
            raise UserError(f'{where} needs jinja2: pip install -e .[convert]') from None
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
        )
        # What transformers gives templates, too.
        environment.filters['tojson'] = to_json
        environment.globals['raise_exception'] = refuse
        environment.globals['strftime_now'] = strftime_now
        self.errors = (TemplateError, TypeError, ValueError, KeyError, AttributeError)
        try:
            self.template = environment.from_string(source)
        except self.errors as error:
            raise UserError(f'{where} is no chat template that can be used: {error}') from None

    @classmethod
    def of(cls, tokenizer: HFTokenizer) -> 'ChatTemplate | None':
        """Return the template of a model; None where it has none."""
        settings = read_tokenizer_config(tokenizer.files)
        special = {}
        for name in settings:
            token = token_text(settings, name)
            if name.endswith('_token') and token is not None:
                special[name] = token
        for file in tokenizer.files:
            if file.name == 'chat_template.jinja':
                return cls(read_template(file), special, str(file))
        template = settings.get('chat_template')
        if isinstance(template, list):  # several by name
            named = {one.get('name'): one.get('template') for one in template}
            template = named.get('default')
        if not isinstance(template, str):
            return None
        return cls(template, special, str(tokenizer.files[0].parent / 'tokenizer_config.json'))

    def render(self, messages: Messages, answer_follows: bool = True) -> str:
        """
        Return the text of a conversation; answer_follows: up to where the model begins to answer.

        UserError for messages that the template refuses.
        """
        try:
            return self.template.render(
                messages=messages, add_generation_prompt=answer_follows, **self.special
            )
        except self.errors as error:
            why = ' '.join(str(error).split())[:200]
            raise UserError(f'{self.where} does not take this conversation: {why}') from None

    def render_unfinished(self, messages: Messages) -> str:
        """Return the text of a conversation whose last message the model goes on with."""
        *before, last = messages
        last = last | dict(content=last['content'] + PLACE + ' ')
        text, place, rest = self.render([*before, last], answer_follows=False).rpartition(PLACE)
        if not place:
            raise UserError(f'{self.where} leaves out the message that the model should go on with')
        if not rest.startswith(' '):  # the template trims messages
            text = text.rstrip()
        return text

    def around_question(self) -> tuple[str, str]:
        """Return what stands before a question, and from its end to the answer."""
        before, place, after = self.render([dict(role='user', content=PLACE)]).partition(PLACE)
        if not place:
            raise UserError(f'{self.where} leaves out what the user says')
        return before, after


def chat_template_of(tokenizer: object, model: str) -> ChatTemplate:
    """Return the chat template of a model's tokenizer. UserError where it has none."""
    template = None
    if isinstance(tokenizer, HFTokenizer):
        template = ChatTemplate.of(tokenizer)
    if template is None:
        raise UserError(
            f'{model} has no chat template (chat_template.jinja, or in tokenizer_config.json '
            'beside its tokenizer.json): leave --chat out'
        )
    return template


def encode_chat(tokenizer: HFTokenizer, template: ChatTemplate, messages: Messages) -> list[int]:
    """
    Return the ids of a conversation. The template writes what begins a text, so nothing is added.
    """
    return tokenizer.encode(template.render(messages))


def read_template(file: Path) -> str:
    try:
        return file.read_text(encoding='utf-8')
    except (OSError, ValueError) as error:
        raise UserError(f'{file} cannot be read: {error}') from None


def to_json(value: object, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def refuse(message: str) -> None:
    from jinja2 import TemplateError

    raise TemplateError(message)


def strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)
