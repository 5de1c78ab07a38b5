"""Keys, ids, CORS and counting: the same policy on every route."""

import re
import socket

import pytest
from fake_engine import FakeEngine
from live_server import LiveServer

from openai_api.app import create_app
from openai_api.config import ServerConfig
from runtime.errors import ConfigError

OPEN = {"/health", "/live", "/ready", "/ping", "/version", "/metrics"}  # a longer list is a decision, not a slip
KEYS = ["sesame", "öffne-dich"]


@pytest.fixture(scope="module")
def locked():
    server = LiveServer(FakeEngine(), ServerConfig(api_keys=KEYS, enable_tokenizer_info_endpoint=True))
    yield server
    server.close()


def get(server, headers, path="/v1/models"):
    return server.client.get(path, headers=headers)


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
@pytest.mark.parametrize("key", KEYS)
def test_a_key_opens(locked, scheme, key):
    assert get(locked, [(b"authorization", f"{scheme} {key}".encode())]).status_code == 200


WRONG = [
    b"", b"Bearer", b"Bearer wrong", b"Basic sesame", b"sesame", b"Bearer  sesame", b"Bearer sesame x",
    b"Bearer \xff\xfe", "Bearer öffne".encode(), b"Bearer sesam", b"Bearer " + b"a" * 10_000,
]  # fmt: skip


@pytest.mark.parametrize("value", WRONG, ids=lambda value: repr(value)[:30])
def test_a_wrong_key_does_not(locked, value):
    response = get(locked, [(b"authorization", value)])
    error = response.json()["error"]
    assert response.status_code == 401 and response.headers["www-authenticate"] == "Bearer"
    assert error["code"] == 401 and "sesame" not in error["message"]


def test_two_headers_are_no_key(locked):
    both = [(b"authorization", b"Bearer sesame"), (b"authorization", b"Bearer wrong")]
    assert get(locked, both).status_code == 401 and get(locked, []).status_code == 401


def test_every_route_needs_a_key_but_those_on_the_list(locked):
    seen = set()
    for route in locked.app.router.routes:
        path = "/" + re.sub(r"<.*?>", "x", route.path)
        for method in route.methods:
            status = locked.client.request(method, path).status_code
            assert (status != 401) == (path in OPEN), (method, path, status)
            seen.add(path)
    assert {"/v1/completions", "/tokenize", "/load", "/tokenizer_info"} | OPEN <= seen


