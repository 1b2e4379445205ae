"""Files from strangers: a short campaign of the fuzzer, properties of what every reader shares, and
by name everything that longer campaigns have found.
"""

import json
import logging
import os
import pickle
import struct
import sys
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from comparisons import comparison
from conftest import run_forked, unheld
from forgetless import cli
from forgetless.compare.experiment_file import read
from forgetless.data.documents import load_documents
from forgetless.data.domain import load_training_data
from forgetless.errors import UNSAFE, FileError, OptionError, printable
from forgetless.files.compare_json import Comparison
from forgetless.files.schema import from_json
from forgetless.files.untrusted import DEPTH, check_name, load_json
from forgetless.files.untrusted_yaml import load_yaml
from forgetless.importance.entries import DenseEntry, FactoredEntry
from forgetless.importance.importance import Importance, describe_file
from forgetless.model import adapter_patterns
from forgetless.model.adapter_files import checked_adapter, with_adapter
from forgetless.options.model import ModelOptions
from forgetless.options.option import read_yaml
from forgetless.options.tune import TuneOptions
from forgetless.options.verbs import resolve
from forgetless.report.contents import load_contents
from forgetless.report.markdown import markdown

linux = pytest.mark.skipif(sys.platform != "linux", reason="the fuzzer's limits are those of Linux")
ROOT = Path(__file__).parents[1]
NAME = "model.layers.0.self_attn.q_proj.weight"
ESCAPE = "\x1b[2J\x1b]0;owned\x07"
EXPERIMENT = """model: m
general: {wiki: a.jsonl, code: b.jsonl}
domains: {medicine: c.jsonl}
methods: {plain: {grid: {learning_rate: [1.0e-3]}}}
"""
settings.register_profile(
    "repeatable", derandomize=True
)  # the same examples in every run; fuzz/loaders.py draws others
settings.load_profile("repeatable")
plain_data = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)


class Bomb:
    """Pickled, it writes a file where it is unpickled."""

    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return (os.mkdir, (self.mark,))


def refused(function, *arguments, match=None):
    """The one printable line with which a file is refused."""
    with pytest.raises(ValueError, match=match) as caught:
        function(*arguments)
    assert str(caught.value) and not UNSAFE.search(str(caught.value)), repr(str(caught.value))
    return str(caught.value)


@pytest.fixture
def stored(tmp_path):
    """A function: tensors, metadata -> an importance file."""

    def write(tensors, **info):
        path = tmp_path / "i.safetensors"
        save_file(tensors, str(path), metadata={"forgetless": json.dumps({"format": 1, **info})})
        return path

    return write


@pytest.fixture
def experiment(tmp_path):
    """A function: text -> the experiment in it."""

    def from_text(text):
        path = tmp_path / "e.yaml"
        path.write_text(text, encoding="utf-8")
        return read(path)

    return from_text


@linux
def test_a_short_campaign_finds_nothing(tmp_path):
    words = [
        "--what",
        "importance",
        "config",
        "data",
        "report",
        "adapter",
        "--cases",
        "25",
        "--seed",
        "7",
        "--findings",
        tmp_path,
    ]
    code, printed = run_forked(ROOT / "fuzz" / "loaders.py", *words, out=tmp_path / "printed.txt")
    assert code == 0, printed
    assert printed.count(" 0 findings") == 5


@linux
def test_the_fuzzer_notices_what_must_not_happen(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "fuzz"))
    import loaders
    from targets import Target

    def use(path):
        word = path.read_text()
        acts = {
            "a": lambda: 1 / 0,
            "b": lambda: os._exit(3),
            "c": lambda: pickle.loads(pickle.dumps(Bomb(tmp_path / "ran"))),
            "d": lambda: os.system("true"),
            "e": lambda: (tmp_path / "out").write_text("x"),
            "f": lambda: bytearray(1 << 40),
            "g": lambda: ["shown " + ESCAPE],
        }
        return acts[word]() or []

    monkeypatch.setitem(
        loaders.TARGETS,
        "made-up",
        lambda folder: Target(
            {f"{c}.txt": c.encode() for c in "abcdefg"}, lambda name, data, rng: data, use
        ),
    )
    sys.addaudithook(loaders.GUARD)
    result = loaders.campaign("made-up", 40, 0, tmp_path / "findings", show=False)
    assert result["finding"] == 40 and result["loaded"] == 0
    assert not (tmp_path / "ran").exists() and not (tmp_path / "out").exists()
    words = " ".join(result["kinds"])
    assert all(
        word in words
        for word in (
            "ZeroDivisionError",
            "crashed or hung",
            "pickle.find_class",
            "os.system",
            "wrote",
            "MemoryError",
            "shown raw",
        )
    )
    assert any((tmp_path / "findings" / "made-up").iterdir())


