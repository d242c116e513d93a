"""The published settings, as the paper and its results state them."""

import pytest

from crosskd.methods import ATSS, FCOS, GFL, RETINANET


@pytest.mark.parametrize(
    ("recipe", "position", "cls_weight", "reg_weight", "regression", "quality_weight", "quality_normalizer"),
    [
        (GFL, 3, 1.0, 4.0, "distribution_kl", 0.0, False),
        (RETINANET, 3, 1.0, 1.0, "giou", 0.0, False),
        (ATSS, 3, 1.0, 1.0, "giou", 1.0, False),
        (FCOS, 2, 0.4, 0.75, "log_iou", 0.0, True),
    ],
    ids=lambda value: getattr(value, "head", None),
)
def test_published_settings(
    recipe, position, cls_weight, reg_weight, regression, quality_weight, quality_normalizer
):
    assert recipe.position == position
    assert (recipe.cls_weight, recipe.reg_weight) == (cls_weight, reg_weight)
    assert recipe.regression == regression
    assert recipe.quality_weight == quality_weight
    assert recipe.quality_normalizer is quality_normalizer
