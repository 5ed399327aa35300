"""The page of attention heads: the text of its file, and the page in a headless Chromium."""

import base64
import json
import os
import re
import shutil
import xml.etree.ElementTree
from html.parser import HTMLParser

import head_reports
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanomla.core.configurator import UserError
from nanomla.heads.page import build

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
    out[:, *np.tril_indices(T)] = (
        np.frombuffer(base64.b64decode(model['patterns_u8']), np.uint8).reshape(len(out), -1) / 255
    )
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
    assert (
        not re.search(
            r'http|src\s*=|fetch|XMLHttp|import\(|@import|<link|<iframe|<img', page, re.IGNORECASE
        )
        and 'url(' not in page
    )
    tags = [tag for tag, _ in Scripts(page).tags]
    assert tags.count('script') == 6 and not {'img', 'link', 'iframe', 'object', 'embed'} & set(
        tags
    )
    assert not re.search(r'\{\{[\w.]+\}\}', page)


def test_numbers_come_back_out_of_the_file():
    A = np.random.default_rng(0).dirichlet(np.ones(9), size=(3, 9))
    A = np.tril(A) / np.tril(A).sum(-1, keepdims=True)
    texts = [f'token {i}' for i in range(9)]
    model = dict(
        name='m',
        kind='MHA',
        layers=3,
        heads=1,
        tokens_text=texts,
        patterns_u8=build.pack_patterns(A),
    )
    found = report_of(build.page(dict(models=[model])))['models'][0]
    back = unpack(found)
    lower = np.tril(np.ones((9, 9), bool))
    assert (
        np.abs(back - A)[:, lower].max() <= 0.5 / 255 + 1e-6
        and np.isnan(back[:, ~lower]).all()
        and found['tokens_text'] == texts
    )


def test_logits_are_halves_row_by_row():
    logits = np.random.default_rng(0).normal(scale=4, size=(2, 5, 5))
    back = np.frombuffer(base64.b64decode(build.pack_logits(logits)), '<f2').reshape(2, 15)
    assert np.array_equal(
        back[1, :6], logits[1][[0, 1, 1, 2, 2, 2], [0, 0, 1, 0, 1, 2]].astype(np.float16)
    )


def test_base64_that_spells_a_word_is_written_otherwise():
    rows = np.frombuffer(
        base64.b64decode('httpfetchttpFETCHTTP'), np.uint8
    )  # 15 bytes: one head of 5 tokens
    model = dict(
        name='m',
        layers=1,
        heads=1,
        tokens_text=list('abcde'),
        patterns_u8=base64.b64encode(rows.tobytes()).decode(),
    )
    page = build.page(dict(models=[model]))
    assert report_of(page)['models'][0]['patterns_u8'] == 'httpfetchttpFETCHTTP' and not re.search(
        'http|fetch', page, re.IGNORECASE
    )


words = st.lists(
    st.one_of(
        st.sampled_from(
            [
                'http',
                'HTTP',
                'fetch',
                'src=',
                'Src=',
                '</script>',
                '<!--',
                '\\',
                '\u12fe',
                '\f',
                '"',
                'tch',
                '\\u',
            ]
        ),
        st.text(max_size=3),
    ),
    max_size=8,
).map(''.join)


@settings(max_examples=60)
@given(st.dictionaries(words, words | st.lists(words)))
def test_any_text_survives_and_hides(value):
    text = build.embed(value)
    assert json.loads(text) == value and text.isascii()
    assert not re.search(r'http|src=|fetch|[<>&]', text, re.IGNORECASE)


def test_numbers_that_json_lacks_become_null():
    text = build.embed(
        dict(
            a=float('nan'),
            b=[np.float32('inf'), np.int64(3)],
            c=np.array([0.5, np.nan]),
            d=True,
            e=1 / 3,
        )
    )
    assert json.loads(text) == dict(a=None, b=[None, 3], c=[0.5, None], d=True, e=0.333333)


def test_twelve_layers_of_twelve_heads_fit():
    report = head_reports.large(128)
    assert [len(model['tokens_text']) for model in report['models']] == [128, 128] and len(
        report['models'][1]['mla_split']['heads']
    ) == 48
    for model in report['models']:
        assert len(build.page(head_reports.report([model]))) <= 4_000_000


def test_a_report_with_the_wrong_size_is_a_programmers_error():
    report = head_reports.pair(17)
    report['models'][0]['heads'] += 1
    with pytest.raises(AssertionError, match='patterns_u8 holds 1224 bytes, not 1530'):
        build.page(report)


