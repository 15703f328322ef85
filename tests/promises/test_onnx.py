"""The exported ONNX graph equals the checkpoint in PyTorch and has the names that clients expect."""

import json
import shutil
import subprocess
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from project import ROOT
from small_runs import FAMILIES, TEXT, small_recipe
from transformers import AutoTokenizer

import mxd_convert
from mxd_convert import steer
from mxd_convert.checkpoint.read import load_checkpoint
from mxd_convert.commands import export_onnx as export
from mxd_convert.commands.export_onnx import export_onnx
from mxd_convert.evaluation.steering import steered
from mxd_convert.onnx import OnnxModel, graph, parity, runtime
from mxd_convert.onnx.sparse_gain import CHUNK


@pytest.fixture(params=FAMILIES)
def pair(request, converted, exported):
    """Return (the checkpoint in PyTorch, its graph)."""
    return load_checkpoint(converted[request.param], dtype="float32"), OnnxModel.from_pretrained(exported[request.param])


def of_kind(models, text, folder, **layer):
    """Convert a tiny Llama to layers of a kind."""
    mxd_convert.convert(small_recipe(models["llama"], text, folder, layers=[0, 2], layer={"k": 4, **layer}), quiet=True)
    return folder


def logits_of(model, ids, mask=None):
    mask = torch.ones_like(torch.tensor(ids)) if mask is None else torch.tensor(mask)
    with torch.no_grad():
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        return model(input_ids=torch.tensor(ids), attention_mask=mask, position_ids=positions, use_cache=False).logits.numpy()


def some_ids(model, rows, length, seed=0):
    return np.random.default_rng(seed).integers(0, model.config.vocab_size, (rows, length))


# --- the graph ------------------------------------------------------------------------------------------------------------------


def test_names_and_dimensions_are_those_that_clients_expect(exported, converted):
    for family in FAMILIES:
        model = onnx.load(exported[family] / "onnx" / "model.onnx")
        layers = load_checkpoint(converted[family]).config.num_hidden_layers
        cache = [f"{i}.{part}" for i in range(layers) for part in ("key", "value")]
        inputs = [entry.name for entry in model.graph.input]
        assert inputs == [
            *("input_ids", "attention_mask", "position_ids"),
            *(f"past_key_values.{name}" for name in cache),
            *graph.STEERING,
        ]
        experts = [f"experts.{i}.{part}" for i in (0, 2) for part in ("indices", "values")]
        assert [entry.name for entry in model.graph.output] == ["logits", *(f"present.{name}" for name in cache), *experts]
        shapes = {
            entry.name: [d.dim_param or d.dim_value for d in entry.type.tensor_type.shape.dim] for entry in model.graph.input
        }
        assert shapes["input_ids"] == shapes["position_ids"] == ["batch_size", "sequence_length"]
        assert shapes["attention_mask"] == ["batch_size", "past_sequence_length + sequence_length"]
        assert [shapes["past_key_values.0.key"][i] for i in (0, 2)] == ["batch_size", "past_sequence_length"]
        assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", export.OPSET)]
        operators = {node.op_type for node in model.graph.node}
        assert "Scan" in operators
        assert not operators & {
            "Loop",
            "If",
            "ScatterElements",
            "ScatterND",
            "SequenceEmpty",
        }  # no dense scatter and no control flow
        onnx.checker.check_model(model, full_check=True)


def no_word_of_the_machine(folder, checkpoint):
    words = (str(ROOT), str(checkpoint.parent), "site-packages", "/home/", "/root/", "/tmp/")
    for file in folder.rglob("*"):
        if file.is_file():
            content = file.read_bytes()
            for word in words:
                assert word.encode() not in content, (file.name, word)


def test_an_exported_folder_names_no_machine(exported, converted):
    for family in FAMILIES:
        no_word_of_the_machine(exported[family], converted[family])


@pytest.mark.parametrize(("rows", "length", "past"), [(1, 1, 0), (3, 9, 0), (1, 1, 17), (2, 30, 5), (3, 100, 20)])
def test_logits_equal_those_of_pytorch_with_cache_and_padding(pair, rows, length, past):
    model, exported_model = pair
    ids = some_ids(model, rows, past + length)
    mask = np.ones_like(ids)
    for row in range(1, rows):
        mask[row, : 2 * row] = 0
    cache = exported_model.empty_cache(rows)
    parts = [
        exported_model.step(ids[:, part], cache, mask[:, part]).logits
        for part in (slice(0, past), slice(past, None))
        if part != slice(0, 0)
    ]
    theirs = logits_of(model, ids, mask)
    difference = np.abs(np.concatenate(parts, 1) - theirs).max(-1)[mask.astype(bool)]
    assert difference.max() <= 1e-5 * max(10.0, np.abs(theirs).max())


