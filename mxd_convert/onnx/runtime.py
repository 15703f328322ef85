"""An exported model on onnxruntime alone: neither torch nor transformers is imported, nor needed.

Text goes through the folder's tokenizer.json (package tokenizers); token ids do without. Shapes: B rows, T tokens, K active experts.
"""

import math
import numbers
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # onnxruntime reads it as it is imported
import onnxruntime as ort

from mxd_convert.errors import InputError
from mxd_convert.onnx import validation

GRAPHS = {"fp32": "model.onnx", "fp16": "model_fp16.onnx", "int8": "model_quantized.onnx"}  # names as transformers.js has them
FOLDER = "onnx"  # of the graphs, in the exported folder
JS_TYPES = {"fp32": "fp32", "fp16": "fp16", "int8": "q8"}  # what transformers.js calls them
METADATA = "mxd"  # key of the graph's metadata that describes its layers
PREFILL = 512  # tokens of a prompt that are run at a time

Array = np.ndarray[Any, np.dtype[Any]]
_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


@dataclass(frozen=True)
class Step:
    """What one run gives. logits (B, T, V); experts: by layer (values, indices), (B, T, K), with `sparsity: l1` the values (B, T, N)."""

    logits: Array
    experts: dict[int, tuple[Array, Array] | Array]


@dataclass
class Cache:
    """Keys and values so far, and which of their positions are text, (B, P) of 0 and 1."""

    tensors: dict[str, Any]
    mask: Array
    positions: Array = field(init=False)  # of the next token of each row, (B)

    def __post_init__(self) -> None:
        self.positions = self.mask.sum(1)


