"""
The peer of the adapter benchmark: the same model, adapters and data by transformers and PEFT, as their documentation
has it, with gradient checkpointing, their own loss and no compiler. `Peer` has the interface of cells.Ours.
"""

import torch
import torch.nn as nn

from nanomla.adapters import lora as adapters
from nanomla.adapters.step import NotHere
from nanomla.checkpoints import hf as deepseek
from nanomla.core.configurator import UserError

PEER_KERNELS = {
    'eager': 'eager',
    'sdpa': 'sdpa',
    'flash': 'flash_attention_2',
    'flex': 'flex_attention',
}


class Peer:
    """LlamaForCausalLM, adapted as `kind` says. NotHere when transformers has no such kernel here."""

    def __init__(self, s, kind, kernel, device, stream, calibration_rows=None):
        try:
            import transformers
            from peft import LoraConfig, get_peft_model
        except ImportError as error:
            raise UserError(
                f'the peer needs transformers and peft: pip install -e .[adapters] ({error})'
            ) from None
        if kernel == 'flex' and device.type == 'cpu':
            raise NotHere('FlexAttention does not train on the CPU')
        self.s, self.device, self.kernel = s, device, kernel
        self.tokenizer, self.storage, self.cache, self.causal = None, None, 'DynamicCache', True
        dtype = torch.float32 if kind == 'full' and s.master_weights else stream
        how = dict(attn_implementation=PEER_KERNELS[kernel], dtype=dtype)
        try:
            if s.model.startswith('random:'):
                config = transformers.LlamaConfig(
                    **{
                        key: value
                        for key, value in deepseek.SHAPES[s.model.removeprefix('random:')].items()
                        if key != 'model_type'
                    }
                )
                with torch.device(device):
                    model = transformers.AutoModelForCausalLM.from_config(config, **how)
                if kind == 'qlora':
                    quantise(model, stream, s.double_quant)
            else:
                four = (
                    dict(
                        quantization_config=transformers.BitsAndBytesConfig(
                            load_in_4bit=True,
                            bnb_4bit_quant_type='nf4',
                            bnb_4bit_compute_dtype=stream,
                            bnb_4bit_use_double_quant=s.double_quant,
                        )
                    )
                    if kind == 'qlora'
                    else {}
                )
                model = transformers.AutoModelForCausalLM.from_pretrained(
                    s.model, device_map={'': str(device)}, **how, **four
                )
        except (ImportError, ValueError) as error:
            raise NotHere(' '.join(str(error).split())[:200]) from None
        for module in model.modules():
            if hasattr(module, 'support_avx512bf16_for_cpu'):
                module.support_avx512bf16_for_cpu = False
        self.parameters = [sum(map(adapters.size, model.parameters()))] * 2
        if kind != 'full':
            targets = (
                ['q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj', 'up_proj', 'down_proj']
                if s.targets == 'all'
                else s.targets.split(',')
            )
            how = LoraConfig(
                r=s.lora_r,
                lora_alpha=s.lora_alpha,
                lora_dropout=s.lora_dropout,
                target_modules=targets,
                task_type='CAUSAL_LM',
            )
            model = get_peft_model(model, how)
            trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
            self.parameters = [trainable, self.parameters[1] + trainable]
        if s.peer_checkpointing:
            model.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs=dict(use_reentrant=False)
            )
        self.model, self.setting = (
            model.train(),
            'gradient checkpointing' if s.peer_checkpointing else 'nothing recomputed',
        )
        c = model.config
        kv = c.num_key_value_heads * c.hidden_size // c.num_attention_heads
        weights = (
            c.num_hidden_layers
            * c.hidden_size
            * (2 * c.hidden_size + 2 * kv + 3 * c.intermediate_size)
        )
        self.flops = (6 if kind == 'full' else 4) * (
            weights + c.vocab_size * c.hidden_size
        ) + 7 * c.num_hidden_layers * s.block_size * c.hidden_size

    def set_up(self, documents):
        pass

    def run(self, batch, **more):
        positions = batch.documents.positions if batch.documents else None
        return self.model(input_ids=batch.idx, position_ids=positions, use_cache=False, **more)

    def loss_of(self, model, batch, count):
        labels = torch.cat(
            [torch.full_like(batch.targets[:, :1], -1), batch.targets[:, :-1]], dim=1
        )
        return self.run(
            batch, labels=labels.masked_fill(labels < 0, -100), num_items_in_batch=count
        ).loss

    def likeliest(self, batch):
        return self.run(batch).logits.argmax(-1)

    def answers(self, asked):
        return (self.generate(prompts, n) for prompts, n in asked)

    def generate(self, prompts, new):
        from transformers import GenerationConfig

        longest = max(map(len, prompts))
        idx = torch.tensor(
            [[0] * (longest - len(p)) + list(p) for p in prompts], device=self.device
        )
        mask = torch.tensor(
            [[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=self.device
        )
        config = GenerationConfig(
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            use_cache=True,
        )
        return self.model.generate(input_ids=idx, attention_mask=mask, generation_config=config)[
            :, longest:
        ]


def quantise(model, stream, double):
    """The Linears of transformers' layers as bitsandbytes', as from_pretrained would load them."""
    for layer in model.model.layers:
        for part in (layer.self_attn, layer.mlp):
            for name, linear in list(part.named_children()):
                if isinstance(linear, nn.Linear):
                    setattr(part, name, adapters.in_four_bits(linear, stream, double))
    model.is_loaded_in_4bit = True
