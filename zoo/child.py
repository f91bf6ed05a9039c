"""`python -m zoo.child PID COMMAND ...`: a zoo command that does not outlive the process PID which started it.

A killed `reproduce` cannot stop its runs any more; a run that went on would hold its directory against the next call.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

POLL_SECONDS = 0.5


def end_with(parent: int) -> None:
    """Kill this process soon after its parent is no longer `parent`; the last checkpoint stays."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(POLL_SECONDS)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()


if __name__ == "__main__":
    from zoo.main import main

    end_with(int(sys.argv[1]))
    sys.exit(main(sys.argv[2:]))
