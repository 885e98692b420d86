"""What changes with the pictures of a batch: rates, and what counts batches.

The law is that of mmengine's ``auto_scale_lr``: a batch that is f times as large
has f times the rate, in every parameter group and at every step.
"""

import inspect
import re
from fractions import Fraction
from typing import Any, Iterator, Optional, Set, Tuple

import torch
from mmengine.config import Config

from .context import Context
from .tree import walk
from .types import type_name

#: From here on mmengine means forever.
_FOREVER = 10**9
_RATE = re.compile(r'(^|_)(lrs?|learning_rates?)(_|$)')
#: What is relative to a rate is none itself.
_RELATIVE = re.compile(r'mult|ratio|factor|decay|scale')
_ADAPTIVE = re.compile('Ada|Lamb|Lion|RMSprop')
#: Optimizers that find their rate, and multiply it by ``lr``.
_FINDS_RATE = re.compile('DAdapt|Prodigy')


def scale_batch_size(
    context: Context, cfg: Config, batch_size: int, keep_epochs: bool = False
) -> None:
    """Set the images per GPU, and what is proportional to them.

    Args:
        context (Context): Learns what was scaled, and which rates were not.
        cfg (Config): Is changed.
        batch_size (int): Images per GPU.
        keep_epochs (bool): Whether what counts batches, such as ``max_iters``
            and the schedulers that go by iterations, is stretched so that
            training sees as many pictures as before. Default: False.

    Raises:
        ValueError: if the config has none, mixes sources in a batch, or
            ``batch_size`` is not positive.
    """
    loader = cfg.get('train_dataloader')
    before = loader.get('batch_size') if isinstance(loader, dict) else None
    if not isinstance(before, int):
        raise ValueError('batch_size: the config has no train_dataloader')
    if batch_size < 1:
        raise ValueError(f'batch_size must be positive, got {batch_size}')
    if batch_size == before:
        return
    if 'source_ratio' in (loader.get('sampler') or {}):
        raise ValueError(
            'batch_size: this config mixes sources in each batch (sampler.'
            'source_ratio); set both by hand'
        )
    context.change(loader, 'batch_size', batch_size, 'train_dataloader')
    factor = Fraction(batch_size, before)
    rates = _Rates(context, factor)
    rates.scale_optimizers(cfg.get('optim_wrapper') or {})
    for path, scheduler in _schedulers(cfg.get('param_scheduler')):
        rates.scale_scheduler(scheduler, path)
    rates.scale_hooks(cfg)
    rates.scale_base(cfg.get('auto_scale_lr') or {})
    counts = _Counts(context, 1 / factor)
    if keep_epochs:
        counts.stretch(cfg)
    else:
        counts.name(cfg)


def _schedulers(node: Any, path: str = 'param_scheduler') -> Iterator[Tuple[str, dict]]:
    """The schedulers of one optimizer, or of several by their names."""
    if isinstance(node, dict) and 'type' in node:
        yield path, node
    elif isinstance(node, dict):
        for name, value in node.items():
            yield from _schedulers(value, f'{path}.{name}')
    elif isinstance(node, (list, tuple)):
        for i, value in enumerate(node):
            yield from _schedulers(value, f'{path}.{i}')


def _hooks(cfg: Config) -> Iterator[Tuple[str, dict]]:
    for name in ('default_hooks', 'custom_hooks'):
        yield from walk(cfg.get(name), name)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _are_numbers(value: Any) -> bool:
    """Whether a setting is a number, or several."""
    if isinstance(value, (list, tuple)):
        return bool(value) and all(map(_is_number, value))
    return _is_number(value)


def _is_rate(key: Any, value: Any) -> bool:
    """Whether a setting looks like a rate that is not relative to another."""
    key = str(key)
    return bool(_RATE.search(key) and not _RELATIVE.search(key) and _are_numbers(value))


