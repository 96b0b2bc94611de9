"""Every test process computes with one thread, like a rank does: numbers do not follow the machine's cores."""

import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MKL_NUM_THREADS"] = "1"
