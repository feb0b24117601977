"""An exported model is whole, clean, and works in stock nnU-Net."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import SimpleITK
import torch

from nnunet_cil.chain import Chain
from nnunet_cil.checkpoint import read_checkpoint
from nnunet_cil.cli.main import main
from nnunet_cil.environment import trainer_path_variable
from nnunet_cil.export import CARD_FILE, card_text, export_model, read_card
from nnunet_cil.report.table import hundredths
from nnunet_cil.step_files import CHECKPOINT, write_json
from tests import shell
from tests.test_trainer import fold_of, make_chain, module_patch, train  # noqa: F401  (a fixture)

SUBJECT = re.compile(rb"case_\d")


@pytest.fixture(scope="module")
def chain(tmp_path_factory, module_patch) -> Chain:  # noqa: F811
    chain = make_chain(tmp_path_factory.mktemp("export"), module_patch)
    for step in (1, 2):
        train(chain, step)
    return chain


@pytest.fixture(scope="module")
def archive(chain, tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("out") / "tiny"
    return export_model(chain, chain.variant("pgcd", 0), 2, ["all"], target, "CC BY 4.0")


def test_archive_and_folder_hold_the_same_and_nothing_of_people_or_machines(chain, archive):
    model = "Dataset501_tiny_step2/nnUNetTrainer__nnUNetPlans__3d_fullres/"
    with zipfile.ZipFile(archive) as zipped:
        contents = {name: zipped.read(name) for name in zipped.namelist()}
    folder = archive.with_suffix("")
    assert contents == {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }
    names = {name.removeprefix(model) for name in contents}
    assert names == {
        "plans.json", "dataset.json", "dataset_fingerprint.json", CARD_FILE,
        "fold_all/checkpoint_final.pth", "fold_all/prototypes.npz", "fold_all/lineage.json",
    }  # fmt: skip
    checkpoint = torch.load(folder / model / "fold_all/checkpoint_final.pth", weights_only=False)
    assert set(checkpoint) == {"network_weights", "inference_allowed_mirroring_axes", "trainer_name", "init_args"}
    root = str(chain.paths["nnUNet_results"].parent).encode()
    for name, content in contents.items():
        assert root not in content, name
        assert not SUBJECT.search(content), name
        if name.endswith(".json"):
            assert not re.search(rf"\b{re.escape(platform.node())}\b".encode(), content), name


def test_a_checkpoint_that_says_nothing_of_mirroring_is_exported_so(chain, tmp_path, monkeypatch):
    without = {
        key: value for key, value in read_checkpoint(fold_of(chain, 1) / CHECKPOINT).items() if "mirror" not in key
    }
    monkeypatch.setattr("nnunet_cil.export.read_checkpoint", lambda path: without)
    export_model(chain, chain.variant("pgcd", 0), 1, ["all"], tmp_path / "silent", None)
    (exported,) = (tmp_path / "silent").rglob("*.pth")
    found = torch.load(exported, weights_only=False)
    assert set(found) == {"network_weights", "trainer_name", "init_args"}, "stock nnU-Net then mirrors along no axis"


def test_a_training_that_was_killed_before_its_prototypes_is_not_exported(chain, tmp_path, monkeypatch):
    (tmp_path / "results").mkdir()
    fold = fold_of(chain, 2)
    monkeypatch.setattr(Chain, "model_folder", lambda *_: tmp_path / "results" / fold.parent.name)
    shutil.copytree(fold.parent, chain.model_folder(None, 2))
    for name in ("prototypes.npz", "lineage.json"):
        (chain.model_folder(None, 2) / "fold_all" / name).unlink()
    with pytest.raises(FileNotFoundError, match=r"fold \['all'\], expected checkpoint_final.pth and prototypes.npz"):
        export_model(chain, chain.variant("pgcd", 0), 2, ["all"], tmp_path / "early", None)


def test_card_says_what_the_model_is_and_its_hashes_hold(archive, capsys):
    card = read_card(archive)
    assert card == read_card(archive.with_suffix(""))
    assert card["labels"] == {"background": 0, "ball": 1, "blob": 2}
    assert card["steps"] == [
        {"classes": ["ball"], "training_subjects": 5},
        {"classes": ["blob"], "training_subjects": 5},
    ]
    assert (card["method"], card["licence"]) == ("pgcd", "CC BY 4.0")
    assert set(card["sha256"]) >= {"plans.json", "fold_all/checkpoint_final.pth", "fold_all/prototypes.npz"}
    assert main(["info", str(archive)]) == 0
    shown = capsys.readouterr().out
    assert shown.strip() == card_text(card).strip()
    for part in ("1 ball, 2 blob", "step 2: blob, 5 training subjects", "licence: CC BY 4.0"):
        assert part in shown


def test_stock_nnunet_predicts_the_same_bit_for_bit_without_this_package(chain, archive, tmp_path):
    """The trainer is nnU-Net's own, and this package cannot be imported; beside it the original with our trainers."""
    (tmp_path / "images").mkdir()
    image = chain.paths["nnUNet_raw"].parent / "source" / "imagesTr" / "case_5_0000.nii.gz"
    (tmp_path / "images" / "a_0000.nii.gz").write_bytes(image.read_bytes())
    environment = {key: value for key, value in os.environ.items() if not key.startswith("nnUNet_")}
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        (tmp_path / name).mkdir()
        environment[name] = str(tmp_path / name)
    line = "x -i images -o {} -d 501 -c 3d_fullres -f all -device cpu -npp 0 -nps 0 --save_probabilities"
    code = """
import sys
from nnunetv2.inference.predict_from_raw_data import predict_entry_point
if __name__ == "__main__":
    predict_entry_point()
"""
    without_us = f"""
import sys
sys.modules["nnunet_cil"] = None
from nnunetv2.model_sharing.model_import import install_model_from_zip_file
install_model_from_zip_file({str(archive)!r})
"""
    own = environment | {"nnUNet_results": str(chain.paths["nnUNet_results"])}
    own["nnUNet_extTrainer"] = trainer_path_variable()
    for name, before, options, variables in (
        ("exported", without_us, "", environment),
        ("original", "", " -tr nnUNetTrainerPGCD", own),
    ):
        arguments = (line.format(name) + options).split()
        (tmp_path / f"{name}.py").write_text(
            before + code.replace("import sys\n", f"import sys\nsys.argv = {arguments}\n")
        )
        done = shell.run([sys.executable, f"{name}.py"], tmp_path, variables)
        assert done.returncode == 0, done.stdout
    exported, original = (tmp_path / name for name in ("exported", "original"))
    probabilities = [np.load(folder / "a.npz")["probabilities"] for folder in (exported, original)]
    assert probabilities[0].shape == (3, *SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(image))).shape)
    assert probabilities[0].tobytes() == probabilities[1].tobytes()
    assert (exported / "a.nii.gz").read_bytes() == (original / "a.nii.gz").read_bytes()


