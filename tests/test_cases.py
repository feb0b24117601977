"""Which images a step trains on, which are held out, and where the label values of each go."""

from __future__ import annotations

from dataclasses import replace

import pytest

from nnunet_cil.cases import disjoint_parts, held_out_cases, joint_cases, step_cases
from nnunet_cil.schedule import load_schedule
from nnunet_cil.step_files import write_json
from tests.conftest import write_tiny_dataset
from tests.datasets import cut, lacking, relabelling, write_own_datasets, write_reversed


def names_of(cases) -> list[str]:
    return [case.name for case in cases]


def test_shared_steps_have_the_same_cases_with_labels_of_their_own(source, tmp_path):
    first, second = (step_cases(cut(source, tmp_path), step) for step in (1, 2))
    assert names_of(first) == names_of(second) == ["case_0", "case_1", "case_2"]
    assert [(case.images, case.label) for case in first] == [(case.images, case.label) for case in second]
    assert first[1].images == (source / "imagesTr" / "case_1_0000.nii.gz",)
    assert first[1].label == source / "labelsTr" / "case_1.nii.gz"
    assert (first[0].table, first[0].labelled) == ({0: 0, 1: 1, 2: 0}, (1,))
    assert (second[0].table, second[0].labelled) == ({0: 0, 1: 0, 2: 2}, (2,))


def test_train_list_of_the_split_file_is_respected(source, tmp_path):
    write_json(tmp_path / "split.json", {"train": ["case_2", "case_0"], "test": ["case_3"]})
    schedule = cut(source, tmp_path, test=f"test: {tmp_path}/split.json")
    assert names_of(step_cases(schedule, 2)) == ["case_0", "case_2"]
    assert names_of(joint_cases(schedule)) == ["case_0", "case_2"]


@pytest.mark.parametrize(
    ("test", "expected"),
    [("test: [case_0, case_2]", ["case_1", "case_3"]), ("", ["case_0", "case_1", "case_2", "case_3"])],
    ids=["named", "no-test"],
)
def test_all_but_the_test_subjects_are_for_training(source, tmp_path, test, expected):
    assert names_of(step_cases(cut(source, tmp_path, test=test), 1)) == expected


def test_test_subjects_stay_out_when_their_dataset_is_named_by_another_path(source, tmp_path):
    (tmp_path / "link").symlink_to(source)
    schedule = cut(source, tmp_path, test=f"test: [{{dataset: {tmp_path}/link, subjects: [case_1]}}]")
    assert names_of(step_cases(schedule, 1)) == ["case_0", "case_2", "case_3"]


def test_test_images_given_as_a_folder_of_the_source_are_not_for_training(source, tmp_path):
    test = f"test: {{images: {source}/imagesTr, labels: {source}/labelsTr}}"
    assert step_cases(cut(source, tmp_path, test=test), 1) == []


def test_disjoint_steps_share_no_case_and_leave_none_out(source, tmp_path):
    schedule = cut(source, tmp_path, images="disjoint")
    first, second = (names_of(step_cases(schedule, step)) for step in (1, 2))
    assert sorted(first + second) == ["case_0", "case_1", "case_2"]
    assert {len(first), len(second)} == {1, 2}
    assert [first, second] == disjoint_parts(["case_0", "case_1", "case_2"], 2, seed=0)


def test_disjoint_steps_follow_the_schedules_seed(source, tmp_path):
    schedule = cut(source, tmp_path, images="disjoint", test="test: [case_3]")
    dealt = {
        tuple(names_of(step_cases(replace(schedule, training=replace(schedule.training, seed=seed)), 1)))
        for seed in range(3)
    }
    expected = {tuple(disjoint_parts(["case_0", "case_1", "case_2"], 2, seed)[0]) for seed in range(3)}
    assert dealt == expected
    assert len(dealt) > 1


@pytest.mark.parametrize(("n_names", "n_parts"), [(12, 3), (11, 3), (2, 2), (1, 2), (0, 2)])
def test_disjoint_parts_cover_all_once_in_even_sizes(n_names, n_parts):
    names = [f"case_{i:02d}" for i in range(n_names)]
    parts = disjoint_parts(names, n_parts, seed=3)
    assert sorted(name for part in parts for name in part) == names
    assert len(parts) == n_parts
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert all(part == sorted(part) for part in parts)


def test_disjoint_parts_are_drawn_by_seed():
    names = [f"case_{i:02d}" for i in range(12)]
    assert disjoint_parts(names, 3, 0) == disjoint_parts(names, 3, 0)
    assert disjoint_parts(names, 3, 0) != disjoint_parts(names, 3, 1)
    assert disjoint_parts(names, 3, 0) != [names[:4], names[4:8], names[8:]]


def test_ignore_label_is_the_last_of_each_step(tmp_path):
    schedule = cut(write_tiny_dataset(tmp_path / "source", n_cases=2, ignore=True), tmp_path)
    tables = [step_cases(schedule, step)[0].table for step in (1, 2)]
    assert tables == [{0: 0, 1: 1, 2: 0, 3: 2}, {0: 0, 1: 0, 2: 2, 3: 3}]


def test_own_datasets_merge_and_drop_labels_and_leave_test_subjects_out(tmp_path):
    schedule = write_own_datasets(tmp_path)
    first, second = (step_cases(schedule, step) for step in (1, 2))
    assert names_of(first) == names_of(second) == ["case_0", "case_1"]
    assert {case.label.parent.parent.name for case in first} == {"one"}
    assert {case.label.parent.parent.name for case in second} == {"two"}
    assert (first[0].table, first[0].labelled) == ({0: 0, 1: 1, 2: 1}, (1,))
    assert (second[0].table, second[0].labelled) == ({0: 0, 1: 0, 2: 2}, (2,))


