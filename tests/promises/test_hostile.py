"""Code in checkpoints of strangers does not run, their links are not followed, and their faults are one-line errors."""

import contextvars
import json
import os
import threading
import time
from pathlib import Path

import pytest
import torch
from project import QUICKSTART
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

import mxd_convert
from mxd_convert.base_model.checks import check_config
from mxd_convert.base_model.load import load_config
from mxd_convert.checkpoint import verify as verification
from mxd_convert.checkpoint.fresh_process import differ
from mxd_convert.checkpoint.read import load_checkpoint
from mxd_convert.errors import InputError
from mxd_convert.recipe.load import load_recipe
from mxd_convert.recipe.schema import Base


def edit(path: Path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


# --- code ------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def trap(copy, tmp_path):
    """Return a checkpoint with code in every file that transformers may import, and the file that this code would write."""
    mark = tmp_path / "owned"
    evil = f"open({str(mark)!r}, 'w')\n"
    for name in ("plots/evil.py", "custom_generate/generate.py", "tokenization_evil.py"):
        (copy / name).parent.mkdir(exist_ok=True)
        (copy / name).write_text(evil + "class X: pass\ndef generate(model, *a, **k): pass\n")
    classes = {"AutoConfig": "plots/evil.X", "AutoModel": f"{copy}/plots--evil.X", "AutoModelForCausalLM": "plots/evil.X"}
    edit(copy / "config.json", lambda config: config["auto_map"].update(classes))
    tokenizer = {"auto_map": {"AutoTokenizer": [None, "tokenization_evil.X"]}}
    edit(copy / "tokenizer_config.json", lambda config: config.update(tokenizer))
    return copy, mark


def test_verify_runs_no_code_of_the_checkpoint_and_passes_no_token(trap, monkeypatch):
    folder, mark = trap
    seen = []
    run = verification.subprocess.run

    def watched(command, env, **options):
        seen.append(env)
        request = json.loads(Path(command[-1]).read_text())
        files = sorted(path.relative_to(request["checkpoint"]).as_posix() for path in Path(request["checkpoint"]).rglob("*.py"))
        assert files == ["configuration_mxd.py", "layers_mxd.py", "modeling_mxd.py", "steering_mxd.py"]
        return run(command, env=env, **options)

    monkeypatch.setattr(verification.subprocess, "run", watched)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "AWS_SECRET_ACCESS_KEY", "OPENAI_API_KEY"):
        monkeypatch.setenv(name, "hf_secret")
    found = mxd_convert.verify(folder)
    assert not mark.exists()
    assert any(check.ok is None and "tokenization_evil.py is not this package's own" in check.detail for check in found.checks)
    assert all(check.ok is not False for check in found.checks)
    assert seen
    assert not any("hf_secret" in value for env in seen for value in env.values())


def test_no_other_command_runs_code_of_the_checkpoint(trap, mxd):
    folder, mark = trap
    for arguments in (("generate", folder, "--prompt", "a"), ("inspect", folder, "--prompt", "a"), ("label", folder)):
        mxd(*arguments)
        assert not mark.exists()
    edit(folder / "tokenizer_config.json", lambda config: config.update(tokenizer_class="X"))
    status, _, err = mxd("generate", folder, "--prompt", "a")
    assert status == 2
    assert "--trust-remote-code" in err
    assert not mark.exists()


def test_a_config_can_not_name_a_remote_kernel():
    check_config({"attn_implementation": "sdpa", "vocab_size": 8, "pad_token_id": -1}, "config.json")
    for content in ({"attn_implementation": "owner/kernel"}, {"text_config": {"_attn_implementation": "owner/kernel:fn"}}):
        with pytest.raises(InputError, match="code from elsewhere"):
            check_config(content, "config.json")
        check_config(content, "config.json", trusted=True)


# --- links, adapters, pointers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["notes.txt", "README.md", "plots/more.png", "mxd_labels.json"])
def test_links_out_of_the_folder_are_refused_by_every_command(copy, refused, tmp_path, text, where):
    (tmp_path / "id_rsa").write_text("PRIVATE")
    (copy / where).unlink(missing_ok=True)
    (copy / where).symlink_to(tmp_path / "id_rsa")
    for arguments in (
        ("generate", copy, "--prompt", "a"),
        ("label", copy, "0:1", "text", "--author", "me"),
        ("delta", copy, tmp_path / "delta"),
        ("eval", copy, "--data", text, "--record"),
        ("verify", copy),
        ("edit", copy, "--ablate", "0:1", "--output", tmp_path / "edited"),
        ("export-onnx", copy, tmp_path / "onnx"),
    ):
        refused(*arguments, words=(Path(where).name, "symbolic link", "id_rsa"))
    assert (tmp_path / "id_rsa").read_text() == "PRIVATE"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy", "id_rsa"]


