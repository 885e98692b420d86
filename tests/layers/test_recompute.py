"""What autograd does not keep is computed again, to the same bits."""

import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from bcn_mm import BCN, SyncBCN, WSConv2d, recompute_activations
from bcn_mm.ops import recipes, rematerialization

ACTIVATIONS = {
    'relu': nn.ReLU,
    'relu6': nn.ReLU6,
    'leaky': lambda inplace=False: nn.LeakyReLU(0.1, inplace),
    'silu': nn.SiLU,
    'hardswish': nn.Hardswish,
    'gelu': lambda inplace=False: nn.GELU(),
    'gelu-tanh': lambda inplace=False: nn.GELU('tanh'),
    'none': lambda inplace=False: nn.Identity(),
    'other': lambda inplace=False: nn.Tanh(),
}
X = torch.randn(2, 3, 12, 10)


class Block(nn.Module):
    """A residual block, as mmdet's are."""

    def __init__(
        self, act='relu', inplace=True, channels=8, norm=BCN, functional=False
    ):
        super().__init__()
        self.conv1 = WSConv2d(channels, channels, 3, padding=1)
        self.norm1 = norm(channels)
        self.conv2 = WSConv2d(channels, channels, 1)
        self.norm2 = norm(channels)
        self.act = ACTIVATIONS[act](inplace=inplace)
        self.inplace, self.functional = inplace, functional

    def forward(self, x):
        if self.functional:
            out = F.relu(self.norm1(self.conv1(x)), inplace=self.inplace)
            return torch.relu(self.norm2(self.conv2(out)) + x)
        out = self.norm2(self.conv2(self.act(self.norm1(self.conv1(x)))))
        if self.inplace:
            out += x
        else:
            out = out + x
        return self.act(out)


def network(act='relu', inplace=True, blocks=3, norm=BCN, functional=False):
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        norm(8),
        ACTIVATIONS[act](inplace=inplace),
        nn.MaxPool2d(2),
        *(Block(act, inplace, 8, norm, functional) for _ in range(blocks)),
        WSConv2d(8, 4, 1),
        norm(4),
        nn.Flatten(),
        nn.Linear(4 * 6 * 5, 3),
    )


