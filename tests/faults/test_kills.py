"""Scripts that are killed at any call that changes files, and started again, lose nothing."""

import random
import shutil

import pytest
import torch
from scenarios import (
    BEGINNING,
    SCENARIOS,
    check_script,
    make_place,
    of_training_over,
    script_cases,
)


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    torch.set_num_threads(1)
    return make_place(tmp_path_factory.mktemp('place'))


CASES = [('training', 2), ('text', 2), ('openorca', 1), ('repeats', 1), ('conversion', 1)]
for name, scenario in SCENARIOS.items():
    many = round(150 * scenario.share)
    CASES.append(pytest.param(name, many, marks=pytest.mark.slow))


@pytest.mark.parametrize('name, number', CASES)
def test_what_was_killed_goes_on_to_the_same_end(name, number, place, tmp_path):
    scenario = SCENARIOS[name]
    calls, expected = scenario.run_whole(place, tmp_path / 'whole')
    rng = random.Random(number)
    for kill_at in rng.choices(range(1, calls + 1), k=number):
        assert scenario.kill_and_finish(place, tmp_path / 'work', kill_at) == expected, kill_at


@pytest.mark.parametrize('number', [1, pytest.param(20, marks=pytest.mark.slow)])
def test_a_kill_while_a_run_begins_over_an_earlier_one_leaves_both(number, place, tmp_path):
    """The earlier run is whole in previous/, or still in its place, and notes stay."""
    whole = tmp_path / 'whole'
    shutil.copytree(place, whole)
    calls = BEGINNING.start(whole)
    expected = of_training_over(whole)
    rng = random.Random(number)
    for kill_at in rng.sample(range(1, calls // 2), number):
        assert BEGINNING.kill_and_finish(place, tmp_path / 'work', kill_at) == expected, kill_at


@pytest.mark.parametrize('number', [2, pytest.param(200, marks=pytest.mark.slow)])
def test_scripts_with_odd_settings_end_well_or_in_one_line(number, place, tmp_path):
    for case in script_cases(number, random.Random(number)):
        check_script(case, place, tmp_path / 'work')