def test_links_in_a_delta_are_refused(copy, tmp_path, refused, mxd):
    assert mxd("delta", copy, tmp_path / "delta")[0] == 0
    (tmp_path / "key").write_text("PRIVATE")
    (tmp_path / "delta" / "full" / "notes.txt").symlink_to(tmp_path / "key")
    refused("apply", tmp_path / "delta", tmp_path / "out", words=("notes.txt", "symbolic link"))


def test_adapters_are_refused_in_checkpoints_and_bases(copy, models, refused, recipe, tmp_path):
    (copy / "adapter_config.json").write_text("{}")
    refused("generate", copy, "--prompt", "a", words=("adapter_config.json", "merge"))
    base = tmp_path / "base"
    base.mkdir()
    for file in models["gpt2"].iterdir():
        (base / file.name).write_bytes(file.read_bytes())
    (base / "adapter_config.json").write_text("{}")
    refused("plan", recipe(base={"model": str(base)}), words=("adapter_config.json", "merge"))


def test_weights_are_the_files_that_transformers_reads_inside_the_folder(copy, refused, mxd, tmp_path):
    whole = copy / "model.safetensors"
    names = list(load_file(whole))
    index = copy / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, "gone.safetensors")}))
    assert mxd("generate", copy, "--prompt", "a", "--max-new-tokens", 1)[0] == 0  # as from_pretrained: the index is stale
    (copy / "part").mkdir()
    whole.rename(copy / "part" / "w.safetensors")
    index.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, "part/w.safetensors")}))
    assert mxd("delta", copy, tmp_path / "delta")[0] == 0
    assert mxd("apply", tmp_path / "delta", tmp_path / "again")[0] == 0
    assert (tmp_path / "again" / "part" / "w.safetensors").read_bytes() == (copy / "part" / "w.safetensors").read_bytes()
    (copy / "part" / "w.safetensors").rename(tmp_path / "elsewhere.safetensors")
    index.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, "../elsewhere.safetensors")}))
    refused("generate", copy, "--prompt", "a", words=("weight_map", "../elsewhere.safetensors", "outside"))
    index.unlink()
    whole.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
    refused("generate", copy, "--prompt", "a", words=("model.safetensors", "Git LFS pointer", "git lfs pull"))


# --- configs and side files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c["mxd"].update(mlp=c["mxd"]["mlp"] + "{i:>2000000000}"), ("mxd.mlp", "expected a module path")),
        (lambda c: c.update(num_hidden_layers=50_000), ("50000 layers", "tensors")),
        (lambda c: c.update(num_hidden_layers=10**7), ("num_hidden_layers", "more than the limit")),
        (lambda c: c.update(num_labels=10**8), ("num_labels", "more than the limit")),
        (lambda c: c.update(num_attention_heads=0), ("config.json", "ZeroDivisionError")),
        (lambda c: c["mxd"]["layers"]["0"].update(k=True), ("mxd.layers.0.k", "True")),
        (lambda c: c["mxd"]["layers"]["0"].update(n_experts=10**20), ("mxd.layers.0.n_experts",)),
        (lambda c: c["mxd"]["layers"]["0"].update(activation=3), ("mxd.layers.0.activation", "3")),
        (lambda c: c.update(pad_token_id=c["vocab_size"]), ("pad_token_id", "vocab_size")),
        (lambda c: c.update(architectures=3), ("architectures", "3")),
        (lambda c: c.update(attn_implementation="a/b"), ("attn_implementation", "code from elsewhere")),
    ],
    ids=["width", "layers", "many layers", "labels", "heads", "k", "experts", "activation", "pad", "class", "kernel"],
)
def test_a_hostile_config_is_refused_quickly(copy, refused, change, words):
    edit(copy / "config.json", change)
    start = time.monotonic()
    refused("generate", copy, "--prompt", "a", words=words)
    assert time.monotonic() - start < 45


ALIASES = "a: &a {k: 1}\n" + "\n".join(
    f"{chr(98 + n)}: &{chr(98 + n)} {{{', '.join(f'x{j}: *{chr(97 + n)}' for j in range(10))}}}" for n in range(9)
)


