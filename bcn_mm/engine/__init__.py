"""What a program around mmengine's runner needs.

- :mod:`.cli`: arguments, configs and pictures that a user gives.
- :mod:`.launch`: the runner, on every launcher, with GPUs or without.
"""
