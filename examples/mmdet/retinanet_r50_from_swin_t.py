"""RetinaNet with a ResNet-50 from RetinaNet with a Swin-T.

mmdet has the teacher's config but publishes no weights of it. Train it first, with mmdet's own
`tools/train.py` and `configs/swin/retinanet_swin-t-p4-w7_fpn_1x_coco.py`; its last checkpoint is named below.

AP on COCO val2017: student alone 36.5 (mmdet's). Published results of teacher and distillation: not found.
"""

_base_ = "mmdet::retinanet/retinanet_r50_fpn_1x_coco.py"

from mmengine.hub import get_config

custom_imports = dict(imports=["crosskd.integrations.mmdet"], allow_failed_imports=False)
model = dict(
    _delete_=True,
    type="CrossKDDetector",
    teacher=get_config("mmdet::swin/retinanet_swin-t-p4-w7_fpn_1x_coco.py").model,
    teacher_checkpoint="work_dirs/retinanet_swin-t-p4-w7_fpn_1x_coco/epoch_12.pth",
    student=_base_.model,
)
