"""Files of answers, and the ranking page as a process of its own."""

import json
import subprocess
import sys
import time
import urllib.error
import urllib.request

from page_guard import free_port

from tests.inference.conftest import INFERENCE


def write_answers(path, count, models=("SFT", "SFT", "RLHF"), say="{model} answers {i}, take {take}"):
    """A file of ``count`` prompts, each with an answer of each model."""
    lines = [
        {
            "id": f"p{i}",
            "prompt": [{"role": "user", "content": f"Question {i}?"}],
            "answers": [
                {"model": model, "response": say.format(model=model.lower(), i=i, take=take), "tokens": 5}
                for take, model in enumerate(models)
            ],
        }
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def rows_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


class Server:
    """``inference/rank.py`` with these flags."""

    def __init__(self, *flags, port=None, program=INFERENCE / "rank.py"):
        self.command = [sys.executable, str(program), *map(str, flags)]
        self.port = port or free_port("127.0.0.1", 19870)
        self.start()

    def start(self):
        command = [*self.command, "--port", str(self.port)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self.said = []
        while "open http://" not in (self.said or [""])[-1]:
            line = self.process.stdout.readline()
            assert line, f"the page has ended: {self.said}"
            self.said.append(line)
        self.address = f"http://127.0.0.1:{self.port}/"
        end = time.monotonic() + 60
        while True:
            try:
                urllib.request.urlopen(self.address + "api/ping", timeout=10).close()
                return
            except urllib.error.HTTPError:
                return  # it asks for a password
            except OSError:
                assert time.monotonic() < end, "the page does not answer"
                time.sleep(0.05)

    def call(self, path, content=None, **headers):
        """Status and content of an answer."""
        data = None if content is None else json.dumps(content).encode()
        request = urllib.request.Request(self.address + path, data, headers)
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                body, status = answer.read(), answer.status
        except urllib.error.HTTPError as error:
            body, status = error.read(), error.code
        return status, json.loads(body) if body[:1] == b"{" and b"\n" not in body else body.decode()

    def kill(self):
        self.process.kill()
        self.process.wait()

    def stop(self):
        """End it as Ctrl-C does; gives what it has said since it began."""
        self.process.terminate()
        return "".join(self.said) + self.process.communicate(timeout=60)[0]
