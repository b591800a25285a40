"""Passes of a model inside its own training pass."""

import pytest
import torch
from networks import a_step, mlp, normal
from torch import Tensor, nn
from torch.testing import assert_close

from unitfisher import Monitor


class Distilling(nn.Module):
    """In training its own answers, in eval mode, are targets."""

    def __init__(self, *, graph: bool) -> None:
        super().__init__()
        self.net, self.graph, self.answers = mlp(), graph, None

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.eval()
            with torch.set_grad_enabled(self.graph):
                self.answers = self(x + 1)
            self.train()
        return self.net(x)


@pytest.mark.parametrize("graph", [False, True])
def test_a_pass_in_eval_mode_inside_a_training_pass_is_no_part_of_it(graph):
    x, model = normal(9, 4), Distilling(graph=graph)
    plain = mlp()
    plain.load_state_dict(model.net.state_dict())
    with Monitor(model, every=1) as monitor, Monitor(plain, every=1) as expected:
        for _ in range(3):
            a_step(model, x)
            a_step(plain, x)
        assert monitor.step == 3
        for name, one in expected.latest.items():
            assert_close(monitor.latest[f"net.{name}"].k, one.k)
            assert_close(monitor.latest[f"net.{name}"].output_mean, one.output_mean)


def test_measuring_in_a_forward_hook_leaves_the_training_pass_its_measurement():
    model, x, probe = mlp(), normal(9, 4), normal(5, 4)
    with Monitor(model, every=1) as monitor:
        busy = []

        def measure(*_):
            if not busy:
                busy.append(True)
                monitor.measure(probe)
                busy.clear()

        model.register_forward_hook(measure)
        for _ in range(2):
            a_step(model, x)
        rows = monitor.to_pandas()
    assert rows.groupby("phase")["step"].nunique().to_dict() == {"measure": 2, "train": 2}


def test_a_pass_after_an_interrupted_one_is_not_inside_it(monkeypatch):
    model, x = mlp(), normal(9, 4)
    with Monitor(model, every=1) as monitor:
        with monkeypatch.context() as patch:
            patch.setattr(nn.ELU, "forward", interrupted)
            with pytest.raises(KeyboardInterrupt):
                model(x)
        model.eval()(x)
        assert not any(layer._forward_hooks for layer in monitor.layers.values())
        a_step(model.train(), x)
        assert len(monitor.latest) == len(monitor.layers)


def interrupted(*_: object) -> None:
    raise KeyboardInterrupt
