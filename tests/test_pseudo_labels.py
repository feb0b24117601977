from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from nnunet_cil.pseudo_labels import PseudoLabelCache, PseudoLabelDataset, merge_pseudo_labels

KEY = {"n_classes": 3, "tau_old": 0.6, "tau_background": 0.8, "teacher": "abc"}


def logits_of(probabilities):
    """(V, 2) probabilities -> (1, 2, 1, 1, V) logits."""
    return torch.log(torch.tensor(probabilities)).T.reshape(1, 2, 1, 1, -1)


def test_merge_by_hand():
    # sure old, unsure old, sure background, unsure background, and a new-class voxel where the teacher is sure
    logits = logits_of([[0.1, 0.9], [0.45, 0.55], [0.9, 0.1], [0.7, 0.3], [0.05, 0.95]])
    labels = torch.tensor([0, 0, 0, 0, 2]).reshape(1, 1, 1, 1, 5)
    merged = merge_pseudo_labels(labels, logits, 0.6, 0.8, ignore_id=3)
    assert merged.flatten().tolist() == [1, 3, 0, 3, 2]
    assert merged.dtype == labels.dtype


def test_thresholds_of_zero_give_the_argmax_everywhere():
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 4, 5)
    labels = torch.zeros(2, 1, 4, 5, dtype=torch.int16)
    merged = merge_pseudo_labels(labels, logits, 0.0, 0.0, ignore_id=4)
    assert torch.equal(merged[:, 0].long(), logits.argmax(1))


def test_labels_of_the_step_and_outside_are_never_overruled():
    labels = torch.tensor([-1, 2, 3]).reshape(1, 1, 1, 1, 3)
    merged = merge_pseudo_labels(labels, logits_of([[0.0001, 0.9999]] * 3), 0.5, 0.5, ignore_id=3)
    assert torch.equal(merged, labels)


class FakeDataset:
    def __init__(self, cases):
        self.cases = cases
        self.identifiers = sorted(cases)

    def load_case(self, case):
        image, seg = self.cases[case]
        return image, seg, None, {"spacing": [1, 1, 1], "class_locations": {2: "own"}}


@pytest.fixture
def dataset():
    rng = np.random.default_rng(0)
    cases = {}
    for name in ("a", "b.c"):
        seg = np.zeros((1, 6, 6, 6), np.int16)
        seg[0, :2] = 2
        cases[name] = (rng.normal(size=(1, 6, 6, 6)).astype(np.float32), seg)
    return FakeDataset(cases)


def teacher(image):
    logits = torch.zeros(2, 6, 6, 6)
    logits[1, :4] = 8.0
    logits[0, 4:] = 8.0
    logits[:, 5, 5, 5] = 0.0
    return logits


def test_cache_gives_the_merged_case_with_its_locations(tmp_path, dataset):
    cache = PseudoLabelCache(tmp_path, KEY)
    assert cache.fill(dataset, dataset.identifiers, teacher, (4, 4, 4), with_annotated=True) == 2
    _, seg, previous, properties = PseudoLabelDataset(dataset, cache).load_case("b.c")
    seg = np.asarray(seg[:])
    assert previous is None
    assert properties["spacing"] == [1, 1, 1]
    expected = np.zeros((1, 6, 6, 6))
    expected[0, 2:4], expected[0, :2], expected[0, 5, 5, 5] = 1, 2, 3
    np.testing.assert_array_equal(seg, expected)
    locations = properties["class_locations"]
    assert set(locations) == {1, 2, (-1, 0, 1, 2)}
    for label in (1, 2):
        assert len(locations[label]) == 72
        assert (seg[tuple(locations[label].T)] == label).all()
    assert 3 not in seg[tuple(locations[(-1, 0, 1, 2)].T)]
    np.testing.assert_array_equal(cache.counts(["a", "b.c"]), 2 * np.bincount(expected.astype(int).ravel())[:3])


def test_cache_is_made_once_a_label_file_teacher_and_setting(tmp_path, dataset):
    fill = {"patch_size": (4, 4, 4), "with_annotated": False}
    assert PseudoLabelCache(tmp_path, KEY).fill(dataset, ["a"], teacher, **fill) == 1
    assert PseudoLabelCache(tmp_path, KEY).fill(dataset, ["a"], teacher, **fill) == 0
    assert PseudoLabelCache(tmp_path, KEY | {"teacher": "other"}).fill(dataset, ["a"], teacher, **fill) == 1
    assert PseudoLabelCache(tmp_path, KEY | {"tau_old": 0.7}).fill(dataset, ["a"], teacher, **fill) == 1
    dataset.cases["a"][1][0, 0, 0, 0] = 0
    assert PseudoLabelCache(tmp_path, KEY).fill(dataset, ["a"], teacher, **fill) == 1


def test_interrupted_case_is_made_again(tmp_path, dataset):
    fill = {"patch_size": (4, 4, 4), "with_annotated": False}
    cache = PseudoLabelCache(tmp_path, KEY)

    def killed(image):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.fill(dataset, ["a"], killed, **fill)
    assert not cache.has("a", dataset.cases["a"][1])
    (cache.folder / "a_seg.b2nd").write_bytes(b"half")
    assert cache.fill(dataset, ["a"], teacher, **fill) == 1
    assert json.loads((cache.folder / "key.json").read_text()) == KEY
