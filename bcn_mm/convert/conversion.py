"""The steps from a stock config to a BCN config."""

import copy
import inspect
from typing import List, Optional, Sequence

from mmengine.config import Config, ConfigDict
from mmengine.registry import Registry

from ..layers import BCN
from .components import convert_components
from .context import Change, Context
from .model import convert_by_model, in_scope
from .new_style import is_new_style, use_classes
from .pretrained import convert_checkpoints
from .rates import scale_batch_size
from .training import add_package
from .tree import PARTS, find_detector
from .types import type_name


def to_bcn(
    cfg: Config,
    norm_cfg: Optional[dict] = None,
    ws: bool = False,
    only: Optional[Sequence[str]] = None,
    batch_size: Optional[int] = None,
    pretrained: Optional[str] = None,
    changes: Optional[List[Change]] = None,
    keep_epochs: bool = False,
) -> Config:
    """Make a BCN config of any config of mmdet, mmsegmentation or their kin.

    Every BatchNorm, SyncBN and GroupNorm that the model's config names, or
    that a component takes by its constructor's default, becomes BCN, with the
    ``eps`` that its config gives (of BatchNorm and of GroupNorm), so that
    weights which were trained with it still fit, and without affine
    parameters where it has none. Norms of other kinds stay, and subclasses
    with a ``forward`` of their own, which may do more than normalize. Further:

    - a component that builds norms without asking its config is built
      through :func:`bcn_mm.layers.WithBCN`;
    - a head that pyramid levels share gets an estimate for each of them
      (``num_levels``);
    - ``norm_eval`` is turned off, and ``frozen_stages`` unless weights of
      BatchNorm stay, or ``pretrained`` names some that were trained with BCN;
    - checkpoints in ``init_cfg``, ``pretrained`` and ``load_from`` go where
      convolutions are standardized that were not; those of BatchNorm models
      load otherwise, those of GroupNorm models approximately;
    - bcn_mm is imported and :class:`~bcn_mm.hooks.SyncEstimatesHook` added.

    The last two of the first three are found out by building the model,
    without weights, and passing a picture through it. Converting a converted
    config changes nothing.

    Args:
        cfg (Config): Left as it is.
        norm_cfg (dict, optional): What replaces the norms, ``type='BCN'``
            unless it says otherwise; norms that are BCN already take over
            what it says. Default: ``dict(type='BCN')``.
        ws (bool): Whether the convolutions of the components whose norms are
            replaced become weight-standardized. Default: False.
        only (Sequence[str], optional): The parts to convert, of
            ``'backbone'``, ``'neck'``, ``'heads'`` and ``'other'``. Default:
            all.
        batch_size (int, optional): Images per GPU. The learning rates and the
            batch size that they are meant for are scaled by the same factor.
            Default: as in ``cfg``.
        pretrained (str, optional): A checkpoint of the backbone, trained with
            BCN. Default: None.
        changes (list, optional): Receives a :class:`Change` for everything
            that was changed, or left alone for a reason.
        keep_epochs (bool): Whether, with another ``batch_size``, what counts
            iterations (the loop, schedulers, hooks) is stretched so that
            training sees as many pictures as before. Default: False.

    Returns:
        Config: The converted copy.

    Raises:
        ValueError: if the config has no model, ``norm_cfg`` is of no BCN,
            ``only`` names no part, ``batch_size`` does not fit the config or
            ``pretrained`` not its backbone.

    Example:
        >>> from bcn_mm.convert import read_config, to_bcn
        >>> cfg = read_config('mmdet::retinanet/retinanet_r50_fpn_1x_coco.py')
        >>> to_bcn(cfg).model.backbone.norm_cfg
        {'type': 'BCN'}
    """
    unknown = set(only or ()) - set(PARTS)
    if unknown:
        raise ValueError(
            f'unknown part {", ".join(sorted(unknown))}; choose among '
            f'{", ".join(PARTS)}'
        )
    if 'model' not in cfg:
        raise ValueError('the config has no model')
    cfg = copy.deepcopy(cfg)
    with in_scope(cfg) as registry:
        asked, norm_cfg = norm_cfg or {}, _complete(norm_cfg, registry)
        detector = find_detector(cfg.model, 'model')[0]
        loads = bool(cfg.get('load_from') or detector.get('pretrained'))
        context = Context(registry, norm_cfg, asked, ws, only, pretrained, loads)
        convert_components(context, cfg.model, 'model')
        node, path = find_detector(cfg.model, 'model')
        convert_checkpoints(context, cfg, node, path)
        convert_by_model(context, node, path)
        if context.norms:
            add_package(context, cfg)
        if cfg.get('work_dir'):
            note = 'the same as without BCN; --work-dir takes another one'
            context.keep('work_dir', cfg.work_dir, note)
        if is_new_style(cfg):
            use_classes(cfg)
    if batch_size is not None:
        scale_batch_size(context, cfg, batch_size, keep_epochs)
    if changes is not None:
        changes += context.changes
    return cfg


def _complete(norm_cfg: Optional[dict], registry: Registry) -> ConfigDict:
    """What replaces the norms, its type checked."""
    norm_cfg = ConfigDict({'type': 'BCN', **(norm_cfg or {})})
    kind, name = norm_cfg.type, type_name(norm_cfg)
    if isinstance(kind, str):
        kind = registry.get(kind)
    if not (inspect.isclass(kind) and issubclass(kind, BCN)):
        what = 'no BCN' if kind else 'not registered'
        raise ValueError(
            f'norm_cfg: {name} is {what}; its type must be BCN or SyncBCN, or a '
            f'subclass that the config imports'
        )
    return norm_cfg