@given(st.text() | st.binary().map(lambda data: data.decode("utf-8", "surrogateescape")))
@settings(deadline=None)
def test_printable_text_is_one_line_that_can_be_written(text):
    line = printable(text)
    assert not UNSAFE.search(line) and len(line.splitlines()) <= 1 and len(line) <= 1100
    line.encode()


@given(st.text(alphabet="{}[]:,-&*!<>|'\"%@ \n\tab01.#?~\\x\x1b\u202e") | st.text())
@settings(deadline=None, max_examples=300)
def test_any_text_is_yaml_or_refused(text):
    try:
        assert json.dumps(load_yaml(text), default=str) is not None
    except ValueError as error:
        assert str(error)


@given(plain_data)
@settings(deadline=None)
def test_yaml_and_json_read_back_what_was_written(data):
    again = load_json(json.dumps(data))
    assert json.dumps(again) == json.dumps(data) or any(
        abs(number) >= 10**18 for number in numbers(data)
    )
    try:
        assert json.dumps(load_yaml(yaml.safe_dump(data)), sort_keys=True) == json.dumps(
            data, sort_keys=True
        )
    except ValueError as error:
        assert any(word in str(error) for word in ("control", "64 bits"))


def numbers(data):
    if isinstance(data, dict):
        data = list(data.values())
    return (
        [number for value in data for number in numbers(value)]
        if isinstance(data, list)
        else [data]
        if type(data) is int
        else []
    )


@given(plain_data)
@settings(deadline=None)
def test_any_data_has_the_shape_of_a_comparison_or_is_refused(data):
    try:
        from_json(data, Comparison, "compare.json")
    except FileError as error:
        assert str(error).startswith("compare.json") and not UNSAFE.search(str(error))


@given(
    st.lists(st.floats(0, 2.0**100, width=32), min_size=1, max_size=300),
    st.sampled_from(["f32", "bf16", "u8", "u4", "factored", "factored:2"]),
)
@settings(deadline=None, max_examples=60)
def test_importance_of_any_size_is_saved_read_and_described(tmp_path_factory, values, tier):
    path = tmp_path_factory.mktemp("i") / "i.safetensors"
    made = Importance({NAME: DenseEntry(torch.tensor([values]))}).to_tier(tier)
    made.save(path)
    found = Importance.load(path)
    assert torch.equal(found[NAME].dense(), made[NAME].dense()) and NAME in found.describe()


@pytest.mark.parametrize(
    "name",
    [
        "../up",
        "/etc/x",
        "a/b",
        "a\\b",
        ".hidden",
        "..",
        "",
        ESCAPE,
        "line\nbreak",
        "\u202eabc",
        "x" * 101,
        " a",
        3,
        None,
    ],
)
def test_names_that_leave_a_folder_or_move_a_cursor_are_refused(experiment, name):
    refused(check_name, name, "methods")
    for key in ("general", "domains", "methods", "importance"):
        given = yaml.safe_load(EXPERIMENT)
        given.setdefault(key, {})[name] = {
            "general": "x.jsonl",
            "domains": "x.jsonl",
            "methods": {"method": "l2", "grid": {"strength": [1]}},
        }.get(key, {})
        with pytest.raises(OptionError) as caught:
            experiment(yaml.safe_dump(given))
        assert not UNSAFE.search(str(caught.value))


@pytest.mark.parametrize(
    "name", ["Qwen 3, 0.6B", "kl (two)", "größer", "日本語", "a.b-c_d+1", "replay 5 %"]
)
def test_names_of_any_script_are_taken(experiment, name):
    given = yaml.safe_load(EXPERIMENT)
    given["domains"][name] = "x.jsonl"
    assert name in experiment(yaml.safe_dump(given)).domains


