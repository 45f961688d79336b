"""A real Prometheus on the committed configuration, with only targets and intervals replaced."""

import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, TypeVar

import httpx
import yaml

from tests.dashboards.queries import FOLDER, Query, Variable
from tests.programs import require_program

SCRAPE_SECONDS: Final = 1  # fifteen in the committed file; a test has no time for that
RATE_INTERVAL: Final = f"{4 * SCRAPE_SECONDS}s"  # Grafana's rule: at least four scrapes
START_SECONDS: Final = 30.0
REQUEST_SECONDS: Final = 10.0
POLL_SECONDS: Final = 0.1
WINDOW_SECONDS: Final = 600  # as long as any test lasts

_Answer = TypeVar("_Answer")


def free_port() -> int:
    """A TCP port of the loopback interface that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(
    what: str,
    attempt: Callable[[], _Answer | None],
    seconds: float,
    work: Callable[[], int] | None = None,
) -> _Answer:
    """The first answer that is neither None nor empty; fails naming `what` when time is up.

    `work` counts what has been done so far: time then starts again with every step, so a loaded
    machine has as long as it needs, up to as many steps as a free one could do in `seconds`.
    """
    deadline = time.monotonic() + seconds
    first = done = 0 if work is None else work()
    while True:
        answer = attempt()
        if answer:
            return answer
        if work is not None and (now := work()) != done:
            done, deadline = now, time.monotonic() + seconds
            assert done - first <= seconds / SCRAPE_SECONDS, f"{what}: nothing after {done} steps"
        assert time.monotonic() < deadline, f"{what}: nothing within {seconds:.0f} s"
        time.sleep(POLL_SECONDS)


class Prometheus:
    """The HTTP API of a running server."""

    def __init__(self, port: int) -> None:
        self._client = httpx.Client(
            base_url=f"http://127.0.0.1:{port}", timeout=REQUEST_SECONDS, trust_env=False
        )

    def ready(self) -> bool:
        """Whether it answers queries yet."""
        try:
            return self._client.get("/-/ready").status_code == httpx.codes.OK
        except httpx.TransportError:
            return False

    def instant(self, expr: str) -> list[dict[str, Any]]:
        """Series with their value now."""
        return self._result("/api/v1/query", {"query": expr})

    def over_time(self, expr: str) -> list[dict[str, Any]]:
        """Series with their values since the test began."""
        now = time.time()
        span = {"start": now - WINDOW_SECONDS, "end": now, "step": SCRAPE_SECONDS}
        return self._result("/api/v1/query_range", {"query": expr, **span})

    def label_values(self, variable: Variable, metric: str) -> list[str]:
        """What a variable offers."""
        answer = self._client.get(
            f"/api/v1/label/{variable.label}/values", params={"match[]": metric}
        )
        values: list[str] = answer.raise_for_status().json()["data"]
        return values

    def scrapes(self) -> int:
        """How many scrapes have succeeded since the test began, of the target that has fewest."""
        found = self.instant(f"sum_over_time(up[{WINDOW_SECONDS}s])")
        return min((int(float(one["value"][1])) for one in found), default=0)

    def alerts(self) -> list[dict[str, Any]]:
        """Pending and firing alerts."""
        found: list[dict[str, Any]] = self._data("/api/v1/alerts", {})["alerts"]
        return found

    def unhealthy(self) -> list[str]:
        """What any target or rule complains of, or that it has not been tried yet."""
        targets = self._data("/api/v1/targets", {"state": "active"})["activeTargets"]
        groups = self._data("/api/v1/rules", {})["groups"]
        parts = [*targets, *(rule for group in groups for rule in group["rules"])]
        return [
            f"{part.get('scrapeUrl', part.get('name'))}: {part['health']} {part['lastError']}"
            for part in ({"lastError": "", **part} for part in parts)
            if part["health"] not in {"up", "ok"}
        ]

    def close(self) -> None:
        """Let go of connections."""
        self._client.close()

    def _data(self, path: str, parameters: dict[str, Any]) -> dict[str, Any]:
        answer = self._client.get(path, params=parameters)
        assert answer.status_code == httpx.codes.OK, f"{parameters}: {answer.text}"
        data: dict[str, Any] = answer.json()["data"]
        return data

    def _result(self, path: str, parameters: dict[str, Any]) -> list[dict[str, Any]]:
        result: list[dict[str, Any]] = self._data(path, parameters)["result"]
        return result


def answers(server: Prometheus, query: Query, *, project: str, policy: str) -> bool:
    """Whether a query, sent as Grafana sends it, has at least one number for an answer."""
    expr = query.filled(project=project, policy=policy, rate_interval=RATE_INTERVAL)
    series = server.instant(expr) if query.instant else server.over_time(expr)
    points = [
        point
        for one in series
        for point in ([one["value"]] if "value" in one else one.get("values", ()))
    ]
    return any(value != "NaN" for _, value in points)


def configuration(folder: Path, targets: dict[str, list[str]]) -> Path:
    """The committed configuration with other targets by job name, and shorter intervals."""
    content = yaml.safe_load((FOLDER / "prometheus.yml").read_text(encoding="utf-8"))
    interval = f"{SCRAPE_SECONDS}s"
    content["global"] = dict.fromkeys(content["global"], interval)
    content["rule_files"] = [str(FOLDER / name) for name in content["rule_files"]]
    names = {scrape["job_name"] for scrape in content["scrape_configs"]}
    assert names == targets.keys(), "a job of prometheus.yml has no target in this test"
    for scrape in content["scrape_configs"]:
        scrape["static_configs"] = [{"targets": targets[scrape["job_name"]]}]
    path = folder / "prometheus.yml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


@contextmanager
def running_prometheus(folder: Path, targets: dict[str, list[str]]) -> Iterator[Prometheus]:
    """A real server scraping `targets`; its process ends with the block, its files stay."""
    program = require_program("prometheus")
    port = free_port()
    command = [
        program,
        f"--config.file={configuration(folder, targets)}",
        f"--storage.tsdb.path={folder / 'tsdb'}",
        f"--web.listen-address=127.0.0.1:{port}",
        "--log.level=warn",
    ]
    log = folder / "prometheus.log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    server = Prometheus(port)
    try:
        wait_for(f"Prometheus ready (see {log})", server.ready, START_SECONDS)
        yield server
    finally:
        server.close()
        process.terminate()
        try:
            process.wait(timeout=START_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(timeout=START_SECONDS)
