"""Draws the documentation's pictures, as SVG files beside this script: ``python docs/pictures/draw.py``.

Each picture is a function that returns the file's text. A test compares it with the committed file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

Point = tuple[float, float]

WIDTH = 860
TEXT = 14
SMALL = 13
FONT = "Helvetica, Arial, 'Liberation Sans', sans-serif"

INK = "#222222"
FAINT = "#6b6b6b"
BACKGROUND = "#fcfcfc"
# Blue, vermilion and bluish green of Okabe and Ito's palette, which colour-blind readers tell apart.
OUTLINES = {
    "teacher": "#0072b2",
    "student": "#d55e00",
    "losses": "#00785a",
    "plain": "#555555",
    "off": "#999999",
}
FILLS = {
    "teacher": "#d9eaf6",
    "student": "#fde5d6",
    "losses": "#d3efe5",
    "plain": "#ffffff",
    "off": "#f1f1f1",
}


class Box(NamedTuple):
    """A rectangle, and the middles of its sides, where arrows start and end."""

    x: float
    y: float
    width: float
    height: float

    @property
    def left(self) -> Point:
        """The middle of the left side."""
        return self.x, self.y + self.height / 2

    @property
    def right(self) -> Point:
        """The middle of the right side."""
        return self.x + self.width, self.y + self.height / 2

    @property
    def top(self) -> Point:
        """The middle of the upper side."""
        return self.x + self.width / 2, self.y

    @property
    def bottom(self) -> Point:
        """The middle of the lower side."""
        return self.x + self.width / 2, self.y + self.height


# -- strokes ------------------------------------------------------------------------------------


def label(
    at: Point, text: str, size: float = SMALL, anchor: str = "middle", colour: str = INK, bold: bool = False
) -> str:
    """Writes lines of text whose middle is at a height.

    Args:
        at: where the text starts, has its middle or ends, as `anchor` says.
        text: its lines.
        size: of the letters, in pixels.
        anchor: ``"start"``, ``"middle"`` or ``"end"``.
        colour: of the letters.
        bold: whether they are.
    """
    lines = text.split("\n")
    step = 1.2 * size
    y = at[1] - step * (len(lines) - 1) / 2 + 0.35 * size
    weight = ' font-weight="bold"' if bold else ""
    written = []
    for number, words in enumerate(lines):
        place = f'x="{at[0]:g}" y="{y + number * step:.4g}" font-size="{size:g}" text-anchor="{anchor}"'
        written.append(f'<text {place} fill="{colour}"{weight}>{escape(words, quote=False)}</text>')
    return "\n".join(written)


def rectangle(place: Box, radius: float, style: str) -> str:
    """Draws a rectangle with round corners."""
    x, y, width, height = place
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{radius:g}" {style}/>'


def box(place: Box, text: str = "", kind: str = "plain", radius: float = 5, dashed: bool = False) -> str:
    """Draws a box in the colours of the teacher, the student, the losses or of nothing, with its text."""
    dashes = ' stroke-dasharray="5 4"' if dashed else ""
    style = f'fill="{FILLS[kind]}" stroke="{OUTLINES[kind]}" stroke-width="1.5"{dashes}'
    drawn = rectangle(place, radius, style)
    middle = place.x + place.width / 2, place.y + place.height / 2
    colour = FAINT if kind == "off" else INK
    return f"{drawn}\n{label(middle, text, TEXT, colour=colour)}" if text else drawn


def pill(place: Box, text: str) -> str:
    """Draws losses: a box with round ends."""
    return box(place, text, "losses", radius=place.height / 2)


def line(*points: Point, colour: str = INK, width: float = 1.5, dashed: bool = False) -> str:
    """Draws a line through points."""
    path = " ".join(f"{x:g},{y:g}" for x, y in points)
    dashes = ' stroke-dasharray="5 3"' if dashed else ""
    return f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{width:g}"{dashes}/>'


def arrow(*points: Point, colour: str = INK, width: float = 1.5, dashed: bool = False) -> str:
    """Draws a line through points with a head whose tip is the last one."""
    (x0, y0), (x, y) = points[-2:]
    length = math.hypot(x - x0, y - y0)
    along, across = (x - x0) / length, (y - y0) / length
    head, half = 8.0, 4.0
    base = x - head * along, y - head * across
    corners = (
        (x, y),
        (base[0] - half * across, base[1] + half * along),
        (base[0] + half * across, base[1] - half * along),
    )
    path = " ".join(f"{a:g},{b:g}" for a, b in corners)
    shaft = line(*points[:-1], base, colour=colour, width=width, dashed=dashed)
    return f'{shaft}\n<polygon points="{path}" fill="{colour}"/>'


def dot(at: Point, colour: str = INK) -> str:
    """Marks a point."""
    return f'<circle cx="{at[0]:g}" cy="{at[1]:g}" r="4.5" fill="{colour}"/>'


def bracket(left: float, right: float, y: float, text: str, below: bool = False) -> str:
    """Draws a bracket over what lies between two places, or below it, with a name."""
    leg = -6 if below else 6
    drawn = line((left, y + leg), (left, y), (right, y), (right, y + leg), colour=FAINT, width=1)
    away = 12 if below else -12
    return f"{drawn}\n{label(((left + right) / 2, y + away), text, colour=FAINT)}"


def legend(y: float, entries: Iterable[tuple[str, str]], x: float = 24) -> list[str]:
    """Names colours from left to right: pairs of a kind of box and its meaning."""
    drawn = []
    for kind, text in entries:
        drawn.append(box(Box(x, y - 8, 22, 16), kind=kind, radius=8 if kind == "losses" else 3))
        drawn.append(label((x + 30, y), text, anchor="start"))
        x += 54 + 6.4 * len(text)
    return drawn


def picture(title: str, description: str, height: float, parts: Iterable[str]) -> str:
    """Puts the parts of a picture together on a light ground, which a dark page needs."""
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height:g}" '
        f'viewBox="0 0 {WIDTH} {height:g}" role="img" font-family="{FONT}">'
    )
    ground = Box(0.5, 0.5, WIDTH - 1, height - 1)
    lines = [
        head,
        f"<title>{escape(title, quote=False)}</title>",
        f"<desc>{escape(description, quote=False)}</desc>",
        rectangle(ground, 12, f'fill="{BACKGROUND}" stroke="#d0d0d0"'),
        *parts,
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


# -- the method, and where its gradients go -------------------------------------------------------


class Row(NamedTuple):
    """The boxes of one detector, from left to right."""

    backbone: Box
    blocks: tuple[Box, ...]
    predictor: Box


def detector_row(y: float, backbone: float, blocks: Iterable[float], predictor: float) -> Row:
    """Places a detector's boxes about a height; the other arguments are their left sides."""
    top, height = y - 21, 42
    return Row(
        Box(backbone, top, 96, height),
        tuple(Box(x, top, 58, height) for x in blocks),
        Box(predictor, top, 80, height),
    )


