"""EWC: Kirkpatrick et al., "Overcoming catastrophic forgetting in neural networks", PNAS 2017 (arXiv:1612.00796)."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import islice

import torch
from torch import nn

from nnunet_cil.objectives.finetune import Finetune


def diagonal_fisher(
    network: nn.Module, patches: Iterator[torch.Tensor], n_patches: int, generator: torch.Generator
) -> dict[str, torch.Tensor]:
    """Diagonal of the Fisher information of a network's parameters, by name, each divided by its largest entry.

    Mean over the patches of the squared gradient of the mean log-probability of labels drawn from the network's own
    prediction (arXiv:1612.00796, section 2.1): no labels of the old classes are needed.

    Args:
        network: stays as it is.
        patches: (1, C, *spatial) each.
        n_patches: how many of them are used, at least 1.
        generator: on the CPU, draws the labels.
    """
    network = copy.deepcopy(network).requires_grad_(True)
    fisher = {name: torch.zeros_like(parameter) for name, parameter in network.named_parameters()}
    for patch in islice(patches, n_patches):
        log_p = torch.log_softmax(network(patch).float(), 1)
        noise = torch.rand(log_p.shape, generator=generator).clamp_(1e-7, 1 - 1e-7).to(log_p)
        drawn = (log_p.detach() - (-noise.log()).log()).argmax(1, keepdim=True)  # Gumbel's trick
        network.zero_grad()
        log_p.gather(1, drawn).mean().backward()
        for name, parameter in network.named_parameters():
            if parameter.grad is not None:
                fisher[name] += parameter.grad.square()
    return {name: value / value.max().clamp_min(1e-30) for name, value in fisher.items()}


class EWC(Finetune):
    """Finetuning with a quadratic penalty on leaving what mattered for the old classes (eq. 3).

    Differs from the paper: the Fisher information is estimated on the new scans, as the old ones are gone, once at the
    start of each step from the model before (one teacher, no sum over steps). As in the code of MiB and PLOP the
    largest entry of each parameter is 1, and there is no factor of one half; the coefficient is PLOP's (MiB's is 500).
    The rows of new classes are free.
    """

    def start(self, teacher, anchor, patches):
        self._names: list[str] = []
        if not self.settings["lambda_ewc"]:
            return
        generator = torch.Generator().manual_seed(0)
        fisher = diagonal_fisher(teacher, patches, self.settings["ewc_patches"], generator)
        for number, (name, value) in enumerate(fisher.items()):
            self._names.append(name)
            self.register_buffer(f"importance_{number}", value, persistent=False)
            self.register_buffer(f"anchor_{number}", anchor[name][: len(value)].to(value), persistent=False)

    def parameter_terms(self, network):
        if not self._names:
            return {}
        parameters = dict(network.named_parameters())
        penalty = []
        for number, name in enumerate(self._names):
            importance, anchor = getattr(self, f"importance_{number}"), getattr(self, f"anchor_{number}")
            penalty.append((importance * (parameters[name][: len(anchor)] - anchor).square()).sum())
        return {"ewc": self.settings["lambda_ewc"] * torch.stack(penalty).sum()}
