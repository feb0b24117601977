"""docs/schedule.md: its examples load, and its tables and messages are those of the code."""

from __future__ import annotations

import ast
import json
import re
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from nnunet_cil.schedule import (
    KEYS,
    METHOD_DEFAULTS,
    Guard,
    Intensity,
    Launcher,
    PlanOverride,
    Schedule,
    ScheduleError,
    Training,
    load_schedule,
)
from nnunet_cil.schedule.method import METHOD_CHOICES
from nnunet_cil.schedule.settings import (
    AMP_CHOICES,
    CONFIGURATIONS,
    DEVICES,
    INTENSITY_KEYS,
    INTENSITY_MODES,
    ON_FORGETTING,
    OPTIONAL_INTENSITY_KEYS,
)
from tests.test_given_model import write_model

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "schedule.md").read_text(encoding="utf-8")
ABDOMEN = ("liver", "spleen", "right_kidney", "left_kidney")
MINIMAL = {"name": "minimal", "source": "Dataset001_Abdomen", "steps": [["liver", "spleen"], ["right_kidney"]]}
RAW = {
    "Dataset001_Abdomen": ABDOMEN,
    "Dataset002_OtherHospital": ("hepar", "lien", "cyst", "spleen"),
    "Dataset010_Liver": ("liver", "tumour", "vessel"),
    "Dataset011_Pancreas": ("pancreas",),
}
SUBJECTS = {"Dataset002_OtherHospital": ("case_11", "case_12")}


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def tables() -> list[dict[str, tuple[str, str]]]:
    """Each table of keys: key -> type and range, default."""
    found = []
    for table in re.findall(r"^\| key \| type and range \| default \| meaning \|\n\|[-|]+\n((?:\|.*\n)+)", PAGE, re.M):
        rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table.splitlines()]
        assert all(len(row) == 4 for row in rows), rows
        assert len({row[0] for row in rows}) == len(rows)
        found.append({row[0].strip("`| "): (row[1], row[2]) for row in rows})
    return found


TABLES = tables()
REQUIRED = {"required": MISSING, "none": None}


def written(default: str) -> Any:
    return REQUIRED[default] if default in REQUIRED else yaml.safe_load(default.strip("`"))


def defaults_of(cls: type) -> dict[str, Any]:
    return {f.name: f.default for f in fields(cls)}


def top_level_defaults() -> dict[str, Any]:
    known = defaults_of(Schedule)
    (fold,) = known["folds"]
    no_fields = ("plans", "training", "method", "variants", "unlabelled", "guard", "launcher", "model_fold")
    known |= dict.fromkeys(no_fields)
    known |= {"fold": fold, "test": known["test"] or None, "intensity": Intensity().mode}
    return {key: known[key] for key in KEYS}


