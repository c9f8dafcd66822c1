"Debian's Chromium under Playwright, for tests; pages come from this machine only."
import os
import shutil
from contextlib import contextmanager

import pytest

FLAGS = """--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
    --disable-component-update --disable-sync""".split()
HERE = ("http://127.0.0.1", "http://localhost", "ws://127.0.0.1", "data:", "blob:", "file:")
MINUTES = 5*60_000 # that a page may take for anything, in milliseconds: the machine may be busy


@pytest.fixture(scope="module")
def chromium():
    "A browser, for the tests of a whole file: starting one takes seconds."
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not program and not os.environ.get("CI"): pytest.skip("Chromium is not installed")
    from playwright.sync_api import expect, sync_playwright
    expect.set_options(timeout=MINUTES)
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=program, args=FLAGS, timeout=MINUTES)
        try: yield running
        finally: running.close()


@contextmanager
def tab(running, **settings):
    "A page in a new profile of a browser; what goes wrong on it is collected in `page.wrong`."
    context = running.new_context(**settings)
    context.set_default_timeout(MINUTES)
    page = context.new_page()
    page.wrong = []
    def on_console(message):
        if message.type == "error": page.wrong.append(f"{page.url}: {message.text}")
    def on_request(request):
        if not request.url.startswith(HERE): page.wrong.append(f"{page.url} asks {request.url}")
    def on_failure(request):
        aborted = request.failure == "net::ERR_ABORTED" # by leaving the page
        if not aborted: page.wrong.append(f"{page.url}: {request.url} failed")
    page.on("console", on_console)
    page.on("pageerror", lambda e: page.wrong.append(f"{page.url}: {e}"))
    page.on("request", on_request)
    page.on("requestfailed", on_failure)
    try: yield page
    finally: context.close()
