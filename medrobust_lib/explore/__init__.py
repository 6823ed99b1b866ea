"""Instruments for the hand: each is a pure view (values in, figure out) with controls in front of it.

The views also serve as static figures in headless runs. ipywidgets is loaded on first use.
"""

# ruff: noqa: F401 -- what is imported here is what the room offers

from medrobust_lib.explore.answers import answer_view, clusters_view, explore_answers, prepare_answers
from medrobust_lib.explore.images import (
    adapters_view,
    corruption_view,
    explore_adapters,
    explore_corruptions,
    explore_noise,
    explore_ranges,
    noise_view,
    range_view,
)
from medrobust_lib.explore.instrument import Instrument
from medrobust_lib.explore.methods import (
    Adaptation,
    explore_methods,
    explore_similarity,
    few_images,
    methods_view,
    similarity_view,
)
