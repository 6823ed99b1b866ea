import logging
import os
import signal
import sys
import time
import warnings
from contextlib import contextmanager
from types import SimpleNamespace

import joblib
import pytest

from medrobust_lib.experiments import map_items, progress

# The workers cannot import this module, so what they run is defined inside the tests and travels by value.


@pytest.fixture(scope="module")
def cluster():
    distributed = pytest.importorskip("distributed")
    import dask

    # One failure is enough to give an item up: the tests need not kill four workers to see it.
    settings = {"distributed.scheduler.allowed-failures": 1, "distributed.deploy.lost-worker-timeout": "10 minutes"}
    with (
        dask.config.set(settings),
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None, silence_logs=logging.CRITICAL
        ) as local,
    ):
        yield local


@contextmanager
def active_client(cluster):
    from distributed import Client

    with Client(cluster) as client:
        yield client


@pytest.fixture(params=["loky", "dask"])
def two_workers(request):
    """Arguments of `map_items` for two worker processes on either engine."""
    if request.param == "loky":
        yield {"jobs": 2}
    else:
        with active_client(request.getfixturevalue("cluster")):
            yield {"backend": "dask"}


def test_one_job_runs_here_in_order_and_packs_nothing():
    context = object()
    results = list(map_items(lambda given, item: (os.getpid(), given is context, item), "abc", context=context))
    assert results == [(position, (os.getpid(), True, letter)) for position, letter in enumerate("abc")]


def test_one_job_is_lazy_so_that_an_interrupted_run_has_done_no_more_than_it_gave():
    seen = []
    results = map_items(lambda _, item: seen.append(item), range(5))
    next(results)
    assert seen == [0]


def test_results_do_not_depend_on_the_engine(two_workers):
    def square(offset, item):
        return offset + item * item

    expected = list(map_items(square, range(20), context=7))
    assert sorted(map_items(square, range(20), context=7, **two_workers)) == expected
    assert list(map_items(square, [], context=7, **two_workers)) == []
    assert list(map_items(square, [3], context=7, **two_workers)) == [(0, 16)]


def test_the_context_is_unpacked_once_per_worker_however_many_items_and_calls(two_workers, tmp_path):
    class Model:
        def __init__(self, folder):
            self.folder = folder

        def __setstate__(self, state):
            import uuid

            self.__dict__ = state
            (state["folder"] / f"{os.getpid()}-{uuid.uuid4().hex}").touch()

    def work(model, item):
        time.sleep(0.02)
        return os.getpid()

    arguments = {"context": Model(tmp_path), **two_workers}
    workers = {process for _ in range(2) for _, process in map_items(work, range(16), **arguments)}
    assert os.getpid() not in workers
    assert sorted(int(path.name.split("-")[0]) for path in tmp_path.iterdir()) == sorted(workers)


