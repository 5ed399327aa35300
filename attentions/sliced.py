"""
MLA without W^DKV: the latent is a slice of the residual stream.

    c_kv = norm(x[: R])        (MLA: norm(W^DKV x))

x is what the attention reads, after the block's norm. The rest is MLA with its rotated key k_pe.
Open training runs found that this trains about as well as a learned latent (Marin, 2025, on a
mixture of experts of 1,024 channels), so it is the control for what W^DKV is worth.

Legend: as in model_mla.py.
"""

from dataclasses import dataclass

from model import Linear
from model_mla import GPT_MLA, MLAConfig, MultiHeadLatentAttention


@dataclass
class SlicedConfig(MLAConfig):
    def __post_init__(self):
        super().__post_init__()
        if self.kv_lora_rank > self.n_embd:
            raise ValueError(
                f'kv_lora_rank={self.kv_lora_rank} is wider than n_embd={self.n_embd}, of which '
                'the latent is a slice'
            )

    @property
    def label(self) -> str:
        return 'MLA, sliced latent'


class SlicedLatentAttention(MultiHeadLatentAttention):
    can_absorb = True
    scale_logits = MultiHeadLatentAttention.scale_logits

    def __init__(self, config: SlicedConfig, layer: int = 0):
        super().__init__(config, layer)
        del self.kv_a_proj_with_mqa
        if self.pe:
            self.k_pe_proj = Linear(config.n_embd, self.pe, bias=config.bias)  # W^KR

    def latent(self, x, rope):
        c_kv = self.kv_a_layernorm(x[..., : self.a_widths[0]])
        if not self.pe:
            return c_kv, x[..., :0]
        (k_pe,) = self.normed(self.k_pe_proj(x))
        return c_kv, self.rotated(k_pe[:, :, None], rope)[:, :, 0]


class GPT_Sliced(GPT_MLA):
    Config, Attention = SlicedConfig, SlicedLatentAttention
