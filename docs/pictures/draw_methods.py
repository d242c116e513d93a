r"""Draws what each method compares, on one image, as PNG files beside this script.

Teacher and student are files of ``examples/train_torchvision.py``, two GFLs unless ``--teacher-model`` and
``--student-model`` say otherwise; ``benchmarks/bccd.py`` trains them all, and with its output folder in
``--distilled`` pictures show beside the student that was trained alone the one that the method has taught.
Those of the documentation, on an image of BCCD (MIT licence, copyright 2017 shenggan)::

    python benchmarks/bccd.py --root data/bccd --output runs/gfl --results runs/gfl/table \
        --teacher gfl_resnet50 --student gfl_resnet18 --short-side 96 --width 96 --anchor-scale 0.3 \
        --teacher-epochs 18 --epochs 4 --seeds 0 --ablate-tap --methods none crosskd pkd cwd ssim bckd
    python docs/pictures/draw_methods.py --root data/bccd --distilled runs/gfl \
        --teacher runs/gfl/teacher/none.pt --student runs/gfl/none_seed0/none.pt

Each picture is a function that returns a figure. What it shows comes from the methods themselves or from the
library's losses, as a step of training would have it, but for the student, which is in eval mode. Where a
picture shows one channel, it is the one that varies most over the teacher's map; of the levels it is the
finest.
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

from coco_data import CocoFolder
from dense_heads import adapter_of
from models import MODEL_NAMES, build_detector, load_weights

from crosskd import (
    BCKD,
    CWD,
    DRKD,
    FGD,
    LD,
    MGD,
    PKD,
    CosineAlignment,
    CrossKD,
    Distiller,
    FeatureImitation,
    Method,
    StructuralKD,
)
from crosskd.adapters import Anchors, backbone
from crosskd.align import feature_statistics
from crosskd.losses import valuable_region
from crosskd.losses.fgd import attention, object_masks
from crosskd.losses.ssim import min_max_scaled, ssim_map
from crosskd.methods.cwd import class_maps
from crosskd.methods.drkd import levels_of, pool
from crosskd.predictions import Predictions
from crosskd.step import Step

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

FOLDER = Path(__file__).resolve().parent
WIDTH = 9.0  # inches
DPI = 100
# Blue and vermilion of Okabe and Ito's palette, as in the schemes that draw.py draws.
TEACHER, STUDENT = "#0072b2", "#d55e00"
BATCH = 4  # images of a step; the first one is shown
UNIT = Normalize(0, 1)
ROUNDS = 200  # of training a method's own layers, where a picture needs them


# -- what is drawn ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scene:
    """The detectors and the data.

    Attributes:
        options: of the command line.
        data: the images.
        teacher: in eval mode.
        student: trained on the labels alone, in eval mode.
        chosen: which image is shown.
    """

    options: argparse.Namespace
    data: CocoFolder
    teacher: nn.Module
    student: nn.Module
    chosen: int

    def batch(self, number: int = 0) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
        """Images and targets, one behind the other from the one that is shown, or from a later batch on."""
        first = self.chosen + number * BATCH
        samples = [self.data[(first + place) % len(self.data)] for place in range(BATCH)]
        return [image for image, _ in samples], [target for _, target in samples]

    def step(
        self, method: Method, student: nn.Module | None = None, number: int = 0, **settings: Any
    ) -> tuple[Any, Step]:
        """The method, set up for the pair, and what it sees of a batch."""
        torch.manual_seed(0)
        sides = {"teacher": self.teacher, "student": student or self.student, **settings}
        distiller = Distiller(methods=method, adapter=adapter_of, prove=False, **sides)
        ((name, step),) = distiller.trace(*self.batch(number)).steps.items()
        return distiller.methods[name], step

    def students(self, name: str, label: str) -> dict[str, nn.Module]:
        """How they were trained, and students: one alone and, if there is one, one that a method taught."""
        students = {"trained alone": self.student}
        if self.options.distilled is not None:
            path = self.options.distilled / f"{name}_seed0" / f"{name}.pt"
            taught = load(self.options.student_model, path, self.data, self.options)
            students[f"taught by {label}"] = taught
        return students


def load(name: str, path: Path, data: CocoFolder, options: argparse.Namespace) -> nn.Module:
    """A detector with the weights of a file, in eval mode."""
    detector = build_detector(
        name,
        data.num_classes,
        width=options.width,
        head_norm=options.head_norm,
        anchor_scale=options.anchor_scale,
        short_side=[options.short_side],
    )
    load_weights(detector, path)
    return detector.eval()


def telling_channel(teacher_map: Tensor) -> int:
    """The channel that varies most over a map (channels, height, width)."""
    return int(teacher_map.flatten(1).var(dim=1).argmax())


def probabilities(predictions: Predictions, step: Step) -> Tensor:
    """Each class's on the finest level of the image that is shown, (classes, height, width)."""
    return class_maps(predictions, step.student.anchors)[0][0].sigmoid()


