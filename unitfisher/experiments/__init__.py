"""Data, models and training of the experiments; they may use the core, never the reverse.

A preset is trained like this (``replace`` is that of ``dataclasses``):

    preset = replace(PRESETS["mnist"], activations=("relu", "elu"), epochs=20)
    data = data_of(preset, "DIR")
    with Trainer(preset, preset.members, data, Path("runs/mnist")) as trainer:
        for progress in trainer:
            print(end=f"\\r{progress}")

Each network has a record in a folder of its own below ``runs/mnist``. Where some of the activations
have parameters, as PReLU has, ``preset.forms`` says which members train together.
"""

from unitfisher.experiments.data import DataNotFoundError as DataNotFoundError
from unitfisher.experiments.data import Dataset as Dataset
from unitfisher.experiments.data import DatasetName as DatasetName
from unitfisher.experiments.data import load as load
from unitfisher.experiments.data import probe as probe
from unitfisher.experiments.models import ACTIVATIONS as ACTIVATIONS
from unitfisher.experiments.models import ActivationName as ActivationName
from unitfisher.experiments.models import SReLU as SReLU
from unitfisher.experiments.models import mlp as mlp
from unitfisher.experiments.preset_data import data_of as data_of
from unitfisher.experiments.presets import PRESETS as PRESETS
from unitfisher.experiments.presets import Member as Member
from unitfisher.experiments.presets import Phase as Phase
from unitfisher.experiments.presets import Preset as Preset
from unitfisher.experiments.trainer import Trainer as Trainer
from unitfisher.experiments.training import evaluate as evaluate
from unitfisher.experiments.training import train as train
