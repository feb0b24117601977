import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nnunet_cil.losses.dapd import DAPDLoss, dapd_global, dapd_local
from nnunet_cil.prototypes import masked_sums

N_OLD, D = 3, 4


class Batch:
    """Random inputs of the loss; labels 0 to 5 in unequal numbers, those from N_OLD on are new or ignored."""

    def __init__(self, spatial=(4, 5), batch=2, dtype=torch.float32, seed=0):
        g = torch.Generator().manual_seed(seed)
        self.student_features = torch.randn(batch, D, *spatial, generator=g, dtype=dtype)
        self.teacher_features = torch.randn(batch, D, *spatial, generator=g, dtype=dtype)
        self.labels = torch.randint(0, 6, (batch, *spatial), generator=g)
        self.labels[0].clamp_(max=2)
        self.prototypes = torch.randn(N_OLD, D, generator=g, dtype=dtype)
        self.usable = torch.tensor([True, True, True])
        self.centre = torch.randn(D, generator=g, dtype=dtype)

    def loss(self, n_min=1):
        pooled = masked_sums(self.labels, N_OLD, self.student_features, self.teacher_features.detach())
        return DAPDLoss(n_min)(*pooled, self.prototypes, self.usable, self.centre)


def naive_mean(features, labels, c):
    voxels = [
        features[b].flatten(1)[:, v]
        for b in range(len(labels))
        for v in range(labels[b].numel())
        if labels[b].flatten()[v] == c
    ]
    return len(voxels), sum(voxels) / max(1, len(voxels))


def naive(batch: Batch, n_min: int) -> dict[str, float]:
    terms = {"dapd_global": [], "dapd_local": []}
    for c in range(N_OLD):
        n, student = naive_mean(batch.student_features, batch.labels, c)
        _, teacher = naive_mean(batch.teacher_features, batch.labels, c)
        if n < n_min:
            continue
        targets = {"dapd_local": teacher} | ({"dapd_global": batch.prototypes[c]} if batch.usable[c] else {})
        for name, target in targets.items():
            x, y = student - batch.centre, target - batch.centre
            terms[name].append(1 - float(x @ y / x.norm() / y.norm()))
    return {name: sum(values) / len(values) for name, values in terms.items()}


def test_value_by_hand():
    student = torch.tensor([[2.0, 1.0], [1.0, 2.0], [7.0, 7.0]])
    target = torch.tensor([[1.0, 2.0], [2.0, 2.0], [torch.nan, torch.nan]])
    centre = torch.tensor([1.0, 1.0])
    present = torch.tensor([True, True, False])
    expected = ((1 - 0) + (1 - math.sqrt(0.5))) / 2
    assert dapd_local(student, target, present, centre).item() == pytest.approx(expected)
    both = torch.ones(3, dtype=torch.bool)
    assert dapd_global(student, both, target, present, centre).item() == pytest.approx(expected)


@pytest.mark.parametrize("spatial", [(5, 4), (3, 2, 4)])
@pytest.mark.parametrize("usable", [[True, True, True], [True, False, True]])
def test_equals_a_loop_over_voxels(spatial, usable):
    batch = Batch(spatial)
    batch.usable = torch.tensor(usable)
    batch.prototypes[~batch.usable] = torch.nan
    for name, expected in naive(batch, 1).items():
        assert batch.loss()[name].item() == pytest.approx(expected, rel=1e-4)


def test_a_class_with_few_voxels_is_left_out():
    batch = Batch()
    batch.labels[:] = 0
    batch.labels[0, 0, :3] = 1
    expected = naive(batch, 4)
    for name, value in batch.loss(n_min=4).items():
        assert value.item() == pytest.approx(expected[name], rel=1e-4)
    assert batch.loss(n_min=3)["dapd_local"].item() != pytest.approx(expected["dapd_local"], rel=1e-3)


def test_zero_where_the_student_equals_its_targets():
    batch = Batch(dtype=torch.float64)
    batch.student_features = batch.teacher_features
    assert batch.loss()["dapd_local"].item() == pytest.approx(0, abs=1e-12)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 20))
def test_between_zero_and_two(seed, n_min):
    for value in Batch(seed=seed, dtype=torch.float64).loss(n_min).values():
        assert -1e-12 <= value <= 2 + 1e-12


def test_gradients_are_right_in_float64():
    batch = Batch((3,), dtype=torch.float64)
    batch.labels = torch.tensor([[0, 1, 1], [0, 0, 4]])

    def terms(student_features):
        batch.student_features = student_features
        return tuple(batch.loss().values())

    assert torch.autograd.gradcheck(terms, batch.student_features.requires_grad_())


def test_the_gradient_of_each_term_reaches_the_student_alone():
    for name in ("dapd_global", "dapd_local"):
        batch = Batch()
        for tensor in vars(batch).values():
            tensor.requires_grad_(tensor.is_floating_point())
        batch.loss()[name].backward()
        assert [n for n, t in vars(batch).items() if t.grad is not None] == ["student_features"]
        counts, student, teacher = masked_sums(batch.labels, N_OLD, batch.student_features, batch.teacher_features)
        DAPDLoss(1)(counts, student, teacher, batch.prototypes, batch.usable, batch.centre)[name].backward()
        assert batch.teacher_features.grad.abs().sum() == 0
        touched = batch.student_features.grad.abs().sum(1) > 0
        assert torch.equal(touched, batch.labels < N_OLD)


@pytest.mark.parametrize("empty", ["labels", "prototypes"])
def test_an_empty_set_gives_zero_with_a_graph(empty):
    batch = Batch()
    batch.student_features.requires_grad_()
    if empty == "labels":
        batch.labels[:] = N_OLD
    else:
        batch.usable[:] = False
    terms = batch.loss()
    terms["dapd_global"].backward(retain_graph=True)
    assert terms["dapd_global"].item() == 0
    assert (batch.student_features.grad == 0).all()
    if empty == "labels":
        terms["dapd_local"].backward()
        assert terms["dapd_local"].item() == 0
        assert (batch.student_features.grad == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_ends_at_the_loss(dtype):
    batch = Batch()
    batch.student_features, batch.teacher_features = batch.student_features.to(dtype), batch.teacher_features.to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        terms = batch.loss()
    batch.student_features, batch.teacher_features = batch.student_features.float(), batch.teacher_features.float()
    for name, expected in batch.loss().items():
        assert terms[name].dtype == torch.float32
        assert torch.equal(terms[name], expected)
