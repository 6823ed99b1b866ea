import math

import pandas as pd
import pytest

from medrobust_lib import experiments
from medrobust_lib.experiments import Metric, leaderboards, read_cards, start_run
from medrobust_lib.experiments.cards import RUN_DIR_VARIABLE
from medrobust_lib.experiments.leaderboards import comparable_tables, leaderboard, lower_is_better, task_of
from medrobust_lib.experiments.report import ranking_latex, ranking_markdown, ranking_texts, short_number


