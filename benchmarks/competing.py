"""A process that competes for the CPU as long as a benchmark runs.

It multiplies matrices on one thread, as another user of the machine would:
whatever waits for all of its threads then waits for the one that shares a core.
"""

import os
import subprocess
import sys
import threading
from contextlib import contextmanager
from typing import Iterator

READY = b'ready\n'


@contextmanager
def competing() -> Iterator[subprocess.Popen]:
    """Have one core's worth of other work done.

    The process is computing when the block is entered and gone when it is left,
    also by an error or Ctrl-C; if this process is killed, it ends by itself.

    Yields:
        Popen: the process.

    Raises:
        RuntimeError: if it does not start, or ended before the block did.
    """
    with subprocess.Popen(
        [sys.executable, __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        # a Ctrl-C at the terminal is this process's to handle
        start_new_session=True,
    ) as process:
        try:
            if process.stdout.readline() != READY:
                raise RuntimeError('the competing process of --busy did not start')
            yield process
            if process.poll() is not None:
                raise RuntimeError(
                    'the competing process of --busy ended early, so the times '
                    'are not those of a busy machine'
                )
        finally:
            process.kill()


def _leave_with_parent() -> None:
    # the other end is closed however the parent ends
    sys.stdin.buffer.read()
    os._exit(0)


def compete() -> None:
    """Compute until standard input ends."""
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    import torch

    torch.set_num_threads(1)
    a = torch.randn(512, 512)
    product = a @ a
    sys.stdout.buffer.write(READY)
    sys.stdout.flush()
    while True:
        torch.mm(a, a, out=product)


if __name__ == '__main__':
    compete()
