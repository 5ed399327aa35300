"""
What a conversion of one pretrained model costs: published recipes and this project's, in one table.

    python -m nanomla.comparison.pretrained_study --source=FOLDER --text=books.txt \
        --second_text=shakespeare.txt --results=pretrained.jsonl

Every recipe gets the same calibration text and the same bytes of a token. Perplexities are of the
end of `text`, which no recipe sees, and of a second text. --models=FOLDER,FOLDER adds rows of
models that exist, such as healed ones. Each result is a line of a JSONL file; a study that was
interrupted goes on where it was.
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
from nanomla.conversion.settings import ConversionSettings, settings_for_saving
from nanomla.core.checks import check_choice, split_list, split_numbers
from nanomla.core.devices import commit, describe, pick_device
from nanomla.core.files import appending, read_jsonl


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


@dataclass
class Study:
    """The source, its texts in windows on its device, and the rows that there are."""

    loaded: LoadedModel
    train: np.ndarray
    held_out: dict[str, torch.Tensor]  # (M, T + 1) of each text
    rows: list[dict]

    @property
    def model(self) -> GPT:
        return self.loaded.model

    @property
    def device(self) -> torch.device:
        return self.model.lm_head.weight.device


def read_study(settings: dict) -> Study:
    """Load the source and cut the texts. UserError for what is missing."""
    for name in ('source', 'text'):
        if not settings[name]:
            raise UserError(f'say --{name}=: see --help')
    loaded = load_model(settings['source'])
    picked = pick_device(settings['device'])
    loaded.model.to(picked).eval()
    vocab_size = loaded.model.config.vocab_size
    train, val, _ = tokens_of(text, vocab_size, loaded.meta, loaded.tokenizer)
    texts = {'text': val}
    if second_text:
        texts['second text'] = tokens_of_any(second_text, loaded)
    windows = {
        name: windows_of(ids, eval_tokens, block_size + 1, what=name).to(picked)
        for name, ids in texts.items()
    }
    rows = read_jsonl(results) if Path(results).exists() else []
    return Study(loaded, train, windows, rows)


def tokens_of_any(name: str, loaded: LoadedModel) -> np.ndarray:
    """Return all tokens of a file, or the training part of a dataset."""
    vocab_size = loaded.model.config.vocab_size
    if Path(name).is_file():
        return file_tokens(name, vocab_size, loaded.meta, loaded.tokenizer)
    return tokens_of(name, vocab_size, loaded.meta)[0]


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
    row |= dict(commit=commit(), device=describe(study.device), torch=torch.__version__)
    study.rows.append(row)
    with appending(results) as file:
        file.write(json.dumps(row) + '\n')
    print({key: value for key, value in row.items() if key not in ('commit', 'device', 'torch')})
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


def main(settings: dict) -> None:
    study = read_study(settings)
    names = split_list(recipes) or list(RECIPES)
    for name in names:
        check_choice('recipes', name, RECIPES)
    if not is_there(study, model='the source'):
        add_row(study, dict(model='the source'), study.model)
    caches = ['', cache_dtype] if cache_dtype else ['']
    for folder in split_list(models):
        model = load_model(folder).model.to(study.device).eval()
        for cache in caches:
            if not is_there(study, model=folder, cache=cache):
                add_row(study, dict(model=folder, cache=cache), model, cache)
        del model
    all_seeds = split_numbers('seeds', seeds, int)
    for seed in all_seeds:
        windows = calibration_windows(study, seed)
        moments = measure(study.model, windows, batch_size)
        for saving in split_numbers('savings', savings, float):
            wanted = names
            if seed != all_seeds[0]:
                wanted = [name for name in names if name not in split_list(one_seed)]
            measure_recipes(study, wanted, saving, seed, (windows, moments))
    print_table(study)


if __name__ == '__main__':
    main(config)
