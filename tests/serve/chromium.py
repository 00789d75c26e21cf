"""A headless Chromium driven over its debugging pipe: no driver to install, no port to open."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import time

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-dev-shm-usage",
    "--disable-extensions", "--disable-background-networking", "--disable-component-update", "--mute-audio",
    "--hide-scrollbars", "--force-color-profile=srgb", "--remote-debugging-pipe",
)  # fmt: skip


def find_browser():
    """The browser's path (LLMOPT_BROWSER or a known name), None when there is none."""
    return os.environ.get("LLMOPT_BROWSER") or next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One browser process; messages are JSON, each ended by a zero byte."""

    def __init__(self, path, profile):
        theirs_in, self._out = os.pipe()
        self._in, theirs_out = os.pipe()
        script = f'exec "$0" "$@" 3<&{theirs_in} 4>&{theirs_out}'
        command = ["bash", "-c", script, path, *FLAGS, f"--user-data-dir={profile}", "about:blank"]
        quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(command, pass_fds=(theirs_in, theirs_out), **quiet)
        os.close(theirs_in)
        os.close(theirs_out)
        self._buffer, self._number, self.events = b"", 0, []

    def call(self, method, session=None, **params):
        """Result of one command; events that come meanwhile are kept."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if session:
            message["sessionId"] = session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read(30)
            if answer.get("id") == self._number:
                assert "error" not in answer, answer["error"]
                return answer["result"]
            self.events.append(answer)

    def _read(self, seconds):
        end = time.monotonic() + seconds
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._in], [], [], max(0.0, end - time.monotonic()))
            assert ready, "the browser does not answer"
            data = os.read(self._in, 1 << 20)
            assert data, "the browser has gone"
            self._buffer += data
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

    def open(self, url, width=1280, height=860, phone=False, dark=False, scale=1.0):
        """A new tab of its own storage, showing ``url``."""
        context = self.call("Target.createBrowserContext")["browserContextId"]
        target = self.call("Target.createTarget", url="about:blank", browserContextId=context)["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        return Tab(self, session, url, width, height, phone, dark, scale)

    def close(self):
        """End the browser."""
        with contextlib.suppress(OSError):
            os.close(self._out)
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        os.close(self._in)


class Tab:
    """One page."""

    def __init__(self, browser, session, url, width, height, phone, dark, scale):
        self._browser, self._session = browser, session
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=phone
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url=url)
        self.wait("document.readyState === 'complete'")

    def call(self, method, **params):
        """A command of this tab."""
        return self._browser.call(method, self._session, **params)

    def run(self, expression):
        """The value of a JavaScript expression (promises are awaited)."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def wait(self, expression, seconds=15.0):
        """Wait until an expression is true, and return its value."""
        end = time.monotonic() + seconds
        while not (value := self.run(expression)):
            assert time.monotonic() < end, f"never true: {expression}"
            time.sleep(0.05)
        return value

    def click(self, selector):
        """Click an element as a user would: at its middle, where it is seen."""
        box = self.run(
            f"(() => {{const e = document.querySelector({selector!r}); e.scrollIntoView({{block: 'center', behavior:"
            " 'instant'}); const r = e.getBoundingClientRect(); return [r.x + r.width / 2, r.y + r.height / 2]})()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=box[0], y=box[1], button="left", clickCount=1)

    def type(self, selector, text):
        """Type into a field, replacing what it holds."""
        self.click(selector)
        self.run(f"document.querySelector({selector!r}).select()")
        self.call("Input.insertText", text=text)

    def press_enter(self):
        """The Enter key."""
        for kind in ("keyDown", "keyUp"):
            self.call(
                "Input.dispatchKeyEvent", type=kind, key="Enter", code="Enter", windowsVirtualKeyCode=13, text="\r"
            )

    def requested(self):
        """Addresses of all requests so far."""
        self.run("1")
        events = self.mine("Network.requestWillBeSent")
        return [event["request"]["url"] for event in events]

    def complaints(self):
        """What the browser logged as an error: scripts that failed, what the policy refused."""
        self.run("1")
        entries = [e["entry"]["text"] for e in self.mine("Log.entryAdded") if e["entry"]["level"] == "error"]
        return entries + [str(e["exceptionDetails"]) for e in self.mine("Runtime.exceptionThrown")]

    def mine(self, method):
        """Parameters of this tab's events of one kind."""
        return [e["params"] for e in self._browser.events
                if e.get("sessionId") == self._session and e.get("method") == method]  # fmt: skip

    def screenshot(self):
        """PNG bytes of what is seen."""
        return base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])
