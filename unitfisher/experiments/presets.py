"""The paper's trainings as values: what is trained, on what, with which numbers.

[R] marks what was read in the paper, [I] what it leaves open and is chosen here.
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from itertools import groupby
from types import MappingProxyType
from typing import Final, Literal, NamedTuple

from unitfisher.experiments.convnets import DROPOUT
from unitfisher.experiments.data import DatasetName
from unitfisher.experiments.models import HE, ActivationName, Initial
from unitfisher.experiments.options import (
    PRESET_RANGES,
    require_fitting,
    require_ranges,
    require_several,
)
from unitfisher.experiments.schedules import Phase as Phase
from unitfisher.experiments.schedules import phase_at, require_schedule
from unitfisher.experiments.sgd import Decayed
from unitfisher.experiments.tasks import TaskName

PresetData = Literal[DatasetName, "cifar-10", "cifar-100", "photographs"]
PresetActivation = Literal[ActivationName, "own"]


class Member(NamedTuple):
    """What identifies one training of a preset."""

    activation: PresetActivation
    rate: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.activation}-lr{self.rate:g}-s{self.seed}"

    @property
    def form(self) -> str:
        """Members of one form have the same parameters: PReLU has some of its own."""
        return self.activation if self.activation == "prelu" else ""


def named(members: Iterable[Member]) -> str:
    return ", ".join(member.name for member in members)


@dataclass(frozen=True)
class Preset:
    """A training by stochastic gradient descent, of one network per activation, rate and seed."""

    dataset: PresetData
    """Data set; "photographs" are folders train and val with a folder for each class."""
    network: str = "mlp"
    """Fully connected ("mlp"), a name of unitfisher.experiments.networks.NETWORKS, or
    torchvision:NAME or timm:NAME."""
    hidden: tuple[int, ...] = ()
    """Hidden units of the fully connected network, layer by layer."""
    weight_variance: float | None = None
    """Of the initial weights, times fan-in: 2 as of He, 1/3 as of torch's own layers. None: the
    network's own, He's of "mlp" and of the paper's; the others take nothing else."""
    initial: Initial | None = None
    """Distribution of the initial weights. None: the network's own, uniform of "mlp" and of the
    paper's; the others take nothing else."""
    norm: Literal["none", "batch"] = "none"
    """Batch normalisation before every activation, or none."""
    padding: Literal["caffe", "same"] | None = None
    """Of convolutions: floor(size / 2) and pooling that rounds up, or the map's size kept."""
    stride: int | None = None
    """Of imagenet15's first convolution; None: 1."""
    pyramid: tuple[int, ...] | None = None
    """Bins of a side in each level of imagenet15's pyramid; None: 4 2 1."""
    dropout: float | None = None
    """Rate of imagenet15's fully connected layers, None: 0.5; phases have that of stacks."""
    task: TaskName = "classification"
    """What the output is for: a softmax over classes (or DSN's squared hinge), or the input again
    (½ Σ_pixels error² behind a linear output; cross-entropy behind a sigmoid, if Bernoulli)."""
    preprocessing: Literal["none", "zca"] = "none"
    """Images as they are, or global contrast normalisation and ZCA whitening."""
    side: int = 256
    """Pixels of height and width that photographs are resized to."""
    crop: int = 224
    """Pixels of height and width that are seen of them: cropped at random, mirrored or not."""
    augmented: bool = False
    """Pad by 4 zeros, crop at random, flip half of the images: a draw for each image."""
    validation: int | None = None
    """Training cases of MNIST or the digits, drawn once, which are not trained but evaluated on, in
    place of the test set; None: the test set."""
    activations: tuple[PresetActivation, ...] = ("relu", "lrelu", "srelu", "elu")
    """Activation functions to compare; "own" leaves a network the one it was published with."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """A seed decides initial weights and order of the data, the same for every activation."""
    rates: tuple[float, ...] = (0.01,)
    """Learning rates, each a training of its own."""
    epochs: int = 300
    """Passes over the training set."""
    iterations: int | None = None
    """Steps, instead of epochs."""
    every: int | None = None
    """Steps between evaluations; None: an epoch."""
    batch_size: int = 64
    momentum: float = 0.0
    weight_decay: float = 0.0
    """L2 penalty's factor: weight_decay · weight is added to the gradient."""
    decayed: Decayed = "all"
    """What the penalty is on: all parameters, or weights, not biases, γ, β and PReLU's slope."""
    phases: tuple[Phase, ...] = ()
    """Factor of the learning rate, and dropout, from which step on."""
    probe: int = 4096
    """Training cases in the fixed subset that is measured on."""
    tested: int | None = None
    """Test cases that are evaluated on, the first ones; None: all."""
    units: int = 8
    """Units per layer whose Fisher is measured, drawn once; mean activations are of all."""
    rows: int | None = None
    """Cases drawn at random that the Fisher's systems are solved from; None: all."""
    fisher: Literal["exact", "rademacher"] = "exact"
    """How the Fisher's expectation over the outputs is taken: all columns, or random signs."""
    measurements: int = 7
    """How often the Fisher is measured on the probe set, evenly spaced on a log scale."""
    dampings: tuple[float, ...] = (1e-1, 1e-2, 1e-3)
    """Dampings at which k, s·c and the angles are recorded."""

    def __post_init__(self) -> None:
        options = {field.name: getattr(self, field.name) for field in fields(self)}
        require_several(options, "activations", "seeds", "rates", "dampings", "pyramid")
        require_ranges(options, PRESET_RANGES)
        require_schedule(self.phases)
        require_fitting(options)

    @property
    def members(self) -> list[Member]:
        """All trainings of the preset, those of one activation side by side."""
        return [
            Member(activation, rate, seed)
            for activation in self.activations
            for rate in self.rates
            for seed in self.seeds
        ]

    @property
    def forms(self) -> dict[str, list[Member]]:
        """The members by the form of their networks, each form to be trained by a Trainer."""
        by = groupby(sorted(self.members, key=lambda m: m.form), key=lambda m: m.form)
        return {form: list(alike) for form, alike in by}

    def steps(self, per_epoch: int) -> int:
        """Count the steps of the whole training, given those of an epoch."""
        return self.iterations or self.epochs * per_epoch

    def steps_between(self, per_epoch: int) -> int:
        """Count the steps from one evaluation to the next."""
        return self.every or per_epoch

    def phase(self, iteration: int) -> Phase:
        """Return the phase at a step; dropout that it does not set is that of earlier phases."""
        return phase_at(self.phases, iteration)


