"""The house rules that a machine can check: size, width, comments, imports, examples in docstrings.

    python tests/test_house.py      # the table for every Python file, and what is out of bounds
"""
import ast
import doctest
import functools
import importlib
import io
import re
import sys
import tokenize
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
CORE = ["losses.py", "model.py", "data.py", "train.py", "index.py", "evaluate.py"]

# The bounds. Characters are what a reader reads; lines and width are what a screen shows.
COLUMNS = 110
FUNCTION_LINES = 60
CORE_FILE_LINES = 750
CORE_LINES, CORE_CHARACTERS = 3500, 165_000
CORE_COMMENTS = 0.10  # share of lines that are a comment of their own

# Bounds that are not met; `python tests/test_house.py` says by how much. Nothing else of these is excused.
NOT_MET = [("the core", "lines"), ("the core", "characters"), ("train.py", "lines"), ("data.py", "lines")]

# Who may import whom. What is not named here imports no file of this project, apart from the core.
MAY_IMPORT = {
    "losses": [],
    "data": [],
    "model": ["data"],
    "evaluate": ["data"],
    "index": ["data", "model"],
    "train": ["losses", "model", "data", "evaluate"],
    "tools.beir": ["tools.bm25", "tools.compare"],
    "tools.explain": ["tools.bm25"],
    "tools.export": ["tools.bm25"],
    "tools.study": ["tools.study_report", "tools.demo_data"],
    "tools.study_report": ["tools.compare", "tools.plot"],
    "tools.pretrained": ["tools.demo_data"],
}
# What requirements.txt brings; tools may ask for more in tools/requirements.txt.
PACKAGES = ["torch", "transformers", "safetensors", "numpy", "tqdm", "tokenizers"]


def python_files() -> list[Path]:
    """The core first, in reading order, then everything else."""
    others = []
    for folder in ("tools", "recipes", "benchmarks", "tests"):
        others += sorted(path for path in ROOT.joinpath(folder).rglob("*.py") if path.stat().st_size)
    return [ROOT / name for name in CORE] + others


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


class Size(NamedTuple):
    """One row of the table."""
    name: str
    lines: int
    characters: int
    widest: int
    too_wide: list[int]
    comments: float
    longest: int
    too_long: list[str]


def size_of(path: Path) -> Size:
    source = path.read_text(encoding="utf-8")
    lines = source.split("\n")[:-1]
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = [t for t in tokens if t.type == tokenize.COMMENT and t.line.lstrip().startswith("#")]
    functions = function_lengths(ast.parse(source))
    too_long = {name: length for name, length in functions.items() if length > FUNCTION_LINES}
    return Size(
        name=str(path.relative_to(ROOT)),
        lines=len(lines),
        characters=len(source),
        widest=max(map(len, lines)),
        too_wide=[number for number, line in enumerate(lines, 1) if len(line) > COLUMNS],
        comments=len(comments) / len(lines),
        longest=max(functions.values(), default=0),
        too_long=[f"{name} ({length} lines)" for name, length in too_long.items()],
    )


def function_lengths(tree: ast.Module) -> dict[str, int]:
    """Lines of each function from `def` to its end, without the calls that declare command line arguments.

    >>> function_lengths(ast.parse("def f(p):\\n p.add_argument('-x')\\n p.add_argument(\\n'-y')\\n pass"))
    {'f': 2}
    """
    def height(node):
        return node.end_lineno - node.lineno + 1

    lengths = {}
    for function in ast.walk(tree):
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)):
            statements = [node for node in ast.walk(function) if isinstance(node, ast.Expr)]
            arguments = sum(height(node) for node in statements if ".add_argument(" in ast.unparse(node))
            # Two methods of one name, as of two classes: the longer one counts.
            lengths[function.name] = max(lengths.get(function.name, 0), height(function) - arguments)
    return lengths


def imports(path: Path) -> set[str]:
    """Every module that a file imports, anywhere in it, by its dotted name."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            # `from tools import bm25` may name a module, `from tools.bm25 import build` its function.
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            found.update(argument.value for argument in node.args if isinstance(argument, ast.Constant))
    return found


def table(sizes: list[Size]) -> str:
    """What `python tests/test_house.py` prints: a row a file, the core's sum after the core."""
    def row(*cells):
        return "{:<32} {:>6} {:>11} {:>9} {:>9} {:>9} {:>9} {:>9}".format(*cells)

    shown = [row("file", "lines", "characters", "comments", "widest", f"over {COLUMNS}",
                 "longest", f"over {FUNCTION_LINES}")]
    for size in sizes:
        shown.append(row(size.name, f"{size.lines:,}", f"{size.characters:,}", f"{size.comments:.1%}",
                         size.widest, len(size.too_wide), size.longest, len(size.too_long)))
        if size.name == CORE[-1]:
            core = sizes[:len(CORE)]
            lines, characters = sum(s.lines for s in core), sum(s.characters for s in core)
            shown += [row("core", f"{lines:,}", f"{characters:,}", "", "", "", "", ""), ""]
    return "\n".join(shown)


