"""Schedule-free optimizers train one set of weights and hand out another, their average."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def averaged_weights(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Put the averaged weights into the model while sampling, validating or saving a model; a no-op for other optimizers.

    The switch back would round, so the training weights are kept in main memory meanwhile: looking at the average changes nothing.
    A training state is saved outside of it: the training weights and the optimizer's state together continue a run exactly.

    Args:
        optimizer: as `make_optimizer` gives it, or wrapped by accelerate.
    """
    to_eval, to_train = getattr(optimizer, "eval", None), getattr(optimizer, "train", None)
    if not callable(to_eval) or not callable(to_train):
        yield
        return
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    kept = [parameter.detach().to("cpu", copy=True) for parameter in parameters]
    to_eval()
    try:
        yield
    finally:
        to_train()
        with torch.no_grad():
            for parameter, weights in zip(parameters, kept, strict=True):
                parameter.copy_(weights)