def test_nothing_is_overwritten_and_what_is_not_trained_is_refused(chain, archive, tmp_path):
    variant = chain.variant("pgcd", 0)
    with pytest.raises(FileExistsError, match="not touched"):
        export_model(chain, variant, 2, ["all"], archive.with_suffix(""), None)
    with pytest.raises(FileNotFoundError, match=r"no finished training of fold \[3\]"):
        export_model(chain, variant, 2, ["all", 3], tmp_path / "new", None)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("none", "got nothing there"),
        ("text", "got no zip"),
        ("empty", "got no model_card.json"),
        ("two", "got 2 cards"),
        ("huge", "expected a small one"),
        ("list", "got list, expected a JSON object"),
        ("broken", "no JSON"),
    ],
)
def test_a_card_that_is_none_is_refused(tmp_path, capsys, content, message):
    path = tmp_path / "model.zip"
    cards = {"empty": [], "two": ["{}", "{}"], "huge": [" " * 1_000_001], "list": ["[]"], "broken": ["{"]}
    if content == "text":
        path.write_text("no zip")
    elif content != "none":
        with zipfile.ZipFile(path, "w") as zipped:
            for number, card in enumerate(cards[content]):
                zipped.writestr(f"{number}/{CARD_FILE}", card)
    assert main(["info", str(path)]) == 1
    assert message in capsys.readouterr().err


def test_export_on_the_command_line(chain, tmp_path, capsys):
    schedule = str(chain.schedule.file)
    assert main(["export", schedule, str(tmp_path / "of step 1"), "--step", "1"]) == 0
    shown = capsys.readouterr().out
    assert "-d Dataset500_tiny_step1 -c 3d_fullres -p nnUNetPlans -f all" in shown
    assert "nnUNetv2_install_pretrained_model_from_zip 'of step 1.zip'\n" in shown
    assert read_card(tmp_path / "of step 1.zip")["steps"] == [{"classes": ["ball"], "training_subjects": 5}]
    assert main(["export", schedule, str(tmp_path / "none"), "--step", "3"]) == 1
    assert "--step: got '3', expected a number from 1 to 2" in capsys.readouterr().err


def test_an_export_that_fails_leaves_nothing_behind(chain, tmp_path, monkeypatch):
    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(zipfile.ZipFile, "write", full_disk)
    with pytest.raises(OSError, match="No space left"):
        export_model(chain, chain.variant("pgcd", 0), 2, ["all"], tmp_path / "new" / "out", None)
    assert list(tmp_path.iterdir()) == []


def test_the_card_rounds_a_score_as_the_table_does(chain, tmp_path):
    from nnunet_cil.evaluate import evaluation_file, scored_as

    variant = chain.variant("pgcd", 0)
    scores = {"x": {"ball": {"dice": 0.419548, "nsd": 0.1, "hd95_mm": 3.0}}}
    write_json(evaluation_file(chain, variant, 1, "all"), {"scores": scores, **scored_as(chain)})
    card = read_card(export_model(chain, variant, 1, ["all"], tmp_path / "scored", None))
    assert f"ball {hundredths(0.419548)}" in card_text(card)


def test_scores_are_on_the_card(chain, tmp_path):
    from nnunet_cil.evaluate import evaluation_file, scored_as

    variant = chain.variant("pgcd", 0)
    path = evaluation_file(chain, variant, 1, "all")
    scores = {"x": {"ball": {"dice": 0.5, "nsd": 0.1, "hd95_mm": 3.0}}, "y": {"ball": {"dice": 0.7, "nsd": 0.1}}}
    write_json(path, {"scores": scores, **scored_as(chain)})
    card = read_card(export_model(chain, variant, 1, ["all"], tmp_path / "scored", None))
    assert card["scores"] == {"fold_all": {"mean_dice": {"ball": 0.6}, "test_subjects": 2}}
    assert "mean Dice in % on 2 test subjects: ball 60.0" in card_text(card)
    assert json.dumps(card).count("licence") == 1
    assert "licence: not stated" in card_text(card)
    assert "replay (not privacy-safe), after step 1" in card_text({**card, "method": "replay"})
    write_json(path, {"scores": scores, **scored_as(chain), "test_sha256": "0" * 64})
    assert read_card(export_model(chain, variant, 1, ["all"], tmp_path / "other", None))["scores"] == {}
