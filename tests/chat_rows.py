"""Chats with tools, and a tokenizer for which every template's words are text."""

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather in a town",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "description": "The town"},
                    "days": {"type": "integer", "description": "How many"},
                },
                "required": ["city"],
            },
        },
    }
]


def bytes_tokenizer(template=None):
    """A byte-level tokenizer without merges: a token is a byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<pad>", "<s>", "</s>", *alphabet]
    inner = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    tokenizer.chat_template = template
    return tokenizer


def templates():
    """Name -> each chat template that TRL ships."""
    import trl

    folder = Path(trl.__file__).parent / "chat_templates"
    return {path.stem: path.read_text() for path in sorted(folder.glob("*.jinja"))}


def call(name, arguments, number=1):
    function = {"name": name, "arguments": arguments}
    return {"id": f"abcdefgh{number}", "type": "function", "function": function}


def asked(content="", *, several=False, **assistant):
    """A chat in which the assistant calls a tool, or two at once, and answers by the result."""
    calls = [call("weather", {"city": "Ulm", "days": 3})]
    results = [("weather", '{"rain": true}')]
    if several:
        calls.append(call("weather", {"city": "Köln"}, 2))
        results.append(("weather", "dry"))
    return [
        {"role": "user", "content": "weather in Ulm?"},
        {"role": "assistant", "content": content, "tool_calls": calls, **assistant},
        *(
            {"role": "tool", "content": said, "name": name, "tool_call_id": f"abcdefgh{number}"}
            for number, (name, said) in enumerate(results, 1)
        ),
        {"role": "assistant", "content": "It rains."},
    ]


def scored_text(tokenizer, encoded):
    ids, scored = encoded
    return tokenizer.decode([i for i, counts in zip(ids, scored, strict=True) if counts])


def lines(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return str(path)
