"""Does the project run with every torch and transformers that README names? Run by hand, for it downloads.

    python tests/check_versions.py                                # all: 700 MB of wheels into .versions/
    python tests/check_versions.py --torch 2.11.0 --transformers  # one torch, no transformers

torch is read, not run: a wheel for another platform is small, and its sources and type stubs say which
names and keywords exist. Every dotted name that the project takes from torch is looked up, and each keyword
passed to it. A method of a tensor has no dotted name: it is compared between the versions, and reported
where one has it and another has not. transformers is run: installed beside the other packages, it must
train two steps on the demo's data, index and search, and give the scores that the installed version gives.
"""
import argparse
import ast
import os
import subprocess
import sys
import zipfile
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TORCH = ["2.11.0", "2.12.1", "2.13.0", "2.14.1"]
TRANSFORMERS = ["5.5.0", "5.17.0", "5.24.0"]
# A Mac's wheel: a tenth of the size of Linux's, which brings CUDA.
PLATFORMS = [f"macosx_{number}_0_arm64" for number in (11, 12, 13, 14, 15)]
# A method that one of these has, too, says nothing about tensors.
NOT_TENSORS = (str, bytes, list, dict, set, Path)
MAKERS = ("__init__", "__new__")


# What the project uses.

class Uses(ast.NodeVisitor):
    """Of one file: names that come from torch, their keywords, and the methods called on anything else."""

    def __init__(self, tree: ast.AST):
        self.alias, self.names, self.methods = {}, defaultdict(set), defaultdict(set)
        for node in ast.walk(tree):  # imports first: a function may import below the place of its use
            if isinstance(node, ast.Import):
                for name in node.names:
                    if name.name.split(".")[0] == "torch":
                        self.alias[name.asname or "torch"] = name.name if name.asname else "torch"
                        self.names[name.name]
            elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
                for name in node.names:
                    self.alias[name.asname or name.name] = f"{node.module}.{name.name}"
                    self.names[f"{node.module}.{name.name}"]
        self.visit(tree)

    def dotted(self, node) -> str | None:
        """torch.distributed.barrier for `dist.barrier`, None for what does not start at an imported name."""
        parts = []
        while isinstance(node, ast.Attribute):
            parts.append(node.attr)
            node = node.value
        if isinstance(node, ast.Name) and node.id in self.alias:
            return ".".join([self.alias[node.id], *reversed(parts)])
        return None

    def visit_Attribute(self, node):
        name = self.dotted(node)
        if name:
            self.names[name]
        else:
            self.generic_visit(node)

    def visit_Call(self, node):
        keywords = {word.arg for word in node.keywords if word.arg}
        name = self.dotted(node.func)
        if name:
            self.names[name] |= keywords
        elif isinstance(node.func, ast.Attribute):
            self.methods[node.func.attr] |= keywords
        self.generic_visit(node)


def uses_of_the_project() -> tuple[dict, dict]:
    names, methods = defaultdict(dict), defaultdict(set)
    for file in sorted([*ROOT.glob("*.py"), *ROOT.glob("[btr]*/*.py")]):  # benchmarks, tests, tools, recipes
        found = Uses(ast.parse(file.read_text()))
        for name, keywords in found.names.items():
            names[name].setdefault(str(file.relative_to(ROOT)), set()).update(keywords)
        for name, keywords in found.methods.items():
            methods[name] |= keywords
    return names, methods


# What a version has.

def top_level(body: list):
    """The statements of a module, and those within its `if`, `try` and `with`: these decide by platform."""
    for node in body:
        yield node
        if isinstance(node, (ast.If, ast.Try, ast.With)):
            handlers = [line for handler in getattr(node, "handlers", []) for line in handler.body]
            yield from top_level([*node.body, *getattr(node, "orelse", []), *handlers])


