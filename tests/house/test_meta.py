"""What a repository says about itself stays true: versions, citation, hooks."""

import re
from pathlib import Path

import yaml

from prefixvlm import __version__

ROOT = Path(__file__).parents[2]


def test_the_citation_names_this_version_and_the_paper():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["version"] == __version__
    assert cited["preferred-citation"]["url"].endswith("/2503.19508")
    assert {"cff-version", "message", "title", "authors"} <= cited.keys()  # what the format needs


def test_the_changelog_has_this_version():
    assert f"\n## {__version__}\n" in (ROOT / "CHANGELOG.md").read_text()


def test_the_hooks_have_the_ruff_that_is_tested():
    (repo,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    for constraints in ROOT.glob("constraints-*.txt"):
        (version,) = re.findall(r"^ruff==(.*)$", constraints.read_text(), re.MULTILINE)
        assert repo["rev"] == f"v{version}"
