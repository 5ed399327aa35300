"""
Turn a model with MHA, GQA or MQA into an MLA model: python convert_mla.py SOURCE --out=FOLDER

    python convert_mla.py out-shakespeare-char --out=out-mla --kv_lora_rank=128
    python convert_mla.py out-books --out=out-mla --saving=0.875
    python convert_mla.py deepseek-ai/deepseek-coder-1.3b-base --out=out-mla --saving=0.875 \
        --calibration=code.txt --export=out-hf
    python convert_mla.py random:deepseek-coder-1.3b --out=out-mla --kv_lora_rank=448 \
        --rope_pairs=32 --low_rank=joint --calibration=none

SOURCE is a run's folder or checkpoint, gpt2*, or a Llama of the Hugging Face layout. It may be a
result of this script, healed or not: its RoPE stays, and the rank of its latent is reduced.
The result is an ordinary checkpoint: train.py heals it (config/heal_mla.py), sample.py and eval.py
read it, and every kind of cache serves it.
"""

# output
out = ''  # a new folder: ckpt.pt, conversion.png, and the source's tokenizer.json if it has one
export = ''  # a copy: a new folder for stock transformers, or NAME.gguf for llama.cpp
export_dtype = ''  # of its weights: float32 | bfloat16 | float16; '' = the source's
# what is cached
kv_lora_rank = 0  # width of a token's latent in a layer; 0 = full rank, without loss
saving = 0.0  # instead of kv_lora_rank: the share of the cache to save, 0.875 for an eighth of it
ranks = 'equal'  # equal | spectrum | residual (CARE): layers share kv_lora_rank · n_layer
rope_pairs = -1  # with RoPE: of each kv head (own) or of all (shared); -1 = all, or by --saving
search_pairs = False  # with saving: try some widths of k_pe, and take that of the least error
rope = ''  # which: high | low | uniform | 2-norm | turn; '' = turn, or with export uniform
rope_heads = 'shared'  # own: pairs of each kv head | shared: components over the kv heads (RoRoPE)
by_layer = True  # shared: each layer chooses its own pairs; False with --export
fold = 1  # shared: neighbouring frequencies treated as one (FreqFold)
real = False  # shared: mix heads by real rotations only, as RoRoPE does; complex ones lose less
components = 'scores'  # shared: principal ones of scores | keys (as RoRoPE does)
low_rank = 'attention'  # split | joint (weights alone) | calibrated | balanced | attention (text)
q_lora_rank = 0  # a latent for the query, too; 0 = none
rotate = False  # rotate the latent, so that no channel is an outlier when it is quantised
# text
calibration = ''  # a dataset or a text file; '' = the source's own dataset; none = weights alone
calibration_tokens = 0  # of its training part; 0 = 262,144 on a GPU, 8,192 on a CPU
eval_tokens = 0  # of its held-out part, for perplexities; 0 = 65,536 on a GPU, 4,096 on a CPU
block_size = 0  # tokens in a window; 0 = the source's, at most 1024
batch_size = 8  # windows at a time, in healing too, which accumulates them to steps of 16
cache_dtype = ''  # report the perplexity with such a cache, too: int8 | int4
# layer-wise distillation: each attention is fitted to the source's on the calibration text
layerwise = True
layer_steps = -1  # of Adam for each layer after W^O in closed form; -1 = 200 on a GPU, 0 on a CPU
layer_lr = 1e-3  # at first; it falls to zero
# healing by config/heal_mla.py into OUT-healed, the source as teacher; the same command resumes
heal = 0  # tokens to train on after the conversion; 0 = none
learning_rate = 0.0  # peak; 0 = 5e-4 for a model that others trained, else config/heal_mla.py's
teacher_cache = ''  # a folder for the source's predictions, which later runs read; '' = none
lora_rank = 0  # train adapters of the attentions alone, merged in the end; 0 = all weights
# machine
seed = 1337  # of the rotation
device = 'auto'  # auto | cpu | cuda | cuda:1 | mps
dtype = 'float32'  # of the arithmetic on text: float32 | auto | bfloat16

import sys

from nanomla.core.configurator import UserError, configure

