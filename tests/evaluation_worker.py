"""Which evaluation does one of several processes take part in, or one that is killed? See test_evaluate_resume.py.

[torchrun ...] evaluation_worker.py MODEL TASK DATA OUT [SECONDS that each batch takes longer]
"""

import sys
import time
from typing import Any

import torch

from gmask.evaluation import harness
from gmask.generation.predict import Predictor

if __name__ == "__main__":
    torch.set_num_threads(1)
    model, task, data, out, *delay = sys.argv[1:]
    answer = Predictor.answer

    def answer_slowly(self: Predictor, *arguments: Any) -> Any:
        time.sleep(float(delay[0]) if delay else 0.0)
        return answer(self, *arguments)

    Predictor.answer = answer_slowly  # type: ignore[method-assign]
    harness.run_tasks(model, tasks=[task], data=data, out=out, batch_size=4, device="cpu", tables=False)
