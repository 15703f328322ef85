"""`generate` of converted models equals, in every mode, a loop of whole forwards without a cache and transformers' own classes.

Checks of a checkpoint's folder are in tests/support/conformance.py; transformers' own tests of its classes are run by tests/hf.
"""

from functools import cache
from unittest import mock

import pytest
import torch
from mixtures import mixture_of, twin_of
from tiny_models import VOCABULARY, tiny_model

FAMILIES = ("llama", "gpt2", "gpt_neox", "opt", "bloom", "qwen3", "gemma3_text")
PROMPT, NEW, BEAMS, TEMPERATURE, TOP_K, SEED = 9, 12, 3, 0.7, 40, 11
IDS = torch.randint(1, VOCABULARY, (2, PROMPT), generator=torch.Generator().manual_seed(2))
MORE = torch.randint(1, VOCABULARY, (2, 4), generator=torch.Generator().manual_seed(3))
GREEDY = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}


# --- models --------------------------------------------------------------------------------------------------------------------------


@cache
def base_of(family):
    return endless(tiny_model(family, tie_word_embeddings=False))  # with tied ones, random models repeat a token


@cache
def mixture(family):
    return endless(mixture_of(base_of(family)))


@cache
def twin(family):
    return endless(twin_of(base_of(family)))


def endless(model):
    """Disable the end token, so that all texts have one length."""
    model.generation_config.eos_token_id = None
    return model


# --- the modes of generate: model, helper -> ids, (2, NEW) ------------------------------------------------------------------------------


def greedy(model, _, ids=IDS, **options):
    return model.generate(ids, attention_mask=torch.ones_like(ids), **{**GREEDY, **options})[:, ids.shape[1] :]


def samples(model, _):
    torch.manual_seed(SEED)
    return greedy(model, None, do_sample=True, temperature=TEMPERATURE, top_k=TOP_K)


def one_by_one(model, **options):
    """Run a mode that takes one text at a time on each text."""
    return torch.cat([greedy(model, None, ids=ids[None], **options) for ids in IDS])


def left_padding(model, _):
    """Pad the first text, which is three tokens shorter than the second."""
    mask = torch.ones_like(IDS)
    mask[0, :3] = 0
    return model.generate(IDS * mask, attention_mask=mask, **GREEDY)[:, PROMPT:]


def embeddings(model, _):
    return model.generate(inputs_embeds=model.get_input_embeddings()(IDS), attention_mask=torch.ones_like(IDS), **GREEDY)


def continued(model, _):
    """Continue with more of a prompt after a text whose cache was kept; it holds all but the last generated token."""
    first = model.generate(IDS, **GREEDY, return_dict_in_generate=True)
    ids = torch.cat([first.sequences, MORE], dim=1)
    assert first.past_key_values.get_seq_length() == PROMPT + NEW - 1
    return greedy(model, None, ids=ids, past_key_values=first.past_key_values)


class Stream:
    """Replace an accelerator's stream, so that a CPU can offload caches to itself."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def wait_stream(self, _):
        pass


def with_cache(name):
    def mode(model, _):
        with mock.patch("torch.Stream", Stream), mock.patch("torch.cuda.default_stream", return_value=Stream()):
            return greedy(model, None, cache_implementation=name, disable_compile=True)

    return mode


MODES = {
    "greedy": greedy,
    "sampling": samples,
    "beam search": lambda model, _: greedy(model, None, num_beams=BEAMS),
    "assisted": lambda model, helper: one_by_one(model, assistant_model=helper),
    "prompt lookup": lambda model, _: one_by_one(model, prompt_lookup_num_tokens=2),
    "static cache": with_cache("static"),
    "offloaded cache": with_cache("offloaded"),
    "offloaded static cache": with_cache("offloaded_static"),
    "left padding": left_padding,
    "inputs_embeds": embeddings,
    "continued cache": continued,
}


# --- the reference: whole forwards, one text at a time, no cache, without transformers' generate ------------------------------------------


@torch.no_grad()
def loop(model, ids, choose=lambda scores: scores.argmax(-1, keepdim=True)):
    for _ in range(NEW):
        ids = torch.cat([ids, choose(model(input_ids=ids, use_cache=False).logits[:, -1].float())], dim=1)
    return ids[:, -NEW:]


def sampled(scores):
    scores = scores / TEMPERATURE
    scores = scores.masked_fill(scores < scores.topk(TOP_K).values[:, -1:], -torch.inf)
    return torch.multinomial(scores.softmax(-1), 1)


@torch.no_grad()
def beams(model, prompt):
    """Return the most probable final text of a search with BEAMS beams."""
    texts, scores = prompt, torch.zeros(1)
    for _ in range(NEW):
        following = model(input_ids=texts, use_cache=False).logits[:, -1].float().log_softmax(-1)
        scores, best = (scores[:, None] + following).flatten().topk(BEAMS)
        texts = torch.cat([texts[best // VOCABULARY], (best % VOCABULARY)[:, None]], dim=1)
    return texts[:1, -NEW:]


def reference(mode, model):
    if mode == "sampling":
        torch.manual_seed(SEED)
        return loop(model, IDS, sampled)
    if mode == "beam search":
        return torch.cat([beams(model, ids[None]) for ids in IDS])
    if mode == "left padding":
        return torch.cat([loop(model, IDS[:1, 3:]), loop(model, IDS[1:])])
    if mode == "continued cache":
        return loop(model, torch.cat([IDS, loop(model, IDS), MORE], dim=1))
    return loop(model, IDS)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_mixture_generates_the_text_of_whole_forwards(family, mode):
    model = mixture(family)
    assert MODES[mode](model, base_of(family)).equal(reference(mode, model))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_an_exact_twin_generates_the_text_of_its_base(family, mode):
    base, helper = base_of(family), mixture(family)
    assert type(base).__module__.startswith("transformers.")
    assert MODES[mode](twin(family), helper).equal(MODES[mode](base, helper))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_texts_differ_between_models(family):
    """No text repeats a single token, and the mixture's text differs from the base's."""
    ours, theirs = reference("greedy", mixture(family)), reference("greedy", base_of(family))
    assert not ours.equal(theirs)
    assert not ours[0].equal(ours[1])
    assert ours.unique().numel() >= 12
