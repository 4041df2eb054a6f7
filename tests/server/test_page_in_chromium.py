"""The web page in a real browser: two sizes, four streaming clients, a token, and no request to other servers."""

import asyncio
import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from surfw.client import open_wire_source
from surfw.server import WeightServer
from tests.conftest import require
from tests.peers import whole
from tests.stores import make_store


@pytest.fixture
def browser() -> Iterator[Any]:
    """A Chromium without a window."""
    try:
        from selenium import webdriver
    except ImportError:
        require("selenium is not installed: pip install selenium")
    if not (chromium := shutil.which("chromium")) or not (driver := shutil.which("chromedriver")):
        require("there is no Chromium: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for one in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(one)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    opened = webdriver.Chrome(options, webdriver.ChromeService(driver))
    try:
        yield opened
    finally:
        opened.quit()


def test_the_page_in_a_browser(browser: Any, tmp_path: Path) -> None:
    manifest = make_store(tmp_path / "store", "org/model", sizes=[50_000] * 24)

    async def main() -> None:
        async with WeightServer(model_path=tmp_path / "store", port=0, token="secret") as server:
            going = asyncio.Event()

            async def stream() -> None:
                async with await open_wire_source(server.url, token="secret") as source:
                    while not going.is_set():
                        for chunk in manifest.chunks:
                            await source.fetch(manifest, [whole(chunk)[0]])
                            await asyncio.sleep(0.002)

            streams = [asyncio.create_task(stream()) for _ in range(4)]
            for number in range(1000):
                server._journal.note("joined", f"<b>event</b> {number}", level=logging.DEBUG)
                if number % 40 == 39:
                    await asyncio.sleep(0.02)
            try:
                await asyncio.to_thread(look, browser, server.port, tmp_path)
            finally:
                going.set()
                await asyncio.gather(*streams)

    asyncio.run(main())


def look(browser: Any, port: int, folder: Path) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.wait import WebDriverWait

    wait, address = WebDriverWait(browser, 60), f"http://127.0.0.1:{port}/"
    browser.set_window_size(1200, 900)
    browser.get(address)
    wait.until(lambda page: page.find_element(By.ID, "token").is_displayed())
    browser.find_element(By.ID, "token").send_keys("secret\n")
    wait.until(lambda page: len(page.find_elements(By.CSS_SELECTOR, "#clients tr")) == 4)
    wait.until(lambda page: page.find_elements(By.CSS_SELECTOR, ".strip i.hit"))
    assert len(browser.find_elements(By.CSS_SELECTOR, ".strip i")) == 24
    assert len(browser.find_elements(By.CSS_SELECTOR, "#events tr")) >= 40
    assert browser.find_elements(By.CSS_SELECTOR, "#events b") == [], "texts from outside are texts"
    for width, height, scheme in ((1200, 900, "light"), (390, 844, "dark")):
        browser.execute_cdp_cmd(
            "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        )
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        wait.until(lambda page: page.find_element(By.ID, "state").text == "live")
        assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth"), "nothing sticks out"
        assert browser.save_screenshot(str(folder / f"{scheme}.png"))
    asked = [json.loads(one["message"])["message"] for one in browser.get_log("performance")]
    urls = [one["params"]["request"]["url"] for one in asked if one["method"] == "Network.requestWillBeSent"]
    assert {url for url in urls if not url.startswith("data:")} == {address, f"{address}events"}
    assert "secret" not in json.dumps([urls, browser.current_url])
    errors = [one for one in browser.get_log("browser") if one["level"] == "SEVERE" and "401" not in one["message"]]
    assert errors == []
