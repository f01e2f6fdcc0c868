"""Keeps transformers from looking for its hub."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
