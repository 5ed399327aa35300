"""
What a conversion of one pretrained model costs: published recipes and this project's, in one table.

    python -m nanomla.comparison.pretrained_study --source=FOLDER --text=books.txt \
        --second_text=shakespeare.txt --results=pretrained.jsonl

Every recipe gets the same calibration text and the same bytes of a token. Perplexities are of the
end of `text`, which no recipe sees, and of a second text. --models=FOLDER,FOLDER adds rows of
models that exist, such as healed ones, with the source's tokens. Each result is a line of a JSONL
file; a study that was interrupted goes on where it was.
"""

source = ''  # a model with MHA, GQA or MQA
text = ''  # a text file, or a dataset in the tokens of the source
second_text = ''  # another, to evaluate on; '' = none
models = ''  # healed models and controls to evaluate, with commas
savings = '0.5,0.6666,0.875'  # shares of the source's cache
seeds = '1,2,3'  # of the calibration windows
recipes = ''  # some of RECIPES below, with commas; '' = all
one_seed = 'MHA2MLA,TransMLA,CARE,CARE-E,balanced'  # recipes of the first seed alone
results = 'pretrained.jsonl'
calibration_tokens = 131072
eval_tokens = 65536
block_size = 512  # tokens in a window
layer_steps = 200  # of the recipe that is fitted layer by layer
batch_size = 16
cache_dtype = 'int4'  # models are evaluated with such a cache, too; '' = not
device = 'auto'

from nanomla.core.configurator import UserError, configure

if __name__ == '__main__':
    config = configure(globals())  # before the imports below, so that --help is quick

# -------------------------------------------------------------------------------------------------
import copy
import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from model import GPT
from nanomla.checkpoints.load import LoadedModel, load_model
from nanomla.conversion.calibration import (
    bytes_per_token,
    cached_loss,
    file_tokens,
    mean_loss,
    measure,
    perplexity,
    tokens_of,
    windows_of,
)
from nanomla.conversion.convert import convert
from nanomla.conversion.layerwise import LayerwiseSettings, fit_layers, search_split
from nanomla.conversion.settings import (
    ConversionSettings,
    candidate_splits,
    settings_for_saving,
)
from nanomla.conversion.source import check_source
from nanomla.core.checks import (
    TABLE,
    TEXT,
    check_choice,
    check_entries,
    check_range,
    number,
    split_list,
    split_numbers,
    whole,
)
from nanomla.core.devices import commit, describe, pick_device
from nanomla.core.files import appending, read_appended
from nanomla.core.token_files import same_tokens
from nanomla.inference.quantize import BITS


@dataclass(frozen=True)
class Recipe:
    """
    A way to convert.

    settings: of ConversionSettings; the widths are those of `split_cache` for all
    fit_steps: of layer-wise distillation; None for none, 0 for W^O alone, -1 for layer_steps
    search: the pairs by `search_split`
    """

    settings: dict
    fit_steps: int | None = None
    search: bool = False


# RoRoPE with FreqFold of four: the first components of each run of frequencies (TransMLA, 4.2)
ROROPE = dict(rope='uniform', components='keys', real=True, fold=4)
OURS = dict(rope='turn', low_rank='attention', by_layer=True)
RECIPES = {
    # Ji et al. 2025: pairs of each head by 2-norm, joint SVD of the weights
    'MHA2MLA': Recipe(dict(rope='2-norm', rope_heads='own', low_rank='joint')),
    # Meng et al. 2025: RoRoPE, FreqFold, balanced PCA of keys and values
    'TransMLA': Recipe(ROROPE | dict(low_rank='balanced')),
    # Zhou et al. 2026: TransMLA's k_pe, SVD weighted by the covariance; E: ranks by layer
    'CARE': Recipe(ROROPE | dict(low_rank='calibrated')),
    'CARE-E': Recipe(ROROPE | dict(low_rank='calibrated', ranks='residual')),
    'balanced': Recipe(dict(rope='turn', low_rank='balanced')),
    'attention': Recipe(OURS),
    'attention + W^O': Recipe(OURS, fit_steps=0),
    'attention + layer by layer': Recipe(OURS, fit_steps=-1),
    'pairs searched': Recipe(OURS, search=True),
    'pairs searched + W^O': Recipe(OURS, fit_steps=0, search=True),
    'pairs searched + layer by layer': Recipe(OURS, fit_steps=-1, search=True),
}


