"""Cached activations have delphi's layout exactly, and hold the nonzeros of `encode`."""

import json

import numpy as np
import pytest
import torch
from folders import cache_of
from random_layers import CONTEXT, EXPERTS, checkpoint_of, model_layer
from safetensors.numpy import load_file
from small_runs import blocks_of

from mxd_convert import InputError, cache_activations, load_checkpoint
from mxd_convert.base_model.load import load_tokenizer
from mxd_convert.export.delphi import active_entries


@torch.no_grad()
def coefficients(model, index, ids):
    """Return dense coefficients (B, T, N) of an explicit forward."""
    layer, seen = model.mxd_layers()[index], []
    handle = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(input_ids=ids)
    handle.remove()
    coefficients = layer.encode(seen[0])
    return (
        coefficients
        if isinstance(coefficients, torch.Tensor)
        else torch.zeros(*ids.shape, layer.n_experts).scatter(-1, coefficients[1], coefficients[0])
    )


@pytest.mark.parametrize("sparsity", ["topk", "l1"])
@pytest.mark.parametrize("mask_first", [None, False])
def test_the_cache_holds_the_nonzeros_of_encode(sparsity, mask_first, models, text, tmp_path):
    layers = {0: model_layer("mxd", 0, sparsity=sparsity), 2: model_layer("skip_transcoder", 2, sparsity=sparsity)}
    with torch.no_grad():
        layers[0].gate.bias[20:] = -1e3  # these experts have a file that stays empty
        layers[2].gate.bias[3] = 1e6  # beyond float16
        layers[2].gate.weight[3] = 0
    folder = checkpoint_of(tmp_path / "checkpoint", models["gpt2"], layers)
    found = cache_activations(folder, tmp_path / "out", text, tokens=2048, splits=6, mask_first=mask_first, quiet=True)
    assert found == json.loads((tmp_path / "out" / "mxd_cache.json").read_text())
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"latents", "mxd_cache.json"}
    assert {path.name for path in (tmp_path / "out" / "latents").iterdir()} == {"h.0.mlp", "h.2.mlp"}
    ids = blocks_of(text, load_tokenizer(str(folder)), tmp_path, tokens=2048).take(slice(None))
    model = load_checkpoint(folder)
    for index in layers:
        module = tmp_path / "out" / "latents" / f"h.{index}.mlp"
        entries, tokens, ranges = cache_of(module)
        assert ranges == [(4 * i, 4 * i + 3) for i in range(6)]
        assert np.array_equal(tokens, ids.numpy())
        dense = coefficients(model, index, ids)
        if mask_first is None:
            dense[:, 0] = 0
            dense[ids == 0] = 0
        expected = {tuple(entry): dense[tuple(entry)].item() for entry in (dense > 1e-5).nonzero().tolist()}
        assert entries.keys() == expected.keys()
        got, want = np.array([entries[key] for key in expected], np.float32), np.array(list(expected.values()))
        assert np.allclose(got, np.minimum(want, 65504), rtol=1e-3)
        figures = found["layers"][str(index)]
        assert figures["entries"] == len(expected)
        assert figures["never_fired"] == int((dense > 1e-5).flatten(0, 1).any(0).logical_not().sum())
        assert figures["module"] == module.name
        config = json.loads((module / "config.json").read_text())
        assert config == {
            "dataset_repo": text.name,
            "dataset_split": "",
            "dataset_name": "",
            "dataset_column": "text",
            "batch_size": 1,
            "cache_ctx_len": CONTEXT,
            "n_tokens": ids.numel(),
            "n_splits": 6,
            "model_name": str(folder),
        }
    empty = load_file(tmp_path / "out" / "latents" / "h.0.mlp" / "20_23.safetensors")
    assert empty["locations"].shape == (0, 3)
    assert empty["locations"].dtype == np.uint16
    assert empty["activations"].dtype == np.float16


def test_entries_are_sorted_and_zeros_of_delphi_are_left_out():
    values = torch.tensor([[[2.0, 1.0, 1e-6, 3.0], [1.0, 0.0, 0.0, 5.0]]])
    indices = torch.tensor([[[9, 4, 1, 0], [7, 8, 9, 2]]])
    block, position, expert, value = active_entries((values, indices), torch.tensor([[True, True]]))
    assert (block.tolist(), position.tolist()) == ([0, 0, 0, 0, 0], [0, 0, 0, 1, 1])
    assert (expert.tolist(), value.tolist()) == ([0, 4, 9, 2, 7], [3.0, 1.0, 2.0, 5.0, 1.0])
    assert active_entries((values, indices), torch.tensor([[False, True]]))[2].tolist() == [2, 7]


def test_the_command_writes_a_cache(mxd, converted, text, tmp_path):
    arguments = ("--to", "delphi", "--data", text, "--tokens", 512)
    status, out, err = mxd("export", converted["llama"], tmp_path / "out", *arguments)
    assert status == 0, err
    assert "layers.2.mlp" in out
    assert "left out" in out
    assert out.strip().splitlines()[-1] == str(tmp_path / "out")
    status, out, _ = mxd("export", converted["llama"], tmp_path / "json", *arguments, "--layers", "2", "--json")
    assert status == 0
    assert json.loads(out)["layers"].keys() == {"2"}
    files = list((tmp_path / "out" / "latents" / "layers.2.mlp").glob("*.safetensors"))
    assert files
    for path in files:
        assert path.read_bytes() == (tmp_path / "json" / "latents" / "layers.2.mlp" / path.name).read_bytes()


def test_impossible_caches_are_refused(refused, converted, text, tmp_path):
    folder, arguments = converted["llama"], ("--to", "delphi", "--data", text)
    refused("export", folder, tmp_path / "out", *arguments, "--layers", "1", words=("layer 1 is not converted",))
    refused("export", folder, tmp_path / "out", *arguments, "--tokens", 3, words=("--tokens 3",))
    refused("export", folder, folder / "below", *arguments, words=("inside the checkpoint",))
    for splits in (0, EXPERTS + 1):
        with pytest.raises(InputError, match=f"splits = {splits}.*{EXPERTS}"):
            cache_activations(folder, tmp_path / "out", text, splits=splits)
    assert list(tmp_path.iterdir()) == []
