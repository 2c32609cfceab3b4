"""LoRA adapters of peft on a model folder of transformers, from a training loop of your own.

    python deploy/examples/lora.py                                    # a tiny model is made; one node
    python deploy/examples/lora.py --model DIR --text my.txt --peers 2       # starts a run, prints a ticket
    python deploy/examples/lora.py --model DIR --text other.txt --ticket TICKET   # another machine joins it

Needs the extra [hf]. The adapter that comes out loads with `PeftModel.from_pretrained(model, DIR)`. Where no
loop of your own is needed, a run file does the same: deploy/runs/llama-lora.toml.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from thinwire.node.loop.api import host, join


def main() -> None:
    a = arguments()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as stack:
        folder = a.model or tiny_model(Path(temporary) / "model")
        adapters = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), adapters)
        ids = AutoTokenizer.from_pretrained(folder)(text_of(a.text), return_tensors="pt").input_ids[0]
        ticket = a.ticket
        if ticket is None:
            run = {
                "run.name": "lora",
                "run.rounds": a.rounds,
                "run.min_peers": a.peers,
                "strategy": {"name": "decoupled", "lr": 1e-2},
            }
            coordinator = host(model, run, state=a.state / "coordinator", host=a.host)
            ticket = stack.enter_context(coordinator).ticket
            print(f"others join with --ticket {ticket}", flush=True)
        print(f"loss of the model: {loss_of(model, next(batches(ids))):.4f}")
        with join(ticket, model, batches(ids), loss_of, state=a.state / "node", host=a.host) as swarm:
            for outcome in swarm:
                if outcome.round % 10 == 0 and outcome.loss is not None:
                    print(f"round {outcome.round}/{outcome.rounds}: loss {outcome.loss:.4f}", flush=True)
        model.save_pretrained(a.output)
        print(f"the adapter after round {swarm.round} is in {a.output}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="LoRA in a swarm; the file's first lines say more")
    parser.add_argument("--model", type=Path, help="a folder that transformers loads")
    parser.add_argument("--text", type=Path, help="what to train on (default: text that comes with Python)")
    parser.add_argument("--ticket", help="join this run, in place of starting one")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--peers", type=int, default=1, help="the first round waits for so many")
    parser.add_argument("--host", default="0.0.0.0", help="127.0.0.1: for this machine alone")
    parser.add_argument("--state", type=Path, default=Path("lora-state"))
    parser.add_argument("--output", type=Path, default=Path("lora-adapter"))
    return parser.parse_args()


def batches(ids_N: Tensor, context: int = 32, batch: int = 4) -> Iterator[dict[str, Tensor]]:
    """Windows of the text without end. The swarm seeds torch's generator: other windows for each peer."""
    while True:
        starts_B = torch.randint(0, len(ids_N) - context, (batch,))
        ids_BT = ids_N[starts_B[:, None] + torch.arange(context)]
        yield {"input_ids": ids_BT, "labels": ids_BT}


def loss_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    loss: Tensor = model(**batch).loss
    return loss


def text_of(path: Path | None) -> str:
    if path is not None:
        return path.read_text(encoding="utf-8")
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in ("assignment", "class", "function", "with"))


def tiny_model(folder: Path) -> Path:
    """A model folder that needs no download: a Llama of random weights, whose tokens are bytes."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    rules = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    rules.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=rules).save_pretrained(folder)
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(alphabet), **shape)).save_pretrained(folder)
    return folder


if __name__ == "__main__":
    main()
