"""The plan of the house, read from the imports: who may import whom, what loads late, and how long a script may be."""
import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = {'train', 'sample', 'bench', 'compare', 'evaluate', 'find_induction_heads', 'convert_mla', 'study_conversion', 'bench_adapters'}
ROOMS = dict(  # what each may import of this project; a script may import all of these
    configurator=set(),
    muon=set(),
    kernels=set(),
    figures={'configurator'},
    comparison={'configurator'},
    comparison_figures={'comparison', 'figures'},
    runs={'configurator'},
    head_page={'configurator', 'figures'},
    dataset={'configurator'},
    machine={'configurator'},
    cache={'configurator', 'decode_kernels', 'decode_libraries'},  # the kernels late
    decode_kernels={'kernels'},
    decode_libraries={'configurator'},
    step_kernels={'kernels', 'model'},  # the model late
    decoding={'configurator', 'step_kernels'},
    model={'configurator', 'decoding', 'kernels', 'step_kernels'},
    model_mla={'configurator', 'model'},
    checkpoint={'configurator', 'model', 'model_mla', 'deepseek'},  # deepseek late
    deepseek={'configurator', 'model', 'model_mla', 'hf_tokenizer'},  # not checkpoint, which loads it: no circle
    hf_tokenizer={'configurator'},
    adapters={'configurator', 'model'},
    packing={'model'},  # late
    finetuning={'configurator', 'model', 'kernels', 'adapters'},  # the last two late
    instructions={'configurator', 'dataset'},
    answers={'configurator'},
    peft_peer={'adapters', 'configurator', 'deepseek', 'finetuning'},
    cells={'adapters', 'answers', 'cache', 'calibration', 'configurator', 'conversion', 'deepseek', 'finetuning', 'instructions', 'machine', 'packing', 'peft_peer'},
    adapter_table={'dataset', 'figures'},
    trainer={'configurator', 'machine', 'muon', 'kernels'},
    patterns={'configurator'},
    circuits={'model', 'model_mla'},
    ablation={'model', 'patterns'},
    latents={'configurator', 'model_mla'},
    indirect_object={'configurator', 'model', 'patterns', 'ablation'},
    subject={'configurator', 'checkpoint', 'dataset'},
    head_report={'configurator', 'patterns', 'circuits', 'ablation', 'head_page'},
    head_figures={'configurator', 'figures'},
    peers={'configurator'},
    decode_meter={'configurator', 'cache', 'checkpoint', 'machine'},
    text_meter={'configurator', 'decode_meter', 'machine', 'peers'},
    attention_meter={'configurator', 'cache', 'decode_kernels', 'decode_libraries', 'decode_meter', 'machine'},
    decode_figures={'figures'},
    scale_figure={'figures'},
    scoring={'cache'},
    retrieval=set(),
    harness={'configurator', 'decoding', 'scoring'},
    scoreboard=set(),
    calibration={'configurator', 'dataset'},
    conversion={'configurator', 'model', 'model_mla'},
)
AT_ONCE = dict(configurator=set(), figures=set(), comparison=set(), comparison_figures=set(), runs=set(), head_page=set(), adapter_table=set(), decode_figures=set(), scale_figure=set(), dataset={'torch', 'numpy'},
               subject={'torch', 'numpy'}, packing={'torch', 'numpy'}, calibration={'torch', 'numpy'})  # packages loaded by the import itself; elsewhere:
USUAL, OF_SCRIPTS = {'torch'}, {'torch', 'numpy'}
HEAVY = {'transformers', 'peft', 'flashinfer', 'flash_mla', 'bitsandbytes', 'triton', 'wandb', 'datasets', 'tiktoken', 'matplotlib', 'tqdm', 'lm_eval', 'playwright', 'rouge_score'}

FILES = {path.stem: path for path in sorted(ROOT.glob('*.py'))}
every_file = pytest.mark.parametrize('name', FILES)


def imports(path):
    """(package, whether it is always loaded with the file: neither inside a function nor under an `if`) of every import."""
    found = set()

    def walk(node, at_once):
        if isinstance(node, ast.Import):
            found.update((alias.name.partition('.')[0], at_once) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f'{path.name}: flat modules have no relative imports'
            found.add((node.module.partition('.')[0], at_once))
        at_once = at_once and not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.If))
        for child in ast.iter_child_nodes(node):
            walk(child, at_once)

    walk(ast.parse(path.read_text()), True)
    return found


def test_imports_are_told_apart(tmp_path):
    path = tmp_path / 'x.py'
    path.write_text('import a.b, c\nif c:\n    from d.e import f\ntry:\n    import g\nexcept ImportError:\n    pass\n'
                    'class H:\n    import i\n    def j(self):\n        import k\n')
    assert imports(path) == {('a', True), ('c', True), ('d', False), ('g', True), ('i', True), ('k', False)}


@every_file
def test_every_file_has_its_room_and_keeps_to_it(name):
    assert name in ROOMS or name in SCRIPTS, f'{name}.py is not in the plan: give it a row in {Path(__file__).name}'
    allowed = ROOMS.get(name, set(ROOMS))  # scripts never import scripts
    inside = {package for package, _ in imports(FILES[name]) if package in FILES}
    assert inside <= allowed, f'{name}.py may not import {inside - allowed}'


@every_file
def test_packages_that_load_at_once_are_few(name):
    allowed = AT_ONCE.get(name, OF_SCRIPTS if name in SCRIPTS else USUAL) | sys.stdlib_module_names | FILES.keys()
    assert {package for package, at_once in imports(FILES[name]) if at_once} <= allowed


def test_checkpoint_loads_the_shim_late():
    assert ('deepseek', False) in imports(FILES['checkpoint']) and ('deepseek', True) not in imports(FILES['checkpoint'])


def test_the_trainer_loads_kernels_late():
    assert ('kernels', False) in imports(FILES['trainer']) and ('kernels', True) not in imports(FILES['trainer'])


def test_the_configurator_needs_python_alone():
    assert {package for package, _ in imports(FILES['configurator'])} <= sys.stdlib_module_names


@pytest.mark.parametrize('path', [*FILES.values(), *sorted((ROOT / 'data').rglob('*.py'))], ids=lambda path: str(path.relative_to(ROOT)))
def test_heavy_packages_load_late(path):
    assert not {package for package, at_once in imports(path) if at_once} & HEAVY


@every_file
def test_what_can_be_read_in_one_sitting(name):
    lines = len(FILES[name].read_text().splitlines())
    if name in SCRIPTS:
        assert lines <= 350
    if name == 'model':
        assert lines <= 420


@pytest.mark.parametrize('name', [name for name in FILES if name in SCRIPTS])
def test_help_comes_without_torch(name, tmp_path):
    done = subprocess.run([sys.executable, '-X', 'importtime', str(FILES[name]), '--help'], cwd=tmp_path, capture_output=True, text=True)
    loaded = {line.rpartition('|')[2].strip() for line in done.stderr.splitlines()}
    assert done.returncode == 0 and done.stdout.startswith(f'usage: python {name}.py') and 'configurator' in loaded
    assert not {package for package in loaded if package.partition('.')[0] in {'torch', 'numpy'} | HEAVY}
