"""Scripts that write something, as they are killed in the midst of it and started again."""

import json
import os
import random
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import forked
import torch
from faulty import KILLED, Ended, nothing_else_changes, run_forked
from helpers import ROOT, TEXT, TINY, tiny_bpe, words
from inputs import names_of
from made_up_results import made_up

from model import GPT, GPTConfig
from nanomla.checkpoints import native
from nanomla.checkpoints.load import load_model
from nanomla.core import token_files
from nanomla.core.files import jsonl

TRAIN = TINY | dict(max_iters=6, eval_interval=2, keep_checkpoints=2)


# -------------------------------------------------------------------------------------------------
# what is different in the process of a script


def no_curve() -> None:
    """Leave the picture of a run out: it takes longer than all of the run."""
    from nanomla.core import figures

    figures.curve = lambda log, picture: None


def fork_its_programs() -> None:
    """Let what the script starts be forks, too, that end with it."""
    no_curve()
    program = forked.fork_its_programs()
    if program is not None:
        code = forked.end_of(lambda: forked.execute(program))
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def no_network() -> None:
    """Take a vocabulary like GPT-2's, and let Hugging Face keep what it converts in `cache`."""
    import datasets
    import tiktoken

    tiktoken.get_encoding = tiny_bpe
    os.environ['HF_HUB_OFFLINE'] = '1'
    datasets.config.HF_HUB_OFFLINE = True
    datasets.config.HF_DATASETS_CACHE = Path('cache').resolve()


# -------------------------------------------------------------------------------------------------
# a command


@dataclass
class Scenario:
    """
    A command and what has to be there in the end.

    outputs: the entries of its folder that it may change. results: what must be equal however often
    it was killed. share: of a campaign's kills. prepare: makes ready the folder. complete: says
    that nothing is left to do. changes: what is different in its process. survives: whether it is a
    process of its own that is killed now and then, which is an error of one line.
    """

    script: str
    arguments: list[str]
    outputs: tuple[str, ...]
    results: Callable[[Path], object]
    share: float = 0.0
    prepare: Callable[[Path], None] = lambda folder: None
    complete: Callable[[Path], bool] = lambda folder: False
    changes: Callable[[], None] = no_curve
    survives: bool = False

    def put(self, place: Path, folder: Path) -> None:
        """Copy `place` to `folder`, and make it ready."""
        if folder.exists():
            shutil.rmtree(folder)
        shutil.copytree(place, folder)
        self.prepare(folder)

    def run(self, folder: Path, kill_at: int = 0) -> Ended:
        copy = folder / self.script  # of a script that writes beside itself
        script = str(copy if copy.exists() else ROOT / self.script)
        with nothing_else_changes(folder, *self.outputs):
            return run_forked(script, self.arguments, folder, kill_at, self.changes).check()

    def run_whole(self, place: Path, folder: Path) -> tuple[int, object]:
        """Run it unharmed. Return the number of calls at which it could be killed, and results."""
        self.put(place, folder)
        ended = self.run(folder)
        assert ended.code == 0, ended.output
        return ended.calls, self.results(folder)

    def kill_and_finish(self, place: Path, folder: Path, kill_at: int) -> object:
        """Kill it at a call, finish it in the same folder, and return its results."""
        self.put(place, folder)
        ended = self.run(folder, kill_at)
        codes = (0, 1, KILLED) if self.survives else (0, KILLED)
        assert ended.code in codes, ended.output
        return self.finish(folder)

    def finish(self, folder: Path) -> object:
        """Run the command again, unless it is complete, and return its results."""
        if not self.complete(folder):
            ended = self.run(folder)
            assert ended.code == 0, ended.output
            # A small file may stay beside its place; a model may not.
            assert not list(folder.rglob('*.pt.*.partial')) + list(folder.glob('*.partial'))
        return self.results(folder)


def make_place(folder: Path) -> Path:
    """Make what the commands read: a dataset, a text, a run, the results of a comparison."""
    token_files.write_text(folder / 'text', TEXT, 'char', 'A tale of a cat')
    (folder / 'tale.txt').write_text(TEXT)
    ended = run_forked('train.py', words(TRAIN | dict(out_dir='done')), folder, prepare=no_curve)
    assert ended.check().code == 0, ended.output
    results = made_up(dict(mha=[1.0, 1.1, 1.2], mla=[0.9, 1.0, 1.1]))
    contenders = [dict(event='contender') | about for about in results.contenders.values()]
    (folder / 'results.jsonl').write_text(jsonl([results.head, *contenders, *results.runs]))
    return folder


