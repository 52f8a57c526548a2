"""Writes the table of denoisers into docs/models.md (`make table`); `--only NAME ...` prints some of its rows.

The rows are tiny random pipelines of tests/denoisers, so nothing is downloaded; one row takes a few seconds.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

package = ModuleType("tests")  # other packages install one of this name
package.__path__ = [str(Path(__file__).parents[1] / "tests")]
sys.modules["tests"] = package

from tests.denoisers.table import main  # noqa: E402

if __name__ == "__main__":
    main()
