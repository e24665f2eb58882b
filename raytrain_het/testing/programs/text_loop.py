"""The text of a program's training function."""

from __future__ import annotations

from raytrain_het.testing.programs.program import Program
from raytrain_het.testing.programs.text_choices import (
    AFTERS,
    CLIPS,
    EDITS,
    GROUPS_TEXT,
    HANDS,
    OPTIMIZERS_TEXT,
    SCHEDULERS_TEXT,
    ZERO,
)
from raytrain_het.testing.programs.text_data import make_data, make_loader, unpack
from raytrain_het.testing.programs.text_loss import additive, loss_lines


def _indented(text: str, depth: int) -> list[str]:
    return ["    " * depth + line if line else "" for line in text.splitlines()]


def _freeze(program: Program) -> list[str]:
    return {
        "none": [],
        "stem": ["model.stem.requires_grad_(False)"],
        "stem_weight": ["next(model.stem.parameters()).requires_grad_(False)"],
        "head_bias": ["model.head.bias.requires_grad_(False)"],
        "head": ["model.head.requires_grad_(False)"],
        "eval_block": [
            "for module in model.modules():",
            "    if isinstance(module, nn.Dropout):",
            "        module.eval()",
        ],
    }[program.frozen]


def _thaw(program: Program) -> list[str]:
    return {
        "none": "",
        "unfreeze": "model.requires_grad_(epoch >= 1)\nmodel.head.requires_grad_(True)",
        "freeze_stem": "model.stem.requires_grad_(epoch < 1)",
        "unfreeze_at_1": "if epoch == 1:\n    model.stem.requires_grad_(True)",
        "replace_head": f"if epoch == 1:\n    model.head = nn.Linear(8, {_outputs(program)})",
        "restore": "if epoch == 1:\n    model.load_state_dict(start)",
        "add_group": 'if epoch == 1:\n    optimizer.add_param_group({"params": model.head.parameters(), "lr": 0.01})',
    }[program.thaw].splitlines()


def _outputs(program: Program) -> int:
    return {"regress": 2, "classify": 4, "tokens": 11, "image": 4}[program.task]


def _before_loop(program: Program) -> list[str]:
    lines = [f"torch.manual_seed({program.seed})", *make_data(program)]
    if program.loss.startswith("class_weight"):
        lines.append("class_weights = torch.tensor([1.0, 2.0, 0.5, 3.0])")
    model = "Net()"
    if program.layout == "channels_last":
        model += ".to(memory_format=torch.channels_last)"
    if program.odd == "rank_seed":
        lines.append("torch.manual_seed(RANK)")
    lines.append(f"model = {model}")
    if program.after == "renorm":
        lines += ["with torch.no_grad():", "    model.head.weight.div_(model.head.weight.norm(dim=1, keepdim=True))"]
    lines += _freeze(program)
    if program.odd != "optimizer_first":
        lines.append("model = het.prepare_model(model)")
    if program.odd == "second_model":
        lines.append("other = het.prepare_model(nn.Linear(2, 2))")
    if "batch_norm_eval" in program.blocks:
        lines += [f"model.b{k}.eval()" for k, name in enumerate(program.blocks) if name == "batch_norm_eval"]
    parameters = GROUPS_TEXT[program.groups]
    if program.loss == "learned_outside":
        lines.append("criterion = Criterion()")
        parameters = "[*model.parameters(), *criterion.parameters()]"
    made = OPTIMIZERS_TEXT[program.optimizer].format(parameters)
    if program.loss.startswith("sum"):
        made = made.replace("lr=0.05", "lr=0.005")
    scheduler = SCHEDULERS_TEXT.get(program.scheduler)
    if program.scheduler == "before_prepare":
        assert scheduler is not None
        lines += [f"optimizer = {made}", f"scheduler = {scheduler[0]}"]
        lines += ["optimizer = het.prepare_optimizer(optimizer)"]
    else:
        lines.append(f"optimizer = het.prepare_optimizer({made})")
        if scheduler is not None:
            lines.append(f"scheduler = {scheduler[0]}")
    if program.odd == "optimizer_first":
        lines.append("model = het.prepare_model(model)")
    if program.odd == "post_hook_after":
        lines.append("model.head.weight.register_post_accumulate_grad_hook(halve)")
    if program.thaw == "restore":
        lines.append("start = copy.deepcopy(model.state_dict())")
    if program.odd == "second_optimizer":
        lines.append("second = het.prepare_optimizer(torch.optim.SGD(model.head.parameters(), lr=0.01))")
    if scheduler is not None and program.scheduler != "unregistered":
        lines.append('het.register_state("scheduler", scheduler)')
    if program.odd == "scaler":
        lines.append('scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=2)')
        lines.append('het.register_state("scaler", scaler)')
    if program.after == "ema":
        lines.append("ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))")
        lines.append('het.register_state("ema", ema)')
    elif program.after == "ema_by_hand":
        lines += ["ema = copy.deepcopy(model)", 'het.register_state("ema", ema)']
    return [*lines, *make_loader(program)]


