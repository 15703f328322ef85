"""`generate`: text from a converted checkpoint, optionally steered, and parsers of steering options."""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mxd_convert.base_model.checks import load_errors, quiet
from mxd_convert.base_model.load import load_tokenizer
from mxd_convert.checkpoint.read import load_checkpoint
from mxd_convert.errors import InputError
from mxd_convert.evaluation.steering import steered

MAX_MAGNITUDE = 1e6  # largest temperature and amount of steering, above which the arithmetic overflows
_HOW = {"+": "add", "-": "add", "": "add", "=": "set", "x": "scale"}


def parse_steering(text: str, positions: str = "all") -> dict[str, Any]:
    """Parse a steering order.

    `"2:17:+10"` becomes {"layer": 2, "expert": 17, "add": 10.0, "positions": "all"}. `=5` sets, `x0.5` scales and `off` ablates.

    Args:
        text: LAYER:EXPERT:AMOUNT.
        positions: Positions to steer: "all", "prompt" or "generation".

    Raises:
        InputError: The text has another form, or the amount is too large.
    """
    match = re.fullmatch(r"\s*(\d+):(\d+):(?:(off)|([-+=x]?)(-?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?))\s*", text)
    if match is None:
        raise InputError(
            f"--steer {text}: expected LAYER:EXPERT:AMOUNT, for example --steer 2:17:+10 (=10 sets, x0.5 scales, off ablates)"
        )
    order: dict[str, Any] = {"layer": int(match[1]), "expert": int(match[2])}
    if match[3]:
        return {**order, "ablate": True, "positions": positions}
    amount = -float(match[5]) if match[4] == "-" else float(match[5])
    if not abs(amount) <= MAX_MAGNITUDE:
        raise InputError(f"--steer {text}: the amount exceeds {MAX_MAGNITUDE:g}. Use a smaller one.")
    return {**order, _HOW[match[4]]: amount, "positions": positions}


def parse_expert(option: str, text: str) -> dict[str, Any]:
    """Parse an expert: `"2:17"` becomes {"layer": 2, "expert": 17}.

    Raises InputError, which names `option`, if the text has another form.
    """
    match = re.fullmatch(r"\s*(\d+):(\d+)\s*", text)
    if match is None:
        raise InputError(f"{option} {text}: expected LAYER:EXPERT, for example 2:17")
    return {"layer": int(match[1]), "expert": int(match[2])}


def parse_scale(text: str) -> dict[str, Any]:
    """Parse a scaling of an expert: `"2:17:0.5"` becomes {"layer": 2, "expert": 17, "scale": 0.5}. Raises InputError."""
    where, _, factor = text.rpartition(":")
    try:
        value = float(factor)
    except ValueError:
        value = math.nan
    if not abs(value) <= MAX_MAGNITUDE or ":" not in where:
        raise InputError(f"--scale {text}: expected LAYER:EXPERT:FACTOR, for example --scale 2:17:0.5")
    return {**parse_expert("--scale", where), "scale": value}


def parse_numbers(option: str, text: str) -> list[float]:
    """Parse a list of numbers: `"1,2,4"` becomes [1.0, 2.0, 4.0]. Raises InputError, which names `option`."""
    try:
        return [float(number) for number in text.split(",")]
    except ValueError:
        raise InputError(f"{option} {text}: expected numbers separated by commas, for example 1,2,4") from None


def generate(
    checkpoint: str | Path,
    prompt: str,
    steering: Sequence[Mapping[str, Any]] = (),
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
) -> str:
    """Continue a prompt with a converted checkpoint.

    Args:
        checkpoint: Folder of the converted checkpoint.
        prompt: Text to continue. An empty one is replaced by the BOS token.
        steering: Steering orders, as `parse_steering` returns them.
        max_new_tokens: Maximum number of tokens to generate.
        temperature: Sampling temperature. 0 takes the most likely token.
        seed: Random seed of the sampling.

    Returns:
        The prompt and its continuation.

    Raises:
        InputError: An argument is out of range, or the checkpoint can't be used.
    """
    if max_new_tokens < 1:
        raise InputError(f"--max-new-tokens {max_new_tokens}: expected at least 1")
    if not 0 <= temperature <= MAX_MAGNITUDE:
        raise InputError(f"--temperature {temperature}: expected a number from 0 (the most likely token) to {MAX_MAGNITUDE:g}")
    if not 0 <= seed < 2**63:
        raise InputError(f"--seed {seed}: expected a whole number from 0 to {2**63 - 1}")
    model, tokenizer = load_checkpoint(checkpoint, finite=True), load_tokenizer(str(checkpoint))
    inputs = encode_prompt(tokenizer, prompt, model, max_new_tokens)
    torch.manual_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    with quiet(), steered(model, steering), load_errors("the text", str(checkpoint), "written"):
        output = model.generate(**inputs, max_new_tokens=max_new_tokens, pad_token_id=tokenizer.eos_token_id, **sampling)
    return str(tokenizer.decode(output[0], skip_special_tokens=True))


def encode_prompt(tokenizer: Any, prompt: str, model: Any, new_tokens: int = 0) -> dict[str, Tensor]:
    """Return a prompt as input_ids and attention_mask, both (1, T). An empty prompt becomes the BOS token.

    new_tokens: number of tokens to be generated. Raises InputError if the prompt and these exceed the model's length, or if the
    prompt is empty and the tokenizer has no BOS token.
    """
    prompt = prompt.encode("utf-8", "replace").decode("utf-8")  # a shell may pass bytes that aren't UTF-8
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    if ids.shape[1] == 0:
        if tokenizer.bos_token_id is None:
            raise InputError("--prompt: the prompt is empty, and the tokenizer has no BOS token to begin with. Give a prompt.")
        ids, mask = torch.tensor([[tokenizer.bos_token_id]]), torch.ones(1, 1, dtype=torch.long)
    room, length = getattr(model.config.get_text_config(), "max_position_embeddings", None), ids.shape[1]
    if isinstance(room, int) and length + new_tokens > room:
        added = f" and {new_tokens} new tokens" if new_tokens else ""
        raise InputError(
            f"the prompt's {length} tokens{added} are more than the model's {room}. Shorten the prompt{' or generate fewer' if added else ''}."
        )
    return {"input_ids": ids, "attention_mask": mask}
