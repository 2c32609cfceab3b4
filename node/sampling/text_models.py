"""Models that continue a text: what sampling needs of the byte GPT and of models of transformers."""

from __future__ import annotations

import codecs
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ...compression.errors import ConfigError, first_line
from ..tasks.gpt import ByteGPT


class TextModel(Protocol):
    """A causal model with its text. Tokens are numbers from 0; `end`: the token that ends a text, or None."""

    end: int | None

    def encode(self, text: str) -> list[int]: ...

    def decoder(self) -> Callable[[int], str]:
        """For one text: token -> the text that it completes, maybe none yet. -1: what is left at the end."""
        ...

    def start(self, tokens: list[int]) -> Tensor:
        """Logits (float32, of the vocabulary) of what follows these tokens."""
        ...

    def advance(self, token: int) -> Tensor:
        """Logits after one more token. Raises ConfigError when the model takes no longer text."""
        ...


class ByteText:
    """The byte GPT: of a longer text it sees the last `context` bytes."""

    end: int | None = None

    def __init__(self, model: ByteGPT) -> None:
        self._model = model.eval()
        self._context = model.position.num_embeddings
        self._bytes: list[int] = []

    def encode(self, text: str) -> list[int]:
        return list(text.encode(errors="surrogateescape")) or [10]

    def decoder(self) -> Callable[[int], str]:
        decode = codecs.getincrementaldecoder("utf-8")(errors="replace").decode
        return lambda token: decode(b"", final=True) if token < 0 else decode(bytes([token]))

    def start(self, tokens: list[int]) -> Tensor:
        self._bytes = list(tokens)
        return self._logits()

    def advance(self, token: int) -> Tensor:
        self._bytes.append(token)
        return self._logits()

    def _logits(self) -> Tensor:
        window = torch.tensor([self._bytes[-self._context :]], device=self._model.token.weight.device)
        logits: Tensor = self._model(window)[0, -1].float()
        return logits


class HfText:
    """A model of transformers with its tokenizer, on what has been said before (its cache)."""

    def __init__(self, model: nn.Module, tokenizer: Any) -> None:
        self._model: Any = model.eval()
        self._tokenizer = tokenizer
        self._cache: Any = None
        self._n = 0
        self.end: int | None = tokenizer.eos_token_id
        self._limit = getattr(self._model.config, "max_position_embeddings", None)

    @classmethod
    def of_folder(cls, folder: Path, base: Path | None, device: str) -> HfText:
        """As transformers or, for adapters, peft has saved it. `base`: the model that adapters belong to;
        None: what they name. Raises ConfigError."""
        from ..tasks import hf_model

        hf_model.require()
        import peft
        import transformers

        here: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        safe: dict[str, Any] = {"use_safetensors": True, **here}
        if not sys.stderr.isatty():
            transformers.utils.logging.disable_progress_bar()
        try:
            if (folder / "adapter_config.json").is_file():
                named = peft.PeftConfig.from_pretrained(str(folder)).base_model_name_or_path
                root = _base_of(folder, named, base)
                model = _adapted(transformers.AutoModelForCausalLM.from_pretrained(root, **safe), folder)
            else:
                model = transformers.AutoModelForCausalLM.from_pretrained(folder, **safe)
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **here)
        except (OSError, ValueError, KeyError, RuntimeError, ImportError) as e:
            raise ConfigError(f"{folder}: cannot be loaded: {first_line(e)}") from e
        return cls(model.to(device), tokenizer)

    @classmethod
    def of_run(cls, model: nn.Module, held_out: bytes) -> HfText:
        """Of a run's model and held-out tokens, which bring the tokenizer along. Raises ConfigError."""
        from transformers import AutoTokenizer

        from ..tasks import hf_data

        _, tokenizer = hf_data.from_bytes(held_out)
        if tokenizer is None:
            raise ConfigError("the run brings no tokenizer")
        with tempfile.TemporaryDirectory(prefix="thinwire-tokenizer-") as folder:
            hf_data.Tokenizer.from_json(tokenizer).save(Path(folder))
            return cls(model, AutoTokenizer.from_pretrained(folder, local_files_only=True))

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text)["input_ids"]
        start = self._tokenizer.bos_token_id if self._tokenizer.bos_token_id is not None else self.end
        return ids or [0 if start is None else start]

    def decoder(self) -> Callable[[int], str]:
        tokens: list[int] = []
        shown = ""

        def complete(token: int) -> str:
            nonlocal shown
            if token >= 0:
                tokens.append(token)
            text: str = self._tokenizer.decode(tokens)
            if token >= 0 and text.endswith("\ufffd"):  # in the middle of a character
                return ""
            new, shown = text.removeprefix(shown), text
            return new

        return complete

    def start(self, tokens: list[int]) -> Tensor:
        self._cache, self._n = None, 0
        return self._logits(tokens)

    def advance(self, token: int) -> Tensor:
        return self._logits([token])

    def _logits(self, tokens: list[int]) -> Tensor:
        self._n += len(tokens)
        if self._limit is not None and self._n > self._limit:
            raise ConfigError(f"the model takes at most {self._limit} tokens")
        ids = torch.tensor([tokens], device=next(self._model.parameters()).device)
        out = self._model(input_ids=ids, past_key_values=self._cache, use_cache=True)
        self._cache = out.past_key_values
        logits: Tensor = out.logits[0, -1].float()
        return logits


def _adapted(model: nn.Module, folder: Path) -> nn.Module:
    import peft

    with warnings.catch_warnings():  # peft asks transformers for something by its old name
        warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
        adapted: nn.Module = peft.PeftModel.from_pretrained(model, str(folder), use_safetensors=True)
    return adapted


def _base_of(folder: Path, named: str | None, base: Path | None) -> Path | str:
    if base is not None:
        if not (base / "config.json").is_file():
            raise ConfigError(f"--base {base}: has no config.json; name the model's folder")
        return base
    if named in (None, "", "run"):
        raise ConfigError(f"{folder} has adapters only: name the folder of their model with --base DIR")
    return str(named)
