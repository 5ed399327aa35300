"""
GGUF files: what stands in them is the model, by the equations of deepseek2 and by llama.cpp itself,
and what llama.cpp cannot express is refused.
"""

import json
import sys

import pytest
import torch
from converting import LLAMA, SOURCES, assert_refused, converted
from llamacpp import LlamaCpp

from model_mla import MLAConfig
from nanomla.checkpoints.gguf.vocabulary import PRE_TOKENIZERS
from nanomla.checkpoints.gguf.write import export_gguf, frequencies_of, rope_base
from nanomla.checkpoints.tokenizer import PROBES, HFTokenizer
from nanomla.conversion.calibration import measure
from nanomla.inference.generate import generate

V = 300
SPECIAL = ['<bos>', '<eos>', '<turn>']
TEMPLATE = "{% for message in messages %}<turn>{{ message['content'] }}{% endfor %}"
TEXT = (
    'def f(x):\n    return x + 1\n\n\nclass A:\n\tpass\n' * 3
    + "naïve 漢字 words isn't 1234 they'll"
)
ODD_TEXTS = [
    *PROBES,
    TEXT,
    "THEY'LL it's 'Twas 12345.678 ½ ² x²\r\n\r\n  \t\tend   ",
    'a<turn>b <bos>  <eos>\n',
    '\u00a0\u3000x\u200b e\u0301 \U0001f468\u200d\U0001f469',
]
NATIVE = LLAMA | dict(norm_eps=1e-6, vocab_size=V)
UNIFORM = dict(rope='uniform', rope_pairs=2, kv_lora_rank=11)
# name -> a native model's settings
MODELS = dict(
    untied=dict(tie_weights=False),
    query_latent=dict(q_lora_rank=9, v_head_dim=7, qk_nope_head_dim=6, rope_theta=300.0),
)
# name -> source, changes to it, and how it is converted
CONVERTED = dict(
    mha=('mha', {}, UNIFORM),
    gqa=('gqa', dict(tie_weights=False), UNIFORM | dict(q_lora_rank=12)),
    scaled=('gqa', dict(softmax_scale=0.21), UNIFORM | dict(ranks='spectrum')),
    high=('mqa', {}, dict(rope='high', rope_pairs=3, kv_lora_rank=9)),
)


@pytest.fixture(scope='module')
def tokenizer(tmp_path_factory):
    """A byte-level BPE with three ends, one of them added beside the vocabulary."""
    return make_tokenizer(tmp_path_factory.mktemp('bpe'), 'gpt-2')