@pytest.mark.parametrize("path", ["/nothing", "/v1/models/", "//v1/models", "/health/../v1/models", "/v1/%6dodels"])
@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "DELETE", "PATCH"])
def test_odd_paths_are_no_way_round(locked, path, method):
    with socket.create_connection(("127.0.0.1", locked.port), 5) as sock:
        sock.sendall(f"{method} {path} HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode())
        status = sock.makefile("rb").readline().split()[1]
    assert status == (b"404" if path.startswith("//") else b"401")


def test_the_body_is_not_read_before_the_key(locked):
    with socket.create_connection(("127.0.0.1", locked.port), 5) as sock:
        head = "POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
        sock.sendall(f"{head}Content-Length: 1000000\r\n\r\n".encode())
        assert sock.makefile("rb").readline().split()[1] == b"401"


@pytest.mark.parametrize("config, says", [({"api_keys": [""]}, "empty"), ({"allow_credentials": True}, "origins")])
def test_settings_that_would_leave_it_open_stop_the_start(config, says):
    with pytest.raises(ConfigError, match=says):
        create_app(FakeEngine(), ServerConfig(**config))


def ask(server, headers=(), **fields):
    return server.post("/v1/completions", {"prompt": "a", "max_tokens": 1, **fields}, headers=dict(headers))


def test_the_clients_id_names_the_answer(serve):
    server = serve()
    assert ask(server, {"x-request-id": "abc.1"}, request_id="zzz").json()["id"] == "cmpl-abc.1"
    assert ask(server, request_id="zzz").json()["id"] == "cmpl-zzz"
    assert re.fullmatch("cmpl-[0-9a-f]{32}", ask(server).json()["id"])
    assert "x-request-id" not in ask(server, {"x-request-id": "abc.1"}).headers


@pytest.mark.parametrize(
    "value, kept", [("abc-1", True), ("a" * 129, False), ("a b", False), ("ä", False), ("", False)]
)
def test_only_plain_ids_come_back(serve, value, kept):
    server = serve(config={"enable_request_id_headers": True})
    answer = ask(server, {"x-request-id": value.encode()})
    assert (answer.headers["x-request-id"] == value) == kept and answer.headers.get_list("x-request-id") != []
    assert kept or re.fullmatch("[0-9a-f]{32}", answer.headers["x-request-id"])
    assert "x-request-id" in server.client.get("/nothing").headers


def preflight(server, origin):
    headers = {"origin": origin, "access-control-request-method": "POST", "access-control-request-headers": "x-a"}
    return server.client.options("/v1/completions", headers=headers)


def test_cors_lets_anyone_in_by_default(serve):
    server = serve()
    assert ask(server, {"origin": "http://a"}).headers["access-control-allow-origin"] == "*"
    answer = preflight(server, "http://a")
    assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == "*"
    assert "POST" in answer.headers["access-control-allow-methods"]
    assert answer.headers["access-control-allow-headers"] == "x-a" and server.engine.seen[1:] == []
    assert "access-control-allow-origin" not in ask(server).headers


def test_cors_can_be_narrowed(serve):
    server = serve(config={"allowed_origins": ["http://a"], "allow_credentials": True, "api_keys": ["k"]})
    good, bad = preflight(server, "http://a"), preflight(server, "null")
    assert good.status_code == 200 and good.headers["access-control-allow-origin"] == "http://a"
    assert good.headers["access-control-allow-credentials"] == "true" and good.headers["vary"] == "Origin"
    assert bad.status_code == 400 and "access-control-allow-origin" not in bad.headers


def test_cors_methods_and_headers_can_be_narrowed(serve):
    answer = preflight(serve(config={"allowed_methods": ["GET"], "allowed_headers": ["x-b", "x-c"]}), "http://a")
    assert answer.headers["access-control-allow-methods"] == "GET"
    assert answer.headers["access-control-allow-headers"] == "x-b, x-c"


def test_a_root_path_is_served_beside_the_plain_one(serve):
    server = serve(config={"root_path": "/llm/", "api_keys": ["k"]})
    headers = {"authorization": "Bearer k"}
    for path in ("/v1/models", "/llm/v1/models"):
        assert server.client.get(path, headers=headers).status_code == 200
        assert server.client.get(path).status_code == 401
    assert server.client.get("/llm/health").status_code == server.client.get("/health").status_code == 200


def lines(server, name):
    text = server.client.get("/metrics").text
    return sorted(line for line in text.splitlines() if line.startswith(name + "{") or line.startswith(name + " "))


def test_requests_are_counted_by_route_and_kind_of_status(serve):
    server = serve()
    ask(server), ask(server), ask(server, model="huge"), server.events("/v1/completions", {"prompt": "a"})
    server.client.get("/nothing"), server.client.get("/odd/" + "x" * 50), server.client.get("/health")
    assert lines(server, "http_requests_total") == [
        'http_requests_total{handler="/v1/completions",method="POST",status="2xx"} 3.0',
        'http_requests_total{handler="/v1/completions",method="POST",status="4xx"} 1.0',
        'http_requests_total{handler="other",method="GET",status="4xx"} 2.0',
    ]
    (size,) = [line for line in lines(server, "http_response_size_bytes_sum") if "completions" in line]
    assert float(size.split()[-1]) > 1000


def test_an_access_line_names_no_secret(serve, caplog):
    server = serve(config={"api_keys": ["sesame"]})
    with caplog.at_level("INFO", logger="openai_api.access"):
        server.client.get("/v1/models?key=sesame%1b[31m", headers={"authorization": "Bearer sesame"})
        server.wait_for(lambda: caplog.records)
    (record,) = caplog.records
    assert re.fullmatch(r"GET /v1/models 200 \d+\.\d{3}s", record.getMessage())