GIVEN = dict.fromkeys(INTENSITY_KEYS, 1)
OWN_STEP = {"dataset": 1, "classes": ["liver"]}
OWN = {"source": None, "steps": [OWN_STEP]}
EXPECTED = {  # what follows "got an unknown key" is checked against a schedule with the key "no_key" in this place
    "step": (
        {"dataset": MISSING, "classes": MISSING, "joint": None, "unlabelled": None},
        {**OWN, "steps": [{**OWN_STEP, "no_key": 0}]},
    ),
    "test set": (
        {"dataset": MISSING, "subjects": None, "classes": None, "unlabelled": None},
        {"test": {"dataset": 1, "no_key": 0}},
    ),
    "folder pair": (
        {"images": MISSING, "labels": MISSING, "classes": None, "unlabelled": None},
        {"test": {"images": "test_images", "labels": "test_labels", "no_key": 0}},
    ),
    "top level": (top_level_defaults(), {"no_key": 0}),
    "plans": (
        {**defaults_of(PlanOverride), "planner": defaults_of(Schedule)["planner"], "base": None},
        {"plans": {"no_key": 0}},
    ),
    "intensity": (
        dict.fromkeys(INTENSITY_KEYS, MISSING) | dict.fromkeys(OPTIONAL_INTENSITY_KEYS),
        {"intensity": {"given": {0: {**GIVEN, "no_key": 0}}}},
    ),
    "training": (defaults_of(Training), {"training": {"no_key": 0}}),
    "method": (dict(METHOD_DEFAULTS), {"method": {"no_key": 0}}),
    "guard": (defaults_of(Guard), {"guard": {"no_key": 0}}),
    "launcher": ({**defaults_of(Launcher), "setup": None, "sbatch": None}, {"launcher": {"no_key": 0}}),
}
BY_NAME = dict(zip(EXPECTED, TABLES, strict=True))
CHOICES = {
    ("top level", "images"): ("shared", "disjoint"),
    ("top level", "configuration"): CONFIGURATIONS,
    ("top level", "intensity"): INTENSITY_MODES,
    ("top level", "device"): DEVICES,
    ("training", "amp"): AMP_CHOICES,
    ("guard", "on_forgetting"): ON_FORGETTING,
    **{("method", key): choices for key, choices in METHOD_CHOICES.items()},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where the page's schedules find what they name; raw datasets hold empty files."""
    folder = tmp_path_factory.mktemp("page")
    (split,) = blocks("json")
    (folder / "split.json").write_text(split)
    (unlabelled,) = blocks("csv")
    (folder / "unlabelled.csv").write_text(unlabelled)
    named = [name for names in json.loads(split).values() for name in names]
    for dataset, labels in RAW.items():
        for part, ending in (("imagesTr", "_0000.nii.gz"), ("labelsTr", ".nii.gz")):
            (folder / "raw" / dataset / part).mkdir(parents=True)
            for subject in SUBJECTS.get(dataset, named):
                (folder / "raw" / dataset / part / f"{subject}{ending}").touch()
        values = {"background": 0, **{name: value for value, name in enumerate(labels, 1)}}
        content = {"channel_names": {"0": "CT"}, "labels": values, "file_ending": ".nii.gz"}
        (folder / "raw" / dataset / "dataset.json").write_text(json.dumps(content))
    for name in ("test_images", "test_labels"):
        (folder / name).mkdir()
    write_model(folder / "results" / "nnUNetTrainer__nnUNetPlans__3d_fullres")
    return folder


@pytest.fixture
def load(folder, tmp_path, monkeypatch):
    """Loads a text as schedule, beside links to what ``folder`` holds; missing keys come from MINIMAL."""
    monkeypatch.setenv("nnUNet_raw", str(folder / "raw"))
    for path in folder.iterdir():
        (tmp_path / path.name).symlink_to(path)

    def load_text(text: str) -> Schedule:
        given = yaml.safe_load(text) or {}
        missing = {} if {"name", "steps"} <= set(given) else {k: v for k, v in MINIMAL.items() if k not in given}
        path = tmp_path / "schedule.yaml"
        path.write_text(text + "\n" + (yaml.safe_dump(missing) if missing else ""))
        return load_schedule(path)

    return load_text


@pytest.mark.parametrize("block", blocks("yaml"), ids=lambda block: block.splitlines()[0])
def test_every_example_loads(load, block):
    load(block)


def test_every_raw_dataset_of_the_examples_is_used():
    examples = "\n".join(blocks("yaml"))
    assert [name for name in RAW if name not in examples and f"dataset: {int(name[7:10])}\n" not in examples] == []


@pytest.mark.parametrize("name", EXPECTED)
def test_tables_have_the_keys_and_defaults_of_the_code(load, name):
    expected, bad = EXPECTED[name]
    assert {key: written(default) for key, (_, default) in BY_NAME[name].items()} == expected
    with pytest.raises(ScheduleError, match="no_key: got an unknown key") as caught:
        load(yaml.safe_dump(bad))
    (line,) = [line for line in str(caught.value).splitlines() if "no_key" in line]
    assert set(line.split("expected one of ")[1].rstrip(".").split(", ")) == set(expected)


@pytest.mark.parametrize(("name", "key"), CHOICES, ids=lambda part: part)
def test_tables_name_all_choices(name, key):
    assert set(re.findall("`(.*?)`", BY_NAME[name][key][0])) == set(CHOICES[name, key])


def test_a_written_out_default_changes_nothing(load):
    minimal = replace(load(""), raw={})
    for name in ("top level", "plans", "training", "method", "guard", "launcher"):
        for key, (_, default) in BY_NAME[name].items():
            if default not in REQUIRED:
                inner = f"{key}: {default.strip('`')}"
                text = inner if name == "top level" else f"{name}: {{{inner}}}"
                assert replace(load(text), raw={}) == minimal, text


def templates() -> str:
    """All texts of the package, a NUL for each inserted value; arguments of ``problem`` as it puts them together."""

    def text_of(node: ast.expr) -> str:
        if isinstance(node, ast.JoinedStr):
            return "".join(text_of(part) for part in node.values)
        return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else "\0"

    texts = []
    for path in (ROOT / "nnunet_cil").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "problem" and len(node.args) == 3:
                key, got, expected = map(text_of, node.args)
                texts.append(f"{key}: got {got}, expected {expected}.")
            elif isinstance(node, (ast.Constant, ast.JoinedStr)):
                texts.append(text_of(node))
    return "\n".join(texts)


def test_quoted_messages_are_those_of_the_code():
    section = PAGE.split("\n## Error messages\n")[1]
    quoted = re.findall(r"^- `(.+?)`", section, re.MULTILINE)
    assert len(quoted) > 20
    known = templates()
    assert [(m, part) for m in quoted for part in m.split("...") if part.strip() not in known] == []


def test_links_lead_to_headings():
    headings = re.findall(r"^#+ (.*)$", PAGE, re.MULTILINE)
    anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    assert set(re.findall(r"\]\(#(.*?)\)", PAGE)) <= anchors
