"""Looks at what is there before it is trained: a pair, a detector, an adapter."""

from crosskd.diagnostics.check import check
from crosskd.diagnostics.check_report import CheckReport
from crosskd.diagnostics.describe import describe

__all__ = ["CheckReport", "check", "describe"]
