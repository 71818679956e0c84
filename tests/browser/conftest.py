"""Chromium, driven by playwright; tests that use it are skipped where there is none."""

from __future__ import annotations

import os
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from playwright.async_api import Browser, Page, async_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome")
ARGUMENTS = (
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
WAIT_MS = 20_000

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.browser)


@pytest.fixture
async def browser() -> AsyncIterator[Browser]:
    """A browser of the test's own, without a window."""
    executable = next(filter(None, map(shutil.which, NAMES)), None)
    if executable is None:
        pytest.skip("no Chromium is installed here (apt-get install chromium)")
    # Chromium's sandbox refuses to run as root, as which CI runs.
    sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(
            executable_path=executable, headless=True, args=[*ARGUMENTS, *sandbox]
        )
        yield browser
        await browser.close()


@pytest.fixture
async def page(browser: Browser) -> Page:
    """A page under whatever Content-Security-Policy the server sends."""
    page = await browser.new_page()
    page.set_default_timeout(WAIT_MS)
    return page


@pytest.fixture
async def script(browser: Browser) -> Page:
    """A page for the test's own script, which no Content-Security-Policy forbids."""
    page = await browser.new_page(bypass_csp=True)
    page.set_default_timeout(WAIT_MS)
    return page
