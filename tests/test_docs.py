"""The documents and the tools' settings say what is there: files, links, commands, versions, worked examples.

`python tests/test_docs.py` writes the list of modules in docs/architecture.md and docs/glossary.md anew.
"""

from __future__ import annotations

import ast
import difflib
import re
import subprocess
import sys
import textwrap
import tomllib
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
ARCHITECTURE = ROOT / "docs" / "architecture.md"
GLOSSARY = ROOT / "docs" / "glossary.md"
BEGIN, END = "<!-- files: written by `python tests/test_docs.py` -->", "<!-- end of files -->"
WIDTH, NAME = 120, 26  # columns of the list, and of the names in it
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])


def modules(folder: Path) -> Iterator[tuple[int, str, str]]:
    """Depth, name and first sentence of every package and module below a package, packages last."""
    for file in sorted(folder.glob("*.py")):
        if file.name != "__init__.py":
            yield 1, file.name, summary(file)
    for package in sorted(path.parent for path in folder.glob("*/__init__.py")):
        yield 1, f"{package.name}/", summary(package / "__init__.py")
        yield from ((depth + 1, name, told) for depth, name, told in modules(package))


def summary(file: Path) -> str:
    """The first sentence of a module's docstring."""
    told = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    paragraph = " ".join(told.split("\n\n")[0].split())
    return re.split(r"(?<=[.?!])\s+(?=[A-Z`(])", paragraph)[0]


def listing() -> str:
    """The annotated tree, a Markdown code block."""
    lines = []
    package = ROOT / "spec_decode"
    for depth, name, told in [(0, "spec_decode/", summary(package / "__init__.py")), *modules(package)]:
        head = "  " * depth + name
        lines += textwrap.wrap(
            f"{told}",
            WIDTH,
            initial_indent=head.ljust(NAME - 1) + " ",
            subsequent_indent=" " * NAME,
            break_long_words=False,
            break_on_hyphens=False,
        ) or [head]
    return "\n".join(["```", *lines, "```"])


def written(page: str) -> str:
    """The page with the list as it should be."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    assert begin and end, f"docs/architecture.md lacks the marks {BEGIN} and {END}"
    return f"{before}{BEGIN}\n\n{listing()}\n\n{END}{after}"


def test_the_architecture_lists_every_module_and_no_other() -> None:
    page = ARCHITECTURE.read_text(encoding="utf-8")
    lines = difflib.unified_diff(page.splitlines(), written(page).splitlines(), "there", "should be", lineterm="", n=0)
    assert not (changes := list(lines)), "run `python tests/test_docs.py`:\n" + "\n".join(changes)


def test_every_module_says_what_it_is() -> None:
    silent = [str(file.relative_to(ROOT)) for file in (ROOT / "spec_decode").rglob("*.py") if not summary(file)]
    assert not silent, f"modules without a docstring: {', '.join(silent)}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_links_to_is_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if not re.match(r"https?:|#|mailto:", link)]
    lost = [link for link in links if not (page.parent / link.partition("#")[0]).exists()]
    assert not lost, f"{page.name} links to what does not exist: {', '.join(lost)}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_heading_that_a_page_links_to_is_there(page: Path) -> None:
    lost = []
    for link in re.findall(r"\]\(([^)\s:]*#[^)\s]+)\)", page.read_text(encoding="utf-8")):
        file, _, anchor = link.partition("#")
        aim = page.parent / file if file else page
        headings = re.findall(r"^#+ (.+)$", aim.read_text(encoding="utf-8"), re.M) if aim.is_file() else []
        if anchor not in {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}:
            lost.append(link)
    assert not lost, f"{page.name} links to headings that do not exist: {', '.join(lost)}"


def test_files_that_a_page_names_are_there() -> None:
    lost = set()
    for page in PAGES:
        if page.name == "CHANGELOG.md":  # of files that are gone, too
            continue
        for name in re.findall(r"(?<![\w/.-])((?:spec_decode|tests|docs|assets)/[\w/.-]+\w)", page.read_text("utf-8")):
            if not (ROOT / name).exists() and name not in EXAMPLES:
                lost.add(f"{page.name}: {name}")
    assert not lost, "documents name what does not exist:\n" + "\n".join(sorted(lost))


def test_every_check_is_in_the_documents_and_every_one_that_they_name_exists() -> None:
    from spec_decode.check import CHECKS

    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES if page.name != "CHANGELOG.md")
    named = set(re.findall(r"spec_decode check ([a-z][a-z-]*)", text))
    assert named - set(CHECKS) == set(), "documents name checks that do not exist"
    assert set(CHECKS) - named == set(), "checks that no document names"


def test_commands_that_the_documents_name_exist() -> None:
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    named = sorted(set(re.findall(r"python -m spec_decode\s+([a-z][a-z-]*)", text)))
    told = subprocess.run(
        [sys.executable, "-m", "spec_decode", "--help"], cwd=ROOT, text=True, capture_output=True, check=True
    ).stdout
    assert [name for name in named if not re.search(rf"^ +{name}\b", told, re.M)] == []


# Worked examples of CONTRIBUTING.md


def examples() -> dict[str, str]:
    """The code blocks that begin with the name of a file, by that name."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    return dict(re.findall(r"^```python\n# (\S+\.py(?:, in \w+)?)\n(.*?)^```$", text, re.M | re.S))


EXAMPLES = examples()


