"""GGUF files of tiny Llamas, written with llama.cpp's own package."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from transformers import AutoConfig, AutoModelForCausalLM

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_gguf(model: Path, path: Path, kind: str = "F32", architecture: str = "llama", **metadata: Any) -> Path:
    """Write a Llama's weights and byte-level BPE tokenizer as a GGUF file.

    Args:
        model: the model's folder.
        path: of the file to write.
        kind: of the matrices: F32, F16, or a quantisation for those whose width is a multiple of its block.
        architecture: as the file states it.
        metadata: further unsigned integers, by name, with `__` for dots.
    """
    config = AutoConfig.from_pretrained(model)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_string("general.license", "apache-2.0")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    for name, value in metadata.items():
        writer.add_uint16(name.replace("__", "."), value)
    _add_tokenizer(writer, json.loads((model / "tokenizer.json").read_text())["model"])
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for name, tensor in AutoModelForCausalLM.from_pretrained(model, dtype="float32").state_dict().items():
        if name != "lm_head.weight":  # tied
            _add_tensor(writer, name.removesuffix(".weight"), tensor.numpy(), kind, heads)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_tokenizer(writer: gguf.GGUFWriter, bpe: dict[str, Any]) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    tokens = sorted(bpe["vocab"], key=bpe["vocab"].get)
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL if id == 0 else gguf.TokenType.NORMAL for id in range(len(tokens))])
    writer.add_token_merges([" ".join(pair) for pair in bpe["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)


def _add_tensor(writer: gguf.GGUFWriter, name: str, tensor: np.ndarray, kind: str, heads: dict[str, int]) -> None:
    layer = ""
    if name.startswith("model.layers."):
        _, _, index, name = name.split(".", 3)
        layer = f"blk.{index}."
    short = NAMES[name]
    if short in heads:  # GGUF interleaves the halves of a head's rotary dimensions
        tensor = tensor.reshape(heads[short], 2, -1, tensor.shape[1]).swapaxes(1, 2).reshape(tensor.shape)
    if tensor.ndim == 1 or kind == "F32":
        writer.add_tensor(f"{layer}{short}.weight", np.ascontiguousarray(tensor))
        return
    wanted = gguf.GGMLQuantizationType[kind]
    block = gguf.GGML_QUANT_SIZES[wanted][0]
    used = wanted if tensor.shape[1] % block == 0 else gguf.GGMLQuantizationType.F16
    writer.add_tensor(f"{layer}{short}.weight", gguf.quants.quantize(np.ascontiguousarray(tensor), used), raw_dtype=used)
