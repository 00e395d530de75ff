"""A headless Chromium for the tests: Debian's, which tests/obtain_browser.sh installs where it is missing."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.support.wait import WebDriverWait

CONTRAST = """const parse=c=>c.match(/[\\d.]+/g).slice(0,3).map(Number);
const linear=v=>v<=.03928?v/12.92:((v+.055)/1.055)**2.4;
const light=c=>parse(c).map(v=>linear(v/255)).reduce((s,v,i)=>s+v*[.2126,.7152,.0722][i],0);
const paper=light(getComputedStyle(document.body).backgroundColor);
const words=e=>[...e.childNodes].some(n=>n.nodeType===Node.TEXT_NODE&&n.data.trim());
return [...document.querySelectorAll("body *")].filter(e=>!["SCRIPT","STYLE"].includes(e.tagName)&&words(e)).map(e=>{
  const style=getComputedStyle(e),ink=light(e instanceof SVGElement?style.fill:style.color);
  return (Math.max(ink,paper)+.05)/(Math.min(ink,paper)+.05)}).reduce((a,b)=>Math.min(a,b));
"""


@contextmanager
def chromium(*, width: int = 1200, height: int = 900, dark: bool = False) -> Iterator[Chrome]:
    """Start a browser; fails the test where there is none, as tests without a broker do."""
    browser, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if browser is None or driver is None:
        pytest.fail("no Chromium for the tests: sh tests/obtain_browser.sh, or apt-get install chromium-driver")
    options = ChromeOptions()
    options.binary_location = browser
    for argument in ("--headless=new", "--disable-gpu", "--disable-dev-shm-usage", f"--window-size={width},{height}"):
        options.add_argument(argument)
    if os.geteuid() == 0:  # Chromium's sandbox needs another user
        options.add_argument("--no-sandbox")
    if dark:
        options.add_argument("--blink-settings=preferredColorScheme=0")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    chrome = Chrome(options=options, service=Service(driver))
    try:
        chrome.set_window_size(width, height)
        yield chrome
    finally:
        chrome.quit()


def until(chrome: Chrome, condition: Callable[[Chrome], Any], timeout_s: float) -> Any:
    """Wait for something to be so on the page."""
    return WebDriverWait(chrome, timeout_s, poll_frequency=0.05).until(condition)


def text_of(chrome: Chrome, name: str) -> str:
    """Read the text of an element by its id."""
    found: str = chrome.execute_script("return document.getElementById(arguments[0]).textContent", name)
    return found


def complaints(chrome: Chrome) -> list[str]:
    """List what the page wrote to the console since it was last asked."""
    return [json.dumps(entry) for entry in chrome.get_log("browser")]


def overflow(chrome: Chrome, width: int) -> int:
    """Count the pixels by which the page is wider than a screen of that width."""
    chrome.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    )
    found: int = chrome.execute_script("return document.documentElement.scrollWidth - window.innerWidth")
    chrome.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    return found


def contrast(chrome: Chrome) -> float:
    """Return the least contrast of any text to the page; 4.5 is what WCAG asks for (AA)."""
    found: float = chrome.execute_script(CONTRAST)
    return found
