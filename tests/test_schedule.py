from __future__ import annotations

import json
import re
from dataclasses import FrozenInstanceError, fields
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nnunet_cil.schedule import (
    ABLATIONS,
    KEYS,
    METHOD_DEFAULTS,
    PlanOverride,
    Schedule,
    ScheduleError,
    Training,
    load_schedule,
)
from nnunet_cil.schedule.raw_datasets import cases_in

ROOT = Path(__file__).parents[1]
ORGANS = ("liver", "spleen", "right_kidney", "left_kidney")
SUBJECTS = ("s1", "s2", "s3")


def write_raw(folder: Path, labels=ORGANS, subjects=SUBJECTS, test_subjects=(), **changes) -> Path:
    """A raw dataset of empty files: a schedule looks at names only."""
    values = labels if isinstance(labels, dict) else {name: value for value, name in enumerate(labels, 1)}
    for part, names in (("Tr", subjects), ("Ts", test_subjects)):
        for kind, suffix in (("images", "_0000"), ("labels", "")):
            if names:
                (folder / f"{kind}{part}").mkdir(parents=True)
            for name in names:
                (folder / f"{kind}{part}" / f"{name}{suffix}.nii.gz").touch()
    content = {"channel_names": {"0": "CT"}, "labels": {"background": 0, **values}, "file_ending": ".nii.gz"}
    (folder / "dataset.json").write_text(json.dumps({**content, **changes}))
    return folder


@pytest.fixture
def raw(tmp_path, monkeypatch) -> Path:
    """nnUNet_raw with Dataset001_Organs."""
    folder = tmp_path / "raw"
    write_raw(folder / "Dataset001_Organs")
    monkeypatch.setenv("nnUNet_raw", str(folder))
    return folder


NUMBERS = {"mean": 1, "std": 2.5, "percentile_00_5": -1000, "percentile_99_5": 1500}
BASE = {"name": "chain", "source": "Dataset001_Organs", "steps": [["liver", "spleen"], ["right_kidney"]]}
OWN = {"name": "chain", "steps": [{"dataset": "Dataset001_Organs", "classes": ["liver"]}]}


def load(folder: Path, content: dict | str) -> Schedule:
    path = folder / "schedule.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False))
    return load_schedule(path)


def problems(folder: Path, content: dict | str) -> list[str]:
    with pytest.raises(ScheduleError) as caught:
        load(folder, content)
    lines = str(caught.value).splitlines()
    assert lines[0].startswith(f"{folder / 'schedule.yaml'}: ")
    return lines


def only_problem(folder: Path, content: dict | str) -> str:
    lines = problems(folder, content)
    assert len(lines) == 1, lines
    return lines[0].removeprefix(f"{folder / 'schedule.yaml'}: ")


def test_shortest_form_has_the_defaults(raw, tmp_path):
    schedule = load(tmp_path, BASE)
    assert schedule.source == raw / "Dataset001_Organs"
    assert [step.classes for step in schedule.steps] == [("liver", "spleen"), ("right_kidney",)]
    assert schedule.classes == ("liver", "spleen", "right_kidney")
    assert schedule.classes_until(1) == ("liver", "spleen")
    assert (schedule.images, schedule.configuration, schedule.folds) == ("shared", "3d_fullres", ("all",))
    assert (schedule.trainer, schedule.planner) == ("nnUNetTrainerPGCD", "ExperimentPlanner")
    assert (schedule.device, schedule.test, schedule.mirror_axes) == ("auto", (), None)
    assert schedule.plans == PlanOverride()
    assert schedule.training == Training()
    assert schedule.intensity.mode == "step1"
    assert schedule.method == METHOD_DEFAULTS
    with pytest.raises(FrozenInstanceError):
        schedule.name = "other"


def test_every_setting_arrives(raw, tmp_path):
    (tmp_path / "plans.json").write_text('{"plans_name": "a", "configurations": {}, "image_reader_writer": "b"}')
    schedule = load(
        tmp_path,
        {
            **BASE,
            "images": "disjoint",
            "configuration": "2d",
            "fold": [0, 1],
            "trainer": "nnUNetTrainerFinetune",
            "plans": {
                "patch_size": [64, 96],
                "batch_size": 4,
                "features_per_stage": [8, 16, 32],
                "spacing": [1, 0.5],
                "planner": "nnUNetPlannerResEncM",
                "base": "plans.json",
            },
            "intensity": {"given": {0: NUMBERS}},
            "mirror_axes": [0],
            "training": {
                "epochs": 3,
                "seed": None,
                "later_lr": 0.001,
                "deep_supervision": False,
                "validation_cases": 0,
            },
            "method": {"lambda_pgcd": 2, "old_prototypes": "transport", "class_balance": True},
            "dataset_id": 111,
            "device": "cpu",
        },
    )
    assert (schedule.images, schedule.configuration, schedule.folds) == ("disjoint", "2d", (0, 1))
    assert schedule.plans == PlanOverride((64, 96), 4, (8, 16, 32), (1.0, 0.5))
    assert (schedule.planner, schedule.base_plans) == ("nnUNetPlannerResEncM", tmp_path / "plans.json")
    assert (schedule.intensity.mode, schedule.intensity.given) == ("given", {"0": NUMBERS})
    assert schedule.training == Training(
        epochs=3, seed=None, later_lr=0.001, deep_supervision=False, validation_cases=0
    )
    changed = {"lambda_pgcd": 2, "old_prototypes": "transport", "class_balance": True}
    assert schedule.method == {**METHOD_DEFAULTS, **changed}
    assert (schedule.trainer, schedule.dataset_id, schedule.device) == ("nnUNetTrainerFinetune", 111, "cpu")
    assert schedule.mirror_axes == (0,)


