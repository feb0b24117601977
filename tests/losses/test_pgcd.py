import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cosine_similarity

from nnunet_cil.losses import chunked
from nnunet_cil.losses.chunked import chunks, rows
from nnunet_cil.losses.distillation import fold_logits, folded_distillation
from nnunet_cil.losses.pgcd import PGCDLoss, calibration_weights, pgcd_channel, pgcd_spatial, similarity

N_OLD, N_CLASSES, D = 3, 5, 6


class Batch:
    """Random inputs of the loss; old, new and ignored labels in unequal numbers."""

    def __init__(self, spatial=(3, 4), batch=2, dtype=torch.float32, seed=0):
        g = torch.Generator().manual_seed(seed)
        self.student_logits = 2 * torch.randn(batch, N_CLASSES, *spatial, generator=g, dtype=dtype)
        self.teacher_logits = 2 * torch.randn(batch, N_OLD, *spatial, generator=g, dtype=dtype)
        self.student_features = torch.randn(batch, D, *spatial, generator=g, dtype=dtype)
        self.teacher_features = 1 + torch.randn(batch, D, *spatial, generator=g, dtype=dtype)
        self.labels = torch.randint(0, N_CLASSES + 1, (batch, *spatial), generator=g)
        self.labels[0].clamp_(max=1)
        self.prototypes = 1 + torch.randn(N_OLD, D, generator=g, dtype=dtype)
        self.centre = self.prototypes.mean(0)
        self.usable = torch.tensor([True, True, True])
        self.tau = torch.tensor(0.3, dtype=dtype)

    @property
    def mask(self):
        return (self.labels < N_OLD) | (self.labels >= N_CLASSES)

    def calibrated(self, w_max=3.0):
        s = similarity(self.teacher_features, self.prototypes, self.centre)
        return calibration_weights(s, self.usable, self.tau, w_max)

    def loss(self, **settings):
        return PGCDLoss(N_OLD, **settings)(**vars(self))


def naive(batch: Batch, w_max: float, balance=None) -> tuple[float, float]:
    """Both terms by a loop over voxels, from the formulas."""
    directions = batch.prototypes - batch.centre
    spatial, channel = [], []
    for b in range(len(batch.labels)):
        for v in range(batch.labels[b].numel()):
            label = batch.labels[b].flatten()[v]
            if N_OLD <= label < N_CLASSES:
                continue
            p = torch.softmax(batch.student_logits[b].flatten(1)[:, v], 0)
            q = torch.softmax(batch.teacher_logits[b].flatten(1)[:, v], 0)
            folded = [p[0] + p[N_OLD:].sum(), *p[1:N_OLD]]
            teacher = batch.teacher_features[b].flatten(1)[:, v]
            student = batch.student_features[b].flatten(1)[:, v]
            centred = teacher - batch.centre
            old = [k for k in range(N_OLD) if batch.usable[k]]
            cosine = {k: float(centred @ directions[k] / centred.norm() / directions[k].norm()) for k in old}
            total = sum(math.exp(s / float(batch.tau)) for s in cosine.values())
            a = {k: math.exp(s / float(batch.tau)) / total for k, s in cosine.items()}
            w = [min(len(old) * a[k], w_max) if k in a else 1.0 for k in range(N_OLD)]
            bv = 1.0 if balance is None else float(balance[q.argmax()])
            terms = [w[k] * float(q[k] * torch.log(q[k] / folded[k]) - q[k] + folded[k]) for k in range(N_OLD)]
            spatial.append(bv * sum(terms))
            best = max(a, key=a.get)
            u = (directions[best] * centred).clamp_min(0)
            g = D * u / u.sum()
            channel.append(bv * a[best] * float((g * (student - teacher) ** 2).sum()) / D)
    return sum(spatial) / len(spatial), sum(channel) / len(channel)


@pytest.mark.parametrize("spatial", [(4, 3), (2, 3, 4)])
def test_similarity_is_the_centred_cosine(spatial):
    batch = Batch(spatial)
    found = similarity(batch.teacher_features, batch.prototypes, batch.centre)
    centre = batch.centre.view(1, D, *[1] * len(spatial))
    for k in range(N_OLD):
        prototype = (batch.prototypes[k] - batch.centre).view_as(centre)
        torch.testing.assert_close(found[:, k], cosine_similarity(batch.teacher_features - centre, prototype, 1))


def test_similarity_of_a_feature_at_the_centre_is_zero():
    centre = torch.tensor([1.0, 2.0])
    assert torch.equal(similarity(centre.view(1, 2, 1), torch.eye(2), centre), torch.zeros(1, 2, 1))


