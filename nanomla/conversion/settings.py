"""
What a conversion to MLA is asked for, and which widths follow from it.

Legend: H query heads, K key/value heads, D their width, F = D / 2 pairs of dimensions in a head,
one for each frequency of RoPE; R kv_lora_rank, P the width of k_pe.
"""

from dataclasses import dataclass, replace

from model import GPTConfig
from nanomla.conversion.source import has_latent
from nanomla.core.checks import check_choice, check_range
from nanomla.core.configurator import UserError
from nanomla.inference.quantize import group_of

CHOICES = dict(
    rope=('high', 'low', 'uniform', '2-norm', 'turn'),
    rope_heads=('own', 'shared'),
    low_rank=('split', 'joint', 'calibrated', 'balanced', 'attention'),
    ranks=('equal', 'spectrum', 'residual'),
    components=('scores', 'keys'),
)
SHARES_OF_K_PE = (1 / 6, 1 / 4, 1 / 3, 5 / 12, 1 / 2)  # of a cache, that a search tries
CHANNEL_GROUP = 8  # channels of a quantised cache that share a scale, at least, where it can be


@dataclass(frozen=True)
class ConversionSettings:
    """
    The choices of a conversion. UserError for a value that no source allows.

    `for_source` checks the numbers against a model and fills in those that are derived.
    """

    kv_lora_rank: int = 0  # R; 0 = full; where ranks differ the mean of the layers
    rope_pairs: int = -1  # pairs with RoPE: of each kv head (own), or of all (shared); -1 = all
    rope: str = 'turn'  # which pairs keep RoPE, see rope_pairs.py
    rope_heads: str = 'shared'  # own: pairs of each kv head | shared: components over the kv heads
    by_layer: bool = False  # shared: each layer keeps its own components, not all the same
    fold: int = 1  # shared: neighbouring frequencies treated as one (FreqFold)
    components: str = 'scores'  # shared: of what they are the principal ones, see rope_pairs.py
    real: bool = False  # shared: components by real rotations only, as in RoRoPE
    low_rank: str = 'attention'  # which error the latent minimises, see low_rank.py
    ranks: str = 'equal'  # layers share R · n_layer by their singular values, see low_rank.py
    q_lora_rank: int = 0  # latent width of the query; 0 = none
    rotate: bool = False  # rotate the latent at random, so that no channel is an outlier
    seed: int = 0  # of the rotation

    def __post_init__(self):
        for name, choices in CHOICES.items():
            check_choice(name, getattr(self, name), choices)
        check_range('kv_lora_rank', self.kv_lora_rank, least=0)
        check_range('q_lora_rank', self.q_lora_rank, least=0)
        check_range('rope_pairs', self.rope_pairs, least=-1)
        check_range('fold', self.fold, least=1)
        if self.fold > 1 and not self.shared:
            raise UserError(f'fold={self.fold} needs rope_heads=shared')

    @property
    def shared(self) -> bool:
        """Whether k_pe holds components that all kv heads share."""
        return self.rope_heads == 'shared'

    @property
    def ranks_differ(self) -> bool:
        return self.ranks != 'equal'

    @property
    def reads_text(self) -> bool:
        """Whether the low rank is fitted to activations, not to the weights alone."""
        return self.low_rank in ('calibrated', 'balanced', 'attention')

    def for_source(self, config: GPTConfig, calibrated: bool) -> 'ConversionSettings':
        """
        Return the settings with rope_pairs and kv_lora_rank filled in for a source of `config`.

        calibrated: whether there are moments of its activations (calibration.py). UserError for
        what does not fit the source, or needs text.
        """
        most = most_rope_pairs(config, self)
        if self.rope_pairs > most:
            raise UserError(
                f'rope_pairs={self.rope_pairs}: the source has {pairs_in_words(config, self)}; '
                f'use 0 to {most}, or -1 for all'
            )
        rope_pairs = most if self.rope_pairs < 0 else self.rope_pairs
        settings = replace(self, rope_pairs=rope_pairs)
        if has_latent(config) and self.low_rank == 'split':
            raise UserError('low_rank=split: keys and values of an MLA source share one latent')
        if has_latent(config) and not self.q_lora_rank:
            settings = replace(settings, q_lora_rank=config.q_lora_rank)

        full = full_rank(config, settings)
        if self.kv_lora_rank > full:
            raise UserError(
                f'kv_lora_rank={self.kv_lora_rank} is above the full rank of keys and values, '
                f'{full}: use 1 to {full}, or 0 for all of it'
            )
        if self.q_lora_rank > config.n_embd:
            raise UserError(
                f'q_lora_rank={self.q_lora_rank} is above the full rank of the query, '
                f'{config.n_embd}: use 1 to {config.n_embd}, or 0 for no latent'
            )
        chooses_pairs = not self.shared and self.rope in ('2-norm', 'turn')
        leaves_pairs_out = 0 < rope_pairs < most
        if not calibrated and (self.reads_text or chooses_pairs and leaves_pairs_out):
            raise UserError(
                f'rope={self.rope} with low_rank={self.low_rank} needs calibration text: name '
                'some, or use rope=uniform and low_rank=joint'
            )
        return replace(settings, kv_lora_rank=self.kv_lora_rank or full)


