"""Run a function on several ranks of a process group, without a GPU."""

import datetime
import gc
import os
import tempfile

import torch
import torch.distributed as dist
from support import preloaded  # noqa: F401  which says what those are

from bcn_mm.weights.unpickling import load_weights

# from a process that has the libraries, and that no GPU goes on with
START = 'spawn' if torch.cuda.is_available() else 'forkserver'


def _start(rank, function, world, folder, args):
    torch.set_num_threads(1)
    dist.init_process_group(
        'gloo',
        init_method=f'file://{folder}/rendezvous',
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=60),
    )
    result = function(rank, world, *args)
    torch.save(result, f'{folder}/{rank}.pt')
    dist.barrier()  # torch 2.1 may wait forever for a rank that has left
    dist.destroy_process_group()
    gc.collect()  # gloo's threads end with the last reference to the group


def on_ranks(world: int, function, *args) -> list:
    """What ``function(rank, world, *args)`` returns on each of the ranks.

    The function is one of a module's, what it takes and returns made of
    tensors and plain Python values.
    """
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.start_processes(
            _start,
            (function, world, folder, args),
            nprocs=world,
            start_method=START,
        )
        return [
            load_weights(os.path.join(folder, f'{rank}.pt')) for rank in range(world)
        ]