class Version:
    """One wheel of torch, read as text."""

    def __init__(self, wheel: Path):
        self.zip = zipfile.ZipFile(wheel)
        self.files, self.modules = set(self.zip.namelist()), {}

    def parsed(self, module: str) -> dict | None:
        """A module's top level: {name: nodes, or names it is imported from}; "*": what is imported whole."""
        if module in self.modules:
            return self.modules[module]
        path = module.replace(".", "/")
        places = [f"{path}.py", f"{path}/__init__.py", f"{path}.pyi", f"{path}/__init__.pyi"]
        there = [place for place in places if place in self.files]
        if not there:
            self.modules[module] = None
            return None
        names = self.modules[module] = defaultdict(list)
        for place in there:
            package = module if "__init__" in place else module.rpartition(".")[0]
            for node in top_level(ast.parse(self.zip.read(place)).body):
                self.collect(node, package, names)
        return names

    @staticmethod
    def collect(node, package: str, names: dict) -> None:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names[node.name].append(node)
        elif isinstance(node, ast.Assign):
            for target in node.targets:
                if isinstance(target, ast.Name):
                    names[target.id].append(node)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names[node.target.id].append(node)
        elif isinstance(node, ast.Import):
            for name in node.names:
                names[name.asname or name.name].append(name.name)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[:len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join(base + (node.module or "").split(".")).strip(".")
            for name in node.names:
                dotted = source if name.name == "*" else f"{source}.{name.name}"
                names[name.asname or name.name].append(dotted)

    def find(self, dotted: str, seen=()) -> list | None:
        """The definitions of a dotted name; [] if it exists but cannot be read, None if it does not exist."""
        if dotted in seen:
            return None
        if self.parsed(dotted) is not None:
            return []
        parent, _, name = dotted.rpartition(".")
        if not parent:
            return None
        names = self.parsed(parent)
        if names is None:
            return self.member(parent, name, seen)
        nodes = [node for node in names.get(name, []) if not isinstance(node, str)]
        for source in [node for node in names.get(name, []) if isinstance(node, str)]:
            nodes += self.find(source, (*seen, dotted)) or []
        if name in names:
            return nodes
        for source in names.get("*", []):
            found = self.find(f"{source}.{name}", (*seen, dotted))
            if found is not None:
                return found
        # torch/__init__.py copies these into itself in a loop.
        if parent == "torch":
            for source in ("torch._C._VariableFunctions", "torch._C"):
                found = self.parsed(source).get(name)
                if found:
                    return [node for node in found if not isinstance(node, str)]
        return None

    def member(self, parent: str, name: str, seen) -> list | None:
        """`name` of a class, such as Tensor.sort or ReduceOp.MAX."""
        classes = [node for node in self.find(parent, seen) or [] if isinstance(node, ast.ClassDef)]
        if not classes:
            return None
        found = [node for cls in classes for node in cls.body if getattr(node, "name", None) == name]
        inside = [node for cls in classes for node in ast.walk(cls) if isinstance(node, ast.Name)]
        fields = [node for node in inside if node.id == name]
        inherits = any(cls.bases for cls in classes)  # its parents are not read
        return found if found or fields or inherits else None

    def accepts(self, nodes: list) -> set | None:
        """Keywords that the definitions take together; None where any may be given, or none can be read."""
        words = set()
        for node in nodes:
            if isinstance(node, ast.ClassDef):
                makers = [n for n in node.body if getattr(n, "name", None) in MAKERS]
                fields = {n.target.id for n in node.body if isinstance(n, ast.AnnAssign)}
                inner = self.accepts(makers) if makers else fields or None  # a dataclass has fields instead
            elif isinstance(node, ast.FunctionDef):
                arguments = node.args
                inner = {a.arg for a in [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]}
                inner = None if arguments.kwarg else inner
            else:
                inner = None
            if inner is None:
                return None
            words |= inner
        return words or None


def download(version: str, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    if not list(folder.glob(f"torch-{version}-*.whl")):
        platforms = [word for platform in PLATFORMS for word in ("--platform", platform)]
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "-d", folder]
        subprocess.run([*command, *platforms, "--python-version", "3.12", f"torch=={version}"], check=True)
    return next(folder.glob(f"torch-{version}-*.whl"))


def check_torch(versions: list[str], folder: Path) -> list[str]:
    """One line for each thing that a version lacks."""
    names, methods = uses_of_the_project()
    read = {version: Version(download(version, folder)) for version in versions}
    lacking, unread = [], []
    for name, places in sorted(names.items()):
        found = {version: torch.find(name) for version, torch in read.items()}
        if all(nodes is None for nodes in found.values()):
            unread.append(name)
            continue
        where = ", ".join(places)
        for version, nodes in found.items():
            if nodes is None:
                lacking.append(f"torch {version} has no {name} ({where})")
                continue
            accepted = read[version].accepts(nodes)
            for word in sorted(set().union(*places.values()) - accepted) if accepted else []:
                lacking.append(f"torch {version}: {name} takes no {word}= ({where})")
    print(f"torch: {len(names) - len(unread)} names found in at least one of {', '.join(versions)}; "
          f"not readable: {', '.join(unread) or 'none'}")
    return lacking + check_methods(methods, read)


def check_methods(methods: dict, read: dict) -> list[str]:
    """What one version's tensors can do and another's cannot."""
    stubs = {version: torch.find("torch._C.TensorBase")[0].body for version, torch in read.items()}
    signatures = {version: defaultdict(list) for version in read}
    for version, body in stubs.items():
        for node in body:
            if isinstance(node, ast.FunctionDef):
                signatures[version][node.name].append(node)
    lacking = []
    for name, words in sorted(methods.items()):
        if any(hasattr(kind, name) for kind in NOT_TENSORS):
            continue
        having = [version for version in read if name in signatures[version]]
        if having and len(having) < len(read):
            without = read.keys() - set(having)
            lacking += [f"torch {version}: tensors have no .{name}()" for version in sorted(without)]
        taken = {version: read[version].accepts(signatures[version][name]) or set() for version in having}
        for word in words:
            without = [version for version in having if word not in taken[version]]
            if len(without) < len(having):
                lacking += [f"torch {version}: .{name}() takes no {word}=" for version in without]
    return lacking


# transformers, run for real.

CHAIN = """
set -e
cd $ROOT
$PYTHON -m tools.demo_data --source synthetic --documents 200 --train_queries 100 --dev_queries 10 \\
  --test_queries 20 --vocab 512 --hidden 32 --out $OUT/data
for head in sparse dense; do
  $PYTHON train.py --model $OUT/data/model --lora_rank 4 --head $head --objective cl --corpus $OUT/data \\
    --train $OUT/data/train.jsonl --negatives 2 --queries_per_step 8 --max_steps 2 --out $OUT/$head
  $PYTHON index.py build --model $OUT/$head --corpus $OUT/data --out $OUT/$head.index
  $PYTHON index.py search --index $OUT/$head.index --queries $OUT/data/queries.test.jsonl --k 10 \\
    --out $OUT/$head.trec
done
"""


def scores_with(packages: Path | None, out: Path) -> dict:
    """{(head, query, document): score} of the chain, run with the packages of a folder before all others."""
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(packages or "")}
    env |= {"PYTHON": f"{sys.executable} -W ignore", "OUT": str(out), "ROOT": str(ROOT)}
    if not (out / "dense.trec").exists():
        subprocess.run(["rm", "-rf", out])
        out.mkdir(parents=True)
        done = subprocess.run(["bash", "-c", CHAIN], env=env, text=True, capture_output=True)
        if done.returncode:
            raise RuntimeError(done.stderr[-3000:])
    scores = {}
    for head in ("sparse", "dense"):
        for line in (out / f"{head}.trec").read_text().splitlines():
            qid, _, docid, _, score, _ = line.split()
            scores[head, qid, docid] = float(score)
    return scores


