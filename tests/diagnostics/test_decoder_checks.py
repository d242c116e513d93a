"""The kit's checks of decoders: green for ours, red for broken ones."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from crosskd import PKD, QueryDistillation
from crosskd.adapters.transformers import TransformersDetr
from crosskd.testing import AdapterError, check_adapter
from tests.helpers.conformance import only
from tests.helpers.detr import batch_of, detector_of

pytestmark = pytest.mark.transformers


def checked(adapter: Any, *names: str, method: Any = None) -> Any:
    batch = batch_of()
    pair = {"teacher": detector_of("detr", 64, seed=1, layers=3), "student": detector_of("detr")}
    return check_adapter(
        adapter, batch["pixel_values"], batch["labels"], **pair,
        method=method or QueryDistillation(general=5), skip=only(*names),
    )  # fmt: skip


def test_methods_of_maps_distil_no_queries():
    report = checked(TransformersDetr, "own teacher", "gradients in the decoder", method=PKD())
    assert not report.passed
    assert report.skipped["own teacher"] == "PKD distils no queries"


def test_a_decoder_that_gives_rows_their_places_is_found_out():
    def broken(detector: Any) -> TransformersDetr:
        adapter = TransformersDetr(detector)
        head: Any = adapter.heads[0]
        run = head.run

        def shifted(*arguments: Any) -> Any:
            layers = run(*arguments)
            last = layers[-1].predictions
            moved = replace(
                last, logits=last.logits * last.logits.new_ones(last.logits.shape[1]).cumsum(0)[None, :, None]
            )
            return [*layers[:-1], replace(layers[-1], predictions=moved)]

        head.run = shifted
        return adapter

    with pytest.raises(AdapterError, match="same queries in another order") as error:
        checked(broken, "shared queries", "queries permuted")
    assert "kd_cls is" in str(error.value)
