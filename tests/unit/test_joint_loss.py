"""The KL in chunks of tokens equals that of whole forwards, in value and in gradient, for every family."""

import pytest
import torch
from tiny_models import tiny_model

from mxd_convert.base_model.families import ARCHITECTURES, find_sites
from mxd_convert.base_model.tail import Tail
from mxd_convert.training.joint_loss import chunk_tokens, summed_kl

IDS = torch.randint(1, 200, (3, 7), generator=torch.Generator().manual_seed(0))


def tail_of(family: str) -> Tail:
    model = tiny_model(family).double().requires_grad_(False)
    return Tail(model, find_sites(model, model.config, [0])[0])


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_the_logits_of_kept_hidden_states_are_those_of_the_model(family):
    tail = tail_of(family)
    assert tail.is_exact(IDS)
    with torch.no_grad():
        whole = tail.model(input_ids=IDS).logits
        kept = tail.hidden(IDS)
        assert torch.allclose(tail.logits(kept[1:, 2:6]), whole[1:, 2:6], atol=1e-10)
        assert torch.equal(tail.model(input_ids=IDS).logits, whole)  # nothing is left behind


@pytest.mark.parametrize("chunk", [1, 3, 7, 14, 1000])
def test_a_chunked_kl_equals_that_of_the_norm_and_the_head(chunk):
    tail = tail_of("llama")
    model = tail.model
    torch.manual_seed(1)
    base = tail.hidden(IDS)
    hidden = (base + 0.3 * torch.randn_like(base)).requires_grad_()
    counted = torch.rand(IDS.shape) > 0.3
    logs = [model.lm_head(model.model.norm(states)).log_softmax(-1) for states in (base, hidden)]
    expected = torch.nn.functional.kl_div(*reversed(logs), reduction="none", log_target=True).sum(-1)[counted].sum()
    (expected_grad,) = torch.autograd.grad(2.5 * expected, hidden)
    found = summed_kl(tail, base, hidden, counted, chunk)
    (grad,) = torch.autograd.grad(2.5 * found, hidden)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)  # the log-probabilities are in float32
    assert torch.allclose(grad, expected_grad, atol=1e-6 * expected_grad.abs().max())
    assert not grad[~counted].any()
    with torch.no_grad():
        assert summed_kl(tail, base, hidden, counted, chunk).item() == pytest.approx(found.item(), rel=1e-6)


def test_a_model_that_passes_on_more_than_hidden_states_is_noticed():
    tail = tail_of("llama")
    model, seen = tail.model, []
    tail.layers[0].register_forward_hook(lambda module, arguments, output: seen.append(output))

    def with_memory(module, arguments, output):
        output.logits = output.logits + (seen[-1].sum() if tail.layers[0].__dict__.get("forward") is None else 0.0)

    model.register_forward_hook(with_memory)
    assert not tail.is_exact(IDS)


@pytest.mark.parametrize(
    ("device", "vocabulary", "tokens"),
    [("cpu", 512, 32_768), ("cpu", 49_152, 341), ("cpu", 262_144, 64), ("cuda", 128_256, 1046), ("cuda", 262_144, 512)],
)
def test_a_chunk_has_as_many_tokens_as_its_logits_allow(device, vocabulary, tokens):
    assert chunk_tokens(device, vocabulary) == tokens
