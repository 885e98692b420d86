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