if __name__ == '__main__':
    source = ''
    if len(sys.argv) > 1 and not sys.argv[1].startswith('-'):
        source = sys.argv.pop(1)
    # Before the imports below, so that --help is quick.
    config = configure(globals(), takes='SOURCE [config/x.py ...]')

# -------------------------------------------------------------------------------------------------
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import torch

from model import GPT, GPTConfig
from nanomla.adapters.lora import check_peft
from nanomla.checkpoints import native
from nanomla.checkpoints.export import DTYPES, check_export, servers_of
from nanomla.checkpoints.export import export as write_export
from nanomla.checkpoints.gguf.write import ENDING as GGUF
from nanomla.checkpoints.gguf.write import check_gguf, export_gguf
from nanomla.checkpoints.load import LoadedModel, load_model
from nanomla.checkpoints.tokens.chat import ChatTemplate
from nanomla.conversion.calibration import (
    cached_loss,
    mean_loss,
    measure,
    tokens_of,
    windows_of,
)
from nanomla.conversion.convert import convert, mla_config
from nanomla.conversion.heal import (
    PRETRAINED_RATE,
    Healing,
    check_dataset,
    check_is_the_same,
    healed_folder,
)
from nanomla.conversion.heal import heal as heal_model
from nanomla.conversion.layerwise import LayerwiseSettings, fit_layers, search_split
from nanomla.conversion.report import Report, draw_report, print_report, source_color
from nanomla.conversion.rope_pairs import pairs_by_settings
from nanomla.conversion.settings import (
    ConversionSettings,
    candidate_splits,
    is_lossless,
    settings_for_saving,
    with_ordinary_frequencies,
)
from nanomla.conversion.source import check_source, has_latent
from nanomla.core import token_files
from nanomla.core.checks import check_choice, check_range
from nanomla.core.devices import commit, describe, pick_device, pick_dtype
from nanomla.core.figures import if_possible
from nanomla.core.files import check_can_be_made, copy_file, progress_bar, replacing_folder
from nanomla.inference.quantize import BITS
from nanomla.training.next_steps import print_next_steps

OF_HEALING = ('learning_rate', 'teacher_cache', 'lora_rank')
LONGEST_WINDOW = 1024  # tokens, unless block_size asks for more
MOST_LOST_BY_FITTING = 0.1  # nats on the held-out text; beyond it the closed form stays
ROPE_SETTINGS = ('rope', 'rope_pairs', 'rope_heads', 'by_layer', 'fold', 'real', 'components')


@dataclass
class Effort:
    """How much text is read, and how many steps fit each layer."""

    calibration_tokens: int
    eval_tokens: int
    layer_steps: int


ON_GPU = Effort(calibration_tokens=262144, eval_tokens=65536, layer_steps=200)
ON_CPU = Effort(calibration_tokens=8192, eval_tokens=4096, layer_steps=0)


@dataclass
class Text:
    """
    Text to calibrate and to evaluate on.

    windows (M, T): to calibrate on; held_out (M, T + 1): for perplexities
    """

    name: str
    windows: torch.Tensor
    held_out: torch.Tensor


# -------------------------------------------------------------------------------------------------
# what is asked for


def check_settings(source: str) -> None:
    """Raise a UserError for settings that do not fit, whatever the source is."""
    if not source:
        raise UserError('say what to convert: python convert_mla.py SOURCE --out=FOLDER')
    if not out:
        raise UserError('say where to put it: --out=FOLDER')
    check_range('heal', heal, least=0)
    check_range('seed', seed, least=0, below=2**32)
    check_range('learning_rate', learning_rate, least=0)
    check_range('lora_rank', lora_rank, least=0)
    if lora_rank:
        check_peft()
    final = export
    if not export and not heal:
        final = out
    # Earlier results may be there: the command resumes from them.
    if final and os.path.exists(final):
        raise UserError(f'{final} is there already: name a new folder, or remove it')
    check_places()
    check_range('calibration_tokens', calibration_tokens, least=0)
    check_range('eval_tokens', eval_tokens, least=0)
    check_range('layer_steps', layer_steps, least=-1)
    check_range('layer_lr', layer_lr, above=0)
    check_range('batch_size', batch_size, least=1)
    check_range('block_size', block_size, least=0)
    check_range('saving', saving, least=0, below=1)
    if saving and kv_lora_rank:
        raise UserError('give one of --saving and --kv_lora_rank')
    if search_pairs and (not saving or rope_pairs >= 0):
        raise UserError('search_pairs needs --saving, and no --rope_pairs: it looks for those')
    if cache_dtype:
        check_choice('cache_dtype', cache_dtype, BITS)
    if export_dtype:
        check_choice('export_dtype', export_dtype, DTYPES)
        if not export:
            raise UserError('export_dtype is that of an export: name one by --export=FOLDER')


