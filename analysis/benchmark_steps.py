"""Rows of single steps: an ensemble against its members one by one, and the network for CIFAR."""

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from benchmark_results import Result, compared, judged
from benchmark_timing import PLAIN, Candidate, Effort, faster, interleave
from benchmark_trainers import CIFAR, MNIST, Config, opened, random_data, rated, seconds_of
from torch import Tensor

from unitfisher.experiments import Dataset, mlp
from unitfisher.experiments.presets import PRESETS, Preset


def of_ensemble(config: Config) -> list[Result]:
    """15 networks of MNIST, a step of all: as one ensemble, and one after the other."""
    preset = replace(PRESETS["mnist"], activations=("relu", "lrelu", "elu"))
    data = random_data(MNIST, 10).to(config.device)
    with opened(preset, data, config) as trainer:
        ways = {PLAIN: one_after_the_other(preset, data), "ensemble": trainer.step}
        ready = {name: Candidate.warmed(run) for name, run in ways.items()}
        ratio = faster(interleave(ready, Effort(config.seconds)), "ensemble", PLAIN)
    bar = 2.0 if config.device == "cpu" else 30.0
    title = "15 networks as an ensemble against one after the other, a step"
    names = "ensemble", title, "MNIST, n = 64", bar, None, "× faster"
    return [compared(names, ratio, judged(ratio.value, bar, more=True))]


def one_after_the_other(preset: Preset, data: Dataset) -> Callable[[], None]:
    """Return a step of each member as it would be written for a single network."""
    networks = [
        mlp([784, *preset.hidden, 10], m.activation, torch.Generator().manual_seed(m.seed))
        for m in preset.members
    ]
    networks = [network.to(data.train_x.device) for network in networks]
    parameters: list[list[Tensor]] = [list(network.parameters()) for network in networks]

    def step() -> None:
        for network, own in zip(networks, parameters, strict=True):
            cases = torch.randint(len(data.train_x), (preset.batch_size,)).to(data.train_x.device)
            loss = F.cross_entropy(network(data.train_x[cases]), data.train_y[cases])
            gradients = torch.autograd.grad(loss, own)
            with torch.no_grad():
                torch._foreach_add_(own, gradients, alpha=-0.01)

    return step


def of_cifar(config: Config) -> list[Result]:
    """Iterations a second of the network of 11 layers."""
    preset = replace(PRESETS["cifar100-11"], activations=("elu",), batch_size=config.cifar_batch)
    with opened(preset, random_data(CIFAR, 100).to(config.device), config) as trainer:
        rates = [1 / t for t in seconds_of(trainer.step, config.rounds)]
    bar = None if config.device == "cpu" else 400.0
    case = f"CIFAR, n = {config.cifar_batch}"
    return [rated("cifar/steps", "training of the 11-net", case, rates, "iterations/s", bar)]
