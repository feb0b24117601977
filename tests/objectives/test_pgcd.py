from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from nnunet_cil.losses.distillation import folded_distillation
from nnunet_cil.objectives.pgcd import PGCD, class_balance
from nnunet_cil.prototypes import PrototypeStore
from nnunet_cil.schedule import METHOD_DEFAULTS
from tests.objectives.common import N_CLASSES, N_OLD, D, batch


def store(means: np.ndarray | None = None) -> PrototypeStore:
    means = np.random.default_rng(0).normal(size=(N_OLD, D)).astype(np.float32) if means is None else means
    zeros = np.zeros(N_OLD)
    centre = np.nanmean(means, 0).astype(np.float32)
    names = ("background", "liver", "spleen")
    return PrototypeStore(names, means, zeros + 5, zeros, centre, 0.2, zeros > 0, 1, "", "decoder.stages.1")


def objective(prototypes: PrototypeStore | None = None, **settings) -> PGCD:
    return PGCD(N_OLD, N_CLASSES, {**METHOD_DEFAULTS, "n_min": 1, "voxel_stride": 1, **settings}, prototypes or store())


def test_all_terms_have_their_weights():
    plain = objective(lambda_pgcd=1.0, lambda_dapd=1.0, eta=1.0)(*batch())
    weighted = objective(lambda_pgcd=2.0, lambda_dapd=0.5, eta=0.1)(*batch())
    assert set(plain) == {"pgcd_spatial", "pgcd_channel", "dapd_global", "dapd_local"}
    factors = {"pgcd_spatial": 2, "pgcd_channel": 0.2, "dapd_global": 0.5, "dapd_local": 0.5}
    for name, factor in factors.items():
        torch.testing.assert_close(weighted[name], factor * plain[name])


def test_settings_reach_the_losses():
    chosen = objective(w_max=1.5, voxel_stride=2, n_min=3)
    assert (chosen.pgcd.w_max, chosen.pgcd.voxel_stride, chosen.dapd.n_min) == (1.5, 2, 3)


def test_all_that_it_computes_with_follows_the_device():
    own = objective()
    kept = {name for module in own.modules() for name, value in vars(module).items() if isinstance(value, torch.Tensor)}
    assert not kept, "a plain attribute stays behind"
    assert {"means", "usable", "centre", "tau", "background.prototype"} <= set(dict(own.named_buffers()))
    assert all(buffer.device.type == "meta" for buffer in own.to("meta").buffers())


@pytest.mark.parametrize(
    ("settings", "left"),
    [
        ({"lambda_pgcd": 0.0, "lambda_dapd": 0.0}, set()),
        ({"lambda_dapd": 0.0}, {"pgcd_spatial", "pgcd_channel"}),
        ({"lambda_dapd": 0.0, "eta": 0.0}, {"pgcd_spatial"}),
        ({"lambda_dapd": 0.0, "pgcd_spatial": False}, {"pgcd_channel"}),
        ({"lambda_dapd": 0.0, "pgcd_spatial": False, "eta": 0.0}, set()),
        ({"lambda_pgcd": 0.0}, {"dapd_global", "dapd_local"}),
        ({"lambda_pgcd": 0.0, "dapd_global": False}, {"dapd_local"}),
        ({"lambda_pgcd": 0.0, "dapd_local": False}, {"dapd_global"}),
    ],
)
def test_a_weight_of_zero_leaves_the_term_out_and_the_others_alone(settings, left):
    whole, part = objective()(*batch()), objective(**settings)(*batch())
    assert set(part) == left
    for name in left:
        assert torch.equal(part[name], whole[name])


def test_uniform_weights_are_folded_distillation_where_nothing_new_is_labelled():
    student, teacher, labels = batch()
    terms = objective(calibration="uniform", lambda_dapd=0.0)(student, teacher, labels)
    kept = ~((labels >= N_OLD) & (labels < N_CLASSES))
    torch.testing.assert_close(terms["pgcd_spatial"], folded_distillation(student.logits, teacher.logits, kept))
    calibrated = objective(lambda_dapd=0.0)(student, teacher, labels)
    assert not torch.allclose(terms["pgcd_spatial"], calibrated["pgcd_spatial"])
    assert not torch.allclose(terms["pgcd_channel"], calibrated["pgcd_channel"])


