"""Data, models and training of the experiments; they may use the core, never the reverse."""

from unitfisher.experiments.data import DataNotFoundError as DataNotFoundError
from unitfisher.experiments.data import Dataset as Dataset
from unitfisher.experiments.data import DatasetName as DatasetName
from unitfisher.experiments.data import load as load
from unitfisher.experiments.data import probe as probe
from unitfisher.experiments.models import ACTIVATIONS as ACTIVATIONS
from unitfisher.experiments.models import ActivationName as ActivationName
from unitfisher.experiments.models import SReLU as SReLU
from unitfisher.experiments.models import mlp as mlp
from unitfisher.experiments.training import evaluate as evaluate
from unitfisher.experiments.training import train as train
