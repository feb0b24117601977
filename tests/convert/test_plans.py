"""Every ready schedule loads on what the conversion that it names writes."""

import argparse
import re
import shlex
from pathlib import Path

import pytest

from nnunet_cil.cases import held_out_cases, step_cases
from nnunet_cil.cli import convert
from nnunet_cil.schedule import load_schedule
from nnunet_cil.source_check import check_sources
from tests.convert.made_up import MAKERS, make_msd, make_totalsegmentator

PLANS = sorted((Path(__file__).parents[2] / "plans").glob("*.yaml"))
MSD_LABELS = {
    "Task03_Liver": {"0": "background", "1": "liver", "2": "cancer"},
    "Task07_Pancreas": {"0": "background", "1": "pancreas", "2": "cancer"},
    "Task09_Spleen": {"0": "background", "1": "spleen"},
}


def commands(plan):
    """Arguments of the conversions that a plan names in its comment."""
    text = re.sub(r"\\\n#\s+", "", plan.read_text(encoding="utf-8"))
    return [shlex.split(line) for line in re.findall(r"^#\s+nnunet-cil (convert .+)$", text, re.MULTILINE)]


def make_source(tmp_path, args):
    if args.set == "msd":
        return make_msd(tmp_path, args.source.name, MSD_LABELS[args.source.name], {"0": "CT"})
    if args.set == "totalsegmentator":
        return make_totalsegmentator(tmp_path, args.organs)
    return MAKERS[args.set](tmp_path)


@pytest.mark.parametrize("plan", PLANS, ids=lambda path: path.stem)
def test_plan_fits_the_dataset_that_it_asks_for(tmp_path, nnunet_folders, plan, capsys):
    parser = argparse.ArgumentParser()
    convert.add_parser(parser.add_subparsers())
    assert commands(plan)
    for command in commands(plan):
        args = parser.parse_args(command)
        source = make_source(tmp_path / "sources", args)
        assert source.name == args.source.name
        args.source = source
        assert args.run(args) == 0
    folder = Path(capsys.readouterr().out.splitlines()[0])
    schedule = load_schedule(plan)
    assert schedule.name == plan.stem
    assert schedule.mirror_axes == (0, 1)
    assert len(schedule.test) == 1
    if schedule.source is not None:
        assert schedule.source == folder
        assert schedule.train_subjects
        assert not set(schedule.train_subjects) & set(schedule.test[0].subjects)
    cases = {step: step_cases(schedule, step) for step in schedule.own_steps}
    assert check_sources(schedule, cases)
    assert held_out_cases(schedule)


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("btcv_4-4", [4, 4]),
        ("btcv_2-2", [2, 2, 2, 2]),
        ("btcv_8-5", [8, 5]),
        ("word_4-4", [4, 4, 4, 4]),
        ("amos_ct_5-5", [5, 5, 5]),
        ("totalsegmentator_8-5", [8, 5]),
        ("chaos_t2spir_2-2", [2, 2]),
    ],
)
def test_names_say_how_many_classes_a_step_learns(name, sizes):
    text = next(plan for plan in PLANS if plan.stem == name).read_text(encoding="utf-8")
    steps = re.findall(r"^  - \[(.+)\]$", text, re.MULTILINE)
    assert [len(step.split(",")) for step in steps] == sizes
