"""What is measured, one function each. A measurement gives its row of the table as a dictionary."""

import concurrent.futures
import contextlib
import math
import os
import shutil
import statistics
import subprocess
import time
from pathlib import Path

from proxies import Proxies
from stage import wait_for_200

HELLO = Path(__file__).resolve().parent.parent / "examples/hello"
MIB = 1024 * 1024
MEASUREMENTS = {}


def measurement(name, needs_podman=False):
    def register(function):
        function.needs_podman = needs_podman
        MEASUREMENTS[name] = function
        return function

    return register


def seconds(work):
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def p95(values):
    return sorted(values)[math.ceil(len(values) * 0.95) - 1]


def comparison(what, ours, peer, theirs, limit):
    """A row of two series that were measured in pairs."""
    ratio = statistics.median(own / other for own, other in zip(ours, theirs))
    return {
        "what": what,
        "median": statistics.median(ours),
        "p95": p95(ours),
        "against": {"what": peer, "median": statistics.median(theirs), "p95": p95(theirs)},
        "ratio": ratio,
        "reach": f"<= {limit} x",
        "reached": ratio <= limit,
        "samples": {"ours": ours, "against": theirs},
    }


def in_pairs(rounds, ours, theirs, before=lambda: None):
    """Times both, in turns, one going first in even rounds and the other in odd ones; `before` each, untimed."""
    series = ([], [])
    for number in range(rounds):
        for which in (0, 1) if number % 2 == 0 else (1, 0):
            before()
            series[which].append((ours, theirs)[which]())
    return series


def until_exec(stage, size_class=None):
    """Seconds from the command that creates a sandbox until its first command has answered."""
    made = []

    def work():
        made.append(stage.create(size_class))
        stage.run("exec", made[0], "--", "true")

    took = seconds(work)
    stage.remove(made[0])
    return took


def until_200(stage):
    """Seconds from the command that deploys examples/hello until its URL answers."""
    made = []

    def work():
        flags = ["--port", "8080", "--start-command", "python3 app.py", "--size-class", stage.size_class]
        made.append(stage.json("deploy", str(HELLO), *flags))
        wait_for_200(made[0]["urls"][0]["url"] + "/")

    took = seconds(work)
    stage.remove(made[0]["id"])
    return took


@measurement("create", needs_podman=True)
def create(stage, options):
    """`create` of a warm image until the first `exec` has answered, against `podman run --rm IMAGE true`."""
    # What a create leaves to be done afterwards must not fall into podman's turn.
    return create_against_podman(stage, options, "create until first exec", stage.wait_for_pool)


def create_without_pool(size_class):
    """The same without a warm pool: each is a fresh clone of the template. Its start is not throttled by its size class."""

    def measure(stage, options):
        stage.configure("reserve = 0\n")
        try:
            what = f"the same without a warm pool, {size_class}"
            return create_against_podman(stage, options, what, lambda: None, 2.2, size_class)
        finally:
            stage.configure("")

    return measure


for size_class in ("micro", "mini", "small"):
    measurement(f"unpooled-{size_class}", needs_podman=True)(create_without_pool(size_class))


@measurement("burst", needs_podman=True)
def creates_in_a_row(stage, options):
    """Nine creates one after another, each until its first exec, after a minute of quiet and sandboxes of other kinds."""
    stage.prepare_podman()

    def ours():
        made = stage.create()
        stage.run("exec", made, "--", "true")
        return made

    for _ in range(3):
        stage.remove(ours())
    for other in ("micro", "mini", "medium"):
        stage.remove(stage.create(other))
    time.sleep(60)
    made, own = [], []
    for _ in range(9):
        own.append(seconds(lambda: made.append(ours())))
    for sandbox in made:
        stage.remove(sandbox)
    other = [seconds(stage.podman_run) for _ in range(9)]
    row = comparison("nine creates in a row after a minute of quiet", own, "podman run --rm true", other, 0.7)
    # They were not measured in pairs: the row is of the medians.
    ratio = row["median"] / row["against"]["median"]
    return {**row, "ratio": ratio, "reached": ratio <= 0.7}


