import pytest
import torch
from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss

from nnunet_cil.losses.distillation import fold_logits
from nnunet_cil.losses.partial import fold_unlabelled, without_unsure_background
from nnunet_cil.objectives.mib import MiB
from nnunet_cil.schedule import METHOD_DEFAULTS


def logits(batch: int, n_classes: int, *spatial: int, dtype=torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(batch + n_classes)
    return 3 * torch.randn(batch, n_classes, *spatial, generator=generator, dtype=dtype)


def test_by_hand():
    p = torch.tensor([0.1, 0.2, 0.3, 0.4]).reshape(1, 4, 1)
    folded = torch.softmax(fold_unlabelled(p.log(), [(2,)]), 1)
    torch.testing.assert_close(folded, torch.tensor([0.4, 0.2, 0.0, 0.4]).reshape(1, 4, 1))
    folded = torch.softmax(fold_unlabelled(p.log(), [(1, 3)]), 1)
    torch.testing.assert_close(folded, torch.tensor([0.7, 0.0, 0.3, 0.0]).reshape(1, 4, 1))


@pytest.mark.parametrize("unlabelled", [(), [], [(), ()]])
def test_nothing_happens_where_nothing_is_unlabelled(unlabelled):
    z, labels = logits(2, 3, 4), torch.zeros(2, 4)
    assert fold_unlabelled(z, unlabelled) is z
    assert without_unsure_background(labels, unlabelled, 3) is labels


@pytest.mark.parametrize("spatial", [(5,), (3, 4), (2, 3, 4)])
def test_each_sample_has_its_own_classes(spatial):
    z = logits(3, 4, *spatial)
    folded, p = torch.softmax(fold_unlabelled(z, [(1,), (), (2, 3)]), 1), torch.softmax(z, 1)
    torch.testing.assert_close(folded[0, 0], p[0, 0] + p[0, 1])
    torch.testing.assert_close(folded[0, 2:], p[0, 2:])
    assert torch.equal(folded[1], p[1])
    torch.testing.assert_close(folded[2, 0], p[2, 0] + p[2, 2] + p[2, 3])
    torch.testing.assert_close(folded[2, 1], p[2, 1])
    assert (folded[0, 1] == 0).all()
    assert (folded[2, 2:] == 0).all()


def test_with_all_new_classes_unlabelled_it_is_mibs_folding():
    z = logits(2, 5, 3, 4)
    torch.testing.assert_close(fold_unlabelled(z, [(3, 4)] * 2)[:, :3], fold_logits(z, 3))


def test_a_sample_without_any_label_is_sure_to_be_background():
    p = torch.softmax(fold_unlabelled(logits(1, 3, 4), [(1, 2)]), 1)
    torch.testing.assert_close(p[:, 0], torch.ones(1, 4))


def test_gradient():
    z = logits(2, 4, 3, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: fold_unlabelled(z, [(1, 3), ()]).clamp_min(-100), z)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    z = logits(2, 4, 50)
    folded = fold_unlabelled(z.to(dtype), [(1,), (2, 3)])
    assert folded.dtype == dtype
    assert torch.isfinite(folded).all()
    exact = torch.logsumexp(z.to(dtype)[0, :2].float(), 0)
    assert torch.equal(folded[0, 0], exact.to(dtype)), "rounded once, from a sum in float32"
    expected = torch.softmax(fold_unlabelled(z, [(1,), (2, 3)]), 1)
    torch.testing.assert_close(torch.softmax(folded.float(), 1), expected, atol=0.05, rtol=0)


def nnunet_loss(ignore_label: int | None = None) -> DC_and_CE_loss:
    dice = {"batch_dice": True, "smooth": 1e-5, "do_bg": False, "ddp": False}
    return DC_and_CE_loss(dice, {}, ignore_label=ignore_label, dice_class=MemoryEfficientSoftDiceLoss)


def test_nnunets_loss_does_not_tell_an_unlabelled_class_from_background():
    """The second sample lacks class 2: how its background is divided between the two is free, in Dice and in CE."""
    loss = nnunet_loss()
    z = logits(2, 3, 4, 4).requires_grad_()
    target = torch.zeros(2, 1, 4, 4)
    target[0, :, :2], target[0, :, 2:, :2], target[1, :, :1] = 1, 2, 1
    merged = torch.logsumexp(z[1, [0, 2]].detach(), 0)
    divided = z.detach().clone()
    divided[1, 0], divided[1, 2] = merged + torch.tensor(0.1).log(), merged + torch.tensor(0.9).log()
    unlabelled = [(), (2,)]
    value = loss(fold_unlabelled(z, unlabelled), target)
    torch.testing.assert_close(loss(fold_unlabelled(divided, unlabelled), target), value)
    assert loss(divided, target) > loss(z, target) + 0.1
    for weight_ce, weight_dice in ((1, 0), (0, 1)):
        loss.weight_ce, loss.weight_dice = weight_ce, weight_dice
        (gradient,) = torch.autograd.grad(loss(fold_unlabelled(z, unlabelled), target), z)
        p = torch.softmax(z.detach(), 1)
        assert gradient[0, 2].abs().sum() > 0
        torch.testing.assert_close(gradient[1, 2] / p[1, 2], gradient[1, 0] / p[1, 0])


def test_with_mib_background_is_old_too():
    objective = MiB(2, 4, dict(METHOD_DEFAULTS), None)
    z = logits(2, 4, 6)
    target = torch.tensor([[0, 1, 2, 3, 4, 0]] * 2)[:, None]
    folded, shifted = objective.segmentation(fold_unlabelled(z, [(3,), ()]), target)
    got, p = torch.softmax(folded, 1), torch.softmax(z, 1)
    torch.testing.assert_close(got[0, 0], p[0, 0] + p[0, 1] + p[0, 3])
    torch.testing.assert_close(got[0, 1], p[0, 2])
    torch.testing.assert_close(got[1], torch.stack([p[1, 0] + p[1, 1], p[1, 2], p[1, 3]]))
    assert shifted[0, 0].tolist() == [0, 0, 1, 2, 4, 0], "the ignored voxel stays one"


def test_unsure_background_is_ignored_in_its_samples_alone():
    labels = torch.tensor([[0, 1, 2], [0, 1, 3], [0, 0, 2]])
    found = without_unsure_background(labels, [(2,), (), (1, 2)], ignore_id=3)
    assert found.tolist() == [[3, 1, 2], [0, 1, 3], [3, 3, 2]]
