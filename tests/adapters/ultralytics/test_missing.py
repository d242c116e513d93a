"""What imports answer without ultralytics, or with an old one: these run everywhere."""

from __future__ import annotations

import importlib
import sys
from unittest.mock import MagicMock

import pytest

from tests.helpers.imports import forgotten

MODULES = ("crosskd.adapters.ultralytics", "crosskd.integrations.ultralytics")
NONE = {"ultralytics": None}
# As far as the adapter looks before it looks at the version.
OLD = {
    f"ultralytics{name}": MagicMock(__version__="8.3.40")
    for name in ("", ".nn", ".nn.modules", ".nn.modules.head", ".nn.tasks", ".utils")
}


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize(
    ("found", "message"),
    [(NONE, "import of ultralytics halted"), (OLD, "8.3.40 is installed, which is older than 8.4.190")],
    ids=["none", "old"],
)
def test_the_imports_say_what_to_install(module, found, message):
    with forgotten("ultralytics", *MODULES):
        sys.modules.update(found)
        with pytest.raises(ImportError) as raised:
            importlib.import_module(module)
    for fact in (message, "pip install 'ultralytics>=8.4.190'", "AGPL-3.0"):
        assert fact in str(raised.value)
