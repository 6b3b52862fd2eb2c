"""A real browser: Debian's chromium and chromium-driver, driven by selenium, where they are."""

import shutil
import time

import pytest

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
selenium = pytest.importorskip("selenium", reason="selenium is not installed: pip install selenium")

from selenium import webdriver  # noqa: E402
from selenium.webdriver.chrome.service import Service  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402

__all__ = ["PHONE", "Browser", "By", "Keys", "needs_browser", "selenium"]

needs_browser = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver: apt-get install chromium chromium-driver"
)
PHONE = (390, 844)
# without the network switches chromium asks its makers' servers at every start
SWITCHES = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --window-size=1360,1000"
)


class Browser:
    """One visitor; ``size`` is that of a phone with a touch screen."""

    def __init__(self, address, downloads, performance=False, size=None):
        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        for switch in SWITCHES.split():
            options.add_argument(switch)
        options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
        if performance:
            options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=Service(DRIVER))
        if size:
            metrics = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": True}
            self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
            self.driver.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": True})
        self.driver.get(address)
        self.until(self.is_ready)

    def is_ready(self):
        return self.find("body").is_displayed()

    def find(self, selector):
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def all(self, selector):
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def text(self, selector):
        return self.find(selector).text

    def click(self, selector):
        self.find(selector).click()

    def js(self, script, *arguments):
        return self.driver.execute_script(script, *arguments)

    def until(self, condition, seconds=60):
        end, result = time.monotonic() + seconds, None
        while time.monotonic() < end:
            try:
                result = condition()
            except (selenium.common.exceptions.WebDriverException, IndexError):
                result = None  # not there yet, or the page is drawing that part anew
            if result:
                return result
            time.sleep(0.02)
        raise AssertionError(f"waited {seconds} s for a condition; the page says: {self.text('body')}")
