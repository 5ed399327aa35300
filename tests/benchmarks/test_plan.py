"""What bench.py decode measures: names of shapes, registered attentions, and settings that fail."""

from pathlib import Path

import pytest

from model import GPT, GPTConfig, MultiHeadAttention
from model_mla import GPT_MLA, MLAConfig, MultiHeadLatentAttention
from nanomla.benchmarks.plan import build_model, described_model
from nanomla.checkpoints import native
from nanomla.core.configurator import UserError


@pytest.mark.parametrize(
    'name, n_head, expected',
    [
        ('mha', 12, ('mha', dict(n_kv_head=0))),
        ('gqa', 12, ('mha', dict(n_kv_head=4))),  # about a third
        ('gqa', 4, ('mha', dict(n_kv_head=2))),
        ('gqa:6', 12, ('mha', dict(n_kv_head=6))),
        ('mqa', 12, ('mha', dict(n_kv_head=1))),
        ('mla', 12, ('mla', dict(n_kv_head=0))),
        ('mla:256+32', 12, ('mla', dict(n_kv_head=0, kv_lora_rank=256, qk_rope_head_dim=32))),
        ('random:tiny', 12, None),
    ],
)
def test_names_of_shapes(tiny_plan, name, n_head, expected):
    plan = tiny_plan(models='mha', n_head=n_head)
    assert described_model(plan, name) == expected


def test_gqa_needs_more_than_two_heads(tiny_plan):
    with pytest.raises(UserError, match="'gqa': GQA has more than one key/value head"):
        tiny_plan(models='gqa', n_head=2)


class Gated(MultiHeadAttention):
    pass


class GatedGPT(GPT):
    Config, Attention = GPTConfig, Gated


class WideLatent(MultiHeadLatentAttention):
    pass


class WideLatentConfig(MLAConfig):
    @classmethod
    def shape_settings(cls, name, widths, n_head):
        return dict(n_kv_head=0, kv_lora_rank=int(widths))


class WideLatentGPT(GPT_MLA):
    Config, Attention = WideLatentConfig, WideLatent


def test_a_registered_attention_is_measured_by_its_name(bench, rows_of, monkeypatch):
    monkeypatch.setitem(native.MODELS, 'gated', GatedGPT)
    monkeypatch.setitem(native.MODELS, 'wide', WideLatentGPT)
    assert bench(models='gated,wide:24', caches='dense', contexts='16', batch_sizes='1') == 0
    gated, wide = (row for row in rows_of() if row['what'] == 'cell')
    assert (gated['reason'], gated['shape'], gated['bytes_per_token']) == ('', '4:4:8', 512)
    assert (wide['reason'], wide['shape'], wide['bytes_per_token']) == ('', '4:24+4', 2 * 28 * 4)


def test_contexts_beyond_block_size_make_a_longer_model(tiny_plan):
    plan = tiny_plan(contexts='16,2048')
    model = build_model(plan, 'mha')
    assert model.config.block_size == 2048
    assert model.config.pos == 'rope'


def test_empty_sizes_depend_on_what_is_measured(tiny_plan):
    steps = tiny_plan(contexts='', batch_sizes='')
    assert (steps.batch_sizes, steps.contexts) == ([1, 4], [128, 256, 512])
    attention = tiny_plan(contexts='', batch_sizes='', attention_only=True)
    assert (attention.batch_sizes, attention.contexts) == ([4], [256])


@pytest.mark.parametrize(
    'given, message',
    [
        (dict(models='mha,rnn'), "--models=mha,rnn: 'rnn' is not known: use mha, gqa"),
        (dict(models='gqa:3'), "'gqa:3': GQA has more than one key/value head and fewer than n_"),
        (dict(models='mla:64'), "'mla:64': write mla:256+32"),
        (dict(models='mha:2'), "'mha:2': write gqa:4"),
        (dict(caches='dense,ring'), "--caches='ring' is not known: use none, dense, paged"),
        (dict(cache_dtypes='int2'), "--cache_dtypes='int2' is not known"),
        (dict(caches=','), '--caches=,: name at least one of none, dense, paged'),
        (dict(contexts='5'), '--contexts=5 is too small'),
        (dict(contexts='64,x'), '--contexts=64,x: write numbers with commas'),
        (dict(contexts=','), '--contexts=,: write numbers with commas'),
        (dict(batch_sizes='0'), '--batch_sizes=0 must be at least 1'),
        (dict(page_size=32), 'page_size=32 is not known: use 16, 64, 128'),
        (dict(peer='nowhere'), '--peer=nowhere is no checkout of nanoGPT'),
        (dict(peer='transformers,nowhere'), '--peer=nowhere is no checkout of nanoGPT'),
        (dict(peer='transformers', caches='none'), '--peer times whole texts decoded with a cache'),
        (dict(peer='transformers', new_tokens=2000), 'are beyond block_size=1024'),
        (dict(new_tokens=0), 'new_tokens=0 must be at least 1'),
        (
            dict(attention_only=True, candidates='sdpa,cudnn'),
            "--candidates=sdpa,cudnn: 'cudnn' is part of no name",
        ),
        (
            dict(attention_only=True, attention_shapes='12:64'),
            "--attention_shapes: '12:64' is none",
        ),
        (
            dict(attention_only=True, attention_shapes='12:5:64'),
            "--attention_shapes: '12:5:64' is none",
        ),
        (dict(warmup_steps=-1), 'warmup_steps=-1 must be at least 0'),
        (dict(out_dir='file/x'), 'cannot write file/x'),
        (dict(keep=True, out_dir='bad'), 'bad/decode.jsonl:1: not a JSON object'),
    ],
    ids=lambda value: ' '.join(map(str, value.values())) if isinstance(value, dict) else '',
)
def test_what_is_wrong_is_one_line(bench, given, message, capsys):
    Path('file').write_text('')
    Path('bad').mkdir()
    Path('bad/decode.jsonl').write_text('no json\n')
    assert bench(**given) == 2
    err = capsys.readouterr().err
    assert err.startswith('error: '), err[-2000:]
    assert message in err
    assert err.count('\n') == 1
    assert not Path('out-bench').exists()
