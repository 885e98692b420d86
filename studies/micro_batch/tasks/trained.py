"""Tasks of mmdet and mmsegmentation, which mmengine's runner trains."""

import abc
import json
import math
import time
from pathlib import Path
from typing import Iterator, Tuple

from mmengine.config import Config

from bcn_mm.convert import walk
from studies import ROOT

from .. import children
from ..norms import parse_norm
from .task import Run, Task

# Of a training set, what another split is read from.
_WHERE = ('data_root', 'ann_file', 'data_prefix')
# In how many steps the log has a mean of the loss.
LOGGED = 50


class Trained(Task):
    """100 less the metric in percent, and how close channels are to elimination.

    Attributes:
        template (str): The quickstart's config that the runs' are made of.
        metric (tuple): What the metric is called in the log, and times what it
            is a percentage.
        evaluations (int): How often what is held out is evaluated.
    """

    power = 0.5
    template: str
    metric: Tuple[str, float]
    evaluations = 1

    def train(self, run: Run, folder: Path) -> dict:
        """Train and test in a process of its own.

        Returns:
            dict: ``error`` and ``held``; what part of the channels was
            ``dead`` or ``near`` elimination at last, in percent too; ``loss``,
            the mean of the last logged steps; ``curve``, ``held`` at the steps
            at which it was measured; or that the run ``diverged``, with errors
            of 100.
        """
        folder.mkdir(parents=True, exist_ok=True)
        config = folder / 'config.py'
        self.config(run).dump(config)
        begun = time.time()
        try:
            metrics = children.train(config, folder)
        except children.Diverged:
            return dict(error=100.0, held=100.0, diverged=True)
        # mmdet writes no metric for a model that finds nothing at all
        result = dict(error=self._error(metrics))
        curve = []
        for line in _logged(folder, begun):
            if self.metric[0] in line:
                curve.append((line['step'], self._error(line)))
            if 'loss' in line:
                result['loss'] = line['loss']
            for key in ('dead', 'near'):  # of the norms that the hook knows
                if f'singularity/{key}' in line:
                    result[key] = 100 * line[f'singularity/{key}']
        if run.held_out:
            result.update(held=curve[-1][1] if curve else 100.0, curve=curve)
        return result

    def _error(self, metrics: dict) -> float:
        name, factor = self.metric
        return 100 - factor * metrics.get(name, 0.0)

    def config(self, run: Run) -> Config:
        """The quickstart's config with another norm, batch size and split."""
        norm = parse_norm(run.norm)
        cfg = Config.fromfile(ROOT / 'configs/quickstart' / self.template)
        for _, node in walk(cfg.model):
            if node.get('type') == 'BCN':
                node.clear()
                node.update(norm.norm_cfg)
            elif 'conv_cfg' in node:
                node.conv_cfg = norm.conv_cfg
        cfg.custom_imports.imports.append('studies.micro_batch.parts')
        cfg.custom_hooks += [
            dict(type='EliminationSingularityHook'),
            dict(type='StopIfDiverged'),
        ]
        cfg.train_dataloader.update(
            batch_size=run.images, num_workers=0, persistent_workers=False
        )
        cfg.train_dataloader.sampler = dict(type='InfiniteSampler', shuffle=True)
        cfg.train_dataloader.pop('batch_sampler', None)
        cfg.train_cfg = dict(
            type='IterBasedTrainLoop',
            max_iters=run.steps,
            val_interval=math.ceil(run.steps / self.evaluations),
        )
        cfg.test_dataloader.update(num_workers=0, persistent_workers=False)
        cfg.optim_wrapper.optimizer.lr = run.rate
        cfg.default_hooks.checkpoint = dict(
            type='CheckpointHook', by_epoch=False, interval=-1, save_last=False
        )
        cfg.default_hooks.logger.update(interval=LOGGED, log_metric_by_epoch=False)
        cfg.log_processor = dict(
            type='LogProcessor', by_epoch=False, window_size=LOGGED
        )
        cfg.randomness = dict(seed=run.seed)
        self.adapt(cfg, run)
        self._hold_out(cfg, run)
        return cfg

    def _hold_out(self, cfg: Config, run: Run) -> None:
        """Validate on what is held out of the training set, if anything is."""
        if not run.held_out:
            cfg.val_dataloader = cfg.val_evaluator = cfg.val_cfg = None
            return
        trained = cfg.train_dataloader.dataset
        # by which numbers of pictures would change
        trained.pop('filter_cfg', None)
        where = {key: trained[key] for key in _WHERE if key in trained}
        held = dict(cfg.test_dataloader.dataset, **where, indices=-run.held_out)
        trained.indices = run.pictures
        cfg.val_dataloader = dict(cfg.test_dataloader, dataset=held)

    @abc.abstractmethod
    def adapt(self, cfg: Config, run: Run) -> None:
        """Change what one task alone does: the network, the schedule's steps."""


def _logged(folder: Path, begun: float) -> Iterator[dict]:
    """What was logged since then, step by step."""
    for file in folder.glob('*/vis_data/scalars.json'):
        if file.stat().st_mtime >= begun:
            yield from map(json.loads, file.read_text().splitlines())
