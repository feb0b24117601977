from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nnunet_cil.labels import (
    apply_remap,
    check_regions,
    cumulative_labels,
    read_unlabelled,
    remap_table,
    without_classes,
)

STEPS = (("liver", "spleen"), ("right_kidney",), ("left_kidney",))


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (1, {"background": 0, "liver": 1, "spleen": 2}),
        (2, {"background": 0, "liver": 1, "spleen": 2, "right_kidney": 3}),
        (3, {"background": 0, "liver": 1, "spleen": 2, "right_kidney": 3, "left_kidney": 4}),
    ],
)
def test_cumulative_labels_are_numbered_in_the_order_learned(step, expected):
    labels = cumulative_labels(STEPS, step)
    assert labels == expected
    assert list(labels) == list(expected)


def test_numbers_of_old_classes_never_change():
    for step in (1, 2):
        assert cumulative_labels(STEPS, step).items() <= cumulative_labels(STEPS, step + 1).items()


def test_table_maps_merges_and_drops():
    own = {"background": 0, "liver": 4, "tumour": 2, "vessel": 7, "unnamed": 9}
    class_map = {"liver": "liver", "tumour": "liver", "vessel": None}
    assert remap_table(own, class_map, {"background": 0, "spleen": 1, "liver": 2}) == {0: 0, 4: 2, 2: 2, 7: 0, 9: 0}


def test_class_of_another_step_becomes_background():
    own = {"background": 0, "liver": 1, "spleen": 2}
    names = {"liver": "liver", "spleen": "spleen"}
    assert remap_table(own, names, {"background": 0, "spleen": 1}) == {0: 0, 1: 0, 2: 1}


@pytest.mark.parametrize(("target", "expected"), [({"liver": 1, "ignore": 2}, 2), ({"liver": 1}, 0)])
def test_ignore_goes_to_ignore_where_there_is_one(target, expected):
    own = {"background": 0, "liver": 1, "ignore": 5}
    assert remap_table(own, {"liver": "liver"}, {"background": 0, **target})[5] == expected


def test_a_class_is_gone_as_soon_as_one_of_its_labels_is_missing():
    table = {0: 0, 4: 2, 2: 2, 7: 3, 9: 0}
    assert without_classes(table, ()) == table
    assert without_classes(table, [4]) == {0: 0, 4: 0, 2: 0, 7: 3, 9: 0}
    assert without_classes(table, [9]) == table, "a label that is dropped anyway"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", "case,class\ncase_1,liver\ncase_2,3\ncase_1,spleen\ncase_1,liver\n"),
        ("a.csv", "\ufeffnote,class,case\r\nx, liver,case_1 \r\n,3,case_2\r\n,spleen,case_1\r\n"),
        ("a.json", '{"case_1": ["liver", "spleen"], "case_2": [3]}'),
    ],
)
def test_unlabelled_is_read_from_csv_and_json(tmp_path, name, text):
    (tmp_path / name).write_text(text, encoding="utf-8", newline="")
    assert read_unlabelled(tmp_path / name) == {"case_1": ("liver", "spleen"), "case_2": ("3",)}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "case,organ\na,b\n", r"columns \['case', 'organ'\]"),
        ("a.csv", "", "columns None"),
        ("a.json", "[]", "expected an object of lists"),
        ("a.json", '{"case_1": "liver"}', "no object of lists"),
        ("a.json", "{", "Expecting"),
    ],
)
def test_what_says_nothing_of_labels_is_refused(tmp_path, name, text, message):
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        read_unlabelled(tmp_path / name)


def test_remap_keeps_shape_and_takes_the_smallest_type():
    seg = np.array([[[0, 4], [2, 7]]], np.int16)
    out = apply_remap(seg, {0: 0, 4: 2, 2: 2, 7: 0})
    np.testing.assert_array_equal(out, [[[0, 2], [2, 0]]])
    assert out.dtype == np.uint8
    assert apply_remap(seg, {0: 0, 4: 256, 2: 2, 7: 0}).dtype == np.uint16


def test_remap_of_an_empty_array_and_of_whole_floats():
    assert apply_remap(np.zeros((0, 3), np.uint8), {0: 0}).shape == (0, 3)
    np.testing.assert_array_equal(apply_remap(np.array([0.0, 4.0], np.float32), {0: 0, 4: 1}), [0, 1])


def test_remap_needs_little_memory():
    """An abdominal CT has 80 million voxels; sorting them took 33 bytes each, and most of the time of a preparation."""
    seg = np.arange(100_000, dtype=np.float32) % 14
    tracemalloc.start()
    apply_remap(seg, {value: value % 3 for value in range(14)})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 * seg.size


def test_remap_names_unknown_values():
    with pytest.raises(ValueError, match=r"got values \[3, 9\], expected only \[0, 1\]"):
        apply_remap(np.array([0, 1, 9, 3, 3]), {0: 0, 1: 1})


@pytest.mark.parametrize("value", [1.5, float("nan")])
def test_remap_does_not_round(value):
    with pytest.raises(ValueError, match=rf"got values \[{value}\], expected only \[0, 1\]"):
        apply_remap(np.array([0.0, value]), {0: 0, 1: 1})


@given(st.lists(st.integers(0, 6), max_size=40), st.dictionaries(st.integers(0, 6), st.integers(0, 300)))
def test_remap_equals_a_loop(values, table):
    seg = np.array(values, np.int32)
    if set(values) <= set(table):
        np.testing.assert_array_equal(apply_remap(seg, table), [table[v] for v in values])
    else:
        with pytest.raises(ValueError, match="got values"):
            apply_remap(seg, table)


@pytest.mark.parametrize("value", [[1, 2], (1, 2)])
def test_regions_are_refused(value):
    with pytest.raises(ValueError, match=r"there: labels: got regions \['whole'\].*not supported yet"):
        check_regions({"background": 0, "core": 2, "whole": value}, "there")


def test_plain_labels_pass():
    check_regions({"background": 0, "liver": 1, "ignore": 2}, "there")
