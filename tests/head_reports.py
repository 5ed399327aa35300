"""
Reports on heads that were made by hand, for tests of the page and for a picture of it: nothing here
was trained.

    PYTHONPATH=. python tests/head_reports.py out/heads.html      # a page to look at

Each head is a rule on a sequence [first, S, S]: where it would look (previous token, induction,
...), how firmly, and how much of its logits is noise. Attention is the softmax of these logits and
the scores are means over the rows of the second S, so that every number on the page belongs to its
picture. Only losses and circuits are made up.

Letters: H heads, T tokens, L = |S|.
"""

import sys

import numpy as np

from nanomla.heads.page import build

WORDS = (
    'stone river lamp seven under glass winter paper north bird salt open field hand quiet '
    'door iron cloud far bread wheel green story fish wall early root small bell night sand '
    'once ship letter gold deep hill rain corn line moon table horse ash milk voice east king '
    'snow leaf clay rope star road wind cup tree song wolf oak tin map sea dust'
).split()
FAMILIES = 'induction', 'previous', 'duplicate', 'current', 'first'


def sequence(T):
    """(texts, L): a first token and words that come twice, T in all."""
    L = (T - 1) // 2
    words = [' ' + WORDS[i % len(WORDS)] + str(i // len(WORDS) or '') for i in range(L)]
    return (['<|endoftext|>'] + words + words + [' end'])[:T], L


def rule(kind, T, L):
    """(T, T) of 0 and 1: the key each query looks at."""
    q, k = np.arange(T)[:, None], np.arange(T)[None]
    second = q > L
    return {
        'previous': k == q - 1,
        'current': k == q,
        'first': k == 0 * q,
        'duplicate': second & (k == q - L),
        'induction': second & (k == q - L + 1),
        'positional': k == q - L + 1,
        '': np.zeros((T, T), bool),
    }[kind].astype(float)


def softmax(logits):
    """Causal softmax of (H, T, T)."""
    T = logits.shape[-1]
    logits = np.where(np.tril(np.ones((T, T), bool)), logits, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def family(A, kind, L):
    """A score and its references, from one head's attention to the rows of the second copy."""
    rows = np.arange(L + 1, min(2 * L + 1, len(A)))
    key = {
        'induction': rows - L + 1,
        'previous': rows - 1,
        'duplicate': rows - L,
        'current': rows,
        'first': 0 * rows,
    }[kind]
    hits = A[rows, key]
    half = 2 * hits.std() / len(rows) ** 0.5
    return dict(
        score=hits.mean(),
        null=(1 / (rows + 1)).mean(),
        control=None,
        gap=None,
        low=max(0, hits.mean() - half),
        high=min(1, hits.mean() + half),
    )


def model(name, kind, heads, T=65, seed=0, trained=True, split=(), **more):
    """A model of the report. heads: per layer, a list of (rule, firmness in logits)."""
    random = np.random.default_rng(seed)
    texts, L = sequence(T)
    flat = [head for layer in heads for head in layer]
    noise = random.normal(scale=0.8, size=(len(flat), T, T)) - 0.015 * np.abs(
        np.subtract.outer(np.arange(T), np.arange(T))
    )
    aims = np.stack([firm * rule(label, T, L) for label, firm in flat])
    A = softmax(aims + noise)
    # In MLA, what depends on the tokens comes through the latent, and what depends on the position
    # through RoPE.
    by_place = np.array(
        [label in ('previous', 'current', 'first', 'positional') for label, _ in flat]
    )[:, None, None]
    content, rope = np.where(by_place, 0, aims) + noise, np.where(by_place, aims, 0)
    at = [divmod(i, len(heads[0])) for i in range(len(flat))]
    scores = []
    for i, (label, _) in enumerate(flat):
        score = dict(
            layer=at[i][0],
            head=at[i][1],
            label=label if trained else '',
            **{key: family(A[i], key, L) for key in FAMILIES},
        )
        strength = score[label if label in FAMILIES else 'induction']['score']
        score['induction'] |= dict(
            control=score['induction']['score'] * (0.95 if label == 'positional' else 0.04),
            gap=score['induction']['score'] * (0.02 if label == 'positional' else 0.93),
        )
        score |= dict(
            copying=float(np.tanh(random.normal(0.9 if label == 'induction' else 0, 0.25))),
            zero_ablation=float(
                abs(random.normal(0, 0.01)) + 0.4 * strength * (label in ('induction', 'previous'))
            ),
            mean_ablation=float(
                abs(random.normal(0, 0.01)) + 0.3 * strength * (label in ('induction', 'previous'))
            ),
            pattern_ablation=float(
                abs(random.normal(0, 0.01)) + 0.25 * strength * (label == 'induction')
            ),
        )
        scores.append(score)
    found = dict(
        name=name,
        kind=kind,
        params=124_439_808,
        step=6000,
        tokens=2_949_120_000,
        val_loss=3.2741,
        source='tests/head_reports.py, not a model',
        trained=trained,
        layers=len(heads),
        heads=len(heads[0]),
        tokens_text=texts,
        patterns_u8=build.pack_patterns(A),
        scores=scores,
    )
    if split:
        chosen = [at.index(tuple(head)) for head in split]
        found['mla_split'] = dict(
            heads=[list(head) for head in split],
            content_f16=build.pack_logits(content[chosen]),
            rope_f16=build.pack_logits(rope[chosen]),
        )
    if trained:
        x = np.arange(1, T)
        wave = 0.12 * random.normal(size=T - 1)
        found |= dict(
            icl_score=-0.41,
            loss_by_position=dict(
                x=x,
                repeated=np.where(x <= L, 7.1, 0.9 + 3 * np.exp(-(x - L) / 4.0)) + wave,
                control=7.1 + wave[::-1],
            ),
        )
        labels = [label for label, _ in flat]
        group = [list(at[i]) for i, label in enumerate(labels) if label == 'induction']
        found['group_ablation'] = dict(heads=group, zero=4.81, mean=4.12, one_by_one_sum=0.52)
        edges = [
            {
                'from': list(at[i]),
                'to': list(at[j]),
                'kind': way,
                'value': float(
                    abs(random.normal(0.05, 0.02))
                    + (
                        0.35
                        if way == 'K' and labels[i] == 'previous' and labels[j] == 'induction'
                        else 0
                    )
                ),
            }
            for i in range(len(flat))
            for j in range(len(flat))
            if at[i][0] < at[j][0]
            for way in 'QKV'
        ]
        found['composition'] = sorted(edges, key=lambda edge: -edge['value'])[:1000]
    return found | more


SMALL = [
    [('previous', 6.5), ('current', 5), ('', 0), ('first', 7)],
    [('induction', 7), ('duplicate', 5), ('', 0), ('induction', 5.5)],
]


def layers(count=12, heads=12, seed=0):
    """
    Rules for a GPT-2 sized model: early heads look by position, and induction heads come after the
    previous-token heads.
    """
    random = np.random.default_rng(seed)
    out = []
    for layer in range(count):
        early, late = layer < count / 3, layer > count / 3
        names, odds = (
            ['', 'previous', 'current', 'duplicate', 'first', 'induction'],
            np.array([3, 2 * early + 0.2, 1.2 * early + 0.1, 0.5, 2.5 * late + 0.3, 1.6 * late]),
        )
        out.append(
            [
                (str(random.choice(names, p=odds / odds.sum())), float(random.uniform(4, 8)))
                for _ in range(heads)
            ]
        )
    return out


def checkpoints(models, start=(9, 12)):
    """Runs in which the induction heads appear between two moments, as a phase change does."""
    tokens = [0] + [int(round(10**power, -3)) for power in np.linspace(5, 9.4, 14)]
    runs = []
    for found, middle in zip(models, (7.2, 7.7)):
        grown = [0.02 + 0.98 / (1 + np.exp(-4 * (np.log10(seen + 1) - middle))) for seen in tokens]
        last = np.array([score['induction']['score'] for score in found['scores']]).reshape(
            found['layers'], found['heads']
        )
        runs.append(
            dict(
                name=found['name'],
                tokens=tokens,
                step=[seen // 491_520 for seen in tokens],
                max_induction=[float(last.max() * part) for part in grown],
                scores=[(last * part).tolist() for part in grown],
                icl=[-0.45 * part for part in grown],
                repeat_loss=[10.8 - 9.2 * part for part in grown],
            )
        )
    return runs


def report(models, runs=None):
    return dict(
        models=models,
        made=dict(
            command='python find_induction_heads.py --out_dir=out-mha --other=out-mla',
            commit='0000000',
            date='2025-01-31',
        ),
        **(dict(checkpoints=runs) if runs else {}),
    )


def pair(T=65):
    """A small MHA and a small MLA model with everything that the page can show."""
    both = [
        model('made by hand, MHA', 'MHA', SMALL, T),
        model(
            'made by hand, MLA',
            'MLA',
            [[*SMALL[0][1:], SMALL[0][0]], [*SMALL[1][2:], *SMALL[1][:2]]],
            T,
            seed=1,
            split=[(0, 3), (1, 1), (1, 2), (1, 3)],
            val_loss=3.2552,
            params=121_003_008,
        ),
    ]
    return report(both, checkpoints(both))


def large(T=127):
    """A GPT-2 sized pair; 48 heads with the parts of their logits."""
    both = [
        model('made by hand, MHA of 12 layers', 'MHA', layers(), T),
        model(
            'made by hand, MLA of 12 layers',
            'MLA',
            layers(seed=3),
            T,
            seed=1,
            val_loss=3.2552,
            params=121_003_008,
            split=[(layer, head) for layer in range(4, 8) for head in range(12)],
        ),
    ]
    return report(both, checkpoints(both))


if __name__ == '__main__':
    build.write(
        sys.argv[1] if len(sys.argv) > 1 else 'heads.html',
        (pair if 'small' in sys.argv else large)(),
    )
