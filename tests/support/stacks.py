"""Which of the stacks the tests run on."""

from importlib.metadata import distributions

#: Whether these are the packages of OpenMMLab's maintained fork.
IS_FORK = any(d.metadata['Name'] == 'onedl-mmengine' for d in distributions())
