"""What benchmarks with marks share: where networks and data lie, parts by name, and which marks were missed."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path


class Marks:
    """A benchmark: a method for each part, which says what it holds its figures against."""

    def __init__(self) -> None:
        self.missed: list[str] = []

    def at_least(self, what: str, found: float, least: float) -> None:
        if not found >= least:
            self.missed.append(f"{what}: {found:.4g}, at least {least:g} wanted")

    def at_most(self, what: str, found: float, most: float) -> None:
        if not found <= most:
            self.missed.append(f"{what}: {found:.4g}, at most {most:g} wanted")

    def run(self, parts: Sequence[str]) -> int:
        """Run parts and list the marks that were missed; the exit status."""
        for part in parts:
            getattr(self, part)()
        print(f"\n{len(self.missed)} marks missed")
        print("".join(f"- {line}\n" for line in self.missed), end="")
        return int(bool(self.missed))


class Parser(argparse.ArgumentParser):
    """Arguments of a benchmark: any of its parts, or all."""

    def __init__(self, description: str | None, parts: Sequence[str]) -> None:
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
        self._all = parts
        self.add_argument("parts", nargs="*", choices=["all", *parts], default="all", help="any of them")

    def parts(self, options: argparse.Namespace) -> Sequence[str]:
        return self._all if "all" in options.parts else options.parts


def model_file(network: str, data: str = "cifar10") -> Path:
    return Path(os.environ["EFFC_DATA"], "models", f"{network}-{data}.onnx")


def data_file(name: str) -> str:
    return str(Path(os.environ["EFFC_DATA"], "data", f"{name}.yaml"))
