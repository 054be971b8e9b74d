"""``python -m tests.helpers.notebook FILE``: runs the cells of a notebook as an interactive session does."""

import json
import sys
from pathlib import Path


def main(path: str) -> None:
    sys.ps1 = ">>> "  # what Lightning, and we, tell an interactive session by
    names: dict[str, object] = {"__name__": "__main__"}
    for cell in json.loads(Path(path).read_text())["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)


if __name__ == "__main__":
    main(*sys.argv[1:])