def test_workers_share_the_cores_and_not_each_all_of_them():
    def threads(_, item):
        import torch

        return torch.get_num_threads()

    assert list(map_items(threads, [None], jobs=2)) == [(0, max(1, joblib.cpu_count() // 2))]


@pytest.mark.hardening(
    area="interruption", tried="a worker process that is killed, on loky and dask",
    outcome="its items are done again, nothing is lost",
)  # fmt: skip
def test_a_killed_worker_loses_nothing(two_workers, tmp_path, caplog):
    def work(folder, item):
        marker = folder / "killed"
        if item == 3 and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.01)
        return item * item

    results = list(map_items(work, range(12), context=tmp_path, **two_workers))
    assert (tmp_path / "killed").exists()
    assert sorted(results) == [(item, item * item) for item in range(12)]
    if "jobs" in two_workers:  # dask repeats by itself
        assert "a worker process was killed; submitting the" in caplog.text


def test_dask_workers_killed_from_outside_lose_nothing_even_all_at_once(cluster, tmp_path):
    def work(folder, item):
        (folder / f"{item}-{os.getpid()}").touch()
        time.sleep(0.1)
        return item, os.getpid()

    with active_client(cluster):
        results = map_items(work, range(10), context=tmp_path, backend="dask")
        first = next(results)
        killed = {worker.pid for worker in cluster.workers.values()}
        for process in killed:
            os.kill(process, signal.SIGKILL)
        results = [first, *results]
    assert sorted((position, item) for position, (item, _) in results) == [(item, item) for item in range(10)]
    assert {process for _, (_, process) in results} - killed, "new workers went on"


def test_a_dask_cluster_that_is_started_anew_loses_nothing(cluster):
    def work(factor, item):
        time.sleep(0.1)
        return factor * item

    with active_client(cluster) as client:
        results = map_items(work, range(6), context=3, backend="dask")
        first = next(results)
        client.restart()
        assert sorted([first, *results]) == [(item, 3 * item) for item in range(6)]


def test_an_item_that_kills_every_worker_is_named_after_all_others_are_done(two_workers):
    def work(_, item):
        if item == "bad":
            os.kill(os.getpid(), signal.SIGKILL)
        return item

    results = {}
    items = ["a", "bad", *"cdefgh"]
    message = r"killed again and again, the last one when it was alone with item 1 \('bad'\)"
    with pytest.raises(RuntimeError, match=message) as caught:
        for position, result in map_items(work, items, retries=2, **two_workers):
            results[position] = result
    assert results == {position: item for position, item in enumerate(items) if item != "bad"}
    assert "1 of 8 items are left, all other results were returned" in str(caught.value)
    assert "use fewer jobs or a smaller batch size" in str(caught.value)
    assert type(caught.value.__cause__).__name__ in {"TerminatedWorkerError", "KilledWorker"}


def test_an_exception_in_this_process_keeps_its_type_and_names_the_item():
    def work(_, item):
        raise KeyError("sigma")

    with pytest.raises(KeyError, match="sigma") as caught:
        list(map_items(work, ["x" * 1000]))
    (note,) = caught.value.__notes__
    assert note.startswith("This happened at item 0 ('xxx")
    assert len(note) < 150


def test_an_exception_in_a_worker_keeps_its_type_names_the_item_and_leaves_the_workers_in_service(two_workers):
    def work(_, item):
        if item == 2:
            raise KeyError("sigma")
        return item

    with pytest.raises(KeyError, match="sigma") as caught:
        list(map_items(work, range(4), **two_workers))
    assert "This happened at item 2 (2)." in caught.value.__notes__
    assert sorted(map_items(work, [0, 1], **two_workers)) == [(0, 0), (1, 1)]


def test_stopping_early_cancels_the_rest(two_workers, tmp_path):
    def work(folder, item):
        (folder / str(item)).touch()
        time.sleep(0.2)
        return item

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ZeroDivisionError):
            for _ in map_items(work, range(30), context=tmp_path, **two_workers):
                raise ZeroDivisionError
    assert sorted(map_items(work, [1, 2], context=tmp_path, **two_workers)) == [(0, 1), (1, 2)]
    started = len(list(tmp_path.iterdir()))
    time.sleep(0.5)
    assert started == len(list(tmp_path.iterdir())) < 20


def test_wrong_arguments_are_refused_before_anything_runs():
    with pytest.raises(ValueError, match="unknown backend 'ray'; choose one of loky, dask"):
        map_items(print, [1], backend="ray")
    for jobs in (0, -2):
        with pytest.raises(ValueError, match=f"jobs={jobs}; give the number of worker processes, or -1"):
            map_items(print, [1], jobs=jobs)


def test_all_cores_are_taken_on_request(monkeypatch):
    monkeypatch.setattr(joblib, "cpu_count", lambda: 1)
    assert list(map_items(lambda _, item: os.getpid(), [1], jobs=-1)) == [(0, os.getpid())]


def test_dask_without_a_client_or_without_the_extra_says_what_to_do(monkeypatch):
    pytest.importorskip("distributed")
    with pytest.raises(ValueError, match=r"no active client; .*client = Client\(n_workers=4, threads_per_worker=1\)"):
        map_items(print, [1], backend="dask")
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(ImportError, match=r"install the cluster extra: .*\[cluster\]"):
        map_items(print, [1], backend="dask")


def count_images(iterable, **changes):
    return progress(iterable, **{"total": 5, "description": "certify phantom/blood", "unit": "images", **changes})


def test_headless_progress_is_one_line(capsys):
    assert list(count_images(range(5))) == list(range(5))
    assert list(count_images(range(3), done=2)) == list(range(3))
    out, err = capsys.readouterr()
    assert out == (
        "certify phantom/blood: 5 of 5 images in 0.0 s\ncertify phantom/blood: 5 of 5 images in 0.0 s (2 resumed)\n"
    )
    assert err == ""


@pytest.mark.parametrize(("resumes", "promise"), [(True, "; the same call goes on from here"), (False, "")])
def test_an_interrupt_says_what_is_done_and_whether_it_resumes(capsys, resumes, promise):
    def interrupted():
        yield from range(2)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(count_images(interrupted(), done=1, resumes=resumes))
    line = f"certify phantom/blood: interrupted at 3 of 5 images in 0.0 s (1 resumed){promise}\n"
    assert capsys.readouterr().out == line


def test_stopping_in_the_middle_closes_what_is_below_and_says_so(capsys):
    closed = []

    def below():
        try:
            yield from range(5)
        finally:
            closed.append(True)

    source = below()
    for _ in count_images(source):
        break
    assert closed == [True]
    assert capsys.readouterr().out.startswith("certify phantom/blood: stopped at 1 of 5 images")


@pytest.mark.parametrize("headless", ["MEDROBUST_HEADLESS", "TQDM_DISABLE", ""])
def test_a_person_in_a_notebook_sees_a_bar_and_a_runner_does_not(monkeypatch, capsys, headless):
    import tqdm.auto

    calls = []

    class Bar:
        def __init__(self, **arguments):
            calls.append(arguments)

        def update(self):
            calls.append("update")

        def close(self):
            calls.append("close")

    monkeypatch.setattr(tqdm.auto, "tqdm", Bar)
    shell = SimpleNamespace(config={"IPKernelApp": {}})
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    for variable in ("MEDROBUST_HEADLESS", "TQDM_DISABLE"):
        monkeypatch.delenv(variable, raising=False)
    if headless:
        monkeypatch.setenv(headless, "1")
    assert list(count_images(range(3), done=2)) == list(range(3))
    lines = capsys.readouterr().out.splitlines()
    first = {"total": 5, "initial": 2, "desc": "certify phantom/blood", "unit": " images", "disable": bool(headless)}
    assert (len(lines), calls) == (bool(headless), [first, "update", "update", "update", "close"])


def test_a_worker_that_holds_a_model_is_kept():
    def grow(_, item):
        import os
        import sys
        import time

        import numpy as np

        if item >= 2:  # joblib measures a worker for the first time after its first item
            sys.modules["kept_by_the_test"] = np.ones(50_000_000)  # 400 MB, as much as libraries and weights
        time.sleep(1.2)  # it measures no more than once a second
        return os.getpid()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        workers = {pid for _, pid in map_items(grow, range(7), jobs=2)}
    assert len(workers) == 2
