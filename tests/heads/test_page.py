"""The page of attention heads: the text of its file, and the page in a headless Chromium."""

import base64
import json
import math
import os
import re
import shutil
import xml.etree.ElementTree
from html.parser import HTMLParser

import handmade
import head_reports
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanomla.core.configurator import UserError
from nanomla.heads import ablation, patterns
from nanomla.heads.page import build, names
from nanomla.heads.report import ReportSettings, examine

EVIL = (
    '</script><script>document.title = "taken"</script>',
    '<!--<script>',
    '"quotes\' `and` &amp;',
    'http://x.example/?src=1',
    'fetch("x")',
    '\f\u2028\n',
)


def unpack(model):
    """(H, T, T) as the page's text holds it, and NaN above the diagonal."""
    T = len(model['tokens_text'])
    out = np.full((model['layers'] * model['heads'], T, T), np.nan)
    packed = np.frombuffer(base64.b64decode(model['patterns_u8']), np.uint8)
    out[:, *np.tril_indices(T)] = packed.reshape(len(out), -1) / 255
    return out


class Scripts(HTMLParser):
    """The <script> and other elements of a page as an HTML parser sees them."""

    def __init__(self, text):
        super().__init__()
        self.inside, self.scripts, self.tags = False, [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == 'script':
            self.inside = True
            self.scripts.append('')

    def handle_endtag(self, tag):
        self.inside = self.inside and tag != 'script'

    def handle_data(self, data):
        if self.inside:
            self.scripts[-1] += data


def report_of(page):
    return json.loads(Scripts(page).scripts[0])


@pytest.fixture(scope='module')
def measured():
    """A `models` entry of heads by hand, with held-out text."""
    text = torch.randint(1, handmade.V, (400,), generator=torch.Generator().manual_seed(0))
    subject = handmade.subject_of(handmade.by_hand('mla'), held_out=text)
    return examine(subject, ReportSettings(texts=8))


def count_scripts():
    """Return how many <script> elements a page has: the report and the page's own."""
    return build.read_part('heads.html').count('<script')


def hostile():
    """Return a report whose texts would all like to be more; the second model is untrained."""
    report = head_reports.pair(25)
    report['models'][1] |= dict(
        trained=False,
        name=''.join(EVIL),
        source=''.join(EVIL),
        step=None,
        tokens=None,
        val_loss=None,
    )
    report['models'][1]['tokens_text'][3:9] = EVIL
    report['made']['command'] = ''.join(EVIL)
    return report


def bare():
    """A report without anything that it may go without."""
    model = head_reports.model('bare', 'GQA', head_reports.SMALL, 17)
    for key in ('loss_by_position', 'icl_score', 'group_ablation', 'composition'):
        del model[key]
    return dict(models=[model | dict(scores=[], step=None, tokens=None, val_loss=None)], made={})


# -------------------------------------------------------------------------------------------------
# the file


@pytest.mark.parametrize('make', [head_reports.pair, hostile, bare])
def test_the_file_loads_nothing(make):
    page = build.page(make())
    loading = r'http|src\s*=|fetch|XMLHttp|import\(|@import|<link|<iframe|<img'
    assert re.search(loading, page, re.IGNORECASE) is None
    assert 'url(' not in page
    tags = [tag for tag, _ in Scripts(page).tags]
    assert tags.count('script') == count_scripts()
    assert not {'img', 'link', 'iframe', 'object', 'embed'} & set(tags)


def test_every_part_is_put_in(monkeypatch):
    page = build.page(bare())
    assert re.search(r'\{\{[\w.]+\}\}', page) is None
    for path in build.FOLDER.glob('*.js'):
        assert path.read_text().strip() in page, path.name


def test_numbers_come_back_out_of_the_file():
    A = np.random.default_rng(0).dirichlet(np.ones(9), size=(3, 9))
    A = np.tril(A) / np.tril(A).sum(-1, keepdims=True)
    texts = [f'token {i}' for i in range(9)]
    sizes = dict(layers=3, heads=1)
    model = dict(name='m', kind='MHA', tokens_text=texts, patterns_u8=build.pack_patterns(A))
    found = report_of(build.page(dict(models=[model | sizes])))['models'][0]
    back = unpack(found)
    lower = np.tril(np.ones((9, 9), bool))
    assert np.abs(back - A)[:, lower].max() <= 0.5 / 255 + 1e-6
    assert np.isnan(back[:, ~lower]).all()
    assert found['tokens_text'] == texts


def test_logits_are_halves_row_by_row():
    logits = np.random.default_rng(0).normal(scale=4, size=(2, 5, 5))
    back = np.frombuffer(base64.b64decode(build.pack_logits(logits)), '<f2').reshape(2, 15)
    rows, columns = [0, 1, 1, 2, 2, 2], [0, 0, 1, 0, 1, 2]
    assert np.array_equal(back[1, :6], logits[1][rows, columns].astype(np.float16))


def test_base64_that_spells_a_word_is_written_otherwise():
    spelled = 'httpfetchttpFETCHTTP'
    packed = base64.b64decode(spelled)  # 15 bytes: one head of 5 tokens
    sizes = dict(layers=1, heads=1, tokens_text=list('abcde'))
    model = dict(name='m', patterns_u8=base64.b64encode(packed).decode()) | sizes
    page = build.page(dict(models=[model]))
    assert report_of(page)['models'][0]['patterns_u8'] == spelled
    assert re.search('http|fetch', page, re.IGNORECASE) is None


pieces = ['http', 'HTTP', 'fetch', 'src=', 'Src=', '</script>', '<!--', '\\', '\u12fe', '\f', '"']
pieces += ['tch', '\\u']
words = st.lists(st.sampled_from(pieces) | st.text(max_size=3), max_size=8).map(''.join)


@settings(max_examples=60)
@given(st.dictionaries(words, words | st.lists(words)))
def test_any_text_survives_and_hides(value):
    text = build.embed(value)
    assert json.loads(text) == value
    assert text.isascii()
    assert not re.search(r'http|src=|fetch|[<>&]', text, re.IGNORECASE)


def test_numbers_that_json_lacks_become_null():
    values = dict(a=math.nan, b=[np.float32('inf'), np.int64(3)], c=np.array([0.5, np.nan]))
    text = build.embed(values | dict(d=True, e=1 / 3))
    assert json.loads(text) == dict(a=None, b=[None, 3], c=[0.5, None], d=True, e=0.333333)


def test_twelve_layers_of_twelve_heads_fit():
    report = head_reports.large(128)
    for model in report['models']:
        assert len(model['tokens_text']) == 128
        assert len(build.page(head_reports.report([model]))) <= 4_000_000
    assert len(report['models'][1]['mla_split']['heads']) == 48


def test_a_report_with_the_wrong_size_is_a_programmers_error():
    report = head_reports.pair(17)
    report['models'][0]['heads'] += 1
    with pytest.raises(AssertionError, match='patterns_u8 holds 1224 bytes, not 1530'):
        build.page(report)


def test_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / 'heads.html'
    build.write(path, bare())
    before = path.read_bytes()
    assert before.startswith(b'<!doctype html>')
    assert os.listdir(tmp_path) == ['heads.html']
    with pytest.raises(UserError, match='cannot write'):
        build.write(path / 'heads.html', bare())  # below a file
    with pytest.raises(UserError, match='cannot write'):
        build.write(tmp_path, bare())  # a folder

    def full(*_):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr('os.replace', full)
    with pytest.raises(UserError, match='no space left'):
        build.write(path, head_reports.pair(17))
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ['heads.html']


def test_a_part_of_the_page_that_is_missing_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(build, 'FOLDER', tmp_path)
    with pytest.raises(UserError, match=r'heads\.html: cannot read this part of the page'):
        build.page(bare())


# -------------------------------------------------------------------------------------------------
# names


def test_every_label_of_a_head_is_explained():
    labels = {label.name for label in names.LABELS}
    assert labels == {*patterns.LABELS, 'positional'}


def test_every_label_has_a_colour():
    style = build.read_part('heads.css')
    for label in (*names.LABELS, names.Label('none', '')):
        assert f'.label-{label.name} {{' in style


def test_the_scores_of_the_page_are_those_of_a_report(measured):
    entry = measured['scores'][0]
    for score in names.SCORES:
        assert score.key in entry, score.key
    for family in names.FAMILIES:
        assert 'gap' in entry[family], family


def test_every_method_of_ablation_has_a_name():
    assert set(ablation.METHODS) <= names.GROUP_COSTS.keys()


def test_the_legend_shows_where_each_head_attends():
    """The examples are those of the scores: the second copy of four tokens, without a gap."""
    q, keys = patterns.second_copy(names.COPY, torch.zeros(1, dtype=torch.long))
    for label in names.LABELS:
        pairs = label.example()
        if label.name in keys:
            expected = torch.stack([q, keys[label.name]], -1)[0].tolist()
            in_second_copy = [pair for pair in pairs if pair[0] > names.COPY]
            # The last token of the second copy has nothing after it that induction could find.
            assert in_second_copy == expected, label.name


def test_costs_of_groups_become_words():
    costs = head_reports.group_costs(induction=2, previous=1)
    on_random, on_text = names.group_tables(costs)
    assert (on_random['text'], on_text['text']) == ('random tokens', 'held-out text')
    assert on_random['loss'] == costs['loss']
    found = [group['name'] for group in on_random['groups']]
    assert found == ['2 induction heads', '1 previous-token head']
    assert on_random['groups'][0]['costs']['zero_control'] == costs['induction_zero_control']
    assert on_random['paths']['K'] == costs['previous_to_induction_K']


def test_costs_that_were_not_measured_make_no_table():
    assert names.group_tables({}) == []
    (table,) = names.group_tables(dict(loss=2.5))
    assert table == dict(text='random tokens', loss=2.5, groups=[], paths=None)


# -------------------------------------------------------------------------------------------------
# the page


@pytest.fixture(scope='module')
def chromium():
    found = [shutil.which(name) for name in ('chromium', 'chromium-browser', 'google-chrome')]
    path = next(filter(None, found), None)
    if path is None:
        pytest.skip('needs a browser: neither chromium nor google-chrome is on the PATH')
    reason = 'needs playwright: pip install -e .[heads]'
    api = pytest.importorskip('playwright.sync_api', reason=reason)
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=['--no-sandbox'])
        yield browser
        browser.close()


