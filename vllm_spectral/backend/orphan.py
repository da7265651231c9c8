"""An engine whose server, or whose command, is gone: it would hold its memory for nobody."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading

from vllm.logger import init_logger

logger = init_logger("vllm.spectral")


def end_with_parent() -> None:
    """End this process when the one that started it has ended, in whatever way.

    VLLM's workers watch their engine; its engine does not watch the server, and goes on after a server that was killed.
    Does nothing in a process that multiprocessing did not start.
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        parent.join()
        logger.error("who started this process has ended without a word: it ends too")
        # Not gently: a gentle end would first answer requests that nobody waits for.
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="end-with-parent", daemon=True).start()
