"""docs/hardening.md: its rows are the markers of the tests, its numbers those of the run that wrote it."""

import ast
from collections import Counter
from pathlib import Path

MARKER = "hardening"
INTRODUCTION = """# What was tried to break it

This page is written by the tests themselves: `make hardening` runs every test that carries the marker `hardening` and \
writes one row for each kind of attack, with the number of cases and what happened. The rows on damaged files come \
from fuzzing: small valid files in which bits are flipped and bytes cut off, put in, zeroed, repeated or replaced at \
random, reproducibly. Each damaged file was either read (damage to a pixel or to a digit is no error that a format can \
notice) or refused with a message that names the file; no other error, no endless reading, no memory taken on the word \
of a header, and nothing unpickled. More examples than here: `MEDROBUST_FUZZ_EXAMPLES=5000 python -m pytest \
tests/hardening`.

Some things were decided. A folder of images is its owner's: links inside it are followed, whether to files or to \
folders, because a selection made of links is a common way to build a set. A table is data: relative paths in it \
must stay inside its folder, also through links, and absolute paths are taken as written. Archives, manifests, \
recorded sums and the tables of downloads are other people's: whatever in them leads out of its folder, and every \
link or device in an archive, is refused, and nothing is unpacked. Two processes never write to one store or fetch \
one file; the second is told so and the first goes on. Raw HTML in a notebook is its author's and is shown as it is, \
but the pages of a report carry a policy under which no browser runs a script in them or loads anything from a \
network; everything else in them is escaped. What no check can notice is a changed digit in a store's journal or in a \
table without a checksum; the files of a corrupted benchmark and fetched weights have one. Work is packed with \
cloudpickle only for workers that the same process has started.
"""
COLUMNS = ("area", "what was tried", "cases", "what happened")


def rows_in_sources(tests: Path) -> set[tuple[str, str, str]]:
    """(area, tried, outcome) of every marker in the files of tests, without running or importing them."""
    rows = set()
    for path in sorted(tests.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == f"pytest.mark.{MARKER}":
                said = {word.arg: ast.literal_eval(word.value) for word in node.keywords}
                rows.add((said["area"], said["tried"], said["outcome"]))
    return rows


def rows_in_page(page: str) -> set[tuple[str, str, str]]:
    """The same three columns of the written page."""
    lines = [line for line in page.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]]
    return {(area, tried, outcome) for area, tried, _, outcome in cells}


class Results:
    """A pytest plugin: counts the cases of each row while tests finish."""

    def __init__(self):
        self.cases, self.counts, self.passed, self.troubles = Counter(), {}, set(), []

    def pytest_runtest_logreport(self, report):
        row = dict(report.user_properties).get(MARKER)
        if row is None:
            return
        row = tuple(row)
        if report.when == "call" and report.passed:
            self.passed.add(report.nodeid)
        elif not report.passed:
            self.troubles.append(f"{report.nodeid} {report.outcome}")
        # Fixtures have counted when the test is torn down.
        if report.when == "teardown" and report.nodeid in self.passed:
            found = Counter()
            for name, value in report.user_properties:
                if name == "hardening_counts":
                    found.update(value)
            self.cases[row] += found.total() or 1
            self.counts.setdefault(row, Counter()).update(found)

    def page(self) -> str:
        lines = [f"| {' | '.join(COLUMNS)} |", "|---|---|---|---|"]
        for row in sorted(self.cases):
            area, tried, outcome = row
            split = ", ".join(f"{count:,} {name}" for name, count in sorted(self.counts[row].items()))
            cases = f"{self.cases[row]:,}" + (f": {split}" if split else "")
            lines.append(f"| {area} | {tried} | {cases} | {outcome} |")
        return INTRODUCTION + "\n" + "\n".join(lines) + "\n"