class OnnxModel:
    """A converted model, exported by `export-onnx`. `layers`: by index, what its graph says of each: kind, n_experts, k, sparsity."""

    def __init__(self, file: Path, folder: Path, session: Any) -> None:
        self.file, self.folder, self.session = file, folder, session
        self.config = validation.read_config(folder)
        self.eos = validation.end_tokens(folder, self.config)
        names = validation.read_names(file, session, METADATA)
        self.layers, self._inputs, self._past = names.layers, names.inputs, names.past
        self._kept, self._experts, self._steerable = names.outputs, names.experts, names.steerable
        self._tokenizer: Any = None

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        dtype: str | None = None,
        threads: int | None = None,
        providers: Sequence[str] = ("CPUExecutionProvider",),
    ) -> "OnnxModel":
        """The model in an exported folder. dtype: fp32, fp16 or int8; None: the first of these that is there. threads: None leaves it
        to onnxruntime. providers: its execution providers, the preferred one first. Raises InputError."""
        folder = Path(folder)
        files = {name: folder / FOLDER / file for name, file in GRAPHS.items()}
        there = [name for name, file in files.items() if file.is_file()]
        if not there:
            raise InputError(
                f"{folder}: no {FOLDER}/{GRAPHS['fp32']}, so not an exported model; `mxd-convert export-onnx` makes one"
            )
        if dtype is not None and dtype not in there:
            raise InputError(f"{folder}: no graph in {dtype}; there is {', '.join(there)}")
        return cls.from_graph(files[dtype or there[0]], folder, threads, providers)

    @classmethod
    def from_graph(
        cls, file: Path, folder: Path, threads: int | None = None, providers: Sequence[str] = ("CPUExecutionProvider",)
    ) -> "OnnxModel":
        """The same with a graph from anywhere, and the rest from `folder`. Raises InputError."""
        validation.check_graph(file, folder)
        options = ort.SessionOptions()
        options.log_severity_level = (
            4  # errors are raised as well; one of the warnings says that steering may be given, which is its purpose
        )
        if threads is not None:
            options.intra_op_num_threads = threads
        try:
            other = list(providers) != ["CPUExecutionProvider"]  # else it prints, and tries the same again
            session = ort.InferenceSession(str(file), options, providers=list(providers), enable_fallback=int(other))
        except Exception as error:  # onnxruntime has no common class for its own
            validation.raise_failure(file, error, "onnxruntime can't load it")
        return cls(file, folder, session)

    # --- text ------------------------------------------------------------------------------------------------------------------

    @property
    def tokenizer(self) -> Any:
        """The folder's tokenizer, of package tokenizers. Raises InputError."""
        if self._tokenizer is None:
            path = self.folder / "tokenizer.json"
            if not path.is_file():
                raise InputError(f"{path}: missing; give token ids, or export again from a checkpoint with its tokenizer")
            from tokenizers import Tokenizer

            with self._explained("not a readable tokenizer"):
                tokenizer = Tokenizer.from_file(str(path))
                tokenizer.no_padding()
                tokenizer.no_truncation()
            self._tokenizer = tokenizer
        return self._tokenizer

    def tokens(self, text: str) -> list[int]:
        """A text's token ids, with what the tokenizer puts around it."""
        tokenizer = self.tokenizer
        with self._explained("it can't encode the text"):
            return list(tokenizer.encode(text).ids)

    def text(self, ids: Sequence[int]) -> str:
        """The text of token ids, without special tokens."""
        tokenizer, whole = self.tokenizer, [int(token) for token in ids]
        with self._explained("it can't decode token ids"):
            return str(tokenizer.decode(whole, skip_special_tokens=True))

    def _explained(self, problem: str) -> AbstractContextManager[None]:
        return validation.explained_tokenizer(self.folder / "tokenizer.json", problem)

    # --- one run ---------------------------------------------------------------------------------------------------------------

    def start(self, rows: int) -> Cache:
        """An empty cache."""
        empty = {}
        for name, entry in self._past.items():
            shape = (rows, entry.shape[1], 0, entry.shape[3])
            empty[name] = ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, dtype=_TYPES[entry.type]))
        return Cache(empty, np.zeros((rows, 0), dtype=np.int64))

    def step(self, ids: Array, cache: Cache, mask: Array | None = None, steering: Iterable[Mapping[str, Any]] = ()) -> Step:
        """Runs tokens (B, T) after those in `cache`, which then holds them too.

        mask: (B, T), 0 where a token is padding; None: nowhere. steering: orders {"layer", "expert", "add"} for these tokens.
        Raises InputError where the graph can't follow them; the cache is then as it was.
        """
        ids = np.ascontiguousarray(ids, dtype=np.int64)
        new = np.ones_like(ids) if mask is None else mask.astype(np.int64)
        self._check_ids(ids, cache.mask.shape[1])
        all_of_it = np.concatenate([cache.mask, new], axis=1)
        positions = np.maximum(cache.positions[:, None] + new.cumsum(1) - 1, 0)
        given = {"input_ids": ids, "attention_mask": all_of_it, "position_ids": positions, **self._orders(steering)}
        feed = {
            name: ort.OrtValue.ortvalue_from_numpy(array)
            for name, array in given.items()
            if name in self._inputs or name.startswith("steering.")
        }
        try:
            outputs = self.session.run_with_ort_values([*self._kept, *self._experts], {**feed, **cache.tensors})
        except Exception as error:
            validation.raise_failure(self.file, error, "onnxruntime can't run it")
        found = dict(zip([*self._kept, *self._experts], outputs, strict=True))
        validation.check_step(self.file, ids.shape, {name: found[name] for name in ("logits", *self._experts)})
        cache.mask, cache.positions = all_of_it, cache.positions + new.sum(1)
        cache.tensors = {name: found[name.replace("past_key_values", "present")] for name in cache.tensors}
        return Step(found["logits"].numpy(), self._codes({name: found[name].numpy() for name in self._experts}))

    def prefill(self, ids: Array, cache: Cache, mask: Array, steering: Iterable[Mapping[str, Any]] = ()) -> Step:
        """The same for a prompt of any length, `PREFILL` tokens at a time, which bounds what it takes. Logits of the last token only."""
        orders = list(steering)
        steps = [
            self.step(ids[:, start : start + PREFILL], cache, mask[:, start : start + PREFILL], orders)
            for start in range(0, ids.shape[1], PREFILL)
        ]
        return Step(steps[-1].logits[:, -1:], _joined([step.experts for step in steps]))

    def _orders(self, steering: Iterable[Mapping[str, Any]]) -> dict[str, Array]:
        orders = self._checked(steering)
        if not orders:
            return {}
        return {
            "steering.layers": np.array([order["layer"] for order in orders], dtype=np.int64),
            "steering.experts": np.array([order["expert"] for order in orders], dtype=np.int64),
            "steering.amounts": np.array([order["add"] for order in orders], dtype=np.float32),
        }

    def _checked(self, steering: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        orders = list(steering)
        if orders and not self._steerable:
            raise InputError(f"{self.folder}: its graph takes no steering; export it with --steering")
        for order in orders:
            self._check(order)
        return orders

    def _check(self, order: Mapping[str, Any]) -> None:
        layer: Any = order.get("layer")
        expert: Any = order.get("expert")
        amount: Any = order.get("add")
        if layer not in self.layers:
            raise InputError(f"steering: layer {layer} is not converted; converted are {', '.join(map(str, self.layers))}")
        count = self.layers[layer].get("n_experts", 0)
        if not _is_number(expert, numbers.Integral) or not 0 <= int(expert) < count:
            experts = f"experts 0 to {count - 1}" if count else "no experts"
            raise InputError(f"steering: layer {layer} has {experts}; there is no expert {expert}")
        if set(order) - {"layer", "expert", "add", "positions"} or amount is None:
            raise InputError(f"steering of expert {expert} of layer {layer}: a graph can only add; give a number as `add`")
        if not _is_number(amount, numbers.Real) or not math.isfinite(float(amount)):
            raise InputError(f"steering of expert {expert} of layer {layer}: add is {amount!r}; expected a number")
        if order.get("positions", "all") not in ("all", "prompt", "generation"):
            raise InputError(f"steering: positions {order['positions']!r}; expected one of all, prompt, generation")

    def _codes(self, found: Mapping[str, Array]) -> dict[int, tuple[Array, Array] | Array]:
        codes: dict[int, tuple[Array, Array] | Array] = {}
        for index in self.layers:
            values, indices = found.get(f"experts.{index}.values"), found.get(f"experts.{index}.indices")
            if values is not None:
                codes[index] = values if indices is None else (values, indices)
        return codes

    # --- what people do with it ------------------------------------------------------------------------------------------------

    def encode(self, text: str | Sequence[int]) -> dict[int, tuple[Array, Array] | Array]:
        """The coefficients of every layer's experts on a text or its token ids: by layer (values, indices), (T, K); with `sparsity: l1`
        the values (T, N). As `encode` of the layers in PyTorch. Raises InputError where the graph does not give them."""
        if not self._experts:
            raise InputError(f"{self.folder}: its graph does not tell which experts are active; export it with --expert-outputs")
        ids = np.array([self.tokens(text) if isinstance(text, str) else list(text)], dtype=np.int64)
        if not ids.size:
            raise InputError("the text is empty; give at least one token, such as the model's BOS")
        self._check_length(ids.shape[1], 0)
        experts = self.prefill(ids, self.start(1), np.ones_like(ids)).experts
        return {index: (codes[0][0], codes[1][0]) if isinstance(codes, tuple) else codes[0] for index, codes in experts.items()}

    def generate(
        self,
        prompt: str,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        seed: int = 0,
        steering: Sequence[Mapping[str, Any]] = (),
    ) -> str:
        """The prompt continued. temperature: 0 takes the most likely token each time.

        steering: orders {"layer", "expert", "add"}, and "positions": "all" (default), "prompt", or "generation", what is written.
        Raises InputError.
        """
        ids = self.tokens(prompt)
        return self.text([*ids, *self.continuations([ids], max_new_tokens, temperature, seed, steering)[0]])

    def continuations(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        seed: int = 0,
        steering: Sequence[Mapping[str, Any]] = (),
    ) -> list[list[int]]:
        """The new token ids for prompts of token ids, together as one batch; each ends with its first end token. Options as in `generate`."""
        if not prompts or not all(len(prompt) for prompt in prompts):
            raise InputError("a prompt is empty; give at least one token, such as the model's BOS")
        longest = max(len(prompt) for prompt in prompts)
        self._check_length(longest, max_new_tokens)
        ids, mask = (np.zeros((len(prompts), longest), dtype=np.int64) for _ in range(2))
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :], mask[row, longest - len(prompt) :] = prompt, 1
        steering = self._checked(steering)  # all of them, before any work
        in_prompt, in_text = (
            [o for o in steering if o.get("positions", "all") in ("all", part)] for part in ("prompt", "generation")
        )
        cache, random = self.start(len(prompts)), np.random.default_rng(seed)
        logits = self.prefill(ids, cache, mask, in_prompt).logits[:, -1]
        written: list[list[int]] = [[] for _ in prompts]
        going = [True] * len(prompts)
        for number in range(max_new_tokens):
            chosen = _chosen(logits, temperature, random)
            for row, token in enumerate(chosen.tolist()):
                if going[row]:
                    written[row].append(token)
                    going[row] = token not in self.eos
            if not any(going) or number == max_new_tokens - 1:
                break
            logits = self.step(chosen[:, None], cache, steering=in_text).logits[:, -1]
        return written

    def _check_ids(self, ids: Array, past: int) -> None:
        vocabulary = self.config.get("vocab_size")
        if ids.size and isinstance(vocabulary, int) and not (ids.min() >= 0 and ids.max() < vocabulary):
            raise InputError(
                f"token id {ids.max() if ids.max() >= vocabulary else ids.min()}: the model knows 0 to {vocabulary - 1}"
            )
        self._check_length(past + ids.shape[1], 0)

    def _check_length(self, length: int, new_tokens: int) -> None:
        room = self.config.get("max_position_embeddings", self.config.get("n_positions"))
        if isinstance(room, int) and length + new_tokens > room:
            added = f" and {new_tokens} new ones" if new_tokens else ""
            raise InputError(
                f"the prompt's {length} tokens{added} are more than the model's {room}; shorten {'one' if added else 'it'}"
            )


def _chosen(logits_BV: Array, temperature: float, random: np.random.Generator) -> Array:
    """The next token of each row, (B)."""
    if temperature <= 0:
        return np.asarray(logits_BV.argmax(-1))
    scaled = logits_BV.astype(np.float64) / temperature
    return np.asarray((scaled + random.gumbel(size=scaled.shape)).argmax(-1))  # a sample of the softmax


def _is_number(value: Any, kind: type) -> bool:
    """Whether it is one, of Python or of numpy; a truth value is none."""
    return isinstance(value, kind) and not isinstance(value, bool)


def _joined(parts: list[dict[int, tuple[Array, Array] | Array]]) -> dict[int, tuple[Array, Array] | Array]:
    joined: dict[int, tuple[Array, Array] | Array] = {}
    for index in parts[0]:
        pieces = [part[index] for part in parts]
        if isinstance(pieces[0], tuple):
            joined[index] = (np.concatenate([piece[0] for piece in pieces], 1), np.concatenate([piece[1] for piece in pieces], 1))
        else:
            joined[index] = np.concatenate([np.asarray(piece) for piece in pieces], 1)
    return joined
