"""Looks at what is there before it is trained: a pair, a detector, an adapter."""

from crosskd.diagnostics.adapter_kit import AdapterError, AdapterReport, Fault, check_adapter
from crosskd.diagnostics.check import check
from crosskd.diagnostics.check_report import CheckReport
from crosskd.diagnostics.describe import Description, describe

__all__ = [
    "AdapterError",
    "AdapterReport",
    "CheckReport",
    "Description",
    "Fault",
    "check",
    "check_adapter",
    "describe",
]
