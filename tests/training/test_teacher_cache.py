"""A teacher's predictions on disk: what they hold, when they serve, and how they are written."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import run, series, words

from nanomla.checkpoints import native
from nanomla.core.configurator import UserError
from nanomla.core.token_files import write_text
from nanomla.training.batches import Dataset
from nanomla.training.loss import BatchLoss
from nanomla.training.teacher import cache as cache_module
from nanomla.training.teacher.cache import TeacherCache, top_predictions
from nanomla.training.teacher.loss import CachedDistillationLoss, DistillationLoss

SENTENCE = 'to be or not to be that is the question whether tis nobler in the mind to suffer '


def coarse_kl(p, q, ids):
    """Return KL(p, q) in float64 of distributions (V,), tokens other than `ids` counted as one."""
    p, q = (torch.cat([t[ids], 1 - t[ids].sum(0, keepdim=True)]) for t in (p.double(), q.double()))
    return (p * (p / q).log()).sum()


@pytest.mark.parametrize('top_k', [1, 5, 39])
def test_the_loss_is_that_of_the_most_probable_tokens_and_the_rest(top_k, tiny, tokens):
    """With all tokens but one it is that of the teacher itself."""
    student, teacher, idx = tiny('mha', n_head=2), tiny('mla'), tokens(20)
    x, y = idx[:, :-1], idx[:, 1:]
    predictions = top_predictions(teacher, teacher.hidden(x), top_k)
    loss = CachedDistillationLoss(BatchLoss(student), 0.7)(x, y, *predictions)
    p, q = teacher(x).softmax(-1).flatten(0, 1), student(x).softmax(-1).flatten(0, 1)
    ids = p.argsort(-1, descending=True)[:, :top_k]
    divergence = torch.stack([coarse_kl(*row) for row in zip(p, q, ids)]).mean().float()
    expected = 0.3 * student(x, y) + 0.7 * divergence
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    if top_k == 39:
        whole = DistillationLoss(BatchLoss(student), BatchLoss(teacher), 0.7)(x, y)
        torch.testing.assert_close(loss, whole, rtol=1e-4, atol=1e-5)
    loss.backward()
    assert all(p.grad.isfinite().all() for p in student.parameters())


@pytest.fixture
def cache(tiny, tmp_path):
    """cache(**changes) -> a TeacherCache in tmp_path/cache for a run of three steps."""
    meta = write_text(tmp_path / 'text', SENTENCE * 20, 'char', 'a test')
    folder = tmp_path / 'text'
    settings = dict(
        teacher_cache=str(tmp_path / 'cache'),
        teacher_top_k=5,
        seed=1,
        batch_size=2,
        gradient_accumulation_steps=2,
        max_iters=3,
        block_size=8,
        distill_hidden=0.0,
        cuda_graph=False,
    )

    def make(teacher=None, top_k_is_given=True, rank=0, world=1, **changes):
        s = settings | changes
        data = Dataset(folder, s['block_size'], s['seed'], 'cpu', rank, world)
        return TeacherCache(s, data, teacher, meta['vocab_size'], top_k_is_given)

    make.teacher = tiny('mha', vocab_size=meta['vocab_size'])
    return make


def written(cache, **changes):
    made = cache(cache.teacher, **changes)
    if not made.is_complete:
        made.complete(torch.device('cpu'))
    return made


def test_a_run_reads_its_own_windows_and_their_predictions(cache):
    made = written(cache)
    data, teacher = made.data, cache.teacher
    for step, micro in ((0, 0), (0, 1), (2, 1)):
        starts, predictions = made.batch(step, micro)
        assert starts.tolist() == data.starts(step, micro, 2).tolist()
        x, _ = data.cut('train', starts)
        expected = top_predictions(teacher, teacher.hidden(x), 5)
        assert torch.equal(predictions.ids, expected.ids)
        for name in ('log_p', 'log_rest'):
            found, exact = getattr(predictions, name), getattr(expected, name)
            torch.testing.assert_close(found, exact, rtol=1e-3, atol=1e-5)
    size = os.path.getsize(made.path)
    assert size == 12 * (8 + 4 + 8 * (5 * (2 + 2) + 2))  # windows of 8 tokens of 5 predictions


def test_a_batch_of_another_size_takes_the_windows_one_after_the_other(cache):
    in_pairs = written(cache)
    one_by_one = cache(batch_size=1, gradient_accumulation_steps=1, max_iters=12)
    for step in range(4):
        starts, predictions = one_by_one.batch(step, 0)
        expected, _ = in_pairs.batch(*divmod(step // 2, 2))
        assert starts.tolist() == [expected.tolist()[step % 2]]
        assert predictions.ids.shape == (1, 8, 5)


def test_each_process_reads_its_own_share(cache):
    alone = written(cache)
    for rank in (0, 1):
        starts, _ = cache(rank=rank, world=2).batch(1, 0)
        assert starts.tolist() == alone.batch(1, rank)[0].tolist()


def all_starts(made):
    batches = [made.batch(step, micro)[0].tolist() for step in range(3) for micro in (0, 1)]
    return [start for batch in batches for start in batch]


def test_another_seed_reads_the_same_windows_in_another_order(cache):
    first, other = all_starts(written(cache)), all_starts(cache(seed=2))
    assert first != other
    assert sorted(first) == sorted(other)


def test_writing_goes_on_where_it_was_killed(cache):
    made = written(cache)
    content = made.path.read_bytes()
    record = made.record.itemsize
    damaged = content[: 3 * record - 1] + b'\0' + content[3 * record : 4 * record + 7]
    made.path.write_bytes(damaged)
    assert not cache().is_complete
    assert written(cache).path.read_bytes() == content
    longer = written(cache, max_iters=4)
    assert longer.path.read_bytes()[: len(content)] == content
    assert longer.is_complete


def test_a_complete_cache_needs_no_teacher(cache, monkeypatch):
    with pytest.raises(UserError, match='has 0 windows and the run needs 12: name the --teacher'):
        cache().complete(torch.device('cpu'))
    written(cache)
    assert cache().is_complete
    monkeypatch.setattr(cache_module, 'top_predictions', None)
    assert written(cache).is_complete
    assert not cache(max_iters=4).is_complete


def test_predictions_of_something_else_are_refused(cache, tiny):
    teacher = cache.teacher
    written(cache)
    other = tiny('mla', vocab_size=teacher.config.vocab_size)
    for given, changes, match in (
        (other, {}, 'holds another teacher: name another folder'),
        (None, dict(block_size=9), 'holds windows of 8 tokens'),
        (None, dict(teacher_top_k=4), 'holds 5 predictions of each token'),
        (None, dict(teacher_top_k=99), 'teacher_top_k=99 must be at least 1 and less than'),
    ):
        with pytest.raises(UserError, match=match):
            cache(given, **changes)
    assert cache(top_k_is_given=False, teacher_top_k=99).is_complete
    folder = cache().data.folder
    write_text(folder, SENTENCE * 19, 'char', 'a test')
    with pytest.raises(UserError, match='holds another text'):
        cache()


def test_a_changed_byte_is_found_where_it_is_read(cache):
    made = written(cache)
    content = bytearray(made.path.read_bytes())
    content[made.record.itemsize // 2] ^= 1
    made.path.write_bytes(content)
    assert cache().batch(1, 0)
    with pytest.raises(UserError, match='predictions.bin is damaged') as error:
        cache().batch(0, 0)
    assert '\n' not in str(error.value)
    (Path(made.folder) / 'cache.json').write_text('{}')
    with pytest.raises(UserError, match='cache.json cannot be used'):
        cache()


def test_several_processes_do_not_write(cache):
    with pytest.raises(UserError, match='is written by one process'):
        cache(cache.teacher, world=2).complete(torch.device('cpu'))


# -------------------------------------------------------------------------------------------------
# train.py


@pytest.fixture
def learn(tiny, tmp_path, monkeypatch):
    """learn(out_dir, **settings) -> the training losses of three steps against a teacher."""
    monkeypatch.chdir(tmp_path)
    meta = write_text('text', SENTENCE * 20, 'char', 'a test')
    for name in ('student', 'teacher'):
        model = tiny('mla' if name == 'student' else 'mha', vocab_size=meta['vocab_size'])
        args = native.model_args(model)
        state = dict(kind=native.kind_of(model), model_args=args, model=model.state_dict(), step=1)
        native.save(Path(name) / 'ckpt.pt', state | dict(meta=meta))
    settings = dict(
        init_from='student',
        dataset=Path('text').resolve(),
        batch_size=4,
        gradient_accumulation_steps=2,
        block_size=16,
        max_iters=3,
        eval_interval=3,
        log_interval=1,
        warmup_iters=0,
        distill=0.9,
        sample_tokens=0,
        device='cpu',
        compile=False,
    )

    def make(out_dir, **changes):
        run('train.py', words(settings | dict(out_dir=out_dir) | changes))
        return list(series(out_dir, 'train', 'loss').values())

    return make


def test_training_from_the_cache_is_training_with_the_teacher(learn):
    vocab_size = native.load('teacher')['model_args']['vocab_size']
    cached = dict(teacher_cache='cache', teacher_top_k=vocab_size - 1)
    exact = learn('exact', teacher='teacher')
    first = learn('first', teacher='teacher', **cached)
    np.testing.assert_allclose(first, exact, rtol=2e-3)
    shutil.rmtree('teacher')
    assert learn('again', **cached) == first
    resumed = dict(init_from='resume', max_iters=4)
    with pytest.raises(UserError, match='has 24 windows and the run needs 32'):
        learn('again', **resumed)


@pytest.mark.gpu
def test_a_gpu_trains_from_the_cache_compiled_as_plain(learn):
    cached = dict(teacher='teacher', teacher_cache='cache', teacher_top_k=8, dtype='float32')
    plain = learn('plain', **cached, device='cuda', fused_loss=False)
    compiled = learn('compiled', **cached, device='cuda', compile=True)
    np.testing.assert_allclose(compiled, plain, rtol=2e-3)


@pytest.mark.parametrize('changes', [dict(distill_hidden=1.0), dict(cuda_graph=True)])
def test_what_does_not_go_with_a_cache_is_refused_before_the_work(changes, cache):
    with pytest.raises(UserError, match=f'does not go with --{[*changes][0]}'):
        cache(cache.teacher, **changes)
