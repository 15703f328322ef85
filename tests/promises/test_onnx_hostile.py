"""`OnnxModel` refuses damaged and hostile folders with an InputError of one line that names the file and the value."""

import json
import shutil

import numpy as np
import onnx
import pytest
import yaml
from onnx import TensorProto, helper, numpy_helper
from project import QUICKSTART

from mxd_convert.errors import InputError
from mxd_convert.onnx import OnnxModel, validation
from mxd_convert.onnx.card import write_card
from mxd_convert.report.schema import parse_report

DEEP = "[" * 100_000
VOCABULARY, LOGITS, EXPERTS = 2048, 4, 6  # logits of the first few tokens only: a graph of a few kilobytes
LAYERS = {"0": {"kind": "mxd", "n_experts": EXPERTS, "k": 2}}


def graph_of(metadata=None, **changes):
    """Return the smallest graph with logits and one layer's coefficients, from two tables and without a cache."""
    ids, mask = (helper.make_tensor_value_info(name, TensorProto.INT64, ["B", "T"]) for name in ("input_ids", "attention_mask"))
    random = np.random.default_rng(0)
    tables = [
        numpy_helper.from_array(random.standard_normal((VOCABULARY, width)).astype(np.float32), name)
        for name, width in (("embedding", LOGITS), ("gates", EXPERTS))
    ]
    made = helper.make_graph(
        changes.get(
            "nodes", [helper.make_node("Gather", ["embedding", "input_ids"], ["logits"]), gather("gates", "experts.0.values")]
        ),
        "mxd",
        changes.get("inputs", [ids, mask]),
        changes.get("outputs", [floats("logits", LOGITS), floats("experts.0.values", EXPERTS)]),
        tables,
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    metadata = json.dumps(LAYERS) if metadata is None else metadata
    if metadata:
        model.metadata_props.add(key="mxd", value=metadata)
    return model


def gather(table, output, name="input_ids", **options):
    return helper.make_node("Gather", [table, name], [output], **options)


def floats(name, width, kind=TensorProto.FLOAT):
    return helper.make_tensor_value_info(name, kind, ["B", "T", width])


def outside(model, number=0, data=None, **entries):
    """Declare that the values of one tensor of a graph are in another file."""
    tensor = model.graph.initializer[number]
    if data is not None:
        data.write_bytes(tensor.raw_data)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=str(value))
    return model


def save(model, folder):
    (folder / "onnx" / "model.onnx").write_bytes(model.SerializeToString())  # onnx.save would write the data


@pytest.fixture
def folder(tmp_path):
    """Write a healthy folder."""
    model = tmp_path / "model"
    (model / "onnx").mkdir(parents=True)
    save(graph_of(), model)
    (model / "config.json").write_text(json.dumps({"vocab_size": VOCABULARY, "max_position_embeddings": 64, "eos_token_id": 0}))
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 5000]}))
    shutil.copyfile(QUICKSTART / "tokenizer.json", model / "tokenizer.json")
    return model


def used(folder):
    model = OnnxModel.from_pretrained(folder)
    assert model.encode("a b")[0].shape[1] == EXPERTS
    return model.generate("a b", max_new_tokens=2)


def refused(folder, *words):
    with pytest.raises(InputError) as caught:
        used(folder)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 1000
    for word in words:
        assert word in message, message


