"""A headless Chromium, driven by selenium; tests that ask for it are skipped where it is not installed."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from selenium.webdriver.remote.webelement import WebElement

CHROMIUM, DRIVER = Path("/usr/bin/chromium"), Path("/usr/bin/chromedriver")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--lang=en-US",
)  # fmt: skip


def missing() -> str | None:
    """Why there is no browser, or None."""
    absent = [str(path) for path in (CHROMIUM, DRIVER) if not path.exists()]
    if absent:
        return f"no {' and no '.join(absent)}: apt-get install chromium chromium-driver"
    try:
        import selenium  # noqa: F401
    except ImportError:
        return "no selenium: pip install selenium"
    return None


needs_browser = pytest.mark.skipif(missing() is not None, reason=missing() or "")


class Browser:
    """A window."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def open(self, url: str) -> None:
        """Go to a page."""
        self.driver.get(url)

    def find(self, css: str) -> WebElement:
        """The first element that a selector names."""
        element: WebElement = self.driver.find_element("css selector", css)
        return element

    def all(self, css: str) -> list[WebElement]:
        """All elements that a selector names."""
        elements: list[WebElement] = self.driver.find_elements("css selector", css)
        return elements

    def run(self, script: str, *arguments: Any) -> Any:
        """The value that a script returns."""
        return self.driver.execute_script(script, *arguments)

    def text(self, css: str) -> str:
        """Text of an element, also of a hidden one."""
        return str(self.run("return document.querySelector(arguments[0]).textContent", css))

    def number(self, css: str) -> float | None:
        """The number that an element shows, from its ``data-value``."""
        value = self.run("return document.querySelector(arguments[0])?.dataset.value", css)
        return float(value) if value else None

    def until(self, condition: Callable[[], Any], seconds: float = 20) -> Any:
        """Wait for a condition, and say what the page showed if it never holds."""
        deadline = time.monotonic() + seconds
        while not (value := condition()):
            if time.monotonic() > deadline:
                raise AssertionError(f"not within {seconds} s; the page shows:\n{self.find('body').text}")
            time.sleep(0.1)
        return value

    def press(self, *keys: str) -> None:
        """Keys, to whatever has the focus."""
        from selenium.webdriver.common.action_chains import ActionChains

        ActionChains(self.driver).send_keys(*keys).perform()

    def size(self, width: int, height: int) -> None:
        """Size of the page's area, narrower than a window can be if need be."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

    def prefer(self, **features: str) -> None:
        """Media features, ``prefers_color_scheme="dark"``."""
        wanted = [{"name": name.replace("_", "-"), "value": value} for name, value in features.items()]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": wanted})

    def complaints(self) -> list[str]:
        """What the console said since the last call: scripts that failed, content that the policy blocked."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def picture(self, path: Path) -> None:
        """The whole page as a PNG, in the present width."""
        width, height = self.run("return [innerWidth, document.documentElement.scrollHeight]")
        self.size(width, height)
        self.driver.save_screenshot(str(path))


@contextmanager
def browser(width: int = 1280, height: int = 900) -> Iterator[Browser]:
    """A new browser without any state, closed at the end."""
    from selenium import webdriver

    os.environ["SE_OFFLINE"] = "true"  # nothing is looked for or downloaded
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as state:
        options = webdriver.ChromeOptions()
        options.binary_location = str(CHROMIUM)
        for flag in (*FLAGS, f"--user-data-dir={state}", f"--window-size={width},{height}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=str(DRIVER)))
        try:
            window = Browser(driver)
            window.size(width, height)
            yield window
        finally:
            driver.quit()
