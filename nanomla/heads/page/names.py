"""
What the page calls its labels, scores and columns, and what they mean: the one list of them, which
travels to the page's scripts inside its report.

To show one more score of a head:
- attention to one more key: KINDS and second_copy in patterns.py (and LABELS, where heads are to be
  called by it), then a Score here;
- another number: add it to the entries of the heads, as report.add_copying does, then a Score here.
"""

from dataclasses import asdict, dataclass

from nanomla.heads.ablation import METHODS
from nanomla.heads.patterns import KINDS

# -------------------------------------------------------------------------------------------------
# labels

COPY = 4  # tokens of S in the legend's small example, a first token and S twice


@dataclass
class Label:
    """
    A label of heads, its meaning, and where an ideal head attends in the legend's example: from
    query `first` on, `back` tokens before the query; None: to the first token.

    long: what its heads are called in a sentence; '' for its name
    """

    name: str
    meaning: str
    first: int = 0
    back: int | None = None
    long: str = ''

    def example(self) -> list[list[int]]:
        """Return the (query, key) pairs of the example."""
        queries = range(self.first, 1 + 2 * COPY)
        return [[q, 0 if self.back is None else q - self.back] for q in queries]


LABELS = (
    Label(
        'induction',
        'Finds the earlier copy of the token it stands on and looks at what came after it: seen '
        '“A B … A”, it looks at B. With a head that copies, the model then says B again. The score '
        'is the mean weight on that key, over the second copy. A head is called induction only '
        'when it also beats its null, its control and the gap test.',
        first=1 + COPY,
        back=COPY - 1,
    ),
    Label(
        'previous',
        'Looks one token back. Induction needs it: it writes what stood before a token where an '
        'induction head can find it.',
        first=1,
        back=1,
        long='previous-token',
    ),
    Label(
        'duplicate',
        'Looks at the earlier copy of the very token it stands on, not at what followed.',
        first=1 + COPY,
        back=COPY,
    ),
    Label('current', 'Looks at its own token.', back=0),
    Label(
        'first',
        'Looks at the first token, where heads often rest when they have nothing to do.',
    ),
    Label(
        'positional',
        'Looks a fixed distance back whatever the tokens are. On repeats of one length this draws '
        'the same stripe as induction; the control and the gap tell them apart.',
        first=COPY - 1,
        back=COPY - 1,
    ),
)


# -------------------------------------------------------------------------------------------------
# scores


@dataclass
class Score:
    """
    A score of a head.

    key: in the entries of report.examine
    short: its name where room is short; column: its heading in the table, '' for none
    is_loss: a difference in loss, in nats, shown with its sign
    """

    key: str
    name: str
    short: str
    column: str = ''
    help: str = ''
    is_loss: bool = False


# Those of FAMILIES come with a null, a control, a gap and an interval.
SCORES = (
    Score('induction', 'induction', 'induction'),
    Score('on_text', 'induction on held-out text', 'on text'),
    Score('previous', 'previous token', 'previous'),
    Score('duplicate', 'duplicate token', 'duplicate'),
    Score('current', 'current token', 'current'),
    Score('first', 'first token', 'first'),
    Score(
        'copying',
        'copying (OV)',
        'copying',
        'Copying',
        'by weights, from the embedding. 1: makes likelier what it attends to; −1: less likely',
    ),
    Score(
        'effective_copying',
        'copying, as read',
        'as read',
        'As read',
        'copying of what the head really reads, which earlier layers may have reversed',
    ),
    Score(
        'zero_ablation',
        'Δ loss, zero ablation',
        'Δ zero',
        'Δ zero',
        "loss added when the head's output is set to zero (nats)",
        is_loss=True,
    ),
    Score(
        'mean_ablation',
        'Δ loss, mean ablation',
        'Δ mean',
        'Δ mean',
        "loss added when the head's output is replaced by its mean (nats)",
        is_loss=True,
    ),
    Score(
        'pattern_ablation',
        'Δ loss, patterns kept',
        'Δ pattern',
        'Δ pattern',
        'loss added when the head is removed but later heads keep their patterns (nats)',
        is_loss=True,
    ),
)
FAMILIES = [score.key for score in SCORES if score.key in (*KINDS, 'on_text')]


@dataclass
class Column:
    """A column of the table that shows one number of the chosen family."""

    key: str
    heading: str
    help: str = ''


COLUMNS = (
    Column('score', 'Score'),
    Column('null', 'Null', 'what a head that attends evenly would score'),
    Column('control', 'Control', 'the same positions in a sequence that does not repeat'),
    Column('gap', 'Gap', 'the score with other tokens between the two copies'),
    Column(
        'interval',
        'Interval',
        '95 % confidence interval of the score over sequences; sorts by its lower end',
    ),
)


