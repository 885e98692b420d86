import torch

from bcn_mm.ops.kernels import native


def test_moments_repair_in_several_portions(monkeypatch):
    monkeypatch.setattr(native, '_PORTION', 20)
    x = torch.randn(4, 6, 3, 3, dtype=torch.double)
    x[1:3] += 1e6
    mean, var, _ = native.Native().moments(x)
    torch.testing.assert_close(mean, x.mean((2, 3)))
    torch.testing.assert_close(
        var, x.flatten(2).var(2, unbiased=False), rtol=1e-7, atol=0
    )