def make_tokenizer(folder, name):
    """Return a tokenizer that cuts texts as llama.cpp's pre-tokenizer `name` does."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    (patterns, ignore_merges) = next(key for key, known in PRE_TOKENIZERS.items() if known == name)
    steps = [pre_tokenizers.Split(Regex(pattern), 'isolated') for pattern in patterns]
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    if name == 'gpt-2':
        steps = [pre_tokenizers.ByteLevel(add_prefix_space=False)]
    if name == 'smollm':
        digits = pre_tokenizers.Digits(individual_digits=True)
        steps = [digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    made = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    made.pre_tokenizer = pre_tokenizers.Sequence(steps)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=295, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator([TEXT], trainer)
    made.add_tokens(['<added>'])
    made.save(str(folder / 'tokenizer.json'))
    settings = dict(bos_token='<bos>', add_bos_token=True, chat_template=TEMPLATE)
    (folder / 'tokenizer_config.json').write_text(json.dumps(settings))
    files = [folder / 'tokenizer.json', folder / 'tokenizer_config.json']
    return HFTokenizer(files, dict(eos_token_id=[1, 2, 295]))


@pytest.fixture
def model(tiny, tokens):
    """model(name) -> a native or a converted model of V tokens."""

    def make(name):
        if name in MODELS:
            return tiny('mla', **NATIVE | MODELS[name])
        source, changes, how = CONVERTED[name]
        shape = SOURCES[source] | dict(head_dim=8, rope_scaling=1.0, vocab_size=V)
        source = tiny('mha', **shape | changes)
        return converted(source, measure(source, tokens(24, V, B=30)), **how)[0]

    return make


# -------------------------------------------------------------------------------------------------
# the file, read back


class Deepseek2:
    """llama.cpp's deepseek2 in float64, from a GGUF file alone."""

    def __init__(self, path):
        import gguf

        reader = gguf.GGUFReader(path)
        self.fields = {name: field.contents() for name, field in reader.fields.items()}
        self.tensors = {}
        for tensor in reader.tensors:
            array = gguf.dequantize(tensor.data, tensor.tensor_type)
            shape = tensor.shape[::-1].tolist()
            self.tensors[tensor.name] = torch.from_numpy(array.copy()).double().reshape(shape)

    def setting(self, name):
        return self.fields[f'deepseek2.{name}']

    def norm(self, x, name):
        epsilon = self.setting('attention.layer_norm_rms_epsilon')
        mean = x.square().mean(-1, keepdim=True)
        return x / (mean + epsilon).sqrt() * self.tensors[f'{name}.weight']

    def linear(self, x, name):
        return x @ self.tensors[f'{name}.weight'].T

    def rotated(self, x):
        """Turn the pairs of neighbours in x (..., T, P)."""
        P = x.size(-1)
        base = self.setting('rope.freq_base')
        turns = base ** (-torch.arange(0, P, 2).double() / P)
        angles = torch.arange(x.size(-2))[:, None] * turns
        pairs = torch.view_as_complex(x.contiguous().unflatten(-1, (-1, 2)))
        turned = pairs * torch.exp(1j * angles)
        return torch.view_as_real(turned).flatten(-2)

    def attention(self, x, block):
        """Return the heads' values (T, H D), absorbed: one key and one value for all heads."""
        H, P = self.setting('attention.head_count'), self.setting('rope.dimension_count')
        qk_dim, R = self.setting('attention.key_length_mla'), self.setting('attention.kv_lora_rank')
        if f'{block}.attn_q.weight' in self.tensors:
            q = self.linear(x, f'{block}.attn_q')
        else:
            q = self.norm(self.linear(x, f'{block}.attn_q_a'), f'{block}.attn_q_a_norm')
            q = self.linear(q, f'{block}.attn_q_b')
        q = q.unflatten(-1, (H, qk_dim)).transpose(0, 1)
        q_nope, q_pe = q.split([qk_dim - P, P], dim=-1)
        c_kv, k_pe = self.linear(x, f'{block}.attn_kv_a_mqa').split([R, P], dim=-1)
        c_kv = self.norm(c_kv, f'{block}.attn_kv_a_norm')
        q = torch.cat(
            [q_nope @ self.tensors[f'{block}.attn_k_b.weight'].mT, self.rotated(q_pe)], -1
        )
        logits = q @ torch.cat([c_kv, self.rotated(k_pe)], -1).T * qk_dim**-0.5
        future = torch.ones_like(logits[0]).triu(1).bool()
        y = logits.masked_fill(future, -torch.inf).softmax(-1) @ c_kv
        y = y @ self.tensors[f'{block}.attn_v_b.weight'].mT
        return y.transpose(0, 1).flatten(1)

    def logits(self, ids):
        embedding = self.tensors['token_embd.weight']
        x = embedding[ids]
        for n in range(self.setting('block_count')):
            block = f'blk.{n}'
            y = self.attention(self.norm(x, f'{block}.attn_norm'), block)
            x = x + self.linear(y, f'{block}.attn_output')
            y = self.norm(x, f'{block}.ffn_norm')
            gate = torch.nn.functional.silu(self.linear(y, f'{block}.ffn_gate'))
            x = x + self.linear(gate * self.linear(y, f'{block}.ffn_up'), f'{block}.ffn_down')
        head = self.tensors.get('output.weight', embedding)
        return self.norm(x, 'output_norm') @ head.T


@pytest.mark.parametrize('name', [*MODELS, *CONVERTED])
def test_the_file_is_the_model(name, model, tokens, tmp_path):
    ours, path = model(name), tmp_path / 'model.gguf'
    export_gguf(ours, path)
    assert [file.name for file in tmp_path.iterdir()] == ['model.gguf']
    idx = tokens(24, V)[:1]
    theirs = Deepseek2(path)
    torch.testing.assert_close(theirs.logits(idx[0]).float(), ours(idx)[0], rtol=0, atol=1e-4)
    config = ours.config
    cached = theirs.setting('attention.key_length') * theirs.setting('attention.head_count_kv')
    assert cached == config.kv_lora_rank + config.qk_rope_head_dim
    assert theirs.setting('leading_dense_block_count') == config.n_layer
    assert theirs.setting('context_length') == config.block_size


