"""What importing and building the package may not drag in."""

import ast
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path

import ckf

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("polars", "pandas", "torch_geometric", "triton", "matplotlib", "sklearn", "datasets")


def modules_after(code: str) -> set[str]:
    """Top-level modules loaded in a fresh interpreter that runs the code."""
    code += "; import json, sys; print(json.dumps(sorted({m.split('.')[0] for m in sys.modules})))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_import_is_light():
    theirs = modules_after("import torch, transformers.generation.utils")
    loaded = modules_after("import ckf; ckf.patch_model") - theirs
    assert not loaded & set(HEAVY)


def test_every_public_name_is_there():
    assert "MultiLoRATrainer" in ckf.__all__
    assert all(hasattr(ckf, name) for name in ckf.__all__)


def test_setup_imports_no_torch():
    tree = ast.parse((ROOT / "setup.py").read_text())
    names = [a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names]
    names += [n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
    assert not {name for name in names if name.split(".")[0] == "torch"}
    code = f"import runpy; runpy.run_path({str(ROOT / 'setup.py')!r}, run_name='checked')"
    assert "torch" not in modules_after(code)


def test_torch_is_no_build_requirement():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    build = {re.split(r"[<>=]", name)[0] for name in project["build-system"]["requires"]}
    assert build <= {"setuptools", "pybind11", "ninja"}
    ruff = [name for name in project["project"]["optional-dependencies"]["test"] if "ruff" in name]
    assert re.fullmatch(r"ruff==\d+\.\d+\.\d+", ruff[0]), "the formatter must be pinned"


def copied_tree(folder: Path) -> Path:
    """The package's files without what was built from them."""
    for name in ("ckf", "csrc", "configs"):
        skip = shutil.ignore_patterns("__pycache__", "*.so")
        shutil.copytree(ROOT / name, folder / name, ignore=skip)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    return folder


def test_a_wheel_brings_the_configs(tmp_path):
    tree = copied_tree(tmp_path / "tree")
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(tmp_path / "lib")]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    code = "from ckf.config_files import load_config, own_configs; load_config('demo'); "
    code += "print(*own_configs().values(), sep='\\n')"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "lib"), "PYTHONSAFEPATH": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    found = [Path(line) for line in done.stdout.splitlines()]
    assert {file.parent for file in found} == {tmp_path / "lib" / "ckf" / "configs"}, done.stderr
    assert {file.name for file in found} == {file.name for file in (ROOT / "configs").iterdir()}


def test_sdist_builds_the_extension_elsewhere(tmp_path):
    """Every source of the extension is packed, and nothing that was built from it."""
    tree = copied_tree(tmp_path / "tree")
    command = [sys.executable, "setup.py", "-q", "sdist", "--dist-dir", str(tmp_path / "dist")]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    (archive,) = (tmp_path / "dist").iterdir()
    with tarfile.open(archive) as packed:
        names = {name.partition("/")[2] for name in packed.getnames()}
    sources = {f"csrc/{path.name}" for path in (ROOT / "csrc").iterdir()}
    assert sources | {"setup.py", "pyproject.toml", "LICENSE", "ckf/kernels/cuda.py"} <= names
    assert not [name for name in names if name.endswith((".so", ".o", ".pyc"))]


def imported(folder: Path) -> set[str]:
    """Top-level modules that the files of a folder import anywhere."""
    found = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                found.add(node.module.split(".")[0])
    return found


def test_every_import_is_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = project["optional-dependencies"]
    names = [*project["dependencies"], *itertools.chain.from_iterable(groups.values())]
    declared = {re.split(r"[<>=\[]", name)[0].lower().replace("-", "_") for name in names}
    other_names = {"yaml": "pyyaml", "sklearn": "scikit_learn"}
    alternatives = {"pyarrow"}  # used where polars is missing
    own = alternatives | {
        "ckf",
        "tests",
        "benchmarks",
        "scripts",
        "__future__",
        *sys.stdlib_module_names,
    }
    for folder in ("ckf", "tests"):
        needed = {other_names.get(name, name) for name in imported(ROOT / folder) - own}
        assert needed <= declared, f"{folder} imports what pyproject.toml does not name"
