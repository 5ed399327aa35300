"""
EleutherAI's lm-evaluation-harness on our models: an adapter that answers its requests through our caches.

The harness is optional (pip install -e .[eval]) and loaded late.
"""

import difflib
import logging
import math
import os

from nanomla.core.configurator import UserError
from nanomla.core.tokenizers import StreamDecoder
from nanomla.evals.scoring import windows
from nanomla.inference.generate import generate, serve

GROUPS = dict(
    commonsense='mmlu,arc_easy,arc_challenge,piqa,hellaswag,openbookqa,winogrande'
)  # MHA2MLA (Ji et al. 2025), table 1


def load():
    """The module lm_eval. UserError when it is not installed."""
    try:
        import lm_eval
        import lm_eval.tasks

        logging.getLogger('lm_eval').setLevel(
            logging.ERROR
        )  # else it tells which defaults each task has taken
        return lm_eval
    except ImportError as error:
        raise UserError(
            f'tasks other than perplexity, needle and key_value need the lm-evaluation-harness ({error}): pip install -e .[eval]'
        ) from None


class Tasks:
    """
    The harness's tasks `names`: its own, YAML files, and those in the folder `include_path` (which may come with their
    data). UserError for a name that is none of these; it tells the nearest ones, also of `others`.
    """

    def __init__(self, names, include_path='', others=()):
        if include_path and not os.path.isdir(include_path):
            raise UserError(
                f'--include_path={include_path} is no folder: name one with task files (*.yaml)'
            )
        for name in names:
            if name.endswith(('.yaml', '.yml')) and not os.path.isfile(name):
                raise UserError(f'--tasks: there is no task file {name}')
        self.lm_eval = load()
        for include_defaults in (
            False,
            True,
        ):  # reading the harness's own 14,000 takes a while, and a local task needs none of them
            self.manager = self.lm_eval.tasks.TaskManager(
                include_path=include_path or None, include_defaults=include_defaults
            )
            unknown = [
                name
                for name in names
                if name not in self.manager.all_tasks and not name.endswith(('.yaml', '.yml'))
            ]
            if not unknown:
                return
        known = [*others, *self.manager.all_tasks]
        near = (
            difflib.get_close_matches(unknown[0], known, 3)
            or [task for task in known if unknown[0] in task][:3]
        )
        raise UserError(
            f"--tasks: '{unknown[0]}' is not a task; "
            + (
                f'did you mean {" or ".join(near)}?'
                if near
                else f'use {", ".join(others)} or one of the harness'
            )
        )

    def run(self, name, model, limit=0, num_fewshot=-1, seed=0):
        """One task, group or file -> its metrics, {'acc': ..., 'acc_stderr': ..., ...} or, of several tasks, {'task acc': ...}."""
        try:
            found = self.manager.load([name])
        except Exception as error:  # what a task file and its data may raise has no common class
            why = ' '.join(str(error).split())[:160]
            raise UserError(
                f'{name}: its task or data cannot be loaded ({type(error).__name__}: {why}). Connect to the network once, or use '
                'task files with local data (--include_path, or a .yaml)'
            ) from None
        items = (
            [found['groups'][name]] if name in found['groups'] else list(found['tasks'].values())
        )
        try:
            said = self.lm_eval.simple_evaluate(
                model,
                tasks=items,
                limit=limit or None,
                num_fewshot=None if num_fewshot < 0 else num_fewshot,
                task_manager=self.manager,
                log_samples=False,
                bootstrap_iters=1000,
                random_seed=seed,
                numpy_random_seed=seed,
                torch_random_seed=seed,
                fewshot_random_seed=seed,
            )
        except UserError as error:
            raise UserError(f'{name}: {error}') from None
        tables = said['results'] | said.get('groups', {})
        return {
            (f'{task} ' if len(tables) > 1 else '') + key.removesuffix(',none'): float(value)
            for task, table in tables.items()
            for key, value in table.items()
            if isinstance(value, (int, float))
            and not isinstance(value, bool)
            and key not in ('alias', 'sample_len')
            and math.isfinite(value)
        }


