"""A conversion that runs in seconds: its base model, its text and its recipe."""

from pathlib import Path

import torch
from project import QUICKSTART
from tiny_models import random_model
from transformers import GPT2Config, GPTNeoXConfig, LlamaConfig

from mxd_convert.base_model.load import load_tokenizer
from mxd_convert.data.blocks import prepare_eval
from mxd_convert.recipe.texts import EvalText

FAMILIES = ("gpt2", "gpt_neox", "llama")
TEXT = "Document 3. The value 41 is returned when index 7 is given."


def make_model(family: str, folder: Path, dtype=torch.float32, **changes) -> Path:
    """Save a random model whose MLPs matter, with the quickstart's tokenizer."""
    model = random_model(_config(family, **changes))
    model.to(dtype).save_pretrained(folder)
    load_tokenizer(str(QUICKSTART)).save_pretrained(folder)
    return folder


def _config(family: str, **changes):
    common = {
        "vocab_size": 2048,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": None,
        "tie_word_embeddings": True,
        **changes,
    }
    if family == "gpt2":
        return GPT2Config(**{"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128, **common})
    size = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 128}
    if family == "gpt_neox":
        return GPTNeoXConfig(**{"intermediate_size": 64, **size, **common})
    return LlamaConfig(**{"intermediate_size": 48, "num_key_value_heads": 2, **size, **common})


def documents(count: int = 60) -> list[str]:
    return [
        f"Document {i}. " + " ".join(f"The value {j * i % 97} is returned when index {j} is given." for j in range(12))
        for i in range(count)
    ]


def blocks_of(text: Path, tokenizer, folder: Path, tokens: int = 1600, context: int = 32):
    """Return the blocks of an evaluation text; the folder stores its tokens."""
    folder.mkdir(exist_ok=True)
    return prepare_eval(EvalText(path=str(text), tokens=tokens), context, tokenizer, folder)


def small_recipe(model: Path, text: Path, folder: Path, **sections) -> dict:
    """Return a recipe that runs in seconds; sections add to its keys or override them."""
    recipe = {
        "base": {"model": str(model)},
        "data": {"train": {"path": str(text)}, "eval": {"tokens": 512}, "context": 32, "tokens": 4096},
        "layer": {"k": 4, "experts": 24},
        "train": {
            "lr": 3e-3,
            "batch_tokens": 256,
            "log_every": 4,
            "checkpoint_every": 4,
            "device": "cpu",
            "init": "paper",
            "joint": 0.0,
        },
        "output": {"dir": str(folder)},
    }
    for section, content in sections.items():
        recipe[section] = {**recipe[section], **content} if isinstance(content, dict) and section in recipe else content
    return recipe