def draw_row(row: Row, kind: str) -> list[str]:
    """Draws a detector's boxes, without arrows."""
    drawn = [box(row.backbone, "Backbone,\npyramid", kind)]
    for number, block in enumerate(row.blocks, 1):
        drawn.append(box(block, f"Block {number}", kind))
    return [*drawn, box(row.predictor, "Predictor", kind)]


def forward_arrows(boxes: Iterable[Box], colour: str = INK) -> list[str]:
    """Joins boxes from left to right."""
    return [arrow(before.right, after.left, colour=colour) for before, after in pairwise(boxes)]


def method() -> str:
    """The method: both detectors, the split, the cross-head and the losses."""
    blocks = (224, 300, 376, 520)
    teacher, student = (detector_row(y, 106, blocks, 600) for y in (78, 310))
    answers = [Box(718, y - 21, 118, 42) for y in (78, 200, 310)]
    image = Box(20, 173, 62, 42)
    parts = [
        label((154, 42), "Teacher, frozen", TEXT, colour=OUTLINES["teacher"], bold=True),
        label((154, 350), "Student", TEXT, colour=OUTLINES["student"], bold=True),
        bracket(224, 578, 42, "Tower"),
        box(image, "Image"),
        arrow(image.top, (image.top[0], 78), teacher.backbone.left),
        arrow(image.bottom, (image.top[0], 310), student.backbone.left),
    ]
    for row, kind, answer in ((teacher, "teacher", answers[0]), (student, "student", answers[2])):
        parts += draw_row(row, kind)
        parts += forward_arrows([row.backbone, *row.blocks, row.predictor, answer])
        parts.append(box(answer, f"{kind.capitalize()}'s\npredictions", kind))
    parts += cross_head(477, teacher, answers[1])
    parts += method_losses(answers)
    meanings = (("teacher", "Teacher, not trained"), ("student", "Student, trained"), ("losses", "Losses"))
    parts += legend(394, meanings)
    description = (
        "After block 3 the student's features are aligned to the teacher's statistics and pass the rest "
        "of the teacher's frozen head. These cross-head predictions are compared with the teacher's "
        "predictions in kd_cls and kd_reg. The student's own predictions are compared with the labels alone."
    )
    return picture("The method", description, 426, parts)


