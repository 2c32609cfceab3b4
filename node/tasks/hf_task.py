"""The task `hf`: a causal language model of transformers, all of its weights or adapters beside them (LoRA).

The coordinator reads the model's folder (or the hub), makes tokens of the documents and hands out what a node
needs: config.json in record 0, base weights and tokens as blobs. A node needs neither the hub nor the folder,
and opens no path but that of its own --data.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from ...compression.errors import ConfigError
from ...coordinator.protocol.figures import bytes_per_token
from ...optim.base import Closure
from .. import config
from . import documents, hf_adapters, hf_classes, hf_data, hf_model
from .base import Init, Rows, device_of
from .classes import Classes
from .hf_data import Prompts, Stream, Tokenizer, Tokens
from .prompt import PromptTemplate
from .shapes import shapes_only

log = logging.getLogger("thinwire.node")


class HfTask:
    """See the module's docstring and `tasks.Task`. Losses in nats per token; of a classification, per example
    (the mean over the tokens of the label's words, as in MeZO, arXiv 2305.17333)."""

    def __init__(self, options: config.Task, data: Path | None) -> None:
        """Reads the model's config.json, from the hub if need be. Raises ConfigError."""
        hf_model.require()
        _check(options)
        self.options = options
        self.data = data
        self.n_samples = options.batch
        self.n_tokens = options.batch * options.context
        self._is_node = options.architecture is not None
        self._architecture = options.architecture or hf_model.read_architecture(self._folder)
        self._configuration = hf_model.configuration(self._architecture)
        limit = getattr(self._configuration, "max_position_embeddings", None)
        if limit is not None and options.context > limit:
            raise ConfigError(f"task.context {options.context}: the model takes at most {limit} tokens")
        self._tokens: Tokens | None = None
        self._held_out: Tokens | None = None
        self.bytes_per_token: float | None = None

    @property
    def loss_unit(self) -> str:
        return "nats/token" if self.options.prompt is None else "nats/example"

    def model(self) -> nn.Module:
        return hf_model.build(self._architecture, self._lora)

    @cached_property
    def _lora(self) -> config.Lora | None:
        if self._is_node or self.options.adapter is None:
            return self.options.lora
        with shapes_only():
            model = hf_model.build(self._architecture, None)
        return hf_adapters.settings_of(Path(self.options.adapter).expanduser(), model)

    def init(self, name: str, shape: tuple[int, ...]) -> Init:
        """Adapters; all else comes from `base`."""
        scale = hf_adapters.initial_scale(name, shape) if hf_adapters.is_adapter(name) else 0.0
        return Init("normal", scale) if scale else Init("zeros")

    # ------------------------------------------------------------------------- what the coordinator gives

    @cached_property
    def _folder(self) -> Path:
        o = self.options
        if o.model is None:
            raise ConfigError(
                "task.model is needed: a folder with config.json and safetensors, or a hub name"
            )
        return hf_model.model_folder(o.model, o.revision)

    @cached_property
    def _both(self) -> tuple[Tokens, Tokens, Tokenizer]:
        """Tokens to train on, those held out, and what made them."""
        if self._is_node:
            raise ConfigError("task.architecture is written by the coordinator: name a task.model instead")
        o = self.options
        tokenizer = Tokenizer.of(self._folder)
        tokens = self._tokenised(tokenizer, o.corpus, o.split)
        if o.held_out_split:
            self._check_held_out_split()
            held_out = self._tokenised(tokenizer, o.corpus, o.held_out_split).first(o.held_out, o.context)
        else:
            tokens, held_out = hf_data.held_out_of(o, tokens)
        hf_data.say_missing_labels(o, tokens, held_out)
        return tokens, held_out, tokenizer

    def _check_held_out_split(self) -> None:
        """Raises ConfigError if it would be evaluated on what it is trained on."""
        o = self.options
        instead = (
            f"leave it out, or empty on the command line (--set task.held_out_split=), to hold out "
            f"{o.held_out} of what is there"
        )
        assert o.held_out_split is not None
        if not documents.has_split(o.corpus, o.held_out_split):
            raise ConfigError(f"task.held_out_split: {o.corpus} has no splits; {instead}")
        if documents.overlap(o.split, o.held_out_split):
            raise ConfigError(
                f"task.held_out_split {o.held_out_split!r}: it has what task.split {o.split!r} has, which "
                f'is trained on; take slices, "train[:90%]" and "train[90%:]", or {instead}'
            )

    def _tokenised(self, tokenizer: Tokenizer, corpus: str, split: str) -> Tokens:
        found = documents.documents_of(self.options, corpus, split)
        return hf_data.tokenised(self.options, tokenizer, found, self._vocabulary)

    @property
    def _vocabulary(self) -> int:
        return int(self._configuration.get_text_config().vocab_size)

    def public(self, options: config.Task) -> config.Task:
        """The options for record 0: with the model's architecture, and no path of this machine."""
        if options.architecture is not None:
            return options
        with shapes_only():
            model = self.model()
        lora = None if self._lora is None else hf_adapters.as_adapted(model, self._lora)
        is_folder = options.model is not None and Path(options.model).expanduser().is_dir()
        update = {
            "corpus": "run",
            "model": "run" if is_folder else options.model,
            "lora": lora,
            "architecture": self._architecture,
            "held_out_from": None,  # what it chose is in record 0
            "adapter": None,  # as are its weights
        }
        return options.model_copy(update=update)

    def base(self, model: nn.Module) -> dict[str, Tensor]:
        """The folder's weights by the names of `model`, which may be on the meta device."""
        weights = hf_model.read_weights(self._folder, model)
        if self.options.adapter is not None:
            weights |= hf_adapters.read_adapters(Path(self.options.adapter).expanduser(), model)
        return weights

    def base_in(self, folder: Path, model: nn.Module) -> dict[str, Tensor]:
        """Those of another folder with the same model."""
        return hf_model.read_weights(hf_model.model_folder(str(folder), None), model)

    def divide(self, n_sections: int) -> Classes:
        """By label, or text by sections; a held-out split of its own stays what it is."""
        if isinstance(self._both[0], Prompts):
            return hf_classes.by_label(tuple(self.options.labels), self._both)
        has_own = bool(self.options.held_out_split)
        self._both, classes = hf_classes.by_section(self._both, n_sections, has_own=has_own)
        return classes

    def corpus(self) -> bytes:
        return hf_data.to_bytes(self._both[0])

    def held_out(self) -> bytes:
        return hf_data.to_bytes(self._both[1], self._both[2])

    # ------------------------------------------------------------------------------------ what a node does

    def load(self, corpus: bytes | None, held_out: bytes | None) -> None:
        if corpus is None or held_out is None:
            raise ConfigError("the run has no tokens to train on: it was started with another task")
        self._held_out, tokenizer = hf_data.from_bytes(held_out)
        self.bytes_per_token = bytes_per_token(BytesIO(held_out))
        if self.data is None:
            self._tokens, _ = hf_data.from_bytes(corpus)
        elif tokenizer is None:
            raise ConfigError("--data: the run brings no tokenizer")
        else:
            log.info("making tokens of %s", self.data)
            # A file is all of it, however the run's own data are split.
            split = "train" if self.data.is_file() else self.options.split
            self._tokens = self._tokenised(Tokenizer.from_json(tokenizer), str(self.data), split)
        if isinstance(self._tokens, Stream) and self._tokens.windows(self.options.context) < 1:
            raise ConfigError(
                f"only {len(self._tokens.ids)} tokens to train on: at least {self.options.context + 1} needed"
            )

    def draw(self, model: nn.Module, seed: int, rank: int = 0, ranks: int = 1) -> Closure:
        assert self._tokens is not None, "load() comes before draw()"
        rng = np.random.Generator(np.random.Philox(key=seed))
        device = device_of(model)
        mine = Rows.of(self.options.batch, rank, ranks)
        if isinstance(self._tokens, Stream):
            n = self._tokens.windows(self.options.context)
            starts = rng.integers(0, n, self.options.batch)[mine.slice]
            window_BT = _windows(self._tokens, starts, self.options.context).to(device)
            return lambda: _next_token_loss(model, window_BT) * mine.weight
        n = len(self._tokens.answers)
        chosen = rng.choice(n, self.options.batch, replace=self.options.batch > n)
        labels = None if self.options.loss == "candidates" else self._tokens.answers[chosen]
        whole = _Rows.of(self._tokens, chosen, labels, torch.device("cpu"))
        self.n_tokens = whole.n_tokens
        if ranks > 1:
            chosen, labels = chosen[mine.slice], None if labels is None else labels[mine.slice]
            whole = _Rows.of(self._tokens, chosen, labels, torch.device("cpu"))
        rows = whole.to(device)
        answers = torch.from_numpy(self._tokens.answers[chosen]).to(device)
        return lambda: _label_loss(_scores(model, rows), answers) * mine.weight

    def evaluate(self, model: nn.Module, rank: int = 0, ranks: int = 1) -> float:
        """Of a classification also logs the accuracy: how often the right label is the likeliest."""
        assert self._held_out is not None, "load() comes before evaluate()"
        device = device_of(model)
        total, n_right, n_seen, batch = 0.0, 0, 0, self.options.batch
        if isinstance(self._held_out, Stream):
            n = self._held_out.windows(self.options.context)
        else:
            n = len(self._held_out.answers)
        for first in range(0, n, batch):
            n_rows = min(batch, n - first)
            mine = Rows.of(n_rows, rank, ranks)
            chosen = np.arange(first + mine.first, first + mine.stop)
            if isinstance(self._held_out, Stream):
                window_BT = _windows(self._held_out, chosen, self.options.context).to(device)
                total += float(_next_token_loss(model, window_BT)) * n_rows * mine.weight
                continue
            scores_BC = _scores(model, _Rows.of(self._held_out, chosen, None, device))
            answers = torch.from_numpy(self._held_out.answers[chosen]).to(device)
            right_B1 = scores_BC.gather(1, answers[:, None])
            scored = scores_BC if self.options.loss == "candidates" else right_B1
            total += float(_label_loss(scored, answers)) * n_rows * mine.weight
            if mine.weight > 0:
                n_right += int((scores_BC.argmax(dim=1) == answers).sum())
                n_seen += len(chosen)
        if n_seen > 0:  # of several ranks each has some
            log.info("held-out accuracy %.4f (%d of %d)", n_right / n_seen, n_right, n_seen)
        return total / n

    # ------------------------------------------------------------------------------------------- export

    def export(self, model: nn.Module, held_out: bytes, folder: Path) -> None:
        """What transformers (and peft, for adapters) load: config, weights, tokenizer."""
        if self.options.lora is not None:
            hf_adapters.save(model, self.options.model, folder)
        else:
            model.save_pretrained(folder)  # type: ignore[operator]
        self._export_tokenizer(held_out, folder)

    def export_merged(self, model: nn.Module, held_out: bytes, folder: Path) -> None:
        """The same with the adapters in the weights of `model`, which they stay in."""
        if self.options.lora is None:
            raise ConfigError("--merged: this run trains no adapters, its export is a whole model without it")
        hf_adapters.save_merged(model, folder)
        self._export_tokenizer(held_out, folder)

    def _export_tokenizer(self, held_out: bytes, folder: Path) -> None:
        _, tokenizer = hf_data.from_bytes(held_out)
        if tokenizer is not None:
            Tokenizer.from_json(tokenizer).save(folder)


# ------------------------------------------------------------------------------------------------ losses


def _windows(stream: Stream, chosen: Sequence[int] | np.ndarray, context: int) -> Tensor:
    """B x (context + 1): neighbours share a token, which one predicts and the other begins with."""
    offsets = np.asarray(chosen)[:, None] * context + np.arange(context + 1)
    return torch.from_numpy(stream.ids[offsets].astype(np.int64))


def _next_token_loss(model: nn.Module, window_BT: Tensor) -> Tensor:
    logits = model(input_ids=window_BT[:, :-1], use_cache=False).logits
    return functional.cross_entropy(logits.float().flatten(0, 1), window_BT[:, 1:].flatten())


@dataclass(frozen=True, slots=True)
class _Rows:
    """B examples x C labels as rows of one batch, padded at their ends: what stands behind a token does not
    change what a causal model says of it."""

    ids_RT: Tensor
    words_RT: Tensor
    """1 where the row's token is of the label's words."""
    n_labels: int
    n_tokens: int

    @classmethod
    def of(
        cls, prompts: Prompts, chosen: np.ndarray, labels: np.ndarray | None, device: torch.device
    ) -> _Rows:
        """`labels`: one of each example, else all."""
        n_labels = prompts.n_labels if labels is None else 1
        wanted = [
            prompts.row(int(example), label)
            for i, example in enumerate(chosen)
            for label in (range(prompts.n_labels) if labels is None else [int(labels[i])])
        ]
        length = max(len(ids) for ids, _ in wanted)
        ids_RT = np.zeros((len(wanted), length), dtype=np.int64)
        words_RT = np.zeros((len(wanted), length), dtype=np.float32)
        for r, (ids, first) in enumerate(wanted):
            ids_RT[r, : len(ids)] = ids
            words_RT[r, first : len(ids)] = 1.0
        n_tokens = sum(len(ids) for ids, _ in wanted)
        return cls(torch.from_numpy(ids_RT), torch.from_numpy(words_RT), n_labels, n_tokens).to(device)

    def to(self, device: torch.device) -> _Rows:
        return replace(self, ids_RT=self.ids_RT.to(device), words_RT=self.words_RT.to(device))


def _scores(model: nn.Module, rows: _Rows) -> Tensor:
    """B x C: the mean log-probability of each label's tokens, after its prompt."""
    logits_RTV = model(input_ids=rows.ids_RT[:, :-1], use_cache=False).logits
    # Only of the few tokens that count: a vocabulary is large.
    row, at = rows.words_RT[:, 1:].nonzero(as_tuple=True)
    log_p = logits_RTV[row, at].float().log_softmax(dim=-1)
    log_p = log_p.gather(1, rows.ids_RT[:, 1:][row, at][:, None])[:, 0]
    words_RT = torch.zeros_like(rows.words_RT[:, 1:]).index_put((row, at), log_p)
    return (words_RT.sum(dim=1) / rows.words_RT.sum(dim=1)).view(-1, rows.n_labels)


def _label_loss(scores_BC: Tensor, answers: Tensor) -> Tensor:
    """Of the right label's words alone (C = 1), or of the right label among all."""
    if scores_BC.shape[1] == 1:
        return -scores_BC.mean()
    return functional.cross_entropy(scores_BC, answers)


def _check(o: config.Task) -> None:
    if o.adapter is not None and o.lora is not None:
        raise ConfigError("task.adapter says what its adapters are: leave task.lora out")
    if (o.prompt is None) != (not o.labels):
        raise ConfigError("task.prompt and task.labels belong together: give both, or none")
    if o.prompt is not None and len(o.labels) < 2:
        raise ConfigError("task.labels: at least two")
    if len(set(o.labels.values())) < len(o.labels):
        raise ConfigError("task.labels: two labels have the same words")
    if o.prompt is not None and o.architecture is None:  # a run that goes on was checked when it began
        PromptTemplate.of(o.prompt)
