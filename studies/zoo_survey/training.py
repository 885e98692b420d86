"""Two training steps of a config's models, stock and converted."""

import copy
import hashlib
from typing import Iterable, List, Tuple

import numpy as np
import torch
from mmengine.config import Config
from mmengine.model import BaseModel, revert_sync_batchnorm
from mmengine.structures import BaseDataElement

from bcn_mm import BCN, recompute_activations
from bcn_mm.convert import build_model, describe, in_scope, to_bcn
from bcn_mm.engine.batches import random_batch
from bcn_mm.engine.cli import forget_pretrained

from .workers import limit, quiet
from .zoo import read

# Height and width of the pictures; where the stock model does not take the
# first, the next is tried, at last what the config says.
SHAPES = ((128, 160), (256, 256), (512, 512), None)


def two_steps(names: List[str], ws: bool, timeout: int) -> dict:
    """Train the stock model of one of these configs, then the converted.

    The converted one twice: the second time recomputing activations, which
    must change no bit of losses, gradients, parameters and buffers.
    """
    result = {}
    for name in names:
        for shape in SHAPES:
            with quiet(name), limit(timeout):
                try:
                    cfg = read(name)
                    own = cfg.model.get('data_preprocessor', {}).get('size')
                    shape = shape or own
                    if shape is None:
                        continue
                    stock, _ = _train(cfg, 2, shape)
                except Exception as e:
                    result.setdefault('stock_error', describe(e))
                    continue
                result = dict(config=name, shape=shape, stock=stock)
                try:
                    # what it is for: one picture a step
                    converted = to_bcn(cfg, ws=ws)
                    result['converted'], bits = _train(converted, 1, shape)
                    recomputed, again = _train(converted, 1, shape, recompute=True)
                    result['recomputed'] = recomputed['saved']
                    if again != bits:
                        raise AssertionError('recomputed activations change bits')
                except Exception as e:
                    result['error'] = describe(e)
                return result
    return dict(result, config=names[0])


def _train(
    cfg: Config, batch_size: int, shape, recompute: bool = False
) -> Tuple[dict, str]:
    """Two training steps and two evaluations, on the CPU.

    Returns:
        tuple: what is to be known of them, and what stands for the bits of all
        losses, gradients, parameters and buffers.
    """
    torch.manual_seed(0)
    np.random.seed(0)  # some samplers' generator
    cfg = copy.deepcopy(cfg)
    # pictures stay as small as they are
    preprocessor = cfg.model.get('data_preprocessor') or {}
    preprocessor.pop('batch_augments', None)
    if preprocessor.get('size'):
        preprocessor.size = shape
    # as the runner starts, but from random weights
    forget_pretrained(cfg.model)
    with in_scope(cfg) as registry:
        model = build_model(cfg.model, registry, 'cpu')
        model.init_weights()
        model = revert_sync_batchnorm(model).train()
        batch = random_batch(cfg, batch_size, shape)
        layers = [m for m in model.modules() if isinstance(m, BCN)]
        start = [m.running_mean.clone() for m in layers]
        handle = recompute_activations(model)
        if recompute:
            handle.measure()
        else:
            handle.remove()
        losses = _take_steps(model, batch)
        bits = _bits_of(model, losses)
        saved = handle.measure(False)
        handle.remove()
        used = [bool(m.num_batches_tracked.sum()) for m in layers]
        moved = [
            not torch.equal(m.running_mean, s) and bool(m.running_mean.isfinite().all())
            for m, s in zip(layers, start)
        ]
        if used != moved or (layers and not any(moved)):
            raise AssertionError('an estimate has not moved')
        _check_evaluation(model, batch)
    result = dict(losses=losses, moved=sum(moved), layers=len(layers))
    if recompute:
        result['saved'] = dict(zip(('spared', 'kept'), saved))
    return result, bits


def _bits_of(model: BaseModel, losses: Iterable[float]) -> str:
    digest = hashlib.sha256(repr(list(losses)).encode())
    gradients = (p.grad for p in model.parameters() if p.grad is not None)
    for tensor in (*model.state_dict().values(), *gradients):
        digest.update(tensor.detach().contiguous().view(-1).numpy().tobytes())
    return digest.hexdigest()


def _take_steps(model: BaseModel, batch: dict) -> List[float]:
    optimizer = torch.optim.SGD(
        [p for p in model.parameters() if p.requires_grad], lr=1e-4
    )
    losses = []
    for _ in range(2):
        data = model.data_preprocessor(batch, True)
        loss, _ = model.parse_losses(model(**data, mode='loss'))
        if not torch.isfinite(loss):
            raise AssertionError(f'the loss is {float(loss)}')
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    return losses


@torch.no_grad()
def _check_evaluation(model: BaseModel, batch: dict) -> None:
    """It is the same twice, and changes nothing."""
    model.eval()
    if isinstance(batch['inputs'], dict):  # branches of semi-supervision
        batch = {key: branches['sup'] for key, branches in batch.items()}
    state = {k: v.clone() for k, v in model.state_dict().items()}
    outputs = []
    for _ in range(2):
        torch.manual_seed(0)
        data = model.data_preprocessor(copy.deepcopy(batch), False)
        outputs.append(_tensors(model(**data, mode='predict')))
    one, two = outputs
    if not one or not all(map(torch.equal, one, two)):
        raise AssertionError('evaluation is not deterministic')
    for key, value in model.state_dict().items():
        if not torch.equal(value, state[key]):
            raise AssertionError(f'evaluation changed {key}')


def _tensors(output) -> List[torch.Tensor]:
    """Everything that was predicted."""
    if isinstance(output, torch.Tensor):
        return [output]
    if isinstance(output, BaseDataElement):
        output = dict(output.items())
    if isinstance(output, dict):
        output = output.values()
    if isinstance(output, (list, tuple, type({}.values()))):
        return [t for part in output for t in _tensors(part)]
    return []
