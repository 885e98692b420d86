"""Small models of convolutions and norms, that can be folded or cannot."""

from mmcv.cnn import ConvWS2d
from torch import nn
from torch.nn.utils import parametrizations

from bcn_mm import BCN, SyncBCN, WSConv1d, WSConv2d, WSConv3d


def randomize(model):
    """Nothing is identity: estimates, affine parameters, biases."""
    for layer in model.modules():
        if isinstance(layer, BCN):
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.3, 3)
            if layer.affine:
                for p in layer.parameters():
                    nn.init.uniform_(p, 0.5, 1.5)
                layer.batch_weight.data[::3] *= -1
                nn.init.normal_(layer.bias)
                nn.init.normal_(layer.batch_bias)
        elif getattr(layer, 'bias', None) is not None:
            nn.init.normal_(layer.bias)
    model.eval()  # not all of mmdet's return themselves
    return model


class Net(nn.Module):
    """Layers by name and a forward pass over them."""

    def __init__(self, forward, **layers):
        super().__init__()
        self.call = forward
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x):
        return self.call(self, x)


def chain(net, x):
    for layer in net.children():
        x = layer(x)
    return x


def seq(conv, norm, shape=(2, 4, 9, 8)):
    return Net(chain, conv=conv, norm=norm), shape


def used_twice():
    def forward(net, x):
        y = net.conv(x)
        return net.norm(y) + y

    return Net(forward, conv=WSConv2d(4, 8, 3), norm=BCN(8)), (2, 4, 9, 8)


def after_add():
    def forward(net, x):
        return net.norm(net.a(x) + net.b(x))

    return Net(forward, a=WSConv2d(4, 8, 1), b=nn.Conv2d(4, 8, 1), norm=BCN(8)), (
        2,
        4,
        9,
        8,
    )


def returned():
    def forward(net, x):
        y = net.conv(x)
        return net.norm(y), y

    return Net(forward, conv=nn.Conv2d(4, 8, 3), norm=BCN(8)), (2, 4, 9, 8)


def remembered():
    def forward(net, x):
        net.seen = net.conv(x)
        return net.norm(net.seen)

    return Net(forward, conv=nn.Conv2d(4, 8, 3), norm=BCN(8)), (2, 4, 9, 8)


def changed():
    def forward(net, x):
        return net.norm(net.conv(x).relu_())

    return Net(forward, conv=nn.Conv2d(4, 8, 3), norm=BCN(8)), (2, 4, 9, 8)


def reached_by_a_view():
    def forward(net, x):
        y = net.conv(x)
        return net.norm(y) + y.view(-1)[0]

    return Net(forward, conv=nn.Conv2d(4, 8, 3), norm=BCN(8)), (2, 4, 9, 8)


def two_convs():
    def forward(net, x):
        return net.norm(net.a(x)), net.norm(net.b(x))

    return Net(forward, a=WSConv2d(4, 8, 3), b=WSConv2d(4, 8, 3), norm=BCN(8)), (
        2,
        4,
        9,
        8,
    )


def two_norms():
    def forward(net, x):
        y = net.conv(x)
        return net.a(y), net.b(y)

    return Net(forward, conv=WSConv2d(4, 8, 3), a=BCN(8), b=BCN(8)), (
        2,
        4,
        9,
        8,
    )


def norm_of_the_input():
    def forward(net, x):
        return net.conv(net.norm(x))

    return Net(forward, conv=WSConv2d(4, 8, 3), norm=BCN(4)), (2, 4, 9, 8)


def pyramid(num_levels):
    """A head that three levels share."""

    def forward(net, x):
        return [net.norm(net.conv(x[..., ::s, ::s])) for s in (1, 2, 3)]

    norm = BCN(8, num_levels=num_levels)
    return Net(forward, conv=WSConv2d(4, 8, 3), norm=norm), (2, 4, 17, 13)


def tied():
    """Two convolutions with one weight, of which one has a norm."""

    def forward(net, x):
        return net.norm(net.a(x)) + net.b(x)

    net = Net(forward, a=nn.Conv2d(4, 8, 3), b=nn.Conv2d(4, 8, 3), norm=BCN(8))
    net.b.weight = net.a.weight
    return net, (2, 4, 9, 8)


def parametrized():
    conv = parametrizations.weight_norm(nn.Conv2d(4, 8, 3))
    return seq(conv, BCN(8))


FOLDS = {
    'plain': lambda: seq(nn.Conv2d(4, 8, 3, bias=False), BCN(8)),
    'bias': lambda: seq(nn.Conv2d(4, 8, 3), BCN(8)),
    'grouped': lambda: seq(WSConv2d(4, 8, 3, groups=2, stride=2, dilation=2), BCN(8)),
    'reflect': lambda: seq(
        WSConv2d(4, 8, 3, padding=1, padding_mode='reflect'), BCN(8)
    ),
    'var': lambda: seq(WSConv2d(4, 8, 3, dialect='var'), BCN(8)),
    'biased_var': lambda: seq(WSConv2d(4, 8, 1, dialect='biased_var'), BCN(8)),
    'mmcv': lambda: seq(ConvWS2d(4, 8, 3, padding=1), BCN(8)),
    '1d': lambda: seq(WSConv1d(4, 8, 3), BCN(8), (2, 4, 9)),
    '3d': lambda: seq(WSConv3d(4, 8, 3), BCN(8), (2, 4, 5, 6, 5)),
    'transposed': lambda: seq(nn.ConvTranspose2d(4, 8, 3, groups=2), BCN(8)),
    'no affine': lambda: seq(WSConv2d(4, 8, 3), BCN(8, affine=False)),
    'estimate=False': lambda: seq(WSConv2d(4, 8, 3), BCN(8, estimate=False)),
    'groups, eps': lambda: seq(WSConv2d(4, 8, 3), BCN(8, 2, eps=1e-2)),
    'sync': lambda: seq(WSConv2d(4, 8, 3), SyncBCN(8)),
    'one position': lambda: seq(WSConv2d(4, 8, 3), BCN(8), (1, 4, 3, 3)),
    'shared head': lambda: pyramid(1),
    'tied': tied,
}
STAYS = {
    'used twice': (used_twice, r'its output also goes to add\(\)'),
    'after add': (after_add, 'not always, that of a convolution'),
    'returned': (returned, 'the output'),
    'remembered': (remembered, 'kept somewhere'),
    'changed': (changed, 'not always, that|relu_'),
    'view': (reached_by_a_view, r'view\(\)'),
    'two convolutions': (two_convs, 'comes from 2 convolutions'),
    'two norms': (two_norms, 'feeds 2 norms'),
    'input': (norm_of_the_input, 'not always, that of a convolution'),
    'levels': (lambda: pyramid(3), '3 levels'),
    'parametrized': (parametrized, 'parametrized'),
    'one channel': (
        lambda: seq(WSConv2d(4, 8, 3), BCN(8, 8)),
        'groups have one channel',
    ),
}
NETS = {**FOLDS, **{name: make for name, (make, _) in STAYS.items()}}
