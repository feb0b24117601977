from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from matplotlib import style as mpl_style
from matplotlib.figure import Figure

from nnunet_cil.report import figures
from nnunet_cil.report.table import Row

NAN = np.nan
LEARNED_AT = [1, 1, 2]
PGCD = Row("pgcd", np.array([[[0.9, 0.8, NAN], [0.9, 0.8, 0.7]]]))
FINETUNE = Row("finetune", np.array([[[0.9, 0.8, NAN], [0.0, 0.0, 0.9]]]))
JOINT = Row("joint", np.array([[[NAN] * 3, [0.9, 0.9, 0.9]]]))


@pytest.fixture
def drawn(monkeypatch):
    """Figures as they are saved."""
    seen = []
    save = Figure.savefig

    def savefig(self, *args, **kwargs):
        seen.append(self)
        return save(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return seen


def _lines(figure):
    return {line.get_label().split()[0]: line for line in figure.axes[0].get_lines()}


def test_writes_png_and_pdf_and_nothing_else(tmp_path):
    figures.plot_mean_dice([PGCD, FINETUNE, JOINT], LEARNED_AT, tmp_path / "figures" / "mean.png")
    assert sorted(p.name for p in (tmp_path / "figures").iterdir()) == ["mean.pdf", "mean.png"]
    assert (tmp_path / "figures" / "mean.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "figures" / "mean.pdf").read_bytes().startswith(b"%PDF")


def test_draws_the_means_in_percent(tmp_path, drawn):
    figures.plot_mean_dice([PGCD, FINETUNE, JOINT], LEARNED_AT, tmp_path / "mean.png")
    lines = _lines(drawn[0])
    np.testing.assert_allclose(lines["pgcd"].get_xydata(), [[1, 85], [2, 80]])
    np.testing.assert_allclose(lines["finetune"].get_xydata(), [[1, 85], [2, 30]])
    np.testing.assert_allclose(lines["joint"].get_xydata(), [[1, 90], [2, 90]])
    assert lines["joint"].get_linestyle() == "--"
    assert [text.get_text().split()[0] for text in drawn[0].legends[0].get_texts()] == ["joint", "pgcd", "finetune"]


def test_seeds_are_dots_and_a_deviation_beside_the_last_mean(tmp_path, drawn):
    better = PGCD.by_seed + 0.06
    rows = [Row("pgcd", np.concatenate([PGCD.by_seed, better]), (0, 1)), Row("joint", JOINT.by_seed, (0,))]
    figures.plot_mean_dice(rows, LEARNED_AT, tmp_path / "m.png")
    dots = [line for line in drawn[0].axes[0].get_lines() if line.get_linestyle() == "None"]
    np.testing.assert_allclose([line.get_xydata() for line in dots], [[[1, 85], [2, 80]], [[1, 91], [2, 86]]])
    labels = [text.get_text() for text in drawn[0].legends[0].get_texts()]
    assert labels == ["joint  90.0, seed 0", "pgcd  83.0 ±4.2, seeds 0, 1"]


def test_seeds_are_not_named_where_all_methods_have_the_same(tmp_path, drawn):
    rows = [Row(method, np.concatenate([PGCD.by_seed] * 2), of) for method, of in (("pgcd", (1, 0)), ("mib", (0, 1)))]
    figures.plot_mean_dice(rows, LEARNED_AT, tmp_path / "m.png")
    labels = {text.get_text() for text in drawn[0].legends[0].get_texts()}
    assert labels == {"pgcd  80.0 ±0.0", "mib  80.0 ±0.0"}


def test_a_method_keeps_its_colour(tmp_path, drawn):
    figures.plot_mean_dice([PGCD, FINETUNE, JOINT], LEARNED_AT, tmp_path / "a.png")
    figures.plot_mean_dice([FINETUNE, Row("mine", PGCD.by_seed)], LEARNED_AT, tmp_path / "b.png")
    first, second = _lines(drawn[0]), _lines(drawn[-1])
    assert first["finetune"].get_color() == second["finetune"].get_color()
    colours = {line.get_color() for line in (*first.values(), *second.values())}
    assert len(colours) == 4


def test_a_step_without_score_is_left_out(tmp_path, drawn):
    R = np.array([[0.9, 0.8, NAN], [NAN] * 3, [0.5, 0.6, 0.7]])
    figures.plot_mean_dice([Row("pgcd", R[None])], LEARNED_AT, tmp_path / "mean.png")
    np.testing.assert_allclose(_lines(drawn[0])["pgcd"].get_xydata(), [[1, 85], [3, 60]])


def test_an_unfinished_chain_is_last_and_says_so(tmp_path, drawn):
    unfinished = Row("plop", np.array([[[0.99, 0.99, NAN], [NAN] * 3]]))
    figures.plot_mean_dice([unfinished, FINETUNE, PGCD], LEARNED_AT, tmp_path / "mean.png")
    labels = [text.get_text() for text in drawn[0].legends[0].get_texts()]
    assert [label.split()[0] for label in labels] == ["pgcd", "finetune", "plop"]
    assert labels[-1] == "plop  step 1: 99.0"
    assert "step" not in labels[0]


def test_one_step(tmp_path):
    figures.plot_mean_dice([Row("pgcd", np.array([[[0.9]]]))], [1], tmp_path / "mean.png")
    assert (tmp_path / "mean.png").stat().st_size > 0


def test_a_failed_write_keeps_the_old_figure(tmp_path, monkeypatch):
    path = tmp_path / "mean.png"
    path.write_bytes(b"old")

    def broken(self, target, **options):
        target.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Figure, "savefig", broken)
    with pytest.raises(OSError, match="disk full"):
        figures.plot_mean_dice([PGCD], LEARNED_AT, path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_wrong_arguments(tmp_path):
    with pytest.raises(ValueError, match=r"ends in \.png"):
        figures.plot_mean_dice([PGCD], LEARNED_AT, tmp_path / "mean.jpg")
    with pytest.raises(ValueError, match="no score at all"):
        figures.plot_mean_dice([Row("pgcd", np.full((1, 2, 3), NAN))], LEARNED_AT, tmp_path / "mean.png")
    assert not list(tmp_path.iterdir())


def test_does_not_load_pyplot():
    code = "import sys, nnunet_cil.report.figures; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


ORGANS = ["liver", "spleen", "kidney"]
STORED = ("background", *ORGANS)
SIMILAR = np.eye(4) - 0.2
MANY = [f"organ_{i}" for i in range(20)]


def _drawings(path):
    """One call of every figure, by name."""
    scores = {"pgcd": np.array([[0.9, 0.8, NAN], [0.7, 0.9, 0.5]]), "joint": np.full((2, 3), 0.9)}
    terms = {"segmentation": np.array([-0.3, -0.6]), "pgcd_spatial": np.array([0.0, 0.1])}
    rows = [PGCD, FINETUNE, JOINT]
    return {
        "mean_dice": lambda: figures.plot_mean_dice(rows, LEARNED_AT, path),
        "score_matrix": lambda: figures.plot_score_matrix(rows, ORGANS, LEARNED_AT, path),
        "forgetting": lambda: figures.plot_forgetting(rows, {"pgcd": [PGCD.dice, PGCD.dice]}, ORGANS, LEARNED_AT, path),
        "subjects": lambda: figures.plot_subjects(scores, ORGANS, "Dice (%)", path),
        "loss_terms": lambda: figures.plot_loss_terms({"step 2": terms, "step 3": terms}, path),
        "one_training": lambda: figures.plot_loss_terms({"step 2": terms}, path),
        "no_other_terms": lambda: figures.plot_loss_terms({"step 2": {"segmentation": np.ones(3)}}, path),
        "similarity": lambda: figures.plot_similarity({"pgcd": (STORED, SIMILAR)}, ORGANS, path),
        "drift": lambda: figures.plot_drift({"pgcd": {"background": np.ones(2), "liver": np.ones(2)}}, ORGANS, path),
    }


@pytest.mark.parametrize("name", _drawings(None))
def test_every_figure_is_written_twice_or_not_at_all(tmp_path, monkeypatch, name):
    _drawings(tmp_path / "figures" / "f.png")[name]()
    assert sorted(p.name for p in (tmp_path / "figures").iterdir()) == ["f.pdf", "f.png"]
    with pytest.raises(ValueError, match=r"ends in \.png"):
        _drawings(tmp_path / "f.jpg")[name]()

    def broken(self, target, **options):
        target.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Figure, "savefig", broken)
    with pytest.raises(OSError, match="disk full"):
        _drawings(tmp_path / "other" / "f.png")[name]()
    assert not list((tmp_path / "other").iterdir())


def test_heat_map_leaves_out_what_is_not_learned_and_marks_what_is_missing(tmp_path, drawn):
    R = np.array([[0.9, NAN, NAN], [0.5, 0.2, 0.7], [NAN] * 3])
    figures.plot_score_matrix([Row("pgcd", R[None])], ORGANS, LEARNED_AT, tmp_path / "f.png")
    axes = drawn[0].axes[0]
    assert sorted(text.get_text() for text in axes.texts) == ["20", "50", "70", "90"]
    assert [patch.get_xy() for patch in axes.patches] == [(1, 0)]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["step 1", "step 2"]


def test_forgetting_is_that_of_the_table(tmp_path, drawn):
    figures.plot_forgetting([PGCD, FINETUNE, JOINT], {}, ORGANS, LEARNED_AT, tmp_path / "f.png")
    axes = drawn[0].axes[0]
    shown = [line.get_xdata().tolist() for line in axes.get_lines() if line.get_marker() in ("o", "s")]
    np.testing.assert_allclose(sorted(x for xs in shown for x in xs if len(xs) == 2), [0, 0, 80, 90])
    assert [label.get_text() for label in axes.get_yticklabels()] == ORGANS[:2]


def test_forgetting_of_single_runs_is_that_of_finished_ones(tmp_path, drawn):
    begun = np.array([PGCD.by_seed[0][0], [NAN] * 3])
    ended = PGCD.by_seed[0] - 0.1
    for runs, n_dots in (([PGCD.by_seed[0], begun], 0), ([PGCD.by_seed[0], ended, begun], 2)):
        figures.plot_forgetting([PGCD], {"pgcd": runs}, ORGANS, LEARNED_AT, tmp_path / "f.png")
        assert [line.get_marker() for line in drawn[-1].axes[0].get_lines()].count(".") == n_dots


def test_much_forgetting_is_a_heat_map(tmp_path, drawn):
    R = np.array([[0.9] * 20 + [NAN], [0.4] * 20 + [0.9]])
    rows = [Row(method, R[None]) for method in ("pgcd", "finetune", "lwf")]
    figures.plot_forgetting(rows, {}, [*MANY, "last"], [1] * 20 + [2], tmp_path / "f.png")
    assert {text.get_text() for text in drawn[0].axes[0].texts} == {"50"}
    assert figures.forgetting_is_matrix(3, 20)
    assert not figures.forgetting_is_matrix(3, 4)


def test_nothing_to_draw(tmp_path):
    with pytest.raises(ValueError, match="no forgetting"):
        figures.plot_forgetting([JOINT], {}, ORGANS, LEARNED_AT, tmp_path / "f.png")
    with pytest.raises(ValueError, match="no method"):
        figures.plot_subjects({}, ORGANS, "Dice (%)", tmp_path / "f.png")
    assert not list(tmp_path.iterdir())


def test_where_colour_is_the_method_organs_have_none(tmp_path, drawn):
    figures.plot_subjects({"pgcd": np.full((2, 3), 50.0)}, ORGANS, "Dice (%)", tmp_path / "f.png")
    figures.plot_forgetting([PGCD], {}, ORGANS, LEARNED_AT, tmp_path / "f.png")
    colour = figures.method_styles(["pgcd"])["pgcd"][0]
    for figure in drawn:
        lines = [line for line in figure.axes[0].get_lines() if line.get_marker() != "None"]
        assert {line.get_color() for line in lines} <= {colour, "black"}


@pytest.mark.parametrize(
    ("values", "is_black"), [([0.0], False), ([0.0, 0.0, 9.0, 0.0, 0.0], False), ([1.0, 2.0], True)]
)
def test_a_box_without_height_is_a_line_in_the_colour_of_its_method(tmp_path, drawn, values, is_black):
    figures.plot_subjects({"pgcd": np.array(values)[:, None]}, ["liver"], "Dice (%)", tmp_path / "f.png")
    colour = figures.method_styles(["pgcd"])["pgcd"][0]
    median = next(line for line in drawn[0].axes[0].get_lines() if line.get_linewidth() == 1.6)
    assert median.get_color() == ("black" if is_black else colour)


def test_characters_that_the_font_lacks_are_of_another_font_where_one_is_installed(tmp_path, monkeypatch, drawn):
    monkeypatch.setattr(figures, "_OTHER_FONTS", ("Not Installed", "STIXGeneral"))
    figures.plot_subjects({"pgcd": np.ones((2, 1))}, ["liver"], "Dice (%)", tmp_path / "f.png")
    (name,) = [text for text in drawn[0].axes[0].get_xticklabels() if text.get_text() == "liver"]
    assert name.get_fontfamily() == ["DejaVu Sans", "STIXGeneral"]


def test_organs_keep_their_colours_in_another_order(tmp_path, drawn):
    found = {name: np.ones(2) for name in ORGANS}
    for classes in (ORGANS, ORGANS[::-1]):
        figures.plot_drift({"pgcd": found}, classes, tmp_path / "f.png")
    first, last = (
        {line.get_label(): line.get_color() for line in f.axes[0].get_lines()} for f in (drawn[0], drawn[-1])
    )
    assert first == last
    assert len(set(first.values())) == 3


def test_boxes_stand_on_as_many_lines_as_they_need(tmp_path, drawn):
    scores = {f"method_{i}": np.full((2, 20), 50.0) for i in range(5)}
    figures.plot_subjects(scores, MANY, "HD95 (mm)", tmp_path / "f.png")
    labels = [[label.get_text() for label in axes.get_xticklabels()] for axes in drawn[0].axes]
    assert [name for line in labels for name in line] == MANY
    assert len(labels) > 1


def test_terms_that_are_not_positive_are_left_out_of_the_logarithmic_axis(tmp_path, drawn):
    terms = {"segmentation": np.array([-0.3, -0.6]), "ewc": np.array([0.0, 0.1])}
    figures.plot_loss_terms({"step 2": terms}, tmp_path / "f.png")
    segmentation, others = drawn[0].axes
    np.testing.assert_allclose(segmentation.get_lines()[0].get_ydata(), [-0.3, -0.6])
    np.testing.assert_allclose(others.get_lines()[0].get_ydata(), [NAN, 0.1])
    assert others.get_yscale() == "log"


def test_drift_needs_two_measured_steps(tmp_path, drawn):
    found = {"liver": np.array([0.0, 1.0, NAN]), "spleen": np.array([NAN, 0.0, NAN])}
    figures.plot_drift({"pgcd": found}, ORGANS, tmp_path / "f.png")
    lines = drawn[0].axes[0].get_lines()
    assert [line.get_label() for line in lines] == ["liver"]
    np.testing.assert_allclose(lines[0].get_xydata(), [[1, 0], [2, 1]])


def test_odd_names(tmp_path, drawn):
    figures.plot_subjects({"_m$x$": np.ones((2, 1))}, ["_a$b$ <b>&"], "Dice (%)", tmp_path / "f.png")
    assert drawn[0].legends[0].get_texts()[0].get_text() == " _m\\$x\\$"
    assert drawn[0].axes[0].get_xticklabels()[0].get_text() == " _a\\$b\\$ <b>&"


def test_settings_of_others_change_nothing(tmp_path):
    """A training in the same process leaves the fonts and colours of nnU-Net's plots behind."""
    figures.plot_subjects({"pgcd": np.ones((2, 1))}, ["liver"], "Dice (%)", tmp_path / "before.png")
    with mpl_style.context({"font.size": 40, "axes.facecolor": "#EAEAF2", "axes.grid": True, "legend.fontsize": 30}):
        figures.plot_subjects({"pgcd": np.ones((2, 1))}, ["liver"], "Dice (%)", tmp_path / "after.png")
    assert (tmp_path / "before.png").read_bytes() == (tmp_path / "after.png").read_bytes()


@pytest.mark.filterwarnings("error::UserWarning")
def test_no_name_is_cut_off(tmp_path, drawn):
    names = [f"a_rather_long_name_{i}" for i in range(14)]
    figures.plot_drift({"pgcd": {name: np.arange(3.0) for name in names}}, names, tmp_path / "f.png")
    legend, figure = drawn[0].legends[0], drawn[0]
    assert len(legend.get_texts()) == 14
    assert legend.get_window_extent().x1 <= figure.bbox.x1


def test_no_method_is_cut_off(tmp_path, drawn):
    rows = [Row(f"a_rather_long_name_{i}", PGCD.by_seed) for i in range(30)]
    figures.plot_mean_dice(rows, LEARNED_AT, tmp_path / "f.png")
    names = drawn[0].legends[0].get_texts()
    boxes = [name.get_window_extent() for name in names]
    assert len(boxes) == 30
    assert min(box.y0 for box in boxes) >= 0
    assert max(box.x1 for box in boxes) <= drawn[0].bbox.x1
