import errno
import json
import math
import multiprocessing
import os
import re
import signal
import time

import numpy as np
import pandas as pd
import pytest

from medrobust_lib.experiments import open_store

PARAMETERS = {"model": "demo-clip", "sigmas": [0.25, 0.5], "sampling": {"n": 1000, "alpha": 0.001}}
KEYS = [f"image {number}" for number in range(40)]

FORK = multiprocessing.get_context("fork") if hasattr(os, "fork") else None
needs_fork = pytest.mark.skipif(FORK is None, reason="kill -9 and fork are not of this system")


def write(folder, pause, opened):
    """Append forty items with a pause between them; the table must not depend on how often this was killed."""
    with open_store(folder, parameters={"seed": 0}) as store:
        opened.send(len(store.done))
        for number in [*range(1, 40, 2), *range(0, 40, 2)]:
            if KEYS[number] in store.done:
                continue
            rows = [{"image": number, "sigma": sigma, "radius": (number + sigma) / 7} for sigma in (0.25, 0.5)]
            store.append(KEYS[number], rows, seconds=time.perf_counter())
            time.sleep(pause)
        store.finish(KEYS)


def row(**values):
    return {"image": 3, "method": "zero-shot", "certified": True, "radius": 0.1 + 0.2, "note": None, **values}


@pytest.fixture
def store(tmp_path):
    with open_store(tmp_path / "store", parameters=PARAMETERS) as opened:
        yield opened


def start_writer(folder, pause):
    """A process that writes, and the number of items that it found done. A fork: libraries load only once."""
    ours, theirs = FORK.Pipe(duplex=False)
    writer = FORK.Process(target=write, args=(folder, pause, theirs))
    writer.start()
    return writer, ours.recv()


def kill(writer):
    writer.kill()
    writer.join()
    assert writer.exitcode == -signal.SIGKILL


@pytest.mark.hardening(
    area="interruption", tried="SIGKILL at random moments while a store is filled",
    outcome="resumed each time; the table is the same, byte for byte",
)  # fmt: skip
@needs_fork
def test_a_run_that_is_killed_again_and_again_leaves_the_same_bytes_as_an_undisturbed_one(tmp_path):
    rng = np.random.default_rng(20)
    resumed = []
    for _ in range(4):
        writer, done = start_writer(tmp_path / "killed", 0.03)
        resumed.append(done)
        time.sleep(rng.uniform(0.05, 0.25))
        kill(writer)
    assert not (tmp_path / "killed" / "table.csv").exists()
    for folder in ("killed", "whole"):
        writer, done = start_writer(tmp_path / folder, 0)
        writer.join()
        assert writer.exitcode == 0
        resumed += [done] if folder == "killed" else []
    assert resumed == sorted(set(resumed)), "every run went on where the one before was killed"
    assert resumed[0] == 0 < resumed[-1] < 40
    assert (tmp_path / "killed/table.csv").read_bytes() == (tmp_path / "whole/table.csv").read_bytes()
    assert len(pd.read_csv(tmp_path / "whole/table.csv")) == 80


@pytest.mark.hardening(
    area="interruption", tried="a journal whose last line is torn",
    outcome="the line is dropped and its item done again",
)  # fmt: skip
@pytest.mark.parametrize("kept", [0, 1, 20, -1])
def test_a_torn_last_line_is_dropped_and_its_item_done_again(tmp_path, kept):
    with open_store(tmp_path, parameters={}) as store:
        store.append("a", [row()], seconds=1.0)
        store.append("b", [row(image=4)], seconds=2.0)
        before = store.finish(["a", "b"]).read_bytes()
    journal = tmp_path / "journal.jsonl"
    first, second = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(first + second[:kept])
    with open_store(tmp_path, parameters={}) as store:
        assert store.done == {"a"}
        assert journal.read_bytes() == first
        store.append("b", [row(image=4)], seconds=3.0)
        assert store.finish(["a", "b"]).read_bytes() == before
    with open_store(tmp_path, parameters={}) as store:
        assert store.done == {"a", "b"}


@pytest.mark.parametrize(
    "bad", [b'{"key": "b", "ro\n', b"\n", b"[1, 2]\n", b'{"key": "a", "rows": [], "seconds": 1}\n']
)
def test_a_corrupt_line_that_no_kill_explains_is_an_error_that_names_file_and_line(tmp_path, bad):
    with open_store(tmp_path, parameters={}) as store:
        store.append("a", [row()], seconds=1.0)
    journal = tmp_path / "journal.jsonl"
    line = journal.read_bytes()
    journal.write_bytes(line + bad + line.replace(b'"a"', b'"c"'))
    with pytest.raises(ValueError, match=r"journal\.jsonl, line 2 is corrupt, b'.*\. Delete that line: its item is"):
        open_store(tmp_path, parameters={})
    journal.write_bytes(line)
    open_store(tmp_path, parameters={}).close()


