import os

# Before any library that reads it: a failed look-up on the hub waits half a minute.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TQDM_DISABLE"] = "1"
os.environ.setdefault("MPLBACKEND", "agg")

import medrobust_lib  # noqa: F401 - installs the torchvision guard before any test module imports it