def test_strange_names_in_importance_files_reach_no_terminal(stored, capsys, monkeypatch):
    path = stored({f"{ESCAPE}.q_proj.weight": torch.ones(2, 2)})
    refused(Importance.load, path, match="cannot be the name of a weight")
    assert cli.main(["inspect", str(path)]) == 1 and "\x1b" not in capsys.readouterr().err
    path = stored(
        {NAME: torch.ones(2, 2)},
        model={"name": ESCAPE},
        settings={"rank\x1b[1m": "a\nb"},
        estimator=ESCAPE,
        data={"source": "\u202e"},
    )
    assert cli.main(["inspect", str(path)]) == 0
    shown = capsys.readouterr().out
    assert not UNSAFE.search(shown.replace("\n", "")) and "\\x1b" in shown
    assert cli.main(["inspect", str(path) + ESCAPE]) == 1 and "\x1b" not in capsys.readouterr().err
    logging.getLogger("forgetless").warning("said %s", ESCAPE)
    assert "\x1b" not in capsys.readouterr().err


# What campaigns have found, by name: each crashed, hung, or was shown raw before.


@pytest.mark.parametrize(
    "info",
    [
        {"norms": {NAME: []}},
        {"norms": 3},
        {"coded": 3},
        {"coded": {NAME: ["u8"]}},
        {"coded": {NAME: ["u8", -1, 2]}},
        {"model": True},
        {"data": []},
        {"energy_error": []},
        {"energy_error": {"weights": {NAME: ["a", 1.0]}}},
        {"shared_in_cov": [NAME]},
        {"model": {"fingerprint": 3}},
        {"norms": {NAME: 1e999}},
        {"settings": "x"},
    ],
)
def test_metadata_of_another_type_is_refused(stored, info):
    refused(Importance.load, stored({NAME: torch.ones(2, 2)}, **info), match="in the metadata is")


def test_metadata_that_nests_without_end_is_refused(stored, tmp_path):
    path = tmp_path / "deep.safetensors"
    save_file({NAME: torch.ones(2, 2)}, str(path), metadata={"forgetless": "[" * 100_000})
    refused(Importance.load, path, match="nested deeper")


def test_a_header_that_claims_a_terabyte_is_refused(tmp_path):
    path = tmp_path / "big.safetensors"
    header = json.dumps(
        {
            NAME: {"dtype": "F32", "shape": [1 << 19, 1 << 19], "data_offsets": [0, 1 << 40]},
            "__metadata__": {"forgetless": '{"format": 1}'},
        }
    )
    path.write_bytes(struct.pack("<Q", len(header)) + header.encode())
    refused(Importance.load, path, match="not a whole safetensors file")
    path.write_bytes(struct.pack("<Q", 1 << 40) + header.encode())
    refused(Importance.load, path, match="not a whole safetensors file")


def test_factors_that_stand_for_a_huge_weight_are_looked_at_in_part(stored):
    path = stored(
        {"w.weight.row": torch.rand(30_000, 1), "w.weight.col": torch.rand(30_000, 1)}
    )  # 240 KB for 3.6 GB
    shown = describe_file(path)
    assert "30000 x 30000" in shown and "evenly spaced rows" in shown
    refused(
        Importance.load,
        stored({"w.weight.row": torch.zeros(300_000, 1), "w.weight.col": torch.zeros(300_000, 1)}),
        match="claims to be 300000 x 300000",
    )


def test_converting_to_more_than_the_memory_is_refused(stored, tmp_path, monkeypatch):
    monkeypatch.setattr("forgetless.importance.importance.free_memory", lambda: 1000)
    path = stored({"w.weight.row": torch.rand(50, 1), "w.weight.col": torch.rand(50, 1)})
    assert (
        cli.main(
            ["convert", str(path), "--tier", "f32", "--out", str(tmp_path / "out.safetensors")]
        )
        == 1
    )
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize(
    "tensors",
    [
        {f"{NAME}.row": torch.full((2, 1), 1e30), f"{NAME}.col": torch.full((2, 1), 1e30)},
        {f"{NAME}.out_cov": torch.eye(2) * 1e30, f"{NAME}.in_cov": torch.eye(2) * 1e30},
        {NAME: torch.full((2, 2), 1e300, dtype=torch.float64)},
    ],
)
def test_products_beyond_f32_are_refused(stored, tensors):
    refused(Importance.load, stored(tensors), match="beyond the range of f32")


