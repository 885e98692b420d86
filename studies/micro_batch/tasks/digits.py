"""scikit-learn's digits, and a small classifier of them."""

import argparse
from pathlib import Path
from typing import Iterator, Tuple

import numpy as np
import torch
from mmcv.cnn import ConvModule
from torch import nn

from bcn_mm import BCN
from bcn_mm.errors import InputError

from ..norms import Norm, parse_norm
from .task import Extent, Run, Task

# Of the 1,797 digits, that many are trained on.
TRAINED = 1000


class Digits(Task):
    """The error on the 797 pictures not trained on, in percent."""

    name = 'digits'
    title = 'digits, small CNN'
    error = 'test error (%)'
    full = Extent(epochs=30)
    quick = Extent(epochs=3, seeds=2)
    rate, power = 0.00625, 1
    step_cost, image_cost = 5e-3, 5e-4
    shifts = True
    settings = ('follow_lr',)

    def prepare(self, args: argparse.Namespace) -> None:
        digits()

    def pictures(self, args: argparse.Namespace) -> int:
        return TRAINED

    def train(self, run: Run, folder: Path) -> dict:
        torch.set_num_threads(1)
        torch.manual_seed(run.seed)
        pictures, classes = digits()
        norm = parse_norm(run.norm)
        model = classifier(norm).train()
        following = {
            layer: layer.momentum
            for layer in model.modules()
            if norm.settings.get('follow_lr') and isinstance(layer, BCN)
        }
        optimizer = torch.optim.SGD(
            model.parameters(),
            lr=run.rate,
            momentum=0.9,
            weight_decay=1e-4,
        )
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, run.steps)
        used = slice(run.pictures)
        for shown, true in batches(run, pictures[used], classes[used]):
            for layer, momentum in following.items():
                layer.momentum = momentum * schedule.get_last_lr()[0] / run.rate
            loss = nn.functional.cross_entropy(model(shown), true)
            if not loss.isfinite():
                return dict(error=100.0, held=100.0, diverged=True)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        model.eval()

        @torch.no_grad()
        def wrong(which: slice) -> float:
            found = model(pictures[which]).argmax(1)
            return 100 * (found != classes[which]).double().mean().item()

        result = dict(error=wrong(slice(TRAINED, None)))
        if run.held_out:
            result['held'] = wrong(slice(run.pictures, run.pictures + run.held_out))
        return result


def digits() -> Tuple[torch.Tensor, torch.Tensor]:
    """1,797 pictures (N, 1, 8, 8) of values 0 to 1, and their classes."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as e:
        raise InputError(
            "the digits come with scikit-learn: pip install -e '.[study]'"
        ) from e
    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    pictures = torch.from_numpy(data.images[order]).float().div_(16)
    return pictures.unsqueeze(1), torch.from_numpy(data.target[order])


def classifier(norm: Norm) -> nn.Sequential:
    """A network of four convolutions with this norm."""

    def conv(cin, cout, stride=1):
        return ConvModule(
            cin,
            cout,
            3,
            stride,
            1,
            norm_cfg=norm.norm_cfg,
            conv_cfg=norm.conv_cfg,
        )

    return nn.Sequential(
        # one channel of nine values, which WS would leave eight
        ConvModule(1, 32, 3, 1, 1, norm_cfg=norm.norm_cfg),
        conv(32, 64, 2),
        conv(64, 64),
        conv(64, 128, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(128, 10),
    )


def batches(
    run: Run, pictures: torch.Tensor, classes: torch.Tensor
) -> Iterator[Tuple[torch.Tensor, torch.Tensor]]:
    """What is trained on, step by step: every picture once in an epoch, moved
    at random by up to ``run.shift`` pixels down or up and to either side."""
    size = pictures.shape[-1]
    padded = nn.functional.pad(pictures, [run.shift] * 4)
    places = padded.unfold(2, size, 1).unfold(3, size, 1)
    for _ in range(run.epochs):
        for chosen in torch.randperm(len(pictures)).split(run.images):
            down, right = torch.randint(places.shape[2], (2, len(chosen)))
            yield places[chosen, :, down, right], classes[chosen]
