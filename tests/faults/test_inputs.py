"""Inputs that hypothesis makes up end in work or in one line, whatever they hold."""

import random

import pytest
from faulty import damaged, damages
from hypothesis import HealthCheck, given, settings
from inputs import (
    CHANGES,
    COMMAND_LINES,
    CONFIG_FILES,
    DATASETS,
    a_checkpoint,
    check_checkpoint,
    check_command_line,
    check_config_file,
    check_dataset,
    make_tensors,
    read_dataset,
    read_scripts_once,
    written_dataset,
)

from nanomla.checkpoints import native
from nanomla.checkpoints.hub import tensors_in
from nanomla.core.configurator import UserError

SIZES = [60, pytest.param(3000, marks=pytest.mark.slow)]


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    read_scripts_once(monkeypatch)


def examples(number: int):
    return settings(
        max_examples=number, deadline=None, suppress_health_check=list(HealthCheck), database=None
    )


@pytest.mark.parametrize('number', SIZES)
def test_any_command_line_is_settings_help_or_one_line(number, capsys):
    @examples(number)
    @given(COMMAND_LINES)
    def check(command):
        check_command_line(*command)

    check()


@pytest.mark.parametrize('number', SIZES)
def test_any_config_file_is_settings_or_one_line(number, tmp_path, capsys):
    @examples(number)
    @given(CONFIG_FILES)
    def check(content):
        check_config_file(content, tmp_path)

    check()


@pytest.mark.parametrize('number', SIZES)
def test_any_dataset_is_batches_or_one_line(number, tmp_path):
    @examples(number)
    @given(DATASETS)
    def check(files):
        check_dataset(*files, tmp_path)

    check()


@pytest.mark.parametrize('number', SIZES)
def test_any_content_of_a_checkpoint_is_a_model_or_one_line(number, tmp_path):
    @examples(number)
    @given(CHANGES)
    def check(changes):
        check_checkpoint(changes, tmp_path)

    check()


# -------------------------------------------------------------------------------------------------
# changed and missing bytes


@pytest.mark.parametrize('number', [40, pytest.param(1000, marks=pytest.mark.slow)])
def test_every_changed_or_missing_byte_of_a_checkpoint_is_noticed(number, tmp_path):
    path = tmp_path / 'last.pt'
    native.save(path, a_checkpoint())
    whole = path.read_bytes()
    for damage in damages(len(whole), number, random.Random(number)):
        path.write_bytes(damaged(whole, *damage))
        with pytest.raises(UserError, match='last.pt'):
            native.load(path)


@pytest.mark.parametrize('number', [40, pytest.param(1000, marks=pytest.mark.slow)])
def test_every_changed_or_missing_byte_of_exported_weights_is_noticed(number, tmp_path):
    path = make_tensors(tmp_path)[0]
    whole = path.read_bytes()
    head = [('flip', place, 1) for place in range(120)]  # length, marks and checksum
    for damage in [*head, *damages(len(whole), number, random.Random(number))]:
        path.write_bytes(damaged(whole, *damage))
        with pytest.raises(UserError, match=path.name):
            tensors_in(path)


@pytest.mark.parametrize('number', [40, pytest.param(1000, marks=pytest.mark.slow)])
@pytest.mark.parametrize('name', ['train.bin', 'val.bin'])
def test_every_changed_or_missing_byte_of_tokens_is_noticed(name, number, tmp_path):
    path = written_dataset(tmp_path) / name
    whole = path.read_bytes()
    for damage in damages(len(whole), number, random.Random(number)):
        path.write_bytes(damaged(whole, *damage))
        with pytest.raises(UserError, match=name):
            read_dataset(tmp_path)
