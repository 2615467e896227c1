"""The running page under hostile requests: what it refuses, that this costs it nothing, and that it goes on drawing."""

import http.client
import io
import json
import os
import threading
import time
import uuid
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("gradio", reason="the page needs gradio")

from latentdiff.config.commands import Serve  # noqa: E402
from latentdiff.inference import serve  # noqa: E402
from latentdiff.utils.errors import ConfigError  # noqa: E402

API = "/gradio_api"
FORM = "multipart/form-data; boundary=xxx"
META = {"_type": "gradio.FileData"}


class Site:
    """The page, as a client that is not a browser sees it."""

    def __init__(self, blocks, folder: Path):
        self.blocks, self.folder = blocks, folder
        self.address = urlsplit(blocks.local_url).netloc

    def ask(self, method: str, path: str, body: bytes | dict | None = None, seconds: float = 20, **headers):
        """Status, headers and body of an answer."""
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        if isinstance(body, dict):
            body, headers = json.dumps(body).encode(), {"Content-Type": "application/json", **headers}
        connection = http.client.HTTPConnection(self.address, timeout=seconds)
        try:
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            return answer.status, answer.headers, answer.read()
        finally:
            connection.close()

    def component(self, name: str):
        return next(one for one in self.blocks.blocks.values() if getattr(one, "elem_id", None) == name)

    def function(self, name: str) -> int:
        """The number of the function that draws from a component."""
        component = self.component(name)
        return next(i for i, fn in self.blocks.fns.items() if component in fn.inputs and len(fn.inputs) > 3)

    def call(self, name: str, value, session: str = "s", steps: int = 2) -> dict:
        """What is sent to draw from `value`."""
        settings = [None, "a cat", "", 3, False, steps, 1, "ddim"]
        return {"data": [*settings, value, 0.05], "fn_index": self.function(name), "session_hash": session}

    def text(self, session: str, steps: int) -> dict:
        fn = next(i for i, fn in self.blocks.fns.items() if len(fn.inputs) == 8 and fn.inputs[0].stateful)
        return {"data": [None, "a cat", "", 3, False, steps, 1, "ddim"], "fn_index": fn, "session_hash": session}

    def join(self, call: dict) -> tuple[int, bytes]:
        status, _, body = self.ask("POST", f"{API}/queue/join", call)
        return status, body

    def result(self, session: str, seconds: float = 20) -> dict:
        """What the last call of a session came to."""
        text = self.ask("GET", f"{API}/queue/data?session_hash={session}", seconds=seconds)[2].decode()
        messages = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: ")]
        return next(message for message in messages if message["msg"] == "process_completed")

    def upload(self, content: bytes, **headers):
        body = part("files", content, "a.png") + b"--xxx--\r\n"
        return self.ask("POST", f"{API}/upload", body, Content_Type=FORM, **headers)

    def paint(self, content: bytes = b"x", fn: str = "accept_blobs", component: int | None = None, **form):
        number = self.component("canvas")._id if component is None else component
        fields = {"type": "layer", "index": "0", "id": "p", "component_id": number, "fn_name": fn, "session_hash": "s"}
        texts = [part(name, str(value).encode()) for name, value in (fields | form).items()]
        body = b"".join([*texts, part("file", content, "blob"), b"--xxx--\r\n"])
        return self.ask("POST", f"{API}/component_server/", body, Content_Type=FORM)

    def waiting(self) -> int:
        return len(self.blocks._queue)


def part(name: str, content: bytes, file: str | None = None) -> bytes:
    """One part of a form."""
    filename = f'; filename="{file}"' if file else ""
    return f'--xxx\r\nContent-Disposition: form-data; name="{name}"{filename}\r\n\r\n'.encode() + content + b"\r\n"


