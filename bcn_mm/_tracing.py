"""Tensors known again by identity, where torch's functions are called."""

from typing import Any, Dict, Iterator, Optional, Tuple
from weakref import ref

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class TensorTracer(TorchFunctionMode):
    """Follows tensors by identity, to see which functions they go into.

    A subclass says in ``__torch_function__`` what it makes of the calls of
    torch's functions within ``with tracer:``; :meth:`label_of` tells it which
    of their arguments it follows. The tensors themselves are not kept alive.

    Example:
        >>> class Uses(TensorTracer):
        ...     def __torch_function__(self, func, types, args=(), kw=None):
        ...         if self.label_of(args[0]) == 'x':
        ...             print(func.__name__)
        ...         return func(*args, **(kw or {}))
        >>> x = torch.ones(2)
        >>> with Uses() as uses:
        ...     uses.follow(x, 'x')
        ...     y = x.exp().log()
        exp
    """

    def __init__(self) -> None:
        super().__init__()
        # by id: a weak reference, for ids are given again after a tensor's
        # end, the version, and the label
        self._followed: Dict[int, Tuple[ref, Optional[int], Any]] = {}

    def follow(self, tensor: Tensor, label: Any) -> None:
        """Know ``tensor`` as ``label`` from now on, which must not be None."""
        # tensors of inference mode count no versions; to ask is no use of them
        with torch._C.DisableTorchFunction():
            version = None if tensor.is_inference() else tensor._version
        self._followed[id(tensor)] = ref(tensor), version, label

    def label_of(self, value: Any, unwritten: bool = False) -> Any:
        """What a value is followed as.

        Args:
            value (Any): A tensor, or anything else, which is not followed.
            unwritten (bool): Whether a tensor counts only if nothing has
                written into it since: after ``out += identity``, ``out`` is
                the same object and another value. One of inference mode, of
                which this is not known, does not count then. Default: False.

        Returns:
            Any: the label, or None.
        """
        found = self._followed.get(id(value))
        if found is None:
            return None
        tensor, version, label = found
        if tensor() is not value:
            return None
        if unwritten and (version is None or value._version != version):
            return None
        return label

    def living(self) -> Iterator[Any]:
        """The labels of the followed tensors that still exist."""
        for tensor, _, label in self._followed.values():
            if tensor() is not None:
                yield label
