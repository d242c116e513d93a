"""A teacher's outputs kept on disk: the losses of the teacher's own run, and folders that can be trusted."""

from __future__ import annotations

import copy
import json
import pickle
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor

import crosskd.cache
from crosskd import PKD, CrossKD, Distiller, FeatureImitation, Method, Schedule, TeacherCache
from crosskd.adapters import Batch
from crosskd.towers import TapPoint
from tests.adapters.test_generic import Objectness, Shared, adapter_for, pixels, with_objectness
from tests.helpers.steps import PlainAdapter
from tests.helpers.tiny import tiny_batch, tiny_fcos, tiny_retinanet
from tests.helpers.two_stages import tiny_faster_rcnn, two_stage_batch

# What the losses of CrossKD, PKD and feature imitation move by where entries are kept in bfloat16.
BFLOAT16 = 0.005


def distiller(folder, methods=None, build=tiny_retinanet, dtype=None, prove=False, **options) -> Distiller:
    """A pair with a cache, or without where no folder is given."""
    cache = None if folder is None else TeacherCache(folder, dtype=dtype, keep_free=0)
    methods = CrossKD() if methods is None else methods
    torch.manual_seed(0)  # of what the methods train
    return Distiller(build(seed=1), build(seed=2), methods, teacher_cache=cache, prove=prove, **options)


def losses_of(model: Distiller, batch) -> dict[str, float]:
    torch.manual_seed(3)
    return {name: loss.item() for name, loss in model(*batch).items()}


def images_of_teacher(model: Distiller) -> list[int]:
    """How many images the teacher is run on from now on, call by call."""
    seen: list[int] = []
    model.teacher.backbone.register_forward_hook(lambda _, given, __: seen.append(len(given[0])))
    return seen


def counts_calls(teacher) -> None:
    """Has a teacher count its calls in a buffer, in eval mode too, and write another as it was."""
    teacher.backbone.register_buffer("calls", torch.zeros(()))
    teacher.backbone.register_buffer("scale", torch.ones(()))

    def count(backbone, *_) -> None:
        backbone.calls += 1
        backbone.scale.fill_(1.0)

    teacher.backbone.register_forward_hook(count)


def entries(folder) -> list:
    return sorted(folder.glob("??/*.pt"))


@pytest.mark.parametrize(
    ("build", "methods", "batch", "options"),
    [
        (tiny_retinanet, [CrossKD(), PKD()], tiny_batch(), {"class_map": [1, 0, 3, 2]}),
        (tiny_fcos, CrossKD(), (tiny_batch()[0], None), {}),
        (tiny_faster_rcnn, CrossKD(), two_stage_batch(), {}),  # whose box head runs on maps that were kept
    ],
    ids=["retinanet-classes", "fcos-unlabelled", "two-stages"],
)
def test_losses_are_those_of_the_teachers_own_run(tmp_path, build, methods, batch, options):
    expected = losses_of(distiller(None, methods, build, **options), batch)
    cached = distiller(tmp_path, methods, build, prove=True, **options)
    first = losses_of(cached, batch)
    assert first == pytest.approx(expected, rel=1e-5)  # statistics are those of each image, joined
    seen = images_of_teacher(cached)
    for _ in range(2):  # to the last bit, so that a second run ends as the first
        assert losses_of(cached, batch) == first
    assert seen == [1]  # with which the first entry is compared
    assert (cached.teacher_cache.hits, cached.teacher_cache.misses) == (4, 2)
    assert len(entries(tmp_path)) == 2


