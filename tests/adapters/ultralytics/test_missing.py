"""What imports answer without ultralytics, or with an old one: these run everywhere."""

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
    ("setting", "message"),
    [(NONE, "import of ultralytics halted"), (OLD, "8.3.40 is installed, which is older than 8.4.190")],
    ids=["none", "old"],
)
def test_the_imports_say_what_to_install(setting, message):
    code = f"import sys\n{setting}"
    for module in ("crosskd.adapters.ultralytics", "crosskd.integrations.ultralytics"):
        code += f"\ntry:\n    import {module}\nexcept ImportError as error:\n    print(error)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    for fact in (message, "pip install 'crosskd[ultralytics]'", "AGPL-3.0"):
        assert done.stdout.count(fact) == 2
