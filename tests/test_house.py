"""The rules of the house that a linter does not know."""

import ast
from pathlib import Path

import pytest

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[1]
MODULES = sorted(path for path in (ROOT / "kimia").rglob("*.py") if not path.name.startswith("__"))
LONGEST_FUNCTION = 80  # lines
LONGEST_MODULE = 500


@pytest.mark.parametrize("module", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_module_has_its_test_file(module: Path) -> None:
    relative = module.relative_to(ROOT / "kimia")
    assert (ROOT / "tests" / relative.parent / f"test_{relative.name}").exists()


@pytest.mark.parametrize("module", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_modules_and_functions_stay_short(module: Path) -> None:
    text = module.read_text(encoding="utf-8")
    assert text.count("\n") <= LONGEST_MODULE
    functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]
    assert [f.name for f in functions if f.end_lineno - f.lineno >= LONGEST_FUNCTION] == []
