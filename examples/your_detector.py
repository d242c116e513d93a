"""A small detector that crosskd knows nothing of, how it is trained, and images to train it on.

docs/your_detector.md distils it. Nothing here knows of distillation.
"""

import torch
from torch import nn
from torchvision.ops import batched_nms, box_iou, generalized_box_iou_loss, sigmoid_focal_loss

# -- the detector


def block(width_in, width, stride=1):
    """A convolution with its normalisation and activation."""
    convolution = nn.Conv2d(width_in, width, 3, stride, padding=1, bias=False)
    return nn.Sequential(convolution, nn.GroupNorm(4, width), nn.ReLU())


class Backbone(nn.Module):
    """Two feature maps: one location for every 8 x 8 pixels, and for every 16 x 16."""

    def __init__(self, width):
        super().__init__()
        narrow = width // 2
        self.fine = nn.Sequential(block(3, narrow, 2), block(narrow, width, 2), block(width, width, 2))
        self.coarse = nn.Sequential(block(width, width, 2), block(width, width))

    def forward(self, images):
        fine = self.fine(images)
        return [fine, self.coarse(fine)]


class SmallDetector(nn.Module):
    """At each location of two levels: the classes, and the distances to the four sides of a box."""

    strides = (8, 16)
    largest_on_fine = 24  # pixels: objects of a longer side are found on the coarse level

    def __init__(self, num_classes, width=32):
        super().__init__()
        self.backbone = Backbone(width)
        self.cls_tower = nn.Sequential(block(width, width), block(width, width))
        self.box_tower = nn.Sequential(block(width, width), block(width, width))
        self.cls_out = nn.Conv2d(width, num_classes, 3, padding=1)
        self.box_out = nn.Conv2d(width, 4, 3, padding=1)
        nn.init.constant_(self.cls_out.bias, -4.0)  # most places hold nothing

    def points(self, maps):
        """Where predictions stand, shape (points, 3): x, y, and the level's stride."""
        levels = []
        for stride, features in zip(self.strides, maps, strict=True):
            y, x = ((torch.arange(n, device=features.device) + 0.5) * stride for n in features.shape[-2:])
            places = torch.cartesian_prod(y, x).flip(-1)
            levels.append(torch.cat([places, torch.full_like(places[:, :1], stride)], dim=1))
        return torch.cat(levels)

    def boxes(self, regression, points):
        """Boxes (..., 4), xyxy in pixels, of the logarithms of the distances to their sides, in strides."""
        distances = points[:, 2:] * regression.clamp(max=4).exp()
        centre = points[:, :2]
        return torch.cat([centre - distances[..., :2], centre + distances[..., 2:]], dim=-1)

    def assign(self, points, boxes):
        """The object that each point answers for, -1 for none: the smallest around it and centred nearby."""
        places, stride = points[:, None, :2], points[:, None, 2]
        centres, size = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
        away = (places - centres).abs()  # (points, objects, 2)
        near = (away.amax(-1) < stride) & (away < size / 2).all(-1)
        coarse = size.amax(-1) > self.largest_on_fine
        near &= coarse == (stride == self.strides[1])
        cost = size.prod(-1).where(near, torch.inf)
        nothing = torch.full_like(points[:, :1], 1e9)
        return torch.cat([nothing, cost], dim=1).argmin(dim=1) - 1

    def losses(self, logits, regression, points, targets):
        """The losses, and which points (batch, points) hold an object."""
        owners = torch.stack([self.assign(points, target["boxes"]) for target in targets])
        positive = owners >= 0
        found = [(target, owner[owner >= 0]) for target, owner in zip(targets, owners, strict=True)]
        boxes = torch.cat([target["boxes"][owner] for target, owner in found])
        labels = torch.cat([target["labels"][owner] for target, owner in found])
        classes = torch.zeros_like(logits)
        classes[positive, labels] = 1.0
        predicted = self.boxes(regression, points)[positive]
        count = positive.sum().clamp(min=1)
        return {
            "loss_cls": sigmoid_focal_loss(logits, classes, reduction="sum") / count,
            "loss_box": generalized_box_iou_loss(predicted, boxes, reduction="sum") / count,
        }, positive

    def forward(self, images, targets=None):
        maps = self.backbone(images)
        logits = torch.cat([self.cls_out(self.cls_tower(m)).flatten(2).mT for m in maps], dim=1)
        regression = torch.cat([self.box_out(self.box_tower(m)).flatten(2).mT for m in maps], dim=1)
        points = self.points(maps)
        if self.training:
            return self.losses(logits, regression, points, targets)[0]
        scores, boxes = logits.sigmoid(), self.boxes(regression, points)
        return [self.detections(*image) for image in zip(scores, boxes, strict=True)]

    def detections(self, scores, boxes):
        """One image's detections, the best of those that overlap."""
        scores, labels = scores.max(dim=-1)
        kept = batched_nms(boxes, scores, labels, iou_threshold=0.5)[:100]
        return {"boxes": boxes[kept], "scores": scores[kept], "labels": labels[kept]}


# -- its training


def train(model, images, targets, steps):
    """Trains a detector, or what stands in its place, on batches of eight images."""
    order = torch.Generator().manual_seed(0)  # the same batches for every detector
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.train()
    for _ in range(steps):
        batch = torch.randint(len(images), (8,), generator=order).tolist()
        losses = model(images[batch], [targets[index] for index in batch])
        optimizer.zero_grad()
        sum(losses.values()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        schedule.step()


# -- images


def draw(count, seed, side=64):
    """Images of two discs (class 0) or squares (class 1), and their targets."""
    generator = torch.Generator().manual_seed(seed)
    grid = torch.arange(side) + 0.5
    y, x = torch.meshgrid(grid, grid, indexing="ij")
    images = 0.5 + 0.1 * torch.randn(count, 3, side, side, generator=generator)
    targets = []
    for image in images:
        boxes, labels = [], torch.randint(2, (2,), generator=generator)
        for label in labels:
            centre_x, centre_y = (side * torch.rand(2, generator=generator)).tolist()
            radius = 5 + 10 * torch.rand((), generator=generator).item()
            across, down = (x - centre_x).abs(), (y - centre_y).abs()
            square = torch.maximum(across, down) < radius
            inside = square if label else across**2 + down**2 < radius**2
            image[:, inside] = torch.rand(3, 1, generator=generator)
            boxes.append([centre_x - radius, centre_y - radius, centre_x + radius, centre_y + radius])
        targets.append({"boxes": torch.tensor(boxes).clamp(0, side), "labels": labels})
    return images, targets


# -- how good it is


@torch.no_grad()
def f1(detector, images, targets):
    """Of detections with a score above 0.3; an IoU above 0.5 with an object of the class makes one right."""
    right = found = wanted = 0
    for detected, target in zip(detector.eval()(images), targets, strict=True):
        sure = detected["scores"] > 0.3
        same_class = detected["labels"][sure, None] == target["labels"]
        overlaps = box_iou(detected["boxes"][sure], target["boxes"]) > 0.5
        right += int((same_class & overlaps).any(dim=0).sum())
        found, wanted = found + int(sure.sum()), wanted + len(target["labels"])
    return 2 * right / (found + wanted)
