"""Time training steps of a model with its norms and convolutions swapped.

Builds a detector or a segmenter once for each pair of norm and convolution
and lets them train in turn on the same random pictures: every norm
that bcn_mm.convert.to_bcn replaces is swapped, and the convolution beside it.
Nothing is read but the config. The learning rate is 0 and the pictures are
full of objects, so that every step and every model samples the same number of
regions and the work stays the same from step to step.

Besides the time it says what a step keeps from its forward pass for its backward
pass, and the most that it holds; with --ways, for ways of training in less memory
too, and with --fit, how many pictures fit on a GPU by that measure.

With --hook it also times steps that EliminationSingularityHook measures.
"""

import argparse
import copy
import gc
import tempfile
from types import SimpleNamespace
from typing import Dict, Optional, Tuple

import numpy as np
import torch
from measuring import (
    WARMUP,
    Clock,
    Mark,
    add_arguments,
    draw_bars,
    draw_points,
    interleave,
    memory,
    prepare,
)
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope
from mmengine.visualization import Visualizer
from rich.console import Console
from rich.table import Table
from swapping import swap
from torch import nn

from bcn_mm import EliminationSingularityHook, recompute_activations
from bcn_mm._files import write_json
from bcn_mm.engine.batches import SCOPES, random_batch
from bcn_mm.engine.cli import Options, load_config, one_line_errors
from bcn_mm.engine.progress import progress_bar
from bcn_mm.errors import InputError

# what the norm and the convolution are; the first is what others are compared with
VARIANTS = {
    'GN + ConvWS': ('GN', 'ConvWS'),
    'BN': ('BN', None),
    'BCN + WSConv2d': ('BCN', 'WSConv2d'),
    'GN': ('GN', None),
    'BCN': ('BCN', None),
}
DEFAULT = list(VARIANTS)[:3]
BASE = 'GN + ConvWS'
WATCHED = 'BCN + WSConv2d'
# More than a two-stage detector's sampler takes, so that it is always full.
OBJECTS = 256


#: How a model is trained: whether activations are recomputed, and whether the
#: backbone's blocks are activation checkpoints.
WAYS = {
    'plain': (False, False),
    'recompute': (True, False),
    'with_cp': (False, True),
    'both': (True, True),
}
# GPUs' memory, in GB of 10^9 bytes
GPUS = (8, 11, 16, 24)


class NormTimer:
    """Adds up the time that a model spends in its norm layers.

    Forward by module hooks, backward by hooks on the graph's node of each
    layer's output.
    """

    def __init__(self, model: nn.Module, clock: Clock) -> None:
        self.clock = clock
        self.begins, self.ends = [], []
        self.layers = [
            m
            for m in model.modules()
            if isinstance(m, (nn.modules.batchnorm._NormBase, nn.GroupNorm))
        ]
        for layer in self.layers:
            layer.register_forward_pre_hook(self._begin)
            layer.register_forward_hook(self._forward_end)

    def _begin(self, *_) -> None:
        self.begins.append(self.clock.stamp())

    def _end(self, *_) -> None:
        self.ends.append(self.clock.stamp())

    def _forward_end(self, module, inputs, output) -> None:
        self._end()
        if output.grad_fn is not None:
            output.grad_fn.register_prehook(self._begin)
            output.grad_fn.register_hook(self._end)

    def take(self) -> float:
        """The seconds since the last call; norms do not contain norms."""
        pairs = zip(self.begins, self.ends)
        seconds = sum(self.clock.seconds(pair)[0] for pair in pairs)
        self.begins, self.ends = [], []
        return seconds


