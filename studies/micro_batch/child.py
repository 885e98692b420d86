"""Train a config, and test it: ``python -m studies.micro_batch.child CONFIG FOLDER``.

In one thread, without a checkpoint between the two. ``metrics.json`` in the folder
has what the test gave.
"""

import sys
from pathlib import Path

import torch
from mmengine.config import Config

from bcn_mm._files import write_json
from bcn_mm.engine.launch import build_runner

if __name__ == '__main__':
    config, folder = map(Path, sys.argv[1:])
    torch.set_num_threads(1)
    cfg = Config.fromfile(config)
    cfg.work_dir, cfg.launcher = str(folder), 'none'
    runner = build_runner(cfg)
    runner.train()
    metrics = {name: float(value) for name, value in runner.test().items()}
    write_json(folder / 'metrics.json', metrics)
