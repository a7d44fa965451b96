"""Connecting to a cluster: addresses, what is said if none answers, and the warning about one that asks for no token."""

from __future__ import annotations

import logging
import os
import socket
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from rabbit_engine.cluster import connect, connection
from rabbit_engine.errors import ClusterError, MachinesDifferError, MissingExtraError, RabbitError


class AuthenticationError(Exception):
    """Ray's, which is of no built-in kind."""


class GetTimeoutError(Exception):
    """Ray's."""


class Cluster(SimpleNamespace):
    """A Ray whose `init` raises `refusal`, and whose tasks run here."""

    def __init__(self, refusal: Exception | None = None, connected: str = "") -> None:
        self.refusal, self.connected, self.joined, self.hangs = refusal, connected, [], False
        self.exceptions = SimpleNamespace(
            AuthenticationError=AuthenticationError, GetTimeoutError=GetTimeoutError, RayError=AuthenticationError
        )
        self.util = SimpleNamespace(client=SimpleNamespace(ray=SimpleNamespace(is_connected=lambda: False)))

    def is_initialized(self) -> bool:
        return bool(self.connected)

    def get_runtime_context(self) -> Any:
        return SimpleNamespace(gcs_address=self.connected)

    def init(self, *, address: str, **options: Any) -> None:
        if self.refusal:
            raise self.refusal
        self.joined.append((address, options))

    def remote(self, **_: Any) -> Callable[..., Any]:
        return lambda function: SimpleNamespace(remote=function)

    def get(self, answer: Any, timeout: float) -> Any:
        if self.hangs:
            raise GetTimeoutError
        return answer


@pytest.fixture
def using(monkeypatch: pytest.MonkeyPatch) -> Callable[[Cluster], Cluster]:
    """Makes connections go to a cluster that is not there."""
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setitem(sys.modules, "ray", sys)  # as if imported before

    def use(cluster: Cluster) -> Cluster:
        monkeypatch.setattr(connection, "require_ray", lambda: cluster)
        return cluster

    return use


@pytest.fixture
def listening() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.parametrize("address", ["", "pc", "http://pc:6379", "pc:0", "pc:65536", "pc:6379/x", "ray://pc", "Auto", "pc :1"])
def test_an_address_that_is_none_is_refused_before_anything_is_tried(address: str, using: Any) -> None:
    cluster = using(Cluster())
    with pytest.raises(ClusterError, match="is not the address of a cluster: write"):
        connect(address)
    assert cluster.joined == []


@pytest.mark.parametrize("prefix", ["", "ray://"])
def test_an_address_where_nothing_listens_is_refused_at_once(prefix: str, using: Any) -> None:
    cluster = using(Cluster())
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(ClusterError, match=rf"nothing answers at '{prefix}127\.0\.0\.1:{port}' \(.*refused"):
        connect(f"{prefix}127.0.0.1:{port}")
    assert cluster.joined == []


def test_a_cluster_with_a_token_is_joined_quietly(using: Any, listening: str, caplog: pytest.LogCaptureFixture) -> None:
    cluster = using(Cluster())
    assert connect(f"ray://{listening}") is cluster
    assert connect("auto") is cluster
    assert [address for address, _ in cluster.joined] == [f"ray://{listening}", "auto"]
    assert caplog.records == []


def test_a_cluster_without_one_is_joined_with_a_warning(
    using: Any, listening: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    using(Cluster())
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    connect(listening)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert f"{listening} asks for no token: anyone who reaches it can run any code" in record.getMessage()


def test_a_cluster_of_this_machine_alone_has_no_dashboard(using: Any) -> None:
    cluster = using(Cluster())
    connect("local")
    assert cluster.joined[0][1]["include_dashboard"] is False


def test_a_cluster_that_runs_no_task_is_refused(using: Any, listening: str) -> None:
    using(Cluster()).hangs = True
    with pytest.raises(ClusterError, match="ran no task within 60 s"):
        connect(listening)


def test_a_missing_token_and_a_wrong_one_are_told_apart(using: Any, listening: str, monkeypatch: pytest.MonkeyPatch) -> None:
    using(Cluster(AuthenticationError("no token was found")))
    with pytest.raises(ClusterError, match=r"no token for the cluster at .*: copy that of its machines to ~/\.ray/auth_token"):
        connect(listening)
    using(Cluster(ConnectionError("Failed to connect to Ray cluster")))
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
    with pytest.raises(ClusterError, match=r"not the head of a cluster, or the token in ~/\.ray/auth_token is not the cluster's"):
        connect(listening)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "/a/file")
    with pytest.raises(ClusterError, match=r"not the client server of a head, or the token that RAY_AUTH_TOKEN_PATH names"):
        connect(f"ray://{listening}")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with pytest.raises(ClusterError, match="it asks for a token and RAY_AUTH_MODE is 'disabled'"):
        connect(listening)