# Entries of a row, where it has them. Of older files no row has `settings`.
ROW = dict(
    model=TEXT,
    cache=TEXT,
    recipe=TEXT,
    saving=number(),
    seed=whole(),
    bytes=number(),
    settings=TABLE,
)


@dataclass
class Plan:
    """What is asked for, in lists."""

    recipes: list[str]
    savings: list[float]
    seeds: list[int]
    models: list[str]


@dataclass
class Study:
    """
    The source, its texts in windows on its device, and the rows that there are.

    settings: those by which rows can be compared, which each row holds
    """

    loaded: LoadedModel
    train: np.ndarray
    held_out: dict[str, torch.Tensor]  # (M, T + 1) of each text
    rows: list[dict]
    settings: dict

    @property
    def model(self) -> GPT:
        return self.loaded.model

    @property
    def device(self) -> torch.device:
        return self.model.lm_head.weight.device


# -------------------------------------------------------------------------------------------------
# what is asked for: all of it is checked before any work


def read_plan() -> Plan:
    """Check the settings that need no model. UserError for what does not fit."""
    for name, value in dict(source=source, text=text).items():
        if not value:
            raise UserError(f'say --{name}=: see --help')
    check_range('block_size', block_size, least=1)
    check_range('calibration_tokens', calibration_tokens, least=block_size)
    check_range('eval_tokens', eval_tokens, least=block_size + 1)
    check_range('layer_steps', layer_steps, least=0)
    check_range('batch_size', batch_size, least=1)
    if cache_dtype:
        check_choice('cache_dtype', cache_dtype, BITS)
    plan = Plan(
        recipes=split_list(recipes) or list(RECIPES),
        savings=split_numbers('savings', savings, float),
        seeds=split_numbers('seeds', seeds, int),
        models=split_models(),
    )
    for name in plan.recipes:
        check_choice('recipes', name, RECIPES)
    for name in split_list(one_seed):
        check_choice('one_seed', name, RECIPES)
    for saving in plan.savings:
        check_range('savings', saving, above=0, below=1)
    for seed in plan.seeds:
        check_range('seeds', seed, least=0)
    return plan


def split_models() -> list[str]:
    """Return the names in `models`. UserError for an empty one, such as of an unset variable."""
    names = [name.strip() for name in models.split(',')] if models else []
    if '' in names:
        raise UserError(f'--models={models} has an empty name: write FOLDER,FOLDER')
    return names


def comparable_settings() -> dict:
    """Return the settings by which the rows of a file can be compared."""
    names = dict(source=source, text=text, second_text=second_text)
    paths = {key: os.path.normpath(name) if name else '' for key, name in names.items()}
    return paths | dict(
        calibration_tokens=calibration_tokens,
        eval_tokens=eval_tokens,
        block_size=block_size,
        layer_steps=layer_steps,
    )


def read_rows(settings: dict) -> list[dict]:
    """Return the rows that there are. UserError for those of another study, or of another form."""
    if not os.path.lexists(results):
        return []
    texts = ['text', 'second text'] if second_text else ['text']
    try:
        rows = read_appended(results)
        for line, row in enumerate(rows, 1):
            check_row(row, texts, settings, f'{results}:{line}')
    except OSError as error:
        raise UserError(f'cannot read {results}: {error.strerror or error}') from None
    except ValueError as error:
        raise UserError(f'{error}: name another file by --results') from None
    return rows


def check_row(row: dict, texts: list[str], settings: dict, where: str) -> None:
    """Raise a ValueError unless a row is one of this study, with these texts and settings."""
    needed = ['bytes', *texts]
    needed += ['model'] if 'recipe' not in row else ['saving', 'seed']
    try:
        check_entries(row, ROW | dict.fromkeys(texts, number()), needed)
    except ValueError as error:
        raise ValueError(f'{where} is no row of this study ({error})') from None
    theirs = row.get('settings', settings)
    for name, value in settings.items():
        if theirs.get(name) != value:
            raise ValueError(f'{where} was measured with {name}={theirs.get(name)}, not {value}')