def test_a_momentum_of_one_keeps_the_background_prototype():
    static = objective(mu=1.0)
    before = static.background.prototype.clone()
    static(*batch())
    assert torch.equal(static.background.prototype, before)


def test_scaling_by_classes():
    plain, scaled = objective()(*batch()), objective(scale_by_classes=True)(*batch())
    for name in plain:
        torch.testing.assert_close(scaled[name], math.sqrt(N_OLD / (N_CLASSES - N_OLD)) * plain[name])


@pytest.mark.parametrize("source", ["teacher", "student"])
def test_background_prototype_follows_the_chosen_features(source):
    chosen, data = objective(mu=0.9, background_features=source), batch()
    before = chosen.background.prototype.clone()
    chosen(*data)
    student, teacher, labels = data
    features = (teacher if source == "teacher" else student).features[0]
    background = features.movedim(1, -1)[labels == 0]
    torch.testing.assert_close(chosen.background.prototype, 0.9 * before + 0.1 * background.mean(0))
    assert torch.equal(chosen.means[0], before), "the stored one stays"


def test_state_holds_the_background_and_is_restored():
    first = objective(mu=0.5)
    first(*batch())
    second = objective(mu=0.5)
    second.load_state_dict(first.state_dict())
    ours, theirs = first(*batch(1)), second(*batch(1))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert not torch.equal(ours["dapd_global"], objective(mu=0.5)(*batch(1))["dapd_global"])


def test_a_class_without_prototype_gives_finite_terms():
    means = store().means.copy()
    means[2] = np.nan
    assert all(torch.isfinite(term) for term in objective(store(means))(*batch()).values())


def test_a_class_without_prototype_has_no_share_of_the_voxels():
    means = store().means.copy()
    means[2] = np.nan
    objective_, (student, teacher, labels) = objective(store(means), mu=1.0, eta=1.0, lambda_dapd=0.0), batch()
    expected = objective_.pgcd(
        student.logits,
        teacher.logits,
        student.features[0],
        teacher.features[0],
        labels,
        objective_.means,
        objective_.centre,
        torch.tensor([True, True, False]),
        objective_.tau,
    )
    terms = objective_(student, teacher, labels)
    for name in ("pgcd_spatial", "pgcd_channel"):
        torch.testing.assert_close(terms[name], expected[name])


@pytest.mark.parametrize("prototypes", [None, "too many"])
def test_prototypes_of_other_classes_are_refused(prototypes):
    with pytest.raises(ValueError, match=r"prototypes: got (none|3), expected"):
        PGCD(N_OLD + bool(prototypes), 6, METHOD_DEFAULTS, store() if prototypes else None)


def test_balance_has_mean_one_over_voxels_and_a_bound():
    counts = torch.tensor([9000.0, 900.0, 90.0, 10.0])
    weights = class_balance(counts, 5.0)
    assert weights.max() <= 5
    assert (weights.diff() >= 0).all()
    assert float((weights * counts).sum() / counts.sum()) == pytest.approx(1, rel=1e-5)


def test_balance_of_equal_or_absent_classes_is_one():
    torch.testing.assert_close(class_balance(torch.tensor([7.0, 7.0]), 5.0), torch.ones(2))
    assert class_balance(torch.tensor([7.0, 0.0]), 5.0)[1] == 1


def test_balance_is_taken_from_the_counts_of_the_old_classes_only_where_asked_for():
    counts = torch.tensor([100.0, 10.0, 1.0, 50.0, 50.0])
    balanced, plain = objective(class_balance=True, class_balance_max=2.0), objective()
    for each in (balanced, plain):
        each.set_label_counts(counts)
    torch.testing.assert_close(balanced.pgcd.balance, class_balance(counts[:N_OLD], 2.0))
    assert plain.pgcd.balance is None


def test_balance_needs_labels_that_are_counted_once():
    with pytest.raises(ValueError, match="class_balance: got pseudo_labels 'online', expected 'offline'"):
        objective(class_balance=True, pseudo_labels="online")
