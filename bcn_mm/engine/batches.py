"""Random training batches, with objects or labels as a model's own data have them."""

from typing import Tuple

import torch
from mmengine.config import Config
from mmengine.structures import InstanceData, PixelData
from torch import Tensor

from ..convert import scope_of, type_name, walk

#: Of the configs that :func:`random_batch` takes.
SCOPES = ('mmdet', 'mmseg')


def _num_classes(cfg: Config) -> int:
    """Labels below this are legal in every head."""
    keys = ('num_classes', 'num_things_classes')
    found = (node[k] for _, node in walk(cfg.model) for k in keys if node.get(k))
    return min(found, default=2)


def random_batch(
    cfg: Config,
    batch_size: int,
    shape: Tuple[int, int],
    objects: int = 8,
    device: str = 'cpu',
) -> dict:
    """A training batch for the model of a config, the same at every call.

    Only the pixels' labels that detectors get beside their objects are drawn by
    numpy's global generator, in mmdet.

    Args:
        cfg (Config): Of mmdet's or mmseg's scope.
        batch_size (int): Pictures.
        shape (tuple[int]): Their height and width.
        objects (int): In each picture, for detectors.
        device (str): Where they go.

    Returns:
        dict: What the model's ``data_preprocessor`` takes.

    Raises:
        ValueError: if the config is of another scope.
    """
    scope = scope_of(cfg)
    if scope == 'mmseg':
        return _segmentation_batch(cfg, batch_size, shape, device)
    if scope != 'mmdet':
        raise ValueError(f'cannot draw pictures for the scope {scope}')
    kind = type_name(cfg.model.get('data_preprocessor'))
    if kind == 'TrackDataPreprocessor':
        return _tracking_batch(cfg, shape, objects)
    batch = _detection_batch(cfg, batch_size, shape, objects, device)
    if kind == 'MultiBranchDataPreprocessor':
        return _multi_branch_batch(batch)
    return batch


def _detection_batch(
    cfg: Config,
    batch_size: int,
    shape: Tuple[int, int],
    objects: int,
    device: str,
) -> dict:
    from mmdet.testing import demo_mm_inputs

    batch = demo_mm_inputs(
        batch_size,
        (3, *shape),
        num_items=[objects] * batch_size,
        # it draws labels from 1 on, those of pixels as uint8
        num_classes=min(max(2, _num_classes(cfg)), 255),
        with_mask=True,
        with_semantic=True,
        use_box_type=True,
        device=device,
    )
    for sample in batch['data_samples']:
        sample.set_metainfo(dict(batch_input_shape=shape, pad_shape=shape, img_path=''))
        truth = sample.gt_instances
        truth.labels %= _num_classes(cfg)
        # what detectors without a proposal stage of their own take
        sample.proposals = InstanceData(
            bboxes=truth.bboxes.tensor.clone(),
            scores=torch.ones(len(truth.bboxes)),
        )
        sample.gt_sem_seg.set_metainfo(dict(ignore_index=255))
    return batch


def _tracking_batch(cfg: Config, shape: Tuple[int, int], objects: int) -> dict:
    from mmdet.testing import demo_track_inputs

    return demo_track_inputs(
        1,
        num_frames=2,
        key_frames_inds=[0],
        image_shapes=(3, *shape),
        num_items=[objects],
        num_classes=max(2, _num_classes(cfg)),
        with_mask=True,
    )


def _multi_branch_batch(batch: dict) -> dict:
    """The same pictures with labels and twice without."""
    for sample in batch['data_samples']:
        sample.set_metainfo(dict(homography_matrix=torch.eye(3).numpy()))
    names = ('sup', 'unsup_teacher', 'unsup_student')
    return {
        key: {name: list(values) for name in names} for key, values in batch.items()
    }


def _segmentation_batch(
    cfg: Config, batch_size: int, shape: Tuple[int, int], device: str
) -> dict:
    from mmseg.structures import SegDataSample

    generator = torch.Generator().manual_seed(0)

    def random(high: int, channels: int) -> Tensor:
        return torch.randint(
            high, (channels, *shape), generator=generator, dtype=torch.uint8
        ).to(device)

    meta = dict(img_shape=shape, ori_shape=shape)
    return dict(
        inputs=[random(256, 3) for _ in range(batch_size)],
        data_samples=[
            SegDataSample(
                metainfo=meta,
                gt_sem_seg=PixelData(data=random(_num_classes(cfg), 1).long()),
                gt_edge_map=PixelData(data=random(2, 1).long()),
            )
            for _ in range(batch_size)
        ],
    )