@pytest.mark.parametrize(
    ("name", "content", "command"),
    [
        ("recipe.yaml", ALIASES, "compare"),
        ("recipe.yaml", "[" * 5000, "compare"),
        ("recipe.yaml", "a: !x 1", "edit"),
        ("recipe.yaml", "data: {context: 0}", "eval"),
        ("recipe.yaml", "data: {context: .inf}", "eval"),
        ("recipe.yaml", "data: [1]", "eval"),
        ("mxd_report.json", "{", "edit"),
        ("mxd_report.json", "[" * 100_000, "compare"),
        ("mxd_report.json", '{"base": {"model": 3}}', "delta"),
        ("mxd_labels.json", "{", "inspect"),
        ("mxd_labels.json", '[{"layer": true}]', "label"),
        ("tokenizer.json", '{"version": "1.0", "added_tokens": [{"id": "x"}]}', "generate"),
        ("generation_config.json", '{"bos_token_id": "x", "num_beams": "many"}', "generate"),
        ("config.json", "[" * 100_000, "generate"),
    ],
)
def test_a_damaged_side_file_is_named(copy, converted, refused, text, tmp_path, name, content, command):
    (copy / name).write_text(content)
    rest = {
        "compare": (copy, converted["llama"]),
        "edit": (copy, "--ablate", "0:1", "--output", tmp_path / "out"),
        "eval": (copy, "--data", text, "--tokens", 64),
        "delta": (copy, tmp_path / "out"),
        "inspect": (copy, "--prompt", "a"),
        "generate": (copy, "--prompt", "a", "--max-new-tokens", 1),
        "label": (copy,),
    }
    refused(command, *rest[command], words=(str(copy) if name == "tokenizer.json" or "generation" in name else name,))
    assert not (tmp_path / "out").exists()


def test_weights_with_nan_never_reach_the_json(copy, refused, mxd, text):
    weights = load_file(copy / "model.safetensors")
    name = next(name for name in weights if name.endswith("experts"))
    weights[name][3] = float("nan")
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    refused("generate", copy, "--prompt", "a", "--temperature", 1, words=(name, "not finite"))
    for arguments in (("inspect", copy, "--prompt", "a"), ("eval", copy, "--data", text, "--tokens", 64)):
        status, out, err = mxd(*arguments, "--json")
        assert status == 0, err
        json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_the_card_of_a_base_is_read_as_text(models, tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    for file in models["gpt2"].iterdir():
        (base / file.name).write_bytes(file.read_bytes())
    from mxd_convert.base_model.load import card_of

    (base / "README.md").write_text("---\nlicense: mit\nlanguage:\n- en\n- no\nlicense_name: 2024-01-01\n---\n# A model\n")
    assert card_of(Base(model=str(base))) == {"license": "mit", "language": ["en", "no"], "license_name": "2024-01-01"}
    (base / "README.md").write_text("---\nlicense: [mit]\nlanguage: {a: 1}\n---\n")
    assert card_of(Base(model=str(base))) == {}


def test_a_folder_named_like_a_model_on_the_hub_is_local(monkeypatch, tmp_path):
    (tmp_path / "org" / "tiny").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"org/tiny: names both a model on the Hub and a path in the working directory"):
        load_config(Base(model="org/tiny"))
    (tmp_path / "recipes").mkdir()
    for section in ("base: {model: org/tiny}", "base: {model: a/b}\ndata: {train: {path: org/tiny}}"):
        (tmp_path / "recipes" / "r.yaml").write_text(section)
        with pytest.raises(InputError, match=r"org/tiny: names something on the Hub, and .* in the working directory too"):
            load_recipe("recipes/r.yaml")


# --- healthy folders ---------------------------------------------------------------------------------------------------------------


def made_run(gates, logits=None):
    """Make a run over one row of tokens from the (T, N) gates of one layer with two active experts."""
    top = gates.topk(3)
    chosen = top.indices[:, :2].where(top.values[:, :2] > 0, -1)
    run = {"values": top.values, "indices": top.indices, "chosen": chosen}
    return {"logits": torch.zeros(1, len(gates), 4) if logits is None else logits, **{f"0.{key}": run[key][None] for key in run}}


