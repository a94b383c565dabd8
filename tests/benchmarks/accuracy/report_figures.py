"""Charts of a comparison's report as pictures, for a README.

    python -m tests.benchmarks.accuracy.report_figures OUT/report.html docs/figures digits 2 7

The report is opened in headless Chromium (the extra "dev" has Playwright; the browser is the machine's), and the charts
with these numbers, counted from 1, are written to ``DIR/NAME-NUMBER.png``, light, at 720 pixels. Without numbers it
lists the charts.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright


def main() -> None:
    """See the module."""
    report, numbers = Path(sys.argv[1]).resolve(), [int(number) for number in sys.argv[4:]]
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))))
    with sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=browser, args=["--no-sandbox", "--disable-gpu"])
        page = started.new_page(viewport={"width": 760, "height": 1000}, color_scheme="light", device_scale_factor=1.2)
        page.set_default_timeout(300_000)  # milliseconds; a report of a hundred runs draws for a while
        page.goto(report.as_uri())
        page.wait_for_selector(".chart svg")
        figures = page.locator("figure")
        for number in numbers:
            folder = Path(sys.argv[2])
            folder.mkdir(parents=True, exist_ok=True)
            figures.nth(number - 1).locator(".chart").screenshot(path=folder / f"{sys.argv[3]}-{number}.png")
        if not numbers:
            for index in range(figures.count()):
                print(index + 1, figures.nth(index).locator("figcaption").inner_text())
        started.close()


if __name__ == "__main__":
    main()
