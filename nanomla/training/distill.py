"""Learning from a teacher's predictions beside the text."""

import torch
import torch.nn as nn
import torch.nn.functional as F


class Distilled(nn.Module):
    """
    A model that learns from text and from a teacher's predictions: forward(idx, targets), both (B, T), gives
    (1 - share) · cross-entropy + share · KL(teacher, model) in nats a token (Hinton et al. 2015, at temperature 1), and
    hidden · the mean over the blocks of E |ours - theirs|² / E |theirs|² of their outputs (after Romero et al. 2015).
    """

    def __init__(self, model, teacher, share, hidden=0.0):
        super().__init__()
        self.model, self.teacher, self.share, self.hidden = (
            model,
            teacher.eval().requires_grad_(False),
            share,
            hidden,
        )

    def forward(self, idx, targets):
        x, ours = self.outputs(self.model, idx)
        with torch.no_grad():
            x_theirs, theirs = self.outputs(self.teacher, idx)
        loss = self.share * self.divergence(x, x_theirs)
        if self.share < 1:
            loss = loss + (1 - self.share) * self.model.loss(x, targets)
        if self.hidden:
            loss = loss + self.hidden / len(ours) * sum(
                self.distance(a, b) for a, b in zip(ours, theirs)
            )
        return loss

    def outputs(self, model, idx):
        """model.hidden(idx), and the output (B, T, C) of each of its blocks."""
        if not self.hidden:
            return model.hidden(idx), []
        x, rope = model.embed(idx)
        after = []
        for block in model.transformer.h:
            x = block(x, rope)
            after.append(x)
        return model.transformer.ln_f(x), after

    def distance(self, ours, theirs):
        return (ours.float() - theirs.float()).square().mean() / theirs.float().square().mean()

    def divergence(self, x, theirs):
        ours, theirs = (
            model.lm_head(h).float().log_softmax(-1).flatten(0, 1)
            for model, h in ((self.model, x), (self.teacher, theirs))
        )
        return F.kl_div(ours, theirs, reduction='batchmean', log_target=True)