def test_only_a_tie_that_falls_the_other_way_is_excused():
    gates = torch.tensor([[3.0, 2.0, 1.0, 0.5]] * 4)
    gates[2, 2] = 2.0 - 1e-6  # expert 2 ties with expert 1
    other = gates.clone()
    other[2, 2] = 2.0 + 1e-6
    moved = torch.zeros(1, 4, 4)
    moved[0, 2:] = 2.3e-4
    assert differ(made_run(gates), made_run(gates)) is None
    assert differ(made_run(gates), made_run(other, moved)) is None
    assert "differ by 2.3e-04" in differ(made_run(gates), made_run(gates, moved))  # nothing was near a tie
    early = moved.clone()
    early[0, 1] = 1.0
    assert "differ by 1.0e+00" in differ(made_run(gates), made_run(other, early))  # before the tie
    far = gates.clone()
    far[2, 2] = 2.5
    assert "differ by" in differ(made_run(gates), made_run(far, moved))
    assert "differ by inf" in differ(made_run(gates), made_run(gates, torch.full((1, 4, 4), float("nan"))))


def test_a_model_built_from_its_config_is_initialised(converted):
    for family in ("gpt2", "llama"):
        config = load_checkpoint(converted[family]).config
        model_class = type(load_checkpoint(converted[family]))
        torch.manual_seed(0)
        for layer in model_class(config).mxd_layers().values():
            assert layer.output_bias.abs().max() == 0
            assert 0.5 < layer.experts.std() * layer.d_out**0.5 < 1.5


# --- threads -----------------------------------------------------------------------------------------------------------------------


def test_each_thread_steers_independently(converted):
    model = load_checkpoint(converted["gpt2"])
    ids = AutoTokenizer.from_pretrained(QUICKSTART)("The value is returned when", return_tensors="pt")["input_ids"]

    def write(n: int):
        with mxd_convert.steer(model, layer=0, expert=n, add=30.0, positions=("all", "generation")[n % 2]):
            return model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0).tolist()

    plain = model(input_ids=ids).logits
    alone, found = [write(n) for n in range(4)], {}
    threads = [threading.Thread(target=lambda n=n: found.__setitem__(n, write(n))) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[n] for n in range(4)] == alone
    assert len({str(ids) for ids in alone}) > 1
    assert torch.equal(model(input_ids=ids).logits, plain)
    assert not any(layer.contexts for layer in model.mxd_layers().values())


def test_a_thread_without_steering_of_its_own_is_refused(converted):
    model = load_checkpoint(converted["gpt2"])
    ids, found = torch.tensor([[1, 2, 3]]), {}

    def run(name, context=None):
        try:
            with context or mxd_convert.steered(model, []):
                found[name] = model(input_ids=ids).logits
        except ValueError as error:
            found[name] = str(error)

    def silent():
        try:
            found["silent"] = model(input_ids=ids).logits
        except ValueError as error:
            found["silent"] = str(error)

    plain = model(input_ids=ids).logits
    with mxd_convert.steer(model, layer=0, expert=1, add=50.0):
        for target in (silent, lambda: run("plain")):
            thread = threading.Thread(target=target)
            thread.start()
            thread.join()
    assert "steered in another thread" in found["silent"]
    assert torch.equal(found["plain"], plain)


def test_a_thread_that_inherits_a_context_keeps_it(converted):
    model, ids, found = load_checkpoint(converted["gpt2"]), torch.tensor([[1, 2, 3]]), {}
    left = threading.Event()

    def late():
        left.wait()  # until the thread that opened the context leaves it
        found["inherited"] = model(input_ids=ids).logits

    with mxd_convert.steer(model, layer=0, expert=1, add=50.0):
        steered = model(input_ids=ids).logits
        thread = threading.Thread(target=contextvars.copy_context().run, args=(late,))
        thread.start()
    left.set()
    thread.join()
    assert torch.equal(found["inherited"], steered)
    assert not torch.equal(model(input_ids=ids).logits, steered)


def test_steering_reaches_the_copy_that_peft_trains(converted):
    peft = pytest.importorskip("peft")
    model, ids = load_checkpoint(converted["llama"]), torch.tensor([[1, 2, 3]])

    def moved(model):
        plain = model(input_ids=ids).logits
        with mxd_convert.steer(model, layer=0, expert=3, add=50.0):
            return (model(input_ids=ids).logits - plain).abs().max().item()

    before = moved(model)
    settings = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["mlp"], task_type="CAUSAL_LM")
    assert before > 1e-3
    assert moved(peft.get_peft_model(model, settings).eval()) == pytest.approx(before, abs=1e-4)


def test_the_environment_of_a_fresh_process_drops_only_secrets(tmp_path, monkeypatch):
    monkeypatch.setenv("MXD_PLAIN", "kept")
    environment = verification.clean_environment(tmp_path)
    assert environment["MXD_PLAIN"] == "kept"
    assert environment["PATH"] == os.environ["PATH"]
    assert environment["OMP_NUM_THREADS"] == "1"
