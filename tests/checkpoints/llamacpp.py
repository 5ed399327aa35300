"""llama.cpp as a peer: its server in this process, which the package xllamacpp brings compiled."""

import json
import urllib.request

import pytest
import torch

REASON = 'needs llama.cpp: pip install xllamacpp'


class LlamaCpp:
    """A model of a GGUF file in llama.cpp, on the CPU, with a cache in float32."""

    def __init__(self, path, n_ctx=256):
        xllamacpp = pytest.importorskip('xllamacpp', reason=REASON)
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx, params.n_parallel, params.warmup = n_ctx, 1, False
        params.n_gpu_layers = 0
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        # Its flash attention on a CPU rounds queries and values to float16.
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.slot_save_path = f'{path.parent}/'
        params.verbosity = 0
        self.server = xllamacpp.Server(params)

    def ask(self, path, **content):
        """Return the answer of its server to a request."""
        data = json.dumps(content).encode() if content else None
        headers = {'Content-Type': 'application/json'}
        request = urllib.request.Request(self.server.listening_address + path, data, headers)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    def complete(self, prompt, count, **options):
        """Continue a prompt of ids, or a text, greedily by at most `count` ids."""
        request = dict(prompt=prompt, n_predict=count, temperature=0, return_tokens=True)
        return self.ask('/completion', cache_prompt=False, **request | options)

    def log_probs(self, prompt, vocab_size):
        """Return the log-probabilities (V,) of what follows a prompt of ids."""
        # They are those before the bias. A token that ends within a character has none.
        letter = self.tokenize('x')[0]
        answer = self.complete(prompt, 1, n_probs=vocab_size, logit_bias=[[letter, 1000]])
        row = torch.full((vocab_size,), float('nan'))
        for token in answer['completion_probabilities'][0]['top_logprobs']:
            row[token['id']] = token['logprob']
        return row

    def tokenize(self, text):
        return self.ask('/tokenize', content=text, add_special=False)['tokens']

    def saved_bytes(self):
        """Return the bytes of its cache after the last prompt, as it writes it to a file."""
        return self.ask('/slots/0?action=save', filename='cache.bin')['n_written']
