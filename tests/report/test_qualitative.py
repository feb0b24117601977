from __future__ import annotations

from contextlib import contextmanager
from itertools import combinations

import numpy as np
import pytest
import SimpleITK
import tifffile
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text

from nnunet_cil.report import qualitative
from nnunet_cil.report.figures import drawing
from nnunet_cil.report.qualitative import (
    CT_WINDOW_HU,
    best_slice,
    crop_around,
    plot_panel,
    read_slice,
    read_volume,
    typical_and_worst,
)
from tests.report.chain_files import write_volume

NAN = np.nan


def test_typical_is_the_lower_median_and_worst_the_lowest():
    cases, scores = ["a", "b", "c", "d"], np.array([[0.9, 0.9], [0.1, 0.3], [0.8, NAN], [0.5, 0.5]])
    assert typical_and_worst(cases, scores) == {"typical": "d", "worst": "b"}


def test_a_subject_without_scores_is_not_chosen():
    assert typical_and_worst(["a", "b"], np.array([[NAN], [0.5]])) == {"typical": "b"}
    assert typical_and_worst(["a"], np.array([[NAN]])) == {}
    assert typical_and_worst([], np.zeros((0, 2))) == {}


def test_a_large_organ_does_not_hide_a_small_one():
    truth = np.zeros((3, 10, 10), int)
    truth[0] = 1
    truth[1, :9] = 1
    truth[1, 9, :2] = 2
    assert best_slice(truth, 1) == 0
    assert best_slice(truth, 2) == 1


def test_a_slice_with_more_organs_is_better_than_one_with_more_of_them():
    """Areas of a subject of CHAOS, with two slices around them in which these organs are largest."""
    areas = [[1200, 0, 0, 0], [0, 700, 0, 0], [0, 0, 426, 449], [339, 71, 172, 300]]
    truth = np.zeros((4, 2000), int)
    for z, of in enumerate(areas):
        truth[z, : sum(of)] = np.repeat([1, 2, 3, 4], of)
    assert best_slice(truth, 4) == 3
    truth[3][truth[3] == 2] = 0
    truth[3, -69:] = 2  # a crumb: less than a tenth of its largest area
    truth[3][truth[3] == 1] = 0
    assert best_slice(truth, 4) == 2


def test_slice_without_foreground():
    assert best_slice(np.zeros((3, 4, 4), int), 2) == 0


def test_crop_has_a_margin_and_ends_at_the_image():
    mask = np.zeros((100, 100), bool)
    mask[40:60, 50:60] = True
    assert crop_around([mask], margin=0.5) == (slice(30, 70), slice(40, 70))
    mask[0, 0] = True
    rows, columns = crop_around([mask, mask])
    assert (rows.start, columns.start) == (0, 0)
    assert crop_around([np.zeros((5, 5), bool)]) == (slice(None), slice(None))


def test_an_axial_slice_lies_as_radiologists_look_at_it(tmp_path):
    """A volume stored in RAS has its first voxel at the right, back and feet."""
    array = np.zeros((4, 6, 5), np.float32)
    array[0, 0, 0] = 1  # z to the head, y to the front, x to the patient's right, as its direction says
    volume = SimpleITK.GetImageFromArray(array)
    volume.SetSpacing((1.0, 2.0, 3.0))
    volume.SetDirection((-1, 0, 0, 0, -1, 0, 0, 0, 1))
    SimpleITK.WriteImage(volume, str(tmp_path / "x.nii.gz"))
    turned, spacing, oriented = read_volume(tmp_path / "x.nii.gz")
    assert oriented
    assert spacing == (3.0, 2.0, 1.0)
    assert np.argwhere(turned).tolist() == [[0, 5, 4]]  # last row: back; last column: the patient's left


def test_a_sagittal_stack_is_turned_to_axial(tmp_path):
    volume = SimpleITK.GetImageFromArray(np.zeros((4, 6, 5), np.float32))
    volume.SetDirection((0, 0, 1, 1, 0, 0, 0, 1, 0))
    SimpleITK.WriteImage(volume, str(tmp_path / "x.nii.gz"))
    assert read_volume(tmp_path / "x.nii.gz")[0].shape == (6, 5, 4)


def test_two_dimensions_are_one_slice(tmp_path):
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(np.zeros((6, 5), np.uint8)), str(tmp_path / "x.png"))
    array, _, oriented = read_volume(tmp_path / "x.png")
    assert array.shape == (1, 6, 5)
    assert not oriented


