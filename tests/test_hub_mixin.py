"""The hub: policies, tokenizers and agents through folders, and through a stand-in for the hub's HTTP API."""

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import torch
from tiny import assert_same, tiny_agent, tiny_policy, weights_of

import agents
from agents import GRPO, PANW, VMR
from agents.model_card import of_run, told
from agents.policies.base import Policy
from agents.policies.table import TablePolicy
from agents.policies.var_text import VARTextPolicy
from var_env.faults import Faults
from var_env.tokenizers import Tokenizer, VisualTokenizer
from var_env.weights import fingerprint

ROOT = Path(__file__).parent.parent


class TestFolder:
    def test_policy(self, tokenizer, tmp_path):
        policy = tiny_policy(tokenizer)
        policy.save_pretrained(tmp_path)
        for cls in (VARTextPolicy, Policy):
            found = cls.from_pretrained(tmp_path)
            assert type(found) is VARTextPolicy and not found.training
            assert_same(weights_of(found), weights_of(policy))
            assert fingerprint(found.tokenizer) == fingerprint(tokenizer)

    def test_tokenizer(self, tokenizer, tmp_path):
        tokenizer.save_pretrained(tmp_path)
        assert fingerprint(Tokenizer.from_pretrained(str(tmp_path))) == fingerprint(tokenizer)
        assert type(VisualTokenizer.from_pretrained(tmp_path)) is Tokenizer

    def test_agent_in_its_wrappers(self, parts, tmp_path):
        agent = PANW(tiny_agent(parts, VMR, split=1, suffix_samples=2), alpha=0.7)
        agent.save_pretrained(tmp_path)
        found = VMR.from_pretrained(tmp_path, device="cpu", learning_rate=1e-6)
        assert type(found) is PANW and found.alpha == 0.7 and found.unwrapped.learning_rate == 1e-6
        assert_same(weights_of(found.policy), weights_of(agent.policy))
        assert not any(name.startswith("_hub") for name in vars(agent.unwrapped)), "the mixin adds no setting"

    def test_an_agent_over_another(self, parts, tmp_path):
        tiny_agent(parts).save_pretrained(tmp_path)
        assert (tmp_path / "reference.safetensors").is_file()
        tiny_agent(parts, kl_coef=0.0).save_pretrained(tmp_path)
        assert agents.Agent.from_pretrained(tmp_path, device="cpu").reference is None

    def test_no_code_is_written(self, parts, tmp_path):
        tiny_agent(parts).save_pretrained(tmp_path)
        assert {path.suffix for path in tmp_path.iterdir()} == {".safetensors", ".json", ".md", ""}
        assert [path.name for path in tmp_path.iterdir() if not path.suffix] == ["SHA256SUMS"]