def test_weights_by_hand():
    s = torch.tensor([0.5, -0.5]).view(1, 2, 1)
    assignment, weights = calibration_weights(s, torch.tensor([True, True]), 1.0, 1.2)
    a0 = 1 / (1 + math.exp(-1))
    torch.testing.assert_close(assignment.flatten(), torch.tensor([a0, 1 - a0]))
    torch.testing.assert_close(weights.flatten(), torch.tensor([1.2, 2 * (1 - a0)]))


def test_a_class_without_prototype_has_weight_one_and_no_share():
    s = torch.tensor([0.2, torch.nan, 0.2]).view(1, 3, 1)
    assignment, weights = calibration_weights(s, torch.tensor([True, False, True]), 0.1, 3.0)
    torch.testing.assert_close(assignment.flatten(), torch.tensor([0.5, 0.0, 0.5]))
    torch.testing.assert_close(weights.flatten(), torch.ones(3))


def test_without_any_prototype_all_weights_are_one():
    assignment, weights = calibration_weights(torch.randn(1, 3, 4), torch.zeros(3, dtype=torch.bool), 0.1, 3.0)
    assert torch.equal(assignment, torch.zeros(1, 3, 4))
    assert torch.equal(weights, torch.ones(1, 3, 4))


def test_spatial_value_by_hand():
    student = torch.log(torch.tensor([0.25, 0.5, 0.25])).view(1, 3, 1)
    teacher = torch.log(torch.tensor([0.8, 0.2])).view(1, 2, 1)
    weights = torch.tensor([2.0, 0.5]).view(1, 2, 1)
    expected = 2 * (0.8 * math.log(1.6) - 0.3) + 0.5 * (0.2 * math.log(0.4) + 0.3)
    found, _ = pgcd_spatial(student, teacher, weights)
    assert found.item() == pytest.approx(expected, rel=1e-5)


def test_channel_value_by_hand():
    teacher = torch.tensor([2.0, 1.0, -1.0]).view(1, 3, 1)
    student = teacher + torch.tensor([1.0, 2.0, 5.0]).view(1, 3, 1)
    prototypes = torch.tensor([[1.0, 2.0, 3.0], [9.0, 9.0, 9.0]])
    assignment = torch.tensor([0.75, 0.25]).view(1, 2, 1)
    found, _ = pgcd_channel(student, teacher, assignment, prototypes, torch.zeros(3))
    assert found.item() == pytest.approx(0.75 * (2 * 1 + 2 * 4) / 4, rel=1e-6)


@pytest.mark.parametrize("spatial", [(3, 4), (2, 3, 3)])
@pytest.mark.parametrize("balance", [None, torch.tensor([0.5, 2.0, 4.0])])
@pytest.mark.parametrize("usable", [[True, True, True], [True, False, True]])
def test_both_terms_equal_a_loop_over_voxels(spatial, balance, usable):
    batch = Batch(spatial)
    batch.usable = torch.tensor(usable)
    batch.prototypes[~batch.usable] = torch.nan
    batch.centre = batch.prototypes[batch.usable].mean(0)
    loss = PGCDLoss(N_OLD, w_max=1.5, eta=0.1)
    loss.set_balance(balance)
    terms = loss(**vars(batch))
    expected_spatial, expected_channel = naive(batch, 1.5, balance)
    assert terms["pgcd_spatial"].item() == pytest.approx(expected_spatial, rel=1e-4)
    assert terms["pgcd_channel"].item() == pytest.approx(0.1 * expected_channel, rel=1e-4)


def test_with_equal_weights_it_is_the_folded_distillation():
    batch = Batch()
    found = pgcd_spatial(batch.student_logits, batch.teacher_logits, torch.ones(2, N_OLD, 3, 4))[0][batch.mask].mean()
    torch.testing.assert_close(found, folded_distillation(batch.student_logits, batch.teacher_logits, batch.mask))
    batch.usable[:] = False
    torch.testing.assert_close(batch.loss()["pgcd_spatial"], found)


@pytest.mark.parametrize("chunk", [1, 40])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("balance", [None, torch.tensor([0.5, 2.0, 4.0])])
def test_pieces_change_neither_values_nor_gradients(monkeypatch, chunk, channels_last, balance):
    monkeypatch.setitem(chunked.CHUNK_ELEMENTS, "cpu", chunk)
    batch = Batch((2, 3, 4))
    if channels_last:
        for name in ("student_logits", "teacher_logits", "student_features", "teacher_features"):
            setattr(batch, name, getattr(batch, name).to(memory_format=torch.channels_last_3d))
    inputs = [batch.student_logits.requires_grad_(), batch.student_features.requires_grad_()]
    loss = PGCDLoss(N_OLD, w_max=1.5, eta=0.1)
    loss.set_balance(balance)
    terms = loss(**vars(batch))
    found = torch.autograd.grad(3 * terms["pgcd_spatial"] + 2 * terms["pgcd_channel"], inputs)
    monkeypatch.setitem(chunked.CHUNK_ELEMENTS, "cpu", 10**9)
    whole = loss(**vars(batch))
    for name, value in whole.items():
        torch.testing.assert_close(terms[name], value, rtol=1e-5, atol=1e-7)
    expected = torch.autograd.grad(3 * whole["pgcd_spatial"] + 2 * whole["pgcd_channel"], inputs)
    for ours, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-7)
        assert (ours.stride()[1] == 1) == channels_last