def cross_head(x: float, teacher: Row, answer: Box) -> list[str]:
    """The alignment at the split, and the rest of the teacher's head behind it.

    Args:
        x: where both towers are split.
        teacher: its boxes; the rest of its head is drawn below its own.
        answer: the place of the cross-head predictions.
    """
    align = Box(x - 27, answer.y, 54, 42)
    block = Box(teacher.blocks[3].x, answer.y, 58, 42)
    predictor = Box(teacher.predictor.x, answer.y, 80, 42)
    return [
        dot((x, 78)),
        dot((x, 310)),
        label((x, 60), "Position 3"),
        label((x, 329), "Position 3"),
        arrow((x, 78), align.top),
        arrow((x, 310), align.bottom),
        label((x - 10, 128), "Mean and standard deviation\nper channel", anchor="end"),
        label((x - 10, 260), "Student's features", anchor="end"),
        box(align, "Align"),
        box(block, "Block 4", "teacher"),
        box(predictor, "Predictor", "teacher"),
        label(((block.x + predictor.right[0]) / 2, 164), "Rest of the teacher's head"),
        box(answer, "Cross-head\npredictions"),
        *forward_arrows([align, block, predictor, answer]),
    ]


def method_losses(answers: list[Box]) -> list[str]:
    """The losses: the distillation's between two predictions, the student's own with the labels."""
    teacher, crossed, student = answers
    distillation = Box(718, 123, 118, 32)
    own = Box(718, 378, 118, 32)
    labels = Box(600, 378, 80, 32)
    return [
        arrow(teacher.bottom, distillation.top),
        arrow(crossed.top, distillation.bottom),
        pill(distillation, "kd_cls, kd_reg"),
        arrow(student.bottom, own.top),
        arrow(labels.right, own.left),
        box(labels, "Labels"),
        pill(own, "Own losses"),
    ]