def test_tiny_and_huge_importance_is_described(stored):
    shown = describe_file(stored({NAME: torch.tensor([[1e-30, 1e30], [3.4e38, 0.0]])}))
    assert "3.4e+38" in shown and "inf" not in shown and "nan" not in shown


@pytest.mark.parametrize(
    "tensors",
    [
        {f"{NAME}.out_cov": torch.zeros(0, 0), f"{NAME}.in_cov": torch.zeros(0, 0)},
        {NAME: torch.zeros(0, 4)},
        {f"{NAME}.row": torch.zeros(2, 0), f"{NAME}.col": torch.zeros(2, 0)},
    ],
)
def test_empty_importance_is_refused(stored, tensors):
    refused(Importance.load, stored(tensors), match="is empty")


def test_a_recorded_adapter_of_another_dtype_is_refused(stored):
    tensors = {
        NAME: torch.ones(2, 3),
        f"{NAME}.anchor_A": torch.ones(1, 3).to(torch.float8_e5m2),
        f"{NAME}.anchor_B": torch.ones(2, 1).to(torch.float8_e5m2),
    }
    refused(Importance.load, stored(tensors), match="recorded adapter of")


BOMB = "a0: &a0 [x, x]\n" + "\n".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)
)
MERGES = "a0: &a0 {k: v}\n" + "\n".join(
    f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}" for i in range(1, 12)
)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("a: !!python/object/apply:os.mkdir ['ran']", "tag"),
        ("a: !!python/name:os.system", "tag"),
        ("a: !!timestamp x", "tag"),
        ("a: !!bool x", "tag"),
        (BOMB, "more than 100000 values"),
        (MERGES, "more than 100000 values"),
        ("a: &b [*b]", "stands inside"),
        ("a: *b", "undefined alias"),
        ("a: " + "[" * 2000, "nested deeper"),
        ("{a: " * 2000, "nested deeper"),
        ("a: 2026-99-99", "month"),
        ("a: 0b_", "invalid literal"),
        ("a: 0x" + "f" * 5000, "64 bits"),
        ("a: " + "9" * 5000, "64 bits"),
        ('a: "\\e[2J"', "control character"),
        ('a: "\\u202e"', "control character"),
        ("a: \x1b[2J", "special characters"),
        ("a: [1", "line"),
        ("3: x", "mapping of options"),
        ("- x", "found list"),
        ("a: 'x\n", "line"),
        ("x" * (1 << 21), "at most"),
    ],
)
def test_yaml_that_is_more_than_plain_data_is_refused(tmp_path, monkeypatch, text, why):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(OptionError, match=why) as caught:
        read_yaml("c.yaml")
    assert not UNSAFE.search(str(caught.value)) and not Path("ran").exists()


def test_aliases_within_reason_are_read():
    assert load_yaml("a: &a {x: [1, 2]}\nb: *a\nc: {<<: *a, y: 3}") == {
        "a": {"x": [1, 2]},
        "b": {"x": [1, 2]},
        "c": {"x": [1, 2], "y": 3},
    }


