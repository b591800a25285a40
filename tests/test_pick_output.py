"""What a model returns, and where in it the logits are."""

from collections import namedtuple
from dataclasses import dataclass, make_dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from unitfisher import OutputError
from unitfisher.forward import pick_output

Z, OTHER = torch.arange(6.0).reshape(2, 3), torch.zeros(())


@dataclass
class Prediction:
    features: Tensor
    logits: Tensor


@dataclass(slots=True)
class Slotted:
    features: Tensor
    logits: Tensor


Named = namedtuple("Named", ["features", "logits"])
Values = make_dataclass("Values", ["values", "extra"])
FOUND = {
    "alone": (Z, None),
    "tuple-index": ((OTHER, Z), 1),
    "tuple-from-the-end": ((OTHER, None, Z), -1),
    "list-from-the-end": ([OTHER, Z], -1),
    "list-callable": ([OTHER, Z], lambda answer: answer[1]),
    "only-tensor-of-a-tuple": ((Z, None, "text"), None),
    "only-tensor-of-a-dict": ({"z": Z, "cache": None}, None),
    "dict-key": ({"loss": OTHER, "out": Z}, "out"),
    "dict-key-that-dicts-have-as-method": ({"keys": OTHER, "values": Z}, "values"),
    "dict-whole-number-key": ({0: OTHER, 7: Z}, 7),
    "dict-logits": ({"loss": OTHER, "logits": Z}, None),
    "dataclass-attribute": (Values(Z, OTHER), "values"),
    "dataclass-logits": (Prediction(OTHER, Z), None),
    "dataclass-with-slots-logits": (Slotted(OTHER, Z), None),
    "namedtuple-attribute": (Named(OTHER, Z), "logits"),
    "namedtuple-logits": (Named(OTHER, Z), None),
    "object-attribute": (SimpleNamespace(z=Z), "z"),
    "object-logits": (SimpleNamespace(features=OTHER, logits=Z), None),
    "callable-on-a-tensor": (Z.T, lambda answer: answer.T),
}


@pytest.mark.parametrize(("result", "pick"), FOUND.values(), ids=FOUND)
def test_logits_are_found(result, pick):
    assert pick_output(result, pick).equal(Z)


MISSING = {
    "two-tensors": ((Z, Z), None, "returns a tuple with 0, 1: say which"),
    "dict-of-two": ({"a": Z, "b": Z}, None, "returns a dict with 'a', 'b': say which"),
    "no-tensor": ("nothing", None, "say which"),
    "nothing": (None, None, "returns a NoneType without entries"),
    "absent-index": ((Z,), 3, "output=3 is not in the tuple.*with 0"),
    "absent-key": ({"a": Z}, "b", "output='b' is not in the dict.*with 'a'"),
    "absent-attribute": (Prediction(Z, Z), "loss", "'loss' is not in the Prediction"),
    "index-into-a-dataclass": (Prediction(Z, Z), 0, "output=0 is not in the Prediction"),
    "no-tensor-at-that-key": ({"a": "text"}, "a", "gave str, not a tensor"),
    "callable-gives-no-tensor": (Z, lambda answer: answer.tolist(), "gave list, not a tensor"),
}


@pytest.mark.parametrize(("result", "pick", "message"), MISSING.values(), ids=MISSING)
def test_what_holds_no_logits_is_refused_with_what_it_holds(result, pick, message):
    with pytest.raises(OutputError, match=message):
        pick_output(result, pick)
