"""The text of a program's data: dataset, sampler, collate function, loader."""

from __future__ import annotations

from raytrain_het.testing.programs.program import Program
from raytrain_het.testing.programs.text_loss import declared

_DATASETS: dict[str, str] = {
    "tuples": "        return self.x[index], self.y[index]",
    "dicts": '        return {"x": self.x[index], "y": self.y[index]}',
    "named": "        return Pair(self.x[index], self.y[index])",
    "scalars": "        return self.x[index], float(self.y[index].sum())",
    "augmented": "        return self.x[index] + 0.1 * torch.randn(6, dtype=torch.float64), self.y[index]",
    "curriculum": "        return self.x[index] * (1.0 + 0.1 * self.epoch), self.y[index]",
}
DATASETS = ("tensors", "subset", "concat", "list", "getitems", *_DATASETS)

_SAMPLERS: dict[str, str] = {
    "shuffle": "shuffle=True",
    "plain": "shuffle=False",
    "weighted": "sampler=WeightedRandomSampler([float(k % 3) for k in range(len(data))], num_samples={count})",
    "replacement": "sampler=RandomSampler(data, replacement=True, num_samples={count})",
    "fewer": "sampler=RandomSampler(data, num_samples={count})",
    "generator": "shuffle=True, generator=torch.Generator().manual_seed(5)",
    "subset_random": "sampler=SubsetRandomSampler(range(0, len(data), 2))",
    "reversed": "sampler=list(range(len(data)))[::-1]",
    "own": "sampler=Backwards(data)",
    "own_subclass": "sampler=Upwards(data)",
    "own_random": "sampler=Shuffled(data)",
    "set_epoch": "sampler=sampler",
    "set_by_hand": "sampler=sampler",
    "longer": "sampler=sampler",
    "counting": "sampler=Counting(data)",
    "batches": "batch_sampler=BatchSampler(SequentialSampler(data), {batch}, drop_last={drop_last})",
    "random_batches": "batch_sampler=BatchSampler(RandomSampler(data), {batch}, drop_last={drop_last})",
    "own_batches": "batch_sampler=Buckets(data)",
    "distributed": "sampler=DistributedSampler(data, num_replicas={workers}, rank=RANK)",
}
SAMPLERS = tuple(_SAMPLERS)

_CLASSES: dict[str, str] = {
    "own_random": """class Shuffled(Sampler):
    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(self.data)

    def __iter__(self):
        return iter(torch.randperm(len(self.data)).tolist())
""",
    "set_by_hand": """class Shifted(Sampler):
    def __init__(self, data):
        self.data, self.shift = data, 0

    def __len__(self):
        return len(self.data)

    def __iter__(self):
        return iter([(k + self.shift) % len(self.data) for k in range(len(self.data))])
""",
    "longer": """class Longer(Sampler):
    def __init__(self, data):
        self.data, self.epoch = data, 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return min(len(self.data), 13 + 8 * self.epoch)

    def __iter__(self):
        return iter(range(len(self)))
""",
    "counting": """class Counting(Sampler):
    def __init__(self, data):
        self.data, self.rounds = data, 0

    def __len__(self):
        return len(self.data)

    def __iter__(self):
        self.rounds += 1
        return iter([(k + self.rounds) % len(self.data) for k in range(len(self.data))])
""",
    "own": """class Backwards(Sampler):
    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(self.data) - 2

    def __iter__(self):
        return iter(range(len(self.data) - 1, 1, -1))
""",
    "own_subclass": """class Upwards(RandomSampler):
    def __iter__(self):
        return iter(sorted(range(len(self)), key=lambda k: (k % 5, k)))
""",
    "set_epoch": """class Rotated(Sampler):
    def __init__(self, data):
        self.data, self.epoch = data, 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return len(self.data)

    def __iter__(self):
        return iter([(k + 5 * self.epoch) % len(self.data) for k in range(len(self.data))])
""",
    "own_batches": """class Buckets(Sampler):
    def __init__(self, data):
        self.data = data

    def __len__(self):
        return 4

    def __iter__(self):
        return iter([list(range(k, len(self.data), 4)) for k in range(4)])
""",
}

_EXTRAS: dict[str, str] = {
    "none": "",
    "pin_memory": "pin_memory=True",
    "worker_init_fn": "worker_init_fn=seed_worker",
    "timeout": "timeout=30",
    "persistent": "persistent_workers=True",
    "prefetch": "prefetch_factor=4",
}
EXTRAS = tuple(_EXTRAS)


def fetches_pairs(program: Program) -> bool:
    """Whether a sample is (x, y), so that collate functions of the texts can take it."""
    return program.dataset not in ("dicts", "named")