def check_places() -> None:
    """Raise a UserError where something could not be written after the work, or names nothing."""
    folders = dict(out=out)
    if heal:
        folders['healing'] = healed_folder(out)
    for name, folder in folders.items():
        if export and os.path.abspath(export) == os.path.abspath(folder):
            raise UserError(f'--export={export} is where {name} writes: name another folder')
    for path in filter(None, (out, export, teacher_cache)):
        check_can_be_made(path)
    if teacher_cache and os.path.isfile(teacher_cache):
        raise UserError(f'--teacher_cache={teacher_cache} is a file: name a folder')
    for name in OF_HEALING:
        if config[name] and not heal:
            raise UserError(f'{name} is a setting of healing: add --heal=TOKENS, or leave it out')


def check_rope_settings(source_config: GPTConfig) -> None:
    """Raise a UserError for settings of RoPE where the source has its pairs already."""
    if not has_latent(source_config):
        return
    for name in ROPE_SETTINGS:
        if name in config.given:
            raise UserError(
                f'{config.given[name]}: the source is MLA, whose pairs with RoPE stay as they '
                'are: leave it out'
            )


def effort_on(device: torch.device) -> Effort:
    """Return the effort by the settings; where they are 0, what takes minutes on `device`."""
    usual = ON_CPU if device.type == 'cpu' else ON_GPU
    return Effort(
        calibration_tokens=calibration_tokens or usual.calibration_tokens,
        eval_tokens=eval_tokens or usual.eval_tokens,
        layer_steps=usual.layer_steps if layer_steps < 0 else layer_steps,
    )


def conversion_settings(source_config: GPTConfig) -> ConversionSettings:
    """Return the conversion that the settings of this script ask for, with widths by `saving`."""
    pairs_are_free = not rope and rope_pairs < 0 and rope_heads == 'shared' and fold == 1
    pairs_are_free = pairs_are_free and not search_pairs and not has_latent(source_config)
    for_servers = bool(export) and pairs_are_free
    which_pairs = rope or 'turn'
    if for_servers:
        which_pairs = 'uniform'
    settings = ConversionSettings(
        kv_lora_rank=kv_lora_rank,
        rope_pairs=rope_pairs,
        rope=which_pairs,
        rope_heads=rope_heads,
        by_layer=by_layer and rope_heads == 'shared' and not export,
        fold=fold,
        components=components,
        real=real,
        low_rank=low_rank,
        ranks=ranks,
        q_lora_rank=q_lora_rank,
        rotate=rotate,
        seed=seed,
    )
    if saving:
        settings = settings_for_saving(source_config, saving, settings)
    if for_servers:
        settings = with_ordinary_frequencies(source_config, saving, settings)
    return settings


def healing_options(loaded: LoadedModel) -> dict[str, object]:
    """Return the settings of train.py that are passed on as they are, and the rate."""
    options = dict(device=device)
    if loaded.pretrained and not lora_rank:  # adapters want a higher rate than all weights do
        options['learning_rate'] = PRETRAINED_RATE
    return options | {name: config[name] for name in OF_HEALING if config[name]}


def to_be_searched(
    source_config: GPTConfig, settings: ConversionSettings, text: str
) -> ConversionSettings:
    """Return the settings with their widths left open. UserError where nothing can be searched."""
    if not text:
        raise UserError('search_pairs needs calibration text: name some')
    settings = replace(settings, rope_pairs=-1, kv_lora_rank=0)
    candidate_splits(source_config, saving, settings)
    return settings


