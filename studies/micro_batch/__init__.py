"""Error against images per step, for norms in the same small networks.

A task (``tasks/``) is what networks with one of the norms (``norms.py``) are
trained on. The command line (``__main__.py``) says which runs are wanted;
``training.py`` performs those that ``records.py`` does not know, and
``report.py`` shows all of them.
"""
