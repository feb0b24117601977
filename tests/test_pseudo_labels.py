from __future__ import annotations

import json
from threading import Thread

import numpy as np
import pytest
import torch

from nnunet_cil import pseudo_labels
from nnunet_cil.pseudo_labels import (
    ENTROPY_BINS,
    JoinedDataset,
    PseudoLabelCache,
    PseudoLabelDataset,
    by_confidence,
    by_entropy,
    entropy_histogram,
    in_one_piece,
    median_entropies,
    merge_pseudo_labels,
    normalised_entropy,
    only_organs,
    rule_out,
    without_islands,
)

KEY = {"n_classes": 3, "tau_old": 0.6, "tau_background": 0.8, "teacher": "abc"}
BELIEVED = by_confidence(0.6, 0.8)


def logits_of(probabilities):
    """(V, 2) probabilities -> (1, 2, 1, 1, V) logits."""
    return torch.log(torch.tensor(probabilities)).T.reshape(1, 2, 1, 1, -1)


def test_merge_by_hand():
    # sure old, unsure old, sure background, unsure background, and a new-class voxel where the teacher is sure
    logits = logits_of([[0.1, 0.9], [0.45, 0.55], [0.9, 0.1], [0.7, 0.3], [0.05, 0.95]])
    labels = torch.tensor([0, 0, 0, 0, 2]).reshape(1, 1, 1, 1, 5)
    merged = merge_pseudo_labels(labels, logits, by_confidence(0.6, 0.8), ignore_id=3)
    assert merged.flatten().tolist() == [1, 3, 0, 3, 2]
    assert merged.dtype == labels.dtype


def test_thresholds_of_zero_give_the_argmax_everywhere():
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 4, 5)
    labels = torch.zeros(2, 1, 4, 5, dtype=torch.int16)
    merged = merge_pseudo_labels(labels, logits, by_confidence(0.0, 0.0), ignore_id=4)
    assert torch.equal(merged[:, 0].long(), logits.argmax(1))


def test_a_confidence_at_the_threshold_is_believed():
    probabilities = torch.tensor([[[0.5, 0.75], [0.5, 0.25]]])
    assert by_confidence(0.5, 0.75)(probabilities, torch.tensor([[[1, 0]]])).all()


def test_labels_of_the_step_and_outside_are_never_overruled():
    labels = torch.tensor([-1, 2, 3]).reshape(1, 1, 1, 1, 3)
    merged = merge_pseudo_labels(labels, logits_of([[0.0001, 0.9999]] * 3), by_confidence(0.5, 0.5), ignore_id=3)
    assert torch.equal(merged, labels)


def test_what_is_known_not_to_be_there_is_ruled_out_and_the_rest_is_what_remains():
    logits = (
        torch.log(torch.tensor([[0.09, 0.9, 0.01], [0.2, 0.1, 0.7]])).T.reshape(1, 3, 1, 1, 2).repeat(2, 1, 1, 1, 1)
    )
    assert rule_out(logits, []) is logits
    assert rule_out(logits, [(), ()]) is logits
    found = torch.softmax(rule_out(logits, [(1,), ()]), 1)
    torch.testing.assert_close(found[0, :, 0, 0], torch.tensor([[0.9, 0.2 / 0.9], [0.0, 0.0], [0.1, 0.7 / 0.9]]))
    torch.testing.assert_close(found[1], torch.softmax(logits[1], 0))
    merged = merge_pseudo_labels(torch.zeros(2, 1, 1, 1, 2).long(), rule_out(logits, [(1,), ()]), BELIEVED, ignore_id=4)
    assert merged.flatten().tolist() == [0, 2, 1, 2], "background, or another old organ if the teacher says so"


def test_only_organs_never_takes_background_over():
    logits = logits_of([[0.1, 0.9], [0.45, 0.55], [0.99, 0.01]])
    merged = merge_pseudo_labels(torch.zeros(1, 1, 1, 1, 3).long(), logits, only_organs(BELIEVED), ignore_id=3)
    assert merged.flatten().tolist() == [1, 3, 3]


