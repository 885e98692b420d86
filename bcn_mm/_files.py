"""Files that are there whole or not at all."""

import os
from contextlib import contextmanager
from typing import Iterator


@contextmanager
def replacing(path: str, suffix: str = '.part') -> Iterator[str]:
    """A draft beside a file, moved into its place when all went well.

    Args:
        path (str): The file. Its folder is made if there is none.
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
