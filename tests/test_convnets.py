"""Convolutional networks are the paper's and its table's: sizes, weights, dropout, names."""

import sys
from collections.abc import Callable
from dataclasses import replace
from inspect import signature
from itertools import groupby
from math import ceil, floor, sqrt

import pytest
import torch
import torch.nn.functional as F
from strategies import seeded
from torch import Tensor, nn
from torch.testing import assert_close

import unitfisher
from unitfisher.experiments.comparisons import DSN, LocalNorm, Maxout, Supervised
from unitfisher.experiments.convnets import (
    CIFAR11,
    CIFAR18,
    DROPOUT,
    IMAGENET15,
    STACKS,
    PyramidPool,
    all_convolutional,
    cifar11,
    cifar18,
    imagenet15,
    pyramidal,
)
from unitfisher.experiments.ensembles import Ensemble
from unitfisher.experiments.models import ACTIVATIONS, mlp
from unitfisher.experiments.networks import NETWORKS, build
from unitfisher.experiments.options import TAKERS
from unitfisher.experiments.presets import PRESETS, Phase
from unitfisher.experiments.stacks import Conv, HalvingPool, Maker, Stack, set_dropout

PLAN = ((Conv(4, 3),), (Conv(5, 1), Conv(6, 2)))
SMALL = sorted(set(NETWORKS) - {"imagenet15"})  # its 165 million numbers are made on no device


def on_no_device(builder: Callable[..., nn.Module], classes: int, **options: object) -> nn.Module:
    with torch.device("meta"):
        return builder(classes, seeded(0), **options)


def children(network: nn.Module) -> list[str]:
    return [name for name, _ in network.named_children()]


def weights(network: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in network.named_parameters() if name.endswith(".weight")}


def small_pyramid(**options: str) -> nn.Sequential:
    return pyramidal(PLAN, (8, 7), 3, Maker(seeded(0), **options))


def narrow(plan: tuple[Stack, ...]) -> tuple[Stack, ...]:
    return tuple(tuple(conv._replace(units=2) for conv in stack) for stack in plan)


def walk(network: nn.Module, side: int) -> list[int]:
    x = torch.randn(1, 3, side, side)
    sides = [side]
    for name, part in network.eval().named_children():
        for layer in part.children() if name.startswith("stack") else [part]:
            x = layer(x)
            sides += [x.shape[3]] if x.ndim == 4 and not isinstance(layer, nn.ZeroPad2d) else []
    return [side for side, _ in groupby(sides)]


