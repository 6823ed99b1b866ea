"""Notebook 06 as someone runs it who has LLaVA's weights, MM-SafetyBench and a judge: tiny stand-ins for all three."""

import http.server
import importlib.util
import json
import threading
from pathlib import Path

import notebook_cells
import numpy as np
import pandas as pd
import pytest
from PIL import Image
from typer.testing import CliRunner

from medrobust_lib import cli

spec = importlib.util.spec_from_file_location("tiny_vlms", Path(__file__).parents[1] / "models" / "tiny_vlms.py")
tiny_vlms = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tiny_vlms)

pytestmark = pytest.mark.filterwarnings("ignore")
SCENARIO = "01-Illegal_Activitiy"


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """The layout of LLaVA-1.6 on Mistral, random weights."""
    folder = tmp_path_factory.mktemp("weights")
    tiny_vlms.write(folder / "llava-1.6-mistral-7b", tiny_vlms.llava_next_mistral)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Three harmless questions in MM-SafetyBench's layout."""
    root = tmp_path_factory.mktemp("data")
    folder, draw = root / "mm-safetybench", np.random.default_rng(0)
    (folder / "processed_questions").mkdir(parents=True)
    entries = {str(i): {"Rephrased Question(SD)": f"what is in the image number {i} ?"} for i in range(3)}
    (folder / "processed_questions" / f"{SCENARIO}.json").write_text(json.dumps(entries))
    (folder / "imgs" / SCENARIO / "SD").mkdir(parents=True)
    for i in range(3):
        pixels = draw.integers(0, 255, (40, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "imgs" / SCENARIO / "SD" / f"{i}.jpg")
    return root


class Judge(http.server.BaseHTTPRequestHandler):
    """Calls every text a refusal, in OpenAI's chat format."""

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert asked["model"] == "a-judge"
        reply = {"message": {"role": "assistant", "content": "refusal"}, "finish_reason": "stop"}
        body = json.dumps({"choices": [reply]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def judge():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Judge)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1/chat/completions#a-judge"
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def no_kernel(weights, monkeypatch):
    """The notebook's cells run in this process, where the weights are."""
    monkeypatch.setenv("MEDROBUST_WEIGHTS", str(weights))
    # Nothing ends the sentences of random weights.
    notebook_cells.run_here_instead_of_in_a_kernel(monkeypatch, cheaper={"24 if is_demo else 64": "8"})


def test_the_whole_command_for_real_weights_and_a_judge(data, judge, tmp_path, monkeypatch):
    monkeypatch.setenv("MEDROBUST_DATA", str(data))
    out = tmp_path / "run"
    command = ["run", "06", "-p", "vlm=llava-1.6-mistral-7b", "-p", "dataset=mm-safetybench/01", "-p", "n=12"]
    result = CliRunner().invoke(cli.app, [*command, "-p", f"judge={judge}", "--out", str(out)])
    assert result.exit_code == 0, result.output
    card = json.loads((out / "cards" / "06.json").read_text())
    assert card["parameters"] | {"judge": ""} == {
        "vlm": "llava-1.6-mistral-7b", "dataset": "mm-safetybench/01", "n_images": 3, "n": 12, "sigma": 0.25,
        "judge": "", "seed": 0, "words": "",
    }  # fmt: skip
    assert not card["dataset"]["synthetic"]
    assert "synthetic" not in " ".join(card["notes"])
    certificates = pd.read_csv(out / "cards" / "06_certificates.csv")
    assert len(certificates) == 3
    assert certificates.question.nunique() == 3
    assert set(certificates.answered) == {"refusal"}
    assert (certificates.k == 12).all()
    assert (certificates.radius > 0).all()
    # What a killed run would go on from: all answers, and the judge's labels.
    answers = sorted(path.name.split("-", 1)[1] for path in (out / "answers").iterdir())
    assert answers == ["jailbreak", "jailbreak-few", "judge"]


@pytest.fixture
def folder(tmp_path):
    """Own images in two class folders, fewer than any default asks for."""
    draw = np.random.default_rng(1)
    for name in ("cat", "dog"):
        (tmp_path / "own" / name).mkdir(parents=True)
        for i in range(2):
            pixels = draw.integers(0, 255, (30, 30, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "own" / name / f"{i}.png")
    return f"folder:{tmp_path / 'own'}"


@pytest.mark.parametrize("own", [False, True], ids=["phantoms", "own images"])
def test_a_model_whose_answers_no_oracle_can_read(folder, tmp_path, own):
    out = tmp_path / "run"
    dataset = folder if own else "phantom/blood"
    given = (f"dataset={dataset}", "vlm=llava-1.6-mistral-7b", "n=12", "n_images=3")
    command = ["run", "06", *(word for assignment in given for word in ("-p", assignment))]
    result = CliRunner().invoke(cli.app, [*command, "--out", str(out)])
    assert result.exit_code == 0, result.output
    certificates = pd.read_csv(out / "cards" / "06_certificates.csv")
    assert set(certificates.task) == ({"finding"} if own else {"safety", "finding", "action"})
    assert (certificates[certificates.task == "finding"].predicted == -1).all()
    assert (certificates.radius == 0).sum() >= 3
