"""House rules that no linter knows: sizes, one home per fact, empty rooms, a complete wheel."""

import ast
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import qlora_kit as qk

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "qlora_kit"
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60  # without the docstring

LONG_FILES: dict[str, str] = {}
"""File to the reason why it may be longer."""
LONG_FUNCTIONS: dict[str, str] = {
    "tests/train/sample_record.py:record": "one literal, a complete record",
}
"""`file:function` to the reason why it may be longer."""


def sources() -> list[Path]:
    """Python files of the project: package, scripts, tests, benchmarks, examples."""
    folders = ("qlora_kit", "scripts", "tests", "benchmarks", "examples")
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def long_functions(path: Path) -> Iterator[tuple[str, int]]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        lines = node.end_lineno - node.lineno + 1
        if ast.get_docstring(node) is not None:
            lines -= node.body[0].end_lineno - node.body[0].lineno + 1
        if lines > MAX_FUNCTION_LINES:
            yield f"{path.relative_to(ROOT)}:{node.name}", lines


def test_files_are_short():
    lengths = {str(p.relative_to(ROOT)): len(p.read_text().splitlines()) for p in sources()}
    long = {name: n for name, n in lengths.items() if n > MAX_FILE_LINES}
    assert set(long) == set(LONG_FILES), long


def test_functions_are_short():
    long = dict(found for path in sources() for found in long_functions(path))
    assert set(long) == set(LONG_FUNCTIONS), long


def test_size_check_bites(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    file = tmp_path / "long.py"
    file.write_text("def short():\n    pass\n\ndef long():\n" + "    pass\n" * 61)
    assert list(long_functions(file)) == [("long.py:long", 62)]


def test_kernels_hold_no_python():
    assert not list((ROOT / "kernels").rglob("*.py"))


def test_nf4_table_has_one_home():
    """A value of the table in any other file would be a second definition."""
    suffixes = (".py", ".cu", ".cuh", ".sh")
    folders = ("qlora_kit", "kernels", "scripts", "benchmarks", "examples")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*")]
    homes = [
        str(p.relative_to(ROOT))
        for p in files
        if p.suffix in suffixes and "6961928" in p.read_text()
    ]
    assert homes == ["qlora_kit/quant/nf4.py"]


def test_rooms_open_with_a_docstring_only():
    for path in PACKAGE.rglob("__init__.py"):
        if path.parent == PACKAGE:
            continue
        module = ast.parse(path.read_text())
        assert len(module.body) == 1, path
        assert ast.get_docstring(module), path


def test_every_module_opens_with_a_text():
    for path in PACKAGE.rglob("*.py"):
        assert ast.get_docstring(ast.parse(path.read_text())), path


def test_a_todo_carries_its_reason():
    for path in sources():
        assert not re.search(r"# *TODO:?\s*$", path.read_text(), re.MULTILINE), path


def test_public_names_are_the_typed_ones():
    """What type checkers see is what `__getattr__` finds."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    typed = {alias.asname: node.module for node in block.body for alias in node.names}
    assert typed == vars(qk)["_HOMES"]


@pytest.mark.parametrize("name", sorted(vars(qk)["_HOMES"]))
def test_public_name_exists_and_is_documented(name):
    value = getattr(qk, name)
    assert value.__doc__
    assert name in dir(qk)


def test_unknown_public_name():
    with pytest.raises(AttributeError, match="no_such"):
        qk.no_such  # noqa: B018


def test_load_stays_a_function():
    """The room of the same name is bound over it by Python; the package refuses."""
    from qlora_kit.load import model

    assert qk.load is model.load


def run_python(code: str) -> str:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout


LIGHT = ["qlora_kit", "qlora_kit.cli.main", "qlora_kit.cli.run_config"] + [
    ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in PACKAGE.rglob("config.py")
]


@pytest.mark.parametrize("module", sorted(LIGHT))
def test_import_is_light(module):
    heavy = "torch", "transformers", "datasets", "numpy"
    code = f"import sys, {module}; print([m for m in {heavy} if m in sys.modules])"
    assert run_python(code).strip() == "[]"


def test_quantizer_registers_on_access():
    """`from_pretrained(quantization_config=qk.NF4Config())` needs no other import."""
    code = (
        "import qlora_kit as qk; config = qk.NF4Config()\n"
        "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as m\n"
        "print(config.quant_method in m)"
    )
    assert run_python(code).strip() == "True"


def test_wheel_is_complete(tmp_path):
    """Kernels, templates and the typing marker travel in the wheel; tests do not."""
    pytest.importorskip("hatchling")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, check=True, cwd=ROOT, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert f"qlora_kit-{qk.__version__}-" in wheel.name
    assert "qlora_kit/py.typed" in names
    for path in (ROOT / "kernels").rglob("*"):
        if path.is_file():
            assert f"qlora_kit/_kernels/{path.relative_to(ROOT / 'kernels')}" in names
    for path in PACKAGE.rglob("*"):
        if path.suffix in (".py", ".j2"):
            assert str(path.relative_to(ROOT)) in names
    assert all(name.startswith("qlora_kit") for name in names)


def test_constraints_fit_the_ranges():
    """Each pinned version lies in the range that pyproject.toml states."""
    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = dict(
        line.split("==")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line and not line.startswith("#")
    )
    groups = project["optional-dependencies"]
    for text in project["dependencies"] + groups["dev"] + groups["demo"]:
        requirement = Requirement(text)
        pin = pins.get(requirement.name.lower())
        if pin is None:
            # not pinned: packages of the CUDA family, which must match torch's own pins
            assert re.match("cuda|nvidia", requirement.name), requirement.name
        else:
            assert requirement.specifier.contains(pin), text


def test_imports_are_declared():
    """Everything the package imports at any place is a dependency or an extra."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    texts = project["dependencies"] + project["optional-dependencies"]["gpu"]
    declared = {re.match(r"[\w-]+", text)[0].lower().replace("-", "_") for text in texts}
    names = {"pyyaml": "yaml", "cuda_core": "cuda", "cuda_bindings": "cuda"}
    allowed = {names.get(name, name) for name in declared} | {"qlora_kit"} | sys.stdlib_module_names
    peers = {"peft", "liger_kernel", "unsloth"}  # measured where a user has installed them
    for path in PACKAGE.rglob("*.py"):
        measures = path.parent == PACKAGE / "bench" / "peers"
        for node in ast.walk(ast.parse(path.read_text())):
            modules = []
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                modules = [node.module or ""]
            for module in modules:
                top = module.split(".")[0]
                assert top in allowed or (measures and top in peers), f"{path}: {module}"