class Window:
    """A window of a browser that notes what its pages complain of and load."""

    def __init__(self, browser):
        size = dict(width=1400, height=1000)
        self.context = browser.new_context(viewport=size, accept_downloads=True)
        self.complaints, self.requests, self.opened = [], [], 0

    def new_tab(self):
        tab = self.context.new_page()
        tab.on('console', lambda message: self.complaints.append(message.text))
        tab.on('pageerror', lambda error: self.complaints.append(str(error)))
        tab.on('dialog', lambda dialog: self.complaints.append(dialog.message))
        tab.on('request', lambda request: self.requests.append(request.url))
        return tab

    def open(self, path, tab, width=1400, height=1000, scheme='light'):
        """Open a page in a tab that has its size and colour scheme before."""
        tab.set_viewport_size(dict(width=width, height=height))
        tab.emulate_media(color_scheme=scheme)
        tab.mouse.move(0, 0)
        tab.goto(path.as_uri())
        tab.wait_for_selector('body.complete')
        self.opened += 1
        return tab

    def check(self):
        """Its pages must have complained of nothing and loaded nothing since the last check."""
        complaints, requests, opened = self.complaints[:], self.requests[:], self.opened
        self.complaints.clear()
        self.requests.clear()
        self.opened = 0
        assert complaints == []
        assert len([url for url in requests if url.startswith('file:')]) == opened
        inside = ('file:', 'data:image/svg+xml', 'blob:')
        assert [url for url in requests if not url.startswith(inside)] == []

    def close(self):
        self.context.close()
        self.check()


