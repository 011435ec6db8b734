"""The README's table of models and memories."""

from pathlib import Path

import pytest

from tools.which_size import MODELS, row

README = (Path(__file__).parents[1] / "README.md").read_text()


@pytest.mark.parametrize("name", MODELS)
def test_the_readme_has_what_the_tool_prints(name):
    assert row(name) in README.splitlines()