@pytest.mark.parametrize("start", [0, 1, 2])
@pytest.mark.parametrize("chunk", [1, 40, 10**9])
def test_pieces_of_chosen_rows_are_these_rows(monkeypatch, chunk, start):
    monkeypatch.setitem(chunked.CHUNK_ELEMENTS, "cpu", chunk)
    voxels = torch.arange(2 * 3 * 5 * 4).reshape(2, 1, 3, 5, 4)
    found = [rows(voxels)[b, :, where].flatten() for b, where in chunks(rows(voxels), 2, slice(start, None, 3))]
    assert torch.equal(torch.cat(found), voxels.reshape(2, 15, 4)[:, start::3].flatten())
    assert all(2 * len(piece) <= max(chunk, 2 * 4) for piece in found)


@pytest.mark.parametrize("chunk", [1, 40])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("spatial", [(3, 5, 4), (7, 4)])
def test_with_a_stride_it_is_the_loss_of_each_nth_row_alone(monkeypatch, chunk, channels_last, spatial):
    monkeypatch.setitem(chunked.CHUNK_ELEMENTS, "cpu", chunk)
    batch = Batch(spatial)
    maps = ("student_logits", "teacher_logits", "student_features", "teacher_features")
    if channels_last:
        layout = torch.channels_last_3d if len(spatial) == 3 else torch.channels_last
        for name in maps:
            setattr(batch, name, getattr(batch, name).to(memory_format=layout))
    inputs = [batch.student_logits.requires_grad_(), batch.student_features.requires_grad_()]
    loss = PGCDLoss(N_OLD, voxel_stride=3)
    for first in (0, 1, 2, 0):
        found = loss(**vars(batch))
        fewer = Batch(spatial)
        vars(fewer).update(vars(batch))
        for name in (*maps, "labels"):
            value = getattr(batch, name)
            at = 1 if name == "labels" else 2
            setattr(fewer, name, value.flatten(at).unflatten(at, (-1, spatial[-1]))[..., first::3, :])
        expected = fewer.loss(voxel_stride=1)
        for name, value in found.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-7)
        ours, reference = (torch.autograd.grad(sum(terms.values()), inputs) for terms in (found, expected))
        for gradient, other in zip(ours, reference, strict=True):
            torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-7)
            assert (gradient.stride()[1] == 1) == channels_last


def test_whose_turn_it_is_is_saved_and_no_random_number_is_drawn():
    batch, loss, resumed = Batch((8, 4)), PGCDLoss(N_OLD, voxel_stride=4), PGCDLoss(N_OLD, voxel_stride=4)
    before = torch.get_rng_state()
    values = [loss(**vars(batch))["pgcd_spatial"].item() for _ in range(6)]
    assert torch.equal(torch.get_rng_state(), before)
    assert len(set(values)) == 4
    assert values[4:] == values[:2]
    resumed.load_state_dict(loss.state_dict())
    assert resumed(**vars(batch))["pgcd_spatial"].item() == values[2]


def test_a_stride_beyond_the_rows_there_are_leaves_iterations_without_distillation_and_no_nan():
    batch, loss = Batch((1, 4)), PGCDLoss(N_OLD, voxel_stride=4)
    terms = [loss(**vars(batch)) for _ in range(4)]
    assert [term["pgcd_spatial"].item() > 0 for term in terms] == [True, False, False, False]
    assert all(torch.isfinite(value) for term in terms for value in term.values())


def test_zero_where_student_and_teacher_agree():
    batch = Batch()
    batch.student_logits[:, N_OLD:] = -torch.inf
    batch.student_logits[:, :N_OLD] = batch.teacher_logits
    batch.student_features = batch.teacher_features
    terms = batch.loss()
    assert terms["pgcd_spatial"].item() == 0
    assert terms["pgcd_channel"].item() == 0


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.1, 20), st.floats(0.01, 5), st.floats(0.5, 5))
def test_never_negative_and_zero_at_the_folded_student(seed, scale, tau, w_max):
    batch = Batch(seed=seed, dtype=torch.float64)
    batch.tau = torch.tensor(tau)
    _, weights = batch.calibrated(w_max)
    student = scale * batch.student_logits
    assert (pgcd_spatial(student, scale * batch.teacher_logits, weights)[0] >= -1e-12).all()
    assert (pgcd_spatial(student, fold_logits(student, N_OLD), weights)[0].abs() < 1e-12).all()
    assert batch.loss()["pgcd_channel"] >= 0


