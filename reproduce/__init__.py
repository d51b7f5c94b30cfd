"""The paper in miniature: a plan of runs, their records, claims with verdicts, tables, figures and a report."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # each of several runs at a time has one core
