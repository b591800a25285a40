"""The second route: per-sample gradients of any parameter, by ``torch.func.vmap``.

It needs neither hooks nor the canonical form of a layer kind (see `kinds`), and serves the kinds
without one. It gives the true Fisher only (``sharing="joint"``): a parameter's gradient is already
summed over its positions.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap

from unitfisher.chance import Chance
from unitfisher.columns import Estimator, columns
from unitfisher.forward import Pick, arguments, pick_output
from unitfisher.kinds import LayerSelectionError
from unitfisher.likelihoods import Likelihood, OutputError, Residual, likelihood_of
from unitfisher.precision import measurable, measuring
from unitfisher.untouched import undisturbed

TOGETHER = 16  # columns formed at a time
Given = tuple[tuple[Tensor, ...], dict[str, Tensor]]  # a forward's arguments


def per_sample_gradients(
    model: nn.Module,
    inputs: Any,
    targets: Tensor | None = None,
    *,
    likelihood: str | Likelihood = "categorical",
    fisher: str = "exact",
    samples: int = 1,
    output: Pick = None,
    parameters: Mapping[str, Tensor] | None = None,
    chunk_size: int | None = None,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Return the gradient of ln p of each sample, in every trainable parameter.

    The model runs in eval mode and is left as it was. Where ``torch.func.vmap`` does not support an
    operation (nn.LSTM), plain autograd goes sample by sample.

    Args:
        model: Any module that accepts a batch of one sample.
        inputs: A tensor, or a tuple or mapping of tensors, samples on the first axis.
        targets: Observed labels y, for gradients of ln p(y | x). None: the columns of the Fisher's
            root.
        likelihood: "categorical", "bernoulli", "gaussian" or a Likelihood object.
        fisher: "exact", "mc", "rademacher" or "top-rademacher"; with targets it is not used.
        samples: Number of random columns; "top-rademacher" has one more, which is exact.
        output: Picks the logits from what forward returns.
        parameters: A selection of ``named_parameters()``; None: all trainable ones.
        chunk_size: Samples at a time, to bound memory; None: all.
        seed: Seed of drawn labels or signs.

    Returns:
        By parameter name, with targets (n, *parameter.shape); without, r columns (r, n,
        *parameter.shape), whose outer products, summed over r and averaged over n, are the Fisher.

    Raises:
        OutputError: The output, or the targets, do not fit the likelihood.
        ValueError: An unknown name or impossible number for an option.

    >>> model = nn.Sequential(nn.Linear(3, 4), nn.ELU(), nn.Linear(4, 2))
    >>> x, y = torch.randn(10, 3), torch.zeros(10, dtype=torch.long)
    >>> tuple(per_sample_gradients(model, x, y)["0.weight"].shape)
    (10, 4, 3)
    """
    estimator = Estimator(likelihood_of(likelihood), fisher, samples, sharing="joint")
    if targets is not None:
        estimator = replace(estimator, fisher="empirical")
    trainable = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    chosen = trainable if parameters is None else {n: p.detach() for n, p in parameters.items()}
    args, kwargs = arguments(inputs)

    def outputs(chosen: dict[str, Tensor], given: Given) -> Tensor:
        result = functional_call(model, chosen, *given)
        return estimator.likelihood.arrange(pick_output(result, output))

    def pulled_back(given: Given, S: Float[Tensor, "r t y"]) -> dict[str, Tensor]:
        back = vjp(lambda chosen: outputs(chosen, _each(given, _alone))[0], chosen)[1]
        if len(S) > 1:
            return dict(vmap(back)(S)[0])
        return {name: g.unsqueeze(0) for name, g in back(S[0])[0].items()}

    def of_target(given: Given, y: Tensor) -> dict[str, Tensor]:
        z, back = vjp(lambda chosen: outputs(chosen, _each(given, _alone)), chosen)[:2]
        assert targets is not None
        assert isinstance(estimator.likelihood, Residual)
        whole = torch.zeros(len(targets), *z.shape[1:], dtype=z.dtype, device=z.device)
        estimator.likelihood.score(whole, targets)  # raises where targets do not fit
        return dict(back(estimator.likelihood.residual(z, y.unsqueeze(0)))[0])

    with undisturbed(model), torch.inference_mode(False), torch.no_grad():
        given = args, kwargs
        if targets is not None and isinstance(estimator.likelihood, Residual):
            _require_each(targets, next(iter([*args, *kwargs.values()])))
            try:
                return dict(vmap(of_target, chunk_size=chunk_size)(given, targets))
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:
                pass  # no rule for vmap: column by column, below
        z = outputs(chosen, given)
        chance = Chance(seed).on(measuring(z.device))
        blocks = columns(measurable(z), estimator, chance, targets, TOGETHER)
        S = torch.cat(list(blocks)).to(z.device)
        try:
            each = vmap(pulled_back, in_dims=(0, 1), out_dims=1, chunk_size=chunk_size)(given, S)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            each = _one_by_one(outputs, chosen, given, S)
    return {name: g[0] if targets is not None else g for name, g in each.items()}


