"""The documentation site: built strictly, complete, readable, and without anything from a network."""

import html
import importlib
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from urllib.parse import unquote, urlsplit

import pytest

import fastlora
import fastlora.medical
from tests.support.paths import ROOT
from tests.support.processes import TIME_LIMIT_S

for package in ("material", "mkdocstrings_handlers.python"):
    pytest.importorskip(package)

pytestmark = pytest.mark.slow

SITE = ROOT / "docs" / "site"
HEADINGS = ["Start", "Guides", "Medical", "Performance", "Internals", "API reference"]
VOID = {"area", "base", "br", "col", "hr", "img", "input", "link", "meta", "source", "wbr"}
LOADED = {("script", "src"), ("img", "src"), ("iframe", "src"), ("link", "href")}


class Html(HTMLParser):
    """What the tests look at in one page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.loads: list[str] = []
        self.tabs: list[str] = []
        self.prose = ""
        """The article without code."""
        self.code: list[str] = []
        """Its blocks of code."""
        self.items: dict[str, list[str]] = {}
        """Heading's id → text of the items of the lists below it."""
        self._open: list[tuple[str, str]] = []
        self._heading = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {key: value or "" for key, value in attrs}
        if "id" in given:
            self.ids.append(given["id"])
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        self.loads += [given[name] for its, name in LOADED if its == tag and name in given]
        if tag in ("h1", "h2", "h3"):
            self._heading = given.get("id", "")
        if tag == "li" and self._in("article"):
            self.items.setdefault(self._heading, []).append("")
        if tag == "pre":
            self.code.append("")
        if tag == "a" and given.get("class") == "md-tabs__link":
            self.tabs.append("")
        if tag not in VOID:
            self._open.append((tag, given.get("class", "")))

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop()[0] != tag:
            pass

    def handle_data(self, data: str) -> None:
        if not self._open:
            return
        if self._open[-1] == ("a", "md-tabs__link"):
            self.tabs[-1] += data.strip()
        if not self._in("article") or self._in("script"):
            return
        if self._in("pre"):
            self.code[-1] += data
        elif not self._in("code"):
            self.prose += data
        if self._in("li"):
            self.items[self._heading][-1] += data

    def _in(self, tag: str) -> bool:
        return any(tag == its for its, _ in self._open)


