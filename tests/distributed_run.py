"""Five float64 steps of a method on one global batch, by as many processes as the environment says.

    python tests/distributed_run.py METHOD OUT.safetensors
"""

import os
import sys

import torch
from safetensors.torch import save_file

from wsss_lib import create_model
from wsss_lib.training import distributed
from wsss_lib.training.engine import TrainConfig, train
from wsss_lib.training.objectives import OBJECTIVES

# Labels are made on the way in AFA and GETAM. Their counts differ between the halves of the batch.
OPTIONS = {
    "weaktr": {}, "acr": {}, "segmenter": {"start": 100.0, "patch": 20},
    "afa": {"classify_until": 1, "propagate_from": 3, "scales": (1.0, 1.5), "radius": 2, "num_iter": 2},
    "getam": {"classify_until": 2, "opening": 2, "energy_weight": 1e-3},
}
NETWORK = {"weaktr": {"reduction": 2}, "segmenter": {"dropout": 0.0}}
BATCH, CLASSES = 4, 5


def batch_at(step: int) -> dict:
    """The part of this process of the step's four pictures."""
    generator = torch.Generator().manual_seed(step)
    pixels = torch.randint(0, 256, (BATCH, 3, 32, 48), generator=generator, dtype=torch.uint8)
    labels = torch.zeros(BATCH, CLASSES, dtype=torch.float64)
    labels[range(BATCH), torch.arange(BATCH) % CLASSES] = 1
    labels[0, 3] = 1
    mask = torch.randint(0, 6, (BATCH, 32, 48), generator=generator)
    mask[0] = 255
    box = torch.tensor([[0, 0, 32, 48], [8, 8, 32, 40], [0, 0, 16, 48], [0, 4, 32, 48]])
    batch = {"image": (pixels.double() / 255 - 0.5) / 0.25, "image_uint8": pixels, "labels": labels, "mask": mask, "box": box}
    share = BATCH // distributed.world_size()
    part = slice(distributed.rank() * share, (distributed.rank() + 1) * share)
    return {name: value[part] for name, value in batch.items()}


def main(method: str, out: str) -> None:
    accumulate = 1
    if method == "accumulated":  # the four pictures one by one, or on two processes two by two
        method, accumulate = "weaktr", 4 // int(os.environ.get("WORLD_SIZE", "1"))
    with distributed.processes("cpu"):
        torch.manual_seed(0)
        model = create_model(method, "toyvit", CLASSES, False, **NETWORK.get(method, {})).double()
        for module in model.modules():
            if isinstance(module, (torch.nn.Dropout, torch.nn.Dropout2d)):
                module.p = 0.0  # each process draws its own
        # AdamW divides by the size of a gradient: where that is rounding, so would be the step.
        config = TrainConfig(5, lr=0.1, optimizer="sgd", warmup=0, amp="off", plain_attention=False, log_every=1,
                             accumulate=accumulate)
        # Every process evaluates, else one that asks the others for their share would wait for ever.
        count = lambda model, step: {"agreed": distributed.total_counts(1) / distributed.world_size()}
        objective = OBJECTIVES[method](**OPTIONS[method])
        history = train(model, batch_at, objective, config, progress=False, evaluate=count)
        if distributed.rank() == 0:
            rows = [[v for k, v in row.items() if k != "seconds"] for row in history]
            names = sorted({k for row in history for k in row} - {"seconds"})
            values = torch.tensor([[row.get(k, 0.0) for k in names] for row in history], dtype=torch.float64)
            assert rows
            save_file({**{n: t.contiguous() for n, t in model.state_dict().items()}, "history": values}, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
