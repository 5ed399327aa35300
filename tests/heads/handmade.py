"""Models whose heads are written by hand, and a Subject of them."""

import torch

from nanomla.checkpoints import native
from nanomla.checkpoints.load import LoadedModel
from nanomla.heads import patterns
from nanomla.heads.subject import Subject, Vocabulary

V, P = 24, 40  # tokens (0 begins a text), positions
# The channels hold a token, its position, the token before it, and what is predicted.
SLOTS = dict(
    token=slice(0, V),
    position=slice(V, V + P),
    before=slice(V + P, 2 * V + P),
    prediction=slice(2 * V + P, 3 * V + P),
)
C, D, SHARP = 3 * V + P, V + P, 60.0  # channels, head dim, how firmly heads attend


def block_matrix(*pieces):
    """(D, C) with identities: each piece is (rows from, slot, factor)."""
    w = torch.zeros(D, C)
    for row, slot, factor in pieces:
        n = SLOTS[slot].stop - SLOTS[slot].start
        w[row : row + n, SLOTS[slot]] = factor * torch.eye(n)
    return w


def by_hand(kind, offset=1, turned=False):
    """
    Return a model of two layers of three heads whose weights are known.

    0.0 attends `offset` positions back (1: the previous token) and writes that token into the slot
    `before`; 0.2 finds the same token earlier; 1.0 finds where its own token came `before` and
    writes the token that stands there; the others are idle. Norms are constant: every token has the
    same length. turned: 0.1 attends to its own token and writes minus twice its vector, so that 1.0
    reads, and turns back, the opposite of the embedding.
    """
    model = empty_model(kind)
    zero = torch.zeros(D, C)
    idle = (zero, zero, zero, 'prediction')
    heads = heads_by_hand(offset, turned)
    for layer, block in enumerate(model.transformer.h):
        of_layer = [heads.get((layer, head), idle) for head in range(3)]
        set_heads(block.attn, of_layer)
    return model


def empty_model(kind):
    """Return a model with zeros but for embeddings, norms and the head."""
    args = dict(block_size=P, vocab_size=V, n_layer=2, n_head=3, n_embd=C, head_dim=D, bias=False)
    args |= dict(norm='rmsnorm', mlp=False, tie_weights=False, kernel='eager', pos='learned')
    if kind == 'mla':
        # The latent holds token, position and before.
        args |= dict(kv_lora_rank=SLOTS['before'].stop, latent_norm=False)
        args |= dict(qk_rope_head_dim=0, qk_nope_head_dim=D)
    model_class = native.MODELS[kind]
    model = model_class(model_class.Config(**args)).eval().requires_grad_(False)
    for p in model.parameters():
        p.zero_()
    t = model.transformer
    t.wte.weight[:, SLOTS['token']] = torch.eye(V)
    t.wpe.weight[:, SLOTS['position']] = torch.eye(P)
    for norm in (t.h[0].ln_1, t.h[1].ln_1, t.ln_f):
        norm.weight.fill_(1.0)
    model.lm_head.weight[:, SLOTS['prediction']] = 30 * torch.eye(V)
    return model


def heads_by_hand(offset, turned):
    """Return (layer, head) -> W^Q, W^K, W^V and the slot that the head writes into."""
    position = block_matrix((0, 'position', 1.0))
    token = block_matrix((0, 'token', 1.0))
    # A query at p asks for p - offset.
    back = block_matrix((0, 'position', SHARP))
    back[:, SLOTS['position']] = back[:, SLOTS['position']].roll(offset, 1)
    # The same token at another position.
    same_token = block_matrix((0, 'token', SHARP), (V, 'position', -SHARP))
    token_and_position = block_matrix((0, 'token', 1.0), (V, 'position', 1.0))
    sign = -1.0 if turned else 1.0
    heads = {
        (0, 0): (back, position, token, 'before'),
        (0, 2): (same_token, token_and_position, torch.zeros(D, C), 'prediction'),
        (1, 0): (
            block_matrix((0, 'token', sign * SHARP)),
            block_matrix((0, 'before', 1.0)),
            sign * token,
            'prediction',
        ),
    }
    if turned:
        heads[0, 1] = (block_matrix((0, 'position', SHARP)), position, -2 * token, 'token')
    return heads


def set_heads(attention, heads):
    """Write the weights of three heads into an attention, MHA's or MLA's."""
    q, k, v = (torch.stack([head[i] for head in heads]) for i in range(3))
    if attention.latent is None:
        attention.c_attn.weight.copy_(torch.cat([q, k, v]).flatten(0, 1))
    else:
        rank = attention.kv_b_proj.weight.size(1)
        attention.q_proj.weight.copy_(q.flatten(0, 1))
        attention.kv_a_proj_with_mqa.weight.copy_(torch.eye(rank, C))
        attention.kv_b_proj.weight.copy_(torch.cat([k, v])[..., :rank].flatten(0, 1))
    for head, (*_, slot) in enumerate(heads):
        attention.c_proj.weight[SLOTS[slot], head * D : head * D + V] = torch.eye(V)


def trial_of(model, n=32):
    """Return trials of random tokens that fit a model; token 0 begins a text."""
    usable = torch.arange(1, model.config.vocab_size)
    L, G = patterns.trial_lengths(model.config.block_size, len(usable))
    return patterns.random_trials(usable, 0, n, L, G)


def subject_of(model, held_out=None):
    """Return a Subject of a model: token 0 begins a text, all others are usable."""
    usable = torch.arange(1, model.config.vocab_size)
    vocabulary = Vocabulary(codec=None, begin=0, usable=usable, held_out=held_out)
    return Subject(LoadedModel(model, 'by-hand'), 'by-hand', True, vocabulary)


def entry_of(heads, layer, head):
    """Return the entry of a head in a list of scores."""
    return next(entry for entry in heads if (entry['layer'], entry['head']) == (layer, head))
