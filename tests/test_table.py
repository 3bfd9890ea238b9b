"""effc.table: rows are found by operator and domain; what a table lacks is said with the file to extend."""

import onnx_ir as ir
import pytest

from effc.table import OpTable


def node(op_type: str, domain: str = "", name: str = "n") -> ir.Node:
    made = ir.node(op_type, [], domain=domain)
    made.name = name
    return made


@pytest.fixture
def table() -> OpTable:
    sizes = OpTable("sizes")

    @sizes.rule("Conv", "Gemm")
    def dense(n):
        return "dense"

    @sizes.rule("Conv", domain="com.example")
    def foreign(n):
        return "foreign"

    return sizes


@pytest.mark.parametrize(
    ("op_type", "domain", "found"),
    [
        ("Conv", "", "dense"),
        ("Conv", "ai.onnx", "dense"),
        ("Gemm", "", "dense"),
        ("Conv", "com.example", "foreign"),
        ("Gemm", "com.example", None),
        ("Relu", "", None),
    ],
)
def test_a_row_is_found_by_operator_and_domain(table, op_type, domain, found):
    rule = table.find(node(op_type, domain))
    assert (rule and rule(None)) == found


def test_a_later_row_takes_the_place_of_an_earlier(table):
    table.rule("Conv")(lambda n: "newer")
    assert table.find(node("Conv"))(None) == "newer"
    assert table.find(node("Gemm"))(None) == "dense"


def test_what_is_missing_names_operator_node_and_file(table):
    assert table.missing(node("Relu", name="relu1")) == (
        "sizes of Relu (relu1) are unknown; a rule for it belongs into test_table.py"
    )
    assert "sizes of com.example.Gemm (n) are unknown" in table.missing(node("Gemm", "com.example"))
