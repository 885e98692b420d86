"""Programs in processes that have the libraries already.

To import torch, mmdet and mmseg takes longer than most of what a test has a tool
do. So one process imports them once, and nothing of bcn_mm, and forks for every
program.
"""

import importlib
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import threading
from multiprocessing.connection import wait

LIBRARIES = [
    'torch._dynamo',
    'mmengine.runner',
    *(
        f'{package}.{part}'
        for package in ('mmdet', 'mmseg')
        for part in ('apis', 'models', 'datasets', 'evaluation', 'visualization')
    ),
    'support.metafiles',
]
#: Variables that it is too late to set for a fork
READ_AT_START = ('PYTHON', 'OMP_', 'ATEN_')
_context = multiprocessing.get_context('forkserver')
_context.set_forkserver_preload(LIBRARIES)


def run(words, cwd, environment, timeout):
    """What ``subprocess.run`` would return for this script and its arguments."""
    with tempfile.NamedTemporaryFile('r') as output:
        process = _context.Process(
            target=_program, args=(words, cwd, environment, output.name)
        )
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(words, timeout, output.read())
        return subprocess.CompletedProcess(words, process.exitcode, output.read())


def _program(words, cwd, environment, output):
    # what a config looks like in files and logs takes longer than its training
    config = importlib.import_module('mmengine.config.config')
    config.FormatCode = lambda text, **_: (text, True)
    file = os.open(output, os.O_WRONLY | os.O_APPEND)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()  # what the libraries said is not the program's
    for stream in (1, 2):
        os.dup2(file, stream)
    os.close(file)
    threading.Thread(target=_end_with_the_tests, daemon=True).start()
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = words
    sys.path.insert(0, os.path.dirname(os.path.abspath(words[0])))
    runpy.run_path(words[0], run_name='__main__')


def _end_with_the_tests():
    wait([multiprocessing.parent_process().sentinel])
    os._exit(1)