def out_of_bounds(sizes: list[Size]) -> list[str]:
    """One line for each bound that is not met: the file, the value and the bound."""
    found = []
    for size in sizes:
        if size.too_wide:
            at = ", ".join(map(str, size.too_wide[:8])) + (", ..." if len(size.too_wide) > 8 else "")
            found.append(f"{size.name}: {len(size.too_wide)} lines over {COLUMNS} columns: {at}")
        if size.too_long:
            found.append(f"{size.name}: over {FUNCTION_LINES} lines: {', '.join(size.too_long)}")
        if size.name in CORE and size.lines > CORE_FILE_LINES:
            found.append(f"{size.name}: {size.lines} lines, at most {CORE_FILE_LINES}")
        if size.name in CORE and size.comments < CORE_COMMENTS:
            found.append(f"{size.name}: {size.comments:.1%} comment lines, at least {CORE_COMMENTS:.0%}")
    core = [size for size in sizes if size.name in CORE]
    for what, bound in (("lines", CORE_LINES), ("characters", CORE_CHARACTERS)):
        total = sum(getattr(size, what) for size in core)
        if total > bound:
            found.append(f"the core: {total:,} {what}, at most {bound:,}")
    return found


# The tests.

@functools.cache
def all_sizes():
    return [size_of(path) for path in python_files()]


@pytest.mark.parametrize("name", [*(str(path.relative_to(ROOT)) for path in python_files()), "the core"])
def test_size_and_width(name):
    sizes = all_sizes()
    problems = [problem for problem in out_of_bounds(sizes) if problem.startswith(f"{name}: ")]
    excused = [problem for problem in problems for where, what in NOT_MET
               if problem.startswith(f"{where}: ") and f" {what}, at most " in problem]
    assert problems == excused, "\n".join(["", table(sizes), "", *problems])
    if excused:
        pytest.xfail("\n".join(excused))


def test_the_bounds_are_seen(tmp_path):
    """The measure itself: a file that breaks every bound is reported for each."""
    body = "".join(f"    x = {i}\n" for i in range(CORE_FILE_LINES))
    (tmp_path / "losses.py").write_text(f"def f():\n{body}\nx = '{'y' * COLUMNS}'\n")
    size = size_of_elsewhere(tmp_path / "losses.py", tmp_path)
    assert (size.lines, size.too_wide, size.comments) == (CORE_FILE_LINES + 3, [CORE_FILE_LINES + 3], 0.0)
    problems = out_of_bounds([size])
    assert len(problems) == 4 and all(problem.startswith("losses.py: ") for problem in problems)


def size_of_elsewhere(path, root):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules[__name__], "ROOT", root)
        return size_of(path)


@pytest.mark.parametrize("path", python_files(), ids=module_name)
def test_no_import_runs_upwards(path):
    """The core imports neither tools nor recipes; a tool imports another only where MAY_IMPORT says so."""
    name = module_name(path)
    core = [Path(core).stem for core in CORE]
    project = {*core, *map(module_name, python_files())}
    allowed = set(MAY_IMPORT.get(name, []))
    if name not in core:
        allowed.update(core)
    if name.startswith("tests."):
        allowed = project | {"conftest"}
    if name.startswith(("recipes.", "benchmarks.")):
        allowed |= {other for other in project if other.startswith(("tools.", "benchmarks."))}
    wrong = sorted(found for found in imports(path) if found in project and found not in allowed)
    assert not wrong, f"{path.name} imports {wrong}; of our files it may import {sorted(allowed)}"


@pytest.mark.parametrize("name", CORE)
def test_the_core_needs_few_packages(name):
    tops = {found.split(".")[0] for found in imports(ROOT / name)}
    foreign = tops - set(sys.stdlib_module_names) - {Path(core).stem for core in CORE} - set(PACKAGES)
    assert not foreign, f"{name} imports {sorted(foreign)}; the core needs {PACKAGES} and nothing else"


def hard_to_read(tree: ast.Module) -> list[str]:
    """`line: what` for each shape that the house does without.

    >>> hard_to_read(ast.parse("f = lambda x: x\\nprint(y := 1)\\nif a and (b := 2): pass"))
    ['1: a lambda bound to a name', '2: := inside a call', '3: := among several conditions']
    """
    found = []
    for node in ast.walk(tree):
        inside = [type(inner) for inner in ast.walk(node)]
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Lambda):
            found.append((node.lineno, "a lambda bound to a name"))
        elif isinstance(node, ast.Call) and ast.NamedExpr in inside:
            found.append((node.lineno, ":= inside a call"))
        elif isinstance(node, ast.BoolOp) and ast.NamedExpr in inside:
            found.append((node.lineno, ":= among several conditions"))
        elif isinstance(node, ast.ExceptHandler) and node.type is None:
            found.append((node.lineno, "a bare except"))
    return [f"{line}: {what}" for line, what in sorted(found)]


@pytest.mark.parametrize("path", [*ROOT.glob("*.py"), *ROOT.glob("tools/*.py")], ids=module_name)
def test_no_shapes_that_need_a_second_reading(path):
    source = path.read_text(encoding="utf-8")
    found = [f"{path.name}:{problem}" for problem in hard_to_read(ast.parse(source))]
    found += [f"{path.name}: {word}" for word in ("TODO", "FIXME", "NotImplementedError") if word in source]
    assert not found, "\n".join(["", *found])


@pytest.mark.parametrize("path", python_files(), ids=module_name)
def test_examples_in_docstrings_run(path):
    if ">>> " not in path.read_text(encoding="utf-8"):
        pytest.skip("no examples")
    results = doctest.testmod(importlib.import_module(module_name(path).removeprefix("tests.")))
    assert results.attempted and not results.failed, f"{path.name}: run `python -m doctest` on it"


if __name__ == "__main__":
    measured = [size_of(path) for path in python_files()]
    print(table(measured), "", *out_of_bounds(measured), sep="\n")
    sys.exit(bool(out_of_bounds(measured)))
