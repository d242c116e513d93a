"""RetinaNet with a ResNet-18 from RetinaNet with a ResNet-50.

The student's schedule is its own config's: 12 epochs at 1333x800, batch 16, SGD 0.01.

AP on COCO val2017: student alone 31.7, teacher 37.4 (mmdet's). Published result of distillation: not found.
"""

_base_ = "mmdet::retinanet/retinanet_r18_fpn_1x_coco.py"

from mmengine.hub import get_config

custom_imports = dict(imports=["crosskd.integrations.mmdet"], allow_failed_imports=False)
model = dict(
    _delete_=True,
    type="CrossKDDetector",
    teacher=get_config("mmdet::retinanet/retinanet_r50_fpn_2x_coco.py").model,
    teacher_checkpoint="https://download.openmmlab.com/mmdetection/v2.0/retinanet/retinanet_r50_fpn_2x_coco/"
    "retinanet_r50_fpn_2x_coco_20200131-fdb43119.pth",
    student=_base_.model,
)
