"""The definitions, written down once more as plainly as possible.

Nothing here is shared with the package: full-size intermediates, torch's own
autograd, no shortcuts.
"""

import torch


def bcn(
    x,
    num_groups,
    running_mean,
    running_var,
    batch_weight,
    batch_bias,
    weight,
    bias,
    training,
    estimate,
    momentum,
    eps=1e-5,
):
    """Returns y and the new running statistics; changes nothing."""
    n, c = x.shape[:2]
    per_channel = (1, c, 1)
    flat = x.reshape(n, c, -1)
    positions = flat.shape[2]
    mu, var = running_mean, running_var
    if training and estimate:
        with torch.no_grad():
            m = flat.mean(2)
            old = running_mean.view(1, c)
            v = ((flat - m.unsqueeze(2)) ** 2).mean(2)
            s = (v + (m - old) ** 2).mean(0)
            mu = running_mean + momentum * (m.mean(0) - running_mean)
            var = running_var + momentum * (s - running_var)
        running_mean, running_var = mu, var
    elif training:
        mu = flat.mean((0, 2))
        var = ((flat - mu.view(per_channel)) ** 2).mean((0, 2))
        with torch.no_grad():
            count = n * positions
            unbiased = var * count / max(count - 1, 1)
            running_mean = running_mean + momentum * (mu - running_mean)
            running_var = running_var + momentum * (unbiased - running_var)
    z = (flat - mu.view(per_channel)) / torch.sqrt(var.view(per_channel) + eps)
    z = batch_weight.view(per_channel) * z + batch_bias.view(per_channel)
    groups = z.reshape(n, num_groups, -1)
    mean = groups.mean(2, keepdim=True)
    variance = ((groups - mean) ** 2).mean(2, keepdim=True)
    y = (groups - mean) / torch.sqrt(variance + eps)
    y = weight.view(1, num_groups, 1) * y + bias.view(1, num_groups, 1)
    return y.reshape(x.shape), running_mean.detach(), running_var.detach()


def standardize(weight, dialect, eps=1e-5):
    flat = weight.flatten(1)
    centred = flat - flat.mean(1, keepdim=True)
    unbiased = (centred**2).sum(1, keepdim=True) / (flat.shape[1] - 1)
    biased = (centred**2).mean(1, keepdim=True)
    divisor = {
        'std': torch.sqrt(unbiased) + eps,
        'var': torch.sqrt(unbiased + eps),
        'biased_var': torch.sqrt(biased + eps),
    }[dialect]
    return (centred / divisor).view_as(weight)
