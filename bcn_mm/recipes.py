"""The recipes that come with bcn_mm, by name."""

import difflib
import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, List, Optional

if TYPE_CHECKING:
    from mmengine.config import Config
    from torch import nn

_CONFIGS = Path(__file__).parent / '.mim' / 'configs'
# recipes once more, in mmengine's new style
_EXAMPLES = 'new_style'


def _recipes() -> Dict[str, str]:
    """Name of each config -> its path below configs/."""
    return {
        path.stem: path.relative_to(_CONFIGS).as_posix()
        for path in sorted(_CONFIGS.glob('*/*.py'))
        if not path.parent.name.startswith('_') and path.parent.name != _EXAMPLES
    }


def list_models(pattern: str = '*') -> List[str]:
    """The names of the recipes.

    Args:
        pattern (str): Which, with ``*`` and ``?``. Default: all.

    Returns:
        list[str]: sorted; each fits :func:`get_config` and :func:`get_model`.

    Example:
        >>> list_models('retinanet*bcn-ws*')
        ['retinanet_r50_fpn_bcn-ws-all_1x_coco']
    """
    return sorted(fnmatch.filter(_recipes(), pattern))


def get_config(name: str) -> 'Config':
    """The config of a recipe.

    The same as ``mmengine.hub.get_config('bcn_mm::FOLDER/NAME.py')``, without
    the folder.

    Args:
        name (str): One of :func:`list_models`.

    Raises:
        ValueError: if there is no such recipe; names those that are near.

    Example:
        >>> get_config('retinanet_r50_fpn_bcn-ws-all_1x_coco').model.type
        'RetinaNet'
    """
    from mmengine.config import Config

    recipes = _recipes()
    if name not in recipes:
        near = difflib.get_close_matches(name, recipes, 3, 0.4)
        raise ValueError(
            f'there is no recipe {name!r}'
            + (f'; did you mean {", ".join(near)}?' if near else '')
            + ' bcn_mm.list_models() names all'
        )
    return Config.fromfile(_CONFIGS / recipes[name])


def get_model(name: str, cfg_options: Optional[Dict[str, Any]] = None) -> 'nn.Module':
    """The model of a recipe, from random weights.

    Args:
        name (str): One of :func:`list_models`.
        cfg_options (dict, optional): Settings of the config to override, as
            ``--cfg-options`` does: ``{'model.backbone.depth': 101}``.

    Raises:
        ValueError: if there is no such recipe.

    Example:
        >>> model = get_model('retinanet_r50_fpn_bcn-ws-all_1x_coco')
    """
    from mmengine.registry import MODELS, DefaultScope

    cfg = get_config(name)
    cfg.merge_from_dict(cfg_options or {})
    if 'data_preprocessor' in cfg:
        cfg.model.setdefault('data_preprocessor', cfg.data_preprocessor)
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        return MODELS.build(cfg.model)
