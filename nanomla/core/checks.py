"""
Checks of what a person asked for (known words, numbers in their range, lists with commas) and of
what a file holds (the types and ranges of its entries).
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from nanomla.core.configurator import UserError


def check_choice(name: str, value: object, choices: Iterable[str]) -> None:
    """Raise a UserError unless `value` is one of `choices`."""
    choices = list(choices)
    if value not in choices:
        known = ', '.join(map(str, choices))
        raise UserError(f'{name}={value!r} is not known: use {known}')


def check_range(
    name: str,
    value: float,
    least: float = -math.inf,
    most: float = math.inf,
    above: float = -math.inf,
    below: float = math.inf,
) -> None:
    """Raise a UserError unless least <= value <= most and above < value < below; nan never is."""
    rules = []  # (whether the value keeps to it, its words)
    if least > -math.inf:
        rules.append((value >= least, f'at least {least:g}'))
    if above > -math.inf:
        rules.append((value > above, f'more than {above:g}'))
    if most < math.inf:
        rules.append((value <= most, f'at most {most:g}'))
    if below < math.inf:
        rules.append((value < below, f'less than {below:g}'))
    is_nan = value != value
    if is_nan or not all(fits for fits, _ in rules):
        words = ' and '.join(rule for _, rule in rules) or 'a number'
        raise UserError(f'{name}={value} must be {words}')


def split_list(text: str) -> list[str]:
    """Return the words of a list with commas, without blanks around them and without empty ones."""
    return [word.strip() for word in text.split(',') if word.strip()]


def split_numbers(name: str, text: str, kind: Callable = int) -> list:
    """Return the numbers of a list with commas, each made by `kind` (int or float)."""
    try:
        return [kind(word) for word in split_list(text)]
    except ValueError:
        example = '1,4' if kind is int else '0,0.5'
        raise UserError(f'{name}={text}: write numbers with commas, like {example}') from None


@contextmanager
def settings_errors() -> Iterator[None]:
    """Turn a ValueError of the models, which know no UserError, into a UserError."""
    try:
        yield
    except UserError:
        raise
    except ValueError as error:
        raise UserError(error) from None


# -------------------------------------------------------------------------------------------------
# what a file holds


@dataclass(frozen=True)
class Rule:
    """
    What an entry of a file may be. fits: says of a value whether it is that; words: that, in words.

    rule | other allows both, and rule | None allows None.
    """

    fits: Callable[[object], bool]
    words: str

    def __or__(self, other: 'Rule | None') -> 'Rule':
        if other is None:
            other = Rule(lambda value: value is None, 'None')
        return Rule(
            lambda value: self.fits(value) or other.fits(value), f'{self.words} or {other.words}'
        )


def whole(least: float = -math.inf, most: float = 2**63 - 1) -> Rule:
    """Return the rule of a whole number in a range; True and False are none."""
    words = 'a whole number'
    if least > -math.inf:
        words += f' from {least} on'
    return Rule(lambda value: type(value) is int and least <= value <= most, words)


def number(least: float = -math.inf) -> Rule:
    """Return the rule of an int or float of at least `least`, or nan."""
    words = 'a number'
    if least > -math.inf:
        words += f' from {least} on'
    return Rule(lambda value: type(value) in (int, float) and not value < least, words)


def one_of(*words: str) -> Rule:
    return Rule(lambda value: isinstance(value, str) and value in words, ' or '.join(words))


def list_of(rule: Rule) -> Rule:
    """Return the rule of a list or tuple whose items all fit `rule`."""

    def fits(value):
        return isinstance(value, (list, tuple)) and all(map(rule.fits, value))

    return Rule(fits, f'a list of items that are {rule.words}')


def table_of(rule: Rule) -> Rule:
    """Return the rule of a dict with texts as keys and values that fit `rule`."""

    def fits(value):
        if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
            return False
        return all(map(rule.fits, value.values()))

    return Rule(fits, f'a table of text to {rule.words}')


TEXT = Rule(lambda value: isinstance(value, str), 'a text')
FLAG = Rule(lambda value: isinstance(value, bool), 'True or False')
TABLE = Rule(lambda value: isinstance(value, dict), 'a table')
ANYTHING = Rule(lambda value: True, 'anything')


def check_entries(content: object, rules: Mapping[str, Rule], needed: Iterable[str] = ()) -> None:
    """
    Raise a ValueError, which names the entry, unless `content` is a dict whose entries fit `rules`.

    needed: entries that must be there; of the others those that are there count, and entries
    without a rule may be anything.
    """
    if not isinstance(content, dict):
        raise ValueError(f'{shortened(content)} is no table of entries')
    for name in needed:
        if name not in content:
            raise ValueError(f"it has no entry '{name}'")
    for name, rule in rules.items():
        if name in content and not rule.fits(content[name]):
            raise ValueError(f'{name} is {shortened(content[name])}, not {rule.words}')


@contextmanager
def content_errors(path: object, advice: str) -> Iterator[None]:
    """
    Turn what goes wrong with the rows of a file into a UserError that names it.

    For rows whose form is that of whatever wrote them; where it is known, check_entries says more.
    """
    try:
        yield
    except UserError:
        raise
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, ArithmeticError) as error:
        why = f'{type(error).__name__}: {shortened(error)}'
        raise UserError(f'{path} holds rows of another form ({why}): {advice}') from None


def shortened(value: object, limit: int = 60) -> str:
    """Return a value in one short line, whatever a file holds."""
    if isinstance(value, (dict, list, tuple, set)) and len(value) > 8:
        return f'a {type(value).__name__} of {len(value)}'
    text = ' '.join(repr(value).split())
    return text if len(text) <= limit else text[: limit - 3] + '...'
