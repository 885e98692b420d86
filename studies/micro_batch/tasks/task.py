"""What every task offers, and what one training of it is."""

import abc
import argparse
import math
from pathlib import Path
from typing import NamedTuple, Sequence

from ..norms import NORMS


class Run(NamedTuple):
    """One training; its record holds all of this."""

    task: str
    norm: str
    images: int
    seed: int
    epochs: int
    pictures: int  # trained on in an epoch
    rate: float  # of learning
    shift: int = 0  # in pixels, of digits
    held_out: int = 0  # pictures of the training set that are not trained on

    @property
    def name(self) -> str:
        """Of its files: no two runs share them."""
        norm = self.norm.replace('=', '-').replace(',', '_')
        shift = f'_m{self.shift}' if self.shift else ''
        return (
            f'{self.task}_{norm}_{self.images}_r{self.rate:g}_e{self.epochs}_'
            f'p{self.pictures}of{self.pictures + self.held_out}{shift}_s{self.seed}'
        )

    @property
    def steps(self) -> int:
        return self.epochs * math.ceil(self.pictures / self.images)


class Extent(NamedTuple):
    """Which runs a study of a task has, unless it is told otherwise."""

    epochs: int
    norms: Sequence[str] = tuple(NORMS)
    images: Sequence[int] = (1, 2, 4, 8, 16)
    seeds: int = 3


class Task(abc.ABC):
    """What networks are trained on, one with every norm.

    Attributes:
        name (str): What the command line and records call it.
        title (str): What it is, in the picture and the tables.
        error (str): What is measured there.
        full (Extent): Of a study.
        quick (Extent): Of one with ``--quick``.
        norms (sequence[str]): That it can be asked for.
        rate (float): The learning rate at one image per step, and
        power (float): with what power of their number it grows.
        step_cost (float): About how many seconds a step takes,
        image_cost (float): and every image in it.
        holdout (int): One in so many pictures of the training set, the last
            ones, is held out where a learning rate is to be chosen; 0 for none,
            where what is measured is how well the training set is fitted.
        shifts (bool): Whether images are moved by up to ``Run.shift`` pixels.
        settings (sequence[str]): Of ``Norm.settings``, those that it heeds.
    """

    name: str
    title: str
    error: str
    full: Extent
    quick: Extent
    norms: Sequence[str] = tuple(NORMS)
    rate: float
    power: float
    step_cost: float
    image_cost: float
    holdout = 6
    shifts = False
    settings: Sequence[str] = ()

    @abc.abstractmethod
    def prepare(self, args: argparse.Namespace) -> None:
        """Have the data where this process and its children find them.

        Raises:
            InputError: if that cannot be done.
        """

    @abc.abstractmethod
    def pictures(self, args: argparse.Namespace) -> int:
        """How many the training set has, of data that are prepared."""

    @abc.abstractmethod
    def train(self, run: Run, folder: Path) -> dict:
        """Train a network, and test it.

        The ``run.pictures`` first pictures of the training set are trained
        on, and the ``run.held_out`` behind them are not.

        Args:
            run (Run): Of this task.
            folder (Path): For logs; made if it is needed.

        Returns:
            dict: ``error``; ``held``, the same on the pictures held out, if
            there are any; and what else the record is to hold.
        """

    def cost(self, run: Run) -> float:
        """About how many seconds a run takes."""
        return run.steps * (self.step_cost + run.images * self.image_cost)
