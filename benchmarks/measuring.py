"""What the benchmarks share: interleaved timing, memory, what ran on what."""

import argparse
import gc
import json
import os
import platform
import tempfile
import time
from pathlib import Path
from typing import Callable, Dict, Sequence, Tuple

import numpy as np
import torch
from matplotlib.figure import Figure

from bcn_mm._files import replacing

# Rounds that go before those that count.
WARMUP = 2
# The name of a mark in a trace.
_MARK = 'where the backward pass begins'
# Bytes of the tensor that is copied: more than a cache holds.
COPIED = 1 << 28


def add_arguments(parser: argparse.ArgumentParser, rounds: int) -> None:
    """The arguments that every benchmark has."""
    parser.add_argument(
        '--rounds',
        type=int,
        default=rounds,
        help='how often everything is measured in turn; medians are reported '
        '(%(default)s)',
    )
    parser.add_argument(
        '--device',
        default='cuda' if torch.cuda.is_available() else 'cpu',
        help='(%(default)s)',
    )
    parser.add_argument(
        '--threads',
        type=int,
        default=torch.get_num_threads(),
        help='of the CPU (%(default)s)',
    )
    parser.add_argument(
        '--out', type=Path, metavar='FILE.json', help='write all numbers here'
    )
    parser.add_argument(
        '--plot', type=Path, metavar='FILE.png', help='draw the ratios here'
    )


def prepare(args: argparse.Namespace) -> dict:
    """Apply the shared arguments; returns a description of the machine."""
    if args.rounds < 1 or args.threads < 1:
        raise ValueError('--rounds and --threads must be at least 1')
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    if device.type == 'cuda':
        if not torch.cuda.is_available():
            raise ValueError('--device cuda: this torch sees no GPU')
        name = torch.cuda.get_device_name(device)
    else:
        name = _cpu_name()
    return dict(
        device=name,
        threads=args.threads,
        torch=torch.__version__,
        rounds=args.rounds,
    )


def _cpu_name() -> str:
    try:
        lines = Path('/proc/cpuinfo').read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (x.split(':')[1].strip() for x in lines if 'model name' in x)
    return next(names, platform.machine())


class Clock:
    """Takes times on the device: a stamp costs no synchronisation."""

    def __init__(self, device: str) -> None:
        self.cuda = torch.device(device).type == 'cuda'

    def stamp(self):
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, stamps: Sequence) -> list:
        """The times between consecutive stamps."""
        pairs = zip(stamps, stamps[1:])
        if not self.cuda:
            return [b - a for a, b in pairs]
        stamps[-1].synchronize()
        return [a.elapsed_time(b) / 1e3 for a, b in pairs]


def interleave(
    steps: Dict[str, Callable[[], Sequence[float]]],
    rounds: int,
    advance: Callable[[], None],
) -> Dict[str, np.ndarray]:
    """Call every step once a round, in turning order.

    Args:
        steps (dict): Functions that return the seconds of their phases.
        rounds (int): How many rounds count.
        advance (callable): Called after each round, the warm-up's too.

    Returns:
        dict[str, ndarray]: the median of every phase, in seconds.
    """
    times = {name: [] for name in steps}
    names = list(steps)
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for r in range(-WARMUP, rounds):
            turn = r % len(names)
            for name in names[turn:] + names[:turn]:
                seconds = steps[name]()
                if r >= 0:
                    times[name].append(seconds)
            advance()
    finally:
        if collecting:
            gc.enable()
    return {k: np.median(np.array(v), axis=0) for k, v in times.items()}


