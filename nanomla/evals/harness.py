"""
EleutherAI's lm-evaluation-harness on our models, through our caches.

The harness is optional (pip install -e .[eval]) and imported late.
"""

import difflib
import hashlib
import json
import logging
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence

import torch

from model import GPT
from nanomla.checkpoints.load import TextCodec
from nanomla.checkpoints.tokens.chat import ChatTemplate, Messages
from nanomla.core.configurator import UserError
from nanomla.core.files import progress_bar
from nanomla.core.tokenizers import StreamDecoder, opening
from nanomla.evals.scoring import Scorer, windows
from nanomla.inference.generate import generate, serve

# Names for several tasks: MHA2MLA's set (Ji et al. 2025, table 1).
GROUPS = dict(commonsense='mmlu,arc_easy,arc_challenge,piqa,hellaswag,openbookqa,winogrande')

# The harness's spellings of the most tokens to generate.
MOST_TOKENS = ('max_gen_toks', 'max_new_tokens', 'max_tokens', 'max_completion_tokens')


def load():
    """Return the module lm_eval. UserError when it is not installed."""
    try:
        import lm_eval
        import lm_eval.tasks
    except ImportError as error:
        raise UserError(
            'tasks other than perplexity, needle and key_value need the lm-evaluation-harness '
            f'({error}): pip install -e .[eval]'
        ) from None
    logging.getLogger('lm_eval').setLevel(logging.ERROR)  # else it lists each task's defaults
    return lm_eval


# -------------------------------------------------------------------------------------------------
# tasks


def is_task_file(name: str) -> bool:
    return name.endswith(('.yaml', '.yml'))


class Tasks:
    """
    Tasks of the harness: its own, YAML files, and those in the folder `include_path`, which may
    come with their data.

    names: UserError for a name that is none of these, with the nearest ones that are
    others: names of tasks that are not the harness's, which may be meant, too
    """

    def __init__(self, names: Sequence[str], include_path: str = '', others: Sequence[str] = ()):
        if include_path and not os.path.isdir(include_path):
            raise UserError(
                f'--include_path={include_path} is no folder: name one with task files (*.yaml)'
            )
        for name in names:
            if is_task_file(name) and not os.path.isfile(name):
                raise UserError(f'--tasks: there is no task file {name}')
        self.lm_eval = load()
        # Reading the harness's own 14,000 takes a while, and local tasks need none of them.
        for include_defaults in (False, True):
            if include_defaults:
                print("reading the harness's list of tasks ...", file=sys.stderr, flush=True)
            self.manager = self.lm_eval.tasks.TaskManager(
                include_path=include_path or None, include_defaults=include_defaults
            )
            unknown = [name for name in names if not self.knows(name)]
            if not unknown:
                return
        hint = self.nearest(unknown[0], others)
        raise UserError(f"--tasks: '{unknown[0]}' is not a task; {hint}")

    def knows(self, name: str) -> bool:
        return is_task_file(name) or name in self.manager.all_tasks

    def nearest(self, name: str, others: Sequence[str]) -> str:
        near = difflib.get_close_matches(name, [*others, *self.manager.all_tasks], 3)
        if not near:
            near = [task for task in self.manager.all_tasks if name in task][:3]
        if near:
            return f'did you mean {" or ".join(near)}?'
        return f'use {", ".join(others)} or one of the harness'

    def run(
        self, name: str, model: 'CacheLM', limit: int = 0, num_fewshot: int = -1, seed: int = 0
    ) -> dict[str, float]:
        """
        Run one task, group or file and return its metrics: {'acc': ..., 'acc_stderr': ..., ...}, or
        of several tasks {'task acc': ...}.

        limit: only the first so many examples, 0 for all
        num_fewshot: examples in front of each question, -1 as the task has it
        """
        try:
            found = self.manager.load([name])
        except Exception as error:  # what a task file and its data may raise has no common class
            why = ' '.join(str(error).split())[:160]
            raise UserError(
                f'{name}: its task or data cannot be loaded ({type(error).__name__}: {why}). '
                'Connect to the network once, or use task files with local data '
                '(--include_path, or a .yaml)'
            ) from None
        tasks = list(found['tasks'].values())
        if name in found['groups']:
            tasks = [found['groups'][name]]
        try:
            results = self.lm_eval.simple_evaluate(
                model,
                tasks=tasks,
                limit=limit or None,
                num_fewshot=None if num_fewshot < 0 else num_fewshot,
                task_manager=self.manager,
                log_samples=False,
                apply_chat_template=model.template is not None,
                fewshot_as_multiturn=model.template is not None,
                bootstrap_iters=1000,
                random_seed=seed,
                numpy_random_seed=seed,
                torch_random_seed=seed,
                fewshot_random_seed=seed,
            )
        except UserError as error:
            raise UserError(f'{name}: {error}') from None
        return metrics_of(results['results'] | results.get('groups', {}))


