"""RetinaNet with a MobileNetV2 from RetinaNet with a ResNet-50.

mmdet has no RetinaNet with a MobileNetV2: the student is its ResNet-50 config, and that config's 12 epochs,
with another backbone.

AP on COCO val2017: teacher 37.4 (mmdet's). Published results of student and distillation: not found.
"""

_base_ = "mmdet::retinanet/retinanet_r50_fpn_1x_coco.py"

from mmengine.hub import get_config

custom_imports = dict(imports=["crosskd.integrations.mmdet"], allow_failed_imports=False)
model = dict(
    _delete_=True,
    type="CrossKDDetector",
    teacher=get_config("mmdet::retinanet/retinanet_r50_fpn_2x_coco.py").model,
    teacher_checkpoint="https://download.openmmlab.com/mmdetection/v2.0/retinanet/retinanet_r50_fpn_2x_coco/"
    "retinanet_r50_fpn_2x_coco_20200131-fdb43119.pth",
    student=dict(
        _base_.model,
        # Outputs at strides 8, 16 and 32. Norm layers keep their statistics, as mmdet's ResNets do.
        backbone=dict(
            type="MobileNetV2",
            out_indices=(2, 4, 6),
            norm_eval=True,
            init_cfg=dict(type="Pretrained", checkpoint="open-mmlab://mmdet/mobilenet_v2"),
        ),
        neck=dict(_base_.model.neck, in_channels=[32, 96, 320], start_level=0),
    ),
)