@pytest.mark.parametrize("balance", [None, torch.tensor([0.5, 2.0, 4.0], dtype=torch.float64)])
def test_gradients_are_right_in_float64(balance):
    batch = Batch((3,), dtype=torch.float64)
    loss = PGCDLoss(N_OLD, w_max=1.5, eta=1.0)
    loss.set_balance(balance)
    batch.student_logits.requires_grad_()
    batch.student_features.requires_grad_()

    def total(student_logits, student_features):
        batch.student_logits, batch.student_features = student_logits, student_features
        return tuple(loss(**vars(batch)).values())

    assert torch.autograd.gradcheck(total, (batch.student_logits, batch.student_features))


def test_the_gradient_reaches_the_student_alone_and_no_voxel_labelled_new():
    batch = Batch()
    inputs = [t.requires_grad_() for t in vars(batch).values() if t.is_floating_point()]
    sum(batch.loss().values()).backward()
    reached = {name for name, t in vars(batch).items() if t.grad is not None}
    assert len(inputs) == 7
    assert reached == {"student_logits", "student_features"}
    for grad in (batch.student_logits.grad, batch.student_features.grad):
        touched = grad.abs().sum(1) > 0
        assert touched[batch.mask].all()
        assert not touched[~batch.mask].any()


@pytest.mark.parametrize("empty", ["mask", "prototypes"])
def test_an_empty_set_gives_zero_with_a_graph(empty):
    batch = Batch()
    batch.student_logits.requires_grad_()
    batch.student_features.requires_grad_()
    if empty == "mask":
        batch.labels[:] = N_OLD
    else:
        batch.usable[:] = False
        batch.prototypes[:] = torch.nan
        batch.centre = torch.zeros(D)
    terms = batch.loss()
    sum(terms.values()).backward()
    assert terms["pgcd_channel"].item() == 0
    assert (batch.student_features.grad == 0).all()
    if empty == "mask":
        assert terms["pgcd_spatial"].item() == 0
        assert (batch.student_logits.grad == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_ends_at_the_loss(dtype):
    batch = Batch()
    for name in ("student_logits", "teacher_logits", "student_features", "teacher_features"):
        setattr(batch, name, getattr(batch, name).to(dtype))
    with torch.autocast("cpu", torch.bfloat16):
        terms = batch.loss()
    for name in ("student_logits", "teacher_logits", "student_features", "teacher_features"):
        setattr(batch, name, getattr(batch, name).float())
    for name, expected in batch.loss().items():
        assert terms[name].dtype == torch.float32
        # float16 is divided by the number of voxels last
        torch.testing.assert_close(terms[name], expected, rtol=1e-6, atol=0)


def float16_errors(loss_scale: float, stride: int, device: str = "cpu") -> list[float]:
    """Relative error of both terms' gradients in float16 to those of the same numbers in float32, on a large patch."""
    halves = ("student_logits", "student_features", "teacher_logits", "teacher_features")
    gradients = {}
    for dtype in (torch.float16, torch.float32):
        batch = Batch(spatial=(32, 64, 64))
        for name, value in vars(batch).items():
            setattr(batch, name, (value.half().to(dtype) if name in halves else value).to(device))
        inputs = [getattr(batch, name).requires_grad_() for name in halves[:2]]
        scaled = loss_scale * sum(batch.loss(voxel_stride=stride).values())
        gradients[dtype] = torch.autograd.grad(scaled, inputs)
        assert [gradient.dtype for gradient in gradients[dtype]] == [dtype] * 2
    pairs = zip(gradients[torch.float16], gradients[torch.float32], strict=True)
    return [float((half.float() - full).norm() / full.norm()) for half, full in pairs]


@pytest.mark.parametrize("stride", [1, 4])
@pytest.mark.parametrize("loss_scale", [2.0**16, 2.0**10])
def test_gradients_in_float16_are_those_of_float32(loss_scale, stride):
    """A voxel's share of a large patch is below float16's smallest number, the loss's scale above its largest."""
    assert max(float16_errors(loss_scale, stride)) < 0.01


def test_without_eta_the_channel_term_is_not_computed():
    assert set(Batch().loss(eta=0.0)) == {"pgcd_spatial"}


def test_the_balance_moves_with_the_module_and_stays_out_of_the_checkpoint():
    loss = PGCDLoss(N_OLD)
    loss.set_balance(torch.ones(N_OLD))
    assert loss.to("meta").balance.device.type == "meta"
    assert "balance" not in loss.state_dict()