def test_a_tiff_does_not_say_which_side_is_right(tmp_path):
    tifffile.imwrite(tmp_path / "x.tif", np.zeros((7, 6, 5), np.float32))
    array, _, oriented = read_volume(tmp_path / "x.tif")
    assert array.shape == (7, 6, 5)
    assert not oriented


def test_colour_images_are_refused(tmp_path):
    colour = SimpleITK.GetImageFromArray(np.zeros((6, 5, 3), np.uint8), isVector=True)
    SimpleITK.WriteImage(colour, str(tmp_path / "x.png"))
    with pytest.raises(ValueError, match="scalar image"):
        read_volume(tmp_path / "x.png")


@pytest.fixture
def subject(tmp_path):
    truth = np.zeros((5, 20, 20), np.uint8)
    truth[3, 5:9, 5:9] = 1
    truth[3, 12:14, 12:14] = 3  # the ignore label
    predicted = np.roll(truth, 2, axis=2)
    write_volume(np.random.default_rng(0).normal(size=truth.shape).astype(np.float32), tmp_path / "image.nii.gz")
    write_volume(truth, tmp_path / "truth.nii.gz")
    write_volume(predicted, tmp_path / "pgcd.nii.gz")
    return tmp_path


def _read(folder, channel="MR"):
    return read_slice(folder / "image.nii.gz", folder / "truth.nii.gz", {"pgcd": folder / "pgcd.nii.gz"}, 2, channel)


def test_read_slice(subject):
    found = _read(subject)
    assert found.position == (4, 5)
    assert found.image.shape == found.truth.shape == found.predictions["pgcd"].shape
    assert (found.truth == 1).sum() == (found.predictions["pgcd"] == 1).sum() == 16
    assert found.window[0] < found.window[1]
    assert _read(subject, "CT").window == CT_WINDOW_HU


def test_masks_must_fit_the_image(subject):
    write_volume(np.zeros((5, 20, 21), np.uint8), subject / "pgcd.nii.gz")
    with pytest.raises(ValueError, match="prediction of pgcd of shape"):
        _read(subject)


def test_an_image_of_one_value_or_without_numbers(subject):
    for value in (5.0, NAN):
        write_volume(np.full((5, 20, 20), value, np.float32), subject / "image.nii.gz")
        low, high = _read(subject).window
        assert low < high


def _kept(monkeypatch):
    """The figures that are drawn from now on."""
    figures = []

    @contextmanager
    def kept(*args):
        with drawing(*args) as figure:
            figures.append(figure)
            yield figure

    monkeypatch.setattr(qualitative, "drawing", kept)
    return figures


def test_titles_of_tiles_say_what_their_number_is(subject, monkeypatch):
    figures, found = _kept(monkeypatch), _read(subject)
    plot_panel({"a": found, "b": found}, {"a": {"pgcd": 0.786}, "b": {"pgcd": NAN}}, ["x", "y"], subject / "panel.png")
    texts = [text.get_text() for text in figures[0].findobj(Text)]
    assert [text for text in texts if text.startswith("pgcd")] == ["pgcd, Dice 79 %", "pgcd"]


@pytest.mark.parametrize("n_classes", [2, 20])
def test_panel(subject, n_classes):
    slices = {"Typical subject: a_$b": _read(subject), "Worst subject: c": _read(subject)}
    dice = {title: {"pgcd": 0.5} for title in slices}
    plot_panel(slices, dice, [f"_organ {c} $" for c in range(n_classes)], subject / "figures" / "panel.png")
    assert sorted(path.name for path in (subject / "figures").iterdir()) == ["panel.pdf", "panel.png"]


def test_long_names_do_not_run_into_each_other(subject, monkeypatch):
    figures = _kept(monkeypatch)
    methods = ["pgcd", *(f"pgcd-without_{name}_weights" for name in ("class", "channel", "static", "uniform", "row"))]
    found = read_slice(
        subject / "image.nii.gz",
        subject / "truth.nii.gz",
        dict.fromkeys(methods, subject / "pgcd.nii.gz"),
        2,
        "MR",
    )
    plot_panel({"Typical": found}, {"Typical": dict.fromkeys(methods, 0.5)}, ["a", "b"], subject / "panel.png")
    renderer = FigureCanvasAgg(figures[0]).get_renderer()
    texts = [text for text in figures[0].findobj(Text) if text.get_text().startswith("pgcd")]
    boxes = [text.get_window_extent(renderer) for text in texts]
    assert len(boxes) == len(methods)
    assert not [(a, b) for a, b in combinations(boxes, 2) if a.overlaps(b)]
