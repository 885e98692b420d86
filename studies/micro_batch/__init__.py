"""Error against images per step, for norms in the same small networks.

A task (``tasks/``) is what networks with one of the norms (``norms.py``) are
trained on. ``plan.py`` makes runs of what the command line (``__main__.py``) asks
for; ``training.py`` performs those that ``records.py`` does not know, mmengine's
in processes of their own (``children.py``, ``child.py``, ``parts.py``), and
``report.py`` shows all of them.
"""