def gradients() -> str:
    """Where gradients flow: through the frozen rest of the teacher's head, and into the student."""
    blocks = (152, 240, 328, 506)
    teacher, student = (detector_row(y, 24, blocks, 596) for y in (72, 302))
    align, block, predictor = Box(419, 173, 54, 42), Box(506, 173, 58, 42), Box(596, 173, 80, 42)
    distillation, own = Box(718, 178, 118, 32), Box(718, 295, 118, 32)
    parts = [
        label(
            (24, 34), "Teacher, frozen: runs without gradients", TEXT, "start", OUTLINES["teacher"], bold=True
        ),
        label((24, 264), "Student", TEXT, "start", OUTLINES["student"], bold=True),
        *draw_row(teacher, "teacher"),
        *forward_arrows([teacher.backbone, *teacher.blocks, teacher.predictor], FAINT),
        arrow(teacher.predictor.right, (distillation.top[0], 72), distillation.top, colour=FAINT),
        label((767, 132), "Predictions", anchor="end", colour=FAINT),
        dot((446, 72), FAINT),
        arrow((446, 72), align.top, colour=FAINT),
        label((436, 132), "Statistics", anchor="end", colour=FAINT),
        *draw_row(student, "student"),
        box(align, "Align"),
        box(block, "Block 4", "teacher"),
        box(predictor, "Predictor", "teacher"),
        label((591, 148), "The gradient passes through,\nthe weights get none"),
        pill(distillation, "kd_cls, kd_reg"),
        pill(own, "Own losses"),
        *distillation_gradient(student, (align, block, predictor, distillation), 293),
        *own_gradient(student, own, 311),
        bracket(24, 386, 336, "Gradients of both", below=True),
        bracket(506, 676, 336, "Gradient of the own losses alone", below=True),
        *gradient_legend(396),
    ]
    description = (
        "The gradient of kd_cls and kd_reg flows back through the frozen rest of the teacher's head and the "
        "alignment into the student's blocks before the split, its pyramid and its backbone. The gradient "
        "of the student's own losses flows into all of the student. The teacher's weights get no gradient."
    )
    return picture("Where gradients flow", description, 424, parts)


def distillation_gradient(student: Row, crossed: tuple[Box, ...], y: float) -> list[str]:
    """The arrows of the distillation losses' gradient, against the direction of the forward pass.

    Args:
        student: its boxes.
        crossed: from the alignment to the losses, left to right.
        y: the height of the arrows between the student's boxes.
    """
    colour = OUTLINES["losses"]
    drawn = []
    for before, after in pairwise(crossed):
        drawn.append(arrow(after.left, before.right, colour=colour, width=2.5))
    reached = [student.backbone, *student.blocks[:3]]
    below = crossed[0].bottom
    drawn.append(arrow(below, (below[0], y), (reached[-1].right[0], y), colour=colour, width=2.5))
    for before, after in pairwise(reached):
        drawn.append(arrow((after.x, y), (before.right[0], y), colour=colour, width=2.5))
    return drawn


def own_gradient(student: Row, losses: Box, y: float) -> list[str]:
    """The arrows of the gradient of the student's own losses, which reaches all of it."""
    drawn = []
    for before, after in pairwise([student.backbone, *student.blocks, student.predictor, losses]):
        drawn.append(arrow((after.x, y), (before.right[0], y), colour=OUTLINES["losses"], dashed=True))
    return drawn


def gradient_legend(y: float) -> list[str]:
    """What the three kinds of arrows mean."""
    colour = OUTLINES["losses"]
    return [
        arrow((66, y), (24, y), colour=colour, width=2.5),
        label((74, y), "Gradient of kd_cls and kd_reg", anchor="start"),
        arrow((338, y), (296, y), colour=colour, dashed=True),
        label((346, y), "Gradient of the own losses", anchor="start"),
        arrow((548, y), (590, y), colour=FAINT),
        label((598, y), "Forward, no gradient", anchor="start"),
    ]


# -- the position ---------------------------------------------------------------------------------


def position() -> str:
    """What ``position`` counts on a tower, and where the two taps of a block are."""
    pyramid, predictor = Box(24, 75, 84, 42), Box(752, 75, 84, 42)
    blocks = [Box(x, 75, 80, 42) for x in (170, 312, 454, 596)]
    stations = [pyramid, *blocks, predictor]
    parts = [
        bracket(170, 676, 36, "Tower of four blocks"),
        *forward_arrows(stations),
        box(pyramid, "Pyramid"),
        box(predictor, "Predictor", "student"),
        label((24, 60), "Position", 16, "start", bold=True),
        label((139, 132), "Tower's input"),
        label((714, 132), "Tower's output"),
    ]
    for number, place in enumerate(blocks, 1):
        parts.append(box(place, f"Block {number}", "student"))
    for number, (before, after) in enumerate(pairwise(stations)):
        x = (before.right[0] + after.x) / 2
        parts += [line((x, 71), (x, 96), width=1), dot((x, 96)), label((x, 60), str(number), 16, bold=True)]
    parts += taps(blocks[2])
    note = (
        "At either tap: the features are aligned, then pass the activation of the teacher's block 3, "
        "its block 4 and its predictor."
    )
    parts.append(label((WIDTH / 2, 360), note, colour=FAINT))
    description = (
        "Position 0 is the input of the tower, positions 1 to 4 come after each of its four blocks. The tap "
        "'pre' takes a block's features before its activation, the tap 'post' after it."
    )
    return picture("What position counts", description, 386, parts)


