"""What networks are trained on: a task is an object, and a file for its kind."""

from .digits import Digits
from .photos import Photos
from .shapes import Detection, Segmentation
from .street import Street
from .task import Extent, Run, Task
from .weights import DetectionWeights, SmallCropWeights, StreetWeights

#: By name, in the order in which they are shown.
TASKS = {
    task.name: task
    for task in (
        Digits(),
        Detection(),
        Segmentation(),
        Street(),
        Photos(),
        StreetWeights(),
        SmallCropWeights(),
        DetectionWeights(),
    )
}

__all__ = ['TASKS', 'Extent', 'Run', 'Task']
