"""One table of operators per concern: what is known is a row; what is not comes back as unknown, not as an error."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

import onnx_ir as ir

from effc.model import STANDARD_DOMAINS

Rule = TypeVar("Rule", bound=Callable)


class OpTable(Generic[Rule]):
    """Rules by operator, for one concern.

    >>> macs = OpTable("MACs")
    >>> @macs.rule("Conv")
    ... def conv(node, shapes): ...
    """

    def __init__(self, concern: str) -> None:
        self.concern = concern
        self._rules: dict[tuple[str, str], Rule] = {}
        frame = inspect.stack()[1]
        self._file = Path(frame.filename).name

    def rule(self, *op_types: str, domain: str = "") -> Callable[[Rule], Rule]:
        """Decorator: this function is the rule for these operators."""

        def register(function: Rule) -> Rule:
            for op_type in op_types:
                self._rules[domain, op_type] = function
            return function

        return register

    def find(self, node: ir.Node) -> Rule | None:
        """The rule for a node's operator, or None."""
        domain = "" if node.domain in STANDARD_DOMAINS else node.domain
        return self._rules.get((domain, node.op_type))

    def missing(self, node: ir.Node) -> str:
        """One sentence on what this table lacks and where to add it."""
        operator = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
        return f"{self.concern} of {operator} ({node.name}) are unknown; a rule for it belongs into {self._file}"
