"""accelerate's tools for models larger than memory work on converted models: empty weights, offloading, device maps, tied weights.

accelerate's own tests use toy models with fixed module names and sizes; these tests check the same of ours.
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
    """Return a device map with every module on the CPU that has parameters or buffers of its own."""
    names = [name for name, _ in [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]]
    return {name.rpartition(".")[0]: "cpu" for name in names}


def on_disk(devices, *paths):
    """Return the same map with whole modules on the disk."""
    within = tuple(f"{path}." for path in paths)
    return {name: device for name, device in devices.items() if not f"{name}.".startswith(within)} | dict.fromkeys(paths, "disk")


def offloaded(model):
    return [name for name, parameter in model.named_parameters() if parameter.device.type == "meta"]


def steers_as(family, model):
    """Return whether steering changes the logits as it does in a model that is whole in memory."""
    whole = make(family)
    for one in (whole, model):
        one.set_steering(STEERING)
    steered = logits(whole)
    assert not steered.equal(expected(family))
    return logits(model).equal(steered)


def test_offloading_to_cpu_and_disk_keeps_the_logits(family, tmp_path):
    """Weights are loaded for each module's forward, including the experts; without the hooks, the model is as before."""
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


def test_offloading_between_models_keeps_the_logits(family):
    """A model is moved for its own forward, as a whole."""
    model, hook = cpu_offload_with_hook(make(family), execution_device=torch.device("cpu"))
    assert logits(model).equal(expected(family))
    hook.offload()
    assert not offloaded(model)


def test_dispatch_splits_a_model_between_layers_and_within_one(family, tmp_path):
    """The device map names one decoder layer, and only the MLP of another."""
    model = make(family)
    devices = on_disk(parts(model), layer_path(family, 0), ARCHITECTURES[family].path.format(i=1))
    dispatch_model(model, devices, main_device="cpu", offload_dir=tmp_path, force_hooks=True)
    assert {name for name in offloaded(model) if name.endswith(".experts")} == {
        f"{ARCHITECTURES[family].path.format(i=index)}.experts" for index in (0, 1)
    }
    assert logits(model).equal(expected(family))
    assert steers_as(family, model)


def test_inferred_device_maps_keep_decoder_layers_whole(family, tmp_path):
    """Sizes include the experts, decoder layers are never split, and the logits are the same."""
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


def test_empty_weights_load_from_a_checkpoint(family, tmp_path):
    """A model built without memory is filled from a sharded checkpoint, also with a part on the disk."""
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


def test_tied_weights_stay_tied(family):
    """Weights tied in the base are tied in the converted model, and stay tied through a device map."""
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
