from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from matplotlib.figure import Figure

from nnunet_cil.report import figures
from nnunet_cil.report.table import Row

NAN = np.nan
LEARNED_AT = [1, 1, 2]
PGCD = Row("pgcd", np.array([[0.9, 0.8, NAN], [0.9, 0.8, 0.7]]))
FINETUNE = Row("finetune", np.array([[0.9, 0.8, NAN], [0.0, 0.0, 0.9]]))
JOINT = Row("joint", np.array([[NAN] * 3, [0.9, 0.9, 0.9]]))


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


def test_a_method_keeps_its_colour(tmp_path, drawn):
    figures.plot_mean_dice([PGCD, FINETUNE, JOINT], LEARNED_AT, tmp_path / "a.png")
    figures.plot_mean_dice([FINETUNE, Row("mine", PGCD.R)], LEARNED_AT, tmp_path / "b.png")
    first, second = _lines(drawn[0]), _lines(drawn[-1])
    assert first["finetune"].get_color() == second["finetune"].get_color()
    colours = {line.get_color() for line in (*first.values(), *second.values())}
    assert len(colours) == 4


def test_a_step_without_score_is_left_out(tmp_path, drawn):
    R = np.array([[0.9, 0.8, NAN], [NAN] * 3, [0.5, 0.6, 0.7]])
    figures.plot_mean_dice([Row("pgcd", R)], LEARNED_AT, tmp_path / "mean.png")
    np.testing.assert_allclose(_lines(drawn[0])["pgcd"].get_xydata(), [[1, 85], [3, 60]])


def test_one_step(tmp_path):
    figures.plot_mean_dice([Row("pgcd", np.array([[0.9]]))], [1], tmp_path / "mean.png")
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
        figures.plot_mean_dice([Row("pgcd", np.full((2, 3), NAN))], LEARNED_AT, tmp_path / "mean.png")
    assert not list(tmp_path.iterdir())


def test_does_not_load_pyplot():
    code = "import sys, nnunet_cil.report.figures; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
