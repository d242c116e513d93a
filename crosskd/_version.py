"""The version, for the parts of the package that write it down."""

__version__ = "0.1.0"