def test_bfloat16_halves_maps_and_predictions_and_moves_losses_by_less_than_half_a_percent(tmp_path):
    methods, batch = [CrossKD(), PKD(), FeatureImitation()], tiny_batch()
    whole, narrow = (
        distiller(tmp_path / str(dtype), methods, dtype=dtype) for dtype in (None, torch.bfloat16)
    )
    expected, losses = losses_of(whole, batch), losses_of(narrow, batch)
    assert losses == pytest.approx(expected, rel=BFLOAT16)
    assert losses != expected
    sizes = [entries(model.teacher_cache.folder)[0].stat().st_size for model in (whole, narrow)]
    assert sizes[1] < 0.65 * sizes[0]  # statistics stay as they are
    # A teacher that calculates in bfloat16 loses nothing.
    rounded = losses_of(distiller(None, methods, teacher_dtype=torch.bfloat16), batch)
    kept = distiller(tmp_path / "both", methods, dtype=torch.bfloat16, teacher_dtype=torch.bfloat16)
    assert losses_of(kept, batch) == pytest.approx(rounded, rel=1e-5)


def test_the_teacher_runs_on_pixels_that_it_has_not_seen(tmp_path):
    model = distiller(tmp_path, [CrossKD(), PKD()])
    (one, two), targets = tiny_batch()
    seen = images_of_teacher(model)
    model([one, two], targets)
    model([two.flip(-1), one], targets[::-1])
    assert seen == [1, 2, 1, 1]  # the first shows what it writes, the third is compared with an entry
    # Another image makes the batch wider: what the teacher says of a padded image is another answer.
    model.student.transform.max_size = 128
    model([one, torch.rand(3, 64, 128)], targets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model([one, two], targets)
    assert seen[4:] == [2, 2]
    model([one, two], targets)
    assert seen[4:] == [2, 2]


def test_a_view_of_the_teachers_own(tmp_path):
    """What counts is what the teacher sees, here the plain images beside augmented ones."""
    images, targets = tiny_batch()
    model = distiller(tmp_path, PKD(), teacher_view=lambda given, _: images)
    for noise in (0.1, 0.2):
        model([(image + noise).clamp(max=1) for image in images], targets)
    assert (model.teacher_cache.hits, model.teacher_cache.misses) == (2, 2)


def test_damaged_and_foreign_entries_are_written_again(tmp_path):
    model, batch = distiller(tmp_path), tiny_batch()
    expected = losses_of(model, batch)
    whole = [path.read_bytes() for path in entries(tmp_path)]
    middle = len(whole[0]) // 2
    damaged = [
        whole[0][:middle],  # a copy that was broken off
        bytes(len(whole[0])),  # a crash before the disk had the contents
        whole[0][:middle] + bytes([whole[0][middle] ^ 1]) + whole[0][middle + 1 :],
        b"",
        whole[0].replace(model.teacher_cache._fingerprint.encode(), b"0" * 32),
    ]
    for number, content in enumerate(damaged):
        path = entries(tmp_path)[0]
        path.unlink()
        path.write_bytes(content)
        model.teacher_cache.misses = 0
        assert losses_of(model, batch) == pytest.approx(expected, rel=1e-5)
        assert model.teacher_cache.misses == 1, number
    (tmp_path / "cache.json").write_text("[")  # of a damaged disk: nothing is lost
    again = distiller(tmp_path)
    assert losses_of(again, batch) == pytest.approx(expected, rel=1e-5)
    assert again.teacher_cache.misses == 0
    assert json.loads((tmp_path / "cache.json").read_text())["teacher"] == "RetinaNet"
    assert not list(tmp_path.rglob("*.unfinished"))


def test_a_folder_of_something_else_is_refused(tmp_path):
    batch = tiny_batch()
    model = distiller(tmp_path)
    model(*batch)
    others = {
        "maps: False, now True": distiller(tmp_path, [CrossKD(), PKD()]),
        r"taps: .*3, 'post'.* now .*2, 'post'": distiller(tmp_path, CrossKD(position=2)),
        "dtype: None, now torch.bfloat16": distiller(tmp_path, dtype=torch.bfloat16),
        "teacher: RetinaNet, now FCOS": distiller(tmp_path, build=tiny_fcos),
        "class_map: None, now ": distiller(tmp_path, class_map=[1, 0, 2, 3]),
    }
    for difference, other in others.items():
        with pytest.raises(ValueError, match=f"{tmp_path.name} was written for another .*{difference}"):
            other(*batch)
    # One object in two distillers is looked at for each.
    with pytest.raises(ValueError, match="maps: False, now True"):
        Distiller(
            tiny_retinanet(seed=1), tiny_retinanet(), PKD(), teacher_cache=model.teacher_cache, prove=False
        )(*batch)
    with torch.no_grad():  # as a state that is loaded into the teacher later
        model.teacher.head.classification_head.cls_logits.bias += 1
    with pytest.raises(ValueError, match=r"weights: \w+, now \w+\. Delete the folder"):
        model(*batch)


@pytest.mark.parametrize("prove", [True, False])
def test_a_teacher_that_writes_buffers_as_it_answers(tmp_path, prove, monkeypatch):
    """Its weights are looked at once for all distillers on a cache, and those that change are noticed."""
    hashed, hash_of = [], crosskd.cache._hash_of
    monkeypatch.setattr(crosskd.cache, "_hash_of", lambda named: hashed.append(1) or hash_of(named))
    teacher, shared = tiny_retinanet(seed=1), TeacherCache(tmp_path, keep_free=0)
    counts_calls(teacher)
    models = [
        Distiller(teacher, tiny_retinanet(seed=2), CrossKD(), prove=prove, teacher_cache=shared)
        for _ in range(2)
    ]
    found = []
    for step in range(3):
        for model in models:
            found.append(losses_of(model, tiny_batch(seed=step // 2)))
    assert found[0] == found[1] == found[2] == found[3]
    assert len(hashed) == 1
    assert (shared.hits, shared.misses) == (8, 4)
    with torch.no_grad():
        teacher.head.classification_head.cls_logits.bias += 1
    with pytest.raises(ValueError, match=r"weights: \w+, now \w+\. Delete the folder"):
        models[0](*tiny_batch())


def test_a_teacher_that_has_counted_further_reads_what_it_wrote_before(tmp_path):
    for calls in (0, 7):
        model = distiller(tmp_path)
        counts_calls(model.teacher)
        model.teacher.backbone.calls.fill_(calls)
        model(*tiny_batch())
    assert model.teacher_cache.hits == 2


class KeepsTexts(CrossKD):
    def keep_of_teacher(self, tapped):
        return "a text"


class KeepsFeatures(Method):
    """A method of one's own that reads the teacher's features inside its head."""

    requires = frozenset({"towers"})

    def tap_points(self, branch):
        return TapPoint(2, "post"), TapPoint(2, "post")

    def forward(self, step) -> dict[str, Tensor]:
        distances = [
            (ours.read() - theirs).square().mean()
            for branch, levels in step.teacher.taps.items()
            for ours, theirs in zip(step.student.taps[branch], levels, strict=True)
        ]
        return {"kd_taps": torch.stack(distances).sum()}


def test_what_methods_keep_at_taps(tmp_path):
    method = KeepsFeatures(name="taps")
    expected = losses_of(distiller(None, method), tiny_batch())
    model = distiller(tmp_path, method)
    for _ in range(2):
        assert losses_of(model, tiny_batch()) == pytest.approx(expected, rel=1e-6)
    with pytest.raises(TypeError, match=r"crosskd keeps a str .* shape \(1, "):
        distiller(tmp_path / "texts", KeepsTexts())(*tiny_batch())


SWAPPED = {"cls": "head.box_tower", "box": "head.cls_tower"}


@pytest.mark.parametrize(
    ("build", "before", "after", "prove", "place"),
    [
        # The proof would refuse towers that the detector itself doesn't run.
        (Shared, adapter_for(), adapter_for(towers=SWAPPED), False, "logits, numbers by up to "),
        (Shared, adapter_for(), adapter_for(background=0), True, "background None, now 0"),
        (
            Objectness,
            with_objectness(),
            with_objectness(objectness=False),
            True,
            "objectness True, now False",
        ),
    ],
    ids=["towers", "background", "objectness"],
)
def test_answers_by_another_adapter_are_refused(tmp_path, build, before, after, prove, place):
    """Nothing in the fingerprint shows it: what the teacher answers now is compared with an entry."""
    settings = {"prove": prove, "teacher_cache": TeacherCache(tmp_path, keep_free=0)}
    for _ in range(2):
        Distiller(build(), build(seed=1), CrossKD(), before, **settings)(pixels(), [])
    other = Distiller(build(), build(seed=1), CrossKD(), after, **settings)
    with pytest.raises(ValueError, match=rf"{tmp_path.name}: .* image 0 .*{place}.*Delete the folder"):
        other(pixels(), [])


def test_answers_of_an_edited_method_or_teacher_are_refused(tmp_path, monkeypatch):
    batch = tiny_batch()
    distiller(tmp_path, KeepsFeatures(name="taps"))(*batch)
    doubled = distiller(tmp_path, KeepsFeatures(name="taps"))
    doubled.teacher.backbone.register_forward_pre_hook(lambda _, given: (2 * given[0],))
    with pytest.raises(ValueError, match=r"logits, numbers by up to \S+, where the largest is "):
        doubled(*batch)
    monkeypatch.setattr(KeepsFeatures, "keep_of_teacher", lambda self, tapped: tapped.features / 2)
    with pytest.raises(ValueError, match=r"tap 0 \(taps, classification\), numbers by up to "):
        distiller(tmp_path, KeepsFeatures(name="taps"))(*batch)


def test_a_teacher_whose_answer_depends_on_the_other_images_is_refused(tmp_path):
    model = distiller(tmp_path)
    model.teacher.backbone.register_forward_pre_hook(lambda _, given: (given[0] - given[0].mean(0),))
    model(*tiny_batch())
    with pytest.raises(ValueError, match="the other images of its batch"):
        model(*tiny_batch())


def changed(part):
    """Another value of a part of an entry."""
    if isinstance(part, Tensor):
        return part + 0.05 * part.abs().max()
    return [1] if isinstance(part, list) else not part


def test_all_of_an_entry_is_compared(tmp_path):
    methods, (images, targets) = [CrossKD(), PKD()], tiny_batch()
    batch = (images[:1], targets[:1])
    distiller(tmp_path, methods)(*batch)
    distiller(tmp_path / "shapes")(*batch)
    (path,), (of_shapes,) = entries(tmp_path), entries(tmp_path / "shapes")
    whole = torch.load(path)
    assert whole.keys() == {"maps", "numbers", "kinds", "levels", "taps", "fingerprint"}
    assert [tap[2].keys() for tap in whole["taps"]] == [{"mean", "std", "locations"}] * 6
    places = {
        "map of level 2, numbers": lambda entry: (entry["maps"][2], "numbers"),
        "regression, numbers": lambda entry: (entry["numbers"][1], "numbers"),
        "box_per_class": lambda entry: (entry["kinds"], "box_per_class"),
        "levels": lambda entry: (entry, "levels"),
        r"tap 4 \(crosskd, regression\), std": lambda entry: (entry["taps"][4][2], "std"),
        r"tap 5 \(crosskd, regression\), locations": lambda entry: (entry["taps"][5][2], "locations"),
    }
    for place, of in places.items():
        entry = copy.deepcopy(whole)
        holder, key = of(entry)
        holder[key] = changed(holder[key])
        torch.save(entry, path)
        with pytest.raises(ValueError, match=place):
            distiller(tmp_path, methods)(*batch)
    entry = torch.load(of_shapes)
    entry["maps"][1]["shape"] = [1]
    torch.save(entry, of_shapes)
    with pytest.raises(ValueError, match=r"map of level 1, shape \[1\], now \[32, 4, 4\]"):
        distiller(tmp_path / "shapes")(*batch)


@pytest.mark.parametrize(("dtype", "allowed"), [(None, 0.01), (torch.bfloat16, 0.1)])
def test_entries_of_another_machine_may_differ_by_rounding(tmp_path, dtype, allowed):
    batch = tiny_batch()
    distiller(tmp_path, dtype=dtype)(*batch)
    whole = [torch.load(path) for path in entries(tmp_path)]
    for share, refused in ((0.9 * allowed, False), (1.2 * allowed, True)):
        for path, entry in zip(entries(tmp_path), whole, strict=True):
            moved = copy.deepcopy(entry)
            logits = moved["numbers"][0]["numbers"]
            logits[0, 0, 0] += share * logits.abs().max()
            torch.save(moved, path)
        model = distiller(tmp_path, dtype=dtype)
        with pytest.raises(ValueError, match="logits") if refused else nullcontext():
            model(*batch)


class WholeForward(PlainAdapter):
    def maps_of(self, batch: Batch) -> list[Tensor]:
        raise NotImplementedError


def test_what_can_not_be_kept(tmp_path):
    with pytest.raises(ValueError, match="the forward of this Identity runs as a whole"):
        TeacherCache(tmp_path).check(WholeForward())
    with pytest.raises(ValueError, match=r"torch\.bfloat16 or torch\.float16, got torch\.int8"):
        TeacherCache(tmp_path, dtype=torch.int8)
    with pytest.raises(TypeError, match=r"crosskd\.TeacherCache\(folder\), got 'folder'"):
        Distiller(tiny_retinanet(seed=1), tiny_retinanet(), CrossKD(), teacher_cache="folder")


def test_a_full_disk_is_told_of_once(tmp_path):
    model = distiller(tmp_path)
    model.teacher_cache.keep_free = 1e9
    with pytest.warns(
        UserWarning, match=r"keep_free is 1e\+09.* 0 images were in it so far, 2 were not"
    ) as told:
        found = [losses_of(model, tiny_batch()) for _ in range(2)]
    assert found[0] == found[1]
    assert sum("takes no more entries" in str(warning.message) for warning in told) == 1
    assert not entries(tmp_path)


def test_a_write_that_fails_leaves_no_part_of_a_file(tmp_path, monkeypatch):
    model, write = distiller(tmp_path), Path.write_bytes
    model(*tiny_batch())

    def full(path: Path, content: bytes) -> None:
        write(path, content[:9])
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.warns(UserWarning, match="takes no more entries: No space left on device"):
        model(*tiny_batch(seed=1))
    assert len(entries(tmp_path)) == 2
    assert not list(tmp_path.rglob("*.unfinished"))


def test_entries_hold_what_a_method_at_rest_needs_in_another_run(tmp_path):
    methods = [CrossKD(), PKD(schedule=Schedule(stop=1))]
    model, batches = distiller(tmp_path, methods), [tiny_batch(), tiny_batch(seed=1)]
    assert [losses_of(model, batch)["kd_pkd"] > 0 for batch in batches] == [True, False]
    again = distiller(tmp_path, methods)
    assert losses_of(again, batches[1])["kd_pkd"] > 0
    assert again.teacher_cache.misses == 0


def test_many_write_and_read_one_folder_at_once(tmp_path):
    batches = [tiny_batch(seed=seed) for seed in range(2)]
    expected = [losses_of(distiller(None), batch) for batch in batches]
    models = [distiller(tmp_path) for _ in range(3)]

    def go(model: Distiller) -> list[dict[str, float]]:
        return [losses_of(model, batch) for batch in batches]

    with ThreadPoolExecutor(len(models)) as pool:
        for found in pool.map(go, models):
            for losses, wanted in zip(found, expected, strict=True):
                assert losses == pytest.approx(wanted, rel=1e-5)
    assert len(entries(tmp_path)) == 4
    assert not list(tmp_path.rglob("*.unfinished"))


def test_copies_and_pickles(tmp_path):
    model = distiller(tmp_path)
    expected = losses_of(model, tiny_batch())
    assert model.state_dict().keys() == distiller(None).state_dict().keys()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert losses_of(other, tiny_batch()) == expected
        assert other.teacher_cache.misses == 2  # of the original's first step
