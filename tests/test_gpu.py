"""The same numbers on a GPU as on the CPU; skipped aloud where there is none."""

import pytest
import torch
import torch.nn.functional as F
from strategies import all_sharings, seeded
from torch import nn
from torch.testing import assert_close

import unitfisher

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
TOL = {"rtol": 1e-3, "atol": 1e-6}  # float32 products in another order


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1, groups=2),
        nn.ELU(inplace=True),
        nn.Flatten(),
        nn.Linear(6 * 25, 20),
        nn.ReLU(),
        nn.Linear(20, 4),
    )


def batch():
    generator = seeded(1)
    x = torch.randn(32, 2, 5, 5, generator=generator)
    return x, torch.randint(4, (32,), generator=generator)


@all_sharings
def test_statistics_on_a_gpu_equal_those_on_the_cpu(sharing):
    x, y = batch()
    here = unitfisher.Monitor(network(), sharing=sharing).measure(x, targets=y)
    there = unitfisher.Monitor(network().cuda(), sharing=sharing).measure(x.cuda(), y.cuda())
    for layer, expected in here.items():
        found = there[layer]
        assert found.k.is_cuda
        for name in ("c", "mean_q", "s", "k", "n_eff", "damping_share", "cosine", "output_mean"):
            assert_close(getattr(found, name).cpu(), getattr(expected, name), **TOL)


def test_training_on_a_gpu_is_bit_identical_with_and_without_the_monitor(tmp_path):
    def trained(record):
        model = network().cuda()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        x, y = (t.cuda() for t in batch())
        if record is not None:
            unitfisher.Monitor(model, every=2, fisher="rademacher", record=record)
        for _ in range(6):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        return [p.detach().cpu() for p in model.parameters()], torch.cuda.get_rng_state()

    plain, watched = trained(None), trained(tmp_path / "run")
    assert all(map(torch.equal, plain[0], watched[0]))
    assert torch.equal(plain[1], watched[1])
