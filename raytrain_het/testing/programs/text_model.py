"""The text of a program's model and data."""

from __future__ import annotations

from raytrain_het.testing.programs.program import Program

WIDTH = 8
WORDS = 11

_BLOCKS: dict[str, tuple[str, str]] = {
    # name: (what __init__ does, what forward does); "$" is the block's own name
    "residual": ("self.$ = nn.Linear(8, 8)", "h = h + torch.tanh(self.$(h))"),
    "layer_norm": ("self.$ = nn.LayerNorm(8)", "h = self.$(h)"),
    "group_norm": ("self.$ = nn.GroupNorm(2, 8)", "h = {channels}"),
    "batch_norm": ("self.$ = nn.BatchNorm1d(8)", "h = {channels}"),
    "batch_norm_eval": (
        "self.$ = nn.BatchNorm1d(8)\nself.$.running_mean.fill_(0.1)\nself.$.running_var.fill_(2.0)",
        "h = {channels}",
    ),
    "dropout0": ("self.$ = nn.Dropout(0.0)", "h = self.$(h)"),
    "dropout": ("self.$ = nn.Dropout(0.1)", "h = self.$(h)"),
    "noise": ("", "h = h + 0.1 * noise_of(x, h)"),
    "tied": (
        "self.$ = nn.Linear(8, 8)\nself.$_twin = nn.Linear(8, 8, bias=False)\nself.$_twin.weight = self.$.weight",
        "h = self.$_twin(torch.tanh(self.$(h)))",
    ),
    "checkpoint": (
        "self.$ = nn.Sequential(nn.Linear(8, 8), nn.Tanh())",
        "h = checkpoint(self.$, h, use_reentrant=False)",
    ),
    "checkpoint_reentrant": (
        "self.$ = nn.Sequential(nn.Linear(8, 8), nn.Tanh())",
        "h = checkpoint(self.$, h, use_reentrant=True)",
    ),
    "checkpoint_twice": (
        "self.$ = nn.Sequential(nn.Linear(8, 8), nn.Tanh())",
        "for _ in range(2):\n    h = checkpoint(self.$, h, use_reentrant=False)",
    ),
    "checkpoint_reentrant_twice": (
        "self.$ = nn.Sequential(nn.Linear(8, 8), nn.Tanh())",
        "for _ in range(2):\n    h = checkpoint(self.$, h, use_reentrant=True)",
    ),
    "inner_backward": ("self.$ = nn.Linear(8, 8)", "h = Again.apply(h, self.$)"),
    "shared": ("self.$ = nn.Linear(8, 8)", "h = torch.tanh(self.$(torch.tanh(self.$(h))))"),
    "spectral_norm": ("self.$ = nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8))", "h = torch.tanh(self.$(h))"),
    "weight_norm": ("self.$ = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))", "h = torch.tanh(self.$(h))"),
    "unused": ("self.$ = nn.Linear(8, 8)", ""),
    "late": ("self.$ = nn.Linear(8, 8)", "if self.epoch >= 1:\n    h = h + torch.tanh(self.$(h))"),
    "scale": ("self.$ = nn.Parameter(torch.tensor(1.5))", "h = h * self.$"),
    "empty": ("self.$ = nn.Parameter(torch.empty(0))", "h = h + self.$.sum()"),
    "hook": ("", "h.register_hook(lambda grad: 0.5 * grad)"),
    "detach": ("self.$ = nn.Linear(8, 8)", "h = h + torch.tanh(self.$(h.detach()))"),
    "gru": ("self.$ = nn.GRU(8, 8, batch_first=True)", "h = self.$({steps})[0]{unsteps}"),
    "attention": (
        "self.$ = nn.MultiheadAttention(8, 2, bias=False, batch_first=True)",
        "h = h + self.$(h, h, h, need_weights=False)[0]",
    ),
    "transposed": ("self.$ = nn.Parameter(torch.randn(8, 8).t() / 3)", "h = torch.tanh(h @ self.$)"),
    "functional": (
        "self.$ = nn.Linear(8, 8)",
        "h = torch.tanh(torch.func.functional_call(self.$, dict(self.$.named_parameters()), (h,)))",
    ),
    "parameter_hook": (
        "self.$ = nn.Linear(8, 8)\nself.$.weight.register_hook(lambda grad: 0.5 * grad)",
        "h = torch.tanh(self.$(h))",
    ),
    "module_hook": (
        "self.$ = nn.Linear(8, 8)\nself.$.register_full_backward_hook(lambda module, ins, outs: (0.5 * ins[0],))",
        "h = torch.tanh(self.$(h))",
    ),
    "post_hook": (
        "self.$ = nn.Linear(8, 8)\nself.$.weight.register_post_accumulate_grad_hook(halve)",
        "h = torch.tanh(self.$(h))",
    ),
    "branch": (
        "self.$ = nn.Linear(8, 8)",
        "h = torch.where(h[..., :1] > 0, torch.tanh(self.$(h)), h)",
    ),
    "gain_list": (
        "self.$ = nn.ParameterList([torch.ones(8), torch.zeros(8)])",
        "h = h * self.$[0] + self.$[1]",
    ),
}

