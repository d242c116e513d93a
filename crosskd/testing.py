"""The conformance kit for adapters, under the name that tests import it by."""

from crosskd.diagnostics.adapter_kit import AdapterError, AdapterReport, Fault, check_adapter

__all__ = ["AdapterError", "AdapterReport", "Fault", "check_adapter"]