def build(folder: Path, config: Path = SITE / "mkdocs.yml") -> subprocess.CompletedProcess[str]:
    command = ["-m", "mkdocs", "build", "--strict", "--config-file", str(config)]
    return subprocess.run(
        [sys.executable, *command, "--site-dir", str(folder)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=TIME_LIMIT_S,
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = build(folder)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site) -> dict[str, Html]:
    """The parsed pages by path."""
    found = (path for path in site.rglob("*.html") if path.name != "404.html")
    parsed = {path.relative_to(site).as_posix(): Html(path.read_text()) for path in found}
    assert all(page.prose.strip() and page.links for page in parsed.values())
    return parsed


@pytest.fixture
def hooks(monkeypatch) -> ModuleType:
    monkeypatch.syspath_prepend(SITE)
    return importlib.import_module("hooks")


def test_every_page_of_docs_is_there_under_few_headings(pages) -> None:
    expected = {f"{path.stem}.html" for path in (ROOT / "docs").glob("*.md")}
    expected |= {f"{name}.html" for name in ("index", "contributing", "security", "changelog")}
    assert expected == {name for name in pages if "/" not in name}
    assert pages["index.html"].tabs == HEADINGS
    linked = {urlsplit(link).path for link in pages["index.html"].links}
    assert expected <= linked  # through the navigation


def test_the_home_page_is_the_readme(pages) -> None:
    readme = (ROOT / "README.md").read_text()
    blocks = re.findall(r"^```\w*\n(.*?)^```$", readme, flags=re.M | re.S)
    shown = "".join(pages["index.html"].code)
    assert blocks and all(block.strip() in shown for block in blocks)
    for heading in re.findall(r"^## (.*)$", readme, flags=re.M):
        assert heading.replace("`", "") in pages["index.html"].prose.replace("\n", " ")


def test_every_public_name_is_in_the_reference_once(pages) -> None:
    ids = [one for name, page in pages.items() if name.startswith("reference/") for one in page.ids]
    homes = {"FastLoRACallback": "fastlora.peft.trainer"} | fastlora.medical._HOMES
    expected = {f"{home}.{name}" for name, home in homes.items()}
    expected |= {f"fastlora.{name}" for name in fastlora.__all__ if name != "__version__"}
    assert {name: ids.count(name) for name in expected} == dict.fromkeys(expected, 1)


@pytest.mark.parametrize(
    ("page", "name", "starts"),
    [
        ("adapt", "adapt", ["target_modules: as in inject_lora;", "fields: other fields"]),
        ("adapt", "adapt", ["ConfigError for an invalid", "InjectionError as inject_lora"]),
        ("adapt", "inject_lora", ["model: ", "target_modules: ", "rank, alpha, dropout: "]),
        ("adapt", "LoRAConfig", ['"contains": ', '"exact": ', '"glob": ', '"regex": ']),
        ("layers", "lora_linear", ["x: ", "weight: ", "lora_a: ", "ConfigError "]),
        (
            "medical",
            "medical.training.trainer.MedicalTrainer",
            ["FastLoRAError (ConfigError, DataError or CheckpointError), naming"],
        ),
        (
            "medical",
            "medical.training.trainer.MedicalTrainer.train",
            ["TrainingError if a loss", "KeyboardInterrupt after Ctrl-C"],
        ),
        ("merge_and_export", "export", ["args, kwargs: ", "ExportError "]),
    ],
)
def test_arguments_and_errors_are_lists(pages, page, name, starts) -> None:
    items = pages[f"reference/{page}.html"].items[f"fastlora.{name}"]
    missing = [
        start for start in starts if not any(item.strip().startswith(start) for item in items)
    ]
    assert not missing, items


def test_lists_have_headings_and_classes_have_signatures(site) -> None:
    text = text_of(site / "reference" / "layers.html")
    assert "Arguments • x: (..., K), any float dtype" in text
    assert "Raises • ConfigError if shapes, dtypes or devices do not fit • BackendError if" in text
    assert "LoRALinear( original_linear: Linear, rank: int = 4, alpha: float = 8.0," in text
    assert "LoRAConfig( target_modules: " in text_of(site / "reference" / "adapt.html")


def text_of(page: Path) -> str:
    """The text of a page in one line, with a bullet before each item of a list."""
    text = re.sub(r"<li[^>]*>", " • ", page.read_text())
    return " ".join(html.unescape(re.sub(r"<[^>]+>", "", text)).split())


def test_nothing_shows_as_raw_markdown(pages) -> None:
    raw = re.compile(r"\| -{3}|^#+ \w|\*\*|```|\]\(|^- |\bRaises:|\bSource:|:::|`", flags=re.M)
    assert not {
        name: raw.findall(page.prose) for name, page in pages.items() if raw.search(page.prose)
    }


def test_links_and_anchors_lead_somewhere(site, pages) -> None:
    assert not [
        f"{name}: {link}"
        for name, page in pages.items()
        for link in page.links
        if _lost(site, pages, name, link)
    ]


def _lost(site: Path, pages: dict[str, Html], name: str, link: str) -> bool:
    parts = urlsplit(link)
    if parts.scheme:
        return parts.scheme not in ("http", "https", "mailto")
    target = (site / name).parent / unquote(parts.path) if parts.path else site / name
    target = Path(os.path.normpath(target))
    if not target.is_file():
        return not (target / "index.html").is_file()
    page = pages.get(target.relative_to(site).as_posix())
    return bool(parts.fragment) and (page is None or unquote(parts.fragment) not in page.ids)


def test_nothing_is_loaded_from_a_network(site, pages) -> None:
    for name, page in pages.items():
        away = [urlsplit(link) for link in page.loads]
        assert not [parts.geturl() for parts in away if parts.scheme or parts.netloc], name
    for style in site.rglob("*.css"):
        assert not re.findall(r"(?:url\(|@import)\s*['\"]?(?:https?:)?//[^)]*", style.read_text())


def test_the_search_works_without_a_server(site) -> None:
    index = (site / "search" / "search_index.js").read_text()  # a script, which a file may load
    assert index.startswith("var __index = {") and "inject_lora" in index
    (bundle,) = (site / "assets" / "javascripts").glob("bundle.*.min.js")
    assert "search/search_index.js" in bundle.read_text()
    for page in site.rglob(
        "*.html"
    ):  # ours stands in for the worker's shim that Material takes from a network
        text = page.read_text()
        assert "site-assets/iframe-worker.js" in text and "unpkg.com" not in text


def test_the_examples_are_shown_whole(pages) -> None:
    shown = [block.strip() for block in pages["examples.html"].code]
    examples = sorted((ROOT / "docs" / "examples").glob("*.py"))
    assert examples and all(path.read_text().strip() in shown for path in examples)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (lambda names: [*names, "new_name"], "public, but in no topic: new_name"),
        (lambda names: [name for name in names if name != "fuse"], "not public: fuse"),
    ],
)
def test_the_topics_must_be_the_public_names(monkeypatch, changed, message) -> None:
    from mkdocs.exceptions import PluginError

    monkeypatch.syspath_prepend(SITE)
    reference = importlib.import_module("reference")
    monkeypatch.setattr(fastlora, "__all__", changed(fastlora.__all__))
    with pytest.raises(PluginError, match=message):
        reference.reference_pages.__wrapped__()


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("Text:\n- one\n- two\n", "<p>Text:</p><ul><li>one</li><li>two</li></ul>"),
        ("- one\n  - deep\n", "<ul><li>one<ul><li>deep</li></ul></li></ul>"),
        ("1. one\n   on\n", "<ol><li>one on</li></ol>"),
        ("- one\n\n  ```\n  - code\n  ```\n", "<ul><li><p>one</p><pre>- code</pre></li></ul>"),
        (
            "Text:\n| a |\n| --- |\n| 1 |\n",
            "<p>Text:</p><table><thead><tr><th>a</th></tr></thead><tbody><tr><td>1</td></tr></tbody></table>",
        ),
    ],
    ids=["list", "nested", "continued", "code", "table"],
)
def test_markdown_means_what_it_does_on_github(hooks, source, expected) -> None:
    import markdown

    extensions = ["tables", "pymdownx.superfences"]
    shown = markdown.markdown(hooks.python_markdown(source), extensions=extensions)
    shown = re.sub(r"</?(?:div|code|span)[^>]*>|(?<=>)\s+|\s+(?=<)", "", shown)
    assert re.sub(r"\s+", " ", shown) == expected


