"""What `bench.py decode` measures: models, caches, batch sizes and contexts, by its settings."""

from dataclasses import dataclass
from pathlib import Path

import torch

from model import GPT
from nanomla.checkpoints import gpt2
from nanomla.checkpoints.load import load_model
from nanomla.checkpoints.native import MODELS, new_model
from nanomla.core.checks import check_choice, check_range, split_list, split_numbers
from nanomla.core.configurator import Settings, UserError
from nanomla.core.devices import pick_dtype
from nanomla.inference.cache import LAYOUTS, PAGE_SIZES, Cache
from nanomla.inference.quantize import BITS, FULL

PROFILED_STEPS = 3  # with --profile, beside the timed ones
PROFILED_LINES = 12  # kernels that are shown
UNCACHED_STEPS = 1  # between two looks at the clock: each is a whole forward pass

# Batch sizes and contexts where the settings leave them empty, on a GPU and on a CPU.
STEPS_ON_GPU = ('1,64', '128,256,512,1024,2048,4096,8192')
STEPS_ON_CPU = ('1,4', '128,256,512')
ATTENTION_ON_GPU = ('64', '8192')
ATTENTION_ON_CPU = ('4', '256')


@dataclass
class DecodePlan:
    """
    What to measure on which device. `settings` are bench.py's, in which lists are still text.

    block_size: of models with random weights, enough for every context
    """

    settings: Settings
    device: torch.device
    dtype: torch.dtype
    models: list[str]
    caches: list[str]
    cache_dtypes: list[str]
    batch_sizes: list[int]
    contexts: list[int]
    block_size: int

    @property
    def warmup(self) -> int:
        return self.settings['warmup_steps']

    @property
    def steps(self) -> int:
        return self.settings['timed_steps']

    @property
    def repeats(self) -> int:
        return self.settings['repeats']

    @property
    def page_size(self) -> int:
        return self.settings['page_size']

    @property
    def cached_layouts(self) -> list[str]:
        return [layout for layout in self.caches if layout != 'none']

    def decoded_tokens(self, layout: str) -> int:
        """Return how many tokens a sequence decodes while a configuration is timed."""
        if layout == 'none':
            return 1 + UNCACHED_STEPS * self.repeats
        profiled = PROFILED_STEPS if self.settings['profile'] else 0
        return self.warmup + self.steps * self.repeats + profiled


def make_plan(settings: Settings, device: torch.device) -> DecodePlan:
    """Return the plan of bench.py's settings. UserError, before anything is built, for bad ones."""
    models = settings['models']
    if settings['peer'] and 'models' not in settings.given:
        models = 'mha'
    batch_sizes, contexts = default_sizes(settings['attention_only'], device)
    contexts = whole_numbers('--contexts', settings['contexts'] or contexts)
    plan = DecodePlan(
        settings=settings,
        device=device,
        dtype=pick_dtype(settings['dtype'], device),
        models=split_list(models),
        caches=known_words('--caches', settings['caches'], ['none', *LAYOUTS]),
        cache_dtypes=known_words(
            '--cache_dtypes', settings['cache_dtypes'], ['auto', *FULL, *BITS]
        ),
        batch_sizes=whole_numbers('--batch_sizes', settings['batch_sizes'] or batch_sizes),
        contexts=contexts,
        block_size=max(contexts[-1], settings['block_size']),
    )
    check_ranges(settings)
    if settings['peer']:
        check_texts(plan)
    elif not settings['attention_only']:
        check_contexts(plan)
    for name in plan.models:
        described_model(plan, name)
    return plan


def default_sizes(attention_only: bool, device: torch.device) -> tuple[str, str]:
    """Return batch sizes and contexts for settings that leave them empty."""
    if attention_only:
        return ATTENTION_ON_CPU if device.type == 'cpu' else ATTENTION_ON_GPU
    return STEPS_ON_CPU if device.type == 'cpu' else STEPS_ON_GPU


def whole_numbers(name: str, text: str) -> list[int]:
    """Return a setting like '1,64' as a sorted list of numbers from 1 on, each once."""
    numbers = sorted(set(split_numbers(name, text)))
    if not numbers:
        raise UserError(f'{name}={text}: write numbers with commas, like 1,4')
    check_range(name, numbers[0], least=1)
    return numbers


def known_words(name: str, text: str, known: list[str]) -> list[str]:
    """Return a setting like 'dense,paged' as a list of words, each of them in `known`."""
    words = split_list(text)
    if not words:
        raise UserError(f'{name}={text}: name at least one of {", ".join(known)}')
    for word in words:
        check_choice(name, word, known)
    return words


