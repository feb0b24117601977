from __future__ import annotations

import shutil

import pytest

from nnunet_cil.cli.main import main
from tests.report.chain_files import open_chain, write_chain


def test_prints_where_the_report_is(nnunet_folders, tmp_path, capsys):
    chain = open_chain(tmp_path)
    write_chain(chain, methods=("pgcd", "finetune"))
    assert main(["report", str(tmp_path / "tiny.yaml"), "--methods", "pgcd", "finetune", "--seeds", "0"]) == 0
    path = chain.folder / "report.html"
    assert capsys.readouterr().out == f"{path}\n"
    assert "finetune" in path.read_text(encoding="utf-8")


def test_an_unknown_method_is_one_line(nnunet_folders, tmp_path, capsys):
    open_chain(tmp_path)
    assert main(["report", str(tmp_path / "tiny.yaml"), "--methods", "no_such"]) == 1
    assert "no_such" in capsys.readouterr().err


@pytest.mark.parametrize("is_prepared", [False, True])
def test_a_chain_that_was_never_started_has_no_report(nnunet_folders, tmp_path, capsys, is_prepared):
    chain = open_chain(tmp_path)
    if not is_prepared:
        shutil.rmtree(chain.folder)
    before = sorted(nnunet_folders["nnUNet_results"].rglob("*"))
    assert main(["report", str(tmp_path / "tiny.yaml")]) == 1
    shown = capsys.readouterr().err
    assert f"{chain.folder}: got no training that was begun and no scores, expected some to report." in shown
    assert f"`nnunet-cil run {tmp_path / 'tiny.yaml'}`" in shown
    assert sorted(nnunet_folders["nnUNet_results"].rglob("*")) == before
