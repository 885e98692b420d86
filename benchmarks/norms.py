"""Time BCN beside its peers, layer by layer, and weight standardization.

Every layer runs forward and backward once a round on the same input; ratios
are of medians over the rounds. The shapes are those of a Mask R-CNN R50-FPN at
1333x800 and of its heads. Layers are GroupNorm, BatchNorm, BCN as it runs by
itself, large-batch BCN, and BCN by every backend that serves the device; where
a backend does not serve an input there is a dash.

The tables:
  times       of every input, the geometric mean and the worst of the ratios;
              apart from these, dispatch: a call on a tiny input, where only
              the overhead of operators counts
  memory      what autograd keeps for the backward pass, and the peak
  bandwidth   bytes that any norm must move (5 times the input: x, y forward,
              dy, x, dx backward) over the time, as a share of what a copy of a
              large tensor moves in the same run
  weights     standardizing the convolutions of a ResNet-50

With --out, a JSON file of
  machine         device, threads, torch, rounds, busy
  copy_bandwidth  bytes a second that a copy reads and writes
  layers          INPUT: LAYER: seconds forward, backward, both; kept, peak in
                  multiples of the input; of_copy: the share of the copy's
                  bandwidth forward, backward, both; backend: who made BCN's
                  passes, else null
  dispatch        SETTING: LAYER: seconds of a call forward, backward, both
  summary         SETTING: LAYER: forward, backward, both: geometric_mean and
                  worst of the ratios to GN over the inputs of the setting
  weights         LAYER: seconds forward, backward, both
where INPUT is NxCxHxW, with the setting if there are several, and SETTING is
dtype and memory format.
"""

import argparse
from contextlib import nullcontext
from typing import Callable, Dict, List
from unittest import mock

import torch
from competing import competing
from measuring import (
    WARMUP,
    Clock,
    add_arguments,
    bytes_kept,
    copy_bandwidth,
    interleave,
    peak_memory,
    prepare,
)
from mmcv.cnn.bricks import conv_ws
from mmdet.models.backbones import ResNet
from norm_layers import BASE, GROUPS, LAYERS, backend_of, choose
from norm_tables import PHASES, plot, show, summarize
from torch import nn

from bcn_mm._files import write_json
from bcn_mm.engine.cli import one_line_errors
from bcn_mm.engine.progress import progress_bar
from bcn_mm.errors import InputError
from bcn_mm.ops import standardize_weight

SHAPES = (
    (1, 64, 200, 304),
    (1, 256, 200, 304),
    (1, 512, 100, 152),
    (1, 2048, 25, 38),
    (2, 256, 128, 128),
    (512, 256, 7, 7),
    (256, 256, 14, 14),
)
DTYPES = ('float32', 'bfloat16', 'float16')
FORMATS = dict(contiguous='contiguous_format', channels_last='channels_last')
# Nothing to compute; so many calls a round that their time is resolved.
TINY = (1, 64, 2, 2)
CALLS = 100
# Least tensors of the input's size that a phase reads and writes.
MOVED = dict(forward=2, backward=3, both=5)


class Inputs:
    """An input of a shape, dtype and memory format, and its output's gradient."""

    def __init__(self, shape: tuple, dtype: str, memory_format: str, device) -> None:
        layout = getattr(torch, FORMATS[memory_format])
        x = torch.randn(shape, device=device, dtype=getattr(torch, dtype))
        self.x = x.contiguous(memory_format=layout)
        self.dy = torch.randn_like(self.x)
        self.x.requires_grad_()
        self.size = x.numel() * x.element_size()
        self.device = device

    def layers(self, names: List[str]) -> Dict[str, nn.Module]:
        """Those of the layers that can be given it."""
        return {
            name: LAYERS[name].placed(self.x)
            for name in names
            if LAYERS[name].serves(self.x)
        }

    def stepper(self, name: str, layer: nn.Module, calls: int = 1) -> Callable:
        """A function that returns a call's seconds by phase, averaged over some."""
        x, dy, clock = self.x, self.dy, Clock(self.device)

        def step():
            stamps = []
            with LAYERS[name].passes():
                for _ in range(calls):
                    stamps.append(clock.stamp())
                    y = layer(x)
                    stamps.append(clock.stamp())
                    y.backward(dy)
                    stamps.append(clock.stamp())
                    del y
                    x.grad = None
                    layer.zero_grad(set_to_none=True)
            seconds = clock.seconds(stamps)  # with those from call to call
            forward, backward = (sum(seconds[i::3]) / calls for i in (0, 1))
            return forward, backward, forward + backward

        return step


def measure_case(inputs: Inputs, args, copied: float, advance) -> dict:
    """All layers on one input: seconds, bytes, share of the copy's bandwidth."""
    result, steps = {}, {}
    for name, layer in inputs.layers(args.layers).items():
        steps[name] = inputs.stepper(name, layer)
        steps[name]()
        with LAYERS[name].passes():
            kept = bytes_kept(lambda layer=layer: layer(inputs.x), layer)
            backend = backend_of(layer, inputs.x)
        peak = peak_memory(steps[name], args.device)
        result[name] = dict(
            kept=kept / inputs.size, peak=peak / inputs.size, backend=backend
        )
    times = interleave(steps, args.rounds, advance)
    for name, seconds in times.items():
        row = dict(zip(PHASES, map(float, seconds)))
        shares = {p: MOVED[p] * inputs.size / row[p] / copied for p in PHASES}
        result[name].update(row, of_copy=shares)
    return result


