"""Draw every figure again from the committed tables, in a minute; nothing is trained.

python paper_figs/all.py
"""

import importlib
from pathlib import Path

import style

SCRIPTS = ("activation_functions", "mnist", "activation_changes", "bias_shift")


def main() -> list[Path]:
    """Draw all; a figure whose tables are missing says how they are made."""
    drawn = []
    for name in SCRIPTS:
        try:
            drawn.append(style.save(importlib.import_module(name).draw, name))
            print(drawn[-1])
        except FileNotFoundError as error:
            print(f"{name}: {error}")
    return drawn


if __name__ == "__main__":
    main()
