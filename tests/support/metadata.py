"""A loopback server with the documented behaviour of the metadata servers of AWS and Google Cloud."""

from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Metadata(ThreadingHTTPServer):
    """Returns `said[path]`; any other path is 404. AWS's paths need a token, Google's a header."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.said: dict[str, str] = {}
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class Answers(BaseHTTPRequestHandler):
    server: Metadata

    def do_PUT(self) -> None:
        asked = self.path == "/latest/api/token" and self.headers["X-aws-ec2-metadata-token-ttl-seconds"]
        self.answer(200 if asked else 405, "a-token")

    def do_GET(self) -> None:
        if self.path.startswith("/latest/") and self.headers["X-aws-ec2-metadata-token"] != "a-token":
            self.answer(401, "")
        elif self.path.startswith("/computeMetadata/") and self.headers["Metadata-Flavor"] != "Google":
            self.answer(403, "")
        else:
            self.answer(200 if self.path in self.server.said else 404, self.server.said.get(self.path, ""))

    def answer(self, status: int, text: str) -> None:
        self.send_response(status)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: object) -> None:
        pass
