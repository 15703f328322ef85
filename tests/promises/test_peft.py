"""PEFT's LoRA on the experts, a Parameter of its own: `target_parameters`. PEFT's own tests of it are run by tests/hf."""

import pytest
import torch
from mixtures import mixture_of
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import VOCABULARY, tiny_model

from mxd_convert.base_model.families import ARCHITECTURES

FAMILIES = ("llama", "gpt2", "gpt_neox", "opt", "bloom")
IDS = torch.randint(1, VOCABULARY, (2, 16), generator=torch.Generator().manual_seed(4))


def adapt(family, rank=4):
    model = mixture_of(tiny_model(family))
    name = ARCHITECTURES[family].path.rpartition("{i}.")[2]
    config = LoraConfig(r=rank, lora_alpha=8, target_modules=[], target_parameters=[f"{name}.experts"], task_type="CAUSAL_LM")
    return get_peft_model(model, config)


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=IDS).logits


def train(model, steps=3):
    model.eval()  # no dropout, so that the loss falls from step to step
    optimizer = torch.optim.Adam([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.05)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        losses.append(loss.item())
        trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
        optimizer.step()
        optimizer.zero_grad()
    return losses, trained


@pytest.mark.parametrize("family", FAMILIES)
def test_lora_on_the_experts_trains_saves_and_merges(family, tmp_path):
    """The adapter alone has gradients; after training, saving, loading and merging, the logits are the same."""
    adapted = adapt(family)
    before = logits(adapted)
    experts = [layer.experts.clone() for layer in adapted.get_base_model().mxd_layers().values()]
    losses, trained = train(adapted)
    assert losses[-1] < losses[0]
    assert len(trained) == 2 * len(experts)
    assert all(".lora_" in name for name in trained)
    after = logits(adapted)
    assert (after - before).abs().max() > 1e-2

    adapted.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(mixture_of(tiny_model(family)), tmp_path)
    assert logits(again).equal(after)
    with again.disable_adapter():
        assert logits(again).equal(before)

    merged = again.merge_and_unload()
    assert (logits(merged) - after).abs().max() <= 1e-5 * max(1.0, after.abs().max().item())
    assert all(not layer.experts.equal(old) for layer, old in zip(merged.mxd_layers().values(), experts, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_steering_uses_the_adapted_experts(family):
    """A steered coefficient adds the expert's adapted row, as it does after merging."""
    adapted = adapt(family)
    train(adapted)
    orders = [{"layer": 1, "expert": 3, "add": 2.0}]
    plain = logits(adapted)
    adapted.get_base_model().set_steering(orders)
    steered = logits(adapted)
    assert (steered - plain).abs().max() > 1e-2
    merged = adapted.merge_and_unload()
    assert (logits(merged) - steered).abs().max() <= 1e-5 * max(1.0, steered.abs().max().item())
    merged.set_steering([])
    assert (logits(merged) - plain).abs().max() <= 1e-5 * max(1.0, plain.abs().max().item())