@pytest.mark.parametrize('asked_for', [False, True])
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
def test_weights_keep_their_dtype_or_get_that_asked_for(dtype, asked_for, model, tokens, tmp_path):
    """Matrices do; norms, and in float16 latents of tiny numbers, are in float32."""
    import gguf

    ours = model('gqa').to(dtype)
    if asked_for:
        export_gguf(ours.float(), tmp_path / 'model.gguf', dtype=dtype)
    else:
        export_gguf(ours, tmp_path / 'model.gguf')
    short = {torch.bfloat16: 'BF16', torch.float16: 'F16'}[dtype]
    for tensor in gguf.GGUFReader(tmp_path / 'model.gguf').tensors:
        needs_more = dtype == torch.float16 and tensor.name.endswith(('q_a.weight', 'mqa.weight'))
        expected = 'F32' if len(tensor.shape) == 1 or needs_more else short
        assert tensor.tensor_type.name == expected, tensor.name
    idx = tokens(24, V)[:1]
    theirs = Deepseek2(tmp_path / 'model.gguf').logits(idx[0]).float()
    ours = ours.float()(idx)[0]
    # Only queries are rounded once more.
    tolerance = {torch.bfloat16: 2e-2, torch.float16: 5e-3}[dtype]
    assert (theirs - ours).square().mean().sqrt() < tolerance * ours.std()


def test_the_vocabulary_is_in_it(model, tokenizer, tmp_path):
    from gguf import TokenType

    export_gguf(model('untied'), tmp_path / 'model.gguf', tokenizer)
    fields = Deepseek2(tmp_path / 'model.gguf').fields
    tokens, types = fields['tokenizer.ggml.tokens'], fields['tokenizer.ggml.token_type']
    vocabulary = tokenizer.bpe.get_vocab(with_added_tokens=True)
    assert {token: tokens[i] for token, i in vocabulary.items()} == {t: t for t in vocabulary}
    assert types[:3] == [TokenType.CONTROL] * 3
    assert (types[3], types[295], types[299]) == (
        TokenType.NORMAL,
        TokenType.USER_DEFINED,
        TokenType.UNUSED,
    )
    merges = json.loads(tokenizer.bpe.to_str())['model']['merges']
    assert [merge.split(' ') for merge in fields['tokenizer.ggml.merges']] == merges
    assert fields['tokenizer.ggml.pre'] == 'gpt-2'
    assert fields['tokenizer.ggml.add_bos_token'] and fields['tokenizer.ggml.bos_token_id'] == 0
    ends = [fields[f'tokenizer.ggml.{name}_token_id'] for name in ('eos', 'eot', 'eom')]
    assert ends == [1, 2, 295]
    assert fields['tokenizer.chat_template'] == TEMPLATE


# -------------------------------------------------------------------------------------------------
# llama.cpp itself


@pytest.mark.parametrize('name', [*MODELS, *CONVERTED])
def test_llama_cpp_continues_as_we_do(name, model, tokenizer, tokens, tmp_path):
    ours, path = model(name), tmp_path / 'model.gguf'
    export_gguf(ours, path, tokenizer)
    peer = LlamaCpp(path)
    idx = tokens(24, V)[:1, :6]
    text = torch.stack(list(generate(ours, idx, 12, temperature=0)), dim=1)
    ids = peer.complete(idx[0].tolist(), 12)['tokens']
    count = len(ids)  # it stops at an end
    assert ids == text[0, :count].tolist()
    assert count == 12 or text[0, count].item() in tokenizer.eos
    whole = torch.cat([idx, text], dim=1)[0]
    expected = ours(whole[None])[0].log_softmax(-1)
    for length in (3, 6, 6 + count):
        log_probs = peer.log_probs(whole[:length].tolist(), V)
        torch.testing.assert_close(log_probs, expected[length - 1], rtol=0, atol=1e-4)


def test_llama_cpp_caches_the_latent(model, tokenizer, tmp_path):
    """And nothing else, but what says where a token stands."""
    ours = model('mha')
    export_gguf(ours, tmp_path / 'model.gguf', tokenizer)
    peer = LlamaCpp(tmp_path / 'model.gguf')
    sizes = []
    for length in (4, 20):
        peer.complete(list(range(10, 10 + length)), 1)
        sizes.append(peer.saved_bytes())
    config = ours.config
    of_a_token = 4 * config.n_layer * (config.kv_lora_rank + config.qk_rope_head_dim)
    more = (sizes[1] - sizes[0]) / 16 - of_a_token
    assert 0 <= more <= 16


