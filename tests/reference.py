"""The unit Fisher the slow way: one sample, one outcome and one backward pass at a time.

Float64 throughout and independent of the package, so that agreement means something. Everything
here is meant to be checked by reading. The bias is the last coordinate of every Fisher.
"""

import copy
from collections.abc import Iterator
from itertools import product

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED)
NUMPY_PADDING = {
    "zeros": "constant",
    "reflect": "reflect",
    "replicate": "edge",
    "circular": "wrap",
}


def outcomes(z: Tensor, likelihood: str, variance: float = 1.0) -> Iterator[tuple[float, Tensor]]:
    """Yield (weight, scalar) pairs with Σ weight ∇scalar ∇scalarᵀ = E_y[∇ln p(y|z) ∇ln p(y|z)ᵀ].

    Labels of different positions or outputs are independent and their scores have mean zero, so
    cross-terms vanish in expectation and each label may be enumerated on its own.
    """
    if likelihood == "categorical":
        for log_p in z.reshape(-1, z.shape[-1]).log_softmax(-1):
            for log_p_y in log_p:
                yield log_p_y.exp().item(), log_p_y
    elif likelihood == "bernoulli":
        for z_k in z.flatten():
            yield torch.sigmoid(z_k).item(), functional.logsigmoid(z_k)
            yield torch.sigmoid(-z_k).item(), functional.logsigmoid(-z_k)
    elif likelihood == "gaussian":
        # The score is Jᵀ (y - z) / variance, and y - z has covariance variance · I.
        for z_k in z.flatten():
            yield 1 / variance, z_k
    else:
        raise ValueError(likelihood)


def log_likelihood(z: Tensor, target: Tensor, likelihood: str, variance: float = 1.0) -> Tensor:
    """Compute ln p(target | z) of one sample up to a constant, summed over its labels."""
    if likelihood == "categorical":
        log_p = z.reshape(-1, z.shape[-1]).log_softmax(-1)
        return sum(row[y] for row, y in zip(log_p, target.flatten(), strict=True))
    z, y = z.flatten(), target.flatten().double()
    if likelihood == "bernoulli":
        return (y * functional.logsigmoid(z) + (1 - y) * functional.logsigmoid(-z)).sum()
    if likelihood == "gaussian":
        return -((y - z) ** 2).sum() / (2 * variance)
    raise ValueError(likelihood)


def unit_fisher_joint(
    model: nn.Module,
    layer_name: str,
    x: Tensor,
    likelihood: str = "categorical",
    variance: float = 1.0,
) -> Tensor:
    """Compute E_n Σ_y p(y) G Gᵀ, G the gradient of ln p(y) in one unit's weights and bias."""
    model, x = frozen(model, x)
    layer = model.get_submodule(layer_name)
    F = 0.0
    for sample in x.split(1):
        for weight, scalar in outcomes(model(sample), likelihood, variance):
            F = F + weight * outer(parameter_gradient(scalar, layer))
    return F / len(x)


def unit_fisher_empirical(
    model: nn.Module,
    layer_name: str,
    x: Tensor,
    targets: Tensor,
    likelihood: str = "categorical",
    variance: float = 1.0,
    sharing: str = "joint",
) -> Tensor:
    """Compute the same with the observed labels in place of the expectation over labels.

    A sample with several labels has one score, the sum of theirs: nothing makes the cross-terms
    of observed labels vanish.
    """
    model, x = frozen(model, x)
    layer = model.get_submodule(layer_name)
    F = 0.0
    for sample, target in zip(x.split(1), targets, strict=True):
        if sharing == "joint":
            scalar = log_likelihood(model(sample), target, likelihood, variance)
            F = F + outer(parameter_gradient(scalar, layer))
        else:
            z, calls = watched(model, layer, sample)
            delta = deltas(log_likelihood(z, target, likelihood, variance), layer, calls)
            a, delta = shared(layer, calls, delta, sharing)
            F = F + sum_of_cases(layer, a, delta**2)
    return F / len(x)


def cases(
    model: nn.Module,
    layer_name: str,
    x: Tensor,
    likelihood: str = "categorical",
    variance: float = 1.0,
    sharing: str = "expand",
) -> tuple[Tensor, Tensor]:
    """Return incoming activations a (n, d) and D = E_y δ² (n, u), sample by sample.

    With sharing="expand" every position is a case; with "reduce" a sample is one case, the mean
    of its patches weighted by E_y (Σ_t δ_t)². A grouped convolution gives a the shape (G, n, d).
    """
    model, x = frozen(model, x)
    layer = model.get_submodule(layer_name)
    all_a, all_D = [], []
    for sample in x.split(1):
        z, calls = watched(model, layer, sample)
        D = 0.0
        for weight, scalar in outcomes(z, likelihood, variance):
            a, delta = shared(layer, calls, deltas(scalar, layer, calls), sharing)
            D = D + weight * delta**2
        all_a.append(a)
        all_D.append(D)
    return torch.cat(all_a, dim=-2), torch.cat(all_D)


