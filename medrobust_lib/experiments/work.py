"""The same function over many items: in this process, on cores or on a cluster; and how far long work is."""

import hashlib
import logging
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
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
        client = _dask_client()
        # dask itself gives an item several workers before it gives it up.
        return _until_done(_DaskRounds(client, _pack(function, context), items), min(retries, 1))
    if jobs == -1:
        import joblib

        jobs = joblib.cpu_count()
    if jobs == 1:
        return ((position, _call(function, context, position, item)) for position, item in enumerate(items))
    return _until_done(_LokyRounds(jobs, _pack(function, context), items), retries)


@dataclass(frozen=True, eq=False)
class _Packed:
    """Function and context as bytes, in an array because joblib memory-maps arrays."""

    content: np.ndarray
    digest: str


def _pack(function: Function, context: Any) -> _Packed:
    import cloudpickle

    # The function comes first: unpacking it imports its module before those of the model.
    content = np.frombuffer(cloudpickle.dumps((function, context)), dtype=np.uint8)
    return _Packed(content, hashlib.sha256(content).hexdigest())


class _WorkerMemory:
    """What a worker process keeps from one item to the next: the last function and context."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # a dask worker may have several threads
        self._digest = ""
        self._unpacked: tuple[Function, Any] | None = None

    def unpack(self, content: np.ndarray, digest: str) -> tuple[Function, Any]:
        with self._lock:
            if self._unpacked is None or digest != self._digest:
                import cloudpickle

                self._unpacked = None  # two models may not fit
                self._unpacked = cloudpickle.loads(content)
                self._digest = digest
            return self._unpacked


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


def _unchanged(content: np.ndarray) -> np.ndarray:
    return content


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


@dataclass(frozen=True, eq=False)
class _LokyRounds:
    """Rounds of work on processes of this machine, through joblib."""

    jobs: int
    packed: _Packed
    items: tuple[Any, ...]

    def run(self, positions: Sequence[int], *, alone: bool) -> Results:
        """Yield results; one item at a time if `alone`, so that the first one missing is the one that killed."""
        # Within one call joblib hands out the next item before a result is taken, and loses both with the worker.
        for block in ([position] for position in positions) if alone else [positions]:
            yield from self._run_block(block)

    def _run_block(self, positions: Sequence[int]) -> Results:
        from joblib import Parallel, cpu_count, delayed, parallel_config
        from joblib.externals.loky.process_executor import TerminatedWorkerError

        # A killed single worker would be this process itself, hence two even if one item is left.
        jobs = max(2, min(self.jobs, len(positions)))
        threads = max(1, cpu_count() // self.jobs)
        arguments = (self.packed.content, self.packed.digest, threads)
        # The threads are set twice: by the environment for libraries that are loaded later, and by `_work`.
        with parallel_config("loky", inner_max_num_threads=threads):
            parallel = Parallel(
                n_jobs=jobs,
                return_as="generator_unordered",
                batch_size=1,
                pre_dispatch=self.in_flight,
            )
            results = parallel(delayed(_work)((position, self.items[position]), *arguments) for position in positions)
        try:
            for numbered_result in results:  # noqa: UP028 - `yield from` would close joblib's generator, loudly
                yield numbered_result
        except TerminatedWorkerError as error:
            raise _WorkerLostError from error
        finally:
            _close_quietly(results)

    @property
    def in_flight(self) -> int:
        """How many of the first missing items may have been with a worker that was killed."""
        return 2 * self.jobs


@dataclass(frozen=True, eq=False)
class _DaskRounds:
    """Rounds of work on the workers of a dask cluster.

    joblib's dask backend would do, but it waits for ever once dask gives an item up with KilledWorker.
    """

    client: "Client"
    packed: _Packed
    items: tuple[Any, ...]

    def run(self, positions: Sequence[int], *, alone: bool) -> Results:
        import dask

        # A task, unlike scattered data, can be repeated when every worker that had its result is lost, and it
        # makes a cluster that grows by need grow.
        with dask.config.set({"distributed.admin.large-graph-warning-threshold": "1 TiB"}):
            content = self.client.submit(_unchanged, self.packed.content, pure=False)
        lost = None
        for block in ([position] for position in positions) if alone else [positions]:
            try:
                yield from self._run_block(block, content)
            except _WorkerLostError as error:
                lost = error
        if lost is not None:
            raise lost

    @property
    def in_flight(self) -> int:
        """A round goes on without the items it loses, so all that are missing at its end were lost."""
        return len(self.items)

    def _run_block(self, positions: Sequence[int], content: Any) -> Results:
        from distributed import CancelledError, KilledWorker, as_completed

        futures = self.client.map(
            _work,
            [(position, self.items[position]) for position in positions],
            content=content,
            digest=self.packed.digest,
            threads=None,
            pure=False,
        )
        lost = None
        try:
            finished = as_completed(futures, with_results=True, raise_errors=False)
            while not finished.is_empty():
                self._wait_for_one(finished)
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
            self.client.cancel(futures)
        if lost is not None:
            raise _WorkerLostError from lost

    def _wait_for_one(self, finished: Any) -> None:
        """Wait for the next result and say so when nobody is there to compute it."""
        told = False
        seen = time.monotonic()
        while not finished.has_ready():
            time.sleep(0.005)
            now = time.monotonic()
            if told or now - seen < _SECONDS_WITHOUT_WORKERS:
                continue
            if self.client.ncores():
                seen = now
            else:
                _logger.warning("the dask cluster has no worker; waiting for one (interrupt to give up)")
                told = True


def _until_done(rounds: _LokyRounds | _DaskRounds, retries: int) -> Results:
    """Run rounds until every item has its result; items that may have killed a worker go last, one by one."""
    waiting = dict.fromkeys(range(len(rounds.items)))
    suspects: set[int] = set()
    deaths: Counter[int] = Counter()
    while waiting:
        fresh = [position for position in waiting if position not in suspects]
        results = rounds.run(fresh or tuple(waiting), alone=not fresh)
        try:
            for position, result in results:
                del waiting[position]
                yield position, result
        except _WorkerLostError as error:
            if fresh:
                suspects.update([position for position in fresh if position in waiting][: rounds.in_flight])
            else:
                killer = next(iter(waiting))
                deaths[killer] += 1
                if deaths[killer] >= retries:
                    message = _loss_message(killer, rounds.items[killer], len(waiting), len(rounds.items))
                    raise RuntimeError(message) from error.__cause__
                waiting[killer] = waiting.pop(killer)
            _logger.warning("a worker process was killed; submitting the %d missing items again", len(waiting))
        finally:
            results.close()


def _loss_message(position: int, item: Any, left: int, total: int) -> str:
    return (
        f"worker processes are killed again and again, the last one when it was alone with {_named(position, item)}; "
        f"{left} of {total} items are left, all other results were returned. "
        "The usual cause is too little memory: use fewer jobs or a smaller batch size."
    )


def _close_quietly(results: Generator[Any, None, None]) -> None:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # joblib's: "tasks have been cancelled", which is what is wanted
        results.close()


def _dask_client() -> "Client":
    try:
        from distributed import get_client
    except ImportError as error:
        raise ImportError(
            "backend='dask' needs dask.distributed; install the cluster extra: "
            "pip install -c constraints.txt -e '.[cluster]'"
        ) from error
    try:
        return get_client()
    except ValueError as error:
        raise ValueError(
            "backend='dask' found no active client; make one first, for example: from dask.distributed import Client; "
            "client = Client(n_workers=4, threads_per_worker=1), or Client('tcp://scheduler:8786') for a cluster"
        ) from error


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
    started = time.monotonic()
    count = done
    # tqdm itself heeds this variable in a terminal only.
    unwanted = os.environ.get("TQDM_DISABLE", "") not in ("", "0")
    headless = is_headless() or unwanted or not (sys.stderr.isatty() or _in_notebook())
    bar = None
    if not headless:
        from tqdm.auto import tqdm

        bar = tqdm(total=total, initial=done, desc=description, unit=f" {unit}")
    outcome = "stopped at "
    try:
        for element in iterable:
            count += 1
            if bar is not None:
                bar.update()
            yield element
        outcome = ""
    except KeyboardInterrupt:
        outcome = "interrupted at "
        raise
    finally:
        if hasattr(iterable, "close"):
            iterable.close()
        if bar is not None:
            bar.close()
        if count == total:
            outcome = ""
        if headless or outcome:
            print(_summary(description, outcome, count, total, unit, time.monotonic() - started, done, resumes))


def _summary(
    description: str, outcome: str, count: int, total: int, unit: str, seconds: float, done: int, resumes: bool
) -> str:
    spent = f"{seconds:.1f}" if seconds < 10 else f"{seconds:,.0f}"
    resumed = f" ({done} resumed)" if done else ""
    promise = "; the same call goes on from here" if outcome and resumes else ""
    return f"{description}: {outcome}{count} of {total} {unit} in {spent} s{resumed}{promise}"


def _in_notebook() -> bool:
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    return shell is not None and "IPKernelApp" in shell.config