@pytest.fixture(scope='module')
def window(chromium):
    """The window of all pages, which store nothing there."""
    window = Window(chromium)
    yield window
    window.close()


@pytest.fixture(scope='module')
def tab(window):
    """The tab of the pages of `show`, one after the other: a new one takes longer than its page."""
    return window.new_tab()


@pytest.fixture
def show(window, tab, tmp_path):
    """show(report, **size and scheme) -> the page, opened from its file."""
    files = []

    def open_page(report, **settings):
        files.append(tmp_path / f'{len(files)} heads.html')
        build.write(files[-1], report)
        return window.open(files[-1], tab, **settings)

    yield open_page
    window.check()


@pytest.fixture(scope='module')
def pair():
    """A report on two models, for tests that change nothing in it."""
    return head_reports.pair(33)


@pytest.fixture(scope='module')
def page(window, pair, tmp_path_factory):
    """The page of `pair`, for tests that leave no choice and no lock behind."""
    path = tmp_path_factory.mktemp('page') / 'heads.html'
    build.write(path, pair)
    return window.open(path, window.new_tab())


def wait_for_page(page):
    page.evaluate('new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))')


def point(page, q, k, view=0, click=False):
    """Move the pointer to a cell of a view's map, and click there if asked to."""
    x, y = page.evaluate(
        """([view, q, k]) => {
        const map = views[view].map, { left, top, cell } = map.layout;
        map.canvas.scrollIntoView({ block: "center" });
        const box = map.canvas.getBoundingClientRect();
        return [box.left + left + (k + 0.5) * cell, box.top + top + (q + 0.5) * cell]; }""",
        [view, q, k],
    )
    if click:
        page.mouse.click(x, y)
    else:
        page.mouse.move(x, y)
    wait_for_page(page)


