r"""Distils a teacher that sees another modality of the same scenes into a student that sees one.

Two folders hold pairs of images under the same file names: the student's, and the teacher's, aligned with
them (RGB and thermal, RGB and depth, a board and its defect-free template). A RetinaNet on MobileNetV2 is
trained on the teacher's images; then students of the same network, all from the same weights, with the same
budget, alone and distilled::

    python examples/cross_modality.py --data data/boards --images images --teacher-images images_pair

``--data`` holds the two folders and ``annotations/train.json``, ``val.json`` in COCO form. A run that was
stopped goes on where it was. ``--split test`` evaluates, what was trained before too, on ``test.json``.
"""

from __future__ import annotations

import argparse
import json
from argparse import Namespace
from functools import partial
from pathlib import Path

import torch
from augmentations import flip
from coco_data import CocoFolder, Sample, teacher_images, training_loader
from evaluation import evaluate
from models import load_weights
from processes import Processes, start
from run_folder import claim, fingerprint, save_atomically
from torch import Tensor, nn
from torchvision.models import MobileNet_V2_Weights, mobilenet_v2
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import remove_small_boxes
from torchvision.ops.feature_pyramid_network import LastLevelP6P7
from training import Trainer

from crosskd import Distiller, FeatureImitation, Method, ResponseDistillation, Schedule

WIDTH = 128  # channels of the pyramid and the towers
STAGES = {"6": 32, "13": 96, "17": 320}  # layers of MobileNetV2 at the strides 8, 16, 32, and their channels
STUDENTS = ("alone", "features", "features+responses")
RECIPE = {  # what the trainer takes beside the options
    "optimizer": "adamw",
    "weight_decay": 0.02,
    "schedule": "cosine",
    "warmup_steps": 50,
    "clip": 5.0,
    "accumulate": 1,
    "amp": "none",
    "compile": False,
    "ema": 0.0,
    "channels_last": True,
    "resume": True,
    "checkpoint_every": 0,
}
ANCHOR_SIZES = (16, 32, 64, 128, 256)  # in pixels, one per level


class Pairs(CocoFolder):
    """Random crops of one image, or of a pair of aligned ones, with the boxes in them.

    Args:
        root: the data set.
        folders: of the student's images; and of the teacher's, if there are any, whose crop is then
            ``target["teacher_image"]``.
        crop: side of the crops in pixels; smaller images are used whole.
        seed: of crops and flips.
    """

    def __init__(self, root: Path, folders: list[str], crop: int, seed: int) -> None:
        of_teacher = root / folders[1] if len(folders) > 1 else None
        annotations = root / "annotations" / "train.json"
        super().__init__(root / folders[0], annotations, seed=seed, augment=[flip], teacher_images=of_teacher)
        self.crop = crop

    def __getitem__(self, index: int) -> Sample:
        image, target = super().__getitem__(index)
        seed = hash((self.seed, self.epoch, int(target["image_id"]), 1)) % 2**63
        generator = torch.Generator().manual_seed(seed)
        height, width = (min(self.crop, side) for side in image.shape[1:])
        top = int(torch.randint(image.shape[1] - height + 1, (), generator=generator))
        left = int(torch.randint(image.shape[2] - width + 1, (), generator=generator))
        target.update(cropped(target, left, top, width, height))
        if "teacher_image" in target:
            target["teacher_image"] = target["teacher_image"][:, top : top + height, left : left + width]
        return image[:, top : top + height, left : left + width], target


def cropped(target: dict[str, Tensor], left: int, top: int, width: int, height: int) -> dict[str, Tensor]:
    """The boxes whose centre is in a crop, cut at its edges, in its pixels, and their labels."""
    boxes = target["boxes"] - target["boxes"].new_tensor([left, top, left, top])
    size = boxes.new_tensor([width, height])
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    inside = ((centres > 0) & (centres < size)).all(dim=1)
    boxes = torch.minimum(boxes[inside].clamp(min=0), size.repeat(2))
    kept = remove_small_boxes(boxes, 1.0)
    return {"boxes": boxes[kept], "labels": target["labels"][inside][kept]}


