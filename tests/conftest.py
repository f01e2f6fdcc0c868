"""Settings for all tests."""

import os

# Read when torch loads: two cores are shared by several ranks and workers.
os.environ.setdefault("OMP_NUM_THREADS", "1")
