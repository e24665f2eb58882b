"""The loop used in an order that the step does not know is an error that says what to write. One worker, in process."""

import copy
import pickle

import pytest
import torch
from labs import alone
from torch.utils.data import DataLoader, TensorDataset

import raytrain_het as het
from raytrain_het.errors import CheckpointError, ConfigError, LoopOrderError
from raytrain_het.worker.session import current

DATA = TensorDataset(torch.randn(8, 3))


def prepare(model=None, data=DATA, **loader_kwargs):
    model = het.prepare_model(model or torch.nn.Linear(3, 1))
    optimizer = het.prepare_optimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    loader = het.prepare_data_loader(DataLoader(data), **{"global_batch_size": 2, **loader_kwargs})
    return model, optimizer, loader


def step_before_backward(model, optimizer, loader):
    for _ in loader.epochs(1):
        for (x,) in loader:
            model(x)
            optimizer.step()


def two_backwards(model, optimizer, loader):
    for _ in loader.epochs(1):
        for (x,) in loader:
            optimizer.zero_grad()
            model(x).sum().backward()
            model(x).sum().backward()
            optimizer.step()


def no_zero_grad(model, optimizer, loader):
    for _ in loader.epochs(1):
        for (x,) in loader:
            model(x).mean().backward()
            optimizer.step()


def break_out(model, optimizer, loader):
    for _ in loader.epochs(1):
        for (x,) in loader:
            optimizer.zero_grad()
            model(x).sum().backward()
            optimizer.step()
            break


def break_before_step(model, optimizer, loader):
    for _ in loader.epochs(1):
        for (x,) in loader:
            model(x).sum().backward()
            break


def loader_outside_epochs(model, optimizer, loader):
    for _ in loader:
        pass


def loader_after_epochs(model, optimizer, loader):
    good(model, optimizer, loader)
    for _ in loader:
        pass


def epochs_twice(model, optimizer, loader):
    good(model, optimizer, loader)
    good(model, optimizer, loader)


def closure(model, optimizer, loader):
    for _ in loader.epochs(1):
        for (x,) in loader:
            optimizer.zero_grad()
            model(x).sum().backward()
            optimizer.step(lambda: 0.0)


def no_backward(model, optimizer, loader):
    for _ in loader.epochs(1):
        for _ in loader:
            continue


def no_step(model, optimizer, loader):
    for _ in loader.epochs(1):
        for (x,) in loader:
            optimizer.zero_grad()
            model(x).sum().backward()


def step_twice(model, optimizer, loader):
    for _ in loader.epochs(1):
        for (x,) in loader:
            optimizer.zero_grad()
            model(x).sum().backward()
            optimizer.step()
            optimizer.step()


def backward_before_the_loop(model, optimizer, loader):
    model(torch.zeros(1, 3)).sum().backward()


def backward_after_the_loop(model, optimizer, loader):
    good(model, optimizer, loader)
    optimizer.zero_grad()
    model(torch.zeros(1, 3)).sum().backward()


def report_before_epochs(model, optimizer, loader):
    het.report({"loss": 1.0})


def evaluate_before_epochs(model, optimizer, loader):
    het.evaluate(lambda batch: {"n": 1.0}, DATA)


def step_before_epochs(model, optimizer, loader):
    optimizer.step()


def model_twice(model, optimizer, loader):
    het.prepare_model(torch.nn.Linear(2, 2))


def optimizer_twice(model, optimizer, loader):
    het.prepare_optimizer(torch.optim.SGD(model.parameters(), lr=0.1))


def loader_twice(model, optimizer, loader):
    het.prepare_data_loader(DataLoader(DATA), global_batch_size=2)


def state_after_epochs(model, optimizer, loader):
    for _ in loader.epochs(1):
        het.register_state("ema", torch.nn.Linear(1, 1))


def unregistered_scheduler(model, optimizer, loader):
    torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    good(model, optimizer, loader)


def good(model, optimizer, loader):
    for _ in loader.epochs(1):
        for (x,) in loader:
            optimizer.zero_grad()
            model(x).sum().backward()
            optimizer.step()


