"""GFL with a ResNet-18 from GFL with a ResNet-50.

mmdet has no GFL with a ResNet-18: the student is its ResNet-50 config, and that config's 12 epochs, with
another backbone. Of mmdet's two teachers this is the one trained longer, as in the headline pair.

AP on COCO val2017: teacher 42.9 (mmdet's). Published results of student and distillation: not found.
"""

_base_ = "mmdet::gfl/gfl_r50_fpn_1x_coco.py"

from mmengine.hub import get_config

custom_imports = dict(imports=["crosskd.integrations.mmdet"], allow_failed_imports=False)
model = dict(
    _delete_=True,
    type="CrossKDDetector",
    teacher=get_config("mmdet::gfl/gfl_r50_fpn_ms-2x_coco.py").model,
    teacher_checkpoint="https://download.openmmlab.com/mmdetection/v2.0/gfl/gfl_r50_fpn_mstrain_2x_coco/"
    "gfl_r50_fpn_mstrain_2x_coco_20200629_213802-37bb1edc.pth",
    student=dict(
        _base_.model,
        backbone=dict(
            _base_.model.backbone,
            depth=18,
            init_cfg=dict(type="Pretrained", checkpoint="torchvision://resnet18"),
        ),
        neck=dict(_base_.model.neck, in_channels=[64, 128, 256, 512]),
    ),
)