def test_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / 'heads.html'
    build.write(path, bare())
    before = path.read_bytes()
    assert before.startswith(b'<!doctype html>') and os.listdir(tmp_path) == ['heads.html']
    with pytest.raises(UserError, match='cannot write'):
        build.write(path / 'heads.html', bare())  # below a file
    with pytest.raises(UserError, match='cannot write'):
        build.write(tmp_path, bare())  # a folder

    def full(*_):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr('os.replace', full)
    with pytest.raises(UserError, match='no space left'):
        build.write(path, head_reports.pair(17))
    assert path.read_bytes() == before and os.listdir(tmp_path) == ['heads.html']


def test_a_part_of_the_page_that_is_missing_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(build, 'FOLDER', tmp_path)
    with pytest.raises(UserError, match=r'heads\.html: cannot read this part of the page'):
        build.page(bare())


# -------------------------------------------------------------------------------------------------
# the page


@pytest.fixture(scope='module')
def chromium():
    path = next(
        filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None
    )
    if path is None:
        pytest.skip('needs a browser: neither chromium nor google-chrome is on the PATH')
    api = pytest.importorskip(
        'playwright.sync_api', reason='needs playwright: pip install -e .[heads]'
    )
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=['--no-sandbox'])
        yield browser
        browser.close()


@pytest.fixture
def show(chromium, tmp_path):
    """
    show(report, **context) -> the page, opened from its file.

    At the end it must have complained of nothing and loaded nothing.
    """
    contexts, complaints, requests = [], [], []

    def open_page(report, **settings):
        path = tmp_path / f'{len(contexts)} heads.html'
        build.write(path, report)
        context = chromium.new_context(
            **{'viewport': dict(width=1400, height=1000), 'accept_downloads': True} | settings
        )
        contexts.append(context)
        page = context.new_page()
        page.on('console', lambda message: complaints.append(message.text))
        page.on('pageerror', lambda error: complaints.append(str(error)))
        page.on('dialog', lambda dialog: complaints.append(dialog.message))
        page.on('request', lambda request: requests.append(request.url))
        page.goto(path.as_uri())
        page.wait_for_selector('body.complete')
        return page

    yield open_page
    pages = len(contexts)
    for context in contexts:
        context.close()
    assert complaints == []
    assert len([url for url in requests if url.startswith('file:')]) == pages and all(
        url.startswith(('file:', 'data:image/svg+xml', 'blob:')) for url in requests
    )


def settle(page):
    page.evaluate('new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))')


def point(page, q, k, view=0, click=False):
    """Move the pointer to a cell of a view's map."""
    x, y = page.evaluate(
        """([view, q, k]) => {
        const map = views[view].map, { left, top, cell } = map.place;
        map.canvas.scrollIntoView({ block: "center" });
        const box = map.canvas.getBoundingClientRect();
        return [box.left + left + (k + 0.5) * cell, box.top + top + (q + 0.5) * cell]; }""",
        [view, q, k],
    )
    (page.mouse.click if click else page.mouse.move)(x, y)
    settle(page)


def asked(page, view=0):
    """(query, key, weight) that a view reads out."""
    text = page.locator('.asks').nth(view).inner_text().split()
    return int(text[1]), int(text[text.index('key') + 1]), float(text[-1])


def test_every_embedded_weight_is_the_attention(show):
    report = head_reports.pair(33)
    page = show(report)
    for index, model in enumerate(report['models']):
        shown = page.evaluate(
            """index => { const model = models[index], out = [];
            for (const head of model.allHeads)
                for (let q = 0; q < model.T; q++)
                    for (let k = 0; k < model.T; k++) out.push(model.weight(head, q, k));
            return out; }""",
            index,
        )
        assert np.abs(np.reshape(shown, (8, 33, 33)) - np.nan_to_num(unpack(model))).max() < 1e-9
        assert (
            np.abs(np.reshape(shown, (8, 33, 33)).sum(-1) - 1).max() < 33 / 2 / 255
        )  # rounding is all that a row may lack


