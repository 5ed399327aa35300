"""Learn from a teacher's predictions beside the text."""

import torch
import torch.nn as nn
import torch.nn.functional as F

from nanomla.training.loss import BatchLoss


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


def log_predictions(model, x):
    return model.lm_head(x).float().log_softmax(-1).flatten(0, 1)


def relative_distance(ours, theirs):
    """E |ours - theirs|² / E |theirs|²."""
    return (ours.float() - theirs.float()).square().mean() / theirs.float().square().mean()
