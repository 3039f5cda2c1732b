"""Where the measurements happen: a heyvm home of their own, and podman with the same image."""

import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

SHARED = ["images", "kernels", "templates", "jail"]
PODMAN_RUN = ["--rm", "--network", "none", "--runtime", "runc", "--ulimit", "nofile=1024:1024", "--ulimit", "nproc=4096:4096"]
PODMAN_IMAGE = "heyvm-bench:default"


class Stage:
    """A daemon with an empty state that shares kernel, images and templates with a prepared home."""

    def __init__(self, heyvm, prepared, size_class):
        self.heyvm, self.prepared, self.size_class = str(heyvm), prepared.resolve(), size_class

    def __enter__(self):
        # Short, because a Unix socket's path has 107 bytes at most.
        self.directory = Path(tempfile.mkdtemp(prefix="hvb-", dir="/tmp"))
        self.home = self.directory / "h"
        self.home.mkdir()
        for name in SHARED:
            (self.home / name).symlink_to(self.prepared / name)
        self.configure("")
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith(("HEYO_", "HEYVM_"))}
        self.environment["HEYO_HOME"] = str(self.home)
        self.podman_ready = False
        return self

    def __exit__(self, *_):
        for sandbox in json.loads(self.run("list", "--format", "json", check=False).stdout or "[]"):
            self.remove(sandbox["id"])
        if self.podman_ready:
            self.podman("rm", "--all", "--force", check=False)
            subprocess.run(["umount", "-q", str(self.directory / "podman/storage/overlay")], check=False)
        self.end_daemon()
        shutil.rmtree(self.directory, ignore_errors=True)

    def configure(self, settings):
        """Takes effect when a daemon starts next."""
        self.end_daemon()
        (self.home / "config.toml").write_text(settings + "[edge]\nport = 0\n")

    # heyvm

    def run(self, *arguments, check=True):
        return subprocess.run([self.heyvm, *arguments], env=self.environment, capture_output=True, text=True, check=check)

    def json(self, *arguments):
        return json.loads(self.run("--format", "json", *arguments).stdout)

    def create(self, size_class=None):
        return self.json("create", "--size-class", size_class or self.size_class)["id"]

    def remove(self, sandbox):
        self.run("rm", "-y", sandbox, check=False)

    def processes(self):
        """Process ids that have something of this stage's directory open, and the first words of their command lines."""
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit() or entry.name == str(os.getpid()):
                continue
            try:
                command = (entry / "cmdline").read_bytes()
                environment = (entry / "environ").read_bytes()
                links = {os.readlink(link) for link in (entry / "fd").iterdir()}
            except OSError:
                continue
            directory = str(self.directory)
            if directory.encode() in command + environment or any(link.startswith(directory) for link in links):
                yield int(entry.name), command.split(b"\0")

    def wait_for_pool(self, seconds=180):
        """Until the daemon's warm pool holds what it is to hold, and none of its VMs does anything any more."""
        deadline = time.monotonic() + seconds
        quiet = 0
        while quiet < 4:
            if time.monotonic() > deadline:
                raise TimeoutError("the warm pool is not filled")
            before = self.ticks()
            time.sleep(0.25)
            pooled = list((self.home / "sandboxes").glob("reserve-*/agent.sock"))
            quiet = quiet + 1 if len(pooled) >= 2 and self.ticks() - before <= 2 else 0

    def ticks(self):
        """Processor time of all machines, in hundredths of a second."""
        total = 0
        for pid in self.machines():
            try:
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            total += int(fields[11]) + int(fields[12])
        return total

    def machines(self):
        return [pid for pid, command in self.processes() if b"qemu" in command[0]]

    def end_daemon(self):
        for pid, command in list(self.processes()):
            if command[1:3] == [b"daemon", b"run"]:
                os.kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + 10
        while (left := list(self.processes())) and time.monotonic() < deadline:
            time.sleep(0.05)
        for pid, _ in left:
            os.kill(pid, signal.SIGKILL)

    # podman

    def podman(self, *arguments, check=True, **more):
        storage = self.directory / "podman"
        command = ["podman", "--root", str(storage / "storage"), "--runroot", str(storage / "run"), "--cgroup-manager=cgroupfs"]
        return subprocess.run([*command, *arguments], capture_output=True, check=check, **more)

    def prepare_podman(self):
        """Makes podman's image from the root file system of a sandbox of the default image."""
        if self.podman_ready:
            return
        sandbox = self.create()
        root = self.directory / "root.tar"
        with root.open("wb") as file:
            pack = ["tar", "-C", "/", "--one-file-system", "--exclude=./workspace", "-cf", "-", "."]
            subprocess.run([self.heyvm, "exec", sandbox, "--", *pack], env=self.environment, stdout=file, check=True)
        self.remove(sandbox)
        self.podman("import", str(root), PODMAN_IMAGE)
        root.unlink()
        self.podman_ready = True

    def podman_run(self, *options, command=("true",)):
        return self.podman("run", *PODMAN_RUN, *options, PODMAN_IMAGE, *command)


def wait_for_200(url, seconds=60):
    """Asks until the answer is 200; the host name's own address is loopback, whatever the resolver says."""
    host, _, path = url.removeprefix("http://").partition("/")
    request = urllib.request.Request(f"http://127.0.0.1:{host.rpartition(':')[2]}/{path}", headers={"Host": host})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            with opener.open(request, timeout=5) as answer:
                if answer.status == 200:
                    return
        except (urllib.error.URLError, OSError):
            time.sleep(0.005)
    raise TimeoutError(url)