def test_hover_reads_out_the_weights_of_both_views(show):
    report = head_reports.pair(33)
    page = show(report)
    A = [unpack(model) for model in report['models']]
    heads = page.evaluate('views.map(view => view.head)')
    assert heads == [4, 6]  # each model's best induction head
    for q, k in ((0, 0), (20, 5), (25, 10), (32, 32), (17, 2)):
        point(page, q, k)
        for view in (0, 1):
            assert (
                asked(page, view)[:2] == (q, k)
                and abs(asked(page, view)[2] - A[view][heads[view], q, k]) <= 1 / 255
            )
            rows = page.locator('.keys').nth(view).locator('li')
            keys = [int(row.get_attribute('data-key')) for row in rows.all()]
            weights = [float(row.locator('.weight').inner_text()) for row in rows.all()]
            assert np.allclose(
                weights, A[view][heads[view], q, keys], atol=1 / 255
            ) and weights == sorted(weights, reverse=True)
            assert weights[0] == round(np.nanmax(A[view][heads[view], q]), 3)
    point(page, 20, 5)
    assert page.locator('.keys').first.locator('li').first.inner_text().split() == [
        '5',
        '·under',
        'induction',
        f'{A[0][4, 20, 5]:.3f}',
    ]
    point(page, 10, 30)  # beyond the diagonal there is no key: the one with the largest weight
    assert asked(page)[:2] == (10, int(np.nanargmax(A[0][4, 10])))
    strip = page.locator('.strip').first.locator('span')
    assert (
        strip.nth(10).get_attribute('class') == 'query'
        and strip.nth(11).get_attribute('class') == 'later'
    )
    strip.nth(21).hover()
    settle(page)
    assert asked(page, 0)[0] == asked(page, 1)[0] == 21


def test_a_click_locks_and_the_keyboard_moves(show):
    page = show(head_reports.pair(33))
    point(page, 22, 7, click=True)
    point(page, 30, 3)
    point(page, 12, 3, view=1)
    assert asked(page, 0)[:2] == asked(page, 1)[:2] == (22, 7)
    assert (
        page.locator('.lock').nth(1).get_attribute('aria-pressed') == 'true'
        and '22' in page.locator('.spoken').first.inner_text()
    )
    page.locator('canvas.map').first.focus()
    for key in ('ArrowUp', 'ArrowUp', 'ArrowRight'):
        page.keyboard.press(key)
    settle(page)
    assert asked(page, 0)[:2] == asked(page, 1)[:2] == (20, 8)  # the keyboard moves on
    page.keyboard.press('Escape')
    settle(page)
    assert page.locator('.lock').first.get_attribute('aria-pressed') == 'false'
    point(page, 30, 3)
    assert asked(page)[:2] == (30, 3)
    page.locator('.lock').first.click()
    point(page, 12, 3)
    assert asked(page)[:2] == (30, 3)


def test_heads_are_chosen_sorted_and_filtered(show):
    report = head_reports.pair(33)
    page = show(report)
    page.locator('.view').first.locator('[data-head="0"]').click()
    assert (
        page.evaluate('views.map(view => view.head)') == [0, 6]
        and page.locator('.which').first.inner_text().replace('\u202f', ' ') == 'L0 H0'
    )
    page.keyboard.press('ArrowDown')
    page.keyboard.press('ArrowRight')
    assert (
        page.evaluate('views[0].head') == 5
        and page.evaluate('document.activeElement.dataset.head') == '5'
    )
    page.select_option('#order', 'score')
    page.select_option('#shown-score', 'previous')
    for view, model in enumerate(report['models']):
        best = sorted(range(8), key=lambda head: -model['scores'][head]['previous']['score'])
        assert [
            int(thumb.get_attribute('data-head'))
            for thumb in page.locator('.view').nth(view).locator('.thumb').all()
        ] == best
    for label in ('previous', 'duplicate', 'current', 'first', ''):
        page.locator(f'#chips [data-label="{label}"]').click()
    assert page.locator('.view').first.locator('.thumb').count() == 2  # induction is left
    page.wait_for_selector('.thumb canvas')  # painted when it comes into sight
    page.locator('.pick-model').first.select_option('1')
    assert page.evaluate('views.map(view => view.model.name)') == ['made by hand, MLA'] * 2