_BUFFERS: dict[str, tuple[str, str]] = {
    "mean": (
        'self.register_buffer("mean", torch.zeros(8))',
        "h = h - self.mean\nself.mean.mul_(0.9).add_(h.detach().reshape(-1, 8).mean(0), alpha=0.1)",
    ),
    "single": (
        'self.register_buffer("single", torch.zeros(8, dtype=torch.float32))',
        "self.single.mul_(0.9).add_(h.detach().reshape(-1, 8).mean(0).float(), alpha=0.1)",
    ),
    "non_persistent": (
        'self.register_buffer("passing", torch.zeros(8), persistent=False)',
        "h = h - self.passing\nself.passing.mul_(0.9).add_(h.detach().reshape(-1, 8).mean(0), alpha=0.1)",
    ),
    "counter": ('self.register_buffer("calls", torch.zeros((), dtype=torch.int64))', "self.calls += 1"),
    "flag": (
        'self.register_buffer("called", torch.zeros(3, dtype=torch.bool))',
        "h = h + 0.1 * self.called.sum()\nself.called[1] = True",
    ),
    "infinite": (
        'self.register_buffer("least", torch.full((8,), torch.inf))',
        "self.least.copy_(torch.minimum(self.least, h.detach().reshape(-1, 8).amin(0)))",
    ),
    "expanded": ('self.register_buffer("gain", torch.full((1,), 0.5).expand(8))', "h = h * self.gain"),
    "replaced": ('self.register_buffer("decay", torch.ones(8))', "self.decay = self.decay * 0.9\nh = h * self.decay"),
    "none_at_first": (
        'self.register_buffer("first", None)',
        "if self.first is None:\n    self.first = torch.full((8,), 0.5)\nh = h * self.first",
    ),
    "none_then_data": (
        'self.register_buffer("shift", None)',
        "if self.shift is None:\n    self.shift = h.detach().reshape(-1, 8).mean(0)\nh = h - self.shift",
    ),
    "becomes_none": (
        'self.register_buffer("start", torch.full((8,), 0.5))',
        "if self.start is not None:\n    h = h + self.start\nif self.epoch >= 1:\n    self.start = None",
    ),
    "grows": (
        'self.register_buffer("memory", torch.zeros(1, 8))',
        "if self.epoch >= 1 and len(self.memory) < 3:\n    self.memory = torch.cat([self.memory, torch.ones(1, 8)])",
    ),
    "const_inf": (
        'self.register_buffer("mask", torch.tensor([0.0] * 7 + [-torch.inf]))',
        "h = h + torch.softmax(self.mask, 0)",
    ),
    "const_nan": (
        'self.register_buffer("absent", torch.tensor([0.0] * 7 + [torch.nan]))',
        "h = h + torch.nan_to_num(self.absent, 0.5)",
    ),
    "const_bool": (
        'self.register_buffer("on", torch.arange(8) % 2 == 0)',
        "h = torch.where(self.on, h, 0.5 * h)",
    ),
    "const_int": (
        'self.register_buffer("key", torch.tensor([2**60 + 1, -(2**62) - 3]))',
        "h = h * float(self.key[0] % 2)",
    ),
    "big_counter": ('self.register_buffer("ticks", torch.tensor(2**60 + 1))', "self.ticks += 3"),
    # What the loop changes by hand: see text_loop.
    "hand_before_step": ('self.register_buffer("heat", torch.ones(8))', "h = h * self.heat"),
    "hand_after_step": ('self.register_buffer("heat", torch.ones(8))', "h = h * self.heat"),
    "shadow": ('self.register_buffer("shadow", torch.zeros(8))', "h = h + 0.1 * self.shadow"),
    "queue": ('self.register_buffer("queue", torch.zeros(8))', "self.last = h.detach().reshape(-1, 8)[0].clone()"),
    "best": ('self.register_buffer("best", torch.tensor(torch.inf))', ""),
}

