"""Studies with bcn_mm; from the folder above, ``python -m studies.NAME --help``."""

from pathlib import Path

#: The repository: paths of its configs and tools start here.
ROOT = Path(__file__).resolve().parents[1]
