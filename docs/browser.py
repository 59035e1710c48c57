"""A headless Chromium that opens pages of this machine without a network; `docs/pictures.py` and a test use it.

It is driven through the DevTools protocol over two pipes, so that neither a driver nor another package is needed.
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
PATIENCE = 120.0
"""Seconds after which a browser that does not answer is given up."""

_MOVED = "import os, sys; a, b, *rest = sys.argv[1:]; os.dup2(int(a), 3); os.dup2(int(b), 4); os.execv(rest[0], rest)"
"""What starts the browser: it reads commands from descriptor 3 and writes answers to 4."""


def find() -> str | None:
    """The program of the browser, if there is one."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One tab of a headless Chromium, to be used in a ``with`` statement.

    Attributes
    ----------
    events : list of dict
        What the browser reported: requests, errors of the console and exceptions, see `complaints` and `requests`.
    """

    def __init__(self, width: int = 1280, height: int = 900, scale: float = 1.0) -> None:
        program = find()
        if program is None:
            raise FileNotFoundError(f"A browser is needed: none of {', '.join(NAMES)} is installed.")
        self.events: list[dict[str, Any]] = []
        self._number, self._session, self._rest = 0, None, b""
        self._home = tempfile.mkdtemp()
        commands, self._write = os.pipe()
        self._read, answers = os.pipe()
        # Copies that are higher than 3 and 4 cannot be in the way of these.
        high = [fcntl.fcntl(one, fcntl.F_DUPFD, 10) for one in (commands, answers)]
        arguments = [
            "--headless=new", "--remote-debugging-pipe", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
            "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync",
            "--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={self._home}",
            f"--window-size={width},{height}", f"--force-device-scale-factor={scale}", "about:blank",
        ]  # fmt: skip
        self._process = subprocess.Popen(
            [sys.executable, "-S", "-c", _MOVED, *map(str, high), program, *arguments],
            pass_fds=high, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        for one in (commands, answers, *high):
            os.close(one)
        try:
            target = self.call("Target.createTarget", url="about:blank")["targetId"]
            self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
            for domain in ("Page", "Runtime", "Log", "Network"):
                self.call(f"{domain}.enable")
            self.resize(width, height, scale)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """End the browser."""
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._write)
        os.close(self._read)
        shutil.rmtree(self._home, ignore_errors=True)

    # --- the protocol ---

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the DevTools protocol, and wait for its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        number, end = self._number, time.monotonic() + PATIENCE
        while True:
            answer = self._next(end)
            if answer.get("id") == number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                return answer["result"]

    def _next(self, end: float) -> dict[str, Any]:
        """The next message; events are kept."""
        while b"\0" not in self._rest:
            if not select.select([self._read], [], [], max(end - time.monotonic(), 0))[0]:
                raise TimeoutError("The browser does not answer.")
            part = os.read(self._read, 1 << 20)
            if not part:
                raise RuntimeError("The browser ended.")
            self._rest += part
        line, self._rest = self._rest.split(b"\0", 1)
        message = json.loads(line)
        if "method" in message:
            self.events.append(message)
        return message

    # --- pages ---

    def open(self, path: str | Path) -> None:
        """Open a page of this machine, and wait until it is drawn."""
        self.events.clear()
        self.call("Page.navigate", url=Path(path).resolve().as_uri())
        end = time.monotonic() + PATIENCE
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self._next(end)
        self.value("Promise.all([...document.images].map(image => image.decode().catch(() => 0))).then(() => 0)")

    def value(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page."""
        done = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in done:
            raise RuntimeError(f"{expression}: {done['exceptionDetails']['exception'].get('description')}")
        return done["result"].get("value")

    def box(self, selector: str, number: int = 0) -> tuple[float, float, float, float]:
        """Left, top, width and height of an element in the page, CSS pixels."""
        x, y, width, height = self.value(
            f"(r => [r.x + scrollX, r.y + scrollY, r.width, r.height])"
            f"(document.querySelectorAll({json.dumps(selector)})[{number}].getBoundingClientRect())"
        )
        return x, y, width, height

    def click(self, selector: str, number: int = 0) -> None:
        """Click an element with the mouse, in its middle."""
        self.value(f"document.querySelectorAll({json.dumps(selector)})[{number}].scrollIntoView({{block: 'center'}})")
        left, top, width, height = self.box(selector, number)
        x, y = left + width / 2 - self.value("scrollX"), top + height / 2 - self.value("scrollY")
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def resize(self, width: int, height: int, scale: float = 1.0) -> None:
        """Change the size of the window, CSS pixels."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=False
        )

    def picture(self, clip: tuple[float, float, float, float] | None = None) -> bytes:
        """The window, or a part of the page (left, top, width, height), as a PNG."""
        options: dict[str, Any] = {"format": "png"}
        if clip is not None:
            options["clip"] = {**dict(zip(("x", "y", "width", "height"), clip, strict=True)), "scale": 1}
            options["captureBeyondViewport"] = True
        return base64.b64decode(self.call("Page.captureScreenshot", **options)["data"])

    @property
    def requests(self) -> list[str]:
        """Addresses that the page loaded or tried to load, apart from files and what it holds itself."""
        urls = [e["params"]["request"]["url"] for e in self.events if e["method"] == "Network.requestWillBeSent"]
        return [url for url in urls if not url.startswith(("data:", "file:", "blob:", "about:"))]

    @property
    def complaints(self) -> list[str]:
        """Errors and warnings of the console, and exceptions."""
        out = []
        for event in self.events:
            method, given = event["method"], event["params"]
            if method == "Runtime.exceptionThrown":
                out.append(given["exceptionDetails"]["text"])
            elif method == "Log.entryAdded" and given["entry"]["level"] in ("error", "warning"):
                out.append(given["entry"]["text"])
            elif method == "Runtime.consoleAPICalled" and given["type"] in ("error", "warning", "assert"):
                out.append(" ".join(str(one.get("value", one.get("description"))) for one in given["args"]))
        return out