def once(maps: Sequence[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
    """Maps without those whose title was there before: the teacher's comes with each student."""
    return list(dict(maps).items())


def train_own_layers(scene: Scene, method: Method, **settings: Any) -> tuple[Any, Step]:
    """A method whose own layers were trained on a few batches while the student stood still."""
    trained, shown = scene.step(method, **settings)
    steps = [shown, *(scene.step(method, number=number, **settings)[1] for number in range(1, 5))]
    for step in steps:
        for features in step.student.maps:
            features.requires_grad_()  # methods refuse maps that nobody trains
    optimizer = torch.optim.Adam(trained.parameters(), lr=1e-3)
    with torch.enable_grad():
        for place in range(ROUNDS):
            (loss,) = trained(steps[place % len(steps)]).values()
            optimizer.zero_grad()
            (loss / trained.weight).backward()
            optimizer.step()
    return trained, shown


# -- how it is drawn ----------------------------------------------------------------------------


def canvas(rows: int, columns: int, height: float, **options: Any) -> tuple[Figure, Any]:
    """A figure of the pages' width, and its axes by row and column."""
    size = {"figsize": (WIDTH, height), "dpi": DPI, "layout": "constrained", "squeeze": False}
    return plt.subplots(rows, columns, **size, **options)


def show_image(axes: Axes, scene: Scene, step: Step, *, numbered: bool = False, faint: bool = False) -> None:
    """The image in pixels of the batch, with the boxes of its objects."""
    height, width = step.image_sizes[0]
    image = scene.batch()[0][0].permute(1, 2, 0).numpy()
    axes.imshow(image, extent=(0, width, height, 0), alpha=0.45 if faint else 1.0)
    assert step.student.batch.objects is not None
    for number, box in enumerate(step.student.batch.objects[0].boxes.tolist(), 1):
        outline(axes, box, "black")
        if numbered:
            label = {"facecolor": "white", "edgecolor": "none", "pad": 1.0, "alpha": 0.85}
            x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
            axes.text(x, y, str(number), fontsize=9, ha="center", va="center", bbox=label)
    axes.set(title="image, objects", xlim=(0, width), ylim=(height, 0))
    axes.set_axis_off()


def outline(axes: Axes, box: Sequence[float], colour: str, width: float = 1.2) -> None:
    """A box, xyxy."""
    left, top, right, bottom = box
    place = (left, top), right - left, bottom - top
    axes.add_patch(Rectangle(*place, fill=False, color=colour, lw=width))


def show_maps(
    figure: Figure,
    row: Sequence[Axes],
    maps: Sequence[tuple[str, Tensor]],
    scale: str = "",
    norm: Normalize | None = None,
    colours: str = "viridis",
) -> None:
    """Maps (height, width) side by side with their titles, and one scale behind the last of them."""
    if norm is None:
        seen = torch.cat([values[values.isfinite()] for _, values in maps])
        norm = Normalize(seen.min().item(), seen.max().item())
    palette = plt.get_cmap(colours).with_extremes(bad="#d9d9d9")
    for axes, (title, values) in zip(row, maps, strict=True):
        shown = axes.imshow(values.numpy(), cmap=palette, norm=norm)
        axes.set_title(title)
        axes.set_axis_off()
    figure.colorbar(shown, ax=list(row), label=scale, shrink=0.9, aspect=16, pad=0.02)


def show_anchors(axes: Axes, anchors: Anchors, weight: Tensor, largest: float) -> Any:
    """The centres of the finest level's anchors that have a weight, as points in its colour."""
    finest = slice(anchors.per_level[0])
    counted = weight[finest] > 0
    x, y = centers(anchors.boxes[finest][counted]).T.numpy()
    colours = weight[finest][counted].numpy()
    return axes.scatter(x, y, c=colours, s=28, vmin=0, vmax=largest, edgecolors="black", linewidths=0.4)


def centers(boxes: Tensor) -> Tensor:
    """Of boxes (..., 4), xyxy."""
    return (boxes[..., :2] + boxes[..., 2:]) / 2


def lines(axes: Axes, title: str, teacher: Tensor, student: Tensor) -> None:
    """Numbers of both sides, a line each."""
    for values, side, colour in ((teacher, "teacher", TEACHER), (student, "student", STUDENT)):
        axes.plot(values.numpy(), label=side, color=colour, lw=1.5)
    axes.set_title(title)
    axes.spines[["top", "right"]].set_visible(False)


def save(figure: Figure, path: Path) -> None:
    """Writes a PNG of 256 colours, a third as large as one of all."""
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=DPI)
    plt.close(figure)
    image = Image.open(drawn).convert("RGB")
    image.quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(path, optimize=True)


# -- the pictures -------------------------------------------------------------------------------


def pkd(scene: Scene) -> Figure:
    """A channel of both maps before and after normalisation, and the squared difference."""
    raw, normalised, apart = [], [], []
    for how, student in scene.students("pkd", "PKD").items():
        method, step = scene.step(PKD(), student)
        _, ours, theirs = method.compared(step)[0]
        channel = telling_channel(theirs[0])
        raw += [("teacher", theirs[0, channel]), (f"student {how}", ours[0, channel])]
        theirs, ours = (feature_statistics(side).normalize(side)[0, channel] for side in (theirs, ours))
        normalised += [("teacher, normalised", theirs), (f"student {how}, normalised", ours)]
        apart.append(("squared difference", (theirs - ours).square()))
    figure, rows = canvas(3, 1 + len(apart), 6.6)
    show_maps(figure, rows[0], once(raw), "feature")
    show_maps(figure, rows[1], once(normalised), "feature, normalised")
    show_image(rows[2, 0], scene, step)
    show_maps(figure, rows[2, 1:], apart, colours="magma")
    return figure


def cwd(scene: Scene) -> Figure:
    """One channel as a distribution over space, and what each location adds to the divergence.

    The channel is the one in the middle, by the entropy of the teacher's distribution: that which varies
    most is active in a single location.
    """
    shares, parts = [], []
    for how, student in scene.students("cwd", "CWD").items():
        method, step = scene.step(CWD(), student)
        _, *maps = method.compared(step)[0]
        ours, theirs = ((side[0] / method.temperature).flatten(1).softmax(dim=1) for side in maps)
        spread = -(theirs * theirs.log()).sum(dim=1)
        channel = int(spread.sort().indices[len(spread) // 2])
        ours, theirs = (side[channel].view(maps[0].shape[2:]) for side in (ours, theirs))
        shares += [("teacher", theirs), (f"student {how}", ours)]
        # The last two add up to 0 over all locations, and leave no location below it.
        part = theirs * (theirs / ours).log() - theirs + ours
        parts.append((f"divergence, {part.sum():.2f} in all", part))
    figure, rows = canvas(2, 1 + len(parts), 4.5)
    show_maps(figure, rows[0], once(shares), "share of the channel", LogNorm(1e-4, 1))
    show_image(rows[1, 0], scene, step)
    show_maps(figure, rows[1, 1:], parts, colours="magma")
    return figure


def ssim(scene: Scene) -> Figure:
    """A channel scaled from 0 to 1 on both sides, and the similarity around each location."""
    scaled, alike = [], []
    for how, student in scene.students("ssim", "SSIM").items():
        method, step = scene.step(StructuralKD(), student)
        _, ours, theirs = method.compared(step)[0]
        channel = telling_channel(theirs[0])
        theirs, ours = (min_max_scaled(side, method.minmax) for side in (theirs, ours))
        similarity = ssim_map(ours, theirs, window_size=method.window_size, sigma=method.sigma)[0, channel]
        scaled += [("teacher", theirs[0, channel]), (f"student {how}", ours[0, channel])]
        alike.append((f"SSIM, {similarity.mean():.2f} on average", similarity))
    figure, rows = canvas(2, 1 + len(alike), 4.5)
    show_maps(figure, rows[0], once(scaled), "feature, scaled", UNIT)
    show_image(rows[1, 0], scene, step)
    show_maps(figure, rows[1, 1:], alike, "SSIM", Normalize(-1, 1), "cividis")
    return figure


def mgd(scene: Scene) -> Figure:
    """What a mask leaves of the student's map, the map generated from that, and the teacher's."""
    method, step = train_own_layers(scene, MGD(reduction="mean"))
    seen: list[Tensor] = []
    method.generators["level0"].register_forward_hook(lambda _, given, made: seen.extend([*given, made]))
    method(step)
    masked, generated = (side[0] for side in seen)
    ours, theirs = (side[0] for side in method.compared(step)[0][1:])
    kept = (masked != 0).any(dim=0)
    channel, own = telling_channel(theirs), telling_channel(ours)
    figure, rows = canvas(2, 3, 4.5)
    left = torch.where(kept, ours[own], torch.nan)
    show_maps(figure, rows[0, :2], [("student", ours[own]), ("student, masked", left)], "feature")
    show_image(rows[0, 2], scene, step)
    made = [("generated from all channels", generated[channel]), ("teacher", theirs[channel])]
    show_maps(figure, rows[1, :2], made, "feature")
    apart = (generated - theirs)[channel].square()
    show_maps(figure, rows[1, 2:], [("squared difference", apart)], colours="magma")
    return figure


def fgd(scene: Scene) -> Figure:
    """Where objects and where background count, and both sides' attention."""
    method, step = scene.step(FGD())
    _, ours, theirs = method.compared(step)[0]
    boxes = [objects.boxes for objects in step.foreground(method.threshold)]
    foreground, background = object_masks(boxes, ours, step.student.strides[0])
    figure, rows = canvas(2, 3, 4.5)
    masks = [("objects, M", foreground[0, 0]), ("background, B", background[0, 0])]
    masks = [(title, mask.masked_fill(mask == 0, torch.nan)) for title, mask in masks]
    show_maps(figure, rows[0, :2], masks, "weight", LogNorm(0.005, 0.5))
    show_image(rows[0, 2], scene, step)
    space, channels = attention(theirs, method.settings.temperature)
    own_space, own_channels = attention(ours, method.settings.temperature)
    attended = [("attention, teacher", space[0, 0]), ("attention, student", own_space[0, 0])]
    show_maps(figure, rows[1, :2], attended, "1 on average", LogNorm(0.01, 100))
    order = channels[0].flatten().argsort(descending=True)
    lines(rows[1, 2], "attention of channels", channels[0].flatten()[order], own_channels[0].flatten()[order])
    rows[1, 2].set(xlabel="channel, in the teacher's order", yscale="log")
    rows[1, 2].legend(frameon=False)
    return figure


def drkd(scene: Scene) -> Figure:
    """Each object's similarity to the others of the image, on both sides."""
    method, step = scene.step(DRKD())
    boxes = step.foreground(method.threshold)[0].boxes
    strides, image = step.student.strides, torch.zeros(len(boxes))
    levels = levels_of(boxes, dict(enumerate(strides)))
    sides = []
    for maps in (step.teacher.maps, step.student.maps):
        vectors = torch.zeros(len(boxes), maps[0].shape[1])
        for level, stride in enumerate(strides):
            here = levels == level
            vectors[here] = pool(maps[level], boxes[here], image[here], stride).mean(dim=(2, 3))
        vectors = F.normalize(vectors)
        # As the relation begins, before its filter and its linear maps have learned anything.
        sides.append((vectors @ vectors.mT / method.relations["all"].temperature).softmax(dim=0))
    figure, ((first, *row),) = canvas(1, 4, 2.3, width_ratios=(1.5, 1, 1, 1))
    show_image(first, scene, step, numbered=True)
    related = list(zip(("relation, teacher", "relation, student"), sides, strict=True))
    show_maps(figure, row[:2], related, norm=LogNorm(1e-3, 1))
    show_maps(figure, row[2:], [("squared difference", (sides[0] - sides[1]).square())], colours="magma")
    for axes in row:
        axes.set_axis_on()
        axes.set_xticks(range(len(boxes)), range(1, len(boxes) + 1))
        axes.set_yticks(range(len(boxes)), range(1, len(boxes) + 1))
        axes.tick_params(length=0)
    return figure


def cosine(scene: Scene) -> Figure:
    """The cosine of both maps at each position, with the projection as it begins and after training."""
    # A backbone teaches: the detector's own, without its pyramid and its head.
    layers = backbone(layers=("layer2", "layer3", "layer4"))
    settings = {"teacher": scene.teacher.backbone.body, "teacher_adapter": layers}
    method = CosineAlignment(levels=(0,))
    found = []
    for title, (settled, step) in (
        ("projection at first", scene.step(method, **settings)),
        ("projection trained", train_own_layers(scene, method, **settings)),
    ):
        _, ours, theirs = settled.compared(step)[0]
        found.append((f"cosine, {title}", F.cosine_similarity(ours, theirs)[0]))
    figure, ((first, *row),) = canvas(1, 3, 2.4)
    show_image(first, scene, step)
    show_maps(figure, row, found, "cosine", Normalize(min(v.min().item() for _, v in found), 1))
    return figure


def bckd(scene: Scene) -> Figure:
    """How sure both sides are of an object, and how far they disagree, which weighs the boxes."""
    sure, apart = [], []
    for how, student in scene.students("bckd", "BCKD").items():
        _, step = scene.step(BCKD(), student)
        theirs, ours = (probabilities(side.predictions, step) for side in (step.teacher, step.student))
        sure += [("teacher", theirs.amax(dim=0)), (f"student {how}", ours.amax(dim=0))]
        apart.append(("largest difference of a class", (theirs - ours).abs().amax(dim=0)))
    figure, rows = canvas(2, 1 + len(apart), 4.5)
    show_maps(figure, rows[0], once(sure), "largest probability", UNIT)
    show_image(rows[1, 0], scene, step)
    show_maps(figure, rows[1, 1:], apart, "weight of the box", colours="magma")
    return figure


def ld(scene: Scene) -> Figure:
    """Positive anchors, the region around the objects, and the distributions of one side of a box."""
    method, step = scene.step(LD())
    theirs, ours = (side.predictions.regression[0] for side in (step.teacher, step.student))
    anchors = step.student.anchors
    positive = step.assignment.positive[0] * step.student.predictions.confidence()[0]
    region = valuable_region(anchors.boxes, step.objects[0].boxes, anchors.per_level)
    figure, axes = plt.subplot_mosaic(
        [["positive anchors", "valuable region", plot] for plot in ("plain", "soft")],
        figsize=(WIDTH, 2.7),
        dpi=DPI,
        layout="constrained",
        width_ratios=(1.35, 1.35, 1),
    )
    both = [axes["positive anchors"], axes["valuable region"]]
    largest = max(positive.max().item(), region.max().item())
    for place, weight in zip(both, (positive, region), strict=True):
        show_image(place, scene, step, faint=True)
        shown = show_anchors(place, anchors, weight, largest)
        place.set_title(place.get_label())
    figure.colorbar(shown, ax=both, label="weight", shrink=0.8, aspect=16, pad=0.02)
    # The anchor and the side of its box that add most to the loss.
    soft = [(side / method.temperature).log_softmax(dim=-1) for side in (theirs, ours)]
    divergence = positive[:, None] * F.kl_div(soft[1], soft[0], reduction="none", log_target=True).sum(-1)
    anchor, side = divmod(int(divergence.argmax()), 4)
    x, y = centers(anchors.boxes[anchor]).tolist()
    both[0].scatter([x], [y], s=90, facecolors="none", edgecolors=STUDENT, lw=2)
    named = ("left", "top", "right", "bottom")[side]
    plain = (outputs[anchor, side].softmax(dim=-1) for outputs in (theirs, ours))
    lines(axes["plain"], f"circled anchor, {named} side", *plain)
    softened = (outputs[anchor, side].exp() for outputs in soft)
    lines(axes["soft"], f"the same at temperature {method.temperature:g}", *softened)
    axes["soft"].set(xlabel="distance to the side, strides", ylim=(0, None))
    axes["plain"].legend(frameon=False)
    return figure


def crosskd(scene: Scene) -> Figure:
    """The teacher's classes, what its head makes of the student's features, and the student's own."""
    cross, own = [], []
    for how, student in scene.students("crosskd", "CrossKD").items():
        method, step = scene.step(CrossKD(), student)
        teacher, read, plain = (
            probabilities(predictions, step).amax(dim=0)
            for predictions in (step.teacher.predictions, method.cross_head(step), step.student.predictions)
        )
        cross += [("teacher", teacher), (f"cross-head, {how}", read)]
        own.append((f"student's own, {how}", plain))
    figure, rows = canvas(2, 1 + len(own), 4.5)
    show_maps(figure, rows[0], once(cross), "largest probability", UNIT)
    show_image(rows[1, 0], scene, step)
    show_maps(figure, rows[1, 1:], own, "largest probability", UNIT)
    return figure


def imitation(scene: Scene) -> Figure:
    """How much each location counts, and the student's map through its block against the teacher's."""
    method, step = train_own_layers(scene, FeatureImitation(active_above=0.5))
    ours, theirs = (side[0] for side in method.compared(step)[0][1:])
    size = theirs.abs().mean(dim=0)
    counts = torch.where(size > method.active_above * size.max(), 1.0, method.inactive_weight)
    channel = telling_channel(theirs)
    figure, rows = canvas(2, 3, 4.5)
    show_maps(figure, rows[0, :1], [("teacher, mean magnitude", size)])
    show_maps(figure, rows[0, 1:2], [("weight", counts)], norm=UNIT)
    show_image(rows[0, 2], scene, step)
    both = [("student, behind its block", ours[channel]), ("teacher", theirs[channel])]
    show_maps(figure, rows[1, :2], both, "feature")
    apart = counts * (ours - theirs)[channel].square()
    show_maps(figure, rows[1, 2:], [("squared difference, weighted", apart)], colours="magma")
    return figure


PICTURES: dict[str, Callable[[Scene], Figure]] = {
    "bckd.png": bckd,
    "cosine.png": cosine,
    "crosskd.png": crosskd,
    "cwd.png": cwd,
    "drkd.png": drkd,
    "fgd.png": fgd,
    "imitation.png": imitation,
    "ld.png": ld,
    "mgd.png": mgd,
    "pkd.png": pkd,
    "ssim.png": ssim,
}


# -- the command line ---------------------------------------------------------------------------


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options; those that build the detectors are the training script's."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--root", type=Path, required=True, help="folder of a COCO-format data set")
    parser.add_argument("--images", default="images", help="folder in it")
    parser.add_argument("--annotations", default="annotations/test.json", help="file in it")
    parser.add_argument("--image", default="BloodImage_00132.jpg", help="name of the file that is shown")
    parser.add_argument("--teacher", type=Path, required=True, help="file of the trained teacher")
    parser.add_argument("--student", type=Path, required=True, help="of a student trained on labels alone")
    parser.add_argument("--distilled", type=Path, help="folder of students: METHOD_seed0/METHOD.pt")
    parser.add_argument("--teacher-model", choices=MODEL_NAMES, default="gfl_resnet50")
    parser.add_argument("--student-model", choices=MODEL_NAMES, default="gfl_resnet18")
    parser.add_argument("--head-norm", choices=("none", "group"), default="none")
    parser.add_argument("--width", type=int, default=96)
    parser.add_argument("--anchor-scale", type=float, default=0.3)
    parser.add_argument("--short-side", type=int, default=96)
    parser.add_argument("--output", type=Path, default=FOLDER)
    parser.add_argument("--only", nargs="+", choices=tuple(PICTURES), default=list(PICTURES))
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Draws the pictures."""
    options = parse(arguments)
    torch.set_grad_enabled(False)
    plt.rcParams.update({"font.size": 9, "axes.titlesize": 10})
    data = CocoFolder(options.root / options.images, options.root / options.annotations)
    files = data.annotations.file_names.tolist()
    teacher = load(options.teacher_model, options.teacher, data, options)
    student = load(options.student_model, options.student, data, options)
    scene = Scene(options, data, teacher, student, files.index(options.image))
    for name in options.only:
        save(PICTURES[name](scene), options.output / name)
        print(f"{name}: {(options.output / name).stat().st_size // 1024} KB")


if __name__ == "__main__":
    main()