@pytest.mark.parametrize('name', PRE_TOKENIZERS.values())
def test_llama_cpp_cuts_texts_into_the_same_tokens(name, model, tmp_path):
    tokenizer = make_tokenizer(tmp_path, name)
    export_gguf(model('untied'), tmp_path / 'model.gguf', tokenizer)
    peer = LlamaCpp(tmp_path / 'model.gguf')
    for text in ODD_TEXTS:
        assert peer.tokenize(text) == tokenizer.encode(text), text


# -------------------------------------------------------------------------------------------------
# refusals


@pytest.mark.parametrize(
    'name, changes, how, match',
    [
        ('mha', dict(norm='layernorm'), UNIFORM, 'norm=layernorm'),
        ('biases', {}, UNIFORM, 'bias=True'),
        ('nope', {}, dict(kv_lora_rank=8), 'pos=none'),
        ('mha', dict(rope_scaling=4.0), UNIFORM, 'the frequencies of RoPE'),
        ('mha', {}, UNIFORM | dict(rope='low'), 'the frequencies of RoPE'),
        ('mha', {}, UNIFORM | dict(rope_heads='own'), 'the frequencies of RoPE'),
        ('mqa', {}, dict(rope_heads='own'), 'RoPE on all of a key'),
    ],
    ids=str,
)
def test_what_llama_cpp_cannot_express_is_refused(name, changes, how, match, source, tmp_path):
    mla, _ = converted(*source(name, head_dim=8, **changes), **how)
    assert_refused(match, export_gguf, mla, tmp_path / 'model.gguf')
    assert not list(tmp_path.iterdir())


def test_models_and_names_that_are_refused(tiny, tmp_path, monkeypatch):
    assert_refused('GPT is no MLA model', export_gguf, tiny(**LLAMA), tmp_path / 'a.gguf')
    mla = tiny('mla', **LLAMA)
    assert_refused('norm_eps=1e-05 .* 1e-06 here', export_gguf, mla, tmp_path / 'a.gguf')
    as_lite = tiny('mla', **NATIVE | dict(n_layer=26, q_lora_rank=8))
    match = 'q_lora_rank=8 with 26 layers'
    assert_refused(match, export_gguf, as_lite, tmp_path / 'a.gguf')
    (tmp_path / 'b.gguf').write_text('mine')
    assert_refused('is there already', export_gguf, mla, tmp_path / 'b.gguf')
    monkeypatch.setitem(sys.modules, 'gguf', None)
    assert_refused(r'needs gguf: pip install -e .\[gguf\]', export_gguf, mla, tmp_path / 'a.gguf')
    assert [file.name for file in tmp_path.iterdir()] == ['b.gguf']


def test_tokenizers_that_llama_cpp_reads_otherwise_are_refused(model, tokenizer, tmp_path, capsys):
    from tokenizers import normalizers, pre_tokenizers

    bpe, path = tokenizer.bpe, tmp_path / 'model.gguf'
    before = bpe.pre_tokenizer
    try:
        bpe.pre_tokenizer = pre_tokenizers.Whitespace()
        match = 'cuts texts as none of the pre-tokenizers of llama.cpp'
        assert_refused(match, export_gguf, model('untied'), path, tokenizer)
        bpe.pre_tokenizer = before
        bpe.normalizer = normalizers.NFKC()
        assert_refused('changes texts first', export_gguf, model('untied'), path, tokenizer)
        bpe.normalizer = normalizers.NFC()
        export_gguf(model('untied'), path, tokenizer)
        assert 'texts become NFC first' in capsys.readouterr().err
    finally:
        bpe.pre_tokenizer, bpe.normalizer = before, None


def test_the_base_of_a_rope_is_found_from_its_frequencies():
    for base, count in ((1e4, 8), (5e5, 3), (100.0, 2)):
        frequencies = [base ** (-k / count) for k in range(count)]
        assert rope_base(frequencies) == pytest.approx(base)
        assert rope_base([0.5 * f for f in frequencies]) is None
        assert rope_base([*frequencies, frequencies[-1]]) is None
    assert rope_base([1.0]) is not None
    assert rope_base([]) is None
    assert rope_base([1.0, 0.0]) is None


def test_a_scaled_rope_slows_frequencies_of_its_own_too():
    """As model.py does, for which rope_scaling divides the positions."""
    shape = dict(pos='rope', qk_rope_head_dim=4, rope_scaling=2.0)
    assert frequencies_of(MLAConfig(**shape), [1]) == pytest.approx([0.005])
    own = MLAConfig(rope_frequencies=(1.0, 0.5), **shape)
    assert frequencies_of(own, [0, 1]) == [0.5, 0.25]
