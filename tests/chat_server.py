"""A small OpenAI-compatible endpoint on loopback that says what a test scripts."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Reply:
    """Status, body and headers; a dict is sent as JSON. `hold` is waited for before anything is sent."""

    def __init__(self, status=200, body=b"", headers=None, hold=None):
        self.status, self.headers, self.hold = status, headers or {}, hold
        self.body = json.dumps(body).encode() if isinstance(body, dict) else body


def said(text, sent=10, answered=5, finish="stop"):
    """A regular answer."""
    choice = {"message": {"role": "assistant", "content": text}, "finish_reason": finish}
    return Reply(body={"choices": [choice], "usage": {"prompt_tokens": sent, "completion_tokens": answered}})


@contextmanager
def chat_server(answer):
    """Yields (base URL, requests so far as (headers, body)); `answer(content of the last message, number)` -> Reply."""
    requests, lock = [], threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                requests.append((dict(self.headers), body))
                number = len(requests)
            reply = answer(body["messages"][-1]["content"], number)
            if reply is None:
                return  # closes the connection without a word
            if reply.hold is not None:
                reply.hold.wait(20)
            try:
                self.send_response(reply.status)
                for name, value in ({"Content-Length": str(len(reply.body))} | reply.headers).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(reply.body)
            except OSError:
                pass  # the client gave up

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", requests
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
