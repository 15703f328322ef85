"""A Hub on loopback in a process of its own, the one of the tests: a server's threads and `fork` do not mix."""

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent.parent / "tests" / "support"
TOKEN, OWNER = "hf_" + "a" * 34, "alice"


@contextlib.contextmanager
def running() -> Iterator[str]:
    """Yield the URL of a Hub that ends with the block."""
    process = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        yield process.stdout.readline().strip()
    finally:
        process.stdin.close()
        process.wait(10)


def environment(url: str, home: Path) -> dict[str, str]:
    """Return what points the Hub's client there. It is read when the client is imported."""
    return {
        "HF_ENDPOINT": url,
        "HF_TOKEN": TOKEN,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }


def main() -> None:
    sys.path.insert(0, str(TESTS))
    from hub_server import Hub

    with Hub({TOKEN: OWNER}).running() as hub:
        print(hub.url, flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
