"""Shapes and types of the numeric core are checked in every test run.

The import hook must be in place before the packages are first imported, which is why it sits here, at the top.
"""

import os
import shutil
from pathlib import Path

import pytest
from jaxtyping import install_import_hook

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Tiny models gain nothing from a second thread, and threads of several processes wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

CHECKED_PACKAGES = ("interventions", "explainer", "models", "features", "evaluation", "simulator", "rewrite")

install_import_hook([f"introspect_ray.{package}" for package in CHECKED_PACKAGES], "beartype.beartype")


@pytest.fixture(scope="module")
def chromium():
    """Debian's Chromium, driven by Playwright; where there is none, tests that need it are skipped.

    While it is there an event loop counts as running, so it ends with the module.
    """
    path = shutil.which("chromium")
    if path is None:
        pytest.skip("no chromium: apt-get install chromium")
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path)
        yield browser
        browser.close()


@pytest.fixture
def new_page(chromium):
    """Makes pages in contexts of their own. A page that breaks its own rules or asks another host fails the test."""
    contexts, complaints = [], []

    def new_page(width=1600):
        context = chromium.new_context(viewport={"width": width, "height": 1000})
        context.set_default_timeout(20_000)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda said: complaints.append(said.text) if "Content Security" in said.text else None)
        page.on("request", lambda asked: None if "//127.0.0.1:" in asked.url else complaints.append(asked.url))
        return page

    yield new_page
    for context in contexts:
        context.close()
    assert complaints == []


@pytest.fixture
def save(tmp_path):
    """Saves a screenshot under a name, to be looked at: in $SCREENSHOTS, or where the test leaves its files."""
    folder = Path(os.environ.get("SCREENSHOTS", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)
    return lambda page, name: page.screenshot(path=folder / f"{name}.png", full_page=True)
