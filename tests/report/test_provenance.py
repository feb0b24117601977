from __future__ import annotations

import getpass
import platform
from pathlib import Path

import pytest

from nnunet_cil.report import provenance


@pytest.mark.parametrize(
    ("written", "told"),
    [
        ("/home/alice/data/Dataset001_X", "Dataset001_X"),
        ("~/data/split.json", "split.json"),
        ("~alice/split.json", "split.json"),
        ("C:\\Users\\alice\\data", "data"),
        ("\\\\server\\alice\\data", "data"),
        (Path("/home/alice/x"), "x"),
        ("Dataset001_X", "Dataset001_X"),
        ("../split.json", "../split.json"),
        (3, 3),
        (None, None),
    ],
)
def test_only_the_last_part_of_a_path_is_told(written, told):
    assert provenance.without_folders({"a": [{"b": written}]}) == {"a": [{"b": told}]}


def test_versions_have_python_and_the_package():
    found = provenance.versions()
    assert found["Python"] == platform.python_version()
    assert {"nnunet-cil", "nnunetv2", "torch"} <= set(found)


def test_a_package_that_is_not_installed_is_left_out(monkeypatch):
    monkeypatch.setattr(provenance, "PACKAGES", ("no-such-package-at-all",))
    assert set(provenance.versions()) == {"Python"}


def test_the_machine_has_no_name():
    told = provenance.machine()
    assert told["Processor"]
    assert int(told["Processor cores"]) >= 1
    for private in (platform.node(), str(Path.home())):
        assert private not in told.values()
    assert getpass.getuser() not in told.values()


def test_processor_without_proc(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "_CPU_INFO", tmp_path / "none")
    assert provenance.machine()["Processor"]
