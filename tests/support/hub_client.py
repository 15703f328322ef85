"""The real client of the Hub in processes of their own, and what it publishes.

The client reads the Hub's address when it is imported, and the tests' own process must not know it.
"""

from pathlib import Path

import torch
from folders import contents
from hub_server import Hub
from programs import Done, Programs, Running
from safetensors.torch import load_file

TOKEN, OTHERS = "hf_thetokenthatnothingmayshow", "hf_somebodyelses"
"""Tokens of alice and bob."""
LOGITS = """
import sys
import torch
{imports}
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

name, out = sys.argv[1:]
model = {load}
ids = torch.arange(1, 13).reshape(1, -1)
save_file({{"logits": model(input_ids=ids).logits.detach()}}, out)
"""


class Clients(Programs):
    """Programs that know the Hub. home: a folder for their output and the client's cache."""

    def __init__(self, url: str, home: Path) -> None:
        settings = {
            "HF_ENDPOINT": url,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(home / "hf"),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "OMP_NUM_THREADS": "1",
        }
        super().__init__(home, settings)

    def start(self, *arguments: object, token: str | None = None, verified: bool = True, **options: object) -> Running:
        """Start a process with a token, or without one. verified: whether a push verifies first, which takes most of its time."""
        if token:
            options["environment"] = {"HF_TOKEN": token, **options.get("environment", {})}
        if not verified:
            options["prepare"] = without_verification
        return super().start(*arguments, **options)


def without_verification() -> None:
    from mxd_convert.checkpoint.verify import Verification
    from mxd_convert.commands import push as pushing

    pushing.verify = lambda folder, base=None: Verification(folder, [])


def published(folder: Path, repo_id: str) -> dict[str, bytes]:
    """Return the files that a push of a folder puts on the Hub."""
    files = {path: content for path, content in contents(folder).items() if path != "mxd_local.json"}
    return {**files, "README.md": files["README.md"].replace(b"THIS_REPOSITORY", repo_id.encode())}


def on_hub(hub: Hub, repo_id: str, revision: str = "main") -> dict[str, bytes]:
    """Return the files of a repository, without the one that the Hub adds."""
    return {path: content for path, content in hub.files(repo_id, revision).items() if path != ".gitattributes"}


def logits_of(clients: Clients, name: str | Path, out: Path, load: str, imports: str = "") -> torch.Tensor:
    """Return the logits of a model that another process loads. load: an expression with `name`."""
    script = out.with_suffix(".py")
    script.write_text(LOGITS.format(load=load, imports=imports))
    done: Done = clients.run("python", script, name, out)
    assert done.status == 0, done.err
    return load_file(out)["logits"]
