"""README.md, CONTRIBUTING.md and docs/ name files, options and folders that exist."""

import re
import shlex
import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from nanomla.core import configurator
from nanomla.core.files import ROOT

PAGES = [ROOT / 'README.md', ROOT / 'CONTRIBUTING.md', *sorted((ROOT / 'docs').glob('*.md'))]
DOCS = [page for page in PAGES if page.parent.name == 'docs']
IMAGES = sorted(path.name for path in (ROOT / 'assets').glob('*.png'))
LOGS = sorted(path.name for path in (ROOT / 'assets/logs').glob('*.jsonl'))
# Scripts that have the settings of train.py as well.
ALSO_TRAIN = ('bench.py', 'compare.py')
EXAMPLE = dict(window=8)  # the setting of the attention in docs/add_an_attention.md
JOBS = {
    'slurm/train.sbatch': 'train.py',
    'slurm/compare.sbatch': 'compare.py',
    'slurm/adapters.sbatch': 'bench_adapters.py',
}
STUDY = 'nanomla/comparison/conversion_study.py'
# Words after -- that are no settings: the form of an option, and options of torchrun and sbatch.
NO_SETTINGS = {'key', 'help', 'nodes', 'array', 'time'}
NO_SETTINGS |= {'nproc_per_node', 'standalone', 'max_restarts', 'rdzv_conf', 'local_addr'}

every_page = pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)


@dataclass
class Command:
    script: str  # its file, relative to the repository
    words: list[str]  # its arguments


# -------------------------------------------------------------------------------------------------
# reading a page


def code_lines(page):
    """Return the lines of a page's code blocks: indented or fenced, continued lines joined."""
    lines, fenced = [], False
    for line in page.read_text().splitlines():
        if line.startswith('```'):
            fenced = not fenced
        elif fenced or line.startswith('    '):
            lines.append(line.strip())
    return '\n'.join(lines).replace('\\\n', ' ').split('\n')


def inline_code(page):
    """Return what stands in backticks."""
    text = re.sub(r'^```.*?^```', '', page.read_text(), flags=re.MULTILINE | re.DOTALL)
    return re.findall(r'`([^`\n]+)`', text)


def commands(page):
    """Return the commands of a page that run a script of ours."""
    found = []
    for line in code_lines(page):
        for part in re.split(r'&&|\|', line):
            command = command_of(part)
            if command is not None:
                found.append(command)
    return found


def command_of(text):
    """Return the Command that a line runs; None where it is none, or another program's."""
    try:
        words = shlex.split(text, comments=True)
    except ValueError:  # a formula, or Python
        return None
    if not words or words[0] not in ('python', 'torchrun', 'sbatch'):
        return None
    if words[1:2] == ['-m']:
        if not words[2].startswith('nanomla.'):
            return None
        return Command(words[2].replace('.', '/') + '.py', words[3:])
    for i, word in enumerate(words):
        if word.endswith(('.py', '.sbatch')) and i > 0:
            return Command(JOBS.get(word, word), words[i + 1 :])
    return None


@cache
def settings_of(script):
    """Return the settings of a script, as its page of settings has them."""
    page, _ = configurator._read_page(str(ROOT / script))
    if script in ALSO_TRAIN:
        page = configurator._read_page(str(ROOT / 'train.py'))[0] | page
    if script in (*ALSO_TRAIN, 'train.py'):
        page |= configurator._read_classes(str(ROOT / 'attentions'), page)
    return {name: setting.default for name, setting in page.items()}


def scripts():
    """Return every file that has a page of settings."""
    files = [*ROOT.glob('*.py'), *ROOT.glob('data/*/prepare.py')]
    names = [str(file.relative_to(ROOT)) for file in files]
    return [name for name in names if not name.startswith('model')] + [STUDY]


def fresh_settings(script):
    settings = dict(settings_of(script))
    if script in (*ALSO_TRAIN, 'train.py'):
        settings |= dict(EXAMPLE)
    return configurator.Settings(settings, {'__file__': str(ROOT / script)})


def option_values(name):
    """Return the values that the pages' commands give to an option."""
    values = set()
    for page in PAGES:
        for command in commands(page):
            for word in command.words:
                if word.startswith(f'--{name}='):
                    values.add(word.partition('=')[2])
    return values


def slug(heading):
    """Return the anchor that GitHub gives to a heading."""
    text = re.sub(r'[`*]', '', heading.strip()).lower()
    return re.sub(r'[^\w\- ]', '', text).replace(' ', '-')


