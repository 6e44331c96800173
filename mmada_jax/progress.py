"""The progress bar of work whose size is known before it begins: conversions, hashing, prepared data.

Training prints its metrics instead (train/metrics.py): a log should keep their values.
"""

import sys

from tqdm import tqdm

# Seconds between two displays of a bar, and before the first one: shorter work shows nothing.
ON_TERMINAL, IN_LOG = 0.2, 10.0


def progress(what: str, total: int, unit: str = "B") -> tqdm:
    """A bar on stderr: the share that is done, the speed, the time that is left.

    Use it in a `with`; its `update(n)` counts n more of `total`, bytes by default. A terminal has one line
    that changes, a log gets a line every ten seconds.
    """
    is_terminal = sys.stderr.isatty()
    seconds = ON_TERMINAL if is_terminal else IN_LOG
    return tqdm(
        desc=what, total=total, unit=unit, unit_scale=True, file=sys.stderr if is_terminal else _Lines(),
        mininterval=seconds, maxinterval=seconds, miniters=1, delay=seconds, dynamic_ncols=is_terminal,
    )  # fmt: skip


class _Lines:
    """stderr where it is no terminal: every display of a bar is a line of its own."""

    def write(self, text: str) -> None:
        if line := text.strip():
            print(line, file=sys.stderr, flush=True)

    def flush(self) -> None:
        """Does nothing: every line is flushed."""