def asked(page, view=0):
    """(query, key) that a view reads out."""
    text = page.locator('.asks').nth(view).inner_text().split()
    return int(text[1]), int(text[text.index('key') + 1])


def weight_read_out(page, view=0):
    return float(page.locator('.asks').nth(view).inner_text().split()[-1])


def key_rows(page, view=0):
    """(key, weight) of the keys that a view lists."""
    rows = page.locator('.keys').nth(view).locator('li').all()
    keys = [int(row.get_attribute('data-key')) for row in rows]
    weights = [float(row.locator('.weight').inner_text()) for row in rows]
    return keys, weights


def column(page, name):
    """The cells of a column of the table."""
    return page.locator(f'#table tbody .col-{name}').all_inner_texts()


def chosen_heads(page):
    return page.evaluate('views.map(view => view.head)')


def number(text):
    return float(text.replace('−', '-'))


def test_every_embedded_weight_is_the_attention(page, pair):
    for index, model in enumerate(pair['models']):
        shown = page.evaluate(
            """index => { const model = models[index], out = [];
            for (const head of model.allHeads)
                for (let q = 0; q < model.T; q++)
                    for (let k = 0; k < model.T; k++) out.push(model.weight(head, q, k));
            return out; }""",
            index,
        )
        shown = np.reshape(shown, (8, 33, 33))
        assert np.abs(shown - np.nan_to_num(unpack(model))).max() < 1e-9
        rounding = 33 / 2 / 255
        assert np.abs(shown.sum(-1) - 1).max() < rounding


def test_hover_reads_out_the_weights_of_both_views(page, pair):
    heads = chosen_heads(page)
    assert heads == [4, 6]  # each model's best induction head
    patterns = [unpack(model)[head] for model, head in zip(pair['models'], heads)]
    for q, k in ((0, 0), (20, 5), (25, 10), (32, 32), (17, 2)):
        point(page, q, k)
        for view, pattern in enumerate(patterns):
            assert asked(page, view) == (q, k)
            assert weight_read_out(page, view) == pytest.approx(pattern[q, k], abs=1 / 255)
            keys, weights = key_rows(page, view)
            assert weights == pytest.approx(pattern[q, keys], abs=1 / 255)
            assert weights == sorted(weights, reverse=True)
            assert weights[0] == round(np.nanmax(pattern[q]), 3)


def test_a_listed_key_has_its_token_and_its_role(page, pair):
    point(page, 20, 5)
    row = page.locator('.keys').first.locator('li').first.inner_text().split()
    weight = unpack(pair['models'][0])[4, 20, 5]
    assert row == ['5', '·under', 'induction', f'{weight:.3f}']


