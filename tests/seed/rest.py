import requests

API = "http://localhost:3000"

# Create a sandbox
sandbox = requests.post(f"{API}/sandboxes", json={
    "name": "api-agent",
    "image": "ubuntu:24.04",
    "start_command": "python3 -m http.server 8080",
    "open_ports": [8080],
    "ttl_seconds": 3600,
}).json()

# Execute a command
result = requests.post(
    f"{API}/sandboxes/{sandbox['id']}/execute",
    json={"command": "python3", "args": ["-c", "print('hello')"]},
).json()
print(result["output"])  # "hello\n"

# Upload a file
requests.post(
    f"{API}/sandboxes/{sandbox['id']}/files/upload",
    json={
        "mount_path": "/workspace",
        "file_path": "script.py",
        "content": "cHJpbnQoJ2hlbGxvJyk=",  # base64
    },
)

# Clean up
requests.delete(f"{API}/sandboxes/{sandbox['id']}")
