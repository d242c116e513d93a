"""CrossKD in one file: the whole method in plain PyTorch, for torchvision's RetinaNet.

CrossKD: Cross-Head Knowledge Distillation for Object Detection (Wang et al., CVPR 2024, arXiv 2306.11369).

A student that imitates its teacher's predictions is trained on two targets at once, the ground truth and the
teacher, and they contradict each other. CrossKD trains the student's own predictions on the ground truth
alone. It takes the features in the middle of the student's detection head, lets the rest of the teacher's
frozen head predict from them, and compares these cross-head predictions with the teacher's own.

Start reading at `crosskd_losses`. Losses and gradients are those of
``crosskd.Distiller(teacher, student, crosskd.CrossKD(position=3))``. Only the library checks its inputs and
takes other detectors, heads of different widths, mixed precision and several processes.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.ops import box_iou, generalized_box_iou_loss

Maps = list[Tensor]
Targets = list[dict[str, Tensor]]


def crosskd_losses(
    teacher: RetinaNet, student: RetinaNet, images: list[Tensor], targets: Targets, position: int = 3
) -> dict[str, Tensor]:
    """The student's own losses, ``kd_cls`` and ``kd_reg``: their sum is what the student is trained on.

    Args:
        teacher: in eval mode, with frozen parameters; same classes, anchors and normalisation of images.
        student: in train mode; its head is as wide as the teacher's.
        images: as torchvision takes them, (3, height, width) each.
        targets: as torchvision takes them: ``boxes`` (objects, 4) and ``labels`` (objects,) of each image.
        position: after how many blocks of each tower the teacher's head takes over.
    """
    batch, targets = student.transform(images, targets)  # once: both see the same pixels
    with torch.no_grad():
        teacher_maps = list(teacher.backbone(batch.tensors).values())  # (batch, 256, height, width) each
    student_maps = list(student.backbone(batch.tensors).values())

    teacher_logits, student_logits, cross_logits = branch_predictions(
        "classification_head", teacher.head, student.head, teacher_maps, student_maps, position
    )
    teacher_deltas, student_deltas, cross_deltas = branch_predictions(
        "regression_head", teacher.head, student.head, teacher_maps, student_maps, position
    )

    # The student's own predictions and the ground truth.
    anchors = student.anchor_generator(batch, student_maps)  # per image: (anchors, 4)
    predictions = {"cls_logits": student_logits, "bbox_regression": student_deltas}
    losses: dict[str, Tensor] = student.compute_loss(targets, predictions, anchors)

    # The cross-head predictions and the teacher's predictions.
    counted, positives = assignment(student, targets, anchors)
    kd_cls = counted * quality_focal_loss(cross_logits, teacher_logits)
    losses["kd_cls"] = kd_cls.sum() / positives
    cross_boxes, teacher_boxes = (
        student.box_coder.decode_single(deltas.flatten(0, 1), torch.cat(anchors)).view_as(deltas)
        for deltas in (cross_deltas, teacher_deltas)
    )
    confidence = teacher_logits.sigmoid().amax(dim=2)  # its boxes mean nothing where it sees no object
    kd_reg = counted * confidence * generalized_box_iou_loss(cross_boxes, teacher_boxes)
    losses["kd_reg"] = kd_reg.sum() / positives
    return losses


def branch_predictions(
    name: str, teacher_head: Any, student_head: Any, teacher_maps: Maps, student_maps: Maps, position: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The teacher's, the student's and the cross-head predictions of one branch of the head.

    Args:
        name: of the branch: a tower ``conv`` and, behind it, a predictor.
        teacher_head: the teacher's head.
        student_head: the student's.
        teacher_maps: the teacher's feature maps, one per level.
        student_maps: the student's.
        position: after how many blocks the towers are split.

    Returns:
        Shape (batch, anchors, values) each: logits of the classes, or the 4 deltas of a box.
    """
    teacher, student = getattr(teacher_head, name), getattr(student_head, name)
    of_teacher, of_student, of_cross_head = [], [], []
    for level in range(len(student_maps)):  # all levels share the head
        with torch.no_grad():
            teacher_features = teacher.conv[:position](teacher_maps[level])
            of_teacher.append(predict(teacher, teacher.conv[position:](teacher_features)))
        student_features = student.conv[:position](student_maps[level])
        of_student.append(predict(student, student.conv[position:](student_features)))

        # Not under no_grad: the student learns from the gradient through the rest of the teacher's tower.
        aligned = align(student_features, teacher_features)
        if position > 0:  # aligned features of a ReLU may be negative: they pass it once more
            aligned = F.relu(aligned)
        of_cross_head.append(predict(teacher, teacher.conv[position:](aligned)))
    return torch.cat(of_teacher, dim=1), torch.cat(of_student, dim=1), torch.cat(of_cross_head, dim=1)


