"""How far two computations of the same are apart."""

from typing import Any

from ..ops._compat import tree_leaves


def largest_difference(results: Any, references: Any) -> float:
    """The largest difference between tensors, relative to the largest value.

    Args:
        results (Any): A tensor, or tensors in lists, tuples and dicts.
        references (Any): As many, of the same shapes.

    Returns:
        float: the maximum over the tensors of ``max |result - reference| /
        max |reference|``; infinite where shapes differ or a value is not
        finite.
    """
    results, references = tree_leaves(results), tree_leaves(references)
    if len(results) != len(references):
        return float('inf')
    worst = 0.0
    for a, b in zip(results, references):
        if a.shape != b.shape:
            return float('inf')
        if b.numel() == 0:
            continue
        a, b = a.double(), b.double()
        difference = (a - b).abs().max() / b.abs().max().clamp_min(1e-30)
        if not difference.isfinite():
            return float('inf')
        worst = max(worst, difference.item())
    return worst
