"""Take the pictures of the documentation: `make pictures`. A real run over a RabbitMQ, in a real browser.

docs/watch.png: the live page a moment after a worker was killed. docs/report.png: the report of that run at its end.
docs/curves.png: its curves.
"""

import sys
import time
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from sl_queue.config.job import Job  # noqa: E402
from sl_queue.launch.following import Follower  # noqa: E402
from sl_queue.launch.reporting import write_report  # noqa: E402
from sl_queue.observe.live import Live  # noqa: E402
from sl_queue.observe.web import WatchServer  # noqa: E402
from sl_queue.planning.ideal import ideal_bubble  # noqa: E402
from sl_queue.testing.private_broker import PrivateBroker  # noqa: E402
from tests.support.browser import chromium, text_of, until  # noqa: E402
from tests.support.credit import edit  # noqa: E402
from tests.support.crew import Crew, write_job  # noqa: E402

DOCS = ROOT / "docs"
WIDTH = 1000
SLOW = """    def forward(self, x: torch.Tensor) -> torch.Tensor:
        __import__("time").sleep(0.02)
"""


def main() -> None:
    """Train, kill, look, and write the pictures."""
    with TemporaryDirectory(prefix="sl_queue-pictures-") as name, PrivateBroker() as broker, chromium() as chrome:
        folder = Path(name)
        path = write_job(folder, checkpoint_every=10)
        edit(path, "epochs = 8", "epochs = 60")
        edit(folder / "bank.py", "    def forward(self, x: torch.Tensor) -> torch.Tensor:\n", SLOW)
        job, url = Job.load(path), broker.url()
        live = Live(partial(ideal_bubble, job))
        with Crew(folder, url) as crew, WatchServer(live, 0) as server, Follower(job, url, None, live):
            crew.start()
            chrome.get(server.url)
            crew.await_step("insurer", 60)
            time.sleep(2)  # so that the curves are more than a moment
            crew.kill("bank")
            until(chrome, lambda c: "bank is gone" in text_of(c, "verdict"), 30)
            take(chrome, DOCS / "watch.png")
            crew.start("bank")
            crew.finish(timeout_s=300)
            report, _ = write_report(job, crew.states / "scheduler", folder)
        chrome.get(report.as_uri())
        take(chrome, DOCS / "report.png")
        chrome.find_element(By.ID, "charts").screenshot(str(DOCS / "curves.png"))


def take(chrome: Chrome, path: Path) -> None:
    """Take a picture of the whole page."""
    chrome.set_window_size(WIDTH, 400)
    chrome.set_window_size(
        WIDTH, min(1500, chrome.execute_script("return document.documentElement.scrollHeight") + 140)
    )
    chrome.save_screenshot(str(path))


if __name__ == "__main__":
    main()
