"""The passes from torch's ordinary operators: the contract and the fallback.

A normalization whose statistics are known is ``y = A (x - m) + B`` with one
triple per row, a row being one (sample, channel) and m its mean. Tensors of
full size are ``(N, C, *spatial)``, contiguous or channels-last; results keep
the layout of ``x``. What a backend overrides is either the four functions or
the passes that they are made of.
"""

from typing import TYPE_CHECKING, Iterator, Optional, Sequence, Tuple, Union

import torch
from torch import Tensor

from .. import stages
from .._compat import addcmul_into
from ..layout import broadcast_rows, compute_dtype, flat
from ..stages import Affine, Batch, InputGradient, Moments, Spec, Sums

if TYPE_CHECKING:
    from ..estimates import Rule, Running

#: Scale and at_mean, (N, C) each, as one tensor or two.
Coefficients = Union[Tensor, Tuple[Tensor, Tensor]]
# Elements that may be copied at once: 64 MiB of float32.
_PORTION = 1 << 24


class Eager:
    """Ordinary operators, used in ordinary ways, for every device and dtype.

    Copies of ``x`` in the dtype of statistics are made of a portion at a time.
    """

    #: Whether ``forward`` and ``backward`` make a whole pass in one call, the
    #: algebra and the move of the estimates included (README.md).
    fused = False
    #: Whether it is the CPU's own.
    on_cpu = False

    def __repr__(self) -> str:
        return f'{type(self).__name__}()'

    def serves(self, x: Tensor) -> bool:
        """Whether this backend can make the passes over ``x``."""
        return True

    def objection(self, x: Tensor) -> str:
        """Why this backend is not to be taken for what it is made for, if so.

        May try the backend out. ``auto`` says it once and takes the next one.
        """
        return ''

    # -- the contract --------------------------------------------------------

    def moments(self, x: Tensor) -> Moments:
        """Mean and biased variance of every row.

        Args:
            x (Tensor): Dense, of shape ``(N, C, *spatial)`` with L > 0 spatial
                elements, any floating dtype.

        Returns:
            Moments: float64 for float64 input and float32 otherwise.
        """
        rows = flat(x)
        if rows.shape[2] == 1:  # every value is its row's mean
            mean = rows[:, :, 0].to(compute_dtype(x), copy=True)
            return Moments(mean, torch.zeros_like(mean), False)
        return self._moments(rows, compute_dtype(x))

    def normalize(
        self,
        x: Tensor,
        moments: Moments,
        batch: Batch,
        affine: Affine,
        spec: Spec,
    ) -> Tensor:
        """Both stages: a fresh tensor of the shape, dtype and layout of x."""
        coef = stages.forward(moments, batch, affine, spec)
        return self.apply(x, moments, coef, spec.relu)

    def apply(
        self,
        x: Tensor,
        moments: Moments,
        coef: Coefficients,
        relu: bool = False,
        other: Optional[Tensor] = None,
    ) -> Tensor:
        """What :meth:`normalize` makes of the result of :func:`.stages.forward`.

        Equal, bit for bit, for equal arguments: a pass is computed again from
        what it wrote down.

        Args:
            coef (Tensor or tuple): scale and at_mean of every row.
            relu (bool): Whether a ReLU is the last. Default: False.
            other (Tensor, optional): Of the shape and dtype of x; is added before
                the ReLU.
        """
        scale, at_mean = coef
        if _has_single_values(x):
            y = torch.empty_like(x).copy_(at_mean.view(x.shape))
        else:
            y = self._apply(x, moments, scale, at_mean)
        if other is not None:
            y.add_(other)
        return y.relu_() if relu else y

    def _through_relu(
        self,
        dy: Tensor,
        x: Tensor,
        moments: Moments,
        batch: Batch,
        affine: Affine,
        spec: Spec,
    ) -> Tensor:
        """The gradient of what the ReLU is of, which is computed again."""
        if not spec.relu:
            return dy
        y = self.normalize(x, moments, batch, affine, spec._replace(relu=False))
        return torch.where(y <= 0, 0, dy)

    def backward_reduce(
        self,
        dy: Tensor,
        x: Tensor,
        moments: Moments,
        batch: Batch,
        affine: Affine,
        spec: Spec,
    ) -> Sums:
        """The gradients of the parameters, and what dx is made of.

        With ``spec.relu``, ``affine`` must have the bias of the forward pass.
        """
        dy = self._through_relu(dy, x, moments, batch, affine, spec)
        dy_sum, moment = self._reduce(dy, x, moments.mean)
        length = x.shape[2:].numel()
        return stages.backward_reduce(
            dy_sum, moment, length, moments, batch, affine, spec
        )

    def backward_input(
        self,
        dy: Tensor,
        x: Tensor,
        sums: Sums,
        moments: Moments,
        batch: Batch,
        affine: Affine,
        spec: Spec,
    ) -> Tensor:
        """The gradient of x: a fresh tensor, in the layout of x."""
        dy = self._through_relu(dy, x, moments, batch, affine, spec)
        length = x.shape[2:].numel()
        gradient = stages.backward_input(sums, length, moments, batch)
        if _has_single_values(x):
            at_mean = gradient.at_mean
            return torch.empty_like(x).copy_(at_mean.view(x.shape))
        return self._apply_add(dy, x, moments, gradient)

    # -- the same in one call each, for those that are fused ----------------

    def forward(
        self,
        x: Tensor,
        running: 'Running',
        rule: 'Rule',
        affine: Affine,
        spec: Spec,
        batch: Optional[Tensor] = None,
        repeats: bool = False,
        coef: Optional[Tensor] = None,
    ) -> Tuple[Tensor, Tuple[Tensor, ...]]:
        """``moments``, the move of the estimates and ``normalize``.

        For a pass that is of this process alone.

        Args:
            batch (Tensor, optional): (2, C), float64: mean and 1 / std that the
                batch stage normalizes with are written there.
            repeats (bool): Whether they are read from there instead, and
                nothing moves.
            coef (Tensor, optional): (2, N, C), of the dtype of statistics: scale
                and at_mean of every row are written there, for :meth:`apply`.

        Returns:
            tuple: y, and what :meth:`backward` needs beside x: at most 4
            values for every row. The first is a tensor that begins with the
            means and the variances of all rows.
        """
        raise NotImplementedError

    def backward(
        self,
        dy: Tensor,
        x: Tensor,
        saved: Sequence[Tensor],
        affine: Affine,
        rule: 'Rule',
        spec: Spec,
        needs_dx: bool,
    ) -> Tuple[Optional[Tensor], Affine]:
        """``backward_reduce`` and, if dx is needed, ``backward_input``.

        ``affine`` has the bias of the forward pass if ``spec.relu``, else None.

        Returns:
            tuple: dx or None, and the gradients of the parameters. That of a
            bias which is not given is given too where there is a weight.
        """
        raise NotImplementedError

    # -- weight standardization ----------------------------------------------

    def standardize(
        self, weight: Tensor, eps: float, unbiased: bool, under_root: bool
    ) -> Tuple[Tensor, Tuple[Tensor, ...]]:
        """Standardize every filter; see :func:`.standardize_weight`.

        Args:
            weight (Tensor): ``(out, ...)``, float32 or float64.
            eps (float): Added to the variance or to its root.
            unbiased (bool): Whether the variance is that of a sample.
            under_root (bool): Whether eps is added to it, not to its root.

        Returns:
            tuple: the result, in the layout of ``weight``, and what
            :meth:`standardize_backward` needs beside the weight.
        """
        axes, fan = tuple(range(1, weight.dim())), weight[0].numel()
        var, mean = torch.var_mean(weight, axes, correction=int(unbiased), keepdim=True)
        # the result is gain (w - mean), and slope / (fan - unbiased) is
        # -2 times the derivative of gain by the sum of (w - mean)^2
        if under_root:
            gain = (var + eps).rsqrt()
            slope = gain.pow(3)
        else:
            std = var.sqrt()
            gain = (std + eps).reciprocal()
            # a filter without variance has no direction to grow in
            slope = (gain.square() / std).masked_fill(std == 0, 0)
        result = (weight - mean).mul_(gain)
        return result, (mean, gain, slope / (fan - unbiased))

    def standardize_backward(
        self,
        grad: Tensor,
        weight: Tensor,
        saved: Sequence[Tensor],
        unbiased: bool,
        under_root: bool,
    ) -> Tensor:
        """The gradient of the weight."""
        mean, gain, slope = saved
        axes = tuple(range(1, weight.dim()))
        centred = weight - mean
        along = (grad * centred).sum(axes, keepdim=True)
        grad = grad * gain - centred.mul_(slope * along)
        return grad - grad.mean(axes, keepdim=True)

    # -- the passes ----------------------------------------------------------

    def _moments(self, rows: Tensor, dtype: torch.dtype) -> Moments:
        """Of rows (N, C, L)."""
        if rows.dtype == dtype:
            var, mean = torch.var_mean(rows, dim=2, correction=0)
            return Moments(mean, var)
        mean, var = rows.new_empty(2, *rows.shape[:2], dtype=dtype)
        for part, m, v in _portions(rows, mean, var):
            v_part, m_part = torch.var_mean(part.to(dtype), dim=2, correction=0)
            m.copy_(m_part)
            v.copy_(v_part)
        return Moments(mean, var)

    def _apply(
        self, x: Tensor, moments: Moments, scale: Tensor, at_mean: Tensor
    ) -> Tensor:
        """The fresh tensor ``scale * (x - mean) + at_mean``, row by row.

        Where all values of a row are equal, so are those of the result, and
        equal to ``at_mean``.
        """
        y = torch.empty_like(x)
        rows = (t.unsqueeze(2) for t in (moments.mean, scale, at_mean))
        for part, out, m, a, b in _portions(flat(x), flat(y), *rows):
            addcmul_into(b, part - m, a, out=out)
        return y

    def _reduce(self, dy: Tensor, x: Tensor, mean: Tensor) -> Tuple[Tensor, Tensor]:
        """Row sums of ``dy`` and of ``dy * (x - mean)``, both (N, C)."""
        dy, x, mean = flat(dy), flat(x), mean.unsqueeze(2)
        total = dy.sum(dim=2, dtype=mean.dtype)
        centred = torch.empty_like(total)
        for d, part, m, out in _portions(dy, x, mean, centred):
            out.copy_((part - m).mul_(d).sum(dim=2))
        return total, centred

    def _apply_add(
        self, dy: Tensor, x: Tensor, moments: Moments, g: InputGradient
    ) -> Tensor:
        """:meth:`_apply` for two tensors; see :class:`InputGradient`."""
        dx = torch.empty_like(x)
        rows = (g.dy_mean, moments.mean, g.dy_scale, g.x_scale, g.at_mean)
        for out, d, part, *known in _portions(
            *map(flat, (dx, dy, x)), *(t.unsqueeze(2) for t in rows)
        ):
            d_m, m, d_a, a, b = known
            part = torch.addcmul(b, part - m, a)
            addcmul_into(part, d - d_m, d_a, out=out)
        return dx


