"""A given model, as folder or zip, is read without unpickling, refused where it does not do, and extended."""

from __future__ import annotations

import json
import shutil
import stat
import zipfile
from argparse import Namespace
from pathlib import Path
from time import monotonic, sleep

import pytest
import torch
import yaml

from nnunet_cil import nnunet_api
from nnunet_cil.chain import Chain
from nnunet_cil.cli import extend
from nnunet_cil.cli.main import main
from nnunet_cil.dataset import prepare_chain
from nnunet_cil.driver import prepare, run, status, variants_of, write_report
from nnunet_cil.export import card_text, export_model, read_card
from nnunet_cil.given_model import check_plans, read_model
from nnunet_cil.guard import read_checks
from nnunet_cil.prototypes import PrototypeStore
from nnunet_cil.schedule import ScheduleError, load_schedule
from nnunet_cil.step_files import write_json
from nnunet_cil.teacher import load_teacher
from tests.conftest import write_schedule, write_tiny_dataset
from tests.fuzz import test_files as fuzz
from tests.test_trainer import fold_of, make_chain, module_patch, train  # noqa: F401  (a fixture)

MODEL = "nnUNetTrainer__nnUNetPlans__3d_fullres"
LABELS = {"background": 0, "liver": 1, "spleen": 2}


def write_model(folder: Path, labels=LABELS, folds=("all",), plans=None) -> Path:
    """What ``read_model`` looks at; checkpoints are no checkpoints."""
    folder.mkdir(parents=True)
    plans = {"plans_name": "nnUNetPlans", "configurations": {"3d_fullres": {}}} if plans is None else plans
    (folder / "plans.json").write_text(json.dumps(plans))
    content = {"labels": labels, "channel_names": {"0": "MR"}, "file_ending": ".nii.gz"}
    (folder / "dataset.json").write_text(json.dumps(content))
    for fold in folds:
        (folder / f"fold_{fold}").mkdir()
        (folder / f"fold_{fold}" / "checkpoint_final.pth").write_bytes(f"weights {fold}".encode())
    return folder


def packed(folder: Path, inside: str = "Dataset001_X/") -> Path:
    path = folder.with_name("model.zip")
    with zipfile.ZipFile(path, "w") as zipped:
        for file in folder.rglob("*"):
            if file.is_file():
                zipped.write(file, f"{inside}{folder.name}/{file.relative_to(folder).as_posix()}")
    return path


def test_a_zip_with_crossval_predictions_is_read(tmp_path):
    folder = write_model(tmp_path / "a" / MODEL, folds=(0, 1))
    predictions = (
        folder / "crossval_results_folds_0_1"
    )  # with -exp_cv_preds nnU-Net packs these, with plans of their own
    predictions.mkdir()
    for name in ("plans.json", "dataset.json"):
        shutil.copyfile(folder / name, predictions / name)
    model = read_model(packed(folder))
    assert (model.name, model.folds) == (MODEL, (0, 1))


@pytest.mark.parametrize("as_zip", [False, True])
def test_a_model_is_read_and_installed(tmp_path, as_zip):
    folder = write_model(tmp_path / "a" / MODEL, folds=(0, 3))
    (folder / "fold_0" / "prototypes.npz").write_bytes(b"prototypes")
    (folder / "fold_0" / "debug.json").write_text("{}")
    model = read_model(packed(folder) if as_zip else folder)
    assert (model.name, model.configuration) == (MODEL, "3d_fullres")
    assert model.classes == ("liver", "spleen")
    assert model.folds == (0, 3)
    model.install(tmp_path / "target" / MODEL, [0, 3])
    installed = tmp_path / "target" / MODEL
    files = {path.relative_to(installed).as_posix() for path in installed.rglob("*") if path.is_file()}
    assert files == {
        "plans.json",
        "dataset.json",
        "fold_0/checkpoint_final.pth",
        "fold_0/prototypes.npz",
        "fold_3/checkpoint_final.pth",
    }
    assert (tmp_path / "target" / MODEL / "fold_3" / "checkpoint_final.pth").read_bytes() == b"weights 3"


