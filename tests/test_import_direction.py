"""Imports go one way: what a layer holds may import its own layer and those before it. Lazy imports count too."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

LAYERS = (
    {"untrusted", "checkpoint", "host_memory", "ranks", "step_files"},
    {"labels", "schedule", "metrics", "losses", "prototypes", "features", "parallel", "surface_scores", "given_model"},
    {"nnunet_api", "environment", "phantom", "convert", "logging_terms", "precision"},
    {"cases", "teacher", "block", "lineage", "plan_override", "intensity", "extraction", "pseudo_labels", "imprinting"},
    {"objectives", "chain"},
    {"trainer", "source_check", "dataset"},
    {"driver", "evaluate", "report", "export", "audit", "guard", "launcher", "gather", "present", "advice"},
    {"cli", "trainers"},
)
LAYER_OF = {name: number for number, names in enumerate(LAYERS) for name in names}
LEAVES = {"untrusted", "checkpoint", "host_memory", "ranks", "metrics", "features", "environment", "phantom"}
NNUNET = {"trainer", "nnunet_api", "logging_terms", "trainers"}  # logging_terms: a subclass of nnU-Net's logger
NO_TORCH = {"untrusted", "labels", "schedule", "metrics", "environment", "report", "cli"}


def imported(path: Path) -> set[str]:
    """Full dotted names of all that a file imports; ``from a import b`` counts as ``a.b``."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: line {node.lineno}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def all_imports() -> dict[str, set[str]]:
    """Dotted name of each module or sub-package, trainers included, -> dotted names that it imports."""
    found = {}
    for path in [*(ROOT / "nnunet_cil").rglob("*.py"), *(ROOT / "trainers").glob("*.py")]:
        parts = path.relative_to(ROOT).with_suffix("").parts
        parts = parts if parts[0] == "nnunet_cil" else ("nnunet_cil", *parts)
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        if len(parts) > 1:
            found[".".join(parts)] = imported(path)
    return found


def parts_of(names: set[str]) -> set[str]:
    return {name.split(".")[1] for name in names if name.startswith("nnunet_cil.")}


def module_of(name: str) -> str | None:
    """Module or sub-package that an imported name is of: the longest that fits; None if it is none of ours."""
    while name and name not in IMPORTS:
        name = name.rpartition(".")[0]
    return name or None


IMPORTS = all_imports()
GRAPH = {
    part: set().union(*(names for module, names in IMPORTS.items() if module.split(".")[1] == part))
    for part in parts_of(set(IMPORTS))
}
OWN = {part: parts_of(names) - {part} for part, names in GRAPH.items()}


def test_every_part_has_a_layer():
    assert set(GRAPH) == set(LAYER_OF), "place a new module in LAYERS; take out one that is gone"


@pytest.mark.parametrize("part", sorted(GRAPH))
def test_imports_go_one_way(part):
    assert {other for other in OWN[part] if LAYER_OF[other] > LAYER_OF[part]} == set()


def test_no_circles():
    TopologicalSorter({module: set(map(module_of, names)) - {None} for module, names in IMPORTS.items()}).prepare()


@pytest.mark.parametrize("part", sorted(LEAVES))
def test_leaves_import_nothing_of_ours(part):
    assert OWN[part] == set()


def test_nothing_imports_cli_or_trainers():
    assert {part for part, others in OWN.items() if others & {"cli", "trainers"}} == set()


def test_training_does_not_know_the_driver():
    """The command typed by hand needs no more than the step's files."""
    known, todo = set(), ["trainer"]
    while todo:
        part = todo.pop()
        known.add(part)
        todo += OWN[part] - known
    others = {"driver", "cases", "source_check", "dataset", "evaluate", "chain", "report", "cli"}
    assert known & others == set()


def test_the_driver_does_not_import_the_trainer():
    others = ("driver", "cases", "source_check", "dataset", "evaluate", "chain")
    assert [part for part in others if "trainer" in OWN[part]] == []


def test_nnunetv2_has_one_gateway():
    users = {part for part, names in GRAPH.items() if any(name.split(".")[0] == "nnunetv2" for name in names)}
    assert users <= NNUNET


@pytest.mark.parametrize("part", sorted(NO_TORCH))
def test_no_torch(part):
    assert {name for name in GRAPH[part] if name.split(".")[0] in ("torch", "nnunetv2")} == set()