def test_beyond_the_diagonal_it_reads_out_the_key_with_the_largest_weight(page, pair):
    point(page, 10, 30)
    pattern = unpack(pair['models'][0])[4]
    assert asked(page) == (10, int(np.nanargmax(pattern[10])))


def test_the_sequence_shows_the_query_and_can_be_pointed_at(page):
    point(page, 10, 30)
    strip = page.locator('.strip').first.locator('span')
    assert strip.nth(10).get_attribute('class') == 'query'
    assert strip.nth(11).get_attribute('class') == 'later'
    strip.nth(21).hover()
    wait_for_page(page)
    assert [asked(page, view)[0] for view in (0, 1)] == [21, 21]


def test_a_click_locks_both_views(show):
    page = show(head_reports.pair(33))
    point(page, 22, 7, click=True)
    point(page, 30, 3)
    point(page, 12, 3, view=1)
    assert [asked(page, view) for view in (0, 1)] == [(22, 7), (22, 7)]
    assert page.locator('.lock').nth(1).get_attribute('aria-pressed') == 'true'
    assert '22' in page.locator('.spoken').first.inner_text()


def test_the_keyboard_moves_a_locked_query_and_unlocks_it(show):
    page = show(head_reports.pair(33))
    point(page, 22, 7, click=True)
    page.locator('canvas.map').first.focus()
    for key in ('ArrowUp', 'ArrowUp', 'ArrowRight'):
        page.keyboard.press(key)
    wait_for_page(page)
    assert [asked(page, view) for view in (0, 1)] == [(20, 8), (20, 8)]
    page.keyboard.press('Escape')
    wait_for_page(page)
    assert page.locator('.lock').first.get_attribute('aria-pressed') == 'false'
    point(page, 30, 3)
    assert asked(page) == (30, 3)


def test_the_button_locks_as_well(show):
    page = show(head_reports.pair(33))
    point(page, 30, 3)
    page.locator('.lock').first.click()
    point(page, 12, 3)
    assert asked(page) == (30, 3)


def test_a_small_map_chooses_its_head_and_arrows_move_on(show):
    page = show(head_reports.pair(33))
    page.locator('.view').first.locator('[data-head="0"]').click()
    assert chosen_heads(page) == [0, 6]
    assert page.locator('.which').first.inner_text().replace('\u202f', ' ') == 'L0 H0'
    page.keyboard.press('ArrowDown')
    page.keyboard.press('ArrowRight')
    assert chosen_heads(page) == [5, 6]
    assert page.evaluate('document.activeElement.dataset.head') == '5'


def test_heads_are_sorted_by_a_score_and_filtered_by_label(show):
    report = head_reports.pair(33)
    page = show(report)
    page.select_option('#order', 'score')
    page.select_option('#shown-score', 'previous')
    for view, model in enumerate(report['models']):
        scores = [entry['previous']['score'] for entry in model['scores']]
        best = sorted(range(8), key=lambda head: -scores[head])
        thumbs = page.locator('.view').nth(view).locator('.thumb').all()
        assert [int(thumb.get_attribute('data-head')) for thumb in thumbs] == best
    for label in ('previous', 'duplicate', 'current', 'first', ''):
        page.locator(f'#chips [data-label="{label}"]').click()
    assert page.locator('.view').first.locator('.thumb').count() == 2  # induction is left
    page.wait_for_selector('.thumb canvas')  # painted when it comes into sight


def test_a_view_can_show_another_model(show):
    page = show(head_reports.pair(33))
    page.locator('.pick-model').first.select_option('1')
    assert page.evaluate('views.map(view => view.model.name)') == ['made by hand, MLA'] * 2


def test_the_table_sorts_by_a_column_either_way(show):
    report = head_reports.pair(33)
    report['models'][0]['scores'][2]['copying'] = None
    page = show(report)
    entries = [entry for model in report['models'] for entry in model['scores']]
    scores = [f'{entry["induction"]["score"]:.3f}' for entry in entries]
    assert column(page, 'score') == sorted(scores, reverse=True)
    page.locator('[data-sort="zero_ablation"]').click()
    costs = [number(text) for text in column(page, 'zero_ablation')]
    expected = sorted((entry['zero_ablation'] for entry in entries), reverse=True)
    assert costs == pytest.approx(expected, abs=5.1e-4)
    for is_ascending in (False, True):
        page.locator('[data-sort="copying"]').click()
        *texts, last = column(page, 'copying')
        assert last == '–'  # what was not measured comes last, either way
        values = [number(text) for text in texts]
        assert values == sorted(values, reverse=not is_ascending)
    assert page.locator('th.col-copying').get_attribute('aria-sort') == 'ascending'