@pytest.mark.parametrize(
    "line",
    [
        "methods: [plain]",
        "methods: {plain: 3}",
        "general: 3",
        "domains: {a: {data: [x]}}",
        "domains: {a: 3}",
        "importance: [a]",
        "training: x",
        "scales: 3",
        "scales: [a]",
        "scales: [.inf]",
        "seeds: {test: 3}",
        "seeds: {test: [a]}",
        "seeds: 3",
        "limit: {test: -1}",
        "characters: x",
        "characters: true",
        "sequences: [a]",
        "sequences: {a: {domains: [medicine, b], methods: {plain: 3}}}",
        "methods: {plain: {grid: {learning_rate: []}}}",
        "methods: {plain: {grid: 3}}",
        "model: {a: 1}",
        "base: " + "x" * 5000,
        "methods: {plain: {learning_rate: .inf}}",
        "methods: {plain: {batch_size: .inf}}",
        "base: /dev/zero",
        "quantize: [5bit, x]",
        "methods: {plain: {importance: [a]}}",
        "methods: {plain: {grid: {"
        + ", ".join(f"{k}: [{', '.join(['1'] * 99)}]" for k in ("rank", "alpha", "epochs"))
        + "}}}",
    ],
)
def test_experiments_with_other_types_are_refused(experiment, line):
    key = line.partition(":")[0]
    kept = "\n".join(one for one in EXPERIMENT.splitlines() if not one.startswith(key))
    with pytest.raises(OptionError) as caught:
        experiment(f"{kept}\n{line}\n")
    assert not UNSAFE.search(str(caught.value))


def test_null_as_the_preset_is_the_default_preset():

    assert resolve(TuneOptions, {"preset": None, "data": "x"}).rank == 8
    with pytest.raises(OptionError, match="expects int, found inf"):
        resolve(TuneOptions, {"rank": float("inf")})


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("a.jsonl", "[" * 100_000, "line 1: not valid JSON"),
        ("a.jsonl", '{"text": "\\ud800"}', "half a surrogate"),
        ("a.jsonl", "{" + ESCAPE, "not valid JSON"),
        ("a.jsonl", json.dumps({ESCAPE: 1}), "has the columns"),
        ("a.jsonl", '{"text": ' + "9" * 5000 + "}", "holds float"),
        ("a.json", "[" * 100_000, "not valid JSON"),
        ("a.csv", "text\n" + "x" * 200_000, "not valid CSV"),
        ("a.parquet", "PAR1" + ESCAPE, "not a readable parquet file"),
        (
            "a.jsonl",
            json.dumps({"messages": [{"role": ESCAPE, "content": 3}]}),
            "expected chat turns",
        ),
    ],
)
def test_data_that_is_no_text_is_refused(tmp_path, name, content, why):
    (tmp_path / name).write_text(content)
    refused(load_documents, str(tmp_path / name), match=why)
    refused(load_training_data, str(tmp_path / name))


@pytest.mark.parametrize("label", [[], {}, None, "x", 2, -1, 1e999])
def test_an_answer_that_is_no_number_is_refused(tmp_path, label):
    (tmp_path / "p.jsonl").write_text(
        json.dumps({"goal": "g", "sol1": "a", "sol2": "b", "label": label})
    )
    refused(load_training_data, f"piqa={tmp_path / 'p.jsonl'}")


def test_turns_of_different_types_are_each_what_the_file_says(tmp_path):
    turns = [{"role": "user", "content": "a", "extra": extra} for extra in (1, {"b": 2})]
    (tmp_path / "c.jsonl").write_text("\n".join(json.dumps({"messages": [turn]}) for turn in turns))
    rows = load_training_data(str(tmp_path / "c.jsonl"))
    assert [row["messages"][0]["extra"] for row in rows] == [1, {"b": 2}]


def test_a_small_parquet_file_that_claims_a_billion_rows_is_refused(tmp_path, monkeypatch):
    import pyarrow
    import pyarrow.parquet as parquet

    monkeypatch.setattr("forgetless.data.parquet.MOST_VALUES", 99)
    parquet.write_table(pyarrow.table({"text": ["same"] * 100}), tmp_path / "t.parquet")
    refused(
        load_documents, str(tmp_path / "t.parquet"), match="claims to hold 100 values in 100 rows"
    )


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("runs", [{}]),
        ("runs", {"a": 1}),
        ("methods", [{"label": "x"}]),
        ("methods", [3]),
        ("samples", [[]]),
        ("verdict", "x"),
        ("importance", [{"weights": [{"norm": "x"}]}]),
        ("equal_learning", {"sciq": {"wiki": 0.5}}),
        ("created", 3),
        ("frontier", {"sciq": {"wiki": {"plain": []}}}),
        ("differences", [3]),
        ("noise", {"a": {"forgetting": 0.5}}),
        ("sequences", [[1]]),
        ("texts", {}),
        ("progress", 3),
        ("notes", 3),
        ("settings", [1]),
        ("environment", {"versions": 3}),
    ],
)
def test_comparisons_of_another_shape_are_refused(tmp_path, key, value):
    (tmp_path / "compare.json").write_text(json.dumps({**comparison(), key: value}))
    refused(load_contents, tmp_path, match=f"compare.json.*{key}")