BLOCKS, BUFFERS = tuple(_BLOCKS), tuple(_BUFFERS)

_AGAIN = '''class Again(torch.autograd.Function):
    """Computes a block's activations again in backward(), which calls backward() inside."""

    @staticmethod
    def forward(ctx, h, block):
        ctx.block = block
        ctx.save_for_backward(h)
        with torch.no_grad():
            return torch.tanh(block(h))

    @staticmethod
    def backward(ctx, grad):
        h = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            torch.autograd.backward(torch.tanh(ctx.block(h)), grad)
        return h.grad, None
'''

_NOISE = '''def noise_of(x, h):
    """Noise that belongs to the sample, whoever has it."""
    seeds = [int(1e6 * float(row.double().mean().abs())) for row in x]
    return torch.stack([torch.randn(h.shape[1:], generator=torch.Generator().manual_seed(k)) for k in seeds])
'''


def outputs(program: Program) -> int:
    """The width of what the model computes."""
    return {"regress": 2, "classify": 4, "tokens": WORDS, "image": 4}[program.task]


def model_text(program: Program) -> str:
    """The classes of the model."""
    tokens = program.task == "tokens"
    init, forward = [f"self.stem = {_stem(program)}"], []
    forward.append("h = self.stem(x).mean((2, 3))" if program.task == "image" else "h = torch.tanh(self.stem(x))")
    for place, name in enumerate(program.blocks):
        own = f"b{place}"
        made, used = (part.replace("$", own) for part in _BLOCKS[name])
        call = f"self.{own}(h.transpose(1, 2)).transpose(1, 2)" if tokens else f"self.{own}(h)"
        used = used.replace("{channels}", call)
        used = used.replace("{steps}", "h" if tokens else "h[:, None]").replace("{unsteps}", "" if tokens else "[:, 0]")
        init += made.splitlines()
        forward += used.splitlines()
    for name in program.buffers:
        made, used = _BUFFERS[name]
        init += made.splitlines()
        if used and name not in ("const_inf", "const_bool", "const_nan", "const_int", "expanded"):
            # Statistics are those of training, as batch norm's are.
            lines = used.splitlines()
            forward += ["if self.training:", *("    " + line for line in lines)]
        else:
            forward += used.splitlines()
    if "late" in program.blocks or {"becomes_none", "grows"} & set(program.buffers):
        init.append("self.epoch = 0")
    init.append(f"self.head = nn.Linear(8, {outputs(program)})")
    if program.head == "tied":
        init.append("self.head.weight = self.stem.weight")
    if program.loss == "learned":
        init.append("self.log_scale = nn.Parameter(torch.zeros(()))")
    if program.odd == "complex":
        init.append("self.phase = nn.Parameter(torch.ones(8, dtype=torch.complex128))")
    if program.odd == "lazy":
        init.append("self.lazy = nn.LazyLinear(8)")
        forward.append("h = torch.tanh(self.lazy(h))")
    forward.append("return self.head(h)")
    body = "\n".join(
        ["class Net(nn.Module):", "    def __init__(self):", "        super().__init__()"]
        + ["        " + line for line in init]
        + ["", "    def forward(self, x):"]
        + ["        " + line for line in forward]
    )
    before, after = _around(program)
    return "\n\n".join([*before, body + "\n", *after])


def _stem(program: Program) -> str:
    if program.odd == "sparse":
        return "nn.Embedding(11, 8, sparse=True)"
    return {
        "regress": "nn.Linear(6, 8)",
        "classify": "nn.Linear(6, 8)",
        "tokens": "nn.Embedding(11, 8)",
        "image": "nn.Sequential(nn.Conv2d(2, 8, 3, padding=1), nn.Tanh(), nn.Conv2d(8, 8, 3))",
    }[program.task]


def _around(program: Program) -> tuple[list[str], list[str]]:
    """What the model's class needs before it, and what comes after it."""
    parts = []
    if "post_hook" in program.blocks or program.odd == "post_hook_after":
        parts.append("def halve(p):\n    p.grad.mul_(0.5)\n")
    if "inner_backward" in program.blocks:
        parts.append(_AGAIN)
    if "noise" in program.blocks:
        parts.append(_NOISE)
    after = []
    if program.loss == "learned_outside":
        after.append(
            "class Criterion(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
            "        self.log_scale = nn.Parameter(torch.zeros(()))\n\n    def forward(self, loss):\n"
            "        return loss * torch.exp(-self.log_scale) + self.log_scale\n"
        )
    return parts, after