@pytest.mark.hardening(
    area="stores", tried="a store opened with other parameters",
    outcome="refused, every difference named",
)  # fmt: skip
def test_other_parameters_are_refused_and_every_difference_is_named(store):
    store.close()
    asked = {"model": "plip", "sigmas": (0.25, 0.5), "sampling": {"n": 10_000, "alpha": 0.001}, "seed": 1}
    with pytest.raises(ValueError, match="belongs to other parameters") as caught:
        open_store(store.folder, parameters=asked)
    assert str(caught.value).splitlines()[1:-1] == [
        '  model: the store has "demo-clip", this run asks "plip"',
        "  sampling.n: the store has 1000, this run asks 10000",
        "  seed: the store has no such parameter, this run asks 1",
    ]
    assert "Use another folder" in str(caught.value)
    open_store(store.folder, parameters=PARAMETERS).close()


def test_the_manifest_holds_the_parameters_and_the_hash_of_their_canonical_json(store):
    manifest = json.loads((store.folder / "manifest.json").read_text())
    assert manifest["format"] == 1
    assert manifest["parameters"] == PARAMETERS
    assert re.fullmatch("[0-9a-f]{16}", manifest["hash"])
    shuffled = dict(reversed(PARAMETERS.items()))
    with open_store(store.folder.with_name("other"), parameters=shuffled) as other:
        assert json.loads((other.folder / "manifest.json").read_text())["hash"] == manifest["hash"]


def test_a_folder_whose_manifest_is_lost_broken_or_of_the_future_is_refused(store):
    store.append("a", [row()], seconds=1.0)
    store.close()
    manifest = store.folder / "manifest.json"
    manifest.write_text(json.dumps({"format": 2, "parameters": PARAMETERS}))
    with pytest.raises(ValueError, match="store format 2, this version reads 1"):
        open_store(store.folder, parameters=PARAMETERS)
    manifest.write_text("{")
    with pytest.raises(ValueError, match="is no manifest of a store"):
        open_store(store.folder, parameters=PARAMETERS)
    manifest.unlink()
    with pytest.raises(ValueError, match="is missing"):
        open_store(store.folder, parameters=PARAMETERS)


def test_a_parameter_that_is_no_json_value_is_named(tmp_path):
    with pytest.raises(TypeError, match="parameter images=array"):
        open_store(tmp_path, parameters={"n": 1, "images": np.zeros(2)})
    with pytest.raises(TypeError, match="parameter sigma=nan"):
        open_store(tmp_path, parameters={"sigma": math.nan})


@pytest.mark.hardening(
    area="two at once", tried="two runs into one store",
    outcome="the second is refused with a message, the first is unharmed; a kill frees the store",
)  # fmt: skip
@needs_fork
def test_two_writers_are_refused_until_the_first_has_ended_even_by_a_kill(tmp_path):
    writer, done = start_writer(tmp_path, 60)
    assert done == 0
    with pytest.raises(RuntimeError, match="in use by another process"):
        open_store(tmp_path, parameters={"seed": 0})
    kill(writer)
    with open_store(tmp_path, parameters={"seed": 0}) as store:
        assert len(store.done) <= 1
        with pytest.raises(RuntimeError, match="left open in this one"):
            open_store(tmp_path, parameters={"seed": 0})
    open_store(tmp_path, parameters={"seed": 0}).close()


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"radius": math.nan}, ValueError, "column 'radius' of item 'b' is nan"),
        ({"radius": -math.inf}, ValueError, "column 'radius' of item 'b' is -inf"),
        ({"image": np.int64(3)}, TypeError, r"column 'image' of item 'b' holds .*\(int64\)"),
        ({"note": [1]}, TypeError, r"column 'note' of item 'b' holds \[1\] \(list\)"),
        ({"extra": 1}, ValueError, "item 'b' has columns .*extra; the store's rows have image, method"),
    ],
)
def test_values_and_columns_that_a_table_cannot_keep_are_refused_and_leave_nothing(store, values, error, message):
    store.append("a", [row()], seconds=1.0)
    before = (store.folder / "journal.jsonl").read_bytes()
    with pytest.raises(error, match=message):
        store.append("b", [row(), row(**values)], seconds=1.0)
    assert store.done == {"a"}
    assert (store.folder / "journal.jsonl").read_bytes() == before


