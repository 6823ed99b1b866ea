"""The same function over many items: in this process, on cores or on a cluster; and how far long work is."""

import hashlib
import logging
import math
import os
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from functools import partial
from reprlib import Repr
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args

import numpy as np

from medrobust_lib.checks import check_choice
from medrobust_lib.experiments.cards import is_headless

if TYPE_CHECKING:
    from distributed import Client

Backend = Literal["loky", "dask"]
Function = Callable[[Any, Any], Any]
Results = Generator[tuple[int, Any], None, None]
Round = Callable[[Sequence[tuple[int, Any]]], Results]  # of items with their positions
Element = TypeVar("Element")

_SECONDS_WITHOUT_WORKERS = 20.0
_LARGEST_GROWTH = 4 * 2**30  # bytes

_logger = logging.getLogger(__name__)


def map_items(
    function: Function,
    items: Iterable[Any],
    *,
    context: Any = None,
    jobs: int = 1,
    backend: Backend = "loky",
    retries: int = 3,
) -> Iterator[tuple[int, Any]]:
    """Call ``function(context, item)`` for every item and yield the results as they finish.

    Parameters
    ----------
    function : callable
        Must not change the context, which its worker keeps for the next items, and must give the same result when
        an item is done a second time.
    items : iterable
        Small things such as indices; what is large and shared belongs into the context.
    context
        Model, data, parameters: packed once here and unpacked once in each worker process.
    jobs : int
        Worker processes on this machine; -1 takes one per core. With one job everything runs in this
        process, in order and without packing. A cluster decides by itself.
    backend : {"loky", "dask"}
        ``"dask"`` runs on the active client of dask.distributed (the ``cluster`` extra); let its workers
        have one thread each.
    retries : int
        How many workers an item may lose while nothing else runs (on dask one round is enough, in which dask
        itself tries several workers).

    Yields
    ------
    position : int
        Of the item.
    result

    Raises
    ------
    ValueError
        Unknown backend, jobs neither -1 nor >= 1, or no active dask client.
    ImportError
        The ``cluster`` extra is missing.
    RuntimeError
        An item loses its worker again and again, for example for want of memory. What was lost with a killed
        worker is submitted again, after all other items and one by one, so the message names the right item.
    Exception
        Whatever `function` raises, with a note that names the item.
    """
    check_choice("backend", backend, get_args(Backend))
    if jobs != -1 and jobs < 1:
        raise ValueError(f"jobs={jobs}; give the number of worker processes, or -1 for one per core")
    items = tuple(items)
    if backend == "dask":
        run = _dask_rounds(function, context)
        # dask itself gives an item several workers before it gives it up, and a round goes on without those it loses.
        return _until_done(run, items, retries=min(retries, 1), in_flight=len(items))
    if jobs == -1:
        import joblib

        jobs = joblib.cpu_count()
    if jobs == 1:
        return ((position, _call(function, context, position, item)) for position, item in enumerate(items))
    run = partial(_loky_round, *_pack(function, context), jobs)
    # How many of the first missing items may have been with a worker that was killed.
    return _until_done(run, items, retries=retries, in_flight=2 * jobs)


def _pack(function: Function, context: Any) -> tuple[np.ndarray, str]:
    """Function and context as bytes, in an array because joblib memory-maps arrays, and their digest."""
    import cloudpickle

    # The function comes first: unpacking it imports its module before those of the model.
    content = np.frombuffer(cloudpickle.dumps((function, context)), dtype=np.uint8)
    return content, hashlib.sha256(content).hexdigest()


