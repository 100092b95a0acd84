"""The page in a real browser: Chromium, where Debian or the PATH has one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import pytest

from memlayer.inspection import inspect_prompt, write_page

if TYPE_CHECKING:
    from pathlib import Path

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
)


class Browser:
    """One window, driven by Selenium; keeps a log of every request."""

    def __init__(self, profile: Path) -> None:
        from selenium import webdriver
        from selenium.webdriver.chrome.service import Service

        options = webdriver.ChromeOptions()
        options.binary_location = next(filter(None, map(shutil.which, BROWSERS)))
        for flag in (*FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        service = Service(shutil.which("chromedriver"))
        self.driver = webdriver.Chrome(options=options, service=service)

    def open(self, page: Path, *, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        self.driver.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600},
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        self.logs()
        self.driver.get(page.as_uri())

    def logs(self) -> tuple[list[Any], list[str]]:
        """Give what the console said since the last call, and what was asked for."""
        console = self.driver.get_log("browser")
        messages = [json.loads(entry["message"]) for entry in self.driver.get_log("performance")]
        requests = [
            message["message"]["params"]["request"]["url"]
            for message in messages
            if message["message"]["method"] == "Network.requestWillBeSent"
        ]
        return console, requests

    def run(self, script: str, *arguments: object) -> Any:
        return self.driver.execute_script(f"return {script}", *arguments)

    def find(self, selector: str) -> Any:
        from selenium.webdriver.common.by import By

        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def text(self, selector: str) -> str:
        # Upper case is the style's doing.
        return " ".join(
            self.run("document.querySelector(arguments[0]).textContent", selector).split()
        )


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if find_spec("selenium") is None:
        pytest.skip("needs selenium: pip install selenium")
    if not any(map(shutil.which, BROWSERS)) or not shutil.which("chromedriver"):
        pytest.skip("needs Chromium and its driver: apt-get install chromium chromium-driver")
    opened = Browser(tmp_path_factory.mktemp("profile"))
    yield opened
    opened.driver.quit()


@pytest.fixture
def page(inspection, tmp_path) -> Path:
    path = tmp_path / "page.html"
    write_page(inspection, path)
    return path


def token(number: int) -> str:
    return f"[data-n='{number}']"


def test_the_page_draws_itself_without_an_error_or_a_request(browser, page):
    browser.open(page)
    assert browser.run("document.documentElement.dataset.ready") == "true"
    console, requests = browser.logs()
    assert console == []
    assert requests == [page.as_uri()]


def test_a_hovered_token_shows_its_passages_and_a_clicked_one_stays(browser, page, inspection):
    from selenium.webdriver import ActionChains

    browser.open(page)
    hovered, clicked = browser.find(token(3)), browser.find(token(5))
    ActionChains(browser.driver).move_to_element(hovered).perform()
    assert f"token 4 of {len(inspection.tokens)}" in browser.text("#panel")
    ActionChains(browser.driver).move_to_element(clicked).click().perform()
    shown = browser.text("#panel")
    assert f"token 6 of {len(inspection.tokens)}" in shown
    chunks = {passage.chunks[0]: passage for passage in inspection.chunks}
    for read in inspection.tokens[5].reads:
        passage = chunks[read.chunk]
        assert passage.document in shown
        assert f"token {passage.offset:,}" in shown
        assert f"{passage.distance:,} token" in shown
    marked = browser.run("[...document.querySelectorAll('#panel mark')].map((m) => m.textContent)")
    passage = chunks[inspection.tokens[5].reads[0].chunk]
    (mark,) = passage.marks
    assert marked[0].split() == passage.text[mark[0] : mark[1]].split()
    ActionChains(browser.driver).move_to_element(browser.find("h1")).perform()
    assert browser.text("#panel") == shown


def test_arrow_keys_move_from_token_to_token(browser, page):
    from selenium.webdriver import Keys

    browser.open(page)
    browser.find(token(2)).click()
    pressed = "document.querySelector('[aria-pressed=true]').dataset.n"
    active = "document.activeElement.dataset.n"
    for key, expected in (
        (Keys.ARROW_RIGHT, "3"),
        (Keys.ARROW_LEFT, "2"),
        (Keys.HOME, "0"),
        (Keys.ARROW_LEFT, "0"),
        (Keys.END, "13"),
        (Keys.ARROW_RIGHT, "13"),
    ):
        browser.driver.switch_to.active_element.send_keys(key)
        assert (browser.run(pressed), browser.run(active)) == (expected, expected)
    # One stop for the tab key, however many tokens there are.
    assert browser.run("document.querySelectorAll('.t[tabindex=\"0\"]').length") == 1


def test_tokens_can_be_coloured_by_how_closely_they_read(browser, page):
    browser.open(page)
    colours = "[...document.querySelectorAll('.t')].map((t) => t.style.backgroundColor)"
    before = browser.run(colours)
    assert len(set(before)) > 2
    browser.run("document.querySelector('input[value=focus]').click()")
    after = browser.run(colours)
    assert len(set(after)) > 2
    assert before != after


@pytest.mark.parametrize("width", [320, 390, 768])
def test_no_width_needs_scrolling_sideways(browser, page, width):
    browser.open(page, width=width, height=844)
    assert browser.run("document.documentElement.scrollWidth") <= width
    # Nor is anything cut off; only the table of heads scrolls, in a frame of its own.
    outside = """[...document.querySelectorAll('main *')].filter(
        (part) => !part.closest('.scroll') && part.getBoundingClientRect().right > innerWidth + 1
    ).length"""
    assert browser.run(outside) == 0


def test_text_can_be_read_in_the_light_and_in_the_dark(browser, page):
    script = """(() => {
      const light = (colour) => {
        const [r, g, b] = colour.match(/[\\d.]+/g).map((v) => v / 255).map(
          (v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
      };
      const contrast = (text, ground) => {
        const [low, high] = [light(text), light(ground)].sort((a, b) => a - b);
        return (high + 0.05) / (low + 0.05);
      };
      const colour = (selector, name) => getComputedStyle(document.querySelector(selector))[name];
      const card = colour('.card', 'backgroundColor');
      return [contrast(colour('.quote', 'color'), card), contrast(colour('.where', 'color'), card),
              contrast(colour('#panel mark', 'color'), colour('#panel mark', 'backgroundColor')),
              light(card)];
    })()"""
    grounds = []
    for dark in (False, True):
        browser.open(page, dark=dark)
        *contrasts, ground = browser.run(script)
        # 4.5 is what WCAG 2 asks of text at level AA.
        assert min(contrasts) > 4.5
        grounds.append(ground)
    assert grounds[0] > 0.5 > grounds[1]


def test_what_a_document_says_is_not_run(browser, make_model, remember, tiny_backbone, tmp_path):
    evil = (
        "</script><script>document.title='run'</script><img src=x onerror=\"document.title='run'\">"
    )
    model = make_model(segment_length=128)
    remember(model, evil, document="<img src=x onerror=\"document.title='run'\">")
    path = tmp_path / "evil.html"
    write_page(inspect_prompt(model, tiny_backbone.tokenizer, evil), path)
    browser.open(path)
    console, requests = browser.logs()
    assert (console, requests) == ([], [path.as_uri()])
    assert browser.driver.title.endswith("memlayer inspect")
    assert browser.run("document.images.length") == 0
    assert "<img src=x onerror=" in browser.text("#docs")


def test_an_empty_memory_has_a_page(browser, make_model, tiny_backbone, tmp_path):
    path = tmp_path / "empty.html"
    write_page(inspect_prompt(make_model(), tiny_backbone.tokenizer, "x"), path)
    browser.open(path)
    console, _ = browser.logs()
    assert console == []
    assert "there was no memory to read" in browser.text("#panel")
    assert "the memory is empty" in browser.text("#passages")
