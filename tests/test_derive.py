"""Derived steps hold what nnU-Net's own fingerprint extraction and preprocessing would have made of them."""

from __future__ import annotations

import json

import numpy as np
import pytest
from batchgenerators.utilities.file_and_folder_operations import load_pickle
from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor
from nnunetv2.experiment_planning.plan_and_preprocess_api import extract_fingerprint_dataset

from nnunet_cil import nnunet_api
from nnunet_cil.chain import JOINT, Chain
from nnunet_cil.dataset import base_plans, prepare_chain
from nnunet_cil.schedule import load_schedule
from nnunet_cil.step_files import write_json
from tests.conftest import QUICK_SAMPLES, write_schedule, write_tiny_dataset
from tests.datasets import read_json, rewrite


def assert_equal(ours, theirs):
    assert type(ours) is type(theirs)
    if isinstance(ours, dict):
        assert list(ours) == list(theirs)
        for key in ours:
            assert_equal(ours[key], theirs[key])
    elif isinstance(ours, (list, tuple)):
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs, strict=True):
            assert_equal(a, b)
    else:
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    ("configuration", "plans", "ignore"),
    [
        ("3d_fullres", "{patch_size: [16, 16, 16], features_per_stage: [4, 8, 8], spacing: [2.5, 1.0, 2.0]}", False),
        ("3d_fullres", "{patch_size: [16, 16, 16], features_per_stage: [4, 8, 8]}", True),
        ("2d", "{patch_size: [16, 16], features_per_stage: [4, 8, 8], spacing: [1.2, 1.0]}", False),
    ],
    ids=["resampled", "ignore-label", "2d"],
)
def test_derived_files_equal_nnunets_own(nnunet_folders, tmp_path, monkeypatch, configuration, plans, ignore):
    source = write_tiny_dataset(
        tmp_path / "source", n_cases=3, ignore=ignore, outside=True, spacing=(1.5, 2.0, 1.0), shape=(18, 24, 26)
    )
    path = write_schedule(tmp_path / "s.yaml", source, configuration=configuration, plans=plans)
    chain = Chain.open(load_schedule(path))
    preprocessed, preprocess = [], nnunet_api.preprocess_case
    monkeypatch.setattr(nnunet_api, "preprocess_case", lambda *a: (preprocessed.append(a[0]), preprocess(*a)))
    prepare_chain(chain, [chain.variant("pgcd", 0), chain.variant("joint", 0)])
    assert len(preprocessed) == 2, "each image is preprocessed once for three datasets"
    plans = json.loads((chain.preprocessed(1) / "nnUNetPlans.json").read_text(encoding="utf-8"))
    for step in (1, 2, JOINT):
        ours, raw = chain.preprocessed(step) / f"nnUNetPlans_{configuration}", chain.raw(step)
        theirs = tmp_path / f"theirs_{step}"
        theirs.mkdir()
        dataset_json = json.loads((raw / "dataset.json").read_text(encoding="utf-8"))
        for case, (images, label) in nnunet_api.training_cases(raw).items():
            preprocess(images, label, theirs / case, plans, configuration, dataset_json)
            theirs_case = nnunet_api.preprocessed_dataset(theirs).load_case(case)
            ours_case = nnunet_api.preprocessed_dataset(ours).load_case(case)
            for i in (0, 1):
                assert ours_case[i].dtype == theirs_case[i].dtype
                np.testing.assert_array_equal(ours_case[i][:], theirs_case[i][:])
            assert_equal(ours_case[3], theirs_case[3])
            stored = [v.dtype for v in ours_case[3]["class_locations"].values() if isinstance(v, np.ndarray)]
            assert stored
            assert all(dtype == (np.int64 if step == 1 else np.int16) for dtype in stored)
            assert -1 in ours_case[1][:], "the case shows nothing if no voxel lies outside"
            assert (ours.parent / "gt_segmentations" / label.name).read_bytes() == label.read_bytes()
        assert len(list(ours.glob("*.pkl"))) == len(list((ours.parent / "gt_segmentations").iterdir())) == 2


