"""Is what a first answer does not need left out of its imports, and is it there for whoever asks for it later?"""

import importlib
import json
import os
import subprocess
import sys

import pytest

from gmask.cli import startup

FORBIDDEN = (
    "accelerate", "datasets", "pandas", "peft", "scipy", "sklearn", "sympy", "torch._dynamo", "torch._inductor",
    "torch.distributed.checkpoint", "torch.distributed.fsdp", "torch.distributed.tensor",
)  # fmt: skip
ALLOWED = {"torch._dynamo._trace_wrapped_higher_order_op"}  # a file of its own, without the compiler
VERBS = {
    "infill": ["The old man took his [MASK]."],
    "score": ["It is [MASK] today.", "--answers", "sunny|rainy"],
    "embed": ["A text."],
    "chat": ["Hello", "--max-tokens", "2"],
}


def run_python(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=600, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


@pytest.mark.parametrize("verb", VERBS)
def test_a_first_answer_imports_neither_compiler_nor_training_nor_several_devices(verb: str) -> None:
    loaded = run_python(
        f"import json, sys; sys.argv = ['gmask', *{[verb, *VERBS[verb]]!r}]\n"
        "from gmask.cli import main\n"
        "try: main()\n"
        "except SystemExit as ended: assert not ended.code\n"
        "print(json.dumps([name for name, module in sys.modules.items() if module is not None]))"
    )
    modules = set(json.loads(loaded)) - ALLOWED
    assert "gmask.models.glm" in modules
    assert {name for name in modules if name.startswith(tuple(f"{root}." for root in FORBIDDEN))} == set()
    assert modules.isdisjoint(FORBIDDEN)
    assert len([name for name in modules if name.startswith("transformers.models.")]) < 10


def test_what_was_left_out_is_there_for_who_asks_later() -> None:
    told = run_python(
        "import sys\n"
        "from gmask.cli.startup import DeferredModule, quick_start\n"
        "with quick_start():\n"
        "    import gmask, transformers\n"
        "    model, tokenizer = gmask.load('bundled')\n"
        "assert isinstance(sys.modules['transformers'], DeferredModule)\n"
        "import scipy.optimize, accelerate, torch._dynamo, torch.distributed.tensor\n"
        "assert not isinstance(torch._dynamo, DeferredModule) and torch._dynamo.config.verbose is False\n"
        "assert torch.distributed.is_available()\n"
        "from transformers import BertConfig, BertModel\n"  # names that the stand-in does not know
        "assert not isinstance(sys.modules['transformers'], DeferredModule)\n"
        "assert transformers.BertModel is BertModel and isinstance(model, transformers.PreTrainedModel)\n"
        "assert transformers.GLMForConditionalGeneration is type(model)\n"
        "assert type(transformers.AutoConfig.for_model('glm_blank')) is type(model.config)\n"
        "compiled = torch.compile(lambda x: x + 1, backend='eager')(torch.ones(2))\n"
        "shape = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)\n"
        "small = BertModel(BertConfig(**shape))\n"
        "ids = tokenizer('It is [MASK] today.', return_tensors='pt').input_ids\n"
        "ids = torch.nn.functional.pad(ids, (0, 1), value=model.config.sop_token_id)\n"
        "assert small(torch.ones(1, 2, dtype=torch.long)).last_hidden_state.shape == (1, 2, 8)\n"
        "print(compiled.sum().item(), model.generate(ids, max_new_tokens=2).shape[1] > ids.shape[1])"
    )
    assert told == "4.0 True"


@pytest.mark.parametrize(
    ("prepare", "environment"),
    [("import transformers", {}), ("", {"WORLD_SIZE": "2"}), ("startup.VERSIONS = '4.'", {})],
    ids=["transformers is there", "one of several processes", "another version"],
)
def test_elsewhere_imports_are_as_usual(prepare: str, environment: dict[str, str]) -> None:
    told = run_python(
        f"import sys\nfrom gmask.cli import startup\n{prepare}\n"
        "with startup.quick_start():\n"
        "    import transformers.modeling_utils, gmask.models.glm\n"
        "print({'accelerate', 'scipy', 'torch._dynamo', 'torch.distributed.tensor'} <= {*sys.modules})",
        **environment,
    )
    assert told == "True"


@pytest.mark.parametrize("name", startup.TRANSFORMERS)
def test_names_of_transformers_are_where_the_table_says(name: str) -> None:
    import transformers

    assert getattr(importlib.import_module(startup.TRANSFORMERS[name]), name) is getattr(transformers, name)
