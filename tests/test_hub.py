"""`hf:` names through huggingface_hub, against a server here that speaks its protocol."""

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading

import pytest
from helpers import weights_file

COMMIT = "0123456789" * 4
FILES = {
    "me/vit": {name: weights_file("hf_vit") / name for name in ("model.safetensors", "config.json")}
}
FILES["me/cut"] = FILES["me/vit"]


class Hub(http.server.BaseHTTPRequestHandler):
    """Serves /OWNER/NAME/resolve/REVISION/FILE; "me/cut" breaks off in the middle of a file."""

    downloads = []

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer()

    def answer(self):
        parts = self.path.split("?")[0].strip("/").split("/", 4)
        owner, name, _, revision, file = parts + [""] * (5 - len(parts))
        repository = FILES.get(f"{owner}/{name}")
        if repository is None or file not in repository:
            self.send_response(404)
            kind = "RepoNotFound" if repository is None else "EntryNotFound"
            self.send_header("X-Error-Code", kind)
            if repository is not None:
                self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        content = repository[file].read_bytes()
        self.send_response(200)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "HEAD":
            return
        Hub.downloads.append(f"{owner}/{name}/{file}@{revision}")
        if name == "cut" and file == "model.safetensors":
            self.wfile.write(content[: len(content) // 2])
            self.close_connection = True
            return
        self.wfile.write(content)

    def log_message(self, *arguments):
        pass


CLIENT = """
import json, sys
from keras_vitnt.checkpoints import open_checkpoint
answers = []
for source in sys.argv[1:]:
    try:
        answers.append(sorted(open_checkpoint(source).config)[:2])
    except (ConnectionError, ValueError) as error:
        answers.append(str(error))
print(json.dumps(answers))
"""


@pytest.fixture
def ask(tmp_path):
    """Ask in a process of its own, with a cache of its own: its settings hold from the import."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def ask(*sources, **environment):
        if environment:
            server.shutdown()
            server.server_close()
        result = subprocess.run(
            [sys.executable, "-c", CLIENT, *sources],
            env=dict(
                os.environ,
                HF_ENDPOINT=f"http://127.0.0.1:{server.server_port}",
                HF_HOME=str(tmp_path),
                **environment,
            ),
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stderr[-2000:]
        return json.loads(result.stdout.splitlines()[-1])

    yield ask
    server.shutdown()
    server.server_close()


def test_hub(ask):
    found = ["architectures", "attention_probs_dropout_prob"]
    first, second, pinned, absent, cut = ask(
        "hf:me/vit", "hf:me/vit", f"hf:me/vit@{COMMIT}", "hf:me/absent", "hf:me/cut"
    )
    assert first == second == pinned == found
    assert Hub.downloads.count("me/vit/model.safetensors@main") == 1  # then from the cache
    assert absent.startswith("hf:me/absent: no such repository or revision")
    assert cut.startswith("hf:me/cut") and "\n" not in cut
    offline, missing, wrong = ask("hf:me/vit", "hf:me/other", "hf:me", HF_HUB_OFFLINE="1")
    assert offline == found
    assert missing.startswith("hf:me/other is not in the cache and the hub cannot be reached")
    assert wrong == "'hf:me': expected hf:owner/name or hf:owner/name@revision."