def test_a_healthy_folder_works(folder):
    assert used(folder)


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ("x", "not readable JSON"),
        (DEEP, "not readable JSON"),
        ("[1]", "holds a list"),
        ('{"a": {}}', "layer 'a'"),
        ('{"0": 5}', "layer 0 is 5"),
        ('{"0": {"kind": "mxd", "n_experts": "many"}}', "n_experts of layer 0 is 'many'"),
        ("{}", "experts.0.values"),
    ],
)
def test_bad_metadata_is_refused(folder, metadata, words):
    save(graph_of(metadata), folder)
    refused(folder, "model.onnx", words, "export the model again")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("config.json", DEEP, "nested too deeply"),
        ("config.json", "[1]", "holds a list"),
        ("config.json", '{"vocab_size": "many"}', "vocab_size is 'many'"),
        ("config.json", '{"max_position_embeddings": [4]}', "max_position_embeddings is [4]"),
        ("config.json", None, "can't be read"),
        ("generation_config.json", DEEP, "nested too deeply"),
        ("generation_config.json", "\x00", "not readable JSON"),
        *(
            ("generation_config.json", json.dumps({"eos_token_id": value}), "eos_token_id is")
            for value in ("x", -1, True, 1e30, 10**30, [[1]], {"a": 1})
        ),
        ("tokenizer.json", "{}", "not a readable tokenizer"),
        ("tokenizer.json", DEEP, "not a readable tokenizer"),
        ("tokenizer.json", '{"model": {"type": "WordLevel", "vocab": {}, "unk_token": "?"}}', "tokenizer.json"),
        ("onnx/model.onnx", "", "empty"),
        ("onnx/model.onnx", "hello world", "not a readable ONNX graph"),
    ],
)
def test_bad_files_are_refused(folder, name, content, words):
    (folder / name).unlink() if content is None else (folder / name).write_text(content)
    refused(folder, name, words)


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"location": "../../secret"}, "outside of the folder"),
        ({"location": "sub/../../../secret"}, "outside of the folder"),
        ({"location": "..\\secret"}, "outside of the folder"),
        ({"location": "/etc/passwd"}, "'/etc/passwd'"),
        ({"location": "*/_ORT_MEM_ADDR_/*", "offset": 4096}, "missing"),  # onnxruntime reads this as an address in memory
        ({"location": "none"}, "none: missing"),
        ({"location": "."}, "missing"),
        ({"location": ""}, "outside of the folder"),
        ({"length": 4}, "without a location"),
        ({"location": "model.onnx_data", "offset": 10**9}, "model.onnx_data"),
        ({"location": "model.onnx_data", "offset": -8}, "offset of a tensor's values is '-8'"),
        ({"location": "model.onnx_data", "length": 10**12}, "model.onnx_data"),
    ],
)
def test_values_in_a_file_elsewhere_are_refused(folder, entries, words):
    (folder.parent / "secret").write_bytes(bytes(VOCABULARY * EXPERTS * 4))
    save(outside(graph_of(), 1, folder / "onnx" / "model.onnx_data", **entries), folder)
    refused(folder, words)


def test_values_in_another_file_of_the_folder_are_read(folder):
    data = folder / "onnx" / "model.onnx_data"
    expected = used(folder)
    save(outside(graph_of(), 0, data, location=data.name, offset=0, length=VOCABULARY * LOGITS * 4), folder)
    assert used(folder) == expected
    data.write_bytes(data.read_bytes()[:-1])
    refused(folder, "model.onnx_data: 32,767 bytes", "embedding")


def test_values_of_a_nested_constant_in_a_file_elsewhere_are_refused(folder):
    """A tensor is refused at any depth of nested graphs."""
    model = outside(graph_of(), 1, location="../secret")
    hidden = helper.make_graph([helper.make_node("Constant", [], ["c"], value=model.graph.initializer[1])], "inner", [], [])
    for _ in range(2):
        hidden = helper.make_graph(
            [helper.make_node("If", ["x"], ["y"], then_branch=hidden, else_branch=hidden)], "outer", [], []
        )
    model = graph_of()
    model.graph.node.extend(hidden.node)
    save(model, folder)
    refused(folder, "'../secret'", "outside of the folder")


def test_links_out_of_the_folder_are_refused(folder):
    for name in ("model.onnx", "model.onnx_data"):
        save(outside(graph_of(), 0, folder / "onnx" / "model.onnx_data", location="model.onnx_data"), folder)
        used(folder)
        path, target = folder / "onnx" / name, folder.parent / f"real-{name}"
        shutil.move(path, target)
        path.symlink_to(target)
        refused(folder, str(path), "symbolic link")
        path.unlink()
        shutil.move(target, path)


