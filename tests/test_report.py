"""effc.report: the console and the page say what the history holds, and markup in names stays text."""

import io
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from rich.console import Console

from effc.cost import Cost
from effc.history import UNDONE, Accuracy, NodeRecord, Snapshot
from effc.report import report, totals, write_html
from tests.test_history import history


def text(whole) -> str:
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(report(whole))
    return console.export_text()


def row(shown: str, start: str) -> str:
    return next(line for line in shown.splitlines() if start in line)


def test_each_pass_has_a_row():
    shown = text(history())
    line = row(shown, "low-rank{macs=0.5}")
    assert "kept" in line and "1 of 2" in line
    assert re.search(r"0\.60x ±0\.05\W+0\.50x \[0\.45, 0\.55\]", line) and "top1 90.00 (-1.50)" in line
    line = row(shown, "simplify ")
    assert "undone" in line and "0 of 0" in line


def test_the_whole_is_set_beside_the_original():
    shown = text(history())
    assert re.search(r"latency, ms\W+2\.000\W+1\.000\W+0\.50 \[0\.45, 0\.55\]", shown)
    assert re.search(r"predicted latency, ms\W+1\.500\W+0\.900\W+0\.60 ±0\.05", shown)
    assert re.search(r"predicted energy, mJ\W+1\.5\W+0\.5\W+0\.33", shown)
    assert re.search(r"file, bytes\W+100\W+80\W+0\.80", shown)
    assert re.search(r"parameters\W+5\W+4", shown)
    assert re.search(r"MACs\W+10\W+5\W+0\.50", shown)
    assert re.search(r"batch 1, 2 threads", shown)


def test_everything_that_is_worth_telling_is_told():
    shown = text(history())
    for line in (
        "simplify: undone, it drifts",
        "low-rank left alone c: nothing to gain",
        "runtime: fused 1 QGemm",
        "runtime: c fell back: no kernel",
        "unproven: nothing is known",
        "note: a note",
        "not met: too slow",
    ):
        assert line in shown, line
    assert "nothing was kept" not in shown


def test_that_nothing_was_kept_is_told():
    whole = history()
    whole.stages[0].passes[0].status = UNDONE
    assert "nothing was kept: the result is the original" in text(whole)


def test_nodes_of_one_reason_are_told_together_and_not_all():
    whole = history()
    whole.stages[0].passes[0].ledger = [NodeRecord(f"n{i}", "Conv", "skipped", reason="too small") for i in range(9)]
    assert "low-rank left alone n0, n1, n2, n3, n4, n5 and 3 more: too small" in text(whole)


def test_what_is_foretold_not_to_pay_is_told_together_with_the_figures_of_each():
    whole = history()
    whole.stages[0].passes[0].ledger = [
        NodeRecord(f"n{i}", "Conv", "skipped", reason=f"predicted not to pay: {i}.5 us before, 9.0 us after")
        for i in range(2)
    ]
    said = (
        "low-rank left alone n0 (0.5 us before, 9.0 us after), n1 (1.5 us before, 9.0 us after): predicted not to pay"
    )
    assert said in text(whole)


def test_a_prediction_by_the_roofline_says_so():
    roof = replace(history().predicted, basis="roofline")
    whole = history(predicted=roof)
    whole.stages[0].predicted = roof
    shown = text(whole)
    assert "0.60x (roofline)" in row(shown, "low-rank{macs=0.5}")
    assert "0.60 (roofline)" in row(shown, "predicted latency, ms")
    whole.stages[0].predicted = whole.stages[0].latency = None
    assert re.search(r"-\W+-\W+top1", row(text(whole), "low-rank{macs=0.5}"))


def test_nothing_to_do_is_not_told_node_by_node():
    whole = history()
    whole.stages[0].passes[0].ledger = [NodeRecord("n", "Conv", "skipped", reason="nothing for low-rank to do")]
    assert "left alone" not in text(whole)


@pytest.mark.parametrize("odd", ["[red]x[/red]", "a[/]b", "[link=x]y"])
def test_markup_in_names_and_reasons_is_text(odd):
    whole = history(model=odd, notes=[f"note {odd} end"], unmet=[odd], fell_back={odd: odd}, fused={odd: 1})
    whole.stages[0].passes[0].recipe = f"int8{{keep_float={odd}}}"
    whole.stages[0].passes[0].ledger = [NodeRecord(odd, "Conv", "skipped", reason=f"because {odd} is so")]
    shown = text(whole)
    assert f"{odd} for cpu" in shown
    assert f"int8{{keep_float={odd}}}" in shown
    assert f"note {odd} end" in shown
    assert f"because {odd} is so" in shown
    assert f"{odd} fell back: {odd}" in shown


def test_accuracy_rows_tell_what_is_known():
    before = Snapshot(Cost(10, 5, 20), 100, 3, Accuracy("top1", 91.5, 100, 0.0, 1.0, 0.0))
    after = Snapshot(Cost(0, 4, 16), 80, 2, Accuracy("top1", 90.0, 100, 1.5, 0.97, 0.0123))
    rows = {row[0]: row[1:] for row in totals(before, after, None)}
    assert rows["top1 on 100"] == ("91.50", "90.00", "-1.50")
    assert rows["agreement, %"] == ("100.00", "97.00", "")
    assert rows["divergence, nats"] == ("0", "0.012", "")
    assert "latency, ms" not in rows
    assert rows["MACs"] == ("10", "0", "0.00")
    unknown = Snapshot(Cost(), 0, 0, Accuracy("sqnr", None, 9, None, None, None))
    found = Snapshot(Cost(), 0, 0, Accuracy("sqnr", 41.0, 9, None, None, 0.1))
    assert ("sqnr on 9", "-", "41.00", "") in totals(unknown, found, None)
    bare = {row[0]: row[1:] for row in totals(Snapshot(Cost(), 0, 0), Snapshot(Cost(5), 0, 0), None)}
    assert bare["MACs"] == ("0", "5", "") and set(bare) == {"file, bytes", "parameters", "MACs", "nodes"}


class References(HTMLParser):
    found = False

    def handle_starttag(self, tag, attrs):
        self.found |= tag in ("script", "link", "img", "iframe") or any(key in ("src", "href") for key, _ in attrs)


def test_the_page_needs_nothing_else(tmp_path):
    write_html(history(notes=["<script>alert(1)</script> & more"]), tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    parser = References()
    parser.feed(page)
    assert not parser.found
    assert page.lstrip().lower().startswith("<!doctype html>")
    for words in (
        "low-rank{macs=0.5}",
        "undone",
        "0.60x ±0.05",
        "predicted energy, mJ",
        "&lt;script&gt;alert(1)&lt;/script&gt; &amp; more",
    ):
        assert words in page