class Unresized(GeneralizedRCNNTransform):
    """Normalises images and leaves their size as it is, of crops and of whole images."""

    def resize(
        self, image: Tensor, target: dict[str, Tensor] | None = None
    ) -> tuple[Tensor, dict[str, Tensor] | None]:
        """Both as they are."""
        return image, target


def build_detector(classes: int, pretrained: bool, seed: int) -> nn.Module:
    """A RetinaNet on MobileNetV2, for images of any size, which are not resized.

    Args:
        classes: how many.
        pretrained: torchvision's ImageNet weights in the backbone (a download, or from its cache).
        seed: of all other weights.
    """
    torch.manual_seed(seed)
    layers = mobilenet_v2(weights=MobileNet_V2_Weights.IMAGENET1K_V1 if pretrained else None).features
    levels = {layer: str(level) for level, layer in enumerate(STAGES)}
    pyramid_top = LastLevelP6P7(WIDTH, WIDTH)
    backbone = BackboneWithFPN(layers, levels, list(STAGES.values()), WIDTH, extra_blocks=pyramid_top)
    octaves = tuple(tuple(int(size * 2 ** (third / 3)) for third in range(3)) for size in ANCHOR_SIZES)
    anchors = AnchorGenerator(octaves, ((0.5, 1.0, 2.0),) * len(octaves))
    head = RetinaNetHead(WIDTH, 9, classes, norm_layer=partial(nn.GroupNorm, 32))
    detector = RetinaNet(backbone, classes, anchor_generator=anchors, head=head)
    detector.transform = Unresized(0, 0, detector.transform.image_mean, detector.transform.image_std)
    return detector


def methods_of(name: str, steps: int) -> list[Method]:
    """What a student is distilled by in a run of so many steps; nothing for one that learns alone."""
    if name == "alone":
        return []
    # The backbone's levels: the two behind them have far larger numbers, which a squared error would follow.
    levels = (0, 1, 2)
    if name == "features":
        return [FeatureImitation(levels=levels)]
    half = steps // 2  # features first, then responses
    return [
        FeatureImitation(levels=levels, schedule=Schedule(decay=(half, steps))),
        ResponseDistillation(schedule=Schedule(warmup=half)),
    ]


def train(
    model: nn.Module, folders: list[str], name: str, seed: int, options: Namespace, processes: Processes
) -> dict[str, float]:
    """Trains a detector, alone or in a distiller, to ``OUTPUT/NAME.pt``; its metrics on ``--split``.

    Args:
        model: what to train.
        folders: its images; and the teacher's, if it has one.
        name: of the run.
        seed: of the order of the images, crops and flips.
        options: the script's.
        processes: where to train.
    """
    folder = options.output / name
    folder.mkdir(parents=True, exist_ok=True)
    data = Pairs(options.data, folders, options.crop, seed)
    loader = training_loader(data, options.batch_size, seed=seed, workers=options.workers)
    epochs = options.teacher_epochs if name == "teacher" else options.epochs
    settings = Namespace(**vars(options), **RECIPE, seed=seed, evaluate_every=epochs)
    trainer = Trainer(model, loader, folder, settings, epochs, processes)
    trainer.run(lambda detector: measured(detector, folders[0], folder, options, processes))
    save_atomically(trainer.detector.state_dict(), options.output / f"{name}.pt")
    kept = folder / f"{options.split}.json"
    if not kept.exists():  # it was trained before, and evaluated on another split
        measured(trainer.detector, folders[0], folder, options, processes)
    return dict(json.loads(kept.read_text()))


def measured(
    detector: nn.Module, images: str, folder: Path, options: Namespace, processes: Processes
) -> dict[str, float]:
    """COCO's metrics on whole images of ``--split``, which are kept in a run's folder."""
    data = CocoFolder(options.data / images, options.data / "annotations" / f"{options.split}.json")
    metrics = evaluate(detector, data, batch_size=8, device=processes.device)
    (folder / f"{options.split}.json").write_text(json.dumps(metrics))
    return metrics


