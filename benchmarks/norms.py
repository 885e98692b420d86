"""Time BCN beside its peers, layer by layer, and weight standardization.

Every layer runs forward and backward once a round on the same input; ratios
are of medians over the rounds. The shapes are those of a Mask R-CNN R50-FPN at
1333x800 and of its heads.
"""

import argparse
from unittest import mock

import torch
from measuring import (
    WARMUP,
    Clock,
    add_arguments,
    bytes_kept,
    draw_bars,
    geometric_mean,
    interleave,
    peak_memory,
    prepare,
)
from mmcv.cnn.bricks import conv_ws
from mmdet.models.backbones import ResNet
from rich.console import Console
from rich.table import Table
from torch import nn

from bcn_mm import BCN
from bcn_mm._files import write_json
from bcn_mm.engine.cli import one_line_errors
from bcn_mm.engine.progress import progress_bar
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
FORMATS = ('contiguous', 'channels_last')
GROUPS = 32


class Formulation(nn.Module):
    """Micro-batch BCN as the paper states it, one torch operation a step.

    What one would write from algorithm 1 of arXiv:1903.10520v2; the baseline.
    """

    def __init__(self, channels: int, momentum: float = 0.01, eps=1e-5):
        super().__init__()
        self.momentum, self.eps = momentum, eps
        self.batch_weight = nn.Parameter(torch.ones(1, channels, 1, 1))
        self.batch_bias = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.weight = nn.Parameter(torch.ones(1, GROUPS, 1))
        self.bias = nn.Parameter(torch.zeros(1, GROUPS, 1))
        self.register_buffer('mean', torch.zeros(1, channels, 1, 1))
        self.register_buffer('var', torch.ones(1, channels, 1, 1))

    def forward(self, x):
        over = (0, 2, 3)
        with torch.no_grad():
            mean = x.mean(over, keepdim=True)
            var = (x - self.mean).square().mean(over, keepdim=True)
            self.mean += self.momentum * (mean - self.mean)
            self.var += self.momentum * (var - self.var)
            mean, std = self.mean.clone(), torch.sqrt(self.var + self.eps)
        z = (x - mean) / std * self.batch_weight + self.batch_bias
        z = z.reshape(x.shape[0], GROUPS, -1)
        centred = z - z.mean(2, keepdim=True)
        var = centred.square().mean(2, keepdim=True)
        y = centred / torch.sqrt(var + self.eps) * self.weight + self.bias
        return y.reshape(x.shape).to(x.dtype)


def compiled(channels: int) -> nn.Module:
    torch._dynamo.reset()
    return torch.compile(Formulation(channels))


# the first is what the others are compared with
LAYERS = {
    'GN': lambda c: nn.GroupNorm(GROUPS, c),
    'BN': nn.BatchNorm2d,
    'BCN': lambda c: BCN(c, GROUPS),
    'BCN large-batch': lambda c: BCN(c, GROUPS, estimate=False),
    'paper in torch ops': Formulation,
    'the same compiled': compiled,
}
BASE = 'GN'


def measure_case(shape, dtype, memory_format, args, advance) -> dict:
    """All layers on one input: seconds, bytes."""
    memory_format = getattr(torch, f'{memory_format}_format', None) or getattr(
        torch, memory_format
    )
    factory = dict(device=args.device, dtype=getattr(torch, dtype))
    x = torch.randn(shape, **factory).contiguous(memory_format=memory_format)
    dy = torch.randn_like(x)
    x.requires_grad_()
    size = x.numel() * x.element_size()
    clock = Clock(args.device)
    result = {}

    def stepper(layer):
        def step():
            stamps = [clock.stamp()]
            y = layer(x)
            stamps.append(clock.stamp())
            y.backward(dy)
            stamps.append(clock.stamp())
            x.grad = None
            layer.zero_grad(set_to_none=True)
            forward, backward = clock.seconds(stamps)
            return forward, backward, forward + backward

        return step

    steps = {}
    for name in args.layers:
        # parameters stay in float32, as under mixed precision
        layer = LAYERS[name](shape[1]).to(args.device)
        steps[name] = stepper(layer)
        steps[name]()
        result[name] = dict(
            kept=bytes_kept(lambda layer=layer: layer(x), layer) / size,
            peak=peak_memory(steps[name], args.device) / size,
        )
    times = interleave(steps, args.rounds, advance)
    for name, seconds in times.items():
        result[name].update(zip(PHASES, map(float, seconds)))
    return result


