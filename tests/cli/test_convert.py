import argparse
import subprocess
import sys

import pytest

from nnunet_cil.cli import convert
from tests.convert.made_up import TOTAL_ORGANS, make_amos, make_btcv, make_totalsegmentator


def parse(*arguments):
    parser = argparse.ArgumentParser()
    convert.add_parser(parser.add_subparsers(required=True))
    return parser.parse_args(["convert", *map(str, arguments)])


def test_it_tells_folder_split_terms_and_what_to_write_into_a_schedule(tmp_path, nnunet_folders, capsys):
    args = parse("btcv", make_btcv(tmp_path), "--dataset-id", 300)
    assert args.run(args) == 0
    folder = nnunet_folders["nnUNet_raw"] / "Dataset300_BTCV"
    shown = capsys.readouterr().out
    lines = shown.splitlines()
    assert lines[0] == str(folder)
    assert lines[1].startswith("30 cases: 18 for training, 12 for test. Split: ")
    assert "TransUNet" in lines[1]
    for part in (
        "Labels: 0 background, 1 spleen, 2 right_kidney",
        "Terms: ",
        "Cite: Landman",
        "source: Dataset300_BTCV",
    ):
        assert part in shown
    assert f"test: {folder / 'split.json'}" in shown


def test_name_and_the_options_of_a_set(tmp_path, nnunet_folders):
    args = parse("amos", make_amos(tmp_path), "--dataset-id", 12, "--modality", "mr", "--name", "AbdomenMR")
    args.run(args)
    args = parse("totalsegmentator", make_totalsegmentator(tmp_path), "--dataset-id", 13, "--organs", *TOTAL_ORGANS)
    args.run(args)
    assert {path.name for path in nnunet_folders["nnUNet_raw"].iterdir()} == {
        "Dataset012_AbdomenMR",
        "Dataset013_TotalSegmentator",
    }


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["no-such-set", "folder", "--dataset-id", "1"],
        ["btcv", "--dataset-id", "1"],
        ["btcv", "folder"],
        ["btcv", "folder", "--dataset-id", "one"],
        ["btcv", "folder", "--dataset-id", "1", "--modality", "ct"],
        ["amos", "folder", "--dataset-id", "1"],
        ["amos", "folder", "--dataset-id", "1", "--modality", "t2spir"],
        ["chaos", "folder", "--dataset-id", "1", "--modality", "mr"],
        ["totalsegmentator", "folder", "--dataset-id", "1"],
        ["totalsegmentator", "folder", "--dataset-id", "1", "--organs"],
    ],
)
def test_wrong_arguments_end_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as end:
        parse(*arguments)
    assert end.value.code == 2


def test_a_wrong_source_is_an_error_that_the_command_line_shows(tmp_path, nnunet_folders):
    args = parse("word", tmp_path, "--dataset-id", 1)
    with pytest.raises(ValueError, match="expected imagesTr, imagesVal, imagesTs"):
        args.run(args)
    assert list(nnunet_folders["nnUNet_raw"].iterdir()) == []


def test_debug_may_stand_behind_the_set():
    assert parse("btcv", "folder", "--dataset-id", 1, "--debug").debug
    assert not hasattr(parse("btcv", "folder", "--dataset-id", 1), "debug")


def test_help_of_each_set_imports_nothing_heavy():
    code = f"""
import argparse, sys
from nnunet_cil.cli import convert
for name in {list(convert.SETS)}:
    parser = argparse.ArgumentParser()
    convert.add_parser(parser.add_subparsers())
    try:
        parser.parse_args(["convert", name, "--help"])
    except SystemExit as end:
        assert end.code == 0
print("LOADED", sorted({{"torch", "nnunetv2", "numpy", "SimpleITK", "nibabel", "PIL", "yaml"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "LOADED []"