def test_to_dict_is_json_without_our_paths(raw, tmp_path):
    (tmp_path / "split.json").write_text(json.dumps({"test": ["s1"]}))
    for content in ({**BASE, "test": "split.json"}, {**OWN, "test": [{"dataset": 1, "subjects": ["s1"]}]}):
        written = json.dumps(load(tmp_path, content).to_dict())
        assert str(tmp_path) not in written
        assert "Dataset001_Organs" in written
        assert json.loads(written)["test"] == content["test"]


@pytest.mark.parametrize("written", ["Dataset001_Organs", 1, "raw/Dataset001_Organs"])
def test_dataset_by_name_number_and_relative_path(raw, tmp_path, written):
    assert load(tmp_path, {**BASE, "source": written}).source == raw / "Dataset001_Organs"


def test_own_datasets_merge_and_drop(raw, tmp_path):
    write_raw(raw / "Dataset010_Liver", ("liver", "tumour", "vessel"))
    classes = {"liver": "liver", "tumour": "liver", "vessel": None}
    steps = [{"dataset": "Dataset010_Liver", "classes": classes}, {"dataset": 1, "classes": ["spleen"]}]
    first, second = load(tmp_path, {"name": "real", "steps": steps}).steps
    assert (first.classes, first.dataset, first.class_map) == (("liver",), raw / "Dataset010_Liver", classes)
    assert (second.classes, second.class_map) == (("spleen",), {"spleen": "spleen"})


def test_split_file_names_test_and_training_subjects(raw, tmp_path):
    (tmp_path / "split.json").write_text(json.dumps({"train": ["s1"], "test": ["s3"]}))
    schedule = load(tmp_path, {**BASE, "test": "split.json"})
    assert schedule.train_subjects == ("s1",)
    (test,) = schedule.test
    source = raw / "Dataset001_Organs"
    assert (test.images, test.labels, test.dataset) == (source / "imagesTr", source / "labelsTr", source)
    assert test.subjects == ("s3",)
    assert test.class_map == {name: name for name in ("liver", "spleen", "right_kidney")}
    assert test.values["left_kidney"] == 4


def test_split_file_may_leave_the_training_subjects_open(raw, tmp_path):
    (tmp_path / "split.json").write_text(json.dumps({"test": ["s3"]}))
    assert load(tmp_path, {**BASE, "test": "split.json"}).train_subjects is None


def test_subject_list(raw, tmp_path):
    (test,) = load(tmp_path, {**BASE, "test": ["s1", "s2"]}).test
    assert test.subjects == ("s1", "s2")


@pytest.mark.parametrize(("test_subjects", "part"), [(("t1",), "Ts"), ((), "Tr")])
def test_raw_dataset_as_test_set(raw, tmp_path, test_subjects, part):
    other = write_raw(raw / "Dataset002_Other", ("spleen", "liver"), test_subjects=test_subjects)
    (test,) = load(tmp_path, {**BASE, "test": "Dataset002_Other"}).test
    assert (test.images, test.labels, test.dataset) == (other / f"images{part}", other / f"labels{part}", other)
    assert test.subjects is None
    assert test.values == {"background": 0, "spleen": 1, "liver": 2}


def test_folder_pair_takes_the_values_of_the_source(raw, tmp_path):
    for name in ("images", "labels"):
        (tmp_path / name).mkdir()
    pair = {"images": "images", "labels": "labels"}
    (test,) = load(tmp_path, {**BASE, "test": pair}).test
    assert (test.images, test.labels, test.dataset) == (tmp_path / "images", tmp_path / "labels", None)
    assert test.values["right_kidney"] == 3
    (test,) = load(tmp_path, {**OWN, "test": pair}).test
    assert test.values == {"background": 0, "liver": 1}


def test_several_test_sets_with_maps(raw, tmp_path):
    write_raw(raw / "Dataset002_Other", ("hepar",))
    sets = [{"dataset": 1, "subjects": ["s2"]}, {"dataset": "Dataset002_Other", "classes": {"hepar": "liver"}}]
    first, second = load(tmp_path, {**OWN, "test": sets}).test
    assert (first.subjects, first.class_map) == (("s2",), {"liver": "liver"})
    assert (second.subjects, second.class_map) == (None, {"hepar": "liver"})


OLD_TOO = {
    "name": "real",
    "steps": [{"dataset": 1, "classes": ["liver"]}, {"dataset": 1, "classes": ["liver", "spleen"]}],
}
LACKING = "case,class\ns1,liver\ns2,3\ns1,spleen\n"
LACKED = {"s1": ("liver", "spleen"), "s2": ("right_kidney",)}


def test_labels_of_old_classes_may_be_named_beside_new_ones(raw, tmp_path):
    first, second = load(tmp_path, OLD_TOO).steps
    assert (first.classes, first.old_classes) == (("liver",), ())
    assert (second.classes, second.old_classes) == (("spleen",), ("liver",))
    assert load(tmp_path, OLD_TOO).classes == ("liver", "spleen")
    joined = {**OLD_TOO, "steps": [{**step, "joint": ["liver", "spleen"]} for step in OLD_TOO["steps"]]}
    assert load(tmp_path, joined).has_joint


