"""A real headless Chromium, the system's own; and a page whose console, origins and failures are watched."""

from __future__ import annotations

import base64
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest

if TYPE_CHECKING:  # `make test` collects these files on machines without it
    from playwright.sync_api import Browser, Page

MILLISECONDS = 60_000
NAMES = ("chromium", "chromium-browser", "google-chrome")

# Each change of the progress bar and of the lines that are read aloud.
RECORD = """
window.seen = {bar: [], stage: [], live: [], state: []};
addEventListener('DOMContentLoaded', () => {
  const watch = (id, read) => document.getElementById(id) && new MutationObserver(() => {
    const element = document.getElementById(id), value = read(element), list = window.seen[id];
    if (value !== null && list.at(-1) !== value) list.push(value);
  }).observe(document.getElementById(id), {childList: true, characterData: true, attributes: true, subtree: true});
  watch('bar', (bar) => bar.hasAttribute('value') ? bar.value : null);
  for (const id of ['stage', 'live', 'state']) watch(id, (element) => element.textContent);
});
"""


@dataclass
class Visit:
    """A page of ours, open in a browser. `statuses` are the refusals that its test means to meet; `goes_away` says
    that it ends the server."""

    page: Page
    origin: str
    statuses: set[int] = field(default_factory=set)
    goes_away: bool = False
    requests: list[Any] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)

    def until(self, condition: str) -> None:
        """Wait for an expression to be true. (Playwright's own wait_for_function needs what our policy forbids.)"""
        deadline = time.monotonic() + MILLISECONDS / 1000
        while not self.page.evaluate(condition):
            assert time.monotonic() < deadline, condition
            time.sleep(0.02)

    def generate(self, prompt: str = "a red fox in the snow", **fields: Any) -> None:
        self.page.fill("#prompt", prompt)
        for name, value in fields.items():
            control = self.page.locator(f"#p-{name}")
            if not control.is_visible():
                self.page.click("#more > summary")
            if control.evaluate("element => element.tagName") == "SELECT":
                control.select_option(value)
            else:
                control.fill(str(value))
        self.page.click("#generate")

    def result(self, number: int = 1) -> Any:
        """The newest card of the gallery, once there are so many."""
        self.until(f"document.querySelectorAll('#gallery > li').length == {number}")
        return self.page.locator("#gallery > li").first

    def downloaded(self, card: Any) -> tuple[str, bytes]:
        with self.page.expect_download() as told:
            card.get_by_text("Download").click()
        return told.value.suggested_filename, told.value.path().read_bytes()

    def seen(self, what: str) -> list[Any]:
        found: list[Any] = self.page.evaluate(f"window.seen['{what}']")
        return found

    def give(self, event: str, target: str, *files: tuple[str, str, bytes]) -> None:
        """Drop files on the element `target`, or paste them into it."""
        encoded = [[name, kind, base64.b64encode(data).decode()] for name, kind, data in files]
        self.page.evaluate(
            """([event, target, files]) => {
                const data = new DataTransfer();
                for (const [name, type, text] of files)
                    data.items.add(new File([Uint8Array.from(atob(text), (c) => c.charCodeAt(0))], name, {type}));
                const options = {bubbles: true, cancelable: true};
                document.querySelector(target).dispatchEvent(event === 'paste'
                    ? new ClipboardEvent(event, {...options, clipboardData: data})
                    : new DragEvent(event, {...options, dataTransfer: data}));
            }""",
            [event, target, encoded],
        )

    def check(self) -> None:
        """Nothing was complained about, and nobody else was asked for anything."""
        refused = re.compile(r"Failed to load resource: the server responded with a status of (\d+)")
        unmeant = [
            told
            for told in self.complaints
            if not (self.goes_away and "ERR_CONNECTION_REFUSED" in told)
            and not ((match := refused.match(told)) is not None and int(match[1]) in self.statuses)
        ]
        assert not unmeant
        origins = {
            urlsplit(request.url)[:2] for request in self.requests if not request.url.startswith(("data:", "blob:"))
        }
        assert origins == {urlsplit(self.origin)[:2]}


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    from playwright.sync_api import sync_playwright

    path = next(filter(None, map(shutil.which, NAMES)), None)
    assert path, "no Chromium: apt-get install --no-install-recommends chromium"
    flags = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=flags)
        yield browser
        browser.close()


Open = Callable[..., Visit]


@pytest.fixture
def visit(browser: Browser) -> Iterator[Open]:
    """`visit(url)`: the page at `url`/ui, ready for a prompt; keywords go to the browser's context."""
    visits: list[Visit] = []

    def begin(url: str, path: str = "/ui", ready: bool = True, **options: Any) -> Visit:
        context = browser.new_context(**options)
        context.set_default_timeout(MILLISECONDS)
        context.add_init_script(RECORD)
        page = context.new_page()
        found = Visit(page, url)
        visits.append(found)
        page.on("request", lambda request: found.requests.append(request))
        page.on("pageerror", lambda error: found.complaints.append(str(error)))
        page.on("console", lambda line: found.complaints.append(line.text) if line.type != "log" else None)
        page.goto(url + path)
        if ready:
            page.wait_for_selector("#main:not([hidden])")
        return found

    yield begin
    for found in visits:
        found.page.context.close()
    for found in visits:
        found.check()