def png(size: int = 16, mode: str = "RGB") -> bytes:
    shades = np.random.default_rng(0).integers(0, 256, (size, size, len(mode)), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(shades).save(stream, "PNG")
    return stream.getvalue()


def memory() -> float:
    """MB of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


@pytest.fixture(scope="module")
def site(tiny_pipeline_folder, tmp_path_factory):
    options = Serve(checkpoint=str(tiny_pipeline_folder), max_upload_mb=1, max_queue=4, device="cpu")
    studio, folder = serve.open_studio(options), tmp_path_factory.mktemp("kept")
    blocks = serve.launch(studio, options, folder)
    with pytest.MonkeyPatch.context() as patch:
        try:
            from latentdiff.inference import guard

            patch.setattr(guard, "GONE", 1.0)
            yield Site(blocks, folder)
        finally:
            studio.close()
            blocks.close(verbose=False)


@pytest.fixture
def secret(tmp_path) -> Path:
    (tmp_path / "secret.png").write_bytes(png())
    return tmp_path / "secret.png"


# Files that a request names


def hostile_files(secret: Path, uploaded: str) -> list:
    """Ways to name a file that was not uploaded, as a picture to start from or as a part of a painting."""
    data_url = "data:image/png;base64,iVBORw0KGgo="
    others = ["/etc/passwd", "/nowhere.png", "/", "/dev/ptmx", "/dev/zero", "", "secret.png", "a\0b", 7, None]
    others += [
        f"{uploaded}/../../../secret.png",
        str(Path(uploaded).parent),
        f"file://{secret}",
        "http://127.0.0.1:9/a",
    ]
    files = [{"path": str(secret)}, {"path": str(secret), "meta": META}, {"path": str(secret), "is_stream": True}]
    files += [{"path": path} for path in others]
    files += [{"url": data_url}, {"path": None, "url": data_url}, {"url": "http://127.0.0.1:9/a.png"}]
    files += [{"path": str(secret), "orig_name": "a.svg"}]
    return files


def test_only_uploads_are_opened(site, secret):
    """Else whoever may draw could see every picture on the disk, learn which files there are, and stop the page with
    a device that never answers."""
    [uploaded] = json.loads(site.upload(png())[2])
    link = Path(uploaded).with_name("link.png")
    link.symlink_to(secret)
    answers, before = set(), threading.active_count()
    files = [*hostile_files(secret, uploaded), {"path": str(link)}]
    for file in files:
        answers.add(site.join(site.call("source", file)))
        for painting in ({"background": file}, {"layers": [file]}, {"composite": file}):
            answers.add(
                site.join(site.call("canvas", {"background": None, "layers": [], "composite": None} | painting))
            )
    answers.add(site.join(site.call("source", {"image": {"path": str(secret)}, "caption": None})))
    run = {"data": [{"path": str(secret)}], "fn_index": site.function("source"), "session_hash": "s"}
    answers.add(site.ask("POST", f"{API}/run/predict", run)[::2])
    [(status, body)] = answers
    assert status == 403 and str(secret).encode() not in body
    assert threading.active_count() <= before + 2
    assert site.waiting() == 0


def test_what_was_uploaded_is_drawn_from(site):
    """Else the guard would keep the page's own visitors out, too; and an address beside a file would be loaded."""
    [path] = json.loads(site.upload(png(), Origin=f"http://{site.address}")[2])
    file = {"path": path, "url": "http://127.0.0.1:9/other.png", "orig_name": "../a.png", "size": 3, "meta": META}
    assert site.join(site.call("source", file, "draws"))[0] == 200
    assert site.result("draws")["success"]
    assert site.paint(png(32, "RGBA"), type="background", index="null", id="one")[0] == 200
    assert site.paint(png(32, "RGBA"), id="one")[0] == 200
    painting = {"background": None, "layers": [], "composite": None, "id": "one"}
    assert site.join(site.call("canvas", painting, "paints"))[0] == 200
    assert site.result("paints")["success"]
    assert site.component("canvas").blob_storage == {}


def test_only_uploads_are_sent(site, secret):
    """Else the page would hand out other files, or fetch addresses for whoever asks."""
    [path] = json.loads(site.upload(png())[2])
    assert site.ask("GET", f"{API}/file={path}")[2] == png()
    others = [
        str(secret),
        "/etc/passwd",
        "/nowhere",
        "/dev/ptmx",
        f"{path}/../../../secret.png",
        "http://127.0.0.1:9/a",
    ]
    answers = {site.ask("GET", f"{API}/file={other}")[::2] for other in others}
    [(status, _)] = answers
    assert status == 403


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/call/predict"), ("POST", "/call/v2/predict"), ("POST", "/api/predict"),
        ("GET", "/deep_link?session_hash=s"),
        ("GET", "/proxy=http://127.0.0.1:9/"), ("GET", "/file/etc/passwd"), ("POST", "/vibe-code/"), ("GET", "/runs"),
        ("GET", "/dev/reload"), ("GET", "/queue/status"), ("POST", "/process_recording"), ("POST", "/stream/x"),
        ("GET", "/custom_component/x/client/component/style.css"), ("GET", "/openapi.json"),
    ],
)  # fmt: skip
def test_ways_in_that_the_page_does_not_use_are_closed(site, method, path):
    """Else what Gradio offers to other pages would have to be guarded, too."""
    status, _, body = site.ask(method, API + path, {"data": []} if method == "POST" else None)
    assert status == 404 and b"no use for that" in body