@pytest.mark.parametrize("place", ["beside the schedule", "in the dataset", "by the agreed name", "as json"])
def test_cases_may_lack_labels(raw, tmp_path, place):
    key = {"unlabelled": "lacking.csv"}
    if place == "beside the schedule":
        (tmp_path / "lacking.csv").write_text(LACKING)
    elif place == "in the dataset":
        (raw / "Dataset001_Organs" / "lacking.csv").write_text(LACKING)
    elif place == "by the agreed name":
        (raw / "Dataset001_Organs" / "unlabelled.csv").write_text(LACKING)
        key = {}
    else:
        (raw / "Dataset001_Organs" / "unlabelled.json").write_text(json.dumps(LACKED))
        key = {}
    schedule = load(tmp_path, {**BASE, **key, "test": ["s2"]})
    assert schedule.unlabelled == schedule.test[0].unlabelled == LACKED
    step = {**OWN["steps"][0], **key}
    own = load(tmp_path, {**OWN, "steps": [step], "test": {"dataset": 1, "subjects": ["s1"]}})
    assert own.unlabelled == {}
    assert own.steps[0].unlabelled == own.test[0].unlabelled == LACKED, "a declaration holds for the test subjects too"


def test_a_test_set_may_declare_what_it_lacks(raw, tmp_path):
    (tmp_path / "lacking.csv").write_text(LACKING)
    write_raw(raw / "Dataset002_Other", ORGANS, test_subjects=("s1",))
    test = load(tmp_path, {**BASE, "test": {"dataset": 2, "unlabelled": "lacking.csv"}}).test[0]
    assert (test.unlabelled, test.images.name) == (LACKED, "imagesTs")
    pair = {"images": "raw/Dataset002_Other/imagesTr", "labels": "raw/Dataset002_Other/labelsTr"}
    assert load(tmp_path, {**BASE, "test": {**pair, "unlabelled": "lacking.csv"}}).test[0].unlabelled == LACKED
    assert load(tmp_path, {**BASE, "test": pair}).test[0].unlabelled == {}


def test_cases_of_a_dataset_that_lists_its_files_may_lack_labels(raw, tmp_path):
    files = {f"c{number}": {"images": ["a.nii.gz"], "label": "b.nii.gz"} for number in range(2)}
    (raw / "Dataset003_Listed").mkdir()
    write_raw(raw / "Dataset003_Listed", subjects=(), dataset=files)
    (tmp_path / "lacking.json").write_text('{"c1": ["liver"]}')
    assert load(tmp_path, {**BASE, "source": 3, "unlabelled": "lacking.json"}).unlabelled == {"c1": ("liver",)}


def test_what_steps_declare_of_one_dataset_holds_together_for_its_test_subjects_however_it_is_named(raw, tmp_path):
    for name, rows in (("a.csv", "s1,liver\ns2,liver"), ("b.csv", "s1,spleen")):
        (tmp_path / name).write_text(f"case,class\n{rows}\n")
    (tmp_path / "link").symlink_to(raw / "Dataset001_Organs")
    steps = [
        {"dataset": 1, "classes": ["liver"], "unlabelled": "a.csv"},
        {"dataset": str(raw / "Dataset001_Organs"), "classes": ["spleen"], "unlabelled": "b.csv"},
    ]
    test = {"dataset": "link", "subjects": ["s1", "s2"]}
    schedule = load(tmp_path, {"name": "chain", "steps": steps, "test": test})
    assert schedule.test[0].unlabelled == {"s1": ("liver", "spleen"), "s2": ("liver",)}


def test_a_label_that_is_given_by_number_and_by_name_is_refused(raw, tmp_path):
    steps = [{"dataset": 1, "classes": {1: "hepar", "liver": "organ"}}]
    line = only_problem(tmp_path, {"name": "chain", "steps": steps})
    assert "got the label liver twice, by number and by name, expected each label once" in line


def test_what_is_unlabelled_is_compared_by_its_content(raw, tmp_path):
    found = []
    for text in (LACKING, "case,class\ns2,right_kidney\ns1,spleen\ns1,liver\n", "case,class\ns1,liver\n"):
        (tmp_path / "lacking.csv").write_text(text)
        steps = [{**OWN["steps"][0], "unlabelled": "lacking.csv"}]
        found.append(
            (
                load(tmp_path, {**BASE, "unlabelled": "lacking.csv"}).to_dict()["unlabelled"],
                load(tmp_path, {**OWN, "steps": steps}).to_dict()["steps"][0]["unlabelled"],
            )
        )
    assert found[0] == found[1] != found[2]
    assert found[0][0].startswith("2 cases")
    assert "unlabelled" not in load(tmp_path, BASE).to_dict(), "as before there was the key"


def test_problems_of_what_is_unlabelled_are_told_at_once(raw, tmp_path):
    (tmp_path / "lacking.csv").write_text("case,class\ns9,liver\ns1,lung\ns8,background\n")
    lines = problems(tmp_path, {**BASE, "unlabelled": "lacking.csv"})
    assert len(lines) == 2
    assert "unlabelled: got 2 cases that do not exist: ['s8', 's9']" in lines[0]
    assert "unlabelled: got unknown labels ['background', 'lung']" in lines[1]


@pytest.mark.parametrize("case", ["scan_2020.é 1", "a_0000.b", "s1"])
def test_names_of_cases_end_where_channel_and_file_ending_begin(tmp_path, case):
    for name in (f"{case}_0000.nii.gz", f"{case}_0001.nii.gz"):
        (tmp_path / name).touch()
    assert cases_in(tmp_path) == {case}


def without(key: str) -> dict:
    return {k: v for k, v in BASE.items() if k != key}


