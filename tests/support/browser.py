"""A real browser without a window, over its DevTools protocol: a pipe each way, a message of JSON ends with a NUL."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import signal
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

__all__ = ["Browser", "browser_path"]

_NAMES = ("chromium-headless-shell", "chromium", "google-chrome")
# One that answers nothing for so long hangs.
_PATIENCE_S = 30.0


def browser_path() -> str | None:
    """The smallest one that is here; None where none is."""
    return next((path for name in _NAMES if (path := shutil.which(name))), None)


class Browser:
    """With one page. complaints: what its console said that is no mere information. requests: each URL asked for."""

    def __init__(self, path: str) -> None:
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self._seen: list[dict[str, Any]] = []
        self._number = 0
        self._data = b""
        self._folder = tempfile.TemporaryDirectory(prefix="ringfence-browser-")
        self._in, answers = os.pipe()
        asked, self._out = os.pipe()
        # As root, and inside a container, its own sandbox can't be made.
        line = [path, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
        line += ["--remote-debugging-pipe", f"--user-data-dir={self._folder.name}", "about:blank"]
        nowhere = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        # It reads from 3 and writes to 4; out of the way of these first, whatever numbers the pipes got.
        ends = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 10) for fd in (nowhere, nowhere, nowhere, asked, answers)]
        self._pid = os.posix_spawn(
            path,
            line,
            {**os.environ, "HOME": self._folder.name},
            file_actions=[(os.POSIX_SPAWN_DUP2, fd, number) for number, fd in enumerate(ends)],
        )
        for fd in (nowhere, asked, answers, *ends):
            os.close(fd)
        self._session = ""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._out)  # the browser ends with its pipe
        pidfd = os.pidfd_open(self._pid)
        if not select.select([pidfd], [], [], _PATIENCE_S / 3)[0]:
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        os.waitpid(self._pid, 0)
        os.close(pidfd)
        os.close(self._in)
        self._folder.cleanup()

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """What the browser answers to a method of its protocol."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        until = time.monotonic() + _PATIENCE_S
        while True:
            said = self._next(until)
            if said.get("id") == self._number:
                assert "error" not in said, f"{method}: {said}"
                found: dict[str, Any] = said["result"]
                return found

    def _next(self, until: float) -> dict[str, Any]:
        """The next message; what it tells of is noted."""
        while b"\0" not in self._data:
            ready, _, _ = select.select([self._in], [], [], max(0.0, until - time.monotonic()))
            assert ready, "the browser doesn't answer"
            more = os.read(self._in, 1 << 20)
            assert more, "the browser has ended"
            self._data += more
        one, _, self._data = self._data.partition(b"\0")
        said: dict[str, Any] = json.loads(one)
        self._note(said.get("method", ""), said.get("params", {}))
        return said

    def _note(self, method: str, parameters: dict[str, Any]) -> None:
        if method == "Network.requestWillBeSent":
            self.requests.append(parameters["request"]["url"])
        elif method == "Log.entryAdded" and parameters["entry"]["level"] in ("warning", "error"):
            self.complaints.append(parameters["entry"]["text"])
        elif method == "Runtime.exceptionThrown":
            self.complaints.append(str(parameters["exceptionDetails"]["text"]))
        elif method == "Runtime.consoleAPICalled":
            self.complaints.append(str(parameters["args"]))
        if method:
            self._seen.append({"method": method})

    # ---- what a person does ----

    def open(self, path: Path, *, width: int, height: int = 800, dark: bool = False) -> None:
        """Loads a file into a window of that size, in CSS pixels."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.complaints.clear()
        self.requests.clear()
        self._seen.clear()
        self.call("Page.navigate", url=path.as_uri())
        until = time.monotonic() + _PATIENCE_S
        while {"method": "Page.loadEventFired"} not in self._seen:
            self._next(until)

    def ask(self, expression: str) -> Any:
        """The value of an expression of JavaScript in the page."""
        said = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in said, said
        return said["result"].get("value")

    def click(self, selector: str) -> None:
        """In the middle of the first element that the selector finds, with the mouse."""
        place = f"document.querySelector({json.dumps(selector)})"
        self.ask(f"{place}.scrollIntoView({{block: 'center'}})")
        x, y = self.ask(f"(r => [r.x + r.width / 2, r.y + r.height / 2])({place}.getBoundingClientRect())")
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def press(self, key: str, code: int, text: str = "") -> None:
        """A key, by its name and its virtual key code."""
        for kind in ("keyDown", "keyUp"):
            more = {"text": text} if text and kind == "keyDown" else {}
            self.call("Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=code, **more)

    def picture(self, path: Path) -> None:
        """The whole page as PNG."""
        said = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(said["data"]))