class _Once:
    """Changes each setting once, of dicts that stand in several places too."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self._done: Set[Tuple[int, str]] = set()

    def first(self, node: dict, key: str) -> bool:
        new = (id(node), key) not in self._done
        self._done.add((id(node), key))
        return new


class _Rates(_Once):
    """Rates, times the factor of the batch size.

    Args:
        context (Context): Of the conversion.
        factor (Fraction): New batch size by old one.
    """

    def __init__(self, context: Context, factor: Fraction) -> None:
        super().__init__(context)
        self.factor = factor
        self.note = f'times {float(factor):g}'
        self._explained = False

    def scale(self, node: dict, key: str, path: str) -> None:
        """Scale a number, or a list of numbers; others are none."""
        value: Any = node.get(key)
        if not _are_numbers(value) or not self.first(node, key):
            return
        factor = float(self.factor)
        if isinstance(value, (list, tuple)):
            value = type(value)(v * factor for v in value)
        else:
            value = value * factor
        self.context.change(node, key, value, path, self.note)

    def name_others(self, node: dict, path: str, why: str) -> None:
        """Name the rates of a dict that were not scaled."""
        for key, value in node.items():
            if _is_rate(key, value) and self.first(node, key):
                self.context.keep(f'{path}.{key}', value, f'not scaled: {why}')

    def scale_optimizers(self, wrapper: dict) -> None:
        """Scale the rates of one optimizer, or of several by their names."""
        found = False
        for path, node in list(walk(wrapper, 'optim_wrapper')):
            optimizer = node.get('optimizer')
            if isinstance(optimizer, dict):
                found = True
                self._scale_optimizer(optimizer, f'{path}.optimizer')
            paramwise = node.get('paramwise_cfg') or {}
            for key, group in (paramwise.get('custom_keys') or {}).items():
                # beside lr_mult, what it holds goes into the parameter group
                where = f'{path}.paramwise_cfg.custom_keys.{key}'
                if isinstance(group, dict):
                    self.scale(group, 'lr', where)
        for path, node in walk(wrapper, 'optim_wrapper'):
            self.name_others(node, path, 'it is unknown what it is for')
        if not found:
            self.context.keep(
                'optim_wrapper', wrapper or None, 'no optimizer to scale the rate of'
            )

    def _scale_optimizer(self, optimizer: dict, path: str) -> None:
        name = type_name(optimizer)
        lr = optimizer.get('lr')
        if not self.first(optimizer, 'type'):
            return
        if _FINDS_RATE.search(name) or ('lr' in optimizer and not _is_number(lr)):
            self.first(optimizer, 'lr')
            why = f'not scaled: {name} finds the rate by itself'
            self.context.keep(f'{path}.lr', lr, why)
            return
        more = ''
        if lr is None:
            lr = _default_rate(optimizer)
            if lr is None:
                why = f'not scaled: the default of {name} is unknown'
                self.context.keep(f'{path}.lr', None, why)
                return
            more = f', of the default {lr:g}'
        if _ADAPTIVE.search(name) and not self._explained:
            self._explained = True
            root = float(self.factor) ** 0.5
            more += (
                f'; linear as --auto-scale-lr is, for {name} and its kin the '
                f'square root (times {root:.3g}) is often advised'
            )
        self.first(optimizer, 'lr')
        lr = lr * float(self.factor)
        self.context.change(optimizer, 'lr', lr, path, self.note + more)

    def scale_scheduler(self, scheduler: dict, path: str) -> None:
        """Scale what a scheduler of rates has that is not relative."""
        name = type_name(scheduler)
        kind = scheduler.get('param_name', 'lr' if 'LR' in name else '')
        if kind == 'lr':
            for key in ('eta_min', 'eta_max', 'min_value'):
                self.scale(scheduler, key, path)
            if 'Plateau' in name:  # smaller changes of the rate are none
                self.scale(scheduler, 'eps', path)
        elif not kind and not re.search('Momentum|WeightDecay', name):
            for key in ('eta_min', 'eta_max'):
                value = scheduler.get(key)
                if _are_numbers(value) and value:
                    why = f'not scaled: it is unknown what {name} sets'
                    self.context.keep(f'{path}.{key}', value, why)
        self.name_others(scheduler, path, f'it is unknown what {name} does with it')

    def scale_hooks(self, cfg: Config) -> None:
        """Scale the rates that hooks are known to set; name others."""
        for path, hook in _hooks(cfg):
            if type_name(hook) == 'SimSiamHook':  # of the predictor
                self.scale(hook, 'lr', path)
            self.name_others(hook, path, 'it is unknown what the hook does with it')

    def scale_base(self, scale: dict) -> None:
        """Scale the batch size that the rates are meant for.

        ``--auto-scale-lr`` multiplies rates by the real batch size over this
        one, which mmengine takes as a float: rounded, it would make the rate
        another one.
        """
        base: Any = scale.get('base_batch_size')
        if _is_number(base):
            exact = Fraction(base) * self.factor
            value = int(exact) if exact.denominator == 1 else float(exact)
            self.context.change(
                scale, 'base_batch_size', value, 'auto_scale_lr', self.note
            )


def _default_rate(optimizer: dict) -> Optional[float]:
    """The rate that an optimizer of torch has by default; None if unknown."""
    kind = optimizer.get('type')
    if not inspect.isclass(kind):
        kind = getattr(torch.optim, type_name(kind), None)
    if not inspect.isclass(kind):
        return None
    parameter = inspect.signature(kind).parameters.get('lr')
    default = parameter.default if parameter else None
    return default if _is_number(default) else None


class _Counts(_Once):
    """What counts batches, times what there are more of them.

    Args:
        context (Context): Of the conversion.
        factor (Fraction): New number of batches in an epoch by old one.
    """

    def __init__(self, context: Context, factor: Fraction) -> None:
        super().__init__(context)
        self.factor = factor
        self.note = f'times {float(factor):g}, as many pictures as before'

    def name(self, cfg: Config) -> None:
        """Say that training sees other numbers of pictures, if so."""
        loop, loader = cfg.get('train_cfg') or {}, cfg.train_dataloader
        for node, key, path in (
            (loop, 'max_iters', 'train_cfg'),
            (loader, 'num_batch_per_epoch', 'train_dataloader'),
        ):
            if _is_number(node.get(key)):
                self.context.keep(
                    f'{path}.{key}',
                    node[key],
                    f'training now sees {float(1 / self.factor):g} times as many '
                    f'pictures; --keep-epochs stretches what counts iterations '
                    f'(this: to {self._count(node[key])})',
                )

    def stretch(self, cfg: Config) -> None:
        """Stretch the loop, the schedulers and the hooks that go by iterations."""
        self._stretch(cfg.train_dataloader, 'num_batch_per_epoch', 'train_dataloader')
        loop = cfg.get('train_cfg') or {}
        if 'max_iters' in loop:
            for key in ('max_iters', 'val_interval', 'val_begin', 'dynamic_intervals'):
                self._stretch(loop, key, 'train_cfg')
        for path, scheduler in _schedulers(cfg.get('param_scheduler')):
            # by validations, not by iterations
            if 'Plateau' not in type_name(scheduler):
                self._stretch_scheduler(scheduler, path)
        for path, hook in _hooks(cfg):
            self._stretch_hook(hook, path)

    def _count(self, value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return type(value)(map(self._count, value))
        if not _is_number(value) or value <= 0 or value >= _FOREVER:
            return value
        return max(1, round(Fraction(value) * self.factor))

    def _stretch(self, node: dict, key: str, path: str) -> None:
        if node.get(key) is not None and self.first(node, key):
            value = self._count(node[key])
            self.context.change(node, key, value, path, self.note)

    def _stretch_scheduler(self, scheduler: dict, path: str) -> None:
        if scheduler.get('by_epoch', True):
            return
        new = self.first(scheduler, 'type')
        for key in ('begin', 'end', 'T_max', 'step_size', 'total_steps'):
            self._stretch(scheduler, key, path)
        for key in ('milestones', 'periods'):
            self._stretch(scheduler, key, path)
        begin = scheduler.get('begin', 0)
        if new and scheduler.get('end', _FOREVER) <= begin:  # rounded together
            self.context.change(scheduler, 'end', begin + 1, path, self.note)
        if new and 'Exponential' in type_name(scheduler):
            gamma: Any = scheduler.get('gamma')
            if _is_number(gamma):  # the same over as many pictures
                gamma = gamma ** float(1 / self.factor)
                note = f'to the power of {float(1 / self.factor):g}'
                self.context.change(scheduler, 'gamma', gamma, path, note)

    def _stretch_hook(self, hook: dict, path: str) -> None:
        name = type_name(hook)
        if name == 'CheckpointHook' and hook.get('by_epoch') is False:
            for key in ('interval', 'save_begin'):
                self._stretch(hook, key, path)
        if name.endswith('EMAHook'):
            self._stretch(hook, 'begin_iter', path)
        for key, value in hook.items():
            by_iteration = re.search(r'(^|_)iters?(_|$)', str(key))
            given = value and _are_numbers(value)
            if by_iteration and given and self.first(hook, key):
                why = 'not stretched: it is unknown what the hook does with it'
                self.context.keep(f'{path}.{key}', value, why)
