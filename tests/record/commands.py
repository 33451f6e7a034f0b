"""Which commands are recorded, with all that they print and write?

A group is a list of commands that run in turn in one folder, so that a later one may read what an earlier one wrote.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from record.session import Session

TEXT = "The [MASK] dog [MASK]."
HOUSE = "The old man took his [MASK] and went down to the [MASK]."
STORY = "Once upon a time there was a [MASK]. [gMASK]"
LAW = "中华人民共和国[MASK]法，由[MASK]公布。"


class Command(NamedTuple):
    line: str
    stdin: str = ""
    writes: tuple[str, ...] = ()  # files whose content is recorded too


C = Command

INFILL = [
    C(f'infill "{HOUSE}" "{LAW}" --json'),
    C(f'infill "{HOUSE}" "{LAW}"'),
    C(f'infill "{STORY}" --json --max-tokens 20'),
    C(f'infill "{STORY}" "{HOUSE}" --max-tokens 1'),
    C('infill "He said: [sMASK] Then he left." --json --max-tokens 12'),
    C("infill --json --max-tokens 6", f"{HOUSE}\n\n{LAW}\n"),
    C(f'infill "{HOUSE}" -n 3'),
    C(f'infill "{HOUSE}" -n 3 --json --max-tokens 4'),
    C(f'infill "{HOUSE}" --json --set num_beams=4 --max-tokens 5'),
    C(f'infill "{STORY}" --json --set num_beams=3 --set length_penalty=1.0 --max-tokens 10'),
    C(f'infill "{HOUSE}" --json --set temperature=0.8 --set seed=1'),
    C(f'infill "{LAW}" --json --set temperature=0.9 --set top_p=0.8 --set seed=2 -n 2'),
    C(f'infill "{STORY}" --set temperature=1.2 --set top_k=40 --set seed=3 -n 3 --max-tokens 12'),
    C(f'infill "{STORY}" --json --max-tokens 30 --set stop=. '),
    C(f'infill "{STORY}" --max-tokens 30 --set no_repeat_ngram=2'),
    C(f'infill "{HOUSE}" --json --set min_tokens=3 --max-tokens 5'),
    C('infill "It is [MASK] today." --choices "sunny|rainy|cold" --json'),
    C('infill "The [MASK] sat on the [MASK]." --choices "cat|king" --choices "mat|throne" -n 4'),
    C('infill "The [MASK] sat on the [MASK]." --choices "cat|king" --choices "mat|throne" --json'),
    C(r'infill "A \\[MASK] is no [MASK]." --json --max-tokens 4'),
    C("infill --input texts.jsonl --output filled.jsonl --max-tokens 4", writes=("filled.jsonl",)),
    C("infill --input texts.jsonl --output filled.jsonl --max-tokens 4"),
    C("infill --input lines.txt --output lines.jsonl --max-tokens 4 --set temperature=1 --set seed=5",
      writes=("lines.jsonl",)),
    C("infill --input bad.jsonl --output bad-out.jsonl --max-tokens 4"),
    C("infill --input bad.jsonl --output bad-out.jsonl --max-tokens 4 --skip-bad-lines", writes=("bad-out.jsonl",)),
]  # fmt: skip

TINY = [
    C(f'infill "{TEXT}" -m tiny --json --max-tokens 6'),
    C(f'infill "{TEXT}" -m tiny --json --max-tokens 6 --quantize int8'),
    C(f'infill "{TEXT}" -m tiny --json --max-tokens 6 --quantize int4'),
    C(f'infill "{TEXT}" -m tiny --json --max-tokens 6 --adapter lora'),
    C(f'infill "{TEXT}" -m tiny --json --max-tokens 6 --adapter ia3'),
    C(f'infill "{TEXT}" -m tiny --json --set num_beams=6 -n 2 --max-tokens 6'),
    C(f'infill "{TEXT}" -m tiny --set temperature=1.5 --set seed=3 --set top_k=50 -n 2 --max-tokens 6 --json'),
    C('score "The [MASK] dog." --answers "old|small" -m tiny --json'),
    C('score "The [MASK] dog." --answers "old|small" -m tiny --json --adapter lora'),
    C('score "The [MASK] dog." --answers "old|small" -m tiny --json --quantize int8'),
    C('embed "a sunny day" -m tiny'),
    C('embed "a sunny day" "今天天气很好" -m tiny --pooling first --layer 1 --no-normalize'),
    C('embed "a [MASK] day" -m tiny --pooling mask'),
    C('embed "a sunny day" -m tiny --pooling last --layer 0 --adapter lora'),
    C("embed -m tiny --input lines.txt --output vectors.npy", writes=("vectors.npy",)),
    C("embed -m tiny --input texts.jsonl --output vectors.jsonl", writes=("vectors.jsonl",)),
    C('chat "The dog?" "And the river?" -m tiny --max-tokens 6 --set temperature=0'),
    C('chat "The dog?" -m tiny --max-tokens 6 --set seed=4 --set temperature=0.9'),
]

SCORE = [
    C('score "It is [MASK] today." --answers "sunny|rainy" --json'),
    C('score "It is [MASK] today." --answers "sunny|rainy|very cold"'),
    C('score "It is [MASK] today." --answers "sunny|very cold" --normalization mean --json'),
    C('score "It is [MASK] today." --answers "sunny|very cold" --normalization unconditional --json'),
    C('score "今天天气[MASK]，我们去公园。" --answers "好|坏" --json --batch-size 1'),
    C('score --answers "river|house" --json', "He went to the [MASK].\nShe lived in a [MASK].\n"),
    C("score --input labelled.jsonl --output scored.jsonl", writes=("scored.jsonl",)),
]

CHAT = [
    C('chat "What is 2 + 3?" "Say hello." "你好" --set seed=1'),
    C("chat --set temperature=0 --max-tokens 12", "Hello.\n\nWhat is 7 + 1?\n"),
    C('chat "Tell me a story." --set temperature=0.9 --set top_p=0.9 --set seed=7 --max-tokens 16'),
    C('chat "And now?" --load saved.json --set temperature=0 --max-tokens 12'),
    C('chat "a long message that has no room" --context-length 4'),
    C('chat "Hello." --context-length 24 --load saved.json --set temperature=0'),
    C('chat "Hello." -m bundled --max-tokens 8 --set temperature=0'),
]

INFO = [
    C("info --json"),
    C("info"),
    C("info bundled-chat --json"),
    C("info tiny --json"),
    C("info --zoo"),
    C("info --zoo --json"),
    C("info GLM-Large --json"),
    C("info THUDM/glm-10b"),
    *(C(f"info golden/{name} --json") for name in (
        "hf-glm-tiny/model", "hf-glm-10b-tiny/model", "chatglm-tiny/model", "chatglm-tiny-int4/model",
        "chatglm-tiny-int4-qe/model", "chatglm-tiny-int8/model", "chatglm-tiny-l28/model", "thudm-glm-tiny/ckpt",
        "thudm-glm-tiny/ckpt_MP2", "thudm-glm-tiny/ckpt_ds",
    )),
    C("estimate --json"),
    C("estimate tiny --json --context-length 32 --context-length 64 --batch-size 4"),
    C("estimate golden/chatglm-tiny-int4/model --json"),
    C("estimate GLM-10B --json --context-length 512"),
    C("estimate THUDM/chatglm-6b --json --quantize int4 --group-size 64 --dtype float16"),
    C("estimate THUDM/chatglm-6b --json --quantize int8 --embeddings --context-length 100"),
    C("estimate THUDM/chatglm-6b-int4 --json --context-length 2048"),
    C("estimate --method lora --json --set rank=4"),
    C("estimate --method full --json --set optimizer=adafactor --gradient-checkpointing"),
    C("estimate GLM-10B --method full --json --gpus 8 --context-length 512 --batch-size 4"),
    C("estimate THUDM/chatglm-6b --method qlora --json --context-length 512"),
    C("estimate THUDM/chatglm-6b --method p-tuning-v2 --json --context-length 512 --set prefix_length=64"),
]  # fmt: skip

REFUSALS = [
    C(line)
    for line in (
        'infill "no blank"', 'infill "[XMASK]"', 'infill "[MASK]" --set temprature=1', 'infill "[MASK]" --set top_p=0',
        'infill "[MASK]" --set temperature=1 --set num_beams=2', 'infill "[MASK]" -n 2 --set n=2', "infill",
        'infill "[MASK]" --choices "a||b"', 'infill "[MASK]" --choices "a" --choices "b"', 'infill "[MASK]" --input x',
        'infill "[MASK]" -m nowhere', 'infill "[MASK]" --dtype int3', 'infill "[MASK]" --quantize int3',
        'infill "[MASK]" --adapter tiny', 'infill "[MASK]" --max-tokens 0',
        'infill "[MASK]" -m golden/hf-glm-tiny/model',
        'infill "[MASK]" -m golden/thudm-glm-tiny/ckpt', 'score "It is [MASK]."', 'score "no blank" --answers "a|b"',
        'score "[MASK] [MASK]" --answers "a|b"', 'score "[MASK]" --answers "a|b" --normalization max',
        'embed "x" --pooling max', 'embed "x" --layer 99', 'embed "x" --pooling mask', 'chat "x" --max-tokens 9999',
        'chat "x" --load nothing.json', "info nowhere", "info tiny --zoo", "estimate nowhere",
        "estimate --method loras", "estimate --gpus 2", "estimate --group-size 64", "estimate --quantize int5",
        "convert tiny tiny", "convert tiny made --to onnx", "convert tiny made --parts 2", "convert nowhere made",
        "convert tiny made --dtype int8", "convert golden/thudm-glm-tiny/ckpt made",
        "convert golden/thudm-glm-tiny/ckpt made --like GLM-Large --tokenizer tokenizer",
        "convert golden/thudm-glm-tiny/ckpt made --heads 7 --tokenizer tokenizer",
        "convert golden/hf-glm-tiny/model made", "convert golden/chatglm-tiny/model made --to megatron",
        "quantize tiny made --bits 3", "quantize tiny made --group-size 5", "quantize tiny tiny",
        "quantize golden/chatglm-tiny-int4/model made", "merge tiny --adapter nowhere --output made",
        "merge bundled --adapter lora --output made", "merge tiny --adapter lora --output tiny",
        "pretrain no.yaml", "pretrain bad.yaml", "finetune no.yaml", "finetune bad.yaml", "finetune empty.yaml",
        "train-tokenizer no.txt --output made", "train-tokenizer lines.txt --output made --vocab-size 100000",
        "evaluate --tasks superglue/rt --data x", "evaluate --tasks seq2seq/plain", "evaluate --suite superglu",
        "evaluate --tasks superglue/rte --data no.jsonl", "evaluate --adapter lora", "evaluate --recipe no.yaml",
        "evaluate --compare one", "evaluate one two",
        "serve --set max_row=1", "serve --adapter =x", "serve --set max_rows=0", "serve nowhere", "inffill x",
        "infill --sett x", "convert tiny", "",
    )
]  # fmt: skip

GROUPS: dict[str, list[Command]] = {
    "infill": INFILL, "tiny": TINY, "score": SCORE, "chat": CHAT, "info": INFO, "refusals": REFUSALS,
}  # fmt: skip

PUBLISHED = [
    C('chat "你好" "晚上" -m chatglm-tiny --set temperature=0 --max-tokens 8'),
    C('chat "你好" -m chatglm-tiny --set temperature=0.9 --set seed=2 --max-tokens 8'),
    C('chat "你好" -m chatglm-tiny-int4 --set temperature=0 --max-tokens 8'),
    C('chat "你好" -m chatglm-tiny-int8 --set temperature=0 --max-tokens 8'),
    C('chat "你好" -m chatglm-tiny --quantize int8 --set temperature=0 --max-tokens 8'),
    C('chat "你好" -m chatglm-tiny --adapter golden/chatglm-tiny-ptuning/ptuning --set temperature=0 --max-tokens 8'),
    C('chat "你好" -m chatglm-tiny --adapter golden/chatglm-tiny-ptuning-projection/ptuning --set temperature=0'
      ' --max-tokens 8'),
    C('infill "凯旋门位于[MASK]市" -m chatglm-tiny --max-tokens 4'),
    C('infill "凯旋门位于[MASK]市，[gMASK]" -m hf-glm-tiny --json --max-tokens 5'),
    C('infill "凯旋门位于[MASK]市" -m hf-glm-10b-tiny --json --max-tokens 5 --set num_beams=3'),
    C('score "凯旋门位于[MASK]市" --answers "公园|著名" -m hf-glm-tiny --json'),
    C("info chatglm-tiny --json"),
    C("info hf-glm-tiny --json"),
    C("estimate chatglm-tiny --json"),
]  # fmt: skip
"""Those that need the published vocabularies."""


def write_inputs(session: Session) -> None:
    """What the commands read beside the models."""
    session.write("texts.jsonl", [{"text": TEXT}, {"text": "我[MASK]苹果", "id": 7}, {"text": "It was [gMASK]"}])
    session.write("lines.txt", f"{TEXT}\n\nThe river [MASK] cold.\n")
    session.write("bad.jsonl", [{"text": TEXT}, {"txt": "x"}, {"text": "no blank"}, {"text": "我[MASK]"}])
    session.write("labelled.jsonl", [
        {"text": "It is [MASK] today.", "answers": ["sunny", "rainy"], "label": "rainy"},
        {"text": "He went [MASK] the house.", "answers": ["into", "an"], "label": 0},
        {"text": "He was [MASK] old man.", "answers": ["into", "an"]},
    ])  # fmt: skip
    session.write("saved.json", json.dumps({"messages": [
        {"role": "user", "content": "What is 1 + 1?"}, {"role": "assistant", "content": "2"},
    ]}))  # fmt: skip
    session.write("bad.yaml", "run: {outt: x}\n")
    session.write("empty.yaml", "{}\n")


def read_written(path: Path) -> Any:
    """The content of a file that a command wrote."""
    if path.suffix == ".npy":
        array = np.load(path)
        return [str(array.dtype), [[None if np.isnan(x) else float(x) for x in row] for row in array]]
    return parse(path.read_text("utf-8"))


def parse(text: str) -> Any:
    """A text as JSON if it is that; else its lines, each as JSON if it is that."""
    with_values = [_parse_line(line) for line in text.splitlines()]
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return with_values


def _parse_line(line: str) -> Any:
    try:
        return json.loads(line) if line.startswith("{") else line
    except json.JSONDecodeError:
        return line


def run_group(session: Session, commands: list[Command]) -> dict[str, Any]:
    """The outcome of each command, by its line; what stands twice is numbered."""
    found: dict[str, Any] = {}
    for command in commands:
        outcome = session.run(command.line, command.stdin)
        entry: dict[str, Any] = {"exit": outcome.code, "out": parse(outcome.out), "err": outcome.err.splitlines()}
        for name in command.writes:
            path = session.folder / name
            entry[name] = read_written(path) if path.is_file() else None
        line = command.line + (" < " + json.dumps(command.stdin, ensure_ascii=False) if command.stdin else "")
        found[line + " # again" * (line in found)] = entry
    return found
