"""What autograd keeps: recipes of tensors, instead of these.

Within a :class:`Region`, autograd is handed a recipe (:mod:`.recipes`) wherever it
would keep a tensor that there is one of, or a view of it, for the backward pass; all
else it keeps as ever.

A tensor is known by its storage, as long as it lives, and by its version: whatever
something has written into since is another tensor.
"""

import threading
from typing import (
    Any,
    Callable,
    ContextManager,
    Dict,
    List,
    NamedTuple,
    Optional,
    Tuple,
    Union,
)
from weakref import ref

import torch
from torch import Tensor

from ._compat import is_autocast_enabled, is_transforming
from .recipes import Activation, ActivationRecipe, Recipe, SumRecipe

# How many sums one after the other are computed again: of a chain of residual
# blocks every third one keeps its result.
_DEPTH = 2


# -- what autograd is handed -------------------------------------------------


class Kept:
    """What stands for a tensor that autograd saves: the tensor, or its recipe."""

    __slots__ = (
        '_tensor',
        '_version',
        '_recipe',
        '_view',
        '_region',
        '_served',
        '__weakref__',
    )

    def __init__(self, tensor: Tensor, region: 'Region') -> None:
        self._tensor: Optional[Tensor] = tensor
        self._version = tensor._version
        self._recipe: Optional[Recipe] = None
        self._view: Any = None
        self._region = region
        self._served = False

    def replace(self, recipe: Recipe, strides: Tuple[int, ...]) -> Tensor:
        """Hold the recipe of the tensor, or of what it is a view of, instead.

        Args:
            recipe (Recipe): What to hold.
            strides (tuple): In memory, of what the recipe makes.

        Returns:
            Tensor: what was held.
        """
        t = self._tensor
        assert t is not None
        self._view = t.size(), t.stride(), t.storage_offset(), strides
        self._recipe, self._tensor = recipe, None
        recipe.awaited += 1
        return t

    def holds(self, tensor: Tensor, version: int) -> bool:
        """Whether it is this tensor, all of it, at this version, that is held."""
        t = self._tensor
        return (
            t is not None
            and self._version == version
            and t.dtype == tensor.dtype
            and t.size() == tensor.size()
            and t.stride() == tensor.stride()
            and t.storage_offset() == tensor.storage_offset()
        )

    @property
    def held(self) -> Optional[Tensor]:
        """The tensor, where it is held."""
        return self._tensor

    def tensor(self) -> Tensor:
        """The tensor, as it was saved.

        Raises:
            RuntimeError: if something has been written into it since.
        """
        t = self._tensor
        if t is not None:
            if t._version != self._version:
                # what autograd itself would see without hooks
                raise RuntimeError(
                    f'one of the variables needed for gradient computation has been '
                    f'modified by an inplace operation: a {t.dtype} tensor of shape '
                    f'{list(t.shape)} is at version {t._version}; expected version '
                    f'{self._version} instead'
                )
            return t
        size, stride, offset, strides = self._view
        recipe = self._recipe
        assert recipe is not None
        base = self._region.made(recipe, self._take())
        if base.stride() != strides:
            laid = torch.empty_strided(
                base.shape, strides, dtype=base.dtype, device=base.device
            )
            base = laid.copy_(base)
        if (base.size(), base.stride(), base.storage_offset()) == self._view[:3]:
            return base
        return base.as_strided(size, stride, offset)

    def _take(self) -> bool:
        """Whether others, which have not asked yet, will ask for the same."""
        assert self._recipe is not None
        if not self._served:
            self._served = True
            self._recipe.awaited -= 1
        return self._recipe.awaited > 0

    def __del__(self) -> None:
        recipe = self._recipe
        if recipe is not None and not self._served:
            recipe.awaited -= 1
            if not recipe.awaited:
                self._region.forget(recipe)


class _Living(NamedTuple):
    """A tensor that there is a recipe of."""

    tensor: 'ref[Tensor]'
    version: int
    recipe: Recipe


class _Pending(NamedTuple):
    """An activation that is being computed."""

    living: Optional[_Living]  # what it is of
    key: int
    recipe: ActivationRecipe
    unknown: List[Kept]  # what autograd has kept of it that is none of these


# -- regions -----------------------------------------------------------------