def align(student: Tensor, teacher: Tensor) -> Tensor:
    """Gives each channel of the student's features the mean and standard deviation that the teacher's has."""
    student_std, student_mean = torch.std_mean(student, dim=(0, 2, 3), keepdim=True)  # (1, channels, 1, 1)
    teacher_std, teacher_mean = torch.std_mean(teacher, dim=(0, 2, 3), keepdim=True)
    return (student - student_mean) / (student_std + 1e-6) * teacher_std + teacher_mean


def predict(branch: Any, features: Tensor) -> Tensor:
    """What a branch's predictor makes of its tower's output on one level, (batch, anchors, values)."""
    if hasattr(branch, "cls_logits"):
        maps, values = branch.cls_logits(features), branch.num_classes
    else:
        maps, values = branch.bbox_reg(features), 4
    maps = maps.unflatten(1, (-1, values))  # (batch, anchors per location, values, height, width)
    maps = maps.permute(0, 3, 4, 1, 2)  # (batch, height, width, anchors per location, values)
    return maps.flatten(1, 3)


def assignment(student: RetinaNet, targets: Targets, anchors: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The student's label assignment: which anchors count, (batch, anchors), and the number of positives."""
    counted, positives = [], []
    for target, of_image in zip(targets, anchors, strict=True):
        if len(target["boxes"]) > 0:
            matches = student.proposal_matcher(box_iou(target["boxes"], of_image))
        else:  # the matcher refuses an image without objects: all of it is background
            matches = torch.full_like(of_image[:, 0], student.proposal_matcher.BELOW_LOW_THRESHOLD)
        counted.append(matches != student.proposal_matcher.BETWEEN_THRESHOLDS)
        positives.append((matches >= 0).sum().clamp(min=1))  # an image without any counts as 1
    return torch.stack(counted), torch.stack(positives).sum()


def quality_focal_loss(logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """|p - q| * BCE(p, q), p of the student's features and q the teacher's, summed over the classes."""
    target = teacher_logits.sigmoid()
    cross_entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    return ((logits.sigmoid() - target).abs() * cross_entropy).sum(dim=2)  # (batch, anchors)


def small_retinanet(backbone_name: str) -> RetinaNet:
    """An untrained RetinaNet of 4 classes on three levels, its head with GroupNorm as in torchvision's v2."""
    backbone = resnet_fpn_backbone(
        backbone_name=backbone_name,
        weights=None,
        norm_layer=nn.BatchNorm2d,
        returned_layers=[3, 4],
        trainable_layers=5,
    )
    anchors = AnchorGenerator(sizes=((64,), (96,), (128,)), aspect_ratios=((0.5, 1.0, 2.0),) * 3)
    head = RetinaNetHead(256, num_anchors=3, num_classes=4, norm_layer=partial(nn.GroupNorm, 32))
    return RetinaNet(backbone, 4, anchor_generator=anchors, head=head, min_size=128, max_size=128)


def main() -> None:
    """Trains a student for a few steps on two random images, with a teacher that knows nothing."""
    torch.manual_seed(0)
    teacher, student = small_retinanet("resnet34"), small_retinanet("resnet18")
    teacher.eval().requires_grad_(False)
    student.train()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.001, momentum=0.9)
    images = [torch.rand(3, 128, 128), torch.rand(3, 96, 128)]
    targets = [
        {"boxes": torch.tensor([[10.0, 20.0, 70.0, 90.0]]), "labels": torch.tensor([1])},
        {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long)},  # no objects
    ]
    for step in range(5):
        losses = crosskd_losses(teacher, student, images, targets)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        print(f"step {step}:", ", ".join(f"{name} {loss.item():.4f}" for name, loss in losses.items()))


if __name__ == "__main__":
    main()
