"""What schemathesis cannot know of the APIs: how archives are sent, what is there to be asked for, what takes long."""

import io
import os
import tarfile
import zlib

import schemathesis

# The ids of two sandboxes: one is stopped, resized and the like, so that the other one always answers.
STEADY, MOVING = os.environ["SCHEMA_STEADY"], os.environ["SCHEMA_MOVING"]
# An image that is here, and a registry that has none.
IMAGE, REGISTRY = os.environ["SCHEMA_IMAGE"], os.environ["SCHEMA_REGISTRY"]

MOVES = {"stop", "start", "restart", "resize", "checkpoint", "restore", "replace-mount", "ttl", "mounts"}


def tar(mode):
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode=mode) as archive:
        archive.addfile(tarfile.TarInfo("file"))
    return packed.getvalue()


COMMAND = {"command": "echo out; echo err >&2; exit 3"}
WRITTEN = {"file_path": "some/file", "content": "aGVsbG8="}
# What hardly comes about by chance: calls that succeed.
MEANT = {
    "POST /sandboxes/{id}/execute": {"body": COMMAND},
    "POST /sandbox/{id}/exec": {"body": COMMAND},
    "POST /sandboxes/{id}/files/upload": {"body": WRITTEN},
    "POST /sandbox/{id}/write-file": {"body": WRITTEN},
    "POST /sandbox/{id}/read-file": {"body": {"mount_path": "/etc", "file_path": "hostname"}},
    "GET /sandboxes/{id}/files/download": {"query": {"mount_path": "/etc", "file_path": "hostname"}},
    "PUT /sandboxes/{id}/files/tar": {"query": {"path": "/tmp/there"}, "body": tar("w")},
    "PUT /archives": {"query": {}, "body": tar("w:gz")},
    "POST /sandboxes/{id}/proxy": {"body": {"port": 8081}},
    "DELETE /sandboxes/{id}/proxy": {"query": {"port": 8081}},
    "POST /sandboxes/{id}/resize": {"body": {"disk_size_gb": 12}},
}

MAKES = {"POST /sandboxes", "POST /sandbox-deploy"}


@schemathesis.serializer("application/gzip", "application/x-tar")
def as_it_is(context, value):
    return {"data": value if isinstance(value, bytes) else str(value).encode()}


@schemathesis.hook
def before_call(context, case, kwargs):
    mean_it(case)
    name_what_is_there(case)
    be_quick(case)


def mean_it(case):
    if one_of(3, (case.body, case.query)) == 0:
        for part, value in MEANT.get(case.operation.label, {}).items():
            setattr(case, part, value.copy() if isinstance(value, dict) else value)


def name_what_is_there(case):
    """Most calls are for a sandbox that is there; none removes it or lets it end soon. No other registry is asked."""
    path, parameters = case.operation.path, case.path_parameters
    of_a_sandbox = path.startswith(("/sandboxes/{id}", "/sandbox/{id}", "/deployed-sandboxes/{id}"))
    if path == "/api/api-keys/{id}":
        # The run's own key is among those that answers have told of.
        parameters["id"] = "gone"
    last = path.rsplit("/", 1)[1]
    if of_a_sandbox and case.method == "DELETE" and last == "{id}":
        # Answers have told of these, too.
        if parameters.get("id") in (STEADY, MOVING):
            parameters["id"] = "gone"
    elif of_a_sandbox and one_of(4, parameters.get("id")) != 0:
        parameters["id"] = MOVING if last in MOVES else STEADY
    body = case.body
    if not isinstance(body, dict):
        return
    if isinstance(body.get("sandbox_id"), str) and one_of(4, body["sandbox_id"]) != 0:
        body["sandbox_id"] = STEADY
    if isinstance(body.get("image"), str):
        body["image"] = f"{REGISTRY}/{body['image']}"
    if case.operation.label in MAKES:
        if body.get("image") is None:
            body["image"] = IMAGE
        # What is made is soon gone: dozens of machines would leave the host no time for anything else.
        if body.get("ttl_seconds") is None or isinstance(body["ttl_seconds"], int) and body["ttl_seconds"] > 10:
            body["ttl_seconds"] = 10
    elif isinstance(body.get("ttl_seconds"), int) and body["ttl_seconds"] > 0:
        body["ttl_seconds"] += 3600


def be_quick(case):
    """Nobody waits for what does not come."""
    query, body = case.query, case.body
    if case.operation.path.endswith("/wait") and isinstance(query, dict):
        query.setdefault("timeout_seconds", 0.1)
    if case.operation.path.endswith("/logs") and isinstance(query, dict) and query.get("follow") in (True, "true", "1", ""):
        # It ends with the start command, and there is none.
        query["follow"] = "false"
    if isinstance(query, dict):
        shorten(query, "timeout_seconds")
    if isinstance(body, dict):
        shorten(body, "timeout_seconds")
        shorten(body, "health_timeout_seconds")


def shorten(values, name):
    if isinstance(values.get(name), (int, float)) and values[name] > 1:
        values[name] = 1


def one_of(many, value):
    """The same number for the same value: whoever repeats a call gets it again."""
    return zlib.crc32(str(value).encode(errors="surrogatepass")) % many
