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
    pictures: int  # in an epoch
    rate: float  # of learning
    shift: int = 0  # in pixels, of digits

    @property
    def name(self) -> str:
        norm = self.norm.replace('=', '-').replace(',', '_')
        return f'{self.task}_{norm}_{self.images}_s{self.seed}'

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
    """What networks are trained on from scratch, one with every norm.

    Attributes:
        name (str): What the command line and records call it.
        title (str): What it is, in the picture and the tables.
        error (str): What is measured there.
        full (Extent): Of a study.
        quick (Extent): Of one with ``--quick``.
        rate (float): The learning rate at one image per step, and
        power (float): with what power of their number it grows.
        step_cost (float): About how many seconds a step takes,
        image_cost (float): and every image in it.
        shifts (bool): Whether images are moved by up to ``Run.shift`` pixels.
        follows_lr (bool): Whether ``Norm.follow_lr`` is heeded.
    """

    name: str
    title: str
    error: str
    full: Extent
    quick: Extent
    rate: float
    power: float
    step_cost: float
    image_cost: float
    shifts = False
    follows_lr = False

    @abc.abstractmethod
    def prepare(self, args: argparse.Namespace) -> None:
        """Have the data where this process and its children find them.

        Raises:
            InputError: if that cannot be done.
        """

    @abc.abstractmethod
    def pictures(self, args: argparse.Namespace) -> int:
        """How many are trained on in an epoch, of data that are prepared."""

    @abc.abstractmethod
    def train(self, run: Run, folder: Path) -> dict:
        """Train a network, and test it.

        Args:
            run (Run): Of this task.
            folder (Path): For logs; made if it is needed.

        Returns:
            dict: ``error``, and what else the record is to hold.
        """

    def cost(self, run: Run) -> float:
        """About how many seconds a run takes."""
        return run.steps * (self.step_cost + run.images * self.image_cost)