@pytest.mark.parametrize("images", ["shared", "disjoint"])
def test_joint_has_all_cases_with_all_labels(source, tmp_path, images):
    schedule = load_schedule(write_reversed(tmp_path / "cases.yaml", source, images=images))
    cases = joint_cases(schedule)
    assert names_of(cases) == ["case_0", "case_1", "case_2"]
    assert (cases[0].table, cases[0].labelled) == ({0: 0, 1: 2, 2: 1}, (1, 2))


def test_joint_is_refused_for_datasets_of_their_own(tmp_path):
    with pytest.raises(ValueError, match=r"own.yaml: --methods: got 'joint' .*learned as background"):
        joint_cases(write_own_datasets(tmp_path))


def test_joint_of_own_datasets_with_maps_has_all_cases_under_names_of_their_own(nnunet_folders, tmp_path):
    write_own_datasets(tmp_path)
    path = tmp_path / "own.yaml"
    tests, steps = path.read_text(encoding="utf-8").split("steps:")
    path.write_text(f"{tests}steps:{steps.replace('}}', '}, joint: {ball: lump, blob: blob}}')}")
    cases = joint_cases(load_schedule(path))
    assert names_of(cases) == ["case_0", "case_1", "step2_case_0", "step2_case_1"]
    assert [case.label.parent.parent.name for case in cases] == ["one", "one", "two", "two"]
    assert {str(dict(case.table)) for case in cases} == {"{0: 0, 1: 1, 2: 2}"}


def test_what_a_case_lacks_becomes_background_in_it_and_is_not_among_its_labels(source, tmp_path):
    extra = lacking("case_0,ball\ncase_1,2\ncase_3,blob\n", tmp_path / "a.csv")
    schedule = cut(source, tmp_path, extra=extra)
    first, second = (step_cases(schedule, step) for step in (1, 2))
    assert [case.labelled for case in first] == [(), (1,), (1,)]
    assert [case.labelled for case in second] == [(2,), (), (2,)]
    assert (first[0].table, first[1].table) == ({0: 0, 1: 0, 2: 0}, {0: 0, 1: 1, 2: 0})
    assert second[1].table == {0: 0, 1: 0, 2: 0}
    assert [(case.table, case.labelled) for case in joint_cases(schedule)] == [
        ({0: 0, 1: 0, 2: 2}, (2,)),
        ({0: 0, 1: 1, 2: 0}, (1,)),
        ({0: 0, 1: 1, 2: 2}, (1, 2)),
    ]
    (number, tested), *_ = held_out_cases(schedule).values()
    assert (number, tested.table, tested.labelled) == (0, {0: 0, 1: 1, 2: 0}, (1,))


def test_what_two_steps_declare_of_one_dataset_holds_in_both_and_in_joint(tmp_path):
    write_tiny_dataset(tmp_path / "one", n_cases=3)
    (tmp_path / "ball.csv").write_text("case,class\ncase_0,ball\n")
    (tmp_path / "blob.csv").write_text("case,class\ncase_1,blob\n")
    common = {"dataset": "one", "joint": ["ball", "blob"]}
    steps = [
        {**common, "classes": ["ball"], "unlabelled": "ball.csv"},
        {**common, "classes": ["ball", "blob"], "unlabelled": "blob.csv"},
    ]
    write_json(tmp_path / "own.yaml", {"name": "own", "device": "cpu", "steps": steps})
    schedule = load_schedule(tmp_path / "own.yaml")
    for cases in (joint_cases(schedule), step_cases(schedule, 2)):
        assert [case.labelled for case in cases] == [(2,), (1,), (1, 2)]
    assert [case.labelled for case in step_cases(schedule, 1)] == [(), (1,), (1,)]


def test_joint_has_the_cases_of_a_dataset_once_however_it_is_named(tmp_path):
    write_tiny_dataset(tmp_path / "one", n_cases=2)
    (tmp_path / "link").symlink_to(tmp_path / "one")
    steps = [{"dataset": d, "classes": [c], "joint": ["ball", "blob"]} for d, c in (("one", "ball"), ("link", "blob"))]
    write_json(tmp_path / "own.yaml", {"name": "own", "device": "cpu", "steps": steps})
    assert names_of(joint_cases(load_schedule(tmp_path / "own.yaml"))) == ["case_0", "case_1"]


def test_old_classes_that_new_data_label_are_kept_but_where_a_case_lacks_them(tmp_path):
    schedule = relabelling(tmp_path, "case_1,ball\ncase_2,blob\n")
    assert [step.classes for step in schedule.steps] == [("lump",), ("blob",)]
    cases = step_cases(schedule, 2)
    assert [case.labelled for case in cases] == [(1, 2), (2,), (1,)]
    assert [case.table for case in cases] == [{0: 0, 1: 1, 2: 2}, {0: 0, 1: 0, 2: 2}, {0: 0, 1: 1, 2: 0}]
    assert {case.name: case.labelled for case in joint_cases(schedule)} == {
        "case_0": (1, 2),
        "case_1": (1, 2),
        "step2_case_0": (1, 2),
        "step2_case_1": (2,),
        "case_2": (1,),
    }