def check_transformers(versions: list[str], folder: Path) -> list[str]:
    problems, want = [], scores_with(None, folder / "chain-installed")
    for version in versions:
        packages = folder / f"transformers-{version}"
        if not packages.exists():
            install = [sys.executable, "-m", "pip", "install", "-q", "--target", packages]
            subprocess.run([*install, f"transformers=={version}"], check=True)
        try:
            got = scores_with(packages, folder / f"chain-{version}")
        except RuntimeError as e:
            problems.append(f"transformers {version}: {e}")
            continue
        if got.keys() != want.keys():
            other = len(got.keys() ^ want.keys())
            problems.append(f"transformers {version} finds other documents: {other} of {len(want)} differ")
            continue
        worst = max(abs(got[key] - want[key]) / max(1e-3, abs(want[key])) for key in want)
        print(f"transformers {version}: {len(got)} scores, at most {worst:.1e} from the installed version's")
        if worst > 1e-3:
            problems.append(f"transformers {version}: scores differ by {worst:.1e}")
    return problems


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--torch", nargs="*", default=TORCH, help="versions to read (%(default)s)")
    parser.add_argument("--transformers", nargs="*", default=TRANSFORMERS, help="to run (%(default)s)")
    parser.add_argument("--folder", type=Path, default=ROOT / ".versions", help="keeps wheels (%(default)s)")
    args = parser.parse_args(argv)
    problems = check_torch(args.torch, args.folder) if args.torch else []
    problems += check_transformers(args.transformers, args.folder) if args.transformers else []
    print("\n".join(problems) or "nothing is missing")
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