def _backward(program: Program) -> list[str]:
    if program.odd == "two_backward":
        return ["loss.backward(retain_graph=True)", "(0.5 * loss).backward()"]
    if program.odd == "create_graph":
        return ["loss.backward(create_graph=True)"]
    if program.odd == "autograd_backward":
        return ["torch.autograd.backward([loss])"]
    if program.odd == "scaler":
        return ["scaler.scale(loss).backward()"]
    return ["loss.backward()"]


def _step(program: Program) -> list[str]:
    if program.optimizer == "lbfgs" or program.odd == "closure":
        zero, loss = "optimizer.zero_grad()", loss_lines(program)
        body = "\n".join([zero, *loss, "loss.backward()", "return loss"])
        return ["def closure():", *_indented(body, 1), "optimizer.step(closure)"]
    if program.odd == "second_optimizer":
        return ["optimizer.step()", "second.step()"]
    if program.odd == "no_step":
        return []
    if program.odd == "scaler":
        return ["scaler.step(optimizer)", "scaler.update()"]
    if program.odd == "conditional_step":
        return ["if loss.item() < 1.0:", "    optimizer.step()"]
    if program.odd == "finite_step":
        return ["if torch.isfinite(loss):", "    optimizer.step()"]
    if program.odd == "local_rate":
        return [
            "for group in optimizer.param_groups:",
            '    group["lr"] = 0.01 * min(1.0, loss.item())',
            "optimizer.step()",
        ]
    if program.odd == "step_twice":
        return ["optimizer.step()", "optimizer.step()"]
    return ["optimizer.step()"]


def _body(program: Program) -> list[str]:
    bound, lines = unpack(program)
    zero = ZERO[program.zero].splitlines()
    if program.early == "top":
        lines += ["if epoch == 1 and step == 1:", "    return seen"]
    if program.odd == "break":
        lines += ["if step == 1:", "    break"]
    if program.odd == "continue":
        lines += ["if step == 1:", "    continue"]
    if program.odd == "raise":
        lines += ["if epoch == 1:", '    raise OwnError("the program gives up", 7)']
    if program.odd == "raise_on_one":
        lines += ["if epoch == 1 and RANK == WORLD - 1:", '    raise OwnError("the program gives up", 7)']
    if program.odd == "return_on_one":
        lines += ["if epoch == 1 and RANK == WORLD - 1:", "    return seen"]
    if program.layout == "channels_last":
        lines.append("x = x.contiguous(memory_format=torch.channels_last)")
    if program.zero == "first":
        lines += zero
    closes = program.optimizer == "lbfgs" or program.odd == "closure"
    if not closes:
        lines += loss_lines(program)
        if program.zero not in ("first", "after"):
            lines += zero
        lines += _backward(program)
    if program.odd == "scaler" and (program.clip != "none" or program.edit != "none"):
        lines.append("scaler.unscale_(optimizer)")
    if program.keep == "compare":
        lines += [
            "grads = [p.grad for p in model.parameters() if p.grad is not None]",
            'seen[epoch, "agree"] = float(sum((a * b).sum() for a, b in zip(grads, kept)))',
            "kept = grads",
        ]
    lines += CLIPS[program.clip].splitlines() + EDITS[program.edit].splitlines()
    for name in program.buffers:
        lines += HANDS.get(name, ("", ""))[0].splitlines()
    stepping = _step(program)
    if program.odd == "accumulate":
        lines += ["if step % 2 == 1:", *_indented("\n".join([*stepping, "optimizer.zero_grad()"]), 1)]
    else:
        lines += stepping
    lines += AFTERS[program.after].splitlines()
    for name in program.buffers:
        lines += HANDS.get(name, ("", ""))[1].splitlines()
    lines += SCHEDULERS_TEXT.get(program.scheduler, ("", "", ""))[1].splitlines()
    if program.scheduler == "each_step_by_hand":
        lines += ["for group in optimizer.param_groups:", '    group["lr"] = group["lr"] * 0.9']
    if program.zero == "after":
        lines += zero
    if program.report == "sum":
        lines.append(f"total += {additive(program)}")
    if program.early == "after_step":
        lines += ["if epoch == 1 and step == 1:", "    return seen"]
    counts = program.early in ("top", "after_step") or program.odd in ("break", "continue", "accumulate")
    if program.odd == "own_loop":
        return [f"for {bound} in DataLoader(data, batch_size={program.batch}):", *_indented("\n".join(lines), 1)]
    head = f"for {bound} in loader:"
    if counts:
        head = f"for step, {bound if bound == 'batch' else f'({bound})'} in enumerate(loader):"
    return [head, *_indented("\n".join(lines), 1)]