def create_against_podman(stage, options, what, before, limit=1.0, size_class=None):
    stage.prepare_podman()

    def ours():
        return until_exec(stage, size_class)

    def theirs():
        return seconds(stage.podman_run)

    ours(), theirs()  # what only the first one pays
    own, other = in_pairs(options.rounds, ours, theirs, before)
    return comparison(what, own, "podman run --rm true", other, limit)


@measurement("exec", needs_podman=True)
def execute(stage, options):
    """`exec true` in a running sandbox against `podman exec true`."""
    stage.prepare_podman()
    sandbox = stage.create()
    stage.podman_run("--detach", "--name", "peer", command=("sleep", "3600"))

    def ours():
        return seconds(lambda: stage.run("exec", sandbox, "--", "true"))

    def theirs():
        return seconds(lambda: stage.podman("exec", "peer", "true"))

    ours(), theirs()
    own, other = in_pairs(options.rounds, ours, theirs)
    stage.remove(sandbox)
    stage.podman("rm", "--force", "--time", "0", "peer")
    return comparison("exec true", own, "podman exec true", other, 0.3)


@measurement("deploy")
def deploy(stage, options):
    """`deploy` of examples/hello until HTTP 200 through the proxy, warm, against the cold boot of the same VM."""

    def series(settings, rounds, before=lambda: None):
        stage.configure(settings)
        until_200(stage)  # starts the daemon and loads what only the first one pays
        times = []
        for _ in range(rounds):
            before()
            times.append(until_200(stage))
        return times

    # A daemon either clones or boots, so that pairs are blocks here; few, because a cold boot takes seconds.
    cold, warm = [], []
    for _ in range(max(2, options.rounds // 5)):
        warm += series("", 2, stage.wait_for_pool)
        cold += series("templates = false\n", 2)
    stage.configure("")
    return comparison("deploy until HTTP 200, warm", warm, "cold boot, no template", cold, 0.15)


@measurement("large")
def deploy_large(stage, options):
    """`deploy` of a directory of 200 MB of incompressible files, against `tar cf` of it."""
    directory = stage.directory / "large"
    directory.mkdir()
    for number in range(100):
        (directory / f"{number}.bin").write_bytes(os.urandom(2_000_000))
    tar = stage.directory / "large.tar"

    def ours():
        # Another content each time: what is there already would not be sent.
        (directory / "0.bin").write_bytes(os.urandom(2_000_000))
        made = []
        took = seconds(lambda: made.append(stage.json("deploy", str(directory), "--size-class", stage.size_class)))
        stage.remove(made[0]["id"])
        return took

    def theirs():
        tar.unlink(missing_ok=True)
        return seconds(lambda: subprocess.run(["tar", "cf", tar, "-C", directory, "."], check=True))

    ours(), theirs()
    own, other = in_pairs(max(2, options.rounds // 4), ours, theirs, stage.wait_for_pool)
    shutil.rmtree(directory)
    tar.unlink()
    return comparison("deploy of 200 MB of random files", own, "tar cf", other, 3)


def builds(stage, other, options):
    """What a user waits for, by this build against another one: both daemons are there, and take turns."""

    def execute(at):
        sandbox = at.create()
        return lambda: seconds(lambda: at.run("exec", sandbox, "--", "true"))

    def both_rest():
        stage.wait_for_pool()
        other.wait_for_pool()

    for what, of, before in (
        ("create until first exec", lambda at: lambda: until_exec(at), both_rest),
        ("deploy until HTTP 200", lambda at: lambda: until_200(at), both_rest),
        ("exec true", execute, lambda: None),
    ):
        ours, theirs = of(stage), of(other)
        ours(), theirs()  # what only the first one pays
        own, peer = in_pairs(options.rounds, ours, theirs, before)
        yield comparison(what, own, "the other build", peer, 1.05)


@contextlib.contextmanager
def idle_machines(stage, seconds):
    """Processes of four sandboxes that have run one command each, so many seconds ago, and no others."""
    stage.configure("reserve = 0\n")
    sandboxes = [stage.create() for _ in range(4)]
    for sandbox in sandboxes:
        stage.run("exec", sandbox, "--", "true")
    time.sleep(seconds)
    yield list(stage.machines())
    for sandbox in sandboxes:
        stage.remove(sandbox)
    stage.configure("")


@measurement("memory")
def memory(stage, _options):
    """Private memory of idle sandboxes, ten seconds after their creation."""
    with idle_machines(stage, 10) as machines:
        private = sorted(private_bytes(pid) / MIB for pid in machines)
    median = statistics.median(private)
    return {
        "what": "private memory of an idle sandbox",
        "median": f"{median:.0f} MiB",
        "p95": f"{p95(private):.0f} MiB",
        "reach": "<= 64 MiB",
        "reached": len(private) == 4 and median <= 64,
        "samples": {"ours": private},
    }


def private_bytes(pid):
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Private_"))


@measurement("idle")
def idle(stage, _options):
    """Processor time of idle sandboxes over a minute, half a minute after their first command."""
    window = 60
    with idle_machines(stage, 30) as machines:
        before = [processor_seconds(pid) for pid in machines]
        time.sleep(window)
        shares = sorted(100 * (processor_seconds(pid) - past) / window for pid, past in zip(machines, before))
    median = statistics.median(shares)
    return {
        "what": "processor time of an idle sandbox",
        "median": f"{median:.2f} %",
        "p95": f"{p95(shares):.2f} %",
        "against": {"what": "one core"},
        "ratio": median / 100,
        "reach": "<= 0.2 %",
        "reached": len(shares) == 4 and median <= 0.2,
        "samples": {"ours": shares},
    }


def processor_seconds(pid):
    """Exact, where /proc/PID/stat counts in hundredths of a second."""
    threads = Path(f"/proc/{pid}/task").glob("*/schedstat")
    return sum(int(thread.read_text().split()[0]) for thread in threads) / 1e9


@measurement("many")
def many(stage, options):
    """Many sandboxes, ten at a time: all answer `exec`, and this many are made a second."""
    count, made, failures = options.sandboxes, [], []

    def one(_):
        try:
            sandbox = stage.create("micro")
            made.append(sandbox)
            stage.run("exec", sandbox, "--", "true")
        except (subprocess.CalledProcessError, ValueError) as error:
            failures.append(f"{error} {getattr(error, 'stderr', '')}")

    started = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(10) as pool:
        list(pool.map(one, range(count)))
        took = time.perf_counter() - started
        alive = sum(pool.map(lambda sandbox: stage.run("exec", sandbox, "--", "true", check=False).returncode == 0, made))
        list(pool.map(stage.remove, made))
    return {
        "what": f"{count} sandboxes, 10 at a time",
        "median": f"{alive} answer",
        "p95": f"{count / took:.1f} a second",
        "reach": f"{count} of {count}, >= 4 a second",
        "reached": alive == count and not failures and count / took >= 4,
        "failures": failures,
    }


@measurement("edge")
def edge(_stage, options):
    """Requests per second through the edge and their p99, against nginx before the same upstream on loopback."""
    with Proxies() as proxies:
        for proxy in proxies.names:
            proxies.load(proxy)
        rounds = [
            {proxy: proxies.load(proxy) for proxy in (proxies.names if number % 2 == 0 else proxies.names[::-1])}
            for number in range(max(3, options.rounds // 4))
        ]
    rate = statistics.median(each["edge"]["rate"] / each["nginx"]["rate"] for each in rounds)
    late = statistics.median(each["edge"]["p99"] / each["nginx"]["p99"] for each in rounds)

    def middle(proxy, what):
        return statistics.median(each[proxy][what] for each in rounds)

    return {
        "what": f"edge: {middle('edge', 'rate'):.0f} requests/s, p99",
        "median": middle("edge", "p99"),
        "against": {"what": f"nginx: {middle('nginx', 'rate'):.0f} requests/s, p99", "median": middle("nginx", "p99")},
        "ratio": late,
        "rate_ratio": rate,
        "reach": f">= 0.8 x ({rate:.2f} x) and <= 1.5 x",
        "reached": rate >= 0.8 and late <= 1.5,
        "samples": rounds,
    }