def test_one_token_at_a_time_gives_the_same_logits(pair):
    model, exported_model = pair
    ids, cache = some_ids(model, 2, 24), exported_model.empty_cache(2)
    steps = [exported_model.step(ids[:, at : at + 1], cache).logits for at in range(24)]
    theirs = logits_of(model, ids)
    assert np.abs(np.concatenate(steps, 1) - theirs).max() <= 1e-5 * max(10.0, np.abs(theirs).max())


def test_the_exported_experts_equal_those_of_the_layers(pair):
    model, exported_model = pair
    ids = exported_model.tokens(TEXT)
    seen = {}
    handles = [
        layer.register_forward_hook(
            lambda module, arguments, output, index=index: seen.update({index: module.encode(arguments[0])})
        )
        for index, layer in model.mxd_layers().items()
    ]
    logits_of(model, [ids])
    for handle in handles:
        handle.remove()
    found = exported_model.encode(TEXT)
    assert list(found) == list(seen) == [0, 2]
    for index, (values, indices) in found.items():
        theirs = torch.zeros(len(ids), 24).scatter_(1, seen[index][1][0], seen[index][0][0])
        ours = torch.zeros(len(ids), 24).scatter_(1, torch.from_numpy(indices), torch.from_numpy(values))
        assert (ours - theirs).abs().max() <= 1e-5 * max(1.0, theirs.abs().max().item())


def test_steering_of_the_graph_equals_that_of_pytorch(pair):
    model, exported_model = pair
    ids = some_ids(model, 1, 12)
    orders = [
        {"layer": 0, "expert": 3, "add": 2.0},
        {"layer": 2, "expert": 17, "add": -1.5},
        {"layer": 2, "expert": 5, "add": 4.0},
    ]
    with steered(model, orders):
        theirs = logits_of(model, ids)
    ours = exported_model.step(ids, exported_model.empty_cache(1), steering=orders).logits
    plain = exported_model.step(ids, exported_model.empty_cache(1)).logits
    assert np.abs(ours - theirs).max() <= 2e-5 * max(10.0, np.abs(theirs).max())
    assert np.abs(ours - plain).max() > 0.01
    for nothing in (
        {},
        {name: np.zeros(0, dtype=dtype) for name, dtype in zip(graph.STEERING, (np.int64, np.int64, np.float32), strict=True)},
    ):
        feed = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.arange(12)[None], **nothing}
        empty = {name: value.numpy() for name, value in exported_model.empty_cache(1).tensors.items()}
        assert np.array_equal(
            exported_model.session.run(["logits"], {**feed, **empty})[0], plain
        )  # the inputs are optional and may be empty


def test_steering_applies_to_the_prompt_or_the_generation(exported, converted):
    exported_model, model = OnnxModel.from_pretrained(exported["llama"]), load_checkpoint(converted["llama"])
    tokenizer = AutoTokenizer.from_pretrained(converted["llama"])
    for positions in ("all", "prompt", "generation"):
        with steer(model, layer=2, expert=4, add=3.0, positions=positions):
            inputs = tokenizer(TEXT, return_tensors="pt")
            theirs = model.generate(**inputs, max_new_tokens=12, do_sample=False, pad_token_id=0)[0].tolist()
        order = {"layer": 2, "expert": 4, "add": 3.0, "positions": positions}
        ids = exported_model.tokens(TEXT)
        assert [*ids, *exported_model.continuations([ids], 12, steering=[order])[0]] == theirs