class Region:
    """Where autograd is handed recipes. Each thread has its own.

    Attributes:
        is_open (bool): Whether it is, in some thread.
        counts (bool): Whether bytes are added up.
        spared (int): Bytes that recipes stand for.
        kept (dict): Bytes that are kept, by storage.
    """

    def __init__(self) -> None:
        self.counts = False
        self.spared = 0
        self.kept: Dict[int, int] = {}
        self.is_open = False
        self._living: Dict[int, _Living] = {}
        # what was last kept without a recipe, by storage
        self._held: Dict[int, ref[Kept]] = {}
        self._pending: Optional[_Pending] = None
        # what a recipe has made that will be asked for again, and a part of it
        self._made: Optional[Tuple[Recipe, Tensor]] = None
        self._made_part: Optional[Tuple[Recipe, Tensor]] = None
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, _unpack)

    # -- where it begins and ends --------------------------------------------

    def open(self) -> bool:
        """Begin; False where that cannot be, or it has begun."""
        global watching
        if _stack.region is not None or is_transforming():
            return False
        with _lock:
            if self.is_open:  # in another thread
                return False
            self.is_open = True
            watching += 1
        try:
            self._hooks.__enter__()
        except BaseException:
            self._leave()
            raise
        _stack.region = self
        return True

    def close(self) -> None:
        """End what :meth:`open` has begun."""
        self._hooks.__exit__()
        _stack.region = None
        self._living.clear()
        self._held.clear()
        self._pending = None
        self._leave()

    def _leave(self) -> None:
        global watching
        with _lock:
            self.is_open = False
            watching -= 1

    # -- what is followed ----------------------------------------------------

    def follow(self, tensor: Tensor, recipe: Recipe) -> None:
        """Know how to compute a fresh tensor again, as long as it lives."""
        key = storage_of(tensor)
        living = self._living

        def forget(gone: 'ref[Tensor]') -> None:
            entry = living.get(key)
            if entry is not None and entry.tensor is gone:
                del living[key]

        living[key] = _Living(ref(tensor, forget), tensor._version, recipe)

    def find(self, tensor: Tensor) -> Optional[_Living]:
        """What is known of a whole tensor; None if that is nothing."""
        if not _is_plain(tensor):
            return None
        living = self._living.get(storage_of(tensor))
        if living is None or living.tensor() is not tensor:
            return None
        return living if living.version == tensor._version else None

    def activate(
        self, x: Tensor, activation: Activation, compute: Callable[[], Tensor]
    ) -> Tensor:
        """Compute an activation, and follow the result if ``x`` is followed."""
        source = self.find(x)
        if source is None or self._pending is not None:
            return compute()
        recipe = ActivationRecipe(source.recipe, activation)
        key = storage_of(x)
        self._pending = pending = _Pending(source, key, recipe, [])
        try:
            z = compute()
        finally:
            self._pending = None
        if type(z) is not Tensor or z.shape != x.shape or z.dtype != x.dtype:
            return z
        of_z = storage_of(z)
        if of_z == key and z._version != source.version + 1:
            return z
        for kept in pending.unknown:
            t = kept.held
            assert t is not None
            if storage_of(t) == of_z:
                self._spare(kept, recipe, z.stride())
            elif of_z == key and activation.keeps_copy and t.shape == x.shape:
                # autograd took it of x before that was overwritten
                self._spare(kept, source.recipe, t.stride())
        self.follow(z, recipe)
        return z

    def add(self, a: Tensor, b: Tensor, compute: Callable[[], Tensor]) -> Tensor:
        """Compute a sum, and follow the result if one of them is followed and
        the other is kept, or followed too."""
        first, second = self._part(a), self._part(b)
        known = first is not None and second is not None
        if known and not isinstance(first, Recipe):
            first, second = second, first
        version = a._version if known else 0
        z = compute()
        if (
            not known
            or not isinstance(first, Recipe)
            or type(z) is not Tensor
            or not z.shape == a.shape == b.shape
            or not z.dtype == a.dtype == b.dtype
        ):
            return z
        assert second is not None
        if z is a:
            overwrites = self._part(a, version) is first
            if not overwrites or z._version != version + 1:
                return z
        recipe = SumRecipe(first, second, self.part)
        if recipe.depth <= _DEPTH:
            self.follow(z, recipe)
        return z

    def _part(
        self, tensor: Any, version: Optional[int] = None
    ) -> 'Union[Recipe, Kept, None]':
        """How to have a tensor, at some version, in the backward pass."""
        if not _is_plain(tensor):
            return None
        if version is None:
            version = tensor._version
        key = storage_of(tensor)
        living = self._living.get(key)
        if living and living.tensor() is tensor and living.version == version:
            return living.recipe
        held = self._held.get(key)
        kept = held() if held is not None else None
        return kept if kept is not None and kept.holds(tensor, version) else None

    # -- what autograd asks --------------------------------------------------

    def pack(self, tensor: Tensor) -> Kept:
        """What autograd keeps of a tensor that it saves."""
        kept = Kept(tensor, self)
        if tensor.layout is not torch.strided:  # sparse ones have no storage
            return kept
        key = storage_of(tensor)
        living, pending = self._living.get(key), self._pending
        if self.counts:
            self.kept[key] = tensor.untyped_storage().nbytes()
        if living is None:
            self._held[key] = ref(kept)
            if pending is not None:
                pending.unknown.append(kept)
            return kept
        base = living.tensor()
        if base is not None and _is_part(tensor, base, key):
            if tensor._version == living.version:
                self._spare(kept, living.recipe, base.stride())
                return kept
            if (
                pending is not None
                and pending.key == key
                and tensor._version == living.version + 1
            ):
                # what an activation has just written over its argument
                self._spare(kept, pending.recipe, base.stride())
                return kept
        self._held[key] = ref(kept)
        return kept

    def _spare(self, kept: Kept, recipe: Recipe, strides: Tuple[int, ...]) -> None:
        tensor = kept.replace(recipe, strides)
        if self.counts:
            self.kept.pop(storage_of(tensor), None)
            if recipe.awaited == 1:  # the first
                self.spared += tensor.untyped_storage().nbytes()

    def made(self, recipe: Recipe, again: bool) -> Tensor:
        """What a recipe makes, kept as long as it is the last of those that will
        be asked for again."""
        value = self._at_hand(recipe)
        if value is None:
            if again:
                self._made = None  # before there is another
            with torch.no_grad():
                value = _plainly(recipe)
        self.forget(recipe)
        if again:
            self._made = recipe, value
        return value

    def part(self, recipe: Recipe) -> Tensor:
        """What a recipe makes as a part of another, kept as long as it is the
        last such part and will be asked for itself."""
        value = self._at_hand(recipe)
        if value is None:
            value = recipe.compute()
            if recipe.awaited:
                self._made_part = recipe, value
        return value

    def _at_hand(self, recipe: Recipe) -> Optional[Tensor]:
        for last in (self._made, self._made_part):
            if last is not None and last[0] is recipe:
                return last[1]
        return None

    def forget(self, recipe: Recipe) -> None:
        """Drop what is kept of what a recipe has made."""
        if self._made is not None and self._made[0] is recipe:
            self._made = None
        if self._made_part is not None and self._made_part[0] is recipe:
            self._made_part = None