def test_plans_with_another_reader_than_the_dataset_have_nnunets_own_labels(nnunet_folders, tmp_path):
    """One reader turns axes that the other leaves: the mask of zero voxels of one is not that of the other."""
    source = write_tiny_dataset(tmp_path / "source", n_cases=3, outside=True, shape=(18, 24, 26))
    for path in (source / "imagesTr").iterdir():
        rewrite(path, lambda array: array * (np.indices(array.shape)[1] > 5))
    first = Chain.open(load_schedule(write_schedule(tmp_path / "first.yaml", source, name="first")))
    prepare_chain(first, [first.variant("pgcd", 0)])
    write_json(tmp_path / "base.json", base_plans(first))
    path = source / "dataset.json"
    write_json(path, {**read_json(path), "overwrite_image_reader_writer": "NibabelIOWithReorient"})
    chain = Chain.open(load_schedule(write_schedule(tmp_path / "s.yaml", source, plans="{base: base.json}")))
    prepare_chain(chain, [chain.variant("pgcd", 0)])
    raw, theirs = chain.raw(2), tmp_path / "theirs"
    theirs.mkdir()
    for case, (images, label) in nnunet_api.training_cases(raw).items():
        nnunet_api.preprocess_case(
            images, label, theirs / case, base_plans(chain), "3d_fullres", read_json(raw / "dataset.json")
        )
        folders = (chain.preprocessed(2) / "nnUNetPlans_3d_fullres", theirs)
        ours, expected = (nnunet_api.preprocessed_dataset(folder).load_case(case)[1][:] for folder in folders)
        np.testing.assert_array_equal(ours, expected)


def test_fingerprints_equal_nnunets_own(nnunet_folders, tmp_path, monkeypatch):
    initialise = DatasetFingerprintExtractor.__init__

    def with_few_samples(extractor, *args, **kwargs):
        initialise(extractor, *args, **kwargs)
        extractor.num_foreground_voxels_for_intensitystats = QUICK_SAMPLES

    monkeypatch.setattr(DatasetFingerprintExtractor, "__init__", with_few_samples)
    source = write_tiny_dataset(tmp_path / "source", n_cases=3, outside=True)
    chain = Chain.open(load_schedule(write_schedule(tmp_path / "s.yaml", source)))
    prepare_chain(chain, [chain.variant("pgcd", 0)])
    for step in (1, 2):
        ours = json.loads((chain.preprocessed(step) / "dataset_fingerprint.json").read_text(encoding="utf-8"))
        extract_fingerprint_dataset(chain.dataset_id(step), num_processes=1, verbose=False)
        theirs = json.loads((chain.preprocessed(step) / "dataset_fingerprint.json").read_text(encoding="utf-8"))
        channels = [f.pop("foreground_intensity_properties_per_channel") for f in (ours, theirs)]
        assert ours == theirs
        if step == 1:
            assert channels[0] == channels[1]
        else:  # fewer samples, as nothing is planned from them
            assert channels[0]["0"] == pytest.approx(channels[1]["0"], rel=0.02)


def test_derived_images_take_no_space(nnunet_folders, tmp_path):
    chain = Chain.open(load_schedule(write_schedule(tmp_path / "s.yaml", write_tiny_dataset(tmp_path / "source"))))
    prepare_chain(chain, [chain.variant("pgcd", 0)])
    first, second = (chain.preprocessed(step) / "nnUNetPlans_3d_fullres" for step in (1, 2))
    assert (first / "case_0.b2nd").samefile(second / "case_0.b2nd")
    assert not (first / "case_0_seg.b2nd").samefile(second / "case_0_seg.b2nd")
    assert set(load_pickle(str(second / "case_0.pkl"))["class_locations"]) == {1, 2}
