"""Opens pages in a headless Chromium. If Chromium is not installed, tests that open pages are skipped."""

import contextlib
import dataclasses
import shutil
from pathlib import Path

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)


@dataclasses.dataclass
class Opened:
    """An open page, and a record of everything it did that pages must not do."""

    page: object
    complaints: list  # Console messages, errors and dialogs.
    requests: list  # URLs of all requests except the request for the file itself.


@contextlib.contextmanager
def opened(file, **options):
    """Opens a file in the browser; `options` are passed to Playwright's `new_page`."""
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed (required by browser tests)"
    )
    if CHROMIUM is None:
        pytest.skip("no chromium on the PATH (required by browser tests)")
    with playwright.sync_playwright() as p:
        chromium = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = chromium.new_page(**options)
        url, seen = Path(file).absolute().as_uri(), Opened(page, [], [])
        page.on("console", lambda message: seen.complaints.append(message.text))
        page.on("pageerror", lambda error: seen.complaints.append(str(error)))
        page.on("dialog", lambda dialog: (seen.complaints.append(dialog.message), dialog.dismiss()))
        page.on("request", lambda r: r.url == url or seen.requests.append(r.url))
        page.goto(url)
        yield seen
        chromium.close()