def train(net, x=X, steps=3, step=None):
    """Losses, gradients and state of some steps."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    said = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = step(net, x) if step else net(x).square().mean()
        loss.backward()
        said += [loss.detach().clone(), *(p.grad.clone() for p in net.parameters())]
        optimizer.step()
    return said + [t.clone() for t in net.state_dict().values()]


def assert_same(net, x=X, step=None, steps=3):
    """With and without, bit for bit; returns the bytes that were not kept."""
    other = copy.deepcopy(net)
    without = train(net, x, steps, step)
    handle = recompute_activations(other)
    handle.measure()
    again = train(other, x, steps, step)
    assert len(without) == len(again)
    assert all(map(torch.equal, without, again))
    spared, kept = handle.measure(False)
    assert kept > 0
    region = handle._region
    assert not region._living
    assert region._made is None and region._made_part is None
    assert rematerialization.watching == 0
    return spared


@settings(max_examples=25)
@given(
    act=st.sampled_from(list(ACTIVATIONS)),
    inplace=st.booleans(),
    blocks=st.integers(0, 5),
    channels_last=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    batch=st.integers(1, 3),
    training=st.booleans(),
    functional=st.booleans(),
)
def test_same_bits(
    act, inplace, blocks, channels_last, dtype, batch, training, functional
):
    torch.manual_seed(blocks)
    net = network(act, inplace, blocks, functional=functional).to(dtype)
    x = torch.randn(batch, 3, 12, 10, dtype=dtype)
    if channels_last:
        net, x = (t.to(memory_format=torch.channels_last) for t in (net, x))
    assert assert_same(net.train(training), x) > 0


@pytest.mark.parametrize('act', ACTIVATIONS)
@pytest.mark.parametrize('inplace', [False, True])
def test_every_backend(act, inplace, backend):
    assert assert_same(network(act, inplace, blocks=1), steps=1) > 0


@pytest.mark.parametrize(
    'norm',
    [
        SyncBCN,
        lambda c: BCN(c, estimate=False),
        lambda c: BCN(c, affine=False),
        lambda c: BCN(c, start='average', momentum=None),
        lambda c: BCN(c, num_levels=2),
    ],
)
def test_every_norm(norm):
    assert assert_same(network(norm=norm)) > 0


def test_what_is_not_kept():
    """Exactly: outputs of norms and activations, two sums of three, weights."""
    net = network(blocks=4)
    handle = recompute_activations(net)
    handle.measure()
    net(X).sum().backward()
    spared, _ = handle.measure(False)
    whole, part = 2 * 8 * 12 * 10, 2 * 8 * 6 * 5
    # one after the stem; in every block one within, and three of four sums, of
    # which the third is kept; the last norm's, of four channels
    maps = whole + 4 * part + 3 * part + part // 2
    weights = 4 * (8 * 8 * 9 + 8 * 8) + 4 * 8
    assert spared == 4 * (maps + weights)


def test_memory_goes_back():
    """An activation is gone when its consumers have run."""
    alive = {}
    for recomputes in (False, True):
        net = network(blocks=1, inplace=False)
        refs = []
        net[2].register_forward_hook(
            lambda m, a, y, refs=refs: refs.append(
                torch.multiprocessing.reductions.StorageWeakRef(y.untyped_storage())
            )
        )
        handle = recompute_activations(net)
        if not recomputes:
            handle.remove()
        loss = net(X).sum()
        alive[recomputes] = not refs[0].expired()
        loss.backward()
    assert alive == {False: True, True: False}


# -- what is not surely the norm's -------------------------------------------


def scaled(z):
    return z.mul_(2)


def through_view(z):
    z.view(-1)[::3] = 0.5
    return z


def without_grad(z):
    with torch.no_grad():
        z.add_(1)
    return z


def filled(z):
    z[:, 0] = 1.0
    return z


EDITS = [scaled, through_view, without_grad, filled, lambda z: z.flip(0), torch.relu]


class Edited(nn.Module):
    def __init__(self, edit, act):
        super().__init__()
        self.conv, self.norm = WSConv2d(3, 8, 3), BCN(8)
        self.act, self.next = act, nn.Conv2d(8, 2, 3)
        self.edit = edit

    def forward(self, x):
        return self.next(self.edit(self.act(self.norm(self.conv(x)))))


@pytest.mark.parametrize('edit', EDITS)
@pytest.mark.parametrize('act', [nn.Identity(), nn.SiLU(), nn.Softplus()])
def test_edited(edit, act):
    """Wrong by far, were the recipe of what was there before used."""
    assert_same(Edited(edit, act))


@pytest.mark.parametrize('act', [nn.Identity(), nn.SiLU()])
def test_an_edit_hides_nothing(act):
    """The stock convolution's input is what was written."""
    net = Edited(scaled, act)
    handle = recompute_activations(net)
    handle.measure()
    net(X).sum().backward()
    spared, _ = handle.measure(False)
    weight = net.conv.weight.numel()
    argument = 0 if isinstance(act, nn.Identity) else 2 * 8 * 10 * 8
    assert spared == 4 * (weight + argument)


@pytest.mark.parametrize('recomputes', [False, True])
def test_errors_of_autograd_stay(recomputes):
    """What is overwritten after it was saved is an error, as ever."""
    conv, norm, more = nn.Conv2d(3, 8, 3), BCN(8), nn.Conv2d(8, 8, 3)
    net = nn.ModuleList([conv, norm, more])
    handle = recompute_activations(net)
    if not recomputes:
        handle.remove()

    def input_of_norm():
        x = conv(X)
        y = norm(x)
        with torch.no_grad():
            x.zero_()
        return more(y)

    def weight():
        z = more(torch.sigmoid(conv(X)))
        with torch.no_grad():
            more.weight.mul_(2)
        return z

    for forward in (input_of_norm, weight):
        net.forward = lambda forward=forward: forward()
        with pytest.raises(RuntimeError, match='modified by an inplace operation'):
            net().sum().backward()


def test_subclasses_are_kept():
    class Mine(torch.Tensor):
        pass

    net = nn.Sequential(BCN(3), nn.ReLU(), nn.Conv2d(3, 2, 1))
    x = X.clone().as_subclass(Mine)
    assert_same(net, x)


# -- how graphs are used -----------------------------------------------------


def twice(net, x):
    loss = net(x).square().mean()
    loss.backward(retain_graph=True)
    return loss


def used_twice(net, x):
    """As a discriminator is, of which one pass has no part in the loss."""
    real, fake, _ = net(x), net(-x), net(2 * x)
    return real.mean() - fake.square().mean()


def accumulated(net, x):
    net(x).mean().backward()
    with torch.no_grad():
        net(x)
    return net(x.flip(0)).square().mean()


def autocast(net, x):
    with torch.autocast('cpu', torch.bfloat16):
        y = net(x)
    return y.float().square().mean()


