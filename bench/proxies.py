"""Two proxies before one upstream on loopback, and a load generator (wrk)."""

import re
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
CONNECTIONS = 32
SECONDS = 4
UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}

NGINX = """
daemon off; master_process off; pid {directory}/{name}.pid; error_log {directory}/{name}.log;
worker_rlimit_nofile 4096;
events {{ worker_connections 2048; }}
http {{
  access_log off; keepalive_requests 1000000000; tcp_nodelay on; proxy_temp_path {directory}/{name}-proxy;
  client_body_temp_path {directory}/{name}-body; fastcgi_temp_path {directory}/{name}-f; uwsgi_temp_path {directory}/{name}-u;
  scgi_temp_path {directory}/{name}-s;
  {content}
}}
"""
UPSTREAM = "server {{ listen 127.0.0.1:{upstream}; location / {{ default_type text/plain; return 200 '{body}'; }} }}"
PROXY = """
  upstream app {{ server 127.0.0.1:{upstream}; keepalive 128; keepalive_requests 1000000000; }}
  server {{ listen 127.0.0.1:{nginx}; location / {{
    proxy_pass http://app; proxy_http_version 1.1; proxy_set_header Connection ""; proxy_set_header Host $http_host;
    proxy_set_header X-Forwarded-For $remote_addr; proxy_set_header X-Forwarded-Proto $scheme;
    proxy_set_header X-Forwarded-Host $http_host; proxy_buffering off;
  }} }}
"""


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class Proxies:
    """nginx as the upstream, nginx as a proxy, and the edge."""

    names = ["edge", "nginx"]

    def __enter__(self):
        self.directory = Path(tempfile.mkdtemp(prefix="hvb-edge-"))
        self.ports = {name: free_port() for name in ("upstream", "nginx", "edge")}
        self.processes = []
        build = ["cargo", "build", "--quiet", "--release", "--locked", "-p", "heyvm-edge", "--example", "before_an_app"]
        subprocess.run(build, cwd=PROJECT, check=True)
        self.nginx("upstream", UPSTREAM.format(body="x" * 200, **self.ports))
        self.nginx("proxy", PROXY.format(**self.ports))
        program = PROJECT / "target/release/examples/before_an_app"
        self.start([program, str(self.ports["edge"]), str(self.ports["upstream"])])
        for port in self.ports.values():
            self.wait_for(port)
        return self

    def __exit__(self, *_):
        for process in self.processes:
            process.kill()
            process.wait()
        shutil.rmtree(self.directory, ignore_errors=True)

    def nginx(self, name, content):
        configuration = self.directory / f"{name}.conf"
        configuration.write_text(NGINX.format(directory=self.directory, name=name, content=content))
        program = shutil.which("nginx") or "/usr/sbin/nginx"
        self.start([program, "-c", str(configuration), "-e", str(self.directory / f"{name}.log")])

    def start(self, command):
        self.processes.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))

    def wait_for(self, port):
        deadline = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                return
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)

    def load(self, proxy):
        """Requests per second, and the time that 99 of 100 stay within, in seconds."""
        command = ["wrk", "--threads", "1", "--connections", str(CONNECTIONS), "--duration", f"{SECONDS}s", "--latency"]
        command += ["--header", "Host: app.localhost", f"http://127.0.0.1:{self.ports[proxy]}/"]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        if "Non-2xx" in told or "Socket errors" in told:
            raise RuntimeError(f"{proxy}: {told}")
        number, unit = re.search(r"99%\s+([\d.]+)(us|ms|s)", told).groups()
        return {"rate": float(re.search(r"Requests/sec:\s+([\d.]+)", told).group(1)), "p99": float(number) * UNITS[unit]}