def _evaluate(program: Program) -> list[str]:
    given, collated = "held_out, batch_size=3", program.collate
    if program.evaluate == "loader":
        given, collated = "DataLoader(held_out, batch_size=3)", "default"
    x, y = {"own": ("batch.x", "batch.y"), "dict": ('batch["x"]', 'batch["y"]')}.get(collated, ("batch[0]", "batch[1]"))
    loss = f"(out.sum(1) - {y}.double().reshape(len(out), -1).sum(1)).square().sum()"
    if program.task == "tokens":
        loss = f'F.cross_entropy(out.transpose(1, 2), {y}, ignore_index=-100, reduction="sum")'
    call = f"scores = het.evaluate(measure, {given})"
    before, after = [], ['seen[epoch, "error"] = scores["error"]']
    if program.odd == "evaluate_on_one":
        call, after = f"if RANK == 0:\n    {call}", []
    elif program.odd == "evaluate_raises":
        before = ["    if RANK == 1:", '        raise OwnError("no score", 1)']
        call, after = f"try:\n    {call}\nexcept OwnError:\n    pass", []
    return [
        "def measure(batch):",
        *before,
        f"    out = model({x})",
        f'    return {{"error": {loss}, "training": len(out) * float(model.training)}}',
        "",
        *call.splitlines(),
        *after,
        'seen[epoch, "modes"] = sum(module.training for module in model.modules())',
    ]


def train_text(program: Program) -> str:
    """The training function."""
    lines = [*_before_loop(program), "seen = {}"]
    if program.keep == "compare":
        lines.append("kept = []")
    if program.odd == "warm_up_pass":
        lines += ["for batch in loader:", "    pass"]
    inner: list[str] = []
    if program.early == "epoch":
        inner += ["if epoch == 1:", "    return seen"]
    if program.dataset == "curriculum":
        inner.append("data.epoch = epoch")
    if program.sampler in ("set_epoch", "longer"):
        inner.append("sampler.set_epoch(epoch)")
    elif program.sampler == "set_by_hand":
        inner.append("sampler.shift = 3 * epoch")
    if "late" in program.blocks or {"becomes_none", "grows"} & set(program.buffers):
        inner.append("model.epoch = epoch")
    inner += _thaw(program)
    if program.scheduler == "by_hand":
        inner += ["if epoch == 1:", "    for group in optimizer.param_groups:", '        group["lr"] = 0.02']
    if program.report == "sum":
        inner.append("total = 0.0")
    if program.odd == "list_first":
        inner.append("count = len(list(loader))")
    inner += _body(program)
    if program.odd == "second_pass":
        inner += ["for batch in loader:", "    pass"]
    if program.evaluate != "none":
        inner += _evaluate(program)
    if "best" in program.buffers:
        inner.append("model.best.copy_(torch.minimum(model.best, torch.tensor(scores['error'])))")
    inner += SCHEDULERS_TEXT.get(program.scheduler, ("", "", ""))[2].splitlines()
    inner += {
        "none": "",
        "sum": 'het.report({"total": total}, reduce={"total": "sum"})',
        "same": 'het.report({"rate": optimizer.param_groups[0]["lr"], "epoch": epoch}, checkpoint=False)',
        "tensor": 'het.report({"size": model.head.weight.detach().abs().sum(), "name": "mine"})',
        "kinds": 'het.report({"inf": float("inf"), "nan": torch.tensor(float("nan")), "one": numpy.float32(1.5),'
        ' "flag": True, "count": torch.tensor([3]), "none": None}, checkpoint=False)',
        "on_one": 'if RANK == 0:\n    het.report({"epoch": epoch})',
        "twice": 'het.report({"epoch": epoch})\nhet.report({"epoch": epoch + 1})',
    }[program.report].splitlines()
    rounds = f"loader.epochs({program.epochs})"
    if program.odd == "numpy_sizes":
        rounds = f"loader.epochs(numpy.int64({program.epochs}))"
    elif program.odd == "own_loop":
        rounds = f"range({program.epochs})"
    lines += [f"for epoch in {rounds}:", *_indented("\n".join(inner), 1), "return seen"]
    return "\n".join(["def train_fn():", *_indented("\n".join(lines), 1)]) + "\n"
