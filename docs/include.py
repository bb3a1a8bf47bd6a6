"""Write the files that Markdown pages include into them: `python docs/include.py`.

A page marks the place with `<!-- include PATH -->` and `<!-- end -->`, the path counted from the repository's root.
"""

from __future__ import annotations

import re
from pathlib import Path

DOCS = Path(__file__).parent
PLACE = re.compile(r"<!-- include (\S+) -->\n.*?<!-- end -->", re.DOTALL)
LANGUAGE = {".py": "python", ".yaml": "yaml", ".sh": "sh"}


def included(page: str) -> str:
    """The page with every marked place filled anew."""

    def fill(place: re.Match[str]) -> str:
        path = DOCS.parent / place[1]
        content = path.read_text("utf-8").rstrip("\n")
        return f"<!-- include {place[1]} -->\n```{LANGUAGE[path.suffix]}\n{content}\n```\n<!-- end -->"

    return PLACE.sub(fill, page)


if __name__ == "__main__":
    for file in sorted(DOCS.glob("*.md")):
        file.write_text(included(file.read_text("utf-8")), "utf-8")
