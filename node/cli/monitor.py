"""`thinwire monitor`: Prometheus, Alertmanager and Grafana for a swarm, from the files in deploy/monitoring.

Those name the services of a container network; a copy names what this machine reaches.
"""

from __future__ import annotations

import json
import logging
import os
import re
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from ...compression.errors import ConfigError
from ...coordinator.protocol.files import write_aside
from ...coordinator.protocol.ticket import Ticket
from .status import StatusClient

log = logging.getLogger("thinwire.monitor")

KEPT: Final = "alertmanager.yml"
"""Where people say whom to tell: never written over."""

MAIN: Final = "prometheus.yml"
TOKEN: Final = "http-token"
DATA: Final = ("data/prometheus", "data/alertmanager", "data/grafana")
_DASHBOARDS: Final = "/etc/grafana/dashboards"
_TIMEOUT_S: Final = 5.0
_HOST: Final = re.compile(r"[A-Za-z0-9._-]{1,253}:\d{1,5}|\[[0-9A-Fa-f:.]{2,45}\]:\d{1,5}")
_SERVE_IT: Final = (
    "start it again with the same command and --http HOST:PORT, for example --http 127.0.0.1:9100 to watch "
    "it from its own machine, or --http 0.0.0.0:9100 --http-token TOKEN to watch it from others"
)


@dataclass(frozen=True, slots=True)
class Address:
    """Where a coordinator serves HTTP. `host`: with its port, as Prometheus writes a target."""

    scheme: str
    host: str

    def __str__(self) -> str:
        return f"{self.scheme}://{self.host}"

    @classmethod
    def parse(cls, text: str) -> Address:
        """`HOST:PORT` or a URL of nothing else. Raises ConfigError."""
        url = urlsplit(text if "://" in text else f"http://{text}")
        host = url.netloc
        if url.scheme == "https" and re.fullmatch(r"[^:]+|\[.*\]", host):
            host += ":443"
        if url.scheme not in ("http", "https") or not _HOST.fullmatch(host) or url.path.strip("/"):
            raise ConfigError(f"--coordinator {text}: write it as http://HOST:PORT, as its --http says")
        return cls(url.scheme, host)


def monitor(
    ticket: str | None,
    coordinator: str | None,
    folder: Path | None,
    token: str | None,
    *,
    force: bool,
    others: Sequence[str] = (),
) -> tuple[Path, Address]:
    """Writes the folder. `others`: further coordinators of the run; which one leads changes. Raises
    ConfigError (nothing is written then) and SwarmUnreachable."""
    if ticket is None and coordinator is None:
        raise ConfigError("whom to watch? thinwire monitor TICKET, or thinwire monitor --coordinator URL")
    name = "thinwire"
    if coordinator is not None:
        address = Address.parse(coordinator)
        try:
            ask(address, token)
        except Silent as e:  # it may be started later, or be reached from where Prometheus will run only
            log.warning("%s; the configuration is written nevertheless", e)
    else:
        assert ticket is not None
        address, name = of_ticket(Ticket.parse(ticket), token)
    beside = [Address.parse(text) for text in others]
    if any(other.scheme != address.scheme for other in beside):
        raise ConfigError("--coordinator: either all by http or all by https")
    folder = (folder or Path(f"{_plain(name)}-monitoring")).absolute()
    write(folder, address, token, force=force, others=beside)
    return folder, address


def of_ticket(ticket: Ticket, token: str | None) -> tuple[Address, str]:
    """Where the coordinator is reached from here, and what its run is called."""
    with StatusClient(ticket) as client:
        status = client.fetch()
    http = status.get("http")
    if http is None:
        raise ConfigError(
            f"the coordinator of this run serves no HTTP: {_SERVE_IT}. Where something else answers for it, "
            f"name that with --coordinator URL"
        )
    known = {peer["peer_id"] for peer in status["peers"]}
    why = []
    for address in _candidates(http["host"], http["port"], client.addresses):
        try:
            if ask(address, token) <= known:
                return address, status["run"]
            why.append(f"{address}: the coordinator of another run answers")
        except Silent as e:
            why.append(str(e))
    raise ConfigError(
        f"the coordinator serves HTTP at {http['host']}:{http['port']} of its machine, which cannot be "
        f"reached from here ({'; '.join(why)}). Run this on its machine, make a tunnel (ssh -L "
        f"{http['port']}:127.0.0.1:{http['port']} ITS-HOST) and add --coordinator "
        f"http://127.0.0.1:{http['port']}, or {_SERVE_IT}"
    )


class Silent(ConfigError):
    """No coordinator answers there."""


def ask(address: Address, token: str | None) -> set[str]:
    """The peers that are to be scraped there. Raises ConfigError, `Silent` if nobody answers."""
    request = urllib.request.Request(f"{address}/sd")
    if token:
        request.add_header("Authorization", f"Bearer {token}")
    no_proxy = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with no_proxy.open(request, timeout=_TIMEOUT_S) as answer:
            targets = json.load(answer)
        return {target["labels"]["instance"] for target in targets}
    except urllib.error.HTTPError as e:
        with e:
            if e.code == 401:
                said = "another one than was given" if token else "one"
                raise ConfigError(
                    f"{address} asks for a token, {said}: add --http-token TOKEN, the one that the "
                    f"coordinator was started with (or set THINWIRE_HTTP_TOKEN)"
                ) from e
            if e.code == 403:
                why = e.read(500).decode(errors="replace").strip()
                raise ConfigError(f"{address} is not answered: {why}") from e
            raise ConfigError(f"{address}/sd answers {e.code}: that is no coordinator of thinwire") from e
    except (ValueError, KeyError, TypeError) as e:
        raise ConfigError(f"{address}/sd does not answer as a coordinator of thinwire does") from e
    except OSError as e:
        raise Silent(f"{address} does not answer: {getattr(e, 'reason', e)}") from e