def anchors(page):
    return {slug(match) for match in re.findall(r'^#+ (.*)$', page.read_text(), re.MULTILINE)}


def is_placeholder(name):
    """True for a name that stands for a person's own: data/NAME/prepare.py, my_tokens."""
    return '*' in name or '...' in name or 'NAME' in name or name.startswith('my_')


# -------------------------------------------------------------------------------------------------
# what the pages must hold


def test_readme_is_short():
    assert len((ROOT / 'README.md').read_bytes()) <= 12 * 1024


def test_contributing_is_short():
    assert len((ROOT / 'CONTRIBUTING.md').read_text().splitlines()) <= 60


def test_commands_are_found_in_the_pages():
    found = {command.script for page in PAGES for command in commands(page)}
    assert {'train.py', 'sample.py', 'compare.py', 'eval.py', 'bench.py', STUDY} <= found


@every_page
def test_links_and_images_exist(page):
    for target in re.findall(r'\]\(([^)\s]+)\)', page.read_text()):
        if target.startswith(('http:', 'https:')):
            continue
        path, _, anchor = target.partition('#')
        linked = page if not path else (page.parent / path).resolve()
        assert linked.exists(), target
        if anchor:
            assert anchor in anchors(linked), target


@every_page
def test_scripts_of_commands_exist_and_have_the_options(page):
    for command in commands(page):
        assert (ROOT / command.script).is_file(), command
        config = fresh_settings(command.script)
        for word in command.words:
            if word.startswith('--'):
                configurator._read_argument(config, word, '')


@every_page
def test_config_files_of_commands_are_those_of_their_script(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    for command in commands(page):
        config = fresh_settings(command.script)
        for word in command.words:
            if re.fullmatch(r'config/\w+\.py', word):
                configurator._read_file(config, word)


@every_page
def test_options_in_the_text_are_settings_of_a_script(page):
    known = set(NO_SETTINGS)
    for script in scripts():
        known |= settings_of(script).keys()
    for code in inline_code(page):
        for option in re.findall(r'(?<![\w-])--(\w+)', code):
            assert option in known, code


@every_page
def test_files_and_folders_that_are_named_exist(page):
    made = option_values('out')
    code = '\n'.join([*code_lines(page), *inline_code(page)])
    pattern = r'(?<![\w/.$-])(?:nanomla|config|data|slurm|docs|assets|tests)/[\w./*-]*'
    for name in re.findall(pattern, code):
        if is_placeholder(name) or name.rstrip('/') in made:
            continue
        assert (ROOT / name.rstrip('.')).exists(), name


@every_page
def test_python_files_that_are_named_exist(page):
    there = {path.name for folder in ('.', 'nanomla') for path in (ROOT / folder).glob('**/*.py')}
    for code in inline_code(page):
        for name in re.findall(r'\b\w+\.(?:py|sbatch)\b', code):
            if not is_placeholder(name) and name != 'window.py':
                assert name in there or (ROOT / 'slurm' / name).exists(), name


@every_page
def test_datasets_of_commands_are_there_or_made_by_another_command(page):
    made = {Path(value).name for value in option_values('out')}
    for command in commands(page):
        for word in command.words:
            name = word.removeprefix('--dataset=')
            if word != name and not is_placeholder(name):
                assert name in made or (ROOT / 'data' / name).is_dir(), word


@every_page
def test_extras_that_are_named_exist(page):
    with open(ROOT / 'pyproject.toml', 'rb') as file:
        extras = tomllib.load(file)['project']['optional-dependencies']
    for names in re.findall(r'\.\[([\w,]+)\]', page.read_text()):
        assert set(names.split(',')) <= extras.keys()


@pytest.mark.parametrize('name', IMAGES)
def test_every_figure_stands_on_one_page(name):
    shown = [page.name for page in DOCS if f'](../assets/{name})' in page.read_text()]
    in_readme = f'](assets/{name})' in (ROOT / 'README.md').read_text()
    assert len(shown) == 1 or (in_readme and not shown)


@pytest.mark.parametrize('name', LOGS)
def test_every_log_is_named_on_a_page_of_its_subject(name):
    stem = name.removesuffix('.jsonl')
    named = [page.name for page in DOCS if stem in page.read_text()]
    assert set(named) - {'results.md'}


def test_logs_in_the_table_of_results_exist():
    text = (ROOT / 'docs/results.md').read_text()
    assert set(re.findall(r'\w+\.jsonl', text)) == set(LOGS)
