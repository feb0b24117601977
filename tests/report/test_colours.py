from __future__ import annotations

from nnunet_cil.report.colours import PLAIN_ORGANS, method_styles, organ_style
from nnunet_cil.schedule import ABLATIONS

METHODS = ("pgcd", "pseudo_kd", "pseudo", "plop", "mib", "ilt", "lwf", "ewf", "ewc", "finetune", "replay", "joint")


def test_organs_are_told_apart():
    styles = [organ_style(i) for i in range(21)]
    assert len(set(styles)) == 21
    assert len({style.colour for style in styles[:14]}) == 14
    assert all(not style.hatch for style in styles[:PLAIN_ORGANS])
    assert all(style.hatch for style in styles[PLAIN_ORGANS:])


def test_methods_are_told_apart():
    styles = method_styles([*METHODS, *(f"pgcd-{name}" for name in ABLATIONS)])
    assert len(set(styles.values())) == len(styles)


def test_variants_beside_all_ablations_are_told_apart():
    styles = method_styles([*METHODS, *(f"pgcd-{name}" for name in ABLATIONS), *(f"mine_{i}" for i in range(12))])
    assert len(set(styles.values())) == len(styles)


def test_the_ensemble_of_a_method_has_its_colour_wherever_it_stands():
    name = "pgcd, 5 folds ensembled"
    alone, beside = method_styles([name]), method_styles([*METHODS, "mine", "mine, 5 folds ensembled", name])
    assert alone[name] == beside[name]
    assert alone[name][0] == beside["pgcd"][0]
    assert len(set(beside.values())) == len(beside)


def test_underscores_do_not_matter():
    assert method_styles(["pseudo_kd"])["pseudo_kd"] == method_styles(["PseudoKD"])["PseudoKD"]


def test_an_unknown_method_keeps_its_style_among_the_same():
    assert method_styles(["a", "b"])["b"] == method_styles(["b", "a", "pgcd", "a"])["b"]
    assert method_styles(["a", "b"])["a"] != method_styles(["a", "b"])["b"]
