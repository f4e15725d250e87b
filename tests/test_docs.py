"""The generated pages of docs/ agree with the package."""

import runpy
from pathlib import Path

DOCS = Path(__file__).resolve().parents[1] / "docs"


def test_the_page_of_the_configuration_is_up_to_date():
    page = runpy.run_path(str(DOCS / "configuration.py"))["page"]()
    assert (DOCS / "configuration.md").read_text(encoding="utf-8") == page, "run python -m docs.configuration"
    for name in ("`model.vision.width`", "`dpe.ratio`", "`learning_rate`", "`repeat`"):
        assert f"| {name} |" in page
