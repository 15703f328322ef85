"""`sample`: training text from a base model itself, sampled at a temperature from prompts. It can be resumed.

Layers are best trained on text that the model itself would write or read. Most models come without such a text.
"""

import itertools
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mxd_convert.base_model.checks import load_errors
from mxd_convert.base_model.checks import quiet as without_noise
from mxd_convert.base_model.load import base_tokenizer, load_base, load_config, pick_device, pinned
from mxd_convert.data.chats import open_chat
from mxd_convert.data.documents import local_files, opened, readable, rows_of
from mxd_convert.data.fields import TextField
from mxd_convert.errors import InputError, disk_guard, memory_guard
from mxd_convert.escaping import say
from mxd_convert.files import file_sha256, read_sealed, write_sealed
from mxd_convert.recipe.load import load_recipe
from mxd_convert.training.accelerator import multiplies_bfloat16

MAX_PROMPTS = 100_000
BATCH = 32  # prompts continued at a time
SAY_EVERY = 10  # batches between two lines where stderr is not a terminal


@dataclass(frozen=True)
class Sample:
    """A finished sample: its file, the number of its documents, and of the tokens that the model wrote."""

    output: Path
    documents: int
    tokens: int


@dataclass(frozen=True)
class _Settings:
    """What determines the sample. An unfinished one is resumed only with the same."""

    base: str
    revision: str | None
    prompts: str | None  # SHA-256 of the file
    text_field: str
    tokens: int
    temperature: float
    max_new_tokens: int
    chat: bool
    batch: int
    seed: int


def sample(
    base_model: str,
    output: str | Path,
    tokens: int,
    prompts: str | Path | None = None,
    text_field: str = "text",
    temperature: float = 1.0,
    max_new_tokens: int = 512,
    chat: bool | None = None,
    batch: int = BATCH,
    seed: int = 0,
    device: str | None = None,
    fresh: bool = False,
    quiet: bool = False,
) -> Sample:
    """Write text sampled from a base model to a .jsonl file, or resume an unfinished sample.

    Each prompt is continued in turn, and all of them again, until the model has written `tokens` tokens. The tokens are drawn from
    the model's whole distribution, computed in bfloat16 where the device multiplies it natively. A line has `messages` (a chat) or
    `text`, and `tokens`, the number of tokens written.

    Args:
        base_model: Hub id, folder or GGUF file of the model.
        output: file to write.
        tokens: number of tokens that the model writes at least.
        prompts: .jsonl file of texts or chats, or .txt file with a prompt per line; the first 100,000 are read. Without it, each
            text begins with BOS.
        text_field: field of the .jsonl file.
        temperature: sampling temperature.
        max_new_tokens: most tokens of one continuation.
        chat: whether prompts are users' messages, to which the model replies. Default: whether the tokenizer has a chat template.
        batch: prompts continued at a time.
        seed: seed of the sampling.
        device: to run on. Default: CUDA if available.
        fresh: start over, and replace the output.
        quiet: write nothing to stderr.

    Raises:
        InputError: if an argument is out of range, or the model or the prompts can't be used.
    """
    output = Path(output)
    _check(tokens, temperature, max_new_tokens, batch, seed, output, fresh)
    torch_device = pick_device(device)
    dtype = "bfloat16" if multiplies_bfloat16(torch_device.type) else "float32"
    base = pinned(load_recipe({"base": {"model": base_model, "dtype": dtype}}).base)
    load_config(base)
    tokenizer = base_tokenizer(base)
    is_chat = bool(getattr(tokenizer, "chat_template", None)) if chat is None else chat
    found = _read_prompts(Path(prompts), text_field, tokenizer, is_chat) if prompts is not None else [_Prompt("", None)]
    digest = None if prompts is None else file_sha256(Path(prompts))
    settings = _Settings(
        base.path,
        base.revision,
        digest,
        text_field,
        tokens,
        temperature,
        max_new_tokens,
        is_chat and prompts is not None,
        batch,
        seed,
    )
    with disk_guard(output), memory_guard("out of memory while sampling. Lower --batch or --max-new-tokens."):
        file = _Output(output, settings, fresh)
        if file.documents and not quiet:
            say(f"resumed after {file.tokens:,} tokens")
        model = load_base(base).to(torch_device)
        _sample(model, tokenizer, found, settings, file, quiet)
        return Sample(output, file.documents, file.tokens)