def measure_dispatch(inputs: Inputs, args, advance) -> dict:
    """All layers on an input so small that only their operators count: seconds."""
    steps = {
        name: inputs.stepper(name, layer, CALLS)
        for name, layer in inputs.layers(args.layers).items()
    }
    times = interleave(steps, args.rounds, advance)
    return {k: dict(zip(PHASES, map(float, v))) for k, v in times.items()}


def measure_weights(args, advance) -> dict:
    """Standardizing all convolutions of a ResNet-50, by mmcv and by us."""
    weights = [
        m.weight.detach().to(args.device).requires_grad_()
        for m in ResNet(50).modules()
        if isinstance(m, nn.Conv2d)
    ]
    grads = [torch.randn_like(w) for w in weights]
    clock = Clock(args.device)

    def by_mmcv(weight):
        # the real function, up to the convolution
        with mock.patch.object(conv_ws.F, 'conv2d', lambda x, weight, *rest: weight):
            return conv_ws.conv_ws_2d(None, weight)

    def stepper(standardize):
        def step():
            stamps = [clock.stamp()]
            results = [standardize(w) for w in weights]
            stamps.append(clock.stamp())
            torch.autograd.backward(results, grads)
            stamps.append(clock.stamp())
            for w in weights:
                w.grad = None
            forward, backward = clock.seconds(stamps)
            return forward, backward, forward + backward

        return step

    times = interleave(
        {
            "mmcv's ConvWS": stepper(by_mmcv),
            'WSConv2d': stepper(standardize_weight),
        },
        args.rounds,
        advance,
    )
    return {k: dict(zip(PHASES, map(float, v))) for k, v in times.items()}


def parse_shape(text: str) -> tuple:
    try:
        shape = tuple(int(word) for word in text.split(','))
    except ValueError:
        shape = ()
    if len(shape) != 4 or min(shape) < 1 or shape[1] % GROUPS:
        raise argparse.ArgumentTypeError(
            f'{text!r} is not N,C,H,W with C a multiple of {GROUPS}'
        )
    return shape


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="""examples:
  python benchmarks/norms.py
  python benchmarks/norms.py --shapes 1,256,64,64 \\
      --dtypes float32 bfloat16 --memory-formats channels_last
  python benchmarks/norms.py --busy --layers BCN 'BCN cpp' 'BCN native'
  python benchmarks/norms.py --layers BCN 'paper in torch ops' 'the same compiled'
  python benchmarks/norms.py --out norms.json --plot norms.png""",
    )
    parser.add_argument(
        '--shapes',
        nargs='+',
        type=parse_shape,
        default=SHAPES,
        metavar='N,C,H,W',
        help='of the input (seven of a Mask R-CNN)',
    )
    parser.add_argument(
        '--dtypes',
        nargs='+',
        choices=DTYPES,
        default=['float32'],
        help='of the input; parameters are float32 (%(default)s)',
    )
    parser.add_argument(
        '--memory-formats',
        nargs='+',
        choices=FORMATS,
        default=['contiguous'],
        help='of the input (%(default)s)',
    )
    parser.add_argument(
        '--layers',
        nargs='+',
        choices=LAYERS,
        metavar='LAYER',
        help=f'out of {", ".join(map(repr, LAYERS))} (all but the last two, and '
        f'no backend that does not serve the device); {BASE} is always among them',
    )
    parser.add_argument(
        '--busy',
        action='store_true',
        help='beside a process that computes on one thread all the while; for the CPU',
    )
    add_arguments(parser, rounds=30)
    args = parser.parse_args()
    args.groups = {}
    for setting in (f'{d} {f}' for d in args.dtypes for f in args.memory_formats):
        more = f' {setting}' if len(args.dtypes) * len(args.memory_formats) > 1 else ''
        args.groups[setting] = ['x'.join(map(str, s)) + more for s in args.shapes]
    return args


def measure(args, advance, describe) -> dict:
    """All that the tables show, by the keys of the JSON file."""
    describe('copy')
    copied = copy_bandwidth(args.device, args.rounds, advance)
    results = dict(copy_bandwidth=copied, layers={}, dispatch={}, summary={})
    for setting, titles in args.groups.items():
        for shape, title in zip(args.shapes, titles):
            describe(title)
            inputs = Inputs(shape, *setting.split(), args.device)
            results['layers'][title] = measure_case(inputs, args, copied, advance)
        describe(f'dispatch {setting}')
        inputs = Inputs(TINY, *setting.split(), args.device)
        results['dispatch'][setting] = measure_dispatch(inputs, args, advance)
        cases = [results['layers'][title] for title in titles]
        results['summary'][setting] = summarize(cases, args.layers)
    describe('weights')
    results['weights'] = measure_weights(args, advance)
    return results


def main() -> None:
    args = parse_args()
    with one_line_errors():
        if args.busy and torch.device(args.device).type != 'cpu':
            raise InputError(
                f'--busy competes for the CPU, which is not what times on '
                f'{args.device} are about; leave one of the two out'
            )
        machine = dict(prepare(args), busy=args.busy)
        args.layers = choose(args.layers, args.device, args.dtypes)
        torch.manual_seed(0)
        with competing() if args.busy else nullcontext(), progress_bar() as bar:
            parts = 2 + len(args.groups) * (len(args.shapes) + 1)
            task = bar.add_task('rounds', total=parts * (args.rounds + WARMUP))
            results = measure(
                args,
                lambda: bar.advance(task),
                lambda part: bar.update(task, description=part),
            )
        results = dict(machine=machine, **results)
        show(results, args.groups, args.layers)
        if args.out:
            write_json(args.out, results)
        if args.plot:
            plot(args.plot, results['layers'], args.layers)


if __name__ == '__main__':
    main()
