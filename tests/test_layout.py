"""The arrows between the folders, sizes of files, and that no file speaks of one machine: read from the sources."""

import ast
import re
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDERS = ("effc", "passes", "backends", "tests", "examples", "benchmarks")
SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
LINES = 350  # a file that needs more holds two ideas,
LONG = {"effc/edit.py": 500}  # but for these
# Written in two parts, so that this file does not speak of them itself.
MACHINE = re.compile("|".join(rf"(?<![\w.<>-])/{root}/[\w.-]" for root in ("home", "root", "Users", "work", "mnt")))


def of(folder: str) -> list[Path]:
    return [path for path in SOURCES if path.relative_to(ROOT).parts[0] == folder]


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(level, dotted name) of everything imported, also inside functions; `from a import b` gives a and a.b."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((0, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.level, node.module or ""
            prefix = f"{node.module}." if node.module else ""
            yield from ((node.level, prefix + alias.name) for alias in node.names)


def within(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


def named(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


SHIPPED = [*of("effc"), *of("passes"), *of("backends")]


def wrong(paths: list[Path], *packages: str, level: int | None = 0) -> dict[str, list[str]]:
    """File -> what it imports of these packages."""
    found = {named(p): [n for at, n in imports(p) if level in (None, at) and within(n, *packages)] for p in paths}
    return {path: names for path, names in found.items() if names}


def test_there_is_something_to_look_at():
    assert len(of("effc")) > 20 and len(of("passes")) > 3 and len(of("backends")) > 1 and len(of("tests")) > 10


def test_passes_and_backends_are_never_imported_bare():
    assert wrong(SOURCES, "passes", "backends") == {}


def test_the_compiler_reaches_passes_and_backends_by_name_only():
    """Entry points hold the names; the compiler's own sources import none of them, and nothing relatively."""
    assert wrong(of("effc"), "effc.passes", "effc.backends", level=None) == {}
    assert {named(path): name for path in of("effc") for level, name in imports(path) if level} == {}


def test_siblings_are_imported_relatively_and_the_compiler_absolutely():
    for folder in ("passes", "backends"):
        assert wrong(of(folder), "effc.passes", "effc.backends") == {}
        siblings = {path.stem for path in of(folder)}
        for path in of(folder):
            relative = [(level, name) for level, name in imports(path) if level]
            assert {level for level, _ in relative} <= {1}, named(path)
            assert {name.split(".")[0] for _, name in relative if name} <= siblings, named(path)


def test_nothing_that_is_shipped_imports_what_only_tests_need():
    assert wrong(SHIPPED, "tests", "benchmarks", "pytest", "hypothesis") == {}


def test_torch_is_asked_for_when_it_is_needed_only():
    """It is an optional dependency: nothing but its backend's own files import it when imported."""
    for path in SHIPPED:
        body = ast.parse(path.read_text(encoding="utf-8")).body
        top = [node for node in body if isinstance(node, ast.Import | ast.ImportFrom)]
        names = [a.name for node in top if isinstance(node, ast.Import) for a in node.names]
        names += [node.module or "" for node in top if isinstance(node, ast.ImportFrom)]
        assert named(path).startswith("backends/_torch_") or not any(within(name, "torch") for name in names), named(
            path
        )


def test_benchmarks_are_never_imported():
    assert wrong([*of("tests"), *of("examples")], "benchmarks") == {}


def test_a_file_holds_one_idea():
    lengths = {named(path): len(path.read_text(encoding="utf-8").splitlines()) for path in SHIPPED}
    assert {name: length for name, length in lengths.items() if length > LONG.get(name, LINES)} == {}
    assert [name for name in LONG if lengths.get(name, 0) <= LINES] == []  # an exception that is needed no more


def test_a_file_says_what_it_is():
    sources = {named(path): path.read_text(encoding="utf-8") for path in SHIPPED}
    assert [n for n, source in sources.items() if source.strip() and not ast.get_docstring(ast.parse(source))] == []


def test_each_pass_and_backend_is_registered():
    """A file without an underscore is one technique or one runtime, and pyproject.toml names it."""
    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    for folder in ("passes", "backends"):
        there = {f"effc.{folder}.{path.stem}" for path in of(folder) if not path.stem.startswith("_")}
        listed = {target.partition(":")[0] for target in points[f"effc.{folder}"].values()}
        assert there == {module for module in listed if module.startswith(f"effc.{folder}.")}


def texts() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    found = [ROOT / line for line in listed.stdout.splitlines()] if listed.returncode == 0 else SOURCES
    kinds = (".py", ".md", ".toml", ".yaml", ".yml", ".txt", ".lark", ".json", ".sh", "")
    return [path for path in found if path.is_file() and path.suffix in kinds]


def test_no_file_names_a_path_of_one_machine():
    assert MACHINE.search("see " + "/ho" + "me/someone") and not MACHINE.search("https://example.org/home")
    places = {named(path): MACHINE.search(path.read_text(encoding="utf-8", errors="replace")) for path in texts()}
    assert {name: found.group() for name, found in places.items() if found} == {}
