"""Merging: what the merged model says is what base and adapter said, by the adapter's tokenizer,
also where an adapter trains one end of tied embeddings, or where the base lies elsewhere.
"""

import copy
import json
import logging
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from conftest import CONFIGS, PLAIN, SMALL, move_adapter, save_tiny, tiny_model, words_tokenizer
from forgetless.cli import main
from forgetless.model.adapter_files import with_adapter
from forgetless.tune.merge import merge

IDS = torch.arange(3, 30)[None]


def said_by(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


def adapter_on(folder, out, *, model=None, **config):
    """An adapter with an update, saved to a folder; what base and adapter say."""
    base = model or AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(1)
    adapted = get_peft_model(
        base, LoraConfig(r=2, task_type="CAUSAL_LM", **{"target_modules": ["q_proj"], **config})
    )
    move_adapter(adapted)
    adapted.save_pretrained(out)
    return said_by(adapted)


@pytest.fixture
def tied_folder(tmp_path):
    """A tiny model with tied embeddings, and its tokenizer."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SMALL, tie_word_embeddings=True))
    model.save_pretrained(tmp_path / "tied")
    words_tokenizer().save_pretrained(tmp_path / "tied")
    return tmp_path / "tied"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens"]},
        {"target_modules": ["lm_head"], "ensure_weight_tying": True},
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        {"trainable_token_indices": [5, 6]},
    ],
)
def test_tied_embeddings_are_taken_apart_where_one_end_is_trained(tied_folder, tmp_path, config):
    """The update of the head went into the embeddings too: half of what the adapter does was off.

    PEFT warns of it, and merges all the same.
    """
    said = adapter_on(tied_folder, tmp_path / "adapter", **config)
    merge(str(tmp_path / "adapter"), str(tmp_path / "merged"))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(said_by(plain), said, atol=1e-5, rtol=1e-5)


def test_the_tokenizer_beside_the_adapter_is_the_merged_models(model_folder, tmp_path, caplog):
    """The base's was taken: a chat template and an end of a turn were lost without a word."""
    adapter_on(model_folder, tmp_path / "adapter")
    own = words_tokenizer()
    own.chat_template, own.eos_token = PLAIN, "."
    own.save_pretrained(tmp_path / "adapter")
    with caplog.at_level(logging.INFO, "forgetless"):
        merge(str(tmp_path / "adapter"), str(tmp_path / "merged"))
    assert "its chat template, its eos_token (., not </s>)" in caplog.text
    merged = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert merged.chat_template == PLAIN and merged.eos_token == "."
    ends = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").generation_config.eos_token_id
    assert ends == [own.eos_token_id, 2]


def test_a_run_stands_for_what_it_made_and_another_base_can_be_named(
    model_folder, tmp_path, capsys
):
    """`merge run` was no adapter, and of a base that was moved nothing could be merged."""
    said = adapter_on(model_folder, tmp_path / "run" / "final")
    shutil.move(model_folder, tmp_path / "elsewhere")
    words = ["merge", str(tmp_path / "run"), "--out", str(tmp_path / "merged"), "--quiet"]
    assert main(words) == 1
    assert "--model MODEL" in capsys.readouterr().err
    assert not (tmp_path / "merged").exists()
    assert main([*words, "--model", str(tmp_path / "elsewhere")]) == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(said_by(merged), said, atol=1e-5, rtol=1e-5)


def test_another_model_than_the_adapters_is_refused(model_folder, tmp_path):
    adapter_on(model_folder, tmp_path / "adapter")
    other = AutoModelForCausalLM.from_config(CONFIGS["gpt2"])
    other.save_pretrained(tmp_path / "gpt2")
    with pytest.raises(ValueError, match="was trained on another model"):
        merge(str(tmp_path / "adapter"), str(tmp_path / "merged"), model=str(tmp_path / "gpt2"))
    assert not (tmp_path / "merged").exists()


def test_embeddings_with_more_rows_come_with_the_adapter(model_folder, tmp_path):
    """Tokens were added, and the tables trained whole: PEFT has no place for them on the base."""
    base = tiny_model()
    base.config = copy.deepcopy(base.config)  # those of all tests are one
    base.config._name_or_path = str(model_folder)
    base.resize_token_embeddings(50, mean_resizing=False)
    modules = ["embed_tokens", "lm_head"]
    said = adapter_on(model_folder, tmp_path / "adapter", model=base, modules_to_save=modules)
    adapted = with_adapter(AutoModelForCausalLM.from_pretrained(model_folder), tmp_path / "adapter")
    torch.testing.assert_close(said_by(adapted), said)
    merge(str(tmp_path / "adapter"), str(tmp_path / "merged"), model=str(model_folder))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(said_by(merged), said, atol=1e-5, rtol=1e-5)


def test_a_base_stored_in_few_bits_is_written_out(tmp_path, caplog):
    """It failed without a reason, and left an empty folder."""
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    folder = save_tiny(tmp_path / "small")
    stored = AutoModelForCausalLM.from_pretrained(
        folder,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
        ),
        device_map={"": "cpu"},
    )
    stored.save_pretrained(tmp_path / "stored")
    words_tokenizer().save_pretrained(tmp_path / "stored")
    said = adapter_on(tmp_path / "stored", tmp_path / "adapter", model=stored)
    config = tmp_path / "adapter" / "adapter_config.json"
    named = {**json.loads(config.read_text()), "base_model_name_or_path": str(tmp_path / "stored")}
    config.write_text(json.dumps(named))
    merge(str(tmp_path / "adapter"), str(tmp_path / "merged"))
    assert "is stored in few bits: the merged model has these weights written out" in caplog.text
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(said_by(merged), said, atol=1e-3, rtol=1e-3)
    merge(str(tmp_path / "adapter"), str(tmp_path / "full"), model=str(folder))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "full").dtype == torch.float32
