"""`OnnxModel`: runs an exported model with onnxruntime, without torch or transformers.

Text needs the folder's tokenizer.json and the package tokenizers; token ids don't. Shape suffixes: B rows, T tokens,
P past tokens, V vocabulary, N experts, K active experts.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # must be set before onnxruntime is imported
import onnxruntime as ort

from mxd_convert.errors import InputError
from mxd_convert.modeling.steering_mxd import read_steering
from mxd_convert.onnx import validation

GRAPHS = {"fp32": "model.onnx", "fp16": "model_fp16.onnx", "int8": "model_quantized.onnx"}  # file names of transformers.js
FOLDER = "onnx"  # folder of the graphs in an exported folder
JS_TYPES = {"fp32": "fp32", "fp16": "fp16", "int8": "q8"}  # dtype names of transformers.js
METADATA = "mxd"  # metadata key with the descriptions of the layers
PREFILL = 512  # most prompt tokens per run

Array = np.ndarray[Any, np.dtype[Any]]
_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


@dataclass(frozen=True)
class Step:
    """The outputs of one run.

    Attributes:
        logits: (B, T, V).
        experts: by layer, (values, indices), each (B, T, K); values (B, T, N) with `sparsity: l1`.
    """

    logits: Array
    experts: dict[int, tuple[Array, Array] | Array]


@dataclass
class Cache:
    """Keys and values of the past tokens. mask: (B, P), 0 for padding. positions: (B), position of each row's next token."""

    tensors: dict[str, Any]
    mask: Array
    positions: Array = field(init=False)

    def __post_init__(self) -> None:
        self.positions = self.mask.sum(1)


