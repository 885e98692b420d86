"""What the versions of torch, 2.0 and later, call differently or lack.

Asked once, when it is imported; nothing here patches anything. (Patches are
those of :mod:`bcn_mm._compat`, which needs the mm packages.)
"""

from typing import Any, Callable, List, Tuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten


def version_of(text: str) -> Tuple[int, int]:
    """Major and minor number of a version, whatever follows them.

    Example:
        >>> version_of('2.13.0+cpu'), version_of('2.1.0a0+32f93b1')
        ((2, 13), (2, 1))
    """
    major, minor = text.split('.')[:2]
    return int(major), int(minor)


#: Major and minor number of this torch.
TORCH = version_of(torch.__version__)
#: The oldest one that is supported.
OLDEST = (2, 0)

if TORCH < OLDEST:
    raise ImportError(
        f'bcn_mm needs torch {OLDEST[0]}.{OLDEST[1]} or later, but this is torch '
        f'{torch.__version__}; update it, with an mmcv that was built for the new one'
    )


_compiler: Any = getattr(torch, 'compiler', None)  # torch >= 2.1

#: Whether torch.compile or torch.export traces this call. torch.compile knows
#: these functions, and takes their answers for constants.
is_compiling: Callable[[], bool] = (
    _compiler.is_compiling
    if hasattr(_compiler, 'is_compiling')
    else torch._utils.is_compiling
)
#: Whether Dynamo does; torch.export's other route does not count.
is_dynamo_compiling = getattr(_compiler, 'is_dynamo_compiling', is_compiling)


def is_exporting() -> bool:
    """Whether ``torch.export`` traces this call (torch >= 2.7; before, nobody says)."""
    # what torch.compiler.is_exporting returns; asked itself, it says yes in whatever
    # torch.compile of torch 2.11 traces (in that of 2.13 it does not)
    return getattr(_compiler, '_is_exporting_flag', False)


def is_transforming() -> bool:
    """Whether ``torch.func`` transforms the calls (grad, vmap, ...)."""
    if TORCH < (2, 6) and is_compiling():  # which does not know the question
        return False
    return torch._C._are_functorch_transforms_active()


def uncompiled(function: Callable) -> Callable:
    """What ``torch.compile`` leaves to Python.

    To be called when it is needed: it imports all of the compiler.
    """
    if _compiler is not None:
        return _compiler.disable(function)
    import torch._dynamo

    return torch._dynamo.disable(function)


def untraced(function: Callable) -> Callable:
    """What asks for the thread that it runs in: a compiler of torch 2.1 fails at it.

    That of 2.13 does not; where between they part has not been looked for.
    """
    return function if TORCH >= (2, 6) else uncompiled(function)


_autocast: Any = torch.is_autocast_enabled  # takes an argument since torch 2.4


def is_autocast_enabled(device_type: str) -> bool:
    """Whether autocast is on for a type of device."""
    if TORCH >= (2, 4):
        return _autocast(device_type)
    if device_type == 'cpu':
        return torch.is_autocast_cpu_enabled()
    return device_type == 'cuda' and _autocast()


def _works(function: Callable) -> bool:
    try:
        function()
    except RuntimeError:
        return False
    return True


def _add_and_cast(a: Tensor, b: Tensor, c: Tensor, out: Tensor) -> Tensor:
    return out.copy_(torch.addcmul(a, b, c))


_one, _half = torch.ones(1), torch.ones(1, dtype=torch.float16)

#: ``addcmul(a, b, c, out=out)``, where ``out`` may be of a lower precision. The
#: CPU's of torch 2.0 and 2.1 refuses that.
addcmul_into: Callable[..., Tensor] = (
    torch.addcmul
    if _works(lambda: torch.addcmul(_one, _one, _one, out=_half.clone()))
    else _add_and_cast
)
#: Whether batch norms take float16 on the CPU; in torch 2.0 and 2.1 they do not.
HALF_BATCH_NORM = _works(
    lambda: torch.batch_norm(
        _half[None], None, None, _one, _one, False, 0.0, 1.0, False
    )
)


#: Tells autograd of a write that it does not see; torch 2.0 cannot be told.
increment_version: Callable[[Tensor], None] = getattr(
    torch.autograd.graph, 'increment_version', lambda tensor: None
)


def tree_leaves(tree: Any) -> list:
    """What lists, tuples and dicts within each other hold."""
    return tree_flatten(tree)[0]


#: The function within which every call of a module is.
module_call = getattr(nn.Module, '_wrapped_call_impl', nn.Module._call_impl)
#: Has a forward hook run after calls that an error ended, too; torch 2.0 cannot.
ALWAYS_CALL = dict(always_call=True) if TORCH >= (2, 1) else {}


def opaque_operator(schema: str, compute: Callable, fake: Callable) -> Callable:
    """Register an operator that compilers call, and do not look into.

    Args:
        schema (str): Namespace, name, arguments and results, in the language
            of torch's operators: ``'mine::twice(Tensor x) -> Tensor'``.
        compute (callable): What it does, on every device.
        fake (callable): The same of the shapes alone.

    Returns:
        callable: the operator.
    """
    # not torch.library.custom_op, which is of torch 2.4
    namespace, definition = schema.split('::')
    library = torch.library.Library(namespace, 'FRAGMENT' if TORCH >= (2, 1) else 'DEF')
    name = library.define(definition)
    library.impl(name, compute, 'CompositeExplicitAutograd')
    library.impl(name, fake, 'Meta')
    _libraries.append(library)  # what it registers ends with it
    return getattr(getattr(torch.ops, namespace), name)


_libraries: List[torch.library.Library] = []
