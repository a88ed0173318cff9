"""A headless Chromium that tests drive over a pipe, by its DevTools protocol."""

import base64
import contextlib
import fcntl
import itertools
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

SECONDS = 60
"""An answer that takes longer means that the browser hangs."""

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
)


def executable() -> str | None:
    """Where Chromium is, or None."""
    names = ("chromium", "chromium-browser", "google-chrome")
    return next(filter(None, map(shutil.which, names)), None)


class Chromium:
    """One browser with one page; what that asks for and complains about is kept."""

    def __init__(self, profile: Path) -> None:
        self.requests: list[str] = []
        """Addresses that the page has asked for."""
        self.complaints: list[dict[str, Any]] = []
        """What a user would see in the console, and exceptions."""
        self._numbers = itertools.count(1)
        self._unread = b""
        to_browser, self._out = _pipe()
        self._in, from_browser = _pipe()

        def connect() -> None:
            os.dup2(to_browser, 3)
            os.dup2(from_browser, 4)

        with contextlib.ExitStack() as stack:
            stack.callback(os.close, self._out)
            stack.callback(os.close, self._in)
            command = [str(executable()), *FLAGS, f"--user-data-dir={profile}", "about:blank"]
            try:
                process = subprocess.Popen(
                    command, preexec_fn=connect, pass_fds=(3, 4), stderr=subprocess.DEVNULL
                )
            finally:
                os.close(to_browser)
                os.close(from_browser)
            stack.callback(process.wait)
            stack.callback(process.kill)
            self._session: str | None = None
            targets = self.call("Target.getTargets")["targetInfos"]
            target = next(one["targetId"] for one in targets if one["type"] == "page")
            attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
            self._session = attached["sessionId"]
            for domain in ("Page", "Network", "Log", "Runtime"):
                self.call(f"{domain}.enable")
            self._stack = stack.pop_all()

    def open(self, url: str, width: int = 1280, height: int = 900) -> None:
        """Load a page and wait until all of it is there."""
        self.requests.clear()
        self.complaints.clear()
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )
        loader = self.call("Page.navigate", url=url)["loaderId"]
        assert loader, url
        deadline = time.monotonic() + SECONDS
        while self.evaluate("document.readyState") != "complete":
            assert time.monotonic() < deadline, f"{url} does not load"
            time.sleep(0.02)

    def evaluate(self, expression: str) -> Any:
        """The value of an expression of JavaScript, in the page."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def screenshot(self) -> bytes:
        """What is to be seen, as a PNG."""
        return base64.b64decode(self.call("Page.captureScreenshot")["data"])

    def prefer(self, scheme: str) -> None:
        """Choose ``light`` or ``dark`` as the user's preference."""
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self.call("Emulation.setEmulatedMedia", features=[feature])

    def call(self, method: str, **params: Any) -> Any:
        """The result of a method of the protocol."""
        number = next(self._numbers)
        message: dict[str, Any] = {"id": number, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        for answer in self._messages():
            if answer.get("id") == number:
                assert "error" not in answer, (method, answer)
                return answer["result"]
            self._note(answer)
        raise AssertionError(f"Chromium has ended before it answered {method}")

    def close(self) -> None:
        self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def _note(self, event: dict[str, Any]) -> None:
        match event.get("method"):
            case "Network.requestWillBeSent":
                self.requests.append(event["params"]["request"]["url"])
            case "Log.entryAdded" | "Runtime.consoleAPICalled" | "Runtime.exceptionThrown":
                self.complaints.append(event["params"])

    def _messages(self) -> Iterator[dict[str, Any]]:
        while True:
            message, found, rest = self._unread.partition(b"\0")
            if found:
                self._unread = rest
                yield json.loads(message)
                continue
            ready, _, _ = select.select([self._in], [], [], SECONDS)
            assert ready, "Chromium does not answer"
            received = os.read(self._in, 2**20)
            if not received:
                return
            self._unread += received


def _pipe() -> tuple[int, int]:
    """A pipe whose ends are not 3 and 4, which Chromium expects to be its own."""
    ends = os.pipe()
    reader, writer = (fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in ends)
    for end in ends:
        os.close(end)
    return reader, writer
