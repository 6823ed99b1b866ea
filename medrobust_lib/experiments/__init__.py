"""Experiments: runs and their result cards, the resumable row store, parallel work.

This floor knows nothing of data or models; everything above may use it.
"""

# ruff: noqa: F401 -- what is imported here is what the room offers

from medrobust_lib.experiments.cards import (
    Metric,
    Run,
    is_headless,
    read_cards,
    show_source,
    start_run,
    write_text_atomically,
)
from medrobust_lib.experiments.leaderboards import leaderboard
from medrobust_lib.experiments.store import RowStore, open_store, parameter_differences
from medrobust_lib.experiments.work import map_items, progress
