"""Every config of installed packages, converted to BCN.

From the command line (``__main__.py``) a survey goes through the configs of the
zoo (``zoo.py``) in worker processes (``workers.py``). These compare the models
before and after the conversion (``conversion.py``) and train both
(``training.py``); ``survey.py`` keeps the results, ``report.py`` makes tables of
them.
"""
