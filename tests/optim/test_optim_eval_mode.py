import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from library.optim.eval_mode import averaged_weights
from library.optim.optimizers import make_optimizer
from library.optim.parameter_steps import load_optimizer_state
from library.options.groups.optimizer import OptimizerOptions


def trained(name, size=8):
    weight = torch.nn.Parameter(torch.ones(size))
    optimizer = make_optimizer(OptimizerOptions(optimizer_type=name, learning_rate=0.1), [{"params": [weight]}])
    for seed in range(8):  # RAdam moves nothing in its first five updates
        weight.grad = torch.randn(size, generator=torch.Generator().manual_seed(seed))
        optimizer.step()
    return weight, optimizer


@pytest.mark.parametrize("name", ["AdamWScheduleFree", "RAdamScheduleFree", "SGDScheduleFree"])
def test_schedule_free_weights_are_averaged_inside_and_training_weights_after(name):
    pytest.importorskip("schedulefree")
    weight, optimizer = trained(name, size=4096)  # so many that some of them are rounded by the way there and back
    training = weight.detach().clone()
    with averaged_weights(optimizer):
        assert not torch.allclose(weight, training)
        assert not optimizer.param_groups[0]["train_mode"]
    assert torch.equal(weight.detach(), training)  # exactly: looking changes nothing
    assert optimizer.param_groups[0]["train_mode"]


def test_the_average_is_that_of_the_schedule_free_paper():
    """The average is the equally weighted mean of the iterates of plain SGD (Defazio et al. 2024, equation 4, constant rate)."""
    pytest.importorskip("schedulefree")
    weight = torch.nn.Parameter(torch.ones(8, dtype=torch.float64))
    optimizer = make_optimizer(OptimizerOptions(optimizer_type="SGDScheduleFree", learning_rate=0.1), [{"params": [weight]}])
    z, iterates = torch.ones(8, dtype=torch.float64), []
    for seed in range(5):
        gradient = torch.randn(8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        z = z - 0.1 * gradient
        iterates.append(z)
        weight.grad = gradient
        optimizer.step()
    with averaged_weights(optimizer):
        torch.testing.assert_close(weight.detach(), torch.stack(iterates).mean(0))


def test_a_state_saved_in_evaluation_mode_continues_from_the_training_weights():
    """sd-scripts saves states so."""
    pytest.importorskip("schedulefree")
    weight, optimizer = trained("AdamWScheduleFree")
    training = weight.detach().clone()
    optimizer.eval()
    other, resumed = trained("AdamWScheduleFree")
    other.data.copy_(weight.data)
    load_optimizer_state(resumed, optimizer.state_dict())
    assert resumed.param_groups[0]["train_mode"]
    torch.testing.assert_close(other.detach(), training)
    assert not torch.allclose(other, weight)
    other.grad = torch.ones(8)
    resumed.step()  # raises in evaluation mode


def test_training_mode_comes_back_when_sampling_fails():
    pytest.importorskip("schedulefree")
    _, optimizer = trained("AdamWScheduleFree")
    with pytest.raises(RuntimeError), averaged_weights(optimizer):
        raise RuntimeError
    assert optimizer.param_groups[0]["train_mode"]


def test_optimizers_without_an_average_are_left_alone():
    weight, optimizer = trained("AdamW")
    before = weight.detach().clone()
    with averaged_weights(optimizer):
        assert torch.equal(weight, before)


@pytest.fixture
def accelerator():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)


def test_an_optimizer_wrapped_by_accelerate_is_switched_too(accelerator):
    pytest.importorskip("schedulefree")
    weight, optimizer = trained("AdamWScheduleFree")
    training = weight.detach().clone()
    with averaged_weights(accelerator.prepare(optimizer)):
        assert not torch.allclose(weight, training)