# -------------------------------------------------------------------------------------------------
# groups, composition, training


# How heads were ablated together: the ends of the keys of group_ablation, and what they mean.
GROUP_COSTS = dict(
    zero='zero',
    mean='mean',
    pattern='zero, patterns kept',
    frozen='mean, patterns and norms kept',
    zero_control='zero, where nothing repeats',
)
assert set(METHODS) <= GROUP_COSTS.keys(), 'every method of ablation has a name'
TEXTS = {'': 'random tokens', 'text_': 'held-out text'}  # beginnings of the keys
READS = dict(Q='queries', K='keys', V='values')
COMPOSITION = dict(Q='query reads', K='key reads', V='value reads')


@dataclass
class Curve:
    """A curve over the checkpoints of a run: its key there, title and unit."""

    key: str
    title: str
    unit: str


CURVES = (
    Curve('max_induction', 'Best gap score, random tokens', 'score'),
    Curve('max_text', 'Best gap score, held-out text', 'score'),
    Curve('max_previous', 'Best previous-token score', 'score'),
    Curve('icl', 'In-context score', 'nats'),
    Curve('repeat_loss', 'Loss on repeated random tokens', 'nats'),
    Curve('text_repeat_loss', 'Loss on repeated held-out text', 'nats'),
)


def group_tables(costs: dict) -> list[dict]:
    """
    Return a model's group_ablation as a table a kind of text, in words: text, loss, groups (name
    and costs, a dict of GROUP_COSTS) and paths (a dict of READS, or None).
    """
    tables = []
    for prefix, text in TEXTS.items():
        if f'{prefix}loss' not in costs:
            continue
        groups = []
        for label in LABELS:
            count = costs.get(f'{prefix}{label.name}_heads')
            if count:
                found = {key: costs.get(f'{prefix}{label.name}_{key}') for key in GROUP_COSTS}
                heads = 'head' if count == 1 else 'heads'
                name = f'{count} {label.long or label.name} {heads}'
                groups.append(dict(name=name, costs=found))
        paths = {reads: costs.get(f'{prefix}previous_to_induction_{reads}') for reads in READS}
        if None in paths.values():
            paths = None
        tables.append(dict(text=text, loss=costs[f'{prefix}loss'], groups=groups, paths=paths))
    return tables


# -------------------------------------------------------------------------------------------------
# the legend


def terms(models: list[dict]) -> list[list[str]]:
    """Return the words of the page and their meaning; the models say where losses were compared."""
    early, late = 50, 500
    for model in models:
        if model.get('icl_positions'):
            early, late = model['icl_positions']
            break
    return [
        [
            'Null',
            'What a head that spreads its attention evenly scores, about 1/(q+1) a row. Not zero.',
        ],
        [
            'Control',
            'The score at the same positions when the second half is other tokens. A head that '
            'scores here as well matches positions, not tokens.',
        ],
        [
            'Gap',
            'The score when filler stands between the two copies, so that the distance is new. '
            'Only matching by content survives it.',
        ],
        [
            'Copying',
            'From the weights alone: does the head make the token that it looks at likelier as the '
            'next one? 1 always, −1 the opposite. As read: the same for what it really reads.',
        ],
        [
            'Δ loss',
            'What the model loses, in nats, without the head. Zero: its output is set to zero. '
            'Mean: to its mean. Pattern: zero, and later heads keep looking where they looked, so '
            "what remains is the head's direct part.",
        ],
        [
            'In-context score',
            f'Loss at position {late} minus loss at position {early}: how much a longer context '
            'helps. More negative is better.',
        ],
        [
            'Logit parts (MLA)',
            'Before the softmax, a logit of MLA is a sum: content, read from the latent, and RoPE, '
            'which carries position.',
        ],
        [
            'Weights',
            "Stored in steps of 1/255. A row's weights sum to 1. Small maps show the largest "
            'weight under each pixel, so that thin stripes stay visible.',
        ],
    ]


def for_page(models: list[dict]) -> dict:
    """Return all names as the page's scripts read them."""
    return dict(
        labels=[
            dict(name=label.name, meaning=label.meaning, example=label.example())
            for label in LABELS
        ],
        families=FAMILIES,
        scores=[asdict(score) for score in SCORES],
        columns=[asdict(column) for column in COLUMNS],
        group_costs=GROUP_COSTS,
        reads=READS,
        composition=COMPOSITION,
        curves=[asdict(curve) for curve in CURVES],
        terms=terms(models),
    )