BAD = {
    "unknown key": ({**BASE, "fodl": 0}, "fodl: got an unknown key .did you mean 'fold'.., expected one of name"),
    "unknown training key": ({**BASE, "training": {"epoch": 1}}, "training: epoch: got an unknown key .*'epochs'"),
    "unknown plans key": ({**BASE, "plans": {"batchsize": 1}}, "plans: batchsize: got an unknown key .*'batch_size'"),
    "unknown method key": ({**BASE, "method": {"lamda_pgcd": 1}}, "method: lamda_pgcd: .*'lambda_pgcd'"),
    "fusion": ({**BASE, "method": {"fusion": 1.5}}, "method: fusion: got 1.5, expected auto, a number from 0 to 1"),
    "temperature": ({**BASE, "method": {"lwf_temperature": 0}}, "lwf_temperature: got 0, expected a number above 0"),
    "tolerance": ({**BASE, "nsd_tolerance_mm": 0}, "nsd_tolerance_mm: got 0, expected a positive number"),
    "guard": (
        {**BASE, "guard": {"on_forgetting": "fail"}},
        "guard: on_forgetting: got 'fail', expected one of warn, stop",
    ),
    "share": ({**BASE, "guard": {"lost": 50}}, "guard: lost: got 50, expected a number from 0 to 1"),
    "variants as list": ({**BASE, "variants": ["a"]}, r"variants: got \['a'\], expected a mapping of names"),
    "empty variant": ({**BASE, "variants": {"a": {}}}, "variants: a: got {}, expected a mapping of settings"),
    "name of a variant": ({**BASE, "variants": {"a-b": {"eta": 0}}}, "variants: a-b: got 'a-b', expected lower-case"),
    "joint as trainer": (
        {**BASE, "trainer": "nnUNetTrainerJoint"},
        "trainer: got nnUNetTrainerJoint, expected the trainer of a method that goes step by step",
    ),
    "joint as variant": (
        {**BASE, "variants": {"joint_long": {"trainer": "nnUNetTrainerJoint"}}},
        "variants: joint_long: trainer: got nnUNetTrainerJoint, expected the trainer of a method that goes step",
    ),
    "variant that ends like a seed": (
        {**BASE, "variants": {"a": {"eta": 0.1}, "a_seed1": {"eta": 0.2}}},
        "variants: a_seed1: got 'a_seed1', expected a name that does not end like that of a seed",
    ),
    **{
        f"variant with {name}": (
            {**BASE, "variants": {name: {"eta": 0.1}}},
            f"{name}: got '{name}', expected a name without __",
        )
        for name in ("a__b", "a_")
    },
    "trainer with __": (
        {**BASE, "trainer": "nnUNetTrainer__A"},
        "trainer: got 'nnUNetTrainer__A', expected a name without",
    ),
    "variant like a seed": ({**BASE, "variants": {"seednone": {"eta": 0.1}}}, "variants: seednone: got 'seednone'"),
    "unknown variant key": ({**BASE, "variants": {"a": {"lambda": 0}}}, "variants: a: lambda: got an unknown key"),
    "variant without offline labels": (
        {**BASE, "method": {"class_balance": True}, "variants": {"a": {"pseudo_labels": False}}},
        "variants: a: class_balance: got true with pseudo_labels: off",
    ),
    "joint without all classes": (
        {"name": "chain", "steps": [{"dataset": 1, "classes": ["liver"], "joint": ["spleen"]}]},
        r"steps\[0\]: joint: got \['spleen'\], expected all classes of the steps: \['liver'\]",
    ),
    "unknown intensity key": (
        {
            **BASE,
            "intensity": {"given": {0: {"mean": 1, "std": 1, "percentile_00_5": 0, "percentile_99_5": 1, "mx": 2}}},
        },
        "intensity: given: 0: mx: got an unknown key .*'max'",
    ),
    "unknown step key": (
        {**OWN, "steps": [{**OWN["steps"][0], "clases": []}]},
        r"steps\[0\]: clases: got an unknown key .*'classes'",
    ),
    "unknown test key": ({**BASE, "test": {"dataset": 1, "subject": []}}, "test: subject: got an unknown key"),
    "no name": (without("name"), "name: got None, expected letters"),
    "name with a slash": ({**BASE, "name": "a/b"}, "name: got 'a/b', expected letters"),
    "images": ({**BASE, "images": "overlapped"}, "images: got 'overlapped', expected one of shared, disjoint"),
    "configuration": ({**BASE, "configuration": "3d"}, "configuration: got '3d', expected one of 2d, 3d_lowres"),
    "balance without offline labels": (
        {**BASE, "method": {"class_balance": True, "pseudo_labels": "online"}},
        "class_balance: got true with pseudo_labels: online, expected offline ones",
    ),
    "largest component of what": (
        {**BASE, "method": {"one_piece": "liver"}},
        "one_piece: got 'liver', expected auto, true, false or a list of classes",
    ),
    "largest component of an unknown class": (
        {**BASE, "variants": {"a": {"one_piece": ["liver", "lung"]}}},
        r"variants: a: one_piece: got \['lung'\], expected classes of the steps",
    ),
    "largest component of a patch": (
        {**BASE, "method": {"one_piece": True}, "variants": {"a": {"pseudo_labels": "online"}}},
        "variants: a: one_piece: got True with pseudo_labels: online, expected offline ones",
    ),
    "base plans of another kind": ({**BASE, "plans": {"base": "schedule.yaml"}}, "plans: base: got .*schedule.yaml"),
    "intensity of no channel": (
        {**BASE, "intensity": {"given": {"CT": NUMBERS}}},
        r"intensity: given: got channels \['CT'\], expected channel numbers",
    ),
    "half precision": (
        {**BASE, "device": "cpu", "training": {"amp": "float16"}},
        "training: amp: got float16 with device: cpu",
    ),
    "amp": ({**BASE, "training": {"amp": "fp16"}}, "amp: got 'fp16', expected one of auto, off, bfloat16, float16"),
    "device": ({**BASE, "device": "gpu"}, "device: got 'gpu', expected one of auto, cuda, cpu, mps"),
    "fold": ({**BASE, "fold": -1}, "fold: got -1, expected 'all'"),
    "fold twice": ({**BASE, "fold": [0, 0]}, r"fold: got \[0, 0\].*different"),
    "trainer": ({**BASE, "trainer": 3}, "trainer: got 3, expected text"),
    "dataset_id": ({**BASE, "dataset_id": 0}, "dataset_id: got 0, expected a number from 1"),
    "mirror axis": ({**BASE, "mirror_axes": [3]}, r"mirror_axes: got \[3\], expected different axes"),
    "mirror axis of 2d": ({**BASE, "configuration": "2d", "mirror_axes": [2]}, r"mirror_axes: got \[2\], expected"),
    "negative epochs": ({**BASE, "training": {"epochs": -1}}, "training: epochs: got -1, expected a positive number"),
    "epochs as text": ({**BASE, "training": {"epochs": "ten"}}, "training: epochs: got 'ten', expected"),
    "true is no number": ({**BASE, "training": {"epochs": True}}, "training: epochs: got True, expected"),
    "learning rate": ({**BASE, "training": {"initial_lr": 0}}, "training: initial_lr: got 0, expected a positive"),
    "training no mapping": ({**BASE, "training": 5}, "training: got 5, expected a mapping with the keys epochs"),
    "method choice": ({**BASE, "method": {"pseudo_labels": "no"}}, "pseudo_labels: got 'no', expected one of offline"),
    "method number": ({**BASE, "method": {"w_max": "3"}}, "method: w_max: got '3', expected a number"),
    "method stride": (
        {**BASE, "method": {"voxel_stride": 0}},
        "method: voxel_stride: got 0, expected a whole number from 1 on",
    ),
    "no voxel": ({**BASE, "method": {"n_min": 0}}, "method: n_min: got 0, expected a whole number from 1 on"),
    "no patch": ({**BASE, "method": {"ewc_patches": 0}}, "ewc_patches: got 0, expected a whole number from 1 on"),
    "method count": ({**BASE, "method": {"n_min": 2.5}}, "method: n_min: got 2.5, expected a whole number"),
    "method share": ({**BASE, "method": {"mu": 1.5}}, "method: mu: got 1.5, expected a number from 0 to 1"),
    "method switch": ({**BASE, "method": {"class_balance": 1}}, "class_balance: got 1, expected true or false"),
    "intensity": ({**BASE, "intensity": "step2"}, "intensity: got 'step2', expected one of step1, whole_image"),
    "intensity without numbers": ({**BASE, "intensity": "given"}, "intensity: got 'given' without numbers"),
    "intensity lacks": (
        {**BASE, "intensity": {"given": {0: {"mean": 1, "std": 1}}}},
        r"intensity: given: 0: got no number for \['percentile_00_5', 'percentile_99_5'\]",
    ),
    "intensity text": (
        {**BASE, "intensity": {"given": {0: {**NUMBERS, "max": "x"}}}},
        "intensity: given: 0: max: got 'x', expected a number",
    ),
    "number too large": ({**BASE, "plans": {"spacing": [10**400, 1, 1]}}, "got no valid YAML: .* more than 64 bits"),
    "not a number": ({**BASE, "training": {"later_lr": float("nan")}}, "later_lr: got nan, expected a positive number"),
    "patch axes": ({**BASE, "plans": {"patch_size": [8, 8]}}, "plans: patch_size: got 2 numbers, expected 3"),
    "spacing axes": ({**BASE, "plans": {"spacing": [1.0] * 4}}, "plans: spacing: got 4 numbers, expected 3"),
    "patch of 2d": (
        {**BASE, "configuration": "2d", "plans": {"patch_size": [8, 8, 8]}},
        "plans: patch_size: got 3 numbers, expected 2",
    ),
    "negative patch": ({**BASE, "plans": {"patch_size": [8, -8, 8]}}, "plans: patch_size: got .*positive"),
    "two stages": ({**BASE, "plans": {"features_per_stage": [8, 16]}}, "got 2 stages, expected at least 3"),
    "batch size": ({**BASE, "plans": {"batch_size": 0}}, "plans: batch_size: got 0, expected a positive number"),
    "base plans": ({**BASE, "plans": {"base": "no.json"}}, "plans: base: got no file .*no.json"),
    "no steps": (without("steps"), "steps: got None, expected a list with the classes"),
    "empty steps": ({**BASE, "steps": []}, r"steps: got \[\], expected a list"),
    "empty step": ({**BASE, "steps": [["liver"], []]}, r"steps\[1\]: got \[\], expected a list of at least one"),
    "step of numbers": (
        {**BASE, "steps": [[1, 2]]},
        r"steps\[0\]: got \[1, 2\], expected class names \(text\) such as liver, not label numbers",
    ),
    "label number of a step": (
        {**OWN, "steps": [{"dataset": 1, "classes": {1: "liver", 9: "left_kidney"}}]},
        r"steps\[0\]: classes: got the label 9, expected one of 1 liver, 2 spleen, 3 right_kidney, 4 left_kidney\.$",
    ),
    "unknown class": (
        {**BASE, "steps": [["livr"]]},
        r"steps\[0\]: got unknown class 'livr' \(did you mean 'liver'\?\), expected one of \['left_kidney', 'liver'",
    ),
    "unknown own class": (
        {**OWN, "steps": [{"dataset": 1, "classes": {"lever": "liver"}}]},
        r"steps\[0\]: classes: got unknown class 'lever'",
    ),
    "class in two steps": (
        {**BASE, "steps": [["liver"], ["spleen", "liver"]]},
        r"steps\[1\]: got class 'liver' that steps\[0\] has already",
    ),
    "class twice in a step": (
        {**BASE, "steps": [["liver", "liver"]]},
        r"steps\[0\]: got class 'liver' that steps\[0\]",
    ),
    "own class twice": ({**OWN, "steps": [{"dataset": 1, "classes": ["liver"] * 2}]}, "classes: got a name twice"),
    "background": ({**BASE, "steps": [["background"]]}, r"steps\[0\]: got 'background', expected a class"),
    "ignore": (
        {**OWN, "steps": [{"dataset": 1, "classes": {"liver": "ignore"}}]},
        r"steps\[0\]: got 'ignore', expected a class",
    ),
    "old classes only": (
        {"name": "real", "steps": [{"dataset": 1, "classes": ["liver"]}, {"dataset": 1, "classes": ["liver"]}]},
        r"steps\[1\]: got class 'liver' that steps\[0\] has already, expected at least one new class",
    ),
    "unlabelled nowhere": ({**BASE, "unlabelled": "no.csv"}, "unlabelled: got no file .*no.csv"),
    "unlabelled no file": ({**BASE, "unlabelled": ["liver"]}, r"unlabelled: got \['liver'\], expected a path"),
    "unlabelled of another kind": (
        {**BASE, "unlabelled": "schedule.yaml"},
        "unlabelled: got .*columns.*a CSV with the",
    ),
    "unlabelled without source": ({**OWN, "unlabelled": "no.csv"}, "unlabelled: got the key without a source"),
    "unlabelled of a step": (
        {**OWN, "steps": [{**OWN["steps"][0], "unlabelled": "no.csv"}]},
        r"steps\[0\]: unlabelled: got no file .*no.csv",
    ),
    "unlabelled of a folder pair": (
        {**BASE, "test": {"images": "raw", "labels": "raw", "unlabelled": 3}},
        "test: unlabelled: got 3, expected a path",
    ),
    "all dropped": (
        {**OWN, "steps": [{"dataset": 1, "classes": {"liver": None}}]},
        "got no class, expected at least one",
    ),
    "no dataset": (without("source"), r"steps\[0\]: got classes without a dataset, expected `source`"),
    "source beside datasets": ({**OWN, "source": 1}, "source: got a source beside steps with datasets"),
    "images beside datasets": ({**OWN, "images": "shared"}, "images: got images beside steps with datasets"),
    "mixed steps": (
        {**BASE, "steps": [["liver"], {"dataset": 1, "classes": ["spleen"]}]},
        "with and without a dataset",
    ),
    "missing source": ({**BASE, "source": "nowhere"}, "source: got no folder .*nowhere, expected a raw dataset;"),
    "missing name": (
        {**BASE, "source": "Dataset001_Organ"},
        "source: got no folder .*/Dataset001_Organ, expected a raw dataset; nnUNet_raw has Dataset001_Organs.$",
    ),
    "missing number": (
        {**BASE, "source": 77},
        "source: got 0 datasets of number 77 in .*, expected exactly one; nnUNet_raw has Dataset001_Organs.$",
    ),
    "no home": ({**BASE, "source": "~nobody_of_that_name/x"}, "source: got .*nobody_of_that_name"),
    "too long a path": ({**BASE, "source": "x" * 5000}, "source: got .*expected a"),
    "missing split": ({**BASE, "test": "no.json"}, "test: got no file .*no.json"),
    "missing test folder": ({**BASE, "test": {"images": "no", "labels": "raw"}}, "test: images: got no folder .*no,"),
    "missing test labels": ({**BASE, "test": {"images": "raw"}}, "test: labels: got None, expected a path"),
    "unknown subject": ({**BASE, "test": ["s1", "s9"]}, r"test: got 1 subjects that do not exist: \['s9'\]"),
    "subject twice": ({**BASE, "test": ["s1", "s1"]}, r"test: got \['s1'\] twice"),
    "subjects without source": ({**OWN, "test": ["s1"]}, "test: got subjects without a source"),
    "no subjects": ({**BASE, "test": []}, r"test: subjects: got \[\], expected a list of subject names"),
    "test class unknown": (
        {**BASE, "test": {"dataset": 1, "classes": {"liver": "hepar"}}},
        r"test: classes: got \['hepar'\], expected classes of the steps",
    ),
    "test label unknown": (
        {**BASE, "test": {"images": "raw", "labels": "raw", "classes": {"hepar": "liver"}}},
        r"test: classes: got unknown labels .'hepar'",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(raw, tmp_path, case):
    content, pattern = BAD[case]
    lines = problems(tmp_path, content)
    assert any(re.search(pattern, line) for line in lines), lines
    assert not any(line.endswith("..") or "?." in line for line in lines), lines


@pytest.mark.parametrize(
    "test", [["s1"], "split.json", {"images": "raw", "labels": "raw", "classes": {"liver": "liver", "lung": None}}]
)
def test_a_source_that_is_not_there_is_told_once(raw, tmp_path, monkeypatch, test):
    """A split file and labels that may be those of the source are no mistakes of their own."""
    assert only_problem(tmp_path, {**BASE, "source": "no", "test": test}).startswith("source: got ")
    monkeypatch.delenv("nnUNet_raw")
    assert only_problem(tmp_path, {**BASE, "test": test}).startswith("source: got ")


def test_some_of_many_datasets_are_named(raw, tmp_path):
    for number in range(2, 9):
        (raw / f"Dataset{number:03d}_M").mkdir()
    shown = only_problem(tmp_path, {**BASE, "source": "no"})
    assert shown.endswith(
        "; nnUNet_raw has Dataset001_Organs, Dataset002_M, Dataset003_M, Dataset004_M, Dataset005_M and 3 more."
    )


def test_labels_of_the_first_version_of_nnunet_are_called_so(raw, tmp_path):
    labels = {str(number): name for number, name in enumerate(("background", *ORGANS, *"abcdefghijkl"))}
    path = raw / "Dataset001_Organs" / "dataset.json"
    path.write_text(json.dumps({"labels": labels, "modality": {"0": "CT"}}))
    first, second = (line.split(": source: ")[1] for line in problems(tmp_path, BASE))
    assert first.startswith(f"{path}: labels: got {{'0': 'background', '1': 'liver', ")
    assert first.endswith(' ..., expected name: number as in nnU-Net v2 ({"background": 0, "liver": 1}).')
    assert second == f"got {path} without channel_names, file_ending, expected nnU-Net's dataset.json."


def test_broken_json_is_told_in_one_sentence(raw, tmp_path):
    path = raw / "Dataset001_Organs" / "dataset.json"
    path.write_text('{"labels": ')
    shown = only_problem(tmp_path, BASE)
    assert shown.startswith(f"source: {path}: got no JSON that can be read (Expecting value")
    assert shown.endswith("), expected nnU-Net's dataset.json.")
    assert shown.count("expected") == 1


def test_all_problems_at_once(raw, tmp_path):
    content = {
        "name": "a b",
        "source": 1,
        "fodl": 0,
        "images": "both",
        "training": {"epochs": -1, "epoch": 3},
        "plans": {"patch_size": [1], "features_per_stage": [1]},
        "test": ["s9"],
        "steps": [["liver"], [], ["liver", "lung"]],
    }
    lines = problems(tmp_path, content)
    expected = ("name: ", "fodl: ", "images: ", "training: epoch: ", "training: epochs: ", "plans: patch_size: ")
    expected += ("plans: features_per_stage: ", "test: ", "steps[1]: ", "steps[2]: ")
    for key in expected:
        assert any(line.startswith(f"{tmp_path / 'schedule.yaml'}: {key}") for line in lines), key
    assert len(lines) == len(expected) + 1  # steps[2]: liver again, and lung


def test_raw_folder_unset(raw, tmp_path, monkeypatch):
    monkeypatch.delenv("nnUNet_raw")
    assert "got 'Dataset001_Organs' while nnUNet_raw is not set" in only_problem(tmp_path, BASE)
    assert load(tmp_path, {**BASE, "source": "raw/Dataset001_Organs"}).source == raw / "Dataset001_Organs"


@pytest.mark.parametrize("folder", ["imagesTr", "labelsTr"])
def test_incomplete_dataset(raw, tmp_path, folder):
    (raw / "Dataset001_Organs" / folder).rename(tmp_path / "away")
    assert f"without {folder}, expected a raw dataset" in only_problem(tmp_path, BASE)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("{", "nnU-Net's dataset.json"),
        ("[]", "nnU-Net's dataset.json"),
        ('{"labels": {"background": 0}}', "channel_names"),
        ('{"labels": {"liver": 1}, "channel_names": {}, "file_ending": ".mha"}', "background"),
        (
            '{"labels": {"background": 0, "a": "x"}, "channel_names": {}, "file_ending": ".mha"}',
            "dataset.json: labels: got {'background': 0, 'a': 'x'}, expected name: number as in nnU-Net v2",
        ),
        ('{"labels": null, "channel_names": {}, "file_ending": ".mha"}', "labels: got None, expected name: number"),
        (
            '{"labels": {"background": 0, "a": 1}, "channel_names": {}, "file_ending": ".mha",'
            ' "dataset": {"s1": {"images": 3, "label": "s1.mha"}}}',
            "images and label of each case under dataset",
        ),
        ('{"labels": {"background": 0, "a": 1, "b": 1}, "channel_names": {}, "file_ending": ".mha"}', "value twice"),
        (
            '{"labels": {"background": 0, "a": [1, 2]}, "channel_names": {}, "file_ending": ".mha"}',
            "Region-based training is not supported yet",
        ),
    ],
)
def test_bad_dataset_json(raw, tmp_path, text, part):
    (raw / "Dataset001_Organs" / "dataset.json").write_text(text)
    lines = problems(tmp_path, {**BASE, "steps": [["a"]]})
    assert any("source: " in line and part in line for line in lines), lines


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("[", "JSON object with the key 'test'"),
        ("[]", "JSON object with the key 'test'"),
        ('{"train": ["s1"]}', "'test'"),
        ('{"test": [1]}', "subjects must be names"),
        pytest.param(
            '{"test": ["s1"], "train": ["s1", "s2"]}',
            "['s1'] as test and as training subjects",
            marks=pytest.mark.faults("case present twice", "a subject in both lists is refused", "nothing"),
        ),
        ('{"test": ["s1"], "train": ["s8"]}', "['s8']"),
    ],
)
def test_bad_split_file(raw, tmp_path, text, part):
    (tmp_path / "split.json").write_text(text)
    assert part in only_problem(tmp_path, {**BASE, "test": "split.json"})


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("name: a\nname: b\n", "'name' twice, expected it once"),
        ("steps:\n- classes: {liver: liver, liver: null}\n", "'liver' twice"),
        ("name: [\n", "line 2"),
        ("name: a\n  b: c: d\n", "line 2"),
        ("? [a]\n: b\n", "expected text"),
        ("name: 2001-99-99\n", "no valid YAML"),
        ("!!map name\n", "no valid YAML"),
        ("", "got NoneType, expected a mapping"),
        ("- a\n", "got list, expected a mapping"),
    ],
)
def test_bad_yaml(tmp_path, text, part):
    assert part in "\n".join(problems(tmp_path, text))