def text_name(loaded: LoadedModel) -> str:
    """Return the dataset or file to calibrate on; '' for none."""
    if calibration == 'none':
        return ''
    if calibration:
        return calibration
    name = loaded.settings.get('dataset', '')
    if name and (token_files.find(name) / 'train.bin').exists():
        return name
    return ''


def window_size(source_config: GPTConfig) -> int:
    most = source_config.block_size
    if block_size > most:
        raise UserError(f'--block_size={block_size}: the source reads {most} tokens at a time')
    return block_size or min(most, LONGEST_WINDOW)


def read_text(name: str, loaded: LoadedModel, effort: Effort, device: torch.device) -> Text:
    """Cut the text into windows, on `device`."""
    c = loaded.model.config
    T = window_size(c)
    train, val, _ = tokens_of(name, c.vocab_size, loaded.meta, loaded.tokenizer)
    # With fewer tokens than channels the covariance would not have full rank.
    least = c.n_embd + 1
    windows = windows_of(train, effort.calibration_tokens, T, least, f'calibration={name}')
    held_out = windows_of(val, effort.eval_tokens, T + 1, what=f'the held-out part of {name}')
    return Text(name, windows.to(device), held_out.to(device))


# -------------------------------------------------------------------------------------------------
# converting


def convert_and_measure(model: GPT, text: Text | None, report: Report, to_fit: bool) -> GPT:
    """
    Convert `model`, and fit each layer where there is something to fit. Report the source, the step
    before the latent, the conversion, and what was fitted.
    """
    settings = report.settings
    bar = progress_bar(number_of_steps(model, text, settings, to_fit), 'step')

    def loss_of(model: GPT) -> float | None:
        if text is None:
            return None
        return mean_loss(model, text.held_out, batch_size, tick=bar.update)

    name = f'{model.config.label} (the source)'
    report.add(name, model, source_color(model), loss_of(model))
    moments = None
    if text is not None:
        moments = measure(model, text.windows, batch_size, bar.update)
        if search_pairs:
            splits = search_split(model, saving, settings, moments, text.windows, bar.update)
            report.splits, settings = splits, splits[0].settings
    if has_full_rank_step(model, text):
        full_rank = replace(
            settings,
            kv_lora_rank=0,
            low_rank='calibrated',
            ranks='equal',
            q_lora_rank=0,
            rotate=False,
        )
        partial, _ = convert(model, full_rank, moments, bar.update)
        report.add(full_rank_name(settings), partial, 'muted', loss_of(partial))
        del partial
    mla, report.layers = convert(model, settings, moments, bar.update)
    report.add(result_name(mla, settings), mla, 'mla', loss_of(mla))
    if to_fit:
        fit_or_restore(model, mla, text, report, bar.update)
    if cache_dtype:
        nats = quantised_loss(mla, text, bar.update)
        report.add(f'the same in {cache_dtype}', mla, 'mla', nats, cache_dtype)
    bar.close()
    return mla


def fit_or_restore(
    model: GPT, mla: GPT, text: Text, report: Report, tick: Callable[[], object]
) -> None:
    """
    Fit each layer of `mla`, the closed form in the last row of the report, to `model`. Report it.

    Where fitting costs too much on the held-out text, the closed form is restored.
    """
    closed_form = report.rows[-1]
    steps = report.effort['layer_steps']
    how = LayerwiseSettings(steps=steps, learning_rate=layer_lr, seed=seed)
    before = {name: p.clone() for name, p in mla.state_dict().items() if '.attn.' in name}
    errors = fit_layers(model, mla, text.windows, how, tick)
    fitted = mean_loss(mla, text.held_out, batch_size, tick=tick)
    report.add('the same, fitted layer by layer', mla, 'mla', fitted)
    if fitted <= closed_form.nats + MOST_LOST_BY_FITTING:
        for layer, error in zip(report.layers, errors):
            layer['error'] = error
    else:  # too little text for so many weights
        mla.load_state_dict(before, strict=False)
        undone = report.rows[-1]
        undone.name, undone.color = 'fit undone: calibrate on more text', ''
        report.rows[-2:] = undone, closed_form


