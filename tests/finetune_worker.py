"""Which run does one of several processes take part in? Started by test_finetune_ddp.py.

torchrun ... finetune_worker.py RECIPE [KEY=VALUE...]
"""

import sys

import torch

from gmask.training import finetune

if __name__ == "__main__":
    torch.set_num_threads(1)
    finetune.run_finetuning(sys.argv[1], sys.argv[2:])