def metrics_of(tables: dict[str, dict]) -> dict[str, float]:
    """Return the numbers in the harness's tables, with the task's name where there are several."""
    metrics = {}
    for task, table in tables.items():
        prefix = f'{task} ' if len(tables) > 1 else ''
        for key, value in table.items():
            if key in ('alias', 'sample_len') or isinstance(value, bool):
                continue
            if isinstance(value, (int, float)) and math.isfinite(value):
                metrics[prefix + key.removesuffix(',none')] = float(value)
    return metrics


# -------------------------------------------------------------------------------------------------
# the model, as the harness asks it


def adapter(scorer: Scorer, codec: TextCodec, template: ChatTemplate | None = None) -> 'CacheLM':
    """
    Return the model of `scorer` as the LM class that the harness calls.

    template: the tasks are put as conversations
    """
    from lm_eval.api.model import TemplateLM

    class Adapter(CacheLM, TemplateLM):
        pass

    return Adapter(scorer, codec, template)


class CacheLM:
    """
    The methods of the harness's TemplateLM, answered by a Scorer. `adapter` joins the two: the
    harness is imported late. Contexts are cut at their beginning where block_size asks for it.
    """

    max_gen_toks = 256

    def __init__(self, scorer: Scorer, codec: TextCodec, template: ChatTemplate | None = None):
        super().__init__()
        self.scorer, self.codec, self.template = scorer, codec, template
        self.tokenizer = codec.tokenizer
        self.block_size = self.max_length = scorer.block_size
        self.empty_context = empty_context(codec)

    @property
    def prefix_token_id(self) -> int:
        return self.empty_context[0]

    @property
    def eot_token_id(self) -> int:
        return min(self.codec.ends, default=self.prefix_token_id)

    @property
    def tokenizer_name(self) -> str:
        """Return what the harness's cache of requests knows tokenizer and template by."""
        made_of = [self.codec.meta.get('tokenizer_sha256'), self.chat_template()]
        digest = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()
        return f'{self.tokenizer.name}-{digest[:16]}'

    def apply_chat_template(
        self, chat_history: Messages, add_generation_prompt: bool = True
    ) -> str:
        """
        Return few-shot examples and question as a conversation in the model's template.

        add_generation_prompt: False where the last message is the beginning of the answer
        """
        render = self.template.render
        if not add_generation_prompt:
            render = self.template.render_unfinished
        try:
            return render(chat_history)
        except UserError:
            # Some templates, as Gemma's, have no place for what the system says.
            others = [message for message in chat_history if message['role'] != 'system']
            if len(others) == len(chat_history):
                raise
            return render(others)

    def chat_template(self, chat_template: bool | str = False) -> str:
        """Return the template, which the harness logs."""
        return self.template.source if self.template else ''

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
        ids = list(self.tokenizer.encode(string))
        # A template writes what begins a text itself.
        adds_begin = self.codec.begin is not None and self.template is None
        if adds_begin and add_special_tokens is not False:
            ids.insert(0, self.codec.begin)
        return ids

    def loglikelihood(self, requests, disable_tqdm=True):
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(self, requests, **_) -> list[tuple[float, bool]]:
        """
        Return the log-probability of each continuation and whether it is greedy. A context runs
        once for all of its continuations.

        requests: (context and continuation, context ids, continuation ids)
        """
        grouped = {}  # context and how much of it is kept -> numbers of requests
        results = [None] * len(requests)
        for i, (_, context, continuation) in enumerate(requests):
            if not continuation:
                results[i] = 0.0, True
            elif len(continuation) > self.block_size:
                ids = list(context) + list(continuation)
                results[i] = self.score_in_windows(ids, len(continuation))
            else:
                kept = min(len(context), self.block_size + 1 - len(continuation))
                grouped.setdefault((tuple(context), kept), []).append(i)
        asked = []
        for (context, _), numbers in grouped.items():
            asked.append((list(context), [list(requests[i][2]) for i in numbers]))
        bar = progress_bar(len(asked), 'context')
        scores = self.scorer.score(asked, bar.update)
        bar.close()
        for numbers, scores_of_context in zip(grouped.values(), scores):
            for i, score in zip(numbers, scores_of_context):
                results[i] = math.fsum(score.logp), all(score.greedy)
                text = requests[i][0]
                if text is not None:
                    self.cache_hook.add_partial('loglikelihood', text, results[i])
        return results

    def score_in_windows(self, ids: list[int], count: int) -> tuple[float, bool]:
        """
        Return the log-probability of the last `count` ids and whether they are greedy, in windows
        of block_size that score each once.
        """
        ids = ids[len(ids) - count - 1 :]  # what stands before them, and they
        total, greedy = 0.0, True
        for begin, end, scored in windows(len(ids), self.block_size, self.block_size):
            text = ids[begin:end]
            score = self.scorer.score([(text[:-scored], [text[-scored:]])])[0][0]
            total += math.fsum(score.logp)
            greedy = greedy and all(score.greedy)
        return total, greedy

    def loglikelihood_rolling(self, requests, disable_tqdm=True) -> list[float]:
        bar = progress_bar(len(requests), 'document')
        results = []
        for request in requests:
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            total = 0.0
            if ids:
                total, _ = self.score_in_windows([self.prefix_token_id] + ids, len(ids))
            results.append(total)
            self.cache_hook.add_partial('loglikelihood_rolling', request.args, total)
            bar.update()
        bar.close()
        return results

    def generate_until(self, requests, disable_tqdm=True) -> list[str]:
        bar = progress_bar(len(requests), 'text')
        grouped = {}  # requests with the same settings are decoded together
        for i, request in enumerate(requests):
            settings = sorted(request.args[1].items(), key=lambda item: item[0])
            grouped.setdefault(repr(settings), []).append(i)
        results = [None] * len(requests)
        for numbers in grouped.values():
            contexts = [requests[i].args[0] for i in numbers]
            settings = requests[numbers[0]].args[1]
            for n, text in self.write(contexts, settings):
                i = numbers[n]
                results[i] = text
                self.cache_hook.add_partial('generate_until', requests[i].args, text)
                bar.update()
        bar.close()
        return results

    def write(self, contexts: list[str], settings: dict) -> Iterator[tuple[int, str]]:
        """Yield (number, continuation) of each context, by the harness's generation settings."""
        most = self.most_tokens(settings)
        room = self.block_size + 1 - most
        prompts = []
        for context in contexts:
            ids = self.tok_encode(context) or self.empty_context
            prompts.append(ids[-room:])
        texts = TextsInProgress(self.scorer, self.codec, prompts, stops_of(settings))
        sampling = dict(
            temperature=temperature_of(settings),
            top_k=int(settings.get('top_k') or 0),
            top_p=float(settings.get('top_p') or 1.0),
            vocab_size=self.tokenizer.vocab_size,
        )
        if self.scorer.layout == 'none':
            finished = serve_without_cache(self.scorer.model, prompts, most, texts.add, **sampling)
        else:
            rows = min(self.scorer.batch_size, len(prompts))
            longest = max(len(prompt) for prompt in prompts)
            cache = self.scorer.empty_cache(rows, longest + most - 1)
            chunk = self.scorer.chunk_size
            finished = serve(
                self.scorer.model, prompts, cache, most, texts.add, prefill_chunk=chunk, **sampling
            )
        for i in finished:
            yield i, texts.finish(i)

    def most_tokens(self, settings: dict) -> int:
        """Return how many tokens to write at most: half of the window is left for the context."""
        most = self.max_gen_toks
        for key in MOST_TOKENS:
            if settings.get(key):
                most = int(settings[key])
                break
        return min(most, max(1, self.block_size // 2))


def empty_context(codec: TextCodec) -> list[int]:
    """Return the one id before a text without a context."""
    for token in (codec.prefix, codec.begin):
        if token is not None:
            return [token]
    if codec.ends:
        return [min(codec.ends)]
    return opening(codec.tokenizer)[-1:]


def stops_of(settings: dict) -> list[str]:
    until = settings.get('until') or []
    if isinstance(until, str):
        return [until]
    return [stop for stop in until if stop]


def temperature_of(settings: dict) -> float:
    temperature = float(settings.get('temperature') or 0.0)
    if not settings.get('do_sample', temperature > 0):
        return 0.0
    return temperature


class TextsInProgress:
    """Texts that are being decoded; the scorer counts what their tokens attend to."""

    def __init__(
        self, scorer: Scorer, codec: TextCodec, prompts: list[list[int]], stops: list[str]
    ):
        self.scorer, self.prompts = scorer, prompts
        decode = codec.tokenizer.decode_bytes
        self.decoders = [StreamDecoder(decode, stops, codec.ends) for _ in prompts]
        self.pieces = [[] for _ in prompts]

    def add(self, i: int, token: int) -> bool:
        """Take the next token of text i; return whether the text ends with it."""
        position = len(self.prompts[i]) + len(self.pieces[i]) - 1  # of the query that wrote it
        begin = position
        if not self.pieces[i]:
            # The first token's query ran within the last chunk of the prompt.
            chunk = self.scorer.chunk_size or self.scorer.block_size
            begin = position // chunk * chunk
        self.scorer.count_attention(range(position, position + 1), begin, position + 1)
        self.pieces[i].append(self.decoders[i].add(token))
        return self.decoders[i].stopped

    def finish(self, i: int) -> str:
        return ''.join(self.pieces[i]) + self.decoders[i].finish()


def serve_without_cache(
    model: GPT,
    prompts: list[list[int]],
    most: int,
    add: Callable[[int, int], bool],
    **sampling,
) -> Iterator[int]:
    """As `serve`, without a cache: one text after the other, the whole text at each step."""
    device = model.lm_head.weight.device
    for i, prompt in enumerate(prompts):
        generator = torch.Generator(device).manual_seed(i)
        idx = torch.tensor([prompt], device=device)
        for token in generate(model, idx, most, generator=generator, **sampling):
            if add(i, token.item()):
                break
        yield i
