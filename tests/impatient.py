"""moltis with little patience: silence is noticed, and all is tried again, at once.

It takes the same arguments.  What takes a minute in life takes a second in a test.
"""

from __future__ import annotations

import os
import select
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import moltis


def be_impatient(module=moltis):
    module.PING_INTERVAL = 0.4
    if os.environ.get("SILENCE") != "patient":  # of a busy machine, or disk
        module.PEER_TIMEOUT = 1.6
        module.CONNECT_TIMEOUT = 3.0
    module.TELEMETRY_INTERVAL = 0.5
    module.RECONNECT_AFTER = 0.05
    module.RECONNECT_LIMIT = 0.3
    module.LOST_AFTER = 20.0
    module.NOTICE_SHOWN = 0.5
    module.Backoff.__init__.__defaults__ = (0.05, 0.3)
    # Two commands run side by side; the third has to wait in line.
    run = module.WORKS["run"].replace(side_by_side=2)
    module.WORKS = {**module.WORKS, "run": run}


def keep_the_clock_to_ourselves():
    """Let commands have the right time, where ours is made to jump."""
    if os.environ.pop("LD_PRELOAD", None):
        # What sleeps by the monotonic clock (Python 3.11) that library cannot serve.
        time.sleep = lambda seconds: select.select((), (), (), seconds)


if __name__ == "__main__":
    be_impatient()
    moltis.RUNTIMES = {"python3": moltis.RUNTIMES["python3"]}
    keep_the_clock_to_ourselves()
    sys.exit(moltis.main())
