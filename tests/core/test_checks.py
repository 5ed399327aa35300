"""What a person asks for: known words, numbers in their range, lists with commas."""

import math
import re

import pytest

from nanomla.core.checks import (
    check_choice,
    check_range,
    settings_errors,
    split_list,
    split_numbers,
)
from nanomla.core.configurator import UserError


def test_a_choice_names_what_there_is():
    check_choice('act', 'gelu', ['gelu', 'relu'])
    with pytest.raises(UserError, match="act='tanh' is not known: use gelu, relu"):
        check_choice('act', 'tanh', iter(['gelu', 'relu']))


@pytest.mark.parametrize(
    'value, range_of, message',
    [
        (0, dict(least=1), 'x=0 must be at least 1'),
        (1.5, dict(most=1), 'x=1.5 must be at most 1'),
        (0, dict(above=0), 'x=0 must be more than 0'),
        (1.0, dict(least=0, below=1), 'x=1.0 must be at least 0 and less than 1'),
        (7, dict(least=1, most=5), 'x=7 must be at least 1 and at most 5'),
        (math.nan, dict(least=0), 'x=nan must be at least 0'),
        (math.nan, dict(above=0), 'x=nan must be more than 0'),
        (math.nan, {}, 'x=nan must be a number'),
    ],
)
def test_a_number_out_of_its_range_names_the_range(value, range_of, message):
    with pytest.raises(UserError) as error:
        check_range('x', value, **range_of)
    assert str(error.value) == message


@pytest.mark.parametrize(
    'value, range_of',
    [
        (1, dict(least=1, most=1)),
        (1e-9, dict(above=0)),
        (0.999, dict(least=0, below=1)),
        (-1e300, {}),
        (math.inf, dict(least=0)),
    ],
)
def test_a_number_in_its_range_passes(value, range_of):
    check_range('x', value, **range_of)


def test_lists_with_commas():
    assert split_list(' a, b,,c ') == ['a', 'b', 'c'] and split_list('') == []
    assert split_numbers('x', '1, 4') == [1, 4]
    assert split_numbers('x', '0,0.5', float) == [0.0, 0.5]
    for kind, example in ((int, '1,4'), (float, '0,0.5')):
        message = f'x=1,two: write numbers with commas, like {example}'
        with pytest.raises(UserError, match=re.escape(message)):
            split_numbers('x', '1,two', kind)


def test_settings_that_do_not_fit_are_the_users_error():
    with pytest.raises(UserError, match='n_head=3 does not divide n_embd=16'):
        with settings_errors():
            raise ValueError('n_head=3 does not divide n_embd=16')
    with pytest.raises(UserError, match='as it is'):
        with settings_errors():
            raise UserError('as it is')
    with pytest.raises(KeyError):
        with settings_errors():
            raise KeyError('a programmer is told')
