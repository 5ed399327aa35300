"""
A picture of a page as a browser shows it, for the docs.

    python assets/photograph.py --page=out/heads.html

Needs playwright (pip install -e .[heads]) and a Chromium or Chrome on the PATH.
"""

import os
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository

from nanomla.core.configurator import UserError, configure

page = 'heads.html'
out = 'assets/heads_page.png'
width = 1400  # CSS pixels; the picture has twice as many at scale = 2.0
height = 1000
scale = 1.0  # pixels a CSS pixel
full = False  # the whole page, however long
dark = False  # as with a dark desktop


def find_browser() -> str:
    """Return the path of a Chromium or Chrome."""
    for name in ('chromium', 'chromium-browser', 'google-chrome'):
        if path := shutil.which(name):
            return path
    raise UserError(
        'a picture of a page needs a browser, and there is neither chromium nor google-chrome on '
        'the PATH'
    )


def import_playwright():
    try:
        from playwright import sync_api
    except ImportError:
        raise UserError('a picture of a page needs playwright: pip install -e .[heads]') from None
    return sync_api


def photograph(tab, timeout_error: type[Exception]) -> None:
    """Write the picture of the page in this tab of a browser to `out`."""
    tab.on('console', lambda message: print(f'{page}: {message.text}', file=sys.stderr))
    tab.on('pageerror', lambda problem: print(f'{page}: {problem}', file=sys.stderr))
    tab.goto('file://' + os.path.abspath(page))
    try:
        tab.wait_for_selector('body.complete', timeout=10_000)
    except timeout_error:
        raise UserError(f'{page}: this page of heads was not drawn within 10 seconds') from None
    partial = f'{out}.{os.getpid()}.partial.png'
    tab.screenshot(path=partial, full_page=full)
    os.replace(partial, out)


def main():
    configure(globals())
    browser = find_browser()
    api = import_playwright()
    if not os.path.isfile(page):
        raise UserError(f'{page}: no such page')
    with api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=browser, args=['--no-sandbox'])
        tab = chromium.new_page(
            viewport={'width': width, 'height': height},
            device_scale_factor=scale,
            color_scheme='dark' if dark else 'light',
        )
        photograph(tab, api.Error)
        chromium.close()


if __name__ == '__main__':
    main()
