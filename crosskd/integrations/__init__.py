"""Distillation inside other frameworks' own training, which stands above the `crosskd.Distiller`."""

__all__: list[str] = []
