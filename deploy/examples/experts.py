"""Isolated experts, and a router that chooses among them (Paris, arXiv 2510.03434).

A swarm for each kind of text, which know nothing of one another, and exchange nothing:

    thinwire coordinator ../runs/pydoc-gpt.toml --set task.corpus=english.txt   and nodes, as always
    thinwire export TICKET -o english                                           and so on for each kind

and in the end, where all exports are, a router: a linear layer on how often each byte occurs in the first
half of a window, trained to say of which of the texts the window is:

    python experts.py --experts english perl --texts english.txt perl.txt --held-out e.txt p.txt --dense x

That says what the routed experts make of the second halves of held-out windows, in nats per byte, beside one
model of all kinds (`--dense`), and writes the router to router.safetensors.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from thinwire.node import config
from thinwire.node.tasks.text import TextTask

STEPS = 200
BATCH = 64


def expert_of(folder: Path) -> tuple[nn.Module, int]:
    """The model in an export of the task `text`, and how many bytes it looks at."""
    about = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    task = config.Task(**about["config"]["task"]).model_copy(update={"fedpara": None})
    model = TextTask(task, None).model().eval()
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model, task.context


def windows(path: Path, context: int) -> Tensor:
    """All of a text, (N, context + 1) int64; two windows share a byte."""
    data = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8).long()
    n = (len(data) - 1) // context
    if n < 1:
        raise SystemExit(f"{path}: fewer than {context + 1} bytes")
    return data[(torch.arange(n) * context)[:, None] + torch.arange(context + 1)]


def seen(window_NT: Tensor) -> Tensor:
    """What the router looks at, (N, 256): how often each byte occurs in the first half."""
    half_NH = window_NT[:, : window_NT.shape[1] // 2]
    return functional.one_hot(half_NH, 256).float().mean(dim=1)


def router_of(kinds: Sequence[Tensor]) -> nn.Linear:
    """Trained to say which kind a window is of."""
    rng = torch.Generator().manual_seed(1)
    router = nn.Linear(256, len(kinds))
    nn.init.zeros_(router.weight)
    nn.init.zeros_(router.bias)
    optimizer = torch.optim.AdamW(router.parameters(), lr=0.3)
    for _ in range(STEPS):
        kind_B = torch.randint(0, len(kinds), (BATCH,), generator=rng)
        picked = [kinds[k][torch.randint(0, len(kinds[k]), (1,), generator=rng)] for k in kind_B.tolist()]
        optimizer.zero_grad()
        functional.cross_entropy(router(seen(torch.cat(picked))), kind_B).backward()
        optimizer.step()
    return router


@torch.no_grad()
def losses(model: nn.Module, window_NT: Tensor) -> Tensor:
    """(N,): the mean over the second half of each window."""
    found = []
    for window_BT in window_NT.split(256):
        logits_BTV = model(window_BT[:, :-1])
        loss_BT = functional.cross_entropy(logits_BTV.transpose(1, 2), window_BT[:, 1:], reduction="none")
        found.append(loss_BT[:, window_BT.shape[1] // 2 :].mean(dim=1))
    return torch.cat(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name, of in (("--experts", "exports"), ("--texts", "of each kind"), ("--held-out", "of each kind")):
        parser.add_argument(name, nargs="+", type=Path, required=True, help=of)
    parser.add_argument("--dense", type=Path, help="the export of one model of all kinds")
    args = parser.parse_args()
    if not len(args.experts) == len(args.texts) == len(args.held_out) > 1:
        parser.error("as many --experts, --texts and --held-out, two at least, in the same order")
    models, contexts = zip(*map(expert_of, args.experts), strict=True)
    context = min(contexts)
    router = router_of([windows(path, context) for path in args.texts])
    kinds = [windows(path, context) for path in args.held_out]
    n = min(map(len, kinds))
    window_NT, kind_N = torch.cat([k[:n] for k in kinds]), torch.arange(len(kinds)).repeat_interleave(n)
    with torch.no_grad():
        chosen_N = router(seen(window_NT)).argmax(dim=1)
    loss_EN = torch.stack([losses(model, window_NT) for model in models])
    everyone = torch.arange(len(window_NT))
    found = {
        "the router is right": float((chosen_N == kind_N).float().mean()),
        "routed experts": float(loss_EN[chosen_N, everyone].mean()),
        "each kind's own expert": float(loss_EN[kind_N, everyone].mean()),
        "any expert": float(loss_EN.mean()),
    }
    if args.dense is not None:
        found["one model of all kinds"] = float(losses(expert_of(args.dense)[0], window_NT).mean())
    for what, value in found.items():
        print(f"{what}: {value:.3f}")
    save_file({"weight": router.weight.detach(), "bias": router.bias.detach()}, "router.safetensors")


if __name__ == "__main__":
    main()