class Trainee:
    """One model, ready to make steps."""

    def __init__(
        self, cfg: Config, name: str, batch: dict, args, way: str = 'plain'
    ) -> None:
        torch.manual_seed(0)
        norm, conv = VARIANTS[name]
        recomputes, with_cp = WAYS[way]
        if with_cp:
            cfg = copy.deepcopy(cfg)
            cfg.model.backbone.with_cp = True
        norm_cfg = dict(type=norm)
        if norm == 'GN':
            norm_cfg.update(num_groups=args.num_groups or 32)
        elif norm == 'BCN':
            norm_cfg.update(num_groups=args.num_groups)
        self.model = MODELS.build(swap(cfg, norm_cfg, conv and dict(type=conv)))
        self.model.init_weights()
        self.model.to(args.device).train()
        wrapper = copy.deepcopy(cfg.optim_wrapper)
        wrapper.optimizer.lr = 0.0
        if args.amp:
            wrapper.update(type='AmpOptimWrapper', loss_scale='dynamic')
        self.optim_wrapper = build_optim_wrapper(self.model, wrapper)
        if recomputes:
            recompute_activations(self.model)
        self.batch = batch
        self.clock = Clock(args.device)
        self.norms = NormTimer(self.model, self.clock)

    def fresh_batch(self) -> dict:
        """The pictures, since a step changes what is known of them."""
        torch.manual_seed(0)  # regions are sampled from torch's
        np.random.seed(0)  # or numpy's generator
        return copy.deepcopy(self.batch)

    def train_step(self, batch: Optional[dict] = None) -> None:
        batch = batch or self.fresh_batch()
        losses = self.model.train_step(batch, self.optim_wrapper)
        self.loss = losses['loss']

    def marked_step(self, mark: Mark, batch: Optional[dict] = None) -> None:
        """A step that calls ``mark`` when its backward pass begins."""
        backward = self.optim_wrapper.backward

        def marked(loss: torch.Tensor, **kwargs) -> None:
            mark()
            backward(loss, **kwargs)

        self.optim_wrapper.backward = marked
        try:
            self.train_step(batch)
        finally:
            del self.optim_wrapper.backward

    def static_memory(self) -> int:
        """Bytes of parameters, buffers, gradients and the optimizer's state."""
        state = self.optim_wrapper.optimizer.state_dict()['state'].values()
        held = [*self.model.parameters(), *self.model.buffers()]
        held += [p.grad for p in self.model.parameters() if p.grad is not None]
        held += [t for s in state for t in s.values() if torch.is_tensor(t)]
        return sum(t.numel() * t.element_size() for t in held)

    def timed_step(self) -> tuple:
        gc.collect()  # the timer switches off the automatic collection
        batch = self.fresh_batch()
        stamps = [self.clock.stamp()]
        self.train_step(batch)
        stamps.append(self.clock.stamp())
        return self.clock.seconds(stamps)[0], self.norms.take()


class Watched:
    """The steps of a trainee, as a hook measures them.

    Every step is a window: what is done once per window, merging and logging,
    is in its time as well.
    """

    def __init__(self, trainee: Trainee, folder: str) -> None:
        self.trainee = trainee
        self.hook = EliminationSingularityHook(interval=1, window=1)
        self.runner = SimpleNamespace(
            model=trainee.model,
            iter=0,
            logger=MMLogger.get_current_instance(),
            visualizer=Visualizer(
                vis_backends=[dict(type='LocalVisBackend')], save_dir=folder
            ),
        )
        self.hook.before_train(self.runner)

    def timed_step(self) -> tuple:
        gc.collect()
        batch = self.trainee.fresh_batch()
        stamps = [self.trainee.clock.stamp()]
        self.hook.before_train_iter(self.runner, 0)
        self.trainee.train_step(batch)
        self.hook.after_train_iter(self.runner, 0)
        stamps.append(self.trainee.clock.stamp())
        self.runner.iter += 1
        return self.trainee.clock.seconds(stamps)[0], self.trainee.norms.take()


def show(result: dict, title: str) -> None:
    table = Table(title=title)
    table.add_column('model', no_wrap=True)
    headings = ('s/step', 'ratio', 'in norms', 'share')
    for heading in (*headings, 'kept', 'ratio', 'peak', 'ratio'):
        table.add_column(heading, justify='right')
    base = result[BASE]
    for name, row in result.items():
        cells = [
            name,
            f'{row["step"]:.3f}',
            f'{row["step"] / base["step"]:.3f}',
            f'{row["norms"]:.3f} s',
            f'{row["norms"] / row["step"]:.1%}',
        ]
        for key in ('kept', 'peak'):
            cells += [f'{row[key] / 2**20:,.0f} MiB', f'{row[key] / base[key]:.3f}']
        table.add_row(*cells)
    Console().print(table)
    if 'fit' in base:
        table = Table(title='pictures of this size that fit, by this measure')
        table.add_column('model', no_wrap=True)
        for gpu in GPUS:
            table.add_column(f'{gpu} GB', justify='right')
        for name, row in result.items():
            table.add_row(name, *map(str, row['fit']))
        Console().print(table)


