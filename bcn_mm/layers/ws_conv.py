"""Weight-standardized convolutions."""

import torch
from mmengine.registry import MODELS
from torch import Tensor, nn

from ..ops import check_dialect, standardize_weight
from .layouts import loading

#: Under this name the metadata of a state dict holds a layer's dialect.
METADATA = 'ws_dialect'


class _WSConv:
    """What the three convolutions share; a mixin for ``nn.ConvNd``."""

    def __init__(
        self, *args, eps: float = 1e-5, dialect: str = 'std', **kwargs
    ) -> None:
        check_dialect(dialect)
        super().__init__(*args, **kwargs)
        if self.weight[0].numel() < 2:
            raise ValueError(
                f'{type(self).__name__}: a filter of one weight (in_channels='
                f'{self.in_channels}, groups={self.groups}, kernel_size='
                f'{self.kernel_size}) would be standardized to zero; use a '
                f'plain convolution there'
            )
        self.eps = eps
        self.dialect = dialect
        self._cached = None

    def standardized_weight(self) -> Tensor:
        """The weight that the convolution is computed with.

        In evaluation mode, where no gradient is asked for, it is computed
        once and kept until the weight changes, as far as autograd's version
        counter can tell; after an edit through ``.data``, which torch does
        not count, call ``eval()`` again.
        """
        weight = self.weight
        if (
            self.training
            or (torch.is_grad_enabled() and weight.requires_grad)
            or weight.is_inference()  # these have no version counter
            or torch.compiler.is_compiling()
            or torch.jit.is_tracing()
        ):
            return standardize_weight(weight, self.eps, self.dialect)
        state = (weight._version, self.eps, self.dialect)
        if self._cached is not None:
            parameter, memory, then, value = self._cached
            if (
                weight is parameter
                and weight.is_set_to(memory)
                and state == then
            ):
                return value
        with torch.inference_mode(False), torch.no_grad():
            value = standardize_weight(weight, self.eps, self.dialect)
        self._cached = weight, weight.detach(), state, value
        return value

    def train(self, mode: bool = True):
        self._cached = None
        return super().train(mode)

    def _apply(self, *args, **kwargs):  # .to(), .half(), .cuda()
        self._cached = None
        return super()._apply(*args, **kwargs)

    def __getstate__(self) -> dict:
        # copies and pickles start without it
        return {**self.__dict__, '_cached': None}

    def forward(self, x: Tensor) -> Tensor:
        """Convolve ``x`` with the standardized weight."""
        return self._conv_forward(x, self.standardized_weight(), self.bias)

    def extra_repr(self) -> str:
        return (
            f'{super().extra_repr()}, eps={self.eps}, dialect={self.dialect!r}'
        )

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # beside the version, which torch and mmengine both put there
        destination._metadata[prefix[:-1]][METADATA] = self.dialect

    def _load_from_state_dict(
        self,
        state_dict,
        prefix,
        local_metadata,
        strict,
        missing_keys,
        unexpected_keys,
        error_msgs,
    ):
        trained = local_metadata.get(METADATA)
        if trained is None:
            if prefix + 'weight' in state_dict:
                loading.conv(missing_keys, self.dialect)
        elif trained != self.dialect:
            # not among the error messages, which mmengine's loader logs
            # before it goes on with the wrong network
            raise RuntimeError(
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
    layer of another dialect is a RuntimeError.

    Source: arXiv:1903.10520v2; see :func:`bcn_mm.ops.standardize_weight`.

    Args:
        *args, **kwargs: Those of ``nn.Conv2d``.
        eps (float): Of the standardization. Default: 1e-5.
        dialect (str): ``'std'`` (mmcv, the authors' detection and DeepLab
            code), ``'var'`` (the authors' ImageNet code) or ``'biased_var'``
            (timm, Big Transfer). Default: ``'std'``.

    Raises:
        ValueError: if the dialect is unknown or a filter has one weight only.

    Example:
        >>> conv = WSConv2d(3, 8, 3, padding=1)
        >>> conv(torch.randn(1, 3, 5, 5)).shape
        torch.Size([1, 8, 5, 5])
    """


@MODELS.register_module()
class WSConv3d(_WSConv, nn.Conv3d):
    """``nn.Conv3d`` with Weight Standardization; see :class:`WSConv2d`."""