# -------------------------------------------------------------------------------------------------
# widths, in numbers of a token in a layer


def most_rope_pairs(config: GPTConfig, settings: ConversionSettings) -> int:
    """Return how many pairs have RoPE in the source: in a kv head, or (shared) in all of them."""
    if has_latent(config):
        return config.qk_rope_head_dim // 2
    if config.pos != 'rope':
        return 0
    pairs = config.head_dim // 2
    if settings.shared:
        return pairs * config.n_kv_head
    return pairs


def pairs_in_words(config: GPTConfig, settings: ConversionSettings) -> str:
    most = most_rope_pairs(config, settings)
    if not most:
        return f'pos={config.pos}, which has no RoPE'
    if settings.shared:
        return f'{most} pairs in all kv heads together'
    return f'{most} pairs in a head'


def pair_width(config: GPTConfig, settings: ConversionSettings) -> int:
    """Return what one of rope_pairs adds to the width of k_pe."""
    if settings.shared or has_latent(config):
        return 2
    return 2 * config.n_kv_head


def pe_width(config: GPTConfig, settings: ConversionSettings) -> int:
    """Return P, the width of k_pe, for settings whose rope_pairs are filled in."""
    return pair_width(config, settings) * settings.rope_pairs


def nope_width(config: GPTConfig, settings: ConversionSettings) -> int:
    """Return N, the width of a head without position, for settings with rope_pairs filled in."""
    width = pe_width(config, settings)
    if width == 0:
        return config.head_dim
    if width == config.n_kv_head * config.head_dim:  # every pair keeps RoPE
        return 0
    if settings.shared:  # k_nope is what the components leave of the whole key
        return config.head_dim
    return config.head_dim - 2 * settings.rope_pairs


def full_rank(config: GPTConfig, settings: ConversionSettings) -> int:
    """Return the smallest kv_lora_rank without loss, for settings with rope_pairs filled in."""
    if has_latent(config):
        return config.kv_lora_rank
    C = config.n_embd
    value_rows = config.n_kv_head * config.head_dim
    key_rows = value_rows
    if config.pos == 'rope':
        key_rows -= pe_width(config, settings)
    if settings.low_rank == 'split':
        return min(C, key_rows) + min(C, value_rows)
    return min(C, key_rows + value_rows)


def is_lossless(config: GPTConfig, settings: ConversionSettings) -> bool:
    """Return whether nothing is left out, for settings that `for_source` has filled in."""
    all_pairs = settings.rope_pairs == most_rope_pairs(config, settings)
    full_query = settings.q_lora_rank in (0, config.n_embd)
    if has_latent(config):
        full_query = settings.q_lora_rank == config.q_lora_rank
    return all_pairs and full_query and settings.kv_lora_rank == full_rank(config, settings)


def cache_width(config: GPTConfig, saving: float) -> int:
    """Return how many numbers of a token are cached in a layer after `saving` that share."""
    return int((1 - saving) * 2 * config.n_kv_head * config.head_dim + 1e-9)


