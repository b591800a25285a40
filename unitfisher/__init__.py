"""unitfisher: the unit natural gradient and bias shift of any PyTorch model, in live training."""

from unitfisher.attachment import UncoveredLayersWarning as UncoveredLayersWarning
from unitfisher.fisher import NonFiniteError as NonFiniteError
from unitfisher.fisher import unit_fisher as unit_fisher
from unitfisher.layers import LayerSelectionError as LayerSelectionError
from unitfisher.likelihoods import Bernoulli as Bernoulli
from unitfisher.likelihoods import Categorical as Categorical
from unitfisher.likelihoods import Gaussian as Gaussian
from unitfisher.likelihoods import Likelihood as Likelihood
from unitfisher.likelihoods import OutputError as OutputError
from unitfisher.moments import UnitMoments as UnitMoments
from unitfisher.monitor import Monitor as Monitor
from unitfisher.operator import UnitFisherOperator as UnitFisherOperator
from unitfisher.operator import unit_fisher_operator as unit_fisher_operator
from unitfisher.passes import activation_statistics as activation_statistics
from unitfisher.per_sample import per_sample_gradients as per_sample_gradients
from unitfisher.plan import MemoryBudgetError as MemoryBudgetError
from unitfisher.plan import Plan as Plan
from unitfisher.products import UnconvergedWarning as UnconvergedWarning
from unitfisher.record import RecordExistsError as RecordExistsError
from unitfisher.record import Run as Run
from unitfisher.solvers import SingularFisherError as SingularFisherError
from unitfisher.statistics import UnitStatistics as UnitStatistics
from unitfisher.theorems import bias_shift_correction as bias_shift_correction
from unitfisher.theorems import theorem_1 as theorem_1
from unitfisher.theorems import theorem_2 as theorem_2
from unitfisher.theorems import unit_natural_gradient as unit_natural_gradient