def test_entropy_is_0_for_a_sure_and_1_for_a_uniform_prediction():
    probabilities = torch.tensor([[1.0, 0.0, 0.0], [1 / 3, 1 / 3, 1 / 3], [0.5, 0.5, 0.0]]).T.reshape(1, 3, 3)
    expected = torch.tensor([0.0, 1.0, np.log(2) / np.log(3)])
    torch.testing.assert_close(normalised_entropy(probabilities)[0, 0], expected.float())


def test_entropy_thresholds_are_medians_by_decision_over_the_background_labels():
    torch.manual_seed(0)
    logits = 3 * torch.randn(1, 2, 4000)
    labels = torch.zeros(1, 1, 4000, dtype=torch.long)
    labels[..., 2000:] = 2  # new class: does not count
    thresholds = median_entropies(entropy_histogram(labels, logits))
    entropy = normalised_entropy(torch.softmax(logits, 1))[0, 0, :2000]
    decision = logits.argmax(1)[0, :2000]
    for c in range(2):
        assert abs(float(entropy[decision == c].median() - thresholds[c])) <= 0.2 / ENTROPY_BINS
    merged = merge_pseudo_labels(labels, logits, by_entropy(thresholds), ignore_id=3)[0, 0]
    assert (merged[2000:] == 2).all()
    for c in range(2):
        accepted = (merged[:2000] == c).sum() / (decision == c).sum()
        assert 0.49 < float(accepted) < 0.51


def test_the_median_entropy_is_interpolated_in_its_bin():
    histogram = torch.zeros(4, ENTROPY_BINS, dtype=torch.int64)
    histogram[0, [0, 7, 50]] = torch.tensor([10, 40, 10])  # half of 60 are 10 of bin 0 and 20 of the 40 of bin 7
    histogram[1, ENTROPY_BINS - 1] = 3
    histogram[2, [3, 9]] = 5  # half of them are those of bin 3
    torch.testing.assert_close(median_entropies(histogram), torch.tensor([0.075, 0.995, 0.04, 1e-3]))


def test_a_teacher_that_is_sure_of_everything_is_believed():
    logits = torch.tensor([20.0, -20.0]).reshape(1, 2, 1).expand(1, 2, 50)
    thresholds = median_entropies(entropy_histogram(torch.zeros(1, 1, 50).long(), logits))
    assert 1e-3 <= thresholds[0] <= 1 / ENTROPY_BINS
    merged = merge_pseudo_labels(torch.zeros(1, 1, 50).long(), logits, by_entropy(thresholds), ignore_id=3)
    assert (merged == 0).all()


def test_islands_of_a_class_in_one_piece_are_ignored_and_nothing_else_changes():
    merged = np.zeros((1, 5, 6, 6), np.int16)
    merged[0, 1:3, 1:3, 1:3] = 1
    merged[0, 3, 3, 3] = 1  # touches it by a corner
    merged[0, 4, 5, 4:6] = 1  # an island
    merged[0, 0, 0, :2], merged[0, 0, 5, :2] = 2, 2
    merged[0, 0, 3, 5] = 1  # the step's own label, which no teacher proposed
    merged[0, 4, 0] = 3
    is_proposed = np.ones(merged.shape, bool)
    is_proposed[0, 0, 3, 5] = False
    before, expected = merged.copy(), merged.copy()
    expected[0, 4, 5, 4:6] = 9
    confidence = np.full((1, 5, 6, 6), 0.6)
    confidence[0, 4, 5, 4:6] = 0.9
    np.testing.assert_array_equal(without_islands(merged, is_proposed, confidence, [1, 3], 9), expected)
    np.testing.assert_array_equal(merged, before)
    np.testing.assert_array_equal(without_islands(merged, is_proposed, confidence, [], 9), merged)
    np.testing.assert_array_equal(without_islands(merged, is_proposed & False, confidence, [1, 2, 3], 9), merged)


