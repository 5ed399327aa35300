"""
The early latent block of the nanoGPT-MLA experiments: MLA without RoPE, norm and decoupled key.

    c = W^D x        k = W^UK c        v = W^UV c        q = W^Q x

with learned positions in the embedding and GPT-2's initialisation, 0.02 for all matrices. Kept to
repeat early results: two stacked matrices of that size leave hardly any signal at first.

Legend: as in model_mla.py; n_latent is R.
"""

from dataclasses import dataclass

from model_mla import GPT_MLA, MLAConfig, MultiHeadLatentAttention

FIXED = dict(qk_rope_head_dim=0, latent_norm=False, latent_init='gpt2', pos='learned')


@dataclass
class EarlyConfig(MLAConfig):
    n_latent: int = 384  # width of the latent of keys and values

    def __post_init__(self):
        self.kv_lora_rank = self.n_latent
        for name, value in FIXED.items():
            setattr(self, name, value)
        super().__post_init__()

    @property
    def label(self) -> str:
        return 'Early latent'


class EarlyLatentAttention(MultiHeadLatentAttention):
    can_absorb = True
    fused_step = MultiHeadLatentAttention.fused_step
    circuit_weights = MultiHeadLatentAttention.circuit_weights
    scale_logits = MultiHeadLatentAttention.scale_logits


class GPT_Early(GPT_MLA):
    Config, Attention = EarlyConfig, EarlyLatentAttention
