"""
The peer of the adapter benchmark: the same model, adapters and data by transformers and PEFT.

As their documentation has it: gradient checkpointing, their own loss, no compiler.
"""

import torch
import torch.nn as nn

from nanomla.adapters import lora
from nanomla.adapters.adapted import AdaptedModel, CellSettings, Prompts
from nanomla.adapters.lora import INSTALL, UnavailableError
from nanomla.adapters.packing import Batch
from nanomla.checkpoints import hf
from nanomla.core.checks import split_list

PEER_KERNELS = {  # our kernels -> transformers' attn_implementation
    'eager': 'eager',
    'sdpa': 'sdpa',
    'flash': 'flash_attention_2',
    'flex': 'flex_attention',
}


class Peer(AdaptedModel):
    """
    transformers' model, adapted by PEFT as `kind` says.

    UnavailableError when transformers has no such kernel, or not here.
    """

    cache = 'DynamicCache'

    def __init__(
        self,
        s: CellSettings,
        kind: str,
        kernel: str,
        device: torch.device,
        stream: torch.dtype,
        calibration_rows: torch.Tensor | None = None,
    ):
        if kernel not in PEER_KERNELS:
            raise UnavailableError('transformers has no such kernel')
        if kernel == 'flex' and device.type == 'cpu':
            raise UnavailableError('FlexAttention does not train on the CPU')
        self.s, self.device, self.stream = s, device, stream
        shape = hf.read_shape(s.model)
        self.tokenizer = hf.tokenizer_of(s.model, shape)
        model = self.load(kind, kernel, shape)
        for module in model.modules():  # as our in_four_bits has it
            if hasattr(module, 'support_avx512bf16_for_cpu'):
                module.support_avx512bf16_for_cpu = False
        self.flops = flops_per_token(model, s.block_size, kind)
        whole = sum(lora.size(p) for p in model.parameters())
        self.parameters = (whole, whole)
        if kind != 'full':
            model = self.with_adapters(model)
            trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
            self.parameters = (trainable, whole + trainable)
        self.setting = 'nothing recomputed'
        if s.peer_checkpointing:
            self.setting = 'gradient checkpointing'
            how = dict(use_reentrant=False)
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)
        self.model = model.train()

    def load(self, kind: str, kernel: str, shape: dict) -> nn.Module:
        try:
            import transformers
        except ImportError as error:
            raise UnavailableError(f'the peer needs transformers: {INSTALL} ({error})') from None
        dtype = self.s.weights_dtype(kind, self.stream)
        how = dict(attn_implementation=PEER_KERNELS[kernel], dtype=dtype)
        in_four_bits = kind == 'qlora'
        try:
            if not self.s.has_random_weights:
                if in_four_bits:
                    how['quantization_config'] = transformers.BitsAndBytesConfig(
                        load_in_4bit=True,
                        bnb_4bit_quant_type='nf4',
                        bnb_4bit_compute_dtype=self.stream,
                        bnb_4bit_use_double_quant=self.s.double_quant,
                    )
                how['device_map'] = {'': str(self.device)}
                return transformers.AutoModelForCausalLM.from_pretrained(self.s.model, **how)
            settings = {key: value for key, value in shape.items() if key != 'model_type'}
            config = transformers.LlamaConfig(**settings)
            with torch.device(self.device):
                model = transformers.AutoModelForCausalLM.from_config(config, **how)
        except (ImportError, ValueError) as error:
            reason = ' '.join(str(error).split())
            raise UnavailableError(reason[:200]) from None
        if in_four_bits:
            quantise(model, self.stream, self.s.double_quant)
        return model

    def with_adapters(self, model: nn.Module) -> nn.Module:
        try:
            from peft import LoraConfig, get_peft_model
        except ImportError as error:
            raise UnavailableError(f'the peer needs peft: {INSTALL} ({error})') from None
        targets = split_list(self.s.targets)
        if targets == ['all']:
            targets = linears_of_layers(model)
        config = LoraConfig(
            r=self.s.lora_r,
            lora_alpha=self.s.lora_alpha,
            lora_dropout=self.s.lora_dropout,
            target_modules=targets,
            task_type='CAUSAL_LM',
        )
        return get_peft_model(model, config)

    def forward(self, batch: Batch, **more):
        positions = batch.documents.positions if batch.documents else None
        return self.model(input_ids=batch.idx, position_ids=positions, use_cache=False, **more)

    def loss(self, batch, count):
        # transformers shifts the labels itself.
        first = torch.full_like(batch.targets[:, :1], -1)
        labels = torch.cat([first, batch.targets[:, :-1]], dim=1)
        labels = labels.masked_fill(labels < 0, -100)
        return self.forward(batch, labels=labels, num_items_in_batch=count).loss

    def likeliest(self, batch):
        return self.forward(batch).logits.argmax(-1)

    def answers(self, asked):
        for prompts, n in asked:
            yield self.answer(prompts, n)

    def answer(self, prompts: Prompts, n: int) -> torch.Tensor:
        """Return n greedy tokens after each prompt, (B, n)."""
        from transformers import GenerationConfig

        longest = max(map(len, prompts))
        idx = torch.zeros(len(prompts), longest, dtype=torch.long)
        mask = torch.zeros_like(idx)
        for row, prompt in enumerate(prompts):
            idx[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask[row, longest - len(prompt) :] = 1
        config = GenerationConfig(
            max_new_tokens=n,
            min_new_tokens=n,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            use_cache=True,
        )
        ids = self.model.generate(
            input_ids=idx.to(self.device),
            attention_mask=mask.to(self.device),
            generation_config=config,
        )
        return ids[:, longest:]


def linears_of_layers(model: nn.Module) -> list[str]:
    """Return the names of all Linears in the layers of transformers' model, each once."""
    names = {}
    for path, module in model.model.layers.named_modules():
        if isinstance(module, nn.Linear):
            names[path.rpartition('.')[2]] = None
    return list(names)


def flops_per_token(model: nn.Module, T: int, kind: str) -> float:
    """Return `step.flops_per_token` of transformers' model, before it has adapters."""
    c = model.config
    weights = c.vocab_size * c.hidden_size
    for module in model.model.layers.modules():
        if isinstance(module, nn.Linear):
            weights += lora.size(module.weight)
    qk_width = getattr(c, 'qk_head_dim', c.head_dim)
    v_width = getattr(c, 'v_head_dim', c.head_dim)
    attention = c.num_hidden_layers * T * c.num_attention_heads * (qk_width + v_width)
    per_weight = 6 if kind == 'full' else 4
    return per_weight * weights + 3.5 * attention


def quantise(model: nn.Module, stream: torch.dtype, double: bool) -> None:
    """Turn the Linears of transformers' layers into 4-bit ones, as from_pretrained loads them."""
    for layer in model.model.layers:
        for part in (layer.self_attn, layer.mlp):
            for name, linear in lora.linears_of(part):
                setattr(part, name, lora.in_four_bits(linear, stream, double))
    # What from_pretrained sets and PEFT asks for.
    model.is_loaded_in_4bit = True
