"""The verdict names the kind of layer that was trained, and its sentence has the reasons."""

import pytest

from mxd_convert.evaluation.verdict import (
    DENSE_LAYER,
    MIXED,
    MIXTURE,
    NOT_APPLICABLE,
    NOT_SHOWN,
    TRANSCODER,
    sentence,
    verdict,
    verdict_of,
)

GOOD = {"gate_share": 0.6, "hidden_share": 0.7, "product_share": 0.3, "identity_share": 0.55, "routing_necessity": 1.4}


def mxds(*layers):
    """Return figures and kinds of some MxD layers."""
    found = {str(index): layer for index, layer in enumerate(layers)}
    return found, dict.fromkeys(found, "mxd")


@pytest.mark.parametrize(
    ("changes", "label"),
    [
        ({}, MIXTURE),
        ({"gate_share": 0.09}, DENSE_LAYER),
        ({"hidden_share": 0.04, "product_share": 0.03}, TRANSCODER),
        ({"gate_share": 0.09, "hidden_share": 0.04}, DENSE_LAYER),
        ({"identity_share": 0.4}, NOT_SHOWN),
        ({"routing_necessity": 0.4}, NOT_SHOWN),
        ({"routing_necessity": None}, NOT_SHOWN),
        ({"product_share": 0.04}, MIXED),
        (dict.fromkeys(GOOD), NOT_SHOWN),
    ],
)
def test_a_layer_has_the_verdict_of_its_figures(changes, label):
    assert verdict_of({**GOOD, **changes}) == label


def test_routing_necessity_counts_only_if_it_was_measured():
    assert verdict_of({name: value for name, value in GOOD.items() if name != "routing_necessity"}) == MIXTURE


def test_the_labels_are_those_of_the_contract():
    assert [MIXTURE, TRANSCODER, DENSE_LAYER, NOT_SHOWN, MIXED, NOT_APPLICABLE] == [
        "mixture of decoders",
        "transcoder in all but name",
        "dense layer in all but name",
        "experts not shown to matter",
        "mixed",
        "not applicable",
    ]


def test_a_model_has_the_verdict_that_its_layers_share():
    assert verdict(*mxds(GOOD, GOOD)) == MIXTURE
    assert verdict(*mxds(GOOD, {**GOOD, "hidden_share": 0.03})) == MIXED
    assert verdict({"0": GOOD}, {"0": "transcoder"}) == NOT_APPLICABLE
    assert verdict({"0": GOOD, "1": {**GOOD, "gate_share": 0.0}}, {"0": "mxd", "1": "dense_twin"}) == MIXTURE


def test_the_sentence_has_the_figures_that_decide():
    assert sentence(*mxds(GOOD, {**GOOD, "hidden_share": 0.5}), None) == (
        "mixture of decoders: the gain alone leaves 50 to 70 % of the product's variance unexplained, the linear factor 60 %, and a sum of"
        " both 30 %"
    )
    assert sentence(*mxds({**GOOD, "hidden_share": 0.02}, {**GOOD, "hidden_share": 0.05}), None) == (
        "transcoder in all but name: the experts' gain alone explains 95 to 98 % of the product's variance"
    )
    assert sentence(*mxds({**GOOD, "gate_share": 0.03}), None) == (
        "dense layer in all but name: the linear factor alone explains 97 % of the product's variance"
    )
    assert sentence(*mxds({**GOOD, "identity_share": 0.31}), None) == (
        "experts not shown to matter: only 0.31 of the product's variance depends on which experts fire"
    )
    assert sentence(*mxds({**GOOD, "product_share": 0.02}), None) == (
        "mixed: a sum of gain and linear factor leaves only 2 % of the product's variance"
    )
    assert sentence({"0": GOOD}, {"0": "dense_twin"}, None).startswith("not applicable: a dense twin")


def test_the_sentence_names_the_layers_of_each_verdict():
    layers = [GOOD, {**GOOD, "hidden_share": 0.04}, {**GOOD, "product_share": 0.01}, GOOD]
    found = sentence(*mxds(*layers), None)
    assert found.startswith("mixed: layers 0, 3: mixture of decoders (")
    assert "layer 1: transcoder in all but name (the experts' gain alone explains 96 %" in found
    assert "layer 2: a sum of its two sides (" in found


def test_the_sentence_compares_with_the_dense_twin():
    twin = {"ce": 2.0, "delta_ce": 0.5, "gap": -0.2, "gap_se": 0.01}
    assert sentence(*mxds(GOOD), twin).endswith(
        "; cross-entropy is 0.200 nats per token lower than with the dense twin (standard error 0.010)"
    )
    assert sentence(*mxds(GOOD), {"gap": 0.1, "gap_se": None}).endswith("0.100 nats per token higher than with the dense twin")
    assert sentence(*mxds(GOOD), {"gap": 0.0001, "gap_se": None}).endswith("; cross-entropy is that of the dense twin")


def test_a_layer_without_shares_has_its_reason_in_the_sentence():
    constant = {**dict.fromkeys(GOOD), "reason": "the layer's output is constant"}
    assert sentence(*mxds(constant), None) == "experts not shown to matter: layer 0: the layer's output is constant"


def test_a_gain_of_few_directions_is_reported():
    directions = {"gain_dimensions": 25.0, "output_dimensions": 30.0}
    assert "directions" not in sentence(*mxds({**GOOD, **directions}), None)
    assert "directions" not in sentence(*mxds({**GOOD, "gain_dimensions": None, "output_dimensions": 30.0}), None)
    found = sentence(*mxds({**GOOD, **directions}, {**GOOD, **directions, "gain_dimensions": 1.2}), None)
    assert "; the gain of layer 1 varies in only 1.2 directions, the MLP's output in 30.0" in found