def test_the_table_shows_one_family_label_and_model(show):
    report = head_reports.pair(33)
    page = show(report)
    entries = [entry for model in report['models'] for entry in model['scores']]
    page.select_option('#table-family', 'previous')
    page.select_option('#table-label', 'previous')
    previous = [entry['previous'] for entry in entries if entry['label'] == 'previous']
    assert sorted(column(page, 'score')) == sorted(f'{score["score"]:.3f}' for score in previous)
    assert set(column(page, 'null')) == {f'{previous[0]["null"]:.3f}'}
    assert set(column(page, 'control')) == {'–'}
    page.select_option('#table-model', '1')
    page.locator('.head-link').first.click()
    assert chosen_heads(page) == [4, 3]


def test_the_table_of_two_models_is_whole_at_1400_pixels(show):
    """With every column, and names longer than their column: these end in an ellipsis."""
    report = head_reports.pair(33)
    for model in report['models']:
        model['name'] = f'{model["name"]} from a folder with a long name'
        for entry in model['scores']:
            entry['on_text'] = entry['induction'] | dict(label='')
    page = show(report)
    shown = page.locator('#table th').all_inner_texts()
    assert len(shown) == 3 + len(names.COLUMNS) + sum(1 for score in names.SCORES if score.column)
    widths = 'box => [box.scrollWidth, box.clientWidth]'
    needed, there = page.locator('.table-box').evaluate(widths)
    assert needed <= there


def test_costs_of_groups_are_in_words_and_the_loss_has_no_sign(page):
    text = page.locator('#groups .card').first.inner_text()
    assert 'random tokens: loss 1.204 with all heads' in text
    assert 'held-out text: loss 1.204 with all heads' in text
    assert '+1.204' not in text
    assert '_' not in text
    rows = page.locator('#groups table').first.locator('tbody tr').all_inner_texts()
    assert rows[0].split() == [
        '2',
        'induction',
        'heads',
        '+4.810',
        '+4.329',
        '+0.096',
        '+0.048',
        '−0.004',
    ]
    assert rows[1].startswith('1 previous-token head')
    assert 'keys +3.110' in text


def test_a_warning_of_a_model_stands_in_its_banner(show):
    report = head_reports.pair(33)
    report['models'][1]['warnings'] = ['the loss says induction, <b>the scores</b> do not']
    page = show(report)
    banners = page.locator('.banner').all_inner_texts()
    assert '<b>the scores</b> do not' in banners[1]
    assert 'the scores' not in banners[0]


def test_the_parts_of_an_mla_logit_add_up_to_its_attention(page):
    worst = page.evaluate("""() => { let worst = 0; const model = models[1];
        for (const head of model.splitIndex.keys()) for (let q = 0; q < model.T; q++) {
            const logits = model.split(head).sum;
            const row = Array.from({ length: q + 1 }, (_, k) => Math.exp(logits[at(q, k)]));
            const sum = row.reduce((a, b) => a + b);
            const error = (value, k) => Math.abs(value / sum - model.weight(head, q, k));
            worst = Math.max(worst, ...row.map(error)); }
        return worst; }""")
    assert worst <= 0.5 / 255 + 5e-3  # half floats of logits around 7


def test_the_parts_of_an_mla_logit_are_read_out(page):
    point(page, 25, 10, view=1)
    parts = page.locator('.view').nth(1).locator('.part b').all_inner_texts()
    content, rope, total = [number(text) for text in parts]
    assert content + rope == pytest.approx(total, abs=0.02)
    assert content > 5
    assert abs(rope) < 0.01


