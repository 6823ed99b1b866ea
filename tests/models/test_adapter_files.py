"""Folders of low-rank adapters: what is in them, and that they are read back on their own base only."""

import copy
import json
import socket

import numpy as np
import pytest
import torch
from peft import PeftModel

from medrobust_lib.models import low_rank
from medrobust_lib.models.low_rank import (
    adapter_parameters,
    attach_adapters,
    load_adapter,
    merge_adapters,
    save_adapter,
    weights_identity,
)


def same_state(a, b):
    first, second = a.state_dict(), b.state_dict()
    return list(first) == list(second) and all(torch.equal(first[name], second[name]) for name in first)