def test_duplicate_key_names_its_line(tmp_path):
    assert "line 2" in "\n".join(problems(tmp_path, "name: a\nname: b\n"))


def test_dataset_json_that_is_a_folder(raw, tmp_path):
    (raw / "Dataset001_Organs" / "dataset.json").unlink()
    (raw / "Dataset001_Organs" / "dataset.json").mkdir()
    assert "expected nnU-Net's dataset.json" in only_problem(tmp_path, BASE)


def test_deep_nesting_is_no_valid_yaml(tmp_path):
    assert "no valid YAML" in only_problem(tmp_path, "[" * 5000)


def test_file_that_is_no_text(tmp_path):
    (tmp_path / "schedule.yaml").write_bytes(b"name: \xff\xfe\x00")
    with pytest.raises(ScheduleError, match="no valid YAML"):
        load_schedule(tmp_path / "schedule.yaml")


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no.yaml: got no file, expected a schedule"):
        load_schedule(tmp_path / "no.yaml")


def test_merge_keys_may_be_overridden(raw, tmp_path):
    text = yaml.safe_dump(BASE) + "plans: {<<: {batch_size: 2, patch_size: [8, 8, 8]}, batch_size: 3}\n"
    assert load(tmp_path, text).plans == PlanOverride((8, 8, 8), 3)


