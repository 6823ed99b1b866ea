"""docs/hardening.md says what the tests say."""

import importlib.util
from pathlib import Path

TESTS = Path(__file__).parents[1]
PAGE = TESTS.parent / "docs" / "hardening.md"

spec = importlib.util.spec_from_file_location("hardening_table", Path(__file__).with_name("table.py"))
table = importlib.util.module_from_spec(spec)
spec.loader.exec_module(table)


def test_the_page_has_the_rows_of_the_markers():
    written, marked = table.rows_in_page(PAGE.read_text(encoding="utf-8")), table.rows_in_sources(TESTS)
    assert written == marked, "run `make hardening`, which writes docs/hardening.md"


def test_the_page_begins_with_what_was_decided():
    assert PAGE.read_text(encoding="utf-8").startswith(table.INTRODUCTION)


def test_cells_cannot_break_the_table():
    for row in table.rows_in_sources(TESTS):
        assert all(cell and "|" not in cell and "\n" not in cell for cell in row), row


def test_a_row_counts_cases_and_outcomes_of_passed_tests_only():
    results = table.Results()
    row = ("files", "a", "named")

    def report(nodeid, when, outcome="passed", **counts):
        properties = [("hardening", list(row)), *([("hardening_counts", counts)] if counts else [])]
        return type("Report", (), {
            "nodeid": nodeid, "when": when, "outcome": outcome, "passed": outcome == "passed",
            "user_properties": properties,
        })  # fmt: skip

    for nodeid in "ab":
        results.pytest_runtest_logreport(report(nodeid, "call"))
        results.pytest_runtest_logreport(report(nodeid, "teardown", read=3, refused=4))
    results.pytest_runtest_logreport(report("c", "call", "failed"))
    results.pytest_runtest_logreport(report("c", "teardown"))
    assert results.troubles == ["c failed"]
    page = results.page()
    assert page.endswith("| files | a | 14: 6 read, 8 refused | named |\n")
    assert table.rows_in_page(page) == {row}
