"""The same quantities by other libraries, through their public interfaces; all are optional.

    uv pip install -c constraints.txt -e ".[analysis,peers]"

asdfghjkl imports as ``asdl``; the package of that name is a parser. ``kfac`` on the index is for
TensorFlow; kfac-pytorch is installed from its repository. A peer that is absent or fails stands
in the table with its error.
"""

import logging
import tempfile
import warnings
from functools import partial
from itertools import count
from typing import Any

import torch
import torch.nn.functional as F
from benchmark_cases import Run, Setting, training_step
from torch import nn
from torch.func import functional_call, grad, vmap

DAMPING = 1e-3
DISTRIBUTIONS = (
    "asdfghjkl",
    "backpack-for-pytorch",
    "opacus",
    "curvlinops-for-pytorch",
    "kfac-pytorch",
    "cockpit-for-pytorch",
    "delve",
)


def hush() -> None:
    """Silence warnings of other libraries, and those of torch that they cause."""
    for module in ("benchmark_peers", "torch.nn", "torch.jit", "torch.autograd", "backpack"):
        warnings.filterwarnings("ignore", module=module)
    logging.getLogger("delve").setLevel(logging.ERROR)


def asdl_unit_fishers(at: Setting, fisher: str) -> Run:
    import asdl

    config = asdl.FisherConfig(fisher, [asdl.SHAPE_UNIT_WISE], "cross_entropy", data_size=len(at.x))
    maker = asdl.get_fisher_maker(at.model, config)
    maker.setup_loss_call(F.cross_entropy, maker.setup_model_call(at.model, at.x), at.y)
    return maker.forward_and_backward


def asdl_natural_gradients(at: Setting, fisher: str) -> Run:
    import asdl

    config = asdl.PreconditioningConfig(data_size=len(at.x), damping=DAMPING)
    return _asdl_step(at, asdl.UnitWiseNaturalGradientMaker(at.model, config, fisher_type=fisher))


def asdl_kfac(at: Setting) -> Run:
    import asdl

    config = asdl.PreconditioningConfig(data_size=len(at.x), damping=DAMPING)
    return _asdl_step(at, asdl.KfacGradientMaker(at.model, config))


def _asdl_step(at: Setting, maker: Any) -> Run:
    maker.setup_loss_call(F.cross_entropy, maker.setup_model_call(at.model, at.x), at.y)

    def run() -> object:
        at.model.zero_grad()
        return maker.forward_and_backward()

    return run


def asdl_per_sample(at: Setting) -> Run:
    from asdl import save_batch_gradient

    def run() -> None:
        for p in at.model.parameters():
            vars(p).pop("batch_grad", None)
        at.model.zero_grad()
        save_batch_gradient(at.model, lambda: _summed_loss(at).backward())

    return run


def torch_func_per_sample(at: Setting) -> Run:
    parameters = {name: p.detach() for name, p in at.model.named_parameters()}

    def loss(parameters: dict[str, torch.Tensor], x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(functional_call(at.model, parameters, (x[None],)), y[None])

    return partial(vmap(grad(loss), in_dims=(None, 0, 0)), parameters, at.x, at.y)


def backpack_per_sample(at: Setting) -> Run:
    from backpack.extensions import BatchGrad

    return _backpack(at, BatchGrad, "sum")


def backpack_c(at: Setting) -> Run:
    from backpack.extensions import DiagGGNExact

    return _backpack(at, DiagGGNExact, "mean")


def _backpack(at: Setting, extension: type, reduction: str) -> Run:
    from backpack import backpack, extend

    model, loss = extend(at.model), extend(nn.CrossEntropyLoss(reduction=reduction))

    def run() -> None:
        model.zero_grad()
        with backpack(extension()):
            loss(model(at.x), at.y).backward()

    return run


def opacus_per_sample(at: Setting) -> Run:
    from opacus.grad_sample import GradSampleModule

    model = GradSampleModule(at.model, loss_reduction="sum")

    def run() -> None:
        model.zero_grad()
        for p in model.parameters():
            p.grad_sample = None
        F.cross_entropy(model(at.x), at.y, reduction="sum").backward()

    return run


def curvlinops_kfac(at: Setting) -> Run:
    from curvlinops import KFACLinearOperator

    parameters, data = list(at.model.parameters()), [(at.x, at.y)]

    def run() -> None:
        training_step(at)
        KFACLinearOperator(
            at.model, nn.CrossEntropyLoss(), parameters, data, check_deterministic=False
        ).compute_kronecker_factors()

    return run


def kfac_pytorch(at: Setting) -> Run:
    from kfac.preconditioner import KFACPreconditioner

    preconditioner = KFACPreconditioner(at.model, factor_update_steps=1, inv_update_steps=1)

    def run() -> None:
        training_step(at)
        preconditioner.step()

    return run


def cockpit(at: Setting, configuration: str) -> Run:
    from backpack import extend
    from cockpit import Cockpit
    from cockpit.utils.configuration import configuration as quantities

    model, each = extend(at.model), nn.CrossEntropyLoss(reduction="none")
    mean = extend(nn.CrossEntropyLoss())
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    watching = Cockpit(model.parameters(), quantities=quantities(configuration))
    steps = count()

    def run() -> None:
        step = next(steps)
        optimizer.zero_grad()
        logits = model(at.x)
        loss, losses = mean(logits, at.y), each(logits, at.y)
        info = {"batch_size": len(at.x), "individual_losses": losses, "loss": loss}
        with watching(step, info=info | {"optimizer": optimizer}):
            loss.backward(create_graph=watching.create_graph(step))
        optimizer.step()

    return run


def delve(at: Setting) -> Run:
    from delve import SaturationTracker

    folder = at.after.enter_context(tempfile.TemporaryDirectory())
    device = str(at.x.device)
    tracker = SaturationTracker(folder, save_to="csv", modules=at.model, device=device)
    at.after.callback(tracker.close)
    return partial(training_step, at)


def _summed_loss(at: Setting) -> torch.Tensor:
    return F.cross_entropy(at.model(at.x), at.y, reduction="sum")