class _WorkerMemory:
    """What a worker process keeps from one item to the next: the last function and context, by their digest."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # a dask worker may have several threads
        self._unpacked: dict[str, tuple[Function, Any]] = {}

    def unpack(self, content: np.ndarray, digest: str) -> tuple[Function, Any]:
        with self._lock:
            if digest not in self._unpacked:
                import cloudpickle

                self._unpacked.clear()  # two models may not fit
                self._unpacked[digest] = cloudpickle.loads(content)
            return self._unpacked[digest]


_WORKER_MEMORY = _WorkerMemory()


def _work(numbered_item: tuple[int, Any], content: np.ndarray, digest: str, threads: int | None) -> tuple[int, Any]:
    """One item, in a worker process."""
    function, context = _WORKER_MEMORY.unpack(content, digest)
    if threads is not None:
        from joblib.externals.loky import process_executor

        # joblib takes a worker that has grown by 300 MB for leaking and starts another. Models and the libraries
        # behind them are larger, and importing those anew takes seconds.
        process_executor._MAX_MEMORY_LEAK_SIZE = _LARGEST_GROWTH
        if "torch" in sys.modules:
            sys.modules["torch"].set_num_threads(threads)
    position, item = numbered_item
    return position, _call(function, context, position, item)


def _call(function: Function, context: Any, position: int, item: Any) -> Any:
    try:
        return function(context, item)
    except Exception as error:
        error.add_note(f"This happened at {_named(position, item)}.")
        raise


def _named(position: int, item: Any) -> str:
    short = Repr()
    short.maxstring = short.maxother = 80
    return f"item {position} ({short.repr(item)})"


class _WorkerLostError(Exception):
    """A worker process was killed; its cause is the engine's own exception."""