@pytest.mark.parametrize(
    ("builder", "classes", "millions"),
    [
        (cifar11, 100, "1.67"),
        (cifar18, 100, "39.3"),
        (imagenet15, 1000, "165"),
        (NETWORKS["nin"], 10, "0.967"),
        (NETWORKS["all-cnn-c"], 10, "1.37"),
        (NETWORKS["cuda-convnet"], 10, "0.0896"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_networks_have_as_many_parameters_as_published(
    builder: Callable[..., nn.Module], classes: int, millions: str
) -> None:
    network = on_no_device(builder, classes)
    assert f"{sum(p.numel() for p in network.parameters()) / 1e6:.3g}" == millions


@pytest.mark.parametrize(
    ("plan", "printed"),
    [
        (
            CIFAR11,
            "1×192×5 | 1×192×1, 1×240×3 | 1×240×1, 1×260×2 | 1×260×1, 1×280×2 "
            "| 1×280×1, 1×300×2 | 1×300×1",
        ),
        (
            CIFAR18,
            "1×384×3 | 1×384×1, 1×384×2, 2×640×2 | 1×640×1, 3×768×2 | 1×768×1, 2×896×2 "
            "| 1×896×3, 2×1024×2 | 1×1024×1, 1×1152×2 | 1×1152×1",
        ),
        (IMAGENET15, "1×96×6 | 3×512×3 | 5×768×3 | 3×1024×3"),
    ],
    ids=["cifar11", "cifar18", "imagenet15"],
)
def test_stacks_are_those_that_the_paper_prints(plan: tuple[Stack, ...], printed: str) -> None:
    stacks = [
        [[int(n) for n in item.split("×")] for item in stack.split(",")]
        for stack in printed.split("|")
    ]
    assert [list(stack) for stack in plan] == [
        [Conv(units, size) for layers, units, size in stack for _ in range(layers)]
        for stack in stacks
    ]


@pytest.mark.parametrize(
    ("plan", "side", "padding", "sides"),
    [
        (CIFAR11, 32, "caffe", [32, 16, 8, 9, 5, 6, 3, 4, 2, 1]),
        (CIFAR11, 32, "same", [32, 16, 8, 4, 2, 1]),
        (
            CIFAR18,
            32,
            "caffe",
            [32, 16, *range(17, 20), *range(10, 14), 7, 8, 9, 5, 6, 7, 4, 5, 3, 2],
        ),
        (CIFAR18, 32, "same", [32, 16, 8, 4, 2, 1]),
        (IMAGENET15, 224, "caffe", [224, 225, 113, 57, 29, 15]),
        (IMAGENET15, 224, "same", [224, 112, 56, 28, 14]),
    ],
)
def test_maps_shrink_as_the_padding_convention_says(
    plan: tuple[Stack, ...], side: int, padding: str, sides: list[int]
) -> None:
    network = pyramidal(narrow(plan), (4,), 3, Maker(seeded(0), padding=padding))
    assert walk(network, side) == sides


def test_the_pool_behind_the_output_leaves_one_position_of_the_eighteen_layers() -> None:
    network = all_convolutional(narrow(CIFAR18), 3, Maker(seeded(0)), DROPOUT)
    assert network[:-3](torch.randn(1, 3, 32, 32)).shape[2:] == (2, 2)
    assert network[:-2](torch.randn(1, 3, 32, 32)).shape[2:] == (1, 1)


@pytest.mark.parametrize(
    ("name", "sides"),
    [
        ("cuda-convnet", [32, 16, 8, 4]),
        ("nin", [32, 16, 8, 1]),
        ("all-cnn-c", [32, 16, 8, 6, 1]),
        ("maxout", [32, 33, 16, 15, 7, 9, 5]),
    ],
)
def test_maps_of_the_compared_networks_shrink_as_in_their_sources(
    name: str, sides: list[int]
) -> None:
    assert walk(build(name, 10, None, seeded(0)), 32) == sides


@pytest.mark.parametrize("size", [2, 6])
def test_even_receptive_fields_are_padded_as_torch_pads_same(size: int) -> None:
    layers = nn.Sequential(Maker(seeded(0), padding="same").convolution(1, 3, Conv(4, size)))
    x = torch.randn(2, 3, 9, 7)
    assert_close(layers[:2](x), F.conv2d(x, layers.conv1.weight, padding="same"))


@pytest.mark.parametrize(
    "options",
    [{"activation": name} for name in ACTIVATIONS] + [{"norm": "batch"}, {"padding": "same"}],
    ids=lambda options: next(iter(options.values())),
)
def test_one_seed_gives_the_same_initial_weights_whatever_the_options(
    options: dict[str, str],
) -> None:
    reference, network = small_pyramid(), small_pyramid(**options)
    for name, weight in weights(reference).items():
        assert torch.equal(network.get_parameter(name), weight)


def test_another_seed_gives_other_weights() -> None:
    one, other = (cifar11(10, seeded(seed)) for seed in range(2))
    assert not torch.equal(one.output.weight, other.output.weight)


@pytest.mark.parametrize("name", ["cifar11", "dsn", "maxout"])
def test_initial_weights_fill_the_interval_of_he_and_biases_are_zero(name: str) -> None:
    for layer in build(name, 10, None, seeded(0)).modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            bound = sqrt(6 / layer.weight[0].numel())
            assert 0.99 * bound < layer.weight.abs().max() <= bound
            assert not layer.bias.any()


def test_normal_weights_have_the_same_variance_in_no_interval() -> None:
    uniform, normal = (cifar11(10, seeded(0), initial=initial) for initial in ("uniform", "normal"))
    for name, weight in weights(normal).items():
        bound = uniform.get_parameter(name).abs().max()
        assert 0.9 < weight.std() / uniform.get_parameter(name).std() < 1.1
        assert 0.05 < (weight.abs() > bound).float().mean() < 0.12  # 8.3 % beyond sqrt(3) sd
    assert not normal.output.bias.any()


def test_fully_connected_networks_can_begin_with_normal_weights() -> None:
    normal = mlp((100, 100, 3), "elu", seeded(0), initial="normal").hidden1.weight
    assert normal.std().item() == pytest.approx(sqrt(2 / 100), rel=0.03)
    assert (normal.abs() > sqrt(6 / 100)).float().mean() > 0.05
    assert torch.equal(normal, mlp((100, 100, 3), "relu", seeded(0), initial="normal")[0].weight)


def test_half_of_hes_variance_is_the_same_draw_scaled() -> None:
    he, half = (cifar11(10, seeded(0), weight_variance=variance) for variance in (2.0, 1.0))
    for name, weight in weights(he).items():
        assert_close(half.get_parameter(name), weight / sqrt(2))


@pytest.mark.parametrize("name", [*SMALL, "torchvision:resnet18"])
def test_building_takes_nothing_from_the_global_generator(name: str) -> None:
    before = torch.get_rng_state()
    build(name, 10, None, seeded(0))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("builder", [cifar11, cifar18])
def test_only_the_last_layer_of_a_stack_has_dropout(builder: Callable[..., nn.Module]) -> None:
    stacks = [m for m in on_no_device(builder, 10).children() if isinstance(m, nn.Sequential)]
    rates = [[m.p for m in stack if isinstance(m, nn.Dropout)] for stack in stacks]
    assert [stack[-1] for stack in rates] == [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0][: len(stacks)]
    assert not any(rate for stack in rates for rate in stack[:-1])


def test_dropout_can_be_moved_to_all_layers_of_a_stack_and_back() -> None:
    network = all_convolutional(PLAN, 3, Maker(seeded(0)), (0.1, 0.2))
    drops = [m for m in network.modules() if isinstance(m, nn.Dropout)]
    set_dropout(network, (0.3, 0.4), layers="all")
    assert [drop.p for drop in drops] == [0.3, 0.4, 0.4]
    set_dropout(network, (0.1, 0.2))
    assert [drop.p for drop in drops] == [0.1, 0, 0.2]


def test_fully_connected_layers_have_dropout_of_a_half() -> None:
    network = small_pyramid()
    assert [network.drop1.p, network.drop2.p] == [0.5, 0.5]
    assert not any(m.p for stack in network[:2] for m in stack if isinstance(m, nn.Dropout))


@pytest.mark.parametrize(
    ("name", "rates"),
    [
        ("nin", [0.5] * 2),
        ("dsn", [0.5] * 2),
        ("all-cnn-c", [0.2, 0.5, 0.5]),
        ("maxout", [0.2] + [0.5] * 4),
    ],
)
def test_compared_networks_have_the_dropout_of_their_sources(name: str, rates: list[float]) -> None:
    network = on_no_device(NETWORKS[name], 10)
    assert [m.p for m in network.modules() if isinstance(m, nn.Dropout)] == rates


def test_dropout_rates_must_fit_the_stacks() -> None:
    network = on_no_device(cifar11, 10)
    with pytest.raises(ValueError, match="7 dropout rates for 6 stacks"):
        set_dropout(network, DROPOUT)
    with pytest.raises(ValueError, match="layers must be one of 'last', 'all', got 'first'"):
        set_dropout(network, DROPOUT[:6], layers="first")


@pytest.mark.parametrize(("norm", "normed"), [("none", []), ("batch", ["norm1"])])
def test_batch_normalisation_stands_between_layer_and_activation(
    norm: str, normed: list[str]
) -> None:
    network = small_pyramid(norm=norm)
    assert children(network.stack1) == ["conv1", *normed, "act1", "drop1", "pool"]
    assert children(network)[3 : 6 + len(normed)] == ["hidden1", *normed, "act1", "drop1"]


def test_layers_of_a_stack_are_numbered() -> None:
    network = all_convolutional(PLAN, 3, Maker(seeded(0), padding="same"), (0.0, 0.0))
    assert children(network) == ["stack1", "stack2", "output", "pool", "average", "flatten"]
    second = ["conv1", "act1", "drop1", "pad2", "conv2", "act2", "drop2", "pool"]
    assert children(network.stack2) == second


@pytest.mark.parametrize("name", SMALL)
def test_networks_give_a_logit_for_every_class(name: str) -> None:
    network = build(name, 7, None, seeded(0))
    logits = network(torch.randn(2, 3, 32, 32))
    assert getattr(logits, "logits", logits).shape == (2, 7)


@pytest.mark.parametrize("padding", ["caffe", "same"])
@pytest.mark.parametrize("size", [(32, 32), (21, 14), (3, 2)], ids=str)
def test_the_pyramid_takes_images_of_any_size(padding: str, size: tuple[int, int]) -> None:
    assert small_pyramid(padding=padding)(torch.randn(2, 3, *size)).shape == (2, 3)


def test_the_network_for_imagenet_has_twenty_one_bins() -> None:
    assert on_no_device(imagenet15, 1000).hidden1.in_features == 21_504


def test_a_first_stride_is_taken() -> None:
    plan = narrow(((Conv(96, 6, stride=2),), *IMAGENET15[1:]))
    network = pyramidal(plan, (4,), 10, Maker(seeded(0)))
    assert walk(network, 224) == [224, 113, 57, 29, 15, 8]
    built = on_no_device(imagenet15, 10, stride=2)
    convs = [m for m in built.modules() if isinstance(m, nn.Conv2d)]
    assert [m.stride for m in convs] == [(2, 2)] + [(1, 1)] * 11


def test_other_bins_of_the_pyramid_make_other_features() -> None:
    assert on_no_device(imagenet15, 1000, pyramid=(6, 3, 2, 1)).hidden1.in_features == 1024 * 50
    network = pyramidal(PLAN, (8,), 3, Maker(seeded(0)), bins=(3, 1))
    x = torch.randn(2, 3, 24, 24)
    features = network[:3](x)
    assert features.shape == (2, 6 * 10)
    assert_close(features[:, -6:], network[:2](x).amax((2, 3)))


def test_dropout_of_the_fully_connected_layers_is_taken() -> None:
    network = on_no_device(imagenet15, 10, dropout=0.25)
    assert [network.drop1.p, network.drop2.p] == [0.25, 0.25]
    assert not any(
        drop.p for stack in network[:4] for drop in stack if isinstance(drop, nn.Dropout)
    )


def test_larger_images_are_averaged() -> None:
    network = all_convolutional(PLAN, 3, Maker(seeded(0)), (0.0, 0.0)).eval()
    x = torch.randn(2, 3, 20, 28)
    assert_close(network(x), network[:-2](x).mean((2, 3)))


@pytest.mark.parametrize("size", [(9, 9), (7, 12), (3, 2), (1, 5)], ids=str)
def test_the_pyramid_takes_the_maxima_of_overlapping_bins(size: tuple[int, int]) -> None:
    x = torch.randn(2, 3, *size, generator=seeded(0))
    expected = [
        x[:, c, rows, columns].amax((1, 2))
        for side in (4, 2, 1)
        for c in range(3)
        for rows in bins(size[0], side)
        for columns in bins(size[1], side)
    ]
    assert_close(PyramidPool()(x), torch.stack(expected, 1))


def bins(length: int, number: int) -> list[slice]:
    return [
        slice(floor(i * length / number), ceil((i + 1) * length / number)) for i in range(number)
    ]


@pytest.mark.parametrize(
    ("rounding", "size", "pooled"),
    [
        ("ceil", (5, 4), (3, 2)),
        ("floor", (5, 4), (2, 2)),
        ("ceil", (1, 5), (1, 3)),
        ("floor", (1, 5), (1, 2)),
        ("floor", (1, 1), (1, 1)),
    ],
)
def test_pooling_halves_a_map_and_leaves_axes_of_one(
    rounding: str, size: tuple[int, int], pooled: tuple[int, int]
) -> None:
    assert HalvingPool(rounding)(torch.randn(2, 3, *size)).shape == (2, 3, *pooled)


def test_pooling_takes_the_largest_of_four() -> None:
    x = torch.tensor([[1.0, 2.0, 3.0], [4.0, 0.0, -1.0]])[None, None]
    assert_close(HalvingPool("ceil")(x), torch.tensor([[[[4.0, 3.0]]]]))


def test_maxout_takes_the_largest_of_its_pieces() -> None:
    x = torch.tensor([[1.0, 3.0, -2.0, -5.0]])
    assert_close(Maxout(2)(x), torch.tensor([[3.0, -2.0]]))


def test_local_normalisation_counts_zeros_beyond_the_border() -> None:
    y = LocalNorm()(torch.full((1, 1, 3, 3), 200.0))
    assert y[0, 0, 1, 1].item() == pytest.approx(200 / (1 + 5e-5 * 200**2) ** 0.75)
    assert y[0, 0, 0, 0].item() == pytest.approx(200 / (1 + 5e-5 * 200**2 * 4 / 9) ** 0.75)


def test_companions_see_the_first_convolution_of_each_stack() -> None:
    network = build("dsn", 5, None, seeded(0))
    assert isinstance(network, DSN)
    x = torch.randn(2, 3, 32, 32)
    answer = network(x)
    assert isinstance(answer, Supervised)
    first = network.trunk.stack1.conv1(x).flatten(1)
    assert_close(answer.companions[0], network.companions[0](first))
    assert [c.shape for c in answer.companions] == [(2, 5)] * 3


def test_companions_leave_the_logits_alone() -> None:
    network = build("dsn", 5, None, seeded(0))
    x = torch.randn(2, 3, 32, 32)
    alone = network.eval()(x)
    network.train()
    for drop in (network.trunk.drop1, network.trunk.drop2):
        drop.eval()
    assert_close(network(x).logits, alone)


def test_the_trunk_of_dsn_starts_as_nin() -> None:
    trunk, network = build("dsn", 5, "elu", seeded(0)).trunk, build("nin", 5, "elu", seeded(0))
    for name, parameter in network.named_parameters():
        assert torch.equal(trunk.get_parameter(name), parameter)


@pytest.mark.parametrize(("name", "activated"), [("nin", True), ("dsn", False)])
def test_class_maps_are_activated_where_the_source_does(name: str, activated: bool) -> None:
    network = build(name, 5, "elu", seeded(0))
    assert ("act" in children(getattr(network, "trunk", network))) == activated


@pytest.mark.parametrize("name", sorted(set(SMALL) - {"maxout"}))
def test_the_activation_asked_for_is_the_only_one(name: str) -> None:
    with torch.device("meta"):
        network = build(name, 5, "srelu", seeded(0))
    kinds = {type(ACTIVATIONS[a].module()) for a in ACTIVATIONS}
    assert {type(m) for m in network.modules()} & kinds == {type(ACTIVATIONS["srelu"].module())}


@pytest.mark.parametrize("name", ["cifar12", "torchvision", "torchvision:", "keras:resnet18"])
def test_unknown_networks_are_refused_and_the_known_ones_named(name: str) -> None:
    with pytest.raises(ValueError, match=r"cifar11, .*timm:NAME .*torchvision:resnet18"):
        build(name, 10, "elu", seeded(0))


@pytest.mark.parametrize("option", ["activation", "norm", "padding", "initial"])
def test_unknown_options_are_refused_and_the_known_ones_named(option: str) -> None:
    options = {"activation": "elu", option: "step"}
    known = {"activation": "'relu', 'lrelu'", "norm": "'none', 'batch'", "padding": "'caffe'"}
    named = known.get(option, "'uniform', 'normal'")
    with pytest.raises(ValueError, match=f"{option} must be one of {named}.* got 'step'"):
        build("cifar11", 10, generator=seeded(0), **options)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("maxout", {"activation": "elu"}),
        ("cuda-convnet", {"norm": "batch"}),
        ("nin", {"padding": "same"}),
        ("all-cnn-c", {"weight_variance": 2.0}),
        ("nin", {"initial": "normal"}),
        ("cifar11", {"stride": 2}),
        ("cifar18", {"pyramid": (2, 1)}),
        ("dsn", {"dropout": 0.0}),
        ("torchvision:resnet18", {"norm": "batch"}),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_options_that_a_network_does_not_have_are_refused(
    name: str, options: dict[str, str]
) -> None:
    with pytest.raises(ValueError, match=f"{name} has its own {next(iter(options))}"):
        build(name, 10, generator=seeded(0), **({"activation": None} | options))


def test_models_of_torchvision_take_the_generators_weights_and_the_activation() -> None:
    one, other, again = (build("torchvision:resnet18", 10, "elu", seeded(s)) for s in (0, 1, 0))
    assert one.fc.out_features == 10
    assert torch.equal(one.conv1.weight, again.conv1.weight)
    assert not torch.equal(one.conv1.weight, other.conv1.weight)
    assert isinstance(one.layer1[0].relu, nn.ELU)
    assert not any(isinstance(m, nn.ReLU) for m in one.modules())


def test_a_model_without_relus_keeps_its_activation() -> None:
    with torch.device("meta"), pytest.raises(ValueError, match="ConvNeXt has no nn.ReLU"):
        build("torchvision:convnext_tiny", 10, "elu", seeded(0))


def test_unknown_models_of_a_package_are_refused_and_near_ones_named() -> None:
    with pytest.raises(ValueError, match="no model 'resnet19'; there are .*resnet18"):
        build("torchvision:resnet19", 10, None, seeded(0))


@pytest.mark.parametrize("package", ["torchvision", "timm"])
def test_a_package_that_is_absent_is_named(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (package, f"{package}.models"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ModuleNotFoundError, match=f"pip install {package}$"):
        build(f"{package}:resnet18", 10, None, seeded(0))


def test_models_of_timm_take_the_generators_weights() -> None:
    pytest.importorskip("timm", reason="timm is not installed: its models are not tested")
    one, again = (build("timm:resnet18", 10, "elu", seeded(0)) for _ in range(2))
    assert torch.equal(one.conv1.weight, again.conv1.weight)
    assert isinstance(one.act1, nn.ELU)


@pytest.mark.parametrize("training", [True, False])
def test_ensembles_of_these_networks_compute_what_each_would_alone(training: bool) -> None:
    makers = [Maker(seeded(i), name) for i, name in enumerate(("relu", "elu"))]
    alone = [all_convolutional(PLAN, 3, make, (0.0, 0.0)).train(training) for make in makers]
    x = torch.randn(2, 5, 3, 8, 8)
    together = Ensemble(alone).train(training)(x)
    assert_close(together, torch.stack([m(x[i]) for i, m in enumerate(alone)]))


def test_a_monitor_measures_every_layer_of_the_eleven_layers_in_a_training_step() -> None:
    network = cifar11(10, seeded(0))
    monitor = unitfisher.Monitor(network, units=4, rows=64, every=1)
    F.cross_entropy(network(torch.randn(4, 3, 32, 32)), torch.arange(4)).backward()
    layers = ["stack1.conv1", "stack2.conv1", "stack2.conv2", "stack3.conv1", "stack3.conv2"]
    layers += ["stack4.conv1", "stack4.conv2", "stack5.conv1", "stack5.conv2", "stack6.conv1"]
    assert list(monitor.latest) == [*layers, "output"]
    assert all((of.s.isfinite() | of.dead).all() for of in monitor.latest.values())
    assert {monitor.latest[layer].nonlinearity for layer in layers} == {"elu"}


def test_a_monitor_measures_dsn_in_both_modes() -> None:
    network = build("dsn", 3, "elu", seeded(0))
    monitor = unitfisher.Monitor(network, "trunk.*", units=2, rows=16, every=1)
    x = torch.randn(2, 3, 32, 32)
    network(x)
    trained = set(monitor.latest)
    assert trained == set(monitor.measure(x))
    assert len(trained) == 9


@pytest.mark.parametrize(
    "option",
    ["norm", "padding", "weight_variance", "initial", "stride", "pyramid", "dropout"],
)
def test_presets_and_builders_agree_on_who_takes_an_option(option: str) -> None:
    builders = {"mlp": mlp, **NETWORKS}
    takers = {name for name, builder in builders.items() if option in signature(builder).parameters}
    assert set(TAKERS[option].names) == takers


@pytest.mark.parametrize(
    ("name", "change", "told"),
    [
        ("mnist", {"padding": "same"}, r"mlp does not take padding='same', .*: give padding=None"),
        ("mnist", {"preprocessing": "zca"}, r"mnist does not take preprocessing='zca'"),
        ("mnist", {"network": "cifar11", "hidden": ()}, r"takes cifar-10, .*, not dataset='mnist'"),
        ("mnist", {"activations": ("own",)}, "mlp has no activation of its own"),
        ("mnist", {"crop": 32}, r"mnist does not take crop=32, which is for photographs"),
        ("cifar10-11", {"hidden": (8,)}, r"cifar11 does not take hidden=\(8,\)"),
        ("cifar10-11", {"network": "cifar12"}, r"no network 'cifar12'; there are mlp, cifar11"),
        ("cifar10-11", {"network": "nin"}, r"nin does not take weight_variance=1.0"),
        ("cifar10-11", {"network": "maxout"}, r"weight_variance=.*; .*activations=\('own',\)"),
        ("cifar10-11", {"network": "torchvision:vgg11", "norm": "batch"}, "not take norm='batch'"),
        ("cifar10-11", {"task": "reconstruction"}, "'cifar11' has no decoder"),
        (
            "cifar10-18",
            {"network": "cifar11"},
            r"'cifar11' has 6 stacks, not the 7 of phases.0.dropo",
        ),
        (
            "cifar10-18",
            {"network": "imagenet15"},
            r"'imagenet15' has 4 stacks, not the 7 of phases.0",
        ),
        (
            "cifar10-18",
            {"network": "dsn", "weight_variance": None},
            r"'dsn' has no stacks .*: give phases.0.dropout=\(\) .* phases.3.dropout=\(\)$",
        ),
        (
            "cifar10-11",
            {"phases": (Phase(0), Phase(5, 1.0, (0.1,)))},
            r"not the 1 of phases.1.dropout=\(0.1,\): .*, or .* with phases.1.dropout=\(\)$",
        ),
        ("mnist", {"phases": (Phase(0), Phase(5, 1.0, (0.1,)))}, r"give phases.1.dropout=\(\)$"),
        ("imagenet-15", {"augmented": True}, "photographs does not take augmented=True"),
        ("cifar10-11", {"stride": 2}, "cifar11 does not take stride=2, which is for imagenet15"),
        (
            "mnist",
            {"pyramid": (2, 1)},
            r"mlp does not take pyramid=\(2, 1\), .*: give pyramid=None",
        ),
        (
            "cifar10-11",
            {"dropout": 0.0},
            "cifar11 does not take dropout=0.0, .*: give dropout=None",
        ),
        (
            "cifar10-11",
            {"validation": 9},
            "cifar-10 does not take validation=9, which is for digits",
        ),
        ("imagenet-15", {"pyramid": ()}, "pyramid is empty"),
        ("imagenet-15", {"pyramid": (4, 0)}, r"pyramid=\(4, 0\), but must be 1 or more"),
        ("imagenet-15", {"stride": 0}, "stride=0, but must be 1 or more"),
        ("imagenet-15", {"dropout": 1.0}, "dropout=1.0, but must be 0 or more and below 1"),
        ("mnist", {"validation": 0}, "validation=0, but must be 1 or more"),
        ("imagenet-15", {"crop": 300}, "crop=300 is more than side=256"),
        ("imagenet-15", {"network": "dsn", "weight_variance": None}, "32 pixels: give crop=32"),
    ],
    ids=str,
)
def test_presets_refuse_what_their_network_or_data_do_not_take(
    name: str, change: dict[str, object], told: str
) -> None:
    with pytest.raises(ValueError, match=told):
        replace(PRESETS[name], **change)


@pytest.mark.parametrize("name", [*NETWORKS, "mlp"])
def test_presets_and_networks_agree_on_the_number_of_stacks(name: str) -> None:
    sizes = (4, 3, 2)
    with torch.device("meta"):
        built = mlp(sizes, "elu", seeded(0)) if name == "mlp" else build(name, 9, None, seeded(0))
    network = built if isinstance(built, nn.Sequential) else nn.Sequential(built)
    told = f"99 dropout rates for {len(STACKS.get(name, ()))} stacks"
    with pytest.raises(ValueError, match=told):
        set_dropout(network, (0.25,) * 99)