def taps(block: Box) -> list[str]:
    """One block's layers, and its two taps."""
    frame = Box(200, 186, 440, 92)
    layers = [Box(x, 213, 84, 42) for x in (220, 352, 532)]
    before, after = (484, 234), (690, 234)
    parts = [
        line((block.x, 117), (frame.x, frame.y), colour=FAINT, width=1, dashed=True),
        line((block.right[0], 117), (frame.right[0], frame.y), colour=FAINT, width=1, dashed=True),
        box(frame, kind="student", radius=8),
        label((frame.x + 10, 200), "Block 3", anchor="start", colour=OUTLINES["student"], bold=True),
        *forward_arrows(layers),
        arrow((150, 234), layers[0].left),
        arrow(layers[2].right, (740, 234)),
    ]
    for place, name in zip(layers, ("Conv", "Norm", "Activation"), strict=True):
        parts.append(box(place, name))
    for at in (before, after):
        parts += [dot(at), line(at, (at[0], 294), width=1)]
    parts.append(label((before[0], 314), 'Position 3, tap "pre":\nbefore the activation'))
    parts.append(label((after[0], 314), 'Position 3, tap "post" (default):\nafter the activation'))
    return parts


# -- levels ---------------------------------------------------------------------------------------


def levels() -> str:
    """Levels matched by stride: equal ones are joined, the teacher's others are left out."""
    parts = [
        label((24, 54), "Teacher's levels", TEXT, "start", OUTLINES["teacher"], bold=True),
        label((24, 114), "Equal strides\nare joined", TEXT, "start", OUTLINES["losses"], bold=True),
        label((24, 174), "Student's levels", TEXT, "start", OUTLINES["student"], bold=True),
    ]
    for number, stride in enumerate((4, 8, 16, 32, 64)):
        x = 172 + 136 * number
        above, below = Box(x, 30, 116, 48), Box(x, 150, 116, 48)
        text = f"Stride {stride}\n{640 // stride} x {640 // stride}"
        if stride in (8, 16, 32):
            parts.append(box(above, text, "teacher"))
            parts.append(box(below, text, "student"))
            parts.append(line(above.bottom, below.top, colour=OUTLINES["losses"], width=2.5))
        else:
            parts.append(box(above, text, "off", dashed=True))
            parts.append(label((x + 58, 96), "Left out", colour=FAINT))
    note = "The sizes are those of the feature maps, for an image of 640 x 640 pixels."
    parts.append(label((24, 230), note, anchor="start", colour=FAINT))
    description = (
        "The teacher has levels of strides 4, 8, 16, 32 and 64, the student of 8, 16 and 32. Levels of equal "
        "stride are joined; the teacher's levels of strides 4 and 64 are left out."
    )
    return picture("Levels are matched by stride", description, 256, parts)


# -- what an adapter gives --------------------------------------------------------------------------


class Function(NamedTuple):
    """A function of an adapter: its name, what it does, and where it stands in its column."""

    name: str
    does: str
    top: float
    height: float


FUNCTIONS = (
    Function("prepare", "Batch: pixels,\nobjects, image sizes", 142, 42),
    Function("maps", "Pixels \u2192 feature pyramid", 192, 32),
    Function("branches", "Towers and predictors", 272, 32),
    Function("predict", "Tower outputs \u2192 logits,\nbox predictions", 312, 42),
    Function("anchors", "Places of the predictions", 362, 32),
    Function("decode", "Box predictions \u2192 boxes", 402, 32),
    Function("losses", "Label assignment\n\nOwn losses", 442, 70),
)


