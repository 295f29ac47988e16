"""The documentation site builds without warnings, has every public name, and loads nothing from the network."""

import html
import re
import subprocess
import sys

import pytest

import fastlora
from tests.support.paths import ROOT
from tests.support.processes import TIME_LIMIT_S

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the built site."""
    pytest.importorskip("mkdocs", reason="the site needs the extra docs")
    folder = tmp_path_factory.mktemp("site")
    config = str(ROOT / "docs" / "site" / "mkdocs.yml")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", config, "-d", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIME_LIMIT_S)
    assert done.returncode == 0, done.stderr
    assert "WARNING  -" not in done.stderr
    return folder


def text_of(page):
    """The text of a page in one line, with a bullet before each item of a list."""
    text = re.sub(r"<li[^>]*>", " • ", page.read_text())
    return " ".join(html.unescape(re.sub(r"<[^>]+>", "", text)).split())


def test_every_public_name_is_in_the_reference(site):
    pages = "".join(path.read_text() for path in (site / "reference").glob("*.html"))
    names = set(fastlora.__all__) - {"__version__"}
    assert {name for name in names if f'id="fastlora.{name}"' not in pages} == set()
    assert 'id="fastlora.peft.trainer.FastLoRACallback"' in pages


def test_arguments_and_errors_are_lists(site):
    text = text_of(site / "reference" / "layers.html")
    assert "Arguments • x: (..., K), any float dtype" in text
    assert " • lora_a: (R, K) and lora_b: (N, R), any float dtype; " in text
    assert "Raises • ConfigError if shapes, dtypes or devices do not fit • BackendError if" in text
    text = text_of(site / "reference" / "adapt.html")
    assert " • fields: other fields of a LoRAConfig" in text


def test_the_pages_load_nothing_from_the_network(site):
    loaded = re.compile(r"<(?:script|img|iframe)[^>]*\bsrc=\"?https?:|<link[^>]*\bhref=\"?https?:")
    pages = list(site.rglob("*.html"))
    assert len(pages) > 25
    assert [page.name for page in pages if loaded.search(page.read_text())] == []
    assert (site / "search" / "search_index.js").exists()  # the search of pages opened as files


def test_every_page_of_docs_and_the_readme_is_on_the_site(site):
    names = {path.stem for path in (ROOT / "docs").glob("*.md")} | {"index", "contributing"}
    assert names <= {path.stem for path in site.glob("*.html")}
    home = (site / "index.html").read_text()
    assert 'href="targets.html"' in home and 'href="docs/targets.md"' not in home