def read_study(plan: Plan) -> Study:
    """Load the source and cut the texts. UserError for what is missing, or does not fit."""
    settings = comparable_settings()
    rows = read_rows(settings)
    picked = pick_device(device)
    loaded = load_model(source)
    check_can_be_studied(loaded, plan)
    check_is_of(rows, loaded.model)
    train, held_out = read_texts(loaded)
    study = Study(loaded, train, held_out, rows, settings)
    for name in plan.models:
        check_model(name, study)
    loaded.model.to(picked).eval()
    study.held_out = {name: windows.to(picked) for name, windows in held_out.items()}
    return study


def check_can_be_studied(loaded: LoadedModel, plan: Plan) -> None:
    """Raise a UserError where the source cannot be converted by all recipes, or reads less."""
    config = loaded.model.config
    check_source(loaded.model)
    check_block_size(source, loaded.model)
    for saving in plan.savings:
        for name in plan.recipes:
            recipe = RECIPES[name]
            asked = ConversionSettings(**recipe.settings)
            if recipe.search:
                candidate_splits(config, saving, asked)
            settings_for_saving(config, saving, asked).for_source(config, calibrated=True)


def check_block_size(name: str, model: GPT) -> None:
    most = model.config.block_size
    if most < block_size:
        raise UserError(
            f'{name} reads {most} tokens at a time, and the windows have block_size={block_size}: '
            f'use --block_size={most} for all models, or leave it out'
        )


def check_is_of(rows: list[dict], model: GPT) -> None:
    """Raise a UserError where the rows are of a source with another cache: older rows name none."""
    ours = bytes_per_token(model)
    for row in rows:
        if row.get('model') == 'the source' and row['bytes'] != ours:
            raise UserError(
                f'{results} is of a source with {row["bytes"]:,.0f} bytes a token in the cache, '
                f'and {source} has {ours:,.0f}: name another file by --results'
            )


def read_texts(loaded: LoadedModel) -> tuple[np.ndarray, dict[str, torch.Tensor]]:
    """Return the tokens to calibrate on, and windows (M, T + 1) of each text to evaluate on."""
    c = loaded.model.config
    train, val, _ = tokens_of(text, c.vocab_size, loaded.meta, loaded.tokenizer, option='--text')
    count = calibration_tokens // block_size * block_size
    if len(train) <= block_size or count <= c.n_embd:
        # With fewer tokens than channels the covariance would not have full rank.
        raise UserError(
            f'--text={text} has {len(train):,} tokens to calibrate on, of which '
            f'{count:,} are asked for: windows of {block_size} and more than {c.n_embd} in all '
            'are needed'
        )
    texts = {'text': val}
    if second_text:
        texts['second text'] = tokens_of_any(second_text, loaded)
    options = {'text': f'the held-out part of {text}', 'second text': second_text}
    windows = {
        name: windows_of(ids, eval_tokens, block_size + 1, what=options[name])
        for name, ids in texts.items()
    }
    return train, windows


def check_model(name: str, study: Study) -> None:
    """Raise a UserError unless the model `name` reads the study's windows."""
    loaded = load_model(name)
    check_block_size(name, loaded.model)
    if loaded.tokens and study.loaded.tokens:
        same = same_tokens(loaded.tokens, study.loaded.tokens)
    else:
        same = loaded.model.config.vocab_size == study.model.config.vocab_size
    largest = max(int(windows.max()) for windows in study.held_out.values())
    if not same or largest >= loaded.model.config.vocab_size:
        raise UserError(
            f'--models: {name} has other tokens than {source}, so that their perplexities cannot '
            'be compared: leave it out'
        )


def tokens_of_any(name: str, loaded: LoadedModel) -> np.ndarray:
    """Return all tokens of a file, or the training part of a dataset."""
    vocab_size, option = loaded.model.config.vocab_size, '--second_text'
    if Path(name).is_file():
        return file_tokens(name, vocab_size, loaded.meta, loaded.tokenizer, option)
    return tokens_of(name, vocab_size, loaded.meta, loaded.tokenizer, option)[0]


def calibration_windows(study: Study, seed: int) -> torch.Tensor:
    """Return windows (M, T) of the training part at random, by `seed`."""
    generator = np.random.default_rng(seed)
    count = calibration_tokens // block_size
    starts = generator.integers(0, len(study.train) - block_size, count)
    windows = [np.asarray(study.train[start : start + block_size], np.int64) for start in starts]
    return torch.from_numpy(np.stack(windows)).to(study.device)