def pictures_that_fit(static: int, one: int, two: int) -> list:
    """How many pictures fit on each of ``GPUS``.

    Args:
        static (int): Bytes that there are between two steps.
        one (int): The most that a step of one picture adds, in bytes, and
        two (int): one of two.
    """
    each = two - one
    return [max(0, int((gpu * 10**9 - static - (one - each)) // each)) for gpu in GPUS]


def label(name: str, way: str) -> str:
    return name if way == 'plain' else f'{name}, {way}'


def peak_of(trainee: Trainee, batch: dict, device: str) -> int:
    """The most that a step of these pictures adds."""

    def step(mark: Mark) -> None:
        torch.manual_seed(0)
        np.random.seed(0)
        trainee.train_step(copy.deepcopy(batch))

    return memory(step, device)[1]


def points_of(result: dict, wanted: Dict[str, Tuple[str, str]]) -> dict:
    """Peak and time, by variant and way."""
    points: Dict[str, Dict[str, Tuple[float, float]]] = {}
    for name, (variant, way) in wanted.items():
        row = result[name]
        points.setdefault(variant, {})[way] = row['peak'] / 2**20, row['step']
    return points


def cost_of_hook(measured: float, plain: float) -> dict:
    """How long a measured step takes, times a plain one; and what the hook
    adds on average, as a part of a step."""
    hook = EliminationSingularityHook()
    ratio = measured / plain
    return dict(measured=ratio, added=(ratio - 1) * hook.window / hook.interval)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="""examples:
  python benchmarks/model.py \\
      configs/mask_rcnn/mask-rcnn_r50_fpn_bcn-ws-all_2x_coco.py
  python benchmarks/model.py CONFIG --shape 512 1024 \\
      --variants 'BCN + WSConv2d' --out model.json --plot model.png

peak is what a step holds beyond the weights and the optimizer's state.""",
    )
    parser.add_argument('config', help='of an mmdet or mmseg model')
    parser.add_argument(
        '--shape',
        nargs=2,
        type=int,
        default=(400, 640),
        metavar=('H', 'W'),
        help='of the pictures (400 640)',
    )
    parser.add_argument(
        '--batch-size', type=int, default=1, help='pictures (%(default)s)'
    )
    parser.add_argument(
        '--objects',
        type=int,
        default=OBJECTS,
        help='in each picture; should be more than a sampler takes (%(default)s)',
    )
    parser.add_argument(
        '--variants',
        nargs='+',
        choices=VARIANTS,
        default=DEFAULT,
        metavar='VARIANT',
        help=f'out of {", ".join(map(repr, VARIANTS))} (the first three); {BASE!r} '
        'is always among them',
    )
    parser.add_argument(
        '--num-groups',
        type=int,
        metavar='G',
        help='of GN and BCN, where 32 does not divide all channels (32; of BCN what '
        'it takes by itself)',
    )
    parser.add_argument(
        '--ways',
        nargs='+',
        choices=WAYS,
        default=['plain'],
        metavar='WAY',
        help='of training: plain, recompute (RecomputeActivationsHook, for BCN), '
        "with_cp (the backbone's activation checkpoints), both (plain)",
    )
    parser.add_argument(
        '--fit',
        action='store_true',
        help=f'how many pictures fit in {", ".join(map(str, GPUS))} GB, from the '
        'peaks of a step of one and of two pictures',
    )
    parser.add_argument(
        '--amp', action='store_true', help='in mixed precision, on a GPU'
    )
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=Options,
        metavar='KEY=VALUE',
        help='override settings of the config',
    )
    parser.add_argument(
        '--hook',
        action='store_true',
        help=f'what EliminationSingularityHook costs {WATCHED!r}',
    )
    add_arguments(parser, rounds=10)
    args = parser.parse_args()
    variants = {BASE, *args.variants, *([WATCHED] if args.hook else [])}
    args.variants = [n for n in VARIANTS if n in variants]
    args.ways = [w for w in WAYS if w in {'plain', *args.ways}]
    args.shape = tuple(args.shape)
    # what load_config asks for beside these
    args.work_dir, args.launcher, args.local_rank = None, 'none', 0
    return args


def main() -> None:
    args = parse_args()
    with one_line_errors():
        machine = prepare(args)
        if min(args.batch_size, args.objects) < 1 or min(args.shape) < 32:
            raise InputError(
                '--batch-size and --objects must be at least 1, --shape at least 32 32'
            )
        cfg = load_config(args)
        scope = cfg.get('default_scope')
        if scope not in SCOPES:
            raise InputError(
                f'{args.config} is of scope {scope!r}; only models of '
                f'{" and ".join(SCOPES)} can be measured'
            )
        init_default_scope(scope)
        # how each weight was initialized is not news
        MMLogger.get_current_instance().setLevel('WARNING')
        preprocessor = cfg.model.get('data_preprocessor', {})
        if preprocessor.get('size'):
            preprocessor.size = args.shape
        batch, one, two = (
            random_batch(cfg, n, args.shape, args.objects, args.device)
            for n in (args.batch_size, 1, 2)
        )
        wanted = {
            label(name, way): (name, way)
            for name in args.variants
            for way in args.ways
            if VARIANTS[name][0] == 'BCN' or not WAYS[way][0]
        }
        with progress_bar() as bar:
            steps = WARMUP + args.rounds
            task = bar.add_task('building', total=steps + 2 * len(wanted))
            trainees: Dict[str, Trainee] = {}
            for name, (variant, way) in wanted.items():
                try:
                    trainees[name] = Trainee(cfg, variant, batch, args, way)
                    trainees[name].train_step()
                except ValueError as e:
                    raise InputError(
                        f'{name} cannot train this: {e}; leave it out with --variants'
                    ) from e
                if not np.isfinite(trainees[name].loss.item()):
                    raise InputError(f'{name}: the loss is not finite')
                bar.advance(task)
            result = {}
            for name, trainee in trainees.items():
                bar.update(task, description=f'memory of {name}')
                loss = trainee.loss.item()
                kept, peak = memory(trainee.marked_step, args.device)
                result[name] = dict(
                    loss=loss, layers=len(trainee.norms.layers), kept=kept, peak=peak
                )
                if args.fit:
                    result[name]['fit'] = pictures_that_fit(
                        trainee.static_memory(),
                        *(peak_of(trainee, b, args.device) for b in (one, two)),
                    )
                trainee.norms.take()
                bar.advance(task)
            bar.update(task, description='rounds')
            timed = {name: t.timed_step for name, t in trainees.items()}
            with tempfile.TemporaryDirectory() as folder:
                if args.hook:
                    watched = Watched(trainees[WATCHED], folder)
                    timed['hook'] = watched.timed_step
                times = interleave(timed, args.rounds, lambda: bar.advance(task))
        hook = None
        if args.hook:
            hook = cost_of_hook(times.pop('hook')[0], times[WATCHED][0])
        for name, (step, norms) in times.items():
            result[name].update(step=float(step), norms=float(norms))
        height, width = args.shape
        title = f'training steps of {args.batch_size} picture(s), {width}x{height}'
        show(result, title)
        if hook:
            Console().print(
                f'a step that the hook measures takes {hook["measured"]:.3f} '
                f"times {WATCHED}'s; at its default interval it adds "
                f'{hook["added"]:.2%} to a step'
            )
        Console().print(', '.join(f'{key} {value}' for key, value in machine.items()))
        if args.out:
            settings = dict(
                config=args.config,
                shape=args.shape,
                batch_size=args.batch_size,
                amp=args.amp,
            )
            write_json(
                args.out,
                dict(
                    machine=machine,
                    settings=settings,
                    models=result,
                    hook=hook,
                ),
            )
        if args.plot:
            measures = dict(step='time of a step', norms='time in norms')
            measures.update(kept='kept for the backward pass', peak='peak')
            if len(args.ways) > 1:
                draw_points(
                    args.plot,
                    points_of(result, wanted),
                    (
                        f'peak memory of {title}, MiB',
                        'seconds a step',
                    ),
                )
                return
            draw_bars(
                args.plot,
                list(measures.values()),
                {
                    name: [row[m] / result[BASE][m] for m in measures]
                    for name, row in result.items()
                    if name != BASE
                },
                f'{title}, times those of {BASE}',
            )


if __name__ == '__main__':
    main()
