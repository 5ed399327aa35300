"""
A picture of a page as a browser shows it, for the README.

    python assets/photograph.py --page=out/heads.html

Needs playwright (requirements-heads.txt) and a Chromium or Chrome on the PATH.
"""

import os
import shutil
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), '..'))
from nanomla.core.configurator import UserError, configure

# -----------------------------------------------------------------------------
page = 'heads.html'
out = 'assets/heads_page.png'
width = 1400  # CSS pixels; the picture has twice as many at scale = 2.0
height = 1000
scale = 1.0  # pixels a CSS pixel
full = False  # the whole page, however long
dark = False  # as with a dark desktop
config = configure(globals())
# -----------------------------------------------------------------------------

browser = next(
    filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None
)
if browser is None:
    raise UserError(
        'a picture of a page needs a browser, and there is neither chromium nor google-chrome on the PATH'
    )
try:
    from playwright.sync_api import Error, sync_playwright
except ImportError as error:
    raise UserError(
        'a picture of a page needs playwright: pip install -r requirements-heads.txt'
    ) from error
if not os.path.isfile(page):
    raise UserError(f'{page}: no such page')

with sync_playwright() as playwright:
    chromium = playwright.chromium.launch(executable_path=browser, args=['--no-sandbox'])
    tab = chromium.new_page(
        viewport={'width': width, 'height': height},
        device_scale_factor=scale,
        color_scheme='dark' if dark else 'light',
    )
    tab.on('console', lambda message: print(f'{page}: {message.text}', file=sys.stderr))
    tab.on('pageerror', lambda problem: print(f'{page}: {problem}', file=sys.stderr))
    tab.goto('file://' + os.path.abspath(page))
    try:
        tab.wait_for_selector('body.complete', timeout=10_000)
    except Error as error:
        raise UserError(f'{page}: this page of heads was not drawn within 10 seconds') from error
    temporary = f'{out}.{os.getpid()}.tmp.png'
    tab.screenshot(path=temporary, full_page=full)
    os.replace(temporary, out)
    chromium.close()
