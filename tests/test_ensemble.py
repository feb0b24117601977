"""Several folds: each is a chain, and what users get is their ensemble."""

from __future__ import annotations

import json

import numpy as np
import pytest
import SimpleITK
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.run.run_training import run_training

from nnunet_cil import driver
from nnunet_cil.chain import Chain
from nnunet_cil.evaluate import ENSEMBLE, count_parameters, evaluation_file, subject_scores
from tests.test_trainer import CPU, make_chain, module_patch  # noqa: F401  (a fixture)


def train_here(chain: Chain, variant, step, fold, label) -> None:
    """In place of a process of its own."""
    run_training(chain.dataset_name(step), "3d_fullres", fold, variant.trainer, chain.plans_name(variant), device=CPU)
    best = chain.model_folder(variant, step) / f"fold_{fold}" / "checkpoint_best.pth"
    best.write_bytes(b"neither taught nor predicted with: that is the final one's part")


@pytest.fixture(scope="module")
def chain(tmp_path_factory, module_patch) -> Chain:  # noqa: F811
    """Two folds of both steps and of the joint model, run to the end."""
    root = tmp_path_factory.mktemp("ensemble")
    module_patch.setattr(driver, "_train", train_here)
    module_patch.setattr(driver, "COMPARED", ())
    chain = make_chain(root, module_patch, ("pgcd",), fold="[0, 1]", training=", validation_cases: 0")
    chain.shown = driver.run(chain.schedule, ["pgcd", "joint"], [])
    return chain


def content_of(chain: Chain, fold, step=2) -> dict:
    path = evaluation_file(chain, chain.variant("pgcd", 0), step, fold)
    return json.loads(path.read_text(encoding="utf-8"))


def test_it_predicts_what_nnunet_does_with_all_folds(chain, tmp_path):
    model = chain.model_folder(chain.variant("pgcd", 0), 2)
    predictor = nnUNetPredictor(device=CPU, allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(model), (0, 1))
    image = next((chain.folder / "test" / "images").iterdir())
    predictor.predict_from_files_sequential([[str(image)]], [str(tmp_path / "theirs")])
    (ours,) = evaluation_file(chain, chain.variant("pgcd", 0), 2, ENSEMBLE).parent.glob("*/case_5.nii.gz")
    found, wanted = (
        SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(p))) for p in (ours, tmp_path / "theirs.nii.gz")
    )
    np.testing.assert_array_equal(found, wanted)


def test_it_is_scored_after_each_step_and_has_a_row_of_its_own(chain):
    own = [content_of(chain, fold)["parameters"] for fold in (0, 1)]
    ensemble = content_of(chain, ENSEMBLE)
    assert ensemble["parameters"] == sum(own)
    checkpoint = chain.model_folder(chain.variant("pgcd", 0), 2) / "fold_0" / "checkpoint_final.pth"
    assert own[0] == count_parameters(checkpoint)
    assert ensemble["checkpoint_sha256"] not in [content_of(chain, fold)["checkpoint_sha256"] for fold in (0, 1)]
    for name in ("pgcd", "pgcd, 2 folds ensembled", "joint", "joint, 2 folds ensembled"):
        assert [line for line in chain.shown.splitlines() if line.startswith(f"{name}  ")], name
    scores = json.loads((chain.folder / "scores.json").read_text(encoding="utf-8"))
    of_ensemble = next(run for run in scores["runs"] if run["fold"] == ENSEMBLE and run["method"] == "pgcd")
    assert of_ensemble["dice"][0][0] is not None
    assert of_ensemble["bytes_kept"]["step2"]["prototypes"] == sum(
        (chain.model_folder(chain.variant("pgcd", 0), 1) / f"fold_{fold}" / "prototypes.npz").stat().st_size
        for fold in (0, 1)
    )


def test_differences_are_those_of_the_folds(chain):
    scores = json.loads((chain.folder / "scores.json").read_text(encoding="utf-8"))
    assert set(scores["paired"]["dice"]) == {"joint"}
    assert scores["paired"]["dice"]["joint"]["all"]["n_seeds"] == 1, "folds are no seeds"
    compared = subject_scores(chain, [chain.variant("joint", chain.schedule.training.seed)])["joint"]
    assert [fold for _, fold in compared] == [0, 1], "without the ensemble"


def test_the_report_shows_it(chain):
    page = driver.write_report(chain.schedule, ["pgcd", "joint"], []).read_text(encoding="utf-8")
    assert "2 folds ensembled" in page


def test_it_is_scored_anew_when_a_fold_is(chain):
    path = evaluation_file(chain, chain.variant("pgcd", 0), 2, ENSEMBLE)
    before = path.read_text(encoding="utf-8")
    driver.run(chain.schedule, ["pgcd", "joint"], [])
    assert path.read_text(encoding="utf-8") == before
    file = chain.model_folder(chain.variant("pgcd", 0), 2) / "fold_1" / "checkpoint_final.pth"
    checkpoint = torch.load(file, weights_only=False)
    checkpoint["network_weights"]["decoder.seg_layers.0.bias"] += 1
    torch.save(checkpoint, file)
    driver.evaluate(chain.schedule, ["pgcd", "joint"], [])
    assert content_of(chain, ENSEMBLE)["checkpoint_sha256"] != json.loads(before)["checkpoint_sha256"]