@pytest.mark.parametrize(
    "layer",
    [
        {"experts": 24, "skip": True, "shared_expert": True},
        {"experts": 24, "sparsity": "l1"},
        {"experts": 24, "kind": "transcoder"},
        {"experts": 24, "kind": "skip_transcoder"},
        {"experts": 24, "kind": "dense_assisted"},
        {"kind": "dense_twin"},
    ],
    ids=["skip", "l1", "transcoder", "skip_transcoder", "dense_assisted", "dense_twin"],
)
def test_every_kind_of_layer_is_exported(models, text, tmp_path, layer):
    checkpoint = of_kind(models, text, tmp_path / "run", **layer)
    done = export_onnx(checkpoint, tmp_path / "out", expert_outputs=True, steering=True, data=text, tokens=512, quiet=True)
    assert done.failures == []
    exported_model, model = OnnxModel.from_pretrained(tmp_path / "out"), load_checkpoint(checkpoint)
    if layer.get("kind") == "dense_twin":
        assert not any(name.startswith("experts") for name in done.report["outputs"])
        return
    ids = exported_model.tokens(TEXT)
    found = exported_model.encode(ids)
    assert (found[0] if layer.get("sparsity") == "l1" else found[0][0]).shape == (
        len(ids),
        24 if layer.get("sparsity") == "l1" else 4,
    )
    with steer(model, layer=2, expert=4, add=3.0):
        theirs = logits_of(model, [ids])
    ours = exported_model.step(
        np.array([ids]), exported_model.empty_cache(1), steering=[{"layer": 2, "expert": 4, "add": 3.0}]
    ).logits
    assert np.abs(ours - theirs).max() <= 2e-5 * max(10.0, np.abs(theirs).max())


def test_a_preset_of_the_checkpoint_is_part_of_the_graph(converted, text, tmp_path):
    folder = shutil.copytree(converted["llama"], tmp_path / "copy")
    config = json.loads((folder / "config.json").read_text())
    orders = [{"layer": 0, "expert": 2, "scale": 3.0}, {"layer": 2, "expert": 1, "set": 2.0}]
    config["mxd"]["steering"] = orders
    (folder / "config.json").write_text(json.dumps(config))
    done = export_onnx(folder, tmp_path / "out", data=text, tokens=512, quiet=True)  # compared with the steered checkpoint
    assert done.failures == []
    ids = some_ids(load_checkpoint(folder), 1, 8)
    exported_model = OnnxModel.from_pretrained(tmp_path / "out")
    ours = exported_model.step(ids, exported_model.empty_cache(1)).logits
    assert np.abs(ours - logits_of(load_checkpoint(converted["llama"]), ids)).max() > 0.01


def test_long_prompts_pass_through_the_gate_in_chunks(tmp_path):
    """A layer needs memory for the gates and rows of a chunk, so it does not grow with the prompt."""
    script = """
import sys, numpy as np, onnxruntime
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
options.enable_cpu_mem_arena = False
session = onnxruntime.InferenceSession(sys.argv[1], options)
session.run(None, {"x": np.ones((1, 1, 16), dtype=np.float32)})
peak = lambda: int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
for tokens in (CHUNK, CHUNK * 16):
    before = peak()
    session.run(None, {"x": np.random.default_rng(0).standard_normal((1, tokens, 16)).astype(np.float32)})
    print((peak() - before) * 1024)
""".replace("CHUNK", str(CHUNK))
    experts = 16384
    path = tmp_path / "layer.onnx"
    onnx.save(one_layer(16, experts, 16, 8), path)
    done = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=True)
    one_chunk, sixteen = map(int, done.stdout.split())
    assert one_chunk >= CHUNK * experts * 4 / 2  # the gates of a chunk are there
    assert sixteen <= 2 * CHUNK * experts * 4  # an eighth of all gates


@pytest.mark.parametrize("tokens", [1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 7])
def test_the_chunked_gain_equals_the_product_in_float64(tokens, tmp_path):
    """This holds for tokens that fill the last chunk and for tokens that don't."""
    path = tmp_path / "layer.onnx"
    model = one_layer(12, 40, 10, 5)
    onnx.save(model, path)
    weights = {entry.name: onnx.numpy_helper.to_array(entry).astype(np.float64) for entry in model.graph.initializer}
    x = np.random.default_rng(1).standard_normal((2, tokens, 12)).astype(np.float32)
    gain, values, indices = onnxruntime.InferenceSession(path).run(None, {"x": x})
    gates = np.maximum(x.astype(np.float64) @ weights["gate"] + weights["bias"], 0.0)
    kept = np.where(gates >= np.sort(gates, -1)[..., -5:-4], gates, 0.0)
    assert np.abs(gain - kept @ weights["experts"]).max() <= 3e-5
    dense = np.zeros_like(kept)
    np.put_along_axis(dense, indices, values, -1)
    assert np.abs(dense - kept).max() <= 1e-5