def _check(tokens: int, temperature: float, length: int, batch: int, seed: int, output: Path, fresh: bool) -> None:
    for option, number in (("--tokens", tokens), ("--max-new-tokens", length), ("--batch", batch)):
        if number < 1:
            raise InputError(f"{option} {number}: expected at least 1")
    if not 0 < temperature <= 100:
        raise InputError(f"--temperature {temperature}: expected a number above 0, for example 1")
    if not 0 <= seed < 2**32:
        raise InputError(f"--seed {seed}: expected a whole number from 0 to {2**32 - 1}")
    if output.suffix != ".jsonl":
        raise InputError(f"--output {output}: expected a .jsonl file, for example text.jsonl")
    if output.is_dir() or (output.exists() and not fresh):
        raise InputError(f"--output {output}: exists already. Choose another file, or use --fresh to replace it.")


@dataclass(frozen=True)
class _Prompt:
    """A text to continue, or a rendered chat with its messages."""

    text: str
    messages: list[dict[str, str]] | None


def _read_prompts(path: Path, text_field: str, tokenizer: Any, chat: bool) -> list[_Prompt]:
    """Return the prompts of a file. Raises InputError if it has none, or a row is neither text nor a chat."""
    [file] = local_files(str(path)) if path.is_file() else [path]
    if not file.is_file():
        raise InputError(f"--prompts {path}: no such file. Give a .jsonl or .txt file.")
    found: list[_Prompt] = []
    with readable(file):
        for where, content in _rows(file, text_field):
            if len(found) == MAX_PROMPTS:
                break
            messages = [{"role": "user", "content": content}] if isinstance(content, str) and chat else content
            if isinstance(messages, str):
                found.append(_Prompt(messages, None))
            else:
                found.append(_Prompt(open_chat(messages, tokenizer, where), messages))
    if not found:
        raise InputError(f"--prompts {path}: has no prompts. Write one per line.")
    return found


def _rows(file: Path, text_field: str) -> Iterator[tuple[str, Any]]:
    """Yield (where, text or messages) of every row that has some."""
    if file.name.endswith((".txt", ".txt.gz")):
        with opened(file) as lines:
            yield from ((f"{file}, line {number}", line.strip()) for number, line in enumerate(lines, 1) if line.strip())
        return
    field = TextField(text_field, "--text-field", chats=True)
    yield from ((where, text) for where, _, text in field.texts(rows_of(file, {text_field: "--text-field"}), str(file)))


