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
    with open('pretrained.jsonl', 'a') as file:
        file.write('{"recipe": "attention + W^O", "sav')  # as a kill leaves it
    again = study(seeds='1', recipes='attention + W^O,attention', models='src', cache_dtype='int8')
    assert again[: len(first)] == first
    added = again[len(first) :]
    assert [(row.get('model'), row.get('cache')) for row in added[:2]] == [
        ('src', ''),
        ('src', 'int8'),
    ]
    assert added[0]['text'] == first[0]['text']
    assert [row['recipe'] for row in added[2:]] == ['attention + W^O']


@pytest.mark.parametrize(
    'settings, match',
    [
        (dict(source=''), 'say --source='),
        (dict(source='nowhere'), 'nowhere'),
        (dict(source='latent'), 'is an MLA model already'),
        (dict(text='nowhere'), '--text=nowhere: there is no such file'),
        (dict(second_text='nowhere'), '--second_text=nowhere: there is no such file'),
        (dict(second_text='empty.txt'), '--second_text=empty.txt is empty'),
        (dict(recipes='Palu'), "recipes='Palu' is not known"),
        (dict(savings='1.5'), 'savings=1.5'),
        (dict(savings='0.99'), 'leaves no room for a latent'),
        (dict(cache_dtype='int2'), "cache_dtype='int2' is not known"),
        (dict(calibration_tokens=24), 'more than 32 in all are needed'),
        (dict(block_size=48, source='src'), 'src reads 24 tokens at a time, .* --block_size=24'),
        (dict(models='narrow'), 'narrow reads 16 tokens at a time, .* --block_size=16'),
        (dict(models='other'), '--models: other has other tokens than src'),
        (dict(models='src,,src'), 'has an empty name'),
        (dict(models='nowhere'), 'nowhere'),
        (dict(results='text'), 'cannot read text'),
        (dict(results='second.txt'), 'second.txt:1: not a JSON object'),
        (dict(results='other.jsonl'), "other.jsonl:1 is no row of this study .*'bytes'"),
        (dict(results='older.jsonl'), 'older.jsonl is of a source with 999 bytes'),
        (dict(results='newer.jsonl'), 'newer.jsonl:1 was measured with source=elsewhere, not src'),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused_before_any_work(settings, match, study, tiny, monkeypatch):
    def work(*_, **__):
        raise AssertionError('something was measured')

    models = dict(latent=tiny('mla'), narrow=tiny(block_size=16), other=tiny(block_size=48))
    for name, model in models.items():
        args, weights = native.model_args(model), model.state_dict()
        kind = native.kind_of(model)
        native.save(Path(name) / 'ckpt.pt', dict(kind=kind, model_args=args, model=weights))
    Path('empty.txt').touch()
    row = dict(model='the source', bytes=999, text=2.0) | {'second text': 2.0}
    of_another = dict(settings=dict(source='elsewhere'))
    rows = dict(other=dict(what='source'), older=row, newer=row | of_another)
    for name, content in rows.items():
        Path(f'{name}.jsonl').write_text(json.dumps(content) + '\n')
    monkeypatch.setattr('nanomla.conversion.calibration.mean_loss', work)
    monkeypatch.setattr('nanomla.conversion.calibration.measure', work)
    before = {path: path.read_bytes() for path in Path().rglob('*') if path.is_file()}
    with pytest.raises(UserError, match=match) as error:
        study(**settings)
    assert '\n' not in str(error.value)
    assert before == {path: path.read_bytes() for path in Path().rglob('*') if path.is_file()}
