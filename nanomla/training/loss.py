"""The loss of a batch, in the parts that a trainer compiles."""

import torch
import torch.nn as nn

from model import GPT


class BatchLoss(nn.Module):
    """
    forward(idx, targets), both (B, T): the model's mean cross-entropy in nats, as GPT.forward
    gives.

    fused: head and loss by the kernel of kernels.py (on a GPU); fp8: its products in 8 bits. Every
    block is the same code, so one is compiled and serves all.
    """

    def __init__(self, model: GPT, fused: bool = False, fp8: bool = False):
        super().__init__()
        self.model = model
        self.fp8 = fp8
        self.embed = model.embed
        self.head_loss = self.fused_head_loss if fused else model.loss
        self.fused = fused

    def compile_parts(self, embedding: bool = True) -> None:
        """Compile the blocks, and embedding and loss, which are not blocks, by themselves."""
        if embedding:
            self.embed = torch.compile(self.embed, dynamic=False)
            if not self.fused:
                self.head_loss = torch.compile(self.head_loss, dynamic=False)
        for block in self.model.transformer.h:
            block.compile(dynamic=False)

    def forward(self, idx, targets):
        return self.head_loss(self.hidden(idx), targets)

    def hidden(self, idx):
        """GPT.hidden, (B, T, C)."""
        if type(self.model).hidden is not GPT.hidden:  # a model with a pass of its own
            return self.model.hidden(idx)
        x, rope = self.embed(idx)
        for block in self.model.transformer.h:
            x = block(x, rope)
        return self.model.transformer.ln_f(x)

    def hidden_and_blocks(self, idx):
        """GPT.hidden, and the output (B, T, C) of each block."""
        x, rope = self.embed(idx)
        outputs = []
        for block in self.model.transformer.h:
            x = block(x, rope)
            outputs.append(x)
        return self.model.transformer.ln_f(x), outputs

    def fused_head_loss(self, x, targets):
        from nanomla.training.kernels import linear_cross_entropy

        weight = self.model.lm_head.weight
        return linear_cross_entropy(x.flatten(0, 1), weight, targets.flatten(), fp8=self.fp8)
