"""Takes the screenshots of docs/images: ``python -m tests.serve.screenshots ARTIFACT`` (needs Chromium)."""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.soak import serving
from tests.serve.chromium import Browser, find_browser

IMAGES = Path(__file__).resolve().parents[2] / "docs" / "images"
DONE = "document.querySelectorAll('.said.model .counts')"


def load(url):
    """Some users beside the one who is seen."""
    command = [sys.executable, "-m", "llmopt.cli.main", "bench", "serve", url, "--requests", "500", "--rate", "4"]
    lengths = [
        "--prompt-len",
        "uniform:8:64",
        "--output-len",
        "uniform:8:64",
        "--shared-prefixes",
        "4",
        "--prefix-len",
        "40",
    ]
    return subprocess.Popen([*command, *lengths], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def take(browser, url, name, **screen):
    """One conversation, and the picture after some readings."""
    tab = browser.open(url, **screen)
    tab.run("document.querySelector('details').open = false")
    tab.run("document.querySelector('#form').value = 'completion'")
    tab.run("document.querySelector('#max_tokens').value = 60")
    for number, text in enumerate(("The old house stood", "Once upon a time"), 1):
        tab.type("#prompt", text)
        tab.press_enter()
        tab.wait(f"{DONE}.length === {number} && {DONE}[{number - 1}].textContent", seconds=60)
    time.sleep(50)
    tab.run("window.scrollTo(0, 0)")
    (IMAGES / name).write_bytes(tab.screenshot())


def main(artifact):
    """Both pictures, at once."""
    IMAGES.mkdir(exist_ok=True)
    with (
        serving(Path(artifact), "--served-model-name", "classics-2m") as (_, url),
        tempfile.TemporaryDirectory() as profile,
    ):
        others, browser = load(url), Browser(find_browser(), profile)
        try:
            take(browser, url, "page-desktop.png", width=1280, height=900)
            take(browser, url, "page-phone.png", width=390, height=844, phone=True, dark=True, scale=1.5)
        finally:
            others.terminate()
            others.wait()
            browser.close()


if __name__ == "__main__":
    main(sys.argv[1])