def test_an_only_fold_teaches_any_fold_but_several_only_their_own(tmp_path):
    assert read_model(write_model(tmp_path / "one" / MODEL, folds=(2,))).fold_for("all") == 2
    several = read_model(write_model(tmp_path / "two" / MODEL, folds=(0, 1)))
    assert several.fold_for(1) == 1
    with pytest.raises(ValueError, match=r"folds \[0, 1\], expected fold 'all'.*`model_fold: 0`"):
        several.fold_for("all")


BAD = {
    "nothing there": (lambda root: root / "none", "got nothing there"),
    "no plans": (lambda root: (root / "empty").mkdir() or root / "empty", "got 0 folders with a plans.json"),
    "other name": (lambda root: write_model(root / "model"), "a model folder named 'model'"),
    "no fold": (lambda root: write_model(root / MODEL, folds=()), "no fold_X/checkpoint_final.pth"),
    "regions": (lambda root: write_model(root / MODEL, {"background": 0, "whole": [1, 2]}), "[Rr]egion"),
    "gap in labels": (lambda root: write_model(root / MODEL, {"background": 0, "a": 1, "b": 3}), "labels 1, 2"),
    "no labels": (lambda root: write_model(root / MODEL, {"background": 0}), "labels 1, 2"),
    "plans of another name": (
        lambda root: write_model(root / MODEL, plans={"plans_name": "../x", "configurations": {"3d_fullres": {}}}),
        r"plans with plans_name '\.\./x'",
    ),
    "plans that fill the memory": (
        lambda root: write_model(root / MODEL, plans={"plans_name": "nnUNetPlans", "x": [[]] * 1_300_000}),
        r"plans.json: got no JSON that can be read \(more than 5000000 bytes\)",
    ),
    "configuration": (
        lambda root: write_model(root / MODEL, plans={"plans_name": "nnUNetPlans", "configurations": {"2d": {}}}),
        "not among .'2d'.",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_model_is_refused(tmp_path, case):
    make, message = BAD[case]
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        read_model(make(tmp_path))


def test_zips_that_are_none_hold_two_models_or_broken_json_are_refused(tmp_path):
    text = tmp_path / "text.zip"
    text.write_text("no zip")
    with pytest.raises(ValueError, match="got no zip"):
        read_model(text)
    two = packed(write_model(tmp_path / "a" / MODEL))
    with zipfile.ZipFile(two, "a") as zipped:
        zipped.writestr(f"other/{MODEL}/plans.json", "{}")
    with pytest.raises(ValueError, match="got 2 folders"):
        read_model(two)
    broken = tmp_path / "broken.zip"
    with zipfile.ZipFile(broken, "w") as zipped:
        zipped.writestr(f"{MODEL}/plans.json", "{")
        zipped.writestr(f"{MODEL}/fold_0/checkpoint_final.pth", "")
    with pytest.raises(ValueError, match="no JSON"):
        read_model(broken)


def entry(name: str, kind: int = 0, method: int = zipfile.ZIP_STORED) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo("x")
    info.filename = info.orig_filename = name
    info.external_attr, info.compress_type = kind << 16, method
    return info


REFUSED = {
    "traversal": (entry(f"Dataset001_X/{MODEL}/../../../escaped"), "stay in its folder"),
    "only upwards": (entry(".."), "stay in its folder"),
    "absolute": (entry("/etc/escaped"), "stay in its folder"),
    "absolute on Windows": (entry("C:/escaped"), "stay in its folder"),
    "backslashes": (entry("a\\..\\escaped"), "stay in its folder"),
    "no name": (entry("a//b"), "stay in its folder"),
    "link": (entry("escaped", stat.S_IFLNK | 0o777), "a link or device"),
    "device": (entry("escaped", stat.S_IFBLK), "a link or device"),
    "pipe": (entry("escaped", stat.S_IFIFO), "a link or device"),
    "there already": (entry(f"Dataset001_X/{MODEL}/plans.json"), "twice, expected each file once"),
    "bzip2": (entry("a", method=zipfile.ZIP_BZIP2), "another method than deflate"),
}


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_zip_that_could_write_elsewhere_is_refused_whole(tmp_path, kind, capsys):
    """Also where only cards and digests are read."""
    info, message = REFUSED[kind]
    path = packed(write_model(tmp_path / "a" / MODEL))
    with zipfile.ZipFile(path, "a") as zipped:
        zipped.writestr(info, "x")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=message):
        read_model(path)
    for command in ("info", "verify"):
        assert main([command, str(path)]) == 1
        assert message in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def test_names_with_a_null_byte_encrypted_and_too_large_zips_are_refused(tmp_path, monkeypatch):
    path = packed(write_model(tmp_path / "a" / MODEL))
    content = path.read_bytes()
    at = content.index(b"PK\1\2")  # the first entry of the central directory
    encrypted = content[: at + 8] + b"\1" + content[at + 9 :]
    null = content.replace(b"dataset.json", b"dataset\0json")
    for changed, message in ((encrypted, "encrypted"), (null, "stay in its folder")):
        path.write_bytes(changed)
        with pytest.raises(ValueError, match=message):
            read_model(path)
    path.write_bytes(content)
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as zipped:
        zipped.writestr("zeros", bytes(10**6))
    monkeypatch.setattr("nnunet_cil.given_model.SMALL_BYTES", 10**4)
    with pytest.raises(ValueError, match="bytes unpacked from"):
        read_model(path)
    monkeypatch.setattr("nnunet_cil.given_model.SMALL_BYTES", 10**8)
    assert read_model(path).classes == ("liver", "spleen")
    monkeypatch.setattr("nnunet_cil.given_model.MAX_BYTES", 10**5)
    with pytest.raises(ValueError, match="expected at most 100000"):
        read_model(path)


def test_what_macos_adds_to_a_zip_does_not_matter(tmp_path):
    path = packed(write_model(tmp_path / "a" / MODEL))
    with zipfile.ZipFile(path, "a") as zipped:
        zipped.writestr(f"__MACOSX/Dataset001_X/{MODEL}/._plans.json", "x")
        zipped.mkdir(f"Dataset001_X/{MODEL}/empty") if hasattr(zipped, "mkdir") else None
    assert read_model(path).name == MODEL


def test_a_damaged_zip_leaves_nothing_behind(tmp_path):
    path = packed(write_model(tmp_path / "a" / MODEL))
    content = path.read_bytes()
    path.write_bytes(content.replace(b"weights all", b"weights nil"))
    with pytest.raises(ValueError, match="got a damaged zip"):
        read_model(path).install(tmp_path / "target" / MODEL, ["all"])
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize(
    ("key", "names"), [("plans_name", ("a__b", "3d")), ("plans_name", ("a_", "3d")), ("configurations", ("a", "3d__b"))]
)
def test_plans_whose_names_part_a_folders_name_otherwise_are_refused(key, names):
    with pytest.raises(ValueError, match=rf"x: got plans with {key} '\w+_\w*', expected a name without __"):
        check_plans({"plans_name": names[0], "configurations": {names[1]: {}}}, "x")


@pytest.mark.parametrize("value", ["../x", "/x", "a/b", ".", "", "a\0b", "x" * 200, 3, None])
@pytest.mark.parametrize("key", ["data_identifier", "inherits_from"])
def test_plans_whose_names_lead_out_of_their_folders_are_refused(tmp_path, key, value):
    plans = {"plans_name": "nnUNetPlans", "configurations": {"3d_fullres": {key: value}}}
    with pytest.raises(ValueError, match=f"got plans with {key} "):
        read_model(write_model(tmp_path / MODEL, plans=plans))


def hostile_plans(**changes) -> dict:
    """Plans that nnU-Net calls a program from: it imports what they name, and calls it with what they say."""
    plans = json.loads(json.dumps(fuzz.PLANS))
    plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"] |= changes
    return plans


def call(written: Path) -> dict:
    return hostile_plans(nonlin="subprocess.Popen", nonlin_kwargs={"args": ["mkdir", str(written)]})


def test_plans_that_name_no_module_are_refused_and_not_called(tmp_path):
    model, written = fuzz.write_given(tmp_path), tmp_path / "written"
    checkpoint = (model, "all", "checkpoint_final.pth", torch.device("cpu"))
    assert load_teacher(*checkpoint).class_names == ("liver",)
    for plans, message in (
        (call(written), "got 'subprocess.Popen', expected a module"),
        (hostile_plans(nonlin="torch.hub.load"), "got 'torch.hub.load', expected a module"),
        (hostile_plans(nonlin="tests.test_given_model.MODEL"), "expected a module"),
        (hostile_plans(n_conv_per_stage=[2**31, 1]), "at most 10000"),
    ):
        (model / "plans.json").write_text(json.dumps(plans))
        with pytest.raises(ValueError, match=message):
            load_teacher(*checkpoint)
    assert not written.exists()
    with pytest.raises(TypeError, match="not a Module"):
        nnunet_api.network_of("nnUNetTrainer", *manager_of(call(written)), 1, 2)
    deadline = monotonic() + 10
    while not written.is_dir() and monotonic() < deadline:
        sleep(0.01)
    assert written.is_dir(), "without the check it is called"


def manager_of(plans: dict) -> tuple:
    manager = nnunet_api.plans_manager(plans)
    return manager, manager.get_configuration("3d_fullres")


def test_a_model_that_holds_code_is_not_installed(tmp_path, monkeypatch):
    move_away(tmp_path, monkeypatch)
    model = fuzz.write_given(tmp_path / "given")
    path = model / "fold_all" / "checkpoint_final.pth"
    torch.save({**torch.load(path, weights_only=True), "cil": fuzz.Hostile(tmp_path / "written")}, path)
    write_tiny_dataset(tmp_path / "new", n_cases=4, seed=7, channel="CT")
    steps = [{"dataset": "new", "classes": {2: "blob"}}]
    schedule = load_schedule(write_extension(tmp_path, packed(model), steps=steps, test=None))
    with pytest.raises(ValueError, match="holds code, which is not run"):
        prepare(schedule, [], [])
    assert not list((tmp_path / "nnUNet_results").rglob("*.pth"))
    assert not (tmp_path / "written").exists()


def test_a_model_that_was_refused_is_read_again_once_it_is_mended(tmp_path, monkeypatch):
    move_away(tmp_path, monkeypatch)
    model = fuzz.write_given(tmp_path / "given")
    path = model / "fold_all" / "checkpoint_final.pth"
    whole = path.read_bytes()
    torch.save({**torch.load(path, weights_only=True), "network_weights": {"another": torch.ones(1)}}, path)
    write_tiny_dataset(tmp_path / "new", n_cases=4, seed=7, channel="CT")
    schedule = write_extension(tmp_path, model, steps=[{"dataset": "new", "classes": {2: "blob"}}], test=None)
    with pytest.raises(ValueError, match="that do not fit"):
        prepare(load_schedule(schedule), [], [])
    path.write_bytes(whole)
    for later in ("_warn_of_clipping", "_preprocess"):
        monkeypatch.setattr(f"nnunet_cil.dataset.{later}", lambda *_: None)
    (line,) = prepare(load_schedule(schedule), [], [])
    assert line.startswith("nnUNetv2_train Dataset501_extended_step2 ")


@pytest.fixture(scope="module")
def first(tmp_path_factory, module_patch) -> Chain:  # noqa: F811
    """A chain whose step 1 (ball) is trained and exported; its data are then removed."""
    chain = make_chain(tmp_path_factory.mktemp("first"), module_patch, methods=("pgcd",))
    train(chain, 1)
    export_model(chain, chain.variant("pgcd", 0), 1, ["all"], chain.folder / "given", None)
    return chain


def mirrored_along(fold: Path, axes: tuple[int, ...]) -> None:
    """The model as if it had been trained on images mirrored along these axes only."""
    path = fold / "checkpoint_final.pth"
    torch.save({**torch.load(path, weights_only=False), "inference_allowed_mirroring_axes": axes}, path)


def write_extension(root: Path, model: Path, **changes) -> Path:
    content = {
        "name": "extended",
        "model": str(model),
        "steps": [{"dataset": "new", "classes": {2: "blob"}}],
        "test": {"dataset": "new", "subjects": ["case_3"], "classes": {"ball": "ball", "blob": "blob"}},
        "device": "cpu",
        "training": {"epochs": 1, "iterations_per_epoch": 2, "val_iterations_per_epoch": 1},
        **changes,
    }
    if not (root / "new").is_dir():
        write_tiny_dataset(root / "new", n_cases=4, seed=7)
    path = root / "extended.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def move_away(root: Path, monkeypatch) -> None:
    """Another machine: empty folders."""
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        (root / name).mkdir()
        monkeypatch.setenv(name, str(root / name))


def test_a_zip_is_extended_on_another_machine_and_the_result_again(first, tmp_path, monkeypatch, capsys):
    move_away(tmp_path, monkeypatch)
    archive = shutil.copy(first.folder / "given.zip", tmp_path)
    schedule = load_schedule(write_extension(tmp_path, Path(archive)))
    assert schedule.classes == ("ball", "blob")
    lines = prepare(schedule, [], [])
    assert len(lines) == 1
    assert "Dataset501_extended_step2 3d_fullres all -tr nnUNetTrainerPGCD" in lines[0]
    table = run(schedule, [], [])
    assert "pgcd: Dice (%) by step" in table
    chain = Chain.open(schedule)
    variant = chain.variant("pgcd", 0)
    folder = chain.model_folder(variant, 2)
    assert json.loads((folder / "dataset.json").read_text(encoding="utf-8"))["labels"] == {
        "background": 0,
        "ball": 1,
        "blob": 2,
    }
    plans = json.loads((folder / "plans.json").read_text(encoding="utf-8"))
    assert plans["cil"]["teacher"] == f"Dataset500_extended_step1/{MODEL}"
    assert plans["cil"]["mirror_axes"] == [0, 1, 2]
    store = PrototypeStore.load(folder / "fold_all" / "prototypes.npz")
    assert store.class_names == ("background", "ball", "blob")
    scores = json.loads((chain.folder / "scores.json").read_text(encoding="utf-8"))
    assert scores["runs"][0]["dice"][0][0] is not None, "the given model is scored as step 1"
    assert write_report(schedule, [], []).is_file()
    again = export_model(chain, variant, 2, ["all"], tmp_path / "second", None)
    assert "step 1: ball, the given model tiny" in card_text(read_card(again))
    write_tiny_dataset(tmp_path / "third", n_cases=3, seed=9)
    path = write_extension(
        tmp_path, again, name="third", steps=[{"dataset": "third", "classes": {"ball": "sphere"}}], test=None
    )
    third = load_schedule(path)
    assert third.classes == ("ball", "blob", "sphere")
    run(third, [], [])
    last = Chain.open(third)
    check = read_checks(last)["nnUNetPlans/step2_fold_all"]
    assert (list(check.organs), check.n_scans) == (["ball", "blob"], 3), "without a test set, on the new scans"
    weights = torch.load(
        last.model_folder(last.variant("pgcd", 0), 2) / "fold_all" / "checkpoint_final.pth", weights_only=False
    )["network_weights"]
    assert weights["decoder.seg_layers.0.weight"].shape[0] == 4
    given_again = export_model(last, last.variant("pgcd", 0), 1, ["all"], tmp_path / "given_again", None)
    for target in (chain.folder, last.folder, given_again):
        assert main(["verify", str(target)]) == 0
    assert capsys.readouterr().out.count("given, made in another chain") == 2


def test_a_chain_goes_on_after_its_model_or_dataset_was_moved_or_the_model_is_gone(first, tmp_path, monkeypatch):
    move_away(tmp_path, monkeypatch)
    archive = Path(shutil.copy(first.folder / "given.zip", tmp_path))
    path = write_extension(tmp_path, archive)
    lines = prepare(load_schedule(path), [], [])
    chain = Chain.open(load_schedule(path))
    written = chain.content["schedule"]
    model = chain.model_folder(chain.variant("pgcd", 0), 1)

    (tmp_path / "elsewhere").mkdir()
    archive = archive.rename(tmp_path / "elsewhere" / archive.name)
    without = load_schedule(path)
    assert (without.model.path, without.model.folds) == (model, ("all",))
    assert prepare(without, [], []) == lines
    assert "waiting" in status(without, [], [])

    (tmp_path / "new").rename(tmp_path / "elsewhere" / "new")
    text = path.read_text(encoding="utf-8").replace(str(tmp_path / "given.zip"), str(archive))
    path.write_text(text.replace("dataset: new", "dataset: elsewhere/new"), encoding="utf-8")
    moved = load_schedule(path)
    assert moved.model.path == archive
    assert prepare(moved, [], []) == lines
    stored = json.loads((chain.folder / "chain.json").read_text(encoding="utf-8"))["schedule"]
    assert {**stored, "test": written["test"]} == written, "the trainings' lineages have the digest of all but the test"
    image = chain.raw(2) / "imagesTr" / "case_0_0000.nii.gz"
    assert image.samefile(tmp_path / "elsewhere" / "new" / "imagesTr" / image.name)

    write_tiny_dataset(tmp_path / "new", n_cases=4, seed=8)
    with pytest.raises(ValueError, match=r"steps\[0\]: dataset: chain new, schedule elsewhere/new"):
        Chain.open(load_schedule(path))


def test_a_model_without_prototypes_or_of_stock_nnunet_is_extended(first, tmp_path, monkeypatch, capsys):
    """Prototypes come from the teacher's confident predictions on the new scans."""
    move_away(tmp_path, monkeypatch)
    folder = next((first.folder / "given").rglob(MODEL))
    stock = shutil.copytree(folder, tmp_path / MODEL)
    for name in ("prototypes.npz", "lineage.json"):
        (stock / "fold_all" / name).unlink()
    (stock / "fold_all").rename(stock / "fold_0")
    mirrored_along(stock / "fold_0", (0, 1))
    shutil.copytree(stock / "fold_0", stock / "fold_1")
    plans = json.loads((stock / "plans.json").read_text(encoding="utf-8"))
    plans.pop("cil")
    (stock / "plans.json").write_text(json.dumps(plans))
    with pytest.raises(ScheduleError, match=r"expected fold 'all' among them\. Choose one .* `model_fold: 0`"):
        load_schedule(write_extension(tmp_path, stock))
    other_axis = load_schedule(write_extension(tmp_path, stock, model_fold=1, mirror_axes=[1, 2]))
    with pytest.raises(ValueError, match=r"mirror_axes: got \[2\], expected some of \[0, 1\], along which"):
        prepare(other_axis, [], [])
    assert not list((tmp_path / "nnUNet_results").rglob("*.pth"))
    schedule = load_schedule(write_extension(tmp_path, stock, model_fold=1, mirror_axes=[1]))
    run(schedule, [], [])
    chain = Chain.open(schedule)
    last = torch.load(fold_of(chain, 2) / "checkpoint_final.pth", weights_only=False)
    assert last["inference_allowed_mirroring_axes"] == (1,)
    assert chain.content["schedule"]["model_fold"] == 1
    log = next(chain.model_folder(chain.variant("pgcd", 0), 2).rglob("training_log_*.txt")).read_text(encoding="utf-8")
    assert "taking its confident predictions" in log
    assert main(["verify", str(chain.folder)]) == 0
    assert f"Dataset500_extended_step1/{MODEL}/fold_all: given, without a lineage" in capsys.readouterr().out
    path = chain.model_folder(chain.variant("pgcd", 0), 1) / "plans.json"
    write_json(path, {**json.loads(path.read_text(encoding="utf-8")), "dataset_name": "exchanged"})
    assert main(["verify", str(chain.folder)]) == 1
    assert f"{path}: got sha256" in capsys.readouterr().err


def test_data_of_another_kind_and_classes_it_has_are_refused(first, tmp_path, monkeypatch):
    move_away(tmp_path, monkeypatch)
    given = first.folder / "given.zip"
    write_tiny_dataset(tmp_path / "new", n_cases=4, channel="CT")
    schedule = load_schedule(write_extension(tmp_path, given))
    with pytest.raises(ValueError, match=r"a model for the channels {0: 'MR'}, expected {0: 'CT'}"):
        prepare_chain(Chain.open(schedule), variants_of(Chain.open(schedule), [], []))
    assert not list((tmp_path / "nnUNet_raw").iterdir())
    with pytest.raises(ScheduleError, match="class 'ball' that the model has already"):
        load_schedule(write_extension(tmp_path, given, steps=[{"dataset": "new", "classes": ["ball"]}], test=None))
    with pytest.raises(ScheduleError, match="intensity: got the key beside a model"):
        load_schedule(write_extension(tmp_path, given, intensity="whole_image"))


def test_a_model_whose_reader_does_not_take_the_new_files_is_refused(tmp_path, monkeypatch):
    move_away(tmp_path, monkeypatch)
    model = fuzz.write_given(tmp_path / "given")
    plans = json.loads((model / "plans.json").read_text(encoding="utf-8"))
    write_tiny_dataset(tmp_path / "new", n_cases=4, seed=7, channel="CT")
    path = write_extension(tmp_path, model, test=None)
    for reader in ("NaturalImage2DIO", "np", None):
        write_json(model / "plans.json", {**plans, "image_reader_writer": reader})
        with pytest.raises(ValueError, match=rf"model: got plans with the image reader {reader!r}, .* takes .nii.gz"):
            prepare(load_schedule(path), [], [])
    assert not list((tmp_path / "nnUNet_raw").iterdir())


def test_one_of_several_folds_teaches_all_new_scans(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = write_model(tmp_path / MODEL, folds=(0, 1))
    write_tiny_dataset(tmp_path / "new", n_cases=2)
    assert main(["extend", str(model), "--with", "new", "--classes", "ball", "--only-write"]) == 1
    command = ["extend", str(model), "--with", "new", "--classes", "lump=ball", "lump=blob", "--model-fold", "1"]
    assert main([*command, "--only-write"]) == 0
    schedule = load_schedule(tmp_path / "extended.yaml")
    assert (schedule.classes, schedule.steps[1].class_map) == (
        ("liver", "spleen", "lump"),
        {"ball": "lump", "blob": "lump"},
    )
    assert (schedule.folds, schedule.model.folds) == (("all",), (1,))
    assert schedule.to_dict()["model_fold"] == 1
    for wrong in (2, True, "all"):
        with pytest.raises(ScheduleError, match=r"model_fold: got .*, expected one of the folds .*: \[0, 1\]"):
            load_schedule(write_extension(tmp_path, model, model_fold=wrong, test=None))
    with pytest.raises(ScheduleError, match="model_fold: got the key without a model"):
        load_schedule(write_schedule(tmp_path / "s.yaml", tmp_path / "new", extra="model_fold: 0"))


def test_extend_writes_a_schedule_and_never_over_another(first, tmp_path, monkeypatch, capsys):
    move_away(tmp_path, monkeypatch)
    write_tiny_dataset(tmp_path / "new", n_cases=4)
    monkeypatch.chdir(tmp_path)
    command = ["extend", str(first.folder / "given.zip"), "--with", "new", "--classes", "pancreas=2", "--only-write"]
    assert main([*command, "--classes", "pancreas=7"]) == 1
    assert not (tmp_path / "extended.yaml").exists(), "nothing is left of a mistake"
    assert main(command) == 0
    assert "extended.yaml" in capsys.readouterr().out
    schedule = load_schedule(tmp_path / "extended.yaml")
    assert schedule.classes == ("ball", "pancreas")
    assert dict(schedule.steps[1].class_map) == {"blob": "pancreas"}
    assert main(command) == 0, "the same again"
    assert main([*command, "--epochs", "3"]) == 1
    assert "not touched" in capsys.readouterr().err
    assert load_schedule(tmp_path / "extended.yaml").training.epochs == schedule.training.epochs


def test_one_label_for_two_classes_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["extend", str(tmp_path), "--with", "new", "--classes", "pancreas=1", "duodenum=1"]) == 1
    assert "--classes: got the label 1 for pancreas and for duodenum, expected one class." in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("given", "meant"), [("4=left_kidney", "left_kidney=4"), ("4", "NAME=4")])
def test_exchanged_sides_of_a_class_are_refused(tmp_path, monkeypatch, capsys, given, meant):
    monkeypatch.chdir(tmp_path)
    assert main(["extend", str(tmp_path), "--with", "new", "--classes", "liver", given]) == 1
    assert f"--classes: got {given}, expected NAME=LABEL: {meant}." in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("named", ["7", "Dataset007_Pan-creas"])
def test_extend_finds_a_model_by_number_or_name_of_its_dataset(nnunet_folders, named):
    folder = nnunet_folders["nnUNet_results"] / "Dataset007_Pan-creas"
    folder.mkdir()
    args = Namespace(model=named, trainer="nnUNetTrainer", plans="nnUNetPlans", configuration="3d_fullres")
    assert extend._model(args) == folder / "nnUNetTrainer__nnUNetPlans__3d_fullres"
