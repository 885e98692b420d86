"""The networks of the authors' code, written down as plainly as possible.

Evaluation only, in their names of modules, for checking converted weights.
Nothing here is shared with the package.
"""

import torch
import torch.nn.functional as F
from support.reference import standardize
from torch import nn

BLOCKS = {18: (2, 2, 2, 2), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}


class Norm(nn.Module):
    def __init__(self, channels, inner='pbn'):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, 32, 1))
        self.bias = nn.Parameter(torch.zeros(1, 32, 1))
        self.inner = inner
        self.add_module(inner, nn.BatchNorm2d(channels))

    def forward(self, x):
        z = getattr(self, self.inner)(x)
        groups = z.reshape(len(x), 32, -1)
        mean = groups.mean(2, keepdim=True)
        var = ((groups - mean) ** 2).mean(2, keepdim=True)
        y = (groups - mean) / torch.sqrt(var + 1e-5)
        return (self.weight * y + self.bias).reshape(x.shape)


class Conv(nn.Conv2d):
    def __init__(self, cin, cout, kernel, dialect, **kwargs):
        padding = kernel // 2 * kwargs.get('dilation', 1)
        super().__init__(cin, cout, kernel, padding=padding, bias=False, **kwargs)
        self.dialect = dialect

    def forward(self, x):
        weight = standardize(self.weight, self.dialect)
        return self._conv_forward(x, weight, None)


class Block(nn.Module):
    def __init__(
        self,
        cin,
        planes,
        dialect,
        inner,
        basic,
        stride,
        dilation,
        groups,
        base,
        first,
    ):
        super().__init__()
        out = planes if basic else planes * 4
        width = planes * base // 64 * groups
        self.count = 2 if basic else 3
        middle = dict(stride=stride, dilation=dilation, groups=groups)
        if basic:
            self.conv1 = Conv(cin, out, 3, dialect, stride=stride)
            self.conv2 = Conv(out, out, 3, dialect)
            widths = out, out
        else:
            self.conv1 = Conv(cin, width, 1, dialect)
            self.conv2 = Conv(width, width, 3, dialect, **middle)
            self.conv3 = Conv(width, out, 1, dialect)
            widths = width, width, out
        for i, channels in enumerate(widths, 1):
            self.add_module(f'bn{i}', Norm(channels, inner))
        self.downsample = nn.Sequential()
        if first and (stride > 1 or dilation > 1 or cin != out):
            self.downsample = nn.Sequential(
                Conv(cin, out, 1, dialect, stride=stride), Norm(out, inner)
            )

    def forward(self, x):
        y = x
        for i in range(1, self.count + 1):
            y = getattr(self, f'bn{i}')(getattr(self, f'conv{i}')(y))
            y = F.relu(y) if i < self.count else y
        return F.relu(y + self.downsample(x))


class Backbone(nn.Module):
    """Returns the outputs of the four stages."""

    def __init__(
        self,
        depth,
        dialect='var',
        inner='pbn',
        groups=1,
        base=64,
        deeplab=False,
        classes=None,
    ):
        super().__init__()
        basic = depth < 50
        self.conv1 = Conv(3, 64, 7, dialect, stride=2)
        self.bn1 = Norm(64, inner)
        cin = 64
        for stage, blocks in enumerate(BLOCKS[depth]):
            planes = 64 * 2**stage
            dilated = deeplab and stage == 3
            stride = 1 if stage == 0 or dilated else 2
            layer = nn.Sequential()
            for i in range(blocks):
                layer.append(
                    Block(
                        cin,
                        planes,
                        dialect,
                        inner,
                        basic,
                        stride if i == 0 else 1,
                        2 if dilated and i else 1,
                        groups,
                        base,
                        i == 0,
                    )
                )
                cin = planes if basic else planes * 4
            self.add_module(f'layer{stage + 1}', layer)
        if classes:
            self.fc = nn.Linear(cin, classes)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        outs = []
        for i in range(1, 5):
            x = getattr(self, f'layer{i}')(x)
            outs.append(x)
        return tuple(outs)


class Head(nn.Module):
    def __init__(self, cin, classes, dialect, inner):
        super().__init__()
        for i, dilation in enumerate((1, 6, 12, 18, 1), 1):
            kernel = 1 if i in (1, 5) else 3
            conv = Conv(cin, 256, kernel, dialect, dilation=dilation)
            self.add_module(f'aspp{i}', conv)
            self.add_module(f'aspp{i}_bn', Norm(256, inner))
        self.conv2 = Conv(1280, 256, 1, dialect)
        self.bn2 = Norm(256, inner)
        self.conv3 = nn.Conv2d(256, classes, 1)

    def forward(self, x):
        outs = []
        for i in range(1, 6):
            y = x.mean((2, 3), keepdim=True) if i == 5 else x
            y = getattr(self, f'aspp{i}')(y)
            outs.append(F.relu(getattr(self, f'aspp{i}_bn')(y)))
        outs[4] = outs[4].expand_as(outs[0])
        return self.conv3(F.relu(self.bn2(self.conv2(torch.cat(outs, 1)))))


class DeepLab(Backbone):
    def __init__(self, depth, classes=21, dialect='std', inner='pbn'):
        super().__init__(depth, dialect, inner, deeplab=True)
        cin = 512 if depth < 50 else 2048
        self.aspp = Head(cin, classes, dialect, inner)

    def forward(self, x):
        """The logits at the resolution of the features, and upsampled."""
        logits = self.aspp(super().forward(x)[-1])
        full = F.interpolate(
            logits, size=x.shape[2:], mode='bilinear', align_corners=True
        )
        return logits, full


def randomize(net):
    """Numbers of a sensible scale, different in every entry."""
    for name, value in net.state_dict().items():
        if name.endswith('running_var'):
            value.uniform_(0.5, 2)
        elif name.endswith('num_batches_tracked'):
            value.fill_(1234)
        elif value.dim() == 1 or value.dim() == 3:
            value.normal_(0, 0.2)
            value += name.endswith('weight')
        else:
            value.normal_(0.01, (2 / value[0].numel()) ** 0.5)
    net.eval()
    return net