def test_the_map_shows_the_parts_of_a_logit_where_they_were_stored(show):
    page = show(head_reports.pair(33))
    before = page.evaluate('views[1].map.base.toDataURL()')
    page.locator('.pick-values').nth(1).select_option('rope')
    assert page.evaluate('views[1].map.base.toDataURL()') != before
    page.locator('.view').nth(1).locator('[data-head="0"]').click()  # without stored parts
    assert page.locator('.pick-values').nth(1).input_value() == 'weights'
    assert 'for other heads' in page.locator('.split').nth(1).inner_text()
    assert not page.locator('.pick-values').first.is_visible()  # MHA has no parts


def saved_picture(page, where, kind, tmp_path):
    """Press a button and return the bytes of the picture that it saves."""
    with page.expect_download() as download:
        page.locator(f'{where} [data-format={kind}]').first.click()
    assert download.value.suggested_filename.endswith('.' + kind.lower())
    download.value.save_as(tmp_path / 'picture')
    return (tmp_path / 'picture').read_bytes()


@pytest.mark.parametrize('where', ['[data-what="map"]', '#loss-plot .export'])
def test_a_png_leaves_the_page(where, page, tmp_path):
    data = saved_picture(page, where, 'PNG', tmp_path)
    assert data.startswith(b'\x89PNG\r\n\x1a\n')
    width = int.from_bytes(data[16:20], 'big')
    assert width > 600
    assert len(data) > 10_000


def test_an_svg_that_leaves_the_page_says_of_which_model_it_is(page, tmp_path):
    svg = '{http://www.w3.org/2000/svg}'
    holders = ('[data-what="map"]', '[data-what="overview"]', '#loss-plot .export')
    for where in (*holders, '#graphs .export'):
        root = xml.etree.ElementTree.fromstring(saved_picture(page, where, 'SVG', tmp_path))
        assert root.tag == f'{svg}svg', where
        texts = ' '.join(text.text or '' for text in root.iter(f'{svg}text'))
        assert 'step 6,000' in texts, where
        assert 'val loss 3.274' in texts, where


def move_slider(page, name, value):
    page.locator(name).evaluate(
        """(slider, value) => { slider.value = value;
        slider.dispatchEvent(new Event("input")); }""",
        value,
    )


def test_a_slider_moves_through_the_checkpoints(show):
    report = head_reports.pair(33)
    page = show(report)
    run = report['checkpoints'][0]
    for place in (0, 7, 14):
        move_slider(page, '#moment', place)
        cells = page.locator('#training-maps article').first.locator('.heat i').all_inner_texts()
        assert cells == [f'{value:.2f}' for value in np.ravel(run['gaps'][place])]
        assert page.locator('#training-plots .dots circle').count() == 6
        assert f'step {run["step"][place]:,}' in page.locator('#training-maps').inner_text()


def test_the_maps_through_training_show_what_the_curve_above_them_shows(show):
    report = head_reports.pair(33)
    page = show(report)
    run = report['checkpoints'][0]
    assert 'gap score' in page.locator('#training-plots').inner_text().lower()
    assert 'gap score of each head' in page.locator('#training-maps').inner_text()
    for place in (7, 14):
        move_slider(page, '#moment', place)
        cells = page.locator('#training-maps article').first.locator('.heat i').all_inner_texts()
        assert max(cells) == f'{run["max_induction"][place]:.2f}'
    # A report without gap scores says which scores its maps show instead.
    for found in report['checkpoints']:
        del found['gaps']
    assert 'induction score of each head' in show(report).locator('#training-maps').inner_text()


def test_a_threshold_and_the_kinds_choose_edges(show):
    report = head_reports.pair(33)
    page = show(report)
    edges = [edge for model in report['models'] for edge in model['composition']]
    move_slider(page, '#threshold', 0.2)
    strong = [edge for edge in edges if edge['value'] >= 0.2]
    assert len(strong) == 4  # previous to induction, by K
    assert page.locator('.edge').count() == 4
    page.locator('#graph-kinds [data-kind="K"]').click()
    assert page.locator('.edge').count() == 0
    page.locator('.node[data-head="3"]').first.click()
    assert chosen_heads(page)[0] == 3