@pytest.mark.parametrize(
    ("loop", "fix"),
    [
        (step_before_backward, "swap the two lines"),
        (two_backwards, "Add the losses up and call it once"),
        (no_zero_grad, r"call optimizer.zero_grad\(\) before backward\(\)"),
        (break_out, "run it to its end"),
        (break_before_step, "run it to its end|without optimizer.step"),
        (loader_outside_epochs, r"for epoch in loader.epochs\(10\)"),
        (loader_after_epochs, r"for epoch in loader.epochs\(10\)"),
        (epochs_twice, "one loop over epochs"),
        (closure, r"Call backward\(\) yourself, then step\(\)"),
        (no_backward, r"one backward\(\) and one optimizer.step\(\)"),
        (no_step, r"without optimizer.step\(\)"),
        (step_twice, "once each"),
        (backward_before_the_loop, "take a batch from the prepared loader first"),
        (backward_after_the_loop, "take a batch from the prepared loader first"),
        (report_before_epochs, r"before loader.epochs\(\)"),
        (evaluate_before_epochs, r"before loader.epochs\(\)"),
        (step_before_epochs, r"for epoch in loader.epochs\(n\)"),
        (model_twice, "Wrap several in one nn.Module"),
        (optimizer_twice, "in several parameter groups"),
        (loader_twice, "evaluate"),
        (state_after_epochs, r"'ema'.*Call it before loader.epochs\(\)"),
        (unregistered_scheduler, r"register_state\('scheduler', scheduler\) before loader.epochs\(\)"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_a_loop_in_another_order_is_an_error_with_the_fix(tmp_path, loop, fix):
    with pytest.raises(LoopOrderError, match=fix):
        alone(lambda: loop(*prepare()), tmp_path)


def test_forgotten_zero_grad_is_noticed_at_the_next_step_however_many_passes_a_step_has(tmp_path):
    with pytest.raises(LoopOrderError, match=r"'bias' the first.*call optimizer.zero_grad\(\) before backward\(\)"):
        alone(lambda: no_zero_grad(*prepare(global_batch_size=4, micro_batch_size=2)), tmp_path)


def test_a_gradient_scaler_steps_in_every_pass_of_a_step(tmp_path):
    """It insists on gradients wherever it is asked to step."""

    def train():
        model, optimizer, loader = prepare(global_batch_size=8, micro_batch_size=2)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=1)
        het.register_state("scaler", scaler)
        for _ in loader.epochs(3):
            for (x,) in loader:
                optimizer.zero_grad()
                scaler.scale(model(x).square().mean()).backward()
                scaler.step(optimizer)
                scaler.update()
        return scaler.get_scale()

    assert alone(train, tmp_path) == 64.0


def test_the_loop_in_the_right_order_works_here_too(tmp_path):
    def steps():
        model, optimizer, loader = prepare()
        good(model, optimizer, loader)
        return current().worker.engine.cursor.step, len(loader)

    done, wanted = alone(steps, tmp_path)
    assert done == wanted > 0


def test_many_reports_of_one_step_in_the_middle_of_an_epoch_do_not_wait_for_the_next(tmp_path):
    def reports(model, optimizer, loader):
        for _ in loader.epochs(1):
            for (x,) in loader:
                optimizer.zero_grad()
                model(x).sum().backward()
                optimizer.step()
                for number in range(4):
                    het.report({"number": number})
                    told.append(number)
        return len(loader)

    told = []
    num_steps = alone(lambda: reports(*prepare()), tmp_path, acknowledge=True)
    assert told == [0, 1, 2, 3] * num_steps


def test_functions_outside_of_a_training_function_say_so():
    with pytest.raises(LoopOrderError, match=r"HetTrainer\(train_fn"):
        het.prepare_model(torch.nn.Linear(1, 1))


def frozen():
    return torch.nn.Linear(3, 1).requires_grad_(False)


@pytest.mark.parametrize(
    ("kwargs", "num_slots", "text"),
    [
        ({"model": frozen()}, 1, r"no trainable parameters.*requires_grad_\(True\)"),
        ({"data": TensorDataset(torch.zeros(0, 3))}, 1, "is empty"),
        ({}, 3, r"global_batch_size=2 is smaller than the number of workers \(3\)"),
        ({"global_batch_size": 0}, 1, "global_batch_size"),
        ({"micro_batch_size": 0}, 1, "micro_batch_size=0"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_joining(tmp_path, kwargs, num_slots, text):
    with pytest.raises(ConfigError, match=text):
        alone(lambda: prepare(**kwargs), tmp_path, num_slots=num_slots)


def test_a_gradient_is_let_go_as_soon_as_it_is_gathered_and_its_mean_is_there_after_the_pass(tmp_path):
    def train():
        model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 1))
        model, optimizer, loader = prepare(model)
        later, seen = list(model[1].parameters()), []
        for _ in loader.epochs(1):
            for (x,) in loader:
                optimizer.zero_grad()
                inner = model[0](x)
                inner.register_hook(lambda _: seen.append([q.grad for q in later]))
                model[1](inner).mean().backward()
                seen.append([q.grad.shape for q in later])
                optimizer.step()
        return seen

    during, after = [None, None], [torch.Size([1, 4]), torch.Size([1])]
    assert alone(train, tmp_path) == [during, after] * 4


def test_a_checkpoint_of_another_model_is_refused_and_the_difference_named(tmp_path):
    def write():
        model, optimizer, loader = prepare(torch.nn.Linear(3, 2))
        good(model, optimizer, loader)
        het.report({"loss": 0.0})

    alone(write, tmp_path, acknowledge=True)
    (path,) = (tmp_path / "storage").iterdir()
    with pytest.raises(CheckpointError, match=r"'weight' has shape \[2, 3\] there and \[1, 3\] here.*another name"):
        alone(lambda: good(*prepare()), tmp_path, checkpoint=str(path))


def test_a_checkpoint_without_a_registered_object_is_refused_and_named(tmp_path):
    def train(name):
        model, optimizer, loader = prepare()
        ema = torch.nn.Linear(3, 1)
        het.register_state(name, ema)
        good(model, optimizer, loader)
        het.register_state(name, ema)  # Again the same is no harm.
        het.report({"loss": 0.0})

    alone(lambda: train("ema"), tmp_path, acknowledge=True)
    (path,) = (tmp_path / "storage").iterdir()
    text = rf"checkpoint {path}: .*\['ema'\], here they are \['average'\].*another name"
    with pytest.raises(CheckpointError, match=text):
        alone(lambda: train("average"), tmp_path, checkpoint=str(path))


def test_a_torn_checkpoint_is_refused(tmp_path):
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "het.json").write_text('{"format": 1, "cur')
    with pytest.raises(CheckpointError, match="het.json can't be read"):
        alone(lambda: good(*prepare()), tmp_path, checkpoint=str(tmp_path / "torn"))


def test_copies_of_a_prepared_optimizer_are_plain_ones(tmp_path):
    def copies():
        model, optimizer, loader = prepare()
        good(model, optimizer, loader)
        return [copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))]

    for one in alone(copies, tmp_path):
        assert type(one) is torch.optim.SGD and one.param_groups[0]["lr"] == 0.1
        one.step()
