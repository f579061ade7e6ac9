"""Rules of the code base that no linter checks: imports, what stays lazy, sizes, docstrings, metadata."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from .support import ROOT, run_python

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
COMFYUI = {"comfy", "comfy_api", "comfy_extras", "folder_paths", "nodes"}

# Folder -> what its files may import of the project; a longer folder name decides before a shorter one.
BASE = {"flowcore.errors", "flowcore.ops", "flowcore.conditioning", "flowcore.lazy", "flowcore.hub"}
MAY_IMPORT = {
    "flowcore": {"flowcore"},
    "flowcore/flow": {"flowcore.flow", "flowcore.errors"},
    "flowcore/layers": {"flowcore.layers", *BASE},
    "flowcore/models": {"flowcore.models", "flowcore.layers", *BASE},
    "flowcore/text": {"flowcore.text", "flowcore.layers", "flowcore.weights", "flowcore.assets", *BASE},
    "flowcore/vae": {"flowcore.vae", "flowcore.weights", "flowcore.assets", *BASE},
    "flowcore/weights": {"flowcore.weights", "flowcore.models", *BASE},
    "flowcore/assets": {"flowcore.assets", "flowcore.errors"},
    "training": {"training", "flowcore"},
    "nodes": {"nodes", "flowcore"},
}
# Third-party package -> the folders whose files may import it.
ONLY_IN = {
    "transformers": ("flowcore/text", "flowcore/models/exo", "training", "nodes/host", "tests"),
    "tokenizers": ("flowcore/text", "training", "tests"),
    "diffusers": ("flowcore/vae", "training", "nodes/host", "tests"),
    "pydantic": ("training", "tests"),
    "yaml": ("training", "tests"),
    "peft": ("training", "tests"),
    "accelerate": ("training", "tests"),
    "deepspeed": ("training", "tests"),
}
HEAVY = ["transformers", "diffusers", "peft", "accelerate", "matplotlib", "pydantic", "tensorboard", "scipy"]


def python_files(*folders: str) -> list[Path]:
    """The project's Python files in the folders, or all of them."""
    roots = [ROOT / folder for folder in folders or ("flowcore", "training", "nodes", "tests")]
    files = [file for root in roots for file in sorted(root.rglob("*.py"))]
    return files if folders else [*files, ROOT / "__init__.py", ROOT / "dev.py"]


