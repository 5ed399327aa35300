"""
What MLA's latent holds: the directions of c_kv that carry variance, and how alike the layers are.

    shares   principal components of the centred c_kv: the share of its variance in the largest r
    likeness linear CKA (Kornblith et al. 2019), which no rotation or scaling of a latent changes:
             |XᵀY|² / (|XᵀX| |YᵀY|) by Frobenius norms, X and Y centred

Legend: N layers, R latent rank, T tokens (of all sequences together).
"""

import torch

from model import GPT, Attention
from nanomla.core.configurator import UserError
from nanomla.heads.patterns import hooks


def has_latents(model: GPT) -> bool:
    """Return whether every layer's attention caches a latent."""
    return all(block.attn.latent is not None for block in model.transformer.h)


@torch.no_grad()
def read_latents(model: GPT, ids: torch.Tensor, batch: int = 8) -> torch.Tensor:
    """
    Return c_kv of every layer for ids (B, T): (N, B T, R) in fp32, as a cache would hold it.

    UserError for a model without latents, or whose layers have latents of different widths.
    """
    if not has_latents(model):
        raise UserError('only MLA has a latent to compare: name an MLA model')
    layers = [[] for _ in model.transformer.h]
    numbers = {block.attn: number for number, block in enumerate(model.transformer.h)}

    def read(attention: Attention, given):
        x, rope = given[:2]
        c_kv, _ = attention.latent(x, rope)
        layers[numbers[attention]].append(c_kv.flatten(0, 1).float())

    with hooks(block.attn.register_forward_pre_hook(read) for block in model.transformer.h):
        for part in ids.split(batch):
            model.hidden(part.to(next(model.parameters()).device))
    latents = [torch.cat(parts) for parts in layers]
    if len({latent.size(1) for latent in latents}) > 1:
        raise UserError('--latents=True compares latents of one width, and these layers differ')
    return torch.stack(latents)


def variance_shares(latents: torch.Tensor) -> torch.Tensor:
    """Return the share of the variance in the largest r = 1 to R principal components, (N, R)."""
    x = (latents - latents.mean(1, keepdim=True)).double()
    variance = torch.linalg.eigvalsh(x.mT @ x).flip(-1).clamp(min=0)
    return (variance.cumsum(-1) / variance.sum(-1, keepdim=True).clamp(min=1e-30)).cpu()


def components_for(shares: torch.Tensor, share: float = 0.9) -> torch.Tensor:
    """Return how many of the largest components hold `share` of the variance, (N,)."""
    return 1 + (shares < share).sum(-1)


def likeness(latents: torch.Tensor) -> torch.Tensor:
    """Return the linear CKA between the latents of every two layers, (N, N)."""
    x = (latents - latents.mean(1, keepdim=True)).double()
    rows = []
    for a in x:
        rows.append(torch.stack([torch.linalg.matrix_norm(a.mT @ b) for b in x]))
    crossed = torch.stack(rows)
    own = crossed.diagonal().clamp(min=1e-30)
    return (crossed.square() / (own[:, None] * own)).cpu()
