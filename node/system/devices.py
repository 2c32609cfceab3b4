"""The device that a command's user has named, or that is here."""

from __future__ import annotations

from ...compression.errors import ConfigError, first_line


def chosen_device(name: str) -> str:
    """ "auto": cuda if there is a GPU. Raises ConfigError for one that torch cannot use."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    check_device(name)
    return name


def check_device(device: str) -> None:
    """Raises ConfigError: torch cannot use it."""
    import torch

    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as e:
        raise ConfigError(f"--device {device}: {first_line(e)}") from e
