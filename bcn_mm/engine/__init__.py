"""What a program around mmengine's runner needs.

- :mod:`.batches`: random training batches for the model of a config.
- :mod:`.cli`: arguments, configs and pictures that a user gives.
- :mod:`.launch`: the runner, on every launcher, with GPUs or without.
- :mod:`.progress`: the bar that long commands show.
"""