def check_ranges(settings: Settings) -> None:
    check_choice('page_size', settings['page_size'], PAGE_SIZES)
    for name in ('new_tokens', 'prompt_tokens', 'peer_repeats'):
        check_range(name, settings[name], least=1)
    for name in ('peer_new_tokens', 'warmup_steps', 'prefill_chunk'):
        check_range(name, settings[name], least=0)


def check_texts(plan: DecodePlan) -> None:
    """Raise a UserError where whole texts cannot be decoded beside a peer's."""
    if not plan.cached_layouts:
        raise UserError(
            '--peer times whole texts decoded with a cache: use --caches=dense or paged'
        )
    settings = plan.settings
    if settings['prompt_tokens'] + settings['new_tokens'] > settings['block_size']:
        raise UserError(
            f'prompt_tokens={settings["prompt_tokens"]} and new_tokens={settings["new_tokens"]} '
            f'are beyond block_size={settings["block_size"]}: ask for fewer'
        )


def check_contexts(plan: DecodePlan) -> None:
    """Raise a UserError where the shortest context has no room for the tokens that are timed."""
    least = 1 + max(plan.decoded_tokens(layout) for layout in plan.caches)
    if plan.contexts[0] < least:
        raise UserError(
            f'--contexts={plan.contexts[0]} is too small: a context holds a prompt, '
            f'warmup_steps={plan.warmup} and repeats={plan.repeats} times '
            f'timed_steps={plan.steps} tokens, so it is at least {least}: raise it, or lower one '
            'of these'
        )


# -------------------------------------------------------------------------------------------------
# models


def described_model(plan: DecodePlan, name: str) -> tuple[str, dict] | None:
    """
    Return the kind of attention and the settings that one of --models stands for; None for the
    name of a checkpoint. UserError for a name that is neither.
    """
    where = f'--models={plan.settings["models"]}'
    word, _, widths = name.partition(':')
    kind = kind_of_name(word)
    if kind is None:
        if word in gpt2.HUB or Path(name).exists() or name.startswith('random:'):
            return None
        raise UserError(
            f"{where}: '{name}' is not known: use {', '.join(known_names())}, with widths such as "
            'gqa:4 or mla:256+32, or a checkpoint file or folder'
        )
    try:
        changed = MODELS[kind].Config.shape_settings(word, widths, plan.settings['n_head'])
    except ValueError as error:
        raise UserError(f"{where}: '{name}': {error}") from None
    return kind, changed


def kind_of_name(word: str) -> str | None:
    """Return the attention in MODELS that is called `word`, or that has a shape of that name."""
    if word in MODELS:
        return word
    for kind, model_class in MODELS.items():
        if word in model_class.Config.shape_names:
            return kind
    return None


def known_names() -> list[str]:
    names = []
    for kind, model_class in MODELS.items():
        names += [kind, *model_class.Config.shape_names]
    return list(dict.fromkeys(names))


def build_model(plan: DecodePlan, name: str) -> GPT:
    """
    Return one of --models on the device, in the plan's dtype and in eval mode: a checkpoint, or the
    shape of the settings with random weights.

    Except beside a peer, random weights have RoPE unless the settings say otherwise, because
    contexts go beyond GPT-2's.
    """
    settings = plan.settings
    described = described_model(plan, name)
    if described is None:
        model = load_model(name, dropout=0.0).model
    else:
        kind, changed = described
        shape = dict(settings) | changed | dict(dropout=0.0)
        if not settings['peer']:
            shape['block_size'] = plan.block_size
            if 'pos' not in settings.given:
                shape['pos'] = 'rope'
        # What was set for one attention, such as MLA's widths, is not for the others.
        own = MODELS[kind].Config.keys()
        given = {key: where for key, where in settings.given.items() if key in own}
        torch.manual_seed(0)
        model = new_model(kind, shape, given, settings['vocabulary'])
    model.stream = plan.dtype
    return model.to(plan.device, plan.dtype).eval()


def make_cache(
    plan: DecodePlan, model: GPT, layout: str, dtype: str, rows: int, size: int
) -> Cache:
    """Return an empty cache for `rows` sequences of `size` tokens, as the settings ask for."""
    return Cache.of(
        model,
        rows,
        size,
        layout=layout,
        dtype=dtype,
        page_size=plan.page_size,
        static=plan.device.type == 'cuda',
        kernel=plan.settings['decode_kernel'],
    )
