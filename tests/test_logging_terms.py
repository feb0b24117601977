from __future__ import annotations

import math

import numpy as np
import pytest
from PIL import Image

from nnunet_cil import logging_terms
from nnunet_cil.logging_terms import TermLogger


def logged(epochs: int = 3, terms: bool = True) -> TermLogger:
    logger = TermLogger()
    for epoch in range(epochs):
        values = {"train_losses": 1.0, "val_losses": 0.5, "dice_per_class_or_region": [0.2], "lrs": 0.01}
        for key, value in {**values, "mean_fg_dice": 0.2, "epoch_start_timestamps": epoch}.items():
            logger.log(key, value, epoch)
        logger.log("epoch_end_timestamps", epoch + 1, epoch)
        if terms:
            logger.log("loss_pgcd_spatial", 0.1 * epoch, epoch)
    return logger


def test_a_term_that_starts_late_has_nan_before():
    logger = TermLogger()
    logger.log("loss_dapd_local", 0.5, 2)
    assert [math.isnan(v) for v in logger.my_fantastic_logging["loss_dapd_local"]] == [True, True, False]


def test_keys_that_nobody_knows_are_still_refused():
    with pytest.raises(AssertionError):
        TermLogger().log("no_term", 0.5, 0)


def test_terms_are_part_of_the_checkpoint_and_come_back():
    checkpoint = logged().get_checkpoint()
    again = TermLogger()
    again.load_checkpoint(checkpoint)
    again.log("loss_pgcd_spatial", 0.7, 3)
    assert again.my_fantastic_logging["loss_pgcd_spatial"] == [0.0, 0.1, 0.2, 0.7]


def test_the_plot_has_a_panel_for_the_terms(tmp_path):
    heights = []
    for terms in (False, True):
        logged(terms=terms).draw(str(tmp_path))
        with Image.open(tmp_path / "progress.png") as image:
            heights.append(image.height)
            if terms:
                panel = image.convert("RGB").crop((0, heights[0], image.width, image.height))
                assert len(panel.getcolors(1 << 24)) > 10, "something is drawn in it"
    assert heights[1] > heights[0]


def test_short_epochs_do_not_draw_each_time(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(TermLogger, "draw", lambda self, folder: drawn.append(folder))
    logger = logged()
    for _ in range(3):
        logger.plot_progress_png(str(tmp_path))
    assert drawn == []
    monkeypatch.setattr(logging_terms, "PLOT_EVERY_SECONDS", 0.0)
    logger.plot_progress_png(str(tmp_path))
    assert len(drawn) == 1


def test_plots_take_no_more_than_their_share_of_the_time(tmp_path, monkeypatch):
    clock, drawn = [0.0], []

    def draw(self, folder):
        clock[0] += 4.0
        drawn.append(clock[0])

    monkeypatch.setattr(TermLogger, "draw", draw)
    monkeypatch.setattr(logging_terms, "monotonic", lambda: clock[0])
    logger = logged()
    for _ in range(2000):
        clock[0] += 1.0
        logger.plot_progress_png(str(tmp_path))
    assert drawn[0] == 64.0, "the first after a minute"
    assert np.allclose(np.diff(drawn), 404.0)
