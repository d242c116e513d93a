"""One row of each loss in plain Python floats, written from the formulas alone."""

from __future__ import annotations

import math


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def cross_entropy(logit: float, target: float) -> float:
    return max(logit, 0) - logit * target + math.log1p(math.exp(-abs(logit)))


def quality_focal_row(student: list[float], teacher: list[float], beta: float = 1.0) -> float:
    return sum(
        abs(sigmoid(s) - sigmoid(t)) ** beta * cross_entropy(s, sigmoid(t))
        for s, t in zip(student, teacher, strict=True)
    )


def softmax(logits: list[float], temperature: float = 1.0) -> list[float]:
    powers = [math.exp((x - max(logits)) / temperature) for x in logits]
    return [power / sum(powers) for power in powers]


def softmax_focal_row(student: list[float], teacher: list[float], beta: float = 1.0) -> float:
    pairs = list(zip(softmax(student), softmax(teacher), strict=True))
    distance = sum(abs(s - t) for s, t in pairs) / 2
    return distance**beta * -sum(t * math.log(s) for s, t in pairs)


def kl_row(student: list[float], teacher: list[float], temperature: float = 1.0) -> float:
    pairs = zip(softmax(student, temperature), softmax(teacher, temperature), strict=True)
    return temperature**2 * sum(t * math.log(t / s) for s, t in pairs)


def areas(box: list[float], target: list[float]) -> tuple[float, float, float]:
    """Intersection, union and the smallest enclosing box."""

    def area(b: list[float]) -> float:
        return max(b[2] - b[0], 0.0) * max(b[3] - b[1], 0.0)

    inner = [*map(max, box[:2], target[:2]), *map(min, box[2:], target[2:])]
    outer = [*map(min, box[:2], target[:2]), *map(max, box[2:], target[2:])]
    union = area(box) + area(target) - area(inner)
    return area(inner), max(union, 1e-6), max(area(outer), 1e-6)


def giou_row(box: list[float], target: list[float]) -> float:
    intersection, union, enclosing = areas(box, target)
    return 1 - (intersection / union - (enclosing - union) / enclosing)


def log_iou_row(box: list[float], target: list[float]) -> float:
    intersection, union, _ = areas(box, target)
    return -math.log(max(intersection / union, 1e-6))