def one_layer(d_in, n_experts, d_out, k):
    """Return a graph that computes only the gain."""
    import onnx_ir as ir

    from mxd_convert.onnx.sparse_gain import DOMAIN, NAME, spell_out

    random = np.random.default_rng(0)
    arrays = {
        "gate": random.standard_normal((d_in, n_experts)),
        "bias": random.standard_normal(n_experts),
        "experts": random.standard_normal((n_experts, d_out)),
    }
    values = [ir.Value(name=name, const_value=ir.tensor(array.astype(np.float32), name=name)) for name, array in arrays.items()]
    x = ir.Value(name="x", shape=ir.Shape(["B", "T", d_in]), type=ir.TensorType(ir.DataType.FLOAT))
    node = ir.node(NAME, [x, *values], {"k": [k]}, domain=DOMAIN, num_outputs=3)
    for output, name, kind in zip(node.outputs, ("gain", "values", "indices"), ("FLOAT", "FLOAT", "INT64"), strict=True):
        output.name, output.type = name, ir.TensorType(ir.DataType[kind])
    made = ir.Graph([x], node.outputs, nodes=[node], initializers=values, opset_imports={"": 20, DOMAIN: 1}, name="layer")
    return ir.serde.serialize_model(spell_out(ir.Model(made, ir_version=10), 20, torch.float32))


# --- precision, opset, large weights --------------------------------------------------------------------------------------------


def test_half_precision_and_eight_bits_are_exported(converted, text, tmp_path, monkeypatch):
    for name in ("fp16", "int8"):  # a random model has no margin between tokens; the bounds are for trained models
        monkeypatch.setitem(parity.TOLERANCES, name, {"delta_ce": 0.1, "argmax_agreement": 0.5})
    done = export_onnx(converted["gpt2"], tmp_path / "out", ["fp32", "fp16"], "int8", data=text, tokens=512, quiet=True)
    assert done.failures == []
    assert {file.name for file in (tmp_path / "out" / "onnx").iterdir()} == set(runtime.GRAPHS.values())
    no_word_of_the_machine(tmp_path / "out", converted["gpt2"])
    sizes = {dtype: graph["bytes"] for dtype, graph in done.report["graphs"].items()}
    assert sizes["fp16"] < 0.7 * sizes["fp32"]
    half = onnx.load(tmp_path / "out" / "onnx" / "model_fp16.onnx")
    types = {entry.name: entry.type.tensor_type.elem_type for entry in (*half.graph.input, *half.graph.output)}
    assert types["logits"] == onnx.TensorProto.FLOAT
    assert types["past_key_values.0.key"] == types["present.0.key"] == onnx.TensorProto.FLOAT16
    eight = onnx.load(tmp_path / "out" / "onnx" / "model_quantized.onnx")
    scan = next(node for node in eight.graph.node if node.op_type == "Scan")
    assert next(node.op_type for node in scan.attribute[0].g.node if "MatMul" in node.op_type) == "MatMulNBits"  # the gate
    named = {entry.name for entry in eight.graph.initializer}
    products = [node for node in eight.graph.node if node.op_type in ("MatMul", "Gemm") and node.input[1] in named]
    assert products == []  # every product with a weight
    for dtype in ("fp32", "fp16", "int8"):
        assert isinstance(OnnxModel.from_pretrained(tmp_path / "out", dtype=dtype).generate(TEXT, 4), str)
    for figures in (done.report["graphs"][dtype]["parity"] for dtype in ("fp16", "int8")):
        assert figures["delta_ce"] == pytest.approx(figures["ce"] - figures["ce_checkpoint"])
        assert 0 < figures["expert_overlap"] <= 1


@pytest.mark.parametrize("opset", [18, 22])
def test_other_opsets_are_exported(converted, text, tmp_path, opset):
    done = export_onnx(converted["gpt2"], tmp_path / "out", opset=opset, data=text, tokens=512, quiet=True)
    assert done.report["opset"] == opset
    model = onnx.load(tmp_path / "out" / "onnx" / "model.onnx")
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", opset)]


def test_large_weights_are_in_a_separate_file(converted, text, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "INLINE", 1000)
    export_onnx(converted["llama"], tmp_path / "out", quantized="int8", data=text, tokens=512, quiet=True)
    folder = tmp_path / "out" / "onnx"
    assert sorted(file.name for file in folder.iterdir()) == sorted(
        ["model.onnx", "model.onnx_data", "model_quantized.onnx", "model_quantized.onnx_data"]
    )
    report = json.loads((tmp_path / "out" / "onnx_report.json").read_text())
    assert set(report["graphs"]["fp32"]["sha256"]) == {"onnx/model.onnx", "onnx/model.onnx_data"}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["transformers.js_config"]["use_external_data_format"] == {"model.onnx": 1, "model_quantized.onnx": 1}
    moved = shutil.move(tmp_path / "out", tmp_path / "moved")
    assert OnnxModel.from_pretrained(moved).generate(TEXT, 4).startswith("Document 3")