class OnnxModel:
    """A converted model exported with `export-onnx`. Load it with `from_pretrained`.

    `layers`: by index, {"kind", "n_experts", "k", "sparsity"} of each layer.
    """

    def __init__(
        self, file: Path, folder: Path, session: Any, config: Mapping[str, Any], eos: set[int], names: validation.Names
    ) -> None:
        self.file, self.folder, self.session, self.config, self.eos = file, folder, session, config, eos
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
        """Load the model from an exported folder.

        Args:
            folder: an exported folder.
            dtype: "fp32", "fp16" or "int8". None selects the first one available.
            threads: number of threads per operator. None uses onnxruntime's default.
            providers: onnxruntime's execution providers, the preferred one first.

        Raises:
            InputError: if the folder is not an exported model or is damaged, or has no graph in `dtype`.
        """
        folder = Path(folder)
        files = {name: folder / FOLDER / file for name, file in GRAPHS.items()}
        available = [name for name, file in files.items() if file.is_file()]
        if not available:
            raise InputError(
                f"{folder}: not an exported model, it has no {FOLDER}/{GRAPHS['fp32']}. Export one with `mxd-convert export-onnx`."
            )
        if dtype is not None and dtype not in available:
            raise InputError(f"{folder}: no graph in {dtype}. Available: {', '.join(available)}")
        return cls.from_graph(files[dtype or available[0]], folder, threads, providers)

    @classmethod
    def from_graph(
        cls, file: Path, folder: Path, threads: int | None = None, providers: Sequence[str] = ("CPUExecutionProvider",)
    ) -> "OnnxModel":
        """Load the graph `file`, with config and tokenizer from `folder`. Arguments and errors as in `from_pretrained`."""
        validation.check_graph(file, folder)
        options = ort.SessionOptions()
        options.log_severity_level = 4  # fatal only: errors are raised too, and optional steering inputs cause a warning
        if threads is not None:
            options.intra_op_num_threads = threads
        try:
            other = list(providers) != ["CPUExecutionProvider"]  # on the CPU a fallback only prints and tries the same again
            session = ort.InferenceSession(str(file), options, providers=list(providers), enable_fallback=int(other))
        except Exception as error:  # onnxruntime's errors have no common base class
            validation.raise_failure(file, error, "onnxruntime can't load it")
        config = validation.read_config(folder)
        names = validation.read_names(file, session, METADATA)
        return cls(file, folder, session, config, validation.end_tokens(folder, config), names)

    # --- text ------------------------------------------------------------------------------------------------------------------

    @property
    def tokenizer(self) -> Any:
        """The folder's tokenizer, from the package tokenizers. Raises InputError if tokenizer.json is missing or invalid."""
        if self._tokenizer is None:
            path = self.folder / "tokenizer.json"
            if not path.is_file():
                raise InputError(f"{path}: missing. Give token ids, or export again from a checkpoint with its tokenizer.")
            from tokenizers import Tokenizer

            with self._explained("not a readable tokenizer"):
                tokenizer = Tokenizer.from_file(str(path))
                tokenizer.no_padding()
                tokenizer.no_truncation()
            self._tokenizer = tokenizer
        return self._tokenizer

    def tokens(self, text: str) -> list[int]:
        """Return the token ids of a text, including the special tokens that the tokenizer adds."""
        tokenizer = self.tokenizer
        with self._explained("it can't encode the text"):
            return list(tokenizer.encode(text).ids)

    def text(self, ids: Sequence[int]) -> str:
        """Return the text of token ids, without special tokens."""
        tokenizer, whole = self.tokenizer, [int(token) for token in ids]
        with self._explained("it can't decode token ids"):
            return str(tokenizer.decode(whole, skip_special_tokens=True))

    def _explained(self, problem: str) -> AbstractContextManager[None]:
        return validation.explained_tokenizer(self.folder / "tokenizer.json", problem)

    # --- one run ---------------------------------------------------------------------------------------------------------------

    def empty_cache(self, rows: int) -> Cache:
        """Return an empty cache for a batch of `rows` rows."""
        empty = {}
        for name, entry in self._past.items():
            shape = (rows, entry.shape[1], 0, entry.shape[3])
            empty[name] = ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, dtype=_TYPES[entry.type]))
        return Cache(empty, np.zeros((rows, 0), dtype=np.int64))

    def step(self, ids: Array, cache: Cache, mask: Array | None = None, steering: Iterable[Mapping[str, Any]] = ()) -> Step:
        """Run the model on the next tokens, and add them to `cache`.

        Args:
            ids: token ids, (B, T).
            cache: the past tokens. It is unchanged if an error is raised.
            mask: (B, T), 0 for padding. None: no padding.
            steering: orders {"layer", "expert", "add"} for these tokens.

        Raises:
            InputError: if the tokens or the steering are invalid, or onnxruntime can't run the graph.
        """
        ids = np.ascontiguousarray(ids, dtype=np.int64)
        new = np.ones_like(ids) if mask is None else mask.astype(np.int64)
        self._check_ids(ids, cache.mask.shape[1])
        full_mask = np.concatenate([cache.mask, new], axis=1)
        positions = np.maximum(cache.positions[:, None] + new.cumsum(1) - 1, 0)
        given = {"input_ids": ids, "attention_mask": full_mask, "position_ids": positions, **self._orders(steering)}
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
        cache.mask, cache.positions = full_mask, cache.positions + new.sum(1)
        cache.tensors = {name: found[name.replace("past_key_values", "present")] for name in cache.tensors}
        return Step(found["logits"].numpy(), self._coefficients({name: found[name].numpy() for name in self._experts}))

    def prefill(self, ids: Array, cache: Cache, mask: Array, steering: Iterable[Mapping[str, Any]] = ()) -> Step:
        """Run the model on a prompt in pieces of `PREFILL` tokens, which limits memory. Arguments and errors as in `step`.

        The logits are those of the last token, (B, 1, V).
        """
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

    def _checked(self, steering: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Return the orders, completed. A graph can only add to coefficients."""
        given = list(steering)
        if given and not self._steerable:
            raise InputError(f"{self.folder}: its graph has no steering inputs. Export it with --steering.")
        try:
            orders = read_steering(given, {str(index): layer for index, layer in self.layers.items()})
        except ValueError as error:
            raise InputError(f"steering: {error}") from None
        for order in orders:
            if "add" not in order:
                raise InputError(
                    f"steering of expert {order['expert']} of layer {order['layer']}: an ONNX graph can only add to coefficients."
                    " Give a number as `add`."
                )
        return orders

    def _coefficients(self, found: Mapping[str, Array]) -> dict[int, tuple[Array, Array] | Array]:
        coefficients: dict[int, tuple[Array, Array] | Array] = {}
        for index in self.layers:
            values, indices = found.get(f"experts.{index}.values"), found.get(f"experts.{index}.indices")
            if values is not None:
                coefficients[index] = values if indices is None else (values, indices)
        return coefficients

    # --- encode and generate ---------------------------------------------------------------------------------------------------

    def encode(self, text: str | Sequence[int]) -> dict[int, tuple[Array, Array] | Array]:
        """Return the coefficients of every layer's experts on a text, as `encode` of the layers in PyTorch does.

        Args:
            text: a text, or its token ids.

        Returns:
            By layer, (values, indices), each (T, K); values (T, N) with `sparsity: l1`.

        Raises:
            InputError: if the graph has no expert outputs, or the text is empty or too long.
        """
        if not self._experts:
            raise InputError(f"{self.folder}: its graph has no expert outputs. Export it with --expert-outputs.")
        ids = np.array([self.tokens(text) if isinstance(text, str) else list(text)], dtype=np.int64)
        if not ids.size:
            raise InputError("the text is empty. Give at least one token, such as the model's BOS.")
        self._check_length(ids.shape[1], 0)
        experts = self.prefill(ids, self.empty_cache(1), np.ones_like(ids)).experts
        return {
            index: (coefficients[0][0], coefficients[1][0]) if isinstance(coefficients, tuple) else coefficients[0]
            for index, coefficients in experts.items()
        }

    def generate(
        self,
        prompt: str,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        seed: int = 0,
        steering: Sequence[Mapping[str, Any]] = (),
    ) -> str:
        """Return the prompt and its continuation as text.

        Args:
            prompt: a text.
            max_new_tokens: most tokens to generate. Generation stops early at an end token.
            temperature: sampling temperature; 0 is greedy.
            seed: seed for sampling.
            steering: orders {"layer", "expert", "add", "positions"}. Positions are "all" (default), "prompt" or "generation",
                the generated tokens.

        Raises:
            InputError: if the prompt is empty or too long, or the steering is invalid.
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
        """Return the generated token ids of several prompts, run as one batch.

        Each list includes the end token at which it stopped, if any. Other arguments and errors as in `generate`.

        Args:
            prompts: token ids of each prompt.
            max_new_tokens: see `generate`.
            temperature: see `generate`.
            seed: see `generate`.
            steering: see `generate`.
        """
        if not prompts or not all(len(prompt) for prompt in prompts):
            raise InputError("a prompt is empty. Give at least one token, such as the model's BOS.")
        longest = max(len(prompt) for prompt in prompts)
        self._check_length(longest, max_new_tokens)
        ids, mask = (np.zeros((len(prompts), longest), dtype=np.int64) for _ in range(2))
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :], mask[row, longest - len(prompt) :] = prompt, 1
        steering = self._checked(steering)  # before the prompt is run, which may take long
        in_prompt, in_text = (
            [order for order in steering if order.get("positions", "all") in ("all", phase)] for phase in ("prompt", "generation")
        )
        cache, random = self.empty_cache(len(prompts)), np.random.default_rng(seed)
        logits = self.prefill(ids, cache, mask, in_prompt).logits[:, -1]
        generated: list[list[int]] = [[] for _ in prompts]
        unfinished = [True] * len(prompts)
        for number in range(max_new_tokens):
            chosen = _next_tokens(logits, temperature, random)
            for row, token in enumerate(chosen.tolist()):
                if unfinished[row]:
                    generated[row].append(token)
                    unfinished[row] = token not in self.eos
            if not any(unfinished) or number == max_new_tokens - 1:
                break
            logits = self.step(chosen[:, None], cache, steering=in_text).logits[:, -1]
        return generated

    def _check_ids(self, ids: Array, past: int) -> None:
        vocabulary = self.config.get("vocab_size")
        if ids.size and isinstance(vocabulary, int) and not (ids.min() >= 0 and ids.max() < vocabulary):
            raise InputError(
                f"token id {ids.max() if ids.max() >= vocabulary else ids.min()}: outside of the vocabulary, 0 to {vocabulary - 1}"
            )
        self._check_length(past + ids.shape[1], 0)

    def _check_length(self, length: int, new_tokens: int) -> None:
        room = self.config.get("max_position_embeddings", self.config.get("n_positions"))
        if isinstance(room, int) and length + new_tokens > room:
            added = f" and {new_tokens} new tokens" if new_tokens else ""
            fix = "Shorten the prompt or lower max_new_tokens." if new_tokens else "Shorten the prompt."
            raise InputError(f"the prompt's {length} tokens{added} are more than the model's {room} positions. {fix}")


def _next_tokens(logits_BV: Array, temperature: float, random: np.random.Generator) -> Array:
    """Return the next token of each row, (B)."""
    if temperature <= 0:
        return np.asarray(logits_BV.argmax(-1))
    scaled = logits_BV.astype(np.float64) / temperature
    return np.asarray((scaled + random.gumbel(size=scaled.shape)).argmax(-1))  # Gumbel-max: a sample from the softmax


def _joined(steps: list[dict[int, tuple[Array, Array] | Array]]) -> dict[int, tuple[Array, Array] | Array]:
    """Return the experts of consecutive steps, concatenated along T."""
    joined: dict[int, tuple[Array, Array] | Array] = {}
    for index in steps[0]:
        pieces = [step[index] for step in steps]
        if isinstance(pieces[0], tuple):
            joined[index] = (np.concatenate([piece[0] for piece in pieces], 1), np.concatenate([piece[1] for piece in pieces], 1))
        else:
            joined[index] = np.concatenate([np.asarray(piece) for piece in pieces], 1)
    return joined
