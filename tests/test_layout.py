"""Facts about the repository itself that a reader relies on."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import gossamer

SOURCE = Path(gossamer.__file__).parent


def test_only_ops_imports_the_compiled_module() -> None:
    importers = [p for p in SOURCE.rglob("*.py") if re.search(r"import.*\b_kernels\b", p.read_text(encoding="utf-8"))]
    assert [p.name for p in importers] == ["ops.py"]


def test_only_the_ui_prints() -> None:
    printers = {
        p.relative_to(SOURCE).as_posix()
        for p in SOURCE.rglob("*.py")
        if any(
            isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
            for node in ast.walk(ast.parse(p.read_text(encoding="utf-8")))
        )
    }
    # main.py prints errors before anything heavier than argparse is loaded.
    assert printers == {"cli/ui.py", "cli/main.py"}


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from gossamer.cli.main import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'numpy', 'rich', 'tokenizers', 'huggingface_hub', 'jinja2', 'gguf', 'gossamer._kernels'}\n"
        "found = heavy & set(sys.modules)\n"
        "sys.exit(f'loaded {found}' if found else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "compress" in done.stdout


def test_public_names_exist() -> None:
    for name in gossamer.__all__:
        assert getattr(gossamer, name) is not None
