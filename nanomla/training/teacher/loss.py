"""The loss against a teacher: its predictions beside the text, as it makes them or from a cache."""

import torch
import torch.nn as nn
import torch.nn.functional as F

from nanomla.training.loss import BatchLoss

SMALLEST_REST = 1e-6  # of a probability that is what others leave of 1: below, rounding decides


class DistillationLoss(nn.Module):
    """
    forward(idx, targets), both (B, T): (1 - share) · cross-entropy + share · KL(teacher, student)
    in nats a token (Hinton et al. 2015, at temperature 1), and hidden_weight · the mean over the
    blocks of E |student - teacher|² / E |teacher|² of their outputs (after Romero et al. 2015).
    """

    def __init__(
        self, student: BatchLoss, teacher: BatchLoss, share: float, hidden_weight: float = 0.0
    ):
        super().__init__()
        self.student = student
        self.teacher = teacher.eval().requires_grad_(False)
        self.share = share
        self.hidden_weight = hidden_weight
        self.divergence = self.kl_divergence
        self.distance = relative_distance

    def compile_parts(self) -> None:
        self.divergence = torch.compile(self.divergence, dynamic=False)
        self.distance = torch.compile(self.distance, dynamic=False)

    def forward(self, idx, targets):
        x, ours = self.outputs(self.student, idx)
        with torch.no_grad():
            x_teacher, theirs = self.outputs(self.teacher, idx)
        loss = self.share * self.divergence(x, x_teacher)
        if self.share < 1:
            loss = loss + (1 - self.share) * self.student.head_loss(x, targets)
        if self.hidden_weight:
            distances = sum(self.distance(a, b) for a, b in zip(ours, theirs))
            loss = loss + self.hidden_weight / len(ours) * distances
        return loss

    def outputs(self, part: BatchLoss, idx):
        """Return the final hidden state (B, T, C), and the output of each block where it counts."""
        if not self.hidden_weight:
            return part.hidden(idx), []
        return part.hidden_and_blocks(idx)

    def kl_divergence(self, x, x_teacher):
        """KL(teacher, student) of the predictions, by the final hidden states (B, T, C)."""
        ours = log_predictions(self.student.model, x)
        theirs = log_predictions(self.teacher.model, x_teacher)
        return F.kl_div(ours, theirs, reduction='batchmean', log_target=True)


class CachedDistillationLoss(nn.Module):
    """
    forward(idx, targets, ids, log_p, log_rest): DistillationLoss by a teacher's K most probable
    tokens, ids and log_p (B, T, K), and log_rest (B, T) of all others together, which count as one.

    The divergence is a lower bound of the one over all tokens.
    """

    def __init__(self, student: BatchLoss, share: float):
        super().__init__()
        self.student = student
        self.share = share
        self.loss = self.loss_by_predictions

    def compile_parts(self) -> None:
        self.loss = torch.compile(self.loss, dynamic=False)

    def forward(self, idx, targets, ids, log_p, log_rest):
        return self.loss(self.student.hidden(idx), targets, ids, log_p, log_rest)

    def loss_by_predictions(self, x, targets, ids, log_p, log_rest):
        log_q = self.student.model.lm_head(x).float().log_softmax(-1)
        divergence = kl_of_the_most_probable(log_q, ids, log_p, log_rest).mean()
        cross_entropy = F.nll_loss(log_q.flatten(0, 1), targets.flatten(), ignore_index=-1)
        return (1 - self.share) * cross_entropy + self.share * divergence


def kl_of_the_most_probable(log_q, ids, log_p, log_rest):
    """KL(p, q) (B, T) of log_q (B, T, V) and a p of K tokens and the rest, which is one more."""
    log_q = log_q.gather(-1, ids)
    q_rest = (1 - log_q.exp().sum(-1)).clamp(min=SMALLEST_REST)
    of_top = (log_p.exp() * (log_p - log_q)).sum(-1)
    return of_top + log_rest.exp() * (log_rest - q_rest.log())


def log_predictions(model, x):
    return model.lm_head(x).float().log_softmax(-1).flatten(0, 1)


def relative_distance(ours, theirs):
    """E |ours - theirs|² / E |theirs|²."""
    return (ours.float() - theirs.float()).square().mean() / theirs.float().square().mean()
