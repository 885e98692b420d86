"""Stock configs of mmdet and mmsegmentation, and the models that they say."""

from collections import Counter
from importlib.util import find_spec
from pathlib import Path

from bcn_mm.convert import build_model, in_scope

RETINA = 'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py'
DEEPLAB = 'mmseg::deeplabv3plus/deeplabv3plus_r50-d8_4xb2-80k_cityscapes-512x1024.py'
# mmengine finds no config behind `::` in a folder with a plus
ZOO = Path(find_spec('mmdet').origin).parent / '.mim' / 'configs'
# the ways in which configs and components are made
STOCK = {
    'names its norm': RETINA,
    'SyncBN, pretrained beside the backbone': DEEPLAB,
    'by default, in the backbone': 'mmdet::yolo/yolov3_d53_8xb8-320-273e_coco.py',
    'by default, in the head': 'mmdet::fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py',
    'GroupNorm checkpoint': 'mmdet::gn/mask-rcnn_r50_fpn_gn-all_2x_coco.py',
    'a list of heads': 'mmdet::cascade_rcnn/cascade-mask-rcnn_r50_fpn_1x_coco.py',
    'ConvWS': f'{ZOO}/gn+ws/faster-rcnn_r50_fpn_gn-ws-all_1x_coco.py',
    'wrapped': 'mmdet::soft_teacher/'
    'soft-teacher_faster-rcnn_r50-caffe_fpn_180k_semi-0.1-coco.py',
    'GroupNorm and LayerNorm': 'mmdet::mask2former/'
    'mask2former_r50_8xb2-lsj-50e_coco.py',
    'handed over by the component around it': 'mmseg::unet/'
    'unet-s5-d16_fcn_4xb4-160k_cityscapes-512x1024.py',
    'without asking, a neck': 'mmdet::yolof/yolof_r50-c5_8xb8-1x_coco.py',
    'without asking, a backbone': 'mmseg::bisenetv1/'
    'bisenetv1_r18-d32_4xb4-160k_cityscapes-1024x1024.py',
}


def parents(names):
    """How many layers each module has; ``gn1`` may have become ``bn1``."""
    return Counter(name.rpartition('.')[0] for name in names)


def model_of(cfg, device='meta'):
    with in_scope(cfg) as registry:
        return build_model(cfg.model, registry, device)
