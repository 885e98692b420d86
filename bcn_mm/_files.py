"""Files that are there whole or not at all."""

import json
import os
from contextlib import contextmanager
from typing import Any, Iterator, Union

_Path = Union[str, 'os.PathLike[str]']


@contextmanager
def replacing(path: _Path, suffix: str = '.part') -> Iterator[str]:
    """A draft beside a file, moved into its place when all went well.

    Args:
        path (str or PathLike): The file. Its folder is made if there is none.
        suffix (str): Of the draft's name, for writers that go by it.

    Yields:
        str: The draft's path; what is left there after an error is removed.

    Example:
        >>> with replacing('metrics.json') as draft:  # doctest: +SKIP
        ...     Path(draft).write_text('{}')
    """
    path = os.path.abspath(path)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    draft = path + suffix
    try:
        yield draft
        os.replace(draft, path)
    finally:
        if os.path.exists(draft):
            os.remove(draft)


def write_json(path: _Path, content: Any) -> None:
    """Write a JSON file, whole or not at all."""
    with replacing(path) as draft, open(draft, 'w') as file:
        file.write(json.dumps(content, indent=1) + '\n')
