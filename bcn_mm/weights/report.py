"""What is said about reading other layouts: once per model, not per layer."""

import logging
from typing import Optional

from mmengine.logging import print_log

from .norm_layouts import INNER

_READING = {
    'BatchNorm': "BatchNorm's layout (it goes into the batch stage; the "
    'channel stage restores the scale and offset of each group)',
    'GroupNorm': "GroupNorm's layout (an approximation: its affine pairs go "
    'into the batch stage, the channel stage restores the scale and offset '
    'of each group, estimates start at 0 and 1)',
    'authors': "the authors' layout",
}
_UNMARKED = {
    'BatchNorm': 'the checkpoint is of a BatchNorm model and does not say '
    'that it was trained with weight standardization: unless it was, its '
    'convolutions have other weights in this model (dialect={0!r}) and need '
    'training',
    'GroupNorm': 'the checkpoint does not say whether it was trained with '
    "weight standardization; it is read as dialect={0!r} (mmcv's ConvWS, and "
    "so jhu/*_gn_ws, is 'std')",
    'authors': 'the checkpoint does not say its dialect of weight '
    "standardization; it is read as {0!r} (the authors' ImageNet models are "
    "'var', their detection and DeepLab models 'std'; "
    'tools/model_converters/authors_to_mm.py writes it down)',
}


class LoadReport:
    """What the layers of one ``load_state_dict`` say about it, once.

    Args:
        missing_keys (list): The list that torch hands all layers of the call.
    """

    def __init__(self, missing_keys: list) -> None:
        self.missing_keys = missing_keys
        self._layout: Optional[str] = None
        self._dialect: Optional[str] = None
        self._warned = False

    def norm(self, layout: str) -> None:
        """A BCN was read from the state of another layout.

        Args:
            layout (str): As :func:`.norm_layouts.layout_of` calls it.
        """
        if self._layout is None:
            self._layout = 'authors' if layout in INNER else layout
            _log(
                f'BCN: the checkpoint is in {_READING[self._layout]}; reading '
                f'it into the stages of every BCN layer that it has a norm for'
            )
        self._warn_of_dialect()

    def conv(self, dialect: str) -> None:
        """A WSConv of this dialect was read from a state that names none."""
        self._dialect = dialect
        self._warn_of_dialect()

    def _warn_of_dialect(self) -> None:
        if self._layout and self._dialect and not self._warned:
            self._warned = True
            _log(f'WSConv: {_UNMARKED[self._layout].format(self._dialect)}')


def _log(text: str) -> None:
    print_log(text, logger='current', level=logging.INFO)


_latest: Optional[LoadReport] = None


def load_report(missing_keys: list) -> LoadReport:
    """The report of the ``load_state_dict`` that a layer takes part in.

    Args:
        missing_keys (list): As handed to the layer. All layers of one call
            get the same list, and no two calls do while it is referenced.

    Returns:
        LoadReport: the same one for all layers of a call.
    """
    global _latest
    if _latest is None or _latest.missing_keys is not missing_keys:
        _latest = LoadReport(missing_keys)
    return _latest