def has_full_rank_step(model: GPT, text: Text | None) -> bool:
    """Return whether the report shows the model with RoPE on fewer pairs, before its latent."""
    return text is not None and not has_latent(model.config)


def number_of_steps(
    model: GPT, text: Text | None, settings: ConversionSettings, to_fit: bool
) -> int:
    """Return how often the progress bar is updated: by layers converted and batches read."""
    of_a_conversion = 2 * model.config.n_layer
    if text is None:
        return of_a_conversion
    conversions = 1 + has_full_rank_step(model, text)
    evaluations = 1 + conversions + to_fit + bool(cache_dtype)
    if search_pairs:
        conversions += len(candidate_splits(model.config, saving, settings))
    batches = len(text.windows.split(batch_size))
    batches += evaluations * len(text.held_out.split(batch_size))
    fitted_layers = model.config.n_layer if to_fit else 0
    return conversions * of_a_conversion + batches + fitted_layers


def quantised_loss(mla: GPT, text: Text | None, tick: Callable[[], object]) -> float | None:
    if text is None:
        return None
    return cached_loss(mla, text.held_out, cache_dtype, batch_size, tick)


def full_rank_name(settings: ConversionSettings) -> str:
    if settings.rope_pairs < 0:
        return 'RoPE on all pairs, full rank'
    if settings.rope_pairs == 0:
        return 'no RoPE, full rank'
    pairs = f'{settings.rope_pairs} pairs ({settings.rope}, {settings.rope_heads})'
    return f'RoPE on {pairs}, full rank'


def result_name(mla: GPT, settings: ConversionSettings) -> str:
    rank = f'{mla.config.kv_lora_rank} + {mla.config.qk_rope_head_dim}'
    if mla.config.kv_lora_ranks:
        rank = f'up to {rank}'
    return f'MLA, rank {rank} ({settings.low_rank})'


# -------------------------------------------------------------------------------------------------
# writing


def checkpoint_of(mla: GPT, loaded: LoadedModel, report: Report) -> dict:
    """Return a checkpoint of the result, with the history of the conversion."""
    history = dict(
        source=report.source,
        settings=report.history_settings,
        table=[row.as_dict() for row in report.rows],
        layers=report.layers,
        before=loaded.checkpoint.get('conversion'),
    )
    if report.splits:
        history |= dict(splits={split.name: split.error for split in report.splits})
    best_val_loss = float('nan')
    if report.text:
        best_val_loss = report.result.nats
    checkpoint = dict(
        kind=native.kind_of(mla),
        model_args=native.model_args(mla),
        model=mla.state_dict(),
        step=loaded.step or 0,
        config=dict(loaded.settings),
        conversion=history,
        commit=commit(),
        best_val_loss=best_val_loss,
    )
    # A model of another maker does not say how many steps it took.
    if loaded.trained and not loaded.step:
        checkpoint['pretrained'] = True
    meta, codec = loaded.meta, loaded.tokenizer
    if codec is not None:
        ends = sorted(codec.eos)
        origin = dict(bos_token_id=codec.bos, eos_token_id=ends, source=report.source)
        meta = meta | codec.meta | origin
    if meta:
        checkpoint['meta'] = meta
    return checkpoint


def write_outputs(mla: GPT, loaded: LoadedModel, report: Report, facts: str) -> None:
    """Write the folder `out`, all of it or nothing."""
    with replacing_folder(out) as aside:
        native.save(aside / 'ckpt.pt', checkpoint_of(mla, loaded, report))
        if loaded.tokenizer is not None:
            for file in loaded.tokenizer.files:
                copy_file(file, aside / file.name)
        with if_possible():
            draw_report(report, aside / 'conversion.png', facts)
    print(f'written: {out}/ckpt.pt')


def check_can_be_exported(loaded: LoadedModel, settings: ConversionSettings) -> None:
    """Raise a UserError where the result of `settings`, filled in, cannot be exported."""
    model = loaded.model
    ranks = [settings.kv_lora_rank] * model.config.n_layer
    config = mla_config(model.config, settings, ranks)
    if export.lower().endswith(GGUF):
        pairs = pairs_by_settings(model.config, settings)
        check_gguf(model, config, pairs, loaded.tokenizer)
    else:
        check_export(model, config)