# -------------------------------------------------------------------------------------------------
# results


def weights(path: Path) -> list:
    return [value.tolist() for value in native.load(path)['model'].values()]


def of_training(folder: Path) -> object:
    """Return the weights of a run, bit for bit, and its validation losses by step."""
    lines = (folder / 'out' / 'log.jsonl').read_text().splitlines()
    events = [json.loads(line) for line in lines]
    losses = {event['step']: event['val_loss'] for event in events if event['event'] == 'eval'}
    best = native.load(folder / 'out' / 'ckpt.pt')
    return weights(folder / 'out' / 'last.pt'), losses, best['best_val_loss'], best['step']


def of_training_over(folder: Path) -> object:
    """As of_training, and whether the run that was there before is still there, whole."""
    earlier = native.load(folder / 'done' / 'last.pt')['run_id']
    kept = folder / 'out' / 'previous' / earlier
    same = []
    for name in ('ckpt.pt', 'last.pt', 'log.jsonl', 'step-000006.pt'):
        same.append((kept / name).read_bytes() == (folder / 'done' / name).read_bytes())
    assert all(same) and (folder / 'out' / 'notes.txt').read_text() == 'mine'
    return of_training(folder)


def of_evaluation(folder: Path) -> object:
    records = json.loads((folder / 'ev' / 'results.json').read_text())
    return [(record['cache'], record['result']) for record in records]


def of_conversion(folder: Path) -> object:
    return weights(folder / 'mla' / 'ckpt.pt')


def of_export(folder: Path) -> object:
    exported = load_model(folder / 'hf').model.state_dict().values()
    return of_conversion(folder), [value.tolist() for value in exported]


def of_healing(folder: Path) -> object:
    healed = [weights(folder / 'mla-healed' / name) for name in ('ckpt.pt', 'last.pt')]
    return of_export(folder), healed


def of_comparison(folder: Path) -> object:
    """Return the losses of all runs, and their weights."""
    rows = [
        json.loads(line) for line in (folder / 'cmp' / 'results.jsonl').read_text().splitlines()
    ]
    runs = [row for row in rows if row['event'] == 'run']
    losses = [(row['contender'], row['eval_steps'], row['eval_losses']) for row in runs]
    assert all((folder / 'cmp' / f'compare.{kind}').exists() for kind in ('md', 'json', 'png'))
    return losses, [weights(path) for path in sorted(folder.glob('cmp/*/*/last.pt'))]


def of_adapters(folder: Path) -> object:
    table = json.loads((folder / 'ad' / 'results.json').read_text())['rows']
    assert all((folder / 'ad' / f'results.{kind}').exists() for kind in ('csv', 'md', 'png'))
    return [(row['cell'], row['status'], row['val_loss'], row['rouge1']) for row in table]


def of_heads(folder: Path) -> object:
    report = json.loads((folder / 'heads' / 'heads.json').read_text())
    del report['made']
    for model in report['models']:
        del model['repeats']['seconds']
    names = ('heads.html', 'heads.png', 'heads.jsonl', 'training.png')
    assert all((folder / 'heads' / name).stat().st_size for name in names)
    tables = ('heads.csv', 'composition.csv', 'checkpoints.csv')
    return report, [(folder / 'heads' / name).read_text() for name in tables]


def tokens_in(name: str) -> Callable[[Path], object]:
    """Return what reads the tokens of a dataset and its meta.json."""

    def read(folder: Path) -> object:
        meta = token_files.read_meta(folder / name)
        splits = [token_files.read_split(folder / name, split, meta) for split in ('train', 'val')]
        assert not list((folder / name).glob('*.bin.partial')) + [*(folder / name).glob('prog*')]
        meta.pop('plan', None)  # of OpenWebText: the file's path and time
        return meta, [tokens.tolist() for tokens in splits]

    return read


def of_instructions(folder: Path) -> object:
    return [
        (folder / 'new' / name).read_text() for name in ('train.jsonl', 'val.jsonl', 'meta.json')
    ]