@pytest.mark.parametrize(
    "change",
    [
        {"before": {"general": 3}},
        {"method": 3},
        {"method": [None]},
        {"configuration": []},
        {"log": [3]},
        {"learning": {"nats": "x"}},
        {"moved": [[]]},
    ],
)
def test_runs_of_another_shape_are_refused(tmp_path, change):
    (tmp_path / "run.json").write_text(json.dumps({"configuration": {}, "before": {}, **change}))
    refused(load_contents, tmp_path, match="run.json")


def test_control_characters_of_a_comparison_are_not_shown(tmp_path):
    (tmp_path / "compare.json").write_text(
        json.dumps({**comparison(), "title": ESCAPE, "verdict": [ESCAPE]})
    )
    assert "\x1b" not in markdown(load_contents(tmp_path))


def test_json_that_nests_without_end_is_refused(tmp_path):
    for text in (
        "[" * 100_000,
        json.dumps({"a": 1})[:-1] + ', "b": ' + "[" * (DEPTH + 5) + "]" * (DEPTH + 5) + "}",
    ):
        (tmp_path / "compare.json").write_text(text)
        refused(load_contents, tmp_path, match="nested deeper")


@pytest.fixture
def adapter(tiny, tmp_path):
    """The folder of a LoRA adapter of the tiny model."""
    from peft import LoraConfig, get_peft_model

    get_peft_model(
        tiny(), LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    ).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"r": 10**9}, "r is 1000000000, but no tensor"),
        ({"rank_pattern": {"q_proj": 10**9}}, "rank_pattern is 1000000000"),
        ({"r": -1}, "r is -1"),
        ({"target_modules": r"([\w.]+)+!"}, "takes more than"),
        ({"target_modules": ".*" * 30 + "!"}, "takes more than"),
        ({"target_modules": "a" * 2001}, "has 2001 letters"),
        ({"target_modules": "("}, "not a regular expression"),
        ({"rank_pattern": {r"(\w+|[\w.]+)*!": 1}}, "takes more than"),
        ({"target_modules": 3}, "expected names"),
        ({"layer_replication": [[0, 10**6]]}, "layer_replication"),
        ({"megatron_config": {"a": 1}, "megatron_core": "os"}, "megatron_config"),
        ({"peft_type": "PROMPT_TUNING"}, "peft_type is 'PROMPT_TUNING'"),
        ({"peft_type": ESCAPE}, "peft_type is"),
        ({"peft_type": ["LORA"]}, "peft_type is list"),
        ({"lora_alpha": 1e999}, "expected a number"),
        ({"lora_alpha": None}, "null"),
        ({"base_model_name_or_path": 3}, "expected a name"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
        ({"bias": ESCAPE}, "does not fit"),
        ({"lora_alpha": [1]}, "lora_alpha is a list"),
        ({"lora_alpha": "1"}, "lora_alpha is a str"),
        ({"init_lora_weights": "pissa_niter_9999999999"}, "iterations"),
        (
            {"peft_type": "OFT", "oft_block_size": 2, "num_cayley_neumann_terms": 10**9},
            "num_cayley_neumann_terms is 1e",
        ),
    ],
)
def test_adapters_that_ask_for_more_than_their_tensors_are_refused(
    tiny, adapter, change, why, monkeypatch
):
    monkeypatch.setattr(adapter_patterns, "LONGEST_MATCHING", 0.6)
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    refused(with_adapter, tiny(), adapter, match=why)


def test_an_adapter_without_all_of_its_tensors_is_refused(tiny, adapter):
    assert with_adapter(tiny(), adapter) is not None
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file(dict(list(tensors.items())[1:]), adapter / "adapter_model.safetensors")
    refused(with_adapter, tiny(), adapter, match="lacks tensors of the adapter")
    (adapter / "adapter_model.safetensors").write_bytes(b"half")
    refused(checked_adapter, adapter, match="not a whole safetensors file")