def test_a_curve_is_read_out_under_the_pointer(page):
    box = page.locator('#loss-plot .plot').bounding_box()
    page.locator('#loss-plot .plot').hover(position=dict(x=box['width'] - 20, y=60))
    reading = page.locator('#loss-plot .reading').inner_text()
    assert reading.startswith('position 32: made by hand, MHA, repeated')


def test_graphs_begin_with_the_strongest_edges_of_each_model(show):
    report = head_reports.pair(33)
    for edge in report['models'][1]['composition']:
        edge['value'] *= 10  # two models' values need not be of one size
    page = show(report)
    texts = 'all => all.map(title => title.textContent)'
    for graph, model in zip(page.locator('#graphs .figure').all(), report['models']):
        values = sorted((edge['value'] for edge in model['composition']), reverse=True)
        titles = graph.locator('.edge title').evaluate_all(texts)
        drawn = [float(title.rsplit(' ', 1)[1]) for title in titles]
        assert sorted(drawn, reverse=True) == pytest.approx(values[:25], abs=5e-4)
    assert 'strongest 25' in page.locator('#threshold-value').inner_text()


def test_a_head_may_be_called_something_on_text_alone(show):
    report = head_reports.pair(33)
    scores = report['models'][0]['scores']
    plain = next(i for i, score in enumerate(scores) if not score['label'])
    scores[plain]['on_text'] = dict(score=0.4, label='induction')
    page = show(report)
    page.locator(f'.view .thumb[data-head="{plain}"]').first.click()
    assert page.locator('.chosen .label').first.inner_text() == 'induction on text'


def test_texts_stay_texts(show):
    page = show(hostile())
    assert page.title().startswith('Attention heads · made by hand, MHA · </script>')
    assert page.locator('body script').count() == count_scripts()
    fourth = page.locator('.strip').nth(1).locator('span').nth(3).inner_text()
    assert fourth.startswith('</script>')
    point(page, 12, 3, view=1)
    assert '</script>' in page.locator('.asks').nth(1).inner_text()
    assert page.locator('#footer').inner_text().startswith('</script>')


def test_an_untrained_model_is_marked_in_red(show):
    page = show(hostile())
    (banner,) = page.locator('.banner.untrained').all_inner_texts()
    assert 'Untrained.' in banner
    color = 'element => getComputedStyle(element).color'
    assert page.locator('.banner .alarm').evaluate(color) == 'rgb(180, 35, 24)'
    hidden = page.locator('.view .warning').evaluate_all('all => all.map(mark => mark.hidden)')
    assert hidden == [True, False]


@pytest.mark.parametrize('scheme, width', [('light', 390), ('dark', 1400)])
def test_a_report_may_lack_all_but_its_patterns(show, scheme, width):
    page = show(bare(), width=width, height=900, scheme=scheme)
    assert page.locator('.view').count() == 1
    assert page.locator('#banners').inner_text().count('–') == 3
    for section in ('table', 'loss', 'graph', 'training'):
        assert not page.locator(f'#{section}-section').is_visible(), section
    page.locator('#second-view').click()
    assert page.locator('.view').count() == 2
    point(page, 12, 5, view=1)
    assert [asked(page, view) for view in (0, 1)] == [(12, 5), (12, 5)]


@pytest.mark.parametrize('width', [390, 1400])
@pytest.mark.parametrize('make', [bare, hostile])
def test_the_page_is_no_wider_than_its_window(make, width, show):
    page = show(make(), width=width, height=900)
    assert page.evaluate('document.documentElement.scrollWidth') == width


@pytest.mark.parametrize('scheme, other', [('light', 'dark'), ('dark', 'light')])
def test_maps_are_pale_by_day_and_dim_at_night(show, scheme, other):
    page = show(bare(), scheme=scheme)
    page.emulate_media(color_scheme=other)
    wait_for_page(page)
    corner = page.evaluate(
        """() => { const { base, layout, ratio } = views[0].map;
        const corner = [(layout.left + 20) * ratio, (layout.top + 200) * ratio];
        const pixel = base.getContext("2d").getImageData(...corner, 1, 1).data;
        return [...pixel].slice(0, 3); }"""
    )
    is_pale = sum(corner) > 382
    assert is_pale == (other == 'light')