@pytest.mark.parametrize(
    ("source", "page", "given", "expected"),
    [
        ("README.md", "index.md", "[a](docs/design.md#title)", "[a](design.md#title)"),
        ("docs/design.md", "design.md", "[a](../CONTRIBUTING.md)", "[a](contributing.md)"),
        ("docs/design.md", "design.md", "[a](../kernels/tiles.py)", "a (`kernels/tiles.py`)"),
        ("docs/design.md", "design.md", "[a](missing.md)", "[a](missing.md)"),
        ("README.md", "index.md", "[a](https://x.org) [b](#c)", "[a](https://x.org) [b](#c)"),
    ],
)
def test_links_are_mended(hooks, source, page, given, expected) -> None:
    assert hooks.mend_links(given, source, page) == expected
    code = f"`{given}`"
    assert hooks.outside_code(code, lambda text: hooks.mend_links(text, source, page)) == code


def test_a_broken_link_fails_the_build(tmp_path) -> None:
    """In a site of one page, with the hooks and the settings of ours."""
    settings = (SITE / "mkdocs.yml").read_text()
    validation = re.search(r"^validation:\n(?:  .*\n)+", settings, flags=re.M)
    assert validation is not None
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text("# Title\n\n[a](missing.md) [b](#missing)\n")
    config = tmp_path / "mkdocs.yml"
    config.write_text(f"site_name: test\ntheme: {{ name: material, font: false }}\n{validation[0]}")
    done = build(tmp_path / "site", config)
    assert done.returncode == 1
    assert "missing.md" in done.stderr and "#missing" in done.stderr