@pytest.mark.parametrize(
    ("size", "confident", "keeps"),
    [(3, 0.8, [True, False]), (4, 0.8, [False, True]), (4, 0.7875, [True, True]), (4, 0.7, [True, False])],
)
def test_of_components_of_like_size_the_most_confident_is_the_organ(size, confident, keeps):
    merged = np.zeros((1, 3, 3, 9), np.int16)
    confidence = np.full((1, 3, 3, 9), 0.7)
    first, second = (slice(None), 0, 0, slice(0, 8)), (slice(None), 2, 2, slice(0, size))
    merged[first] = merged[second] = 1
    confidence[first] = [0.55, 0.99] * 4
    confidence[second] = confident
    found = without_islands(merged, merged == 0, confidence, [1], 5)
    np.testing.assert_array_equal(found, merged, err_msg="what was not proposed stays")
    found = without_islands(merged, merged >= 0, confidence, [1], 5)
    assert [(found[where] == 1).all() for where in (first, second)] == keeps
    assert [(found[where] == 5).all() for where in (first, second)] == [not kept for kept in keeps]


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
    assert cache.fill(dataset, dataset.identifiers, teacher, BELIEVED, (4, 4, 4), with_annotated=True) == 2
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


def test_labels_that_an_earlier_step_ignored_stay_ignored(tmp_path, dataset):
    """Its id for them is that of a class which a later step learned."""
    dataset.cases["a"][1][0, :2] = 2  # ignored then, as that step had background and one class
    cache = PseudoLabelCache(tmp_path, KEY | {"ignored_from": 2})
    cache.fill(dataset, ["a"], teacher, BELIEVED, (4, 4, 4), with_annotated=True)
    seg, locations = cache.load("a")
    assert (np.asarray(seg[:])[0, :2] == KEY["n_classes"]).all()
    assert len(locations[2]) == 0


def test_a_class_is_in_one_piece_if_all_but_a_slip_of_the_pen_touches():
    labels = np.full((12, 12, 12), -1)
    labels[2:] = 0
    labels[2:6, :5, :5] = 1  # 100 voxels
    labels[6, 5, 5] = 1  # by a corner
    labels[10, 10, :5] = 1
    labels[8, 0, :9] = 2
    labels[10, 0, 0] = 2
    labels[3, 9, 9] = 4
    assert in_one_piece(labels, (1, 2, 3, 4, 9)) == {1: True, 2: False, 4: True}
    assert in_one_piece(labels, (1, 2), share=0.9) == {1: True, 2: True}
    assert in_one_piece(labels, (1,), share=0.96) == {1: False}


def test_cache_leaves_out_islands_of_classes_in_one_piece(tmp_path, dataset):
    def with_island(image):
        logits = teacher(image)
        logits[:, 5, 0, 0] = torch.tensor([0.0, 8.0])
        return logits

    fill = {"accepts": BELIEVED, "patch_size": (4, 4, 4), "with_annotated": False}
    for key, found in ((KEY, 1), (KEY | {"one_piece": [1]}, KEY["n_classes"])):
        cache = PseudoLabelCache(tmp_path, key)
        assert cache.fill(dataset, ["a"], with_island, **fill) == 1
        seg, locations = cache.load("a")
        seg = np.asarray(seg[:])[0]
        assert seg[5, 0, 0] == found
        assert (seg[2:4] == 1).all()
        assert len(locations[1]) == cache.counts(["a"])[1] == (seg == 1).sum()


def test_of_a_large_image_a_part_at_a_time_is_looked_at(tmp_path, dataset, monkeypatch):
    """Probabilities of all its voxels are as large as the logits, gigabytes for a CT."""
    logits, seen = torch.randn(3, 6, 6, 6, generator=torch.Generator().manual_seed(0)), []
    labels = torch.from_numpy(dataset.cases["a"][1])[None]

    def believed(probabilities, decision):
        seen.append(decision.numel())
        return BELIEVED(probabilities, decision)

    found = []
    for voxels in (1000, 80):
        monkeypatch.setattr(pseudo_labels, "VOXELS_AT_A_TIME", voxels)
        cache = PseudoLabelCache(tmp_path / f"{voxels}", KEY | {"n_classes": 4, "one_piece": [1]})
        cache.fill(dataset, ["a"], lambda image: logits, believed, (4, 4, 4), with_annotated=False)
        found.append([np.asarray(cache.load("a")[0][:]), entropy_histogram(labels, logits[None]).numpy()])
    for whole, in_parts in zip(*found, strict=True):
        np.testing.assert_array_equal(whole, in_parts)
    assert seen == [216, 72, 72, 72]
    assert {*np.unique(found[0][0])} == {0, 1, 2, 4}