def export_copy(folder: str) -> None:
    """Write the model in `folder` to `export`. `folder` stays, whatever happens."""
    converted = load_model(folder)
    write = export_gguf if export.lower().endswith(GGUF) else write_export
    weights = DTYPES.get(export_dtype)
    try:
        write(converted.model, export, converted.tokenizer, dtype=weights)
    except UserError as error:
        raise UserError(f'{error}; {folder} is written') from None
    loads_it = 'llama.cpp loads it'
    if not export.lower().endswith(GGUF):
        loads_it = servers_of(converted.model, weights)
    print(f'written: {export} ({loads_it})')


def print_next(source: str, loaded: LoadedModel, text: str, healed: str = '') -> None:
    """
    Print the next commands.

    text: what the model was calibrated on; healed: the folder of the healed model, where there is
    one
    """
    prepare, heal = [], []
    evaluate = ['eval.py', f'--models={",".join(filter(None, [source, out, healed]))}']
    sample = ['sample.py', f'--init_from={healed or out}']
    if loaded.tokenizer is not None and ChatTemplate.of(loaded.tokenizer) is not None:
        sample.append('--chat=True')
    dataset = loaded.settings.get('dataset', '')
    if text and not os.path.isfile(text):
        dataset = text
    elif text and loaded.tokenizer is not None:
        # The result's folder has the tokenizer, too, and stays where the source may not.
        dataset = f'{out.rstrip("/")}-tokens'
        prepare = ['data/text/prepare.py', text, f'--tokenizer={out}', f'--out={dataset}']
    if dataset and not healed:
        heal = ['train.py', 'config/heal_mla.py', f'--init_from={out}', f'--teacher={source}']
        heal.append(f'--dataset={dataset}')
        if loaded.pretrained:
            heal.append(f'--learning_rate={PRETRAINED_RATE}')
        if loaded.model.config.block_size > LONGEST_WINDOW:
            heal.append(f'--block_size={LONGEST_WINDOW}')
    if not loaded.settings.get('dataset'):
        evaluate.append(f'--data={text}')
    if not (dataset or text):
        evaluate = []
    commands = [prepare, heal, evaluate, sample]
    print_next_steps(*filter(None, commands))


def main(source: str) -> None:
    check_settings(source)
    picked_device = pick_device(device)
    loaded = load_model(source)
    model = loaded.model
    check_source(model)
    check_rope_settings(model.config)
    settings = conversion_settings(model.config)
    name = text_name(loaded)
    # Whatever cannot work is refused before the long computations.
    filled_in = settings.for_source(model.config, calibrated=bool(name))
    if export:
        check_can_be_exported(loaded, filled_in)
    to_fit = layerwise and bool(name) and not is_lossless(model.config, filled_in)
    if heal:
        check_dataset(name, source)
    effort = asdict(effort_on(picked_device))
    if search_pairs:
        settings = to_be_searched(model.config, settings, name)
        effort |= dict(saving=saving)
    report = Report(source, settings, name, cache_dtype, effort)
    if os.path.exists(out):
        check_is_the_same(out, source, report.history_settings)
        rest = 'healing' if heal else 'the export'
        print(f'{out} is there already: on with {rest}')
    else:
        model.to(picked_device).eval()
        model.stream = pick_dtype(dtype, picked_device)
        convert_and_write(loaded, report, to_fit)
    healed = ''
    if heal:
        T = window_size(model.config)
        healing = Healing(out, source, name, heal, T, batch_size, healing_options(loaded))
        heal_model(healing)
        healed = healing.out
    if export:
        export_copy(healed or out)
    print_next(source, loaded, name, healed)


def convert_and_write(loaded: LoadedModel, report: Report, to_fit: bool) -> None:
    """Convert the model on its device, print the report and write it with the result."""
    model, text = loaded.model, None
    where = model.lm_head.weight.device
    if report.text:
        text = read_text(report.text, loaded, effort_on(where), where)
    mla = convert_and_measure(model, text, report, to_fit)
    print_report(report)
    write_outputs(mla, loaded, report, f'commit {commit()} · {describe(where)}')


if __name__ == '__main__':
    main(source)
