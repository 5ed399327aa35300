"""What a person asks for (words, numbers, lists with commas), and what a file holds."""

import math
import re

import pytest

from nanomla.core.checks import (
    FLAG,
    TEXT,
    check_choice,
    check_entries,
    check_range,
    content_errors,
    list_of,
    number,
    one_of,
    settings_errors,
    shortened,
    split_list,
    split_numbers,
    table_of,
    whole,
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


# -------------------------------------------------------------------------------------------------
# what a file holds


@pytest.mark.parametrize(
    'rule, fits, fits_not',
    [
        (whole(), [0, -5, 2**40], [True, 1.0, '1', None, 2**63, [1]]),
        (whole(least=1), [1, 7], [0, -1]),
        (number(), [0, -1.5, math.nan, math.inf], [True, '1', None, [1.0]]),
        (number(least=0), [0, 0.5], [-0.5]),
        (TEXT, ['', 'x'], [5, None, b'x', ['x']]),
        (TEXT | None, ['', None], [5]),
        (FLAG, [True, False], [0, 1, 'True', None]),
        (one_of('a', 'b'), ['a'], ['c', 5, ['a']]),
        (list_of(whole()), [[], [1], (1, 2)], [1, '12', [1, 'x'], {1: 2}]),
        (table_of(TEXT), [{}, dict(a='x')], [dict(a=1), {1: 'x'}, [], 'x']),
        (whole() | list_of(whole()) | None, [1, [1], None], [[[1]], 'x']),
    ],
    ids=lambda value: getattr(value, 'words', None),
)
def test_rules_of_entries(rule, fits, fits_not):
    for value in fits:
        check_entries(dict(a=value), dict(a=rule))
    for value in fits_not:
        with pytest.raises(ValueError, match='^a is '):
            check_entries(dict(a=value), dict(a=rule))


def test_entries_that_must_be_there_and_those_without_a_rule():
    check_entries(dict(b=5), dict(a=TEXT))
    with pytest.raises(ValueError, match="it has no entry 'a'"):
        check_entries(dict(b=5), dict(a=TEXT), needed=['a'])
    for content in ([1], 'a', None, 5):
        with pytest.raises(ValueError, match='is no table of entries'):
            check_entries(content, {})


def test_a_value_of_a_file_is_shown_in_one_short_line():
    for value in ('x' * 999, 'a\nb', list(range(999)), {n: n for n in range(99)}, b'\n' * 99):
        assert len(shortened(value)) <= 60 and '\n' not in shortened(value)


def test_rows_of_another_form_are_one_line():
    for error in (KeyError('x'), TypeError('bad'), ZeroDivisionError('by zero')):
        with pytest.raises(UserError, match='r.jsonl holds rows of another form .*: measure again'):
            with content_errors('r.jsonl', 'measure again'):
                raise error
    with pytest.raises(RuntimeError), content_errors('r.jsonl', 'measure again'):
        raise RuntimeError
