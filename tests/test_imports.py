"""Rooms import only from rooms above them, only model/ knows PEFT's names, and what is imported is
declared.
"""

import ast
import re
import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "forgetless"
# The rooms, in their one-way order: each imports only from itself and from rooms before it.
ORDER = [
    "errors",
    "files",
    "options",
    "data",
    "report",
    "model",
    "evaluate",
    "chat",
    "importance",
    "penalty",
    "record",
    "budget",
    "methods",
    "integrations",
    "tune",
    "sequence",
    "compare",
    "gate",
    "demo",
    "plan",
    "cli",
    "__main__",
]
# What knows the insides of PEFT: the one room of models, and methods that are PEFT's own.
KNOW_PEFT = {"model", "methods/adapters.py"}
# Words of PEFT's insides.
PEFT_WORDS = ("lora_A", "peft_config", "get_base_layer")
# Distributions whose import name is another one.
IMPORTED_AS = {"pyyaml": "yaml", "lm-eval": "lm_eval"}
# Declared, but not imported: bitsandbytes is loaded by transformers, the rest are reporters that
# it loads.
NOT_IMPORTED = {"bitsandbytes", "tensorboard", "wandb", "trackio"}
# Imported, but not declared: what loads the plugin of Axolotl is Axolotl, which brings pydantic;
# pytorch_lightning is the older name of lightning.
BROUGHT_BY_THE_HOST = {"axolotl", "pydantic", "pytorch_lightning"}


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
                assert ORDER.index(theirs) <= ORDER.index(mine), f"{path.name} imports {module}"


def test_files_of_a_room_import_each_other_one_way():
    """No circle of files, so that each can be read after those that it stands on."""
    files = {
        ".".join(path.relative_to(SOURCE).with_suffix("").parts): path
        for path in SOURCE.rglob("*.py")
        if path.name != "__init__.py"
    }
    needs = {}
    for name, path in files.items():
        found = set()
        for module, node in imports(path):
            short = module.removeprefix("forgetless").removeprefix(".")
            if module == "forgetless" or module.startswith("forgetless."):
                found |= {short} | {f"{short}.{a.name}".removeprefix(".") for a in node.names}
        needs[name] = found & set(files)
    while needs:
        free = [name for name, wanted in needs.items() if not wanted & set(needs)]
        assert free, f"files import each other in a circle: {sorted(needs)}"
        needs = {name: wanted for name, wanted in needs.items() if name not in free}


def test_only_the_model_room_knows_the_insides_of_peft():
    for path in SOURCE.rglob("*.py"):
        if not KNOW_PEFT & {room(path), str(path.relative_to(SOURCE))}:
            foreign = [name for name, _ in imports(path) if name.startswith("peft.")]
            foreign += [word for word in PEFT_WORDS if word in path.read_text()]
            assert not foreign, path


def declared(requirements: list[str]) -> set[str]:
    """The names under which the distributions of a list of requirements are imported."""
    names = {re.split(r"[\[<>=; ]", line)[0] for line in requirements}
    return {IMPORTED_AS.get(name, name) for name in names} - {"forgetless"}


def test_every_import_is_declared_and_every_dependency_used():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    users = declared(project["dependencies"])
    for name, requirements in extras.items():
        if name not in ("dev", "docs"):  # what builds the package's site is no part of it
            users |= declared(requirements)
    used = {module.split(".")[0] for path in SOURCE.rglob("*.py") for module, _ in imports(path)}
    foreign = used - set(sys.stdlib_module_names) - {"forgetless"} - BROUGHT_BY_THE_HOST
    # Triton comes with the torch builds for GPUs; penalty/fused.py does without it elsewhere.
    assert foreign - {"triton"} <= users, sorted(foreign - users)
    assert users - NOT_IMPORTED <= foreign, sorted(users - foreign)


def test_what_is_pinned_fits_what_is_declared():
    """Every declared distribution has a version in constraints.txt that its bounds allow."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = {}
    for line in (ROOT / "constraints.txt").read_text().split():
        name, version = line.split("==")
        pinned[re.sub(r"[-_.]+", "-", name).lower()] = version
    lists = [project["dependencies"], *project["optional-dependencies"].values()]
    for text in {line for requirements in lists for line in requirements}:
        requirement = Requirement(text)
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        if name not in {"forgetless", "lightning", "wandb", "trackio", "triton"}:
            assert requirement.specifier.contains(pinned[name]), f"{text} and {pinned[name]}"


def test_contributing_lists_the_rooms_in_their_order():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    table = text.split("| room |")[1].split("\n\n")[0]
    rooms = re.findall(r"^\| `([a-z_]+)(?:/|\.py)` \|", table, flags=re.MULTILINE)
    assert rooms == ORDER