def in_autocast(net, x):
    with torch.autocast('cpu', torch.bfloat16):
        loss = net(x).float().square().mean()
        loss.backward(retain_graph=True)
    return loss


def with_input_gradient(net, x):
    x = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(net(x).sum(), x)
    return net(x).mean() + 0 * slope.sum()


STEPS = [twice, used_twice, accumulated, autocast, in_autocast, with_input_gradient]


@pytest.mark.parametrize('step', STEPS)
def test_steps(step):
    assert assert_same(network(), step=step) > 0


@pytest.mark.parametrize('reentrant', [False, True])
def test_beside_checkpoints(reentrant):
    class Some(nn.Sequential):
        def forward(self, x):
            for i, part in enumerate(self):
                x = (
                    checkpoint(part, x, use_reentrant=reentrant)
                    if i in (4, 5)
                    else part(x)
                )
            return x

    assert assert_same(Some(*network())) > 0


def test_children_by_themselves():
    """As GANs are trained, whose own forward is not called."""

    def step(net, x):
        return net.b(net.a(x)).square().mean()

    net = nn.Module()
    net.a, net.b = network(blocks=1)[:4], network(blocks=1)[4:]
    assert assert_same(net, step=step) > 0


def test_norms_of_levels():
    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = WSConv2d(3, 8, 3), BCN(8, num_levels=3)
            self.last = nn.Conv2d(8, 1, 1)

        def forward(self, x):
            levels = [x, x[..., ::2, ::2], x[..., ::3, ::3]]
            return sum(
                self.last(F.relu(self.norm(self.conv(level)))).mean()
                for level in levels
            )

    assert assert_same(Head(), step=lambda net, x: net(x)) > 0