def of_table(folder: Path) -> object:
    return [(folder / 'pic' / name).read_bytes() for name in ('c.md', 'c.json', 'c.png')]


# -------------------------------------------------------------------------------------------------
# what is put into the folder before


def put_source(folder: Path) -> None:
    """Write a model that can be converted, healed and exported."""
    torch.manual_seed(0)
    meta = token_files.read_meta(folder / 'text')
    shape = dict(block_size=16, vocab_size=meta['vocab_size'], n_layer=2, n_head=2, n_embd=16)
    model = GPT(
        GPTConfig(**shape, bias=False, pos='rope', norm='rmsnorm', act='swiglu', n_inner=44)
    )
    checkpoint = dict(
        kind='mha',
        model_args=native.model_args(model),
        model=model.state_dict(),
        step=7,
        best_val_loss=1.5,
        meta=meta,
        config=dict(dataset='text'),
    )
    native.save(folder / 'src' / 'ckpt.pt', checkpoint)


def put_comparison(folder: Path) -> None:
    mla = dict(attention='mla', kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4)
    (folder / 'comparison.py').write_text(f'contenders = dict(mha={{}}, mla={mla})\n')


def put_instructions(folder: Path) -> None:
    rows = [dict(question=f'{i} + 1?', response=f'It is {i + 1}.') for i in range(6)]
    for split in ('train', 'val'):
        (folder / f'{split}.jsonl').write_text(jsonl(rows))
    (folder / 'c.json').write_text(json.dumps(ADAPTERS))


def put_documents(folder: Path) -> None:
    documents = [f'{i}: the thing in document {i}\n' * (i % 5) for i in range(60)]
    (folder / 'documents.jsonl').write_text(jsonl([dict(text=text) for text in documents]))


def put_data_scripts(folder: Path) -> None:
    """Copy the scripts that write beside themselves, with a text to read."""
    for path in [*ROOT.glob('data/*.py'), *ROOT.glob('data/*/prepare.py')]:
        copy = folder / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    (folder / 'data' / 'shakespeare_char' / 'input.txt').write_text(TEXT)


def put_earlier_run(folder: Path) -> None:
    shutil.copytree(folder / 'done', folder / 'out')
    (folder / 'out' / 'notes.txt').write_text('mine')


# -------------------------------------------------------------------------------------------------
# the commands

