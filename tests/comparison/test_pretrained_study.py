"""The study of a pretrained model: the same bytes for every recipe, and no row measured twice."""

import json
import runpy
import sys
from pathlib import Path

import pytest
from helpers import words

from nanomla.checkpoints import native
from nanomla.core.configurator import UserError
from nanomla.core.token_files import write_text

MODULE = 'nanomla.comparison.pretrained_study'
SENTENCE = 'to be or not to be that is the question whether tis nobler in the mind to suffer '
LLAMA = dict(bias=False, pos='rope', norm='rmsnorm', act='swiglu', n_inner=44, n_kv_head=2)


@pytest.fixture
def study(tiny, tmp_path, monkeypatch):
    """study(**settings): run the study of a tiny model in this process; return its rows."""
    monkeypatch.chdir(tmp_path)
    meta = write_text(tmp_path / 'text', SENTENCE * 40, 'char', 'a test')
    model = tiny('mha', **LLAMA | dict(vocab_size=meta['vocab_size'], head_dim=16))
    args = native.model_args(model)
    checkpoint = dict(kind='mha', model_args=args, model=model.state_dict(), meta=meta)
    native.save(Path('src') / 'ckpt.pt', checkpoint)
    Path('second.txt').write_text(SENTENCE * 5)
    usual = dict(
        source='src',
        text='text',
        second_text='second.txt',
        savings='0.5',
        calibration_tokens=240,
        eval_tokens=100,
        block_size=24,
        layer_steps=1,
        device='cpu',
    )

    def run(**settings):
        monkeypatch.setattr(sys, 'argv', [MODULE, *words(usual | settings)])
        runpy.run_module(MODULE, run_name='__main__')
        return [json.loads(line) for line in Path('pretrained.jsonl').read_text().splitlines()]

    return run


def test_recipes_have_the_same_bytes_and_a_row_for_each_text(study, capsys):
    rows = study(seeds='1,2', recipes='TransMLA,CARE-E,attention,attention + layer by layer')
    source, *others = rows
    assert source['model'] == 'the source'
    assert [(row['recipe'], row['seed']) for row in others] == [
        ('TransMLA', 1),
        ('CARE-E', 1),
        ('attention', 1),
        ('attention + layer by layer', 1),
        ('attention', 2),
        ('attention + layer by layer', 2),
    ]
    assert {row['bytes'] for row in others} == {source['bytes'] / 2}
    assert all(row['text'] > 1 and row['second text'] > 1 for row in rows)
    assert len(others[3]['errors']) == 2
    assert 'attention + layer by layer' in capsys.readouterr().out


def test_searched_pairs_are_those_of_the_least_error(study):
    _, row = study(seeds='1', recipes='pairs searched')
    splits = row['splits']
    assert len(splits) > 1 and splits[f'{row["rank"]} + {row["k_pe"]}'] == min(splits.values())


def test_a_study_goes_on_where_it_was_and_adds_models(study):
    first = study(seeds='1', recipes='attention')
    again = study(seeds='1', recipes='attention + W^O,attention', models='src', cache_dtype='int8')
    assert again[: len(first)] == first
    added = again[len(first) :]
    assert [(row.get('model'), row.get('cache')) for row in added[:2]] == [
        ('src', ''),
        ('src', 'int8'),
    ]
    assert added[0]['text'] == first[0]['text']
    assert [row['recipe'] for row in added[2:]] == ['attention + W^O']


def test_what_is_missing_is_refused(study):
    with pytest.raises(UserError, match='say --source='):
        study(source='')
    with pytest.raises(UserError, match="recipes='Palu' is not known"):
        study(recipes='Palu')