def _one_by_one(
    outputs: Callable[[dict[str, Tensor], Given], Tensor],
    chosen: Mapping[str, Tensor],
    given: Given,
    S: Float[Tensor, "r n t y"],
) -> dict[str, Tensor]:
    """Take gradients by plain autograd: for operations (nn.LSTM) that vmap has no rule for."""
    leaves = {name: p.clone().requires_grad_() for name, p in chosen.items()}
    of_samples = []
    for i, of_sample in enumerate(S.unbind(1)):
        with torch.enable_grad():
            z = outputs(leaves, _each(given, partial(Tensor.narrow, dim=0, start=i, length=1)))[0]
        grads = [
            torch.autograd.grad(z, [*leaves.values()], column, True, materialize_grads=True)
            for column in of_sample
        ]
        of_samples.append([torch.stack(of_columns) for of_columns in zip(*grads, strict=True)])
    joined = [torch.stack(of_parameter, 1) for of_parameter in zip(*of_samples, strict=True)]
    return dict(zip(leaves, joined, strict=True))


def unit_fisher_per_sample(
    model: nn.Module,
    inputs: Any,
    layer: str,
    estimator: Estimator,
    *,
    targets: Tensor | None,
    output: Pick,
    seed: int,
) -> dict[str, Float[Tensor, "u e e"]]:
    """Materialise the unit Fishers of any module's weights, bias last where it has one.

    Weights are the parameters with "weight" in their name. Units lie along the first axis; along
    the second in embeddings.

    Returns:
        The block of ``weight`` under the layer's name; others under ``layer.parameter``.

    Raises:
        LayerSelectionError: The layer has no trainable weight.
        ValueError: ``fisher="empirical"`` without targets.
    """
    module = model.get_submodule(layer)
    owned = {n: p for n, p in module.named_parameters(recurse=False) if p.requires_grad}
    weights = [name for name in owned if "weight" in name]
    if not weights:
        raise LayerSelectionError(
            f"layer {layer!r} ({type(module).__name__}) has no parameter called weight: take "
            f"unitfisher.per_sample_gradients(model, x) and arrange its units yourself"
        )
    prefix = f"{layer}." if layer else ""
    observed = estimator.fisher == "empirical"
    if observed and targets is None:
        raise ValueError("fisher='empirical' needs the observed labels: pass targets=y")
    found = per_sample_gradients(
        model,
        inputs,
        targets if observed else None,
        likelihood=estimator.likelihood,
        fisher="exact" if observed else estimator.fisher,
        samples=estimator.samples,
        output=output,
        parameters={prefix + name: p for name, p in owned.items()},
        seed=seed,
    )
    if observed:  # there is but one column
        found = {name: g.unsqueeze(0) for name, g in found.items()}
    blocks = {}
    for name in weights:
        bias = found.get(prefix + name.replace("weight", "bias"))
        key = layer if name == "weight" else prefix + name
        blocks[key] = _blocks(_units_first(module, found[prefix + name]), bias)
    return blocks


def _blocks(G: Float[Tensor, "r n u d"], S: Float[Tensor, "r n u"] | None) -> Tensor:
    Z = (G if S is None else torch.cat([G, S.unsqueeze(-1)], -1)).flatten(0, 1)
    return Z.permute(1, 2, 0) @ Z.transpose(0, 1) / G.shape[1]


def _units_first(module: nn.Module, G: Tensor) -> Float[Tensor, "r n u d"]:
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return G.transpose(2, 3)
    return G.flatten(3) if G.dim() > 3 else G.unsqueeze(3)


def _each(given: Given, act: Callable[[Tensor], Tensor]) -> Given:
    args, kwargs = given
    return tuple(act(x) for x in args), {name: act(x) for name, x in kwargs.items()}


def _require_each(targets: object, x: Tensor) -> None:
    shape = tuple(targets.shape) if isinstance(targets, Tensor) else type(targets).__name__
    if shape[:1] != (len(x),):
        raise OutputError(f"targets must be a tensor of {len(x)}, one a sample, got {shape}")


def _alone(x: Tensor) -> Tensor:
    return x.unsqueeze(0)
