"""A real headless browser, driven over the DevTools protocol on a pipe, without driver, package or network."""

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome")
_FLAGS = (
    "--headless",
    "--no-sandbox",  # which a root user needs
    "--no-first-run",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-extensions",
    "--hide-scrollbars",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
    "--remote-debugging-pipe",
)


def program() -> str | None:
    """Return the path of an installed browser, or None."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """One page. `errors`: messages of the console; `requests`: requested addresses."""

    def __init__(self, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        self.errors: list[str] = []
        self.requests: list[str] = []
        self._number, self._session, self._rest = 0, "", b""
        self._answers: dict[int, dict[str, Any]] = {}
        self._events: list[str] = []
        self._profile = tempfile.mkdtemp(prefix="browser-")
        self._start()
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def _start(self) -> None:
        theirs_in, ours_out = os.pipe()
        ours_in, theirs_out = os.pipe()
        # the browser reads commands from 3 and writes answers to 4; out of the way first, so that neither is overwritten
        high = [fcntl.fcntl(end, fcntl.F_DUPFD, 20) for end in (theirs_in, theirs_out)]
        command = [program() or NAMES[0], *_FLAGS, f"--user-data-dir={self._profile}", "about:blank"]
        self._process = subprocess.Popen(
            command,
            preexec_fn=lambda: (os.dup2(high[0], 3), os.dup2(high[1], 4)),  # noqa: PLW1509 (Popen has no other way)
            pass_fds=(3, 4, *high),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for end in (theirs_in, theirs_out, *high):
            os.close(end)
        self._out, self._in = ours_out, ours_in

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._out)
        os.close(self._in)
        shutil.rmtree(self._profile, ignore_errors=True)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command of the protocol; return its answer."""
        self._number += 1
        number = self._number
        message = {"id": number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        end = time.monotonic() + 60
        while number not in self._answers:
            self._read(end - time.monotonic(), method)
        answer = self._answers.pop(number)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']['message']}")
        return answer["result"]

    def _read(self, seconds: float, waiting_for: str) -> None:
        if seconds <= 0 or not select.select([self._in], [], [], seconds)[0]:
            raise TimeoutError(f"the browser does not answer: {waiting_for}")
        chunk = os.read(self._in, 2**20)
        if not chunk:
            raise RuntimeError("the browser has ended")
        *messages, self._rest = (self._rest + chunk).split(b"\0")
        for message in map(json.loads, messages):
            if "id" in message:
                self._answers[message["id"]] = message
            else:
                self._note(message["method"], message["params"])

    def _note(self, event: str, details: dict[str, Any]) -> None:
        self._events.append(event)
        if event == "Runtime.exceptionThrown":
            thrown = details["exceptionDetails"]
            self.errors.append(thrown.get("exception", {}).get("description", thrown["text"]))
        elif event == "Runtime.consoleAPICalled" and details["type"] in ("error", "warning", "assert"):
            self.errors.append(" ".join(str(part.get("value", part.get("description"))) for part in details["args"]))
        elif event == "Log.entryAdded" and details["entry"]["level"] in ("error", "warning"):
            self.errors.append(f"{details['entry']['text']} {details['entry'].get('url', '')}")
        elif event == "Page.javascriptDialogOpening":
            self.errors.append(f"a dialog: {details['message']}")
        elif event == "Network.requestWillBeSent":
            self.requests.append(details["request"]["url"])

    def open(self, address: str | Path, ready: str = "document.documentElement.dataset.ready === 'yes'") -> float:
        """Load an address or a file and wait until `ready`; return the milliseconds from the navigation until the page was ready."""
        address = address if isinstance(address, str) else address.as_uri()
        self.call("Page.navigate", url="about:blank")
        self.call("Page.navigate", url=address)
        self.until(f"location.href !== 'about:blank' && {ready}")
        return float(self.evaluate("window.MXD?.readyAt ?? performance.now()"))

    def evaluate(self, script: str) -> Any:
        """Return the value of a script, which may be a promise."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in found:
            raise RuntimeError(found["exceptionDetails"].get("exception", {}).get("description", script))
        return found["result"].get("value")

    def until(self, script: str, seconds: float = 30) -> None:
        """Wait until a script is true."""
        end = time.monotonic() + seconds
        while True:
            try:
                if self.evaluate(script):
                    return
            except RuntimeError:  # the page is being changed for another
                pass
            if time.monotonic() > end:
                raise TimeoutError(f"{script} did not come true; the console: {self.errors}")
            time.sleep(0.02)

    def click(self, selector: str) -> None:
        """Click the middle of the element that a selector finds."""
        element = f"document.querySelector({json.dumps(selector)})"
        self.evaluate(f"{element}.scrollIntoView({{block: 'center'}})")
        x, y = self.evaluate(f"(b => [b.x + b.width / 2, b.y + b.height / 2])({element}.getBoundingClientRect())")
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def type(self, text: str) -> None:
        """Type into the focused element."""
        self.call("Input.insertText", text=text)

    def press(self, key: str) -> None:
        """Press a key, by its name: Tab or Enter."""
        code = {"Tab": 9, "Enter": 13}[key]
        text = {"text": "\r"} if key == "Enter" else {}
        for kind in ("keyDown", "keyUp"):
            self.call(
                "Input.dispatchKeyEvent",
                type=kind,
                key=key,
                code=key,
                windowsVirtualKeyCode=code,
                **(text if kind == "keyDown" else {}),
            )

    def texts(self, selector: str) -> list[str]:
        """Return the texts of all elements that a selector finds."""
        return list(self.evaluate(f"[...document.querySelectorAll({json.dumps(selector)})].map(node => node.textContent)"))

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))
