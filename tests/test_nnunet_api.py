"""What is ours between nnU-Net's calls: the thread beside a GPU, the windows' logits, the cases of a fold."""

from __future__ import annotations

import json
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import tifffile
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_cil import nnunet_api
from nnunet_cil.nnunet_api import SlidingWindow, _one_by_one, fold_cases


@pytest.mark.parametrize("beside", [False, True])
def test_calls_come_in_their_order_and_all_are_done_at_the_end(beside):
    done = []
    with _one_by_one(beside) as call:
        for number in range(5):
            call(lambda number=number: done.append((number, threading.current_thread() is threading.main_thread())))
    assert done == [(number, not beside) for number in range(5)]


def test_of_the_calls_in_a_thread_one_works_and_one_waits():
    release, third = threading.Event(), threading.Event()

    def give_three() -> None:
        with _one_by_one(beside=True) as call:
            call(release.wait)
            call(lambda: None)
            call(lambda: None)
            third.set()

    caller = threading.Thread(target=give_three)
    caller.start()
    try:
        assert not third.wait(0.3), "the caller waits with the third"
    finally:
        release.set()
        caller.join(10)
    assert third.is_set()


@pytest.mark.parametrize("n_more", [0, 1, 5])
def test_what_a_call_raises_ends_the_caller_soon(n_more):
    given = []

    def fail() -> None:
        raise OSError("no space left")

    def give() -> None:
        with _one_by_one(beside=True) as call:
            call(fail)
            for number in range(n_more):
                given.append(number)
                call(lambda: None)

    with pytest.raises(OSError, match="no space left"):
        give()
    assert len(given) <= 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_logits_of_the_windows_are_as_precise_as_nnunets_and_hold_no_larger_map(dtype):
    padded = torch.arange(2 * 4 * 4 * 4).reshape(2, 4, 4, 4).to(dtype)
    found = padded[:, 1:3]  # nnU-Net cuts what it padded off by a view

    class Predictor(SimpleNamespace):
        def predict_sliding_window_return_logits(self, image: torch.Tensor) -> torch.Tensor:
            self.network.eval()
            return found

    window = SlidingWindow.__new__(SlidingWindow)
    window._predictor = Predictor(network=torch.nn.Identity())
    logits = window.logits(np.zeros((1, 4, 4, 4), np.float32))
    assert logits.dtype == dtype
    assert torch.equal(logits, found)
    assert logits.untyped_storage().nbytes() == found.element_size() * found.numel()
    assert window._predictor.network.training, "as it was"


def test_of_a_link_what_it_leads_to_is_linked(tmp_path):
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "image").write_bytes(b"voxels")
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "image").symlink_to("../store/image")  # relative, as of git-annex
    (tmp_path / "ours" / "deep").mkdir(parents=True)
    nnunet_api.link_or_copy(tmp_path / "theirs" / "image", tmp_path / "ours" / "deep" / "image")
    assert not (tmp_path / "ours" / "deep" / "image").is_symlink()
    assert (tmp_path / "ours" / "deep" / "image").read_bytes() == b"voxels"


@pytest.mark.parametrize("fold", ["all", 1, 2, 4])
def test_the_cases_of_a_fold_are_those_that_nnunet_trains_on(tmp_path, monkeypatch, fold):
    cases = [f"case_{number}" for number in range(7)]
    splits = nnunet_api.crossval_splits(cases)[:2]
    (tmp_path / "splits_final.json").write_text(json.dumps(splits), encoding="utf-8")
    folder = tmp_path / "data"
    folder.mkdir()
    for case in cases:
        (folder / f"{case}.b2nd").touch()
    trainer = SimpleNamespace(
        fold=fold,
        dataset_class=nnunet_api.preprocessed_dataset(folder).__class__,
        preprocessed_dataset_folder=str(folder),
        preprocessed_dataset_folder_base=str(tmp_path),
        folder_with_segs_from_previous_stage=None,
        print_to_log_file=lambda *_: None,
    )
    training, _ = nnUNetTrainer.do_split(trainer)
    assert fold_cases(folder, fold) == sorted(map(str, training))


def test_readers_that_are_tried_in_vain_print_no_traceback(tmp_path, capsys):
    tifffile.imwrite(tmp_path / "case_0_0000.tif", np.zeros((7, 6, 5), np.float32))
    reader = nnunet_api.reader_writer({"file_ending": ".tif"}, tmp_path / "case_0_0000.tif")
    assert type(reader).__name__ == "Tiff3DIO"
    assert "Traceback" not in capsys.readouterr().err
