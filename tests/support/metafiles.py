"""Has mmengine read the metafiles of mmdet and mmseg once, not for every base."""

import functools
from contextlib import suppress

from mmengine.config import utils
from mmengine.utils import get_installed_path

utils.load = functools.lru_cache(maxsize=None)(utils.load)
for package in ('mmdet', 'mmsegmentation'):
    with suppress(Exception):  # it is not installed, or has no such config
        utils._get_cfg_metainfo(get_installed_path(package), 'none')