PHASES = ('forward', 'backward', 'both')


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


def ratio(case: dict, name: str, phase: str = 'both') -> float:
    return case[name][phase] / case[BASE][phase]


def show(cases: dict, weights: dict, args) -> None:
    console = Console()
    table = Table(title=f'forward + backward: ms, and the ratio to {BASE}')
    table.add_column('input', no_wrap=True)
    for name in args.layers:
        table.add_column(name, justify='right')
    for title, case in cases.items():
        table.add_row(
            title,
            *(
                f'{case[name]["both"] * 1e3:.2f} ({ratio(case, name):.2f})'
                for name in args.layers
            ),
        )
    for label, phase in (
        ('geometric mean', 'both'),
        ('  forward', 'forward'),
        ('  backward', 'backward'),
    ):
        table.add_row(
            label,
            *(
                f'{geometric_mean([ratio(c, n, phase) for c in cases.values()]):.2f}'
                for n in args.layers
            ),
            style='bold' if phase == 'both' else '',
        )
    console.print(table)
    table = Table(title='memory in multiples of the input: kept, at the peak')
    table.add_column('input', no_wrap=True)
    for name in args.layers:
        table.add_column(name, justify='right')
    for title, case in cases.items():
        table.add_row(
            title,
            *(f'{case[n]["kept"]:.2f}, {case[n]["peak"]:.2f}' for n in args.layers),
        )
    console.print(table)
    table = Table(title="standardizing all of ResNet-50's convolutions")
    for heading in ('', *PHASES, "to mmcv's"):
        table.add_column(heading, justify='right')
    base = weights["mmcv's ConvWS"]['both']
    for name, times in weights.items():
        table.add_row(
            name,
            *(f'{times[p] * 1e3:.1f} ms' for p in PHASES),
            f'{times["both"] / base:.2f}',
        )
    console.print(table)


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
        default=list(LAYERS),
        metavar='LAYER',
        help=f'out of {", ".join(map(repr, LAYERS))} (all); '
        f'{BASE} is always among them',
    )
    add_arguments(parser, rounds=30)
    args = parser.parse_args()
    args.layers = [n for n in LAYERS if n in {BASE, *args.layers}]
    return args


def main() -> None:
    args = parse_args()
    with one_line_errors():
        machine = prepare(args)
        torch.manual_seed(0)
        cases = [
            (s, d, f)
            for d in args.dtypes
            for f in args.memory_formats
            for s in args.shapes
        ]
        results = {}
        with progress_bar() as bar:
            total = (len(cases) + 1) * (args.rounds + WARMUP)
            task = bar.add_task('rounds', total=total)

            def advance():
                bar.advance(task)

            for shape, dtype, memory_format in cases:
                title = 'x'.join(map(str, shape))
                if len(args.dtypes) * len(args.memory_formats) > 1:
                    title += f' {dtype} {memory_format}'
                bar.update(task, description=title)
                results[title] = measure_case(
                    shape, dtype, memory_format, args, advance
                )
            bar.update(task, description='weights')
            weights = measure_weights(args, advance)
        show(results, weights, args)
        Console().print(', '.join(f'{key} {value}' for key, value in machine.items()))
        if args.out:
            write_json(
                args.out,
                dict(machine=machine, layers=results, weights=weights),
            )
        if args.plot:
            draw_bars(
                args.plot,
                list(results),
                {
                    name: [ratio(case, name) for case in results.values()]
                    for name in args.layers
                    if name != BASE
                },
                f'forward + backward, times that of {BASE}',
            )


if __name__ == '__main__':
    main()
