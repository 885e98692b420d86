import torch
from support.operands import channels_last

from bcn_mm.ops.layout import dense


def test_dense_copies_only_what_it_must():
    x = torch.randn(2, 3, 4, 4)
    last = channels_last(x)
    assert dense(x) is x and dense(last) is last
    strided = x[..., ::2]
    assert dense(strided).is_contiguous()