def copy_bandwidth(device: str, rounds: int, advance: Callable[[], None]) -> float:
    """Bytes a second that a copy of a large tensor moves, read and written."""
    # written once: memory that never was may be one page of zeros
    x = torch.ones(COPIED // 4, device=device)
    y = torch.empty_like(x)
    clock = Clock(device)

    def step():
        stamps = [clock.stamp()]
        y.copy_(x)
        stamps.append(clock.stamp())
        return clock.seconds(stamps)

    (seconds,) = interleave({'copy': step}, rounds, advance)['copy']
    return float(2 * COPIED / seconds)


#: What a step calls between its forward and its backward pass.
Mark = Callable[[], None]


def peak_memory(function: Callable[[], None], device: str) -> int:
    """The most bytes of tensors that a call holds beyond those before it."""
    return memory(lambda mark: function(), device)[1]


def memory(function: Callable[[Mark], None], device: str) -> Tuple[int, int]:
    """What a call holds beyond what there was before it.

    Args:
        function (callable): Is given a function, to call where ``held`` is wanted.
        device (str): Where the tensors are.

    Returns:
        tuple[int, int]: the bytes of tensors at that call, and the most.
    """
    held = 0
    if torch.device(device).type == 'cuda':
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()

        def mark() -> None:
            nonlocal held
            held = torch.cuda.memory_allocated() - before

        function(mark)
        torch.cuda.synchronize()
        return held, torch.cuda.max_memory_allocated() - before

    def note() -> None:
        with torch.profiler.record_function(_MARK):
            pass

    # the CPU's allocator keeps no peak: add up what the profiler saw it do
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        function(note)
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, 'trace.json')
        profile.export_chrome_trace(path)
        with open(path) as file:
            events = json.load(file)['traceEvents']
    changes = [
        (e['ts'], e['args']['Bytes'])
        for e in events
        if e.get('name') == '[memory]' and e['args']['Device Type'] == 0
    ]
    changes.sort(key=lambda change: change[0])
    marked = [e['ts'] for e in events if e.get('name') == _MARK]
    if marked:
        held = sum(b for ts, b in changes if ts < marked[0])
    return held, max(0, int(np.cumsum([b for _, b in changes] or [0]).max()))


def bytes_kept(function: Callable[[], None], module: torch.nn.Module) -> int:
    """What autograd keeps for the backward pass, parameters excepted."""
    own = {t.data_ptr() for t in module.parameters()}
    kept = {}

    def pack(t):
        if t.data_ptr() not in own:
            kept[t.data_ptr()] = t.numel() * t.element_size()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        function()
    return sum(kept.values())


def geometric_mean(values: Sequence[float]) -> float:
    return float(np.exp(np.mean(np.log(values))))


def draw_bars(
    path: Path, rows: Sequence[str], bars: Dict[str, list], title: str
) -> None:
    """Horizontal bars of ratios, one group a row, a line at one."""
    figure = Figure(
        figsize=(8, 1 + 0.22 * len(rows) * (len(bars) + 1)),
        layout='constrained',
    )
    axis = figure.subplots()
    height = 0.8 / len(bars)
    for i, (name, values) in enumerate(bars.items()):
        y = np.arange(len(rows)) + (i - (len(bars) - 1) / 2) * height
        axis.barh(y, values, height, label=name)
    axis.axvline(1, color='black', linewidth=0.8)
    axis.set_yticks(np.arange(len(rows)), rows)
    axis.invert_yaxis()
    axis.set_xscale('log')
    axis.set_xlabel(title)
    axis.legend(fontsize='small')
    with replacing(path, f'.part{path.suffix}') as draft:
        figure.savefig(draft, dpi=120)


def draw_points(
    path: Path, points: Dict[str, Dict[str, Tuple[float, float]]], labels: Sequence[str]
) -> None:
    """Points of several kinds, those of one name joined: further left is less
    memory, further down less time.

    Args:
        path (Path): The picture.
        points (dict): By name, and by what is done to it: x and y.
        labels (sequence): Of the two axes.
    """
    figure = Figure(figsize=(7, 4.5), layout='constrained')
    axis = figure.subplots()
    for name, ways in points.items():
        xs, ys = zip(*ways.values())
        axis.plot(xs, ys, '.--', linewidth=0.8, markersize=10, label=name)
        for way, (x, y) in ways.items():
            offset = dict(xytext=(5, 5), textcoords='offset points')
            axis.annotate(way, (x, y), fontsize='small', **offset)
    axis.set_xlim(left=0)
    axis.margins(x=0.15, y=0.15)
    axis.set_xlabel(labels[0])
    axis.set_ylabel(labels[1])
    axis.grid(alpha=0.3)
    axis.legend(fontsize='small')
    with replacing(path, f'.part{path.suffix}') as draft:
        figure.savefig(draft, dpi=120)