# Who asks


@pytest.mark.parametrize(
    "host", ["evil.com", "evil.com:80", "127.0.0.1.evil.com", "localhost.evil.com", "8.8.8.8", "", "[::2]"]
)
def test_other_names_of_the_page_are_refused(site, host):
    """Else a site whose name is given this machine's address could use the page from its visitors' browsers."""
    origin = f"http://{host}"
    for method, path in (("GET", "/"), ("GET", "/config"), ("POST", f"{API}/queue/join"), ("OPTIONS", f"{API}/upload")):
        asked = {"Access_Control_Request_Method": "POST"} if method == "OPTIONS" else {}
        status, headers, _ = site.ask(method, path, Host=host, Origin=origin, **asked)
        assert status in (400, 403) and "access-control-allow-origin" not in headers


def test_forwarded_names_are_looked_at_too(site):
    """Else Gradio would write that name into the page, as the address of everything in it."""
    assert site.ask("GET", "/", X_Forwarded_Host="evil.com")[0] == 403


@pytest.mark.parametrize(
    "origin", ["http://evil.com", "null", "http://127.0.0.1:1", "https://localhost", "file://", "http://"]
)
def test_other_sites_are_refused(site, origin):
    """Else any page that somebody looks at could draw, upload and listen here."""
    for method, path in (
        ("POST", f"{API}/queue/join"),
        ("POST", f"{API}/upload"),
        ("POST", f"{API}/cancel"),
        ("POST", f"{API}/component_server"),
        ("GET", f"{API}/queue/data?session_hash=s"),
        ("GET", f"{API}/heartbeat/s"),
        ("GET", f"{API}/upload_progress?upload_id=s"),
        ("OPTIONS", f"{API}/queue/join"),
    ):
        status, headers, _ = site.ask(method, path, Origin=origin, Access_Control_Request_Method="POST")
        assert status == 403 and "access-control-allow-origin" not in headers, (method, path)
    assert site.ask("GET", f"{API}/heartbeat/s", Sec_Fetch_Site="cross-site", Sec_Fetch_Mode="no-cors")[0] == 403
    assert site.ask("GET", "/", Sec_Fetch_Site="cross-site", Sec_Fetch_Mode="navigate")[0] == 200  # a link to it


def test_websockets_are_closed(site):
    """Else an Origin would have to be looked at there, too."""
    asks = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec_WebSocket_Version": "13", "Sec_WebSocket_Key": "eA=="}
    assert site.ask("GET", f"{API}/queue/join", **asks)[0] in (400, 403, 404)


@pytest.mark.parametrize(
    ("listening", "others", "host", "allowed"),
    [
        ("127.0.0.1", (), "localhost:7860", True),
        ("127.0.0.1", (), "127.0.0.1", True),
        ("127.0.0.1", (), "[::1]:7860", True),
        ("127.0.0.1", (), "192.168.1.5", False),
        ("127.0.0.1", ("draw.example.org",), "Draw.example.org", True),
        ("192.168.1.5", (), "192.168.1.5:7860", True),
        ("box.lan", (), "box.lan:7860", True),
        ("0.0.0.0", (), "192.168.1.5:7860", True),  # which no site can have as its name
        ("0.0.0.0", (), "box.lan", False),
        ("127.0.0.1", (), "localhost@evil.com", False),
        ("127.0.0.1", (), None, False),
    ],
)
def test_which_names_are_the_pages(listening, others, host, allowed):
    """Else the page could not be used where its owner wants it, or could from elsewhere."""
    from latentdiff.inference.guard import Hosts

    assert Hosts(listening, others).allow(host) is allowed


def test_a_proxys_name_may_ask():
    """Else the page would not work behind a proxy that asks for it by another name than its visitors do."""
    from latentdiff.inference.guard import Hosts

    hosts = Hosts("127.0.0.1", ("draw.example.org",))
    assert hosts.is_own("https://draw.example.org", "127.0.0.1:7860")
    assert hosts.is_own("http://localhost:7860", "localhost:7860")
    assert hosts.is_own("https://localhost", "localhost")
    assert not hosts.is_own("http://localhost:7861", "localhost:7860")
    with pytest.raises(ConfigError, match="--allowed-hosts 'http://a': must be a name"):
        Serve(checkpoint="folder", allowed_hosts=("http://a",))


