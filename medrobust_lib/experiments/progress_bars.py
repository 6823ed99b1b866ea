"""How far long work is: a bar for a person, one printed line for a log."""

import os
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from medrobust_lib.experiments.cards import is_headless

Element = TypeVar("Element")


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