class TestRefused:
    def test_another_tokenizer(self, tokenizer, tmp_path):
        tiny_policy(tokenizer).save_pretrained(tmp_path)
        with torch.random.fork_rng():
            torch.manual_seed(9)
            other = Tokenizer(tokenizer.schedule, vocab_size=32, channels=4, width=8, blocks=1)
        other.save(tmp_path / "tokenizer.safetensors")
        with pytest.raises(ValueError, match="was trained on another tokenizer"):
            VARTextPolicy.from_pretrained(tmp_path)

    def test_another_class(self, tokenizer, parts, tmp_path):
        tiny_policy(tokenizer).save_pretrained(tmp_path / "policy")
        with pytest.raises(ValueError, match=r"holds a VARTextPolicy and no TablePolicy: read it with .*Policy"):
            TablePolicy.from_pretrained(tmp_path / "policy")
        tiny_agent(parts).save_pretrained(tmp_path / "agent")
        with pytest.raises(ValueError, match=r"holds a GRPO and no VMR: read it with agents\.Agent"):
            VMR.from_pretrained(tmp_path / "agent", device="cpu")

    def test_another_kind(self, tokenizer, tmp_path):
        tokenizer.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="holds a tokenizer and no policy"):
            VARTextPolicy.from_pretrained(tmp_path)

    @pytest.mark.parametrize("content", [None, "{", "[]", '{"model_type": "bert"}'])
    def test_a_folder_of_something_else(self, tmp_path, content):
        if content is not None:
            (tmp_path / "config.json").write_text(content)
        with pytest.raises(ValueError, match=r"was not written by save_pretrained\(\)"):
            GRPO.from_pretrained(tmp_path)

    def test_an_agent_that_was_changed(self, parts, tmp_path):
        tiny_agent(parts).save_pretrained(tmp_path)
        state = json.loads((tmp_path / "state.json").read_text())
        (tmp_path / "state.json").write_text(json.dumps({**state, "agent": "Other"}))
        with pytest.raises(ValueError, match=r"state\.json is not what was written"):
            GRPO.from_pretrained(tmp_path)

    def test_no_such_folder(self):
        with pytest.raises(FileNotFoundError, match="there is no folder a/b/c, and the hub's"):
            VARTextPolicy.from_pretrained("a/b/c")


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as one upload and one download ask for; keeps the files by repository."""

    repositories: dict[str, dict[str, bytes]]
    uploads: dict[str, bytes]
    sha = "1" * 40

    def log_message(self, *_):
        pass

    def body(self):
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def answer(self, content, status=200, **headers):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def do_POST(self):
        path, body = urlsplit(self.path).path, self.body()
        host = f"http://{self.headers['Host']}"
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = "/".join(filter(None, [asked.get("organization"), asked["name"]]))
            self.repositories.setdefault(name, {})
            self.answer({"url": f"{host}/{name}"})
        elif "/preupload/" in path:
            files = json.loads(body)["files"]
            self.answer({"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]})
        elif "/commit/" in path:
            name = path.removeprefix("/api/models/").partition("/commit/")[0]
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    content = base64.b64decode(entry["value"]["content"])
                    self.repositories[name][entry["value"]["path"]] = content
            self.answer({"success": True, "commitOid": self.sha, "commitUrl": f"{host}/{name}/commit/{self.sha}"})
        elif path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        else:
            self.answer({"error": f"no {path}"}, 404)

    def do_GET(self):
        path = urlsplit(self.path).path
        if path.startswith("/api/models/"):
            name = path.removeprefix("/api/models/").partition("/revision/")[0].partition("/tree/")[0]
            if name not in self.repositories:
                self.answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
                return
            files = self.repositories[name]
            if "/tree/" in path:
                self.answer(
                    [{"type": "file", "path": file, "size": len(data), "oid": "0" * 40} for file, data in files.items()]
                )
            else:
                siblings = [{"rfilename": file, "size": len(data)} for file, data in files.items()]
                self.answer({"id": name, "modelId": name, "sha": self.sha, "siblings": siblings, "tags": []})
            return
        name, _, rest = path.lstrip("/").partition("/resolve/")
        data = self.repositories.get(name, {}).get(rest.partition("/")[2])
        if data is None:
            self.answer({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound")
        else:
            etag = '"' + hashlib.sha256(data).hexdigest() + '"'
            self.answer(data, ETag=etag, X_Repo_Commit=self.sha, X_Linked_Size=str(len(data)))

    do_HEAD = do_GET


@pytest.fixture
def hub():
    """The address of an empty stand-in, and its repositories."""
    handler = type("OneHub", (Hub,), {"repositories": {}})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", handler.repositories
    server.shutdown()
    server.server_close()


def program(code, home, **variables):
    """The output of a program; the hub's address is read once a process, so each has its own."""
    environment = {**os.environ, "HF_HOME": str(home), "PYTHONPATH": str(ROOT), "HF_HUB_DISABLE_XET": "1", **variables}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=100)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_there_and_back_and_offline(hub, tokenizer, tmp_path):
    url, repositories = hub
    policy = tiny_policy(tokenizer)
    policy.save_pretrained(tmp_path / "here")
    code = f"""
from agents.policies.base import Policy
from var_env.weights import fingerprint
policy = Policy.from_pretrained({str(tmp_path / "here")!r})
policy.push_to_hub("me/tiny", token="hf_x")
found = Policy.from_pretrained("me/tiny")
print(fingerprint(found))
try:
    Policy.from_pretrained("me/none")
except OSError as error:
    print(error)
"""
    name, missing = program(code, tmp_path / "home", HF_ENDPOINT=url).splitlines()
    assert name == fingerprint(policy)
    assert missing.startswith("cannot get 'me/none' from the hub: check the name and the network, fetch it with `hf")
    assert sorted(repositories["me/tiny"]) == [
        "README.md",
        "config.json",
        "policy.safetensors",
        "tokenizer.safetensors",
    ]
    card = repositories["me/tiny"]["README.md"].decode()
    assert 'policy = Policy.from_pretrained("me/tiny")' in card and "| width | 32 |" in card and "vartext" in card

    code = """
from agents.policies.base import Policy
for name in ("me/tiny", "me/other"):
    try:
        print(type(Policy.from_pretrained(name)).__name__)
    except OSError as error:
        print(error)
"""
    cached, offline = program(code, tmp_path / "home", HF_ENDPOINT=url, HF_HUB_OFFLINE="1").splitlines()
    assert cached == "VARTextPolicy"
    assert offline.startswith("cannot get 'me/other' from the hub: ") and "or give a folder (" in offline


class TestCard:
    RESULT = {
        "agent": "grpo",
        "seed": 1,
        "config": {"learning_rate": 1e-4},
        "budget": {"images": 1600},
        "metrics": {"word_accuracy": [0.41, 0.36, 0.46]},
    }

    def test_of_a_run(self, tokenizer, tmp_path):
        (tmp_path / "result.json").write_text(json.dumps(self.RESULT))
        tiny_policy(tokenizer).save_pretrained(tmp_path / "policy", model_card_kwargs=of_run(tmp_path))
        card = (tmp_path / "policy" / "README.md").read_text()
        assert "| word_accuracy | 0.410 | 0.360 to 0.460 |" in card
        assert "| agent | grpo |" in card and "| learning_rate | 0.0001 |" in card and "| images | 1600 |" in card
        assert "- the letter A as H, rate 0.4" in card and "- navy ink as black, rate 0.6" in card
        assert "{" not in card

    def test_without_faults(self, tmp_path):
        (tmp_path / "result.json").write_text(json.dumps(self.RESULT))
        assert of_run(tmp_path, faults=None)["faults"] == [] == told(Faults())

    def test_no_run(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="give the folder of a finished run"):
            of_run(tmp_path)

    @pytest.mark.parametrize("content", ["", "[]", "{}", '{"metrics": {"reward": [1]}}'])
    def test_a_damaged_result(self, tmp_path, content):
        (tmp_path / "result.json").write_text(content)
        with pytest.raises(ValueError, match="is damaged or of another version"):
            of_run(tmp_path)
