"""FCOS with a ResNet-50 from FCOS with a ResNet-101.

Both have the plain head with group norm: no centre sampling, exp of the regression, centerness on the
classification tower, the logarithm of the IoU as box loss. The published FCOS numbers that our tests hold
belong to this head, and its box loss is the published distillation's. mmdet has another head with later
tricks (centre sampling, normalised boxes), but publishes no ResNet-101 with it to learn from.

The student's schedule is its own config's: 12 epochs at 1333x800, batch 16, SGD 0.01.

AP on COCO val2017: student alone 36.6, teacher 40.8 (mmdet's). Published result of distillation: not found.
"""

_base_ = "mmdet::fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py"

from mmengine.hub import get_config

custom_imports = dict(imports=["crosskd.integrations.mmdet"], allow_failed_imports=False)
model = dict(
    _delete_=True,
    type="CrossKDDetector",
    teacher=get_config("mmdet::fcos/fcos_r101-caffe_fpn_gn-head_ms-640-800-2x_coco.py").model,
    teacher_checkpoint="https://download.openmmlab.com/mmdetection/v2.0/"
    "fcos/fcos_r101_caffe_fpn_gn-head_mstrain_640-800_2x_coco/"
    "fcos_r101_caffe_fpn_gn-head_mstrain_640-800_2x_coco-511424d6.pth",
    student=_base_.model,
)
