"""``report.html`` in headless Chromium: it draws, says nothing in the console, asks for nothing, its slider works."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from server_app.tools.compare.html import as_html
from tests.server_app.tools.compare.samples import compared, rows_of, runs_of

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    pytest.importorskip("plotly", reason="the extra 'report' is not installed")
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = next((found for name in NAMES if (found := shutil.which(name))), None)
    if path is None:
        pytest.skip(f"no browser: none of {', '.join(NAMES)} is in PATH")
    quiet = ["--disable-background-networking", "--disable-component-update", "--no-first-run", "--disable-quic"]
    with sync_api.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu", *quiet])
        yield started
        started.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    rows = rows_of()
    path.write_text(as_html(compared(rows), runs_of(rows), "digits: 3 clients", {"ties-seed0-0": "out of luck"}))
    return path


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def page(browser: Browser, report: Path, said: list[str]) -> Iterator[Page]:
    page = browser.new_page(viewport={"width": 1200, "height": 900})
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: said.append(request.url) if request.url.startswith("http") else None)
    page.goto(report.as_uri())
    yield page
    page.close()


def test_every_figure_is_drawn_and_nothing_is_said_or_fetched(page: Page, said: list[str]) -> None:
    figures = page.locator("figure").count()
    assert figures >= 15
    drawn = page.evaluate(
        "() => [...document.querySelectorAll('figure')].map(f => [f.querySelector('figcaption').textContent, "
        "f.querySelectorAll('.main-svg .trace, .main-svg .hm, .main-svg .point, .main-svg .bars').length])"
    )
    assert [caption for caption, marks in drawn if not marks] == []
    assert said == []


def test_the_slider_shows_another_round(page: Page, said: list[str]) -> None:
    figure = page.locator("figure", has=page.locator("figcaption", has_text="rival: relevance"))
    figure.scroll_into_view_if_needed()
    shown = "f => f.querySelector('.plotly-graph-div').data.map(trace => trace.visible)"
    assert figure.evaluate(shown) == [False, True]
    numbers = "f => f.querySelector('.plotly-graph-div').textContent"
    assert "0.88" in figure.evaluate(numbers)
    rail = figure.locator(".slider-rail-touch-rect").bounding_box()
    assert rail is not None
    page.mouse.click(rail["x"] + 3, rail["y"] + rail["height"] / 2)
    page.wait_for_function(
        "() => [...document.querySelectorAll('.plotly-graph-div')].some(c => c.layout.sliders?.[0].active === 0)"
    )
    assert figure.evaluate(shown) == [True, False]
    assert "0.88" not in figure.evaluate(numbers)
    assert "0.50" in figure.evaluate(numbers)
    assert said == []


def test_it_follows_light_and_dark_and_prints_all_numbers(page: Page, said: list[str]) -> None:
    ink = "() => getComputedStyle(document.querySelector('figure .main-svg .xtick text')).fill"
    page.emulate_media(color_scheme="light")
    light = page.evaluate(ink)
    page.emulate_media(color_scheme="dark")
    page.wait_for_function(f"before => ({ink})() !== before", arg=light)
    assert page.evaluate("() => getComputedStyle(document.body).backgroundColor") == "rgb(22, 24, 28)"
    page.evaluate("() => dispatchEvent(new Event('beforeprint'))")
    assert page.evaluate(ink) == light  # paper is white
    assert page.locator("details:not([open])").count() == 0
    page.evaluate("() => dispatchEvent(new Event('afterprint'))")
    assert page.locator("details[open]").count() == 0
    assert said == []


def test_a_narrow_page_scrolls_only_inside_its_figures_and_tables(page: Page) -> None:
    page.set_viewport_size({"width": 400, "height": 800})
    assert page.evaluate("() => document.documentElement.scrollWidth") <= 400
