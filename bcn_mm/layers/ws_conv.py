"""Weight-standardized convolutions."""

from typing import Any, Dict, List

from mmengine.registry import MODELS
from torch import Tensor, nn

from ..errors import DialectError
from ..ops import check_dialect, standardize_weight
from ..weights.norm_layouts import State
from ..weights.report import load_report

#: Under this name the metadata of a state dict holds a layer's dialect.
METADATA = 'ws_dialect'


class _WSConv:
    """What the three convolutions share; a mixin for ``nn.ConvNd``."""

    def __init__(
        self, *args: Any, eps: float = 1e-5, dialect: str = 'std', **kwargs: Any
    ) -> None:
        check_dialect(dialect)
        super().__init__(*args, **kwargs)
        if not self.weight.numel():
            raise ValueError(
                f'{type(self).__name__}: in_channels={self.in_channels} and '
                f'out_channels={self.out_channels} must be positive'
            )
        if self.weight[0].numel() < 2:
            raise ValueError(
                f'{type(self).__name__}: a filter of one weight (in_channels='
                f'{self.in_channels}, groups={self.groups}, kernel_size='
                f'{self.kernel_size}) would be standardized to zero; use a '
                f'plain convolution there'
            )
        self.eps = eps
        self.dialect = dialect

    def standardized_weight(self) -> Tensor:
        """The weight that the convolution is computed with."""
        return standardize_weight(self.weight, self.eps, self.dialect)

    def forward(self, input: Tensor) -> Tensor:
        """Convolve ``input`` with the standardized weight."""
        return self._conv_forward(input, self.standardized_weight(), self.bias)

    def extra_repr(self) -> str:
        return f'{super().extra_repr()}, eps={self.eps}, dialect={self.dialect!r}'

    def _save_to_state_dict(
        self, destination: State, prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # beside the version, which torch and mmengine both put there, but not
        # into a plain dict
        metadata = getattr(destination, '_metadata', None)
        if metadata is not None:
            metadata[prefix[:-1]][METADATA] = self.dialect

    def _load_from_state_dict(
        self,
        state_dict: State,
        prefix: str,
        local_metadata: Dict[str, Any],
        strict: bool,
        missing_keys: List[str],
        unexpected_keys: List[str],
        error_msgs: List[str],
    ) -> None:
        trained = local_metadata.get(METADATA)
        if trained is None:
            if prefix + 'weight' in state_dict:
                load_report(missing_keys).conv(self.dialect)
        elif trained != self.dialect:
            # not among the error messages, which mmengine's loader logs
            # before it goes on with the wrong network
            raise DialectError(
                f'{prefix[:-1]}: the checkpoint was trained with weight '
                f'standardization dialect={trained!r}, this layer has '
                f'dialect={self.dialect!r}; set conv_cfg=dict('
                f'type={type(self).__name__!r}, dialect={trained!r})'
            )
        super()._load_from_state_dict(
            state_dict,
            prefix,
            local_metadata,
            strict,
            missing_keys,
            unexpected_keys,
            error_msgs,
        )


@MODELS.register_module()
class WSConv1d(_WSConv, nn.Conv1d):
    """``nn.Conv1d`` with Weight Standardization; see :class:`WSConv2d`."""


@MODELS.register_module()
class WSConv2d(_WSConv, nn.Conv2d):
    """``nn.Conv2d`` with Weight Standardization, ``dict(type='WSConv2d')``.

    Every filter is standardized to mean 0 and deviation 1 before it is used;
    the parameters are those of ``nn.Conv2d``, so checkpoints of plain
    convolutions and of mmcv's ``ConvWS`` load. Which dialect a model was
    trained with travels in the state dict's metadata, and loading it into a
    layer of another dialect is a :class:`bcn_mm.errors.DialectError`, which is a
    RuntimeError.

    Source: arXiv:1903.10520v2; see :func:`bcn_mm.ops.standardize_weight`.

    Args:
        *args: Those of ``nn.Conv2d``.
        **kwargs: Likewise.
        eps (float): Of the standardization. Default: 1e-5.
        dialect (str): ``'std'`` (mmcv, the authors' detection and DeepLab
            code), ``'var'`` (the authors' ImageNet code) or ``'biased_var'``
            (timm, Big Transfer). Default: ``'std'``.

    Raises:
        ValueError: if the dialect is unknown, a filter has one weight only,
            or there is none.

    Example:
        >>> conv = WSConv2d(3, 8, 3, padding=1)
        >>> conv(torch.randn(1, 3, 5, 5)).shape
        torch.Size([1, 8, 5, 5])
    """


@MODELS.register_module()
class WSConv3d(_WSConv, nn.Conv3d):
    """``nn.Conv3d`` with Weight Standardization; see :class:`WSConv2d`."""


#: All of them, for who asks what a convolution is.
WS_CONVS = (WSConv1d, WSConv2d, WSConv3d)
