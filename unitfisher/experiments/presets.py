"""The paper's trainings as values: what is trained, on what, with which numbers.

[R] marks what was read in the paper, [I] what it leaves open and is chosen here.
"""

from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final, Literal, NamedTuple

from unitfisher.experiments.data import DatasetName
from unitfisher.experiments.models import ActivationName
from unitfisher.experiments.tasks import TaskName


class Member(NamedTuple):
    """What tells one training of a preset from the others."""

    activation: ActivationName
    rate: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.activation}-lr{self.rate:g}-s{self.seed}"


@dataclass(frozen=True)
class Preset:
    """A training of fully connected networks by stochastic gradient descent."""

    dataset: DatasetName
    """Data set, by its torchvision name."""
    hidden: tuple[int, ...]
    """Hidden units, layer by layer."""
    task: TaskName = "classification"
    """What the output is for: a softmax over classes, or the input again (½ Σ_pixels error²
    behind a linear output; cross-entropy behind a sigmoid, if Bernoulli)."""
    activations: tuple[ActivationName, ...] = ("relu", "lrelu", "srelu", "elu")
    """Activation functions to compare."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """A seed decides initial weights and order of the data, the same for every activation."""
    rates: tuple[float, ...] = (0.01,)
    """Learning rates, each a training of its own."""
    epochs: int = 300
    """Passes over the training set."""
    batch_size: int = 64
    momentum: float = 0.0
    weight_decay: float = 0.0
    """L2 penalty's factor: added to the gradient as weight_decay · weight, biases too."""
    probe: int = 4096
    """Training cases in the fixed subset that is measured on."""
    units: int = 8
    """Units per layer whose Fisher is measured, drawn once; mean activations are of all."""
    fisher: Literal["exact", "rademacher"] = "exact"
    """How the Fisher's expectation over the outputs is taken: all columns, or random signs."""
    measurements: int = 7
    """How often the Fisher is measured on the probe set, at epochs evenly spaced on a log scale."""
    dampings: tuple[float, ...] = field(default=(1e-1, 1e-2, 1e-3))
    """Dampings at which k, s·c and the angles are recorded."""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "probe", "units"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}, but must be 1 or more")
        for name in ("activations", "seeds", "rates", "dampings", "hidden"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty: name at least one")
        if self.measurements < 2:
            raise ValueError("measurements must be 2 or more: before and after training")

    @property
    def members(self) -> list[Member]:
        """All trainings of the preset, those of one activation side by side."""
        return [
            Member(activation, rate, seed)
            for activation in self.activations
            for rate in self.rates
            for seed in self.seeds
        ]


PRESETS: Final = MappingProxyType(
    {
        # [R] network, rate, batch, epochs, He initialisation, 5 runs; [I] uniform, biases 0, no
        # momentum (binet, the authors' framework), the probe set's size, the test set to validate
        "mnist": Preset("mnist", (128,) * 8),
        # [R] layers, batch, epochs, rates; [I] linear output with ½ Σ error² (binet), ELU's code
        # layer like all hidden ones, three seeds
        "mnist-autoencoder": Preset(
            "mnist",
            (1000, 500, 250, 30, 250, 500, 1000),
            "reconstruction",
            seeds=(0, 1, 2),
            rates=(1e-2, 1e-3, 1e-4, 1e-5),
            epochs=500,
            fisher="rademacher",
        ),
    }
)
