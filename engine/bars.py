"""A live line for whatever takes long; plain lines where nobody looks on."""

import io
import os
import sys
import time

from tqdm import tqdm

PLAIN = "{desc}: {n_fmt} of {total_fmt}, {elapsed} gone, {remaining} to go{postfix}"


class Bar(tqdm):
    """tqdm on a terminal. Elsewhere whole lines: at start, end (alone with leave=False) and quarters 10 s apart."""

    def __init__(self, *args, disable=False, **how):
        self.plain, self.told, self.due = not sys.stderr.isatty(), -1, 0.0
        how |= {"file": io.StringIO(), "bar_format": PLAIN} if self.plain else {"dynamic_ncols": True}
        super().__init__(*args, disable=disable or os.environ.get("TQDM_DISABLE", "0") != "0", **how)

    def display(self, msg=None, pos=None):
        if not self.plain:
            return super().display(msg, pos)
        step, is_closed, now = max(1, self.total / 4), pos is not None, time.monotonic()
        if is_closed or (self.leave and self.n // step > self.told // step and now >= self.due):
            if self.n != self.told:
                print(self, file=sys.stderr, flush=True)
            self.told, self.due = self.n, now + 10