def test_the_table_sorts_and_filters(show):
    report = head_reports.pair(33)
    report['models'][0]['scores'][2]['copying'] = None
    page = show(report)
    rows = [(model, score) for model in report['models'] for score in model['scores']]

    def column(name):
        return page.locator(f'#table tbody .col-{name}').all_inner_texts()

    assert column('score') == sorted(
        (f'{score["induction"]["score"]:.3f}' for _, score in rows), reverse=True
    )
    page.locator('[data-sort="zero_ablation"]').click()
    assert column('zero_ablation') == sorted(
        (f'{score["zero_ablation"]:+.3f}' for _, score in rows), key=float, reverse=True
    )
    for last in range(2):  # what was not measured comes last, either way
        page.locator('[data-sort="copying"]').click()
        assert column('copying')[-1] == '–'
        values = [float(text.replace('−', '-')) for text in column('copying')[:-1]]
        assert values == sorted(values, reverse=not last)
    assert page.locator('th.col-copying').get_attribute('aria-sort') == 'ascending'
    page.select_option('#table-family', 'previous')
    page.select_option('#table-label', 'previous')
    assert sorted(column('score')) == sorted(
        f'{score["previous"]["score"]:.3f}' for _, score in rows if score['label'] == 'previous'
    )
    assert set(column('null')) == {f'{rows[0][1]["previous"]["null"]:.3f}'} and set(
        column('control')
    ) == {'–'}
    page.select_option('#table-model', '1')
    page.locator('.head-link').first.click()
    assert page.evaluate('views.map(view => view.head)') == [4, 3]


def test_the_parts_of_an_mla_logit_add_up_to_its_attention(show):
    page = show(head_reports.pair(33))
    worst = page.evaluate("""() => { let worst = 0; const model = models[1];
        for (const head of model.splitAt.keys()) for (let q = 0; q < model.T; q++) {
            const logits = model.split(head).sum;
            const row = Array.from({ length: q + 1 }, (_, k) => Math.exp(logits[at(q, k)]));
            const sum = row.reduce((a, b) => a + b);
            const error = (value, k) => Math.abs(value / sum - model.weight(head, q, k));
            worst = Math.max(worst, ...row.map(error)); }
        return worst; }""")
    assert worst <= 0.5 / 255 + 5e-3  # half floats of logits around 7
    point(page, 25, 10, view=1)
    content, rope, total = (
        float(text.replace('−', '-'))
        for text in page.locator('.view').nth(1).locator('.part b').all_inner_texts()
    )
    assert abs(content + rope - total) < 0.02 and content > 5 and abs(rope) < 0.01
    before = page.evaluate('views[1].map.base.toDataURL()')
    page.locator('.pick-values').nth(1).select_option('rope')
    assert page.evaluate('views[1].map.base.toDataURL()') != before
    page.locator('.view').nth(1).locator(
        '[data-head="0"]'
    ).click()  # a head whose parts were not kept
    assert (
        page.locator('.pick-values').nth(1).input_value() == 'weights'
        and 'kept for other heads' in page.locator('.split').nth(1).inner_text()
    )
    assert not page.locator('.pick-values').first.is_visible()  # MHA has no parts


def test_pictures_leave_the_page(show, tmp_path):
    page = show(head_reports.pair(33))
    for where in (
        '[data-what="map"]',
        '[data-what="overview"]',
        '#loss-plot .export',
        '#graphs .export',
    ):
        for kind in ('PNG', 'SVG') if 'map' in where or 'loss' in where else ('SVG',):
            with page.expect_download() as download:
                page.locator(f'{where} [data-kind={kind}]').first.click()
            assert download.value.suggested_filename.endswith('.' + kind.lower())
            download.value.save_as(tmp_path / 'picture')
            data = (tmp_path / 'picture').read_bytes()
            if kind == 'PNG':
                assert (
                    data.startswith(b'\x89PNG\r\n\x1a\n')
                    and int.from_bytes(data[16:20], 'big') > 600
                    and len(data) > 10_000
                )
            else:
                root = xml.etree.ElementTree.fromstring(data)
                texts = ' '.join(
                    text.text or '' for text in root.iter('{http://www.w3.org/2000/svg}text')
                )
                assert (
                    root.tag == '{http://www.w3.org/2000/svg}svg'
                    and 'step 6,000' in texts
                    and 'val loss 3.274' in texts
                )


