"""One thread for each of xdist's workers, and for what they start: with more, they would wait for each other."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
