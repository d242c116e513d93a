"""What several tests of the conformance kit share."""

from __future__ import annotations

from typing import Any

import torch

from crosskd.diagnostics.adapter_kit import CHECKS
from crosskd.diagnostics.decoder_checks import DECODER_CHECKS
from crosskd.testing import AdapterReport, check_adapter

__all__ = ["assert_green", "only"]


def only(*names: str) -> dict[str, str]:
    """Skips every other check."""
    assert set(names) <= CHECKS.keys()
    return {name: "not what this test is about" for name in CHECKS if name not in names}


def assert_green(
    *arguments: Any, skipped: tuple[str, ...] = (), decoder: bool = False, **options: Any
) -> AdapterReport:
    """Runs every check, with few steps, and lets none be skipped but those named, or made for decoders."""
    report = check_adapter(*arguments, **{"steps": 100, **options})
    expected = {
        *skipped,
        *(() if decoder else DECODER_CHECKS),
        *(() if torch.cuda.is_available() else ("other device",)),
    }
    assert set(report.skipped) == expected
    assert set(report.passed) == CHECKS.keys() - expected
    return report
