"""The documentation builds without a warning, and what it names exists."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def test_the_site_builds(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(tmp_path / "site")]
    built = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={"NO_MKDOCS_2_WARNING": "1", "PATH": "/usr/bin:/bin"}
    )
    assert built.returncode == 0, built.stdout + built.stderr
    assert (tmp_path / "site" / "modes" / "data" / "index.html").is_file()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_a_page_names_exist(page):
    text = page.read_text()
    named = re.findall(r"(?:configs|examples|tests|docs)/[\w/.-]*\w\.(?:yaml|py|sh|png|md)", text)
    missing = sorted({name for name in named if not (ROOT / name).exists()})
    assert not missing, f"{page.name} names {missing}"
