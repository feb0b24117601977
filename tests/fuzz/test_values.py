"""Any label maps, score matrices and names: a right answer, or an error in our words."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from nnunet_cil import metrics
from nnunet_cil.labels import apply_remap, cumulative_labels, remap_table, without_classes
from nnunet_cil.report.table import Row, score_table
from nnunet_cil.report.words import against_joint, fate_of_new, fate_of_old, outcomes, status_words
from nnunet_cil.untrusted import is_ending, is_inside, is_name
from tests.fuzz.damage import NASTY_TEXTS
from tests.fuzz.test_files import check_words

pytestmark = pytest.mark.fuzz
INPUTS = settings.default.max_examples
NAMES = st.one_of(
    st.sampled_from(NASTY_TEXTS), st.text(max_size=200), st.text(alphabet="./\\-~ a0\0\n", min_size=1, max_size=8)
)
ORGANS = st.sampled_from(("liver", "spleen", "left", "right", "ignore", "background", "../x"))
SCORES = st.one_of(st.floats(0, 1), st.just(float("nan")))
ANY_SCORES = st.one_of(SCORES, st.floats())


@settings(max_examples=2 * INPUTS, deadline=None)
@given(
    own=st.dictionaries(ORGANS, st.integers(0, 300), min_size=1),
    class_map=st.dictionaries(ORGANS, st.none() | ORGANS),
    steps=st.lists(st.lists(ORGANS, max_size=3), min_size=1, max_size=3),
    values=arrays(np.int16, array_shapes(max_dims=3, max_side=3), elements=st.integers(-2, 301)),
    data=st.data(),
)
def test_label_maps(own, class_map, steps, values, data):
    target = cumulative_labels(steps, len(steps))
    table = remap_table(own, class_map, target)
    assert set(table) == set(own.values())
    assert set(table.values()) <= {0, *target.values()}
    lacking = data.draw(st.sets(st.sampled_from(sorted(own.values()))))
    without = without_classes(table, lacking)
    assert all(without[value] == 0 for value in lacking)
    assert without_classes(without, lacking) == without
    try:
        mapped = apply_remap(values, table)
    except ValueError as error:
        check_words(error)
        assert not set(values.ravel().tolist()) <= set(table)
    else:
        assert mapped.tolist() == np.vectorize(table.__getitem__)(values).tolist()


@settings(max_examples=2 * INPUTS, deadline=None)
@given(
    R=arrays(np.float64, array_shapes(max_dims=3, max_side=4, min_side=0), elements=ANY_SCORES),
    learned_at=arrays(
        st.sampled_from((np.int64, np.float64)), array_shapes(max_dims=2, max_side=4), elements=st.integers(-1, 5)
    ),
    joint=arrays(np.float64, array_shapes(max_dims=2, max_side=4), elements=ANY_SCORES),
)
def test_scores_of_any_matrix(R, learned_at, joint):
    """Whatever the shapes, steps and numbers."""
    for compute in (
        lambda: metrics.summary(R, learned_at),
        lambda: metrics.final_means(R, learned_at),
        lambda: metrics.gap_to_joint(R, joint, learned_at),
        lambda: metrics.plasticity_gap(R, joint, learned_at),
        lambda: score_table([Row("pgcd", R[None])], ["organ"] * len(learned_at), learned_at.tolist()),
    ):
        try:
            compute()
        except ValueError as error:
            check_words(error)


@settings(max_examples=2 * INPUTS, deadline=None)
@given(data=st.data(), names=st.lists(NAMES.filter(bool), min_size=1, max_size=4))
def test_tables_and_words_of_any_scores(data, names):
    """Of scores in [0, 1], however many are absent, and organs of any name."""
    n_steps = data.draw(st.integers(1, 4))
    learned_at = data.draw(st.lists(st.integers(1, n_steps), min_size=len(names), max_size=len(names)))
    R, joint = (data.draw(arrays(np.float64, (n_steps, len(names)), elements=SCORES)) for _ in range(2))
    found = outcomes(R, names, learned_at)
    assert {outcome.status for outcome in found} <= set(status_words())
    for text in (fate_of_old(found), fate_of_new(found), against_joint(metrics.gap_to_joint(R, joint, learned_at))):
        assert "nan" not in text or any("nan" in name for name in names)
    rows = [Row("pgcd", np.stack([R, joint]), (0, 1)), Row("joint", joint[None])]
    assert score_table(rows, names, learned_at).count("pgcd") >= 2
    best = metrics.summary(R, learned_at)
    assert all(np.isnan(value) or -1 <= value <= 1 for value in best.values())


@settings(max_examples=2 * INPUTS, deadline=None)
@given(name=NAMES)
def test_a_name_stays_in_its_folder(tmp_path_factory, name):
    assert not is_name(name) or Path("/a/b", name).resolve().parent == Path("/a/b")
    assert not is_name(name) or len(f"set0_{name}_0000.nii.gz".encode()) < 255
    assert not is_inside(name) or Path("/a/b", name).resolve().is_relative_to("/a/b")
    assert not is_ending(name) or Path(f"/a/b/c{name}").resolve().parent == Path("/a/b")
    if is_name(name):
        (tmp_path_factory.getbasetemp() / name).touch()
