from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from nnunet_cil.prototypes import PrototypeStore
from nnunet_cil.report.prototype_change import alignment, drift, similarity


def _store(names, means, spread=1.0, stale=()) -> PrototypeStore:
    means = np.array(means, np.float32)
    return PrototypeStore(
        class_names=tuple(names),
        means=means,
        counts=np.ones(len(names)),
        spread=np.full(len(names), spread, np.float32),
        centre=np.nanmean(means, 0),
        tau=0.1,
        stale=np.array([name in stale for name in names]),
        step=1,
        checkpoint_sha256="",
        feature_path="",
    )


def test_similarity_is_the_cosine_after_centring():
    found = similarity(_store("abc", [[11, 10], [9, 10], [10, 10]]))
    np.testing.assert_allclose(found[:2, :2], [[1, -1], [-1, 1]], atol=1e-6)
    np.testing.assert_allclose(found[2], 0, atol=1e-6)


def test_a_class_without_prototype_has_no_similarity():
    found = similarity(_store("ab", [[1, 0], [np.nan, np.nan]]))
    assert np.isnan(found[1]).all()
    assert np.isnan(found[:, 1]).all()
    assert not np.isnan(found[0, 0])


def test_alignment_is_the_cosine_less_the_mean_of_the_classes_of_both_steps():
    before = _store("ab", [[1, 0], [-1, 0]])
    turned = _store("abc", [[5, 6], [5, 4], [99, 99]])
    assert alignment(before, turned) == pytest.approx({"a": 0, "b": 0}, abs=1e-6)
    moved = _store("cab", [[99, 99], [7, 3], [2, 3]])
    assert alignment(before, moved) == pytest.approx({"a": 1, "b": 1})
    assert alignment(before, _store("ab", [[0, 0], [1, 0]])) == pytest.approx({"a": -1, "b": -1})


def test_a_prototype_that_was_taken_over_is_not_aligned():
    before = _store("abc", [[1, 0], [-1, 0], [0, 3]])
    found = alignment(before, _store("abc", [[1, 0], [-1, 0], [9, 9]], stale="c"))
    assert found == pytest.approx({"a": 1, "b": 1, "c": np.nan}, nan_ok=True)
    nothing = alignment(before, _store("abc", [[1, 0], [-1, 0], [9, 9]], stale="abc"))
    assert np.isnan(list(nothing.values())).all()


def test_drift_in_spreads_since_first_extracted():
    stores = [
        _store("ab", [[0, 0], [5, 0]], spread=2),
        _store("abc", [[3, 4], [5, 0], [7, 7]]),
        _store("abc", [[0, 0], [5, 6], [7, 8]]),
    ]
    found = drift(stores)
    np.testing.assert_allclose(found["a"], [0, 2.5, 0])
    np.testing.assert_allclose(found["b"], [0, 0, 3])
    np.testing.assert_allclose(found["c"], [np.nan, 0, 1])


def test_a_prototype_that_was_taken_over_has_not_been_measured():
    found = drift([_store("ab", [[0, 0], [1, 1]]), _store("ab", [[0, 0], [1, 1]], stale="a")])
    np.testing.assert_allclose(found["a"], [0, np.nan])
    np.testing.assert_allclose(found["b"], [0, 0])


def test_steps_without_prototypes_leave_gaps():
    found = drift([None, _store("ab", [[0, 0], [1, 1]]), None, _store("ab", [[3, 4], [1, 1]])])
    np.testing.assert_allclose(found["a"], [np.nan, 0, np.nan, 5])


@pytest.mark.parametrize("spread", [0.0, np.nan])
def test_no_drift_without_spread(spread):
    first = replace(_store("a", [[1, 1]]), spread=np.array([spread], np.float32))
    assert np.isnan(drift([first, _store("a", [[2, 1]])])["a"]).all()


def test_no_stores():
    assert drift([]) == {}