AUTO = dict(init_from='auto')
TRAINING = Scenario('train.py', words(TRAIN | AUTO), ('out',), of_training, 0.2)
COMPARED = TINY | dict(
    out_dir='cmp',
    pos='rope',
    seeds=[1],
    max_iters=4,
    eval_interval=2,
    decode_tokens=0,
    in_process=True,
    match=False,
)
del COMPARED['sample_tokens']
COMPARISON = Scenario(
    'compare.py',
    ['comparison.py', *words(COMPARED)],
    ('cmp',),
    of_comparison,
    0.1,
    prepare=put_comparison,
    changes=fork_its_programs,
)
TABLE = Scenario(
    'compare.py',
    ['--plot_only=True', '--results=results.jsonl', '--figure=pic/c.png'],
    ('pic',),
    of_table,
    0.06,
)
EVALUATION = Scenario(
    'eval.py',
    ['--models=done', '--cache=none,dense', '--out_dir=ev', '--device=cpu', '--context=16'],
    ('ev',),
    of_evaluation,
    0.07,
)
QUICK = ['--calibration_tokens=400', '--eval_tokens=200', '--layerwise=False', '--device=cpu']
CONVERSION = Scenario(
    'convert_mla.py',
    ['done', '--out=mla', '--kv_lora_rank=8', '--calibration=text', '--device=cpu'],
    ('mla',),
    of_conversion,
    0.03,
    complete=lambda folder: (folder / 'mla').exists(),
)
EXPORT = Scenario(
    'convert_mla.py',
    ['src', '--out=mla', '--saving=0.5', '--export=hf', *QUICK],
    ('mla', 'hf'),
    of_export,
    0.04,
    prepare=put_source,
    complete=lambda folder: (folder / 'hf').exists(),
)
HEALING = Scenario(
    'convert_mla.py',
    ['src', '--out=mla', '--saving=0.5', f'--heal={4 * 16 * 16}', '--export=hf', *QUICK],
    ('mla', 'mla-healed', 'hf'),
    of_healing,
    0.05,
    prepare=put_source,
    complete=lambda folder: (folder / 'hf').exists(),
    changes=fork_its_programs,
)
ADAPTERS = dict(
    adapters='full,lora',
    kernels='sdpa',
    peer=False,
    block_size=96,
    batch_size=2,
    n_train=3,
    n_val=2,
    steps=2,
    warmup_steps=1,
    seeds=1,
    max_new_tokens=3,
    device='cpu',
    lora_r=4,
    data='.',
    profile=False,
)
FINE_TUNING = Scenario(
    'bench_adapters.py',
    ['random:tiny', 'c.json', 'ad'],
    ('ad',),
    of_adapters,
    0.06,
    prepare=put_instructions,
    survives=True,
)
HEADS = Scenario(
    'find_induction_heads.py',
    [*words(dict(init_from='done', sweep='done', out='heads', texts=8, length=8, device='cpu'))],
    ('heads',),
    of_heads,
    0.06,
)
TEXT_FILE = Scenario(
    'data/text/prepare.py',
    ['tale.txt', '--out=new', '--tokenizer=bytes'],
    ('new',),
    tokens_in('new'),
    0.06,
)
WEB_TEXT = Scenario(
    'data/openwebtext/prepare.py',
    [
        *('--input=documents.jsonl', '--out=new', '--batch=7', '--val_fraction=0.05'),
        *('--save_every=0', '--num_proc=2'),
    ],
    ('new', 'cache'),
    tokens_in('new'),
    0.06,
    prepare=put_documents,
    changes=no_network,
)
ORCA = Scenario(
    'data/openorca/prepare.py',
    ['--input=rules', '--out=new', '--train=20', '--val=5'],
    ('new',),
    of_instructions,
    0.04,
)
REPEATS = Scenario(
    'data/repeats/prepare.py', ['--documents=50', '--out=new'], ('new',), tokens_in('new'), 0.03
)
REPEATS_FIXED = Scenario(
    'data/repeats_fixed/prepare.py',
    ['--documents=50', '--out=new'],
    ('new',),
    tokens_in('new'),
    0.02,
)
SHAKESPEARE = Scenario(
    'data/shakespeare/prepare.py',
    [],
    ('data',),
    tokens_in('data/shakespeare'),
    0.03,
    prepare=put_data_scripts,
    changes=no_network,
)
SHAKESPEARE_CHAR = Scenario(
    'data/shakespeare_char/prepare.py',
    [],
    ('data',),
    tokens_in('data/shakespeare_char'),
    0.02,
    prepare=put_data_scripts,
)
SCENARIOS = dict(
    training=TRAINING,
    comparison=COMPARISON,
    table=TABLE,
    evaluation=EVALUATION,
    conversion=CONVERSION,
    export=EXPORT,
    healing=HEALING,
    adapters=FINE_TUNING,
    heads=HEADS,
    text=TEXT_FILE,
    openwebtext=WEB_TEXT,
    openorca=ORCA,
    repeats=REPEATS,
    repeats_fixed=REPEATS_FIXED,
    shakespeare=SHAKESPEARE,
    shakespeare_char=SHAKESPEARE_CHAR,
)


class Beginning:
    """A run that begins from nothing in a folder where an earlier one lies, with notes."""

    scratch = Scenario('train.py', words(TRAIN), ('out',), of_training_over)
    auto = Scenario('train.py', words(TRAIN | AUTO), ('out',), of_training_over)

    def start(self, folder: Path, kill_at: int = 0) -> int:
        """Put the earlier run there and begin; return the number of calls."""
        put_earlier_run(folder)
        ended = self.scratch.run(folder, kill_at)
        assert ended.code == (KILLED if kill_at else 0), ended.output
        return ended.calls

    def kill_and_finish(self, place: Path, folder: Path, kill_at: int) -> object:
        if folder.exists():
            shutil.rmtree(folder)
        shutil.copytree(place, folder)
        self.start(folder, kill_at)
        # Once the earlier run is in previous/, the same command would move the new one there, too.
        moved = list((folder / 'out' / 'previous').glob('*-*[0-9a-f]'))
        ended = (self.auto if moved else self.scratch).run(folder)
        assert ended.code == 0, ended.output
        return of_training_over(folder)


