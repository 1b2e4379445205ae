"""The form of the code, with today's bounds. The lists below may only become shorter.

What is counted is in form.py: `python tests/form.py` prints it.
"""

from collections import Counter

import form

# Modules may define the same name where it means the same thing in each.
ONE_MEANING = {
    "logger": "each module's own, as the standard library has it",
    "main": "what a script runs",
    "pull": "one formula of the pull in each file of penalty/",
    "full_pull": "the same for full fine-tuning",
}
# Names that still have several meanings.
SEVERAL_MEANINGS: set[str] = set()
# Libraries that are imported inside functions, each with its reason.
LATE = {
    "datasets": "takes a second to import, and only files of text and training rows need it",
    "fcntl": "is not there on every system",
    "huggingface_hub": "is needed for names on the Hub alone",
    "lm_eval": "is an extra",
    "matplotlib": "is an extra",
    "peft": "takes seconds to import, and a model without an adapter does not need it",
    "pyarrow": "takes a second to import, and only Parquet files need it",
    "safetensors": "is needed where files are read that most commands have not",
    "tokenizers": "makes the demo's tokenizer, which is made once",
    "torch": "parts of torch that only sharded models need",
    "transformers": "takes seconds to import, and reading options and files does not need it",
    "trl": "takes seconds to import, and only training needs it",
}
# Files that import modules of our own inside functions.
LATE_OWN = {
    "penalty/fused.py": "the kernel imports Triton, which may not be installed",
}
# Lines of more than 100 columns in a file.
LONG_LINES: dict[str, int] = {}
# Files of more than 350 lines, and functions of more than 60, with what they have today.
LONG_FILES: dict[str, int] = {}
LONG_FUNCTIONS: dict[str, int] = {
    "penalty/kernel.py: pull_kernel": 80,
}


def over(lengths: list[form.Length], habit: int) -> dict[str, int]:
    return {length.where: length.lines for length in lengths if length.lines > habit}


def check(now: dict[str, int], bounds: dict[str, int]) -> None:
    longer = {where: lines for where, lines in now.items() if lines > bounds.get(where, 0)}
    assert not longer, f"longer than before, or new; split along the ideas: {longer}"
    gone = sorted(set(bounds) - set(now))
    assert not gone, f"strike these off the list: {gone}"


def test_lines_keep_to_the_columns():
    check(dict(Counter(line.rpartition(":")[0] for line in form.long_lines())), LONG_LINES)


def test_a_name_has_one_meaning():
    where = form.repeated_names()
    repeated = set(where) - set(ONE_MEANING)
    new = {name: where[name] for name in sorted(repeated - SEVERAL_MEANINGS)}
    assert not new, f"defined in several modules; give each a name that says what it is: {new}"
    gone = sorted(SEVERAL_MEANINGS - repeated)
    assert not gone, f"strike these off SEVERAL_MEANINGS: {gone}"


def test_imports_stand_at_the_top():
    late = form.late_imports()
    own = {file for file, module in late if module.split(".")[0] == "forgetless"}
    assert own == set(LATE_OWN), "import our own modules at the top, or strike the file off"
    foreign = {module.split(".")[0] for _, module in late} - {"forgetless"}
    assert foreign == set(LATE), "import it at the top, or strike the library off"


def test_files_are_short():
    check(over(form.file_lengths(), 350), LONG_FILES)


def test_functions_are_short():
    check(over(form.function_lengths(), 60), LONG_FUNCTIONS)
