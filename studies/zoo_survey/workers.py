"""Worker processes, and what each piece of work is done in."""

import contextlib
import io
import os
import signal
import warnings
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Callable, Dict, Iterator

import torch
from mmengine.logging import MessageHub, MMLogger

from .zoo import home_of, package_of


def gather(
    function: Callable[..., dict],
    tasks: Dict[str, tuple],
    jobs: int,
    done: Callable[[str, dict], None],
) -> None:
    """Run tasks in processes; one whose process dies is told apart.

    Args:
        function (callable): What every task calls; returns its result.
        tasks (dict): The arguments of the call, by the task's name.
        jobs (int): How many processes there are.
        done (callable): Is told each task's name and result as it comes.
    """
    waiting = dict(tasks)
    alone = False
    while waiting:
        batch = dict([next(iter(waiting.items()))]) if alone else waiting
        with ProcessPoolExecutor(1 if alone else jobs, initializer=_prepare) as pool:
            futures = {
                pool.submit(function, *words): name for name, words in batch.items()
            }
            try:
                for future in as_completed(futures):
                    done(futures[future], future.result())
                    waiting.pop(futures[future])
                alone = False
            except BrokenProcessPool:
                if alone:
                    (name,) = batch
                    done(name, dict(stock_error='the process died'))
                    waiting.pop(name)
                alone = not alone
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise


def _prepare() -> None:
    torch.set_num_threads(1)
    MMLogger.get_current_instance().setLevel('ERROR')
    os.environ['HF_HUB_OFFLINE'] = '1'  # nothing is fetched
    # where models look the epoch up
    MessageHub.get_current_instance().update_info('epoch', 0)
    # some norms ask for a process group when they are built
    torch.distributed.init_process_group(
        'gloo', store=torch.distributed.HashStore(), rank=0, world_size=1
    )


@contextlib.contextmanager
def quiet(name: str) -> Iterator[None]:
    """No output; relative paths are those of the package's own configs."""
    folder = os.getcwd()
    os.chdir(home_of(package_of(name)))
    out, err = io.StringIO(), io.StringIO()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                yield
    finally:
        os.chdir(folder)


@contextlib.contextmanager
def limit(seconds: int) -> Iterator[None]:
    """A TimeoutError where it takes longer."""

    def stop(*_):
        raise TimeoutError(f'not done after {seconds} s')

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