def test_no_pickle_is_opened_in_an_adapter(tiny, adapter, tmp_path):
    (adapter / "adapter_model.safetensors").unlink()
    (adapter / "adapter_model.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    refused(with_adapter, tiny(), adapter, match="only safetensors are read")
    assert not (tmp_path / "ran").exists()


def test_no_pickle_is_opened_in_importance_or_data(tmp_path):
    for name in ("i.safetensors", "d.jsonl", "d.parquet", "d.json"):
        (tmp_path / name).write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
        refused(Importance.load if name.startswith("i") else load_documents, str(tmp_path / name))
        torch.save(Bomb(tmp_path / "ran"), tmp_path / name)
        refused(Importance.load if name.startswith("i") else load_documents, str(tmp_path / name))
    assert not (tmp_path / "ran").exists()


def test_a_state_of_record_runs_no_code(model_folder, text_file, tmp_path, capsys):
    words = [
        "record",
        str(model_folder),
        "--general",
        str(text_file),
        "--out",
        str(tmp_path / "i.safetensors"),
        "--estimator",
        "path",
        "--resume",
        "--device",
        "cpu",
    ]
    for state, why in (
        (Bomb(tmp_path / "ran"), "is not a whole saved state"),
        ({"options": 3}, "is not a saved state"),
        ([1], "is not a saved state"),
    ):
        torch.save(state, tmp_path / "i.safetensors.state")
        assert cli.main([*words, "--max-steps", "1"]) == 1 and why in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"]
)
def test_a_checkpoint_of_tune_runs_no_code(model_folder, text_file, tmp_path, capsys, name):
    words = [
        "tune",
        str(model_folder),
        "--data",
        str(text_file),
        "--out",
        str(tmp_path / "run"),
        "--device",
        "cpu",
        "--rank",
        "2",
        "--batch-size",
        "4",
        "--accumulation",
        "1",
        "--save-steps",
        "1",
        "--quiet",
    ]
    words = unheld(words)
    assert cli.main([*words, "--max-steps", "1"]) == 0
    (tmp_path / "run" / "run.json").unlink()
    checkpoint = tmp_path / "run" / "checkpoints" / "checkpoint-1"
    assert (checkpoint / name).is_file()
    torch.save(Bomb(tmp_path / "ran"), checkpoint / name)
    cli.main([*words, "--max-steps", "2", "--resume"])  # refused, or not read at all
    assert not (tmp_path / "ran").exists()


def test_code_of_a_model_runs_only_where_asked(model_folder, tmp_path, capsys):
    config = json.loads((model_folder / "config.json").read_text())
    code = (
        f"import os\nos.mkdir({str(tmp_path / 'ran')!r})\nfrom transformers import "
        "LlamaConfig as C, LlamaForCausalLM as M\n"
    )
    (model_folder / "theirs.py").write_text(code)
    (model_folder / "config.json").write_text(
        json.dumps(
            {
                **config,
                "model_type": "theirs",
                "auto_map": {"AutoConfig": "theirs.C", "AutoModelForCausalLM": "theirs.M"},
            }
        )
    )
    text = tmp_path / "t.txt"
    text.write_text("the cat\n\nsat on")
    assert cli.main(["eval", str(model_folder), "--general", str(text), "--device", "cpu"]) == 1
    assert not (tmp_path / "ran").exists() and "cannot load" in capsys.readouterr().err
    assert ModelOptions().trust_remote_code is False


def test_no_source_opens_a_pickle_or_trusts_code_by_itself():
    for path in (ROOT / "src").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert not any(
            word in text
            for word in (
                "import pickle",
                "allow_pickle",
                "yaml.load(text)",
                "yaml.unsafe",
                "np.load",
                "trust_remote_code=True",
                "eval(compile",
            )
        )
        assert text.count("torch.load(") == text.count("weights_only=True"), path


def test_factored_entries_of_some_rows_are_those_of_all():
    entry = FactoredEntry(torch.rand(5, 2), torch.rand(4, 2))
    assert torch.allclose(entry.rows(slice(1, 5, 2)), entry.dense()[1:5:2])
