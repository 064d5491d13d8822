"""Run by its path. The package's own `__init__` needs site-packages, so a bare module stands in for it and makes only these modules importable."""

import sys
from pathlib import Path
from types import ModuleType

package = ModuleType("mollifier")
package.__path__ = [str(Path(__file__).parents[1])]
sys.modules["mollifier"] = package

from mollifier._guard.guard import main  # noqa: E402

sys.exit(main())
