"""What a person is told who has no ultralytics, or an old one: these run everywhere."""

from __future__ import annotations

import subprocess
import sys

import pytest

NONE = "sys.modules['ultralytics'] = None"
# As far as the adapter looks before it looks at the version.
OLD = """
from unittest.mock import MagicMock
for name in ("", ".nn", ".nn.modules", ".nn.modules.head", ".nn.tasks", ".utils"):
    sys.modules["ultralytics" + name] = MagicMock(__version__="8.3.40")
"""


@pytest.mark.parametrize(
    ("setting", "told"),
    [(NONE, "import of ultralytics halted"), (OLD, "8.3.40 is installed, which is older than 8.4.190")],
    ids=["none", "old"],
)
def test_the_import_says_what_to_install(setting, told):
    code = (
        f"import sys\n{setting}\n"
        "try:\n    import crosskd.adapters.ultralytics\n"
        "except ImportError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert told in done.stdout
    assert "pip install 'crosskd[ultralytics]'" in done.stdout
    assert "AGPL-3.0" in done.stdout