def _loky_round(content: np.ndarray, digest: str, jobs: int, items: Sequence[tuple[int, Any]]) -> Results:
    """Yield results of processes of this machine, through joblib."""
    from joblib import Parallel, cpu_count, delayed, parallel_config
    from joblib.externals.loky.process_executor import TerminatedWorkerError

    threads = max(1, cpu_count() // jobs)
    # The threads are set twice: by the environment for libraries that are loaded later, and by `_work`.
    with parallel_config("loky", inner_max_num_threads=threads):
        # A killed single worker would be this process itself, hence two even if one item is left.
        workers = max(2, min(jobs, len(items)))
        parallel = Parallel(workers, return_as="generator_unordered", batch_size=1, pre_dispatch=2 * jobs)
        results = parallel(delayed(_work)(item, content, digest, threads) for item in items)
    try:
        for numbered_result in results:  # noqa: UP028 - `yield from` would close joblib's generator, loudly
            yield numbered_result
    except TerminatedWorkerError as error:
        raise _WorkerLostError from error
    finally:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # joblib's "tasks have been cancelled", which is wanted
            results.close()


def _dask_rounds(function: Function, context: Any) -> Round:
    """Bring function and context onto the cluster of the active client; the result does a round of items there.

    joblib's dask backend would do, but it waits for ever once dask gives an item up with KilledWorker.
    """
    try:
        from distributed import get_client
    except ImportError as error:
        raise ImportError(
            "backend='dask' needs dask.distributed; install the cluster extra: "
            "pip install -c constraints.txt -e '.[cluster]'"
        ) from error
    try:
        client = get_client()
    except ValueError as error:
        raise ValueError(
            "backend='dask' found no active client; make one first, for example: from dask.distributed import Client; "
            "client = Client(n_workers=4, threads_per_worker=1), or Client('tcp://scheduler:8786') for a cluster"
        ) from error
    return partial(_dask_round, client, *_pack(function, context))


def _dask_round(client: "Client", content: np.ndarray, digest: str, items: Sequence[tuple[int, Any]]) -> Results:
    import dask
    from distributed import CancelledError, KilledWorker, as_completed

    # A task, unlike scattered data, can be repeated when every worker that had its result is lost, and it makes a
    # cluster that grows by need grow. Each round has its own: a cluster that is started anew has lost the others.
    with dask.config.set({"distributed.admin.large-graph-warning-threshold": "1 TiB"}):
        there = client.submit(np.asarray, content, pure=False)
    futures = client.map(_work, items, content=there, digest=digest, threads=None, pure=False)
    lost = None
    try:
        finished = as_completed(futures, with_results=True, raise_errors=False)
        while not finished.is_empty():
            _wait_for_one(client, finished)
            future, numbered_result = next(finished)
            if future.status == "finished":
                future.release()
                yield numbered_result
                continue
            try:
                future.result()
            except (KilledWorker, CancelledError) as error:
                lost = error
    finally:
        client.cancel(futures)
    if lost is not None:
        raise _WorkerLostError from lost


def _wait_for_one(client: "Client", finished: Any) -> None:
    """Wait for the next result and say so, once, when nobody is there to compute it."""
    deadline = time.monotonic() + _SECONDS_WITHOUT_WORKERS
    while not finished.has_ready():
        time.sleep(0.005)
        if time.monotonic() > deadline:
            deadline += _SECONDS_WITHOUT_WORKERS
            if not client.ncores():
                _logger.warning("the dask cluster has no worker; waiting for one (interrupt to give up)")
                deadline = math.inf


def _until_done(run: Round, items: tuple[Any, ...], *, retries: int, in_flight: int) -> Results:
    """Run rounds until every item has its result; items that may have killed a worker go last, one by one."""
    waiting = dict(enumerate(items))
    suspects: set[int] = set()
    deaths: Counter[int] = Counter()
    killer, cause = 0, None  # the last item that was alone with a worker when that was killed, and how
    while waiting:
        fresh = [position for position in waiting if position not in suspects]
        first = min(waiting, key=lambda position: deaths[position])
        if not fresh and deaths[first] >= max(retries, 1):
            raise RuntimeError(
                "worker processes are killed again and again, the last one when it was alone with "
                f"{_named(killer, items[killer])}; {len(waiting)} of {len(items)} items are left, all other results "
                "were returned. The usual cause is too little memory: use fewer jobs or a smaller batch size."
            ) from cause
        # Suspects get a call of their own: within one, joblib hands out the next item before a result is taken, and
        # loses both with the worker.
        results = run([(position, items[position]) for position in fresh or [first]])
        try:
            for position, result in results:
                del waiting[position]
                yield position, result
        except _WorkerLostError as error:
            if fresh:
                suspects.update([position for position in fresh if position in waiting][:in_flight])
            else:
                killer, cause = first, error.__cause__
                deaths[killer] += 1
            _logger.warning("a worker process was killed; submitting the %d missing items again", len(waiting))
        finally:
            results.close()


def progress(
    iterable: Iterable[Element], *, total: int, done: int = 0, description: str, unit: str, resumes: bool = True
) -> Iterator[Element]:
    """Pass elements on and show how far they are: a bar for a person, one printed line otherwise.

    Parameters
    ----------
    iterable : iterable
        The elements still to come.
    total, done : int
        All elements, and those among them that an earlier run has done.
    description, unit : str
        For example ``"certify phantom/blood"`` and ``"images"``.
    resumes : bool
        Whether an interrupted run goes on where it stopped.

    Yields
    ------
    element
        Closing this iterator early closes the iterable, too.
    """
    from tqdm.auto import tqdm

    started = time.monotonic()
    count = done
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    watched = sys.stderr.isatty() or (shell is not None and "IPKernelApp" in shell.config)
    # tqdm itself heeds this variable in a terminal only.
    unwanted = os.environ.get("TQDM_DISABLE", "") not in ("", "0")
    headless = is_headless() or unwanted or not watched
    bar = tqdm(total=total, initial=done, desc=description, unit=f" {unit}", disable=headless)
    outcome = "stopped at "
    try:
        for element in iterable:
            count += 1
            bar.update()
            yield element
        outcome = ""
    except KeyboardInterrupt:
        outcome = "interrupted at "
        raise
    finally:
        if hasattr(iterable, "close"):
            iterable.close()
        bar.close()
        if count == total:
            outcome = ""
        if headless or outcome:
            seconds = time.monotonic() - started
            spent = f"{seconds:.1f}" if seconds < 10 else f"{seconds:,.0f}"
            resumed = f" ({done} resumed)" if done else ""
            promise = "; the same call goes on from here" if outcome and resumes else ""
            print(f"{description}: {outcome}{count} of {total} {unit} in {spent} s{resumed}{promise}")
