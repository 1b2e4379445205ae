"""Headless Chromium, driven over its debugging pipe with the standard library: open a page, run
scripts in it, see what it asked for and complained of.
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
WAIT = 180.0


def find() -> str | None:
    """The browser's path: $FORGETLESS_CHROMIUM, or the first known name that exists, or None."""
    return os.environ.get("FORGETLESS_CHROMIUM") or next(
        (path for name in NAMES if (path := shutil.which(name))), None
    )


class Browser:
    """One page of one browser.

    Messages are JSON ended by a zero byte, to its descriptor 3 and from its descriptor 4.
    """

    def __init__(self, folder: Path):
        theirs, self._out = os.pipe()
        self._in, answers = os.pipe()
        # Moved out of the way first: 3 and 4 may be among them.
        theirs, answers = (_high(end) for end in (theirs, answers))

        def descriptors() -> None:
            os.dup2(theirs, 3)
            os.dup2(answers, 4)

        command = [
            str(find()),
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--no-first-run",
            "--disable-extensions",
            "--disable-background-networking",
            "--remote-debugging-pipe",
            f"--user-data-dir={folder}",
            "about:blank",
        ]
        self._process = subprocess.Popen(
            command,
            preexec_fn=descriptors,
            close_fds=False,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for end in (theirs, answers):
            os.close(end)
        self._buffer, self._count, self._session = b"", 0, None
        self.requests: list[str] = []
        self.problems: list[str] = []
        page = next(t for t in self.send("Target.getTargets")["targetInfos"] if t["type"] == "page")
        self._session = self.send("Target.attachToTarget", targetId=page["targetId"], flatten=True)[
            "sessionId"
        ]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.send(f"{domain}.enable")

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._in)
        os.close(self._out)

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command; returns its result.

        Raises RuntimeError for an error and TimeoutError after a minute.
        """
        self._count += 1
        message = {
            "id": self._count,
            "method": method,
            "params": parameters,
            **({"sessionId": self._session} if self._session else {}),
        }
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._message()
            if answer.get("id") == self._count:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]

    def _message(self) -> dict[str, Any]:
        end = time.monotonic() + WAIT
        while b"\0" not in self._buffer:
            if not select.select([self._in], [], [], max(0.0, end - time.monotonic()))[0]:
                raise TimeoutError("the browser does not answer")
            part = os.read(self._in, 1 << 16)
            if not part:
                raise RuntimeError("the browser has gone")
            self._buffer += part
        line, _, self._buffer = self._buffer.partition(b"\0")
        message = json.loads(line)
        self._note(message.get("method"), message.get("params", {}))
        return message

    def _note(self, event: str | None, about: dict[str, Any]) -> None:
        if event == "Network.requestWillBeSent":
            self.requests.append(about["request"]["url"])
        elif event == "Runtime.exceptionThrown":
            self.problems.append(json.dumps(about["exceptionDetails"])[:3000])
        elif event == "Log.entryAdded" or (
            event == "Runtime.consoleAPICalled" and about["type"] in ("error", "warning", "assert")
        ):
            self.problems.append(json.dumps(about)[:3000])

    def run(self, script: str) -> Any:
        """The value of an expression in the page, promises awaited.

        Raises RuntimeError where it throws.
        """
        found = self.send(
            "Runtime.evaluate",
            expression=script,
            awaitPromise=True,
            returnByValue=True,
            userGesture=True,
        )
        if "exceptionDetails" in found:
            raise RuntimeError(json.dumps(found["exceptionDetails"])[:3000])
        return found["result"].get("value")

    def size(self, width: int, height: int, *, phone: bool = False) -> None:
        self.send(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=phone,
        )

    def system_theme(self, theme: str) -> None:
        self.send(
            "Emulation.setEmulatedMedia",
            features=[{"name": "prefers-color-scheme", "value": theme}],
        )

    def open(self, path: Path) -> None:
        """Open a file and wait until the page says that it has drawn everything."""
        self.requests.clear()
        self.problems.clear()
        self.send("Page.navigate", url=path.resolve().as_uri())
        end = time.monotonic() + WAIT
        while not self.run("document.documentElement?.dataset.ready === 'yes'"):
            if time.monotonic() > end:
                raise TimeoutError(f"the page was not ready: {self.problems}")
            time.sleep(0.1)

    def picture(self, path: Path) -> None:
        """A picture of the whole page."""
        path.write_bytes(
            base64.b64decode(
                self.send("Page.captureScreenshot", format="png", captureBeyondViewport=True)[
                    "data"
                ]
            )
        )


def _high(end: int) -> int:
    """The same descriptor at 10 or above, inheritable."""
    import fcntl

    moved = fcntl.fcntl(end, fcntl.F_DUPFD, 10)
    os.close(end)
    os.set_inheritable(moved, True)
    return moved
