"""A headless Chromium that tells all a page does, by the DevTools protocol over a pipe.

The protocol's events are those of the page alone: what the browser itself would look up for its own sake is not among
them. Tests that need it are skipped where there is none; CI installs one, and sets REQUIRED so that none is skipped.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import select
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

REQUIRED = "SURGERY_TESTS_NEED_BROWSER"  # the environment variable that makes a missing browser an error
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
_PATIENCE = 120  # seconds; a busy machine may need some of them to start it
_COMPLAINTS = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
# the protocol is spoken on descriptors 3 and 4
_LAUNCH = "import os, sys; [os.dup2(int(sys.argv[1 + i]), 3 + i) for i in (0, 1)]; os.execv(sys.argv[3], sys.argv[3:])"
_SWITCHES = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-pipe")


@dataclass
class Page:
    """One page, and what it did so far.

    complaints: console messages, exceptions and the log's entries, as they came.
    requests: every address it asked for.
    """

    _tell: int
    _hear: int
    _session: str = ""
    _last: int = 0
    _rest: bytes = b""
    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    _seen: set[str] = field(default_factory=set)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command and its answer."""
        self._last += 1
        message: dict[str, Any] = {"id": self._last, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._tell, json.dumps(message).encode() + b"\0")
        while True:
            heard = self._next()
            if heard.get("id") == self._last:
                assert "error" not in heard, heard
                return heard["result"]

    def open(self, path: Path) -> None:
        """Shows a file, and waits until all of it is there."""
        self._seen.clear()
        self.call("Page.navigate", url=path.as_uri())
        while "Page.loadEventFired" not in self._seen:
            self._next()

    def says(self, expression: str) -> Any:
        """The value of an expression in the page."""
        return self.call("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def looks(self, width: int, scheme: str) -> None:
        """The size of the window and the colours that its reader prefers."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600
        )
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def picture(self) -> bytes:
        """All of the page as a PNG."""
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=True, format="png")
        return base64.b64decode(shot["data"])

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            assert select.select([self._hear], [], [], _PATIENCE)[0], f"Chromium said nothing for {_PATIENCE} s"
            more = os.read(self._hear, 1 << 20)
            assert more, "Chromium went away"
            self._rest += more
        message, _, self._rest = self._rest.partition(b"\0")
        heard: dict[str, Any] = json.loads(message)
        method = heard.get("method", "")
        self._seen.add(method)
        if method in _COMPLAINTS:
            self.complaints.append(json.dumps(heard["params"]))
        if method == "Network.requestWillBeSent":
            self.requests.append(heard["params"]["request"]["url"])
        return heard


@contextlib.contextmanager
def browser(profile: Path) -> Iterator[Page]:
    """An empty page. `profile` is a folder that Chromium may fill."""
    found = next((path for path in map(shutil.which, NAMES) if path), None)
    if not found:
        missing = f"pages are tested in Chromium or Chrome, and none of {', '.join(NAMES)} is in PATH: install one"
        pytest.fail(missing) if os.environ.get(REQUIRED) else pytest.skip(missing)
    (to_read, tell), (hear, to_write) = os.pipe(), os.pipe()
    theirs = [fcntl.fcntl(each, fcntl.F_DUPFD, 10) for each in (to_read, to_write)]  # out of the way of 3 and 4
    running = subprocess.Popen(
        [sys.executable, "-c", _LAUNCH, *map(str, theirs), found, *_SWITCHES, f"--user-data-dir={profile}"],
        pass_fds=theirs,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    for each in (to_read, to_write, *theirs):
        os.close(each)
    page = Page(tell, hear)
    try:
        target = page.call("Target.createTarget", url="about:blank")["targetId"]
        page._session = page.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            page.call(f"{domain}.enable")
        yield page
    finally:
        os.close(tell)  # without its other end Chromium ends
        os.close(hear)
        with contextlib.suppress(subprocess.TimeoutExpired):
            running.wait(timeout=10)
        running.kill()
        running.wait()
