"""accelerate's tools for models larger than memory, on converted models: empty weights, offloading, device maps, tied weights.

accelerate's own tests of them are about toy models of theirs, whose module names and sizes they hold; these ask the same of ours.
`from_pretrained(device_map=...)` is in tests/support/conformance.py.
"""

from functools import cache

import pytest
import torch
from accelerate import (
    cpu_offload,
    cpu_offload_with_hook,
    disk_offload,
    dispatch_model,
    infer_auto_device_map,
    init_empty_weights,
    load_checkpoint_and_dispatch,
    load_checkpoint_in_model,
)
from accelerate.hooks import remove_hook_from_submodules
from accelerate.utils import compute_module_sizes, find_tied_parameters, retie_parameters
from mixtures import mixture_of
from tiny_models import VOCABULARY, tiny_model

from mxd_convert.base_model.families import ARCHITECTURES

FAMILIES = ("llama", "gpt2", "gpt_neox", "opt", "bloom", "gemma3_text")
IDS = torch.randint(1, VOCABULARY, (2, 16), generator=torch.Generator().manual_seed(5))
STEERING = [{"layer": 1, "expert": 3, "add": 2.0}]

pytestmark = pytest.mark.parametrize("family", FAMILIES)


def make(family):
    return mixture_of(tiny_model(family))


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS, use_cache=False).logits


@cache
def expected(family):
    return logits(make(family))


def layer_path(family, index):
    return ARCHITECTURES[family].layer.format(i=index)


def parts(model):
    """All of it on the CPU, by modules that have parameters or buffers of their own."""
    names = [name for name, _ in [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]]
    return {name.rpartition(".")[0]: "cpu" for name in names}


def on_disk(devices, *paths):
    """The same map, with whole modules on the disk."""
    within = tuple(f"{path}." for path in paths)
    return {name: device for name, device in devices.items() if not f"{name}.".startswith(within)} | dict.fromkeys(paths, "disk")


def offloaded(model):
    return [name for name, parameter in model.named_parameters() if parameter.device.type == "meta"]


def steers_as(family, model):
    """Whether steering changes the logits of this model as it changes those of one that is whole in memory."""
    whole = make(family)
    for one in (whole, model):
        one.set_steering(STEERING)
    steered = logits(whole)
    assert not steered.equal(expected(family))
    return logits(model).equal(steered)


def test_cpu_and_disk_offload(family, tmp_path):
    """Every module's weights come for its forward alone, a layer's experts included; with the hooks off, the model is as before."""
    model = make(family)
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert any(name.endswith(".experts") for name in offloaded(model))
    assert logits(model).equal(expected(family))
    remove_hook_from_submodules(model)

    model = make(family)
    disk_offload(model, tmp_path, execution_device=torch.device("cpu"))
    assert len(offloaded(model)) == len(list(model.named_parameters()))
    assert logits(model).equal(expected(family))
    assert steers_as(family, model)


def test_offload_between_models(family):
    """A model is moved for its own forward, and stays whole."""
    model, hook = cpu_offload_with_hook(make(family), execution_device=torch.device("cpu"))
    assert logits(model).equal(expected(family))
    hook.offload()
    assert not offloaded(model)


def test_dispatch_splits_between_layers_and_within_one(family, tmp_path):
    """By a map that names one decoder layer, and of another the MLP's place alone."""
    model = make(family)
    devices = on_disk(parts(model), layer_path(family, 0), ARCHITECTURES[family].path.format(i=1))
    dispatch_model(model, devices, main_device="cpu", offload_dir=tmp_path, force_hooks=True)
    assert {name for name in offloaded(model) if name.endswith(".experts")} == {
        f"{ARCHITECTURES[family].path.format(i=index)}.experts" for index in (0, 1)
    }
    assert logits(model).equal(expected(family))
    assert steers_as(family, model)


def test_inferred_device_maps(family, tmp_path):
    """Sizes count the experts; decoder layers are never split; the logits are the same."""
    model = make(family)
    sizes = compute_module_sizes(model)
    path = ARCHITECTURES[family].path.format(i=0)
    layer = model.mxd_layers()[0]
    assert sizes[path] == 4 * sum(parameter.numel() for parameter in layer.parameters())
    assert sizes[f"{path}.experts"] == 4 * layer.experts.numel()

    room = sizes[""] - sizes[layer_path(family, 1)] // 2
    devices = infer_auto_device_map(
        model, max_memory={"cpu": room, "disk": sizes[""]}, no_split_module_classes=model._no_split_modules
    )
    assert set(devices.values()) == {"cpu", "disk"}
    assert not any(name.startswith(f"{layer_path(family, index)}.") for name in devices for index in (0, 1))
    dispatch_model(model, devices, main_device="cpu", offload_dir=tmp_path, force_hooks=True)
    assert offloaded(model)
    assert logits(model).equal(expected(family))


def test_empty_weights_and_loading(family, tmp_path):
    """Built without memory, then filled from a checkpoint in shards; with a part left on the disk."""
    model = make(family)
    model.save_pretrained(tmp_path, max_shard_size=30_000)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    with init_empty_weights():
        empty = type(model)(model.config)
    assert all(parameter.device.type == "meta" for parameter in empty.parameters())
    empty.tie_weights()
    load_checkpoint_in_model(empty, tmp_path, device_map={"": "cpu"})
    retie_parameters(empty, find_tied_parameters(model))
    assert logits(empty.eval()).equal(expected(family))

    with init_empty_weights():
        empty = type(model)(model.config)
    empty.tie_weights()
    last = layer_path(family, 1)
    devices = on_disk(parts(empty), last)
    spread = load_checkpoint_and_dispatch(
        empty, str(tmp_path), device_map=devices, offload_folder=str(tmp_path / "disk"), force_hooks=True
    )
    assert {name for name in offloaded(spread) if name.endswith(".experts")} == {
        f"{ARCHITECTURES[family].path.format(i=1)}.experts"
    }
    assert logits(spread.eval()).equal(expected(family))


def test_tied_weights(family):
    """What is tied in the base is tied in the mixture, and stays so through a device map."""
    base = tiny_model(family)
    model = mixture_of(base)
    ties = [sorted(group) for group in find_tied_parameters(model)]
    assert ties == [sorted(group) for group in find_tied_parameters(base)]
    assert bool(ties) == model.config.tie_word_embeddings
    sizes = compute_module_sizes(model)
    devices = infer_auto_device_map(
        model, max_memory={"cpu": sizes[""], "disk": sizes[""]}, no_split_module_classes=model._no_split_modules
    )
    assert set(devices.values()) == {"cpu"}
    dispatch_model(model, devices, main_device="cpu", force_hooks=True)
    for group in ties:
        assert len({model.get_parameter(name).data_ptr() for name in group}) == 1
    assert logits(model).equal(expected(family))