def test_yaml_off_and_short_exponents_mean_what_they_look_like(raw, tmp_path):
    """YAML 1.1 reads ``off`` as false and ``1e-3`` as text."""
    text = yaml.safe_dump(BASE) + "method: {pseudo_labels: off}\ntraining: {later_lr: 1e-3}\n"
    schedule = load(tmp_path, text)
    assert schedule.method["pseudo_labels"] == "off"
    assert schedule.training.later_lr == 1e-3


NESTED_KEYS = [f.name for f in fields(Training)] + [f.name for f in fields(PlanOverride)] + list(METHOD_DEFAULTS)
WORDS = st.sampled_from(
    [*ORGANS, *SUBJECTS, "background", "all", "given", "off", "Dataset001_Organs", "raw", "x.json", "~", "~no/x", "2d"]
)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | WORDS | st.dates()
NAMES = st.sampled_from([*NESTED_KEYS, "dataset", "classes", "subjects", "images", "labels", "given", "base", *ORGANS])
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(NAMES | st.integers(0, 2) | st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=8,
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=5))
def test_any_values_load_or_raise_schedule_error(raw, tmp_path, changes):
    text = yaml.safe_dump({**BASE, **changes})
    try:
        schedule = load(tmp_path, text)
    except ScheduleError:
        return
    json.dumps(schedule.to_dict())


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(alphabet="ab01:-[]{}!&*?\"'|>#,\n \\<", max_size=30))
def test_any_text_raises_schedule_error(tmp_path, text):
    with pytest.raises(ScheduleError):
        load(tmp_path, text)


