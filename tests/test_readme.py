"""What a newcomer reads first: commands that exist, figures of the results, links that lead on."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

import llama_fast
from llama_fast.bench.report import fill
from llama_fast.bench.results import load
from llama_fast.cli.app import command

ROOT = Path(__file__).parent.parent
READMES = ("README.md", "README.zh-CN.md")
LOG = ROOT / "docs/log.md"  # what was true on its day
PAGES = (
    *READMES,
    *(p.relative_to(ROOT).as_posix() for p in sorted(ROOT.glob("docs/**/*.md")) if p != LOG),
)
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[\w-]+)?\)")


def blocks(page: str, language: str = "") -> list[str]:
    text = (ROOT / page).read_text(encoding="utf-8")
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S)
    return [block for kind, block in found if kind == language]


def commands(page: str) -> list[str]:
    """The command lines of a page, each once."""
    text = (ROOT / page).read_text(encoding="utf-8")
    lines = [line for b in blocks(page) for line in b.replace("\\\n", " ").splitlines()]
    inline = re.findall(r"`(llama-fast [a-z][^`]*)`", text)
    found = [re.search(r"llama-fast [a-z].*", line) for line in lines]
    return list(dict.fromkeys([*inline, *(match[0] for match in found if match)]))


@pytest.mark.parametrize("page", PAGES)
def test_every_command_line_is_understood(page):
    found = commands(page)
    if page in READMES:
        assert any(line.startswith("llama-fast generate ") for line in found)
    for line in found:
        words = shlex.split(line.partition(" > ")[0], comments=True)[1:]
        if "…" in words:
            words = words[: words.index("…")]
        group = command()
        with group.make_context("llama-fast", words[:1], resilient_parsing=True) as context:
            known = group.resolve_command(context, words[:1])[1]
            options = {o for param in known.params for o in (*param.opts, *param.secondary_opts)}
        # Of a group its own command comes next, where one is named.
        if len(words) > 1 and (commands_of := getattr(known, "commands", None)):
            known, words = commands_of[words[1]], words[1:]
            options = {o for param in known.params for o in (*param.opts, *param.secondary_opts)}
        given = {word for word in words[1:] if word.startswith("-")}
        assert given <= options, f"{page}: {line}"


@pytest.mark.parametrize("page", (*READMES, "docs/commands.md", "docs/vocabulary.md"))
def test_every_python_block_is_python(page):
    assert blocks(page, "python")
    for block in blocks(page, "python"):
        compile(block, page, "exec")
        for name in re.findall(r"\bllama_fast\.([a-z]\w*)\(", block):
            assert name in dir(llama_fast), name


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for link in LINK.findall(text):
        if not link.startswith("http"):
            assert (ROOT / page).parent.joinpath(link).exists(), f"{page}: {link}"


@pytest.mark.parametrize("page", PAGES)
def test_every_link_into_a_page_leads_to_a_heading(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for link, anchor in re.findall(r"\]\(([^)#\s:]*)#([^)\s]+)\)", text):
        target = (ROOT / page).parent / link if link else ROOT / page
        titles = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.M)
        words = (re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", title).lower() for title in titles)
        assert anchor in {re.sub(r"[^\w\- ]", "", w).replace(" ", "-") for w in words}, link


@pytest.mark.parametrize("page", PAGES)
def test_every_name_of_the_package_is_there(page):
    """Modules are looked for, and the names in them, but not imported: some need a peer."""
    text = (ROOT / page).read_text(encoding="utf-8")
    package = Path(llama_fast.__file__).parent
    for name in set(re.findall(r"\bllama_fast(?:\.[a-z]\w*)+", text, re.I)):
        place, words = package, name.split(".")[1:]
        while words and (
            place.joinpath(words[0]).is_dir() or place.joinpath(f"{words[0]}.py").is_file()
        ):
            place /= words.pop(0)
        if words and place == package:
            assert words[0] in dir(llama_fast), name
        elif words:
            module = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
            source = module.read_text(encoding="utf-8")
            assert set(words) <= set(re.findall(r"\w+", source)), name


def test_the_index_leads_to_every_page():
    index = (ROOT / "docs/index.md").read_text(encoding="utf-8")
    linked = {(ROOT / "docs" / link).resolve() for link in LINK.findall(index)}
    pages = {path.resolve() for path in (ROOT / "docs").rglob("*.md")}
    assert pages - linked == {(ROOT / "docs/index.md").resolve()}


def test_links_of_the_chinese_page_to_english_ones_say_so():
    text = (ROOT / "README.zh-CN.md").read_text(encoding="utf-8")
    for match in re.finditer(r"(?<!!)\[[^]]+\]\([^)]+\)(（英文）)?", text):
        chinese = match[0].endswith(".zh-CN.md)")
        assert chinese or match[1] or match[0] == "[English](README.md)", match[0]
    for picture in re.findall(r"!\[([^]]*)\]", text):
        assert "英文" in picture
    for word in ("词干", "屋子", "参赛者"):
        assert word not in text


def test_both_readmes_say_the_same_figures():
    marks = [
        re.findall(r"<!-- ([^<>]+) -->", (ROOT / page).read_text(encoding="utf-8"))
        for page in READMES
    ]
    assert marks[0] == marks[1]
    assert sum("×" in mark for mark in marks[0][:7]) == 3


@pytest.mark.parametrize("page", (*READMES, "docs/quantization.md"))
def test_figures_are_those_of_the_results(page, tmp_path):
    found = [load(path) for path in sorted((ROOT / "benchmarks" / "results").glob("*.json"))]
    copy = tmp_path / "page.md"
    copy.write_bytes((ROOT / page).read_bytes())
    fill(copy, found)
    assert copy.read_text(encoding="utf-8") == (ROOT / page).read_text(encoding="utf-8"), (
        "write them anew: see docs/benchmarks.md"
    )


def test_setting_up_is_not_silent():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert "--quiet" not in makefile.partition("clean:")[0].partition("$(VENV)/bin/python:")[2]
    targets = set(re.findall(r"^([a-z0-9/-]+):", makefile, re.M))
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        code = "\n".join([*blocks(page), *re.findall(r"`(make [^`]+)`", text)])
        assert set(re.findall(r"^make ([a-z0-9/-]+)\b", code, re.M)) <= targets, page
