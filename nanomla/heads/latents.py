"""
What MLA's latent keeps: the directions of c_kv that carry variance, and how alike the layers' latents are.

    shares   principal components of the centred c_kv: which share of its variance the largest r carry
    likeness linear CKA (Kornblith et al. 2019), which no rotation or scaling of a latent changes:
             |XᵀY|² / (|XᵀX| |YᵀY|) by Frobenius norms, X and Y centred

Legend: N layers, R latent rank, T tokens (of all sequences together).
"""

import torch

from model_mla import GPT_MLA
from nanomla.core.configurator import UserError


@torch.no_grad()
def read(model, ids, batch=8):
    """c_kv of every layer for ids (B, T): (N, B T, R) in fp32, as a cache would hold it. UserError for a model without latents."""
    if not isinstance(model, GPT_MLA):
        raise UserError('only MLA has a latent to compare: name an MLA model')
    seen = [[] for _ in model.transformer.h]
    hooks = [
        block.attn.register_forward_pre_hook(
            lambda a, given, kept=kept: kept.append(a.latent(*given[:2])[0].flatten(0, 1).float())
        )
        for block, kept in zip(model.transformer.h, seen)
    ]
    try:
        for part in ids.split(batch):
            model.hidden(part.to(next(model.parameters()).device))
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack([torch.cat(kept) for kept in seen])


def shares(latents):
    """(N, R): the share of the variance that the r largest principal components carry together, r = 1 to R."""
    x = (latents - latents.mean(1, keepdim=True)).double()
    variance = torch.linalg.eigvalsh(x.mT @ x).flip(-1).clamp(min=0)
    return (variance.cumsum(-1) / variance.sum(-1, keepdim=True).clamp(min=1e-30)).cpu()


def plane(latents):
    """(N, T, 2): every token on the two largest principal components of its layer."""
    x = latents - latents.mean(1, keepdim=True)
    return (x @ torch.linalg.eigh(x.mT @ x).eigenvectors[..., -2:].flip(-1)).cpu()


def likeness(latents):
    """(N, N): linear CKA between the latents of every two layers."""
    x = (latents - latents.mean(1, keepdim=True)).double()
    crossed = torch.stack([torch.stack([torch.linalg.matrix_norm(a.mT @ b) for b in x]) for a in x])
    own = crossed.diagonal().clamp(min=1e-30)
    return (crossed.square() / (own[:, None] * own)).cpu()


@torch.no_grad()
def cut(model, rank):
    """
    Lets the latent of every layer, in place, pass in only `rank` directions: those in which W^UK and W^UV read most (the largest
    right singular vectors of kv_b). UserError for a model without latents.
    """
    if not isinstance(model, GPT_MLA):
        raise UserError('only MLA has a latent to cut: name an MLA model')
    for block in model.transformer.h:
        weight = block.attn.kv_b_proj.weight
        u, s, v = torch.linalg.svd(weight.float(), full_matrices=False)
        weight.copy_((u[:, :rank] * s[:rank]) @ v[:rank])
    return model
