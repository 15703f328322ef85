"""A probe uses means over the tokens of a document as features, and chooses experts on the training part alone."""

import numpy as np
import pytest
import scipy.sparse
import torch
from project import QUICKSTART
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score, f1_score
from sklearn.model_selection import PredefinedSplit, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from small_runs import FAMILIES
from small_runs import documents as long_documents

from mxd_convert.base_model.capture import recording
from mxd_convert.base_model.families import find_sites
from mxd_convert.base_model.load import load_base, load_tokenizer
from mxd_convert.checkpoint.read import load_checkpoint
from mxd_convert.evaluation.probes import fit as probing
from mxd_convert.evaluation.probes.pooling import coefficients_of, encode_documents, hidden_units, pool, random_coefficients
from mxd_convert.recipe.schema import Base


def documents(count: int) -> list[str]:
    """Return texts of very different lengths."""
    return [text[: 10 + 37 * number % 170] for number, text in enumerate(long_documents(count))]


# --- features ------------------------------------------------------------------------------------------------------------------


def pooled_by_loop(model, sites, encoded, codes_of):
    """Pool one document and one token at a time, without padding."""
    rows = {site.index: [] for site in sites}
    for ids, counted in zip(encoded.ids, encoded.counted, strict=True):
        with recording(model, sites) as seen, torch.no_grad():
            model(input_ids=torch.from_numpy(ids)[None])
        for site in sites:
            total, tokens = 0.0, 0
            for position in np.flatnonzero(counted):
                total = total + codes_of(site.index, seen[site.index].inputs[0, position])
                tokens += 1
            rows[site.index].append(total / tokens)
    return {index: torch.stack(row).numpy() for index, row in rows.items()}


def dense(matrix):
    return matrix.toarray() if scipy.sparse.issparse(matrix) else matrix


def dense_code(layer, x):
    coefficients = layer.encode(x)
    return (
        coefficients
        if isinstance(coefficients, torch.Tensor)
        else torch.zeros(layer.n_experts).index_add_(0, coefficients[1], coefficients[0])
    )


def mlp_hidden(mlp, x):
    if hasattr(mlp, "gate_proj"):
        return mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)
    return mlp.act(mlp.c_fc(x)) if hasattr(mlp, "c_fc") else mlp.act(mlp.dense_h_to_4h(x))