# [R] everything but what follows, and 10 runs, of which [I] one is the default; [I] batch (100 is
# stated for the larger network only), the L2 penalty on all parameters (decayed), batch
# normalisation before the activation, padding as Caffe has it, dropout between activation and
# pooling, its masks the same for every activation of a seed, uniform initial weights
# (initial), half of He's variance: from He's, SReLU's and ELU's networks of 11 layers diverge at
# the paper's rate on whitened images (results/divergence)
_CIFAR11 = Preset(
    "cifar-100",
    "cifar11",
    weight_variance=1.0,
    preprocessing="zca",
    augmented=True,
    seeds=(0,),
    iterations=165_000,
    every=1_000,
    batch_size=100,
    momentum=0.9,
    weight_decay=5e-4,
    phases=(Phase(0), Phase(35_000, 0.5), Phase(85_000, 0.05), Phase(135_000, 0.005)),
    probe=256,
    rows=512,
    fisher="rademacher",
)
# [R] rate ÷ 10 after 35,000 steps, 50,000 with dropout in all layers, 40,000 more at 1.5 times
# those rates; [I] 35,000 in between, and another ÷ 10 for the last phase
_CIFAR18 = Preset(
    "cifar-100",
    "cifar18",
    weight_variance=1.0,
    preprocessing="zca",
    augmented=True,
    activations=("elu",),
    seeds=(0,),
    iterations=160_000,
    every=1_000,
    batch_size=100,
    momentum=0.9,
    weight_decay=5e-4,
    phases=(
        Phase(0, 1.0, DROPOUT),
        Phase(35_000, 0.1, DROPOUT),
        Phase(70_000, 0.1, DROPOUT, "all"),
        Phase(120_000, 0.01, tuple(1.5 * rate for rate in DROPOUT), "all"),
    ),
    probe=256,
    units=4,
    rows=256,
    fisher="rademacher",
)

PRESETS: Final = MappingProxyType(
    {
        # [R] network, rate, batch, epochs, He initialisation, 5 runs; [I] uniform, biases 0, no
        # momentum (binet, the authors' framework), the probe set's size, the test set to validate
        # on, where binet has 10,000 training cases (validation)
        "mnist": Preset("mnist", hidden=(128,) * 8, weight_variance=HE),
        # [R] layers, batch, epochs, rates; [I] linear output with ½ Σ error² (binet), ELU's code
        # layer like all hidden ones, three seeds, torch's own initial variance: from He's, every
        # network diverges at rate 1e-2 and those of ELU and SReLU at 1e-3 (results/divergence)
        "mnist-autoencoder": Preset(
            "mnist",
            hidden=(1000, 500, 250, 30, 250, 500, 1000),
            task="reconstruction",
            seeds=(0, 1, 2),
            rates=(1e-2, 1e-3, 1e-4, 1e-5),
            weight_variance=1 / 3,
            epochs=500,
            fisher="rademacher",
        ),
        "cifar100-11": _CIFAR11,
        "cifar10-11": replace(_CIFAR11, dataset="cifar-10"),
        "cifar100-18": _CIFAR18,
        "cifar10-18": replace(_CIFAR18, dataset="cifar-10"),
        # [R] network, L2, dropout, resizing, crops; [I] pixels in [0, 1] before the mean is
        # subtracted, batch, momentum, steps, rate and its decay, the penalty on all parameters
        # (decayed), stride and pyramid, uniform initial weights (initial), half of He's variance:
        # from He's, ELU's network diverges at rate 1e-2, and at 1e-3 with batches of 8 small
        # photographs (results/divergence)
        "imagenet-15": Preset(
            "photographs",
            "imagenet15",
            weight_variance=1.0,
            activations=("relu", "elu"),
            seeds=(0,),
            rates=(1e-3,),
            iterations=300_000,
            every=5_000,
            momentum=0.9,
            weight_decay=5e-4,
            phases=(Phase(0), Phase(150_000, 0.1), Phase(250_000, 0.01)),
            probe=64,
            units=4,
            rows=256,
            fisher="rademacher",
        ),
    }
)
