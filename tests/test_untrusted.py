"""Names that lead nowhere else, and JSON within bounds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nnunet_cil import untrusted
from nnunet_cil.chain import NUMBERS_LOCK, Chain
from nnunet_cil.cli.main import main
from nnunet_cil.convert import msd
from nnunet_cil.convert.source import SEEDED, Case, PublicSet, Written, numbered
from nnunet_cil.convert.write import write_dataset
from nnunet_cil.dataset import prepare_chain
from nnunet_cil.evaluate import collect_scores, write_matrices
from nnunet_cil.nnunet_api import training_cases
from nnunet_cil.report.write import write_report
from nnunet_cil.schedule import ScheduleError, load_schedule
from nnunet_cil.untrusted import MAX_DEPTH, check_extent, is_ending, is_inside, is_name, parse_json, read_json
from tests.conftest import write_schedule, write_tiny_dataset
from tests.convert.made_up import make_msd
from tests.report.chain_files import open_chain, write_chain
from tests.test_schedule import BASE, only_problem, raw, write_raw  # noqa: F401  (a fixture)

OUTSIDE = ("", ".", "..", "../x", "/x", "a/b", "a\\b", "a\0", "a\n", "-rf", ".x", " x", "x.", "x" * 151, "é" * 76)
RESERVED = ("con", "NUL", "Aux.nii.gz", "com1", "LPT9.txt")
GOOD = ("case_01", "Case 1", "a..b", "é" * 75, "x" * 150, "a-b", "1", "console", "[1]*")


@pytest.mark.parametrize("name", [*OUTSIDE, *RESERVED, "\ud800", "\u202etxt", None, 3, ["a"]])
def test_no_name(name):
    assert not is_name(name)


@pytest.mark.parametrize("name", GOOD)
def test_name(name):
    assert is_name(name)


def test_endings_and_paths():
    assert all(map(is_ending, (".nii.gz", ".mha", ".b2nd", ".tif")))
    assert not any(map(is_ending, ("", "nii", ".", "..", "./x", ".nii.gz/../x", "." + "x" * 9, None, ".a.b.c.d")))
    assert all(map(is_inside, ("a", "./imagesTr/a.nii.gz", "a/b/c")))
    assert not any(map(is_inside, ("", ".", "/", "/a", "..", "a/../b", "a/..", "-a", "a/\0", None, 3)))


def test_json_that_is_too_deep_too_large_or_none():
    assert parse_json(b'{"a": NaN}', "f", "e").keys() == {"a"}
    deep = "[" * MAX_DEPTH + "]" * MAX_DEPTH
    for text, message in (
        ("[1]", r"f: got list, expected e\."),
        ("{", "got no JSON"),
        (b"\xff{}", "got no JSON"),
        (f'{{"a": {deep}}}', f"more than {MAX_DEPTH} levels"),
        ("[" * 10**5, "got no JSON"),
        (f'{{"a": {2**64}}}', "more than 64 bits"),
        (f'{{"a": {"1" * 5000}}}', "got no JSON"),
    ):
        with pytest.raises(ValueError, match=message):
            parse_json(text, "f", "e")
    with pytest.raises(ValueError, match="more than 10 bytes"):
        parse_json('{"a": "12345"}', "f", "e", max_bytes=10)
    with pytest.raises(ValueError, match="more than 3 entries"):
        check_extent([[1], [1], [1]], max_entries=3)


@pytest.mark.parametrize("text", ['{"a": [1, 1, 1]}', '{"a": [[], []]}', '{"a": [{}, {}]}', b'{"a": [[], []]}'])
def test_json_of_too_many_entries_is_refused_before_they_are_made(monkeypatch, text):
    monkeypatch.setattr(untrusted, "MAX_JSON_ENTRIES", 4)
    assert parse_json('{"a": [1, 1]}', "f", "e") == {"a": [1, 1]}
    monkeypatch.setattr(untrusted, "MAX_JSON_ENTRIES", 3)
    monkeypatch.setattr(untrusted.json, "loads", lambda text: pytest.fail("it was parsed"))
    with pytest.raises(ValueError, match="more than 3 entries"):
        parse_json(text, "f", "e")


def test_json_of_a_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="got no file, expected plans"):
        read_json(tmp_path / "a.json", "plans")
    (tmp_path / "a.json").write_text('{"a": 1}')
    assert read_json(tmp_path / "a.json", "plans") == {"a": 1}


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{after}: &{after} [{', '.join([f'*{before}'] * 9)}]\n"
    for before, after in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, "more than 100000 entries"),
        ("steps: &a [*a]", f"more than {MAX_DEPTH} levels"),
        ("steps: " + "[" * 500, "got no valid YAML"),
        ("training: {epochs: 0x" + "f" * 5000 + "}", "more than 64 bits"),
        ("#" * 1_000_001, "more than 1000000 bytes"),
    ],
)
def test_yaml_that_would_exhaust_memory(tmp_path, text, message):
    (tmp_path / "s.yaml").write_text(text)
    with pytest.raises(ScheduleError, match=message):
        load_schedule(tmp_path / "s.yaml")


@pytest.mark.parametrize("name", [name for name in OUTSIDE if name and name.count("\n") == 0])
def test_names_in_a_schedule(raw, tmp_path, name):  # noqa: F811
    assert only_problem(tmp_path, {**BASE, "name": name}).startswith("name: got ")
    assert "variants: " in only_problem(tmp_path, {**BASE, "variants": {name: {"lambda_pgcd": 1}}})
    assert only_problem(tmp_path, {**BASE, "trainer": name}).startswith("trainer: got ")
    assert "planner: got " in only_problem(tmp_path, {**BASE, "plans": {"planner": name}})
    assert "1 subjects that do not exist" in only_problem(tmp_path, {**BASE, "test": [name]})
    for key in ("plans_name", "data_identifier"):
        plans = {"plans_name": "a", "image_reader_writer": "b", "configurations": {"3d_fullres": {}}}
        (plans if key == "plans_name" else plans["configurations"]["3d_fullres"])[key] = name
        (tmp_path / "plans.json").write_text(json.dumps(plans))
        assert f"got plans with {key} " in only_problem(tmp_path, {**BASE, "plans": {"base": "plans.json"}})


@pytest.mark.parametrize("name", [name for name in OUTSIDE if name])
def test_names_of_cases_that_a_dataset_lists(raw, tmp_path, name):  # noqa: F811
    listed = {name: {"images": ["a.nii.gz"], "label": "b.nii.gz"}}
    folder = write_raw(raw / "Dataset002_Listed", dataset=listed)
    assert "names of cases" in only_problem(tmp_path, {"name": "a", "source": 2, "steps": [["liver"]]})
    with pytest.raises(ValueError, match="got the case"):
        training_cases(folder)
    content = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
    (folder / "dataset.json").write_text(json.dumps({**content, "dataset": {}, "file_ending": f"/{name}"}))
    assert "file_ending" in only_problem(tmp_path, {"name": "a", "source": 2, "steps": [["liver"]]})


@pytest.mark.parametrize("name", [name for name in OUTSIDE if name])
def test_names_of_a_public_set(tmp_path, nnunet_folders, name):
    before = sorted(tmp_path.rglob("*"))

    def found(case: str) -> PublicSet:
        cases = (Case(case, "a", (tmp_path / "a",), (tmp_path / "b",)), Case("b", "a", (), ()))
        return PublicSet("Set", ("CT",), numbered(["liver"]), cases, frozenset(), SEEDED, "", "", lambda *_: Written())

    with pytest.raises(ValueError, match="got the subject"):
        write_dataset(found(name), 5)
    with pytest.raises(ValueError, match="twice"):
        write_dataset(found("b"), 5)
    with pytest.raises(ValueError, match="--name: got"):
        write_dataset(found("a"), 5, name)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("file", ["../outside.nii.gz", "/outside.nii.gz", "imagesTr/../../x", "", 3])
def test_files_of_a_task_lie_in_it(tmp_path, file):
    task = make_msd(tmp_path)
    content = json.loads((task / "dataset.json").read_text(encoding="utf-8"))
    content["training"][0]["image"] = file
    (task / "dataset.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="not in the task's folder"):
        msd.find(task)


def files_beside(root: Path, *own: Path) -> set[Path]:
    return {path for path in root.rglob("*") if path.is_file() and not any(path.is_relative_to(o) for o in own)}


def test_no_file_is_named_after_a_class(tmp_path, nnunet_folders):
    """So a class may have any name: data are prepared, scores and a report are written, all in the chain's folders."""
    steps = (("../x", "/a/b"), ("-rf $\\frac",))
    chain = open_chain(tmp_path, steps)
    variants = write_chain(chain, methods=("pgcd",))
    before = files_beside(tmp_path, chain.folder)
    write_matrices(chain, collect_scores(chain, variants)[0])
    write_report(chain, variants)
    assert files_beside(tmp_path, chain.folder) == before
    source = write_tiny_dataset(tmp_path / "other")
    content = json.loads((source / "dataset.json").read_text(encoding="utf-8"))
    content["labels"] = {"background": 0, "../x": 1, "/a/b": 2}
    (source / "dataset.json").write_text(json.dumps(content))
    path = write_schedule(tmp_path / "prepared.yaml", source, name="prepared")
    path.write_text(path.read_text(encoding="utf-8").replace("[ball]", "['../x']").replace("[blob]", "['/a/b']"))
    prepared = Chain.open(load_schedule(path))
    before = files_beside(tmp_path)
    prepare_chain(prepared, [prepared.variant("pgcd", 0)])
    own = [folder for root in prepared.paths.values() for folder in root.glob("*_prepared*")]
    own.append(prepared.paths["nnUNet_results"] / NUMBERS_LOCK)
    assert files_beside(tmp_path, *own) == before


def test_an_extension_is_not_written_elsewhere(tmp_path, monkeypatch, capsys):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert main(["extend", "model", "--with", "new", "--classes", "a", "--name", "../x"]) == 1
    assert "--name: got '../x'" in capsys.readouterr().err
    assert [path.name for path in tmp_path.rglob("*")] == ["here"]


def test_verify_does_not_follow_a_name(tmp_path, nnunet_folders, capsys):
    path = Path(tmp_path, "s.yaml")
    path.write_text("name: ../../x\n")
    assert main(["verify", str(path)]) == 1
    assert "got no name" in capsys.readouterr().err