@pytest.mark.parametrize("family", FAMILIES)
def test_features_are_means_over_the_tokens_of_a_document(family, converted, models):
    tokenizer = load_tokenizer(str(converted[family]))
    encoded, kept = encode_documents(documents(24), tokenizer, 30, 2048)
    assert kept == list(range(24))
    assert max(map(len, encoded.ids)) == 30
    for ids, counted in zip(encoded.ids, encoded.counted, strict=True):
        assert ids[0] == tokenizer.bos_token_id
        assert counted.tolist() == [False] + [True] * (len(ids) - 1)
    model, base = load_checkpoint(converted[family], dtype="float32"), load_base(Base(model=str(models[family])))
    layers = model.mxd_layers()
    sites = find_sites(base, base.config, [0, 2])
    controls = {index: random_coefficients(layers[index], index) for index in layers}
    sources = {("expert", index): coefficients_of(layers[index]) for index in layers}
    pooled = pool(
        model, sources | {("random", index): control for index, control in controls.items()}, encoded, torch.device("cpu")
    )
    neurons = pool(base, {i.index: hidden_units(base, i) for i in sites}, encoded, torch.device("cpu"))
    expected = pooled_by_loop(model, sites, encoded, lambda index, x: dense_code(layers[index], x))
    units = pooled_by_loop(base, sites, encoded, lambda index, x: mlp_hidden(base.get_submodule(sites[index // 2].path), x))

    def random_code(index, x):
        gate = torch.relu(controls[index].coefficients.weight_NI @ x)
        return gate * (gate >= gate.sort(descending=True).values[3])

    control = pooled_by_loop(model, sites, encoded, random_code)
    for index in (0, 2):
        assert scipy.sparse.issparse(pooled["expert", index])
        np.testing.assert_allclose(dense(pooled["expert", index]), expected[index], atol=1e-5)
        np.testing.assert_allclose(dense(pooled["random", index]), control[index], atol=1e-5)
        np.testing.assert_allclose(neurons[index], units[index], rtol=1e-4, atol=1e-5)
        assert expected[index].any()


def test_special_tokens_do_not_count():
    tokenizer = load_tokenizer(str(QUICKSTART))
    mark = tokenizer.bos_token
    encoded, kept = encode_documents([f"{mark}a list{mark} of", mark, "a"], tokenizer, 50, 2048)
    assert kept == [0, 2]
    for ids, counted in zip(encoded.ids, encoded.counted, strict=True):
        assert (counted == (ids != tokenizer.bos_token_id)).all()
    assert encoded.tokens == len(tokenizer("a list of")["input_ids"]) + 1


def test_batches_hold_every_document_once_and_padding_weighs_zero():
    encoded, _ = encode_documents(documents(50), load_tokenizer(str(QUICKSTART)), 12, 2048)
    seen = []
    for rows, ids_BT, weight_BT in encoded.batches(60):
        assert ids_BT.numel() <= 60
        assert torch.allclose(weight_BT.sum(1), torch.ones(len(rows)))
        for b, row in enumerate(rows):
            assert ids_BT[b, : len(encoded.ids[row])].tolist() == encoded.ids[row].tolist()
            assert not weight_BT[b, len(encoded.ids[row]) :].any()
        seen += rows.tolist()
    assert sorted(seen) == list(range(50))


# --- protocol ------------------------------------------------------------------------------------------------------------------


def noise(documents: int, units: int, seed: int) -> scipy.sparse.csr_array:
    return scipy.sparse.random_array((documents, units), density=0.3, rng=np.random.default_rng(seed)).astype(np.float32).tocsr()


def test_random_labels_score_at_chance_with_any_number_of_experts():
    ours, leaking = [], []
    for seed in range(6):
        labels = np.random.default_rng(100 + seed).permutation(np.repeat([0, 1], 120))
        layers = {0: noise(240, 1500, seed), 1: noise(240, 1500, 50 + seed)}
        split = probing.split_documents(labels, seed)
        _, (ranked, predicted) = probing.probe_units(layers, labels, split, 2)
        assert ranked[0].cv_f1 > 0.6, "the best of so many looks good where it was chosen"
        ours.append(balanced_accuracy_score(labels[split.test], predicted))
        test = {index: matrix[split.test] for index, matrix in layers.items()}
        best = probing.rank_units(test, labels[split.test], np.arange(len(split.test)) % 5, 2, most=4)[1][0]
        leaking.append(best.cv_f1)
    assert np.mean(ours) == pytest.approx(0.5, abs=0.07)
    assert np.mean(leaking) > 0.65, "so this test would see a choice made on the test part"


def test_the_choice_ignores_the_test_part():
    labels = np.repeat([0, 1, 2], 40)
    layers = {3: noise(120, 300, 0)}
    split = probing.split_documents(labels, 0)
    assert (np.bincount(labels[split.test]) == 12).all()
    assert not set(split.test) & set(split.train)
    other_labels, other_values = labels.copy(), layers[3].toarray()
    other_labels[split.test] = np.random.default_rng(0).permutation(labels[split.test])
    other_values[split.test] *= np.random.default_rng(1).random((len(split.test), 1)) * 9
    before = [ranked for ranked, _ in probing.probe_units(layers, labels, split, 3)]
    after = [ranked for ranked, _ in probing.probe_units({3: scipy.sparse.csr_array(other_values)}, other_labels, split, 3)]
    assert before == after
    whole = [probing.WholeVector.of(values, split.train) for values in (layers, {3: scipy.sparse.csr_array(other_values)})]
    (one, cv), (two, cv_after) = (vector.fit(labels[split.train] == 1, split.fold_D) for vector in whole)
    assert one.C == two.C
    assert cv == cv_after


def test_a_probe_of_one_expert_equals_sklearn_in_every_fold():
    rng = np.random.default_rng(0)
    positive = rng.random(90) < 0.3
    values = (1e-3 * (rng.exponential(size=90) + positive)).astype(np.float32)  # small coefficients are no worse
    fold = np.arange(90) % 5
    pipeline = make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced"))
    theirs = cross_val_predict(pipeline, values[:, None], positive, cv=PredefinedSplit(fold))
    assert (probing.cross_validated(values, positive, fold) == theirs).all()
    [[ranked], _] = probing.rank_units({0: values[:, None], 1: np.zeros((90, 3), np.float32)}, 1 - positive, fold, 2)
    assert (ranked.layer, ranked.unit) == (0, 0), "dead units are no candidates"
    assert ranked.cv_f1 == pytest.approx(f1_score(positive, theirs))


def test_the_cheap_score_keeps_the_choice_of_cross_validation():
    """Hard cases: an expert that fires strongly on few documents of a rare class, and one that marks a class by firing less."""
    labels = np.repeat([0, 1, 2], [150, 15, 75])
    values = noise(240, 60, 0).toarray()
    values[:, 50] = np.where(labels == 1, np.random.default_rng(1).exponential(size=240) ** 3, 0)
    values[:, 30] = np.where(labels == 2, 0.2, 0.7) + 0.3 * values[:, 30]
    layers = {1: scipy.sparse.csr_array(values[:, :40]), 5: values[:, 40:]}
    fold = np.arange(240) % 5
    few, every = (probing.rank_units(layers, labels, fold, 3, most) for most in (10, 60))
    assert [ranked[0] for ranked in few] == [ranked[0] for ranked in every]
    assert [(ranked[0].layer, ranked[0].unit) for ranked in few[1:]] == [(5, 10), (1, 30)]


@pytest.mark.parametrize("units", [60, 200])
def test_a_probe_of_all_experts_equals_sklearn_on_standardised_features(units):
    """Both with fewer features than documents and with more."""
    labels = np.repeat([0, 1], 60)
    values = noise(120, units, 0).toarray()
    values[:, 10:20] += labels[:, None] * 0.5
    values[:, 30] = 0
    values[:, 31] = np.arange(120) == 7  # active on one document: its scale is not known
    layers = {0: scipy.sparse.csr_array(values[:, :50]), 4: values[:, 50:]}
    split = probing.split_documents(labels, 0)
    vector = probing.WholeVector.of(layers, split.train)
    model, cv_f1 = vector.fit(labels[split.train] == 1, split.fold_D)
    assert vector.units == units - 2
    alive = np.delete(values, [30, 31], axis=1)
    alive = StandardScaler().fit(alive[split.train]).transform(alive) / np.sqrt(units - 2)
    theirs = LogisticRegression(C=model.C, class_weight="balanced", max_iter=1000, tol=1e-6)
    expected = theirs.fit(alive[split.train], labels[split.train]).decision_function(alive[split.test])
    ours = model.decision_function(vector.coordinates[split.test])
    np.testing.assert_allclose(ours, expected, atol=0.01 * np.abs(expected).max())
    assert f1_score(labels[split.test], ours > 0) > 0.8
    assert 0.8 < cv_f1 <= 1


def test_intervals_equal_those_of_resampled_documents():
    rng = np.random.default_rng(0)
    positive = np.arange(200) < 40
    predicted = np.where(rng.random(200) < 0.8, positive, ~positive)
    figures = probing.scores(positive, predicted, 0)
    assert figures["f1"] == pytest.approx(f1_score(positive, predicted))
    assert figures["chance"] == pytest.approx(f1_score(positive, np.ones(200, bool)))
    samples = {"f1": [], "balanced_accuracy": []}
    for _ in range(500):
        drawn = np.concatenate([rng.choice(np.flatnonzero(part), part.sum()) for part in (positive, ~positive)])
        samples["f1"].append(f1_score(positive[drawn], predicted[drawn]))
        samples["balanced_accuracy"].append(balanced_accuracy_score(positive[drawn], predicted[drawn]))
    for name, values in samples.items():
        low, high = np.percentile(values, (2.5, 97.5))
        assert figures[f"{name}_low"] == pytest.approx(low, abs=0.03)
        assert figures[f"{name}_high"] == pytest.approx(high, abs=0.03)
        assert low < figures[name] < high
    nobody = probing.scores(positive, np.zeros(200, bool), 0)
    assert (nobody["f1"], nobody["f1_high"], nobody["balanced_accuracy"]) == (0, 0, 0.5)
