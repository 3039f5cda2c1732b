"""A worker that computes something and tells of it over HTTP: `python3 worker.py --task N`."""

import argparse
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

arguments = argparse.ArgumentParser()
arguments.add_argument("--task", type=int, required=True)
task = arguments.parse_args().task
result = {"task": task, "done": False}


def work():
    result.update(sum=sum(n * n for n in range(1000 * (task + 1))), done=True)


class Status(BaseHTTPRequestHandler):
    def do_GET(self):
        body = (json.dumps({"status": "ok"} if self.path == "/health" else result) + "\n").encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


threading.Thread(target=work, daemon=True).start()
ThreadingHTTPServer(("0.0.0.0", 8080), Status).serve_forever()
