from __future__ import annotations

import json
import logging

import numpy as np
import pytest

from nnunet_cil import nnunet_api
from nnunet_cil.cases import step_cases
from nnunet_cil.intensity import set_intensity, warn_of_clipping
from nnunet_cil.schedule import Intensity, load_schedule
from tests.conftest import write_schedule, write_tiny_dataset

WINDOW = {"mean": 100.0, "std": 5.0, "percentile_00_5": 80.0, "percentile_99_5": 120.0, "min": 0.0, "max": 200.0}
KEY = "foreground_intensity_properties_per_channel"


def plans(window=WINDOW, scheme="CTNormalization") -> dict:
    configuration = {"normalization_schemes": [scheme], "architecture": {"network_class_name": "none"}}
    return {KEY: {"0": dict(window)}, "configurations": {"3d_fullres": configuration}}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The ball has intensities around 160, the blob around 50, all else 100 +- 5."""
    return write_tiny_dataset(tmp_path_factory.mktemp("data") / "source", channel="CT", n_cases=3)


def shares(source, tmp_path, window, scheme="CTNormalization", step=1):
    schedule = load_schedule(write_schedule(tmp_path / "s.yaml", source))
    names = {1: {1: "ball"}, 2: {2: "blob"}}[step]
    content = json.loads((source / "dataset.json").read_text(encoding="utf-8"))
    cases = step_cases(schedule, step)
    return warn_of_clipping(plans(window, scheme), "3d_fullres", content, cases, names, step)


def test_step1_keeps_nnunets_numbers(source):
    assert set_intensity(plans(), Intensity(), source) == plans()


def test_given_numbers_replace_those_of_the_plans(source):
    given = {"0": {"mean": 1.0, "std": 2.0, "percentile_00_5": 3.0, "percentile_99_5": 4.0}}
    before = plans()
    changed = set_intensity(before, Intensity("given", given), source)
    assert changed[KEY]["0"] == {**WINDOW, **given["0"]}
    assert before == plans()


def test_whole_image_takes_in_every_organ(source):
    window = set_intensity(plans(), Intensity("whole_image"), source)[KEY]["0"]
    assert window["percentile_00_5"] < 50
    assert window["percentile_99_5"] > 160
    assert window["mean"] == pytest.approx(100, abs=5)


@pytest.mark.parametrize(
    ("window", "expected"),
    [(WINDOW, 1.0), ({**WINDOW, "percentile_99_5": 160.0}, 0.5), ({**WINDOW, "percentile_99_5": 300.0}, 0)],
)
def test_share_of_clipped_voxels(source, tmp_path, caplog, window, expected):
    caplog.set_level(logging.WARNING)
    found = shares(source, tmp_path, window)
    assert found["ball"] == pytest.approx(expected, abs=0.1)
    assert ("of all ball voxels" in caplog.text) == (expected > 0)
    if expected == 1:
        assert "step 1: the CT window [80, 120] of channel 0 clips 100% of all ball voxels" in caplog.text
        assert "intensity: whole_image" in caplog.text


def test_classes_of_a_later_step_are_looked_at_in_its_own_labels(source, tmp_path):
    assert shares(source, tmp_path, WINDOW, step=2) == {"blob": pytest.approx(1.0, abs=0.01)}


def test_other_normalisations_clip_nothing(source, tmp_path, caplog):
    assert shares(source, tmp_path, WINDOW, "ZScoreNormalization") == {}
    assert caplog.text == ""


def test_the_numbers_of_a_channel_by_hand():
    found = nnunet_api.intensity_properties(np.arange(1001.0), tail_percent=10)
    assert found["percentile_00_5"] == 100
    assert found["percentile_99_5"] == 900
    assert (found["min"], found["median"], found["max"], found["mean"]) == (0, 500, 1000, 500)
    assert found["std"] == pytest.approx(288.96, abs=0.01)
