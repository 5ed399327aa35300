"""
sample.py from end to end: on tiny random checkpoints, run in this process as a person runs it.
"""

import io
import json
import re
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import PATIENCE

from nanomla.checkpoints import native as checkpoint
from nanomla.core import token_files as dataset
from nanomla.core import tokenizers
from nanomla.core.configurator import UserError
from nanomla.inference.generate import generate

ROOT = Path(__file__).parent.parent
CHARS = '\n abcdefghijklmnopqrstuvwxyz,.é'
META = dict(
    char=dict(
        tokenizer='char',
        chars=CHARS,
        vocab_size=len(CHARS),
        source='Some tale, 1812',
        dtype='uint16',
    ),
    bytes=dict(tokenizer='bytes', vocab_size=256, source='Some bytes', dtype='uint16'),
)
HELD = re.compile(
    r'MHA, 0\.\d\dM parameters, step 7, val loss 1\.5000; Some tale, 1812\n'
    r'(no cache.*|dense float32 cache, \d+ bytes a token)\n'
)
END = 50256


class BPE:
    """
    GPT-2's vocabulary as far as a test without its file can have it: the bytes, and <|endoftext|>.
    """

    n_vocab, eot_token = 50257, END

    def encode(self, text, allowed_special=()):
        assert allowed_special == {'<|endoftext|>'}
        parts = [list(part.encode()) for part in text.split('<|endoftext|>')]
        return parts[0] + [i for part in parts[1:] for i in (END, *part)]

    def decode_bytes(self, ids):
        return b''.join(b'<|endoftext|>' if i == END else bytes([i % 256]) for i in ids)


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    """
    Each test in a folder of its own, without a network, on one thread, and no trace of configure()
    afterwards.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(dataset, 'DATA', tmp_path / 'data')
    monkeypatch.setattr(tokenizers, 'gpt2_bpe', BPE)
    monkeypatch.setattr(sys, 'excepthook', sys.excepthook)
    monkeypatch.setenv('OMP_NUM_THREADS', '1')
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def saved(tiny):
    """
    saved(path, kind, tokenizer, **settings) -> a checkpoint with the meta of `tokenizer` at `path`.
    """

    def save(path='out/ckpt.pt', kind='mha', tokenizer='char', meta=None, **settings):
        meta = meta or META[tokenizer]
        model = tiny(kind, **dict(vocab_size=meta['vocab_size']) | settings)
        content = dict(
            kind=kind,
            model_args=checkpoint.model_args(model),
            model=model.state_dict(),
            step=7,
            best_val_loss=1.5,
            meta=meta,
            config=dict(dataset='tale'),
        )
        checkpoint.save(path, content)
        return model

    return save


@pytest.fixture
def sample(monkeypatch, capsys):
    """
    sample(*arguments) -> what sample.py writes to stdout and stderr, on the CPU; short unless
    short=False.
    """

    def run(*arguments, short=True):
        arguments = [
            '--device=cpu',
            *['--num_samples=1', '--max_new_tokens=20'][: 2 * short],
            *arguments,
        ]
        monkeypatch.setattr(sys, 'argv', ['sample.py', *map(str, arguments)])
        capsys.readouterr()
        runpy.run_path(str(ROOT / 'sample.py'), run_name='__main__')
        return capsys.readouterr()

    return run


def model_writes(monkeypatch, *ids, watch=lambda written: None, prompts=None):
    """
    Make every model write these ids; `watch` is called before each with the number so far.
    """

    def generate(model, idx, max_new_tokens, **options):
        if prompts is not None:
            prompts.append(idx.tolist())
        for written, i in enumerate(ids[:max_new_tokens]):
            watch(written)
            yield torch.tensor([i])
        watch(len(ids))

    monkeypatch.setattr('nanomla.inference.generate.generate', generate)


# -------------------------------------------------------------------------------------------------
# text


@pytest.mark.parametrize(
    'label, settings', [('MHA', {}), ('GQA', dict(n_kv_head=2)), ('MLA', dict(kind='mla'))]
)
def test_it_writes_the_prompt_and_goes_on(label, settings, saved, sample):
    model = saved(**settings)
    out, err = sample('--start=once', '--temperature=0')
    idx = torch.tensor([[CHARS.index(c) for c in 'once']])
    written = ''.join(CHARS[token.item()] for token in generate(model, idx, 20, temperature=0))
    assert out == f'once{written}\n'
    assert HELD.fullmatch(err.replace(label, 'MHA', 1)) and err.startswith(label)


def test_defaults_and_the_ways_to_name_a_checkpoint(saved, sample, tmp_path):
    saved('runs/a.pt')
    saved('other/ckpt.pt')
    saved()
    out, err = sample(short=False)
    samples = out.split('\n---------------\n')
    assert len(samples) == 3 and [len(text) for text in samples] == [
        501,
        501,
        502,
    ]  # the prompt, and a newline at the end
    default = sample('--num_samples=1')[0]
    for words in (
        ['--init_from=runs/a.pt'],
        ['--init_from=other'],
        ['--out_dir=other'],
        [f'--init_from={tmp_path}/other/ckpt.pt'],
    ):
        assert sample('--num_samples=1', *words)[0] == default


def test_samples_differ_repeat_and_do_not_depend_on_their_number(saved, sample):
    saved()
    three, again = sample('--num_samples=3')[0], sample('--num_samples=3')[0]
    assert three == again
    samples = three.removesuffix('\n').split('\n---------------\n')
    assert len(set(samples)) == 3
    assert (
        sample('--num_samples=2')[0].removesuffix('\n').split('\n---------------\n') == samples[:2]
    )
    assert (
        sample('--num_samples=2', '--max_new_tokens=9')[0].split('\n---------------\n')[1]
        == samples[1][:10] + '\n'
    )
    others = [
        sample(f'--seed={seed}')[0].removesuffix('\n') for seed in (1336, 1338, 0, -5, 2**63 - 1)
    ]
    assert len({*others, *samples}) == 8


def test_temperature_top_k_and_top_p_arrive(saved, sample):
    saved()
    greedy = sample('--temperature=0')[0]
    assert (
        greedy
        == sample('--top_k=1')[0]
        == sample('--top_p=1e-9')[0]
        == sample('--temperature=0', '--seed=5')[0]
    )
    assert greedy != sample('--top_k=0', '--temperature=5')[0]


def test_padding_is_never_drawn(saved, sample, monkeypatch):
    model = saved(vocab_size=64, tie_weights=False)
    with torch.no_grad():
        model.lm_head.weight[len(CHARS) :] = model.lm_head.weight[0] * 9
    content = checkpoint.load('out')
    checkpoint.save('out/ckpt.pt', content | dict(model=model.state_dict()))
    assert len(sample('--temperature=3', '--top_k=0', '--max_new_tokens=60')[0]) == 62


def test_bfloat16_and_eager(saved, sample):
    saved()
    assert sample('--temperature=0', '--kernel=eager')[0] == sample('--temperature=0')[0]
    assert len(sample('--dtype=bfloat16')[0]) == 22


def test_a_config_file_and_its_on_cpu(saved, sample):
    saved('elsewhere/ckpt.pt')
    Path('own.py').write_text(
        "out_dir = 'elsewhere'\nmax_new_tokens = 9\non_cpu = dict(max_new_tokens=4)\n"
    )
    assert len(sample('--num_samples=1', 'own.py', short=False)[0]) == 6


# -------------------------------------------------------------------------------------------------
# as it comes


class Screen(io.TextIOWrapper):
    """A stdout that remembers what was shown (flushed)."""

    def __init__(self, terminal, encoding='utf-8'):
        super().__init__(io.BytesIO(), encoding=encoding, newline='')
        self.terminal, self.shown = terminal, []

    def isatty(self):
        return self.terminal

    def flush(self):
        super().flush()
        if not self.closed and hasattr(self, 'shown'):
            self.shown.append(self.buffer.getvalue().decode(self.encoding))


@pytest.mark.parametrize('terminal', [True, False])
def test_each_token_is_shown_before_the_next_is_made(terminal, saved, sample, monkeypatch):
    saved()
    screen, words = Screen(terminal), 'upon a time'

    def watch(written):
        assert screen.shown[-1] == 'once ' + words[:written]

    model_writes(monkeypatch, *map(CHARS.index, words), watch=watch)
    monkeypatch.setattr(sys, 'stdout', screen)
    sample('--start=once ')
    assert screen.shown[-1] == 'once upon a time\n'


def test_a_character_of_several_tokens_is_never_cut(saved, sample, monkeypatch):
    saved(tokenizer='bytes')
    screen, words = Screen(True), 'naïve €5 😀!'
    model_writes(monkeypatch, *words.encode())
    monkeypatch.setattr(sys, 'stdout', screen)
    sample('--start=é', '--max_new_tokens=99')
    assert screen.shown[-1] == f'é{words}\n'
    assert all(f'é{words}\n'.startswith(shown) for shown in screen.shown)


def test_what_is_no_character_is_reported_once(saved, sample, monkeypatch):
    saved(tokenizer='bytes')
    model_writes(monkeypatch, *b'a\xffb', *'€'.encode()[:2])
    assert (
        sample('--start=x', '--num_samples=2')[0]
        == 'xa\ufffdb\ufffd\n---------------\nxa\ufffdb\ufffd\n'
    )


def test_control_codes_do_not_reach_a_terminal(saved, sample, monkeypatch):
    saved(tokenizer='bytes')
    model_writes(monkeypatch, *b'\x1b[2J\t\x0e\r\n', *'\x9b'.encode())
    for terminal, shown in (
        (True, 'x\ufffd[2J\t\ufffd\r\n\ufffd\n'),
        (False, 'x\x1b[2J\t\x0e\r\n\x9b\n'),
    ):
        screen = Screen(terminal)
        monkeypatch.setattr(sys, 'stdout', screen)
        sample('--start=x')
        assert screen.shown[-1] == shown


def test_a_terminal_that_lacks_a_character(saved, sample, monkeypatch):
    saved()
    screen = Screen(True, 'ascii')
    monkeypatch.setattr(sys, 'stdout', screen)
    model_writes(monkeypatch, CHARS.index('é'), 5)
    sample('--start=é')
    assert screen.shown[-1] == f'??{CHARS[5]}\n'


def test_control_c_leaves_a_line_of_its_own(saved, sample, monkeypatch, capsys):
    def interrupt(written):
        if written == 3:
            raise KeyboardInterrupt

    saved()
    model_writes(monkeypatch, 5, 5, 5, 5, watch=interrupt)
    with pytest.raises(KeyboardInterrupt):
        sample('--start=x')
    out, err = capsys.readouterr()
    assert out == f'x{CHARS[5] * 3}' and err.endswith(' a token\n\n')


# -------------------------------------------------------------------------------------------------
# prompts


def test_prompts_from_files_and_standard_input(saved, sample, monkeypatch):
    saved()
    direct = sample('--start=so it\nwas é')[0]
    Path('p.txt').write_text(
        '\ufeffso it\nwas é', encoding='utf-8'
    )  # with the mark that some editors set
    assert sample('--start=FILE:p.txt')[0] == direct
    monkeypatch.setattr(sys, 'stdin', io.TextIOWrapper(io.BytesIO('so it\nwas é'.encode())))
    assert sample('--start=-')[0] == direct


@pytest.mark.parametrize('kind', ['mha', 'mla'])
def test_a_long_prompt_is_cut_and_that_is_reported(kind, saved, sample):
    saved(kind=kind)
    long = 'abcdefgh' * 4
    out, err = sample(f'--start={long}', '--temperature=0')
    assert err.splitlines()[2:] == [
        'the prompt has 32 tokens: only the last 24 are read (block_size)'
    ]
    short, err = sample(f'--start={long[-24:]}', '--temperature=0')
    assert out == long[:8] + short and err.count('\n') == 2


def test_an_empty_prompt(saved, sample):
    saved()
    assert sample('--start=')[0] == sample('--start=\n')[0]
    Path('empty').touch()
    assert sample('--start=FILE:empty')[0] == sample()[0]


# -------------------------------------------------------------------------------------------------
# GPT-2, and nanoGPT's checkpoints


@pytest.fixture(scope='module')
def gpt2_folder(tmp_path_factory):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp('hub') / 'small'
    GPT2LMHeadModel(
        GPT2Config(n_positions=16, n_embd=4, n_layer=1, n_head=2, initializer_range=0.5)
    ).save_pretrained(folder)
    return folder


def test_a_gpt2_folder(gpt2_folder, sample):
    out, err = sample(f'--init_from={gpt2_folder}', '--start=Hello')
    assert out.startswith('Hello') and re.fullmatch(
        rf'MHA, 0\.20M parameters, {gpt2_folder}\n.*\n', err
    )
    assert out == sample(f'--init_from={gpt2_folder}', '--start=Hello')[0]


def test_endoftext_ends_a_sample_and_begins_a_prompt(gpt2_folder, sample, monkeypatch):
    prompts = []
    model_writes(monkeypatch, *b'The end', END, *b'Another text', prompts=prompts)
    for start in ('', '<|endoftext|>'):
        out, _ = sample(f'--init_from={gpt2_folder}', f'--start={start}', '--num_samples=2')
        assert out == 'The end\n---------------\nThe end\n'
    assert prompts == [[[END]]] * 4
    assert (
        sample(f'--init_from={gpt2_folder}', '--start=a<|endoftext|>b')[0]
        == 'a<|endoftext|>bThe end\n'
    )
    assert prompts[-1] == [[ord('a'), END, ord('b')]]


def nanogpt(path, vocab_size, tiny, **config):
    """A ckpt.pt with what nanoGPT saves, and nothing else."""
    model = tiny(vocab_size=vocab_size, n_layer=1, n_head=1, n_embd=4)
    args = {
        name: getattr(model.config, name)
        for name in ('n_layer', 'n_head', 'n_embd', 'block_size', 'bias', 'vocab_size', 'dropout')
    }
    checkpoint.save(
        path,
        dict(
            model={f'_orig_mod.{k}': v for k, v in model.state_dict().items()},
            optimizer={},
            model_args=args,
            iter_num=250,
            best_val_loss=torch.tensor(1.25),
            config=config,
        ),
    )


def test_nanogpts_checkpoint_finds_the_characters_of_its_dataset(tiny, sample):
    nanogpt('out/ckpt.pt', len(CHARS), tiny, dataset='tale')
    with pytest.raises(
        UserError,
        match='out/ckpt.pt does not say what its 31 tokens are: '
        "run the prepare.py of the dataset 'tale'",
    ):
        sample()
    Path('data/tale').mkdir(parents=True)
    Path('data/tale/meta.json').write_text(json.dumps(META['char']))
    Path('data/tale/prepare.py').touch()
    out, err = sample('--start=once')
    assert (
        out.startswith('once')
        and len(out) == 25
        and 'step 250, val loss 1.2500; Some tale, 1812\ndense' in err
    )
    Path('data/tale/meta.json').write_text(
        json.dumps(META['char'] | dict(chars=CHARS[:-1], vocab_size=30))
    )  # of another text
    with pytest.raises(UserError, match='does not say what its 31 tokens are'):
        sample()


@pytest.mark.parametrize('size', [50257, 50304])
def test_nanogpts_checkpoint_with_gpt2_tokens(size, tiny, sample):
    nanogpt('out/ckpt.pt', size, tiny, dataset='openwebtext')
    out, err = sample('--start=Hi')
    assert out.startswith('Hi') and 'step 250, val loss 1.2500; openwebtext\ndense' in err


# -------------------------------------------------------------------------------------------------
# what a person can get wrong


@pytest.mark.parametrize(
    'arguments, message',
    [
        (
            ['--out_dir=none'],
            'there is no none/ckpt.pt: train a model with '
            '`python train.py config/train_shakespeare_char.py --out_dir=none`',
        ),
        (['--init_from=gpt3'], "there is no checkpoint 'gpt3'"),
        (['--init_from=broken.pt'], 'broken.pt is no checkpoint'),
        (
            ['--init_from=unknown.pt'],
            'unknown.pt does not say what its 40 tokens are: GPT-2 has 50257',
        ),
        (['--start=naïve'], "--start: the text has characters this model has never seen: 'ï'"),
        (['--start=FILE:none.txt'], '--start=FILE:none.txt cannot be read: No such file'),
        (['--start=FILE:.'], '--start=FILE:. cannot be read: Is a directory'),
        (['--start=FILE:latin.txt'], '--start=FILE:latin.txt cannot be read: it is not UTF-8 text'),
        (
            ['--start=', '--init_from=nolines.pt'],
            r"--start: the text has characters this model has never seen: '\n'",
        ),
        (['--temperature=-0.1'], 'temperature=-0.1 must be at least 0'),
        (['--top_p=0'], 'top_p=0.0 must be more than 0 and at most 1'),
        (['--top_p=1.01'], 'top_p=1.01 must be more than 0 and at most 1'),
        (['--top_k=-1'], 'top_k=-1 must be at least 0'),
        (['--num_samples=0'], 'num_samples=0 must be at least 1'),
        (['--max_new_tokens=0'], 'max_new_tokens=0 must be at least 1'),
        (['--device=cuda'], '--device=cuda, but torch sees no CUDA GPU here'),
        (['--device=tpu'], '--device=tpu is no'),
        (['--dtype=float8'], '--dtype=float8 is not known'),
        (['--kernel=flex'], '--kernel=flex is compiled for one length'),
        (['--kernel=cudnn'], '--kernel=cudnn cannot run on cpu'),
        (['--kernel=fast'], "kernel='fast' is not known"),
        (
            ['--temprature=1'],
            "--temprature=1: unknown setting 'temprature'; did you mean --temperature?",
        ),
    ],
)
def test_what_is_wrong_ends_in_one_line(arguments, message, saved, tiny, sample, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    saved()
    saved('nolines.pt', meta=META['char'] | dict(chars='abc', vocab_size=3))
    nanogpt('unknown.pt', 40, tiny)
    Path('broken.pt').write_bytes(b'PK and no more')
    Path('latin.txt').write_bytes('naïve'.encode('latin-1'))
    with pytest.raises(UserError) as error:
        sample(*arguments)
    text = str(error.value)
    assert message in text and '\n' not in text


def test_standard_input_that_is_no_text(saved, sample, monkeypatch):
    saved()
    monkeypatch.setattr(sys, 'stdin', io.TextIOWrapper(io.BytesIO(b'\xff\xfe')))
    with pytest.raises(UserError, match='--start=- cannot be read: it is not UTF-8 text'):
        sample('--start=-')


# -------------------------------------------------------------------------------------------------
# as a process


def start(*arguments):
    return subprocess.Popen(
        [sys.executable, str(ROOT / 'sample.py'), '--device=cpu', *arguments],
        text=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def test_its_processes_end_well(saved, forked_python):
    saved()
    endless = ['--max_new_tokens=1000000']
    wrong, piped = start('--start=Ω'), start(*endless)
    assert piped.stdout.read(100)[0] == '\n'  # it is written while it comes, to a pipe as well
    piped.stdout.close()
    assert piped.wait(PATIENCE) == 0 and HELD.fullmatch(piped.stderr.read())
    interrupted = start(*endless)  # not before: it writes for as long as it is left alone
    assert interrupted.stdout.read(100)[0] == '\n'
    interrupted.send_signal(signal.SIGINT)
    _, err = interrupted.communicate(timeout=PATIENCE)
    assert interrupted.returncode == 130 and HELD.sub('', err) == '\ninterrupted\n'
    out, err = wrong.communicate(timeout=PATIENCE)
    assert (wrong.returncode, out) == (2, '') and re.fullmatch(
        r"error: --start: the text has characters .*'Ω'.*\n", err
    )