def unit_fisher(
    model: nn.Module,
    layer_name: str,
    x: Tensor,
    likelihood: str = "categorical",
    variance: float = 1.0,
    sharing: str = "expand",
) -> Tensor:
    """Compute the unit Fishers (u, d+1, d+1) of a layer under one of the three sharings."""
    if sharing == "joint":
        return unit_fisher_joint(model, layer_name, x, likelihood, variance)
    a, D = cases(model, layer_name, x, likelihood, variance, sharing)
    return sum_of_cases(model.get_submodule(layer_name), a, D) / len(x)


def quantities(F: Tensor, mean: Tensor) -> dict[str, np.ndarray]:
    """Compute c, b, A, mu_q, V, s, k and the corrected mean of ONE unit from its Fisher."""
    F, mean = np.asarray(F, np.float64), np.asarray(mean, np.float64)
    A, b, c = F[:-1, :-1], F[:-1, -1], F[-1, -1]
    mu_q = b / c
    V = A / c - np.outer(mu_q, mu_q)
    s = np.linalg.inv(F)[-1, -1]
    k = (mu_q - mean) @ np.linalg.solve(V, mu_q)
    found = {"c": c, "b": b, "A": A, "mu_q": mu_q, "V": V, "s": s, "k": k}
    return found | {"corrected_mean": mean - (1 + k) * mu_q}


def natural_gradient(F: Tensor, g: Tensor, g0: Tensor) -> tuple[np.ndarray, float]:
    """Solve F (Δw, Δw₀) = (g, g₀) for ONE unit by a dense solve."""
    F, g = np.asarray(F, np.float64), np.asarray(g, np.float64)
    step = np.linalg.solve(F, np.append(g, float(g0)))
    return step[:-1], step[-1]


def damped(F: Tensor, damping: float, *, biased: bool = True) -> Tensor:
    """Add the mean of the weights' second moments, times damping, to each of them."""
    d = F.shape[-1] - biased
    ridge = damping * F.diagonal(dim1=-2, dim2=-1)[..., :d].mean(-1)
    return F + ridge[..., None, None] * torch.diag((torch.arange(F.shape[-1]) < d).double())


def joined(g: Tensor, g0: Tensor | None) -> Tensor:
    """Return each unit's gradient or step (u, d+1): flattened weight, then bias if there is one."""
    return torch.cat([g.flatten(1)] + ([] if g0 is None else [g0[:, None]]), dim=1)


def frozen(model: nn.Module, x: Tensor) -> tuple[nn.Module, Tensor]:
    """Return a float64 copy in eval mode (the caller's model stays as it is) and its input."""
    model = copy.deepcopy(model).double().eval().requires_grad_(True)
    return model, x.double() if x.is_floating_point() else x


def parameter_gradient(scalar: Tensor, layer: nn.Module) -> Tensor:
    """Return each unit's gradient (u, d+1): flattened weight, then bias if there is one."""
    parameters = [layer.weight] if layer.bias is None else [layer.weight, layer.bias]
    weight, *bias = torch.autograd.grad(scalar, parameters, retain_graph=True)
    rows = [weight_of_unit(layer, weight, i).flatten() for i in range(units_of(layer))]
    return torch.cat([torch.stack(rows), *(grad.unsqueeze(1) for grad in bias)], dim=1)


def units_of(layer: nn.Module) -> int:
    return layer.out_channels if isinstance(layer, CONVOLUTIONS) else len(layer.weight)


