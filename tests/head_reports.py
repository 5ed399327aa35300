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
BY_POSITION = 'previous', 'current', 'first', 'positional'  # rules that do not read tokens


def sequence(T):
    """(texts, L): a first token and words that come twice, T in all."""
    L = (T - 1) // 2
    words = [f' {WORDS[i % len(WORDS)]}{i // len(WORDS) or ""}' for i in range(L)]
    return (['<|endoftext|>', *words, *words, ' end'])[:T], L


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


def head_entry(position, label, A, L, random):
    """An entry of `scores`: everything that the page can show of a head."""
    layer, head = position
    entry = dict(layer=layer, head=head, label=label)
    entry |= {kind: family(A, kind, L) for kind in FAMILIES}
    strength = entry[label if label in FAMILIES else 'induction']['score']
    # A head that counts positions scores without a repetition as well, and loses its stripe with
    # a gap.
    induction = entry['induction']['score']
    control, gap = 0.04 * induction, 0.93 * induction
    if label == 'positional':
        control, gap = 0.95 * induction, 0.02 * induction
    entry['induction'] |= dict(control=control, gap=gap)
    copies = 0.9 if label == 'induction' else 0.0
    entry['copying'] = float(np.tanh(random.normal(copies, 0.25)))
    entry['effective_copying'] = float(np.tanh(random.normal(2 * copies, 0.25)))
    costs = dict(zero=0.0, mean=0.0, pattern=0.0)
    if label in ('induction', 'previous'):
        costs = dict(zero=0.4, mean=0.3, pattern=0.25 if label == 'induction' else 0.0)
    for method, cost in costs.items():
        noise = abs(random.normal(0, 0.01))
        entry[f'{method}_ablation'] = float(noise + cost * strength)
    return entry


def losses(T, L, random):
    """loss_by_position of a model that copies from the second copy on."""
    x = np.arange(1, T)
    wave = 0.12 * random.normal(size=T - 1)
    copied = 0.9 + 3 * np.exp(-(x - L) / 4.0)
    return dict(x=x, repeated=np.where(x <= L, 7.1, copied) + wave, control=7.1 + wave[::-1])


def group_costs(induction, previous):
    """group_ablation of a model with so many induction and previous-token heads."""
    costs = dict(loss=1.204, induction_heads=induction, previous_heads=previous)
    for label, cost in dict(induction=4.81, previous=3.27).items():
        costs |= {
            f'{label}_zero': cost,
            f'{label}_mean': 0.9 * cost,
            f'{label}_pattern': 0.02 * cost,
            f'{label}_frozen': 0.01 * cost,
            f'{label}_zero_control': -0.004,
        }
    costs |= dict(
        previous_to_induction_Q=-0.001,
        previous_to_induction_K=3.11,
        previous_to_induction_V=0.02,
    )
    return costs | {f'text_{key}': cost for key, cost in costs.items()}


def composition(labels, positions, random):
    """Pairs of heads, strongest first: induction heads read previous-token heads by their keys."""
    pairs = []
    for i, sender in enumerate(positions):
        for j, reader in enumerate(positions):
            if sender[0] >= reader[0]:
                continue
            for kind in 'QKV':
                value = abs(random.normal(0.05, 0.02))
                if kind == 'K' and labels[i] == 'previous' and labels[j] == 'induction':
                    value += 0.35
                pair = {'from': list(sender), 'to': list(reader), 'kind': kind}
                pairs.append(pair | dict(value=float(value)))
    return sorted(pairs, key=lambda pair: -pair['value'])[:1000]


def model(name, kind, heads, T=65, seed=0, split=(), **more):
    """A trained model of the report. heads: per layer, a list of (rule, firmness in logits)."""
    random = np.random.default_rng(seed)
    texts, L = sequence(T)
    flat = [head for layer in heads for head in layer]
    labels = [label for label, _ in flat]
    positions = [divmod(i, len(heads[0])) for i in range(len(flat))]
    distance = np.abs(np.subtract.outer(np.arange(T), np.arange(T)))
    noise = random.normal(scale=0.8, size=(len(flat), T, T)) - 0.015 * distance
    aims = np.stack([firm * rule(label, T, L) for label, firm in flat])
    A = softmax(aims + noise)
    scores = []
    for position, label, pattern in zip(positions, labels, A):
        scores.append(head_entry(position, label, pattern, L, random))
    found = dict(
        name=name,
        kind=kind,
        params=124_439_808,
        step=6000,
        tokens=2_949_120_000,
        val_loss=3.2741,
        source='tests/head_reports.py, not a model',
        trained=True,
        layers=len(heads),
        heads=len(heads[0]),
        tokens_text=texts,
        patterns_u8=build.pack_patterns(A),
        scores=scores,
        icl_score=-0.41,
        loss_by_position=losses(T, L, random),
        group_ablation=group_costs(labels.count('induction'), labels.count('previous')),
        composition=composition(labels, positions, random),
    )
    if split:
        # In MLA, what depends on the tokens comes through the latent, and what depends on the
        # position through RoPE.
        by_position = np.array([label in BY_POSITION for label in labels])[:, None, None]
        content = np.where(by_position, 0, aims) + noise
        rope = np.where(by_position, aims, 0)
        chosen = [positions.index(tuple(head)) for head in split]
        found['mla_split'] = dict(
            heads=[list(head) for head in split],
            content_f16=build.pack_logits(content[chosen]),
            rope_f16=build.pack_logits(rope[chosen]),
        )
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
    names = ['', 'previous', 'current', 'duplicate', 'first', 'induction']
    out = []
    for layer in range(count):
        early, late = layer < count / 3, layer > count / 3
        odds = np.array([3, 0.2, 0.1, 0.5, 0.3, 0.0])
        if early:
            odds += [0, 2, 1.2, 0, 0, 0]
        if late:
            odds += [0, 0, 0, 0, 2.5, 1.6]
        rules = []
        for _ in range(heads):
            rule_name = str(random.choice(names, p=odds / odds.sum()))
            rules.append((rule_name, float(random.uniform(4, 8))))
        out.append(rules)
    return out


def checkpoints(models):
    """Runs in which the induction heads appear between two moments, as a phase change does."""
    tokens = [0] + [int(round(10**power, -3)) for power in np.linspace(5, 9.4, 14)]
    runs = []
    for found, middle in zip(models, (7.2, 7.7)):
        grown = [0.02 + 0.98 / (1 + np.exp(-4 * (np.log10(seen + 1) - middle))) for seen in tokens]
        shape = found['layers'], found['heads']
        scores = np.reshape([entry['induction']['score'] for entry in found['scores']], shape)
        gaps = np.reshape([entry['induction']['gap'] for entry in found['scores']], shape)
        runs.append(
            dict(
                name=found['name'],
                tokens=tokens,
                step=[seen // 491_520 for seen in tokens],
                max_induction=[float(gaps.max() * part) for part in grown],
                scores=[(scores * part).tolist() for part in grown],
                gaps=[(gaps * part).tolist() for part in grown],
                icl=[-0.45 * part for part in grown],
                repeat_loss=[10.8 - 9.2 * part for part in grown],
            )
        )
    return runs


def report(models, runs=()):
    made = dict(
        command='python find_induction_heads.py --out_dir=out-mha,out-mla',
        commit='0000000',
        date='2025-01-31',
    )
    found = dict(models=models, made=made)
    if runs:
        found['checkpoints'] = runs
    return found


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
    make = pair if 'small' in sys.argv else large
    build.write(sys.argv[1] if len(sys.argv) > 1 else 'heads.html', make())