def test_variants_change_what_they_name(tmp_path, raw):
    variants = {"strong": {"lambda_pgcd": 3}, "other": {"trainer": "nnUNetTrainerPLOP", "fusion": "auto"}}
    schedule = load(tmp_path, {**BASE, "method": {"lambda_pgcd": 2}, "variants": variants})
    assert schedule.variants == variants
    assert schedule.method["lambda_pgcd"] == 2


def test_every_ablation_changes_known_settings_and_no_two_are_the_same():
    for name, changes in ABLATIONS.items():
        assert changes, name
        beside = {"class_balance"} if name == "no_pseudo_labels" else set()  # cannot be on without pseudo-labels
        assert all(METHOD_DEFAULTS[key] != value for key, value in changes.items() if key not in beside), name
        assert set(changes) <= set(METHOD_DEFAULTS), name
    assert len({tuple(sorted(changes.items())) for changes in ABLATIONS.values()}) == len(ABLATIONS)


def test_joint_needs_a_source_or_a_map_in_every_step(raw, tmp_path):
    write_raw(raw / "Dataset002_Other", labels=("hepar", "lien"))
    first = {"dataset": 1, "classes": ["liver"]}
    second = {"dataset": 2, "classes": {"lien": "spleen"}, "joint": {"hepar": "liver", "lien": "spleen"}}
    assert load(tmp_path, BASE).has_joint
    assert not load(tmp_path, {"name": "chain", "steps": [first, second]}).has_joint
    whole = load(tmp_path, {"name": "chain", "steps": [{**first, "joint": ["liver", "spleen"]}, second]})
    assert whole.has_joint
    assert whole.to_dict()["steps"][1]["joint"] == second["joint"]