def weight_of_unit(layer: nn.Module, weight: Tensor, i: int) -> Tensor:
    """Pick what a unit multiplies its inputs with; transposed weights have inputs first."""
    if not isinstance(layer, TRANSPOSED):
        return weight[i]
    units, inputs = layer.out_channels // layer.groups, layer.in_channels // layer.groups
    return weight[i // units * inputs :][:inputs, i % units]


def outer(G: Tensor) -> Tensor:
    return torch.stack([torch.outer(row, row) for row in G])


def watched(
    model: nn.Module, layer: nn.Module, sample: Tensor
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Run one sample; return the output and (input, zero probe on the output) of each call."""
    calls = []

    def add_probe(_: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        probe = torch.zeros_like(output, requires_grad=True)
        calls.append((inputs[0].detach().clone(), probe))
        return output + probe

    handle = layer.register_forward_hook(add_probe)
    try:
        return model(sample), calls
    finally:
        handle.remove()


def deltas(scalar: Tensor, layer: nn.Module, calls: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Return ∂ scalar / ∂ preactivation at every position of every call, (t, u)."""
    probes = [probe for _, probe in calls]
    grads = torch.autograd.grad(scalar, probes, retain_graph=True, materialize_grads=True)
    if isinstance(layer, CONVOLUTIONS):
        return torch.cat([grad[0].reshape(layer.out_channels, -1).T for grad in grads])
    return torch.cat([grad.reshape(-1, layer.out_features) for grad in grads])


def shared(
    layer: nn.Module, calls: list[tuple[Tensor, Tensor]], delta: Tensor, sharing: str
) -> tuple[Tensor, Tensor]:
    """Turn the positions of one sample into cases."""
    a = torch.cat([patches(layer, x) for x, _ in calls], dim=-2)
    if sharing == "expand":
        return a, delta
    if sharing == "reduce":
        return a.mean(-2, keepdim=True), delta.sum(0, keepdim=True)
    raise ValueError(sharing)


def sum_of_cases(layer: nn.Module, a: Tensor, D: Tensor) -> Tensor:
    """Compute Σ D ã ãᵀ over cases for every unit; a unit of a group sees its group's patches."""
    F = []
    for i in range(D.shape[1]):
        a_i = a if a.dim() == 2 else a[i * len(a) // D.shape[1]]
        a_i = a_i if layer.bias is None else with_ones(a_i)
        F.append(sum(D_n * torch.outer(a_n, a_n) for D_n, a_n in zip(D[:, i], a_i, strict=True)))
    return torch.stack(F)


def with_ones(a: Tensor) -> Tensor:
    return torch.cat([a, torch.ones_like(a[..., :1])], dim=-1)


def weighted_fisher(a: Tensor, D: Tensor) -> Tensor:
    """Compute E D ã ãᵀ of every unit, for D known on paper."""
    return torch.einsum("nu,nd,ne->ude", D, with_ones(a), with_ones(a)) / len(a)


def patches(layer: nn.Module, x: Tensor) -> Tensor:
    """Return what a unit sees at each position of one sample: (t, d), or (G, t, d) in groups."""
    if not isinstance(layer, CONVOLUTIONS):
        return x.reshape(-1, layer.in_features)
    if isinstance(layer, TRANSPOSED):
        return patches_of_transposed(layer, x)
    padded = pad(layer, x[0].numpy())
    channels = layer.in_channels // layer.groups
    first_channels = range(0, layer.in_channels, channels)
    groups = [patches_of_group(layer, padded[i : i + channels]) for i in first_channels]
    return groups[0] if layer.groups == 1 else torch.stack(groups)


def patches_of_group(layer: nn.Module, x: np.ndarray) -> Tensor:
    """Collect x[channel, position · stride + tap · dilation], ordered as weight[i].flatten()."""
    stride, dilation, size = layer.stride, layer.dilation, layer.kernel_size
    span = [d * (k - 1) + 1 for d, k in zip(dilation, size, strict=True)]
    positions = [(n - w) // s + 1 for n, w, s in zip(x.shape[1:], span, stride, strict=True)]
    rows = []
    for position in product(*map(range, positions)):
        row = []
        for channel, *tap in product(range(len(x)), *map(range, size)):
            steps = zip(position, stride, tap, dilation, strict=True)
            index = [p * s + t * d for p, s, t, d in steps]
            row.append(x[(channel, *index)])
        rows.append(row)
    return torch.tensor(np.array(rows))


def patches_of_transposed(layer: nn.Module, x: Tensor) -> Tensor:
    """Send each input to position · stride + tap · dilation - padding, through each tap."""
    out = layer(x).shape[2:]
    a = torch.zeros(layer.in_channels, *out, *layer.kernel_size, dtype=x.dtype)
    for position in product(*map(range, x.shape[2:])):
        for tap in product(*map(range, layer.kernel_size)):
            steps = zip(position, layer.stride, tap, layer.dilation, layer.padding, strict=True)
            to = [p * s + t * d - padding for p, s, t, d, padding in steps]
            if all(0 <= i < size for i, size in zip(to, out, strict=True)):
                a[(slice(None), *to, *tap)] = x[(0, slice(None), *position)]
    a = a.reshape(layer.groups, -1, out.numel(), len(a[0].flatten()) // out.numel())
    a = a.transpose(1, 2).flatten(2)
    return a[0] if layer.groups == 1 else a


def pad(layer: nn.Module, x: np.ndarray) -> np.ndarray:
    """Pad one sample (channels first) as the layer does."""
    if layer.padding == "valid":
        return x
    if layer.padding == "same":
        total = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        widths = [(n // 2, n - n // 2) for n in total]
    else:
        widths = [(n, n) for n in layer.padding]
    return np.pad(x, [(0, 0), *widths], mode=NUMPY_PADDING[layer.padding_mode])
