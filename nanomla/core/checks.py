"""Checks of what a person asked for: known words, numbers in their range, lists with commas."""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

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