def test_modules_that_are_met_late():
    """Functions are looked for in the first passes, modules need none."""

    class Late(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.act, self.conv = BCN(3), nn.ReLU(), nn.Conv2d(3, 2, 1)
            self.passes = 0

        def forward(self, x):
            self.passes += 1
            return self.conv(self.act(self.norm(x)) if self.passes > 8 else x)

    net = Late()
    handle = recompute_activations(net)
    for _ in range(8):
        net(X)
    handle.measure()
    net(X)
    assert handle.measure()[0] == 4 * X.numel()


def test_parts_are_made_once(monkeypatch):
    """A block's backward pass asks for the sum at its end, then for its input."""
    made = []
    compute = recipes.NormRecipe.compute

    def counted(recipe, *args, **how):
        made.append(recipe)
        return compute(recipe, *args, **how)

    monkeypatch.setattr(recipes.NormRecipe, 'compute', counted)
    net = network(blocks=3)
    with recompute_activations(net):
        net(X).sum().backward()
    assert len(made) == len(set(made)) > 6


# -- what must not stay ------------------------------------------------------


def tensors_alive():
    gc.collect()
    return [o for o in gc.get_objects() if isinstance(o, torch.Tensor)]


def test_no_growth():
    net = network(blocks=2)
    recompute_activations(net)
    before = tensors_alive()  # held, so that no other test's end is in the counts
    known = set(map(id, before))
    counts = []
    for step in range(200):
        net(X).sum().backward()
        if step % 50 == 9:
            counts.append(sum(id(t) not in known for t in tensors_alive()))
    assert len(set(counts[1:])) == 1


@pytest.mark.parametrize('where', ['forward', 'backward'])
def test_an_exception(where):
    net = network(blocks=2)
    handle = recompute_activations(net)
    train(net, steps=1)
    refs = []

    def fail(*args):
        raise KeyError('in the middle')

    def watch(module, args, output):
        refs.append(weakref.ref(output))
        if where == 'backward':
            output.register_hook(fail)

    hooks = [net[5].norm1.register_forward_hook(watch)]
    if where == 'forward':
        hooks.append(net[6].register_forward_pre_hook(fail))
    with pytest.raises(KeyError, match='in the middle'):
        net(X).sum().backward()
    for hook in hooks:
        hook.remove()
    gc.collect()
    assert refs and all(ref() is None for ref in refs)
    region = handle._region
    assert rematerialization.current() is None and not region.is_open
    assert region._made is None and region._made_part is None
    assert not region._living
    net.zero_grad()
    assert_same_as_fresh(net)


def assert_same_as_fresh(net):
    """It goes on as a copy does that never recomputed."""
    handle = recompute_activations(copy.deepcopy(net))
    handle.remove()
    plain = network(blocks=len([m for m in net if isinstance(m, Block)]))
    plain.load_state_dict(net.state_dict())
    assert all(map(torch.equal, train(plain), train(net)))


# -- the handle --------------------------------------------------------------


def spares(net):
    """Whether a pass is handed recipes."""
    seen = []
    original = rematerialization.Region.follow
    rematerialization.Region.follow = lambda *a: (seen.append(1), original(*a))
    try:
        net(X)
    finally:
        rematerialization.Region.follow = original
    return bool(seen)


def test_an_interrupt_leaves_nothing_open():
    """torch calls no hooks after it."""

    def stop(*_):
        raise KeyboardInterrupt

    net, other = network(), network()
    with recompute_activations(net) as handle, recompute_activations(other):
        step = net[-1].register_forward_pre_hook(stop)
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                net(X)
        step.remove()
        other(X).mean().backward()
        assert rematerialization.watching == 0
        assert rematerialization.current() is None
        assert not torch.overrides._get_current_function_mode_stack()
        handle.measure()
        net(X).mean().backward()
        assert handle.measure(False)[0] > 0


def test_a_region_is_of_one_thread(monkeypatch):
    """...though another asks for it while it is being opened."""
    region, others = rematerialization.Region(), []
    hooks = torch.autograd.graph.saved_tensors_hooks
    enter = hooks.__enter__

    def slow(self):
        if threading.current_thread() is threading.main_thread():
            thread = threading.Thread(target=lambda: others.append(region.open()))
            thread.start()
            thread.join()
        return enter(self)

    monkeypatch.setattr(hooks, '__enter__', slow)
    assert region.open() and others == [False]
    region.close()
    assert rematerialization.watching == 0


@pytest.mark.parametrize('layout', [torch.sparse_coo, torch.sparse_csr])
@pytest.mark.filterwarnings('ignore:Sparse')
def test_sparse_tensors_are_kept(layout):
    class Graph(nn.Module):
        def __init__(self, stem):
            super().__init__()
            self.stem = copy.deepcopy(stem)
            self.edges = torch.eye(8).to_sparse(layout=layout)

        def forward(self, x):
            return torch.sparse.mm(self.edges, self.stem(x).reshape(8, -1))

    stem = nn.Sequential(nn.Conv2d(3, 4, 1), BCN(4), nn.ReLU())
    grads = []
    for recompute in (False, True):
        net = Graph(stem)
        if recompute:
            recompute_activations(net)
        net(X).square().mean().backward()
        grads.append([p.grad for p in net.parameters()])
    assert all(map(torch.equal, *grads))


def test_remove():
    net = network()
    handle = recompute_activations(net)
    assert handle.is_active and spares(net)
    twin = copy.deepcopy(net)
    assert spares(twin)
    handle.remove()
    handle.remove()
    assert not handle.is_active and not spares(net) and not spares(twin)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    with recompute_activations(net) as handle:
        assert spares(net)
    assert not spares(net)


def test_pickles_and_states():
    net = network()
    keys = list(net.state_dict())
    recompute_activations(net)
    assert list(net.state_dict()) == keys
    again = pickle.loads(pickle.dumps(net))
    assert torch.equal(net.eval()(X), again.eval()(X))
    assert not spares(again)


def test_twice_is_once():
    """The second handle's region is within the first's, and has nothing to do."""
    net, twin = network(), network()
    twin.load_state_dict(net.state_dict())
    first, second = recompute_activations(net), recompute_activations(net)
    first.measure()
    second.measure()
    assert all(map(torch.equal, train(twin), train(net)))
    assert first.measure()[0] > 0 and second.measure() == (0, 0)


def test_without_gradients():
    net = network()
    recompute_activations(net)
    with torch.no_grad():
        assert not spares(net)
    with torch.inference_mode():
        assert not spares(net)
    net.requires_grad_(False)
    net(X)


def test_compiled_models_are_left_alone(log):
    net = network(blocks=1)
    net[4].compile() if hasattr(net, 'compile') else None
    if not hasattr(net, 'compile'):
        net.forward = torch.compile(net.forward)
    handle = recompute_activations(net)
    assert not handle.is_active
    (line,) = [line for line in log if 'not recomputed' in line]
    assert 'torch.compile' in line
    assert not any(m._forward_pre_hooks for m in net.modules())


def test_transforms():
    """torch.func takes no hooks of saved tensors: it computes as ever."""
    net = network(blocks=1).eval()
    params = dict(net.named_parameters())

    def loss(params):
        return torch.func.functional_call(net, params, (X,)).square().mean()

    expected = torch.func.grad(loss)(params)
    recompute_activations(net)
    found = torch.func.grad(loss)(params)
    assert all(map(torch.equal, expected.values(), found.values()))
