import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from torch import nn

from nnunet_cil.features import FeatureTap, last_decoder_stage


def small_unet(deep_supervision: bool = False) -> PlainConvUNet:
    torch.manual_seed(0)
    return PlainConvUNet(
        input_channels=1,
        n_stages=3,
        features_per_stage=[4, 8, 8],
        conv_op=nn.Conv3d,
        kernel_sizes=3,
        strides=[1, 2, 2],
        n_conv_per_stage=1,
        num_classes=3,
        n_conv_per_stage_decoder=1,
        conv_bias=True,
        norm_op=nn.InstanceNorm3d,
        norm_op_kwargs={"affine": True},
        nonlin=nn.LeakyReLU,
        deep_supervision=deep_supervision,
    )


@pytest.mark.parametrize("deep_supervision", [False, True])
def test_the_tap_holds_what_enters_the_last_segmentation_layer(deep_supervision):
    network = small_unet(deep_supervision)
    path = last_decoder_stage(network)
    assert path == "decoder.stages.1"
    with FeatureTap(network, path) as tap:
        output = network(torch.randn(2, 1, 8, 8, 8))
        logits = output[0] if deep_supervision else output
        assert tap.features.shape == (2, 4, 8, 8, 8)
        torch.testing.assert_close(network.decoder.seg_layers[-1](tap.features), logits)


def test_the_features_carry_a_gradient_to_the_network():
    network = small_unet()
    with FeatureTap(network, "decoder.stages.1") as tap:
        network(torch.randn(1, 1, 8, 8, 8))
        tap.features.square().sum().backward()
    assert next(network.encoder.parameters()).grad.abs().sum() > 0


def test_each_forward_replaces_the_features_and_clear_forgets_them():
    network = small_unet()
    tap = FeatureTap(network, "decoder.stages.1")
    with pytest.raises(RuntimeError, match=r"decoder\.stages\.1.*no output yet"):
        _ = tap.features
    network(torch.zeros(1, 1, 8, 8, 8))
    first = tap.features
    network(torch.randn(1, 1, 8, 8, 8))
    assert tap.features is not first
    tap.clear()
    with pytest.raises(RuntimeError, match="forward pass"):
        _ = tap.features


def test_remove_leaves_the_network_as_before():
    network = small_unet()
    with FeatureTap(network, "decoder.stages.1") as tap:
        network(torch.zeros(1, 1, 8, 8, 8))
    assert not network.decoder.stages[1]._forward_hooks
    network(torch.zeros(1, 1, 8, 8, 8))
    with pytest.raises(RuntimeError):
        _ = tap.features


def test_the_tap_fires_in_a_compiled_network():
    network = small_unet()
    tap = FeatureTap(network, "decoder.stages.1")
    compiled = torch.compile(network, backend="eager")
    for _ in range(2):
        x = torch.randn(1, 1, 8, 8, 8)
        logits = compiled(x)
        torch.testing.assert_close(network.decoder.seg_layers[-1](tap.features), logits)
        tap.features.sum().backward()
        assert next(network.parameters()).grad is not None
        tap.clear()


def test_an_unknown_path_is_refused_with_the_paths_there_are():
    with pytest.raises(ValueError, match=r"got 'decoder\.stages\.7'.*decoder\.stages\.0.*decoder\.stages\.1"):
        FeatureTap(small_unet(), "decoder.stages.7")
    with pytest.raises(ValueError, match="got 'body'"):
        FeatureTap(nn.Sequential(nn.Linear(1, 1)), "body")


def test_a_network_without_segmentation_layers_is_refused_by_name():
    with pytest.raises(ValueError, match=r"got Sequential, expected one with decoder\.stages"):
        last_decoder_stage(nn.Sequential(nn.Linear(1, 1)))
