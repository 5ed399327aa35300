"""DistillationLoss: cross-entropy, divergence from a teacher, distance from its blocks."""

import pytest
import torch

from nanomla.training.loss import BatchLoss
from nanomla.training.teacher.loss import DistillationLoss

LLAMA = dict(bias=False, pos='rope', norm='rmsnorm', act='swiglu', n_inner=44)


def loss_of(student, teacher, share, hidden_weight=0.0):
    return DistillationLoss(BatchLoss(student), BatchLoss(teacher), share, hidden_weight)


def assert_only_the_student_learns(student, teacher):
    for p in student.parameters():
        assert p.grad is not None
    for p in teacher.parameters():
        assert p.grad is None


def test_distillation_is_cross_entropy_and_divergence(tiny, tokens):
    student, teacher, idx = tiny('mha', n_head=2), tiny('mha', **LLAMA), tokens(20)
    x, y = idx[:, :-1], idx[:, 1:]
    p, log_q = teacher(x).softmax(-1), student(x).log_softmax(-1)
    cross_entropy, divergence = student(x, y), (p * (p.log() - log_q)).sum(-1).mean()
    for share in (0.0, 0.3, 1.0):
        loss = loss_of(student, teacher, share)(x, y)
        expected = (1 - share) * cross_entropy + share * divergence
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    loss.backward()
    assert_only_the_student_learns(student, teacher)
    assert loss_of(teacher, teacher, 1.0)(x, y).item() == pytest.approx(0, abs=1e-6)


def test_distillation_compares_the_outputs_of_the_blocks(tiny, tokens):
    torch.manual_seed(1)
    student, teacher, idx = tiny('mla', n_head=2), tiny('mha', **LLAMA), tokens(20)
    x, y = idx[:, :-1], idx[:, 1:]
    outputs = {student: [], teacher: []}
    hooks = []
    for model, seen in outputs.items():
        for block in model.transformer.h:

            def watch(block, args, output, seen=seen):
                seen.append(output)

            hooks.append(block.register_forward_hook(watch))
    plain = loss_of(student, teacher, 0.3)(x, y)
    for hook in hooks:
        hook.remove()

    distances = []
    for a, b in zip(outputs[student], outputs[teacher]):
        distances.append(((a - b) ** 2).sum() / (b**2).sum())
    assert len(distances) == student.config.n_layer > 1
    assert min(distances) > 0
    loss = loss_of(student, teacher, 0.3, hidden_weight=2.0)(x, y)
    expected = plain + 2.0 * sum(distances) / len(distances)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    loss.backward()
    assert_only_the_student_learns(student, teacher)
    same = loss_of(teacher, teacher, 1.0, hidden_weight=2.0)
    assert same(x, y).item() == pytest.approx(0, abs=1e-6)
