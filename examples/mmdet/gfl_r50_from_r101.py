"""GFL with a ResNet-50 from GFL with a ResNet-101: the paper's headline.

The student's schedule is its own config's: 12 epochs at 1333x800, batch 16, SGD 0.01.

AP on COCO val2017: student alone 40.2, distilled 43.7 (both the paper's, abstract), teacher 44.7 (mmdet's).
"""

_base_ = "mmdet::gfl/gfl_r50_fpn_1x_coco.py"

from mmengine.hub import get_config

custom_imports = dict(imports=["crosskd.integrations.mmdet"], allow_failed_imports=False)
model = dict(
    _delete_=True,
    type="CrossKDDetector",
    teacher=get_config("mmdet::gfl/gfl_r101_fpn_ms-2x_coco.py").model,
    teacher_checkpoint="https://download.openmmlab.com/mmdetection/v2.0/gfl/gfl_r101_fpn_mstrain_2x_coco/"
    "gfl_r101_fpn_mstrain_2x_coco_20200629_200126-dd12f847.pth",
    student=_base_.model,
)