def split_cache(config: GPTConfig, saving: float, settings: ConversionSettings) -> tuple[int, int]:
    """
    Return rope_pairs and kv_lora_rank that leave 1 - `saving` of the cache of `config`.

    Without settings.rope_pairs (-1) a third of what is left is for k_pe, and more where the full
    rank does not need the rest. A rank below 1 means that nothing fits. In an MLA model only the
    latent shrinks.
    """
    if has_latent(config):
        whole = config.kv_lora_rank + config.qk_rope_head_dim
        rank = int((1 - saving) * whole + 1e-9) - config.qk_rope_head_dim
        return config.qk_rope_head_dim // 2, divided_well(rank, most_spare=whole // 200)
    width = pair_width(config, settings)
    left = cache_width(config, saving)
    pairs = settings.rope_pairs
    if pairs < 0:
        pairs = derived_pairs(config, left, settings)
    full = full_rank(config, replace(settings, rope_pairs=pairs))
    rank = left - width * pairs
    if rank >= full:
        return pairs, full
    further = rank % CHANNEL_GROUP // width
    may_have_more = settings.rope_pairs < 0 < pairs <= config.head_dim // 2 - further
    if rank > 2 * CHANNEL_GROUP and may_have_more:
        pairs += further
        rank -= width * further
    return pairs, divided_well(rank, most_spare=cache_width(config, 0) // 200)


def derived_pairs(config: GPTConfig, left: int, settings: ConversionSettings) -> int:
    """Return how many pairs keep RoPE, where `left` numbers of a token are cached in a layer."""
    most, width = most_rope_pairs(config, settings), pair_width(config, settings)
    if most == 0:
        return 0
    pairs = max(1, min(config.head_dim // 2, left // (3 * width)))
    while pairs < most:
        surplus = left - width * pairs - full_rank(config, replace(settings, rope_pairs=pairs))
        if surplus < width:
            break
        pairs = min(most, pairs + max(1, surplus // (2 * width)))
    return pairs


def divided_well(rank: int, most_spare: int) -> int:
    """
    Return `rank`, or up to `most_spare` less, whichever divides into large groups: the channels of
    a quantised cache that share a scale.
    """
    best = rank
    for candidate in range(rank, max(rank - most_spare, 1) - 1, -1):
        if candidate % CHANNEL_GROUP == 0:
            return candidate
        if group_of(candidate) > group_of(best):
            best = candidate
    return best


def settings_for_saving(
    config: GPTConfig, saving: float, settings: ConversionSettings
) -> ConversionSettings:
    """Return the settings with the widths of `split_cache`. UserError where no latent fits."""
    pairs, rank = split_cache(config, saving, settings)
    if rank < 1:
        raise UserError(
            f'saving={saving} leaves no room for a latent beside {pairs} pairs of k_pe: save less, '
            'use fewer rope_pairs, or rope_heads=shared'
        )
    return replace(settings, rope_pairs=pairs, kv_lora_rank=rank)


def candidate_splits(
    config: GPTConfig, saving: float, settings: ConversionSettings
) -> list[ConversionSettings]:
    """Return the settings with the widths of `split_cache`, then with other shares for k_pe."""
    if has_latent(config) or most_rope_pairs(config, settings) == 0:
        raise UserError('search_pairs needs a source with RoPE that is no MLA model yet')
    found = [settings_for_saving(config, saving, settings)]
    left, width = cache_width(config, saving), pair_width(config, settings)
    for share in SHARES_OF_K_PE:
        rank = round((1 - share) * left / CHANNEL_GROUP) * CHANNEL_GROUP
        pairs = min((left - rank) // width, most_rope_pairs(config, settings))
        if rank < 1 or pairs < 1:
            continue
        split = settings_for_saving(config, saving, replace(settings, rope_pairs=pairs))
        if split not in found:
            found.append(split)
    return found


def with_ordinary_frequencies(
    config: GPTConfig, saving: float, settings: ConversionSettings
) -> ConversionSettings:
    """
    Return the settings with so many pairs that every n-th of the source's frequencies is an
    ordinary RoPE: the largest divisor of a head's pairs up to theirs. The latent gets the rest.
    """
    pairs_in_head = config.head_dim // 2
    if not 0 < settings.rope_pairs <= most_rope_pairs(config, settings):
        return settings  # none, or all of them
    pairs = max(p for p in range(1, settings.rope_pairs + 1) if pairs_in_head % p == 0)
    settings = replace(settings, rope_pairs=pairs)
    if saving:
        settings = settings_for_saving(config, saving, settings)
    return settings