def _unpack(kept: Kept) -> Tensor:
    return kept.tensor()


def _plainly(recipe: Recipe) -> Tensor:
    """Compute, whatever autocast would make of it."""
    kinds = [kind for kind in ('cpu', 'cuda') if is_autocast_enabled(kind)]
    if not kinds:
        return recipe.compute()
    off: List[ContextManager] = [torch.autocast(k, enabled=False) for k in kinds]
    for context in off:
        context.__enter__()
    try:
        return recipe.compute()
    finally:
        for context in off:
            context.__exit__(None, None, None)


def _is_plain(value: Any) -> bool:
    """Whether something is a tensor that a recipe may be of."""
    return (
        type(value) is Tensor
        and not value.is_inference()
        and value.layout is torch.strided
    )


def storage_of(tensor: Tensor) -> int:
    """What tells a storage from others as long as it lives."""
    return tensor.untyped_storage()._cdata


def _is_part(tensor: Tensor, base: Tensor, key: int) -> bool:
    """Whether a tensor of the storage ``key`` is ``base``, or a view of it, whose
    values are its."""
    return (
        type(tensor) is Tensor
        and tensor.dtype == base.dtype
        and not tensor.is_neg()
        and storage_of(base) == key
    )


class _Stack(threading.local):
    region: Optional[Region] = None


_stack = _Stack()
_lock = threading.Lock()
#: How many regions are open, of all threads: nothing is asked where none is.
watching = 0


def current() -> Optional[Region]:
    """The region that is open in this thread."""
    return _stack.region
