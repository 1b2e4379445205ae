"""Rooms import only from rooms above them, and only weights.py knows PEFT's names."""

import ast
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src" / "forgetless"
ORDER = [
    "reading",
    "options",
    "config",
    "runs",
    "lock",
    "shapes",
    "experiment",
    "experiment_file",
    "budget",
    "frontier",
    "transfer",
    "verdict",
    "compare",
    "report",
    "cards",
    "codec",
    "overlap",
    "carving",
    "stepping",
    "distributed",
    "checkpoint",
    "run_folder",
    "weights",
    "update",
    "importance",
    "storage",
    "inspection",
    "hub",
    "sizes",
    "shrink",
    "layers",
    "moved",
    "penalty",
    "callback",
    "models",
    "adapter_files",
    "texts",
    "tasks",
    "heldout",
    "evaluation",
    "earlier",
    "ledger",
    "recording_state",
    "path_training",
    "calibrating",
    "recording",
    "domain_importance",
    "probe",
    "finish",
    "prediction",
    "keeper",
    "shrinking",
    "methods",
    "trainer",
    "training",
    "plan",
    "integrations",
    "trial",
    "pool",
    "scoring",
    "sequence",
    "matrix",
    "stacking",
    "succession",
    "campaign",
    "demo",
    "cli",
]
# Importance.save, .load, .describe, .push_to_hub; hold(budget=...)
LAZY = {
    ("importance", "storage"),
    ("importance", "inspection"),
    ("importance", "hub"),
    ("callback", "keeper"),
}


def room(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imports(path: Path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module, node
        elif isinstance(node, ast.Import):
            yield from ((alias.name, node) for alias in node.names)


def test_imports_point_one_way():
    files = [path for path in SOURCE.rglob("*.py") if path != SOURCE / "__init__.py"]
    assert {room(path) for path in files} == set(ORDER)
    for path in files:
        for module, _ in imports(path):
            parts = module.split(".")
            if parts[0] == "forgetless" and len(parts) > 1:
                mine, theirs = room(path), parts[1]
                assert ORDER.index(theirs) <= ORDER.index(mine) or (mine, theirs) in LAZY, (
                    f"{path.name} imports {module}"
                )


def test_only_weights_knows_the_insides_of_peft():
    for path in SOURCE.rglob("*.py"):
        if path.name not in ("weights.py", "adapters.py"):  # adapters.py: methods that are PEFT's
            assert "lora_A" not in path.read_text() and not any(
                module.startswith("peft.") for module, _ in imports(path)
            ), path


def test_the_readme_tree_is_true():
    text = (SOURCE.parents[1] / "README.md").read_text()
    named = {
        line.split()[0]
        for line in text.split("src/forgetless/\n")[1].split("experiments/ ")[0].splitlines()
        if line.strip()
    }
    assert named == {
        str(p.relative_to(SOURCE)) for p in SOURCE.rglob("*.py") if p.name != "__init__.py"
    }
