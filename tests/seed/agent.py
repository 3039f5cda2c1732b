import subprocess
import json

def heyvm(*args):
    """Run a heyvm command and return parsed JSON."""
    result = subprocess.run(
        ["heyvm", *args, "--format", "json"],
        capture_output=True, text=True, check=True,
    )
    return json.loads(result.stdout)

# Deploy an app with a health endpoint
deploy = heyvm(
    "deploy", "./my-app",
    "--name", "agent-worker",
    "--port", "8080",
    "--start-command", "python3 server.py",
    "--health-path", "/health",
    "--ttl-seconds", "3600",
    "--size-class", "small",
)

sandbox_id = deploy["id"]
public_url = deploy["urls"][0]["url"]
print(f"Deployed: {public_url}")

# Run a command inside the sandbox
result = heyvm("exec", sandbox_id, "--", "python3", "-c", "import sys; print(sys.version)")
print(f"Python version: {result['stdout'].strip()}")

# Clean up when done
heyvm("stop", sandbox_id)
