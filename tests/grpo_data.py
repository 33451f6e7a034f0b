"""Which tiny recipe of GRPO and RLOO do several test files share?"""

from pathlib import Path
from typing import Any

import yaml

from ppo_data import write_ppo_recipe


def write_grpo_recipe(folder: Path, *, algorithm: str = "grpo", **sections: Any) -> str:
    """A recipe for the tiny GLM on a CPU, three rollouts of 4 x 4 answers, beta 0.1; its path."""
    path = Path(write_ppo_recipe(folder, **sections))
    tree = yaml.safe_load(path.read_text("utf-8"))
    for section in ("kl", "ppo"):
        del tree[section]
    tree["grpo"] = {"algorithm": algorithm, **tree.get("grpo", {})}
    tree["trl"] = {"beta": 0.1, **tree.get("trl", {})}
    path.write_text(yaml.safe_dump(tree, allow_unicode=True, sort_keys=False), "utf-8")
    return str(path)
