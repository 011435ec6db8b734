"""A headless Chromium, told what to do over a pipe (the DevTools protocol): what a page looks like and asks for."""

import base64
import fcntl
import itertools
import json
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--remote-debugging-pipe",
)  # fmt: skip
LONGEST_WAIT = 60  # seconds
MEASURE = """(() => {
    document.querySelectorAll("details").forEach(e => { e.open = true });
    const clipped = e => e.closest(".scroll") !== null;
    const wide = [...document.querySelectorAll("body *")].filter(e => e.getBoundingClientRect().right > innerWidth + 1);
    return JSON.stringify({
        scroll_width: document.documentElement.scrollWidth,
        wide: wide.filter(e => !clipped(e)).map(e => e.tagName + " " + e.textContent.slice(0, 40)),
        background: getComputedStyle(document.body).backgroundColor,
        font: Math.min(...[...document.querySelectorAll("svg text")].map(e => e.getBoundingClientRect().height)),
    });
})()"""


@dataclass
class View:
    """One page as it was shown.

    requests      addresses that it asked for, its own included
    complaints    of the browser: errors on its console
    scroll_width  CSS pixels; more than the window's are an overflow
    wide          elements, folded tables unfolded, that reach beyond the window and are in no box that scrolls
    background    of the body, as CSS says it
    font          the least height of a picture's text, CSS pixels
    """

    requests: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)
    scroll_width: float = 0
    wide: list[str] = field(default_factory=list)
    background: str = ""
    font: float = 0


class Browser:
    def __init__(self, to_browser: int, from_browser: int):
        self._to, self._from = os.fdopen(to_browser, "wb", buffering=0), from_browser
        self._ids, self._rest = itertools.count(1), b""
        self.events: list[dict[str, Any]] = []

    def call(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        number = next(self._ids)
        message = {"id": number, "method": method, "params": params} | ({"sessionId": session} if session else {})
        self._to.write(json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]

    def wait_for(self, event: str) -> None:
        while all(each["method"] != event for each in self.events):
            self._read()

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            block = os.read(self._from, 1 << 20)
            if not block:
                raise RuntimeError("the browser has ended")
            self._rest += block
        message, _, self._rest = self._rest.partition(b"\0")
        answer = json.loads(message)
        if "method" in answer:
            self.events.append(answer)
        return answer

    def view(self, file: Path, *, width: int, dark: bool, screenshot: Path | None = None) -> View:
        """Of a file, in a window of so many CSS pixels, on a phone's screen below 500."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.events.clear()
        for domain in ("Page", "Network", "Log", "Runtime"):
            self.call(f"{domain}.enable", session)
        phone = width < 500
        self.call(
            "Emulation.setDeviceMetricsOverride", session, width=width, height=800, deviceScaleFactor=2 if phone else 1,
            mobile=phone,
        )  # fmt: skip
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", session, features=[scheme])
        self.call("Page.navigate", session, url=file.resolve().as_uri())
        self.wait_for("Page.loadEventFired")
        if screenshot is not None:
            image = self.call("Page.captureScreenshot", session, captureBeyondViewport=True)["data"]
            screenshot.write_bytes(base64.b64decode(image))
        measured = self.call("Runtime.evaluate", session, expression=MEASURE)["result"]["value"]
        time.sleep(0.2)  # what a page asks for after it was loaded
        self.call("Target.closeTarget", targetId=target)
        sent = [e["params"]["request"]["url"] for e in self.events if e["method"] == "Network.requestWillBeSent"]
        told = [
            json.dumps(e["params"]) for e in self.events if e["method"] in ("Log.entryAdded", "Runtime.exceptionThrown")
        ]
        return View(sent, told, **json.loads(measured))


@contextmanager
def browser(executable: str, profile: Path) -> Iterator[Browser]:
    """profile: a folder of its own."""
    ours, theirs = [], []
    for kept in (1, 0):  # the end we write to, then the one we read from
        pair = os.pipe()
        ours.append(pair[kept])
        theirs.append(fcntl.fcntl(pair[1 - kept], fcntl.F_DUPFD, 10))  # out of the way of 3 and 4
        os.close(pair[1 - kept])

    def place_pipes() -> None:
        os.dup2(theirs[0], 3)
        os.dup2(theirs[1], 4)

    command = [executable, *FLAGS, f"--user-data-dir={profile}", "about:blank"]
    process = subprocess.Popen(
        command, preexec_fn=place_pipes, close_fds=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    for descriptor in theirs:
        os.close(descriptor)
    try:
        made = Browser(*ours)
        yield made
        made.call("Browser.close")
        process.wait(LONGEST_WAIT)
    finally:
        os.close(ours[1])
        process.terminate()
        process.wait(LONGEST_WAIT)
