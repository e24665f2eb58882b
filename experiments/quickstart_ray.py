"""A linear model on made-up data with two workers: seconds to run. quickstart_ray.py is plain Ray Train,
quickstart_het.py is raytrain_het; compare the two."""

import ray.train
import ray.train.torch
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset


def train_fn(config):
    torch.manual_seed(0)
    inputs = torch.randn(4096, 16)
    targets = inputs @ torch.linspace(-1, 1, 16).unsqueeze(1)

    model = ray.train.torch.prepare_model(torch.nn.Linear(16, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=config["lr"])
    loader = DataLoader(TensorDataset(inputs, targets), batch_size=128, shuffle=True)
    loader = ray.train.torch.prepare_data_loader(loader)
    for epoch in range(5):
        for x, y in loader:
            loss = F.mse_loss(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f"epoch {epoch}: loss {loss.item():.6f}")
        ray.train.report({"loss": loss.item()})


if __name__ == "__main__":
    trainer = ray.train.torch.TorchTrainer(
        train_fn,
        train_loop_config={"lr": 0.1},
        scaling_config=ray.train.ScalingConfig(num_workers=2),
        run_config=ray.train.RunConfig(),
    )
    trainer.fit()
