"""What the import says without mmdet: this one runs everywhere."""

from __future__ import annotations

import subprocess
import sys


def test_the_imports_say_what_to_install():
    code = "import sys; sys.modules['mmdet'] = None"
    for module in ("crosskd.adapters.mmdet", "crosskd.integrations.mmdet"):
        code += f"\ntry:\n    import {module}\nexcept ImportError as error:\n    print(error)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    for fact in ("examples/mmdet/install_mmdet.py", "mmdet 3 and mmcv"):
        assert done.stdout.count(fact) == 2
