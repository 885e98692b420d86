"""A hook for the tests: what training really starts from."""

import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS


@HOOKS.register_module()
class DumpState(Hook):
    def __init__(self, path):
        self.path = path

    def before_train(self, runner):
        torch.save(
            dict(
                model=runner.model.state_dict(),
                optimizer=runner.optim_wrapper.state_dict(),
                iter=runner.iter,
                epoch=runner.epoch,
            ),
            self.path,
        )
