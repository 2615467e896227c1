"""`latentdiff serve` as a command: what it refuses, where it listens, what it says."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.request

import pytest

from latentdiff import ConsistencyScheduler
from latentdiff.config.commands import Serve
from latentdiff.inference.recipe import folder_ingredient
from latentdiff.inference.serve import announce, is_loopback, launch, open_studio, require_gradio, when_ended
from latentdiff.inference.session import Settings, Usual
from latentdiff.models.lora import save_lora
from latentdiff.utils.errors import ConfigError


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"max_queue": 0}, "--max-queue is 0; it must be at least 1"),
        ({"max_upload_mb": 0}, "--max-upload-mb is 0; it must be at least 1"),
        ({"port": 65536}, r"--port is 65536; it must lie in 1 … 65535"),
    ],
)
def test_flags_out_of_range_are_named(changed, message):
    """Else the page would start and take nothing, or Gradio's traceback would answer."""
    with pytest.raises(ConfigError, match=message):
        Serve(checkpoint="folder", **changed)


@pytest.mark.parametrize(
    ("host", "expected"),
    [("127.0.0.1", True), ("127.1.2.3", True), ("localhost", True), ("::1", True), ("0.0.0.0", False), ("::", False),
     ("192.168.1.5", False), ("somewhere.example", False)],
)  # fmt: skip
def test_who_can_reach_an_address(host, expected):
    """Else an open page would not be warned of."""
    assert is_loopback(host) is expected


def test_with_distilled_lora_weights_it_draws_in_few_steps(tiny_pipeline_folder, tmp_path):
    """Else a small download could not make the page draw while somebody types."""
    from tests.models.test_lora import adapted

    save_lora(adapted(), tmp_path)
    ConsistencyScheduler(original_inference_steps=10).save_pretrained(tmp_path)
    studio = open_studio(Serve(checkpoint=str(tiny_pipeline_folder), lora=tmp_path, device="cpu"))
    assert studio.usual_settings() == Usual("lcm", 4, 1.0, True)
    [*_, drawing] = studio.text_to_image(
        Settings(prompt="a cat", num_inference_steps=4, scheduler="lcm"), threading.Event()
    )
    assert drawing.recipe.lora == folder_ingredient(tmp_path)
    studio.close()


def test_without_gradio_it_says_how_to_install_it(monkeypatch):
    """Else an ImportError would answer, after the checkpoint has been loaded."""
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(ConfigError, match=r"pip install 'latentdiff\[serve\]'"):
        require_gradio()


def test_an_open_page_is_warned_of(capsys):
    """Else somebody would let a whole network draw here without knowing."""
    announce("http://127.0.0.1:7860/", "127.0.0.1")
    assert capsys.readouterr().err == ""
    announce("http://0.0.0.0:7860/", "0.0.0.0")
    warning = capsys.readouterr().err
    assert warning.startswith("warning: whoever can reach 0.0.0.0") and warning.count("\n") == 1


def test_a_port_in_use_is_named(tiny_pipeline_folder, tmp_path):
    """Else Gradio's words, which speak of its environment variables, would answer."""
    pytest.importorskip("gradio", reason="the page needs gradio")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        options = Serve(checkpoint=str(tiny_pipeline_folder), port=taken.getsockname()[1], device="cpu")
        studio = open_studio(options)
        with pytest.raises(ConfigError, match=f"^127.0.0.1:{options.port} cannot be listened on") as mistake:
            launch(studio, options, tmp_path)
        studio.close()
    assert "\n" not in str(mistake.value)


def test_serves_until_it_is_ended(tiny_pipeline_folder, tmp_path):
    """Else the command would not do what its help says, leave a server behind, or drawings that others can read."""
    pytest.importorskip("gradio", reason="the page needs gradio")
    command = [sys.executable, "-m", "latentdiff.cli", "serve", str(tiny_pipeline_folder), "--device", "cpu"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    environment = {name: value for name, value in os.environ.items() if name != "GRADIO_TEMP_DIR"}
    with subprocess.Popen(command, **pipes, env=environment | {"TMPDIR": str(tmp_path)}) as server:
        try:
            line = server.stdout.readline()
            url = re.match(r"http://127\.0\.0\.1:\d+/", line)
            assert url, line + server.stderr.read()
            with urllib.request.urlopen(url[0]) as answer:
                assert b"latentdiff" in answer.read()
            [kept] = tmp_path.glob("latentdiff-*")
            assert kept.stat().st_mode & 0o777 == 0o700
            form = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\nx\r\n--x--\r\n'
            headers = {"Content-Type": "multipart/form-data; boundary=x"}
            urllib.request.urlopen(urllib.request.Request(f"{url[0]}gradio_api/upload", form, headers)).close()
            assert [path.relative_to(tmp_path).parts[0] for path in tmp_path.rglob("a.png")] == [kept.name]
            server.send_signal(signal.SIGTERM)
            rest, complaints = server.communicate(timeout=60)
        finally:
            server.kill()
    assert (server.returncode, rest) == (0, "closed\n"), complaints
    assert "Traceback" not in complaints
    assert not list(tmp_path.glob("latentdiff-*"))
    assert not [path for path in tmp_path.rglob("gradio/**/*") if path.is_file()]  # it makes an empty folder there


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_every_way_to_end_it_is_heard(name):
    """Else Ctrl-C, a service manager or a closed terminal would leave files; nor may nohup be undone."""
    number = getattr(signal, name)
    kept = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        signal.signal(number, signal.SIG_IGN)
        when_ended()
        assert signal.getsignal(number) is signal.SIG_IGN
        signal.signal(number, signal.SIG_DFL)
        ended = when_ended()
        os.kill(os.getpid(), number)
        assert ended.wait(5)
    finally:
        for each, handler in kept.items():
            signal.signal(each, handler)


def test_help_loads_no_gradio():
    """Else `latentdiff --help` would take seconds."""
    heavy = {"gradio", "latentdiff.inference.session"}
    code = f"import sys, latentdiff.cli; sys.exit(sorted({heavy} & sys.modules.keys()) or 0)"
    subprocess.run([sys.executable, "-c", code], check=True)