class _Output:
    """The file of a sample: lines are added to `<output>.partial`, which becomes `output` when it is complete."""

    def __init__(self, output: Path, settings: _Settings, fresh: bool) -> None:
        self.output, self.partial = output, output.with_name(f"{output.name}.partial")
        self.settings = self.partial.with_suffix(".settings")
        self.documents = self.tokens = 0
        self._open(asdict(settings), fresh)

    def _open(self, settings: dict[str, Any], fresh: bool) -> None:
        before = read_sealed(self.settings)
        if fresh or before is None or not self.partial.is_file():
            self.output.parent.mkdir(parents=True, exist_ok=True)
            self.partial.unlink(missing_ok=True)
            write_sealed(self.settings, settings)
            return
        changed = [key for key, value in settings.items() if before.get(key) != value]
        if changed:
            raise InputError(
                f"{self.partial}: an unfinished sample with another {changed[0]} ({before.get(changed[0])}). Use the same settings to resume"
                " it, or --fresh to start over."
            )
        lines = self.partial.read_bytes().splitlines(keepends=True)
        kept = lines[: len(lines) // settings["batch"] * settings["batch"]]  # whole batches, because each has its own seed
        while kept and not _is_line(kept[-1]):
            kept = kept[: -settings["batch"]]
        self.partial.write_bytes(b"".join(kept))
        self.documents, self.tokens = len(kept), sum(json.loads(line)["tokens"] for line in kept)

    def add(self, rows: Sequence[dict[str, Any]]) -> None:
        """Add the documents of a batch."""
        with self.partial.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        self.documents += len(rows)
        self.tokens += sum(row["tokens"] for row in rows)

    def finish(self) -> None:
        """Give the file its name."""
        self.partial.replace(self.output)
        self.settings.unlink(missing_ok=True)


def _is_line(line: bytes) -> bool:
    try:
        return line.endswith(b"\n") and isinstance(json.loads(line)["tokens"], int)
    except (ValueError, KeyError, TypeError):
        return False


def _sample(model: Any, tokenizer: Any, prompts: list[_Prompt], settings: _Settings, file: _Output, quiet: bool) -> None:
    """Continue prompts, batch by batch, until there are enough tokens."""
    with _progress(settings.tokens, file.tokens, quiet) as advance:
        for number in itertools.count(file.documents // settings.batch):
            if file.tokens >= settings.tokens:
                break
            first = number * settings.batch
            chosen = [prompts[(first + i) % len(prompts)] for i in range(settings.batch)]
            torch.manual_seed(settings.seed * 1_000_003 + number)
            file.add(_continued(model, tokenizer, chosen, settings))
            advance(file.tokens)
    file.finish()


def _continued(model: Any, tokenizer: Any, prompts: list[_Prompt], settings: _Settings) -> list[dict[str, Any]]:
    """Return a row per prompt, with the model's continuation."""
    ends = model.generation_config.eos_token_id
    ends = set(ends if isinstance(ends, list) else [ends]) | {tokenizer.eos_token_id}
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else next((end for end in ends if end is not None), 0)
    ids_BT, mask_BT = _padded([_encoded(tokenizer, prompt) for prompt in prompts], pad)
    room = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    length = settings.max_new_tokens if not isinstance(room, int) else min(settings.max_new_tokens, room - ids_BT.shape[1])
    if length < 1:
        raise InputError(f"--prompts: a prompt has {ids_BT.shape[1]} tokens, and the model has room for {room}. Shorten it.")
    sampling: dict[str, Any] = {"do_sample": True, "temperature": settings.temperature, "top_k": 0, "top_p": 1.0}
    if getattr(model, "_can_compile_fullgraph", False):  # other caches are copied at every step
        sampling["cache_implementation"] = "static"
    with without_noise(), load_errors("the text", settings.base, "sampled"), torch.no_grad():
        output_BT = model.generate(
            input_ids=ids_BT.to(model.device),
            attention_mask=mask_BT.to(model.device),
            max_new_tokens=length,
            pad_token_id=pad,
            use_cache=True,
            **sampling,
        )
    rows = []
    for prompt, ids in zip(prompts, output_BT[:, ids_BT.shape[1] :].tolist(), strict=True):
        end = next((at for at, token in enumerate(ids) if token in ends), len(ids))
        text = tokenizer.decode(ids[:end], skip_special_tokens=True)
        written = {"tokens": min(end + 1, len(ids))}
        if prompt.messages is None:
            rows.append({"text": prompt.text + text, **written})
        else:
            rows.append({"messages": [*prompt.messages, {"role": "assistant", "content": text}], **written})
    return rows


def _encoded(tokenizer: Any, prompt: _Prompt) -> list[int]:
    """Return the token ids of a prompt; BOS or else EOS for an empty one."""
    ids: list[int] = tokenizer(prompt.text, add_special_tokens=prompt.messages is None)["input_ids"]
    begin = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if not ids and begin is None:
        raise InputError("--prompts: a prompt is empty, and the tokenizer has no BOS token to begin with. Give prompts.")
    return ids or [begin]


def _padded(rows: list[list[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return token ids padded on the left, and which of them are no padding, both (B, T)."""
    longest = max(map(len, rows))
    ids = [[pad] * (longest - len(row)) + row for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids), torch.tensor(mask)


@contextmanager
def _progress(total: int, done: int, quiet: bool) -> Iterator[Any]:
    """Yield the function that shows how many tokens are written: a bar on a terminal, a line every few batches elsewhere."""
    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        calls = itertools.count(1)

        def line(tokens: int) -> None:
            if not quiet and (next(calls) % SAY_EVERY == 0 or tokens >= total):
                say(f"sampled {tokens:,} of {total:,} tokens")

        yield line
        return
    columns = (TextColumn("sampling"), BarColumn(), MofNCompleteColumn(), TextColumn("tokens,"), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("sampling", total=total, completed=done)
        yield lambda tokens: bar.update(task, completed=tokens)


__all__ = ["Sample", "sample"]