def function_boxes(x: float) -> dict[str, Box]:
    """The places of an adapter's functions, by name, in a column that starts at x."""
    return {function.name: Box(x + 12, function.top, 242, function.height) for function in FUNCTIONS}


def adapter_column(x: float, kind: str) -> list[str]:
    """One side: the detector, the adapter bound to it, and what the adapter gives."""
    detector = Box(x + 63, 20, 140, 32)
    frame = Box(x, 78, 266, 450)
    head = Box(x + 6, 240, 254, 280)
    text = "Teacher, frozen" if kind == "teacher" else "Student"
    parts = [
        box(frame, kind=kind, radius=8),
        box(detector, text, kind),
        line(detector.bottom, frame.top, colour=OUTLINES[kind]),
        label((x + 133, 97), f"Adapter of the {kind}", TEXT, colour=OUTLINES[kind], bold=True),
        label((x + 14, 127), "Each step", anchor="start"),
        box(head, kind=kind, dashed=True),
        label((x + 14, 257), "Each head", anchor="start"),
    ]
    for function, place in zip(FUNCTIONS, function_boxes(x).values(), strict=True):
        unused = kind == "teacher" and function.name == "losses"
        colour = FAINT if unused else INK
        does = "Not asked of the teacher" if unused else function.does
        middle = place.left[1]
        parts.append(box(place, kind="off" if unused else "plain"))
        parts.append(label((place.x + 8, middle), function.name, SMALL, "start", colour, bold=True))
        parts.append(label((place.x + 80, middle), does, 12, "start", colour))
    return parts


def adapter() -> str:
    """What an adapter gives: a column for either detector, and the method between them."""
    teacher, student = function_boxes(20), function_boxes(574)
    batch = Box(366, 147, 128, 32)
    parts = [
        *adapter_column(20, "teacher"),
        *adapter_column(574, "student"),
        box(batch, "Images, targets"),
        arrow(batch.left, teacher["prepare"].right),
        arrow(batch.right, student["prepare"].left),
        *method_between(teacher, student),
    ]
    description = (
        "One adapter is bound to the teacher, one to the student. In each step an adapter prepares the batch "
        "and gives the feature pyramid; of each head it gives branches, predictions, anchors, boxes and, of "
        "the student's, the label assignment and the own losses. The method reads from both and returns "
        "named losses."
    )
    return picture("What an adapter gives", description, 548, parts)


def method_between(teacher: dict[str, Box], student: dict[str, Box]) -> list[str]:
    """The method, what it reads on either side, and the losses that come out.

    Args:
        teacher: the places of the teacher's functions, by name.
        student: the student's.
    """
    middle, losses = Box(386, 250, 88, 218), Box(370, 486, 120, 32)
    parts = [box(middle, "Method"), arrow(middle.bottom, losses.top), pill(losses, "Named losses")]
    reads = (
        ("branches", "Statistics,\nrest of the head", "Features"),
        ("predict", "Predictions", "Predictions"),
    )
    for name, left, right in (*reads, ("decode", "Boxes", "Boxes")):
        y = teacher[name].left[1]
        parts.append(arrow((teacher[name].right[0], y), (middle.x, y)))
        parts.append(arrow((student[name].x, y), (middle.right[0], y)))
        for x, text in ((336, left), (524, right)):
            parts.append(label((x, y - (18 if "\n" in text else 11)), text, 12))
    edge = student["losses"].x
    parts.append(arrow((edge, 459), (middle.right[0], 459)))
    parts.append(label((524, 448), "Assignment", 12))
    parts.append(arrow((edge, losses.right[1]), losses.right))
    parts.append(label((532, losses.right[1] - 11), "Own losses", 12))
    return parts


# -- decoders of queries ----------------------------------------------------------------------------


def rows_of(y: float) -> list[Box]:
    """The places of a decoder's four predictions."""
    return [Box(640 + 46 * number, y - 17, 36, 34) for number in range(4)]