def test_ray_tries_once_with_a_wrong_token_and_as_long_as_ever_otherwise(
    using: Any, listening: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    variable, tries = "RAY_gcs_server_port_wait_time_s", []
    monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0" * 64)
    cluster = using(Cluster())

    def failing(*words: str) -> None:
        told = iter(words)
        tries.clear()

        def init(**_: Any) -> None:
            tries.append(os.environ.get(variable))
            if word := next(told):
                raise ConnectionError("Failed to connect to Ray cluster") from RuntimeError(word)

        monkeypatch.setattr(cluster, "init", init, raising=False)

    failing("Failed to connect to GCS. Last connection error: Traceback\nAuthenticationError: RPC error: InvalidAuthToken: ...")
    with pytest.raises(ClusterError, match=rf"^the cluster at '{listening}' refuses the token in RAY_AUTH_TOKEN: copy that"):
        connect(listening)
    assert (tries, variable in os.environ) == (["1"], False)
    failing("Failed to connect to GCS.", "")  # a head that takes a while
    connect(listening)
    assert tries == ["1", None]
    failing("Failed to connect to GCS.", "Failed to connect to GCS.")
    with pytest.raises(ClusterError, match="no Ray cluster answers"):
        connect(listening)
    monkeypatch.setattr(connection, "_ENOUGH_S", -1.0)  # as if that try had taken long
    failing("Failed to connect to GCS.")
    with pytest.raises(ClusterError, match="no Ray cluster answers"):
        connect(listening)
    assert tries == ["1"]
    monkeypatch.setenv(variable, "7")
    failing("Failed to connect to GCS.")
    with pytest.raises(ClusterError, match="no Ray cluster answers"):
        connect(listening)
    assert tries == ["7"]


def test_without_a_cluster_auto_says_how_to_start_one(using: Any) -> None:
    using(Cluster(ConnectionError("Could not find any running Ray instance.")))
    with pytest.raises(ClusterError, match=r"answers at 'auto' \(Could not find.*\): start one with `ray start --head`"):
        connect("auto")


def test_another_version_of_ray_is_named(using: Any, listening: str) -> None:
    using(Cluster(RuntimeError("Version mismatch: The cluster was started with:\n    Ray: 2.59.0\n    Python: 3.12.1\n")))
    with pytest.raises(MachinesDifferError, match=r"has other versions: .*started with: Ray: 2\.59\.0 Python: 3\.12\.1"):
        connect(listening)


def test_a_process_that_is_connected_stays_with_its_cluster(using: Any) -> None:
    cluster = using(Cluster(connected="127.0.0.1:6379"))
    for same in ("auto", "local", "127.0.0.1:6379", "ray://elsewhere:10001"):
        assert connect(same) is cluster
    for other in ("127.0.0.1:6380", "127.0.0.2:6379"):
        with pytest.raises(ClusterError, match=rf"connected to the cluster at '127\.0\.0\.1:6379', not '{other}'"):
            connect(other)
    assert cluster.joined == []


def test_authentication_is_asked_for_unless_the_user_says_otherwise(using: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    using(Cluster())
    monkeypatch.delitem(sys.modules, "ray")
    monkeypatch.delenv("RAY_AUTH_MODE")
    connect("local")
    assert os.environ["RAY_AUTH_MODE"] == "token"
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    connect("local")
    assert os.environ["RAY_AUTH_MODE"] == "disabled"


def test_without_ray_the_error_names_the_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtraError, match="a cluster needs a package that is not installed"):
        connect("auto")
    assert issubclass(MissingExtraError, RabbitError)
