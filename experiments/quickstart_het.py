"""A linear model on made-up data with two workers: seconds to run. quickstart_ray.py is plain Ray Train,
quickstart_het.py is raytrain_het; compare the two."""

import ray.train
import raytrain_het as het
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset


def train_fn(config):
    torch.manual_seed(0)
    inputs = torch.randn(4096, 16)
    targets = inputs @ torch.linspace(-1, 1, 16).unsqueeze(1)

    model = het.prepare_model(torch.nn.Linear(16, 1))
    optimizer = het.prepare_optimizer(torch.optim.SGD(model.parameters(), lr=config["lr"]))
    loader = DataLoader(TensorDataset(inputs, targets), batch_size=128, shuffle=True)
    loader = het.prepare_data_loader(loader, global_batch_size=256)
    for epoch in loader.epochs(5):
        for x, y in loader:
            loss = F.mse_loss(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f"epoch {epoch}: loss {loss.item():.6f}")
        het.report({"loss": loss.item()})


if __name__ == "__main__":
    trainer = het.HetTrainer(
        train_fn,
        train_loop_config={"lr": 0.1},
        scaling_config=het.HetScalingConfig(workers=[het.WorkerSpec(count=2)]),
        run_config=ray.train.RunConfig(),
    )
    trainer.fit()
