"""The other files of an exported folder: config, generation settings, tokenizer and onnxruntime-genai's config."""

import json
import shutil
from pathlib import Path
from typing import Any

import onnx_ir as ir

from mxd_convert.base_model.checks import quiet
from mxd_convert.base_model.load import load_tokenizer
from mxd_convert.files import read_mapping, write_json, write_text
from mxd_convert.onnx.runtime import FOLDER, GRAPHS, JS_TYPES

_OF_OURS = ("model_type", "architectures", "auto_map", "mxd")  # config keys that only a converted checkpoint has
_PLAIN_TOKENIZER = {"TokenizersBackend": "PreTrainedTokenizerFast"}  # the class name in transformers 4, which other tools read


def base_type(config: Any) -> Any:
    """Return the config class of the base model, from which the converted model's config class is derived."""
    return type(config).__mro__[1]


def write_config(model: Any, folder: Path, dtypes: list[str], with_data: list[str]) -> None:
    """Write config.json with the base's model type, by which clients select how to run a graph.

    Args:
        model: the converted model.
        folder: the exported folder.
        dtypes: dtypes of the exported graphs, the default first.
        with_data: dtypes of graphs with a separate weights file.
    """
    base = base_type(model.config)
    settings = {key: value for key, value in model.config.to_dict().items() if key not in _OF_OURS}
    config = base(**settings)
    config.architectures = [model.base_class.__name__]
    content = json.loads(config.to_json_string())  # drops the path that the config was read from
    content["transformers.js_config"] = {
        "dtype": JS_TYPES[dtypes[0]],
        "kv_cache_dtype": {"fp16": "float16"},
        **({"use_external_data_format": {GRAPHS[dtype]: 1 for dtype in with_data}} if with_data else {}),
    }
    write_json(folder / "config.json", content)


def write_tokenizer(checkpoint: Path, folder: Path) -> None:
    """Write the tokenizer with its chat template, and the generation settings."""
    with quiet():
        tokenizer = load_tokenizer(str(checkpoint))
        tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    content = read_mapping(path)
    name = str(content.get("tokenizer_class"))
    content["tokenizer_class"] = _PLAIN_TOKENIZER.get(name, name)
    if tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]:
        content["add_bos_token"] = True  # otherwise transformers.js' pipeline omits the BOS token
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    if (checkpoint / "generation_config.json").is_file():
        shutil.copyfile(checkpoint / "generation_config.json", folder / "generation_config.json")


def write_genai_config(model: Any, graph: ir.Graph, folder: Path, dtype: str) -> None:
    """Write genai_config.json for the graph of `dtype`."""
    config, generation = model.config.get_text_config(), model.generation_config
    keys = [
        value for value in graph.inputs if str(value.name).startswith("past_key_values.") and str(value.name).endswith(".key")
    ]
    heads, width = (int(str(keys[0].shape[at])) for at in (1, 3)) if keys[0].shape is not None else (0, 0)
    names = {str(value.name) for value in graph.inputs}
    end = generation.eos_token_id if generation.eos_token_id is not None else config.eos_token_id
    begin = next(token for token in (generation.bos_token_id, config.bos_token_id, 0) if token is not None)
    ends = end if isinstance(end, list) else [end] if end is not None else []
    pad = next(token for token in (generation.pad_token_id, config.pad_token_id, *ends, 0) if token is not None)
    room = int(getattr(config, "max_position_embeddings", 2048))
    content = {
        "model": {
            "type": "decoder",  # onnxruntime-genai's generic type
            "vocab_size": config.vocab_size,
            "context_length": room,
            "bos_token_id": begin,
            "eos_token_id": ends or [config.vocab_size],  # required: without an EOS token, an id that is never generated
            "pad_token_id": pad,
            "decoder": {
                "filename": f"{FOLDER}/{GRAPHS[dtype]}",
                "head_size": width,
                "hidden_size": config.hidden_size,
                "num_attention_heads": config.num_attention_heads,
                "num_key_value_heads": heads,
                "num_hidden_layers": len(keys),
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    **({"position_ids": "position_ids"} if "position_ids" in names else {}),
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {"logits": "logits", "present_key_names": "present.%d.key", "present_value_names": "present.%d.value"},
            },
        },
        "search": {
            "do_sample": False,
            "max_length": room,
            "num_beams": 1,
            "past_present_share_buffer": False,
            "temperature": 1.0,
            "top_k": 1,
            "top_p": 1.0,
        },
    }
    write_json(folder / "genai_config.json", content)
