"""One of several processes that pretrain. Started by test_pretrain_parallel.py.

    torchrun ... pretrain_worker.py RECIPE JOBS

JOBS is a JSON file: for each job its name and the overrides of its recipe. What a job raised goes to JOBS.NAME.RANK.
"""

import json
import os
import sys
from pathlib import Path

import torch

from gmask.errors import GmaskError
from gmask.training.pretrain import run_pretraining

if __name__ == "__main__":
    torch.set_num_threads(1)
    recipe, jobs = sys.argv[1:]
    for name, overrides in json.loads(Path(jobs).read_text()).items():
        try:
            run_pretraining(recipe, overrides)
        except GmaskError as error:
            Path(f"{jobs}.{name}.{os.environ['RANK']}").write_text(str(error))