def made(path: str, monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """The module of an example, as if it stood where the example says."""
    name = path.removesuffix(".py").replace("/", ".")
    module = types.ModuleType(name)
    module.__package__ = name.rpartition(".")[0]
    monkeypatch.setitem(sys.modules, name, module)
    exec(compile(EXAMPLES[path], path, "exec"), module.__dict__)
    return module


def entry(path: str, scope: dict[str, Any]) -> Any:
    """The table entry of an example."""
    return eval(EXAMPLES[path].strip(), dict(scope))


def test_the_example_of_a_rule_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    import scipy.stats
    import torch

    from spec_decode import rules
    from spec_decode.verification import Case

    made("spec_decode/verification/matching.py", monkeypatch)
    rule = entry("spec_decode/rules.py, in TABLE", vars(rules))
    draws, random = 4000, torch.Generator().manual_seed(0)

    class Fresh:
        """Noise that no two rounds share; the noise of the target's own sample is not this rule's."""

        def uniform(self) -> torch.Tensor:
            return torch.rand(draws, 2, generator=random)

        def residual(self) -> torch.Tensor:
            return torch.empty(draws, 3, 4).exponential_(generator=random)

    p, q = torch.tensor([0.5, 0.3, 0.15, 0.05]), torch.tensor([0.1, 0.2, 0.3, 0.4])
    draft = torch.multinomial(q, 2 * draws, replacement=True, generator=random).view(draws, 2)
    target, drafter = p.expand(draws, 3, 4), q.expand(draws, 2, 4)
    verdict = rule.verify(Case(draft, target.log(), target, drafter, Fresh()))
    first = torch.where(verdict.accepted > 0, draft[:, 0], verdict.token)
    assert rule.exact and not rule.same_text and rule.noise == "round"
    assert scipy.stats.chisquare(torch.bincount(first, minlength=4).numpy(), (draws * p).numpy()).pvalue > 1e-3
    assert abs(float((verdict.accepted > 0).float().mean()) - float((p * q).sum())) < 0.03


def test_the_example_of_a_drafter_drafts_and_changes_no_text(monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    from spec_decode import decode
    from spec_decode.check import tiny
    from spec_decode.draft_length import Fixed
    from spec_decode.drafters import kinds
    from spec_decode.settings import Settings
    from spec_decode.target import Target
    from spec_decode.text import TextStream

    module = made("spec_decode/drafters/bigram.py", monkeypatch)
    kind = entry("spec_decode/drafters/kinds.py, in KINDS", vars(kinds))
    drafter = kind.load(None)
    assert type(drafter) is module.BigramDrafter and drafter.name == kind.name
    target, prompt = Target(tiny.gemma4("dense")[0]), [5, 6, 7, 5, 6]
    settings = Settings(max_new_tokens=40)
    alone, fast = (TextStream(tiny.Characters(), prompt) for _ in range(2))
    plain = [token.id for r in decode.baseline(target, prompt, alone, settings) for token in r.emitted]
    rounds = list(decode.speculative(target, drafter, Fixed(3), prompt, fast, settings))
    assert [token.id for r in rounds for token in r.emitted] == plain
    assert sum(r.drafted for r in rounds) > 0


def test_the_example_of_a_source_races(monkeypatch: pytest.MonkeyPatch) -> None:
    from spec_decode.events import SPECULATIVE, Trace
    from spec_decode.request import Request
    from spec_decode.sources import Source

    source: Source = made("spec_decode/sources/echo.py", monkeypatch).EchoSource()
    race = source.race(Request("one two three"))
    assert len(list(race.steps())) == 6
    assert race.trace.text(SPECULATIVE) == "one two three " and race.trace.identical
    assert Trace.from_json(race.trace.to_json()) == race.trace
    stopped = source.race(Request("one two three"))
    steps = stopped.steps()
    next(steps)
    stopped.stop("time")
    assert list(steps) == [] and set(stopped.trace.finish.values()) == {"time"}


# Settings of the tools


def test_the_workflow_installs_and_tests_as_the_readme_says() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "tests.yml").read_text(encoding="utf-8"))["jobs"]
    steps = {name: [step["run"].strip() for step in job["steps"] if "run" in step] for name, job in jobs.items()}
    (cpu,) = re.findall(r"^pip install .*--index-url .*$", readme, re.M)
    (test,) = re.findall(r"^pip install -r requirements-dev.txt && .*$", readme, re.M)
    assert steps["tests"][0] == cpu and steps["tests"][-1] == test
    versions = jobs["tests"]["strategy"]["matrix"]["python"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert versions == ["3.11", "3.12", "3.13"] and project["requires-python"] == f">={versions[0]}"
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    for command in ("ruff check .", "ruff format --check .", "mypy"):
        assert any(command in step for step in steps["lint"]) and f"\n{command}\n" in ci
    for half in test.split(" && "):
        assert half.replace("pip install", "pip install -q") in ci


def test_hooks_use_versions_that_the_requirements_allow() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
    (ruff,) = (repo["rev"].removeprefix("v") for repo in hooks if repo["repo"].endswith("/ruff-pre-commit"))
    lines = (ROOT / "requirements-dev.txt").read_text(encoding="utf-8").splitlines()
    (needed,) = (Requirement(line) for line in lines if line.startswith("ruff"))
    assert needed.specifier.contains(ruff)


def test_the_fast_tier_names_files_that_are_there() -> None:
    named = (ROOT / "tests" / "fast.txt").read_text(encoding="utf-8").split()
    assert [name for name in named if not (ROOT / name).is_file()] == [] and named == sorted(set(named))


# The glossary


def test_the_glossary_of_the_documents_is_that_of_the_page() -> None:
    from spec_decode.glossary import page

    assert GLOSSARY.read_text(encoding="utf-8") == page(), "run `python tests/test_docs.py`"


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    from spec_decode.glossary import page

    GLOSSARY.write_text(page(), encoding="utf-8")
    ARCHITECTURE.write_text(written(ARCHITECTURE.read_text(encoding="utf-8")), encoding="utf-8")
