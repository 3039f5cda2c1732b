import subprocess
import json
from concurrent.futures import ThreadPoolExecutor

def heyvm(*args):
    result = subprocess.run(
        ["heyvm", *args, "--format", "json"],
        capture_output=True, text=True, check=True,
    )
    return json.loads(result.stdout)

def deploy_worker(task_id):
    deploy = heyvm(
        "deploy", "./worker",
        "--name", f"worker-{task_id}",
        "--port", "8080",
        "--start-command", f"python3 worker.py --task {task_id}",
        "--health-path", "/health",
        "--ttl-seconds", "600",
        "--size-class", "micro",
    )
    return deploy["id"], deploy["urls"][0]["url"]

# Spin up 5 workers in parallel
with ThreadPoolExecutor(max_workers=5) as pool:
    workers = list(pool.map(deploy_worker, range(5)))

for sandbox_id, url in workers:
    print(f"Worker {sandbox_id}: {url}")

# Later: check status of all sandboxes
sandboxes = heyvm("list", "--all")
for sb in sandboxes:
    if sb["name"].startswith("worker-"):
        print(f"  {sb['name']}: {sb['status']}")
