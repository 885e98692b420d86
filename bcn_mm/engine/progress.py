"""The bar that long commands show."""

from typing import Any

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


def progress_bar(*columns: ProgressColumn, **options: Any) -> Progress:
    """What is done, how much of how much, and how long it took and will take.

    Args:
        *columns: What follows them.
        **options: Those of :class:`rich.progress.Progress`.
    """
    return Progress(
        TextColumn('{task.description}'),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        *columns,
        **options,
    )
