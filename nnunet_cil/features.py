"""Reading a module's output during a forward pass."""

from __future__ import annotations

import torch
from torch import nn


def last_decoder_stage(network: nn.Module) -> str:
    """Dotted path of the module whose output enters the last segmentation layer: ``decoder.stages.{n-1}``.

    Raises:
        ValueError: the network has no ``decoder.stages`` and ``decoder.seg_layers``, as Primus; its head cannot grow.
    """
    decoder = getattr(network, "decoder", None)
    if not (hasattr(decoder, "stages") and hasattr(decoder, "seg_layers")):
        raise ValueError(
            f"network: got {type(network).__name__}, expected one with decoder.stages and decoder.seg_layers such as "
            "PlainConvUNet or ResidualEncoderUNet. Its head cannot be extended: choose another trainer or plan."
        )
    return f"decoder.stages.{len(decoder.stages) - 1}"


def encoder_stages(network: nn.Module) -> tuple[str, ...]:
    """Dotted paths of the encoder's stages, ``encoder.stages.0`` first.

    Raises:
        ValueError: the network has no ``encoder.stages``.
    """
    encoder = getattr(network, "encoder", None)
    if not hasattr(encoder, "stages"):
        raise ValueError(
            f"network: got {type(network).__name__}, expected one with encoder.stages such as PlainConvUNet. Choose "
            "another method or another plan."
        )
    return tuple(f"encoder.stages.{i}" for i in range(len(encoder.stages)))


def decoder_stages(network: nn.Module) -> tuple[str, ...]:
    """Dotted paths of the decoder's stages, that of the lowest resolution first. Errors as `last_decoder_stage`."""
    last_decoder_stage(network)  # or its error
    return tuple(f"decoder.stages.{i}" for i in range(len(network.decoder.stages)))


def lower_heads(network: nn.Module) -> list[nn.Module]:
    """The segmentation layers that serve deep supervision alone; none of a network that has no such layers."""
    return list(getattr(getattr(network, "decoder", None), "seg_layers", ()))[:-1]


class FeatureTap:
    """Keeps the last output of one module, with its gradient graph, until ``clear`` or the next forward pass.

    Register it before the first call of a compiled network: a hook that is added later never fires.

    Args:
        network: not wrapped by DistributedDataParallel or torch.compile.
        path: dotted path of a submodule, e.g. ``decoder.stages.4``.

    Raises:
        ValueError: the network has no such submodule.
    """

    def __init__(self, network: nn.Module, path: str) -> None:
        modules = dict(network.named_modules())
        if path not in modules:
            near = [name for name in modules if name.startswith("decoder.stages.") and name.count(".") == 2]
            raise ValueError(f"feature path: got {path!r}, expected a submodule such as {near or sorted(modules)[:8]}.")
        self.path = path
        self._features: torch.Tensor | None = None
        self._handle = modules[path].register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        self._features = output

    @property
    def features(self) -> torch.Tensor:
        """The last output, (B, D, *spatial), not detached.

        Raises:
            RuntimeError: nothing has passed since the tap was set or cleared.
        """
        if self._features is None:
            raise RuntimeError(f"feature tap at {self.path}: got no output yet, expected a forward pass before.")
        return self._features

    def clear(self) -> None:
        """Forget the last output, so that its memory is freed."""
        self._features = None

    def remove(self) -> None:
        """Take the hook out; the network is as before."""
        self._handle.remove()
        self.clear()

    def __enter__(self) -> FeatureTap:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.remove()
