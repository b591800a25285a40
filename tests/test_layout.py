"""The README's list of files is the order in which they use each other."""

import re
from pathlib import Path

import pytest

import unitfisher

PACKAGE = Path(unitfisher.__file__).parent
README = Path(__file__).parents[1] / "README.md"


def listed() -> list[str]:
    """The first column of the list, which ends where two spaces are."""
    block = README.read_text().partition("(a test reads this list)")[2].split("```")[1]
    column = [re.split(r"(?<=\S)  ", line.strip("\n"))[0] for line in block.splitlines()]
    return re.findall(r"\w+", " ".join(column))


def used_by(module: str) -> set[str]:
    """Modules of the package that a file imports, at its top or later."""
    source = (PACKAGE / f"{module}.py").read_text()
    direct = re.findall(r"from unitfisher\.(\w+)[.\w]* import", source)
    beside = re.findall(r"^from unitfisher import (.+)$", source, re.MULTILINE)
    return {*direct, *(name for names in beside for name in re.findall(r"\w+", names))}


def test_every_file_is_listed_once():
    files = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}
    assert sorted(listed()) == sorted([*files, "experiments"])


@pytest.mark.parametrize("module", [name for name in listed() if name != "experiments"])
def test_a_file_uses_only_those_above_it(module):
    above = listed()[: listed().index(module)]
    assert used_by(module) <= set(above)
