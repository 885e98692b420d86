# Weight Standardization beside BCN, in the dialect of the authors' ImageNet models.
_base_ = './bcn.py'
conv_cfg = dict(type='WSConv2d', dialect='var')
