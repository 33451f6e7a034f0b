"""One of several processes that pretrain, to which something happens. Started by test_pretrain_faults.py.

    torchrun ... pretrain_fault_worker.py FAULT RECIPE OVERRIDE ...

FAULT is what happens to process 1 in step 5 of its first start: `none`, `killed`, `hangs`, or `full`, when its files
cannot grow any more.
"""

import os
import resource
import signal
import sys
import time
from typing import Any

import torch

from gmask.cli import main
from gmask.training.pretrain import Pretraining

STEPS_BEFORE = 4


def befall(fault: str) -> None:
    if fault == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    elif fault == "hangs":
        time.sleep(600)
    elif fault == "full":
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


if __name__ == "__main__":
    torch.set_num_threads(1)
    fault, *arguments = sys.argv[1:]
    loss = Pretraining.loss

    def loss_or_fault(run: Pretraining, model: Any, batch: Any) -> Any:
        is_first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
        if is_first and os.environ["RANK"] == "1" and run.loop.progress.step == STEPS_BEFORE:
            befall(fault)
        return loss(run, model, batch)

    Pretraining.loss = loss_or_fault  # type: ignore[method-assign]
    sys.argv = ["gmask", "pretrain", *arguments]
    main()