def parse(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"), filename=str(file))


def name_of(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def tracked_files() -> list[Path]:
    """The files under version control."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    names = [name for name in listed.stdout.decode().split("\0") if name]
    return [ROOT / name for name in names if (ROOT / name).is_file()]


def imports_of(file: Path) -> Iterator[tuple[int, str, bool]]:
    """Line, absolute module name and whether it was written relative, of every import in the file."""
    package = file.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(parse(file)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name, False) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.lineno, node.module or "", False
        elif isinstance(node, ast.ImportFrom):
            base = [*package[: len(package) - node.level + 1], *(node.module or "").split(".")]
            start = ".".join(part for part in base if part)
            names = [start] if node.module else [f"{start}.{alias.name}".strip(".") for alias in node.names]
            yield from ((node.lineno, name, True) for name in names)


def is_within(module: str, parents: set[str]) -> bool:
    return any(module == parent or module.startswith(parent + ".") for parent in parents)


def allowed_for(file: Path) -> set[str]:
    """What the file may import of the project."""
    folder = name_of(file.parent)
    match = max((f for f in MAY_IMPORT if folder == f or folder.startswith(f + "/")), key=len)
    allowed = set(MAY_IMPORT[match])
    if folder.startswith("flowcore/models/"):
        architecture = folder.split("/")[2]
        allowed = (allowed - {"flowcore.models"}) | {f"flowcore.models.{architecture}"}
    return allowed


def test_imports_follow_the_layers() -> None:
    faults = []
    for file in python_files("flowcore", "training", "nodes"):
        for line, module, _ in imports_of(file):
            if module.split(".")[0] in {"flowcore", "training", "nodes"} and not is_within(
                module, allowed_for(file)
            ):
                faults.append(f"{name_of(file)}:{line} imports {module}")
    assert not faults, faults


def test_imports_are_written_in_the_form_that_works_in_comfyui() -> None:
    faults = []
    for file in python_files("flowcore", "nodes"):
        for line, module, relative in imports_of(file):
            if module.split(".")[0] in {"flowcore", "training", "nodes"} and not relative:
                faults.append(f"{name_of(file)}:{line} must import {module} relatively")
    assert not faults, faults


def test_comfyui_is_imported_in_nodes_only() -> None:
    faults = [
        f"{name_of(file)}:{line} imports {module}"
        for file in python_files("flowcore", "training")
        for line, module, relative in imports_of(file)
        if not relative and module.split(".")[0] in COMFYUI
    ]
    assert not faults, faults


def test_optional_packages_stay_in_their_folders() -> None:
    faults = []
    for file in python_files():
        for line, module, _ in imports_of(file):
            folders = ONLY_IN.get(module.split(".")[0])
            if folders and not name_of(file).startswith(folders):
                faults.append(f"{name_of(file)}:{line} imports {module}, which belongs in {folders}")
    assert not faults, faults


def test_importing_flowcore_imports_nothing_heavy() -> None:
    code = f"import sys, flowcore; print(sorted(set(sys.modules) & set({HEAVY})))"
    result = run_python("-c", code)
    assert (result.returncode, result.stdout.strip()) == (0, "[]"), result


def test_flowcore_is_importable_from_another_folder(tmp_path: Path) -> None:
    result = run_python("-c", "import flowcore, training", cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert result.returncode == 0, result.stderr


def test_comfyui_can_load_the_folder_under_any_name() -> None:
    code = f"""
import importlib.util, inspect, sys
name = "C:_x_odd folder-1"
spec = importlib.util.spec_from_file_location(
    name, {str(ROOT / "__init__.py")!r}, submodule_search_locations=[{str(ROOT)!r}])
module = importlib.util.module_from_spec(spec)
sys.modules[name] = module
spec.loader.exec_module(module)
assert inspect.iscoroutinefunction(module.comfy_entrypoint)
assert not hasattr(module, "NODE_CLASS_MAPPINGS")
print(module.WEB_DIRECTORY, "torch" in sys.modules)
"""
    result = run_python("-c", code)
    assert result.returncode == 0, result.stderr
    folder, has_torch = result.stdout.split()
    assert (ROOT / folder).is_dir()
    assert has_torch == "False"


def test_pytest_can_collect_in_a_folder_of_any_name(tmp_path: Path) -> None:
    checkout = tmp_path / "1 odd-name.v2"
    (checkout / "tests" / "unit").mkdir(parents=True)
    for name in ("__init__.py", "pyproject.toml", "tests/__init__.py"):
        (checkout / name).write_bytes((ROOT / name).read_bytes())
    (checkout / "tests" / "support.py").write_text("ANSWER = 42\n")
    (checkout / "tests" / "unit" / "test_one.py").write_text(
        "from tests.support import ANSWER\n\ndef test_one() -> None:\n    assert ANSWER == 42\n"
    )
    result = run_python("-m", "pytest", "-q", "-p", "no:cacheprovider", cwd=checkout)
    assert result.returncode == 0, result.stdout + result.stderr


def definitions(tree: ast.AST, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Qualified names and nodes of the functions and classes of a module and of its classes."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield prefix + node.name, node
            if isinstance(node, ast.ClassDef):
                yield from definitions(node, f"{prefix}{node.name}.")


def test_everything_public_has_a_docstring() -> None:
    faults = []
    for file in python_files("flowcore", "training"):
        tree = parse(file)
        if not ast.get_docstring(tree):
            faults.append(f"{name_of(file)} has no docstring")
        for name, node in definitions(tree):
            public = not any(part.startswith("_") for part in name.split("."))
            if public and not ast.get_docstring(node):
                faults.append(f"{name_of(file)}:{node.lineno} {name} has no docstring")
    assert not faults, faults


def test_files_and_functions_are_short() -> None:
    faults = []
    for file in python_files():
        lines = len(file.read_text(encoding="utf-8").splitlines())
        if lines > MAX_FILE_LINES:
            faults.append(f"{name_of(file)} has {lines} lines, allowed are {MAX_FILE_LINES}")
        for name, node in definitions(parse(file)):
            length = node.end_lineno - node.lineno + 1
            if not isinstance(node, ast.ClassDef) and length > MAX_FUNCTION_LINES:
                faults.append(f"{name_of(file)}:{node.lineno} {name} has {length} lines")
    assert not faults, faults


def keyword(node: ast.Call, name: str) -> object:
    """The constant given to a keyword argument of the call, or None."""
    return next(
        (k.value.value for k in node.keywords if k.arg == name and isinstance(k.value, ast.Constant)), None
    )


def is_swallowed(node: ast.ExceptHandler) -> bool:
    """Whether the handler catches everything and does not end by raising."""
    caught = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
    broad = any(c is None or ast.unparse(c) in {"Exception", "BaseException"} for c in caught)
    return broad and not isinstance(node.body[-1], ast.Raise)


def unsafe(node: ast.AST) -> str | None:
    """What is wrong with a piece of code that hides errors or runs code from files, or None."""
    if isinstance(node, ast.ExceptHandler):
        return "hides every exception" if is_swallowed(node) else None
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        return "drops what strict=False reports" if keyword(node.value, "strict") is False else None
    if not isinstance(node, ast.Call):
        return None
    called = ast.unparse(node.func)
    if called == "torch.load" and keyword(node, "weights_only") is not True:
        return "torch.load needs weights_only=True"
    if called.startswith("pickle.load"):
        return "unpickles"
    return "trusts code from files" if keyword(node, "trust_remote_code") is True else None


@pytest.mark.parametrize(
    "code",
    [
        "try:\n    f()\nexcept Exception:\n    pass",
        "try:\n    f()\nexcept (OSError, BaseException):\n    print(1)",
        "try:\n    f()\nexcept:\n    pass",
        "model.load_state_dict(state, strict=False)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "pickle.loads(data)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
    ],
)
def test_the_check_for_hidden_errors_finds_them(code: str) -> None:
    assert any(unsafe(node) for node in ast.walk(ast.parse(code)))


def test_shipped_code_neither_hides_errors_nor_runs_code_from_files() -> None:
    faults = [
        f"{name_of(file)}:{getattr(node, 'lineno', 0)} {fault}"
        for file in python_files("flowcore", "training", "nodes")
        for node in ast.walk(parse(file))
        if (fault := unsafe(node))
    ]
    assert not faults, faults


def test_tracked_files_name_no_machine_path_and_no_package_index() -> None:
    folders = r"(?<![\w.])/(?:root|work|home|Users)/\w|[A-Z]:\\\\?Users"
    hosts = (
        r"py" r"pi\.org|python" r"hosted\.org|npm" r"js\.org|download\.py" r"torch\.org|deb\.de" r"bian\.org"
    )
    pattern = re.compile(f"{folders}|{hosts}")
    faults = []
    for file in tracked_files():
        data = file.read_bytes()
        if b"\0" in data:
            continue
        for number, line in enumerate(data.decode("utf-8").splitlines(), start=1):
            if pattern.search(line):
                faults.append(f"{name_of(file)}:{number} {line.strip()[:100]}")
    assert not faults, faults


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_comfyui_manager_installs_the_same_packages_as_pip() -> None:
    dependencies = project()["project"]["dependencies"]
    assert (ROOT / "requirements.txt").read_text(encoding="utf-8").split("\n")[:-1] == dependencies
    faults = [
        line
        for line in dependencies
        if re.match(r"torch|xformers|triton", line) or re.search(r"[=<~]=|<", line)
    ]
    assert not faults, f"an extension must leave torch alone and set no upper bound: {faults}"


DISTRIBUTIONS = {
    "PIL": "pillow",
    "flash_attn": "flash-attn",
    "yaml": "pyyaml",
    "tomllib": "tomli",
    "msvcrt": "",
    "fcntl": "",
}


def test_every_imported_package_is_declared() -> None:
    data = project()["project"]
    names = {
        where: {re.split(r"[^\w-]", line.lower())[0] for line in lines}
        for where, lines in {**data["optional-dependencies"], "base": data["dependencies"]}.items()
    }
    base = names["base"] | names["torch"] | names["flash"] | names["quant"]
    faults = []
    for folder, declared in (
        ("flowcore", base),
        ("nodes", base | COMFYUI),
        ("training", base | names["train"] | names["lpips"] | names["zero"]),
    ):
        for file in python_files(folder):
            for line, module, relative in imports_of(file):
                top = module.split(".")[0]
                known = relative or top in sys.stdlib_module_names or top in {"flowcore", "training"}
                if not known and DISTRIBUTIONS.get(top, top.lower()) not in declared:
                    faults.append(f"{name_of(file)}:{line} imports {top}, which pyproject.toml does not list")
    assert not faults, faults


def test_pre_commit_uses_the_pinned_linter() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"][0][
        "hooks"
    ]
    pins = {pin for hook in hooks for pin in hook.get("additional_dependencies", [])}
    assert pins <= set(project()["project"]["optional-dependencies"]["dev"])


def test_the_registry_accepts_the_metadata() -> None:
    data = project()
    assert re.fullmatch(r"[a-z][a-z0-9_.-]{0,99}", data["project"]["name"])
    assert re.fullmatch(r"\d+\.\d+\.\d+", data["project"]["version"])
    assert {"PublisherId", "DisplayName", "requires-comfyui", "web"} <= set(data["tool"]["comfy"])
    assert (ROOT / data["tool"]["comfy"]["web"]).is_dir()
    assert (ROOT / data["project"]["license"]["file"]).is_file()


def test_readme_holds_the_commands() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    block = re.search(r"<!-- ci: test -->\n```\w*\n(.*?)```", text, re.DOTALL)
    assert block, "README.md needs the test command in a fenced block after the marker"
    assert block[1].strip() == "python dev.py test"
    assert "python dev.py demo" in text
    assert "python dev.py comfy" in text


def test_readme_names_every_node() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8").replace("\\", "")
    pattern = r'node_id="\w+",\s+display_name="([^"]+)"'
    names = [
        name
        for file in python_files("nodes")
        for name in re.findall(pattern, file.read_text(encoding="utf-8"))
    ]
    assert names
    assert not [name for name in names if name not in text]