BEGINNING = Beginning()


# -------------------------------------------------------------------------------------------------
# odd settings

# What may rightly take long, or much memory, when it is large.
LONG = set(
    'max_iters sample_tokens max_new_tokens num_samples trials texts length lr_decay_iters '
    'documents epochs steps seeds train val pool accumulation decode_tokens decode_repeats '
    'tasks'.split()  # the harness takes 15 s to list its own
)
COMMANDS = {  # script -> arguments with which it runs in a second
    'train.py': words(TINY | dict(out_dir='new', max_iters=2)),
    'sample.py': ['--out_dir=done', '--max_new_tokens=5', '--num_samples=1', '--device=cpu'],
    'eval.py': ['--models=done', '--out_dir=new', '--device=cpu', '--max_tokens=40'],
    'convert_mla.py': ['done', '--out=new', '--kv_lora_rank=8', '--device=cpu', '--eval_tokens=99'],
    'find_induction_heads.py': ['--init_from=done', '--out=new', '--device=cpu'],
    'compare.py': ['--plot_only=True', '--results=results.jsonl', '--figure=new/c.png'],
    'bench_adapters.py': ['random:tiny', 'c.json', 'new', '--adapters=lora'],
    'data/text/prepare.py': ['tale.txt', '--out=new'],
    'data/repeats/prepare.py': ['--out=new', '--documents=50'],
    'data/repeats_fixed/prepare.py': ['--out=new', '--documents=50'],
    'data/openorca/prepare.py': ['--out=new', '--input=rules', '--train=20', '--val=5'],
    'data/openwebtext/prepare.py': ['--out=new', '--input=documents.jsonl', '--val_fraction=0.05'],
}
ODD = (
    *('-1', '0', '1', '2', '3', '7', '0.5', '-0.5', 'nan', 'inf', '1e300'),
    *('1000000000000', str(2**63), 'True', 'False', '', 'none', 'no/such', 'done', 'text'),
    *('tale.txt', '/dev/null', 'x' * 300, '\u4e2d\u6587', '=1+1', '[1]', 'a,b', ',', '..'),
)


def script_cases(number: int, rng: random.Random) -> list[tuple[str, list[str]]]:
    """Return scripts with their arguments, of which one or two settings are odd."""
    cases = []
    for _ in range(number):
        script = rng.choice(list(COMMANDS))
        odd = []
        for name in rng.sample(names_of(script), rng.choice([1, 1, 2])):
            if name not in LONG and not name.startswith('wandb'):
                odd.append(f'--{name}={rng.choice(ODD)}')
        cases.append((script, [*COMMANDS[script], *odd]))
    return cases


def check_script(case: tuple[str, list[str]], place: Path, folder: Path) -> int:
    """Run a script in a copy of `place`: it works, or ends in one line. Return its exit code."""
    if folder.exists():
        shutil.rmtree(folder)
    shutil.copytree(place, folder)
    script, arguments = case
    outputs = {'new', 'done'} | {word.partition('=')[2].split('/')[0] for word in arguments}
    outputs |= {f'{name}-healed' for name in outputs}  # of convert_mla.py --heal
    put_documents(folder)
    put_instructions(folder)
    changes = no_network if 'openwebtext' in script else no_curve
    kept = {'tale.txt', 'results.jsonl', 'documents.jsonl', 'c.json'}
    if not script.startswith('data/'):  # those replace the dataset that --out names
        kept.add('text')
    with nothing_else_changes(folder, 'cache', *(outputs - kept)):
        return run_forked(script, arguments, folder, prepare=changes).check().code


def warm_up() -> None:
    """Load what the scripts import, so that each fork has it already."""
    import bitsandbytes  # noqa: F401
    import datasets  # noqa: F401
    import matplotlib.pyplot  # noqa: F401
    import peft  # noqa: F401
    import rouge_score.rouge_scorer  # noqa: F401
    import torch._dynamo  # noqa: F401
    import torch._inductor.compile_fx  # noqa: F401

    import nanomla.adapters.cell  # noqa: F401
    import nanomla.comparison.figures  # noqa: F401
    import nanomla.conversion.convert  # noqa: F401
    import nanomla.evals.run  # noqa: F401
    import nanomla.heads.report  # noqa: F401
    import nanomla.training.trainer  # noqa: F401
