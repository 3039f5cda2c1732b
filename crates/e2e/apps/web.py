"""The server that the end-to-end tests talk to: standard library only, on the guest's loopback, port 8080 or $PORT.

/health /env /version        short answers            POST /echo     the body back, as it comes (chunked)
/sse          an event every 0.2 s, 5 of them         POST /digest   bytes and SHA-256 of the body
/slow?N       answers after N seconds                 /ws            WebSocket: every message back
/headers      the request's headers as JSON           /big?N         N bytes, chunked
"""

import base64
import hashlib
import json
import os
import struct
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

PIECE = 65536


class Web(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        path, _, query = self.path.partition("?")
        if path == "/health":
            self.answer("ok\n")
        elif path == "/env":
            self.answer(json.dumps(dict(os.environ)))
        elif path == "/version":
            self.answer(open("version").read())
        elif path == "/headers":
            self.answer(json.dumps({name.lower(): value for name, value in self.headers.items()}))
        elif path == "/slow":
            time.sleep(float(query))
            self.answer("late\n")
        elif path == "/sse":
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            for number in range(5):
                self.chunk(f"data: {number}\n\n".encode())
                time.sleep(0.2)
            self.chunk(b"")
        elif path == "/big":
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            left = int(query)
            while left > 0:
                self.chunk(b"x" * min(left, PIECE))
                left -= PIECE
            self.chunk(b"")
        elif path == "/ws":
            self.websocket()
        else:
            self.answer("no such page\n", 404)

    def do_POST(self):
        if self.path == "/digest":
            digest, size = hashlib.sha256(), 0
            for piece in self.body():
                digest.update(piece)
                size += len(piece)
            self.answer(json.dumps({"bytes": size, "sha256": digest.hexdigest()}))
        elif self.path == "/echo":
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            for piece in self.body():
                self.chunk(piece)
            self.chunk(b"")
        else:
            self.answer("no such page\n", 404)

    def body(self):
        """The request's body in pieces, as they come."""
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            while size := int(self.rfile.readline().split(b";")[0], 16):
                while size:
                    piece = self.rfile.read1(min(size, PIECE))
                    size -= len(piece)
                    yield piece
                self.rfile.readline()
            self.rfile.readline()
            return
        left = int(self.headers.get("Content-Length", "0"))
        while left:
            piece = self.rfile.read1(min(left, PIECE))
            if not piece:
                return
            left -= len(piece)
            yield piece

    def answer(self, text, status=200):
        body = text.encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def chunk(self, data):
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        self.wfile.flush()

    def websocket(self):
        """RFC 6455, as far as an echo needs it."""
        key = self.headers["Sec-WebSocket-Key"] + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
        self.send_response(101)
        self.send_header("Upgrade", "websocket")
        self.send_header("Connection", "Upgrade")
        self.send_header("Sec-WebSocket-Accept", base64.b64encode(hashlib.sha1(key.encode()).digest()).decode())
        self.end_headers()
        self.wfile.flush()
        self.close_connection = True
        while True:
            head, length = self.rfile.read(2)
            opcode, length = head & 15, length & 127
            if length == 126:
                (length,) = struct.unpack(">H", self.rfile.read(2))
            elif length == 127:
                (length,) = struct.unpack(">Q", self.rfile.read(8))
            mask, data = self.rfile.read(4), self.rfile.read(length)
            data = bytes(byte ^ mask[i % 4] for i, byte in enumerate(data))
            size = bytes([len(data)]) if len(data) < 126 else b"\x7e" + struct.pack(">H", len(data))
            self.wfile.write(bytes([head]) + size + data)
            self.wfile.flush()
            if opcode == 8:
                return

    def log_message(self, *arguments):
        print(self.command, self.path, flush=True)


ThreadingHTTPServer.request_queue_size = 64
ThreadingHTTPServer(("127.0.0.1", int(os.environ.get("PORT", "8080"))), Web).serve_forever()