def test_sliders_move_checkpoints_and_thresholds(show):
    report = head_reports.pair(33)
    page = show(report)
    run, edges = (
        report['checkpoints'][0],
        [edge for model in report['models'] for edge in model['composition']],
    )
    for place in (0, 7, 14):
        page.locator('#moment').evaluate(
            """(slider, value) => { slider.value = value;
            slider.dispatchEvent(new Event("input")); }""",
            place,
        )
        cells = page.locator('#training-maps article').first.locator('.heat i').all_inner_texts()
        assert cells == [f'{value:.2f}' for value in np.ravel(run['scores'][place])]
        assert (
            page.locator('#training-plots .dots circle').count() == 6
            and f'step {run["step"][place]:,}' in page.locator('#training-maps').inner_text()
        )
    page.locator('#threshold').evaluate(
        'slider => { slider.value = 0.2; slider.dispatchEvent(new Event("input")); }'
    )
    assert (
        page.locator('.edge').count() == sum(edge['value'] >= 0.2 for edge in edges) == 4
    )  # previous to induction, by K
    page.locator('#graph-kinds [data-kind="K"]').click()
    assert page.locator('.edge').count() == 0
    page.locator('.node[data-head="3"]').first.click()
    assert page.evaluate('views[0].head') == 3
    box = page.locator('#loss-plot .plot').bounding_box()
    page.locator('#loss-plot .plot').hover(position=dict(x=box['width'] - 20, y=60))
    assert (
        page.locator('#loss-plot .reading')
        .inner_text()
        .startswith('position 32: made by hand, MHA, repeated')
    )


def test_graphs_begin_with_the_strongest_edges_of_each_model(show):
    report = head_reports.pair(33)
    for edge in report['models'][1]['composition']:
        edge['value'] *= 10  # two models' values need not be of one size
    page = show(report)
    for graph, model in zip(page.locator('#graphs .figure').all(), report['models']):
        strongest = sorted((edge['value'] for edge in model['composition']), reverse=True)[:25]
        assert len(strongest) == 25 == graph.locator('.edge').count()
        drawn = [
            float(title.rsplit(' ', 1)[1])
            for title in graph.locator('.edge title').evaluate_all(
                'all => all.map(title => title.textContent)'
            )
        ]
        assert sorted(drawn, reverse=True) == pytest.approx(strongest, abs=5e-4)
    assert 'strongest 25' in page.locator('#threshold-value').inner_text()


def test_a_head_may_be_called_something_on_text_alone(show):
    report = head_reports.pair(33)
    model = report['models'][0]
    plain = next(i for i, score in enumerate(model['scores']) if not score['label'])
    model['scores'][plain]['on_text'] = dict(score=0.4, label='induction')
    page = show(report)
    page.locator(f'.view .thumb[data-head="{plain}"]').first.click()
    assert page.locator('.chosen .label').first.inner_text() == 'induction on text'


def test_texts_stay_texts_and_untrained_is_red(show):
    page = show(hostile())
    assert (
        page.title().startswith('Attention heads · made by hand, MHA · </script>')
        and page.locator('body script').count() == 6
    )
    assert (
        page.locator('.banner.untrained').count() == 1
        and 'Untrained.' in page.locator('.banner.untrained').inner_text()
    )
    assert (
        page.locator('.banner .alarm').evaluate('element => getComputedStyle(element).color')
        == 'rgb(180, 35, 24)'
    )
    assert page.locator('.view .warning').evaluate_all(
        'all => all.map(element => element.hidden)'
    ) == [True, False]
    assert page.locator('.strip').nth(1).locator('span').nth(3).inner_text().startswith('</script>')
    point(page, 12, 3, view=1)
    assert '</script>' in page.locator('.asks').nth(1).inner_text()
    assert page.locator('#footer').inner_text().startswith('</script>')


@pytest.mark.parametrize('scheme, width', [('light', 390), ('dark', 1400)])
def test_it_does_with_little(show, scheme, width):
    page = show(bare(), viewport=dict(width=width, height=900), color_scheme=scheme)
    assert (
        page.locator('.view').count() == 1 and page.locator('#banners').inner_text().count('–') == 3
    )
    for section in ('table', 'loss', 'graph', 'training'):
        assert not page.locator(f'#{section}-section').is_visible()
    page.locator('#second-view').click()
    assert page.locator('.view').count() == 2
    point(page, 12, 5, view=1)
    assert asked(page, 0)[:2] == asked(page, 1)[:2] == (12, 5)
    for report in (bare(), hostile()):
        assert (
            show(report, viewport=dict(width=width, height=900)).evaluate(
                'document.documentElement.scrollWidth'
            )
            == width
        )
    page.emulate_media(color_scheme='light' if scheme == 'dark' else 'dark')
    settle(page)
    corner = page.evaluate(
        """() => { const { base, place, ratio } = views[0].map;
        const corner = [(place.left + 20) * ratio, (place.top + 200) * ratio];
        const pixel = base.getContext("2d").getImageData(...corner, 1, 1).data;
        return [...pixel].slice(0, 3); }"""
    )
    assert (sum(corner) > 382) == (scheme == 'dark')  # paper is pale by day and dim at night