# How much is taken


def test_a_painting_has_few_layers(site):
    """Else one small request would take gigabytes that are never given back."""
    before = memory()
    for index in ("200000000", "4", "-1", "1e3", "٣"):
        assert site.paint(index=index)[0] == 400
    assert memory() - before < 100
    assert site.paint(fn="preprocess")[0] == 404
    assert site.paint(component=site.component("source")._id)[0] == 404
    assert site.ask("POST", f"{API}/component_server", {"data": {}, "fn_name": "accept_blobs"})[0] == 400
    assert site.component("canvas").blob_storage == {}


def test_paintings_are_kept_within_bounds(site, monkeypatch):
    """Else paintings that nobody draws from would fill the memory."""
    from latentdiff.inference import uploads

    monkeypatch.setattr(uploads, "STROKES_OF_ONE", 2_000_000)
    monkeypatch.setattr(uploads, "STROKES_OF_ALL", 5_000_000)
    storage = site.component("canvas").blob_storage
    for i in range(8):
        assert site.paint(b"x" * 900_000, id=f"of-one-{i}")[0] == 200
    assert list(storage) == ["of-one-6", "of-one-7"]
    for i in range(8):
        assert site.paint(b"x" * 900_000, id=f"of-{i}", session_hash=f"painter{i}")[0] == 200
    assert list(storage) == [f"of-{i}" for i in range(3, 8)]
    answers = [site.paint(b"x" * 900_000, index=i, id="large", session_hash="large")[0] for i in range(3)]
    assert answers == [200, 200, 413] and "large" not in storage
    storage.clear()


def test_uploads_are_kept_within_bounds(site, tmp_path):
    """Else many uploads, each of them small enough, would fill the disk."""
    assert site.upload(b"x" * 2**21)[0] == 413
    many = b"".join(part("files", b"x" * 900_000, f"{i}.png") for i in range(3)) + b"--xxx--\r\n"
    assert site.ask("POST", f"{API}/upload", many, Content_Type=FORM)[0] == 413
    assert site.ask("POST", f"{API}/upload", iter([b"x"]), Content_Type=FORM, Transfer_Encoding="chunked")[0] == 411

    from latentdiff.inference.uploads import FILES_KEPT, Uploads

    uploads = Uploads(tmp_path, 2**17)
    for i in range(FILES_KEPT + 10):
        folder = tmp_path / f"{i:02}"
        folder.mkdir()
        (folder / "a.png").write_bytes(b"x" * 2**17)
        os.utime(folder / "a.png", (i, i))
    uploads.make_room()
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{i:02}" for i in range(11, FILES_KEPT + 10)]


def test_long_calls_are_refused(site):
    """Else a single call could take all memory while it is read."""
    assert site.join({"data": ["x" * 2**20], "fn_index": 0, "session_hash": "s"})[0] == 413
    assert site.join({"data": [], "fn_index": 0, "session_hash": "s" * 1000})[0] == 400
    assert site.ask("POST", f"{API}/queue/join", b"[" * 100_000)[0] == 400


def until(condition, seconds: float = 15) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_places_are_for_those_who_listen(site):
    """Else a client that joins the queue and goes away would keep everybody out, and be drawn for to the end."""
    sessions = [uuid.uuid4().hex for _ in range(4)]
    answers = [site.join(site.text(session, 1000))[0] for session in sessions]
    assert answers[0] == 200 and answers[-1] == 503  # of four places half are for one address
    until(lambda: not any(site.blocks._queue.active_jobs) and site.waiting() == 0)
    assert site.join(site.text("listens", 2))[0] == 200
    assert site.result("listens")["success"]


def test_calls_go_through_the_queue(site):
    """Else any number of drawings could be asked for past it."""
    call = site.text("past", 2)
    fn = site.blocks.fns[call["fn_index"]]
    assert site.ask("POST", f"{API}/run/{fn.api_name}", call)[0] == 404


def test_what_is_kept_is_for_its_owner_alone(site):
    """Else other users of the machine could look at what is drawn."""
    assert {path.name for path in site.folder.iterdir()} == {"drawn", "uploaded"}
    assert all(path.stat().st_mode & 0o77 == 0 for path in site.folder.iterdir())
    assert list((site.folder / "uploaded").rglob("*.png"))
