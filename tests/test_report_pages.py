"""Reports as pages: whole HTML without anything from outside, Markdown whose tables hold, plots, and the verb."""

import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import markdown_it
import pytest

import report_runs
from flux_quant.benchmarks.bench.record import Row, write_run
from flux_quant.benchmarks.report import drawing
from flux_quant.benchmarks.report.inputs import Found, Source, gather
from flux_quant.benchmarks.report.model import Plot, Series
from flux_quant.benchmarks.report.rendering import html, markdown, plots
from flux_quant.benchmarks.report.sections import report
from flux_quant.cli import main
from report_runs import all_runs, run

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

PLACE = Path("report.md")
VOID = {"meta", "link", "img", "br", "path", "use", "rect", "hr", "input"}
NASTY = '<script>alert("x")</script> | **b** `c` [d](javascript:e) & _f_ {{ g }} ](h) $i$'
PIXEL = bytes.fromhex(  # a PNG of one pixel
    "89504e470d0a1a0a0000000d49484452000000010000000108060000001f15c489"
    "0000000d49444154789c6360606060000000050001a5f645400000000049454e44ae426082"
)  # fmt: skip


class Page(HTMLParser):
    """Every element closed, in order; attributes and the text of cells by row."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.attributes, self.rows, self.text = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag, attrs):
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data


def shown(*runs):
    return report(Found([Source(f"{i}.json", one) for i, one in enumerate(runs)]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("results")
    for name, one in all_runs().items():
        write_run(one, made / "card" / name)
    (made / "card" / "sheet.png").write_bytes(PIXEL)
    return made


@pytest.fixture(scope="module")
def made(folder):
    return report(gather([folder]))


def test_page_is_whole_and_alone(made):
    page = Page(html(made))
    outside = [
        (tag, name, value)
        for tag, name, value in page.attributes
        if name in ("src", "href", "xlink:href", "data", "poster", "srcset", "action")
        and not value.startswith(("#", "data:"))
    ]
    assert {(tag, name) for tag, name, _ in outside} == {("a", "href")}  # the sources of what others report
    assert all(value.startswith("https://") for _, _, value in outside)
    assert "@import" not in html(made) and not re.search(r"url\((?!#|['\"]?data:)", html(made))
    assert not {"script", "iframe", "object", "embed"} & {tag for tag, _, _ in page.attributes}


def test_page_has_every_table_and_anchors_once(made):
    page = Page(html(made))
    rows = [cells for cells in page.rows if cells]
    for section in made.sections:
        for table in section.tables:
            for line in table.lines:
                assert any(
                    [cell.removeprefix("https://") for cell in line.cells]
                    == [cell.removeprefix("https://") for cell in cells]
                    for cells in rows
                ), line
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    targets = {value[1:] for tag, name, value in page.attributes if name.endswith("href") and value.startswith("#")}
    assert targets <= set(ids)


def nasty():
    rows = report_runs.step_rows()
    rows[1].what["format"] = rows[2].note = rows[3].rerun = NASTY
    rows[4].subject = NASTY
    rows[5].values[NASTY] = NASTY
    rows[7].expected["bound_by"] = NASTY
    made = run("step", rows, device=NASTY)
    made.weights["name"] = made.command = NASTY
    return shown(made, run(NASTY, [Row({NASTY: NASTY, "kind": NASTY})], device=NASTY))


def test_names_of_strangers_are_text_in_html():
    text = html(nasty())
    page = Page(text)
    assert "<script" not in text and NASTY in "".join(page.text)
    assert not any(value.startswith("javascript:") for _, _, value in page.attributes)


def test_names_of_strangers_are_text_in_markdown():
    """An outside reader of Markdown shows them as they are, and makes no element of them."""
    tokens = markdown_it.MarkdownIt("gfm-like", {"linkify": False}).parse(markdown(nasty(), PLACE))
    inline = [child for token in tokens for child in token.children or ()]
    assert "html_block" not in {token.type for token in tokens}
    assert not {"html_inline", "link_open", "em_open"} & {token.type for token in inline}
    assert NASTY in "".join(token.content for token in inline)
    assert NASTY in {token.content for token in inline if token.type == "code_inline"}


def test_markdown_tables_hold(made):
    """Each has as many rows and cells as the report, read by an outside reader."""
    tokens = markdown_it.MarkdownIt("gfm-like", {"linkify": False}).parse(markdown(made, PLACE))
    cells = [tokens[i + 1] for i, token in enumerate(tokens) if token.type in ("th_open", "td_open")]
    tables = [table for section in made.sections for table in section.tables]
    assert len(cells) == sum(len(table.columns) * (1 + len(table.lines)) for table in tables)
    assert sum(token.type == "table_open" for token in tokens) == len(tables)
    found = ["".join(child.content for child in cell.children) for cell in cells]
    wanted = [
        text
        for table in tables
        for texts in ([column.name for column in table.columns], *(line.cells for line in table.lines))
        for text in texts
    ]
    assert found == wanted


def test_markdown_shows_every_plot_and_picture(made, folder):
    text = markdown(made, folder / "report.md")
    assert set(re.findall(r"\]\(report-plots/([^)]+)\)", text)) == set(plots(made))
    assert "](card/sheet.png)" in text
    assert "](" not in markdown(made).replace("\\](", "")


def test_plots_hold_their_points(made):
    """What is drawn is what the rows say, and measured, emulated and predicted are drawn differently."""
    drawn_as = {plot.slug: plot for section in made.sections for plot in section.plots}
    step = drawn_as["step-time-1"]
    drawn = {(one.name, one.kind): one.points for one in step.series}
    assert drawn["q8_0", "measured"] == ((24.0, pytest.approx(0.54)),)
    assert [x for x, _ in drawn["bf16", "emulated"]] == [8.0]  # the row of 6 GB was skipped
    assert [x for x, _ in drawn["bf16", "bound"]] == [8.0, 24.0]
    assert {"tiers-1", "tiers-2", "bytes-moved-1", "stall-1", "size-quality-1", "conversion-1"} <= set(drawn_as)
    looks = [tuple(sorted(look.items(), key=str)) for look in drawing.LINES.values()]
    assert len(set(looks)) == len(looks)
    assert drawn_as["conversion-1"].names == tuple(report_runs.FORMATS)


def test_plots_are_svg_of_text_and_repeatable(made):
    for section in made.sections:
        for plot in section.plots:
            svg = drawing.as_file(plot)
            root = ET.fromstring(svg)
            assert drawing.draw(plot) == drawing.draw.__wrapped__(plot)
            assert drawing.digest(plot) == root.get("data-digest")
            words = " ".join(text.text or "" for text in root.iter("{http://www.w3.org/2000/svg}text"))
            assert plot.y.split(",")[0] in words and all(name in words for name in plot.names)
            assert "currentColor" in drawing.inline(plot) and drawing.INK not in svg + drawing.inline(plot)


@pytest.mark.parametrize("name", ["$x^2$", "_hidden", "", "<b>&", "a" * 300])
@pytest.mark.parametrize("shape", ["lines", "points", "bars"])
def test_odd_names_in_plots(name, shape):
    plot = Plot("odd", name, "x", name or "y", (Series(name, "measured", ((0.0, 1.0),)),), shape, (name,), name, name)
    ET.fromstring(drawing.as_file(plot))


def test_same_results_same_bytes(folder, made):
    again = report(gather([folder]))
    assert html(again) == html(made) and markdown(again, PLACE) == markdown(made, PLACE) and plots(again) == plots(made)


def test_verb_writes_pages(folder, tmp_path, capsys):
    page, text = tmp_path / "out" / "report.html", tmp_path / "out" / "report.md"
    for path in (page, text):
        assert main(["report", str(folder), "-o", str(path)]) == 0
    assert Page(page.read_text()) and text.read_text().startswith("# ")
    assert {path.name for path in (tmp_path / "out" / "report-plots").iterdir()} == set(plots(report(gather([folder]))))
    assert str(text) in capsys.readouterr().out and not list((tmp_path / "out").glob(".*"))
    assert main(["report", str(folder), "-o", str(text)]) == 2 and "--force" in capsys.readouterr().err
    assert main(["report", str(folder), "-o", str(text), "--force", "--no-plots"]) == 0
    assert not (tmp_path / "out" / "report-plots").exists() and "](" not in text.read_text().replace("\\](", "")


def test_verb_takes_pictures(folder, tmp_path):
    page = tmp_path / "report.html"
    assert (
        main(
            [
                "report",
                str(next((folder / "card").glob("*-step.json"))),
                str(folder / "card/sheet.png"),
                "-o",
                str(page),
            ]
        )
        == 0
    )
    assert "data:image/png;base64," in page.read_text()


def test_verb_prints_markdown(folder, capsys):
    assert main(["report", str(next((folder / "card").glob("*-step.json")))]) == 0
    out = capsys.readouterr().out
    assert out.startswith("# ") and "| step-1 |" in out and ".svg" not in out


MISTAKES = {
    "suffix": (["results", "-o", "report.pdf"], ".html or .md"),
    "missing": (["nowhere", "-o", "report.md"], "nowhere does not exist"),
    "no result": (["other.json"], "other.json"),
    "empty folder": (["empty"], "no results"),
    "two ways": (["results", "--compare", "results", "results"], "--compare"),
    "across": (["results", "--across-machines"], "--compare"),
}


@pytest.mark.parametrize(("arguments", "words"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_one_line(folder, tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folder, tmp_path / "results")
    (tmp_path / "empty").mkdir()
    (tmp_path / "other.json").write_text('{"schema": 99}')
    before = sorted(tmp_path.rglob("*"))
    assert main(["report", *arguments]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and len(err.splitlines()) == 1 and words in err
    assert sorted(tmp_path.rglob("*")) == before


def test_folder_with_other_things_is_left_alone(folder, tmp_path, capsys):
    (tmp_path / "report-plots").mkdir()
    (tmp_path / "report-plots" / "thesis.tex").write_text("years of work")
    assert main(["report", str(folder), "-o", str(tmp_path / "report.md"), "--force"]) == 2
    assert "thesis.tex" in capsys.readouterr().err and not (tmp_path / "report.md").exists()
    assert (tmp_path / "report-plots" / "thesis.tex").read_text() == "years of work"


WITHOUT = """
import sys
from pathlib import Path
sys.modules[{library!r}] = None
from flux_quant.cli import main
sys.exit(main(["report", {folder!r}, "-o", {out!r}, *{options!r}]))
"""


@pytest.mark.parametrize(
    ("library", "options", "code"), [("jinja2", [], 2), ("matplotlib", [], 2), ("matplotlib", ["--no-plots"], 0)]
)
def test_without_the_extra_it_is_one_line(folder, tmp_path, library, options, code):
    script = WITHOUT.format(library=library, folder=str(folder), out=str(tmp_path / "r.md"), options=options)
    done = subprocess.run([sys.executable, "-I", "-c", script], capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    if code:
        assert len(done.stderr.splitlines()) == 1 and ": pip install " in done.stderr
        assert not list(tmp_path.iterdir())


BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)


def browse(page: Path, *options: str) -> str:
    command = [
        BROWSER,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--enable-logging=stderr",
        *options,
        page.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "CONSOLE" not in done.stderr, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
def test_chromium_shows_it(made, tmp_path):
    """No message on the console, nothing wider than a phone but what scrolls by itself, a PDF that is no stub."""
    page = tmp_path / "report.html"
    page.write_text(html(made))
    probe = (
        "document.title = 'narrow ' + (document.documentElement.scrollWidth <= document.documentElement.clientWidth)"
    )
    framed = tmp_path / "phone.html"
    phone = page.read_text().replace("</body>", f"<script>{probe}</script></body>")
    framed.write_text(phone)
    assert "<title>narrow true</title>" in browse(framed, "--window-size=500,900", "--dump-dom")
    browse(page, f"--print-to-pdf={tmp_path / 'report.pdf'}", "--no-pdf-header-footer")
    assert (tmp_path / "report.pdf").read_bytes().startswith(b"%PDF") and (
        tmp_path / "report.pdf"
    ).stat().st_size > 20_000