# -------------------------------------------------------------------------------------------------
# rows


def add_row(study: Study, row: dict, model: GPT, cache: str = '') -> dict:
    """Measure `model`, append the row to the file, print it."""
    row |= dict(bytes=bytes_per_token(model, cache or 'bfloat16'))
    for name, windows in study.held_out.items():
        if cache:
            nats = cached_loss(model, windows, cache, batch_size)
        else:
            nats = mean_loss(model, windows, batch_size)
        row[name] = round(perplexity(nats), 4)
    facts = dict(commit=commit(), device=describe(study.device), torch=torch.__version__)
    measured = dict(row)
    row |= facts | dict(settings=study.settings)
    study.rows.append(row)
    with appending(results) as file:
        file.write(json.dumps(row) + '\n')
    print(measured)
    return row


def is_there(study: Study, **key) -> bool:
    return any(row.items() >= key.items() for row in study.rows)


def measure_recipes(study: Study, names: list[str], saving: float, seed: int, calibration) -> None:
    """
    Add the rows of some recipes.

    calibration: windows (M, T) and Moments. Recipes of the same settings share a conversion.
    """
    windows, moments = calibration
    conversions, searches = {}, {}
    for name in names:
        recipe = RECIPES[name]
        key = dict(recipe=name, saving=saving, seed=seed)
        if is_there(study, **key):
            continue
        asked = ConversionSettings(**recipe.settings)
        how = settings_for_saving(study.model.config, saving, asked)
        if recipe.search:
            if asked not in searches:
                searches[asked] = search_split(study.model, saving, asked, moments, windows)
            splits = searches[asked]
            how = splits[0].settings
            key |= dict(splits={split.name: round(split.error, 5) for split in splits})
        if how not in conversions:
            conversions[how] = convert(study.model, how, moments)[0]
        mla = conversions[how]
        key |= dict(rank=how.kv_lora_rank, k_pe=mla.config.qk_rope_head_dim)
        if recipe.fit_steps is not None:
            mla = copy.deepcopy(mla)
            steps = layer_steps if recipe.fit_steps < 0 else recipe.fit_steps
            fitting = LayerwiseSettings(steps=steps, batch_size=batch_size, seed=seed)
            errors = fit_layers(study.model, mla, windows, fitting)
            key |= dict(steps=steps, errors=[round(error, 4) for error in errors])
        add_row(study, key, mla)


# -------------------------------------------------------------------------------------------------
# the table


def print_table(study: Study) -> None:
    """Print the perplexities of each recipe, the mean of its seeds and how far they are apart."""
    for name in study.held_out:
        print(f'\nperplexity, {name}')
        for row in study.rows:
            if 'recipe' not in row:
                print(f'  {row["model"]:44}{row.get("cache", ""):6}{row[name]:10.3f}')
        for saving in sorted({row['saving'] for row in study.rows if 'saving' in row}):
            print(f'  saving {100 * saving:.2f} %')
            for recipe in RECIPES:
                key = dict(recipe=recipe, saving=saving)
                values = [row[name] for row in study.rows if row.items() >= key.items()]
                if values:
                    mean, spread = sum(values) / len(values), max(values) - min(values)
                    print(f'    {recipe:30}{mean:10.3f}  ±{spread / 2:.3f} ({len(values)} seeds)')


def main() -> None:
    plan = read_plan()
    study = read_study(plan)
    if not is_there(study, model='the source'):
        add_row(study, dict(model='the source'), study.model)
    caches = ['', cache_dtype] if cache_dtype else ['']
    for name in plan.models:
        missing = [cache for cache in caches if not is_there(study, model=name, cache=cache)]
        if not missing:
            continue
        model = load_model(name).model.to(study.device).eval()
        for cache in missing:
            add_row(study, dict(model=name, cache=cache), model, cache)
        del model
    for seed in plan.seeds:
        windows = calibration_windows(study, seed)
        moments = measure(study.model, windows, batch_size)
        for saving in plan.savings:
            wanted = plan.recipes
            if seed != plan.seeds[0]:
                wanted = [name for name in wanted if name not in split_list(one_seed)]
            measure_recipes(study, wanted, saving, seed, (windows, moments))
    print_table(study)


if __name__ == '__main__':
    main()