def queries() -> str:
    """What two decoders share, and what is matched where they share nothing."""
    parts = [
        label((24, 32), "Shared: QueryDistillation, DecoderCrossKD", TEXT, "start", bold=True),
        *shared_queries(),
        line((24, 372), (WIDTH - 24, 372), colour=FAINT, width=1),
        label((24, 398), "Matched: MatchedQueries", TEXT, "start", bold=True),
        *matched_queries(),
    ]
    meanings = (("teacher", "Teacher, not trained"), ("student", "Student, trained"), ("losses", "Losses"))
    parts += legend(582, meanings)
    description = (
        "Above: both decoders read the memory of their own detector and get the same queries, so row 1 of "
        "the teacher's predictions belongs to row 1 of the student's. In DecoderCrossKD the student's state "
        "after a layer goes through the rest of the teacher's decoder. Below: each decoder has its own "
        "queries, and rows are paired by the least cost."
    )
    return picture("What decoders share and what is matched", description, 612, parts)


def shared_queries() -> list[str]:
    """Both decoders on the same queries, and their rows, which belong together one by one."""
    image, shared = Box(20, 174, 62, 42), Box(296, 169, 130, 52)
    parts = [
        box(image, "Image"),
        box(shared, "Queries: random,\nthe teacher's own"),
        arrow(shared.top, (361, 111)),
        arrow(shared.right, (447, 195), (447, 279)),
        label((438, 250), "A linear layer,\nwhere widths differ", anchor="end"),
        bracket(640, 814, 54, "Predictions, row by row"),
    ]
    for y, kind, places in ((90, "teacher", (330, 416, 502)), (300, "student", (416, 502))):
        backbone, layers = Box(106, y - 21, 100, 42), [Box(x, y - 21, 62, 42) for x in places]
        turn = (image.top[0], y)
        parts += [
            arrow(image.top if kind == "teacher" else image.bottom, turn, backbone.left),
            box(backbone, "Backbone,\nencoder", kind),
            label((262, y - 11), "Memory"),
            *forward_arrows([backbone, *layers, rows_of(y)[0]]),
        ]
        parts += [box(place, f"Layer {number}", kind) for number, place in enumerate(layers, 1)]
        parts += [box(place, str(number), kind) for number, place in enumerate(rows_of(y), 1)]
    for above, below in zip(rows_of(90), rows_of(300), strict=True):
        parts.append(line(above.bottom, below.top, colour=OUTLINES["losses"], width=2.5))
    crossed = "DecoderCrossKD: the\nstudent's state goes\non in the teacher"
    return [
        *parts,
        pill(Box(632, 179, 190, 32), "kd_cls, kd_l1, kd_giou"),
        dot((490, 300)),
        arrow((490, 300), (490, 92), dashed=True),
        label((498, 150), crossed, anchor="start"),
    ]


def matched_queries() -> list[str]:
    """Rows of either side, in the order of its own queries, joined across."""
    sides = ((446, "teacher"), (536, "student"))
    parts = []
    for y, kind in sides:
        whole, rows = Box(106, y - 21, 300, 42), rows_of(y)
        parts.append(box(whole, f"The {kind}, on its own queries", kind))
        parts.append(arrow(whole.right, rows[0].left))
        parts += [box(place, str(number), kind) for number, place in enumerate(rows, 1)]
    above, below = (rows_of(y) for y, _ in sides)
    for number, partner in enumerate((2, 0, 3, 1)):
        ends = above[number].bottom, below[partner].top
        parts.append(line(*ends, colour=OUTLINES["losses"], width=2.5))
    cost = "By the least cost of\nclasses, L1 and GIoU"
    parts.append(label((622, 491), cost, anchor="end", colour=OUTLINES["losses"]))
    return parts


PICTURES: dict[str, Callable[[], str]] = {
    "method.svg": method,
    "gradients.svg": gradients,
    "position.svg": position,
    "levels.svg": levels,
    "adapter.svg": adapter,
    "queries.svg": queries,
}


def main() -> None:
    """Writes every picture beside this script."""
    for name, draw in PICTURES.items():
        (Path(__file__).parent / name).write_text(draw(), encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