def test_cache_is_made_once_a_label_file_teacher_and_setting(tmp_path, dataset):
    fill = {"accepts": BELIEVED, "patch_size": (4, 4, 4), "with_annotated": False}
    assert PseudoLabelCache(tmp_path, KEY).fill(dataset, ["a"], teacher, **fill) == 1
    assert PseudoLabelCache(tmp_path, KEY).fill(dataset, ["a"], teacher, **fill) == 0
    assert PseudoLabelCache(tmp_path, KEY | {"teacher": "other"}).fill(dataset, ["a"], teacher, **fill) == 1
    assert PseudoLabelCache(tmp_path, KEY | {"tau_old": 0.7}).fill(dataset, ["a"], teacher, **fill) == 1
    dataset.cases["a"][1][0, 0, 0, 0] = 0
    assert PseudoLabelCache(tmp_path, KEY).fill(dataset, ["a"], teacher, **fill) == 1


def test_cache_rules_out_what_a_case_labels_itself_and_is_made_anew_if_that_changes(tmp_path, dataset):
    fill = {"accepts": BELIEVED, "patch_size": (4, 4, 4), "with_annotated": False}
    dataset.cases["a"][1][0, 2] = 1  # an old organ, labelled
    cache = PseudoLabelCache(tmp_path, KEY)
    assert cache.fill(dataset, ["a", "b.c"], teacher, ruled_out={"a": (1,)}, **fill) == 2
    whole, known = (np.asarray(cache.load(case)[0][:])[0] for case in ("b.c", "a"))
    assert (whole[2:4] == 1).all()
    assert (known[2] == 1).all(), "its own label"
    assert (known[3:] == 0).all(), "where the teacher says organ, or does not know"
    assert cache.fill(dataset, ["a", "b.c"], teacher, ruled_out={"a": (1,)}, **fill) == 0
    assert cache.fill(dataset, ["a", "b.c"], teacher, **fill) == 1


def test_a_case_that_another_training_is_making_is_waited_for(tmp_path, dataset):
    fill = {"accepts": BELIEVED, "patch_size": (4, 4, 4), "with_annotated": False}
    cache, made = PseudoLabelCache(tmp_path, KEY), []
    other = Thread(target=lambda: made.append(cache.fill(dataset, ["a"], teacher, **fill)))

    def slow_teacher(image):
        other.start()
        other.join(0.5)
        return teacher(image)

    assert cache.fill(dataset, ["a"], slow_teacher, **fill) == 1
    other.join()
    assert made == [0]


@pytest.mark.faults("kill -9", "the same command goes on, and ends as if nothing had been", "unfinished epoch")
def test_interrupted_case_is_made_again(tmp_path, dataset):
    fill = {"accepts": BELIEVED, "patch_size": (4, 4, 4), "with_annotated": False}
    cache = PseudoLabelCache(tmp_path, KEY)

    def killed(image):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.fill(dataset, ["a"], killed, **fill)
    assert not cache.has("a", dataset.cases["a"][1])
    (cache.folder / "a_seg.b2nd").write_bytes(b"half")
    assert cache.fill(dataset, ["a"], teacher, **fill) == 1
    assert json.loads((cache.folder / "key.json").read_text(encoding="utf-8")) == KEY


def test_joined_datasets_keep_their_cases_apart(dataset):
    other = FakeDataset({"a": (np.ones(1), np.full(1, 7))})
    joined = JoinedDataset({"": dataset, "step1": other})
    assert joined.identifiers == ["a", "b.c", "step1__a"]
    assert joined.load_case("step1__a")[1][0] == 7
    assert joined.load_case("a")[1] is dataset.cases["a"][1]
