"""What the Triton kernels become on a card, without one.

``python -m bcn_mm.ops.kernels.triton_report`` compiles what passes over a few
inputs would launch, and prints a table of registers, spills and shared memory,
which docs/notes/kernels.md has.
"""

import argparse
import inspect
import re
import subprocess
import tempfile
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Tuple
from unittest import mock

import torch

from ..estimates import Rule, Running
from ..stages import Affine, Spec
from . import triton as backend

#: Compute capabilities: A100, RTX 30, H100.
CARDS = (80, 86, 90)
#: name -> shape, dtype, whether channels-last, whether ``estimate``, ReLU, groups
INPUTS: Dict[str, Tuple[Tuple[int, ...], torch.dtype, bool, bool, bool, int]] = {
    'detector': ((1, 256, 200, 304), torch.float16, False, True, True, 32),
    'channels-last': ((2, 256, 200, 304), torch.float16, True, True, False, 32),
    'RoI': ((512, 256, 7, 7), torch.float32, False, True, True, 32),
    'classifier': ((64, 64, 56, 56), torch.bfloat16, True, False, True, 32),
    'instances': ((1024, 32, 9, 11), torch.float32, False, False, False, 32),
    'pooled': ((2, 512, 1, 1), torch.float32, False, False, False, 1),
}


class Launch(NamedTuple):
    """A kernel, as it is compiled for one call of it."""

    kernel: Any
    signature: Dict[str, str]
    constants: Dict[str, Any]
    multiples: Tuple[str, ...]  # arguments that 16 divides
    options: Dict[str, Any]


class Usage(NamedTuple):
    """What a thread and a block take of a multiprocessor."""

    registers: int
    spills: int  # bytes of stack, which nothing else needs
    shared: int  # bytes


class _Recorder:
    def __init__(self, kernel: Any, launches: List[Launch]) -> None:
        self._kernel, self._launches = kernel, launches

    def __getitem__(self, grid: Tuple[int, ...]) -> Any:
        return self._call

    def _call(self, *args: Any, **kwargs: Any) -> None:
        kernel = self._kernel
        options = {k: kwargs.pop(k) for k in backend._OPTIONS}
        given = inspect.signature(kernel.fn).bind(*args, **kwargs).arguments
        signature, constants, multiples = {}, {}, []
        for parameter in kernel.params:
            name, value = parameter.name, given[parameter.name]
            special = not parameter.do_not_specialize
            if (
                parameter.is_constexpr
                or value is None
                or (special and isinstance(value, int) and value == 1)
            ):
                signature[name], constants[name] = 'constexpr', value
                continue
            signature[name] = _type_of(value)
            if isinstance(value, torch.Tensor):
                multiples.append(name)  # as all that torch allocates
            elif special and isinstance(value, int) and value % 16 == 0:
                multiples.append(name)
        launch = Launch(kernel, signature, constants, tuple(multiples), options)
        if launch not in self._launches:
            self._launches.append(launch)


def _type_of(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        short = {
            torch.float32: 'fp32',
            torch.float16: 'fp16',
            torch.bfloat16: 'bf16',
            torch.float64: 'fp64',
            torch.int64: 'i64',
        }
        return '*' + short[value.dtype]
    if isinstance(value, float):
        return 'fp32'
    return 'i32' if value < 1 << 31 else 'i64'


def recorded(call: Callable[[backend.Triton], Any]) -> List[Launch]:
    """What would be launched in a call; tensors may be on the device meta."""
    found: List[Launch] = []
    kernels = {
        name: _Recorder(kernel, found)
        for name, kernel in vars(backend._kernels()).items()
    }
    with mock.patch.object(backend, '_kernels', lambda: mock.Mock(**kernels)):
        call(backend.Triton())
    return found


def launches(
    shape: Tuple[int, ...],
    dtype: torch.dtype,
    channels_last: bool,
    estimate: bool,
    relu: bool,
    groups: int,
) -> List[Launch]:
    """What a training pass over such an input launches, forward and back."""
    like: Any = dict(device='meta')
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.empty(shape, dtype=dtype, memory_format=memory_format, **like)
    channels = torch.empty(shape[1], **like)
    per_group = torch.empty(groups, **like)
    affine = Affine(channels, channels, per_group, per_group)
    count = torch.empty((), dtype=torch.int64, **like)
    running = Running(channels, channels, count)
    rule, spec = Rule(True, estimate, 0.01, 'average', 1e-5), Spec(groups, 1e-5, relu)

    def both(passes: backend.Triton) -> None:
        y, saved = passes.forward(x, running, rule, affine, spec)
        passes.backward(y, x, saved, affine, rule, spec, True)

    return recorded(both)


def compiled(launch: Launch, card: int) -> Usage:
    """Compile for a card, down to machine code."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, signature, constants, multiples, options = launch
    attributes = {
        (kernel.arg_names.index(name),): [['tt.divisibility', 16]] for name in multiples
    }
    source = ASTSource(kernel, signature, constants, attributes)
    done = triton.compile(source, target=GPUTarget('cuda', card, 32), options=options)
    registers, spills = _resources(done.asm['cubin'])
    return Usage(registers, spills, done.metadata.shared)


def _resources(cubin: bytes) -> Tuple[int, int]:
    """Registers of a thread and its bytes of stack, where spilled ones go."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix='.cubin') as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, '-res-usage', file.name]
        said = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
    ((registers, stack),) = re.findall(r'REG:(\d+) STACK:(\d+)', said.decode())
    return int(registers), int(stack)


def rows(names: Tuple[str, ...], cards: Tuple[int, ...]) -> Iterator[Tuple]:
    """Pairs of input and kernel, with the usage on each card."""
    for name in names:
        for launch in launches(*INPUTS[name]):
            usages = [compiled(launch, card) for card in cards]
            yield (name, launch.kernel.__name__, *usages)


def main() -> None:
    """Print the table for the inputs and cards that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument(
        '--cards', type=int, nargs='+', default=CARDS, help='compute capabilities'
    )
    parser.add_argument('--inputs', nargs='+', choices=INPUTS, default=tuple(INPUTS))
    args = parser.parse_args()
    print('| input | kernel |', *(f'sm_{card} |' for card in args.cards))
    print('| --- | --- |' + ' --- |' * len(args.cards))
    for name, kernel, *usages in rows(args.inputs, args.cards):
        cells = (f'{u.registers}, {u.spills}, {u.shared} |' for u in usages)
        print(f'| {name} | `{kernel}` |', *cells, flush=True)


if __name__ == '__main__':
    main()