def write(
    folder: Path, address: Address, token: str | None, *, force: bool, others: Sequence[Address] = ()
) -> None:
    """All files, none half-written. Raises ConfigError if one is there already and `force` is not given."""
    files = contents(folder, address)
    files[MAIN] = _with_others(files[MAIN], address, others)
    there = [name for name in (*files, TOKEN) if (folder / name).exists()]
    if there and not force:
        raise ConfigError(
            f"{folder} has {', '.join(sorted(there)[:3])}{' and others' if len(there) > 3 else ''} already: "
            f"name another folder, or write over them with --force ({KEPT} and data are kept)"
        )
    try:
        for name in DATA:
            (folder / name).mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            if name != KEPT or name not in there:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                write_aside(folder / name, text.encode())
        write_aside(folder / TOKEN, (token or "").encode(), 0o600)
    except OSError as e:
        raise ConfigError(f"{folder} cannot be written: {e.strerror}") from e


def contents(folder: Path, address: Address) -> dict[str, str]:
    """Name -> text. `folder`: absolute, as Grafana wants the path of its dashboards."""
    source = source_folder()
    replaced = {
        "http://coordinator:9100": str(address),
        "coordinator:9100": address.host,
        "scheme: http": f"scheme: {address.scheme}",
        "alertmanager:9093": "127.0.0.1:9093",
        "prometheus:9090": "127.0.0.1:9090",
        f'"{_DASHBOARDS}"': json.dumps(str(folder / "grafana/dashboards")),
        '"1000:1000"': f'"{os.getuid()}:{os.getgid()}"',
    }
    paths = [*source.glob("*.yml"), *source.glob("rules/*.yml"), *source.glob("grafana/**/*.[jy][sm][ol]*")]
    return {str(p.relative_to(source)): _replace(p.read_text("utf-8"), replaced) for p in sorted(paths)}


def _with_others(text: str, address: Address, others: Sequence[Address]) -> str:
    """Prometheus asks these, too: how they are, and for nodes, which only the one that leads knows."""
    hosts = [address.host, *(other.host for other in others)]
    text = text.replace(json.dumps([address.host]), json.dumps(hosts))
    at = text.index(f"      - url: {address}/sd")
    return text + "".join(text[at:].replace(str(address), str(other)) for other in others)


def source_folder() -> Path:
    """deploy/monitoring, wherever it is installed: a package without code, which `importlib.resources` does
    not find in an editable install."""
    spec = find_spec("thinwire.monitoring")
    for path in (spec and spec.submodule_search_locations) or ():
        if (Path(path) / "prometheus.yml").exists():
            return Path(path)
    raise ConfigError("thinwire.monitoring is not installed: install thinwire again (make setup)")


def how_to_start(folder: Path, address: Address) -> str:
    """For people."""
    return f"""\
{folder} watches the swarm at {address}. Start it with Docker:

  docker compose -f {folder}/compose.yml up -d

or with the programs themselves (Debian: prometheus, prometheus-alertmanager; Grafana from grafana.com):

  prometheus --config.file={folder}/prometheus.yml --storage.tsdb.path={folder}/data/prometheus \\
    --web.listen-address=127.0.0.1:9090
  alertmanager --config.file={folder}/alertmanager.yml --storage.path={folder}/data/alertmanager \\
    --web.listen-address=127.0.0.1:9093 --cluster.listen-address=
  GF_PATHS_PROVISIONING={folder}/grafana/provisioning GF_PATHS_DATA={folder}/data/grafana \\
    GF_SERVER_HTTP_ADDR=127.0.0.1 grafana server --homepath /usr/share/grafana

Dashboard: http://127.0.0.1:3000/d/thinwire   alerts: http://127.0.0.1:9090/alerts
Say in {folder}/{KEPT} whom alerts are sent to; nobody is told yet."""


def _candidates(host: str, port: int, addresses: Sequence[str]) -> list[Address]:
    """Where to try what a coordinator is bound to: everywhere means each of the ticket's addresses; and this
    machine, to which a container's port may be published."""
    if host not in ("0.0.0.0", "::"):
        return [Address("http", f"[{host}]:{port}" if ":" in host else f"{host}:{port}")]
    found = []
    for multiaddr in addresses:
        _, kind, name, *_ = multiaddr.split("/")
        found.append(Address("http", f"[{name}]:{port}" if kind == "ip6" else f"{name}:{port}"))
    return list(dict.fromkeys([*found, Address("http", f"127.0.0.1:{port}")]))


def _replace(text: str, replaced: Mapping[str, str]) -> str:
    pattern = re.compile("|".join(re.escape(old) for old in replaced))
    return pattern.sub(lambda found: replaced[found.group()], text)


def _plain(name: Any) -> str:
    """As part of a file's name."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", str(name)).strip(".-") or "thinwire"