def test_a_graph_of_another_format_is_refused(folder, capfd):
    logits, experts = floats("logits", LOGITS), floats("experts.0.values", EXPERTS)
    ids = helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["B", "T"])
    mask = helper.make_tensor_value_info("attention_mask", TensorProto.INT64, ["B", "T"])
    past = helper.make_tensor_value_info("past_key_values.0.key", TensorProto.FLOAT, ["B", "H", "P", "D"])
    nodes = [gather("embedding", "logits"), gather("gates", "experts.0.values")]
    for changes, word in (
        ({"metadata": False}, "has no 'mxd'"),
        ({"inputs": [ids, mask, floats("x", 3)]}, "input 'x'"),
        ({"inputs": [ids]}, "no input attention_mask"),
        ({"inputs": [ids, mask, past]}, "no output present.0.key"),
        ({"outputs": [experts]}, "no output logits"),
        ({"outputs": [logits, experts, floats("secret", 3)], "nodes": [*nodes, gather("gates", "secret")]}, "output 'secret'"),
        ({"nodes": [gather("embedding", "logits"), gather("gates", "experts.0.values", domain="evil")]}, "evil"),
        ({"nodes": [helper.make_node("Explode", ["input_ids"], ["logits"]), nodes[1]]}, "Explode"),
        ({"nodes": [helper.make_node("Cast", ["input_ids"], ["logits"], to=1), nodes[1]]}, "output logits has shape"),
    ):
        save(graph_of(**changes), folder)
        refused(folder, "model.onnx", word)
    assert capfd.readouterr() == ("", "")  # messages of onnxruntime quote the graph, control characters included


def test_running_out_of_memory_is_a_one_line_error(folder, monkeypatch):
    class Full:
        def run_with_ort_values(self, *_):
            raise Exception("[ONNXRuntimeError] : 1 : FAIL : std::bad_alloc")

    model = OnnxModel.from_pretrained(folder)
    monkeypatch.setattr(model, "session", Full())
    with pytest.raises(InputError, match="out of memory in onnxruntime"):
        model.generate("a", 1)


def test_the_checked_fields_are_all_fields_of_onnx():
    """The fields that can hold a tensor have these numbers and kinds; no other message of ONNX leads to one."""
    kinds = {
        "ModelProto": "model",
        "TrainingInfoProto": "training",
        "GraphProto": "graph",
        "FunctionProto": "function",
        "NodeProto": "node",
        "AttributeProto": "attribute",
        "SparseTensorProto": "sparse",
        "TensorProto": "tensor",
    }
    messages = onnx.onnx_ml_pb2.DESCRIPTOR.message_types_by_name
    for name, kind in kinds.items():
        leading = {
            field.number: kinds[field.message_type.name]
            for field in messages[name].fields
            if field.message_type is not None and field.message_type.name in kinds
        }
        assert leading == validation._INSIDE.get(kind, {}), name
    fields = messages["TensorProto"].fields_by_name
    assert (fields["name"].number, fields["external_data"].number) == (validation._TENSOR_NAME, validation._TENSOR_EXTERNAL)


def test_text_of_the_checkpoint_is_literal_in_the_card(tmp_path):
    evil = "x\n# Heading\n<script>`[a](javascript:b)`</script>\x1b[31m\n---\nlicense: mit"
    greedy = {"equal": 1, "prompts": 1}
    figures = dict.fromkeys(("largest_difference", "kl", "argmax_agreement", "expert_agreement", "expert_overlap"), 1.0)
    figures |= {"delta_ce": 0.0, "greedy": greedy, "tokens": 1, "ce_checkpoint": 1.0}
    report = {
        "base": {"model": evil, "local": False},
        "checkpoint": evil,
        "model_type": evil,
        "opset": 20,
        "outputs": [],
        "data": {"path": evil, "tokens": 1},
        "graphs": {"fp32": {"file": "onnx/model.onnx", "bytes": 1, "parity": figures}},
    }
    conversion = {
        "base": {"model": evil, "license": evil, "license_link": "javascript:x", "language": [evil, 3]},
        "fidelity": {
            "ce_converted": 1.0,
            "ce_base": 1.0,
            "tokens": 1,
            "delta_ce": 0.0,
            "kl": 0.0,
            "top1_agreement": 1.0,
            "layers": {"0": {}},
        },
        "reliance": {"layers": {}, "verdict": evil, "sentence": evil},
    }
    write_card(tmp_path, report, parse_report(conversion, tmp_path))
    _, metadata, text = (tmp_path / "README.md").read_text().split("---\n", maxsplit=2)
    found = yaml.safe_load(metadata)
    assert found["license"].startswith("x # Heading")
    assert not {"base_model", "license_link"} & found.keys()
    assert "<script>" not in text
    assert "[a](" not in text
    assert "\x1b" not in text
    assert [line for line in text.splitlines() if line.startswith("#")][1:] == [
        "## Against the checkpoint in PyTorch (float32)",
        "## Running it",
    ]
