"""The package's public names: all there, all lazy."""

import pytest

import flowcore
from tests.support import ROOT, run_python


@pytest.mark.parametrize("name", flowcore.__all__)
def test_every_public_name_resolves(name: str) -> None:
    assert getattr(flowcore, name) is not None
    assert name in dir(flowcore)


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="module 'flowcore' has no attribute 'generat'"):
        _ = flowcore.generat


def test_import_takes_neither_torch_nor_the_libraries() -> None:
    code = "import sys, flowcore; print({'torch', 'transformers', 'diffusers', 'PIL'} & set(sys.modules))"
    result = run_python("-c", code)
    assert (result.returncode, result.stdout.strip()) == (0, "set()"), result.stderr


def test_version_is_that_of_the_package_metadata() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'version = "{flowcore.__version__}"' in text
