"""Load a model by its name: a checkpoint, GPT-2, or a folder or hub name of another model."""

import re
from pathlib import Path

from nanomla.checkpoints.gpt2 import HUB, from_pretrained, is_gpt2
from nanomla.checkpoints.native import build, load


def load_model(init_from, **changes):
    """
    A model and its checkpoint dict, from a file or a folder with ckpt.pt, 'gpt2*', a folder of the Hugging Face
    layout (GPT-2, Llama, dense DeepSeek-V3), a name on its hub (organisation/model) or 'random:NAME'.
    Of a foreign model the dict holds its tokenizer as 'codec', where it has one, and nothing else. A tokenizer.json beside a
    ckpt.pt is its codec.
    """
    init_from, path = str(init_from), Path(init_from)
    if init_from in HUB or is_gpt2(path):
        return from_pretrained(init_from, **changes), {}
    if (
        (path / 'config.json').exists()
        or init_from.startswith('random:')
        or (
            re.fullmatch(r'[\w-]+/[\w.-]+', init_from)
            and path.suffix != '.pt'
            and not path.exists()
            and not path.parent.exists()
        )
    ):
        from nanomla.checkpoints import hf as deepseek  # late: few models need it
        from nanomla.checkpoints import hub

        model, codec = deepseek.load(init_from, **changes)
        return model, dict(codec=codec) if codec else {}
    content = load(init_from)
    folder = Path(content['path']).parent
    if (
        folder / 'tokenizer.json'
    ).exists():  # of a foreign model, which was converted or trained on
        from nanomla.checkpoints import hf as deepseek
        from nanomla.checkpoints import hub

        content['codec'] = deepseek.tokenizer_of(hub.finder(str(folder)), content.get('meta') or {})
    return build(content, **changes), content
