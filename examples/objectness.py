"""The small detector of your_detector.py with an objectness: whether a place holds an object at all.

As in YOLOX, the classes are trained where there is an object alone, and a detection's score is the product.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import generalized_box_iou_loss
from your_detector import SmallDetector


class ObjectnessDetector(SmallDetector):
    """A decoupled head whose box tower has a second predictor."""

    def __init__(self, num_classes, width=32):
        super().__init__(num_classes, width)
        self.obj_out = nn.Conv2d(width, 1, 3, padding=1)
        nn.init.constant_(self.cls_out.bias, 0.0)
        nn.init.constant_(self.obj_out.bias, -4.0)  # most places hold nothing

    def losses(self, logits, regression, objectness, points, targets):
        """The losses, and which points (batch, points) hold an object."""
        owners = torch.stack([self.assign(points, target["boxes"]) for target in targets])
        positive = owners >= 0
        found = [(target, owner[owner >= 0]) for target, owner in zip(targets, owners, strict=True)]
        boxes = torch.cat([target["boxes"][owner] for target, owner in found])
        labels = torch.cat([target["labels"][owner] for target, owner in found])
        classes = F.one_hot(labels, logits.shape[-1]).to(logits)
        predicted = self.boxes(regression, points)[positive]
        entropy = F.binary_cross_entropy_with_logits
        count = positive.sum().clamp(min=1)
        return {
            "loss_cls": entropy(logits[positive], classes, reduction="sum") / count,
            "loss_obj": entropy(objectness, positive.to(objectness), reduction="sum") / count,
            "loss_box": generalized_box_iou_loss(predicted, boxes, reduction="sum") / count,
        }, positive

    def forward(self, images, targets=None):
        maps = self.backbone(images)
        logits = torch.cat([self.cls_out(self.cls_tower(m)).flatten(2).mT for m in maps], dim=1)
        towers = [self.box_tower(m) for m in maps]
        regression = torch.cat([self.box_out(t).flatten(2).mT for t in towers], dim=1)
        objectness = torch.cat([self.obj_out(t).flatten(1) for t in towers], dim=1)
        points = self.points(maps)
        if self.training:
            return self.losses(logits, regression, objectness, points, targets)[0]
        scores, boxes = logits.sigmoid() * objectness.sigmoid()[..., None], self.boxes(regression, points)
        return [self.detections(*image) for image in zip(scores, boxes, strict=True)]