def data_text(program: Program) -> str:
    """The classes and functions that the data needs."""
    parts = []
    if program.dataset == "named":
        parts.append('Pair = collections.namedtuple("Pair", "x y")\n')
    if program.collate == "pad":
        parts.append(
            "class Data(Dataset):\n    def __init__(self, x, y):\n        self.x, self.y = x, y\n\n"
            "    def __len__(self):\n        return len(self.x)\n\n    def __getitem__(self, index):\n"
            "        length = 2 + index % 4\n        return self.x[index][:length], self.y[index][:length]\n"
        )
    elif program.dataset in _DATASETS:
        epoch = "\n        self.epoch = 0" if program.dataset == "curriculum" else ""
        parts.append(
            f"class Data(Dataset):\n    def __init__(self, x, y):\n        self.x, self.y = x, y{epoch}\n\n"
            "    def __len__(self):\n        return len(self.x)\n\n    def __getitem__(self, index):\n"
            f"{_DATASETS[program.dataset]}\n"
        )
    elif program.dataset == "getitems":
        parts.append(
            "class Data(Dataset):\n    def __init__(self, x, y):\n        self.x, self.y = x, y\n\n"
            "    def __len__(self):\n        return len(self.x)\n\n    def __getitem__(self, index):\n"
            "        return self.x[index], self.y[index]\n\n    def __getitems__(self, indices):\n"
            "        return list(zip(self.x[indices], self.y[indices]))\n"
        )
    if program.sampler in _CLASSES:
        parts.append(_CLASSES[program.sampler])
    if program.collate == "dict":
        parts.append(
            "def collate(samples):\n    xs, ys = zip(*samples)\n"
            '    return {"x": torch.stack(xs), "y": torch.stack(ys), "count": torch.tensor(len(xs)), "name": "batch"}\n'
        )
    elif program.collate == "own":
        parts.append(
            "class Batch:\n    def __init__(self, samples):\n"
            "        self.x, self.y = (torch.stack(part) for part in zip(*samples))\n"
            "        self.count = len(samples)\n"
        )
    elif program.collate == "pad":
        parts.append(
            "def collate(samples):\n    xs, ys = zip(*samples)\n"
            "    pad = nn.utils.rnn.pad_sequence\n"
            "    return pad(xs, batch_first=True), pad(ys, batch_first=True, padding_value=-100)\n"
        )
    if program.extra == "worker_init_fn":
        parts.append("def seed_worker(worker):\n    torch.manual_seed(worker)\n")
    return "\n\n".join(parts)


def make_data(program: Program) -> list[str]:
    """Lines that make ``data``, and ``held_out`` where it is used."""
    count = program.samples
    if program.dataset == "scalars" or program.task == "regress":
        lines = [f"x = torch.randn({count}, 6)", "y = torch.sin(x @ torch.randn(6, 2))"]
    elif program.task == "classify":
        lines = [f"x = torch.randn({count}, 6)", f"y = torch.randint(4, ({count},))"]
    elif program.task == "image":
        lines = [f"x = torch.randn({count}, 2, 6, 6)", f"y = torch.randint(4, ({count},))"]
    else:
        lines = [f"x = torch.randint(11, ({count}, 5))", f"y = torch.randint(11, ({count}, 5))"]
        lines.append(f"y[torch.rand({count}, 5) < torch.rand({count}, 1)] = -100")
        lines.append("y[:, 0] = 3")
    if program.evaluate != "none":
        lines.append("held_out = TensorDataset(x[:7].clone(), y[:7].clone())")
    if program.collate == "pad" or program.dataset in _DATASETS or program.dataset == "getitems":
        return [*lines, "data = Data(x, y)"]
    made = {
        "tensors": "data = TensorDataset(x, y)",
        "subset": "data = Subset(TensorDataset(x, y), list(range(len(x) - 1, -1, -1)))",
        "concat": "data = ConcatDataset([TensorDataset(x[:9], y[:9]), TensorDataset(x[9:], y[9:])])",
        "list": "data = list(zip(x, y))",
    }[program.dataset]
    return [*lines, made]


def make_loader(program: Program) -> list[str]:
    """Lines that make ``loader``."""
    order = _SAMPLERS[program.sampler].format(
        count=program.samples - 3, batch=program.batch, drop_last=program.drop_last, workers=program.workers
    )
    whole_batches = order.startswith("batch_sampler")
    arguments = ["data", order]
    if program.drop_last and not whole_batches:
        arguments.append("drop_last=True")
    if program.processes:
        arguments.append(f"num_workers={program.processes}")
    if program.collate != "default":
        arguments.append(f"collate_fn={'Batch' if program.collate == 'own' else 'collate'}")
    if program.extra != "none":
        arguments.append(_EXTRAS[program.extra])
    prepared = [f"DataLoader({', '.join(arguments)})"]
    number = "numpy.int64({})" if program.odd == "numpy_sizes" else "{}"
    if not whole_batches:
        prepared.append(f"global_batch_size={number.format(program.batch)}")
    if program.micro:
        prepared.append(f"micro_batch_size={number.format(program.micro)}")
    y = "batch.y" if program.collate == "own" else "batch[1]"
    if program.dataset == "dicts" or program.collate == "dict":
        y = 'batch["y"]'
    if told := declared(program, y):
        prepared.append(told)
    held = {"set_epoch": "Rotated", "set_by_hand": "Shifted", "longer": "Longer"}.get(program.sampler)
    lines = [f"sampler = {held}(data)"] if held is not None else []
    return [*lines, f"loader = het.prepare_data_loader({', '.join(prepared)})"]


def unpack(program: Program) -> tuple[str, list[str]]:
    """What the loop over the loader binds, and lines that make ``x`` and ``y`` of it."""
    if program.dataset == "dicts" or program.collate == "dict":
        return "batch", ['x, y = batch["x"], batch["y"]']
    if program.collate == "own":
        return "batch", ["x, y = batch.x, batch.y"]
    return "x, y", []