class Functional(Eager):
    """The same without a write into memory, for compilers and torch.func.

    They see no devices and no portions, and fuse what they find.
    """

    def _moments(self, rows: Tensor, dtype: torch.dtype) -> Moments:
        var, mean = torch.var_mean(rows.to(dtype), dim=2, correction=0)
        return Moments(mean, var)

    def _apply(
        self, x: Tensor, moments: Moments, scale: Tensor, at_mean: Tensor
    ) -> Tensor:
        mean, scale, at_mean = broadcast_rows(x, moments.mean, scale, at_mean)
        return torch.addcmul(at_mean, x - mean, scale).to(x.dtype)

    def _reduce(self, dy: Tensor, x: Tensor, mean: Tensor) -> Tuple[Tensor, Tensor]:
        dy, x = flat(dy), flat(x)
        total = dy.sum(dim=2, dtype=mean.dtype)
        return total, (x - mean.unsqueeze(2)).mul_(dy).sum(dim=2)

    def _apply_add(
        self, dy: Tensor, x: Tensor, moments: Moments, g: InputGradient
    ) -> Tensor:
        rows = broadcast_rows(x, moments.mean, *g)
        mean, dy_mean, dy_scale, x_scale, at_mean = rows
        out = torch.addcmul(at_mean, x - mean, x_scale)
        return torch.addcmul(out, dy - dy_mean, dy_scale).to(x.dtype)


