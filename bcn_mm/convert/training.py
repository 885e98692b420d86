"""What a converted config says beside its model."""

from mmengine.config import Config, ConfigDict

from .context import Context
from .new_style import is_new_style
from .types import type_name

_HOOK = 'SyncEstimatesHook'


def add_package(context: Context, cfg: Config) -> None:
    """Import bcn_mm, and add the hook that its norms need among ranks."""
    imports = cfg.get('custom_imports') or {}
    names = imports.get('imports') or []
    names = [names] if isinstance(names, str) else list(names)
    if 'bcn_mm' not in names and not is_new_style(cfg):  # which imports types
        if imports:
            context.change(imports, 'imports', names + ['bcn_mm'], 'custom_imports')
        else:
            context.change(cfg, 'custom_imports', ConfigDict(imports=['bcn_mm']), '')
    hooks = list(cfg.get('custom_hooks') or [])
    if all(type_name(hook) != _HOOK for hook in hooks):
        hooks.append(ConfigDict(type=_HOOK))
        context.change(cfg, 'custom_hooks', hooks, '')


def scale_batch_size(context: Context, cfg: Config, batch_size: int) -> None:
    """Set the images per GPU, and what is proportional to them.

    Raises:
        ValueError: if the config has none, mixes sources in a batch, or
            ``batch_size`` is not positive.
    """
    loader = cfg.get('train_dataloader')
    if not isinstance(loader, dict) or 'batch_size' not in loader:
        raise ValueError('batch_size: the config has no train_dataloader')
    if batch_size < 1:
        raise ValueError(f'batch_size must be positive, got {batch_size}')
    factor = batch_size / loader.batch_size
    if factor == 1:
        return
    if 'source_ratio' in (loader.get('sampler') or {}):
        raise ValueError(
            'batch_size: this config mixes sources in each batch (sampler.'
            'source_ratio); set both by hand'
        )
    context.change(loader, 'batch_size', batch_size, 'train_dataloader')
    note = f'times {factor:g}'
    optimizer = (cfg.get('optim_wrapper') or {}).get('optimizer') or {}
    if 'lr' in optimizer:
        lr = optimizer.lr * factor
        context.change(optimizer, 'lr', lr, 'optim_wrapper.optimizer', note)
    schedulers = cfg.get('param_scheduler') or []
    if isinstance(schedulers, dict):
        schedulers = [schedulers]
    for i, scheduler in enumerate(schedulers):
        if scheduler.get('eta_min') and 'Momentum' not in scheduler.type:
            eta_min = scheduler.eta_min * factor
            path = f'param_scheduler.{i}'
            context.change(scheduler, 'eta_min', eta_min, path, note)
    scale = cfg.get('auto_scale_lr') or {}
    if 'base_batch_size' in scale:
        base = max(1, round(scale.base_batch_size * factor))
        context.change(scale, 'base_batch_size', base, 'auto_scale_lr', note)
