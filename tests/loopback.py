"""A language model's server on loopback, which answers well, badly, late or not at all."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Loopback:
    """Meets each request with the next entry of `script`, or, when that is used up, with reply(prompt) as JSON.

    Entries: "well"; "hang", too late; "fence", in a code fence; "drop", no answer; "html", no JSON around it; a status;
    or what to say instead. Kept: `requests` and their `keys`; `asked`, the prompts; `answered`, those replied to well.
    """

    def __init__(self, *script, reply):
        outer, self.script, lock = self, list(script), threading.Lock()
        self.requests, self.keys, self.asked, self.answered = [], [], [], []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                prompt = body["messages"][0]["content"]
                with lock:
                    outer.requests.append(body)
                    outer.keys.append(self.headers["Authorization"])
                    outer.asked.append(prompt)
                    what = outer.script.pop(0) if outer.script else "well"
                if what == "hang":
                    threading.Event().wait(1.0)
                if what == "drop":
                    self.connection.close()
                    return
                self.send_response(what if isinstance(what, int) else 200)
                self.send_header("Content-Type", "application/json")
                self.end_headers()
                text = what if isinstance(what, str) else json.dumps(what)
                if what in ("well", "hang", "fence"):
                    text = json.dumps(reply(prompt))
                if what == "fence":
                    text = f"```json\n{text}\n```"
                if what in ("well", "fence"):
                    outer.answered.append(prompt)
                answer = {"choices": [{"index": 0, "message": {"role": "assistant", "content": text}}]}
                try:
                    self.wfile.write(b"<html>" if what == "html" else json.dumps(answer).encode())
                except OSError:
                    pass  # who asked has gone

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()
