from __future__ import annotations

from itertools import permutations

from nnunet_cil.report.colours import PLAIN_ORGANS, method_styles, organ_styles
from nnunet_cil.schedule import ABLATIONS

METHODS = ("pgcd", "pseudo_kd", "pseudo", "plop", "mib", "ilt", "lwf", "ewf", "ewc", "finetune", "replay", "joint")


def test_organs_are_told_apart():
    styles = list(organ_styles([f"organ_{i:02}" for i in range(21)]).values())
    assert len(set(styles)) == 21
    assert len({style.colour for style in styles[:14]}) == 14
    assert all(not style.hatch for style in styles[:PLAIN_ORGANS])
    assert all(style.hatch for style in styles[PLAIN_ORGANS:])


KNOWN = ["liver", "spleen", "right_kidney", "left_kidney", "pancreas", "stomach", "gallbladder"]


def test_an_organ_has_its_colour_in_whatever_order_it_is_learned():
    for names in (["liver", "right_kidney", "spleen", "aorta"], ["zebra", "Ball", "liver_2"]):
        assert len({tuple(sorted(organ_styles(order).items(), key=str)) for order in permutations(names)}) == 1


def test_well_known_organs_have_their_colours_in_every_chain():
    every = organ_styles(KNOWN)
    assert [every[name] for name in KNOWN] == list(organ_styles("abcdefg").values()), "the plain ones, in this order"
    for name in KNOWN:
        assert organ_styles(["aorta", name, "vena_cava"])[name] == every[name]
    for name in ("kidney_right", "Right Kidney", "RIGHT-kidney"):
        assert organ_styles([name])[name] == every["right_kidney"]


def test_other_organs_take_what_is_free():
    every, found = organ_styles(KNOWN), organ_styles(["vein", "spleen", "Aorta", "left_kidney", "kidney_left"])
    assert found["spleen"] == every["spleen"]
    assert found["kidney_left"] == every["left_kidney"], "the first of two by the alphabet"
    assert [found[name] for name in ("Aorta", "left_kidney", "vein")] == [
        every[name] for name in ("liver", "right_kidney", "pancreas")
    ]


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