def test_times_stay_out_of_the_rows(store):
    with pytest.raises(ValueError, match="give them as seconds="):
        store.append("a", [{"seconds": 1.0}], seconds=1.0)
    with pytest.raises(ValueError, match="seconds=-1 of item 'a'"):
        store.append("a", [row()], seconds=-1)


def test_an_item_is_kept_once_and_a_closed_store_takes_none(store):
    store.append("a", [row()], seconds=1.0)
    with pytest.raises(ValueError, match="item 'a' is done already"):
        store.append("a", [row()], seconds=1.0)
    with pytest.raises(ValueError, match="has no name"):
        store.append("", [row()], seconds=1.0)
    store.close()
    with pytest.raises(ValueError, match="is closed"):
        store.append("b", [row()], seconds=1.0)


def test_the_table_follows_the_order_of_the_keys_and_shows_times_only_when_asked(store):
    store.append("late", [row(image=9), row(image=8)], seconds=2.5)
    store.append("nothing", [], seconds=0.5)
    store.append("early", [row(image=1)], seconds=1.5)
    table = store.table(["early", "nothing", "late"])
    assert table["image"].tolist() == [1, 9, 8]
    assert table.columns.tolist() == list(row())
    assert store.table(["late", "early"], with_seconds=True)["seconds"].tolist() == [2.5, 2.5, 1.5]
    assert "seconds" not in pd.read_csv(store.finish(["late"]))
    with pytest.raises(ValueError, match="2 of 3 items are not in .*: 'x', 'y'; run them first"):
        store.table(["early", "x", "y"])
    assert repr(store).endswith("3 items done)")


def test_rows_of_one_item_are_there_at_once_and_after_opening_again(store):
    rows = [row(image=9), row(image=8, note="twice")]
    assert "late" not in store
    with pytest.raises(KeyError, match="late"):
        store.rows("late")
    store.append("late", rows, seconds=2.5)
    store.append("nothing", [], seconds=0.5)
    rows[0]["image"] = 1
    store.close()
    with open_store(store.folder, parameters=PARAMETERS) as again:
        for opened in (store, again):
            assert "late" in opened
            assert "lat" not in opened
            assert opened.rows("late") == (row(image=9), row(image=8, note="twice"))
            assert opened.rows("nothing") == ()


def test_floats_come_back_exactly_from_journal_and_table(tmp_path):
    rng = np.random.default_rng(0)
    values = [*rng.standard_normal(200), *(10.0 ** rng.uniform(-300, 300, 200)), 5e-324, -0.0, 0.1 + 0.2]
    values = [float(value) for value in values]
    with open_store(tmp_path, parameters={}) as store:
        store.append("a", [{"value": value} for value in values], seconds=1 / 3)
    with open_store(tmp_path, parameters={}) as store:
        assert store.table(["a"])["value"].tolist() == values
        path = store.finish(["a"])
    assert [float(line) for line in path.read_text().splitlines()[1:]] == values


def test_a_full_disk_leaves_no_half_line(store, monkeypatch):
    store.append("a", [row()], seconds=1.0)
    before = (store.folder / "journal.jsonl").read_bytes()
    write = os.write
    room = [10, 10]

    def fills_up(descriptor, line):
        if not room:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, line[: room.pop()])

    monkeypatch.setattr(os, "write", fills_up)
    with pytest.raises(OSError, match="disk is full: the item was not added"):
        store.append("b", [row()], seconds=1.0)
    assert not room
    monkeypatch.undo()
    assert (store.folder / "journal.jsonl").read_bytes() == before
    store.append("b", [row()], seconds=1.0)
    assert store.done == {"a", "b"}


@pytest.mark.hardening(
    area="stores", tried="a store in a folder of other things",
    outcome="refused, nothing in it is replaced",
)  # fmt: skip
def test_a_folder_of_other_things_is_never_a_store(tmp_path):
    (tmp_path / "table.csv").write_text("my,own,results\n")
    with pytest.raises(ValueError, match=r"holds other files \(table.csv\) and no store; give"):
        open_store(tmp_path, parameters={})
    assert [path.name for path in tmp_path.iterdir()] == ["table.csv"]
    assert (tmp_path / "table.csv").read_text() == "my,own,results\n"
    with pytest.raises(ValueError, match=r"table.csv is a file; a store needs a folder"):
        open_store(tmp_path / "table.csv", parameters={})
