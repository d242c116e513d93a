"""ATSS with a ResNet-50 from ATSS with a ResNet-101.

The student's schedule is its own config's: 12 epochs at 1333x800, batch 16, SGD 0.01.

AP on COCO val2017: student alone 39.4, teacher 41.5 (mmdet's). Published result of distillation: not found.
"""

_base_ = "mmdet::atss/atss_r50_fpn_1x_coco.py"

from mmengine.hub import get_config

custom_imports = dict(imports=["crosskd.integrations.mmdet"], allow_failed_imports=False)
model = dict(
    _delete_=True,
    type="CrossKDDetector",
    teacher=get_config("mmdet::atss/atss_r101_fpn_1x_coco.py").model,
    teacher_checkpoint="https://download.openmmlab.com/mmdetection/v2.0/atss/atss_r101_fpn_1x_coco/"
    "atss_r101_fpn_1x_20200825-dfcadd6f.pth",
    student=_base_.model,
)