def adapter(scorer, codec, begin, ends, bar):
    """
    The harness's LM for the model of `scorer`. begin: id in front of each text, or None; ends: ids that end one.
    bar(total, unit) makes a progress bar. Contexts are cut at their beginning where block_size asks for it.
    """
    from lm_eval.api.model import TemplateLM

    block_size = scorer.block_size
    nothing = (
        [begin] if begin is not None else sorted(ends)[:1] or codec.encode('\n')[-1:]
    )  # what an empty context is

    class Adapter(TemplateLM):
        eot_token_id = sorted(ends)[0] if ends else nothing[0]
        prefix_token_id = nothing[0]
        max_length, max_gen_toks = block_size, 256
        tokenizer_name = codec.name

        def tok_encode(self, string, add_special_tokens=None, **_):
            first = [begin] if begin is not None and add_special_tokens is not False else []
            return first + list(codec.encode(string))

        def loglikelihood(self, requests, disable_tqdm=True):
            return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

        def _loglikelihood_tokens(self, requests, **_):
            """[((context, continuation), context ids, continuation ids)] -> [(log-probability, whether greedy)]; a context runs once for all."""
            asked, where, results = {}, {}, [None] * len(requests)
            for i, (_, context, continuation) in enumerate(requests):
                if not continuation:
                    results[i] = 0.0, True
                elif len(continuation) > block_size:
                    results[i] = self.rolling(list(context) + list(continuation), len(continuation))
                else:
                    key = (
                        tuple(context),
                        block_size + 1 - len(continuation)
                        if len(context) + len(continuation) > block_size + 1
                        else 0,
                    )
                    asked.setdefault(key, []).append(list(continuation))
                    where.setdefault(key, []).append(i)
            progress = bar(len(asked), 'context')
            scores = scorer.score(
                [(list(context), continuations) for (context, _), continuations in asked.items()],
                progress.update,
            )
            progress.close()
            for judged, those in zip(scores, where.values()):
                for (logp, greedy), i in zip(judged, those):
                    results[i] = math.fsum(logp), all(greedy)
                    if requests[i][0] is not None:
                        self.cache_hook.add_partial('loglikelihood', requests[i][0], results[i])
            return results

        def rolling(self, ids, count):
            """(log-probability, whether greedy) of the last `count` ids, in windows of block_size that score each once."""
            first, logp, greedy = len(ids) - count, 0.0, True
            for at, end, scored in windows(count + 1, block_size, block_size):
                text = ids[first - 1 :][at:end]
                ((part, likeliest),) = scorer.score([(text[:-scored], [text[-scored:]])])[0]
                logp, greedy = logp + math.fsum(part), greedy and all(likeliest)
            return logp, greedy

        def loglikelihood_rolling(self, requests, disable_tqdm=True):
            progress, results = bar(len(requests), 'document'), []
            for request in requests:
                ids = self.tok_encode(request.args[0], add_special_tokens=False)
                results.append(self.rolling(nothing[:1] + ids, len(ids))[0] if ids else 0.0)
                self.cache_hook.add_partial('loglikelihood_rolling', request.args, results[-1])
                progress.update()
            progress.close()
            return results

        def generate_until(self, requests, disable_tqdm=True):
            results, alike, progress = [None] * len(requests), {}, bar(len(requests), 'text')
            for i, request in enumerate(
                requests
            ):  # those with the same settings are decoded together
                alike.setdefault(
                    repr(sorted(request.args[1].items(), key=lambda item: item[0])), []
                ).append(i)
            for those in alike.values():
                wanted = requests[those[0]].args[1]
                for i, text in self.write([requests[i].args[0] for i in those], wanted):
                    results[those[i]] = text
                    self.cache_hook.add_partial('generate_until', requests[those[i]].args, text)
                    progress.update()
            progress.close()
            return results

        def write(self, contexts, wanted):
            """Yields (number, continuation) of each context, by the harness's generation settings."""
            until = wanted.get('until') or []
            most = next(
                (
                    wanted[key]
                    for key in (
                        'max_gen_toks',
                        'max_new_tokens',
                        'max_tokens',
                        'max_completion_tokens',
                    )
                    if wanted.get(key)
                ),
                self.max_gen_toks,
            )
            most = min(
                int(most), max(1, block_size // 2)
            )  # at least half of the window is left for the context
            temperature = float(wanted.get('temperature') or 0.0)
            if not wanted.get('do_sample', temperature > 0):
                temperature = 0.0
            prompts = [
                (self.tok_encode(text) or nothing)[-(block_size + 1 - most) :] for text in contexts
            ]
            decoders = [
                StreamDecoder(
                    codec.decode_bytes,
                    [until] if isinstance(until, str) else [stop for stop in until if stop],
                    ends,
                )
                for _ in contexts
            ]
            said = [[] for _ in contexts]

            def tell(i, token):
                at, chunk = len(prompts[i]) + len(said[i]) - 1, scorer.chunk_size or block_size
                scorer.attended(range(at, at + 1), at if said[i] else at // chunk * chunk, at + 1)
                said[i].append(decoders[i].add(token))
                return decoders[i].stopped

            how = dict(
                temperature=temperature,
                top_k=int(wanted.get('top_k') or 0),
                top_p=float(wanted.get('top_p') or 1.0),
                vocab_size=codec.vocab_size,
            )
            if scorer.layout == 'none':
                ended = alone(scorer.model, prompts, most, tell, **how)
            else:
                cache = scorer.room(
                    min(scorer.batch_size, len(prompts)), max(map(len, prompts)) + most - 1
                )
                ended = serve(
                    scorer.model, prompts, cache, most, tell, prefill_chunk=scorer.chunk_size, **how
                )
            for i in ended:
                yield i, ''.join(said[i]) + decoders[i].finish()

    return Adapter()


def alone(model, prompts, most, tell, **how):
    """As decoding.serve, without a cache: one text after the other, each step the whole text again."""
    import torch

    device = model.lm_head.weight.device
    for i, prompt in enumerate(prompts):
        generator = torch.Generator(device).manual_seed(i)
        for token in generate(
            model, torch.tensor([prompt], device=device), most, generator=generator, **how
        ):
            if tell(i, token.item()):
                break
        yield i