class Empty(Eager):
    """Of tensors without an element: nothing is the sum of nothing."""

    def moments(self, x: Tensor) -> Moments:
        mean, var = x.new_zeros(2, 0, x.shape[1], dtype=compute_dtype(x))
        return Moments(mean, var, False)

    def normalize(
        self,
        x: Tensor,
        moments: Moments,
        batch: Batch,
        affine: Affine,
        spec: Spec,
    ) -> Tensor:
        return torch.empty_like(x)

    def backward_reduce(
        self,
        dy: Tensor,
        x: Tensor,
        moments: Moments,
        batch: Batch,
        affine: Affine,
        spec: Spec,
    ) -> Sums:
        zeros = (
            None if p is None else torch.zeros_like(p)
            for p in (*affine[:3], affine.weight)
        )
        along = torch.zeros_like(batch.mean), torch.zeros_like(batch.mean)
        return Sums(Affine(*zeros), along, None)

    def backward_input(
        self,
        dy: Tensor,
        x: Tensor,
        sums: Sums,
        moments: Moments,
        batch: Batch,
        affine: Affine,
        spec: Spec,
    ) -> Tensor:
        return torch.zeros_like(x)


def _portions(*tensors: Tensor) -> Iterator[Tuple[Tensor, ...]]:
    """Split tensors of (N, C, ...) alike, the first into portions."""
    if tensors[0].numel() <= _PORTION:
        yield tensors
        return
    channels, length = tensors[0].shape[1:]
    count = max(1, _PORTION // length)  # rows in a portion
    whole = max(1, count // channels)  # samples in it
    for samples in zip(*(t.split(whole) for t in tensors)):
        if count >= channels:
            yield samples
        else:
            yield from zip(*(t.split(count, 1) for t in samples))


def _has_single_values(x: Tensor) -> bool:
    """Whether every row is one value, and so its own mean."""
    return x.shape[2:].numel() == 1