def parse(arguments: list[str] | None = None) -> Namespace:
    """The options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder of the images' folders and of annotations/")
    add("--images", default="images", help="folder in --data of what the student sees")
    add("--teacher-images", default="images_pair", help="folder in --data of what the teacher sees")
    add("--teacher-weights", type=Path, metavar="PATH", help="a file of this script; trained if left out")
    add("--students", nargs="*", choices=STUDENTS, default=STUDENTS, help="one each, from equal weights")
    add("--seeds", type=int, nargs="+", default=[0], help="every student is trained once with each")
    add("--crop", type=int, default=160, help="side of the training crops in pixels")
    add("--teacher-epochs", type=int, default=5)
    add("--epochs", type=int, default=5, help="of each student")
    add("--batch-size", type=int, default=4)
    add("--learning-rate", type=float, default=1e-3)
    add("--random-backbone", action="store_true", help="no ImageNet weights")
    add("--split", choices=("val", "test"), default="val", help="what is evaluated on, after training")
    add("--output", type=Path, default=Path("runs/cross_modality"))
    add("--workers", type=int, default=0, help="processes that read images")
    add("--threads", type=int, help="of PyTorch on the CPU")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    return parser.parse_args(arguments)


def make_teacher(
    options: Namespace, classes: int, processes: Processes
) -> tuple[nn.Module, dict[str, float]]:
    """The teacher, trained on its images or loaded, with its metrics."""
    teacher = build_detector(classes, not options.random_backbone, seed=0)
    images = options.teacher_images
    if options.teacher_weights is None:
        return teacher, train(teacher, [images], "teacher", 0, options, processes)
    load_weights(teacher, options.teacher_weights)
    return teacher, measured(teacher.to(processes.device), images, options.output, options, processes)


def train_student(
    name: str, seed: int, teacher: nn.Module, steps: int, options: Namespace, processes: Processes
) -> dict[str, float]:
    """Trains a student, alone or distilled; its metrics.

    Args:
        name: one of ``STUDENTS``.
        seed: of its first weights and of what it sees when.
        teacher: trained.
        steps: how many the run has.
        options: the script's.
        processes: where to train.
    """
    student = build_detector(teacher.head.classification_head.num_classes, not options.random_backbone, seed)
    methods = methods_of(name, steps)
    if not methods:
        return train(student, [options.images], f"{name}-{seed}", seed, options, processes)
    distiller = Distiller(teacher, student.to(processes.device), methods, teacher_view=teacher_images)
    folders = [options.images, options.teacher_images]
    return train(distiller, folders, f"{name}-{seed}", seed, options, processes)


def main(arguments: list[str] | None = None) -> dict[str, dict[str, float]]:
    """Trains the teacher and the students; returns and writes the metrics of each."""
    options = parse(arguments)
    processes = start(options.device)
    if options.threads:
        torch.set_num_threads(options.threads)
    free = ("output", "students", "seeds", "split", "workers", "threads", "device", "data")
    settings = {name: value for name, value in vars(options).items() if name not in free}
    settings["teacher_weights"] = fingerprint(options.teacher_weights)
    settings["data"] = fingerprint(options.data / "annotations" / "train.json")
    lock = claim(options.output, settings, resume=True)
    data = Pairs(options.data, [options.images, options.teacher_images], options.crop, 0)
    steps = options.epochs * len(training_loader(data, options.batch_size, seed=0, workers=0))
    results: dict[str, dict[str, float]] = {}
    teacher, results["teacher"] = make_teacher(options, data.num_classes, processes)
    for seed in options.seeds:
        for name in options.students:
            results[f"{name}-{seed}"] = train_student(name, seed, teacher, steps, options, processes)
    shown = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
    metrics = {"results": results, "options": shown, "steps": steps}
    (options.output / "metrics.json").write_text(json.dumps(metrics, indent=2))
    for run, result in results.items():
        print(f"{run:<24}AP {result['AP']:.1f} ({options.split})")
    lock.close()
    return results


if __name__ == "__main__":
    main()
