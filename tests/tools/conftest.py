"""tools/ is a folder of programs that find each other beside themselves; tests import them as they do."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
